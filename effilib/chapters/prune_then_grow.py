"""Chapter II.9: what is trained: patients that are diagnosed; the procedure on small images, and the controls
that could beat it.
"""

from collections.abc import Callable
from dataclasses import asdict, replace

from effilib import clock, paths, provenance
from effilib.chapters import kernel_rescaling
from effilib.chapters import practical_setting as setting
from effilib.experiment import Arm
from effilib.methods.diagnosis import (
    Buds,
    CheapestFlop,
    Forks,
    PricedPenalty,
    PruningRate,
    RandomChoice,
    examine,
    search,
)
from effilib.methods.gradient_diagnosis import GradMax
from effilib.methods.kernel_rescaling import KernelRescaling
from effilib.methods.patients import Patient
from effilib.methods.prune_then_grow import GENTLE, FromScratch, PruneThenGrow
from effilib.tasks import Task

__all__ = ["DIAGNOSES", "SETTINGS", "SIZES", "arms", "procedure", "resizer", "start", "trials"]

DIAGNOSES = {
    "pruning rate": PruningRate(),
    "priced penalty": PricedPenalty(),
    "buds": Buds(),
    "GradMax": GradMax(),
    "forks": Forks(),
    "cheapest per FLOP": CheapestFlop(),
    "random": RandomChoice(),
}
SHORT = {"smoke": Forks(steps=2, images=50), "quick": Forks(steps=12, images=200)}
SEARCH = {"smoke": 0.5, "quick": 1.0, "study": 2.0, "full": 4.0}  # epochs of the patient before its diagnosis
TRIALS = {"smoke": 1, "quick": 1, "study": 5, "full": 5}  # searches of each patient, with seeds of their own
FIRST = 4000  # their first seed: no truth's

DENSE, GROWN = "dense", "prune, then grow"
ALONE, RANDOM = "growth without pruning", "growth at random stages"
SCRATCH, SMALL, RESIZED = "final network from scratch", "small network", "dense on small images"

# Decisions come at epochs' ends, so that the short presets take more epochs of fewer images.
SIZES = {
    "smoke": dict(epochs=5),
    "quick": dict(images=800, epochs=10),
    "study": dict(epochs=8, seeds=3),  # seven arms, one of which is trained twice
}
# Starting points, not findings: chosen in trial runs with seeds that are not measured. Epochs are few, so
# that a window is short (patience, cooldown), what counts as no progress is much (tau, progress), and the
# penalty has to act within a share of the run (idle).
SETTINGS = {
    # Grows wherever it can (low), so that tests see it on any machine; 8 channels have no multiple of 16.
    "smoke": dict(
        prune=replace(GENTLE, multiple=2), idle=0.1, patience=1, tau=1.0, progress=1.0, window=1, cooldown=1,
        search=0.7, full=101.0, gap=100.0, low=1.0, high=1.0,
    ),
    # Of 12 steps an epoch the loss on held-out images is noise, by which no end of improvement can be told
    # (mode, gap).
    "quick": dict(mode="periodic", period=2, idle=0.2, gap=100.0),
    "study": dict(idle=0.25, patience=1, tau=0.05, progress=0.1, cooldown=1, search=0.5),
    "full": dict(idle=0.1, patience=3, tau=0.01, search=0.7),
}  # fmt: skip


def start(task: Task) -> dict:
    """Return the settings of the network that grows: one block a stage of our ResNet; others as they are."""
    if task.network != "resnet":
        return {}
    return {"blocks": tuple((max(2, w),) for w in task.widths.get("widths", (16, 32, 64)))}


def resizer(task: Task) -> KernelRescaling:
    """Return chapter 6.3's schedule of image sizes: half the side, then three quarters, then full."""
    return kernel_rescaling.method(task, task.load(), kernels=False)


def procedure(task: Task, **changes) -> PruneThenGrow:
    """Return the method as a preset runs it, with changes."""
    return PruneThenGrow(**{**SETTINGS[task.preset], **changes})


def arms(task: Task) -> list[Arm]:
    """Return the dense network, the procedure, and what it has to beat; quick leaves out three controls."""
    small, method, resize = start(task), procedure(task), resizer(task)
    alone = procedure(task, prune=replace(method.prune, ratio=0.0), pressure=False)
    random = procedure(task, where="random")
    found = [
        Arm(name=DENSE, role="baseline"),
        Arm(name=GROWN, methods=(resize, method), network=small),
        Arm(name=RANDOM, role="control", methods=(resize, random), network=small),
        Arm(name=RESIZED, role="control", methods=(resize,)),
        Arm(name=ALONE, role="control", methods=(resize, alone), network=small),
        Arm(name=SMALL, role="control", methods=(resize,), network=small),
        Arm(
            name=SCRATCH,
            role="control",
            fit=FromScratch(method, start=tuple(small.items()), methods=(resize,)),
        ),
    ]
    return found[:4] if task.preset == "quick" else found


def diagnoses(task: Task) -> dict[str, Callable]:
    """Return the diagnoses that a preset compares: all, in smoke and quick two, made short, and chance."""
    if task.preset in SHORT:
        return {n: DIAGNOSES[n] for n in ("priced penalty", "random")} | {"forks": SHORT[task.preset]}
    return DIAGNOSES


def trials(task: Task, patients: list[Patient], table: dict[str, float]) -> list[dict]:
    """Search every patient several times and let each diagnosis rank its candidates.

    table: of step times. Returns a row for each (diagnosis, patient, seed, candidate): score, and seconds of
    the whole diagnosis. What was done before is taken from the cache.
    """
    mine, rows = setting.ward(task).but(epochs=SEARCH[task.preset]), []
    dataset, mean = mine.load(), diagnoses(task)
    for seed in range(FIRST, FIRST + TRIALS[task.preset]):
        for patient in patients:
            times = setting.prices(patient, table)
            key = provenance.digest(
                provenance.settings(replace(mine, seeds=1, given=())), asdict(patient), times, seed,
                provenance.settings(list(mean.values())), provenance.source([search, *mean.values()]),
                dataset.digest, clock.machine(dataset.device)["torch"],
            )  # fmt: skip
            file = paths.cache() / "diagnoses" / f"{key}.json"
            found = paths.read_json(file)
            if not isinstance(found, list):
                found = _trial(mine, dataset, patient, times, seed, mean)
                paths.make(file.parent)
                paths.write(file, found)
            rows += found
    return rows


def _trial(task, dataset, patient, times, seed, diagnoses):
    """One search, and what each diagnosis says after it."""
    case, _ = search(task.build(dataset, seed, **patient.settings), dataset, task.recipe, times, seed)
    rows = []
    for name, diagnosis in diagnoses.items():
        scores, seconds = examine(case, diagnosis)
        same = {"diagnosis": name, "patient": patient.name, "seed": seed, "seconds": seconds}
        rows += [{**same, "candidate": c, "score": score} for c, score in scores.items()]
    return rows
