"""Chapter 2: what a training step's time consists of, the map of the methods, and what was recorded of each
chapter.
"""

import statistics as stats
from dataclasses import replace

import pandas as pd
import torch
import torch.nn.functional as F

from effilib import cost, data, figures, tuning
from effilib.clock import interleaved
from effilib.data import Batches
from effilib.training import LAYOUTS, Run, resolve_layout, resolve_precision, stream
from effilib.workbook import series

PARTS = ("data", "forward: convolutions", "forward: rest", "dX", "dW", "backward: rest", "optimizer")


def breakdown(task, dataset, *, repeats=25, seconds=6):
    """Milliseconds of the parts of one training step, as a dict of `PARTS`.

    Data, forward, backward and optimizer are timed as they are; the convolutions' share of forward and
    backward comes from the per-layer latency table. What is left over is element-wise work, BatchNorm,
    Python."""
    layout = LAYOUTS[resolve_layout(task.recipe, task.device)]
    model = task.build(dataset).to(memory_format=layout).train()
    run = Run(model, dataset, replace(task.recipe, compile=False), (), 0)
    run.steps = 1
    batches = Batches(dataset, min(task.recipe.batch_size, len(dataset.train)), stream(0, "data"))
    x, y = next(iter(batches))
    x = x.contiguous(memory_format=layout)
    n = len(y)
    index, zero = torch.arange(n, device=y.device), torch.zeros(n, dtype=torch.long, device=y.device)
    shift = torch.arange(n, device=y.device) % (2 * batches.pad + 1)

    def loss():
        with run.autocast():
            return F.cross_entropy(model(x).float(), y)

    def update():
        run.optimizer.step()

    loss().backward()  # gradients for the optimizer to read
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0  # timing must not train
    times = interleaved(
        {
            "data": lambda: batches.cut(index, shift, zero, (shift % 2).bool()),
            "forward": loss,
            "both": lambda: loss().backward(),
            "optimizer": update,
        },
        repeats=repeats, device=dataset.device, seconds=seconds,
    )  # fmt: skip
    ms = {k: 1e3 * stats.median(v) for k, v in times.items()}
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(
        resolve_precision(task.recipe.precision, task.device), torch.float32
    )
    table = cost.latency_table(
        model, x, dtype=dtype, channels_last=layout is torch.channels_last, repeats=repeats, seconds=seconds
    )
    passes = {p: sum(r["ms"] for r in table if r["pass"] == p) for p in cost.PASSES}
    return {
        "data": ms["data"],
        "forward: convolutions": passes["forward"],
        "forward: rest": max(0.0, ms["forward"] - passes["forward"]),
        "dX": passes["dX"],
        "dW": passes["dW"],
        "backward: rest": max(0.0, ms["both"] - ms["forward"] - passes["dX"] - passes["dW"]),
        "optimizer": ms["optimizer"],
    }


def breakdowns(task, dataset):
    """The parts for fp32 NCHW, and for what this project trains with: dict name -> parts."""
    few = dict(repeats=3, seconds=2) if task.preset == "smoke" else {}
    plain = task.but(precision="fp32", memory_format="contiguous")
    name = (
        f"{resolve_precision(task.recipe.precision, task.device)} {resolve_layout(task.recipe, task.device)}"
    )
    return {"fp32 NCHW": breakdown(plain, dataset, **few), name: breakdown(task, dataset, **few)}


def breakdown_figure(parts):
    """(figure, caption) of `breakdowns`."""
    (plain, _), (name, now) = parts.items()
    convs = sum(now[p] for p in ("forward: convolutions", "dX", "dW")) / sum(now.values())
    return figures.shares(parts), (
        f"Where a training step's time goes: {plain} as PyTorch starts out, {name} as every chapter trains. "
        f"Convolutions, forward and backward, are {convs:.0%} of the step below: a method that only makes them cheaper cannot save more."
    )


def limits(parts):
    """By how much a step can get faster at most if one part cost nothing (Amdahl), as a table."""
    now = list(parts.values())[-1]
    total = sum(now.values())
    rows = {
        k: {
            "ms": f"{v:.2f}",
            "share": f"{v / total:.0%}",
            "step, if it were free": f"{total / (total - v):.2f}x",
        }
        for k, v in now.items()
    }
    return pd.DataFrame(rows).T


def method_map():
    """(figure, caption): the methods under the factor of training time that each attacks."""
    figure, axes = figures.new(width=10.0, height=4.6)
    axes.axis("off")
    columns = list(series.ATTACKS)
    heads = (
        "seconds per\noperation",
        "operations\nper image",
        "images\nneeded",
        "another,\ncheaper network",
        "fewer steps\nto the target",
    )
    for i, (factor, head) in enumerate(zip(columns, heads, strict=True)):
        x = i / len(columns) + 0.5 / len(columns)
        axes.text(
            x, 0.93, head, ha="center", va="center", fontsize=11, weight="bold", color="white",
            bbox=dict(boxstyle="round,pad=0.6", fc=figures.COLOURS[i], ec="none"),
        )  # fmt: skip
        chapters = [c for c in series.CHAPTERS if c.attacks == factor]
        for j, c in enumerate(chapters):
            title = c.title if len(c.title) < 22 else "\n".join(_halves(c.title))
            axes.text(
                x, 0.74 - 0.155 * j, f"{c.number}  {title}", ha="center", va="center", fontsize=9, alpha=1.0 if c.exists else 0.5,
                bbox=dict(boxstyle="round,pad=0.4", fc="white", ec=figures.COLOURS[i]),
            )  # fmt: skip
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    return figure, (
        "training time = steps to the target x images per step x operations per image x seconds per operation. "
        "Each method attacks one factor, and has to show that it does not make another one worse. Pale: not written yet."
    )


def _halves(title):
    words = title.split()
    cut = (
        min(range(1, len(words)), key=lambda k: abs(len(" ".join(words[:k])) - len(title) / 2))
        if len(words) > 1
        else 1
    )
    return " ".join(words[:cut]), " ".join(words[cut:])


def recorded_sweep(task):
    """(preset, data set, rows) of the sweep behind the task's baseline; where none was recorded, of the quick
    preset's own.
    """
    preset, dataset = task.preset, data.identify(task.dataset)
    if not tuning.sweep_file(preset, dataset, task.variant).exists():
        preset, dataset = "quick", "mnist5k"
    return preset, dataset, tuning.read(tuning.sweep_file(preset, dataset, task.variant))


def tuning_figure(task):
    """(figure, caption): the sweep behind the task's baseline, see `recorded_sweep`."""
    preset, dataset, rows = recorded_sweep(task)
    seeds, settings = {r["seed"] for r in rows}, {(r["epochs"], r["lr"], r["weight_decay"]) for r in rows}
    top = max(tuning.best(rows), key=lambda r: r["accuracy"])
    return figures.sweep(rows, title=f"{dataset}, preset {preset}"), (
        f"How the baseline on {dataset} was tuned, before anything was compared with it: {len(settings)} settings, {len(seeds)} seeds each "
        f"(dots; lines are means). Best: {top['epochs']:g} epochs, learning rate {top['lr']:g}, weight decay {top['weight_decay']:g}, "
        f"{top['accuracy']:.2f} %. An untuned learning rate would make any method look good."
    )


def results():
    """Every chapter's newest recorded result, as a table; empty ones say "not run"."""
    found, rows = series.recorded(), []
    for c in series.CHAPTERS:
        r = found.get(c.stem, [None])[-1]
        head = (r or {}).get("headline")
        difference = (head or {}).get("accuracy_difference")
        rows.append(
            {
                "chapter": c.number,
                "method": c.title,
                "recorded on": f"{r['preset']}, {r['dataset']}" if r else "",
                "measured": head["text"]
                if head
                else ("no verdict: " + r["caption"].split(".")[0] if r else "not run"),
                "accuracy, points": f"{difference:+.2f}" if difference is not None else "",
                "verdict": head["verdict"] if head else "",
                "claim reproduced": head["claim_reproduced"] if head else "",
            }
        )
    return pd.DataFrame(rows).set_index("chapter")
