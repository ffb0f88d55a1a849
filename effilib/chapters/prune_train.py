"""Chapter 6.1: PruneTrain, one cut by ranking, and the networks that they are compared with."""

from dataclasses import replace

from effilib import experiment, tuning
from effilib.chapters import kernel_rescaling
from effilib.experiment import Arm, Contender
from effilib.history import History
from effilib.methods.narrower import Smaller
from effilib.methods.prune_train import PruneTrain
from effilib.methods.ranked_cut import RankedCut
from effilib.tasks import Task

DENSE, PRUNED, RANKED = "dense", "PruneTrain", "one cut by ranking"
SMALLER, HALVED = "the ranked network from scratch", "one cut by ranking, half the side until then"
SIZES = {
    "quick": dict(images=416, epochs=2, batch_size=16, lr=0.1, validation=125),  # 52 steps of a wide network
    "study": dict(epochs=2.5),
}

# What the short presets change of the published method, from trial runs with seeds that are not measured.
# Their penalty shrinks a group as far as the published one in a fraction of the steps (scale). So strong a
# penalty would shrink what lives too (keep_scale) and kill a classifier's small columns first (weigh), and it
# is over before producers die as well (rule).
SHORT = dict(scale="schedule", weigh="norm", rule="readers", keep_scale=True)
SETTINGS = {  # until, at: shares of a run, so that schedules scale with its length
    "smoke": dict(SHORT, ratio=0.2, until=0.6, at=(0.5,), multiple=2),  # 8 channels: no multiples of 16
    "quick": dict(SHORT, ratio=0.05, until=0.5, at=(0.5,)),  # 52 steps don't recover from what 0.1 cuts
    # 0.2 within 15 % of so short a run leaves 16 channels everywhere; what is left recovers in the other 70 %
    "study": dict(SHORT, ratio=0.1, until=0.3, at=(0.15, 0.3)),
    # published, but for the scale: a cut after every 10 of 182 epochs, the penalty to the end
    "full": dict(scale="schedule", ratio=0.2, at=tuple(i / 20 for i in range(1, 20))),
}


# The share of what channels cost that the one cut takes, not tuned yet. Smoke's layers have 8 channels; in
# quick a run takes a second, too little to pay for measuring.
CUT = {
    "smoke": dict(share=0.3, multiple=2, price="FLOPs"),
    "quick": dict(share=0.3, price="FLOPs"),
    "study": dict(share=0.5),
    "full": dict(share=0.5),
}


def wide(task: Task) -> Task:
    """Return the task on the wide network, from which pruning starts."""
    return task.wide().sized(SIZES)


def method(preset: str, ratio: float | None = None) -> PruneTrain:
    """Return PruneTrain as a preset runs it, or with another ratio."""
    found = PruneTrain(**SETTINGS[preset])
    return found if ratio is None else replace(found, ratio=ratio)


def _contender(task):
    return Arm(name="", methods=(method(task.preset),))


CONTENDERS = (Contender(PRUNED, "6.1", ("the convolutions", "the norms"), _contender, 4),)


def ranked(preset: str) -> RankedCut:
    """Return the one cut as a preset makes it."""
    return RankedCut(**CUT[preset])


def pilot(task: Task) -> History:
    """Train the one cut with a seed that is never measured: its widths are the control's."""
    return experiment.pilot(task, Arm(name=RANKED, methods=(ranked(task.preset),)), title="pilot for widths")


def smaller(pilot: History) -> Arm:
    """Return the control that could beat both: the network that a pilot ends with, from the start."""
    arm = Arm(name=SMALLER, role="control")
    if pilot.structure:
        return replace(arm, network=pilot.structure)
    final = pilot.events[-1]["widths"][-1]
    done = [text for e in pilot.events for text in e.get("pruned", ())]
    removed = tuple(text.split()[2] for text in done if text.startswith("residual path"))
    return replace(arm, fit=Smaller(widths=tuple((n, w) for n, (w, _) in final.items()), removed=removed))


def arms(task: Task, pilot: History) -> list[Arm]:
    """Return dense, PruneTrain, the one cut, and the network that it finds.

    In study and full also the one cut at the moment when images, small until then, become large: a wide
    network costs little on small images.
    """
    cut = ranked(task.preset)
    found = [
        Arm(name=DENSE, role="baseline"),
        Arm(name=PRUNED, methods=(method(task.preset),)),
        Arm(name=RANKED, methods=(cut,)),
        smaller(pilot),
    ]
    if task.preset in ("study", "full"):
        at = cut.latest
        half = ((at, 0.5), (1 - at, 1.0))
        resize = kernel_rescaling.method(task, task.load(), kernels=False, schedule=half)
        found.append(Arm(name=HALVED, methods=(resize, replace(cut, first=at))))
    return tuning.settled(task, found, SWEEP.name)


def grid(task: Task) -> list[Arm]:
    """Return dense, and PruneTrain with half and twice its ratio, at the task's own lengths."""
    factors = (0.5, 2) if task.preset == "quick" else (0.5, 1, 2)
    ratios = [factor * SETTINGS[task.preset]["ratio"] for factor in factors]
    pruned = [Arm(name=f"r = {r:g}", methods=(method(task.preset, r),), lengths=task.lengths) for r in ratios]
    return [Arm(name=DENSE, role="baseline"), *pruned]


SWEEP = tuning.Sweep("06_1", wide, lambda t: arms(t, pilot(t)))
