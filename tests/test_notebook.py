"""What notebooks call first and last: in real kernels, started by papermill and by nbclient."""

import json
import os

import nbclient
import nbformat
import pandas as pd
import papermill
import pytest
import torch
from matplotlib.figure import Figure

from effilib import notebook, paths
from effilib.errors import BadInput
from effilib.experiment import Arm, compare
from effilib.statistics import SHARED, SMOKE
from effilib.training import History

NAME = "03_2_mixed_precision"
PARAMETERS = 'preset = "smoke"\ndataset = "synthetic"\nnetwork = ""\nseeds = 0\ndevice = "cpu"\nwidths = [8, 16]  # of its own'
START = f"""
from effilib import Arm, compare, figures, notebook
book = notebook.start("{NAME}", preset=preset, dataset=dataset, network=network, seeds=seeds, device=device, widths=widths)
book.settings()
"""
RUN = """
found = compare(book.task, [Arm(name="base", role="baseline"), Arm(name="short", changes={"epochs": 1})], title="two arms")
figure = figures.accuracy_over_time(found)
book.show(figure, "What to see.")
"""
RECORD = """
record = book.record(found, figure=figure, caption="What figure.png shows.", notes=["A note."])
"""
SCHEMA = {
    "schema", "status", "notebook", "chapter", "title", "title_de", "paper", "claim", "preset", "dataset", "network", "parameters",
    "machine", "commit", "date", "duration_s", "shared_machine", "headline", "verdicts", "caption", "notes",
}  # fmt: skip
HEADLINE = {
    "arm", "against", "quantity", "ratio", "low", "high", "n", "accuracy_difference", "accuracy_low", "verdict", "claim_reproduced", "text"
}  # fmt: skip


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    for name in ("EFFILIB_OUT", "EFFILIB_SHARED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("EFFILIB_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(paths.root()), os.environ.get("PYTHONPATH", "")]))
    return tmp_path / "results"


def write(path, *cells, parameters=PARAMETERS):
    new = nbformat.v4
    tagged = new.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(
        new.new_notebook(cells=[tagged, *(new.new_code_cell(c.strip()) for c in cells)], metadata=metadata),
        path,
    )
    return path


# Real kernels


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sedes": 3}, f"unknown parameter of {NAME} 'sedes': choose one of .*widths.*did you mean 'seeds'"),
        ({"seeds": "three"}, f"parameter seeds of {NAME} is 'three' \\(str\\), expected int"),
    ],
)
def test_a_wrong_parameter_stops_the_notebook_in_papermill(given, words, results, tmp_path):
    path = write(tmp_path / "x.ipynb", START, "ran_on = True")
    with pytest.raises(papermill.PapermillExecutionError, match=words) as error:
        papermill.execute_notebook(
            path, tmp_path / "out.ipynb", parameters=given, progress_bar=False, cwd=tmp_path
        )
    assert error.value.ename == "BadInput"
    assert not results.exists()


def test_papermill_runs_a_notebook_with_parameters_into_the_folder_it_is_told(tmp_path, monkeypatch, results):
    monkeypatch.setenv("EFFILIB_OUT", str(tmp_path / "out"))
    path = write(tmp_path / "x.ipynb", START, RUN, RECORD)
    papermill.execute_notebook(
        path, tmp_path / "out.ipynb", parameters={"seeds": 2, "widths": [4]}, progress_bar=False, cwd=tmp_path
    )
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"record.json", "history.csv", "figure.png"}
    assert not (results / "play").exists()
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert set(record) >= SCHEMA
    assert record["parameters"] == dict(
        preset="smoke", dataset="synthetic", network="", seeds=2, device="cpu", widths=[4]
    )
    assert (record["schema"], record["status"], record["notebook"], record["chapter"]) == (
        1,
        "complete",
        NAME,
        "3.2",
    )
    assert record["paper"] == "Micikevicius et al. 2017, arXiv:1710.03740"
    assert set(record["headline"]) >= HEADLINE
    assert record["headline"]["verdict"] == SMOKE
    assert record["verdicts"] == [record["headline"]]
    assert "A note." in record["notes"]
    history = pd.read_csv(tmp_path / "out" / "history.csv")
    assert set(zip(history.arm, history.seed, strict=True)) == {
        (a, s) for a in ("base", "short") for s in (0, 1)
    }
    assert (tmp_path / "out" / "figure.png").read_bytes().startswith(b"\x89PNG")
    shown = nbformat.read(tmp_path / "out.ipynb", 4)
    text = str([o for c in shown.cells if c.cell_type == "code" for o in c.outputs])
    for words in ("not a measurement", "two arms: 4 of 4", "*What to see.*", "image/png", "synthetic"):
        assert words in text


def test_a_notebook_opened_in_any_folder_plays_into_its_own_place(tmp_path, results):
    """As JupyterLab runs it: nothing injected, the kernel in another folder."""
    nb = nbformat.read(write(tmp_path / "x.ipynb", START, RUN, RECORD), 4)
    (tmp_path / "elsewhere").mkdir()
    nbclient.NotebookClient(
        nb, kernel_name="python3", resources={"metadata": {"path": str(tmp_path / "elsewhere")}}
    ).execute()
    assert {p.name for p in (results / "play" / NAME).iterdir()} == {
        "record.json",
        "history.csv",
        "figure.png",
    }
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert json.loads((results / "play" / NAME / "record.json").read_text())["headline"]["n"] == 1


# Parameters


def start(**given):
    return notebook.start(NAME, **{"preset": "smoke", "dataset": "synthetic", "device": "cpu", **given})


def test_nothing_is_injected_outside_of_a_notebook():
    assert notebook.injected() == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"preset": "quikc"}, "unknown preset 'quikc'.*did you mean 'quick'"),
        ({"dataset": "mnis5k"}, "unknown data set 'mnis5k'.*did you mean 'mnist5k'"),
        ({"dataset": "nowhere/x.npz"}, "there is no such file"),
        ({"network": "resnett"}, "unknown network 'resnett'.*did you mean 'resnet'"),
        ({"network": "no.such:net"}, "cannot import"),
        ({"network": "torchvision.models:resnet18"}, "takes 3 input channels, but the images have 1"),
        ({"seeds": -1}, f"parameter seeds of {NAME} is -1, expected 0"),
        ({"seeds": 1.5}, r"is 1.5 \(float\), expected int"),
        ({"seeds": True}, r"is True \(bool\), expected int"),
        ({"preset": 3}, r"parameter preset of .* is 3 \(int\), expected str"),
        ({"device": "cdua"}, "unknown device 'cdua'.*did you mean 'cuda'"),
    ],
)
def test_a_parameter_that_cannot_be_is_bad_input_and_leaves_nothing(given, words, results):
    with pytest.raises(BadInput, match=words):
        start(**given)
    assert not results.exists()


def test_an_empty_parameter_is_the_presets_and_a_given_one_wins(monkeypatch):
    monkeypatch.setenv("EFFILIB_PRESET", "smoke")
    book = start(preset="")
    assert book.preset == "smoke"
    assert book.smoke
    assert book.task.seeds == 1
    assert start(seeds=3).task.seeds == 3
    assert not start(preset="quick").smoke
    assert start(network="vgg").task.network == "vgg"


def test_results_that_cannot_be_written_are_bad_input(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EFFILIB_OUT", str(tmp_path / "file" / "out"))
    with pytest.raises(BadInput, match=r"cannot write results into .*file/out"):
        start()


def test_the_settings_name_what_was_resolved(monkeypatch):
    table = start(seeds=3).settings()
    said = dict(zip(table.index, table[""], strict=True))
    assert said["preset"] == "smoke (not a measurement)"
    assert said["data"].startswith("synthetic (1, 8, 8), 128 train / ")
    assert "resnet" in said["network"]
    assert said["seeds"] == "3"
    assert f"{torch.get_num_threads()} threads" in said["machine"]
    assert said["results"] == f"results/play/{NAME}"
    assert "channels_last" in said["recipe"]


# The record


def fixed(seconds):
    def fit(task, seed):
        row = {"lr": 0.1, "train_loss": 1.0, "loss": 1.0}
        points = [(0, 10.0), (10, 90.0), (20, 90.0)]
        rows = [
            {"step": s, "epoch": s / 10, "seconds": seconds * (100 + seed) * s, "accuracy": a, **row}
            for s, a in points
        ]
        kinds = {"step": {"count": 20, "seconds": seconds, "median": seconds / 20}}
        return History(
            rows=rows,
            steps=20,
            seconds=seconds,
            raw_seconds=seconds,
            timed=20,
            kinds=kinds,
            flops=1e9,
            test_accuracy=90.0,
        )

    return fit


def compared(book, *, illustration=False, names=("base", "fast", "small")):
    arms = [
        Arm(name=n, role=r, fit=fixed(s))
        for n, r, s in zip(names, ("baseline", "method", "control"), (10.0, 5.0, 20.0), strict=True)
    ]
    task = book.task.but(preset="quick", target=60.0)
    return compare(task, arms, seeds=5, illustration=illustration, title="made")


def figure():
    return Figure(figsize=(2, 1))


def test_the_headline_is_the_first_method_or_the_arm_that_is_named():
    book = start()
    found = compared(book)
    record = book.record(found, figure=figure(), caption="c")
    assert record["headline"]["arm"] == "fast"
    assert record["headline"]["ratio"] == pytest.approx(2.0)
    assert [v["arm"] for v in record["verdicts"]] == ["fast", "small"]
    assert book.record(found, figure=figure(), caption="c", headline="small")["headline"]["arm"] == "small"


def test_illustrations_are_recorded_without_verdicts_and_several_comparisons_together():
    book = start()
    shown, judged = compared(book, illustration=True, names=("a", "b", "c")), compared(book)
    record = book.record([shown, judged], figure=figure(), caption="c")
    assert [v["arm"] for v in record["verdicts"]] == ["fast", "small"]
    history = pd.read_csv(book.folder / "history.csv")
    assert set(history.arm) == {"a", "b", "c", "base", "fast", "small"}
    assert len(history) == 6 * 5 * 3


def test_a_notebook_that_compares_nothing_has_a_record_too():
    book = start()
    record = book.record(figure=figure(), caption="c")
    assert record["headline"] is None
    assert record["verdicts"] == []
    assert {p.name for p in book.folder.iterdir()} == {"record.json", "figure.png"}


def test_a_record_keeps_what_a_notebook_gives_it_besides():
    book = start()
    assert "kept" not in book.record(figure=figure(), caption="c")
    book.record(figure=figure(), caption="c", kept={"plan": [[3, "widen", "stage 1"]]})
    assert json.loads((book.folder / "record.json").read_text())["kept"] == {
        "plan": [[3, "widen", "stage 1"]]
    }


def test_a_record_is_plain_json_without_nan():
    book = start()
    book.record(compared(book), figure=figure(), caption="ü")

    def refuse(word):
        raise AssertionError(word)

    record = json.loads((book.folder / "record.json").read_text(), parse_constant=refuse)
    assert record["caption"] == "ü"


def test_the_record_comes_last_so_that_what_fails_before_leaves_none():
    class Broken(Figure):
        def savefig(self, *args, **kwargs):
            raise OSError("the disk is full")

    book = start()
    with pytest.raises(OSError, match="disk is full"):
        book.record(compared(book), figure=Broken(), caption="c")
    assert not (book.folder / "record.json").exists()


def test_a_full_disk_leaves_the_record_that_was_there(monkeypatch):
    """The file is replaced as a whole: here the replacing itself fails."""
    book = start()
    book.record(figure=figure(), caption="first")

    def full(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk is full"):
        book.record(figure=figure(), caption="second")
    monkeypatch.undo()
    assert json.loads((book.folder / "record.json").read_text())["caption"] == "first"
    assert {p.name for p in book.folder.iterdir()} == {"record.json", "figure.png"}


def test_a_shared_machine_is_in_the_record(monkeypatch):
    monkeypatch.setenv("EFFILIB_SHARED", "1")
    book = start()
    record = book.record(compared(book), figure=figure(), caption="c")
    assert record["shared_machine"] is True
    assert {v["verdict"] for v in record["verdicts"]} == {SHARED}


# What is shown


def test_tables_show_numbers_and_words_and_nothing_that_is_markup():
    html = notebook.table_html(
        pd.DataFrame({"x": [1234.5678, float("nan")], "<b>": ["<script>", "a" * 100]}, index=["one", "two"])
    )
    assert "1,235" in html
    assert "<td>–</td>" in html
    assert "&lt;script&gt;" in html
    assert "a" * 100 in html
    assert "<b>" not in html


def test_the_source_of_functions_and_the_facts_of_a_method_are_shown():
    from effilib.methods import mixed_precision as mp

    code = notebook.source(mp.round_to, mp.LossScaler)
    assert "def round_to" in code.data
    assert "class LossScaler" in code.data
    table = notebook.header(mp.INFO)
    assert table.loc["paper", ""] == mp.INFO.paper
    assert "cost model" in table.index
