"""What every chapter trains: data, network and tuned recipe, at the lengths of a preset.

The baselines were tuned before any method was run (`effilib tune`, sweeps in `results/recorded/tuning`), each
length by itself. Where nothing was tuned (a user's own data or network), the recipe is the preset's.
"""

import functools
import math
import os
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from effilib import data, distributed, models, paths
from effilib.caveats import caveats
from effilib.dataset import Dataset
from effilib.errors import BadInput, choose, within
from effilib.recipe import Recipe
from effilib.seeds import stream

__all__ = ["PRESETS", "TUNED", "Task", "pick_device", "recorded_tuning", "task"]

PRESETS = ("smoke", "quick", "study", "full")
AXES = ("epochs", "images")
VARIANTS = ("base", "wide")


@dataclass(frozen=True, kw_only=True)
class Task:
    """Hold the baseline's data, network, recipe and lengths.

    lengths: shares of the recipe's epochs, each a training of its own. axis: what a length is a share of,
    "epochs", or "images" at as many updates. tuned: epochs -> settings of the recipe; the nearest number of
    epochs counts. images: training images taken (None: all). size: side in pixels to which they are resized
    (None: as `data.load` says). validation: at most so many validation images, and three times as many test
    images (None: all). whole: see `Dataset.whole`. seeds: cells a length. variant: "base", or "wide"
    (32/64/128, what pruning and growing start from). given: settings that the user asked for, which no
    chapter changes.

    >>> t = task("quick", "mnist5k")
    >>> t.lengths, t.seeds, t.at(0.5).recipe.epochs == 0.5 * t.recipe.epochs
    ((0.5, 1.0), 3, True)
    """

    preset: str
    dataset: str
    network: str = "resnet"
    widths: dict = field(default_factory=dict)  # settings of one of our networks
    recipe: Recipe = field(default_factory=Recipe)
    lengths: tuple[float, ...] = (0.5, 0.71, 1.0)
    axis: str = "epochs"
    tuned: dict[float, dict] = field(default_factory=dict)
    images: int | None = None
    size: int | None = None
    validation: int | None = None
    whole: bool = False
    seeds: int = 5
    variant: str = "base"
    device: str = "cpu"
    given: tuple[str, ...] = ()

    def __post_init__(self):
        choose("preset", self.preset, PRESETS)
        choose("variant", self.variant, VARIANTS)
        choose("axis of lengths", self.axis, AXES)
        if not isinstance(self.lengths, tuple | list) or not self.lengths:
            raise BadInput(f"lengths must be shares above 0, got {self.lengths}")
        if len(set(self.lengths)) < len(self.lengths):
            raise BadInput(f"lengths must differ from each other, got {self.lengths}")
        data.check_size(self.size)
        for length in self.lengths:
            within("a length", length, "above 0")
        within("seeds", self.seeds, "a whole number above 0")
        for name in ("images", "validation"):
            if getattr(self, name) is not None:
                within(name, getattr(self, name), "a whole number above 0")

    def load(self) -> Dataset:
        """Load the data set, cut to the preset, on the device."""
        dataset = data.load(self.dataset, device=self.device, size=self.size)
        dataset = replace(dataset, batch=min(dataset.batch, self.recipe.batch_size))
        dataset = dataset.whole() if self.whole else dataset
        if self.images is not None:
            dataset = dataset.limit(min(self.images, len(dataset.train)))
        if self.validation is not None:
            n = self.validation
            dataset = replace(dataset, validation=dataset.validation[:n], test=dataset.test[: 3 * n])
        return dataset

    def beware(self, dataset: Dataset) -> list[str]:
        """Return sentences on a data set too small or uneven.

        >>> t = task("quick", "synthetic")
        >>> t.beware(t.load())
        ["A training of 8 steps is too short: ..."]
        """
        held = [y for split in dataset.held_out for y in getattr(dataset, split).y.tolist()]
        tasks = [self.at(length) for length in self.lengths]
        images = [min(t.images or len(dataset.train), len(dataset.train)) for t in tasks]
        steps = [
            round(t.recipe.epochs * (n // t.recipe.batch_size)) for t, n in zip(tasks, images, strict=True)
        ]
        largest = 100 * Counter(held).most_common(1)[0][1] / len(held)
        return caveats(steps=min(steps), held_out=len(held), majority=largest, classes=dataset.classes)

    def build(self, dataset: Dataset, seed: int = 0, **settings) -> nn.Module:
        """Build the baseline's network with the seed's initial weights; settings replace widths or depths."""
        init = stream(seed, "initial weights").initial_seed()
        settings = self.widths | settings
        return models.build(
            self.network, dataset.classes, dataset.shape, seed=init, device=self.device, **settings
        )

    def but(self, **changes) -> "Task":
        """Return the same task with other settings; those of `Recipe` go into the recipe.

        What is set here is no longer tuned by length.
        """
        in_recipe = {k: v for k, v in changes.items() if k in Recipe.__dataclass_fields__}
        rest = {k: v for k, v in changes.items() if k not in in_recipe}
        for k in rest:
            choose("setting of a task", k, [*Task.__dataclass_fields__, *Recipe.__dataclass_fields__])
        if "tuned" not in rest:
            rest["tuned"] = {
                e: {k: v for k, v in s.items() if k not in in_recipe} for e, s in self.tuned.items()
            }
        return replace(self, recipe=replace(self.recipe, **in_recipe), **rest)

    def sized(self, sizes: dict[str, dict]) -> "Task":
        """Return the task with a chapter's changes, where the user is silent.

        sizes: preset -> settings.
        """
        changes = {k: v for k, v in sizes.get(self.preset, {}).items() if k not in self.given}
        return self.but(**changes)

    def wide(self) -> "Task":
        """Return the task on the wide network, from which pruning starts.

        With all that the user asked for.

        >>> task("quick", "mnist5k", lr=0.3).wide().recipe.lr
        0.3
        """
        return self.on("" if self.network == "resnet" else self.network, "wide")

    def on(self, network: str, variant: str = "base") -> "Task":
        """Return the preset's task for a network.

        With all else that the user asked for.

        >>> task("quick", "mnist5k", "convnet", lr=0.3).on("resnet").recipe.lr
        0.3
        """
        both = {**vars(self), **vars(self.recipe)}
        asked = {k: both[k] for k in self.given if k not in ("network", "widths")}
        found = task(self.preset, self.dataset, network, variant, device=self.device, **asked)
        return replace(found, seeds=self.seeds, given=self.given)

    def at(self, length: float) -> "Task":
        """Return the task at a length: its share of epochs or images, with what was tuned for it."""
        if self.axis == "images":
            present = _training_images(self.dataset, self.size)
            total = min(self.images or present, present)
            images = max(1, round(length * total))
            return self.but(images=images, epochs=self.recipe.epochs * total / images)
        epochs = length * self.recipe.epochs
        near = min(self.tuned, key=lambda e: abs(math.log(e / epochs)), default=None)
        return self.but(**self.tuned.get(near, {}), epochs=epochs)


@functools.cache
def _training_images(dataset, size):
    return len(data.load(dataset, size=size).train)


BASE = {
    "widths": (16, 32, 64),
    "blocks": (1, 1, 2),
}  # deep where pixels are few: the best shape per second on a CPU
WIDE = {"widths": (32, 64, 128), "blocks": (1, 1, 1)}  # leaves room to prune in multiples of 16

# (preset, data set, variant) -> what differs from Task's defaults: the result of the sweeps.
TUNED = {
    ("quick", "mnist5k", "base"): dict(recipe=Recipe(epochs=2, batch_size=64, lr=0.2, weight_decay=2e-3)),
    ("quick", "mnist5k", "wide"): dict(
        recipe=Recipe(epochs=2, batch_size=64, lr=0.2, weight_decay=2e-3),
        tuned={1.0: {"weight_decay": 1e-3}, 2.0: {"weight_decay": 2e-3}},
    ),
    ("study", "cifar10", "base"): dict(recipe=Recipe(epochs=6, batch_size=128, lr=0.4, weight_decay=5e-4)),
    ("study", "cifar10", "wide"): dict(recipe=Recipe(epochs=4, batch_size=128, lr=0.4, weight_decay=5e-4)),
    ("study", "fashion_mnist", "base"): dict(
        recipe=Recipe(epochs=6, batch_size=128, lr=0.2, weight_decay=1e-3)
    ),
}

SMALL = {"widths": (8, 8, 8), "blocks": (1, 1, 1)}
DEEP = {"widths": (16, 32, 64), "blocks": (3, 3, 3)}
PRESET = {  # `full` is the thesis run on a GPU
    "smoke": dict(
        images=128, validation=100, seeds=1, lengths=(0.5, 1.0), widths=SMALL,
        recipe=Recipe(epochs=2, batch_size=32),
    ),
    "quick": dict(
        images=3500, validation=1000, seeds=3, lengths=(0.5, 1.0), widths=BASE,
        recipe=Recipe(epochs=3, batch_size=64, lr=0.2),
    ),
    "study": dict(seeds=5, widths=BASE, recipe=Recipe(epochs=6, batch_size=128, lr=0.2)),
    "full": dict(
        seeds=5, lengths=(0.35, 0.5, 0.71, 1.0, 1.41), widths=DEEP,
        recipe=Recipe(epochs=40, batch_size=128, lr=0.4),
    ),
}  # fmt: skip


def default_preset() -> str:
    """`EFFILIB_PRESET` if set, else `quick`.

    >>> default_preset() in PRESETS
    True
    """
    return os.environ.get("EFFILIB_PRESET") or "quick"


def default_dataset(preset: str) -> str:
    """The preset's data set: mnist5k for smoke and quick, CIFAR-10 (else Fashion-MNIST) for study and full.

    >>> default_dataset("quick")
    'mnist5k'
    """
    choose("preset", preset, PRESETS)
    if preset in ("smoke", "quick"):
        return "mnist5k"
    return "cifar10" if preset == "full" or data.present("cifar10") else "fashion_mnist"


def task(
    preset: str = "",
    dataset: str = "",
    network: str = "",
    variant: str = "base",
    *,
    device: str = "auto",
    **changes,
) -> Task:
    """Return the task of a preset, data set and network; "" stands for the default.

    changes: settings of `Task` or `Recipe`. Raises `BadInput` for an unknown preset, data set, network or
    setting.

    >>> task("study", "cifar10").recipe.lr
    0.4
    """
    preset = choose("preset", preset or default_preset(), PRESETS)
    dataset = dataset or default_dataset(preset)
    data.check_name(dataset)
    if network:
        models.check_name(network)
    choose("variant", variant, VARIANTS)
    settings = dict(PRESET[preset], variant=variant)
    if variant == "wide" and preset != "smoke":
        settings["widths"] = WIDE
    tuned = TUNED.get((preset, data.identify(dataset), variant), {})
    settings |= tuned
    if network and network != "resnet":
        settings |= dict(network=network, widths={}, tuned={})  # nobody tuned it
    result = Task(preset=preset, dataset=dataset, device=pick_device(device), **settings)
    own = ("network", "widths") if network else ()  # a chapter puts no other network in its place
    return result.but(**changes, given=(*changes, *own))


def pick_device(device: str = "auto") -> str:
    """Return the device to run on.

    "auto" is "cuda" where there is one, else "cpu"; each of several processes has a GPU of its own. Raises
    `BadInput` where the device is not there.

    >>> pick_device("cpu")
    'cpu'
    """
    import torch

    choose("device", device.split(":")[0], ("auto", "cpu", "cuda"))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise BadInput(f"device {device!r}: this machine has no CUDA; choose auto or cpu")
    return distributed.gpu() if device == "cuda" else device


def recorded_tuning() -> Path:
    """Return the folder of the sweeps behind `TUNED`.

    >>> recorded_tuning().parts[-3:]
    ('results', 'recorded', 'tuning')
    """
    return paths.recorded() / "tuning"
