"""What notebooks call first and last: in real kernels, started by papermill and by nbclient."""

import json
import math
import os
import re
import tempfile
import textwrap
from dataclasses import dataclass

import nbclient
import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from matplotlib.figure import Figure

from effilib import figures, notebook, paths
from effilib.errors import BadInput
from effilib.experiment import Arm
from effilib.history import History
from effilib.results import COLUMNS, compare
from effilib.statistics import SHARED, SMOKE

NAME = "03_2_mixed_precision"
PARAMETERS = """
preset = "smoke"
dataset = "synthetic"
network = ""
seeds = 0
device = "cpu"
widths = [8, 16]  # of its own
"""
START = f"""
from effilib import Arm, compare, figures, notebook
given = dict(preset=preset, dataset=dataset, network=network, seeds=seeds, device=device)
book = notebook.start("{NAME}", **given, widths=widths)
book.settings()
"""
RUN = """
arms = [Arm(name="base", role="baseline"), Arm(name="narrow", network={"widths": (4, 4, 8)})]
found = compare(book.task, arms, aim=1.1, title="two arms")
book.show(figures.curves(found), "What to see.")
"""
RECORD = """
record = book.record(found, caption="What figure.png shows.", notes=["A note."])
[0.6000000238418579, {"a": 1 / 3}]
"""
SCHEMA = {
    "schema", "status", "notebook", "chapter", "title", "title_de", "paper", "claim", "preset", "dataset",
    "network", "parameters", "task", "machine", "commit", "date", "duration_s", "shared_machine", "headline",
    "verdicts", "caption", "notes",
}  # fmt: skip
HEADLINE = {
    "arm", "against", "cost", "kind", "ratio", "low", "high", "range", "n", "lengths", "points", "p", "aim",
    "aim_verdict", "verdict", "text",
}  # fmt: skip


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    for name in ("EFFILIB_OUT", "EFFILIB_SHARED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("EFFILIB_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(
        tempfile, "tempdir", str(tmp_path)
    )  # what else is measured on this machine is not seen
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
    given = dict(preset="smoke", dataset="synthetic", seeds=2, device="cpu", widths=[4])
    assert record["parameters"] == {**notebook.DEFAULTS, **given}
    assert (record["schema"], record["status"], record["notebook"]) == (2, "complete", NAME)
    assert record["chapter"] == "3.2"
    assert record["paper"] == "Micikevicius et al. 2017, arXiv:1710.03740"
    assert set(record["headline"]) >= HEADLINE
    assert (record["headline"]["verdict"], record["headline"]["aim"]) == (SMOKE, 1.1)
    assert record["verdicts"] == [record["headline"]]
    assert "A note." in record["notes"]
    history = pd.read_csv(tmp_path / "out" / "history.csv")
    assert list(history) == COLUMNS
    assert set(history.comparison) == {"two arms"}
    cells = set(zip(history.arm, history.length, history.seed, strict=True))
    assert cells == {
        (a, n, s) for a in ("base", "narrow") for n, s in ((0.5, 0), (0.5, 1), (1.0, 100), (1.0, 101))
    }
    assert (tmp_path / "out" / "figure.png").read_bytes().startswith(b"\x89PNG")
    shown = nbformat.read(tmp_path / "out.ipynb", 4)
    text = str([o for c in shown.cells if c.cell_type == "code" for o in c.outputs])
    for words in (
        "not a measurement",
        "two arms: 8 of 8",
        "*What to see.*",
        "image/png",
        "[0.6, {'a': 0.333333}]",
    ):
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
        ({"epochs": -1.0}, f"parameter epochs of {NAME} is -1.0, expected 0"),
        ({"epochs": float("nan")}, "parameter epochs of .* is nan, expected 0"),
        ({"batch_size": 16.0}, r"is 16.0 \(float\), expected int"),
        (
            {"batch_size": 4096},
            "synthetic has 128 training images, fewer than a batch of 4096: batch_size sets",
        ),
        ({"lr": "0.1"}, r"is '0.1' \(str\), expected float"),
        ({"size": -8}, "parameter size of .* is -8, expected 0"),
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


def test_what_the_user_sets_is_trained_at_and_in_the_record():
    asked = dict(epochs=1, batch_size=16, lr=0.05)
    book = start(**asked, seeds=2)
    task = book.task.sized({"smoke": dict(epochs=9, batch_size=9, lr=9, seeds=9)})
    recipe = task.recipe
    assert (recipe.epochs, recipe.batch_size, recipe.lr, task.seeds) == (1, 16, 0.05, 2)
    assert {k: book.parameters[k] for k in asked} == asked
    assert start().task.given == ()


def test_the_settings_say_what_the_data_are_too_small_for():
    said = settings(start(preset="quick"))
    assert "too short" in said["beware"]
    assert "beware" not in settings(start())


def test_results_that_cannot_be_written_are_bad_input(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EFFILIB_OUT", str(tmp_path / "file" / "out"))
    with pytest.raises(BadInput, match=r"cannot write results into .*file/out"):
        start()


def settings(book, **changes):
    table = book.settings(book.task.but(**changes)) if changes else book.settings()
    return dict(zip(table.index, table[""], strict=True))


def test_the_settings_name_what_was_resolved():
    said = settings(start(seeds=3))
    assert said["preset"] == "smoke (not a measurement)"
    assert said["data"].startswith("synthetic (1, 8, 8), 128 train / ")
    assert "resnet" in said["network"]
    assert said["seeds a length"] == 3
    assert said["lengths"] == "1, 2 epochs"
    assert said["recipe"].startswith("batch 32, lr 0.1, weight decay 0.0005, linear, ")
    assert f"{torch.get_num_threads()} threads" in said["machine"]
    assert said["results"] == f"results/play/{NAME}"
    assert "channels_last" in said["recipe"]


def test_the_settings_say_what_is_tuned_for_each_length():
    tuned = {1.0: {"lr": 0.3, "weight_decay": 1e-3}, 2.0: {"lr": 0.2}}
    said = settings(start(), tuned=tuned)
    assert said["lengths"] == "1 (lr 0.3, weight decay 0.001), 2 (lr 0.2, weight decay 0.0005) epochs"
    assert said["recipe"].startswith("batch 32, linear, ")
    said = settings(start(), axis="images", lengths=(0.5, 1.0))
    assert said["lengths"] == "64, 128 training images, with as many updates"


# The record


@dataclass(frozen=True)
class Made:
    """A run that takes no time: 85 % after 10 s times its length, a point and a half an e-fold."""

    seconds: float
    diverges: bool = False

    def __call__(self, task, seed):
        share, noise = task.recipe.epochs / 2, 0.1 * (seed % 3 - 1)
        end = math.nan if self.diverges else 85 + 5 * math.log(share) + noise
        evaluations = [] if self.diverges else [(10, 40.0), (20, end)]
        rows = [
            {
                "step": s,
                "epoch": s / 10,
                "seconds": self.seconds * share * s / 20,
                "accuracy": a,
                "lr": 0.1,
                "loss": 1.0,
            }
            for s, a in evaluations
        ]
        took = self.seconds * share
        return History(
            rows=rows, steps=20, seconds=took, raw_seconds=took, flops=1e9 * share, final=end,
            test_accuracy=end, held_out=1000, classes=4, majority=25.0, diverged=self.diverges,
        )  # fmt: skip


def compared(book, *, names=("base", "fast", "small"), title="made", last=Made(20.0), **given):
    fits = dict(zip(names, (Made(10.0), Made(5.0), last), strict=True))
    roles = ("baseline", "method", "control")
    arms = [
        Arm(name=n, role=r, fit=f, lengths=(0.5, 1.0)) for (n, f), r in zip(fits.items(), roles, strict=True)
    ]
    task = book.task.but(preset="quick", lengths=(0.5, 1.0), seeds=3)
    return compare(task, arms, title=title, **given)


def figure():
    return Figure(figsize=(2, 1))


def test_the_headline_is_the_first_method_or_the_arm_that_is_named():
    book = start()
    found = compared(book, aim=1.5)
    record = book.record(found, figure=figure(), caption="c")
    assert record["headline"]["arm"] == "fast"
    assert record["headline"]["ratio"] == pytest.approx(2.0)
    assert (record["headline"]["aim"], record["headline"]["aim_verdict"]) == (1.5, "met")
    assert [(v["arm"], v["verdict"]) for v in record["verdicts"]] == [("fast", "faster"), ("small", "slower")]
    assert book.record(found, figure=figure(), caption="c", headline="small")["headline"]["arm"] == "small"
    with pytest.raises(BadInput, match=r"unknown arm with a verdict 'smal'.*did you mean 'small'"):
        book.record(found, figure=figure(), caption="c", headline="smal")


def test_without_a_figure_the_curves_of_the_headlines_comparison_are_drawn(monkeypatch):
    drawn, book = [], start()
    monkeypatch.setattr(
        figures, "curves", lambda *given, **named: drawn.append((*given, named["cost"])) or figure()
    )
    shown = compared(book, illustration=True, names=("a", "b", "c"), title="shown")
    judged = compared(book)
    book.record([shown, judged], caption="c")
    book.record(judged, caption="c", headline="small")
    book.record(shown, caption="c")
    assert [(c.title, arm, cost) for c, arm, cost in drawn] == [
        ("made", None, "seconds"), ("made", "small", "seconds"), ("shown", None, "seconds")
    ]  # fmt: skip
    with pytest.raises(BadInput, match="a record without a comparison needs a figure"):
        book.record(caption="c")


def test_comparisons_of_a_record_have_titles_of_their_own():
    book = start()
    again = compared(book, names=("a", "b", "c"))
    with pytest.raises(BadInput, match="need titles of their own, got made, made"):
        book.record([compared(book), again], figure=figure(), caption="c")
    assert not list(book.folder.iterdir())


def test_illustrations_are_recorded_without_verdicts_and_several_comparisons_together():
    book = start()
    shown, judged = compared(book, illustration=True, names=("a", "b", "c"), title="shown"), compared(book)
    record = book.record([shown, judged], figure=figure(), caption="c")
    assert [v["arm"] for v in record["verdicts"]] == ["fast", "small"]
    history = pd.read_csv(book.folder / "history.csv")
    assert set(zip(history.comparison, history.arm, strict=True)) == {
        *(("shown", arm) for arm in "abc"), *(("made", arm) for arm in ("base", "fast", "small"))
    }  # fmt: skip
    assert len(history) == 6 * 2 * 3 * 2  # arms, lengths, seeds, evaluations
    assert record["notes"].count(record["notes"][0]) == 1  # what is true of both is said once


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
    found = compared(book, last=Made(20.0, diverges=True))
    kept = {"share": math.nan, "mask": torch.tensor([1.0, math.inf]), 3: np.float64(0.5)}
    returned = book.record(found, figure=figure(), caption="ü", kept=kept)

    def refuse(word):
        raise AssertionError(word)

    record = json.loads((book.folder / "record.json").read_text(), parse_constant=refuse)
    assert record == returned
    assert record["caption"] == "ü"
    assert record["kept"] == {"share": None, "mask": [1.0, None], "3": 0.5}
    assert (record["verdicts"][1]["verdict"], record["verdicts"][1]["ratio"]) == ("diverged", None)


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


def cells(frame):
    """A table's texts, row by row."""
    rows = notebook.table_html(frame).split("<tr>")[1:]
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]


def column(name, values):
    return [row[-1] for row in cells(pd.DataFrame({name: values}))[1:]]


def test_tables_show_numbers_and_words_and_nothing_that_is_markup():
    html = notebook.table_html(
        pd.DataFrame({"x": [1234.5678, float("nan")], "<b>": ["<script>", "a" * 100]}, index=["one", "two"])
    )
    assert "1,235" in html
    assert "<td>–</td>" in html
    assert "&lt;script&gt;" in html
    assert "a" * 100 in html
    assert "<b>" not in html


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("accuracy %", [84.916, 8.0, math.nan], ["84.92", "8.00", "–"]),
        ("x by FLOPs", [1.0, 1.3777, 0.5], ["1.00", "1.38", "0.50"]),
        ("points", [-0.001, -0.006, 1.0], ["+0.00", "-0.01", "+1.00"]),
        ("speed-up", [1, 1.3777], ["1.00", "1.38"]),
        ("low", [0.9349, None], ["0.93", "–"]),
        ("points at equal time", [0.0, -1.256, 2.0], ["+0.00", "-1.26", "+2.00"]),
        ("ms", [12.3456, 1234.5, 0.0123], ["12.3", "1,234.5", "0.0123"]),
        ("s", [0.012345, 0.02], ["0.0123", "0.0200"]),
        ("lr", [0.1, np.float32(0.6), 5e-4], ["0.1", "0.6", "0.0005"]),
        ("FLOPs", [1.23456e12, 2e12], ["1.23e12", "2e12"]),
        ("images", [50_000, 128, 7], ["50,000", "128", "7"]),
        ("data points", [100, 3], ["100", "3"]),
        ("x", [0.001, 0.25], ["0.001", "0.25"]),  # not a factor
        ("ratio", [math.inf, -math.inf, 2.0], ["∞", "-∞", "2"]),
        ("reached", [True, False], ["True", "False"]),
        ("weights", [[0.6000000238418579, 1.0], (1 / 3,)], ["[0.6, 1]", "(0.3333,)"]),
        ("what", ["1.234567", 1.234567, 3, None], ["1.234567", "1.235", "3", "–"]),
        ("tensor", [torch.tensor(0.6), torch.tensor([1, 2])], ["0.6", "[1, 2]"]),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_numbers_have_sensible_digits(name, values, expected):
    assert (
        column(name, pd.Series(values, dtype=object if name in ("what", "tensor", "weights") else None))
        == expected
    )


def test_index_levels_are_named_and_said_once():
    index = pd.MultiIndex.from_tuples([("a", 0.5), ("a", 1.0), ("b", 0.5)], names=["arm", "length"])
    assert cells(pd.DataFrame({"s": [1, 2, 3]}, index=index)) == [
        ["arm", "length", "s"], ["a", "0.5", "1"], ["", "1", "2"], ["b", "0.5", "3"]
    ]  # fmt: skip


def test_a_comparisons_table_can_be_read():
    rows = cells(compared(start(), aim=1.1).table())
    found = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:]}
    assert found["fast"]["speed-up"] == "2.00"
    assert found["base"]["low"] == "–"
    assert re.fullmatch(r"\+\d\.\d\d", found["fast"]["points at equal time"])


def test_the_source_of_functions_and_the_facts_of_a_method_are_shown():
    from effilib.methods import mixed_precision as mp

    code = notebook.source(mp.round_to, mp.LossScaler)
    assert "def round_to" in code.data
    assert "class LossScaler" in code.data
    table = notebook.header(mp.INFO)
    assert table.loc["paper", ""] == mp.INFO.paper
    assert "cost model" in table.index


def one_line():
    """Return three."""
    return 3


def documented(x):
    """Return x.

    Some words.

    >>> documented(3)
    3

    More words.
    """
    return x


class Nested:
    """A class.

    >>> Nested().method()
    1
    """

    def method(self):
        """Return one.

        >>> for i in range(3):
        ...     pass
        """
        return 1


def test_examples_are_left_out_of_what_is_shown():
    assert notebook.source(one_line).data == 'def one_line():\n    """Return three."""\n    return 3'
    assert notebook.source(documented).data == (
        'def documented(x):\n    """Return x.\n\n    Some words.\n\n    More words.\n    """\n    return x'
    )
    method = 'def method(self):\n    """Return one."""\n    return 1'
    nested = 'class Nested:\n    """A class."""\n\n' + textwrap.indent(method, "    ")
    assert notebook.source(Nested, Nested.method).data == f"{nested}\n\n{method}"
