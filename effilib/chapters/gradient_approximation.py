"""Chapter 4.2: how good a replaced weight gradient is, what it costs, and the grid of replacements and
schedules.
"""

import pandas as pd
import torch
import torch.nn.functional as F

from effilib import convolution, figures
from effilib.chapters.gradient_pruning import fewer
from effilib.chapters.products import formats, layer_times, say_conv
from effilib.convolution import Approximation, Convolution
from effilib.cost import Conv
from effilib.data import Batches
from effilib.experiment import Arm
from effilib.methods.gradient_approximation import (
    GradientApproximation,
    dw_at,
    locations,
    replacement,
    scheduled,
)
from effilib.models import stream
from effilib.training import train

SCHEDULES = ("S1", "S2", "S3")
RUNS = {"quick": dict(epochs=1.7, evaluations=10), "study": dict(epochs=3, evaluations=12)}
GRID = {"quick": dict(epochs=0.8, evaluations=1, seeds=1), "study": dict(epochs=2, evaluations=1, seeds=2)}
LAYERS = {  # large maps with few channels, and small ones with many
    "quick": (
        Conv(N=64, C=16, O=16, H=28, W=28),
        Conv(N=64, C=64, O=64, H=7, W=7),
        Conv(N=64, C=128, O=128, H=14, W=14),
    ),
    "study": (
        Conv(N=64, C=16, O=16, H=32, W=32),
        Conv(N=64, C=64, O=64, H=32, W=32),
        Conv(N=64, C=64, O=64, H=8, W=8),
        Conv(N=64, C=128, O=128, H=16, W=16),
    ),
    "smoke": (Conv(N=4, C=8, O=8, H=8, W=8),),
}


def by_hand():
    """One sample, two maps of 2 x 2: the location, the sum, and the gradient of a 1 x 1 filter, approximated
    and exact.
    """
    dy = torch.tensor([[[[1.0, -5.0], [2.0, 1.0]], [[0.0, 3.0], [-1.0, 0.0]]]])
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    index, v = locations(dy, "top")
    w, product = torch.zeros(2, 1, 1, 1), Convolution()
    approximated, exact = dw_at(index, v, x, w, product), product.backward(dy, x, w, (False, True))[1]
    rows = {}
    for o in range(2):
        i = index[0, o].item()
        rows[f"map {o + 1}"] = {
            "dy": str(dy[0, o].int().tolist()),
            "largest |dy| at": f"row {i // 2}, column {i % 2}",
            "x there": f"{x[0, 0].flatten()[i]:g}",
            "sum of dy": f"{v[0, o]:g}",
            "dW, one location": f"{approximated[o].item():g}",
            "dW, exact": f"{exact[o].item():g}",
        }
    return pd.DataFrame(rows).T


def check_gather(draws=2000):
    """The gather against the exact product of a dy with one location left, for several geometries; and which
    variant is biased.
    """
    g, rows = stream(0, "numerics"), {}
    for name, k, product in (
        ("3 x 3", 3, Convolution(padding=(1, 1))),
        ("3 x 3, stride 2", 3, Convolution(stride=(2, 2), padding=(1, 1))),
        ("5 x 5", 5, Convolution(padding=(2, 2))),
    ):
        x, w = (
            torch.randn(4, 6, 9, 9, generator=g, dtype=torch.float64),
            torch.randn(5, 6, k, k, generator=g, dtype=torch.float64),
        )
        dy = torch.randn(product.forward(x, w).shape, generator=g, dtype=torch.float64)
        index, v = locations(dy, "top")
        sparse = (
            torch.zeros_like(dy).flatten(2).scatter_(2, index[..., None], v[..., None].to(dy)).view_as(dy)
        )
        difference = (
            (dw_at(index, v, x, w, product) - product.backward(sparse, x, w, (False, True))[1]).abs().max()
        )
        rows[f"gather against product of the sparse dy, {name}: largest difference"] = f"{difference:.1e}"
    x, w = torch.randn(2, 3, 5, 5, generator=g), torch.randn(4, 3, 3, 3, generator=g)
    product = Convolution(padding=(1, 1))
    dy = torch.randn(product.forward(x, w).shape, generator=g)
    exact = product.backward(dy, x, w, (False, True))[1]
    dw = replacement("unbiased", generator=g)
    found = torch.stack([dw(dy, x, w, product) for _ in range(draws)])
    z = (found.mean(0) - exact) / (found.std(0) / draws**0.5)
    top = replacement("top", scale=1.0)(dy, x, w, product)
    rows[f"unbiased variant, mean of {draws} draws: largest |z| of {z.numel()}"] = f"{z.abs().max():.1f}"
    rows["top location, the same every time: |dW - exact| / |exact|"] = (
        f"{(top - exact).norm() / exact.norm():.2f}"
    )
    return pd.DataFrame({"result": rows}).rename_axis("what")


def quality(task, dataset, epochs=1.0):
    """Cosine between replaced and exact dW, and the ratio of their lengths, layer by layer, after some
    training of this task.
    """
    model = task.build(dataset)
    recipe = task.but(epochs=min(epochs, task.recipe.epochs), precision="fp32").recipe
    train(model, dataset, recipe, evaluations=1)
    x, y = next(iter(Batches(dataset, min(64, len(dataset.train)), stream(0, "numerics"))))
    g, rows = stream(0, "quality"), {}
    chosen = {
        n: m for n, m in convolution.layers(model, x[:2]).items() if max(m.kernel_size) > 1 and m.groups == 1
    }

    def look(name):
        def dw(dy, x, w, product):
            exact = product.backward(dy, x, w, (False, True))[1]
            row = rows[name] = {"maps": f"{dy.shape[2]} x {dy.shape[3]}"}
            for how in ("top", "unbiased", "random"):
                d = replacement(how, generator=g, scale=1.0)(dy, x, w, product)
                row[f"{how}: cosine"] = F.cosine_similarity(d.flatten(), exact.flatten(), 0).item()
                row[f"{how}: length"] = (d.norm() / exact.norm()).item()
            row["top, published scale: length"] = row["top: length"] / len(x)
            return exact

        return Approximation(dw=dw)

    convolution.convert_(chosen, {n: look(n) for n in chosen}, "look", "gradients")
    F.cross_entropy(model.train()(x), y).backward()
    return pd.DataFrame({n: rows[n] for n in chosen}).T.rename_axis("layer")


def quality_figure(frame):
    """(figure, caption) of `quality`: cosines by layer."""
    figure, axes = figures.new(width=8.5, height=1.3 + 0.3 * len(frame))
    for i, how in enumerate(("top", "unbiased", "random")):
        axes.plot(frame[f"{how}: cosine"], range(len(frame)), "o", color=figures.COLOURS[i], ms=6, label=how)
    axes.axvline(0, color="black", lw=0.8)
    axes.axvline(1, color="black", lw=0.8, ls=":")
    axes.set_yticks(range(len(frame)), frame.index)
    axes.invert_yaxis()
    axes.set_xlabel("cosine between the replaced and the exact weight gradient (1: same direction)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=3, fontsize=8)
    return figure, (
        "One location stands for a whole map: where neighbouring pixels are alike its gradient points the right way, "
        "where they are not it is little better than none. Random numbers are orthogonal to everything."
    )


def time_table(task):
    """Backward pass (dX and dW) of single layers with each replacement, in every format: dW replaced in every
    batch.
    """
    convs = {say_conv(c): c for c in LAYERS.get(task.preset, LAYERS["study"])}
    few = dict(repeats=2, seconds=1) if task.preset == "smoke" else dict(repeats=9, seconds=4)
    how = {
        h: Approximation(dw=replacement(h, generator=stream(0, "times")))
        for h in ("zero", "random", "top", "unbiased")
    }
    rows = {}
    for p in formats(task.device):
        times = layer_times(convs, how, precision=p, device=task.device, **few)
        for name in convs:
            exact = times[name, "exact"]
            whole = exact["forward"] + exact["backward"]
            row = rows[p, name] = {"forward + backward, ms": whole}
            row |= {
                h: f"{whole / (times[name, h]['forward'] + times[name, h]['backward']):.2f}x" for h in how
            }
    return pd.DataFrame(rows).T.rename_axis(["format", "layer"])


def schedule_table(layers=8, batches=8):
    """Which (layer, batch) pairs each schedule replaces; layer 0 is the stem."""
    rows = {}
    for s in SCHEDULES:
        for layer in range(layers + 1):
            marks = " ".join("x" if scheduled(s, layer, b) else "." for b in range(batches))
            rows.setdefault(f"layer {layer}" + (" (stem)" if not layer else ""), {})[
                f"{s}, batches 0 to {batches - 1}"
            ] = marks
    return pd.DataFrame(rows).T


def base_task(task, network=""):
    """In the study the published comparison: ResNet-20, with the control ResNet-14; else the task's own
    network.
    """
    if network or task.network != "resnet" or task.preset not in ("study", "full"):
        return task
    return task.but(widths={**task.widths, "blocks": (3, 3, 3)}, target=None)


def control(task):
    """The smaller exact network: ResNet-14 for ResNet-20, else one block less."""
    if task.network == "resnet" and task.widths.get("blocks") == (3, 3, 3):
        return Arm(name="ResNet-14, exact", role="control", network={"blocks": (2, 2, 2)})
    smaller = fewer(task)
    if smaller:
        return Arm(name="smaller network, exact", role="control", network=smaller)
    return Arm(name="fewer epochs, exact", role="control", changes={"epochs": 0.75 * task.recipe.epochs})


def arms(task):
    """The verdict arms: exact, zero gradients by S1, in the study the top location by S1, and the smaller
    network.
    """
    found = [
        Arm(name="exact", role="baseline"),
        Arm(name="zero, S1", methods=(GradientApproximation(how="zero", schedule="S1"),)),
    ]
    if task.preset in ("study", "full"):
        found.append(Arm(name="top location, S1", methods=(GradientApproximation(how="top", schedule="S1"),)))
    return [*found, control(task)]


def grid(task):
    """Every replacement with every schedule (quick: with S1); and what the published scale and the skipped
    parameter change.
    """
    found = [Arm(name="exact", role="baseline")]
    kinds = {"zero": {}, "random": {}, "top": {}, "unbiased": {}}
    if task.preset == "smoke":
        kinds = {"zero": {}, "top": {}}
    for how in kinds:
        for schedule in SCHEDULES if task.preset != "quick" or how == "zero" else SCHEDULES[:1]:
            found.append(
                Arm(name=f"{how}, {schedule}", methods=(GradientApproximation(how=how, schedule=schedule),))
            )
    found.append(
        Arm(name="skip the parameter, S1", methods=(GradientApproximation(how="skip", schedule="S1"),))
    )
    found.append(
        Arm(name="top at scale 1, S1", methods=(GradientApproximation(how="top", schedule="S1", scale=1.0),))
    )
    return [*found, control(task)]


PUBLISHED = pd.DataFrame(
    {
        "exact": ["1", "91.8 %", "91.8 %", "91.8 %"],
        "zero": ["+7.1 %", "90.3 %", "91.6 %", "91.1 %"],
        "random": ["-1.4 %", "90.0 %", "88.8 %", "87.9 %"],
        "top location": ["+3.5 %", "91.1 %", "91.6 %", "91.7 %"],
        "ResNet-14": ["+22 %", "90.8 %", "", ""],
    },
    index=["speed-up, S1", "best accuracy, S1", "S2", "S3"],
).T.rename_axis("ResNet-20, CIFAR-10, as published (Titan Xp; tables 2 to 5)")
