"""Chapter II.9: the procedure and its controls at one budget, its run as a picture, its decisions as a table, and the checks."""

import copy
import itertools
import statistics as stats
from dataclasses import dataclass, replace

import pandas as pd
import torch
from torch import nn

from effilib import cost, figures, models, stages, surgery
from effilib.chapters import prune_train
from effilib.chapters.net2net import shared
from effilib.data import Batches
from effilib.decision import GROWTH, MODES, Action, Epoch, Policy, Stage, Trace, decide
from effilib.experiment import PILOT_SEEDS, Arm, measure
from effilib.methods.kernel_rescaling import KernelRescaling
from effilib.methods.prune_then_grow import GENTLE, PruneThenGrow, grow_, plan
from effilib.methods.prune_train import prune_
from effilib.statistics import lower_bound
from effilib.training import stream, train

DENSE, PRUNED, GROWN, RANDOM = "dense baseline", "PruneTrain alone", "growth alone", "growth at random stages"
SCRATCH, ON, SMALL = "final architecture, from scratch", "same checkpoint, trained on", "smaller network, resizing"
FAST = 0.55  # the aim: the baseline's accuracy in this share of its time
SCHEDULE = ((0.4, 0.5), (0.3, 0.75), (0.3, 1.0))  # of resizing: share of the steps, factor on the images' sides

# What the procedure does in each preset: decisions come at epochs' ends, so that short presets take few images and more epochs.
SETTINGS = {
    "smoke": dict(prune=replace(GENTLE, multiple=2), idle=0.1, patience=1, tau=1.0, progress=1.0, period=1, window=1, cooldown=1,
                  search=0.7, full=101.0, gap=100.0),
    "quick": dict(idle=0.1, tau=0.05, progress=0.1, period=3, search=0.6),
    "study": dict(idle=0.12, tau=0.05, progress=0.1, period=2, search=0.5),
    "full": dict(idle=0.1, patience=3, tau=0.01, period=4, search=0.7),
}  # fmt: skip
SIZES = {"smoke": dict(epochs=5), "quick": dict(images=1200, epochs=16, evaluations=12), "study": dict(epochs=10)}


def task(book):
    """The notebook's task in the size of its preset."""
    changes = SIZES.get(book.preset, {})
    if book.task.images and "images" in changes:
        changes = changes | {"images": min(changes["images"], book.task.images)}
    return book.task.but(**changes, target=None) if changes else book.task


def start(task):
    """What the procedure starts from: our networks with one block a stage (smoke: of half the inner width), others as they are."""
    if task.network != "resnet":
        return {}
    widths = task.widths.get("widths", (16, 32, 64))
    return {"blocks": tuple((max(2, w // 2),) if task.preset == "smoke" else 1 for w in widths)}


def baseline_flops(task, dataset):
    """FLOPs of training the baseline: what every arm may spend."""
    return task.recipe.epochs * steps(task, dataset) * step_flops(task, task.build(dataset), dataset.shape)


def steps(task, dataset):
    """Training steps an epoch."""
    return len(dataset.train) // task.recipe.batch_size


def step_flops(task, model, shape):
    """FLOPs of a training step of `model` on images (C, H, W) = `shape`, with the task's batch; nothing is computed."""
    return cost.step_flops(copy.deepcopy(model).to("meta"), shape, task.recipe.batch_size)


def resizing(dataset):
    """Progressive resizing: images of half the side, then of three quarters, then in full."""
    return KernelRescaling(schedule=SCHEDULE, kernels=False, multiple=8 if min(dataset.shape[1:]) >= 24 else 1)


def procedure(task, dataset, **changes):
    """The method as this preset runs it, with all of the baseline's FLOPs to spend."""
    return PruneThenGrow(**{"baseline": baseline_flops(task, dataset), "spend": True, **SETTINGS[task.preset], **changes})


def epochs_for(task, dataset, model, resizer=None, budget=1.0):
    """Epochs that a network may train for at a share of the baseline's FLOPs."""
    phases = [(0, dataset.shape[1:])] if resizer is None else [(first, size) for first, size, _ in resizer.phases(dataset.shape, 1000)]
    per_epoch = 0.0
    for (first, size), (last, _) in itertools.pairwise([*phases, (1000, None)]):
        size = (dataset.shape[0], *size)
        per_epoch += (last - first if resizer else 1000) / 1000 * steps(task, dataset) * step_flops(task, model, size)
    return budget * baseline_flops(task, dataset) / per_epoch


# Arms


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Trains what rests on the procedure's run with the same seed: (task, seed) -> `History`.

    what: "run", the procedure itself; "trained on", it again with every growth left out of its plan; "from scratch", the network that it
    ends with, from new weights and by the recipe, for the epochs that the budget allows. The run itself is made once a block.
    """

    method: PruneThenGrow
    start: tuple  # settings of the network, as items
    what: str = "run"

    def __call__(self, task, seed):
        dataset, kept = task.load(), shared(task, seed, self)
        if self.method not in kept:
            model = task.build(dataset, seed, **dict(self.start))
            history = train(model, dataset, task.recipe, [self.method], seed, evaluations=task.evaluations)
            kept[self.method] = model, history
        final, history = kept[self.method]
        if self.what == "run":
            return history
        if self.what == "trained on":
            model = task.build(dataset, seed, **dict(self.start))
            method = replace(self.method, plan=tuple(s for s in plan(history) if s[1] not in GROWTH))
            return train(model, dataset, task.recipe, [method], seed, evaluations=task.evaluations)
        model = renewed(final, stream(seed, "initial weights").initial_seed())
        recipe = replace(task.recipe, epochs=epochs_for(task, dataset, model, budget=self.method.budget))
        return train(model, dataset, recipe, (), seed, evaluations=task.evaluations)


def renewed(model, seed):
    """The same network with new weights."""
    model = copy.deepcopy(model)
    for m in model.modules():
        if isinstance(m, surgery.NORMS):
            m.reset_parameters()
        elif isinstance(m, models.Constant):
            nn.init.zeros_(m.bias)
    models.initialize_(model, seed)
    return model


def mode_name(mode, resized=False):
    """The name of the arm that decides in this mode."""
    return f"prune, then grow ({mode}{', resizing' if resized else ''})"


def pruned_alone(task, dataset):
    """PruneTrain on the baseline's network, for as many more epochs as it saved FLOPs in a pilot run with a seed that is never measured."""
    method = prune_train.method(task.preset)
    pilot = Arm(name="pilot", role="baseline", methods=(method,))
    history = measure(task, [pilot], [PILOT_SEEDS[0]], title="pilot for PruneTrain's epochs")[0]["arms"]["pilot"]
    longer = baseline_flops(task, dataset) / history.flops
    return Arm(name=PRUNED, role="control", methods=(method,), changes={"epochs": round(longer * task.recipe.epochs, 2)})


def arms(task, dataset, resized=True):
    """Every arm at the baseline's FLOPs; quick: baseline, procedure, PruneTrain alone. resized: with those on resized images."""
    small, method = start(task), procedure(task, dataset)
    items = tuple(small.items())
    found = [
        Arm(name=DENSE, role="baseline"),
        Arm(name=mode_name("windowed"), fit=Fit(method=method, start=items)),
        pruned_alone(task, dataset),
    ]
    if task.preset == "quick":
        return found
    for mode in MODES:
        chosen = replace(method, mode=mode)
        if mode != "windowed":
            found.append(Arm(name=mode_name(mode), methods=(chosen,), network=small))
        if resized:
            found.append(Arm(name=mode_name(mode, True), methods=(resizing(dataset), chosen), network=small))
    alone = replace(method, prune=replace(method.prune, ratio=0.0), pressure=False)
    found += [
        Arm(name=GROWN, role="control", methods=(alone,), network=small),
        Arm(name=RANDOM, role="control", methods=(replace(method, where="random"),), network=small),
        Arm(name=SCRATCH, role="control", fit=Fit(method=method, start=items, what="from scratch")),
        Arm(name=ON, role="control", fit=Fit(method=method, start=items, what="trained on")),
    ]
    if resized:
        resizer = resizing(dataset)
        epochs = round(epochs_for(task, dataset, task.build(dataset, **small), resizer), 2)
        fast = replace(method, budget=FAST)
        found += [
            Arm(name=SMALL, role="control", methods=(resizer,), network=small, changes={"epochs": epochs}),
            Arm(name=f"{mode_name('windowed', True)}, {FAST:g} of the FLOPs", methods=(resizer, fast), network=small),
            Arm(name=f"{SMALL}, {FAST:g} of the FLOPs", role="control", methods=(resizer,), network=small,
                changes={"epochs": round(FAST * epochs, 2)}),
        ]  # fmt: skip
    return found


# Toy case and checks

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
    """A trace of eight epochs with two stages whose rates stay as they are."""
    seen = tuple(
        Stage(name=f"stage {i + 1}", widths=(32,), live=(32,), lost=rate, born=16 if last and i else 0, kept=kept, widen=1.0, deepen=1.0)
        for i, rate in enumerate(lost)
    )
    epochs = tuple(
        Epoch(epoch=e, train_loss=falling**e, train_accuracy=train, loss=falling**e, accuracy=before if e < 4 else 60.0, stages=seen)
        for e in range(8)
    )
    actions = ((3, Action(kind=last, stage="stage 2")),) if last else ()
    return Trace(epochs=epochs, actions=actions, spent=spent, budget=100.0, lam=lam, idle=2.0, pressed=8.0, images=10_000)


def toy():
    """What `decide` says in eight situations that can be checked by hand."""
    rows = []
    for name, given in SITUATIONS.items():
        action = decide(situation(**given))
        rows.append({"situation": name, "action": f"{action.kind} {action.stage}".strip(), "reason": action.reason})
    return pd.DataFrame(rows).set_index("situation")


def check(task, dataset):
    """What each action changes of the outputs, relative to their spread, in eval and in training; and whether it can be undone."""
    x, y = next(iter(Batches(dataset, min(32, len(dataset.train)), stream(0, "numerics"))))
    model = task.build(dataset, **start(task))
    layout, rows = stages.find(model, dataset.shape), {}
    ways = [(g, i) for g in GROWTH for i in range(len(layout["pixels"]))]
    for growth, i in ways:
        grown, widths = copy.deepcopy(model), {n.name: n.width for n in surgery.trace(model).nodes}
        try:
            done = grow_(grown, layout, i, growth, multiple=16, x=x, y=y, generator=stream(0, "growth"))
        except ValueError as error:
            rows[f"{growth} stage {i + 1}"] = {"done": f"cannot be: {error}", "eval": "", "training": "", "undone": ""}
            continue
        row = {"done": "; ".join(done), **_changes(model, grown, x), "undone": ""}
        if growth == "widen":
            for node in surgery.trace(grown).nodes:
                surgery.select_(node, range(widths[node.name]))
            same = zip(model.state_dict().values(), grown.state_dict().values(), strict=True)
            row["undone"] = "bit for bit" if all(torch.equal(a, b) for a, b in same) else "no"
        rows[f"{growth} stage {i + 1}"] = row
    dead = copy.deepcopy(model)
    node = surgery.nodes(dead)[-1]
    with torch.no_grad():
        for name, per in node.consumers.items():
            node.layer(name).weight[:, : node.width // 2 * per] = 0
    cut = copy.deepcopy(dead)
    rows["cut what nobody reads"] = {"done": "; ".join(prune_(cut, rule="readers")), **_changes(dead, cut, x), "undone": ""}
    return pd.DataFrame(rows).T.rename_axis("action")


def _changes(before, after, x):
    found = {}
    for name, mode in (("eval", False), ("training", True)):
        with torch.no_grad():
            a, b = (copy.deepcopy(m).train(mode)(x) for m in (before, after))
        found[name] = f"{(a - b).abs().max() / a.std():.0e}"
    return found


# Cost


def cost_table(task, dataset):
    """Parameters and FLOPs of the baseline, of what the procedure starts from and of every single growth of that."""
    base, small = task.build(dataset), task.build(dataset, **start(task))
    layout, found = stages.find(small, dataset.shape), {DENSE: base, "the procedure's start": small}
    for growth in GROWTH:
        for i, name in enumerate(stages.names(layout)):
            twin = copy.deepcopy(small)
            try:
                grow_(twin, layout, i, growth, multiple=2 if task.preset == "smoke" else 16, generator=stream(0, "growth"))
            except ValueError:
                continue
            found[f"... {growth} {name}"] = twin
    full = step_flops(task, base, dataset.shape)
    rows = {
        name: {
            "parameters": cost.parameters(m),
            "GFLOP a step": f"{step_flops(task, m, dataset.shape) / 1e9:.3f}",
            "of the baseline": f"{step_flops(task, m, dataset.shape) / full:.2f}",
        }
        for name, m in found.items()
    }
    return pd.DataFrame(rows).T.rename_axis("network")


# What happened


def seen(history):
    """Events of the procedure's epochs of SEARCH."""
    return [e for e in history.events if "seen" in e]


def account(history):
    """What the procedure's run spent: the event with `spent`, `looked` and `budget`, FLOPs."""
    return next(e for e in reversed(history.events) if "budget" in e)


def decisions(history):
    """One row a decision: when, what, why, and what was spent by then."""
    budget = account(history)["budget"]
    rows = []
    for e in seen(history):
        if e["action"]["kind"] != "wait" or e["done"]:
            s = e["seen"]["stages"]
            rows.append(
                {
                    "epoch": e["epoch"] + 1,
                    "decision": f"{e['action']['kind']} {e['action']['stage']}".strip(),
                    "reason": e["action"]["reason"],
                    "done": "; ".join(e["done"]),
                    "channels": " / ".join(str(sum(x["widths"])) for x in s),
                    "depth": " / ".join(str(x["depth"]) for x in s),
                    "accuracy %": round(e["seen"]["accuracy"], 1),
                    "FLOPs": f"{e['flops'] / budget:.2f}",
                    "seconds": round(seconds(history, e["step"]), 1),
                }
            )
    columns = ["epoch", "decision", "reason", "done", "channels", "depth", "accuracy %", "FLOPs", "seconds"]
    return pd.DataFrame(rows, columns=columns).set_index("epoch")


def seconds(history, step):
    """Seconds on the clock at a step, interpolated between evaluations."""
    for a, b in itertools.pairwise(history.rows):
        if step <= b["step"]:
            return a["seconds"] + (step - a["step"]) / max(1, b["step"] - a["step"]) * (b["seconds"] - a["seconds"])
    return history.seconds


def tried(comparison):
    """A row an arm that decides: growths, what it ended with, how the budget was spent. The first seed's decisions, all seeds' means."""
    rows = {}
    for arm in comparison.arms:
        runs = comparison.histories(arm.name)
        if not seen(runs[0]):
            continue
        last = [account(h) for h in runs]
        rows[arm.name] = {
            "decisions": ", ".join(f"{k} {s}".strip() + f" at {e + 1}" for e, k, s in plan(runs[0])) or "none",
            "growths a run": f"{stats.mean(sum(k in GROWTH for _, k, _ in plan(h)) for h in runs):.1f}",
            "ends with (first seed)": str(runs[0].structure.get("blocks", runs[0].structure.get("widths", ""))),
            "budget spent": f"{stats.mean((e['spent'] + e['looked']) / e['budget'] for e in last):.3f}",
            "of it looking": f"{stats.mean(e['looked'] / (e['spent'] + e['looked']) for e in last):.3f}",
        }
    return pd.DataFrame(rows).T.rename_axis("arm")


def equal_time(comparison):
    """The second question: accuracy at the baseline's cost. Is the lower bound of a method's mean above every control's mean?"""
    full = [a for a in comparison.arms if "of the FLOPs" not in a.name]
    means = {a.name: stats.mean(h.accuracy for h in comparison.histories(a.name)) for a in full}
    best = max((a.name for a in full if a.role != "method"), key=means.get)
    base, rows = comparison.histories(comparison.baseline), {}
    for arm in full:
        runs = comparison.histories(arm.name)
        bound = lower_bound([h.accuracy for h in runs])
        rows[arm.name] = {
            "role": arm.role,
            "FLOPs": f"{stats.mean(h.flops / b.flops for h, b in zip(runs, base, strict=True)):.2f}",
            "time": f"{stats.mean(h.seconds / b.seconds for h, b in zip(runs, base, strict=True)):.2f}",
            "accuracy %": f"{means[arm.name]:.2f}",
            "test %": f"{stats.mean(h.test_accuracy for h in runs):.2f}",
            "lower bound": f"{bound:.2f}" if len(runs) > 1 else "",
            "above every control": ("yes" if bound > means[best] else "no") if arm.role == "method" and len(runs) >= 5 else "",
        }
    table = pd.DataFrame(rows).T.rename_axis("arm")
    return table, f"The best control is {best} with {means[best]:.2f} %."


def time_needed(comparison):
    """The first question: how long an arm needs for the baseline's accuracy, less the margin, as a share of the baseline's whole run."""
    base, margin = comparison.histories(comparison.baseline), comparison.task.margin
    rows = {}
    for arm in comparison.arms:
        runs, shares = comparison.histories(arm.name), []
        for h, b in zip(runs, base, strict=True):
            reached = [r["seconds"] for r in h.rows if r["accuracy"] >= b.accuracy - margin]
            shares.append(reached[0] / b.seconds if reached else None)
        got = [s for s in shares if s is not None]
        rows[arm.name] = {
            "reached": f"{len(got)} of {len(runs)}",
            "share of the baseline's time": f"{stats.median(got):.2f}" if len(got) == len(runs) else "",
            f"aim of {FAST:g}": ("yes" if stats.median(got) <= FAST else "no") if len(got) == len(runs) and arm.role == "method" else "",
        }
    return pd.DataFrame(rows).T.rename_axis("arm")


# Pictures

MARKS = {"widen": ("o", "widen"), "deepen": ("^", "deepen"), "shrink": ("v", "keep shrinking"), "stop": ("s", "stop")}


def run_figure(comparison, arm, seed=0):
    """(figure, caption): one run as a picture: channels over epochs with the decisions marked, accuracy over seconds."""
    history, base = comparison.histories(arm)[seed], comparison.histories(comparison.baseline)[seed]
    events = seen(history)
    figure, (left, right) = figures.new(2, width=10.5, height=4.2)
    names = [s["name"] for s in events[0]["seen"]["stages"]] if events else []
    for i, name in enumerate(names):
        at = [next(s for s in e["seen"]["stages"] if s["name"] == name) for e in events]
        epochs = [e["epoch"] + 1 for e in events]
        colour = figures.COLOURS[i % len(figures.COLOURS)]
        left.step(epochs, [sum(s["widths"]) for s in at], where="pre", color=colour, lw=2, label=name)
        left.plot(epochs, [sum(s["live"]) for s in at], ":", color=colour, lw=1.4)
        for e, s in zip(events, at, strict=True):
            if e["action"]["stage"] == name and e["action"]["kind"] in MARKS:
                marker = MARKS[e["action"]["kind"]][0]
                left.plot(e["epoch"] + 1, sum(s["widths"]), marker, color=colour, ms=9, mec="black", zorder=3)
    for e in events:
        if e["action"]["kind"] in MARKS and not e["action"]["stage"]:
            left.axvline(e["epoch"] + 1, color="black", lw=0.8, ls="--" if e["action"]["kind"] == "stop" else ":")
    left.set_xlabel("epochs of SEARCH")
    left.set_ylabel("channels of a stage's nodes, together")
    left.set_title("channels: there (line), alive (dotted)")
    for h, colour, label in ((base, figures.GREY, comparison.baseline), (history, figures.COLOURS[0], arm)):
        right.plot([r["seconds"] for r in h.rows], [r["accuracy"] for r in h.rows], color=colour, lw=2, label=label)
    for kind, (marker, label) in MARKS.items():
        chosen = [seconds(history, e["step"]) for e in events if e["action"]["kind"] == kind]
        at = [_accuracy(history, s) for s in chosen]
        right.plot(chosen, at, marker, color=figures.COLOURS[1], ms=8, mec="black", ls="none", label=label if chosen else None)
    last = [h.accuracy for h in (base, history)]
    right.set_ylim(max(0, min(last) - 35), min(101, max(last) + 4))
    right.set_xlabel("seconds on the clock")
    right.set_ylabel("validation accuracy (%)")
    handles = [*left.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    figure.legend(handles, [h.get_label() for h in handles], loc="outside lower center", ncols=4, fontsize=8)
    return figure, (
        "One seed. Left: a stage's line falls where channels are cut and jumps where it is widened (circle) or gets one more block "
        "(triangle); dashed: the search ends. Right: the same decisions on the run's accuracy, beside the baseline's. In SEARCH the "
        "learning rate is constant, so that the accuracy rises steeply only in the FINAL phase."
    )


def _accuracy(history, at):
    """Accuracy at a time, interpolated."""
    for a, b in itertools.pairwise(history.rows):
        if at <= b["seconds"]:
            return a["accuracy"] + (at - a["seconds"]) / max(1e-9, b["seconds"] - a["seconds"]) * (b["accuracy"] - a["accuracy"])
    return history.accuracy


def rates_figure(history, policy=None):
    """(figure, caption): what each stage lost in every epoch of SEARCH, and the two rates between which it is left alone."""
    policy, events = policy or Policy(), seen(history)
    figure, axes = figures.new(width=8.0, height=3.4)
    for i, stage in enumerate(s["name"] for s in (events[0]["seen"]["stages"] if events else [])):
        at = [next(s for s in e["seen"]["stages"] if s["name"] == stage) for e in events]
        colour, epochs = figures.COLOURS[i % len(figures.COLOURS)], [e["epoch"] + 1 for e in events]
        axes.plot(epochs, [100 * s["lost"] for s in at], "o-", ms=3, color=colour, label=f"{stage}: lost")
        axes.plot(epochs, [100 * s["pending"] for s in at], ":", color=colour, label=f"{stage}: going")
    axes.axhspan(100 * policy.low, 100 * policy.high, color="black", alpha=0.08)
    axes.set_xlabel("epochs of SEARCH")
    axes.set_ylabel("share of the channels (%)")
    axes.legend(fontsize=8, ncols=2)
    return figure, (
        "What a stage lost in an epoch (line) and what is on its way out (dotted), weighted by FLOPs. Below the grey band over the window "
        "a stage is taken to need its channels; above it, it still shrinks."
    )
