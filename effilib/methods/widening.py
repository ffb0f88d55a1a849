"""Make a network wider and keep what it computes: the ways of Net2Net (arXiv:1511.05641) and its successors.

Net2WiderNet: new channels are copies of old ones, and what reads them divides its weights among the copies.
Exact copies receive exact copies of each other's gradients: something has to break the symmetry.
"""

import torch
from torch import nn

from effilib import surgery
from effilib.errors import BadInput, choose

__all__ = ["BREAKERS", "append_", "jitter_", "replication", "uneven_shares", "widen_"]

BREAKERS = ("noise", "uneven", "pair", "none", "random")


def replication(n: int, q: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Return the map g: which old channel each of q new ones copies, (q,).

    The first n are themselves, the rest drawn (section 3.2).

    >>> g = replication(2, 4, torch.Generator().manual_seed(0))
    >>> g[:2].tolist(), set(g[2:].tolist()) <= {0, 1}
    ([0, 1], True)
    """
    return torch.cat([torch.arange(n), torch.randint(n, (q - n,), generator=generator)])


def uneven_shares(index: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Return copies' shares of the outgoing weights, (q,).

    They add up to 1 over a channel's copies. Drawn from [0.5, 1.5) and scaled. index: (q,), whose copy each
    channel is.

    >>> shares = uneven_shares(torch.tensor([0, 1, 1]), torch.Generator().manual_seed(0))
    >>> shares[0].item(), round(shares[1:].sum().item(), 6), (shares[1] == shares[2]).item()
    (1.0, 1.0, False)
    """
    u = torch.rand(len(index), generator=generator, dtype=torch.double) + 0.5
    total = torch.zeros(int(index.max()) + 1, dtype=torch.double).index_add_(0, index, u)
    return u / total[index]


@torch.no_grad()
def widen_(
    node: surgery.Node,
    q: int,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    breaker: str = "noise",
    noise: float = 0.05,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Give a node q channels in place (Net2Wider); the function is kept, but for the noise.

    breaker: how copies become different. "noise": a share `noise` of each producer's standard deviation is
    added to the weights of the new copies (the paper: "a small amount"). "uneven": the copies share the
    outgoing weights unevenly. "pair": new channels are no copies but come in pairs that read alike, with
    random weights, and write with opposite signs (variance transfer, Yuan et al. 2023). "none". "random": the
    paper's baseline "random pad", random weights in and out, which does not keep the function. Returns g,
    (q,): whose copy each channel is (-1: nobody's). Raises `BadInput` if q is below the width.

    >>> net, x = build("convnet", 4, (1, 8, 8), widths=(4, 8)).eval(), torch.rand(2, 1, 8, 8)
    >>> before = net(x)
    >>> g = widen_(surgery.trace(net)["features.0"], 6, breaker="uneven")
    >>> g[:4].tolist(), torch.allclose(net(x), before, atol=1e-5)
    ([0, 1, 2, 3], True)
    """
    choose("symmetry breaker", breaker, BREAKERS)
    n = node.width
    if q < n:
        raise BadInput(f"{node.name} has {n} channels, it cannot be widened to {q}")
    if q == n:
        return torch.arange(n)
    if breaker in ("pair", "random"):
        append_(node, q - n, optimizer)
        _draw_(node, n, breaker, generator)
        return torch.cat([torch.arange(n), torch.full((q - n,), -1)])
    index = replication(n, q, generator)
    share = uneven_shares(index, generator) if breaker == "uneven" else None
    surgery.select_(node, index, optimizer, share=share)
    if breaker == "noise" and noise:
        jitter_(node, n, noise, generator)
    return index


@torch.no_grad()
def jitter_(node: surgery.Node, n: int, noise: float, generator: torch.Generator | None = None) -> None:
    """Add noise to what the channels from n on read, in place.

    noise: its standard deviation, as a share of that of each producer's old weights.

    >>> net = build("convnet", 4, (1, 8, 8), widths=(4, 8))
    >>> before = net.features[0].weight.clone()
    >>> jitter_(surgery.trace(net)["features.0"], 3, noise=0.05)
    >>> (net.features[0].weight != before).flatten(1).any(dim=1).tolist()
    [False, False, False, True]
    """
    for name in node.producers:
        W = getattr(node.layer(name), "weight", None)
        if W is not None:
            W[n:] += noise * W[:n].std() * _randn(W[n:].shape, generator, W)


def _randn(shape, generator, like):
    return torch.randn(shape, generator=generator).to(like.device, like.dtype)


@torch.no_grad()
def append_(node: surgery.Node, k: int, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Give a node k channels of zero weights, in place.

    BatchNorm's values are the first ones of a new layer, momentum is 0.

    >>> net = build("convnet", 4, (1, 8, 8), widths=(4, 8))
    >>> append_(surgery.trace(net)["features.0"], 2)
    >>> net.features[0].weight.flatten(1).any(dim=1).tolist()
    [True, True, True, True, False, False]
    """
    n = node.width
    surgery.select_(node, [*range(n), *[0] * k], optimizer, share=[1.0] * n + [0.0] * k)
    for name in node.producers:
        m = node.layer(name)
        for p in (getattr(m, "weight", None), getattr(m, "bias", None)):
            if p is not None:
                p[n:] = 0
    for name, per in node.bns.items():
        m = node.layer(name)
        for t, value in ((m.weight, 1), (m.bias, 0), (m.running_mean, 0), (m.running_var, 1)):
            if t is not None:
                t[n * per :] = value
    for name, per in node.consumers.items():  # producers' state was scaled by the share, 0
        W = node.layer(name).weight
        for t in optimizer.state.get(W, {}).values() if optimizer else ():
            if isinstance(t, torch.Tensor) and t.shape == W.shape:
                t[:, n * per :] = 0


def _draw_(node, n, breaker, generator):
    """Random weights for the channels from n on: "random" in and out; "pair": equal in, opposite out, an odd
    one out writes nothing.
    """
    half = (node.width - n) // 2
    for name in node.producers:
        W = getattr(node.layer(name), "weight", None)
        if W is not None:
            nn.init.kaiming_normal_(
                new := torch.empty_like(W[n:], device="cpu"), nonlinearity="relu", generator=generator
            )
            W[n:] = new
            if breaker == "pair":
                W[n + half : n + 2 * half] = W[n : n + half]
    for name, per in node.consumers.items():
        W = node.layer(name).weight
        old, new = W[:, : n * per], W[:, n * per :]
        new.copy_(old.std() * _randn(new.shape, generator, W))
        if breaker == "pair":
            new[:, half * per : 2 * half * per] = -new[:, : half * per]
            new[:, 2 * half * per :] = 0
