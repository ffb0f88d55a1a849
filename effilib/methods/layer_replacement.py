"""Layer replacement under a time budget: the second half of chapter 6.4.

The thesis' word taken literally. Each 3x3 convolution may be replaced by a cheaper structure. What that saves
is *measured*, per layer, as a training step in the real number format and layout, for FLOPs promise more than
they keep. What it may cost is scored: before training by the Fisher potential (Turner et al. 2020, BlockSwap,
arXiv:1906.04113), for a trained network by the part of its weights that the cheaper structure cannot hold. A
multiple-choice knapsack finds the least damage that fits the budget. A guard then rebuilds the network,
measures its whole training step, and takes back what did not pay.

The outcome is a plan, plain values that go into JSON: the same seed and the same plan give the same weights.
"""

import contextlib
import copy
import json
import math
import os
import statistics as stats
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from effilib import clock, models, paths, provenance, surgery
from effilib.clock import Stopwatch, interleaved
from effilib.data import Batches, Dataset
from effilib.errors import BadInput, NoEffect, choose
from effilib.methods import Info
from effilib.tasks import Task
from effilib.training import (
    LAYOUTS,
    History,
    Recipe,
    autocast,
    resolve_layout,
    resolve_precision,
    stream,
    train,
)

__all__ = [
    "LayerReplacement", "Replacement", "Setting", "Site", "factors", "fisher_potential", "fits", "guard",
    "knapsack", "latencies", "parts", "pick", "potentials", "replace_", "replacement", "say", "sites",
    "spectral", "survey",
]  # fmt: skip

INFO = Info(
    name="Resource-aware layer replacement",
    name_de="Ressourcenbewusste Schichten",
    chapter="6.4",
    paper="Park et al. 2019, arXiv:1901.05803",
    claim="Placing layers by the resources that they use shortens distributed training without loss of "
    "accuracy (the paper). Replacement: with layers chosen under a budget of 0.6 of a step's time a "
    "network reaches the same accuracy 1.43x as fast, search included.",
    cost_model="A k x k convolution of C to O channels does k^2 C O products a pixel; depthwise-separable "
    "k^2 C + C O, in g groups k^2 C^2 / g + C O, a bottleneck (C^2 + k^2 C O / r + O^2) / r, of low rank d "
    "k^2 C d + d O, spatial k d (C + O).",
)

# From the least saving to the most at equal widths; where two do equal damage, the earlier one is taken.
CANDIDATES = (
    "lowrank/2",
    "group/4",
    "bneck/2",
    "spatial/2",
    "lowrank/4",
    "group/8",
    "spatial/4",
    "dwsep",
    "bneck/4",
)
ORIGINAL = "conv"
# BatchNorm and ReLU between their parts, as in BlockSwap; the others factorise W
ACTIVATED = ("dwsep", "group", "bneck")


# The candidates


@dataclass(frozen=True, kw_only=True)
class Site:
    """Describe a convolution where it stands.

    C -> O channels, its geometry, and the images that it reads, (N, C, H, W) of `dtype`.

    >>> site = Site(C=16, O=32, kernel=(3, 3), stride=(1, 1), padding=(1, 1), H=8, W=8)
    >>> site.flops(), site.flops("dwsep")
    (589824, 83968)
    """

    C: int
    O: int  # noqa: E741  (the literature's symbol)
    kernel: tuple
    stride: tuple
    padding: tuple
    bias: bool = False
    N: int = 1
    H: int = 1
    W: int = 1
    dtype: str = "float32"

    def flops(self, candidate: str = ORIGINAL) -> int:
        """Return the FLOPs of the forward pass of a candidate on this site's images."""
        total, (H, W) = 0, (self.H, self.W)
        for C, O, k, s, p, g in parts(candidate, self):  # noqa: E741
            H, W = ((n + 2 * b - a) // c + 1 for n, a, b, c in zip((H, W), k, p, s, strict=True))
            total += 2 * self.N * O * H * W * (C // g) * k[0] * k[1]
        return total


def parts(candidate: str, site: Site) -> list[tuple]:
    """Return a candidate's convolutions: (C, O, kernel, stride, padding, groups) each.

    Raises `BadInput` for an unknown or unfitting one.

    >>> site = Site(C=16, O=32, kernel=(3, 3), stride=(1, 1), padding=(1, 1))
    >>> [(C, O, kernel, groups) for C, O, kernel, _, _, groups in parts("dwsep", site)]
    [(16, 16, (3, 3), 16), (16, 32, (1, 1), 1)]
    """
    kind, _, number = candidate.partition("/")
    choose("candidate", kind, (ORIGINAL, "dwsep", "group", "bneck", "lowrank", "spatial"))
    C, O, k, s, p, r = site.C, site.O, site.kernel, site.stride, site.padding, int(number or 1)  # noqa: E741
    point = ((1, 1), (1, 1), (0, 0), 1)
    if kind == ORIGINAL:
        return [(C, O, k, s, p, 1)]
    if (kind == "group" and C % r) or min(C, O) // r < 1:
        raise BadInput(f"candidate {candidate} does not fit {C} -> {O} channels")
    if kind in ("dwsep", "group"):
        return [(C, C, k, s, p, C if kind == "dwsep" else r), (C, O, *point)]
    if kind == "bneck":
        return [(C, C // r, *point), (C // r, O // r, k, s, p, 1), (O // r, O, *point)]
    if kind == "lowrank":
        return [(C, O // r, k, s, p, 1), (O // r, O, *point)]
    return [(C, O // r, (k[0], 1), (s[0], 1), (p[0], 0), 1), (O // r, O, (1, k[1]), (1, s[1]), (0, p[1]), 1)]


def fits(candidate: str, site: Site) -> bool:
    """Return whether a candidate can stand at a site and does fewer products there.

    >>> site = Site(C=16, O=32, kernel=(3, 3), stride=(1, 1), padding=(1, 1), H=8, W=8)
    >>> fits("group/4", site), fits("group/3", site)  # 3 does not divide 16
    (True, False)
    """
    try:
        return site.flops(candidate) < site.flops()
    except BadInput:
        return False


class Replacement(nn.Sequential):
    """Stand for a convolution; read and write the same channels.

    >>> module = Replacement(nn.Conv2d(4, 2, 3), nn.Conv2d(2, 8, 1))
    >>> module.in_channels, module.out_channels
    (4, 8)
    """

    @property
    def in_channels(self):
        """Return how many channels it reads."""
        return self[0].in_channels

    @property
    def out_channels(self):
        """Return how many channels it writes."""
        return self[-1].out_channels


def replacement(
    candidate: str,
    site: Site,
    generator: torch.Generator | None = None,
    *,
    norm: bool = True,
    conv: nn.Conv2d | None = None,
) -> Replacement:
    """Return a candidate for a site, a module of the same input and output shapes.

    Weights are He-normal (fan in; gain 1 where no ReLU follows within), drawn from `generator`. norm:
    BatchNorm between the parts of a candidate that has ReLUs there. conv: a trained convolution; then the
    parts are its best linear factorisation, with neither.

    >>> site = Site(C=16, O=32, kernel=(3, 3), stride=(1, 1), padding=(1, 1))
    >>> replacement("bneck/2", site)(torch.zeros(1, 16, 8, 8)).shape
    torch.Size([1, 32, 8, 8])
    """
    geometry, layers = parts(candidate, site), []
    given = factors(conv.weight.detach(), candidate) if conv is not None else None
    activated = candidate.split("/")[0] in ACTIVATED and given is None
    for i, (C, O, k, s, p, g) in enumerate(geometry):  # noqa: E741
        last = i == len(geometry) - 1
        layer = nn.utils.skip_init(
            nn.Conv2d, C, O, k, s, p, groups=g, bias=site.bias and last
        )  # draws nothing from global state
        with torch.no_grad():
            if given:
                layer.weight.copy_(given[i])
            else:
                nn.init.kaiming_normal_(
                    layer.weight, nonlinearity="relu" if last or activated else "linear", generator=generator
                )
            if layer.bias is not None:
                layer.bias.copy_(conv.bias) if given else layer.bias.zero_()
        layers.append(layer)
        if activated and not last:
            layers += [nn.BatchNorm2d(O)] * norm + [nn.ReLU(inplace=True)]
    return Replacement(*layers)


# Damage


def halves(M, d):
    """Return (L, R) with L R the best approximation of M (..., m, n) of rank d.

    The singular values are shared out evenly.

    >>> L, R = halves(torch.diag(torch.tensor([9.0, 4.0, 1.0])), 2)
    >>> [[round(abs(v), 3) for v in row] for row in (L @ R).tolist()]
    [[9.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 0.0]]
    """
    U, S, V = torch.linalg.svd(M, full_matrices=False)
    short = max(0, d - S.shape[-1])  # M may have fewer directions than the candidate has room for
    U, S, V = F.pad(U, (0, short)), F.pad(S, (0, short)), F.pad(V, (0, 0, 0, short))
    root = S[..., :d].sqrt()
    return U[..., :d] * root[..., None, :], root[..., :, None] * V[..., :d, :]


def matrix(W, candidate):
    """Return (M, d): the matrix, or a stack of them, that a candidate holds at rank d.

    W: the filters, (O, C, kh, kw).

    >>> M, d = matrix(torch.ones(8, 4, 3, 3), "lowrank/2")
    >>> M.shape, d
    (torch.Size([8, 36]), 4)
    """
    (O, C, kh, kw), (kind, _, number) = W.shape, candidate.partition("/")  # noqa: E741
    r = int(number or 1)
    if kind == "lowrank":
        return W.reshape(O, -1), O // r
    if kind == "spatial":
        return W.permute(1, 2, 0, 3).reshape(C * kh, O * kw), O // r
    groups = C if kind == "dwsep" else r
    return W.reshape(O, groups, -1).transpose(0, 1), C // groups  # (g, O, C/g kh kw)


def factors(W: torch.Tensor, candidate: str) -> list[torch.Tensor]:
    """Return weights of a candidate's parts whose product comes nearest to the filters W.

    W: (O, C, kh, kw). Linear parts, without BatchNorm and ReLU. Truncated singular value decompositions of
    `matrix`; a bottleneck takes the leading directions of either side (HOSVD, near the best).

    >>> [w.shape for w in factors(torch.rand(8, 4, 3, 3), "lowrank/2")]
    [torch.Size([4, 4, 3, 3]), torch.Size([8, 4, 1, 1])]
    """
    W = W.float()
    (O, C, kh, kw), (kind, _, number) = W.shape, candidate.partition("/")  # noqa: E741
    if kind == "bneck":
        out, into = (_leading(M.flatten(1), len(M) // int(number)) for M in (W, W.transpose(0, 1)))
        core = torch.einsum("ocij,on,cm->nmij", W, out, into)
        return [into.T[..., None, None], core, out[..., None, None]]
    L, R = halves(*matrix(W, candidate))
    if kind == "lowrank":
        return [R.reshape(-1, C, kh, kw), L.reshape(O, -1, 1, 1)]
    if kind == "spatial":
        return [
            L.reshape(C, kh, -1).permute(2, 0, 1)[..., None],
            R.reshape(-1, O, kw).transpose(0, 1)[:, :, None],
        ]
    return [R.reshape(C, -1, kh, kw), L.transpose(0, 1).reshape(O, C, 1, 1)]  # dwsep, group


def _leading(M, d):
    """The d leading left singular vectors of M (m, n): (m, d)."""
    return torch.linalg.svd(M, full_matrices=M.shape[0] > M.shape[1]).U[:, :d]


def spectral(W: torch.Tensor, candidate: str) -> float:
    """Return the share of ||W|| that a candidate cannot hold, 0..1.

    The relative tail of the spectrum, sqrt(sum_{i>d} sigma_i^2 / sum sigma_i^2).

    >>> round(spectral(torch.ones(8, 4, 3, 3), "lowrank/2"), 2)  # of rank 1: nothing is lost
    0.0
    """
    W = W.detach().float()
    if candidate == ORIGINAL:
        return 0.0
    if candidate.startswith("bneck"):
        core = factors(W, candidate)[1]  # keeps the rest: its bases are orthonormal
        lost = 1 - core.square().sum() / W.square().sum()
    else:
        M, d = matrix(W, candidate)
        lost = torch.linalg.svdvals(M)[..., d:].square().sum() / W.square().sum()
    return math.sqrt(max(0.0, float(lost)))


def fisher_potential(A: torch.Tensor, dA: torch.Tensor) -> float:
    """Return the Fisher potential of a layer's output A (N, C, H, W) with gradient dA.

    sum_c 1/2 mean_n (sum_ij A dA)^2; never negative.

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
    """Return the Fisher potential of the named layers on one batch, by name.

    Only what is needed is differentiated.

    >>> net = build("convnet", 4, (1, 8, 8), widths=(4, 8))
    >>> found = potentials(net, ["features.4"], torch.rand(8, 1, 8, 8), torch.arange(8) % 4)
    >>> found["features.4"] > 0
    True
    """
    outputs, hooks = {}, []
    for name in names:
        hooks.append(
            model.get_submodule(name).register_forward_hook(
                lambda m, i, out, name=name: outputs.update({name: out})
            )
        )
    try:
        with context():
            loss = F.cross_entropy(model(x).float(), y)
    finally:
        for h in hooks:
            h.remove()
    gradients = torch.autograd.grad(loss, [outputs[n] for n in names], allow_unused=True)
    return {
        n: 0.0 if g is None else fisher_potential(outputs[n].detach(), g)
        for n, g in zip(names, gradients, strict=True)
    }


# The budget


def knapsack(
    seconds: Sequence[Sequence[float]],
    damages: Sequence[Sequence[float]],
    limit: float,
    resolution: float = 0.005,
) -> list[int]:
    """Choose one candidate a layer: the least damage whose seconds sum up to at most `limit`.

    A multiple-choice knapsack. seconds, damages: a list per layer. Integer dynamic program over 1 /
    resolution bins; costs are rounded up, so the limit holds whatever the rounding. Returns the choice of
    each layer; of equals the first. Raises `BadInput` if nothing fits. O(L n C).

    >>> knapsack(seconds=[[4.0, 1.0], [4.0, 2.0]], damages=[[0.0, 5.0], [0.0, 1.0]], limit=6.1)
    [0, 1]
    """
    unit, n = limit * resolution, round(1 / resolution)
    costs = [[math.ceil(t / unit - 1e-9) if unit > 0 else n + 1 for t in layer] for layer in seconds]
    best, chosen = [0.0] * (n + 1), []
    for w, d in zip(costs, damages, strict=True):
        now, choice = [math.inf] * (n + 1), [None] * (n + 1)
        for b in range(n + 1):
            for c, cost in enumerate(w):
                if cost <= b and best[b - cost] + d[c] < now[b]:
                    now[b], choice[b] = best[b - cost] + d[c], c
        best = now
        chosen.append(choice)
    if math.isinf(best[n]):
        least = 1e3 * sum(map(min, seconds))
        raise BadInput(
            f"no choice of layers fits into {1e3 * limit:.3g} ms; the fastest takes {least:.3g} ms"
        )
    b, picks = n, []
    for choice, w in zip(chosen[::-1], costs[::-1], strict=True):
        picks.append(choice[b])
        b -= w[choice[b]]
    return picks[::-1]


# The network


def swap_(model, name, module):
    """Put `module` in the place `name` of `model`, in place, and return what stood there.

    >>> net = nn.Sequential(nn.ReLU())
    >>> swap_(net, "0", nn.Tanh()), net[0]
    (ReLU(), Tanh())
    """
    holder, _, last = name.rpartition(".")
    holder = model.get_submodule(holder)
    old = getattr(holder, last)
    setattr(holder, last, module)
    return old


def sites(
    model: nn.Module, x: torch.Tensor, context: Callable = contextlib.nullcontext
) -> tuple[dict[str, Site], dict[str, str]]:
    """Return the convolutions that can be replaced, and why the others cannot.

    (dict name -> `Site`, dict name -> why not), as they meet the images x.

    >>> found, left = sites(build("convnet", 4, (1, 8, 8), widths=(4, 8)), torch.zeros(2, 1, 8, 8))
    >>> list(found), left
    (['features.4'], {'features.0': 'the stem'})
    """
    calls, hooks, found, left = {}, [], {}, {}
    for name, m in model.named_modules():
        if isinstance(m, nn.modules.conv._ConvNd):
            left[name] = "it is not called in the forward pass"
            hooks.append(
                m.register_forward_pre_hook(
                    lambda m, i, name=name: calls.setdefault(name, []).append((i[0].shape, i[0].dtype))
                )
            )
    try:
        with torch.no_grad(), context():
            model(x)
    finally:
        for h in hooks:
            h.remove()
    try:
        shortcuts = {n for path in surgery.trace(model).paths for n in path.shortcut}
    except BadInput:  # no structure can be read: then names have to tell
        shortcuts = {n for n in calls if {"shortcut", "downsample"} & set(n.split("."))}
    stem = next(iter(calls), None)
    for name, read in calls.items():
        m, (shape, dtype) = model.get_submodule(name), read[0]
        reasons = {
            f"it is a {type(m).__name__}": type(m) is not nn.Conv2d,
            "the stem": name == stem,
            "1 x 1": tuple(m.kernel_size) == (1, 1),
            "on a shortcut": name in shortcuts,
            "it is used more than once": len(read) > 1,
            "it is grouped already": m.groups > 1,
            "it is dilated": any(d > 1 for d in m.dilation),
            f"its padding is {m.padding_mode}": m.padding_mode != "zeros",
        }
        left[name] = next((why for why, holds in reasons.items() if holds), "")
        if not left[name]:
            images = dict(N=shape[0], H=shape[2], W=shape[3], dtype=str(dtype).removeprefix("torch."))
            site = replace(_site(m), **images)
            if m.padding == "same" and any(k % 2 == 0 for k in m.kernel_size):
                left[name] = "it pads an even filter"
            elif not any(fits(c, site) for c in CANDIDATES):
                left[name] = "no candidate does fewer products"
            else:
                found[name] = site
                del left[name]
    return found, left


def replace_(model: nn.Module, plan: dict, seed: int = 0, *, trained: bool = False) -> list[str]:
    """Replace the layers that a plan names, in place, with weights drawn from `seed`.

    Returns their names. trained: take the best linear factorisation of the weights that are there instead.
    Raises `NoEffect` for a plan without layers and `BadInput` for one of another network.

    >>> net = build("convnet", 4, (1, 8, 8), widths=(4, 8))
    >>> replace_(net, {"layers": {"features.4": "dwsep"}, "norm": True}), type(net.features[4]).__name__
    (['features.4'], 'Replacement')
    """
    if not plan["layers"]:
        raise NoEffect("layer replacement: the plan replaces no layer")
    for name, candidate in plan["layers"].items():
        conv = dict(model.named_modules()).get(name)
        if type(conv) is not nn.Conv2d:
            raise BadInput(
                f"the plan replaces {name}, which is no plain convolution of this {type(model).__name__}"
            )
        new = replacement(
            candidate,
            _site(conv),
            stream(seed, f"{name}/{candidate}"),
            norm=plan["norm"],
            conv=conv if trained else None,
        ).to(conv.weight.device, conv.weight.dtype)
        swap_(model, name, new.train(model.training))
    return list(plan["layers"])


def _site(conv):
    pad = {"valid": (0, 0), "same": tuple(k // 2 for k in conv.kernel_size)}.get(conv.padding, conv.padding)
    geometry = dict(kernel=tuple(conv.kernel_size), stride=tuple(conv.stride), padding=tuple(pad))
    return Site(C=conv.in_channels, O=conv.out_channels, bias=conv.bias is not None, **geometry)


# Survey, choice, guard


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Say in what a step is measured: number format, layout, device.

    repeats: rounds; they end early after so many seconds.

    >>> Setting.of(Recipe(precision="fp32", memory_format="contiguous"), "cpu", repeats=3)
    Setting(precision='fp32', layout='contiguous', device='cpu', repeats=3, seconds=20.0)
    """

    precision: str = "fp32"
    layout: str = "contiguous"
    device: str = "cpu"
    repeats: int = 11
    seconds: float = 20.0

    @classmethod
    def of(cls, recipe: Recipe, device: str | torch.device, **settings) -> "Setting":
        """Return the one in which a recipe trains on a device."""
        return cls(
            precision=resolve_precision(recipe.precision, device),
            layout=resolve_layout(recipe, device),
            device=str(device),
            **settings,
        )

    def context(self) -> torch.autocast:
        """Return its number format, for a `with`."""
        return autocast(self.precision, self.device)

    def interleaved(self, functions: dict) -> dict:
        """Call `clock.interleaved` on its device, as often as it says."""
        return interleaved(
            functions, repeats=self.repeats, warm_up=2, device=self.device, seconds=self.seconds
        )


def latencies(
    found: dict[str, Site], candidates: Sequence[str], setting: Setting, *, norm: bool = True
) -> tuple[dict[str, dict[str, float]], float]:
    """Measure each candidate's training step (forward, backward, update) at each site.

    Returns (name -> candidate -> seconds, seconds cached). Sites of the same sizes are measured once, the
    original and all candidates interleaved, and kept on disk by sizes, number format, layout, device and
    version; `cached` is what measuring those took that come from there.

    >>> found, _ = sites(build("convnet", 4, (1, 8, 8), widths=(4, 8)), torch.zeros(2, 1, 8, 8))
    >>> seconds, cached = latencies(found, ["dwsep"], Setting(repeats=3))
    >>> list(seconds["features.4"])
    ['conv', 'dwsep']
    """
    m = clock.machine(setting.device)
    where = {"precision": setting.precision, "layout": setting.layout, "norm": norm}
    where |= {k: m[k] for k in ("device", "threads", "torch")}
    folder = paths.make(paths.cache() / "latency")
    files, tables, functions = {}, {}, {}
    for site in set(found.values()):
        names = [ORIGINAL, *(c for c in candidates if fits(c, site))]
        files[site] = folder / f"{provenance.digest(asdict(site), names, where)}.json"
        tables[site] = paths.read_json(files[site])
        if not tables[site]:
            functions |= {(site, c): _layer_step(c, site, setting, norm) for c in names}
    cached = sum(t["spent"] for t in tables.values() if t)
    watch = Stopwatch(setting.device)
    watch.start()
    times = setting.interleaved(functions) if functions else {}
    watch.lap("latencies")
    spent = watch.end_epoch()[-1]
    missing = {site for site, _ in functions}
    for site in missing:
        seconds = {c: stats.median(samples) for (s, c), samples in times.items() if s == site}
        tables[site] = {
            "site": asdict(site),
            "where": where,
            "spent": spent / len(missing),
            "seconds": seconds,
        }
        if not os.environ.get("EFFILIB_SHARED"):  # else other notebooks run too: such times are not kept
            paths.write(files[site], tables[site])
    return {name: tables[site]["seconds"] for name, site in found.items()}, cached


def _layer_step(candidate, site, setting, norm):
    """Forward, backward and update of one candidate on images like those that it meets, as a function."""
    g = stream(0, "latency")
    module = replacement(candidate, site, g, norm=norm).to(
        setting.device, memory_format=LAYOUTS[setting.layout]
    )
    x = torch.randn(site.N, site.C, site.H, site.W, generator=g).to(
        setting.device, getattr(torch, site.dtype)
    )
    x = x.contiguous(memory_format=LAYOUTS[setting.layout]).requires_grad_()
    optimizer = _optimizer(list(module.parameters()))
    with torch.no_grad(), setting.context():
        dy = torch.ones_like(module(x))

    def step():
        with setting.context():
            y = module(x)
        y.backward(dy)
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None

    return step


def survey(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    setting: Setting,
    *,
    score: str = "fisher",
    candidates: Sequence[str] = CANDIDATES,
    seed: int = 0,
) -> dict:
    """Measure what each candidate takes and damages at each layer, and the whole step.

    The model is left as it was. x, y: one batch of training images, in the layout of training. score:
    "fisher" or "spectral" (of a trained network). Returns plain values: {"layers": {name: {candidate:
    {"seconds", "damage", "flops"}}}, "left": {name: why}, "step": seconds, "norm", "score", "cached"}; a
    Fisher damage is the loss of potential as a share of the network's. Raises `NoEffect` where no layer can
    be replaced.

    >>> net, x, y = build("convnet", 4, (1, 8, 8), widths=(4, 8)), torch.rand(8, 1, 8, 8), torch.arange(8) % 4
    >>> found = survey(net, x, y, Setting(repeats=3), candidates=("dwsep",))
    >>> sorted(found["layers"]["features.4"]["dwsep"])
    ['damage', 'flops', 'seconds']
    """
    choose("damage score", score, ("fisher", "spectral"))
    net = copy.deepcopy(model).train()
    found, left = sites(net, x, setting.context)
    if not found:
        reasons = "; ".join(f"{n}: {why}" for n, why in left.items()) or "it has no convolution"
        raise NoEffect(
            f"layer replacement: {type(model).__name__} has no layer that can be replaced ({reasons})"
        )
    norm = any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    seconds, cached = latencies(found, candidates, setting, norm=norm)
    layers = {
        name: {
            c: {"seconds": t, "damage": 0.0, "flops": found[name].flops(c)} for c, t in seconds[name].items()
        }
        for name in found
    }
    with models.seeded(
        stream(seed, "survey").initial_seed(), setting.device
    ):  # dropout draws from the global generator
        before = potentials(net, list(found), x, y, setting.context) if score == "fisher" else {}
        whole = sum(before.values()) or 1.0
        for name, choices in layers.items():
            for c in [c for c in choices if c != ORIGINAL]:
                if score == "spectral":
                    choices[c]["damage"] = spectral(net.get_submodule(name).weight, c)
                    continue
                new = replacement(c, found[name], stream(seed, f"{name}/{c}"), norm=norm)
                old = swap_(net, name, new.to(x.device, memory_format=LAYOUTS[setting.layout]))
                choices[c]["damage"] = (
                    max(0.0, before[name] - potentials(net, [name], x, y, setting.context)[name]) / whole
                )
                swap_(net, name, old)
        step = stats.median(setting.interleaved({"step": _train_step(net, x, y, setting)})["step"])
    return {"layers": layers, "left": left, "step": step, "norm": norm, "score": score, "cached": cached}


def pick(found: dict, budget: float) -> dict:
    """Choose a plan from a survey: the least damage within `budget` of the step's time, as foreseen.

    What is not replaceable (the step less its replaceable layers) is taken to stay. Where the budget cannot
    be reached, every layer takes its fastest candidate, and the plan's note says so.

    >>> layer = {"conv": {"seconds": 4.0, "damage": 0.0}, "dwsep": {"seconds": 1.0, "damage": 0.1}}
    >>> found = {"layers": {"features.4": layer}, "step": 10.0, "norm": True, "score": "fisher"}
    >>> plan = pick(found, budget=0.8)
    >>> plan["layers"], plan["foreseen"]
    ({'features.4': 'dwsep'}, 0.7)
    """
    if not 0 < budget < 1:
        raise BadInput(f"the budget is {budget}: it is a share of the step's time, above 0 and below 1")
    names = list(found["layers"])
    choices = [_worthwhile(found["layers"][n]) for n in names]
    seconds = [[c["seconds"] for c in layer.values()] for layer in choices]
    rest = max(0.0, found["step"] - sum(s[0] for s in seconds))
    note = ""
    try:
        picks = knapsack(
            seconds,
            [[c["damage"] for c in layer.values()] for layer in choices],
            budget * found["step"] - rest,
        )
    except BadInput:
        picks = [s.index(min(s)) for s in seconds]
        least = (rest + sum(map(min, seconds))) / found["step"]
        note = (
            f"a budget of {budget:g} cannot be reached: with the fastest layers {least:.2f} of the step is "
            "left; they were taken"
        )
    foreseen = (rest + sum(s[c] for s, c in zip(seconds, picks, strict=True))) / found["step"]
    chosen = {n: list(layer)[c] for n, layer, c in zip(names, choices, picks, strict=True)}
    return {
        "layers": {n: c for n, c in chosen.items() if c != ORIGINAL},
        "norm": found["norm"],
        "budget": budget,
        "score": found["score"],
        "foreseen": foreseen,
        "note": note,
    }


def _worthwhile(choices):
    """The original, first, and the candidates that are measured to be faster."""
    return {c: v for c, v in choices.items() if c == ORIGINAL or v["seconds"] < choices[ORIGINAL]["seconds"]}


def guard(
    model: nn.Module,
    plan: dict,
    x: torch.Tensor,
    y: torch.Tensor,
    setting: Setting,
    *,
    seed: int = 0,
    least: float = 0.05,
) -> dict:
    """Take back what does not pay when the whole training step is measured.

    Returns the plan without it; the model is left as it was. A replacement pays if the step is slower with
    that layer alone put back, by the median of interleaved rounds. If the whole step falls by less than
    `least`, everything is taken back. Adds "reverted" and "measured" (share of the original's step) to the
    plan.

    >>> net, x, y = build("convnet", 4, (1, 8, 8), widths=(4, 8)), torch.rand(8, 1, 8, 8), torch.arange(8) % 4
    >>> plan = guard(net, {"layers": {"features.4": "dwsep"}, "norm": True}, x, y, Setting(repeats=3))
    >>> plan["layers"] | plan["reverted"]
    {'features.4': 'dwsep'}
    """
    net = copy.deepcopy(model).train()
    old = {n: net.get_submodule(n) for n in plan["layers"]}
    if old:
        replace_(net, plan, seed)
        net.to(memory_format=LAYOUTS[setting.layout])
    new = {n: net.get_submodule(n) for n in plan["layers"]}
    parameters = {*net.parameters(), *(p for m in old.values() for p in m.parameters())}
    step = _train_step(net, x, y, setting, parameters)

    def rebuilt(names):
        def run():
            for n in old:
                swap_(net, n, new[n] if n in names else old[n])
            step()

        return run

    def measured(names):
        times = setting.interleaved(
            {"original": rebuilt(()), "rebuilt": rebuilt(names), **{n: rebuilt(names - {n}) for n in names}}
        )
        return {
            k: [a - b for a, b in zip(t, times["rebuilt"], strict=True)] for k, t in times.items()
        }, _share(times)

    kept = set(old)
    with models.seeded(stream(seed, "guard").initial_seed(), setting.device):
        gains, share = measured(kept) if kept else ({}, 1.0)
        idle = {n for n in kept if stats.median(gains[n]) <= 0}
        if idle and kept - idle:
            kept -= idle
            share = _share(setting.interleaved({"original": rebuilt(()), "rebuilt": rebuilt(kept)}))
    if share > 1 - least:
        kept = set()
    layers = {n: c for n, c in plan["layers"].items() if n in kept}
    reverted = {n: c for n, c in plan["layers"].items() if n not in kept}
    return {**plan, "layers": layers, "reverted": reverted, "measured": share if layers else 1.0}


def _share(times):
    return stats.median(a / b for a, b in zip(times["rebuilt"], times["original"], strict=True))


def _train_step(net, x, y, setting, parameters=None):
    """Forward, loss, backward and update of `net`, as a function; of the parameters those are updated that
    took part.
    """
    optimizer = _optimizer(list(parameters or net.parameters()))

    def step():
        with setting.context():
            logits = net(x)
        F.cross_entropy(logits.float(), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _optimizer(parameters):
    """The update as in training; the fused one fails where only some parameters have a momentum."""
    optimizer = torch.optim.SGD(
        parameters, lr=1e-6, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
    )
    for p in parameters:
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


@dataclass(frozen=True, kw_only=True)
class LayerReplacement:
    """Survey, choose and guard, on the clock, then train the rebuilt network from scratch.

    For `Arm.fit`: (task, seed) -> `History`. budget: of the step's time. plan: JSON of a plan to replay
    instead; nothing is measured then. The latency table is charged to every seed with what it took, also
    where it comes from the cache. The plan stands in the history's events and structure.

    >>> fit = LayerReplacement(plan='{"layers": {"stages.0.0.conv1": "dwsep"}, "norm": true}')
    >>> fit(task("smoke", "synthetic"), seed=0).events[0]["text"]
    'stages.0.0.conv1 -> dwsep'
    """

    budget: float = 0.6
    score: str = "fisher"
    candidates: tuple = CANDIDATES
    repeats: int = 7
    plan: str = ""

    def __call__(self, task: Task, seed: int) -> History:
        dataset = task.load()
        model, before = task.build(dataset, seed), History()
        structure = models.describe(model)
        watch = Stopwatch(dataset.device)
        watch.start()
        plan, cached = (
            (json.loads(self.plan), 0.0) if self.plan else self.search(model, dataset, task.recipe, seed)
        )
        if plan["layers"]:
            replace_(model, plan, seed)
        watch.lap("search")
        watch.end_epoch()
        if not self.plan:
            kinds = {"search": {"count": 1, "seconds": watch.seconds + cached}}
            before = History(seconds=watch.seconds + cached, raw_seconds=watch.raw + cached, kinds=kinds)
        before.events = [
            {"step": 0, "epoch": 0, "method": type(self).__name__, "text": say(plan), "plan": plan}
        ]
        after = train(model, dataset, task.recipe, (), seed)
        return replace(before + after, structure={**structure, "replaced": plan["layers"]})

    def search(self, model: nn.Module, dataset: Dataset, recipe: Recipe, seed: int) -> tuple[dict, float]:
        """Return (plan, seconds charged for what came from the cache)."""
        setting = Setting.of(recipe, dataset.device, repeats=self.repeats)
        g = stream(seed, "layer replacement")
        batches = Batches(dataset, recipe.batch_size, g, augmentation=recipe.augmentation)
        x, y = next(iter(batches))
        net = copy.deepcopy(model).to(memory_format=LAYOUTS[setting.layout])
        x = x.contiguous(memory_format=LAYOUTS[setting.layout])
        found = survey(net, x, y, setting, score=self.score, candidates=self.candidates, seed=seed)
        return guard(net, pick(found, self.budget), x, y, setting, seed=seed), found["cached"]


def say(plan: dict) -> str:
    """Return a plan as a sentence.

    >>> say({"layers": {"features.4": "dwsep"}})
    'features.4 -> dwsep'
    """
    layers = ", ".join(f"{n} -> {c}" for n, c in plan["layers"].items()) or "nothing replaced"
    back = ", ".join(f"{n} ({c})" for n, c in plan.get("reverted", {}).items())
    foreseen = (
        f"; foreseen {plan['foreseen']:.2f}, measured {plan['measured']:.2f} of the step"
        if "measured" in plan
        else ""
    )
    return (
        layers
        + foreseen
        + (f"; taken back: {back}" if back else "")
        + (f"; {plan['note']}" if plan.get("note") else "")
    )
