"""Chapter 10: what is trained: the best arm of every chapter, and a combination, on one task."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

from effilib import models
from effilib.chapters import (
    column_row_sampling,
    gradient_approximation,
    gradient_pruning,
    kernel_rescaling,
    layer_replacement,
    net2net,
    prune_then_grow,
    prune_train,
    structure_and_strength,
)
from effilib.chapters.tree_cnn import cap
from effilib.errors import BadInput, NoEffect
from effilib.experiment import Arm
from effilib.methods.class_arrival import Growing
from effilib.methods.data_pruning import DataPruning
from effilib.methods.dynamic_fixed_point import DynamicFixedPoint
from effilib.methods.gradient_pruning import GradientPruning
from effilib.methods.standardization_loss import StandardizationLoss
from effilib.methods.stochastic_pooling import StochasticPooling
from effilib.methods.structure_and_strength import StructureAndStrength
from effilib.methods.tree_cnn import TreeCNN
from effilib.methods.wavelet import WaveletStem
from effilib.methods.wavelet_auto_encoder import AutoEncoder
from effilib.methods.whitening import Whitening
from effilib.tasks import Task
from effilib.training import resolve_precision

__all__ = [
    "CONTENDERS",
    "PRESCRIBED",
    "SIZES",
    "Contender",
    "arms",
    "clash",
    "combined",
    "contenders",
    "why_not",
]

BASELINE = "baseline"
SIZES = {
    "quick": dict(images=2500, epochs=2),
    "study": dict(epochs=4, lengths=(0.5, 1.0), seeds=3),  # twenty arms: about 100 minutes on two cores
}
FEW = ("resizing", "whitening stem", "wavelet stem", "PruneTrain")  # of the presets smoke and quick
PRESCRIBED = (
    "resizing",
    "wavelet stem",
    "PruneTrain",
)  # combined whatever each does alone; bf16 is in every arm


@dataclass(frozen=True)
class Contender:
    """A method, or a control, as it takes part.

    >>> next(c for c in CONTENDERS if c.name == "resizing").modifies
    ('the images',)
    """

    name: str
    chapter: str  # its number, "" for a control
    modifies: tuple[str, ...]  # what of the training it changes; no two of a combination may change the same
    make: Callable[[Task], Arm]  # its name is set later
    order: int = 0  # in which methods of a combination work within a step, smallest first


def _method(*methods, **changes) -> Arm:
    return Arm(name="", methods=methods, changes=changes)


def _fp32(task):
    if resolve_precision(task.recipe.precision, task.device) == "fp32":
        raise BadInput("this machine has no native 16-bit products, so that every arm is fp32")
    return Arm(name="", role="control", changes={"precision": "fp32"})


def _smaller(task):
    found = gradient_pruning.smaller(task)
    if not found:
        raise BadInput("only our ResNet has settings by which it becomes smaller")
    return found[0]


def _grown(task):
    methods = prune_then_grow.resizer(task), prune_then_grow.procedure(task)
    return Arm(name="", methods=methods, network=prune_then_grow.start(task))


def _resized(task, **how):
    return _method(kernel_rescaling.method(task, task.load(), **how))


def _one(method, **changes):
    """How the arm of a method is made that needs nothing of the task."""
    return lambda task: _method(method, **changes)


def _net2net(task):
    return net2net.one_run(task, name="")


def _replaced(task):
    return Arm(name="", fit=layer_replacement.method(task.preset))


def _tree(task):  # its first stage on the clock; images of classes not seen yet count as misclassified
    return Arm(name="", fit=Growing(tree=TreeCNN(cap=cap(task.load().classes))))


def _pruned(task):
    return _method(prune_train.method(task.preset))


def _whitened(task):
    network = {"stem": structure_and_strength.CHANNELS} if task.network == "resnet" else {}
    return Arm(name="", methods=(Whitening(),), network=network)


def _encoder(task):
    if task.network not in models.NETWORKS:
        raise BadInput("its trunks are networks of ours, whose widths are lists")
    return Arm(name="", fit=AutoEncoder())


CONVS, NORMS, NETWORK, IMAGES = "the convolutions", "the norms", "the network", "the images"
STEM = "the stem"
SAMPLED = column_row_sampling.SETTINGS[column_row_sampling.CONTENDER]
FROZEN = gradient_approximation.SETTINGS[gradient_approximation.CONTENDER]
STRENGTH = StructureAndStrength(scope="auto")
CONTENDERS = (
    Contender("fp32", "", ("the number format",), _fp32),
    Contender("smaller network", "", (NETWORK,), _smaller),
    Contender("dynamic fixed point", "3.3", (CONVS,), _one(DynamicFixedPoint(), precision="fp32"), 3),
    Contender("column-row sampling", "3.4", (CONVS, NETWORK), _one(SAMPLED), 3),
    Contender("gradient pruning", "4.1", (CONVS,), _one(GradientPruning(p=0.9)), 3),
    Contender("gradient approximation", "4.2", (CONVS, NORMS), _one(FROZEN), 3),
    Contender("stochastic pooling", "5.1", ("the pooling",), _one(StochasticPooling()), 3),
    Contender("data pruning", "5.1", ("which images",), _one(DataPruning()), 1),
    Contender("structure and strength", "5.2", (CONVS, NORMS), _one(STRENGTH), 2),
    Contender("whitening stem", "5.2", (STEM,), _whitened),
    Contender("PruneTrain", "6.1", (CONVS, NORMS), _pruned, 4),
    Contender("Net2Net", "6.2", (NETWORK,), _net2net),
    Contender("resizing", "6.3", (IMAGES,), lambda task: _resized(task, kernels=False), 1),
    Contender("kernel rescaling", "6.3", (IMAGES,), _resized, 1),
    Contender("layer replacement", "6.4", (CONVS, NETWORK), _replaced),
    Contender("Tree-CNN", "7.1", (NETWORK,), _tree),
    Contender("standardization loss", "7.2", (NORMS,), _one(StandardizationLoss()), 1),
    Contender("wavelet stem", "7.3", (STEM,), _one(WaveletStem())),
    Contender("wavelet auto-encoder", "7.3", (STEM, NETWORK), _encoder),
    Contender("prune, then grow", "II.9", (CONVS, NORMS, NETWORK, IMAGES), _grown, 5),
)


def contenders(task: Task) -> list[Contender]:
    """Return who takes part in a preset."""
    return [c for c in CONTENDERS if c.name in FEW or task.preset in ("study", "full")]


def clash(a: Contender, b: Contender, task: Task) -> str:
    """Return why two contenders cannot be combined, "" if they can."""
    several = [c.name for c in (a, b) if c.make(task).fit]
    both = [m for m in a.modifies if m in b.modifies]
    if several:
        return f"{several[0]} is more than one training"
    return f"{a.name} and {b.name} both change {' and '.join(both)}" if both else ""


def combined(task: Task, parts: list[Contender]) -> Arm:
    """Return one arm of several contenders. Raises `BadInput` where two of them cannot be combined."""
    why = next((w for a, b in itertools.combinations(parts, 2) if (w := clash(a, b, task))), "")
    if why:
        raise BadInput(f"no combination: {why}")
    made = [c.make(task) for c in sorted(parts, key=lambda c: c.order)]
    changes = {k: v for a in made for k, v in a.changes.items()}
    network = {k: v for a in made for k, v in a.network.items()}
    methods = tuple(m for a in made for m in a.methods)
    return Arm(name=" + ".join(c.name for c in parts), methods=methods, changes=changes, network=network)


def why_not(task: Task, arm: Arm) -> str:
    """Return why an arm cannot be trained, "" if it can: by two epochs of a few images.

    A method that does not apply says so by `BadInput` or `NoEffect`; any other error is a fault of ours and
    is raised, unless the network is a user's, whose code may raise anything.
    """
    few = task.but(images=8 * task.recipe.batch_size, epochs=2, validation=50, axis="epochs")
    try:
        arm.run(few, few.load(), seed=0)
    except (BadInput, NoEffect) as error:
        return str(error)
    except Exception as error:
        if task.network in models.NETWORKS:
            raise
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return ""


def arms(task: Task) -> tuple[list[Arm], dict[str, str]]:
    """Return (arms, left out: name -> why): the baseline, all that apply, and the prescribed combination."""
    parts = [next(c for c in CONTENDERS if c.name == name) for name in PRESCRIBED]
    offers = {c.name: c.make for c in contenders(task)}
    offers[" + ".join(PRESCRIBED)] = lambda task: combined(task, parts)
    found, left_out = [Arm(name=BASELINE, role="baseline")], {}
    for name, make in offers.items():
        try:
            arm = replace(make(task), name=name)
            why = why_not(task, arm)
        except (BadInput, NoEffect) as error:
            why = str(error)
        if why:
            left_out[name] = why
        else:
            found.append(arm)
    return found, left_out
