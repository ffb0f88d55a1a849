"""Pictures draw what they are given, also when that is little, equal or missing."""

import io
import math
import random
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from effilib import figures, paths, statistics
from effilib.errors import BadInput
from effilib.experiment import SEEDS, Arm
from effilib.history import History
from effilib.results import Comparison
from effilib.tasks import task


def drawn(figure):
    """Render for real; return the picture's (width, height)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    picture = Image.open(buffer)
    assert np.asarray(picture.convert("L")).std() > 0  # not an empty sheet
    return picture.size


def texts(figure):
    found = [t.get_text() for t in figure.findobj(mpl.text.Text) if t.get_text()]
    return [t.replace(r"\$", "$").replace("\n", " ") for t in found]


def legend(figure):
    return [t.get_text() for t in figure.legends[0].get_texts()] if figure.legends else []


# Accuracy over time


def rise(factor=1.0, up=0.0, slope=11.5):
    """From 77 % at 50 s to 85 % at 100 s; `factor` times as fast, `up` points higher."""
    return lambda length: (100 * length / factor, 85 + up + slope * math.log(length))


def made(*shapes, lengths=(0.5, 0.71, 1.0), seeds=3, noise=0.2, diverged=(), roles=(), **settings):
    """A comparison of made-up trainings. shapes: length -> (seconds, accuracy), the baseline first."""
    draw, cells = random.Random(1), []
    names = ["baseline", *(f"arm {i}" for i in range(1, len(shapes)))]
    arms = tuple(
        Arm(name=n, role=r) for n, r in zip(names, roles or ["baseline", *["method"] * 9], strict=False)
    )
    for block in range(seeds):
        for i, length in enumerate(lengths):
            runs = {}
            for name, shape in zip(names, shapes, strict=True):
                seconds, accuracy = shape(length)
                accuracy += draw.gauss(0, noise)
                bad = (name, block) in diverged
                runs[name] = History(
                    rows=[] if bad else [{"step": 30, "epoch": 1, "seconds": seconds, "accuracy": accuracy}],
                    steps=30, seconds=seconds, raw_seconds=seconds, flops=1e12 * length, seen=1000,
                    diverged=bad, final=math.nan if bad else accuracy, test_accuracy=accuracy, held_out=9000,
                )  # fmt: skip
            own = dict.fromkeys(names, length)
            cells.append({"seed": SEEDS * i + block, "length": length, "lengths": own, "arms": runs})
            cells[-1] |= {"machine": {"summary": "2-core CPU"}, "shared": False, "date": "2026-11-29"}
    t = task("quick", "mnist5k", seeds=seeds, lengths=lengths)
    return Comparison(task=t, arms=arms, cells=cells, **settings)


def marks(figure, size):
    """(x, y) of the marks of a size, line by line."""
    lines = [line for line in figure.axes[0].lines if line.get_ls() == "None" and line.get_ms() == size]
    return [line.get_xydata() for line in lines]


def arrows(figure):
    """(x of the baseline, x of the arm, accuracy) of the gaps that are drawn."""
    found = [t for t in figure.axes[0].texts if getattr(t, "arrow_patch", None)]
    return [(t.xyann[0], t.xy[0], t.xy[1]) for t in found]


def test_there_is_a_mark_a_training_and_the_means_of_a_length_are_joined():
    comparison = made(rise(), rise(1.4, -0.5))
    figure = figures.curves(comparison)
    assert figure.axes[0].get_xscale() == "log"
    one, mean = iter(marks(figure, 4.5)), iter(np.concatenate(marks(figure, 9)))
    for arm in ("baseline", "arm 1"):
        for length in comparison.lengths:
            runs, found = comparison.histories(arm, length), next(one)
            assert found[:, 0] == pytest.approx([h.seconds for h in runs])
            assert found[:, 1].tolist() == [h.accuracy for h in runs]
            assert next(mean) == pytest.approx([runs[0].seconds, np.mean(found[:, 1])])
    thick = [line for line in figure.axes[0].lines if line.get_lw() > 2]
    assert [len(line.get_xdata()) for line in thick] == [3, 3]
    assert legend(figure) == ["baseline", "arm 1", "accuracies that both reach"]
    drawn(figure)


def test_where_accuracy_falls_the_line_lies_between_the_means():
    falls = {0.5: (50, 77.0), 0.71: (71, 84.0), 1.0: (100, 82.0)}
    figure = figures.curves(made(falls.get, noise=0.0))
    thick, dotted = (next(line for line in figure.axes[0].lines if line.get_ls() == style) for style in "-:")
    assert thick.get_ydata().tolist() == [77, 83]
    assert dotted.get_ydata().tolist() == [77, 84, 82]


def test_the_gap_is_drawn_at_the_middle_of_the_common_range_and_says_the_ratio():
    comparison = made(rise(), rise(1.4), noise=0.0)
    figure = figures.curves(comparison)
    (base, arm, accuracy), ratio = arrows(figure)[0], comparison.ratio("arm 1")
    assert accuracy == pytest.approx(sum(ratio.range) / 2)
    assert base / arm == pytest.approx(1.4, rel=0.01)
    assert f"{ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]" in texts(figure)
    assert "arm 1: 1.40x [1.40, 1.40] at 77-85 %, faster" in texts(figure)
    shaded = [p.get_y() + np.array([0, p.get_height()]) for p in figure.axes[0].patches]
    assert shaded[0] == pytest.approx(ratio.range)


def test_curves_that_cross_have_a_gap_on_either_side():
    comparison = made(rise(), rise(1.05, -2.0, slope=7))
    (base, arm, low), (base_above, arm_above, high) = arrows(figures.curves(comparison))
    assert base > arm  # faster where little accuracy is wanted
    assert base_above < arm_above
    assert low < comparison.ratio("arm 1").crossing < high
    assert "arm 1: depends on the budget: faster below 81 %, slower above" in texts(
        figures.curves(comparison)
    )


@pytest.mark.parametrize(
    ("shape", "word", "title"),
    [(rise(1.3, -12), "at most", "out of reach: at most"), (rise(1.3, 12), "at least", "faster: at least")],
)
def test_without_a_common_accuracy_the_bound_is_drawn_and_named(shape, word, title):
    comparison = made(rise(), shape)
    bound = f"{comparison.ratio('arm 1').value:.2f}x"
    figure = figures.curves(comparison)
    base, arm, _ = arrows(figure)[0]
    assert f"{base / arm:.2f}x" == bound
    assert {f"{word} {bound}", f"arm 1: {title} {bound}"} <= set(texts(figure))
    assert not [p for p in figure.axes[0].patches if p.get_alpha()]  # nothing is common, nothing shaded
    drawn(figure)


def test_a_diverged_run_is_said_and_the_others_are_drawn():
    figure = figures.curves(made(rise(), rise(1.4), diverged=[("arm 1", 0)]))
    assert [len(points) for points in marks(figure, 4.5)] == [3] * 3 + [2] * 3
    assert "arm 1 (3 of 9 runs diverged)" in legend(figure)
    assert "arm 1: 3 of 9 runs diverged" in texts(figure)
    assert not arrows(figure)
    everything = [("arm 1", block) for block in range(3)]
    drawn(figures.curves(made(rise(), rise(1.4), diverged=everything)))
    drawn(
        figures.curves(made(rise(), rise(1.4), diverged=[("baseline", block) for block in range(3)], aim=1.1))
    )


def test_a_saturated_baseline_has_no_gap_and_is_named():
    figure = figures.curves(made(rise(slope=0.3), rise(1.4, 2, slope=0.3), noise=0.05))
    assert not arrows(figure)
    assert any("the baseline is saturated at 85.0 %; at equal cost more accurate" in t for t in texts(figure))


def test_the_aim_is_the_baselines_curve_so_many_times_as_fast():
    figure = figures.curves(made(rise(), rise(1.4), aim=1.25, noise=0.0))
    dotted = next(line for line in figure.axes[0].lines if line.get_ls() == ":")
    assert dotted.get_xdata() == pytest.approx([40, 56.8, 80])
    assert "aim 1.25x: met" in legend(figure)
    assert "aim 2x" in legend(figures.curves(made(rise(), rise(1.4)), aim=2))


def test_the_gap_is_the_first_methods_or_that_of_the_arm_that_is_named():
    comparison = made(rise(), rise(0.8), rise(1.4), roles=("baseline", "control", "method"), noise=0.0)
    assert any("arm 2: 1.40x" in t for t in texts(figures.curves(comparison)))
    one = figures.curves(comparison, "arm 1")
    assert any("arm 1: 0.80x" in t for t in texts(one))
    assert legend(one)[:2] == ["baseline", "arm 1"]


@pytest.mark.parametrize("cost", ["seconds", "flops", "images"])
@pytest.mark.parametrize("arms", [1, 2, 9])
@pytest.mark.parametrize(("lengths", "seeds"), [((1.0,), 1), ((0.5, 1.0), 1), ((0.5, 1.0), 3)])
def test_curves_of_any_comparison_can_be_drawn(cost, arms, lengths, seeds):
    comparison = made(*(rise(1 + 0.1 * i) for i in range(arms)), lengths=lengths, seeds=seeds)
    width, height = drawn(figures.curves(comparison, cost=cost))
    assert 700 < width < 900
    assert 400 < height < 900


def test_equal_accuracies_are_not_spread_over_the_whole_axis():
    low, high = (
        figures.curves(made(rise(slope=0), rise(slope=0), lengths=(1.0,), noise=0.01)).axes[0].get_ylim()
    )
    assert high - low >= 2


def test_dollar_signs_are_dollar_signs_everywhere():
    names = ["$5", "a $b$ c", "$\\frac"]
    frame = pd.DataFrame(np.ones((3, 3)), index=pd.Index(names, name="$x"), columns=names)
    long = pd.DataFrame({"arm": names, "value": [1.0, 2.0, 3.0]})
    made_of = [
        figures.heatmap(frame, label="%"), figures.bars(frame, xlabel="%"),
        figures.lines(frame, xlabel="", ylabel=""), figures.scatter(long, "value", "value", by="arm"),
        figures.strip(long, value="value", by="arm", xlabel=""),
        figures.shares({n: {n: 1.0} for n in names}), figures.histogram({n: [1.0, 2.0] for n in names}),
        figures.scoreboard([{**row("faster", 1.2, 1.1, 1.3), "title": "$x", "arm": "$", "dataset": "a$"}]),
    ]  # fmt: skip
    for figure in made_of:
        drawn(figure)
        assert any("$" in t for t in texts(figure))
    comparison = made(rise(), rise(1.2))
    arms = (comparison.arms[0], Arm(name="$m^"))
    cells = [
        {**c, "arms": {"baseline": c["arms"]["baseline"], "$m^": c["arms"]["arm 1"]}}
        for c in comparison.cells
    ]
    drawn(figures.curves(Comparison(task=comparison.task, arms=arms, cells=cells)))


# The scoreboard


def row(verdict, ratio=None, low=None, high=None, kind="gap", **others):
    text = (
        f"{ratio:.2f}x [{low:.2f}, {high:.2f}] at 77-85 %, n=5x3" if low else "3 of 15 runs diverged, n=5x3"
    )
    what = {
        "chapter": "3.2",
        "title": "Mixed precision",
        "arm": "bf16",
        "against": "fp32",
        "dataset": "cifar10",
    }
    return {
        **what,
        "ratio": ratio,
        "low": low,
        "high": high,
        "kind": kind,
        "verdict": verdict,
        "text": text,
        **others,
    }


def dots(axes):
    return {
        tuple(line.get_xydata()[0].round(2)): line
        for line in axes.lines
        if line.get_marker() not in ("None", "") and len(line.get_xdata()) == 1
    }


def test_the_scoreboard_places_ratios_with_their_intervals():
    rows = [row("faster", 1.7, 1.5, 1.9), row("diverged", kind="diverged"), row("slower", 0.02, 0.01, 0.04)]
    axes = figures.scoreboard(rows).axes[0]
    assert axes.get_xscale() == "log"
    bars = [list(line.get_xdata()) for line in axes.lines if line.get_lw() > 5]
    assert bars == [[1.5, 1.9], [0.01, 0.04]]
    found = dots(axes)
    assert set(found) == {(1.7, 0.1), (0.02, 2.1)}  # (x, row)
    assert len({to_hex(line.get_color()) for line in found.values()}) == 2
    assert len({line.get_marker() for line in found.values()}) == 2
    assert axes.get_xlim()[0] < 0.01
    said = set(texts(axes.figure))
    assert {
        "1.70x [1.50, 1.90] at 77-85 %",
        "3 of 15 runs diverged",
        "slower",
        "3.2  Mixed precision",
    } <= said
    drawn(axes.figure)


def test_a_bound_points_to_where_the_ratio_may_lie():
    rows = [
        row("out of reach: at most 0.65x", 0.65, kind="at most"),
        row("faster: at least 2.6x", 2.6, kind="at least"),
    ]
    found = dots(figures.scoreboard(rows).axes[0])
    assert [found[at].get_marker() for at in ((0.65, 0.1), (2.6, 1.1))] == ["<", ">"]


def test_what_survives_holms_correction_is_marked_and_the_aim_said():
    rows = [
        row("faster", 1.7, 1.5, 1.9, survives=True, aim=1.1, aim_verdict="met"),
        row("slower", 0.9, 0.8, 0.99, survives=False),
    ]
    said = texts(figures.scoreboard(rows))
    assert {"faster ★", "slower", "1.70x [1.50, 1.90] at 77-85 %; aim 1.1x met"} <= set(said)
    assert any("★ survives Holm's correction" in t for t in said)
    assert not any("★" in t for t in texts(figures.scoreboard(rows[1:])))


@pytest.mark.parametrize("old", [{"older": True}, {"schema": 1}, {"kind": None}])
def test_records_of_the_older_protocol_are_grey(old):
    axes = figures.scoreboard([row("faster at equal accuracy", 1.7, 1.5, 1.9, **old)]).axes[0]
    assert "older protocol" in texts(axes.figure)
    assert any("time to one target accuracy, another question" in t for t in texts(axes.figure))
    assert {to_hex(line.get_color()) for line in dots(axes).values()} == {to_hex(figures.PALE)}


WORDS = (
    statistics.FASTER, statistics.SLOWER, statistics.NO_DIFFERENCE, statistics.UNDECIDED, statistics.DIVERGED,
    f"{statistics.DEPENDS}: faster below 80 %, slower above",
    f"{statistics.SATURATED}, at equal cost undecided",
    statistics.SMOKE, statistics.SHARED, "stalls: 1.20x as measured, 1.10x without them",
)  # fmt: skip


@pytest.mark.parametrize(
    "rows", [[], [row(word, 1.0, 0.9, 1.1) for word in WORDS]], ids=["none", "every verdict"]
)
def test_every_verdict_has_its_place_on_the_scoreboard(rows):
    drawn(figures.scoreboard(rows))


# General verbs


MS = pd.DataFrame(
    {"fp32": [1.0, 2.5, 9.0], "bf16": [1.0, 1.5, np.nan]}, index=pd.Index([16, 32, 64], name="channels")
)


@pytest.mark.parametrize("log", [False, True])
def test_lines_are_columns_over_the_index_and_predictions_are_dashed(log):
    figure = figures.lines(
        MS, xlabel="channels", ylabel="ms", predicted=2 * MS, logx=log, logy=log, title="t"
    )
    styles = [(line.get_ls(), to_hex(line.get_color())) for line in figure.axes[0].lines]
    assert [style for style, _ in styles] == ["-", "--", "-", "--"]
    assert styles[0][1] == styles[1][1] != styles[2][1]
    assert figure.axes[0].lines[2].get_xydata().tolist() == [
        [16, 1],
        [32, 1.5],
    ]  # what is missing is left out
    assert legend(figure) == ["fp32", "bf16", "predicted"]
    drawn(figure)


def test_lines_take_words_and_single_series():
    figure = figures.lines(MS["fp32"].set_axis(["narrow", "wide", "wider"]), xlabel="", ylabel="ms")
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["narrow", "wide", "wider"]
    assert legend(figure) == []
    drawn(figure)


@pytest.mark.parametrize("by", [None, "kind"])
def test_a_scatter_has_a_mark_a_row(by):
    frame = pd.DataFrame(
        {"x": [1e6, 2e8, 3e9], "y": [1.0, 2.0, 3.0]}, index=pd.Index(["a", "b", "a"], name="kind")
    )
    figure = figures.scatter(frame, "x", "y", by=by, logx=True)
    found = np.concatenate([line.get_xydata() for line in figure.axes[0].lines])
    assert sorted(map(tuple, found)) == [(1e6, 1.0), (2e8, 2.0), (3e9, 3.0)]
    assert legend(figure) == ([] if by is None else ["a", "b"])
    assert "1M" in [t.get_text() for t in figure.axes[0].get_xticklabels()]
    drawn(figure)


def test_bars_say_their_values_and_show_marks_and_intervals():
    ends = pd.DataFrame({"low": [1.0, 0.5], "high": [3.0, 1.0]}, index=["exact", "half"])
    values = pd.Series([2.0, 0.75], index=["exact", "half"])
    figure = figures.bars(values, xlabel="ms", marks=(2 * values).rename("by FLOPs"), errors=ends)
    axes = figure.axes[0]
    assert {"2", "0.75", "exact", "half", "by FLOPs"} <= set(texts(figure))
    spans = [path.vertices[:, 0].tolist() for c in axes.collections for path in c.get_paths()]
    assert spans == [[1.0, 3.0], [0.5, 1.0]]
    assert legend(figure) == ["by FLOPs"]
    drawn(figure)
    both = figures.bars(MS, xlabel="ms", errors=0.1 * MS)
    assert legend(both) == ["fp32", "bf16"]
    drawn(both)
    drawn(figures.bars({"a": 0.0}, xlabel="ms"))


def test_a_heatmap_writes_every_number_and_frames_one():
    frame = pd.DataFrame([[80.0, np.nan], [82.0, 85.0]], index=[0.1, 0.2], columns=[2, 4])
    figure = figures.heatmap(frame, label="accuracy (%)", fmt="{:.1f}", mark=(0.2, 4))
    assert {"80.0", "82.0", "85.0", "accuracy (%)", "0.1", "4"} <= set(texts(figure))
    assert [(p.get_x(), p.get_y()) for p in figure.axes[0].patches] == [(0.53, 0.53)]
    drawn(figure)
    drawn(figures.heatmap(pd.DataFrame(np.ones((12, 12))), label=""))


def test_a_strip_has_a_dot_a_run_and_a_bar_for_the_mean():
    runs = pd.DataFrame({"arm": list("aab"), "accuracy": [80.0, 82.0, 79.0]})
    axes = figures.strip(runs, value="accuracy", by="arm", xlabel="%").axes[0]
    bars = [line.get_xdata()[0] for line in axes.lines if line.get_lw() == 3]
    assert bars == [81.0, 79.0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "b"]
    drawn(axes.figure)


def test_shares_say_what_part_takes_how_much():
    fp32 = {"forward": 30.0, "backward": 60.0, "optimizer": 10.0}
    figure = figures.shares({"fp32": fp32, "bf16": {"forward": 20.0, "cast": 30.0}})
    said = texts(figure)
    assert {"30%", "60%", "10%", "40%"} <= set(said)
    assert any("100 ms" in t for t in said)
    assert any("50 ms" in t for t in said)
    assert legend(figure) == ["forward", "backward", "optimizer", "cast"]  # also what only a later row has
    drawn(figure)


@pytest.mark.parametrize(
    "values",
    [
        {"a": np.arange(100.0)},
        {f"{i}": np.arange(9.0) for i in range(9)},
        {"a": [1.0]},
        {"a": [1, 1], "b": [1]},
    ],
)
def test_histograms_take_any_samples(values):
    figure = figures.histogram(values, marks=[(0.5, "here")], spans=[(0, 1, "lost")], xlabel="x", title="t")
    assert {" here ", " lost "} <= set(texts(figure))
    assert legend(figure) == list(values)
    drawn(figure)


# What all have in common


@pytest.mark.parametrize("low", [0.003, 0.9, 20, 4e8])
@pytest.mark.parametrize("span", [1.2, 2, 5, 100, 1e6])
def test_a_logarithmic_axis_has_a_few_round_numbers(low, span):
    ticks = figures._ticks(low, low * span)
    assert 3 <= len(ticks) <= 8
    assert all(low <= t <= low * span for t in ticks)


def test_the_baseline_is_grey_and_no_two_of_seven_methods_share_a_colour():
    colours = figures.colours([f"{i}" for i in range(8)])
    assert colours["0"] == figures.GREY
    assert len({to_hex(c) for c in colours.values()}) == 8
    assert len(figures.colours([f"{i}" for i in range(30)])) == 30


def test_texts_can_be_read_at_half_the_size():
    """A page is 390 pixels wide, and a figure 7.5 inches: 10 points are 7 pixels there."""
    found = [
        figures.curves(made(rise(), rise(1.4), aim=1.1)),
        figures.scoreboard([row("faster", 1.7, 1.5, 1.9)]),
    ]
    for figure in [*found, figures.lines(MS, xlabel="x", ylabel="y", title="t")]:
        drawn(figure)
        shown = [t for t in figure.findobj(mpl.text.Text) if t.get_text() and t.get_visible()]
        assert min(t.get_fontsize() for t in shown) * 390 / (72 * figure.get_figwidth()) > 7.5


def test_figures_are_not_registered_with_pyplot_and_leave_the_style_alone():
    code = """
import sys, matplotlib as mpl
before = dict(mpl.rcParams.copy())  # dict() alone would look up the backend, and so import pyplot
from effilib import figures
figures.new()
assert "matplotlib.pyplot" not in sys.modules
assert dict(mpl.rcParams.copy()) == before
"""
    subprocess.run([sys.executable, "-c", code], cwd=paths.root(), check=True)


def test_nothing_to_draw_is_said():
    with pytest.raises(BadInput, match="histogram needs values to draw, got none for a"):
        figures.histogram({"a": []})
    with pytest.raises(BadInput, match="shares needs a row of parts to draw"):
        figures.shares({})
