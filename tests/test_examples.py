"""Docstrings: every public name of the library has one, with an example that is run here.

Public are the functions and classes, without an underscore, of all modules but the chapters, which their
notebooks run and which need a docstring only. Examples are written as behind `from effilib import *`, `import
torch`, `from torch import nn` and `import torch.nn.functional as F`; what else the example's own module knows
is there too."""

import doctest
import functools
import importlib
import inspect
import pkgutil
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import effilib
from effilib import models, paths

MODULES = sorted(
    m.name for m in pkgutil.walk_packages(effilib.__path__, "effilib.") if not m.name.endswith("__main__")
)
LIBRARY = [m for m in MODULES if not m.startswith("effilib.chapters")]
NO_EXAMPLE = {  # name -> why
    "effilib.methods.layer_placement.serve": "one side of a conversation between processes: the example of `take_part`",
    "effilib.methods.layer_placement.work": "the other side",
    "effilib.methods.layer_placement.pipelined": "needs several processes too, and starting them takes seconds",
    "effilib.distributed.processes.joined": "what each of several processes is in: the example of `run`",
    "effilib.workbook.jobs.Interrupted": "is raised inside of a job",
    "effilib.workbook.jobs.execute": "executes a notebook, which takes seconds: the tests of the runner",
    "effilib.workbook.jobs.run_one": "the same",
    "effilib.workbook.jobs.end": "ends what `execute` began",
    "effilib.workbook.runner.run": "runs notebooks: the README has its command line",
    **{
        f"effilib.workbook.cluster.{name}": "needs a scheduler and workers: the README's lines, which test_cluster runs"
        for name in ("SchedulerLost", "connect", "Cluster", "keep_seeds", "check", "keep_files", "on_worker")
    },
}
KNOWN = {"torch": torch, "nn": nn, "F": F, **{name: getattr(effilib, name) for name in effilib.__all__}}
FLAGS = doctest.ELLIPSIS | doctest.REPORT_NDIFF


def public(name):
    """name -> object: the public functions and classes that a module defines."""
    module = importlib.import_module(name)
    found = {
        n: thing
        for n, thing in vars(module).items()
        if not n.startswith("_") and getattr(thing, "__module__", None) == name
    }
    return {
        n: thing for n, thing in found.items() if inspect.isclass(thing) or callable(inspect.unwrap(thing))
    }


def members(cls):
    """name -> object: the public methods and properties that a class defines."""
    kinds = (property, functools.cached_property, classmethod, staticmethod)
    found = {
        n: m
        for n, m in vars(cls).items()
        if not n.startswith("_") and (inspect.isfunction(m) or isinstance(m, kinds))
    }
    return {
        n: m if isinstance(m, (property, functools.cached_property)) else getattr(cls, n)
        for n, m in found.items()
    }


def documented(cls, name, thing):
    """Whether a method has a docstring, its own or that of what it overrides."""
    return any(getattr(vars(base).get(name), "__doc__", None) for base in cls.__mro__) or bool(
        inspect.getdoc(thing)
    )


def test_every_public_name_has_a_docstring():
    lacking = []
    for module in [*MODULES, "effilib.__main__"]:
        lacking += [module] * (not importlib.import_module(module).__doc__)
        for name, thing in public(module).items():
            lacking += [f"{module}.{name}"] * (
                not thing.__doc__ or thing.__doc__.startswith(f"{name}(")
            )  # dataclasses write that
            if isinstance(thing, type):
                lacking += [
                    f"{module}.{name}.{n}" for n, m in members(thing).items() if not documented(thing, n, m)
                ]
    assert not lacking


def test_every_public_name_has_an_example():
    names = {f"{module}.{name}": thing for module in LIBRARY for name, thing in public(module).items()}
    assert {f"effilib.{effilib._WHERE[name]}.{name}" for name in effilib.__all__} <= set(names)
    assert len(names) > 300
    lacking = {name for name, thing in names.items() if ">>>" not in (thing.__doc__ or "")}
    assert lacking == set(NO_EXAMPLE)


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
    module = importlib.import_module(name)
    examples = doctest.DocTestFinder().find(module, name, globs={**KNOWN, **vars(module)})
    runner, report = doctest.DocTestRunner(optionflags=FLAGS, verbose=False), []
    for example in examples:
        with models.seeded(0):
            runner.run(example, out=report.append)
    assert not runner.failures, "".join(report)
    written = {f"{name}.{n}" for n, thing in public(name).items() if ">>>" in thing.__doc__}
    assert written <= {example.name for example in examples if example.examples}
