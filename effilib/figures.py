"""The pictures of the notebooks: a small vocabulary. Verbs take numbers and return a matplotlib `Figure`.

Sizes suit a page of 390 pixels, on which a figure of 7.5 inches is shown at half its size.
"""

import io
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from effilib.errors import BadInput
from effilib.statistics import (
    DEPENDS,
    DIVERGED,
    FASTER,
    NO_DIFFERENCE,
    OUT_OF_REACH,
    SATURATED,
    SLOWER,
    monotone,
)

if TYPE_CHECKING:
    from effilib.results import Comparison

__all__ = [
    "bars", "colours", "curves", "heatmap", "histogram", "lines", "literal", "new", "plain_log", "png",
    "scatter", "scoreboard", "shares", "strip",
]  # fmt: skip

# Okabe & Ito's colours, told apart by colour-blind readers too; the baseline is always grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY, PALE, RED = "#7F7F7F", "#A9A9A9", "#B00020"
MARKERS = "os^DvPX*"
STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.labelsize": 12, "xtick.labelsize": 11, "ytick.labelsize": 11, "figure.titlesize": 13,
}  # fmt: skip
TEXT, HEAD = 11, 13  # points


class HouseAxes(Axes):
    """Axes with titles to the left and legends without a frame.

    A class and not rcParams: a user's own plots keep their own style.
    """

    def set_title(self, label, *, loc="left", fontsize=HEAD, **kwargs):
        return super().set_title(label, loc=loc, fontsize=fontsize, **kwargs)

    def text(self, x, y, s, *, fontsize=TEXT, **kwargs):
        return super().text(x, y, s, fontsize=fontsize, **kwargs)

    def legend(self, *args, frameon=False, fontsize=TEXT, **kwargs):
        return super().legend(*args, frameon=frameon, fontsize=fontsize, **kwargs)


class HouseFigure(Figure):
    """The same for a figure's legend."""

    def legend(self, *args, frameon=False, fontsize=TEXT, **kwargs):
        return super().legend(*args, frameon=frameon, fontsize=fontsize, **kwargs)


def new(
    columns: int = 1, rows: int = 1, width: float = 7.5, height: float = 3.8, **kwargs
) -> tuple[Figure, Any]:
    """Return (figure, axes) in the house style.

    Not registered with pyplot: nothing to close, nothing shown twice. kwargs: of `Figure.subplots`.

    >>> figure, (left, right) = new(2)
    >>> type(figure).__name__, type(left).__name__
    ('HouseFigure', 'HouseAxes')
    """
    with mpl.rc_context(STYLE):
        figure = HouseFigure(figsize=(width, height), dpi=110, layout="constrained")
        axes = figure.subplots(rows, columns, subplot_kw={"axes_class": HouseAxes}, **kwargs)
        for ax in figure.axes:  # ticks are made when they are drawn: not in this style any more
            ax.tick_params(labelsize=11)
        return figure, axes


def png(figure: Figure, **metadata: str) -> bytes:
    """Return a figure as PNG bytes. metadata: texts for the file, e.g. Description="...".

    >>> png(new()[0])[1:4]
    b'PNG'
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata=metadata)
    return buffer.getvalue()


def literal(text: object) -> str:
    """Return a text that matplotlib draws as it stands, dollars included.

    >>> print(literal("$5 and $10"))
    \\$5 and \\$10
    """
    return str(text).replace("\\$", "$").replace("$", r"\$")


def colours(names: Iterable[str]) -> dict[str, str]:
    """Return name -> colour; the first is the baseline, in grey.

    >>> colours(["baseline", "method"])
    {'baseline': '#7F7F7F', 'method': '#0072B2'}
    """
    return {n: GREY if i == 0 else COLOURS[(i - 1) % len(COLOURS)] for i, n in enumerate(names)}


def plain_log(axis: Axis, *, values: Sequence[float] | None = None) -> None:
    """Put plain numbers on a logarithmic axis, at few given values.

    >>> _, axes = new()
    >>> axes.set_xscale("log")
    >>> plain_log(axes.xaxis, values=(1, 2, 4))
    >>> [label.get_text() for label in axes.get_xticklabels()]
    ['1', '2', '4']
    """
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())
    if values is not None:
        axis.set_ticks(list(values), [_brief_number(v) for v in values])
        axis.set_minor_locator(LogLocator(subs=()))


def _brief_number(v):
    """A tick's number: 50M, not 5e+07."""
    power, letter = next(((p, s) for p, s in ((9, "G"), (6, "M")) if abs(v) >= 10**p), (0, ""))
    return f"{v:,.0f}" if 1000 <= v < 10**6 else f"{v / 10**power:g}{letter}"


def _ticks(low, high, most=7):
    """Round numbers between low and high for a logarithmic axis, at least three."""
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), tuple(np.arange(10, 100) / 10)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [s * 10.0**p for p in powers for s in steps if low <= s * 10.0**p <= high]
        if 4 <= len(found) <= most:
            return found
    return [t for t in MaxNLocator(5).tick_values(low, high) if low <= t <= high]


def _log_axis(axis, values):
    """Make an axis logarithmic, with some room beside the values and round numbers on it."""
    values = [v for v in values if math.isfinite(v) and v > 0]
    if not values:
        return
    room = max(1.12, (max(values) / min(values)) ** 0.07)
    low, high = min(values) / room, max(values) * room
    axis.axes.set(**{f"{axis.axis_name}lim": (low, high)})  # first: one value has no limits of its own
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    plain_log(axis, values=_ticks(low, high))


def _legend(figure, handles, labels):
    """A legend below the figure, in as many columns as fit; each label once."""
    once = dict(zip(labels, handles, strict=True))
    if once:
        longest = max(map(len, once)) + 6
        columns = max(1, min(len(once), int(11.5 * figure.get_figwidth() / longest)))
        rows = math.ceil(len(once) / columns)
        figure.set_figheight(figure.get_figheight() + 0.25 * max(0, rows - 3))  # not the axes' room
        figure.legend(once.values(), once.keys(), loc="outside lower center", ncols=columns)


# Accuracy over time


def curves(
    comparison: "Comparison", arm: str | None = None, *, cost: str = "seconds", aim: float | None = None
) -> Figure:
    """Draw accuracy over cost, and the gap at equal accuracy.

    A mark is a training.

    arm: is drawn with the baseline alone (default: all arms, and the gap of the first one that has an aim of
    its own, else of the first method). cost: "seconds", "flops" or "images". aim: a speed-up, drawn as the
    curve that would just reach it (default: the comparison's). Large marks are means over the seeds of a
    length; lines join them where accuracy rises, and lie between them where it falls.

    >>> arms = [Arm(name="baseline", role="baseline"), Arm(name="narrow", network={"widths": (4, 4, 8)})]
    >>> comparison = compare(task("smoke", "synthetic"), arms)
    runs: 1 of 4, ...
    ...
    >>> curves(comparison).axes[0].get_ylabel()
    'accuracy at the end of a training (%)'
    """
    names = [a.name for a in comparison.arms]
    methods = [a.name for a in comparison.arms if a.role == "method"]
    judged = arm or [*(comparison.aim if isinstance(comparison.aim, dict) else ()), *methods, names[-1]][0]
    shown = [names[0], judged] if arm else names
    figure, axes = new(height=5.0)
    found = {name: comparison.curve(name, cost) for name in shown}
    spent = [c for points in found.values() for p in points for c in p.costs]
    scale, label = _unit(comparison, cost, max(spent, default=1.0))
    palette, handles, labels = colours(names), [], []
    for name, points in found.items():
        look = dict(color=palette[name], marker=MARKERS[names.index(name) % len(MARKERS)])
        _curve(axes, points, scale, look)
        handles.append(Line2D([], [], lw=2.4, ms=8, **look))
        diverged, runs = comparison.diverged(name), len(comparison.histories(name))
        labels.append(literal(name) + (f" ({diverged} of {runs} runs diverged)" if diverged else ""))
    base, gap = found[names[0]], judged != names[0] and len(comparison.lengths) > 1
    if gap:
        verdict, ratio = comparison.verdict(judged, cost), comparison.ratio(judged, cost)
        axes.set_title("\n".join(textwrap.wrap(literal(_words(verdict)), 68)), fontsize=12)
        if (aim or verdict.aim) and base:
            x, a = monotone(base)
            aimed = np.exp(x) / (aim or verdict.aim)
            handles += axes.plot(aimed / scale, a, ":", color="black", lw=1.6)
            labels.append(f"aim {aim:g}x" if aim else f"aim {verdict.aim:g}x: {verdict.aim_verdict}")
            spent += aimed.tolist()
    _log_axis(axes.xaxis, [c / scale for c in spent])
    if gap and ratio:
        patch = _gap(axes, monotone(base), monotone(found[judged]), ratio, scale, palette[judged])
        handles += patch
        labels += ["accuracies that both reach"] * len(patch)
    low, high = axes.get_ylim()
    if high - low < 2:  # points: noise is not to look like a difference
        axes.set_ylim((low + high) / 2 - 1, (low + high) / 2 + 1)
    axes.margins(y=0.08)
    axes.set_xlabel(label)
    axes.set_ylabel("accuracy at the end of a training (%)")
    _legend(figure, handles, labels)
    return figure


def _unit(comparison, cost, largest):
    """(what costs are divided by, the axis' label)."""
    if cost == "flops":
        scale, unit = (1e12, "TFLOP") if largest >= 1e11 else (1e9, "GFLOP")
        return scale, f"{unit} of a whole training (log scale)"
    if cost == "images":
        what = "training images" if comparison.task.axis == "images" else "images trained on"
        return 1.0, f"{what} (log scale)"
    return 1.0, "seconds of a whole training (log scale)"


def _curve(axes, points, scale, look):
    """An arm's trainings as small marks, their means as large ones, the monotone curve as a line."""
    if not points:
        return
    for p in points:
        axes.plot([c / scale for c in p.costs], p.accuracies, ls="", ms=4.5, alpha=0.45, mew=0, **look)
    x, a = monotone(points)
    axes.plot(np.exp(x) / scale, a, color=look["color"], lw=2.4, zorder=3)
    means = [(np.exp(np.log(p.costs).mean()) / scale, np.mean(p.accuracies)) for p in points]
    if len(x) < len(means):  # it falls somewhere
        axes.plot(*zip(*sorted(means), strict=True), ":", color=look["color"], lw=1.4)
    axes.plot(*zip(*means, strict=True), ls="", ms=9, mec="white", mew=1.2, zorder=4, **look)


def _words(v):
    """A verdict in a line: ratio with its interval, verdict."""
    head = v.text.split(", n=")[0]
    if v.kind == DIVERGED:
        return head
    if v.verdict.startswith(SATURATED):
        points = "" if v.points is None else f", {v.points:+.2f} points"
        says = [f"{head}; {v.verdict.removeprefix(SATURATED + ', ')}{points}"]
    elif head in v.verdict or v.verdict.startswith(DEPENDS):
        says = [v.verdict]
    else:
        says = [head, v.verdict]
    return f"{v.arm}: {', '.join(says)}"


def _gap(axes, base, arm, ratio, scale, colour):
    """Draw the horizontal gap of two monotone curves, or the bound on it. Returns what the legend names."""
    first, last = np.log(axes.get_xlim())

    def arrow(begin, end, y, text):  # costs, from the baseline to the arm
        line = dict(arrowstyle="-|>", color="black", lw=1.6, shrinkA=0, shrinkB=0, mutation_scale=15)
        axes.annotate("", (math.exp(end) / scale, y), (math.exp(begin) / scale, y), arrowprops=line, zorder=5)
        left, right = sorted((begin - math.log(scale), end - math.log(scale)))
        width = 0.019 * len(text) * (last - first)
        if right + width < last:  # curves rise: what is below and to the right is free
            x, ha, va = right, "left", "top"
        elif left - width > first:
            x, ha, va = left, "right", "bottom"
        else:
            x, ha, va = (left + right) / 2, "center", "bottom"
        away = {"left": 7, "right": -7, "center": 0}[ha], {"top": -5, "bottom": 5}[va]
        look = dict(fontsize=12, weight="bold", zorder=6)
        look["bbox"] = dict(boxstyle="round,pad=0.15", fc="white", ec="none", alpha=0.75)
        axes.annotate(text, (math.exp(x), y), away, textcoords="offset points", ha=ha, va=va, **look)

    def costs(y):
        return np.interp(y, base[1], base[0]), np.interp(y, arm[1], arm[0])

    if ratio.kind in ("at most", "at least"):
        i, j = (0, -1) if ratio.kind == "at most" else (-1, 0)
        y = (base[1][i] + arm[1][j]) / 2
        for curve, k in ((base, i), (arm, j)):
            axes.plot([math.exp(curve[0][k]) / scale] * 2, [curve[1][k], y], ":", color="black", lw=1.4)
        arrow(base[0][i], arm[0][j], y, f"{ratio.kind} {ratio.value:.2f}x")
    if ratio.kind not in ("gap", "crossing"):
        return []
    low, high = ratio.range
    if ratio.kind == "crossing":
        for y in (low + 0.1 * (high - low), high - 0.1 * (high - low)):
            b, a = costs(y)
            arrow(b, a, y, f"{math.exp(b - a):.2f}x")
    else:
        interval = f" [{ratio.low:.2f}, {ratio.high:.2f}]" if ratio.degrees else ""
        arrow(*costs((low + high) / 2), (low + high) / 2, f"{ratio.value:.2f}x{interval}")
    axes.axhspan(low, high, color=colour, alpha=0.09, lw=0, zorder=0)
    return [Patch(color=colour, alpha=0.2, lw=0)]


# General verbs


def scatter(
    frame: pd.DataFrame,
    x: str,
    y: str,
    *,
    by: str | None = None,
    title: str = "",
    xlabel: str | None = None,
    ylabel: str | None = None,
    logx: bool = False,
    logy: bool = False,
) -> Figure:
    """Draw a mark a row. x, y: columns; by: a column (or level of the index) whose values get a colour each.

    >>> scatter(pd.DataFrame({"ms": [1.0, 2.0], "flops": [3.0, 4.0]}), "flops", "ms").axes[0].get_ylabel()
    'ms'
    """
    figure, axes = new(height=4.4)
    frame = frame.reset_index()
    groups = {"": frame} if by is None else dict(list(frame.groupby(by, sort=False)))
    handles = [
        axes.plot(
            part[x], part[y], MARKERS[i % len(MARKERS)], color=COLOURS[i % len(COLOURS)], ms=7, alpha=0.8
        )[0]
        for i, part in enumerate(groups.values())
    ]
    _finish(axes, title, x if xlabel is None else xlabel, y if ylabel is None else ylabel)
    if logx:
        _log_axis(axes.xaxis, frame[x])
    if logy:
        _log_axis(axes.yaxis, frame[y])
    if by is not None:
        _legend(figure, handles, [literal(g) for g in groups])
    return figure


def lines(
    frame: pd.DataFrame | pd.Series,
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    predicted: pd.DataFrame | pd.Series | None = None,
    logx: bool = False,
    logy: bool = False,
) -> Figure:
    """Draw a line a column over the index. predicted: the same columns, dashed.

    >>> measured = pd.DataFrame({"fp32": [1.0, 3.0]}, index=[16, 32])
    >>> len(lines(measured, xlabel="channels", ylabel="ms", predicted=measured).axes[0].lines)
    2
    """
    frame = _frame(frame)
    predicted = pd.DataFrame() if predicted is None else _frame(predicted)
    figure, axes = new(height=4.6)
    numeric = pd.api.types.is_numeric_dtype(frame.index)
    handles, labels = [], []
    for i, name in enumerate(frame.columns):
        for data, style in ((frame, "-"), (predicted, "--")):
            if name not in data:
                continue
            column = data[name].dropna()
            at = column.index if numeric else frame.index.get_indexer(column.index)
            look = (
                dict(marker=MARKERS[i % len(MARKERS)], ms=6, lw=2)
                if style == "-"
                else dict(lw=1.6, alpha=0.8)
            )
            drawn = axes.plot(at, column, style, color=COLOURS[i % len(COLOURS)], **look)
            if style == "-" and (len(frame.columns) > 1 or len(predicted)):
                handles += drawn
                labels.append(literal(name))
    if len(predicted):
        handles.append(Line2D([], [], color="black", ls="--", lw=1.6))
        labels.append("predicted")
    _finish(axes, title, xlabel, ylabel)
    if not numeric:
        axes.set_xticks(range(len(frame)), [literal(v) for v in frame.index])
    elif logx:
        _log_axis(axes.xaxis, frame.index)
        if len(frame) <= 8:
            plain_log(axes.xaxis, values=sorted(set(frame.index)))
    if logy:
        _log_axis(axes.yaxis, [*frame.to_numpy().ravel(), *predicted.to_numpy().ravel()])
    _legend(figure, handles, labels)
    return figure


def bars(
    values: pd.Series | pd.DataFrame | Mapping[str, float],
    *,
    xlabel: str,
    title: str = "",
    marks: pd.Series | pd.DataFrame | None = None,
    errors: pd.Series | pd.DataFrame | None = None,
) -> Figure:
    """Draw horizontal bars with their values, a row an index entry; a column each has a colour.

    marks: values of the same shape, drawn as diamonds, such as predictions; a series' name goes into the
    legend. errors: half widths, of the same shape, or columns "low" and "high" of intervals.

    >>> [t.get_text() for t in bars({"exact": 2.0, "half": 1.5}, xlabel="ms").axes[0].get_yticklabels()]
    ['exact', 'half']
    """
    name = getattr(marks, "name", None) or "predicted"
    frame = _frame(values)
    wide, columns = len(frame.columns), list(frame.columns)
    if marks is not None:
        marks = _frame(marks).reindex(index=frame.index, columns=columns)
    figure, axes = new(height=1.3 + len(frame) * (0.2 + 0.3 * wide))
    handles, high = [], 0.82 / wide
    for i, column in enumerate(columns):
        at, value = np.arange(len(frame)) + (i - (wide - 1) / 2) * high, frame[column]
        beside = _beside(errors, frame, column)
        handles.append(
            axes.barh(
                at,
                value,
                0.9 * high,
                color=COLOURS[i % len(COLOURS)],
                xerr=beside,
                error_kw=dict(lw=1.5, capsize=4),
            )
        )
        if marks is not None:
            axes.plot(marks[column], at, "D", color="black", mfc="white", ms=7, mew=1.6, zorder=4)
        for k, v in enumerate(value):
            beyond = [0, v] if marks is None else [0, v, marks[column].iloc[k]]
            inside = (marks is not None or beside is not None) and v > 0.12 * frame.max(axis=None)
            look = dict(color="white" if inside else "black", fontsize=TEXT, va="center")
            if math.isfinite(v):  # beside a mark it would be taken for the mark's
                place = (0 if inside else np.nanmax(beyond), at[k])
                axes.annotate(f"{v:.3g}", place, (6, 0), textcoords="offset points", **look)
    axes.set_yticks(range(len(frame)), [literal(_key(k)) for k in frame.index])
    axes.set_ylim(len(frame) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.grid(axis="y", alpha=0)
    _finish(axes, title, xlabel, "")
    handles, labels = (handles, [literal(c) for c in columns]) if wide > 1 else ([], [])
    if marks is not None:
        handles.append(Line2D([], [], ls="", marker="D", color="black", mfc="white", ms=7, mew=1.6))
        labels.append(literal(name))
    _legend(figure, handles, labels)
    return figure


def _beside(errors, frame, column):
    """What `barh` takes as errors: (below, above) a column's values, or None."""
    if errors is None:
        return None
    errors = _frame(errors).reindex(index=frame.index)
    if list(errors.columns) == ["low", "high"]:
        return [frame[column] - errors["low"], errors["high"] - frame[column]]
    return [errors[column]] * 2


def heatmap(
    frame: pd.DataFrame,
    *,
    label: str,
    title: str = "",
    fmt: str = "{:.0f}",
    mark: tuple | None = None,
) -> Figure:
    """Draw a table as coloured cells with their numbers; cells without one stay empty.

    label: of the colours, with the unit. The names of index and columns label the axes. mark: (row, column)
    of a cell that is framed.

    >>> heatmap(pd.DataFrame({"a": [1.0, 2.0]}), label="ms").axes[0].texts[1].get_text()
    '2'
    """
    rows, columns = frame.shape
    figure, axes = new(width=min(10.0, max(5.0, 2.4 + 0.85 * columns)), height=1.5 + 0.45 * rows)
    values = frame.to_numpy(float)
    image = axes.imshow(values, cmap="viridis", aspect="auto")
    for i, j in zip(*np.nonzero(np.isfinite(values)), strict=True):
        red, green, blue, _ = image.cmap(image.norm(values[i, j]))
        dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
        axes.text(
            j, i, fmt.format(values[i, j]), ha="center", va="center", color="white" if dark else "black"
        )
    if mark is not None:
        i, j = frame.index.get_loc(mark[0]), frame.columns.get_loc(mark[1])
        axes.add_patch(Rectangle((j - 0.47, i - 0.47), 0.94, 0.94, fill=False, ec=COLOURS[1], lw=3))
    axes.set_xticks(range(columns), [literal(_key(c)) for c in frame.columns])
    axes.set_yticks(range(rows), [literal(_key(r)) for r in frame.index])
    if columns and max(len(_key(c)) for c in frame.columns) > 8:
        axes.tick_params(axis="x", rotation=35)
        for tick in axes.get_xticklabels():
            tick.set(ha="right", rotation_mode="anchor")
    axes.grid(False)
    _finish(axes, title, literal(frame.columns.name or ""), literal(frame.index.name or ""))
    figure.colorbar(image, ax=axes, label=label)
    return figure


def strip(
    frame: pd.DataFrame, *, value: str, by: str, xlabel: str, title: str = "", mark_mean: bool = True
) -> Figure:
    """Draw a dot a row, grouped along the other axis; a bar is a group's mean, dashed the first one's.

    value, by: columns (or levels of the index). Groups come in the order of their first rows.

    >>> runs = pd.DataFrame({"arm": ["baseline", "baseline", "narrow"], "accuracy": [80.0, 81.0, 79.0]})
    >>> [t.get_text() for t in strip(runs, value="accuracy", by="arm", xlabel="%").axes[0].get_yticklabels()]
    ['baseline', 'narrow']
    """
    groups = {k: part[value].dropna() for k, part in frame.reset_index().groupby(by, sort=False)}
    figure, axes = new(height=1.4 + 0.45 * len(groups))
    palette = colours(groups)
    for y, (name, values) in enumerate(groups.items()):
        axes.plot(values, [y] * len(values), "o", color=palette[name], ms=7, alpha=0.6, mew=0)
        if mark_mean and len(values):
            axes.plot([values.mean()] * 2, [y - 0.32, y + 0.32], color=palette[name], lw=3)
            if y == 0:
                axes.axvline(values.mean(), color="black", lw=1, ls="--", zorder=0)
    axes.set_yticks(range(len(groups)), [literal(g) for g in groups])
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.margins(x=0.08)
    axes.grid(axis="y", alpha=0)
    _finish(axes, title, xlabel, "")
    return figure


def shares(
    parts: Mapping[str, Mapping[str, float]],
    *,
    title: str = "",
    unit: str = "ms",
    xlabel: str | None = None,
) -> Figure:
    """Draw stacked horizontal bars: where the time goes. parts: row -> part -> time in `unit`.

    >>> shares({"resnet": {"forward": 3.0, "backward": 6.0}}).axes[0].get_xlabel()
    'ms per training step'
    """
    if not parts:
        raise BadInput("shares needs a row of parts to draw, got none")
    figure, axes = new(height=1.6 + 0.6 * len(parts))
    names = list(dict.fromkeys(p for row in parts.values() for p in row))
    longest, drawn = max(sum(row.values()) for row in parts.values()), {}
    for y, row in enumerate(parts.values()):
        begin, total = 0.0, sum(row.values())
        for name, value in row.items():
            colour = COLOURS[names.index(name) % len(COLOURS)]
            drawn[name] = axes.barh(y, value, left=begin, height=0.66, color=colour)
            if value > 0.07 * longest:
                place = dict(ha="center", va="center", color="white")
                axes.text(begin + value / 2, y, f"{value / total:.0%}", **place)
            begin += value
        axes.text(begin, y, f" {total:.3g} {unit}", va="center")
    axes.set_yticks(range(len(parts)), [literal(p) for p in parts])
    axes.set_ylim(len(parts) - 0.5, -0.5)
    axes.margins(x=0.14)
    axes.grid(axis="y", alpha=0)
    _finish(axes, title, f"{unit} per training step" if xlabel is None else xlabel, "")
    _legend(figure, [drawn[name] for name in names], [literal(n) for n in names])
    return figure


def histogram(
    values: Mapping[str, Sequence[float]],
    *,
    bins: int = 60,
    xlabel: str = "",
    marks: Iterable[tuple[float, str]] = (),
    title: str = "",
    spans: Iterable[tuple[float, float, str]] = (),
) -> Figure:
    """Draw the histograms of several samples on one axis.

    values: name -> sample. marks: (x, text). spans: (low, high, text), shaded.

    >>> histogram({"gradients": [0.0, 1.0, 1.0]}, xlabel="size").axes[0].get_xlabel()
    'size'
    """
    if empty := [name for name, v in values.items() if len(v) == 0] or not values:
        raise BadInput(f"histogram needs values to draw, got none{f' for {empty[0]}' if values else ''}")
    figure, axes = new(height=4.2)
    low = min(float(np.min(v)) for v in values.values())
    high = max(float(np.max(v)) for v in values.values())
    handles = []
    for i, v in enumerate(values.values()):
        look = dict(histtype="stepfilled", alpha=0.5, color=COLOURS[i % len(COLOURS)])
        handles += axes.hist(v, bins=np.linspace(low, high, bins), **look)[2]
    spans, marks, top = list(spans), list(marks), 0.99
    axes.set_ylim(top=axes.get_ylim()[1] * (1 + 0.1 * (len(spans) + len(marks))))  # room for their texts
    for begin, *end, text in [*spans, *marks]:
        if end:
            axes.axvspan(begin, *end, color=RED, alpha=0.08)
        else:
            axes.axvline(begin, color="black", lw=1.4, ls=":")
        left = begin < low + 0.6 * (high - low)
        look = dict(va="top", ha="left" if left else "right", color=RED if end else "black")
        axes.text(begin, top, f" {text} ", transform=axes.get_xaxis_transform(), **look)
        top -= 0.08
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    _finish(axes, title, xlabel, "values")
    _legend(figure, handles, [literal(n) for n in values])
    return figure


def _finish(axes, title, xlabel, ylabel):
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)


def _frame(values):
    """A DataFrame of a frame, series or mapping."""
    if isinstance(values, pd.DataFrame):
        return values.astype(float)
    return pd.Series(values, dtype=float).to_frame("")


def _key(key):
    """An index entry in words; of several levels all."""
    if isinstance(key, tuple):
        return ", ".join(map(_key, key))
    return f"{key:g}" if isinstance(key, float) else str(key)


# The scoreboard

LOOKS = {  # how a verdict begins -> colour, marker: told apart without colours too
    FASTER: (COLOURS[2], "o"),
    SLOWER: (COLOURS[1], "v"),
    NO_DIFFERENCE: ("#444444", "s"),
    DEPENDS: (COLOURS[0], "D"),
    OUT_OF_REACH: (RED, "X"),
    DIVERGED: (RED, "X"),
}
SURVIVES = "\N{BLACK STAR}"


def scoreboard(rows: Sequence[Mapping]) -> Figure:
    """Draw every recorded speed-up at equal accuracy with its interval and verdict.

    rows: as `series.headlines` gives them: chapter, title, arm, against, dataset, and of the verdict ratio,
    low, high, kind, verdict, text, aim, aim_verdict, survives. older: measured under an older protocol.

    >>> row = dict(chapter="3.2", title="Mixed precision", arm="bf16", against="fp32", dataset="cifar10")
    >>> row |= dict(ratio=1.38, low=1.31, high=1.45, kind="gap", verdict="faster", text="1.38x [1.31, 1.45]")
    >>> [text.get_text() for text in scoreboard([row]).axes[0].texts][:2]
    ['3.2  Mixed precision', 'faster']
    """
    figure, axes = new(height=1.3 + 0.86 * max(1, len(rows)))
    ends = [row.get(k) for row in rows for k in ("ratio", "low", "high")]
    ends = [e for e in ends if e and math.isfinite(e)]
    low, high = min([0.7, *ends]) / 1.15, max([1.5, *ends]) * 1.15
    for y, row in enumerate(rows):
        _row(axes, y, row)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    plain_log(axes.xaxis, values=_ticks(low, high))
    axes.set_yticks([])
    axes.set_ylim(max(1, len(rows)) - 0.4, -0.75)
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    notes = ["speed-up at equal accuracy, 95 % interval (x, log scale)"]
    if any(row.get("survives") for row in rows):
        notes.append(f"{SURVIVES} survives Holm's correction over all rows")
    if any(map(_older, rows)):
        notes.append("older protocol: time to one target accuracy, another question")
    axes.set_xlabel("\n".join(notes))
    return figure


def _older(row):
    return bool(row.get("older") or row.get("schema") == 1 or not row.get("kind"))


def _row(axes, y, row):
    """A row of the scoreboard: two lines of text, and below them the interval."""
    older = _older(row)
    verdict = "older protocol" if older else row["verdict"]
    colour, marker = next((v for k, v in LOOKS.items() if verdict.startswith(k)), (GREY, "o"))
    colour = PALE if older else colour
    across = axes.get_yaxis_transform()  # x in shares of the axis, y in rows
    what = f"{row['arm']} against {row['against']}, {row.get('dataset') or ''}"
    text = row["text"].split(", n=")[0].removeprefix(f"{row['arm']}: ")
    if verdict.startswith(SATURATED):
        points = row.get("points")
        text = verdict.removeprefix(f"{SATURATED}, ") + ("" if points is None else f", {points:+.2f} points")
    star = f" {SURVIVES}" if row.get("survives") else ""
    aim = f"; aim {row['aim']:g}x {row.get('aim_verdict', '')}" if row.get("aim") is not None else ""
    left, right = dict(transform=across, va="center"), dict(transform=across, va="center", ha="right")
    heading = textwrap.shorten(f"{row['title']}", 34, placeholder=" ...")
    axes.text(0, y - 0.5, literal(f"{row['chapter']}  {heading}"), weight="bold", fontsize=12, **left)
    axes.text(1, y - 0.5, literal(_brief(verdict) + star), weight="bold", fontsize=12, color=colour, **right)
    what = textwrap.shorten(what, max(20, 80 - len(text + aim)), placeholder=" ...")
    axes.text(0, y - 0.22, literal(what), color="#555555", **left)
    axes.text(1, y - 0.22, literal(f"{text}{aim}"), color=colour, **right)
    axes.axhline(y + 0.1, color="black", lw=0.6, alpha=0.15, zorder=0)
    axes.plot([1, 1], [y, y + 0.2], color="black", lw=1.2)
    if row.get("ratio") is None or not math.isfinite(row["ratio"]):
        return
    bound = {"at most": "<", "at least": ">"}.get(row.get("kind"))
    if bound:
        marker = bound
    else:
        ends = [row["ratio"] if row.get(k) is None else row[k] for k in ("low", "high")]
        axes.plot(ends, [y + 0.1] * 2, color=colour, lw=7, alpha=0.4, solid_capstyle="round")
    axes.plot(row["ratio"], y + 0.1, marker, color=colour, ms=8)


def _brief(verdict):
    """A verdict short enough for a row: what follows a colon is in the text beside it."""
    head = verdict.split(":")[0].split(", at equal cost")[0]
    known = (OUT_OF_REACH, FASTER, DEPENDS, SATURATED)
    return head if head in known else textwrap.shorten(verdict, 36, placeholder=" ...")
