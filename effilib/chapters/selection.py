"""Chapter 10's pilots: who applies, what an arm may do with the time that it saves, and which methods are
worth combining.
"""

import math
import statistics as stats
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import pandas as pd

from effilib.chapters import records as recorded
from effilib.chapters.attempts import attempted, refused
from effilib.chapters.contenders import (
    DENSE,
    FP32,
    PRUNED,
    RESIZED,
    STEM,
    baseline,
    clash,
    combined,
    join,
    length,
    lengthened,
)
from effilib.errors import choose
from effilib.experiment import PILOT_SEEDS, measure
from effilib.statistics import time_to_target
from effilib.tasks import Task
from effilib.training import History

PRESCRIBED = (
    RESIZED,
    STEM,
    PRUNED,
)  # tried together whatever the selection finds; bf16 is in every arm where the machine has it
PILOTS = {"smoke": 1, "quick": 1, "study": 2, "full": 2}  # seeds of the selection
ROUNDS = {"smoke": 1, "quick": 3, "study": 3, "full": 4}  # how many methods a combination may have
OVERHEAD = 1.25  # evaluations, warm-up and counting are off the clock, but take time
SLOW = 1.5  # times the baseline's time: such an arm gets one seed and no interval
HELPLESS = 1.1  # times the baseline's time to the target: such an arm is not tried in combinations
SHARES = (
    0.9,
    0.8,
    0.7,
)  # of the baseline's time: up to these, in turn, an arm that is cheap but less accurate may train for longer
TIGHT = 0.95  # an arm that fills so much of a share already is not lengthened to fill it


class Score(NamedTuple):
    """How an arm did in the pilots, smaller is better: seeds that missed, whether it is less accurate than
    the margin allows, time.
    """

    missed: int
    less: bool
    time: float  # to the target, relative to the baseline's; where it was missed, that of the whole run


def score(base, runs, target, margin):
    """The `Score` of some runs against the baseline's with the same seeds."""
    pairs = list(zip(base, runs, strict=True))
    reached = [time_to_target(h.rows, target) for h in runs]
    less = stats.mean(h.accuracy - b.accuracy for b, h in pairs) < -margin
    times = [
        (h.seconds if t is None else t) / max(time_to_target(b.rows, target) or b.seconds, 1e-9)
        for t, (b, h) in zip(reached, pairs, strict=True)
    ]
    return Score(reached.count(None), less, stats.mean(times))


def trained(task, arms, seeds, spent, title):
    """The blocks of some runs; what they took, in seconds, goes to the list `spent`: it is the same when they
    come from the cache.
    """
    blocks = measure(task, [a if a.role == "baseline" else attempted(a) for a in arms], seeds, title=title)
    spent += [OVERHEAD * h.raw_seconds for b in blocks for h in b["arms"].values()]
    return blocks


def fill(task, arms, seeds, base, runs, spent):
    """Spend what an arm saves on more epochs, where it is less accurate than the baseline: dict name -> (arm,
    runs), of those that gain.

    base: the baseline's runs; runs: name -> the arm's with the same seeds. It is tried in the `SHARES` of the
    baseline's time, the largest first, for as long as it holds the target at equal accuracy; kept is the
    shortest length with which it does."""
    kept, short = {}, {}  # short: name -> (arm, its share of the baseline's time)

    def good(found):
        s = score(base, found, task.target, task.margin)
        return not s.missed and not s.less

    for arm in arms:
        own = runs[arm.name]
        if not good(own) and not any(refused(h) or h.diverged for h in own):
            short[arm.name] = arm, stats.mean(h.seconds / b.seconds for b, h in zip(base, own, strict=True))
    for share in SHARES:
        longer = [lengthened(task, arm, share / time) for arm, time in short.values() if time < TIGHT * share]
        if longer:
            blocks = trained(task, longer, seeds, spent, title=f"longer, in {share:g} of the time")
            found = {a.name: (a, [b["arms"][a.name] for b in blocks]) for a in longer}
            gained = {n: (a, own) for n, (a, own) in found.items() if good(own)}
            kept |= gained
            short = {n: s for n, s in short.items() if n not in found or n in gained}
    return kept


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What the screening showed. slow: name -> why it gets one seed. factors: name -> times the baseline's
    time. refused: name -> why.

    Contenders that gain by more epochs have them here, and histories are of that length.
    """

    task: Task
    contenders: tuple
    baseline: History
    histories: dict
    slow: dict
    factors: dict
    refused: dict
    seconds: float

    @property
    def missed(self):
        """Names of those that missed the target, and how far below the baseline they ended, in points; the
        furthest first.
        """
        runs = {n: h for n, h in self.histories.items() if time_to_target(h.rows, self.task.target) is None}
        return dict(
            sorted(
                ((n, h.accuracy - self.baseline.accuracy) for n, h in runs.items()), key=lambda item: item[1]
            )
        )

    def find(self, name):
        """The contender of this name."""
        return next(
            c for c in self.contenders if c.name == choose("arm", name, [c.name for c in self.contenders])
        )

    @property
    def candidates(self):
        """Names of those that are tried in combinations: one training, not slow, and alone neither without
        the target nor `HELPLESS`.
        """
        found = []
        for name, history in self.histories.items():
            s = score([self.baseline], [history], self.task.target, self.task.margin)
            if (
                not self.find(name).arm.fit
                and name not in (FP32, *self.slow)
                and not s.missed
                and s.time <= HELPLESS
            ):
                found.append(name)
        return found


def screen(task, contenders, records):
    """Train every contender once with a pilot seed, but those that their own chapter found slow on this
    machine.
    """
    factors = {
        c.name: recorded.slowdown(records.get(c.stem, [None])[0], SLOW, task.device)
        for c in contenders
        if c.arm
    }
    slow = {n: f"{f:.1f}x slower in its own chapter" for n, f in factors.items() if f > 1}
    todo = [c for c in contenders if c.arm and c.name not in slow]
    seed, spent = list(PILOT_SEEDS[:1]), []
    (block,) = trained(task, [baseline(), *(c.arm for c in todo)], seed, spent, title="screening")
    base, histories = block["arms"][DENSE], {c.name: block["arms"][c.name] for c in todo}
    could = [c.arm for c in todo if c.stretches]
    longer = fill(task, could, seed, [base], {n: [h] for n, h in histories.items()}, spent)
    no = {c.name: c.why for c in contenders if not c.arm} | {
        n: refused(h) for n, h in histories.items() if refused(h)
    }
    histories = {n: h for n, h in histories.items() if n not in no}
    histories |= {n: h for n, (_, (h,)) in longer.items()}
    for n, h in histories.items():
        factors[n] = h.seconds / base.seconds
        if factors[n] > SLOW:
            slow[n] = f"{factors[n]:.1f}x the baseline's time in the pilot"
    who = tuple(replace(c, arm=longer[c.name][0]) if c.name in longer else c for c in contenders)
    return Trial(
        task=task,
        contenders=who,
        baseline=base,
        histories=histories,
        slow=slow,
        factors=factors,
        refused=no,
        seconds=sum(spent),
    )


def screen_table(trial):
    """What the one pilot run of each contender says of it."""
    rows, candidates = {}, trial.candidates
    for c in trial.contenders:
        h, row = trial.histories.get(c.name), {"epochs": "", "time": "", "accuracy, points": "", "target": ""}
        if h:
            reached = time_to_target(h.rows, trial.task.target) is not None
            row = {
                "epochs": f"{length(trial.task, c.arm):.2f}x",
                "time": f"{h.seconds / trial.baseline.seconds:.2f}",
                "accuracy, points": f"{h.accuracy - trial.baseline.accuracy:+.2f}",
                "target": "reached" if reached else "diverged" if h.diverged else "missed",
            }
        note = (
            f"does not apply: {trial.refused[c.name]}"
            if c.name in trial.refused
            else trial.slow.get(c.name, "")
        )
        rows[c.name] = row | {"note": note or ("is tried in combinations" if c.name in candidates else "")}
    return pd.DataFrame(rows).T.rename_axis("arm")


def forward(names, measured, clash=lambda a, b: "", rounds=3):
    """Greedy forward selection: (what was chosen, dict combination -> score of all that was tried). Smaller
    scores are better.

    measured: list of combinations (tuples of names; () is the baseline) -> dict combination -> score: a round
    is measured as one. Each round adds the name that improves most; the first in which none improves is the
    last."""
    chosen, tried = (), dict(measured([()]))
    for _ in range(rounds):
        todo = [(*chosen, n) for n in names if n not in chosen and not any(clash(n, c) for c in chosen)]
        if not todo:
            break
        found = measured(todo)
        tried |= found
        winner = min(found, key=found.get)
        if not found[winner] < tried[chosen]:
            break
        chosen = winner
    return chosen, tried


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What was chosen, and all that was tried. histories: of the first pilot seed. refused: what does not
    apply although its parts do.

    arms: combination -> its arm, where it gains by more epochs than its parts have together.
    """

    chosen: tuple
    prescribed: tuple
    tried: dict  # combination -> Score
    histories: dict
    refused: dict
    seconds: float
    arms: dict = field(default_factory=dict)

    @property
    def combinations(self):
        """What is to be measured: the chosen combination and the prescribed one, once if they are the
        same.
        """
        return list(dict.fromkeys(c for c in (self.chosen, self.prescribed) if c))

    def arm(self, trial, combination):
        """The arm of a combination, in the length that was chosen."""
        return self.arms.get(combination) or combined(trial.task, [trial.find(n) for n in combination])


def select(trial):
    """Choose a combination by forward selection over the pilot seeds, and try the prescribed one as far as
    its parts apply.
    """
    task, seeds = trial.task, list(PILOT_SEEDS[: PILOTS[trial.task.preset]])
    known, histories, no, arms, spent = {(): Score(0, False, 1.0)}, {}, {}, {}, []

    def note(c, base, runs):
        known[c], histories[c], why = score(base, runs, task.target, task.margin), runs[0], refused(runs[0])
        if why:
            known[c], no[c] = Score(len(seeds) + 1, True, math.inf), why

    def measured(combinations):
        todo = [c for c in combinations if c not in known]
        if todo:
            parts = {join(c): combined(task, [trial.find(n) for n in c]) for c in todo}
            blocks = trained(
                task, [baseline(), *parts.values()], seeds, spent, title=f"selection, {len(todo[0])} at once"
            )
            runs = {name: [b["arms"][name] for b in blocks] for name in (DENSE, *parts)}
            could = [parts[join(c)] for c in todo if all(trial.find(n).stretches for n in c)]
            longer = fill(task, could, seeds, runs[DENSE], runs, spent)
            for c in todo:
                if join(c) in longer:
                    arms[c], runs[join(c)] = longer[join(c)]
                note(c, runs[DENSE], runs[join(c)])
        return {c: known[c] for c in combinations}

    if len(seeds) == 1:  # the screening was the first round
        for n in trial.candidates:
            note((n,), [trial.baseline], [trial.histories[n]])
    chosen, _ = forward(
        trial.candidates, measured, lambda a, b: clash(trial.find(a), trial.find(b)), ROUNDS[task.preset]
    )
    prescribed = tuple(n for n in PRESCRIBED if n in trial.histories)
    prescribed = next((c for c in known if set(c) == set(prescribed)), prescribed)  # in whatever order
    measured([prescribed])
    prescribed = () if prescribed in no else prescribed
    return Selection(
        chosen=chosen,
        prescribed=prescribed,
        tried=known,
        histories=histories,
        refused=no,
        seconds=sum(spent),
        arms=arms,
    )


def table(trial, picked):
    """Every combination that was tried, in order, how it did, and the time that its parts would have if
    theirs multiplied.
    """
    rows = {}
    for c, s in picked.tried.items():
        marks = [
            m
            for m, which in (("chosen", picked.chosen), ("prescribed", picked.prescribed))
            if c and c == which
        ]
        alone = [picked.tried[n,].time for n in c if (n,) in picked.tried]
        row = {"epochs": f"{length(trial.task, picked.arm(trial, c)):.2f}x" if c else "1.00x"}
        row |= {
            "target": "missed" if s.missed else "reached",
            "equal accuracy": "no" if s.less else "yes",
            "time": f"{s.time:.2f}",
        }
        row["if times multiplied"] = f"{math.prod(alone):.2f}" if len(alone) == len(c) > 1 else ""
        if c in picked.refused:
            row, marks = dict.fromkeys(row, ""), [f"does not apply: {picked.refused[c]}"]
        rows[join(c)] = row | {"": ", ".join(marks)}
    return pd.DataFrame(rows).T.rename_axis("combination")


def say(picked):
    """What was chosen, in a sentence."""
    if not picked.chosen:
        return "In the pilots nothing was faster than the baseline at equal accuracy, so that only the prescribed combination is measured."
    return f"Chosen in the pilots: {join(picked.chosen)}, {picked.tried[picked.chosen].time:.2f} of the baseline's time to the target."


# By hand


def toy():
    """Greedy selection on made-up times: what each round tries, and why it ends."""
    times = {
        (): 1.0,
        ("a",): 0.7,
        ("b",): 0.8,
        ("c",): 0.9,
        ("a", "b"): 0.6,
        ("a", "c"): 0.75,
        ("a", "b", "c"): 0.65,
    }
    chosen, tried = forward("abc", lambda todo: {c: times[c] for c in todo})
    rows = {
        join(c): {"round": str(len(c)), "time": f"{t:g}", "": "chosen" if c == chosen else ""}
        for c, t in tried.items()
    }
    return pd.DataFrame(rows).T.rename_axis("made up")
