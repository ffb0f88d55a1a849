"""Lay out the windows of a pooling layer, padding and all, as views of the image."""

import ctypes
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from effilib.errors import BadInput

__all__ = ["Geometry"]

CHUNK = 2**17  # windows at a time: what is computed in between stays in the processor's cache


@dataclass(frozen=True)
class Geometry:
    """Lay a pooling layer's windows over an image padded by 0.

    Shapes are those of `max_pool2d`. Each setting is one of rows and one of columns.

    >>> windows = Geometry((5, 6), (2, 2), (2, 2), (0, 0), (1, 1), ceil=True)
    >>> windows.out, windows.behind
    ((3, 3), (1, 0))
    """

    size: tuple[int, int]  # the image's
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil: bool

    @property
    def spans(self) -> list[int]:
        """Pixels from a window's first row (column) to its last."""
        return [d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]

    @property
    def out(self) -> tuple[int, ...]:
        """(H', W'): rounded up with `ceil`, but no window begins in the padding behind the image."""
        sizes = []
        for n, span, s, p in zip(self.size, self.spans, self.stride, self.padding, strict=True):
            out = (n + 2 * p - span + (s - 1 if self.ceil else 0)) // s + 1
            sizes.append(out - (self.ceil and (out - 1) * s >= n + p))
        if min(sizes) < 1:
            raise BadInput(
                f"pooling: windows of {self.kernel} do not fit into images of {self.size}, padded by "
                f"{self.padding}"
            )
        return tuple(sizes)

    @property
    def behind(self) -> tuple[int, ...]:
        """Rows and columns of 0 that the last windows need behind the image, beyond what is there."""
        sides = zip(self.out, self.size, self.spans, self.stride, self.padding, strict=True)
        return tuple(max(0, (o - 1) * s + span - n - p) for o, n, span, s, p in sides)

    @property
    def sides(self) -> ctypes.Array:
        """What the kernel wants: per side its size, number of windows, kernel, stride, padding, dilation."""
        parts = (self.size, self.out, self.kernel, self.stride, self.padding, self.dilation)
        return (ctypes.c_int64 * 12)(*(n for side in zip(*parts, strict=True) for n in side))

    @property
    def padded(self) -> tuple[int, ...]:
        """(H, W) of the image with all zeros around it."""
        return tuple(n + p + b for n, p, b in zip(self.size, self.padding, self.behind, strict=True))

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> with zeros around, as far as windows reach."""
        (top, left), (bottom, right) = self.padding, self.behind
        return F.pad(x, (0, 0, left, right, top, bottom)) if top or left or bottom or right else x

    def windows(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The K = kh kw elements of all windows, as strided views (B, H', W', C) of the padded x."""
        (h, w), (sh, sw), (dh, dw) = self.out, self.stride, self.dilation
        corners = [(i * dh, j * dw) for i in range(self.kernel[0]) for j in range(self.kernel[1])]
        return [x[:, i : i + sh * (h - 1) + 1 : sh, j : j + sw * (w - 1) + 1 : sw] for i, j in corners]


def flatten(x):
    """(N, C, H, W) -> (B, H, W, C') without a copy, and the way back: what lies side by side comes last."""
    n, c = x.shape[:2]
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return x.permute(0, 2, 3, 1), lambda y: y.permute(0, 3, 1, 2)
    return x.contiguous().flatten(0, 1).unsqueeze(-1), lambda y: y.squeeze(-1).unflatten(0, (n, c))


def chunks(shape):
    """Slices of the first dimension with about `CHUNK` windows each, of `shape` (B, H', W', C)."""
    size = max(1, CHUNK // max(1, torch.Size(shape[1:]).numel()))
    return [slice(i, i + size) for i in range(0, max(1, shape[0]), size)]
