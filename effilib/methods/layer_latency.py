"""What a layer's training step takes, measured once per distinct shape, and between the measured widths.

FLOPs promise more than a step saves, so each structure is timed where it stands: forward, backward and
update, with the BatchNorm and ReLU behind it, on images like those that it meets, in the number format and
layout of training. Over a layer's widths four corners are measured; between them a convolution's time is
bilinear, t = a + b C + c O + d C O, in whole blocks of 16 channels.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

from effilib import clock, paths, provenance
from effilib.clock import Stopwatch, interleaved
from effilib.methods.layer_candidates import Site, replacement
from effilib.normalization import Layers
from effilib.recipe import LAYOUTS, Recipe, autocast, resolve_layout, resolve_precision
from effilib.seeds import stream

__all__ = ["Setting", "between", "latencies", "train_step"]


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
    repeats: int = 5
    seconds: float = 20.0

    @classmethod
    def of(cls, recipe: Recipe, device: str | torch.device, **settings) -> "Setting":
        """Return the one in which a recipe trains on a device."""
        formats = dict(
            precision=resolve_precision(recipe.precision, device), layout=resolve_layout(recipe, device)
        )
        return cls(**formats, device=str(device), **settings)

    def context(self) -> torch.autocast:
        """Return its number format, for a `with`."""
        return autocast(self.precision, self.device)

    def interleaved(self, functions: dict) -> dict:
        """Call `clock.interleaved` on its device, as often as it says."""
        return interleaved(
            functions, repeats=self.repeats, warm_up=1, device=self.device, seconds=self.seconds
        )


def latencies(
    wanted: Mapping[Site, Sequence[str]], setting: Setting, *, norm: bool = True
) -> tuple[dict[Site, dict[str, float]], float]:
    """Measure the training step of some structures at each site, all interleaved.

    Returns (site -> candidate -> seconds of the shortest, seconds cached). Times are kept on disk by sizes,
    number format, layout, device and version; `cached` is what measuring those took that come from there.

    >>> site = Site(C=4, O=8, kernel=(3, 3), stride=(1, 1), padding=(1, 1), N=2, H=8, W=8)
    >>> seconds, cached = latencies({site: ["conv", "dwsep"]}, Setting(repeats=3))
    >>> list(seconds[site])
    ['conv', 'dwsep']
    """
    where = {"precision": setting.precision, "layout": setting.layout, "norm": norm}
    where |= clock.hardware(setting.device)
    folder = paths.make(paths.cache() / "latency")
    files = {
        s: folder / f"{provenance.digest(asdict(s), list(names), where)}.json" for s, names in wanted.items()
    }
    tables = {s: paths.read_json(file) for s, file in files.items()}
    missing = [s for s in wanted if not tables[s]]
    cached = sum(t["spent"] for t in tables.values() if t)
    watch = Stopwatch(setting.device)
    watch.start()
    functions = {(s, c): _step(c, s, setting, norm) for s in missing for c in wanted[s]}
    times = setting.interleaved(functions) if functions else {}
    watch.lap("latencies")
    spent = watch.end_epoch()[-1]
    for s in missing:
        seconds = {c: min(times[s, c]) for c in wanted[s]}
        tables[s] = {"site": asdict(s), "where": where, "spent": spent / len(missing), "seconds": seconds}
        if not os.environ.get("EFFILIB_SHARED"):  # else other notebooks run too: such times are not kept
            paths.write(files[s], tables[s])
    return {s: tables[s]["seconds"] for s in wanted}, cached


def _step(candidate, site, setting, norm):
    """Forward, backward and update of one candidate on images like those that it meets, as a function."""
    g, layout = stream(0, "latency"), LAYOUTS[setting.layout]
    behind = [nn.BatchNorm2d(site.O)] * norm + [nn.ReLU(inplace=True)]
    module = Layers(replacement(candidate, site, g, norm=norm), *behind)
    module.to(setting.device, memory_format=layout)
    x = torch.randn(site.N, site.C, site.H, site.W, generator=g).to(
        setting.device, getattr(torch, site.dtype)
    )
    x = x.contiguous(memory_format=layout).requires_grad_(not site.first)
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


def train_step(
    net: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    setting: Setting,
    parameters: Iterable[nn.Parameter] = (),
) -> Callable[[], None]:
    """Return a training step of a network as a function.

    Forward, loss, backward and update; nothing moves. parameters: those that are updated if they take part
    (none: the network's).

    >>> net = nn.Linear(2, 2)
    >>> train_step(net, torch.ones(1, 2), torch.tensor([0]), Setting())()
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
    """The update as in training, with so small a learning rate that nothing moves."""
    optimizer = torch.optim.SGD(
        parameters, lr=1e-6, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
    )
    for p in parameters:  # the fused update fails where only some parameters have a momentum
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def between(corners: Sequence[Sequence[float]], u: float, v: float) -> float:
    """Return the seconds between four corners, bilinear.

    corners[i][j]: fewest (0) or all (1) channels read, i, and written, j. u, v: how far from the fewest to
    all of them, 0..1.

    >>> between([[1.0, 2.0], [2.0, 4.0]], u=1.0, v=0.5)  # all read, half way written
    3.0
    """
    (a, b), (c, d) = corners
    return (1 - u) * ((1 - v) * a + v * b) + u * ((1 - v) * c + v * d)
