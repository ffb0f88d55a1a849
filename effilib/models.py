"""The networks: plain `nn.Module`s whose widths and depths are explicit lists, so that surgery is legible.

`describe(model)` reads the lists back from the layers themselves, also after surgery, and `build` makes the
network anew. A user's own network comes by its import path: `"torchvision.models:resnet18"` or
`"mine.py:net"`."""

import contextlib
import hashlib
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from effilib import user_files
from effilib.convolution import contiguous_, evaluating, guard_, is_contiguous
from effilib.errors import BadInput, choose, out_of_memory
from effilib.normalization import Layers, norm_relu

__all__ = [
    "NETWORKS",
    "VGG",
    "Block",
    "Constant",
    "Gone",
    "Groups",
    "ResNet",
    "build",
    "check_name",
    "conv3x3",
    "convnet",
    "describe",
    "find",
    "fits",
    "in_training",
    "initialize_",
    "kernels",
    "reestimate_",
    "resnet",
    "seeded",
    "set_kernel_",
    "speed_run",
    "stream",
    "untouched",
    "vgg",
]


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


def stream(seed: int, name: str) -> torch.Generator:
    """Return the random stream of a purpose.

    Initial weights, data order and a method's draws never shift each other.

    >>> [torch.rand(1, generator=stream(0, name)).item() < 1 for name in ("weights", "data")]
    [True, True]
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


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


@contextlib.contextmanager
def seeded(seed: int, device: str | torch.device = "cpu") -> Iterator[None]:
    """Inside, PyTorch's global generator starts from `seed`; outside, it is as if nothing had been drawn.

    Layers' constructors and dropout know no generator of their own: this is the one place that touches the
    global one.

    >>> with seeded(0):
    ...     first = nn.Linear(2, 2)
    >>> with seeded(0):
    ...     second = nn.Linear(2, 2)
    >>> torch.equal(first.weight, second.weight)
    True
    """
    cuda = torch.device(device).type == "cuda"
    with torch.random.fork_rng(devices=[torch.device(device)] if cuda else []):
        torch.random.default_generator.manual_seed(seed)
        if cuda:  # the generator of this very GPU, which need not be the current one
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def build(
    network: str,
    classes: int,
    shape: tuple[int, int, int],
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    **settings,
) -> nn.Module:
    """Make a network and check that it fits the data.

    network: a name of `NETWORKS` or a user's `"module:function"` or `"file.py:function"`, called with the
    number of classes. shape: (C, H, W) of the images. seed: of the initial weights; the same seed gives the
    same weights. Raises `BadInput` if the network is unknown, cannot be made, or does not take such images to
    (N, classes) logits.

    >>> net = build("resnet", 10, (3, 32, 32), widths=(8, 16), blocks=(1, 1), seed=1)
    >>> net(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    check_name(network)
    if network in NETWORKS:

        def make():
            model = NETWORKS[network](classes, shape[0], **settings)
            initialize_(model, seed)
            return model
    else:
        function = find(network)
        settings = settings | _channels(function, shape[0])

        def make():
            return _call(function, classes, settings)

    with seeded(seed):
        try:
            model = make()
        except (TypeError, ValueError, RuntimeError, OSError) as error:  # weights that cannot be had are one
            raise BadInput(f"network {network} cannot be made: {error}") from error
        if not isinstance(model, nn.Module):
            raise BadInput(f"network {network} returned {type(model).__name__}, expected a torch.nn.Module")
        if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
            raise BadInput(
                f"network {network} is compiled or scripted, which hides its layers: return the plain one"
                " (--set compile=True compiles it)"
            )
        fits(model, network, classes, shape)
    return model.to(device)


def check_name(network: str) -> None:
    """Raise `BadInput` unless `network` is one of ours or can be imported.

    >>> check_name("resnt")
    Traceback (most recent call last):
    effilib.errors.BadInput: unknown network 'resnt': ... (did you mean 'resnet'?)
    """
    if ":" in network:
        find(network)
    else:
        choose(
            "network",
            network,
            [*NETWORKS, "an import path such as torchvision.models:resnet18 or mine.py:net"],
        )


def fits(
    model: nn.Module,
    network: str,
    classes: int,
    shape: tuple[int, int, int],
    *,
    batch: tuple[torch.Tensor, torch.Tensor] | None = None,
    layout: torch.memory_format = torch.channels_last,
    autocast: contextlib.AbstractContextManager = contextlib.nullcontext(),  # noqa: B008 (it has no state)
) -> None:
    """Raise `BadInput` unless a model can be trained on such images.

    It has to take them to logits (N, classes) in eval and in training mode, and to gradients; of that nothing
    is left behind. batch: (x, y) as in training (default: two black images). autocast: the training's number
    format. Where only the layout is in the way, the model gets its images in the contiguous one
    (`contiguous_`), with a warning.

    >>> fits(build("convnet", 10, (3, 8, 8)), "convnet", 10, (1, 8, 8))
    Traceback (most recent call last):
    effilib.errors.BadInput: network convnet takes 3 input channels, but the images have 1 ...
    """
    guard_(model)  # before anything runs
    first = next(iter(model.parameters()), torch.empty(0))
    if batch is None:
        x = torch.zeros(2, *shape, dtype=first.dtype, device=first.device)
        batch = x, torch.arange(2, device=first.device) % classes
    x, y = batch
    x = x.contiguous(memory_format=layout)
    try:
        with seeded(0, x.device), autocast:
            with evaluating(model), torch.no_grad():
                logits = model(x)  # what is lazy gets its shape
            _check_logits(logits, network, (len(x), classes), "")
            with untouched(model):
                trained = model(x)
                _check_logits(trained, network, (len(x), classes), " in training")
                learning = [p for p in model.parameters() if p.requires_grad]
                if not learning:
                    raise BadInput(f"network {network} cannot learn: it has no parameters, or all are frozen")
                if not trained.requires_grad:
                    raise BadInput(
                        f"network {network} cannot learn: its logits are cut off from its parameters, by a"
                        " detach() or no_grad() in its forward pass"
                    )
                torch.autograd.grad(F.cross_entropy(trained.float(), y), learning, allow_unused=True)
    except BadInput:
        raise
    except Exception as error:  # whatever a user's own code raises
        if out_of_memory(error):
            raise
        if "view size is not compatible" not in str(error) or is_contiguous(model):
            raise BadInput(f"network {network} {_why(error, model, x)}") from error
        hook, layout = contiguous_(model), torch.contiguous_format
        try:
            fits(model, network, classes, shape, batch=batch, layout=layout, autocast=autocast)
        except BadInput:
            hook.remove()
            raise
        warnings.warn(
            "the network calls view() on feature maps: it runs in the contiguous layout, which is slower here"
            " than channels_last; flatten(1) or reshape() take both",
            stacklevel=1,
        )
        return
    if logits.is_meta:  # it has no values
        return
    sums = logits.float().sum(1)
    if (logits >= 0).all() and torch.allclose(sums, torch.ones_like(sums), atol=1e-2):
        warnings.warn(
            "the network ends in a softmax, and the loss applies its own: leave it out, it slows learning",
            stacklevel=1,
        )


def _why(error, model, x):
    """Why a network cannot be trained on images x, in words."""
    shape = tuple(x.shape[1:])
    conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    formats = {p.dtype for p in model.parameters() if p.is_floating_point()} - {x.dtype}
    if conv is not None and conv.in_channels != shape[0]:
        return f"takes {conv.in_channels} input channels, but the images have {shape[0]} (C, H, W = {shape})"
    if formats:
        return (
            f"has parameters in {formats.pop()}, and the images are in {x.dtype}: call .float() on it"
            " (precision=fp64 trains in 64 bits)"
        )
    if "more than 1 value per channel" in str(error):
        return (
            f"has a BatchNorm on maps of 1 x 1 pixel, and its batch (with several processes: its share) is"
            f" {len(x)} image: take a larger batch_size"
        )
    return f"cannot take images of C, H, W = {shape}: {_say(error)}"


def _check_logits(out, network, wanted, mode):
    """Raise `BadInput` unless a network's output has the shape of logits: (N, classes)."""
    if isinstance(out, torch.Tensor) and tuple(out.shape) == wanted:
        return
    got, hint = type(out).__name__, ": return these alone (heads of torchvision: aux_logits=False)"
    if isinstance(out, torch.Tensor):
        got, hint = tuple(out.shape), ""
    said = f"network {network} returned {got} for {wanted[0]} images{mode}"
    raise BadInput(f"{said}, expected logits of shape {wanted}{hint}")


def in_training(model: nn.Module) -> nn.Module:
    """Put a model into training mode, but for layers left in eval.

    A network that is in eval mode as a whole comes along as a whole.

    >>> [m.training for m in in_training(nn.Sequential(nn.BatchNorm2d(1).eval(), nn.Dropout()))]
    [False, True]
    """
    return model if model.training else model.train()


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Hold `model` in training mode; afterwards modes and buffers are as they were.

    >>> net = nn.BatchNorm2d(1).eval()
    >>> with untouched(net):
    ...     y = net(torch.ones(2, 1, 4, 4))
    >>> net.training, net.running_mean
    (False, tensor([0.]))
    """
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    modes = {m: m.training for m in model.modules()}
    in_training(model)
    try:
        yield
    finally:
        for m, was in modes.items():
            m.training = was
        with torch.no_grad():
            for name, b in model.named_buffers():
                b.copy_(buffers[name])


def find(network: str, what: str = "network") -> Callable:
    """Return the function or class behind an import path.

    `"module:function"` or `"file.py:function"`. what: it is called so in errors.

    >>> find("effilib.models:resnet") is resnet
    True
    """
    place, _, name = network.rpartition(":")
    try:
        module = (user_files.load if place.endswith(".py") else importlib.import_module)(place)
    except Exception as error:  # a user's file can fail in any way
        raise BadInput(f"{what} {network}: cannot import {place} ({_say(error)})") from error
    functions = [n for n, f in vars(module).items() if callable(f) and not n.startswith("_")]
    return getattr(module, choose(f"{what} in {place}", name, functions))


def _say(error):
    """The error's first line; its kind where it has no words."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _parameters(function):
    try:
        return inspect.signature(function).parameters
    except ValueError:
        return {}


def _channels(function, channels):
    """The keyword by which a user's function takes the number of input channels, if it has one."""
    names = [n for n in ("channels", "in_channels", "in_chans") if n in _parameters(function)]
    return {names[0]: channels} if names else {}


def _call(function, classes, settings):
    parameters = _parameters(function)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if "classes" in parameters:
        return function(classes=classes, **settings)
    if "num_classes" in parameters or takes_any:
        return function(num_classes=classes, **settings)
    return function(classes, **settings)


def kernels(model: nn.Module) -> dict:
    """Return every convolution's kernel size, stride and padding by name.

    Plain values: what kernel rescaling changes.

    >>> kernels(nn.Sequential(nn.Conv2d(3, 8, 5, stride=2, padding=2)))
    {'0': [[5, 5], [2, 2], [2, 2]]}
    """
    return {
        name: [
            list(m.kernel_size),
            list(m.stride),
            m.padding if isinstance(m.padding, str) else list(m.padding),
        ]
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d)
    }


def set_kernel_(conv: nn.Conv2d, size: int, stride: int, padding: int) -> None:
    """Give a convolution another kernel size, stride and padding, in place; a weight of that size is the
    caller's affair.

    >>> conv = nn.Conv2d(1, 1, 3, padding=1)
    >>> set_kernel_(conv, (5, 5), (1, 1), (2, 2))
    >>> conv.kernel_size, conv.padding
    ((5, 5), (2, 2))
    """
    conv.kernel_size, conv.stride = tuple(size), tuple(stride)
    conv.padding = padding if isinstance(padding, str) else tuple(padding)
    # what PyTorch works out in the constructor, for padding other than by zeros
    twin = nn.Conv2d(1, 1, conv.kernel_size, conv.stride, conv.padding, conv.dilation, device="meta")
    conv._reversed_padding_repeated_twice = twin._reversed_padding_repeated_twice


def describe(model: nn.Module) -> dict:
    """Return the present structure of one of our networks, JSON-able.

    Widths, depths and kernel sizes; {} for a user's own network.

    >>> describe(build("convnet", 10, (1, 8, 8), widths=(4, 8))), describe(nn.Linear(1, 1))
    ({'widths': [[4], [8]], 'bn': True}, {})
    """
    return model.settings() if isinstance(model, ResNet | VGG | Groups) else {}


@torch.no_grad()
def reestimate_(model: nn.Module, batches: Iterable, *, training: bool = False) -> int:
    """Estimate BatchNorm's running statistics anew, in place.

    They become the plain average over `batches` of images (N, C, H, W). Returns how many layers: those that
    their user left in eval mode keep theirs.

    All other layers compute as in eval mode (exact products, no dropout), or with `training` as in training.

    >>> net = nn.Sequential(nn.BatchNorm2d(1))
    >>> reestimate_(net, [torch.full((2, 1, 4, 4), v) for v in (1.0, 3.0)])
    1
    >>> net[0].running_mean
    tensor([2.])
    """
    norms = [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm)
        and m.running_mean is not None
        and (m.training or not model.training)  # else its user holds the statistics
    ]
    if norms:
        modes, momenta = {m: m.training for m in model.modules()}, [m.momentum for m in norms]
        try:
            with evaluating(model):
                if training:
                    for m, was in modes.items():
                        m.training = was
                    in_training(model)
                for m in norms:
                    m.training = True
                    m.reset_running_stats()
                    m.momentum = None  # a plain average
                for x in batches:
                    model(x)
        finally:
            for m, momentum in zip(norms, momenta, strict=True):
                m.momentum = momentum
    return len(norms)
