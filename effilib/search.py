"""Search which methods, and which combination, save time on a task: successive halving, then greedily.

All contenders are trained at a short length, the better half at a longer one, each beside the baseline with
the same seeds; then the best one takes in the next best, as long as they go together and gain. What a search
finds is measured afterwards, with other seeds: it was chosen for its luck, too.
"""

from __future__ import annotations

import itertools
import math
import statistics as stats
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from effilib import networks
from effilib.errors import BadInput, NoEffect
from effilib.experiment import Arm, Contender, measure
from effilib.history import History
from effilib.progress import say_seconds
from effilib.statistics import FLAT
from effilib.tasks import Task

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Found",
    "applicable",
    "clash",
    "combined",
    "few",
    "gain",
    "leave_one_out",
    "search",
    "why_not",
]

BASELINE = Arm(name="baseline", role="baseline")
TRIED = 2  # epochs by which it is seen whether an arm can be trained
SEED = 3000  # of the first cell: never measured, as those of tuning and of pilots


def clash(a: Contender, b: Contender, task: Task) -> str:
    """Return why two contenders cannot be combined, "" if they can.

    >>> from effilib.chapters.comparison import CONTENDERS
    >>> by_name = {c.name: c for c in CONTENDERS}
    >>> clash(by_name["whitening stem"], by_name["wavelet stem"], task("smoke", "synthetic"))
    'whitening stem and wavelet stem both change the stem'
    """
    several = [c.name for c in (a, b) if c.make(task).fit]
    both = [m for m in a.modifies if m in b.modifies]
    if several:
        return f"{several[0]} is more than one training"
    return f"{a.name} and {b.name} both change {' and '.join(both)}" if both else ""


def combined(task: Task, parts: Sequence[Contender]) -> Arm:
    """Return one arm of several contenders. Raises `BadInput` where two of them cannot be combined.

    >>> from effilib.chapters.comparison import CONTENDERS
    >>> parts = [c for c in CONTENDERS if c.name in ("data pruning", "wavelet stem")]
    >>> arm = combined(task("smoke", "synthetic"), parts)
    >>> arm.name, [type(m).__name__ for m in arm.methods]
    ('data pruning + wavelet stem', ['WaveletStem', 'DataPruning'])
    """
    why = next((w for a, b in itertools.combinations(parts, 2) if (w := clash(a, b, task))), "")
    if why:
        raise BadInput(f"no combination: {why}")
    if len(parts) == 1:
        return parts[0].arm(task)
    made = [c.make(task) for c in sorted(parts, key=lambda c: c.order)]
    changes = {k: v for a in made for k, v in a.changes.items()}
    network = {k: v for a in made for k, v in a.network.items()}
    methods = tuple(m for a in made for m in a.methods)
    return Arm(name=" + ".join(c.name for c in parts), methods=methods, changes=changes, network=network)


def leave_one_out(task: Task, parts: Sequence[Contender]) -> list[Arm]:
    """Return a combination's arms without one of its parts each; of two parts, none: those are arms already.

    >>> leave_one_out(task("smoke", "synthetic"), [])
    []
    """
    if len(parts) < 3:
        return []
    rests = [(left, [c for c in parts if c is not left]) for left in parts]
    return [replace(combined(task, rest), name=f"without {left.name}") for left, rest in rests]


def few(task: Task) -> Task:
    """Return the task for two epochs of a few images, at most.

    >>> few(task("quick", "mnist5k")).images
    512
    """
    images = min(8 * task.recipe.batch_size, task.images or math.inf)
    epochs = min(TRIED, task.recipe.epochs)
    return task.but(images=images, epochs=epochs, validation=50, axis="epochs", tuned={})


def why_not(task: Task, arm: Arm, most: float = math.inf) -> str:
    """Return why an arm cannot be trained, "" if it can: by two epochs of a few images.

    most: seconds a step that it may take. A method that does not apply says so by `BadInput` or `NoEffect`;
    any other error is a fault of ours and is raised, unless the network is a user's, whose code may raise
    anything.

    >>> from effilib.methods.stochastic_pooling import StochasticPooling
    >>> why_not(task("smoke", "synthetic"), Arm(name="pooling", methods=(StochasticPooling(),)))
    "stochastic pooling: ResNet has no nn.MaxPool2d layer (...)"
    """
    short = few(task)
    try:
        history = arm.run(short, short.load(), seed=0)
    except (BadInput, NoEffect) as error:
        return str(error)
    except Exception as error:
        if task.network in networks.NETWORKS:
            raise
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    often = [k["seconds"] for k in history.kinds.values() if 2 * k["count"] >= history.steps]  # no set-up
    if (step := sum(often) / history.steps) > most:
        times = [f"{1e3 * seconds:.3g} ms" for seconds in (step, most)]
        return f"a step takes {times[0]}, and more than {times[1]} no accuracy would make up for"
    return ""


def applicable(
    task: Task, contenders: Sequence[Contender], most: float = math.inf
) -> tuple[list[Contender], dict[str, str]]:
    """Return (who can take part, left out: name -> why). most: see `why_not`.

    >>> def refuses(task):
    ...     raise BadInput("not here")
    >>> applicable(task("smoke", "synthetic"), [Contender("odd", "", (), refuses)])
    ([], {'odd': 'not here'})
    """
    able, left_out = [], {}
    for c in contenders:
        try:
            why = why_not(task, c.arm(task), most)
        except (BadInput, NoEffect) as error:
            why = str(error)
        if why:
            left_out[c.name] = why
        else:
            able.append(c)
    return able, left_out


def gain(baseline: Sequence[History], arm: Sequence[History], slope: float) -> float:
    """Return the log speed-up at equal accuracy, by paired runs.

    slope: points that the baseline gains with e times the time, by which accuracy is turned into time.

    >>> base, arm = History(seconds=2.0, steps=1, final=80.0), History(seconds=1.0, steps=1, final=78.0)
    >>> round(gain([base], [arm], slope=4.0), 2)  # log 2 - 2 / 4
    0.19
    """
    if any(h.diverged for h in (*baseline, *arm)):
        return -math.inf
    return stats.fmean(
        math.log(b.seconds / a.seconds) + (a.accuracy - b.accuracy) / slope
        for b, a in zip(baseline, arm, strict=True)
    )


@dataclass(kw_only=True)
class Found:
    """What a search found: the parts of the best arm, those that gain by themselves, all trials, their cost.

    rows: a trial each: stage, arm, against, length, seeds, "x" (speed-up at equal accuracy, by the slope),
    points, seconds (of its trainings), verdict.

    >>> Found().best(task("smoke", "synthetic")).name
    'baseline'
    """

    parts: list[Contender] = field(default_factory=list)
    second: list[Contender] = field(default_factory=list)  # of the second round, the best first
    gainers: list[Contender] = field(default_factory=list)  # those of them that gain
    left_out: dict[str, str] = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)
    slope: float = math.nan  # points that the baseline gains with e times the time

    @property
    def seconds(self) -> float:
        """Seconds of all trainings of the search."""
        return math.fsum(row["seconds"] for row in self.rows)

    def best(self, task: Task) -> Arm:
        """Return the best arm: a combination, a single method, or the baseline."""
        return combined(task, self.parts) if self.parts else BASELINE

    def table(self) -> pd.DataFrame:
        """Return the trials, one row each."""
        import pandas as pd  # no training depends on a table

        columns = ["stage", "arm", "against", "length", "seeds", "x", "points", "seconds", "verdict"]
        return pd.DataFrame(self.rows, columns=columns).set_index("arm")


def search(
    task: Task,
    contenders: Sequence[Contender],
    *,
    lengths: tuple[float, float] = (0.25, 0.5),
    seeds: int = 2,
    keep: float = 0.5,
    most: int = 3,
    report: Callable[[str], object] = print,
) -> Found:
    """Search for the best contenders and their best combination.

    lengths: of the two rounds. seeds: paired ones, a round. keep: share of the contenders that the second
    round sees. most: additions that are tried. Cells are cached: interrupted, a search goes on.

    >>> narrow = Arm(name="", network={"widths": (4, 4, 4)})
    >>> contenders = [Contender("narrow", "", (), lambda task: narrow)]
    >>> found = search(task("smoke", "synthetic"), contenders, seeds=1)
    screening: 1 of 3, ...
    ...
    >>> [row["stage"] for row in found.rows]
    ['length 0.25', 'baseline', 'length 0.5']
    """
    found, (short, longer) = Found(), lengths
    by_name = {c.name: c for c in contenders}

    def trial(stage, first, others, length, against, n):
        """Gains of arms over the first, paired; a row each."""
        arms = [replace(first, role="baseline"), *(replace(a, role="method") for a in others)]
        own = task.but(lengths=(length,), seeds=seeds)
        lasts = {a.name: (longer if a.name == LONGER else length,) for a in arms}
        cells = measure(own, arms, lengths=lasts, title=stage, first_seed=SEED + n)
        runs = {a.name: [c["arms"][a.name] for c in cells] for a in arms}
        if LONGER in runs:
            found.slope = slope(runs[first.name], runs[LONGER])
        gains = {}
        for a in others:
            mine = runs[a.name]
            g = gain(runs[first.name], mine, found.slope)
            points = stats.fmean(x.accuracy - b.accuracy for x, b in zip(mine, runs[first.name], strict=True))
            spent = math.fsum(h.raw_seconds for h in mine)
            row = dict(arm=a.name, against=against, length=lasts[a.name][0], seeds=seeds, points=points)
            row |= {"stage": f"length {length:g}" if against == BASELINE.name else "combination"}
            if a.name == LONGER:
                row |= {"stage": "baseline", "verdict": f"{found.slope:.1f} points with e times the time"}
            else:
                gains[a.name] = g
            found.rows.append({"x": math.exp(g), "seconds": spent, "verdict": "", **row})
        return gains

    def long_enough(arms, length):
        """Those that can be trained at a length; what is too short for the others is noted."""
        if length * task.recipe.epochs >= TRIED:
            return arms
        whys = {a.name: why_not(task.at(length), a) for a in arms}
        found.left_out.update((f"{n}, at length {length:g}", why) for n, why in whys.items() if why)
        return [a for a in arms if not whys[a.name]]

    arms = [c.arm(task) for c in contenders]
    ready = long_enough(arms, short)
    first = trial("screening", BASELINE, [*ready, replace(BASELINE, name=LONGER)], short, BASELINE.name, 0)
    ranked = sorted(first, key=lambda name: -first[name])
    kept = ranked[: max(1, math.ceil(keep * len(ranked)))]
    _note(found, f"length {short:g}", {n: "goes on" if n in kept else "left behind" for n in ranked})
    report(_cost(found, f"{len(ranked)} contenders at length {short:g}, {len(kept)} go on"))
    kept += [a.name for a in arms if a not in ready]
    later = long_enough([by_name[n].arm(task) for n in kept], longer)
    if not later:
        return found
    second = trial("second round", BASELINE, later, longer, BASELINE.name, 1000)
    ranked = sorted(second, key=lambda name: -second[name])
    found.second = [by_name[n] for n in ranked]
    found.gainers = [by_name[n] for n in ranked if second[n] > 0]
    _note(found, f"length {longer:g}", {n: "gains" if second[n] > 0 else "does not gain" for n in ranked})
    report(_cost(found, f"{len(later)} at length {longer:g}, {len(found.gainers)} gain"))
    found.parts, tried = found.gainers[:1], 0
    for c in found.gainers[1:]:
        why = next((w for p in found.parts if (w := clash(p, c, task))), "")
        current = found.best(task)
        arm = None if why else combined(task, [*found.parts, c])
        why = why or why_not(task, arm)
        if why:
            found.left_out[f"{current.name} + {c.name}"] = why
        elif tried < most:
            tried += 1
            gained = trial("combination", current, [arm], longer, current.name, 1000 + 100 * tried)[arm.name]
            _note(found, "combination", {arm.name: "taken in" if gained > 0 else "gains nothing more"})
            if gained > 0:
                found.parts = [*found.parts, c]
    report(_cost(found, f"best: {found.best(task).name}"))
    return found


LONGER = "baseline, longer"


def slope(short: Sequence[History], longer: Sequence[History]) -> float:
    """Points that the baseline gains with e times the time, at least those of a flat curve."""
    gained = stats.fmean(b.accuracy - a.accuracy for a, b in zip(short, longer, strict=True))
    folds = stats.fmean(math.log(b.seconds / a.seconds) for a, b in zip(short, longer, strict=True))
    return max(gained / folds if folds > 0 else 0.0, FLAT)


def _note(found, stage, verdicts):
    for row in found.rows:
        if row["stage"] == stage and row["arm"] in verdicts:
            row["verdict"] = verdicts[row["arm"]]


def _cost(found, what):
    return f"search: {what}; {len(found.rows)} trials so far, {say_seconds(found.seconds)} of training"
