"""Chapter 7.1: classes in stages, the tree against the flat network retrained whole or at several depths, and
what it costs.
"""

import copy
import functools
import itertools
import math
import statistics as stats
import textwrap
from dataclasses import dataclass, field, replace

import pandas as pd
import torch
from matplotlib.patches import Patch
from torch import nn

from effilib import cost, figures, models
from effilib.clock import interleaved
from effilib.convolution import probe
from effilib.errors import BadInput, NoEffect
from effilib.experiment import Arm
from effilib.methods.tree_cnn import (
    Tree,
    TreeCNN,
    accuracy,
    effort,
    fitting,
    grow,
    likelihood,
    relabel,
    transferred,
    weights,
)
from effilib.models import stream
from effilib.training import History, Method, autocast, resolve_precision, train

SIZES = {
    "smoke": {},
    "quick": dict(images=2500, epochs=2),
    "study": dict(epochs=7),
    "full": {},
}  # epochs: of every training of every stage
EVALUATIONS = 8  # in the judged stages
TREE, FLAT, SCRATCH = "Tree-CNN", "flat, all layers", "flat, from scratch"
AIM = round(1 / 0.6, 2)  # what the paper's effort of 0.60 would be in time

# The paper's CIFAR-10: car, ship, truck and cat, dog, horse first, in two groups made by hand; then plane,
# bird, deer, frog.
ORDER = {"cifar10": (1, 8, 9, 3, 5, 7, 0, 2, 4, 6)}
BY_HAND = {"cifar10": ((1, 8, 9), (3, 5, 7))}

# Root and branch beside a flat network of ours; a user's own network is root and branch itself.
SMALLER = {
    "vgg": (("vgg", {"widths": ((32,), (64,), (128,))}), ("convnet", {"widths": (16, 32, 64)})),
    "convnet": (("convnet", {"widths": (16, 32, 64)}), ("convnet", {"widths": (16, 16, 32)})),
}


def sized(task):
    """The task with this chapter's sizes."""
    return task.but(target=None, **SIZES[task.preset])


def stages(dataset):
    """Classes by stage: 6 + 4 of ten as in the paper's CIFAR-10, up to 20 likewise 60 % first; more in ten
    equal stages, as its CIFAR-100.

    Raises `BadInput` for fewer than 3 classes, or a class that has fewer than 2 training images.
    """
    n = dataset.classes
    if n < 3:
        raise BadInput(
            f"{dataset.name} has {n} classes: Tree-CNN needs 3 or more, two for its first stage and one that comes later"
        )
    counts = torch.bincount(dataset.train.y, minlength=n).tolist()
    least = counts.index(min(counts))
    if counts[least] < 2:
        raise BadInput(
            f"{dataset.name}: class {dataset.names[least]!r} has {counts[least]} training images, at least 2 are needed"
        )
    order = ORDER.get(dataset.name, tuple(range(n)))
    sizes = [round(0.6 * n), n - round(0.6 * n)] if n <= 20 else [n // 10 + (i < n % 10) for i in range(10)]
    if not torch.isin(dataset.validation.y.cpu(), torch.tensor(order[: sizes[0]])).any():
        raise BadInput(
            f"{dataset.name}: no validation image of the first stage's classes, there are too few images"
        )
    return [order[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]


def stage_table(dataset):
    """The stages with their classes and images, as a table."""
    rows = [
        {
            "classes": ", ".join(dataset.names[c] for c in new),
            "training images": sum(int((dataset.train.y == c).sum()) for c in new),
        }
        for new in stages(dataset)
    ]
    return pd.DataFrame(rows, index=pd.RangeIndex(1, len(rows) + 1, name="stage"))


def cap(classes):
    """Classes that a child may hold: half of them, at most 10 (the paper tries 5, 10 and 20 on CIFAR-100)."""
    return min(10, math.ceil(classes / 2))


def networks(task):
    """((name, settings) of the root, of a branch). Ours: a block less a stage where there are several, and
    one convolution a stage.
    """
    if task.network == "resnet":
        w, blocks = task.widths["widths"], task.widths["blocks"]
        return ("resnet", {"widths": w, "blocks": tuple(max(1, b - 1) for b in blocks)}), (
            "convnet",
            {"widths": w},
        )
    return SMALLER.get(task.network, ((task.network, {}), (task.network, {})))


def makers(task, dataset, seed=0):
    """(flat, root, branch): functions of the number of outputs that make a network with the initial weights
    of `seed`.
    """

    def maker(name, settings):
        init = stream(seed, "initial weights").initial_seed()
        return lambda outputs: models.build(
            name, outputs, dataset.shape, seed=init, device=task.device, **settings
        )

    root, branch = networks(task)
    return maker(task.network, task.widths), maker(*root), maker(*branch)


# Arms


@dataclass(frozen=True, kw_only=True)
class FineTune(Method):
    """Train only what the forward pass reaches from the `depth`-th last convolution or linear layer on; all
    before it stays as it is.

    Frozen BatchNorms keep their statistics, frozen dropout is off, and nothing is kept for their backward
    pass."""

    depth: int = 1

    def on_fit_start(self, run):
        frozen = before(run.model, run.dataset, self.depth)
        for name in frozen:
            for p in run.model.get_submodule(name).parameters(recurse=False):
                p.requires_grad_(False)
        group = run.optimizer.param_groups[0]
        group["params"] = [p for p in group["params"] if p.requires_grad]
        whole = [
            name
            for name in frozen
            if all(f"{name}.{n}" in frozen for n, _ in run.model.get_submodule(name).named_modules() if n)
        ]
        run.state[self] = {"still": [name for name in whole if name]}
        run.log(
            self,
            f"all but the last {self.depth} layers frozen",
            weights=weights(run.model),
            samples=len(run.dataset.train),
        )

    def on_batch(self, run, x, y):
        for name in run.state[self]["still"]:
            run.model.get_submodule(name).training = False  # every evaluation sets it back
        return x, y

    def on_fit_end(self, run):
        for p in run.model.parameters():
            p.requires_grad_(True)


def reached(model, dataset):
    """Names of the leaf modules, and of others with tensors of their own, in the order in which the forward
    pass reaches them.
    """
    order, hooks = [], []
    for name, m in model.named_modules():
        if not any(m.children()) or any(True for _ in m.parameters(recurse=False)):
            hooks.append(m.register_forward_pre_hook(lambda module, inputs, name=name: order.append(name)))
    probe(model, dataset.normalize(dataset.train.x[:2]), hooks)
    return list(dict.fromkeys(order))


def _layer_places(model, names):
    matrices = [getattr(model.get_submodule(n), "weight", None) for n in names]
    return [i for i, w in enumerate(matrices) if isinstance(w, torch.Tensor) and w.dim() > 1]


def before(model, dataset, depth):
    """Names of the modules before the `depth`-th last layer: all but those reached from it on, and what is
    inside these.

    Raises `NoEffect` if nothing comes before it.
    """
    names = reached(model, dataset)
    places = _layer_places(model, names)
    if not 0 < depth <= len(places) or not places[-depth]:
        raise NoEffect(
            f"fine-tuning: the network has {len(places)} layers, with depth {depth} none stays as it is"
        )
    later = names[places[-depth] :]
    return [
        name
        for name, _ in model.named_modules()
        if not any(name == n or name.startswith(f"{n}.") for n in later)
    ]


def depths(task, dataset):
    """Depths for fine-tuning: the last layer, and a quarter, a half and three quarters of the layers."""
    model = task.build(dataset)
    n = len(_layer_places(model, reached(model, dataset)))
    return sorted({d for d in (1, round(n / 4), round(n / 2), round(3 * n / 4)) if 0 < d < n})


_first = {}  # kind -> (key, what the first stage left): arms of one block share it


def _once(kind, key, make):
    if _first.get(kind, (None,))[0] != key:
        _first[kind] = key, make()
    return copy.deepcopy(_first[kind][1])


@dataclass(frozen=True, kw_only=True)
class Flat:
    """The flat network as classes arrive: (task, seed) -> `History` of the later stages, all old and new
    images in each.

    Its last layer is new in every stage, the others go on from the stage before. depth: layers that are
    trained, counted from the end; 0: all. scratch: begin each stage anew."""

    depth: int = 0
    scratch: bool = False

    def __call__(self, task, seed):
        dataset = task.load()
        first, *later = stages(dataset)
        make = makers(task, dataset, seed)[0]
        net, begun = _once(
            "flat", repr((task, seed)), lambda: self.train_(make(len(first)), task, dataset, first, seed, 1)
        )
        seen, history = list(first), History()
        for i, new in enumerate(later):
            seen += new
            net = make(len(seen)) if self.scratch else transferred(make, len(seen), net)
            last = i + 1 == len(later)
            history += self.train_(
                net, task, dataset, seen, seed, max(1, EVALUATIONS // len(later)), self.depth, last
            )[1]
        own = relabel(dataset, {c: i for i, c in enumerate(seen)})
        return ended(history, begun, net, own, task)

    @staticmethod
    def train_(net, task, dataset, seen, seed, evaluations, depth=0, last=False):
        """(network, `History`) of a stage: trained on all classes seen so far. The test images are read in
        the last one.
        """
        own = relabel(dataset, {c: i for i, c in enumerate(seen)})
        own = own if last else replace(own, test=own.train[:1])  # the test images are read once, at the end
        h = train(
            net,
            own,
            fitting(task.recipe, own),
            [FineTune(depth=depth)] if depth else [],
            seed,
            evaluations=evaluations,
        )
        event = {
            "step": h.steps,
            "epoch": h.rows[-1]["epoch"],
            "method": "Flat",
            "text": f"flat network trained on {len(seen)} classes",
        }
        event |= {} if depth else {"weights": weights(net), "samples": len(own.train)}
        return net, replace(h, events=[*h.events, event])


@dataclass(frozen=True, kw_only=True)
class Growing:
    """A tree that grows as classes arrive: (task, seed) -> `History` of the later stages.

    groups: of the first stage's classes, made by hand; else each class is a leaf, as in the paper's
    CIFAR-100: nobody groups them."""

    tree: TreeCNN = field(default_factory=TreeCNN)
    groups: tuple = ()

    def __call__(self, task, seed):
        dataset = task.load()
        tree, begun, history = self.grown(task, dataset, seed)
        precision = resolve_precision(task.recipe.precision, dataset.device)
        history = replace(history, test_accuracy=accuracy(tree, dataset, "test", precision))
        return ended(history, begun, tree, dataset, task, accounts(tree, dataset, precision))

    def grown(self, task, dataset, seed):
        """(tree, the first stage's `History`, that of the later stages). The test images are not read."""
        first, *later = stages(dataset)
        groups = self.groups or tuple((c,) for c in first)
        _, *two = makers(task, dataset, seed)
        key = repr((task, seed, groups, self.tree.evaluations))
        tree, begun = _once("tree", key, lambda: self.tree.start(dataset, groups, *two, task.recipe, seed))
        grower = replace(self.tree, evaluations=max(1, self.tree.evaluations // len(later)))
        histories = [grower.learn_(tree, dataset, new, *two, task.recipe, seed) for new in later]
        return tree, begun, functools.reduce(History.__add__, histories)


def ended(history, begun, model, dataset, task, values=None):
    """The history with what else is to be known of it: the first stage, off this clock, and what a forward
    pass costs.
    """
    first = {
        "step": 0,
        "epoch": 0,
        "method": "first stage",
        "text": f"{begun.accuracy:.2f} %",
        "seconds": begun.seconds,
    }
    last = {
        "step": history.steps,
        "epoch": history.rows[-1]["epoch"],
        "method": "forward",
        "text": "forward pass",
        **(values or {}),
    }
    return replace(history, events=[first, *history.events, last | forward_cost(model, dataset, task)])


def forward_cost(model, dataset, task):
    """FLOPs and measured microseconds of a forward pass, per validation image, in a batch of up to 500."""
    x, _ = next(dataset.batches(dataset.validation))
    model.eval()
    with torch.no_grad(), autocast(resolve_precision(task.recipe.precision, dataset.device), dataset.device):
        flops = cost.count_flops(lambda: model(x)) / len(x)
        times = interleaved(
            {"forward": lambda: model(x)},
            repeats=3 if task.preset == "smoke" else 7,
            warm_up=1,
            device=dataset.device,
        )
    return {"flops": flops, "us": 1e6 * stats.median(times["forward"]) / len(x), "images": len(x)}


@torch.no_grad()
def accounts(tree, dataset, precision="fp32", split="validation"):
    """How a tree's accuracy comes about: shares of its images, by child, that come, that the root sends
    right, and then are told right.

    {"root": P(root right), "children": [{"share", "root", "branch"}]}; the accuracy is the sum of share x
    root x branch."""
    right, told, y = [], [], []
    table = torch.tensor([tree.T.get(c, -1) for c in range(dataset.classes)], device=dataset.device)
    tree.eval()
    with autocast(precision, dataset.device):
        for x, labels in dataset.batches(getattr(dataset, split)):
            right.append(tree.decide(x) == table[labels])
            told.append(tree(x) == labels)
            y.append(table[labels])
    right, told, y = (torch.cat(t) for t in (right, told, y))
    right, told, y = (t[y >= 0] for t in (right, told, y))
    children = []
    for k in range(len(tree.groups)):
        mine = y == k
        sent = mine & right
        rates = (
            mine.sum() / len(y),
            sent.sum() / mine.sum().clamp(min=1),
            (told & sent).sum() / sent.sum().clamp(min=1),
        )
        children.append(dict(zip(("share", "root", "branch"), map(float, rates), strict=True)))
    return {"right": float(right.float().mean()), "children": children}


def arms(task, dataset):
    """The judged arms: the flat network retrained whole, the tree, the flat network fine-tuned (quick: at one
    depth), and from scratch.
    """
    several = depths(task, dataset)
    quick = task.preset in ("smoke", "quick")
    found = [
        Arm(name=FLAT, role="baseline", fit=Flat()),
        Arm(name=TREE, fit=Growing(tree=TreeCNN(cap=cap(dataset.classes)))),
        *(tuned(d) for d in (several[len(several) // 2 :][:1] if quick else several)),
    ]
    return found if quick else [*found, Arm(name=SCRATCH, role="control", fit=Flat(scratch=True))]


def tuned(depth):
    """The control of which only the last `depth` layers are trained."""
    return Arm(name=f"flat, last {depth} layer{'s' * (depth > 1)}", role="control", fit=Flat(depth=depth))


def grid(task, dataset):
    """More, with one seed, for illustration: the other depths (quick), other caps, and groups made by hand
    where the paper has some.
    """
    done = {a.name for a in arms(task, dataset)}
    found = [Arm(name=FLAT, role="baseline", fit=Flat())]
    found += [a for a in map(tuned, depths(task, dataset)) if a.name not in done]
    caps = (2,) if task.preset in ("smoke", "quick") else (3, 2 * cap(dataset.classes))
    found += [
        Arm(name=f"{TREE}, C = {c}", fit=Growing(tree=TreeCNN(cap=c)))
        for c in caps
        if c != cap(dataset.classes)
    ]
    if dataset.name in BY_HAND:
        found.append(
            Arm(
                name=f"{TREE}, grouped by hand",
                fit=Growing(tree=TreeCNN(cap=6), groups=BY_HAND[dataset.name]),
            )
        )
    return found


# What is shown


def published():
    """The paper's networks on the meta device: weights, and from them the training efforts of its CIFAR-10
    experiment.
    """
    with torch.device("meta"):
        flat, flat100 = _published_flat(10), _published_flat(100)
        root = _published("c5x64 p c3x128 c3x128 a", 8 * 8 * 128, (512, 128, 2))
        branches = [_published("c5x32 p c5x64 p c3x64 a", 4 * 4 * 64, (128, n)) for n in (4, 6)]
    N, (whole, r, small, large) = 50_000, (weights(m) for m in (flat, root, *branches))
    lines = [
        f"{n:34s} {w / 1e6:6.3f} M weights"
        for n, w in (("A, flat", whole), ("A, flat, 100 classes", weights(flat100)))
    ]
    lines += [
        f"{'B, root, 2 children':34s} {r / 1e6:6.3f} M weights",
        f"{'B2, branch, 4 classes':34s} {small / 1e6:6.3f} M weights",
    ]
    trained = [(r, N), (small, 4 * N // 10), (large, 6 * N // 10)]
    lines.append(f"{'training effort of the tree':34s} {effort(trained, [(whole, N)]):6.3f}")
    for i, name in enumerate(
        ("I: linear layers", "II: and the 512s", "III: and the 256s", "IV: and the 128s", "V: all")
    ):
        part = sum(weights(block) for block in flat[4 - i :])
        lines.append(f"{'... flat, trained are B:' + name:34s} {effort([(part, N)], [(whole, N)]):6.3f}")
    return "\n".join(lines)


def _published(words, inputs, widths, channels=3):
    """A network as a row of words: c5x64 is a convolution 5x5 with 64 filters (with BatchNorm and ReLU), p
    and a pool by two.
    """
    layers = []
    for word in words.split():
        if word in "pa":
            layers.append(nn.MaxPool2d(2) if word == "p" else nn.AvgPool2d(2))
            continue
        k, out = map(int, word[1:].split("x"))
        layers += [nn.Conv2d(channels, out, k, padding=k // 2), nn.BatchNorm2d(out), nn.ReLU()]
        channels = out
    if widths:
        layers.append(nn.Flatten())
    for i, out in enumerate(widths):
        layers += [nn.Linear(inputs, out)] + [nn.ReLU()] * (i + 1 < len(widths))
        inputs = out
    return nn.Sequential(*layers)


def _published_flat(classes):
    widths = (3, 64, 128, 256, 512)
    blocks = [_published(f"c3x{b} c3x{b} p", 0, (), a) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*blocks, _published("", 2 * 2 * 512, (1024, 1024, classes)))


def toy():
    """Four new classes, four children, C = 4, by hand: every rule once, in the order in which the classes are
    placed.
    """
    L = [
        [0.70, 0.05, 0.20, 0.41],
        [0.10, 0.45, 0.25, 0.40],
        [0.10, 0.42, 0.25, 0.10],
        [0.10, 0.08, 0.30, 0.09],
    ]
    growth = grow(L, {0: 0, 1: 0, 2: 1, 3: 2, 4: 3}, cap=4)
    rows = [
        {
            "class": e["class"],
            "L": str([row[e["class"] - 5] for row in L]),
            "rule": e["rule"],
            "why": e["why"],
        }
        for e in growth.log
    ]
    children = [[c for c, k in growth.T.items() if k == child] for child in range(len(growth.origin))]
    return pd.DataFrame(
        [*rows, {"class": "", "L": "", "rule": "children then", "why": str(children)}]
    ).set_index("class")


def checks(task, dataset):
    """Fast against slow, on this task's networks with random weights: what must agree, and by how much it
    does not.
    """
    _, make_root, make_branch = makers(task, dataset)
    first, *later = stages(dataset)
    groups = [first[:2], *((c,) for c in first[2:])]
    tree = Tree(make_root(len(groups)), groups, [make_branch(2), *[None] * (len(groups) - 1)]).eval()
    x, y = next(dataset.batches(dataset.train[:64]))
    with torch.no_grad():
        slow = torch.tensor([_one(tree, image) for image in x.split(1)], device=x.device)
        differ = int((tree(x) != slow).sum())
        new = torch.isin(y, torch.tensor(later[0], device=y.device))
        L = likelihood(tree.root(x[new]), y[new])[0] if new.any() else torch.ones(1, 1)
    moved = transferred(make_root, len(groups) + 1, tree.root).state_dict()
    same = [
        torch.equal(t, moved[name])
        for name, t in tree.root.state_dict().items()
        if t.shape == moved[name].shape
    ]
    found, whole = accounts(tree, dataset), accuracy(tree, dataset, "validation")
    product = sum(c["share"] * c["root"] * c["branch"] for c in found["children"])
    rows = {
        "classes told by the sorted batch and image by image: differing": str(differ),
        "columns of L: largest distance of their sums from 1": f"{float((L.sum(0) - 1).abs().max()):.0e}",
        "tensors transferred to a root with one more child: equal": f"{sum(same)} of {len(same)}",
        "accuracy less the sum of P(root right) P(branch right): points": f"{abs(whole - 100 * product):.0e}",
    }
    return pd.DataFrame({"result": rows})


def _one(tree, image):
    child = int(tree.decide(image))
    branch = tree.branches[child]
    return tree.groups[child][0 if branch is None else int(branch(image).argmax())]


def cost_table(task, dataset):
    """Predicted before the run: weights, FLOPs, and the effort of a later stage if every class lies in a
    branch that is trained again.
    """
    n, rows = dataset.classes, {}
    flat, root, branch = makers(task, dataset)
    K = math.ceil(n / cap(n))
    for name, net in (
        ("flat", flat(n)),
        (f"root, {K} children", root(K)),
        (f"a branch, {cap(n)} classes", branch(cap(n))),
    ):
        w, image = weights(net), cost.step_flops(net.to("meta"), dataset.shape, 16) / 16
        rows[name] = {"weights": w, "MFLOP an image, trained": image / 1e6}
    flat, root, branch = rows.values()
    rows["tree, every class in a branch"] = {k: root[k] + branch[k] for k in flat}
    for row in rows.values():
        row["effort"] = row["weights"] / flat["weights"]
        row["FLOPs"] = row["MFLOP an image, trained"] / flat["MFLOP an image, trained"]
    frame = pd.DataFrame(rows).T.astype({"weights": int}).rename_axis("predicted")
    return frame.rename(columns={"effort": "effort, of the flat net's", "FLOPs": "FLOPs, of the flat net's"})


def trained(history):
    """(weights, samples) of every network that was trained in the judged stages."""
    return [(e["weights"], e["samples"]) for e in history.events if "weights" in e]


def costs(comparison):
    """Per arm, relative to the baseline, means over the seeds: effort and FLOPs (predicted) beside seconds
    (measured); forward cost.
    """
    base, rows = comparison.histories(comparison.baseline), {}
    for arm in comparison.arms:
        hs = comparison.histories(arm.name)
        pairs = list(zip(hs, base, strict=True))
        rows[arm.name] = {
            "accuracy %": stats.mean(h.accuracy for h in hs),
            "effort": stats.mean(effort(trained(h), trained(b)) for h, b in pairs),
            "FLOPs": stats.mean(h.flops / b.flops for h, b in pairs),
            "seconds": stats.geometric_mean([h.seconds / b.seconds for h, b in pairs]),
            "s, measured": stats.mean(h.seconds for h in hs),
            "s of the first stage": stats.mean(h.events[0]["seconds"] for h in hs),
            "forward MFLOP": stats.mean(h.events[-1]["flops"] for h in hs) / 1e6,
            "forward us": stats.median(h.events[-1]["us"] for h in hs),
        }
    return pd.DataFrame(rows).T.rename_axis("relative to " + comparison.baseline)


def say_costs(comparison):
    """Effort, FLOPs and seconds of the tree in one sentence."""
    frame = costs(comparison)
    row, points = frame.loc[TREE], frame.loc[TREE, "accuracy %"] - frame.iloc[0]["accuracy %"]
    return (
        f"{TREE} against {comparison.baseline}: effort {row['effort']:.2f}, FLOPs {row['FLOPs']:.2f}, "
        f"measured seconds {row['seconds']:.2f}, accuracy {points:+.2f} points."
    )


def trade_figure(comparison):
    """(figure, caption): final accuracy over effort, and over measured seconds, both relative to the
    baseline.
    """
    figure, axes = figures.new(2, width=9.5, height=3.9, sharey=True)
    frame, colour = costs(comparison), figures.colours([a.name for a in comparison.arms])
    base = comparison.histories(comparison.baseline)
    for arm in comparison.arms:
        hs = comparison.histories(arm.name)
        pairs = list(zip(hs, base, strict=True))
        seen = [[effort(trained(h), trained(b)) for h, b in pairs], [h.seconds / b.seconds for h, b in pairs]]
        for ax, x, key in zip(axes, seen, ("effort", "seconds"), strict=True):
            ax.plot(x, [h.accuracy for h in hs], ".", color=colour[arm.name], ms=5, alpha=0.5)
            marker = "D" if arm.role == "method" else "o"
            ax.plot(
                frame.loc[arm.name, key],
                frame.loc[arm.name, "accuracy %"],
                marker,
                color=colour[arm.name],
                ms=9,
                label=arm.name,
            )
    for ax, text in zip(axes, ("training effort (weights x samples)", "measured seconds"), strict=True):
        ax.set_xlabel(f"{text}, of {comparison.baseline}")
        ax.set_xlim(left=0)
    axes[0].set_ylabel("validation accuracy (%)")
    axes[0].set_title("what the paper counts")
    axes[1].set_title("what a clock shows")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    return figure, (
        "Later stages: each seed small, the mean large; up and left is better. Where a point lies farther right in the right panel than "
        "in the left, its effort promises time that is not there."
    )


def placed(history):
    """The events of a tree's history that place classes, one a stage."""
    return [e for e in history.events if "log" in e]


def log_table(comparison, dataset, arm=TREE):
    """What was done with each new class and why, by stage: the first seed."""
    rows = []
    for stage, event in enumerate(placed(comparison.histories(arm)[0]), 2):
        for e in event["log"]:
            group = event["groups"][e["child"]]
            rows.append(
                {
                    "stage": stage,
                    "class": dataset.names[e["class"]],
                    "rule": e["rule"],
                    "why": e["why"],
                    "its child then": ", ".join(dataset.names[c] for c in group),
                }
            )
    return pd.DataFrame(rows).set_index("stage")


def retrained(comparison, dataset, arm=TREE):
    """What was trained in the first seed's later stages: the part, its weights, images and seconds."""
    rows = [
        {
            "trained": "root" if e["part"] == "root" else ", ".join(dataset.names[c] for c in e["classes"]),
            "how": e["how"],
        }
        | {"weights": e["weights"], "images": e["samples"], "seconds": e["seconds"]}
        for e in comparison.histories(arm)[0].events
        if "part" in e
    ]
    return pd.DataFrame(rows).set_index("trained")


def accounts_table(comparison, dataset, arm=TREE):
    """How the first seed's accuracy comes about, child by child."""
    history = comparison.histories(arm)[0]
    groups = placed(history)[-1]["groups"]
    rows = [
        {
            "child": ", ".join(dataset.names[c] for c in group),
            "share of images %": 100 * c["share"],
            "root right %": 100 * c["root"],
        }
        | {
            "then branch right %": 100 * c["branch"],
            "points of accuracy": 100 * c["share"] * c["root"] * c["branch"],
        }
        for group, c in zip(groups, history.events[-1]["children"], strict=True)
    ]
    return pd.DataFrame(rows).set_index("child")


def likelihood_figure(comparison, dataset, arm=TREE):
    """(figure, caption): the likelihoods by which the first seed's second stage was placed, children by new
    classes.
    """
    event = placed(comparison.histories(arm)[0])[0]
    L = torch.tensor(event["L"])
    figure, axes = figures.new(width=2.6 + 0.75 * L.shape[1], height=1.4 + 0.36 * L.shape[0])
    image = axes.imshow(L.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for k in range(L.shape[0]):
        for m in range(L.shape[1]):
            axes.text(
                m,
                k,
                f"{L[k, m]:.2f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if L[k, m] > 0.6 else "black",
            )
    names = [dataset.names[c] for c in event["new"]]
    axes.set_xticks(range(L.shape[1]), names, rotation=30 if max(map(len, names)) > 4 else 0)
    axes.set_yticks(range(L.shape[0]), [_say(group, dataset.names, 30) for group in event["before"]])
    axes.set_xlabel("new class")
    axes.set_ylabel("child of the root")
    axes.grid(False)
    figure.colorbar(image, ax=axes, label="likelihood L")
    return figure, (
        "What the root takes images of the second stage's classes for, before it was trained on them (first seed). One cell far above the "
        "rest of its column: add. Two rivals: merge. All alike: a new leaf."
    )


COLOUR = {"leaf": "#DDDDDD", "untouched": "#B8D8EE", "new last layer": "#56B4E9", "fresh": "#E69F00"}


def tree_figure(comparison, dataset, arm=TREE):
    """(figure, caption): the tree after every stage, the first seed."""
    events = placed(comparison.histories(arm)[0])
    drawn = [("stage 1", events[0]["before"], None, set())]
    drawn += [
        (f"stage {i}: {len(e['new'])} new", e["groups"], e["how"], set(e["new"]))
        for i, e in enumerate(events, 2)
    ]
    columns = min(4, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    tall = max(len(groups) for _, groups, _, _ in drawn)
    width = 3.1 if max(map(len, dataset.names)) > 3 else 2.2
    height = 0.9 + tall * (0.42 if tall <= 12 else 0.26)
    figure, axes = figures.new(columns, rows, width=width * columns, height=height * rows, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, (title, groups, how, new) in zip(axes.flat, drawn, strict=False):
        how = how or ["leaf" if len(g) == 1 else "fresh" for g in groups]
        middle = (len(groups) - 1) / 2
        for y, (group, state) in enumerate(zip(groups, how, strict=True)):
            ax.plot([0.07, 0.24], [middle, y], color="black", lw=0.8, zorder=1)
            label = _say(
                group, [n + "*" * (c in new) for c, n in enumerate(dataset.names)], 28 if width > 3 else 18
            )
            box = dict(boxstyle="round,pad=0.25", fc=COLOUR[state], ec="none")
            ax.text(0.25, y, label, va="center", fontsize=7 if tall <= 12 else 5, bbox=box)
        ax.text(
            0.05,
            middle,
            "root",
            va="center",
            ha="center",
            fontsize=8,
            bbox=dict(boxstyle="circle", fc="white", ec="black"),
        )
        ax.set_xlim(-0.05, 1)
        ax.set_ylim(tall - 0.4, -0.6)
        ax.set_title(title)
    handles = [Patch(color=c, label=n) for n, c in COLOUR.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)
    return figure, (
        "The tree after every stage (first seed); * marks new classes. Leaves have no network; pale blue branches were not trained in that "
        "stage, blue ones went on from their old weights with a new last layer, orange ones began fresh."
    )


def _say(group, names, width):
    """Class names, wrapped, at most three lines."""
    lines = textwrap.wrap(", ".join(names[c] for c in group), width)
    return "\n".join([*lines[:2], f"... ({len(group)} classes)"] if len(lines) > 3 else lines)


def say_grid(comparison):
    """The illustration's results in a sentence."""
    frame = costs(comparison)
    found = [
        f"{n} {r['accuracy %']:.1f} % at effort {r['effort']:.2f}, seconds {r['seconds']:.2f}"
        for n, r in frame.iterrows()
    ]
    return "; ".join(found) + " (one seed)."
