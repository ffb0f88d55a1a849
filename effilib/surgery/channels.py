"""Which channels of a network belong together: nodes that several layers share, found by following the
forward pass.

A *channel node* is a set of channels that several layers share and that can only change together: its
producers (the layers that write them), the BatchNorms on them, its consumers (the layers that read them). A
residual trunk is one node with many producers and consumers. `trace(model)` finds the nodes by following the
forward pass symbolically (torch.fx); what it does not know it refuses, with the layer's name.
`effilib.surgery` changes them."""

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import fx, nn

from effilib import models
from effilib.convolution import evaluating
from effilib.errors import BadInput, NotApplicable, choose
from effilib.networks import Block, Constant, Gone

__all__ = [
    "CONVS", "LAYERS", "NORMS", "Node", "Path", "Structure", "checked", "follow", "nodes", "place_of",
    "trace", "unknown",
]  # fmt: skip

CONVS = (nn.Conv2d, nn.Linear)  # exactly these: a subclass may do anything
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
LAYERS = (*CONVS, *NORMS, Constant)

# What acts on each channel by itself: channels may be dropped or doubled before it as well as after it.
ELEMENTWISE = {
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Dropout, nn.Dropout2d,
    nn.AlphaDropout, F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish,
    F.sigmoid, F.tanh, F.hardswish, F.hardsigmoid, F.hardtanh, F.softplus, F.dropout, F.dropout2d,
    torch.relu, torch.relu_, torch.sigmoid, torch.tanh, torch.abs, torch.sqrt, torch.exp, torch.clamp,
    operator.neg, operator.pow, "relu", "relu_", "sigmoid", "tanh", "abs", "sqrt", "exp", "clamp", "clamp_",
    "pow", "contiguous", "clone", "detach", "float", "half", "bfloat16", "to", "type",
}  # fmt: skip
SPATIAL = {
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.LPPool2d, nn.Upsample,
    nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, F.max_pool2d, F.avg_pool2d,
    F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate, torch.max_pool2d,
}  # fmt: skip
BINARY = {
    operator.add, operator.iadd, operator.sub, operator.isub, operator.mul, operator.imul, operator.truediv,
    operator.itruediv, torch.add, torch.sub, torch.mul, torch.div, "add", "add_", "sub", "sub_", "mul",
    "mul_", "div", "div_",
}  # fmt: skip
ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
REDUCTIONS = {torch.mean, torch.sum, torch.amax, "mean", "sum", "amax"}
FLATTEN = {nn.Flatten, torch.flatten, "flatten"}


@dataclass(eq=False)
class Node:
    """Channels that change together.

    Layers are named as in `model.named_modules()`; print it to see them. consumers, bns: layer -> columns per
    channel (H*W for a linear layer behind a flatten, else 1). why: the reason for which the node cannot be
    changed, "" if it can.

    >>> net = build("resnet", 10, (3, 32, 32), widths=(8, 16), blocks=(1, 1))
    >>> print(trace(net)["stages.1.0.conv1"])
    stages.1.0.conv1: 16 channels; from stages.1.0.conv1; BatchNorm stages.1.0.bn1; to stages.1.0.conv2
    """

    model: nn.Module = field(repr=False)
    producers: list
    bns: dict
    consumers: dict
    why: str = ""
    modules: dict = field(default_factory=dict, repr=False)  # name -> module when it was traced

    @property
    def name(self) -> str:
        """The first producer's name."""
        return self.producers[0]

    @property
    def width(self) -> int:
        """How many channels it has now."""
        m = self.layer(self.name)
        return len(m.bias if isinstance(m, Constant) else m.weight)

    def layer(self, name: str, model: nn.Module | None = None) -> nn.Module:
        """Return the module of that name, of this model or another."""
        return (model or self.model).get_submodule(name)

    def __str__(self):
        def listed(layers):
            return (
                ", ".join(n if per == 1 else f"{n} ({per} columns a channel)" for n, per in layers.items())
                or "none"
            )

        text = f"{self.name}: {self.width} channels; from {', '.join(self.producers)}"
        text += f"; BatchNorm {listed(self.bns)}"
        return f"{text}; to {listed(self.consumers)}" + (f"; fixed: {self.why}" if self.why else "")


@dataclass(eq=False)
class Path:
    """A residual path, with the shortcut that it is added to.

    layers, shortcut: names, in the order of the pass. plain: whether the sum is `+`, `+=` or `torch.add` of
    the two, in which a plain 0 can stand for the path.

    >>> path = trace(build("resnet", 10, (3, 32, 32), widths=(8, 16), blocks=(1, 1))).path("stages.1.0")
    >>> path.convs, path.shortcut
    (['stages.1.0.conv1', 'stages.1.0.conv2'], ['stages.1.0.shortcut.0', 'stages.1.0.shortcut.1'])
    """

    model: nn.Module = field(repr=False)
    name: str  # the block whose forward adds them
    layers: list
    shortcut: list
    plain: bool = True

    @property
    def in_place(self) -> bool:
        """Return whether the sum may be `out += shortcut`.

        A constant cannot take part in that. Tracing does not tell, only ours is sure.
        """
        return not isinstance(self.model.get_submodule(self.name), Block)

    @property
    def convs(self) -> list:
        """Names of its convolutions and linear layers."""
        return [n for n in self.layers if isinstance(self.model.get_submodule(n), CONVS)]


@dataclass(eq=False)
class Structure:
    """What `trace` found.

    nodes can be changed, refused cannot (each says why); paths: residual ones.

    >>> found = trace(build("resnet", 10, (3, 32, 32), widths=(8, 16), blocks=(1, 1)))
    >>> found["stages.0.0.conv2"].name  # it writes into the trunk, as the stem does
    'stem'
    >>> [node.name for node in found.inner(found.path("stages.0.0"))]
    ['stages.0.0.conv1']
    """

    nodes: list
    refused: list
    paths: list

    def __getitem__(self, name):
        """The node that the layer `name` writes to. Raises `BadInput` if there is none, or it cannot be
        changed.
        """
        for node in [*self.nodes, *self.refused]:
            if name in node.producers:
                return checked(node)
        raise BadInput(unknown("channel node", name, [n.name for n in self.nodes]))

    def path(self, name: str) -> Path:
        """Return the residual path of the block `name`."""
        for path in self.paths:
            if path.name == name:
                return path
        raise BadInput(unknown("residual path", name, [p.name for p in self.paths]))

    def inner(self, path: Path) -> list:
        """Return the nodes that lie wholly inside a path."""
        return [n for n in self.nodes if set(n.producers) | set(n.consumers) <= set(path.layers)]

    def __str__(self):
        return "\n".join(map(str, [*self.nodes, *self.refused]))


def unknown(kind: str, name: str, choices: Iterable[str]) -> str:
    """Return the sentence that refuses a name and lists the choices.

    >>> print(unknown("layer", "stem1", ["stem", "head"]))
    unknown layer 'stem1': choose one of stem, head (did you mean 'stem'?)
    """
    try:
        choose(kind, name, choices or ["none"])
    except BadInput as error:
        return str(error)
    return f"{kind} {name}"


class _Unclear(Exception):
    """Raised while following the pass: what happens here to the channels is not known."""


class _Group:
    """Channels found so far to belong together; `root` is the group that it was merged into."""

    def __init__(self, width=None, producer=None, why=""):
        self.width, self.why, self.parent, self.outside = width, why, None, False
        self.producers, self.bns, self.consumers = [producer] if producer else [], {}, {}

    @property
    def root(self):
        return self.parent.root if self.parent else self

    def stop(self, why, outside=False):
        g = self.root
        g.outside |= outside  # the network's input or output: not a node at all
        g.why = g.why or why

    def join(self, other):
        a, b = self.root, other.root
        if a is b:
            return
        if a.width != b.width:
            why = f"{a.width or 'unknown'} channels meet {b.width or 'unknown'} in one operation"
            a.stop(why)
            b.stop(why)
        a.producers += [p for p in b.producers if p not in a.producers]
        a.bns |= b.bns
        a.consumers |= b.consumers
        a.why, a.outside, a.width = a.why or b.why, a.outside or b.outside, a.width or b.width
        b.parent = a


@dataclass(frozen=True)
class _Value:
    """A tensor whose dimension 1 holds a group's channels; flat: behind a flatten, H*W columns a channel."""

    group: _Group
    rank: int
    flat: bool = False


class Tracer(fx.Tracer):
    """A symbolic tracer of a forward pass for images alone.

    Flags and masks of that pass keep their defaults, and are no symbols.

    >>> class Flags(nn.Linear):
    ...     def forward(self, x, features=False):
    ...         return x if features else super().forward(x)
    >>> print(Tracer().trace(Flags(2, 3)))
    graph():
    ...
    """

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        def forward(self, x):
            return root_fn(self, x)

        return super().create_args_for_root(forward, is_module)


class _Tracer(Tracer):
    def __init__(self, opaque):
        super().__init__()
        self.opaque, self.failed = opaque, None

    def is_leaf_module(self, m, name):
        return (
            name in self.opaque
            or isinstance(m, (*CONVS, *NORMS, Constant, Gone))
            or super().is_leaf_module(m, name)
        )

    def call_module(self, m, forward, args, kwargs):
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or self.path_of_module(m)  # the innermost
            raise


def follow(model: nn.Module) -> tuple[fx.Graph, dict[str, str], dict[str, torch.Tensor]]:
    """Return the forward pass as a graph.

    (graph, opaque modules with the reason, constant tensors). Opaque modules cannot be followed, and are
    taken as they are. Raises `BadInput` where the forward pass as a whole cannot be followed.

    >>> graph, opaque, constants = follow(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
    >>> [node.name for node in graph.nodes], opaque
    (['x', '_0', '_1', 'output'], {})
    """
    opaque, before = {}, set(vars(model))
    while True:
        tracer = _Tracer(opaque)
        try:
            graph = tracer.trace(model)
            constants = {
                name: vars(model).pop(name) for name in set(vars(model)) - before
            }  # fx leaves them on the model
            return graph, opaque, constants
        except (
            Exception
        ) as error:  # whatever a user's forward raises when it meets a symbol instead of numbers
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            if not tracer.failed or tracer.failed in opaque:
                raise NotApplicable(
                    f"the forward pass of {type(model).__name__} cannot be followed for surgery: {reason}"
                ) from error
            opaque[tracer.failed] = f"{tracer.failed} cannot be followed ({reason})"


def trace(model: nn.Module) -> Structure:
    """Find the channel nodes and residual paths of `model`.

    Input channels and outputs of the network are never nodes, and what is not the same in training and in
    eval mode is refused. Raises `NotApplicable` if the forward pass as a whole cannot be followed
    (data-dependent control flow at its top); inside a submodule only the nodes that touch it are refused.

    >>> found = trace(build("resnet", 10, (3, 32, 32), widths=(8, 16), blocks=(1, 1)))
    >>> {node.name: node.width for node in found.nodes}
    {'stem': 8, 'stages.0.0.conv1': 8, 'stages.1.0.conv1': 16, 'stages.1.0.conv2': 16}
    """
    found = _trace(model)
    with evaluating(model) if model.training else models.untouched(model):
        again = _trace(model)
    other = {tuple(n.producers): n for n in again.nodes}
    for node in found.nodes[:]:
        twin = other.get(tuple(node.producers))
        if twin is None or (twin.bns, twin.consumers) != (node.bns, node.consumers):
            node.why = "other layers take part in training than in evaluation"
            found.nodes.remove(node)
            found.refused.append(node)
    found.paths[:] = [p for p in found.paths if p.layers in [q.layers for q in again.paths]]
    return found


def _trace(model):
    """What is found in the mode that the model is in."""
    graph, opaque, constants = follow(model)
    groups = _Reader(model, graph, opaque, constants).read()
    order = {n.target: i for i, n in enumerate(graph.nodes) if n.op == "call_module"}
    nodes = []
    for g in groups:
        if g.root is g and g.producers and not g.outside:
            why = g.why or ("" if g.consumers else "no layer reads these channels")
            modules = {n: model.get_submodule(n) for n in [*g.producers, *g.bns, *g.consumers]}
            bns, consumers = ({n: d[n] for n in sorted(d, key=order.get)} for d in (g.bns, g.consumers))
            nodes.append(Node(model, sorted(g.producers, key=order.get), bns, consumers, why, modules))
    nodes.sort(key=lambda n: order[n.name])
    return Structure([n for n in nodes if not n.why], [n for n in nodes if n.why], _paths(model, graph))


def nodes(model: nn.Module) -> list[Node]:
    """Return the channel nodes of `model` that can be changed.

    Raises `NotApplicable` with the first reason where there are none.

    >>> [node.name for node in nodes(build("convnet", 10, (3, 32, 32), widths=(4, 8)))]
    ['features.0', 'features.4']
    """
    found = trace(model)
    if not found.nodes:
        reason = f": {found.refused[0].name}: {found.refused[0].why}" if found.refused else ""
        raise NotApplicable(f"{type(model).__name__} has no channels that could be pruned or widened{reason}")
    return found.nodes


def _frozen(m):
    """Whether a layer's user holds its weights; of a normalisation, all that it has."""
    parameters = [m.weight] if isinstance(m, CONVS) else list(m.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)


def _hooked(m):
    """Whether a user's hook is called before or after a layer, unseen by the tracer."""
    hooks = [*m._forward_pre_hooks.values(), *m._forward_hooks.values()]
    return any(not str(getattr(h, "__module__", "")).startswith("effilib.") for h in hooks)


class _Reader:
    """Goes through the graph once and says for each value whose channels it holds."""

    def __init__(self, model, graph, opaque, constants):
        self.model, self.graph, self.opaque, self.constants = model, graph, opaque, constants
        self.values, self.groups = {}, []
        calls, owners, self.nothing = {}, {}, set()
        for name, m in model.named_modules(remove_duplicate=False):
            for p in m._parameters.values():
                if p is not None:
                    owners.setdefault(p, set()).add(name)
        for n in graph.nodes:
            if n.op == "call_module":
                m = model.get_submodule(n.target)
                calls[m] = calls.get(m, 0) + 1
            if n.op == "get_attr":  # a layer's weight, read by something else than the layer
                p = self.attribute(n.target)
                owners.setdefault(p, set()).update({n.target, "?"})
        self.shared = {m for m, k in calls.items() if k > 1} | {
            m
            for m in model.modules()
            if any(len(owners[p]) > 1 for p in m._parameters.values() if p is not None)
        }

    def attribute(self, name):
        return self.constants[name] if name in self.constants else operator.attrgetter(name)(self.model)

    def new(self, **kwargs):
        self.groups.append(_Group(**kwargs))
        return self.groups[-1]

    def read(self):
        for n in self.graph.nodes:
            inputs = [self.values[a] for a in n.all_input_nodes if self.values.get(a)]
            try:
                self.values[n] = self.value(n, inputs)
            except _Unclear as unclear:
                for v in inputs:
                    v.group.stop(str(unclear))
                self.values[n] = _Value(self.new(why=str(unclear)), rank=0)
        return self.groups

    def value(self, n, inputs):
        if n.op == "placeholder":
            group = self.new()
            group.stop("the network's input", outside=True)
            return _Value(group, rank=4)
        if n.op == "output":
            for v in inputs:
                v.group.stop("the network's output", outside=True)
            return None
        if n.op == "get_attr":
            if self.attribute(n.target).numel() == 1:
                return None  # a number: the same for all channels
            raise _Unclear(
                f"{n.target} is used outside of a layer"
                + "".join(f", in {place_of(u)}" for u in list(n.users)[:1] if place_of(u))
            )
        if n.op == "call_module":
            module = self.model.get_submodule(n.target)
            if n.target in self.opaque:
                raise _Unclear(self.opaque[n.target])
            if isinstance(module, Gone):
                self.nothing.add(n)
                return None
            if _hooked(module) and set(module._parameters) <= {"weight", "bias"}:
                raise _Unclear(f"{n.target} has a hook, which may change what it computes")
            if isinstance(module, LAYERS) or type(module).__name__.startswith(("Conv", "Lazy")):
                out = self.layer(n.target, module, inputs)
                for v in [*inputs, out] if _frozen(module) else ():
                    v.group.stop(f"{n.target} is frozen (requires_grad=False)")
                return out
            return self.operation(n, type(module), inputs, module)
        return self.operation(n, n.target, inputs)

    def layer(self, name, m, inputs):
        """A layer with channels of its own."""
        (v,) = inputs if len(inputs) == 1 else (None,)
        if type(m) not in LAYERS:
            raise _Unclear(f"{name} is a {type(m).__name__}, whose channels surgery does not know")
        if m in self.shared:
            raise _Unclear(f"{name} shares its weights with another use of them")
        if not set(m._parameters) <= {"weight", "bias"} or getattr(m, "parametrizations", None):
            raise _Unclear(f"{name} has weights that are computed from others ({', '.join(m._parameters)})")
        if getattr(m, "groups", 1) > 1:
            kind = "depth-wise" if m.groups == m.in_channels else "grouped"
            raise _Unclear(f"{name} is a {kind} convolution (groups={m.groups})")
        if isinstance(m, Constant):
            return _Value(self.new(width=len(m.bias), producer=name), rank=4)
        if v is None:
            raise _Unclear(f"{name} reads something else than one tensor of channels")
        width = v.group.root.width
        size = (
            m.in_channels
            if isinstance(m, nn.Conv2d)
            else m.in_features
            if isinstance(m, nn.Linear)
            else m.num_features
        )
        fits = v.rank == (4 if isinstance(m, nn.Conv2d | nn.BatchNorm2d) else 2) or isinstance(
            m, nn.SyncBatchNorm
        )
        if v.group.root.outside:
            width = width or size
        per = size // width if width else 1
        if width and (not fits or size != per * width or (per > 1 and not v.flat)):
            raise _Unclear(f"{name} reads {size} features, which are not the {width} channels before it")
        if isinstance(m, NORMS):
            v.group.root.bns[name] = per
            return v
        v.group.root.consumers[name] = per
        out = m.out_channels if isinstance(m, nn.Conv2d) else m.out_features
        return _Value(self.new(width=out, producer=name), rank=4 if isinstance(m, nn.Conv2d) else v.rank)

    def operation(self, n, kind, inputs, module=None):
        """What has no channels of its own: it keeps each channel apart, or it is refused."""
        where = (
            n.target
            if module is not None
            else f"{getattr(n.target, '__name__', n.target)} in {place_of(n) or 'the forward pass'}"
        )
        if n.target == "size" or (n.target is getattr and n.args[1] == "shape"):
            self.sizes(n)
            return None
        if n.target is getattr or n.target == "dim":
            return None
        if not inputs:
            if n.all_input_nodes and set(n.all_input_nodes) <= self.nothing:
                self.nothing.add(n)
            elif module is not None or getattr(n.target, "__module__", "") not in (
                "_operator",
                "builtins",
                "math",
            ):
                raise _Unclear(f"{where} makes a tensor of its own")
            return None  # numbers and sizes
        for v in inputs:
            if not v.rank:  # an earlier operation made it unclear
                raise _Unclear(v.group.root.why)
        first, *others = inputs
        args = n.args or (n.kwargs.get("input"),)
        if kind in BINARY:
            for other in others:
                if (other.rank, other.flat) != (first.rank, first.flat):
                    raise _Unclear(f"{where} combines tensors of other forms")
                first.group.join(other.group)
            return first
        if others or self.values.get(args[0]) is not first:
            raise _Unclear(f"{where} combines channels in a way that surgery does not know")
        given = args[1:]

        def argument(position, name, default=None):
            return given[position] if len(given) > position else n.kwargs.get(name, default)

        if kind in ELEMENTWISE or (kind is nn.PReLU and module.num_parameters == 1):
            return first
        if (
            kind in SPATIAL
            and first.rank == 4
            and not (getattr(module, "return_indices", False) or n.kwargs.get("return_indices"))
        ):
            return first
        if (
            kind is F.pad and first.rank == 4 and len(argument(0, "pad")) <= 4
        ):  # beyond that, channels are added
            return first
        if kind in REDUCTIONS and first.rank == 4:
            dims = argument(0, "dim")
            if isinstance(dims, list | tuple) and sorted(d % 4 for d in dims) == [2, 3]:
                return _Value(first.group, rank=4 if argument(1, "keepdim") else 2)
        flat = _Value(first.group, rank=2, flat=first.flat or first.rank == 4)
        if kind in FLATTEN and first.rank in (2, 4):
            start, end = (
                (module.start_dim, module.end_dim)
                if module
                else (argument(0, "start_dim", 0), argument(1, "end_dim", -1))
            )
            if start == 1 and end in (-1, first.rank - 1):
                return flat
        if kind in ("view", "reshape", torch.reshape) and first.rank in (2, 4):
            shape = given[0] if len(given) == 1 and isinstance(given[0], list | tuple) else given
            if len(shape) == 2 and _is_batch(shape[0]) and shape[1] == -1:
                return flat
        if (
            kind is operator.getitem
            and first.rank == 2
            and not first.flat
            and given[0] == (slice(None), slice(None), None, None)
        ):
            return _Value(first.group, rank=4)
        raise _Unclear(f"{where} may mix channels, or is not known to keep them apart")

    def sizes(self, n):
        """The batch's and the picture's sizes may be read; what reads the number of channels depends on
        it.
        """
        v = self.values.get(n.args[0])
        if v is None:
            return

        def harmless(i):
            if isinstance(i, slice):
                return v.rank == 4 and i.start in (2, -2) and i.stop is None
            return i in ((0, 2, 3, -1, -2) if v.rank == 4 else (0,))

        if len(n.args) > 1 and n.target == "size":
            fine = harmless(n.args[1])
        else:
            fine = all(r.target is operator.getitem and (not r.users or harmless(r.args[1])) for r in n.users)
        if not fine:
            v.group.stop(f"size or shape in {place_of(n) or 'the forward pass'} reads the number of channels")


def _is_batch(size):
    """Whether a symbol is the batch's size: x.size(0) or x.shape[0]."""
    if not isinstance(size, fx.Node):
        return False
    if size.target == "size":
        return size.args[1:] == (0,)
    source = size.args[0] if size.args else None
    is_shape = isinstance(source, fx.Node) and (
        source.target == "size" or (source.target is getattr and source.args[1] == "shape")
    )
    return size.target is operator.getitem and is_shape and size.args[1] == 0


def place_of(n: fx.Node) -> str:
    """Return the module whose forward holds an operation, "" for the network itself.

    >>> graph, *_ = follow(build("resnet", 4, (1, 8, 8), widths=(8,), blocks=(1,)))
    >>> [place_of(node) for node in graph.nodes if "relu" in node.name]
    ['', 'stages.0.0', 'stages.0.0']
    """
    return (list(n.meta.get("nn_module_stack") or {}) or [""])[-1]


def _paths(model, graph):
    """Residual paths: two chains that begin at one tensor and are added. The one with more convolutions is
    the path.
    """

    def chain(n):
        """(its layers, the tensor where it begins), or None where something else lies on it or its sum is not
        a layer's output.
        """
        layers, end = [], n
        while len(n.users) == 1 and n.op != "placeholder":
            if n.op == "call_module" and isinstance(model.get_submodule(n.target), (*CONVS, *NORMS)):
                layers.append(n.target)
            elif (
                type(model.get_submodule(n.target)) if n.op == "call_module" else n.target
            ) not in ELEMENTWISE:
                return None
            if len(n.all_input_nodes) != 1:
                return None
            n = n.all_input_nodes[0]
        return None if n is not end and end.target not in layers[:1] else (layers[::-1], n)

    def convs(layers):
        return sum(isinstance(model.get_submodule(n), CONVS) for n in layers)

    found = []
    for n in graph.nodes:
        if n.target in ADDITIONS and len(n.all_input_nodes) == 2:
            ends = [chain(a) for a in n.all_input_nodes]
            if all(ends) and ends[0][1] is ends[1][1]:
                (longer, _), (shorter, _) = sorted(ends, key=lambda e: -convs(e[0]))
                if convs(longer) > convs(shorter):
                    plain = n.op == "call_function" and "alpha" not in n.kwargs
                    found.append(Path(model, place_of(n), longer, shorter, plain))
    return found


def checked(node: Node) -> Node:
    """Return the node if it can be changed now, else raise `BadInput`.

    The network has to be still what it was traced in.

    >>> net = build("convnet", 10, (3, 32, 32), widths=(4, 8))
    >>> node = trace(net)["features.0"]
    >>> checked(node) is node
    True
    >>> net.features[4] = nn.Conv2d(4, 8, 1)
    >>> checked(node)
    Traceback (most recent call last):
    effilib.errors.BadInput: the network has changed since the node of features.0 was found ...
    """
    if node.why:
        raise BadInput(f"the channels of {node.name} cannot be changed: {node.why}")
    for name, module in node.modules.items():
        try:
            same = node.model.get_submodule(name) is module
        except AttributeError:
            same = False
        if not same:
            raise BadInput(
                f"the network has changed since the node of {node.name} was found ({name}): trace it again"
            )
    return node
