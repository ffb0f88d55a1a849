"""Speed-up at equal accuracy against an obvious oracle, its interval by simulation, and every verdict."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.interpolate import interp1d
from scipy.optimize import isotonic_regression

from effilib import statistics
from effilib.errors import BadInput
from effilib.statistics import (
    Length,
    Ratio,
    Verdict,
    equal_accuracy,
    equal_cost,
    holm,
    judge,
    monotone,
    replication,
)

LENGTHS = (0.5, 0.71, 1.0)


def curve(slope=10.0, faster=1.0, lengths=LENGTHS, n=3, noise=0.0, top=84.0, shift=0.0, cost=30.0):
    """A curve without chance: accuracy `top` at `cost` seconds, rising by `slope` per e-fold of time."""
    cells = [noise * (j - (n - 1) / 2) for j in range(n)]
    return [
        Length(
            costs=(cost * length,) * n,
            accuracies=tuple(top + shift + slope * math.log(length * faster) + e for e in cells),
        )
        for length in lengths
    ]


# The estimate


def test_the_ratio_of_parallel_curves_is_their_distance():
    for faster in (0.7, 1.0, 1.3):
        ratio = equal_accuracy(curve(noise=0.1), curve(noise=0.1, faster=faster))
        assert ratio.value == pytest.approx(faster)
        assert ratio.low <= faster <= ratio.high
        assert ratio.kind == "gap"


def test_the_estimate_is_the_mean_distance_read_off_on_a_fine_grid():
    rng = np.random.default_rng(0)
    for _ in range(50):
        two = []
        for _ in range(2):
            points = zip(sorted(rng.uniform(10, 100, 4)), sorted(rng.uniform(70, 85, 4)), strict=True)
            two.append([Length(costs=(t,), accuracies=(a,)) for t, a in points])
        base, arm = ([(math.log(c.costs[0]), c.accuracies[0]) for c in c_] for c_ in two)
        low, high = max(base[0][1], arm[0][1]), min(base[-1][1], arm[-1][1])
        found = equal_accuracy(*two)
        if low >= high:
            assert found.kind in ("at most", "at least")
            continue
        grid = np.linspace(low, high, 20_001)
        t_base, t_arm = (interp1d([a for _, a in c], [t for t, _ in c])(grid) for c in (base, arm))
        assert math.log(found.value) == pytest.approx((t_base - t_arm).mean(), abs=1e-3)
        assert found.range == pytest.approx((low, high))


def test_violators_are_pooled_as_isotonic_regression_does():
    rng = np.random.default_rng(1)
    for _ in range(50):
        a = rng.uniform(70, 80, 6)
        pooled = isotonic_regression(a).x
        x, knots = monotone([Length(costs=(float(i + 1),), accuracies=(v,)) for i, v in enumerate(a)])
        assert knots == pytest.approx(np.unique(pooled))
        assert np.all(np.diff(x) > 0)


def test_without_common_accuracies_the_ratio_is_a_bound_and_never_infinite():
    low = equal_accuracy(curve(), curve(shift=-20))
    assert low.kind == "at most"
    assert low.value == pytest.approx(0.5)  # the baseline's shortest run over the arm's best
    assert math.isnan(low.low)
    high = equal_accuracy(curve(), curve(shift=20))
    assert (high.kind, high.value) == ("at least", pytest.approx(2.0))


def test_an_arm_that_does_not_rise_is_read_at_its_own_accuracy():
    flat = curve(slope=0.0, shift=-2.0, noise=0.2)
    found = equal_accuracy(curve(noise=0.2), flat)
    time = math.exp(sum(math.log(30 * length) for length in LENGTHS) / 3)
    assert found.value == pytest.approx(30 * math.exp(-0.2) / time)
    assert found.thin


def test_a_thin_overlap_is_said():
    assert not equal_accuracy(curve(noise=0.1), curve(noise=0.1)).thin
    assert equal_accuracy(curve(noise=0.1), curve(noise=0.1, shift=-6.2)).thin  # 0.7 points in common
    assert equal_accuracy(curve(noise=4.0), curve(noise=4.0, shift=-3.0)).thin  # 3.9 points, errors of 2.3


def test_a_saturated_baseline_is_judged_at_equal_time_only():
    verdict = judge(curve(slope=1.0, noise=0.01), curve(slope=1.0, noise=0.01, shift=0.5))
    assert verdict.verdict == "saturated, at equal cost more accurate"
    assert verdict.points == pytest.approx(0.5)
    assert verdict.low is None


def test_a_saturated_baseline_that_falls_a_little_is_judged_at_equal_time():
    base, arm = curve(slope=-0.3, noise=0.05), curve(slope=-0.3, noise=-0.05, shift=5.0, cost=30.9)
    found = judge(base, arm)
    assert found.verdict == "saturated, at equal cost more accurate"
    assert found.points == pytest.approx(5.0, abs=0.02)


def test_one_length_is_no_curve():
    one = judge(curve(lengths=(1.0,), noise=0.1), curve(lengths=(1.0,), noise=0.1, faster=1.5), aim=1.2)
    assert (one.verdict, one.aim_verdict) == ("one length: no curve", "not decided")
    assert one.text == "one length: no curve, n=3x1"


def test_points_at_equal_cost_are_the_vertical_distance():
    points, low, high = equal_cost(curve(noise=0.2), curve(noise=0.2, faster=1.1))
    assert points == pytest.approx(10 * math.log(1.1))
    assert low <= points <= high
    assert math.isnan(equal_cost(curve(), curve(cost=1000.0))[0])


def test_any_cost_will_do():
    seconds = equal_accuracy(curve(noise=0.1), curve(noise=0.1, faster=1.2))
    images = equal_accuracy(curve(noise=0.1, cost=5e5), curve(noise=0.1, faster=1.2, cost=5e5))
    assert images.value == pytest.approx(seconds.value)


def test_cells_are_pairs_and_costs_are_positive():
    with pytest.raises(BadInput, match="they are pairs"):
        equal_accuracy(curve(n=3, noise=0.1), curve(n=2, noise=0.1))
    with pytest.raises(BadInput, match="the baseline has 3 lengths and the arm 2"):
        judge(curve(), curve(lengths=(0.5, 1.0)))
    with pytest.raises(BadInput, match="above 0"):
        Length(costs=(0.0,), accuracies=(90.0,))
    with pytest.raises(BadInput, match="as many costs"):
        Length(costs=(1.0, 2.0), accuracies=(90.0,))
    with pytest.raises(BadInput, match="accuracies must be finite"):
        Length(costs=(1.0, 2.0), accuracies=(90.0, math.nan))


# The interval


def draws(rng, slopes, faster, n, lengths, noise, shared, wobble=0.01):
    """Two noisy curves. shared: the share of the noise's variance that both arms of a cell have in common."""
    two = ([], [])
    for length in lengths:
        common = rng.normal(size=n)
        for arm, (slope, speed, sd) in enumerate(zip(slopes, (1.0, faster), noise, strict=True)):
            own = rng.normal(size=n)
            e = sd * (math.sqrt(shared) * common + math.sqrt(1 - shared) * own)
            t = 30 * length * np.exp(wobble * rng.normal(size=n))
            two[arm].append(
                Length(costs=tuple(t), accuracies=tuple(84 + slope * math.log(length * speed) + e))
            )
    return two


def truth(slopes, faster, within):
    """log of the speed-up averaged over a range of accuracies, from the curves without noise."""
    a = np.linspace(*within, 101)
    return float(np.mean((a - 84) / slopes[0] - ((a - 84) / slopes[1] - math.log(faster))))


def coverage(
    seed, slopes=(10, 10), faster=1.1, n=5, lengths=LENGTHS, noise=(0.6, 0.6), shared=0.0, repeats=2000
):
    """(share of intervals that hold the truth, median half width in per cent)."""
    rng, hits, widths = np.random.default_rng(seed), [], []
    for _ in range(repeats):
        found = equal_accuracy(*draws(rng, slopes, faster, n, lengths, noise, shared))
        if found.kind in ("gap", "crossing"):
            hits.append(math.log(found.low) <= truth(slopes, faster, found.range) <= math.log(found.high))
            widths.append(math.log(found.high / found.low) / 2)
    assert len(hits) > 0.9 * repeats
    return float(np.mean(hits)), 100 * float(np.median(widths))


STEEP = {
    "7 points, 3 x 2": dict(slopes=(7, 7), n=3, lengths=(0.5, 1.0)),
    "10 points, 5 x 3": {},
    "10 points, no difference": dict(faster=1.0),
    "15 points, 4 x 4": dict(slopes=(15, 15), n=4, lengths=(0.35, 0.5, 0.71, 1.0)),
    "crossing": dict(slopes=(14, 7), faster=1.0),
    "unequal noise": dict(noise=(0.4, 1.2)),
    "correlated arms": dict(shared=0.7),
}
WIDTHS = dict(zip(STEEP, (12.6, 5.1, 4.8, 3.3, 5.6, 7.6, 3.0), strict=True))  # % of the ratio, as measured


@pytest.mark.parametrize("case", STEEP)
def test_the_interval_covers_the_truth_as_often_as_it_says(case):
    share, width = coverage(sum(map(ord, case)), **STEEP[case])
    assert 0.92 <= share <= 0.97
    assert width == pytest.approx(WIDTHS[case], rel=0.1)


def test_on_flat_curves_it_covers_nearly_as_often_and_is_wide():
    share, width = coverage(7, slopes=(2.5, 2.5))
    assert 0.90 <= share <= 0.98
    assert width > 10


def test_the_interval_is_the_stratified_jackknife_written_out():
    rng = np.random.default_rng(3)
    base, arm = draws(rng, (10, 10), 1.1, 4, LENGTHS, (0.6, 0.6), 0.3)
    found, variance = equal_accuracy(base, arm), 0.0
    for i in range(len(LENGTHS)):
        left = []
        for j in range(4):
            without = [
                [
                    Length(
                        costs=[v for k, v in enumerate(c.costs) if (l, k) != (i, j)],
                        accuracies=[v for k, v in enumerate(c.accuracies) if (l, k) != (i, j)],
                    )
                    for l, c in enumerate(two)  # noqa: E741
                ]
                for two in (base, arm)
            ]
            left.append(_gap(*without))
        variance += 3 / 4 * sum((v - np.mean(left)) ** 2 for v in left)
    assert found.spread == pytest.approx(math.sqrt(variance))
    assert found.degrees == 9


def _gap(base, arm):
    """The estimate of two curves, whose lengths may have unequal numbers of cells."""
    points = [[(np.mean(np.log(c.costs)), np.mean(c.accuracies)) for c in two] for two in (base, arm)]
    low = max(points[0][0][1], points[1][0][1])
    high = min(points[0][-1][1], points[1][-1][1])
    grid = np.linspace(low, high, 40_001)
    b, a = (np.interp(grid, [y for _, y in p], [x for x, _ in p]) for p in points)
    return float(np.trapezoid(b - a, grid) / (high - low))


# Verdicts


@pytest.mark.parametrize(("faster", "aim"), [(1.95, 1.99), (1 / 1.95, 1 / 1.99)])
def test_noise_that_parts_two_curves_makes_no_bound(faster, aim):
    """Curves that meet in a quarter of a point: their ends are parted by chance in every fourth draw."""
    rng, parted, wrong, met = np.random.default_rng(9), 0, 0, 0
    for _ in range(500):
        found = judge(*draws(rng, (10, 10), faster, 5, LENGTHS, (0.6, 0.6), 0.0), aim=aim)
        parted += found.kind.startswith("at ")
        wrong += found.verdict.startswith(("faster: at least", "out of reach"))
        met += faster > 1 and found.aim_verdict == "met"
    assert parted > 0.15 * 500
    assert wrong <= 0.025 * 500
    assert met <= 0.025 * 500


def test_a_bound_says_no_more_than_is_sure():
    apart = judge(curve(noise=0.6), curve(noise=-0.6, shift=7.05), aim=1.2)  # 0.1 points without noise
    assert (apart.verdict, apart.aim_verdict, apart.low) == ("undecided", "not decided", None)
    assert apart.text == "at least 2.00x (uncertain), n=3x3"
    assert apart.notes == ("the curves nearly meet: longer or shorter trainings would decide",)
    base, arm = curve(noise=0.1), curve(noise=0.1, shift=20)
    base[-1] = replace(base[-1], costs=(29.0, 30.0, 31.0))
    found = judge(base, arm)
    assert found.verdict == f"faster: at least {found.low:.2f}x"
    assert 1.8 < found.low < 1.99  # widened by the error of the times
    assert found.p < 1e-3


def verdict(faster=1.0, noise=0.3, **settings):
    return judge(curve(noise=noise), curve(noise=-noise, faster=faster), machine="2-core CPU", **settings)


def test_every_verdict():
    assert verdict(1.3).verdict == "faster"
    assert verdict(0.7).verdict == "slower"
    assert verdict(1.0, noise=0.1).verdict == "no difference"
    assert verdict(1.1, noise=2.0).verdict == "undecided"
    out = judge(curve(noise=0.3), curve(noise=0.3, shift=-20))
    assert out.verdict == "out of reach: at most 0.50x"
    assert out.ratio == pytest.approx(0.5)
    above = judge(curve(noise=0.3), curve(noise=0.3, shift=20))
    assert above.verdict == "faster: at least 2.00x"
    assert verdict(1.01, noise=0.01).verdict == "no difference"  # though the interval excludes 1


def test_crossing_curves_depend_on_the_budget():
    steep, flat = curve(slope=14, noise=0.1), curve(slope=7, noise=0.1, shift=-2.0)
    found = judge(steep, flat)
    crossing = equal_accuracy(steep, flat).crossing  # where 14 log t and 7 log t - 2 meet: log t = -2/7
    assert crossing == pytest.approx(84 - 14 * 2 / 7, abs=0.05)
    assert found.verdict == "depends on the budget: faster below 80 %, slower above"
    assert judge(flat, steep).verdict == "depends on the budget: slower below 80 %, faster above"


def test_less_than_three_cells_a_length_decide_nothing():
    two = judge(curve(n=2, noise=0.1), curve(n=2, noise=0.1, faster=1.5), aim=1.2)
    assert (two.verdict, two.aim_verdict) == ("undecided", "not decided")
    assert "a verdict needs 3 cells a length" in two.notes
    steep, flat = curve(slope=14, noise=0.01, n=2), curve(slope=7, noise=0.01, shift=-2.0, n=2)
    assert equal_accuracy(steep, flat).kind == "crossing"
    assert judge(steep, flat).verdict == "undecided"
    one = judge(curve(n=1), curve(n=1, faster=1.5))
    assert one.low is None
    assert one.text == "1.50x at 81-84 %, n=1x3"


def test_the_text_is_what_is_quoted():
    found = verdict(1.3)
    assert found.text == f"1.30x [{found.low:.2f}, {found.high:.2f}] at 80-84 %, n=3x3, 2-core CPU"


def test_undecided_says_how_many_cells_would_decide():
    found = verdict(1.1, noise=2.0)
    said = next(n for n in found.notes if "would decide" in n)
    cells = int(said.split()[1])
    more = judge(
        curve(noise=2.0 / (cells - 1) * 2, n=cells), curve(noise=2.0 / (cells - 1) * 2, n=cells, faster=1.1)
    )
    assert 4 < cells < 100
    assert more.verdict == "faster"


def test_nobody_is_asked_for_more_than_100_cells():
    close = judge(curve(noise=2.0), curve(noise=-2.0, faster=1.0249))
    assert close.notes[-1] == "more than 100 cells a length would decide"


def test_an_overlap_too_thin_for_an_interval_says_so():
    arm = curve(noise=0.5, shift=-6.8)
    found = judge(curve(noise=-0.5), arm)
    assert (found.kind, found.verdict, found.low) == ("gap", "undecided", None)
    assert found.notes == ("thin overlap: both curves cover only 77.1 to 77.2 %, too thin for an interval",)


@pytest.mark.parametrize(
    ("faster", "aim", "said"),
    [(1.5, 1.3, "met"), (1.1, 1.3, "missed"), (1.3, 1.3, "not decided"), (1.0, 2.0, "missed")],
)
def test_an_aim_is_met_missed_or_not_decided(faster, aim, said):
    assert verdict(faster, aim=aim).aim_verdict == said


def test_noise_meets_no_aim():
    """Version 1 asked whether the interval's upper end reached a claim: 86 % of pure noise did."""
    rng, met = np.random.default_rng(5), 0
    for _ in range(300):
        base, arm = draws(rng, (10, 10), 1.0, 5, LENGTHS, (1.5, 1.5), 0.0)
        met += judge(base, arm, aim=1.05).aim_verdict == "met"
    assert met <= 0.05 * 300


def test_an_equal_method_is_hardly_ever_called_slower_or_faster():
    rng, wrong = np.random.default_rng(6), 0
    for _ in range(500):
        found = judge(*draws(rng, (10, 10), 1.0, 5, LENGTHS, (0.8, 0.8), 0.0))
        wrong += found.verdict in ("faster", "slower")
    assert wrong <= 0.08 * 500


def test_bounds_decide_aims_too():
    below = curve(noise=0.3, shift=-20)
    assert judge(curve(noise=0.3), below, aim=0.6).aim_verdict == "missed"
    assert judge(curve(noise=0.3), below, aim=0.4).aim_verdict == "not decided"
    assert judge(curve(noise=0.3), curve(noise=0.3, shift=20), aim=1.5).aim_verdict == "met"


def test_what_is_withheld_stands_in_the_verdicts_place():
    found = verdict(1.5, withhold=statistics.SMOKE, aim=1.2)
    assert (found.verdict, found.aim_verdict) == ("smoke: not a measurement", "not decided")


def test_a_record_is_plain_and_has_no_nan():
    record = judge(curve(n=1), curve(n=1, faster=1.5)).record()
    assert record["low"] is None
    assert record["range"] == pytest.approx([81.12, 84.0], abs=0.01)
    assert all(isinstance(v, str | int | float | bool | list | None) for v in record.values())


# A scoreboard, a repetition


def test_holm_is_holm():
    # 0.001 < .05/4, 0.013 < .05/3, 0.04 > .05/2
    assert holm([0.001, 0.04, 0.013, 0.2]) == [True, False, True, False]
    assert holm([]) == []


def test_p_is_small_exactly_where_the_interval_excludes_1():
    for faster in (0.9, 0.97, 1.0, 1.03, 1.1, 1.4):
        found = verdict(faster, noise=0.6)
        assert isinstance(found, Verdict)
        assert (found.p < 0.05) == (found.low > 1 or found.high < 1)


def test_an_exact_repetition_lies_in_the_prediction_interval():
    rng, inside = np.random.default_rng(8), 0
    for _ in range(1000):
        first, second = (
            equal_accuracy(*draws(rng, (10, 10), 1.2, 5, LENGTHS, (0.6, 0.6), 0.2)) for _ in "ab"
        )
        low, high = replication(first.value, first.low, first.high)
        inside += low <= second.value <= high
    assert 0.92 <= inside / 1000 <= 0.98


def test_a_ratio_needs_no_interval():
    assert Ratio(value=2.0).kind == "gap"
    assert statistics.say_ratio(Ratio(value=0.5, kind="saturated", range=(84.0, 84.5)), 3, 2).startswith(
        "the baseline"
    )
