"""Dynamic fixed point (Das et al. 2018, arXiv:1802.00930): integers with one exponent a tensor.

A tensor becomes x ~ I 2^-scf: b-bit integers I and one exponent scf, taken from the largest magnitude anew at
every use. Inputs, weights and output gradients of convolutions are rounded so; products of integers are
summed in int32 over chains of bounded length, and the chains in fp32. Stem, classifier, BatchNorm, ReLU,
weight gradients, momentum and master weights stay fp32. No loss scaling: the exponent follows the gradients
by itself.

The authors' 16-bit numbers leave two bits free, so that sums fit into int32: b = 14. With b = 16 sums
overflow: that is caught, and the chain is shortened. Nothing here is emulated in fp32, which is not exact for
such products: a 16-bit product is computed as four products of 8-bit halves, which processors have
(`torch._int_mm`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from effilib import convolution as conv
from effilib.convolution import Approximation
from effilib.errors import BadInput, choose
from effilib.methods import Info
from effilib.training import Method, Run

__all__ = [
    "DFP", "INFO", "DynamicFixedPoint", "chained_mm", "columns", "dequantise", "fixed_point", "halves",
    "integer_mm", "quantise",
]  # fmt: skip

Parts = list[tuple[torch.Tensor, int]]  # of an integer matrix: (int8, factor)

INFO = Info(
    name="Dynamic fixed point",
    name_de="Dynamisches Festkomma",
    chapter="3.3",
    paper="Das et al. 2018, arXiv:1802.00930",
    claim="ImageNet classifiers trained with 16-bit integer products reach fp32's accuracy in the same "
    "number of iterations, with the same hyper-parameters, 1.8x as fast on processors with such products.",
    cost_model="Same products, on 16-bit integers; added: two passes over an operand, for its largest "
    "magnitude and to round it. Without 16-bit integer products each is four products of 8 bits.",
)


# Numbers


class DFP(NamedTuple):
    """Hold x ~ I 2^-scf.

    I: int8 for at most 8 bits, else int16. scf: whole numbers in fp32, one or one a channel; nan if x was not
    finite.

    >>> q = DFP(torch.tensor([64, -32], dtype=torch.int8), torch.tensor(6.0))
    >>> dequantise(q).tolist()  # 64 / 2^6, -32 / 2^6
    [1.0, -0.5]
    """

    I: torch.Tensor  # noqa: E741  (the paper's symbol)
    scf: torch.Tensor


def quantise(
    x: torch.Tensor,
    bits: int = 14,
    *,
    dim: int | None = None,
    rounding: str = "nearest",
    generator: torch.Generator | None = None,
) -> DFP:
    """Return x (any shape, fp32) as b-bit integers with a shared exponent.

    dim: there is one for every slice along it. max|x| = f 2^E with f in [1/2, 1); scf = b - 1 - E; I =
    round(x 2^scf), so that 2^(b-2) <= max|I| < 2^(b-1). A largest number that would round up to 2^(b-1) gets
    the next exponent. Up to 16 bits; 16 end at 32,639, the largest number of two signed bytes. rounding:
    "nearest" (half to even), or "stochastic": up with the probability of the fraction, E[I] = x 2^scf.

    >>> q = quantise(torch.tensor([1.0, 0.3]), bits=4)
    >>> q.I.tolist(), q.scf.item()
    ([4, 1], 2.0)
    """
    choose("rounding", rounding, ("nearest", "stochastic"))
    if not 2 <= bits <= 16:
        raise BadInput(f"dynamic fixed point: {bits} bits, choose from 2 to 16")
    x = x.float()
    if dim is None:
        low, high = x.aminmax()
        m = torch.maximum(-low, high)
    else:
        m = x.abs().amax([d for d in range(x.dim()) if d != dim], keepdim=True)
    scf = (bits - 1 - torch.frexp(m).exponent).clamp(max=126)  # 2^127 is the largest power of two
    largest = 32639 if bits == 16 else 2 ** (bits - 1) - 1
    top = torch.ldexp(m, scf)
    scf = scf - (top >= largest + 0.5 if rounding == "nearest" else top > largest).to(scf.dtype)
    scaled = torch.ldexp(x, scf)  # exact: a power of two
    if rounding == "nearest":
        I = scaled.round_()  # noqa: E741
    else:
        low = scaled.floor()
        u = torch.empty_like(x).uniform_(generator=generator and conv.on_device(generator, x.device))
        I = low + (u < scaled - low)  # noqa: E741
    return DFP(
        I.to(torch.int8 if bits <= 8 else torch.int16), torch.where(m.isfinite(), scf.float(), torch.nan)
    )


def dequantise(q: DFP) -> torch.Tensor:
    """Return the numbers that a `DFP` stands for, in fp32.

    >>> dequantise(quantise(torch.tensor([1.0, 0.3]), bits=4)).tolist()
    [1.0, 0.25]
    """
    return torch.ldexp(q.I.float(), -q.scf)


# Products of integers


def halves(I: torch.Tensor) -> Parts:  # noqa: E741
    """Return I as parts (int8 tensor, factor) with I = sum factor part.

    Itself, or for int16 a high and a low byte, both signed.

    >>> [(part.item(), factor) for part, factor in halves(torch.tensor([300], dtype=torch.int16))]
    [(1, 256), (44, 1)]
    """
    if I.dtype == torch.int8:
        return [(I, 1)]
    low = I.to(torch.int8)  # wraps around: the low byte, signed
    return [((I - low >> 8).to(torch.int8), 256), (low, 1)]


def integer_mm(a: Parts, b: Parts) -> torch.Tensor:
    """Return a b, exactly: (M, K) x (K, N) -> (M, N) in float64.

    a, b: parts, as `halves` gives them; K up to 2^17. One int8 product into int32 for each pair of parts: 1
    for int8 by int8, 4 for int16 by int16.

    >>> a = torch.tensor([[300, -20000]], dtype=torch.int16)
    >>> integer_mm(halves(a), halves(a.T.contiguous())).item()  # 300^2 + 20,000^2
    400090000.0
    """
    return sum(float(factor) * product.double() for factor, product in _byte_products(a, b).items())


def _byte_products(a, b):
    """factor -> sum of the int8 products with that factor, (M, N) int32."""
    sums, on_cpu = {}, a[0][0].device.type == "cpu"
    for part, f in a:
        for other, g in b:
            product = (
                torch._int_mm(part, other) if on_cpu else (part.double() @ other.double()).int()
            )  # CUDA's takes some sizes only
            sums[f * g] = sums[f * g].add_(product) if f * g in sums else product
    return sums


def _largest(t):
    low, high = t.aminmax()
    return max(-low.item(), high.item())


def int32_mm(a, b):
    """a b as `integer_mm`, as int32. Raises `OverflowError` if a sum does not fit.

    >>> a = torch.full((1, 9), 20_000, dtype=torch.int16)
    >>> int32_mm(halves(a), halves(a.T.contiguous()))
    Traceback (most recent call last):
    OverflowError: dynamic fixed point: a chain of 9 products does not fit into int32
    """
    sums = _byte_products(a, b)
    if (
        len(sums) > 1 and sum(f * _largest(p) for f, p in sums.items()) >= 2**31
    ):  # a bound; only beyond it look closely
        largest = sum(float(f) * p.double() for f, p in sums.items()).abs().max()
        if largest >= 2**31:
            raise OverflowError(
                f"dynamic fixed point: a chain of {a[0][0].shape[1]} products does not fit into int32"
            )
    whole = None
    for f, p in sums.items():
        whole = (
            p.mul_(f) if whole is None else whole.add_(p, alpha=f)
        )  # may wrap around on the way, not at the end
    return whole


def chained_mm(a: Parts, b: Parts, chain: int) -> torch.Tensor:
    """Return a b with int32 sums over chains of products: (M, K) x (K, N) -> (M, N).

    Chains of at most `chain` products, which are added up in fp32. Raises `OverflowError` if the sum of a
    chain does not fit into int32, where hardware would wrap around unseen.

    >>> a = torch.full((1, 9), 20_000, dtype=torch.int16)
    >>> chained_mm(halves(a), halves(a.T.contiguous()), chain=2).item()  # 9 x 20,000^2
    3600000000.0
    """
    K = a[0][0].shape[1]
    total: torch.Tensor = None  # type: ignore[assignment]  (there is at least one chain)
    for begin in range(0, K, chain):
        end = min(begin + chain, K)
        partial = int32_mm([(p[:, begin:end], f) for p, f in a], [(p[begin:end], f) for p, f in b]).float()
        total = partial if total is None else total.add_(partial)
    return total


def columns(x: torch.Tensor, product: conv.Convolution, kernel: tuple[int, int]) -> torch.Tensor:
    """Return the patches under a k x k filter as rows: (N, C, H, W) -> (N H' W', k k C).

    A tap's channels lie side by side.

    >>> columns(torch.ones(2, 3, 4, 4), conv.Convolution(), (3, 3)).shape
    torch.Size([8, 27])
    """
    (height, width), (sh, sw), (ph, pw), (dh, dw) = kernel, product.stride, product.padding, product.dilation
    rows = F.pad(x.permute(0, 2, 3, 1), (0, 0, pw, pw, ph, ph))  # (N, H + 2p, W + 2p, C)
    N, H, W, C = rows.shape
    out = (N, (H - dh * (height - 1) - 1) // sh + 1, (W - dw * (width - 1) - 1) // sw + 1)
    n, h, w, c = rows.stride()
    patches = rows.as_strided((*out, height, width, C), (n, h * sh, w * sw, h * dh, w * dw, c))
    return patches.reshape(-1, height * width * C)


def image(rows, N, H):
    """(N H W, C) -> (N, C, H, W), channels last.

    >>> image(torch.arange(8).view(4, 2), N=1, H=2).shape
    torch.Size([1, 2, 2, 2])
    """
    return rows.view(N, H, -1, rows.shape[-1]).permute(0, 3, 1, 2)


def out_size(x, w, product):
    """(H', W') of a convolution's output.

    >>> out_size(torch.ones(1, 1, 7, 7), torch.ones(1, 1, 3, 3), conv.Convolution(stride=(2, 2)))
    (3, 3)
    """
    spans = zip(x.shape[2:], w.shape[2:], product.stride, product.padding, product.dilation, strict=True)
    return tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in spans)


def forward(x, w, product, chain):
    """y = x * w of two `DFP`s, x: (N, C, H, W), w: (O, C, k, k) -> (N, O, H', W'), fp32. Chains run over taps
    and channels.

    >>> x, w = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3)
    >>> forward(quantise(x), quantise(w), conv.Convolution(), chain=9).flatten().tolist()
    [9.0, 9.0, 9.0, 9.0]
    """
    a = [(columns(p, product, w.I.shape[2:]), f) for p, f in halves(x.I)]
    b = [(p.permute(2, 3, 1, 0).reshape(-1, len(w.I)), f) for p, f in halves(w.I)]  # (k k C, O)
    y = image(chained_mm(a, b, chain), len(x.I), out_size(x.I, w.I, product)[0])
    return torch.ldexp(y, -(x.scf + w.scf.view(1, -1, 1, 1)))


def backward_x(dy, x_shape, w, product, chain):
    """dX: the convolution of dy, its pixels set apart by the stride, with the mirrored filter. Chains run
    over taps and outputs.

    >>> dy, w = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 3, 3)
    >>> backward_x(quantise(dy), (1, 1, 4, 4), quantise(w), conv.Convolution(), chain=9)[0, 0, 0].tolist()
    [1.0, 2.0, 2.0, 1.0]
    """
    stride, (height, width) = product.stride, dy.I.shape[2:]
    spread = dy.I.new_zeros(*dy.I.shape[:2], (height - 1) * stride[0] + 1, (width - 1) * stride[1] + 1)
    spread[:, :, :: stride[0], :: stride[1]] = dy.I
    edges = []
    for i in (1, 0):  # as F.pad counts: the last dimension first; negative cuts off
        reach = product.dilation[i] * (w.I.shape[2 + i] - 1)
        before = reach - product.padding[i]
        edges += [before, x_shape[2 + i] + reach - before - spread.shape[2 + i]]
    spread = F.pad(spread, edges)
    full = conv.Convolution(dilation=product.dilation)
    a = [(columns(p, full, w.I.shape[2:]), f) for p, f in halves(spread)]
    b = [
        (p.flip(2, 3).permute(2, 3, 0, 1).reshape(-1, w.I.shape[1]), f) for p, f in halves(w.I)
    ]  # (k k O, C)
    dx = image(chained_mm(a, b, chain), x_shape[0], x_shape[2])
    return torch.ldexp(dx, -(dy.scf + w.scf.view(1, -1, 1, 1)))


def backward_w(dy, x, w_shape, product, chain):
    """dW, (O, C, k, k), fp32. Chains run over samples and pixels.

    >>> dy, x = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 4, 4)
    >>> backward_w(quantise(dy), quantise(x), (1, 1, 3, 3), conv.Convolution(), chain=4).unique().tolist()
    [4.0]
    """
    rows = [(p.permute(0, 2, 3, 1).reshape(-1, p.shape[1]).T, f) for p, f in halves(dy.I)]  # (O, N H' W')
    patches = [(columns(p, product, w_shape[2:]), f) for p, f in halves(x.I)]  # (N H' W', k k C)
    dw = chained_mm(rows, patches, chain).view(w_shape[0], *w_shape[2:], w_shape[1]).permute(0, 3, 1, 2)
    return torch.ldexp(dw, -(dy.scf.view(-1, 1, 1, 1) + x.scf.view(1, -1, 1, 1)))


# Layers


def with_shorter_chains(function, chains, key):
    """function(chain) with the layer's chain; where a sum overflows the chain is halved, for good, and it is
    computed again.

    >>> def product(chain):
    ...     if chain > 3:
    ...         raise OverflowError
    ...     return f"chains of {chain}"
    >>> chains = {"dW": 8}
    >>> with_shorter_chains(product, chains, "dW"), chains
    ('chains of 2', {'dW': 2})
    """
    while True:
        try:
            return function(chains[key])
        except OverflowError:
            if chains[key] == 1:
                raise
            chains[key] = (chains[key] + 1) // 2


def fixed_point(
    bits: int,
    chains: Callable[[], dict],
    *,
    exponents: str = "tensor",
    rounding: str = "nearest",
    generator: torch.Generator | None = None,
) -> Approximation:
    """Return the `Approximation` that computes all three products with `DFP`s.

    chains: () -> dict "forward", "dX", "dW" -> length. exponents: "tensor", one for each; or "channel": one
    for each slice that is not summed over, which differs from product to product (w by output in the forward
    pass, by input in dX; x and dy by channel in dW), so that operands are rounded twice.

    >>> x, w, chains = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3), {"forward": 9, "dX": 9, "dW": 4}
    >>> conv.approx_conv2d(x, w, approximation=fixed_point(14, lambda: chains)).unique().tolist()
    [9.0]
    """
    choose("exponents", exponents, ("tensor", "channel"))

    def twice(t, first, second):
        def rounded(dim):
            return quantise(t, bits, dim=dim, rounding=rounding, generator=generator)

        whole = rounded(first if exponents == "channel" else None)
        return whole, rounded(second) if exponents == "channel" else whole

    def dx(dy, x, w, product):
        return with_shorter_chains(
            lambda chain: backward_x(dy[0], x[0].I.shape, w[1], product, chain), chains(), "dX"
        )

    def dw(dy, x, w, product):
        return with_shorter_chains(
            lambda chain: backward_w(dy[1], x[1], w[0].I.shape, product, chain), chains(), "dW"
        )

    return Approximation(
        operands=lambda x, w: (twice(x, None, 1), twice(w, 0, 1)),
        forward=lambda x, w, product: with_shorter_chains(
            lambda chain: forward(x[0], w[0], product, chain), chains(), "forward"
        ),
        output_gradient=lambda dy: twice(dy, None, 1),
        dx=dx,
        dw=dw,
    )


def use_fixed_point_(model, bits, chains, *, x=None, owner="dynamic fixed point", **how):
    """Compute all convolutions but stem and classifier in dynamic fixed point, in place.

    chains: name -> dict "forward", "dX", "dW" -> length of a chain. how: see `fixed_point`. Grouped
    convolutions stay fp32. Returns the names; raises `NoEffect` if no layer matched.

    >>> net = build("convnet", 10, (3, 32, 32), widths=(8, 16))
    >>> use_fixed_point_(net, 14, lambda name: {"forward": 72, "dX": 144, "dW": 256})
    ['features.4']
    """
    chosen = {n: m for n, m in conv.layers(model, x).items() if m.groups == 1}
    made = {n: fixed_point(bits, lambda n=n: chains(n), **how) for n in chosen}
    return conv.convert_(chosen, made, owner, "dynamic fixed point")


@dataclass(frozen=True, kw_only=True)
class DynamicFixedPoint(Method):
    """Train in dynamic fixed point of `bits` bits.

    Goes with precision "fp32"; raises `BadInput` with any other. exponents, rounding: see `fixed_point`.
    chain: products that are summed in int32 (default: 256 channels of a 3x3 filter, the authors' longest).
    master: keep weights and momentum in fp32, else they are rounded after every step.

    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(4, 8))
    >>> history = train(net, data, Recipe(epochs=1, precision="fp32"), [DynamicFixedPoint(bits=14)])
    >>> history.events[-1]["text"]
    '1 layers in 14 bits; int32 chains shortened after an overflow: none'
    """

    bits: int = 14
    exponents: str = "tensor"
    rounding: str = "nearest"
    chain: int = 256 * 9
    master: bool = True

    def on_fit_start(self, run: Run) -> None:
        if run.precision not in ("fp32", "tf32"):
            raise BadInput(
                "dynamic fixed point: what is not integer is fp32, so it needs precision 'fp32', not "
                f"{run.precision!r}"
            )
        whole = {"forward": self.chain, "dX": self.chain, "dW": self.chain}
        run.state[self] = {"chains": {}}
        names = use_fixed_point_(
            run.model, self.bits, lambda name: run.state[self]["chains"].setdefault(name, dict(whole)),
            x=run.dataset.normalize(run.dataset.train.x[:2]), owner=self,
            exponents=self.exponents, rounding=self.rounding, generator=run.generator(self, share=True),
        )  # fmt: skip
        run.state[self]["layers"] = names

    def on_step_end(self, run: Run) -> None:
        if not self.master:
            weights = [run.model.get_submodule(n).weight for n in run.state[self]["layers"]]
            for w in weights:
                for t in (w.data, run.optimizer.state[w]["momentum_buffer"]):
                    t.copy_(
                        dequantise(
                            quantise(t, self.bits, rounding=self.rounding, generator=run.generator(self))
                        )
                    )

    def on_fit_end(self, run: Run) -> None:
        conv.revert_(run.model, self)
        chains = run.state[self]["chains"]
        shorter = {f"{n}, {p}": k for n, c in chains.items() for p, k in c.items() if k < self.chain}
        text = ", ".join(f"{n} {k}" for n, k in shorter.items()) or "none"
        run.log(
            self,
            f"{len(chains)} layers in {self.bits} bits; int32 chains shortened after an overflow: {text}",
            shortened=shorter,
        )
