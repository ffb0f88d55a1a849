"""Chapter 6.2: students that grow out of a teacher or in one run, and every way to grow."""

from torch import nn

from effilib import networks, surgery, tuning
from effilib.chapters import kernel_rescaling
from effilib.dataset import Dataset
from effilib.experiment import Arm, Contender
from effilib.methods import narrower
from effilib.methods.narrower import Narrower
from effilib.methods.net2net import Grown, OneRun
from effilib.tasks import Task

SCRATCH, GIVEN, ONE = "from scratch", "Net2Deeper, teacher given", "one run that grows"
SMALL = "the small network from scratch"
HALVED, RESIZED = "one run, half the side until it grows", "half the side, no growth"
SIZES = {
    "quick": dict(images=640, epochs=2, batch_size=32, lr=0.1, validation=125),
    "study": dict(epochs=4, seeds=3),  # six arms
}
# Deep enough for a teacher by depth: half of 16 channels is no faster. Quick's base network has 1/1/2 blocks.
DEEP = {
    "smoke": {"widths": (8, 8, 8), "blocks": (1, 1, 2)},
    "study": {"widths": (16, 32, 64), "blocks": (2, 2, 2)},
}

# Shares of the recipe's epochs (student, teacher) and of its learning rate (student): from trial runs with
# seeds that are not measured; nobody has tuned them for equal accuracy yet.
STUDENT = {
    "smoke": dict(epochs=0.5, lr=0.5),
    "quick": dict(epochs=0.6, lr=0.7, taught=0.5),
    "study": dict(epochs=0.6, lr=0.75, taught=0.6),
    "full": dict(epochs=0.6, lr=0.75, taught=0.6),
}
# When it grows, and how long the learning rate is held: not tuned yet either.
RUN = {preset: dict(at=0.4, hold=0.6) for preset in STUDENT}


def deep(task: Task) -> Task:
    """Return the task on a network that is deep enough to have a shallower teacher."""
    task = task.sized(SIZES)
    found = DEEP.get(task.preset)
    return task.but(widths=found) if found and task.network == "resnet" else task


def teacher(task: Task) -> tuple:
    """Return the settings of a shallower network, as items: a block a stage; () where there is none."""
    blocks = task.widths.get("blocks", ())
    return (
        (("blocks", (1,) * len(blocks)),) if task.network == "resnet" and max(blocks, default=1) > 1 else ()
    )


def thin_(model: nn.Module) -> tuple:
    """Give a network half of its widths in place, in multiples of 16 where it has as many."""
    return narrower.thin_(model, **HALF)


HALF = dict(factor=0.5, multiple=16)


def growth(task: Task) -> dict:
    """Return how the network of a task is small at first: by depth, else by width."""
    small = teacher(task)
    if not small:
        return HALF if task.preset != "smoke" else dict(HALF, multiple=1)
    blocks = enumerate(task.widths["blocks"])
    return dict(small=small, deeper=tuple(f"stages.{i}.{j}" for i, n in blocks for j in range(n - 1)))


def _student(task, name, role="method", **settings):
    """A student at the task's lengths, whose teacher is the same at all of them."""
    fit = Grown(**STUDENT[task.preset] | settings, given=task.at(1.0).recipe)
    return Arm(name=name, role=role, fit=fit, lengths=task.lengths)


def one_run(task: Task, name: str = ONE, **settings) -> Arm:
    """Return the run that begins small and grows once."""
    return Arm(name=name, fit=OneRun(**growth(task), **RUN[task.preset] | settings))


CONTENDERS = (Contender("Net2Net", "6.2", ("the network",), one_run),)


def arms(task: Task) -> list[Arm]:
    """Return the network from scratch, a given teacher's student, one run that grows, the small network.

    In study and full also the run whose images are small until it grows, and the same without a growth.
    """
    small = dict(teacher(task))
    how = dict(network=small) if small else dict(fit=Narrower(**growth(task)))
    control = Arm(name=SMALL, role="control", **how)
    student = _student(task, GIVEN, **growth(task))
    found = [Arm(name=SCRATCH, role="baseline"), student, one_run(task), control]
    if task.preset in ("study", "full"):
        at = RUN[task.preset]["at"]
        resize = kernel_rescaling.method(
            task, task.load(), kernels=False, schedule=((at, 0.5), (1 - at, 1.0))
        )
        found.append(one_run(task, HALVED, methods=(resize,)))
        found.append(Arm(name=RESIZED, role="control", methods=(resize,)))
    return tuning.settled(task, found, SWEEP.name)


def grid(task: Task, places: tuple[str, ...]) -> list[Arm]:
    """Return every way to grow, from the same teachers; `places` are where one more layer goes."""
    breakers = ("none", "noise", "uneven", "pair", "gradmax", "random")
    if task.preset == "quick":
        breakers = ("noise", "random")
    half = HALF if task.preset != "smoke" else dict(HALF, multiple=1)
    found = [Arm(name=SCRATCH, role="baseline")]
    found += [_student(task, f"wider: {b}", breaker=b, **half) for b in breakers]
    if places:
        found.append(_student(task, "one layer more", deeper=places))
    if task.preset != "quick":
        early, late = dict(at=0.25, hold=0.5), dict(at=0.55, hold=0.7)
        found += [one_run(task, "one run, early", **early), one_run(task, "one run, late", **late)]
        found += [one_run(task, f"one run, newborns x {f}", newborn=f) for f in (0.5, 2.0)]
    return found


def deeper_places(task: Task, dataset: Dataset) -> tuple[str, ...]:
    """Return where one more layer can go.

    Behind the last block whose copy would fit, else behind the last ReLU in a Sequential.
    """
    model = task.build(dataset)
    if isinstance(model, networks.ResNet):
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


SWEEP = tuning.Sweep("06_2", deep, arms)
