"""Kernels and images resized: the equations, and the surgery on a network and its optimizer.

If an image is enlarged by s, a kernel enlarged by s responds alike: (f_s * h_s)(x) = s^2 (f * h)(x / s)
(Porto Buarque de Gusmao et al. 2016, arXiv:1610.03623). Beside it PI-resize (Beyer et al. 2023, FlexiViT,
arXiv:2212.08013) for patch embeddings, whose stride is their kernel's size.
"""

import math
from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import nn

from effilib import models, surgery
from effilib.convolution import ApproxConv2d
from effilib.errors import BadInput, NoEffect, choose

__all__ = [
    "SMALLEST", "kernels", "matrix", "pi_resize", "recalibrate_", "rescale_", "rescale_kernel", "resize",
    "scaled",
]  # fmt: skip

SMALLEST = 5  # a 3x3 kernel has no smaller one that means anything: 3 to 2 taps misses the response by 40 %


# The equations


@lru_cache(maxsize=64)  # of a step's images: neither computed nor copied to the device anew
def matrix(
    n: int, m: int, dtype: torch.dtype = torch.double, device: str | torch.device = "cpu"
) -> torch.Tensor:
    """Return the map (m, n) that resizes n samples to m.

    Bilinear, pixels are squares, antialiased where m < n. Rows add up to 1.

    >>> matrix(2, 4).tolist()
    [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]
    """
    old, new = (torch.arange(k, dtype=torch.double) + 0.5 for k in (n, m))
    distance = (old - new[:, None] * n / m).abs() / max(
        n / m, 1
    )  # from centre to centre, in pixels of the coarser side
    R = (1 - distance).clamp(min=0)
    return (R / R.sum(1, keepdim=True)).to(device, dtype)


def resize(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize images x: (N, C, H, W) -> (N, C, h, w) with (h, w) = `size`.

    R_h x R_w^T, on their device, channels last in memory; the same as `F.interpolate(x, size,
    mode="bilinear", antialias=True)`.

    >>> resize(torch.ones(1, 3, 8, 8), (4, 6)).shape
    torch.Size([1, 3, 4, 6])
    """
    (N, C, H, W), (h, w) = x.shape, size
    if (h, w) == (H, W):
        return x
    rows = x.permute(0, 2, 3, 1).reshape(N, H, W * C)  # as it lies in memory
    rows = matrix(H, h, x.dtype, x.device) @ rows  # (N, h, W * C)
    rows = matrix(W, w, x.dtype, x.device) @ rows.view(N * h, W, C)  # (N * h, w, C)
    return rows.view(N, h, w, C).permute(0, 3, 1, 2)


def rescale_kernel(W: torch.Tensor, k: int, amplitude: bool = True) -> torch.Tensor:
    """Rescale kernels W: (O, C, n, n) -> (O, C, k, k), and their amplitude.

    W' = (n / k)^2 R W R^T, R being the map that resizes n samples to k. Then `conv(resize(x), W')` is
    `resize(conv(x, W))` for band-limited x and W, if x is resized by k / n too. amplitude: the factor (n /
    k)^2; without it the response is (k / n)^2 times as large. Linear in W, the identity for k = n.

    >>> W = rescale_kernel(torch.ones(1, 1, 3, 3), 5)
    >>> W.shape, round(W.sum().item(), 3)  # a kernel's sum stays
    (torch.Size([1, 1, 5, 5]), 9.0)
    """
    n = W.shape[-1]
    R = matrix(n, k).to(W)
    return (R @ W @ R.T) * ((n / k) ** 2 if amplitude else 1)


def pi_resize(W: torch.Tensor, k: int) -> torch.Tensor:
    """Resize patch embeddings W: (O, C, n, n) -> (O, C, k, k) by a pseudo-inverse.

    w' = pinv(B^T) w, B being the map that resizes patches from n x n to k x k. It keeps products with resized
    patches, <x, w> = <B x, w'>: exactly where k >= n, else with the least mean square error over white
    patches (FlexiViT). B is a Kronecker product R x R, and so is its pseudo-inverse: one small matrix a side
    will do.

    >>> W, patch = torch.rand(1, 1, 4, 4), torch.rand(1, 1, 4, 4)
    >>> torch.allclose((pi_resize(W, 8) * resize(patch, (8, 8))).sum(), (W * patch).sum(), rtol=1e-4)
    True
    """
    P = torch.linalg.pinv(matrix(W.shape[-1], k)).T.to(W)  # (k, n)
    return P @ W @ P.T


# Surgery


def is_patch(conv):
    """Return whether a convolution cuts patches: stride as large as the kernel, no padding.

    >>> is_patch(nn.Conv2d(3, 8, 4, stride=4)), is_patch(nn.Conv2d(3, 8, 3))
    (True, False)
    """
    k = conv.kernel_size
    return k[0] > 1 and conv.stride == k and conv.padding in ("valid", (0, 0)) and conv.dilation == (1, 1)


def kernels(model: nn.Module, smallest: int = SMALLEST) -> dict[str, int]:
    """Return the kernels that can be rescaled, name -> size.

    They are odd, square, of size >= `smallest` and stride 1; the stem may have any stride. The stem is the
    first convolution that the model holds; as a patch embedding it may have any size. Left alone are 1x1
    kernels and even ones (half a pixel would be lost), convolutions of a user's own class, frozen weights,
    and those that two layers share.

    >>> kernels(nn.Sequential(nn.Conv2d(3, 8, 7, padding=3), nn.Conv2d(8, 8, 3, padding=1)))
    {'0': 7}
    """
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    stem = next(iter(convs.values()), None)
    holders = [p for m in model.modules() for p in m._parameters.values()]

    def able(m):
        k = m.kernel_size[0]
        if (
            type(m) not in (nn.Conv2d, ApproxConv2d)
            or not m.weight.requires_grad
            or m.kernel_size != (k, k)
            or sum(p is m.weight for p in holders) > 1
        ):
            return False
        return (m is stem and is_patch(m)) or (
            k % 2 == 1 and k >= max(smallest, 3) and (m is stem or m.stride == (1, 1))
        )

    return {name: m.kernel_size[0] for name, m in convs.items() if able(m)}


def scaled(conv: nn.Conv2d, k: int, factor: float) -> int:
    """Return a kernel's size on images `factor` times as large.

    Odd and at least 3; of a patch the nearest whole number, at least 2.

    >>> scaled(nn.Conv2d(3, 8, 7), 7, 0.75), scaled(nn.Conv2d(3, 8, 8, stride=8), 8, 0.5)
    (5, 4)
    """
    return max(2, round(k * factor)) if is_patch(conv) else max(3, 2 * math.floor(k * factor / 2) + 1)


@torch.no_grad()
def rescale_(
    model: nn.Module,
    k: int | float | dict[str, int],
    optimizer: torch.optim.Optimizer | None = None,
    *,
    smallest: int = SMALLEST,
    amplitude: bool = True,
) -> dict[str, tuple[int, int]]:
    """Rescale a network's kernels, in place.

    Returns what was done: dict name -> (size before, size after). k: a size for every kernel that
    `kernels(model, smallest)` lists (int), a factor on their sizes (float), or dict name -> size. Padding
    follows, so that maps keep their relation to the image; a patch embedding is PI-resized and its stride
    follows as well. amplitude: see `rescale_kernel`.

    The optimizer holds the new Parameters in the place of the old ones. Their momentum begins anew at 0: a
    gradient follows the adjoint of the map that the weights follow, g = A^T g', and to an enlarged kernel
    there are many g' for one g. Other layers keep theirs. Raises `NoEffect` if no kernel changes, `BadInput`
    for a size or name that cannot be.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 7, padding=3))
    >>> rescale_(net, 5), net[0].padding
    ({'0': (7, 5)}, (2, 2))
    """
    able = kernels(model, 1 if isinstance(k, dict) else smallest)
    if isinstance(k, dict):
        wanted = {choose("kernel that can be rescaled", name, list(able)): size for name, size in k.items()}
    elif k > 0:
        wanted = {
            name: k if isinstance(k, int) else scaled(model.get_submodule(name), n, k)
            for name, n in able.items()
        }
    else:
        raise BadInput(f"kernel rescaling: a size or factor of {k}, it must be above 0")
    for name, size in wanted.items():
        patch = is_patch(model.get_submodule(name))
        if not isinstance(size, int) or size < 2 or (size % 2 == 0 and not patch):
            raise BadInput(
                f"kernel rescaling: {name} cannot have size {size}: an even kernel has no centre, and 1x1 "
                f"sees no neighbour"
            )
    done = {name: (able[name], size) for name, size in wanted.items() if size != able[name]}
    if not done:
        what = (
            f"no kernel of at least {smallest} x {smallest} with stride 1"
            if not able
            else "every kernel has its size already"
        )
        raise NoEffect(f"kernel rescaling: {type(model).__name__}: {what}")
    for name, (_, size) in done.items():
        _rescale(model.get_submodule(name), size, optimizer, amplitude)
    return done


def _rescale(conv, k, optimizer, amplitude):
    n, patch = conv.kernel_size[0], is_patch(conv)

    def change(t, power):
        if power is not None:  # the optimizer's state
            return t.new_zeros(*t.shape[:2], k, k)
        return pi_resize(t, k) if patch else rescale_kernel(t, k, amplitude)

    surgery.replace_(conv, "weight", change, optimizer)
    if optimizer is not None and "exp_avg" in optimizer.state.get(conv.weight, ()):
        del optimizer.state[conv.weight]  # Adam's bias correction counts steps: it begins anew too
    padding = (
        conv.padding
        if isinstance(conv.padding, str)
        else tuple(round(p * (k - 1) / (n - 1)) for p in conv.padding)
    )
    models.set_kernel_(conv, (k, k), (k, k) if patch else conv.stride, padding)


def recalibrate_(model: nn.Module, batches: Iterable[torch.Tensor]) -> int:
    """Set BatchNorm's running statistics to the means over batches, in place.

    batches: images (N, C, H, W). Returns how many layers were set. At another resolution, or behind a
    rescaled kernel, the old statistics are of other numbers. Raises `NoEffect` if the model has none.

    >>> recalibrate_(nn.Sequential(nn.BatchNorm2d(1)), [torch.ones(2, 1, 2, 2)])
    1
    """
    found = models.reestimate_(model, batches, training=True)
    if not found:
        raise NoEffect(f"{type(model).__name__} has no BatchNorm with running statistics")
    return found
