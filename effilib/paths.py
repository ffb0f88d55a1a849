"""Where data and results lie. Never relative to the current folder: kernels start in folders of their own."""

import json
import os
import tempfile
from pathlib import Path

from effilib.errors import BadInput


def root():
    """The checkout that holds `notebooks/`; for an installed package, `~/effilib`.

    >>> (root() / "notebooks").is_dir()
    True
    """
    checkout = Path(__file__).resolve().parents[1]
    return checkout if (checkout / "notebooks").is_dir() else Path.home() / "effilib"


def data():
    """Folder of the data sets: `EFFILIB_DATA`, else `data/` of the checkout.

    >>> data().is_absolute()
    True
    """
    return Path(os.environ.get("EFFILIB_DATA") or root() / "data").expanduser().absolute()


def results():
    """Folder of the results: `EFFILIB_RESULTS`, else `results/` of the checkout.

    >>> results().is_absolute()
    True
    """
    return Path(os.environ.get("EFFILIB_RESULTS") or root() / "results").expanduser().absolute()


def recorded():
    """The committed study runs that chapter 2, chapter 10 and the README read; on another machine a copy,
    `EFFILIB_RECORDED`.

    >>> any(recorded().glob("*/*/record.json"))
    True
    """
    return Path(os.environ.get("EFFILIB_RECORDED") or root() / "results" / "recorded")


def notebooks():
    """Folder of the notebooks of the series.

    >>> (notebooks() / "02_overview.ipynb").exists()
    True
    """
    return root() / "notebooks"


def cache():
    """Folder of finished seeds' measurements; safe to delete, costs a re-run.

    >>> cache().parent == results()
    True
    """
    return results() / "cache"


def make(folder, what="results"):
    """Create `folder` and prove that a file can be written there, or raise `BadInput` naming it. what:
    "results" or "data".

    >>> make("mine/results").is_dir()
    True
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadInput(
            f"cannot write {what} into {folder}: {error.strerror} (EFFILIB_{what.upper()} names another folder)"
        ) from error
    return folder


def write(path, content):
    """Write text, bytes or (as JSON) anything else to `path`, atomically: a reader sees all of it or none.

    >>> write("mine.txt", "text").read_text()
    'text'
    """
    path = Path(path)
    if not isinstance(content, str | bytes):
        content = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def read_json(path):
    """The content of a JSON file, or None where there is none or it is not whole.

    >>> read_json(write("mine.json", {"seconds": 1.5})), read_json("missing.json")
    ({'seconds': 1.5}, None)
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
