"""One product whose three parts can each be replaced: forward, dX and dW of a convolution or a linear layer.

    y = approx_conv2d(x, w, padding=1, dw=my_dw)              # forward and dX exact, dW by my_dw
    convert_(layers(model), {name: Approximation(...)}, owner) # in place, exact in eval mode

Chapters 3.3 to 4.2 approximate what a convolution computes: fewer bits, fewer channels, a sparser gradient.
All of them are an `Approximation`: up to six functions, each of which replaces one step of the product. Two
methods on the same layer compose as long as they do not replace the same part. What is not replaced is
computed as PyTorch computes it, and only where somebody asks for it."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from effilib.errors import BadInput, NoEffect

__all__ = [
    "EXACT",
    "ApproxConv2d",
    "ApproxLinear",
    "Approximation",
    "Convolution",
    "MatrixProduct",
    "approx_conv2d",
    "approx_linear",
    "contiguous_",
    "convert_",
    "dw_of_outputs",
    "dw_of_samples",
    "dx_of_outputs",
    "dx_of_samples",
    "evaluating",
    "guard_",
    "is_contiguous",
    "layers",
    "merged",
    "on_device",
    "probe",
    "put",
    "revert_",
    "take",
    "weigh",
]

aten = torch.ops.aten


# The exact products


@dataclass(frozen=True)
class Convolution:
    """Compute a convolution y = x * w, dX and dW.

    x: (N, C, H, W), w: (O, C / groups, k, k), y and dy: (N, O, H', W').

    >>> product = Convolution(padding=(1, 1))
    >>> x, w = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
    >>> y = product.forward(x, w)
    >>> dx, dw = product.backward(torch.ones_like(y), x, w)
    >>> y.shape, dx.shape == x.shape, dw.shape == w.shape
    (torch.Size([2, 4, 5, 5]), True, True)
    """

    stride: tuple = (1, 1)
    padding: tuple = (0, 0)
    dilation: tuple = (1, 1)
    groups: int = 1

    def _settings(self):
        return list(self.stride), list(self.padding), list(self.dilation), False, [0, 0], self.groups

    def forward(self, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x * w, with the bias (O,) if there is one."""
        return aten.convolution(*self._guarded(x, w), bias, *self._settings())

    def backward(
        self, dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, mask: tuple[bool, bool] = (True, True)
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return (dX, dW), None where the mask says so.

        Of x (of w) only the shape is read where dW (dX) is not asked for.
        """
        x, w = self._guarded(x, w)
        return aten.convolution_backward(dy, x, w, None, *self._settings(), [*mask, False])[:2]

    def _guarded(self, x, w):
        """x and w, out of the kernel from which `guard_` keeps layers: a sample may have few channels."""
        small = x.shape[1] < BLOCK and w.shape[2:] == (1, 1) and self.stride != (1, 1)
        return (_plainly(x), _plainly(w)) if small and x.device.type == "cpu" else (x, w)


@dataclass(frozen=True)
class MatrixProduct:
    """Compute what a linear layer does, y = x w^T.

    x: (N, C), w: (O, C), y and dy: (N, O).

    >>> x, w = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
    >>> MatrixProduct().forward(x, w), MatrixProduct().backward(torch.ones(1, 1), x, w)
    (tensor([[11.]]), (tensor([[3., 4.]]), tensor([[1., 2.]])))
    """

    groups: int = 1

    def forward(self, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x w^T, with the bias (O,) if there is one."""
        return F.linear(x, w, bias)

    def backward(
        self, dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, mask: tuple[bool, bool] = (True, True)
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return (dX, dW), None where the mask says so."""
        return dy @ w if mask[0] else None, dy.T @ x if mask[1] else None


# Parts of them: of the operands only some slices take part. Index 0 of x and dy is the sample, index 1 the
# channel; w is (O, C, ...)


def take(t: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    """Return slices of t along dim 0 or 1.

    index: (k,); or along dim 1 (k / b, b), whose rows are blocks of b neighbouring channels, each from a
    multiple of b on: they are copied as a whole, which is several times as fast.

    >>> take(torch.tensor([[1, 2, 3], [4, 5, 6]]), 1, torch.tensor([2, 0])).tolist()
    [[3, 1], [6, 4]]
    >>> take(torch.tensor([[1, 2, 3, 4]]), 1, torch.tensor([[2, 3]])).tolist()
    [[3, 4]]
    """
    last = _channels_last(t)
    rows = t.permute(0, 2, 3, 1) if last else t  # (N, H, W, C), as it lies in memory
    if index.dim() == 2:
        axis, b = 3 if last else 1, index.shape[1]
        part = rows.unflatten(axis, (-1, b)).index_select(axis, index[:, 0] // b).flatten(axis, axis + 1)
    elif dim == 0 or (t.dim() == 4 and not last):
        part = rows.index_select(dim, index)
    else:
        part = _columns(rows, index)
    return part.permute(0, 3, 1, 2) if last else part


def put(t: torch.Tensor, dim: int, index: torch.Tensor, size: int) -> torch.Tensor:
    """Return what `take` took back in its place, and 0 elsewhere.

    A tensor with `size` slices along dim, t in the slices `index`, no two of which are alike.

    >>> put(torch.tensor([[3, 1]]), 1, torch.tensor([2, 0]), size=4).tolist()
    [[1, 0, 3, 0]]
    """
    last = _channels_last(t)
    rows = t.permute(0, 2, 3, 1) if last else t  # (N, H, W, k)
    axis = 3 if last and dim else dim
    whole = rows.new_zeros([*rows.shape[:axis], size, *rows.shape[axis + 1 :]])
    if index.dim() == 2 and t.device.type == "cpu":  # one copy a block, of whole rows
        for first, part in zip(index[:, 0].tolist(), rows.split(index.shape[1], axis), strict=True):
            whole.narrow(axis, first, index.shape[1]).copy_(part)
    elif last and dim and t.dtype == torch.bfloat16 and t.device.type == "cpu":
        # a product with 0 and 1, as exact as a scatter and faster
        whole = rows @ F.one_hot(index, size).to(t.dtype)
    elif last and dim:
        index = index.flatten().expand(rows.shape)
        whole.scatter_(3, index, rows)
    else:
        whole.index_copy_(axis, index.flatten(), rows)
    return whole.permute(0, 3, 1, 2) if last else whole


def _channels_last(t):
    return t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def _columns(rows, index):
    """(..., C) -> (..., k). `gather` is several times as fast as `index_select` along the last dimension on a
    CPU.
    """
    flat = rows.reshape(-1, rows.shape[-1])
    return flat.gather(1, index.expand(len(flat), -1)).view(*rows.shape[:-1], len(index))


def weigh(t: torch.Tensor, dim: int, scale: torch.Tensor | None) -> torch.Tensor:
    """Return t with slice i along dim multiplied by scale[i].

    scale: a vector, a number for all slices, or None (1).

    >>> weigh(torch.ones(2, 2), 1, torch.tensor([1.0, 5.0])).tolist()
    [[1.0, 5.0], [1.0, 5.0]]
    """
    if isinstance(scale, torch.Tensor):  # in the scale's own precision, rounded once
        return (t * scale.view([-1 if d == dim else 1 for d in range(t.dim())])).to(t.dtype)
    return t if scale is None else t * scale


def dx_of_outputs(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    product: Convolution,
    index: torch.Tensor,
    scale: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Return dX from the output channels `index` only: sum_o scale_o dX^(o).

    >>> dy, x, w = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.ones(2, 3), torch.eye(3)
    >>> dx_of_outputs(dy, x, w, MatrixProduct(), torch.tensor([0, 2])).tolist()
    [[1.0, 0.0, 3.0], [4.0, 0.0, 6.0]]
    """
    w = weigh(take(w, 0, index), 0, scale)  # w is smaller than dy
    return product.backward(take(dy, 1, index), x, w, (True, False))[0]


def dw_of_outputs(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    product: Convolution,
    index: torch.Tensor,
    scale: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Return dW of the output channels `index`, weighed, else 0.

    >>> dy, x, w = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.ones(2, 3), torch.eye(3)
    >>> dw_of_outputs(dy, x, w, MatrixProduct(), torch.tensor([0, 2])).tolist()
    [[5.0, 5.0, 5.0], [0.0, 0.0, 0.0], [9.0, 9.0, 9.0]]
    """
    part = product.backward(take(dy, 1, index), x, take(w, 0, index), (False, True))[1]
    return put(weigh(part, 0, scale), 0, index, len(w))


def dx_of_samples(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    product: Convolution,
    index: torch.Tensor,
    scale: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Return dX of the samples `index`, weighed, else 0.

    >>> dy, x, w = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.ones(2, 3), torch.eye(3)
    >>> dx_of_samples(dy, x, w, MatrixProduct(), torch.tensor([1])).tolist()
    [[0.0, 0.0, 0.0], [4.0, 5.0, 6.0]]
    """
    part = product.backward(take(dy, 0, index), take(x, 0, index), w, (True, False))[0]
    return put(weigh(part, 0, scale), 0, index, len(x))


def dw_of_samples(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    product: Convolution,
    index: torch.Tensor,
    scale: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Return dW from the samples `index` only: sum_n scale_n dW^(n).

    >>> dy, x, w = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.ones(2, 3), torch.eye(3)
    >>> dw_of_samples(dy, x, w, MatrixProduct(), torch.tensor([1]), scale=2).tolist()
    [[8.0, 8.0, 8.0], [10.0, 10.0, 10.0], [12.0, 12.0, 12.0]]
    """
    one = not isinstance(scale, torch.Tensor)  # for all: then dW, which is smaller, is weighed
    dy = take(dy, 0, index) if one else weigh(take(dy, 0, index), 0, scale)
    part = product.backward(dy, take(x, 0, index), w, (False, True))[1]
    return weigh(part, 0, scale) if one else part


# What may be replaced


@dataclass(frozen=True, kw_only=True)
class Approximation:
    """Replace parts of a product; None is exact.

    sample: (x, w) -> None or (index, scale): only these input channels (index as in `take`) take part, in all
    three products; the others get a dX and dW of 0. The channel's contribution is multiplied by its scale (a
    vector, a number or None).
    operands: (x, w) -> (x, w) as all three products see them, e.g. rounded; gradients pass straight through.
    They may be trees of tensors, if forward, dx and dw are replaced by what understands them.
    forward: (x, w, product) -> y. output_gradient: dy -> dy as dX and dW see it (the bias sees the exact
    one). dx: (dy, x, w, product) -> dX. dw: (dy, x, w, product) -> dW, or None: no gradient, the optimizer
    skips the parameter. `product` is a `Convolution` or a `MatrixProduct`.

    >>> halved = Approximation(output_gradient=lambda dy: 0.5 * dy)
    >>> none = Approximation(dw=lambda dy, x, w, product: None)
    >>> (halved | none).dw is none.dw
    True
    >>> halved | halved
    Traceback (most recent call last):
    effilib.errors.BadInput: two methods replace the same part of a layer's product (output_gradient): ...
    """

    sample: Callable | None = None
    operands: Callable | None = None
    forward: Callable | None = None
    output_gradient: Callable | None = None
    dx: Callable | None = None
    dw: Callable | None = None

    def __or__(self, other):
        """Both at once. Raises `BadInput` where both replace the same part."""
        given = {f.name: getattr(other, f.name) for f in fields(self) if getattr(other, f.name)}
        both = [name for name in given if getattr(self, name)]
        if both:
            raise BadInput(
                f"two methods replace the same part of a layer's product ({', '.join(both)}): "
                "they cannot be combined"
            )
        return replace(self, **given)


EXACT = Approximation()


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias, product, a):
        with torch.autocast(
            x.device.type, enabled=False
        ):  # operands have been cast; a replacement's own numbers are its own affair
            sampled = a.sample(x, w) if a.sample else None
            ctx.channels, ctx.dtypes = x.shape[1], (x.dtype, w.dtype, None if bias is None else bias.dtype)
            if sampled is not None:
                index, scale = sampled
                x, w = take(x, 1, index), weigh(take(w, 1, index), 1, scale)
            if a.operands:
                x, w = a.operands(x, w)
            if a.forward:
                y = a.forward(x, w, product)
                y = y if bias is None else y + bias.view(-1, *[1] * (y.dim() - 2)).to(y.dtype)
            else:
                y = product.forward(x, w, bias)
        index, scale = sampled or (None, None)
        ctx.number = None if isinstance(scale, torch.Tensor) else scale
        leaves, ctx.tree = tree_flatten((x, w)) if a.operands else ((x, w), None)
        ctx.save_for_backward(index, None if ctx.number is not None else scale, *leaves)
        ctx.product, ctx.a = product, a
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        a, product = ctx.a, ctx.product
        index, scale, *leaves = ctx.saved_tensors
        x, w = tree_unflatten(leaves, ctx.tree) if ctx.tree else leaves
        scale = scale if ctx.number is None else ctx.number
        wants_x, wants_w, wants_b = ctx.needs_input_grad[:3]
        dx = dw = None
        with torch.autocast(dy.device.type, enabled=False):
            db = dy.sum([d for d in range(dy.dim()) if d != 1]) if wants_b else None
            if a.output_gradient and (wants_x or wants_w):
                dy = a.output_gradient(dy)
            exact = (wants_x and not a.dx, wants_w and not a.dw)
            if any(exact):
                dx, dw = product.backward(dy, x, w, exact)
            if wants_x and a.dx:
                dx = a.dx(dy, x, w, product)
            if wants_w and a.dw:
                dw = a.dw(dy, x, w, product)
            if index is not None:
                dx = None if dx is None else put(dx, 1, index, ctx.channels)
                dw = None if dw is None else put(weigh(dw, 1, scale), 1, index, ctx.channels)
        return (
            *(g if g is None else g.to(dtype) for g, dtype in zip((dx, dw, db), ctx.dtypes, strict=True)),
            None,
            None,
        )


def _apply(x, w, bias, product, a):
    if torch.is_autocast_enabled(x.device.type) and not (
        a.operands or a.forward
    ):  # as PyTorch's own layers do
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w, bias = (t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, w, bias))
    return _Product.apply(x, w, bias, product, a)


def approx_conv2d(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    approximation: Approximation = EXACT,
    **parts,
) -> torch.Tensor:
    """Compute `F.conv2d`, some parts of it replaced.

    As in `approx_conv2d(x, w, padding=1, dw=f)`; parts are named as in `Approximation`. x: (N, C, H, W), w:
    (O, C / groups, k, k) -> (N, O, H', W'). Without replacement it is bit-equal to `F.conv2d`, also under
    autocast. Only the gradients that are asked for are computed; it cannot be differentiated twice.

    >>> x, w = torch.ones(1, 1, 4, 4), torch.ones(2, 1, 3, 3, requires_grad=True)
    >>> y = approx_conv2d(x, w, padding=1, dw=lambda dy, x, w, product: torch.zeros_like(w))
    >>> y.sum().backward()
    >>> torch.equal(y, F.conv2d(x, w, padding=1)), w.grad.abs().sum().item()
    (True, 0.0)
    """
    pairs = (tuple(v) if isinstance(v, list | tuple) else (v, v) for v in (stride, padding, dilation))
    return _apply(x, w, bias, Convolution(*pairs, groups), approximation | Approximation(**parts))


def approx_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    approximation: Approximation = EXACT,
    **parts,
) -> torch.Tensor:
    """Compute `F.linear`, some parts of it replaced.

    x: (..., C), w: (O, C) -> (..., O).

    >>> x, w = torch.ones(2, 3), torch.ones(4, 3, requires_grad=True)
    >>> approx_linear(x, w, dw=lambda dy, x, w, product: 2 * product.backward(dy, x, w)[1]).sum().backward()
    >>> w.grad[0].tolist()  # twice the exact one
    [4.0, 4.0, 4.0]
    """
    y = _apply(x.reshape(-1, x.shape[-1]), w, bias, MatrixProduct(), approximation | Approximation(**parts))
    return y.view(*x.shape[:-1], len(w))


# Layers


class ApproxConv2d(nn.Conv2d):
    """Convolve with the `approximations` of its owners; exactly in eval mode.

    >>> net = build("convnet", 4, (1, 8, 8), widths=(4, 8))
    >>> zero = {"features.4": Approximation(output_gradient=torch.zeros_like)}
    >>> convert_(layers(net), zero, "me", "example")
    ['features.4']
    >>> type(net.features[4]).__name__
    'ApproxConv2d'
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        left, right, top, bottom = self._reversed_padding_repeated_twice  # "same" and "valid" in numbers
        padding = (top, left)
        if self.padding_mode != "zeros" or (left, top) != (right, bottom):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = F.pad(x, (left, right, top, bottom), mode=mode), 0
        y = approx_conv2d(
            x if x.dim() == 4 else x[None], self.weight, self.bias,
            stride=self.stride, padding=padding, dilation=self.dilation,
            groups=self.groups, approximation=merged(self),
        )  # fmt: skip
        return y if x.dim() == 4 else y[0]


class ApproxLinear(nn.Linear):
    """Multiply with the `approximations` of its owners; exactly in eval mode.

    >>> layer, x = ApproxLinear(3, 2), torch.ones(1, 3)
    >>> layer.approximations = {"me": Approximation(forward=lambda x, w, product: 0 * product.forward(x, w))}
    >>> torch.equal(layer.train()(x)[0], layer.bias), torch.equal(layer.eval()(x)[0], layer.bias)
    (True, False)
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (
            approx_linear(x, self.weight, self.bias, approximation=merged(self))
            if self.training
            else super().forward(x)
        )


APPROX = {nn.Conv2d: ApproxConv2d, nn.Linear: ApproxLinear}
PLAIN = {approx: plain for plain, approx in APPROX.items()}


def merged(layer: nn.Module) -> Approximation:
    """Return all approximations of a layer as one.

    >>> sign = Approximation(output_gradient=torch.sign)
    >>> rounded = Approximation(operands=lambda x, w: (x.round(), w.round()))
    >>> layer = ApproxLinear(3, 2)
    >>> layer.approximations = {"me": sign, "you": rounded}
    >>> merged(layer) == sign | rounded
    True
    """
    whole = EXACT
    for a in layer.approximations.values():
        whole = whole | a
    return whole


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold `model` in eval mode, then each layer in its own.

    >>> net = nn.Sequential(nn.BatchNorm2d(1).eval(), nn.Dropout())
    >>> with evaluating(net):
    ...     net[1].training
    False
    >>> net[0].training, net[1].training
    (False, True)
    """
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for m, was in modes.items():
            m.training = was


def probe(model: nn.Module, x: torch.Tensor, hooks: dict, grad: bool = False) -> None:
    """Run a model in eval mode for the sake of its hooks.

    They are removed, and the model is left as it was, whatever happens.

    >>> seen, net = [], nn.Sequential(nn.Dropout(), nn.Linear(2, 3))
    >>> hook = net[1].register_forward_hook(lambda m, inputs, output: seen.append(output.shape))
    >>> probe(net, torch.ones(1, 2), [hook])
    >>> seen, net.training
    ([torch.Size([1, 3])], True)
    """
    try:
        with evaluating(model), torch.set_grad_enabled(grad):
            model(x)
    finally:
        for h in hooks:
            h.remove()


def layers(model: nn.Module, x: torch.Tensor | None = None, *, linear: bool = False) -> dict[str, nn.Module]:
    """Return the layers that the papers approximate: name -> module, in order.

    Every convolution but the stem and the classifier.
    The stem is the convolution that sees the image; the classifier is the last layer with weights. x: a batch
    of images, by which the layers' true order and the stem are found (in eval mode, nothing is learned);
    without it the order in which the model holds them. linear: linear layers too. A class of the user's own
    that is derived from `nn.Conv2d` or `nn.Linear` stays as it is.

    >>> list(layers(build("vgg", 10, (3, 32, 32), widths=((8,), (16, 16)))))
    ['features.4', 'features.7']
    """
    kinds = (*APPROX, *PLAIN)
    named = {m: name for name, m in model.named_modules() if type(m) in kinds}
    order, stem = list(named), set()
    if x is not None:
        order, hooks = [], []

        def note(module, inputs, output):
            if module not in order:
                order.append(module)
                if not inputs[0].requires_grad:
                    stem.add(module)

        for m in named:
            hooks.append(m.register_forward_hook(note))
        frozen = [p for p in model.parameters() if not p.requires_grad]  # a frozen trunk is no stem
        try:
            for p in frozen:
                p.requires_grad_()
            probe(model, x, hooks, grad=True)
        finally:
            for p in frozen:
                p.requires_grad_(False)
    stem.update(order[:1])
    wanted = (nn.Conv2d, nn.Linear) if linear else nn.Conv2d
    # a linear layer in the first place is no stem: it holds most of a perceptron's work
    return {
        named[m]: m
        for m in order[:-1]
        if isinstance(m, wanted) and not (m in stem and isinstance(m, nn.Conv2d))
    }


def convert_(
    chosen: dict[str, nn.Module], approximations: dict | Approximation, owner: object, method: str
) -> list[str]:
    """Give layers their approximations, in place; return the names.

    Parameters, names and objects stay. chosen: dict name -> module, of `layers`. approximations: dict name ->
    `Approximation`; a layer without one stays. owner: whose they are, for `revert_`. Raises `NoEffect` if no
    layer gets one, `BadInput` where two owners replace the same part.

    >>> net = build("convnet", 4, (1, 8, 8), widths=(4, 8))
    >>> none = Approximation(dw=lambda dy, x, w, product: torch.zeros_like(w))
    >>> convert_(layers(net), {"features.4": none}, "me", "example")
    ['features.4']
    >>> net(torch.rand(2, 1, 8, 8)).sum().backward()
    >>> net.features[4].weight.grad.abs().sum().item()
    0.0
    """
    names = [n for n in chosen if approximations.get(n, EXACT) != EXACT]
    if not names:
        raise NoEffect(
            f"{method}: no layer of this network matched (the stem and the classifier are left exact)"
        )
    for name in names:
        m = chosen[name]
        merged_with = merged(m) if type(m) in PLAIN else EXACT
        _ = merged_with | approximations[name]  # refused before anything is changed
    for name in names:
        m = chosen[name]
        if type(m) in APPROX:
            m.__class__, m.approximations = APPROX[type(m)], {}
        m.approximations = {**m.approximations, owner: approximations[name]}
    return names


def revert_(model: nn.Module, owner: object) -> int:
    """Take the owner's approximations away again, in place.

    Layers without any become plain. Returns how many layers had one.

    >>> net = build("convnet", 4, (1, 8, 8), widths=(4, 8))
    >>> zero = {"features.4": Approximation(output_gradient=torch.zeros_like)}
    >>> names = convert_(layers(net), zero, "me", "example")
    >>> revert_(net, "me"), type(net.features[4]).__name__
    (1, 'Conv2d')
    """
    mine = [m for m in model.modules() if type(m) in PLAIN and owner in m.approximations]
    for m in mine:
        m.approximations = {o: a for o, a in m.approximations.items() if o != owner}
        if not m.approximations:
            m.__class__ = PLAIN[type(m)]
            del m.approximations
    return len(mine)


def on_device(generator: torch.Generator, device: str | torch.device) -> torch.Generator:
    """Return a generator on `device`: itself, or one it seeds.

    >>> generator = torch.Generator()
    >>> on_device(generator, "cpu") is generator
    True
    """
    if torch.device(device).type == generator.device.type:
        return generator
    return torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=generator)))


# A fault below PyTorch

BLOCK = 16  # channels that oneDNN's kernels take at once, with AVX-512


def guard_(model: nn.Module) -> nn.Module:
    """Keep strided pointwise convolutions out of a faulty kernel, in place.

    It writes past its memory (oneDNN issue 6035). On a CPU, with fewer than `BLOCK` input channels in
    channels_last, their backward pass may crash, hang or be wrong, as the batch and the number of threads
    have it. Such a layer gets its input, and its weights, in the contiguous layout.

    >>> conv = guard_(nn.Conv2d(8, 8, 1, stride=2).to(memory_format=torch.channels_last))
    >>> y = conv(torch.zeros(15, 8, 6, 6).to(memory_format=torch.channels_last))
    >>> y.shape, y.is_contiguous()
    (torch.Size([15, 8, 3, 3]), True)
    """
    for m in model.modules():
        if (
            isinstance(m, nn.Conv2d)
            and m.kernel_size == (1, 1)
            and _contiguous not in m._forward_pre_hooks.values()
        ):
            m.register_forward_pre_hook(_contiguous)
    return model


def contiguous_(model: nn.Module) -> RemovableHandle:
    """Give `model` its images in the contiguous layout; return the hook.

    >>> net = nn.Sequential(nn.Identity())
    >>> _ = contiguous_(net)
    >>> net(torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)).is_contiguous(), is_contiguous(net)
    (True, True)
    """
    for p in model.parameters():
        if not nn.parameter.is_lazy(p):
            p.data = _plainly(p.data)
    return model.register_forward_pre_hook(_contiguous_images)


def is_contiguous(model: nn.Module) -> bool:
    """Return whether `model` gets its images in the contiguous layout, by `contiguous_`.

    >>> is_contiguous(nn.Identity())
    False
    """
    return _contiguous_images in model._forward_pre_hooks.values()


def _contiguous_images(model, inputs):
    return tuple(_plainly(x) if isinstance(x, torch.Tensor) else x for x in inputs)


def _plainly(t):
    """A tensor with the strides of the contiguous layout; with one channel, `contiguous` keeps others."""
    last = t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
    return t.clone(memory_format=torch.contiguous_format) if last else t.contiguous()


def _contiguous(conv, inputs):
    """Before the layer. In whichever layout, the weights of a 1 x 1 kernel lie in the same order: only their
    strides say which it is.
    """
    if conv.stride == (1, 1) or not inputs or inputs[0].device.type != "cpu":
        return None
    if inputs[0].shape[-3] >= BLOCK:  # of the input: some of the layer's channels may be left out
        return None
    w = conv.weight
    if w.stride(2) != 1:
        w.data = w.data.as_strided(w.shape, (w.shape[1], 1, 1, 1))
    return inputs[0].contiguous()
