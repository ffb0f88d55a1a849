"""Chapter 4.1: what is trained: pruned gradients, backward passes on some samples, a smaller network."""

from effilib import tuning
from effilib.experiment import Arm, Contender
from effilib.methods.backward_sampling import BackwardSampling
from effilib.methods.gradient_pruning import GradientPruning, zero_fraction
from effilib.methods.gradient_subsets import GradientSubsets
from effilib.tasks import Task

PRUNED, SAMPLED, SMALLER = "pruned, p = 90%", "samples by norm", "smaller network, exact"
RATES = (0.7, 0.8, 0.9, 0.99)  # target rates of pruning
SIZES = {
    "quick": dict(epochs=0.6),
    "study": dict(epochs=4),  # of the tuned network: four arms of up to a minute a training
}
GRID = {  # of what is only shown
    "smoke": dict(epochs=4),  # until the FIFO is full, and once more
    "quick": dict(epochs=0.8),
    "study": dict(epochs=2),
    "full": dict(epochs=10),
}
SETTINGS = {
    # About half of the elements become 0 (`zero_fraction`).
    PRUNED: GradientPruning(p=0.9),
    # As many samples as train fastest, which are fewer and fewer; in the beginning, when they are alike, all.
    SAMPLED: BackwardSampling(begin=0.25),
}
CONTENDERS = (
    Contender(
        "sampled backward passes",
        "4.1",
        ("the convolutions", "the norms"),
        lambda task: Arm(name="", methods=(SETTINGS[SAMPLED],)),
        3,
    ),
)


def arms(task: Task) -> list[Arm]:
    """Return exact training, pruned gradients, sampled backward passes, and the smaller network."""
    methods = [Arm(name=n, methods=(m,)) for n, m in SETTINGS.items()]
    return tuning.settled(task, [Arm(name="exact", role="baseline"), *methods, *smaller(task)], SWEEP.name)


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
    return [Arm(name=SMALLER, role="control", network=network)]


def grid(task: Task) -> list[Arm]:
    """Return target rates and laws (quick: one), samples, and random subsets; all take the same steps."""
    methods = {f"p = {p:.0%}": GradientPruning(p=p) for p in RATES}
    methods["p = 90%, the batch's own tau"] = GradientPruning(fifo=0)
    alike = round(zero_fraction(0.9), 3)
    methods["lognormal, as many zeros"] = GradientPruning(p=alike, law="lognormal")
    if task.preset in ("study", "full"):
        methods["samples, the most efficient number"] = SETTINGS[SAMPLED]
        methods |= {f"samples, tau = {tau:g}": BackwardSampling(tau=tau) for tau in (0.03, 0.1)}
        methods["half of the samples"] = BackwardSampling(keep=0.5)
        methods["half of the samples from 50%"] = BackwardSampling(keep=0.5, begin=0.5)
        methods |= {f"half: {name}": method for name, method in subsets().items()}
    else:
        few = ("p = 99%",) if task.preset == "quick" else ("p = 99%", "lognormal, as many zeros")
        methods = {n: methods[n] for n in few}
    return [
        Arm(name="exact", role="baseline"),
        *(Arm(name=n, methods=(m,), lengths=task.lengths) for n, m in methods.items()),
    ]


def subsets(keep: float = 0.5) -> dict[str, GradientSubsets]:
    """Return random structured subsets by name, drawn anew in every layer."""
    return {
        "outputs for dX and dW": GradientSubsets(keep=keep),
        "samples for dX and dW": GradientSubsets(keep=keep, dx="samples", dw="samples"),
        "samples for dW, dX exact": GradientSubsets(keep=keep, dx=None, dw="samples"),
    }


SWEEP = tuning.Sweep("04_1", lambda t: t.sized(SIZES), arms)
