"""What is said of finished runs: ratios, verdicts, tables, notes, and what history.csv holds."""

import math
from dataclasses import dataclass, replace

import pandas as pd
import pytest

from effilib import clock, figures, paths
from effilib.errors import BadInput
from effilib.experiment import Arm
from effilib.history import History
from effilib.recipe import Recipe
from effilib.results import COLUMNS, Comparison, compare
from effilib.statistics import SHARED, SMOKE
from effilib.tasks import Task

TASK = Task(preset="quick", dataset="synthetic", recipe=Recipe(epochs=1), lengths=(0.5, 0.71, 1.0), seeds=3)


pytestmark = pytest.mark.usefixtures("alone")


@dataclass(frozen=True, kw_only=True)
class Made:
    """A run that takes no time: 84 % after 30 s, 10 points an e-fold of time."""

    name: str
    faster: float = 1.0
    noise: float = 0.3
    shift: float = 0.0
    slope: float = 10.0
    stalled: float = 0.0  # share of the raw time
    diverges: tuple = ()  # seeds
    flops: float = 1e12
    held_out: int = 15_000
    majority: float = 10.0
    steps: int = 30
    disturbed: tuple = ()  # seeds
    slowed: float = 1.6
    larger: tuple = ()  # seeds whose network is, so that they take half of the steps in the same time

    def history(self, length, seed):
        raw = 30.0 * length * (self.slowed if seed in self.disturbed else 1)
        accuracy = 84 + self.slope * math.log(length * self.faster) + self.noise * (seed % 3 - 1) + self.shift
        ends = (10, 40.0), (20, 60.0), (30, accuracy + 1)
        rows = [dict(step=s, epoch=s / 10, seconds=raw * s / 30, lr=0.1, accuracy=a) for s, a in ends]
        return History(
            rows=rows, steps=self.steps // (1 + (seed in self.larger)),
            seconds=raw * (1 - self.stalled), raw_seconds=raw,
            flops=self.flops * length,
            seen=round(1000 * length), images=500,
            memory={"parameters": 2**20, "saved": 2**20, "peak": 2**30},
            test_accuracy=accuracy - 1, final=accuracy, balanced_accuracy=accuracy - 2,
            held_out=self.held_out, majority=self.majority, classes=10, diverged=seed in self.diverges,
        )  # fmt: skip


BASE, FAST = Made(name="base"), Made(name="fast", faster=1.3, noise=-0.3, flops=5e11)


def made(*kinds, task=TASK, shared=False, **settings):
    """A finished comparison of made-up runs."""
    machine = {**clock.machine(), "summary": "2-core CPU"}
    cells = [
        {
            "seed": 100 * i + j, "length": length, "lengths": {k.name: length for k in kinds},
            "arms": {k.name: k.history(length, j) for k in kinds}, "machine": machine,
            "shared": shared, "load": 0.1, "date": "2026-11-29",
        }
        for j in range(task.seeds)
        for i, length in enumerate(task.lengths)
    ]  # fmt: skip
    roles = ["baseline", "method", *["control"] * len(kinds)]
    arms = tuple(Arm(name=k.name, role=r) for k, r in zip(kinds, roles, strict=False))
    return Comparison(task=task, arms=arms, cells=cells, **settings)


def test_a_verdict_follows_from_the_curves():
    found = made(BASE, FAST, aim=1.2).verdict("fast")
    assert found.verdict == "faster"
    assert found.ratio == pytest.approx(1.3)
    assert (found.aim_verdict, found.n, found.lengths) == ("met", 3, 3)
    assert found.text.endswith("at 80-84 %, n=3x3, 2-core CPU")
    assert found.points == pytest.approx(10 * math.log(1.3))
    assert made(BASE, replace(FAST, faster=0.7)).verdict("fast").verdict == "slower"


def test_what_is_judged_is_the_end_of_a_run_on_all_held_out_images():
    found = made(BASE, FAST)
    assert found.curve("base")[2].accuracies == pytest.approx([83.7, 84.0, 84.3])
    assert found.curve("base")[2].costs == pytest.approx([30.0] * 3)


def test_any_cost_gives_a_ratio():
    found = made(BASE, FAST)
    assert found.ratio("fast", "flops").value == pytest.approx(2 * 1.3)
    assert found.ratio("fast", "images").value == pytest.approx(1.3, rel=1e-3)
    few = made(BASE, FAST, task=replace(TASK, axis="images"))
    assert few.curve("base", "images")[0].costs == (500.0,) * 3  # different images, not those seen
    assert made(BASE, replace(FAST, flops=0.0)).ratio("fast", "flops") is None
    free = made(BASE, replace(FAST, flops=0.0))
    for asked in (lambda: free.verdict("fast", "flops"), lambda: figures.curves(free, cost="flops")):
        with pytest.raises(BadInput, match=r"fast took 0 flops at length 0.5: no cost to judge by"):
            asked()
    with pytest.raises(BadInput, match="unknown cost 'time'"):
        found.curve("base", "time")


def test_an_aim_is_of_methods_or_of_the_arms_that_it_names():
    kinds = BASE, FAST, replace(FAST, name="smaller")
    assert [v.aim for v in made(*kinds, aim=1.2).verdicts()] == [1.2, None]
    assert [v.aim for v in made(*kinds, aim={"smaller": 1.1}).verdicts()] == [None, 1.1]
    with pytest.raises(BadInput, match="unknown arm with an aim 'fats'"):
        compare(TASK, [Arm(name="base", role="baseline"), Arm(name="fast")], aim={"fats": 1.2})


def test_a_diverged_run_gives_no_ratio():
    found = made(BASE, replace(FAST, diverges=(1,)))
    v = found.verdict("fast")
    assert (v.verdict, v.ratio, v.text) == ("diverged", None, "fast: 3 of 9 runs diverged")
    assert "Diverged: fast (3)." in found.notes()
    aimed = made(BASE, replace(FAST, diverges=(1,)), aim=1.2).verdict("fast")
    assert (aimed.aim, aimed.aim_verdict) == (1.2, "missed")
    base = made(replace(BASE, diverges=(1,)), FAST, aim=1.2).verdict("fast")
    assert base.text == "base: 3 of 9 runs diverged"
    assert base.aim_verdict == "not decided"  # the method did nothing wrong
    assert found.table().loc["fast", "verdict"] == "diverged"
    assert found.history().query("arm == 'fast' and step == 30").accuracy.isna().sum() == 3


def test_a_verdict_is_withheld_where_it_would_not_be_one(monkeypatch):
    smoke = replace(TASK, preset="smoke")
    assert made(BASE, FAST, task=smoke).verdict("fast").verdict == SMOKE
    assert made(BASE, FAST, illustration=True).verdict("fast").verdict == "illustration: no verdict"
    assert made(BASE, FAST, shared=True).verdict("fast").verdict == SHARED
    monkeypatch.setenv("EFFILIB_SHARED", "1")  # now: the cells were measured alone
    assert made(BASE, FAST).verdict("fast").verdict == "faster"
    few = made(replace(BASE, held_out=60), replace(FAST, held_out=60)).verdict("fast")
    assert few.verdict == "too few held-out images: one of 60 is 1.7 points"


def test_stalls_of_more_than_a_twentieth_withhold_the_verdict_and_say_why():
    assert made(BASE, replace(FAST, stalled=0.02)).verdict("fast").verdict == "faster"
    much = made(BASE, replace(FAST, stalled=0.08))
    assert much.verdict("fast").verdict == "stalls: 8% of the time of fast were taken off"
    assert much.verdict("fast").ratio == pytest.approx(1.3 / 0.92, rel=1e-6)
    apart = made(BASE, replace(FAST, stalled=0.04)).verdict("fast")
    assert apart.verdict == "stalls: 1.30x as measured, 1.35x without them"
    assert much.verdict("fast", "flops").verdict == "faster"  # FLOPs know no stalls
    assert much.notes()[0].startswith("15.9 of 397.8 s were stalls")


def test_a_run_disturbed_by_a_neighbour_withholds_the_verdict_and_names_it():
    """A neighbour with spinning threads takes caches and memory, not the processor: no stall shows it."""
    slow = replace(FAST, disturbed=(1,))
    found = made(BASE, slow)
    words = "uneven: the steps of fast, length 0.5, seed 1, took 1.6 times as long as with the other seeds"
    assert found.verdict("fast").verdict == words
    assert found.verdict("fast", "flops").verdict == "faster"
    assert (
        made(replace(BASE, disturbed=(2,)), FAST)
        .verdict("fast")
        .verdict.startswith("uneven: the steps of base")
    )
    assert made(BASE, replace(FAST, disturbed=(1,), slowed=1.4)).uneven("fast") == ""
    assert made(BASE, replace(FAST, larger=(1,))).uneven("fast") == ""


def test_a_training_of_a_few_steps_says_so():
    assert not any("too short" in n for n in made(BASE, FAST).beware())
    few = made(replace(BASE, steps=12), FAST)
    assert few.beware()[0].startswith("A training of 12 steps is too short: 28 % of BatchNorm's")
    assert few.beware()[0] in few.notes()
    smoke = made(replace(BASE, steps=12), FAST, task=replace(TASK, preset="smoke"))
    assert smoke.beware() == []  # which is no measurement anyway


def test_accuracies_say_how_far_they_can_be_trusted():
    notes = " ".join(made(BASE, FAST).notes())
    assert "of 15000 held-out images, which leaves them uncertain by 0.32 points" in notes
    assert "largest class" not in notes
    rare = made(replace(BASE, majority=95.0), replace(FAST, majority=95.0))
    notes = " ".join(rare.notes())
    assert "The largest class has 95 % of the images." in notes
    assert "fast is no better than always naming the largest class (95 %)." in notes


def test_the_table_holds_numbers():
    table = made(BASE, FAST, aim=1.2).table()
    assert list(table.index) == ["base", "fast"]
    fast = table.loc["fast"]
    assert fast["speed-up"] == pytest.approx(1.3)
    assert fast["low"] < 1.3 < fast["high"]
    assert fast["x by FLOPs"] == pytest.approx(2.6)
    assert fast["ms a step"] == pytest.approx(1e3 * 0.71 * 30 / 30)
    assert fast["balanced %"] == pytest.approx(fast["accuracy % (longest)"] - 2)
    assert fast["memory MB"] == pytest.approx(2)  # what is counted, not the allocator's peak
    assert (fast["verdict"], fast["aim"], fast["aim x"]) == ("faster", "met", 1.2)
    assert (fast["seeds"], fast["lengths"]) == (3, 3)
    assert all(table.dtypes[name].kind in "fi" for name in ("speed-up", "seeds", "lengths", "aim x"))


def test_a_bound_is_no_value_of_the_table():
    table = made(BASE, replace(FAST, shift=-30.0, flops=1e11)).table()
    fast = table.loc["fast"]
    assert fast["verdict"] == "out of reach: at most 0.50x"
    assert math.isnan(fast["speed-up"])
    assert math.isnan(fast["x by FLOPs"])
    assert fast["high"] == pytest.approx(0.5)


def test_measures_are_means_by_arm_and_by_length():
    found = made(BASE, FAST)
    whole = found.measures("flops", end=lambda h: h.rows[-1]["step"])
    assert whole.loc["fast", "flops"] == pytest.approx(5e11 * (0.5 + 0.71 + 1) / 3)
    assert whole.loc["base", "end"] == 30
    by_length = found.measures("seconds", by_length=True)
    assert by_length.loc[("base", 0.5), "seconds"] == pytest.approx(15)


def test_curves_are_points_with_their_errors():
    curves = made(BASE, FAST).curves()
    last = curves[(curves.arm == "base") & (curves.length == 1.0)].iloc[0]
    assert (last.seconds, last.accuracy) == pytest.approx((30.0, 84.0))
    assert last.error == pytest.approx(0.3 / math.sqrt(3))


def test_a_sentence_says_ratio_aim_points_and_flops():
    said = made(BASE, FAST, aim=1.2).say("fast")
    assert said.startswith("fast against base: faster, 1.30x [")
    assert "aim 1.2x met" in said
    assert "points at equal time" in said
    assert "2.60x if FLOPs were time" in said
    low = made(BASE, replace(FAST, shift=-30.0)).say("fast")
    assert low.startswith("fast against base: out of reach, at most 0.50x, n=3x3, 2-core CPU; ")


def test_the_history_has_a_row_for_every_evaluation_and_ends_in_what_is_judged():
    history = made(BASE, FAST, title="main").history()
    assert list(history.columns) == COLUMNS
    assert len(history) == 2 * 9 * 3
    assert isinstance(history, pd.DataFrame)
    one = history.query("arm == 'fast' and seed == 201")
    assert one.comparison.unique().tolist() == ["main"]
    assert one.accuracy.tolist() == pytest.approx(
        [40, 60, 84 + 10 * math.log(1.3)]
    )  # not the validation images' alone
    assert one.seconds.tolist() == pytest.approx([10, 20, 30])
    assert one.flops.tolist() == pytest.approx([5e11 / 3, 1e12 / 3, 5e11])


def test_a_run_of_one_step_makes_a_table():
    """A run of one step once ended in a division by zero, after all runs."""
    task = Task(
        preset="smoke", dataset="synthetic", widths={"widths": (8, 8), "blocks": (1, 1)},
        recipe=Recipe(epochs=1e-6, precision="fp32"), lengths=(0.5, 1.0), seeds=1,
    )  # fmt: skip
    found = compare(task, [Arm(name="a", role="baseline"), Arm(name="b", changes={"lr": 0.01})])
    assert found.histories("a")[0].steps == 1
    assert len(found.table()) == 2
    assert found.measures("flops").flops.min() > 0


def test_an_illustration_needs_no_pilot():
    task = replace(TASK, preset="smoke", recipe=Recipe(epochs=0.5, batch_size=64), lengths=(1.0,), seeds=1)
    slow = Arm(name="wide", network={"widths": (32, 32, 32)})
    found = compare(replace(task, preset="quick"), [Arm(name="a", role="baseline"), slow], illustration=True)
    assert [c["seed"] for c in found.cells] == [0]
    assert found.cells[0]["lengths"] == {"a": 1.0, "wide": 1.0}
    assert len(list((paths.cache()).glob("*/*.json"))) == 1


def test_a_whole_small_comparison_of_real_trainings():
    task = Task(
        preset="quick", dataset="synthetic", widths={"widths": (8, 8), "blocks": (1, 1)},
        recipe=Recipe(epochs=4, batch_size=32, precision="fp32"), lengths=(0.25, 0.5, 1.0), seeds=3,
    )  # fmt: skip
    narrow = Arm(name="narrow", role="control", network={"widths": (2, 4)}, lengths=(0.25, 0.5, 1.0))
    found = compare(task, [Arm(name="base", role="baseline"), narrow])
    assert [len(found.histories(a, length)) for a in ("base", "narrow") for length in found.lengths] == [
        3
    ] * 6
    base = [sum(x.accuracies) for x in found.curve("base")]
    assert base[0] < base[-1]
    flops = found.ratio("narrow", "flops")
    assert flops is not None
    assert found.runs().groupby("arm").flops.sum()["narrow"] < found.runs().groupby("arm").flops.sum()["base"]
