"""Chapter 10: what is trained: the best arm of every chapter, and a combination, on one task."""

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
    standardization_loss,
    structure_and_strength,
)
from effilib.chapters.tree_cnn import cap
from effilib.errors import BadInput
from effilib.experiment import Arm
from effilib.methods.class_arrival import Growing
from effilib.methods.data_pruning import DataPruning
from effilib.methods.dynamic_fixed_point import DynamicFixedPoint
from effilib.methods.gradient_pruning import GradientPruning
from effilib.methods.standardization_loss import StandardizationLoss
from effilib.methods.stochastic_pooling import StochasticPooling
from effilib.methods.structure_and_strength import StructureAndStrength
from effilib.methods.tree_cnn import TreeCNN
from effilib.methods.wavelet_auto_encoder import AutoEncoder
from effilib.methods.wavelet_stem import WaveletStem
from effilib.methods.whitening import Whitening
from effilib.search import Contender, Found, applicable, combined, leave_one_out, why_not
from effilib.tasks import Task
from effilib.training import resolve_precision

__all__ = ["CONTENDERS", "PRESCRIBED", "SEARCH", "SIZES", "arms", "combinations", "contenders"]

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
FEW = ("resizing", "whitening stem", "wavelet stem", "PruneTrain")  # of the presets smoke and quick
PRESCRIBED = (
    "resizing",
    "wavelet stem",
    "PruneTrain",
)  # combined whatever each does alone; bf16 is in every arm


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


def _unnormalised(task):
    return _method(StandardizationLoss(), lr=standardization_loss.SHARE * task.recipe.lr)


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
    Contender("standardization loss", "7.2", (NORMS,), _unnormalised, 1),
    Contender("wavelet stem", "7.3", (STEM,), _one(WaveletStem())),
    Contender("wavelet auto-encoder", "7.3", (STEM, NETWORK), _encoder),
    Contender("prune, then grow", "II.9", (CONVS, NORMS, NETWORK, IMAGES), _grown, 5),
)


def contenders(task: Task) -> list[Contender]:
    """Return who takes part in a preset."""
    return [c for c in CONTENDERS if c.name in FEW or task.preset in ("study", "full")]


def arms(task: Task) -> tuple[list[Arm], list[Contender], dict[str, str]]:
    """Return (the baseline and all that apply, these as contenders, left out: name -> why)."""
    able, left_out = applicable(task, contenders(task))
    return [Arm(name=BASELINE, role="baseline"), *(c.arm(task) for c in able)], able, left_out


def combinations(task: Task, found: Found, left_out: dict[str, str]) -> list[Arm]:
    """Return the combination that was searched, without one part each, and the prescribed one.

    What of them does not apply goes into `left_out`.
    """
    parts = [next(c for c in CONTENDERS if c.name == name) for name in PRESCRIBED]
    arms = [found.best(task), *leave_one_out(task, found.parts)] if len(found.parts) > 1 else []
    if set(found.parts) != set(parts):
        arms.append(combined(task, parts))
    whys = {a.name: why_not(task, a) for a in arms}
    left_out |= {name: why for name, why in whys.items() if why}
    return [a for a in arms if not whys[a.name]]
