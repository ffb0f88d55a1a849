"""Chapter 5.1: what is trained: four kinds of pooling on few images; all images, less those learned."""

from effilib.chapters import convnet_tuning as convnet
from effilib.experiment import Arm, Contender
from effilib.methods.data_pruning import DataPruning
from effilib.methods.stochastic_pooling import StochasticPooling
from effilib.methods.training_accuracy import TrainingAccuracy
from effilib.tasks import Task

# What a regulariser saves is images. Nothing else regularises, as in the paper: no augmentation, and no
# BatchNorm in the judged arms.
SIZES = {preset: {**changes, "augmentation": "none"} for preset, changes in convnet.SIZES.items()}
# With BatchNorm, and in the short presets only a glance at it.
GRID = {
    "smoke": SIZES["smoke"] | dict(lengths=(1.0,)),
    "quick": SIZES["quick"] | dict(lengths=(0.125,), seeds=1),
    "study": SIZES["study"] | dict(lengths=(0.05, 1.0)),
    "full": SIZES["full"],
}
# Time: the same few images, more and more updates; a length is a share of the epochs again.
TIME = {
    "smoke": dict(images=64, epochs=2),
    "quick": dict(images=64, epochs=40, batch_size=16, seeds=1),
    "study": dict(images=512, epochs=200),
    "full": dict(images=1024, epochs=250),
}
TIME = {preset: {**changes, "augmentation": "none"} for preset, changes in TIME.items()}
WINDOW = 3  # side of the pooling windows, which overlap: the paper's
# kind of pooling -> role and method; S3Pool's grid is the weakest that is stochastic in every window
KINDS = {
    "max": ("baseline", ()),
    "stochastic": ("method", (StochasticPooling(),)),
    "S3Pool": ("method", (StochasticPooling(kind="s3"),)),
    "average": ("control", (StochasticPooling(kind="average"),)),
}

# Data pruning: the task's own network on its own images, for longer than elsewhere.
ALL = {
    "smoke": dict(epochs=3),
    "quick": dict(images=800, epochs=6, seeds=1),
    "study": dict(epochs=8, seeds=3),
}
PRUNED = "data pruning"
CONTENDERS = (
    Contender(
        "stochastic pooling",
        "5.1",
        ("the pooling",),
        lambda task: Arm(name="", methods=(StochasticPooling(),)),
        3,
    ),
    Contender(PRUNED, "5.1", ("which images",), lambda task: Arm(name="", methods=(DataPruning(),)), 1),
)


def with_all_images(task: Task) -> Task:
    """Return the task on its own network, with all of its images."""
    return convnet.on_own_network(task).sized(ALL)


def pruned(task: Task) -> list[Arm]:
    """Return training on all images, and on those that are not learned yet."""
    return [Arm(name="all images", role="baseline"), Arm(name=PRUNED, methods=(DataPruning(),))]


def arms(task: Task) -> list[Arm]:
    """Return the judged arms, without BatchNorm: max pooling first; S3Pool where there is time for it."""
    short = task.preset not in ("study", "full")
    return [_arm(task, kind) for kind in KINDS if not (short and kind == "S3Pool")]


def grid(task: Task) -> list[Arm]:
    """Return all kinds of pooling in a network with BatchNorm."""
    return [_arm(task, kind, bn=True) for kind in KINDS]


def tuned(task: Task) -> list[Arm]:
    """Return the arms whose learning rate was tuned: all, with BatchNorm and without."""
    return [_arm(task, kind, bn=bn) for bn in (False, True) for kind in KINDS]


def _arm(task, kind, *, bn=False):
    role, methods = KINDS[kind]
    methods = (*methods, TrainingAccuracy())
    return convnet.arm(task, kind + ", BatchNorm" * bn, role, methods, bn=bn, window=WINDOW)
