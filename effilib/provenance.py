"""What a cached result depends on: settings and source, as a digest.

Source counts without comments and docstrings, and only that of the modules which an arm really imports:
effilib's and a user's own, not installed packages. Editing a report never throws measurements away, editing
the training loop always does.
"""

import ast
import dataclasses
import dis
import functools
import hashlib
import importlib.util
import inspect
import json
import re
import subprocess
import sys
import textwrap
import types
import warnings
from collections.abc import Iterable
from importlib.machinery import PathFinder
from pathlib import Path

import effilib
from effilib import paths, user_files
from effilib.errors import BadInput

__all__ = ["commit", "digest", "imports", "named_source", "normalized", "settings", "source"]

NEVER = (
    "effilib.workbook",
    "effilib.results",
    "effilib.timing",
    "effilib.figures",
    "effilib.notebook",
    "effilib.progress",
    "effilib.__main__",
)
KERNELS = Path(__file__).with_name("kernels")  # sources in C++
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def digest(*parts) -> str:
    """Return a short sha256 of JSON-able parts.

    >>> digest("a", 1) == digest("a", 1), digest("a", 1) == digest("a", 2)
    (True, False)
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


# Settings


def settings(value: object) -> object:
    """Return `value` as JSON-able data that says all that matters.

    Dataclasses and other objects by their class and what they hold, functions by their name and what they
    enclose, tensors by a digest. Fields of a dataclass that are not compared do not count. Raises `BadInput`
    for what has no name that another process would give it too.

    >>> settings(Recipe(lr=0.5))["lr"]
    0.5
    """
    return _settings(value, "", ())


def _settings(value, where, above):
    """`settings` of what is called `where`; above: the objects around it."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if any(value is a for a in above):
        return "itself"

    def inside(part, name=""):
        return _settings(part, where + name, (*above, value))

    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        where = where or type(value).__name__
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.compare}
        return {"class": _name(type(value)), **{k: inside(v, f".{k}") for k, v in fields.items()}}
    if isinstance(value, functools.partial):
        return {"partial": inside(value.func), "args": inside(value.args), "keywords": inside(value.keywords)}
    if inspect.isfunction(value):
        own = {"code": digest(_code(value.__code__))} if value.__name__ == "<lambda>" else {}
        defaults = [value.__defaults__, value.__kwdefaults__]
        enclosed = [inside(v) for v in _enclosed(value)]
        return {"function": _name(value), "closure": enclosed, "defaults": inside(defaults), **own}
    if inspect.ismethod(value):
        return {"method": _name(value.__func__), "of": inside(value.__self__)}
    if inspect.isbuiltin(value):
        bound = value.__self__ if not isinstance(value.__self__, types.ModuleType | type) else None
        return {"function": _name(value), "of": inside(bound)}
    if isinstance(value, type):
        return _name(value)
    if isinstance(value, types.ModuleType):
        return {"module": value.__name__}
    if isinstance(value, dict):
        return {str(k): inside(v, f"[{k!r}]") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [inside(v, f"[{i}]") for i, v in enumerate(value)]
    if isinstance(value, set | frozenset):
        return {"set": sorted((inside(v) for v in value), key=json.dumps)}
    if hasattr(value, "dtype") and hasattr(value, "tolist"):
        return {"array": str(value.dtype), "shape": list(value.shape), "digest": digest(value.tolist())}
    where = where or type(value).__name__
    slots = [n for c in type(value).__mro__ for n in getattr(c, "__slots__", ()) if hasattr(value, n)]
    held = {**{n: getattr(value, n) for n in slots}, **getattr(value, "__dict__", {})}
    plain = hasattr(value, "__dict__") and type(value).__repr__ is object.__repr__
    if plain or getattr(value, "__dict__", None) or (held and ADDRESS.search(repr(value))):
        return {"class": _name(type(value)), **{k: inside(v, f".{k}") for k, v in held.items()}}
    if ADDRESS.search(repr(value)):
        raise BadInput(
            f"{where} is {ADDRESS.sub('', repr(value))}, which has no name that stays the same, so that"
            " results could not be told apart: give plain values, functions, classes or dataclasses as"
            " settings, and keep a method's state in run.state"
        )
    return repr(value)


def _name(thing):
    return f"{user_files.plain_name(str(thing.__module__))}.{thing.__qualname__}"


# Source


def source(*things, always: tuple[str, ...] = ("effilib.training", "effilib.experiment")) -> str:
    """Return a digest of the source behind objects, classes, functions and modules.

    With them counts what their modules import, of effilib and of the user's own files. Of what was defined in
    a notebook counts what it uses there: functions, base classes and constants.

    >>> source(Recipe) == source(Recipe), len(source(Recipe))
    (True, 24)
    """
    modules, texts, seen = set(always), [], {}

    def visit(thing):
        if id(thing) in seen or thing is None or isinstance(thing, str | int | float | bool):
            return
        seen[id(thing)] = thing  # held, so that no other object gets its number
        if isinstance(thing, functools.partial):
            visit([thing.func, *thing.args, *thing.keywords.values()])
        elif isinstance(thing, list | tuple | set | frozenset):
            for t in thing:
                visit(t)
        elif isinstance(thing, dict):
            visit(list(thing.values()))
        elif inspect.ismethod(thing):
            visit([thing.__self__, thing.__func__])
        elif inspect.ismodule(thing):
            modules.add(thing.__name__)
        elif inspect.isfunction(thing):
            visit([*_enclosed(thing), thing.__defaults__, thing.__kwdefaults__])
            code(thing)
        elif isinstance(thing, type):
            visit(thing.__bases__)
            code(thing)
        else:
            visit([type(thing), getattr(thing, "__dict__", None)])

    def code(thing):
        if thing.__module__ != "__main__":
            modules.add(thing.__module__)
        elif inspect.isfunction(thing):  # defined in a notebook
            texts.append([thing.__qualname__, _function_source(thing)])
            names, imported = _globals(thing.__code__)
            modules.update(imported)
            for used in sorted(names):
                value = thing.__globals__.get(used)
                visit(value)
                if _plain(value):
                    texts.append([used, settings(value)])
        else:
            visit([_unwrapped(member) for member in vars(thing).values()])
            constants = {
                n: settings(v) for n, v in vars(thing).items() if not n.startswith("__") and _plain(v)
            }
            texts.append([thing.__qualname__, constants])

    visit(things)
    return digest(_texts(modules), sorted(texts, key=json.dumps))


def named_source(name: str) -> str:
    """Return a digest of the source behind an import path.

    It changes with the file, with what the file imports, and with the version of an installed package. "" for
    a name of effilib's own.

    >>> named_source("resnet"), len(named_source("torchvision.models:resnet18"))
    ('', 24)
    """
    from effilib import models  # brings torch

    place, _, _ = name.rpartition(":")
    if not place:
        return ""
    thing = models.find(name)
    if place.endswith(".py"):
        return digest(source(thing, user_files.load(place)))
    module = sys.modules[place]
    return digest(source(thing, module), getattr(sys.modules[place.split(".")[0]], "__version__", ""))


def imports(modules: Iterable[str]) -> set[str]:
    """Return what `modules` import of effilib and the user, directly or not.

    Never report, notebook, runner or command line.

    >>> found = imports(["effilib.training"])
    >>> "effilib.clock" in found, "effilib.workbook.report" in found
    (True, False)
    """
    return set(_files(modules))


def _texts(modules):
    """Sorted pairs (name, normalised source) of modules, all that they import, and C++ that they name."""
    texts = [
        [name if name.startswith("effilib.") else file.stem, normalized(_text(name, file))]
        for name, file in _files(modules).items()
    ]
    named = {cpp for cpp in KERNELS.glob("*.cpp") if any(f"{cpp.stem!r}" in text for _, text in texts)}
    return sorted(texts + [[cpp.name, cpp.read_text(encoding="utf-8")] for cpp in named])


def _files(modules):
    """Name -> file of the modules `modules`, and of all modules that these import."""
    found, todo = {}, [(m, None) for m in modules]
    while todo:
        module, beside = todo.pop()
        package, _, name = module.rpartition(".")
        if package == "effilib":
            module = f"effilib.{effilib._WHERE.get(name, name)}"
        if module in found or module in ("", "effilib", "__main__") or module.startswith(NEVER):
            continue
        if not module.startswith("effilib."):
            todo.append((package, beside))  # which is imported first
        file = _file(module, beside)
        if file is not None:
            found[module] = file
            todo += [(m, file.parent) for m in _imported(module, file)]
    return found


def _imported(module, file):
    """Names of what a file may import; for a loaded one also of the modules behind what it holds."""
    package, names = module if file.name == "__init__.py" else module.rpartition(".")[0], set()
    for node in ast.walk(_parsed(_text(module, file))):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {base, *(f"{base}.{a.name}" for a in node.names)}
    loaded = None if module.startswith("effilib.") else sys.modules.get(module)
    for value in list(vars(loaded).values()) if loaded is not None else ():
        if inspect.ismodule(value):
            # a package holds all that anybody has loaded of it
            names |= set() if hasattr(loaded, "__path__") else {value.__name__}
        else:
            kind = value if inspect.isroutine(value) or isinstance(value, type) else type(value)
            names.add(getattr(kind, "__module__", None) or "")
    return {n for n in names if isinstance(n, str)}


def _file(module, beside=None):
    """The file of a module of effilib or of the user's own; None for others, and for what has no source."""
    top, *rest = module.split(".")
    if top == "effilib":
        base = Path(__file__).parent.joinpath(*rest)
        return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)
    if top in sys.stdlib_module_names:
        return None
    file = _loaded_file(module) or _found_file(module, beside)
    return Path(file) if file and file.endswith(".py") and _own_file(file) and Path(file).is_file() else None


def _loaded_file(module):
    return getattr(sys.modules.get(module), "__file__", None)


def _found_file(module, beside):
    """Where a module lies that is not loaded, as what a function imports is not yet; nothing is imported."""
    spec, folders = None, None
    for part in module.split("."):
        try:
            if spec is None and part in sys.modules:
                spec = sys.modules[part].__spec__
            elif spec is None:
                spec = PathFinder.find_spec(part, [str(beside)]) or importlib.util.find_spec(part)
            else:
                spec = PathFinder.find_spec(part, folders)
        except (ImportError, ValueError, AttributeError):
            return None
        if spec is None:
            return None
        folders = list(spec.submodule_search_locations or ())
    return spec.origin


def _own_file(file):
    return "site-packages" not in file and "dist-packages" not in file


_first = {}  # file -> (spec of its module, its text) when it was first seen


def _text(module, file):
    """The text of a module as it was loaded: what was edited since does not run."""
    spec = getattr(sys.modules.get(module), "__spec__", None)
    if spec is not None and isinstance(spec.loader, user_files.Loader):
        return spec.loader.get_source(module)
    text = file.read_text(encoding="utf-8")
    if spec is None:
        return text
    if _first.setdefault(file, (spec, text))[0] is not spec:  # reloaded
        _first[file] = spec, text
    before = _first[file][1]
    own = not module.startswith("effilib.")
    if own and before != text and normalized(before) != normalized(text):
        warnings.warn(f"{file} was edited since it was loaded: that counts after a restart", stacklevel=2)
    return before


@functools.lru_cache(maxsize=1024)
def _parsed(text):
    return ast.parse(textwrap.dedent(text))


@functools.lru_cache(maxsize=1024)
def normalized(text: str) -> str:
    """Return source without comments, docstrings and layout.

    >>> normalized("x = 1  # one") == normalized("x=1")
    True
    """
    tree = ast.parse(textwrap.dedent(text))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and body:
            first = body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = body[1:] or [ast.Pass()]
    return ast.dump(tree)


def _enclosed(function):
    """What a function took from the functions around it, but for itself."""
    cells = [c for c in function.__closure__ or () if c != types.CellType()]  # an empty one equals a new one
    return [c.cell_contents for c in cells if c.cell_contents is not function]


def _globals(code):
    """What a code object and the functions within it read from their module: its names, and modules."""
    names, imported, module = set(), set(), ""
    for i in dis.get_instructions(code):
        if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names.add(i.argval)
        elif i.opname == "IMPORT_NAME":
            module = i.argval
            imported.add(module)
        elif i.opname == "IMPORT_FROM":
            imported.add(f"{module}.{i.argval}")
    for inner in (_globals(c) for c in code.co_consts if inspect.iscode(c)):
        names, imported = names | inner[0], imported | inner[1]
    return names, imported


def _plain(value):
    """Whether `value` is a constant: numbers, words, and lists, dicts and frozen dataclasses of such."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return value.__dataclass_params__.frozen and all(
            _plain(getattr(value, f.name)) for f in dataclasses.fields(value)
        )
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(map(_plain, value.values()))
    return isinstance(value, str | int | float | bool)


def _unwrapped(member):
    """The function behind a method, class method, static method or property."""
    member = next((getattr(member, n) for n in ("__func__", "fget", "func") if hasattr(member, n)), member)
    return inspect.unwrap(member) if inspect.isfunction(member) else member


def _function_source(function):
    try:
        return normalized(inspect.getsource(function))
    except (
        OSError,
        TypeError,
        SyntaxError,
    ):  # generated, as a dataclass's __init__, or a lambda within a longer line
        return _code(function.__code__)


def _code(code):
    constants = [
        _code(c) if inspect.iscode(c) else repr(sorted(map(repr, c)) if isinstance(c, frozenset) else c)
        for c in code.co_consts
    ]
    return json.dumps([code.co_code.hex(), list(code.co_names), constants])


def commit() -> str | None:
    """Return the short hash of the checkout's commit; None outside a checkout.

    "+" stands behind it if files were changed since.

    >>> commit() is None or len(commit()) >= 7
    True
    """

    def git(*words):
        return subprocess.run(
            ["git", "-C", str(paths.root()), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
