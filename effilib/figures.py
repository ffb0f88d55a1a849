"""The pictures of the notebooks: a small vocabulary, used everywhere. Every function returns a matplotlib
`Figure`.
"""

import io
import math
import statistics as stats

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from effilib.statistics import FASTER, LESS_ACCURATE, MISSED, SLOWER

# Okabe & Ito's colours, told apart by colour-blind readers too; the baseline is always grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#7F7F7F"
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}


class HouseAxes(Axes):
    """Titles to the left, legends without a frame. A class and not rcParams: a user's own plots keep their
    own style.

    >>> _, axes = new()
    >>> axes.set_title("cost").get_position()[0]  # to the left
    0.0
    """

    def set_title(self, label, *, loc="left", fontsize=11, **kwargs):
        return super().set_title(label, loc=loc, fontsize=fontsize, **kwargs)

    def legend(self, *args, frameon=False, **kwargs):
        return super().legend(*args, frameon=frameon, **kwargs)


class HouseFigure(Figure):
    """The same for a figure's legend.

    >>> figure, axes = new()
    >>> lines = axes.plot([1, 2], label="baseline")
    >>> figure.legend().get_frame_on()
    False
    """

    def legend(self, *args, frameon=False, **kwargs):
        return super().legend(*args, frameon=frameon, **kwargs)


def new(columns=1, rows=1, width=8.0, height=3.6, **kwargs):
    """(figure, axes) in the house style, not registered with pyplot: nothing to close, nothing shown twice.

    >>> figure, (left, right) = new(2)
    >>> type(figure).__name__, type(left).__name__
    ('HouseFigure', 'HouseAxes')
    """
    with mpl.rc_context(STYLE):
        figure = HouseFigure(figsize=(width, height), dpi=110, layout="constrained")
        return figure, figure.subplots(rows, columns, subplot_kw={"axes_class": HouseAxes}, **kwargs)


def png(figure, **metadata):
    """A matplotlib figure as PNG bytes. metadata: texts that go into the file, e.g. Description="...".

    >>> png(new()[0])[1:4]
    b'PNG'
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata=metadata)
    return buffer.getvalue()


def colours(names):
    """name -> colour; the first is the baseline.

    >>> colours(["baseline", "method"])
    {'baseline': '#7F7F7F', 'method': '#0072B2'}
    """
    return {n: GREY if i == 0 else COLOURS[(i - 1) % len(COLOURS)] for i, n in enumerate(names)}


def plain_log(axis, *, values=None):
    """A logarithmic axis with plain numbers on it, at the given values if there are few.

    >>> _, axes = new()
    >>> axes.set_xscale("log")
    >>> plain_log(axes.xaxis, values=(1, 2, 4))
    >>> [label.get_text() for label in axes.get_xticklabels()]
    ['1', '2', '4']
    """
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())
    if values is not None:
        axis.set_ticks(list(values), [f"{v:g}" for v in values])
        axis.set_minor_locator(LogLocator(subs=()))


def accuracy_over_time(comparison):
    """Validation accuracy over seconds on the clock: each seed thin, the median thick, the target dashed.

    >>> arms = [Arm(name="baseline", role="baseline"), Arm(name="shorter", changes={"epochs": 1})]
    >>> comparison = compare(task("smoke", "synthetic"), arms, quantity="training time", title="two arms")
    two arms: 1 of 2, ...
    two arms: 2 of 2, ...
    >>> accuracy_over_time(comparison).axes[0].get_ylabel()
    'validation accuracy (%)'
    """
    figure, (left, right) = new(2, width=9.5, height=4.1, width_ratios=(1, 1), sharex=True)
    colour = colours([a.name for a in comparison.arms])
    target = comparison.task.target
    for arm in comparison.arms:
        histories = comparison.histories(arm.name)
        for axes in (left, right):
            for h in histories:
                axes.plot(
                    [r["seconds"] for r in h.rows],
                    [r["accuracy"] for r in h.rows],
                    color=colour[arm.name],
                    lw=0.6,
                    alpha=0.45,
                )
            n = min(len(h.rows) for h in histories)
            middle = [
                [stats.median(h.rows[i][k] for h in histories) for i in range(n)]
                for k in ("seconds", "accuracy")
            ]
            axes.plot(*middle, color=colour[arm.name], lw=2.2, label=arm.name)
    for axes in (left, right):
        if target:
            axes.axhline(target, color="black", lw=0.8, ls="--")
        axes.set_xlabel("seconds on the clock")
    final = [h.accuracy for a in comparison.arms for h in comparison.histories(a.name)]
    low = min([*final, target or 100])
    right.set_ylim(low - 0.6 * (max(final) - low + 1), max(final) + 0.15 * (max(final) - low + 1))
    left.set_ylim(0, 102)
    left.set_ylabel("validation accuracy (%)")
    left.set_title("whole run")
    right.set_title(f"near the target ({target:g} %, dashed)" if target else "the end")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    return figure


def speed_ups(verdicts, predicted=None, *, title="", claim=None):
    """Forest plot: each arm's measured speed-up with its interval, the prediction from FLOPs as a diamond.

    verdicts: `Verdict`s. predicted: dict arm -> ratio. claim: the figure fixed before running, dotted.

    >>> from effilib.statistics import judge
    >>> verdict = judge([10.0] * 5, [8.0, 8.1, 7.9, 8.0, 8.0], [0.0] * 5, margin=0.5, arm="method")
    >>> [label.get_text() for label in speed_ups([verdict], {"method": 1.4}).axes[0].get_yticklabels()]
    ['method']
    """
    figure, axes = new(width=8.0, height=1.7 + 0.5 * max(1, len(verdicts)))
    values = [1.0]
    for y, v in enumerate(verdicts):
        foreseen = (predicted or {}).get(v.arm, math.nan)
        if v.ratio is None:
            axes.text(
                1.01,
                y,
                v.text,
                va="center",
                fontsize=9,
                color="#B00020",
                transform=axes.get_yaxis_transform(),
            )  # beside the axes
        else:
            low, high = (b if math.isfinite(b) else v.ratio for b in (v.low, v.high))
            axes.plot([low, high], [y, y], color=COLOURS[0], lw=5, alpha=0.35, solid_capstyle="round")
            axes.plot(v.ratio, y, "o", color=COLOURS[0], ms=7, label="measured, 95 % interval")
            values += [low, high]
        if math.isfinite(foreseen):
            axes.plot(foreseen, y, "D", mfc="none", mec=COLOURS[1], ms=8, mew=1.5, label="predicted by FLOPs")
            values.append(foreseen)
    axes.axvline(1, color="black", lw=1)
    if claim:
        axes.axvline(claim, color="black", lw=1, ls=":", label=f"aim {claim:.3g}x")
        values.append(claim)
    low, high = min(values) / 1.15, max(values) * 1.15
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    plain_log(
        axes.xaxis,
        values=[
            t
            for t in (0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 7, 10)
            if low <= t <= high
        ],
    )
    axes.set_yticks(range(len(verdicts)), [v.arm for v in verdicts])
    axes.set_ylim(len(verdicts) - 0.4, -0.6)
    if verdicts:
        axes.set_xlabel(
            f"speed-up in {verdicts[0].quantity} against {verdicts[0].against}\n(x, log scale; right of 1 is faster)"
        )
    axes.set_title(title)
    once = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))  # label -> handle
    if once:
        figure.legend(once.values(), once.keys(), loc="outside upper right", ncols=3, fontsize=8)
    return figure


VERDICTS = {  # verdict -> colour, marker: told apart without colours too
    FASTER: (COLOURS[2], "o"),
    LESS_ACCURATE: (COLOURS[4], "D"),
    SLOWER: (COLOURS[1], "v"),
    MISSED: ("#B00020", "X"),
}


def scoreboard(rows):
    """Every method's recorded speed-up with its interval, on a log axis, coloured by verdict; one that missed
    the target says so.

    rows: dicts as `series.headlines` gives them, one a chapter: what was measured, against what, its ratio or
    why there is none.

    >>> row = dict(chapter="3.2", title="Mixed precision", arm="bf16", against="fp32", quantity="time per step", dataset="cifar10")
    >>> row |= dict(ratio=None, low=None, high=None, verdict="target missed", text="4 of 5 reached the target")
    >>> [text.get_text() for text in scoreboard([row]).axes[0].texts][-2:]
    ['4 of 5 reached the target', '✗ target missed']
    """
    figure, axes = new(width=10.0, height=1.0 + 0.52 * len(rows))
    right, values = axes.get_yaxis_transform(), [0.5, 2.0]  # x in shares of the axis, y in rows
    for y, row in enumerate(rows):
        colour, marker = VERDICTS.get(row["verdict"], (GREY, "s"))
        verdict = f"{'✗ ' if row['verdict'] == MISSED else ''}{row['verdict']}"
        what = f"{row['arm']} against {row['against']}, {row['quantity']}, {row['dataset']}"
        axes.text(
            -0.015,
            y - 0.15,
            f"{row['chapter']}  {row['title']}",
            transform=right,
            ha="right",
            va="center",
            fontsize=10,
        )
        axes.text(
            -0.015, y + 0.22, what, transform=right, ha="right", va="center", fontsize=7.5, color="#555555"
        )
        axes.text(
            1.015,
            y - 0.15,
            row["text"].split(", n=")[0],
            transform=right,
            va="center",
            fontsize=9,
            color=colour,
        )
        axes.text(
            1.015, y + 0.22, verdict, transform=right, va="center", fontsize=8, color=colour, weight="bold"
        )
        if row["ratio"] is None:  # it has no place on the axis
            axes.axhspan(y - 0.42, y + 0.42, color=colour, alpha=0.07, lw=0)
            continue
        low, high = (row["ratio"] if bound is None else bound for bound in (row["low"], row["high"]))
        axes.plot([low, high], [y, y], color=colour, lw=6, alpha=0.35, solid_capstyle="round")
        axes.plot(row["ratio"], y, marker, color=colour, ms=7)
        values += [low, high]
    axes.axvline(1, color="black", lw=1)
    axes.set_xscale("log")
    axes.set_xlim(min(values) / 1.2, max(values) * 1.2)
    plain_log(
        axes.xaxis,
        values=[t for t in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if min(values) / 1.2 <= t <= max(values) * 1.2],
    )
    axes.set_yticks([])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(
        "speed-up against the chapter's baseline, with its 95 % interval\n(x, log scale; right of 1 is faster)"
    )
    return figure


def shares(parts, *, title="", unit="ms"):
    """Stacked horizontal bars: where the time goes. parts: dict row -> dict part -> time in `unit`.

    >>> shares({"resnet": {"forward": 3.0, "backward": 6.0}}).axes[0].get_xlabel()
    'ms per training step'
    """
    figure, axes = new(width=8.5, height=1.4 + 0.55 * len(parts))
    names = list(dict.fromkeys(p for row in parts.values() for p in row))
    longest, bars = max(sum(row.values()) for row in parts.values()), {}
    for y, row in enumerate(parts.values()):
        begin, total = 0.0, sum(row.values())
        for name, value in row.items():
            bars[name] = axes.barh(
                y, value, left=begin, height=0.62, color=COLOURS[names.index(name) % len(COLOURS)]
            )
            if value > 0.055 * longest:
                axes.text(
                    begin + value / 2,
                    y,
                    f"{value / total:.0%}",
                    ha="center",
                    va="center",
                    color="white",
                    fontsize=9,
                )
            begin += value
        axes.text(begin, y, f" {total:.3g} {unit}", va="center", fontsize=9)
    axes.set_yticks(range(len(parts)), list(parts))
    axes.set_ylim(len(parts) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.set_xlabel(f"{unit} per training step")
    axes.set_title(title)
    axes.grid(axis="y", alpha=0)
    figure.legend(
        [bars[name] for name in names], names, loc="outside lower center", ncols=len(names), fontsize=9
    )
    return figure


def measured_and_predicted(panels, *, height=3.4, width=3.4, ylabel="ms", logx=True, logy=True):
    """A panel per scan: measured times as points on a line, the FLOP prediction through the reference point
    dashed.

    panels: list of dicts: title, xlabel, x (values), series {name: times}, predicted {name: times} (may be
    empty).

    >>> panel = {"title": "width", "xlabel": "channels", "x": [16, 32], "series": {"fp32": [1.0, 3.0]}, "predicted": {"fp32": [0.8, 3.2]}}
    >>> measured_and_predicted([panel]).axes[0].get_ylabel()
    'ms'
    """
    figure, axes = new(len(panels), width=width * len(panels), height=height, squeeze=False)
    for ax, panel in zip(axes[0], panels, strict=True):
        for i, (name, times) in enumerate(panel["series"].items()):
            ax.plot(panel["x"], times, "o-", color=COLOURS[i % len(COLOURS)], lw=1.6, ms=4, label=name)
            if name in panel.get("predicted", {}):
                ax.plot(
                    panel["x"],
                    panel["predicted"][name],
                    "--",
                    color=COLOURS[i % len(COLOURS)],
                    lw=1,
                    alpha=0.8,
                )
        if logx:
            ax.set_xscale("log")
            plain_log(ax.xaxis, values=panel.get("ticks", panel["x"]))
        if logy:
            ax.set_yscale("log")
            plain_log(ax.yaxis)
        ax.set_title(panel["title"])
        ax.set_xlabel(panel["xlabel"])
    axes[0][0].set_ylabel(ylabel)
    handles, labels = axes[0][0].get_legend_handles_labels()
    handles.append(mpl.lines.Line2D([], [], color="black", ls="--", lw=1))
    figure.legend(
        handles,
        [*labels, "predicted by FLOPs"],
        loc="outside lower center",
        ncols=len(labels) + 1,
        fontsize=9,
    )
    return figure


def sweep(rows, *, title=""):
    """The tuning of a baseline: accuracy over the learning rate, a panel per number of epochs, a line per
    weight decay.

    >>> rows = [dict(epochs=3, lr=lr, weight_decay=5e-4, accuracy=95.0) for lr in (0.1, 0.2)]
    >>> sweep(rows).axes[0].get_title(loc="left")
    '3 epochs'
    """
    epochs = sorted({r["epochs"] for r in rows})
    figure, axes = new(len(epochs), width=3.1 * len(epochs), height=3.2, sharey=True, squeeze=False)
    decays = sorted({r["weight_decay"] for r in rows})
    for ax, e in zip(axes[0], epochs, strict=True):
        for i, wd in enumerate(decays):
            chosen = [r for r in rows if r["epochs"] == e and r["weight_decay"] == wd]
            lrs = sorted({r["lr"] for r in chosen})
            ax.plot(
                lrs,
                [stats.mean(r["accuracy"] for r in chosen if r["lr"] == lr) for lr in lrs],
                color=COLOURS[i],
                label=f"weight decay {wd:g}",
            )
            ax.plot(
                [r["lr"] for r in chosen], [r["accuracy"] for r in chosen], ".", color=COLOURS[i], alpha=0.6
            )
        ax.set_xscale("log")
        plain_log(ax.xaxis, values=sorted({r["lr"] for r in rows}))
        ax.set_title(f"{e:g} epochs")
        ax.set_xlabel("learning rate")
    axes[0][0].set_ylabel("validation accuracy (%)")
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(decays), fontsize=9
    )
    figure.suptitle(title, fontsize=11)
    return figure


def histogram(values, *, bins=60, xlabel="", marks=(), title="", spans=()):
    """Histogram of several samples on one axis. values: dict name -> array. marks: (x, text). spans: (low,
    high, text) shaded.

    >>> histogram({"gradients": [0.0, 1.0, 1.0]}, xlabel="size").axes[0].get_xlabel()
    'size'
    """
    figure, axes = new(width=8.0, height=3.3)
    low = min(float(np.min(v)) for v in values.values())
    high = max(float(np.max(v)) for v in values.values())
    for i, (name, v) in enumerate(values.items()):
        axes.hist(
            v,
            bins=np.linspace(low, high, bins),
            histtype="stepfilled",
            alpha=0.45,
            color=COLOURS[i % len(COLOURS)],
            label=name,
        )
    top = axes.get_ylim()[1]
    for i, (begin, end, text) in enumerate(spans):
        axes.axvspan(begin, end, color="#B00020", alpha=0.08)
        axes.text(begin, top * (0.97 - 0.08 * i), f" {text}", va="top", fontsize=8, color="#B00020")
    for x, text in marks:
        axes.axvline(x, color="black", lw=1, ls=":")
        axes.text(x, top * 0.97, f" {text}", va="top", fontsize=8)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("values")
    axes.set_title(title)
    axes.legend(loc="center right")
    return figure
