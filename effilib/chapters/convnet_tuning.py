"""Chapters 5.1 and 5.2 train a plain network: which one, and the learning rates that were tuned for it.

The task's ResNet has no pooling layer between its stages and needs its BatchNorm, so that neither chapter can
use it. Every arm was tuned by itself, with as many runs as the baseline: `python -m
effilib.chapters.convnet_tuning study cifar10` runs what is missing in `results/recorded/tuning` and prints
the outcome, which stands in `LR`.
"""

import statistics as stats
import sys
from dataclasses import replace

from effilib import tuning
from effilib.experiment import Arm
from effilib.tasks import Task, task

NETWORK = "convnet"
# Lengths are shares of the images at equal numbers of updates. Numbers of images are multiples of the batch,
# so that an epoch leaves none out.
SIZES = {
    "smoke": dict(axis="images", images=64, lengths=(0.5, 1.0), epochs=2),
    "quick": dict(axis="images", images=512, lengths=(0.125, 1.0), epochs=5, batch_size=16),
    "study": dict(axis="images", images=10_240, lengths=(0.05, 0.1, 0.2, 0.5, 1.0), epochs=10, seeds=3),
    "full": dict(axis="images", images=32_768, lengths=(0.0625, 0.25, 1.0), epochs=20),
}
WITH_BN = ("convnet", "vgg")  # networks that can be built with and without it
# rates tried: of all weights without BatchNorm, which diverge early, and of all else
LOW, HIGH = (0.02, 0.05, 0.1, 0.2, 0.4), (0.1, 0.2, 0.4, 0.8, 1.6)
# preset -> arm -> the rate with the best mean accuracy over lengths and seeds (kinds of pooling: with windows
# of 3 x 3; of the others, but for the whitened layer, quick's are of 6.25 and 50 epochs)
LR = {
    "quick": {
        "max": 0.02,
        "stochastic": 0.05,
        "S3Pool": 0.02,
        "average": 0.1,
        "max, BatchNorm": 0.8,
        "stochastic, BatchNorm": 0.4,
        "S3Pool, BatchNorm": 0.4,
        "average, BatchNorm": 0.4,
        "random, all weights": 0.05,
        "random, strength only": 0.4,
        "dictionary, all weights": 0.1,
        "dictionary, strength only": 0.2,
        "kmeans, all weights": 0.05,
        "whitened first layer": 0.05,
        "kmeans, strength only": 0.4,
        "BatchNorm only": 0.8,
    },
    # not swept yet at these sizes: what was best on Fashion-MNIST with 2000 images
    "study": {
        "max": 0.1,
        "stochastic": 0.1,
        "S3Pool": 0.1,
        "average": 0.1,
        "max, BatchNorm": 0.4,
        "stochastic, BatchNorm": 0.4,
        "S3Pool, BatchNorm": 0.4,
        "average, BatchNorm": 0.4,
        "random, all weights": 0.1,
        "random, strength only": 0.2,
        "dictionary, all weights": 0.1,
        "dictionary, strength only": 0.2,
        "kmeans, all weights": 0.1,
        "whitened first layer": 0.1,
        "kmeans, strength only": 0.2,
        "BatchNorm only": 0.8,
    },
}


# What is known of the rates, for the chapters to say.
TUNING = {
    "study": "not swept yet at these sizes: the rates are what was best on Fashion-MNIST with 2000 images",
    "quick": "swept with as many runs an arm (`results/recorded/tuning`), on seeds that are not measured",
}


def tuning_says(task: Task) -> str:
    """Return how the arms' learning rates were found, in a sentence."""
    if task.network != NETWORK or "lr" in task.given:
        return "Learning rates: the task's, for all arms alike."
    return f"Learning rates: {TUNING[_sweep(task)]}."


def network(task: Task, bn: bool) -> dict:
    """Return the settings of the network with or without BatchNorm; a user's own is as it is."""
    return {"bn": bn} if task.network in WITH_BN else {}


def on_own_network(task: Task) -> Task:
    """Return the task on its own network, which for these chapters' plain one is the preset's ResNet."""
    return task.on("" if task.network == NETWORK else task.network)


def _sweep(task):
    """Which sweep's outcome a preset takes."""
    return "study" if task.preset in ("study", "full") else "quick"


def arm(task: Task, name: str, role: str, methods: tuple = (), *, bn: bool = False, **settings) -> Arm:
    """Return an arm at its tuned learning rate; at the task's in another network, which nobody tuned.

    settings: of the plain network.
    """
    rates = LR[_sweep(task)]
    changes = (
        {"lr": rates[name]} if task.network == NETWORK and name in rates and "lr" not in task.given else {}
    )
    built = network(task, bn)
    return Arm(name=name, role=role, methods=methods, changes=changes, network=built and built | settings)


def sweep(task: Task, arms: list[Arm], **options) -> dict[str, float]:
    """Run what is missing of arms x rates at the task's lengths. Returns arm -> its best learning rate."""
    found = {}
    for a in arms:
        rates = LOW if a.network.get("bn") is False and "strength" not in a.name else HIGH
        rows = tuning.sweep(task, a, [{"lr": lr} for lr in rates], name=NETWORK, **options)
        means = {lr: stats.fmean(r["accuracy"] for r in rows if r["setting"]["lr"] == lr) for lr in rates}
        found[a.name] = max(means, key=means.get)
    return found


if __name__ == "__main__":
    from effilib.chapters import stochastic_pooling, structure_and_strength

    base = task(*sys.argv[1:3], NETWORK)
    for chapter in (stochastic_pooling, structure_and_strength):
        arms = [replace(a, changes={}) for a in chapter.tuned(base)]
        print(sweep(base.sized(chapter.SIZES), arms))
