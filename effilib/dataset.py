"""Hold images as uint8 on the device, and make batches that are cut, flipped and normalised there.

No worker processes: a whole epoch's crops and flips are drawn at once, and a batch is one `index_select` of
pixels, which also puts channels last. `make bench` compares it with torchvision's transforms and a
`DataLoader`.
"""

import functools
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from effilib.distributed import ALONE
from effilib.errors import BadInput, NotApplicable, choose

__all__ = ["Batches", "Dataset", "Split", "moments", "normalize"]

HELD_OUT = ("validation", "test")  # the splits of which a final accuracy is
FLIPS = ("random", "alternating")


@dataclass(frozen=True, kw_only=True)
class Split:
    """Images x: (N, H, W, C) uint8 and labels y: (N,) int64, on one device.

    >>> split = Split(x=torch.zeros(3, 8, 8, 1, dtype=torch.uint8), y=torch.tensor([0, 1, 1]))
    >>> len(split), len(split[:2])
    (3, 2)
    """

    x: torch.Tensor
    y: torch.Tensor

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return Split(x=self.x[index], y=self.y[index])

    def to(self, device: torch.device | str) -> "Split":
        """Return the same split on another device."""
        return Split(x=self.x.to(device), y=self.y.to(device))


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Four disjoint stratified splits and what training needs to know of them.

    train: for gradients. decide: a method may read it. validation: targets. test: read once, at the end of a
    run. mean, std: per channel, of the training images in [0, 1]. pad: pixels of the random crop. flip:
    mirrored or not. dtype: of the numbers that a network sees. batch: how many are evaluated at a time.

    >>> data = load("synthetic")
    >>> data.classes, data.shape, [len(s) for s in (data.train, data.decide, data.validation, data.test)]
    (4, (1, 8, 8), [360, 25, 51, 76])
    """

    name: str
    names: tuple  # of the classes
    train: Split
    decide: Split
    validation: Split
    test: Split
    mean: tuple
    std: tuple
    pad: int = 0
    flip: bool = False
    note: str = ""  # what must be said where a figure is quoted
    dtype: torch.dtype = torch.float32
    batch: int = 500  # images at a time where nothing is trained: not more than a training batch
    held_out: tuple[str, ...] = HELD_OUT

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        height, width, channels = self.train.x.shape[1:]
        return channels, height, width

    @property
    def device(self) -> torch.device:
        """Where its tensors lie."""
        return self.train.x.device

    @cached_property
    def digest(self) -> str:
        """sha256 of all images and labels: results are cached under it."""
        return digest(t for s in (self.train, self.decide, self.validation, self.test) for t in (s.x, s.y))

    def to(self, device: torch.device | str) -> "Dataset":
        """Return the same data on another device."""
        return replace(
            self, **{k: getattr(self, k).to(device) for k in ("train", "decide", "validation", "test")}
        )

    def limit(self, images: int) -> "Dataset":
        """Return the data with fewer training images: the first, stratified ones."""
        if not 0 < images <= len(self.train):
            raise BadInput(f"{self.name} has {len(self.train)} training images: cannot take {images}")
        return replace(self, train=self.train[:images])

    def whole(self) -> "Dataset":
        """Return the data with all published training images trained on.

        The test images alone judge, as in what others report. Nothing may be tuned on it: the validation
        images are trained on.
        """
        train = [self.train, self.validation, self.decide]
        train = Split(x=torch.cat([s.x for s in train]), y=torch.cat([s.y for s in train]))
        return replace(self, train=train, held_out=("test",))

    def flipped(self, augmentation: str = "auto") -> bool:
        """Return whether an augmentation, as in `Recipe`, mirrors training images."""
        return self.flip if augmentation == "auto" else augmentation == "crop+flip"

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise images to mean 0 and variance 1 per channel.

        (N, H, W, C) uint8 -> (N, C, H, W) of `dtype`, channels last in memory.
        """
        return normalize(x, self.mean, self.std, self.dtype)

    def shuffled(self, batch_size: int, generator: torch.Generator, **augmentation) -> "Batches":
        """Return the shuffled, augmented `Batches` of training; other data may have their own."""
        return Batches(self, batch_size, generator, **augmentation)

    def batches(
        self, split: Split, batch_size: int | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Normalised (x, y) of a split in its order, for evaluation: nothing is augmented.

        batch_size: default `batch`. The last batch is shorter.
        """
        n = batch_size or self.batch
        for x, y in zip(split.x.split(n), split.y.split(n), strict=True):
            yield self.normalize(x), y


def normalize(x: torch.Tensor, mean: tuple, std: tuple, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normalise images to mean 0 and variance 1 per channel.

    (N, H, W, C) integers of 0 to 255 -> (N, C, H, W), channels last in memory. mean, std: of the channels in
    [0, 1].

    >>> normalize(torch.full((1, 1, 2, 1), 255), mean=(0.5,), std=(0.25,))
    tensor([[[[2., 2.]]]])
    """
    n, height, width, channels = x.shape
    scale, shift = _scale_and_shift(mean, std, width, x.device, dtype)
    rows = x.reshape(n, height, width * channels).to(dtype)  # long rows vectorise, 3 channels don't
    return rows.mul_(scale).sub_(shift).view(n, height, width, channels).permute(0, 3, 1, 2)


@functools.lru_cache
def _scale_and_shift(mean, std, width, device, dtype):
    """What a row is multiplied by and what is taken off, copied to the device once and not for each batch."""
    mean, std = (torch.tensor(v, device=device, dtype=dtype).repeat(width) for v in (mean, std))
    return 1 / (255 * std), mean / std


class Batches:
    """Endless epochs of shuffled, augmented training batches: `for x, y in batches: ...` is one epoch.

    x: (batch_size, C, H, W) float32, channels last; y: (batch_size,) int64; `index`: which images they are.
    The last, incomplete batch is dropped. Order, crops and flips are drawn per image from `generator` (on the
    CPU, so that every device sees the same data). pad: pixels of the crop (None: the data set's). flips:
    where images are mirrored, "random" draws anew in each epoch; "alternating" draws once for the first one,
    and then mirrors each image in every second epoch; `epoch` counts them. chosen: index of the images that
    the coming epochs take; None is all. ranks: the processes that share each batch (`effilib.distributed`);
    only this one's images are cut.

    Raises `NotApplicable` if the split is smaller than one batch.

    >>> batches = load("synthetic").shuffled(100, torch.Generator().manual_seed(0))
    >>> len(batches), next(iter(batches))[0].shape
    (3, torch.Size([100, 1, 8, 8]))
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        generator: torch.Generator,
        *,
        augmentation: str = "auto",
        pad: int | None = None,
        flips: str = "random",
    ):
        choose("augmentation", augmentation, ("auto", "none", "crop", "crop+flip"))
        choose("flips", flips, FLIPS)
        self.dataset, self.batch_size, self.generator = dataset, batch_size, generator
        self.ranks = ALONE
        self.chosen = self.index = None
        self.pad = {"auto": dataset.pad, "none": 0}.get(
            augmentation, dataset.pad or max(1, min(dataset.shape[1:]) // 8)
        )
        self.pad = pad if self.pad and pad is not None else self.pad
        self.pad = min(self.pad, min(dataset.shape[1:]) - 1)  # more cannot be reflected
        self.flip = dataset.flipped(augmentation)
        self.epoch, self.first = 0, self._first_flips(flips)
        if not 0 < batch_size <= len(dataset.train):
            raise NotApplicable(
                f"batch size {batch_size} does not fit {dataset.name}: it has {len(dataset.train)} training"
                " images; batch_size sets a smaller one"
            )
        x = dataset.train.x
        if self.pad:  # reflect once: a crop is then an index
            x = _reflected(x, self.pad)
        self.padded = x
        self.pixels = x.reshape(-1, x.shape[-1])  # (N * PH * PW, C)

    def _first_flips(self, flips):
        """Which images are mirrored in the first epoch, where that alternates; None where it does not."""
        if not self.flip or flips == "random":
            return None
        own = torch.Generator().manual_seed(self.generator.initial_seed())  # the same when a run is resumed
        return torch.randint(2, (len(self.dataset.train),), generator=own).bool().to(self.dataset.device)

    def __len__(self):
        """Batches in an epoch."""
        n = len(self.dataset.train) if self.chosen is None else len(self.chosen)
        return n // self.batch_size

    def __iter__(self):
        device = self.dataset.device
        n = len(self.dataset.train) if self.chosen is None else len(self.chosen)

        def draw(high):
            return torch.randint(high, (n,), generator=self.generator).to(device)

        order = torch.randperm(n, generator=self.generator).to(device)
        order = order if self.chosen is None else self.chosen[order]
        dy, dx = (draw(2 * self.pad + 1) if self.pad else torch.zeros_like(order) for _ in range(2))
        if self.first is not None:
            mirrored = self.first[order] ^ bool(self.epoch % 2)
        else:
            mirrored = draw(2).bool() if self.flip else torch.zeros_like(order, dtype=torch.bool)
        mine = self.ranks.share(self.batch_size)
        for i in range(len(self)):
            s = slice(i * self.batch_size + mine.start, i * self.batch_size + mine.stop)
            self.index = order[s]
            yield self.cut(self.index, dy[s], dx[s], mirrored[s]), self.dataset.train.y[self.index]

    def cut(
        self, index: torch.Tensor, dy: torch.Tensor, dx: torch.Tensor, mirrored: torch.Tensor
    ) -> torch.Tensor:
        """Return normalised crops (B, C, H, W) of training images.

        index, dy, dx: (B,), which images, and the offsets. mirrored: (B,) whether each of them is.
        """
        channels, height, width = self.dataset.shape
        padded_height, padded_width = self.padded.shape[1:3]
        x = torch.arange(width, device=index.device)
        rows = dy[:, None] + torch.arange(height, device=index.device)  # (B, H)
        columns = dx[:, None] + torch.where(mirrored[:, None], width - 1 - x, x)  # (B, W)
        lines = index[:, None] * padded_height + rows
        pixel = lines[:, :, None] * padded_width + columns[:, None, :]  # (B, H, W)
        return self.dataset.normalize(
            self.pixels.index_select(0, pixel.flatten()).view(len(index), height, width, channels)
        )


def _reflected(x, pad):
    """(N, H, W, C) with `pad` reflected pixels on each side.

    In blocks: memory, and CUDA's kernel takes at most 2^31 elements at once.
    """
    n, height, width, channels = x.shape
    padded = x.new_empty(n, height + 2 * pad, width + 2 * pad, channels)
    done = 0
    for block in _blocks(x):
        part = F.pad(block.permute(0, 3, 1, 2), [pad] * 4, mode="reflect")
        padded[done : done + len(block)] = part.permute(0, 2, 3, 1)
        done += len(block)
    return padded


def digest(arrays):
    """sha256 of arrays or tensors (None: left out), a block at a time."""
    sha = hashlib.sha256()
    for a in arrays:
        if a is not None:
            sha.update(f"{tuple(a.shape)}{a.dtype}".replace("torch.", "").encode())
            for block in _blocks(a):
                sha.update(np.ascontiguousarray(torch.as_tensor(block).cpu()).data)
    return sha.hexdigest()


def _blocks(x, elements=2**20):
    """An array or tensor in parts of about so many elements, so that no copy of all is made."""
    n = max(1, elements // max(1, math.prod(x.shape[1:])))
    return (x[i : i + n] for i in range(0, len(x), n))


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each channel's mean and standard deviation.

    Of integers (N, H, W, C) over 255.

    >>> moments(torch.tensor([0, 51, 102]).view(1, 1, 3, 1))
    (tensor([0.2000], dtype=torch.float64), tensor([0.2000], dtype=torch.float64))
    """
    count = x[..., 0].numel()
    mean = sum(block.double().div_(255).sum((0, 1, 2)) for block in _blocks(x)) / count
    squares = sum((block.double().div_(255) - mean).square_().sum((0, 1, 2)) for block in _blocks(x))
    return mean, (squares / (count - 1)).sqrt().clamp_min(1e-3)
