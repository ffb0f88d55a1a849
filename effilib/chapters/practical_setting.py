"""Chapter II.8: what is trained: the baseline, and the same again with other seeds."""

from effilib.experiment import Arm
from effilib.tasks import Task
from effilib.training import History, train

SIZES = {"quick": dict(epochs=1.6)}  # both arms are the baseline: the same noise shows in less time
OTHER = 50  # seeds away: none that another cell has, with up to so many cells a length


def arms(task: Task) -> list[Arm]:
    """Return the baseline twice: what differs between the two is noise."""
    again = Arm(name="other seeds", role="control", fit=other_seeds, lengths=task.lengths)
    return [Arm(name="baseline", role="baseline"), again]


def other_seeds(task: Task, seed: int) -> History:
    """Train the baseline with other weights and another order of images."""
    dataset = task.load()
    return train(task.build(dataset, seed + OTHER), dataset, task.recipe, seed=seed + OTHER)
