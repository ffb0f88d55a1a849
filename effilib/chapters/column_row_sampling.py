"""Chapter 3.4: what is trained: sampled products on a wide network, and narrower exact networks."""

from dataclasses import replace

from effilib import tuning
from effilib.experiment import Arm, Contender
from effilib.methods.column_row_sampling import ChannelSampling, ColumnRowSampling
from effilib.tasks import Task

RATIOS = (0.75, 0.5, 0.3)
HALF = "50% of the channels"
NARROWER = {0.75: 0.87, 0.5: 0.72, 0.3: 0.55}  # ratio -> share of the channels with about so many products
# A plain network of wide convolutions on small maps, which bound a step: 128 to 256 channels in the study.
WIDE = {
    "smoke": ((16,), (64,), (32,)),
    "quick": ((32,), (64,), (128,)),
    "study": ((32,), (128,), (256, 256)),
    "full": ((128, 128), (256, 256), (256, 256)),
}
SIZES = {p: dict(network="vgg", widths={"widths": w}) for p, w in WIDE.items()}
SIZES["quick"] |= dict(epochs=1)
SIZES["study"] |= dict(
    epochs=2.5
)  # seven arms of a minute or less: 880 steps the longest, 8 epochs of 14,000 images
GRID = {p: dict(size) for p, size in SIZES.items()}  # of what is only shown
GRID["quick"] |= dict(epochs=0.4)
GRID["study"] |= dict(epochs=1)
# The same channels in every step, then all for the rest of the run, in which the others catch up: from trial
# runs of 156 steps with a seed that is not measured, where drawing anew in every step lost 12 points (n = 1).
UNTIL = 0.6
SETTINGS = {f"{r:.0%} of the channels": ChannelSampling(ratio=r, until=UNTIL) for r in RATIOS}
CONTENDERS = (
    Contender(
        "column-row sampling",
        "3.4",
        ("the convolutions", "the network"),
        lambda task: Arm(name="", methods=(SETTINGS[HALF],)),
        3,
    ),
)


def arms(task: Task) -> list[Arm]:
    """Return exact training, all ratios (quick: half), and for each an exact network of as many products."""
    methods = {n: m for n, m in SETTINGS.items() if n == HALF or task.preset in ("study", "full")}
    sampled = [Arm(name=n, methods=(m,)) for n, m in methods.items()]
    controls = [arm for m in methods.values() for arm in narrower(task, m.ratio)]
    return tuning.settled(task, [Arm(name="exact", role="baseline"), *sampled, *controls], SWEEP.name)


def narrower(task: Task, ratio: float = 0.5) -> list[Arm]:
    """Return the control: a network with about `ratio` of the products, its channels multiples of 16."""
    if task.network != "vgg" or "widths" not in task.widths:
        return []
    widths = tuple(
        tuple(max(8, round(c * NARROWER[ratio] / 16) * 16) for c in stage) for stage in task.widths["widths"]
    )
    name = f"narrower network, {ratio:.0%} of the products"
    return [Arm(name=name, role="control", network={"widths": widths})]


def grid(task: Task) -> list[Arm]:
    """Return the choices of half of the channels (quick: two); all take the same steps."""
    half, forward = SETTINGS[HALF], ColumnRowSampling(scheme="uniform", minimal=16)
    topk = ColumnRowSampling(block=1, score="measured", minimal=4)
    methods = {"top-k, all the time (2018)": topk, f"exact from {UNTIL:.0%}": half}
    if task.preset in ("study", "full"):
        methods |= {
            "top-k in blocks, all the time": replace(forward, scheme="topk"),
            f"top-k in blocks, exact from {UNTIL:.0%}": replace(forward, scheme="topk", until=UNTIL),
            f"unread ones computed, exact from {UNTIL:.0%}": replace(forward, until=UNTIL),
            "exact from 40%": replace(half, until=0.4),
            "exact from 80%": replace(half, until=0.8),
            f"drawn anew, exact from {UNTIL:.0%}": replace(half, fixed=False),
            "drawn anew, all the time": replace(half, fixed=False, until=1.0),
            "Bernoulli and scaled, all the time": replace(forward, scheme="bernoulli", scaled=True),
            "backward only, Bernoulli and scaled": replace(
                forward, where="backward", scheme="bernoulli", scaled=True
            ),
        }
    return [
        Arm(name="exact", role="baseline"),
        *(Arm(name=n, methods=(m,), lengths=task.lengths) for n, m in methods.items()),
    ]


SWEEP = tuning.Sweep("03_4", lambda t: t.sized(SIZES), arms)
