"""Who takes part in chapter 10: every method as its own chapter makes it, the controls, and which of them go
together.
"""

import itertools
from dataclasses import dataclass, replace

import pandas as pd

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
from effilib.chapters.attempts import WholeTree, tried
from effilib.errors import BadInput
from effilib.experiment import Arm
from effilib.methods.tree_cnn import TreeCNN
from effilib.training import resolve_precision
from effilib.workbook import series

DENSE, SHORTER = "baseline", 0.8  # the shorter schedule's share of the epochs
FP32, SHORT, SMALL = "fp32", "shorter schedule", "smaller network"
GIVEN, COUNTED = "Net2Net, teacher given", "Net2Net, teacher counted"
RESIZED, STEM, PRUNED, TREE = "resizing", "wavelet stem", "PruneTrain", "Tree-CNN"

CONVS, NORMS, NETWORK, LENGTH = (
    "the convolutions",
    "the normalisation",
    "the network's size",
    "the length of the schedule",
)
IMAGES, POOLS, FRONT, FORMAT = "the size of the images", "the pooling", "the stem", "the number format"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A method or a control as it takes part.

    stem: of its chapter's notebook; "" for a control. arm: None where it cannot be made for this task, `why`
    says why. holds: what it takes hold of; no two methods of a combination may change the same. order: in
    which methods work within a step, smallest first."""

    name: str
    stem: str = ""
    arm: Arm | None = None
    holds: tuple = ()
    order: int = 0
    why: str = ""

    @property
    def chapter(self):
        """Its chapter's number; "" for a control."""
        return series.chapter(self.stem).number if self.stem else ""

    @property
    def stretches(self):
        """Whether it may train for more epochs: one training, whose length is not what it changes."""
        return self.arm is not None and not self.arm.fit and LENGTH not in self.holds


def baseline():
    """The arm that all others are compared with."""
    return Arm(name=DENSE, role="baseline")


def contenders(task, dataset):
    """Every method with the settings that its own chapter has for this preset, and the controls; a reason
    where one cannot be made.
    """
    student = net2net.STUDENT[task.preset]
    offers = [  # name, chapter, what it takes hold of, order, how the arm is made
        (FP32, "", [FORMAT], 0, lambda: fp32(task)),
        (SHORT, "", [LENGTH], 0, lambda: Arm(name="", role="control", changes={"epochs": SHORTER * task.recipe.epochs})),
        (SMALL, "", [NETWORK], 0, lambda: smaller(task)),
        ("dynamic fixed point", "03_3_dynamic_fixed_point", [CONVS, FORMAT], 3, lambda: named(dynamic_fixed_point.arms(), "DFP-14")),
        ("column-row sampling", "03_4_approximate_tensor_operations", [CONVS], 3,
         lambda: named(column_row_sampling.arms(task), "top-k, 50%")),
        ("gradient pruning", "04_1_activation_gradient_pruning", [CONVS], 3, lambda: named(gradient_pruning.arms(task), "pruned, p = 90%")),
        ("gradient approximation", "04_2_gradient_approximation", [CONVS], 3, lambda: named(gradient_approximation.arms(task), "zero, S1")),
        ("stochastic pooling", "05_1_stochastic_pooling", [POOLS], 3,
         lambda: Arm(name="", methods=stochastic_pooling.METHODS["stochastic"])),
        ("structure and strength", "05_2_structure_and_strength", [CONVS, NORMS], 2, lambda: structured(task)),
        (PRUNED, "06_1_prune_train", [CONVS, NORMS], 4, lambda: Arm(name="", methods=(prune_train.method(task.preset),))),
        (GIVEN, "06_2_net2net", [NETWORK], 0, lambda: Arm(name="", fit=net2net.Grown(**student))),
        (COUNTED, "06_2_net2net", [NETWORK], 0, lambda: Arm(name="", fit=net2net.Grown(**student, counted=True))),
        ("kernel rescaling", "06_3_kernel_rescaling", [IMAGES], 1, lambda: resized(task, dataset, True)),
        (RESIZED, "06_3_kernel_rescaling", [IMAGES], 1, lambda: resized(task, dataset, False)),
        ("layer replacement", "06_4_layer_replacement", [CONVS, NETWORK], 0, lambda: replaced(task)),
        (TREE, "07_1_tree_cnn", [NETWORK], 0, lambda: tree(task, dataset)),
        ("standardization loss", "07_2_standardization_loss", [NORMS], 1, lambda: standardized(task)),
        (STEM, "07_3_wavelet", [FRONT], 0, lambda: named(wavelet.arms(task, dataset, (wavelet.BANDS,)), wavelet.BANDS)),
        ("wavelet auto-encoder", "07_3_wavelet", [FRONT, NETWORK], 0, lambda: auto_encoder(task, dataset)),
        ("prune, then grow", "09_prune_then_grow", [CONVS, NORMS, NETWORK, LENGTH, FRONT], 5, lambda: grown(task, dataset)),
    ]  # fmt: skip
    found = []
    for name, stem, holds, order, make in offers:
        arm, why = tried(make, task.network)
        found.append(
            Contender(
                name=name,
                stem=stem,
                holds=tuple(holds),
                order=order,
                arm=arm and replace(arm, name=name),
                why=why,
            )
        )
    return tuple(found)


def named(arms, name):
    """The chapter's arm whose name begins like this."""
    return next(a for a in arms if a.name.startswith(name))


def fp32(task):
    """The control without 16-bit products: what bf16 brings, which all other arms have."""
    if resolve_precision(task.recipe.precision, task.device) == "fp32":
        raise BadInput("this machine has no native 16-bit products, so every arm is fp32")
    return Arm(name="", role="control", changes={"precision": "fp32"})


def smaller(task):
    """The control that needs no method: a block less, or narrower layers."""
    settings = gradient_pruning.fewer(task)
    if settings:
        return Arm(name="", role="control", network=settings)
    multiple = 2 if task.preset == "smoke" else 16
    fit = layer_replacement.Narrower(
        factor=layer_replacement.NARROW, multiple=multiple, evaluations=task.evaluations
    )
    return Arm(name="", role="control", fit=fit)


def structured(task):
    """Chapter 5.2's arm: filters from a dictionary, of which only the strength is learnt."""
    methods, network, lr = structure_and_strength.combinations(task)["dictionary, strength only"]
    return Arm(name="", methods=methods, network=network, changes={"lr": lr} if lr != task.recipe.lr else {})


def standardized(task):
    """At the learning rate that chapter 7.2 found for it, relative to BatchNorm's there."""
    sl, batch = standardization_loss, task.recipe.batch_size
    own = replace(task, network=sl.NETWORK)
    lr = sl.rate(own, sl.SL, batch) / sl.rate(own, sl.BN, batch) * task.recipe.lr
    return replace(sl.arm(task, sl.SL, batch), changes={"lr": lr} if lr != task.recipe.lr else {})


def resized(task, dataset, kernels):
    """Chapter 6.3's schedule of sizes, with kernels that follow the images or without."""
    arm = kernel_rescaling.tuned_arms(task, dataset)[1]
    return replace(arm, methods=tuple(replace(m, kernels=kernels) for m in arm.methods))


def replaced(task):
    """Chapter 6.4's replacement, within its budget."""
    return Arm(name="", fit=replace(layer_replacement.method(task.preset), evaluations=task.evaluations))


def tree(task, dataset):
    """Chapter 7.1's tree, its first stage on the clock."""
    return Arm(
        name="",
        fit=WholeTree(
            tree=TreeCNN(cap=tree_cnn.cap(dataset.classes), evaluations=max(2, task.evaluations // 2))
        ),
    )


def auto_encoder(task, dataset):
    """Chapter 7.3's auto-encoder, trained jointly. Raises `BadInput` for a network that is not ours."""
    if not wavelet.ours(task):
        raise BadInput(f"its trunks are networks of ours, whose widths are lists, and {task.network} is not")
    return named(wavelet.arms(task, dataset, (wavelet.JOINT,)), wavelet.JOINT)


def grown(task, dataset):
    """Chapter II.9's procedure."""
    return Arm(
        name="", methods=(prune_then_grow.procedure(task, dataset),), network=prune_then_grow.start(task)
    )


# Which go together


def clash(a, b):
    """Why two contenders cannot be combined; "" if they can."""
    for c in (a, b):
        if not c.arm:
            return f"{c.name} does not apply here: {c.why}"
        if c.arm.fit:
            return f"{c.name} is more than one training, or another network altogether"
    both = [h for h in a.holds if h in b.holds]
    return f"both change {' and '.join(both)}" if both else ""


def join(names):
    """The name of a combination."""
    return " + ".join(names) or DENSE


def combined(task, parts):
    """One arm of several contenders. Raises `BadInput` naming the two that cannot be combined, and why."""
    for a, b in itertools.combinations(parts, 2):
        why = clash(a, b)
        if why:
            raise BadInput(f"{a.name} and {b.name} cannot be combined: {why}")
    changes, network, epochs = {}, {}, 1.0
    for c in parts:
        network |= c.arm.network
        epochs *= length(task, c.arm)  # longer and shorter go together
        for k, v in c.arm.changes.items():
            if k != "epochs" and changes.setdefault(k, v) != v:
                raise BadInput(
                    f"{join([c.name for c in parts])} cannot be combined: they set {k} to {changes[k]} and {v}"
                )
    if epochs != 1:
        changes["epochs"] = epochs * task.recipe.epochs
    return Arm(
        name=join([c.name for c in parts]),
        role="method" if any(c.arm.role == "method" for c in parts) else "control",
        methods=tuple(m for c in sorted(parts, key=lambda c: c.order) for m in c.arm.methods),
        changes=changes,
        network=network,
        fit=parts[0].arm.fit if len(parts) == 1 else None,
    )


def lengthened(task, arm, factor):
    """The same arm with so many times its epochs."""
    return replace(
        arm, changes={**arm.changes, "epochs": factor * arm.changes.get("epochs", task.recipe.epochs)}
    )


def length(task, arm):
    """An arm's epochs relative to the task's."""
    return arm.changes.get("epochs", task.recipe.epochs) / task.recipe.epochs


# What is shown of it


def table(found):
    """Who takes part: its chapter, what it takes hold of, and its settings."""
    rows = {
        c.name: {
            "chapter": c.chapter or "control",
            "takes hold of": ", ".join(c.holds),
            "as it runs here": say(c.arm) if c.arm else f"does not apply: {c.why}",
        }
        for c in found
    }
    return pd.DataFrame(rows).T.rename_axis("arm")


def say(arm):
    """What an arm does otherwise than the baseline: its methods with the settings that are not their
    defaults.
    """
    words = [*map(short, arm.methods), *([short(arm.fit)] if arm.fit else [])]
    words += [
        f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in (arm.changes | arm.network).items()
    ]
    return ", ".join(words)


def short(method):
    """A dataclass as one would type it, without what is as it is by default."""
    own = {
        k: getattr(method, k)
        for k, f in type(method).__dataclass_fields__.items()
        if getattr(method, k) != f.default
    }
    return f"{type(method).__name__}({', '.join(f'{k}={v:.4g}' if isinstance(v, float) else f'{k}={v!r}' for k, v in own.items())})"


def clashes(found):
    """With which others each contender can be combined, and why not with the rest."""
    rows, able = {}, [c for c in found if c.arm and not c.arm.fit]
    for c in found:
        if c not in able:
            rows[c.name] = {"goes with": "", "not with": f"any: {clash(c, c)}"}
            continue
        why = {d.name: clash(c, d) for d in able if d is not c}
        reasons = {}
        for name, reason in why.items():
            if reason:
                reasons.setdefault(reason, []).append(name)
        rows[c.name] = {
            "goes with": ", ".join(n for n, reason in why.items() if not reason),
            "not with": "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items()),
        }
    return pd.DataFrame(rows).T.rename_axis("arm")
