"""Notebooks over machines: `jobs.start_one`, with the workers of a dask scheduler to execute them.

No files are shared. A notebook travels with its parameters, the user's own files behind them, the records
that it may read and the cells of a comparison that earlier runs of it finished. It is executed in a folder of
the worker's that is deleted afterwards, and what it wrote comes back, finished cells as soon as they are
there, so that they outlive their worker. Data sets that have a name are found by the worker (its own
`EFFILIB_DATA`). Everything else, such as rendering, happens on the calling machine.

The caller gives out the places, not the scheduler: so it knows at any time which notebook is on which worker,
one whose worker dies runs again elsewhere with the cells that it had finished, and no second notebook gets
onto a machine that measures.
"""

import contextlib
import functools
import importlib.metadata
import io
import logging
import os
import queue
import tempfile
import threading
import uuid
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import effilib
from effilib import paths, provenance
from effilib.errors import BadInput
from effilib.workbook import jobs

__all__ = ["Place", "inputs", "pack", "unpack", "versions"]

RUNS = 3  # of a notebook whose workers die
LOOK = 0.5  # seconds between two looks at the workers
LIMIT = 2**28  # bytes of the user's own files that a worker is sent
FETCH = 600  # seconds that the results may need for the way back


class SchedulerLost(Exception):
    """The scheduler went away, or for a moment the connection to it, and with it all that runs."""


@dataclass(frozen=True, order=True)
class Place:
    """Room for one notebook: a thread of a worker, or one of its GPUs.

    >>> Place("tcp://127.0.0.2:40000", "scratch", "127.0.0.2", 0).host
    '127.0.0.2'
    """

    address: str  # of the worker
    folder: str  # the worker's own: another one after a restart
    host: str
    number: int


# At the caller's


@contextlib.contextmanager
def connect(scheduler: str, planned: list[jobs.Job], say: Callable[[str], None]) -> Iterator["Cluster"]:
    """Yield the workers of the dask scheduler at an address, once there are any.

    planned: the jobs to come. say: hears of workers that come and go. Raises `BadInput` if there is no
    scheduler, or no worker fits.
    """
    try:
        from distributed import Client
    except ImportError:
        raise BadInput("--scheduler needs the package `distributed`: pip install -e .[cluster]") from None
    try:
        client = Client(scheduler, timeout=5, set_as_default=False)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"no dask scheduler answers at {scheduler!r}: give its address, such as tcp://head:8786"
        ) from error
    for name in ("distributed", "distributed.client"):  # what they would log is said here, in one sentence
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with client, Cluster(client, planned, say) as cluster:
        yield cluster


class Cluster(futures.Executor):
    """An executor: `submit(start_one, job)` waits for a place and executes the notebook there.

    shared: may several notebooks be on one machine at the same time? Else that is prevented, so that times
    count.
    """

    def __init__(self, client, planned, say):
        self.client, self.say, self.scheduler = client, say, client.scheduler.address
        files = {str(path): path for job in planned for path in job.files.values()}
        self.files = {name: provenance.digest(name, jobs.listing(path)) for name, path in files.items()}
        self.threads = []
        self.changed = threading.Condition()  # guards what follows
        self.looked = None  # when
        # (address, folder) of every worker that is there -> its places, none if it does not fit
        self.places = {}
        self.taken = {}  # number of a job -> its place
        self.waiting = set()  # numbers of the jobs that wait for one
        self._begin()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> futures.Future:
        """Call `fn(job, execute=...)` once there is a place for the job. Returns its future."""
        (job,), future, number = args, futures.Future(), len(self.threads)
        thread = threading.Thread(target=self._run, args=(future, fn, job, number), daemon=True)
        self.threads.append(thread)
        thread.start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Wait until all jobs have ended, which they do when their run gives up its results folder."""
        for thread in self.threads:
            thread.join()

    def _run(self, future, start_one, job, number):
        try:
            self._take(job, number)
            future.set_running_or_notify_cancel()
            future.set_result(start_one(job, execute=functools.partial(self._execute, number)))
        except BaseException as error:
            future.set_exception(error)
        finally:
            self._leave(number)

    # Places

    def _begin(self):
        """Wait for the first workers: they say what a place is, and whether several are on one machine."""
        said = False
        while not (workers := self._workers()):
            if not said:
                self.say(f"no worker has joined {self.scheduler} yet: waiting for one")
            said = True
            self._wait()
        self.gpus = any(worker["resources"].get("GPU") for worker in workers.values())
        refused = self._look()
        machines = Counter(place.host for places in self.places.values() for place in places)
        if not machines:
            raise BadInput(refused[0] if refused else f"the workers of {self.scheduler} left at once")
        self.shared = max(machines.values()) > 1
        where = f"{len(machines)} machine{'s' * (len(machines) > 1)} of {self.scheduler}"
        shared = "; some share a machine, so there are no verdicts on times" if self.shared else ""
        self.say(f"{machines.total()} at a time on {where}{shared}")

    def _workers(self):
        """What the scheduler says of its workers: dict address -> dict. Raises `SchedulerLost`.

        It is asked itself: `Client.scheduler_info` may be a copy, and empty while it is refreshed.
        """
        with contextlib.suppress(Exception):  # a connection breaks in many ways
            if self.client.status == "running":
                return self.client.sync(self.client.scheduler.identity, n_workers=-1)["workers"]
        raise self._lost()

    def _lost(self):
        return SchedulerLost(f"the dask scheduler at {self.scheduler} went away")

    def _look(self):
        """Note which workers came and went. Returns, and says, why new ones cannot be used."""
        from effilib import clock  # brings torch, which a worker need not hold

        refused = []
        with self.changed:
            if self.looked is not None and clock.now() < self.looked + LOOK:
                return refused
            had = any(self.places.values())
            there = {
                (address, worker["local_directory"]): worker for address, worker in self._workers().items()
            }
            self.places = {key: places for key, places in self.places.items() if key in there}
            for (address, folder), worker in there.items():
                if (address, folder) not in self.places:
                    reason = self._refusal(address)
                    room = int(worker["resources"].get("GPU", 0)) if self.gpus else worker["nthreads"]
                    self.places[address, folder] = [
                        Place(address, folder, worker["host"], n) for n in range(0 if reason else room)
                    ]
                    refused += [f"the worker {address} {reason}"] * bool(reason)
            self.looked = clock.now()
            for reason in refused if any(self.places.values()) else ():
                self.say(f"not used: {reason}")
            if had and not any(self.places.values()):
                self.say(f"no worker of {self.scheduler} is left: waiting for one")
        return refused

    def _refusal(self, address):
        """Why a worker cannot be used, "" if it can. It is sent the user's own files that it lacks."""
        try:
            lacks = self.client.run(check, versions(), self.files, workers=[address])[address]
            if isinstance(lacks, str):
                return lacks
            found = {name: jobs.listing(Path(name)) for name in lacks}
            size = sum(size for files in found.values() for _, size, _ in files)
            if size > LIMIT:
                much = f"too much to be sent ({size / 1e6:,.0f} MB)"
                return f"has no {' and no '.join(lacks)}, {much}: put a copy there, at the same path"
            if found:
                sent = {
                    f"{self.files[name]}/{below}": Path(name).parent / below
                    for name in found
                    for below, _, _ in found[name]
                }
                self.client.run(keep_files, pack(sent), workers=[address])
        except Exception as error:  # it has left, or has no effilib
            return f"cannot be used: {jobs.sentence(error)}"
        return ""

    def _take(self, job, number):
        """Wait for a place, in the order of the numbers, and take it; or until nobody wants the job."""
        with self.changed:
            self.waiting.add(number)
            try:
                while job.held():
                    self._look()
                    place = self._free()
                    if place and number == min(self.waiting):
                        self.taken[number] = place
                        return
                    self._wait()
            finally:
                self.waiting.discard(number)

    def _free(self):
        taken = set(self.taken.values())
        busy = set() if self.shared else {place.host for place in taken}
        places = sorted(place for places in self.places.values() for place in places)
        return next((place for place in places if place not in taken and place.host not in busy), None)

    def _wait(self):
        with self.changed:
            self.changed.wait(jobs.TICK)

    def _leave(self, number):
        with self.changed:
            self.taken.pop(number, None)
            self.changed.notify_all()

    # Executing

    def _execute(self, number, job):
        """Do on a worker what `jobs.execute` does; on another one if that dies."""
        lost = []
        while number in self.taken:
            place = self.taken[number]
            reason = self._attempt(job, place)
            if reason is not None:
                return reason
            lost.append(place.address)
            if len(lost) == RUNS:
                return f"its worker was lost {RUNS} times ({', '.join(lost)}): out of memory, perhaps"
            self.say(f"{job.name}: its worker {place.address} was lost; it runs again elsewhere")
            self._leave(number)
            self._take(job, number)
        raise jobs.Interrupted

    def _attempt(self, job, place):
        """Have a worker execute a notebook, and fetch what it wrote.

        Returns the reason of a failure, or None if the worker is lost.
        """
        from distributed import KilledWorker

        name = f"{job.name}-{uuid.uuid4().hex}"
        files = {parameter: (str(path), self.files[str(path)]) for parameter, path in job.files.items()}
        room = {"GPU": 1} if self.gpus else None

        def heard(event):
            with contextlib.suppress(OSError):  # it comes again at the end
                keep_cells(job, event[1]["cells"])

        try:
            self.client.subscribe_topic(name, heard)
            task = self.client.submit(
                on_worker,
                job,
                files,
                pack(inputs(job)),
                self.gpus,
                key=name,
                workers=[place.address],
                resources=room,
                pure=False,
            )
            while not task.done():
                if not job.held():
                    raise jobs.Interrupted
                self._look()
                if place not in self.places.get((place.address, place.folder), ()):
                    return None
                self._wait()
            if task.cancelled():  # not by us
                raise self._lost()
            reason, written, finished = task.result(timeout=FETCH)
        except (KilledWorker, TimeoutError):
            return None
        except Exception as error:
            if self.client.status == "running":
                raise
            raise self._lost() from error
        finally:
            with contextlib.suppress(Exception):  # there may be no task, or no connection
                task.cancel()
                self.client.unsubscribe_topic(name)
        keep_cells(job, finished)
        unpack(written, job.partial)
        return reason


def inputs(job: jobs.Job) -> dict[str, Path]:
    """Return what a notebook finds on its worker: name -> file.

    That is itself, what is recorded, the results of its series, its finished cells.

    >>> from effilib.workbook.runner import plan
    >>> "02_overview.ipynb" in inputs(plan(["02"], preset="smoke")[0])
    True
    """
    results, recorded, notes = job.folder.parent, paths.recorded(), job.folder / ".cells" / job.name
    found = [file for name in ("record.json", "history.csv") for file in job.folder.glob(f"*/{name}")]
    found += (
        [results / name for name in notes.read_text(encoding="utf-8").splitlines()] if notes.exists() else []
    )
    return {
        f"{job.name}.ipynb": job.notebook,
        **{f"results/{file.relative_to(results)}": file for file in found},
        **{
            f"recorded/{file.relative_to(recorded)}": file
            for file in recorded.rglob("*")
            if file.suffix in (".json", ".csv")
        },
    }


def keep_cells(job, archive):
    """Put finished cells into the caller's cache, and note whose they are, for the notebook's next run."""
    names = unpack(archive, job.folder.parent)
    notes = job.folder / ".cells" / job.name
    notes.parent.mkdir(exist_ok=True)
    with notes.open("a", encoding="utf-8") as file:
        file.writelines(f"{name}\n" for name in names)


def pack(files: dict[str, Path]) -> bytes:
    """Return files as a compressed archive, without those that are not there.

    >>> unpack(pack({"a.txt": paths.write("b.txt", "abc"), "gone.txt": Path("gone.txt")}), Path("mine"))
    ['a.txt']
    """
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
        for name, file in files.items():
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                packed.writestr(name, file.read_bytes())
    return archive.getvalue()


def unpack(archive: bytes, folder: Path) -> list[str]:
    """Write the files of an archive below a folder, each atomically. Returns their names.

    >>> unpack(pack({"below/a.txt": paths.write("b.txt", "abc")}), Path("mine"))
    ['below/a.txt']
    >>> Path("mine/below/a.txt").read_text()
    'abc'
    """
    with zipfile.ZipFile(io.BytesIO(archive)) as packed:
        for name in packed.namelist():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            paths.write(folder / name, packed.read(name))
        return packed.namelist()


# On a worker


@functools.cache  # what a process has loaded does not change with the files
def versions() -> dict[str, str]:
    """Return what must be the same on all machines: name -> version, for effilib its code.

    >>> sorted(versions())
    ['effilib', 'torch']
    """
    folder = Path(__file__).parents[1]
    code = {str(file.relative_to(folder)): file.read_text(encoding="utf-8") for file in folder.rglob("*.py")}
    torch = importlib.metadata.version("torch").partition("+")[0]  # +cpu, +cu128
    return {"torch": torch, "effilib": f"{effilib.__version__} (code {provenance.digest(code)[:8]})"}


def check(wanted, files, dask_worker):
    """Why this worker cannot be used, or a list: which of the user's own files it has not got."""
    mine = versions()
    for name, version in wanted.items():
        if mine[name] != version:
            return f"has {name} {mine[name]}, not {version} as here: update it and start it again"
    return [name for name, digest in files.items() if not _copy(name, digest, dask_worker)]


def _copy(name, digest, worker):
    """Where this worker has a user's file: at the same path, or among those sent; None if nowhere."""
    path, sent = Path(name), Path(worker.local_directory, "effilib", digest, Path(name).name)
    with contextlib.suppress(OSError):
        if path.exists() and provenance.digest(name, jobs.listing(path)) == digest:
            return path
    return sent if sent.exists() else None


def keep_files(archive, dask_worker):
    """Keep the user's own files as long as this worker lives."""
    unpack(archive, Path(dask_worker.local_directory, "effilib"))


def on_worker(job, files, archive, gpu):
    """Execute a notebook here. Returns the reason of its failure, what it wrote, and its finished cells.

    files: parameter -> path and digest of the user's own file behind it. archive: `inputs`. gpu: it gets one
    of this worker's for itself.
    """
    from distributed import get_worker

    worker, name = get_worker(), get_worker().get_current_task()
    with contextlib.ExitStack() as stack:
        here = Path(
            stack.enter_context(
                tempfile.TemporaryDirectory(dir=worker.local_directory, ignore_cleanup_errors=True)
            )
        )
        unpack(archive, here)
        parameters, results = dict(job.parameters), here / "results"
        for parameter, (path, digest) in files.items():  # one name on every worker: cells are found by it
            link = here / "home" / parameter / Path(path).name
            link.parent.mkdir(parents=True)
            link.symlink_to(_copy(path, digest, worker))
            parameters[parameter] = parameters[parameter].replace(path, f"./{parameter}/{link.name}")
        (here / "home").mkdir(exist_ok=True)
        places = {
            "EFFILIB_RESULTS": str(results),
            "EFFILIB_RECORDED": str(here / "recorded"),
            "EFFILIB_DATA": str(paths.data()),
        }
        places |= {"CUDA_VISIBLE_DEVICES": stack.enter_context(_gpu(worker))} if gpu else {}
        job = replace(
            job,
            notebook=here / f"{job.name}.ipynb",
            folder=results / job.folder.name,
            parameters=parameters,
            home=here / "home",
            environment={**job.environment, **places, **({} if job.shared else _all_cores(worker))},
        )
        job.partial.mkdir(parents=True)
        sent = set(_finished(results))

        def wanted():
            new = {cell: file for cell, file in _finished(results).items() if cell not in sent}
            if new:
                worker.log_event(name, {"cells": pack(new)})
                sent.update(new)
            task = worker.state.tasks.get(name)  # it is cancelled if the caller goes away
            return (
                worker.status.name in ("running", "paused", "closing_gracefully")
                and task is not None
                and task.state == "executing"
            )

        given = set(sent)
        try:
            reason = jobs.execute(job, wanted)
        except jobs.Interrupted:
            reason = jobs.GIVEN_UP
        except OSError as error:
            reason = f"its worker {worker.address} cannot write: {jobs.sentence(error)}"
        written = {
            str(file.relative_to(job.partial)): file for file in job.partial.rglob("*") if file.is_file()
        }
        new = {cell: file for cell, file in _finished(results).items() if cell not in given}
        return reason, pack(written), pack(new)


def _finished(results):
    """What `compare` keeps below a folder of results: name -> file."""
    return {str(file.relative_to(results)): file for file in (results / "cache").rglob("[!.]*.json")}


@contextlib.contextmanager
def _gpu(worker):
    """A GPU that no other notebook of this worker has, as CUDA_VISIBLE_DEVICES names it."""
    free = _gpus(int(worker.state.total_resources["GPU"]))
    mine = free.get()
    try:
        yield mine
    finally:
        free.put(mine)


@functools.cache
def _gpus(number):
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(number)))
    free = queue.SimpleQueue()
    for name in visible.split(","):
        free.put(name)
    return free


def _all_cores(worker):
    """Environment without dask's default of one thread a library: a notebook has this machine for itself."""
    import dask

    default = dask.config.get("distributed.nanny.pre-spawn-environ", {}) if worker.nanny else {}
    return {name: None for name, value in default.items() if os.environ.get(name) == str(value)}
