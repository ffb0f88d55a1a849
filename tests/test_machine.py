"""Whatever machine, container, shell or locale a user has: it works, or one sentence says why not."""

import ast
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import effilib
from effilib import __main__ as main
from effilib import clock, paths, seeds
from effilib.distributed import processes
from effilib.errors import BadInput
from effilib.workbook import jobs, runner
from tests.runs import status, write_notebook

SMALL = ("--preset", "smoke", "--dataset", "synthetic", "--set", "epochs=1")


def python(*words, cwd, timeout=120, **environment):
    """Run Python in a folder. Returns (exit code, all that it said)."""
    environment = {**os.environ, "PYTHONPATH": str(paths.root()), **environment}
    ran = subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, timeout=timeout, capture_output=True
    )
    return ran.returncode, (ran.stdout + ran.stderr).decode(errors="replace")


# Cores


def test_threads_workers_and_the_machines_name_follow_the_quota(tmp_path):
    """joblib reads quotas of cgroups and the affinity; its own variable stands here for a quota."""
    seen = "import torch\nfrom effilib import clock\nm = clock.machine()\n"
    seen += "print(m['cores'], m['summary'], torch.get_num_threads(), m['threads'])"
    quota = {"LOKY_MAX_CPU_COUNT": "1", "OMP_NUM_THREADS": "3"}
    assert python("-c", seen, cwd=tmp_path, **quota) == (0, "1 1-core CPU 1 1\n")


# What lies in the current folder, and what the user has for sessions of their own


def test_neither_the_current_folder_nor_the_users_startup_shadows_anything(notebooks, results, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    for name in ("torch", "random", "numpy", "startup"):
        (here / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the current folder is read')")
    (here / "mine.py").write_text("word = 'found'")
    write_notebook(notebooks / "04_1_x.ipynb", "import torch, random, mine\nassert mine.word == 'found'")
    words = ("run", "--preset", "smoke", "--notebooks", str(notebooks))
    code, said = python("-m", "effilib", *words, cwd=here, PYTHONSTARTUP=str(here / "startup.py"))
    assert code == 0, said
    assert "04_1_x: complete" in said
    code, said = python("-m", "effilib", "train", *SMALL, "--out", "out", cwd=here)
    assert (code, "of the current folder" in said) == (0, False)


def test_a_temporary_folder_that_is_too_long_for_sockets_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs.tempfile, "tempdir", str(tmp_path / ("x" * 120)))
    monkeypatch.setattr(jobs.os, "access", lambda place, mode: False)
    with (
        pytest.raises(BadInput, match="too long a path for a kernel's sockets: set TMPDIR"),
        jobs._short_folder(),
    ):
        pass


# Locales


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


def test_a_locale_without_our_characters_reads_runs_and_speaks(notebooks, folder, tmp_path):
    write_notebook(notebooks / "04_1_x.ipynb", "name = 'Größe ×'\nassert len(name) == 7")
    words = ("run", "--preset", "smoke", "--notebooks", str(notebooks))
    code, said = python("-m", "effilib", *words, cwd=tmp_path, **ASCII)
    assert code == 0, said
    assert status(folder, "04_1_x") == "complete"
    assert python("-m", "effilib", "list", cwd=tmp_path, **ASCII)[0] == 0
    assert python("-m", "effilib", "train", *SMALL, "--out", "größe", cwd=tmp_path, **ASCII)[0] == 0


def test_no_file_is_read_or_written_in_the_locales_encoding():
    for file in Path(effilib.__file__).parent.rglob("*.py"):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            given = {k.arg for k in call.keywords}
            mode = next((a.value for a in call.args if isinstance(a, ast.Constant) and a.value in MODES), "")
            owner = getattr(getattr(call.func, "value", None), "id", "")  # what an archive opens is of bytes
            text = name in ("read_text", "write_text") or (
                name == "open" and mode in TEXT and owner != "archive"
            )
            assert not text or "encoding" in given, f"{file.name}:{call.lineno}"


TEXT, MODES = ("w", "a", "r+", "x"), ("w", "a", "r+", "x", "rb", "wb", "ab")


# File systems


def test_a_file_system_without_modes_takes_files(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(paths.os, "chmod", refuse)
    assert paths.write(tmp_path / "x.txt", "text").read_text() == "text"
    assert [f.name for f in tmp_path.iterdir()] == ["x.txt"]


# Networks


def alone(*words):
    """The command without a network, on a host that nobody knows; None where nobody may have that."""
    cut = 'ip link set lo up && hostname no-such-host && exec "$@"'
    command = ["unshare", "--net", "--uts", "sh", "-c", cut, "sh"]
    can = shutil.which("unshare") and not subprocess.run([*command, "true"], capture_output=True).returncode
    return [*command, *words] if can else None


def test_processes_of_one_machine_need_no_network(tmp_path):
    words = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = alone(sys.executable, *words, f"--master-port={port}", "-m", "effilib", "train", *SMALL)
    if not command:
        pytest.skip("this machine lets nobody go without its network (unshare --net --uts)")
    environment = {**os.environ, "PYTHONPATH": str(paths.root()), "EFFILIB_RESULTS": str(tmp_path)}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, timeout=120, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "shared by 2 processes" in ran.stdout


def test_gloo_keeps_to_this_machine():
    assert list(processes.loopback()) == ["GLOO_SOCKET_IFNAME"]


def test_a_user_without_a_home_folder_is_told_to_name_one(monkeypatch, capsys):
    monkeypatch.setattr(main.os.path, "expanduser", lambda path: path)  # as for an id without an account
    assert main.main(["list"]) == 2
    assert "this user has no home folder: set HOME" in capsys.readouterr().err


# Windows


@pytest.mark.parametrize("command", ["run", "record"])
def test_what_cannot_work_on_windows_says_so(command, monkeypatch, capsys):
    monkeypatch.setattr(main.sys, "platform", "win32")
    assert main.main([command]) == 2
    assert capsys.readouterr().err.startswith(f"effilib: {command} needs Linux or macOS")


# GPUs


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu_draws_from_its_own_seed():
    drawn = []
    for _ in range(2):
        with seeds.seeded(3, "cuda:1"):
            drawn.append(torch.randn(4, device="cuda:1"))
    assert torch.equal(*drawn)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu_is_timed_by_its_own_kernels():
    """While the first, which is the current one, has nothing to do."""
    a, seconds = torch.randn(4096, 4096, device="cuda:1"), []
    watch = clock.Stopwatch("cuda:1")
    for times in (1, 50):
        watch.start()
        for _ in range(times):
            a @ a
        watch.lap()
        seconds.append(watch.end_epoch()[-1])
    assert torch.cuda.current_device() == 0
    assert seconds[1] > 10 * seconds[0]


# A chapter that does not apply


NOT_APPLICABLE = "from effilib.errors import NotApplicable\nraise NotApplicable('two classes are too few')"
NO_EFFECT = "from effilib.errors import NoEffect\nraise NoEffect('no layer to replace')"


def test_a_chapter_that_does_not_apply_is_skipped_with_its_reason(notebooks, folder, run, tmp_path, capsys):
    count = tmp_path / "count"
    write_notebook(notebooks / "04_1_x.ipynb", f"open({str(count)!r}, 'a').write('x')", NOT_APPLICABLE)
    write_notebook(notebooks / "04_2_y.ipynb")
    assert run() == 0
    said = capsys.readouterr().out
    assert "04_1_x: skipped in " in said
    assert "1 complete, 1 skipped, 0 failed\n  04_1_x: two classes are too few\n" in said
    state = paths.read_json(folder / "04_1_x" / "run.json")
    assert (state["status"], state["reason"]) == ("skipped", "two classes are too few")
    assert not (folder / "04_1_x" / "record.json").exists()
    index, report = (
        (folder / name).read_text(encoding="utf-8") for name in ("index.html", "04_1_x/report.html")
    )
    assert "two classes are too few" in index
    assert "1 skipped" in index
    assert "this chapter does not apply here" in report
    assert "Traceback" not in report

    write_notebook(notebooks / "04_2_y.ipynb", NO_EFFECT)  # it applied once: that result stays
    assert run() == 0
    assert "04_1_x: skipped: two classes are too few" in capsys.readouterr().out
    assert count.read_text() == "x"  # not executed again
    assert status(folder, "04_2_y") == "skipped"
    assert (folder / "04_2_y" / "record.json").exists()
    assert 'href="failed/04_2_y/report.html"' in (folder / "index.html").read_text(encoding="utf-8")


# What a run may take


def test_the_time_expected_is_that_of_the_same_parameters(notebooks, plan, results, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "recorded", lambda: tmp_path / "recorded")
    write_notebook(notebooks / "04_1_x.ipynb")
    place = paths.make(results / "elsewhere" / "04_1_x")
    known = {"schema": 2, "preset": "smoke", "status": "complete", "duration_s": 60.0}
    paths.write(place / "record.json", known | {"parameters": {"epochs": 3, "dataset": "mnist5k"}})
    assert runner.expected(*plan()) == 60.0
    assert runner.expected(*plan(parameters=[("epochs", "90")])) is None
    assert runner.expected(*plan(parameters=[("dataset", "synthetic")])) is None
