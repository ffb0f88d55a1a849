"""Hold what a training run did and cost: its evaluations, times, FLOPs, events and final accuracies."""

import statistics as stats
from dataclasses import dataclass, field, replace

__all__ = ["History", "judge_"]


@dataclass
class History:
    """What a training run did and cost. `a + b` is one run after the other, on one clock.

    >>> once = History(rows=[{"step": 4, "epoch": 1, "seconds": 1.5, "accuracy": 90.0}], steps=4, seconds=1.5)
    >>> (once + once).rows[-1]
    {'step': 8, 'epoch': 2, 'seconds': 3.0, 'accuracy': 90.0}
    """

    # an evaluation each: step, epoch, seconds, train_loss, loss, accuracy (%), lr
    rows: list = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0  # on the clock, less stalls
    raw_seconds: float = 0.0  # on the clock
    step_times: list = field(default_factory=list)  # on CUDA: from which stalls are found across seeds
    kinds: dict = field(default_factory=dict)  # kind -> {count, seconds}
    flops: float = 0.0  # of all training steps, products only
    images: int = 0  # different training images
    seen: int = 0  # images trained on, each as often as it was
    final: float | None = None  # % of all held-out images (validation and test) at the end: what is judged
    single_crop: float | None = None  # % of the same images without multi-crop evaluation, where that is on
    balanced_accuracy: float = float("nan")  # %, mean over the classes of the same images
    held_out: int = 0  # how many they are
    majority: float = 0.0  # %, their largest class
    classes: int = 0
    memory: dict = field(default_factory=dict)  # bytes: parameters, optimizer, saved, peak (CUDA)
    test_accuracy: float | None = None  # %, read once, at the end
    warm_up: float = 0.0  # seconds, outside the clock
    events: list = field(default_factory=list)
    diverged: bool = False
    structure: dict = field(default_factory=dict)
    precision: str = ""

    @property
    def accuracy(self) -> float:
        """Accuracy at the end in %, on all held-out images."""
        return self.rows[-1]["accuracy"] if self.final is None else self.final

    @property
    def step_seconds(self) -> float:
        """Counted seconds of the whole run, over its steps."""
        return self.seconds / self.steps

    def __add__(self, other):
        later = {
            "seconds": self.seconds,
            "step": self.steps,
            "epoch": self.rows[-1]["epoch"] if self.rows else 0,
        }
        rows = self.rows + [{k: v + later.get(k, 0) for k, v in row.items()} for row in other.rows]
        events = self.events + [
            {k: v + later[k] if k in ("step", "epoch") else v for k, v in e.items()} for e in other.events
        ]
        kinds = dict(self.kinds)
        for kind, k in other.kinds.items():
            mine = kinds.get(kind, {"count": 0, "seconds": 0.0})
            kinds[kind] = {name: mine[name] + k[name] for name in mine}
        summed = ("steps", "seconds", "raw_seconds", "flops", "seen", "warm_up", "step_times")
        both = {**self.memory, **other.memory}
        return replace(
            other,
            rows=rows,
            events=events,
            kinds=kinds,
            images=max(self.images, other.images),
            memory={k: max(self.memory.get(k, 0), other.memory.get(k, 0)) for k in both},
            diverged=self.diverged or other.diverged,
            **{name: getattr(self, name) + getattr(other, name) for name in summed},
        )


def judge_(history: History, hits: list[list[list[int]]]) -> None:
    """Set a history's final accuracies.

    From [correct, all] by class on the validation and the test images.

    >>> judge_(history := History(), [[[8, 0], [8, 2]], [[7, 1], [8, 2]]])
    >>> history.final, history.test_accuracy, history.balanced_accuracy, history.held_out, history.majority
    (80.0, 80.0, 59.375, 20, 80.0)
    """
    correct, images = ([sum(n) for n in zip(*(h[i] for h in hits), strict=True)] for i in (0, 1))
    history.test_accuracy = 100 * sum(hits[-1][0]) / sum(hits[-1][1])
    history.held_out, history.classes = sum(images), len(images)
    history.final = 100 * sum(correct) / history.held_out
    history.balanced_accuracy = 100 * stats.fmean(c / n for c, n in zip(correct, images, strict=True) if n)
    history.majority = 100 * max(images) / history.held_out
