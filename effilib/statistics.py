"""Speed-up at equal accuracy: how many times as cheap an arm reaches what the baseline reaches.

A point is a whole training: what it cost, and the accuracy at its end. An arm trained at several lengths has
a curve, accuracy over the logarithm of the cost; the horizontal gap between two curves, averaged over the
accuracies that both cover, is the logarithm of the speed-up. Verdicts are computed here, never typed.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from scipy.special import stdtr, stdtrit  # Student's t; scipy.stats takes a third of a second to import

from effilib import paths
from effilib.errors import BadInput

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
MOST = 100  # cells a length that anybody would train
EQUAL = 1.05  # an interval within 1/1.05 ... 1.05 is no difference worth the name
FLAT = 1.0  # points: a curve that rises by less is saturated, an overlap that is smaller is thin
WITHHELD = 0.03  # raw and counted ratios that differ by more, or ...
STALLED = 0.05  # ... more of an arm's time taken off as stalls: no verdict
UNEVEN = 1.5  # times the median step of the same arm and length, above which a run was disturbed: no verdict

FASTER, SLOWER, NO_DIFFERENCE, UNDECIDED = "faster", "slower", "no difference", "undecided"
DEPENDS, OUT_OF_REACH, DIVERGED = "depends on the budget", "out of reach", "diverged"
SATURATED, ONE_LENGTH = "saturated", "one length: no curve"
SMOKE, SHARED = "smoke: not a measurement", "shared machine: no verdict"
MET, MISSED, NOT_DECIDED = "met", "missed", "not decided"


def binomial_error(accuracy: float, images: int) -> float:
    """Return an accuracy's standard error on so many images, in points.

    It never reaches 0: where all images are right (or wrong), half an image counts as the exception.

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
            raise BadInput(f"a length needs as many costs as accuracies, got {self.costs}, {self.accuracies}")
        if not all(c > 0 and math.isfinite(c) for c in self.costs):
            raise BadInput(f"costs must be finite and above 0, got {self.costs}")
        if not all(map(math.isfinite, self.accuracies)):
            raise BadInput(f"accuracies must be finite, got {self.accuracies}")

    def point(self) -> tuple[float, float]:
        """Return (mean logarithm of the cost, mean accuracy), rounded for people."""
        x, a = _point(self, None)
        return round(x, 2), round(a, 2)


Curve = list[Length]


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A speed-up at equal accuracy, with its 95 % interval; nan where there is none.

    kind: "gap"; "crossing", where the gap excludes 1 on different sides at both ends of the range, `crossing`
    being the accuracy between and `first` the gap's sign below it; "at most" or "at least", where the curves
    have no accuracy in common: value is then a bound, and so is high or low, which are nan where noise could
    have parted the curves; "saturated", where the baseline's curve is flat; "one length: no curve". range:
    the accuracies that both curves cover. thin: less than a point of them, or than two standard errors.
    spread: standard error of the logarithm. p: two-sided, of a ratio of 1, at both ends where they cross; of
    a bound, that its curves meet, or that what "at least" says is no more than 1.

    >>> Ratio(value=0.41, high=0.41, kind="at most").low
    nan
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    range: tuple[float, float] = (math.nan, math.nan)
    kind: str = "gap"
    thin: bool = False
    crossing: float = math.nan
    first: int = 0
    spread: float = math.nan
    degrees: int = 0
    p: float = math.nan


def _point(length, without):
    keep = [i for i in range(len(length.costs)) if i != without]
    return (
        math.fsum(math.log(length.costs[i]) for i in keep) / len(keep),
        math.fsum(length.accuracies[i] for i in keep) / len(keep),
    )


def _means(curve, without=None):
    """(log cost, accuracy) of every length, the cheapest first, as they are."""
    return sorted(_point(c, without[1] if without and without[0] == i else None) for i, c in enumerate(curve))


def monotone(curve: Curve, without: tuple[int, int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return a curve's knots (log cost, accuracy), pooled until accuracy rises.

    Neighbours that violate the order are pooled into their mean (pool adjacent violators), each length with
    the weight 1. without: (length, cell) to leave out.

    >>> one = lambda cost, accuracy: Length(costs=(cost,), accuracies=(accuracy,))
    >>> monotone([one(1.0, 70.0), one(math.e, 75.0), one(math.e**3, 74.0)])[1].tolist()
    [70.0, 74.5]
    """
    blocks = []  # (log cost, accuracy, weight)
    for x, a in _means(curve, without):
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


def _heights(baseline, arm, without=None):
    """Mean vertical gap, points of accuracy at equal cost; nan where no cost is common.

    Between the means as they are: pooling would shrink a curve that falls, and here none has to rise.
    """
    base, mine = (np.array(_means(c, without)).T for c in (baseline, arm))
    low, high = max(base[0][0], mine[0][0]), min(base[0][-1], mine[0][-1])
    if high < low:
        return math.nan
    knots = np.unique([low, high, *(x for x in (*base[0], *mine[0]) if low < x < high)])
    return _mean(knots, np.interp(knots, *mine) - np.interp(knots, *base))


def _jackknife(baseline, arm, statistic):
    """(standard errors, degrees of freedom) of a statistic, deleting one cell of one length at a time.

    statistic: (baseline, arm, (length, cell) to leave out) -> array; the errors are nan where it is for one.
    """
    if len(baseline) != len(arm):
        raise BadInput(f"the baseline has {len(baseline)} lengths and the arm {len(arm)}: they are pairs")
    variance, degrees = np.zeros(1), 0
    for i, (b, a) in enumerate(zip(baseline, arm, strict=True)):
        n = len(b.costs)
        if n != len(a.costs):
            raise BadInput(
                f"length {i} has {n} cells of the baseline and {len(a.costs)} of the arm: they are pairs"
            )
        if n < 2:
            continue
        left = np.array([np.atleast_1d(statistic(baseline, arm, (i, j))) for j in range(n)])
        variance = variance + (n - 1) / n * ((left - left.mean(0)) ** 2).sum(0)
        degrees += n - 1
    known = degrees > 0 and bool(np.isfinite(variance).all())
    return (np.sqrt(variance), degrees) if known else (np.full(1, math.nan), 0)


def _half_width(degrees, level=0.95):
    return float(stdtrit(degrees, 0.5 + level / 2)) if degrees else math.nan


def equal_accuracy(baseline: Curve, arm: Curve) -> Ratio:
    """Return how many times as cheap the arm reaches the same accuracy.

    Curves: per length the paired cells. The estimate is the horizontal gap of the monotone curves, averaged
    over the accuracies that both cover. The interval is a delete-one-cell jackknife, stratified by length,
    with Student's t at sum(n_length - 1) degrees. Where no accuracy is common the ratio is a bound, widened
    by the error of its times. Raises `BadInput` where cells are not pairs.

    >>> def curve(times):
    ...     return [Length(costs=(t, t), accuracies=(a, a + 0.1)) for t, a in zip(times, (70.0, 75.0))]
    >>> ratio = equal_accuracy(curve((20.0, 40.0)), curve((10.0, 20.0)))
    >>> round(ratio.value, 3), ratio.kind, [round(a, 2) for a in ratio.range]
    (2.0, 'gap', [70.05, 75.05])
    """
    base, mine = monotone(baseline), monotone(arm)
    if len(baseline) < 2:
        return Ratio(value=math.nan, kind=ONE_LENGTH)
    if base[1][-1] - base[1][0] < FLAT:
        return Ratio(value=math.nan, kind=SATURATED, range=(float(base[1][0]), float(base[1][-1])))
    found = _gaps(base, mine)
    if found is None:
        return _bound(baseline, arm)
    knots, gaps = found

    def statistic(b, a, without=None):  # the mean gap, and the gap at both ends
        g = _gaps(monotone(b, without), monotone(a, without))
        return np.full(3, math.nan) if g is None else np.array([_mean(*g), g[1][0], g[1][-1]])

    centre = statistic(baseline, arm)
    low, high, p, errors, degrees = _inference(baseline, arm, statistic)
    crosses = bool((low[1] > 0 and high[2] < 0) or (high[1] < 0 and low[2] > 0))
    crossing = math.nan
    if crosses:
        i = int(np.argmax(np.sign(gaps[1:]) != np.sign(gaps[0])))
        crossing = float(knots[i] + gaps[i] / (gaps[i] - gaps[i + 1]) * (knots[i + 1] - knots[i]))
    within = float(knots[0]), float(knots[-1])
    return Ratio(
        value=math.exp(centre[0]),
        low=math.exp(low[0]),
        high=math.exp(high[0]),
        range=within,
        kind="crossing" if crosses else "gap",
        thin=within[1] - within[0] < max(FLAT, 2 * _error_of_means(baseline, arm)),
        crossing=crossing,
        first=int(np.sign(gaps[0])),
        spread=float(errors[0]),
        degrees=degrees,
        p=float(p[1:].max() if crosses else p[0]),
    )


def _inference(baseline, arm, statistic):
    """(low, high, p of 0, errors, degrees) of a statistic, one of each for each of its numbers."""
    centre = statistic(baseline, arm)
    errors, degrees = _jackknife(baseline, arm, statistic)
    errors = np.broadcast_to(errors, centre.shape)
    half = _half_width(degrees) * errors
    p = np.array(
        [2 * stdtr(degrees, -abs(c) / e) if e > 0 else math.nan for c, e in zip(centre, errors, strict=True)]
    )
    return centre - half, centre + half, p, errors, degrees


def _bound(baseline, arm):
    """The bound that two curves without a common accuracy give, widened by the error of its times.

    Its ends are the baseline's shortest training and the arm's best, or the baseline's best and the arm's
    shortest. high or low say so only where the accuracies there differ by more than noise.
    """
    below = monotone(arm)[1][-1] < monotone(baseline)[1][0]
    i, j, sign = (0, -1, 1) if below else (-1, 0, -1)

    def ends(b, a, without=None):  # log of the bound, and by how many points the curves are apart
        (x, y), (x_arm, y_arm) = monotone(b, without), monotone(a, without)
        return np.array([x[i] - x_arm[j], sign * (y[i] - y_arm[j])])

    value = ends(baseline, arm)[0]
    low, high, p, errors, degrees = _inference(baseline, arm, ends)
    settled = low[1] > 0
    end = math.exp((high if below else low)[0] if settled else value)
    return Ratio(
        value=end,
        low=end if settled and not below else math.nan,
        high=end if settled and below else math.nan,
        kind="at most" if below else "at least",
        spread=float(errors[0]),
        degrees=degrees,
        p=float(p[1] if below else p.max() if value > 0 else math.nan),
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
    points = _heights(baseline, arm)
    error, degrees = _jackknife(baseline, arm, _heights)
    half = _half_width(degrees) * float(error[0])
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
    p: float | None = None  # of `Ratio`
    text: str = ""
    notes: tuple[str, ...] = field(default_factory=tuple)

    def record(self) -> dict:
        """Return it as a plain dict for `record.json`; what is not a number is null."""
        return paths.finite(asdict(self))


def say_ratio(ratio: Ratio, n: int, lengths: int, machine: str = "") -> str:
    """Return a ratio as it is quoted: interval, range of accuracy, cells x lengths, machine.

    >>> say_ratio(Ratio(value=1.38, low=1.31, high=1.45, range=(78.2, 86.1), degrees=12), 5, 3, "2-core CPU")
    '1.38x [1.31, 1.45] at 78-86 %, n=5x3, 2-core CPU'
    >>> say_ratio(Ratio(value=0.41, high=0.41, kind="at most"), 5, 3)
    'at most 0.41x, n=5x3'
    """
    if ratio.kind == ONE_LENGTH:
        head = ONE_LENGTH
    elif ratio.kind == SATURATED:
        head = f"the baseline is saturated at {ratio.range[1]:.1f} %"
    elif ratio.kind in ("at most", "at least"):
        uncertain = math.isnan(ratio.low) and math.isnan(ratio.high)
        head = f"{ratio.kind} {ratio.value:.2f}x" + " (uncertain)" * uncertain
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
    """Return how many cells a length would probably decide an undecided ratio; 101: more than 100.

    The interval has to leave 1 on one side, or to fit between 1/1.05 and 1.05, whichever takes fewer cells.

    >>> seeds_to_decide(Ratio(value=1.10, low=0.98, high=1.23, spread=0.052, degrees=12), 5)
    7
    """
    lengths = ratio.degrees // max(1, n - 1)
    away = abs(math.log(ratio.value))
    wanted = max(away, math.log(EQUAL) - away)  # half widths that would decide
    for more in range(n + 1, MOST + 1):
        if _half_width(lengths * (more - 1)) * ratio.spread * math.sqrt(n / more) < wanted:
            return more
    return MOST + 1


def judge(
    baseline: Curve,
    arm: Curve,
    *,
    name: str = "",
    against: str = "baseline",
    aim: float | None = None,
    cost: str = "seconds",
    machine: str = "",
    withhold: str = "",
) -> Verdict:
    """Return the verdict on two curves.

    The first that holds: undecided with fewer than 3 cells a length; one length; saturated; a bound; depends
    on the budget; no difference (the interval lies between 1/1.05 and 1.05, even if it excludes 1); faster or
    slower; undecided. aim: the speed-up that the notebook fixed before it ran; it is met where the interval's
    lower end reaches it, and missed where the upper end does not. withhold: a reason to give no verdict,
    which then stands in its place.

    >>> def curve(factor):
    ...     ends = ((10, 70), (20, 75))
    ...     return [Length(costs=[t / factor] * 3, accuracies=[a, a + 0.2, a - 0.2]) for t, a in ends]
    >>> verdict = judge(curve(1), curve(1.5), aim=1.4, machine="2-core CPU")
    >>> verdict.verdict, verdict.aim_verdict, verdict.text
    ('faster', 'met', '1.50x [1.50, 1.50] at 70-75 %, n=3x2, 2-core CPU')
    """
    n, lengths = min(len(c.costs) for c in [*baseline, *arm]), len(arm)
    ratio = equal_accuracy(baseline, arm)
    points, low, high = equal_cost(baseline, arm)
    notes, few = [], n < LEAST
    verdict = UNDECIDED if few else _verdict(ratio, low, high)
    if ratio.thin:
        thin = "" if few or ratio.degrees else ", too thin for an interval"
        covered = f"{ratio.range[0]:.1f} to {ratio.range[1]:.1f} %"
        notes.append(f"thin overlap: both curves cover only {covered}{thin}")
    if verdict == UNDECIDED:
        notes += [f"a verdict needs {LEAST} cells a length"] if few else _what_would_decide(ratio, n)
    aimed = "" if aim is None else NOT_DECIDED
    if aim is not None and not few and not withhold:
        aimed = MET if ratio.low >= aim else MISSED if ratio.high < aim else NOT_DECIDED
    numbers = dict(ratio=ratio.value, low=ratio.low, high=ratio.high, p=math.nan if few else ratio.p)
    numbers |= dict(points=points, points_low=low, points_high=high)
    return Verdict(
        arm=name,
        against=against,
        verdict=withhold or verdict,
        **{k: None if math.isnan(v) else v for k, v in numbers.items()},
        kind=ratio.kind,
        range=ratio.range if ratio.kind in ("gap", "crossing") else None,
        n=n,
        lengths=lengths,
        aim=aim,
        aim_verdict=aimed,
        cost=cost,
        text=say_ratio(ratio, n, lengths, machine),
        notes=tuple(notes),
    )


def _verdict(ratio, points_low, points_high):
    """The verdict of enough cells, in the order that `judge` names."""
    if ratio.kind == ONE_LENGTH:
        return ONE_LENGTH
    if ratio.kind == SATURATED:
        above, below = points_low > 0, points_high < 0
        return f"{SATURATED}, at equal cost " + (
            "more accurate" if above else "less accurate" if below else UNDECIDED
        )
    if ratio.kind == "at most" and ratio.high > 0:
        return f"{OUT_OF_REACH}: at most {ratio.value:.2f}x"
    if ratio.kind == "at least" and ratio.low > 1:
        return f"{FASTER}: at least {ratio.value:.2f}x"
    if ratio.kind == "crossing":
        first, second = (FASTER, SLOWER) if ratio.first > 0 else (SLOWER, FASTER)
        return f"{DEPENDS}: {first} below {ratio.crossing:.0f} %, {second} above"
    if ratio.low > 1 / EQUAL and ratio.high < EQUAL:
        return NO_DIFFERENCE
    return FASTER if ratio.low > 1 else SLOWER if ratio.high < 1 else UNDECIDED


def _what_would_decide(ratio, n):
    """Notes on what an undecided ratio lacks."""
    if ratio.kind != "gap":
        apart = math.isfinite(ratio.low)  # "at least" something below 1
        return [] if apart else ["the curves nearly meet: longer or shorter trainings would decide"]
    if not ratio.degrees:
        return [] if ratio.thin else ["no interval: without one of the cells the curves do not meet"]
    cells = seeds_to_decide(ratio, n)
    return [f"{f'about {cells}' if cells <= MOST else f'more than {MOST}'} cells a length would decide"]


def holm(ps: Sequence[float], level: float = 0.05) -> list[bool]:
    """Return which of several tests survive Holm's correction, by their p.

    >>> holm([0.01, 0.03, 0.2])
    [True, False, False]
    """
    from statsmodels.stats.multitest import multipletests  # takes a second

    return [bool(rejected) for rejected in multipletests(ps, level, "holm")[0]] if len(ps) else []


def replication(ratio: float, low: float, high: float) -> tuple[float, float]:
    """Return the interval in which a repetition's ratio lies with 95 %: sqrt(2) as wide as the mean's.

    >>> [round(v, 2) for v in replication(1.2, 1.1, 1.309)]
    [1.06, 1.36]
    """
    below, above = (math.sqrt(2) * math.log(end / ratio) for end in (low, high))
    return ratio * math.exp(below), ratio * math.exp(above)
