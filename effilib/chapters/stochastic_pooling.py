"""Chapter 5.1: accuracy and the gap between training and test over the number of training images, for four
kinds of pooling.

Budget of the grids on 2 cores, in runs x updates x seconds (measured, 28 x 28, batch 64, bf16): a step of the
plain network takes 5-7 ms without BatchNorm and 6-9 ms with it, evaluations about 1.2 s a run. study: 4 kinds
x 4 sizes x 2 networks x 5 seeds = 160 runs x 500 x 6.6 ms + 160 x 1.2 s = 12 min; verdict 15 runs x 10 s =
2.5 min. quick: 4 x 2 x 2 = 16 runs x 100 x 7 ms + 16 x 0.5 s = 20 s; verdict and pilot 17 runs x 1.9 s = 32
s."""

import statistics as stats
from functools import partial

import pandas as pd
import torch
import torch.nn.functional as F

from effilib import figures
from effilib.chapters import plain_network as plain
from effilib.clock import interleaved
from effilib.experiment import Arm, compare
from effilib.methods.stochastic_pooling import S3Pool2d, StochasticPool2d, StochasticPooling

ARMS = ("max", "average", "stochastic", "S3Pool")
METHODS = {
    "max": (),
    "average": (StochasticPooling(kind="average"),),
    "stochastic": (StochasticPooling(),),
    "S3Pool": (StochasticPooling(kind="s3"),),
}
SIZES = {
    "smoke": (64, 128),
    "quick": (500, 3500),
    "study": (500, 1000, 2000, 10_000),
    "full": (500, 1000, 2000, 50_000),
}
UPDATES = {"smoke": 4, "quick": 100, "study": 500, "full": 2000}  # of a run of the grid
VERDICT = {
    "smoke": (64, 4),
    "quick": (500, 220),
    "study": (1000, 800),
    "full": (1000, 2000),
}  # images, updates


def arms(task, bn=False):
    """The arms of the verdict: max pooling, stochastic pooling, and average pooling as the control."""
    network = plain.settings(task, bn)
    return [
        Arm(name="max", role="baseline", network=network),
        Arm(name="stochastic", methods=METHODS["stochastic"], network=network),
        Arm(name="average", role="control", methods=METHODS["average"], network=network),
    ]


def verdict_task(task, bn=False):
    """Few images, no BatchNorm: where the paper's claim is strongest. The pilot for the target trains the
    same network.
    """
    images, updates = VERDICT[task.preset]
    images = min(images, len(plain.load(task).train))
    return plain.at_size(
        task, images, updates, lr=rate(task, bn), widths=plain.settings(task, bn), target=None
    )


def rate(task, bn):
    """The learning rate tuned for the network with or without BatchNorm."""
    return plain.lr(task, "all, BatchNorm" if bn else "all")


def sizes(task):
    """Numbers of training images, as far as there are so many."""
    available = len(plain.load(task.but(images=None)).train)
    return tuple(dict.fromkeys(min(n, available) for n in SIZES[task.preset]))


def networks(task):
    """Name -> with BatchNorm or without; a user's own network comes as it is."""
    return (
        {"without BatchNorm": False, "with BatchNorm": True}
        if task.network in plain.WITH_BN
        else {"as it is": True}
    )


def grid(task):
    """Every kind of pooling, with and without BatchNorm, at every number of images: dict network -> images ->
    `Comparison`.
    """
    seeds, found = task.seeds if task.preset in ("study", "full") else 1, {}
    for name, bn in networks(task).items():
        for n in sizes(task):
            cell = plain.at_size(task, n, UPDATES[task.preset], lr=rate(task, bn), target=None, evaluations=1)
            settings = plain.settings(task, bn)
            kinds = [
                Arm(
                    name=k,
                    role="method" if i else "baseline",
                    fit=partial(plain.fit, methods=METHODS[k], network=settings),
                )
                for i, k in enumerate(ARMS)
            ]
            run = compare(
                cell,
                kinds,
                seeds=seeds,
                quantity="time per step",
                illustration=True,
                title=f"{n} images, {name}",
            )
            found.setdefault(name, {})[n] = run
    return found


def accuracies(comparisons):
    """Validation accuracy in %: dict kind -> per number of images the list of seeds."""
    return {k: [[h.accuracy for h in c.histories(k)] for c in comparisons.values()] for k in ARMS}


def gaps(comparisons):
    """Training accuracy less test accuracy in points, both in eval mode: dict kind -> per number of images
    the list of seeds.
    """
    return {
        k: [
            [plain.training_accuracy(h) - h.test_accuracy for h in c.histories(k)]
            for c in comparisons.values()
        ]
        for k in ARMS
    }


def grid_figure(found):
    """(figure, caption): accuracy and the gap over the number of images, a column per network."""
    figure, axes = figures.new(
        len(found), 2, width=4.6 * len(found), height=6.2, squeeze=False, sharex=True, sharey="row"
    )
    colour = figures.colours(ARMS)
    seeds = len(next(iter(next(iter(found.values())).values())).blocks)
    for column, (name, comparisons) in enumerate(found.items()):
        ns = list(comparisons)
        plain.draw_curves(axes[0][column], ns, accuracies(comparisons), colour)
        plain.draw_curves(axes[1][column], ns, gaps(comparisons), colour)
        axes[0][column].set_title(name)
        axes[1][column].axhline(0, color="black", lw=0.8)
        axes[1][column].set_xlabel("training images (log scale)")
    axes[0][0].set_ylabel("validation accuracy (%)")
    axes[1][0].set_ylabel("training - test accuracy (points)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ARMS))
    how = f"{seeds} seeds, lines are means" if seeds > 1 else "one seed: an illustration, no verdict"
    return figure, (
        f"Above: accuracy after equal numbers of updates ({how}). Below: how much better the training images are known "
        "than the test images; a regulariser lowers this gap. It helps only where the upper curve rises as well."
    )


def grid_table(found):
    """Mean accuracy, training accuracy and gap of every cell of the grid."""
    rows = {}
    for name, comparisons in found.items():
        for n, c in comparisons.items():
            for k in ARMS:
                h = c.histories(k)
                train_, test = (
                    stats.mean(map(plain.training_accuracy, h)),
                    stats.mean(x.test_accuracy for x in h),
                )
                row = {
                    "n": len(h),
                    "validation %": stats.mean(x.accuracy for x in h),
                    "training %": train_,
                    "test %": test,
                }
                rows[name, f"{n:,}", k] = row | {"gap": train_ - test}
    return pd.DataFrame(rows).T.rename_axis(["network", "images", "pooling"])


def needed(found):
    """Images that each kind needs for what every seed of max pooling reaches with the last but one number (of
    two: for their mean).
    """
    tables = {}
    for name, comparisons in found.items():
        ns = list(comparisons)
        ends = [[h.accuracy for h in comparisons[n].histories("max")] for n in ns]
        target = min(ends[-2]) if len(ns) > 2 else stats.mean(map(stats.mean, ends))
        table = plain.needed(comparisons, ARMS, ns, target)
        table.insert(0, "for", f"{target:.1f} %")
        tables[name] = table.rename_axis(None)
    return pd.concat(tables, names=["network", "pooling"])


def steps(found):
    """Time of a step of each kind, over all runs of the grid, and its multiple of max pooling's."""
    rows = {}
    for name, comparisons in found.items():
        ms = {
            k: 1e3 * stats.median(h.step_seconds for c in comparisons.values() for h in c.histories(k))
            for k in ARMS
        }
        for k in ARMS:
            rows[name, k] = {"ms a step": ms[k], "of max pooling's": f"{ms[k] / ms['max']:.2f}x"}
    return pd.DataFrame(rows).T.rename_axis(["network", "pooling"])


def layer_costs(
    *, shape=(64, 32, 28, 28), dtype=torch.float32, repeats=21, seconds=4, layout=torch.channels_last
):
    """Milliseconds of forward and backward of one pooling layer, 2 x 2, interleaved: dict kind -> list of
    seconds.
    """
    g = torch.Generator().manual_seed(0)
    x = torch.rand(*shape, generator=g).to(dtype).contiguous(memory_format=layout).requires_grad_()
    layers = {
        "max": lambda x: F.max_pool2d(x, 2),
        "average": lambda x: F.avg_pool2d(x, 2),
        "stochastic": StochasticPool2d(2, generator=g),
        "S3Pool": S3Pool2d(2, grid=4, generator=g),
    }
    dy = torch.randn_like(F.max_pool2d(x, 2))

    def both(layer):
        x.grad = None
        layer(x).backward(dy)

    return interleaved(
        {k: partial(both, layer) for k, layer in layers.items()}, repeats=repeats, seconds=seconds
    )


def cost_table(task):
    """One layer's forward and backward by kind of pooling, next to max pooling's."""
    few = dict(repeats=3, seconds=1, shape=(8, 8, 16, 16)) if task.preset == "smoke" else {}
    times = layer_costs(**few)
    ms = {k: 1e3 * stats.median(t) for k, t in times.items()}
    rows = {
        k: {"ms, forward + backward": v, "of max pooling's": f"{v / ms['max']:.1f}x"} for k, v in ms.items()
    }
    return pd.DataFrame(rows).T.rename_axis("2 x 2 pooling")


def by_hand():
    """The window (1, 2, 3, 4): probabilities, what was drawn in 100,000 draws, and what eval mode gives."""
    a, n = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 100_000
    layer = StochasticPool2d(2, generator=torch.Generator().manual_seed(0))
    drawn = layer(a.expand(n, 1, 2, 2)).flatten()
    rows = {
        f"{v:g}": {"p": f"{v / 10:.2f}", "share of the draws": f"{(drawn == v).float().mean():.4f}"}
        for v in a.flatten().tolist()
    }
    rows["mean"] = {"p": "(1 + 4 + 9 + 16) / 10 = 3.00", "share of the draws": f"{drawn.mean():.4f}"}
    rows["eval mode"] = {"p": "3.00", "share of the draws": f"{layer.eval()(a[None, None]).item():.4f}"}
    return pd.DataFrame(rows).T.rename_axis("element")


def check():
    """The numerics, each against a slow or known result: a table of what was found."""
    g = torch.Generator().manual_seed(1)
    x = torch.relu(torch.randn(4, 3, 10, 10, generator=g))
    layer = StochasticPool2d(3, stride=2, ceil_mode=True, generator=g)
    n = 4000
    draws = layer(x.repeat(n, 1, 1, 1)).view(n, *layer(x).shape)
    a = F.pad(x, (0, 1, 0, 1)).double().unfold(2, 3, 2).unfold(3, 3, 2).flatten(4)
    p = a / a.sum(-1, keepdim=True).clamp_min(1e-30)
    std = ((p * a**2).sum(-1) - (p * a).sum(-1) ** 2).clamp_min(1e-6).sqrt()
    z = ((draws.double().mean(0) - layer.eval()(x)) / (std / n**0.5)).abs()
    layer.train()
    xs = x.clone().requires_grad_()
    y = layer(xs)
    y.sum().backward()
    zero = torch.zeros(1, 1, 4, 4, requires_grad=True)
    StochasticPool2d(2)(zero).sum().backward()
    s3, odd = S3Pool2d(2, grid=4, ceil_mode=True, generator=g), x[:, :, :9, :9]
    rows = {
        "mean of 4,000 draws against eval mode, largest deviation in standard errors": f"{z.max():.1f} of {z.numel()} windows",
        "gradient mass in, out (only windows that are not all zero)": f"{int((y > 0).sum())}, {int(xs.grad.sum())}",
        "a region of zeros: output, gradient": f"{StochasticPool2d(2)(zero).abs().max():g}, {zero.grad.abs().max():g}",
        "S3Pool, 9 x 9: shape in training, in eval mode": f"{tuple(s3(odd).shape[2:])}, {tuple(s3.eval()(odd).shape[2:])}",
    }
    return pd.DataFrame({"result": rows}).rename_axis("what")


def say(found):
    """The mean accuracies at the smallest number of images, in a sentence per network."""
    words = []
    for name, comparisons in found.items():
        n, c = next(iter(comparisons.items()))
        means = ", ".join(f"{k} {stats.mean(h.accuracy for h in c.histories(k)):.1f} %" for k in ARMS)
        words.append(f"{n:,} images, {name} (n={len(c.blocks)}): {means}.")
    return words
