"""Users' pictures: every format, mode, orientation and damage; folders as people have them; sizes; memory."""

import io
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from effilib import data, images, paths, tasks
from effilib.data import ARRAYS
from effilib.dataset import Batches
from effilib.errors import BadInput
from effilib.progress import ticked
from effilib.workbook import runner

SPLITS = ("train", "decide", "validation", "test")


def images_of(split):
    return [x.tobytes() for x in split.x.numpy()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """`make(size=..., mode=...)` draws an image folder of two classes; the cache goes to another folder."""
    monkeypatch.setenv("EFFILIB_DATA", str(tmp_path / "data"))
    root = tmp_path / "my images"

    def picture(path, size=(12, 10), mode="RGB", seed=0):
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(seed)
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode).save(path)
        return path

    def make(train=12, test=3, classes=("cat", "dog"), **settings):
        for part, n in (("train", train), ("test", test)):
            for c in classes:
                for i in range(n):
                    picture(
                        root / part / c / f"{i}.png",
                        seed=zlib.crc32(os.fsencode(f"{part}/{c}/{i}")),
                        **settings,
                    )
        return root

    make.picture = picture
    return make


def test_an_image_folder_is_read_and_named_by_its_classes(folder):
    root = folder()
    d = data.load(str(root))
    assert d.name == "my_images"
    assert d.names == ("cat", "dog")
    assert d.shape == (3, 10, 12)  # small and all alike: as it is
    assert [len(getattr(d, s)) for s in SPLITS] == [21, 1, 2, 6]
    expected = np.asarray(Image.open(root / "test" / "dog" / "1.png"))
    assert expected.tobytes() in images_of(d.test)
    assert d.test.y.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_second_reading_comes_from_the_cache_and_a_change_is_seen(folder):
    root = folder()
    first = data.load(str(root))
    cache = paths.data() / "cache"
    files = sorted(cache.iterdir())
    assert [f.suffix for f in files] == [".npz"]
    before = files[0].stat().st_mtime_ns
    assert data.load(str(root)).digest == first.digest
    assert sorted(cache.iterdir()) == files
    assert files[0].stat().st_mtime_ns == before
    folder.picture(root / "train" / "cat" / "0.png", seed=77)
    assert data.load(str(root)).digest != first.digest
    folder.picture(root / "train" / "cat" / "more.png", seed=78)
    assert len(data.load(str(root)).train) == 22


TOGETHER = """
import sys, time
from pathlib import Path
from effilib import data
folder, meeting, rank, processes, sizes = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])
for size in range(4, 4 + sizes):
    (meeting / f"{size} {rank}").touch()
    while len(list(meeting.glob(f"{size} *"))) < processes:
        time.sleep(0.001)
    digest = data.load(folder, size=size).digest
    print(digest, file=sys.stderr)
"""


def test_several_processes_may_load_a_folder_for_the_first_time_at_once(folder, tmp_path):
    root, meeting, processes, sizes = folder(train=20), tmp_path / "meeting", 3, 10
    meeting.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(paths.root()), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", TOGETHER, str(root), str(meeting)]
    children = [
        subprocess.Popen(
            [*words, str(rank), str(processes), str(sizes)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip
    try:
        said = [child.communicate(timeout=300) for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0] * processes, said
    expected = [data.load(str(root), size=size).digest for size in range(4, 4 + sizes)]
    assert [err.split() for _, err in said] == [expected] * processes
    assert len(list((paths.data() / "cache").iterdir())) == sizes  # no rests


@pytest.mark.parametrize(
    ("size", "asked", "shape"),
    [
        ((64, 64), None, (3, 64, 64)),
        ((64, 48), None, (3, 48, 64)),
        ((65, 65), None, (3, 32, 32)),
        ((200, 30), None, (3, 32, 32)),
        ((12, 10), 16, (3, 16, 16)),
        ((200, 30), 8, (3, 8, 8)),
    ],
)
def test_images_of_one_size_keep_it_if_it_is_small(folder, size, asked, shape):
    assert data.load(str(folder(size=size)), size=asked).shape == shape


def test_images_of_different_sizes_are_resized_to_one(folder):
    root = folder()
    folder.picture(root / "test" / "cat" / "0.png", size=(30, 20))
    assert data.load(str(root)).shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("mode", "channels"),
    [("L", 1), ("1", 1), ("RGB", 3), ("P", 3), ("RGBA", 3), ("LA", 1)],
)
def test_grey_images_have_one_channel_and_others_three(folder, mode, channels):
    assert data.load(str(folder(mode=mode))).shape[0] == channels


def test_grey_and_colour_mixed_become_colour(folder):
    root = folder(mode="L")
    folder.picture(root / "train" / "cat" / "0.png", mode="RGB")
    d = data.load(str(root))
    assert d.shape[0] == 3
    grey = d.test.x[0]
    assert torch.equal(grey[..., 0], grey[..., 2])


@pytest.mark.parametrize("suffix", ["jpg", "bmp", "webp", "ppm", "tif", "PNG"])
def test_other_formats_are_read_too(folder, suffix):
    root = folder()
    folder.picture(root / "train" / "dog" / f"other.{suffix}", seed=5)
    assert len(data.load(str(root)).train) == 22


def test_other_files_in_the_folder_do_not_matter(folder):
    root = folder()
    (root / "train" / "cat" / "notes.txt").write_text("hello")
    (root / "README").write_text("hello")
    assert len(data.load(str(root)).train) == 21


@pytest.mark.parametrize("part", ["train", "test"])
def test_all_broken_pictures_are_named_at_once_and_nothing_is_kept(folder, part):
    root = folder()
    cut, text, empty = (root / part / "dog" / f"{i}.png" for i in range(3))
    cut.write_bytes(cut.read_bytes()[:150])
    text.write_bytes(b"not an image")
    empty.write_bytes(b"")
    link = root / part / "cat" / "there.png"
    link.symlink_to(root / "gone.png")
    deep = root / part / "cat" / "deep.tif"
    Image.fromarray(np.ones((9, 9), np.float32)).save(deep)
    before = sorted(root.rglob("*"))
    with pytest.raises(BadInput) as error:
        data.load(str(root))
    said = str(error.value)
    assert said.startswith(f"{root}: 5 of 32 pictures cannot be read: ")
    for file, why in (
        (cut, "cannot be decoded: image file is truncated"),
        (text, "no picture that Pillow reads"),
        (empty, "no picture that Pillow reads"),
        (link, "a broken link"),
        (deep, "more than 16 bits a channel"),
    ):
        assert f"{file} ({why}" in said
    assert "\n" not in said
    assert not list(paths.data().rglob("*.*"))
    assert sorted(root.rglob("*")) == before


def test_pictures_damaged_in_any_way_are_read_or_named(folder):
    root, rng = folder(), np.random.default_rng(0)
    for suffix in ("png", "jpg", "bmp", "ppm", "webp", "gif", "tif"):
        raw = folder.picture(root / f"x.{suffix}").read_bytes()
        for _ in range(60):
            damaged = bytearray(raw)
            for at in rng.integers(0, min(len(raw), 80), 3):
                damaged[at] = rng.integers(256)
            (root / f"y.{suffix}").write_bytes(damaged)
            try:
                pixels = images.read(root / f"y.{suffix}", grey=False, size=(8, 8))
                assert (pixels.shape, pixels.dtype) == ((8, 8, 3), np.uint8)
            except BadInput as error:
                assert f"y.{suffix} (" in str(error)  # noqa: PT017


# --- what is in a picture


def half_and_half(width, height):
    """A picture that is dark on its left and bright on its right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, width // 2 :] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_cameras_orientation_is_followed(orientation, tmp_path):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    half_and_half(40, 20).save(tmp_path / "a.png", exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.png")))
    assert np.array_equal(images.read(tmp_path / "a.png", grey=False), upright)
    lying = orientation > 4
    assert upright.shape[:2] == ((40, 20) if lying else (20, 40))
    pixels = images.read(tmp_path / "a.png", grey=True, size=(8, 8))[..., 0].astype(int)
    # the edge between dark and bright runs from top to bottom, or from left to right where it lies
    across, down = abs(pixels[:, 0] - pixels[:, -1]).min(), abs(pixels[0] - pixels[-1]).min()
    assert (across, down) == ((0, 255) if lying else (255, 0))


def test_small_pictures_that_lie_on_their_side_are_of_one_size_with_those_that_stand(folder):
    root, exif = folder(), Image.Exif()
    exif[0x0112] = 6
    half_and_half(10, 12).save(root / "train" / "cat" / "phone.jpg", exif=exif)  # 12 x 10 when it is upright
    assert data.load(str(root)).shape == (3, 10, 12)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
def test_what_is_transparent_becomes_white(mode, tmp_path):
    pixels = np.full((6, 6, 4), (10, 200, 30, 255), np.uint8)
    pixels[:3, :, 3] = 0  # whatever colour lies there is not seen
    picture = Image.fromarray(pixels)
    file = tmp_path / ("a.tif" if mode == "PA" else "a.png")
    if mode == "P":
        picture.quantize(8).save(file)
    else:
        picture.convert("RGBA" if mode == "PA" else mode).save(file)
    got = images.read(file, grey=False)
    assert (got[:3] == 255).all()
    assert (got[3:] != 255).all()


@pytest.mark.parametrize(("suffix", "kind"), [("png", "uint16"), ("tif", "uint16"), ("pgm", "int32")])
def test_of_16_bits_the_upper_8_are_taken(suffix, kind, tmp_path):
    values = np.arange(0, 65536, 546)[:120].reshape(10, 12).astype(kind)
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    got = images.read(tmp_path / f"deep.{suffix}", grey=True)
    assert np.array_equal(got[..., 0], values // 256)


def test_32_bits_of_which_nobody_knows_the_range_are_named(tmp_path):
    Image.fromarray(np.arange(100, dtype=np.int32).reshape(10, 10)).save(tmp_path / "deep.tif")
    with pytest.raises(BadInput, match=r"deep\.tif \(more than 16 bits a channel\)"):
        images.read(tmp_path / "deep.tif", grey=True)


def test_colours_of_print_are_those_that_pillow_shows(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=95)
    red = images.read(tmp_path / "red.jpg", grey=False)[0, 0]
    assert red[0] > 200
    assert max(red[1:]) < 60


@pytest.mark.parametrize("size", [(400, 100), (100, 400), (1, 300), (90, 90)])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_the_short_side_is_resized_and_the_middle_cropped(size, suffix, tmp_path):
    width, height = size
    x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    if width == height:
        disc = x**2 + y**2 < 0.5
    else:  # a disc in the middle stays a disc
        short = min(width, height)
        disc = (x * width / short) ** 2 + (y * height / short) ** 2 < 0.5
    Image.fromarray((disc * 255).astype(np.uint8)).save(tmp_path / f"disc.{suffix}")
    got = images.read(tmp_path / f"disc.{suffix}", grey=True, size=(16, 16))[..., 0] / 255
    if min(size) > 1:
        assert got.mean() == pytest.approx(np.pi * 0.5 / 4, abs=0.02)
        assert got.mean(0) == pytest.approx(got.mean(1), abs=0.06)
        assert got.mean(0) == pytest.approx(got.mean(0)[::-1], abs=0.06)


# --- folders as people have them


def test_what_file_managers_leave_behind_is_no_picture_and_no_class(folder, capsys):
    root = folder()
    plain = data.load(str(root)).digest
    for part in ("train", "test"):
        for rest in (".ipynb_checkpoints", "@eaDir", "__MACOSX", ".Trashes"):
            folder.picture(root / part / rest / "0.png")
            folder.picture(root / part / "cat" / rest / "0.png")
        (root / part / ".DS_Store").write_bytes(b"x")
        (root / part / "cat" / "Thumbs.db").write_bytes(b"x")
        (root / part / "cat" / "._0.png").write_bytes(b"x")
    assert data.load(str(root)).digest == plain
    assert "left out" not in capsys.readouterr().out


def test_files_that_are_left_out_are_named(folder, capsys):
    root = folder()
    left_out = {"IMG_0001.HEIX", "film.mpg", "features.h5", "stray.png"}
    for name in left_out:
        (root / "train" / "cat" / name).write_bytes(b"x")
    (root / "train" / "cat" / "stray.png").unlink()
    folder.picture(root / "train" / "stray.png")  # in no class
    data.load(str(root))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "my_images: 30 pictures, 12 x 10 pixels, kept as they are"
    left = "my_images: no pictures, and left out: "
    assert said[1].startswith(left)
    assert {Path(p).name for p in said[1].removeprefix(left).split(", ")} == left_out


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_is_named_and_not_waited_for(folder):
    root = folder()
    os.mkfifo(root / "train" / "cat" / "pipe.png")
    with pytest.raises(BadInput, match=r"1 of 31 pictures cannot be read: .*pipe\.png \(no regular file\)"):
        data.load(str(root))


def test_a_damaged_copy_is_named_with_what_to_do(folder):
    root = folder()
    data.load(str(root))
    (copy,) = (paths.data() / "cache").iterdir()
    os.truncate(copy, 500)
    with pytest.raises(BadInput, match=rf"{copy} is not .*; delete it, it is made from {root} again"):
        data.load(str(root))
    copy.unlink()
    assert len(data.load(str(root)).train) == 21


def test_images_that_do_not_fit_the_memory_are_one_sentence():
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**36, before[1]))  # 64 GiB: overcommitted memory is refused late
    try:
        with pytest.raises(
            BadInput, match=r"mnist5k: out of memory \(.*\); smaller or fewer images need less"
        ):
            data.load("mnist5k", size=4096)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_pictures_in_subfolders_and_behind_links_are_read_once(folder, tmp_path):
    root = folder()
    folder.picture(root / "train" / "cat" / "more" / "deep" / "0.png", seed=5)
    (root / "train" / "cat" / "more" / "round").symlink_to(root / "train" / "cat")
    folder.picture(tmp_path / "elsewhere" / "1.png", seed=6)
    (root / "train" / "dog" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(root / "train" / "dog")
    (tmp_path / "elsewhere" / "all").symlink_to(root)
    assert sum(len(getattr(data.load(str(root)), s)) for s in SPLITS[:3]) == 26


def test_names_of_any_kind_do(folder):
    root = folder(classes=("$5 & <b>", "ü 猫"))
    strange = os.fsencode(root / "train" / "ü 猫") + b"/\xff\xfe.png"  # no text in UTF-8
    os.rename(root / "train" / "ü 猫" / "0.png", strange)
    assert data.load(str(root)).names == ("$5 & <b>", "ü 猫")
    Path(os.fsdecode(strange)).write_bytes(b"")
    with pytest.raises(BadInput, match="1 of 30 pictures cannot be read") as error:
        data.load(str(root))
    str(error.value).encode()


def test_names_of_classes_are_text_whatever_those_of_folders(folder):
    root = folder(classes=(os.fsdecode(b"caf\xe9"), "tea"))
    names = data.load(str(root)).names
    assert names == (r"caf\udce9", "tea")


# --- size


def test_the_size_and_its_reason_are_said_in_one_line(folder, capsys):
    root = folder(size=(100, 80))
    folder.picture(root / "test" / "cat" / "0.png", size=(300, 200))
    shape, note = data.load(str(root)).shape, data.load(str(root)).note
    assert (shape, note) == ((3, 32, 32), "pictures read at 32 x 32 pixels")
    (said,) = capsys.readouterr().out.splitlines()  # read once
    assert said == (
        "my_images: 30 pictures, 100 x 80 to 300 x 200 pixels, short side resized and centre cropped to"
        " 32 x 32, which suits small networks; --size, -p size or load(size=) sets another"
    )
    assert data.load(str(root), size=48).shape == (3, 48, 48)
    assert capsys.readouterr().out.strip().endswith("cropped to 48 x 48, as asked")


@pytest.mark.parametrize("size", [0, -3, 4097, 2.5, "64", True])
def test_a_size_that_is_none_is_refused(size):
    for use in (lambda: data.load("mnist5k", size=size), lambda: tasks.task("smoke", "mnist5k", size=size)):
        with pytest.raises(BadInput, match="it must be a whole number of pixels from 1 to 4096"):
            use()


def test_arrays_and_known_sets_are_resized_in_words(tmp_path):
    d = data.load("mnist5k", size=14)
    assert d.shape == (1, 14, 14)
    assert d.pad == 1
    assert d.note == "images of 28 x 28 pixels resized to 14 x 14"
    whole = data.load("mnist5k")
    assert torch.equal(d.train.y, whole.train.y)
    halved = whole.train.x.view(3500, 14, 2, 14, 2).double().mean((2, 4))
    # a triangle of twice the width, not a box: as sharp, a little smoother
    assert np.corrcoef(halved.flatten(), d.train.x.flatten())[0, 1] > 0.97
    assert data.load("mnist5k", size=28).digest == whole.digest
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (50, 20, 10, 3), dtype=np.uint8)
    arrays = (x[:40], np.arange(40) % 2, x[40:], np.arange(10) % 2)
    np.savez(tmp_path / "a.npz", **dict(zip(ARRAYS, arrays, strict=True)))
    assert data.load(tmp_path / "a.npz", size=10).shape == (3, 10, 10)
    assert np.array_equal(
        data.load(tmp_path / "a.npz", size=10).test.x, x[40:, 5:15]
    )  # cropped, not squashed
    assert next(iter(Batches(d, 4, torch.Generator(), augmentation="crop")))[0].shape == (4, 1, 14, 14)


def test_the_size_is_a_tasks_and_tells_its_results_apart():
    t = tasks.task("smoke", "synthetic", size=12)
    assert t.load().shape == (1, 12, 12)
    assert t.given == ("size",)
    assert t.at(0.5).load().shape == (1, 12, 12)
    from effilib import experiment

    arms = [experiment.Arm(name="baseline", role="baseline")]
    plain = tasks.task("smoke", "synthetic")
    assert experiment.key(t, t.load(), arms) != experiment.key(plain, plain.load(), arms)
    assert data.load("synthetic", size=8).digest == data.load("synthetic").digest


def test_a_relative_folder_needs_no_slash(folder, monkeypatch):
    root = folder()
    monkeypatch.chdir(root.parent)
    assert data.load("my images").digest == data.load(str(root)).digest
    assert tasks.task("smoke", "my images").load().names == ("cat", "dog")
    assert data.identify("my images") == "my images"
    assert data.folder_name("my images") == data.folder_name(str(root))
    assert runner._absolute("dataset", "my images") == str(root)  # notebooks run in folders of their own
    assert [runner._absolute("dataset", name) for name in ("", "cifar10", "a" * 999)] == [
        "",
        "cifar10",
        "a" * 999,
    ]


# --- memory


def peak(call):
    """Bytes by which the process's memory grows at most while something is called."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    result = call()
    return result, _memory("VmHWM") - before


def _memory(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what))


linux = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux tells the peak")


@linux
def test_no_pass_over_large_images_makes_a_copy_in_floats():
    x = np.random.default_rng(0).integers(0, 256, (320, 256, 256, 3), dtype=np.uint8)  # 63 MB
    arrays = [x, np.arange(len(x)) % 2, x[:20], np.arange(20) % 2]
    d, grown = peak(lambda: data._split("large", arrays, ("a", "b"), pad=4))
    assert grown < 1.8 * x.nbytes  # the images in their new order, and blocks; in floats it was 8 of these
    exact = d.train.x[:10_000].double().div_(255)
    assert d.mean == tuple(round(v, 4) for v in exact.mean((0, 1, 2)).tolist())
    assert d.std == tuple(round(v, 4) for v in exact.std((0, 1, 2)).tolist())
    del exact
    _, grown = peak(lambda: d.digest)
    assert grown < 0.5 * x.nbytes
    batches, grown = peak(lambda: Batches(d, 4, torch.Generator()))
    assert grown < 1.8 * x.nbytes
    first = batches.padded[:1].permute(0, 3, 1, 2).float()
    assert torch.equal(
        first, torch.nn.functional.pad(d.train.x[:1].permute(0, 3, 1, 2).float(), [4] * 4, "reflect")
    )


@linux
def test_a_folder_is_read_with_one_picture_in_memory(folder, tmp_path):
    root = folder(train=60, test=2, size=(20, 20))
    size = 512  # 120 pictures of 0.8 MB as pixels
    (cached, _), grown = peak(lambda: images.convert(root, tmp_path / "kept", "pets", size))
    assert cached.stat().st_size > 95e6
    assert grown < 30e6


def test_long_reading_says_how_far_it_has_come(capsys):
    assert list(ticked(range(3), "pictures", every=0)) == [0, 1, 2]
    said = capsys.readouterr().out.splitlines()
    assert [line.split(", ")[0] for line in said] == [f"pictures: {i} of 3" for i in (1, 2, 3)]
    assert "left" in said[0]
    list(ticked(range(3), "pictures"))
    assert not capsys.readouterr().out


# --- anything


KINDS = ("RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "F")
DAMAGE = ("none", "none", "cut", "empty", "bits", "link", "text")
picture = st.tuples(
    st.sampled_from(KINDS), st.integers(1, 80), st.integers(1, 80), st.sampled_from(DAMAGE), st.integers(0, 8)
)
part = st.dictionaries(
    st.sampled_from(["cat", "dog", "$x$ ü", ".hidden", "@eaDir"]), st.lists(picture, max_size=12), max_size=4
)


def draw_(path, what):
    """Write a picture of some mode, size, damage and orientation."""
    kind, width, height, damage, orientation = what
    suffix = {"CMYK": "jpg", "F": "tif"}.get(kind, "png")
    rng, buffer, exif = np.random.default_rng(width), io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    if kind in ("I;16", "F"):
        image = Image.fromarray(rng.integers(0, 60000, (height, width)).astype({"F": "f4"}.get(kind, "u2")))
    else:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(kind)
    image.save(buffer, {"jpg": "JPEG", "tif": "TIFF", "png": "PNG"}[suffix], exif=exif)
    raw = bytearray(buffer.getvalue())
    raw[len(raw) // 2] ^= 0xFF if damage == "bits" else 0
    path = path.with_suffix(f".{suffix}")
    if damage == "link":
        return path.symlink_to("gone.png")
    return path.write_bytes({"cut": raw[: len(raw) // 2], "empty": b"", "text": b"hello"}.get(damage, raw))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.data())
def test_any_folder_is_a_data_set_or_one_sentence(tmp_path_factory, data_):
    root, monkeypatch = tmp_path_factory.mktemp("any"), pytest.MonkeyPatch()
    monkeypatch.setenv("EFFILIB_DATA", str(root / "data"))
    pool = data_.draw(st.lists(picture, min_size=1, max_size=4))
    same = data_.draw(st.booleans())  # mostly folders that are one
    for name in ("train", "test") if same else data_.draw(st.sets(st.sampled_from(["train", "test", "cat"]))):
        classes = {"cat": pool * 12, "dog": pool * 12} if same else data_.draw(part)
        for of_class, pictures in classes.items():
            (root / name / of_class).mkdir(parents=True)
            for i, what in enumerate(pictures):
                draw_(root / name / of_class / str(i), what)
    asked = data_.draw(st.sampled_from([None, None, 1, 16]))
    with monkeypatch.context():
        outcome(root, asked)
    monkeypatch.undo()


def outcome(path, asked):
    """Load a data set: it is one, with right shapes, or the reason is a sentence."""
    try:
        d = data.load(path, size=asked)
    except BadInput as error:
        said = str(error)
        assert "\n" not in said
        assert len(said) > 20
        said.encode()
        return
    channels, height, width = d.shape
    assert channels in (1, 3)
    assert asked is None or (height, width) == (asked, asked)
    for split in (getattr(d, s) for s in SPLITS):
        assert split.x.dtype == torch.uint8
        assert split.x.shape == (len(split), height, width, channels)
        assert 0 <= split.y.min() <= split.y.max() < d.classes == len(d.names)
    assert all(0 <= m <= 1 for m in d.mean)
    assert min(d.std) > 0
    x, _ = next(iter(Batches(d, 2, torch.Generator(), augmentation="crop+flip")))
    assert x.isfinite().all()


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    n=st.integers(0, 40), tests=st.integers(0, 5), side=st.tuples(st.integers(0, 5), st.integers(1, 5)),
    channels=st.sampled_from([(), (1,), (3,), (4,)]), kind=st.sampled_from(["u1", "u1", "u1", "f4", "i8"]),
    labels=st.sampled_from(["u1", "i8", "f4", "U1", "bool"]), classes=st.integers(1, 4),
    missing=st.sampled_from(["", "", "", *ARRAYS]), asked=st.sampled_from([None, 3]),
)  # fmt: skip
def test_any_arrays_are_a_data_set_or_one_sentence(
    tmp_path_factory, n, tests, side, channels, kind, labels, classes, missing, asked
):
    rng, content = np.random.default_rng(n), {}
    for name, count in (("train", n), ("test", tests)):
        content[f"{name}_images"] = rng.integers(0, 256, (count, *side, *channels)).astype(kind)
        content[f"{name}_labels"] = (np.arange(count) % classes).astype(labels)
    content.pop(missing, None)
    path = tmp_path_factory.getbasetemp() / "any.npz"
    np.savez(path, **content)
    outcome(path, asked)


# --- folders that are none


def test_classes_that_differ_between_train_and_test_are_named(folder):
    root = folder()
    (root / "test" / "dog").rename(root / "test" / "wolf")
    with pytest.raises(BadInput, match=r"classes of train and test differ: \['dog', 'wolf'\]"):
        data.load(str(root))


def test_a_class_without_pictures_is_named(folder):
    root = folder()
    (root / "train" / "empty").mkdir()
    with pytest.raises(BadInput, match="empty"):
        data.load(str(root))


def test_a_single_class_is_named(folder):
    root = folder(classes=("cat",))
    with pytest.raises(BadInput, match=f"{root} has the one class cat; at least 2 class folders are needed"):
        data.load(str(root))


@pytest.mark.parametrize(
    "there", [[], ["train"], ["test"], ["train/cat", "test"], ["training/cat", "testing/cat"]]
)
def test_a_folder_of_another_form_is_named_with_what_was_expected(there, tmp_path, monkeypatch):
    monkeypatch.setenv("EFFILIB_DATA", str(tmp_path / "data"))
    root = tmp_path / "pictures"
    root.mkdir()
    for name in there:
        (root / name).mkdir(parents=True)
    with pytest.raises(BadInput, match=str(root)):
        data.load(str(root))


def test_too_few_pictures_are_named(folder):
    with pytest.raises(BadInput, match="10 training images are too few to split"):
        data.load(str(folder(train=5)))


def test_a_data_folder_that_cannot_be_written_is_named(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EFFILIB_DATA", str(tmp_path / "file" / "data"))
    with pytest.raises(BadInput, match=r"cannot write data into .*EFFILIB_DATA names another folder"):
        data.load(str(folder()))
