"""What chapters 3.3 to 4.2 share: a network wide enough that its convolutions bound a step, and how long its
passes take.
"""

import statistics as stats
from dataclasses import dataclass, replace

import pandas as pd
import torch
import torch.nn.functional as F

from effilib import convolution, cost, figures
from effilib.clock import elapsed, interleaved, steady_memory, synchronize
from effilib.convolution import EXACT, approx_conv2d
from effilib.cost import Conv
from effilib.data import Batches
from effilib.statistics import interval
from effilib.training import LAYOUTS, autocast, native_bf16, resolve_layout, resolve_precision, stream
from effilib.tuning import swept

WIDE = {  # convolutions of 128 to 256 channels, small maps: what a CPU trains in minutes
    "smoke": ((16,), (32,)),
    "quick": ((64,), (128,), (256,)),
    "study": ((32,), (128, 128), (256, 256)),
    "full": ((128, 128), (256, 256), (256, 256)),
}


def wide(task, network="", **changes):
    """The task on a wide network; with the user's own `network` it stays on that. changes: of the task or its
    recipe.
    """
    if not network:
        held = task.held and min(task.held, 1000)  # twenty evaluations must not take longer than the training
        changes = {
            "network": "vgg",
            "widths": {"widths": WIDE[task.preset]},
            "target": None,
            "held": held,
            **changes,
        }
    return task.but(**changes)


def sized(task, sizes):
    """The task in the size of one of a chapter's runs. sizes: preset -> changes.

    widths are those of our own residual network; never more seeds than the task has. If anything changes, a
    pilot finds the target: also with other evaluations only it is another one, for it has to be held by two
    in a row."""
    changes = {
        k: v for k, v in sizes.get(task.preset, {}).items() if k != "widths" or task.network == "resnet"
    }
    return (
        task.but(**changes | {"seeds": min(task.seeds, changes.get("seeds", task.seeds)), "target": None})
        if changes
        else task
    )


def judged(task):
    """The task of the judged arms where there are many of them.

    With fewer epochs, at the recorded sweep's best setting for them. Quick: with fewer evaluations too, which
    would take as long as the training."""
    return sized(
        task,
        {
            "quick": dict(epochs=2, evaluations=8, **swept(task, 2)),
            "study": dict(epochs=10, **swept(task, 10)),
        },
    )


def step_table(task, dataset, networks, loss=lambda model, logits, y: F.cross_entropy(logits, y)):
    """Forward and backward of networks (name -> module), timed in turn, beside what FLOPs predict, relative
    to the first.

    loss: (model, logits in fp32, y) -> what is differentiated.
    """
    x, y = next(
        iter(Batches(dataset, min(task.recipe.batch_size, len(dataset.train)), stream(0, "numerics")))
    )
    layout, precision = (
        LAYOUTS[resolve_layout(task.recipe, task.device)],
        resolve_precision(task.recipe.precision, task.device),
    )
    x, steps, flops = x.contiguous(memory_format=layout), {}, {}
    for name, model in networks.items():
        model.train().to(memory_format=layout)

        def step(model=model):
            with autocast(precision, dataset.device):
                logits = model(x)
            loss(model, logits.float(), y).backward()
            model.zero_grad()

        steps[name], flops[name] = step, cost.count_flops(step)
    seconds = {"quick": 3, "study": 15, "full": 15}.get(task.preset, 1)
    times = interleaved(
        steps, repeats=3 if task.preset == "smoke" else 15, warm_up=2, device=dataset.device, seconds=seconds
    )
    first, ms = next(iter(steps)), {name: 1e3 * stats.median(t) for name, t in times.items()}
    rows = {
        name: {
            "GFLOP a step": f"{flops[name] / 1e9:.2f}",
            "predicted": f"{flops[first] / flops[name]:.2f}x",
            "ms": f"{ms[name]:.2f}",
            "measured": f"{ms[first] / ms[name]:.2f}x",
        }
        for name in steps
    }
    return pd.DataFrame(rows).T.rename_axis(f"forward and backward, batch {len(x)}")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way of computing a network's products: convert(model) in place (None: exact), with a precision
    ("auto": the task's).
    """

    name: str
    convert: object = None
    precision: str = "auto"


def pass_times(task, dataset, variants, *, repeats=9, seconds=10):
    """Milliseconds of forward pass, backward pass and whole step of a network's variants, interleaved: dict
    name -> dict.

    All on one batch and with the same initial weights; learning rate 0, nothing is learned. Medians.
    """
    if task.preset == "smoke":
        repeats, seconds = 2, 2
    steady_memory()
    batches = Batches(dataset, min(task.recipe.batch_size, len(dataset.train)), stream(0, "data"))
    x, y = next(iter(batches))
    prepared = {}
    for v in variants:
        recipe = replace(
            task.recipe, precision=v.precision if v.precision != "auto" else task.recipe.precision
        )
        layout = LAYOUTS[resolve_layout(recipe, task.device)]
        model = task.build(dataset).to(memory_format=layout).train()
        if v.convert:
            v.convert(model)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.0, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
        )
        prepared[v.name] = (
            model,
            optimizer,
            resolve_precision(recipe.precision, task.device),
            x.contiguous(memory_format=layout),
        )
    times = {v.name: {"forward": [], "backward": [], "step": []} for v in variants}
    with elapsed() as spent:
        for round_ in range(-2, repeats):
            for name, (model, optimizer, precision, images) in prepared.items():
                marks = _step(model, optimizer, precision, images, y, task.device)
                if round_ >= 0:
                    for part, t in marks.items():
                        times[name][part].append(1e3 * t)
            if round_ >= 2 and spent() > seconds:
                break
    return {n: {part: stats.median(t) for part, t in parts.items()} for n, parts in times.items()}


def _step(model, optimizer, precision, x, y, device):
    synchronize(device)
    with elapsed() as clock:
        with autocast(precision, device):
            loss = F.cross_entropy(model(x).float(), y)
        synchronize(device)
        forward = clock()
        loss.backward()
        synchronize(device)
        backward = clock() - forward
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        return {"forward": forward, "backward": backward, "step": clock()}


def against_exact(times, groups):
    """Times as a table. groups: dict heading -> list of variants' names, the first of which is exact; ratios
    are to that.
    """
    rows = {}
    for heading, names in groups.items():
        exact = times[names[0]]
        for n in names:
            t = times[n]
            rows[heading, n] = {
                "forward ms": t["forward"],
                "backward ms": t["backward"],
                "step ms": t["step"],
                "backward speed-up": f"{exact['backward'] / t['backward']:.2f}x",
                "step, share of the exact one": f"{t['step'] / exact['step']:.2f}",
            }
    return pd.DataFrame(rows).T.rename_axis(["format", "variant"])


def formats(device="cpu"):
    """The formats in which times are shown, the one that training uses here first: "bf16" where it is native,
    and "fp32".
    """
    return ("bf16", "fp32") if native_bf16(device) else ("fp32",)


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def layer_times(convs, approximations, *, precision="fp32", device="cpu", repeats=9, seconds=8):
    """Milliseconds of forward and backward pass of single layers: dict (layer, variant) -> {"forward",
    "backward"}, medians.

    convs: dict name -> `cost.Conv`. approximations: dict name -> `Approximation`; "exact" is added.
    """
    approximations, cases, g = {"exact": EXACT, **approximations}, {}, torch.Generator().manual_seed(0)
    for name, c in convs.items():
        shapes = (c.N, c.C, c.H, c.W), (c.O, c.C // c.groups, c.k, c.k), (c.N, c.O, *c.out_size)
        x, w, dy = (
            torch.randn(s, generator=g).to(device, DTYPES[precision]).to(memory_format=torch.channels_last)
            for s in shapes
        )
        for how, a in approximations.items():
            cases[name, how] = c, x.relu().requires_grad_(), w.requires_grad_(), dy, a
    times = {key: {"forward": [], "backward": []} for key in cases}
    with elapsed() as spent:
        for round_ in range(-1, repeats):
            for key, (c, x, w, dy, a) in cases.items():
                synchronize(device)
                with elapsed() as clock:
                    y = approx_conv2d(x, w, stride=c.stride, padding=c.pad, groups=c.groups, approximation=a)
                    synchronize(device)
                    forward = clock()
                    torch.autograd.grad(y, (x, w), dy.to(y.dtype))
                    synchronize(device)
                    backward = clock() - forward
                if round_ >= 0:
                    times[key]["forward"].append(1e3 * forward)
                    times[key]["backward"].append(1e3 * backward)
            if round_ >= 2 and spent() > seconds:
                break
    return {key: {part: stats.median(t) for part, t in parts.items()} for key, parts in times.items()}


def layers_of(task, dataset):
    """The layers of the task's network that methods approximate, with the sizes that they meet: dict name ->
    `Conv`.
    """
    model = task.build(dataset)
    x = dataset.normalize(dataset.train.x[: min(task.recipe.batch_size, len(dataset.train))])
    found = cost.layers(model, x)
    return {n: found[n] for n in convolution.layers(model, x[:2])}


def say_conv(c: Conv):
    """A convolution's sizes in words."""
    return (
        f"{c.C} to {c.O} channels, {c.H} x {c.W}"
        + (f", stride {c.stride}" if c.stride > 1 else "")
        + ("" if c.k == 3 else f", {c.k} x {c.k}")
    )


def say_difference(differences):
    """Mean difference with its 95 % interval: "-1.20 ± 0.35"; of one seed without."""
    mean, low, _ = interval(differences)
    return f"{mean:+.2f}" + (f" ± {mean - low:.2f}" if len(differences) > 1 else "")


def final_table(comparison, notes=None):
    """What the arms ended at: accuracy of every arm with the difference to the baseline, step time and
    FLOPs.
    """
    rows = {}
    for arm in comparison.arms:
        h = comparison.histories(arm.name)
        base = arm.name == comparison.baseline
        rows[arm.name] = {
            "n": len(h),
            "accuracy %": stats.mean(x.accuracy for x in h),
            "difference, points": "" if base else say_difference(comparison.differences(arm.name)),
            "step ms": 1e3 * stats.median(x.step_seconds for x in h),
            "FLOPs of a step": "1" if base else f"{1 / comparison.predicted(arm.name, per_step=True):.2f}",
            "diverged": "yes" if any(x.diverged for x in h) else "",
            **(notes(h[-1]) if notes else {}),
        }
    return pd.DataFrame(rows).T.rename_axis("arm")


def accuracy_figure(comparison, *, xlabel="final validation accuracy (%)"):
    """(figure, caption): final accuracy of every arm, a dot a seed, a bar for the mean, the baseline's mean
    dashed.
    """
    figure, axes = figures.new(width=8.0, height=1.2 + 0.36 * len(comparison.arms))
    colour = figures.colours([a.name for a in comparison.arms])
    base = stats.mean(h.accuracy for h in comparison.histories(comparison.baseline))
    axes.axvline(base, color="black", lw=0.8, ls="--")
    for y, arm in enumerate(comparison.arms):
        values = [h.accuracy for h in comparison.histories(arm.name)]
        axes.plot(values, [y] * len(values), "o", color=colour[arm.name], ms=6, alpha=0.7)
        axes.plot([stats.mean(values)] * 2, [y - 0.3, y + 0.3], color=colour[arm.name], lw=2.5)
    axes.set_yticks(range(len(comparison.arms)), [a.name for a in comparison.arms])
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel(xlabel)
    n = len(comparison.blocks)
    return figure, f"{n} seeds, bars are means." if n > 1 else "One seed: an illustration, no verdict."
