"""One training loop for every chapter, readable on one screen (`train`), and the hooks by which a method
takes part.

All of a method's work is inside the clock. Outside: evaluation for the record, counting, logging, warm-up.
"""

import contextlib
import copy
import itertools
import math
import shutil
from dataclasses import asdict, dataclass, field, replace

import torch
import torch.nn.functional as F

from effilib import checkpoint as checkpoints
from effilib import convolution, cost, distributed, models
from effilib.clock import Stopwatch, cpu_flags, elapsed, steady_memory
from effilib.errors import BadInput, choose
from effilib.models import stream

EVALUATIONS = 20  # of the validation set in a run
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained: SGD with Nesterov momentum, the learning rate warmed up and then lowered to
    0.

    >>> recipe = Recipe(epochs=5, lr=0.4)
    >>> [round(recipe.lr_at(step, 10), 2) for step in range(10)]
    [0.13, 0.27, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05]
    """

    epochs: float = 10  # a fraction ends in mid-epoch
    batch_size: int = 128  # of all processes together
    lr: float = 0.1  # the highest of the schedule
    schedule: str = "linear"  # to 0; or "cosine" to 0, or "constant"
    warmup: float = 0.2  # share of the steps
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    augmentation: str = "auto"  # the data set's; or "none", "crop", "crop+flip"
    # bf16 where the machine has it natively, else fp32; or "fp32", "bf16", "fp64", on CUDA "tf32", "fp16"
    precision: str = "auto"
    memory_format: str = "auto"  # channels_last where the kernels read it, else contiguous; or one of the two
    compile: bool = False
    sync_bn: bool = (
        False  # over several GPUs: BatchNorm's moments of the whole batch; else of each share by itself
    )

    def __post_init__(self):
        choose("schedule", self.schedule, ("linear", "cosine", "constant"))
        choose("precision", self.precision, ("auto", "fp32", "tf32", "bf16", "fp16", "fp64"))
        choose("memory format", self.memory_format, ("auto", *LAYOUTS))
        for name in ("epochs", "batch_size", "lr"):
            if not getattr(self, name) > 0:
                raise BadInput(f"recipe: {name} is {getattr(self, name)}, it must be above 0")

    def lr_at(self, step, steps):
        """Learning rate of step 0, 1, ..., steps - 1."""
        rise = self.warmup * steps
        if step < rise:
            return self.lr * (step + 1) / (math.floor(rise) + 1)
        left = (steps - step) / (steps - rise)  # 1 -> 0
        return (
            self.lr
            * {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "constant": 1.0}[self.schedule]
        )


class Method:
    """What takes part in training. A frozen dataclass of settings; its state lives in `run.state[self]`, made
    in `on_fit_start`.

    Override what is needed; every hook takes the `Run`. Hooks are called in the order of the methods.

    >>> class Noise(Method):
    ...     def on_after_backward(self, run):
    ...         for p in run.model.parameters():
    ...             p.grad += 0.01 * torch.randn(p.shape, generator=run.generator(self))
    >>> data = load("synthetic")
    >>> train(build("convnet", data.classes, data.shape, widths=(4, 8)), data, Recipe(epochs=1), [Noise()]).steps
    2
    """

    def on_fit_start(self, run):
        """Before the first step: install, convert layers, make the state."""

    def on_epoch_start(self, run):
        """Before an epoch's first step."""

    def on_batch(self, run, x, y):
        """Return the (x, y) to train on: x (N, C, H, W), y (N,)."""
        return x, y

    def loss_terms(self, run):
        """Return a scalar to add to the loss (`run.logits`, `run.loss` are there), or None."""

    def on_after_backward(self, run):
        """Gradients are there, unscaled; the optimizer has not stepped."""

    def on_step_end(self, run):
        """The optimizer has stepped."""

    def on_epoch_end(self, run):
        """After an epoch's last step, before its evaluation."""

    def on_evaluation(self, run):
        """Before an evaluation for the record, off the clock: make the model what evaluation expects, without
        training it.
        """

    def on_fit_end(self, run):
        """After the last step, before the last evaluation: leave a plain model behind."""


HOOKS = [name for name in vars(Method) if name.startswith("on_") or name == "loss_terms"]


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

    def __init__(self, model, dataset, recipe, methods, seed, ranks=distributed.ALONE):
        self.model, self.dataset, self.recipe, self.methods, self.seed = model, dataset, recipe, methods, seed
        self.ranks = ranks
        self.resumed = False  # from a checkpoint: the model has its later shape when methods are set up
        self.device = dataset.device
        self.decide = dataset.decide  # the split that a method may read
        self.precision = resolve_precision(recipe.precision, self.device)
        self.layout = LAYOUTS[resolve_layout(recipe, self.device)]
        self.state = {}  # method -> its state; goes into checkpoints
        self.events = []  # what methods did, in words: goes into the history
        self.clock = Stopwatch(self.device)
        self.generators = self.own = {m: stream(seed, f"method {i}") for i, m in enumerate(methods)}
        if ranks.size > 1:
            self.own = {m: stream(seed, f"method {i}, process {ranks.rank}") for i, m in enumerate(methods)}
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0,
            weight_decay=recipe.weight_decay, fused=True,
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.step = self.epoch = self.steps = 0  # done so far, and in all
        self.batches = None  # what the loop reads
        self.position = (
            0  # on the schedule, in steps of the recipe's batch size; each step moves it by `pace`
        )
        self.planned, self.pace, self.lr_scale = 0, 1, 1.0
        # (position, planned) -> learning rate; a method may put a schedule of its own here when it is set up
        self.lr_at = recipe.lr_at
        self.logits = self.loss = None
        self.counting = False  # whether this step's FLOPs are counted, off the clock
        self.step_kind = self._kind = (
            "step"  # what a training step is timed as: "step" is one on full-size images
        )
        self.structures = 0  # how often the structure changed
        self.wrap()
        self._hooks = {
            h: [getattr(m, h) for m in methods if getattr(type(m), h) is not getattr(Method, h)]
            for h in HOOKS
        }

    @property
    def lr(self):
        """Learning rate of this step."""
        return self.lr_scale * self.lr_at(self.position, self.planned)

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

    def generator(self, method, share=False):
        """The method's own random stream (on the CPU), so that its draws do not shift the order of the data.

        It is the same in all processes, for what they decide alike. share: of draws for single images or
        activations, of which every process has its own. With one process both are the same stream."""
        return (self.own if share else self.generators)[method]

    def log(self, method, text, **values):
        """Note what a method did, for the history: a sentence and plain values."""
        self.events.append(
            {"step": self.step, "epoch": self.epoch, "method": type(method).__name__, "text": text, **values}
        )

    def call(self, hook):
        """Call a hook of every method that has it; its time is its own segment."""
        if self._hooks[hook]:
            self.kind = hook
            for f in self._hooks[hook]:
                f(self)
            self.kind = "step"

    def restructure(self, change):
        """Change the structure in mid-training: the one way to do it.

        `change(model, optimizer)` works in place or returns a new model; it must leave the optimizer with
        exactly the model's parameters, and no state of others. Compiled graphs, the exchange of gradients and
        the count of FLOPs follow here. Timed as "reconfigure", never capped. Call it between steps: at an
        epoch's start or end, or a step's end; with several processes in all of them alike: at an epoch's end
        they are equal to the last bit, so that what is read from the model is too. Raises `ValueError` if the
        optimizer and the model differ afterwards."""
        before, self.kind = self._kind, "reconfigure"
        distributed.sync_(self.model, on=False)  # surgery knows plain layers
        self.model = change(self.model, self.optimizer) or self.model
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        if (
            len(held) != len(set(held))
            or set(held) != set(self.model.parameters())
            or not set(self.optimizer.state) <= set(held)
        ):
            raise ValueError(
                "after a change of structure the optimizer must hold exactly the model's parameters"
            )
        self.structures += 1
        self.settle()
        self.kind = before

    def grow_batch(self, factor, lr_factor=1.0):
        """From the next epoch on, train on batches `factor` times as large, at `lr_factor` times the
        schedule's learning rate.

        The epochs and the schedule over them stay; there are fewer steps. Call it at an epoch's start or end.
        """
        size = round(factor * self.batches.batch_size)
        if not 0 < size <= len(self.dataset.train):
            raise BadInput(
                f"a batch of {size} does not fit {self.dataset.name}: it has {len(self.dataset.train)} training images"
            )
        self.pace *= size / self.batches.batch_size
        self.batches.batch_size = size
        self.lr_scale *= lr_factor
        self.steps = self.step + math.ceil((self.planned - self.position) / self.pace)
        self.structures += 1  # another step to count

    def replan(self, left):
        """Go through what is left of the schedule in so many more steps, more or fewer than planned. Call it
        at an epoch's start or end.
        """
        if left < 1:
            raise BadInput(f"a run needs at least one more step, got {left}")
        self.pace = (self.planned - self.position) / left
        self.steps = self.step + left

    def settle(self):
        """After parameters came or went: the recipe's layout for all, and for each a momentum laid out alike,
        0 where it has none; and what the loop calls is made anew.

        PyTorch's fused optimizer fails where only some have a momentum, and mixes up elements where the
        layouts differ."""
        self.model.to(memory_format=self.layout)
        momentum = self.optimizer.defaults.get("momentum")
        for p in (p for group in self.optimizer.param_groups for p in group["params"] if momentum):
            old = self.optimizer.state[p].get("momentum_buffer")
            self.optimizer.state[p]["momentum_buffer"] = (
                torch.zeros_like(p) if old is None else torch.empty_like(p).copy_(old)
            )
        self.wrap()

    def align_gradients(self):
        """Lay out gradients that a method set as their parameters, for the same reason."""
        for p in self.model.parameters():
            if p.grad is not None and p.grad.stride() != p.stride():
                p.grad = torch.empty_like(p).copy_(p.grad)

    def wrap(self):
        """Make what the loop calls: the model, with several processes inside of what averages its gradients,
        compiled if told.
        """
        self.ranks.statistics_(convolution.guard_(self.model))
        self.wrapped = self.ranks.wrap(self.model, self.recipe.sync_bn)
        self.forward = torch.compile(self.wrapped) if self.recipe.compile else self.wrapped

    def level(self):
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

    def autocast(self):
        """The run's number format, for a `with`."""
        return autocast(self.precision, self.device)

    def train_step(self, x, y):
        """Forward, backward, update; the learning rate of this step. A step that is counted is not
        compiled.
        """
        for hook in self._hooks["on_batch"]:
            x, y = hook(self, x, y)
        with self.autocast():
            self.logits = (self.wrapped if self.counting else self.forward)(x)
        loss = F.cross_entropy(full(self.logits), y, label_smoothing=self.recipe.label_smoothing)
        self.loss = self.ranks.mean(loss.detach(), self.batches)
        for hook in self._hooks["loss_terms"]:
            term = hook(self)
            if term is not None:
                loss = loss + term
        self.scaler.scale(self.ranks.weigh(loss, self.batches)).backward()
        if self.counting:
            self.ranks.complete(self.model)
        self.scaler.unscale_(self.optimizer)
        if self._hooks["on_after_backward"]:
            for hook in self._hooks["on_after_backward"]:
                hook(self)
            self.align_gradients()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group.get("lr_factor", 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        for hook in self._hooks["on_step_end"]:
            hook(self)


@dataclass
class History:
    """What a training run did and cost. `a + b` is one run after the other, on one clock.

    >>> once = History(rows=[{"step": 4, "epoch": 1, "seconds": 1.5, "accuracy": 90.0}], steps=4, seconds=1.5)
    >>> (once + once).rows[-1]
    {'step': 8, 'epoch': 2, 'seconds': 3.0, 'accuracy': 90.0}
    """

    rows: list = field(
        default_factory=list
    )  # per evaluation: step, epoch, seconds, train_loss, loss, accuracy (%), lr
    steps: int = 0
    seconds: float = 0.0  # stalled steps capped
    raw_seconds: float = 0.0
    timed: int = 0  # recurring segments
    capped: int = 0  # ... of which were capped
    kinds: dict = field(default_factory=dict)  # kind -> {count, seconds, median}
    flops: float = 0.0  # of all training steps, products only
    memory: dict = field(default_factory=dict)  # bytes: parameters, optimizer, saved, peak (CUDA)
    test_accuracy: float | None = None  # %, read once, at the end
    warm_up: float = 0.0  # seconds, outside the clock
    events: list = field(default_factory=list)
    diverged: bool = False
    structure: dict = field(default_factory=dict)
    precision: str = ""

    @property
    def accuracy(self):
        """Last validation accuracy in %."""
        return self.rows[-1]["accuracy"]

    @property
    def step_seconds(self):
        """Median seconds of a training step; where a run has steps of other sizes too, of one on full-size
        images.
        """
        return next(
            self.kinds[k]["median"] for k in ("step", *self.kinds) if k in self.kinds and k.startswith("step")
        )

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
            kinds[kind] = {
                "count": mine["count"] + k["count"],
                "seconds": mine["seconds"] + k["seconds"],
                "median": k["median"],
            }
        summed = {
            n: getattr(self, n) + getattr(other, n)
            for n in ("steps", "seconds", "raw_seconds", "timed", "capped", "flops", "warm_up")
        }
        memory = {
            k: max(self.memory.get(k, 0), other.memory.get(k, 0)) for k in {**self.memory, **other.memory}
        }
        return replace(
            other,
            rows=rows,
            events=events,
            kinds=kinds,
            memory=memory,
            diverged=self.diverged or other.diverged,
            **summed,
        )


def train(
    model, dataset, recipe, methods=(), seed=0, *, checkpoint=None, evaluations=EVALUATIONS, progress=None
):
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
    >>> history = train(net, data, Recipe(epochs=3, batch_size=32), evaluations=3)
    >>> history.steps, len(history.rows), history.accuracy > 50  # the first row is that of the untrained network
    (33, 4, True)
    """
    ranks = distributed.ranks(dataset.device)
    if recipe.sync_bn and dataset.device.type != "cuda":
        raise BadInput(
            "sync_bn needs CUDA: PyTorch's SyncBatchNorm has no other kernels; without it each process normalises its share"
        )
    dropout = f"dropout, process {ranks.rank}" if ranks.rank else "dropout"
    with models.seeded(stream(seed, dropout).initial_seed(), dataset.device), backend(recipe, dataset.device):
        steady_memory()
        layout = LAYOUTS[resolve_layout(recipe, dataset.device)]
        mine = (
            checkpoints.identity(model, dataset, recipe, methods, seed, ranks)
            if checkpoint or ranks.size > 1
            else None
        )
        ranks.check(mine)
        saved = checkpoints.read(checkpoint, mine, ranks, dataset.device)
        model = checkpoints.shape_(model, saved).to(dataset.device, memory_format=layout).train()
        if recipe.precision == "fp64":
            model, dataset = model.double(), replace(dataset, dtype=torch.float64)
        batches = shares(
            dataset, recipe.batch_size, stream(seed, "data"), ranks, augmentation=recipe.augmentation
        )
        run = Run(model, dataset, recipe, tuple(methods), seed, ranks)
        run.batches, run.resumed, per_epoch = batches, saved is not None, len(batches)
        run.steps = run.planned = max(1, round(recipe.epochs * per_epoch))
        marks = marked(run.steps, evaluations)
        history = History(precision=run.precision)
        history.warm_up = warm_up(
            run, next(iter(shares(dataset, recipe.batch_size, stream(seed, "warm-up"), ranks)))
        )
        flops = {}  # of a step, by structure
        losses, pending = (
            [],
            [],
        )  # losses since the last evaluation; rows whose time is read at the epoch's end

        def evaluated():
            with run.clock.paused():
                ranks.statistics_(run.model)
                for hook in run._hooks["on_evaluation"]:
                    hook(run)
                row = {
                    "step": run.step,
                    "epoch": run.position / per_epoch,
                    "lr": run.lr if run.step < run.steps else 0.0,
                }
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
            checkpoints.restore(saved, checkpoint, run, history, batches)
        run.settle()
        if not saved:
            evaluated()
        for epoch in itertools.count(run.epoch):
            run.epoch = epoch
            run.call("on_epoch_start")
            for x, y in itertools.islice(batches, run.steps - run.step):
                x = x.contiguous(memory_format=layout)
                structure = run.structures  # a hook may change it at the step's end
                run.counting, kind = structure not in flops, run.step_kind
                if not run.counting:
                    run.train_step(x, y)
                    run.clock.lap(run._kind)
                else:  # one counted step per structure; the clock takes its kind's median for it
                    with run.clock.paused(), cost.Counter(run.model.parameters()) as count:
                        run.train_step(x, y)
                        run.kind = "step"  # ends other work that a hook left open
                    run.clock.lap(kind, substitute=True)
                    run.counting = False
                    flops[structure] = sum(ranks.gather(count.flops))
                    history.memory = memory(run, count.saved_bytes, history.memory)
                run._kind = run.step_kind
                run.step += 1
                run.position += run.pace
                history.flops += flops[structure]
                losses.append(run.loss)
                if run.step == run.steps:
                    break
                if any(run.position - run.pace < mark <= run.position for mark in marks):
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
            checkpoints.save(checkpoint, mine, run, history, batches)
        return finish(run, history)


def marked(steps, evaluations):
    """Steps after which a run is evaluated, a set: evenly spread over it; of six or more the last but one
    shortly before the end.

    A target has to be held by two evaluations in a row, and accuracy rises fastest at the end, where the
    learning rate falls to 0. With even gaps a run would be judged by how far it was one gap before its end.

    >>> sorted(marked(steps=100, evaluations=3)), sorted(marked(steps=100, evaluations=6))
    ([33, 67, 100], [20, 40, 60, 80, 95, 100])
    """
    even = evaluations - (evaluations > 5)
    found = {round(steps * i / even) for i in range(1, even + 1)}
    return found | {round(steps * (1 - 0.25 / even))} if evaluations > even else found


def shares(dataset, batch_size, generator, ranks, **options):
    """This process's share of each of the training batches.

    >>> batches = shares(load("synthetic"), 100, torch.Generator().manual_seed(0), distributed.Ranks(rank=1, size=2))
    >>> next(iter(batches))[0].shape
    torch.Size([50, 1, 8, 8])
    """
    batches = dataset.shuffled(batch_size, generator, **options)
    batches.ranks = ranks
    return batches


def warm_up(run, batch):
    """Run forward and backward once on random labels before the clock starts, and undo what that changed.
    Returns seconds.

    Kernels are chosen, and graphs compiled, at the first call of a shape; nothing is learned.

    >>> data = load("synthetic")
    >>> run = Run(build("convnet", data.classes, data.shape, widths=(4, 8)), data, Recipe(), (), seed=0)
    >>> warm_up(run, next(data.batches(data.decide))) > 0
    True
    """
    buffers = copy.deepcopy(dict(run.model.named_buffers()))
    with elapsed() as seconds, models.seeded(0, run.device):
        x, y = batch
        for _ in range(2):
            with run.autocast():
                loss = F.cross_entropy(full(run.forward(x.contiguous(memory_format=run.layout))), y.roll(1))
            if run.ranks.size > 1:  # gradients are waited for, also those that only a method's loss will have
                loss = loss + 0 * sum(p.sum() for p in run.model.parameters())
            loss.backward()
    run.optimizer.zero_grad()
    with torch.no_grad():
        for name, b in run.model.named_buffers():
            b.copy_(buffers[name])
    return seconds()


@torch.no_grad()
def evaluate(model, dataset, split, precision="fp32"):
    """(mean cross entropy, accuracy in %) of `model` in eval mode on a split ("decide", "validation",
    "test").

    >>> data = load("synthetic")
    >>> loss, accuracy = evaluate(build("convnet", data.classes, data.shape, widths=(4, 8)), data, "validation")
    >>> 0 <= accuracy <= 100
    True
    """
    was, total, correct = model.training, 0.0, 0
    model.eval()
    part = getattr(dataset, split)
    with autocast(precision, dataset.device):
        for x, y in dataset.batches(part):
            logits = full(model(x))
            total += F.cross_entropy(logits, y, reduction="sum").double()
            correct += (logits.argmax(1) == y).sum()
    model.train(was)
    return float(total) / len(part), 100 * float(correct) / len(part)


def full(logits):
    """Logits in 32 bits or more, as losses need them.

    >>> full(torch.zeros(1, dtype=torch.bfloat16)).dtype, full(torch.zeros(1, dtype=torch.float64)).dtype
    (torch.float32, torch.float64)
    """
    return logits if logits.dtype == torch.float64 else logits.float()


def finish(run, history):
    """The history with what is known only at the end: the clock's account, events, structure and the accuracy
    on the test split.

    >>> data = load("synthetic")
    >>> run = Run(build("convnet", data.classes, data.shape, widths=(4, 8)), data, Recipe(), (), seed=0)
    >>> finish(run, History()).structure
    {'widths': [[4], [8]], 'bn': True}
    """
    clock = run.clock
    distributed.sync_(run.model, on=False)
    history.steps, history.seconds, history.raw_seconds = run.step, clock.seconds, clock.raw
    history.timed, history.capped = clock.steps, clock.capped
    history.kinds = {
        k: {"count": len(s), "seconds": sum(s), "median": sorted(s)[len(s) // 2]}
        for k, s in clock.kinds.items()
    }
    history.events, history.structure = run.events, models.describe(run.model)
    history.test_accuracy = run.ranks.first(lambda: evaluate(run.model, run.dataset, "test", run.precision))[
        1
    ]
    return history


def memory(run, saved, before):
    """Bytes of parameters, optimizer state and tensors saved for backward; the largest over the run's
    structures.

    >>> data = load("synthetic")
    >>> run = Run(build("convnet", data.classes, data.shape, widths=(4, 8)), data, Recipe(), (), seed=0)
    >>> memory(run, 1000, {"saved": 2000, "optimizer": 0})["saved"]
    2000
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


def native_bf16(device="cpu"):
    """Whether bf16 products are native here: avx512_bf16 or amx_bf16, CUDA from compute capability 8.0.

    >>> native_bf16("cpu") == (resolve_precision("auto", "cpu") == "bf16")
    True
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16"})


def resolve_precision(precision, device="cpu"):
    """The precision that is meant: "auto" is "bf16" where it is native, else "fp32". Raises `BadInput` for
    what the device cannot do fast.

    >>> resolve_precision("fp32"), resolve_precision("auto") in ("fp32", "bf16")
    ('fp32', True)
    """
    cuda = torch.device(device).type == "cuda"
    if precision in ("fp16", "tf32") and not cuda:
        raise BadInput(
            f"precision {precision!r} needs CUDA; on this CPU choose auto, fp32 or bf16 (or fp64; chapter 3.2 emulates fp16)"
        )
    return ("bf16" if native_bf16(device) else "fp32") if precision == "auto" else precision


def resolve_layout(recipe, device="cpu"):
    """The recipe's memory format; "auto" -> "channels_last" where the kernels read it: on CPUs, and on CUDA's
    tensor cores.

    >>> resolve_layout(Recipe(), "cpu"), resolve_layout(Recipe(memory_format="contiguous"), "cpu")
    ('channels_last', 'contiguous')
    """
    if recipe.memory_format != "auto":
        return recipe.memory_format
    cuda_cores = torch.device(device).type == "cuda" and resolve_precision(recipe.precision, device) in (
        "fp32",
        "fp64",
    )
    return "contiguous" if cuda_cores else "channels_last"


def autocast(precision, device):
    """Products inside are in "bf16" or "fp16"; with any other precision nothing changes.

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

    >>> with backend(Recipe(), "cpu"):  # where there are no such switches
    ...     y = torch.ones(2, 2) @ torch.ones(2, 2)
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


def can_compile(device="cpu"):
    """Why `torch.compile` cannot work here, in words; "" if it can.

    >>> isinstance(can_compile(), str)
    True
    """
    if torch.device(device).type == "cuda" or any(shutil.which(c) for c in ("g++", "clang++", "c++")):
        return ""
    return "torch.compile needs a C++ compiler (g++ or clang++), and there is none on this machine"


def settings(recipe):
    """A recipe as a plain dict.

    >>> settings(Recipe(lr=0.4))["lr"]
    0.4
    """
    return asdict(recipe)
