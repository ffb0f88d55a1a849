"""Chapter 10: one protocol for every method, who gets how many seeds, the scoreboard and the Pareto front.

Budget on 2 cores in whole runs of the baseline, b: screening of 18 arms 20 b, and 5 b for what is tried in
more epochs; selection, 3 rounds of the baseline and about 3 arms, some of them longer, 15 b a seed; measured
in the study preset 14 b a seed, in the quick one 2.4 b a seed and every single method once, 18 b; what is
over 1.5x slower once, 15 b. b is about 20 s in the study preset and 2 s in the quick one. What really fits is
found out from the pilots: `plan`."""

import itertools
import math
import random
import statistics as stats
from dataclasses import dataclass, replace

import pandas as pd

from effilib import data, experiment, figures
from effilib.chapters.attempts import attempted, refused
from effilib.chapters.contenders import DENSE, FP32, GIVEN, TREE, baseline, join, length
from effilib.chapters.selection import OVERHEAD, PILOTS, forward
from effilib.experiment import PILOT_SEEDS, compare
from effilib.statistics import judge, paired_ratio
from effilib.tasks import Task
from effilib.training import resolve_precision
from effilib.tuning import swept

MIXED = "mixed precision"
# These epochs are among those of the recorded sweep, so that the baseline of this length is a tuned one too.
SIZES = {"quick": dict(images=2500, epochs=2, evaluations=8), "study": dict(epochs=5, evaluations=10)}
BUDGET = {"quick": 150, "study": 2600}  # seconds for all that is trained here, pilots included
MARGINS = (
    3  # from what the pilots hold down to the target: in so few epochs seeds differ by more than elsewhere
)
AIM = 1.43  # of a combination: what chapter 6.3 claims for resizing alone


def task(book):
    """The one task: the baseline's, in the length that fits, with the recorded sweep's best setting for that
    length.
    """
    base, sizes = book.task, dict(SIZES.get(book.preset, {}))
    if not sizes:
        return base
    if "images" in sizes and base.images:
        sizes["images"] = min(sizes["images"], base.images)
    return base.but(**sizes, **swept(base, sizes["epochs"]), target=None)


def protocol(task, records):
    """What holds for all arms, as a table."""
    r, current = task.recipe, sum(not why for _, why in records.values())
    tuned = "the best of the recorded sweep at this length" if swept(task, r.epochs) else "the task's own"
    seeds = ", ".join(map(str, PILOT_SEEDS[: PILOTS[task.preset]]))
    facts = {
        "task": f"{data.label(task.dataset)}, {task.images or 'all'} training images, {task.network}, {r.epochs:g} epochs",
        "baseline": f"batch {r.batch_size}, learning rate {r.lr:g}, weight decay {r.weight_decay:g}: {tuned}",
        "in every arm": f"{resolve_precision(r.precision, task.device)}, one memory layout, data on the device",
        "target": f"{task.target:g} % validation accuracy, held by two evaluations",
        "equal accuracy": f"a one-sided 95 % bound within {task.margin:g} points of the baseline's",
        "pilots": f"seeds {seeds}: they choose, and are never measured",
        "budget": budget(task.preset),
        "records": f"of {len(records)} chapters, {current} of them current here",
    }
    return pd.DataFrame({"": facts.values()}, index=list(facts))


def budget(preset):
    """The preset's budget, in words."""
    return f"{BUDGET[preset]} s for all that is trained, pilots included" if preset in BUDGET else "no limit"


# Measuring


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which arms are measured with how many seeds. notes: name -> why with one only, and how many epochs
    where these are more.
    """

    task: Task
    judged: tuple
    once: tuple
    seeds: int
    claims: dict
    notes: dict
    table: pd.DataFrame


def plan(book, trial, picked):
    """Give every arm its seeds: the slow ones one, all others as many as were asked for or (where nobody
    asked) fit into the budget.

    Where the task's seeds do not fit, those that missed the target in their pilot have one as well, the least
    accurate first and parts of combinations never; only then all others have fewer. In the presets smoke and
    quick every single method has one seed, an illustration (smoke: but the slow ones), and the combinations
    are judged."""
    task, whole = trial.task, picked.combinations
    singles = [c for c in trial.contenders if c.name not in trial.refused and (c.name,) not in whole]
    once = [c for c in singles if task.preset in ("smoke", "quick") or c.name in trial.slow]
    alone = {c.name: picked.arm(trial, (c.name,)) for c in singles}
    together = [picked.arm(trial, c) for c in whole]
    notes = {c.name: f"one seed: {trial.slow.get(c.name) or f'preset {task.preset}'}" for c in once}
    if task.preset == "smoke":
        notes |= {c.name: "slow: left out of a test" for c in once if c.name in trial.slow}
        once = [c for c in once if c.name not in trial.slow]

    base, spent = OVERHEAD * trial.baseline.raw_seconds, trial.seconds + picked.seconds
    runs = {join(c): h for c, h in picked.histories.items()} | trial.histories

    def account():
        """(arms that are judged, seconds of them a seed, seconds of those with one seed, seeds that fit)."""
        arms = [alone[c.name] for c in singles if c.name not in notes] + together
        each = base + OVERHEAD * sum(runs[a.name].raw_seconds for a in arms)
        left = sum(base * trial.factors[c.name] for c in once) + base * bool(once)
        fitting = (
            max(1, int((BUDGET[task.preset] - spent - left) / each)) if task.preset in BUDGET else task.seeds
        )
        return arms, each, left, task.seeds if book.parameters["seeds"] else min(task.seeds, fitting)

    parts = {n for c in whole for n in c}
    for name, points in trial.missed.items():
        if account()[-1] < task.seeds and name in alone and name not in {*notes, *parts}:
            once.append(trial.find(name))
            notes[name] = f"one seed: missed the target in its pilot, {points:+.1f} points"
    arms, each, left, seeds = account()
    rows = [
        ("pilots, as they took", "", spent),
        (
            f"{len(arms)} arms and the baseline, {seeds} seed{'s' * (seeds > 1)}",
            (len(arms) + 1) * seeds,
            seeds * each,
        ),
        (f"{len(once)} arms and the baseline, one seed", len(once) + bool(once), left),
        ("together", "", spent + seeds * each + left),
    ]
    table = (
        pd.DataFrame(rows, columns=["what", "runs", "seconds"])
        .set_index("what")
        .rename_axis(budget(task.preset))
    )
    table["seconds"] = [f"{s:.0f}" for s in table["seconds"]]
    claims = {join(c): AIM for c in whole}
    for a in (*alone.values(), *together):
        if length(task, a) > 1:
            notes[a.name] = "; ".join(filter(None, [notes.get(a.name), f"{length(task, a):.2f}x the epochs"]))
    return Plan(
        task=task,
        judged=tuple(arms),
        once=tuple(alone[c.name] for c in once),
        seeds=seeds,
        claims=claims,
        notes=notes,
        table=table,
    )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The finished runs: the `Comparison` of what is judged, and (or None) of what has one seed. notes,
    refused: name -> words.
    """

    judged: experiment.Comparison
    once: experiment.Comparison | None
    notes: dict
    refused: dict

    @property
    def task(self):
        """The one task of all arms."""
        return self.judged.task

    @property
    def comparisons(self):
        """Both, or the one that there is."""
        return [c for c in (self.judged, self.once) if c is not None]

    @property
    def names(self):
        """All arms that ran, the baseline first."""
        return list(dict.fromkeys(a.name for c in self.comparisons for a in c.arms))

    def of(self, name):
        """The comparison that an arm belongs to, None if it did not run."""
        return next((c for c in self.comparisons if name in [a.name for a in c.arms]), None)

    def pairs(self, name):
        """(history, the baseline's with the same seed) of every seed of an arm."""
        c = self.of(name)
        return list(zip(c.histories(name), c.histories(c.baseline), strict=True))

    def mixed(self):
        """The baseline's `Verdict` against fp32: what 16-bit products bring, which all arms have. None where
        there is no fp32 arm.
        """
        c = self.of(FP32)
        if c is None:
            return None
        withhold = (
            c.verdict(FP32).verdict
            if c.illustration or self.task.preset == "smoke" or experiment.shared_machine()
            else ""
        )
        return judge(
            c.times(FP32), c.times(DENSE), [-d for d in c.differences(FP32)], margin=c.task.margin, arm=MIXED, against=FP32,
            machine=c.machine["summary"], withhold=withhold,
        )  # fmt: skip


def measured(plan, trial):
    """Run, or take from the cache, what the plan says."""
    judged = compare(
        plan.task, [baseline(), *plan.judged], seeds=plan.seeds, claim=plan.claims, title="measured"
    )
    once, no = None, dict(trial.refused)
    if plan.once:
        arms = [baseline(), *map(attempted, plan.once)]
        found = compare(plan.task, arms, seeds=1, illustration=True, title="one seed")
        no |= {
            a.name: refused(found.histories(a.name)[0]) for a in arms if refused(found.histories(a.name)[0])
        }
        kept = [a for a in arms if a.name not in no]
        blocks = [{**b, "arms": {a.name: b["arms"][a.name] for a in kept}} for b in found.blocks]
        once = replace(found, arms=tuple(kept), blocks=blocks)
    return Measured(judged=judged, once=once, notes=plan.notes, refused=no)


# The scoreboard and the front


def front(points):
    """Indices of the points (time, accuracy) that no other beats, in order of time: none is as fast and as
    accurate, and better in one.
    """
    kept, best = [], None
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if best is None or points[i][1] > best[1] or points[i] == best:
            kept.append(i)
            best = points[i]
    return kept


def ends(result):
    """Where every arm ends: dict name -> (time of the whole run relative to the baseline's with the same
    seed, accuracy), means.
    """
    pairs = {n: result.pairs(n) for n in result.names}
    return {
        n: (stats.mean(h.seconds / b.seconds for h, b in p), stats.mean(h.accuracy for h, _ in p))
        for n, p in pairs.items()
    }


def best(result):
    """Names of the arms on the Pareto front, by time; without what diverged and the student whose teacher's
    time nobody counts.
    """
    found = {
        n: p
        for n, p in ends(result).items()
        if n != GIVEN and not any(h.diverged for h, _ in result.pairs(n))
    }
    return [list(found)[i] for i in front(list(found.values()))]


REMARKS = {GIVEN: "its teacher's time is not counted", TREE: "made for classes that come later: see the text"}


def scoreboard(result, contenders):
    """One row an arm, the fastest to the target first: time, accuracy, FLOPs, memory, front; at the end who
    does not apply.
    """
    chapter, on = {c.name: c.chapter for c in contenders}, best(result)
    rows, ratios = {}, {DENSE: math.inf}
    for c in result.comparisons:
        for name, row in c.table().drop(columns=["claim reproduced", "step ms"]).iterrows():
            if name not in rows:
                note = "; ".join(filter(None, [result.notes.get(name), REMARKS.get(name)]))
                rows[name] = (
                    {"chapter": chapter.get(name, "")}
                    | dict(row)
                    | {"front": "yes" if name in on else "", "note": note}
                )
                ratios.setdefault(name, c.verdict(name).ratio or -1)
    rows = {n: rows[n] for n in sorted(rows, key=ratios.get, reverse=True)}
    mixed = result.mixed()
    if mixed:
        rows[MIXED] = {
            "chapter": "3.2",
            "role": "in all arms",
            "measured": f"{mixed.text}, against fp32",
            "verdict": mixed.verdict,
        }
    rows |= {
        n: {"chapter": chapter.get(n, ""), "note": note} for n, note in result.notes.items() if n not in rows
    }
    rows |= {
        n: {"chapter": chapter.get(n, ""), "note": f"does not apply: {why}"}
        for n, why in result.refused.items()
    }
    table = pd.DataFrame(list(rows.values()), index=pd.Index(list(rows), name="arm")).astype(object)
    return table.where(table.notna(), "–")


def parts_table(result, picked):
    """Does a combination beat its parts? How many times faster it is to the target than each of them."""
    rows, judged = [], [a.name for a in result.judged.arms]
    for c in picked.combinations:
        for part in c if len(c) > 1 else ():
            text = "the part has not these seeds in this preset"
            if part in judged:
                times = [result.judged.times(n) for n in (part, join(c))]
                text = "one of them missed the target"
                if not {None, 0} & {*times[0], *times[1]}:
                    ratio, low, high = paired_ratio(*times)
                    text = f"{ratio:.2f}x" + (f" [{low:.2f}, {high:.2f}]" if len(times[0]) > 1 else "")
            rows.append((join(c), part, text))
    rows = rows or [("none of several methods was measured", "", "")]
    return pd.DataFrame(rows, columns=["combination", "part", "faster than the part"]).set_index(
        ["combination", "part"]
    )


def curve(result, name):
    """(times relative to the baseline's whole run, accuracies): medians over the seeds, evaluation by
    evaluation.
    """
    pairs = result.pairs(name)
    n = min(len(h.rows) for h, _ in pairs)
    x = [stats.median(h.rows[i]["seconds"] / b.seconds for h, b in pairs) for i in range(n)]
    return x, [stats.median(h.rows[i]["accuracy"] for h, _ in pairs) for i in range(n)]


def picture(result):
    """(figure, caption): accuracy over time, relative to the baseline's whole run; right where the arms end,
    and the Pareto front.
    """
    end, on = ends(result), best(result)
    names = sorted(end, key=lambda n: (n not in on, end[n]))
    loud = [n for n in on if n != DENSE]
    colour = {n: figures.COLOURS[i % 6] for i, n in enumerate(loud)} | {
        DENSE: "black"
    }  # the seventh is black
    figure, (left, right) = figures.new(2, width=11.5, height=5.2)
    marks = {}
    for i, name in reversed(list(enumerate(names, 1))):  # the front on top
        tint = colour.get(name, "#B5B5B5")
        left.plot(*curve(result, name), color=tint, lw=2.2 if name in colour else 0.9)
        shape = "o" if name in on else "^" if name == GIVEN else "s"
        (marks[f"{i}  {name}"],) = right.plot(
            *end[name], shape, ls="none", color=tint, ms=8 if name in on else 5
        )
        right.annotate(str(i), end[name], xytext=(5, 3), textcoords="offset points", fontsize=8)
    low, top = min(y for _, y in end.values()), max(y for _, y in end.values())
    low = max(
        low, top - 4 * max(2.0, top - end[DENSE][1], *(top - end[n][1] for n in on))
    )  # what fell far behind is named instead
    far = 1.1 * max(x for x, _ in end.values())
    right.step(
        [end[n][0] for n in on] + [far],
        [end[n][1] for n in [*on, on[-1]]],
        where="post",
        color="black",
        lw=1,
        ls=":",
    )
    left.axhline(result.task.target, color="black", lw=0.8, ls="--")
    left.set_xlim(0, min(far, 1.7))
    for axes in (left, right):
        axes.set_ylim(low - 0.06 * (top - low) - 0.2, top + 0.08 * (top - low) + 0.2)
        axes.set_xlabel("time, relative to the baseline's whole run")
    left.set_ylabel("validation accuracy (%)")
    left.set_title(f"on the way (target {result.task.target:g} %, dashed)")
    right.set_xscale("log")
    first = 0.9 * min(x for x, _ in end.values())
    right.set_xlim(first, far)
    figures.plain_log(
        right.xaxis,
        values=[v for v in (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 8, 12) if first <= v <= far],
    )
    right.set_title("where the arms end, and the front (dotted; log scale)")
    figure.legend([*marks.values()][::-1], [*marks][::-1], loc="outside right center", fontsize=8)
    seconds = stats.median(h.seconds for h in result.judged.histories(DENSE))
    below = [f"{n} ({y:.1f} %)" for n, (_, y) in end.items() if y < low]
    return figure, (
        f"Up and to the left is better. 1 is the baseline's whole run with the same seed, {seconds:.3g} s. Circles are on the Pareto "
        f"front: no other arm is as fast and as accurate, and better in one of both. Lines are medians, marks means, of {seeds(result)}. "
        + (f"Below the picture: {', '.join(below)}." if below else "")
    )


def seeds(result):
    """How many seeds the arms have, in words."""
    n = len(result.judged.blocks)
    text = f"{n} seed{'s' * (n > 1)}"
    return (
        text
        if result.once is None
        else f"{text}, one for {len(result.once.arms) - 1} of the {len(result.names)} arms"
    )


def say_front(result):
    """The front in a sentence."""
    end = ends(result)
    return (
        "Pareto front (time, accuracy): "
        + "; ".join(f"{n} ({end[n][0]:.2f}, {end[n][1]:.2f} %)" for n in best(result))
        + "."
    )


def headline(picked):
    """The arm whose verdict stands for the chapter."""
    return join(picked.chosen or picked.prescribed)


# By hand


def toy():
    """Five arms whose front can be seen by eye: which others beat each."""
    points = {"a": (0.6, 70), "b": (0.8, 75), "c": (0.9, 74), "d": (1.0, 80), "e": (1.3, 80)}
    on = [list(points)[i] for i in front(list(points.values()))]
    rows = {}
    for n, (x, y) in points.items():
        beaten = [m for m, (u, v) in points.items() if u <= x and v >= y and (u, v) != (x, y)]
        rows[n] = {
            "time": f"{x:g}",
            "accuracy %": f"{y:g}",
            "beaten by": ", ".join(beaten),
            "on the front": "yes" if n in on else "",
        }
    return pd.DataFrame(rows).T.rename_axis("arm")


def check(cases=200):
    """The front and the selection against trying everything, on made-up numbers: a table of what was
    found.
    """
    g, wrong, worse = random.Random(0), 0, {"add up": 0, "do not add up": 0}
    for _ in range(cases):
        points = [(g.randint(1, 9), g.randint(1, 9)) for _ in range(8)]
        beaten = [any(u <= x and v >= y and (u, v) != (x, y) for u, v in points) for x, y in points]
        wrong += set(front(points)) != {i for i, b in enumerate(beaten) if not b}
        every = [c for k in range(4) for c in itertools.combinations("abcde", k)]
        single = {n: g.gauss(0, 1) for n in "abcde"}
        sums = {c: sum(single[n] for n in c) for c in every}
        for kind, times in (
            ("add up", sums),
            ("do not add up", {c: v + (len(c) > 1) * g.gauss(0, 1) for c, v in sums.items()}),
        ):
            chosen, tried = forward(
                "abcde", lambda todo, times=times: {c: times[tuple(sorted(c))] for c in todo}
            )
            worse[kind] += tried[chosen] > min(times.values()) + 1e-9
    rows = {f"front against asking every pair, {cases} sets: wrong": f"{wrong}"}
    rows |= {
        f"greedy choice, effects that {k}: not the best of all": f"{n} of {cases}" for k, n in worse.items()
    }
    return pd.DataFrame({"result": rows}).rename_axis("what")
