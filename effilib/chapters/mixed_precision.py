"""Chapter 3.2: what is trained: the ladder of formats and layouts, and the paper's arms in emulated fp16."""

from effilib.experiment import Arm
from effilib.methods.mixed_precision import MixedPrecision
from effilib.recipe import can_compile, native_bf16
from effilib.tasks import WIDE, Task

# The judged network is as wide as the thesis' ones: in a narrow one the products are a small part of a step.
SIZES = {
    # The narrow one, for which the aim is not stated; of batches of 64 there were 13 in the shorter length.
    "quick": dict(epochs=0.5, batch_size=32, lr=0.1),
    "study": dict(epochs=1, widths=WIDE),  # an epoch in fp32 takes more than a minute on two cores
    "full": dict(widths=WIDE),
}
GRID = {  # of the four arms, on narrow networks: emulation takes several times as long as what it emulates
    "quick": dict(epochs=0.6, widths={"widths": (8, 16, 32), "blocks": (1, 1, 1)}),
    "study": dict(epochs=1),
    "full": dict(epochs=10),
}


def arms(task: Task) -> list[Arm]:
    """Return the ladder: each rung keeps what the one before it brought.

    All rungs take the same steps, so that their curves cover the same accuracies. bf16 is left out where it
    is not native, the fused kernel (of every other chapter's arms) on a GPU, the compiled rung where there is
    no compiler, and in the short presets: compiling takes longer than their whole run.
    """
    rungs = [
        ("fp32 NCHW", "baseline", dict(precision="fp32", memory_format="contiguous")),
        ("fp32 channels_last", "control", dict(precision="fp32")),
    ]
    if task.device.startswith("cuda"):
        rungs.append(("tf32 channels_last", "control", dict(precision="tf32")))
        rungs.append(("fp16 channels_last, scaled loss", "method", dict(precision="fp16")))
    if native_bf16(task.device):
        rungs.append(("bf16 channels_last", "method", dict(precision="bf16")))
    name, _, changes = rungs[-1]
    if task.device == "cpu":
        rungs.append((f"{name}, fused", "control", changes | dict(fused=True)))
    if task.preset in ("study", "full") and not can_compile(task.device):
        rungs.append((f"{name}, compiled", "control", changes | dict(compile=True)))
    rest = dict(memory_format="channels_last", fused=False)
    return [Arm(name=n, role=role, changes=rest | c, lengths=task.lengths) for n, role, c in rungs]


def grid(task: Task) -> list[Arm]:
    """Return the paper's four arms, fp16 emulated in fp32; all take the same steps."""
    without = dict(scale=1.0, dynamic=False)
    methods = {
        "fp16": MixedPrecision(master=False, **without),
        "fp16, master weights": MixedPrecision(**without),
        "fp16, master weights, scaled loss": MixedPrecision(),
    }
    emulated = [Arm(name=n, methods=(m,), lengths=task.lengths) for n, m in methods.items()]
    return [Arm(name="fp32", role="baseline"), *emulated]
