"""A stem of wavelet bands: the network reads its images at half the resolution, four bands a channel.

Layers in front of the first halving work on a quarter of the pixels, and the halving itself is taken out, so
that all later maps keep their sizes. The controls read the same pixels otherwise: space-to-depth, the low
band alone, or every second pixel. After a share of the run the stem may read whole images.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.utils import _pair

from effilib.convolution import probe
from effilib.dataset import Dataset
from effilib.errors import BadInput, NoEffect, choose, within
from effilib.hooks import Method
from effilib.inspection import first_convolution
from effilib.methods.wavelet import even, haar, wavelet_pool
from effilib.run import Run
from effilib.surgery import adopt_, forget_

__all__ = [
    "FrontEnd", "WaveletStem", "haar_matrix", "halve_again_", "keep_sizes_", "moments", "space_to_depth",
    "wavelet_stem_",
]  # fmt: skip

KINDS = ("bands", "low", "space-to-depth", "strided")


def space_to_depth(x: torch.Tensor) -> torch.Tensor:
    """Make channels of the four pixels of each 2 x 2.

    (N, C, H, W) -> (N, 4C, ceil(H/2), ceil(W/2)). Ordered (row, column, C), channels last in memory.

    >>> space_to_depth(torch.tensor([[[[1, 2], [3, 4]]]])).flatten().tolist()
    [1, 2, 3, 4]
    """
    n, c, height, width = even(x).shape
    pixels = even(x).permute(0, 2, 3, 1).reshape(n, height // 2, 2, width // 2, 2, c)
    return pixels.permute(0, 1, 3, 2, 4, 5).reshape(n, height // 2, width // 2, 4 * c).permute(0, 3, 1, 2)


def haar_matrix(channels: int) -> torch.Tensor:
    """Return the matrix (4C, 4C) from `space_to_depth` to `haar`.

    >>> M = haar_matrix(1)
    >>> (M @ torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist()
    [5.0, -2.0, -1.0, 0.0]
    """
    signs = torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]) / 2
    return torch.kron(signs, torch.eye(channels))


def split(x, kind):
    """Return what the network reads instead of x: (N, C, H, W) -> (N, C or 4C, ceil(H/2), ceil(W/2)).

    "strided" reads x itself.

    >>> [split(torch.rand(1, 3, 8, 8), kind).shape[1:] for kind in ("bands", "low")]
    [torch.Size([12, 4, 4]), torch.Size([3, 4, 4])]
    """
    if kind == "strided":
        return x
    if kind == "space-to-depth":
        return space_to_depth(x)
    return wavelet_pool(x) if kind == "low" else haar(x)


def moments(dataset: Dataset, kind: str, images: int = 2000) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and std, (C',) each, of what a stem reads.

    From the first training images, which are stratified.

    >>> mean, std = moments(load("synthetic"), "bands")
    >>> mean.shape, (std > 0).all().item()
    (torch.Size([4]), True)
    """
    count, total, squares = 0, 0, 0
    for x, _ in dataset.batches(dataset.train[:images]):
        y = split(x, kind).double()
        count += y[:, 0].numel()
        total = total + y.sum((0, 2, 3))
        squares = squares + y.square().sum((0, 2, 3))
    mean = total / count
    variance = (squares - count * mean.square()) / (count - 1)
    return mean.float(), variance.sqrt().clamp_min(1e-3).float()


class FrontEnd(nn.Module):
    """Read standardised bands by a convolution on half the side.

    It stands where the network's first convolution stood. x: (N, C, H, W). conv: reads what `split` makes of
    x. mean, std: of those channels on the training set. Haar and the standardisation are one small product
    behind space-to-depth: strided sums of 3 channels are not vectorised. whole: read the image itself at its
    full resolution, by the filters of the low band, which is twice the mean of 2 x 2 pixels.

    >>> conv = nn.Conv2d(4, 8, 3, padding=1)
    >>> front = FrontEnd(conv, "bands", mean=torch.zeros(4), std=torch.ones(4))
    >>> x = torch.rand(2, 1, 8, 8)
    >>> front(x).shape, torch.allclose(front.bands(x), split(x, "bands"), atol=1e-6)
    (torch.Size([2, 8, 4, 4]), True)
    """

    def __init__(self, conv: nn.Conv2d, kind: str, mean: torch.Tensor, std: torch.Tensor):
        super().__init__()
        self.conv, self.kind, self.whole = conv, kind, False
        matrix = haar_matrix(len(mean) // 4) if kind == "bands" else torch.eye(len(mean))
        self.register_buffer("matrix", matrix.to(mean) / std.view(-1, 1))
        self.register_buffer("scale", 1 / std)
        self.register_buffer("shift", -mean / std)

    @property
    def out_channels(self):
        """Return how many channels it writes."""
        return self.conv.out_channels

    @property
    def in_channels(self):
        """Return how many channels its convolution reads."""
        return self.conv.in_channels

    def bands(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the convolution reads."""
        if self.kind == "strided":
            return x
        x = space_to_depth(x) if self.kind == "bands" else split(x, self.kind)
        with torch.autocast(x.device.type, enabled=False):
            y = F.linear(x.permute(0, 2, 3, 1), self.matrix.to(x.dtype), self.shift.to(x.dtype))
        return y.permute(0, 3, 1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.whole:
            return self.conv(self.bands(x))
        conv, c = self.conv, x.shape[1]
        scale, shift = (v[:c].to(x.dtype).view(-1, 1, 1) for v in (self.scale, self.shift))
        return F.conv2d(2 * scale * x + shift, conv.weight[:, :c], conv.bias, conv.stride, conv.padding)

    def extra_repr(self) -> str:
        return f"kind={self.kind}, whole={self.whole}"


def sizes(model, shape):
    """Return (name, (H, W) that it reads) of all convolutions and pooling layers.

    In the order of a forward pass on zeros of `shape`.

    >>> sizes(build("convnet", 4, (1, 8, 8), widths=(4, 8)), (1, 8, 8))
    [('features.0', (8, 8)), ('features.3', (8, 8)), ('features.4', (4, 4))]
    """
    order, like = [], next(model.parameters())

    def note(name):
        return lambda m, inputs: order.append((name, tuple(inputs[0].shape[2:])))

    layers = {
        n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d)
    }
    hooks = [m.register_forward_pre_hook(note(name)) for name, m in layers.items()]
    probe(model, torch.zeros(2, *shape, device=like.device, dtype=like.dtype), hooks)
    return order


def keep_sizes_(model: nn.Module, shape: tuple[int, int, int], after: str | None = None) -> list[str]:
    """Take out the network's first halving; later layers keep their sizes.

    Wherever the map that it reads is read with stride 2: a convolution (a shortcut's too) or an overlapping
    pooling gets stride 1, a 2 x 2 pooling goes. after: the name of a layer whose own stride does not count.
    Returns the names. Raises `NoEffect` where no layer halves.

    >>> keep_sizes_(build("convnet", 4, (1, 8, 8), widths=(4, 8)), (1, 8, 8))
    ['features.3']
    """
    seen = [(n, s) for n, s in sizes(model, shape) if n != after]
    halving = [(n, s) for n, s in seen if _pair(model.get_submodule(n).stride) == (2, 2)]
    if not halving:
        raise NoEffect(
            f"wavelet: no layer of {type(model).__name__} has a stride of 2 to be taken out; keep=False "
            "halves all maps instead"
        )
    changed = [n for n, size in halving if size == halving[0][1]]
    for name in changed:
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Conv2d) or _pair(layer.kernel_size) != (2, 2):
            layer.stride = (1, 1) if isinstance(layer, nn.Conv2d) else 1
        else:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Passed(layer))
    return changed


def halve_again_(model: nn.Module, names: list[str]) -> None:
    """Undo `keep_sizes_`, whose names these are, in place.

    >>> net, x = build("convnet", 4, (1, 8, 8), widths=(4, 8)).eval(), torch.rand(1, 1, 8, 8)
    >>> before = net(x)
    >>> halve_again_(net, keep_sizes_(net, (1, 8, 8)))
    >>> torch.equal(net(x), before)
    True
    """
    for name in names:
        layer = model.get_submodule(name)
        if isinstance(layer, Passed):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.pool)
        else:
            layer.stride = (2, 2) if isinstance(layer, nn.Conv2d) else 2


class Passed(nn.MaxPool2d):
    """Do nothing, where a pooling was taken out.

    A `MaxPool2d` of one pixel, so that stages can still be told apart. pool: what stood there.

    >>> Passed(nn.MaxPool2d(2))(torch.tensor([1.0, 2.0])).tolist()
    [1.0, 2.0]
    """

    def __init__(self, pool: nn.Module):
        super().__init__(1)
        self.__dict__["pool"] = pool  # no layer of the network now

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def wavelet_stem_(
    model: nn.Module,
    dataset: Dataset,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    kind: str = "bands",
    keep: bool = True,
    standardize: bool = True,
    generator: torch.Generator | None = None,
) -> dict:
    """Put a `FrontEnd` in place of the first convolution, in place.

    Returns a dict: the stem's name, what it reads, strides taken out. kind: "bands"; or, the controls, "low"
    (A alone), "space-to-depth" or "strided" (the image, at stride 2). The new convolution has the old one's
    output channels and He initialisation from `generator`. keep: later maps keep their sizes. If the old
    convolution had an even stride, the bands take the place of a factor 2 of it, and a kernel above 3 is
    halved (7 x 7 pixels lie in about 3 x 3 bands); else the network's next halving goes. Without `keep` the
    whole network works at half its sizes. standardize: give every channel mean 0 and variance 1, with moments
    of the training images of `dataset`. Raises `NoEffect` where there is no stride to take out, `BadInput` if
    the network cannot take the smaller maps.

    >>> data = load("synthetic")
    >>> wavelet_stem_(build("convnet", data.classes, data.shape, widths=(4, 8)), data)
    {'stem': 'features.0', 'kernel': 3, 'channels': 4, 'strides taken out': ['features.3']}
    """
    choose("kind of stem", kind, KINDS)
    name, old = first_convolution(model, dataset.shape)
    stride, k = old.stride[0], max(old.kernel_size)
    strided = stride % 2 == 0
    if kind == "strided" and strided:
        raise NoEffect(f"wavelet: the first convolution, {name}, has a stride of {stride} already")
    removed = keep_sizes_(model, dataset.shape, after=name) if keep and not strided else []
    c, *size = dataset.shape
    with torch.no_grad():
        before = old(torch.zeros(1, c, *size, device=old.weight.device, dtype=old.weight.dtype)).shape[2]
    target = before if keep and strided else (before + 1) // 2  # rows that the stem gives
    mean, std = moments(dataset, kind)
    if not standardize:
        mean, std = torch.zeros_like(mean), torch.ones_like(std)
    if keep and strided:
        stride, k = stride // 2, max(3, k // 4 * 2 + 1) if k > 3 else k
    rows, stride = (size[0], 2 * stride) if kind == "strided" else ((size[0] + 1) // 2, stride)
    padding = min(range(k), key=lambda p: abs((rows + 2 * p - k) // stride + 1 - target))
    conv = nn.Conv2d(len(mean), old.out_channels, k, stride, padding, bias=old.bias is not None)
    with torch.no_grad():
        he = math.sqrt(2 / conv.weight[0].numel())
        conv.weight.copy_(torch.randn(conv.weight.shape, generator=generator) * he)
        if old.bias is not None:
            conv.bias.copy_(old.bias)
    front = FrontEnd(conv.to(old.weight), kind, mean.to(old.weight), std.to(old.weight)).train(old.training)
    adopt_(optimizer, list(conv.parameters()), old.weight)
    forget_(optimizer, list(old.parameters()))
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, front)
    try:
        sizes(model, dataset.shape)
    except Exception as error:  # whatever a user's own code raises
        raise BadInput(
            f"wavelet: {type(model).__name__} cannot take maps of half the size ({error}); the network is "
            "spoilt now"
        ) from error
    return {"stem": name, "kernel": k, "channels": len(mean), "strides taken out": removed}


@dataclass(frozen=True, kw_only=True)
class WaveletStem(Method):
    """Train with a front end of wavelet bands, or a control.

    `wavelet_stem_` before the first step; it stays in the model. The transform follows augmentation, so crops
    and flips are the images' own. After `share` of the run the stem reads whole images by what it has learned
    of the low band, and the stride that was taken out comes back. Raises `BadInput` for a share of other
    kinds than "bands" and "low", or behind a first convolution that has a stride.

    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(4, 8))
    >>> train(net, data, Recipe(epochs=1), [WaveletStem()]).events[0]["text"]
    'features.0 reads 4 channels (bands); strides taken out: features.3'
    """

    kind: str = "bands"
    keep: bool = True
    standardize: bool = True
    share: float = 1.0  # of the run, behind the stem; then at full resolution

    def __post_init__(self):
        choose("kind of stem", self.kind, KINDS)
        within("wavelet: share", self.share, "above 0, to 1")
        if self.share < 1 and self.kind not in ("bands", "low"):
            raise BadInput(f"wavelet: a share is for kinds with a low band, bands and low, not {self.kind}")

    def on_fit_start(self, run: Run) -> None:
        first = first_convolution(run.model, run.dataset.shape)[1]
        if self.share < 1 and _pair(first.stride) != (1, 1):
            raise BadInput(
                f"wavelet: the first convolution has a stride of {first.stride[0]}, so that no later phase "
                "can read whole images: leave share at 1"
            )
        done, how = {}, dict(kind=self.kind, keep=self.keep, standardize=self.standardize)
        how |= dict(generator=run.generator(self))
        run.restructure(
            lambda model, optimizer: done.update(wavelet_stem_(model, run.dataset, optimizer, **how))
        )
        stem, taken = done["stem"], done["strides taken out"]
        run.state[self] = {"stem": stem, "taken": taken, "whole": False}
        taken = ", ".join(taken) or "none"
        run.log(self, f"{stem} reads {done['channels']} channels ({self.kind}); strides taken out: {taken}")

    def on_epoch_start(self, run: Run) -> None:
        if run.state[self]["whole"] and not run.model.get_submodule(run.state[self]["stem"]).whole:
            run.restructure(lambda model, optimizer: self._whole(run, model))  # resumed

    def on_step_end(self, run: Run) -> None:
        done = run.schedule.after / run.schedule.planned
        if done >= self.share and not run.state[self]["whole"] and run.step + 1 < run.steps:
            run.restructure(lambda model, optimizer: self._whole(run, model))
            run.log(self, f"after {self.share:.0%} of the run, {run.state[self]['stem']} reads whole images")

    def _whole(self, run, model):
        state = run.state[self]
        model.get_submodule(state["stem"]).whole = state["whole"] = True
        halve_again_(model, state["taken"])
