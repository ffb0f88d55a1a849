"""The command line: one line for what is wrong, an exit code for every end, and quick to answer."""

import os
import subprocess
import sys

import nbformat
import pytest

from effilib import __main__ as command
from effilib import __version__, paths


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """A folder with one notebook; results go beside it."""
    new = nbformat.v4
    parameters = new.new_code_cell('preset = ""\nepochs = 3', metadata={"tags": ["parameters"]})
    (tmp_path / "notebooks").mkdir()
    nbformat.write(new.new_notebook(cells=[new.new_markdown_cell("# One"), parameters]), tmp_path / "notebooks" / "04_1_one.ipynb")
    monkeypatch.setenv("EFFILIB_RESULTS", str(tmp_path / "results"))
    return tmp_path / "notebooks"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["05"], "unknown notebook '05': choose one of 04_1_one"),
        (["--preset", "quikc"], "unknown preset 'quikc': choose one of smoke, quick, study, full (did you mean 'quick'?)"),
        (["-p", "epoch", "3"], "unknown parameter of 04_1_one 'epoch'"),
        (["-p", "epochs", "many"], "parameter 'epochs' of 04_1_one takes values of type int"),
        (["-p", "dataset", "mnist6k"], "unknown data set 'mnist6k'"),
        (["-p", "epochs"], "argument -p: expected 2 arguments"),
        (["--jobs", "0"], "--jobs is the number of notebooks at a time, at least 1, not 0"),
        (["--jobs", "two"], "argument --jobs: invalid int value: 'two'"),
        (["--timeout", "0"], "--timeout is a number of seconds"),
        (["--name", "recorded"], "--name 'recorded' cannot name the results"),
        (["--compare", "mine"], "argument --compare: invalid choice: 'mine'"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_bad_input_is_one_line(notebooks, tmp_path, capsys, arguments, message):
    assert command.main(["run", "--notebooks", str(notebooks), *arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"effilib: {message}")
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert not (tmp_path / "results").exists()  # nothing half-written


def test_no_command(capsys):
    assert command.main([]) == 2
    assert capsys.readouterr().err.startswith("effilib: the following arguments are required")


def test_unwritable_results_as_a_process(notebooks, tmp_path):
    (tmp_path / "file").touch()
    environment = {**os.environ, "EFFILIB_RESULTS": str(tmp_path / "file" / "below")}
    line = [sys.executable, "-m", "effilib", "run", "--preset", "smoke", "--notebooks", str(notebooks)]
    done = subprocess.run(line, env=environment, cwd=paths.root(), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"effilib: cannot write results into {tmp_path / 'file' / 'below'}")
    assert done.stderr.count("\n") == 1


def test_list(notebooks, capsys):
    assert command.main(["list", "--notebooks", str(notebooks)]) == 0
    assert "4.1      One    04_1_one" in capsys.readouterr().out


def test_failed_run_gives_1(notebooks, capsys):
    assert command.main(["run", "--preset", "smoke", "--notebooks", str(notebooks), "-p", "epochs", "5"]) == 1
    said = capsys.readouterr()
    assert "04_1_one: it wrote no complete record.json" in said.out
    assert "smoke-mnist5k-epochs=5" in said.out
    assert said.err == ""


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"]])
def test_help(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        command.main(arguments)
    assert end.value.code == 0
    assert "effilib" in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    code = "import sys, effilib.__main__; print([m for m in ('torch', 'papermill', 'numpy', 'effilib.runner') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=paths.root(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert __version__
