"""What the layers of a network see, found by running it on a few images."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from effilib.convolution import probe
from effilib.errors import BadInput, NoEffect

__all__ = ["cut_patches", "first_convolution", "followers"]


def cut_patches(x: torch.Tensor, conv: nn.Conv2d, count: int, generator: torch.Generator) -> torch.Tensor:
    """Return at most `count` random patches that `conv` sees in x.

    x: (N, C, H, W). Returns (M, C / groups * kh * kw). They lie where the convolution puts its filters,
    padding included; the channels of each group are patches of their own.

    >>> cut_patches(torch.rand(2, 3, 8, 8), nn.Conv2d(3, 4, 3), 10, torch.Generator()).shape
    torch.Size([10, 27])
    """
    (kh, kw), (dh, dw), (sh, sw) = conv.kernel_size, conv.dilation, conv.stride
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = nn.functional.pad(x, (left, right, top, bottom), mode=mode)
    n, c, height, width = x.shape
    rows, columns = (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1
    places = n * rows * columns
    m = min(places, -(-count // conv.groups))
    if places < 8 * m:
        place = torch.randperm(places, generator=generator)[:m]
    else:  # few of many: drawing with replacement spares a permutation of all places
        place = torch.randint(places, (m,), generator=generator)
    place = place.to(x.device).view(-1, 1, 1, 1)
    i, row, column = place // (rows * columns), place // columns % rows * sh, place % columns * sw
    channel = torch.arange(c, device=x.device).view(-1, 1, 1)
    down, along = torch.arange(kh, device=x.device).view(-1, 1) * dh, torch.arange(kw, device=x.device) * dw
    cut = x[i, channel, row + down, column + along]  # (M, C, kh, kw)
    return cut.reshape(m * conv.groups, -1)[:count]


def followers(model: nn.Module, x: torch.Tensor) -> dict[str, str]:
    """Return {convolution: the normalisation behind it} by name.

    Where one takes just what the other gives, nothing in between. x: a few images (N, C, H, W).

    >>> followers(build("convnet", 4, (1, 8, 8), widths=(4, 8)), torch.zeros(2, 1, 8, 8))
    {'features.0': 'features.1', 'features.4': 'features.5'}
    """
    outputs, found, hooks, names = {}, {}, [], {m: n for n, m in model.named_modules()}

    def after(conv, inputs, output):
        outputs[id(output)] = (output, output._version, names[conv])  # held, so that no other has its id

    def before(norm, inputs):
        x = inputs[0]
        if id(x) in outputs and x._version == outputs[id(x)][1]:  # nothing in place came between
            found[outputs[id(x)][2]] = names[norm]

    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            hooks.append(m.register_forward_hook(after))
        elif isinstance(m, _NormBase):
            hooks.append(m.register_forward_pre_hook(before))
    probe(model, x, hooks)
    return found


def first_convolution(model: nn.Module, shape: tuple[int, int, int]) -> tuple[str, nn.Conv2d]:
    """Return (name, layer) of the convolution that reads the image.

    Found by a forward pass on zeros of `shape` (C, H, W). Raises `NoEffect` where there is none, `BadInput`
    where the first one does not read the image itself.

    >>> first_convolution(build("convnet", 4, (1, 8, 8), widths=(4, 8)), (1, 8, 8))[0]
    'features.0'
    """
    order, hooks, like = [], [], next(model.parameters())
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d):
            hooks.append(m.register_forward_pre_hook(lambda m, inputs, name=name: order.append((name, m))))
    probe(model, torch.zeros(2, *shape, device=like.device, dtype=like.dtype), hooks)
    if not order:
        raise NoEffect(f"{type(model).__name__} has no convolution that reads the image")
    name, first = order[0]
    if first.in_channels != shape[0] or first.groups != 1:
        raise BadInput(
            f"the first convolution, {name}, does not read the image of {shape[0]} channels: {first}"
        )
    return name, first
