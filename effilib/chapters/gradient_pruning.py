"""Chapter 4.1: shares of zeros by the closed forms and in training, the structured subsets' times, and the
arms.
"""

import math
import statistics as stats
from dataclasses import replace

import pandas as pd
import torch
import torch.nn.functional as F

from effilib import convolution, figures
from effilib.chapters.products import Variant, against_exact, formats, pass_times
from effilib.convolution import Approximation, approx_conv2d
from effilib.data import Batches
from effilib.experiment import Arm
from effilib.methods.gradient_pruning import (
    GradientPruning,
    GradientSubsets,
    Pruner,
    lognormal_threshold,
    placements,
    prune,
    prune_gradients_,
    subset_gradients_,
    threshold,
    zero_fraction,
)
from effilib.models import stream
from effilib.training import train

RATES = (0.7, 0.8, 0.9, 0.99)
# A pruned step draws a random number an element and takes several times as long as an exact one.
RUNS = {"quick": dict(epochs=1.1, evaluations=10), "study": dict(epochs=4, evaluations=12)}
GRID = {"quick": dict(epochs=0.75, evaluations=1, seeds=1), "study": dict(epochs=2, evaluations=1, seeds=1)}
SUBSETS = {
    "outputs for dX and dW": dict(dx="outputs", dw="outputs"),
    "outputs for dX, samples for dW": dict(dx="outputs", dw="samples"),
    "samples for dX and dW": dict(dx="samples", dw="samples"),
    "samples for dW, dX exact": dict(dx=None, dw="samples"),
}


def by_hand():
    """Four gradients, tau = 1: what each can become, with which probability, and its expectation."""
    rows = {}
    for g in (0.2, -0.5, 0.9, 1.5):
        small = abs(g) < 1
        sign = "" if g > 0 else "-"
        rows[f"{g:g}"] = {
            "becomes 0": f"{1 - abs(g):.0%}" if small else "never",
            "becomes tau or -tau": f"{sign}1 in {abs(g):.0%}" if small else "never",
            "stays": "never" if small else "always",
            "expectation": f"{g:g}",
            "variance |g| (tau - |g|)": f"{abs(g) * (1 - abs(g)):.2f}" if small else "0",
        }
    return pd.DataFrame(rows).T.rename_axis("g")


def samples(n=200_000):
    """Gradients of three laws: dict name -> (n,)."""
    g = stream(0, "laws")
    normal, sign = torch.randn(n, generator=g), torch.randn(n, generator=g).sign()
    exponential = -torch.rand(n, generator=g).clamp_min(1e-12).log()
    return {
        "normal": normal,
        "Laplace": exponential * sign,
        "lognormal (s = 2)": (2 * torch.randn(n, generator=g)).exp() * sign,
    }


def zeros_table(n=200_000):
    """The share of zeros that a target rate p really gives, by closed form and for gradients of three
    laws.
    """
    g, rows = stream(1, "laws"), {}
    laws = samples(n)
    for p in RATES:
        row = {"closed form, normal": f"{zero_fraction(p):.3f}"}
        row |= {name: f"{(prune(x, threshold(x, p), g) == 0).float().mean():.3f}" for name, x in laws.items()}
        rows[f"p = {p:.0%}"] = row
    return pd.DataFrame(rows).T.rename_axis("share of zeros")


def check_pruning(draws=1000):
    """Unbiasedness, variance, and what is left alone, over many draws; and that no forward pass changes."""
    g = stream(0, "numerics")
    x = torch.randn(500, generator=g, dtype=torch.float64)
    tau = threshold(x, 0.9).double()
    found = torch.stack([prune(x, tau, g) for _ in range(draws)])
    small = x.abs() < tau
    variance = x[small].abs() * (tau - x[small].abs())
    z = (found[:, small].mean(0) - x[small]) / (variance / draws).sqrt()
    values = found[:, small]
    images, w = torch.randn(4, 8, 6, 6, generator=g), torch.randn(8, 8, 3, 3, generator=g)
    pruned = approx_conv2d(images, w, output_gradient=lambda dy: prune(dy, threshold(dy, 0.9), g))
    rows = {
        f"largest |z| of the mean of {int(small.sum())} elements below tau": f"{z.abs().max():.1f}",
        "measured / expected variance, median": f"{(values.var(0) / variance).median():.2f}",
        "elements below tau become": "0, tau or -tau"
        if bool(((values == 0) | (values.abs() == tau)).all())
        else "SOMETHING ELSE",
        "elements from tau on": "unchanged"
        if torch.equal(found[:, ~small], x[~small].expand(draws, -1))
        else "CHANGED",
        "forward pass of a pruned layer": "bit-equal to the exact one"
        if torch.equal(pruned, F.conv2d(images, w))
        else "CHANGED",
    }
    return pd.DataFrame({"result": rows}).rename_axis("what")


def gradients(task, dataset, epochs=1.0):
    """The gradients that would be pruned, layer by layer, after `epochs` of training: dict "layer (place)" ->
    (n,), in fp32.
    """
    model = task.build(dataset)
    train(
        model,
        dataset,
        replace(task.recipe, epochs=min(epochs, task.recipe.epochs), precision="fp32"),
        evaluations=1,
    )
    x, y = next(iter(Batches(dataset, min(64, len(dataset.train)), stream(0, "numerics"))))
    chosen, found = convolution.layers(model, x[:2]), {}
    place = placements(model, chosen, x[:2])

    def keep(name):
        def gradient(g):
            found[f"{name} ({place[name]})"] = g.detach().flatten()
            return g

        def dx(dy, x, w, product):
            return gradient(product.backward(dy, x, w, (True, False))[0])

        return Approximation(output_gradient=gradient) if place[name] == "dO" else Approximation(dx=dx)

    convolution.convert_(chosen, {n: keep(n) for n in chosen}, "look", "gradients")
    F.cross_entropy(model.train()(x), y).backward()
    return dict(sorted(found.items()))


def laws_figure(found):
    """(figure, caption): the magnitudes of real gradients, every layer a line, against the normal and the
    lognormal law.
    """
    figure, axes = figures.new(width=8.5, height=3.6)
    bins = torch.linspace(-12, 3, 61)
    middle = (bins[1:] + bins[:-1]) / 2
    spreads = []
    for i, g in enumerate(found.values()):
        logs = (g[g != 0].abs() / (math.sqrt(math.pi / 2) * g.abs().mean())).log2()
        spreads.append(float(logs.std()) * math.log(2))
        density = torch.histogram(logs.cpu(), bins, density=True).hist
        axes.plot(
            middle,
            density,
            color=figures.COLOURS[0],
            lw=0.8,
            alpha=0.7,
            label="layers of this network" if i == 0 else None,
        )
    normal = torch.randn(400_000, generator=stream(0, "normal")).abs().log2()
    axes.plot(middle, torch.histogram(normal, bins, density=True).hist, color="black", lw=1.8, label="normal")
    s = stats.median(spreads)
    u = (
        middle * math.log(2) + s * s / 2 + 0.5 * math.log(math.pi / 2)
    ) / s  # lognormal of the same mean magnitude
    axes.plot(
        middle,
        math.log(2) / s / math.sqrt(2 * math.pi) * torch.exp(-u * u / 2),
        color=figures.COLOURS[1],
        lw=1.8,
        label=f"lognormal, s = {s:.1f}",
    )
    axes.set_xlabel("log2 of |g| / sigma, sigma estimated from the mean magnitude")
    axes.set_ylabel("density")
    axes.legend(fontsize=8)
    return figure, (
        f"Magnitudes of the gradients that are pruned, one thin line a layer. Normal gradients would have ln|g| spread by 1.11; here the "
        f"median layer has {s:.2f}. The wider the spread, the more zeros the same target rate gives."
    )


def density_table(found, p=0.9):
    """Shares of zeros of real gradients, layer by layer: with the normal threshold, against the closed form,
    and lognormal-aware.
    """
    g, rows, aim = stream(0, "densities"), {}, zero_fraction(p)
    for name, x in found.items():
        pruned = prune(x, threshold(x, p), g)
        aware = prune(x, lognormal_threshold(x, aim), g)
        rows[name] = {
            "zeros before": f"{(x == 0).float().mean():.3f}",
            f"zeros, p = {p:.0%}": f"{(pruned == 0).float().mean():.3f}",
            "closed form, normal": f"{aim:.3f}",
            "lognormal-aware": f"{(aware == 0).float().mean():.3f}",
            "cosine to the exact one": f"{F.cosine_similarity(x, pruned, 0):.2f}",
        }
    return pd.DataFrame(rows).T.rename_axis("layer")


def time_table(task, dataset, keep=0.5):
    """(table, times): passes of a network, exact, with pruned elements and with structured subsets, in every
    format.
    """
    x = dataset.normalize(dataset.train.x[:2])

    def pruned(model):
        prune_gradients_(model, Pruner(0.9, fifo=0), x, {}.copy, stream(0, "pruning"))

    def subset(how):
        return lambda model: subset_gradients_(model, keep, stream(0, "subsets"), x=x, **how)

    variants, groups = [], {}
    for p in formats(task.device):
        made = [
            Variant(name=f"{p}, exact", precision=p),
            Variant(name=f"{p}, elements pruned, p = 90%", precision=p, convert=pruned),
        ]
        made += [
            Variant(name=f"{p}, {n}, {keep:.0%}", precision=p, convert=subset(how))
            for n, how in SUBSETS.items()
        ]
        groups[p] = [v.name for v in made]
        variants += made
    times = pass_times(task, dataset, variants, seconds=6 if task.preset == "quick" else 25)
    return against_exact(times, groups), times


def time_figure(times, aim=1.3):
    """(figure, caption): how much faster the backward pass gets, by variant."""
    names = [n for n in times if not n.endswith("exact")]
    ratios = {n: times[f"{n.split(',')[0]}, exact"]["backward"] / times[n]["backward"] for n in names}
    figure, axes = figures.new(width=8.5, height=1.2 + 0.34 * len(names))
    for i, (n, r) in enumerate(ratios.items()):
        axes.barh(i, r, height=0.6, color=figures.COLOURS[1 if "elements" in n else 0])
        axes.text(r, i, f" {r:.2f}x", va="center", fontsize=8)
    axes.axvline(1, color="black", lw=1)
    axes.axvline(aim, color="black", lw=1, ls=":")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel(f"speed-up of the backward pass (x, whole network; dotted: the aim of {aim:g})")
    return figure, (
        "Pruned elements (second colour) save nothing on dense kernels: zeros are multiplied like any number, and drawing a random number "
        "an element comes on top. Subsets of whole channels or samples make the products themselves smaller."
    )


def fewer(task):
    """The same network a block or a layer smaller: the control that needs no approximation."""
    if task.network == "resnet":
        blocks = list(task.widths["blocks"])
        deepest = max(range(len(blocks)), key=lambda i: (blocks[i], i))
        if blocks[deepest] > 1:
            blocks[deepest] -= 1
            return {"blocks": tuple(blocks)}
        return {"widths": tuple(max(4, int(0.75 * w)) for w in task.widths["widths"])}
    return {}


def control(task):
    """The control: a smaller network where there is one, else a shorter schedule."""
    smaller = fewer(task)
    if smaller:
        return Arm(name="smaller network, exact", role="control", network=smaller)
    return Arm(name="fewer epochs, exact", role="control", changes={"epochs": 0.75 * task.recipe.epochs})


def arms(task):
    """The verdict arms: exact, the paper's pruning, in the study one structured variant, and the smaller
    network.
    """
    found = [Arm(name="exact", role="baseline"), Arm(name="pruned, p = 90%", methods=(GradientPruning(),))]
    if task.preset in ("study", "full"):
        found.append(Arm(name="half of the outputs for dX and dW", methods=(GradientSubsets(),)))
    return [*found, control(task)]


def grid(task):
    """The target rates, the lognormal-aware threshold, the batch's own tau, and the structured subsets."""
    several = task.preset in ("study", "full")
    found = [Arm(name="exact", role="baseline")]
    found += [
        Arm(name=f"p = {p:.0%}", methods=(GradientPruning(p=p),)) for p in (RATES if several else RATES[-1:])
    ]
    if several:
        found.append(Arm(name="p = 90%, the batch's own tau", methods=(GradientPruning(fifo=0),)))
    found.append(
        Arm(
            name="lognormal-aware, as many zeros",
            methods=(GradientPruning(p=round(zero_fraction(0.9), 3), law="lognormal"),),
        )
    )
    kinds = SUBSETS if several else {n: SUBSETS[n] for n in list(SUBSETS)[:3:2]}
    return [*found, *(Arm(name=f"half: {n}", methods=(GradientSubsets(**how),)) for n, how in kinds.items())]


def notes(history):
    """Of a run: mean share of zeros, error of the FIFO's prediction and cosine to the exact gradient."""
    event = next((e for e in reversed(history.events) if "density" in e), None)
    if not event or not event["density"]:
        return {"zeros": "", "tau's error": "", "cosine": ""}
    mean = {k: stats.mean(event[k].values()) for k in ("density", "error", "cosine")}
    return {
        "zeros": f"{1 - mean['density']:.2f}",
        "tau's error": f"{mean['error']:.0%}",
        "cosine": f"{mean['cosine']:.2f}",
    }


def achieved_figure(comparison):
    """(figure, caption): the achieved share of zeros of every layer and arm, against the closed form."""
    arms = [a for a in comparison.arms if any(isinstance(m, GradientPruning) for m in a.methods)]
    figure, axes = figures.new(width=8.5, height=1.4 + 0.36 * len(arms))
    for y, arm in enumerate(arms):
        event = next(e for e in reversed(comparison.histories(arm.name)[-1].events) if "density" in e)
        method = arm.methods[0]
        zeros = [1 - d for d in event["density"].values()]
        axes.plot(
            zeros,
            [y] * len(zeros),
            "o",
            color=figures.COLOURS[0],
            ms=5,
            alpha=0.6,
            label="layers" if y == 0 else None,
        )
        normal = method.law == "normal"
        foreseen = zero_fraction(method.p) if normal else method.p
        axes.plot(
            [foreseen] * 2, [y - 0.3, y + 0.3], color="black", lw=2, label="closed form" if y == 0 else None
        )
        if normal:
            axes.plot(
                method.p,
                y,
                "D",
                mfc="none",
                mec=figures.COLOURS[1],
                label="target rate p" if y == 0 else None,
            )
    axes.set_yticks(range(len(arms)), [a.name for a in arms])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("share of the pruned gradients' elements that are 0")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=3, fontsize=8)
    return figure, (
        "The share of zeros that training really had, layer by layer, against the closed form for normal gradients (bar) and the target "
        "rate (diamond): a target of 99 % leaves about 31 % of the elements, not 1 %."
    )
