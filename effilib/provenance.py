"""What a cached result depends on: settings and source, as a digest.

Source counts without comments and docstrings, and only that of the modules which an arm really imports:
editing a report never throws measurements away, editing the training loop always does."""

import ast
import dataclasses
import dis
import functools
import hashlib
import inspect
import json
import subprocess
import sys
import textwrap
import types
from pathlib import Path

from effilib import paths

NEVER = (
    "effilib.workbook",
    "effilib.results",
    "effilib.timing",
    "effilib.figures",
    "effilib.notebook",
    "effilib.progress",
    "effilib.__main__",
)


def digest(*parts):
    """Short sha256 of JSON-able parts.

    >>> digest("a", 1) == digest("a", 1), digest("a", 1) == digest("a", 2)
    (True, False)
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def settings(value):
    """`value` as JSON-able data that says all that matters: dataclasses and functions by name, settings and
    source.

    >>> settings(Recipe(lr=0.5))["lr"]
    0.5
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: settings(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": _name(type(value)), **fields}
    if isinstance(value, functools.partial):
        return {
            "partial": settings(value.func),
            "args": settings(value.args),
            "keywords": settings(value.keywords),
        }
    if inspect.isfunction(value):
        inside = [settings(v) for v in _enclosed(value)]
        return {
            "function": _name(value),
            "closure": inside,
            "defaults": settings([value.__defaults__, value.__kwdefaults__]),
        }
    if inspect.ismethod(value):
        return {"method": _name(value.__func__), "of": settings(value.__self__)}
    if isinstance(value, type):
        return _name(value)
    if isinstance(value, dict):
        return {str(k): settings(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [settings(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def _name(thing):
    return f"{thing.__module__}.{thing.__qualname__}"


def source(*things, always=("effilib.training", "effilib.experiment")):
    """Digest of the source behind dataclass instances, classes and functions, with all effilib modules they
    import.

    Of what was defined in a notebook counts what it uses there too: functions, base classes and constants.

    >>> source(Recipe) == source(Recipe), len(source(Recipe))
    (True, 24)
    """
    modules, texts, seen = set(always), [], set()

    def visit(thing):
        if isinstance(thing, functools.partial):
            visit(thing.func)
            for a in [*thing.args, *thing.keywords.values()]:
                visit(a)
            return
        if isinstance(thing, list | tuple):
            for t in thing:
                visit(t)
            return
        if isinstance(thing, dict):
            visit(list(thing.values()))
            return
        if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
            visit([getattr(thing, f.name) for f in dataclasses.fields(thing)])
            thing = type(thing)
        if inspect.ismethod(thing):
            visit([thing.__self__, thing.__func__])
        if (
            not (inspect.isfunction(thing) or inspect.ismodule(thing) or isinstance(thing, type))
            or id(thing) in seen
        ):
            return
        seen.add(id(thing))
        if inspect.isfunction(thing):
            visit([*_enclosed(thing), thing.__defaults__, thing.__kwdefaults__])
        elif isinstance(thing, type):
            visit(thing.__bases__)
        module = thing.__name__ if inspect.ismodule(thing) else thing.__module__
        if module.split(".")[0] == "effilib":
            modules.add(module)
        elif module != "__main__":
            texts.append([module, _user_source(module)])
        elif inspect.isfunction(thing):  # defined in the notebook
            texts.append([thing.__qualname__, _function_source(thing)])
            for used in sorted(_globals(thing.__code__)):
                value = thing.__globals__.get(used)
                visit(value)
                if _plain(value):
                    texts.append([used, settings(value)])
        elif isinstance(thing, type):
            visit([_unwrapped(member) for member in vars(thing).values()])
            constants = {
                n: settings(v) for n, v in vars(thing).items() if not n.startswith("__") and _plain(v)
            }
            texts.append([thing.__qualname__, constants])

    visit(list(things))
    return digest(
        {m: normalized(_text(_file(m))) for m in sorted(imports(modules))}, sorted(texts, key=json.dumps)
    )


def imports(modules):
    """All effilib modules that `modules` import, directly or not; never report, notebook, runner or command
    line.

    >>> found = imports(["effilib.training"])
    >>> "effilib.clock" in found, "effilib.workbook.report" in found
    (True, False)
    """
    found, todo = set(), list(modules)
    while todo:
        module = todo.pop()
        if module in found or module == "effilib" or module.startswith(NEVER) or _file(module) is None:
            continue
        found.add(module)
        for node in ast.walk(ast.parse(_text(_file(module)))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "effilib":
                todo += [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
            elif isinstance(node, ast.Import):
                todo += [a.name for a in node.names if a.name.split(".")[0] == "effilib"]
    return found


def _file(module):
    base = Path(__file__).parent.joinpath(*module.split(".")[1:])
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


def _text(file):
    return file.read_text(encoding="utf-8")


def _user_source(module):
    """Source of a module of the user's own; "" for the standard library, installed packages and what has no
    source.
    """
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    installed = (
        module.split(".")[0] in sys.stdlib_module_names or "site-packages" in file or "dist-packages" in file
    )
    return normalized(_text(Path(file))) if file.endswith(".py") and not installed else ""


def normalized(text):
    """Source without comments, docstrings and layout.

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
    """Names that a code object and the functions within it read from their module."""
    own = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return own.union(*(_globals(c) for c in code.co_consts if inspect.iscode(c)))


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


def commit():
    """Short hash of the checkout's commit, "+" behind it if files were changed since; None outside a
    checkout.

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
