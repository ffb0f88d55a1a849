"""Chapter II.8: what the practical part trains and by which rules: data, network, tuned baseline, target,
margin, cost, and the noise.
"""

import math
import statistics as stats

import numpy as np
import pandas as pd
import torch
from matplotlib.patches import Rectangle

from effilib import cost, data, figures, surgery, tuning
from effilib.chapters.convolution_cost import layer_table
from effilib.chapters.overview import recorded_sweep
from effilib.data import Batches
from effilib.experiment import PILOT_SEEDS, Arm, measure, pilot
from effilib.models import stream
from effilib.statistics import held, interval, paired_ratio
from effilib.surgery import stages

ROWS, COLUMNS, DRAWS = 10, 8, 3  # of the picture of samples
BASE, AGAIN = "dense baseline", "the same again"

# Data

READERS = {
    "train": "the gradients",
    "decide": "methods, whenever they decide something",
    "validation": "the target, some 20 times a run, off the clock",
    "test": "nobody but the end of a run, once",
}


def splits(dataset):
    """A row a split: images, how many of a class, and who may read it."""
    rows = {}
    for name, reader in READERS.items():
        part = getattr(dataset, name)
        counts = part.y.bincount(minlength=dataset.classes)
        low, high = int(counts.min()), int(counts.max())
        rows[name] = {
            "images": len(part),
            "of a class": str(low) if low == high else f"{low} to {high}",
            "read by": reader,
        }
    return pd.DataFrame(rows).T.rename_axis("split")


def samples_figure(dataset):
    """(figure, caption): images of the training split, a row a class, and one image as a run gets to see
    it.
    """
    shown = min(ROWS, dataset.classes)
    rows = [dataset.train.x[dataset.train.y == c][:COLUMNS].cpu() for c in range(shown)]
    rows = [torch.cat([r, r.new_full((COLUMNS - len(r), *r.shape[1:]), 255)]) for r in rows]
    figure, (left, right) = figures.new(
        2, width=6.9, height=0.7 + 0.48 * shown, width_ratios=(COLUMNS, DRAWS)
    )
    _tiles(left, torch.stack(rows))
    height = dataset.shape[1]
    left.set_yticks([(i + 0.5) * height for i in range(shown)], [str(n) for n in dataset.names[:shown]])
    left.set_title(f"{dataset.name}, training split")
    _tiles(right, _as_trained(dataset, shown))
    right.set_yticks([])
    right.set_title("as trained")
    kinds = [f"shifted by up to {dataset.pad} pixels"] * bool(dataset.pad) + [
        "mirrored by chance"
    ] * dataset.flip
    return figure, (
        f"Left: {shown} of {dataset.classes} classes, a row each. Right: draws of one image as training sees it, "
        f"{' and '.join(kinds) or 'never changed'}; evaluation sees images as they are."
    )


def _as_trained(dataset, rows, columns=DRAWS):
    """(rows, columns, H, W, C): one training image as so many steps would see it."""
    n = rows * columns
    batches = Batches(dataset, 1, stream(0, "samples"))
    draws = [torch.randint(2 * batches.pad + 1, (n,), generator=batches.generator) for _ in range(2)]
    flips = torch.randint(2, (n,), generator=batches.generator).bool() & dataset.flip
    one = (
        (dataset.train.y.cpu() == dataset.classes // 2).int().argmax().repeat(n)
    )  # the first of a class in the middle
    x = batches.cut(*(t.to(dataset.device) for t in (one, *draws, flips))).cpu()
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (dataset.mean, dataset.std))
    images = (255 * (x * std + mean)).round().clamp(0, 255).byte()  # (n, C, H, W)
    return images.permute(0, 2, 3, 1).unflatten(0, (rows, columns))


def _tiles(axes, images):
    """Show images (rows, columns, H, W, C) as one picture."""
    whole = images.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)  # (rows * H, columns * W, C)
    extent = (0, whole.shape[1], whole.shape[0], 0)
    axes.imshow(
        whole.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255, extent=extent, interpolation="nearest"
    )
    axes.set_xticks([])
    axes.grid(False)


# Network


def network_table(task, dataset):
    """A row a stage: maps, channels, depth, the weights of its layers, and their share of a step's
    convolutions, in FLOPs and in time.
    """
    model = task.build(dataset)
    layout, structure = stages.find(model, dataset.shape), surgery.trace(model)
    layers = layer_table(task, dataset, task.preset)
    rows = {}
    for i, name in enumerate(stages.names(layout)):
        own = {n for n, stage in layout["of"].items() if stage == i}
        mine = layers[layers["layer"].isin(own)]
        rows[name] = {
            "pixels of a map": layout["pixels"][i],
            "layers": len(own),
            "depth": stages.depth(structure, layout, i),
            "channels of its nodes": " + ".join(str(n.width) for n in stages.members(structure, layout, i)),
            "weights": sum(model.get_submodule(n).weight.numel() for n in own),
            "FLOPs": f"{mine['flops'].sum() / layers['flops'].sum():.0%}",
            "time": f"{mine['ms'].sum() / layers['ms'].sum():.0%}",
        }
    return pd.DataFrame(rows).T.rename_axis("stage")


def step_table(task, dataset):
    """What a step and a whole training of the baseline cost, counted: FLOPs and memory."""
    model, recipe = task.build(dataset).to("meta"), task.recipe
    x = torch.empty(recipe.batch_size, *dataset.shape, device="meta")
    with cost.Counter(model.parameters()) as count:
        model(x).sum().backward()
    epoch = len(dataset.train) // recipe.batch_size
    steps = max(1, round(recipe.epochs * epoch))
    rows = {
        "parameters": f"{cost.parameters(model):,}",
        "FLOPs of a step": f"{count.flops / 1e9:.3f} G ({count.flops / recipe.batch_size / 1e6:.2f} M an image)",
        "steps": f"{steps:,} ({epoch:,} an epoch, {recipe.epochs:g} epochs)",
        "FLOPs of the training": f"{steps * count.flops / 1e12:.3f} T: the budget of whoever competes",
        "memory in 32 bits": f"{cost.size_bytes(model.parameters()) / 2**20:.2f} MB parameters, as much momentum, "
        f"{count.saved_bytes / 2**20:.1f} MB kept for the backward pass",
    }
    return pd.DataFrame({"": rows.values()}, index=list(rows))


# The tuned baseline


def sweep_figure(task):
    """(figure, caption): the sweep behind the baseline as a heat map, a panel per number of epochs; the
    chosen setting framed.
    """
    preset, dataset, rows = recorded_sweep(task)
    epochs, lrs, decays = (sorted({r[k] for r in rows}) for k in ("epochs", "lr", "weight_decay"))
    found = {}
    for r in rows:
        found.setdefault((r["epochs"], r["lr"], r["weight_decay"]), []).append(r["accuracy"])
    own = (preset, dataset) == (task.preset, data.identify(task.dataset))
    chosen = (task.recipe.epochs, task.recipe.lr, task.recipe.weight_decay)
    low, high = min(map(stats.mean, found.values())), max(map(stats.mean, found.values()))
    size = dict(width=1.4 + 3.1 * len(epochs), height=1.5 + 0.62 * len(decays))
    figure, axes = figures.new(len(epochs), **size, sharey=True, squeeze=False)
    for ax, e in zip(axes[0], epochs, strict=True):
        means = np.full((len(decays), len(lrs)), np.nan)
        for (i, wd), (j, lr) in ((a, b) for a in enumerate(decays) for b in enumerate(lrs)):
            values = found.get((e, lr, wd))
            if values:
                means[i, j] = stats.mean(values)
                dark = means[i, j] < (low + high) / 2
                text = (
                    f"{means[i, j]:.1f}\n{min(values):.1f}–{max(values):.1f}"
                    if len(values) > 1
                    else f"{means[i, j]:.1f}"
                )
                ax.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
            if own and chosen == (e, lr, wd):
                ax.add_patch(Rectangle((j - 0.46, i - 0.46), 0.92, 0.92, fill=False, ec="#D55E00", lw=2.5))
        image = ax.imshow(means, vmin=low, vmax=high, cmap="viridis", aspect="auto")
        ax.set_xticks(range(len(lrs)), [f"{lr:g}" for lr in lrs])
        ax.set_title(f"{e:g} epochs")
        ax.set_xlabel("learning rate")
        ax.grid(False)
    axes[0][0].set_yticks(range(len(decays)), [f"{d:g}" for d in decays])
    axes[0][0].set_ylabel("weight decay")
    figure.colorbar(image, ax=axes[0].tolist(), label="validation accuracy (%)")
    seeds = sorted({int(r["seed"]) for r in rows})
    what = (
        "The setting that every chapter trains with is framed"
        if own and chosen in found
        else "This task has none of its own"
    )
    return figure, (
        f"The sweep on {dataset}, preset {preset}: mean validation accuracy and its range over the seeds {', '.join(map(str, seeds))}, "
        f"which are never measured. Empty cells were not run. {what}."
    )


def targeted(task):
    """(the task with its target, [{"seed", "held", "accuracy"}, ...] of the runs that fixed it).

    held: what two evaluations in a row hold. The runs were recorded with the sweep; where there are none a
    pilot is run, as `compare` would do."""
    file = tuning.sweep_file(task.preset, task.dataset, task.variant).with_suffix(".target.csv")
    if task.target is not None and file.exists():
        return task, tuning.read(file)
    task = pilot(task)
    blocks = measure(
        task, [Arm(name="pilot", role="baseline")], list(PILOT_SEEDS), title="pilot"
    )  # of the cache: `pilot` has run it
    runs = [(b["seed"], b["arms"]["pilot"]) for b in blocks]
    return task, [{"seed": seed, "held": held(h.rows), "accuracy": h.accuracy} for seed, h in runs]


def target_figure(task, runs):
    """(figure, caption): the runs that fixed the target, and what counts as equal."""
    figure, axes = figures.new(width=7.5, height=1.6 + 0.3 * len(runs))
    last = stats.mean(r["accuracy"] for r in runs)
    for y, r in enumerate(runs):
        axes.plot([r["held"], r["accuracy"]], [y, y], color=figures.GREY, lw=1)
        axes.plot(
            r["held"], y, "o", mfc="white", mec=figures.COLOURS[0], ms=7, label="held by two evaluations"
        )
        axes.plot(r["accuracy"], y, "o", color=figures.COLOURS[0], ms=7, label="at the end")
    axes.axvline(task.target, color="black", lw=1.2, ls="--", label=f"target, {task.target:g} %")
    axes.axvspan(
        last - task.margin,
        last,
        color=figures.COLOURS[2],
        alpha=0.18,
        label=f"margin, {task.margin:g} points below the mean end",
    )
    axes.set_yticks(range(len(runs)), [f"seed {int(r['seed'])}" for r in runs])
    axes.set_ylim(len(runs) - 0.5, -0.5)
    axes.set_xlabel("validation accuracy (%)")
    once = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(once.values(), once.keys(), loc="outside lower center", ncols=4, fontsize=8)
    below = sum(r["held"] < task.target for r in runs)
    return figure, (
        f"The baseline with {len(runs)} seeds that are not measured: {len(runs) - below} hold the target, {task.target:g} %. A method is "
        "as accurate as the baseline if the lower bound of its mean, at the end, does not lie below the green band."
    )


# The noise


def again(task):
    """The baseline against itself: what differs between these two arms is noise."""
    return [Arm(name=BASE, role="baseline"), Arm(name=AGAIN, role="control")]


def sized(task):
    """The task of these runs: in the quick preset with half of the evaluations."""
    return task.but(evaluations=10) if task.preset == "quick" else task


def noise(comparison):
    """What so many pairs can tell on this machine: the spread of accuracies and times, and the same thing
    measured twice.
    """
    runs, n = comparison.histories(BASE), len(comparison.blocks)
    accuracies, test = [h.accuracy for h in runs], [h.test_accuracy for h in runs]
    mean, low, _ = interval(accuracies)
    ratio, below, above = paired_ratio(
        comparison.times(BASE, "training time"), comparison.times(AGAIN, "training time")
    )
    apart = max(abs(d) for d in comparison.differences(AGAIN))
    rows = {
        "validation accuracy at the end": f"{mean:.2f} %"
        + (f" ± {mean - low:.2f}, {min(accuracies):.2f} to {max(accuracies):.2f}" * (n > 1)),
        "test accuracy at the end": f"{stats.mean(test):.2f} %",
        "seconds of a training": f"{stats.mean(h.seconds for h in runs):.1f}",
        "milliseconds of a step": f"{1e3 * stats.median(h.step_seconds for h in runs):.1f}",
        "the same seed twice, accuracy": f"{apart:.2f} points apart at most",
        "the same seed twice, time": f"{ratio:.3f}x" + (f" [{below:.3f}, {above:.3f}]" if n > 1 else ""),
    }
    if n > 1:
        rows[f"accuracies that {n} pairs can tell apart"] = (
            f"about {math.sqrt(2) * (mean - low):.2f} points, if pairing helps nothing"
        )
        rows[f"times that {n} pairs can tell apart"] = f"about {100 * (math.sqrt(above / below) - 1):.1f} %"
    return pd.DataFrame({"": rows.values()}, index=list(rows))


def say_noise(comparison):
    """The same in two sentences, for the record."""
    rows, n = noise(comparison)[""], len(comparison.blocks)
    return (
        f"Baseline: {rows['validation accuracy at the end']}. Against itself, {n} pair{'s' * (n > 1)}: "
        f"time {rows['the same seed twice, time']}, accuracy {rows['the same seed twice, accuracy']}."
    )
