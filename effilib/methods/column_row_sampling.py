"""Approximate tensor operations (Adelman & Silberstein 2018, arXiv:1805.08079): products in part.

A product is a sum over its inner dimension, AB = sum_i A^(i) B_(i); of n such terms k are computed. For a
convolution the terms are the input channels. In forward sampling the backward pass runs through the same k
channels, so that all three products shrink to k/n; the channels that were left out get a dX and dW of 0. In
backward sampling the forward pass is exact, dX samples output channels and dW samples examples. Channels
are chosen in blocks of 16, which kernels take at once and which are copied as a whole (`ColumnRowSampling`);
where all readers of a channel leave it out, it is not computed at all (`ChannelSampling`).

Taking the k largest terms, unscaled, is biased and works best in practice. BatchNorm gathers its statistics
under sampled activations but is evaluated with exact ones: they are re-estimated by exact forward passes
before every evaluation. The 2018 version of the paper counts operations; times are in the version of 2021
(NeurIPS).
"""

from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.func import functional_call

from effilib import convolution as conv
from effilib import surgery
from effilib.convolution import Approximation
from effilib.errors import NoEffect, choose, within
from effilib.evaluation import evaluate
from effilib.hooks import Method
from effilib.methods import Info
from effilib.methods.sampled_terms import blocks, choose_terms, how_many, norms, rectified, rectified_energy
from effilib.models import reestimate_
from effilib.run import Run
from effilib.seeds import stream

__all__ = [
    "INFO", "ChannelSampling", "ColumnRowSampling", "backward_sampling", "exact_channels_",
    "forward_sampling", "sample_channels_", "sample_columns_",
]  # fmt: skip

INFO = Info(
    name="Column-row sampling",
    name_de="Approximative Tensoroperationen",
    chapter="3.4",
    paper="Adelman & Silberstein 2018, arXiv:1805.08079 (extended: NeurIPS 2021)",
    claim="Computing half of the channels of a wide residual network's convolutions costs about a point of "
    "accuracy on CIFAR-100 and saves half of the operations (2018); up to 1.37x less training time (2021).",
    cost_model="All three products of a sampled layer shrink to k/C, or to (k/C)^2 where what no product "
    "reads is not computed; added: scoring and copying channels, and putting dX back.",
    applies="wide convolutions, bound by arithmetic",
)


def forward_sampling(
    ratio: float, minimal: int, *, block: int = 1, norm: nn.Module | None = None, **how
) -> Approximation:
    """Return the `Approximation` by a share of the input channels.

    In the forward and the backward pass. block: channels are chosen in blocks of so many neighbours. norm:
    the BatchNorm that, with a ReLU, makes the input: channels are scored by its parameters
    (`rectified_energy`); None: by the input itself.

    >>> index, scale = forward_sampling(0.5, minimal=1).sample(torch.ones(2, 4, 3, 3), torch.ones(8, 4, 3, 3))
    >>> len(index)  # of 4 input channels
    2
    """
    _check(ratio, minimal, block)

    def sample(x, w):
        k, n, b = blocks(ratio, x.shape[1], minimal, block)
        if k >= n:
            return None
        closed = norm is not None and norm.num_features == x.shape[1]
        energy = rectified_energy(norm.weight, norm.bias) if closed else norms(x, 1).square()
        # |x_c|^2 and |W_c|^2 of every block
        squares = energy.view(n, b).sum(1), norms(w, 1).square().view(n, b).sum(1)
        index, scale = choose_terms((squares[0] * squares[1]).sqrt(), k, **how)
        if b == 1:
            return index, scale
        channels = b * index.sort().values[:, None] + torch.arange(b, device=index.device)
        return channels, None if scale is None else scale[index.argsort()].repeat_interleave(b)

    return Approximation(sample=sample)


def backward_sampling(ratio: float, minimal: int, **how) -> Approximation:
    """Return the `Approximation` with a sampled backward pass only.

    dX is of some output channels, by |W_o||dY_o|, dW of some examples, by |x_n||dY_n|.

    >>> x, w = torch.ones(4, 2), torch.ones(3, 2, requires_grad=True)
    >>> conv.approx_linear(x, w, approximation=backward_sampling(0.5, minimal=1)).sum().backward()
    >>> w.grad[0].tolist()  # two of four samples took part
    [2.0, 2.0]
    """
    _check(ratio, minimal)

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
    block: int = 16,
    score: str = "auto",
    x: torch.Tensor | None = None,
    owner: object = "column-row sampling",
    **how,
) -> list[str]:
    """Sample the products of a model's convolutions and linear layers, in place.

    All but those of the stem and the classifier. ratio: share of the terms computed. where: "forward" or
    "backward". block: forward, channels are chosen in blocks of so many, as kernels take them. score: "auto",
    by BatchNorm's parameters where a BatchNorm and a ReLU make the input (found if x is given), else by the
    input's norms; "measured", always by these. x: a batch of images, see `effilib.convolution.layers`. how:
    as for `choose_terms`. Grouped convolutions, whose terms are few already, stay exact, and so do layers
    with at most `minimal` channels. Returns the names of the sampled layers. Raises `NoEffect` if there are
    none.

    >>> sample_columns_(build("vgg", 10, (3, 32, 32), widths=((16,), (32, 32))), 0.5)
    ['features.4', 'features.7']
    """
    choose("place of sampling", where, ("forward", "backward"))
    choose("score of channels", score, ("auto", "measured"))
    _check(ratio, minimal, block)
    chosen = {n: m for n, m in conv.layers(model, x, linear=linear).items() if getattr(m, "groups", 1) == 1}
    norms = rectified(model, chosen, x) if score == "auto" and where == "forward" and x is not None else {}
    approximations = {}
    for name, m in chosen.items():
        if where == "forward":
            k, n, _ = blocks(ratio, m.weight.shape[1], minimal, block)
            a = forward_sampling(ratio, minimal, block=block, norm=norms.get(name), **how)
        else:
            k, n = how_many(ratio, len(m.weight), minimal), len(m.weight)
            a = backward_sampling(ratio, minimal, **how)
        if k < n:
            approximations[name] = a
    return conv.convert_(chosen, approximations, owner, "column-row sampling")


def _check(ratio, minimal, block=1):
    within("column-row sampling: ratio", ratio, "above 0, to 1")
    within("column-row sampling: minimal", minimal, "a whole number above 0")
    within("column-row sampling: block", block, "a whole number above 0")


# What no product reads is not computed either


def sample_channels_(
    model: nn.Module,
    ratio: float = 0.5,
    *,
    fixed: bool = False,
    minimal: int = 16,
    block: int = 16,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Let a model compute a choice of its channels only, in place.

    In training steps; the choice is uniform. In forward sampling a channel that is left out gets a gradient
    of 0. Where all of its readers leave out the same ones, nobody needs to write them either: the same sums
    and gradients, from a quarter of the products instead of half. Chosen are blocks of channels, as in
    `sample_columns_`, in every node (see `effilib.surgery`) that only convolutions write and read. fixed:
    always the same ones, a narrower network within this one; else drawn anew in every step. Returns the
    nodes' names. Raises `NoEffect` if there are none, `BadInput` if the network cannot be traced.
    `exact_channels_` undoes it; until then the network's widths must stay.

    >>> net = build("vgg", 10, (3, 8, 8), widths=((16,), (32, 32)))
    >>> sample_channels_(net, 0.5)  # the last layer's channels are read by the classifier
    ['features.4']
    """
    _check(ratio, minimal, block)
    chosen = {}  # node -> (blocks computed, blocks, channels a block)
    for node in surgery.trace(model).nodes:
        k, n, b = blocks(ratio, node.width, minimal, block)
        ends = [model.get_submodule(name) for name in (*node.producers, *node.consumers)]
        if k < n and all(map(_is_plain, ends)):
            chosen[node] = k, n, b
    if not chosen:
        raise NoEffect("column-row sampling: no channels are written and read by convolutions only")
    exact_channels_(model)
    cls = type(model)
    model.__class__ = type(cls.__name__, (_Sampled, cls), {"__module__": cls.__module__})
    model.sampled = _Choice(chosen, generator, fixed)
    return [node.name for node in chosen]


class _Choice:
    """Which channels take part: chosen, node -> (blocks computed, blocks, channels a block)."""

    def __init__(self, chosen, generator, fixed):
        self.chosen, self.generator, self.inside = chosen, generator, False
        self.kept = self.draw() if fixed else None

    def draw(self):
        return {node: (_draw(k, n, self.generator), b) for node, (k, n, b) in self.chosen.items()}


class _Sampled:
    """Mixed into a model's class, so that a copy follows its own layers: in training it computes a choice."""

    def forward(self, x):
        choice = self.sampled
        if choice.inside or not self.training or isinstance(x, fx.Proxy):  # followed by surgery
            return super().forward(x)
        drawn = choice.kept or choice.draw()
        parts = _parts(self, drawn)
        choice.inside = True
        try:
            y = functional_call(self, parts, (x,))
        finally:
            choice.inside = False
        for node, (index, b) in drawn.items():
            for name in node.bns:
                for statistic in ("running_mean", "running_var"):
                    whole = getattr(self.get_submodule(name), statistic)
                    if whole is not None:
                        whole.view(-1, b)[index.to(whole.device)] = parts[f"{name}.{statistic}"].view(-1, b)
        return y


def _is_plain(m):
    return type(m) is nn.Conv2d and m.groups == 1


def _draw(k, n, generator):
    return torch.randperm(n, generator=generator)[:k].sort().values


def _parts(model, chosen):
    """Name -> tensor of all layers of nodes of which only some blocks take part: node -> (blocks, size)."""
    parts, tensors = {}, {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for node, (index, b) in chosen.items():
        places = [(n, 0, ("weight", "bias")) for n in node.producers]
        places += [(n, 0, ("weight", "bias", "running_mean", "running_var")) for n in node.bns]
        places += [(n, 1, ("weight",)) for n in node.consumers]
        for layer, axis, names in places:
            for key in (f"{layer}.{name}" for name in names if f"{layer}.{name}" in tensors):
                t = parts.get(key, tensors[key])
                part = t.unflatten(axis, (-1, b)).index_select(axis, index.to(t.device))
                parts[key] = part.flatten(axis, axis + 1)
    return parts


def exact_channels_(model: nn.Module) -> None:
    """Let a model compute all channels again, in place.

    >>> net = build("vgg", 10, (3, 8, 8), widths=((16,), (32, 32)))
    >>> kind, names = type(net), sample_channels_(net, 0.5)
    >>> exact_channels_(net)
    >>> type(net) is kind
    True
    """
    if isinstance(model, _Sampled):
        model.__class__ = type(model).__mro__[2]
        del model.sampled


# The methods


class _ForAShare:
    """Hooks of both methods: sampled for the first part of the run, exact for the rest."""

    def __post_init__(self):
        within("column-row sampling: until", self.until, "above 0, to 1")
        _check(self.ratio, self.minimal, self.block)

    def on_epoch_start(self, run):
        if run.state[self]["exact"]:  # resumed: the network is as it was at the start
            self.make_exact_(run.model)

    def on_step_end(self, run):
        done = run.schedule.after / run.schedule.planned
        if not run.state[self]["exact"] and self.until <= done < 1:
            run.restructure(lambda model, optimizer: self.make_exact_(model))
            run.state[self]["exact"] = True
            run.log(self, f"exact products after {done:.0%} of the run")

    def on_evaluation(self, run):
        if getattr(self, "where", "") != "backward" and not run.state[self]["exact"]:
            size = min(run.recipe.batch_size, len(run.dataset.train))
            how = dict(augmentation=run.recipe.augmentation)
            batches = run.dataset.shuffled(size, stream(run.seed, "BatchNorm"), **how)
            few = max(1, self.images // size)
            with run.autocast():
                reestimate_(
                    run.model,
                    (
                        x.contiguous(memory_format=run.layout)
                        for (x, _), _ in zip(batches, range(few), strict=False)
                    ),
                )

    def on_fit_end(self, run):
        if run.state[self]["exact"]:
            return
        self.make_exact_(run.model)
        if run.dataset.validation is None:  # in a loop of one's own
            self.on_evaluation(run)
            return
        with run.clock.paused():
            plain = evaluate(run.model, run.dataset, "validation", run.precision)[1]
        self.on_evaluation(run)  # on the clock: whoever uses the network needs it once
        with run.clock.paused():
            exact = evaluate(run.model, run.dataset, "validation", run.precision)[1]
        text = f"accuracy {plain:.2f} % with the statistics of training, {exact:.2f} % re-estimated"
        run.log(self, f"{run.state[self]['what']} sampled; {text}", plain=plain, reestimated=exact)


@dataclass(frozen=True, kw_only=True)
class ColumnRowSampling(_ForAShare, Method):
    """Train with sampled products, at first or all the time.

    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(32, 16))
    >>> history = train(net, data, Recipe(epochs=1), [ColumnRowSampling(ratio=0.5)])
    >>> history.events[-1]["text"]
    '1 layers sampled; accuracy ... % with the statistics of training, ... % re-estimated'
    """

    ratio: float = 0.5  # share of the terms computed
    until: float = 1.0  # share of the run after which products are exact
    # which terms: "topk", in effect nearly always the same; "uniform", "norm" or "bernoulli", drawn anew in
    # every step; see `choose_terms`, also for the next three
    scheme: str = "topk"
    replacement: bool = False
    scaled: bool = False
    mix: float = 0.1
    where: str = "forward"  # or "backward"
    minimal: int = 10  # layers with at most so many terms stay exact
    linear: bool = True  # linear layers too
    block: int = 16  # neighbouring channels that are chosen together, as many as kernels take at once
    score: str = "auto"  # of channels: by BatchNorm's parameters where one can; or "measured"
    images: int = 512  # as many training images re-estimate BatchNorm's statistics before an evaluation

    def on_fit_start(self, run: Run) -> None:
        how = dict(scheme=self.scheme, replacement=self.replacement, scaled=self.scaled, mix=self.mix)
        how["generator"] = run.generator(self, share=True)
        x = run.dataset.normalize(run.dataset.train.x[:2])
        names = sample_columns_(
            run.model, self.ratio, where=self.where, minimal=self.minimal, linear=self.linear, x=x,
            block=self.block, score=self.score, owner=self, **how,
        )  # fmt: skip
        run.state[self] = {"what": f"{len(names)} layers", "exact": False}

    def make_exact_(self, model: nn.Module) -> None:
        """Take the sampling out of a model, in place."""
        conv.revert_(model, self)


@dataclass(frozen=True, kw_only=True)
class ChannelSampling(_ForAShare, Method):
    """Train a choice of the channels, at first or all the time.

    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(32, 16))
    >>> history = train(net, data, Recipe(epochs=1), [ChannelSampling(ratio=0.5, until=0.5)])
    >>> history.events[-1]["text"]
    'exact products after 50% of the run'
    """

    ratio: float = 0.5  # share of the channels
    until: float = 0.6  # share of the run after which all are computed
    fixed: bool = True  # the same channels in every step, which learn more in a short run; else drawn anew
    minimal: int = 16  # layers with at most so many channels stay exact
    block: int = 16  # neighbouring channels that are chosen together, as many as kernels take at once
    images: int = 512  # as many training images re-estimate BatchNorm's statistics before an evaluation

    def on_fit_start(self, run: Run) -> None:
        # one stream for all processes: each has the same channels
        how = dict(fixed=self.fixed, minimal=self.minimal, block=self.block, generator=run.generator(self))
        names = sample_channels_(run.model, self.ratio, **how)
        run.state[self] = {"what": f"channels of {len(names)} nodes", "exact": False}

    def make_exact_(self, model: nn.Module) -> None:
        """Take the sampling out of a model, in place."""
        exact_channels_(model)
