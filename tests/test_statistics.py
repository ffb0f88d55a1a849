"""Intervals against scipy and by simulation, time to target by brute force, every branch of the verdict."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from effilib.statistics import (
    FASTER,
    INCONCLUSIVE,
    LEAST,
    LESS_ACCURATE,
    MISSED,
    NONE,
    SHARED,
    SLOWER,
    SMOKE,
    held,
    interval,
    judge,
    lower_bound,
    paired_ratio,
    say_ratio,
    time_to_target,
)

numbers = st.floats(-1e3, 1e3)


@given(st.lists(numbers, min_size=2, max_size=10), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_the_interval_is_scipys_student_t(values, level):
    mean, low, high = interval(values, level)
    error = stats.sem(values)
    expected = (
        stats.t.interval(level, len(values) - 1, loc=np.mean(values), scale=error)
        if error > 0
        else (np.mean(values),) * 2
    )
    assert mean == pytest.approx(np.mean(values), abs=1e-9)
    assert (low, high) == pytest.approx(expected, abs=1e-6)


def test_one_value_has_no_interval():
    mean, low, high = interval([3.0])
    assert mean == 3
    assert math.isnan(low)
    assert math.isnan(high)
    assert math.isnan(lower_bound([3.0]))


def coverage(n, draws=4000):
    """How often the interval of n values holds the true mean 0, and how often the one-sided bound lies below
    it.
    """
    samples = np.random.default_rng(0).standard_normal((draws, n)).tolist()
    both = np.mean([low <= 0 <= high for _, low, high in map(interval, samples)])
    return both, np.mean([lower_bound(s) <= 0 for s in samples])


@pytest.mark.parametrize("n", [3, 5, 10])
def test_the_interval_covers_the_truth_as_often_as_it_says(n):
    both, one = coverage(n)  # standard error of the share: 0.0034
    assert both == pytest.approx(0.95, abs=0.012)
    assert one == pytest.approx(0.95, abs=0.012)


def test_a_percentile_bootstrap_would_cover_far_too_little_at_five_seeds():
    rng = np.random.default_rng(1)
    samples = rng.standard_normal((2000, 5))
    means = samples[np.arange(2000)[:, None, None], rng.integers(0, 5, (2000, 500, 5))].mean(2)
    low, high = np.percentile(means, [2.5, 97.5], axis=1)
    assert np.mean((low <= 0) & (high >= 0)) < 0.90  # why the interval here is Student's


def test_the_ratio_is_geometric_and_turns_over_with_the_arms():
    ratio, low, high = paired_ratio([2.0, 4.0, 8.0], [1.0, 1.0, 1.0])
    assert ratio == pytest.approx(4.0)
    back = paired_ratio([1.0, 1.0, 1.0], [2.0, 4.0, 8.0])
    assert back == pytest.approx((1 / ratio, 1 / high, 1 / low))


def test_pairs_take_out_what_both_arms_share():
    slow_seeds = np.array([1.0, 3.0, 9.0, 2.0, 7.0])
    assert paired_ratio((1.5 * slow_seeds).tolist(), slow_seeds.tolist()) == pytest.approx((1.5, 1.5, 1.5))


def test_unequal_numbers_of_times_are_no_pairs():
    with pytest.raises(ValueError, match="3 and 2 times"):
        paired_ratio([1.0, 2.0, 3.0], [1.0, 2.0])


# --- time to target


def rows_of(accuracies, seconds=None):
    seconds = seconds or range(len(accuracies))
    return [
        {"seconds": float(s), "accuracy": a, "step": 10 * i}
        for i, (s, a) in enumerate(zip(seconds, accuracies, strict=True))
    ]


def brute_force(rows, target, grid=4000):
    """The first moment on a fine grid from which the broken line holds the target up to two evaluations in a
    row.
    """
    seconds, accuracy = [r["seconds"] for r in rows], [r["accuracy"] for r in rows]
    for first in range(len(rows) - 1):
        if min(accuracy[first : first + 2]) >= target:
            if first == 0:
                return seconds[0]
            moments = np.linspace(seconds[first - 1], seconds[first], grid)
            line = np.interp(moments, seconds, accuracy)
            return moments[np.argmax(line >= target)]
    return None


@given(st.lists(st.floats(0, 100), max_size=12), st.floats(0, 100), st.data())
def test_time_to_target_agrees_with_brute_force(accuracies, target, data):
    steps = data.draw(st.lists(st.floats(0.01, 10), min_size=len(accuracies), max_size=len(accuracies)))
    rows = rows_of(accuracies, np.cumsum(steps).tolist())
    found, slow = time_to_target(rows, target), brute_force(rows, target)
    assert (found is None) == (slow is None)
    if found is not None:
        assert found == pytest.approx(slow, abs=10 / 3000)


@pytest.mark.parametrize(
    ("accuracies", "target", "expected"),
    [
        ([0, 50, 100, 100], 75, 1.5),
        ([0, 80, 20, 80, 80], 75, 2 + 55 / 60),  # the first peak does not last
        ([0, 80, 20, 80], 75, None),
        ([0, 50, 80], 75, None),  # the last alone does not count
        ([0, 75, 75], 75, 1),
        ([90, 90], 75, 0),
        ([90], 75, None),
        ([], 75, None),
        ([0, math.nan, 80, 80], 0.5, None),
        ([0, 80, math.nan, 80, 80], 75, None),
    ],
)
def test_the_target_counts_when_two_evaluations_in_a_row_hold_it(accuracies, target, expected):
    found = time_to_target(rows_of(accuracies), target)
    if any(map(math.isnan, accuracies)):
        assert (
            found is None or not math.isfinite(found) or found > 2
        )  # never a number before training recovered
    else:
        assert found == (expected if expected is None else pytest.approx(expected))


def test_other_values_than_seconds_are_interpolated_too():
    assert time_to_target(rows_of([0, 50, 100, 100]), 75, "step") == 15


# --- verdicts: design, section 6, rule 7


def times(ratio, spread=0.01, n=5):
    """(baseline, method) times whose paired ratios scatter around `ratio` by about `spread`."""
    noise = np.linspace(-spread, spread, n) if n > 1 else np.zeros(1)
    method = np.linspace(8, 12, n)
    return (ratio * np.exp(noise) * method).tolist(), method.tolist()


EQUAL = [-0.1, 0.1, 0.0, 0.05, -0.05]
WORSE = [-2.1, -1.9, -2.0, -2.0, -2.0]
UNSURE = [-2.0, 2.0, 0.0, 1.0, -1.0]

TABLE = [  # ratio, spread, differences, verdict
    (1.30, 0.01, EQUAL, FASTER),
    (1.03, 0.005, EQUAL, FASTER),  # small but above 1: faster, whatever the aim was
    (1.30, 0.01, WORSE, LESS_ACCURATE),
    (1.30, 0.01, UNSURE, LESS_ACCURATE),  # equality has to be shown
    (0.80, 0.01, EQUAL, SLOWER),
    (0.80, 0.01, WORSE, SLOWER),
    (1.00, 0.01, EQUAL, NONE),
    (1.00, 0.01, WORSE, NONE),
    (1.00, 0.20, EQUAL, INCONCLUSIVE),
    (1.30, 0.60, EQUAL, INCONCLUSIVE),
]


@pytest.mark.parametrize(("ratio", "spread", "differences", "verdict"), TABLE)
def test_the_verdict_follows_from_the_intervals(ratio, spread, differences, verdict):
    v = judge(*times(ratio, spread), differences, margin=0.5)
    assert v.verdict == verdict
    assert v.ratio == pytest.approx(ratio)
    assert v.low < v.ratio < v.high
    assert v.n == v.reached == 5
    assert v.accuracy_difference == pytest.approx(np.mean(differences))
    assert v.accuracy_low == pytest.approx(lower_bound(differences))


@given(
    st.floats(0.3, 3),
    st.floats(0, 0.5),
    st.lists(st.floats(-3, 3), min_size=5, max_size=5),
    st.floats(0.1, 2),
)
def test_exactly_one_rule_applies(ratio, spread, differences, margin):
    v = judge(*times(ratio, spread), differences, margin=margin)
    equal = lower_bound(differences) > -margin
    rules = {
        FASTER: v.low > 1 and equal,
        LESS_ACCURATE: v.low > 1 and not equal,
        SLOWER: v.high < 1,
        NONE: v.low <= 1 <= v.high < 1.05,
        INCONCLUSIVE: v.low <= 1 and v.high >= 1.05,
    }
    assert [name for name, holds in rules.items() if holds] == [v.verdict]


def test_the_margin_decides_what_counts_as_equal():
    differences = [-0.7, -0.6, -0.8, -0.7, -0.7]
    assert judge(*times(1.3), differences, margin=1.0).verdict == FASTER
    assert judge(*times(1.3), differences, margin=0.5).verdict == LESS_ACCURATE
    same = [-0.5] * 5  # the bound is exactly the margin: not above it
    assert judge(*times(1.3), same, margin=0.5).verdict == LESS_ACCURATE


@pytest.mark.parametrize("n", range(1, LEAST))
def test_fewer_than_five_pairs_give_no_verdict(n):
    v = judge(*times(2.0, n=n), [0.0] * n, margin=0.5, claim=1.5)
    assert v.verdict == INCONCLUSIVE
    assert v.claim_reproduced == "not tested"
    assert v.ratio == pytest.approx(2.0)
    assert f"n={n} pair" in v.text


def missing(values, *at):
    return [None if i in at else v for i, v in enumerate(values)]


@pytest.mark.parametrize(
    ("baseline_misses", "method_misses", "verdict", "text"),
    [
        ((), (2,), MISSED, "4 of 5 reached the target"),
        ((), (0, 1, 2, 3, 4), MISSED, "0 of 5 reached the target"),
        ((1,), (), INCONCLUSIVE, "baseline: 4 of 5 reached the target"),
        ((1,), (1, 2), INCONCLUSIVE, "baseline: 4 of 5 reached the target"),
    ],
)
def test_a_missed_target_leaves_no_ratio(baseline_misses, method_misses, verdict, text):
    baseline, method = times(3.0)
    v = judge(
        missing(baseline, *baseline_misses),
        missing(method, *method_misses),
        EQUAL,
        margin=0.5,
        claim=1.5,
        machine="2-core CPU",
    )
    assert v.verdict == verdict
    assert (v.ratio, v.low, v.high) == (None, None, None)
    assert v.text == text
    assert v.claim_reproduced == "not tested"
    assert v.reached == 5 - len(method_misses)


@pytest.mark.parametrize("early", [0, 1])
def test_a_target_that_held_before_the_first_step_is_none(early):
    arms = [list(a) for a in times(2.0)]
    arms[early][3] = 0.0
    v = judge(*arms, EQUAL, margin=0.5, claim=1.5)
    assert v.verdict == INCONCLUSIVE
    assert v.ratio is None
    assert v.text == "the target was held before the first step"
    assert v.claim_reproduced == "not tested"


@pytest.mark.parametrize("reason", [SMOKE, SHARED, "illustration, no verdict"])
def test_a_withheld_verdict_says_why_and_tests_no_claim(reason):
    baseline, method = times(2.0)
    for pair in (
        (baseline, method),
        (baseline, missing(method, 0)),
        (missing(baseline, 0), method),
        (baseline[:1], method[:1]),
    ):
        v = judge(*pair, EQUAL[: len(pair[0])], margin=0.5, claim=1.5, withhold=reason)
        assert v.verdict == reason
        assert v.claim_reproduced == "not tested"


@pytest.mark.parametrize(
    ("claim", "reproduced"),
    [
        (1.5, "yes"),
        (2.0, "yes"),
        (2.01, "yes"),
        (2.2, "no"),
        (10, "no"),
        (None, "not tested"),
    ],  # measured 2.0 [1.98, 2.02]
)
def test_the_claim_has_a_column_of_its_own(claim, reproduced):
    v = judge(*times(2.0), EQUAL, margin=0.5, claim=claim)
    assert v.claim_reproduced == reproduced
    assert v.verdict == FASTER
    assert judge(*times(2.0), WORSE, margin=0.5, claim=claim).claim_reproduced == reproduced


def test_the_text_carries_interval_pairs_and_machine():
    assert (
        judge(*times(1.34), EQUAL, margin=0.5, machine="2-core CPU").text
        == "1.34x [1.33, 1.35], n=5 pairs, 2-core CPU"
    )
    assert say_ratio(2.0, math.nan, math.nan, 1) == "2.00x, n=1 pair"


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_record_is_strict_json(n):
    v = judge(*times(1.3, n=n), [0.0] * n, margin=0.5, arm="bf16", against="fp32", quantity="time per step")
    record = json.loads(json.dumps(v.record(), allow_nan=False))
    assert record["arm"] == "bf16"
    assert record["against"] == "fp32"
    assert record["quantity"] == "time per step"
    assert (record["low"] is None) == (n == 1)
    assert (record["accuracy_low"] is None) == (n == 1)


def test_a_target_is_held_by_two_evaluations_in_a_row():
    assert held([{"accuracy": a} for a in (10, 95, 90, 91, 93, 92)]) == 92
    assert held([{"accuracy": a} for a in (10, 90)]) == 10
