"""Run the series: check what was asked for, execute what is missing or changed, and say how it goes.

`run` is what the command line calls: it checks all that can be checked before the first kernel starts,
submits `jobs.start_one` for each notebook to a `concurrent.futures.Executor` (threads here, `cluster` for
more machines), and has `jobs.finish` render one report at a time while the next notebook starts. A complete
result is left alone until its notebook, its parameters, torch or effilib's code change.
"""

import ast
import contextlib
import functools
import importlib.metadata
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from concurrent import futures
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import effilib
from effilib import clock, data, images, models, paths, provenance, tasks
from effilib.errors import BadInput, choose
from effilib.progress import say_seconds
from effilib.statistics import replication
from effilib.workbook import cluster, records, report, series
from effilib.workbook.jobs import (
    TICK,
    Job,
    Outcome,
    Ran,
    executed,
    finish,
    hold,
    listing,
    saved,
    sentence,
    start_one,
)

__all__ = [
    "Progress",
    "comparison",
    "expected",
    "keep",
    "plan",
    "run",
    "run_key",
    "run_series",
    "select",
    "up_to_date",
]

TIMEOUT = {"smoke": 300, "quick": 1200, "study": 6 * 3600, "full": 7 * 24 * 3600}  # seconds for one cell
LAST = "10"  # this chapter reads the results of the others
PLACES = {"recorded", "play", "cache", "pages"}  # folders below `results` that are no batch runs
NOT_IN_KEY = (  # a result does not depend on them
    *(f"workbook/{name}.py" for name in ("cluster", "jobs", "predict", "report", "runner", "train_command")),
    "workbook/website.py",
    "__main__.py",
)

REPETITION = (
    "95 of 100 exact repetitions lie inside: the interval is a prediction, sqrt(2) as wide as the recorded."
)

# Notebooks and parameters


def select(selectors: Iterable[str] = (), notebooks: str | Path | None = None) -> list[Path]:
    """Return the notebooks whose names begin as `selectors` say, in running order.

    selectors: "02", "3_1", "3.1", "03_2_mixed", ...; none: all. notebooks: their folder, by default the
    series'. Raises `BadInput` if there is no such notebook.

    >>> [path.stem for path in select(["3_1", "10"])]
    ['03_1_convolution_cost', '10_comparison']
    """
    folder = Path(notebooks or paths.notebooks()).absolute()
    found = sorted(folder.glob("*.ipynb"), key=lambda path: (path.stem.startswith(LAST), path.stem))
    if not found:
        hint = "the series comes with a checkout of effilib (--notebooks names another folder)"
        raise BadInput(f"no notebooks in {folder}: {hint}")
    chosen = set()
    for selector in selectors:
        start = selector.rpartition("/")[2].removesuffix(".ipynb").replace(".", "_")
        border = "(_|$)" if re.fullmatch(r"[\d_]+", start) else ""  # "1" is not chapter 10
        matching = [path for path in found if re.match(f"0?{re.escape(start)}{border}", path.stem)]
        if not start or not matching:
            choose("notebook", selector, [path.stem for path in found])
        chosen.update(matching)
    return [path for path in found if path in chosen or not selectors]


def _cells(notebook):
    """The cells of a notebook file as (type, source, tags). Raises `BadInput` if it is none."""
    try:
        content = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
        return [
            (cell["cell_type"], "".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in content
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{notebook} is not a notebook: {error}") from error


def _defaults(notebook):
    """Parameters and defaults: plain literals of the cell tagged `parameters`. Raises `BadInput`."""
    found = [source for kind, source, tags in _cells(notebook) if kind == "code" and "parameters" in tags]
    try:
        assignments = [
            node for node in ast.parse("\n".join(found)).body if isinstance(node, ast.Assign | ast.AnnAssign)
        ]
        return {
            ast.unparse(getattr(node, "target", None) or node.targets[0]): ast.literal_eval(node.value)
            for node in assignments
        }
    except (SyntaxError, ValueError) as error:
        raise BadInput(f"the parameters of {notebook} cannot be read: {error}") from error


def _value(notebook, name, text):
    """The value of `-p name text`. The type of the default decides: a string takes the text as it stands.

    Raises `BadInput` if the notebook has no such parameter or the text does not have its type.
    """
    known = _defaults(notebook)
    if name not in known:
        choose(f"parameter of {notebook.stem}", name, known or ["none, it has no parameters"])
    default = known[name]
    kind = type(default)
    try:
        value = kind(text) if kind in (str, int, float) else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if default is not None and type(value) is not kind:
        wanted = f"values of type {kind.__name__} such as {default!r}"
        raise BadInput(f"parameter {name!r} of {notebook.stem} takes {wanted}, not {text!r}")
    return value


def _absolute(name, text):
    """A data set or network in a file, seen from the current folder, by its whole path; else as it stands."""
    is_file = data.own(text) if name == "dataset" else name == "network" and ".py:" in text
    return os.path.abspath(os.path.expanduser(text)) if is_file else text  # "a/../b" is "b"


def plan(
    selectors: Iterable[str] = (),
    *,
    preset: str = "",
    parameters: Iterable[tuple[str, str]] = (),
    name: str = "",
    timeout: int | None = None,
    notebooks: str | Path | None = None,
) -> list[Job]:
    """Check what was asked for and lay it out as `Job`s.

    Nothing runs yet, and nothing is written. parameters: pairs (name, text). Raises `BadInput` naming what is
    unknown, mistyped or can't be used.

    >>> (job,) = plan(["02"], preset="smoke")
    >>> job.name, job.parameters["preset"]
    ('02_overview', 'smoke')
    """
    chosen = select(selectors, notebooks)
    given = {key: _absolute(key, text) for key, text in sorted(dict(parameters).items())}
    for key, text in given.items():
        if images.listed([text]) != text:  # notebooks and records are UTF-8
            raise BadInput(
                f"parameter {key}: {images.listed([text])!r} is no text: give the file another name"
            )
    if timeout is not None and timeout < 1:
        raise BadInput(f"--timeout is a number of seconds of at least 1, not {timeout}")
    if name in PLACES or not re.fullmatch(r"([\w=-][\w.=-]*)?", name, re.ASCII):
        choices = f"use letters, digits, '_', '.', '=' and '-', and not {', '.join(sorted(PLACES))}"
        raise BadInput(f"--name {name!r} cannot name the results: {choices}")
    preset = choose("preset", given.pop("preset", preset) or tasks.default_preset(), tasks.PRESETS)
    own = sorted(text for text in given.values() if os.path.isabs(text))
    dataset = given.pop("dataset", "") or tasks.default_dataset(preset)
    data.check_name(dataset)
    if given.get("network"):
        models.check_name(given["network"])
    label = data.label(dataset)
    other = "".join(f"-{key}={Path(text).name}" for key, text in given.items())
    if own:  # a/photos and b/photos are two
        other += f"-{provenance.digest(own)[:4]}"
    folder = paths.results() / (name or re.sub(r"[^A-Za-z0-9_.=-]+", "_", f"{preset}-{label}{other}"))
    common = {"folder": folder, "preset": preset, "dataset": label, "timeout": timeout or TIMEOUT[preset]}
    jobs, names = [], tuple(notebook.stem for notebook in chosen)
    for notebook in chosen:
        known = _defaults(notebook)
        values = {key: _value(notebook, key, text) for key, text in given.items()}
        values |= {key: value for key, value in (("preset", preset), ("dataset", dataset)) if key in known}
        jobs.append(Job(notebook=notebook, parameters=values, beside=names, **common))
    if "dataset" in dict(parameters) and not any("dataset" in job.parameters for job in jobs):
        raise BadInput(f"unknown parameter 'dataset': {', '.join(job.name for job in jobs)} has none")
    return jobs


# What is to run


def run_key(job: Job) -> str:
    """Return a digest of what a job's result depends on. Equal keys: nothing to run again.

    >>> run_key(plan(["02"], preset="smoke")[0]) == run_key(plan(["02"], preset="quick")[0])
    False
    """
    read = []  # chapter 2 shows the recorded results, chapter 10 those of this series as well
    if job.name.startswith(("02", LAST)):
        read += paths.recorded().glob("*/*/record.json")
    if job.name.startswith(LAST):
        read += (file for file in job.folder.glob("*/record.json") if file.parent != job.results)
    return provenance.digest(
        _cells(job.notebook),
        job.parameters,
        {name: listing(path) for name, path in job.files.items()},
        {str(file): file.read_bytes() for file in read},
        _library(),
        importlib.metadata.version("torch"),
    )


@functools.cache
def _library():
    """Digest of effilib's code, without what no result depends on."""
    folder = Path(effilib.__file__).parent
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*.py")}
    return provenance.digest(
        {
            name: provenance.normalized(file.read_text(encoding="utf-8"))
            for name, file in files.items()
            if name not in NOT_IN_KEY
        }
    )


def up_to_date(job: Job) -> bool:
    """Return whether a job is done, with its report, or skipped.

    >>> up_to_date(plan(["02"], preset="smoke")[0])
    False
    """
    run = saved(job.results / "run.json")
    skipped = run.get("status") == "skipped" and run.get("key") == job.key
    whole = skipped or (executed(job) and run["status"] == "complete")
    return whole and (job.results / "report.html").exists()


def expected(job: Job) -> float | None:
    """Return a job's seconds at most, by earlier runs, or None.

    They are of the same notebook, preset and parameters, in any folder of results or recorded. A run that
    found its measurements in the cache is short: the longest counts.

    >>> expected(plan(["02"], preset="smoke")[0])
    """
    known, wanted = [], {**_defaults(job.notebook), **job.parameters}
    for name in ("preset", "device"):
        wanted.pop(name, None)
    for place in (paths.results(), paths.recorded()):
        for file in place.glob(f"*/{job.name}/record.json"):
            record, run = saved(file), saved(file.with_name("run.json"))
            given = {**wanted, **(record.get("parameters") or {})}
            same = record.get("preset") == job.preset and record.get("schema") == series.SCHEMA
            if same and all(given[name] == value for name, value in wanted.items()):
                last = run.get("seconds") if run.get("status") == "complete" else None
                known += [s for s in (last, record.get("duration_s")) if isinstance(s, int | float) and s > 0]
    return max(known, default=None)


# Many jobs


@contextlib.contextmanager
def _workers(jobs, scheduler, planned, say):
    """An executor for the planned jobs, and whether two notebooks may meet on one of its machines."""
    if scheduler:
        with cluster.connect(scheduler, planned, say) as executor:
            yield executor, executor.shared
    else:
        if jobs > 1:
            say(f"{jobs} at a time on this machine, so there are no verdicts on times")
        elif clock.Measuring().others():
            say("something else is being measured on this machine: while both run, no verdicts on times")
        with futures.ThreadPoolExecutor(jobs) as executor:
            yield executor, jobs > 1


def run_series(jobs: Iterable[Job], executor: futures.Executor, progress: "Progress") -> Iterator[Outcome]:
    """Run the jobs and yield their `Outcome`s as they come.

    Each is executed by the executor; its report is rendered here, one at a time, while the next is starting.

    >>> with futures.ThreadPoolExecutor() as executor:
    ...     list(run_series([], executor, Progress()))
    []
    """
    waiting = {executor.submit(start_one, job): job for job in jobs}
    rendering = {}
    with futures.ThreadPoolExecutor(1) as renderer:
        while waiting or rendering:
            done, _ = futures.wait(
                {**waiting, **rendering}, timeout=TICK, return_when=futures.FIRST_COMPLETED
            )
            for future in done:
                if future in rendering:
                    yield _result(future, rendering.pop(future))
                    continue
                job = waiting.pop(future)
                found: Ran | Outcome
                try:
                    found = _result(future, job)
                except cluster.SchedulerLost:  # what ran to its end has ended
                    for rendered, of in rendering.items():
                        yield _result(rendered, of)
                    raise
                if isinstance(found, Ran):
                    rendering[renderer.submit(finish, job, found)] = job
                else:
                    yield found
            running = [job for future, job in {**waiting, **rendering}.items() if future.running()]
            progress.running(running)


def _result(future: futures.Future, job: Job) -> Any:
    try:
        return future.result()
    except cluster.SchedulerLost:
        raise
    except OSError as error:  # such as a full disk
        return Outcome(job.name, "failed", f"its results cannot be written: {sentence(error)}")
    except Exception as error:
        return Outcome(job.name, "failed", sentence(error))


class Progress:
    """Lines on what runs and how it ended.

    On a terminal the last one lives: what runs now, how long it has taken, and how long it took before.

    >>> Progress().ended(Outcome("02_overview", "complete", seconds=12.0))
    02_overview: complete in 12 s
    """

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.begun: dict[str, tuple[float, str]] = {}  # name -> when, how long it took before

    def say(self, line: str) -> None:
        """Print a line that stays."""
        print(f"\r\x1b[K{line}" if self.live else line, file=self.stream, flush=True)

    def running(self, jobs: list[Job]) -> None:
        """Note that these jobs run now."""
        for job in jobs:
            if job.name not in self.begun:
                usual = expected(job)
                self.begun[job.name] = clock.now(), say_seconds(usual) if usual else ""
                if not self.live:
                    self.say(f"{job.name}: started" + (f", {say_seconds(usual)} expected" if usual else ""))
        if self.live:
            times = []
            for job in jobs:
                begun, usual = self.begun[job.name]
                spent = say_seconds(clock.now() - begun)
                times.append(f"{job.name}: {spent}" + (f" of {usual}" if usual else ""))
            line = ", ".join(times)[: shutil.get_terminal_size().columns - 1]
            print(f"\r\x1b[K{line}", end="", file=self.stream, flush=True)

    def ended(self, outcome: Outcome) -> None:
        """Note that a job ended, or need not run."""
        seconds = f" in {say_seconds(outcome.seconds)}" if outcome.seconds else ""
        shared = "; something else was measured at the same time, so no verdicts" if outcome.shared else ""
        reason = f": {outcome.reason}" if outcome.reason else ""
        self.say(f"{outcome.name}: {outcome.status}{seconds}{shared}{reason}")


def comparison(jobs: list[Job]) -> str:
    """Return a table: do the ratios lie where a repetition of the recorded runs would?

    A repetition's ratio varies as the recorded one did: its prediction interval is sqrt(2) as wide as the
    recorded interval, and an exact repetition lies outside of it in 5 % of the cases.

    >>> comparison(plan(["02"], preset="smoke"))
    'no ratio to compare: these notebooks have no headline'
    """
    names = [job.name for job in jobs]
    rows, recorded = (
        {row["notebook"]: row for row in records.scoreboard_rows(folder, names)}
        for folder in (jobs[0].folder, jobs[0].recorded.parent)
    )
    table = [("notebook", "this run", "recorded", "a repetition", "inside?")]
    for name in names:
        row, then = rows[name], recorded[name]
        if said := records.speedup(row) or row["verdict"]:
            earlier = records.speedup(then) or then["verdict"] or "not recorded"
            table.append((name, said, earlier, *_inside(row, then)))
    if len(table) == 1:
        return "no ratio to compare: these notebooks have no headline"
    table = [f"{name:36}{this:24}{then:24}{within:18}{inside}" for name, this, then, within, inside in table]
    return "\n".join([*table, REPETITION])


def _inside(row, then):
    """(prediction interval, whether a ratio lies in it) as text."""
    if None in (row["ratio"], then["ratio"], then["low"], then["high"]) or row["kind"].startswith("at "):
        return "-", "-"
    low, high = replication(then["ratio"], then["low"], then["high"])
    inside = "yes" if low <= row["ratio"] <= high else "no, slower" if row["ratio"] < low else "no, faster"
    return f"[{low:.2f}, {high:.2f}]", inside


def keep(
    selectors: Iterable[str] = (),
    *,
    preset: str = "",
    parameters: Iterable[tuple[str, str]] = (),
    name: str = "",
    notebooks: str | Path | None = None,
) -> list[Path]:
    """Copy complete results among the recorded ones, which are committed.

    Reports get small pictures; the scoreboards, `all.csv` and the README's table follow. Returns the places.
    Raises `BadInput`, before anything is copied, for a result that is missing, failed, of an older protocol,
    or no measurement.

    >>> keep(["02"], preset="smoke")
    Traceback (most recent call last):
    effilib.errors.BadInput: ... holds no complete result of 02_overview: effilib run 02_overview --preset ...
    """
    planned = plan(selectors, preset=preset, parameters=parameters, name=name, notebooks=notebooks)
    for job in planned:
        _check_kept(job)
    for job in planned:
        place = paths.make(job.recorded)
        for file in ("history.csv", "figure.png", "record.json"):
            if (job.results / file).exists():
                paths.write(place / file, (job.results / file).read_bytes())
        record = saved(job.results / "record.json")
        report.render(job.results / "notebook.ipynb", place / "report.html", record, kept=True)
    series.update()
    return [job.recorded for job in planned]


def _check_kept(job):
    """Raise `BadInput` unless a job's result may be recorded."""
    run, record, there = (
        saved(file)
        for file in (job.results / "run.json", job.results / "record.json", job.recorded / "record.json")
    )
    if not run.get("status") == record.get("status") == "complete":
        again = f"effilib run {job.name} --preset {job.preset}"
        raise BadInput(f"{job.results} holds no complete result of {job.name}: {again}")
    if job.preset == "smoke" or record.get("shared_machine"):
        why = "smoke" if job.preset == "smoke" else "from a shared machine"
        raise BadInput(f"{job.results} is not a measurement ({why})")
    if series.older(record):
        raise BadInput(f"{job.results} was measured under an older protocol: run it again")
    found = record["preset"], data.label(record["dataset"])
    if found != (job.preset, job.dataset):
        how = f"--preset {found[0]} -p dataset {record['dataset']}"
        raise BadInput(f"{job.results} holds preset {found[0]} on {found[1]}: give {how}, too")
    commit = record.get("commit") or ""
    if job.preset in ("study", "full") and (not commit or commit.endswith("+")):
        how = "with changed files" if commit else "outside of a checkout"
        raise BadInput(f"{job.results} was measured {how}: commit, run it again, and it can be repeated")
    then, now = (r.get("parameters", {}).get("dataset") for r in (there, record))
    if then and now and then != now and os.path.isabs(now):
        raise BadInput(f"{job.recorded} is recorded from another data set of this name, {then}")


def run(
    selectors: Iterable[str] = (),
    *,
    preset: str = "",
    parameters: Iterable[tuple[str, str]] = (),
    jobs: int = 1,
    name: str = "",
    scheduler: str = "",
    timeout: int | None = None,
    compare: bool = False,
    notebooks: str | Path | None = None,
) -> int:
    """Run notebooks and build their report.

    selectors: name them; by default all. preset: by default `EFFILIB_PRESET`, else "quick". parameters: pairs
    (name, text) as typed after `-p`. jobs: notebooks at a time on this machine. scheduler: address of a dask
    scheduler whose workers execute them instead. timeout: seconds for one cell. compare: say whether ratios
    lie where a repetition of the recorded runs would. notebooks: another folder than that of the series.
    Returns the exit code: 0 if all are complete, or skipped because their chapter does not apply, 1 if any
    failed or the scheduler went away, 130 if interrupted. Raises `BadInput` before anything runs.

    >>> run(["02"], preset="quikc")
    Traceback (most recent call last):
    effilib.errors.BadInput: unknown preset 'quikc': choose one of ... (did you mean 'quick'?)
    """
    if jobs < 1:
        raise BadInput(f"--jobs is the number of notebooks at a time, at least 1, not {jobs}")
    if scheduler and jobs > 1:
        places = "the workers' GPUs or threads say how many notebooks run at a time"
        raise BadInput(f"--jobs is for this machine; with --scheduler, {places}")
    which: dict[str, Any] = dict(preset=preset, parameters=parameters, name=name, notebooks=notebooks)
    planned = plan(selectors, timeout=timeout, **which)
    folder = paths.make(planned[0].folder)
    progress, outcomes = Progress(), []

    def ended(outcome):
        outcomes.append(outcome)
        progress.ended(outcome)

    many = "s" * (len(planned) > 1)
    progress.say(f"{len(planned)} notebook{many}, preset {planned[0].preset}, into {folder}")
    if (recorded := paths.recorded() / "index.html").exists():
        progress.say(f"recorded results, to be read meanwhile: {recorded}")
    try:
        # Left in this order: first the hold on the folder, which ends the jobs that run, then their workers.
        with _workers(jobs, scheduler, planned, progress.say) as (executor, shared), hold(folder) as token:
            with contextlib.suppress(OSError):  # it is said at the end
                progress.say(f"this machine's, row by row: {report.index(folder, planned[0].beside)}")
            for last in (False, True):
                batch = [job for job in planned if job.name.startswith(LAST) == last]
                batch = [replace(job, key=run_key(job), token=token, shared=shared) for job in batch]
                whole = [job for job in batch if up_to_date(job)]
                for job in whole:
                    reason = saved(job.results / "run.json").get("reason", "")
                    ended(Outcome(job.name, "skipped" if reason else "up to date", reason))
                for outcome in run_series([job for job in batch if job not in whole], executor, progress):
                    ended(replace(outcome, shared=outcome.shared and not shared))
    except (KeyboardInterrupt, cluster.SchedulerLost) as end:
        finished = [outcome.name for outcome in outcomes]
        left = [job.name for job in planned if job.name not in finished]
        why, some = str(end) or "interrupted", ", ".join(finished) or "none"
        progress.say(f"{why}: {some} finished, {', '.join(left)} not; the same command goes on from there")
        return 130 if isinstance(end, KeyboardInterrupt) else 1
    if compare:
        progress.say(comparison(planned))
    skipped = [outcome for outcome in outcomes if outcome.status == "skipped"]
    failed = [outcome for outcome in outcomes if outcome.reason and outcome not in skipped]
    left = f"{len(skipped)} skipped, " if skipped else ""
    progress.say(f"{len(outcomes) - len(skipped) - len(failed)} complete, {left}{len(failed)} failed")
    for outcome in (*skipped, *failed):
        progress.say(f"  {outcome.name}: {outcome.reason}")
    try:
        progress.say(f"report: {report.index(folder)}")
    except OSError as error:
        progress.say(f"index.html cannot be written: {sentence(error)}")
        return 1
    return 1 if failed else 0
