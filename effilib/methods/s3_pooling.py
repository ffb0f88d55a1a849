"""Take maxima at stride 1, then random rows and columns: S3Pool (Zhai et al. 2017, arXiv:1611.05138)."""

from functools import reduce

import torch
from torch import nn
from torch.nn.modules.utils import _pair

from effilib.errors import BadInput
from effilib.methods.pooling_windows import Geometry, chunks, flatten

__all__ = ["S3Pool2d"]


class Maximum(torch.autograd.Function):
    """max(a, b), with the gradient for a where they are equal; PyTorch's own is several times as slow."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(torch.ge(a, b, out=torch.empty_like(a)))
        return torch.maximum(a, b)

    @staticmethod
    def backward(ctx, dy):
        (first,) = ctx.saved_tensors
        da = dy * first
        return da, dy - da


def pick(n, grid, keep, generator=None):
    """A sorted random choice of `keep` per `grid` of 0 ... n - 1 (fewer in a smaller last grid)."""
    chosen = []
    for o in range(0, n, grid):
        here = min(grid, n - o)
        chosen.append(o + torch.randperm(here, generator=generator)[: here * keep // grid].sort().values)
    return torch.cat(chosen)


class S3Pool2d(nn.MaxPool2d):
    """Take maxima at stride 1, then random rows and columns.

    S3Pool, Zhai et al. 2017. Train: the map of maxima is cut into grids of `grid` rows (and columns); from
    each, grid / stride are kept, drawn without replacement and sorted, the same for all images and channels.
    Eval: the mean of each stride x stride cell of that map. Shapes are those of `nn.MaxPool2d` in both modes.
    grid: pixels, a multiple of the stride; None is the stride itself, the weakest distortion. generator: on
    the CPU. Raises `BadInput` for a grid that is no multiple of the stride, and for dilation.

    >>> S3Pool2d(2, grid=4)(torch.rand(1, 3, 8, 8)).shape
    torch.Size([1, 3, 4, 4])
    """

    def __init__(
        self, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, *, grid=None, generator=None
    ):
        super().__init__(kernel_size, stride, padding, dilation, ceil_mode=ceil_mode)
        self.grid, self.generator = grid, generator
        if _pair(dilation) != (1, 1):
            raise BadInput(f"S3Pool: dilation {dilation} has no meaning here, only 1")
        if grid is not None and any(grid < s or grid % s for s in _pair(self.stride)):
            raise BadInput(f"S3Pool: grid {grid} is no multiple of the stride {self.stride}")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() == 3:
            return self.forward(x[None])[0]
        parts = (self.kernel_size, self.stride, self.padding, self.dilation)
        geometry = Geometry(tuple(x.shape[2:]), *map(_pair, parts), self.ceil_mode)
        flat, back = flatten(x)
        starts = [self.starts(out, s) for out, s in zip(geometry.out, geometry.stride, strict=True)]
        if self.training:
            return back(self.reduce(flat, geometry, starts))
        parts = [flat[i] for i in chunks((len(flat), *geometry.size, flat.shape[-1]))]
        return back(torch.cat([self.reduce(y, geometry, starts) for y in parts]))

    def starts(self, out: int, stride: int) -> torch.Tensor:
        """Return where windows begin along an axis.

        A random choice of `out` places, in eval mode all of them.
        """
        grid = self.grid or stride
        if not self.training:
            return torch.arange(out * stride)
        return pick(out * stride, grid, grid // stride, self.generator)

    def reduce(self, y: torch.Tensor, geometry: Geometry, starts: list[torch.Tensor]) -> torch.Tensor:
        """Maxima of y: (B, H, W, C) along rows, then columns: windows are separable."""
        for dim in (1, 2):
            kernel, padding, last = geometry.kernel[dim - 1], geometry.padding[dim - 1], y.shape[dim] - 1
            # windows that reach beyond the image see its border again, which changes no maximum
            lines = [(starts[dim - 1] + d - padding).clamp_(0, last).to(y.device) for d in range(kernel)]
            y = reduce(Maximum.apply, [y.index_select(dim, line) for line in lines])
        if self.training:
            return y
        (h, w), (sh, sw) = geometry.out, geometry.stride
        # only after both: a mean and a maximum do not commute
        return y.reshape(len(y), h, sh, w, sw, y.shape[-1]).mean((2, 4))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, grid={self.grid}"
