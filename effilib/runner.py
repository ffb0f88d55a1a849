"""Run the series: each notebook by papermill, in a process of its own, into a folder that a person reads.

`run` is what the command line calls: it checks everything that can be checked before the first kernel starts, submits
`run_one` for each notebook to a `concurrent.futures.Executor` (threads here, dask for a cluster), and says how it goes.

**What counts.** A notebook is complete if its process ended well *and* its `record.json` says so: papermill's output
looks complete even after its kernel was killed. A complete result is left alone until its notebook, its parameters,
torch or effilib's code change.

**What is kept.** A notebook runs in a hidden folder beside its results (`.partial/<notebook>`) which takes their place when
it is complete. A failed run is kept too, with its reason and a report of how far it came: in the notebook's own folder if
there is nothing better, else in `failed/<notebook>`, so that an earlier complete result is never lost; `run.json` says
that the last run failed, and why. An interrupted run leaves nothing but the finished seeds in the cache.

**What ends.** Whatever a notebook starts carries its `EFFILIB_OUT` in the environment, and is killed by that mark when
the notebook ends, fails or is interrupted. A job goes on only while its run holds the results folder (`.running`),
which works on other machines as well.
"""

import ast
import contextlib
import ctypes
import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.parse
import uuid
from collections import Counter
from concurrent import futures
from dataclasses import dataclass, field, replace
from pathlib import Path

from effilib import paths
from effilib.errors import BadInput, choose

SECONDS = {"smoke": 10, "quick": 60, "study": 1200, "full": 24 * 3600}  # expected for a notebook that never ran
TIMEOUT = {"smoke": 300, "quick": 1200, "study": 3 * 3600, "full": 7 * 24 * 3600}  # seconds for one cell
LONG = ("09", "10")  # chapters that take longer than the others ...
LONGER = 2.25  # ... so many times
LAST = "10"  # this chapter reads the results of the others
TICK = 0.2  # seconds between two looks at what runs
SAY = 30  # seconds between two lines about a notebook where there is no terminal
PLACES = {"recorded", "play", "cache"}  # folders below `results` that are no batch runs
NOT_IN_KEY = {"runner.py", "report.py", "__main__.py"}  # a result does not depend on them


@dataclass(frozen=True, kw_only=True)
class Job:
    """One notebook to run: everything that a worker needs to know, on this machine or on another with the same folders."""

    notebook: Path
    folder: Path  # of this series' results
    parameters: dict
    preset: str
    dataset: str  # its label
    timeout: int  # seconds for one cell
    token: str = ""  # the job goes on while `folder / ".running"` says this
    shared: bool = False  # may other notebooks run on the same machine at the same time?
    home: Path = field(default_factory=Path.cwd)  # where the command was typed
    environment: dict = field(default_factory=lambda: {k: v for k, v in os.environ.items() if k.startswith("EFFILIB_")})

    @property
    def name(self):
        return self.notebook.stem

    @property
    def results(self):
        return self.folder / self.name

    @property
    def partial(self):
        return self.folder / ".partial" / self.name

    @property
    def old(self):
        return self.folder / ".old" / self.name

    @property
    def failed(self):
        return self.folder / "failed" / self.name

    @property
    def recorded(self):
        return paths.recorded() / f"{self.preset}-{self.dataset}" / self.name / "record.json"

    def held(self):
        """Does the run that this job belongs to still hold the results folder?"""
        try:
            return (self.folder / ".running").read_text() == self.token
        except OSError:
            return False


@dataclass(frozen=True)
class Outcome:
    """How one notebook ended: "complete", "up to date", "failed" or "interrupted"; the reason is one sentence."""

    name: str
    status: str
    reason: str = ""
    seconds: float = 0.0

    @property
    def good(self):
        return self.status in ("complete", "up to date")


class Interrupted(Exception):
    """The run that a job belongs to gave up its results folder."""


# The series and its parameters


def series(notebooks=None):
    """The notebooks of a folder (by default the series), in the order in which they run. Raises `BadInput` if there are none."""
    folder = Path(notebooks or paths.notebooks()).absolute()
    found = sorted(folder.glob("*.ipynb"), key=lambda path: (path.stem.startswith(LAST), path.stem))
    if not found:
        raise BadInput(f"no notebooks in {folder}: the series comes with a checkout of effilib (--notebooks names another folder)")
    return found


def select(selectors, notebooks=None):
    """The notebooks that `selectors` name by their beginnings ("02", "3_1", "3.1", "03_2_mixed"), or all. Raises `BadInput`."""
    found = series(notebooks)
    chosen = set()
    for selector in selectors:
        start = selector.rpartition("/")[2].removesuffix(".ipynb").replace(".", "_")
        border = "(_|$)" if re.fullmatch(r"[\d_]+", start) else ""  # "1" is not chapter 10
        matching = [path for path in found if re.match(f"0?{re.escape(start)}{border}", path.stem)]
        if not start or not matching:
            choose("notebook", selector, [path.stem for path in found])
        chosen.update(matching)
    return [path for path in found if path in chosen or not selectors]


def cells(notebook):
    """The cells of a notebook file as (type, source, tags). Raises `BadInput` if it is none."""
    try:
        content = json.loads(Path(notebook).read_text())["cells"]
        return [(cell["cell_type"], "".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in content]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{notebook} is not a notebook: {error}") from error


def defaults(notebook):
    """Parameters of a notebook and their defaults: the plain literals of its cell tagged `parameters` (others: None)."""
    source = "\n".join(source for kind, source, tags in cells(notebook) if kind == "code" and "parameters" in tags)
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise BadInput(f"the parameters of {notebook} cannot be read: {error}") from error
    found = {}
    for statement in statements:
        for target in statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]:
            if isinstance(target, ast.Name):
                found[target.id] = _literal(statement.value, None)
    return found


def _literal(code, otherwise):
    try:
        return ast.literal_eval(code)
    except (ValueError, SyntaxError, TypeError):
        return otherwise


def read(notebook, name, text):
    """The value of `-p name text` for a notebook. The type of the default decides: a string takes the text as it stands.

    Raises `BadInput` if the notebook has no such parameter or the text does not have its type.
    """
    known = defaults(notebook)
    if name not in known:
        choose(f"parameter of {notebook.stem}", name, known or ["none, it has no parameters"])
    default = known[name]
    kind = type(default)
    if kind is str:
        return text
    if kind is type(None):
        return _literal(text, text)
    try:
        value = kind(text) if kind in (int, float) else _literal(text, text)
    except ValueError:
        value = text
    if not isinstance(value, kind):
        raise BadInput(f"parameter {name!r} of {notebook.stem} takes values of type {kind.__name__} such as {default!r}, not {text!r}")
    return value


def _here(name, text):
    """A data set or network file that exists, seen from the current folder, by its whole path; anything else as it stands."""
    head, colon, tail = text.partition(":") if name == "network" else (text, "", "")
    path = Path(head).expanduser()
    if not head or not path.exists() or (name == "network" and path.suffix != ".py"):
        return text
    return str(path.absolute()) + colon + tail


def _clean(text):
    return re.sub(r"[^A-Za-z0-9_.=-]+", "_", text)


def plan(selectors=(), *, preset="", parameters=(), name="", timeout=None, notebooks=None):
    """Check what was asked for and lay it out as a list of `Job`s; nothing runs yet, and nothing is written.

    parameters: pairs (name, text). Raises `BadInput` naming what is unknown, mistyped or can't be used.
    """
    from effilib import data, tasks

    chosen = select(selectors, notebooks)
    given = dict(parameters)
    preset = choose("preset", given.pop("preset", preset) or os.environ.get("EFFILIB_PRESET") or "quick", SECONDS)
    dataset = given.pop("dataset", "") or tasks.default_dataset(preset)
    dataset = dataset if dataset in data.KNOWN else _here("dataset", dataset)
    data.check_name(dataset)
    given = {key: _here(key, text) if key == "network" else text for key, text in sorted(given.items())}
    if timeout is not None and timeout < 1:
        raise BadInput(f"--timeout is a number of seconds of at least 1, not {timeout}")
    if name in PLACES or name.startswith(".") or name != _clean(name):
        raise BadInput(
            f"--name {name!r} cannot name the results: use letters, digits, '_', '.', '=' and '-', and not {', '.join(sorted(PLACES))}"
        )
    label = _clean(data.label(dataset))
    other = "".join(f"-{key}={_clean(Path(text).name)}" for key, text in given.items())
    folder = paths.results() / (name or f"{preset}-{label}{other}")
    jobs = []
    for notebook in chosen:
        values = {key: read(notebook, key, text) for key, text in given.items()}
        common = {"preset": preset, "dataset": dataset}
        values |= {key: value for key, value in common.items() if key in defaults(notebook)}
        limit = timeout or TIMEOUT[preset]
        jobs.append(Job(notebook=notebook, folder=folder, parameters=values, preset=preset, dataset=label, timeout=limit))
    if "dataset" in dict(parameters) and not any("dataset" in job.parameters for job in jobs):
        raise BadInput(f"unknown parameter 'dataset': {', '.join(job.name for job in jobs)} has none")
    return jobs


# What a result depends on


def _library():
    """Digest of effilib's code, without comments and docstrings, as far as results depend on it."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for path in sorted(package.rglob("*.py")):
        if path.name not in NOT_IN_KEY:
            tree = ast.parse(path.read_text())
            for node in ast.walk(tree):
                documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                if documented and ast.get_docstring(node, clean=False) is not None:
                    del node.body[0]
            digest.update(f"{path.relative_to(package)} {ast.dump(tree)}".encode())
    return digest.hexdigest()


def _content(text):
    """Digest of the user's file that a parameter names (`/home/me/mine.py:net`, `/home/me/photos`), else None."""
    path = Path(text.partition(":")[0] if ".py:" in text else text)
    if not path.is_absolute():
        return None
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(path.rglob("*"))]


def run_key(job):
    """Digest of what the result of a job depends on. Equal keys: nothing to run again."""
    read = []  # chapter 2 shows the recorded results, chapter 10 those of this series as well
    if job.name.startswith(("02", LAST)):
        read += sorted(paths.recorded().glob("*/*/record.json"))
    if job.name.startswith(LAST):
        read += [path for path in sorted(job.folder.glob("*/record.json")) if path.parent != job.results]
    parts = {
        "cells": cells(job.notebook),
        "parameters": job.parameters,
        "files": [_content(value) for value in job.parameters.values() if isinstance(value, str)],
        "records": [(str(path), path.read_text()) for path in read],
        "shared": job.shared,
        "torch": importlib.metadata.version("torch"),
        "effilib": _library(),
    }
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def _status(path):
    content = paths.read_json(path)
    return content.get("status") if isinstance(content, dict) else None


def up_to_date(job):
    """Is there a complete result of this very job? One from a machine of its own is good enough where it would share one."""
    run = paths.read_json(job.results / "run.json") or {}
    whole = _status(job.results / "record.json") == "complete" and (job.results / "report.html").exists()
    return whole and run.get("status") == "complete" and run.get("key") in (run_key(job), run_key(replace(job, shared=False)))


def expected(job):
    """Seconds that a job will take: as last time, else as recorded, else the preset's budget."""
    run = paths.read_json(job.results / "run.json") or {}
    last = run.get("seconds") if run.get("status") == "complete" else None
    recorded = (paths.read_json(job.recorded) or {}).get("duration_s")
    return last or recorded or SECONDS[job.preset] * (LONGER if job.preset == "study" and job.name.startswith(LONG) else 1)


# One job


def run_one(job):
    """Run one notebook, put its results in place and render its report.

    Returns its `Outcome`; whatever the notebook does, nothing is raised. `run.json` is written last: without it, or with
    another key in it, the notebook runs again.
    """
    from effilib import clock

    if not job.held():
        return Outcome(job.name, "interrupted")
    with clock.elapsed() as seconds:
        key = place = None
        try:
            _tidy(job)
            key = run_key(job)
            job.partial.mkdir(parents=True)
            reason = _execute(job)
            if not reason and _status(job.partial / "record.json") != "complete":
                reason = "it wrote no complete record.json: its last cell, tagged `record`, does that"
            place = _put(job, reason)
            reason = _render(job, place, reason)
        except Interrupted:
            return Outcome(job.name, "interrupted")
        except (OSError, BadInput) as error:  # a full disk, for one
            reason = f"its results cannot be written: {_sentence(error)}"
        finally:
            shutil.rmtree(job.partial, ignore_errors=True)
        status = "failed" if reason else "complete"
        kept = " (the earlier result is kept; see failed/ for this run)" if place not in (None, job.results) else ""
        state = {"status": status, "reason": reason + kept, "seconds": round(seconds(), 1), "key": key, "date": clock.date()}
        try:
            job.results.mkdir(exist_ok=True)
            paths.write(job.results / "run.json", state)
        except OSError as error:
            status, reason = "failed", reason or f"its results cannot be written: {_sentence(error)}"
        return Outcome(job.name, status, reason, seconds())


def _tidy(job):
    """Take up what a killed run left: its processes, its half result, and the folders that it was about to exchange."""
    _end(job.partial)
    shutil.rmtree(job.partial, ignore_errors=True)
    if job.old.exists() and not job.results.exists():
        job.old.rename(job.results)
    shutil.rmtree(job.old, ignore_errors=True)


def _put(job, reason):
    """Put a finished run in its place, which is never that of a complete result if it failed. Returns the place."""
    # Nobody shall take the record of a failed run for a result, and nobody needs the log of one that went well.
    (job.partial / ("record.json" if reason else "process.log")).unlink(missing_ok=True)
    shutil.rmtree(job.failed, ignore_errors=True)
    place = job.failed if reason and _status(job.results / "record.json") == "complete" else job.results
    for folder in (place, job.old):
        folder.parent.mkdir(exist_ok=True)
    if place.exists():
        place.rename(job.old)
    job.partial.rename(place)
    shutil.rmtree(job.old, ignore_errors=True)
    return place


def _render(job, place, reason):
    """Write the report of a finished run. Returns the reason of its failure, which may be that there is no report."""
    from effilib import report

    executed = place / "notebook.ipynb"
    if not executed.exists():
        shutil.copyfile(job.notebook, executed)
    record = None if reason else paths.read_json(place / "record.json")
    try:
        report.render(executed, place / "report.html", record, reason or None)
    except Exception as error:
        reason = reason or f"its report cannot be rendered: {_sentence(error)}"
    return reason


def _sentence(error):
    """An exception as one short line."""
    text = getattr(error, "strerror", None) or str(error)
    return _line(text if isinstance(error, OSError | BadInput) else f"{type(error).__name__}: {text}")


def _line(text):
    line = text.strip().partition("\n")[0]
    return line if len(line) <= 300 else line[:299] + "…"


def _execute(job):
    """Execute a notebook in a child process. Returns the reason of its failure, "" if there is none. Raises `Interrupted`."""
    request = {
        "parent": os.getpid(),
        "notebook": str(job.notebook),
        "output": str(job.partial / "notebook.ipynb"),
        "parameters": job.parameters,
        "timeout": job.timeout,
    }
    log = job.partial / "process.log"
    with tempfile.TemporaryDirectory(prefix="effilib-") as sockets, log.open("wb") as stderr:
        environment = {**os.environ, **job.environment, "EFFILIB_OUT": str(job.partial), "JUPYTER_RUNTIME_DIR": sockets}
        environment["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # silences a warning of the debugger, which nobody uses here
        if job.shared:
            environment["EFFILIB_SHARED"] = "1"
        if (paths.root() / "effilib").is_dir():  # a checkout that need not be installed
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(paths.root()), os.environ.get("PYTHONPATH")]))
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, json.dumps(request)],  # -P: files in the current folder shadow nothing
            env=environment,
            cwd=job.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
        try:
            reason = _await(process, job)
        finally:
            _end(job.partial)
            process.wait()
    if process.returncode and not reason:
        reason = f"its process was ended by signal {-process.returncode}" if process.returncode < 0 else "its process ended badly"
    return reason


def _await(process, job):
    while True:
        try:
            return process.communicate(timeout=TICK)[0]
        except subprocess.TimeoutExpired:
            if not job.held():
                raise Interrupted from None


def _end(out):
    """Kill all processes whose `EFFILIB_OUT` is `out`: the child, its kernel, and what the notebook started."""
    import psutil

    def family():
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.pid != os.getpid() and process.environ().get("EFFILIB_OUT") == str(out):
                    yield process

    for _ in range(10):  # what starts while we look is found the next time
        if not (found := list(family())):
            return
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=1)


# The child process


def _child(request):
    """Execute one notebook in this process; standard output carries the reason if it fails, and nothing else."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end when the runner ends, however that happens
    if os.getppid() != request["parent"]:
        return
    with os.fdopen(os.dup(1), "w") as answer:
        os.dup2(2, 1)  # what else is printed, by the kernel for one, goes to the log
        answer.write(_papermill(**request))


def _papermill(*, notebook, output, parameters, timeout, **_):
    """Execute a notebook. Returns "" or the reason of its failure in one line."""
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    try:
        papermill.execute_notebook(
            *(path.replace("{", "{{").replace("}", "}}") for path in (notebook, output)),  # papermill formats paths
            parameters,
            kernel_name="python3",
            language="python",
            progress_bar=False,
            start_timeout=180,
            execution_timeout=timeout,
            iopub_timeout=60,
            kernel_manager_class=_kernel(),
        )
    except papermill.PapermillExecutionError as error:
        return _line(error.evalue if error.ename == "BadInput" else f"{error.ename}: {error.evalue}")
    except DeadKernelError:
        return f"its kernel was killed or crashed in the cell {_last_cell(output)} (out of memory, perhaps)"
    except CellTimeoutError:
        return f"the cell {_last_cell(output)} took longer than the {timeout} s of --timeout"
    except OSError as error:
        return f"the executed notebook cannot be written: {_sentence(error)}"
    except Exception as error:
        return _sentence(error)
    return ""


def _kernel():
    from jupyter_client import AsyncKernelManager

    class Kernel(AsyncKernelManager):
        """This very interpreter as a kernel, whatever kernels are installed; over Unix sockets: no ports, no other users."""

        def __init__(self, **settings):
            sockets = os.path.join(os.environ["JUPYTER_RUNTIME_DIR"], "kernel")  # by default all kernels would meet at one address
            if len(sockets) < 100:  # a socket's path has at most 104 characters, and "-1" follows
                settings |= {"transport": "ipc", "ip": sockets}
            super().__init__(**settings)

        def format_kernel_cmd(self, extra_arguments=None):
            return [sys.executable, "-m", "ipykernel_launcher", "-f", self.connection_file, *(extra_arguments or ())]

    return Kernel


def _last_cell(output):
    """First line of the cell that was begun last, in quotes."""
    content = paths.read_json(output) or {"cells": []}
    begun = [cell for cell in content["cells"] if cell["cell_type"] == "code" and cell["metadata"].get("papermill", {}).get("start_time")]
    return f"`{''.join(begun[-1]['source']).strip().partition(chr(10))[0][:60]}`" if begun else "?"


# Many jobs


@contextlib.contextmanager
def hold(folder):
    """Hold a results folder: yields the token that jobs look for. Raises `BadInput` if another run holds it."""
    file = folder / ".running"
    with file.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"another run is writing into {folder}: wait for its end, or give this one a --name") from None
        except OSError:
            pass  # a file system without locks
        token = uuid.uuid4().hex
        file.write_text(token)
        try:
            yield token
        finally:
            file.write_text("")


@contextlib.contextmanager
def workers(jobs=1, scheduler=""):
    """An executor, and whether two notebooks may meet on one of its machines. Raises `BadInput` if dask can't be reached."""
    if not scheduler:
        with futures.ThreadPoolExecutor(jobs) as executor:
            yield executor, jobs > 1
        return
    try:
        from distributed import Client
    except ImportError:
        raise BadInput("--scheduler needs the package `distributed`: pip install distributed") from None
    try:
        client = Client(scheduler, timeout=5)
    except (OSError, ValueError) as error:
        raise BadInput(f"no dask scheduler answers at {scheduler!r}: give its address, such as tcp://head:8786") from error
    with client:
        executor = client.get_executor()
        machines = Counter()
        for address, threads in client.nthreads().items():
            machines[urllib.parse.urlsplit(address).hostname] += threads
        try:
            yield executor, any(threads > 1 for threads in machines.values())
        finally:
            executor.shutdown(wait=False)


def run_series(jobs, executor, progress):
    """Submit `run_one` for each job; `progress` hears what runs and what ended. Returns nothing."""
    waiting = {executor.submit(run_one, job): job for job in jobs}
    while waiting:
        done, _ = futures.wait(waiting, timeout=TICK, return_when=futures.FIRST_COMPLETED)
        for future in done:
            progress.ended(_outcome(future, waiting.pop(future)))
        progress.running([job for future, job in waiting.items() if future.running()])


def _outcome(future, job):
    try:
        return future.result()
    except Exception as error:  # a worker was lost, say
        return Outcome(job.name, "failed", _sentence(error))


class Progress:
    """Says what runs, with elapsed and expected time: live lines on a terminal, now and then a plain line elsewhere."""

    def __init__(self, folder, stream=None):
        from effilib import clock

        self.now = clock.now
        self.folder = folder
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self.outcomes = []
        self.begun = {}  # name -> (time, expected seconds)
        self.said = {}  # name -> time of its last plain line
        self.drawn = []  # the live lines on the screen
        self.index = None

    def running(self, jobs):
        """These jobs run now."""
        for job in jobs:
            if job.name not in self.begun:
                self.begun[job.name] = self.now(), expected(job)
                self.said[job.name] = self.now()
                if not self.live:
                    self.say(f"{job.name}: started, {_time(expected(job))} expected")
        lines = {job.name: self._line(job.name) for job in jobs}
        if self.live:
            self._draw(list(lines.values()))
        for name, line in lines.items():
            if not self.live and self.now() - self.said[name] >= SAY:
                self.said[name] = self.now()
                self.say(line)

    def _line(self, name):
        begun, seconds = self.begun[name]
        return f"{name}: {_time(self.now() - begun)} of about {_time(seconds)}"

    def _draw(self, lines):
        width = shutil.get_terminal_size().columns - 1
        lines = [line[:width] for line in lines]
        if lines != self.drawn:
            erase = f"\x1b[{len(self.drawn)}F\x1b[J" if self.drawn else ""
            print(erase + "".join(f"{line}\n" for line in lines), end="", file=self.stream, flush=True)
            self.drawn = lines

    def say(self, line):
        """Print a line that stays."""
        if self.live:
            self._draw([])
        print(line, file=self.stream, flush=True)

    def ended(self, outcome):
        """A job ended: say so and rebuild the index."""
        self.outcomes.append(outcome)
        after = {"complete": f" in {_time(outcome.seconds)}", "failed": f" after {_time(outcome.seconds)}: {outcome.reason}"}
        self.say(f"{outcome.name}: {outcome.status}{after.get(outcome.status, '')}")
        self.rebuild()

    def rebuild(self):
        """Build the folder's `index.html` anew."""
        from effilib import report

        try:
            self.index = report.index(self.folder)
        except OSError as error:
            self.index = None
            self.say(f"index.html cannot be written: {_sentence(error)}")


def _time(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _summary(progress):
    """What was achieved, what failed and why, and where to read on."""
    good = [outcome for outcome in progress.outcomes if outcome.good]
    bad = [outcome for outcome in progress.outcomes if not outcome.good]
    lines = [f"{len(good)} complete, {len(bad)} failed"]
    lines += [f"  {outcome.name}: {outcome.reason or outcome.status}" for outcome in bad]
    return "\n".join([*lines, f"report: {progress.index}"] if progress.index else lines)


def comparison(jobs):
    """A table: does each notebook's ratio lie inside the interval that was recorded for this preset and data set?"""
    rows = [("notebook", "this run", "recorded", "inside the recorded interval?")]
    for job in jobs:
        record, recorded = paths.read_json(job.results / "record.json") or {}, paths.read_json(job.recorded) or {}
        headline, then = record.get("headline"), recorded.get("headline")
        if headline:
            rows.append((job.name, _ratio(headline), _ratio(then) if then else "not recorded", _inside(headline, then)))
    return _table(rows) if len(rows) > 1 else "no ratio to compare: these notebooks have no headline"


def _table(rows):
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{text:{width}}" for text, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _ratio(headline):
    if headline.get("ratio") is None:
        return headline.get("verdict") or "no ratio"
    interval = [headline.get("low"), headline.get("high")]
    return f"{headline['ratio']:.2f}x" + ("" if None in interval else f" [{interval[0]:.2f}, {interval[1]:.2f}]")


def _inside(headline, recorded):
    ratio, low, high = headline.get("ratio"), *((recorded or {}).get(key) for key in ("low", "high"))
    if None in (ratio, low, high):
        return "-"
    return "yes" if low <= ratio <= high else "no, slower" if ratio < low else "no, faster"


def listing(notebooks=None):
    """The series as a table: chapter, title, notebook, and for which presets and data sets a result is recorded."""
    rows = [("chapter", "title", "notebook", "recorded")]
    for notebook in series(notebooks):
        heading = next((line for _, source, _ in cells(notebook) for line in source.splitlines() if line.startswith("# ")), "")
        number = ".".join(part.lstrip("0") for part in re.match(r"[\d_]*", notebook.stem)[0].strip("_").split("_"))
        recorded = sorted(path.parents[1].name for path in paths.recorded().glob(f"*/{notebook.stem}/record.json"))
        rows.append((number, heading[2:], notebook.stem, ", ".join(recorded) or "-"))
    return _table(rows)


@contextlib.contextmanager
def _terminable():
    """SIGTERM interrupts as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(
    selectors=(),
    *,
    preset="",
    parameters=(),
    jobs=1,
    name="",
    scheduler="",
    timeout=None,
    compare=False,
    force=False,
    notebooks=None,
):
    """Run the notebooks that `selectors` name (by default all) and build their report.

    preset: by default `EFFILIB_PRESET`, else "quick". parameters: pairs (name, text) as typed after `-p`.
    jobs: notebooks at a time on this machine. scheduler: address of a dask scheduler instead. timeout: seconds for one
    cell. compare: say whether ratios lie inside the recorded intervals. force: run what is up to date as well.
    Returns the exit code: 0 if all are complete, 1 if any failed, 130 if interrupted. Raises `BadInput` before anything runs.
    """
    if jobs < 1:
        raise BadInput(f"--jobs is the number of notebooks at a time, at least 1, not {jobs}")
    planned = plan(selectors, preset=preset, parameters=parameters, name=name, timeout=timeout, notebooks=notebooks)
    folder = paths.make(planned[0].folder)
    progress = Progress(folder)
    progress.say(f"{len(planned)} notebook{'s' * (len(planned) > 1)}, preset {planned[0].preset}, into {folder}")
    try:
        # Left in this order: first the hold on the folder, which ends the jobs that still run, then their workers.
        with _terminable(), workers(jobs, scheduler) as (executor, shared), hold(folder) as token:
            for last in (False, True):
                batch = [replace(job, token=token, shared=shared) for job in planned if job.name.startswith(LAST) == last]
                due = [job for job in batch if force or not up_to_date(job)]
                for job in batch:
                    if job not in due:
                        progress.ended(Outcome(job.name, "up to date"))
                run_series(due, executor, progress)
    except KeyboardInterrupt:
        finished = [outcome.name for outcome in progress.outcomes]
        left = [job.name for job in planned if job.name not in finished]
        progress.say(f"interrupted: {', '.join(finished) or 'none'} finished, {', '.join(left)} not; the same command goes on from there")
        return 130
    if compare:
        progress.say(comparison(planned))
    progress.say(_summary(progress))
    return 0 if progress.index and all(outcome.good for outcome in progress.outcomes) else 1


if __name__ == "__main__":
    _child(json.loads(sys.argv[1]))
