"""Kernel rescaling: begin training with small images and small kernels.

Porto Buarque de Gusmao, Francini, Lepsoy & Magli 2016, arXiv:1610.03623: a network is trained first on small
images with small kernels; then its kernels are enlarged, with the amplitude factor of the scaling law
(`rescaled_kernels`), and it is refined at full size. We had only the abstract: kernel sizes, schedule and
treatment of momentum are choices made here. Without the kernels it is progressive resizing, the control.

Three options make the most of small images: weaker regularisation on them (EfficientNetV2, Tan & Le 2021,
arXiv:2104.00298: no crops, less weight decay, all of it at the end), and a last phase on cut-outs, tested on
whole images (after FixRes, Touvron et al. 2019, arXiv:1906.06423).
"""

import copy
import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from effilib import models
from effilib.dataset import Batches, Dataset, Split
from effilib.errors import BadInput, NoEffect, NotApplicable, within
from effilib.hooks import Method
from effilib.methods import Info
from effilib.methods.rescaled_kernels import SMALLEST, kernels, rescale_, resize, scaled
from effilib.run import Run

__all__ = ["KernelRescaling", "shrunk"]

INFO = Info(
    name="Kernel rescaling",
    name_de="Skalierung der Filter",
    chapter="6.3",
    paper="Porto Buarque de Gusmao et al. 2016, arXiv:1610.03623",
    claim="Training that begins with smaller images and smaller kernels, rescaled for the last epochs at "
    "full size, takes nearly 20 % less time at the same test accuracy (OverFeat and ResNet; abstract).",
    cost_model="On images of s times the side a step costs s^2 of a full one, a layer whose kernels are as "
    "much smaller s^4. Added are resizing the images and a few forward passes for BatchNorm's statistics "
    "at each switch.",
    applies="images whose side can be halved; kernels of 5 x 5 or more",
)


def shrunk(dataset: Dataset, size: tuple[int, int], splits: tuple[str, ...] = ("train",)) -> Dataset:
    """Return the data set with the images of some splits resized.

    To (h, w). Its crops shrink with the images.

    >>> shrunk(load("synthetic"), (4, 4)).shape
    (1, 4, 4)
    """

    def small(split):
        parts = [resize(x.permute(0, 3, 1, 2).float(), size).round() for x in split.x.split(2000)]
        x = torch.cat(parts).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        return Split(x=x, y=split.y)

    pad = round(dataset.pad * min(size) / min(dataset.shape[1:]))
    return replace(dataset, pad=pad, **{name: small(getattr(dataset, name)) for name in splits})


def _cut_from(batches: Batches, table: torch.Tensor, size: tuple[int, int]) -> None:
    """Let the same order of images, with the same draws of crops, be cut from a table, windows of (h, w)."""
    (h, w), y = size, batches.dataset.train.y
    inner = copy.copy(batches)
    inner.__dict__.pop("cut", None)
    inner.dataset = replace(batches.dataset, train=Split(x=table[:, :h, :w], y=y))  # has the window's shape
    inner.padded, inner.pixels = table, table.reshape(-1, table.shape[-1])
    room, drawn = (table.shape[1] - h, table.shape[2] - w), 2 * batches.pad  # dy, dx: 0 ... drawn

    def cut(index, dy, dx, mirrored):
        dy, dx = ((d * r // drawn if drawn else d + r // 2) for d, r in zip((dy, dx), room, strict=True))
        return inner.cut(index, dy, dx, mirrored)

    batches.cut = cut


@dataclass(frozen=True, kw_only=True)
class KernelRescaling(Method):
    """Train through image and kernel sizes that end at full size.

    Raises `NoEffect` if nothing was ever smaller. The images of a phase are cut from a table of resized ones,
    made once. Evaluations for the record always see images of full size, and the model as it stands: what it
    reaches on small images counts for nothing. A step on small images is timed as a kind of its own, "step at
    16 x 16".

    >>> data = load("synthetic")
    >>> net = build("resnet", data.classes, data.shape, widths=(8, 8), blocks=(1, 1), kernels=(5, 5, 5))
    >>> method = KernelRescaling(schedule=((0.5, 0.5), (0.5, 1.0)))
    >>> history = train(net, data, Recipe(epochs=1, batch_size=32), [method])
    >>> sorted(kind for kind in history.kinds if kind.startswith("step"))
    ['step', 'step at 4 x 4']
    """

    # Rows (share of the steps, factor on the images' sides[, factor on the kernels]); shares add up to 1, the
    # last row is full size. Without a third number kernels follow the images.
    schedule: tuple = ((0.4, 0.5), (0.3, 0.75), (0.3, 1.0))
    kernels: bool = True  # False: progressive resizing, the images only
    amplitude: bool = True  # see `rescale_`
    smallest: int = SMALLEST  # see `rescaled_kernels.kernels`
    multiple: int = 1  # images' sides are rounded to multiples of it
    recalibrate: int = 8  # batches for BatchNorm's statistics after a switch, on the clock; 0: they adapt
    crops: bool = True  # False: small images are not cropped at random, those of full size are
    decay: float = 1.0  # factor on weight decay for the smallest images; it grows to 1 with their side
    cut: float = 1.0  # side of the cut-outs that the last phase trains on, as a share; 1: whole images

    def __post_init__(self):
        rows = tuple(tuple(row) if isinstance(row, list | tuple) else (row,) for row in self.schedule)
        object.__setattr__(self, "schedule", rows)  # lists come from JSON; settings must be hashable
        if not rows or not all(
            len(r) in (2, 3) and all(isinstance(v, int | float) and v > 0 for v in r) for r in rows
        ):
            raise BadInput(
                "kernel rescaling: the schedule has rows (share of the steps, image factor[, kernel "
                "factor]), all above 0"
            )
        if abs(sum(r[0] for r in rows) - 1) > 1e-6 or set(rows[-1][1:]) != {1}:
            raise BadInput(
                "kernel rescaling: the shares of the schedule must add up to 1, and its last row must be "
                "full size, factor 1"
            )
        within("kernel rescaling: decay", self.decay, "above 0")
        if not 0.5 <= self.cut <= 1:
            raise BadInput(f"kernel rescaling: cut is {self.cut}, it must be from 0.5 to 1")
        if self.multiple < 1 or self.recalibrate < 0:
            raise BadInput("kernel rescaling: multiple is at least 1, recalibrate at least 0")

    def phases(self, shape: tuple[int, ...], steps: int) -> list[tuple]:
        """Return the phases of a run of so many steps.

        [(first step, (h, w), factor on the kernels), ...]. shape: of an image, (C, H, W).
        """
        found, share = [], 0.0
        for row in self.schedule:
            size = tuple(
                n if row[1] == 1 else max(1, round(row[1] * n / self.multiple)) * self.multiple
                for n in shape[1:]
            )
            factor = row[2] if len(row) == 3 else math.sqrt(math.prod(size) / math.prod(shape[1:]))
            found.append((round(share * steps), size, factor if self.kernels else 1.0))
            share += row[0]
        if self.cut < 1:
            begin, size, factor = found[-1]
            found[-1] = begin, tuple(round(self.cut * n) for n in size), factor
        return found

    def sizes(self, model: nn.Module, full: dict[str, int], factor: float) -> dict[str, int]:
        """Return the kernels' sizes in a phase, name -> size; full: those on full-size images."""
        return {
            name: k if factor == 1 else scaled(model.get_submodule(name), k, factor)
            for name, k in full.items()
        }

    def on_fit_start(
        self, run: Run
    ) -> None:  # nothing changes yet: a run that is resumed gets its state only after this
        size = tuple(run.dataset.shape[1:])
        run.state[self] = {"phase": -1, "size": size, "full": {}, "decay": 1.0}

    def on_epoch_start(self, run: Run) -> None:
        if run.state[self]["phase"] < 0:
            run.state[self]["full"] = self.check(run)
        run.step_kind = self.label(run)
        self.follow(run, run.schedule.position)
        if "cut" not in vars(run.batches):  # resumed within a phase
            self.feed(run)

    def on_batch(self, run: Run, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return resize(x, run.state[self]["size"]).contiguous(memory_format=run.layout), y

    def on_step_end(self, run: Run) -> None:
        self.follow(run, run.schedule.after)

    def on_fit_end(self, run: Run) -> None:
        self.follow(run, run.schedule.planned)  # where a run ends early, by divergence
        if self.cut < 1:  # what follows sees whole images
            run.kind = "reconfigure"
            run.state[self]["size"] = tuple(run.dataset.shape[1:])
            self.feed(run)
            if self.recalibrate:
                self.restate(run, run.model, run.state[self]["size"])
            run.kind = run.step_kind

    def feed(self, run: Run) -> None:
        """Let batches be cut from a table of this phase's images."""
        batches, size, full = run.batches, tuple(run.state[self]["size"]), tuple(run.dataset.shape[1:])
        if type(batches) is not Batches:
            return  # data of another kind: `on_batch` resizes
        vars(batches).pop("cut", None)
        if self.cut < 1 and run.state[self]["phase"] == len(self.schedule) - 1 and size != full:
            _cut_from(batches, batches.dataset.train.x, size)
        elif size != full:
            pad = round(batches.pad * min(size) / min(full)) if self.crops else 0
            small = replace(shrunk(batches.dataset, size), pad=pad)
            _cut_from(batches, Batches(small, 1, batches.generator).padded, size)

    def check(self, run: Run) -> dict[str, int]:
        """Return the sizes of all kernels that are to be rescaled.

        Raises `BadInput` or `NoEffect` where the schedule cannot be followed.
        """
        model, (C, *side) = run.model, run.dataset.shape
        if self.cut < 1 and type(run.batches) is not Batches:
            raise NotApplicable(f"kernel rescaling: nothing can be cut out of {type(run.batches).__name__}")
        full, phases = (
            kernels(model, self.smallest) if self.kernels else {},
            self.phases(run.dataset.shape, run.schedule.planned),
        )
        starts = [start for start, *_ in phases] + [run.schedule.planned]
        if any(a >= b for a, b in itertools.pairwise(starts)):
            raise NotApplicable(
                f"kernel rescaling: of {run.schedule.planned} steps a phase of the schedule gets none; train "
                f"longer or with fewer phases"
            )
        smaller = [self.sizes(model, full, factor) for *_, factor in phases]
        if self.kernels and all(sizes == full for sizes in smaller):
            least = f"{self.smallest} x {self.smallest}"
            raise NoEffect(
                f"kernel rescaling: {type(model).__name__} has no kernel of at least {least} with stride 1 "
                "that the schedule changes; kernels=False resizes the images only"
            )
        if not self.kernels and all(size == tuple(side) for _, size, _ in phases):
            raise NoEffect(
                f"kernel rescaling: every phase of the schedule has images of full size, {side[0]} x "
                f"{side[1]}"
            )
        for (_, size, _), sizes in zip(phases, smaller, strict=True):
            twin = copy.deepcopy(model).cpu()
            sizes = {name: k for name, k in sizes.items() if k != full[name]}
            if sizes:
                rescale_(twin, sizes, amplitude=self.amplitude)
            try:
                models.fits(twin, type(model).__name__, len(run.dataset.names), (C, *size))
            except BadInput as error:
                raise BadInput(
                    f"kernel rescaling: {error}. A head on a flattened map, or fixed positions, tie a "
                    f"network to {side[0]} x {side[1]}: "
                    "it needs global pooling; and a picture must not shrink to nothing on its way"
                ) from error
        return full

    def label(self, run: Run) -> str:
        """Return what a step of this phase is timed as."""
        size = tuple(run.state[self]["size"])
        return "step" if size == tuple(run.dataset.shape[1:]) else f"step at {size[0]} x {size[1]}"

    def follow(self, run: Run, position: float) -> None:
        """Bring images and kernels to the phase of a schedule's `position`."""
        state, phases = run.state[self], self.phases(run.dataset.shape, run.schedule.planned)
        phase = max(i for i, (start, *_) in enumerate(phases) if start <= position)
        if phase == state["phase"]:
            return
        _, size, factor = phases[phase]
        begun, done, norms = state["phase"] >= 0, {}, []
        state.update(phase=phase, size=size)
        run.step_kind = self.label(run)
        sides = [min(size) for _, size, _ in phases]
        far = (sides[phase] - min(sides)) / max(1, sides[-1] - min(sides))
        decay = 1.0 if phase == len(phases) - 1 else self.decay + (1 - self.decay) * far
        for group in run.optimizer.param_groups:
            group["weight_decay"] *= decay / state["decay"]
        state["decay"] = decay

        def change(model, optimizer):
            todo = {
                n: k
                for n, k in self.sizes(model, state["full"], factor).items()
                if k != model.get_submodule(n).kernel_size[0]
            }
            if todo:
                done.update(rescale_(model, todo, optimizer, amplitude=self.amplitude))
            if begun and self.recalibrate:
                norms.append(self.restate(run, model, size))

        run.kind = "reconfigure"  # what is left of this step is none
        self.feed(run)
        run.restructure(change)  # also for the images alone: compiled graphs change
        text = "; ".join(f"{n} {a} -> {b}" for n, (a, b) in done.items()) or "kernels as they were"
        sizes = {n: b for n, (_, b) in done.items()}
        run.log(
            self, f"images {size[0]} x {size[1]}; {text}", size=list(size), kernels=sizes, norms=sum(norms)
        )

    def restate(self, run: Run, model: nn.Module, size: tuple[int, int]) -> int:
        """Set BatchNorm's statistics from a few training batches of the new size."""
        batches = copy.copy(run.batches)
        batches.generator = run.generator(self)  # the order of the training is not touched
        xs = (
            resize(x, size).contiguous(memory_format=run.layout)
            for x, _ in itertools.islice(batches, self.recalibrate)
        )
        with run.autocast():
            return models.reestimate_(model, xs, training=True)
