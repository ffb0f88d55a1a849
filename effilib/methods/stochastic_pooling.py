"""Pool at random: stochastic pooling and S3Pool.

Zeiler & Fergus 2013, arXiv:1301.3557; Zhai et al. 2017, arXiv:1611.05138. Both regularise where layers pool:
from each window one activation is drawn instead of the largest one (stochastic pooling), or rows and columns
are dropped at random instead of every second one (S3Pool). In eval mode both are deterministic. Neither makes
a step cheaper; what they can save is images, or steps to the same accuracy.

Drawn by the inverse of the distribution function, one random number a window and no `unfold`: with the
window's elements a_0 ... a_(K-1) >= 0 and their running sums c_r, the place r is taken where c_(r-1) <= u
c_(K-1) < c_r. An element of 0 is therefore never drawn, and padding, which is 0, can't be either.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.utils import _pair

from effilib.errors import BadInput, NoEffect, choose, within
from effilib.hooks import Method
from effilib.kernels import compiler
from effilib.methods import Info
from effilib.methods.pooling_windows import Geometry, chunks, flatten
from effilib.methods.s3_pooling import S3Pool2d
from effilib.run import Run

__all__ = [
    "AveragePool2d", "Draw", "StochasticPool2d", "StochasticPooling", "draw", "expected", "replace_pools_",
]  # fmt: skip

INFO = Info(
    name="Stochastic pooling",
    name_de="Stochastisches Pooling",
    chapter="5.1",
    paper="Zeiler & Fergus 2013, arXiv:1301.3557; S3Pool: Zhai et al. 2017, arXiv:1611.05138",
    claim="Drawing the pooled activation at random, in proportion to its size, closes the gap between "
    "training and test error where images are few, without a hyper-parameter.",
    cost_model="Same products; a pooling layer costs 1.1-1.5 times max pooling's time. It pays only if fewer "
    "images or fewer steps suffice.",
    applies="networks with max pooling, and few images",
)


def draw(a: list[torch.Tensor], u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw an element of each window, in proportion to its size.

    With the probabilities p_r = a_r / sum a. a: K tensors >= 0. u: uniform in (0, 1), of their shape. Returns
    (s, r): the element, and its number as a float; r = K for a window of zeros, of which no place may be
    named (s = 0). What is not finite makes s nan or infinite.

    >>> element, number = draw([torch.tensor(1.0), torch.tensor(3.0)], torch.tensor(0.5))  # 0.5 > 1 / 4
    >>> element.item(), number.item()
    (3.0, 1.0)
    """
    c = list(accumulate(a, torch.add))  # c_r = a_0 + ... + a_r
    t = u * c[-1]
    s, r = a[0], 0
    for k, c_k in enumerate(c):
        # 1 or 0 as floats: booleans, and `where`, are several times slower
        passed = torch.ge(t, c_k, out=torch.empty_like(t))
        s = torch.lerp(s, a[k + 1], passed) if k + 1 < len(a) else s  # exact at both ends
        r = passed.add_(r)
    return s, r


def expected(a: list[torch.Tensor]) -> torch.Tensor:
    """Return the mean of the draws, which eval mode computes.

    It is sum_r p_r a_r. a: K tensors >= 0; 0 for windows of zeros.

    >>> expected([torch.tensor(1.0), torch.tensor(3.0)]).item()  # 1/4 x 1 + 3/4 x 3
    2.5
    """
    inverse = sum(a).clamp_min(1e-30).reciprocal()  # 0 / 0 is 0 here
    s = a[0] * (a[0] * inverse)  # a_r squared could overflow
    for a_r in a[1:]:
        s = torch.addcmul(s, a_r, a_r * inverse)
    return s


def uniform(shape, device, generator=None):
    """16 random bits a number, as int16: four times as fast as 32. (bits + 32768.5) / 65536 is in (0, 1)."""
    n = torch.Size(shape).numel()
    source = generator.device if generator is not None else device
    bits = torch.empty((n + 3) // 4, dtype=torch.int64, device=source).random_(
        -(2**63), None, generator=generator
    )
    return bits.view(torch.int16)[:n].view(shape).to(device)


def _precise(dtype):
    return dtype if dtype == torch.float64 else torch.float32


def _kernel(what, x):
    """The C++ function for this tensor, or None: then the same is done in chunks by PyTorch's operations."""
    name = compiler.TYPES.get(x.dtype)
    if not name or not x.is_cpu or torch.compiler.is_compiling():
        return None
    kernels = compiler.load("stochastic_pooling", "pooling draws by PyTorch's operations, in about 20 passes")
    return kernels and getattr(kernels, f"{what}_{name}")


def _negative(x):
    return x.numel() and bool(x.amin() < 0)


def _refuse(x, negative, layer):
    if negative:
        raise BadInput(
            f"stochastic pooling{f' {layer}' if layer else ''}: probabilities need activations >= 0, the "
            f"least is {x.amin():.3g}; pool after the ReLU"
        )


def _call(kernel, tensors, geometry, b, c):
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in tensors)
    return kernel(*pointers, geometry.sides, *map(ctypes.c_int64, (b, c, torch.get_num_threads())))


class Draw(torch.autograd.Function):
    """Apply `draw` to (B, H, W, C).

    The gradient goes to the drawn place only. The probabilities count as constants. By one pass in C++, or in
    chunks.

    >>> geometry = Geometry((2, 2), (2, 2), (2, 2), (0, 0), (1, 1), ceil=False)
    >>> x = torch.tensor([0.0, 0.0, 5.0, 0.0]).view(1, 2, 2, 1)
    >>> Draw.apply(x, geometry, None).item()  # zeros are never drawn
    5.0
    """

    @staticmethod
    def forward(ctx, x, geometry, generator, layer=""):
        b, c = len(x), x.shape[-1]
        s = x.new_empty(b, *geometry.out, c)
        places = torch.empty_like(s, dtype=torch.int16)
        bits = uniform(s.shape, x.device, generator)
        if kernel := _kernel("forward", x):
            negative = _call(kernel, (x.contiguous(), bits, s, places), geometry, b, c)
        else:
            negative = _negative(x)
            for i in chunks(s.shape):
                u = bits[i].to(_precise(x.dtype)).add_(32768.5).mul_(1 / 65536)
                s[i], places[i] = draw(geometry.windows(geometry.pad(x[i].to(u.dtype))), u)
        _refuse(x, negative, layer)
        ctx.save_for_backward(places)
        ctx.geometry = geometry
        return s

    @staticmethod
    @once_differentiable
    def backward(ctx, ds):
        (places,), geometry, ds = ctx.saved_tensors, ctx.geometry, ds.contiguous()
        (top, left), (height, width) = geometry.padding, geometry.size
        dx = ds.new_empty(len(ds), height, width, ds.shape[-1])
        if kernel := _kernel("backward", ds):
            _call(kernel, (ds, places, dx), geometry, len(ds), ds.shape[-1])
            return dx, None, None, None
        for i in chunks(ds.shape):
            whole = ds.new_zeros(len(ds[i]), *geometry.padded, ds.shape[-1], dtype=_precise(ds.dtype))
            d, r = ds[i].to(whole.dtype), places[i].to(whole.dtype)
            for k, window in enumerate(geometry.windows(whole)):
                window.addcmul_(d, torch.eq(r, k, out=torch.empty_like(r)))
            dx[i] = whole[:, top : top + height, left : left + width]
        return dx, None, None, None


class StochasticPool2d(nn.MaxPool2d):
    """Draw from each window in training; geometry as in `nn.MaxPool2d`.

    Windows may overlap; padding, ceil_mode and dilation are there. Takes (N, C, H, W) or (C, H, W), all >= 0:
    it belongs behind a ReLU. Train: one draw per image, channel and window, fresh at every call. Eval:
    probability weighting. generator: of the draws; None is PyTorch's global one, as for dropout. layer: its
    name in the network, for messages. Raises `BadInput` for a negative input.

    >>> pool, x = StochasticPool2d(2), torch.tensor([[[[1.0, 3.0], [0.0, 0.0]]]])
    >>> pool.eval()(x).item(), pool.train()(x).item() in (1.0, 3.0)
    (2.5, True)
    """

    def __init__(
        self, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, *, generator=None, layer=""
    ):
        super().__init__(kernel_size, stride, padding, dilation, ceil_mode=ceil_mode)
        self.generator, self.layer = generator, layer
        if any(2 * p > k for p, k in zip(_pair(padding), _pair(kernel_size), strict=True)):
            raise BadInput(
                f"stochastic pooling: padding {padding} is more than half of the kernel size {kernel_size}"
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() == 3:
            return self.forward(x[None])[0]
        flat, back = flatten(x)
        parts = (self.kernel_size, self.stride, self.padding, self.dilation)
        geometry = Geometry(tuple(x.shape[2:]), *map(_pair, parts), self.ceil_mode)
        if self.training:
            return back(Draw.apply(flat, geometry, self.generator, self.layer))
        _refuse(flat, _negative(flat), self.layer)
        parts = [flat[i].to(_precise(x.dtype)) for i in chunks((len(flat), *geometry.out, flat.shape[-1]))]
        return back(torch.cat([expected(geometry.windows(geometry.pad(a))).to(x.dtype) for a in parts]))


class AveragePool2d(nn.MaxPool2d):
    """Average windows with the geometry of `nn.MaxPool2d`: the control.

    Padding counts as 0.

    >>> AveragePool2d(2)(torch.tensor([[[[1.0, 3.0], [0.0, 0.0]]]])).item()
    1.0
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(x, self.kernel_size, self.stride, self.padding, self.ceil_mode)


KINDS = ("stochastic", "s3", "average")


def replace_pools_(model: nn.Module, make: Callable[[nn.MaxPool2d, str], nn.Module]) -> int:
    """Replace each `nn.MaxPool2d` by `make(pool, name)`, in place. Returns how many.

    A shared one stays shared. Raises `NoEffect` where there is none, and `BadInput` naming a layer that
    returns indices.

    >>> net = build("convnet", 4, (1, 8, 8), widths=(4, 8))
    >>> replace_pools_(net, lambda pool, name: AveragePool2d(pool.kernel_size))
    1
    """
    made = {}
    for prefix, parent in list(model.named_modules()):
        for child, pool in list(parent._modules.items()):  # `named_children` leaves out repetitions
            name = f"{prefix}.{child}".lstrip(".")
            if isinstance(pool, nn.MaxPool2d):
                if pool.return_indices:
                    raise BadInput(
                        f"pooling {name} returns indices for unpooling, of which a drawn one has none"
                    )
                if pool not in made:
                    made[pool] = make(pool, name).train(pool.training)
                setattr(parent, child, made[pool])
    if not made:
        raise NoEffect(
            f"stochastic pooling: {type(model).__name__} has no nn.MaxPool2d layer (a call of F.max_pool2d "
            "can't be replaced)"
        )
    return len(made)


@dataclass(frozen=True, kw_only=True)
class StochasticPooling(Method):
    """Train with every `nn.MaxPool2d` replaced by a random pooling.

    In eval mode the layers weigh by probability. Raises `NoEffect` for a model without such a layer.

    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(4, 8))
    >>> history = train(net, data, Recipe(epochs=1), [StochasticPooling()])
    >>> history.events[0]["text"]
    '1 pooling layers are now stochastic'
    """

    kind: str = "stochastic"  # or "s3"; or "average", the control
    grid: int = 2  # of S3Pool, in strides: 2 keeps half of each grid of twice the stride, 1 distorts least

    def __post_init__(self):
        choose("kind of pooling", self.kind, KINDS)
        within("S3Pool: grid", self.grid, "a whole number above 0")

    def on_fit_start(self, run: Run) -> None:
        generator = run.generator(self, share=True)

        def make(pool, name):
            parts = (pool.kernel_size, pool.stride, pool.padding)
            same = dict(ceil_mode=pool.ceil_mode, generator=generator)
            if self.kind == "stochastic":
                return StochasticPool2d(*parts, pool.dilation, **same, layer=name)
            if self.kind == "s3":
                return S3Pool2d(*parts, pool.dilation, **same, grid=self.grid * max(_pair(pool.stride)))
            if _pair(pool.dilation) != (1, 1):
                raise BadInput(f"average pooling has no dilation, pooling {name} has {pool.dilation}")
            return AveragePool2d(*parts, ceil_mode=pool.ceil_mode)

        run.log(self, f"{replace_pools_(run.model, make)} pooling layers are now {self.kind}")
