"""What both chapters about needing fewer images train: a plain network with max pooling, with or without
BatchNorm.

The task's ResNet has no pooling layer between its stages and needs its BatchNorm, so neither chapter can use
it. The learning rates were tuned at the presets' numbers of updates, before any method was run
(`effilib.chapters.plain_tuning`)."""

import functools
import math
import statistics as stats

import pandas as pd

from effilib import figures
from effilib.statistics import paired_ratio
from effilib.tasks import Task
from effilib.training import Method, evaluate, train

NETWORK = "convnet"
WITH_BN = ("convnet", "vgg")  # networks that can be built with and without it
# The sweep's best learning rates, the lower one where two lie within half a point: preset -> what is trained,
# of which filters. Without BatchNorm a rate that is best for two seeds lets a third one collapse, so that
# five decide there.
LR = {
    "quick": {
        "all": 0.05,
        "all, BatchNorm": 0.4,
        "strength": 0.2,
        "BatchNorm only": 0.8,
        "all, learned": 0.05,
        "strength, learned": 0.2,
    },
    "study": {
        "all": 0.1,
        "all, BatchNorm": 0.4,
        "strength": 0.2,
        "BatchNorm only": 0.8,
        "all, learned": 0.1,
        "strength, learned": 0.2,
    },
}


def settings(task, bn):
    """Settings of the network with or without BatchNorm; a user's own is as it is."""
    return {"bn": bn} if task.network in WITH_BN else {}


def lr(task, what="all"):
    """The tuned learning rate; that of the task for another network, which nobody tuned."""
    return (
        LR["study" if task.preset in ("study", "full") else "quick"][what]
        if task.network == NETWORK
        else task.recipe.lr
    )


def at_size(task, images, updates, **changes):
    """The task with so many training images and so many updates, however many epochs that makes."""
    batch = min(task.recipe.batch_size, images)
    return task.but(images=images, batch_size=batch, epochs=updates / (images // batch), **changes)


class TrainingAccuracy(Method):
    """Notes the accuracy on the training images in eval mode at the end, off the clock. Comes last in an
    arm.
    """

    def on_fit_end(self, run):
        with run.clock.paused():
            few = run.dataset.limit(min(1000, len(run.dataset.train)))
            accuracy = evaluate(run.model, few, "train", run.precision)[1]
        run.log(self, f"{accuracy:.2f} % of the training images", training_accuracy=accuracy)


@functools.lru_cache(1)
def _all(dataset, device, held):
    return Task(preset="", dataset=dataset, device=device, held=held).load()


def load(task, images=None):
    """The task's data, or its first `images` images; read and checked only once for a whole grid."""
    dataset = _all(task.dataset, task.device, task.held)
    images = images or task.images
    return dataset.limit(min(images, len(dataset.train))) if images else dataset


def fit(task, seed, methods=(), network=None, lr=None):
    """A run of a grid: no evaluation on the way, and the accuracy on the training images at the end. For
    `Arm.fit`.
    """
    dataset = load(task)
    recipe = task.recipe if lr is None else task.but(lr=lr).recipe
    model = task.build(dataset, seed, **(network or {}))
    return train(model, dataset, recipe, (*methods, TrainingAccuracy()), seed, evaluations=task.evaluations)


def training_accuracy(history):
    """What `TrainingAccuracy` noted, in %; nan where it did not."""
    return next(
        (e["training_accuracy"] for e in reversed(history.events) if "training_accuracy" in e), math.nan
    )


def images_needed(sizes, accuracies, target):
    """Images at which a learning curve crosses `target`, interpolated in log N: None if it never does, at
    least the smallest size.
    """
    if accuracies[0] >= target:
        return float(sizes[0])
    for i in range(1, len(sizes)):
        if accuracies[i] >= target:
            share = (target - accuracies[i - 1]) / (accuracies[i] - accuracies[i - 1])
            return math.exp(math.log(sizes[i - 1]) + share * math.log(sizes[i] / sizes[i - 1]))
    return None


def needed(comparisons, arms, sizes, target):
    """One row per arm: the images that it needs for `target`, from every seed's own curve, and how many times
    fewer than the first arm.
    """
    found = {}
    for name in arms:
        curves = zip(*([h.accuracy for h in comparisons[n].histories(name)] for n in sizes), strict=True)
        found[name] = [images_needed(sizes, curve, target) for curve in curves]
    rows, base = {}, found[arms[0]]
    for name, counts in found.items():
        reached = [c for c in counts if c is not None]
        row = {
            "images": f"{stats.median(reached):,.0f}" if reached else "more than there are",
            "reached": f"{len(reached)} of {len(counts)}",
        }
        if name != arms[0] and len(reached) == len(counts) and None not in base:
            ratio, low, high = paired_ratio(base, counts)
            row["times fewer"] = f"{ratio:.2f}x" + (f" [{low:.2f}, {high:.2f}]" if len(counts) > 1 else "")
        rows[name] = row
    return pd.DataFrame(rows).T.fillna("").rename_axis(f"images for {target:.1f} %")


def draw_curves(axes, sizes, values, colour, style=None):
    """Accuracy over the number of images: a dot a seed, the mean as a line. values: dict arm -> per size the
    list of seeds.
    """
    for name, per_size in values.items():
        line = (style or {}).get(name, "-")
        axes.plot(sizes, [stats.mean(v) for v in per_size], line, color=colour[name], lw=1.8, label=name)
        for n, v in zip(sizes, per_size, strict=True):
            axes.plot([n] * len(v), v, ".", color=colour[name], ms=4, alpha=0.5)
    axes.set_xscale("log")
    figures.plain_log(axes.xaxis, values=sizes)
