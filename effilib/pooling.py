"""Max pooling of 2x2 windows side by side, whose backward pass writes every pixel once.

PyTorch's first sets the gradient of all pixels to 0, and keeps places in 64 bits: a fifth of a step where the
pooling comes right behind a convolution.
"""

import torch
import torch.nn.functional as F
from torch import nn

from effilib.kernels import compiler

__all__ = ["max_pool", "pools"]

INSTEAD = "max pooling takes more passes"


def pools(layer: nn.Module, x: torch.Tensor) -> bool:
    """Say whether `max_pool` does what a layer does to x.

    x: (N, C, H, W).

    >>> x = torch.zeros(8, 8, 32, 32).to(memory_format=torch.channels_last)
    >>> pools(nn.MaxPool2d(2), x), pools(nn.MaxPool2d(3, 2), x)
    (True, False)
    """
    if type(layer) is not nn.MaxPool2d or layer.ceil_mode or layer.return_indices:
        return False
    sides = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    if [s if isinstance(s, tuple) else (s, s) for s in sides] != [(2, 2), (2, 2), (0, 0), (1, 1)]:
        return False
    return compiler.takes(x) and min(x.shape[2:]) > 1 and compiler.load("max_pool", INSTEAD) is not None


def max_pool(x: torch.Tensor) -> torch.Tensor:
    """Return the largest of each 2x2 window.

    (N, C, H, W) -> (N, C, H // 2, W // 2).

    >>> x = torch.randn(8, 8, 32, 32).to(memory_format=torch.channels_last)
    >>> torch.equal(max_pool(x), F.max_pool2d(x, 2))
    True
    """
    return _MaxPool.apply(x)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        N, C, H, W = ctx.shape = x.shape
        size = N, C, H // 2, W // 2
        y, places = (
            torch.empty(size, dtype=dtype, memory_format=torch.channels_last)
            for dtype in (x.dtype, torch.int8)
        )
        compiler.call(compiler.load("max_pool", INSTEAD), "forward", x, y, places, N, H, W, C)
        ctx.save_for_backward(places)
        return y

    @staticmethod
    def backward(ctx, dy):
        (places,), (N, C, H, W) = ctx.saved_tensors, ctx.shape
        if torch.is_grad_enabled():  # who differentiates this once more needs PyTorch's operations
            parts = torch.stack([dy * (places == k) for k in range(4)]).unflatten(0, (2, 2))
            dx = parts.permute(2, 3, 4, 0, 5, 1).reshape(N, C, H // 2 * 2, W // 2 * 2)
            return F.pad(dx, (0, W % 2, 0, H % 2))
        dx = torch.empty(ctx.shape, dtype=dy.dtype, memory_format=torch.channels_last)
        dy = dy.contiguous(memory_format=torch.channels_last)
        compiler.call(compiler.load("max_pool", INSTEAD), "backward", dy, places, dx, N, H, W, C)
        return dx
