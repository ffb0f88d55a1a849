"""The runner, with real papermill runs of tiny notebooks, and real signals.

What happens when something breaks is in `test_faults.py`.
"""

import fcntl
import json
import math
import os
import re
import signal
import time
from dataclasses import replace

import nbformat
import numpy as np
import pytest

from effilib import clock, paths
from effilib.errors import BadInput
from effilib.statistics import Length, equal_accuracy
from effilib.workbook import runner
from tests.runs import RECORD, WAIT, alive, command, status, wait_for, write_notebook

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


# What may run at the same time


def test_a_notebook_measures_nothing_while_a_report_is_rendered(notebooks, folder, tmp_path):
    write_notebook(notebooks / "04_1_x.ipynb", f"open({str(tmp_path / 'measures')!r}, 'w').close()")
    content = nbformat.read(notebooks / "04_1_x.ipynb", as_version=4)
    imports = nbformat.v4.new_code_cell(f"open({str(tmp_path / 'imports')!r}, 'w').close()")
    content.cells.insert(1, imports)
    nbformat.write(content, notebooks / "04_1_x.ipynb")
    folder.mkdir(parents=True)
    with (folder / ".rendering").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = command(notebooks)
        wait_for((tmp_path / "imports").exists)
        time.sleep(1)  # it could have gone on
        assert not (tmp_path / "measures").exists()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert (tmp_path / "measures").exists()


def test_the_next_notebook_starts_while_a_report_is_rendered(notebooks, run, tmp_path, monkeypatch):
    begun, seen = [], []
    for name in ("04_1_x", "04_2_y"):
        write_notebook(notebooks / f"{name}.ipynb")
    start_one, finish = runner.start_one, runner.finish
    monkeypatch.setattr(runner, "start_one", lambda job: begun.append(job.name) or start_one(job))

    def slow(job, ran):
        if job.name == "04_1_x":
            wait_for(lambda: len(begun) == 2)
            seen.append((job.results / "report.html").exists())
        return finish(job, ran)

    monkeypatch.setattr(runner, "finish", slow)
    assert run() == 0
    assert seen == [False]


def test_it_says_where_something_else_is_measured(notebooks, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(clock, "NOTES", tmp_path / "notes")
    write_notebook(notebooks / "04_1_x.ipynb")
    with clock.Measuring():
        assert run() == 0
    assert "something else is being measured on this machine" in capsys.readouterr().out
    # What the notebook saw itself stands in its record; measured alone, it runs again.
    write_notebook(
        notebooks / "04_1_x.ipynb", record=RECORD.replace('os.environ.get("EFFILIB_SHARED") == "1"', "True")
    )
    assert run() == 0
    said = capsys.readouterr().out
    assert "something else is being measured" not in said
    assert "; something else was measured at the same time, so no verdicts" in said
    assert run() == 0
    assert "up to date" not in capsys.readouterr().out


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
    left = {path.name for path in folder.rglob("*") if path.is_file()}
    assert left <= {".running", "index.html"}
    index = (folder / "index.html").read_text()
    assert index.count("> not run</span>") == 2  # what was planned has its rows from the beginning


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
    assert re.fullmatch("smoke-my_photos-network=mine.py_net-[0-9a-f]{4}", job.folder.name)


def test_data_sets_of_one_name_do_not_share_a_folder(notebooks, plan, tmp_path):
    write_notebook(notebooks / "04_1_x.ipynb")
    folders = []
    for place in ("a", "b"):
        (tmp_path / place / "photos").mkdir(parents=True)
        for dataset in (f"{tmp_path}/{place}/photos", f"{tmp_path}/{place}/photos/../photos"):
            (job,) = plan(parameters=[("dataset", dataset)])
            folders.append(job.folder.name)
    assert folders[0] == folders[1] != folders[2] == folders[3]
    assert all(name.startswith("smoke-photos-") for name in folders)


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


def record(ratio=None, low=None, high=None, verdict="faster", kind="gap", **changes):
    head = {"ratio": ratio, "low": low, "high": high, "verdict": verdict, "kind": kind, "n": 5, "lengths": 3}
    head |= {"range": [70.0, 75.0], "text": "as it was said", "cost": "seconds", "p": 0.01}
    rest = {"schema": 2, "status": "complete", "preset": "smoke", "dataset": "mnist5k", "duration_s": 33.0}
    return rest | {"headline": head} | changes


RECORDED = record(1.45, 1.3, 1.6)
COMPARED = {  # name -> this run, the recorded one, what the line ends in
    "04_1": (record(1.62, 1.5, 1.7), RECORDED, "1.45x [1.30, 1.60]      [1.24, 1.67]      yes"),
    "04_2": (record(1.1, 1.0, 1.2), RECORDED, "no, slower"),
    "04_3": (record(1.5, 1.4, 1.6), None, "not recorded            -                 -"),
    "04_4": (
        record(0.4, verdict="out of reach: at most 0.40x", kind="at most"),
        RECORDED,
        "-                 -",
    ),
    "04_5": (record(headline=None), RECORDED, None),
    "04_6": (record(1.5, 1.4, 1.6), RECORDED | {"schema": 1}, "older protocol          -                 -"),
    "04_7": (record(1.9, 1.8, 2.0), RECORDED, "no, faster"),
}


def test_comparison_with_the_recorded(notebooks, plan, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "recorded", lambda: tmp_path / "recorded")
    for name in COMPARED:
        write_notebook(notebooks / f"{name}.ipynb")
    planned = plan()
    for job in planned:
        for folder, content in zip((job.results, job.recorded), COMPARED[job.name], strict=False):
            folder.mkdir(parents=True)
            if content:
                paths.write(folder / "record.json", content)
    table = runner.comparison(planned).splitlines()
    assert table[0].split()[:3] == ["notebook", "this", "run"]
    assert "prediction" in table[-1]
    lines = {line.split()[0]: line for line in table[1:-1]}
    assert set(lines) == set(COMPARED) - {"04_5"}  # which has no headline
    for name, line in lines.items():
        assert line.endswith(COMPARED[name][2]), name


def test_an_exact_repetition_fails_in_five_per_cent():
    """Of pairs of runs of one truth, whose ratios are judged as `--compare recorded` does."""
    rng, inside = np.random.default_rng(0), []

    def measured(cells=5, lengths=(0.5, 0.71, 1.0), ratio=1.3):
        arms = []
        for factor in (1, ratio):
            points = [(100 * x / factor, 80 + 10 * math.log(x)) for x in lengths]
            noise = [rng.normal(0, 1, (2, cells)) for _ in points]
            arms.append(
                [
                    Length(costs=tuple(t * np.exp(0.01 * e[0])), accuracies=tuple(a + 0.6 * e[1]))
                    for (t, a), e in zip(points, noise, strict=True)
                ]
            )
        found = equal_accuracy(*arms)
        return {"ratio": found.value, "low": found.low, "high": found.high, "kind": found.kind}

    for _ in range(500):
        inside.append(runner._inside(measured(), measured())[1] == "yes")
    assert 0.925 <= np.mean(inside) <= 0.975  # 12 % fail by the interval of the mean


def test_how_long_it_takes_is_known_from_earlier_runs(notebooks, plan, results, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "recorded", lambda: tmp_path / "recorded")
    write_notebook(notebooks / "04_1_x.ipynb")
    (job,) = plan()
    assert runner.expected(job) is None
    other = results / "elsewhere" / job.name
    other.mkdir(parents=True)
    paths.write(other / "record.json", record(1.2, duration_s=50.0, preset="study"))
    assert runner.expected(job) is None  # another preset
    paths.write(other / "record.json", record(1.2, duration_s=50.0))
    assert runner.expected(job) == 50.0
    job.results.mkdir(parents=True)
    paths.write(job.results / "record.json", record(1.2, duration_s=3.0))  # from the cache
    paths.write(job.results / "run.json", {"status": "complete", "seconds": 55.0})
    assert runner.expected(job) == 55.0
    job.recorded.mkdir(parents=True)
    paths.write(job.recorded / "record.json", record(1.2, duration_s=70.0, schema=1))
    assert runner.expected(job) == 55.0  # of an older protocol, which took another time


def test_live_line_on_a_terminal(notebooks, plan, tmp_path):
    write_notebook(notebooks / "04_1_x.ipynb")
    (job,) = plan()
    job.results.mkdir(parents=True)
    paths.write(job.results / "record.json", record(1.2))
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
    assert said.startswith("\r\x1b[K04_1_x: 0.0 s of 33 s\r\x1b[K04_1_x: complete in 61 s")


# What is kept


def test_only_whole_measurements_are_recorded(notebooks, results, run, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "recorded", lambda: tmp_path / "recorded")
    monkeypatch.setattr(paths, "root", lambda: tmp_path)
    (tmp_path / "README.md").write_text("before\n<!-- chapters -->\n<!-- /chapters -->\nafter\n")
    write_notebook(notebooks / "03_2_mixed_precision.ipynb")
    which = {"preset": "quick", "notebooks": notebooks}
    missing = (
        "holds no complete result of 03_2_mixed_precision: effilib run 03_2_mixed_precision --preset quick"
    )
    with pytest.raises(BadInput, match=missing):
        runner.keep(**which)
    assert run(preset="quick") == 0
    assert runner.keep(**which) == [tmp_path / "recorded" / "quick-mnist5k" / "03_2_mixed_precision"]
    kept = tmp_path / "recorded" / "quick-mnist5k" / "03_2_mixed_precision" / "record.json"
    assert (
        kept.read_bytes() == (results / "quick-mnist5k" / "03_2_mixed_precision" / "record.json").read_bytes()
    )
    kept_files = {file.name for file in kept.parent.iterdir()}
    assert kept_files == {"record.json", "report.html"}  # this one drew nothing
    index = (tmp_path / "recorded" / "index.html").read_text()
    assert 'href="quick-mnist5k/03_2_mixed_precision/report.html"' in index
    assert (tmp_path / "recorded" / "all.csv").read_text().startswith("notebook,preset,dataset,network,")
    readme = (tmp_path / "README.md").read_text()
    assert "| 3.2 | " in readme
    assert readme.startswith("before\n")
    assert readme.endswith("after\n")

    place = results / "quick-mnist5k" / "03_2_mixed_precision"
    good = paths.read_json(place / "record.json")
    for changes, reason in (
        ({"schema": 1}, "older protocol"),
        ({"shared_machine": True}, "not a measurement .from a shared machine."),
        ({"preset": "study"}, "holds preset study on mnist5k: give --preset study -p dataset mnist5k, too"),
        ({"parameters": {"dataset": "/b/photos"}}, "recorded from another data set of this name, /a/photos"),
    ):
        paths.write(place / "record.json", good | changes)
        paths.write(kept, good | {"parameters": {"dataset": "/a/photos"}})
        with pytest.raises(BadInput, match=reason):
            runner.keep(**which)
    study = results / "study-mnist5k" / "03_2_mixed_precision"
    study.mkdir(parents=True)
    for commit, reason in ((None, "outside of a checkout"), ("abc1234+", "with changed files")):
        paths.write(study / "run.json", {"status": "complete"})
        paths.write(study / "record.json", good | {"commit": commit, "preset": "study"})
        with pytest.raises(BadInput, match=f"was measured {reason}"):
            runner.keep(**which | {"preset": "study", "parameters": [("dataset", "mnist5k")]})
    assert not (tmp_path / "recorded" / "study-mnist5k").exists()
    paths.write(place / "run.json", {"status": "failed"})
    with pytest.raises(BadInput, match="no complete result"):
        runner.keep(**which)
    assert run(preset="smoke") == 0
    with pytest.raises(BadInput, match="is not a measurement"):
        runner.keep(**which | {"preset": "smoke"})
    assert not (tmp_path / "recorded" / "smoke-mnist5k").exists()
