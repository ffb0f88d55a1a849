"""Dynamic fixed point (Das et al. 2018, arXiv:1802.00930): integers with one exponent a tensor.

A tensor becomes x ~ I 2^-scf: b-bit integers I and one exponent scf, taken from the largest magnitude anew at
every use. Inputs, weights and output gradients of convolutions are rounded so; their products are summed as
integers. Stem, classifier, BatchNorm, ReLU, weight gradients, momentum and master weights stay fp32. No loss
scaling: the exponent follows the gradients by itself.

Sums of products outgrow int32. The authors leave two of 16 bits free, b = 14, and add up to 256 channels of a
filter in int32, which random signs make safe in practice. Here a chain ends before it could overflow for any
signs (`effilib.kernels.integers`), so that every sum is the exact integer. Nothing is emulated in fp32, which
is not.

Beside it what became of the idea, 8 bits: products forward and for dX in int8 by oneDNN, dW in bf16, and
gradients rounded at random (Banner et al. 2018, arXiv:1805.11046).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from effilib import convolution as conv
from effilib.convolution import Approximation
from effilib.errors import BadInput, choose
from effilib.hooks import Method
from effilib.kernels import integers
from effilib.methods import Info
from effilib.run import Run

__all__ = [
    "DFP", "INFO", "DynamicFixedPoint", "EightBits", "dequantise", "eight_bits", "fixed_point", "quantise",
    "safe_chain",
]  # fmt: skip

INFO = Info(
    name="Dynamic fixed point",
    name_de="Dynamisches Festkomma",
    chapter="3.3",
    paper="Das et al. 2018, arXiv:1802.00930",
    claim="ImageNet classifiers trained with 16-bit integer products reach fp32's accuracy in the same "
    "number of iterations, with the same hyper-parameters, 1.8x as fast on processors with such products.",
    cost_model="Same products, on 16-bit integers; added: a pass over an operand that finds its largest "
    "magnitude and rounds it, two where the exponent has changed.",
    applies="processors with 16-bit integer products",
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
    guess: float = 0.0,
) -> DFP:
    """Return x as b-bit integers with a shared exponent.

    x: any shape, fp32 or bf16. dim: there is one for every slice along it. max|x| = f 2^E with f in [1/2, 1);
    scf = b - 1 - E; I = round(x 2^scf), so that 2^(b-2) <= max|I| < 2^(b-1). A largest number that would
    round up to 2^(b-1) gets the next exponent. rounding: "nearest" (half to even), or "stochastic": up with
    the probability of the fraction, E[I] = x 2^scf. guess: an exponent that may be right, which saves time
    and changes nothing.

    >>> q = quantise(torch.tensor([1.0, 0.3]), bits=4)
    >>> q.I.tolist(), q.scf.item()
    ([4, 1], 2.0)
    """
    _check(bits, rounding)
    nearest = rounding == "nearest"
    if dim is None:
        seed = 0 if nearest else int(torch.randint(2**32, (), generator=generator))
        guess = int(guess) if guess == guess else 0
        found = integers.quantise(x, bits, stochastic=not nearest, seed=seed, guess=guess)
        if found:
            return DFP(found[0], torch.tensor(found[1]))
    x = x.float()
    m = x.abs().amax([d for d in range(x.dim()) if d != dim], keepdim=dim is not None)
    largest = 2 ** (bits - 1) - 1
    scf = (bits - 1 - torch.frexp(m).exponent).clamp(max=126)  # 2^127 is the largest power of two
    top = torch.ldexp(m, scf)
    scf = scf - (top >= largest + 0.5 if nearest else top > largest).to(scf.dtype)
    scaled = torch.ldexp(x, scf)  # exact: a power of two
    if nearest:
        I = scaled.round_()  # noqa: E741
    else:
        low = scaled.floor()
        u = torch.empty_like(x).uniform_(generator=generator and conv.on_device(generator, x.device))
        I = low + (u < scaled - low)  # noqa: E741
    return DFP(
        I.to(torch.int8 if bits <= 8 else torch.int16), torch.where(m.isfinite(), scf.float(), torch.nan)
    )


def _check(bits, rounding):
    choose("rounding", rounding, ("nearest", "stochastic"))
    if not 2 <= bits <= 16:
        raise BadInput(f"dynamic fixed point: {bits} bits, choose from 2 to 16")


def dequantise(q: DFP) -> torch.Tensor:
    """Return the numbers that a `DFP` stands for, in fp32.

    >>> dequantise(quantise(torch.tensor([1.0, 0.3]), bits=4)).tolist()
    [1.0, 0.25]
    """
    return torch.ldexp(q.I.float(), -q.scf)


def safe_chain(bits: int) -> int:
    """Return how many products of b-bit integers int32 holds for certain.

    floor((2^31 - 1) / (2^(b-1) - 1)^2). Knowing the weights, a chain may be longer.

    >>> [safe_chain(b) for b in (16, 15, 14, 8)]
    [2, 8, 32, 133144]
    """
    return (2**31 - 1) // (2 ** (bits - 1) - 1) ** 2


# Products


def _scaled(compute, *exponents):
    """compute(scale) of integers, at the exponents of its operands."""
    scf = sum(exponents)
    return compute(2.0 ** -scf.item()) if scf.numel() == 1 else torch.ldexp(compute(1.0), -scf)


def forward(x, w, product, bits):
    """y = x * w of two `DFP`s, x: (N, C, H, W), w: (O, C, k, k) -> (N, O, H', W'), fp32.

    >>> x, w = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3)
    >>> forward(quantise(x), quantise(w), conv.Convolution(), 14).unique().tolist()
    [9.0]
    """
    return _scaled(lambda scale: integers.forward(x.I, w.I, product, bits, scale), x.scf, _per_channel(w.scf))


def backward_x(dy, x_shape, w, product, bits):
    """dX, (N, C, H, W), fp32.

    >>> dy, w = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 3, 3)
    >>> backward_x(quantise(dy), (1, 1, 4, 4), quantise(w), conv.Convolution(), 14)[0, 0, 0].tolist()
    [1.0, 2.0, 2.0, 1.0]
    """
    return _scaled(
        lambda scale: integers.backward_x(dy.I, x_shape, w.I, product, bits, scale),
        dy.scf,
        _per_channel(w.scf),
    )


def backward_w(dy, x, w_shape, product, bits):
    """dW, (O, C, k, k), fp32.

    >>> dy, x = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 4, 4)
    >>> backward_w(quantise(dy), quantise(x), (1, 1, 3, 3), conv.Convolution(), 14).unique().tolist()
    [4.0]
    """
    return _scaled(
        lambda scale: integers.backward_w(dy.I, x.I, w_shape, product, bits, scale),
        dy.scf.reshape(-1, 1, 1, 1), x.scf.reshape(1, -1, 1, 1),
    )  # fmt: skip


def _per_channel(scf):
    return scf.reshape(1, -1, 1, 1)


def fixed_point(
    bits: int,
    *,
    exponents: str = "tensor",
    rounding: str = "nearest",
    generator: torch.Generator | None = None,
) -> Approximation:
    """Return the `Approximation` that computes all three products with `DFP`s.

    exponents: "tensor", one for each; or "channel": one for each slice that is not summed over, which differs
    from product to product (w by output in the forward pass, by input in dX; x and dy by channel in dW), so
    that operands are rounded twice.

    >>> x, w = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3)
    >>> conv.approx_conv2d(x, w, approximation=fixed_point(14)).unique().tolist()
    [9.0]
    """
    choose("exponents", exponents, ("tensor", "channel"))
    last = {}  # exponents move slowly: that of the step before is the guess

    def rounded(t, dim, key=""):
        q = quantise(t, bits, dim=dim, rounding=rounding, generator=generator, guess=last.get(key, torch.nan))
        if dim is None:
            last[key] = q.scf.item()
        return q

    def twice(key, t, first, second):
        if exponents == "channel":
            return rounded(t, first, key), rounded(t, second)
        whole = rounded(t, None, key)
        return whole, whole

    return Approximation(
        operands=lambda x, w: (twice("x", x, None, 1), twice("w", w, 0, 1)),
        forward=lambda x, w, product: forward(x[0], w[0], product, bits),
        output_gradient=lambda dy: twice("dy", dy, None, 1),
        dx=lambda dy, x, w, product: backward_x(dy[0], x[0].I.shape, w[1], product, bits),
        dw=lambda dy, x, w, product: backward_w(dy[1], x[1], w[0].I.shape, product, bits),
    )


def use_fixed_point_(model, bits, *, x=None, owner="dynamic fixed point", **how):
    """Compute all convolutions but stem and classifier in dynamic fixed point, in place.

    how: see `fixed_point`. Grouped convolutions stay fp32. Returns the names; raises `NoEffect` if no layer
    matched.

    >>> net = build("convnet", 10, (3, 32, 32), widths=(8, 16))
    >>> use_fixed_point_(net, 14)
    ['features.4']
    """
    return _convert(model, lambda: fixed_point(bits, **how), x, owner)


def _convert(model, make, x, owner):
    chosen = {n: m for n, m in conv.layers(model, x).items() if m.groups == 1}
    return conv.convert_(chosen, {n: make() for n in chosen}, owner, "dynamic fixed point")


@dataclass(frozen=True, kw_only=True)
class DynamicFixedPoint(Method):
    """Train in dynamic fixed point of `bits` bits.

    Goes with precision "fp32"; raises `BadInput` with any other.

    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(4, 8))
    >>> history = train(net, data, Recipe(epochs=1, precision="fp32"), [DynamicFixedPoint(bits=14)])
    >>> history.events[-1]["text"]
    '1 layers in 14 bits, products ...'
    """

    bits: int = 14  # the authors' 16 without the two that they leave free for sums
    exponents: str = "tensor"  # or "channel": see `fixed_point`
    rounding: str = "nearest"  # or "stochastic"
    master: bool = True  # keep weights and momentum in fp32, else round them after every step

    def __post_init__(self):
        _check(self.bits, self.rounding)
        choose("exponents", self.exponents, ("tensor", "channel"))

    def on_fit_start(self, run: Run) -> None:
        if run.precision not in ("fp32", "tf32"):
            raise BadInput(
                "dynamic fixed point: what is not integer is fp32, so it needs precision 'fp32', not "
                f"{run.precision!r}"
            )
        with run.clock.paused():  # compiling is once a machine's, not a training's
            integers.library()
        names = use_fixed_point_(
            run.model, self.bits, x=run.dataset.normalize(run.dataset.train.x[:2]), owner=self,
            exponents=self.exponents, rounding=self.rounding, generator=run.generator(self, share=True),
        )  # fmt: skip
        run.state[self] = {"layers": names}

    def on_step_end(self, run: Run) -> None:
        if self.master:
            return
        for name in run.state[self]["layers"]:
            w = run.model.get_submodule(name).weight
            momentum = run.optimizer.state[w].get("momentum_buffer")
            for t in (w.data, momentum):
                if t is not None:
                    q = quantise(t, self.bits, rounding=self.rounding, generator=run.generator(self))
                    t.copy_(dequantise(q))

    def on_fit_end(self, run: Run) -> None:
        layers = conv.revert_(run.model, self)
        compiled = run.device.type == "cpu" and integers.library()
        how = "by AVX512-VNNI" if compiled else "in float64"
        run.log(self, f"{layers} layers in {self.bits} bits, products {how}")


# What became of it: 8 bits


def eight_bits(generator: torch.Generator) -> Approximation:
    """Return the `Approximation` with y and dX in int8, dW in bf16.

    Per tensor an exponent of 8 bits. dy is rounded at random for dX, so that the gradients that are passed on
    are unbiased; dW, a sum over all pixels, reads x and dy themselves. dX of a convolution with a stride,
    which is not a convolution of dy as it is, stays bf16.

    >>> x, w = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3)
    >>> conv.approx_conv2d(x, w, approximation=eight_bits(torch.Generator())).unique().tolist()
    [9.0]
    """
    last = {}

    def rounded(key, t, **how):
        q = quantise(t, 8, guess=last.get(key, torch.nan), **how)
        last[key] = q.scf.item()
        return q

    def forward(x, w, product):
        return integers.convolve_int8(
            x[0].I, w[0].I, product, 2.0 ** -x[0].scf.item(), 2.0 ** -w[0].scf.item()
        )

    def dx(dy, x, w, product):
        reach = [d * (k - 1) for d, k in zip(product.dilation, w[1].shape[2:], strict=True)]
        padding = tuple(r - p for r, p in zip(reach, product.padding, strict=True))
        if product.stride != (1, 1) or min(padding) < 0:
            return product.backward(dy, x[1], w[1], (True, False))[0]
        q = rounded("dy", dy, rounding="stochastic", generator=generator)
        mirrored = w[0].I.flip(2, 3).transpose(0, 1)
        full = conv.Convolution(padding=padding, dilation=product.dilation)
        return integers.convolve_int8(q.I, mirrored, full, 2.0 ** -q.scf.item(), 2.0 ** -w[0].scf.item())

    return Approximation(
        operands=lambda x, w: (
            (rounded("x", x), x.bfloat16()),
            (rounded("w", w), w.bfloat16()),
        ),
        forward=forward,
        output_gradient=lambda dy: dy.bfloat16(),
        dx=dx,
        dw=lambda dy, x, w, product: product.backward(dy, x[1], w[1], (False, True))[1],
    )


@dataclass(frozen=True, kw_only=True)
class EightBits(Method):
    """Train with 8-bit products: forward and dX in int8, dW in bf16.

    Goes with precision "bf16"; raises `BadInput` with any other. Stem and classifier stay bf16.

    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(4, 8))
    >>> history = train(net, data, Recipe(epochs=1, precision="bf16"), [EightBits()])
    >>> history.events[-1]["text"]
    '1 layers in 8 bits, dW in bf16'
    """

    def on_fit_start(self, run: Run) -> None:
        if run.precision != "bf16":
            raise BadInput(
                "8-bit products: what is not int8 is bf16, so they need precision 'bf16', not "
                f"{run.precision!r}"
            )
        with run.clock.paused():
            integers.library()
        x = run.dataset.normalize(run.dataset.train.x[:2])
        _convert(run.model, lambda: eight_bits(run.generator(self, share=True)), x, self)

    def on_fit_end(self, run: Run) -> None:
        run.log(self, f"{conv.revert_(run.model, self)} layers in 8 bits, dW in bf16")
