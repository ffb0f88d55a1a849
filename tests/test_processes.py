"""Several processes: what they return, and that none is left, however they, or their caller, come to an
end.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from effilib import distributed
from effilib.distributed import processes
from effilib.distributed.processes import WorkerFailed
from effilib.errors import BadInput, NoEffect

# What the processes do; they import it from this file


def note(folder):
    (Path(folder) / f"{os.getpid()}.pid").touch()


def add(rank, folder, tensor):
    note(folder)
    total = tensor * (rank + 1)
    dist.all_reduce(total)
    return rank, dist.get_world_size(), torch.get_num_threads(), total


def misbehave(rank, folder, how):
    note(folder)
    if rank == 1:
        {
            "raises": lambda: 1 / 0,
            "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
            "leaves": lambda: os._exit(0),
            "falls silent": lambda: time.sleep(60),
        }[how]()
    dist.recv(torch.zeros(1), 1)  # in vain


def hang(rank, folder):
    note(folder)
    time.sleep(120)


class Holds(Exception):
    """An error that cannot be sent to another process."""

    def __init__(self, words):
        super().__init__(words)
        self.lock = threading.Lock()


class Takes(Exception):
    """An error that can be sent, but not made anew there."""

    def __init__(self, words, more):
        super().__init__(words)


def fail(error):
    raise error


def asks(rank):
    """What each kind of question comes to on this rank: (type of the error, its words), or the answer."""
    ranks, found = distributed.ranks(), {}
    questions = {
        "answer": lambda: ranks.first(lambda: ["right", rank]),
        "holds": lambda: ranks.first(lambda: fail(Holds("no such file"))),
        "takes": lambda: ranks.first(lambda: fail(Takes("no such thing", 1))),
        "bad input": lambda: ranks.first(lambda: fail(BadInput("lr is 0"))),
        "no effect": lambda: ranks.first(lambda: fail(NoEffect("no layer"))),
        "system": lambda: ranks.first(lambda: fail(FileNotFoundError(2, "not there", "x"))),
        "no words": lambda: ranks.first(lambda: fail(AssertionError())),
        "result": lambda: ranks.first(threading.Lock),
        "agree": lambda: ranks.agree(threading.Lock()),
        "gather": lambda: ranks.gather(threading.Lock() if rank else 1),
        "then": lambda: ranks.gather(rank),
    }
    for name, question in questions.items():
        try:
            found[name] = question()
        except Exception as error:
            found[name] = type(error).__name__, str(error)
    return found


def left(folder):
    """Processes that noted their number and are still there."""
    return [
        p
        for p in (int(f.stem) for f in Path(folder).glob("*.pid"))
        if psutil.pid_exists(p) and psutil.Process(p).status() != "zombie"
    ]


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    assert condition()


def test_results_come_by_rank_and_the_ranks_are_joined(tmp_path):
    found = processes.run(add, 2, tmp_path, torch.tensor([1.0, 2.0]))
    assert [r[:3] for r in found] == [(0, 2, 1), (1, 2, 1)]
    assert all(torch.equal(r[3], torch.tensor([3.0, 6.0])) for r in found)
    assert len(list(tmp_path.glob("*.pid"))) == 2
    assert not left(tmp_path)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raises", "rank 1 of 2 failed: ZeroDivisionError: division by zero; the others were ended"),
        ("is killed", "rank 1 of 2 was killed by SIGKILL; the others were ended"),
        ("leaves", "rank 1 of 2 ended without an answer"),
        ("falls silent", "rank 0 of 2 failed: "),
    ],
)
def test_a_rank_that_fails_ends_all_with_one_sentence(tmp_path, how, words):
    begin = time.monotonic()
    with pytest.raises(WorkerFailed) as error:
        processes.run(misbehave, 2, tmp_path, how, silence=2)
    assert str(error.value).startswith(words)
    assert "\n" not in str(error.value)
    assert time.monotonic() - begin < 30
    assert not left(tmp_path)


def test_an_error_or_answer_that_cannot_be_sent_is_the_same_sentence_on_all_ranks():
    first, second = processes.run(asks, 2, silence=10)
    assert first["answer"] == second["answer"] == ["right", 0]
    assert first["then"] == second["then"] == [0, 1]  # they still speak with each other
    lock = "a lock cannot be sent to other processes: cannot pickle '_thread.lock' object"
    words = {
        "holds": "no such file", "takes": "no such thing", "bad input": "lr is 0", "no effect": "no layer",
        "system": "[Errno 2] not there: 'x'", "result": lock, "agree": lock, "gather": lock,
    }  # fmt: skip
    for found in (first, second):
        assert {name: found[name][1] for name in words} == words
        assert found["bad input"][0] == "BadInput"
        assert found["no effect"][0] == "NoEffect"
    assert first["holds"][0] == "Holds"  # where it happened it is the error itself
    assert second["holds"][0] == second["takes"][0] == "RuntimeError"
    assert second["no words"] == ("RuntimeError", "AssertionError")


def test_what_takes_too_long_is_ended(tmp_path):
    with pytest.raises(WorkerFailed, match="took longer than 6 s and were ended; not done: rank 0"):
        processes.run(hang, 1, tmp_path, timeout=6)
    assert not left(tmp_path)


def test_a_function_that_cannot_be_imported_is_refused():
    with pytest.raises(BadInput, match="cannot be sent to other processes: put it into a file"):
        processes.run(lambda rank: rank, 2)
    with pytest.raises(BadInput, match="what hang is given cannot be sent to other processes"):
        processes.run(hang, 2, lambda: 0)


CALLER = """
import sys
from effilib.distributed import processes
from test_processes import hang
processes.run(hang, 1, sys.argv[1])
"""


def test_the_processes_end_with_their_caller_however_it_ends(tmp_path):
    """Killed outright, ended by a signal, interrupted by Ctrl-C: three callers at once, to save their
    imports.
    """
    modules = os.pathsep.join([str(Path(processes.__file__).parents[2]), str(Path(__file__).parent)])
    callers = {}
    for end in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        folder = tmp_path / end.name
        folder.mkdir()
        log = (folder / "log").open("wb")
        command = [sys.executable, "-c", CALLER, str(folder)]
        callers[end] = (
            subprocess.Popen(command, env={**os.environ, "PYTHONPATH": modules}, stdout=log, stderr=log),
            folder,
        )
    try:
        for end, (caller, folder) in callers.items():
            wait_for(lambda folder=folder: left(folder), 60)
            caller.send_signal(end)
            caller.wait(20)
            wait_for(lambda folder=folder: not left(folder), 5)
    finally:
        for caller, _ in callers.values():
            caller.kill()
            caller.wait()
