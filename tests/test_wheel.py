"""An installed package, far from any checkout: the commands work, and say what a checkout is for."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import effilib
from effilib import paths

pytestmark = pytest.mark.slow


def call(*words, **settings):
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, **settings)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A fresh environment with effilib's wheel; of what it depends on it sees the packages of this one."""
    top = tmp_path_factory.mktemp("wheel")
    for name in ("effilib", "notebooks", "results/recorded"):  # a copy: building leaves files behind
        shutil.copytree(paths.root() / name, top / "source" / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(paths.root() / name, top / "source")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    quick = ["--no-deps", "--no-index", "--no-build-isolation"]
    built = call(*pip, "wheel", *quick, "-w", top, top / "source")
    assert built.returncode == 0, built.stderr
    (wheel,) = top.glob("*.whl")
    assert call(sys.executable, "-m", "venv", "--without-pip", top / "venv").returncode == 0
    python = top / "venv" / "bin" / "python"
    put = call(*pip, "--python", python, "install", *quick, wheel)
    assert put.returncode == 0, put.stderr
    (site,) = (top / "venv" / "lib").glob("python*/site-packages")
    # A path alone: what lies there about an editable installation is not read.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture
def effilib_command(installed, tmp_path):
    """Call `effilib` in an empty folder, of a user whose home is empty too."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("EFFILIB_", "PYTHON"))}
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    own |= {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(cache)}
    own["JUPYTER_PATH"] = str(Path(sysconfig.get_path("data")) / "share" / "jupyter")  # nbconvert's templates
    for name in ("home", "elsewhere"):
        (tmp_path / name).mkdir()

    def effilib_command(*words, code=0):
        done = call(installed.with_name("effilib"), *words, cwd=tmp_path / "elsewhere", env=own)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    where = call(installed, "-c", "import effilib; print(effilib.__file__)", cwd=tmp_path, env=own).stdout
    assert Path(where.strip()).is_relative_to(installed.parents[1])
    return effilib_command


def test_the_series_and_what_is_recorded_come_along(effilib_command):
    assert effilib_command("--version").strip() == f"effilib {effilib.__version__}"
    said = effilib_command("list")
    assert "no notebook yet" not in said
    assert any(place.name in said for place in paths.recorded().glob("study-*"))
    for command in ("run", "advise", "train", "predict"):
        assert f"usage: effilib {command}" in effilib_command(command, "--help")


def test_a_training_and_a_notebook_run(effilib_command, tmp_path):
    effilib_command("train", "--preset", "smoke", "--out", tmp_path / "mine")
    assert (tmp_path / "mine" / "model.pt").exists()
    said = effilib_command("run", "02", "--preset", "smoke")
    assert "1 complete, 0 failed" in said
    assert "effilib/recorded/index.html" in said
    results = tmp_path / "home" / "effilib" / "results" / "smoke-mnist5k"
    assert (results / "02_overview" / "report.html").exists()
    assert not list((tmp_path / "elsewhere").iterdir())


def test_advice_is_given_however_little_time_there_is(effilib_command, tmp_path):
    few = ["--minutes", 0.1, "--methods", "data pruning", "--out", tmp_path / "advice"]
    effilib_command("advise", "synthetic", *few)
    assert {"recipe.toml", "snippet.py"} <= {file.name for file in (tmp_path / "advice").iterdir()}


@pytest.mark.parametrize("command", ["record", "tune"])
def test_what_is_committed_needs_a_checkout(effilib_command, command):
    said = effilib_command(command, "--preset", "smoke", code=2)
    assert said.startswith(f"effilib: {command} keeps results to be committed, in a checkout of effilib")
