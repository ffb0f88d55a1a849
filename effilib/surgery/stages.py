"""A network's stages: layers whose maps have the same size, what can become wider in them, and where they can
become deeper.

Where there are residual paths, a stage is a trunk with all that lies on its paths; other layers go by the
size of their maps. A layout holds plain values only and goes into checkpoints: `of` (layer -> number of its
stage), `holders` (per stage, the Sequential of its blocks, "" for plain layers) and `pixels` (per stage, of a
map)."""

from functools import partial

import torch
from torch import nn

from effilib import cost, surgery
from effilib.convolution import probe
from effilib.errors import BadInput
from effilib.networks import Constant
from effilib.surgery.channels import Node, Structure

__all__ = [
    "ALWAYS",
    "carry",
    "deepenable",
    "depth",
    "find",
    "flops",
    "follow",
    "members",
    "names",
    "owners",
    "paths",
    "stage_of",
    "table",
    "widenable",
]

ALWAYS = -(10**6)  # epoch of birth of the channels that were there from the start


def find(model: nn.Module, shape: tuple[int, int, int]) -> dict:
    """Return the layout of a network on images (C, H, W) = `shape`.

    >>> layout = find(build("resnet", 4, (1, 8, 8), widths=(8, 16), blocks=(1, 1)), (1, 8, 8))
    >>> layout["holders"], layout["pixels"]
    (['stages.0', 'stages.1'], [64, 16])
    """
    found = surgery.trace(model)
    everything, sizes, keys = [*found.nodes, *found.refused], _sizes(model, shape), {}
    for path in found.paths:
        trunk = next(n for n in everything if path.convs[-1] in n.producers)
        for node in (trunk, *found.inner(path)):
            keys[node.name] = trunk.name
    order = list(dict.fromkeys(keys.get(n.name, sizes.get(n.producers[-1])) for n in found.nodes))
    layout = {"of": {}, "holders": [""] * len(order), "pixels": [1] * len(order)}
    for node in found.nodes:
        i = order.index(keys.get(node.name, sizes.get(node.producers[-1])))
        layout["of"].update(dict.fromkeys(node.producers, i))
        layout["pixels"][i] = max(1, sizes.get(node.producers[-1], 1))
    for path in found.paths:
        if path.convs[-1] in layout["of"]:
            layout["holders"][layout["of"][path.convs[-1]]] = path.name.rpartition(".")[0]
    return layout


def names(layout: dict) -> list[str]:
    """Return the stages' names, in the order of the forward pass.

    >>> names(find(build("convnet", 4, (1, 8, 8), widths=(4, 8)), (1, 8, 8)))
    ['stage 1', 'stage 2']
    """
    return [f"stage {i + 1}" for i in range(len(layout["pixels"]))]


def _sizes(model, shape):
    """Pixels of what every convolution and linear layer writes: name -> number."""
    found, hooks = {}, []
    for name, m in model.named_modules():
        if isinstance(m, surgery.CONVS):
            hook = m.register_forward_hook(
                lambda m, inputs, output, name=name: found.__setitem__(name, output[0, 0].numel())
            )
            hooks.append(hook)
    p = next(model.parameters())
    probe(model, torch.zeros(1, *shape, device=p.device, dtype=p.dtype), hooks)
    return found


def stage_of(node: Node, layout: dict) -> int | None:
    """Return the number of a node's stage, None if it has none.

    Any producer tells: the first may be gone with its path.

    >>> net = build("resnet", 4, (1, 8, 8), widths=(8, 16), blocks=(1, 1))
    >>> stage_of(surgery.trace(net)["stages.1.0.conv1"], find(net, (1, 8, 8)))
    1
    """
    return next((layout["of"][p] for p in node.producers if p in layout["of"]), None)


def members(structure: Structure, layout: dict, stage: int) -> list[Node]:
    """Return the nodes of a stage (its number).

    >>> net = build("resnet", 4, (1, 8, 8), widths=(8, 16), blocks=(1, 1))
    >>> [node.name for node in members(surgery.trace(net), find(net, (1, 8, 8)), 1)]
    ['stages.1.0.conv1', 'stages.1.0.conv2']
    """
    return [n for n in structure.nodes if stage_of(n, layout) == stage]


def paths(structure: Structure, layout: dict, stage: int) -> list:
    """Return the residual paths of a stage.

    >>> net = build("resnet", 4, (1, 8, 8), widths=(8, 16), blocks=(1, 2))
    >>> [path.name for path in paths(surgery.trace(net), find(net, (1, 8, 8)), 1)]
    ['stages.1.0', 'stages.1.1']
    """
    return [p for p in structure.paths if layout["of"].get(p.convs[-1]) == stage]


def depth(structure: Structure, layout: dict, stage: int) -> int:
    """Count the residual paths of a stage; of a plain one its layers.

    >>> net = build("resnet", 4, (1, 8, 8), widths=(8, 16), blocks=(1, 2))
    >>> depth(surgery.trace(net), find(net, (1, 8, 8)), 1)
    2
    """
    return len((paths if layout["holders"][stage] else members)(structure, layout, stage))


def widenable(structure: Structure, layout: dict, stage: int, trunk: bool = False) -> list[Node]:
    """Return the nodes that become wider with a stage.

    They are those inside of its residual paths, with `trunk` the trunk too; of a plain stage all.

    >>> net = build("resnet", 4, (1, 8, 8), widths=(8, 16), blocks=(1, 1))
    >>> [node.name for node in widenable(surgery.trace(net), find(net, (1, 8, 8)), 1)]  # without the trunk
    ['stages.1.0.conv1']
    """
    nodes = members(structure, layout, stage)
    if not layout["holders"][stage] or trunk:
        return nodes
    inner = {n.name for path in paths(structure, layout, stage) for n in structure.inner(path)}
    return [n for n in nodes if n.name in inner]


def deepenable(model: nn.Module, layout: dict, stage: int) -> str:
    """Return the layer or block that a new one can follow.

    It is the stage's last block, or its last ReLU in a Sequential. Raises `BadInput` if there is none.

    >>> net = build("resnet", 4, (1, 8, 8), widths=(8, 16), blocks=(1, 1))
    >>> deepenable(net, find(net, (1, 8, 8)), 1)
    'stages.1.0'
    """
    holder = layout["holders"][stage]
    if holder:
        blocks = model.get_submodule(holder)
        if isinstance(blocks, nn.Sequential):
            return f"{holder}.{list(blocks._modules)[-1]}"
        raise BadInput(
            f"{names(layout)[stage]}: its blocks do not lie in a Sequential, so that none can follow"
        )
    last = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and layout["of"].get(n) == stage]
    parent, _, child = last[-1].rpartition(".") if last else ("", "", "")
    siblings = model.get_submodule(parent)
    if last and isinstance(siblings, nn.Sequential):
        layers = list(siblings._modules.items())
        for name, m in layers[list(siblings._modules).index(child) + 1 :]:
            if isinstance(m, nn.ReLU):
                return f"{parent}.{name}".lstrip(".")
            if not isinstance(m, surgery.NORMS):
                break
    raise BadInput(
        f"{names(layout)[stage]}: no ReLU in a Sequential follows its last layer, so that no other can"
    )


def follow(layout: dict, before: dict, model: nn.Module, stage: int | None = None) -> dict:
    """Return the layout after surgery.

    before: module -> its name then, for layers are renumbered. New layers belong to `stage`.

    >>> net = build("resnet", 4, (1, 8, 8), widths=(8, 16), blocks=(1, 1))
    >>> layout, before = find(net, (1, 8, 8)), {m: name for name, m in net.named_modules()}
    >>> new = surgery.append_block_(net, "stages.1.0", x=torch.rand(2, 1, 8, 8))
    >>> follow(layout, before, net, stage=1)["of"][f"{new}.conv1"]
    1
    """
    of = {}
    for name, m in model.named_modules():
        if isinstance(m, surgery.CONVS):
            place = layout["of"].get(before[m]) if m in before else stage
            if place is not None:
                of[name] = place
    return {**layout, "of": of}


def table(structure: Structure) -> dict:
    """Return the table of channels as it begins, by node's name.

    At an epoch's end it holds of every channel its epoch of birth, whether it lives, and its strength.

    >>> table(surgery.trace(build("convnet", 4, (1, 8, 8), widths=(2, 4))))["features.0"]["alive"]
    [True, True]
    """
    return {
        n.name: {"born": [ALWAYS] * n.width, "alive": [True] * n.width, "strength": [0.0] * n.width}
        for n in structure.nodes
    }


def owners(structure: Structure) -> dict:
    """Return producer -> its node's name.

    >>> owners(surgery.trace(build("resnet", 4, (1, 8, 8), widths=(8,), blocks=(1,))))
    {'stem': 'stem', 'stages.0.0.conv2': 'stem', 'stages.0.0.conv1': 'stages.0.0.conv1'}
    """
    return {p: n.name for n in structure.nodes for p in n.producers}


def carry(channels: dict, owners: dict, before: dict, structure: Structure, cuts: dict, epoch: int) -> tuple:
    """Return the table of channels after surgery, and the births.

    owners, before: as the network was before it, see `owners` and `follow`; structure: as it is now. cuts: a
    node's name before it -> the indices kept. Further channels of a node, and those of a new node, were born
    in this epoch.

    >>> net = build("convnet", 4, (1, 8, 8), widths=(2, 4))
    >>> then, before = surgery.trace(net), {m: name for name, m in net.named_modules()}
    >>> channels, of = table(then), owners(then)
    >>> surgery.select_(surgery.trace(net)["features.0"], [0, 1, 1])
    >>> channels, new = carry(channels, of, before, surgery.trace(net), {}, epoch=3)
    >>> channels["features.0"]["born"][-1], new
    (3, 1)
    """
    found, new = {}, 0
    for node in structure.nodes:
        layers = {m: p for p, m in zip(node.producers, map(node.layer, node.producers), strict=True)}
        old = next((owners[before[m]] for m in layers if before.get(m) in owners), None)
        noted = channels.get(old, {"born": [], "alive": [], "strength": []})
        then = [before.get(m, p) for m, p in layers.items() if m in before or isinstance(m, Constant)]
        index = next(
            (cuts[p] for p in then if p in cuts), None
        )  # what stands for a removed path may have given the node its name
        if index is not None:
            noted = {k: [v[i] for i in index.tolist()] for k, v in noted.items()}
        more = node.width - len(noted["born"])
        fresh = {"born": [epoch] * more, "alive": [True] * more, "strength": [0.0] * more}
        found[node.name] = {k: [*v, *fresh[k]] for k, v in noted.items()}
        new += more
    return found, new


def flops(model: nn.Module, shape: tuple[int, int, int]) -> dict[str, int]:
    """Count the FLOPs of each layer (its name) in a training step.

    They are for one image (C, H, W) = `shape`, three times those of its forward pass by PyTorch's counter: of
    layers that surgery refuses, too.

    >>> net = build("convnet", 4, (1, 8, 8), widths=(2, 4))
    >>> flops(net, (1, 8, 8))["features.4"]  # 6 x 72 weights x 16 pixels
    6912
    """
    found, p, hooks = {}, next(model.parameters()), []
    with cost.Counter() as counter:

        def begin(m, inputs, name):
            found[name] = found.get(name, 0) - counter.flops

        def end(m, inputs, output, name):
            found[name] += counter.flops

        for name, m in model.named_modules():
            if next(m.parameters(recurse=False), None) is not None:
                hooks.append(m.register_forward_pre_hook(partial(begin, name=name)))
                hooks.append(m.register_forward_hook(partial(end, name=name)))
        probe(model, torch.zeros(1, *shape, device=p.device, dtype=p.dtype), hooks)
    return {name: 3 * n for name, n in found.items()}
