"""Compare arms fairly: paired seeds, interleaved, cached, resumable.

The unit is one seed's block of all arms, run in one process, fresh models, in the order A B B A (more arms:
rotated by seed, reversed every second seed). A block is cached as a whole, so that a cached baseline never
meets a fresh method; an interrupted comparison goes on with the seed that it was at."""

import gc
import os
import statistics as stats
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from effilib import clock, distributed, models, paths, provenance
from effilib.errors import BadInput, choose
from effilib.progress import Progress
from effilib.statistics import SHARED, SMOKE, held, interval, judge, paired_ratio, time_to_target
from effilib.tasks import Task
from effilib.training import History, resolve_layout, resolve_precision, train

CAPPED = 0.05  # share of capped steps over which a seed is run again
PILOT_SEEDS = (2000, 2001)  # never measured
ROLES = ("baseline", "method", "control")
QUANTITIES = ("time to target", "time per step", "training time")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of training: the baseline, a method, or a control that could beat it.

    methods: `Method`s for `train`. changes: of the task or its recipe, e.g. {"epochs": 3}. network: settings
    of the network, e.g. {"widths": (8, 16, 32)}. fit: what is not one `train()` (stages, a teacher and a
    student): (task, seed) -> History.

    >>> half = Arm(name="half the epochs", role="control", changes={"epochs": 1})
    >>> t = task("smoke", "synthetic")
    >>> half.run(t, t.load(), seed=0).steps
    4
    """

    name: str
    role: str = "method"
    methods: tuple = ()
    changes: dict = field(default_factory=dict)
    network: dict = field(default_factory=dict)
    fit: Callable | None = None

    def run(self, task, dataset, seed):
        """Train this arm with one seed."""
        task = task.but(**self.changes)
        if self.fit:
            return self.fit(task, seed)
        model = task.build(dataset, seed, **self.network)
        return train(model, dataset, task.recipe, self.methods, seed, evaluations=task.evaluations)


def shared_machine():
    """Whether other notebooks run at the same time (`effilib run --jobs`): times then mean nothing.

    >>> shared_machine()
    False
    """
    return bool(os.environ.get("EFFILIB_SHARED"))


def order(arms, index):
    """The arms in the order of the block number `index`: A B, B A, B A, A B for two; rotated and reversed for
    more.

    >>> ["".join(order("AB", index)) for index in range(4)]
    ['AB', 'BA', 'BA', 'AB']
    """
    k = index // 2 % len(arms)
    rotated = [*arms[k:], *arms[:k]]
    return rotated[::-1] if index % 2 else rotated


def key(task, dataset, arms):
    """Under what a block is cached: all that the result depends on, but the seed.

    >>> t, arms = task("smoke", "synthetic"), [Arm(name="baseline", role="baseline")]
    >>> key(t, t.load(), arms) == key(t.but(seeds=9), t.load(), arms) != key(t.but(lr=0.2), t.load(), arms)
    True
    """
    return provenance.digest(
        provenance.settings(
            replace(task, seeds=0, target=None, margin=0.0)
        ),  # judged later, never trained with
        provenance.settings(list(arms)),
        provenance.source(list(arms)),
        [_network_source(task.but(**a.changes).network) for a in arms],
        dataset.digest,
        resolve_precision(task.recipe.precision, dataset.device),
        resolve_layout(task.recipe, dataset.device),
        {k: clock.machine(dataset.device)[k] for k in ("device", "threads", "torch")},
    )


def _network_source(network):
    """What stands behind a user's network: it can change under the same name."""
    place = network.rpartition(":")[0]
    if place.endswith(".py"):
        return provenance.normalized(Path(place).expanduser().read_text(encoding="utf-8"))
    return provenance.source(models.find(network)) if place else ""


def measure(task, arms, seeds, *, title="runs"):
    """Run every arm with every seed, or take it from the cache: list of blocks {"seed", "arms": {name:
    History}, ...}.

    >>> block = measure(task("smoke", "synthetic"), [Arm(name="baseline", role="baseline")], seeds=[3])[0]
    runs: 1 of 1, ...: seed 3, baseline: ...
    >>> block["seed"], block["arms"]["baseline"].steps
    (3, 8)
    """
    dataset = task.load()
    folder = paths.make(paths.cache() / key(task, dataset, arms))
    blocks = {s: _read(folder / f"seed-{s}.json", arms) for s in seeds}
    missing = [s for s in seeds if not blocks[s]]
    progress = Progress(title, len(missing) * len(arms)) if missing else None
    if missing:
        _burn_in(task, dataset, arms)
        gc.collect()
        gc.freeze()  # what is there by now need not be gone through between runs, nor within a step
    try:
        for s in missing:
            blocks[s] = _run_block(task, dataset, order(list(arms), seeds.index(s)), s, progress)
            if not shared_machine():
                paths.write(
                    folder / f"seed-{s}.json",
                    {**blocks[s], "arms": {n: asdict(h) for n, h in blocks[s]["arms"].items()}},
                )
    finally:
        gc.unfreeze()
    return [blocks[s] for s in seeds]


def _run_block(task, dataset, arms, seed, progress, attempts=3):
    for attempt in range(1, attempts + 1):
        load, histories = clock.machine(dataset.device)["load"], {}
        for arm in arms:
            gc.collect()
            if dataset.device.type == "cuda":
                torch.cuda.empty_cache()
            history = histories[arm.name] = arm.run(task, dataset, seed)
            what = f"{history.accuracy:.2f} %, {history.seconds:.1f} s" + (
                ", diverged" if history.diverged else ""
            )
            progress.done(f"seed {seed}, {arm.name}: {what}", count=attempt == 1)
        if all(h.capped <= CAPPED * max(1, h.timed) for h in histories.values()):
            break
    return {
        "seed": seed,
        "arms": histories,
        "attempts": attempt,
        "load": load,
        "date": clock.date(),
        "machine": clock.machine(dataset.device),
    }


def _burn_in(task, dataset, arms):
    """A few throw-away steps of the first arm: what a process does only once is paid before anything is
    timed.
    """
    few = replace(
        dataset,
        train=dataset.train[: 8 * task.recipe.batch_size],
        validation=dataset.validation[:8],
        test=dataset.test[:8],
    )
    if len(few.train) >= task.recipe.batch_size and not arms[0].fit:
        train(
            task.build(few, **arms[0].network),
            few,
            replace(task.but(**arms[0].changes).recipe, epochs=1),
            evaluations=1,
        )


def _read(file, arms):
    saved = paths.read_json(file)
    try:
        histories = {n: History(**h) for n, h in saved["arms"].items()}
        return (
            {**saved, "arms": histories, "cached": saved["date"]}
            if set(histories) == {a.name for a in arms}
            else None
        )
    except (TypeError, KeyError, AttributeError):  # not there, or not what is written here: measured again
        return None


def pilot(task, margins=2):
    """The task with its target; where none was tuned, from a pilot of the baseline: what two seeds hold, less
    so many margins.

    Two seeds know little of the spread, and a target that one of the baseline's five misses decides nothing.
    The pilot's seeds are never measured, and it runs before any method does.

    >>> pilot(task("quick", "mnist5k")).target  # tuned: there is nothing to do
    96.0
    """
    if task.target is not None:
        return task
    blocks = measure(
        task, [Arm(name="pilot", role="baseline")], list(PILOT_SEEDS), title="pilot for the target"
    )
    accuracy = min(held(b["arms"]["pilot"].rows) for b in blocks)
    return replace(task, target=round(accuracy - margins * task.margin, 1))


def compare(
    task, arms, *, seeds=None, quantity="time to target", claim=None, illustration=False, title="runs"
):
    """Run the arms (the first is the baseline) and return the `Comparison`.

    seeds: how many pairs (default: the task's). quantity: what is judged, "time to target", "time per step",
    or "training time": of the whole run, for methods that end with less accuracy or less work in the same
    number of epochs. claim: the speed-up fixed for this scale before running: for every method, or a dict by
    arm. illustration: a grid that is shown but not judged. Raises `BadInput` unless names are unique and
    exactly the first arm is the baseline, or in one of several processes.

    >>> arms = [Arm(name="baseline", role="baseline"), Arm(name="shorter", role="control", changes={"epochs": 1})]
    >>> comparison = compare(task("smoke", "synthetic"), arms, quantity="training time")
    runs: 1 of 2, ...
    runs: 2 of 2, ...
    >>> comparison.verdict("shorter").verdict
    'smoke: not a measurement'
    """
    if distributed.several():
        raise BadInput(
            "compare: arms are measured in one process; over several only train() works (torchrun -m effilib train)"
        )
    seeds = seeds or task.seeds
    if not isinstance(seeds, int) or seeds < 1:
        raise BadInput(f"compare: seeds is {seeds!r}, it must be a whole number above 0")
    names = [a.name for a in arms]
    if len(set(names)) < len(names):
        raise BadInput(f"arms need names of their own, got {', '.join(names)}")
    if [a.role == "baseline" for a in arms] != [True] + [False] * (len(arms) - 1) or not {
        a.role for a in arms
    } <= set(ROLES):
        raise BadInput(
            "the first arm, and no other, has the role 'baseline'; the others are 'method' or 'control'"
        )
    choose("quantity", quantity, QUANTITIES)
    if quantity == "time to target":
        task = pilot(task)
    blocks = measure(task, arms, list(range(seeds)), title=title)
    return Comparison(
        task=task, arms=tuple(arms), blocks=blocks, quantity=quantity, claim=claim, illustration=illustration
    )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The finished runs of some arms, and what follows from them.

    >>> arms = [Arm(name="baseline", role="baseline"), Arm(name="narrow", role="control", network={"widths": (4, 4, 4)})]
    >>> comparison = compare(task("smoke", "synthetic"), arms, quantity="time per step")
    runs: 1 of 2, ...
    runs: 2 of 2, ...
    >>> list(comparison.table().index), comparison.predicted("narrow") > 1
    (['baseline', 'narrow'], True)
    """

    task: Task
    arms: tuple
    blocks: list
    quantity: str = "time to target"
    claim: object = None
    illustration: bool = False

    @property
    def baseline(self):
        """The baseline's name."""
        return self.arms[0].name

    @property
    def machine(self):
        """What it was measured on: see `clock.machine`."""
        return self.blocks[-1]["machine"]

    def histories(self, arm):
        """The arm's `History` of every seed."""
        return [b["arms"][arm] for b in self.blocks]

    def times(self, arm, quantity=None):
        """Per seed the seconds to the target (None where it was missed), the median seconds of a step, or
        those of the whole run.
        """
        if (quantity or self.quantity) == "time per step":
            return [h.step_seconds for h in self.histories(arm)]
        if (quantity or self.quantity) == "training time":
            return [h.seconds for h in self.histories(arm)]
        return [time_to_target(h.rows, self.task.target) for h in self.histories(arm)]

    def differences(self, arm):
        """Per seed the final validation accuracy less the baseline's, in points."""
        return [
            m.accuracy - b.accuracy
            for b, m in zip(self.histories(self.baseline), self.histories(arm), strict=True)
        ]

    def predicted(self, arm, per_step=None):
        """The speed-up that FLOPs predict, of a step or (default: by the quantity) of the whole run."""
        per_step = self.quantity == "time per step" if per_step is None else per_step

        def flops(name):
            return stats.mean(h.flops / (h.steps if per_step else 1) for h in self.histories(name))

        return flops(self.baseline) / flops(arm) if flops(arm) else float("nan")

    def verdict(self, arm, quantity=None):
        """The `Verdict` of an arm against the baseline."""
        withhold = SMOKE if self.task.preset == "smoke" else SHARED if shared_machine() else ""
        withhold = withhold or ("illustration, no verdict" if self.illustration else "")
        claim = self.claim.get(arm) if isinstance(self.claim, dict) else self.claim
        quantity = quantity or self.quantity
        return judge(
            self.times(self.baseline, quantity), self.times(arm, quantity), self.differences(arm), margin=self.task.margin, claim=claim,
            arm=arm, against=self.baseline, quantity=quantity, machine=self.machine["summary"], withhold=withhold,
        )  # fmt: skip

    def verdicts(self):
        """The verdicts of all arms but the baseline."""
        return [self.verdict(a.name) for a in self.arms[1:]]

    def table(self):
        """One row an arm: everything that is judged, as a DataFrame of strings and numbers for people."""
        import pandas as pd

        rows = []
        for arm in self.arms:
            h, base = self.histories(arm.name), arm.name == self.baseline
            reached = (
                [t for t in self.times(arm.name, "time to target") if t is not None]
                if self.task.target
                else []
            )
            step = paired_ratio(
                self.times(self.baseline, "time per step"), self.times(arm.name, "time per step")
            )
            v = None if base else self.verdict(arm.name)
            mean, low, _ = interval([x.accuracy for x in h])
            row = {
                "arm": arm.name,
                "role": arm.role,
                "n": len(h),
                "step ms": 1e3 * stats.median(x.step_seconds for x in h),
            }
            if self.quantity != "time per step":  # else it stands under "measured"
                row["step speed-up"] = (
                    "1"
                    if base
                    else f"{step[0]:.2f}x" + (f" [{step[1]:.2f}, {step[2]:.2f}]" if len(h) > 1 else "")
                )
            if self.task.target:
                row[f"s to {self.task.target:g} %"] = stats.median(reached) if reached else float("nan")
                row["reached"] = f"{len(reached)} of {len(h)}"
            row |= {
                "accuracy %": f"{mean:.2f}" + (f" ± {mean - low:.2f}" if len(h) > 1 else ""),
                "test %": stats.mean(x.test_accuracy for x in h),
                "TFLOP": stats.mean(x.flops for x in h) / 1e12,
                "memory MB": max(sum(v for k, v in x.memory.items() if k != "peak") for x in h) / 2**20,
                "predicted": "1" if base else f"{self.predicted(arm.name):.2f}x",
                "measured": "1" if base else v.text,
                "verdict": "" if base else v.verdict,
                "claim reproduced": "" if base else v.claim_reproduced,
            }
            rows.append(row)
        return pd.DataFrame(rows).set_index("arm")

    def history(self):
        """One row per arm, seed and evaluation, as a DataFrame: what `history.csv` holds."""
        import pandas as pd

        frames = [
            pd.DataFrame(h.rows).assign(arm=name, seed=b["seed"]) for b in self.blocks for name, h in b["arms"].items()
        ]  # fmt: skip
        return pd.concat(frames, ignore_index=True)[
            ["arm", "seed", "step", "epoch", "seconds", "lr", "train_loss", "loss", "accuracy"]
        ]

    def notes(self):
        """What a reader must know of the conditions, in sentences."""
        runs = [h for b in self.blocks for h in b["arms"].values()]
        capped, timed = sum(h.capped for h in runs), sum(h.timed for h in runs)
        raw, used = sum(h.raw_seconds for h in runs), sum(h.seconds for h in runs)
        notes = [f"{capped} of {timed} steps stalled and were capped; raw {raw:.1f} s, counted {used:.1f} s."]
        cached = [b["cached"] for b in self.blocks if b.get("cached")]
        if cached:
            notes.append(
                f"{len(cached)} of {len(self.blocks)} seeds come from the cache, measured {min(cached)}."
            )
        again = [b["seed"] for b in self.blocks if b["attempts"] > 1]
        if again:
            notes.append(f"Seeds run again because over {CAPPED:.0%} of their steps stalled: {again}.")
        if any(h.diverged for h in runs):
            names = sorted({n for b in self.blocks for n, h in b["arms"].items() if h.diverged})
            notes.append(f"Diverged: {', '.join(names)}.")
        return notes
