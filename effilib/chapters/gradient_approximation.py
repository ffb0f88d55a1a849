"""Chapter 4.2: what is trained, how good a replaced weight gradient is, and what it costs."""

import pandas as pd
import torch
import torch.nn.functional as F

from effilib import convolution
from effilib.chapters.gradient_pruning import smaller
from effilib.convolution import Approximation, Convolution
from effilib.cost import Conv
from effilib.experiment import Arm
from effilib.methods.gradient_approximation import (
    GradientApproximation,
    dw_at,
    locations,
    replacement,
    scheduled,
)
from effilib.models import stream
from effilib.tasks import Task
from effilib.timing import batch, formats, layer_times, say_conv
from effilib.training import train

SCHEDULES = ("S1", "S2", "S3")
ZERO = "zero, S1"
SIZES = {  # in the study the published comparison: ResNet-20 against ResNet-14
    "quick": dict(epochs=1),
    "study": dict(epochs=2, widths={"widths": (16, 32, 64), "blocks": (3, 3, 3)}),
}
GRID = {"quick": dict(epochs=0.4), "study": dict(epochs=1), "full": dict(epochs=5)}
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
    train(model, dataset, recipe)
    x, y = batch(dataset)
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


def time_table(task):
    """Backward pass (dX and dW) of single layers with each replacement, in every format: dW replaced in every
    batch.
    """
    convs = {say_conv(c): c for c in LAYERS.get(task.preset, LAYERS["study"])}
    few = {"smoke": dict(repeats=2, seconds=1), "quick": dict(repeats=5, seconds=0.5)}.get(task.preset, {})
    how = {
        h: Approximation(dw=replacement(h, generator=stream(0, "times")))
        for h in ("zero", "random", "top", "unbiased")
    }
    rows = {}
    for p in formats(task.device):
        whole = layer_times(convs, how, precision=p, device=task.device, **few).sum(axis=1)
        for name in convs:
            row = rows[p, name] = {"forward + backward, ms": whole[name, "exact"]}
            row |= {f"{h}, x": whole[name, "exact"] / whole[name, h] for h in how}
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


def control(task: Task) -> list[Arm]:
    """Return the smaller exact network: ResNet-14 for ResNet-20, else a block less."""
    if task.network == "resnet" and task.widths.get("blocks") == (3, 3, 3):
        return [Arm(name="ResNet-14, exact", role="control", network={"blocks": (2, 2, 2)})]
    return smaller(task)


def arms(task: Task) -> list[Arm]:
    """Return exact training, zero gradients and (study) the top location by S1, and the smaller network."""
    found = [
        Arm(name="exact", role="baseline"),
        Arm(name=ZERO, methods=(GradientApproximation(how="zero", schedule="S1"),)),
    ]
    if task.preset in ("study", "full"):
        found.append(Arm(name="top location, S1", methods=(GradientApproximation(how="top", schedule="S1"),)))
    return [*found, *control(task)]


def grid(task: Task) -> list[Arm]:
    """Return replacements and schedules (quick: some); all take the same steps."""
    if task.preset in ("smoke", "quick"):
        pairs = [("top", "S1"), ("unbiased", "S1"), ("zero", "S3")]
    else:
        pairs = [(how, s) for how in ("zero", "random", "top", "unbiased") for s in SCHEDULES]
    settings = {f"{how}, {s}": dict(how=how, schedule=s) for how, s in pairs}
    settings["skip the parameter, S1"] = dict(how="skip", schedule="S1")
    settings["top at scale 1, S1"] = dict(how="top", schedule="S1", scale=1.0)
    return [
        Arm(name="exact", role="baseline"),
        *(
            Arm(name=n, methods=(GradientApproximation(**how),), lengths=task.lengths)
            for n, how in settings.items()
        ),
    ]


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
