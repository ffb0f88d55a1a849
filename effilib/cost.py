"""What training costs, counted and measured: FLOPs of a step as really executed, memory, and a latency table
per layer.

FLOPs are 2 x multiply-accumulates of the products (convolutions, matrix products, integer ones too) that the
step really executes, forward and backward, whatever a method adds or leaves out. Element-wise work counts 0,
so a FLOP ratio is a prediction, never a result: beside it always stands the measured one.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from effilib.clock import interleaved
from effilib.convolution import probe
from effilib.errors import BadInput

__all__ = [
    "PASSES", "Conv", "Counter", "channel_block", "conv_passes", "conv_seconds", "count_flops",
    "latency_table", "layers", "parameters", "size_bytes", "step_flops",
]  # fmt: skip

aten = torch.ops.aten


def channel_block(multiple: int | str, device: torch.device) -> int:
    """Return in which multiples a device's convolutions work: what was asked for, or its own with "auto".

    >>> channel_block("auto", torch.device("cpu")), channel_block(4, torch.device("cpu"))
    (16, 4)
    """
    return multiple if isinstance(multiple, int) else {"cpu": 16, "cuda": 8}[device.type]


# What PyTorch's counter has no formula for, or a wrong one: (shapes of tensors, other arguments) -> FLOPs


def _int_mm_flops(a_shape, b_shape, *args, **kwargs):
    (m, k), (_, n) = a_shape, b_shape
    return 2 * m * k * n


def _conv_backward_flops(
    dy, x, w, bias, stride, padding, dilation, transposed, output_padding, groups, mask, out_shape=None
):
    """dX and dW cost what the forward pass does; PyTorch's own formula forgets the groups in dW."""
    pixels = math.prod((x if transposed else dy)[2:])
    return 2 * x[0] * pixels * math.prod(w) * (mask[0] + mask[1])


def _attention_flops(q, k, v, *args, **kwargs):
    return sdpa_flop_count(q, k, v)


def _attention_backward_flops(dy, q, k, v, *args, **kwargs):
    return sdpa_backward_flop_count(dy, q, k, v)


def _multi_head_flops(q, k, v, width, *args, **kwargs):
    """Attention as a network in eval mode computes it: projections in and out, scores, weighted values."""
    (n, queries, _), keys = q, k[1]
    return 2 * n * width * (2 * queries * width + 2 * keys * width + 2 * queries * keys)


def _encoder_flops(x, width, heads, *args, **kwargs):
    feed_forward = math.prod(args[11]) + math.prod(args[13])
    return _multi_head_flops(x, x, x, width) + 2 * x[0] * x[1] * feed_forward


def _lstm_flops(x, from_input, from_state, *args, **kwargs):
    return 2 * math.prod(x[:2]) * (math.prod(from_input) + math.prod(from_state))


def _lstm_backward_flops(x, from_input, from_state, *args, **kwargs):
    return 2 * _lstm_flops(x, from_input, from_state)


def _vector_flops(a, b, *args, **kwargs):
    return 2 * math.prod(a)


FORMULAS = {
    aten._int_mm: _int_mm_flops,
    aten.convolution_backward: _conv_backward_flops,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    aten._native_multi_head_attention: _multi_head_flops,
    aten._transformer_encoder_layer_fwd: _encoder_flops,
    aten.mkldnn_rnn_layer: _lstm_flops,
    aten.mkldnn_rnn_layer_backward: _lstm_backward_flops,
    aten.mv: _vector_flops,
    aten.dot: _vector_flops,
    aten.addmv: lambda y, a, x, **kwargs: _vector_flops(a, x),
}


class Counter:
    """Count what runs in a `with`: `flops`, and `saved_bytes` of tensors kept for backward.

    >>> w = torch.ones(3, 4, requires_grad=True)
    >>> with Counter() as count:
    ...     F.linear(torch.ones(2, 4), w).sum().backward()
    >>> count.flops  # 2 x 2 x 4 x 3 forward, and as many for dW
    96
    """

    def __init__(self, parameters: Iterable[torch.Tensor] = ()):
        self.own = {p.untyped_storage()._cdata for p in parameters}  # held anyway, not saved for backward
        self.storages = {}  # by their own address: on the meta device they have no data's
        self.mode = FlopCounterMode(display=False, custom_mapping=FORMULAS)

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.own:
            self.storages[storage._cdata] = storage.nbytes()
        return tensor

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor))
        self.stack.enter_context(self.mode)
        return self

    def __exit__(self, *error):
        self.stack.close()

    @property
    def flops(self) -> int:
        """FLOPs of the products that ran inside."""
        return self.mode.get_total_flops()

    @property
    def saved_bytes(self) -> int:
        """Bytes of the tensors that were kept for backward, each storage once."""
        return sum(self.storages.values())


def count_flops(function: Callable[[], object]) -> int:
    """Return the FLOPs that calling `function()` executes; works on the meta device too.

    >>> count_flops(lambda: torch.ones(2, 3) @ torch.ones(3, 4))
    48
    """
    with Counter() as count:
        function()
    return count.flops


def step_flops(model: nn.Module, shape: tuple[int, int, int], batch_size: int = 1) -> int:
    """Return the FLOPs of one forward and backward pass of `model`.

    shape: (C, H, W) of the images, which are empty: on the meta device nothing is computed. They need no
    gradient, so the first layer's dX is not in it, as in training. Of a forward pass that looks at numbers,
    which the meta device has not, that of zeros is counted.

    >>> step_flops(nn.Conv2d(1, 2, 3), (1, 5, 5))  # 324 forward, 324 for dW
    648
    """
    p = next(model.parameters())
    x = torch.zeros(batch_size, *shape, device=p.device, dtype=p.dtype)
    try:
        return count_flops(lambda: model(x).sum().backward())
    except RuntimeError:
        if not p.is_meta:
            raise
    twin = copy.deepcopy(model).to_empty(device="cpu")
    with torch.no_grad():
        for t in (*twin.parameters(), *twin.buffers()):
            t.zero_()
    return step_flops(twin, shape, batch_size)


def parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters.

    >>> parameters(nn.Linear(3, 2))
    8
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def size_bytes(tensors: Iterable[object]) -> int:
    """Return the bytes of the given tensors.

    >>> size_bytes([torch.zeros(2, 3), torch.zeros(4, dtype=torch.int8)])
    28
    """
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


@dataclass(frozen=True, kw_only=True)
class Conv:
    """A convolution as it stands in a network: N images, C -> O channels, H x W pixels in, k x k filter.

    >>> conv = Conv(N=1, C=3, O=8, H=32, W=32, stride=2)
    >>> conv.out_size, conv.flops
    ((16, 16), 110592)
    """

    N: int
    C: int
    O: int  # noqa: E741  (the literature's symbol)
    H: int
    W: int
    k: int = 3
    stride: int = 1
    padding: int | None = None
    groups: int = 1

    @property
    def pad(self) -> int:
        """The padding; where none is given, half of the filter."""
        return self.k // 2 if self.padding is None else self.padding

    @property
    def out_size(self) -> tuple[int, int]:
        """(H', W') of the output."""
        return tuple((s + 2 * self.pad - self.k) // self.stride + 1 for s in (self.H, self.W))

    @property
    def flops(self) -> int:
        """2 N O H' W' (C / groups) k^2: of the forward pass, and of dX and of dW alike."""
        height, width = self.out_size
        return 2 * self.N * self.O * height * width * (self.C // self.groups) * self.k**2


PASSES = ("forward", "dX", "dW")


def conv_passes(
    conv: Conv,
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    device: torch.device | str = "cpu",
) -> dict[str, Callable[[], object]]:
    """Return a convolution's three products of a training step, to be timed.

    `convolution_backward` with its output mask computes only the gradient that is asked for.

    >>> passes = conv_passes(Conv(N=2, C=3, O=4, H=6, W=6))
    >>> passes["forward"]().shape, passes["dW"]()[1].shape
    (torch.Size([2, 4, 6, 6]), torch.Size([4, 3, 3, 3]))
    """
    g = torch.Generator().manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def tensor(*shape):
        return torch.randn(*shape, generator=g).to(device, dtype).contiguous(memory_format=layout)

    x, w = tensor(conv.N, conv.C, conv.H, conv.W), tensor(conv.O, conv.C // conv.groups, conv.k, conv.k)
    dy = tensor(conv.N, conv.O, *conv.out_size)
    geometry = [conv.stride] * 2, [conv.pad] * 2, [1, 1]

    def backward(*mask):
        return aten.convolution_backward(dy, x, w, None, *geometry, False, [0, 0], conv.groups, mask)

    return {
        "forward": lambda: aten.convolution(x, w, None, *geometry, False, [0, 0], conv.groups),
        "dX": lambda: backward(True, False, False),
        "dW": lambda: backward(False, True, False),
    }


def conv_seconds(
    convs: dict[str, Conv | tuple[Conv, torch.dtype, bool]],
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    device: torch.device | str = "cpu",
    repeats: int = 15,
    seconds: float | None = None,
) -> dict[tuple[str, str], list[float]]:
    """Time the passes of several convolutions, interleaved: (name, pass) -> list of seconds.

    convs: dict name -> `Conv`, or name -> (`Conv`, dtype, channels_last) where the formats differ.

    >>> times = conv_seconds({"small": Conv(N=1, C=2, O=2, H=4, W=4)}, repeats=3)
    >>> [(name, pass_, len(seconds)) for (name, pass_), seconds in times.items()]
    [('small', 'forward', 3), ('small', 'dX', 3), ('small', 'dW', 3)]
    """
    functions = {}
    for name, conv in convs.items():
        c, d, last = conv if isinstance(conv, tuple) else (conv, dtype, channels_last)
        for pass_, function in conv_passes(c, dtype=d, channels_last=last, device=device).items():
            functions[name, pass_] = function
    return interleaved(functions, repeats=repeats, device=device, seconds=seconds)


def layers(model: nn.Module, x: torch.Tensor) -> dict[str, Conv]:
    """Return a model's convolutions by name, with the sizes they meet.

    x: images (N, C, H, W). Raises `BadInput` for a convolution that `Conv` cannot describe: not square, or
    dilated.

    >>> found = layers(build("convnet", 10, (3, 32, 32), widths=(8, 16)), torch.zeros(1, 3, 32, 32))
    >>> {name: (conv.C, conv.O, conv.H) for name, conv in found.items()}
    {'features.0': (3, 8, 32), 'features.4': (8, 16, 16)}
    """
    found, hooks = {}, []

    def note(name):
        def hook(module, inputs, output):
            n, c, height, width = inputs[0].shape
            pad = {"same": [k // 2 for k in module.kernel_size], "valid": (0, 0)}.get(
                module.padding, module.padding
            )
            if any(a != b for a, b in (module.kernel_size, module.stride, pad)) or module.dilation != (1, 1):
                raise BadInput(
                    f"convolution {name} is not square or is dilated: its cost cannot be tabulated ({module})"
                )
            found[name] = Conv(
                N=n, C=c, O=module.out_channels, H=height, W=width, k=module.kernel_size[0],
                stride=module.stride[0], padding=pad[0], groups=module.groups,
            )  # fmt: skip

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(note(name)))
    probe(model, x, hooks)
    return found


def latency_table(
    model: nn.Module,
    x: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    repeats: int = 15,
    seconds: float | None = None,
) -> list[dict]:
    """Return each convolution's milliseconds in place, medians of interleaved rounds.

    Rows (layer, pass, flops, ms, gflops_per_s). The first convolution's dX is left out: training never
    computes it.

    >>> net = build("convnet", 10, (3, 8, 8), widths=(8, 16))
    >>> rows = latency_table(net, torch.zeros(1, 3, 8, 8), repeats=3)
    >>> [row["layer"][-1] + " " + row["pass"] for row in rows]
    ['0 forward', '0 dW', '4 forward', '4 dX', '4 dW']
    """
    convs = layers(model, x)
    times = conv_seconds(
        convs, dtype=dtype, channels_last=channels_last, device=x.device, repeats=repeats, seconds=seconds
    )
    first = next(iter(convs), None)
    rows = []
    for (name, pass_), samples in times.items():
        if (name, pass_) == (first, "dX"):
            continue
        median = sorted(samples)[len(samples) // 2]
        flops = convs[name].flops
        rows.append(
            {
                "layer": name,
                "pass": pass_,
                "flops": flops,
                "ms": 1e3 * median,
                "gflops_per_s": flops / median / 1e9,
            }
        )
    return rows
