"""Chapter 4.1: what is trained: pruned gradients, a structured subset of them, a smaller exact network."""

from effilib.experiment import Arm
from effilib.methods.gradient_pruning import GradientPruning, GradientSubsets, zero_fraction
from effilib.tasks import Task

PRUNED, SUBSET = "pruned, p = 90%", "dW from half of the samples"
RATES = (0.7, 0.8, 0.9, 0.99)
SIZES = {
    "quick": dict(epochs=1),
    "study": dict(epochs=4),  # of the tuned network: four arms of up to a minute a training
}
GRID = {  # of what is only shown
    "smoke": dict(epochs=4),  # until the FIFO is full, and once more
    "quick": dict(epochs=0.8),
    "study": dict(epochs=2),
    "full": dict(epochs=10),
}
SETTINGS = {
    # dX stays exact, so that no layer adds to the noise of those behind it.
    SUBSET: GradientSubsets(keep=0.5, dx=None, dw="samples"),
    # About half of the elements become 0 (`zero_fraction`).
    PRUNED: GradientPruning(p=0.9),
}


def arms(task: Task) -> list[Arm]:
    """Return exact training, pruned gradients, the subset (not in quick), and the smaller network."""
    found = [Arm(name="exact", role="baseline"), Arm(name=PRUNED, methods=(SETTINGS[PRUNED],))]
    if task.preset != "quick":
        found.append(Arm(name=SUBSET, methods=(SETTINGS[SUBSET],)))
    return [*found, *smaller(task)]


def smaller(task: Task) -> list[Arm]:
    """Return the control: our own exact network, a block smaller, or with three quarters of the channels."""
    if task.network != "resnet":
        return []
    blocks = list(task.widths["blocks"])
    deepest = max(range(len(blocks)), key=lambda i: (blocks[i], i))
    network = {"widths": tuple(max(4, int(0.75 * w)) for w in task.widths["widths"])}
    if blocks[deepest] > 1:
        blocks[deepest] -= 1
        network = {"blocks": tuple(blocks)}
    return [Arm(name="smaller network, exact", role="control", network=network)]


def grid(task: Task) -> list[Arm]:
    """Return target rates and laws (quick: two), and in the study the subsets; all take the same steps."""
    methods = {f"p = {p:.0%}": GradientPruning(p=p) for p in RATES}
    methods["p = 90%, the batch's own tau"] = GradientPruning(fifo=0)
    alike = round(zero_fraction(0.9), 3)
    methods["lognormal, as many zeros"] = GradientPruning(p=alike, law="lognormal")
    if task.preset in ("study", "full"):
        methods |= {f"half: {name}": method for name, method in subsets().items()}
    else:
        methods = {n: methods[n] for n in ("p = 99%", "lognormal, as many zeros")}
    return [
        Arm(name="exact", role="baseline"),
        *(Arm(name=n, methods=(m,), lengths=task.lengths) for n, m in methods.items()),
    ]


def subsets(keep: float = 0.5) -> dict[str, GradientSubsets]:
    """Return the structured subsets by name."""
    return {
        "outputs for dX and dW": GradientSubsets(keep=keep),
        "outputs for dX, samples for dW": GradientSubsets(keep=keep, dw="samples"),
        "samples for dX and dW": GradientSubsets(keep=keep, dx="samples", dw="samples"),
        "samples for dW, dX exact": GradientSubsets(keep=keep, dx=None, dw="samples"),
    }
