"""What follows from finished runs: `compare` trains the arms and returns a `Comparison`.

Numbers stay numbers in its frames; a notebook's formatter makes them text.
"""

import math
import statistics as stats
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from effilib import user_files
from effilib.caveats import caveats
from effilib.errors import BadInput, choose
from effilib.experiment import Arm, check_arms, find_lengths, measure
from effilib.history import History
from effilib.statistics import (
    DIVERGED,
    FLAT,
    LEAST,
    MISSED,
    NOT_DECIDED,
    SHARED,
    SMOKE,
    STALLED,
    UNEVEN,
    WITHHELD,
    Curve,
    Length,
    Ratio,
    Verdict,
    binomial_error,
    equal_accuracy,
    judge,
)
from effilib.tasks import Task

__all__ = ["COSTS", "Comparison", "compare"]

COSTS = ("seconds", "flops", "images")
EQUAL_COST = {"seconds": "time", "images": "images"}
COLUMNS = ["comparison", "arm", "role", "seed", "length", "step", "seconds", "accuracy", "flops", "images"]


def compare(
    task: Task,
    arms: list[Arm],
    *,
    seeds: int | None = None,
    aim: float | dict[str, float] | None = None,
    illustration: bool = False,
    title: str = "runs",
) -> "Comparison":
    """Train the arms at the task's lengths, and compare them.

    arms: the first is the baseline. seeds: cells a length (default: the task's). aim: the speed-up at equal
    accuracy fixed before running, for every method, or a dict by arm. illustration: a grid that is shown but
    not judged. title: names the comparison in progress lines and in history.csv. Raises `BadInput` for arms
    that cannot be compared.

    >>> arms = [Arm(name="baseline", role="baseline"), Arm(name="narrow", network={"widths": (4, 4, 8)})]
    >>> comparison = compare(task("smoke", "synthetic"), arms)
    runs: 1 of 4, ...
    ...
    >>> comparison.verdict("narrow").verdict
    'smoke: not a measurement'
    """
    user_files.refuse_while_loading("a comparison")
    if seeds is not None:
        task = task.but(seeds=seeds)
    check_arms(task, arms)
    if isinstance(aim, dict):
        for name in aim:
            choose("arm with an aim", name, [a.name for a in arms[1:]])
    lengths = {a.name: a.lengths or task.lengths for a in arms} if illustration else find_lengths(task, arms)
    found = measure(task, arms, lengths=lengths, title=title)
    return Comparison(
        task=task, arms=tuple(arms), cells=found, aim=aim, illustration=illustration, title=title
    )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The finished runs of some arms, and what follows from them.

    >>> arms = [Arm(name="baseline", role="baseline"), Arm(name="narrow", network={"widths": (4, 4, 4)})]
    >>> comparison = compare(task("smoke", "synthetic"), arms)
    runs: 1 of 4, ...
    ...
    >>> list(comparison.table().index), len(comparison.curves()), len(comparison.curve("narrow"))
    (['baseline', 'narrow'], 4, 2)
    """

    task: Task
    arms: tuple[Arm, ...]
    cells: list[dict]
    aim: float | dict[str, float] | None = None
    illustration: bool = False
    title: str = "runs"

    @property
    def baseline(self) -> str:
        """The baseline's name."""
        return self.arms[0].name

    @property
    def cost(self) -> str:
        """What is judged: "images" where lengths are numbers of images at as many updates, else "seconds"."""
        return "images" if self.task.axis == "images" else "seconds"

    @property
    def machine(self) -> dict:
        """What it was measured on: see `clock.machine`."""
        return self.cells[-1]["machine"]

    @property
    def lengths(self) -> list[float]:
        """The baseline's lengths, shortest first."""
        return sorted({c["length"] for c in self.cells})

    def histories(self, arm: str, length: float | None = None) -> list[History]:
        """Return the arm's runs: of all cells, or of one of the baseline's lengths."""
        choose("arm", arm, [a.name for a in self.arms])
        return [c["arms"][arm] for c in self.cells if length is None or c["length"] == length]

    def diverged(self, arm: str) -> int:
        """Return how many of the arm's runs diverged."""
        return sum(h.diverged for h in self.histories(arm))

    def curve(self, arm: str, cost: str = "seconds") -> Curve:
        """Return the arm's curve, a `Length` each: what its trainings cost and how accurate they ended.

        cost: "seconds", "flops" or "images" (different ones where lengths are numbers of images, else those
        seen). Runs that diverged have no end and are left out, and so is a length without any other. Raises
        `BadInput` where a run cost nothing, such as one whose FLOPs were not counted.
        """
        return list(self._ends(arm, cost).values())

    def _ends(self, arm, cost):
        """Length -> `Length` of the arm's runs that did not diverge."""
        choose("cost", cost, (*COSTS, "raw_seconds"))
        found = {}
        for length in self.lengths:
            runs = [h for h in self.histories(arm, length) if not h.diverged]
            costs, ends = tuple(self._cost(h, cost) for h in runs), tuple(h.accuracy for h in runs)
            if not all(c > 0 for c in costs):
                raise BadInput(f"{arm} took {min(costs):g} {cost} at length {length:g}: no cost to judge by")
            if runs:
                found[length] = Length(costs=costs, accuracies=ends)
        return found

    def _cost(self, history, cost):
        """What a training cost; images are different ones where lengths are numbers of images."""
        seen = cost == "images" and self.task.axis != "images"
        return float(getattr(history, "seen" if seen else cost))

    def ratio(self, arm: str, cost: str = "seconds") -> Ratio | None:
        """Return the arm's speed-up at equal accuracy; None where a run diverged or cost nothing."""
        if self.diverged(arm) or self.diverged(self.baseline):
            return None
        try:
            return equal_accuracy(self.curve(self.baseline, cost), self.curve(arm, cost))
        except ValueError:
            return None

    def verdict(self, arm: str, cost: str | None = None) -> Verdict:
        """Return the `Verdict` of an arm against the baseline. cost: default what is judged."""
        cost = cost or self.cost
        aim = self.aim.get(arm) if isinstance(self.aim, dict) else self.aim if self._is_method(arm) else None
        who = next((name for name in (arm, self.baseline) if self.diverged(name)), "")
        withhold, machine = self._withhold(arm, cost), self.machine["summary"]
        same = dict(aim=aim, cost=cost)
        if not who:
            curves = self.curve(self.baseline, cost), self.curve(arm, cost)
            return judge(*curves, name=arm, against=self.baseline, machine=machine, withhold=withhold, **same)
        missed = who == arm and self.task.seeds >= LEAST and not withhold
        return Verdict(
            arm=arm, against=self.baseline, verdict=withhold or DIVERGED, kind=DIVERGED,
            ratio=None, low=None, high=None, range=None, n=self.task.seeds, lengths=len(self.lengths),
            aim_verdict="" if aim is None else MISSED if missed else NOT_DECIDED,
            text=f"{who}: {self.diverged(who)} of {len(self.histories(who))} runs diverged", **same,
        )  # fmt: skip

    def _is_method(self, arm):
        return next(a for a in self.arms if a.name == arm).role == "method"

    def _withhold(self, arm, cost):
        """Why there is no verdict, or ""."""
        if self.task.preset == "smoke":
            return SMOKE
        if self.illustration:
            return "illustration: no verdict"
        if self.held_out and 100 / self.held_out > FLAT:
            return f"too few held-out images: one of {self.held_out} is {100 / self.held_out:.1f} points"
        if cost != "seconds":
            return ""
        if any(c["shared"] for c in self.cells):
            return SHARED
        for name in (self.baseline, arm):
            if self.stalled(name) > STALLED:
                return f"stalls: {self.stalled(name):.0%} of the time of {name} were taken off"
        for name in (self.baseline, arm):
            if uneven := self.uneven(name):
                return uneven
        counted, raw = self.ratio(arm), self.ratio(arm, "raw_seconds")
        if counted and raw and abs(math.log(raw.value / counted.value)) > WITHHELD:
            return f"stalls: {raw.value:.2f}x as measured, {counted.value:.2f}x without them"
        return ""

    def stalled(self, arm: str) -> float:
        """Return the share of the arm's time that stalls took."""
        runs = self.histories(arm)
        raw = math.fsum(h.raw_seconds for h in runs)
        return 1 - math.fsum(h.seconds for h in runs) / raw if raw else 0.0

    def uneven(self, arm: str) -> str:
        """Return which of the arm's runs was disturbed, or "".

        What a neighbour takes of caches and cores is no stall: the process has a processor all the time. A
        run is disturbed whose steps take `UNEVEN` times the median of the other seeds at its length, and that
        takes longer as a whole: a larger network, where a method chooses it, may take fewer steps.
        """
        for length in self.lengths:
            runs = {c["seed"]: c["arms"][arm] for c in self.cells if c["length"] == length}
            steps = {seed: h.step_seconds for seed, h in runs.items()}
            for seed, mine in steps.items():
                others = [s for other, s in steps.items() if other != seed]
                whole = [h.seconds for other, h in runs.items() if other != seed]
                longer = whole and runs[seed].seconds > UNEVEN**0.5 * stats.median(whole)
                if longer and mine > UNEVEN * (usual := stats.median(others)):
                    times = f"{mine / usual:.1f} times as long as with the other seeds"
                    return f"uneven: the steps of {arm}, length {length:g}, seed {seed}, took {times}"
        return ""

    @property
    def held_out(self) -> int:
        """Return how many images the accuracies are of, or 0."""
        return max(h.held_out for h in self.histories(self.baseline))

    def verdicts(self) -> list[Verdict]:
        """Return the verdicts of all arms but the baseline."""
        return [self.verdict(a.name) for a in self.arms[1:]]

    def say(self, arm: str) -> str:
        """Return the arm's verdict as a sentence: ratio, aim, points at equal time, what FLOPs would give."""
        v, flops = self.verdict(arm), self.ratio(arm, "flops") if self.cost == "seconds" else None
        bound = f": {v.kind} "  # which the text says too
        parts = [f"{arm} against {v.against}: {v.verdict.partition(bound)[0]}, {v.text}"]
        if v.aim is not None:
            parts.append(f"aim {v.aim:g}x {v.aim_verdict}")
        if v.points is not None:
            spread = "" if v.points_low is None else f" [{v.points_low:+.2f}, {v.points_high:+.2f}]"
            parts.append(f"{v.points:+.2f}{spread} points at equal {EQUAL_COST[self.cost]}")
        if flops and math.isfinite(flops.value):
            bound = f"{flops.kind} " if _is_bound(flops) else ""
            parts.append(f"{bound}{flops.value:.2f}x if FLOPs were time")
        return "; ".join([*parts, *v.notes]) + "."

    def table(self) -> pd.DataFrame:
        """Return one row an arm: everything that is judged, as numbers.

        A bound is no speed-up: it stands in the column "low" or "high" alone.
        """
        rows = []
        for arm in self.arms:
            runs, base = self.histories(arm.name), arm.name == self.baseline
            longest = self.histories(arm.name, self.lengths[-1])
            v = None if base else self.verdict(arm.name)
            flops = None if base or self.cost != "seconds" else self.ratio(arm.name, "flops")
            row = {
                "role": arm.role,
                "seeds": self.task.seeds,
                "lengths": len(self.lengths),
                "speed-up": 1.0 if base else math.nan if _is_bound(v) else _number(v.ratio),
                "low": math.nan if base else _number(v.low),
                "high": math.nan if base else _number(v.high),
                f"points at equal {EQUAL_COST[self.cost]}": 0.0 if base else _number(v.points),
                "x by FLOPs": 1.0 if base else math.nan if not flops or _is_bound(flops) else flops.value,
                "ms a step": 1e3 * stats.median(h.step_seconds for h in runs),
                "accuracy % (longest)": stats.fmean(h.accuracy for h in longest),
                "balanced %": stats.fmean(h.balanced_accuracy for h in longest),
                "s (longest)": stats.fmean(h.seconds for h in longest),
                "memory MB": max(sum(v for k, v in h.memory.items() if k != "peak") for h in runs) / 2**20,
                "verdict": "" if base else v.verdict,
                "aim x": math.nan if base else _number(v.aim),
                "aim": "" if base else v.aim_verdict,
            }
            rows.append({"arm": arm.name, **row})
        return pd.DataFrame(rows).set_index("arm")

    def measures(
        self, *names: str, by_length: bool = False, **own: Callable[[History], float]
    ) -> pd.DataFrame:
        """Return means over runs, one row an arm (and length).

        names: attributes of `History`, such as "seconds" or "step_seconds". own: column -> function of a
        `History`.

        >>> arms = [Arm(name="baseline", role="baseline"), Arm(name="narrow", network={"widths": (4, 8, 8)})]
        >>> found = compare(task("smoke", "synthetic"), arms)
        runs: 1 of 4, ...
        ...
        >>> found.measures("steps", epochs=lambda h: h.rows[-1]["epoch"]).loc["narrow"].tolist()
        [6.0, 1.5]
        """
        columns = {**{name: (lambda h, name=name: getattr(h, name)) for name in names}, **own}
        lengths = self.lengths if by_length else [None]
        rows = {
            (arm.name, length): {
                column: stats.fmean(f(h) for h in self.histories(arm.name, length))
                for column, f in columns.items()
            }
            for arm in self.arms
            for length in lengths
        }
        frame = pd.DataFrame(rows).T
        frame.index = pd.MultiIndex.from_tuples(rows, names=["arm", "length"])
        return frame if by_length else frame.droplevel("length")

    def curves(self, cost: str = "seconds") -> pd.DataFrame:
        """Return all curves' points, with standard errors of the accuracies."""
        rows = []
        for arm in self.arms:
            for length, found in self._ends(arm.name, cost).items():
                n, a = len(found.costs), found.accuracies
                rows.append(
                    {
                        "arm": arm.name,
                        "length": next(c["lengths"][arm.name] for c in self.cells if c["length"] == length),
                        cost: math.exp(stats.fmean(map(math.log, found.costs))),
                        "accuracy": stats.fmean(a),
                        "error": stats.stdev(a) / math.sqrt(n) if n > 1 else math.nan,
                        "n": n,
                    }
                )
        return pd.DataFrame(rows)

    def runs(self) -> pd.DataFrame:
        """Return one row a training."""
        rows = []
        for c in self.cells:
            for arm in self.arms:
                h = c["arms"][arm.name]
                row = {"arm": arm.name, "role": arm.role, "seed": c["seed"], "length": c["lengths"][arm.name]}
                row |= {
                    name: getattr(h, name)
                    for name in ("steps", "seconds", "raw_seconds", "accuracy", "flops")
                }
                rows.append(row | {"test accuracy": h.test_accuracy, "diverged": h.diverged})
        return pd.DataFrame(rows)

    def history(self) -> pd.DataFrame:
        """Return one row per evaluation: what `history.csv` holds.

        The last row of a training is its end: what is judged. length is the baseline's, by which cells are
        paired. images: different ones where lengths are numbers of images, else those seen.
        """
        rows = []
        for c in self.cells:
            for arm in self.arms:
                h = c["arms"][arm.name]
                costs = {k: self._cost(h, k) for k in COSTS}
                same = {
                    "comparison": self.title,
                    "arm": arm.name,
                    "role": arm.role,
                    "seed": c["seed"],
                    "length": c["length"],
                }
                for row in h.rows[:-1]:
                    now = {k: row[k] for k in ("step", "seconds", "accuracy")}
                    spent = {k: costs[k] * row["step"] / h.steps for k in ("flops", "images")}
                    rows.append({**same, **now, **spent})
                accuracy = math.nan if h.diverged or not h.rows else h.accuracy
                rows.append({**same, "step": h.steps, "accuracy": accuracy, **costs})
        return pd.DataFrame(rows, columns=COLUMNS)

    def notes(self) -> list[str]:
        """Return what a reader must know of the conditions, in sentences."""
        runs = [h for c in self.cells for h in c["arms"].values()]
        raw, used = math.fsum(h.raw_seconds for h in runs), math.fsum(h.seconds for h in runs)
        notes = [
            f"{raw - used:.1f} of {raw:.1f} s were stalls, in which the process had no processor, and were "
            "taken off."
        ]
        cached = [c["cached"] for c in self.cells if c.get("cached")]
        if cached:
            notes.append(
                f"{len(cached)} of {len(self.cells)} cells come from the cache, measured {min(cached)}."
            )
        shared = sum(c["shared"] for c in self.cells)
        if shared:
            notes.append(
                f"In {shared} of {len(self.cells)} cells something else was measured on this machine."
            )
        diverged = [f"{a.name} ({self.diverged(a.name)})" for a in self.arms if self.diverged(a.name)]
        if diverged:
            notes.append(f"Diverged: {', '.join(diverged)}.")
        if self.held_out:
            mean = stats.fmean(h.accuracy for h in self.histories(self.baseline) if h.rows)
            notes.append(
                f"Accuracies are of {self.held_out} held-out images, which leaves them uncertain by "
                f"{binomial_error(mean, self.held_out):.2f} points."
            )
        return [*notes, *self.beware()]

    def beware(self) -> list[str]:
        """Return sentences that must stand beside these accuracies."""
        runs = [h for c in self.cells for h in c["arms"].values()]
        base = self.histories(self.baseline)
        steps = {} if self.task.preset == "smoke" else {"steps": min(h.steps for h in runs)}
        share, classes = (max(getattr(h, name) for h in base) for name in ("majority", "classes"))
        found = caveats(**steps, held_out=self.held_out, majority=share, classes=classes or 1)
        return [*found, *(self._no_better(share) if share else [])]

    def _no_better(self, share):
        notes = []
        for arm in self.arms:
            best = max((h.accuracy for h in self.histories(arm.name) if h.rows), default=0)
            if best <= share:
                notes.append(f"{arm.name} is no better than always naming the largest class ({share:.0f} %).")
        return notes


def _number(value):
    return math.nan if value is None else value


def _is_bound(ratio):
    """Whether a `Ratio` or `Verdict` is "at most" or "at least"."""
    return ratio.kind.startswith("at ")
