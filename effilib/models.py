"""Build networks by name, ours or a user's, and ask what they take: shapes, channels, memory formats.

A user's own network comes by its import path: `"torchvision.models:resnet18"` or `"mine.py:net"`.
"""

import contextlib
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
from effilib.networks import NETWORKS, VGG, Groups, ResNet, initialize_
from effilib.seeds import seeded

__all__ = [
    "build",
    "check_name",
    "describe",
    "find",
    "fits",
    "in_training",
    "kernels",
    "reestimate_",
    "set_kernel_",
    "untouched",
]


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

    >>> find("effilib.networks:resnet") is NETWORKS["resnet"]
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
