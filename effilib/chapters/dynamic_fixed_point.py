"""Chapter 3.3: what is trained: 14 bits in fp32's place, 8 bits in bf16's, and fewer and fewer bits."""

from effilib.experiment import Arm, Contender
from effilib.methods.dynamic_fixed_point import DynamicFixedPoint, EightBits
from effilib.tasks import Task

FIXED, EIGHT, HALF = "DFP-14", "8 bits, dW in bf16", "bf16"
BITS = (16, 14, 12, 10, 8, 6)
SIZES = {
    "quick": dict(epochs=0.5),
    "study": dict(epochs=3),  # fp32 takes half as long again as bf16
}
SETTINGS = {
    # The authors' 16 bits less the two that they leave free for sums.
    FIXED: DynamicFixedPoint(bits=14),
    # Where the idea went: it has to beat bf16, in which it runs.
    EIGHT: EightBits(),
}


def _contender(task):
    return Arm(name="", methods=(DynamicFixedPoint(),), changes={"precision": "fp32"})


CONTENDERS = (Contender("dynamic fixed point", "3.3", ("the convolutions",), _contender, 3),)


def arms(task: Task) -> list[Arm]:
    """Return fp32, 14 bits, bf16, to which they lost, and 8 bits (not in quick)."""
    found = [
        Arm(name="fp32", role="baseline", changes={"precision": "fp32"}),
        Arm(name=FIXED, methods=(SETTINGS[FIXED],), changes={"precision": "fp32"}),
        Arm(name=HALF, role="control", changes={"precision": "bf16"}),
    ]
    if task.preset != "quick":
        found.append(Arm(name=EIGHT, methods=(SETTINGS[EIGHT],), changes={"precision": "bf16"}))
    return found


def grid(task: Task) -> list[Arm]:
    """Return numbers of bits, and in the study other settings; all take the same steps."""
    methods = {f"{b} bits": DynamicFixedPoint(bits=b) for b in BITS}
    if task.preset in ("study", "full"):
        methods["6 bits, stochastic rounding"] = DynamicFixedPoint(bits=6, rounding="stochastic")
        methods["6 bits, an exponent a channel"] = DynamicFixedPoint(bits=6, exponents="channel")
        methods["6 bits, both"] = DynamicFixedPoint(bits=6, exponents="channel", rounding="stochastic")
        methods["5 bits"], methods["4 bits"] = DynamicFixedPoint(bits=5), DynamicFixedPoint(bits=4)
        methods["10 bits, no master weights"] = DynamicFixedPoint(bits=10, master=False)
    else:
        methods = {n: methods[n] for n in ("14 bits", "8 bits", "6 bits")}
    fp32 = {"precision": "fp32"}
    return [
        Arm(name="fp32", role="baseline", changes=fp32),
        *(Arm(name=n, methods=(m,), changes=fp32, lengths=task.lengths) for n, m in methods.items()),
    ]
