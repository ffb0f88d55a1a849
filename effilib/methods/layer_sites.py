"""Where layers can be replaced or lose channels, and doing it: the network's side of layer replacement."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from effilib import surgery
from effilib.errors import BadInput, NoEffect
from effilib.methods.layer_candidates import CANDIDATES, Site, fits, parts, replacement, site_of, why_left
from effilib.seeds import stream

__all__ = ["cuttable", "replace_", "sites", "swap_"]


def _calls(model, x, context):
    """What each convolution of the model reads when it sees the images x: name -> [(shape, dtype), ...]."""
    calls, hooks = {}, []

    def note(name):
        return lambda m, inputs: calls.setdefault(name, []).append((inputs[0].shape, inputs[0].dtype))

    for name, m in model.named_modules():
        if isinstance(m, nn.modules.conv._ConvNd):
            hooks.append(m.register_forward_pre_hook(note(name)))
    try:
        with torch.no_grad(), context():
            model(x)
    finally:
        for h in hooks:
            h.remove()
    return calls


def sites(
    model: nn.Module, x: torch.Tensor, context: Callable = contextlib.nullcontext
) -> tuple[dict[str, Site], dict[str, str]]:
    """Return all plain convolutions as they meet images x.

    Two dicts: name -> `Site`, and name -> why it is never replaced. What is left alone can still lose
    channels.

    >>> found, left = sites(build("convnet", 4, (1, 8, 8), widths=(4, 8)), torch.zeros(2, 1, 8, 8))
    >>> list(found), left
    (['features.0', 'features.4'], {'features.0': 'the stem'})
    """
    calls = _calls(model, x, context)
    convs = {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd)}
    try:
        shortcuts = {n for path in surgery.trace(model).paths for n in path.shortcut}
    except BadInput:  # no structure can be read: then names have to tell
        shortcuts = {n for n in calls if {"shortcut", "downsample"} & set(n.split("."))}
    found, left = {}, {n: "it is not called in the forward pass" for n in convs if n not in calls}
    for i, (name, read) in enumerate(calls.items()):
        (N, _, *size), dtype = read[0]
        reasons = {
            "1 x 1": convs[name].kernel_size == (1, 1),
            why_left(convs[name]): True,
            "the stem": i == 0,
            "on a shortcut": name in shortcuts,
            "it is used more than once": len(read) > 1,
        }
        why = next((why for why, holds in reasons.items() if why and holds), "")
        if type(convs[name]) is nn.Conv2d and convs[name].groups == 1 and len(read) == 1:
            images = dict(N=N, H=size[0], W=size[1], dtype=str(dtype).removeprefix("torch."), first=i == 0)
            found[name] = site_of(convs[name], **images)
            if not why and not any(fits(c, found[name]) for c in CANDIDATES):
                why = "no candidate does fewer products"
        if why:
            left[name] = why
    return found, left


def cuttable(model: nn.Module, found: dict[str, Site]) -> list[surgery.Node]:
    """Return the channel nodes that can be cut.

    Sites write them, and sites and linear layers read them. None where the network's structure cannot be
    read.

    >>> net = build("convnet", 4, (1, 8, 8), widths=(4, 8))
    >>> [node.name for node in cuttable(net, sites(net, torch.zeros(2, 1, 8, 8))[0])]
    ['features.0', 'features.4']
    """
    try:
        nodes = surgery.trace(model).nodes
    except BadInput:
        return []
    known = {*found, *(n for n, m in model.named_modules() if type(m) is nn.Linear)}
    return [n for n in nodes if {*n.producers, *n.consumers} <= known and {*n.producers} <= {*found}]


def replace_(model: nn.Module, plan: dict, seed: int = 0, *, trained: bool = False) -> list[str]:
    """Cut and replace what a plan names, in place.

    New layers are drawn from `seed`. plan: "layers" (name -> candidate), "widths" (channel node -> channels,
    the first ones), "norm" (BatchNorm within new layers; default: if the network has one). Returns the names.
    Where channels are cut, outgoing weights grow so that the next layer's outputs keep their spread. trained:
    take the best linear factorisation of the weights that are there instead; nothing can be cut then.

    Raises `NoEffect` for an empty plan and `BadInput` for one of another network, or of a layer that no
    candidate can stand for (dilated, grouped, another padding); the network then stays as it was.

    >>> net = build("convnet", 4, (1, 8, 8), widths=(4, 8))
    >>> replace_(net, {"layers": {"features.4": "dwsep"}, "widths": {"features.0": 2}})
    ['features.0', 'features.4']
    >>> net.features[0].out_channels, type(net.features[4]).__name__
    (2, 'Replacement')
    """
    layers, widths = plan.get("layers", {}), plan.get("widths", {})
    norm = plan.get("norm", any(isinstance(m, nn.BatchNorm2d) for m in model.modules()))
    if not layers and not widths:
        raise NoEffect("layer replacement: the plan replaces no layer")
    if trained and widths:
        raise BadInput("layer replacement: a plan that cuts channels does not keep what was trained")
    nodes = [(surgery.trace(model)[name], w) for name, w in widths.items()]  # refuses what cannot be changed
    for node, w in nodes:
        if isinstance(w, bool) or not isinstance(w, int) or not 0 < w <= node.width:
            raise BadInput(f"the plan gives {node.name} {w} channels; it has {node.width}")
    convs, seen = {}, [m for _, m in model.named_modules(remove_duplicate=False)]
    for name, candidate in layers.items():
        convs[name] = conv = dict(model.named_modules()).get(name)
        why = "no layer has that name" if conv is None else why_left(conv)
        if not why and seen.count(conv) > 1:
            why = "it is used more than once"
        if why:
            raise BadInput(f"the plan replaces {name} of this {type(model).__name__}: {why}")
        C = next((w for n, w in nodes if name in n.consumers), conv.in_channels)
        O = next((w for n, w in nodes if name in n.producers), conv.out_channels)  # noqa: E741
        parts(candidate, replace(site_of(conv), C=C, O=O))
    for node, w in nodes:
        surgery.select_(node, range(w), share=torch.full((w,), math.sqrt(node.width / w)))
    for name, candidate in layers.items():
        conv = convs[name]
        g, given = stream(seed, f"{name}/{candidate}"), conv if trained else None
        new = replacement(candidate, site_of(conv), g, norm=norm, conv=given)
        swap_(model, name, new.to(conv.weight.device, conv.weight.dtype).train(model.training))
    return [*widths, *layers]


def swap_(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put a module into a model, in place; return the old one.

    >>> net = nn.Sequential(nn.ReLU())
    >>> swap_(net, "0", nn.Tanh()), net[0]
    (ReLU(), Tanh())
    """
    holder, _, last = name.rpartition(".")
    holder = model.get_submodule(holder)
    old = getattr(holder, last)
    setattr(holder, last, module)
    return old
