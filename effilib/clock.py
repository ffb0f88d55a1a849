"""The only place that reads time.

`Stopwatch` times training: one reading a step, synchronised at its borders, pausable for what is not
training. `interleaved` times short functions against each other. `machine` says on what the numbers were
measured, `Measuring` whether another measurement runs there at the same time.

The machines are shared: a step can stall for half a minute. A stall is wall time in which neither this
process nor one that it started used the processor; only that is taken off, whatever the work was. Of threads
that work side by side the busiest counts, else a second one would hide a stall. Raw seconds are kept beside.
"""

import contextlib
import ctypes
import datetime
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import joblib
import psutil
import torch

__all__ = [
    "Measuring",
    "Stopwatch",
    "cores",
    "date",
    "duration",
    "elapsed",
    "hardware",
    "interleaved",
    "machine",
    "now",
    "pause",
    "synchronize",
    "unshared",
]

STALL = 0.02  # seconds without CPU time in one segment, below which nothing is taken off
NOTES = Path("/tmp/effilib-measuring")  # POSIX has it: one place for all users, whatever their TMPDIR
EXCESS = 5  # on CUDA: times the longest of the same step with other seeds, above which a step stalled


def now() -> float:
    """Return seconds on a monotonic clock, for progress lines and time-outs.

    >>> begin = now()
    >>> pause(0.01)
    >>> now() - begin >= 0.01
    True
    """
    return time.monotonic()


def date() -> str:
    """Return the current UTC time, ISO 8601, to the second.

    >>> date().startswith("20"), date()[-6:]
    (True, '+00:00')
    """
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def pause(seconds: float) -> None:
    """Do nothing for so many seconds, as a slower link would.

    >>> with elapsed() as seconds:
    ...     pause(0.01)
    >>> seconds() >= 0.01
    True
    """
    time.sleep(seconds)


def duration(seconds: float) -> datetime.timedelta:
    """Return seconds as `datetime.timedelta`, which `torch.distributed` wants.

    >>> duration(90)
    datetime.timedelta(seconds=90)
    """
    return datetime.timedelta(seconds=seconds)


def synchronize(device: str | torch.device) -> None:
    """Wait until `device` has done what it was given.

    >>> synchronize("cpu")  # which is never ahead
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Time a training run in segments of a kind: a step, or other work.

    `start()` opens a segment, `lap(kind)` closes it under a kind and opens the next, `paused()` leaves time
    out of it. On CUDA a segment's border is an event on the stream, read at `end_epoch`: no synchronisation
    per step. There a waiting processor looks busy, so that nothing is taken off here: see `unshared`.

    >>> watch = Stopwatch()
    >>> watch.start()
    >>> for kind in ("step", "step", "reconfigure"):
    ...     watch.lap(kind)
    >>> seconds = watch.end_epoch()  # of the run, after each segment
    >>> len(seconds), seconds[-1] == watch.seconds == watch.raw
    (3, True)
    """

    def __init__(self, device="cpu"):
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.laps = []  # of the epoch that runs: (kind, [(begin, end), ...])
        self.pieces = []  # of the open segment, between pauses
        self.begin = None
        self.children = _children()  # seconds on the processor of what this process started, when last read
        self.raw = 0.0  # seconds
        self.seconds = 0.0  # seconds less stalls
        self.kinds = {}  # kind -> [number of segments, seconds less stalls]
        self.steps = []  # on CUDA: seconds of each step, from which stalls are found across seeds

    def _read(self):
        if not self.cuda:
            return time.perf_counter(), time.process_time(), _threads()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def start(self) -> None:
        """Open the first segment; time since the last one is not counted."""
        self.begin = self._read()

    def lap(self, kind: str = "step", substitute: bool = False) -> None:
        """Close the open segment under `kind` and open the next one.

        substitute: the segment was not timed (a counted step is slower); the median of the epoch's segments
        of its kind stands for it.
        """
        end = self._read()
        self.laps.append((kind, None if substitute else self._measure([*self.pieces, (self.begin, end)])))
        self.pieces, self.begin = [], end

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens inside: evaluation for the record, logging, counting."""
        self.pieces.append((self.begin, self._read()))
        try:
            yield
        finally:
            self.start()

    def _measure(self, pieces):
        """(wall seconds, seconds stalled); on CUDA the events, which are read later."""
        if self.cuda:
            return pieces
        wall = sum(end[0] - begin[0] for begin, end in pieces)
        idle = wall - sum(_busy(begin, end) for begin, end in pieces)
        if idle > STALL:  # a compiler that this process waits for is work
            before, self.children = self.children, _children()
            idle -= max(0.0, self.children - before)
        return wall, idle if idle > STALL else 0.0

    def end_epoch(self) -> list[float]:
        """Read the epoch's segments and add them up. Returns the run's seconds after each of them."""
        measured = [(kind, segment) for kind, segment in self.laps]
        if self.cuda:
            torch.cuda.synchronize(self.device)
            measured = [
                (kind, s and (sum(begin.elapsed_time(end) for begin, end in s) / 1e3, 0.0))
                for kind, s in measured
            ]
        self.laps, by_kind, after = [], {}, []
        for kind, segment in measured:
            if segment is not None:
                by_kind.setdefault(kind, []).append(segment[0] - segment[1])
        for kind, segment in measured:
            if segment is None:
                segment = statistics.median(by_kind.get(kind, [self.mean(kind)])), 0.0
            wall, stalled = segment
            self.raw += wall
            self.seconds += wall - stalled
            count, total = self.kinds.get(kind, (0, 0.0))
            self.kinds[kind] = [count + 1, total + wall - stalled]
            if self.cuda and kind.startswith("step"):
                self.steps.append(wall)
            after.append(self.seconds)
        return after

    def mean(self, kind: str) -> float:
        """Return the mean seconds of a kind's segments, or 0."""
        count, total = self.kinds.get(kind, (0, 0.0))
        return total / count if count else 0.0

    def totals(self) -> dict:
        """Return what the epochs that have ended measured, as plain values."""
        return {k: getattr(self, k) for k in ("raw", "seconds", "kinds", "steps")}

    def forget(self, **totals) -> None:
        """Drop the present epoch; go on from an earlier run's `totals`."""
        self.laps, self.pieces = [], []
        for name, value in totals.items():
            setattr(self, name, value)
        self.start()


def _threads():
    """Thread -> its seconds on the processor so far; empty where the system does not tell (not Linux)."""
    found = {}
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc/self/task"):
            thread = int(name)
            with contextlib.suppress(OSError):  # it has ended meanwhile
                found[thread] = time.clock_gettime(~thread << 3 | 6)  # as pthread_getcpuclockid(3) says
    return found


def _busy(begin, end):
    """Seconds at work between two readings: of threads side by side those of the busiest.

    Threads of Python wait for each other, so that their times add up, also with those of threads that ended
    in between; a pool's work at the same time as the one that called it.
    """
    spent = {thread: seconds - begin[2].get(thread, 0.0) for thread, seconds in end[2].items()}
    python = {thread.native_id for thread in threading.enumerate()}
    ended = end[1] - begin[1] - sum(spent.values())
    in_turns = sum(seconds for thread, seconds in spent.items() if thread in python) + max(0.0, ended)
    return max(in_turns, *spent.values(), 0.0)


def _children():
    """Seconds on the processor of all that this process started, ended or not."""
    ended = os.times()
    total = ended.children_user + ended.children_system
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                spent = child.cpu_times()
                total += spent.user + spent.system
    return total


def unshared(steps: list[list[float]]) -> list[float]:
    """Return each run's seconds that no other has at the step.

    Where CPU time says nothing, these are stalls. steps: per run the seconds of its steps. A step stalled
    where it takes more than `EXCESS` times as long as in any other run, and loses what is above the longest
    of those. Nothing is known of fewer than three runs, or of runs with unequal numbers of steps.

    >>> unshared([[1.0, 1.0, 9.0], [1.0, 1.0, 1.0], [1.0, 6.0, 1.0], [1.0, 6.0, 1.0]])
    [8.0, 0.0, 0.0, 0.0]
    """
    if len(steps) < 3 or len({len(s) for s in steps}) > 1:
        return [0.0] * len(steps)
    taken = []
    for i, mine in enumerate(steps):
        longest = [max(s[k] for j, s in enumerate(steps) if j != i) for k in range(len(mine))]
        taken.append(sum((m - o for m, o in zip(mine, longest, strict=True) if m > EXCESS * o), 0.0))
    return taken


class Measuring:
    """Hold a note that a measurement runs here; see the others'.

    A note is a locked file; the lock of a process that died is free, so that nothing has to be tidied up.

    >>> with Measuring("notes") as first, Measuring("notes") as second:
    ...     first.others(), second.others()
    (1, 1)
    """

    def __init__(self, folder=None):
        self.folder = Path(folder or NOTES).absolute()
        self.file = self.name = None

    def __enter__(self):
        with contextlib.suppress(OSError, ImportError):  # no locks here: nothing is known of others
            import fcntl

            self.folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(PermissionError):  # another user's, who has done it
                self.folder.chmod(0o1777)
            handle, name = tempfile.mkstemp(dir=self.folder)
            os.fchmod(handle, 0o644)  # who may read it may ask for its lock
            self.file = open(handle, "wb")
            self.name = Path(name)
            fcntl.flock(self.file, fcntl.LOCK_EX)
        return self

    def __exit__(self, *error):
        if self.file:
            with contextlib.suppress(OSError):
                self.name.unlink()
            self.file.close()
            self.file = None

    def others(self) -> int:
        """Return how many other measurements run on this machine now; all, if it holds no note itself."""
        if not self.folder.is_dir():
            return 0
        import fcntl

        found = 0
        for note in self.folder.iterdir():
            if note == self.name:
                continue
            try:
                with note.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                found += 1
            except OSError:  # gone meanwhile, or not to be read
                found += note.exists()
            else:
                with contextlib.suppress(OSError):  # its process is gone; another user's note stays
                    note.unlink()
        return found


def interleaved(
    functions: dict[str, Callable[[], object]],
    *,
    repeats: int = 15,
    warm_up: int = 3,
    device: str | torch.device = "cpu",
    seconds: float | None = None,
) -> dict[str, list[float]]:
    """Time short functions against each other, round by round, each once.

    So drift hits all alike. functions: dict name -> callable without arguments. Returns dict name -> list of
    `repeats` times in seconds. `seconds` ends the rounds early (after at least 3) once that much time was
    spent.

    >>> two = {"small": lambda: torch.ones(9).sum(), "large": lambda: torch.ones(99).sum()}
    >>> times = interleaved(two, repeats=5)
    >>> {name: len(seconds) for name, seconds in times.items()}
    {'small': 5, 'large': 5}
    """
    times = {name: [] for name in functions}
    begun = time.perf_counter()
    for round_ in range(-warm_up, repeats):
        for name, function in functions.items():
            synchronize(device)
            begin = time.perf_counter()
            function()
            synchronize(device)
            if round_ >= 0:
                times[name].append(time.perf_counter() - begin)
        if seconds and round_ >= 2 and time.perf_counter() - begun > seconds:
            break
    return times


@contextlib.contextmanager
def elapsed() -> Iterator[Callable[[], float]]:
    """Count the seconds since the beginning: `with elapsed() as t: ...; t()`.

    >>> with elapsed() as seconds:
    ...     total = torch.ones(9).sum()
    >>> seconds() > 0
    True
    """
    begin = time.perf_counter()
    yield lambda: time.perf_counter() - begin


def steady_memory() -> bool:
    """Let glibc keep freed memory instead of giving it back to the system after every step.

    Training allocates and frees the same large tensors over and over; without this each step pays page faults
    for them. It is engineering for every arm alike, not a method's credit. Elsewhere than on glibc it does
    nothing. Returns whether it was set.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim_threshold, top_pad, mmap_threshold, largest = -1, -2, -3, 2**31 - 1
    return all([mallopt(trim_threshold, largest), mallopt(mmap_threshold, largest), mallopt(top_pad, 2**28)])


def cores() -> int:
    """Return the cores this process may use, by affinity and quota.

    >>> 1 <= cores() <= os.cpu_count()
    True
    """
    return joblib.cpu_count()


if torch.get_num_threads() > cores():  # OpenMP knows no quota: threads above it wait for each other
    torch.set_num_threads(cores())


def cpu_flags() -> frozenset[str]:
    """The processor's feature flags, such as "avx512_bf16" (Linux; elsewhere empty)."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.exists() else ():
        if line.startswith(("flags", "Features")):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def _cpu_name():
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def hardware(device: str | torch.device = "cpu") -> dict:
    """Return what times depend on: runs that differ in it are never mixed.

    >>> sorted(hardware())
    ['bf16', 'device', 'threads', 'torch']
    """
    return {k: v for k, v in machine(device).items() if k in ("device", "bf16", "threads", "torch")}


def machine(device: str | torch.device = "cpu") -> dict:
    """Return a fingerprint of the machine as plain values; `summary` is for people.

    >>> sorted(machine())
    ['bf16', 'cores', 'cpu', 'device', 'load', 'python', 'summary', 'system', 'threads', 'torch']
    """
    on_cuda = torch.device(device).type == "cuda"
    return {
        "summary": torch.cuda.get_device_name(device) if on_cuda else f"{cores()}-core CPU",
        "device": torch.cuda.get_device_name(device) if on_cuda else _cpu_name(),
        "cpu": _cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "bf16": sorted(cpu_flags() & {"avx512_bf16", "amx_bf16"}),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
