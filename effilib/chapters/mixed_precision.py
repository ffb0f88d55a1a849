"""Chapter 3.2: the timed ladder, the four-arm ablation, and the numerics of 16-bit numbers shown on this
task's gradients.
"""

import copy
import math
import statistics as stats
from dataclasses import replace

import pandas as pd
import torch
import torch.nn.functional as F

from effilib import cost, figures
from effilib.clock import interleaved
from effilib.data import Batches
from effilib.experiment import Arm
from effilib.methods.mixed_precision import LossScaler, MixedPrecision, round_to
from effilib.training import Run, can_compile, native_bf16, stream, train

# Epochs of the two runs, shorter than the task's: fp32 NCHW takes nearly twice the baseline's time, and a
# notebook has a minute in the quick preset and 20 in the study preset.
LADDER = {"quick": 1.2, "study": 8}
ABLATION = {"quick": 0.5, "study": 4}


def ladder(device="cpu", *, compile=True):
    """The arms fp32 -> channels_last -> 16 bits -> compiled, as far as this machine has them, and why rungs
    are left out.

    Each rung keeps what the one before it brought. Returns (arms, sentences).
    """
    cuda, left_out = torch.device(device).type == "cuda", []
    last = {"memory_format": "channels_last"}
    arms = [
        Arm(name="fp32 NCHW", role="baseline", changes={"precision": "fp32", "memory_format": "contiguous"}),
        Arm(name="fp32 channels_last", role="control", changes={"precision": "fp32", **last}),
    ]
    if cuda:
        arms.append(Arm(name="tf32 channels_last", role="control", changes={"precision": "tf32", **last}))
        arms.append(Arm(name="fp16 channels_last, loss scaling", changes={"precision": "fp16", **last}))
    if native_bf16(device):
        arms.append(Arm(name="bf16 channels_last", changes={"precision": "bf16", **last}))
    else:
        left_out.append(
            "The bf16 rung is left out: this machine has no native bf16 products, and emulated ones are slower than fp32."
        )
    reason = (
        can_compile(device)
        if compile
        else "compiling takes longer than this preset's whole run; the study preset has it"
    )
    if reason:
        left_out.append(f"The compile rung is left out: {reason}.")
    else:
        arms.append(
            Arm(
                name=f"{arms[-1].name}, compiled",
                role="control",
                changes={**arms[-1].changes, "compile": True},
            )
        )
    return arms, left_out


def ladder_task(task):
    """The task with the ladder's length. Time per step is judged, which needs no target, and accuracy at
    equal length.
    """
    epochs = LADDER.get(task.preset)
    return task.but(epochs=min(task.recipe.epochs, epochs), target=None) if epochs else task


def ablation_task(task):
    """The task of the ablation: fp32 products, which emulate fp16's, and a length of its own, for emulation
    is slow.
    """
    epochs = ABLATION.get(task.preset, task.recipe.epochs / 2)
    return task.but(precision="fp32", epochs=min(task.recipe.epochs, epochs), target=None)


def width_scan(task, dataset, factors=(1, 2, 4)):
    """Time of a whole training step in three formats over the network's width, interleaved: a table of ms,
    rows are widths.

    Nothing is trained for long; the point is which share of a step the products have. Only of our resnet,
    whose widths are a list."""
    few = task.preset == "smoke"
    widths = task.build(dataset).settings()["widths"]
    formats = {"fp32 NCHW": ("fp32", "contiguous"), "fp32 channels_last": ("fp32", "channels_last")}
    if native_bf16(task.device):
        formats["bf16 channels_last"] = ("bf16", "channels_last")
    rows = {}
    for k in factors[:1] if few else factors[:2] if task.preset == "quick" else factors:
        wide = [k * w for w in widths]
        steps = {}
        for name, (precision, layout) in formats.items():
            t = task.but(precision=precision, memory_format=layout)
            run = Run(t.build(dataset, widths=wide, blocks=[1] * len(wide)).train(), dataset, t.recipe, (), 0)
            run.steps = run.schedule.planned = 10**6  # a schedule's first steps
            run.settle()
            x, y = _batch(dataset, t.recipe.batch_size)
            x = x.contiguous(memory_format=run.layout)
            steps[name] = lambda run=run, x=x, y=y: run.train_step(x, y)
        times = interleaved(
            steps, repeats=3 if few else 15, device=task.device, seconds=4 if task.preset == "quick" else 10
        )
        rows["/".join(map(str, wide))] = {name: 1e3 * stats.median(t) for name, t in times.items()}
    return pd.DataFrame(rows).T.rename_axis("widths")


def width_figure(scan):
    """(figure, caption): speed-up of a step against fp32 NCHW over the network's width."""
    figure, axes = figures.new(width=8.0, height=3.2)
    colour = figures.colours(list(scan))
    for name in scan:
        axes.plot(range(len(scan)), scan["fp32 NCHW"] / scan[name], "o-", color=colour[name], label=name)
    axes.set_xticks(range(len(scan)), list(scan.index))
    axes.set_xlabel("channels of the three stages")
    axes.set_ylabel("speed-up of a step (x)")
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower right", fontsize=9)
    return figure, (
        "The wider the network, the larger the products' share of a step, and the more of their speed-up arrives. "
        f"{say_widths(scan)} One process, rounds interleaved, medians: an illustration, no verdict."
    )


def say_widths(scan):
    """The last format's speed-up at each width, in a sentence."""
    name = scan.columns[-1]
    found = ", ".join(
        f"{ratio:.2f}x at {widths}" for widths, ratio in (scan["fp32 NCHW"] / scan[name]).items()
    )
    return f"A step of {name} against fp32 NCHW: {found}."


def ablation():
    """The paper's four arms, fp16 emulated; they go with a task of precision "fp32"."""
    return [
        Arm(name="fp32", role="baseline"),
        Arm(name="fp16", methods=(MixedPrecision(master=False, scale=1.0, dynamic=False),)),
        Arm(name="fp16 + master weights", methods=(MixedPrecision(scale=1.0, dynamic=False),)),
        Arm(name="fp16 + master + loss scaling", methods=(MixedPrecision(),)),
    ]


def lost_updates():
    """1 + 2^-k in three formats: which updates of a weight survive."""
    rows = {}
    for k in (6, 7, 8, 9, 10, 11, 12, 23):
        update = 2.0**-k
        rows[f"2^-{k}"] = {
            name: "kept"
            if (torch.tensor(1.0, dtype=dtype) + torch.tensor(update, dtype=dtype)).item() != 1
            else "lost"
            for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32))
        }
    return pd.DataFrame(rows).T.rename_axis("update of the weight 1")


def _batch(dataset, size=64):
    return next(iter(Batches(dataset, min(size, len(dataset.train)), stream(0, "numerics"))))


def _gradients(model, x, y, scale=1.0):
    model.zero_grad()
    (scale * F.cross_entropy(model(x), y)).backward()
    return [p.grad.clone() for p in model.parameters()]


def check_scaling(model, dataset):
    """Scaling by 2^15 and by 30,000 against the gradients of the plain loss, and what an overflowing step
    leaves behind.
    """
    x, y = _batch(dataset)
    model = model.eval()  # no statistics move: the same function each time
    plain = _gradients(model, x, y)
    rows = []
    for scale in (2.0**15, 30_000.0):
        scaled = _gradients(model, x, y, scale)
        same = all(torch.equal(s / scale, g) for s, g in zip(scaled, plain, strict=True))
        error = max(
            ((s / scale - g).norm() / g.norm().clamp_min(1e-30)).item()
            for s, g in zip(scaled, plain, strict=True)
        )
        rows.append(
            (
                f"gradients of {scale:g} L, divided by {scale:g}",
                "bit-equal" if same else f"relative difference {error:.1e}",
            )
        )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    _gradients(model, x, y)
    optimizer.step()
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]])
    scaler = LossScaler(2.0**40)
    model.zero_grad()
    scaler.scale(1e30 * F.cross_entropy(model(x), y)).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    after = [model.state_dict(), optimizer.state_dict()["state"]]
    kept = all(torch.equal(before[0][k], v) for k, v in after[0].items())
    kept &= all(
        torch.equal(before[1][i]["momentum_buffer"], s["momentum_buffer"]) for i, s in after[1].items()
    )
    rows.append(
        (
            "a step that overflows at S = 2^40",
            f"{scaler.skipped} skipped; weights and momentum {'unchanged' if kept else 'CHANGED'}",
        )
    )
    rows.append(("S afterwards", f"2^{math.log2(scaler.S):g}"))
    return pd.DataFrame(rows, columns=["what", "result"]).set_index("what")


def gradient_magnitudes(task, dataset, epochs=1.0):
    """log2 |g| of the non-zero gradients of layer outputs and of weights, in fp32, after `epochs` of
    training, and the share that is 0.
    """
    model = task.build(dataset)
    train(
        model,
        dataset,
        replace(task.recipe, epochs=min(epochs, task.recipe.epochs), precision="fp32"),
        evaluations=1,
    )
    x, y = _batch(dataset)
    outputs, hooks = [], []

    def keep(module, inputs, output):
        output.register_hook(lambda dy: outputs.append(dy.detach().flatten()))

    for m in model.modules():
        if isinstance(m, torch.nn.Conv2d | torch.nn.Linear):
            hooks.append(m.register_forward_hook(keep))
    weights = torch.cat([g.flatten() for g in _gradients(model.train(), x, y)])
    for h in hooks:
        h.remove()
    return {"activation gradients": torch.cat(outputs), "weight gradients": weights}


def underflow_figure(gradients):
    """(figure, caption): where the gradients lie against what fp16 can hold, at S = 1 and at S = 2^10."""
    logs = {name: torch.log2(g[g != 0].abs()).cpu().numpy() for name, g in gradients.items()}
    low = min(-40.0, *(float(v.min()) for v in logs.values()))
    spans = [(low, -25, "0 in fp16 at S = 1"), (low, -35, "still 0 at S = 2^10")]
    figure = figures.histogram(
        logs, xlabel="log2 of the gradient's magnitude", spans=spans, marks=[(-14, "smallest normal number")]
    )
    return figure, (
        "Gradients left of -25 become 0 in fp16; those between -25 and -14 lose bits. Multiplying the loss by S = 2^10 moves the limits "
        "ten units to the left, for nothing: only exponents change."
    )


def underflow_table(gradients, scales=(1, 8, 128, 1024, 2**16)):
    """Share of the non-zero gradients that become 0, or infinite, in fp16 at several loss scales."""
    rows = {}
    for name, g in gradients.items():
        g = g[g != 0]
        rows[f"{name}: become 0"] = {
            f"S = {s:g}": f"{(round_to(s * g) == 0).float().mean():.3%}" for s in scales
        }
        rows[f"{name}: overflow"] = {
            f"S = {s:g}": f"{torch.isinf(round_to(s * g)).float().mean():.3%}" for s in scales
        }
    return pd.DataFrame(rows).T


def cost_table(task, dataset):
    """Bytes and FLOPs of a training step by format, and the measured rate of products of the network's
    largest convolution.
    """
    batch = min(task.recipe.batch_size, len(dataset.train))
    x = dataset.normalize(dataset.train.x[:batch])
    largest = max(cost.layers(task.build(dataset), x).values(), key=lambda c: c.flops)
    formats = {"fp32 NCHW": (torch.float32, False), "fp32 channels_last": (torch.float32, True)}
    if native_bf16(task.device):
        formats["bf16 channels_last"] = (torch.bfloat16, True)
    convs = {name: (largest, *f) for name, f in formats.items()}
    times = cost.conv_seconds(
        convs, device=task.device, repeats=5 if task.preset == "smoke" else 21, seconds=4
    )
    flops = cost.step_flops(task.build(dataset).to("meta"), dataset.shape, batch)
    reference, rows = None, {}
    for name, (dtype, _) in formats.items():
        seconds = sum(stats.median(times[name, p]) for p in cost.PASSES)
        reference = reference or seconds
        rows[name] = {
            "GFLOP a step": f"{flops / 1e9:.2f}",
            "bytes a number": dtype.itemsize,
            "GFLOP/s, largest convolution": f"{3 * largest.flops / seconds / 1e9:.0f}",
            "its speed-up, forward + dX + dW": f"{reference / seconds:.2f}x",
        }
    return pd.DataFrame(rows).T.rename_axis(
        f"{largest.C} to {largest.O} channels, {largest.H} x {largest.W}, batch {batch}"
    )


def scaling_events(comparison):
    """What became of the loss scale in each arm."""
    last = {a.name: [e for h in comparison.histories(a.name) for e in h.events] for a in comparison.arms}
    return pd.DataFrame(
        {n: {"loss scale": "; ".join(dict.fromkeys(e["text"] for e in events))} for n, events in last.items()}
    ).T


def ablation_figure(comparison):
    """(figure, caption): final accuracy of the four arms, every seed a dot."""
    figure, axes = figures.new(width=8.0, height=2.8)
    colour = figures.colours([a.name for a in comparison.arms])
    for y, arm in enumerate(comparison.arms):
        values = [h.accuracy for h in comparison.histories(arm.name)]
        axes.plot(values, [y] * len(values), "o", color=colour[arm.name], ms=7, alpha=0.7)
        axes.plot([stats.mean(values)] * 2, [y - 0.25, y + 0.25], color=colour[arm.name], lw=2.5)
    axes.set_yticks(range(len(comparison.arms)), [a.name for a in comparison.arms])
    axes.invert_yaxis()
    axes.margins(x=0.15, y=0.2)
    axes.set_xlabel("final validation accuracy (%)")
    n = len(comparison.blocks)
    seeds = f"{n} seeds, bars are means" if n > 1 else "one seed: an illustration, no verdict"
    return (
        figure,
        f"What master weights and loss scaling are worth on this task ({seeds}). An arm that stood clearly left would have lost accuracy.",
    )


def say_ablation(comparison):
    """The four arms' mean final accuracy, in a sentence."""
    means = {a.name: stats.mean(h.accuracy for h in comparison.histories(a.name)) for a in comparison.arms}
    return ", ".join(f"{n} {m:.2f} %" for n, m in means.items()) + f" (n={len(comparison.blocks)})."
