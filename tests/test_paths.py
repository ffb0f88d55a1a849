"""Where things lie, and that nothing is ever half-written."""

import contextlib
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from effilib import paths
from effilib.errors import BadInput, CannotWrite
from effilib.experiment import Arm
from effilib.results import compare
from effilib.tasks import task


def test_folders_do_not_depend_on_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("EFFILIB_DATA", raising=False)
    monkeypatch.delenv("EFFILIB_RESULTS", raising=False)
    places = (paths.root, paths.data, paths.results, paths.recorded, paths.notebooks, paths.cache)
    before = [place() for place in places]
    monkeypatch.chdir(tmp_path)
    assert [place() for place in places] == before
    assert all(p.is_absolute() for p in before)
    assert (paths.root() / "effilib" / "paths.py").is_file()


@pytest.mark.parametrize(
    ("variable", "place"), [("EFFILIB_DATA", paths.data), ("EFFILIB_RESULTS", paths.results)]
)
def test_variables_name_other_folders(variable, place, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, str(tmp_path / "there"))
    assert place() == tmp_path / "there"
    monkeypatch.setenv(variable, "~/there")
    assert place() == Path.home() / "there"
    monkeypatch.setenv(variable, "")  # set but empty is not set
    assert place().parent == paths.root()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(variable, "there")
    assert place() == tmp_path / "there"


def test_recorded_results_and_cache_lie_where_they_belong(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFILIB_RESULTS", str(tmp_path))
    assert paths.cache() == tmp_path / "cache"
    assert paths.recorded() == paths.root() / "results" / "recorded"  # committed: not to be moved


def test_make_creates_the_folder_and_leaves_nothing_in_it(tmp_path):
    folder = paths.make(tmp_path / "a" / "b")
    assert folder.is_dir()
    assert not list(folder.iterdir())
    assert paths.make(str(folder)) == folder


@pytest.mark.parametrize("below", ["file", "file/below", "file/below/deeper"])
def test_a_folder_that_cannot_be_made_is_named(below, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a regular file: not even root makes a folder below it")
    with pytest.raises(BadInput) as error:
        paths.make(tmp_path / below)
    assert str(error.value).startswith(f"cannot write results into {tmp_path / below}: ")
    assert "EFFILIB" not in str(error.value)  # it was named, and not by a variable
    monkeypatch.setenv("EFFILIB_RESULTS", str(tmp_path / "file"))
    monkeypatch.setenv("EFFILIB_DATA", str(tmp_path / "file"))
    with pytest.raises(BadInput, match="EFFILIB_RESULTS names another folder"):
        paths.make(tmp_path / below)
    with pytest.raises(BadInput, match=r"cannot write data into .*EFFILIB_DATA names another folder"):
        paths.make(tmp_path / below, "data")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a file system that refuses files")
def test_a_folder_that_takes_no_files_is_named():
    with pytest.raises(BadInput, match="cannot write results into /proc"):
        paths.make("/proc")


@pytest.mark.parametrize(
    "content",
    ["Überblick ×\n", b"\x89PNG\x00", {"a": [1, None, 2.5], "ü": "×"}, {"a": "\udcff"}, [], 0, None],
)
def test_what_was_written_is_read_again(content, tmp_path):
    path = paths.write(tmp_path / "file", content)
    if isinstance(content, bytes):
        assert path.read_bytes() == content
    elif isinstance(content, str):
        assert path.read_text(encoding="utf-8") == content
    else:
        assert paths.read_json(path) == content
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_json_is_utf8_whatever_the_locale(tmp_path):
    paths.write(tmp_path / "record.json", {"title": "Überblick ×"})
    file = str(tmp_path / "record.json")
    code = "from effilib import paths; "
    code += f"assert paths.read_json({file!r}) == {{'title': '\\xdcberblick \\xd7'}}"
    environment = {
        **os.environ,
        "PYTHONPATH": str(paths.root()),
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "LC_ALL": "C",
    }
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize("content", [object(), {"a": object()}, {"a": {1, 2}}])
def test_what_cannot_be_written_leaves_the_old_file_and_no_rest(content, tmp_path):
    path = paths.write(tmp_path / "file", "old")
    with pytest.raises((TypeError, ValueError)):
        paths.write(path, content)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def strict(text):
    """JSON as other languages read it: NaN and Infinity are no part of it."""

    def refuse(word):
        raise AssertionError(word)

    return json.loads(text, parse_constant=refuse)


def test_json_has_no_nan_and_no_infinity(tmp_path):
    nan, inf = float("nan"), float("inf")
    content = {"a": nan, "b": [1.5, (inf, {"c": -inf})], "d": np.float64("nan"), "e": {1: nan}, "f": 0.0}
    path = paths.write(tmp_path / "x.json", content)
    read = {"a": None, "b": [1.5, [None, {"c": None}]], "d": None, "e": {"1": None}, "f": 0.0}
    assert strict(path.read_text()) == paths.read_json(path) == read
    assert content["b"] == [1.5, (inf, {"c": -inf})]  # what was given is as it was


def test_a_diverged_run_comes_back_from_the_cache_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFILIB_RESULTS", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # what else is measured here does not matter
    arms = [Arm(name="baseline", role="baseline"), Arm(name="diverges", changes={"lr": 1e20})]
    fresh, cached = (compare(task("smoke", "synthetic"), arms) for _ in range(2))
    assert fresh.diverged("diverges") == cached.diverged("diverges") == 2
    assert cached.cells[0]["cached"]
    for file in (tmp_path / "cache").rglob("*.json"):
        strict(file.read_text())
    for a, b in zip(fresh.cells, cached.cells, strict=True):
        for name in a["arms"]:
            assert str(vars(a["arms"][name])) == str(vars(b["arms"][name]))
    assert math.isnan(fresh.histories("diverges")[0].rows[-1]["loss"])
    assert fresh.table().to_string() == cached.table().to_string()


def test_several_processes_may_write_the_same_file_at_once(tmp_path):
    code = (
        "import sys; from effilib import paths\n"
        "for i in range(40):\n"
        f"    with paths.writing({str(tmp_path / 'file')!r}) as file:\n"
        "        for _ in range(100): file.write(sys.argv[1].encode() * 3000)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(paths.root())}
    writers = [subprocess.Popen([sys.executable, "-c", code, c], env=environment) for c in "abc"]
    seen = set()
    while any(w.poll() is None for w in writers):
        if (tmp_path / "file").exists():
            seen.add((tmp_path / "file").read_bytes())
    assert [w.returncode for w in writers] == [0, 0, 0]
    assert seen <= {c * 300_000 for c in (b"a", b"b", b"c")}
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_fails_while_it_is_written_leaves_the_old_file_and_no_rest(tmp_path):
    paths.write(tmp_path / "file", "old")
    with contextlib.suppress(ZeroDivisionError), paths.writing(tmp_path / "file") as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert (tmp_path / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_target_that_is_a_folder_leaves_no_rest(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(CannotWrite, match=r"cannot write .*folder: Is a directory") as error:
        paths.write(tmp_path / "folder", "text")
    assert isinstance(error.value, OSError)  # whoever goes on after one, does
    assert isinstance(error.value, BadInput)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_reader_never_sees_half_a_file(tmp_path):
    path, texts, seen = tmp_path / "file", ["a" * 200_000, "b" * 100_000], set()
    paths.write(path, texts[0])
    stop = threading.Event()

    def read():
        while not stop.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(100):
        paths.write(path, texts[i % 2])
    stop.set()
    reader.join()
    assert seen <= set(texts)


def test_a_writer_that_is_killed_leaves_the_old_or_the_new_file(tmp_path):
    code = (
        "from effilib import paths\n"
        "texts = [c * 300_000 for c in 'ab']\n"
        "i = 0\n"
        f"while True: paths.write({str(tmp_path / 'file')!r}, texts[i % 2]); i += 1\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(paths.root())}
    )
    try:
        while not (tmp_path / "file").exists():
            assert writer.poll() is None
            time.sleep(0.01)
        time.sleep(0.05)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert (tmp_path / "file").read_text() in ("a" * 300_000, "b" * 300_000)


@pytest.mark.parametrize("content", [None, b"", b"{", b'{"a": 1', b"\xff\xfe", b"nonsense"])
def test_json_that_is_missing_or_not_whole_reads_as_none(content, tmp_path):
    if content is not None:
        (tmp_path / "record.json").write_bytes(content)
    assert paths.read_json(tmp_path / "record.json") is None
    assert paths.read_json(tmp_path) is None  # a folder


def test_written_json_ends_in_a_newline_and_keeps_its_order(tmp_path):
    text = paths.write(tmp_path / "x.json", {"b": 1, "a": 2}).read_text()
    assert text.endswith("}\n")
    assert list(json.loads(text)) == ["b", "a"]
