"""The runner, with real papermill runs of tiny notebooks, and real signals. What happens when something
breaks is in `test_faults.py`.
"""

import json
import os
import signal
from dataclasses import replace

import nbformat
import pytest

from effilib import paths
from effilib.errors import BadInput
from effilib.workbook import runner
from tests.runs import WAIT, alive, command, status, wait_for, write_notebook

pytestmark = pytest.mark.usefixtures("results")

# One notebook over several runs


def test_up_to_date_changed_failed_and_mended(notebooks, folder, run, plan, tmp_path, capsys):
    flag = tmp_path / "fail"
    code = f"import pathlib\nassert not pathlib.Path({str(flag)!r}).exists(), 'as asked'"
    write_notebook(notebooks / "04_1_x.ipynb", code)
    assert run(parameters=[("epochs", "07")], name="mine") == 0
    folder = folder.with_name("mine")
    record = paths.read_json(folder / "04_1_x" / "record.json")
    assert (record["epochs"], record["preset"], record["dataset"], record["shared_machine"]) == (
        7,
        "smoke",
        "mnist5k",
        False,
    )
    first = (folder / "04_1_x" / "report.html").stat().st_mtime_ns

    capsys.readouterr()
    assert run(parameters=[("epochs", "7")], name="mine") == 0
    assert "04_1_x: up to date" in capsys.readouterr().out
    assert (folder / "04_1_x" / "report.html").stat().st_mtime_ns == first

    flag.touch()
    assert run(parameters=[("epochs", "8")], name="mine") == 1  # what came out of epochs=7 stays
    assert paths.read_json(folder / "04_1_x" / "record.json") == record
    assert (folder / "04_1_x" / "report.html").stat().st_mtime_ns == first
    state = paths.read_json(folder / "04_1_x" / "run.json")
    assert state["status"] == "failed"
    assert (
        state["reason"] == "AssertionError: as asked (the earlier result is kept; see failed/ for this run)"
    )
    assert "as asked" in (folder / "failed" / "04_1_x" / "report.html").read_text()
    assert 'href="failed/04_1_x/report.html"' in (folder / "index.html").read_text()

    flag.unlink()
    assert run(parameters=[("epochs", "8")], name="mine") == 0
    assert paths.read_json(folder / "04_1_x" / "record.json")["epochs"] == 8
    assert not (folder / "failed" / "04_1_x").exists()
    assert 'href="04_1_x/report.html"' in (folder / "index.html").read_text()


def test_key_follows_cells_parameters_and_files(notebooks, plan, tmp_path):
    write_notebook(notebooks / "04_1_x.ipynb", "1 + 1")
    (tmp_path / "mine.py").write_text("net = dict")

    def key():
        return runner.run_key(*plan(parameters=[("network", f"{tmp_path}/mine.py:net")]))

    before = key()
    content = nbformat.read(notebooks / "04_1_x.ipynb", as_version=4)
    content.cells[2].outputs = [nbformat.v4.new_output("stream", text="2")]
    nbformat.write(content, notebooks / "04_1_x.ipynb")
    assert key() == before  # outputs do not count
    (tmp_path / "mine.py").write_text("net = list")
    assert key() != before
    (tmp_path / "mine.py").write_text("net = dict")
    write_notebook(notebooks / "04_1_x.ipynb", "1 + 2")
    assert key() != before


def test_a_shared_machine_never_replaces_better_times(notebooks, plan):
    write_notebook(notebooks / "04_1_x.ipynb")
    (alone,) = (replace(job, key=runner.run_key(job)) for job in plan())
    shared = replace(alone, shared=True)
    alone.results.mkdir(parents=True)
    (alone.results / "report.html").touch()
    paths.write(alone.results / "run.json", {"status": "complete", "key": alone.key})
    for job, good_for in ((alone, [alone, shared]), (shared, [shared])):
        paths.write(alone.results / "record.json", {"status": "complete", "shared_machine": job.shared})
        assert [job for job in (alone, shared) if runner.up_to_date(job)] == good_for


def test_chapter_10_is_stale_when_another_result_changed(notebooks, folder, plan):
    for name in ("04_1_x", "10_all"):
        write_notebook(notebooks / f"{name}.ipynb")
    other, last = plan()
    before = runner.run_key(other), runner.run_key(last)
    (folder / "04_1_x").mkdir(parents=True)
    paths.write(folder / "04_1_x" / "record.json", {"status": "complete"})
    assert runner.run_key(other) == before[0]
    assert runner.run_key(last) != before[1]


# Interruptions


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_no_process(notebooks, folder, tmp_path, sign):
    write_notebook(notebooks / "04_1_waits.ipynb", WAIT.format(here=str(tmp_path)))
    write_notebook(notebooks / "04_2_next.ipynb")
    process = command(notebooks)
    wait_for((tmp_path / "pids.json").exists)
    pids = json.loads((tmp_path / "pids.json").read_text())
    assert all(map(alive, pids))
    process.send_signal(sign)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert not any(map(alive, pids))  # kernel, papermill, and the one in a session of its own
    assert "interrupted: none finished, 04_1_waits, 04_2_next not" in said
    assert "Traceback" not in said
    assert not [path for path in folder.rglob("*") if path.is_file() and path.name != ".running"]


def test_killed_run_is_resumed(notebooks, folder, tmp_path, run, capsys):
    write_notebook(notebooks / "02_first.ipynb")
    write_notebook(notebooks / "04_1_waits.ipynb", WAIT.format(here=str(tmp_path)))
    process = command(notebooks)
    wait_for((tmp_path / "pids.json").exists)
    kernel, papermill, hidden = json.loads((tmp_path / "pids.json").read_text())
    process.kill()
    process.communicate()
    wait_for(lambda: not alive(kernel) and not alive(papermill), 10)
    assert alive(hidden)  # nobody was left to end it: the next run does
    (tmp_path / "go").touch()
    assert run() == 0
    assert not alive(hidden)
    said = capsys.readouterr().out
    assert "02_first: up to date" in said
    assert "04_1_waits: complete" in said


def test_executed_notebook_that_cannot_be_written(notebooks, folder):
    write_notebook(notebooks / "04_1_long.ipynb", "print('x' * 500_000)")
    write_notebook(notebooks / "04_2_short.ipynb")
    process = command(notebooks, within="ulimit -f 200")  # no file over 200 KB, which looks like a full disk
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "04_1_long: the executed notebook cannot be written: File too large" in said
    assert "Traceback" not in said
    assert (status(folder, "04_1_long"), status(folder, "04_2_short")) == ("failed", "complete")


# What is checked before anything runs


def test_selectors(notebooks):
    names = ["02_overview", "03_1_cost", "03_2_mixed_precision", "10_comparison"]
    for name in names:
        write_notebook(notebooks / f"{name}.ipynb")

    def select(*selectors):
        return [path.stem for path in runner.select(selectors, notebooks)]

    assert select() == names
    assert select("03_2", "2") == ["02_overview", "03_2_mixed_precision"]
    assert select("3") == ["03_1_cost", "03_2_mixed_precision"]
    assert (
        select("3.1")
        == select("3_1")
        == select("notebooks/03_1_cost.ipynb")
        == select("03_1_co")
        == ["03_1_cost"]
    )
    for unknown in ("1", "04", "", "03_1_cots"):
        with pytest.raises(
            BadInput, match=r"unknown notebook.*02_overview, 03_1_cost, 03_2_mixed_precision, 10_comparison"
        ):
            select(unknown)


def test_values_have_the_type_of_the_default(notebooks, plan):
    write_notebook(notebooks / "04_1_x.ipynb")
    given = {"epochs": "07", "lr": "1", "amp": "True", "widths": "[8, 8]", "tag": "5"}
    (job,) = plan(parameters=given.items())
    assert job.parameters == {
        "epochs": 7,
        "lr": 1.0,
        "amp": True,
        "widths": [8, 8],
        "tag": "5",
        "preset": "smoke",
        "dataset": "mnist5k",
    }
    assert job.folder.name == "smoke-mnist5k-amp=True-epochs=07-lr=1-tag=5-widths=_8_8_"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("epoch", "3", "unknown parameter of 04_1_x 'epoch': choose one of preset, .*did you mean 'epochs'"),
        ("epochs", "many", "parameter 'epochs' of 04_1_x takes values of type int such as 3, not 'many'"),
        ("epochs", "2.5", "type int"),
        ("lr", "fast", "type float"),
        ("amp", "yes", "type bool"),
        ("widths", "3", "type list"),
        ("preset", "quikc", "unknown preset 'quikc'.*did you mean 'quick'"),
        ("dataset", "mnist6k", "unknown data set 'mnist6k'.*mnist5k"),
        ("dataset", "no/such.npz", "no such file"),
        ("network", "resnt", "unknown network 'resnt'.*did you mean 'resnet'"),
        ("network", "mine.py:net", "cannot import .*mine.py"),
    ],
)
def test_bad_parameters(notebooks, plan, name, text, message):
    write_notebook(notebooks / "04_1_x.ipynb")
    with pytest.raises(BadInput, match=message):
        plan(parameters=[(name, text)])


def test_a_parameter_is_known_to_every_notebook_but_the_data_set_to_one(notebooks, plan):
    write_notebook(notebooks / "04_1_x.ipynb")
    write_notebook(notebooks / "04_2_y.ipynb", parameters="preset = ''")
    with pytest.raises(BadInput, match="unknown parameter of 04_2_y 'epochs'"):
        plan(parameters=[("epochs", "3")])
    x, y = plan(parameters=[("dataset", "fashion_mnist")])
    assert (x.parameters["dataset"], "dataset" in y.parameters) == ("fashion_mnist", False)
    with pytest.raises(BadInput, match="04_2_y has none"):
        plan("04_2", parameters=[("dataset", "fashion_mnist")])


def test_files_are_found_from_the_folder_where_the_command_was_typed(notebooks, plan, tmp_path, monkeypatch):
    write_notebook(notebooks / "04_1_x.ipynb")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my photos").mkdir()
    (tmp_path / "mine.py").write_text("net = dict")
    (job,) = plan(parameters=[("dataset", "my photos"), ("network", "mine.py:net")])
    assert job.parameters["dataset"] == str(tmp_path / "my photos")
    assert job.parameters["network"] == f"{tmp_path}/mine.py:net"
    assert job.folder.name == "smoke-my_photos-network=mine.py_net"


@pytest.mark.parametrize("name", ["recorded", "../x", ".hidden", "a b"])
def test_bad_names_of_folders(notebooks, plan, name):
    write_notebook(notebooks / "04_1_x.ipynb")
    with pytest.raises(BadInput, match="--name"):
        plan(name=name)


def test_broken_notebook_is_named(notebooks, plan):
    write_notebook(notebooks / "04_1_x.ipynb", parameters="epochs = = 3")
    with pytest.raises(BadInput, match=r"the parameters of .*04_1_x\.ipynb cannot be read"):
        plan()
    (notebooks / "04_1_x.ipynb").write_text("{}")
    with pytest.raises(BadInput, match=r"04_1_x\.ipynb is not a notebook"):
        plan()


def test_results_that_cannot_be_written(notebooks, run, tmp_path, monkeypatch):
    write_notebook(notebooks / "04_1_x.ipynb")
    (tmp_path / "file").touch()
    monkeypatch.setenv("EFFILIB_RESULTS", str(tmp_path / "file" / "results"))
    with pytest.raises(BadInput, match="cannot write results into"):
        run()


def test_folder_without_notebooks(run, tmp_path):
    with pytest.raises(BadInput, match="no notebooks in"):
        run(notebooks=tmp_path)


# What is said


def headline(ratio, low=None, high=None, verdict=""):
    return {
        "schema": 1,
        "status": "complete",
        "duration_s": 33.0,
        "headline": {"ratio": ratio, "low": low, "high": high, "verdict": verdict},
    }


def test_comparison_with_the_recorded(notebooks, plan, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "recorded", lambda: tmp_path / "recorded")
    cases = {
        "04_1": (
            headline(1.5, 1.4, 1.6),
            headline(1.45, 1.3, 1.6),
            "1.50x [1.40, 1.60]      1.45x [1.30, 1.60]      yes",
        ),
        "04_2": (headline(1.1, 1.0, 1.2), headline(1.45, 1.3, 1.6), "no, slower"),
        "04_3": (headline(1.5, 1.4, 1.6), None, "not recorded            -"),
        "04_4": (
            headline(None, verdict="target missed"),
            headline(1.45, 1.3, 1.6),
            "target missed           1.45x [1.30, 1.60]      -",
        ),
        "04_5": ({"schema": 1, "status": "complete", "headline": None}, None, None),
    }
    for name in cases:
        write_notebook(notebooks / f"{name}.ipynb")
    planned = plan()
    for job in planned:
        for folder, record in zip((job.results, job.recorded), cases[job.name], strict=False):
            folder.mkdir(parents=True)
            if record:
                paths.write(folder / "record.json", record)
    table = runner.comparison(planned).splitlines()
    assert table[0].split()[:3] == ["notebook", "this", "run"]
    assert len(table) == 5  # 04_5 has no headline
    for line, (_, _, end) in zip(table[1:], cases.values(), strict=False):
        assert line.endswith(end)
    assert runner.expected(planned[0]) == 33.0  # as recorded
    assert runner.expected(planned[4]) == runner.SECONDS["smoke"]


def test_live_line_on_a_terminal(notebooks, plan, tmp_path):
    write_notebook(notebooks / "04_1_x.ipynb")
    (job,) = plan()
    main, terminal = os.openpty()
    with os.fdopen(terminal, "w") as stream:
        progress = runner.Progress(stream)
        progress.running([job])
        progress.ended(runner.Outcome(job.name, "complete", seconds=61.2))
        stream.flush()
        said = ""
        while "complete" not in said:
            said += os.read(main, 10_000).decode()
    os.close(main)
    assert said.startswith("\r\x1b[K04_1_x: 0.0 s of 10 s\r\x1b[K04_1_x: complete in 61 s")


# What is kept


def test_only_whole_measurements_are_recorded(notebooks, results, run, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "recorded", lambda: tmp_path / "recorded")
    monkeypatch.setattr(paths, "root", lambda: tmp_path)
    (tmp_path / "README.md").write_text("before\n<!-- chapters -->\n<!-- /chapters -->\nafter\n")
    write_notebook(notebooks / "03_2_mixed_precision.ipynb")
    which = {"preset": "quick", "notebooks": notebooks}
    with pytest.raises(
        BadInput,
        match="holds no complete result of 03_2_mixed_precision: effilib run 03_2_mixed_precision --preset quick",
    ):
        runner.keep(**which)
    assert run(preset="quick") == 0
    assert runner.keep(**which) == [tmp_path / "recorded" / "quick-mnist5k" / "03_2_mixed_precision"]
    kept = tmp_path / "recorded" / "quick-mnist5k" / "03_2_mixed_precision" / "record.json"
    assert (
        kept.read_bytes() == (results / "quick-mnist5k" / "03_2_mixed_precision" / "record.json").read_bytes()
    )
    assert [file.name for file in kept.parent.iterdir()] == ["record.json"]  # this one drew nothing
    readme = (tmp_path / "README.md").read_text()
    assert "| 3.2 | " in readme
    assert readme.startswith("before\n")
    assert readme.endswith("after\n")

    paths.write(results / "quick-mnist5k" / "03_2_mixed_precision" / "run.json", {"status": "failed"})
    with pytest.raises(BadInput, match="no complete result"):
        runner.keep(**which)
    assert run(preset="smoke") == 0
    with pytest.raises(BadInput, match="is not a measurement"):
        runner.keep(**which | {"preset": "smoke"})
    assert not (tmp_path / "recorded" / "smoke-mnist5k").exists()
