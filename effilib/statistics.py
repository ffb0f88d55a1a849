"""Speed-up at equal accuracy: how many times as cheap an arm reaches what the baseline reaches.

A point is a whole training: what it cost, and the accuracy at its end. An arm trained at several lengths has
a curve, accuracy over the logarithm of the cost; the horizontal gap between two curves, averaged over the
accuracies that both cover, is the logarithm of the speed-up. Verdicts are computed here, never typed.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from scipy.special import stdtr, stdtrit  # Student's t; scipy.stats takes a third of a second to import

__all__ = [
    "Curve",
    "Length",
    "Ratio",
    "Verdict",
    "binomial_error",
    "equal_accuracy",
    "equal_cost",
    "holm",
    "interval",
    "judge",
    "monotone",
    "replication",
    "say_ratio",
    "seeds_to_decide",
]

LEAST = 3  # cells a length, below which there is no verdict
EQUAL = 1.05  # an interval within 1/1.05 ... 1.05 is no difference worth the name
FLAT = 1.0  # points: a curve that rises by less is saturated, an overlap that is smaller is thin
WITHHELD = 0.03  # raw and counted ratios that differ by more, or ...
STALLED = 0.05  # ... more of an arm's time taken off as stalls: no verdict
UNEVEN = 1.5  # times the median step of the same arm and length, above which a run was disturbed: no verdict

FASTER, SLOWER, NO_DIFFERENCE, UNDECIDED = "faster", "slower", "no difference", "undecided"
DEPENDS, OUT_OF_REACH, DIVERGED = "depends on the budget", "out of reach", "diverged"
SATURATED = "saturated"
SMOKE, SHARED = "smoke: not a measurement", "shared machine: no verdict"
MET, MISSED, NOT_DECIDED = "met", "missed", "not decided"


def binomial_error(accuracy: float, images: int) -> float:
    """Return the standard error of an accuracy (%) on so many images, in points.

    It is not 0 where all are right: as if half an image were not.

    >>> binomial_error(80.0, 100), round(binomial_error(100.0, 100), 2)
    (4.0, 0.71)
    """
    p = min(max(accuracy, 50 / images), 100 - 50 / images)
    return math.sqrt(p * (100 - p) / images)


@dataclass(frozen=True, kw_only=True)
class Length:
    """The paired cells of one length: what each training cost, and its accuracy (%), in the cells' order.

    >>> Length(costs=(10.0, 11.0), accuracies=(80.1, 79.9)).point()
    (2.35, 80.0)
    """

    costs: Sequence[float]
    accuracies: Sequence[float]

    def __post_init__(self):
        if len(self.costs) != len(self.accuracies) or not self.costs:
            raise ValueError(
                f"a length needs as many costs as accuracies, got {self.costs}, {self.accuracies}"
            )
        if not all(c > 0 and math.isfinite(c) for c in self.costs):
            raise ValueError(f"costs must be finite and above 0, got {self.costs}")

    def point(self) -> tuple[float, float]:
        """Return (mean logarithm of the cost, mean accuracy), rounded for people."""
        x, a = _point(self, None)
        return round(x, 2), round(a, 2)


Curve = list[Length]


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A speed-up at equal accuracy, with its 95 % interval; nan where there is none.

    kind: "gap"; "crossing", where the gap excludes 1 on different sides at both ends of the range, `crossing`
    being the accuracy between; "at most" or "at least", where the curves have no accuracy in common;
    "saturated", where the baseline's curve is flat. range: the accuracies that both curves cover. thin: less
    than a point of them, or than two standard errors. spread: standard error of the logarithm.

    >>> Ratio(value=0.41, kind="at most").low
    nan
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    range: tuple[float, float] = (math.nan, math.nan)
    kind: str = "gap"
    thin: bool = False
    crossing: float = math.nan
    spread: float = math.nan
    degrees: int = 0


def _point(length, without):
    keep = [i for i in range(len(length.costs)) if i != without]
    return (
        math.fsum(math.log(length.costs[i]) for i in keep) / len(keep),
        math.fsum(length.accuracies[i] for i in keep) / len(keep),
    )


def monotone(curve: Curve, without: tuple[int, int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return a curve's knots (log cost, accuracy), pooled until accuracy rises.

    Neighbours that violate the order are pooled into their mean (pool adjacent violators), each length with
    the weight 1. without: (length, cell) to leave out.

    >>> one = lambda cost, accuracy: Length(costs=(cost,), accuracies=(accuracy,))
    >>> monotone([one(1.0, 70.0), one(math.e, 75.0), one(math.e**3, 74.0)])[1].tolist()
    [70.0, 74.5]
    """
    points = [_point(c, without[1] if without and without[0] == i else None) for i, c in enumerate(curve)]
    blocks = []  # (log cost, accuracy, weight)
    for x, a in sorted(points):
        blocks.append((x, a, 1))
        while len(blocks) > 1 and blocks[-2][1] >= blocks[-1][1]:
            (x1, a1, w1), (x2, a2, w2) = blocks.pop(-2), blocks.pop()
            w = w1 + w2
            blocks.append(((w1 * x1 + w2 * x2) / w, (w1 * a1 + w2 * a2) / w, w))
    return np.array([b[0] for b in blocks]), np.array([b[1] for b in blocks])


def _gaps(base, arm):
    """(accuracies, log t_base - log t_arm) at the knots that both cover; None without any."""
    low, high = max(base[1][0], arm[1][0]), min(base[1][-1], arm[1][-1])
    if high < low:
        return None
    knots = np.unique([low, high, *(a for a in (*base[1], *arm[1]) if low < a < high)])
    return knots, np.interp(knots, base[1], base[0]) - np.interp(knots, arm[1], arm[0])


def _mean(knots, values):
    """Mean of a piecewise linear function over the knots' range."""
    width = knots[-1] - knots[0]
    return float(np.trapezoid(values, knots) / width) if width else float(values[0])


def _heights(base, arm):
    """Mean vertical gap, points of accuracy at equal cost; nan where no cost is common."""
    low, high = max(base[0][0], arm[0][0]), min(base[0][-1], arm[0][-1])
    if high < low:
        return math.nan
    knots = np.unique([low, high, *(x for x in (*base[0], *arm[0]) if low < x < high)])
    return _mean(knots, np.interp(knots, *arm) - np.interp(knots, *base))


def _jackknife(baseline, arm, statistic):
    """(standard errors, degrees of freedom) of a statistic, deleting one cell of one length at a time.

    statistic: (base knots, arm knots) -> array, or None where it does not exist; then the errors are nan.
    """
    variance, degrees = 0.0, 0
    for i, (b, a) in enumerate(zip(baseline, arm, strict=True)):
        n = len(b.costs)
        if n != len(a.costs):
            raise ValueError(
                f"length {i} has {n} cells of the baseline and {len(a.costs)} of the arm: they are pairs"
            )
        if n < 2:
            continue
        left = [statistic(monotone(baseline, (i, j)), monotone(arm, (i, j))) for j in range(n)]
        if any(v is None for v in left):
            return math.nan, 0
        left = np.array(left)
        variance = variance + (n - 1) / n * ((left - left.mean(0)) ** 2).sum(0)
        degrees += n - 1
    return (np.sqrt(variance), degrees) if degrees else (math.nan, 0)


def _half_width(degrees, level=0.95):
    return float(stdtrit(degrees, 0.5 + level / 2)) if degrees else math.nan


def equal_accuracy(baseline: Curve, arm: Curve) -> Ratio:
    """Return how many times as cheap the arm reaches the same accuracy.

    Curves: per length the paired cells. The estimate is the horizontal gap of the monotone curves, averaged
    over the accuracies that both cover. The interval is a delete-one-cell jackknife, stratified by length,
    with Student's t at sum(n_length - 1) degrees. Where no accuracy is common the ratio is a bound.

    >>> def curve(times):
    ...     return [Length(costs=(t, t), accuracies=(a, a + 0.1)) for t, a in zip(times, (70.0, 75.0))]
    >>> ratio = equal_accuracy(curve((20.0, 40.0)), curve((10.0, 20.0)))
    >>> round(ratio.value, 3), ratio.kind, [round(a, 2) for a in ratio.range]
    (2.0, 'gap', [70.05, 75.05])
    """
    base, mine = monotone(baseline), monotone(arm)
    if base[1][-1] - base[1][0] < FLAT:
        return Ratio(value=math.nan, kind=SATURATED, range=(float(base[1][0]), float(base[1][-1])))
    found = _gaps(base, mine)
    if found is None:
        below = mine[1][-1] <= base[1][0]
        shortest, best = (base[0][0], mine[0][-1]) if below else (base[0][-1], mine[0][0])
        return Ratio(value=math.exp(shortest - best), kind="at most" if below else "at least")
    knots, gaps = found

    def statistic(b, a):
        g = _gaps(b, a)
        return None if g is None else np.array([_mean(*g), g[1][0], g[1][-1]])

    errors, degrees = _jackknife(baseline, arm, statistic)
    if not degrees:
        errors = np.full(3, math.nan)
    half = _half_width(degrees) * errors
    centre = np.array([_mean(knots, gaps), gaps[0], gaps[-1]])
    low, high = centre - half, centre + half
    crossing = math.nan
    if (low[1] > 0 and high[2] < 0) or (high[1] < 0 and low[2] > 0):
        i = int(np.argmax(np.sign(gaps[1:]) != np.sign(gaps[0])))
        crossing = float(knots[i] + gaps[i] / (gaps[i] - gaps[i + 1]) * (knots[i + 1] - knots[i]))
    within = float(knots[0]), float(knots[-1])
    return Ratio(
        value=math.exp(centre[0]),
        low=math.exp(low[0]),
        high=math.exp(high[0]),
        range=within,
        kind="gap" if math.isnan(crossing) else "crossing",
        thin=within[1] - within[0] < max(FLAT, 2 * _error_of_means(baseline, arm)),
        crossing=crossing,
        spread=float(errors[0]),
        degrees=degrees,
    )


def _error_of_means(*curves):
    """The largest standard error of a length's mean accuracy; 0 where no length has two cells."""
    several = [c.accuracies for curve in curves for c in curve if len(c.accuracies) > 1]
    return max((float(np.std(a, ddof=1)) / math.sqrt(len(a)) for a in several), default=0.0)


def equal_cost(baseline: Curve, arm: Curve) -> tuple[float, float, float]:
    """Return (points, low, high): accuracy above the baseline's at equal cost.

    Averaged over the costs that both curves cover.

    >>> flat = [Length(costs=(t, t), accuracies=(a, a)) for t, a in ((10.0, 70.0), (20.0, 75.0))]
    >>> above = [Length(costs=(t, t), accuracies=(a + 1, a + 1)) for t, a in ((10.0, 70.0), (20.0, 75.0))]
    >>> [round(v, 2) for v in equal_cost(flat, above)]
    [1.0, 1.0, 1.0]
    """
    points = _heights(monotone(baseline), monotone(arm))
    if math.isnan(points):
        return math.nan, math.nan, math.nan

    def statistic(b, a):
        h = _heights(b, a)
        return None if math.isnan(h) else np.array([h])

    error, degrees = _jackknife(baseline, arm, statistic)
    half = _half_width(degrees) * float(np.ravel(error)[0])
    return points, points - half, points + half


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Return (mean, low, high): the two-sided Student-t interval of the mean; nan for one value.

    >>> [round(float(v), 2) for v in interval([1.0, 2.0, 3.0])]
    [2.0, -0.48, 4.48]
    """
    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return mean, math.nan, math.nan
    half = float(stdtrit(n - 1, 0.5 + level / 2)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return mean, mean - half, mean + half


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How an arm did against the baseline: speed-up at equal accuracy, points of accuracy (%) at equal cost.

    >>> same = [Length(costs=(t, t + 1), accuracies=(a, a)) for t, a in ((9, 70), (19, 75))]
    >>> judge(same, same).record()["verdict"]
    'undecided'
    """

    arm: str
    against: str
    verdict: str
    ratio: float | None
    low: float | None
    high: float | None
    kind: str
    range: tuple[float, float] | None
    n: int  # cells a length, the fewest
    lengths: int
    points: float | None = None  # at equal cost
    points_low: float | None = None
    points_high: float | None = None
    aim: float | None = None
    aim_verdict: str = ""
    cost: str = "seconds"
    p: float | None = None  # two-sided, of a ratio of 1
    survives: bool | None = None  # Holm's correction over a scoreboard, where it was asked for
    text: str = ""
    notes: tuple[str, ...] = field(default_factory=tuple)

    def record(self) -> dict:
        """Return it as a plain dict for `record.json`; what is not a number is null."""

        def plain(v):
            if isinstance(v, tuple):
                return [plain(x) for x in v]
            return (float(v) if math.isfinite(v) else None) if isinstance(v, float) else v

        return {k: plain(v) for k, v in asdict(self).items()}


def say_ratio(ratio: Ratio, n: int, lengths: int, machine: str = "") -> str:
    """Return a ratio as it is quoted: interval, range of accuracy, cells x lengths, machine.

    >>> say_ratio(Ratio(value=1.38, low=1.31, high=1.45, range=(78.2, 86.1), degrees=12), 5, 3, "2-core CPU")
    '1.38x [1.31, 1.45] at 78-86 %, n=5x3, 2-core CPU'
    >>> say_ratio(Ratio(value=0.41, kind="at most"), 5, 3)
    'at most 0.41x, n=5x3'
    """
    if ratio.kind == SATURATED:
        head = f"the baseline is saturated at {ratio.range[1]:.1f} %"
    elif ratio.kind in ("at most", "at least"):
        head = f"{ratio.kind} {ratio.value:.2f}x"
    else:
        digits = 0 if ratio.range[1] - ratio.range[0] >= 2 else 1
        within = f" at {ratio.range[0]:.{digits}f}-{ratio.range[1]:.{digits}f} %"
        head = (
            f"{ratio.value:.2f}x"
            + (f" [{ratio.low:.2f}, {ratio.high:.2f}]" if ratio.degrees else "")
            + within
        )
    return ", ".join(filter(None, [head, f"n={n}x{lengths}", machine]))


def seeds_to_decide(ratio: Ratio, n: int) -> int:
    """Return how many cells a length would probably decide an undecided ratio.

    The interval has to leave 1 on one side, or to fit between 1/1.05 and 1.05, whichever takes fewer cells.

    >>> seeds_to_decide(Ratio(value=1.10, low=0.98, high=1.23, spread=0.052, degrees=12), 5)
    7
    """
    lengths = ratio.degrees // max(1, n - 1)
    away = abs(math.log(ratio.value))
    wanted = max(away, math.log(EQUAL) - away)  # half widths that would decide
    for more in range(n + 1, 1000):
        if _half_width(lengths * (more - 1)) * ratio.spread * math.sqrt(n / more) < wanted:
            return more
    return 1000


def judge(
    baseline: Curve,
    arm: Curve,
    *,
    name: str = "",
    against: str = "baseline",
    aim: float | None = None,
    cost: str = "seconds",
    machine: str = "",
    diverged: bool = False,
    withhold: str = "",
) -> Verdict:
    """Return the verdict on two curves.

    aim: the speed-up that the notebook fixed before it ran; it is met where the interval's lower end reaches
    it, and missed where the upper end does not. withhold: a reason to give no verdict, which then stands in
    its place.

    >>> def curve(factor):
    ...     ends = ((10, 70), (20, 75))
    ...     return [Length(costs=[t / factor] * 3, accuracies=[a, a + 0.2, a - 0.2]) for t, a in ends]
    >>> verdict = judge(curve(1), curve(1.5), aim=1.4, machine="2-core CPU")
    >>> verdict.verdict, verdict.aim_verdict, verdict.text
    ('faster', 'met', '1.50x [1.50, 1.50] at 70-75 %, n=3x2, 2-core CPU')
    """
    n, lengths = min(len(c.costs) for c in [*baseline, *arm]), len(arm)
    base = dict(arm=name, against=against, n=n, lengths=lengths, aim=aim, cost=cost)
    if diverged:
        text = f"diverged, n={n}x{lengths}"
        aimed = MISSED if aim is not None and not withhold and n >= LEAST else _aimed(aim)
        return Verdict(
            verdict=withhold or DIVERGED, ratio=None, low=None, high=None, kind=DIVERGED, range=None,
            text=text, aim_verdict=aimed, **base,
        )  # fmt: skip
    ratio = equal_accuracy(baseline, arm)
    points, low, high = equal_cost(baseline, arm)
    notes = []
    if ratio.thin:
        notes.append(f"thin overlap: both curves cover only {ratio.range[0]:.1f} to {ratio.range[1]:.1f} %")
    verdict = _verdict(ratio, n)
    if verdict == UNDECIDED:
        if n < LEAST:
            notes.append(f"a verdict needs {LEAST} cells a length")
        elif ratio.degrees and ratio.kind == "gap":
            notes.append(f"about {seeds_to_decide(ratio, n)} cells a length would decide")
    if ratio.kind == "crossing":
        first = FASTER if _gaps(monotone(baseline), monotone(arm))[1][0] > 0 else SLOWER
        second = SLOWER if first == FASTER else FASTER
        verdict = f"{DEPENDS}: {first} below {ratio.crossing:.0f} %, {second} above"
    if ratio.kind == "at most" and n >= LEAST:
        verdict = f"{OUT_OF_REACH}: at most {ratio.value:.2f}x"
    if ratio.kind == SATURATED and n >= LEAST:
        verdict = f"{SATURATED}, at equal cost " + (
            "more accurate" if low > 0 else "less accurate" if high < 0 else UNDECIDED
        )
    aimed = _aimed(aim)
    if aim is not None and n >= LEAST and not withhold:
        aimed = _judge_aim(ratio, aim)
    gap = ratio.kind in ("gap", "crossing")
    return Verdict(
        verdict=withhold or verdict,
        ratio=ratio.value,
        low=ratio.low if gap else None,
        high=ratio.high if gap else None,
        kind=ratio.kind,
        range=ratio.range if gap else None,
        points=points,
        points_low=low,
        points_high=high,
        aim_verdict=aimed,
        p=_p(ratio),
        text=say_ratio(ratio, n, lengths, machine),
        notes=tuple(notes),
        **base,
    )


def _aimed(aim):
    return NOT_DECIDED if aim is not None else ""


def _verdict(ratio, n):
    if n < LEAST:
        return UNDECIDED
    if ratio.kind == "at least":
        return f"{FASTER}: at least {ratio.value:.2f}x" if ratio.value > 1 else UNDECIDED
    if ratio.kind != "gap" or not ratio.degrees:
        return UNDECIDED
    if ratio.low > 1 / EQUAL and ratio.high < EQUAL:
        return NO_DIFFERENCE
    return FASTER if ratio.low > 1 else SLOWER if ratio.high < 1 else UNDECIDED


def _judge_aim(ratio, aim):
    low, high = ratio.low, ratio.high
    if ratio.kind == "at most":
        low, high = math.nan, ratio.value
    elif ratio.kind == "at least":
        low, high = ratio.value, math.nan
    return MET if low >= aim else MISSED if high < aim else NOT_DECIDED


def _p(ratio):
    if not ratio.degrees or not ratio.spread > 0:
        return None
    return float(2 * stdtr(ratio.degrees, -abs(math.log(ratio.value)) / ratio.spread))


def holm(verdicts: list[Verdict], level: float = 0.05) -> list[Verdict]:
    """Return a scoreboard's verdicts, each marked whether it survives Holm's correction.

    >>> curves = [[Length(costs=(t, t + 1), accuracies=(a, a)) for t, a in ((9, 70), (19, 75))] for _ in "ab"]
    >>> [v.survives for v in holm([replace(judge(*curves), p=p) for p in (0.01, 0.03, None)])]
    [True, True, None]
    """
    from statsmodels.stats.multitest import multipletests  # takes a second

    tested = [i for i, v in enumerate(verdicts) if v.p is not None]
    rejected = multipletests([verdicts[i].p for i in tested], level, "holm")[0] if tested else ()
    survives = dict(zip(tested, map(bool, rejected), strict=True))
    return [replace(v, survives=survives.get(i)) for i, v in enumerate(verdicts)]


def replication(ratio: float, low: float, high: float) -> tuple[float, float]:
    """Return the interval in which a repetition's ratio lies with 95 %: sqrt(2) as wide as the mean's.

    >>> [round(v, 2) for v in replication(1.2, 1.1, 1.309)]
    [1.06, 1.36]
    """
    below, above = (math.sqrt(2) * math.log(end / ratio) for end in (low, high))
    return ratio * math.exp(below), ratio * math.exp(above)
