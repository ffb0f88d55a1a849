"""Recipe files: what is trained and how, in TOML, for `effilib train --recipe FILE`.

    [task]
    preset = "quick"
    dataset = "mnist5k"
    network = "resnet"
    [recipe]
    epochs = 3.0
    lr = 0.2
    [[method]]
    name = "data_pruning"
    ratio = 0.5

Keys are the fields of `Task`, of `Recipe` and of the method. What is left out is the preset's, or the
method's own; written are all, so that a recipe outlives a change of defaults.
"""

import dataclasses
import json
import math
import tomllib
from collections.abc import Sequence
from pathlib import Path

from effilib import data, paths, tasks
from effilib.errors import BadInput, choose
from effilib.hooks import Method
from effilib.recipe import Recipe
from effilib.tasks import Task
from effilib.workbook.train_command import make, method, methods, name_of

__all__ = ["read", "text", "write"]

OF_TASK = ("preset", "dataset", "network", "variant", "widths", "images", "size", "validation", "whole")
ALL = "all"  # images, where TOML has no word for None
PARTS = ("task", "recipe", "method")


def text(task: Task, methods: Sequence[Method], comment: str = "") -> str:
    """Return a recipe as TOML; comment: lines that go before it.

    >>> from effilib.methods.data_pruning import DataPruning
    >>> print(text(tasks.task("quick", "mnist5k"), [DataPruning()], "mine"))
    # mine
    <BLANKLINE>
    [task]
    preset = "quick"
    dataset = "mnist5k"
    ...
    [[method]]
    name = "data_pruning"
    ratio = 0.5
    full = 0.125
    <BLANKLINE>
    """
    place = data.own(task.dataset)
    own = {name: getattr(task, name) for name in OF_TASK} | {"network": _placed(task.network)}
    own |= {"dataset": str(place.resolve() if place else task.dataset)}
    own |= {name: ALL for name in ("images", "validation") if own[name] is None}
    parts = [f"# {line}".rstrip() for line in comment.splitlines()] + [""] * bool(comment)
    parts += ["[task]", *_lines(own), "", "[recipe]", *_lines(_fields(task.recipe))]
    for m in methods:
        parts += ["", "[[method]]", *_lines({"name": name_of(m)} | _fields(m))]
    return "\n".join(parts) + "\n"


def write(file: Path | str, task: Task, methods: Sequence[Method], comment: str = "") -> Path:
    """Write a recipe file; returns its path.

    >>> read(write("mine.toml", tasks.task("quick", "mnist5k", lr=0.3), []))[0].recipe.lr
    0.3
    """
    return paths.write(Path(file), text(task, methods, comment))


def read(file: Path | str, device: str = "auto") -> tuple[Task, tuple[Method, ...]]:
    """Return the task and the methods of a recipe file.

    Raises `BadInput`, which names the key and the choices.

    >>> _ = Path("wrong.toml").write_text("[recipe]\\nlearning_rate = 0.1\\n")
    >>> read("wrong.toml")
    Traceback (most recent call last):
    effilib.errors.BadInput: wrong.toml: unknown setting of [recipe] 'learning_rate': choose one of ...
    """
    try:
        found = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"cannot read the recipe {file}: {error.strerror}") from error
    except ValueError as error:  # no TOML, or no UTF-8
        raise BadInput(f"{file} is no TOML file: {error}") from error
    try:
        return _read(found, device)
    except BadInput as error:
        raise BadInput(f"{file}: {error}") from error


def _read(found, device):
    for part, value in found.items():
        choose("part of a recipe", part, PARTS)
        if not isinstance(value, list if part == "method" else dict):
            raise BadInput(f"{part} is no {'list of tables, [[method]]' if part == 'method' else 'table'}")
    own, recipe = found.get("task", {}), found.get("recipe", {})
    for key in own:
        choose("setting of [task]", key, OF_TASK)
    names = ("preset", "dataset", "network", "variant")
    for key in names:
        if not isinstance(own.get(key, ""), str):
            raise BadInput(f"{key} of [task] is {own[key]!r}, it must be a word")
    task = tasks.task(**{k: own[k] for k in names if k in own}, device=device)
    if not isinstance(widths := own.get("widths", {}), dict):
        raise BadInput(
            f"widths of [task] is {widths!r}, it must be a table such as {{widths = [16, 32, 64]}}"
        )
    every = {k: None for k in ("images", "validation") if own.get(k) == ALL}
    rest = {k: v for k, v in own.items() if k not in (*names, "widths", *every)}
    task = make(Task, "[task]", _words(rest), task)
    task = task.but(**every, **({"widths": _tuples(widths)} if "widths" in own else {}))
    task = dataclasses.replace(task, recipe=make(Recipe, "[recipe]", _words(recipe), task.recipe))
    chosen = []
    for m in found.get("method", []):
        if not isinstance(m, dict) or not isinstance(m.get("name"), str):
            raise BadInput(f"a [[method]] needs its name: choose one of {', '.join(methods())}")
        chosen.append(method(m["name"], *_words({k: v for k, v in m.items() if k != "name"})))
    return task, tuple(chosen)


def _placed(name):
    """A network of a user's file by the file's whole path, so that a recipe can be run from anywhere."""
    file, colon, function = name.rpartition(":")
    return f"{Path(file).expanduser().resolve()}:{function}" if colon and file.endswith(".py") else name


def _fields(instance):
    """Settings of a dataclass by name."""
    return {f.name: getattr(instance, f.name) for f in dataclasses.fields(instance) if f.init}


def _lines(settings):
    """TOML lines; what is None has no line, for TOML has none."""
    return [f"{k} = {_value(k, v)}" for k, v in settings.items() if v is not None]


def _value(name, v):
    if dataclasses.is_dataclass(v):
        v = {k: w for k, w in _fields(v).items() if w is not None}
    if isinstance(v, bool):
        return str(v).lower()
    if isinstance(v, int | float):
        return repr(v)
    if isinstance(v, str):
        return json.dumps(v, ensure_ascii=False)
    if isinstance(v, list | tuple):
        return f"[{', '.join(_value(name, w) for w in v)}]"
    if isinstance(v, dict):
        return f"{{{', '.join(f'{json.dumps(k)} = {_value(name, w)}' for k, w in v.items())}}}"
    raise BadInput(f"a recipe file cannot hold {name}, a {type(v).__name__}")


def _words(settings, before=""):
    """Settings as the command line has them: "name=value", "name.inner=value"."""
    found = []
    for k, v in settings.items():
        if isinstance(v, dict):
            found += _words(v, f"{before}{k}.")
        else:
            infinite = isinstance(v, float) and not math.isfinite(v)
            found.append(f"{before}{k}={v if isinstance(v, str) else repr(str(v)) if infinite else repr(v)}")
    return found


def _tuples(v):
    """Lists of a table as tuples, as `Task` has them."""
    if isinstance(v, dict):
        return {k: _tuples(w) for k, w in v.items()}
    return tuple(map(_tuples, v)) if isinstance(v, list) else v
