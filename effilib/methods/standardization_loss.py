"""Standardization loss: BatchNorm's statistics as a loss instead of a layer.

Collins, Ballé & Shlens 2019, arXiv:1903.00925. For each channel of a layer's pre-activations x, over the
batch and all pixels, a term pulls mean and variance to 0 and 1: the Kullback-Leibler divergence of N(mu,
sigma^2) from N(0, 1). Nothing is normalised, so nothing is left at test time.

A network with residual paths needs a gain per path besides, 0 at first (SkipInit, De & Smith 2020): else
every sum of two paths doubles the variance that BatchNorm would have brought back to 1. When training is over
it is multiplied into the path's last convolution.

Written with `var_mean` and autograd the loss makes a step slower than the BatchNorm that it replaces.
`Divergence` takes the moments from BatchNorm's own kernel and writes its gradient in one pass, a x + b with
one a and b per channel, which is what BatchNorm's kernel of eval mode computes: 32-bit sums whatever the
input's format, either memory format, CPU or CUDA."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from effilib import surgery
from effilib.errors import BadInput, NoEffect, within
from effilib.history import History
from effilib.hooks import Method
from effilib.inspection import followers
from effilib.methods import Info
from effilib.methods.other_norms import NORMS, Bias, replace_norms_
from effilib.normalization import Layers
from effilib.run import Run
from effilib.surgery import forget_
from effilib.tasks import Task
from effilib.training import train

__all__ = [
    "Divergence", "StandardizationLoss", "Standardized", "Unstandardized", "Watch", "cnn", "collect_",
    "divergence", "divergence_of", "naive_divergence", "plain_", "pre_activations", "standardize_",
]  # fmt: skip

INFO = Info(
    name="Standardization loss",
    name_de="Standardisierungsverlust",
    chapter="7.2",
    paper="Collins, Ballé & Shlens 2019, arXiv:1903.00925",
    claim="Pulling the pre-activations to mean 0 and variance 1 by a loss needs 2.2 to 2.8 times fewer "
    "steps than no normalisation, works for small batches, and leaves nothing behind at test time; "
    "BatchNorm with large batches needs fewer steps still.",
    cost_model="Same products; per layer one pass over the pre-activations for the moments and one for the "
    "gradient, as BatchNorm has.",
    applies="small batches, for which BatchNorm is poor",
)

EPS = 1e-5  # in the logarithm, as BatchNorm's: a dead channel has variance 0
# in training: 1 - 1 / (sigma^2 + eps) explodes where a channel dies; a gradient is at most 1 / (2 sqrt(eps))
BOUND = 1e-2
NARROW = (torch.bfloat16, torch.float16)


def divergence_of(mean: torch.Tensor, var: torch.Tensor, eps: float = 0.0) -> torch.Tensor:
    """Return the divergence D of these moments, the paper's equation.

    D = 1/2 sum_i (mu_i^2 + sigma_i^2 - log sigma_i^2 - 1). mean, var: (C,), biased variances. eps: in the
    logarithm.

    >>> divergence_of(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])).item()  # a mean is off by 1
    0.5
    """
    return 0.5 * (mean * mean + var - torch.log(var + eps) - 1).sum()


def naive_divergence(x: torch.Tensor, eps: float = EPS, *, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return the same of activations by autograd: the slow oracle.

    x: (N, C, ...). In 32 bits or more.

    >>> naive_divergence(torch.tensor([[1.0], [-1.0]]), eps=0.0).item()  # mean 0, variance 1
    0.0
    """
    x = x if x.dtype == torch.float64 else x.float()
    var, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], unbiased=False)
    return divergence_of(mean if bias is None else mean + bias, var, eps)


@functools.lru_cache
def _held(channels, device, narrow):
    """Running statistics that nobody reads: of 32 bits, they make BatchNorm's kernel add up in 32."""
    if not narrow:
        return None, None
    return torch.zeros(channels, device=device), torch.ones(channels, device=device)


class Divergence(torch.autograd.Function):
    """Compute `naive_divergence` in one pass forward and one backward.

    With n values a channel,

    dD/dx = (mu + (x - mean(x)) (1 - 1 / (sigma^2 + eps))) / n,  dD/dbias = mu = mean(x) + bias

    The bias comes by itself, and x is kept for backward as it was before: what is added up may be changed in
    place by a ReLU.

    >>> x = torch.tensor([[3.0], [1.0]], requires_grad=True)  # mean 2, variance 1
    >>> D = Divergence.apply(x, None, 0.0)
    >>> D.backward()
    >>> D.item(), x.grad.flatten().tolist()  # mean / n
    (2.0, [1.0, 1.0])
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        mean, var = torch.batch_norm_update_stats(x, *_held(x.shape[1], x.device, x.dtype in NARROW), 0.0)
        mu = mean if bias is None else mean + bias
        ctx.save_for_backward(x, mean, var, mu)
        ctx.eps = eps
        return divergence_of(mu, var, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, mean, var, mu = ctx.saved_tensors
        n = x.numel() // x.shape[1]
        a, b = (1 - 1 / (var + ctx.eps)) * (g / n), mu * (g / n)
        # a (x - mean(x)) + b
        dx, *_ = torch.native_batch_norm(x, a, b, mean, torch.ones_like(var), False, 0.0, 0.0)
        return dx, mu * g if ctx.needs_input_grad[1] else None, None


def divergence(x: torch.Tensor, eps: float = EPS, *, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return D of the pre-activations x + bias, summed over the channels.

    x: (N, C) or (N, C, H, W); bias: (C,). A scalar of 32 bits or more. Source: the paper, section 3; it is
    the sum over channels that lambda multiplies. eps: in the logarithm only. Raises `BadInput` where a
    channel has fewer than two values, for these have no variance.

    >>> x = 2 * torch.randn(8, 3, 4, 4) + 1
    >>> torch.allclose(divergence(x), naive_divergence(x))
    True
    """
    if x.dim() < 2 or x.numel() < 2 * x.shape[1]:
        raise BadInput(
            f"standardization loss: pre-activations of shape {tuple(x.shape)} have no variance: 2 values a "
            "channel are needed"
        )
    return Divergence.apply(x, bias, eps)


class Standardized(Bias):
    """Add a bias (C,); in training, note the sum's divergence.

    It stands where a BatchNorm stood. The notes wait in `terms` (a layer that is used twice has two) until
    `collect_` takes them; none are made while it is not `on`. gain: whether the sum is multiplied by a
    parameter, 0 at first, as at the end of a residual path.

    >>> layer, x = Standardized(3), torch.randn(8, 3, 4, 4)
    >>> torch.equal(layer(x), x), len(layer.terms)
    (True, 1)
    >>> Standardized(3, gain=True)(x).abs().max().item()
    0.0
    """

    def __init__(self, channels: int, eps: float = EPS, gain: bool = False):
        super().__init__(nn.Parameter(torch.zeros(channels)))
        self.eps, self.terms, self.on = eps, [], True
        self.gain = nn.Parameter(torch.zeros(())) if gain else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.on and self.training and torch.is_grad_enabled():
            self.terms.append(divergence(x, self.eps, bias=self.bias))
        y = super().forward(x)
        return y if self.gain is None else y * self.gain.to(y.dtype)


class Watch:
    """Note the divergence of a layer's output, by a forward hook.

    For networks without BatchNorm. The network goes on with a copy, for a ReLU in place would change what the
    gradient needs.

    >>> layer = nn.Linear(2, 3)
    >>> watch = Watch(layer)
    >>> y = layer(torch.randn(8, 2))
    >>> len(watch.terms)
    1
    """

    def __init__(self, layer: nn.Module, eps: float = EPS):
        self.eps, self.terms, self.on = eps, [], True
        self.handle = layer.register_forward_hook(self.hook)

    def hook(self, layer: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        """Note the divergence of a layer's output; pass a copy on."""
        if self.on and layer.training and torch.is_grad_enabled():
            self.terms.append(divergence(output, self.eps))
            return output.clone()
        return output


def collect_(sources: Iterable) -> torch.Tensor | None:
    """Return the sum of the divergences noted so far, and forget them.

    sources: `Standardized` layers and `Watch`es. None if there is nothing.

    >>> layer = Standardized(3)
    >>> y = layer(torch.randn(8, 3, 4, 4))
    >>> collect_([layer]).item() > 0, collect_([layer])
    (True, None)
    """
    terms = [t for s in sources for t in s.terms]
    for s in sources:
        s.terms.clear()
    return torch.stack(terms).sum() if terms else None


def path_ends(model: nn.Module, x: torch.Tensor) -> dict[str, str]:
    """Return {normalisation: convolution} at the ends of the residual paths, by name.

    x: a few images (N, C, H, W). {} where surgery cannot follow the network.

    >>> path_ends(build("resnet", 4, (1, 8, 8), widths=(4, 8), blocks=(1, 1)), torch.zeros(2, 1, 8, 8))
    {'stages.0.0.bn2': 'stages.0.0.conv2', 'stages.1.0.bn2': 'stages.1.0.conv2'}
    """
    try:
        convs = [path.convs[-1] for path in surgery.trace(model).paths if path.convs]
    except BadInput:
        return {}
    behind = followers(model, x)
    return {behind[conv]: conv for conv in convs if conv in behind}


def standardize_(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    eps: float = EPS,
    gains: Iterable[str] = (),
) -> dict[str, nn.Module]:
    """Replace every BatchNorm by a `Standardized`: a bias, no scale, no statistics.

    gains: names of the BatchNorms whose successors get a gain. Returns dict name -> layer. For networks
    before their training. Raises `NoEffect` without BatchNorm.

    >>> net = build("convnet", 4, (1, 8, 8), widths=(4, 8))
    >>> list(standardize_(net)), type(net.features[1]).__name__
    (['features.1', 'features.5'], 'Standardized')
    """
    ends = {model.get_submodule(name) for name in gains}
    return replace_norms_(model, lambda norm: Standardized(norm.num_features, eps, norm in ends), optimizer)


def plain_(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, ends: dict[str, str] | None = None
) -> int:
    """Replace every `Standardized` by the bias that it adds.

    The same Parameter: outputs stay the same, bit for bit. Returns how many were replaced. ends: layer ->
    convolution in front of it, into which the layer's gain is multiplied; outputs are then rounded otherwise.

    >>> net = build("convnet", 4, (1, 8, 8), widths=(4, 8))
    >>> layers = standardize_(net)
    >>> plain_(net), type(net.features[1]).__name__
    (2, 'Bias')
    """
    made = {}
    for name, conv in (ends or {}).items():
        layer = model.get_submodule(name)
        for p in (*model.get_submodule(conv).parameters(), layer.bias):
            p.data *= layer.gain.data
        forget_(optimizer, [layer.gain])
    for parent in list(model.modules()):
        for child, layer in list(parent._modules.items()):
            if isinstance(layer, Standardized):
                made.setdefault(layer, Bias(layer.bias).train(layer.training))
                setattr(parent, child, made[layer])
    if not made:
        raise NoEffect(f"standardization loss: {type(model).__name__} has no standardized layer")
    return len(made)


def pre_activations(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of a network without BatchNorm that the loss watches.

    Convolutions and linear layers, but not the last, the classifier: dict name -> layer. Raises `NoEffect` if
    none is left.

    >>> list(pre_activations(build("convnet", 4, (1, 8, 8), widths=(4, 8), bn=False)))
    ['features.0', 'features.3']
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    if len(layers) < 2:
        raise NoEffect(
            f"standardization loss: {type(model).__name__} has no convolution or linear layer but its last"
        )
    return dict(list(layers.items())[:-1])


@dataclass(frozen=True, kw_only=True)
class StandardizationLoss(Method):
    """Add lambda times the divergence of every layer's pre-activations to the loss.

    BatchNorm, if there is any, is removed. A network without BatchNorm is watched at its convolutions and
    linear layers, but for the last. At the end the layers are plain: a bias where a BatchNorm stood. lam:
    lambda; what counts is lambda times the number of channels in all (the paper: 56 for three small layers,
    about 0.03 for ResNet-50). Raises `NoEffect` if nothing can be watched.

    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(4, 8))
    >>> history = train(net, data, Recipe(epochs=1), [StandardizationLoss(lam=0.1)])
    >>> history.events[0]["text"]
    '2 layers are standardized; 2 BatchNorms are gone'
    """

    lam: float = 0.001  # for networks of hundreds of channels; the paper's for 56 is 1
    eps: float = BOUND
    every: int = 1  # steps from one penalty to the next, which counts as many times; published: 1
    gains: bool = True  # residual paths begin at 0

    def __post_init__(self):
        within("standardization loss: lambda", self.lam, "above 0")
        within("standardization loss: eps", self.eps, "above 0")
        within("standardization loss: every", self.every, "a whole number above 0")

    def on_fit_start(self, run: Run) -> None:
        layers, ends = {}, {}
        if any(isinstance(m, NORMS) for m in run.model.modules()):
            x = run.dataset.normalize(run.dataset.train.x[:2])
            ends = path_ends(run.model, x) if self.gains else {}
            how = dict(eps=self.eps, gains=ends)
            run.restructure(lambda model, optimizer: layers.update(standardize_(model, optimizer, **how)))
        run.state[self] = {"ends": ends}
        self.sources(run).extend({id(s): s for s in layers.values()}.values())
        if not layers:
            self.sources(run).extend(Watch(layer, self.eps) for layer in pre_activations(run.model).values())
        what = f"{len(layers)} BatchNorms are gone" if layers else "there was no BatchNorm"
        what += f"; {len(ends)} residual paths begin at 0" if ends else ""
        n = len(self.sources(run))
        run.log(self, f"{n} layers are standardized; {what}", layers=n)

    def sources(self, run: Run) -> list:
        """Return where divergences are noted: on the model, for no checkpoint can hold them."""
        return run.model.__dict__.setdefault("_standardization", [])

    def on_batch(self, run: Run, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for source in self.sources(run):
            source.on = run.step % self.every == 0
        return x, y

    def loss_terms(self, run: Run) -> torch.Tensor | None:
        if run.step % self.every:
            return None
        total = collect_(self.sources(run))
        if total is None:
            raise NoEffect("standardization loss: this step's forward pass used no layer that is watched")
        run.state[self]["divergence"] = total.detach()
        return self.every * self.lam * total

    def on_fit_end(self, run: Run) -> None:
        for s in run.model.__dict__.pop("_standardization"):
            if isinstance(s, Watch):
                s.handle.remove()

        def change(model, optimizer):
            plain_(model, optimizer, run.state[self]["ends"])

        if any(isinstance(m, Standardized) for m in run.model.modules()):
            run.restructure(change)
        last = run.state[self].pop("divergence", None)
        if last is not None:
            run.log(self, f"the divergence ended at {last.item():.3g}", divergence=last.item())


@dataclass(frozen=True, kw_only=True)
class Unstandardized:
    """Train on images in [0, 1], as in the paper's table.

    They are not standardised. A network without normalisation starts badly there, which is the point. For
    `Arm.fit`: (task, seed) -> `History`.

    >>> fit = Unstandardized(methods=(StandardizationLoss(lam=1.0),))
    >>> fit(task("smoke", "synthetic").at(0.5), seed=0).steps
    4
    """

    methods: tuple = ()

    def __call__(self, task: Task, seed: int) -> History:
        dataset = task.load()
        channels = dataset.shape[0]
        dataset = replace(dataset, mean=(0.0,) * channels, std=(1.0,) * channels)
        return train(task.build(dataset, seed), dataset, task.recipe, self.methods, seed)


def cnn(classes: int, channels: int = 1) -> nn.Sequential:
    """Return the paper's MNIST network with BatchNorm.

    5x5 convolutions of stride 2 to 32, 16 and 8 channels, ReLU, a linear classifier. BatchNorm shifts and
    does not scale, as in the paper. Images of 28 to 32 pixels end as 4 x 4 maps; others are pooled to that.

    >>> cnn(10)(torch.rand(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    layers, c = [], channels
    for width in (32, 16, 8):
        norm = nn.BatchNorm2d(width)
        norm.weight.requires_grad_(False)
        layers += [nn.Conv2d(c, width, 5, stride=2, padding=2, bias=False), norm, nn.ReLU(inplace=True)]
        c = width
    model = Layers(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * c, classes))
    for m in model.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(m.weight)
    nn.init.zeros_(model[-1].bias)
    return model
