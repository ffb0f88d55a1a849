"""The search for layers under a time budget: damage, survey, and the choice of a plan.

It is a knapsack problem whose times hang together, as a cut saves in the layers before and behind it. So it
is filled move by move, the least damage a saved second first (NetAdapt, Yang et al. 2018, arXiv:1804.03230).
"""

import contextlib
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from effilib import seeds
from effilib.errors import BadInput, NoEffect
from effilib.methods.layer_candidates import CANDIDATES, ORIGINAL, fits, passes, replacement
from effilib.methods.layer_latency import Setting, between, latencies, train_step
from effilib.methods.layer_sites import cuttable, sites, swap_
from effilib.recipe import LAYOUTS
from effilib.seeds import stream

__all__ = ["fisher_potential", "foresee", "pick", "potentials", "survey"]


def fisher_potential(A: torch.Tensor, dA: torch.Tensor) -> float:
    """Return the Fisher potential of a layer's output.

    A, dA: (N, C, H, W), output and gradient; sum_c 1/2 mean_n (sum_ij A dA)^2; never negative.

    >>> fisher_potential(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))  # 4^2 / 2
    8.0
    """
    return (A.detach().float() * dA.float()).sum((2, 3)).square().mean(0).sum().item() / 2


def potentials(
    model: nn.Module,
    names: Sequence[str],
    x: torch.Tensor,
    y: torch.Tensor,
    context: Callable = contextlib.nullcontext,
) -> dict[str, float]:
    """Return the Fisher potential of named layers on one batch.

    By name. Layers that the pass does not reach have 0.

    >>> net = build("convnet", 4, (1, 8, 8), widths=(4, 8))
    >>> found = potentials(net, ["features.4"], torch.rand(8, 1, 8, 8), torch.arange(8) % 4)
    >>> found["features.4"] > 0
    True
    """
    outputs, hooks = {}, []
    for name in names:
        keep = lambda m, inputs, out, name=name: outputs.update({name: out})  # noqa: E731
        hooks.append(model.get_submodule(name).register_forward_hook(keep))
    try:
        with context():
            loss = F.cross_entropy(model(x).float(), y)
    finally:
        for h in hooks:
            h.remove()
    outputs = {n: out for n, out in outputs.items() if out.requires_grad}  # else all before it is frozen
    gradients = torch.autograd.grad(loss, list(outputs.values()), allow_unused=True)
    found = {
        n: fisher_potential(outputs[n], g) for n, g in zip(outputs, gradients, strict=True) if g is not None
    }
    return {n: found.get(n, 0.0) for n in names}


def survey(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    setting: Setting,
    *,
    candidates: Sequence[str] = CANDIDATES,
    block: int = 16,
    seed: int = 0,
) -> dict:
    """Measure what candidates and cuts take and damage, and the step.

    The model is left as it was. x, y: one batch of training images, in the layout of
    training. block: nodes lose so many channels at a time, at most half of them (0: none). Damage is the loss
    of potential as a share of the network's, and at least that of a cut to what `passes`.

    Returns plain values: "layers" (name -> candidate -> "seconds", "damage", "flops"), "corners" (name ->
    seconds as `between` takes them), "potential" (name -> its share), "nodes" (name -> "widths", from all on,
    "writes", "reads"), "left" (name -> why), "step" (seconds), "norm", "cached". Raises `NoEffect` where
    nothing can be replaced or cut.

    >>> net, x, y = build("convnet", 4, (1, 8, 8), widths=(4, 8)), torch.rand(8, 1, 8, 8), torch.arange(8) % 4
    >>> found = survey(net, x, y, Setting(repeats=3), candidates=("dwsep",), block=2)
    >>> list(found["layers"]["features.4"]), found["nodes"]["features.0"]["widths"]
    (['conv', 'dwsep'], [4, 2])
    """
    net = copy.deepcopy(model).train()
    found, left = sites(net, x, setting.context)
    norm = any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    nodes = {
        n.name: {"widths": widths, "writes": n.producers, "reads": [r for r in n.consumers if r in found]}
        for n in cuttable(net, found)
        if block and len(widths := list(range(n.width, math.ceil(n.width / 2) - 1, -block))) > 1
    }
    wanted = {s: [ORIGINAL] for s in found.values()}
    for name, s in found.items():
        if name not in left:
            wanted[s] = [ORIGINAL, *(c for c in candidates if fits(c, s))]
    if not nodes and all(len(names) == 1 for names in wanted.values()):
        reasons = "; ".join(f"{n}: {why}" for n, why in left.items()) or "it has no convolution"
        raise NoEffect(
            f"layer replacement: {type(model).__name__} has no layer that can be replaced ({reasons})"
        )
    corners = {name: _corners(name, s, nodes) for name, s in found.items()}
    for s in {s for four in corners.values() for pair in four for s in pair}:
        wanted.setdefault(s, [ORIGINAL])
    seconds, cached = latencies(wanted, setting, norm=norm)
    few = x[:64], y[:64]
    with seeds.seeded(stream(seed, "survey").initial_seed(), setting.device):  # dropout draws globally
        before = potentials(net, list(found), *few, setting.context)
        whole = sum(before.values()) or 1.0
        layers = {}
        for name, s in found.items():
            full = seconds[s][ORIGINAL]
            choices = {c: t for c, t in seconds[s].items() if name not in left or c == ORIGINAL}
            layers[name] = {c: {"seconds": t, "damage": 0.0, "flops": s.flops(c)} for c, t in choices.items()}
            for c in [c for c, t in choices.items() if t < full]:  # no other is ever taken
                new = replacement(c, s, stream(seed, f"{name}/{c}"), norm=norm)
                old = swap_(net, name, new.to(x.device, memory_format=LAYOUTS[setting.layout]))
                after = potentials(net, [name], *few, setting.context)[name]
                lost = max(before[name] - after, (1 - passes(c, s)) * before[name])
                layers[name][c]["damage"] = lost / whole
                swap_(net, name, old)
        step = min(setting.interleaved({"step": train_step(net, x, y, setting)})["step"])
    return {
        "layers": layers,
        "corners": {
            n: [[seconds[s][ORIGINAL] for s in pair] for pair in four] for n, four in corners.items()
        },
        "potential": {n: p / whole for n, p in before.items()},
        "nodes": nodes,
        "left": left,
        "step": step,
        "norm": norm,
        "cached": cached,
    }


def _corners(name, site, nodes):
    """The sites of a layer with the fewest and with all channels: [read][written]."""
    ends = [(site.C, site.C), (site.O, site.O)]
    for node in nodes.values():
        for side, names in enumerate((node["reads"], node["writes"])):
            if name in names:
                ends[side] = (node["widths"][-1], node["widths"][0])
    (few, many), written = ends
    return [[replace(site, C=read, O=write) for write in written] for read in (few, many)]


def foresee(found: dict, plan: dict) -> tuple[float, float]:
    """Return (seconds of a step, damage) of a plan, from a survey.

    A layer with shares u of what it reads and v of what it writes, replaced by c, takes t(u, v) t_c / t and
    loses (1 - v) p + v d_c of its potential p. The rest of the step is taken to stay.

    >>> layer = {"conv": {"seconds": 4.0, "damage": 0.0}, "dwsep": {"seconds": 1.0, "damage": 0.1}}
    >>> found = {"layers": {"a": layer}, "nodes": {}, "corners": {}, "potential": {"a": 0.5}, "step": 10.0}
    >>> foresee(found, {"layers": {"a": "dwsep"}, "widths": {}})
    (7.0, 0.1)
    """
    seconds, damage = found["step"], 0.0
    far = {name: [1.0, 1.0] for name in found["layers"]}  # between fewest and all channels read, written
    share = dict.fromkeys(found["layers"], 1.0)
    for node, width in plan["widths"].items():
        widths, touched = found["nodes"][node]["widths"], found["nodes"][node]
        for side, names in enumerate((touched["reads"], touched["writes"])):
            for name in names:
                far[name][side] = (width - widths[-1]) / (widths[0] - widths[-1])
        share |= dict.fromkeys(touched["writes"], width / widths[0])
    for name, choices in found["layers"].items():
        chosen, whole = choices[plan["layers"].get(name, ORIGINAL)], choices[ORIGINAL]["seconds"]
        narrowed = between(found["corners"][name], *far[name]) if far[name] != [1.0, 1.0] else whole
        seconds += narrowed * chosen["seconds"] / whole - whole
        p = found["potential"][name]
        damage += (1 - share[name]) * p + share[name] * chosen["damage"]
    return seconds, damage


def pick(found: dict, budget: float) -> dict:
    """Choose a plan from a survey, within a budget.

    Little damage within `budget` of the step's time, as foreseen. Move by move, the least damage a saved
    second first; then what became superfluous is undone, the most damaging first. A move is another candidate
    for a layer, or a block of channels less at a node. Where the budget cannot be reached, the plan has the
    fastest of all, and its note says so.

    >>> layer = {"conv": {"seconds": 4.0, "damage": 0.0}, "dwsep": {"seconds": 1.0, "damage": 0.1}}
    >>> found = {"layers": {"a": layer}, "nodes": {}, "corners": {}, "potential": {"a": 0.5}, "step": 10.0}
    >>> plan = pick(found | {"norm": True}, budget=0.8)
    >>> plan["layers"], plan["foreseen"]
    ({'a': 'dwsep'}, 0.7)
    """
    if not 0 < budget < 1:
        raise BadInput(f"the budget is {budget}: it is a share of the step's time, above 0 and below 1")
    plan, note, limit = {"layers": {}, "widths": {}}, "", budget * found["step"] * (1 + 1e-9)
    seconds, damage = foresee(found, plan)
    while seconds > limit:
        moves = [(m, *foresee(found, m)) for m in _moves(found, plan)]
        moves = [
            ((d - damage) / (seconds - t), t - seconds, i) for i, (_, t, d) in enumerate(moves) if t < seconds
        ]
        if not moves:
            share = seconds / found["step"]
            note = (
                f"a budget of {budget:g} cannot be reached: the fastest layers leave {share:.2f} of the step"
            )
            break
        plan = list(_moves(found, plan))[min(moves)[2]]
        seconds, damage = foresee(found, plan)
    while undone := [p for p in _undone(found, plan) if foresee(found, p)[0] <= limit]:
        plan = min(undone, key=lambda p: foresee(found, p)[1])
    foreseen = foresee(found, plan)[0] / found["step"]
    return {**plan, "norm": found["norm"], "budget": budget, "foreseen": foreseen, "note": note}


def _moves(found, plan):
    """The plans that are one move further."""
    for name, choices in found["layers"].items():
        for c in choices:
            if c not in (ORIGINAL, plan["layers"].get(name)):
                yield {**plan, "layers": plan["layers"] | {name: c}}
    for name, node in found["nodes"].items():
        for width in [w for w in node["widths"] if w < plan["widths"].get(name, node["widths"][0])][:1]:
            yield {**plan, "widths": plan["widths"] | {name: width}}


def _undone(found, plan):
    """The plans without one of its moves."""
    for name in plan["layers"]:
        yield {**plan, "layers": {n: c for n, c in plan["layers"].items() if n != name}}
    for name, width in plan["widths"].items():
        wider = [w for w in found["nodes"][name]["widths"] if w > width][-1:]
        rest = {n: w for n, w in plan["widths"].items() if n != name}
        yield {
            **plan,
            "widths": rest | ({name: wider[0]} if wider != found["nodes"][name]["widths"][:1] else {}),
        }
