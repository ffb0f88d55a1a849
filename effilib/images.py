"""Pictures of every kind that Pillow reads, as uint8 arrays of one size.

An image folder is read in two passes, one picture at a time: the headers, for a size and whether all are
grey, then the pixels, straight into the file that is kept. All that cannot be read is named at once.
"""

import contextlib
import hashlib
import math
import warnings
import zipfile
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError

from effilib import paths
from effilib.errors import BadInput
from effilib.progress import ticked

__all__ = ["convert", "find", "listed", "read", "resize"]

SIDE = 32  # pixels of pictures that are not small and alike: what the networks here are made for
RECOGNISED = ("BUFR", "GRIB", "HDF5", "MPEG")  # by Pillow, which cannot decode them
SMALL = 64  # the largest side of pictures that keep their size
GREY = ("1", "L", "LA", "I", "I;16", "I;16L", "I;16B", "I;16N")
# What file managers and cameras' cards leave behind; and all names that begin with a dot.
RESTS = {
    "@eadir", "#recycle", "#snapshot", "$recycle.bin", "__macosx", "desktop.ini", "ehthumbs.db", "icon\r",
    "lost+found", "system volume information", "thumbs.db",
}  # fmt: skip


def find(folder: Path, above: tuple[Path, ...] = ()) -> tuple[list[Path], list[Path]]:
    """Return the pictures below a folder, in order, and the other files.

    What file managers leave behind is neither. Links are followed, but not to where we come from: above.

    >>> Path("mine").mkdir()
    >>> Image.new("L", (8, 8)).save("mine/a.png")
    >>> _ = Path("mine/notes.txt").write_text("hello"), Path("mine/._a.png").write_bytes(b"")
    >>> find(Path("mine"))
    ([PosixPath('mine/a.png')], [PosixPath('mine/notes.txt')])
    """
    pictures, others = [], []
    above = (*above, folder.resolve())
    for entry in _visible(folder):
        if not entry.is_dir():
            (pictures if _suffix(entry) else others).append(entry)
        elif not any(place.is_relative_to(entry.resolve()) for place in above):
            inside = find(entry, above)
            pictures += inside[0]
            others += inside[1]
    return pictures, others


def _visible(folder):
    """The entries of a folder in order, without what file managers leave behind."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise BadInput(f"cannot read the folder {folder}: {error.strerror}") from error
    return [e for e in entries if not e.name.startswith(".") and e.name.lower() not in RESTS]


def _suffix(file):
    """Whether a file's name is that of a picture that Pillow reads."""
    kind = Image.registered_extensions().get(file.suffix.lower())
    return kind in Image.OPEN and kind not in RECOGNISED


def read(file: Path, *, grey: bool, size: tuple[int, int] | None = None) -> np.ndarray:
    """Return a picture as uint8 of (H, W, 1 or 3).

    size: (W, H); the short side is resized and the rest cropped, centred. A camera's orientation is followed,
    what is transparent becomes white, of 16 bits the upper 8 are taken. Raises `BadInput`, "file (why)".

    >>> Image.new("RGBA", (20, 10), (255, 0, 0, 0)).save("clear.png")
    >>> pixels = read(Path("clear.png"), grey=False, size=(8, 8))
    >>> pixels.shape, int(pixels.min())
    ((8, 8, 3), 255)
    """
    with _opened(file) as image:
        kind = image.format
        if size:  # JPEG can be decoded at a half, a quarter or an eighth: time and memory
            image.draft(None, (2 * max(size), 2 * max(size)))
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            image = _eight_bits(image, kind)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return _fit(image.convert("L" if grey else "RGB"), size)


@contextlib.contextmanager
def _opened(file):
    """An open picture. Whatever goes wrong with it is `BadInput`: Pillow raises and warns of many kinds."""
    with warnings.catch_warnings(action="ignore"):
        try:
            if file.exists() and not file.is_file():  # a pipe would be waited for
                raise BadInput("no regular file")
            with Image.open(file) as image:
                yield image
        except Exception as error:
            raise BadInput(f"{file} ({_why(error)})") from error


def _why(error):
    """Why a picture cannot be read, in words."""
    if isinstance(error, BadInput):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        return "no picture that Pillow reads"
    if isinstance(error, FileNotFoundError):
        return "a broken link"
    if isinstance(error, MemoryError):
        return "too many pixels for the memory"
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels"
    return getattr(error, "strerror", None) or " ".join(["cannot be decoded:", *str(error).split()])[:100]


def _eight_bits(image, kind):
    """The upper 8 of 16 bits. Of 32 nobody knows the range."""
    values = np.asarray(image)
    at_most_16 = image.mode[:4] == "I;16" or (image.mode == "I" and kind in ("PNG", "PPM"))
    if not at_most_16:
        raise BadInput("more than 16 bits a channel")
    return Image.fromarray((values >> 8).astype(np.uint8))


def _fit(image, size):
    """(H, W, C) pixels at size: (W, H)."""
    if size and image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def resize(x: np.ndarray, size: int) -> np.ndarray:
    """Return images (N, H, W, C) resized and cropped as `read` does.

    >>> resize(np.zeros((2, 8, 6, 1), np.uint8), 4).shape
    (2, 4, 4, 1)
    """
    new = np.empty((len(x), size, size, x.shape[-1]), np.uint8)
    for i, pixels in enumerate(x):
        new[i] = _fit(Image.fromarray(pixels[..., 0] if x.shape[-1] == 1 else pixels), (size, size))
    return new


def listed(bad: list[str], most: int = 200) -> str:
    """Return a list in words, or its beginning and its length.

    >>> listed(["a.png (damaged)", "b.png (no picture)"]), listed(["a"] * 300, most=2)
    ('a.png (damaged), b.png (no picture)', 'a, a and 298 more')
    """
    words = ", ".join(bad[:most]) + (f" and {len(bad) - most} more" if len(bad) > most else "")
    return words.encode(errors="backslashreplace").decode()  # a file's name may be no text


def convert(root: Path, cache: Path, title: str, size: int | None = None) -> tuple[Path, tuple[str, ...]]:
    """Return the cached `.npz` of an image folder, and its classes.

    It is made in `cache` unless it is there. root: holds `train/<class>/` and `test/<class>/`. title: begins
    the file's name and what is said. size: side of the images in pixels; by default small pictures of one
    size keep it, others get 32. Raises `BadInput` that names all pictures that cannot be read.

    >>> for place in ("train/cat", "train/dog", "test/cat", "test/dog"):
    ...     Path("pets", place).mkdir(parents=True)
    ...     Image.new("L", (80, 90)).save(f"pets/{place}/1.png")
    >>> convert(Path("pets"), Path("kept"), "pets")
    pets: 4 pictures, 80 x 90 pixels, short side resized and centre cropped to 32 x 32, which ...
    (PosixPath('kept/pets-....npz'), ('cat', 'dog'))
    """
    names, parts, others = _survey(root)
    files = [file for samples in parts.values() for file, _ in samples]
    stats = [(str(f.relative_to(root)), *_stat(f)) for f in files]
    code = Path(__file__).read_text(encoding="utf-8")
    key = hashlib.sha256(
        repr([str(root.resolve()), stats, size, PIL.__version__, code]).encode()
    ).hexdigest()[:16]
    cached = cache / f"{title}-{key}.npz"
    if not cached.exists():
        bad = {}
        sizes, grey = _glance(files, title, bad)
        target = _target(sizes, size)
        print(f"{title}: {len(files)} pictures, {_say_sizes(sizes, target, size)}", flush=True)
        if others:
            print(f"{title}: no pictures, and left out: {listed([str(f) for f in others], 5)}", flush=True)
        paths.make(cached.parent, "data")
        with paths.writing(cached) as file:  # another process may do the same
            _write(file, parts, target, grey, title, bad)
            if bad:
                raise BadInput(
                    f"{root}: {len(bad)} of {len(files)} pictures cannot be read:"
                    f" {listed(list(bad.values()))}; mend or delete them"
                )
    return cached, names


def _stat(file):
    """Size and time of a file; of a broken link none."""
    try:
        found = file.stat()
    except OSError:
        return ()
    return found.st_size, found.st_mtime_ns


def _survey(root):
    """(names of the classes, part -> [(picture, label)], other files)."""
    parts = {name: root / name for name in ("train", "test")}
    if not all(part.is_dir() for part in parts.values()):
        raise BadInput(
            f"{root} is not an image folder: expected {root}/train/<class>/*.png and"
            f" {root}/test/<class>/*.png"
        )
    inside = {name: _visible(part) for name, part in parts.items()}
    names, tested = ([e.name for e in entries if e.is_dir()] for entries in inside.values())
    if names != tested:
        raise BadInput(f"{root}: classes of train and test differ: {sorted({*names} ^ {*tested})}")
    if len(names) < 2:
        one = f"the one class {names[0]}" if names else "no class folders"
        raise BadInput(f"{root} has {one}; at least 2 class folders are needed")
    found, empty = {}, []
    others = [e for entries in inside.values() for e in entries if not e.is_dir()]
    for name, part in parts.items():
        found[name] = []
        for label, of_class in enumerate(names):
            pictures, more = find(part / of_class)
            if not pictures:
                empty.append(
                    f"{name}/{of_class}" + (f" (but {listed([f.name for f in more], 2)})" if more else "")
                )
            found[name] += [(file, label) for file in pictures]
            others += more
    if empty:
        raise BadInput(f"{root}: there are no pictures in {listed(empty)}")
    return tuple(listed([name]) for name in names), found, others  # as text, whatever a folder's name is


def _glance(files, title, bad):
    """(sizes, whether all are grey), by the headers; `bad` gets what has none."""
    sizes, grey = set(), True
    for file in ticked(files, f"{title}: headers of pictures"):
        try:
            with _opened(file) as image:
                if max(image.size) <= SMALL:  # it may keep its size: which way up?
                    image = ImageOps.exif_transpose(image)
                sizes.add(image.size)
                grey &= image.mode in GREY
        except BadInput as error:
            bad[file] = str(error)
    return sizes, grey


def _target(sizes, size):
    """(W, H) of the images."""
    if size:
        return size, size
    common = next(iter(sizes), (SIDE, SIDE))
    return common if len(sizes) == 1 and max(common) <= SMALL else (SIDE, SIDE)


def _say_sizes(sizes, target, asked):
    """What is done about the sizes, and why."""
    small, *_, large = sorted(sizes or {target}, key=math.prod) * 2
    said = (
        f"{small[0]} x {small[1]} pixels"
        if small == large
        else f"{small[0]} x {small[1]} to {large[0]} x {large[1]} pixels"
    )
    if sizes <= {target}:
        return f"{said}, kept as they are"
    why = "as asked" if asked else "which suits small networks; --size, -p size or load(size=) sets another"
    return f"{said}, short side resized and centre cropped to {target[0]} x {target[1]}, {why}"


def _write(file, parts, size, grey, title, bad):
    """Write arrays as NumPy's `savez` does, a picture at a time; `bad` gets what cannot be decoded."""
    form = np.lib.format
    pictures = ticked([f for samples in parts.values() for f, _ in samples], f"{title}: pictures")
    with zipfile.ZipFile(file, "w") as archive:
        for part, samples in parts.items():
            shape = (len(samples), *size[::-1], 1 if grey else 3)
            with archive.open(f"{part}_images.npy", "w", force_zip64=True) as array:
                form.write_array_header_1_0(array, dict(descr="|u1", fortran_order=False, shape=shape))
                for _ in samples:
                    picture = next(pictures)
                    if picture not in bad:
                        try:
                            array.write(np.ascontiguousarray(read(picture, grey=grey, size=size)).data)
                        except BadInput as error:
                            bad[picture] = str(error)
            with archive.open(f"{part}_labels.npy", "w") as array:
                form.write_array(array, np.array([label for _, label in samples]))
