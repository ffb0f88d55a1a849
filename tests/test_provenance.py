"""What a cached measurement depends on: code and settings count, comments and docstrings do not."""

import functools
import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, make_dataclass
from pathlib import Path

import nbclient
import nbformat
import pytest
import torch

import effilib
from effilib import models, paths, provenance
from effilib.experiment import Arm
from effilib.training import Method, Recipe

CODE = '''
"""Module docstring."""
import math

K = 3


class Prune:
    """What it does."""

    rate = 0.5

    def keep(self, x, *, least=1):
        """Keep some."""
        # the largest
        return max(least, math.floor(x * self.rate))  # never none


async def wait():
    """Only a docstring."""
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""Module docstring."""\n', ""),
        ("Module docstring", "Another one"),
        ('    """What it does."""\n\n', ""),
        ('        """Keep some."""\n', '        """Keep\n\n        a few."""\n'),
        ("        # the largest\n", ""),
        ("  # never none", "  # a comment of another kind"),
        ("\n\n\n", "\n\n\n\n\n"),
        (
            "max(least, math.floor(x * self.rate))",
            "max(\n            least,\n            math.floor(x * self.rate),\n        )",
        ),
        ("0.5", ".5"),
        ("Only a docstring.", "Still only a docstring."),
    ],
)
def test_comments_docstrings_and_layout_do_not_count(old, new):
    assert old in CODE
    assert provenance.normalized(CODE.replace(old, new)) == provenance.normalized(CODE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("K = 3", "K = 4"),
        ("0.5", "0.6"),
        ("least=1", "least=2"),
        ("math.floor", "math.ceil"),
        ("import math", "import cmath as math"),
        ("self, x, *", "self, x, y=0, *"),
        ("class Prune:", "class Prune(dict):"),
        ("async def", "def"),
    ],
)
def test_code_counts(old, new):
    assert old in CODE
    assert provenance.normalized(CODE.replace(old, new)) != provenance.normalized(CODE)


def test_a_string_that_is_no_docstring_counts():
    assert provenance.normalized('x = """a"""') != provenance.normalized('x = """b"""')
    assert provenance.normalized('def f():\n    x = 1\n    "a"') != provenance.normalized(
        'def f():\n    x = 1\n    "b"'
    )


def test_a_digest_is_short_and_depends_on_every_part():
    assert provenance.digest(1, "a") == provenance.digest(1, "a")
    assert len(provenance.digest({})) == 24
    assert (
        len(
            {
                provenance.digest(*p)
                for p in [(), (1,), (1, 1), ("1",), ([1, 1],), (None,), (1.5,), ({"a": 1},), ({"b": 1},)]
            }
        )
        == 9
    )
    assert provenance.digest({"a": 1, "b": 2}) == provenance.digest({"b": 2, "a": 1})


# --- settings


@dataclass(frozen=True, kw_only=True)
class Halve(Method):
    rate: float = 0.5
    inner: object = None


@dataclass(frozen=True, kw_only=True)
class Third(Method):
    rate: float = 0.5
    inner: object = None


def adder(k):
    def add(x, y=1):
        return x + k + y

    return add


class Thing:
    def __init__(self, rate):
        self.rate = rate

    def __repr__(self):
        return f"Thing({self.rate})"

    def fit(self, task, seed):
        return self.rate


DIFFERENT = [
    Halve(),
    Halve(rate=0.25),
    Third(),
    Halve(inner=Third()),
    Halve(inner=Third(rate=0.25)),
    Halve(inner=[Third()]),
    Halve(inner=(1, 2)),
    Halve(inner={"a": 1}),
    Halve(inner={"b": 1}),
    Halve(inner=Third),
    adder,
    adder(1),
    adder(2),
    functools.partial(adder, 1),
    functools.partial(adder, 2),
    functools.partial(adder, k=2),
    functools.partial(adder(1), 2),
    Thing(1).fit,
    Thing(2).fit,
    Thing,
    1,
    "1",
    None,
    True,
    torch.float16,
    torch.bfloat16,
]


def test_what_differs_has_different_settings():
    said = [json.dumps(provenance.settings(v), sort_keys=True) for v in DIFFERENT]
    same = [(DIFFERENT[i], DIFFERENT[j]) for i in range(len(said)) for j in range(i) if said[i] == said[j]]
    assert not same


@pytest.mark.parametrize(
    "make",
    [
        lambda: Halve(inner={"a": [Third()]}),
        lambda: adder(1),
        lambda: functools.partial(adder, 1),
        lambda: Thing(1).fit,
    ],
)
def test_what_is_made_alike_has_equal_settings(make):
    assert provenance.settings(make()) == provenance.settings(make())
    assert provenance.source(make()) == provenance.source(make())


def test_a_function_that_calls_itself_has_settings():
    def countdown(n):
        return countdown(n - 1) if n else 0

    assert "countdown" in json.dumps(provenance.settings(countdown))
    assert provenance.source(countdown) == provenance.source(countdown)


def test_a_function_with_a_name_that_is_not_yet_bound_has_settings():
    def outer():
        def inner():
            return later

        said = provenance.settings(inner), provenance.source(inner)
        later = 1
        return said, later

    assert outer()


def test_settings_do_not_depend_on_the_process():
    code = (
        "from effilib import provenance; from effilib.experiment import Arm; from effilib.training import Recipe\n"
        "def fit(task, seed):\n    return {'a', 'b', 'c'} and seed in {'x', 'y', 'z'}\n"
        "f = eval(\"lambda task, seed: seed in {'x', 'y', 'z'}\")\n"
        "arms = [Arm(name='a', fit=fit, changes={'lr': 1}), Arm(name='b', fit=f), Recipe()]\n"
        "print(provenance.digest(provenance.settings(arms)), provenance.source(arms))"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(paths.root()), "PYTHONHASHSEED": str(seed)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in (1, 2)
    }  # fmt: skip
    assert len(runs) == 1


# --- source


def test_imports_are_followed_but_never_to_reports_or_runner():
    found = provenance.imports(["effilib.experiment"])
    assert {
        "effilib.experiment",
        "effilib.training",
        "effilib.data",
        "effilib.clock",
        "effilib.models",
        "effilib.statistics",
    } <= found
    assert not found & provenance.NEVER
    assert not {m for m in found if m.startswith("effilib.chapters")}
    assert provenance.imports(["effilib.workbook.report", "effilib.nothing"]) == set()


def test_every_module_of_effilib_imports_absolutely():
    """`imports` does not follow relative imports: there must be none."""
    for file in Path(effilib.__file__).parent.rglob("*.py"):
        assert "\nfrom ." not in file.read_text(encoding="utf-8"), file


def test_an_arm_depends_on_its_methods_module_alone():
    plain = provenance.source([Arm(name="baseline")])
    assert provenance.source([Arm(name="b", methods=())]) == plain
    assert (
        provenance.source([Arm(name="b", fit=models.build)]) == plain
    )  # a module that training imports anyway
    module = importlib.import_module("effilib.methods.mixed_precision")
    inside = next(
        v for v in vars(module).values() if callable(v) and getattr(v, "__module__", "") == module.__name__
    )
    assert provenance.source(functools.partial(inside)) != plain


@pytest.fixture
def checkout(tmp_path):
    """A copy of effilib's sources that may be edited; `digest()` asks a fresh process."""
    folder = tmp_path / "effilib"
    for file in Path(effilib.__file__).parent.rglob("*.py"):
        copy = folder / file.relative_to(Path(effilib.__file__).parent)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text(encoding="utf-8"), encoding="utf-8")

    def digest():
        code = "from effilib import provenance; print(provenance.source())"
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    digest.folder = folder
    return digest


def test_editing_the_training_loop_counts_and_editing_a_report_does_not(checkout):
    before = checkout()
    for name in ("report", "figures", "notebook", "runner", "progress", "__main__", "series", "__init__"):
        with open(checkout.folder / f"{name}.py", "a") as file:
            file.write("\nADDED = 1\n")
    training = checkout.folder / "training.py"
    training.write_text(
        training.read_text(encoding="utf-8").replace(
            '"""One training loop', '# new\n"""Yet one training loop'
        ),
        encoding="utf-8",
    )
    assert checkout() == before
    training.write_text(training.read_text(encoding="utf-8") + "\nADDED = 1\n", encoding="utf-8")
    assert checkout() != before


def test_a_users_own_module_counts(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    digests = []
    for body in ("return 1", "return 1  # the same", "return 2"):
        (tmp_path / "users_own.py").write_text(f"def fit(task, seed):\n    {body}\n")
        sys.modules.pop("users_own", None)
        importlib.invalidate_caches()
        digests.append(provenance.source(importlib.import_module("users_own").fit))
    sys.modules.pop("users_own")
    assert digests[0] == digests[1] != digests[2]


def test_installed_packages_and_the_standard_library_do_not_count():
    plain = provenance.source()
    for thing in (torch.nn.Conv2d, json.dumps, Path, len, print, functools.partial(torch.relu)):
        assert thing is not None
        assert isinstance(provenance.source(thing), str)
    assert provenance.source(len) == plain


def test_a_generated_class_counts_by_its_fields():
    one, two = (make_dataclass("Made", [("rate", float, rate)], frozen=True)() for rate in (0.5, 0.6))
    assert provenance.settings(one) != provenance.settings(two)


# --- a notebook: `__main__` of a real kernel

SETUP = """
from dataclasses import dataclass
from functools import cached_property, partial
import torch
from effilib import Arm, Method, provenance
def show(*things): print(provenance.source(list(things)), provenance.digest(provenance.settings(list(things))), sep="\\n")
"""

CELL = '''
STRENGTH = 0.5
TABLE = {"a": [1, 2]}

def helper(x):
    """Help."""
    return x * STRENGTH + TABLE["a"][0]

def in_a_loop(x):
    return x + 1

class Base(Method):
    depth = 2
    def on_step_end(self, run):
        self.work(run)

@dataclass(frozen=True, kw_only=True)
class Prune(Base):
    """Prunes."""
    rate: float = 0.5
    sizes = (1, 2)

    def work(self, run):
        # some work
        return [in_a_loop(v) for v in range(self.limit)] + [helper(1)]

    @property
    def limit(self):
        return 3

    @staticmethod
    def fixed():
        return 4

def fit(task, seed, loss=helper):
    return loss(seed)

arms = [Arm(name="a", methods=(Prune(),)), Arm(name="b", fit=fit), Arm(name="c", fit=lambda task, seed: helper(6)),
        Arm(name="d", fit=lambda task, seed: helper(7))]
'''

SAME = [
    ("# some work", "# other words"),
    ('"""Help."""', '"""Help much."""'),
    ('"""Prunes."""', '"""It prunes."""'),
    ("STRENGTH = 0.5\n", "STRENGTH = 0.5\nUNUSED = 7\n"),
    ("def helper(x):", "\n\ndef helper(x):  # x"),
]
OTHER = [
    ("rate: float = 0.5", "rate: float = 0.6"),  # a field's default
    ("helper(1)", "helper(2)"),  # a method's body
    ("return x * STRENGTH", "return 2 * x * STRENGTH"),  # a function that a method uses
    ("return x + 1", "return x + 2"),  # one used in a comprehension
    ("STRENGTH = 0.5", "STRENGTH = 0.6"),  # a constant that it uses
    ('{"a": [1, 2]}', '{"a": [1, 3]}'),
    ("self.work(run)", "self.work(run); run.extra = 1"),  # a base class
    ("depth = 2", "depth = 3"),  # a constant of a base class
    ("sizes = (1, 2)", "sizes = (1, 3)"),  # of the class
    ("return 3", "return 5"),  # a property
    ("return 4", "return 5"),  # a static method
    ("loss(seed)", "loss(seed + 1)"),  # an arm's own function
    ("loss=helper", "loss=in_a_loop"),  # its default
    ("helper(6)", "helper(8)"),  # a lambda
    ("helper(7)", "helper(8)"),  # another lambda
]


@pytest.fixture(scope="module")
def kernel_says(tmp_path_factory):
    """Run every version of the cell in one real kernel: dict cell -> (digest of source, of settings)."""
    cells = [CELL, CELL] + [CELL.replace(old, new) for old, new in SAME + OTHER]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SETUP)])
    for cell in cells:
        book.cells += [nbformat.v4.new_code_cell(cell), nbformat.v4.new_code_cell("show(*arms)")]
    previous = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(paths.root()), previous]))
    try:
        nbclient.NotebookClient(
            book, timeout=120, resources={"metadata": {"path": str(tmp_path_factory.mktemp("book"))}}
        ).execute()
    finally:
        os.environ.pop("PYTHONPATH") if previous is None else os.environ.update(PYTHONPATH=previous)
    return dict(
        zip(
            cells,
            ("".join(o.get("text", "") for o in c.outputs).split() for c in book.cells[2::2]),
            strict=True,
        )
    )


@pytest.mark.parametrize(("old", "new"), SAME)
def test_in_a_notebook_comments_do_not_change_the_digest(kernel_says, old, new):
    assert old in CELL
    assert kernel_says[CELL.replace(old, new)] == kernel_says[CELL]


@pytest.mark.parametrize(("old", "new"), OTHER)
def test_in_a_notebook_editing_what_an_arm_uses_changes_the_digest(kernel_says, old, new):
    assert old in CELL
    assert len(kernel_says[CELL]) == 2
    assert kernel_says[CELL.replace(old, new)] != kernel_says[CELL]


# --- the commit


def git(folder, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *words], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_commit_is_named_and_changes_since_are_marked(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "root", lambda: tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.commit() is None  # no checkout
    git(tmp_path, "init", "-q")
    assert provenance.commit() is None  # no commit yet
    (tmp_path / "file").write_text("a")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "first")
    assert provenance.commit() == git(tmp_path, "rev-parse", "--short", "HEAD")
    (tmp_path / "new").write_text("untracked files do not count")
    assert not provenance.commit().endswith("+")
    (tmp_path / "file").write_text("b")
    assert provenance.commit() == git(tmp_path, "rev-parse", "--short", "HEAD") + "+"


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance.commit() is None


# --- importing


def in_a_fresh_process(code):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(paths.root())},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()


def test_importing_effilib_loads_nothing():
    heavy = [
        "torch",
        "torchvision",
        "matplotlib",
        "numpy",
        "pandas",
        "scipy",
        "sklearn",
        "papermill",
        "nbconvert",
        "IPython",
        "mlxtend",
    ]
    assert in_a_fresh_process(f"import sys, effilib; print(*[m for m in {heavy} if m in sys.modules])") == []


def test_importing_the_library_draws_nothing_and_touches_no_gpu_and_no_plots():
    names = [
        f"effilib.{f.stem}"
        for f in Path(effilib.__file__).parent.glob("*.py")
        if f.stem not in ("__init__", "__main__", "figures")
    ]
    code = f"""
import importlib, random, sys
import numpy, torch
before = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
threads = torch.get_num_threads()
for name in {names}:
    importlib.import_module(name)
assert (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
assert torch.get_num_threads() == threads
print(torch.cuda.is_initialized(), "matplotlib" in sys.modules, "pandas" in sys.modules)
"""
    assert in_a_fresh_process(code)[:2] == ["False", "False"]


def test_the_names_of_effilib_are_there_and_others_are_not():
    assert effilib.Recipe is Recipe
    for name in effilib.__all__:
        assert getattr(effilib, name) is not None
    assert set(effilib.__all__) <= set(dir(effilib))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = effilib.nothing
