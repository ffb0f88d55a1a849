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

from effilib import models, seeds
from effilib.errors import BadInput
from effilib.networks import Block, Constant, Gone
from effilib.surgery.channels import CONVS, NORMS, Node, Path, checked, trace, unknown
from effilib.surgery.trial import keeping

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
    """Put a new Parameter in place of `module.name`, for its optimizer too.

    It has no gradient, and its old one's group and place. change: (tensor, power) -> tensor; power is None
    for the parameter itself, else how the optimizer's state scales with the gradient (`POWERS`). The memory
    format stays. Raises `BadInput` for a state whose scale is not known.

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
    return t.clone(memory_format=_format(old))


def _format(like):
    last = torch.channels_last
    only = like.dim() == 4 and like.is_contiguous(memory_format=last) and not like.is_contiguous()
    return last if only else torch.contiguous_format


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
    """Put new parameters right behind `like`, in its group of the optimizer.

    SGD's momentum begins at 0. Raises `BadInput` if no group holds `like`: they would not be trained.

    >>> old, new = nn.Linear(2, 3), nn.Linear(3, 3)
    >>> optimizer = torch.optim.SGD(old.parameters(), lr=0.1)
    >>> adopt_(optimizer, [new.weight], like=old.weight)
    >>> [p is new.weight for p in optimizer.param_groups[0]["params"]]
    [False, True, False]
    """
    if optimizer is None:
        return
    group = next((g for g in optimizer.param_groups if any(p is like for p in g["params"])), None)
    if group is None:
        raise BadInput("what is new would not be trained: no group of the optimizer holds the old parameter")
    parameters, place = list(parameters), next(i for i, p in enumerate(group["params"]) if p is like)
    moving = any("momentum_buffer" in optimizer.state.get(p, {}) for p in group["params"])
    group["params"][place + 1 : place + 1] = parameters
    for p in parameters if moving else ():  # the fused SGD wants all or none
        optimizer.state[p] = {"momentum_buffer": torch.zeros_like(p)}


def _adopt_alike_(optimizer, new, before, model):
    """Adopt what new layers hold, each in the group of the last of its kind (a normalisation's bias) in the
    layers `before`, else in the model: weight decay and learning rate go by kind.
    """
    if optimizer is None:
        return
    groups = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    old = [(kind, p) for kind, p in _kinds([model, *before]) if p in groups]
    if not old:
        raise BadInput("what is new would not be trained: the optimizer holds nothing of the network")
    for kind, p in reversed(_kinds(new)):
        same = [q for k, q in old if k == kind] or [q for _, q in old if (q.dim() > 1) == (p.dim() > 1)]
        group = groups[(same or [old[-1][1]])[-1]]
        adopt_(optimizer, [p], [q for _, q in old if groups[q] == group][-1])


def _kinds(layers):
    """[((whether its layer is a normalisation, its name there), parameter)], in order."""
    own = [m for layer in layers for m in layer.modules()]
    return [((isinstance(m, NORMS), k), p) for m in own for k, p in m.named_parameters(recurse=False)]


@torch.no_grad()
def select_(
    node: Node,
    index: Sequence[int] | torch.Tensor,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    share: torch.Tensor | None = None,
) -> None:
    """Give a node the channels `index` of its old ones, in place.

    Without repeats it is pruned, with repeats widened.

    index: (q,) whole numbers below `node.width`. share: (q,) factors for the chosen channels' outgoing
    weights; by default 1 / how often the channel was chosen, so that widening keeps the function (Net2Wider).
    Other shares that add up to 1 over a channel's copies keep it too; `select_(node, range(n), share=counts)`
    undoes an even split. Pruning keeps it where the consumers' columns of what is dropped are 0.

    optimizer: its state follows as the gradients do: that of producers and BatchNorms is multiplied by the
    share (second moments by its square), that of consumers is copied. (Momentum that came from weight decay
    is scaled alike, the one part that is not exact.) Raises `BadInput` for a node that cannot be changed, or
    an index that is empty or out of range.

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

    for name in node.producers:
        m = node.layer(name)
        for p in ("weight", "bias"):
            if getattr(m, p, None) is not None:
                replace_(m, p, chosen(0, 1, 0, 1), optimizer)
        _resize(m, "out", len(index))
    for name, per in node.bns.items():
        m = node.layer(name)
        for p in ("weight", "bias"):
            if getattr(m, p) is not None:
                replace_(m, p, chosen(0, per, 0, 1), optimizer)
        for b in ("running_mean", "running_var"):
            if getattr(m, b) is not None:
                setattr(m, b, chosen(0, per, 0, 0)(getattr(m, b), None))
        m.num_features = len(index) * per
    for name, per in node.consumers.items():
        m = node.layer(name)
        replace_(m, "weight", chosen(1, per, 1, 0), optimizer)
        _resize(m, "in", len(index) * per)


def _resize(m, side, size):
    if isinstance(m, nn.Conv2d):
        setattr(m, f"{side}_channels", size)
    elif isinstance(m, nn.Linear):
        setattr(m, f"{side}_features", size)


# Blocks and layers.


def can_remove(path: Path) -> bool:
    """Return whether a path that adds a constant can be removed.

    Its sum must be a plain one, and the constant must have somewhere to go.

    >>> can_remove(trace(build("resnet", 4, (1, 8, 8), widths=(8,), blocks=(1,))).path("stages.0.0"))
    True
    """
    shift = getattr(path.model.get_submodule(path.layers[-1]), "bias", None)
    return path.plain and (shift is None or not shift.any() or not path.in_place or _norm(path) is not None)


def _norm(path):
    """The shortcut's last layer, if it has a shift."""
    return next(
        (n for n in path.shortcut[-1:] if getattr(path.model.get_submodule(n), "bias", None) is not None),
        None,
    )


@torch.no_grad()
def remove_path_(path: Path, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Remove a residual path, but for the constant that its end adds.

    Its block becomes its shortcut plus the shift of the path's last BatchNorm (or bias). That is exact where
    the path's last convolution writes only zeros (in eval mode once BatchNorm's running mean has forgotten
    the rest), else the path's contribution is lost. Where the sum is `out += shortcut` the constant goes into
    the shortcut's BatchNorm. Raises `BadInput` if it can go nowhere there, or the sum is no plain one, see
    `Path`. Trace the network again afterwards.

    >>> net = build("resnet", 4, (1, 8, 8), widths=(8,), blocks=(2,))
    >>> remove_path_(trace(net).path("stages.0.1"))
    >>> net.settings()["blocks"]
    [[8, 0]]
    """
    model = path.model
    shift = getattr(model.get_submodule(path.layers[-1]), "bias", None)
    if not can_remove(path):
        why = "adds a constant, and its sum is in place" if path.plain else "has a sum that is no plain +"
        raise BadInput(f"residual path {path.name} {why}: it cannot be removed exactly")
    gone = [p for n in path.layers for p in model.get_submodule(n).parameters()]
    for name in path.layers[1:-1]:
        _put(model, name, nn.Identity())
    _put(model, path.layers[0], Gone())
    if path.in_place or shift is None:
        if shift is not None and (norm := _norm(path)) is not None:
            model.get_submodule(norm).bias.add_(shift)
        _put(model, path.layers[-1], Nothing())
    else:
        gone = [p for p in gone if p is not shift]
        constant = Constant(len(shift))
        constant.bias = shift  # the same Parameter: its optimizer need not know
        _put(model, path.layers[-1], constant)
    forget_(optimizer, gone)


class Nothing(nn.Module):
    """The end of a removed residual path: a plain 0, to which `out += shortcut` can add.

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
    """Return the name of a new child behind the one at `place`.

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
) -> str:
    """Put a new residual block behind the block `name`; it changes nothing.

    The block is one of ours, or a copy of a user's block whose shortcut is the identity; its convolutions are
    drawn anew (He, fan in), and its last BatchNorm's scale is 0, which alone has a gradient on the first
    step. All of it is trained, each parameter in the optimizer's group of the old ones of its kind. x: (N, C,
    H, W), images on which it is seen that the function is kept, see `keeping`; None: it may change. Returns
    the new block's name; trace the network again. Raises `BadInput`, with the network as it was, where what
    follows the sum does not leave it alone: another activation than ReLU, a scale, a pooling.

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
        with seeds.seeded(0):  # a constructor's draws, which are not used, shift nobody's
            new, last = Block(old.width, old.width, kernels=old.kernels), "bn2"
    else:
        path = trace(model).path(name)
        if path.shortcut:
            raise BadInput(
                f"block {name} has layers on its shortcut: only a block with an identity can be repeated"
            )
        new, last = copy.deepcopy(old), path.layers[-1][len(name) + 1 :]
    like = next(old.parameters())
    new.requires_grad_(True).to(like.device, like.dtype).train(old.training)
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
    with keeping(f"a block behind {name}", model, x, optimizer):
        _splice_(holder, place + 1, place + 1, [new])
        _adopt_alike_(optimizer, [new], [old], model)
    return f"{name.rpartition('.')[0]}.{fresh}".lstrip(".")


def remove_block_(
    model: nn.Module,
    name: str,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    x: torch.Tensor | None,
) -> None:
    """Take out the block `name`, whose residual path adds nothing.

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
    holder, place = _sequential(model, name)
    with keeping(f"taking out {name}", model, x, optimizer):
        _take_out_(holder, place, place + 1, optimizer)


def _take_out_(holder, start, end, optimizer):
    """Take the layers from the place `start` to `end` (which stays) out of a Sequential."""
    forget_(optimizer, [p for layer in list(holder)[start:end] for p in layer.parameters()])
    _splice_(holder, start, end)


@torch.no_grad()
def insert_layer_(
    model: nn.Module,
    after: str,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    x: torch.Tensor,
) -> str:
    """Put an identity layer behind a Sequential's ReLU (Net2Deeper).

    It is a 3x3 convolution, BatchNorm and ReLU. x: (N, C, H, W), images as in training. They tell how many
    channels come out of `after`, and their mean and variance, with which BatchNorm undoes its own
    normalisation: scale sqrt(var + eps), shift mean. So the function is kept in eval mode; in training mode
    on x, and nearly so on other batches. Returns the new convolution's name; trace the network again. Raises
    `BadInput`, with the network as it was, where that is not so; phi(phi(x)) = phi(x) is needed, so only a
    ReLU can be followed.

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
    with seeds.seeded(0):  # a constructor's draws, which are not used, shift nobody's
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
    with keeping(f"a layer behind {after}", model, x, optimizer):
        _splice_(holder, place + 1, place + 1, new)
        _adopt_alike_(optimizer, new, list(holder)[: place + 1], model)
    return name


def _output(model, name, x):
    """What comes out of a layer in training mode, on images x; no statistic moves."""
    seen = []
    hook = model.get_submodule(name).register_forward_hook(lambda m, inputs, y: seen.append(y.clone()))
    try:
        with models.untouched(model), seeds.seeded(0, x.device):
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
) -> None:
    """Take out the convolution `name`, with the BatchNorm and ReLU behind it.

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
    with keeping(f"taking out {name}", model, x, optimizer):
        _take_out_(holder, place, end, optimizer)


def _keeps_size(conv):
    pad = {"same": conv.kernel_size, "valid": (1, 1)}.get(conv.padding) or tuple(
        2 * p + 1 for p in conv.padding
    )
    return set(conv.stride) == {1} and set(conv.dilation) == {1} and tuple(pad) == tuple(conv.kernel_size)
