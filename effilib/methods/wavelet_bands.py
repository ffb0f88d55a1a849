"""Haar bands that are computed once for a whole data set, and the training on them.

The transform is linear and commutes with crops by even numbers of pixels; mirrored bands are those of the
mirrored image but for the signs of V and D.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from effilib import networks
from effilib.clock import Stopwatch
from effilib.dataset import Batches, Dataset, Split, moments
from effilib.errors import BadInput
from effilib.history import History
from effilib.inspection import first_convolution
from effilib.methods.wavelet import butterfly, even
from effilib.methods.wavelet_stem import keep_sizes_
from effilib.seeds import stream
from effilib.tasks import Task
from effilib.training import train

__all__ = ["BandBatches", "Bands", "Precomputed", "precompute"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Bands(Dataset):
    """Hold a data set whose images are Haar bands.

    x is (N, H/2, W/2, 4C) int16, twice the bands and exact; mean and std are per band. padded: bands of the
    training images padded for crops, (N, (H + 2p)/2, (W + 2p)/2, 4C). pad: largest shift in band pixels, each
    two image pixels: crops by odd numbers of pixels do not exist here.

    >>> bands = precompute(load("synthetic"))
    >>> type(bands).__name__, bands.shape, bands.train.x.dtype
    ('Bands', (4, 4, 4), torch.int16)
    """

    padded: torch.Tensor

    def shuffled(self, batch_size: int, generator: torch.Generator, **augmentation) -> "BandBatches":
        return BandBatches(self, batch_size, generator, **augmentation)

    def limit(self, images: int) -> "Bands":
        return replace(super().limit(images), padded=self.padded[:images])

    def to(self, device: str | torch.device) -> "Bands":
        return replace(super().to(device), padded=self.padded.to(device))


class BandBatches(Batches):
    """Iterate over batches of bands, cropped and mirrored.

    Cut from the padded ones; where mirrored, V and D change their sign.

    >>> batches = precompute(load("synthetic")).shuffled(32, torch.Generator().manual_seed(0))
    >>> type(batches).__name__, next(iter(batches))[0].shape
    ('BandBatches', torch.Size([32, 4, 4, 4]))
    """

    def __init__(
        self,
        dataset: Bands,
        batch_size: int,
        generator: torch.Generator,
        *,
        augmentation: str = "auto",
        pad: int | None = None,
        flips: str = "random",
    ):
        unpadded = replace(dataset, pad=0)
        if pad not in (None, dataset.pad):
            raise BadInput(
                f"{dataset.name}: these bands were made for crops of {dataset.pad} pixels, not {pad}"
            )
        super().__init__(unpadded, batch_size, generator, augmentation="none")
        self.dataset = dataset
        self.pad = dataset.pad if augmentation != "none" else 0
        self.flip = dataset.flipped(augmentation)
        self.first = self._first_flips(flips)
        if augmentation.startswith("crop") and not dataset.pad:
            raise BadInput(
                f"{dataset.name}: these bands were made without padding and cannot be cropped; choose "
                "augmentation auto or none"
            )
        self.padded = dataset.padded if self.pad else dataset.train.x
        self.pixels = self.padded.reshape(-1, self.padded.shape[-1])

    def cut(
        self, index: torch.Tensor, dy: torch.Tensor, dx: torch.Tensor, mirrored: torch.Tensor
    ) -> torch.Tensor:
        x = super().cut(index, dy, dx, mirrored)
        if not self.flip:
            return x
        # normalised is (v - m) / s; of -v it is -(v - m) / s - 2 m / s, and of 0 it is -m / s
        zero = self.dataset.normalize(x.new_zeros(1, 1, 1, x.shape[1]))
        V = torch.arange(x.shape[1], device=x.device).view(1, -1, 1, 1) >= x.shape[1] // 2  # V and D
        change = mirrored.view(-1, 1, 1, 1) & V
        return torch.where(change, 2 * zero - x, x)


def precompute(dataset: Dataset) -> Bands:
    """Return the `Bands` of a data set.

    Haar only, whose bands can be mirrored. Images of odd size get a last row or column more, as `haar` does.
    Evaluation sees what `haar` makes of the images; the bands are standardised with moments of the training
    images.

    >>> data = load("synthetic")
    >>> bands = precompute(data)
    >>> pixels = data.train.x[:1].permute(0, 3, 1, 2).float()
    >>> torch.equal(bands.train.x[:1].permute(0, 3, 1, 2), butterfly(pixels))
    True
    """
    pad = (dataset.pad + 1) // 2  # in band pixels

    def bands(x, p=0):  # (N, H, W, C) uint8 -> (N, h, w, 4C) int16, in parts: memory
        parts = []
        for part in x.split(1000):
            image = part.permute(0, 3, 1, 2).float()
            image = F.pad(even(image), [2 * p] * 4, mode="reflect") if p else even(image)
            parts.append(butterfly(image.to(torch.int16)).permute(0, 2, 3, 1).contiguous())
        return torch.cat(parts)

    splits = {
        n: Split(x=bands(s.x), y=s.y)
        for n in ("train", "decide", "validation", "test")
        for s in [getattr(dataset, n)]
    }
    mean, std = moments(splits["train"].x[:2000])
    kept = {k: getattr(dataset, k) for k in ("name", "names", "flip", "note")}
    padded = bands(dataset.train.x, pad) if pad else splits["train"].x
    return Bands(**splits, **kept, mean=tuple(mean.tolist()), std=tuple(std.tolist()), pad=pad, padded=padded)


@dataclass(frozen=True, kw_only=True)
class Precomputed:
    """Train on bands that were computed once, on the clock.

    For `Arm.fit`: (task, seed) -> `History`.

    >>> Precomputed()(task("smoke", "synthetic").at(0.5), seed=0).steps
    4
    """

    def __call__(self, task: Task, seed: int) -> History:
        dataset = task.load()
        watch = Stopwatch(dataset.device)
        watch.start()
        bands = precompute(dataset)
        watch.lap("precompute")
        watch.end_epoch()
        model = task.build(dataset, seed)
        keep_sizes_(model, dataset.shape, after=first_convolution(model, dataset.shape)[0])
        _stem_for_(model, bands.shape, seed)
        kinds = {"precompute": {"count": 1, "seconds": watch.seconds}}
        before = History(seconds=watch.seconds, raw_seconds=watch.raw, kinds=kinds)
        return before + train(model, bands, task.recipe, (), seed)


def _stem_for_(model, shape, seed):
    """Give our networks a first convolution for `shape` (C, H, W): bands need no front end where the data are
    bands.
    """
    name, old = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    conv = networks.conv3x3(shape[0], old.out_channels, bias=old.bias is not None)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu", generator=stream(seed, "stem"))
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, conv)
