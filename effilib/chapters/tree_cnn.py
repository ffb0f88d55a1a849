"""Chapter 7.1: the tree as classes arrive, and the flat network that it is compared with."""

import math
from dataclasses import replace

from effilib.dataset import Dataset
from effilib.experiment import Arm, Contender
from effilib.methods.class_arrival import Flat, Growing
from effilib.methods.fine_tuning import layers
from effilib.methods.tree_cnn import TreeCNN
from effilib.tasks import Task

FLAT, FEWER, SCRATCH = "flat, all layers", "flat, fewer epochs", "flat, from scratch"
TREE, TRUNK = "Tree-CNN", "tree over copies of a frozen trunk"
SIZES = {  # epochs: of every training of every stage
    "quick": dict(images=600, epochs=2, batch_size=32, lr=0.1, validation=125),
    "study": dict(epochs=3),
}
SHORT = 0.3  # of the baseline's lengths: where its warm start is as accurate as what saves time
# The paper's CIFAR-10 has its first six classes in two groups made by hand.
BY_HAND = {"cifar10": ((1, 8, 9), (3, 5, 7))}


def cap(classes: int) -> int:
    """Return how many classes a child may hold.

    Half of them, at most 10 (the paper tries 5, 10 and 20 on CIFAR-100).
    """
    return min(10, math.ceil(classes / 2))


def _contender(task):  # its first stage on the clock; images of classes not seen yet count as misclassified
    return Arm(name="", fit=Growing(tree=TreeCNN(cap=cap(task.load().classes))))


CONTENDERS = (Contender(TREE, "7.1", ("the network",), _contender),)


def depths(task: Task, dataset: Dataset) -> list[int]:
    """Return the depths for fine-tuning: the last layer, a quarter, a half, three quarters."""
    n = layers(task.build(dataset), dataset)
    return sorted({d for d in (1, round(n / 4), round(n / 2), round(3 * n / 4)) if 0 < d < n})


def trained(task: Task, dataset: Dataset) -> int:
    """Return how many layers, from the end, the tree over a trunk trains: about a quarter."""
    return depths(task, dataset)[:2][-1]


def _given(task):
    """The recipe of the first stage, whatever the length of the later ones."""
    return task.at(1.0).recipe


def _tree(task, name, cap, depth=0, **settings):
    return Arm(name=name, fit=Growing(tree=TreeCNN(cap=cap, depth=depth), given=_given(task), **settings))


def _flat(task, name, role="control", **settings):
    return Arm(name=name, role=role, fit=Flat(given=_given(task), **settings))


def _tuned(task, depth):
    return _flat(task, f"flat, last {depth} layer{'s' * (depth > 1)}", depth=depth)


def arms(task: Task, dataset: Dataset) -> list[Arm]:
    """Return the flat network retrained whole, both trees, and the controls that could beat them.

    All begin from the weights of the first stage. Controls: the flat network for fewer epochs, and (not in
    quick) its last layers alone, as many as the tree over a trunk trains.
    """
    c, depth = cap(dataset.classes), trained(task, dataset)
    fewer = tuple(SHORT * length for length in task.lengths)
    found = [
        _flat(task, FLAT, "baseline"),
        replace(_flat(task, FEWER), lengths=fewer),
        _tree(task, TREE, c),
        _tree(task, TRUNK, c, depth),
        _tuned(task, depth),
    ]
    return found[:4] if task.preset == "quick" else found


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
