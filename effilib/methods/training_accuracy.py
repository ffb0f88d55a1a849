"""Note the accuracy on training images, beside which that on held-out ones shows overfitting."""

import math
from dataclasses import dataclass

from effilib.errors import within
from effilib.evaluation import evaluate
from effilib.history import History
from effilib.hooks import Method
from effilib.run import Run

__all__ = ["TrainingAccuracy", "training_accuracy"]


@dataclass(frozen=True, kw_only=True)
class TrainingAccuracy(Method):
    """Note the accuracy on training images at the end.

    In eval mode, off the clock.

    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(4, 8))
    >>> history = train(net, data, Recipe(epochs=1), [TrainingAccuracy()])
    >>> training_accuracy(history) == evaluate(net, data, "train")[1]
    True
    """

    images: int = 1000  # at most: the first ones

    def __post_init__(self):
        within("training accuracy: images", self.images, "a whole number above 0")

    def on_fit_end(self, run: Run) -> None:
        with run.clock.paused():
            few = run.dataset.limit(min(self.images, len(run.dataset.train)))
            accuracy = evaluate(run.model, few, "train", run.precision)[1]
        run.log(self, f"{accuracy:.2f} % of the training images", training_accuracy=accuracy)


def training_accuracy(history: History) -> float:
    """Return what `TrainingAccuracy` noted, in %; nan where it did not.

    >>> training_accuracy(History())
    nan
    """
    noted = [e["training_accuracy"] for e in history.events if "training_accuracy" in e]
    return noted[-1] if noted else math.nan
