"""Trainings in which classes arrive in stages: one network that is trained again, or a tree that grows.

Tree-CNN is `effilib.methods.tree_cnn`; here are the stages, the networks, and the flat network that the tree
is compared with: retrained whole, or fine-tuned from some layer on. What is trained at once starts from what
the stage before has left.
"""

import copy
import statistics as stats
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from effilib import cost, models
from effilib.clock import interleaved
from effilib.dataset import HELD_OUT, Dataset
from effilib.errors import NotApplicable
from effilib.history import History
from effilib.methods.fine_tuning import FineTune, weights
from effilib.methods.tree_cnn import Tree, TreeCNN, fitting, relabel, transferred
from effilib.recipe import Recipe, autocast, resolve_precision
from effilib.seeds import stream
from effilib.tasks import Task
from effilib.training import train

__all__ = ["Flat", "Growing", "makers", "stages"]

# The paper's CIFAR-10: car, ship, truck and cat, dog, horse first; then plane, bird, deer, frog.
ORDER = {"cifar10": (1, 8, 9, 3, 5, 7, 0, 2, 4, 6)}

# Root and branch beside a flat network of ours; a user's own network is root and branch itself.
SMALLER = {
    "vgg": (("vgg", {"widths": ((32,), (64,), (128,))}), ("convnet", {"widths": (16, 32, 64)})),
    "convnet": (("convnet", {"widths": (16, 32, 64)}), ("convnet", {"widths": (16, 16, 32)})),
}


def stages(dataset: Dataset) -> list[tuple[int, ...]]:
    """Return the classes of each stage.

    6 + 4 of ten as in the paper's CIFAR-10, up to 20 likewise 60 % first; more in ten equal stages, as its
    CIFAR-100. Raises `NotApplicable` for fewer than 3 classes, or a class with fewer than 2 training images.

    >>> stages(load("synthetic"))
    [(0, 1), (2, 3)]
    """
    n = dataset.classes
    if n < 3:
        raise NotApplicable(
            f"{dataset.name} has {n} classes: Tree-CNN needs 3 or more, two for its first stage and one that "
            "comes later"
        )
    counts = torch.bincount(dataset.train.y, minlength=n).tolist()
    least = counts.index(min(counts))
    if counts[least] < 2:
        raise NotApplicable(
            f"{dataset.name}: class {dataset.names[least]!r} has {counts[least]} training images, "
            "at least 2 are needed"
        )
    order = ORDER.get(dataset.name, tuple(range(n)))
    sizes = [round(0.6 * n), n - round(0.6 * n)] if n <= 20 else [n // 10 + (i < n % 10) for i in range(10)]
    if not torch.isin(dataset.validation.y.cpu(), torch.tensor(order[: sizes[0]])).any():
        raise NotApplicable(
            f"{dataset.name}: no validation image of the first stage's classes, there are too few images"
        )
    return [order[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]


def makers(task: Task, dataset: Dataset, seed: int = 0) -> tuple[Callable[[int], nn.Module], ...]:
    """Return makers of the flat network, a root and a branch.

    Functions from a number of outputs to a network. Each has the initial weights of `seed`. Beside a residual
    network of ours the root has a block less in every stage that has several, and a branch is one convolution
    a stage.

    >>> t = task("smoke", "synthetic")
    >>> [make(3).head.out_features for make in makers(t, t.load())]
    [3, 3, 3]
    """

    def maker(name, settings):
        init = stream(seed, "initial weights").initial_seed()
        return lambda outputs: models.build(
            name, outputs, dataset.shape, seed=init, device=task.device, **settings
        ).to(dataset.dtype)

    root, branch = _networks(task)
    return maker(task.network, task.widths), maker(*root), maker(*branch)


def _load(task):
    """The task's data, in double precision where the networks are, trained yet or not."""
    dataset = task.load()
    return replace(dataset, dtype=torch.float64) if task.recipe.precision == "fp64" else dataset


def _networks(task):
    """((name, settings) of the root, of a branch)."""
    if task.network == "resnet":
        w, blocks = task.widths["widths"], task.widths["blocks"]
        fewer = tuple(max(1, b - 1) for b in blocks)
        return ("resnet", {"widths": w, "blocks": fewer}), ("convnet", {"widths": w})
    return SMALLER.get(task.network, ((task.network, {}), (task.network, {})))


_first = {}  # kind -> (key, what the first stage left): the arms of a cell share it


def _once(kind, key, make):
    if _first.get(kind, (None,))[0] != key:
        _first[kind] = key, make()
    return copy.deepcopy(_first[kind][1])


@dataclass(frozen=True, kw_only=True)
class Flat:
    """Train one network again whenever classes arrive: (task, seed) -> `History`.

    On all old and new images, in every stage with a new last layer, the others from the stage before. The
    first stage is trained once for all such arms of a cell.

    >>> t = task("smoke", "synthetic")
    >>> history = Flat(given=t.recipe)(t, seed=0)
    >>> history.events[0]["text"], history.held_out == len(t.load().validation) + len(t.load().test)
    ('first stage: ... %', True)
    """

    depth: int = 0  # layers that are trained in later stages, counted from the end; 0: all
    scratch: bool = False  # begin each stage anew
    given: Recipe | None = None  # of the first stage, which is then off the clock

    def __call__(self, task: Task, seed: int) -> History:
        """Train it through all stages."""
        dataset, recipe = _load(task), self.given or task.recipe
        first, *later = stages(dataset)
        make, *_ = makers(task, dataset, seed)
        net, begun = _once(
            "flat",
            repr((replace(task, recipe=recipe), seed)),
            lambda: self._train(make(len(first)), dataset, first, recipe, seed),
        )
        seen, history = list(first), History() if self.given else begun
        for new in later:
            seen += new
            net = make(len(seen)) if self.scratch else transferred(make, len(seen), net)
            history += self._train(net, dataset, seen, task.recipe, seed, self.depth)[1]
        return _ended(history, begun, net, relabel(dataset, {c: i for i, c in enumerate(seen)}), task)

    @staticmethod
    def _train(net, dataset, seen, recipe, seed, depth=0):
        """(network, `History`) of a stage: trained on the images of all classes seen so far."""
        own = relabel(dataset, {c: i for i, c in enumerate(seen)})
        history = train(net, own, fitting(recipe, own), [FineTune(depth=depth)] if depth else [], seed)
        event = {"step": history.steps, "epoch": recipe.epochs, "method": "Flat"}
        event["text"] = f"flat network trained on {len(seen)} classes"
        event |= {} if depth else {"weights": weights(net), "samples": len(own.train)}
        return net, of_all(replace(history, events=[*history.events, event]), dataset, seen)


@dataclass(frozen=True, kw_only=True)
class Growing:
    """Grow a tree as classes arrive: (task, seed) -> `History`.

    groups: of the first stage's classes, made by hand; else each is a leaf, as in the paper's CIFAR-100:
    nobody groups them. Arms of a cell with the same groups share their first stage.

    >>> t = task("smoke", "synthetic")
    >>> history = Growing(tree=TreeCNN(cap=2))(t, seed=0)  # its first stage on the clock, too
    >>> [round(c["share"], 1) for c in history.events[-1]["children"]][0] > 0
    True
    """

    tree: TreeCNN = field(default_factory=TreeCNN)
    groups: tuple = ()
    given: Recipe | None = None  # of the first stage, which is then off the clock

    def __call__(self, task: Task, seed: int) -> History:
        """Train it through all stages."""
        dataset = _load(task)
        tree, begun, history = self.grown(task, dataset, seed)
        precision = resolve_precision(task.recipe.precision, dataset.device)
        return _ended(history, begun, tree, dataset, task, _accounts(tree, dataset, precision))

    def grown(self, task: Task, dataset: Dataset, seed: int) -> tuple[Tree, History, History]:
        """Return the tree, its first stage's history and the whole one's."""
        first, *later = stages(dataset)
        groups, recipe = self.groups or tuple((c,) for c in first), self.given or task.recipe
        flat, *two = makers(task, dataset, seed)
        two = [flat, flat] if self.tree.depth else two  # parts over a trunk are the flat network
        tree, begun = _once(
            f"tree, {bool(self.tree.depth)}",
            repr((replace(task, recipe=recipe), seed, groups)),
            lambda: self.tree.start(dataset, groups, *two, recipe, seed),
        )
        history = History() if self.given else begun
        for new in later:
            history += self.tree.learn_(tree, dataset, new, *two, task.recipe, seed)
        return tree, begun, history


def of_all(history: History, dataset: Dataset, seen: list[int]) -> History:
    """Return the history with accuracies of all images, where it has those of some classes.

    seen: these classes. Images of the others count as misclassified.
    """

    def share(*splits):
        y = torch.cat([getattr(dataset, s).y for s in splits])
        return float(torch.isin(y, torch.tensor(seen, device=y.device)).double().mean())

    rows = [{**row, "accuracy": share("validation") * row["accuracy"]} for row in history.rows]
    return replace(history, rows=rows, final=share(*HELD_OUT) * history.final)


def _ended(history, begun, model, dataset, task, values=None):
    """The history with what else is to be known of it: its first stage, and what a forward pass costs."""
    first = {"step": 0, "epoch": 0, "method": "first stage", "text": f"first stage: {begun.accuracy:.2f} %"}
    first["seconds"] = begun.seconds
    last = {"step": history.steps, "epoch": task.recipe.epochs, "method": "forward", "text": "forward pass"}
    last |= {**(values or {}), **_forward_cost(model, dataset, task)}
    return replace(history, events=[first, *history.events, last])


def _forward_cost(model, dataset, task):
    """FLOPs and measured microseconds of a forward pass, per validation image, in a batch of them."""
    x, _ = next(dataset.batches(dataset.validation))
    model.eval()
    repeats = 3 if task.preset == "smoke" else 7
    with torch.no_grad(), autocast(resolve_precision(task.recipe.precision, dataset.device), dataset.device):
        flops = cost.count_flops(lambda: model(x)) / len(x)
        times = interleaved({"forward": lambda: model(x)}, repeats=repeats, warm_up=1, device=dataset.device)[
            "forward"
        ]
    return {"flops": flops, "us": 1e6 * stats.median(times) / len(x), "images": len(x)}


@torch.no_grad()
def _accounts(tree, dataset, precision="fp32"):
    """Split a tree's accuracy on the validation images by child.

    {"right": share that the root sends right, "children": [{"share", "root", "branch"}]}: the share of all
    images, of these that the root sends right, and of these that are classified correctly. The accuracy is
    the sum of share x root x branch.
    """
    tree.eval()
    table = torch.tensor([tree.T.get(c, -1) for c in range(dataset.classes)], device=dataset.device)
    child, sent, told = [], [], []
    with autocast(precision, dataset.device):
        for x, y in dataset.batches(dataset.validation):
            child.append(table[y])
            sent.append(tree.decide(x) == table[y])
            told.append(tree(x) == y)
    child, sent, told = (torch.cat(t) for t in (child, sent, told))
    children = []
    for k in range(len(tree.groups)):
        mine, right = child == k, (child == k) & sent
        rates = mine.sum() / len(child), right.sum() / mine.sum().clamp(min=1)
        rates = *rates, (told & right).sum() / right.sum().clamp(min=1)
        children.append(dict(zip(("share", "root", "branch"), map(float, rates), strict=True)))
    return {"right": float(sent.float().mean()), "children": children}
