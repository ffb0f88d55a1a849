"""Exact convolutions of integers: in C++ with AVX512-VNNI's 16-bit products, elsewhere in float64.

Both give the same numbers, the integer sum rounded once to fp32 and times a power of two, so that no result
depends on the machine.
"""

import ctypes
import functools
import math

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from effilib.clock import cpu_flags
from effilib.convolution import Convolution
from effilib.kernels import compiler

__all__ = ["backward_w", "backward_x", "convolve_int8", "forward", "library", "quantise"]

NEEDS = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni")
LANES = 16  # output channels of a register


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None without them, and say why once.

    >>> library() is library()
    True
    """
    instead = "products of 16-bit integers are computed in float64, which is slow"
    found = compiler.load("int16_convolution", instead, NEEDS)
    if found is None:
        return None
    size, pointer, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    found.quantise.argtypes = [
        pointer, number, size, number, number, number, ctypes.c_uint32, pointer, size
    ]  # fmt: skip
    found.convolve.argtypes = [
        pointer, pointer, pointer, number, size, size, ctypes.c_float, pointer, size
    ]  # fmt: skip
    found.weight_gradient.argtypes = [pointer, pointer, pointer, size, pointer, size]
    return found


def quantise(
    x: torch.Tensor, bits: int, *, stochastic: bool = False, seed: int = 0, guess: int = 0
) -> tuple[torch.Tensor, float] | None:
    """Return x as (integers, scf), or None without a kernel.

    x: fp32 or bf16. scf is nan if x is not finite. guess: the scf that is tried first; a right one saves a
    pass, and changes nothing else. Random numbers follow from the seed and an element's place in memory.

    >>> found = quantise(torch.tensor([1.0, 0.3]), 4)
    >>> found is None or (found[0].tolist(), found[1]) == ([4, 1], 2)
    True
    """
    formats = {torch.float32: 0, torch.bfloat16: 1}
    if x.device.type != "cpu" or x.dtype not in formats or library() is None:
        return None
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        x = x.contiguous()
    I = torch.empty_like(x, dtype=torch.int8 if bits <= 8 else torch.int16)  # noqa: E741  (the paper's symbol)
    scf = library().quantise(
        x.data_ptr(), formats[x.dtype], x.numel(), bits, guess, stochastic, seed, I.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return I, float("nan") if scf == -(2**31) else float(scf)


def forward(
    x: torch.Tensor, w: torch.Tensor, product: Convolution, bits: int, scale: float = 1.0
) -> torch.Tensor:
    """Return scale (x * w) in fp32.

    x: (N, C, H, W), w: (O, C, k, k), int8 or int16 of at most `bits` bits, sign included. scale: a power of
    two.

    >>> x, w = (torch.full(shape, 200, dtype=torch.int16) for shape in ((1, 1, 4, 4), (1, 1, 3, 3)))
    >>> forward(x, w, Convolution(), bits=9).unique().tolist()  # 9 x 200^2
    [360000.0]
    """
    if _compiled_for(x) is None:
        return _exact(product.forward(x.double(), w.double()), scale)
    spans = zip(x.shape[2:], w.shape[2:], product.stride, product.padding, product.dilation, strict=True)
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in spans]
    shape = [len(x), len(w), *size]
    return OPS.convolve_int16(x, w.permute(2, 3, 1, 0), shape, _geometry(product), False, bits, scale)


def backward_x(
    dy: torch.Tensor,
    x_shape: torch.Size,
    w: torch.Tensor,
    product: Convolution,
    bits: int,
    scale: float = 1.0,
) -> torch.Tensor:
    """Return dX of integers as `forward` returns y.

    >>> dy, w = torch.ones(1, 1, 2, 2).short(), torch.ones(1, 1, 3, 3).short()
    >>> backward_x(dy, (1, 1, 4, 4), w, Convolution(), bits=2)[0, 0, 0].tolist()
    [1.0, 2.0, 2.0, 1.0]
    """
    if _compiled_for(dy) is None:
        x = dy.new_empty(x_shape, dtype=torch.float64)
        return _exact(product.backward(dy.double(), x, w.double(), (True, False))[0], scale)
    shape = list(x_shape)
    return OPS.convolve_int16(dy, w.permute(2, 3, 0, 1), shape, _geometry(product), True, bits, scale)


def backward_w(
    dy: torch.Tensor,
    x: torch.Tensor,
    w_shape: torch.Size,
    product: Convolution,
    bits: int,
    scale: float = 1.0,
) -> torch.Tensor:
    """Return dW, (O, C, k, k), of integers as `forward` returns y.

    >>> dy, x = torch.ones(1, 1, 2, 2).short(), torch.ones(1, 1, 4, 4).short()
    >>> backward_w(dy, x, (1, 1, 3, 3), Convolution(), bits=2).unique().tolist()
    [4.0]
    """
    if _compiled_for(dy) is None:
        w = x.new_empty(w_shape, dtype=torch.float64)
        return _exact(product.backward(dy.double(), x.double(), w, (False, True))[1], scale)
    whole = OPS.weight_gradient_int16(dy, x, list(w_shape[2:]), _geometry(product), bits)
    return _exact(whole, scale).permute(3, 2, 0, 1)


def convolve_int8(
    x: torch.Tensor, w: torch.Tensor, product: Convolution, x_scale: float, w_scale: float
) -> torch.Tensor:
    """Return x_scale w_scale (x * w) in bf16, of int8.

    x, w: int8, without groups. By oneDNN where processors have such products and its int32 holds the sum for
    certain.

    >>> x, w = torch.full((1, 1, 4, 4), -100).to(torch.int8), torch.ones(1, 1, 3, 3).to(torch.int8)
    >>> convolve_int8(x, w, Convolution(), 0.5, 0.5).unique().tolist()
    [-225.0]
    """
    native = x.device.type == "cpu" and cpu_flags() & {"avx512_vnni", "avx_vnni", "amx_int8"}
    held = w[0].numel() <= (2**31 - 1) // (255 * 128)  # it multiplies unsigned by signed bytes
    if not (native and INT8 and held):
        return forward(x, w, product, 8, x_scale * w_scale).bfloat16()
    geometry = (list(product.stride), list(product.padding), list(product.dilation), 1)
    scales, zeros = torch.full((len(w),), w_scale), torch.zeros(len(w), dtype=torch.int32)
    packed = torch.ops.onednn.qconv_prepack(w.contiguous(), scales, x_scale, 128, *geometry, list(x.shape))
    x = x.contiguous(memory_format=torch.channels_last).view(torch.uint8) + 128  # it reads unsigned numbers
    return INT8(
        x, x_scale, 128, packed, scales, zeros, None, *geometry, 1.0, 0, torch.bfloat16, "none", [], ""
    )


def _compiled_for(t):
    return library() if t.device.type == "cpu" else None


def _exact(whole, scale):
    """float64 integers, each rounded once, times a power of two."""
    return whole.float() * scale


def _largest(bits):
    return 2 ** (bits - 1) - 1


def _geometry(product):
    return [*product.stride, *product.padding, *product.dilation]


def _rows(t):
    """t as it is read: int16, channels side by side."""
    return t.to(torch.int16).contiguous(memory_format=torch.channels_last)


def _shape(x, y, size, geometry):
    """`Shape` in C++."""
    (N, C, *HW), (_, O, *out) = x, y  # noqa: E741
    return (ctypes.c_int64 * 15)(N, *HW, C, *out, O, *size, *geometry)


def _convolve(x, w, y_shape, geometry, transposed, bits, scale):
    """y = x * w or its adjoint. w: (k, k, C, O), C channels of what is read and O of what is written."""
    *size, C, O = w.shape  # noqa: E741
    lanes = LANES if -O % (2 * LANES) >= LANES else 2 * LANES
    w = F.pad(w.to(torch.int16), (0, -O % lanes, 0, C % 2))
    w = w.reshape(-1, (C + 1) // 2, 2, (O - 1) // lanes + 1, lanes).permute(3, 0, 1, 4, 2).contiguous()
    x, y = _rows(x), torch.empty(y_shape, memory_format=torch.channels_last)
    library().convolve(
        x.data_ptr(), w.data_ptr(), _shape(x.shape, y_shape, size, geometry), transposed, lanes,
        _largest(bits), scale, y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def _weight_gradient(dy, x, size, geometry, bits):
    """dW as exact sums, (k, k, C, O)."""
    dy, x = _rows(dy), _rows(x)
    dw = torch.zeros(*size, x.shape[1], dy.shape[1], dtype=torch.float64)
    library().weight_gradient(
        dy.data_ptr(), x.data_ptr(), _shape(x.shape, dy.shape, size, geometry), _largest(bits),
        dw.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return dw


# As operations of PyTorch, so that its counter of FLOPs sees them

_DEFINED = torch.library.Library("effilib", "DEF")
_DEFINED.define(
    "convolve_int16(Tensor x, Tensor w, int[] y_shape, int[] geometry, bool transposed, int bits, "
    "float scale) -> Tensor"
)
_DEFINED.define("weight_gradient_int16(Tensor dy, Tensor x, int[] size, int[] geometry, int bits) -> Tensor")
_DEFINED.impl("convolve_int16", _convolve, "CPU")
_DEFINED.impl("weight_gradient_int16", _weight_gradient, "CPU")
OPS = torch.ops.effilib


@register_flop_formula(OPS.convolve_int16)
def _convolve_flops(x, w, y_shape, geometry, transposed, *args, **kwargs):
    pixels = x if transposed else y_shape
    return 2 * x[0] * math.prod(pixels[2:]) * math.prod(w)


@register_flop_formula(OPS.weight_gradient_int16)
def _weight_gradient_flops(dy, x, size, *args, **kwargs):
    return 2 * math.prod(dy) * x[1] * math.prod(size)


def _int8_flops(x, x_scale, x_zero, w, *args, out_shape, **kwargs):
    return 2 * math.prod(out_shape) * math.prod(w[1:])


INT8 = getattr(torch.ops.onednn, "qconv2d_pointwise", None)  # PyTorch has it on x86 only
if INT8:
    register_flop_formula(INT8)(_int8_flops)
