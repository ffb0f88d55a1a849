"""Chapters 5.1 and 5.2 train a plain network: which one, and the learning rates that were tuned for it.

The task's ResNet has no pooling layer between its stages and needs its BatchNorm, so that neither chapter can
use it. Every arm was tuned by itself, with as many runs as the baseline: `python -m
effilib.chapters.convnet_tuning study cifar10` runs what is missing in `results/recorded/tuning`, from which
arms take the rate with the best mean accuracy.
"""

import math
import statistics as stats
import sys
from dataclasses import replace

from effilib import tuning
from effilib.experiment import Arm
from effilib.tasks import Task, recorded_tuning, task

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
GUESSED = {LOW: 0.1, HIGH: 0.4}  # of what nobody has swept
LONG = ("study", "full")  # presets that take the rates of the study's sweep


def tuning_says(task: Task) -> str:
    """Return how the arms' learning rates were found, in a sentence."""
    if task.network != NETWORK or "lr" in task.given:
        return "Learning rates: the task's, for all arms alike."
    if not _rows(task):
        guess = f"{GUESSED[LOW]} without BatchNorm, else {GUESSED[HIGH]}"
        return f"Learning rates: not swept yet at these sizes: {guess}."
    swept = "swept with as many runs an arm (`results/recorded/tuning`), on seeds that are not measured"
    return f"Learning rates: {swept}."


def network(task: Task, bn: bool) -> dict:
    """Return the settings of the network with or without BatchNorm; a user's own is as it is."""
    return {"bn": bn} if task.network in WITH_BN else {}


def on_own_network(task: Task) -> Task:
    """Return the task on its own network, which for these chapters' plain one is the preset's ResNet."""
    return task.on("" if task.network == NETWORK else task.network)


def arm(task: Task, name: str, role: str, methods: tuple = (), *, bn: bool = False, **settings) -> Arm:
    """Return an arm at its tuned learning rate; at the task's in another network, which nobody tuned.

    settings: of the plain network.
    """
    made = Arm(name=name, role=role, methods=methods, network=network(task, bn))
    if made.network:
        made = replace(made, network=made.network | settings)
    if task.network != NETWORK or "lr" in task.given:
        return made
    rows = [r for r in _rows(task) if r["arm"] == name]
    return replace(made, changes={"lr": best_rate(rows) or GUESSED[rates(made)]})


def _rows(task):
    swept = "study-cifar10" if task.preset in LONG else "quick-mnist5k"
    return tuning.read(recorded_tuning() / f"{swept}-{NETWORK}.csv")


def rates(arm: Arm) -> tuple[float, ...]:
    """Return the learning rates that are tried for an arm."""
    return LOW if arm.network.get("bn") is False and "strength" not in arm.name else HIGH


def best_rate(rows: list[dict]) -> float | None:
    """Return the rate with the best mean accuracy of an arm's rows; None where every rate diverged."""
    found = {}
    for r in rows:
        found.setdefault(r["setting"]["lr"], []).append(math.nan if r["diverged"] else r["accuracy"])
    means = {lr: stats.fmean(ends) for lr, ends in found.items() if all(map(math.isfinite, ends))}
    return max(means, key=means.get, default=None)


def sweep(task: Task, arms: list[Arm], **options) -> dict[str, float | None]:
    """Run what is missing of arms x rates, at the shortest and longest length; return arm -> best rate."""
    ends = task.but(lengths=tuple(sorted({min(task.lengths), max(task.lengths)})))
    settings = {a.name: [{"lr": lr} for lr in rates(a)] for a in arms}
    return {a.name: best_rate(tuning.sweep(ends, a, settings[a.name], name=NETWORK, **options)) for a in arms}


if __name__ == "__main__":
    from effilib.chapters import stochastic_pooling, structure_and_strength

    base = task(*sys.argv[1:3], NETWORK)
    for chapter in (stochastic_pooling, structure_and_strength):
        arms = [replace(a, changes={}) for a in chapter.tuned(base)]
        print(sweep(base.sized(chapter.SIZES), arms))
