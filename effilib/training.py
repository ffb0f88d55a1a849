"""One training loop for every chapter, readable on one screen (`train`).

All of a method's work is inside the clock. Outside: evaluation for the record, counting, logging, warm-up.
"""

import contextlib
import copy
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from effilib import checkpoint as checkpoints
from effilib import cost, distributed, models, seeds, user_files
from effilib.clock import elapsed, steady_memory
from effilib.dataset import Dataset
from effilib.errors import BadInput, NoEffect
from effilib.evaluation import class_hits, evaluate
from effilib.history import History, judge_
from effilib.hooks import Method, check_methods
from effilib.recipe import (
    LAYOUTS,
    Recipe,
    at_least_fp32,
    autocast,
    backend,
    can_compile,
    resolve_layout,
    resolve_precision,
)
from effilib.run import Run
from effilib.seeds import stream

__all__ = ["EVALUATIONS", "train"]
EVALUATIONS = 3  # of the validation set in a run: two for progress and pictures, and the end, which counts


def train(
    model: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    methods: Iterable[Method] = (),
    seed: int = 0,
    *,
    checkpoint: str | Path | None = None,
    evaluations: int = EVALUATIONS,
    progress: Callable[[dict], None] | None = None,
) -> History:
    """Train `model` in place on `dataset` and return its `History`.

    methods: `Method`s, called in order. seed: of data order, dropout and the methods' draws (the initial
    weights are the caller's). The same seed and number of threads give bit-equal weights on a CPU.
    checkpoint: a file, written after every epoch; if it is there, training goes on from it. evaluations: of
    the validation set. progress: called with a dict after each.

    Called by all processes that `torchrun` started, they train together (`effilib.distributed`); dropout
    draws for each share apart. Only rank 0 reads and writes the checkpoint, and calls `progress`.

    Raises `BadInput` for a batch larger than the training split, a precision that the machine does not have,
    a checkpoint that is damaged or another run's, or processes that were not all called with the same.

    >>> data = load("synthetic")
    >>> net = build("resnet", data.classes, data.shape, widths=(8, 16), blocks=(1, 1))
    >>> history = train(net, data, Recipe(epochs=3, batch_size=32))
    >>> history.steps, len(history.rows), history.accuracy > 50
    (33, 3, True)
    """
    user_files.refuse_while_loading("a training")
    methods, ranks = check_methods(methods), distributed.ranks(dataset.device)
    if recipe.compile and (why := can_compile(dataset.device)):
        raise BadInput(why)
    if recipe.sync_bn and dataset.device.type != "cuda":
        raise BadInput(
            "sync_bn needs CUDA: PyTorch's SyncBatchNorm has no other kernels; without it each process "
            "normalises its share"
        )
    if any(map(nn.parameter.is_lazy, [*model.parameters(), *model.buffers()])):
        models.fits(model, type(model).__name__, dataset.classes, dataset.shape)  # gives layers their shapes
    dropout = f"dropout, process {ranks.rank}" if ranks.rank else "dropout"
    with seeds.seeded(stream(seed, dropout).initial_seed(), dataset.device), backend(recipe, dataset.device):
        steady_memory()
        layout = LAYOUTS[resolve_layout(recipe, dataset.device, model)]
        mine = (
            checkpoints.identity(model, dataset, recipe, methods, seed, ranks)
            if checkpoint or ranks.size > 1
            else None
        )
        ranks.check(mine)
        saved = checkpoints.read(checkpoint, mine, ranks, dataset.device)
        model = checkpoints.shape_(model, saved).to(dataset.device, memory_format=layout)
        models.in_training(model)
        dataset = replace(dataset, batch=min(dataset.batch, recipe.batch_size))  # what fits in training
        if recipe.precision == "fp64":
            model, dataset = model.double(), replace(dataset, dtype=torch.float64)
        how = dict(augmentation=recipe.augmentation, pad=recipe.pad, flips=recipe.flips)
        batches = rank_batches(dataset, recipe.batch_size, stream(seed, "data"), ranks, **how)
        warm = next(iter(rank_batches(dataset, recipe.batch_size, stream(seed, "warm-up"), ranks)))
        _check(model, dataset, recipe, layout, warm, ranks)
        run = Run(model, dataset, recipe, methods, seed, ranks)
        run.batches, run.resumed, per_epoch = batches, saved is not None, len(batches)
        run.steps = run.schedule.planned = max(1, round(recipe.epochs * per_epoch))
        marks = evaluation_steps(run.steps, evaluations)
        history = History(precision=run.precision, images=len(dataset.train))
        graphs = Counter(torch._dynamo.utils.counters["frames"]) if recipe.compile else None
        history.warm_up = warm_up(run, warm)
        flops = _Flops()
        losses, pending = [], []  # since the last evaluation; rows whose time is read at the epoch's end

        def evaluated():
            with run.clock.paused():
                ranks.statistics_(run.model)
                for hook in run._hooks["on_evaluation"]:
                    hook(run)
                lr = run.lr if run.step < run.steps else 0.0
                row = {"step": run.step, "epoch": run.schedule.position / per_epoch, "lr": lr}
                row["train_loss"] = torch.stack(losses).mean().item() if losses else float("nan")
                row["loss"], row["accuracy"] = ranks.first(
                    lambda: evaluate(run.model, dataset, "validation", run.precision)
                )
                history.diverged |= bool(losses) and not math.isfinite(row["train_loss"] + row["loss"])
                pending.append((len(run.clock.laps), row))
                losses.clear()
                if progress and ranks.rank == 0:
                    progress({**row, "steps": run.steps, "seconds": run.clock.seconds})

        run.clock.start()
        run.call("on_fit_start")
        if saved:
            losses += checkpoints.restore(saved, checkpoint, run, history, batches, flops)
        run.settle()
        for epoch in itertools.count(run.epoch):
            run.epoch = batches.epoch = epoch
            run.call("on_epoch_start")
            for x, y in itertools.islice(batches, run.steps - run.step):
                x = x.contiguous(memory_format=run.layout)
                structure = run.structures  # a hook may change it at the step's end
                run.counting, kind = flops.due(structure), run.step_kind
                if not run.counting:
                    flops.add((structure, run.train_step(x, y)))
                    run.clock.lap(run._kind)
                else:  # the clock takes its kind's median for it, if there are others
                    off = run.clock.paused() if run.steps > 1 else contextlib.nullcontext()
                    with off, cost.Counter(run.model.parameters()) as count:
                        shape = run.train_step(x, y)
                        run.kind = "step"  # ends other work that a hook left open
                    run.clock.lap(kind, substitute=run.steps > 1)
                    run.counting = False
                    flops.add((structure, shape), sum(ranks.gather(count.flops)))
                    history.memory = memory(run, count.saved_bytes, history.memory)
                run.advance()
                losses.append(run.loss)
                if run.step == run.steps:
                    break
                before, now = run.schedule.position - run.schedule.pace, run.schedule.position
                if any(before < mark <= now for mark in marks):
                    evaluated()
            last = run.step == run.steps or history.diverged
            run.level()
            run.call("on_epoch_end")
            if last:
                run.call("on_fit_end")
                if not history.diverged:
                    evaluated()
            seconds = [run.clock.seconds, *run.clock.end_epoch()]
            history.rows += [{**row, "seconds": seconds[laps]} for laps, row in pending]
            pending.clear()
            if last:
                break
            checkpoints.save(checkpoint, mine, run, history, batches, flops, losses)
        history.flops, history.seen = flops.total(), flops.images()
        if graphs is not None:
            check_compiled(graphs)
        return finish(run, history)


def _check(model, dataset, recipe, layout, batch, ranks):
    """Raise `BadInput`, in all processes alike, unless the model can be trained as the recipe says."""
    refused, precision = None, resolve_precision(recipe.precision, dataset.device)
    try:
        models.fits(
            model, type(model).__name__, dataset.classes, dataset.shape,
            batch=batch, layout=layout, autocast=autocast(precision, dataset.device),
        )  # fmt: skip
        resolve_layout(recipe, dataset.device, model)  # now that it is known which ones it can take
    except BadInput as error:
        refused = error
    said = next(filter(None, ranks.gather(str(refused or ""))), "")
    if said:
        raise refused or BadInput(said)


def check_compiled(before: Counter) -> None:
    """Raise `NoEffect` if `torch.compile` gave up on a graph since `before`, its count of frames."""
    now = torch._dynamo.utils.counters["frames"]
    tried, made = (now[name] - before[name] for name in ("total", "ok"))
    if tried > made or not made:  # once it gave up on a function, it does not even try
        raise NoEffect(f"torch.compile made {made} graphs of {max(tried, 1)}: this run is not a compiled one")


def evaluation_steps(steps: int, evaluations: int) -> set[int]:
    """Return the steps after which a run is evaluated, evenly spread; the last one is the end."""
    return {round(steps * i / evaluations) for i in range(1, evaluations + 1)}


def rank_batches(dataset, batch_size, generator, ranks, **options):
    """This process's share of each of the training batches."""
    batches = dataset.shuffled(batch_size, generator, **options)
    batches.ranks = ranks
    return batches


def warm_up(run: Run, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Run forward and backward once on random labels before the clock starts, and undo what that changed.
    Returns seconds.

    Kernels are chosen, and graphs compiled, at the first call of a shape; nothing is learned.
    """
    buffers = copy.deepcopy(dict(run.model.named_buffers()))
    with elapsed() as seconds, seeds.seeded(0, run.device):
        x, y = batch
        for _ in range(2):
            with run.autocast():
                loss = F.cross_entropy(
                    at_least_fp32(run.forward(x.contiguous(memory_format=run.layout))), y.roll(1)
                )
            if run.ranks.size > 1:  # gradients are waited for, also those that only a method's loss will have
                loss = loss + 0 * sum(p.sum() for p in run.model.parameters())
            loss.backward()
    run.optimizer.zero_grad()
    with torch.no_grad():
        for name, b in run.model.named_buffers():
            b.copy_(buffers[name])
    return seconds()


def finish(run: Run, history: History) -> History:
    """The history with what is known only at the end: the clock's account, events, structure and the accuracy
    on the test split.
    """
    clock = run.clock
    distributed.sync_(run.model, on=False)
    history.steps, history.step_times = run.step, clock.steps
    history.events, history.structure = run.events, models.describe(run.model)

    def hits(share):
        how = (run.precision, share, run.dataset.flipped(run.recipe.augmentation))
        return [
            run.ranks.first(lambda s=s: class_hits(run.model, run.dataset, s, *how))
            for s in run.dataset.held_out
        ]

    if run.recipe.multi_crop:
        judge_(history, hits(0.0))
        history.single_crop = history.final
        clock.start()
    found = hits(run.recipe.multi_crop)
    if run.recipe.multi_crop:
        clock.lap("evaluation")
        clock.end_epoch()
    judge_(history, found)
    history.seconds, history.raw_seconds = clock.seconds, clock.raw
    history.kinds = {k: {"count": count, "seconds": seconds} for k, (count, seconds) in clock.kinds.items()}
    return history


def memory(run: Run, saved: int, before: dict) -> dict:
    """Bytes of parameters, optimizer state and tensors saved for backward; the largest over the run's
    structures.
    """
    state = [
        t for s in run.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor) and t.dim()
    ]
    now = {
        "parameters": cost.size_bytes(run.model.parameters()),
        "optimizer": cost.size_bytes(state),
        "saved": saved,
    }
    if run.device.type == "cuda":
        now["peak"] = torch.cuda.max_memory_allocated(run.device)
    return {k: max(v, before.get(k, 0)) for k, v in now.items()}


class _Flops:
    """FLOPs of a run's steps, by structure and shape of the batch.

    A counted step is slow and off the clock; the first step of a later structure, which chooses kernels, has
    to be on it. So the run's first step is counted, for which the warm-up has chosen them, and else the step
    after the first of its kind, a few shapes a structure; where structures last for one step only, every
    fourth of them. What never was is scaled by the size of the batch from what was counted of the same
    structure, or else of the one before or after it.
    """

    SHAPES, APART = 8, 4

    def __init__(self):
        self.steps, self.counted, self.last = {}, {}, None

    def due(self, structure):
        """Whether to count the next step."""
        if self.last is None or structure - max((key[0] for key in self.counted), default=0) >= self.APART:
            return True
        again = self.last[0] == structure and self.last not in self.counted
        return again and sum(key[0] == structure for key in self.counted) < self.SHAPES

    def add(self, key, flops=None):
        """Note a step of (structure, shape), and its FLOPs if they were counted."""
        self.steps[key] = self.steps.get(key, 0) + 1
        self.last = key
        if flops is not None:
            self.counted[key] = flops

    def images(self):
        """Images that all steps trained on."""
        return sum(n * shape[0] for (_, shape), n in self.steps.items())

    def total(self):
        """FLOPs of all steps."""
        return float(sum(n * self._of(key) for key, n in self.steps.items()))

    def _of(self, key):
        if key in self.counted or not self.counted:
            return self.counted.get(key, 0.0)
        structure, shape = key
        near = min(
            self.counted, key=lambda k: (abs(k[0] - structure), abs(math.prod(k[1]) - math.prod(shape)))
        )
        return self.counted[near] * math.prod(shape) / math.prod(near[1])
