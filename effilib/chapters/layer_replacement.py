"""Chapter 6.4, the word taken literally: what is trained: replaced layers, and the same network narrower."""

from effilib import surgery
from effilib.errors import BadInput
from effilib.experiment import Arm
from effilib.methods.layer_replacement import LayerReplacement
from effilib.methods.narrower import Narrower
from effilib.tasks import Task

BUDGET = 0.6
BUDGETS = (0.75, 0.6, 0.5, 0.35)  # of the grid
NARROW = 0.7  # of every width, in blocks of 16 channels: about the same time a step as the replaced network
DENSE, REPLACED, NARROWED = "as built", f"replaced, budget {BUDGET:g}", "narrower, as built"
SIZES = {
    "quick": dict(images=640, epochs=1.2, batch_size=32, lr=0.1),  # 24 steps of a wide network
    "study": dict(epochs=2.5),
}
SETTINGS = {  # of the search: fewer rounds and candidates where there is no time for them
    "smoke": dict(repeats=3),
    "quick": dict(repeats=3, candidates=("bneck/2", "lowrank/4")),
}


def wide(task: Task) -> Task:
    """Return the task on the wide network, of whose step convolutions are the larger part."""
    return task.wide().sized(SIZES)


def method(preset: str, budget: float = BUDGET) -> LayerReplacement:
    """Return layer replacement as a preset runs it."""
    return LayerReplacement(budget=budget, **SETTINGS.get(preset, {}))


def arms(task: Task) -> list[Arm]:
    """Return as built, replaced, and the control that could beat it: the same network, narrower."""
    # quick: the search takes longer than a whole training, and no shorter one would make up for it
    own = task.lengths if task.preset == "quick" else ()
    narrower = Narrower(factor=NARROW, multiple=2 if task.preset == "smoke" else 16)
    found = [
        Arm(name=DENSE, role="baseline"),
        Arm(name=REPLACED, fit=method(task.preset), lengths=own),
        Arm(name=NARROWED, role="control", fit=narrower),
    ]
    try:
        surgery.nodes(task.build(task.load()))
    except BadInput:  # its widths cannot be changed
        return found[:2]
    return found


def grid(task: Task) -> list[Arm]:
    """Return as built, and other budgets."""
    found = [Arm(name=DENSE, role="baseline")]
    for b in BUDGETS:
        if b != BUDGET:
            found.append(Arm(name=f"budget {b:g}", fit=method(task.preset, b), lengths=task.lengths))
    return found
