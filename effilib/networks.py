"""Define our networks: plain `nn.Module`s with explicit widths and depths, so that surgery is legible.

`settings()` reads the lists back from the layers themselves, also after surgery.
"""

import torch
from torch import nn

from effilib.errors import BadInput, choose
from effilib.normalization import Layers, norm_relu
from effilib.seeds import stream

__all__ = [
    "NETWORKS", "VGG", "Block", "Constant", "Gone", "Groups", "ResNet", "conv3x3", "convnet", "initialize_",
    "resnet", "speed_run", "vgg",
]  # fmt: skip

ACTIVATIONS = {"gelu": nn.GELU, "silu": nn.SiLU, "relu": nn.ReLU}


def conv3x3(c_in: int, c_out: int, stride: int = 1, bias: bool = False, kernel: int = 3) -> nn.Conv2d:
    """Return a convolution that keeps the size of maps, but for stride.

    (N, c_in, H, W) -> (N, c_out, H / stride, W / stride). kernel: odd.

    >>> conv3x3(3, 8, stride=2)(torch.zeros(1, 3, 6, 6)).shape
    torch.Size([1, 8, 3, 3])
    """
    return nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=bias)


class Gone(nn.Module):
    """Stands where the first layer of a removed residual path stood: nothing flows on.

    >>> Gone()(torch.ones(2, 3, 4, 4))
    tensor([[[[0.]]]])
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(1, 1, 1, 1)


class Constant(nn.Module):
    """Add what is left of a removed residual path: a constant.

    (C,), one per channel; it stands where the path's last layer stood.

    >>> Constant(2)(torch.ones(1, 2, 1, 1)).flatten().tolist()  # it begins at 0
    [1.0, 1.0]
    """

    def __init__(self, channels):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.bias.to(x.dtype).view(1, -1, 1, 1)


class Block(nn.Module):
    """Residual block of two 3x3 convolutions; a 1x1 convolution on the shortcut where the shape changes (He
    et al. 2015, option B).

    inner: channels between the two (default c_out); 0: the residual path is gone, the shortcut and a constant
    are left. kernels: sizes of the two, odd.

    >>> block = Block(8, 16, stride=2, inner=4)
    >>> block.inner, block.width, block(torch.zeros(1, 8, 6, 6)).shape
    (4, 16, torch.Size([1, 16, 3, 3]))
    """

    def __init__(self, c_in, c_out, stride=1, inner=None, kernels=(3, 3)):
        super().__init__()
        inner = c_out if inner is None else inner
        if inner:
            self.conv1, self.bn1 = conv3x3(c_in, inner, stride, kernel=kernels[0]), nn.BatchNorm2d(inner)
            self.conv2, self.bn2 = conv3x3(inner, c_out, kernel=kernels[1]), nn.BatchNorm2d(c_out)
        else:
            self.conv1, self.bn1, self.conv2, self.bn2 = Gone(), nn.Identity(), nn.Identity(), Constant(c_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
            )

    @property
    def inner(self) -> int:
        """Channels between its two convolutions; 0 where the residual path is gone."""
        return 0 if isinstance(self.conv1, Gone) else self.conv1.out_channels

    @property
    def kernels(self) -> list[int]:
        """Sizes of its two kernels."""
        return [
            getattr(m, "kernel_size", (3,))[0] for m in (self.conv1, self.conv2)
        ]  # what stands in a layer's place says nothing

    @property
    def width(self) -> int:
        """Channels that it writes."""
        return len(self.bn2.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = norm_relu(self.bn1, self.conv1(x))
        return norm_relu(self.bn2, self.conv2(out), add=self.shortcut(x))


class ResNet(nn.Module):
    """ResNet of the CIFAR family (He et al. 2015, section 4.2): a 3x3 stem, stages at 1, 1/2, 1/4 ... of the
    size, average pooling.

    widths: channels of each stage. blocks: residual blocks of each stage; or, per stage, the list of the
    blocks' inner widths. stem: channels of the stem (default: those of the first stage). kernels: sizes, all
    odd, of the stem's kernel and of those in each stage; or, per stage, the list of its blocks' two (default:
    3 everywhere). patch: the stem cuts the image into patches of this size (kernel and stride) instead.

    >>> net = ResNet(10, widths=(8, 16), blocks=(1, 2))
    >>> net(torch.zeros(2, 3, 32, 32)).shape, net.settings()["blocks"]
    (torch.Size([2, 10]), [[8], [16, 16]])
    """

    def __init__(
        self, classes, channels=3, widths=(16, 32, 64), blocks=(1, 1, 2), stem=None, kernels=None, patch=None
    ):
        super().__init__()
        if len(widths) != len(blocks):
            raise BadInput(
                f"resnet: {len(widths)} widths but {len(blocks)} depths; give one of each per stage"
            )
        first, *rest = kernels or [3] * (1 + len(widths))
        if len(rest) != len(widths):
            raise BadInput(
                f"resnet: {1 + len(rest)} kernel sizes, "
                f"expected one for the stem and one for each of {len(widths)} stages"
            )
        c = stem or widths[0]
        self.stem = (
            nn.Conv2d(channels, c, patch, patch, bias=False) if patch else conv3x3(channels, c, kernel=first)
        )
        self.bn = nn.BatchNorm2d(c)
        self.stages = nn.ModuleList()
        for i, (width, depth, size) in enumerate(zip(widths, blocks, rest, strict=True)):
            inners = [width] * depth if isinstance(depth, int) else depth
            sizes = [(size, size)] * len(inners) if isinstance(size, int) else size
            stage = nn.Sequential()
            for j, (inner, pair) in enumerate(zip(inners, sizes, strict=True)):
                stage.append(Block(c, width, stride=2 if i and not j else 1, inner=inner, kernels=pair))
                c = width
            self.stages.append(stage)
        self.head = nn.Linear(c, classes)
        initialize_(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = norm_relu(self.bn, self.stem(x))
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))  # (N, C, H, W) -> (N, C) -> (N, classes)

    def settings(self) -> dict:
        """Widths, depths and kernel sizes as they are now: `ResNet(classes, channels, **settings)` has the
        same structure.
        """
        found = {
            "widths": [s[-1].width for s in self.stages],
            "blocks": [[b.inner for b in s] for s in self.stages],
            "stem": self.stem.out_channels,
        }
        plain = isinstance(self.stem, nn.Conv2d)  # else what a method put in its place
        if plain and self.stem.stride != (1, 1):
            found["patch"] = self.stem.kernel_size[0]
        first = self.stem.kernel_size[0] if plain and "patch" not in found else 3
        kernels = [first, *([b.kernels for b in s] for s in self.stages)]
        if kernels[0] != 3 or any(pair != [3, 3] for stage in kernels[1:] for pair in stage):
            found["kernels"] = kernels
        return found


class VGG(nn.Module):
    """VGG with BatchNorm (Simonyan & Zisserman 2014): stages of 3x3 convolutions, 2x2 max pooling between,
    average pooling at the end.

    widths: per stage, the list of its layers' channels. window: side of the pooling windows, whose stride is
    2 at any side.

    >>> net = VGG(10, widths=((8,), (16, 16)))
    >>> net(torch.zeros(2, 3, 32, 32)).shape, sum(isinstance(m, nn.Conv2d) for m in net.modules())
    (torch.Size([2, 10]), 3)
    """

    def __init__(self, classes, channels=3, widths=((32,), (64,), (128, 128)), bn=True, window=2):
        super().__init__()
        self.features, self.window = Layers(), window
        c = channels
        for i, stage in enumerate(widths):
            if i:
                self.features.append(nn.MaxPool2d(window, 2, ceil_mode=window > 2))
            for width in [stage] if isinstance(stage, int) else stage:
                self.features.append(conv3x3(c, width, bias=not bn))
                if bn:
                    self.features.append(nn.BatchNorm2d(width))
                self.features.append(nn.ReLU(inplace=True))
                c = width
        self.head = nn.Linear(c, classes)
        initialize_(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).mean((2, 3)))

    def settings(self) -> dict:
        """Return the settings with which `VGG` has this structure now.

        Widths, whether there is BatchNorm, and windows above 2.
        """
        widths = [[]]
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                widths.append([])
            elif hasattr(layer, "out_channels"):  # a convolution, or what stands in its place
                widths[-1].append(layer.out_channels)
        bn = all(m.bias is None for m in self.features if isinstance(m, nn.Conv2d))
        # also where a method took the BatchNorm
        return {"widths": widths, "bn": bn} | ({"window": self.window} if self.window > 2 else {})


class Groups(nn.Module):
    """The plain network of the CIFAR-10 speed runs (Jordan 2024, arXiv:2404.00498; Page 2019).

    A stem of small patches, then groups of two 3x3 convolutions. The pooling comes before normalisation and
    activation, so that both work on a quarter of the pixels. Global max pooling; logits are multiplied by
    `scale`. kernel: side of the stem's patches. BatchNorm's statistics follow fast (momentum 0.4); its eps is
    PyTorch's: with the published 1e-12 a channel that hardly varies, as on digits, explodes in eval mode.

    >>> net = Groups(10, widths=(16, 32))
    >>> net(torch.zeros(2, 3, 32, 32)).shape, net.settings()["stem"]
    (torch.Size([2, 10]), 24)
    """

    def __init__(
        self, classes, channels=3, widths=(64, 256, 256), stem=24, kernel=2, scale=1 / 9, activation="gelu"
    ):
        super().__init__()
        act = ACTIVATIONS[choose("activation", activation, ACTIVATIONS)]
        self.activation, self.scale = activation, scale
        self.stem, self.act = nn.Conv2d(channels, stem, kernel), act()
        self.groups, c = nn.ModuleList(), stem
        for width in widths:
            first, second = (nn.BatchNorm2d(width, momentum=0.4) for _ in range(2))
            convs = conv3x3(c, width), conv3x3(width, width)
            self.groups.append(Layers(convs[0], nn.MaxPool2d(2), first, act(), convs[1], second, act()))
            c = width
        self.head = nn.Linear(c, classes, bias=False)
        initialize_(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.stem(x))  # (N, C, H, W) -> (N, stem, H - 1, W - 1)
        for group in self.groups:
            x = group(x)
        return self.head(x.amax((2, 3))) * self.scale

    def settings(self) -> dict:
        """Return the settings with which `Groups` has this structure now."""
        return {
            "widths": [g[4].out_channels for g in self.groups],
            "stem": self.stem.out_channels,
            "kernel": self.stem.kernel_size[0],
            "scale": self.scale,
            "activation": self.activation,
        }


def resnet(classes: int, channels: int = 3, **settings) -> ResNet:
    """Return a `ResNet` with the given widths and blocks.

    >>> resnet(10, channels=1, widths=(8,), blocks=(2,)).settings()
    {'widths': [8], 'blocks': [[8, 8]], 'stem': 8}
    """
    return ResNet(classes, channels, **settings)


def vgg(classes: int, channels: int = 3, **settings) -> VGG:
    """Return a `VGG` with the given widths.

    >>> vgg(10, widths=((8,), (16, 16))).settings()
    {'widths': [[8], [16, 16]], 'bn': True}
    """
    return VGG(classes, channels, **settings)


def convnet(
    classes: int,
    channels: int = 3,
    widths: tuple[int, ...] = (32, 32, 64),
    bn: bool = True,
    window: int = 2,
) -> VGG:
    """Return a small plain network: one 3x3 convolution a stage.

    >>> convnet(10, widths=(8, 16), bn=False).settings()
    {'widths': [[8], [16]], 'bn': False}
    """
    return VGG(classes, channels, widths=widths, bn=bn, window=window)


def speed_run(classes: int, channels: int = 3, **settings) -> Groups:
    """Return `Groups` with the given widths.

    >>> speed_run(10, widths=(16, 32)).settings()["widths"]
    [16, 32]
    """
    return Groups(classes, channels, **settings)


NETWORKS = {"resnet": resnet, "vgg": vgg, "convnet": convnet, "speed_run": speed_run}


def initialize_(model: nn.Module, seed: int | None = None) -> None:
    """He initialisation (fan in) of convolutions, small normal weights of the classifier; BatchNorm as
    PyTorch does.

    seed: every layer draws from a stream of its own, so that networks of other widths start alike in the
    layers whose names and shapes agree. None: all draw from the global generator.

    >>> narrow, wide = (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, width, 3)) for width in (4, 8))
    >>> for net in (narrow, wide):
    ...     initialize_(net, seed=1)
    >>> torch.equal(narrow[0].weight, wide[0].weight)
    True
    """
    for name, m in model.named_modules():
        g = None if seed is None else stream(seed, name)
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, nonlinearity="relu", generator=g)
        elif isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, std=m.in_features**-0.5, generator=g)
        if isinstance(m, nn.Conv2d | nn.Linear) and m.bias is not None:
            nn.init.zeros_(m.bias)
