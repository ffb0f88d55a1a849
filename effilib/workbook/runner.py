"""Run the series: check what was asked for, execute what is missing or changed, and say how it goes.

`run` is what the command line calls: it checks all that can be checked before the first kernel starts,
submits `jobs.run_one` for each notebook to a `concurrent.futures.Executor` (threads here, `cluster` for more
machines), and rebuilds the scoreboard after each. A complete result is left alone until its notebook, its
parameters, torch or effilib's code change."""

import ast
import contextlib
import functools
import importlib.metadata
import json
import re
import shutil
import sys
from concurrent import futures
from dataclasses import replace
from pathlib import Path

from effilib import clock, data, models, paths, provenance, tasks
from effilib.errors import BadInput, choose
from effilib.progress import say_seconds
from effilib.workbook import cluster, report, series
from effilib.workbook.jobs import TICK, Job, Outcome, executed, hold, listing, run_one, saved, sentence

SECONDS = {
    "smoke": 10,
    "quick": 60,
    "study": 1200,
    "full": 24 * 3600,
}  # expected for a notebook that never ran
TIMEOUT = {"smoke": 300, "quick": 1200, "study": 3 * 3600, "full": 7 * 24 * 3600}  # for one cell
LAST = "10"  # this chapter reads the results of the others
PLACES = {"recorded", "play", "cache"}  # folders below `results` that are no batch runs
NOT_IN_KEY = {
    "cluster.py",
    "jobs.py",
    "runner.py",
    "report.py",
    "single.py",
    "__main__.py",
}  # a result does not depend on them

# ------------------------------------------------------------------------------------------ notebooks and
# parameters


def select(selectors=(), notebooks=None):
    """The notebooks of a folder (by default the series) whose names begin as `selectors` say, in the order in
    which they run.

    selectors: "02", "3_1", "3.1", "03_2_mixed", ...; none: all. Raises `BadInput` if there is no such
    notebook.

    >>> [path.stem for path in select(["3_1", "10"])]
    ['03_1_convolution_cost', '10_comparison']
    """
    folder = Path(notebooks or paths.notebooks()).absolute()
    found = sorted(folder.glob("*.ipynb"), key=lambda path: (path.stem.startswith(LAST), path.stem))
    if not found:
        raise BadInput(
            f"no notebooks in {folder}: the series comes with a checkout of effilib (--notebooks names another folder)"
        )
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
    """The cells of a notebook file as (type, source, tags). Raises `BadInput` if it is none.

    >>> cells(paths.notebooks() / "02_overview.ipynb")[0][0]
    'markdown'
    """
    try:
        content = json.loads(Path(notebook).read_text())["cells"]
        return [
            (cell["cell_type"], "".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in content
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{notebook} is not a notebook: {error}") from error


def defaults(notebook):
    """Parameters of a notebook and their defaults: the plain literals of its cell tagged `parameters`. Raises
    `BadInput`.

    >>> defaults(paths.notebooks() / "03_2_mixed_precision.ipynb")["device"]
    'auto'
    """
    source = "\n".join(
        source for kind, source, tags in cells(notebook) if kind == "code" and "parameters" in tags
    )
    try:
        assignments = [
            node for node in ast.parse(source).body if isinstance(node, ast.Assign | ast.AnnAssign)
        ]
        return {
            ast.unparse(getattr(node, "target", None) or node.targets[0]): ast.literal_eval(node.value)
            for node in assignments
        }
    except (SyntaxError, ValueError) as error:
        raise BadInput(f"the parameters of {notebook} cannot be read: {error}") from error


def read(notebook, name, text):
    """The value of `-p name text` for a notebook. The type of the default decides: a string takes the text as
    it stands.

    Raises `BadInput` if the notebook has no such parameter or the text does not have its type.

    >>> read(paths.notebooks() / "03_2_mixed_precision.ipynb", "seeds", "3")
    3
    """
    known = defaults(notebook)
    if name not in known:
        choose(f"parameter of {notebook.stem}", name, known or ["none, it has no parameters"])
    default = known[name]
    kind = type(default)
    try:
        value = kind(text) if kind in (str, int, float) else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if default is not None and type(value) is not kind:
        raise BadInput(
            f"parameter {name!r} of {notebook.stem} takes values of type {kind.__name__} such as {default!r}, not {text!r}"
        )
    return value


def _absolute(name, text):
    """A data set or network in a file, seen from the current folder, by its whole path; anything else as it
    stands.
    """
    path = Path(text).expanduser()
    is_file = (
        path.exists() and text not in data.KNOWN
        if name == "dataset"
        else name == "network" and ".py:" in text
    )
    return str(path.absolute()) if is_file else text


def plan(selectors=(), *, preset="", parameters=(), name="", timeout=None, notebooks=None):
    """Check what was asked for and lay it out as a list of `Job`s; nothing runs yet, and nothing is written.

    parameters: pairs (name, text). Raises `BadInput` naming what is unknown, mistyped or can't be used.

    >>> (job,) = plan(["02"], preset="smoke")
    >>> job.name, job.parameters["preset"]
    ('02_overview', 'smoke')
    """
    chosen = select(selectors, notebooks)
    given = {key: _absolute(key, text) for key, text in sorted(dict(parameters).items())}
    if timeout is not None and timeout < 1:
        raise BadInput(f"--timeout is a number of seconds of at least 1, not {timeout}")
    if name in PLACES or not re.fullmatch(r"([\w=-][\w.=-]*)?", name, re.ASCII):
        choices = f"use letters, digits, '_', '.', '=' and '-', and not {', '.join(sorted(PLACES))}"
        raise BadInput(f"--name {name!r} cannot name the results: {choices}")
    preset = choose("preset", given.pop("preset", preset) or tasks.default_preset(), tasks.PRESETS)
    dataset = given.pop("dataset", "") or tasks.default_dataset(preset)
    data.check_name(dataset)
    if given.get("network"):
        models.check_name(given["network"])
    label = data.label(dataset)
    other = "".join(f"-{key}={Path(text).name}" for key, text in given.items())
    folder = paths.results() / (name or re.sub(r"[^A-Za-z0-9_.=-]+", "_", f"{preset}-{label}{other}"))
    common = {"folder": folder, "preset": preset, "dataset": label, "timeout": timeout or TIMEOUT[preset]}
    jobs = []
    for notebook in chosen:
        values = {key: read(notebook, key, text) for key, text in given.items()}
        values |= {
            key: value
            for key, value in (("preset", preset), ("dataset", dataset))
            if key in defaults(notebook)
        }
        jobs.append(Job(notebook=notebook, parameters=values, **common))
    if "dataset" in dict(parameters) and not any("dataset" in job.parameters for job in jobs):
        raise BadInput(f"unknown parameter 'dataset': {', '.join(job.name for job in jobs)} has none")
    return jobs


# ---------------------------------------------------------------------------------------------------- what is
# to run


def run_key(job):
    """Digest of what the result of a job depends on. Equal keys: nothing to run again.

    >>> run_key(plan(["02"], preset="smoke")[0]) == run_key(plan(["02"], preset="quick")[0])
    False
    """
    read = []  # chapter 2 shows the recorded results, chapter 10 those of this series as well
    if job.name.startswith(("02", LAST)):
        read += paths.recorded().glob("*/*/record.json")
    if job.name.startswith(LAST):
        read += (file for file in job.folder.glob("*/record.json") if file.parent != job.results)
    return provenance.digest(
        cells(job.notebook),
        job.parameters,
        {name: listing(path) for name, path in job.files.items()},
        {str(file): file.read_bytes() for file in read},
        _library(),
        importlib.metadata.version("torch"),
    )


@functools.cache
def _library():
    """Digest of effilib's code, without what no result depends on."""
    folder = Path(__file__).parent
    files = [file for file in folder.rglob("*.py") if file.name not in NOT_IN_KEY]
    return provenance.digest(
        {str(file.relative_to(folder)): provenance.normalized(file.read_text()) for file in files}
    )


def up_to_date(job):
    """Is there a complete result of this very job, and its report?

    >>> up_to_date(plan(["02"], preset="smoke")[0])
    False
    """
    return (
        executed(job)
        and saved(job.results / "run.json")["status"] == "complete"
        and (job.results / "report.html").exists()
    )


def expected(job):
    """Seconds that a job will take: as last time, else as recorded, else the preset's budget.

    >>> expected(plan(["02"], preset="smoke")[0]) == SECONDS["smoke"]
    True
    """
    run, recorded = saved(job.results / "run.json"), saved(job.recorded / "record.json")
    last = run.get("seconds") if run.get("status") == "complete" else None
    return next(
        (s for s in (last, recorded.get("duration_s")) if isinstance(s, int | float) and s),
        SECONDS[job.preset],
    )


# ---------------------------------------------------------------------------------------------------------
# many jobs


@contextlib.contextmanager
def workers(jobs, scheduler, planned, say):
    """An executor for the planned jobs, and whether two notebooks may meet on one of its machines. Raises
    `BadInput`.

    >>> with workers(jobs=2, scheduler="", planned=[], say=print) as (executor, shared):
    ...     shared
    True
    """
    if scheduler:
        with cluster.connect(scheduler, planned, say) as executor:
            yield executor, executor.shared
    else:
        with futures.ThreadPoolExecutor(jobs) as executor:
            yield executor, jobs > 1


def run_series(jobs, executor, progress):
    """Submit `run_one` for each job and yield the `Outcome`s as they come; `progress` hears what runs.

    >>> with futures.ThreadPoolExecutor() as executor:
    ...     list(run_series([], executor, Progress()))
    []
    """
    waiting = {executor.submit(run_one, job): job for job in jobs}
    while waiting:
        done, _ = futures.wait(waiting, timeout=TICK, return_when=futures.FIRST_COMPLETED)
        for future in done:
            yield _outcome(future, waiting.pop(future))
        progress.running([job for future, job in waiting.items() if future.running()])


def _outcome(future, job):
    try:
        return future.result()
    except cluster.SchedulerLost:
        raise
    except OSError as error:  # a full disk, for one
        return Outcome(job.name, "failed", f"its results cannot be written: {sentence(error)}")
    except Exception as error:
        return Outcome(job.name, "failed", sentence(error))


class Progress:
    """Lines on what runs and how it ended. On a terminal the last one lives: what runs now, and how long it
    has and will take.

    >>> Progress().ended(Outcome("02_overview", "complete", seconds=12.0))
    02_overview: complete in 12 s
    """

    def __init__(self, stream=None):
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.begun = {}  # name -> time

    def say(self, line):
        """Print a line that stays."""
        print(f"\r\x1b[K{line}" if self.live else line, file=self.stream, flush=True)

    def running(self, jobs):
        """These jobs run now."""
        for job in jobs:
            if job.name not in self.begun:
                self.begun[job.name] = clock.now()
                if not self.live:
                    self.say(f"{job.name}: started, {say_seconds(expected(job))} expected")
        if self.live:
            times = (
                f"{job.name}: {say_seconds(clock.now() - self.begun[job.name])} of {say_seconds(expected(job))}"
                for job in jobs
            )
            line = ", ".join(times)[: shutil.get_terminal_size().columns - 1]
            print(f"\r\x1b[K{line}", end="", file=self.stream, flush=True)

    def ended(self, outcome):
        """A job ended, or need not run."""
        seconds = f" in {say_seconds(outcome.seconds)}" if outcome.seconds else ""
        self.say(f"{outcome.name}: {outcome.status}{seconds}{': ' * bool(outcome.reason)}{outcome.reason}")


def comparison(jobs):
    """A table: does each notebook's ratio lie inside the interval that was recorded for this preset and data
    set?

    >>> comparison(plan(["02"], preset="smoke"))
    'no ratio to compare: these notebooks have no headline'
    """
    names = [job.name for job in jobs]
    rows, recorded = (
        {row["notebook"]: row for row in report.scoreboard_rows(folder, names)}
        for folder in (jobs[0].folder, jobs[0].recorded.parent)
    )
    table = [("notebook", "this run", "recorded", "inside the recorded interval?")]
    for name in names:
        row, then = rows[name], recorded[name]
        if said := report.speedup(row) or row["verdict"]:
            table.append(
                (
                    name,
                    said,
                    report.speedup(then) or then["verdict"] or "not recorded",
                    _inside(row["ratio"], then),
                )
            )
    if len(table) == 1:
        return "no ratio to compare: these notebooks have no headline"
    return "\n".join(f"{name:36}{this:24}{then:24}{inside}" for name, this, then, inside in table)


def _inside(ratio, recorded):
    low, high = recorded["low"], recorded["high"]
    if None in (ratio, low, high):
        return "-"
    return "yes" if low <= ratio <= high else "no, slower" if ratio < low else "no, faster"


def keep(selectors=(), *, preset="", parameters=(), name="", notebooks=None):
    """Copy complete results among the recorded ones, which are committed, and bring the README's table up to
    date.

    Returns the places. Raises `BadInput`, before anything is copied, for a result that is missing, failed, or
    no measurement.

    >>> keep(["02"], preset="smoke")
    Traceback (most recent call last):
    effilib.errors.BadInput: ... holds no complete result of 02_overview: effilib run 02_overview --preset smoke
    """
    planned = plan(selectors, preset=preset, parameters=parameters, name=name, notebooks=notebooks)
    for job in planned:
        run, record = (saved(job.results / file) for file in ("run.json", "record.json"))
        if not run.get("status") == record.get("status") == "complete":
            raise BadInput(
                f"{job.results} holds no complete result of {job.name}: effilib run {job.name} --preset {job.preset}"
            )
        if job.preset == "smoke" or record.get("shared_machine"):
            raise BadInput(
                f"{job.results} is not a measurement ({'smoke' if job.preset == 'smoke' else 'from a shared machine'})"
            )
    for job in planned:
        for file in ("history.csv", "figure.png", "record.json"):
            if (job.results / file).exists():
                paths.write(paths.make(job.recorded) / file, (job.results / file).read_bytes())
    series.update_readme()
    return [job.recorded for job in planned]


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
    notebooks=None,
):
    """Run the notebooks that `selectors` name (by default all) and build their report.

    preset: by default `EFFILIB_PRESET`, else "quick". parameters: pairs (name, text) as typed after `-p`.
    jobs: notebooks at a time on this machine. scheduler: address of a dask scheduler whose workers execute
    them instead. timeout: seconds for one cell. compare: say whether ratios lie inside the recorded
    intervals. notebooks: another folder than that of the series. Returns the exit code: 0 if all are
    complete, 1 if any failed or the scheduler went away, 130 if interrupted. Raises `BadInput` before
    anything runs."""
    if jobs < 1:
        raise BadInput(f"--jobs is the number of notebooks at a time, at least 1, not {jobs}")
    if scheduler and jobs > 1:
        raise BadInput(
            "--jobs is for this machine; with --scheduler, the workers' GPUs or threads say how many notebooks run at a time"
        )
    planned = plan(
        selectors, preset=preset, parameters=parameters, name=name, timeout=timeout, notebooks=notebooks
    )
    folder = paths.make(planned[0].folder)
    progress, outcomes = Progress(), []

    def ended(outcome):
        outcomes.append(outcome)
        progress.ended(outcome)

    progress.say(
        f"{len(planned)} notebook{'s' * (len(planned) > 1)}, preset {planned[0].preset}, into {folder}"
    )
    try:
        # Left in this order: first the hold on the folder, which ends the jobs that still run, then their
        # workers.
        with workers(jobs, scheduler, planned, progress.say) as (executor, shared), hold(folder) as token:
            for last in (False, True):
                batch = [job for job in planned if job.name.startswith(LAST) == last]
                batch = [replace(job, key=run_key(job), token=token, shared=shared) for job in batch]
                whole = [job for job in batch if up_to_date(job)]
                for job in whole:
                    ended(Outcome(job.name, "up to date"))
                for outcome in run_series([job for job in batch if job not in whole], executor, progress):
                    ended(outcome)
                    with contextlib.suppress(OSError):  # a full disk ends no series; it is said at its end
                        report.index(folder)
    except (KeyboardInterrupt, cluster.SchedulerLost) as end:
        finished = [outcome.name for outcome in outcomes]
        left = [job.name for job in planned if job.name not in finished]
        why = str(end) or "interrupted"
        progress.say(
            f"{why}: {', '.join(finished) or 'none'} finished, {', '.join(left)} not; the same command goes on from there"
        )
        return 130 if isinstance(end, KeyboardInterrupt) else 1
    if compare:
        progress.say(comparison(planned))
    failed = [outcome for outcome in outcomes if outcome.reason]
    progress.say(f"{len(outcomes) - len(failed)} complete, {len(failed)} failed")
    for outcome in failed:
        progress.say(f"  {outcome.name}: {outcome.reason}")
    try:
        progress.say(f"report: {report.index(folder)}")
    except OSError as error:
        progress.say(f"index.html cannot be written: {sentence(error)}")
        return 1
    return 1 if failed else 0
