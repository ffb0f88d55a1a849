"""Chapter 5.2: what is trained: a whitening stem; learned and random filters, all weights or strength."""

from dataclasses import replace

from effilib.chapters import convnet_tuning as convnet
from effilib.experiment import Arm, Contender
from effilib.methods.structure_and_strength import STRUCTURES, StructureAndStrength
from effilib.methods.whitening import Whitening
from effilib.tasks import Task

# The closed form, on the task's own network and all of its images.
STEM = {
    "quick": dict(images=800, epochs=1.2, batch_size=16, lr=0.1),  # sixty steps
    "study": dict(epochs=4),
}
WHITE, AS_WIDE, FROZEN = "whitening stem", "stem as wide, trained", "stem as wide, random and frozen"
CHANNELS = 32  # of the stem: 16 of the 27 directions of a patch, and their negatives; trained, 16 are as good

SIZES = convnet.SIZES  # what structure saves is labelled images
# Every structure with both trainings; in the short presets a glance at it.
GRID = {
    "smoke": SIZES["smoke"] | dict(lengths=(1.0,)),
    "quick": SIZES["quick"] | dict(lengths=(0.125,), seeds=1, epochs=1),
    "study": SIZES["study"] | dict(lengths=(0.05, 1.0)),
    "full": SIZES["full"],
}
# Time: the same few images, more and more updates; a length is a share of the epochs again.
TIME = {
    "smoke": dict(images=64, epochs=2),
    "quick": dict(images=64, epochs=12, batch_size=16, seeds=1),
    "study": dict(images=512, epochs=200),
    "full": dict(images=512, epochs=500),
}
PATCHES = {"smoke": 500, "quick": 600, "study": 5000, "full": 20_000}  # a layer's filters are learned from
TRAINED = {"all": "all weights", "strength": "strength only"}
BASE, PAPER, START = "random, all weights", "dictionary, strength only", "kmeans, all weights"
STRENGTH, WHITENED = "kmeans, strength only", "whitened first layer"


def _strength(task):
    how = dict(structure="kmeans", train="all", scope="auto", patches=PATCHES[task.preset])
    return Arm(name="", methods=(StructureAndStrength(**how),))


def _whitened(task):
    return Arm(name="", methods=(Whitening(),), network=_wide(task))


CONTENDERS = (
    Contender("structure and strength", "5.2", ("the convolutions", "the norms"), _strength, 2),
    Contender(WHITE, "5.2", ("the stem",), _whitened),
)


def _wide(task):
    """Settings of a network whose stem can be as wide as the whitening one."""
    return {"stem": CHANNELS} if task.network == "resnet" else {}


def with_stem(task: Task) -> Task:
    """Return the task on its own network, in which the stem is judged."""
    return convnet.on_own_network(task).sized(STEM)


def stems(task: Task) -> list[Arm]:
    """Return the stem as built, the whitening one, and its controls: as wide, trained or frozen."""
    wide = _wide(task)
    found = [
        Arm(name="as built", role="baseline"),
        Arm(name=WHITE, methods=(Whitening(),), network=wide),
        Arm(name=AS_WIDE, role="control", network=wide),
        Arm(name=FROZEN, role="control", methods=(Whitening(structure="random"),), network=wide),
    ]
    if not wide:  # of a user's network only what the filters are can be changed
        found = [a for a in found if a.name != AS_WIDE]
    return found if task.preset in ("study", "full") else found[:3]


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
    """Return every structure with both trainings, the whitened layer and the control.

    The first is ordinary training.
    """
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
    found.append(convnet.arm(task, WHITENED, "method", (Whitening(),)))
    return [*found, *([control(task)] if control(task).name not in [a.name for a in found] else [])]


def arms(task: Task) -> list[Arm]:
    """Return ordinary training, two structures as its start, and the controls with few parameters.

    The paper's own, whose dictionary takes seconds, where there is time for it.
    """
    every = {a.name: a for a in grid(task)}
    found = [every[BASE], every[START], every[WHITENED], replace(every[STRENGTH], role="control")]
    if task.preset in ("study", "full"):
        found += [replace(every[PAPER], role="control"), control(task)]
    return found


def tuned(task: Task) -> list[Arm]:
    """Return the arms whose learning rate was tuned: all."""
    return grid(task)
