"""Chapter 10: what is trained: the best arm of every chapter, and a combination, on one task."""

from effilib import data, paths
from effilib.chapters import (
    column_row_sampling,
    dynamic_fixed_point,
    gradient_approximation,
    gradient_pruning,
    kernel_rescaling,
    layer_replacement,
    net2net,
    prune_then_grow,
    prune_train,
    standardization_loss,
    stochastic_pooling,
    structure_and_strength,
    tree_cnn,
    wavelet,
)
from effilib.errors import BadInput
from effilib.experiment import Arm, Contender
from effilib.recipe import resolve_precision
from effilib.search import Found, applicable, combined, leave_one_out, why_not
from effilib.tasks import Task

__all__ = ["CONTENDERS", "PRESCRIBED", "SEARCH", "SIZES", "arms", "combinations", "contenders", "elsewhere"]

BASELINE = "baseline"
SIZES = {
    "quick": dict(images=2500, epochs=2),
    "study": dict(epochs=4, lengths=(0.5, 1.0), seeds=3),  # twenty arms: about 100 minutes on two cores
}
SEARCH = {
    "smoke": dict(seeds=1, lengths=(0.5, 1.0)),
    "quick": dict(seeds=1),
    "study": dict(seeds=2),
    "full": dict(seeds=2),
}
ELSEWHERE = {  # whether it carries over: two arms a task
    "quick": dict(images=640, epochs=1, seeds=1, validation=250),
    "study": dict(epochs=3),
}
FASHION = "fashion_mnist"
FEW = ("resizing", "whitening stem", "wavelet stem", "PruneTrain")  # of the presets smoke and quick
PRESCRIBED = (
    "resizing",
    "wavelet stem",
    "PruneTrain",
)  # combined whatever each does alone; bf16 is in every arm


def _fp32(task):
    if resolve_precision(task.recipe.precision, task.device) == "fp32":
        raise BadInput("this machine has no native 16-bit products, so that every arm is fp32")
    return Arm(name="", role="control", changes={"precision": "fp32"})


def _smaller(task):
    found = gradient_pruning.smaller(task)
    if not found:
        raise BadInput("only our ResNet has settings by which it becomes smaller")
    return found[0]


CHAPTERS = (
    dynamic_fixed_point,
    column_row_sampling,
    gradient_pruning,
    gradient_approximation,
    stochastic_pooling,
    structure_and_strength,
    prune_train,
    net2net,
    kernel_rescaling,
    layer_replacement,
    tree_cnn,
    standardization_loss,
    wavelet,
    prune_then_grow,
)
CONTENDERS = (
    Contender("fp32", "", ("the number format",), _fp32),
    Contender("smaller network", "", ("the network",), _smaller),
    *(c for chapter in CHAPTERS for c in chapter.CONTENDERS),
)


def contenders(task: Task) -> list[Contender]:
    """Return who takes part in a preset."""
    return [c for c in CONTENDERS if c.name in FEW or task.preset in ("study", "full")]


def prescribed() -> list[Contender]:
    """Return the parts of the prescribed combination."""
    return [next(c for c in CONTENDERS if c.name == name) for name in PRESCRIBED]


def arms(task: Task) -> tuple[list[Arm], list[Contender], dict[str, str]]:
    """Return (the baseline and all that apply, these as contenders, left out: name -> why)."""
    able, left_out = applicable(task, contenders(task))
    return [Arm(name=BASELINE, role="baseline"), *(c.arm(task) for c in able)], able, left_out


def combinations(task: Task, found: Found, left_out: dict[str, str]) -> list[Arm]:
    """Return the combinations to judge.

    The one that was searched, whole and without one part each, and the prescribed one. What of them does not
    apply goes into `left_out`.
    """
    parts = prescribed()
    arms = [found.best(task), *leave_one_out(task, found.parts)] if len(found.parts) > 1 else []
    if set(found.parts) != set(parts):
        arms.append(combined(task, parts))
    whys = {a.name: why_not(task, a) for a in arms}
    left_out |= {name: why for name, why in whys.items() if why}
    return [a for a in arms if not whys[a.name]]


def elsewhere(task: Task, found: Found) -> tuple[dict[str, tuple[Task, list[Arm]]], dict[str, str]]:
    """Return (where -> task, baseline and best arm), (where not -> why): does it carry over, untuned?

    To another network, and to Fashion-MNIST with the same recipe. Where a search found nothing, the best is
    the prescribed combination.
    """
    other = "resnet" if task.network == "vgg" else "vgg"
    tasks, left_out = {f"with network {other}": task.on(other).sized(SIZES).sized(ELSEWHERE)}, {}
    if task.preset in ("smoke", "quick"):
        left_out[f"on {FASHION}"] = f"there is no time for it in the preset {task.preset}"
    elif task.dataset == FASHION:
        left_out[f"on {FASHION}"] = "all of this chapter is on it"
    elif not data.present(FASHION):
        left_out[f"on {FASHION}"] = f"its files are not in {paths.data()}"
    else:
        tasks[f"on {FASHION}"] = task.but(dataset=FASHION).sized(ELSEWHERE)
    tried = {}
    for where, there in tasks.items():
        best = combined(there, found.parts or prescribed())
        if why := why_not(there, best):
            left_out[where] = why
        else:
            tried[where] = there, [Arm(name=BASELINE, role="baseline"), best]
    return tried, left_out
