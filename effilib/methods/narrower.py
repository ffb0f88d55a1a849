"""The control that many chapters have: the same network, narrower, trained from scratch."""

from dataclasses import dataclass

import torch
from torch import nn

from effilib import models, surgery
from effilib.data import Dataset
from effilib.tasks import Task
from effilib.training import History, stream, train

__all__ = ["Narrower", "narrow", "thin_"]


@torch.no_grad()
def thin_(model: nn.Module, factor: float = 0.5, multiple: int = 1) -> tuple[tuple[str, int], ...]:
    """Narrow an untrained network in place.

    Keeps the first channels of every node, `factor` of them in whole multiples. Returns ((node, width
    before), ...), which `Net2Net(wider=...)` takes to make the larger one of it again.

    >>> net = build("convnet", 4, (1, 8, 8), widths=(4, 8))
    >>> thin_(net, 0.5), net.settings()["widths"]
    ((('features.0', 4), ('features.4', 8)), [[2], [4]])
    """
    before = []
    for node in surgery.nodes(model):
        before.append((node.name, node.width))
        q = min(node.width, max(1, round(factor * node.width / multiple)) * multiple)
        surgery.select_(node, range(q))
    return tuple(before)


def narrow(
    task: Task, dataset: Dataset, seed: int, factor: float, multiple: int = 1, **settings
) -> tuple[nn.Module, tuple[tuple[str, int], ...]]:
    """Return the task's network narrowed, and its nodes' full widths.

    It is initialised as it is at these widths. settings: of the network, instead of the task's. A factor of 1
    or more leaves it.

    >>> t = task("smoke", "synthetic")
    >>> narrow(t, t.load(), 0, 0.5)[0].settings()["widths"]
    [4, 4, 4]
    """
    model = task.build(dataset, seed, **settings)
    before = thin_(model, factor, multiple) if factor < 1 else ()
    if before and task.network in models.NETWORKS:
        models.initialize_(model, stream(seed, "initial weights").initial_seed())
    return model, before


@dataclass(frozen=True, kw_only=True)
class Narrower:
    """Train the task's network with `factor` of every width. For `Arm.fit`: (task, seed) -> `History`.

    multiple: widths are rounded to multiples of it. For networks whose widths no setting changes too. Raises
    `BadInput` where no structure can be read.

    >>> Narrower(factor=0.5)(task("smoke", "synthetic").at(0.5), seed=0).structure["widths"]
    [4, 4, 4]
    """

    factor: float
    multiple: int = 1

    def __call__(self, task: Task, seed: int) -> History:
        dataset = task.load()
        model, _ = narrow(task, dataset, seed, self.factor, self.multiple)
        return train(model, dataset, task.recipe, (), seed)
