"""Change a network's structure and keep its function: channels are selected, blocks and layers come and go.

`trace(model)` (`effilib.surgery.channels`) finds what can change together. `select_` is the one operation on
it: an index without repeats prunes, one with repeats widens (Net2Wider; Chen et al. 2016).

Parameters are replaced, never shrunk in place (an older graph would still hold them), and the optimizer is
bound to the new ones with its state. In mid-training all of it goes through `run.restructure(change)`, e.g.

    def change(model, optimizer):
        select_(trace(model)["stages.0.0.conv1"], range(16), optimizer)
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from itertools import count

import torch
from torch import nn

from effilib import models
from effilib.errors import BadInput
from effilib.models import Block, Constant, Gone
from effilib.surgery.channels import CONVS, NORMS, Node, Path, checked, trace, unknown
from effilib.surgery.trial import copies, keeping

__all__ = [
    "adopt_",
    "append_block_",
    "can_remove",
    "follower",
    "forget_",
    "insert_layer_",
    "remove_block_",
    "remove_layer_",
    "remove_path_",
    "replace_",
    "select_",
]

# How an optimizer's state follows a gradient that is s times as large: as s to this power.
POWERS = {
    "momentum_buffer": 1,
    "exp_avg": 1,
    "grad_avg": 1,
    "exp_inf": 1,
    "exp_avg_sq": 2,
    "max_exp_avg_sq": 2,
    "square_avg": 2,
    "sum": 2,
}


# Parameters and what an optimizer knows of them.


def replace_(
    module: nn.Module, name: str, change: Callable, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Put a new Parameter in place of `module.name`, in its optimizer's group and place too, without a
    gradient.

    change: (tensor, power) -> tensor; power is None for the parameter itself, else how the optimizer's state
    scales with the gradient (`POWERS`). The memory format stays. Raises `BadInput` for a state whose scale is
    not known.

    >>> layer = nn.Linear(2, 3)
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    >>> replace_(layer, "weight", lambda t, power: t[:2], optimizer)
    >>> layer.weight.shape, optimizer.param_groups[0]["params"][0] is layer.weight
    (torch.Size([2, 2]), True)
    """
    _check(optimizer)
    old = getattr(module, name)
    new = nn.Parameter(_like(change(old.detach(), None), old), requires_grad=old.requires_grad)
    setattr(module, name, new)
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    if old in optimizer.state:
        state = optimizer.state.pop(old)
        optimizer.state[new] = {
            k: _like(change(v, _power(optimizer, k)), new) if _per_weight(v) else v for k, v in state.items()
        }


def _check(optimizer):
    """Refuse, before anything is changed, an optimizer whose state surgery could not carry over."""
    for parameter, state in optimizer.state.items() if optimizer else ():
        for k, v in state.items():
            if _per_weight(v) and v.shape != parameter.shape:
                raise BadInput(
                    f"{type(optimizer).__name__} keeps {k!r} in a form of its own: no surgery with it"
                )
            if _per_weight(v):
                _power(optimizer, k)


def _power(optimizer, key):
    if isinstance(optimizer, torch.optim.RMSprop) and key == "momentum_buffer":
        return 0  # it gathers gradients that were divided by their size
    if key not in POWERS:
        raise BadInput(
            f"{type(optimizer).__name__} keeps {key!r}, and surgery does not know how it scales; "
            f"known: {', '.join(POWERS)}"
        )
    return POWERS[key]


def _per_weight(value):
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _like(t, old):
    """A copy of t in the memory format of old, and for the same shape in its very strides."""
    if t.shape == old.shape:
        return torch.empty_like(old).copy_(t)
    last = old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last) and not old.is_contiguous()
    return t.clone(memory_format=torch.channels_last if last else torch.contiguous_format)


def forget_(optimizer: torch.optim.Optimizer | None, parameters: Iterable[nn.Parameter]) -> None:
    """Take parameters out of an optimizer, with their state.

    >>> layer = nn.Linear(2, 3)
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    >>> forget_(optimizer, [layer.bias])
    >>> [p is layer.weight for p in optimizer.param_groups[0]["params"]]
    [True]
    """
    gone = set(parameters)
    if optimizer is not None:
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p not in gone]
        for p in gone & set(optimizer.state):
            del optimizer.state[p]


def adopt_(
    optimizer: torch.optim.Optimizer | None, parameters: Iterable[nn.Parameter], like: nn.Parameter
) -> None:
    """Put new parameters into the optimizer's group of `like`, right behind it; SGD's momentum begins at 0.

    >>> old, new = nn.Linear(2, 3), nn.Linear(3, 3)
    >>> optimizer = torch.optim.SGD(old.parameters(), lr=0.1)
    >>> adopt_(optimizer, [new.weight], like=old.weight)
    >>> [p is new.weight for p in optimizer.param_groups[0]["params"]]
    [False, True, False]
    """
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        places = [i for i, p in enumerate(group["params"]) if p is like]
        if places:
            group["params"][places[0] + 1 : places[0] + 1] = list(parameters)
            if "momentum_buffer" in optimizer.state.get(like, {}):  # the fused SGD wants all or none
                for p in parameters:
                    optimizer.state[p] = {"momentum_buffer": torch.zeros_like(p)}
            return


@torch.no_grad()
def select_(
    node: Node,
    index: Sequence[int] | torch.Tensor,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    share: torch.Tensor | None = None,
    ema: nn.Module | None = None,
) -> None:
    """Give a node the channels `index` of its old ones: without repeats it is pruned, with repeats widened.
    In place.

    index: (q,) whole numbers below `node.width`. share: (q,) factors for the chosen channels' outgoing
    weights; by default 1 / how often the channel was chosen, so that widening keeps the function (Net2Wider).
    Other shares that add up to 1 over a channel's copies keep it too; `select_(node, range(n), share=counts)`
    undoes an even split. Pruning keeps it where the consumers' columns of what is dropped are 0.

    optimizer: its state follows as the gradients do: that of producers and BatchNorms is multiplied by the
    share (second moments by its square), that of consumers is copied. (Momentum that came from weight decay
    is scaled alike, the one part that is not exact.) ema: a running average of the model, changed in the same
    way. Raises `BadInput` for a node that cannot be changed, or an index that is empty or out of range.

    >>> net, x = build("convnet", 4, (1, 8, 8), widths=(4, 8)).eval(), torch.rand(2, 1, 8, 8)
    >>> before = net(x)
    >>> select_(trace(net)["features.0"], [0, 1, 2, 3, 3, 3])  # wider: three of channel 3
    >>> net.features[0].out_channels, torch.allclose(net(x), before, atol=1e-6)
    (6, True)
    >>> select_(trace(net)["features.0"], [0, 2])  # pruned
    >>> net.settings()["widths"]
    [[2], [8]]
    """
    checked(node)
    index = torch.as_tensor(list(index) if not isinstance(index, torch.Tensor) else index).cpu()
    if index.dtype not in (torch.int64, torch.int32) or index.dim() != 1 or len(index) == 0:
        raise BadInput(f"{node.name}: the index must be a list of at least one whole number")
    if not 0 <= int(index.min()) <= int(index.max()) < node.width:
        raise BadInput(
            f"{node.name}: the index runs from {index.min()} to {index.max()}, "
            f"but there are channels 0 to {node.width - 1}"
        )
    index = index.long()
    if share is None:
        counts = torch.bincount(index, minlength=node.width)[index]
        share = 1 / counts.double() if counts.max() > 1 else None
    else:
        share = torch.as_tensor(share, dtype=torch.double).cpu()
        if share.shape != index.shape:
            raise BadInput(f"{node.name}: {len(share)} shares for {len(index)} channels")

    _check(optimizer)

    def chosen(axis, per, weight_power, state_power):
        """What happens to a parameter, or to its state, along one axis."""

        def change(t, power):
            at = (index[:, None] * per + torch.arange(per)).flatten().to(t.device)  # H*W columns a channel
            scale = weight_power if power is None else state_power * power
            t = t.index_select(axis, at)
            if share is None or scale == 0:
                return t
            factor = share.repeat_interleave(per).to(t.device) ** scale
            return (t.double() * factor.view([-1 if a == axis else 1 for a in range(t.dim())])).to(t.dtype)

        return change

    for model in copies(node.model, ema):
        mine = optimizer if model is node.model else None
        for name in node.producers:
            m = node.layer(name, model)
            for p in ("weight", "bias"):
                if getattr(m, p, None) is not None:
                    replace_(m, p, chosen(0, 1, 0, 1), mine)
            _resize(m, "out", len(index))
        for name, per in node.bns.items():
            m = node.layer(name, model)
            for p in ("weight", "bias"):
                if getattr(m, p) is not None:
                    replace_(m, p, chosen(0, per, 0, 1), mine)
            for b in ("running_mean", "running_var"):
                if getattr(m, b) is not None:
                    setattr(m, b, chosen(0, per, 0, 0)(getattr(m, b), None))
            m.num_features = len(index) * per
        for name, per in node.consumers.items():
            m = node.layer(name, model)
            replace_(m, "weight", chosen(1, per, 1, 0), mine)
            _resize(m, "in", len(index) * per)


def _resize(m, side, size):
    if isinstance(m, nn.Conv2d):
        setattr(m, f"{side}_channels", size)
    elif isinstance(m, nn.Linear):
        setattr(m, f"{side}_features", size)


# Blocks and layers.


def can_remove(path: Path) -> bool:
    """Whether the constant that a dead residual path adds has somewhere to go.

    >>> can_remove(trace(build("resnet", 4, (1, 8, 8), widths=(8,), blocks=(1,))).path("stages.0.0"))
    True
    """
    shift = getattr(path.model.get_submodule(path.layers[-1]), "bias", None)
    return shift is None or not shift.any() or not path.in_place or _norm(path) is not None


def _norm(path):
    """The shortcut's last layer, if it has a shift."""
    return next(
        (n for n in path.shortcut[-1:] if getattr(path.model.get_submodule(n), "bias", None) is not None),
        None,
    )


@torch.no_grad()
def remove_path_(
    path: Path, optimizer: torch.optim.Optimizer | None = None, *, ema: nn.Module | None = None
) -> None:
    """Remove a residual path: its block becomes its shortcut plus the constant that the path's last BatchNorm
    (or bias) adds.

    That is exact where the path's last convolution writes only zeros (in eval mode once BatchNorm's running
    mean has forgotten the rest), else the path's contribution is lost. Where the sum is `out += shortcut` the
    constant goes into the shortcut's BatchNorm. Raises `BadInput` if it can go nowhere there. Trace the
    network again afterwards.

    >>> net = build("resnet", 4, (1, 8, 8), widths=(8,), blocks=(2,))
    >>> remove_path_(trace(net).path("stages.0.1"))
    >>> net.settings()["blocks"]
    [[8, 0]]
    """
    model = path.model
    last = model.get_submodule(path.layers[-1])
    shift = getattr(last, "bias", None)
    norm = _norm(path)
    if not can_remove(path):
        raise BadInput(
            f"residual path {path.name} adds a constant, and its sum is in place: "
            "it cannot be removed exactly"
        )
    gone = [p for n in path.layers for p in model.get_submodule(n).parameters()]
    if not path.in_place and shift is not None:
        gone = [p for p in gone if p is not shift]
    for m in copies(model, ema):
        shift = getattr(m.get_submodule(path.layers[-1]), "bias", None)
        if path.in_place and shift is not None and norm is not None:
            m.get_submodule(norm).bias.add_(shift)
        for name in path.layers[1:-1]:
            _put(m, name, nn.Identity())
        _put(m, path.layers[0], Gone())
        if path.in_place or shift is None:
            _put(m, path.layers[-1], Nothing())
        else:
            constant = Constant(len(shift))
            constant.bias = shift  # the same Parameter: its optimizer need not know
            _put(m, path.layers[-1], constant)
    forget_(optimizer, gone)


class Nothing(nn.Module):
    """The end of a removed residual path that adds nothing: a plain 0, to which even `out += shortcut` can
    add.

    >>> torch.ones(2) + Nothing()(torch.ones(2))
    tensor([1., 1.])
    """

    def forward(self, x: torch.Tensor) -> float:
        return 0.0


def _put(model, name, module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _sequential(model, name):
    """(the Sequential that holds a layer, its place)."""
    parent, _, child = name.rpartition(".")
    try:
        holder = model.get_submodule(parent)
        place = list(holder._modules).index(child)
    except (AttributeError, ValueError):
        raise BadInput(unknown("layer", name, [n for n, _ in model.named_modules() if n])) from None
    if not isinstance(holder, nn.Sequential):
        raise BadInput(
            f"{name} does not lie in a Sequential, so that nothing can be put behind it or taken out"
        )
    return holder, place


def _splice_(holder, start, end, modules=()):
    """Put modules in place of a Sequential's children start ... end - 1. Numbers count on, names of its own
    stay.
    """
    items, fresh = list(holder._modules.items()), []
    for _ in modules:
        fresh.append(follower(holder, start - 1, fresh))
    items[start:end] = zip(fresh, modules, strict=True)
    if _numbered(holder):
        items = [(str(i), m) for i, (_, m) in enumerate(items)]
    holder._modules.clear()
    holder._modules.update(items)


def _numbered(holder):
    return list(holder._modules) == [str(i) for i in range(len(holder))]


def follower(holder: nn.Sequential, place: int, taken: Sequence[str] = ()) -> str:
    """Return the name of a child that is put behind the one at `place`.

    taken: names that are not free.

    >>> from collections import OrderedDict
    >>> follower(nn.Sequential(nn.ReLU()), 0), follower(nn.Sequential(OrderedDict(a=nn.ReLU())), 0)
    ('1', 'a_1')
    """
    if _numbered(holder):
        return str(place + 1 + len(taken))
    before = list(holder._modules)[place]
    return next(
        name for i in count(1) if (name := f"{before}_{i}") not in holder._modules and name not in taken
    )


def append_block_(
    model: nn.Module,
    name: str,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    x: torch.Tensor | None,
    generator: torch.Generator | None = None,
    ema: nn.Module | None = None,
) -> str:
    """Put a new residual block behind the block `name`, with zero in its last BatchNorm's scale.

    The block is one of ours, or a copy of a user's block whose shortcut is the identity; its convolutions are
    drawn anew (He, fan in). On the first step only that scale has a gradient. x: (N, C, H, W), images on
    which it is seen that the function is kept, see `keeping`; None: it may change. Returns the new block's
    name; trace the network again. Raises `BadInput`, with the network as it was, where what follows the sum
    does not leave it alone: another activation than ReLU, a scale, a pooling.

    >>> net, x = build("resnet", 4, (1, 8, 8), widths=(8,), blocks=(1,)).eval(), torch.rand(2, 1, 8, 8)
    >>> before = net(x)
    >>> append_block_(net, "stages.0.0", x=x)
    'stages.0.1'
    >>> torch.equal(net(x), before)
    True
    """
    holder, place = _sequential(model, name)
    old = holder[place]
    if isinstance(old, Block):
        new, last = Block(old.width, old.width), "bn2"
    else:
        path = trace(model).path(name)
        if path.shortcut:
            raise BadInput(
                f"block {name} has layers on its shortcut: only a block with an identity can be repeated"
            )
        new, last = copy.deepcopy(old), path.layers[-1][len(name) + 1 :]
    like = next(old.parameters())
    new.to(like.device, like.dtype).train(old.training)
    for m in new.modules():
        if isinstance(m, CONVS):
            nn.init.kaiming_normal_(m.weight, nonlinearity="relu", generator=generator)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, NORMS):
            m.reset_parameters()
    for p in new.get_submodule(last).parameters():
        nn.init.zeros_(p)
    new = new.to(memory_format=_format(like))
    fresh = follower(holder, place)
    with keeping(f"a block behind {name}", model, x, optimizer, ema):
        for m in copies(model, ema):
            inside = _sequential(m, name)[0]
            _splice_(inside, place + 1, place + 1, [new if m is model else copy.deepcopy(new)])
        adopt_(optimizer, list(new.parameters()), list(old.parameters())[-1])
    return f"{name.rpartition('.')[0]}.{fresh}".lstrip(".")


def remove_block_(
    model: nn.Module,
    name: str,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    x: torch.Tensor | None,
    ema: nn.Module | None = None,
) -> None:
    """Take the block `name`, whose residual path adds nothing, out of its Sequential.

    x: images on which it is seen that the function is kept, see `keeping`; None: what it computes is lost.
    Raises `BadInput`, with the network as it was, if it is not kept, or the block has layers on its shortcut.
    Trace the network again afterwards.

    >>> net, x = build("resnet", 4, (1, 8, 8), widths=(8,), blocks=(1,)), torch.rand(2, 1, 8, 8)
    >>> remove_block_(net, append_block_(net, "stages.0.0", x=x), x=x)
    >>> net.settings()["blocks"]
    [[8]]
    """
    path = trace(model).path(name)
    if path.shortcut:
        raise BadInput(
            f"block {name} changes the shape on its shortcut: only its residual path can be removed"
        )
    place = _sequential(model, name)[1]
    with keeping(f"taking out {name}", model, x, optimizer, ema):
        _take_out_(model, name, place + 1, optimizer, ema)


def _take_out_(model, name, end, optimizer, ema):
    """Take the layers from `name` to the place `end` (which stays) out of their Sequential."""
    for m in copies(model, ema):
        holder, place = _sequential(m, name)
        if m is model:
            forget_(optimizer, [p for layer in list(holder)[place:end] for p in layer.parameters()])
        _splice_(holder, place, end)


@torch.no_grad()
def insert_layer_(
    model: nn.Module,
    after: str,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    x: torch.Tensor,
    ema: nn.Module | None = None,
) -> str:
    """Put an identity layer (3x3 convolution, BatchNorm, ReLU) behind the ReLU `after` in a Sequential
    (Net2Deeper).

    x: (N, C, H, W), images as in training. They tell how many channels come out of `after`, and their mean
    and variance, with which BatchNorm undoes its own normalisation: scale sqrt(var + eps), shift mean. So the
    function is kept in eval mode; in training mode on x, and nearly so on other batches. Returns the new
    convolution's name; trace the network again. Raises `BadInput`, with the network as it was, where that is
    not so; phi(phi(x)) = phi(x) is needed, so only a ReLU can be followed.

    >>> net, x = build("convnet", 4, (1, 8, 8), widths=(4, 8)).eval(), torch.rand(2, 1, 8, 8)
    >>> before = net(x)
    >>> insert_layer_(net, "features.2", x=x)
    'features.3'
    >>> torch.allclose(net(x), before, atol=1e-6)
    True
    """
    holder, place = _sequential(model, after)
    if not isinstance(relu := holder[place], nn.ReLU):
        raise BadInput(f"{after} is a {type(relu).__name__}: an identity layer can only follow a ReLU")
    own = [m for layer in list(holder)[: place + 1] for m in layer.modules()]
    weights = [p for m in own for p in m.parameters(recurse=False)]
    if not weights:
        raise BadInput(f"{after}: no layer with weights before it in the same Sequential")
    h = _output(model, after, x)
    if h.dim() != 4:
        raise BadInput(f"{after}: what comes out of it is no map (N, C, H, W), but {tuple(h.shape)}")
    c, like = h.shape[1], next((p for p in reversed(weights) if p.dim() == 4), weights[-1])
    with_bn = isinstance([m for m in own if next(m.parameters(recurse=False), None) is not None][-1], NORMS)
    conv, bn = nn.Conv2d(c, c, 3, padding=1, bias=not with_bn), nn.BatchNorm2d(c)
    new = [conv, bn, nn.ReLU(inplace=relu.inplace)] if with_bn else [conv, nn.ReLU(inplace=relu.inplace)]
    for m in new:
        m.to(like.device, like.dtype, memory_format=_format(like)).train(holder.training)
    nn.init.dirac_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    mean, var = h.mean((0, 2, 3)), h.var((0, 2, 3), unbiased=False)
    bn.load_state_dict({"running_mean": mean, "running_var": var}, strict=False)
    bn.weight.copy_((var + bn.eps).sqrt())
    bn.bias.copy_(mean)
    name = f"{after.rpartition('.')[0]}.{follower(holder, place)}".lstrip(".")
    with keeping(f"a layer behind {after}", model, x, optimizer, ema):
        for m in copies(model, ema):
            mine = new if m is model else [copy.deepcopy(layer) for layer in new]
            _splice_(_sequential(m, after)[0], place + 1, place + 1, mine)
        adopt_(optimizer, [p for m in new for p in m.parameters()], weights[-1])
    return name


def _output(model, name, x):
    """What comes out of a layer in training mode, on images x; no statistic moves."""
    seen = []
    hook = model.get_submodule(name).register_forward_hook(lambda m, inputs, y: seen.append(y.clone()))
    try:
        with models.untouched(model), models.seeded(0, x.device):
            model(x)
    finally:
        hook.remove()
    if not seen:
        raise BadInput(f"{name} takes no part in the forward pass")
    return seen[-1]


def remove_layer_(
    model: nn.Module,
    name: str,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    x: torch.Tensor | None,
    ema: nn.Module | None = None,
) -> None:
    """Take the convolution `name`, with the BatchNorm and ReLU behind it, out of its Sequential.

    x: images on which it is seen that the function is kept, see `keeping`; None: what it computes is lost.
    Raises `BadInput`, with the network as it was, if it is not kept, or the layer changes the number of
    channels or the size. Trace again afterwards.

    >>> net = build("vgg", 4, (1, 8, 8), widths=((4, 4), (8,)))
    >>> remove_layer_(net, "features.3", x=None)
    >>> net.settings()["widths"]
    [[4], [8]]
    """
    holder, place = _sequential(model, name)
    conv = holder[place]
    if not isinstance(conv, nn.Conv2d) or conv.in_channels != conv.out_channels or not _keeps_size(conv):
        raise BadInput(
            f"{name} is not a convolution that keeps channels and size, so that it cannot be taken out"
        )
    end = place + 1
    while end < len(holder) and isinstance(holder[end], nn.BatchNorm2d | nn.ReLU):
        end += 1
    with keeping(f"taking out {name}", model, x, optimizer, ema):
        _take_out_(model, name, end, optimizer, ema)


def _keeps_size(conv):
    pad = {"same": conv.kernel_size, "valid": (1, 1)}.get(conv.padding) or tuple(
        2 * p + 1 for p in conv.padding
    )
    return set(conv.stride) == {1} and set(conv.dilation) == {1} and tuple(pad) == tuple(conv.kernel_size)


def _format(like):
    last = (
        like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    )
    return torch.channels_last if last else torch.contiguous_format
