"""Say how a network is trained, and resolve what "auto" means on this machine: precision, memory format."""

import contextlib
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from effilib import convolution
from effilib.clock import cpu_flags
from effilib.dataset import FLIPS
from effilib.errors import BadInput, NotApplicable, choose, within

__all__ = [
    "LAYOUTS", "Recipe", "Schedule", "at_least_fp32", "autocast", "can_compile", "native_bf16",
    "resolve_layout", "resolve_precision",
]  # fmt: skip
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained: SGD with Nesterov momentum, the learning rate warmed up and then lowered.

    >>> recipe = Recipe(epochs=5, lr=0.4)
    >>> [round(recipe.lr_at(step, 10), 2) for step in range(10)]
    [0.13, 0.27, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05]
    """

    epochs: float = 10  # a fraction ends in mid-epoch
    batch_size: int = 128  # of all processes together
    lr: float = 0.1  # the highest of the schedule
    schedule: str = "linear"  # down to `lr_end`; or "cosine" down to it, or "constant"
    warmup: float = 0.2  # share of the steps
    lr_start: float = 0.0  # where the warm-up begins and where the schedule ends, as shares of lr
    lr_end: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    augmentation: str = "auto"  # the data set's; or "none", "crop", "crop+flip"
    pad: int | None = None  # pixels by which a crop is shifted at most; None: the data set's
    # where images are mirrored: each by chance, or "alternating", in every second epoch (Jordan 2024)
    flips: str = "random"
    # share of the held-out images, the least certain ones, judged by six views at the end, on the clock
    multi_crop: float = 0.0
    # bf16 where the machine has it natively, else fp32; or "fp32", "bf16", "fp64", on CUDA "tf32", "fp16"
    precision: str = "auto"
    memory_format: str = "auto"  # channels_last where the kernels read it, else contiguous; or one of the two
    compile: bool = False
    fused: bool = True  # BatchNorm, a sum and ReLU by one kernel where our networks have them: `norm_relu`
    # over several GPUs: BatchNorm's moments of the whole batch; else of each share by itself
    sync_bn: bool = False

    def __post_init__(self):
        choose("schedule", self.schedule, ("linear", "cosine", "constant"))
        choose("precision", self.precision, ("auto", "fp32", "tf32", "bf16", "fp16", "fp64"))
        choose("memory format", self.memory_format, ("auto", *LAYOUTS))
        choose("augmentation", self.augmentation, ("auto", "none", "crop", "crop+flip"))
        choose("flips", self.flips, FLIPS)
        if self.pad is not None:
            within("recipe: pad", self.pad, "a whole number, 0 or above")
        ranges = {
            "epochs": "above 0", "batch_size": "a whole number above 0", "lr": "above 0",
            "warmup": "from 0 to 1", "momentum": "from 0 to below 1", "weight_decay": "0 or above",
            "label_smoothing": "from 0 to below 1", "lr_start": "from 0 to 1", "lr_end": "from 0 to 1",
            "multi_crop": "from 0 to 1",
        }  # fmt: skip
        for name, words in ranges.items():
            within(f"recipe: {name}", getattr(self, name), words)

    def lr_at(self, step: float, steps: float) -> float:
        """Learning rate of step 0, 1, ..., steps - 1."""
        rise = self.warmup * steps
        if step < rise:
            return self.lr * (self.lr_start + (1 - self.lr_start) * (step + 1) / (math.floor(rise) + 1))
        left = (steps - step) / (steps - rise)  # 1 -> 0
        cosine = 0.5 - 0.5 * math.cos(math.pi * left)
        fall = {"linear": left, "cosine": cosine, "constant": 1.0}[self.schedule]
        return self.lr * (self.lr_end + (1 - self.lr_end) * fall)


@dataclass
class Schedule:
    """Hold where a run is on its recipe's schedule, and its pace.

    Positions are in steps of the recipe's batch size. `lr_at` is (position, planned) -> learning rate; a
    method may put one of its own here when it is set up.

    >>> schedule = Schedule(lr_at=Recipe(lr=0.4, warmup=0).lr_at, planned=4, position=2)
    >>> schedule.lr
    0.2
    """

    lr_at: Callable[[float, int], float]
    planned: int = 0  # positions in all
    position: float = 0
    pace: float = 1  # positions a step
    scale: float = 1.0  # of the learning rate

    @property
    def lr(self) -> float:
        """Learning rate of this step."""
        return self.scale * self.lr_at(self.position, self.planned)

    @property
    def after(self) -> float:
        """Position after this step."""
        return self.position + self.pace

    @property
    def left(self) -> int:
        """Steps that are left at this pace."""
        return math.ceil(round((self.planned - self.position) / self.pace, 6))  # 6.000000000000001 is 6


def native_bf16(device: str | torch.device = "cpu") -> bool:
    """Return whether bf16 products are native here.

    avx512_bf16 or amx_bf16, CUDA from compute capability 8.0.

    >>> native_bf16("cpu") == (resolve_precision("auto", "cpu") == "bf16")
    True
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16"})


def resolve_precision(precision: str, device: str | torch.device = "cpu") -> str:
    """Return the precision that is meant.

    "auto" is "bf16" where it is native, else "fp32". Raises `BadInput` for what the device cannot do fast.

    >>> resolve_precision("fp32"), resolve_precision("auto") in ("fp32", "bf16")
    ('fp32', True)
    """
    cuda = torch.device(device).type == "cuda"
    if precision in ("fp16", "tf32") and not cuda:
        raise BadInput(
            f"precision {precision!r} needs CUDA; on this CPU choose auto, fp32 or bf16 (or fp64; chapter "
            "3.2 emulates fp16)"
        )
    return ("bf16" if native_bf16(device) else "fp32") if precision == "auto" else precision


def resolve_layout(recipe: Recipe, device: str | torch.device = "cpu", model: nn.Module | None = None) -> str:
    """Return the memory format that is meant.

    "auto" is "channels_last" where the kernels read it: on CPUs, and on CUDA's tensor cores, unless the model
    is one that cannot take it (`convolution.contiguous_`). Raises `NotApplicable` where such a model is asked
    to.

    >>> resolve_layout(Recipe(), "cpu"), resolve_layout(Recipe(memory_format="contiguous"), "cpu")
    ('channels_last', 'contiguous')
    """
    plain = model is not None and convolution.is_contiguous(model)
    if plain and recipe.memory_format == "channels_last":
        raise NotApplicable(
            "this network cannot run in channels_last, for its view(): set memory_format=auto, or call"
            " flatten(1) in it"
        )
    if recipe.memory_format != "auto":
        return recipe.memory_format
    if plain:
        return "contiguous"
    cuda_cores = torch.device(device).type == "cuda" and resolve_precision(recipe.precision, device) in (
        "fp32",
        "fp64",
    )
    return "contiguous" if cuda_cores else "channels_last"


def autocast(precision: str, device: str | torch.device) -> torch.autocast:
    """Compute products inside in "bf16" or "fp16"; else change nothing.

    >>> with autocast("bf16", "cpu"):
    ...     y = F.linear(torch.ones(1, 2), torch.ones(3, 2))
    >>> y.dtype
    torch.bfloat16
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(torch.device(device).type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def at_least_fp32(logits: torch.Tensor) -> torch.Tensor:
    """Return logits in 32 bits or more, as losses need them.

    >>> at_least_fp32(torch.zeros(1, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    return logits if logits.dtype == torch.float64 else logits.float()


@contextlib.contextmanager
def backend(recipe, device):
    """CUDA's global switches for one run: the fastest kernels for fixed shapes, TF32 only where the recipe
    says so.
    """
    if torch.device(device).type != "cuda":
        yield
        return
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = True, *[recipe.precision != "fp32"] * 2
    torch.cuda.reset_peak_memory_stats(device)
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


def can_compile(device: str | torch.device = "cpu") -> str:
    """Return why `torch.compile` cannot work here, or "".

    >>> isinstance(can_compile(), str)
    True
    """
    if torch.device(device).type == "cuda" or any(shutil.which(c) for c in ("g++", "clang++", "c++")):
        return ""
    return "torch.compile needs a C++ compiler (g++ or clang++), and there is none on this machine"
