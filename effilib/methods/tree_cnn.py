"""Tree-CNN (Roy, Panda, Roy 2020, arXiv:1802.05800): a tree of small networks that grows as classes arrive.

The root decides between children; a child with one class is a leaf, one with several is a branch with a small
network of its own. Where new classes go is read from the root: it is shown images of them, and what it takes
them for decides (`likelihood`, `grow`). Then only what changed is trained again: the root, on all classes so
far, and the branches whose classes changed, on theirs.

The rules are those of the second generation of the authors' code, with its alpha = beta = 0.1. Theirs read
the likelihood of CIFAR-10 from training *and test* images; here it is read from training images of the new
classes, which the root has never seen. Old images are kept and trained on: this saves work, not memory.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from effilib import cost
from effilib.clock import Stopwatch
from effilib.data import HELD_OUT, Dataset, Split
from effilib.errors import BadInput, NoEffect, NotApplicable
from effilib.methods import Info
from effilib.training import History, Recipe, autocast, judge_, resolve_precision, train

__all__ = [
    "Growth",
    "Tree",
    "TreeCNN",
    "effort",
    "fitting",
    "grow",
    "hits",
    "likelihood",
    "rebuild_",
    "relabel",
    "transferred",
    "weights",
]

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
)
EPS = 1e-9  # 0.4 - 0.3 is not above 0.1
Make = Callable[[int], nn.Module]  # number of outputs -> network


def likelihood(
    logits: torch.Tensor, labels: torch.Tensor, full: Iterable[int] = ()
) -> tuple[torch.Tensor, list[int]]:
    """Return (L, classes): how much the root takes each new class for each child.

    L: (K, M) of K children and M new classes; each column sums to 1. logits: (N, K), the root's in eval mode
    for images of the new classes; labels: (N,) their classes. full: children that hold as many classes as
    they may; they are left out of the sum and get 0. The mean is that of the logits, before the softmax.

    >>> L, classes = likelihood(torch.tensor([[0.0, 2.0], [0.0, 2.0]]), torch.tensor([5, 5]))
    >>> classes, L[:, 0].argmax().item()  # class 5 is taken for child 1
    ([5], 1)
    """
    classes, full = labels.unique(), set(full)  # sorted
    O = torch.stack([logits[labels == c].double().mean(0) for c in classes], dim=1)  # noqa: E741  (K, M)
    O[torch.tensor(sorted(full), dtype=torch.int64, device=O.device)] = -torch.inf
    L = torch.softmax(O, dim=0) if len(full) < len(O) else torch.zeros_like(O)
    return L, classes.tolist()


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Where new classes went.

    T: class -> child, a partition onto 0 ... K - 1. origin: of each child, which one it was, None if it is
    new. log: for each new class what was done and why, as plain values: class, rule ("add", "merge", "merge
    refused", "new leaf"), child (as in T), values (the likelihoods compared), why.

    >>> Growth(T={0: 0, 1: 1, 2: 2}, origin=[0, 1, None], log=[]).origin[2] is None  # child 2 is new
    True
    """

    T: dict
    origin: list
    log: list


def grow(
    L: torch.Tensor | list[list[float]],
    T: dict[int, int],
    classes: list[int] | None = None,
    *,
    cap: int = 5,
    alpha: float = 0.1,
    beta: float = 0.1,
) -> Growth:
    """Place new classes among the children by their likelihoods.

    L: (K, M). T: class -> child 0 ... K - 1. classes: of L's columns (default: the numbers after T's). cap:
    classes that a child may hold. One class after the other, the surest first; a, b: its two likeliest
    children from the first with room on, with values v1, v2 and v3 that of the next:

    - add to a, if v1 - v2 > alpha;
    - else, if v2 - v3 > beta, two rivals that the root confuses: *merge* b into a and add to a. Not if b was
      a branch before, or a would be over the cap: then the class goes to the one of a, b with fewer classes;
    - else the class is like none of them: a *new leaf* of the root. So it is where no child has room.

    Raises `BadInput` for likelihoods that do not fit T, classes that T has, or a child that is over the cap.

    >>> growth = grow([[0.9, 0.4], [0.1, 0.3], [0.0, 0.3]], {0: 0, 1: 1, 2: 2}, classes=[3, 4])
    >>> growth.T, [entry["rule"] for entry in growth.log]  # class 3 looks like child 0, class 4 like none
    ({0: 0, 1: 1, 2: 2, 3: 0, 4: 3}, ['add', 'new leaf'])
    """
    v = torch.as_tensor(L).double()
    K, M = _check(v, T, cap, alpha, beta)
    classes = [max(T) + 1 + m for m in range(M)] if classes is None else list(classes)
    if len(classes) != M or len(set(classes)) != M or set(classes) & set(T):
        raise BadInput(f"tree: {M} columns of L need {M} new classes, got {classes} beside {sorted(T)}")
    old, T, log, left = dict(T), dict(T), [], list(range(M))
    v, n = v.sort(dim=0, descending=True, stable=True)  # (K, M): values, and the children's names
    v = F.pad(v, (0, 0, 0, 2))  # fewer than three children: the missing ones have likelihood 0

    def held(child, table):
        return sum(k == child for k in table.values())

    while left:
        m = max(left, key=lambda m: v[0, m])
        left.remove(m)
        s = next((r for r in range(K) if held(int(n[r, m]), T) < cap), None)
        if s is None:
            v1 = v2 = v3 = 0.0
        else:
            v1, v2, v3 = v[s : s + 3, m].tolist()
            a = int(n[s, m])
            b = int(n[s + 1, m]) if s + 1 < K else None
        entry = {"class": classes[m], "values": [v1, v2, v3]}
        if s is None:
            child, rule, why = max(K - 1, *T.values()) + 1, "new leaf", f"every child holds {cap} classes"
        elif v1 - v2 > alpha + EPS:
            child, rule, why = a, "add", f"{v1:.2f} - {v2:.2f} > {alpha:g}"
        elif a == b:
            child, rule, why = a, "add", "both rivals were merged before"
        elif v2 - v3 > beta + EPS:
            rivals, after = (
                f"{v1:.2f} and {v2:.2f} are close, the next is {v3:.2f}",
                held(a, T) + held(b, T) + 1,
            )
            if held(b, old) > 1 or after > cap:
                child, rule = min(a, b, key=lambda k: held(k, T)), "merge refused"
                why = rivals + (
                    "; the rival was a branch before"
                    if held(b, old) > 1
                    else f"; together {after} classes, over {cap}"
                )
            else:
                child, rule, why = a, "merge", rivals
                entry["merged"] = [c for c, k in T.items() if k == b]
                T = {c: a if k == b else k for c, k in T.items()}
                n[n == b] = a  # later columns mean the merged child
        else:
            child, rule, why = (
                max(K - 1, *T.values()) + 1,
                "new leaf",
                f"{v1:.2f}, {v2:.2f}, {v3:.2f}: like none",
            )
        T[classes[m]] = child
        log.append(entry | {"rule": rule, "why": why})
    kept = sorted(set(T.values()))  # a merged child leaves a gap
    T = {c: kept.index(k) for c, k in T.items()}
    return Growth(
        T=T, origin=[k if k < K else None for k in kept], log=[e | {"child": T[e["class"]]} for e in log]
    )


def _check(L, T, cap, alpha, beta):
    children = sorted(set(T.values()))
    if L.dim() != 2 or children != list(range(len(L))) or not torch.isfinite(L).all():
        raise BadInput(
            f"tree: L has the shape {tuple(L.shape)}, but T's children are {children}: "
            "one row per child 0, 1, ..., finite"
        )
    largest = max(sum(k == child for k in T.values()) for child in children)
    if largest > cap:
        raise BadInput(f"tree: a child holds {largest} classes, but the cap is {cap}")
    if min(alpha, beta) < 0:
        raise BadInput(f"tree: alpha is {alpha} and beta {beta}, they must be 0 or more")
    return L.shape


class Tree(nn.Module):
    """A root that decides between children, and small networks behind it.

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
    """Return a new network with the weights of `old` in all layers but the last.

    Raises `NotApplicable` if the two do not agree in these layers.

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


def weights(model: nn.Module) -> int:
    """Return the number of trained weights as the paper counts them.

    Those of convolutions and linear layers with their biases, without normalisation's.

    >>> weights(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))  # 18 and 2 biases
    20
    """
    kinds = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    norms = {id(p) for m in model.modules() if isinstance(m, kinds) for p in m.parameters(recurse=False)}
    return sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in norms)


def effort(trained: list[tuple[float, int]], full: list[tuple[float, int]]) -> float:
    """Return the training effort relative to another training: sums of weights x samples.

    trained, full: (weights, samples) of each network that is trained.

    >>> effort(trained=[(1000, 50), (200, 10)], full=[(1000, 104)])
    0.5
    """
    return sum(w * n for w, n in trained) / sum(w * n for w, n in full)


def relabel(dataset: Dataset, labels: dict[int, int]) -> Dataset:
    """Return the images of some classes with new labels, in all four splits.

    labels: class -> new label 0, 1, ...

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
    """Return the recipe, its batch no larger than the data: a branch can have few images.

    >>> fitting(Recipe(batch_size=1000), load("synthetic")).batch_size
    360
    """
    return replace(recipe, batch_size=min(recipe.batch_size, len(dataset.train)))


@torch.no_grad()
def hits(tree: Tree, dataset: Dataset, split: str, precision: str = "fp32") -> list[list[int]]:
    """Return [correct, all] by class of the tree on a split, as `training.class_hits` does.

    Images of classes that have not come yet are told wrong. The tree is left in eval mode.

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
    """How a tree grows. Not a `Method`: a stage is several trainings.

    `start` is the first stage, `learn_` a later one; `class_arrival.Growing` calls them. Accuracies are those
    of the whole tree on all images, also of classes that have not come yet; a row's loss is that of the part
    that was trained.

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
        """Place new classes in the tree and train what changed, in place, all on one clock."""
        precision, before = resolve_precision(recipe.precision, dataset.device), tree.groups
        watch = Stopwatch(dataset.device)
        watch.start()
        L, classes = self.likelihood(tree, dataset, new, precision)
        growth = grow(L.cpu(), tree.T, classes, cap=self.cap, alpha=self.alpha, beta=self.beta)
        how = rebuild_(tree, growth, make_root, make_branch)
        watch.lap("grow")
        watch.end_epoch()
        kinds = {kind: {"count": n, "seconds": seconds} for kind, (n, seconds) in watch.kinds.items()}
        event = {"step": 0, "epoch": 0, "method": "TreeCNN", "text": f"{len(new)} classes placed"}
        event |= {"L": L.tolist(), "new": classes, "log": growth.log, "before": before, "groups": tree.groups}
        event |= {"root": how["root"], "how": [how[k] for k in range(len(tree.groups))]}
        placed = History(seconds=watch.seconds, raw_seconds=watch.raw, kinds=kinds, events=[event])
        return placed + self._fit(tree, dataset, how, recipe, seed)

    def _fit(self, tree, dataset, how, recipe, seed):
        """Train the parts that `how` does not leave alone."""
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
                correct, images = hits(tree, dataset, "validation", precision)
                seen.append(100 * sum(correct) / sum(images))
                net.train()

            h = train(net, own, fitting(recipe, own), (), seed, progress=look)
            rows = [{**row, "accuracy": a} for row, a in zip(h.rows, seen, strict=True)]
            event = {"step": h.steps, "epoch": recipe.epochs, "method": "TreeCNN", "text": f"{part} trained"}
            event |= {"part": str(part), "classes": list(labels), "how": state, "seconds": h.seconds}
            event |= {"weights": weights(net), "samples": len(own.train)}
            history += replace(h, rows=rows, events=[*h.events, event])
        history.memory["parameters"] = cost.size_bytes(tree.parameters())  # all of it, whatever is trained
        history.structure = {"groups": tree.groups}
        judge_(history, [hits(tree, dataset, split, precision) for split in HELD_OUT])
        return history
