"""What chapter 4.2 shows beyond its method."""

import pytest

from effilib.chapters import gradient_approximation as chapter
from effilib.chapters.products import formats
from effilib.experiment import compare
from effilib.tasks import task

TASK = task("smoke", "synthetic", epochs=1)
DATA = TASK.load()


def test_the_case_by_hand():
    table = chapter.by_hand()
    assert table["largest |dy| at"].tolist() == ["row 0, column 1", "row 0, column 1"]
    assert table["sum of dy"].tolist() == ["-1", "2"]
    assert table["dW, one location"].tolist() == ["-2", "4"]
    assert table["dW, exact"].tolist() == ["1", "3"]


def test_the_gather_is_exact_and_the_unbiased_variant_unbiased():
    table = chapter.check_gather(300)["result"].astype(float)
    assert (table.iloc[:3] < 1e-4).all()
    assert table.iloc[3] < 5
    assert table.iloc[4] > 0.1


def test_the_quality_of_every_layers_gradient_is_measured():
    frame = chapter.quality(TASK, DATA, epochs=0.5)
    assert len(frame) == 6
    cosines = frame[[c for c in frame if "cosine" in c]].astype(float)
    assert (cosines.abs() <= 1.0001).all().all()
    lengths = frame["top: length"].astype(float) / frame["top, published scale: length"].astype(float)
    assert lengths.tolist() == pytest.approx([64] * 6)
    figure, _ = chapter.quality_figure(frame)
    assert len(figure.axes[0].get_yticklabels()) == 6


def test_single_layers_are_timed_in_every_format():
    table = chapter.time_table(TASK)
    assert len(table) == len(formats())
    assert {"zero", "random", "top", "unbiased"} <= set(table)


def test_the_schedules_are_drawn_as_they_are():
    table = chapter.schedule_table()
    assert not any("x" in cell for cell in table.loc["layer 0 (stem)"])
    for column in table:
        assert sum(cell.count("x") for cell in table[column]) == 16


def test_the_control_is_the_published_one_in_the_study():
    study = chapter.base_task(task("study", "mnist5k"))
    assert study.widths["blocks"] == (3, 3, 3)
    control = chapter.arms(study)[-1]
    assert (control.name, control.network) == ("ResNet-14, exact", {"blocks": (2, 2, 2)})
    quick = task("quick", "mnist5k")
    assert chapter.base_task(quick) is quick
    assert chapter.control(quick).network == {"blocks": (1, 1, 1)}
    assert (
        chapter.base_task(task("study", "mnist5k"), "convnet").network == "resnet"
    )  # nothing is put in its place
    assert chapter.control(quick.but(network="convnet", widths={})).changes


def test_no_two_arms_of_the_grid_are_alike(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFILIB_RESULTS", str(tmp_path))
    found = compare(TASK, chapter.grid(TASK), quantity="time per step", seeds=1, illustration=True)
    losses = [found.histories(a.name)[0].rows[-1]["loss"] for a in found.arms]
    assert len(set(losses)) == len(losses)
    assert len(chapter.grid(task("quick", "mnist5k"))) == 10
    assert len(chapter.grid(task("study", "mnist5k"))) == 16
