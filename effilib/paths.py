"""Where data and results lie. Never relative to the current folder: kernels start in folders of their own."""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from effilib.errors import BadInput, CannotWrite

__all__ = [
    "cache", "data", "finite", "kernels", "make", "notebooks", "read_json", "recorded", "results", "root",
    "write", "writing",
]  # fmt: skip


def root() -> Path:
    """Return the checkout that holds `notebooks/`; for an installed package, `~/effilib`.

    >>> (root() / "notebooks").is_dir()
    True
    """
    checkout = Path(__file__).resolve().parents[1]
    return checkout if (checkout / "notebooks").is_dir() else Path.home() / "effilib"


def data() -> Path:
    """Return the folder of the data sets: `EFFILIB_DATA`, else `data/` of the checkout.

    >>> data().is_absolute()
    True
    """
    return Path(os.environ.get("EFFILIB_DATA") or root() / "data").expanduser().absolute()


def results() -> Path:
    """Return the folder of the results: `EFFILIB_RESULTS`, else `results/` of the checkout.

    >>> results().is_absolute()
    True
    """
    return Path(os.environ.get("EFFILIB_RESULTS") or root() / "results").expanduser().absolute()


def recorded() -> Path:
    """Return the folder of the committed study runs.

    Chapters 2 and 10 and the README read them. `EFFILIB_RECORDED` names a copy on another machine. An
    installed package brings its own.

    >>> any(recorded().glob("*/*/record.json"))
    True
    """
    return Path(os.environ.get("EFFILIB_RECORDED") or _ours("results/recorded"))


def notebooks() -> Path:
    """Return the folder of the notebooks of the series; an installed package brings its own.

    >>> (notebooks() / "02_overview.ipynb").exists()
    True
    """
    return _ours("notebooks")


def _ours(place):
    """A folder of the checkout, or its copy in an installed package."""
    packed = Path(__file__).with_name(Path(place).name)
    return packed if packed.is_dir() else root() / place


def cache() -> Path:
    """Return the folder of finished cells' measurements; safe to delete, costs a re-run.

    >>> cache().parent == results()
    True
    """
    return results() / "cache"


def kernels() -> Path:
    """Return the user's folder of compiled kernels; safe to delete, costs seconds.

    `XDG_CACHE_HOME/effilib`, else `~/.cache/effilib`.

    >>> kernels().name
    'effilib'
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "effilib"


def make(folder: Path | str, what: str = "results") -> Path:
    """Create a folder, or raise `BadInput` where nothing can be written.

    what: "results" or "data".

    >>> make("mine/results").is_dir()
    True
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        ours = folder.absolute().is_relative_to({"results": results, "data": data}[what]())
        hint = f" (EFFILIB_{what.upper()} names another folder)" if ours else ""
        raise BadInput(f"cannot write {what} into {folder}: {error.strerror}{hint}") from error
    return folder


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[IO[bytes]]:
    """Yield a file that becomes `path` at the end: a reader sees all of it or none.

    It has a name of its own, so that several processes may write the same at once; the last one stays.
    Raises `CannotWrite`.

    >>> with writing("mine.bin") as file:
    ...     _ = file.write(b"all of it")
    >>> Path("mine.bin").read_bytes()
    b'all of it'
    """
    path, temporary = Path(path), None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            yield file
        with contextlib.suppress(OSError):  # some file systems know no modes
            os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary:
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise CannotWrite(error.errno, error.strerror or str(error), str(path)) from error
        raise


def write(path: Path | str, content: object) -> Path:
    """Write text, bytes or (as JSON) anything else to `path`, atomically. Returns the path.

    JSON knows neither NaN nor infinity: they become null. A file's name that is no text keeps its escapes.

    >>> write("mine.txt", "text").read_text()
    'text'
    >>> read_json(write("mine.json", {"ratio": float("nan")}))
    {'ratio': None}
    """
    if not isinstance(content, str | bytes):
        content = json.dumps(finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    with writing(path) as file:
        file.write(data)
    return Path(path)


def finite(content: Any) -> Any:
    """Return values as JSON knows them: lists, and None for NaN and infinity.

    >>> finite({"range": (80.0, float("nan")), "kept": torch.ones(2)})
    {'range': [80.0, None], 'kept': [1.0, 1.0]}
    """
    if isinstance(content, dict):
        return {str(k): finite(v) for k, v in content.items()}
    if hasattr(content, "tolist"):  # of numpy and torch
        return finite(content.tolist())
    if isinstance(content, list | tuple):
        return [finite(v) for v in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def read_json(path: Path | str) -> object:
    """Return a JSON file's content, None where it is not whole.

    >>> read_json(write("mine.json", {"seconds": 1.5})), read_json("missing.json")
    ({'seconds': 1.5}, None)
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
