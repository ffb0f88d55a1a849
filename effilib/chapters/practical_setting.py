"""Chapter II.8: what is trained: the baseline, the same again with other seeds, and the patients of Part II.

`python -m effilib.chapters.practical_setting study cifar10` runs what is missing of the truths about the
patients in `results/recorded/tuning`: first the table of step times, on a quiet machine, then every candidate
for the same time. Accuracies may share the machine; times come from the table. One half of the seeds chooses
the patients whose defect matters, the other half judges diagnoses.
"""

import csv
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from effilib import paths, tuning
from effilib.experiment import Arm
from effilib.history import History
from effilib.methods.patients import HEALTHY, KEEP, PATIENTS, Patient, candidates, step_times
from effilib.tasks import Task, task
from effilib.training import train

SIZES = {"quick": dict(epochs=0.8)}  # both arms are the baseline: the same noise shows in less time
OTHER = 50  # seeds away: none that another cell has, with up to so many cells a length

# Patients are trained for the time that the healthy one takes for `epochs`. That is little, so that batches
# are small. study: 65 candidates x 5 seeds of about 33 s on one thread: 90 minutes on two cores.
WARD = {
    "smoke": dict(images=128, epochs=1.0, batch_size=32, size=14),
    "quick": dict(images=1000, epochs=1.5, batch_size=32, lr=0.1),
    "study": dict(images=10_000, epochs=3.5, batch_size=64, lr=0.2, weight_decay=1e-3),
    "full": dict(epochs=10, batch_size=128, lr=0.4),
}
SEEDS = {"study": tuple(range(3000, 3005)), "full": tuple(range(3000, 3005))}  # of the truths alone
FEW = (3000, 3001)  # smoke, quick
LENGTHS = (0.5, 1.0)  # at which a patient is trained as it is: what a point is worth in time
COLUMNS = ("network", "ms", "threads")


def arms(task: Task) -> list[Arm]:
    """Return the baseline twice: what differs between the two is noise."""
    again = Arm(name="other seeds", role="control", fit=other_seeds, lengths=task.lengths)
    return [Arm(name="baseline", role="baseline"), again]


def other_seeds(task: Task, seed: int) -> History:
    """Train the baseline with other weights and another order of images."""
    dataset = task.load()
    return train(task.build(dataset, seed + OTHER), dataset, task.recipe, seed=seed + OTHER)


# Patients


def ward(task: Task) -> Task:
    """Return the task on which patients are trained: our ResNet, on fewer images."""
    mine = task if task.network == "resnet" else task.on("resnet")
    return replace(mine.sized(WARD), lengths=(1.0,))


def patients(task: Task) -> tuple[Patient, ...]:
    """Return the patients of a preset: all, in smoke and quick two."""
    few = ("stage 3 very narrow", "stage 1 wide")
    return tuple(p for p in PATIENTS if p.name in few) if task.preset in ("smoke", "quick") else PATIENTS


def times_file(task: Task) -> Path:
    """Return the CSV of step times, beside the truths'."""
    return tuning.sweep_file(ward(task), "patients-steps")


def times(task: Task, *, keep: bool = False, seconds: float | None = None) -> dict[str, float]:
    """Return the table of step times: network, as JSON -> milliseconds of a step.

    Read where it has every network of the preset's patients, else measured in turn; keep: and written.
    """
    mine, file = ward(task), times_file(task)
    wanted = {_name(s): s for p in (HEALTHY, *patients(task)) for s in candidates(p.settings).values()}
    if file.exists():
        with file.open(newline="", encoding="utf-8") as f:
            found = {row["network"]: float(row["ms"]) for row in csv.DictReader(f)}
        if wanted.keys() <= found.keys():
            return found
    measured = step_times(mine, mine.load(), list(wanted.values()), seconds=seconds)
    found = {name: round(ms, 3) for name, ms in zip(wanted, measured, strict=True)}  # as it is written
    if keep:
        out = io.StringIO()
        rows = [(name, ms, torch.get_num_threads()) for name, ms in found.items()]
        csv.writer(out, lineterminator="\n").writerows([COLUMNS, *rows])
        paths.make(file.parent)
        paths.write(file, out.getvalue())
    return found


def prices(patient: Patient, table: dict[str, float]) -> dict[str, float]:
    """Return a patient's candidates with the milliseconds of their steps."""
    return {name: table[_name(s)] for name, s in candidates(patient.settings).items()}


def truth_arms(task: Task, table: dict[str, float]) -> list[Arm]:
    """Return every patient with every candidate, for as many epochs as the healthy one's time holds."""
    found, time = [], ward(task).recipe.epochs * table[_name(candidates(HEALTHY.settings)[KEEP])]
    for patient in patients(task):
        for name, settings in candidates(patient.settings).items():
            lengths = LENGTHS if name == KEEP else (1.0,)
            how = dict(network=settings, changes={"epochs": time / table[_name(settings)]}, lengths=lengths)
            found.append(Arm(name=f"{patient.name}: {name}", **how))
    return found


def truths(task: Task, **options) -> list[dict]:
    """Run what is missing of the truths about the patients; return the sweep's rows.

    options: of `tuning.sweep`.
    """
    arms = truth_arms(task, times(task, keep=True, seconds=300))
    options = {"seeds": SEEDS.get(task.preset, FEW), **options}
    return tuning.sweep(ward(task), arms, [{}], name="patients", **options)


def recorded(task: Task) -> list[dict]:
    """Return the rows of the truths that are recorded for the table of step times beside them."""
    if not times_file(task).exists():
        return []
    table, mine = times(task), ward(task)
    wanted = {
        (a.name, round(a.task(mine, n).recipe.epochs, 4)) for a in truth_arms(task, table) for n in a.lengths
    }
    rows = tuning.read(tuning.sweep_file(mine, "patients"))
    return [row for row in rows if (row["arm"], row["epochs"]) in wanted]


def _name(settings):
    return json.dumps(settings)


if __name__ == "__main__":
    from effilib.regret import chosen, halves, runs  # tables: no training depends on them

    asked = task(*sys.argv[1:3])
    truth, cures = runs(truths(asked)), {p.name: p.cure for p in patients(asked)}
    print("chosen:", ", ".join(chosen(truth, cures, halves(truth["seed"])[0])))
