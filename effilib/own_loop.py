"""Methods in a training loop of one's own: `attach` gives plain PyTorch the hooks that `train` has.

The loop keeps its data, loss and schedule. Of a step it hands over three moments: the batch (`read`), the
loss (`add_terms`) and the update (`update`). `train` goes through the same `Run`.
"""

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from effilib import convolution, distributed, seeds
from effilib.dataset import Batches, Split
from effilib.errors import BadInput, within
from effilib.hooks import Method, check_methods
from effilib.recipe import Recipe
from effilib.run import Run
from effilib.seeds import stream

__all__ = ["Attached", "attach"]

KEPT = (  # of a DataLoader, where another one has to take its place
    "num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "generator",
    "prefetch_factor", "persistent_workers",
)  # fmt: skip


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    methods: Iterable[Method],
    *,
    steps: int,
    loader: Iterable,
    accumulate: int = 1,
    decide: tuple[torch.Tensor, torch.Tensor] | None = None,
    recipe: Recipe | None = None,
    precision: str = "fp32",
    seed: int = 0,
) -> "Attached":
    """Give methods a part in a plain PyTorch loop.

    steps: updates of the whole training. loader: what the loop reads, epoch by epoch: a `DataLoader`, or
    anything that can be gone through again and yields (x, y), x (N, C, H, W). accumulate: its batches a step.
    decide: images and labels that are not trained on, for methods that look at such. recipe: whose schedule
    sets the learning rate; without one the loop's own scheduler does. precision: of the loop's products, as
    in `Recipe`. seed: of the methods' draws.

    A callback of a trainer class calls it where fitting begins; then it puts `read()` in the loader's place,
    `add_terms` on the loss, and `before_step` and `after_step` around `optimizer.step()` (15 lines in
    `tests/test_own_loop.py`). There is no `state_dict`: a loop that is resumed starts its methods anew.

    Raises `BadInput`, and leaves model and optimizer as they were, if a method does not apply or needs what
    is not there.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    >>> optimizer = torch.optim.AdamW(net.parameters())
    >>> loader = [(torch.randn(8, 1, 8, 8), torch.arange(8) % 2)] * 4
    >>> from effilib.methods.freezing import FrozenPrefix
    >>> run = attach(net, optimizer, [FrozenPrefix()], steps=8, loader=loader)
    >>> for epoch in range(2):
    ...     for x, y in run.read():
    ...         logits = run.model(x)
    ...         run.add_terms(F.cross_entropy(logits, y), logits).backward()
    ...         run.update()
    >>> run.step, run.events[0]["text"]
    (8, 'after 50% of the run, 1 layers are frozen, up to 0')
    """
    within("steps", steps, "a whole number above 0")
    within("accumulate", accumulate, "a whole number above 0")
    if distributed.several():
        raise BadInput("attach works in one process; over several effilib.train does")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise BadInput(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    strangers = {p for g in optimizer.param_groups for p in g["params"]} - set(model.parameters())
    if strangers:
        raise BadInput(f"the optimizer holds {len(strangers)} parameters that are not the model's")
    if not hasattr(loader, "__iter__") or isinstance(loader, Iterator):
        raise BadInput("loader must yield the epoch's (x, y) anew each time, as a DataLoader does")
    methods, how = check_methods(methods), (steps, loader, accumulate, decide, recipe, precision, seed)
    _try(Attached(*copy.deepcopy((model, optimizer)), methods, *how))  # a refusal leaves all as it was
    return Attached(model, optimizer, methods, *how)


def _try(twin):
    """Take a copy through its first step: what a method lacks is said before anything has changed."""
    twin.batches = copy.copy(twin.batches)
    if isinstance(twin.batches, Batches):
        twin.batches.generator = stream(0, "trial")
    with seeds.seeded(0, twin.device):
        for x, _ in itertools.islice(twin.read(), 1):
            with twin.autocast():
                logits = twin.model(x)
            loss = logits.float().square().mean()  # of the loop's own loss nothing is known
            twin.add_terms(loss, logits).backward()
            twin.update()


class Attached(Run):
    """Stand between a loop of one's own and its methods.

    `attach` makes it.

    `model` is the network as it is now, `events` what methods did. With mixed precision: `update(scaler)`.
    To clip gradients, or in a trainer that steps by itself, call `before_step(scaler)` and `after_step`
    around `optimizer.step()` instead of `update`.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    >>> run = attach(net, optimizer, [], steps=1, loader=[(torch.ones(3, 1, 2, 2), torch.ones(3).long())])
    >>> for x, y in run.read():
    ...     run.model(x).sum().backward()
    ...     run.update()
    >>> x.shape, run.finished
    (torch.Size([3, 1, 2, 2]), True)
    """

    def __init__(self, model, optimizer, methods, steps, loader, accumulate, decide, recipe, precision, seed):
        p = next(model.parameters())
        plain = isinstance(loader, Batches) and accumulate == 1
        batches = copy.copy(loader) if plain else _Loader(loader, accumulate, p.device, lambda: self.calling)
        dataset = loader.dataset if plain else _Fed(batches, model)
        self.follows = recipe is not None  # else the loop's own scheduler sets the learning rate
        precision = "fp64" if p.dtype == torch.float64 else precision
        how = dict(precision=precision, batch_size=batches.batch_size, epochs=steps / max(1, len(batches)))
        recipe = replace(_recipe(optimizer, recipe), **how)
        layout = torch.channels_last if any(map(_is_last, model.parameters())) else torch.contiguous_format
        super().__init__(model, dataset, recipe, methods, seed, optimizer=optimizer, layout=layout)
        if not self.follows:
            self.schedule.lr_at = self._no_schedule
        self._decide = None if decide is None else Split(x=decide[0], y=decide[1])
        self.batches, self.steps, self.finished = batches, steps, False
        self._begun = None  # the step at which the epoch that is open began
        self.schedule.planned, self._own, scaler, lr_at = steps, None, self.scaler, self.schedule.lr_at
        self.clock.start()
        self.call("on_fit_start")
        self.settle()
        if self.scaler is not scaler:
            raise BadInput(f"{self.calling} scales the loss itself, which only effilib.train allows")
        if not self.follows and self.schedule.lr_at != lr_at:
            self._no_schedule()

    def _no_schedule(self, *_):
        raise BadInput(
            f"{self.calling} plans with the learning rate of the whole training: give attach(recipe=...),"
            " whose schedule then sets it, in place of a scheduler of your own"
        )

    @property
    def decide(self) -> Split:
        """Images that a method may look at, which are not trained on."""
        if self._decide is None and not isinstance(self.dataset, _Fed):
            return super().decide
        if self._decide is None:
            raise BadInput(
                f"{self.calling} looks at images that are not trained on: give attach(decide=(x, y))"
            )
        return self._decide

    @property
    def lr(self) -> float:
        """Learning rate of this step."""
        return (
            self.schedule.lr if self.follows else self.schedule.scale * self.optimizer.param_groups[0]["lr"]
        )

    def group(self, parameters: Iterable[nn.Parameter], **settings) -> None:
        """Move parameters into a group of the optimizer's own; `ends` needs a schedule."""
        if "ends" in settings and not self.follows:
            self._no_schedule()
        if any("initial_lr" in g for g in self.optimizer.param_groups):
            raise BadInput(
                f"{self.calling} adds a group to the optimizer, which its scheduler does not know:"
                " make the scheduler after attach"
            )
        super().group(parameters, **settings)

    def read(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield an epoch's batches, as the methods want them."""
        if self.step >= self.steps:
            raise BadInput(f"all {self.steps} steps are done: attach with the steps of the whole training")
        if self._begun is not None and self.step > self._begun:  # the loop left it by `break`
            self._end_epoch()
        self._begun = self.step
        self.call("on_epoch_start")
        for x, y in self.batches:
            x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
            yield self.change_batch(x.contiguous(memory_format=self.layout) if x.dim() == 4 else x, y)
            if self._begun is None:
                return
        if self.step == self._begun:
            raise BadInput("an epoch without a step: call update() behind the backward pass")
        self._end_epoch()

    def _end_epoch(self):
        self.call("on_epoch_end")
        self.clock.end_epoch()
        self.epoch, self._begun = self.epoch + 1, None
        if self.step >= self.steps:
            self.finish()

    def set_lr(self) -> None:
        """Give the optimizer this step's learning rate: the recipe's, or what the methods make of its own."""
        if self.follows:
            return super().set_lr()
        self._own = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.scale * group.get("lr_factor", 1.0) * group["lr"]

    def after_step(self) -> None:
        """Let the methods work on the weights; go on, or finish."""
        if self._own is not None:  # a scheduler goes on from what it had set
            for group, lr in zip(self.optimizer.param_groups, self._own, strict=True):
                group["lr"] = lr
        super().after_step()
        self.clock.lap(self._kind)
        self.advance()
        if self.step >= self.steps and not self.finished:  # here, as the loop may end by `break`
            self._end_epoch()

    def prepare_evaluation(self) -> None:
        """Make the model what evaluation expects, as `train` does before it evaluates."""
        with self.clock.paused():
            for hook in self._hooks["on_evaluation"]:
                hook(self)

    def finish(self) -> None:
        """Leave a plain model behind; the last step does that by itself."""
        if not self.finished:
            self.finished = True
            self.call("on_fit_end")


def _recipe(optimizer, recipe):
    """The recipe, or what the optimizer says of one; momentum and weight decay are always the optimizer's."""
    group = optimizer.param_groups[0]
    own = dict(momentum=group.get("momentum", 0.0), weight_decay=group.get("weight_decay", 0.0))
    lr = max(float(group.get(name, 0)) for name in ("lr", "initial_lr", "max_lr"))  # a scheduler may warm up
    return replace(recipe, **own) if recipe else Recipe(lr=lr or 1.0, augmentation="none", **own)


def _is_last(p):
    last = p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last)
    return last and not p.is_contiguous()  # of one channel, or one pixel, it is both


class _Loader:
    """The loop's batches as methods know them: `chosen` images, and the `index` of those in a batch."""

    def __init__(self, loader, accumulate, device, who):
        self.loader, self.accumulate, self.device, self.who = loader, accumulate, device, who
        self.index = self._chosen = self._indexed = None
        self.looks = False  # whether it only looks: the random state of the loop stays as it is
        first = next(iter(copy.copy(self)), None)
        if first is None:
            raise BadInput("loader yields no batch")
        x = self.first = first[0]
        self.batch_size = (getattr(loader, "batch_size", None) or len(x)) * accumulate

    def __copy__(self):
        """The same, without a trace in the loop's random state or index."""
        other = object.__new__(_Loader)
        vars(other).update(vars(self), looks=True)
        return other

    def __len__(self):
        """Steps in an epoch."""
        n = len(self.loader) if self._chosen is None else len(self._indexed)
        return n // self.accumulate

    def images(self):
        """How many images an epoch has, all chosen."""
        return len(self.loader.dataset) if self._maps() else self.batch_size * len(self)

    def _maps(self):
        """Whether an epoch is all items of a data set, each once: else nobody knows how many are chosen."""
        own = isinstance(self.loader, DataLoader)
        if not own or isinstance(self.loader.dataset, IterableDataset) or not self.loader.batch_size:
            return False
        sampler, n = self.loader.sampler, len(self.loader.dataset)
        known = type(sampler) in (RandomSampler, SequentialSampler) and len(sampler) == n
        return known and not getattr(sampler, "replacement", False)

    @property
    def chosen(self):
        return self._chosen

    @chosen.setter
    def chosen(self, chosen):
        if not self._maps():
            raise BadInput(
                f"{self.who()} chooses which images an epoch has: loader must be a DataLoader with a"
                " batch_size and shuffle=True or False, without a sampler of its own, of a data set with"
                " numbered items"
            )
        if self._indexed is None:
            self._indexed = _indexed(self.loader, self)
        self._chosen = chosen

    def __iter__(self):
        loader = self._indexed or self.loader
        batches = _untouched(loader, self.loader) if self.looks else loader
        for batch in batches:
            if self._indexed is not None:
                index, batch = batch
                self.index = index.to(self.device)
            if not isinstance(batch, Sequence) or len(batch) != 2:
                raise BadInput(f"loader must yield (x, y), it yields {type(batch).__name__} of another kind")
            yield batch


class _Sampler:
    """The order of a loader's own sampler, without what is not chosen."""

    def __init__(self, sampler, batches):
        self.sampler, self.batches = sampler, batches

    def __len__(self):
        return len(self.sampler) if self.batches.chosen is None else len(self.batches.chosen)

    def __iter__(self):
        kept = None if self.batches.chosen is None else set(self.batches.chosen.tolist())
        return (i for i in self.sampler if kept is None or i in kept)


class _Indexed(torch.utils.data.Dataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, i):
        return i, self.dataset[i]


class _Collate:
    def __init__(self, own):
        self.own = own

    def __call__(self, items):
        return torch.tensor([i for i, _ in items]), self.own([item for _, item in items])


def _indexed(loader, batches):
    """A DataLoader like `loader` that yields (index, batch), of the chosen images."""
    sampler = BatchSampler(_Sampler(loader.sampler, batches), loader.batch_size, loader.drop_last)
    how = {k: getattr(loader, k) for k in KEPT}
    collate = _Collate(loader.collate_fn)
    return DataLoader(_Indexed(loader.dataset), batch_sampler=sampler, collate_fn=collate, **how)


def _untouched(loader, own):
    """Its batches, while PyTorch's random state, and that of the user's `own` loader, stays as it was."""
    held = (getattr(o, "generator", None) for o in (own, getattr(own, "sampler", None)))
    generators = {torch.default_generator, *(g for g in held if isinstance(g, torch.Generator))}
    inside, batches = [g.get_state() for g in generators], None
    while True:
        outside = [g.get_state() for g in generators]
        for g, state in zip(generators, inside, strict=True):
            g.set_state(state)
        try:
            batches = iter(loader) if batches is None else batches
            batch = next(batches, None)
        finally:
            inside = [g.get_state() for g in generators]
            for g, state in zip(generators, outside, strict=True):
                g.set_state(state)
        if batch is None:
            return
        yield batch


class _Fed:
    """What a loop feeds a network, as the data set that methods know: images as the network reads them."""

    name, validation, mean, std = "the loop's data", None, None, None

    def __init__(self, batches, model):
        self._batches, self._model = batches, model
        self.device, self.dtype = batches.device, next(model.parameters()).dtype
        self.train, self._kept = _Train(self), None

    @property
    def shape(self):
        return tuple(self._batches.first.shape[1:])

    @property
    def names(self):
        """The classes, as many as the network has logits."""
        with convolution.evaluating(self._model):
            return tuple(range(self._model(self.first(2).x).shape[-1]))

    @property
    def classes(self):
        return len(self.names)

    def first(self, n):
        """The first n images of an epoch, with their labels."""
        if self._kept is None or len(self._kept) < min(n, len(self.train)):
            found, count = [], 0
            for batch in copy.copy(self._batches):
                found.append(batch)
                if (count := count + len(batch[1])) >= n:
                    break
            x, y = (torch.cat(parts).to(self.device) for parts in zip(*found, strict=True))
            self._kept = Split(x=x, y=y)
        return self._kept[:n]

    def normalize(self, x):
        return x

    def batches(self, split, batch_size=None):
        n = batch_size or self._batches.batch_size
        return zip(split.x.split(n), split.y.split(n), strict=True)

    def shuffled(self, batch_size, generator, **augmentation):
        return ((x.to(self.device), y.to(self.device)) for x, y in copy.copy(self._batches))

    def limit(self, images):
        other = copy.copy(self)
        other.train = self.first(images)
        return other


class _Train:
    """The training images: how many, and the first ones."""

    def __init__(self, fed):
        self.fed = fed

    def __len__(self):
        return self.fed._batches.images()

    def __getitem__(self, part):
        if not isinstance(part, slice) or part.start or part.step:
            raise BadInput("of a loop's images only the first ones can be looked at")
        return self.fed.first(len(self) if part.stop is None else part.stop)

    @property
    def x(self):
        return _Column(self)


class _Column:
    def __init__(self, train):
        self.train = train

    def __getitem__(self, part):
        return self.train[part].x
