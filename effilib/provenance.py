"""What a cached result depends on: settings and source, as a digest.

Source counts without comments and docstrings, and only that of the modules which an arm really imports: editing a
report never throws measurements away, editing the training loop always does.
"""

import ast
import dataclasses
import functools
import hashlib
import inspect
import json
import subprocess
import sys
import textwrap
from pathlib import Path

from effilib import paths

NEVER = {"effilib.report", "effilib.figures", "effilib.notebook", "effilib.runner", "effilib.progress", "effilib.__main__", "effilib"}


def digest(*parts):
    """Short sha256 of JSON-able parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def settings(value):
    """`value` as JSON-able data that says all that matters: dataclasses and functions by name, settings and source."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: settings(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": _name(type(value)), **fields}
    if isinstance(value, functools.partial):
        return {"partial": settings(value.func), "args": settings(value.args), "keywords": settings(value.keywords)}
    if inspect.isfunction(value):
        inside = [settings(c.cell_contents) for c in value.__closure__ or ()]
        return {"function": _name(value), "closure": inside, "defaults": settings([value.__defaults__, value.__kwdefaults__])}
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
    """Digest of the source behind dataclass instances, classes and functions, with all effilib modules they import."""
    modules, texts, seen = set(always), {}, set()

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
        if not (inspect.isfunction(thing) or isinstance(thing, type)) or id(thing) in seen:
            return
        seen.add(id(thing))
        if inspect.isfunction(thing):
            for cell in thing.__closure__ or ():
                visit(cell.cell_contents)
        module = thing.__module__
        if module.startswith("effilib"):
            modules.add(module)
        elif module == "__main__":  # defined in the notebook
            for name, function in _functions(thing):
                texts[name] = _function_source(function)
                for used in function.__code__.co_names:
                    visit(function.__globals__.get(used))
        elif getattr(sys.modules.get(module), "__file__", None) and "site-packages" not in sys.modules[module].__file__:
            texts[module] = normalized(Path(sys.modules[module].__file__).read_text())

    visit(list(things))
    return digest({m: normalized(_file(m).read_text()) for m in sorted(imports(modules))}, texts)


def imports(modules):
    """All effilib modules that `modules` import, directly or not; never report, notebook, runner or command line."""
    found, todo = set(), list(modules)
    while todo:
        module = todo.pop()
        if module in found or module in NEVER or _file(module) is None:
            continue
        found.add(module)
        for node in ast.walk(ast.parse(_file(module).read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "effilib":
                todo += [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
            elif isinstance(node, ast.Import):
                todo += [a.name for a in node.names if a.name.split(".")[0] == "effilib"]
    return found


def _file(module):
    base = Path(__file__).parent.joinpath(*module.split(".")[1:])
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


def normalized(text):
    """Source without comments, docstrings and layout."""
    tree = ast.parse(textwrap.dedent(text))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and body:
            first = body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
                node.body = body[1:] or [ast.Pass()]
    return ast.dump(tree)


def _functions(thing):
    if inspect.isfunction(thing):
        return [(thing.__qualname__, thing)]
    members = ((f"{thing.__qualname__}.{n}", inspect.unwrap(getattr(m, "__func__", m))) for n, m in vars(thing).items())
    return [(n, f) for n, f in members if inspect.isfunction(f) and f.__module__ == "__main__"]


def _function_source(function):
    try:
        return normalized(inspect.getsource(function))
    except (OSError, TypeError, SyntaxError):  # generated, as a dataclass's __init__, or a lambda within a longer line
        return _code(function.__code__)


def _code(code):
    constants = [_code(c) if inspect.iscode(c) else repr(c) for c in code.co_consts]
    return json.dumps([code.co_code.hex(), list(code.co_names), constants])


def commit():
    """Short hash of the checkout's commit, "+" behind it if files were changed since; None outside a checkout."""

    def git(*words):
        return subprocess.run(["git", "-C", str(paths.root()), *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
