"""The command line: one line for what is wrong, an exit code for every end, and quick to answer."""

import os
import re
import subprocess
import sys

import nbformat
import pytest

from effilib import __main__ as command
from effilib import __version__, paths, tuning


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """A folder with one notebook; results go beside it."""
    new = nbformat.v4
    parameters = new.new_code_cell('preset = ""\nepochs = 3', metadata={"tags": ["parameters"]})
    (tmp_path / "notebooks").mkdir()
    nbformat.write(
        new.new_notebook(cells=[new.new_markdown_cell("# One"), parameters]),
        tmp_path / "notebooks" / "04_1_one.ipynb",
    )
    monkeypatch.setenv("EFFILIB_RESULTS", str(tmp_path / "results"))
    return tmp_path / "notebooks"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["05"], "unknown notebook '05': choose one of 04_1_one"),
        (
            ["--preset", "quikc"],
            "unknown preset 'quikc': choose one of smoke, quick, study, full (did you mean 'quick'?)",
        ),
        (["-p", "epoch", "3"], "unknown parameter of 04_1_one 'epoch'"),
        (["-p", "epochs", "many"], "parameter 'epochs' of 04_1_one takes values of type int"),
        (["-p", "dataset", "mnist6k"], "unknown data set 'mnist6k'"),
        (["-p", "epochs"], "argument -p: expected 2 arguments"),
        (["--jobs", "0"], "--jobs is the number of notebooks at a time, at least 1, not 0"),
        (
            ["--jobs", "2", "--scheduler", "tcp://head:8786"],
            "--jobs is for this machine; with --scheduler, the workers' GPUs or threads say",
        ),
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


def test_list(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "notebooks", lambda: tmp_path)
    monkeypatch.setattr(paths, "recorded", lambda: tmp_path / "recorded")
    head = {"text": "2.10x [1.90, 2.30] at 70-75 %, n=5x3", "verdict": "faster"}
    for name, schema in (("03_1_convolution_cost", 0), ("03_2_mixed_precision", 2), ("06_2_net2net", 1)):
        (tmp_path / f"{name}.ipynb").touch()
        place = tmp_path / "recorded" / "study-cifar10" / name
        if schema:
            place.mkdir(parents=True)
            record = {"status": "complete", "schema": schema, "date": "2026-11-24", "headline": head}
            paths.write(place / "record.json", record)
    assert command.main(["list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert (
        " ".join(lines["3.1"].split())
        == "3.1 What a convolution costs 03_1_convolution_cost nothing recorded"
    )
    said = "study-cifar10 2.10x [1.90, 2.30] at 70-75 %, n=5x3: faster"
    assert lines["3.2"].endswith(f" 03_2_mixed_precision                 {said}")
    assert lines["6.2"].endswith(" study-cifar10 older protocol")
    assert lines["II.9"].endswith(" 09_prune_then_grow                   no notebook yet")


def test_tune(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "recorded", lambda: tmp_path)
    line = ["tune", "--preset", "smoke", "--dataset", "mnist5k", "--epochs", "0.5", "0.25"]
    line += ["--lr", "0.1", "0.2", "--weight-decay", "5e-4", "--seeds", "1000"]
    assert command.main(line) == 0
    said = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in said[:-2]] == ["1/2", "2/2", "1/2", "2/2"]
    for row, epochs in zip(said[-2:], ("0.25", "0.5"), strict=True):
        best = r"[\d.]+ %, at least [\d.]+ % \(n=1\) with lr 0\.[12], weight_decay 0\.0005"
        assert re.fullmatch(f"baseline, {re.escape(epochs)} epochs: {best}", row)
    (file,) = (tmp_path / "tuning").glob("smoke-mnist5k*.csv")
    assert len(file.read_text().splitlines()) == 5
    assert command.main(line) == 0
    assert capsys.readouterr().out.splitlines() == said[-2:]  # nothing is left to run


def test_a_chapters_arms_are_tuned_around_the_baselines_rate(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "recorded", lambda: tmp_path)
    line = [
        "tune",
        "04_2",
        "--preset",
        "smoke",
        "--dataset",
        "synthetic",
        "--epochs",
        "0.5",
        "--seeds",
        "1000",
    ]
    assert command.main(line) == 0
    (file,) = (tmp_path / "tuning").glob("*.csv")
    rates = {}
    for row in tuning.read(file):
        rates.setdefault(row["arm"], []).append(row["setting"]["lr"])
    assert len(rates) > 2
    assert all(sorted(found) == [0.05, 0.1, 0.2] for found in rates.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "studdy"], "unknown preset 'studdy'"),
        (["--dataset", "mnist6k"], "unknown data set 'mnist6k'"),
        (["--variant", "deep"], "unknown variant 'deep': choose one of base, wide"),
        (["04_9"], "unknown chapter to tune '04_9': choose one of 03_4, 04_1, 04_2"),
        (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
    ],
)
def test_bad_input_to_tune(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(paths, "recorded", lambda: tmp_path / "recorded")
    assert command.main(["tune", *arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"effilib: {message}")
    assert said.err.count("\n") == 1
    assert not (tmp_path / "recorded").exists()


def test_failed_run_gives_1(notebooks, capsys):
    assert command.main(["run", "--preset", "smoke", "--notebooks", str(notebooks), "-p", "epochs", "5"]) == 1
    said = capsys.readouterr()
    assert "04_1_one: it wrote no complete record.json" in said.out
    assert "smoke-mnist5k-epochs=5" in said.out
    assert said.err == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--version"], f"effilib {__version__}"),
        (["--help"], "every method measured under one protocol. "),
        (["run", "--help"], "Execute notebooks, all or some, "),
        (["record", "--help"], "Copy a run's results into results/recorded"),
        (["list", "--help"], "Show the series, "),
        (["train", "--help"], "speed_run: chapter 11's own network and recipe, which excludes --network"),
        (["predict", "--help"], "Classify new pictures with a trained network. "),
        (["advise", "--help"], "Find which methods save time on your images, network and machine: "),
        (["tune", "--help"], "Tune a task's baseline, or all arms of a chapter alike: "),
    ],
)
def test_help_says_what_a_command_does(capsys, arguments, says):
    with pytest.raises(SystemExit) as end:
        command.main(arguments)
    assert end.value.code == 0
    assert says in " ".join([*capsys.readouterr().out.split(), ""])


def test_help_imports_nothing_heavy():
    heavy = ("torch", "papermill", "numpy", "effilib.workbook.runner")
    code = f"import sys, effilib.__main__; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=paths.root(), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    assert __version__


def test_whoever_stops_reading_ends_it_quietly():
    line = [sys.executable, "-m", "effilib", "list"]
    environment = {**os.environ, "PYTHONPATH": str(paths.root())}
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (141, b"")


def test_a_data_set_whose_name_is_no_text_is_refused_where_it_would_be_written(notebooks, tmp_path, capsys):
    place = tmp_path / os.fsdecode(b"\xff")
    place.mkdir()
    add = nbformat.v4.new_code_cell('preset = dataset = ""', metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[add]), notebooks / "04_1_one.ipynb")
    assert command.main(["run", "--notebooks", str(notebooks), "-p", "dataset", str(place)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("effilib: parameter dataset: ")
    assert said.endswith("is no text: give the file another name\n")
    assert not (tmp_path / "results").exists()
