"""Tune a task's baseline before anything is compared with it: learning rate x weight decay x epochs, several
seeds.

Only accuracies count here, so settings run side by side, one thread each. The sweep is a CSV, one row a run,
and goes on where it was interrupted. `effilib tune --dataset fashion_mnist --preset study` runs it;
`tasks.TUNED` holds its outcome."""

import csv
import io
import itertools
import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace

import torch

from effilib import data, paths
from effilib.clock import now
from effilib.statistics import held
from effilib.tasks import recorded_tuning, task
from effilib.training import train

LRS, DECAYS = (0.05, 0.1, 0.2, 0.4), (5e-4, 2e-3)
EPOCHS = {"quick": (2, 3, 4), "study": (5, 10, 15)}
FIELDS = tuple(
    [
        "preset",
        "dataset",
        "variant",
        "epochs",
        "lr",
        "weight_decay",
        "batch_size",
        "seed",
        "accuracy",
        "loss",
        "train_loss",
        "diverged",
    ]
)


def run_one(preset, dataset, variant, seed, changes):
    """Train one setting with one seed; a row of the sweep.

    >>> row = run_one("smoke", "synthetic", "base", 1000, {"epochs": 1})
    >>> row["seed"], row["lr"], row["batch_size"]
    (1000, 0.1, 32)
    """
    torch.set_num_threads(1)
    t = task(preset, dataset, variant=variant, **changes)
    loaded = t.load()
    loaded = replace(loaded, test=loaded.validation[:1])  # tuning never reads the test split
    history = train(t.build(loaded, seed), loaded, t.recipe, seed=seed, evaluations=1)
    last = history.rows[-1]
    row = dict(
        preset=preset,
        dataset=data.identify(dataset),
        variant=variant,
        seed=seed,
        diverged=int(history.diverged),
    )
    row |= {k: getattr(t.recipe, k) for k in ("epochs", "lr", "weight_decay", "batch_size")}
    return row | {k: round(last[k], 4) for k in ("accuracy", "loss", "train_loss")}


def sweep_file(preset, dataset, variant):
    """The CSV of a sweep, one row a run. dataset: also a path, by which a known set is recognised.

    >>> sweep_file("study", "cifar10", "wide").name
    'study-cifar10-wide.csv'
    """
    suffix = "" if variant == "base" else f"-{variant}"
    return recorded_tuning() / f"{preset}-{data.label(data.identify(dataset))}{suffix}.csv"


def read(file):
    """The rows of a sweep, numbers as numbers.

    >>> rows = read(sweep_file("quick", "mnist5k", "base"))  # what was recorded
    >>> len({(row["epochs"], row["lr"], row["weight_decay"]) for row in rows})
    24
    """
    if not file.exists():
        return []
    with file.open(newline="") as f:
        return [{k: v if k in FIELDS[:3] else float(v) for k, v in row.items()} for row in csv.DictReader(f)]


def sweep(
    preset,
    dataset,
    variant="base",
    *,
    lrs=LRS,
    decays=DECAYS,
    epochs=None,
    seeds=(1000, 1001),
    workers=None,
    report=print,
):
    """Run what is missing of the grid, write each result at once, and return all rows. The seeds are not
    those of measurements.

    >>> rows = sweep("quick", "mnist5k", lrs=(0.2,), decays=(5e-4,), epochs=(3,))  # recorded already: nothing is run
    >>> len(rows)
    48
    """
    file = sweep_file(preset, dataset, variant)
    paths.make(file.parent)
    done = {(r["epochs"], r["lr"], r["weight_decay"], r["seed"]) for r in read(file)}
    grid = [g for g in itertools.product(epochs or EPOCHS[preset], lrs, decays, seeds) if g not in done]
    if not file.exists():
        paths.write(file, ",".join(FIELDS) + "\n")
    begun = now()
    with ProcessPoolExecutor(
        workers or os.cpu_count(), mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        jobs = [
            pool.submit(run_one, preset, dataset, variant, s, dict(epochs=e, lr=lr, weight_decay=wd))
            for e, lr, wd, s in grid
        ]
        for i, job in enumerate(as_completed(jobs), 1):
            row = job.result()
            with file.open("a", newline="") as f:
                csv.DictWriter(f, FIELDS).writerow(row)
            left = (now() - begun) / i * (len(jobs) - i)
            words = "{epochs:g} epochs, lr {lr:g}, weight decay {weight_decay:g}, seed {seed}: {accuracy:.2f} %".format(
                **row
            )
            report(f"{i}/{len(jobs)}  {words}  (about {left / 60:.0f} min left)")
    return read(file)


def best(rows):
    """Per number of epochs the (lr, weight decay) with the highest mean accuracy: list of rows, shortest
    schedule first.

    >>> rows = [dict(epochs=3, lr=lr, weight_decay=5e-4, accuracy=a) for lr, a in ((0.1, 95.0), (0.1, 97.0), (0.2, 96.5))]
    >>> best(rows)
    [{'epochs': 3, 'lr': 0.2, 'weight_decay': 0.0005, 'accuracy': 96.5, 'low': 96.5, 'n': 1}]
    """
    groups = {}
    for r in rows:
        groups.setdefault((r["epochs"], r["lr"], r["weight_decay"]), []).append(r["accuracy"])
    means = [
        dict(epochs=e, lr=lr, weight_decay=wd, accuracy=sum(a) / len(a), low=min(a), n=len(a))
        for (e, lr, wd), a in groups.items()
    ]
    return [
        max((m for m in means if m["epochs"] == e), key=lambda m: m["accuracy"])
        for e in sorted({m["epochs"] for m in means})
    ]


def swept(base, epochs):
    """{"lr": ..., "weight_decay": ...} with which the recorded sweep of a task did best at so many epochs; {}
    where there was none.

    >>> swept(task("study", "cifar10"), epochs=10)
    {'lr': 0.4, 'weight_decay': 0.0005}
    """
    if base.network != "resnet":
        return {}
    rows = read(sweep_file(base.preset, data.identify(base.dataset), base.variant))
    found = next((row for row in best(rows) if row["epochs"] == epochs), None)
    return {name: found[name] for name in ("lr", "weight_decay")} if found else {}


def find_target(
    preset, dataset, variant="base", *, seeds=range(1000, 1005), step=0.5, report=print, **setting
):
    """The target of a task: the highest multiple of `step` that this setting reaches with all of the seeds.

    setting: epochs, lr, weight_decay of the shortest schedule that is good enough. Writes a row a seed beside
    the sweep.

    >>> target = find_target("smoke", "synthetic", seeds=[1000], epochs=1, lr=0.1, weight_decay=5e-4)
    smoke synthetic base: {'epochs': 1, 'lr': 0.1, ...}
    >>> target % 0.5
    0.0
    """
    file = sweep_file(preset, dataset, variant).with_suffix(".target.csv")
    paths.make(file.parent)
    t = task(preset, dataset, variant=variant, **setting)
    loaded = t.load()
    loaded = replace(loaded, test=loaded.validation[:1])
    rows = []
    for seed in seeds:
        history = train(t.build(loaded, seed), loaded, t.recipe, seed=seed)
        rows.append(
            {
                **setting,
                "seed": seed,
                "held": held(history.rows),
                "accuracy": history.accuracy,
                "seconds": round(history.seconds, 2),
            }
        )
        report(f"{preset} {dataset} {variant}: {rows[-1]}")
    target = math.floor(min(r["held"] for r in rows) / step) * step
    with io.StringIO() as text:
        writer = csv.DictWriter(text, [*rows[0], "target"])
        writer.writeheader()
        writer.writerows({**r, "target": target} for r in rows)
        paths.write(file, text.getvalue())
    return target
