"""What every notebook must keep to, and that plain papermill and Jupyter run them from any folder."""

import ast
import functools
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import nbformat
import pytest
from jupyter_client import BlockingKernelClient

from effilib import notebook, paths
from effilib.workbook import series

NOTEBOOKS = sorted(paths.notebooks().glob("*.ipynb"))
CHECKED = "nbval-check-output"
each = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda f: f.stem)


def code(file):
    return [c for c in nbformat.read(file, 4).cells if c.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


def test_there_are_notebooks_and_each_is_a_chapter():
    stems = {c.stem for c in series.CHAPTERS}
    assert NOTEBOOKS
    assert {f.stem for f in NOTEBOOKS} <= stems


@each
def test_it_is_valid_and_titled_as_its_chapter(file):
    book = nbformat.read(file, 4)
    nbformat.validate(book)
    chapter = series.chapter(file.stem)
    first = book.cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith(f"# {chapter.number} {chapter.title}")
    assert chapter.title_de in first.source.splitlines()[0]


@each
def test_it_has_one_parameters_cell_of_plain_literals(file):
    cells = [c for c in code(file) if "parameters" in tags(c)]
    assert len(cells) == 1
    assigned = {}
    for node in ast.parse(cells[0].source).body:
        assert isinstance(node, ast.Assign)
        assigned[node.targets[0].id] = ast.literal_eval(node.value)
    assert {k: assigned[k] for k in notebook.DEFAULTS} == notebook.DEFAULTS


@each
def test_it_starts_its_book_by_its_own_name_and_ends_in_its_record(file):
    cells = code(file)
    starts = [n for c in cells for n in ast.walk(ast.parse(c.source)) if isinstance(n, ast.Call)]
    starts = [n for n in starts if ast.unparse(n.func) == "notebook.start"]
    assert [n.args[0].value for n in starts] == [file.stem]
    assert {k.arg for k in starts[0].keywords} >= {*notebook.DEFAULTS}
    assert [i for i, c in enumerate(cells) if "record" in tags(c)] == [len(cells) - 1]
    assert "book.record(" in cells[-1].source


LINES, LONG, DEFINED = 15, 110, 8  # lines of a cell, characters of a line, lines of a function
IMPORTS = {
    "effilib", "torch", "pandas", "numpy", "scipy", "math", "statistics", "dataclasses", "copy", "itertools",
    "functools",
}  # fmt: skip
LOOPS = (ast.For, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def nodes(source, *kinds):
    return [n for n in ast.walk(ast.parse(source)) if isinstance(n, kinds)]


def calls(node):
    """Names of what is called inside, methods by their last name."""
    called = [n.func for n in ast.walk(node) if isinstance(n, ast.Call)]
    return {f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in called}


def training_loops(source):
    """Loops that take optimizer steps, by themselves or by a function beside them."""

    def trains(node):
        return {"backward", "step"} <= calls(node)

    steps = {f.name for f in nodes(source, ast.FunctionDef) if trains(f)}
    return [loop for loop in nodes(source, *LOOPS) if trains(loop) or calls(loop) & steps]


def imported(source):
    """Modules that are imported, by their whole names."""
    names = [a.name for n in nodes(source, ast.Import) for a in n.names]
    return names + [f"{n.module}.{a.name}" for n in nodes(source, ast.ImportFrom) for a in n.names]


def broken_rules(source):
    """What a cell does that a cell of a notebook does not, in words."""
    lines = [line for line in source.splitlines() if line.strip()]
    functions = nodes(source, ast.FunctionDef, ast.AsyncFunctionDef)
    rules = {
        f"more than {LINES} lines": len(lines) > LINES,
        f"a line of more than {LONG} characters": any(len(line) > LONG for line in lines),
        "a class": nodes(source, ast.ClassDef),
        f"a function of more than {DEFINED} lines": any(
            f.end_lineno - f.lineno >= DEFINED for f in functions
        ),
        "a training loop": training_loops(source),
        "another import": [n for n in imported(source) if n.split(".")[0] not in IMPORTS],
    }
    return [rule for rule, broken in rules.items() if broken]


@each
def test_its_cells_are_for_reading_and_playing(file):
    broken = {c.source: broken_rules(c.source) for c in code(file)}
    assert not {source: rules for source, rules in broken.items() if rules}


@pytest.mark.parametrize(
    ("source", "rules"),
    [
        ("\n".join(["x = 1"] * 15), []),
        ("\n\n".join(["x = 1"] * 16), ["more than 15 lines"]),
        (f"x = {'1' * 110}", ["a line of more than 110 characters"]),
        ("class A: pass", ["a class"]),
        ("def f(x):\n" + "    x += 1\n" * 7, []),
        ("def f(x):\n" + "    x += 1\n" * 8, ["a function of more than 8 lines"]),
        ("import torch.nn.functional as F\nfrom math import pi", []),
        ("import os", ["another import"]),
        ("for s in (1, 2):\n    (s * loss).backward()\noptimizer.step()", []),
        ("for x, y in batches:\n    loss(x, y).backward()\n    optimizer.step()", ["a training loop"]),
        ("while True:\n    loss().backward(), optimizer.step()", ["a training loop"]),
        (
            "def step():\n    loss().backward()\n    optimizer.step()\n[step() for _ in range(9)]",
            ["a training loop"],
        ),
    ],
)
def test_the_rules_find_what_breaks_them(source, rules):
    assert broken_rules(source) == rules


@each
def test_a_methods_notebook_shows_its_source_and_its_curves(file):
    sources = "\n".join(c.source for c in code(file))
    if series.chapter(file.stem).module:
        assert "notebook.source(" in sources
        assert "figures.curves(" in sources


NUMBER = r"(\d+(?:\.\d+)?)"


def aims(file):
    """The numbers of `aim=...` in the code, also where they have a name first."""
    found = []
    for cell in code(file):
        named = [n.value for n in nodes(cell.source, ast.keyword) if n.arg == "aim"]
        for node in nodes(cell.source, ast.Assign):
            named += [node.value] * (ast.unparse(node.targets[0]) in ("aim", "aims"))
        found += [n.value for value in named for n in ast.walk(value) if isinstance(n, ast.Constant)]
    return {float(v) for v in found if isinstance(v, int | float)}


@each
def test_what_would_refute_it_is_what_is_computed(file):
    """The number after "Refuted if the interval's upper end is below", or the bold one before "below it"."""
    text = "\n".join(c.source for c in nbformat.read(file, 4).cells if c.cell_type == "markdown")
    refuting = set()
    for said in re.finditer(rf"upper\s+end\s+is\s+below\s+({NUMBER}|it\b|the aim\b)", text):
        bold = re.findall(rf"\*\*[^*]*?{NUMBER}\s*(?:x|times)\b", text[: said.start()])
        refuting.add(float(said[2] or bold[-1]))
    assert refuting <= aims(file)
    assert bool(refuting) == bool(aims(file))
    assert aims(file) <= {float(n) for n in re.findall(NUMBER, text)}


DRAWS = ("effilib.figures", "effilib.notebook", "effilib.timing", "effilib.workbook", "matplotlib", "pandas")
TRAINS = sorted(p for f in ("chapters", "methods") for p in (paths.root() / "effilib" / f).glob("[!_]*.py"))


@functools.cache
def imported_at_once(file):
    """Modules that are imported when the file is, by their whole names."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return imported(
        ast.unparse(ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], []))
    )


def behind(file, seen):
    """Fill `seen` with module -> one that imports it, of all that effilib imports with a file."""
    for name in imported_at_once(file):
        if name not in seen:
            seen[name] = file.stem
            path = paths.root() / name.replace(".", "/")
            found = (path.with_suffix(".py"), path.parent.with_suffix(".py"), path / "__init__.py")
            for other in (p for p in found if p.is_file() and name.startswith("effilib.")):
                behind(other, seen)
    return seen


@pytest.mark.parametrize("file", TRAINS, ids=lambda f: f"{f.parent.name}.{f.stem}")
def test_what_trains_imports_nothing_that_draws_or_tabulates(file):
    found = behind(file, {})
    assert not {name: by for name, by in found.items() if name.startswith(DRAWS)}


@each
def test_only_checked_cells_keep_an_output(file):
    for cell in code(file):
        if CHECKED in tags(cell):
            assert cell.outputs, "a checked cell without output would pass whatever it printed"
            assert "keep_output" in tags(cell), "nbstripout takes away what is not tagged so"
            assert re.search(r"/(03_1|06_4|07_1)_", str(file)), "name it in .pre-commit-config.yaml too"
            assert cell.execution_count
        else:
            assert not cell.outputs
            assert cell.execution_count is None


@each
def test_it_names_no_place_of_a_machine(file):
    text = "\n".join(c.source for c in nbformat.read(file, 4).cells)
    assert not re.search(r"(^|[\s\"'])/(home|root|tmp|work|Users|mnt)/", text)


def papermill(notebook, out, *words, cwd, **environment):
    command = [sys.executable, "-m", "papermill", str(notebook), str(out), "--no-progress-bar", *words]
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(paths.root()), **environment},
        capture_output=True,
        text=True,
    )


def test_plain_papermill_runs_one_from_another_folder_and_writes_to_play(tmp_path):
    results = tmp_path / "results"
    file = paths.notebooks() / "02_overview.ipynb"
    done = papermill(
        file, tmp_path / "out.ipynb", "-p", "preset", "smoke", cwd=tmp_path, EFFILIB_RESULTS=str(results)
    )
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((results / "play" / "02_overview" / "record.json").read_text())
    assert record["status"] == "complete"
    assert (results / "play" / "02_overview" / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.ipynb", "results"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-p", "preste", "smoke"), "unknown parameter of 02_overview 'preste'"),
        (("-p", "preset", "quikc"), "unknown preset 'quikc'"),
        (("-p", "dataset", "mnits"), "unknown data set 'mnits'"),
        (("-p", "network", "resnt"), "unknown network 'resnt'"),
        (("-p", "seeds", "many"), "parameter seeds of 02_overview is 'many'"),
    ],
    ids=["parameter", "preset", "data set", "network", "type"],
)
def test_plain_papermill_stops_a_wrong_parameter_with_one_sentence(tmp_path, words, message):
    file = paths.notebooks() / "02_overview.ipynb"
    done = papermill(
        file, tmp_path / "out.ipynb", *words, cwd=tmp_path, EFFILIB_RESULTS=str(tmp_path / "results")
    )
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / "results" / "play").exists()


@pytest.fixture
def jupyterlab(tmp_path):
    """JupyterLab on the notebooks, started in another folder: its address, its kernels' folder and that of
    its results.
    """
    runtime, results, elsewhere = (tmp_path / name for name in ("runtime", "results", "elsewhere"))
    for folder in (runtime, elsewhere):
        folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        "--no-browser",
        "--allow-root",
        "--ServerApp.ip=127.0.0.1",
        f"--port={port}",
        "--IdentityProvider.token=t",
    ]
    own = {
        "JUPYTER_RUNTIME_DIR": str(runtime),
        "JUPYTER_CONFIG_DIR": str(tmp_path),
        "EFFILIB_RESULTS": str(results),
    }
    environment = {**os.environ, **own, "PYTHONPATH": str(paths.root())}
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={paths.notebooks()}", *words]
    log = (tmp_path / "log").open("wb")
    server = subprocess.Popen(command, cwd=elsewhere, env=environment, stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}", runtime, results
        assert list(elsewhere.iterdir()) == []
    finally:
        server.terminate()
        server.wait(60)
        log.close()


def ask(address, path, body=None):
    """What JupyterLab's server answers; it is asked again until it is up."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        address + path, data, {"Authorization": "token t", "Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({})
    )  # not the global one, which may know a proxy
    for _ in range(600):
        try:
            with opener.open(request) as answer:
                return json.load(answer)
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError):
                raise
            time.sleep(0.1)
    raise TimeoutError(address)


def test_jupyterlab_runs_one_from_another_folder(jupyterlab):
    address, runtime, results = jupyterlab
    assert "02_overview.ipynb" in [entry["name"] for entry in ask(address, "/api/contents")["content"]]
    request = {"path": "02_overview.ipynb", "name": "", "type": "notebook", "kernel": {"name": "python3"}}
    session = ask(address, "/api/sessions", request)
    client = BlockingKernelClient(connection_file=str(runtime / f"kernel-{session['kernel']['id']}.json"))
    client.load_connection_file()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        for cell in code(paths.notebooks() / "02_overview.ipynb"):
            reply = client.execute_interactive(cell.source, timeout=120, output_hook=lambda message: None)
            assert reply["content"]["status"] == "ok", reply["content"]
    finally:
        client.stop_channels()
    record = json.loads((results / "play" / "02_overview" / "record.json").read_text())
    assert (record["status"], record["preset"]) == ("complete", "smoke")
