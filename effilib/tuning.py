"""Tune an arm before anything is measured with it: settings x lengths, several seeds.

Only accuracies count here, so runs go side by side, one thread each. A sweep is a CSV, one row a run, and
goes on where it was interrupted; its seeds are never measured, and it reads the validation images only.
`effilib tune` tunes the baselines, and `tasks.TUNED` holds what came out; `effilib tune 04_2` tunes the arms
of a chapter, which read what came out (`settled`).
"""

import csv
import itertools
import json
import math
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from effilib import data, paths
from effilib.clock import cores, now
from effilib.errors import BadInput
from effilib.experiment import Arm
from effilib.progress import say_seconds
from effilib.tasks import Task, recorded_tuning

__all__ = ["Sweep", "best", "read", "settled", "sweep", "sweep_file", "tune", "tuned"]

LRS, DECAYS = (0.1, 0.2, 0.4, 0.8), (2.5e-4, 5e-4, 1e-3, 2e-3)
FACTORS = (0.5, 1.0, 2.0)  # on the baseline's rate, for a chapter's arms; what counts is rate x weight decay
NEAR = 6  # settings at least that are tried at the shorter lengths
SEEDS = (1000, 1001)
BASELINE = Arm(name="baseline", role="baseline")
FIELDS = ("arm", "epochs", "setting", "seed", "accuracy", "loss", "train_loss", "diverged")


class Sweep(NamedTuple):
    """Say what of a chapter is tuned: its sweep's name, and from a preset's task its own, and its arms.

    >>> from effilib.chapters.gradient_pruning import SWEEP
    >>> quick = task("quick", "mnist5k")
    >>> [arm.name for arm in SWEEP.arms(SWEEP.task(quick))]
    ['exact', 'pruned, p = 90%', 'samples by norm', 'smaller network, exact']
    """

    name: str
    task: Callable[[Task], Task]
    arms: Callable[[Task], list[Arm]]


def _run_one(task: Task, arm: Arm, length: float, setting: dict, seed: int) -> dict:
    """Train one setting at one length with one seed; a row of the sweep."""
    torch.set_num_threads(1)
    own = {k: v for k, v in setting.items() if not hasattr(task.recipe, k)}
    methods = tuple(replace(m, **own) for m in arm.methods) if own else arm.methods
    recipe = {k: v for k, v in setting.items() if k not in own}
    arm = replace(arm, methods=methods, changes={**arm.changes, **recipe}, tuned={})
    dataset = task.load()
    history = arm.run(task, replace(dataset, test=dataset.test[:1]), seed, length)  # nobody reads these
    end = (
        history.rows[-1] if history.rows else dict.fromkeys(("accuracy", "loss", "train_loss"), float("nan"))
    )
    row = {
        "arm": arm.name,
        "epochs": round(arm.task(task, length).recipe.epochs, 4),
        "setting": _name(setting),
    }
    row |= {k: round(end[k], 4) for k in ("accuracy", "loss", "train_loss")}
    return row | {"seed": seed, "diverged": int(history.diverged)}


def _run_all(task, cells, workers):
    """(length, row) of every cell as it is done; cells: (arm, length, setting, seed)."""
    if workers == 1:
        threads = torch.get_num_threads()
        try:
            yield from ((cell[1], _run_one(task, *cell)) for cell in cells)
        finally:
            torch.set_num_threads(threads)
    elif cells:
        pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
        with pool:
            jobs = {pool.submit(_run_one, task, *cell): cell for cell in cells}
            yield from ((jobs[job][1], job.result()) for job in as_completed(jobs))


def _name(setting):
    return json.dumps(setting, sort_keys=True)


def sweep_file(task: Task, name: str = "") -> Path:
    """Return the CSV of a sweep. name: of a chapter's arm; the baseline's has none.

    >>> sweep_file(task("study", "cifar10", variant="wide")).name
    'study-cifar10-wide.csv'
    """
    size = f"size={task.size}" if task.size else ""
    parts = [task.preset, data.folder_name(task.dataset), size, task.variant, name]
    return recorded_tuning() / ("-".join(p for p in parts if p and p != "base") + ".csv")


def read(file: Path) -> list[dict]:
    """Return the rows of a sweep: setting as a dict, numbers as numbers; [] where there is no sweep.

    >>> read(Path("nowhere.csv"))
    []
    """
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    return [
        {
            **{k: v if k == "arm" else float(v) for k, v in r.items() if k != "setting"},
            "setting": json.loads(r["setting"]),
        }
        for r in rows
    ]


def sweep(
    task: Task,
    arm: Arm | Sequence[Arm],
    settings: list[dict],
    *,
    name: str = "",
    seeds: Sequence[int] = SEEDS,
    workers: int | None = None,
    report: Callable[[str], object] = print,
    file: Path | None = None,
) -> list[dict]:
    """Run what is missing of a sweep, and return its rows.

    Arms x lengths x settings x seeds.

    arm: one, or several, which share the processes. Lengths are the arm's own, else the task's. settings: of
    the recipe (lr, weight_decay) or of the arm's method. Each result is written at once. workers: how many
    processes; 1 is this one. file: the sweep's, in place of a recorded one.

    >>> short = task("smoke", "synthetic", epochs=0.5)
    >>> rows = sweep(short, BASELINE, [{"lr": 0.1}], seeds=(1000,), workers=1)
    1/2 ...
    2/2 ...
    >>> [(row["epochs"], row["setting"]) for row in rows]
    [(0.25, {'lr': 0.1}), (0.5, {'lr': 0.1})]
    """
    for setting in settings:  # refused before anything is written
        task.but(**{k: v for k, v in setting.items() if hasattr(task.recipe, k)})
    file, cells = file or sweep_file(task, name), {}
    for a in [arm] if isinstance(arm, Arm) else arm:
        for length, setting, seed in itertools.product(a.lengths or task.lengths, settings, seeds):
            epochs = round(a.task(task, length).recipe.epochs, 4)
            cells[a.name, epochs, _name(setting), seed] = a, length, setting, seed
    paths.make(file.parent)
    done = {_key(row) for row in read(file)}
    missing = sorted((cell for key, cell in cells.items() if key not in done), key=lambda cell: -cell[1])
    if not file.exists():
        paths.write(file, ",".join(FIELDS) + "\n")
    begun, work, worked = now(), sum(length for _, length, *_ in missing), 0.0
    for i, (length, row) in enumerate(_run_all(task, missing, workers or cores()), 1):
        with file.open("a", newline="", encoding="utf-8") as f:
            csv.DictWriter(f, FIELDS).writerow(row)
        worked += length
        left = (now() - begun) / worked * (work - worked)
        words = "{arm}, {epochs:g} epochs, {setting}, seed {seed}: {accuracy:.2f} %".format(**row)
        report(f"{i}/{len(missing)}  {words}  (about {say_seconds(left)} left)")
    wanted = {key[:3] for key in cells}
    return sorted((row for row in read(file) if _key(row)[:3] in wanted), key=_key)


def _key(row):
    return row["arm"], row["epochs"], _name(row["setting"]), row["seed"]


def tune(
    task: Task,
    arms: Sequence[Arm] = (BASELINE,),
    *,
    name: str = "",
    lrs: Sequence[float] = LRS,
    decays: Sequence[float] = DECAYS,
    seeds: Sequence[int] = SEEDS,
    workers: int | None = None,
    report: Callable[[str], object] = print,
) -> list[dict]:
    """Sweep learning rate x weight decay of arms, all alike.

    The longest length has the whole grid; at the others the settings around its best one are tried. name: as
    of `sweep_file`.

    >>> grid = dict(lrs=(0.1, 0.2), decays=(5e-4,), seeds=(1000,), workers=1, report=lambda line: None)
    >>> rows = tune(task("smoke", "synthetic", epochs=0.5), **grid)
    >>> len(rows), sorted({row["epochs"] for row in rows})
    (4, [0.25, 0.5])
    """
    grid = [{"lr": lr, "weight_decay": wd} for lr, wd in itertools.product(lrs, decays)]
    how = dict(name=name, seeds=seeds, workers=workers, report=report)
    longest = [replace(a, lengths=(max(a.lengths or task.lengths),)) for a in arms]
    rows = sweep(task, longest, grid, **how)
    for arm, top in zip(arms, longest, strict=True):
        if not (found := best([r for r in rows if r["arm"] == arm.name])):
            raise BadInput(f"{arm.name}: every setting of the sweep diverged: give smaller learning rates")
        near = _around(found[-1]["setting"], grid)
        if others := tuple(n for n in arm.lengths or task.lengths if n not in top.lengths):
            rows += sweep(task, replace(arm, lengths=others), near, **how)
    return rows


def _around(top, grid):
    """The settings of a grid around its best one: all that are next to it, and `NEAR` at least."""
    axes = {k: list(dict.fromkeys(setting[k] for setting in grid)) for k in top}

    def steps(setting):
        far = [abs(axis.index(setting[k]) - axis.index(top[k])) for k, axis in axes.items()]
        return max(far), sum(far)

    nearest = sorted(grid, key=steps)
    return [s for i, s in enumerate(nearest) if i < NEAR or steps(s)[0] <= 1]


def settled(task: Task, arms: Sequence[Arm], name: str) -> list[Arm]:
    """Return arms at the best settings of their recorded sweep.

    name: as of `sweep_file`. Those that it does not have are as they are, and so are all on another network
    than the chapter's.

    >>> [arm.tuned for arm in settled(task("smoke", "synthetic"), [BASELINE], "nobody's")]
    [{}]
    """
    rows = [] if "network" in task.given else read(sweep_file(task, name))
    found = {a.name: tuned([r for r in rows if r["arm"] == a.name]) for a in arms}
    return [replace(a, tuned=found[a.name] or a.tuned) for a in arms]


def best(rows: list[dict]) -> list[dict]:
    """Return the best setting at each number of epochs, shortest first.

    By mean accuracy.

    A setting with a run that diverged is left out, and so is a number of epochs at which all did.

    >>> found = (0.1, 95.0), (0.1, 97.0), (0.2, 96.5)
    >>> rows = [dict(epochs=3, setting={"lr": lr}, accuracy=a) for lr, a in found]
    >>> best(rows)
    [{'epochs': 3, 'setting': {'lr': 0.2}, 'accuracy': 96.5, 'low': 96.5, 'n': 1}]
    """
    groups = {}
    for r in rows:
        end = math.nan if r.get("diverged") else r["accuracy"]
        groups.setdefault((r["epochs"], _name(r["setting"])), []).append(end)
    means = [
        dict(epochs=e, setting=json.loads(s), accuracy=sum(a) / len(a), low=min(a), n=len(a))
        for (e, s), a in groups.items()
        if all(map(math.isfinite, a))
    ]
    lengths = sorted({m["epochs"] for m in means})
    return [max((m for m in means if m["epochs"] == e), key=lambda m: m["accuracy"]) for e in lengths]


def tuned(rows: list[dict]) -> dict[float, dict]:
    """Return epochs -> best setting, as `Task.tuned` and `Arm.tuned` take it.

    >>> tuned([dict(epochs=3.0, setting={"lr": 0.2}, accuracy=95.0)])
    {3.0: {'lr': 0.2}}
    """
    return {row["epochs"]: row["setting"] for row in best(rows)}
