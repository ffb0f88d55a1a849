"""Chapter 6.4, the word taken literally: what candidates take and damage, plans under budgets, arms and
controls, and the checks.
"""

import copy
import itertools
import json
import math
import statistics as stats
from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn

from effilib import figures, models, surgery, tasks
from effilib.data import Batches
from effilib.errors import BadInput
from effilib.experiment import Arm, compare
from effilib.methods.layer_replacement import (
    ORIGINAL,
    LayerReplacement,
    Setting,
    Site,
    guard,
    knapsack,
    pick,
    replace_,
    replacement,
    say,
    spectral,
    survey,
)
from effilib.methods.net2net import thin_
from effilib.training import EVALUATIONS, LAYOUTS, stream, train

BUDGET = 0.6
AIM = 1.43  # step time at most 0.7x
BUDGETS = (0.75, 0.6, 0.5, 0.35)
NARROW = 0.7  # of every width, in blocks of 16 channels: about the same time as the replaced network
WIDER = {
    "widths": (64, 128, 256),
    "blocks": (1, 1, 1),
}  # convolutions are most of the step here; at half of it other work is a third
SIZES = {
    "quick": dict(epochs=0.6),
    "study": dict(epochs=4, held=1500, widths=WIDER),
    "full": dict(widths=WIDER),
}
FEW = {  # rounds of a measurement; evaluations of a run
    "smoke": dict(repeats=3, evaluations=2),
    "quick": dict(repeats=3, evaluations=5),
    "study": dict(repeats=7, evaluations=8),
}
DENSE, REPLACED, NARROWED = "as built", f"replaced, budget {BUDGET:g}", "narrower, as built"


def wide(book):
    """This chapter's task: a network so wide that convolutions dominate, fewer epochs in the short presets, 2
    points of margin.
    """
    t = book.task
    task = tasks.task(
        t.preset,
        t.dataset,
        "" if t.network == "resnet" else t.network,
        "wide",
        device=t.device,
        seeds=t.seeds,
    )
    own = {k: v for k, v in SIZES.get(t.preset, {}).items() if k != "widths" or task.network == "resnet"}
    return task.but(**own, margin=2.0, target=None)


@dataclass(frozen=True, kw_only=True)
class Narrower:
    """An arm's `fit`: the task's network with `factor` of every width, in multiples, trained from scratch; 1
    is the network as built.
    """

    factor: float = 1.0
    multiple: int = 16
    evaluations: int = EVALUATIONS

    def __call__(self, task, seed):
        dataset = task.load()
        model = task.build(dataset, seed)
        if self.factor < 1:
            thin_(model, self.factor, self.multiple)
            if task.network in models.NETWORKS:  # as wide as it is now
                models.initialize_(model, stream(seed, "initial weights").initial_seed())
        return train(model, dataset, task.recipe, (), seed, evaluations=self.evaluations)


def method(preset, budget=BUDGET, **settings):
    """Layer replacement as this preset runs it."""
    return LayerReplacement(budget=budget, **FEW.get(preset, {}), **settings)


def arms(task):
    """The judged arms: as built, replaced, and the control that could beat it: the same network, narrower."""
    few = {k: v for k, v in FEW.get(task.preset, {}).items() if k == "evaluations"}
    found = [
        Arm(name=DENSE, role="baseline", fit=Narrower(**few)),
        Arm(name=REPLACED, fit=method(task.preset)),
        Arm(
            name=NARROWED,
            role="control",
            fit=Narrower(factor=NARROW, multiple=2 if task.preset == "smoke" else 16, **few),
        ),
    ]
    try:
        surgery.nodes(task.build(task.load()))
    except BadInput:  # its widths cannot be changed
        del found[2]
    return found


def grid(task):
    """Other budgets, one seed; in the quick preset they are planned and measured, not trained."""
    few = {k: v for k, v in FEW.get(task.preset, {}).items() if k == "evaluations"}
    found = [Arm(name=DENSE, role="baseline", fit=Narrower(**few))]
    return found + [Arm(name=f"budget {b:g}", fit=method(task.preset, b)) for b in BUDGETS if b != BUDGET]


# The survey of this task's network


@dataclass(frozen=True)
class Look:
    """A network, one batch, the setting in which its step is measured, and what the survey found."""

    model: nn.Module
    x: torch.Tensor
    y: torch.Tensor
    setting: Setting
    found: dict


def look(task, dataset):
    """Survey the task's network as the arm does it, with a seed of its own."""
    few = {"repeats": FEW[task.preset]["repeats"]} if task.preset in FEW else {}
    setting = Setting.of(task.recipe, dataset.device, **few)
    x, y = next(iter(Batches(dataset, task.recipe.batch_size, stream(0, "survey"))))
    layout = LAYOUTS[setting.layout]
    model = task.build(dataset).to(memory_format=layout)
    x = x.contiguous(memory_format=layout)
    return Look(model, x, y, setting, survey(model, x, y, setting))


def latency_table(seen):
    """Milliseconds of a training step of every candidate at every layer; a dash where one does not fit or
    saves no products.
    """
    rows = {
        n: {c: 1e3 * v["seconds"] for c, v in choices.items()} for n, choices in seen.found["layers"].items()
    }
    return pd.DataFrame(rows).T.rename_axis("ms a training step")


def damage_table(seen):
    """The loss of Fisher potential of every candidate at every layer, in % of the network's."""
    rows = {
        n: {c: 100 * v["damage"] for c, v in choices.items() if c != ORIGINAL}
        for n, choices in seen.found["layers"].items()
    }
    return pd.DataFrame(rows).T.rename_axis("potential lost, %")


def left_table(seen):
    """The convolutions that are left alone, with the reason."""
    return pd.DataFrame({"why it is left alone": seen.found["left"]}).rename_axis("layer")


def latency_figure(seen):
    """(figure, caption): what FLOPs promise of each candidate, and what its training step keeps."""
    figure, axes = figures.new(width=7.4, height=4.4)
    kinds = list(dict.fromkeys(c for v in seen.found["layers"].values() for c in v if c != ORIGINAL))
    top = 1.0
    for i, c in enumerate(kinds):
        points = [
            (v[ORIGINAL]["flops"] / v[c]["flops"], v[ORIGINAL]["seconds"] / v[c]["seconds"])
            for v in seen.found["layers"].values()
            if c in v
        ]
        marker, colour = "o^sDvPX*"[i % 8], figures.COLOURS[i % len(figures.COLOURS)]
        axes.plot(*zip(*points, strict=True), marker, color=colour, label=c, alpha=0.85)
        top = max([top, *(v for p in points for v in p)])
    axes.plot([1, top], [1, top], "--", color="black", lw=1, label="as FLOPs promise")
    axes.axhline(1, color="black", lw=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    figures.plain_log(axes.xaxis, values=[v for v in (1, 1.5, 2, 3, 5, 8, 16) if v <= 1.2 * top])
    figures.plain_log(axes.yaxis, values=[v for v in (0.25, 0.5, 1, 1.5, 2, 3, 5, 8, 16) if v <= 1.2 * top])
    axes.set_xlabel("FLOPs of the convolution / FLOPs of the candidate (log scale)")
    axes.set_ylabel("its time / the candidate's time (log scale)")
    axes.legend(fontsize=8, ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure, (
        "Every dot is a candidate at one layer: a training step in the number format and layout of training. Below the dashed line it "
        "saves less time than FLOPs; below 1 it is slower than what it replaces, and is not taken."
    )


def plans(seen, budgets=BUDGETS):
    """A plan per budget, after the guard."""
    return {b: guard(seen.model, pick(seen.found, b), seen.x, seen.y, seen.setting) for b in budgets}


def plans_table(found):
    """What each budget leads to."""
    rows = {}
    for budget, plan in found.items():
        rows[f"{budget:g}"] = {
            "foreseen": f"{plan['foreseen']:.2f}",
            "measured": f"{plan['measured']:.2f}",
            "replaced": ", ".join(f"{n}: {c}" for n, c in plan["layers"].items()) or "nothing",
            "taken back": ", ".join(f"{n}: {c}" for n, c in plan["reverted"].items()),
            "note": plan["note"],
        }
    return pd.DataFrame(rows).T.rename_axis("budget")


def plans_figure(found):
    """(figure, caption): step time over the budget, foreseen and measured."""
    figure, axes = figures.new(width=6.4, height=3.8)
    budgets = sorted(found)
    axes.plot(budgets, budgets, "--", color="black", lw=1, label="the budget")
    axes.plot(
        budgets,
        [found[b]["foreseen"] for b in budgets],
        "D-",
        color=figures.COLOURS[1],
        mfc="none",
        label="foreseen from the table",
    )
    axes.plot(
        budgets,
        [found[b]["measured"] for b in budgets],
        "o-",
        color=figures.COLOURS[0],
        label="measured, whole step",
    )
    axes.set_xlabel("budget (share of the step's time)")
    axes.set_ylabel("share of the step's time")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=9)
    return figure, (
        "The table of single layers foresees the whole step as far as layers do not disturb each other. Where the orange line lies above "
        "the dashed one, the fastest layers do not reach the budget: what can't be replaced takes the rest."
    )


# Checks


def toy():
    """Two layers, three choices each, a limit of 10 ms, by hand."""
    seconds, damages = [[8, 4, 2], [6, 5, 1]], [[0, 1, 5], [0, 1, 2]]
    picks = knapsack(seconds, damages, 10)
    rows = []
    for pair in itertools.product(range(3), repeat=2):
        t, d = (sum(v[i][c] for i, c in enumerate(pair)) for v in (seconds, damages))
        rows.append(
            {
                "choices": str(pair),
                "ms": t,
                "damage": d,
                "fits": "yes" if t <= 10 else "",
                "chosen": "<-" if list(pair) == picks else "",
            }
        )
    return pd.DataFrame(rows).set_index("choices")


@torch.no_grad()
def check(seen, seed=0):
    """The knapsack against trying everything, factorisations against the filters, and that a plan replays to
    the same weights.
    """
    g, rows = stream(0, "checks of 6.4"), []
    wrong, trials = 0, 100
    for _ in range(trials):
        seconds = torch.randint(1, 40, (4, 4), generator=g).tolist()
        damages = torch.randint(0, 9, (4, 4), generator=g).tolist()
        limit = 20 + int(torch.randint(0, 100, (1,), generator=g))
        resolution = 1 / limit  # whole milliseconds: nothing is rounded
        fitting = [
            p
            for p in itertools.product(range(4), repeat=4)
            if sum(seconds[i][c] for i, c in enumerate(p)) <= limit
        ]
        if fitting:
            picks = knapsack(seconds, damages, limit, resolution)
            best = min(sum(damages[i][c] for i, c in enumerate(p)) for p in fitting)
            wrong += tuple(picks) not in fitting or sum(damages[i][c] for i, c in enumerate(picks)) != best
    rows.append((f"knapsack against trying everything, {trials} cases: not the best", str(wrong)))
    conv = nn.utils.skip_init(nn.Conv2d, 32, 32, 3, padding=1, bias=False)
    conv.weight.copy_(torch.randn(32, 32, 3, 3, generator=g))
    site = Site(C=32, O=32, kernel=(3, 3), stride=(1, 1), padding=(1, 1))
    x = torch.randn(256, 32, 8, 8, generator=g)
    y = conv(x)
    for c in ("lowrank/1", "lowrank/4", "spatial/2", "group/4", "dwsep", "bneck/2"):
        error = float((replacement(c, site, conv=conv)(x) - y).norm() / y.norm())
        what = "full rank" if c == "lowrank/1" else f"spectral tail {spectral(conv.weight, c):.4f}"
        rows.append(
            (
                f"{c}, factorised: relative error on white noise ({what})",
                f"{error:.1e}" if c == "lowrank/1" else f"{error:.4f}",
            )
        )
    names = list(seen.found["layers"])
    plan = {"layers": {n: list(seen.found["layers"][n])[1] for n in names}, "norm": seen.found["norm"]}
    twice = []
    for text in (plan, json.loads(json.dumps(plan))):
        model = copy.deepcopy(seen.model)
        replace_(model, text, seed)
        twice.append(model.state_dict())
    same = twice[0].keys() == twice[1].keys() and all(
        torch.equal(a, b) for a, b in zip(*(t.values() for t in twice), strict=True)
    )
    rows.append(("a plan, and the same plan from JSON: the same weights", "yes" if same else "no"))
    rows.append(
        (
            "logits keep their shape",
            "yes" if model.eval()(seen.x[:2]).shape == seen.model.eval()(seen.x[:2]).shape else "no",
        )
    )
    seen.model.train()
    return pd.DataFrame(rows, columns=["what", "result"]).set_index("what")


def trained_table(task, dataset, seen, epochs=1):
    """Spectral damage after a little training, against what was there before it: the share of ||W|| that a
    candidate cannot hold.
    """
    model = copy.deepcopy(seen.model)
    before = {n: model.get_submodule(n).weight.detach().clone() for n in seen.found["layers"]}
    train(model, dataset, task.but(epochs=min(epochs, task.recipe.epochs)).recipe, (), 0, evaluations=1)
    rows = {}
    for n, W in before.items():
        now = model.get_submodule(n).weight
        fitting = [
            c
            for c in ("lowrank/2", "lowrank/4", "spatial/2", "group/4", "dwsep", "bneck/2")
            if c in seen.found["layers"][n]
        ]
        rows[n] = {c: f"{spectral(W, c):.3f} → {spectral(now, c):.3f}" for c in fitting}
    return pd.DataFrame(rows).T.rename_axis("random → trained")


# What happened


def what_happened(comparison):
    """A row an arm: step, search, whole training and accuracy against the network as built."""
    base = comparison.histories(comparison.baseline)
    rows = {}
    for arm in comparison.arms:
        runs = comparison.histories(arm.name)
        steps = [h.step_seconds / b.step_seconds for h, b in zip(runs, base, strict=True)]
        rows[arm.name] = {
            "ms a step": f"{1e3 * stats.median(h.step_seconds for h in runs):.1f}",
            "step": f"{stats.fmean(steps):.2f}",
            "FLOPs": f"{stats.fmean(h.flops / h.steps for h in runs) / stats.fmean(h.flops / h.steps for h in base):.2f}",
            "search s": f"{stats.fmean(h.kinds.get('search', {'seconds': 0})['seconds'] for h in runs):.2f}",
            "whole training": f"{stats.fmean(h.seconds / b.seconds for h, b in zip(runs, base, strict=True)):.2f}",
            "accuracy, points": f"{stats.fmean(h.accuracy - b.accuracy for h, b in zip(runs, base, strict=True)):+.2f}",
        }
    return pd.DataFrame(rows).T.rename_axis("relative to as built")


def chosen(comparison):
    """The plan of every seed."""
    found = {}
    for block in comparison.blocks:
        for name, history in block["arms"].items():
            for event in history.events:
                if "plan" in event:
                    found[f"seed {block['seed']}, {name}"] = {"plan": say(event["plan"])}
    return pd.DataFrame(found).T.rename_axis("")


def pays_after(comparison, name=REPLACED):
    """After how many steps the search has paid for itself, in a sentence."""
    base, runs = comparison.histories(comparison.baseline), comparison.histories(name)
    saved = stats.fmean(b.step_seconds - h.step_seconds for h, b in zip(runs, base, strict=True))
    search = stats.fmean(h.kinds.get("search", {"seconds": 0})["seconds"] for h in runs)
    if saved <= 0:
        return f"The search takes {search:.1f} s; steps did not get shorter, so it never pays."
    steps = math.ceil(search / saved)
    saves = f"The search takes {search:.1f} s and saves {1e3 * saved:.1f} ms a step"
    return f"{saves}: it has paid for itself after {steps} steps; these runs had {runs[0].steps}."


def say_plans(found):
    """The budgets in a sentence."""
    return (
        "; ".join(
            f"{b:g}: foreseen {p['foreseen']:.2f}, measured {p['measured']:.2f}" for b, p in found.items()
        )
        + " of the step's time."
    )


def trained_budgets(task):
    """Other budgets trained with one seed, an illustration; the quick preset has no time for it."""
    if task.preset not in ("study", "full"):
        return pd.DataFrame(
            {"": ["only planned and measured in this preset: see above"]}, index=["other budgets"]
        )
    return what_happened(
        compare(task, grid(task), quantity="time per step", seeds=1, illustration=True, title="budgets")
    )
