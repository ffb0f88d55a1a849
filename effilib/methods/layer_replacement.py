"""Layer replacement under a time budget: the second half of chapter 6.4.

The thesis' word taken literally. Each 3x3 convolution may be replaced by a cheaper structure
(`layer_candidates`), and what layers share may lose channels in blocks of 16 (`layer_sites`). What that saves
is *measured* (`layer_latency`); what it may cost is scored before training by the Fisher potential (Turner et
al. 2020, BlockSwap, arXiv:1906.04113), and a plan is chosen that fits the budget (`layer_search`). A guard
then rebuilds the network, measures its whole training step, and takes back what did not pay.

The outcome is a plan, plain values that go into JSON: the same seed and the same plan give the same weights.
"""

import copy
import json
from dataclasses import dataclass, replace

import torch
from torch import nn

from effilib import models, seeds
from effilib.clock import Stopwatch
from effilib.dataset import Batches, Dataset
from effilib.errors import BadInput
from effilib.history import History
from effilib.methods import Info
from effilib.methods.layer_candidates import CANDIDATES
from effilib.methods.layer_latency import Setting, train_step
from effilib.methods.layer_search import pick, survey
from effilib.methods.layer_sites import replace_, swap_
from effilib.recipe import LAYOUTS, Recipe
from effilib.seeds import stream
from effilib.tasks import Task
from effilib.training import train

__all__ = ["LayerReplacement", "guard", "say"]

INFO = Info(
    name="Resource-aware layer replacement",
    name_de="Ressourcenbewusste Schichten",
    chapter="6.4",
    paper="Park et al. 2019, arXiv:1901.05803",
    claim="Placing layers by the resources that they use shortens distributed training without loss of "
    "accuracy (the paper). Replacement: with layers chosen under a budget of 0.6 of a step's time a "
    "network reaches the same accuracy 1.5x as fast, search included.",
    cost_model="A k x k convolution of C to O channels does k^2 C O products a pixel; depthwise-separable "
    "k^2 C + C O, in g groups k^2 C^2 / g + C O, a bottleneck (C^2 + k^2 C O / r + O^2) / r, of low rank d "
    "k^2 C d + d O, spatial k d (C + O).",
    applies="networks most of whose time is in 3 x 3 convolutions",
)


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
    """Take back what does not pay in a whole training step.

    Returns the plan without it; the model is left as it was. If the step is as short as foreseen, to within
    `least` of the original's, nothing is looked for. Else a replacement pays if the step is slower with that
    layer alone put back, in the shortest of interleaved rounds. If the whole step falls by less than `least`,
    everything is taken back. Adds "reverted" and "measured" (share of the original's step) to the plan.

    >>> net, x, y = build("convnet", 4, (1, 8, 8), widths=(4, 8)), torch.rand(8, 1, 8, 8), torch.arange(8) % 4
    >>> plan = guard(net, {"layers": {"features.4": "dwsep"}}, x, y, Setting(repeats=3))
    >>> plan["layers"] | plan["reverted"]
    {'features.4': 'dwsep'}
    """
    plan = {"layers": {}, "widths": {}, "foreseen": 0.0, **plan}
    kept, share = set(plan["layers"]), 1.0
    if kept or plan["widths"]:
        original, net = copy.deepcopy(model).train(), copy.deepcopy(model).train()
        if plan["widths"]:
            replace_(net, {**plan, "layers": {}}, seed)
        old = {n: net.get_submodule(n) for n in kept}
        if kept:
            replace_(net, {**plan, "widths": {}}, seed)
        net.to(memory_format=LAYOUTS[setting.layout])
        new = {n: net.get_submodule(n) for n in kept}
        step = train_step(
            net, x, y, setting, {*net.parameters(), *(p for m in old.values() for p in m.parameters())}
        )

        def rebuilt(names):
            def run():
                for n in old:
                    swap_(net, n, new[n] if n in names else old[n])
                step()

            return run

        def measured(*without):
            functions = {"original": train_step(original, x, y, setting), "rebuilt": rebuilt(kept)}
            times = setting.interleaved(functions | {n: rebuilt(kept - {n}) for n in without})
            t = {k: min(v) for k, v in times.items()}  # disturbances only ever add
            return t["rebuilt"] / t["original"], {n: t[n] - t["rebuilt"] for n in without}

        with seeds.seeded(stream(seed, "guard").initial_seed(), setting.device):
            share, _ = measured()
            if kept and share > plan["foreseen"] + least:
                share, gains = measured(*kept)
                idle = {n for n in kept if gains[n] <= 0}
                if idle and (kept - idle or plan["widths"]):
                    kept -= idle
                    share, _ = measured()
    nothing = share > 1 - least
    layers = {n: c for n, c in plan["layers"].items() if n in kept and not nothing}
    widths = {} if nothing else plan["widths"]
    reverted = {
        n: c for n, c in (plan["layers"] | plan["widths"]).items() if n not in layers and n not in widths
    }
    measured_share = share if layers or widths else 1.0
    return {**plan, "layers": layers, "widths": widths, "reverted": reverted, "measured": measured_share}


@dataclass(frozen=True, kw_only=True)
class LayerReplacement:
    """Choose layers on the clock, then train the rebuilt network.

    Survey, choice and guard; the training begins from scratch. For `Arm.fit`: (task, seed) -> `History`. The
    table of latencies is charged to every seed with what it took, also where it comes from the cache. The
    plan stands in the history's events and structure. Raises `BadInput` for a plan that is no JSON.

    >>> fit = LayerReplacement(plan='{"layers": {"stages.0.0.conv1": "dwsep"}}')
    >>> fit(task("smoke", "synthetic"), seed=0).events[0]["text"]
    'stages.0.0.conv1 -> dwsep'
    """

    budget: float = 0.6  # of the step's time
    candidates: tuple = CANDIDATES  # (): only cuts
    block: int = 16  # channels that a node loses at a time; 0: only other structures
    repeats: int = 5  # rounds of every measurement
    plan: str = ""  # JSON of a plan to replay instead; nothing is measured then

    def __post_init__(self):
        try:
            given = json.loads(self.plan or "{}")
        except ValueError as error:
            raise BadInput(f"layer replacement: the plan is no JSON: {error}") from error
        if not isinstance(given, dict):
            raise BadInput(
                'layer replacement: a plan is {"layers": {name: candidate}, "widths": {node: width}}'
            )

    def __call__(self, task: Task, seed: int) -> History:
        dataset = task.load()
        model, before = task.build(dataset, seed), History()
        structure = models.describe(model)
        watch = Stopwatch(dataset.device)
        watch.start()
        given = json.loads(self.plan) if self.plan else None
        plan, cached = (given, 0.0) if given else self.search(model, dataset, task.recipe, seed)
        if given or plan["layers"] or plan["widths"]:
            replace_(model, plan, seed)
        watch.lap("search")
        watch.end_epoch()
        if not given:
            kinds = {"search": {"count": 1, "seconds": watch.seconds + cached}}
            before = History(seconds=watch.seconds + cached, raw_seconds=watch.raw + cached, kinds=kinds)
        event = {"step": 0, "epoch": 0, "method": type(self).__name__, "text": say(plan), "plan": plan}
        before.events = [event]
        after = train(model, dataset, task.recipe, (), seed)
        done = {"replaced": plan.get("layers", {}), "cut": plan.get("widths", {})}
        return replace(before + after, structure={**structure, **done})

    def search(self, model: nn.Module, dataset: Dataset, recipe: Recipe, seed: int) -> tuple[dict, float]:
        """Return (plan, seconds charged for what came from the cache)."""
        setting = Setting.of(recipe, dataset.device, repeats=self.repeats)
        g = stream(seed, "layer replacement")
        batches = Batches(dataset, recipe.batch_size, g, augmentation=recipe.augmentation)
        x, y = next(iter(batches))
        net = copy.deepcopy(model).to(memory_format=LAYOUTS[setting.layout])
        x = x.contiguous(memory_format=LAYOUTS[setting.layout])
        how = dict(candidates=self.candidates, block=self.block, seed=seed)
        found = survey(net, x, y, setting, **how)
        return guard(net, pick(found, self.budget), x, y, setting, seed=seed), found["cached"]


def say(plan: dict) -> str:
    """Return a plan as a sentence.

    >>> say({"layers": {"features.4": "dwsep"}, "widths": {"features.0": 16}})
    'features.4 -> dwsep, features.0 -> 16 channels'
    """
    moves = plan.get("layers", {}) | {n: f"{w} channels" for n, w in plan.get("widths", {}).items()}
    text = ", ".join(f"{n} -> {c}" for n, c in moves.items()) or "nothing replaced"
    if "measured" in plan:
        text += f"; foreseen {plan['foreseen']:.2f}, measured {plan['measured']:.2f} of the step"
    back = ", ".join(f"{n} ({c})" for n, c in plan.get("reverted", {}).items())
    return (
        text + (f"; taken back: {back}" if back else "") + (f"; {plan['note']}" if plan.get("note") else "")
    )
