"""The fault table: whatever breaks, nothing is lost or half-written, and one sentence names the reason.

kernel killed, cell timeout       test_faults::test_failure_has_its_reason (so does a full disk within a cell)
  and the rest of the series      test_faults::test_the_rest_goes_on
                                  test_faults::test_no_process_and_no_half_result_is_left
disk full, or read-only           test_faults::test_a_disk_that_fills_up
                                  test_runner::test_executed_notebook_that_cannot_be_written
                                  test_notebook::test_a_full_disk_leaves_the_record_that_was_there
results folder not to be written  test_paths::test_a_folder_that_cannot_be_made_is_named
                                  test_paths::test_a_folder_that_takes_no_files_is_named
                                  test_main::test_unwritable_results_as_a_process
                                  test_notebook::test_results_that_cannot_be_written_are_bad_input
                                  test_experiment::test_results_that_cannot_be_written_are_bad_input_before_anything_runs
corrupted cache entry             test_experiment::test_a_damaged_file_of_the_cache_is_measured_again
corrupted record                  test_faults::test_a_damaged_record_is_no_result
                                  test_report::test_no_record_breaks_the_index
corrupted checkpoint              test_checkpoint::test_a_damaged_checkpoint_is_bad_input_that_names_the_file
two runners on one folder         test_faults::test_two_runners_at_once
                                  test_jobs::test_one_run_at_a_time_in_a_folder
                                  test_jobs::test_without_its_hold_a_job_does_not_begin
clock jumping                     test_faults::test_a_clock_that_jumps
                                  test_clock::test_time_is_read_in_the_clock_alone
interrupted HTML conversion       test_faults::test_killed_while_the_report_is_rendered
killed while a file is written    test_paths::test_a_writer_that_is_killed_leaves_the_old_or_the_new_file
run interrupted, or killed        test_runner::test_interrupt_leaves_no_process
                                  test_runner::test_killed_run_is_resumed
                                  test_experiment::test_a_killed_comparison_keeps_its_finished_cells
                                  test_checkpoint::test_a_process_killed_in_mid_training_goes_on_and_ends_bit_equal
long TMPDIR, a user's profile     test_faults::test_a_long_temporary_folder_and_a_users_profile_of_ipython
two measurements on one machine   test_runner::test_it_says_where_something_else_is_measured
worker or scheduler lost          test_cluster::test_a_worker_dies_and_then_the_scheduler
                                  test_cluster::test_a_notebook_whose_workers_die_fails_after_three
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import psutil
import pytest

from effilib import paths
from effilib.workbook import runner
from tests.runs import RECORD, WAIT, background, command, status, wait_for, write_notebook

pytestmark = pytest.mark.slow


def test_the_table_names_tests_that_are_there():
    named = re.findall(r"(test_\w+)::(test_\w+)", __doc__)
    assert len(named) > 20
    for module, test in named:
        assert f"\ndef {test}(" in (Path(__file__).parent / f"{module}.py").read_text(), f"{module}::{test}"


# A series in which nearly everything goes wrong: run once, looked at by several tests

WRONG = {
    "03_1_killed": (
        "import os\nos.kill(os.getpid(), 9)",
        "its kernel was killed or crashed in the cell `import os`",
    ),
    "03_2_slow": ("while True: pass", "the cell `while True: pass` took longer than the 3 s of --timeout"),
    "03_3_raising": ("raise ValueError('no such thing\\nand more')", "ValueError: no such thing"),
    "03_4_bad_input": (
        "from effilib.errors import BadInput\nraise BadInput('give it a name')",
        "give it a name",
    ),
    "03_5_full_disk": (
        "open('/dev/full', 'w', 1).write('x\\n')",
        "OSError: [Errno 28] No space left on device",
    ),
    "03_6_no_record": ("epochs", "it wrote no complete record.json"),
}


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """(exit code, folder, lines printed) of a run with two jobs at a time."""
    where = tmp_path_factory.mktemp("wrong")
    for name, (code, _) in WRONG.items():
        write_notebook(
            where / "notebooks" / f"{name}.ipynb", code, record="" if "no_record" in name else RECORD
        )
    for name in ("02_good", "10_good"):
        write_notebook(where / "notebooks" / f"{name}.ipynb")
    with pytest.MonkeyPatch.context() as patch, (where / "said").open("w+") as said:
        patch.setenv("EFFILIB_RESULTS", str(where / "results"))
        patch.setattr(sys, "stdout", said)
        code = runner.run(notebooks=where / "notebooks", preset="smoke", jobs=2, timeout=3)
        said.seek(0)
        return code, where / "results" / "smoke-mnist5k", said.read().splitlines()


@pytest.mark.parametrize("name", WRONG)
def test_failure_has_its_reason(wrong, name):
    code, folder, said = wrong
    run = paths.read_json(folder / name / "run.json")
    assert code == 1
    assert run["status"] == "failed"
    assert run["reason"].startswith(WRONG[name][1])
    assert f"  {name}: {run['reason']}" in said
    assert not (folder / name / "record.json").exists()
    assert WRONG[name][1].split("`")[0] in (folder / name / "report.html").read_text()


def test_the_rest_goes_on(wrong):
    _, folder, said = wrong
    assert {status(folder, "02_good"), status(folder, "10_good")} == {"complete"}
    assert {file.name for file in (folder / "02_good").iterdir()} == {
        "notebook.ipynb",
        "report.html",
        "record.json",
        "run.json",
    }
    assert f"{2} complete, {len(WRONG)} failed" in said
    assert said[-1] == f"report: {folder / 'index.html'}"
    assert all(name in (folder / "index.html").read_text() for name in [*WRONG, "02_good", "10_good"])


def test_two_jobs_share_the_machine(wrong):
    assert json.loads((wrong[1] / "02_good" / "record.json").read_text())["shared_machine"] is True


def test_chapter_10_runs_last(wrong):
    ended = [line.split(":")[0] for line in wrong[2] if ": complete in" in line or ": failed in" in line]
    assert sorted(ended[:-1]) == ["02_good", *WRONG]
    assert ended[-1] == "10_good"


def test_no_process_and_no_half_result_is_left(wrong):
    folder = wrong[1]
    assert not list((folder / ".partial").iterdir())
    assert not [
        process for process in psutil.process_iter(["cmdline"]) if str(folder) in str(process.info["cmdline"])
    ]


# A disk that fills up

# In a small disk of its own: a first run; one whose notebook does not fit; one that begins without a byte
# left; one on a disk that takes no writes; and one after all is well again. Prints a line of JSON for each.
DISK = """
import contextlib, io, json, pathlib, subprocess, sys
from effilib.workbook import runner
from effilib.errors import BadInput

disk, notebooks = map(pathlib.Path, sys.argv[1:])
ballast = disk / "ballast"

def run(epochs):
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            which = dict(preset="smoke", notebooks=notebooks, name="mine")
            code = runner.run(**which, parameters=[("epochs", epochs)])
    except BadInput as error:
        code, said = 2, io.StringIO(str(error))
    folder = disk / "mine" / "04_1_x"
    there = [f for f in sorted(disk.rglob("*")) if f.is_file() and f != ballast]
    files = {str(f.relative_to(disk)): len(f.read_bytes()) for f in there}
    record, state = (json.loads((folder / f).read_text()) for f in ("record.json", "run.json"))
    print(json.dumps([code, said.getvalue(), files, record["epochs"], state]), flush=True)

def fill(leave):
    with open(ballast, "wb", 0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    with open(ballast, "r+b") as file:
        file.truncate(max(0, ballast.stat().st_size - leave))

run("3")
fill(leave=100_000)
run("4")
fill(leave=0)
run("4")
ballast.unlink()
subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
run("4")
subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
run("4")
"""


def mounting(*line):
    """A command within file systems of its own, for that alone is it allowed to mount any; skips where it is
    not.
    """
    for allowed in (["unshare", "--mount"], ["unshare", "--mount", "--map-root-user"]):
        mount = ["sh", "-c", 'mount -t tmpfs -o size=1m effilib "$0" && exec "$@"']
        if (
            shutil.which("unshare")
            and not subprocess.run([*allowed, *mount, "/mnt", "true"], capture_output=True).returncode
        ):
            return [*allowed, *mount, *map(str, line)]
    pytest.skip("needs a small file system of its own, and mounting is not allowed here")


def test_a_disk_that_fills_up(tmp_path, notebooks):
    disk = tmp_path / "disk"
    disk.mkdir()
    line = mounting(disk, sys.executable, "-c", DISK, disk, notebooks)
    # In the second run it prints more than fits.
    write_notebook(notebooks / "04_1_x.ipynb", "print('x' * 300_000 * (epochs > 3))")
    done = subprocess.run(
        line,
        cwd=paths.root(),
        env={**os.environ, "EFFILIB_RESULTS": str(disk)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, full, nothing_left, read_only, mended = map(json.loads, done.stdout.splitlines())

    def result(run):
        return {
            name: size
            for name, size in run[2].items()
            if name.startswith("mine/04_1_x/") and not name.endswith("run.json")
        }

    assert first[0] == 0
    assert set(result(first)) == {
        f"mine/04_1_x/{name}" for name in ("notebook.ipynb", "record.json", "report.html")
    }

    assert full[0] == 1
    assert "No space left on device" in full[1].splitlines()[-2]
    assert full[3] == 3  # the first result is there as it was
    assert result(full) == result(first)

    for code, said, why in (
        (*nothing_left[:2], "No space left on device"),
        (*read_only[:2], "Read-only file system"),
    ):
        assert code == 2
        assert said.startswith(f"cannot write results into {disk / 'mine'}: {why}")
    assert result(nothing_left) == result(read_only) == result(first)

    assert (mended[0], mended[3], mended[4]["status"]) == (0, 4, "complete")
    kept = (".ipynb", ".json", ".html", ".running", ".rendering")
    assert all(name.endswith(kept) for name in mended[2])  # and no rests


# A damaged record


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "[1]", "3", '"complete"', "null", "{}", '{"status": "failed"}', "\udcff", "\0"]
)
@pytest.mark.parametrize("name", ["record.json", "run.json"])
def test_a_damaged_record_is_no_result(notebooks, plan, name, content):
    write_notebook(notebooks / "04_1_x.ipynb")
    write_notebook(notebooks / "10_last.ipynb")
    job, last = (replace(job, key=runner.run_key(job)) for job in plan())
    job.results.mkdir(parents=True)
    (job.results / "report.html").touch()
    paths.write(job.results / "record.json", {"status": "complete"})
    paths.write(job.results / "run.json", {"status": "complete", "key": job.key, "seconds": 3.0})
    assert runner.up_to_date(job)
    (job.results / name).write_bytes(content.encode(errors="surrogateescape"))
    assert not runner.up_to_date(job)  # it runs again
    assert runner.expected(job) in (3.0, None)
    assert runner.run_key(last)  # which reads the others' records
    assert "04_1_x" in runner.report.index(job.folder).read_text()
    assert "no ratio to compare" in runner.comparison([job])


# Two runners


def test_two_runners_at_once(notebooks, folder, run, tmp_path):
    write_notebook(notebooks / "04_1_waits.ipynb", WAIT.format(here=str(tmp_path)))
    first = background(run)
    wait_for((tmp_path / "pids.json").exists)
    second = command(notebooks)
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 2
    end = f"effilib: another run is writing into {folder}: wait for its end, or give this one a --name"
    assert said.splitlines()[-1] == end
    assert "started" not in said
    (tmp_path / "go").touch()
    assert first.result(60) == 0
    assert status(folder, "04_1_waits") == "complete"


# A clock that jumps

JUMPS = """
import pathlib, time
_time, _offset = time.time, pathlib.Path({offset!r})
time.time = lambda: _time() + float(_offset.read_text())
"""

JUMPING = """
import pathlib, time
from effilib import clock
here, watch, begin = pathlib.Path({here!r}), clock.Stopwatch(), time.time()
watch.start()
with clock.elapsed() as seconds:
    (here / "begun").touch()
    for far in (lambda: time.time() > begin + 80_000, lambda: time.time() < begin - 80_000):
        while not far():
            time.sleep(0.02)
        watch.lap()
        (here / "seen").touch()
assert 0 < seconds() < 60, seconds()
assert watch.end_epoch()[-1] < 60
"""


def test_a_clock_that_jumps(notebooks, folder, tmp_path, run, capsys):
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "sitecustomize.py").write_text(JUMPS.format(offset=str(tmp_path / "offset")))
    paths.write(tmp_path / "offset", "0")
    write_notebook(notebooks / "04_1_x.ipynb", JUMPING.format(here=str(tmp_path)))
    process = command(notebooks, PYTHONPATH=str(tmp_path / "python"))
    wait_for((tmp_path / "begun").exists)
    paths.write(tmp_path / "offset", "86400")  # the clock of all processes is a day ahead: no time-out
    wait_for((tmp_path / "seen").exists)
    paths.write(tmp_path / "offset", "-86400")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert 0 < paths.read_json(folder / "04_1_x" / "run.json")["seconds"] < 60
    assert run() == 0
    assert "04_1_x: up to date" in capsys.readouterr().out


# A user's machine


def test_a_long_temporary_folder_and_a_users_profile_of_ipython(notebooks, folder, tmp_path):
    long, profile = tmp_path / ("x" * 120), tmp_path / "ipython" / "profile_default"
    for place in (long, profile):
        place.mkdir(parents=True)
    (profile / "ipython_config.py").write_text("raise SystemExit('the profile is read')")
    write_notebook(notebooks / "04_1_x.ipynb", "import tempfile\nassert len(tempfile.gettempdir()) > 100")
    said, _ = command(notebooks, TMPDIR=str(long), IPYTHONDIR=str(profile.parent)).communicate(timeout=60)
    assert "04_1_x: complete" in said
    assert status(folder, "04_1_x") == "complete"


# Killed in the conversion to HTML


def test_killed_while_the_report_is_rendered(notebooks, folder, tmp_path, run, capsys):
    count = tmp_path / "count"
    notebook = write_notebook(
        notebooks / "04_1_x.ipynb", f"with open({str(count)!r}, 'a') as file: file.write('x')"
    )
    long = nbformat.read(notebook, as_version=4)
    long.cells.insert(1, nbformat.v4.new_markdown_cell("a formula $\\frac{a_1}{b^2}$ " * 3000))
    nbformat.write(long, notebook)
    place = folder / "04_1_x"
    process = command(notebooks)
    wait_for((place / "notebook.ipynb").exists)  # it was executed, and what is left to do is the report
    process.kill()
    process.communicate()
    assert sorted(file.name for file in place.iterdir()) == ["notebook.ipynb", "record.json", "run.json"]
    assert (
        paths.read_json(place / "run.json")["reason"]
        == "its report was not rendered; the next call does that"
    )

    assert run() == 0
    assert count.read_text() == "x"  # nothing was executed again
    assert status(folder, "04_1_x") == "complete"
    assert "</html>" in (place / "report.html").read_text()
    assert "04_1_x: complete" in capsys.readouterr().out
