"""Tune the plain network of part 5: `python -m effilib.chapters.plain_tuning quick mnist5k 200 1000`
(updates, images).

Writes a row a run to `results/recorded/tuning/<preset>-<dataset>-convnet.csv`. The seeds are not those of
measurements, and the test split is never read. The outcome stands in `plain_network.LR`."""

import csv
import io
import itertools
import statistics as stats
import sys
from dataclasses import replace

from effilib import data, paths
from effilib.chapters.plain_network import NETWORK, at_size
from effilib.experiment import Arm
from effilib.methods.structure_and_strength import StructureAndStrength
from effilib.tasks import recorded_tuning, task
from effilib.training import train

LRS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)


def sweep(preset, dataset, updates, images, arms, lrs=LRS, seeds=(1000, 1001), report=print):
    """Learning rates of some arms (name -> `Arm`) on the validation split: all rows. What the file has
    already is not run again.
    """
    file = recorded_tuning() / f"{preset}-{data.label(data.identify(dataset))}-{NETWORK}.csv"
    base = task(preset, dataset, NETWORK)
    base = at_size(base, min(images, len(base.load().train)), updates)
    loaded = base.load()
    loaded = replace(loaded, test=loaded.validation[:1])  # tuning never reads the test split
    rows = read(file)
    done = {(r["arm"], r["lr"], r["seed"]) for r in rows}
    for name, lr, seed in itertools.product(arms, lrs, seeds):
        if (name, lr, seed) not in done:
            arm, t = arms[name], base.but(lr=lr)
            history = train(
                t.build(loaded, seed, **arm.network), loaded, t.recipe, arm.methods, seed, evaluations=1
            )
            row = dict(
                preset=preset,
                dataset=data.identify(dataset),
                arm=name,
                images=len(loaded.train),
                updates=updates,
            )
            rows.append(
                row
                | dict(lr=lr, seed=seed, accuracy=round(history.accuracy, 3), diverged=int(history.diverged))
            )
            write(rows, file)
            report(rows[-1])
    return rows


def read(file):
    """The rows of a sweep, numbers as numbers."""
    if not file.exists():
        return []
    with file.open(newline="") as f:
        return [
            r | {k: float(r[k]) for k in ("lr", "accuracy")} | {"seed": int(r["seed"])}
            for r in csv.DictReader(f)
        ]


def write(rows, file):
    """Write the rows of a sweep as CSV."""
    with io.StringIO() as text:
        writer = csv.DictWriter(text, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        paths.write(paths.make(file.parent) / file.name, text.getvalue())


def best(rows):
    """arm -> the learning rate with the highest mean accuracy."""
    groups = {}
    for r in rows:
        groups.setdefault((r["arm"], r["lr"]), []).append(r["accuracy"])
    arms = dict.fromkeys(r["arm"] for r in rows)
    return {
        a: max((lr for arm, lr in groups if arm == a), key=lambda lr: stats.mean(groups[a, lr])) for a in arms
    }


def tuned_arms():
    """What is tuned, by its name in `plain_network.LR`. Filters learned by k-means stand for the
    dictionary's, which take longer.
    """

    def learned(**settings):
        return (StructureAndStrength(patches=2000, **settings),)

    random = learned(structure="random", scope="auto")
    return {
        "all": Arm(name="all", role="baseline", network={"bn": False}),
        "all, BatchNorm": Arm(name="all", role="baseline", network={"bn": True}),
        "strength": Arm(name="strength", methods=random, network={"bn": False}),
        "BatchNorm only": Arm(name="BN", methods=random, network={"bn": True}),
        "all, learned": Arm(
            name="learned", methods=learned(structure="kmeans", train="all"), network={"bn": False}
        ),
        "strength, learned": Arm(name="learned", methods=learned(structure="kmeans"), network={"bn": False}),
    }


if __name__ == "__main__":
    preset, dataset, updates, images = *sys.argv[1:3], *map(int, sys.argv[3:5])
    print(best(sweep(preset, dataset, updates, images, tuned_arms())))
