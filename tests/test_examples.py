"""Docstrings: every public name of the library has one, with an example that is run here.

Public are the functions and classes, without an underscore, of all modules but the chapters, which their
notebooks run and which need a docstring only. Examples assume `from effilib import *`, `import
torch`, `from torch import nn` and `import torch.nn.functional as F`; what else the example's own module knows
is there too."""

import doctest
import importlib
import inspect
import pkgutil
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import effilib
from effilib import paths, seeds
from effilib.kernels import integers

MODULES = sorted(
    m.name for m in pkgutil.walk_packages(effilib.__path__, "effilib.") if not m.name.endswith("__main__")
)
CHAPTERS = [m for m in MODULES if m.startswith("effilib.chapters.")]
LIBRARY = [m for m in MODULES if not m.startswith("effilib.chapters")]
KNOWN = {"torch": torch, "nn": nn, "F": F, **{name: getattr(effilib, name) for name in effilib.__all__}}
FLAGS = doctest.ELLIPSIS | doctest.REPORT_NDIFF


def public(name):
    """name -> object: the functions and classes that a module is there for, which its `__all__` names."""
    module = importlib.import_module(name)
    found = {n: getattr(module, n) for n in getattr(module, "__all__", ())}
    own = {n: thing for n, thing in found.items() if getattr(thing, "__module__", None) == name}
    return {
        n: thing
        for n, thing in own.items()
        if inspect.isclass(thing) or inspect.isfunction(inspect.unwrap(thing))
    }


NAMES = {f"{module}.{name}": thing for module in LIBRARY for name, thing in public(module).items()}


def untyped(function):
    """What of a function has no type: parameters (but for self, *args and **kwargs), and what it returns."""
    signature = inspect.signature(inspect.unwrap(function))
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    bare = [
        n
        for n, p in signature.parameters.items()
        if n not in ("self", "cls") and p.kind not in several and p.annotation is p.empty
    ]
    return bare + ["return"] * (signature.return_annotation is signature.empty)


@pytest.mark.parametrize("name", LIBRARY)
def test_every_module_says_what_it_is_for_and_what_is_meant_for_others(name):
    module = importlib.import_module(name)
    assert module.__doc__
    assert hasattr(module, "__all__")
    assert all(hasattr(module, n) for n in module.__all__)


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_chapter_says_what_it_is_for(name):
    assert importlib.import_module(name).__doc__


def test_what_the_package_offers_is_among_them():
    assert {f"effilib.{effilib._WHERE[name]}.{name}" for name in effilib.__all__} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_has_an_example_and_types(name):
    thing = NAMES[name]
    assert thing.__doc__
    assert ">>>" in thing.__doc__
    first = re.split(r"(?<=[.:;])\s", thing.__doc__.strip())[0]
    assert len([word for word in first.split() if re.search(r"\w", word)]) <= 12, first
    if inspect.isclass(thing):  # the fields of dataclasses are typed by being fields
        members = {n: m for n, m in vars(thing).items() if inspect.isfunction(m) and not n.startswith("_")}
        assert not {n: untyped(m) for n, m in members.items() if untyped(m)}
    else:
        assert not untyped(thing)
        assert first[0].isupper()  # an imperative
        assert first.split()[0] not in ("The", "A", "An", "What", "Whether", "How", "Which", "Where")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A copy of what examples read and write of the checkout, as the current folder; the number of threads is
    set back.
    """
    shutil.copytree(paths.recorded(), tmp_path / "results" / "recorded")
    shutil.copy(paths.root() / "README.md", tmp_path)
    (tmp_path / "notebooks").symlink_to(paths.notebooks())
    monkeypatch.setattr(paths, "root", lambda: tmp_path)
    monkeypatch.setenv("EFFILIB_RESULTS", str(tmp_path / "runs"))
    monkeypatch.delenv("EFFILIB_SHARED", raising=False)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", [m for m in MODULES if not m.startswith("effilib.chapters.")])
def test_examples_are_right(name, elsewhere):
    integers.library()  # what a processor lacks is said once, and not within an example
    module = importlib.import_module(name)
    examples = doctest.DocTestFinder().find(module, name, globs={**KNOWN, **vars(module)})
    runner, report = doctest.DocTestRunner(optionflags=FLAGS, verbose=False), []
    for example in examples:
        with seeds.seeded(0):
            runner.run(example, out=report.append)
    assert not runner.failures, "".join(report)
    written = {f"{name}.{n}" for n in public(name)}
    assert written <= {example.name for example in examples if example.examples}
