"""Train arms fairly: at several lengths, with paired seeds, interleaved, cached, resumable.

The unit is a cell: all arms at one length with one seed, in one process, fresh models. The cells of a length
run in the order A B B A (more arms: rotated, reversed every second cell). Every length of a block has a seed
of its own, so that cells are independent of each other. A cell is cached as a whole, so that a cached
baseline never meets a fresh method; an interrupted comparison goes on with the cell that it was at. What
follows from the runs is in `results`.
"""

import gc
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace

import torch

from effilib import clock, distributed, paths, provenance
from effilib.dataset import Dataset
from effilib.errors import BadInput
from effilib.history import History
from effilib.hooks import check_methods
from effilib.progress import Progress
from effilib.recipe import resolve_layout, resolve_precision
from effilib.tasks import Task
from effilib.training import train

__all__ = ["Arm", "Contender", "cells", "check_arms", "find_lengths", "key", "measure", "order", "pilot"]

PILOT_SEED = 2000  # never measured, as those of tuning (1000, 1001, ...)
SEEDS = 100  # seeds a length; cell j of length i has the seed 100 i + j
ROLES = ("baseline", "method", "control")
SAME = 1.1  # a pilot's ratio of times below which an arm has the baseline's lengths


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of training: the baseline, a method, or a control that could beat it.

    methods: `Method`s for `train`. changes: of the task or its recipe, e.g. {"lr": 0.2}; {"epochs": 3} are
    those of length 1. network: settings of the network, e.g. {"widths": (8, 16, 32)}. fit: what is not one
    `train()` (stages, a teacher and a student): (task, seed) -> History, the task being at its length. tuned:
    epochs -> settings of the recipe, for an arm whose best settings are not the baseline's. lengths: the
    arm's own, as many as the task's, instead of those that a pilot finds.

    >>> narrow = Arm(name="narrow", role="control", network={"widths": (4, 4, 4)})
    >>> t = task("smoke", "synthetic")
    >>> narrow.run(t, t.load(), seed=0, length=0.5).steps
    4
    """

    name: str
    role: str = "method"
    methods: tuple = ()
    changes: dict = field(default_factory=dict)
    network: dict = field(default_factory=dict)
    fit: Callable | None = None
    tuned: dict[float, dict] = field(default_factory=dict)
    lengths: tuple[float, ...] = ()

    def __post_init__(self):
        check_methods(self.methods)  # before anything is trained

    def task(self, task: Task, length: float = 1.0) -> Task:
        """Return the task as this arm trains it at a length."""
        if self.tuned:  # but for what the user gave
            tuned = {e: {k: v for k, v in s.items() if k not in task.given} for e, s in self.tuned.items()}
            task = task.but(tuned=tuned)
        epochs = {k: v for k, v in self.changes.items() if k == "epochs"}
        others = {k: v for k, v in self.changes.items() if k != "epochs"}
        return task.but(**epochs).at(length).but(**others)  # what the arm fixes is not tuned away

    def run(self, task: Task, dataset: Dataset, seed: int, length: float = 1.0) -> History:
        """Train this arm at one length with one seed."""
        mine = self.task(task, length)
        if self.fit:
            return self.fit(mine, seed)
        if task.axis == "images":
            dataset = mine.load()
        return train(mine.build(dataset, seed, **self.network), dataset, mine.recipe, self.methods, seed)


@dataclass(frozen=True)
class Contender:
    """Say how a method takes part in chapter 10 and `advise`.

    >>> narrow = Arm(name="", network={"widths": (4, 4, 4)})
    >>> Contender("narrow", "", ("the network",), lambda task: narrow).arm(task("smoke", "synthetic")).name
    'narrow'
    """

    name: str
    chapter: str  # its number, "" for a control
    modifies: tuple[str, ...]  # what of the training it changes; no two of a combination may change the same
    make: Callable[[Task], Arm]  # its name is set later
    order: int = 0  # in which methods of a combination work within a step, smallest first

    def arm(self, task: Task) -> Arm:
        """Return its arm on a task."""
        return replace(self.make(task), name=self.name)


def shared_machine() -> bool:
    """Return whether other notebooks run here at the same time (`effilib run --jobs`)."""
    return bool(os.environ.get("EFFILIB_SHARED"))


def order(arms: Sequence, index: int) -> list:
    """Return the arms in the order of a length's cell number `index`.

    >>> ["".join(order("AB", index)) for index in range(4)]
    ['AB', 'BA', 'BA', 'AB']
    """
    k = index // 2 % len(arms)
    rotated = [*arms[k:], *arms[:k]]
    return rotated[::-1] if index % 2 else rotated


def key(task: Task, dataset: Dataset, arms: Sequence[Arm]) -> str:
    """Return the cache key of cells: all that a result depends on, but length and seed.

    >>> t, arms = task("smoke", "synthetic"), [Arm(name="baseline", role="baseline")]
    >>> key(t, t.load(), arms) == key(t.but(seeds=9), t.load(), arms) != key(t.but(lr=0.2), t.load(), arms)
    True
    """
    return provenance.digest(
        provenance.settings(replace(task, seeds=1, lengths=(1.0,), given=())),
        provenance.settings([replace(a, lengths=()) for a in arms]),
        provenance.source(list(arms)),
        [provenance.named_source(a.task(task).network) for a in arms],
        dataset.digest,
        resolve_precision(task.recipe.precision, dataset.device),
        resolve_layout(task.recipe, dataset.device),
        clock.hardware(dataset.device),
    )


def cells(task: Task) -> list[tuple[int, int]]:
    """Return (index of the length, seed) of every cell, block by block.

    >>> cells(task("quick", "mnist5k", seeds=2))
    [(0, 0), (1, 100), (0, 1), (1, 101)]
    """
    if task.seeds > SEEDS:
        raise BadInput(f"seeds is {task.seeds}: at most {SEEDS} a length")
    return [(i, SEEDS * i + block) for block in range(task.seeds) for i in range(len(task.lengths))]


def measure(
    task: Task,
    arms: Sequence[Arm],
    *,
    lengths: dict[str, tuple[float, ...]] | None = None,
    title: str = "runs",
    first_seed: int = 0,
) -> list[dict]:
    """Train every arm in every cell, or take it from the cache. Returns the cells, block by block.

    lengths: arm's name -> its lengths (default: the task's for all). first_seed: added to all seeds. A cell
    is a dict: seed, length (the baseline's), lengths (name -> length), arms (name -> History), machine, load,
    date, shared, and "cached" where it is.

    >>> cell = measure(task("smoke", "synthetic"), [Arm(name="baseline", role="baseline")])[0]
    runs: 1 of 2, ...: length 0.5, seed 0, baseline: ...
    ...
    >>> cell["seed"], cell["length"], cell["arms"]["baseline"].steps
    (0, 0.5, 4)
    """
    lengths = lengths or {a.name: task.lengths for a in arms}
    wanted = [(i, {a.name: lengths[a.name][i] for a in arms}, first_seed + s) for i, s in cells(task)]
    return _measure(task, arms, wanted, title)


def _measure(task, arms, wanted, title) -> list[dict]:
    """The cells of `wanted`: (index of the task's length, name -> length, seed)."""
    dataset = task.load()
    folder = paths.make(paths.cache() / key(task, dataset, arms))

    def file(i, lengths, seed):
        return folder / f"{'-'.join(f'{lengths[a.name]:g}' for a in arms)}-seed-{seed}.json"

    found: list = [_read(file(*cell), arms) for cell in wanted]
    missing = [n for n, cell in enumerate(found) if cell is None]
    if missing:
        work = sum(task.lengths[wanted[n][0]] for n in missing) * len(arms)
        progress = Progress(title, len(missing) * len(arms), work=work)
        _burn_in(task, dataset, arms)
        gc.collect()
        gc.freeze()  # exclude long-lived objects from garbage collection while we time
        try:
            with clock.Measuring() as measuring:
                for n in missing:
                    i, lengths, seed = wanted[n]
                    turn = order(list(arms), n // len(task.lengths) + i)
                    found[n] = _run_cell(
                        task, dataset, turn, task.lengths[i], lengths, seed, progress, measuring
                    )
                    if not found[n]["shared"]:
                        runs = {name: asdict(h) for name, h in found[n]["arms"].items()}
                        paths.write(file(*wanted[n]), {**found[n], "arms": runs})
        finally:
            gc.unfreeze()
    return _without_stalls(found, arms)


def _run_cell(task, dataset, arms, length, lengths, seed, progress, measuring):
    load, histories, others = clock.machine(dataset.device)["load"], {}, measuring.others()
    for arm in arms:
        gc.collect()
        if dataset.device.type == "cuda":
            torch.cuda.empty_cache()
        history = histories[arm.name] = arm.run(task, dataset, seed, lengths[arm.name])
        others = max(others, measuring.others())
        end = f"{history.accuracy:.2f} %" if history.rows else "no evaluation"
        what = f"{end}, {history.seconds:.1f} s" + (", diverged" if history.diverged else "")
        progress.done(f"length {length:g}, seed {seed}, {arm.name}: {what}", work=length)
    return {
        "seed": seed,
        "length": length,
        "lengths": lengths,
        "arms": histories,
        "load": load,
        "shared": shared_machine() or others > 0,
        "date": clock.date(),
        "machine": clock.machine(dataset.device),
    }


def _without_stalls(cells, arms):
    """On CUDA, where CPU time shows no stall: take off what is slow at a step with one seed only."""
    for arm in arms:
        for length in {c["length"] for c in cells}:
            runs = [c["arms"][arm.name] for c in cells if c["length"] == length]
            if all(h.step_times for h in runs):
                for h, taken in zip(runs, clock.unshared([h.step_times for h in runs]), strict=True):
                    h.seconds = h.raw_seconds - taken
    return cells


def _burn_in(task, dataset, arms):
    """Train a few throw-away steps, so that first-time costs of a process fall outside of the clock."""
    batch = task.recipe.batch_size
    few = replace(
        dataset, train=dataset.train[: 8 * batch], validation=dataset.validation[:8], test=dataset.test[:8]
    )
    if len(few.train) >= batch and not arms[0].fit:
        recipe = replace(arms[0].task(task).recipe, epochs=1)
        train(task.build(few, **arms[0].network), few, recipe, evaluations=1)


def _history(saved):
    """A History from JSON, which has no NaN: what lacks of its numbers was one."""
    rows = [{k: math.nan if v is None else v for k, v in row.items()} for row in saved["rows"]]
    lacking = {f.name for f in fields(History) if f.type is float and saved.get(f.name, 0) is None}
    return History(**{**saved, "rows": rows, **dict.fromkeys(lacking, math.nan)})


def _read(file, arms):
    saved = paths.read_json(file)
    try:
        histories = {n: _history(h) for n, h in saved["arms"].items()}
        if set(histories) != {a.name for a in arms}:
            return None
        return {**saved, "arms": histories, "cached": saved["date"]}
    except (TypeError, KeyError, AttributeError):  # not there, or not what is written here: measured again
        return None


def find_lengths(task: Task, arms: Sequence[Arm]) -> dict[str, tuple[float, ...]]:
    """Return every arm's lengths: those at which it takes about as long as the baseline.

    A pilot, the shortest length with a seed that is never measured, says how many times as long an arm's run
    takes; its lengths are the baseline's divided by that, to two digits. Where lengths are numbers of images,
    where the arm names its own, and in smoke, there is no pilot.

    >>> find_lengths(task("smoke", "synthetic"), [Arm(name="baseline", role="baseline")])
    {'baseline': (0.5, 1.0)}
    """
    lengths = {a.name: a.lengths or task.lengths for a in arms}
    unknown = [a for a in arms[1:] if not a.lengths]
    if task.preset == "smoke" or task.axis == "images" or not unknown:
        return lengths
    trial = [arms[0], *unknown]
    once = {a.name: min(task.lengths) for a in trial}
    shortest = task.lengths.index(min(task.lengths))
    runs = _measure(task, trial, [(shortest, once, PILOT_SEED)], "pilot for the lengths")[0]["arms"]
    base = runs[arms[0].name]
    for arm in unknown:
        mine = runs[arm.name]
        if base.diverged or mine.diverged or not (base.seconds and mine.seconds):
            continue  # it broke off, so that its time says nothing
        ratio = mine.seconds / base.seconds
        if not 1 / SAME < ratio < SAME:
            lengths[arm.name] = tuple(_two_digits(length / ratio) for length in task.lengths)
    return lengths


def _two_digits(x):
    return round(x, 1 - math.floor(math.log10(x)))


def pilot(task: Task, arm: Arm, *, title: str = "pilot") -> History:
    """Train an arm once at its longest, unless it is cached.

    With a seed that is never measured. For what has to be known before the run, such as the widths that
    pruning ends with.

    >>> pilot(task("smoke", "synthetic"), Arm(name="pruned")).steps
    pilot: 1 of 1, ...: length 1, seed 2000, pruned: ...
    8
    """
    longest = max(task.lengths)
    cell = task.lengths.index(longest), {arm.name: longest}, PILOT_SEED
    return _measure(task, [arm], [cell], title)[0]["arms"][arm.name]


def check_arms(task: Task, arms: Sequence[Arm]) -> None:
    """Raise `BadInput` unless names are unique and the first is baseline.

    >>> check_arms(task("smoke", "synthetic"), [Arm(name="a", role="baseline"), Arm(name="a")])
    Traceback (most recent call last):
    effilib.errors.BadInput: arms need names of their own, got a, a
    """
    if distributed.several():
        raise BadInput(
            "arms are measured in one process; over several only train() works (torchrun -m effilib train)"
        )
    names = [a.name for a in arms]
    if len(set(names)) < len(names):
        raise BadInput(f"arms need names of their own, got {', '.join(names)}")
    roles = [a.role for a in arms]
    if [r == "baseline" for r in roles] != [True] + [False] * (len(arms) - 1) or not {*roles} <= {*ROLES}:
        raise BadInput(
            "the first arm, and no other, has the role 'baseline'; the others are 'method' or 'control'"
        )
    for a in arms:
        if a.lengths and len(a.lengths) != len(task.lengths):
            raise BadInput(f"arm {a.name} has {len(a.lengths)} lengths, the task has {len(task.lengths)}")
