"""Chapter 6.4, the word taken literally: what is trained: layers chosen under a budget, uniform narrowing."""

from effilib import surgery, tuning
from effilib.errors import BadInput
from effilib.experiment import Arm, Contender
from effilib.methods.layer_candidates import CANDIDATES
from effilib.methods.layer_replacement import LayerReplacement
from effilib.methods.narrower import Narrower
from effilib.tasks import Task

BUDGET = 0.6
BUDGETS = (0.75, 0.6, 0.5, 0.35)  # of the grid
NARROW = 0.7  # of every width, in blocks of 16 channels: about the same time a step as the chosen network
DENSE, CHOSEN, NARROWED = "as built", f"layers chosen, budget {BUDGET:g}", "uniformly narrower"
SIZES = {
    "quick": dict(images=640, epochs=1.2, batch_size=32, lr=0.1),  # 24 steps of a wide network
    "study": dict(epochs=2.5),
}
SETTINGS = {  # of the search: fewer rounds and candidates where there is no time for them
    "smoke": dict(repeats=3, block=2, candidates=("bneck/2", "lowrank/4")),
    "quick": dict(repeats=3, candidates=("bneck/2", "lowrank/4")),
    # the others were hardly ever taken, or are slower than what they replace (the notebook's table of costs)
    "study": dict(candidates=("group/4", "bneck/2", "lowrank/4", "bneck/4")),
}


def wide(task: Task) -> Task:
    """Return the task on the wide network, of whose step convolutions are the larger part."""
    return task.wide().sized(SIZES)


def method(preset: str, budget: float = BUDGET, **settings) -> LayerReplacement:
    """Return layer replacement as a preset runs it."""
    return LayerReplacement(budget=budget, **SETTINGS.get(preset, {}) | settings)


def _contender(task):
    return Arm(name="", fit=method(task.preset))


CONTENDERS = (Contender("layer replacement", "6.4", ("the convolutions", "the network"), _contender),)


def arms(task: Task) -> list[Arm]:
    """Return as built, layers chosen, and the control that could beat it: all layers narrower alike."""
    # quick: the search takes longer than a whole training, and no shorter one would make up for it
    own = task.lengths if task.preset == "quick" else ()
    narrower = Narrower(factor=NARROW, multiple=2 if task.preset == "smoke" else 16)
    found = [
        Arm(name=DENSE, role="baseline"),
        Arm(name=CHOSEN, fit=method(task.preset), lengths=own),
        Arm(name=NARROWED, role="control", fit=narrower),
    ]
    try:
        surgery.nodes(task.build(task.load()))
    except BadInput:  # its widths cannot be changed
        found = found[:2]
    return tuning.settled(task, found, SWEEP.name)


def grid(task: Task) -> list[Arm]:
    """Return as built, cuts or other structures alone, all candidates, and other budgets."""
    fits = {
        "cuts alone": method(task.preset, candidates=()),
        "other structures alone": method(task.preset, block=0),
        "all candidates": method(task.preset, candidates=CANDIDATES),
    }
    fits |= {f"budget {b:g}": method(task.preset, b) for b in BUDGETS if b != BUDGET}
    made = [Arm(name=name, fit=fit, lengths=task.lengths) for name, fit in fits.items()]
    return [Arm(name=DENSE, role="baseline"), *made]


SWEEP = tuning.Sweep("06_4", wide, arms)
