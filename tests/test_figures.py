"""Pictures draw what they are given, also when that is little, equal or missing."""

import io
import math
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from effilib import figures, paths, statistics
from effilib.statistics import judge
from effilib.training import History


def drawn(figure):
    """Render for real; return the picture's (width, height)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    picture = Image.open(buffer)
    assert np.asarray(picture.convert("L")).std() > 0  # not an empty sheet
    return picture.size


def texts(figure):
    return [t.get_text() for t in figure.findobj(mpl.text.Text) if t.get_text()]


def comparison(arms=2, seeds=3, target=90.0, rows=5):
    names = ["baseline", *[f"arm {i}" for i in range(1, arms)]]

    def history(k, seed):
        seconds = np.linspace(0, 3 + k, rows)
        return History(
            rows=[{"seconds": s, "accuracy": 100 - 90 / (1 + s + 0.1 * seed)} for s in seconds.tolist()]
        )

    histories = {n: [history(k, s) for s in range(seeds)] for k, n in enumerate(names)}
    return SimpleNamespace(
        arms=[SimpleNamespace(name=n) for n in names],
        histories=histories.get,
        task=SimpleNamespace(target=target),
    )


VERDICT = judge(
    [2.0, 2.1, 2.2, 2.0, 2.1],
    [1.0, 1.1, 1.0, 1.0, 1.1],
    [0.0, 0.1, -0.1, 0.0, 0.0],
    margin=1,
    arm="method",
    claim=1.5,
)
MISSED = judge([2.0] * 5, [1.0, None, 1.0, 1.0, 1.0], [0.0] * 5, margin=1, arm="missed")
ONE = judge([2.0], [1.0], [0.0], margin=1, arm="one seed")


@pytest.mark.parametrize(("arms", "seeds", "rows"), [(1, 1, 1), (2, 1, 2), (2, 5, 20), (9, 2, 5)])
@pytest.mark.parametrize("target", [None, 90.0])
def test_accuracy_over_time_draws_each_seed_thin_and_the_median_thick(arms, seeds, rows, target):
    figure = figures.accuracy_over_time(comparison(arms, seeds, target, rows))
    left, _ = figure.axes
    curves = [line for line in left.lines if line.get_linestyle() == "-"]
    assert len([c for c in curves if c.get_linewidth() < 1]) == arms * seeds
    assert len([c for c in curves if c.get_linewidth() > 2]) == arms
    assert len([line for line in left.lines if line.get_linestyle() == "--"]) == (target is not None)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == [
        "baseline",
        *[f"arm {i}" for i in range(1, arms)],
    ]
    drawn(figure)


def test_the_thick_line_is_the_median_of_the_seeds_also_where_one_ended_early():
    c = comparison(1, 3)
    c.histories("baseline")[0].rows = c.histories("baseline")[0].rows[:2]
    thick = next(line for line in figures.accuracy_over_time(c).axes[0].lines if line.get_linewidth() > 2)
    expected = [np.median([h.rows[i]["accuracy"] for h in c.histories("baseline")]) for i in range(2)]
    assert thick.get_ydata() == pytest.approx(expected)


def test_the_target_lies_within_the_right_panel():
    for target in (20.0, 99.0):
        low, high = figures.accuracy_over_time(comparison(target=target)).axes[1].get_ylim()
        assert low < target
        assert high > 77  # the arms' last accuracy


@pytest.mark.parametrize(
    "verdicts",
    [
        [],
        [VERDICT],
        [MISSED],
        [ONE],
        [VERDICT, MISSED, ONE],
        [replace(VERDICT, ratio=20.0, low=0.05, high=30.0)],
    ],
)
@pytest.mark.parametrize("predicted", [None, {"method": 1.8}, {"method": math.nan}, {"another": 2.0}])
@pytest.mark.parametrize("claim", [None, 1.5])
def test_speed_ups_draw_every_kind_of_verdict(verdicts, predicted, claim):
    figure = figures.speed_ups(verdicts, predicted, title="title", claim=claim)
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == [v.arm for v in verdicts]
    low, high = axes.get_xlim()
    for v in verdicts:
        if v.ratio is not None:
            assert low < v.ratio < high
    assert ("4 of 5 reached the target" in texts(figure)) == (MISSED in verdicts)
    assert (f"aim {claim:g}x" in texts(figure) if claim else True) is True
    drawn(figure)


def row(verdict, ratio=None, low=None, high=None):
    text = (
        f"{ratio:.2f}x [{low:.2f}, {high:.2f}], n=5 pairs, 2-core CPU"
        if ratio
        else "3 of 5 reached the target"
    )
    what = {
        "chapter": "3.2",
        "title": "Mixed precision",
        "arm": "bf16",
        "against": "fp32",
        "quantity": "time per step",
        "dataset": "cifar10",
    }
    return {**what, "ratio": ratio, "low": low, "high": high, "verdict": verdict, "text": text}


def test_the_scoreboard_places_ratios_with_their_intervals_and_marks_what_missed_its_target():
    rows = [
        row("faster at equal accuracy", 1.7, 1.5, 1.9),
        row("target missed"),
        row("slower", 0.02, 0.01, 0.04),
    ]
    axes = figures.scoreboard(rows).axes[0]
    assert axes.get_xscale() == "log"
    bars = [line.get_xydata()[:, 0].tolist() for line in axes.lines if line.get_alpha()]
    assert bars == [[1.5, 1.9], [0.01, 0.04]]
    dots = {tuple(line.get_xydata()[0]): line for line in axes.lines if line.get_marker() != "None"}
    assert set(dots) == {(1.7, 0), (0.02, 2)}  # (x, row)
    assert (
        len({to_hex(line.get_color()) for line in dots.values()})
        == len({line.get_marker() for line in dots.values()})
        == 2
    )
    assert axes.get_xlim()[0] < 0.01
    said = texts(axes.figure)
    assert {
        "✗ target missed",
        "3 of 5 reached the target",
        "1.70x [1.50, 1.90]",
        "0.02x [0.01, 0.04]",
        "slower",
        "3.2  Mixed precision",
    } <= set(said)
    drawn(axes.figure)


def test_every_verdict_has_its_place_on_the_scoreboard():
    words = (
        statistics.FASTER,
        statistics.LESS_ACCURATE,
        statistics.SLOWER,
        statistics.NONE,
        statistics.INCONCLUSIVE,
    )
    drawn(figures.scoreboard([row(word, 1.0, 0.9, 1.1) for word in words]))
    assert set(figures.VERDICTS) <= {*words, statistics.MISSED}


def test_the_legend_names_each_thing_once():
    figure = figures.speed_ups([VERDICT, replace(VERDICT, arm="b")], {"method": 1.8, "b": 1.5}, claim=2)
    names = [t.get_text() for t in figure.legends[0].get_texts()]
    assert sorted(names) == ["aim 2x", "measured, 95 % interval", "predicted by FLOPs"]


def test_shares_say_what_part_takes_how_much():
    figure = figures.shares(
        {
            "fp32": {"forward": 30.0, "backward": 60.0, "optimizer": 10.0},
            "bf16": {"forward": 20.0, "backward": 30.0},
        }
    )
    said = texts(figure)
    assert {"30%", "60%", "10%", "40%"} <= set(said)
    assert any("100 ms" in t for t in said)
    assert any("50 ms" in t for t in said)
    drawn(figure)


def test_a_part_that_only_a_later_row_has_is_in_the_legend():
    figure = figures.shares({"fp32": {"forward": 30.0}, "bf16": {"forward": 20.0, "cast": 30.0}})
    assert {t.get_text() for t in figure.legends[0].get_texts()} == {"forward", "cast"}


def test_measured_and_predicted_has_a_panel_per_scan():
    panels = [
        {
            "title": "a",
            "xlabel": "n",
            "x": [1, 2, 4],
            "series": {"fp32": [1.0, 2.0, 4.0]},
            "predicted": {"fp32": [1.0, 2.0, 4.0]},
        },
        {"title": "b", "xlabel": "n", "x": [1, 2], "series": {"fp32": [1.0, 2.0]}, "predicted": {}},
    ]
    figure = figures.measured_and_predicted(panels)
    assert [len(a.lines) for a in figure.axes] == [2, 1]
    assert "predicted by FLOPs" in texts(figure)
    drawn(figure)
    drawn(figures.measured_and_predicted(panels[:1], logx=False, logy=False))


def test_a_sweep_has_a_panel_per_number_of_epochs():
    rows = [
        {"epochs": e, "weight_decay": wd, "lr": lr, "accuracy": 90 + e + seed}
        for e in (2, 4) for wd in (1e-4, 5e-4) for lr in (0.05, 0.1, 0.2) for seed in (0, 1)
    ]  # fmt: skip
    figure = figures.sweep(rows, title="tuning")
    assert [a.get_title(loc="left") for a in figure.axes] == ["2 epochs", "4 epochs"]
    drawn(figure)
    drawn(figures.sweep(rows[:1]))


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
    figure = figures.histogram(values, marks=[(0.5, "here")], spans=[(0, 1, "lost")], xlabel="x")
    assert {" here", " lost"} <= set(texts(figure))
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == list(values)
    drawn(figure)


def test_the_baseline_is_grey_and_no_two_of_seven_methods_share_a_colour():
    colours = figures.colours([f"{i}" for i in range(8)])
    assert colours["0"] == figures.GREY
    assert len({to_hex(c) for c in colours.values()}) == 8
    assert len(figures.colours([f"{i}" for i in range(30)])) == 30


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
