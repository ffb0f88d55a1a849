"""Whiten the patches that the first layer sees: filters in closed form, which need no training.

Patches x (d = C k^2 pixels) of the training images have the covariance C = E diag(lambda) E^T. The filters

    w_j = e_j / sqrt(lambda_j + eps),    and -w_j

answer with uncorrelated numbers of about unit variance, whatever the light and the blur of the images: what
BatchNorm behind the layer is there for, and more. The negatives keep for the ReLU what it would cut off. The
layer is frozen, so that it needs no dW, and its BatchNorm only adds a bias: no statistics are taken on the
largest maps of the network. It is structure without labels, as in chapter 5.2, in milliseconds (Page 2019,
cifar10-fast; Jordan 2024, arXiv:2404.00498).
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from effilib.errors import BadInput, choose, within
from effilib.hooks import Method
from effilib.inspection import cut_patches, first_convolution, followers
from effilib.run import Run

__all__ = ["Whitening", "whiten_stem_", "whitening_filters"]


def whitening_filters(
    patches: torch.Tensor, filters: int, eps: float = 5e-4, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Return leading whitening filters and their negatives, (filters, d).

    patches: (M, d), normalised pixels. eps: above 0, added to the variances, so that noise is not blown up,
    nor what does not vary at all (in RGB of grey images). Beyond 2 d filters there are no more: the rest are
    random mixtures of these, of the same variance.

    >>> patches = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 1.0])
    >>> w = whitening_filters(patches, 4)
    >>> (patches @ w.T).std(0).round(decimals=1)
    tensor([1., 1., 1., 1.])
    """
    within("whitening: eps", eps, "above 0")
    x = patches.double() - patches.double().mean(0)
    variances, directions = torch.linalg.eigh(x.T @ x / len(x))  # ascending
    w = (directions / (variances.clamp_min(0) + eps).sqrt()).T.flip(0)  # (d, d), the largest first
    w = w[: math.ceil(filters / 2)]
    pairs = torch.stack([w, -w], 1).flatten(0, 1)[:filters]
    more = filters - len(pairs)
    mix = torch.randn(more, len(w), generator=generator, dtype=w.dtype) / math.sqrt(len(w))
    return torch.cat([pairs, mix @ w]).to(patches.dtype)


def _stem(model, shape):
    """The first convolution and its name. Raises `BadInput` where its user froze it."""
    name, conv = first_convolution(model, shape)
    if not conv.weight.requires_grad:
        raise BadInput(f"whitening: the filters of {name} are frozen already, so that they have to stay")
    return name, conv


class _Shift(nn.BatchNorm2d):
    """A BatchNorm that only adds its bias, as one does whose mean is 0 and whose variance is 1."""

    def forward(self, x):
        return x + self.bias.to(x.dtype).view(1, -1, 1, 1)


@torch.no_grad()
def whiten_stem_(
    model: nn.Module,
    images: torch.Tensor,
    generator: torch.Generator,
    *,
    eps: float = 5e-4,
    patches: int = 100_000,
    shift: bool = True,
) -> tuple[str, str]:
    """Set the first convolution's filters to frozen, whitening ones, in place.

    images: (N, C, H, W) of the *training* set, normalised. shift: a BatchNorm right behind the layer only
    adds its bias, unless it is frozen; `unshift_` makes it a plain one again that computes the same. Returns
    the names of the layer and of that BatchNorm, "" without one. Raises what `first_convolution` raises, and
    `BadInput` where the filters are frozen already.

    >>> net = build("convnet", 4, (1, 8, 8), widths=(4, 8))
    >>> whiten_stem_(net, torch.rand(16, 1, 8, 8), torch.Generator())
    ('features.0', 'features.1')
    >>> net.features[0].weight.requires_grad
    False
    """
    name, conv = _stem(model, tuple(images.shape[1:]))
    found = cut_patches(images, conv, patches, generator).float().cpu()
    w = whitening_filters(found, conv.out_channels, eps, generator)
    conv.weight.copy_(w.view_as(conv.weight))
    conv.weight.requires_grad_(False)
    behind = followers(model, images[:2]).get(name, "") if shift else ""
    norm = model.get_submodule(behind) if behind else None
    if type(norm) is not nn.BatchNorm2d or not norm.affine or norm.running_var is None:
        return name, ""
    if not norm.weight.requires_grad:  # it would be overwritten
        return name, ""
    norm.__class__ = _Shift
    norm.weight.fill_(1).requires_grad_(False)
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)
    return name, behind


def unshift_(model: nn.Module) -> int:
    """Make plain BatchNorms of those that only add their bias, in place. Returns how many.

    >>> net, x = build("convnet", 4, (1, 8, 8), widths=(4, 8)).eval(), torch.rand(16, 1, 8, 8)
    >>> names = whiten_stem_(net, x, torch.Generator())
    >>> before = net(x)
    >>> unshift_(net), torch.allclose(net(x), before, atol=1e-5)
    (1, True)
    """
    norms = [m for m in model.modules() if type(m) is _Shift]
    for m in norms:
        m.__class__ = nn.BatchNorm2d
        m.weight.requires_grad_(True)
    return len(norms)


@dataclass(frozen=True, kw_only=True)
class Whitening(Method):
    """Train behind a frozen first layer that whitens the images' patches.

    Afterwards the model is plain again.

    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(4, 8))
    >>> train(net, data, Recipe(epochs=1), [Whitening(patches=1000)]).events[0]["text"]
    'features.0 whitens patches of 1x3x3 pixels by 4 filters; features.1 only adds its bias'
    """

    eps: float = 5e-4  # added to the variances of the patches; the speed runs' value
    images: int = 5000  # of the training set, at most, that patches are cut from
    patches: int = 100_000  # a thousandth of the time of an epoch, and enough for 27 dimensions
    shift: bool = True  # a BatchNorm behind the layer only adds its bias
    learns: float = 1.0  # share of the run in which the layer's bias, or that of its BatchNorm, learns
    structure: str = "whitening"  # or "random": frozen as initialised, in front of its BatchNorm; the control

    def __post_init__(self):
        choose("structure of the stem", self.structure, ("whitening", "random"))
        within("whitening: eps", self.eps, "above 0")
        within("whitening: learns", self.learns, "above 0, to 1")
        within("whitening: images", self.images, "a whole number above 0")
        within("whitening: patches", self.patches, "a whole number above 0")

    def on_fit_start(self, run: Run) -> None:
        run.kind = "structure"
        if self.structure == "random":
            name, conv = _stem(run.model, run.dataset.shape)
            conv.weight.requires_grad_(False)
            norm = ""
        else:
            images = run.dataset.normalize(run.dataset.train.x[: self.images])
            how = dict(eps=self.eps, patches=self.patches, shift=self.shift)
            name, norm = whiten_stem_(run.model, images, run.generator(self), **how)
            conv = run.model.get_submodule(name)
        run.kind = "step"
        size = "x".join(map(str, (conv.in_channels, *conv.kernel_size)))
        behind = f"; {norm} only adds its bias" if norm else ""
        bias = (run.model.get_submodule(norm) if norm else conv).bias
        learns = self.learns < 1 and bias is not None and bias.requires_grad
        run.state[self] = {"stem": name, "bias": f"{norm or name}.bias" if learns else ""}
        if learns:
            run.group([bias], ends=self.learns)
        what = "whitens" if self.structure == "whitening" else "is frozen as initialised: it reads"
        run.log(self, f"{name} {what} patches of {size} pixels by {conv.out_channels} filters{behind}")

    def on_epoch_start(self, run: Run) -> None:
        self._freeze(run, run.schedule.position)

    def on_step_end(self, run: Run) -> None:
        if run.step + 1 < run.steps:
            self._freeze(run, run.schedule.after)

    def _freeze(self, run, position):
        """Freeze the bias when its time is over: nothing up to the next layer needs a gradient then."""
        bias, over = run.state[self]["bias"], position >= self.learns * run.schedule.planned
        if bias and over and run.model.get_parameter(bias).requires_grad:
            run.restructure(lambda model, optimizer: self._thaw(run, False))

    def _thaw(self, run, learns):
        if bias := run.state[self]["bias"]:
            run.model.get_parameter(bias).requires_grad_(learns)

    def on_fit_end(self, run: Run) -> None:
        unshift_(run.model)
        run.model.get_submodule(run.state[self]["stem"]).weight.requires_grad_(True)
        self._thaw(run, True)
