"""Several processes that work together on this machine, and never outlive whoever started them.

`run(function, n, *args)` calls `function(rank, *args)` in `n` new processes that are joined by
`torch.distributed` (gloo, over the loopback interface) and returns what they returned. Whatever ends the
call, an exception, Ctrl-C, a rank that fails or dies, ends all of them. Should the caller itself be killed,
each process ends by itself: its standard input is a pipe whose other end only the caller holds, and on Linux
the kernel sends it a signal as well.

Nothing heavy is imported here at the top, so that a new process watches over its caller before it does
anything else.
"""

import contextlib
import ctypes
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from effilib.errors import BadInput

__all__ = ["WorkerFailed", "end", "loopback", "run"]

START = 120  # seconds that all processes together may need for their imports
SILENCE = 20  # seconds without a message after which a rank gives up on another
GRACE = (
    1.0  # seconds after the first failure in which others report: the first to be seen need not be the cause
)
LOST = (
    "closed by peer",
    "reset by peer",
    "broken pipe",
    "connection refused",
    "timed out",
    "timeout",
    "socket closed",
)


class WorkerFailed(RuntimeError):
    """One of several processes failed or died, and the others were ended. One sentence that names it and says
    why.

    >>> str(WorkerFailed("rank 1 of 2 was killed by SIGKILL; the others were ended"))
    'rank 1 of 2 was killed by SIGKILL; the others were ended'
    """


def run(
    function: Callable[..., Any],
    n: int,
    *args,
    timeout: float = 600,
    silence: float = SILENCE,
    threads: int = 1,
) -> list:
    """Call `function(rank, *args)` in `n` processes; return their results by rank.

    function: one that can be imported (not defined in a notebook). args and results are pickled. Inside,
    `torch.distributed` is ready, with `n` ranks. timeout: seconds for all of it. silence: seconds that a rank
    waits for another's message. threads: of each process. Raises `WorkerFailed` if a process fails, dies or
    falls silent, and `BadInput` if the function cannot be imported.

    >>> from math import pow
    >>> run(pow, 2, 3)  # 0 and 1, to the third
    [0.0, 1.0]
    """
    if getattr(function, "__module__", None) in (None, "__main__") or "<" in getattr(
        function, "__qualname__", "<"
    ):
        raise BadInput(
            f"{getattr(function, '__qualname__', function)} cannot be sent to other processes: put it into a"
            " file and import it"
        )
    try:
        request = pickle.dumps((function, args))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise BadInput(
            f"what {function.__name__} is given cannot be sent to other processes: {error}"
        ) from error
    with tempfile.TemporaryDirectory(prefix="effilib-") as name:
        folder, processes = Path(name), []
        (folder / "call").write_bytes(pickle.dumps(dict(n=n, silence=silence, threads=threads)))
        (folder / "function").write_bytes(request)
        try:
            for rank in range(n):
                processes.append(_start(folder, rank, threads))
            _watch(processes, folder, timeout)
            return [_read(folder / f"done-{rank}") for rank in range(n)]
        finally:
            end(processes)


def end(processes: Sequence[subprocess.Popen]) -> None:
    """Kill processes and all that they started; wait for their end.

    >>> sleeper = subprocess.Popen(["sleep", "60"], stdin=subprocess.PIPE, start_new_session=True)
    >>> end([sleeper])
    >>> sleeper.returncode
    -9
    """
    for p in processes:
        if p.poll() is None:  # not reaped yet, so its number is still its own
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(p.pid, signal.SIGKILL)
    for p in processes:
        p.wait()
        p.stdin.close()


def loopback() -> dict[str, str]:
    """Return the environment in which gloo stays on this machine.

    >>> loopback()
    {'GLOO_SOCKET_IFNAME': 'lo...'}
    """
    names = {name for _, name in socket.if_nameindex()}
    return next(({"GLOO_SOCKET_IFNAME": name} for name in ("lo", "lo0") if name in names), {})


def _start(folder, rank, threads):
    modules = os.pathsep.join(
        p or os.getcwd() for p in sys.path
    )  # what can be imported here can be imported there
    environment = {
        **os.environ,
        "PYTHONPATH": modules,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
    }
    environment |= loopback()
    with (folder / f"log-{rank}").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(folder), str(rank)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches the caller alone, which then ends them
        )


def _watch(processes, folder, timeout):
    """Return when all have answered; raise `WorkerFailed` as soon as one has failed."""
    from effilib import clock  # it imports torch

    began, failed = clock.now(), None
    while True:
        codes = [p.poll() for p in processes]
        done = [c == 0 and (folder / f"done-{rank}").exists() for rank, c in enumerate(codes)]
        if all(done):
            return
        if failed is None and any(c is not None and not d for c, d in zip(codes, done, strict=True)):
            failed = clock.now()
        if failed is not None and (None not in codes or clock.now() > failed + GRACE):
            raise WorkerFailed(_cause(codes, folder))
        if clock.now() > began + timeout:
            late = [rank for rank, d in enumerate(done) if not d]
            raise WorkerFailed(
                f"the processes took longer than {timeout:g} s and were ended; not done: {_ranks(late)}"
            )
        with contextlib.suppress(subprocess.TimeoutExpired):
            next((p for p, c in zip(processes, codes, strict=True) if c is None), processes[0]).wait(0.05)


def _ranks(ranks):
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _cause(codes, folder):
    """The failure that comes first in reason: a process that was killed, else one with an error of its own,
    else a lost connection.
    """
    found = []
    for rank, code in enumerate(codes):
        failed = folder / f"failed-{rank}"
        if code is not None and code < 0:
            names = {s.value: s.name for s in signal.Signals}
            found.append(
                (0, f"rank {rank} of {len(codes)} was killed by {names.get(-code, f'signal {-code}')}")
            )
        elif failed.exists():
            words = _read(failed)
            lost = any(sign in words.lower() for sign in LOST)
            found.append((2 if lost else 1, f"rank {rank} of {len(codes)} failed: {words}"))
        elif code is not None and not (folder / f"done-{rank}").exists():
            log = (folder / f"log-{rank}").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            log = [line for line in log if not line.startswith("[Gloo]")]  # it greets
            found.append(
                (
                    1,
                    f"rank {rank} of {len(codes)} ended without an answer"
                    + (f": {log[-1][:300]}" if log else ""),
                )
            )
    return min(found)[1] + "; the others were ended"


def _read(file):
    return pickle.loads(file.read_bytes())


# In the new process


def _end_with_caller():
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    def listen():
        while os.read(0, 4096):
            pass
        os._exit(1)  # the other end is closed: the caller is gone, or has given up on us

    threading.Thread(target=listen, daemon=True).start()


def _report(file, answer):
    temporary = file.with_name(f".{file.name}")
    temporary.write_bytes(pickle.dumps(answer))
    temporary.rename(file)


def _child(folder, rank):
    _end_with_caller()
    try:
        call, (function, args) = _read(folder / "call"), _read(folder / "function")
        with _joined(folder / "store", rank, **call):
            result = function(rank, *args)
        _report(folder / f"done-{rank}", result)
    except BaseException as error:
        traceback.print_exc()
        text = next(iter(str(error).splitlines()), "")
        _report(folder / f"failed-{rank}", f"{type(error).__name__}: {text[:300]}".rstrip(": "))
        os._exit(1)  # a broken connection must not hold up the end
    sys.stdout.flush()
    os._exit(0)


@contextlib.contextmanager
def _joined(store: Path | str, rank: int, n: int, silence: float, threads: int) -> Iterator[None]:
    """Inside, this process is rank `rank` of `n` in `torch.distributed`, over gloo.

    store: the file at which the ranks meet.
    """
    import torch
    import torch.distributed as dist

    from effilib.clock import duration

    torch.set_num_threads(threads)
    meeting = dist.FileStore(str(store), n)
    meeting.set_timeout(duration(START))
    meeting.set(f"here/{rank}", "1")
    meeting.wait([f"here/{r}" for r in range(n)], duration(START))  # imports take long where cores are few
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=n, timeout=duration(silence))
    yield
    dist.barrier()  # none leaves while another may still want to hear from it
    dist.destroy_process_group()


if __name__ == "__main__":
    _child(Path(sys.argv[1]), int(sys.argv[2]))
