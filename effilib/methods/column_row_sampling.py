"""Approximate tensor operations (Adelman & Silberstein 2018, arXiv:1805.08079): products in part.

A product is a sum over its inner dimension, AB = sum_i A^(i) B_(i); of n such terms k are computed. For a
convolution the terms are the input channels. In forward sampling the backward pass runs through the same k
channels, so that all three products shrink to k/n; the channels that were left out get a dX and dW of 0. In
backward sampling the forward pass is exact, dX samples output channels and dW samples examples.

Taking the k largest terms, unscaled, is biased and works best in practice. BatchNorm gathers its statistics
under sampled activations but is evaluated with exact ones: they are re-estimated by exact forward passes
before every evaluation. The 2018 version of the paper counts operations; times are in the version of 2021
(NeurIPS).
"""

from dataclasses import dataclass

import torch
from torch import nn

from effilib import convolution as conv
from effilib.convolution import Approximation
from effilib.data import Batches
from effilib.errors import BadInput, choose
from effilib.methods import Info
from effilib.models import reestimate_
from effilib.training import Method, Run, evaluate, stream

__all__ = [
    "INFO", "ColumnRowSampling", "backward_sampling", "choose_terms", "forward_sampling", "inclusion",
    "norms", "sample_columns_", "squared_error",
]  # fmt: skip

INFO = Info(
    name="Column-row sampling",
    name_de="Approximative Tensoroperationen",
    chapter="3.4",
    paper="Adelman & Silberstein 2018, arXiv:1805.08079 (extended: NeurIPS 2021)",
    claim="Computing half of the channels of a wide residual network's convolutions costs about a point of "
    "accuracy on CIFAR-100 and saves half of the operations (2018); up to 1.37x less training time (2021).",
    cost_model="All three products of a sampled layer shrink to k/C; added: scoring and gathering channels, "
    "and scattering dX.",
)

SCHEMES = ("topk", "uniform", "norm", "bernoulli")


def norms(t: torch.Tensor, dim: int) -> torch.Tensor:
    """Return |t_i|_F of every slice i along dim, in fp32: any shape -> (t.shape[dim],).

    >>> norms(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), 0)
    tensor([5., 1.])
    """
    t = (
        t.float() if t.dtype == torch.float16 else t
    )  # squares overflow; those of bf16 are only rounded, and sums are fp32 inside
    return t.pow(2).sum([d for d in range(t.dim()) if d != dim]).float().sqrt()


def inclusion(w: torch.Tensor, k: int) -> torch.Tensor:
    """Return probabilities p_i = min(1, c w_i) that add up to k, w >= 0: (n,) -> (n,).

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
    """Return which k of n terms to compute, and the factor of each.

    (index (m,), scale (m,) or None), no index twice, m <= k but for Bernoulli. w: (n,), the terms' norms
    |A^(i)||B_(i)|. scheme: "topk", the largest; "uniform"; "norm", in proportion to w (NPS); "bernoulli",
    each on its own with probability min(1, c w), k of them on average. replacement: k independent draws, so
    that a term can come twice ("uniform", "norm"); without, a systematic sample, in which every term's
    probability is exactly that of `inclusion`. scaled: divide each term by its expected number of draws,
    which makes the sum unbiased. mix: share of the uniform distribution mixed in, so that no channel is left
    out for ever (0.1 in the authors' code; "norm", "bernoulli").

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
    w = torch.ones_like(w) if scheme == "uniform" else w
    p = (w / w.sum() if w.sum() > 0 else torch.full_like(w, 1 / n)) * (1 - mix) + mix / n
    generator = generator and conv.on_device(generator, w.device)
    if replacement and scheme != "bernoulli":
        index, times = torch.multinomial(p, k, replacement=True, generator=generator).unique(
            return_counts=True
        )
        return index, times / (k * p[index]) if scaled else None
    p = inclusion(p, k)
    if scheme == "bernoulli":
        index = p[:0]
        while not len(index):  # drawn again if empty: then P(i) is p_i / P(not empty)
            index = (torch.rand(n, generator=generator, device=w.device) < p).nonzero().flatten()
        p = p / (1 - (1 - p).prod())
    else:  # a comb of k teeth, one apart, over the probabilities laid end to end in random order
        order = torch.randperm(n, generator=generator, device=w.device)
        ends = p[order].cumsum(0)
        teeth = torch.arange(k, device=w.device) + torch.rand((), generator=generator, device=w.device)
        index = order[torch.searchsorted(ends, teeth.to(ends.dtype)).clamp(max=n - 1)].unique()
    return index, 1 / p[index] if scaled else None


def squared_error(terms: torch.Tensor, k: int, scheme: str, *, p: torch.Tensor | None = None) -> torch.Tensor:
    """Return E|AB - estimate|_F^2 of a scaled estimate, by formula (Drineas et al. 2006).

    terms: (n, ...), the n terms A^(i) B_(i). scheme: "replacement" with draw probabilities p (n,);
    "bernoulli" with inclusion probabilities p; "uniform" without replacement.

    >>> squared_error(torch.tensor([[1.0], [3.0]]), 1, "uniform").item()  # the sum is 4, the estimate 2 or 6
    4.0
    """
    n, product = len(terms), terms.sum(0)
    w2 = terms.flatten(1).square().sum(1)  # |A^(i)|^2 |B_(i)|^2
    if scheme == "replacement":
        return ((w2 / p).sum() - product.square().sum()) / k
    if scheme == "bernoulli":
        return (w2 * (1 - p) / p).sum()
    return n * (n - k) / (k * (n - 1)) * (w2.sum() - product.square().sum() / n)


def how_many(ratio, n, minimal):
    """k = min(max(int(ratio n), minimal), n).

    >>> how_many(0.5, 64, 10), how_many(0.5, 16, 10), how_many(0.5, 8, 10)
    (32, 10, 8)
    """
    return min(max(int(ratio * n), minimal), n)


def forward_sampling(ratio: float, minimal: int, **how) -> Approximation:
    """Return the `Approximation` by a share of the input channels, forward and backward.

    >>> index, scale = forward_sampling(0.5, minimal=1).sample(torch.ones(2, 4, 3, 3), torch.ones(8, 4, 3, 3))
    >>> len(index)  # of 4 input channels
    2
    """

    def sample(x, w):
        k = how_many(ratio, x.shape[1], minimal)
        return None if k == x.shape[1] else choose_terms(norms(x, 1) * norms(w, 1), k, **how)

    return Approximation(sample=sample)


def backward_sampling(ratio: float, minimal: int, **how) -> Approximation:
    """Return the `Approximation` with an exact forward pass and a sampled backward pass.

    dX is of some output channels, by |W_o||dY_o|, dW of some examples, by |x_n||dY_n|.

    >>> x, w = torch.ones(4, 2), torch.ones(3, 2, requires_grad=True)
    >>> conv.approx_linear(x, w, approximation=backward_sampling(0.5, minimal=1)).sum().backward()
    >>> w.grad[0].tolist()  # two of four samples took part
    [2.0, 2.0]
    """

    def dx(dy, x, w, product):
        k = how_many(ratio, len(w), minimal)
        if k == len(w):
            return product.backward(dy, x, w, (True, False))[0]
        return conv.dx_of_outputs(dy, x, w, product, *choose_terms(norms(dy, 1) * norms(w, 0), k, **how))

    def dw(dy, x, w, product):
        k = how_many(ratio, len(x), minimal)
        if k == len(x):
            return product.backward(dy, x, w, (False, True))[1]
        return conv.dw_of_samples(dy, x, w, product, *choose_terms(norms(dy, 0) * norms(x, 0), k, **how))

    return Approximation(dx=dx, dw=dw)


def sample_columns_(
    model: nn.Module,
    ratio: float = 0.5,
    *,
    where: str = "forward",
    minimal: int = 10,
    linear: bool = True,
    x: torch.Tensor | None = None,
    owner: object = "column-row sampling",
    **how,
) -> list[str]:
    """Sample the products of a model's convolutions and linear layers, in place.

    All but those of the stem and the classifier. ratio: share of the terms computed. where: "forward" or
    "backward". x: a batch of images, see `effilib.convolution.layers`. how: as for `choose_terms`. Grouped
    convolutions, whose terms are few already, stay exact, and so do layers with at most `minimal` channels.
    Returns the names of the sampled layers. Raises `NoEffect` if there are none.

    >>> sample_columns_(build("vgg", 10, (3, 32, 32), widths=((16,), (32, 32))), 0.5)
    ['features.4', 'features.7']
    """
    choose("place of sampling", where, ("forward", "backward"))
    if not 0 < ratio <= 1:
        raise BadInput(f"column-row sampling: ratio is {ratio}, it must be above 0 and at most 1")
    approximation = {"forward": forward_sampling, "backward": backward_sampling}[where](ratio, minimal, **how)
    chosen = conv.layers(model, x, linear=linear)
    channels = {n: m.weight.shape[where == "forward"] for n, m in chosen.items()}
    wanted = [
        n
        for n, m in chosen.items()
        if getattr(m, "groups", 1) == 1 and how_many(ratio, channels[n], minimal) < channels[n]
    ]
    return conv.convert_(chosen, dict.fromkeys(wanted, approximation), owner, "column-row sampling")


@dataclass(frozen=True, kw_only=True)
class ColumnRowSampling(Method):
    """Train with sampled products.

    ratio, where, minimal, linear: see `sample_columns_`; scheme to mix: see `choose_terms`. images: as many
    training images re-estimate BatchNorm's statistics before an evaluation, with exact forward passes.

    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(16, 16))
    >>> history = train(net, data, Recipe(epochs=1), [ColumnRowSampling(ratio=0.5)])
    >>> history.events[-1]["text"]
    '1 layers sampled; accuracy ... % with the statistics of training, ... % re-estimated'
    """

    ratio: float = 0.5
    scheme: str = "topk"
    replacement: bool = False
    scaled: bool = False
    mix: float = 0.1
    where: str = "forward"
    minimal: int = 10
    linear: bool = True
    images: int = 512

    def on_fit_start(self, run: Run) -> None:
        how = dict(scheme=self.scheme, replacement=self.replacement, scaled=self.scaled, mix=self.mix)
        how["generator"] = run.generator(self, share=True)
        x = run.dataset.normalize(run.dataset.train.x[:2])
        names = sample_columns_(
            run.model, self.ratio, where=self.where, minimal=self.minimal, linear=self.linear, x=x,
            owner=self, **how,
        )  # fmt: skip
        run.state[self] = {"layers": names}

    def on_evaluation(self, run: Run) -> None:
        if self.where == "forward":
            size = min(run.recipe.batch_size, len(run.dataset.train))
            batches = Batches(
                run.dataset, size, stream(run.seed, "BatchNorm"), augmentation=run.recipe.augmentation
            )
            few = max(1, self.images // size)
            with run.autocast():
                reestimate_(
                    run.model,
                    (
                        x.contiguous(memory_format=run.layout)
                        for (x, _), _ in zip(batches, range(few), strict=False)
                    ),
                )

    def on_fit_end(self, run: Run) -> None:
        conv.revert_(run.model, self)
        with run.clock.paused():
            plain = evaluate(run.model, run.dataset, "validation", run.precision)[1]
        self.on_evaluation(run)  # on the clock: whoever uses the network needs it once
        with run.clock.paused():
            exact = evaluate(run.model, run.dataset, "validation", run.precision)[1]
        layers = len(run.state[self]["layers"])
        text = f"accuracy {plain:.2f} % with the statistics of training, {exact:.2f} % re-estimated"
        run.log(self, f"{layers} layers sampled; {text}", plain=plain, reestimated=exact)
