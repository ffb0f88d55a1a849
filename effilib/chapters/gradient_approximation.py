"""Chapter 4.2: what is trained: a prefix that freezes, replaced weight gradients, a smaller exact network."""

from effilib import tuning
from effilib.chapters.gradient_pruning import smaller
from effilib.experiment import Arm, Contender
from effilib.methods.freezing import FrozenPrefix
from effilib.methods.gradient_approximation import GradientApproximation
from effilib.tasks import Task

FROZEN, ZERO = "frozen prefix", "zero, S1"
SCHEDULES = ("S1", "S2", "S3")
RESNET_20 = {"widths": (16, 32, 64), "blocks": (3, 3, 3)}  # published, with ResNet-14 beside it
SIZES = {
    "quick": dict(epochs=0.7),
    "study": dict(epochs=2, widths=RESNET_20),
}
GRID = {  # of what is only shown
    "quick": dict(epochs=0.4),
    "study": dict(epochs=1),
    "full": dict(epochs=5),
}
SETTINGS = {
    # A quarter of all pairs of layer and batch, as the published schedules have, would be half of the layers
    # in the last half of the batches; the layers on the largest maps are fewer, and cost more.
    FROZEN: FrozenPrefix(at=(0.5,)),
    ZERO: GradientApproximation(how="zero", schedule="S1"),
}
CONTENDERS = (
    Contender(
        "gradient approximation",
        "4.2",
        ("the convolutions", "the norms"),
        lambda task: Arm(name="", methods=(SETTINGS[FROZEN],)),
        3,
    ),
)


def arms(task: Task) -> list[Arm]:
    """Return exact training, the frozen prefix, zero gradients (not in quick), and the smaller network."""
    names = (FROZEN,) if task.preset == "quick" else (FROZEN, ZERO)
    methods = [Arm(name=n, methods=(SETTINGS[n],)) for n in names]
    return tuning.settled(task, [Arm(name="exact", role="baseline"), *methods, *control(task)], SWEEP.name)


def control(task: Task) -> list[Arm]:
    """Return the smaller exact network: ResNet-14 for ResNet-20, else a block less."""
    if task.network == "resnet" and task.widths.get("blocks") == (3, 3, 3):
        return [Arm(name="ResNet-14, exact", role="control", network={"blocks": (2, 2, 2)})]
    return smaller(task)


def grid(task: Task) -> list[Arm]:
    """Return replacements, schedules and prefixes (quick: some); all take the same steps."""
    few = task.preset in ("smoke", "quick")
    pairs = [(how, s) for how in ("zero", "random", "top", "unbiased") for s in SCHEDULES]
    pairs = [("zero", "S1"), ("top", "S1")] if few else pairs
    methods = {f"{how}, {s}": GradientApproximation(how=how, schedule=s) for how, s in pairs}
    if not few:
        methods["skip the parameter, S1"] = GradientApproximation(how="skip", schedule="S1")
        methods["top at scale 1, S1"] = GradientApproximation(how="top", schedule="S1", scale=1.0)
        methods["frozen from 30%"] = FrozenPrefix(at=(0.3,))
        methods["frozen, annealed before"] = FrozenPrefix(at=(0.5,), anneal=True)
        methods["frozen, one more size of maps from 75%"] = FrozenPrefix(at=(0.5, 0.75))
    methods["frozen from 50%"] = FrozenPrefix(at=(0.5,))
    return [
        Arm(name="exact", role="baseline"),
        *(Arm(name=n, methods=(m,), lengths=task.lengths) for n, m in methods.items()),
    ]


SWEEP = tuning.Sweep("04_2", lambda t: t.sized(SIZES), arms)
