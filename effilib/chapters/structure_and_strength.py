"""Chapter 5.2: accuracy over samples per class for learned and random filters, all weights trained or only
their strength.

Budget of the grids on 2 cores, in runs x (updates x seconds + structure + evaluations), measured at 28 x 28,
batch 64, bf16: study: 7 arms x 5 sizes x 5 seeds = 175 runs x (500 x 5 ms + 1 s) + 50 dictionaries x 1.5 s +
50 k-means x 0.2 s = 12 min; verdict 15 runs x 7 s = 2 min. quick: 7 x 2 = 14 runs x (100 x 5 ms + 0.7 s) + 4
dictionaries x 1.5 s = 25 s; verdict and pilot 17 runs x 1.8 s = 31 s."""

import statistics as stats
from functools import partial

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from effilib import cost, figures
from effilib.chapters import plain_network as plain
from effilib.experiment import Arm, compare
from effilib.methods import structure_and_strength as ss
from effilib.methods.structure_and_strength import StructureAndStrength, merge_, strengthen_
from effilib.models import seeded

PER_CLASS = {
    "smoke": (6, 12),
    "quick": (10, 100),
    "study": (10, 50, 100, 300, 1000),
    "full": (10, 50, 100, 300, 1000),
}
UPDATES = {"smoke": 4, "quick": 100, "study": 500, "full": 2000}
VERDICT = {
    "smoke": (12, 4),
    "quick": (50, 180),
    "study": (50, 800),
    "full": (50, 2000),
}  # samples per class, updates
PATCHES = {"smoke": 500, "quick": 1500, "study": 5000, "full": 20_000}
TRAINED = {"all": "all weights", "strength": "strength only"}


def scope(task):
    """Per filter; in a network that may have BatchNorm, per filter where that has a gradient."""
    return "filter" if task.network in plain.WITH_BN else "auto"


def method(task, structure, trained):
    """The `Method`s of an arm; none for random filters with all weights trained."""
    if (structure, trained) == ("random", "all"):
        return ()
    return (
        StructureAndStrength(
            structure=structure, train=trained, scope=scope(task), patches=PATCHES[task.preset]
        ),
    )


def rate(task, structure, trained):
    """The learning rate tuned for what is trained."""
    return plain.lr(task, trained if structure == "random" else f"{trained}, learned")


def combinations(task):
    """Name -> (methods, settings of the network, learning rate) of every arm of the grid; the first is the
    baseline.
    """
    without = plain.settings(task, False)
    found = {}
    for structure in ("random", "dictionary", "kmeans"):
        for trained, words in TRAINED.items():
            found[f"{structure}, {words}"] = (
                method(task, structure, trained),
                without,
                rate(task, structure, trained),
            )
    if task.network in plain.WITH_BN:  # random filters, the scale and shift of BatchNorm, and the classifier
        only = (StructureAndStrength(structure="random", train="strength", scope="auto"),)
        found["BatchNorm only"] = (only, plain.settings(task, True), plain.lr(task, "BatchNorm only"))
    return found


def arms(task):
    """The verdict's arms: ordinary training, the paper's method, and training only BatchNorm (else only
    random filters' strength).
    """
    every = combinations(task)
    control = "BatchNorm only" if "BatchNorm only" in every else "random, strength only"
    roles = {"random, all weights": "baseline", "dictionary, strength only": "method", control: "control"}
    return [
        Arm(name=n, role=r, methods=every[n][0], network=every[n][1], changes={"lr": every[n][2]})
        for n, r in roles.items()
    ]


def verdict_task(task):
    """Few samples per class: where the method should help most. The pilot for the target trains as the
    baseline does.
    """
    per_class, updates = VERDICT[task.preset]
    dataset = plain.load(task)
    images = min(per_class * dataset.classes, len(dataset.train))
    return plain.at_size(
        task, images, updates, lr=plain.lr(task), widths=plain.settings(task, False), target=None
    )


def grid(task):
    """Every arm at every number of samples per class: dict samples -> `Comparison`."""
    seeds, dataset, found = (
        task.seeds if task.preset in ("study", "full") else 1,
        plain.load(task.but(images=None)),
        {},
    )
    for per_class in PER_CLASS[task.preset]:
        images = min(per_class * dataset.classes, len(dataset.train))
        cell = plain.at_size(task, images, UPDATES[task.preset], target=None, evaluations=1)
        kinds = [
            Arm(
                name=n,
                role="method" if i else "baseline",
                fit=partial(plain.fit, methods=methods, network=network, lr=lr),
            )
            for i, (n, (methods, network, lr)) in enumerate(combinations(task).items())
        ]
        found[images // dataset.classes] = compare(
            cell,
            kinds,
            seeds=seeds,
            quantity="time per step",
            illustration=True,
            title=f"{per_class} samples per class",
        )
    return found


def _names(found):
    return [a.name for a in next(iter(found.values())).arms]


def grid_figure(found):
    """(figure, caption): accuracy over samples per class, a colour per structure, dashed where only the
    strength is trained.
    """
    figure, axes = figures.new(width=8.5, height=4.2)
    names, kinds = _names(found), figures.colours(("random", "dictionary", "kmeans", "BatchNorm only"))
    colour = {n: kinds[n.split(",")[0]] for n in names}
    style = {n: "--" if n.endswith("only") else "-" for n in names}
    values = {n: [[h.accuracy for h in c.histories(n)] for c in found.values()] for n in names}
    plain.draw_curves(axes, list(found), values, colour, style)
    axes.set_xlabel("training samples per class (log scale)")
    axes.set_ylabel("validation accuracy (%)")
    figure.legend(loc="outside right center", fontsize=9)
    seeds = len(next(iter(found.values())).blocks)
    how = f"{seeds} seeds, lines are means" if seeds > 1 else "one seed: an illustration, no verdict"
    return figure, (
        f"Accuracy after equal numbers of updates ({how}). Grey starts from random filters; dashed lines train only the strength (or "
        "BatchNorm), solid ones all weights. The claim is a dashed coloured line above the solid grey one on the left."
    )


def seconds(history, kind):
    """Seconds on the clock of a kind of work in one run."""
    return history.kinds.get(kind, {"seconds": 0.0})["seconds"]


def trained_parameters(task, dataset):
    """Number of trainable parameters of every arm."""
    images, found = dataset.normalize(dataset.train.x[:2]), {}
    for name, (methods, network, _) in combinations(task).items():
        model = task.build(dataset, **network)
        if any(m.train == "strength" for m in methods):
            strengthen_(model, images, methods[0].scope)
        found[name] = cost.parameters(model)
    return found


def grid_table(found, task, dataset):
    """What each arm trains and costs, and its accuracy at every number of samples."""
    count, rows = trained_parameters(task, dataset), {}
    for name in _names(found):
        histories = [h for c in found.values() for h in c.histories(name)]
        row = {
            "trainable parameters": count[name],
            "ms a step": 1e3 * stats.median(h.step_seconds for h in histories),
        }
        row |= {"structure, s": stats.mean(seconds(h, "structure") for h in histories)}
        row |= {
            f"{n:,} a class": f"{stats.mean(h.accuracy for h in c.histories(name)):.1f} %"
            for n, c in found.items()
        }
        rows[name] = row
    return pd.DataFrame(rows).T.rename_axis("filters, what is trained")


def time_figure(found):
    """(figure, caption): where the seconds of a run go: structure learning before the first step, and the
    steps.
    """
    last, parts = list(found.values())[-1], {}
    for name in _names(found):
        h = last.histories(name)
        whole, structure = stats.mean(x.seconds for x in h), stats.mean(seconds(x, "structure") for x in h)
        parts[name] = {"structure": structure, "steps": whole - structure}
    figure, axes = figures.new(width=8.5, height=3.4)
    for i, part in enumerate(("structure", "steps")):
        left = [p["structure"] if i else 0.0 for p in parts.values()]
        axes.barh(
            list(parts),
            [p[part] for p in parts.values()],
            left=left,
            color=figures.COLOURS[1 - i],
            label=part,
        )
    axes.invert_yaxis()
    axes.set_xlabel("seconds on the clock, one run")
    axes.grid(axis="y", alpha=0)
    axes.legend(fontsize=9)
    return figure, (
        "Seconds of one run with the most samples: learning the structure comes before the first step and is on the clock. "
        "A frozen filter saves its dW in every step; the dictionary has to be earned back by that, or by fewer samples."
    )


def structures(task, dataset):
    """The first layer's filters, random and learned from training images: dict structure -> (O, kh, kw), the
    first input channel.
    """
    images, found = dataset.normalize(dataset.train.x[:1000]), {}
    for structure in ss.STRUCTURES:
        model = task.build(dataset, **plain.settings(task, False))
        if structure != "random":
            ss.learn_structure_(
                model, images, structure, torch.Generator().manual_seed(0), PATCHES[task.preset]
            )
        conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        found[structure] = conv.weight.detach()[:, 0].cpu()
    return found


def structures_figure(found):
    """(figure, caption): 16 filters of the first layer of each kind."""
    figure, axes = figures.new(len(found), width=9.0, height=3.0)
    for ax, (name, w) in zip(axes, found.items(), strict=True):
        w = w[:16].float()
        w = F.pad(w / w.abs().amax((1, 2), keepdim=True), (1, 1, 1, 1), value=float("nan"))
        w = F.pad(w, (0, 0, 0, 0, 0, 16 - len(w)), value=float("nan"))
        side = w.shape[1:]
        image = w.view(4, 4, *side).permute(0, 2, 1, 3).reshape(4 * side[0], 4 * side[1])
        ax.imshow(image.numpy(), cmap="RdBu", vmin=-1, vmax=1)
        ax.set_title(name)
        ax.set_axis_off()
    return figure, (
        "16 filters of the first layer, each scaled to its largest element (red negative, blue positive). Learned ones are edges and "
        "spots of the training images; random ones have no structure."
    )


def by_hand():
    """Two patches, two atoms: whitened, learned by k-means, and brought to He's norm."""
    patches = torch.tensor([[0.0, 0, 1, 1], [0, 1, 0, 1]]).repeat(20, 1)
    white = ss.whiten(patches)
    filters = ss.learn_filters(patches, 2, "kmeans", torch.Generator().manual_seed(0))
    order = filters[:, 1].argsort()
    rows = {}
    for name, patch, w, f in zip("ab", patches[:2], white[:2], filters[order], strict=True):
        rows[name] = {
            k: " ".join(f"{v:.2f}" for v in t.tolist())
            for k, t in (("patch", patch), ("whitened", w), ("filter", f))
        }
        rows[name]["its norm"] = f"{f.norm():.4f}"
    return pd.DataFrame(rows).T.rename_axis("patch")


def _net(bn):
    with seeded(0):
        norm = [nn.BatchNorm2d(8)] if bn else []
        return nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1, bias=not bn), *norm, nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
        )


def gradient_of_strength(bn):
    """Largest |dL/dt| of a strength per filter, forced in front of a BatchNorm or without one."""
    g, model = torch.Generator().manual_seed(1), _net(bn)
    x, weights = torch.randn(16, 4, 8, 8, generator=g), torch.randn(16, 8, 8, 8, generator=g)
    strengthen_(model, x[:2], "auto")
    conv = model[0]
    if bn:  # what the method refuses to do
        conv.scope, conv.t = "filter", nn.Parameter(torch.ones(8))
    (model(x) * weights).mean().backward()
    return conv.t.grad.abs().max().item()


def check():
    """The numerics: the function is kept, merging is exact, dW is left out, and what BatchNorm does to a
    strength per filter.
    """
    g = torch.Generator().manual_seed(1)
    x, rows = torch.randn(4, 4, 8, 8, generator=g), {}
    for scope_ in ("filter", "input", "kernel"):
        model = _net(False)
        before = model(x)
        strengthen_(model, x[:2], scope_)
        kept = (model(x) - before).abs().max()
        with torch.no_grad():
            for m in model.modules():
                if isinstance(m, ss.StrengthConv2d):
                    m.t.uniform_(0.5, 2, generator=g)
        strong = model(x)
        flops = cost.step_flops(model, x.shape[1:])
        merge_(model)
        exact, ratio = (model(x) - strong).abs().max(), flops / cost.step_flops(model, x.shape[1:])
        rows[f"per {scope_}"] = {
            "t = 1 against the plain net": f"{kept:.0e}",
            "merged": f"{exact:.0e}",
            "FLOPs of a step": f"{ratio:.2f}x",
        }
    table = pd.DataFrame(rows).T.rename_axis("strength")
    plainly, behind = gradient_of_strength(False), gradient_of_strength(True)
    dead = f"Largest |dL/dt| per filter: {plainly:.1e} without BatchNorm, {behind:.1e} in front of one."
    return table, dead


def cost_table(task, dataset):
    """Trainable parameters, optimizer state and FLOPs of a step of every arm, before anything is trained."""
    batch = min(task.recipe.batch_size, len(dataset.train))
    images, rows, base = dataset.normalize(dataset.train.x[:2]), {}, None
    for name, (methods, network, _) in combinations(task).items():
        if "kmeans" in name:
            continue  # as the dictionary
        model = task.build(dataset, **network)
        if any(m.train == "strength" for m in methods):
            strengthen_(model, images, methods[0].scope)
        flops, count = cost.step_flops(model.to("meta"), dataset.shape, batch), cost.parameters(model)
        base = base or flops
        rows[name] = {
            "trainable parameters": count,
            "optimizer, kB": 4 * count / 1e3,
            "MFLOP a step": flops / 1e6,
            "predicted": f"{base / flops:.2f}x",
        }
    return pd.DataFrame(rows).T.rename_axis(f"batch {batch}")


def say(found):
    """The mean accuracies at the fewest samples, in a sentence."""
    n, c = next(iter(found.items()))
    means = ", ".join(f"{k}: {stats.mean(h.accuracy for h in c.histories(k)):.1f} %" for k in _names(found))
    return f"{n:,} samples per class (n={len(c.blocks)}): {means}."
