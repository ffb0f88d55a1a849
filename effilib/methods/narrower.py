"""Train the control that many chapters have: the same network, narrower, from scratch."""

from dataclasses import dataclass

import torch
from torch import nn

from effilib import networks, surgery
from effilib.dataset import Dataset
from effilib.history import History
from effilib.seeds import stream
from effilib.tasks import Task
from effilib.training import train

__all__ = ["Narrower", "Smaller", "narrow", "thin_"]


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
    if before and task.network in networks.NETWORKS:
        networks.initialize_(model, stream(seed, "initial weights").initial_seed())
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


@dataclass(frozen=True, kw_only=True)
class Smaller:
    """Train from scratch a network that is cut before its first step.

    For networks that have no settings of their own: (task, seed) -> `History`. widths: (node, width) of each
    node; removed: residual paths that are taken out first.

    >>> t = task("smoke", "synthetic")
    >>> Smaller(widths=(("stem", 4),))(t, seed=0).structure["widths"][0]
    4
    """

    widths: tuple[tuple[str, int], ...]
    removed: tuple[str, ...] = ()

    def __call__(self, task: Task, seed: int) -> History:
        """Train it at the task's length."""
        dataset = task.load()
        model = task.build(dataset, seed)
        for path in self.removed:
            surgery.remove_path_(surgery.trace(model).path(path))
        found = surgery.trace(model)
        for node, width in self.widths:
            surgery.select_(found[node], range(width))
        return train(model, dataset, task.recipe, (), seed)
