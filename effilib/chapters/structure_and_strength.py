"""Chapter 5.2: what is trained: learned and random filters, all weights or only their strength."""

from effilib.chapters import convnet_tuning as convnet
from effilib.experiment import Arm
from effilib.methods.structure_and_strength import STRUCTURES, StructureAndStrength
from effilib.tasks import Task

SIZES = convnet.SIZES  # what structure saves is labelled images
# Every structure with both trainings; in the short presets a glance at it.
GRID = {
    "smoke": SIZES["smoke"] | dict(lengths=(1.0,)),
    "quick": SIZES["quick"] | dict(lengths=(0.125,), seeds=1, epochs=3.125),
    "study": SIZES["study"] | dict(lengths=(0.125, 1.0), seeds=3),
    "full": SIZES["full"],
}
# Time: the same few images, more and more updates; a length is a share of the epochs again.
TIME = {
    "smoke": dict(images=64, epochs=2),
    "quick": dict(images=64, epochs=25, batch_size=16, seeds=1),
    "study": dict(images=512, epochs=200),
    "full": dict(images=512, epochs=500),
}
PATCHES = {"smoke": 500, "quick": 600, "study": 5000, "full": 20_000}  # a layer's filters are learned from
TRAINED = {"all": "all weights", "strength": "strength only"}
BASE, PAPER, START = "random, all weights", "dictionary, strength only", "kmeans, all weights"


def scope(task: Task) -> str:
    """Return what has a strength: a filter; in a network that may have BatchNorm, what has a gradient."""
    return "filter" if task.network in convnet.WITH_BN else "auto"


def control(task: Task) -> Arm:
    """Return strength without structure: only BatchNorm and the classifier are trained, of random filters."""
    only = (StructureAndStrength(structure="random", train="strength", scope="auto"),)
    if task.network in convnet.WITH_BN:
        return convnet.arm(task, "BatchNorm only", "control", only, bn=True)
    return convnet.arm(task, "random, strength only", "control", only)


def grid(task: Task) -> list[Arm]:
    """Return every structure with both trainings, and the control; the first is ordinary training."""
    found = []
    for structure in STRUCTURES:
        for train, words in TRAINED.items():
            name = f"{structure}, {words}"
            method = StructureAndStrength(
                structure=structure, train=train, scope=scope(task), patches=PATCHES[task.preset]
            )
            found.append(
                convnet.arm(
                    task, name, "baseline" if name == BASE else "method", () if name == BASE else (method,)
                )
            )
    return [*found, *([control(task)] if control(task).name not in [a.name for a in found] else [])]


def arms(task: Task) -> list[Arm]:
    """Return the judged arms: ordinary training, both methods, and the control where there is time for it."""
    every = {a.name: a for a in grid(task)}
    judged = [every[name] for name in (BASE, PAPER, START)]
    return [*judged, control(task)] if task.preset in ("study", "full") else judged


def tuned(task: Task) -> list[Arm]:
    """Return the arms whose learning rate was tuned: all."""
    return grid(task)
