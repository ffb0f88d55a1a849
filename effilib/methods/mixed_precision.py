"""Mixed precision (Micikevicius et al. 2017, arXiv:1710.03740): fp16 products, fp32 weights, a scaled loss.

Half the bits halve the traffic, and processors with native 16-bit products do twice as many of them or more.
fp16 has 10 bits of mantissa and a least positive number of 2^-24, so two things get lost without care: an
update smaller than 2^-11 of its weight (hence master weights in fp32), and gradients below 2^-25 (hence the
loss is multiplied by S, which multiplies every gradient by exactly S). bf16 has fp32's range and needs no
scaling; it still needs the master weights.

Real speed comes from `Recipe.precision` (autocast). This module shows the numerics: it *emulates* fp16 by
rounding, so that it runs anywhere; emulation costs time, so nothing is timed with it. The paper used constant
scales; growing and backing off is the later scheme of NVIDIA and PyTorch.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from effilib.errors import BadInput, NoEffect, within
from effilib.hooks import Method
from effilib.methods import Info
from effilib.run import Run

__all__ = ["INFO", "HalfConv2d", "LossScaler", "MixedPrecision", "Round", "emulate_fp16_", "round_to"]

INFO = Info(
    name="Mixed precision",
    name_de="Halbierung der Bits",
    chapter="3.2",
    paper="Micikevicius et al. 2017, arXiv:1710.03740",
    claim="Training with 16-bit products reaches fp32's accuracy with the same hyper-parameters; operations "
    "that are bound by bandwidth or arithmetic run 2-6x faster on Volta.",
    cost_model="Same FLOPs, half the bytes; products at the processor's 16-bit rate; weights are cast once a "
    "step.",
    applies="processors with native 16-bit products",
)


def round_to(x: torch.Tensor, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Return x rounded to numbers of `dtype`, in its own format.

    x: any shape. Overflow becomes inf, underflow 0.

    >>> round_to(torch.tensor([1e6, 1e-9, 1.0005])).tolist()
    [inf, 0.0, 1.0009765625]
    """
    return x.to(dtype).to(x.dtype)


class Round(torch.autograd.Function):
    """Round a tensor to fp16 going forward, and its gradient coming back.

    >>> x = torch.tensor(1.0005, requires_grad=True)
    >>> y = Round.apply(x)
    >>> (1e-9 * y).backward()
    >>> y.item(), x.grad.item()
    (1.0009765625, 0.0)
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return round_to(x)

    @staticmethod
    def backward(ctx, dy: torch.Tensor) -> torch.Tensor:
        return round_to(dy)


class HalfConv2d(nn.Conv2d):
    """Convolve fp16 operands, summed in fp32, into fp16; dX and dW alike.

    >>> y = HalfConv2d(1, 4, 3)(torch.rand(1, 1, 5, 5))
    >>> torch.equal(y, round_to(y))
    True
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Round.apply(self._conv_forward(Round.apply(x), Round.apply(self.weight), self.bias))


class HalfLinear(nn.Linear):
    """Multiply as `HalfConv2d` does.

    >>> y = HalfLinear(8, 4)(torch.rand(1, 8))
    >>> torch.equal(y, round_to(y))
    True
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Round.apply(nn.functional.linear(Round.apply(x), Round.apply(self.weight), self.bias))


class HalfBatchNorm2d(nn.BatchNorm2d):
    """Read and write fp16, with statistics in fp32 (the paper's section 3.3).

    >>> y = HalfBatchNorm2d(4)(torch.rand(2, 4, 3, 3))
    >>> torch.equal(y, round_to(y))
    True
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Round.apply(super().forward(x))


_HALF = {nn.Conv2d: HalfConv2d, nn.Linear: HalfLinear, nn.BatchNorm2d: HalfBatchNorm2d}
_FULL = {half: full for full, half in _HALF.items()}


def emulate_fp16_(model: nn.Module, on: bool = True) -> int:
    """Turn convolutions, linear layers and BatchNorms into emulated fp16, or back.

    In place; parameters and names stay. Returns how many layers changed; raises `NoEffect` if none did.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Linear(2, 2))
    >>> emulate_fp16_(net), emulate_fp16_(net, on=False)
    (2, 2)
    """
    kinds = _HALF if on else _FULL
    changed = [m for m in model.modules() if type(m) in kinds]
    for m in changed:
        m.__class__ = kinds[type(m)]
    if not changed:
        raise NoEffect(f"mixed precision: no convolution or linear layer of {type(model).__name__} matched")
    return len(changed)


class LossScaler:
    """Scale the loss by S, which shrinks after overflows and grows else.

    A step with an overflow is skipped; S grows after `interval` clean steps.

    scale: S at the beginning; a power of two costs no mantissa bits. growth = backoff = 1 keeps it constant,
    as the paper does. skip: whether a step with a non-finite gradient is left out.

    >>> scaler, w = LossScaler(scale=8.0, interval=1), torch.ones(1, requires_grad=True)
    >>> optimizer = torch.optim.SGD([w], lr=0.5)
    >>> scaler.scale(w.sum()).backward()
    >>> scaler.unscale_(optimizer)
    >>> scaler.step(optimizer)
    >>> scaler.update()  # a clean step: S grows
    >>> w.item(), scaler.S
    (0.5, 16.0)
    """

    def __init__(
        self,
        scale: float = 2.0**16,
        growth: float = 2.0,
        backoff: float = 0.5,
        interval: int = 2000,
        skip: bool = True,
    ):
        for name, value in (("scale", scale), ("growth", growth), ("backoff", backoff)):
            within(f"mixed precision: {name}", value, "above 0")
        within("mixed precision: interval", interval, "a whole number above 0")
        self.S, self.growth, self.backoff = float(scale), growth, backoff
        self.interval, self.skip = interval, skip
        self.clean = self.skipped = 0
        self.finite = True

    def is_enabled(self) -> bool:
        """Return whether it scales: always, where PyTorch's can be switched off."""
        return True

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """Return S times the loss."""
        return self.S * loss

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide gradients by S, before clipping or a method sees them."""
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_div_(grads, self.S)
        self.finite = all(
            torch.isfinite(norm) for norm in torch._foreach_norm(grads, math.inf)
        )  # squares could overflow

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the optimizer's step, unless it overflowed and is to be skipped."""
        if self.finite or not self.skip:
            optimizer.step()

    def update(self) -> None:
        """Shrink S after an overflow, grow it after `interval` clean steps."""
        self.clean = self.clean + 1 if self.finite else 0
        if not self.finite:
            self.S *= self.backoff
            self.skipped += self.skip
        elif self.clean and self.clean % self.interval == 0:
            self.S *= self.growth

    def state_dict(self) -> dict:
        """Return S and the counts, for a checkpoint."""
        return {"S": self.S, "clean": self.clean, "skipped": self.skipped}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a `state_dict`."""
        self.S, self.clean, self.skipped = state["S"], state["clean"], state["skipped"]


@dataclass(frozen=True, kw_only=True)
class MixedPrecision(Method):
    """Train in emulated fp16; raises `BadInput` unless the precision is "fp32".

    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(4, 8))
    >>> history = train(net, data, Recipe(epochs=1, precision="fp32"), [MixedPrecision(scale=256.0)])
    >>> history.events[-1]["text"]
    'S ended at 256, 0 steps were skipped'
    """

    master: bool = True  # keep weights and momentum in fp32; else they are rounded to fp16 after every step
    scale: float = 2.0**16  # S at the beginning; 1 is no scaling
    dynamic: bool = True  # skip overflowing steps, grow and back off; else S stays and every step is taken
    interval: int = 200  # clean steps before S grows; PyTorch's 2,000 is longer than our runs

    def __post_init__(self):
        LossScaler(self.scale, interval=self.interval)  # which says what is out of range

    def on_fit_start(self, run: Run) -> None:
        if run.precision not in ("fp32", "tf32"):
            raise BadInput(
                f"mixed precision: fp16 is emulated, which needs precision 'fp32', not {run.precision!r}"
            )
        run.state[self] = {"layers": emulate_fp16_(run.model)}
        factors = {"growth": 2.0, "backoff": 0.5} if self.dynamic else {"growth": 1.0, "backoff": 1.0}
        run.scaler = LossScaler(self.scale, **factors, interval=self.interval, skip=self.dynamic)

    def on_step_end(self, run: Run) -> None:
        if not self.master:
            with torch.no_grad():
                for p in run.model.parameters():
                    p.copy_(round_to(p))
                    for buffer in run.optimizer.state[p].values():
                        if isinstance(buffer, torch.Tensor):
                            buffer.copy_(round_to(buffer))

    def on_fit_end(self, run: Run) -> None:
        run.log(
            self,
            f"S ended at {run.scaler.S:g}, {run.scaler.skipped} steps were skipped",
            scale=run.scaler.S,
            skipped=run.scaler.skipped,
        )
        emulate_fp16_(run.model, on=False)
