"""Tree-CNN (Roy, Panda, Roy 2020, arXiv:1802.05800): a tree of small networks that grows as classes arrive.

The root decides between children; a child with one class is a leaf, one with several is a branch with a small
network of its own. Where new classes go is read from the root (`tree_growth`). Then only what changed is
trained again: the root, on all classes so far, and the branches whose classes changed, on theirs. Over a
*frozen trunk* (ours) the first layers of root and branches are copies of what the first stage left, and only
the last ones are trained.

The authors' code reads the likelihood of CIFAR-10 from training *and test* images; here it is read from
training images of the new classes, which the root has never seen. Old images are kept and trained on: this
saves work, not memory.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from effilib import cost
from effilib.clock import Stopwatch
from effilib.dataset import HELD_OUT, Dataset, Split
from effilib.errors import BadInput, NoEffect, NotApplicable
from effilib.history import History, judge_
from effilib.methods import Info
from effilib.methods.fine_tuning import FineTune, weights
from effilib.methods.tree_growth import Growth, grow, likelihood
from effilib.recipe import Recipe, autocast, resolve_precision
from effilib.training import train

__all__ = ["Tree", "TreeCNN", "effort", "fitting", "hits", "rebuild_", "relabel", "transferred"]

INFO = Info(
    name="Tree-CNN",
    name_de="Tree-CNN",
    chapter="7.1",
    paper="Roy et al. 2018, arXiv:1802.05800",
    claim="Where classes arrive in stages, a tree of small networks that retrains only what changed needs "
    "40 % less training effort (weights x samples) on CIFAR-10 than retraining one large network, at "
    "somewhat less accuracy.",
    cost_model="The root on all images so far, small branches on their own classes' images, nothing for the "
    "rest; at inference the root and one branch.",
    applies="classes that arrive in stages",
)
Make = Callable[[int], nn.Module]  # number of outputs -> network


class Tree(nn.Module):
    """Decide between children by a root, with small networks behind it.

    root: images -> (N, K) logits of the children. groups: per child its classes. branches: per child its
    network, None for a leaf; its logits are in the order of its group. Depth 2, as in the paper.

    >>> tree = Tree(nn.Linear(2, 2), groups=[[0], [1, 2]], branches=[None, nn.Linear(2, 2)])
    >>> tree.T, tree(torch.rand(5, 2)).shape
    ({0: 0, 1: 1, 2: 1}, torch.Size([5]))
    """

    def __init__(
        self, root: nn.Module, groups: Iterable[Iterable[int]], branches: Iterable[nn.Module | None]
    ):
        super().__init__()
        self.root, self.groups, self.branches = root, [list(g) for g in groups], nn.ModuleList(branches)

    @property
    def T(self):
        """class -> child."""
        return {c: k for k, group in enumerate(self.groups) for c in group}

    def decide(self, x: torch.Tensor) -> torch.Tensor:
        """Return the root's decision, (N,) children; with a single child there is none to take."""
        return (
            self.root(x).argmax(1)
            if len(self.groups) > 1
            else torch.zeros(len(x), dtype=torch.int64, device=x.device)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the class of each image of x (N, C, H, W): (N,) int64.

        The batch is sorted by decision; each branch sees its own part once.
        """
        decision = self.decide(x)
        order = decision.argsort(stable=True)
        counts = torch.bincount(decision, minlength=len(self.groups)).tolist()  # the only wait for the device
        classes = torch.empty_like(decision)
        for group, branch, part in zip(self.groups, self.branches, order.split(counts), strict=True):
            if len(part):
                labels = torch.tensor(group, device=x.device)
                classes[part] = labels if branch is None else labels[branch(x[part]).argmax(1)]
        return classes


def rebuild_(tree: Tree, growth: Growth, make_root: Make, make_branch: Make) -> dict[int | str, str]:
    """Give the tree the children of `growth`, with transferred weights.

    What changed is not trained yet. Returns {child or "root": how}: "kept" (all weights), "new last layer"
    (all others transferred), "fresh", "untouched" (the same module, not to be trained) or "leaf". A root
    whose children are not the same as before gets a new last layer, even if as many went as came.

    >>> def make(outputs):
    ...     return nn.Sequential(nn.Linear(2, 4), nn.Linear(4, outputs))
    >>> tree = Tree(make(2), groups=[[0], [1]], branches=[None, None])
    >>> rebuild_(tree, grow(torch.tensor([[0.9], [0.1]]), tree.T, [2]), make, make), tree.groups
    ({'root': 'kept', 0: 'fresh', 1: 'leaf'}, [[0, 2], [1]])
    """
    groups = [[c for c, k in growth.T.items() if k == child] for child in range(len(growth.origin))]
    if groups == tree.groups:
        raise NoEffect("tree: no class is new, there is nothing to train")
    how, branches = {}, []
    if growth.origin == list(range(len(tree.groups))):
        how["root"] = "kept"
    else:
        tree.root, how["root"] = transferred(make_root, len(groups), tree.root), "new last layer"
    for child, (group, before) in enumerate(zip(groups, growth.origin, strict=True)):
        was = None if before is None else tree.branches[before]
        if len(group) == 1:
            net, how[child] = None, "leaf"
        elif was is None:
            net, how[child] = make_branch(len(group)), "fresh"
        elif group == tree.groups[before]:
            net, how[child] = was, "untouched"
        else:
            net, how[child] = transferred(make_branch, len(group), was), "new last layer"
        branches.append(net)
    tree.groups, tree.branches = groups, nn.ModuleList(branches)
    return how


def head(make: Make) -> list[str]:
    """Return the tensors whose shape depends on the number of outputs: the last layer's."""
    two, three = (make(outputs).state_dict() for outputs in (2, 3))
    return [name for name in two if name not in three or two[name].shape != three[name].shape]


def transferred(make: Make, outputs: int, old: nn.Module) -> nn.Module:
    """Return a new network with the weights of an old one.

    In all layers but the last. Raises `NotApplicable` if the two do not agree in these layers.

    >>> def make(outputs):
    ...     return nn.Sequential(nn.Linear(2, 4), nn.Linear(4, outputs))
    >>> old = make(2)
    >>> new = transferred(make, 3, old)
    >>> torch.equal(new[0].weight, old[0].weight), new[1].out_features
    (True, 3)
    """
    net, last = make(outputs), set(head(make))
    state = {name: t for name, t in old.state_dict().items() if name not in last}
    missing = [
        k
        for k, t in net.state_dict().items()
        if k not in last and (k not in state or state[k].shape != t.shape)
    ]
    if missing or not last or not state:
        every = f"{'no' if not last else 'every'} layer depends on the number of outputs"
        why = f"{missing[0]} differs from one network to the next" if missing else every
        raise NotApplicable(f"tree: the weights of {type(old).__name__} cannot be transferred: {why}")
    net.load_state_dict(state, strict=False)
    return net


def effort(trained: list[tuple[float, int]], full: list[tuple[float, int]]) -> float:
    """Return the training effort relative to another training.

    Both are sums of weights x samples. trained, full: (weights, samples) of each network that is trained.

    >>> effort(trained=[(1000, 50), (200, 10)], full=[(1000, 104)])
    0.5
    """
    return sum(w * n for w, n in trained) / sum(w * n for w, n in full)


def relabel(dataset: Dataset, labels: dict[int, int]) -> Dataset:
    """Return the images of some classes with new labels.

    In all four splits. labels: class -> new label 0, 1, ...

    >>> part = relabel(load("synthetic"), {2: 0, 3: 1})
    >>> part.names, part.train.y.unique().tolist()
    (('2', '3'), [0, 1])
    """
    table = torch.full((dataset.classes,), -1, device=dataset.device)
    for c, label in labels.items():
        table[c] = label

    def part(split):
        keep = table[split.y] >= 0
        return Split(x=split.x[keep], y=table[split.y[keep]])

    names = [
        "+".join(dataset.names[c] for c in labels if labels[c] == label)
        for label in range(max(labels.values()) + 1)
    ]
    splits = {k: part(getattr(dataset, k)) for k in ("train", "decide", "validation", "test")}
    return replace(dataset, names=tuple(names), **splits)


def fitting(recipe: Recipe, dataset: Dataset) -> Recipe:
    """Return the recipe, its batch no larger than the data.

    A branch can have few images.

    >>> fitting(Recipe(batch_size=1000), load("synthetic")).batch_size
    360
    """
    return replace(recipe, batch_size=min(recipe.batch_size, len(dataset.train)))


@torch.no_grad()
def hits(tree: Tree, dataset: Dataset, split: str, precision: str = "fp32") -> list[list[int]]:
    """Return [correct, all] by class of the tree on a split.

    As `evaluation.class_hits` does. Images of classes that have not come yet count as misclassified. The tree
    is left in eval mode.

    >>> data = load("synthetic")
    >>> tree = Tree(build("convnet", 3, data.shape, widths=(4,)), [[0], [1], [2]], [None] * 3)
    >>> hits(tree, data, "validation")[0][3]  # of class 3, which it does not know
    0
    """
    tree.eval()
    counts = torch.zeros(2, dataset.classes, dtype=torch.long, device=dataset.device)
    with autocast(precision, dataset.device):
        for x, y in dataset.batches(getattr(dataset, split)):
            for row, labels in zip(counts, (y[tree(x) == y], y), strict=True):
                row += torch.bincount(labels, minlength=dataset.classes)
    return counts.tolist()


@dataclass(frozen=True, kw_only=True)
class TreeCNN:
    """Grow a tree as classes arrive.

    Not a `Method`: a stage is several trainings. `start` is the first stage, `learn_` a later one;
    `class_arrival.Growing` calls them. Accuracies are those of the whole tree on all images, also of classes
    that have not come yet; a row's loss is that of the part that was trained.

    >>> data, recipe, method = load("synthetic"), Recipe(epochs=1), TreeCNN(cap=2)
    >>> def make(outputs):
    ...     return build("convnet", outputs, data.shape, widths=(4,))
    >>> tree, history = method.start(data, [[0], [1]], make, make, recipe)
    >>> history += method.learn_(tree, data, [2, 3], make, make, recipe)
    >>> sorted(tree.T), "grow" in history.kinds
    ([0, 1, 2, 3], True)
    """

    cap: int = 5  # classes that a child may hold
    alpha: float = 0.1  # see `grow`
    beta: float = 0.1
    images: int = 50  # of each new class, for the likelihood
    depth: int = 0  # layers trained in later stages, from the end; the others are a frozen trunk. 0: all

    def likelihood(
        self, tree: Tree, dataset: Dataset, new: list[int], precision: str = "fp32"
    ) -> tuple[torch.Tensor, list[int]]:
        """Return `likelihood` of new classes from their first training images.

        The root has never been trained on them.
        """
        y = dataset.train.y
        few = torch.cat([(y == c).nonzero()[: self.images, 0] for c in new])
        missing = set(new) - set(y[few].tolist())
        if missing:
            raise BadInput(f"{dataset.name}: no training image of class {min(missing)}")
        full = [k for k, group in enumerate(tree.groups) if len(group) >= self.cap]
        tree.eval()
        with torch.no_grad(), autocast(precision, dataset.device):
            logits = torch.cat([tree.root(x) for x, _ in dataset.batches(dataset.train[few])])
        return likelihood(logits, y[few], full)

    def start(
        self,
        dataset: Dataset,
        groups: Iterable[Iterable[int]],
        make_root: Make,
        make_branch: Make,
        recipe: Recipe,
        seed: int = 0,
    ) -> tuple[Tree, History]:
        """Train a first stage, its classes grouped as told: one group a child."""
        groups = [list(g) for g in groups]
        if self.depth and max(map(len, groups)) > 1:
            raise BadInput("tree: over a frozen trunk the first stage has leaves only, for the root makes it")
        branches = [make_branch(len(g)) if len(g) > 1 else None for g in groups]
        tree = Tree(make_root(len(groups)), groups, branches)
        how = {"root": "fresh", **{k: "leaf" if len(g) == 1 else "fresh" for k, g in enumerate(groups)}}
        return tree, self._fit(tree, dataset, how, recipe, seed)

    def learn_(
        self,
        tree: Tree,
        dataset: Dataset,
        new: list[int],
        make_root: Make,
        make_branch: Make,
        recipe: Recipe,
        seed: int = 0,
    ) -> History:
        """Place new classes in the tree and train what changed, in place.

        All on one clock.
        """
        precision, before = resolve_precision(recipe.precision, dataset.device), tree.groups
        watch = Stopwatch(dataset.device)
        watch.start()
        L, classes = self.likelihood(tree, dataset, new, precision)
        growth = grow(L.cpu(), tree.T, classes, cap=self.cap, alpha=self.alpha, beta=self.beta)
        if self.depth:  # a new branch begins as the root does, on the same trunk
            trunk = tree.root
            make_branch = lambda outputs: transferred(make_root, outputs, trunk)  # noqa: E731
        how = rebuild_(tree, growth, make_root, make_branch)
        watch.lap("grow")
        watch.end_epoch()
        kinds = {kind: {"count": n, "seconds": seconds} for kind, (n, seconds) in watch.kinds.items()}
        event = {"step": 0, "epoch": 0, "method": "TreeCNN", "text": f"{len(new)} classes placed"}
        event |= {"L": L.tolist(), "new": classes, "log": growth.log, "before": before, "groups": tree.groups}
        event |= {"root": how["root"], "how": [how[k] for k in range(len(tree.groups))]}
        placed = History(seconds=watch.seconds, raw_seconds=watch.raw, kinds=kinds, events=[event])
        return placed + self._fit(tree, dataset, how, recipe, seed, self.depth)

    def _fit(self, tree, dataset, how, recipe, seed, depth=0):
        """Train what `how` does not leave alone; depth: of these only the last layers."""
        precision, history = resolve_precision(recipe.precision, dataset.device), History()
        for part, state in how.items():
            if state in ("leaf", "untouched") or (part == "root" and len(tree.groups) == 1):
                continue
            labels = tree.T if part == "root" else {c: i for i, c in enumerate(tree.groups[part])}
            net = tree.root if part == "root" else tree.branches[part]
            own = relabel(dataset, labels)
            few = {s: getattr(own, s) if len(getattr(own, s)) else own.train[:1] for s in HELD_OUT}
            own, seen = replace(own, **few), []

            def look(row, net=net, seen=seen):
                modes = {m: m.training for m in net.modules()}  # a frozen layer stays in eval mode
                correct, images = hits(tree, dataset, "validation", precision)
                seen.append(100 * sum(correct) / sum(images))
                for m, mode in modes.items():
                    m.training = mode

            tuned = [FineTune(depth=depth)] if depth else []
            h = train(net, own, fitting(recipe, own), tuned, seed, progress=look)
            rows = [{**row, "accuracy": a} for row, a in zip(h.rows, seen, strict=True)]
            event = {"step": h.steps, "epoch": recipe.epochs, "method": "TreeCNN", "text": f"{part} trained"}
            event |= {"part": str(part), "classes": list(labels), "how": state, "seconds": h.seconds}
            trained = [e["weights"] for e in h.events if "weights" in e] or [weights(net)]
            event |= {"weights": trained[0], "samples": len(own.train)}
            others = [{k: v for k, v in e.items() if k not in ("weights", "samples")} for e in h.events]
            history += replace(h, rows=rows, events=[*others, event])
        history.memory["parameters"] = cost.size_bytes(tree.parameters())  # all of it, whatever is trained
        history.structure = {"groups": tree.groups}
        judge_(history, [hits(tree, dataset, split, precision) for split in HELD_OUT])
        return history
