"""One job: its folders, its hold on the results, its processes. What a whole run does with it is in
`test_runner.py`.
"""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from effilib import paths
from effilib.errors import BadInput
from effilib.workbook import jobs


@pytest.fixture
def job(tmp_path):
    where = {"notebook": tmp_path / "04_1_x.ipynb", "folder": tmp_path / "results", "token": "mine"}
    return jobs.Job(**where, parameters={"epochs": 3}, preset="smoke", dataset="mnist5k", timeout=60)


def test_a_job_travels(job):
    assert pickle.loads(pickle.dumps(job)) == job
    assert job.home == Path.cwd()


def test_a_job_carries_the_settings_of_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFILIB_DATA", "elsewhere")
    job = jobs.Job(
        notebook=tmp_path, folder=tmp_path, parameters={}, preset="smoke", dataset="mnist5k", timeout=60
    )
    assert job.environment["EFFILIB_DATA"] == "elsewhere"


def test_exchange_of_results_is_taken_up_after_a_kill(job):
    job.old.mkdir(parents=True)
    (job.old / "record.json").write_text("{}")
    job.partial.mkdir(parents=True)
    jobs._tidy(job)
    assert (job.results / "record.json").exists()
    assert not job.partial.exists()
    assert not job.old.exists()


def test_one_run_at_a_time_in_a_folder(tmp_path):
    with (
        jobs.hold(tmp_path),
        pytest.raises(BadInput, match="another run is writing into"),
        jobs.hold(tmp_path),
    ):
        pass
    with jobs.hold(tmp_path) as token:
        assert (tmp_path / ".running").read_text() == token


def test_without_its_hold_a_job_does_not_begin(job):
    paths.make(job.folder)
    with jobs.hold(job.folder):  # another run's
        assert jobs.start_one(job).status == "interrupted"
    assert jobs.start_one(job).status == "interrupted"
    assert not job.partial.exists()


def test_end_kills_what_carries_the_mark_and_nothing_else(tmp_path):
    line = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    mine, other = (
        subprocess.Popen(
            line, env={**os.environ, "EFFILIB_OUT": str(tmp_path / name)}, stdout=subprocess.PIPE
        )
        for name in ("a", "ab")
    )
    for process in (mine, other):
        process.stdout.readline()  # it runs
    jobs.end(tmp_path / "a")
    assert mine.poll() is not None
    assert other.poll() is None
    jobs.end(tmp_path / "ab")
    assert other.poll() is not None


def test_a_long_error_is_one_short_line():
    assert jobs.sentence(ValueError("first\nsecond")) == "ValueError: first"
    assert jobs.sentence(BadInput("what and why")) == "what and why"
    assert jobs.sentence(OSError(28, "No space left on device")) == "No space left on device"
    assert len(jobs.sentence(ValueError("x" * 1000))) == 300
