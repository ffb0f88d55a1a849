"""What is read without running anything: the recorded results, and a page of all public names.

`make pages` builds both into `results/pages`, which a workflow publishes.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import effilib
from effilib import paths
from effilib.workbook import report

__all__ = ["api", "build", "modules"]

ADDRESS = re.compile(r" at 0x[0-9a-f]+")
PLACE = re.compile(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])")  # of a class: Module says as much as its whole path


def modules() -> Iterator[ModuleType]:
    """Yield every module with an `__all__`, by name, the package itself first.

    >>> "effilib.clock" in [module.__name__ for module in modules()]
    True
    """
    yield effilib
    for found in pkgutil.walk_packages(effilib.__path__, "effilib."):
        if not found.name.endswith("__main__"):
            module = importlib.import_module(found.name)
            if getattr(module, "__all__", ()):
                yield module


def api(file: str | Path) -> Path:
    """Write the page of all public names: signatures and docstrings. Returns its path.

    >>> "write the page of all public names" in api("api.html").read_text().lower()
    True
    """
    found = [
        {
            "name": module.__name__,
            "about": _first(module),
            "text": _blocks(module.__doc__),
            "entries": [
                _entry(module, n) for n in module.__all__ if not inspect.ismodule(getattr(module, n))
            ],
        }
        for module in modules()
    ]
    return paths.write(file, report.filled("api.html", title="effilib: public names", modules=found))


def _entry(module: ModuleType, name: str) -> dict[str, Any]:
    """What the page says of a name; of one from elsewhere only where it is explained."""
    thing = getattr(module, name)
    home = getattr(thing, "__module__", None)
    entry = {"name": name, "head": name, "id": f"{module.__name__}.{name}"}
    entry |= {"about": "", "home": "", "text": [], "methods": []}
    if not (inspect.isclass(thing) or inspect.isroutine(inspect.unwrap(thing))):
        return entry | {"head": f"{name}: {type(thing).__name__}", "about": type(thing).__name__}
    if home != module.__name__ and name in getattr(sys.modules.get(home), "__all__", ()):
        return entry | {"home": f"{home}.{name}", "about": _first(thing)}
    entry["about"] = _first(thing)
    entry |= {"head": name + _signature(thing), "text": _blocks(inspect.getdoc(thing))}
    if inspect.isclass(thing):
        entry["head"] = f"class {entry['head']}"
        entry["methods"] = [
            {"head": n + _signature(m), "text": _blocks(inspect.getdoc(m))}
            for n, m in vars(thing).items()
            if inspect.isfunction(m) and m.__doc__ and not n.startswith("_")
        ]
    return entry


def _first(thing):
    """The first sentence of a docstring, on a line."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split()).replace("`", "")


def _signature(thing):
    try:
        return PLACE.sub("", ADDRESS.sub("", str(inspect.signature(thing))))
    except (TypeError, ValueError):  # some classes say nothing
        return "(...)"


def _blocks(docstring):
    """A docstring's paragraphs and examples as HTML."""
    from markupsafe import Markup, escape
    from nbconvert.filters.highlight import Highlight2HTML

    found = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(docstring or "")):
        if block.startswith(">>>"):
            found.append(Markup(Highlight2HTML(pygments_lexer="pycon")(block, language="pycon")))
        elif block.startswith((" ", "- ", "* ")):
            found.append(Markup("<pre>{}</pre>").format(block))
        elif block:
            found.append(
                Markup("<p>" + re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(block))) + "</p>")
            )
    return found


def build(folder: str | Path | None = None) -> Path:
    """Write what is published into `folder`: the recorded results and the public names.

    folder: by default `pages` among the results. Returns the scoreboard's path.

    >>> build("published").name, Path("published/api.html").exists()
    ('index.html', True)
    """
    folder = paths.make(folder or paths.results() / "pages")
    shutil.copytree(paths.recorded(), folder, dirs_exist_ok=True)
    api(folder / "api.html")
    return report.recorded_index(folder, {"public names": "api.html", "every run": "all.csv"})


if __name__ == "__main__":  # python -m effilib.workbook.website
    print(build(*sys.argv[1:]))
