"""`effilib predict`: what a trained network, `model.pt`, says of new pictures.

They are read as an image folder is, and normalised as the training images were. A picture that cannot be read
is named, and the others go on.
"""

import csv
import io
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn

from effilib import checkpoint, figures, images, paths
from effilib.dataset import normalize
from effilib.errors import BadInput
from effilib.progress import ticked

__all__ = ["contact_sheet", "find", "predict", "run", "table"]

BATCH = 64
SHOWN = 24  # pictures on the contact sheet, from the first to the last
Row = tuple[Path, np.ndarray, list[tuple[str, float]]]  # file, pixels, the likeliest classes


def run(*, model: str, pictures: Sequence[str], network: str = "", out: str = "") -> int:
    """Write `predictions.csv` and `predictions.png` of pictures, and return the exit code.

    0: all were read, 1: some could not be. model: the file that `effilib train` wrote. pictures: files, and
    folders with all below them. network: the import path of a user's own. out: a folder (default: the
    model's). Raises `BadInput`.

    >>> pixels = load("synthetic")
    >>> checkpoint.save_model("net.pt", build("convnet", 4, pixels.shape), "convnet", pixels)
    >>> images.Image.new("L", (20, 30)).save("new.png")
    >>> run(model="net.pt", pictures=["new.png"], out="told")
    1 picture: 1 ...
    told: predictions.csv, predictions.png
    0
    """
    net, known = checkpoint.load_model(model, network or None), checkpoint.load_images(model)
    files, bad = find(pictures), []
    folder = paths.make(out or Path(model).absolute().parent)
    step, rows, shown, counts = max(1, -(-len(files) // SHOWN)), [], [], Counter()
    for row in predict(net, known, ticked(files, "pictures"), bad):
        if len(rows) % step == 0:
            shown.append(row)
        rows.append((row[0], row[2]))  # without its pixels: there may be many
        counts[row[2][0][0]] += 1
    if bad:
        print(f"effilib: {len(bad)} of {len(files)} cannot be read: {images.listed(bad)}", file=sys.stderr)
    if not rows:
        raise BadInput("there is no picture that could be read")
    paths.write(folder / "predictions.csv", table(rows))
    with warnings.catch_warnings(action="ignore"):  # of characters that the font lacks: drawn as boxes
        paths.write(folder / "predictions.png", figures.png(contact_sheet(shown)))
    told = ", ".join(f"{n} {name}" for name, n in counts.most_common())
    print(f"{len(rows)} picture{'s' * (len(rows) > 1)}: {images.listed([told])}")
    print(f"{images.listed([str(folder)])}: predictions.csv, predictions.png")
    return int(bool(bad))


def find(pictures: Sequence[str]) -> list[Path]:
    """Return the picture files that are meant, each once: files as they are, all below folders.

    >>> find(["nowhere"])
    Traceback (most recent call last):
    effilib.errors.BadInput: nowhere: there is no such picture or folder
    """
    found = []
    for path in (Path(p).expanduser() for p in pictures):
        if not (path.exists() or path.is_symlink()):
            raise BadInput(f"{path}: there is no such picture or folder")
        inside = images.find(path)[0] if path.is_dir() else [path]
        if not inside:
            raise BadInput(f"{path}: there are no pictures in this folder")
        found += inside
    return list(dict.fromkeys(found))


@torch.no_grad()
def predict(model: nn.Module, known: dict, files: Iterable[Path], bad: list[str]) -> Iterator[Row]:
    """Yield each picture, its pixels, and its classes with probabilities.

    known: as `checkpoint.load_images` returns it. bad: gets what cannot be read.

    >>> pixels = load("synthetic")
    >>> checkpoint.save_model("net.pt", build("convnet", 4, pixels.shape), "convnet", pixels)
    >>> images.Image.new("L", (20, 30)).save("new.png")
    >>> net, known = checkpoint.load_model("net.pt"), checkpoint.load_images("net.pt")
    >>> [(file, pixels, classes)] = predict(net, known, [Path("new.png")], [])
    >>> pixels.shape, len(classes), round(sum(p for _, p in classes), 4)
    ((8, 8, 1), 4, 1.0)
    """
    channels, height, width = known["shape"]
    if channels not in (1, 3):
        raise BadInput(f"the network takes {channels} channels: pictures have 1 or 3")
    model.eval()
    dtype = next(p.dtype for p in model.parameters())

    def readable():
        for file in files:
            try:
                yield file, images.read(file, grey=channels == 1, size=(width, height))
            except BadInput as error:
                bad.append(str(error))

    pictures = readable()
    while part := list(islice(pictures, BATCH)):
        x = normalize(torch.from_numpy(np.stack([p for _, p in part])), known["mean"], known["std"], dtype)
        likely = model(x.contiguous()).softmax(1).sort(descending=True)  # every network takes contiguous
        for (file, pixels), p, order in zip(
            part, likely.values.tolist(), likely.indices.tolist(), strict=True
        ):
            yield file, pixels, [(known["names"][c], q) for c, q in zip(order, p, strict=True)]


def table(rows: Sequence[tuple[Path, list[tuple[str, float]]]]) -> bytes:
    """Return rows as CSV: file, class and probability, and the second of both.

    >>> table([(Path("a.png"), [("cat", 0.75), ("dog", 0.25)])]).decode().splitlines()
    ['file,class,probability,second class,second probability', 'a.png,cat,0.7500,dog,0.2500']
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "class", "probability", "second class", "second probability"])
    for file, classes in rows:
        writer.writerow([file, *(v for name, p in classes[:2] for v in (name, f"{p:.4f}"))])
    return text.getvalue().encode(errors="surrogateescape")  # a file's name may be no text


def contact_sheet(rows: Sequence[Row]) -> figures.Figure:
    """Draw pictures as the network sees them, classes beneath.

    >>> pixels = np.zeros((8, 8, 1), np.uint8)
    >>> sheet = contact_sheet([(Path("a.png"), pixels, [("cat", 0.75), ("dog", 0.25)])])
    >>> sheet.axes[0].get_title(loc="center")
    'cat\\n75 %'
    """
    columns = min(6, len(rows))
    lines = -(-len(rows) // columns)
    figure, axes = figures.new(
        columns, lines, width=1.25 * max(columns, 3), height=1.7 * lines, squeeze=False
    )
    for ax in figure.axes:
        ax.axis("off")
    for ax, (_, pixels, ((name, p), *_)) in zip(axes.flat, rows, strict=False):
        ax.imshow(pixels if pixels.shape[-1] == 3 else pixels[..., 0], cmap="gray", vmin=0, vmax=255)
        short = name if len(name) <= 12 else f"{name[:11]}\N{HORIZONTAL ELLIPSIS}"
        ax.set_title(figures.literal(f"{short}\n{100 * p:.0f} %"), loc="center", fontsize=9)
    return figure
