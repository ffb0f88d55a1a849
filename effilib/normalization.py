"""Batch normalization with what follows it, in as few passes over memory as there can be.

    y = relu(gamma (x - mean) / sigma + beta + r)

PyTorch's operations read and write a layer's output about seven times forward, and as often backward. On a
CPU, whose products are fast and whose memory is slow, that is half of a step. Here it is read twice and
written once, by a kernel in C++: in training on a CPU, in channels_last, in bf16 or fp32. Elsewhere, and
where a hook watches the BatchNorm, it is what PyTorch makes of it. Our residual networks and VGGs use it.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from effilib import convolution as conv
from effilib.kernels import compiler
from effilib.pooling import max_pool, pools

__all__ = ["Layers", "batch_norm_backward", "fused", "norm_relu"]

aten = torch.ops.aten
ACTIVATIONS = (None, nn.ReLU, nn.GELU, nn.SiLU)  # by the kernel's number
SLOPES = {
    nn.ReLU: lambda z: z > 0,
    nn.GELU: lambda z: torch.special.ndtr(z) + z * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi),
    nn.SiLU: lambda z: z.sigmoid() * (1 + z * (1 - z.sigmoid())),
}
INSTEAD = "batch normalization takes more passes"
_wanted = contextvars.ContextVar("fused", default=True)


@contextlib.contextmanager
def fused(wanted: bool) -> Iterator[None]:
    """Say whether `norm_relu` may take its kernel; else it is PyTorch's operations.

    >>> bn, x = nn.BatchNorm2d(8), torch.randn(4, 8, 5, 5)
    >>> with fused(False):
    ...     torch.equal(norm_relu(bn, x), F.relu(bn(x)))
    True
    """
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


def norm_relu(bn: nn.Module, x: torch.Tensor, add: torch.Tensor | None = None) -> torch.Tensor:
    """Return relu(bn(x) + add), in one.

    x, add: (N, C, H, W). bn: a BatchNorm, or what stands in its place, which is called.

    >>> bn, x = nn.BatchNorm2d(8), torch.randn(128, 8, 12, 12).to(memory_format=torch.channels_last)
    >>> torch.allclose(norm_relu(bn, x, add=x), F.relu(bn(x) + x), atol=1e-5)
    True
    """
    if fits(bn, x, add):
        return _Normalized.apply(x, add, bn.weight, bn.bias, bn, nn.ReLU)
    y = bn(x)
    return F.relu(y if add is None else y + add, inplace=True)


class Layers(nn.Sequential):
    """Apply layers, a BatchNorm and its activation as one.

    The activation is the one right behind it. 2x2 max pooling has a kernel, too.

    >>> layers = Layers(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GELU())
    >>> layers(torch.randn(2, 1, 6, 6)).shape
    torch.Size([2, 4, 4, 4])
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layers, done = list(self), False
        for layer, behind in zip(layers, [*layers[1:], None], strict=True):
            if done:
                done = False
            elif done := _activates(behind) and fits(layer, x):
                x = _Normalized.apply(x, None, layer.weight, layer.bias, layer, type(behind))
            elif _wanted.get() and pools(layer, x) and not _watched(layer):
                x = max_pool(x)
            else:
                x = layer(x)
        return x


def fits(bn, x, add=None):
    """Whether the kernel takes this, and nobody would miss the BatchNorm's own call."""
    if type(bn) is not nn.BatchNorm2d or not (bn.training and bn.affine and bn.eps > 0 and _wanted.get()):
        return False
    if not compiler.takes(x) or not x.numel() > x.shape[1] == bn.num_features:
        return False
    if add is not None and (add.dtype, add.shape, add.stride()) != (x.dtype, x.shape, x.stride()):
        return False
    numbers = [t for t in (bn.weight, bn.bias, bn.running_mean, bn.running_var) if t is not None]
    if not all(t.dtype == torch.float32 and t.is_contiguous() for t in numbers) or _watched(bn):
        return False
    return compiler.load("batch_norm", INSTEAD) is not None


def _activates(module):
    exact = getattr(module, "approximate", "none") == "none"  # GELU has another form
    return type(module) in ACTIVATIONS and exact and not _watched(module)


def _watched(module):
    """Whether somebody would miss a module's own call."""
    own = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(own) or "forward" in vars(module) or _has_any_global_hook()


class _Normalized(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, add, gamma, beta, bn, act):
        y, mean, invstd = forward(bn, x, add, act)
        # a method may move biases within a backward pass: PyTorch's own does not read them
        ctx.save_for_backward(x, None if add is None else y, gamma, beta.clone(), mean, invstd)
        ctx.eps, ctx.act = bn.eps, act
        return y

    @staticmethod
    def backward(ctx, dy):
        x, y, gamma, beta, mean, invstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # who differentiates this once more needs PyTorch's operations
            z = F.batch_norm(x, None, None, gamma, beta, True, 0.0, ctx.eps) if y is None else y
            dr, stats = dy * SLOPES[ctx.act](z), (None, None, mean, invstd)
            dx, *both = aten.native_batch_norm_backward(dr, x, gamma, *stats, True, ctx.eps, [True] * 3)
        else:
            dx, dr, *both = backward(dy, x, y, gamma, beta, mean, invstd, ctx.eps, act=ctx.act)
        return dx, None if y is None else dr, *both, None, None


def forward(bn, x, add=None, act=nn.ReLU):
    """y = act(bn(x) + add), and the mean and 1 / sigma that were taken; running statistics move."""
    y = torch.empty_like(x)
    mean, var, invstd = moments = torch.empty(3, bn.num_features)
    _run("forward", act, x, add, y, bn.weight, bn.bias, float(bn.eps), *moments)
    if bn.track_running_stats and bn.running_mean is not None:
        bn.num_batches_tracked.add_(1)
        share = bn.momentum if bn.momentum is not None else 1 / float(bn.num_batches_tracked)
        m = x.numel() // x.shape[1]
        bn.running_mean.lerp_(mean, share)
        bn.running_var.lerp_(var * (m / (m - 1)), share)
    return y, mean, invstd


def backward(dy, x, y, gamma, beta, mean, invstd, eps, index=None, weight=None, act=nn.ReLU):
    """dX, the gradient of what was added (None if y is None), dgamma, dbeta.

    dy: (n, C, H, W). y: the outputs, where something was added: they tell where the ReLU let through. Else x
    and beta do; without an activation (None) beta is not read. index, weight: as of `batch_norm_backward`.
    """
    dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
    if index is not None:
        index, weight = index.long().contiguous(), weight.to(mean.dtype).contiguous()
    dx, dr, both = torch.empty_like(dy), y if y is None else torch.empty_like(dy), torch.empty(2, len(mean))
    _run("backward", act, dy, x, y, index, weight, gamma, beta, mean, invstd, float(eps), dx, dr, *both)
    return dx, dr, *both


def _run(which, act, images, *others):
    """Call a kernel for images (n, C, H, W); others: tensors, None, and eps."""
    n, C, H, W = images.shape
    kernels = compiler.load("batch_norm", INSTEAD)
    compiler.call(kernels, which, ACTIVATIONS.index(act), images, *others, n, H * W, C)


def batch_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    gamma: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dX of some samples, dgamma, dbeta of a batch normalization.

    dy: (n, C, H, W), weighted by 1 / p. x: (N, C, H, W), whole; index, weight: (n,). mean, invstd: (C,), of
    the whole batch.

    The exact dX is gamma / sigma times what is left of dy without its parts along 1 and xhat, over the batch:

        dX = gamma / sigma (dy - a - b xhat),   so that sum dX = sum dX xhat = 0

    and a = sum dy / m, b = sum dy xhat / m, as sum xhat = 0 and sum xhat^2 = m (1 - eps / sigma^2) over the m
    elements of a channel. With weights w the same is asked of what stayed:

        dX = gamma / sigma (dy - w (a + b xhat)),   (sum w      sum w xhat  ) (a)   (sum dy     )
                                                    (sum w xhat sum w xhat^2) (b) = (sum dy xhat)

    Dividing by the m of the whole batch would estimate a and b without bias, but dX would no longer add up to
    0, which dW, a product with inputs that have a mean, amplifies (by a tenth of the noise where we measured
    it). As quotients a and b have a bias of the order of 1 / n; so has w a anyway, a product of two draws.

    >>> x, dy = torch.randn(4, 2, 3, 3), torch.randn(2, 2, 3, 3)
    >>> mean, invstd = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0).rsqrt()
    >>> index, weight = torch.tensor([0, 2]), torch.tensor([1.0, 3.0])
    >>> dx, dgamma, dbeta = batch_norm_backward(dy, x, index, weight, mean, invstd, torch.ones(2), eps=0.0)
    >>> torch.allclose(dx.sum((0, 2, 3)), torch.zeros(2), atol=1e-5)
    True
    """
    precise = torch.promote_types(mean.dtype, torch.float32)  # without fp32 parameters they are bf16
    weight, mean, invstd, gamma = (t.to(precise).contiguous() for t in (weight, mean, invstd, gamma))
    rows = x.is_cpu and precise == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
    if rows and x.dtype in compiler.TYPES and compiler.load("batch_norm", INSTEAD):
        dx, _, *both = backward(dy, x, None, gamma, None, mean, invstd, eps, index, weight, act=None)
        return dx, *both
    return _batch_norm_backward(dy, conv.take(x, 0, index), weight, mean, invstd, gamma, eps)


def _batch_norm_backward(dy, x, weight, mean, invstd, gamma, eps):
    """The same by PyTorch's operations; x: (n, C, H, W)."""

    def total(t):  # over samples and pixels, (C,)
        return t.sum((0, 2, 3))

    def channel(t):
        return t.view(1, -1, 1, 1)

    g, w = dy.to(mean.dtype), weight.view(-1, 1, 1, 1)
    xhat = (x.to(mean.dtype) - channel(mean)) * channel(invstd)
    dbeta, dgamma = total(g), total(g * xhat)
    s0, s1 = w.sum() * x.shape[2] * x.shape[3], total(w * xhat)
    s2 = total(w * xhat**2) + s0 * eps * invstd**2  # sigma^2 has eps in it
    det = s0 * s2 - s1**2
    a, b = (s2 * dbeta - s1 * dgamma) / det, (s0 * dgamma - s1 * dbeta) / det
    dx = channel(gamma * invstd) * (g - w * (channel(a) + channel(b) * xhat))
    return dx.to(dy.dtype), dgamma, dbeta
