"""The control that many chapters have: the same network, narrower, trained from scratch."""

from dataclasses import dataclass

from effilib import models, surgery
from effilib.tasks import Task
from effilib.training import History, stream, train

__all__ = ["Narrower"]


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
        model = task.build(dataset, seed)
        for node in surgery.nodes(model):
            width = max(1, round(self.factor * node.width / self.multiple)) * self.multiple
            surgery.select_(node, range(min(node.width, width)))
        if task.network in models.NETWORKS:  # as it is initialised at these widths
            models.initialize_(model, stream(seed, "initial weights").initial_seed())
        return train(model, dataset, task.recipe, (), seed)
