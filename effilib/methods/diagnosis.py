"""Diagnoses: which treatment helps a network most for its time, told from a short search (chapter II.9).

A search trains the patient for a few epochs at a held learning rate. Every diagnosis begins with the weights
that it ends with and ranks all candidates of `patients.candidates`: a dict candidate -> score, the highest is
what it would do. What a candidate costs comes from a table of step times. Decisions look at the split that
decides, with BatchNorm's statistics estimated anew, never at one evaluation of a network in training.
"""

import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import nn

from effilib import models, networks
from effilib.clock import elapsed
from effilib.dataset import Dataset
from effilib.errors import BadInput
from effilib.evaluation import evaluate
from effilib.history import History
from effilib.hooks import Method
from effilib.methods.growth import step_flops
from effilib.methods.net2net import grow_
from effilib.methods.patients import KEEP, candidates, parsed, treat_, treated
from effilib.methods.pressure import Pressure, norms, survival
from effilib.methods.prune_then_grow import PruneThenGrow
from effilib.recipe import Recipe
from effilib.seeds import stream
from effilib.training import train

__all__ = [
    "Buds", "Case", "CheapestFlop", "Forks", "PricedPenalty", "PruningRate", "RandomChoice", "examine",
    "few", "ranked", "search",
]  # fmt: skip

FEW = 8  # held-out images that a training here reports on, for nobody


@dataclass(frozen=True, kw_only=True)
class Case:
    """Hold a patient after its search: all that a diagnosis may see.

    model: the searched network; it is copied, never changed. recipe: of the search. times: candidate ->
    milliseconds of a step, "keep" among them. seed: of the order of images and of new weights.

    >>> data = load("synthetic")
    >>> net = build("resnet", data.classes, data.shape, widths=(16, 16), blocks=(1, 1))
    >>> times = {"keep": 1.0, "widen stage 2": 1.5, "deepen stage 2": 2.0}
    >>> case = Case(model=net, dataset=data, recipe=Recipe(), times=times)
    >>> case.treated("deepen stage 2").settings()["blocks"], case.price("widen stage 2")
    ([[16], [16, 16]], 0.5)
    """

    model: nn.Module
    dataset: Dataset
    recipe: Recipe
    times: dict[str, float]
    seed: int = 0
    multiple: int = 16
    spent: list[History] = field(default_factory=list, init=False, compare=False)  # what it cost so far

    def __post_init__(self):
        missing = {KEEP} - set(self.times)
        unknown = set(self.times) - set(candidates(self.model.settings(), self.multiple))
        if missing or unknown or not all(t > 0 for t in self.times.values()):
            raise BadInput(f"times: of 'keep' and of candidates, above 0; got {self.times}")

    def price(self, candidate: str) -> float:
        """Return milliseconds that a candidate adds to a step, or saves.

        At least a thousandth of the step.
        """
        return max(1e-3 * self.times[KEEP], abs(self.times[candidate] - self.times[KEEP]))

    def added(self, stage: int) -> int:
        """Return the channels that widening a stage (its number) adds."""
        wider = treated(self.model.settings(), f"widen stage {stage + 1}", self.multiple)
        return sum(wider["blocks"][stage]) - sum(block.inner for block in self.model.stages[stage])

    @cached_property
    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a batch as in training: x (N, C, H, W), y (N,)."""
        return next(iter(self.batches()))

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Return an epoch of training batches, the same at every call."""
        return iter(self.dataset.shuffled(self.recipe.batch_size, stream(self.seed, "diagnosis")))

    def treated(self, candidate: str = KEEP) -> nn.Module:
        """Return a treated copy of the network."""
        model, generator = copy.deepcopy(self.model), stream(self.seed, candidate)
        treat_(model, candidate, self.batch[0], multiple=self.multiple, generator=generator)
        return model

    @property
    def warm_up(self) -> float:
        """Seconds that are not counted: the first training's warm-up. Later ones are."""
        return self.spent[0].warm_up if self.spent else 0.0

    def train(
        self,
        model: nn.Module,
        epochs: float,
        methods: Iterable[Method] = (),
        order: str = "diagnosis",
        **changes,
    ) -> History:
        """Train a network in place.

        order: trainings of one order see the same batches. changes: of the recipe.
        """
        recipe = replace(self.recipe, **{"epochs": epochs, "warmup": 0.0, **changes})
        seed = stream(self.seed, order).initial_seed()
        self.spent.append(train(model, few(self.dataset), recipe, methods, seed, evaluations=1))
        return self.spent[-1]

    def loss(self, model: nn.Module, images: int = 1000) -> float:
        """Return the mean cross entropy of `judged`."""
        return self.judged(model, images)[0]

    def judged(self, model: nn.Module, images: int = 1000, batches: int = 4) -> tuple[float, float]:
        """Return (mean cross entropy, accuracy in %) on images that decide.

        BatchNorm is estimated anew.
        """
        found = [x for (x, _), _ in zip(self.batches(), range(batches), strict=False)]
        models.reestimate_(model, found)
        decide = replace(self.dataset, decide=self.dataset.decide[:images])
        return evaluate(model, decide, "decide")


def few(dataset: Dataset) -> Dataset:
    """Return the data set with a few held-out images.

    For trainings on whose accuracy nobody looks.

    >>> len(few(load("synthetic")).test)
    8
    """
    return replace(dataset, validation=dataset.validation[:FEW], test=dataset.test[:FEW])


def search(
    model: nn.Module, dataset: Dataset, recipe: Recipe, times: dict[str, float], seed: int = 0, **settings
) -> tuple[Case, History]:
    """Train a network at a held learning rate; return case and history.

    For the recipe's epochs. settings: of `Case`.

    >>> data = load("synthetic")
    >>> net = build("resnet", data.classes, data.shape, widths=(16, 16), blocks=(1, 1))
    >>> case, history = search(net, data, Recipe(epochs=1), {"keep": 1.0, "widen stage 1": 2.0})
    >>> case.recipe.schedule, history.steps
    ('constant', 2)
    """
    recipe = replace(recipe, schedule="constant")
    case = Case(model=model, dataset=dataset, recipe=recipe, times=times, seed=seed, **settings)
    return case, case.train(model, recipe.epochs, order="search", warmup=recipe.warmup)


def examine(case: Case, diagnosis: Callable[[Case], dict[str, float]]) -> tuple[dict[str, float], float]:
    """Return a diagnosis' scores and the seconds that it took.

    Scores: candidate -> score. All of them count, but for the warm-up of the case's first training.

    >>> data = load("synthetic")
    >>> net = build("resnet", data.classes, data.shape, widths=(16, 16), blocks=(1, 1))
    >>> case = Case(model=net, dataset=data, recipe=Recipe(), times={"keep": 1.0, "widen stage 1": 2.0})
    >>> scores, seconds = examine(case, RandomChoice())
    >>> sorted(scores), seconds < 1
    (['keep', 'widen stage 1'], True)
    """
    before = case.warm_up
    with elapsed() as seconds:
        scores = diagnosis(case)
        took = seconds() - (case.warm_up - before)
    if set(scores) != set(case.times) or not all(math.isfinite(s) for s in scores.values()):
        raise BadInput(f"{type(diagnosis).__name__} has to score all candidates by numbers, got {scores}")
    return scores, took


def ranked(
    case: Case, widen: list[float], deepen: list[float], keep: float, inside: list[float]
) -> dict[str, float]:
    """Return candidate -> score from values per stage.

    inside: the worth of the channels that are there; what speaks for narrowing a stage lies as far above
    "keep" as this lies below it.

    >>> net = build("resnet", 4, (1, 8, 8), widths=(32,), blocks=(1,))
    >>> times = {"keep": 2.0, "widen stage 1": 3.0, "narrow stage 1": 1.0}
    >>> case = Case(model=net, dataset=load("synthetic"), recipe=Recipe(), times=times)
    >>> ranked(case, widen=[0.25], deepen=[0.0], keep=0.5, inside=[0.25])
    {'keep': 0.5, 'widen stage 1': 0.25, 'narrow stage 1': 0.75}
    """
    found = {KEEP: keep}
    for name in set(case.times) - {KEEP}:
        action, i = parsed(name, len(case.model.stages))
        found[name] = {"widen": widen[i], "deepen": deepen[i], "narrow": 2 * keep - inside[i]}[action]
    return {name: found[name] for name in case.times}


@dataclass(frozen=True)
class PruningRate:
    """Count what died, or is about to, in epochs under a penalty.

    (a) The thesis' rule as II.9 had it. A stage that lost at most `low` needs its channels; of several the
    one that is cheapest to widen in FLOPs comes first, and nothing is deepened before it was widened in vain.

    >>> data = load("synthetic")
    >>> net = build("resnet", data.classes, data.shape, widths=(16,), blocks=(1,))
    >>> times = {"keep": 2.0, "widen stage 1": 3.0, "deepen stage 1": 4.0}
    >>> list(PruningRate()(Case(model=net, dataset=data, recipe=Recipe(), times=times)))
    ['keep', 'widen stage 1', 'deepen stage 1']
    """

    low: float = 0.01
    high: float = 0.05
    epochs: int = 2
    idle: float = 0.5  # share of the epochs after which a channel that no gradient holds is gone

    def __call__(self, case: Case) -> dict[str, float]:
        """Score the candidates."""
        watch = PruneThenGrow(plan=(), idle=self.idle, search=0.99, budget=4.0, images=1)
        per_epoch = len(case.dataset.train) // case.recipe.batch_size
        events = case.train(case.treated(), self.epochs + 1 / per_epoch, (watch,)).events  # not in the last
        seen = zip(*[e["seen"]["stages"] for e in events if "seen" in e], strict=True)  # stage by stage
        rate = [max(1 - math.prod(1 - s["lost"] for s in e), e[-1]["pending"]) for e in seen]
        flops = CheapestFlop()(case)
        most = max(flops.values()) or 1.0
        cheap = [flops.get(f"widen stage {i + 1}", 0.0) / most for i in range(len(rate))]
        widen = [c if r <= self.low else self.low - r for r, c in zip(rate, cheap, strict=True)]
        deepen = [w - 1 - self.low for w in widen]  # after a widening in vain
        return ranked(case, widen, deepen, 0.0, [self.high - r for r in rate])


@dataclass(frozen=True)
class PricedPenalty:
    """Read a penalty in milliseconds as continuous shrinkage of norms.

    (b) The thesis' idea made sharp. Where more is left than on average the network is worth its time: of
    channels, it should be wider; of blocks, deeper.

    >>> data = load("synthetic")
    >>> net = build("resnet", data.classes, data.shape, widths=(16,), blocks=(1,))
    >>> times = {"keep": 2.0, "widen stage 1": 3.0, "deepen stage 1": 4.0}
    >>> list(PricedPenalty()(Case(model=net, dataset=data, recipe=Recipe(), times=times)))
    ['keep', 'widen stage 1', 'deepen stage 1']
    """

    goes: float = 0.3
    epochs: float = 1.0

    def __call__(self, case: Case) -> dict[str, float]:
        """Score the candidates."""
        model, prices = case.treated(), _prices(case)
        before = norms(model)
        case.train(model, self.epochs, (Pressure(prices=prices, goes=self.goes),))
        channels, blocks, average = _left(norms(model), before, prices)
        return ranked(case, channels, blocks, average, channels)


@dataclass(frozen=True)
class Buds:
    """Grow a little in every stage, and see which newborns survive.

    (c) In all at once, under the same penalty as (b). A bud is one multiple of channels inside of each block,
    and a block whose last scale is 0.

    >>> data = load("synthetic")
    >>> net = build("resnet", data.classes, data.shape, widths=(16,), blocks=(1,))
    >>> times = {"keep": 2.0, "widen stage 1": 3.0, "deepen stage 1": 4.0}
    >>> list(Buds()(Case(model=net, dataset=data, recipe=Recipe(), times=times)))
    ['keep', 'widen stage 1', 'deepen stage 1']
    """

    goes: float = 0.3
    epochs: float = 1.0

    def __call__(self, case: Case) -> dict[str, float]:
        """Score the candidates."""
        model, prices = case.treated(), _prices(case)
        old = norms(model)
        self.sprout_(case, model)
        case.train(model, self.epochs, (Pressure(prices=prices, goes=self.goes),))
        after, mature, widen, deepen = norms(model), [], [], []
        for i, stage in enumerate(model.stages):
            now, before = ([part for part in parts if part[0] == i] for parts in (after, old))
            widths = [len(channels) for _, channels, _ in before]  # the last block has none, it is a bud
            both = [(channels, n) for (_, channels, _), n in zip(now, widths, strict=False)]
            widen.append(_mean(survival(c[n:], c[:n].mean()) for c, n in both))
            deepen.append(now[-1][2].item() / stage[-1].width ** 0.5)  # a block's scales begin at 1
            mature += [(i, c[:n], scale) for (_, c, scale), n in zip(now, widths, strict=False)]
        channels, _, average = _left(mature, old, prices)
        return ranked(case, widen, deepen, average, channels)

    def sprout_(self, case: Case, model: nn.Module) -> None:
        """Add the buds in place; the function is kept."""
        g, (x, _) = stream(case.seed, "buds"), case.batch
        last = [f"stages.{i}.{len(stage) - 1}" for i, stage in enumerate(model.stages)]
        wider = tuple(
            (f"stages.{i}.{j}.conv1", block.inner + case.multiple)
            for i, stage in enumerate(model.stages)
            for j, block in enumerate(stage)
        )
        grow_(model, None, x, None, wider=wider, deeper=tuple(last), breaker="pair", generator=g)


def _mean(tensors):
    return torch.cat(list(tensors)).mean().item()


def _prices(case):
    """Per stage (ms of a channel inside of a block, ms of a block): from what widening and deepening add."""
    found = []
    for i in range(len(case.model.stages)):
        widen, deepen = f"widen stage {i + 1}", f"deepen stage {i + 1}"
        if widen not in case.times or deepen not in case.times:
            raise BadInput(f"stage {i + 1} has no price: the times lack {widen!r} or {deepen!r}")
        found.append((case.price(widen) / case.added(i), case.price(deepen)))
    return tuple(found)


def _left(now, before, prices):
    """What is left: per stage of its channels and of its blocks, and of the whole by price."""
    count = range(len(prices))
    channels = [
        _mean(survival(a[1], b[1]) for a, b in zip(now, before, strict=True) if a[0] == i) for i in count
    ]
    blocks = [
        _mean(survival(a[2], b[2]) for a, b in zip(now, before, strict=True) if a[0] == i) for i in count
    ]
    worth = [(prices[a[0]][0] * len(a[1]), channels[a[0]]) for a in now]
    return channels, blocks, sum(w * left for w, left in worth) / sum(w for w, _ in worth)


@dataclass(frozen=True)
class Forks:
    """Try every candidate for the time of a few steps.

    (e) `steps` steps of the patient, all on the same batches. The learning rate falls to 0, as it will at the
    end of the real training, so that noise is low.

    >>> data = load("synthetic")
    >>> net = build("resnet", data.classes, data.shape, widths=(16,), blocks=(1,))
    >>> times = {"keep": 2.0, "widen stage 1": 3.0, "deepen stage 1": 4.0}
    >>> list(Forks(steps=4)(Case(model=net, dataset=data, recipe=Recipe(), times=times)))
    ['keep', 'widen stage 1', 'deepen stage 1']
    """

    steps: int = 40
    images: int = 1000

    def __call__(self, case: Case) -> dict[str, float]:
        """Score the candidates."""
        return {name: -self.after(case, name)[1] for name in case.times}

    def after(self, case: Case, candidate: str) -> tuple[nn.Module, float]:
        """Return a candidate after its trial, and its loss."""
        steps = max(1, round(self.steps * case.times[KEEP] / case.times[candidate]))
        model = case.treated(candidate)
        per_epoch = len(case.dataset.train) // case.recipe.batch_size
        case.train(model, steps / per_epoch, schedule="linear")
        return model, case.loss(model, self.images)


@dataclass(frozen=True)
class CheapestFlop:
    """Choose the growth that adds the fewest FLOPs.

    (f) What is no growth comes last.

    >>> data = load("synthetic")
    >>> net = build("resnet", data.classes, data.shape, widths=(16,), blocks=(1,))
    >>> times = {"keep": 2.0, "widen stage 1": 3.0, "deepen stage 1": 4.0}
    >>> list(CheapestFlop()(Case(model=net, dataset=data, recipe=Recipe(), times=times)))
    ['keep', 'widen stage 1', 'deepen stage 1']
    """

    def __call__(self, case: Case) -> dict[str, float]:
        """Score the candidates: one over the billions of FLOPs that a training step gains."""
        shape, batch = case.dataset.shape, case.recipe.batch_size
        flops = {
            n: step_flops(networks.ResNet(case.dataset.classes, shape[0], **s), shape, batch) / 1e9
            for n, s in candidates(case.model.settings(), case.multiple).items()
            if n in case.times
        }
        more = {n: f - flops[KEEP] for n, f in flops.items()}
        return {n: 1 / more[n] if more[n] > 0 else 0.0 for n in case.times}


@dataclass(frozen=True)
class RandomChoice:
    """Choose by chance.

    (g) What any diagnosis has to beat.

    >>> data = load("synthetic")
    >>> net = build("resnet", data.classes, data.shape, widths=(16,), blocks=(1,))
    >>> times = {"keep": 2.0, "widen stage 1": 3.0, "deepen stage 1": 4.0}
    >>> list(RandomChoice()(Case(model=net, dataset=data, recipe=Recipe(), times=times)))
    ['keep', 'widen stage 1', 'deepen stage 1']
    """

    def __call__(self, case: Case) -> dict[str, float]:
        """Score the candidates."""
        draw = random.Random(f"diagnosis {case.seed} {case.model.settings()}")
        return {name: draw.random() for name in case.times}
