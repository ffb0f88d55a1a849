"""How far long work has come, in a terminal and in a notebook."""

import os

import nbclient
import nbformat
import pytest

from effilib import paths
from effilib.progress import Progress, say_seconds


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0.0 s"), (3.44, "3.4 s"), (9.9, "9.9 s"), (10, "10 s"), (48.4, "48 s"), (99, "99 s"),
        (100, "2 min"), (299, "5 min"),
        (3569, "59 min"), (3571, "1 h 0 min"), (7500, "2 h 5 min"), (90_000, "25 h 0 min"),
    ],
)  # fmt: skip
def test_seconds_are_said_as_a_person_would(seconds, said):
    assert say_seconds(seconds) == said


def test_in_a_terminal_each_run_is_a_line(capsys):
    p = Progress("compare", 3)
    p.done("seed 0, baseline")
    p.done("seed 0, method")
    p.done("seed 0, control")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("compare: 1 of 3, about 0.0 s left: seed 0, baseline")
    assert lines[1].startswith("compare: 2 of 3")
    assert lines[2].startswith("compare: 3 of 3, 0.0 s: seed 0, control")


def test_what_is_left_follows_the_work_that_is_left(monkeypatch, capsys):
    now = iter([0.0, 10.0, 40.0])
    monkeypatch.setattr("effilib.progress.now", lambda: next(now))
    p = Progress("compare", 3, work=1 + 3 + 6)
    p.done("short", work=1)
    p.done("middle", work=3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("compare: 1 of 3, about 90 s left")
    assert lines[1].startswith("compare: 2 of 3, about 60 s left")


def test_in_a_notebook_the_line_is_rewritten_in_place(tmp_path, monkeypatch):
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(filter(None, [str(paths.root()), os.environ.get("PYTHONPATH")]))
    )
    code = (
        "from effilib.progress import Progress\n"
        "p = Progress('compare', 9)\n"
        "for i in range(9): p.done(f'line {i}')\n"
    )  # fmt: skip
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(book, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (output,) = book.cells[0].outputs  # one output, whatever was rewritten
    text = output["data"]["text/plain"]
    assert text.startswith("compare: 9 of 9, ")
    assert text.splitlines()[1:] == [f"line {i}" for i in range(9 - Progress.KEEP, 9)]
