"""The only place that reads time.

`Stopwatch` times training: one reading a step, synchronised at its borders, pausable for what is not
training. `interleaved` times short functions against each other. `machine` says on what the numbers were
measured.

The machines are shared: a step can stall for half a minute. A stopwatch therefore keeps every step, and
`seconds` caps each at `CAP` times its epoch's median for its kind; raw seconds and the number of capped steps
are kept beside it."""

import contextlib
import ctypes
import datetime
import os
import platform
import statistics
import time
from pathlib import Path

import torch

CAP = 5  # times the epoch's median
RECURRING = 5  # a kind seen less often than this in an epoch is one-off work, which is never capped


def now():
    """Seconds on a monotonic clock, for elapsed times of people (progress lines, time-outs).

    >>> begin = now()
    >>> 0 <= now() - begin < 60
    True
    """
    return time.monotonic()


def date():
    """The current UTC time, ISO 8601, to the second.

    >>> date().startswith("20"), date()[-6:]
    (True, '+00:00')
    """
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def pause(seconds):
    """Do nothing for so long: what a slower link would take.

    >>> with elapsed() as seconds:
    ...     pause(0.01)
    >>> seconds() >= 0.01
    True
    """
    time.sleep(seconds)


def duration(seconds):
    """Seconds as `datetime.timedelta`, which `torch.distributed` wants.

    >>> duration(90)
    datetime.timedelta(seconds=90)
    """
    return datetime.timedelta(seconds=seconds)


def synchronize(device):
    """Wait until `device` has done what it was given.

    >>> synchronize("cpu")  # which is never ahead
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Seconds of a training run, as segments of a kind: a step, or one-off work such as a reconfiguration.

    `start()` opens a segment, `lap(kind)` closes it under a kind and opens the next, `paused()` leaves time
    out of it. On CUDA a segment's border is an event on the stream, read at `end_epoch`: no synchronisation
    per step.

    >>> watch = Stopwatch()
    >>> watch.start()
    >>> for kind in ("step", "step", "reconfigure"):
    ...     watch.lap(kind)
    >>> seconds = watch.end_epoch()  # of the run, after each segment
    >>> len(seconds), seconds[-1] == watch.seconds == watch.raw
    (3, True)
    """

    def __init__(self, device="cpu"):
        self.cuda = torch.device(device).type == "cuda"
        self.laps = []  # of the epoch that runs: (kind, [(begin, end), ...])
        self.pieces = []  # of the open segment, between pauses
        self.begin = None
        self.raw = 0.0  # seconds, nothing capped
        self.seconds = 0.0  # seconds, stalled steps capped
        self.steps = 0  # recurring segments seen
        self.capped = 0  # ... of which were capped
        self.kinds = {}  # kind -> [seconds of each segment], as measured

    def _read(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self):
        """Open the first segment; time since the last one is not counted."""
        self.begin = self._read()

    def lap(self, kind="step", substitute=False):
        """Close the open segment under `kind` and open the next one.

        substitute: the segment was not timed (a counted step is slower); the epoch's median of its kind
        stands for it."""
        end = self._read()
        self.laps.append((kind, None if substitute else [*self.pieces, (self.begin, end)]))
        self.pieces, self.begin = [], end

    @contextlib.contextmanager
    def paused(self):
        """Leave out what happens inside: evaluation for the record, logging, counting."""
        self.pieces.append((self.begin, self._read()))
        try:
            yield
        finally:
            self.start()

    def _between(self, begin, end):
        return begin.elapsed_time(end) / 1e3 if self.cuda else end - begin

    def end_epoch(self):
        """Read the epoch's segments and add them up. Returns the run's capped seconds after each of them."""
        if self.cuda:
            torch.cuda.synchronize()
        by_kind = {}
        for kind, pieces in self.laps:
            if pieces is not None:
                by_kind.setdefault(kind, []).append(sum(self._between(begin, end) for begin, end in pieces))
        medians = {k: statistics.median(s) for k, s in by_kind.items()}
        timed = {k: iter(s) for k, s in by_kind.items()}
        measured = [(k, medians.get(k, 0.0) if pieces is None else next(timed[k])) for k, pieces in self.laps]
        self.laps = []
        limit = {k: CAP * medians[k] for k, s in by_kind.items() if len(s) >= RECURRING}
        cumulative = []
        for kind, seconds in measured:
            self.kinds.setdefault(kind, []).append(seconds)
            self.raw += seconds
            self.steps += kind in limit
            self.capped += seconds > limit.get(kind, float("inf"))
            self.seconds += min(seconds, limit.get(kind, float("inf")))
            cumulative.append(self.seconds)
        return cumulative

    def totals(self):
        """What was measured in the epochs that have ended, as plain values."""
        return {k: getattr(self, k) for k in ("raw", "seconds", "steps", "capped", "kinds")}

    def forget(self, **totals):
        """Drop the epoch that runs and go on from the `totals` of an earlier run."""
        self.laps, self.pieces = [], []
        for name, value in totals.items():
            setattr(self, name, value)
        self.start()


def interleaved(functions, *, repeats=15, warm_up=3, device="cpu", seconds=None):
    """Time short functions against each other: round by round, each once, so that drift hits all alike.

    functions: dict name -> callable without arguments. Returns dict name -> list of `repeats` times in
    seconds. `seconds` ends the rounds early (after at least 3) once that much time was spent.

    >>> times = interleaved({"small": lambda: torch.ones(9).sum(), "large": lambda: torch.ones(99).sum()}, repeats=5)
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
def elapsed():
    """`with elapsed() as t: ...; t()` gives the seconds since the beginning.

    >>> with elapsed() as seconds:
    ...     total = torch.ones(9).sum()
    >>> seconds() > 0
    True
    """
    begin = time.perf_counter()
    yield lambda: time.perf_counter() - begin


def steady_memory():
    """Let glibc keep freed memory instead of giving it back to the system after every step.

    Training allocates and frees the same large tensors over and over; without this each step pays page faults
    for them. It is engineering for every arm alike, not a method's credit. Elsewhere than on glibc it does
    nothing. Returns whether it was set.

    >>> steady_memory() in (True, False)  # whether the system's allocator can be told
    True
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim_threshold, top_pad, mmap_threshold, largest = -1, -2, -3, 2**31 - 1
    return all([mallopt(trim_threshold, largest), mallopt(mmap_threshold, largest), mallopt(top_pad, 2**28)])


def cpu_flags():
    """The processor's feature flags (Linux; elsewhere empty).

    >>> type(cpu_flags())  # such as "avx512_bf16"
    <class 'frozenset'>
    """
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith(("flags", "Features")):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def _cpu_name():
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine(device="cpu"):
    """Fingerprint of what the numbers were measured on: a dict of plain values, `summary` for people.

    >>> sorted(machine())
    ['bf16', 'cores', 'cpu', 'device', 'load', 'python', 'summary', 'system', 'threads', 'torch']
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = f"{cores}-core CPU"
    on_cuda = torch.device(device).type == "cuda"
    return {
        "summary": torch.cuda.get_device_name(device) if on_cuda else cpu,
        "device": torch.cuda.get_device_name(device) if on_cuda else _cpu_name(),
        "cpu": _cpu_name(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "bf16": sorted(cpu_flags() & {"avx512_bf16", "amx_bf16"}),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
