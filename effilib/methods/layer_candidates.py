"""What may stand in a convolution's place: cheaper structures, their products, and what they cannot hold.

Depthwise-separable, grouped and bottleneck structures have BatchNorm and ReLU between their parts and are
drawn anew (Turner et al. 2020, BlockSwap, arXiv:1906.04113); low-rank and spatial ones are linear, and hold a
truncated singular value decomposition of the filters.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from effilib.convolution import guard_
from effilib.errors import BadInput, choose
from effilib.normalization import Layers

__all__ = [
    "CANDIDATES", "ORIGINAL", "Replacement", "Site", "factors", "fits", "parts", "passes", "replacement",
    "site_of", "spectral", "why_left",
]  # fmt: skip

CANDIDATES = (  # from the least saving to the most at equal widths
    "lowrank/2", "group/4", "bneck/2", "spatial/2", "lowrank/4", "group/8", "spatial/4", "dwsep", "bneck/4",
)  # fmt: skip
ORIGINAL = "conv"
# BatchNorm and ReLU between their parts, as in BlockSwap; the others factorise W
ACTIVATED = ("dwsep", "group", "bneck")


@dataclass(frozen=True, kw_only=True)
class Site:
    """Describe a convolution where it stands.

    C -> O channels, its geometry, and what it reads, (N, C, H, W) of `dtype`; first: the images, which need
    no gradient.

    >>> site = Site(C=16, O=32, kernel=(3, 3), stride=(1, 1), padding=(1, 1), H=8, W=8)
    >>> site.flops(), site.flops("dwsep")
    (589824, 83968)
    """

    C: int
    O: int  # noqa: E741  (the literature's symbol)
    kernel: tuple
    stride: tuple
    padding: tuple
    bias: bool = False
    N: int = 1
    H: int = 1
    W: int = 1
    dtype: str = "float32"
    first: bool = False

    def flops(self, candidate: str = ORIGINAL) -> int:
        """Return the FLOPs of a candidate's forward pass at this site."""
        total, (H, W) = 0, (self.H, self.W)
        for C, O, k, s, p, g in parts(candidate, self):  # noqa: E741
            H, W = ((n + 2 * b - a) // c + 1 for n, a, b, c in zip((H, W), k, p, s, strict=True))
            total += 2 * self.N * O * H * W * (C // g) * k[0] * k[1]
        return total


def parts(candidate: str, site: Site) -> list[tuple]:
    """Return a candidate's convolutions: (C, O, kernel, stride, padding, groups) each.

    Raises `BadInput` for an unknown or unfitting one.

    >>> site = Site(C=16, O=32, kernel=(3, 3), stride=(1, 1), padding=(1, 1))
    >>> [(C, O, kernel, groups) for C, O, kernel, _, _, groups in parts("dwsep", site)]
    [(16, 16, (3, 3), 16), (16, 32, (1, 1), 1)]
    """
    kind, _, number = candidate.partition("/")
    choose("candidate", kind, (ORIGINAL, "dwsep", "group", "bneck", "lowrank", "spatial"))
    C, O, k, s, p, r = site.C, site.O, site.kernel, site.stride, site.padding, int(number or 1)  # noqa: E741
    point = ((1, 1), (1, 1), (0, 0), 1)
    if kind == ORIGINAL:
        return [(C, O, k, s, p, 1)]
    if (kind == "group" and C % r) or min(C, O) // r < 1:
        raise BadInput(f"candidate {candidate} does not fit {C} -> {O} channels")
    if kind in ("dwsep", "group"):
        return [(C, C, k, s, p, C if kind == "dwsep" else r), (C, O, *point)]
    if kind == "bneck":
        return [(C, C // r, *point), (C // r, O // r, k, s, p, 1), (O // r, O, *point)]
    if kind == "lowrank":
        return [(C, O // r, k, s, p, 1), (O // r, O, *point)]
    return [(C, O // r, (k[0], 1), (s[0], 1), (p[0], 0), 1), (O // r, O, (1, k[1]), (1, s[1]), (0, p[1]), 1)]


def fits(candidate: str, site: Site) -> bool:
    """Return whether a candidate fits a site and does fewer products.

    >>> site = Site(C=16, O=32, kernel=(3, 3), stride=(1, 1), padding=(1, 1), H=8, W=8)
    >>> fits("group/4", site), fits("group/3", site)  # 3 does not divide 16
    (True, False)
    """
    try:
        return site.flops(candidate) < site.flops()
    except BadInput:
        return False


def why_left(conv: nn.Module) -> str:
    """Return why no candidate can replace a layer, or "".

    >>> why_left(nn.Conv2d(4, 8, 3, dilation=2))
    'it is dilated'
    """
    if type(conv) is not nn.Conv2d:
        return f"it is a {type(conv).__name__}"
    reasons = {
        "it is grouped already": conv.groups > 1,
        "it is dilated": any(d > 1 for d in conv.dilation),
        f"its padding is {conv.padding_mode}": conv.padding_mode != "zeros",
        "it pads an even filter": conv.padding == "same" and any(k % 2 == 0 for k in conv.kernel_size),
        "it is frozen": not conv.weight.requires_grad,
        "its weight is computed": "weight" not in conv._parameters,
        "it has a hook": bool(conv._forward_hooks or conv._forward_pre_hooks),
    }
    return next((why for why, holds in reasons.items() if holds), "")


def site_of(conv: nn.Conv2d, **images) -> Site:
    """Return the site of a convolution.

    images: N, H, W and dtype of what it reads.

    >>> site_of(nn.Conv2d(4, 8, 3, padding="same")).padding
    (1, 1)
    """
    pad = {"valid": (0, 0), "same": tuple(k // 2 for k in conv.kernel_size)}.get(conv.padding, conv.padding)
    geometry = dict(kernel=tuple(conv.kernel_size), stride=tuple(conv.stride), padding=tuple(pad))
    return Site(C=conv.in_channels, O=conv.out_channels, bias=conv.bias is not None, **geometry, **images)


def passes(candidate: str, site: Site) -> float:
    """Return the share of channels at a candidate's narrowest part, 0..1.

    >>> site = Site(C=16, O=32, kernel=(3, 3), stride=(1, 1), padding=(1, 1))
    >>> passes("lowrank/4", site), passes("dwsep", site)
    (0.5, 1.0)
    """
    return min(1.0, min(written for _, written, *_ in parts(candidate, site)) / min(site.C, site.O))


class Replacement(Layers):
    """Stand for a convolution; read and write the same channels.

    >>> module = Replacement(nn.Conv2d(4, 2, 3), nn.Conv2d(2, 8, 1))
    >>> module.in_channels, module.out_channels
    (4, 8)
    """

    @property
    def in_channels(self):
        """Return how many channels it reads."""
        return self[0].in_channels

    @property
    def out_channels(self):
        """Return how many channels it writes."""
        return self[-1].out_channels


def replacement(
    candidate: str,
    site: Site,
    generator: torch.Generator | None = None,
    *,
    norm: bool = True,
    conv: nn.Conv2d | None = None,
) -> Replacement:
    """Return a candidate's module, of the site's input and output shapes.

    Its input and output have the same shapes. Weights are He-normal (fan in; gain 1 where no ReLU follows
    within), drawn from `generator`. norm: BatchNorm between the parts of a candidate that has ReLUs there.
    conv: a trained convolution; then the parts are its best linear factorisation, with neither.

    >>> site = Site(C=16, O=32, kernel=(3, 3), stride=(1, 1), padding=(1, 1))
    >>> replacement("bneck/2", site)(torch.zeros(1, 16, 8, 8)).shape
    torch.Size([1, 32, 8, 8])
    """
    geometry, layers = parts(candidate, site), []
    given = factors(conv.weight.detach(), candidate) if conv is not None else None
    activated = candidate.split("/")[0] in ACTIVATED and given is None
    for i, (C, O, k, s, p, g) in enumerate(geometry):  # noqa: E741
        last = i == len(geometry) - 1
        layer = nn.utils.skip_init(
            nn.Conv2d, C, O, k, s, p, groups=g, bias=site.bias and last
        )  # draws nothing from global state
        with torch.no_grad():
            if given:
                layer.weight.copy_(given[i])
            else:
                nn.init.kaiming_normal_(
                    layer.weight, nonlinearity="relu" if last or activated else "linear", generator=generator
                )
            if layer.bias is not None:
                layer.bias.copy_(conv.bias) if given else layer.bias.zero_()
        layers.append(layer)
        if activated and not last:
            layers += [nn.BatchNorm2d(O)] * norm + [nn.ReLU(inplace=True)]
    return guard_(Replacement(*layers))


def _halves(M, d):
    """(L, R) with L R the best approximation of M (..., m, n) of rank d."""
    U, S, V = torch.linalg.svd(M, full_matrices=False)
    short = max(0, d - S.shape[-1])  # M may have fewer directions than the candidate has room for
    U, S, V = F.pad(U, (0, short)), F.pad(S, (0, short)), F.pad(V, (0, 0, 0, short))
    root = S[..., :d].sqrt()
    return U[..., :d] * root[..., None, :], root[..., :, None] * V[..., :d, :]


def _matrix(W, candidate):
    """(M, d): the matrix, or a stack of them, that a candidate holds at rank d. W: filters (O, C, kh, kw)."""
    (O, C, kh, kw), (kind, _, number) = W.shape, candidate.partition("/")  # noqa: E741
    r = int(number or 1)
    if kind == "lowrank":
        return W.reshape(O, -1), O // r
    if kind == "spatial":
        return W.permute(1, 2, 0, 3).reshape(C * kh, O * kw), O // r
    groups = C if kind == "dwsep" else r
    return W.reshape(O, groups, -1).transpose(0, 1), C // groups  # (g, O, C/g kh kw)


def factors(W: torch.Tensor, candidate: str) -> list[torch.Tensor]:
    """Return a candidate's weights whose product comes nearest to the filters.

    Of its parts, nearest to W. W: (O, C, kh, kw). Linear parts, without BatchNorm and ReLU. Truncated
    singular value decompositions of a matrix; a bottleneck takes the leading directions of either side
    (HOSVD, near the best).

    >>> [w.shape for w in factors(torch.rand(8, 4, 3, 3), "lowrank/2")]
    [torch.Size([4, 4, 3, 3]), torch.Size([8, 4, 1, 1])]
    """
    W = W.float()
    (O, C, kh, kw), (kind, _, number) = W.shape, candidate.partition("/")  # noqa: E741
    if kind == "bneck":
        out, into = (_leading(M.flatten(1), len(M) // int(number)) for M in (W, W.transpose(0, 1)))
        core = torch.einsum("ocij,on,cm->nmij", W, out, into)
        return [into.T[..., None, None], core, out[..., None, None]]
    L, R = _halves(*_matrix(W, candidate))
    if kind == "lowrank":
        return [R.reshape(-1, C, kh, kw), L.reshape(O, -1, 1, 1)]
    if kind == "spatial":
        return [
            L.reshape(C, kh, -1).permute(2, 0, 1)[..., None],
            R.reshape(-1, O, kw).transpose(0, 1)[:, :, None],
        ]
    return [R.reshape(C, -1, kh, kw), L.transpose(0, 1).reshape(O, C, 1, 1)]  # dwsep, group


def _leading(M, d):
    """The d leading left singular vectors of M (m, n): (m, d)."""
    return torch.linalg.svd(M, full_matrices=M.shape[0] > M.shape[1]).U[:, :d]


def spectral(W: torch.Tensor, candidate: str) -> float:
    """Return the share of ||W|| that a candidate cannot hold, 0..1.

    The relative tail of the spectrum, sqrt(sum_{i>d} sigma_i^2 / sum sigma_i^2).

    >>> round(spectral(torch.ones(8, 4, 3, 3), "lowrank/2"), 2)  # of rank 1: nothing is lost
    0.0
    """
    W = W.detach().float()
    if candidate == ORIGINAL:
        return 0.0
    if candidate.startswith("bneck"):
        core = factors(W, candidate)[1]  # keeps the rest: its bases are orthonormal
        lost = 1 - core.square().sum() / W.square().sum()
    else:
        M, d = _matrix(W, candidate)
        lost = torch.linalg.svdvals(M)[..., d:].square().sum() / W.square().sum()
    return math.sqrt(max(0.0, float(lost)))
