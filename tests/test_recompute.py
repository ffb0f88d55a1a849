"""Every recorded verdict recomputed from the table of runs, by code that shares nothing with effilib.

The middle part needs pandas, numpy and scipy alone; paste it beside `results/recorded/all.csv`.
"""

import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import isotonic_regression
from scipy.stats import t

from effilib import clock, notebook, paths
from effilib.experiment import Arm
from effilib.history import History
from effilib.recipe import Recipe
from effilib.results import Comparison, compare
from effilib.tasks import Task, task

# --- from here


def curve(ends):
    """Accuracy -> log cost: means over seeds, pooled where accuracy falls."""
    means = ends.groupby("length")[["x", "accuracy"]].mean().sort_values("x")
    pooled = isotonic_regression(means.accuracy).x.round(9)
    return means.x.groupby(pooled).mean()


def gap(base, arm):
    """Mean horizontal distance over the accuracies that both cover; a bound where there are none."""
    base, arm = curve(base), curve(arm)
    low, high = max(base.index[0], arm.index[0]), min(base.index[-1], arm.index[-1])
    if low > high:
        below = arm.index[-1] < base.index[0]
        return base.iloc[0] - arm.iloc[-1] if below else base.iloc[-1] - arm.iloc[0]
    knots = np.unique(np.clip([*base.index, *arm.index], low, high))
    gaps = np.interp(knots, base.index, base) - np.interp(knots, arm.index, arm)
    return np.trapezoid(gaps, knots) / (high - low) if high > low else gaps[0]


def speed_up(base, arm):
    """(ratio, low, high): one cell left out at a time, stratified by length, Student's t."""
    variance, degrees = 0.0, 0
    for length, cells in base.groupby("length"):
        cut = [f"not (length == {length} and seed == {seed})" for seed in cells.seed]
        left = np.array([gap(base.query(c), arm.query(c)) for c in cut])
        variance += (len(left) - 1) / len(left) * ((left - left.mean()) ** 2).sum()
        degrees += len(left) - 1
    centre, half = gap(base, arm), t.ppf(0.975, degrees) * math.sqrt(variance)
    return np.exp([centre, centre - half, centre + half])


def recompute(runs, verdict):
    """All that the verdict may be of: its two arms in each comparison that has both."""
    found = []
    for _, rows in runs.groupby("comparison"):
        ends = rows.groupby(["arm", "seed", "length"]).tail(1)  # a training's last row is its end
        ends = ends.assign(x=np.log(ends[verdict["cost"]]))
        base, arm = (ends[ends.arm == verdict[name]] for name in ("against", "arm"))
        if len(base) and len(arm):
            found.append(speed_up(base, arm))
    return found


# --- to here


def word(ratio, low, high):
    if low > 1 / 1.05 and high < 1.05:
        return "no difference"
    return "faster" if low > 1 else "slower" if high < 1 else "undecided"


def check(runs, verdict):
    """Compare a verdict of a record with its runs. Returns whether there was a ratio to compare."""
    if verdict["ratio"] is None:  # diverged, or a flat baseline
        return False
    found = recompute(runs, verdict)
    sure = verdict["low"] is not None or verdict["high"] is not None
    end = {"at most": 2, "at least": 1}.get(verdict["kind"], 0) if sure else 0  # a bound is widened
    close = [f for f in found if f[end] == pytest.approx(verdict["ratio"], rel=1e-4)]
    assert close, (verdict, found)
    if verdict["kind"] in ("gap", "crossing") and verdict["low"] is not None:
        assert any(list(f[1:]) == pytest.approx([verdict["low"], verdict["high"]], rel=1e-3) for f in close)
        if verdict["kind"] == "gap" and verdict["verdict"] in (
            "faster",
            "slower",
            "no difference",
            "undecided",
        ):
            assert verdict["verdict"] in [word(*f) for f in close]
            aim = verdict["aim"]
            if aim:
                aimed = ["met" if f[1] >= aim else "missed" if f[2] < aim else "not decided" for f in close]
                assert verdict["aim_verdict"] in aimed
    return True


def recorded():
    for file in sorted(paths.recorded().glob("*-*/*/record.json")):
        record = json.loads(file.read_text())
        if record["schema"] == 2:
            yield pytest.param(file, record, id=f"{file.parents[1].name}/{file.parent.name}")


@pytest.mark.parametrize(("file", "record"), list(recorded()))
def test_recorded_verdicts_follow_from_the_recorded_runs(file, record):
    if not record["verdicts"]:
        return
    every = pd.read_csv(paths.recorded() / "all.csv")
    same = {"notebook": file.parent.name, "preset": record["preset"], "dataset": record["dataset"]}
    runs = every[(every[list(same)] == pd.Series(same)).all(axis=1)]
    own = pd.read_csv(file.parent / "history.csv")
    pd.testing.assert_frame_equal(runs[own.columns].reset_index(drop=True), own, check_dtype=False)
    checked = [check(runs, verdict) for verdict in record["verdicts"]]
    assert sum(checked) == sum(v["ratio"] is not None for v in record["verdicts"])


# The same on a record of the test's own, so that there is always one


ARMS = {  # name -> times as fast, points higher, points more an e-fold of time
    "baseline": (1, 0, 0), "faster": (1.4, 0, 0), "slower": (0.6, 0, 0), "same": (1.0, 0, 0),
    "crossing": (1.0, 0, 15), "below": (1.0, -9, 0), "above": (1.0, 9, 0), "falling": (1.2, 0, -22),
}  # fmt: skip


def made(rng, title, axis="epochs", seeds=4, noise=0.5):
    """A comparison whose runs are drawn at random."""
    t = Task(
        preset="quick", dataset="synthetic", recipe=Recipe(), lengths=(0.5, 0.71, 1.0), seeds=seeds, axis=axis
    )

    def history(arm, length):
        fast, above, steeper = ARMS[arm]
        seconds = 40 * length / fast * math.exp(0.01 * rng.normal())
        accuracy = 80 + above + (10 + steeper) * (math.log(length) + 0.35) + noise * rng.normal()
        rows = [
            dict(step=s, epoch=s, seconds=seconds * s / 9, lr=0.1, accuracy=a) for s, a in ((3, 20), (9, 0))
        ]
        made = dict(flops=seconds * 3e9, seen=round(9e3 * length), images=round(1e3 * length / fast), steps=9)
        ends = dict(final=accuracy, test_accuracy=accuracy, balanced_accuracy=accuracy)
        kept = dict(held_out=9000, classes=10, majority=10.0)
        return History(rows=rows, seconds=seconds, raw_seconds=seconds, **made, **ends, **kept)

    cells = [
        {
            "seed": 100 * i + j, "length": length, "lengths": dict.fromkeys(ARMS, length), "load": 0.1,
            "arms": {arm: history(arm, length) for arm in ARMS}, "machine": clock.machine(), "shared": False,
            "date": "2026-11-29",
        }
        for j in range(seeds) for i, length in enumerate(t.lengths)
    ]  # fmt: skip
    arms = [Arm(name=name, role="method" if i else "baseline") for i, name in enumerate(ARMS)]
    return Comparison(task=t, arms=tuple(arms), cells=cells, aim=1.2, title=title)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The folder of a record of two drawn comparisons and one that was really trained."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFILIB_RESULTS", str(folder))
        rng = np.random.default_rng(1)
        book = notebook.start("02_overview", preset="smoke", dataset="synthetic")
        trained = [Arm(name="as it is", role="baseline"), Arm(name="narrow", network={"widths": (4, 4, 8)})]
        real = compare(task("smoke", "synthetic", seeds=3, epochs=3), trained, title="trained")
        drawn = [made(rng, "one"), made(rng, "two", axis="images")]
        by_flops = [drawn[0].verdict(arm, "flops") for arm in list(ARMS)[1:]]
        book.record([*drawn, real], caption="made by a test", verdicts=by_flops)
        return book.folder


def test_verdicts_of_all_kinds_follow_from_the_runs(own):
    record, runs = json.loads((own / "record.json").read_text()), pd.read_csv(own / "history.csv")
    assert set(runs.comparison) == {"one", "two", "trained"}
    verdicts = record["verdicts"]
    assert {v["kind"] for v in verdicts} >= {"gap", "crossing", "at most", "at least"}
    assert {v["cost"] for v in verdicts} == {"seconds", "images", "flops"}
    assert {v["verdict"].split(":")[0] for v in verdicts} >= {"faster", "slower"}
    checked = [check(runs, verdict) for verdict in verdicts]
    assert sum(checked) >= 20


def test_a_changed_run_is_noticed(own):
    record, runs = json.loads((own / "record.json").read_text()), pd.read_csv(own / "history.csv")
    verdict = next(v for v in record["verdicts"] if v["arm"] == "faster" and v["cost"] == "seconds")
    assert check(runs, verdict)
    runs.loc[(runs.arm == "faster") & (runs.seed == 0), "seconds"] *= 1.1
    with pytest.raises(AssertionError):
        check(runs, verdict)
