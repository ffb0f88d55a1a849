"""Notebooks over machines: a real dask scheduler and real workers, each in a folder of its own, with other
places for data and results.

Addresses 127.0.0.2, 127.0.0.3, ... stand for machines. No worker is told where the caller's results lie.
"""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap

import psutil
import pytest

from effilib import paths
from effilib.errors import BadInput
from effilib.workbook import cluster
from tests.runs import WAIT, alive, background, command, status, wait_for, write_notebook

pytestmark = pytest.mark.slow

distributed = pytest.importorskip("distributed", reason="the cluster needs the package `distributed`")
linux = pytest.mark.skipif(sys.platform != "linux", reason="only there all of 127.0.0.0/8 is this machine")

# Keeps one seed, as `compare` does; `known` says whether it was there already.
SEED = """
import os, pathlib
from effilib import paths
seed = paths.cache() / "abc" / "seed-0.json"
known = seed.exists()
paths.write(paths.make(seed.parent) / seed.name, {"seed": 0})
"""

# Writes down what it finds, and fails the first time.
TRAVELLER = """
import json
seen = {"network": network, "file": pathlib.Path(network.rpartition(":")[0]).read_text(), "cwd": os.getcwd()}
seen |= {"dataset": dataset, "images": sorted(p.name for p in pathlib.Path(dataset).iterdir())}
seen |= {"data": str(paths.data()), "results": str(paths.results())}
seen |= {"threads": os.environ.get("OMP_NUM_THREADS")}
(pathlib.Path(os.environ["EFFILIB_OUT"]) / "seen.json").write_text(json.dumps(seen))
assert known, "the first time it fails"
"""

LAST = """
import json, os, pathlib
from effilib import paths
series = pathlib.Path(os.environ["EFFILIB_OUT"]).parents[1]
assert json.loads((series / "04_1_travels" / "record.json").read_text())["status"] == "complete"
assert [path.name for path in paths.recorded().rglob("*") if path.is_file()] == ["record.json"]
"""

# Shows which GPU it has, and waits until two notebooks have one.
GPU = """
import os, pathlib, time
mine = os.environ["CUDA_VISIBLE_DEVICES"]
with open({log!r}, "a") as log:
    log.write(f"+{{mine}} ")
while pathlib.Path({log!r}).read_text().count("+") < 2:
    time.sleep(0.05)
time.sleep(0.5)
with open({log!r}, "a") as log:
    log.write(f"-{{mine}} ")
"""


def start(folder, module, *arguments, **environment):
    """Start one of dask's command lines in a folder of its own, with its output in the file `log`."""
    folder.mkdir()
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("EFFILIB_") and "THREADS" not in name
    }
    environment = {**inherited, "PYTHONPATH": str(paths.root()), **environment}
    line = [sys.executable, "-m", f"distributed.cli.{module}", *arguments, "--no-dashboard"]
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            line, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )


def stop(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def scheduling(folder):
    """A scheduler: (its address, its process)."""
    process = start(
        folder, "dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", "address.json"
    )
    try:
        wait_for(lambda: paths.read_json(folder / "address.json"))
        yield paths.read_json(folder / "address.json")["address"], process
    finally:
        stop(process)


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory):
    """The address of a scheduler that several tests use, each with workers of its own."""
    with scheduling(tmp_path_factory.mktemp("dask") / "scheduler") as (address, _):
        yield address


@pytest.fixture
def worker(tmp_path):
    """Start workers: `worker(scheduler, "127.0.0.2", ...)` returns the process, whose folder has the name of
    its machine.
    """
    processes = []

    def begin(scheduler, machine, *options, nanny=False, **environment):
        folder = tmp_path / machine
        environment = {
            "EFFILIB_RESULTS": str(folder / "results"),
            "EFFILIB_DATA": str(folder / "data"),
            **environment,
        }
        options = [
            "--host",
            machine,
            "--local-directory",
            "scratch",
            "--nanny" if nanny else "--no-nanny",
            *options,
        ]
        processes.append(start(folder, "dask_worker", scheduler, "--nthreads", "1", *options, **environment))
        return processes[-1]

    yield begin
    for process in processes:
        stop(process)


def joined(*folders):
    """Wait until the workers with these folders have joined."""
    for folder in folders:
        wait_for(lambda folder=folder: "Registered to" in (folder / "log").read_text())


def pids(folder):
    """The processes of a notebook that waits: kernel, papermill, and a hidden one."""
    wait_for((folder / "pids.json").exists)
    return json.loads((folder / "pids.json").read_text())


@linux
def test_a_notebook_travels_and_its_results_come_back(
    scheduler, worker, tmp_path, notebooks, results, folder, run, capsys, monkeypatch
):
    worker(scheduler, "127.0.0.2", nanny=True)
    write_notebook(notebooks / "04_1_travels.ipynb", SEED, TRAVELLER)
    write_notebook(notebooks / "10_last.ipynb", LAST)
    mine = tmp_path / "mine"
    (mine / "photos").mkdir(parents=True)
    (mine / "photos" / "image.png").write_bytes(b"an image")
    (mine / "net.py").write_text("net = dict\n")
    (mine / "recorded" / "study-cifar10" / "04_1_travels").mkdir(parents=True)
    paths.write(mine / "recorded" / "study-cifar10" / "04_1_travels" / "record.json", {"status": "complete"})
    monkeypatch.chdir(mine)
    monkeypatch.setenv("EFFILIB_RECORDED", str(mine / "recorded"))
    own = {
        "parameters": [("dataset", "photos"), ("network", "net.py:net")],
        "name": "mine",
        "scheduler": scheduler,
    }
    folder = folder.with_name("mine")
    joined(tmp_path / "127.0.0.2")

    assert run("04_1", **own) == 1
    assert "  04_1_travels: AssertionError: the first time it fails" in capsys.readouterr().out.splitlines()
    assert {file.name for file in (folder / "04_1_travels").iterdir()} == {
        "notebook.ipynb",
        "report.html",
        "run.json",
        "process.log",
        "seen.json",
    }
    assert paths.read_json(results / "cache" / "abc" / "seed-0.json") == {"seed": 0}
    there = tmp_path / "127.0.0.2"
    seen = paths.read_json(folder / "04_1_travels" / "seen.json")
    assert seen["network"] == "./network/net.py:net"
    assert seen["file"] == "net = dict\n"
    assert seen["dataset"] == "./dataset/photos"
    assert seen["images"] == ["image.png"]
    assert seen["data"] == str(there / "data")  # data sets that have a name are the worker's own
    assert all(seen[place].startswith(str(there / "scratch")) for place in ("cwd", "results"))
    assert (
        seen["threads"] is None
    )  # dask's one thread a library is not for a notebook that has the machine for itself

    assert (
        run(**own) == 0
    )  # with the seed of the run that failed, a record of the series, and what is recorded
    assert (status(folder, "04_1_travels"), status(folder, "10_last")) == ("complete", "complete")
    record = paths.read_json(folder / "04_1_travels" / "record.json")
    assert (record["status"], record["shared_machine"]) == ("complete", False)
    assert not (there / "results").exists()
    left = [
        path
        for path in (there / "scratch").rglob("*")
        if path.is_file() and path.suffix in (".ipynb", ".json", ".html")
    ]
    assert left == []
    assert run(**own) == 0
    assert "04_1_travels: up to date" in capsys.readouterr().out


@linux
def test_a_worker_dies_and_then_the_scheduler(worker, tmp_path, notebooks, results, folder, run, capsys):
    waits = [tmp_path / "one", tmp_path / "two"]
    for where in waits:
        where.mkdir()
    write_notebook(
        notebooks / "04_1_dies.ipynb",
        SEED,
        "if not known:\n" + textwrap.indent(WAIT.format(here=str(waits[0])), "    "),
    )
    write_notebook(notebooks / "04_2_waits.ipynb", WAIT.format(here=str(waits[1])))
    with scheduling(tmp_path / "scheduler") as (address, process):
        workers = {f"127.0.0.{n}": worker(address, f"127.0.0.{n}") for n in (2, 3, 4)}
        joined(*(tmp_path / machine for machine in workers))
        going = background(run, scheduler=address)
        first = pids(waits[0])
        wait_for((results / "cache" / "abc" / "seed-0.json").exists)  # it came while the notebook was running
        victim = psutil.Process(first[1]).ppid()
        assert victim in [process.pid for process in workers.values()]
        os.kill(victim, signal.SIGKILL)
        wait_for((folder / "04_1_dies" / "run.json").exists)  # elsewhere, and with the seed: it waits no more
        second = pids(waits[1])
        wait_for(lambda: not alive(first[0]) and not alive(first[1]))
        os.kill(first[2], signal.SIGKILL)  # nobody was left to end that one

        process.kill()
        assert going.result(60) == 1
        wait_for(lambda: not any(map(alive, second)))  # the worker ends what nobody waits for
    said = capsys.readouterr().out.splitlines()
    assert "3 at a time on 3 machines of " + address in said
    assert (
        len(
            [
                line
                for line in said
                if line.startswith("04_1_dies: its worker tcp://127.0.0.2:") and "runs again" in line
            ]
        )
        == 1
    )
    left = "04_1_dies finished, 04_2_waits not; the same command goes on from there"
    assert said[-1] == f"the dask scheduler at {address} went away: {left}"
    assert status(folder, "04_1_dies") == "complete"
    assert not (folder / "04_2_waits").exists()
    assert not list((folder / ".partial").iterdir())
    assert "04_1_dies" in (folder / "index.html").read_text()


@linux
def test_a_notebook_whose_workers_die_fails_after_three(
    scheduler, worker, tmp_path, notebooks, folder, run, capsys
):
    write_notebook(notebooks / "04_1_deadly.ipynb", "import time\ntime.sleep(60)")
    workers = [worker(scheduler, f"127.0.0.{n}") for n in (2, 3, 4)]
    joined(*(tmp_path / f"127.0.0.{n}" for n in (2, 3, 4)))
    going = background(run, scheduler=scheduler)
    for process in workers:
        wait_for(psutil.Process(process.pid).children)
        process.kill()
        process.wait()  # else it would still be there
    assert going.result(60) == 1
    reason = paths.read_json(folder / "04_1_deadly" / "run.json")["reason"]
    assert reason.startswith("its worker was lost 3 times (tcp://127.0.0.2:")
    said = capsys.readouterr().out
    assert said.count("runs again elsewhere") == 2
    assert f"  04_1_deadly: {reason}" in said.splitlines()


@linux
def test_one_notebook_a_gpu(scheduler, worker, tmp_path, notebooks, folder, run, capsys):
    log = tmp_path / "gpus"
    for n in range(3):
        write_notebook(notebooks / f"04_{n}_x.ipynb", GPU.format(log=str(log)))
    worker(scheduler, "127.0.0.2", "--nthreads", "4", "--resources", "GPU=2", CUDA_VISIBLE_DEVICES="7,5")
    worker(scheduler, "127.0.0.3")  # has none, and is not used
    joined(tmp_path / "127.0.0.2", tmp_path / "127.0.0.3")
    assert run(scheduler=scheduler) == 0
    events = log.read_text().split()
    now, together = set(), []
    for event in events:
        now = now | {event[1:]} if event[0] == "+" else now - {event[1:]}
        together.append(sorted(now))
    assert len(events) == 6
    assert ["5", "7"] in together  # never two on one, for then a "-" would leave none
    assert together[-1] == []
    assert all(len(event) == 2 for event in events)
    said = capsys.readouterr().out
    assert (
        f"2 at a time on 1 machine of {scheduler}; some share a machine, so there are no verdicts on times"
        in said
    )
    assert paths.read_json(folder / "04_0_x" / "record.json")["shared_machine"] is True


@linux
def test_interrupting_the_call_ends_the_notebook_on_its_worker(
    scheduler, worker, tmp_path, notebooks, folder
):
    write_notebook(notebooks / "04_1_waits.ipynb", WAIT.format(here=str(tmp_path)))
    process = worker(scheduler, "127.0.0.2")
    joined(tmp_path / "127.0.0.2")
    call = command(notebooks, "--scheduler", scheduler)
    processes = pids(tmp_path)
    call.send_signal(signal.SIGINT)
    said, _ = call.communicate(timeout=30)
    assert call.returncode == 130
    assert said.splitlines()[-1].startswith("interrupted: none finished, 04_1_waits not")
    assert "Traceback" not in said
    wait_for(lambda: not any(map(alive, processes)))
    assert process.poll() is None
    assert not (folder / "04_1_waits").exists()


SBATCH = """#!/bin/sh
cp "$1" script
setsid sh script > job.log 2>&1 &
echo "Submitted batch job $!"
"""


@linux
def test_the_readmes_lines_start_workers_on_slurm(tmp_path, notebooks, folder, run, capsys):
    """All is real but SLURM itself: `sbatch` starts the job's script here and now, `scancel` ends its
    processes.
    """
    if not importlib.util.find_spec("dask_jobqueue"):  # not imported here: it takes hold of SIGINT
        pytest.skip("the README's lines need the package `dask-jobqueue`")
    lines = re.search(r"(?s)```py\n(.*?)```", (paths.root() / "README.md").read_text())[1]
    assert len(lines.splitlines()) == 5
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    for name, script in (("sbatch", SBATCH), ("scancel", '#!/bin/sh\nkill -- "-$1"\n')):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("EFFILIB_")}
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(paths.root()), "HOME": str(tmp_path)}
    lines = (
        lines.replace('"port": 8786', f'"port": {port}, "host": "127.0.0.1"')
        .replace("jobs=4", "jobs=1")
        .replace("32GB", "1GB")
    )
    with (tmp_path / "log").open("w") as log:
        line = [sys.executable, "-c", lines]
        login = subprocess.Popen(
            line,
            cwd=tmp_path,
            env={**inherited, **own},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            text=True,
        )
    write_notebook(notebooks / "04_1_x.ipynb")
    try:
        wait_for(lambda: (tmp_path / "script").exists() or login.poll() is not None)
        assert login.poll() is None, (tmp_path / "log").read_text()
        assert background(run, scheduler=f"tcp://127.0.0.1:{port}").result(120) == 0
        login.communicate("\n", timeout=30)
    finally:
        login.kill()
        for process in psutil.process_iter(["cmdline"]):
            if any(
                f":{port}" in word for word in process.info["cmdline"] or ()
            ):  # a worker that nobody cancelled
                process.kill()
    assert "1 at a time on 1 machine" in capsys.readouterr().out
    assert status(folder, "04_1_x") == "complete"
    script = (tmp_path / "script").read_text()
    assert all(
        words in script
        for words in ("#SBATCH --cpus-per-task=8", "#SBATCH --gres=gpu:1", "--resources GPU=1")
    )


# What is refused, before anything runs


@linux
def test_other_code_and_files_too_large_are_refused(scheduler, worker, tmp_path, notebooks, run, monkeypatch):
    write_notebook(notebooks / "04_1_x.ipynb")
    shutil.copytree(paths.root() / "effilib", tmp_path / "old" / "effilib")
    with (tmp_path / "old" / "effilib" / "errors.py").open("a") as file:
        file.write("OLD = True\n")
    old = worker(scheduler, "127.0.0.2", PYTHONPATH=str(tmp_path / "old"))
    joined(tmp_path / "127.0.0.2")
    with pytest.raises(
        BadInput,
        match=r"the worker tcp://127\.0\.0\.2:\d+ has effilib .* not .* as here: update it and start it",
    ):
        run(scheduler=scheduler)
    stop(old)

    worker(scheduler, "127.0.0.3")
    joined(tmp_path / "127.0.0.3")
    (tmp_path / "large.npz").write_bytes(b"x" * 100)
    monkeypatch.setattr(cluster, "LIMIT", 99)
    listing = cluster.jobs.listing
    monkeypatch.setattr(
        cluster.jobs, "listing", lambda path: [*listing(path), ("only here", 0, 0)]
    )  # the worker sees the same disk
    with pytest.raises(
        BadInput, match=r"has no /.*/large\.npz, too much to be sent .* put a copy there, at the same path"
    ):
        run(scheduler=scheduler, parameters=[("dataset", str(tmp_path / "large.npz"))])


def test_no_scheduler(notebooks, run):
    write_notebook(notebooks / "04_1_x.ipynb")
    with pytest.raises(BadInput, match=r"no dask scheduler answers at 'tcp://127\.0\.0\.1:1'"):
        run(scheduler="tcp://127.0.0.1:1")


def test_dask_is_optional(notebooks, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)  # as if not installed
    write_notebook(notebooks / "04_1_x.ipynb")
    with pytest.raises(BadInput, match=r"pip install -e \.\[cluster\]"):
        run(scheduler="tcp://127.0.0.1:1")


# What travels


def test_what_was_packed_is_unpacked(tmp_path):
    (tmp_path / "a").write_bytes(b"1" * 10_000)
    (tmp_path / "b").write_bytes(b"")
    archive = cluster.pack(
        {"x/a": tmp_path / "a", "b": tmp_path / "b", "gone": tmp_path / "c", "folder": tmp_path}
    )
    assert len(archive) < 1000
    assert cluster.unpack(archive, tmp_path / "there") == ["x/a", "b"]
    assert (tmp_path / "there" / "x" / "a").read_bytes() == b"1" * 10_000
    assert (tmp_path / "there" / "b").read_bytes() == b""


def test_the_same_file_at_the_same_path_is_not_sent(tmp_path):
    class Worker:
        local_directory = str(tmp_path / "worker")

    (tmp_path / "mine.py").write_text("net = dict")
    name = str(tmp_path / "mine.py")
    digest = cluster.provenance.digest(name, cluster.jobs.listing(tmp_path / "mine.py"))
    assert cluster.check(cluster.versions(), {name: digest}, Worker) == []
    (tmp_path / "mine.py").write_text("net = list")
    assert cluster.check(cluster.versions(), {name: digest}, Worker) == [name]
    cluster.keep_files(cluster.pack({f"{digest}/mine.py": tmp_path / "mine.py"}), Worker)
    assert cluster.check(cluster.versions(), {name: digest}, Worker) == []
    assert cluster.check({"torch": "1.0", "effilib": "?"}, {}, Worker).startswith("has torch ")
