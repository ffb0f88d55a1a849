"""Chapter II.9: what is trained: patients that are diagnosed; the procedure and its rivals from a patient's
checkpoint; and whether growing, or a cut, beats a known shape on small images.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, replace

from effilib import clock, paths, provenance
from effilib.chapters import kernel_rescaling
from effilib.chapters import practical_setting as setting
from effilib.experiment import Arm, Contender
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
from effilib.methods.improvement import AllTried, Diagnosed, Halving, Improvement, Oracle
from effilib.methods.kernel_rescaling import KernelRescaling
from effilib.methods.net2net import Net2Net
from effilib.methods.patients import KEEP, Patient
from effilib.methods.prune_then_grow import GENTLE, PruneThenGrow
from effilib.methods.ranked_cut import RankedCut
from effilib.tasks import Task

__all__ = [
    "DIAGNOSES", "SETTINGS", "SIZES", "arms", "contest", "contest_arms", "contested", "procedure", "resizer",
    "start", "trials",
]  # fmt: skip

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
TRIALS = {"smoke": 1, "quick": 1, "study": 30, "full": 30}  # at least so many searches, each with its seed
FIRST = 4000  # their first seed: no truth's

# The contest. A length is that of the last training, so that all arms end about as accurate, and what differs
# is the time until then. study: an epoch of 10,000 images takes some 5 s, all arms together some 16 last
# trainings.
HALVING, IMPROVED = "successive halving", "diagnose and grow"
HALVED = "successive halving on small images"
KEPT, CHANCE = "training on", "a candidate by chance"
TRIED, UNIFORM, ORACLE = "all candidates tried", "uniform growth", "right candidate from scratch"
CONTEST = {
    "smoke": dict(epochs=1.0, lengths=(1.0,), seeds=1),
    "quick": dict(epochs=1.0, lengths=(0.5, 1.0), seeds=1),
    "study": dict(epochs=3.0, lengths=(0.5, 1.0), seeds=5),
    "full": dict(epochs=10.0, lengths=(0.5, 1.0), seeds=5),
}
CONTESTED = {"smoke": 1, "quick": 1, "study": 2, "full": 2}  # patients
FIRST_CHOICE = ("stage 3 very narrow", "stage 1 wide")  # one lacks channels, one has too many
# Starting points: of what decides, of the share of the last training that the search on small images takes,
# and of the factor on what is new.
DECIDES, SEARCHED, NEWBORN = Forks(steps=24), 0.15, 2.0

# The second table: the known shape on small images, and what could beat it.
RESIZED, CUT, SWITCH = "known shape", "wide, cut at the switch", "small, grown at the switch"
GROWN, DENSE = "prune, then grow", "known shape, full size"
# Decisions of "prune, then grow" come at epochs' ends, so that the short presets take more epochs of fewer
# images. smoke: deeper, so that there is a block to grow.
SIZES = {
    "smoke": dict(epochs=5, widths={"widths": (8, 8, 8), "blocks": (1, 1, 2)}),
    "quick": dict(images=800, epochs=10, seeds=1),
    "study": dict(epochs=6, lengths=(0.5, 1.0), seeds=3),
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
# The thesis' letter: stop as soon as one more epoch improves nothing.
LETTER = {preset: {"mode": "thesis"} for preset in ("study", "full")}
CUTS = {"smoke": dict(multiple=2, price="FLOPs")}
FACTOR = 2  # what is wide inside of its blocks has so many times the known shape's channels


def start(task: Task) -> dict:
    """Return the settings of the network that grows.

    One block a stage of our ResNet; others are as they are.
    """
    if task.network != "resnet":
        return {}
    return {"blocks": tuple((max(2, w),) for w in task.widths.get("widths", (16, 32, 64)))}


def resizer(task: Task) -> KernelRescaling:
    """Return chapter 6.3's schedule of image sizes.

    From half the side to full, as that chapter runs it.
    """
    how = kernel_rescaling.SETTINGS.get(task.preset, {})
    return kernel_rescaling.method(task, task.load(), kernels=False, **how)


def procedure(task: Task, **changes) -> PruneThenGrow:
    """Return the method as a preset runs it, with changes."""
    return PruneThenGrow(**{**SETTINGS[task.preset], **changes})


def _contender(task):
    return Arm(name="", methods=(resizer(task), procedure(task)), network=start(task))


CONTENDERS = (
    Contender(GROWN, "II.9", ("the convolutions", "the norms", "the network", "the images"), _contender, 5),
)


def arms(task: Task) -> list[Arm]:
    """Return the known shape on small images, and its rivals.

    Quick leaves out the last control. Another network than our ResNet is not made wider or smaller.
    """
    resize = resizer(task)
    letter = procedure(task, **LETTER.get(task.preset, {}))
    found = [
        Arm(name=RESIZED, role="baseline", methods=(resize,)),
        *(_reshaped(task, resize) if task.network == "resnet" else []),
        Arm(name=GROWN, role="control", methods=(resize, letter), network=start(task)),
        Arm(name=DENSE, role="control"),
    ]
    return found[:-1] if task.preset == "quick" else found


def _reshaped(task, resize):
    """What changes its shape once, where images first become larger: it is cut, or it grows."""
    switch = resize.schedule[0][0]
    model = task.build(task.load())
    inside = [[block.inner for block in stage] for stage in model.stages]
    wide = {"blocks": tuple(tuple(FACTOR * n for n in stage) for stage in inside)}
    cut = RankedCut(share=1 - 1 / FACTOR, first=switch, latest=switch, **CUTS.get(task.preset, {}))
    more = tuple(f"stages.{i}.{j}" for i, stage in enumerate(inside) for j in range(len(stage) - 1))
    grow = Net2Net(at=switch, deeper=more, newborn=NEWBORN)
    return [
        Arm(name=CUT, methods=(resize, cut), network=wide),
        Arm(name=SWITCH, methods=(resize, grow), network=start(task)),
    ]


# The contest from a patient's checkpoint


def contest(task: Task) -> Task:
    """Return the task of the last training, from a patient's checkpoint."""
    return setting.ward(task).sized(CONTEST)


def contested(task: Task, patients: list[Patient]) -> list[Patient]:
    """Return the sick patients of a preset's contest.

    Those of the first choice come before others.
    """
    sick = sorted((p for p in patients if p.cure != KEEP), key=lambda p: p.name not in FIRST_CHOICE)
    return sick[: CONTESTED[task.preset]]


def contest_arms(task: Task, patient: Patient, table: dict[str, float], right: str = "") -> list[Arm]:
    """Return the procedure and its rivals on a patient.

    Smoke and quick have the first four. table: of step times. right: the candidate that is (default: the one
    against the planted defect). The lengths are the same for all: see `CONTEST`.
    """
    times = setting.prices(patient, table)
    how = dict(network=patient.settings, times=times, given=SEARCH[task.preset], newborn=NEWBORN)
    wider = tuple(c for c in times if c.startswith("widen"))
    decides = SHORT.get(task.preset, DECIDES)
    fits = {
        HALVING: Halving(**how),
        IMPROVED: Diagnosed(**how, diagnosis=decides, search=SEARCHED),
        KEPT: Improvement(**how, plan=(KEEP,)),
        CHANCE: Diagnosed(**how, diagnosis=RandomChoice(), side=1.0, pays=False),
        TRIED: AllTried(**how),
        HALVED: Halving(**how, side=0.5),
        UNIFORM: Improvement(**how, plan=wider),
        ORACLE: Oracle(**how, plan=(right or patient.cure,)),
    }
    roles = {HALVING: "baseline", IMPROVED: "method"}
    lengths = CONTEST[task.preset]["lengths"]
    found = [Arm(name=n, role=roles.get(n, "control"), fit=f, lengths=lengths) for n, f in fits.items()]
    return found[:4] if task.preset in SHORT else found


# Diagnoses


def diagnoses(task: Task) -> dict[str, Callable]:
    """Return the diagnoses that a preset compares.

    All; smoke and quick have two, made short, and chance.
    """
    if task.preset in SHORT:
        return {n: DIAGNOSES[n] for n in ("priced penalty", "random")} | {"forks": SHORT[task.preset]}
    return DIAGNOSES


def searches(task: Task, patients: int) -> range:
    """Return the seeds of each patient's searches: together there are enough."""
    return range(FIRST, FIRST + math.ceil(TRIALS[task.preset] / max(1, patients)))


def trials(task: Task, patients: list[Patient], table: dict[str, float]) -> list[dict]:
    """Search every patient several times and let each diagnosis rank its candidates.

    table: of step times. Returns a row for each (diagnosis, patient, seed, candidate): score, and seconds of
    the whole diagnosis. What was done before is taken from the cache.
    """
    mine, rows = setting.ward(task).but(epochs=SEARCH[task.preset]), []
    dataset, mean = mine.load(), diagnoses(task)
    for seed in searches(task, len(patients)):
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
