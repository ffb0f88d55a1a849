"""Chapter 7.3: stems at half the resolution, the wavelet-like auto-encoder, costs and numerics.

Budget on 2 cores, in runs x seconds: study: verdict 5 x (40 + 2 x 30); all arms for a fifth of the epochs, 5
x about 135: 20 min. quick: verdict 5 x (2.2 + 2 x 1.7); all arms for a third, 12 x 0.9: 45 s."""

import statistics as stats
from dataclasses import dataclass, replace

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from effilib import figures, models
from effilib.chapters.products import step_table
from effilib.clock import elapsed, interleaved
from effilib.data import Batches
from effilib.errors import BadInput, NoEffect
from effilib.experiment import Arm, compare
from effilib.methods import wavelet
from effilib.methods.wavelet import (
    WaveletStem,
    analysis,
    flip_bands,
    haar,
    haar_matrix,
    inverse_haar,
    precompute,
    space_to_depth,
    synthesis,
)
from effilib.methods.wavelet_auto_encoder import WAE, WaveletAutoEncoder
from effilib.training import History, stream, train

FULL, BANDS, S2D, STRIDED, LOW = (
    "full resolution",
    "wavelet stem",
    "space-to-depth stem",
    "strided stem",
    "low band only",
)
RAW, WIDE = "wavelet stem, bands as they are", "wavelet stem, first stage twice as wide"
PUSHED, LONGER, READY, JOINT, STAGED = (
    "wavelet, all maps halved",
    "wavelet stem, for the time it saves",
    "wavelet stem, precomputed",
    "WAE, joint",
    "WAE, three stages",
)
AIM = 1.3  # of a step with the wavelet stem; so many times the epochs take the time of the full resolution
SHARE = {
    "smoke": 0.5,
    "quick": 1 / 3,
    "study": 1 / 5,
    "full": 1.0,
}  # of the task's epochs, for the run of all arms
THREE_STAGES = (0.2, 0.5, 0.3)  # of the steps; the order is the paper's, the shares are ours


@dataclass(frozen=True, kw_only=True)
class Precomputed:
    """Training on bands that were computed once, on the clock: (task, seed) -> `History`."""

    def __call__(self, task, seed):
        dataset = task.load()
        with elapsed() as seconds:
            bands = precompute(dataset)
            once = seconds()
        model = task.build(dataset, seed)
        wavelet.keep_sizes_(model, dataset.shape, after=wavelet.first_convolution(model, dataset.shape)[0])
        stem_for_(model, bands.shape, seed)
        return History(seconds=once, raw_seconds=once) + train(model, bands, task.recipe, (), seed)


def stem_for_(model, shape, seed):
    """Give our networks a first convolution for `shape` (C, H, W): bands need no front end where the data are
    bands. In place.
    """
    name, old = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    conv = models.conv3x3(shape[0], old.out_channels, bias=old.bias is not None)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu", generator=stream(seed, "stem"))
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, conv)


@dataclass(frozen=True, kw_only=True)
class AutoEncoder:
    """Training of a `WAE` whose trunks are the task's network: (task, seed) -> `History`. stages: see
    `WaveletAutoEncoder`.
    """

    stages: tuple = (0.0, 0.0, 1.0)

    def __call__(self, task, seed):
        dataset = task.load()
        return train(
            wae(task, dataset, seed), dataset, task.recipe, [WaveletAutoEncoder(stages=self.stages)], seed
        )


def ours(task):
    """Whether the task's network is one of ours: only of these the chapter can build another of a quarter of
    the width.
    """
    return task.network in models.NETWORKS


def wae(task, dataset, seed=0):
    """A `WAE` on the task's network without its first halving, and one with a quarter of its channels."""
    c, height, width = dataset.shape
    half = (c, (height + 1) // 2, (width + 1) // 2)
    init = stream(seed, "initial weights").initial_seed()

    def trunk(settings):
        net = models.build(task.network, dataset.classes, half, seed=init, **settings)
        wavelet.keep_sizes_(net, half)
        features, net.head = net.head.in_features, nn.Identity()
        return net, features

    low, F_L = trunk(task.widths)
    widths = low.settings()["widths"]
    high, F_H = trunk(
        task.widths
        | {"widths": [[max(4, v // 4) for v in w] if isinstance(w, list) else max(4, w // 4) for w in widths]}
    )
    with models.seeded(init):
        return WAE(c, dataset.classes, low, high, (F_L, F_H)).to(dataset.device)


def arms(task, dataset, kinds=(BANDS, S2D)):
    """The full resolution and the arms of these names. Where no stride can be taken out, the stems halve all
    of the network's maps.
    """
    keep = not takes_stem(task, dataset)
    made = {
        BANDS: dict(methods=(WaveletStem(keep=keep),)),
        S2D: dict(methods=(WaveletStem(kind="space-to-depth", keep=keep),)),
        STRIDED: dict(methods=(WaveletStem(kind="strided", keep=keep),)),
        LOW: dict(methods=(WaveletStem(kind="low", keep=keep),)),
        RAW: dict(methods=(WaveletStem(keep=keep, standardize=False),)),
        WIDE: dict(methods=(WaveletStem(keep=keep, standardize=False),), network=wider(task, dataset)),
        PUSHED: dict(methods=(WaveletStem(keep=False),)),
        LONGER: dict(methods=(WaveletStem(keep=keep),), changes={"epochs": AIM * task.recipe.epochs}),
        READY: dict(fit=Precomputed()),
        JOINT: dict(fit=AutoEncoder()),
        STAGED: dict(fit=AutoEncoder(stages=THREE_STAGES)),
    }
    controls = {S2D, STRIDED, LOW}
    return [
        Arm(name=FULL, role="baseline"),
        *(Arm(name=k, role="control" if k in controls else "method", **made[k]) for k in kinds),
    ]


def wider(task, dataset):
    """Settings of our networks with twice the channels in the first stage: a quarter of the pixels times four
    are as many products.
    """
    if not ours(task):
        return {}
    first, *rest = task.build(dataset).settings()["widths"]
    return {"widths": [[2 * w for w in first] if isinstance(first, list) else 2 * first, *rest]}


def takes_stem(task, dataset, kind="bands", keep=True):
    """Why the task's network cannot take such a stem, in words; "" if it can."""
    try:
        wavelet.wavelet_stem_(task.build(dataset), dataset, kind=kind, keep=keep)
    except (NoEffect, BadInput) as error:
        return str(error)
    return ""


def all_arms(task, dataset):
    """(arms, sentences): every arm that the task's network can take, and why others are left out."""
    kinds, left_out = [BANDS, LONGER, S2D, RAW], []
    why = takes_stem(task, dataset)
    keep = not why
    if why:
        left_out.append(f"All stems halve all maps: {why}.")
    for name, how in (
        (STRIDED, dict(kind="strided", keep=keep)),
        (LOW, dict(keep=keep)),
        (PUSHED, dict(keep=False)),
    ):
        why = takes_stem(task, dataset, **how)
        if why:
            left_out.append(f"Left out: {name}. {why}.")
        elif name != PUSHED or keep:
            kinds.append(name)
    if ours(task) and keep:
        kinds += [WIDE, READY, JOINT, STAGED]
    else:
        left_out.append(
            f"Left out: {WIDE}, {READY}, {JOINT} and {STAGED}, which are built for our networks, whose widths are lists."
        )
    return arms(task, dataset, kinds), left_out


def everything(task, dataset):
    """Every arm at a part of the task's epochs, one at `AIM` times as many: (`Comparison`, sentences).

    One seed in the quick preset, an illustration.
    """
    short = task.but(epochs=max(1.0, SHARE[task.preset] * task.recipe.epochs), target=None)
    grid = task.preset in ("study", "full")
    seeds = {} if grid else {"seeds": 1}
    if task.preset == "quick":
        short = short.but(held=250, images=2500)
    found, left_out = all_arms(short, dataset)
    return compare(
        short,
        found,
        quantity="training time",
        claim={BANDS: AIM},
        illustration=not grid,
        title="all arms",
        **seeds,
    ), left_out


def everything_table(comparison):
    """A row per arm: accuracy at equal epochs, time and FLOPs of a step against the full resolution."""
    base, rows = comparison.histories(FULL), {}
    for a in comparison.arms:
        h = comparison.histories(a.name)
        difference = [x.accuracy - b.accuracy for x, b in zip(h, base, strict=True)]
        shares = [e["energy_share"] for e in _energies(h)]
        rows[a.name] = {
            "accuracy %": f"{stats.mean(x.accuracy for x in h):.2f}",
            "points": "" if a.name == FULL else f"{stats.mean(difference):+.2f}",
            "s in all": f"{stats.mean(x.seconds for x in h):.2f}",
            "times faster": ""
            if a.name == FULL
            else f"{stats.mean(b.seconds for b in base) / stats.mean(x.seconds for x in h):.2f}x",
            "by FLOPs": ""
            if a.name == FULL
            else f"{stats.mean(b.flops for b in base) / stats.mean(x.flops for x in h):.2f}x",
            "ms a step": f"{1e3 * stats.median(x.step_seconds for x in h):.2f}",
            "energy share of I_H": f"{stats.mean(shares):.1%}" if shares else "",
        }
    n = len(comparison.blocks)
    return pd.DataFrame(rows).T.rename_axis(
        f"{comparison.task.recipe.epochs:g} epochs, {n} seed{'s' * (n > 1)}"
    )


def _energies(histories):
    """What the auto-encoders among these runs noted at the end, of those that did not diverge."""
    return [e for h in histories if not h.diverged for e in h.events if "energy_share" in e]


def everything_figure(comparison):
    """(figure, caption): final accuracy over the seconds of the whole run, every arm and seed a dot."""
    figure, axes = figures.new(width=8.0, height=4.2)
    names = [a.name for a in comparison.arms]
    colours, kinds = figures.colours(names), len(figures.COLOURS)
    for i, name in enumerate(names):
        h = comparison.histories(name)
        x, y = [v.seconds for v in h], [v.accuracy for v in h]
        colour, mark = (
            colours[name],
            "os^"[max(0, i - 1) // kinds],
        )  # a second round of the colours has another mark
        axes.plot(x, y, mark, color=colour, ms=4, alpha=0.4)
        axes.plot(stats.mean(x), stats.mean(y), mark, color=colour, ms=9, label=name)
    axes.set_xlabel("seconds on the clock, whole run")
    axes.set_ylabel("final validation accuracy (%)")
    axes.set_xlim(left=0)
    figure.legend(loc="outside right center", fontsize=8)
    n = len(comparison.blocks)
    seeds = f"{n} seeds, large marks are means" if n > 1 else "one seed: an illustration, no verdict"
    return figure, (
        f"Up and to the left is better: more accuracy in less time, equal epochs ({seeds}); only *{LONGER}* trains {AIM:g} times as long."
    )


def say_everything(comparison):
    """The arms at equal epochs, in a sentence."""
    table = everything_table(comparison)
    parts = [f"{n}: {r['points']} points, {r['times faster']}" for n, r in table.iterrows() if n != FULL]
    return (
        f"At {comparison.task.recipe.epochs:g} epochs (n={len(comparison.blocks)}): " + "; ".join(parts) + "."
    )


# Costs


def cost_table(task, dataset):
    """A training step of every network, timed in turn, and what FLOPs predict."""
    networks = {}
    for a in all_arms(task, dataset)[0]:
        if a.name == JOINT or not (a.fit or a.changes):  # other epochs are no other step
            networks[a.name] = model = wae(task, dataset) if a.fit else task.build(dataset, **a.network)
            for m in a.methods:
                wavelet.wavelet_stem_(
                    model, dataset, kind=m.kind, wavelet=m.wavelet, keep=m.keep, standardize=m.standardize
                )

    def loss(model, logits, y):
        return F.cross_entropy(logits, y) + 0.1 * sum(getattr(model, "terms", None) or ())

    return step_table(task, dataset, networks, loss)


def transform_table(task, dataset):
    """Milliseconds that the transform itself takes, per batch, and what precomputing the whole set takes
    once.
    """
    few = task.preset == "smoke"
    x, _ = _batch(dataset, task.recipe.batch_size)
    part = dataset.limit(min(1000, len(dataset.train)))
    bands = precompute(part)
    images, ready = (iter(_endless(d, len(x))) for d in (part, bands))
    work = {f"{w} of a batch": lambda w=w: analysis(x, w) for w in wavelet.FILTERS}
    work |= {
        "reading and augmenting a batch of images": lambda: next(images),
        "the same of precomputed bands": lambda: next(ready),
    }
    work |= {f"precomputing {len(part.train):,} images": lambda: precompute(part)}
    times = interleaved(work, repeats=3 if few else 11, warm_up=1, device=dataset.device, seconds=1)
    return pd.DataFrame({"ms": {n: f"{1e3 * stats.median(t):.2f}" for n, t in times.items()}}).rename_axis(
        f"batch of {len(x)}"
    )


def _endless(dataset, size):
    batches = dataset.shuffled(size, stream(0, "costs"))
    while True:
        yield from batches


def _batch(dataset, size=64):
    return next(iter(Batches(dataset, min(size, len(dataset.train)), stream(0, "numerics"))))


# Numerics


def by_hand():
    """The four bands of 2 x 2 pixels that can be added up by head."""
    cases = {
        "constant 1": [[1, 1], [1, 1]],
        "bright row above": [[1, 1], [0, 0]],
        "bright column left": [[1, 0], [1, 0]],
        "checkerboard": [[1, -1], [-1, 1]],
    }
    rows = {
        n: haar(torch.tensor(v, dtype=torch.float32)[None, None]).flatten().tolist() for n, v in cases.items()
    }
    return pd.DataFrame(rows, index=["A", "H", "V", "D"]).T.rename_axis("2 x 2 pixels")


def check(task, dataset):
    """The numerics on this data set's images: a table of what was found."""
    x = _batch(dataset)[0]
    rows = {}
    for w in wavelet.FILTERS:
        bands = analysis(x.double(), w)
        height, width = x.shape[-2:]
        rows[f"{w}: reconstruction, largest error"] = (
            f"{(synthesis(bands, w)[..., :height, :width] - x).abs().max():.1e}"
        )
        even = wavelet.even(x.double())
        rows[f"{w}: energy of the bands less the image's, relative"] = (
            f"{(bands.square().sum() / even.square().sum() - 1).item():+.1e}"
        )
    two = literal_pool(x)
    rows["two-level Haar pooling against 2 x average pooling, largest difference"] = (
        f"{(two - 2 * F.avg_pool2d(wavelet.even(x), 2)).abs().max():.1e}"
    )
    mirrored = flip_bands(haar(wavelet.even(x))) - haar(wavelet.even(x).flip(-1))
    rows["mirrored bands against bands of the mirrored image, largest difference"] = (
        f"{mirrored.abs().max():.1e}"
    )
    if not any(n % 2 for n in x.shape[-2:]):
        rows["precomputed batches against bands of the same crops and flips, largest difference"] = (
            f"{flip_check(dataset):.1e}"
        )
    s2d, mix = space_to_depth(x), haar_matrix(dataset.shape[0]).to(x)[..., None, None]
    rows["Haar as a 1 x 1 convolution of space-to-depth, largest difference"] = (
        f"{(F.conv2d(s2d, mix) - haar(x)).abs().max():.1e}"
    )
    return pd.DataFrame({"result": rows}).rename_axis("what")


def literal_pool(x):
    """Wavelet pooling as it is described: both levels, the first level's details dropped, rebuilt from the
    second level's bands.
    """
    level1 = haar(x)
    low = level1.chunk(4, 1)[0]
    return inverse_haar(haar(low))[..., : low.shape[-2], : low.shape[-1]]


def energy(dataset):
    """Share of the energy of the centred training images in each band, by wavelet: why the low band carries
    so much.
    """
    x = dataset.normalize(dataset.train.x[:1000])
    rows = {}
    for w in wavelet.FILTERS:
        parts = [b.square().sum().item() for b in analysis(x, w).chunk(4, 1)]
        rows[w] = {b: f"{p / sum(parts):.1%}" for b, p in zip(wavelet.BANDS, parts, strict=True)}
    return pd.DataFrame(rows).T.rename_axis("energy")


def bands_figure(dataset, index=1):
    """(figure, caption): an image, its four bands, and its mirror image rebuilt from mirrored bands."""
    x = dataset.normalize(dataset.train.x[index : index + 1])
    bands = haar(x)
    pictures = {"image": x, **{f"band {n}": b for n, b in zip(wavelet.BANDS, bands.chunk(4, 1), strict=True)}}
    pictures["from mirrored bands"] = inverse_haar(flip_bands(bands))
    figure, axes = figures.new(len(pictures), width=10.0, height=2.3)
    for ax, (name, p) in zip(axes, pictures.items(), strict=True):
        p = p[0].permute(1, 2, 0).cpu()
        low, high = (
            (p.min(), p.max())
            if name in ("image", "band A", "from mirrored bands")
            else (-p.abs().max(), p.abs().max())
        )
        p = ((p - low) / (high - low).clamp_min(1e-6)).numpy()
        ax.imshow(p if p.shape[-1] == 3 else p[..., 0], cmap="gray", interpolation="nearest", vmin=0, vmax=1)
        ax.set_title(name, fontsize=10)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.grid(False)
        ax.set_xlabel(f"{p.shape[1]} x {p.shape[0]} pixels", fontsize=8)
    return figure, (
        "A is the image at half the resolution; H has its horizontal edges, V the vertical ones, D the rest (grey is 0). Negating V and D "
        "in the mirrored bands gives the mirrored image back."
    )


def wae_table(comparison):
    """What the auto-encoders came to: energy share of the high image, reconstruction, stages and their
    seconds.
    """
    rows = {}
    for name in (JOINT, STAGED):
        if not any(a.name == name for a in comparison.arms):
            continue
        h = comparison.histories(name)
        ends = _energies(h)
        begins = [f"{e['stage']} at step {e['step']:,}" for e in h[0].events if "stage" in e]
        rows[name] = {
            "energy share of I_H": f"{stats.mean(e['energy_share'] for e in ends):.1%}" if ends else "–",
            "aim": "below 20 %",
            "reconstruction": f"{stats.mean(e['snr'] for e in ends):.1f} dB" if ends else "–",
            "diverged": f"{sum(x.diverged for x in h)} of {len(h)}",
            "accuracy %": f"{stats.mean(x.accuracy for x in h):.2f}",
            "stages": "; ".join(begins) or "joint from the start",
        }
    return pd.DataFrame(rows).T.rename_axis("auto-encoder")


def flip_check(dataset):
    """Largest difference between precomputed batches and bands of the same crops and flips made on images
    (even offsets).
    """
    few = replace(dataset.limit(min(64, len(dataset.train))), flip=True)
    bands = precompute(few)
    g = stream(0, "flips")
    index = torch.arange(len(few.train))
    dy, dx = (torch.randint(bands.pad + 1, (len(index),), generator=g) for _ in range(2))
    mirrored = torch.rand(len(index), generator=g) < 0.5
    ready = bands.shuffled(len(index), g).cut(index, dy, dx, mirrored)
    images = Batches(replace(few, pad=2 * bands.pad), len(index), g)
    x = haar(images.cut(index, 2 * dy, 2 * dx, mirrored) * _std(few) + _mean(few))
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) * 255 for v in (bands.mean, bands.std))
    return ((2 * 255 * x - mean) / std - ready).abs().max().item()


def _mean(dataset):
    return torch.tensor(dataset.mean).view(1, -1, 1, 1)


def _std(dataset):
    return torch.tensor(dataset.std).view(1, -1, 1, 1)
