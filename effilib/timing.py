"""Where the time goes: training steps, passes and single layers, timed in turn. Numbers out, in milliseconds.

What is compared runs round by round in one process, so that drift hits all alike. These are illustrations
beside a verdict, which only `compare` gives: a step's speed-up is not a training's.
"""

import functools
import statistics as stats
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from effilib import convolution, cost, models, seeds
from effilib.clock import elapsed, interleaved, now, steady_memory, synchronize
from effilib.convolution import EXACT, Approximation, approx_conv2d
from effilib.cost import Conv
from effilib.dataset import Batches, Dataset
from effilib.errors import BadInput
from effilib.hooks import Method
from effilib.recipe import LAYOUTS, backend, native_bf16, resolve_layout
from effilib.run import Run
from effilib.seeds import stream
from effilib.tasks import Task

__all__ = [
    "PARTS", "Variant", "batch", "breakdown", "formats", "layer_times", "layers_of", "pass_times", "say_conv",
    "step_times",
]  # fmt: skip

PARTS = ("data", "forward: convolutions", "forward: rest", "dX", "dW", "backward: rest", "optimizer")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SECONDS = {"smoke": 1, "quick": 3}  # for all rounds of a table; other presets: 15


@dataclass(frozen=True)
class Variant:
    """A way of training a task's network that is timed against others.

    convert: changes the model in place, or returns another one (None: as it is). precision, memory_format,
    fused: as in `Recipe`; "auto" is the task's. network: settings of the network. methods: take part in the
    step.

    >>> Variant("narrow", network={"widths": (4, 4, 4)}).precision
    'auto'
    """

    name: str
    _: KW_ONLY
    convert: Callable[[nn.Module], object] | None = None
    precision: str = "auto"
    memory_format: str = "auto"
    fused: bool = True
    network: dict = field(default_factory=dict)
    methods: tuple = ()


def batch(dataset: Dataset, n: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one normalised batch of training images, always the same.

    x: (n, C, H, W) float32, y: (n,) int64; fewer where there are fewer. Not augmented.

    >>> x, y = batch(load("synthetic"), 4)
    >>> x.shape, y.shape
    (torch.Size([4, 1, 8, 8]), torch.Size([4]))
    """
    index = torch.randperm(len(dataset.train), generator=stream(0, "numerics"))[:n].to(dataset.device)
    return dataset.normalize(dataset.train.x[index]), dataset.train.y[index]


def step_times(
    task: Task,
    dataset: Dataset,
    variants: Sequence[Variant],
    *,
    repeats: int = 15,
    seconds: float | None = None,
) -> pd.DataFrame:
    """Time a whole training step of each variant, in turn: forward, loss, backward, optimizer.

    Returns a row a variant: "ms" (median), "x" (how many times as fast as the first), "GFLOP" (of the step's
    products) and "x by FLOPs" (what "x" would be if FLOPs were time). The learning rate is 0, so that nothing
    is learned. seconds: for all rounds together (default: by the preset).

    >>> t, narrow = task("smoke", "synthetic"), Variant("narrow", network={"widths": (4, 4, 4)})
    >>> times = step_times(t, t.load(), [Variant("as built"), narrow])
    >>> times["x by FLOPs"].round(1).tolist()
    [1.0, 3.9]
    """
    steps, flops = _steps(task, dataset, variants), {}
    with seeds.seeded(0, dataset.device):
        for name, step in steps.items():
            flops[name] = cost.count_flops(step)
        times = interleaved(
            steps,
            repeats=_few(task, repeats),
            warm_up=2,
            device=dataset.device,
            seconds=_spend(task, seconds),
        )
    frame = pd.DataFrame({"ms": _medians(times), "GFLOP": {n: f / 1e9 for n, f in flops.items()}})
    first = frame.iloc[0]
    frame.insert(1, "x", first["ms"] / frame["ms"])
    frame["x by FLOPs"] = first["GFLOP"] / frame["GFLOP"]
    return frame.rename_axis("variant")


def pass_times(
    task: Task,
    dataset: Dataset,
    variants: Sequence[Variant],
    *,
    repeats: int = 15,
    seconds: float | None = None,
) -> pd.DataFrame:
    """Time each variant's forward pass, backward pass and whole step.

    Returns a row a variant, medians: "forward ms" (with the loss), "backward ms", "step ms" (with both and
    the optimizer).

    >>> t = task("smoke", "synthetic")
    >>> times = pass_times(t, t.load(), [Variant("as built")])
    >>> (times["step ms"] > times["forward ms"]).tolist(), list(times)
    ([True], ['forward ms', 'backward ms', 'step ms'])
    """
    note, rows = _Note(dataset.device), {v.name: [] for v in variants}
    steps = _steps(task, dataset, variants, note)
    with seeds.seeded(0, dataset.device):
        for counts in _rounds(_few(task, repeats), _spend(task, seconds)):
            for name, step in steps.items():
                note.begin()
                step()
                if counts:
                    rows[name].append(note.end())
    return pd.DataFrame({n: pd.DataFrame(r).median() for n, r in rows.items()}).T.rename_axis("variant")


def layer_times(
    convs: dict[str, Conv],
    approximations: dict[str, Approximation],
    *,
    precision: str = "fp32",
    device: str = "cpu",
    repeats: int = 9,
    seconds: float = 8,
) -> pd.DataFrame:
    """Time single layers' passes, exact and approximated, in turn.

    convs: name -> `cost.Conv`. approximations: name -> `Approximation`; "exact" is added. precision: of the
    tensors. Returns a row a (layer, variant), medians: "forward ms", "backward ms".

    >>> times = layer_times({"small": Conv(N=1, C=2, O=2, H=4, W=4)}, {}, repeats=3)
    >>> times.index.tolist(), list(times)
    ([('small', 'exact')], ['forward ms', 'backward ms'])
    """
    cases, g = {}, torch.Generator().manual_seed(0)
    for name, c in convs.items():
        shapes = (c.N, c.C, c.H, c.W), (c.O, c.C // c.groups, c.k, c.k), (c.N, c.O, *c.out_size)
        x, w, dy = (
            torch.randn(s, generator=g).to(device, DTYPES[precision], memory_format=torch.channels_last)
            for s in shapes
        )
        for how, a in {"exact": EXACT, **approximations}.items():
            cases[name, how] = c, x.relu().requires_grad_(), w.requires_grad_(), dy, a
    rows = {key: [] for key in cases}
    for counts in _rounds(repeats, seconds):
        for key, (c, x, w, dy, a) in cases.items():
            synchronize(device)
            with elapsed() as clock:
                y = approx_conv2d(x, w, stride=c.stride, padding=c.pad, groups=c.groups, approximation=a)
                synchronize(device)
                forward = clock()
                torch.autograd.grad(y, (x, w), dy.to(y.dtype))
                synchronize(device)
                backward = clock() - forward
            if counts:
                rows[key].append({"forward ms": 1e3 * forward, "backward ms": 1e3 * backward})
    frame = pd.DataFrame({key: pd.DataFrame(r).median() for key, r in rows.items()}).T
    return frame.rename_axis(["layer", "variant"])


def breakdown(task: Task, dataset: Dataset, *, repeats: int = 25, seconds: float = 6) -> dict[str, float]:
    """Time the parts of one training step: a dict of `PARTS` in milliseconds.

    Data, forward, backward and optimizer are timed as they are; the convolutions' share of forward and
    backward comes from the per-layer latency table. The rest is element-wise work, BatchNorm and Python.

    >>> t = task("smoke", "synthetic")
    >>> list(breakdown(t, t.load())) == list(PARTS)
    True
    """
    repeats, seconds = (3, 1) if task.preset == "smoke" else (repeats, seconds)
    run, x, y = _prepare(task, dataset, Variant("step"))
    batches, n = Batches(dataset, len(y), stream(0, "data")), len(y)
    index, zero = torch.arange(n, device=y.device), torch.zeros(n, dtype=torch.long, device=y.device)
    shift = torch.arange(n, device=y.device) % (2 * batches.pad + 1)

    def loss():
        with run.autocast():
            return F.cross_entropy(run.model(x).float(), y)

    def both():
        loss().backward()

    both()  # gradients for the optimizer to read
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0  # timing must not train
    parts = {
        "data": lambda: batches.cut(index, shift, zero, (shift % 2).bool()),
        "forward": loss,
        "both": both,
        "optimizer": run.optimizer.step,
    }
    with seeds.seeded(0, dataset.device), backend(run.recipe, dataset.device):
        ms = _medians(interleaved(parts, repeats=repeats, device=dataset.device, seconds=seconds))
        table = cost.latency_table(
            run.model, x, dtype=DTYPES.get(run.precision, torch.float32), repeats=repeats, seconds=seconds,
            channels_last=run.layout is torch.channels_last,
        )  # fmt: skip
    convs = {p: sum(r["ms"] for r in table if r["pass"] == p) for p in cost.PASSES}
    return {
        "data": ms["data"],
        "forward: convolutions": convs["forward"],
        "forward: rest": max(0.0, ms["forward"] - convs["forward"]),
        "dX": convs["dX"],
        "dW": convs["dW"],
        "backward: rest": max(0.0, ms["both"] - ms["forward"] - convs["dX"] - convs["dW"]),
        "optimizer": ms["optimizer"],
    }


def formats(device: str = "cpu") -> tuple[str, ...]:
    """Return the formats in which times are shown: "bf16" where it is native, and "fp32".

    The one that training uses here comes first.

    >>> "fp32" in formats()
    True
    """
    return ("bf16", "fp32") if native_bf16(device) else ("fp32",)


def layers_of(task: Task, dataset: Dataset) -> dict[str, Conv]:
    """Return the convolutions that methods approximate, with the sizes that they meet.

    All of the task's network but the first, by name.

    >>> t = task("smoke", "synthetic")
    >>> {c.C for c in layers_of(t, t.load()).values()}
    {8}
    """
    model, (x, _) = task.build(dataset), batch(dataset, task.recipe.batch_size)
    found = cost.layers(model, x)
    return {n: found[n] for n in convolution.layers(model, x[:2])}


def say_conv(c: Conv) -> str:
    """Return a convolution's sizes in words.

    >>> say_conv(Conv(N=64, C=16, O=32, H=8, W=8, stride=2))
    '16 to 32 channels, 8 x 8, stride 2'
    """
    stride = f", stride {c.stride}" if c.stride > 1 else ""
    return f"{c.C} to {c.O} channels, {c.H} x {c.W}{stride}" + ("" if c.k == 3 else f", {c.k} x {c.k}")


def _few(task, repeats):
    return 3 if task.preset == "smoke" else repeats


def _spend(task, seconds):
    return SECONDS.get(task.preset, 15) if seconds is None else seconds


def _medians(times):
    """name -> milliseconds."""
    return {name: 1e3 * stats.median(t) for name, t in times.items()}


def _rounds(repeats, seconds, warm_up=2):
    """For every round whether it counts; at least three do, even if that takes longer than `seconds`."""
    with elapsed() as spent:
        for round_ in range(-warm_up, repeats):
            yield round_ >= 0
            if round_ >= 2 and spent() > seconds:
                return


@dataclass(eq=False)
class _Note(Method):
    """Notes when a step's forward and backward pass have ended."""

    device: torch.device

    def begin(self):
        synchronize(self.device)
        self.times = [now()]

    def loss_terms(self, run):
        self._now()

    def on_after_backward(self, run):
        self._now()

    def _now(self):
        synchronize(self.device)
        self.times.append(now())

    def end(self):
        """Milliseconds since `begin`, pass by pass."""
        self._now()
        begin, forward, backward, end = (1e3 * t for t in self.times)
        return {"forward ms": forward - begin, "backward ms": backward - forward, "step ms": end - begin}


def _steps(task, dataset, variants, *last):
    """name -> a function that takes one training step. last: methods that are called after all others."""

    def step(run, x, y):
        with backend(run.recipe, dataset.device):
            run.train_step(x, y)

    prepared = {v.name: _prepare(task, dataset, v, *last) for v in variants}
    if len(prepared) < len(variants):
        raise BadInput(f"variants need names of their own, got {', '.join(v.name for v in variants)}")
    return {name: functools.partial(step, *what) for name, what in prepared.items()}


def _prepare(task, dataset, variant, *last):
    """A variant's `Run`, ready for its first step, and the batch that it trains on."""
    steady_memory()
    own = {k: getattr(variant, k) for k in ("precision", "memory_format") if getattr(variant, k) != "auto"}
    fused = variant.fused and task.recipe.fused
    recipe = replace(task.recipe, compile=False, fused=fused, **own)
    model = task.build(dataset, **variant.network)
    changed = variant.convert(model) if variant.convert else None
    model = changed if isinstance(changed, nn.Module) else model
    model = model.to(memory_format=LAYOUTS[resolve_layout(recipe, dataset.device, model)])
    models.in_training(model)
    run = Run(model, dataset, recipe, (*variant.methods, *last), 0)
    x, y = batch(dataset, recipe.batch_size)
    run.batches = Batches(dataset, len(y), stream(0, "data")) if variant.methods else None
    run.steps = run.schedule.planned = 10**6  # one of many, at the beginning
    run.schedule.lr_at = lambda position, planned: 0.0
    run.clock.start()
    run.call("on_fit_start")
    run.settle()
    return run, x.contiguous(memory_format=run.layout), y
