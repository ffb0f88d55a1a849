"""One notebook as a job: executed by papermill in a process of its own, into a folder that a person reads.

It is complete if its process ended well *and* its `record.json` says so: papermill's output looks complete
even after its kernel was killed. It runs in `.partial/<notebook>`, which takes the place of its results at
the end. A failed run is kept too, with a report of how far it came: in the notebook's own folder if there is
nothing better, else in `failed/<notebook>`; `run.json` tells that the last run failed, and why. An
interrupted run leaves only its finished seeds. A notebook that raises `NotApplicable` or `NoEffect` is
skipped, with that reason: its chapter does not apply to the network or the data, and nothing failed.

While a report is rendered the next notebook may start and import, but not measure: at its cell tagged
`parameters` it waits until the report is written.

Whatever a notebook starts carries its `EFFILIB_OUT` in the environment, and is killed by that mark when the
notebook ends, however it ends. A job goes on only while its run holds the results folder. On another machine
a notebook is executed by `effilib.workbook.cluster`; all the rest of a job happens here.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from effilib import paths
from effilib.errors import BadInput
from effilib.workbook import report
from effilib.workbook.records import SKIPPED

__all__ = ["Job", "Outcome", "executed", "hold", "listing", "saved", "sentence"]

TICK = 0.2  # seconds between two looks at what runs
GIVEN_UP = "its results folder was given up"
SOCKETS = 60  # bytes of a folder's path, beyond which a socket in it has no address


@dataclass(frozen=True, kw_only=True)
class Job:
    """One notebook to run, and where its results go.

    >>> folder = Path("results/mine")
    >>> what = dict(parameters={}, preset="smoke", dataset="mnist5k", timeout=60)
    >>> job = Job(notebook=Path("02_x.ipynb"), folder=folder, **what)
    >>> job.name, str(job.results)
    ('02_x', 'results/mine/02_x')
    """

    notebook: Path
    folder: Path  # of this series' results
    parameters: dict
    preset: str
    dataset: str  # its label
    timeout: int  # seconds for one cell
    key: str = ""  # digest of what the result depends on
    token: str = ""  # the job goes on while `folder / ".running"` says this
    beside: tuple[str, ...] = ()  # names of all notebooks of its run
    shared: bool = False  # may other notebooks run on the same machine at the same time?
    home: Path = field(default_factory=Path.cwd)  # where the command was typed
    environment: dict = field(
        default_factory=lambda: {k: v for k, v in os.environ.items() if k.startswith("EFFILIB_")}
    )

    @property
    def name(self):
        """The notebook's name."""
        return self.notebook.stem

    @property
    def results(self):
        """Folder of its results."""
        return self.folder / self.name

    @property
    def partial(self):
        """Folder that it runs in."""
        return self.folder / ".partial" / self.name

    @property
    def old(self):
        """Where earlier results wait while the new ones take their place."""
        return self.folder / ".old" / self.name

    @property
    def gate(self):
        """File that is locked while a report of this series is rendered."""
        return self.folder / ".rendering"

    @property
    def recorded(self):
        """Folder of the recorded results of the same preset and data set."""
        return paths.recorded() / f"{self.preset}-{self.dataset}" / self.name

    @property
    def files(self) -> dict[str, Path]:
        """Return the user's own files behind the parameters.

        Such as the mine.py of DIR/mine.py:net.
        """
        texts = {name: value for name, value in self.parameters.items() if isinstance(value, str)}
        found = {
            name: Path(text.rpartition(":")[0] if ".py:" in text else text) for name, text in texts.items()
        }
        return {name: path for name, path in found.items() if path.is_absolute() and path.exists()}

    def held(self) -> bool:
        """Return whether this job's run still holds the results folder."""
        try:
            return (self.folder / ".running").read_text(encoding="utf-8") == self.token
        except OSError:
            return False


@dataclass(frozen=True)
class Outcome:
    """How one notebook ended: complete, up to date, skipped, failed or interrupted; and why.

    shared: something else was measured on its machine at the same time.

    >>> Outcome("02_x", "failed", "its kernel was killed").status
    'failed'
    """

    name: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    shared: bool = False


@dataclass(frozen=True)
class Ran:
    """A notebook that was executed, or needs only its report: where it lies, and why it did not end well.

    >>> Ran(Path("results/mine/02_x"), "its kernel was killed", 3.0).failure
    'its kernel was killed'
    """

    place: Path
    failure: str
    seconds: float


def listing(path: Path) -> list[tuple[str, int, int]]:
    """Return names, sizes and times of a file or a folder's files.

    >>> [(name, size) for name, size, _ in listing(paths.write("a.txt", "abc"))]
    [('a.txt', 3)]
    """
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [
        (str(file.relative_to(path.parent)), file.stat().st_size, file.stat().st_mtime_ns)
        for file in files
        if file.is_file()
    ]


def saved(file: str | Path) -> dict:
    """Return the JSON object in a file; an empty one where there is none, or a damaged one.

    >>> saved("missing.json")
    {}
    """
    found = paths.read_json(file)
    return found if isinstance(found, dict) else {}


class Interrupted(Exception):
    """The run that a job belongs to gave up its results folder."""


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[str]:
    """Hold a results folder: yields the token that jobs look for.

    Raises `BadInput` if another run holds it.

    >>> with hold(paths.make("mine")) as token:
    ...     Path("mine/.running").read_text() == token
    True
    """
    file = folder / ".running"
    with file.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(
                f"another run is writing into {folder}: wait for its end, or give this one a --name"
            ) from None
        except OSError:
            pass  # a file system without locks
        token = uuid.uuid4().hex
        try:
            file.write_text(token, encoding="utf-8")
        except OSError as error:  # a disk without a byte left
            raise BadInput(f"cannot write results into {folder}: {error.strerror}") from error
        try:
            yield token
        finally:
            with contextlib.suppress(OSError):
                file.write_text("", encoding="utf-8")


# Executing


def execute(job: Job, wanted: Callable[[], bool] | None = None) -> str:
    """Execute a notebook in a child process, into `job.partial`.

    wanted: does anybody wait for it still? By default, as long as its run holds the results folder. Returns
    the reason of its failure, "" if there is none. Raises `Interrupted` if nobody wants it any more.
    """
    wanted = wanted or job.held
    gate = "" if job.shared else str(job.gate)
    request = json.dumps(
        [str(job.notebook), str(job.partial / "notebook.ipynb"), job.parameters, job.timeout, gate]
    )
    with _short_folder() as sockets, (job.partial / "process.log").open("wb") as log:
        environment = {
            **os.environ,
            **job.environment,
            "EFFILIB_OUT": str(job.partial),
            "JUPYTER_RUNTIME_DIR": sockets,
            "IPYTHONDIR": os.path.join(sockets, "ipython"),  # the user's profile is for the user's sessions
            "PYTHONSTARTUP": None,  # and so is this
        }
        if job.shared:
            environment["EFFILIB_SHARED"] = "1"
        if (paths.root() / "effilib").is_dir():  # a checkout that need not be installed
            environment["PYTHONPATH"] = os.pathsep.join(
                filter(None, [str(paths.root()), os.environ.get("PYTHONPATH")])
            )
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, request],  # -P: files in the current folder shadow nothing
            env={name: value for name, value in environment.items() if value is not None},
            cwd=job.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    reason, _ = process.communicate(timeout=TICK)
                    break
                if not wanted():
                    raise Interrupted
        finally:
            end(job.partial)
            process.wait()
    if process.returncode < 0 and not reason:
        return f"its process was ended by signal {-process.returncode}"
    return reason or ("its process ended badly" if process.returncode else "")


@contextlib.contextmanager
def _short_folder():
    """A temporary folder for sockets, whose addresses must be short: not in TMPDIR where that is long."""
    usual = tempfile.gettempdir()
    short = [
        p for p in (usual, "/tmp", "/var/tmp", "/dev/shm") if len(p) <= SOCKETS and os.access(p, os.W_OK)
    ]
    if not short:
        raise BadInput(
            f"the temporary folder {usual} has too long a path for a kernel's sockets: set TMPDIR to one of "
            f"at most {SOCKETS} characters"
        )
    with tempfile.TemporaryDirectory(prefix="effilib-", dir=short[0], ignore_cleanup_errors=True) as folder:
        yield folder


def end(out: Path) -> None:
    """Kill all processes whose `EFFILIB_OUT` is `out`.

    They are the child, its kernel, and what the notebook started.
    """
    import psutil

    for _ in range(10):  # what starts while we look is found the next time
        found = [
            p
            for p in psutil.process_iter(["environ"])
            if (p.info["environ"] or {}).get("EFFILIB_OUT") == str(out)
        ]
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if not found:
            return
        psutil.wait_procs(found, timeout=1)


# One job


def start_one(job: Job, execute: Callable[[Job], str] = execute) -> Ran | Outcome:
    """Execute one notebook and put its results in place; `finish` does the rest.

    If only the report is missing, nothing is executed. `run.json` is written last: without it, or with
    another key in it, the notebook runs again. An `Outcome` is the end of an interrupted job.
    """
    from effilib import clock  # brings torch, for which the child process need not wait

    if not job.held():
        return Outcome(job.name, "interrupted", GIVEN_UP)
    _tidy(job)
    if executed(job):
        return Ran(job.results, "", saved(job.results / "run.json").get("seconds", 0))
    with clock.elapsed() as seconds:
        try:
            job.partial.mkdir(parents=True)
            failure = execute(job)
            if not failure and not _complete(job.partial):
                failure = "it wrote no complete record.json: its last cell, tagged `record`, does that"
            reason = failure or "its report was not rendered; the next call does that"
            _note(job, job.partial, Ran(job.partial, failure, seconds()), reason)
            return Ran(_put(job, failure), failure, seconds())
        except Interrupted:
            return Outcome(job.name, "interrupted", GIVEN_UP)
        finally:
            shutil.rmtree(job.partial, ignore_errors=True)


def finish(job: Job, ran: Ran) -> Outcome:
    """Render the report of an executed notebook, and bring the index of its folder up to date.

    Raises OSError where the results cannot be written.
    """
    from effilib import clock

    with clock.elapsed() as seconds, _locked(job.gate):
        reason = _render(job, ran.place, ran.failure)
        kept = "" if ran.place == job.results else " (the earlier result is kept; see failed/ for this run)"
        ran = Ran(ran.place, ran.failure, ran.seconds + seconds())
        _note(job, job.results, ran, reason + kept if reason else "")
        with contextlib.suppress(OSError):  # a full disk ends no series; it is said at its end
            report.index(job.folder, job.beside)
    shared = bool(saved(job.results / "record.json").get("shared_machine"))
    return Outcome(
        job.name, _status(reason), reason.removeprefix(SKIPPED), ran.seconds, shared and not reason
    )


def _status(reason):
    return "complete" if not reason else "skipped" if reason.startswith(SKIPPED) else "failed"


def _note(job, folder, ran, reason):
    """Write `run.json`: how the last run of a notebook ended."""
    from effilib import clock

    state = {
        "status": _status(reason),
        "reason": reason.removeprefix(SKIPPED),
        "seconds": round(ran.seconds, 1),
        "key": job.key,
        "date": clock.date(),
        "executed": not ran.failure,
    }
    paths.write(folder / "run.json", state)


@contextlib.contextmanager
def _locked(file):
    """Hold a file's lock, where there are locks."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            fcntl.flock(stack.enter_context(file.open("ab")), fcntl.LOCK_EX)
        yield


def executed(job: Job) -> bool:
    """Return whether there is a complete record of this very job.

    Times from a shared machine do not do if it runs alone.

    >>> from effilib.workbook.runner import plan
    >>> executed(plan(["02"], preset="smoke")[0])
    False
    """
    run, record = (saved(job.results / name) for name in ("run.json", "record.json"))
    whole = (
        record.get("status") == "complete"
        and run.get("key") == job.key
        and run.get("executed", run.get("status") == "complete")
    )
    return whole and (job.shared or not record.get("shared_machine"))


def _complete(folder):
    return saved(folder / "record.json").get("status") == "complete"


def _tidy(job):
    """Take up what a killed run left: processes, a half result, folders about to be exchanged."""
    end(job.partial)
    shutil.rmtree(job.partial, ignore_errors=True)
    if job.old.exists() and not job.results.exists():
        job.old.rename(job.results)
    shutil.rmtree(job.old, ignore_errors=True)
    for name in ("report.html", "run.json"):  # what `paths.write` was about to put in place
        for rest in job.results.glob(f".{name}.*"):
            rest.unlink()


def _put(job, reason):
    """Put a finished run in its place, never that of a complete result if it failed. Returns the place."""
    # The record of a failed run is no result, and nobody needs the log of one that went well.
    (job.partial / ("record.json" if reason else "process.log")).unlink(missing_ok=True)
    if not saved(job.partial / "notebook.ipynb"):  # half-written, on a full disk for one
        (job.partial / "notebook.ipynb").unlink(missing_ok=True)
    failed = job.folder / "failed" / job.name
    shutil.rmtree(failed, ignore_errors=True)
    place = failed if reason and _complete(job.results) else job.results
    for folder in (place, job.old):
        folder.parent.mkdir(exist_ok=True)
    if place.exists():
        place.rename(job.old)
    job.partial.rename(place)
    shutil.rmtree(job.old, ignore_errors=True)
    return place


def _render(job, place, reason):
    """Write the report of a finished run. Returns the reason of its failure, or of having no report."""
    executed = place / "notebook.ipynb"
    if not executed.exists():
        shutil.copyfile(job.notebook, executed)
    record = None if reason else paths.read_json(place / "record.json")
    try:
        report.render(executed, place / "report.html", record, reason or None)
    except Exception as error:
        reason = reason or f"its report cannot be rendered: {sentence(error)}"
    return reason


def sentence(error: BaseException) -> str:
    """Return an exception as one short line.

    >>> sentence(OSError(28, "No space left on device")), sentence(ValueError("no such thing"))
    ('No space left on device', 'ValueError: no such thing')
    """
    text = getattr(error, "strerror", None) or str(error)
    return _line(text if isinstance(error, OSError | BadInput) else f"{type(error).__name__}: {text}")


def _line(text):
    line = text.strip().partition("\n")[0]
    return line if len(line) <= 300 else line[:299] + "…"


# The child process


def _child(notebook, output, parameters, timeout, gate):
    """Execute one notebook in this process; only the reason of a failure goes to standard output."""
    if sys.platform == "linux":  # PR_SET_PDEATHSIG: end when the runner ends, however that happens
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    with os.fdopen(os.dup(1), "w") as answer:
        os.dup2(2, 1)  # what else is printed, such as by the kernel, goes to the log
        answer.write(_papermill(notebook, output, parameters, timeout, gate))


def _papermill(notebook, output, parameters, timeout, gate):
    """Execute a notebook. Returns "" or the reason of its failure in one line."""
    with report.light_imports():
        import papermill
        from nbclient.exceptions import CellTimeoutError, DeadKernelError

    def wait(cell, cell_index):
        """Measure nothing while a report is rendered."""
        if gate and "parameters" in cell.metadata.get("tags", []):
            with contextlib.suppress(OSError), open(gate, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)

    settings = dict(
        kernel_name="python3",
        language="python",
        kernel_manager_class=_kernel(),
        start_timeout=180,
        iopub_timeout=60,
        on_cell_start=wait,
    )
    try:
        papermill.execute_notebook(
            notebook, output, parameters, progress_bar=False, execution_timeout=timeout, **settings
        )
    except papermill.PapermillExecutionError as error:
        if error.ename in ("NotApplicable", "NoEffect"):
            return _line(f"{SKIPPED}{error.evalue}")
        return _line(error.evalue if error.ename == "BadInput" else f"{error.ename}: {error.evalue}")
    except DeadKernelError:
        return f"its kernel was killed or crashed in the cell {_last_cell(output)} (out of memory, perhaps)"
    except CellTimeoutError:
        return f"the cell {_last_cell(output)} took longer than the {timeout} s of --timeout"
    except OSError as error:
        return f"the executed notebook cannot be written: {sentence(error)}"
    except Exception as error:
        return sentence(error)
    return ""


def _kernel():
    from jupyter_client import AsyncKernelManager

    class Kernel(AsyncKernelManager):
        """This very interpreter as a kernel, over Unix sockets: no ports, no other users."""

        def __init__(self, **settings):
            # by default all kernels would meet at one address
            sockets = os.path.join(os.environ["JUPYTER_RUNTIME_DIR"], "kernel")
            super().__init__(**settings, transport="ipc", ip=sockets)

        def format_kernel_cmd(self, extra_arguments=None):
            # the current folder comes last in the path: no file in it shadows a module
            last = '--InteractiveShellApp.exec_lines=[\'__import__("sys").path.append("")\']'
            path = ["--InteractiveShellApp.ignore_cwd=True", last]
            launcher = [sys.executable, "-P", "-m", "ipykernel_launcher", "-f", self.connection_file]
            return [*launcher, *path, *(extra_arguments or ())]

    return Kernel


def _last_cell(output):
    """First line of the cell that was begun last, in quotes."""
    content = paths.read_json(output) or {"cells": []}
    begun = [cell for cell in content["cells"] if cell["metadata"].get("papermill", {}).get("start_time")]
    return f"`{''.join(begun[-1]['source']).strip().partition(chr(10))[0][:60]}`" if begun else "?"


if __name__ == "__main__":
    _child(*json.loads(sys.argv[1]))
