"""What chapter 4.1 shows beyond its method."""

import pytest

from effilib.chapters import gradient_pruning as chapter
from effilib.chapters.products import final_table, formats
from effilib.experiment import compare
from effilib.tasks import task

TASK = task("smoke", "synthetic", epochs=1)
DATA = TASK.load()


def test_the_case_by_hand():
    table = chapter.by_hand()
    assert table.loc["0.2", "becomes 0"] == "80%"
    assert table.loc["0.2", "variance |g| (tau - |g|)"] == "0.16"
    assert table.loc["1.5", "stays"] == "always"


def test_the_closed_form_is_that_of_normal_gradients_and_others_have_more_zeros():
    table = chapter.zeros_table(50_000).astype(float)
    for row in table.index:
        assert table.loc[row, "normal"] == pytest.approx(table.loc[row, "closed form, normal"], abs=0.01)
        assert table.loc[row, "normal"] < table.loc[row, "Laplace"] < table.loc[row, "lognormal (s = 2)"]
    assert table.loc["p = 99%", "normal"] < 0.7


def test_the_check_of_pruning_says_what_it_found():
    table = chapter.check_pruning(300)["result"]
    assert float(table.iloc[0]) < 5
    assert float(table.iloc[1]) == pytest.approx(1, abs=0.1)
    assert table.iloc[2] == "0, tau or -tau"
    assert table.iloc[3] == "unchanged"
    assert table.iloc[4].startswith("bit-equal")


def test_real_gradients_are_gathered_for_every_layer():
    found = chapter.gradients(TASK, DATA, epochs=0.5)
    assert all(name.endswith("(dO)") for name in found)
    assert len(found) == 8
    table = chapter.density_table(found)
    assert list(table.index) == list(found)
    figure, caption = chapter.laws_figure(found)
    assert figure.axes[0].get_xlabel()
    assert "median layer has" in caption


def test_passes_are_timed_for_every_variant_in_every_format():
    table, times = chapter.time_table(TASK, DATA)
    assert len(table) == len(times) == 6 * len(formats())
    figure, _ = chapter.time_figure(times)
    assert len(figure.axes[0].patches) == 5 * len(formats())


def test_the_control_is_smaller():
    assert chapter.fewer(task("quick", "mnist5k")) == {"blocks": (1, 1, 1)}
    assert chapter.fewer(TASK) == {"widths": (6, 6, 6)}
    assert chapter.control(TASK.but(network="convnet", widths={})).changes
    assert [a.role for a in chapter.arms(task("study", "mnist5k"))] == [
        "baseline",
        "method",
        "method",
        "control",
    ]


def test_the_grid_says_what_density_was_reached(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFILIB_RESULTS", str(tmp_path))
    t = TASK.but(epochs=8)  # the queues of thresholds fill first
    found = compare(t, chapter.grid(t), quantity="time per step", seeds=1, illustration=True)
    losses = [found.histories(a.name)[0].rows[-1]["loss"] for a in found.arms]
    assert len(set(losses)) == len(losses)  # no two arms alike
    table = final_table(found, chapter.notes)
    assert (
        0.3
        < float(table.loc["lognormal-aware, as many zeros", "zeros"])
        < float(table.loc["p = 99%", "zeros"])
        < 0.95
    )
    assert table.loc["exact", "zeros"] == ""
    figure, _ = chapter.achieved_figure(found)
    assert figure.axes[0].get_xlabel()
    assert len(chapter.grid(task("study", "mnist5k"))) == 11
