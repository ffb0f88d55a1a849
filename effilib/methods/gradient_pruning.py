"""Pruning of activation gradients (Ye et al. 2019, arXiv:1908.00173): most of dO becomes 0, without bias.

Of three products of a convolution two read dO, the gradient of its output. An element below a threshold tau
becomes 0 or +-tau, so that its expectation stays. tau follows from one number, the mean magnitude, if
gradients are normal: a target rate p means that a share p lies below tau, *not* that a share p becomes 0 (of
those below tau many become tau). The paper predicts tau from earlier batches (a FIFO), so that hardware can
prune in passing.

Zeros save time only in hardware that skips them; what saves time on dense kernels is in `gradient_subsets`.
Chmiel et al. (2021, arXiv:2006.08173) find gradients nearer to lognormal: their threshold aims at the share
of zeros itself.
"""

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import nn

from effilib import convolution as conv
from effilib.convolution import Approximation
from effilib.errors import BadInput, NoEffect, choose, within
from effilib.hooks import Method
from effilib.inspection import followers
from effilib.kernels import compiler
from effilib.methods import Info
from effilib.run import Run

__all__ = [
    "INFO", "GradientPruning", "Pruner", "lognormal_threshold", "placements", "prune", "prune_by_steps",
    "prune_gradients_", "prune_in_one_pass", "threshold", "zero_fraction",
]  # fmt: skip

INFO = Info(
    name="Activation-gradient pruning",
    name_de="Verdünnung des Aktivierungsgradienten",
    chapter="4.1",
    paper="Ye et al. 2019, arXiv:1908.00173 (ECCV 2020)",
    claim="Most elements of the gradients of activations can be set to 0 at random, without bias, at a "
    "negligible loss of accuracy; up to 5.92x less time in the backward pass on hardware that skips zeros.",
    cost_model="dX and dW shrink to the density of dO where zeros are skipped; dense kernels save nothing. "
    "Added: some passes over dO, and a random number an element.",
    applies="hardware that skips zeros",
)


def normal_quantile(q: float) -> float:
    """Return Phi^-1(q) of the standard normal distribution.

    >>> round(normal_quantile(0.975), 2)
    1.96
    """
    return math.sqrt(2) * torch.erfinv(torch.tensor(2 * q - 1, dtype=torch.float64)).item()


def _phi(z):
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


def threshold(g: torch.Tensor, p: float) -> torch.Tensor:
    """Return tau with P(|g| < tau) = p for normal gradients, 0-d.

    tau = Phi^-1((1 + p) / 2) sigma, with sigma from the mean magnitude.

    >>> g = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    >>> round((g.abs() < threshold(g, 0.9)).float().mean().item(), 2)
    0.9
    """
    return _times(p) * g.abs().mean(dtype=torch.float32)


def _times(p):
    """How many times E|g| = sigma sqrt(2 / pi) the threshold is."""
    return normal_quantile((1 + p) / 2) * math.sqrt(math.pi / 2)


def zero_fraction(p: float) -> float:
    """Return the share of zeros of normal gradients at target rate p.

    p - sqrt(2/pi) (1 - exp(-t^2/2)) / t, where t is tau / sigma.

    >>> round(zero_fraction(0.9), 2)  # of 90 % below tau, 36 % became tau
    0.54
    """
    t = normal_quantile((1 + p) / 2)
    return p - math.sqrt(2 / math.pi) * (1 - math.exp(-(t**2) / 2)) / t if t else 0.0


def lognormal_zeros(u: float, s: float) -> float:
    """Return the share of zeros of lognormal gradients.

    E[1 - |g| / tau; |g| < tau] for ln|g| ~ N(m, s^2) and ln tau = m + u s.

    >>> round(lognormal_zeros(u=0.0, s=1.0), 2)
    0.24
    """
    return _phi(u) - math.exp(s * s / 2 - s * u) * _phi(u - s)


def lognormal_threshold(g: torch.Tensor, zeros: float) -> torch.Tensor:
    """Return tau that makes a share `zeros` of lognormal gradients 0, 0-d.

    Mean m and deviation s of ln|g| are estimated over the elements that are not 0, of which the share is; tau
    follows by bisection (Chmiel et al. 2021).

    >>> generator = torch.Generator().manual_seed(0)
    >>> g = torch.randn(10_000, generator=generator).exp()
    >>> round((prune(g, lognormal_threshold(g, zeros=0.5), generator) == 0).float().mean().item(), 1)
    0.5
    """
    logs = g[g != 0].abs().float().log()
    if len(logs) < 2:
        return g.new_zeros((), dtype=torch.float32)
    m, s = logs.mean().item(), max(logs.std().item(), 1e-6)
    low, high = -10.0, 10 + s / 2 + math.log(2 / (1 - zeros)) / s  # the second gives too many zeros
    for _ in range(60):
        u = (low + high) / 2
        low, high = (u, high) if lognormal_zeros(u, s) < zeros else (low, u)
    return torch.tensor(math.exp(m + high * s), device=g.device)


def prune(g: torch.Tensor, tau: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Set elements below tau to 0 or +-tau, unbiased.

    g where |g| >= tau, else sign(g) tau with probability |g| / tau: E = g, Var = |g| (tau - |g|). Same shape,
    layout and format. tau: 0-d; one that is 0 or not finite (a gradient overflowed) prunes nothing. The
    probability has 24 bits, or 16 where there is no compiled kernel.

    >>> pruned = prune(torch.tensor([3.0, 0.5, -0.5]), torch.tensor(1.0), torch.Generator().manual_seed(0))
    >>> pruned[0].item(), set(pruned[1:].tolist()) <= {-1.0, 0.0, 1.0}
    (3.0, True)
    """
    if _kernel(g):
        return prune_in_one_pass(g, tau.item(), generator)[0]
    return prune_by_steps(g, tau, generator)


def prune_by_steps(g: torch.Tensor, tau: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Prune as `prune` does, by PyTorch's operations.

    >>> prune_by_steps(torch.tensor([3.0, -2.0]), torch.tensor(1.0), torch.Generator()).tolist()
    [3.0, -2.0]
    """
    precise = torch.float64 if g.dtype == torch.float64 else torch.float32
    tau = torch.where(tau.isfinite(), tau, 0.0).to(g)
    magnitude = g.abs()
    # 0 and 1 in the operands' own format: booleans, and `where`, are several times slower
    stays = torch.ge(magnitude, tau, out=torch.empty_like(magnitude))
    share = magnitude.to(precise) / tau.to(precise)
    becomes = torch.gt(share, _uniform_like(magnitude, generator, precise), out=share).to(g.dtype)
    return torch.maximum(magnitude.mul_(stays), becomes.mul_(tau)).copysign_(g)  # nan stays, to be seen


def prune_in_one_pass(
    g: torch.Tensor, tau: float, generator: torch.Generator
) -> tuple[torch.Tensor, dict[str, float]]:
    """Return g pruned by the compiled kernel, and its sums.

    These are: mean |g|, the share of zeros, the cosine between g and the outcome. g: fp32 or bf16, on a CPU.

    >>> g = torch.tensor([3.0, 0.0, -1.0])
    >>> if compiler.load("gradient_pruning", "there is no kernel"):
    ...     assert prune_in_one_pass(g, 0.0, torch.Generator())[1]["mean"] == 4 / 3  # nothing is pruned
    """
    kernel = _kernel(g)
    if kernel is None:
        raise BadInput(f"gradient pruning: there is no compiled kernel for {g.dtype} on {g.device}")
    if not (g.is_contiguous() or g.is_contiguous(memory_format=torch.channels_last)):
        g = g.contiguous()
    pruned, sums, n = torch.empty_like(g), (ctypes.c_double * 5)(), g.numel()
    level = torch.tensor(tau if math.isfinite(tau) else 0.0, dtype=g.dtype).item()
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    kernel(
        ctypes.c_void_p(g.data_ptr()), ctypes.c_void_p(pruned.data_ptr()), ctypes.c_int64(n),
        ctypes.c_float(level), ctypes.c_uint64(seed), sums, ctypes.c_int64(torch.get_num_threads()),
    )  # fmt: skip
    magnitude, zeros, product, square, after = sums
    norms = math.sqrt(square * after)
    return pruned, {"mean": magnitude / n, "zeros": zeros / n, "cosine": product / norms if norms else 0.0}


def _kernel(g):
    """The compiled kernel for such gradients, or None."""
    name = {torch.float32: "prune_float32", torch.bfloat16: "prune_bfloat16"}.get(g.dtype)
    if not (name and g.is_cpu):
        return None
    library = compiler.load("gradient_pruning", "gradients are pruned step by step")
    return library and getattr(library, name)


def _uniform_like(t, generator, dtype):
    """Uniform in (0, 1), laid out as t; 16 random bits a number, four times as fast as 32."""
    generator, n = conv.on_device(generator, t.device), t.numel()
    bits = torch.empty((n + 3) // 4, dtype=torch.int64, device=t.device).random_(
        -(2**63), None, generator=generator
    )
    bits = bits.view(torch.int16).as_strided(t.shape, t.stride())
    return bits.to(dtype).add_(2**15 + 0.5).mul_(2.0**-16)


class Pruner:
    """Prune a layer's gradients and keep count.

    Its state is plain. p: target rate. law: "normal" (p is the share below tau) or "lognormal" (p is the
    share of zeros). fifo: as many earlier tau are averaged to predict this batch's; until there are that many
    nothing is pruned; 0 takes the batch's own. every: density is counted every so many batches. A batch whose
    gradient overflowed tells nothing: it is neither counted nor averaged.

    >>> pruner, generator = Pruner(p=0.9), torch.Generator().manual_seed(0)
    >>> state = pruner.new_state()
    >>> pruned = pruner(torch.randn(10_000, generator=generator), state, generator)
    >>> round(state["zeros"], 2)
    0.54
    """

    def __init__(self, p: float, law: str = "normal", fifo: int = 0, every: int = 10):
        choose("law of gradients", law, ("normal", "lognormal"))
        within("gradient pruning: p", p, "from 0 to below 1")
        within("gradient pruning: fifo", fifo, "a whole number, 0 or above")
        within("gradient pruning: every", every, "a whole number above 0")
        self.p, self.law, self.fifo, self.every = p, law, fifo, every

    def new_state(self) -> dict:
        """Return what is kept of a layer: earlier tau, and sums."""
        return {"taus": [], "calls": 0, "counted": 0, "zeros": 0.0, "error": 0.0, "cosine": 0.0}

    def __call__(self, g: torch.Tensor, state: dict, generator: torch.Generator) -> torch.Tensor:
        """Return g pruned, and note in `state` what became of it."""
        past = state["taus"]
        own = tau = 0.0 if self.fifo else self._threshold(g)
        if self.fifo and len(past) == self.fifo:  # until then nothing is pruned
            tau = fmean(past)
        if _kernel(g):
            pruned, sums = prune_in_one_pass(g, tau, generator)
        else:
            pruned, sums = prune_by_steps(g, torch.tensor(tau), generator) if tau > 0 else g, {}
        own = self._threshold(g, **sums) if self.fifo else own
        sound = math.isfinite(own)
        if self.fifo and sound:
            state["taus"] = [*past, own][-self.fifo :]
        if state["calls"] % self.every == 0 and sound and tau > 0 and own > 0:
            sums = sums or _compared(g, pruned)
            state["counted"] += 1
            state["zeros"] += sums["zeros"]
            state["error"] += abs(tau / own - 1)
            state["cosine"] += sums["cosine"]
        state["calls"] += 1
        return pruned

    def _threshold(self, g, mean=None, **others):
        """This batch's own tau, a float; mean: |g|'s, where it is known."""
        if self.law == "lognormal":
            return lognormal_threshold(g, self.p).item()
        return threshold(g, self.p).item() if mean is None else _times(self.p) * mean


def _compared(g, pruned):
    """What `prune_in_one_pass` sums, of gradients that were pruned step by step."""
    cosine = torch.cosine_similarity(g.flatten().float(), pruned.flatten().float(), 0).item()
    return {"zeros": (pruned == 0).float().mean().item(), "cosine": cosine}


def placements(model: nn.Module, chosen: dict[str, nn.Module], x: torch.Tensor) -> dict[str, str]:
    """Return where each layer's gradient is pruned, by name: "dO" or "dI".

    At its output where a BatchNorm follows, which fills up ReLU's zeros; else at its input. chosen: name ->
    module. x: a batch of images. dI is pruned before the ReLU in front of the layer masks it: after the mask
    the many zeros would spoil the estimate of tau.

    >>> with_norm, without = (build("convnet", 4, (1, 8, 8), widths=(4, 8), bn=bn) for bn in (True, False))
    >>> x = torch.zeros(1, 1, 8, 8)
    >>> [list(placements(net, conv.layers(net), x).values()) for net in (with_norm, without)]
    [['dO'], ['dI']]
    """
    behind = followers(model, x)
    return {name: "dO" if name in behind else "dI" for name in chosen}


def prune_gradients_(
    model: nn.Module,
    pruner: Pruner,
    x: torch.Tensor,
    state: Callable[[], dict],
    generator: torch.Generator,
    owner: object = "gradient pruning",
) -> dict[str, str]:
    """Prune the activation gradients of all convolutions but the stem, in place.

    x: a batch of images, by which stem and placement are found. state: () -> dict, filled per layer; it is
    asked for anew at every call, as a checkpoint may have replaced it. Returns `placements`; raises
    `NoEffect` if no layer matched.

    >>> net, state = build("convnet", 4, (1, 8, 8), widths=(4, 8)), {}
    >>> prune_gradients_(net, Pruner(p=0.9), torch.zeros(1, 1, 8, 8), lambda: state, torch.Generator())
    {'features.4': 'dO'}
    """
    chosen = conv.layers(model, x)
    place = placements(model, chosen, x)

    def made(name):
        def pruned(g):
            return pruner(g, state().setdefault(name, pruner.new_state()), generator)

        def dx(dy, x, w, product):
            return pruned(product.backward(dy, x, w, (True, False))[0])

        return Approximation(output_gradient=pruned) if place[name] == "dO" else Approximation(dx=dx)

    conv.convert_(chosen, {n: made(n) for n in chosen}, owner, "gradient pruning")
    return place


@dataclass(frozen=True, kw_only=True)
class GradientPruning(Method):
    """Train with stochastically pruned activation gradients.

    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(4, 8))
    >>> history = train(net, data, Recipe(epochs=1), [GradientPruning(p=0.9, fifo=0)])
    >>> history.events[-1]["text"]
    'density of the pruned gradients: features.4 0...'
    """

    p: float = 0.9  # target rate: the share below tau, or of zeros if the law is "lognormal"
    law: str = "normal"  # of the gradients, from which tau follows
    fifo: int = 5  # as many earlier tau predict the next; 0: each batch's own
    every: int = 10  # batches from one count of the density to the next

    def __post_init__(self):
        self._pruner()  # which says what is out of range

    def _pruner(self):
        return Pruner(self.p, self.law, self.fifo, self.every)

    def on_fit_start(self, run: Run) -> None:
        if not self.p:
            raise NoEffect("gradient pruning: p = 0 prunes nothing")
        pruner, state = self._pruner(), run.state.setdefault(self, {})
        x = run.dataset.normalize(run.dataset.train.x[:2])
        place = prune_gradients_(
            run.model, pruner, x, lambda: run.state[self], run.generator(self, share=True), owner=self
        )
        state.update({n: pruner.new_state() for n in place})
        run.log(self, "pruned: " + ", ".join(f"{n} ({at})" for n, at in place.items()), placement=place)

    def on_fit_end(self, run: Run) -> None:
        conv.revert_(run.model, self)
        layers = {n: s for n, s in run.state[self].items() if s["counted"]}
        means = {k: {n: s[k] / s["counted"] for n, s in layers.items()} for k in ("zeros", "error", "cosine")}
        density = {n: 1 - z for n, z in means["zeros"].items()}
        text = ", ".join(f"{n} {d:.2f}" for n, d in density.items()) or "nothing was pruned"
        run.log(
            self,
            f"density of the pruned gradients: {text}",
            density=density,
            error=means["error"],
            cosine=means["cosine"],
        )
