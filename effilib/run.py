"""Hold the state of a training run, and change it: what a method sees and may do."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from effilib import convolution, distributed
from effilib.clock import Stopwatch
from effilib.dataset import Split
from effilib.errors import BadInput
from effilib.hooks import HOOKS, Method, checked_hook
from effilib.normalization import fused
from effilib.recipe import LAYOUTS, Schedule, at_least_fp32, autocast, resolve_layout, resolve_precision
from effilib.seeds import stream
from effilib.surgery import undoing

__all__ = ["Run"]


class Run:
    """What a method sees of the training that it takes part in.

    Over several processes x, y and `logits` are this one's share of the batch; `loss` is the mean over the
    whole. What is decided from anything else that is a share's goes through `ranks` first
    (`effilib.distributed`).

    >>> class Look(Method):
    ...     def on_step_end(self, run):
    ...         run.log(self, f"step {run.step} of {run.steps} at {run.lr:.2f}")
    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(4, 8))
    >>> [event["text"] for event in train(net, data, Recipe(epochs=1), [Look()]).events]
    ['step 0 of 2 at 0.10', 'step 1 of 2 at 0.06']
    """

    def __init__(
        self, model, dataset, recipe, methods, seed, ranks=distributed.ALONE, *, optimizer=None, layout=None
    ):
        self._model, self.dataset, self.recipe = model, dataset, recipe
        self.methods, self.seed, self.ranks = methods, seed, ranks
        self.resumed = False  # from a checkpoint: the model has its later shape when methods are set up
        self.device = dataset.device
        self.precision = resolve_precision(recipe.precision, self.device)
        self.layout = layout or LAYOUTS[resolve_layout(recipe, self.device, model)]
        self.state = {}  # method -> its state; goes into checkpoints
        self.events = []  # what methods did, in words: goes into the history
        self.clock = Stopwatch(self.device)
        self.generators = self.own = {m: stream(seed, f"method {i}") for i, m in enumerate(methods)}
        if ranks.size > 1:
            self.own = {m: stream(seed, f"method {i}, process {ranks.rank}") for i, m in enumerate(methods)}
        self.optimizer = optimizer or torch.optim.SGD(
            model.parameters(), lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0,
            weight_decay=recipe.weight_decay, fused=True,
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.step = self.epoch = self.steps = 0  # done so far, and in all
        self.batches = None  # what the loop reads
        self.schedule = Schedule(lr_at=recipe.lr_at)
        self.logits = self.loss = self.targets = None  # of this step; the labels are those trained on
        self.calling = ""  # the hook that runs, in words
        self.counting = False  # whether this step's FLOPs are counted, off the clock
        # what a training step is timed as: "step" is one on full-size images
        self.step_kind = self._kind = "step"
        self.structures = 0  # how often the structure changed
        self._parameters = _parameters(model)
        self.wrap()
        self._hooks = {
            h: [checked_hook(m, h) for m in methods if getattr(type(m), h) is not getattr(Method, h)]
            for h in HOOKS
        }

    @property
    def model(self) -> nn.Module:
        """The network; another one takes its place by `restructure` only."""
        return self._model

    @model.setter
    def model(self, model):
        raise BadInput("a hook cannot set run.model: return the new one from run.restructure(change)")

    @property
    def decide(self) -> Split:
        """Images that a method may look at, which are not trained on."""
        if "validation" not in self.dataset.held_out:
            raise BadInput(f"{self.calling} looks at images that are not trained on; with whole=True all are")
        return self.dataset.decide

    @property
    def lr(self) -> float:
        """Learning rate of this step."""
        return self.schedule.lr

    @property
    def kind(self):
        """The kind of work that the clock runs for. Setting it ends what ran so far under the old kind; a
        step's end resets it.

        A kind that recurs in an epoch has a median of its own; one-off work, e.g. "reconfigure", is never
        capped. A method whose steps are of another size for a while sets `step_kind`, so that they are not
        compared with the others."""
        return self._kind

    @kind.setter
    def kind(self, kind):
        if self.counting and self._kind.startswith("step"):
            self.clock.start()  # the counted step is off the clock, work of another kind within it is not
        else:
            self.clock.lap(self._kind)
        self._kind = self.step_kind if kind == "step" else kind

    def generator(self, method: Method, share: bool = False) -> torch.Generator:
        """Return the method's own random stream, on the CPU.

        Its draws do not shift the order of the data. It is the same in all processes, for what they decide
        alike. share: of draws for single images or activations, of which every process has its own. With one
        process both are the same stream."""
        return (self.own if share else self.generators)[method]

    def log(self, method: Method, text: str, **values) -> None:
        """Note what a method did, for the history: a sentence and values.

        Tensors, arrays and their scalars become plain numbers and lists. Raises `BadInput` for what no file
        could hold.
        """
        name = type(method).__name__
        values = {k: _plain(v, f"{name}: run.log(..., {k}=...)") for k, v in values.items()}
        self.events.append({"step": self.step, "epoch": self.epoch, "method": name, "text": text, **values})

    def call(self, hook: str) -> None:
        """Call a hook of every method that has it; its time is its own segment."""
        self._check_structure("a hook that is called at every step")
        if self._hooks[hook]:
            self.kind = hook
            for f in self._hooks[hook]:
                f(self)
                if hook != "on_fit_end":  # which leaves a plain model behind
                    self._check_structure(f.__qualname__)
            self.kind = "step"

    def _check_structure(self, who):
        if self.methods and _parameters(self.model) != self._parameters:
            raise BadInput(
                f"{who} changed the network's parameters by itself: do it in run.restructure(change), so that"
                " the optimizer follows"
            )

    def restructure(self, change: Callable) -> None:
        """Change the structure in mid-training: the one way to do it.

        `change(model, optimizer)` works in place or returns a new model; it must leave the optimizer with
        exactly the model's parameters, but for those that it did not hold before (fine-tuning), and no state
        of others. Compiled graphs, the exchange of gradients and the count of FLOPs follow here. Timed as
        "reconfigure", never capped. Call it between steps: at an epoch's start or end, or a step's end; with
        several processes in all of them alike: at an epoch's end they are equal to the last bit, so that what
        is read from the model is too. Raises `ValueError` if the optimizer and the model differ afterwards.
        After an error all is as it was."""
        before, self.kind, left_out = self._kind, "reconfigure", self._left_out(self.model)
        distributed.sync_(self.model, on=False)  # surgery knows plain layers
        try:
            with undoing(self.model, self.optimizer):
                model = change(self.model, self.optimizer) or self.model
                held = [p for group in self.optimizer.param_groups for p in group["params"]]
                if (
                    len(held) != len(set(held))
                    or not set(held) <= set(model.parameters())
                    or not self._left_out(model) <= left_out
                    or not set(self.optimizer.state) <= set(held)
                ):
                    raise ValueError(
                        "after a change of structure the optimizer must hold exactly the model's parameters"
                    )
            self._model = model
            self.structures += 1
        finally:
            self.settle()
            self.kind = before

    def _left_out(self, model):
        """Names of the parameters that the optimizer does not hold: it is a user's own that fine-tunes."""
        held = {p for group in self.optimizer.param_groups for p in group["params"]}
        return {name for name, p in model.named_parameters() if p not in held}

    def group(self, parameters: Iterable[nn.Parameter], **settings) -> None:
        """Move parameters into an optimizer's group of their own.

        Where they are not yet in it. settings: of the group: `lr_factor` on the learning rate, `ends`, the
        share of the run after which its own schedule has ended, or any of the optimizer's.
        """
        moved = set(parameters)
        for g in list(self.optimizer.param_groups):
            if mine := [p for p in g["params"] if p in moved]:
                g["params"] = [p for p in g["params"] if p not in moved]
                self.optimizer.add_param_group({**g, **settings, "params": mine})
        self.optimizer.param_groups[:] = [g for g in self.optimizer.param_groups if g["params"]]

    def group_lr(self, group: dict) -> float:
        """Learning rate of this step in a group of the optimizer."""
        if "ends" not in group:
            return self.lr * group.get("lr_factor", 1.0)
        steps = group["ends"] * self.schedule.planned
        lr = self.schedule.lr_at(min(self.schedule.position, steps), steps)
        return self.schedule.scale * lr * group.get("lr_factor", 1.0)

    def grow_batch(self, factor: float, lr_factor: float = 1.0) -> None:
        """Train on larger batches from the next epoch on.

        `factor` times as large, at `lr_factor` times the schedule's learning rate.

        The epochs and the schedule over them stay; there are fewer steps. Call it at an epoch's start or end.
        """
        size = round(factor * self.batches.batch_size)
        if not 0 < size <= len(self.dataset.train):
            raise BadInput(
                f"a batch of {size} does not fit {self.dataset.name}: it has {len(self.dataset.train)} "
                "training images"
            )
        self.schedule.pace *= size / self.batches.batch_size
        self.batches.batch_size = size
        self.schedule.scale *= lr_factor
        self.steps = self.step + self.schedule.left

    def replan(self, left: int) -> None:
        """Go through the rest of the schedule in so many steps.

        More or fewer than planned. Call it at an epoch's start or end.
        """
        if left < 1:
            raise BadInput(f"a run needs at least one more step, got {left}")
        self.schedule.pace = (self.schedule.planned - self.schedule.position) / left
        self.steps = self.step + left

    def settle(self) -> None:
        """Restore the invariants after surgery.

        They are: the recipe's memory format, one momentum buffer per parameter, 0 where there was none, all
        of the optimizer's state laid out as its parameters, and a fresh forward. PyTorch's fused optimizer
        fails where only some have a momentum, and mixes up elements where the layouts differ.
        """
        self.model.to(memory_format=self.layout)
        momentum = self.optimizer.defaults.get("momentum")
        for p in (p for group in self.optimizer.param_groups for p in group["params"]):
            state = self.optimizer.state[p] if momentum else self.optimizer.state.get(p, {})
            if momentum and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(p)
            for name, t in state.items():
                if isinstance(t, torch.Tensor) and t.shape == p.shape and t.stride() != p.stride():
                    state[name] = torch.empty_like(p).copy_(t)
        self._parameters = _parameters(self.model)
        self.wrap()

    def align_gradients(self) -> None:
        """Lay out gradients as their parameters, for the same reason."""
        for p in self.model.parameters():
            if p.grad is not None and p.grad.stride() != p.stride():
                p.grad = torch.empty_like(p).copy_(p.grad)

    def wrap(self) -> None:
        """Make the forward that the loop calls.

        It is the model, wrapped in DDP if there are several processes, compiled if the recipe asks for it.
        """
        self.ranks.statistics_(convolution.guard_(self.model))
        self.wrapped = self.ranks.wrap(self.model, self.recipe.sync_bn)
        if self.recipe.compile:
            # else it stops compiling after eight structures in a process, without a word
            torch._dynamo.reset()
            self.forward = torch.compile(self.wrapped)
        else:
            self.forward = self.wrapped

    def level(self) -> None:
        """Over several processes: let all go on from rank 0's numbers, to the last bit, and from the mean of
        BatchNorm's statistics.
        """
        if self.ranks.size > 1:
            self.ranks.statistics_(self.model)
            states = [
                self.optimizer.state.get(p, {})
                for group in self.optimizer.param_groups
                for p in group["params"]
            ]
            momenta = [t for state in states for t in state.values() if isinstance(t, torch.Tensor)]
            self.ranks.copy_([*self.model.parameters(), *self.model.buffers(), *momenta])

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Compute inside in the run's number format, and with its kernels."""
        with autocast(self.precision, self.device), fused(self.recipe.fused):
            yield

    def train_step(self, x: torch.Tensor, y: torch.Tensor) -> tuple[int, ...]:
        """Forward, backward, update; the learning rate of this step. A step that is counted is not compiled.

        Returns the shape of the batch that was trained on.
        """
        x, y = self.change_batch(x, y)
        with self.autocast():
            logits = (self.wrapped if self.counting else self.forward)(x)
        smoothing = self.recipe.label_smoothing
        loss = self.add_terms(F.cross_entropy(at_least_fp32(logits), y, label_smoothing=smoothing), logits)
        self.scaler.scale(self.ranks.weigh(loss, self.batches)).backward()
        if self.counting:
            self.ranks.complete(self.model)
        self.update(self.scaler)
        return tuple(x.shape)

    def change_batch(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the batch as the methods want it."""
        for hook in self._hooks["on_batch"]:
            x, y = hook(self, x, y)
        self.targets = y
        return x, y

    def add_terms(self, loss: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits' loss with what the methods add."""
        self.logits, self.loss = logits, self.ranks.mean(loss.detach(), self.batches)
        for hook in self._hooks["loss_terms"]:
            term = hook(self)
            if term is not None:
                loss = loss + term
        if not loss.requires_grad:
            raise BadInput(f"nothing is left to train at step {self.step}: all parameters are frozen")
        return loss

    def update(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """Let the optimizer step on the gradients, and reset them; the methods' work before and after it."""
        if scaler:
            scaler.unscale_(self.optimizer)
        self.before_step(scaler)
        if scaler:
            scaler.step(self.optimizer)
            scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.after_step()

    def before_step(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """Let the methods work on the gradients, which are unscaled; set the learning rate.

        scaler: skips the step if a gradient overflowed; the methods do not see such gradients.
        """
        scaled = scaler and scaler.is_enabled()
        if self._hooks["on_after_backward"] and not (scaled and self._overflowed()):
            for hook in self._hooks["on_after_backward"]:
                hook(self)
            self.align_gradients()
        self.set_lr()

    def _overflowed(self):
        held = (p.grad for group in self.optimizer.param_groups for p in group["params"])
        finite = [grad.isfinite().all() for grad in held if grad is not None]
        return not torch.stack(finite).all()  # waits for the device once

    def set_lr(self) -> None:
        """Give the optimizer this step's learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.group_lr(group)

    def after_step(self) -> None:
        """Let the methods work on the weights."""
        for hook in self._hooks["on_step_end"]:
            hook(self)

    def advance(self) -> None:
        """Go on to the next step."""
        self._kind = self.step_kind
        self.step += 1
        self.schedule.position = self.schedule.after


def _parameters(model):
    return {p: p.shape for p in model.parameters()}


def _plain(value, what):
    """A value as numbers, words, None, and lists, tuples and dicts of these; `what` names it in the error."""
    if hasattr(value, "dtype") and hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {_plain(k, what): _plain(v, what) for k, v in value.items()}
    if isinstance(value, list | tuple):
        parts = [_plain(v, what) for v in value]
        return parts if isinstance(value, list) else tuple(parts)
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if value is None:
        return value
    raise BadInput(
        f"{what} is or holds an object of type {type(value).__name__}, which no history can hold: give"
        " numbers, words, None, tensors, arrays, and lists, tuples and dicts of these"
    )
