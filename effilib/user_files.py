"""Users' own Python files, such as the mine.py of `"mine.py:net"`: each is loaded once.

A file is a module under a private name, made of its path and content: an edited one is another module, and no
two `mine.py` meet. Its folder is searched last, so that it can import its neighbours, also later. A worker
process that is sent one of its classes finds the file again.
"""

import ast
import hashlib
import importlib.abc
import importlib.util
import os
import re
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

from effilib.errors import BadInput

__all__ = ["load", "plain_name", "refuse_while_loading"]

PREFIX = "user_file_"
_loading = []  # files that are being executed, the innermost last


def load(place: str) -> ModuleType:
    """Return the module of a user's Python file, executed unless it was.

    Raises what the file raises; `BadInput` where it ends the program, or imports a neighbour whose name is
    taken.

    >>> _ = Path("mine.py").write_text("def net(classes): ...")
    >>> load("mine.py") is load("mine.py"), plain_name(load("mine.py").__name__)
    (True, 'mine')
    """
    file = Path(place).expanduser().resolve()
    name = _name(file, file.read_bytes())
    os.environ[name] = str(file)
    return importlib.import_module(name)


def plain_name(module: str) -> str:
    """Return a module's name without what makes it private.

    >>> plain_name("user_file_0a1b2c3d_mine"), plain_name("effilib.models")
    ('mine', 'effilib.models')
    """
    return re.sub(rf"^{PREFIX}[0-9a-f]{{8}}_", "", module)


def refuse_while_loading(what: str) -> None:
    """Raise `BadInput` if a user's file, being imported just now, starts `what`.

    >>> refuse_while_loading("a training")
    """
    if _loading:
        raise BadInput(
            f"{_loading[-1].name} starts {what} when it is imported: put that below"
            ' `if __name__ == "__main__":`'
        )


def _name(file, content):
    digest = hashlib.sha256(str(file).encode() + b"\0" + content).hexdigest()[:8]
    return f"{PREFIX}{digest}_{re.sub(r'[^0-9a-zA-Z_]', '_', file.stem)}"


class Finder(importlib.abc.MetaPathFinder):
    """Finds files by their private names; this process and its children have the paths as variables."""

    def find_spec(self, fullname, path=None, target=None):
        file = Path(os.environ.get(fullname, "")) if fullname.startswith(PREFIX) else None
        if file is None or not file.is_file() or fullname != _name(file, content := file.read_bytes()):
            return None
        return importlib.util.spec_from_loader(fullname, Loader(file, content))


class Loader(importlib.abc.SourceLoader):
    """Runs the text that was read when the file was found: what is edited later does not count."""

    def __init__(self, file, content):
        self.file, self.content = file, content

    def get_filename(self, fullname):
        return str(self.file)

    def get_data(self, path):
        return self.content

    def exec_module(self, module):
        folder = str(self.file.parent)
        if folder not in sys.path:
            sys.path.append(folder)
        _refuse_strangers(self.file, self.content)
        _loading.append(self.file)
        try:
            super().exec_module(module)
        except SystemExit as error:
            raise BadInput(f"it ends the program when it is imported: exit({error.code!r})") from error
        finally:
            _loading.pop()


def _refuse_strangers(file, content):
    """Raise `BadInput` if what a file imports lies beside it, but another module has its name."""
    nodes = list(ast.walk(ast.parse(content, str(file))))
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module and not n.level}
    for name in sorted({n.partition(".")[0] for n in names} - {"effilib"}):
        mine = PathFinder.find_spec(name, [str(file.parent)])
        if mine is None or not mine.has_location:
            continue
        loaded = sys.modules.get(name)
        taken = getattr(loaded, "__spec__", None) if loaded else importlib.util.find_spec(name)
        if taken and taken.origin and Path(taken.origin).resolve() != Path(mine.origin).resolve():
            raise BadInput(f"it imports {name}, of which there are two: {mine.origin}, {taken.origin}")


sys.meta_path.append(Finder())
