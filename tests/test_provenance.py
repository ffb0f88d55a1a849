"""What a cached measurement depends on: code and settings count, comments and docstrings do not."""

import ast
import functools
import importlib
import json
import math
import os
import subprocess
import sys
import textwrap
import threading
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import effilib
from effilib import models, paths, provenance, seeds
from effilib.errors import BadInput
from effilib.experiment import Arm
from effilib.hooks import Method
from effilib.recipe import Recipe

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
        return "Thing"  # does not say all

    def fit(self, task, seed):
        return self.rate


class Plain(Method):
    """A method that is no dataclass."""

    def __init__(self, rate=0.5, act=torch.relu):
        self.rate, self.act, self.again = rate, act, self


class Nothing(Method):
    pass


class Slots:
    __slots__ = ("rate",)

    def __init__(self, rate):
        self.rate = rate


def half(x):
    return x / 2


def networks(seed):
    with seeds.seeded(seed):
        return nn.Linear(2, 2)


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
    Plain(),
    Plain(rate=0.25),
    Plain(act=half),
    Plain(act=torch.tanh),
    Plain(act=F.relu),
    Plain(act=lambda x: x + 1),
    Plain(act=lambda x: x + 2),
    Nothing(),
    Slots(1),
    Slots(2),
    Halve(inner=half),
    Halve(inner=torch.zeros(2)),
    Halve(inner=torch.tensor([0.0, 1.0])),
    Halve(inner=np.zeros(2)),
    Halve(inner=torch.zeros(2000)),
    Halve(inner=torch.zeros(2000).index_fill(0, torch.tensor(1000), 1.0)),  # PyTorch leaves the middle out
    Halve(inner=np.float32(1)),
    Halve(inner={"a", "b"}),
    Halve(inner={"a", "c"}),
    Halve(inner=torch.device("cpu")),
    Halve(inner=Path("a")),
    Halve(inner=math),
    Halve(inner="a".upper),
    Halve(inner="b".upper),
    networks(0),
    networks(1),
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
        lambda: Plain(),
        lambda: Plain(act=half),
        lambda: Plain(act=lambda x: x + 1),
        lambda: Halve(inner=torch.ones(3)),
        lambda: Halve(inner=networks(1)),
        lambda: Halve(inner=functools.lru_cache(half)),
        lambda: Slots(3),
        Nothing,
    ],
)
def test_what_is_made_alike_has_equal_settings(make):
    assert provenance.settings(make()) == provenance.settings(make())
    assert provenance.source(make()) == provenance.source(make())


def test_fields_that_are_not_compared_do_not_count():
    @dataclass(frozen=True)
    class Counts(Method):
        seen: list = field(default_factory=list, compare=False)

    assert provenance.settings(Counts([1])) == provenance.settings(Counts([]))


@pytest.mark.parametrize(
    ("thing", "words"),
    [
        (Halve(inner=object()), "Halve.inner is <object object>"),
        (Halve(inner=[1, threading.Lock()]), "Halve.inner[1] is <unlocked _thread.lock object>"),
        (Plain(act=torch.Generator()), "Plain.act is <torch._C.Generator object>"),
        (Plain(rate={"a": (i for i in [1])}), "Plain.rate['a'] is <generator object"),
        ([Arm(name="a", methods=(Plain(rate=object()),))], "[0].methods[0].rate is <object object>"),
    ],
)
def test_what_another_process_would_call_by_another_name_is_refused_in_words(thing, words):
    with pytest.raises(BadInput) as error:
        provenance.settings(thing)
    assert str(error.value).startswith(words)
    assert "which has no name that stays the same" in str(error.value)


def test_a_plain_class_and_what_it_holds_count_by_their_source(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    digests = []
    (tmp_path / "acts.py").write_text("def act(x):\n    return x\n")
    for body in ("x + 1", "x + 1  # the same", "x + 2"):
        (tmp_path / "acts.py").write_text(f"def act(x):\n    return {body}\n")
        sys.modules.pop("acts", None)
        importlib.invalidate_caches()
        digests.append(provenance.source(Plain(act=importlib.import_module("acts").act)))
    sys.modules.pop("acts")
    assert digests[0] == digests[1] != digests[2]


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
        "from effilib import provenance; from effilib.experiment import Arm\n"
        "from effilib.recipe import Recipe\n"
        "def fit(task, seed):\n    return {'a', 'b', 'c'} and seed in {'x', 'y', 'z'}\n"
        "f = eval(\"lambda task, seed: seed in {'x', 'y', 'z'}\")\n"
        "from effilib.hooks import Method\n"
        "class Mine(Method):\n    def __init__(self, act): self.act = act\n"
        "own = (Mine(fit), Mine(lambda x: x + 1), Mine({'x', 'y', 'z'}))\n"
        "arms = [Arm(name='a', fit=fit, changes={'lr': 1}), Arm(name='b', fit=f), Recipe(), own]\n"
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
    } <= found
    assert not {m for m in found if m.startswith(provenance.NEVER)}
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
    """A copy of effilib's sources that may be edited; `says(code)` is what fresh processes print there."""
    folder = tmp_path / "effilib"
    sources = Path(effilib.__file__).parent
    for file in [*sources.rglob("*.py"), *sources.rglob("*.cpp")]:
        copy = folder / file.relative_to(Path(effilib.__file__).parent)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    return folder


def says(checkout, code):
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=checkout.parent,
        env={**os.environ, "PYTHONPATH": str(checkout.parent), "EFFILIB_PRESET": "smoke"},
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


def edit(file, old, new, count=1):
    text = file.read_text(encoding="utf-8")
    assert old in text, (file, old)
    file.write_text(text.replace(old, new, count), encoding="utf-8")


def add(file, text="\nADDED = 1\n"):
    file.write_text(file.read_text(encoding="utf-8") + text, encoding="utf-8")


def test_a_kernel_in_cpp_counts_for_what_imports_it_and_for_nothing_else(checkout):
    code = "import json; from effilib import provenance as p; print(json.dumps([p.source(m) for m in {}]))"
    code = code.format("(__import__('effilib.methods', fromlist=[n]).__dict__[n] for n in NAMES)")
    code = "NAMES = ['dynamic_fixed_point', 'gradient_pruning']\n" + code
    kernel = Path("kernels", "int16_convolution.cpp")
    (checkout / kernel).write_text((Path(effilib.__file__).parent / kernel).read_text(encoding="utf-8"))
    before = says(checkout, code)
    add(checkout / kernel, "\nint added;\n")
    after = says(checkout, code)
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, True]


# Of three chapters: the key under which the cells of all their arms are cached, and of the pilots before.
KEYS = """
import json
from effilib import experiment, tasks
from effilib.chapters import gradient_pruning, mixed_precision, prune_train
task = tasks.task("smoke", "synthetic")
data = task.load()
found = {"03_2": mixed_precision.arms(task), "04_1": gradient_pruning.arms(task)}
found["06_1"] = prune_train.grid(task)
found = {name: [experiment.key(task, data, [arm]) for arm in arms] for name, arms in found.items()}
print(json.dumps(found))
"""


def in_other_words(file):
    """Write a module anew: other docstrings, no comments, another layout."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body[0].value.value = "In other words."
    file.write_text(ast.unparse(tree), encoding="utf-8")


def test_captions_columns_and_docstrings_are_in_no_key_and_what_trains_is_in_those_that_use_it(checkout):
    before = says(checkout, KEYS)
    assert all(len(set(keys)) == len(keys) > 1 for keys in before.values())
    edit(checkout / "results.py", '"speed-up"', '"times as fast"')  # a column of the verdict table
    drawn = ["figures", "notebook", "results", "timing", "progress", "__main__", "__init__"]
    drawn += [
        "workbook/report",
        "workbook/records",
        "workbook/formulas",
        "workbook/runner",
        "workbook/series",
    ]
    chapters = sorted((checkout / "chapters").glob("*.py"))
    for file in [*(checkout / f"{name}.py" for name in drawn), *chapters]:
        add(file, "\ndef caption():\n    return 'Another caption'\n")
    for file in [*(checkout / "methods").glob("*.py"), *checkout.glob("*.py")]:
        in_other_words(file)
    assert says(checkout, KEYS) == before

    add(checkout / "methods" / "gradient_pruning.py")
    after = says(checkout, KEYS)
    assert {name: after[name] == before[name] for name in after} == {
        "03_2": True,
        "04_1": False,
        "06_1": True,
    }
    baseline, *methods = zip(before["04_1"], after["04_1"], strict=True)
    assert baseline[0] == baseline[1]
    assert any(a != b for a, b in methods)

    before = after
    add(checkout / "kernels" / "gradient_pruning.cpp", "// another kernel\n")
    after = says(checkout, KEYS)
    assert [name for name in after if after[name] != before[name]] == ["04_1"]

    add(checkout / "training.py")
    last = says(checkout, KEYS)
    assert not [k for name in last for k in last[name] if k in after[name]]


# A user's own files: a network whose package imports others, relatively, by full name and inside of a
# function, and a method in a file beside which lies what it imports.
USERS = {
    "mylib/__init__.py": "",
    "mylib/nets.py": """
        from torch import nn
        from .blocks import trunk
        def net(classes, channels=1):
            from mylib.deep.heads import head
            return nn.Sequential(trunk(channels), nn.Flatten(), head(classes))
    """,
    "mylib/blocks.py": """
        from torch import nn
        import mylib.deep.widths
        def trunk(channels):
            first = mylib.deep.widths.FIRST
            maps = nn.Sequential(nn.Conv2d(channels, first, 3), nn.Conv2d(first, 4, 1))
            return nn.Sequential(maps, nn.AdaptiveAvgPool2d(1))
    """,
    "mylib/deep/__init__.py": "from . import widths",
    "mylib/deep/widths.py": "FIRST = 4",
    "mylib/deep/heads.py": """
        from torch import nn
        def head(classes):
            return nn.Linear(4, classes)
    """,
    "mylib/unused.py": "WORD = 1",
    "elsewhere/mine.py": """
        from dataclasses import dataclass
        from effilib import Method
        from neighbour import amount
        @dataclass(frozen=True)
        class Mine(Method):
            rate: float = 0.5
            def on_step_end(self, run):
                return amount()
        def net(classes, channels=1):
            from later import made
            return made(classes)
    """,
    "elsewhere/neighbour.py": "def amount():\n    return 1",
    "elsewhere/later.py": """
        from torch import nn
        def made(classes):
            return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
    """,
}
# What is edited, and of which things the digest changes: the network mylib.nets:net, the method Mine, the
# network mine.py:net, and the key of cached cells of the first two.
EDITS = [
    ("mylib/nets.py", "nn.Flatten()", "nn.Flatten(1)", "net key"),
    ("mylib/blocks.py", "first, 3", "first, 5", "net key"),
    ("mylib/deep/widths.py", "4", "8", "net key"),
    ("mylib/deep/heads.py", "classes)", "classes, bias=False)", "net key"),
    ("mylib/deep/__init__.py", "from", "WORD = 1\nfrom", "net key"),
    ("mylib/__init__.py", "", "WORD = 1", "net key"),
    ("mylib/unused.py", "1", "2", ""),
    ("mylib/blocks.py", "import mylib", "# a comment\nimport   mylib", ""),
    ("elsewhere/neighbour.py", "1", "2", "method file key"),
    ("elsewhere/mine.py", "amount()", "2 * amount()", "method file key"),
    ("elsewhere/later.py", "64, classes", "64, classes, False", "method file key"),
]


@pytest.fixture
def users(tmp_path):
    for name, text in USERS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
    return tmp_path


OWN = """
import json, multiprocessing, sys
from pathlib import Path
from effilib import Arm, experiment, models, provenance, tasks
here = Path({here!r})
sys.path[:0] = [str(here), str(here / "elsewhere")]

def digests(file, old, new):
    (here / file).write_text((here / file).read_text().replace(old, new, 1))
    from mine import Mine
    task = tasks.task("smoke", "synthetic")
    method = [provenance.source(Mine()), provenance.source([Mine(rate=0.1)])]
    method.append(provenance.named_source("mine:Mine"))
    own = provenance.named_source(str(here / "elsewhere" / "mine.py:net"))
    first = provenance.named_source("mylib.nets:net"), provenance.source(Mine)
    net = models.build("mylib.nets:net", 4, (1, 8, 8))  # now all is loaded
    assert first == (provenance.named_source("mylib.nets:net"), provenance.source(Mine))
    arms = [Arm(name="baseline", role="baseline", methods=(Mine(),))]
    key = experiment.key(task.but(network="mylib.nets:net", widths={{}}), task.load(), arms)
    return {{"net": first[0], "method": method, "file": own, "key": key}}

# a process for each edit, in which nothing of the user's is loaded yet
with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
    for edit in json.loads(sys.stdin.read()):
        kept = (here / edit[0]).read_text()
        print(json.dumps(pool.apply(digests, edit)), flush=True)
        (here / edit[0]).write_text(kept)
"""


def test_whatever_a_users_network_or_method_imports_counts(users):
    (users / "notes.txt").write_text("")
    nothing = ("notes.txt", "", "")
    edits = [nothing, *(edit[:3] for edit in EDITS), nothing]
    done = subprocess.run(
        [sys.executable, "-c", OWN.format(here=str(users))],
        input=json.dumps(edits),
        env={**os.environ, "PYTHONPATH": str(paths.root()), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
    before, *found, again = map(json.loads, done.stdout.splitlines())
    assert len({str(v) for v in before.values()}) == 4
    for (file, old, _, changes), after in zip(EDITS, found, strict=True):
        assert {name for name in before if after[name] != before[name]} == {*changes.split()}, (file, old)
    assert again == before


def test_what_was_edited_after_it_was_loaded_does_not_count_before_it_is_loaded_anew(users, monkeypatch):
    monkeypatch.syspath_prepend(users)
    nets = importlib.import_module("mylib.nets")
    before = provenance.source(nets.net)
    edit(users / "mylib" / "blocks.py", "first, 3", "first, 5")
    with pytest.warns(UserWarning, match=r"blocks\.py was edited since it was loaded"):
        assert provenance.source(nets.net) == before  # it is the old one that runs
    importlib.reload(sys.modules["mylib.blocks"])
    assert provenance.source(nets.net) != before
    for name in [m for m in sys.modules if m.partition(".")[0] == "mylib"]:
        del sys.modules[name]


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
def show(*things):
    things = list(things)
    print(provenance.source(things), provenance.digest(provenance.settings(things)), sep="\\n")
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

arms = [Arm(name="a", methods=(Prune(),)), Arm(name="b", fit=fit),
        Arm(name="c", fit=lambda task, seed: helper(6)), Arm(name="d", fit=lambda task, seed: helper(7))]
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
        if f.stem not in ("__init__", "__main__", "figures", "notebook")
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
