"""Notebooks that tests make, and how they watch them run."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import Future

import nbformat
import psutil

from effilib import clock, paths

PARAMETERS = """
preset = ""
dataset = ""
epochs = 3  # of training = passes over the data
lr: float = 0.1
amp: bool | None = False
widths = [16, 32]
network = "resnet"
tag = "a"
"""

RECORD = """
import json, os, pathlib
out = pathlib.Path(os.environ["EFFILIB_OUT"])
record = {"schema": 2, "status": "complete", "preset": preset, "dataset": dataset, "duration_s": 1.0}
record |= {"headline": None, "verdicts": []}
record |= {"epochs": epochs, "network": network, "shared_machine": os.environ.get("EFFILIB_SHARED") == "1"}
(out / "record.json").write_text(json.dumps(record))
"""

# Writes down its kernel and a process that hides in a session of its own, and goes on once there is a file
# `go`.
WAIT = """
import json, os, pathlib, subprocess, time
hidden = subprocess.Popen(["sleep", "600"], start_new_session=True)
here = pathlib.Path({here!r})
(here / "pids.new").write_text(json.dumps([os.getpid(), os.getppid(), hidden.pid]))
(here / "pids.new").rename(here / "pids.json")
while not (here / "go").exists():
    time.sleep(0.05)
hidden.kill()
"""


def write_notebook(path, *code, parameters=PARAMETERS, record=RECORD):
    """A notebook in the layout of the series: title, parameters, some code, the record."""
    new = nbformat.v4
    tagged = [
        new.new_code_cell(parameters.strip(), metadata={"tags": ["parameters"]}),
        *map(new.new_code_cell, code),
    ]
    tagged += [new.new_code_cell(record.strip(), metadata={"tags": ["record"]})] if record else []
    cells = [new.new_markdown_cell(f"# Title of {path.stem}"), *tagged]
    path.parent.mkdir(exist_ok=True)
    nbformat.write(new.new_notebook(cells=cells), path)
    return path


def status(folder, name):
    return paths.read_json(folder / name / "run.json")["status"]


def command(notebooks, *arguments, within="true", **environment):
    """The command line as a process, after a command of the shell's."""
    line = ["bash", "-c", f'{within}; exec "$@"', "bash", sys.executable, "-m", "effilib", "run"]
    line += ["--preset", "smoke", "--notebooks", str(notebooks), *arguments]
    settings = dict(
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=paths.root(),
        env={**os.environ, **environment},
    )
    return subprocess.Popen(line, **settings)


def background(function, *args, **settings):
    """Call a function in a thread that keeps no process from ending. Returns its future."""
    future = Future()

    def call():
        try:
            future.set_result(function(*args, **settings))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


def wait_for(condition, seconds=60):
    end = clock.now() + seconds
    while not condition():
        assert clock.now() < end, "waited too long"
        time.sleep(0.05)


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
