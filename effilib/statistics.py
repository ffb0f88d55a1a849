"""Paired intervals, time to target, and the verdict. Verdicts are computed here, never typed.

With 3-10 seeds a percentile bootstrap covers far too little; the interval is Student's t on paired
differences, for times on paired logarithms of the ratio."""

import itertools
import math
from dataclasses import asdict, dataclass

from scipy.stats import t as student

LEAST = 5  # pairs, below which there is no verdict
NO_SPEED_UP = 1.05  # an interval below this is no speed-up worth the name
FASTER, LESS_ACCURATE, SLOWER, NONE = (
    "faster at equal accuracy",
    "faster but less accurate",
    "slower",
    "no speed-up",
)
INCONCLUSIVE, MISSED = "inconclusive", "target missed"
SMOKE, SHARED = "smoke: not a measurement", "shared machine: no verdict"


def interval(values, level=0.95):
    """(mean, low, high): two-sided Student-t interval of the mean of `values`; low and high are nan for one
    value.

    >>> [round(float(v), 2) for v in interval([1.0, 2.0, 3.0])]
    [2.0, -0.48, 4.48]
    """
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return mean, math.nan, math.nan
    half = student.ppf(0.5 + level / 2, n - 1) * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return mean, mean - half, mean + half


def lower_bound(values, level=0.95):
    """One-sided lower bound of the mean: it lies above this with probability `level`; nan for one value.

    >>> round(float(lower_bound([1.0, 2.0, 3.0])), 2)
    0.31
    """
    return interval(values, 2 * level - 1)[1]


def paired_ratio(baseline, method):
    """(ratio, low, high) of times: how many times faster the method is. Pairs belong to the same seed.

    >>> [round(v, 2) for v in paired_ratio([10.0, 12.0, 11.0], [8.0, 10.0, 9.0])]
    [1.22, 1.16, 1.29]
    """
    if len(baseline) != len(method):
        raise ValueError(f"paired ratio of {len(baseline)} and {len(method)} times")
    return tuple(
        math.exp(v) for v in interval([math.log(b / m) for b, m in zip(baseline, method, strict=True)])
    )


def time_to_target(rows, target, value="seconds"):
    """Seconds (or another `value`, e.g. "step") until the accuracy reaches `target`, or None.

    rows: evaluations with "seconds" and "accuracy", in order. The target counts when two evaluations in a row
    hold it; the time is interpolated linearly between the evaluation before the first of them and that one.

    >>> rows = [{"seconds": 10 * i, "accuracy": accuracy} for i, accuracy in enumerate((10, 80, 90, 91))]
    >>> time_to_target(rows, 85)
    15.0
    >>> print(time_to_target(rows, 91))  # reached, but not held
    None
    """
    for i in range(len(rows) - 1):
        if rows[i]["accuracy"] >= target and rows[i + 1]["accuracy"] >= target:
            if i == 0:
                return rows[0][value]
            a, b = rows[i - 1], rows[i]
            share = (target - a["accuracy"]) / (b["accuracy"] - a["accuracy"])
            return a[value] + share * (b[value] - a[value])
    return None


def held(rows):
    """The highest accuracy that two evaluations in a row hold: every target up to it counts as reached.

    >>> held([{"accuracy": accuracy} for accuracy in (10, 90, 85, 80)])
    85
    """
    return max(min(a["accuracy"], b["accuracy"]) for a, b in itertools.pairwise(rows))


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How an arm did against the baseline. Ratios are speed-ups; accuracies are in points (%), method minus
    baseline.

    >>> verdict = judge([10.0] * 5, [None, 8.0, 8.0, 8.0, 8.0], [0.0] * 5, margin=0.5)
    >>> verdict.verdict, verdict.text, verdict.record()["ratio"]
    ('target missed', '4 of 5 reached the target', None)
    """

    arm: str
    against: str
    quantity: str
    ratio: float | None
    low: float | None
    high: float | None
    n: int
    reached: int
    accuracy_difference: float | None
    accuracy_low: float | None
    verdict: str
    claim: float | None
    claim_reproduced: str
    text: str

    def record(self):
        """As a plain dict for `record.json`; what is not a number is null."""
        return {
            k: (float(v) if math.isfinite(v) else None) if isinstance(v, float) else v
            for k, v in asdict(self).items()
        }


def judge(
    baseline,
    method,
    differences,
    *,
    margin,
    claim=None,
    arm="",
    against="baseline",
    quantity="time to target",
    machine="",
    withhold="",
):
    """The verdict on paired times (seconds; None where the target was missed) and accuracy differences
    (points).

    margin: points of accuracy that count as equal. claim: the speed-up that the notebook fixed before
    running. withhold: a reason to give no verdict at all (`SMOKE`, `SHARED`), which then stands in its place.

    >>> verdict = judge([10.0] * 5, [8.0, 8.1, 7.9, 8.0, 8.0], [0.1, -0.1, 0.0, 0.1, 0.0], margin=0.5)
    >>> verdict.verdict, verdict.text
    ('faster at equal accuracy', '1.25x [1.24, 1.26], n=5 pairs')
    """
    n = len(method)
    reached = sum(t is not None for t in method)
    missed_baseline = sum(t is None for t in baseline)
    difference, bound = sum(differences) / n, lower_bound(differences)
    ratio = low = high = None
    early = 0 in [*baseline, *method]  # a target that holds before the first step is none
    if reached == n and not missed_baseline and not early:
        ratio, low, high = paired_ratio(baseline, method)
    if withhold:
        verdict = withhold
    elif missed_baseline:
        verdict = INCONCLUSIVE
    elif reached < n:
        verdict = MISSED
    elif early or n < LEAST:
        verdict = INCONCLUSIVE
    elif high < 1:
        verdict = SLOWER
    elif low > 1:
        verdict = FASTER if bound > -margin else LESS_ACCURATE
    elif high < NO_SPEED_UP:
        verdict = NONE
    else:
        verdict = INCONCLUSIVE
    tested = claim is not None and ratio is not None and n >= LEAST and not withhold
    reproduced = ("yes" if high >= claim else "no") if tested else "not tested"
    if early and reached == n and not missed_baseline:
        text = "the target was held before the first step"
    elif ratio is None:
        who = f"baseline: {n - missed_baseline}" if missed_baseline else f"{reached}"
        text = f"{who} of {n} reached the target"
    else:
        text = say_ratio(ratio, low, high, n, machine)
    return Verdict(
        arm=arm, against=against, quantity=quantity, ratio=ratio, low=low, high=high, n=n, reached=reached,
        accuracy_difference=difference, accuracy_low=bound, verdict=verdict, claim=claim, claim_reproduced=reproduced, text=text,
    )  # fmt: skip


def say_ratio(ratio, low, high, n, machine=""):
    """A ratio as it is quoted: with its interval, the number of pairs, and the machine.

    >>> say_ratio(1.342, 1.291, 1.4, 5, "2-core CPU")
    '1.34x [1.29, 1.40], n=5 pairs, 2-core CPU'
    """
    spread = f" [{low:.2f}, {high:.2f}]" if math.isfinite(low) else ""
    return ", ".join(filter(None, [f"{ratio:.2f}x{spread}", f"n={n} pair{'s' * (n != 1)}", machine]))
