"""Wavelets in front of a network: the four sub-bands of an image become channels at half the resolution.

The thesis names this chapter by one word. It is taken to mean the use of wavelets that saves training time:
the first layers work on a quarter of the pixels (as in Fujieda et al. 2018, arXiv:1805.08620, and Williams &
Li 2018, who feed sub-bands to a network). Here is the transform, and wavelet pooling (Williams & Li, ICLR
2018). The stem in front of a network, bands that are computed once, and the wavelet-like auto-encoder have
modules of their own.

A one-level transform is a pair of matrices: bands = T_h x T_w^T, where T has a low and a high half of rows,
and x = S_h bands S_w^T with S the inverse of T. For Haar it comes to sums and differences of 2 x 2 pixels,
ten lines. Bands are ordered A, H, V, D as PyWavelets has them: A low both ways; H high along the height
(horizontal edges); V high along the width; D high both ways."""

import functools
import math

import torch
import torch.nn.functional as F

from effilib.errors import BadInput, choose
from effilib.methods import Info

__all__ = [
    "analysis", "butterfly", "flip_bands", "haar", "inverse_haar", "matrices", "synthesis", "wavelet_pool",
]  # fmt: skip

INFO = Info(
    name="Wavelets",
    name_de="Wavelets",
    chapter="7.3",
    paper="Chen et al. 2018 (WAE), arXiv:1712.07493; Williams & Li, ICLR 2018 (wavelet pooling)",
    claim="A network that reads wavelet sub-bands at half the resolution needs a fraction of the time; the "
    "learned variant (WAE) ran VGG16's inference 3.13 times faster on a CPU at 0.22 points more top-5 "
    "error.",
    cost_model="Layers before the first halving work on a quarter of the pixels; the stem reads 4 times "
    "the channels; Haar itself is 4 additions a pixel.",
    applies="networks that begin at full resolution",
)

# Low-pass filters (analysis, synthesis), in PyWavelets' order; high-pass ones follow from them by alternating
# signs.
_R3, _N = math.sqrt(3), 4 * math.sqrt(2)
_DB2 = [(1 - _R3) / _N, (3 - _R3) / _N, (3 + _R3) / _N, (1 + _R3) / _N]
_Q = math.sqrt(2) / 8
_CDF97 = [
    0.03782845550726404,
    -0.023849465019556843,
    -0.11062440441843718,
    0.37740285561283066,
    0.8526986790088938,
]
_CDF97_DUAL = [-0.06453888262869706, -0.04068941760916406, 0.41809227322161724, 0.7884856164055829]
FILTERS = {
    "haar": ([math.sqrt(0.5)] * 2, [math.sqrt(0.5)] * 2),
    "db2": (_DB2, _DB2[::-1]),
    "bior2.2": ([0, -_Q, 2 * _Q, 6 * _Q, 2 * _Q, -_Q], [0, 2 * _Q, 4 * _Q, 2 * _Q, 0, 0]),
    "bior4.4": ([0, *_CDF97, *_CDF97[-2::-1]], [0, *_CDF97_DUAL, *_CDF97_DUAL[-2::-1], 0, 0]),
}
BANDS = ("A", "H", "V", "D")


# The transform


def even(x: torch.Tensor) -> torch.Tensor:
    """Repeat the last row and column of x: (..., H, W) where their number is odd.

    >>> even(torch.ones(1, 1, 3, 5)).shape
    torch.Size([1, 1, 4, 6])
    """
    height, width = x.shape[-2:]
    return F.pad(x, (0, width % 2, 0, height % 2), mode="replicate") if height % 2 or width % 2 else x


def butterfly(x: torch.Tensor) -> torch.Tensor:
    """Return twice the Haar bands of an image.

    (N, C, H, W) -> (N, 4C, H/2, W/2). Exact for integers; H and W are even. First the C channels of A, then
    H, V, D.

    >>> butterfly(torch.tensor([[[[1, 2], [3, 4]]]])).flatten().tolist()
    [10, -4, -2, 0]
    """
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    s, t, u, v = a + b, c + d, a - b, c - d
    return torch.cat([s + t, s - t, u + v, u - v], 1)


def haar(x: torch.Tensor) -> torch.Tensor:
    """Return the Haar bands of an image.

    (N, C, H, W) -> (N, 4C, ceil(H/2), ceil(W/2)). Orthonormal: energy is kept.

    >>> haar(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])).flatten().tolist()
    [5.0, -2.0, -1.0, 0.0]
    """
    return butterfly(even(x)) / 2


def inverse_haar(bands: torch.Tensor) -> torch.Tensor:
    """Rebuild an image from its Haar bands.

    (N, 4C, h, w) -> (N, C, 2h, 2w).

    >>> inverse_haar(torch.tensor([5.0, -2.0, -1.0, 0.0]).view(1, 4, 1, 1)).flatten().tolist()
    [1.0, 2.0, 3.0, 4.0]
    """
    A, H, V, D = bands.chunk(4, 1)
    both = (1, -1)  # even and odd rows
    rows = [torch.stack([A + s * H + V + s * D, A + s * H - V - s * D], -1).flatten(-2) for s in both]
    return torch.stack(rows, -2).flatten(-3, -2) / 2


@functools.lru_cache
def matrices(wavelet: str, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the matrices (T, S) of analysis and synthesis.

    Of n values, n even. float64, (n, n), periodic. Rows of T: n/2 low-pass ones, then high-pass ones.
    y[k] = sum_j h[j] x[2k + L/2 - j mod n] with the filter h of length L: PyWavelets' mode "periodization".

    >>> T, S = matrices("bior4.4", 8)
    >>> torch.allclose(S @ T, torch.eye(8).double())
    True
    """
    low, dual = FILTERS[choose("wavelet", wavelet, FILTERS)]
    high = [(-1) ** (k + 1) * v for k, v in enumerate(dual)]
    T = torch.zeros(n, n, dtype=torch.float64)
    for half, h in enumerate((low, high)):
        for k in range(n // 2):
            for j, v in enumerate(h):
                T[half * n // 2 + k, (2 * k + len(h) // 2 - j) % n] += v
    return T, torch.linalg.inv(T)


def analysis(x: torch.Tensor, wavelet: str = "haar") -> torch.Tensor:
    """Compute one level of a wavelet transform, every channel by itself.

    (N, C, H, W) -> (N, 4C, ceil(H/2), ceil(W/2)), bands A, H, V, D. wavelet: one of `FILTERS`. Odd sizes are
    padded by one. Borders are periodic, except that Haar never reaches over one.

    >>> analysis(torch.ones(1, 3, 8, 8), "db2").shape
    torch.Size([1, 12, 4, 4])
    """
    if wavelet == "haar":
        return haar(x)
    x = even(x)
    rows, columns = (matrices(wavelet, n)[0].to(x) for n in x.shape[-2:])
    with torch.autocast(x.device.type, enabled=False):
        both = rows @ x @ columns.T
    top, bottom = both.chunk(2, -2)
    (A, V), (H, D) = top.chunk(2, -1), bottom.chunk(2, -1)
    return torch.cat([A, H, V, D], 1)


def synthesis(bands: torch.Tensor, wavelet: str = "haar") -> torch.Tensor:
    """Invert `analysis`: (N, 4C, h, w) -> (N, C, 2h, 2w).

    >>> x = torch.rand(1, 3, 8, 8)
    >>> torch.allclose(synthesis(analysis(x, "db2"), "db2"), x, atol=1e-5)
    True
    """
    if wavelet == "haar":
        return inverse_haar(bands)
    A, H, V, D = bands.chunk(4, 1)
    both = torch.cat([torch.cat([A, V], -1), torch.cat([H, D], -1)], -2)
    rows, columns = (matrices(wavelet, n)[1].to(bands) for n in both.shape[-2:])
    with torch.autocast(bands.device.type, enabled=False):
        return rows @ both @ columns.T


def flip_bands(bands: torch.Tensor, wavelet: str = "haar") -> torch.Tensor:
    """Return the bands of the mirrored image, from those of the image.

    Every band is mirrored; V and D, high along the width, are negated. Exact for Haar and an even width;
    raises `BadInput` for longer filters, whose bands do not lie symmetrically: mirror the image.

    >>> x = torch.rand(1, 3, 8, 8)
    >>> torch.equal(flip_bands(haar(x)), haar(x.flip(-1)))
    True
    """
    if choose("wavelet", wavelet, FILTERS) != "haar":
        raise BadInput(
            f"the bands of {wavelet} cannot be mirrored: mirror the images and transform them then"
        )
    A, H, V, D = bands.flip(-1).chunk(4, 1)
    return torch.cat([A, H, -V, -D], 1)


def wavelet_pool(x: torch.Tensor, wavelet: str = "haar") -> torch.Tensor:
    """Pool 2 x 2 pixels by wavelets (Williams & Li 2018).

    (N, C, H, W) -> (N, C, H/2, W/2). Two levels, the finest details dropped, the rest rebuilt. By perfect
    reconstruction that is the first level's A, so the second level is not computed. For Haar it is twice
    average pooling.

    >>> x = torch.rand(1, 3, 8, 8)
    >>> torch.allclose(wavelet_pool(x), 2 * F.avg_pool2d(x, 2))
    True
    """
    return analysis(x, wavelet).chunk(4, 1)[0]
