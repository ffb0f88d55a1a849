"""Patients: given networks with a planted defect, and what could be done about it (chapter II.9).

The thesis asks how to improve a given network. A diagnosis is tested on networks with known answers: the
residual trunk is the same in all of them, and the defect lies inside of its paths, in the channels between a
block's two convolutions, or in the number of blocks. Brute force finds what is right for each: every
candidate is trained for the same time, several times over.

A treatment exists twice: `treated` on a network's settings, a pure function, and `treat_` on a network in
training, by surgery. Both come to the same shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from effilib import clock, surgery
from effilib.dataset import Dataset
from effilib.errors import BadInput, choose
from effilib.methods.growth import strengths
from effilib.methods.net2net import grow_
from effilib.networks import ResNet
from effilib.recipe import LAYOUTS, resolve_layout
from effilib.run import Run
from effilib.tasks import Task

__all__ = [
    "ACTIONS", "KEEP", "PATIENTS", "Patient", "candidates", "step_times", "treat_", "treated",
]  # fmt: skip

KEEP = "keep"
ACTIONS = ("widen", "deepen", "narrow")
FACTOR = 2  # what "widen" and "narrow" multiply and divide a stage's inner widths by


@dataclass(frozen=True, kw_only=True)
class Patient:
    """Describe a network and its planted defect.

    blocks: per stage, its blocks' inner widths, see `ResNet`. cure: the candidate that acts against the
    defect.

    >>> Patient(name="narrow", blocks=((4,), (16,)), widths=(8, 16), cure="widen stage 1").settings
    {'widths': (8, 16), 'blocks': [[4], [16]]}
    """

    name: str
    blocks: tuple[tuple[int, ...], ...]
    cure: str
    widths: tuple[int, ...] = (32, 64, 128)

    @property
    def settings(self) -> dict:
        """Settings of the network, as `ResNet` takes them."""
        return {"widths": self.widths, "blocks": [list(inner) for inner in self.blocks]}


# What is healthy depends on the time that there is. In trials of two to three epochs, one seed each, 128
# channels inside of stage 3 and 32 inside of stage 1 lost two to three points against these at equal time, 64
# inside of stage 2 less than one.
HEALTHY = Patient(name="healthy", blocks=((16,), (32,), (32, 32)), cure=KEEP)
# More than are needed: `regret.chosen` leaves out those whose defect does not matter in the time there is.
PATIENTS = (
    HEALTHY,
    Patient(name="stage 1 narrow", blocks=((8,), (32,), (32, 32)), cure="widen stage 1"),
    Patient(name="stage 2 narrow", blocks=((16,), (16,), (32, 32)), cure="widen stage 2"),
    Patient(name="stage 2 very narrow", blocks=((16,), (8,), (32, 32)), cure="widen stage 2"),
    Patient(name="stage 3 narrow", blocks=((16,), (32,), (16, 16)), cure="widen stage 3"),
    Patient(name="stage 3 very narrow", blocks=((16,), (32,), (8, 8)), cure="widen stage 3"),
    Patient(name="stage 3 shallow", blocks=((16,), (32,), (32,)), cure="deepen stage 3"),
    Patient(name="stage 1 wide", blocks=((64,), (32,), (32, 32)), cure="narrow stage 1"),
    Patient(name="stage 1 very wide", blocks=((128,), (32,), (32, 32)), cure="narrow stage 1"),
)


def treated(settings: dict, candidate: str, multiple: int = 16) -> dict:
    """Return a ResNet's settings after a treatment.

    "widen stage s": twice the channels inside of its blocks, rounded up to a multiple. "deepen stage s": one
    more block, as wide inside as the last one, at most as the trunk. "narrow stage s": half the channels, at
    least one multiple. "keep": as they are. Raises `BadInput` for an unknown candidate, or one that changes
    nothing.

    >>> patient = {"widths": [16, 32], "blocks": [[16], [32, 32]]}
    >>> treated(patient, "widen stage 1")["blocks"], treated(patient, "deepen stage 1")["blocks"]
    ([[32], [32, 32]], [[16, 16], [32, 32]])
    >>> treated(patient, "narrow stage 2")["blocks"]
    [[16], [16, 16]]
    """
    widths, blocks = settings["widths"], settings["blocks"]
    blocks = [[w] * b if isinstance(b, int) else list(b) for w, b in zip(widths, blocks, strict=True)]
    if candidate == KEEP:
        return {**settings, "blocks": blocks}
    action, stage = parsed(candidate, len(blocks))
    inner = blocks[stage]
    if action == "widen":
        blocks[stage] = [multiple * -(-FACTOR * n // multiple) for n in inner]
    elif action == "narrow":
        blocks[stage] = [min(n, multiple * max(1, n // FACTOR // multiple)) for n in inner]
    else:
        blocks[stage] = [*inner, min(inner[-1] or widths[stage], widths[stage])]
    if blocks[stage] == inner:
        raise BadInput(f"{candidate}: it has {', '.join(map(str, inner))} channels inside, this changes none")
    return {**settings, "blocks": blocks}


def parsed(candidate, stages):
    """("widen", 0) of "widen stage 1"; stages: how many there are."""
    known = [KEEP, *(f"{a} stage {i + 1}" for a in ACTIONS for i in range(stages))]
    action, _, number = choose("candidate", candidate, known).partition(" stage ")
    return action, int(number) - 1


def candidates(settings: dict, multiple: int = 16) -> dict[str, dict]:
    """Return what can be done to a network.

    Candidate -> the settings that it would have. To keep it, to widen or deepen any of its stages, to narrow
    the first, whose maps are the largest; what would change nothing is left out.

    >>> list(candidates({"widths": [16, 32], "blocks": [1, 1]}))
    ['keep', 'widen stage 1', 'widen stage 2', 'deepen stage 1', 'deepen stage 2']
    """
    stages = range(1, 1 + len(settings["widths"]))
    names = [KEEP, *(f"{a} stage {i}" for a in ("widen", "deepen") for i in stages), "narrow stage 1"]
    found = {}
    for name in names:
        try:
            found[name] = treated(settings, name, multiple)
        except BadInput:  # it is as narrow as can be
            continue
    return found


def treat_(
    model: nn.Module,
    candidate: str,
    x: torch.Tensor,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    multiple: int = 16,
    generator: torch.Generator | None = None,
) -> None:
    """Treat a ResNet in place, at any moment of its training.

    What grows keeps the function: new channels come in pairs that write with opposite signs, a new block has
    zero in its last BatchNorm's scale. Narrowing keeps the channels that are read most. x: (N, C, H, W), a
    batch as in training. Raises `BadInput` as `treated` does, or for a network that is no ResNet of ours.

    >>> net, x = build("resnet", 4, (1, 8, 8), widths=(8, 16), blocks=(1, 1)), torch.rand(4, 1, 8, 8)
    >>> treat_(net, "widen stage 2", x)
    >>> net.settings()["blocks"]
    [[8], [32]]
    """
    if not isinstance(model, ResNet):
        raise BadInput(f"only our ResNets can be treated, this network is a {type(model).__name__}")
    goal = treated(model.settings(), candidate, multiple)["blocks"]
    if candidate == KEEP:
        return
    action, stage = parsed(candidate, len(goal))
    inner = [f"stages.{stage}.{j}.conv1" for j in range(len(model.stages[stage]))]
    if action == "deepen":
        grow_(model, optimizer, x, None, deeper=(f"stages.{stage}.{len(inner) - 1}",), generator=generator)
        new = surgery.trace(model)[f"stages.{stage}.{len(inner)}.conv1"]
        surgery.select_(new, range(goal[stage][-1]), optimizer)  # it adds nothing yet, whatever its width
    elif action == "widen":
        wider = tuple((name, q) for name, q in zip(inner, goal[stage], strict=True) if q)
        grow_(model, optimizer, x, None, wider=wider, breaker="pair", generator=generator)
    else:
        for name, width in zip(inner, goal[stage], strict=True):
            if not width:  # a block without a path
                continue
            node = surgery.trace(model)[name]
            strongest = strengths(node, "readers").topk(width).indices.sort().values
            surgery.select_(node, strongest, optimizer)


def step_times(
    task: Task, dataset: Dataset, networks: Sequence[dict], *, repeats: int = 15, seconds: float | None = None
) -> list[float]:
    """Time a training step of several ResNets; return medians in milliseconds.

    In turn. networks: their settings. The learning rate is 0, so that nothing is learned.

    >>> t = task("smoke", "synthetic")
    >>> len(step_times(t, t.load(), [{"widths": (8, 8), "blocks": (1, n)} for n in (1, 2)], repeats=3))
    2
    """
    x, y = next(iter(dataset.shuffled(task.recipe.batch_size, torch.Generator().manual_seed(0))))

    def step(settings):
        recipe = replace(task.recipe, compile=False)
        layout = LAYOUTS[resolve_layout(recipe, dataset.device)]
        model = task.build(dataset, **settings).to(memory_format=layout).train()
        run = Run(model, dataset, recipe, (), seed=0)
        run.schedule.lr_at = lambda position, planned: 0.0
        run.settle()
        return lambda: run.train_step(x.contiguous(memory_format=layout), y)

    steps = {str(i): step(settings) for i, settings in enumerate(networks)}
    times = clock.interleaved(steps, repeats=repeats, device=dataset.device, seconds=seconds)
    return [1e3 * sorted(t)[len(t) // 2] for t in times.values()]
