"""Chapter 3.1: time and FLOPs of a convolution over filter size, image size, channels and number format, each
pass apart.
"""

import statistics as stats
from dataclasses import replace

import pandas as pd
import torch
import torch.nn.functional as F

from effilib import cost, figures
from effilib.clock import interleaved
from effilib.cost import PASSES, Conv
from effilib.training import native_bf16

REFERENCE = Conv(N=64, C=64, O=64, H=16, W=16, k=3)
LABELS = {"forward": "forward", "dX": "dX (gradient of the input)", "dW": "dW (gradient of the filters)"}


def best_dtype(device="cpu"):
    """The format that training uses on this machine: bf16 where it is native, else fp32."""
    return torch.bfloat16 if native_bf16(device) else torch.float32


def scans(preset):
    """What is varied around the reference: dict title -> (label of the axis, values, function value ->
    `Conv`).
    """
    few = preset == "smoke"
    batch = 8 if few else REFERENCE.N
    base = replace(REFERENCE, N=batch)
    return {
        "filter size": (
            "filter size k (k x k)",
            (1, 3) if few else (1, 3, 5, 7),
            lambda k: replace(base, k=k),
        ),
        "image size": (
            "height = width (pixels)",
            (4, 8) if few else (4, 8, 16, 32),
            lambda s: replace(base, H=s, W=s),
        ),
        "channels": (
            "channels C = O",
            (8, 16) if few else (8, 16, 32, 64, 128),
            lambda c: replace(base, C=c, O=c),
        ),
    }


def measure(preset, device="cpu", *, dtype=None):
    """Time every scan: a table with one row per scan, value and pass: measured ms, ms predicted by FLOPs,
    their ratio.

    The prediction is the reference's measured time times the ratio of FLOPs: what one would expect if FLOPs
    were all."""
    rows = []
    for title, (_, values, make) in scans(preset).items():
        convs = {v: make(v) for v in values}
        reference = {"filter size": 3, "image size": 16, "channels": 64}[title]
        reference = reference if reference in convs else values[-1]
        times = cost.conv_seconds(
            convs,
            dtype=dtype or best_dtype(device),
            device=device,
            repeats=3 if preset == "smoke" else 21,
            seconds=6,
        )
        for value, conv in convs.items():
            for p in PASSES:
                ms, at = (1e3 * stats.median(times[v, p]) for v in (value, reference))
                predicted = at * conv.flops / convs[reference].flops
                rows.append(
                    {
                        "scan": title,
                        "value": value,
                        "pass": p,
                        "GFLOP": conv.flops / 1e9,
                        "ms": ms,
                        "predicted ms": predicted,
                    }
                )
    frame = pd.DataFrame(rows)
    return frame.assign(**{"measured / predicted": frame["ms"] / frame["predicted ms"]})


def say_worst(frame):
    """Where measurement and prediction part most, in a sentence."""
    r = frame.loc[frame["measured / predicted"].idxmax()]
    return f"Largest deviation from the FLOP prediction: {r['measured / predicted']:.1f}x, {r['scan']} {r['value']}, {r['pass']}."


def scan_figure(frame, preset):
    """Measured times (lines) and what FLOPs predict (dashed), a panel per scan, a colour per pass."""
    panels = []
    for title, (xlabel, values, _) in scans(preset).items():
        part = frame[frame["scan"] == title]
        series = {LABELS[p]: part[part["pass"] == p]["ms"].tolist() for p in PASSES}
        predicted = {LABELS[p]: part[part["pass"] == p]["predicted ms"].tolist() for p in PASSES}
        panels.append(
            {"title": title, "xlabel": xlabel, "x": values, "series": series, "predicted": predicted}
        )
    return figures.measured_and_predicted(
        panels, ylabel=f"ms, batch of {8 if preset == 'smoke' else REFERENCE.N}"
    )


def channel_rates(preset, device="cpu"):
    """GFLOP/s of the forward pass and of dX + dW over channel counts in steps of 4: table indexed by
    channels.
    """
    channels = (
        (8, 12, 16)
        if preset == "smoke"
        else tuple(range(8, 81, 4))
        if preset != "quick"
        else tuple(range(8, 69, 4))
    )
    convs = {c: replace(REFERENCE, N=8 if preset == "smoke" else 32, C=c, O=c) for c in channels}
    times = cost.conv_seconds(
        convs, dtype=best_dtype(device), device=device, repeats=3 if preset == "smoke" else 21, seconds=8
    )
    rows = []
    for c, conv in convs.items():
        seconds = {p: stats.median(times[c, p]) for p in PASSES}
        step = sum(seconds.values())
        backward = 2 * conv.flops / (seconds["dX"] + seconds["dW"]) / 1e9
        rows.append(
            {
                "channels": c,
                "forward": conv.flops / seconds["forward"] / 1e9,
                "backward": backward,
                "ms": 1e3 * step,
            }
        )
    return pd.DataFrame(rows).set_index("channels")


def rate_figure(rates):
    """(figure, caption): rate of the products, and time of a step, over the number of channels."""
    figure, (left, right) = figures.new(2, width=9.0, height=3.5)
    for i, name in enumerate(("forward", "backward")):
        left.plot(rates.index, rates[name], "o-", ms=4, color=figures.COLOURS[i], label=name)
    right.plot(rates.index, rates["ms"], "o-", ms=4, color=figures.COLOURS[2], label="measured")
    last = (
        rates.index[-1]
        if rates.index[-1] % 16 == 0
        else max((c for c in rates.index if c % 16 == 0), default=rates.index[-1])
    )
    predicted = [rates["ms"][last] * (c / last) ** 2 for c in rates.index]
    right.plot(
        rates.index, predicted, "--", color="black", lw=1, label=f"predicted by FLOPs from {last} channels"
    )
    for axes in (left, right):
        for c in rates.index:
            if c % 16 == 0:
                axes.axvline(c, color="black", lw=0.6, alpha=0.35)
        axes.set_xlabel("channels C = O (vertical lines: multiples of 16)")
        axes.legend()
    left.set_ylabel("GFLOP/s")
    left.set_ylim(bottom=0)
    right.set_ylabel("ms: forward + dX + dW")
    narrower = [c for c in rates.index if c + 4 in rates.index and rates["ms"][c] > rates["ms"][c + 4]]
    found = (
        f"Here a step at {', '.join(map(str, narrower))} channels takes longer than at 4 more"
        if narrower
        else "Here no narrower layer is slower"
    )
    return figure, (
        f"The kernels work in blocks of 16 channels. {found}: cutting a layer pays only where it reaches the next multiple of 16."
    )


def formats(preset, device="cpu"):
    """One convolution in every number format that torch has on this device: a table of ms, or why there is
    none.
    """
    conv = replace(REFERENCE, N=2 if preset == "smoke" else 16)
    functions, missing = {}, {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        functions |= {(name, p): f for p, f in cost.conv_passes(conv, dtype=dtype, device=device).items()}
    g = torch.Generator().manual_seed(0)
    for name, dtype in (("int8", torch.int8), ("int16", torch.int16)):
        x, w = (
            torch.randint(-100, 100, s, generator=g).to(device, dtype)
            for s in ((conv.N, conv.C, conv.H, conv.W), (conv.O, conv.C, 3, 3))
        )
        functions[name, "forward"] = lambda x=x, w=w: F.conv2d(x, w, padding=1)
        if dtype == torch.int8:
            columns = torch.randint(-100, 100, (conv.N * conv.H * conv.W, conv.C * 9), generator=g).to(
                device, dtype
            )
            filters = torch.randint(-100, 100, (conv.C * 9, conv.O), generator=g).to(device, dtype)
            functions["int8 (int32 sums, product only)", "forward"] = lambda a=columns, b=filters: (
                torch._int_mm(a, b)
            )
    for key, function in list(functions.items()):
        try:
            function()
        except RuntimeError as error:  # how torch says that it has no such product
            missing[key] = str(error).splitlines()[0][:60]
            del functions[key]
    times = interleaved(functions, repeats=3 if preset == "smoke" else 9, warm_up=1, device=device, seconds=8)
    names = list(dict.fromkeys([n for n, _ in [*functions, *missing]]))
    ms = {n: {p: 1e3 * stats.median(times[n, p]) for p in PASSES if (n, p) in times} for n in names}
    return pd.DataFrame(ms).T.reindex(columns=list(PASSES)), missing


def format_figure(frame, missing):
    """(figure, caption): bars of the three passes by number format, on a logarithmic axis. missing: what
    torch refused, and why.
    """
    figure, axes = figures.new(width=8.0, height=3.4)
    width = 0.26
    for i, p in enumerate(PASSES):
        y = [j + (i - 1) * width for j in range(len(frame))]
        axes.barh(y, frame[p].fillna(0), height=width, color=figures.COLOURS[i], label=LABELS[p])
        for yy, v in zip(y, frame[p], strict=True):
            if v == v:
                axes.text(v, yy, f" {v:.3g}", va="center", fontsize=8)
    axes.set_yticks(range(len(frame)), list(frame.index))
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.12)
    figures.plain_log(axes.xaxis)
    axes.set_xlabel("ms (log scale)")
    axes.legend(fontsize=8)
    fastest = frame["forward"].idxmin()
    return figure, (
        f"Fewer bits are faster only where the processor has products of that format and torch uses them: here {fastest} is fastest. "
        "A missing bar means that torch has no such pass: integer convolutions have no gradient."
        + "".join(f" {name}, {p}: {why}." for (name, p), why in missing.items())
    )


def layer_table(task, dataset, preset):
    """The per-layer latency table of the task's network on a training batch, in the format that training
    uses.
    """
    x = dataset.normalize(dataset.train.x[: task.recipe.batch_size])
    rows = cost.latency_table(
        task.build(dataset),
        x,
        dtype=best_dtype(task.device),
        repeats=3 if preset == "smoke" else 15,
        seconds=5,
    )
    return pd.DataFrame(rows)


def layer_figure(frame):
    """(figure, caption): milliseconds of each layer's passes beside the share that FLOPs predict."""
    figure, axes = figures.new(width=8.5, height=1.2 + 0.34 * frame["layer"].nunique())
    names = list(dict.fromkeys(frame["layer"]))
    total_ms, total_flops = frame["ms"].sum(), frame["flops"].sum()
    for y, name in enumerate(names):
        begin = 0.0
        part = frame[frame["layer"] == name].set_index("pass")
        for i, p in enumerate(PASSES):
            if p in part.index:
                axes.barh(
                    y,
                    part["ms"][p],
                    left=begin,
                    height=0.6,
                    color=figures.COLOURS[i],
                    label=LABELS[p] if y == 1 or len(names) == 1 else None,
                )
                begin += part["ms"][p]
        foreseen = total_ms * part["flops"].sum() / total_flops
        axes.plot(
            [foreseen] * 2,
            [y - 0.4, y + 0.4],
            color="black",
            lw=2,
            label="share of the FLOPs" if y == 0 else None,
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("ms per training step")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    worst = max(
        names,
        key=lambda n: frame[frame["layer"] == n]["ms"].sum() / frame[frame["layer"] == n]["flops"].sum(),
    )
    return figure, (
        "Each layer's measured time and, as a black mark, the share of the total time that its FLOPs would predict. "
        f"A bar beyond its mark is a layer that costs more than its FLOPs say; farthest beyond is {worst}."
    )


def published():
    """Forward FLOPs of published networks on the meta device: the same numbers on every machine."""
    from torchvision import models

    sizes = {"alexnet": 224, "vgg16": 224, "resnet18": 224, "resnet50": 224, "mobilenet_v2": 224}
    rows = []
    with torch.device("meta"):
        for name, size in sizes.items():
            model = getattr(models, name)(weights=None).eval()
            x = torch.empty(1, 3, size, size)
            forward = cost.count_flops(lambda model=model, x=x: model(x))
            rows.append(
                f"{name:12s} {cost.parameters(model) / 1e6:7.1f} M parameters {forward / 1e9:7.2f} GFLOP forward"
            )
    return "\n".join(rows)
