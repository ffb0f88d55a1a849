"""Chapter 7.1: the tree as classes arrive, and the flat network that it is compared with."""

import math
from dataclasses import replace

from effilib.data import Dataset
from effilib.experiment import Arm
from effilib.methods.class_arrival import Flat, Growing, layers
from effilib.methods.tree_cnn import TreeCNN
from effilib.tasks import Task

FLAT, TREE, SCRATCH = "flat, all layers", "Tree-CNN", "flat, from scratch"
SIZES = {  # epochs: of every training of every stage
    "quick": dict(images=600, epochs=2, batch_size=32, lr=0.1, validation=125),
    "study": dict(epochs=4),
}
# The paper's CIFAR-10 has its first six classes in two groups made by hand.
BY_HAND = {"cifar10": ((1, 8, 9), (3, 5, 7))}


def cap(classes: int) -> int:
    """Return how many classes a child may hold.

    Half of them, at most 10 (the paper tries 5, 10 and 20 on CIFAR-100).
    """
    return min(10, math.ceil(classes / 2))


def depths(task: Task, dataset: Dataset) -> list[int]:
    """Return the depths for fine-tuning: the last layer, a quarter, a half, three quarters."""
    n = layers(task.build(dataset), dataset)
    return sorted({d for d in (1, round(n / 4), round(n / 2), round(3 * n / 4)) if 0 < d < n})


def _given(task):
    """The recipe of the first stage, whatever the length of the later ones."""
    return task.at(1.0).recipe


def _tree(task, name, cap, **settings):
    return Arm(name=name, fit=Growing(tree=TreeCNN(cap=cap), given=_given(task), **settings))


def _flat(task, name, role="control", **settings):
    return Arm(name=name, role=role, fit=Flat(given=_given(task), **settings))


def _tuned(task, depth):
    return _flat(task, f"flat, last {depth} layer{'s' * (depth > 1)}", depth=depth)


def arms(task: Task, dataset: Dataset) -> list[Arm]:
    """Return the flat network retrained whole, the tree, and the flat network's later half."""
    several = depths(task, dataset)
    return [
        _flat(task, FLAT, "baseline"),
        _tree(task, TREE, cap(dataset.classes)),
        _tuned(task, several[len(several) // 2]),
    ]


def grid(task: Task, dataset: Dataset) -> list[Arm]:
    """Return what is only shown, at the task's own lengths.

    The flat network from scratch; in the longer presets also other depths, other caps, and groups made by
    hand.
    """
    found = [_flat(task, FLAT, "baseline"), _flat(task, SCRATCH, scratch=True)]
    if task.preset in ("smoke", "quick"):
        found.append(_tree(task, f"{TREE}, C = 2", 2))
    else:
        done = {a.name for a in arms(task, dataset)}
        found += [a for d in depths(task, dataset) if (a := _tuned(task, d)).name not in done]
        found += [_tree(task, f"{TREE}, C = {c}", c) for c in (3, 2 * cap(dataset.classes))]
        if dataset.name in BY_HAND:
            found.append(_tree(task, f"{TREE}, grouped by hand", 6, groups=BY_HAND[dataset.name]))
    return [found[0], *(replace(a, lengths=task.lengths) for a in found[1:])]
