"""What every chapter trains and against what it is judged: data, network, tuned recipe, target and margin,
per preset.

The baselines were tuned before any method was run (`effilib tune`, sweeps in `results/recorded/tuning`). A
target is the accuracy that the shortest tuned schedule reaches in at least 4 of 5 seeds; it is a constant of
the task. Where nothing was tuned (a user's own data or network), the target comes from a pilot of the
baseline with seeds of its own, before the method is run: `effilib.experiment.pilot`."""

import os
from dataclasses import dataclass, field, replace

from effilib import data, distributed, models, paths
from effilib.errors import BadInput, choose
from effilib.training import EVALUATIONS, Recipe, stream

PRESETS = ("smoke", "quick", "study", "full")


@dataclass(frozen=True, kw_only=True)
class Task:
    """Data, network and recipe of the baseline, and what counts as reaching it.

    images: training images taken (None: all). held: at most so many validation images are evaluated (None:
    all). evaluations: of the validation set in a run. target: validation accuracy in %, or None if a pilot
    has to find it. margin: points of accuracy that count as equal. seeds: how many. variant: "base", or
    "wide" (32/64/128, what pruning and growing start from).

    >>> t = task("quick", "mnist5k")
    >>> t.target, t.margin, t.seeds, t.but(epochs=1).recipe.epochs
    (96.0, 1.0, 5, 1)
    """

    preset: str
    dataset: str
    network: str = "resnet"
    widths: dict = field(default_factory=dict)  # settings of one of our networks
    recipe: Recipe = field(default_factory=Recipe)
    target: float | None = None
    margin: float = 0.5
    images: int | None = None
    held: int | None = None
    evaluations: int = EVALUATIONS
    seeds: int = 5
    variant: str = "base"
    device: str = "cpu"

    def load(self):
        """The data set, cut to the preset's size, on the task's device."""
        dataset = data.load(self.dataset, device=self.device)
        if self.images:
            dataset = dataset.limit(min(self.images, len(dataset.train)))
        if self.held:
            dataset = replace(
                dataset, validation=dataset.validation[: self.held], test=dataset.test[: 3 * self.held]
            )
        return dataset

    def build(self, dataset, seed=0, **settings):
        """The baseline's network with the initial weights of `seed`; settings replace widths or depths."""
        init = stream(seed, "initial weights").initial_seed()
        return models.build(
            self.network,
            dataset.classes,
            dataset.shape,
            seed=init,
            device=self.device,
            **(self.widths | settings),
        )

    def but(self, **changes):
        """The same task with other settings; those of `Recipe` go into the recipe."""
        in_recipe = {k: v for k, v in changes.items() if k in Recipe.__dataclass_fields__}
        rest = {k: v for k, v in changes.items() if k not in in_recipe}
        for k in rest:
            choose("setting of a task", k, [*Task.__dataclass_fields__, *Recipe.__dataclass_fields__])
        return replace(self, recipe=replace(self.recipe, **in_recipe), **rest)


BASE = {
    "widths": (16, 32, 64),
    "blocks": (1, 1, 2),
}  # deep where pixels are few: the best shape per second on a CPU
WIDE = {"widths": (32, 64, 128), "blocks": (1, 1, 1)}  # leaves room to prune in multiples of 16

# (preset, data set, variant) -> what differs from Task's defaults: the result of the sweeps. Where there is a
# target, all five seeds of `effilib tune --target` held the target; their runs lie beside the sweep.
TUNED = {
    ("quick", "mnist5k", "base"): dict(
        recipe=Recipe(epochs=3, batch_size=64, lr=0.2, weight_decay=5e-4), target=96.0
    ),
    ("quick", "mnist5k", "wide"): dict(recipe=Recipe(epochs=2, batch_size=64, lr=0.2, weight_decay=2.5e-4)),
    ("study", "cifar10", "base"): dict(
        recipe=Recipe(epochs=15, batch_size=64, lr=0.2, weight_decay=1e-3), target=76.5
    ),
    ("study", "cifar10", "wide"): dict(recipe=Recipe(epochs=10, batch_size=64, lr=0.4, weight_decay=2.5e-4)),
    ("study", "fashion_mnist", "base"): dict(
        recipe=Recipe(epochs=15, batch_size=64, lr=0.1, weight_decay=2e-3), target=90.0
    ),
}

SIZES = {  # of the presets; `full` is the thesis run on a GPU
    "smoke": dict(
        images=128,
        held=100,
        seeds=1,
        margin=1.0,
        widths={"widths": (8, 8, 8), "blocks": (1, 1, 1)},
        recipe=Recipe(epochs=2, batch_size=32),
    ),
    "quick": dict(
        images=3500,
        held=1000,
        seeds=5,
        margin=1.0,
        widths=BASE,
        recipe=Recipe(epochs=4, batch_size=64, lr=0.2),
    ),
    "study": dict(
        images=10_000,
        held=3000,
        seeds=5,
        margin=0.5,
        widths=BASE,
        recipe=Recipe(epochs=15, batch_size=64, lr=0.2),
    ),
    "full": dict(
        seeds=5,
        margin=0.5,
        widths={"widths": (16, 32, 64), "blocks": (3, 3, 3)},
        recipe=Recipe(epochs=40, batch_size=128, lr=0.4),
    ),
}


def default_preset():
    """`EFFILIB_PRESET` if set, else `quick`.

    >>> default_preset() in PRESETS
    True
    """
    return os.environ.get("EFFILIB_PRESET") or "quick"


def default_dataset(preset):
    """The preset's data set: mnist5k for smoke and quick, CIFAR-10 (else Fashion-MNIST) for study and full.

    >>> default_dataset("quick")
    'mnist5k'
    """
    choose("preset", preset, PRESETS)
    if preset in ("smoke", "quick"):
        return "mnist5k"
    return "cifar10" if preset == "full" or data.present("cifar10") else "fashion_mnist"


def task(preset="", dataset="", network="", variant="base", *, device="auto", **changes):
    """The task of a preset, data set and network; "" stands for the default.

    changes: settings of `Task` or `Recipe`. Raises `BadInput` for an unknown preset, data set, network or
    setting.

    >>> task("study", "cifar10").recipe.lr
    0.2
    >>> print(task("study", "cifar10", epochs=3).target)  # nobody tuned that
    None
    """
    preset = choose("preset", preset or default_preset(), PRESETS)
    dataset = dataset or default_dataset(preset)
    data.check_name(dataset)
    if network:
        models.check_name(network)
    choose("variant", variant, ("base", "wide"))
    settings = dict(SIZES[preset], variant=variant)
    if variant == "wide" and preset != "smoke":
        settings["widths"] = WIDE
    tuned = TUNED.get((preset, data.identify(dataset), variant), {})
    settings |= tuned
    if network and network != "resnet":
        settings |= dict(network=network, widths={}, target=None)  # nobody tuned it: the pilot decides
    result = Task(preset=preset, dataset=dataset, device=pick_device(device), **settings)
    if set(changes) - {"seeds"}:
        result = replace(result, target=None)
    return result.but(**changes)


def pick_device(device="auto"):
    """The device to run on: for "auto" that is "cuda" if there is one, else "cpu"; each of several processes
    has a GPU of its own.

    Raises `BadInput` where it is not there.

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


def recorded_tuning():
    """Folder of the sweeps behind `TUNED`.

    >>> recorded_tuning().parts[-3:]
    ('results', 'recorded', 'tuning')
    """
    return paths.recorded() / "tuning"
