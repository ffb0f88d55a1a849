"""Chapter II.9: what came out. Two questions, answered apart: time to the baseline's accuracy, and accuracy
in the baseline's time.
"""

import copy
import itertools
import statistics as stats
from dataclasses import replace

import pandas as pd
from torch import nn

from effilib import cost, figures
from effilib.chapters.decisions import deciding
from effilib.chapters.products import step_table
from effilib.chapters.prune_then_grow import (
    DENSE,
    FAST,
    SHORT,
    headline,
    mode_name,
    procedure,
    resizing,
    start,
)
from effilib.errors import BadInput
from effilib.methods.decision import GROWTH
from effilib.methods.kernel_rescaling import resize
from effilib.methods.prune_then_grow import grow_
from effilib.models import stream
from effilib.statistics import LEAST, interval, lower_bound, paired_ratio
from effilib.surgery import stages

FAIR = 1.05  # of the baseline's time still is its time
COLOUR = {"baseline": figures.GREY, "method": figures.COLOURS[0], "control": figures.COLOURS[1]}


class Resized(nn.Module):
    """A network on images that are resized to (H, W) = `size` first."""

    def __init__(self, network, size):
        super().__init__()
        self.network, self.size = network, size

    def forward(self, x):
        return self.network(resize(x, self.size))


def cost_table(task, dataset):
    """A step of the baseline, of what the procedure starts from, of both on small images, and of every single
    growth: FLOPs beside time.
    """
    base, small, method = task.build(dataset), task.build(dataset, **start(task)), procedure(task, dataset)
    found = {DENSE: base, "the procedure's start": small}
    sizes = [size for _, size, _ in resizing(task, dataset).phases(dataset.shape, 1000)]
    for (name, network), size in itertools.product(list(found.items()), sizes):
        if size != tuple(dataset.shape[1:]):
            found[f"{name}, images {' x '.join(map(str, size))}"] = Resized(network, size)
    multiple, layout = (
        16 if method.prune.multiple == "auto" else method.prune.multiple,
        stages.find(small, dataset.shape),
    )
    for growth, (i, name) in itertools.product(GROWTH, enumerate(stages.names(layout))):
        twin = copy.deepcopy(small)
        try:
            grow_(
                twin,
                layout,
                i,
                growth,
                factor=method.factor,
                multiple=multiple,
                generator=stream(0, "growth"),
            )
        except BadInput:
            continue
        found[f"start, {growth} {name}"] = twin
    table = step_table(task, dataset, found)
    table.insert(0, "parameters", [cost.parameters(m) for m in found.values()])
    return table


# The first question


def reached(history, accuracy):
    """Seconds at the evaluation from which on the accuracy never is below this again; None where it ends
    below.
    """
    found = None
    for row in reversed(history.rows):
        if row["accuracy"] < accuracy:
            break
        found = row["seconds"]
    return found


def shares(comparison, arm):
    """Per seed the time after which an arm keeps the baseline's last accuracy, less the margin, as a share of
    the baseline's whole time.
    """
    pairs = zip(comparison.histories(arm), comparison.histories(comparison.baseline), strict=True)
    found = [(reached(h, b.accuracy - comparison.task.margin), b.seconds) for h, b in pairs]
    return [None if seconds is None else seconds / whole for seconds, whole in found]


def time_needed(comparison):
    """The first question as a table: the share of the baseline's time, with its interval; where that is the
    aim, whether it is met.
    """
    rows, n, column = {}, len(comparison.blocks), "share of the baseline's time"
    for arm in comparison.arms:
        found = shares(comparison, arm.name)
        rows[arm.name] = row = {
            "role": arm.role,
            "reached": f"{n - found.count(None)} of {n}",
            column: "",
            f"at most {FAST:g}": "",
        }
        met = False
        if None not in found and min(found) > 0:
            share, low, high = paired_ratio(found, [1.0] * n)
            row[column], met = f"{share:.2f}" + (f" [{low:.2f}, {high:.2f}]" if n > 1 else ""), share <= FAST
        if arm.name.endswith(SHORT[FAST]) and n >= LEAST:
            row[f"at most {FAST:g}"] = "yes" if met else "no"
    return pd.DataFrame(rows).T.rename_axis("arm")


# The second question


def in_full(comparison):
    """The arms that had all of the time."""
    return [a for a in comparison.arms if not shortened(a.name)]


def shortened(name):
    """Whether an arm had less than the baseline's time."""
    return name.endswith(tuple(SHORT.values()))


def best_control(comparison):
    """(name, mean accuracy) of the best one in the full time that is no method; the baseline counts."""
    means = {
        a.name: stats.mean(h.accuracy for h in comparison.histories(a.name))
        for a in in_full(comparison)
        if a.role != "method"
    }
    return max(means.items(), key=lambda item: item[1])


def equal_time(comparison):
    """The second question as a table: is the lower bound of a method's mean accuracy above every control's
    mean, in the same time?
    """
    _, best = best_control(comparison)
    base, rows = comparison.histories(comparison.baseline), {}
    for arm in in_full(comparison):
        runs = comparison.histories(arm.name)
        mean, low, _ = interval([h.accuracy for h in runs])
        bound, time = (
            lower_bound([h.accuracy for h in runs]),
            stats.mean(h.seconds / b.seconds for h, b in zip(runs, base, strict=True)),
        )
        above = ""
        if arm.role == "method" and len(runs) >= LEAST:
            above = (
                "no" if bound <= best else "yes" if time <= FAIR else f"yes, but in {time:.2f} of the time"
            )
        rows[arm.name] = {
            "role": arm.role,
            "FLOPs": f"{stats.mean(h.flops / b.flops for h, b in zip(runs, base, strict=True)):.2f}",
            "time": f"{time:.2f}",
            "accuracy %": f"{mean:.2f}" + (f" ± {mean - low:.2f}" if len(runs) > 1 else ""),
            "lower bound %": f"{bound:.2f}" if len(runs) > 1 else "",
            "test %": f"{stats.mean(h.test_accuracy for h in runs):.2f}",
            "above every control": above,
        }
    return pd.DataFrame(rows).T.rename_axis("arm")


# Both


def say(comparison):
    """Both answers in words, a sentence a method, and the best control."""
    name, best = best_control(comparison)
    margin, n, said = comparison.task.margin, len(comparison.blocks), []
    for arm in (a.name for a in comparison.arms if a.role == "method"):
        found = shares(comparison, arm)
        time = (
            f"in {n - found.count(None)} of {n} runs"
            if None in found
            else f"in {stats.median(found):.2f} of its time (median)"
        )
        end = stats.mean(h.accuracy for h in comparison.histories(arm))
        said.append(
            f"{arm}: the baseline's accuracy, less {margin:g} points, {time} (aim: {FAST:g}); {end:.2f} % at the end."
        )
    return [*said, f"The best control in the full time: {name}, {best:.2f} % at the end."]


def few(comparison):
    """The same comparison with the arms that a picture has room for: baseline, procedure, the arm of the aim
    and the best control.
    """
    windowed = [mode_name("windowed", resized) for resized in (False, True)]
    wanted = {comparison.baseline, *windowed, headline(comparison.task), best_control(comparison)[0]}
    return replace(comparison, arms=tuple(a for a in comparison.arms if a.name in wanted))


def figure(comparison):
    """(figure, caption): accuracy at the end and time needed, every arm a row, every seed a dot."""
    fig, (left, right) = figures.new(
        2, width=10.5, height=1.6 + 0.33 * len(comparison.arms), sharey=True, width_ratios=(1.2, 1)
    )
    n, found = len(comparison.blocks), {a.name: shares(comparison, a.name) for a in comparison.arms}
    for y, arm in enumerate(comparison.arms):
        colour, short = COLOUR[arm.role], shortened(arm.name)
        values = [h.accuracy for h in comparison.histories(arm.name)]
        face = "white" if short else colour
        left.plot(values, [y] * len(values), "o", mfc=face, mec=colour, ms=5, alpha=0.7)
        left.plot([stats.mean(values)] * 2, [y - 0.33, y + 0.33], color=colour, lw=2.5)
        got = [s for s in found[arm.name] if s is not None]
        right.plot(got, [y] * len(got), "o", mfc=face, mec=colour, ms=5, alpha=0.7)
        if len(got) < n:
            where = {
                "transform": right.get_yaxis_transform(),
                "bbox": {"fc": "white", "ec": "none", "pad": 1},
            }
            right.text(0.02, y, f"{len(got)} of {n} reached", va="center", fontsize=8, color=colour, **where)
    name, best = best_control(comparison)
    left.axvline(best, color="black", lw=1, ls="--")
    right.axvline(FAST, color="black", lw=1, ls=":")
    right.axvline(1, color="black", lw=1)
    left.set_yticks(range(len(comparison.arms)), [a.name for a in comparison.arms], fontsize=9)
    left.set_ylim(len(comparison.arms) - 0.4, -0.6)
    left.set_xlabel("validation accuracy at the end (%)")
    right.set_xlabel("time to the baseline's accuracy,\nas a share of its whole time")
    right.set_xlim(0, 1.1 * max([1, *(s for v in found.values() for s in v if s is not None)]))
    for role, colour in COLOUR.items():
        left.plot([], [], "o", color=colour, label=role)
    if len(in_full(comparison)) < len(comparison.arms):
        left.plot(
            [],
            [],
            "o",
            mfc="white",
            mec="black",
            label=f"in {' or '.join(f'{s:g}' for s in SHORT)} of the time",
        )
    fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    return fig, (
        f"Left: accuracy at the end, seeds as dots, the mean as a bar; dashed: the best control in the full time ({name}). Right: the "
        f"share of the baseline's time after which an arm keeps its accuracy, less the margin; dotted: the aim, {FAST:g}. An arm with "
        "all of the time lowers its learning rate for as long as the baseline does, and so is late there even where it ends higher."
    )


WORK = {"validate": "looking", "on_epoch_end": "deciding", "reconfigure": "surgery"}


def time_spent(comparison):
    """Where the seconds of the arms that decide went: training steps (the penalty in them), looking,
    deciding, surgery, the rest.
    """
    rows = {}
    for arm in deciding(comparison):
        runs = comparison.histories(arm.name)
        parts = dict.fromkeys(("steps", *WORK.values(), "rest"), 0.0)
        for h in runs:
            for kind, k in h.kinds.items():
                parts["steps" if kind.startswith("step") else WORK.get(kind, "rest")] += k["seconds"] / len(
                    runs
                )
        rows[arm.name] = {
            **{k: f"{v:.2f}" for k, v in parts.items()},
            "all but steps": f"{1 - parts['steps'] / sum(parts.values()):.1%}",
        }
    return pd.DataFrame(rows).T.rename_axis("seconds of a run")
