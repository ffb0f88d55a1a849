"""Users' own Python files: loaded once, whatever they are called, import or do at their top level."""

import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
from concurrent.futures import ProcessPoolExecutor

import pytest

from effilib import models, paths, provenance, user_files
from effilib.errors import BadInput
from effilib.workbook import train_command

MINE = """
    from __future__ import annotations
    from dataclasses import dataclass
    from torch import nn
    from effilib import Method
    from neighbour_of_mine import count, width

    count()

    @dataclass(frozen=True, kw_only=True)
    class Mine(Method):
        rate: float = 0.5
        kind: str | None = None

        def on_step_end(self, run):
            run.log(self, f"rate {self.rate}")

    def net(classes, channels=1):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, classes))
"""
NEIGHBOUR = """
    import pathlib
    width = 8

    def count():
        with open(pathlib.Path(__file__).parent / "loaded", "a") as file:
            file.write("x")
"""


@pytest.fixture
def mine(tmp_path):
    write(tmp_path / "mine.py", MINE)
    write(tmp_path / "neighbour_of_mine.py", NEIGHBOUR)
    yield tmp_path / "mine.py"
    sys.modules.pop("neighbour_of_mine", None)
    sys.path[:] = [p for p in sys.path if not p.startswith(str(tmp_path))]


def write(file, text):
    file.parent.mkdir(exist_ok=True)
    file.write_text(textwrap.dedent(text))
    return file


def test_a_file_is_executed_once_with_its_folder_and_its_annotations(mine, tmp_path, monkeypatch):
    method = train_command.method(
        f"{mine}:Mine", "rate=0.25", "kind=x"
    )  # the types are words until asked for
    assert (method.rate, method.kind) == (0.25, "x")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.py").symlink_to(mine)
    for name in (f"{mine}:net", "mine.py:net", "./mine.py:net", "link.py:net"):
        models.build(name, 4, (1, 8, 8))
        provenance.named_source(name)
    assert (tmp_path / "loaded").read_text() == "x"
    assert provenance.settings(method)["class"] == "mine.Mine"  # no private name in records and keys


def test_an_edited_file_is_loaded_anew_and_what_was_made_of_the_old_one_goes_on(mine):
    before = train_command.method(f"{mine}:Mine")
    digest = provenance.source(before)
    mine.write_text(mine.read_text().replace("0.5", "0.75"))
    after = train_command.method(f"{mine}:Mine")
    assert (before.rate, after.rate) == (0.5, 0.75)
    assert provenance.source(before) == digest != provenance.source(after)
    mine.write_text(mine.read_text().replace("0.75", "0.5"))
    assert type(train_command.method(f"{mine}:Mine")) is type(before)
    assert provenance.named_source(f"{mine}:Mine") == provenance.named_source(f"{mine}:Mine")


def test_a_worker_process_finds_the_class_again(mine):
    method = train_command.method(f"{mine}:Mine", "rate=0.25")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(provenance.settings, method).result() == provenance.settings(method)
    assert pickle.loads(pickle.dumps(method)) == method


def command(*words, **environment):
    return subprocess.run(
        [sys.executable, *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(paths.root()), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )


def test_the_installed_command_finds_the_neighbour(mine, tmp_path):
    start = "import sys; from effilib.__main__ import main; sys.exit(main())"  # as the entry point does
    words = [
        "train",
        "--preset",
        "smoke",
        "--dataset",
        "synthetic",
        "--epochs",
        "0.25",
        "--out",
        tmp_path / "o",
    ]
    words += ["--method", f"{mine}:Mine", "--network", f"{mine}:net"]
    done = command("-P", "-c", start, *words)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "loaded").read_text() == "x"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("raise SystemExit('bye')", r"cannot import .*mine\.py \(it ends the program .*: exit\('bye'\)\)"),
        ("exit(3)", r"it ends the program when it is imported: exit\(3\)"),
        ("def net(:", "cannot import .*invalid syntax"),
        ("import random", r"it imports random, of which there are two: .*random\.py, .*random\.py"),
        ("import sys", "it imports sys, of which there are two: "),
    ],
)
def test_a_file_that_cannot_be_loaded_is_one_sentence(text, sentence, tmp_path):
    for name in ("random", "sys"):
        write(tmp_path / f"{name}.py", "")
    file = write(tmp_path / "mine.py", text)
    for what in (
        lambda: models.build(f"{file}:net", 4, (1, 8, 8)),
        lambda: train_command.method(f"{file}:net"),
    ):
        with pytest.raises(BadInput, match=sentence) as error:
            what()
        assert "\n" not in str(error.value)
    sys.path.remove(str(tmp_path))


def test_two_neighbours_of_one_name_do_not_stand_for_each_other(tmp_path):
    for place, width in (("a", 4), ("b", 6)):
        write(tmp_path / place / "shared_name.py", f"width = {width}")
        write(tmp_path / place / "mine.py", "from shared_name import width\ndef net(classes): ...")
    models.find(f"{tmp_path}/a/mine.py:net")
    with pytest.raises(BadInput, match=r"it imports shared_name, of which there are two: .*/b/.*, .*/a/"):
        models.find(f"{tmp_path}/b/mine.py:net")
    del sys.modules["shared_name"]
    sys.path[:] = [p for p in sys.path if not p.startswith(str(tmp_path))]


UNGUARDED = """
    from effilib import Arm, Method, Recipe, build, compare, load, task, train

    class Mine(Method):
        pass

    {call}
"""


@pytest.mark.parametrize(
    ("call", "what"),
    [
        ('compare(task("smoke", "synthetic"), [Arm(name="baseline", role="baseline")])', "a comparison"),
        (
            'train(build("convnet", 4, (1, 8, 8)), load("synthetic"), Recipe(epochs=1))',
            "a training",
        ),
    ],
)
def test_a_training_without_a_guard_is_refused_with_the_guard_in_words(call, what, tmp_path):
    file = write(tmp_path / "mine.py", UNGUARDED.format(call=call))
    with pytest.raises(BadInput, match=rf'mine\.py starts {what} .* `if __name__ == "__main__":`'):
        train_command.method(f"{file}:Mine")
    file.write_text(file.read_text().replace("\n" + call, '\nif __name__ == "__main__":\n    ' + call))
    assert train_command.method(f"{file}:Mine")
    user_files.refuse_while_loading("a training")  # none is being loaded any more
