"""Chapter 6.2: students that grow out of a teacher, the network from scratch, and every way to grow."""

from torch import nn

from effilib import models, surgery
from effilib.data import Dataset
from effilib.experiment import Arm
from effilib.methods.net2net import Grown
from effilib.tasks import Task

SCRATCH, GIVEN, COUNTED = "from scratch", "Net2Wider, teacher given", "Net2Wider, teacher counted"
SIZES = {
    "quick": dict(images=800, epochs=2, batch_size=32, lr=0.1, validation=125),
    "study": dict(epochs=4),
}

# Shares of the recipe's epochs (student, teacher), of its learning rate (student), of the widths (teacher):
# from trial runs with seeds that are not measured; nobody has tuned them for equal accuracy yet.
STUDENT = {
    "smoke": dict(epochs=0.5, lr=0.5, factor=0.5),
    "quick": dict(epochs=0.6, lr=0.7, factor=0.75, taught=0.5),
    "study": dict(epochs=0.6, lr=0.75, factor=0.75, taught=0.6),
    "full": dict(epochs=0.6, lr=0.75, factor=0.75, taught=0.6),
}


def _student(task, name, role="method", **settings):
    """A student at the task's lengths, whose teacher is the same at all of them."""
    fit = Grown(**STUDENT[task.preset] | settings, given=task.at(1.0).recipe)
    return Arm(name=name, role=role, fit=fit, lengths=task.lengths)


def arms(task: Task) -> list[Arm]:
    """Return the network from scratch, and students with and without the teacher's time."""
    found = [
        Arm(name=SCRATCH, role="baseline"),
        _student(task, GIVEN),
        Arm(name=COUNTED, fit=Grown(**STUDENT[task.preset], counted=True)),
    ]
    if task.preset != "quick":
        found.append(_student(task, "GradMax, teacher given", breaker="gradmax"))
    if task.preset in ("smoke", "full"):
        found.append(_student(task, "random pad, teacher given", role="control", breaker="random"))
    return found


def grid(task: Task, places: tuple[str, ...]) -> list[Arm]:
    """Return every way to grow, from the same teacher; `places` are where one more layer goes."""
    breakers = ("none", "noise", "uneven", "pair", "gradmax", "random")
    if task.preset == "quick":
        breakers = ("none", "noise", "random")
    found = [Arm(name=SCRATCH, role="baseline")]
    found += [_student(task, f"wider: {b}", breaker=b) for b in breakers]
    return [*found, *([_student(task, "deeper", factor=1.0, deeper=places)] if places else [])]


def deeper_places(task: Task, dataset: Dataset) -> tuple[str, ...]:
    """Return where one more layer can go.

    Behind the last block whose copy would fit, else behind the last ReLU in a Sequential.
    """
    model = task.build(dataset)
    if isinstance(model, models.ResNet):
        return (f"stages.{len(model.stages) - 1}.{len(model.stages[-1]) - 1}",)
    blocks = [p.name for p in surgery.trace(model).paths if not p.shortcut]
    holders = {
        n: model.get_submodule(n.rpartition(".")[0])
        for n, m in model.named_modules()
        if isinstance(m, nn.ReLU)
    }
    convs = [
        n
        for n, h in holders.items()
        if isinstance(h, nn.Sequential) and any(isinstance(m, nn.Conv2d) for m in h)
    ]
    return tuple([*blocks[-1:], *convs[-1:]][:1])
