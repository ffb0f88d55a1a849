"""Chapter II.9: what was decided, when and why: the toy case, a run's log as plain values, as a table and as
pictures, and its replay.
"""

import copy
import itertools
import json
import statistics as stats
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from effilib import figures, surgery
from effilib.chapters.prune_then_grow import Fit, mode_name, start
from effilib.data import Batches
from effilib.errors import BadInput
from effilib.methods.decision import GROWTH, Action, Epoch, Policy, Stage, Trace, decide, rates
from effilib.methods.prune_then_grow import grow_, plan
from effilib.methods.prune_train import prune_
from effilib.models import stream
from effilib.surgery import stages
from effilib.training import train

# By hand

SITUATIONS = {
    "all stages shrink": dict(lost=(0.1, 0.2)),
    "one stage has lost nothing": dict(lost=(0.1, 0.0)),
    "it was widened, which brought nothing": dict(lost=(0.1, 0.0), last="widen"),
    "it was widened, and its newborns died": dict(lost=(0.1, 0.0), last="widen", kept=4, before=40.0),
    "over-fitting": dict(lost=(0.1, 0.0), train=80.0),
    "the budget is nearly spent": dict(lost=(0.1, 0.0), spent=99.5),
    "there is no penalty": dict(lost=(0.0, 0.0), lam=0.0),
    "still improving": dict(lost=(0.1, 0.0), falling=0.9),
}


def situation(lost, last="", kept=16, before=60.0, train=62.0, spent=0.0, lam=1e-3, falling=1.0):
    """A trace of eight epochs with two stages.

    lost: share of its channels that each stage loses in every epoch. last: how stage 2 grew after the fourth
    epoch; kept: of the 16 channels born then how many live. before: accuracy (%) until then, 60 afterwards.
    train: accuracy on training images. spent: of a budget of 100; a growth costs 1. falling: factor on both
    losses an epoch. The penalty needs 2 epochs and had 8."""
    seen = tuple(
        Stage(
            name=f"stage {i + 1}",
            widths=(32,),
            live=(32,),
            lost=rate,
            born=16 if last and i else 0,
            kept=kept,
            widen=1.0,
            deepen=1.0,
        )
        for i, rate in enumerate(lost)
    )
    epochs = tuple(
        Epoch(
            epoch=e,
            train_loss=falling**e,
            train_accuracy=train,
            loss=falling**e,
            accuracy=before if e < 4 else 60.0,
            stages=seen,
        )
        for e in range(8)
    )
    actions = ((3, Action(kind=last, stage="stage 2")),) if last else ()
    return Trace(
        epochs=epochs,
        actions=actions,
        spent=spent,
        budget=100.0,
        lam=lam,
        idle=2.0,
        pressed=8.0,
        images=10_000,
    )


def toy():
    """What `decide` says in eight situations that can be checked by hand; rates are over the last two
    epochs.
    """
    rows = {}
    for name, given in SITUATIONS.items():
        trace = situation(**given)
        action = decide(trace)
        lost = " / ".join(f"{rate:.2f}" for rate in rates(trace, 2).values())
        rows[name] = {
            "rates": lost,
            "action": f"{action.kind} {action.stage}".strip(),
            "reason": action.reason,
        }
    return pd.DataFrame(rows).T.rename_axis("situation")


# Exactness


def check(task, dataset):
    """What each action changes of the outputs, relative to their spread, in eval and in training; and whether
    it can be undone.
    """
    x, y = next(iter(Batches(dataset, min(32, len(dataset.train)), stream(0, "numerics"))))
    model = task.build(dataset, **start(task))
    layout, rows = stages.find(model, dataset.shape), {}
    for growth, (i, name) in itertools.product(GROWTH, enumerate(stages.names(layout))):
        grown, widths = copy.deepcopy(model), {n.name: n.width for n in surgery.trace(model).nodes}
        try:
            done = grow_(grown, layout, i, growth, x=x, y=y, generator=stream(0, "growth"))
        except BadInput as error:
            rows[f"{growth} {name}"] = {
                "done": f"cannot be: {error}",
                "eval": "",
                "training": "",
                "undone": "",
            }
            continue
        row = {"done": "; ".join(done), **_changes(model, grown, x), "undone": ""}
        if growth == "widen":
            for node in surgery.trace(grown).nodes:
                surgery.select_(node, range(widths[node.name]))
            same = zip(model.state_dict().values(), grown.state_dict().values(), strict=True)
            row["undone"] = "bit for bit" if all(torch.equal(a, b) for a, b in same) else "no"
        rows[f"{growth} {name}"] = row
    dead = copy.deepcopy(model)
    node = surgery.nodes(dead)[-1]
    with torch.no_grad():
        for name, per in node.consumers.items():
            node.layer(name).weight[:, : node.width // 2 * per] = 0
    cut = copy.deepcopy(dead)
    rows["cut what nobody reads"] = {
        "done": "; ".join(prune_(cut, rule="readers")),
        **_changes(dead, cut, x),
        "undone": "",
    }
    return pd.DataFrame(rows).T.rename_axis("action")


def _changes(before, after, x):
    found = {}
    for name, mode in (("eval", False), ("training", True)):
        with torch.no_grad():
            a, b = (copy.deepcopy(m).train(mode)(x) for m in (before, after))
        found[name] = f"{(a - b).abs().max() / a.std():.0e}"
    return found


# The log


def seen(history):
    """Events of the procedure's epochs of SEARCH; none where a run decided nothing."""
    return [e for e in history.events if "seen" in e]


def account(history):
    """The procedure's last event: what was `spent` and `looked` of the `budget`, FLOPs, and the `stages` that
    it ends with.
    """
    return next(e for e in reversed(history.events) if "budget" in e)


def deciding(comparison):
    """The arms that decide."""
    return [a for a in comparison.arms if seen(comparison.histories(a.name)[0])]


def pictured(comparison):
    """The arm whose run is shown: the procedure in all of the time, on resized images where that was
    trained.
    """
    names = [a.name for a in comparison.arms]
    return next(n for n in (mode_name("windowed", True), mode_name("windowed")) if n in names)


def seconds(history, step):
    """Seconds on the clock at a step, interpolated between evaluations."""
    return float(np.interp(step, [r["step"] for r in history.rows], [r["seconds"] for r in history.rows]))


def _per_stage(epoch, key, form="{}"):
    return " / ".join(
        " + ".join(map(form.format, v)) if isinstance(v := s[key], list | tuple) else form.format(v)
        for s in epoch["stages"]
    )


def epochs(history):
    """A dict an epoch of SEARCH: what was seen of every stage, what was decided and why, and what was spent
    by then. Plain values.
    """
    budget = account(history)["budget"]
    return [
        {
            "epoch": e["epoch"] + 1,
            "decision": f"{e['action']['kind']} {e['action']['stage']}".strip(),
            "reason": e["action"]["reason"],
            "done": "; ".join(e["done"]),
            "widths": _per_stage(e["seen"], "widths"),
            "live": _per_stage(e["seen"], "live"),
            "depth": _per_stage(e["seen"], "depth"),
            "lost": _per_stage(e["seen"], "lost", "{:.3f}"),
            "going": _per_stage(e["seen"], "pending", "{:.3f}"),
            "loss": round(e["seen"]["loss"], 4),
            "accuracy %": round(e["seen"]["accuracy"], 2),
            "images": " x ".join(map(str, e["seen"]["size"])),
            "budget": f"{e['flops'] / budget:.3f}",
            "seconds": round(seconds(history, e["step"]), 2),
        }
        for e in seen(history)
    ]


def log(comparison):
    """All of it for the record: arm -> per seed the plan, by which `PruneThenGrow(plan=...)` does the same
    again, and every epoch.
    """
    return {
        arm.name: [
            {
                "seed": b["seed"],
                "plan": [list(step) for step in plan(h)],
                "budget": account(h)["budget"],
                "epochs": epochs(h),
            }
            for b, h in zip(comparison.blocks, comparison.histories(arm.name), strict=True)
        ]
        for arm in deciding(comparison)
    }


def table(history):
    """A row a decision: when, what and why, and how things stood; epochs in which it waited and cut nothing
    are left out.
    """
    columns = ["epoch", "decision", "reason", "done", "widths", "depth", "accuracy %", "budget", "seconds"]
    rows = [{k: e[k] for k in columns} for e in epochs(history) if e["decision"] != "wait" or e["done"]]
    return pd.DataFrame(rows, columns=columns).set_index("epoch")


def tried(comparison):
    """A row an arm that decides: the first seed's decisions and the network that it ends with; of all seeds
    how the budget was spent.
    """
    rows = {}
    for arm in deciding(comparison):
        runs = comparison.histories(arm.name)
        last = [account(h) for h in runs]
        rows[arm.name] = {
            "decisions": ", ".join(f"{k} {s}".strip() + f" at {e + 1}" for e, k, s in plan(runs[0]))
            or "none",
            "growths a run": f"{stats.mean(sum(k in GROWTH for _, k, _ in plan(h)) for h in runs):.1f}",
            "ends with": _per_stage(last[0], "widths"),
            "budget spent": f"{stats.mean((e['spent'] + e['looked']) / e['budget'] for e in last):.3f}",
            "of it looking": f"{stats.mean(e['looked'] / (e['spent'] + e['looked']) for e in last):.3f}",
        }
    return pd.DataFrame(rows).T.rename_axis("arm")


def replay(comparison, name):
    """The first seed's run of an arm, trained again by nothing but the plan in the record: is everything the
    same, to the last digit?
    """
    task, arm = comparison.task, next(a for a in comparison.arms if a.name == name)
    history, dataset = comparison.histories(name)[0], comparison.task.load()
    recorded = json.loads(json.dumps(log(comparison)))[name][0]  # as the record's file has it
    network, methods = arm.network, arm.methods
    if isinstance(arm.fit, Fit):
        network, methods = dict(arm.fit.start), (arm.fit.resizer, arm.fit.method)
    *resizers, method = methods
    model, method = task.build(dataset, recorded["seed"], **network), replace(method, plan=recorded["plan"])
    again = train(
        model, dataset, task.recipe, [*resizers, method], recorded["seed"], evaluations=task.evaluations
    )
    rows = {
        "decisions": [len(plan(h)) for h in (history, again)],
        "FLOPs": [f"{h.flops:.6e}" for h in (history, again)],
        "the network at the end": [_per_stage(account(h), "widths") for h in (history, again)],
        "validation loss at the end": [repr(h.rows[-1]["loss"]) for h in (history, again)],
        "test accuracy": [repr(h.test_accuracy) for h in (history, again)],
    }
    rows = {k: {"run": a, "replay": b, "the same": "yes" if a == b else "no"} for k, (a, b) in rows.items()}
    return pd.DataFrame(rows).T.rename_axis(f"{name}, seed {recorded['seed']}")


# Pictures

MARKS = {
    "widen": ("o", "widen"),
    "deepen": ("^", "deepen"),
    "shrink": ("v", "keep shrinking"),
    "stop": ("s", "stop"),
}


def run_figure(comparison, arm, seed=0):
    """(figure, caption): one run as a picture: channels over epochs with the decisions marked, accuracy over
    seconds.
    """
    history, base = comparison.histories(arm)[seed], comparison.histories(comparison.baseline)[seed]
    events, last = seen(history), account(history)
    per_epoch = events[0]["step"] / (events[0]["epoch"] + 1)
    figure, (left, right) = figures.new(2, width=10.5, height=4.3)
    for i, final in enumerate(last["stages"]):
        at = [next(s for s in e["seen"]["stages"] if s["name"] == final["name"]) for e in events]
        ends, colour = [e["epoch"] + 1 for e in events], figures.COLOURS[i % len(figures.COLOURS)]
        there = [sum(s["widths"]) for s in [*at, final]]
        left.step(
            [0, *ends, history.steps / per_epoch],
            [there[0], *there],
            where="pre",
            color=colour,
            lw=2,
            label=final["name"],
        )
        left.plot(ends, [sum(s["live"]) for s in at], ":", color=colour, lw=1.6)
        for e, wide in zip(events, there, strict=False):
            if e["action"]["stage"] == final["name"]:
                left.plot(
                    e["epoch"] + 1,
                    wide,
                    MARKS[e["action"]["kind"]][0],
                    color=colour,
                    ms=9,
                    mec="black",
                    zorder=3,
                )
    for e in events:
        if e["action"]["kind"] in MARKS and not e["action"]["stage"]:
            left.axvline(
                e["epoch"] + 1, color="black", lw=0.9, ls="--" if e["action"]["kind"] == "stop" else ":"
            )
    left.set_ylim(bottom=0)
    left.set_xlabel("epochs")
    left.set_ylabel("channels of a stage's nodes, together")
    left.set_title("channels: there (line), alive (dotted)")
    for h, colour, label in ((base, figures.GREY, comparison.baseline), (history, figures.COLOURS[0], arm)):
        right.plot(
            [r["seconds"] for r in h.rows], [r["accuracy"] for r in h.rows], color=colour, lw=2, label=label
        )
    ends, marked = [h.accuracy for h in (base, history)], []
    for kind, (marker, label) in MARKS.items():
        at = [seconds(history, e["step"]) for e in events if e["action"]["kind"] == kind]
        curve = np.interp(at, [r["seconds"] for r in history.rows], [r["accuracy"] for r in history.rows])
        right.plot(
            at,
            curve,
            marker,
            color=figures.COLOURS[1],
            ms=8,
            mec="black",
            ls="none",
            label=label if at else None,
        )
        marked += list(curve)
    right.set_ylim(max(0, min([min(ends) - 35, *marked]) - 2), min(101, max(ends) + 4))
    right.set_xlabel("seconds on the clock")
    right.set_ylabel("validation accuracy (%)")
    handles = [*left.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    figure.legend(handles, [h.get_label() for h in handles], loc="outside lower center", ncols=4, fontsize=8)
    return figure, (
        f"{arm}, one seed. Left: a stage's line falls where channels are cut and jumps where it is widened (circle) or gets one more block "
        "(triangle); thin dotted: it was decided to keep shrinking; dashed: the search ends. Right: the same decisions on the run's "
        "accuracy, beside the baseline's. In SEARCH the learning rate is constant, so that the accuracy rises steeply only afterwards."
    )


def rates_figure(history, policy=None):
    """(figure, caption): what each stage lost in every epoch of SEARCH, and the two rates between which it is
    left alone.
    """
    policy, events = policy or Policy(), seen(history)
    figure, axes = figures.new(width=8.0, height=3.6)
    for i, stage in enumerate(s["name"] for s in events[0]["seen"]["stages"]):
        at = [next(s for s in e["seen"]["stages"] if s["name"] == stage) for e in events]
        colour, ends = figures.COLOURS[i % len(figures.COLOURS)], [e["epoch"] + 1 for e in events]
        axes.plot(ends, [100 * s["lost"] for s in at], "o-", ms=4, color=colour, label=f"{stage}: lost")
        axes.plot(ends, [100 * s["pending"] for s in at], ":", color=colour, label=f"{stage}: going")
    axes.axhspan(100 * policy.low, 100 * policy.high, color="black", alpha=0.08)
    axes.set_xlabel("epochs of SEARCH")
    axes.set_ylabel("share of the channels (%)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure, (
        "What a stage lost in an epoch (line) and what is on its way out (dotted), weighted by FLOPs. A stage that is below the grey band "
        "over the window's epochs together is taken to need its channels; above it, it still shrinks."
    )
