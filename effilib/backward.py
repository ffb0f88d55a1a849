"""A network's backward pass for some of the samples: the forward pass is exact, and sees them all.

    part = partial_backward_(net, sampler)   # in place; `whole_backward_` takes it back

PyTorch's autograd wants gradients of the whole batch. So the lower part of the network, as far up as its
operations are known here, is one `torch.autograd.Function`: it notes what it does, and undoes it for the
samples that are left. What lies above is autograd's. At each *border*, a place through which all flows,
`sampler` may drop samples: (border, norm of the gradient of each sample that is left) -> (index, weight) of
those that stay, or None. Gradients are multiplied by their weights there, so that sums stay sums.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import fx, nn

from effilib import convolution as conv
from effilib import normalization
from effilib.errors import NoEffect
from effilib.surgery.channels import ADDITIONS, follow, place_of

__all__ = ["Part", "partial_backward_", "whole_backward_"]

aten = torch.ops.aten
Sampler = Callable[[str, torch.Tensor], tuple[torch.Tensor, torch.Tensor] | None]


# Operations. `forward` returns what they compute and what `backward` needs; tensors are kept by `keep(t)`, a
# place from which `_Kept` takes them again.


class _Kept:
    """What was kept for a backward pass, and the samples that are left; index None is all of them."""

    def __init__(self, tensors, layout):
        self.tensors, self.layout = tensors, layout
        self.index, self.weight, self.rows = None, None, {}

    def __getitem__(self, place):
        return self.tensors[place]

    def left(self, place):
        """The samples that are left of a tensor."""
        if self.index is None:
            return self.tensors[place]
        if place not in self.rows:
            self.rows[place] = conv.take(self.tensors[place], 0, self.index)
        return self.rows[place]

    def sample(self, g, index, weight):
        """Go on with some of the samples that are left. Returns their gradients, weighted."""
        self.weight = weight if self.index is None else self.weight[index] * weight
        self.index, self.rows = index if self.index is None else self.index[index], {}
        return conv.weigh(conv.take(g, 0, index).contiguous(memory_format=self.layout), 0, weight)


class _Operation:
    def __init__(self, node, module):
        self.name, self.inputs = node.name, [a.name for a in node.all_input_nodes]
        self.node, self.layer, self.module = node, node, module
        self.wants_x = any(a.op != "placeholder" for a in node.all_input_nodes)  # images need no gradient

    def parameters(self):
        both = (getattr(self.module, name, None) for name in ("weight", "bias"))
        return [p for p in both if isinstance(p, nn.Parameter)]


class _Conv(_Operation):
    def forward(self, keep, x):
        m = self.module
        for hook in m._forward_pre_hooks.values():  # `convolution.guard_`
            x = x if (found := hook(m, (x,))) is None else found
        w, b, device = m.weight, m.bias, x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x, w, b = (t if t is None else t.to(torch.get_autocast_dtype(device)) for t in (x, w, b))
        product = conv.Convolution(m.stride, m.padding, m.dilation, m.groups)
        with torch.autocast(device, enabled=False):
            return product.forward(x, w, b), (product, keep(x), keep(w))

    def backward(self, kept, dy, product, x, w):
        m = self.module
        wanted = self.wants_x, m.weight.requires_grad
        dx, dw = product.backward(dy, kept.left(x), kept[w], wanted) if any(wanted) else (None, None)
        return [dx], [dw, dy.sum((0, 2, 3)) if m.bias is not None else None]


class _BatchNorm(_Operation):
    def forward(self, keep, x):
        m = self.module
        momentum = m.momentum
        if m.track_running_stats:
            m.num_batches_tracked.add_(1)
            momentum = 1 / float(m.num_batches_tracked) if momentum is None else momentum
        stats = m.running_mean, m.running_var
        y, mean, invstd = aten.native_batch_norm(x, m.weight, m.bias, *stats, True, momentum or 0.0, m.eps)
        return y, (keep(x), keep(mean), keep(invstd))

    def backward(self, kept, dy, x, mean, invstd):
        m, affine = self.module, self.module.weight is not None
        x, mean, invstd = kept[x], kept[mean], kept[invstd]
        if kept.index is None:
            mask = [self.wants_x, affine, affine]
            stats = m.running_mean, m.running_var, mean, invstd
            dx, *both = aten.native_batch_norm_backward(dy, x, m.weight, *stats, True, m.eps, mask)
        else:
            gamma = m.weight if affine else torch.ones_like(mean)
            dx, *both = normalization.batch_norm_backward(
                dy, x, kept.index, kept.weight, mean, invstd, gamma, m.eps
            )
        return [dx], both


class _ReLU(_Operation):
    def forward(self, keep, x):
        y = torch.relu_(x) if _in_place(self.node, self.module) else torch.relu(x)
        return y, (keep(y),)

    def backward(self, kept, dy, y):
        return [aten.threshold_backward(dy, kept.left(y), 0)], []


class _Sum(_Operation):
    def forward(self, keep, *xs):
        return xs[0] + xs[-1], ()

    def backward(self, kept, dy):
        return [dy] if len(self.inputs) == 1 else [dy, dy], []


class _NormReLU(_Operation):
    """BatchNorm, perhaps a sum, and ReLU: one kernel where it takes them, else one after the other."""

    def __init__(self, bn, total, relu):
        super().__init__(relu.node, bn.module)
        self.layer = bn.node
        self.inputs = bn.inputs + [name for name in (total.inputs if total else ()) if name != bn.name]
        self.single = [o for o in (bn, total, relu) if o]

    def forward(self, keep, x, add=None):
        bn = self.module
        if normalization.fits(bn, x, add):
            y, mean, invstd = normalization.forward(bn, x, add)
            beta = bn.bias.detach().clone()
            return y, (None, keep(x), None if add is None else keep(y), keep(beta), keep(mean), keep(invstd))
        notes = []
        for o in self.single:
            x, note = o.forward(keep, *((x, add) if isinstance(o, _Sum) else (x,)))
            notes.append(note)
        return x, (notes,)

    def backward(self, kept, dy, notes, *places):
        if notes is None:
            x, y, beta, mean, invstd = (None if place is None else kept[place] for place in places)
            numbers = self.module.weight, beta, mean, invstd, self.module.eps
            dx, dr, *both = normalization.backward(dy, x, y, *numbers, kept.index, kept.weight)
            return [dx, dr][: len(self.inputs)], both
        rest = []
        for o, note in zip(reversed(self.single), reversed(notes), strict=True):
            (dy, *more), both = o.backward(kept, dy, *note)
            rest += more
        return [dy, *rest], both


class _Samplewise(_Operation):
    """What treats each sample by itself: it is done again, for the samples that are left."""

    def call(self, x):
        n = self.node
        x = x.clone() if _in_place(n, self.module) else x  # it is needed once more
        if self.module is not None:
            return self.module.forward(x)  # no hooks: this runs within a backward pass too
        return n.target(x, *n.args[1:], **n.kwargs)

    def forward(self, keep, x):
        return self.call(x), (keep(x),)

    def backward(self, kept, dy, x):
        x = kept.left(x).detach().requires_grad_()
        with torch.enable_grad():
            return list(torch.autograd.grad(self.call(x), x, dy)), []


OPERATIONS = {
    nn.Conv2d: _Conv,
    nn.BatchNorm2d: _BatchNorm,
    **dict.fromkeys((nn.ReLU, F.relu, torch.relu, torch.relu_, "relu", "relu_"), _ReLU),
    **dict.fromkeys(ADDITIONS, _Sum),
    **dict.fromkeys((nn.Identity, nn.MaxPool2d, nn.AvgPool2d, F.max_pool2d, F.avg_pool2d), _Samplewise),
    **dict.fromkeys((nn.ReLU6, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.Hardswish, F.gelu, F.silu), _Samplewise),
}


def _in_place(node, module):
    """Whether an activation overwrites what it reads."""
    said = getattr(module, "inplace", False) or node.kwargs.get("inplace", False)
    by_place = node.target in (F.relu, F.silu) and True in node.args
    return said or by_place or node.target in ("relu_", torch.relu_)


def _known(node, model):
    """The operation of a node, or None where it is not known, or something else takes part in it."""
    module = model.get_submodule(node.target) if node.op == "call_module" else None
    kind = OPERATIONS.get(node.target if module is None else type(module))
    if kind is None or node.op not in ("call_module", "call_function", "call_method"):
        return None
    tensors = [a for a in node.args if isinstance(a, fx.Node)]
    if module is not None and (module._forward_hooks or module._backward_hooks or not module.training):
        return None
    if kind is _Conv and (isinstance(module.padding, str) or module.padding_mode != "zeros"):
        return None
    if kind is _Sum and (len(tensors) != 2 or len(node.args) != 2 or node.kwargs):
        return None
    if _in_place(node, module) and len(node.all_input_nodes[0].users) > 1:  # others read what it writes
        return None
    return kind(node, module) if set(tensors) == set(node.all_input_nodes) else None


def _fused(operations):
    """The operations, a BatchNorm as one with the ReLU, or the sum and ReLU, that alone read it."""
    of, found, within = {o.node: o for o in operations}, {}, set()
    for relu in operations:
        if not isinstance(relu, _ReLU):
            continue
        [source] = relu.node.all_input_nodes
        total = of.get(source) if isinstance(of.get(source), _Sum) else None
        read = source.all_input_nodes if total else [source]
        bn = next((of[n] for n in read if isinstance(of.get(n), _BatchNorm) and len(n.users) == 1), None)
        if bn and (not total or (len(read) == 2 and len(source.users) == 1)):
            found[relu.node] = _NormReLU(bn, total, relu)
            within |= {bn.node, source}
    return [found.get(o.node, o) for o in operations if o.node not in within]


# The lower part of a network


class Part:
    """Hold the layers whose backward pass can be for some samples.

    borders: places at which samples may be dropped, lowest first, by the layer or block below; top_only: only
    the uppermost. above: the operation at which it ends. Raises `NoEffect` where it would hold no layer.

    >>> net = build("resnet", 4, (1, 8, 8), widths=(8,), blocks=(1,)).train()
    >>> part = Part(net, lambda border, norms: None)
    >>> part.borders, part.above
    (['bn', 'stages.0.0'], 'mean')
    """

    def __init__(self, model: nn.Module, sampler: Sampler, top_only: bool = False):
        graph, _, constants = follow(model)
        nodes, operations, candidates, reach = list(graph.nodes), [], [], 0
        place = {n: i for i, n in enumerate(nodes)}
        self.above = nodes[-1].name
        for i, n in enumerate(nodes[1:], 1):
            if (operation := None if constants else _known(n, model)) is None:
                self.above = n.name
                break
            reach = max([reach, *(place[u] for u in nodes[i - 1].users)])
            operations.append(operation)
            if reach <= i and any(o.parameters() for o in operations):  # nothing flows past it
                candidates.append(n)
        if not candidates:
            raise NoEffect(
                f"sampled backward pass: none of {type(model).__name__}, it ends at {self.above}, which is "
                "not one of the operations that can be undone for some of the samples"
            )
        top = candidates[-1]
        self.operations = _fused(operations[: place[top]])
        lower = [] if top_only else [n for n in candidates[:-1] if self._read_by_conv(n)]
        self.names = {n.name: self._label(n) for n in [*lower, top]}
        self.images, self.top, self.sampler = nodes[0].name, top.name, sampler
        self.done, self.rest = dict.fromkeys(nodes[: place[top]]), fx.Interpreter(model, graph=graph)
        self.end = top
        self.convs = [o.node.target for o in self.operations if isinstance(o, _Conv)]

    @property
    def borders(self) -> list[str]:
        """Return where samples may be dropped, lowest first."""
        return list(self.names.values())

    def _label(self, node):
        """What a person calls the place behind a node: the layer, or the block that ends there."""
        if node.op == "call_module":
            return node.target
        layers = [o.layer for o in self.operations if o.parameters()]
        return place_of(node) or next(n.target for n in reversed(layers) if n < node)

    def _read_by_conv(self, node):
        return any(o.node in node.users for o in self.operations if isinstance(o, _Conv))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the network makes of images x; its gradients will be of some of the samples."""
        owned = [o.parameters() for o in self.operations]
        y = _Lower.apply(self, owned, x, *dict.fromkeys(p for own in owned for p in own))
        try:
            return self.rest.run(x, initial_env=self.done | {self.end: y})
        finally:
            self.rest.env = {}  # else the last step's graph would stay


class _Lower(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part, owned, x, *parameters):
        values, places, kept, notes = {part.images: x}, {}, [], []

        def keep(t):
            if id(t) not in places:  # alive, so that no id comes twice
                places[id(t)] = len(kept)
                kept.append(t)
            return places[id(t)]

        for o in part.operations:
            values[o.name], note = o.forward(keep, *(values[name] for name in o.inputs))
            notes.append(note)
        y = values[part.top]
        ctx.save_for_backward(*kept)
        ctx.part, ctx.notes, ctx.owned, ctx.parameters = part, notes, owned, parameters
        last = y.dim() == 4 and y.is_contiguous(memory_format=torch.channels_last)
        ctx.layout = torch.channels_last if last else torch.contiguous_format
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        part, kept = ctx.part, _Kept(ctx.saved_tensors, ctx.layout)
        found, gradients = {}, {part.top: dy}
        with torch.autocast(dy.device.type, enabled=False):
            steps = zip(part.operations, ctx.notes, ctx.owned, strict=True)
            for o, note, owned in reversed(list(steps)):
                dy = gradients.pop(o.name)
                if o.name in part.names:
                    drawn = part.sampler(part.names[o.name], _norms(dy))
                    dy = dy if drawn is None else kept.sample(dy, *drawn)
                dxs, own = o.backward(kept, dy, *note)
                for name, dx in zip(o.inputs, dxs, strict=True):
                    gradients[name] = gradients[name] + dx if gradients.get(name) is not None else dx
                for p, g in zip(owned, own, strict=False):
                    if g is not None:
                        found[p] = found[p] + g.to(p.dtype) if p in found else g.to(p.dtype)
        wanted = zip(ctx.parameters, ctx.needs_input_grad[3:], strict=True)
        return None, None, None, *(found.get(p) if w else None for p, w in wanted)


def _norms(g):
    """The norm of each sample's gradient, in at least fp32."""
    dtype = torch.promote_types(g.dtype, torch.float32)
    return torch.linalg.vector_norm(g, dim=tuple(range(1, g.dim())), dtype=dtype)


class _Partial:
    """Mixed into a model's class: in training it has the backward pass of its `Part`."""

    def forward(self, x):
        followed = isinstance(x, fx.Proxy)  # by surgery, which knows plain layers
        if followed or not self.training or not torch.is_grad_enabled() or x.requires_grad:
            return super().forward(x)
        return self.part(x)


def partial_backward_(model: nn.Module, sampler: Sampler, top_only: bool = False) -> Part:
    """Give `model` a backward pass for some samples, in place.

    Returns the part that has it. sampler, top_only: as of `Part`, which says what is refused. In eval mode,
    and where the images need a gradient, all is as before.

    >>> net = build("convnet", 4, (1, 8, 8), widths=(4, 8)).train()
    >>> half = lambda border, norms: (torch.arange(1), torch.full((1,), 2.0)) if len(norms) == 2 else None
    >>> part = partial_backward_(net, half)
    >>> net(torch.rand(2, 1, 8, 8)).sum().backward()
    >>> net.features[0].weight.grad.shape, len(part.borders)
    (torch.Size([4, 1, 3, 3]), 2)
    """
    whole_backward_(model)
    part = Part(model, sampler, top_only)
    cls = type(model)
    model.__class__ = type(cls.__name__, (_Partial, cls), {"__module__": cls.__module__})
    model.part = part
    return part


def whole_backward_(model: nn.Module) -> None:
    """Take `partial_backward_` back, in place.

    >>> net = build("convnet", 4, (1, 8, 8), widths=(4, 8)).train()
    >>> kind, part = type(net), partial_backward_(net, lambda border, norms: None)
    >>> whole_backward_(net)
    >>> type(net) is kind
    True
    """
    if isinstance(model, _Partial):
        model.__class__ = type(model).__mro__[2]
        del model.part
