"""One training loop for every chapter, readable on one screen (`train`), and the hooks by which a method
takes part.

All of a method's work is inside the clock. Outside: evaluation for the record, counting, logging, warm-up.
"""

import contextlib
import copy
import difflib
import itertools
import math
import shutil
import statistics as stats
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from effilib import checkpoint as checkpoints
from effilib import convolution, cost, distributed, models, user_files
from effilib.clock import Stopwatch, cpu_flags, elapsed, steady_memory
from effilib.data import FLIPS, Dataset, Split
from effilib.errors import BadInput, NoEffect, NotApplicable, choose, within
from effilib.models import stream
from effilib.normalization import fused
from effilib.surgery import undoing

__all__ = [
    "EVALUATIONS", "LAYOUTS", "History", "Method", "Recipe", "Run", "Schedule", "at_least_fp32", "autocast",
    "can_compile", "check_methods", "class_hits", "crop_logits", "evaluate", "judge_", "native_bf16",
    "resolve_layout", "resolve_precision", "stream", "train",
]  # fmt: skip
EVALUATIONS = 3  # of the validation set in a run: two for progress and pictures, and the end, which counts
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained: SGD with Nesterov momentum, the learning rate warmed up and then lowered.

    >>> recipe = Recipe(epochs=5, lr=0.4)
    >>> [round(recipe.lr_at(step, 10), 2) for step in range(10)]
    [0.13, 0.27, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05]
    """

    epochs: float = 10  # a fraction ends in mid-epoch
    batch_size: int = 128  # of all processes together
    lr: float = 0.1  # the highest of the schedule
    schedule: str = "linear"  # down to `lr_end`; or "cosine" down to it, or "constant"
    warmup: float = 0.2  # share of the steps
    lr_start: float = 0.0  # where the warm-up begins and where the schedule ends, as shares of lr
    lr_end: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    augmentation: str = "auto"  # the data set's; or "none", "crop", "crop+flip"
    pad: int | None = None  # pixels by which a crop is shifted at most; None: the data set's
    # where images are mirrored: each by chance, or "alternating", in every second epoch (Jordan 2024)
    flips: str = "random"
    # share of the held-out images, the least certain ones, judged by six views at the end, on the clock
    multi_crop: float = 0.0
    # bf16 where the machine has it natively, else fp32; or "fp32", "bf16", "fp64", on CUDA "tf32", "fp16"
    precision: str = "auto"
    memory_format: str = "auto"  # channels_last where the kernels read it, else contiguous; or one of the two
    compile: bool = False
    fused: bool = True  # BatchNorm, a sum and ReLU by one kernel where our networks have them: `norm_relu`
    sync_bn: bool = (
        False  # over several GPUs: BatchNorm's moments of the whole batch; else of each share by itself
    )

    def __post_init__(self):
        choose("schedule", self.schedule, ("linear", "cosine", "constant"))
        choose("precision", self.precision, ("auto", "fp32", "tf32", "bf16", "fp16", "fp64"))
        choose("memory format", self.memory_format, ("auto", *LAYOUTS))
        choose("augmentation", self.augmentation, ("auto", "none", "crop", "crop+flip"))
        choose("flips", self.flips, FLIPS)
        if self.pad is not None:
            within("recipe: pad", self.pad, "a whole number, 0 or above")
        ranges = {
            "epochs": "above 0", "batch_size": "a whole number above 0", "lr": "above 0",
            "warmup": "from 0 to 1", "momentum": "from 0 to below 1", "weight_decay": "0 or above",
            "label_smoothing": "from 0 to below 1", "lr_start": "from 0 to 1", "lr_end": "from 0 to 1",
            "multi_crop": "from 0 to 1",
        }  # fmt: skip
        for name, words in ranges.items():
            within(f"recipe: {name}", getattr(self, name), words)

    def lr_at(self, step: float, steps: float) -> float:
        """Learning rate of step 0, 1, ..., steps - 1."""
        rise = self.warmup * steps
        if step < rise:
            return self.lr * (self.lr_start + (1 - self.lr_start) * (step + 1) / (math.floor(rise) + 1))
        left = (steps - step) / (steps - rise)  # 1 -> 0
        cosine = 0.5 - 0.5 * math.cos(math.pi * left)
        fall = {"linear": left, "cosine": cosine, "constant": 1.0}[self.schedule]
        return self.lr * (self.lr_end + (1 - self.lr_end) * fall)


@dataclass
class Schedule:
    """Hold where a run is on its recipe's schedule, and its pace.

    Positions are in steps of the recipe's batch size. `lr_at` is (position, planned) -> learning rate; a
    method may put one of its own here when it is set up.

    >>> schedule = Schedule(lr_at=Recipe(lr=0.4, warmup=0).lr_at, planned=4, position=2)
    >>> schedule.lr
    0.2
    """

    lr_at: Callable[[float, int], float]
    planned: int = 0  # positions in all
    position: float = 0
    pace: float = 1  # positions a step
    scale: float = 1.0  # of the learning rate

    @property
    def lr(self) -> float:
        """Learning rate of this step."""
        return self.scale * self.lr_at(self.position, self.planned)

    @property
    def after(self) -> float:
        """Position after this step."""
        return self.position + self.pace

    @property
    def left(self) -> int:
        """Steps that are left at this pace."""
        return math.ceil(round((self.planned - self.position) / self.pace, 6))  # 6.000000000000001 is 6


class Method:
    """What takes part in training. A frozen dataclass of settings; its state lives in `run.state[self]`, made
    in `on_fit_start`.

    Override what is needed; every hook takes the `Run`. Hooks are called in the order of the methods.

    >>> class Noise(Method):
    ...     def on_after_backward(self, run):
    ...         for p in run.model.parameters():
    ...             p.grad += 0.01 * torch.randn(p.shape, generator=run.generator(self))
    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(4, 8))
    >>> train(net, data, Recipe(epochs=1), [Noise()]).steps
    2
    """

    def on_fit_start(self, run: "Run") -> None:
        """Before the first step: install, convert layers, make the state."""

    def on_epoch_start(self, run: "Run") -> None:
        """Before an epoch's first step."""

    def on_batch(self, run: "Run", x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the (x, y) to train on: x (N, C, H, W), y (N,)."""
        return x, y

    def loss_terms(self, run: "Run") -> torch.Tensor | None:
        """Return a scalar to add to the loss, or None.

        `run.logits` and `run.loss` are there.
        """

    def on_after_backward(self, run: "Run") -> None:
        """Act on unscaled gradients, before the optimizer's step."""

    def on_step_end(self, run: "Run") -> None:
        """Act after the optimizer's step."""

    def on_epoch_end(self, run: "Run") -> None:
        """After an epoch's last step, before its evaluation."""

    def on_evaluation(self, run: "Run") -> None:
        """Before an evaluation for the record, off the clock: make the model what evaluation expects, without
        training it.
        """

    def on_fit_end(self, run: "Run") -> None:
        """After the last step, before the last evaluation: leave a plain model behind."""


HOOKS = [name for name in vars(Method) if name.startswith("on_") or name == "loss_terms"]


def check_methods(methods: Iterable[Method]) -> tuple[Method, ...]:
    """Return the methods; raise `BadInput` for what could not take part in a run.

    That is a hook that nobody would call, or settings by which no state could be kept.

    >>> class Misspelt(Method):
    ...     def on_epoch_begin(self, run): ...
    >>> check_methods([Misspelt()])
    Traceback (most recent call last):
    effilib.errors.BadInput: nothing calls Misspelt.on_epoch_begin: ... (did you mean 'on_epoch_start'?)
    """
    methods = tuple(methods)
    for m in methods:
        cls = m if isinstance(m, type) else type(m)
        name = cls.__name__
        if not issubclass(cls, Method) or cls is m:
            raise BadInput(f"expected a method with its settings, an instance of effilib.Method, got {m!r}")
        for word in sorted({*dir(cls)} - {*dir(Method)}):
            meant = word.replace("begin", "start").replace("train", "fit")  # as other libraries say
            near = difflib.get_close_matches(meant, HOOKS, n=1, cutoff=0.85)
            if (near or word.startswith("on_")) and callable(getattr(cls, word)):
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise BadInput(f"nothing calls {name}.{word}: the hooks are {', '.join(HOOKS)}{hint}")
        try:
            hash(m)
        except TypeError as error:
            held = {k: type(v).__name__ for k, v in vars(m).items() if type(v).__hash__ is None}
            said = ", ".join(f"{k!r} is a {kind}: make it a tuple" for k, kind in held.items())
            frozen = "write @dataclass(frozen=True, kw_only=True) above it"
            raise BadInput(f"the settings of {name} could change in mid-run; {said or frozen}") from error
    if len(set(methods)) < len(methods):
        raise BadInput(f"two methods are equal and would share their state: {', '.join(map(repr, methods))}")
    return methods


def _hook(method, name):
    """A method's hook, which is named in what it raises, and whose answer is checked."""
    own, said = getattr(method, name), f"{type(method).__name__}.{name}"

    def hook(run, *batch):
        before, run.calling = _shared(), said
        try:
            answer = own(run, *batch)
        except SystemExit as error:
            raise BadInput(f"{said} ends the program at step {run.step}: exit({error.code!r})") from error
        except Exception as error:
            error.add_note(f"{said} raised this, at step {run.step}")
            raise
        if changed := [s for s, value in _shared().items() if value != before[s]]:
            for setting in changed:
                getattr(torch, setting)(before[setting])
            raise BadInput(
                f"{said} left torch.{changed[0]}({before[changed[0]]}) changed, which other runs share:"
                " it has to set that back"
            )
        if name == "on_batch" and not _is_batch(answer):
            raise BadInput(
                f"{said} has to return the (x, y) to train on, a label for each image; it returned"
                f" {_kind(answer)}"
            )
        if name == "loss_terms" and answer is not None and getattr(answer, "ndim", isinstance(answer, str)):
            raise BadInput(f"{said} has to return one number, it returned {_kind(answer)}")
        return answer

    hook.__qualname__ = said
    return hook


def _shared():
    """PyTorch's settings of the whole process, each by the function that sets it."""
    return {
        "set_grad_enabled": torch.is_grad_enabled(),
        "set_num_threads": torch.get_num_threads(),
        "set_default_dtype": torch.get_default_dtype(),
        "set_float32_matmul_precision": torch.get_float32_matmul_precision(),
        "use_deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
    }


def _kind(answer):
    """What a hook returned, in words."""
    if isinstance(answer, tuple | list):
        return f"({', '.join(map(_kind, answer))})"
    shape = f" of shape {tuple(answer.shape)}" if isinstance(answer, torch.Tensor) else ""
    return f"{'None' if answer is None else type(answer).__name__}{shape}"


def _is_batch(answer):
    tensors = isinstance(answer, tuple | list) and all(isinstance(t, torch.Tensor) for t in answer)
    return tensors and len(answer) == 2 and 0 < len(answer[0]) == len(answer[1])


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
            h: [_hook(m, h) for m in methods if getattr(type(m), h) is not getattr(Method, h)] for h in HOOKS
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


@dataclass
class History:
    """What a training run did and cost. `a + b` is one run after the other, on one clock.

    >>> once = History(rows=[{"step": 4, "epoch": 1, "seconds": 1.5, "accuracy": 90.0}], steps=4, seconds=1.5)
    >>> (once + once).rows[-1]
    {'step': 8, 'epoch': 2, 'seconds': 3.0, 'accuracy': 90.0}
    """

    rows: list = field(
        default_factory=list
    )  # an evaluation: step, epoch, seconds, train_loss, loss, accuracy (%), lr
    steps: int = 0
    seconds: float = 0.0  # on the clock, less stalls
    raw_seconds: float = 0.0  # on the clock
    step_times: list = field(default_factory=list)  # on CUDA: from which stalls are found across seeds
    kinds: dict = field(default_factory=dict)  # kind -> {count, seconds}
    flops: float = 0.0  # of all training steps, products only
    images: int = 0  # different training images
    seen: int = 0  # images trained on, each as often as it was
    final: float | None = None  # % of all held-out images (validation and test) at the end: what is judged
    single_crop: float | None = None  # % of the same images without multi-crop evaluation, where that is on
    balanced_accuracy: float = float("nan")  # %, mean over the classes of the same images
    held_out: int = 0  # how many they are
    majority: float = 0.0  # %, their largest class
    classes: int = 0
    memory: dict = field(default_factory=dict)  # bytes: parameters, optimizer, saved, peak (CUDA)
    test_accuracy: float | None = None  # %, read once, at the end
    warm_up: float = 0.0  # seconds, outside the clock
    events: list = field(default_factory=list)
    diverged: bool = False
    structure: dict = field(default_factory=dict)
    precision: str = ""

    @property
    def accuracy(self) -> float:
        """Accuracy at the end in %, on all held-out images."""
        return self.rows[-1]["accuracy"] if self.final is None else self.final

    @property
    def step_seconds(self) -> float:
        """Counted seconds of the whole run, over its steps."""
        return self.seconds / self.steps

    def __add__(self, other):
        later = {
            "seconds": self.seconds,
            "step": self.steps,
            "epoch": self.rows[-1]["epoch"] if self.rows else 0,
        }
        rows = self.rows + [{k: v + later.get(k, 0) for k, v in row.items()} for row in other.rows]
        events = self.events + [
            {k: v + later[k] if k in ("step", "epoch") else v for k, v in e.items()} for e in other.events
        ]
        kinds = dict(self.kinds)
        for kind, k in other.kinds.items():
            mine = kinds.get(kind, {"count": 0, "seconds": 0.0})
            kinds[kind] = {name: mine[name] + k[name] for name in mine}
        summed = ("steps", "seconds", "raw_seconds", "flops", "seen", "warm_up", "step_times")
        both = {**self.memory, **other.memory}
        return replace(
            other,
            rows=rows,
            events=events,
            kinds=kinds,
            images=max(self.images, other.images),
            memory={k: max(self.memory.get(k, 0), other.memory.get(k, 0)) for k in both},
            diverged=self.diverged or other.diverged,
            **{name: getattr(self, name) + getattr(other, name) for name in summed},
        )


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
    with models.seeded(stream(seed, dropout).initial_seed(), dataset.device), backend(recipe, dataset.device):
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
        losses, pending = (
            [],
            [],
        )  # losses since the last evaluation; rows whose time is read at the epoch's end

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
    with elapsed() as seconds, models.seeded(0, run.device):
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


@torch.no_grad()
def evaluate(model: nn.Module, dataset: Dataset, split: str, precision: str = "fp32") -> tuple[float, float]:
    """Return (mean cross entropy, accuracy in %) on a split.

    In eval mode. split: "decide", "validation" or "test".

    >>> data = load("synthetic")
    >>> net = build("convnet", data.classes, data.shape, widths=(4, 8))
    >>> loss, accuracy = evaluate(net, data, "validation")
    >>> 0 <= accuracy <= 100
    True
    """
    total, correct = 0.0, 0
    part = getattr(dataset, split)
    with convolution.evaluating(model), autocast(precision, dataset.device):
        for x, y in dataset.batches(part):
            logits = at_least_fp32(model(x))
            total += F.cross_entropy(logits, y, reduction="sum").double()
            correct += (logits.argmax(1) == y).sum()
    return float(total) / len(part), 100 * float(correct) / len(part)


@torch.no_grad()
def class_hits(
    model: nn.Module,
    dataset: Dataset,
    split: str,
    precision: str = "fp32",
    multi_crop: float = 0.0,
    flip: bool = True,
) -> list[list[int]]:
    """Return [correct, all] by class, in eval mode, on a split.

    multi_crop: see `Recipe`. flip: whether its views are also mirrored, as training images were.

    >>> data = load("synthetic")
    >>> correct, images = class_hits(build("convnet", data.classes, data.shape, widths=(4, 8)), data, "test")
    >>> sum(images) == len(data.test), all(c <= n for c, n in zip(correct, images))
    (True, True)
    """
    counts = torch.zeros(2, dataset.classes, dtype=torch.long, device=dataset.device)
    with convolution.evaluating(model), autocast(precision, dataset.device):
        for x, y in dataset.batches(getattr(dataset, split)):
            right = y[crop_logits(model, x, multi_crop, flip).argmax(1) == y]
            counts += torch.stack(
                [torch.bincount(labels, minlength=dataset.classes) for labels in (right, y)]
            )
    return counts.tolist()


@torch.no_grad()
def crop_logits(model: nn.Module, x: torch.Tensor, share: float = 1.0, flip: bool = True) -> torch.Tensor:
    """Return logits (N, classes) in 32 bits; of the least certain images averaged over six views.

    x: (N, C, H, W). The views are the image and two crops of it, shifted by a pixel along the diagonal, each
    also mirrored if images are flipped; the image itself counts for half. share: of the images that have
    them, those with the smallest margin between their first two classes. (Jordan 2024, arXiv:2404.00498;
    of a share: Hiverge 2025.)

    >>> net, x = build("convnet", 4, (1, 8, 8), widths=(4, 8)).eval(), torch.rand(4, 1, 8, 8)
    >>> changed = (crop_logits(net, x, share=0.5) != crop_logits(net, x, share=0)).any(1)
    >>> int(changed.sum())
    2
    """
    logits = at_least_fp32(model(x))
    if not share:
        return logits
    first, second = logits.softmax(1).topk(2).values.T
    doubtful = (first - second).argsort()[: math.ceil(share * len(x))]
    x = x[doubtful]
    height, width = x.shape[2:]
    padded = F.pad(x, [1] * 4, mode="reflect")
    shifted = [padded[:, :, d : d + height, d : d + width] for d in (0, 2)]

    def view(x):
        x = x.contiguous(memory_format=torch.channels_last)
        return at_least_fp32(model(x))

    def both(x, plain):
        return (plain + view(x.flip(3))) / 2 if flip else plain

    crops = sum(both(s, view(s)) for s in shifted) / 2
    logits[doubtful] = (both(x, logits[doubtful]) + crops) / 2
    return logits


def judge_(history: History, hits: list[list[list[int]]]) -> None:
    """Set a history's final accuracies.

    From [correct, all] by class on the validation and the test images.

    >>> judge_(history := History(), [[[8, 0], [8, 2]], [[7, 1], [8, 2]]])
    >>> history.final, history.test_accuracy, history.balanced_accuracy, history.held_out, history.majority
    (80.0, 80.0, 59.375, 20, 80.0)
    """
    correct, images = ([sum(n) for n in zip(*(h[i] for h in hits), strict=True)] for i in (0, 1))
    history.test_accuracy = 100 * sum(hits[-1][0]) / sum(hits[-1][1])
    history.held_out, history.classes = sum(images), len(images)
    history.final = 100 * sum(correct) / history.held_out
    history.balanced_accuracy = 100 * stats.fmean(c / n for c, n in zip(correct, images, strict=True) if n)
    history.majority = 100 * max(images) / history.held_out


def at_least_fp32(logits: torch.Tensor) -> torch.Tensor:
    """Return logits in 32 bits or more, as losses need them.

    >>> at_least_fp32(torch.zeros(1, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    return logits if logits.dtype == torch.float64 else logits.float()


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


def native_bf16(device: str | torch.device = "cpu") -> bool:
    """Return whether bf16 products are native here.

    avx512_bf16 or amx_bf16, CUDA from compute capability 8.0.

    >>> native_bf16("cpu") == (resolve_precision("auto", "cpu") == "bf16")
    True
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16"})


def resolve_precision(precision: str, device: str | torch.device = "cpu") -> str:
    """Return the precision that is meant.

    "auto" is "bf16" where it is native, else "fp32". Raises `BadInput` for what the device cannot do fast.

    >>> resolve_precision("fp32"), resolve_precision("auto") in ("fp32", "bf16")
    ('fp32', True)
    """
    cuda = torch.device(device).type == "cuda"
    if precision in ("fp16", "tf32") and not cuda:
        raise BadInput(
            f"precision {precision!r} needs CUDA; on this CPU choose auto, fp32 or bf16 (or fp64; chapter "
            "3.2 emulates fp16)"
        )
    return ("bf16" if native_bf16(device) else "fp32") if precision == "auto" else precision


def resolve_layout(recipe: Recipe, device: str | torch.device = "cpu", model: nn.Module | None = None) -> str:
    """Return the memory format that is meant.

    "auto" is "channels_last" where the kernels read it: on CPUs, and on CUDA's tensor cores, unless the model
    is one that cannot take it (`convolution.contiguous_`). Raises `NotApplicable` where such a model is asked
    to.

    >>> resolve_layout(Recipe(), "cpu"), resolve_layout(Recipe(memory_format="contiguous"), "cpu")
    ('channels_last', 'contiguous')
    """
    plain = model is not None and convolution.is_contiguous(model)
    if plain and recipe.memory_format == "channels_last":
        raise NotApplicable(
            "this network cannot run in channels_last, for its view(): set memory_format=auto, or call"
            " flatten(1) in it"
        )
    if recipe.memory_format != "auto":
        return recipe.memory_format
    if plain:
        return "contiguous"
    cuda_cores = torch.device(device).type == "cuda" and resolve_precision(recipe.precision, device) in (
        "fp32",
        "fp64",
    )
    return "contiguous" if cuda_cores else "channels_last"


def autocast(precision: str, device: str | torch.device) -> torch.autocast:
    """Compute products inside in "bf16" or "fp16"; else change nothing.

    >>> with autocast("bf16", "cpu"):
    ...     y = F.linear(torch.ones(1, 2), torch.ones(3, 2))
    >>> y.dtype
    torch.bfloat16
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(torch.device(device).type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


@contextlib.contextmanager
def backend(recipe, device):
    """CUDA's global switches for one run: the fastest kernels for fixed shapes, TF32 only where the recipe
    says so.
    """
    if torch.device(device).type != "cuda":
        yield
        return
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = True, *[recipe.precision != "fp32"] * 2
    torch.cuda.reset_peak_memory_stats(device)
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


def can_compile(device: str | torch.device = "cpu") -> str:
    """Return why `torch.compile` cannot work here, or "".

    >>> isinstance(can_compile(), str)
    True
    """
    if torch.device(device).type == "cuda" or any(shutil.which(c) for c in ("g++", "clang++", "c++")):
        return ""
    return "torch.compile needs a C++ compiler (g++ or clang++), and there is none on this machine"
