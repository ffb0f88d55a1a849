"""Which terms of a product are computed (chapter 3.4): k of n, chosen by size or drawn.

A product is a sum over its inner dimension, AB = sum_i A^(i) B_(i). Its k terms are the largest, unscaled and
biased, or drawn and scaled so that the mean is exact. What decides is the product of norms, or behind
BatchNorm and ReLU the energy of a channel in closed form, without a look at the activations.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from effilib import convolution as conv
from effilib.errors import BadInput, choose

__all__ = [
    "blocks", "choose_terms", "inclusion", "norms", "rectified", "rectified_energy", "squared_error",
]  # fmt: skip

SCHEMES = ("topk", "uniform", "norm", "bernoulli")


def norms(t: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the norm of every slice along dim, in fp32.

    |t_i|_F of any shape -> (t.shape[dim],).

    >>> norms(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), 0)
    tensor([5., 1.])
    """
    # squares of fp16 overflow; those of bf16 are only rounded, and sums are fp32 inside
    t = t.float() if t.dtype == torch.float16 else t
    return t.pow(2).sum([d for d in range(t.dim()) if d != dim]).float().sqrt()


def inclusion(w: torch.Tensor, k: int) -> torch.Tensor:
    """Return probabilities min(1, c w_i) that add up to k.

    w: (n,), 0 or above -> (n,).

    >>> inclusion(torch.tensor([6.0, 1.0, 1.0]), 2).tolist()
    [1.0, 0.5, 0.5]
    """
    p = torch.full_like(w, k / len(w)) if w.sum() == 0 else k * w / w.sum()
    for _ in range(len(w)):  # what is cut off at 1 goes to the others
        sure = p >= 1
        rest = w[~sure].sum()
        if not (p > 1).any() or rest == 0:
            break
        p = torch.where(sure, 1.0, (k - sure.sum()) * w / rest)
    return p.clamp(max=1)


def choose_terms(
    w: torch.Tensor,
    k: int,
    scheme: str = "topk",
    *,
    replacement: bool = False,
    scaled: bool = False,
    mix: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return which k of n terms to compute, and their factors.

    (index (m,), scale (m,) or None), no index twice, m <= k but for Bernoulli. w: (n,), the terms' norms
    |A^(i)||B_(i)|. scheme: "topk", the largest; "uniform"; "norm", in proportion to w (NPS); "bernoulli",
    each on its own with probability min(1, c w), k of them on average. replacement: k independent draws, so
    that a term can come twice ("uniform", "norm"); without, a systematic sample, in which every term's
    probability is exactly that of `inclusion`. scaled: divide each term by its expected number of draws,
    which makes the sum unbiased. mix: share of the uniform distribution mixed in, so that no channel is left
    out for ever (0.1 in the authors' code; "norm", "bernoulli"). Norms that overflowed count as equal.

    Raises `BadInput` for an unknown scheme, or scaled top-k, which has no probabilities.

    >>> choose_terms(torch.tensor([1.0, 5.0, 3.0]), 2)
    (tensor([1, 2]), None)
    >>> draws = torch.Generator().manual_seed(0)
    >>> index, scale = choose_terms(torch.ones(8), 2, "uniform", scaled=True, generator=draws)
    >>> scale.tolist()  # of 8 terms 2: each counts four times
    [4.0, 4.0]
    """
    choose("sampling scheme", scheme, SCHEMES)
    n = len(w)
    if scheme == "topk":
        if scaled:
            raise BadInput(
                "column-row sampling: top-k picks the same terms every time, there is no probability to "
                "scale by"
            )
        return w.topk(k).indices, None
    even = scheme == "uniform" or not w.sum().isfinite()  # what overflowed orders nothing
    w = torch.ones_like(w) if even else w
    p = (w / w.sum() if w.sum() > 0 else torch.full_like(w, 1 / n)) * (1 - mix) + mix / n
    generator = generator and conv.on_device(generator, w.device)
    if replacement and scheme != "bernoulli":
        index, times = torch.multinomial(p, k, replacement=True, generator=generator).unique(
            return_counts=True
        )
        return index, times / (k * p[index]) if scaled else None
    p = inclusion(p, k)
    if scheme == "bernoulli":
        index = p.new_empty(0)
        while not len(index):  # no term at all is no estimate: drawn again, which makes each one likelier
            index = (torch.rand(n, generator=generator, device=w.device) < p).nonzero().flatten()
        p = p / (1 - (1 - p).prod())
    else:  # a comb of k teeth, one apart, over the probabilities laid end to end in random order
        order = torch.randperm(n, generator=generator, device=w.device)
        ends = p[order].cumsum(0)
        teeth = torch.arange(k, device=w.device) + torch.rand((), generator=generator, device=w.device)
        index = order[torch.searchsorted(ends, teeth.to(ends.dtype)).clamp(max=n - 1)].unique()
    return index, 1 / p[index] if scaled else None


def squared_error(terms: torch.Tensor, k: int, scheme: str, *, p: torch.Tensor | None = None) -> torch.Tensor:
    """Return the mean squared error of a scaled estimate, by formula.

    E|AB - estimate|_F^2 (Drineas et al. 2006). terms: (n, ...), the n terms A^(i) B_(i). scheme:
    "replacement" with draw probabilities p (n,); "bernoulli" with inclusion probabilities p; "uniform"
    without replacement.

    >>> squared_error(torch.tensor([[1.0], [3.0]]), 1, "uniform").item()  # the sum is 4, the estimate 2 or 6
    4.0
    """
    n, product = len(terms), terms.sum(0)
    w2 = terms.flatten(1).square().sum(1)  # |A^(i)|^2 |B_(i)|^2
    if scheme == "replacement":
        return ((w2 / p).sum() - product.square().sum()) / k
    if scheme == "bernoulli":
        empty = (1 - p).prod()  # how often nothing is drawn, and drawn again
        return (1 - empty) * (w2 * (1 - p) / p).sum() - empty * product.square().sum()
    return n * (n - k) / (k * (n - 1)) * (w2.sum() - product.square().sum() / n)


def how_many(ratio, n, minimal):
    """k = min(max(int(ratio n), minimal), n).

    >>> how_many(0.5, 64, 10), how_many(0.5, 16, 10), how_many(0.5, 8, 10)
    (32, 10, 8)
    """
    return min(max(int(ratio * n), minimal), n)


def blocks(ratio: float, channels: int, minimal: int, block: int) -> tuple[int, int, int]:
    """Return how many of n blocks of channels are computed.

    (k, n, b): k of n blocks of b neighbours; b divides `channels`, is at most `block`, and smaller where the
    ratio would be rounded up to 1.

    >>> blocks(0.5, 64, minimal=10, block=16), blocks(0.3, 256, 10, 16), blocks(0.75, 32, 10, 16)
    ((2, 4, 16), (5, 16, 16), (3, 4, 8))
    """
    count, b = how_many(ratio, channels, minimal), math.gcd(channels, block)
    while b > 1 and count < channels and math.floor(count / b + 0.5) >= channels / b:
        b = math.gcd(channels, b // 2)
    return max(1, math.floor(count / b + 0.5)), channels // b, b


def rectified_energy(gamma: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """Return what BatchNorm and ReLU let through, by channel.

    E[relu(z)^2] for z ~ N(beta, gamma^2). With t = beta / |gamma| it is (beta^2 + gamma^2) Phi(t) + beta
    |gamma| phi(t). (C,), (C,) -> (C,).

    >>> rectified_energy(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0]))
    tensor([0.5000, 2.0000])
    """
    sigma = gamma.abs().clamp(min=1e-12)
    t = beta / sigma
    density = torch.exp(-t.square() / 2) / math.sqrt(2 * math.pi)
    return (beta.square() + sigma.square()) * torch.special.ndtr(t) + beta * sigma * density


def rectified(model: nn.Module, chosen: dict[str, nn.Module], x: torch.Tensor) -> dict[str, nn.Module]:
    """Return which layers read relu(BatchNorm(...)): layer's name -> that BatchNorm.

    chosen: name -> layer. Found by comparing values on a batch of images x, so that it does not matter how a
    network writes it; 2x2 max pooling in between is seen through.

    >>> net = build("vgg", 10, (3, 8, 8), widths=((16,), (32, 32)))
    >>> found = rectified(net, conv.layers(net), torch.rand(2, 3, 8, 8))
    >>> {name: bn.num_features for name, bn in found.items()}
    {'features.4': 16, 'features.7': 32}
    """
    outputs, found, hooks = {}, {}, []

    def shifted(m, inputs, y):
        """A path whose last BatchNorm begins at 0 would hand on what came before it."""
        y = y + (m.weight == 0).view(1, -1, *[1] * (y.dim() - 2))
        outputs[m] = y.relu()
        return y

    def look(name):
        def hook(layer, inputs):
            for bn, z in outputs.items():
                if z.dim() == 4 and z.shape[2] == 2 * inputs[0].shape[2]:
                    z = F.max_pool2d(z, 2)
                if z.shape == inputs[0].shape and torch.equal(z, inputs[0]):
                    found[name] = bn

        return hook

    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine:
            hooks.append(m.register_forward_hook(shifted))
    for name, layer in chosen.items():
        hooks.append(layer.register_forward_pre_hook(look(name)))
    conv.probe(model, x, hooks)
    return found
