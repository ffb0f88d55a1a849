"""What chapter 4.2 trains, and what it shows of replaced weight gradients."""

import pytest

from effilib.chapters import gradient_approximation as chapter
from effilib.experiment import check_arms
from effilib.tasks import task
from effilib.timing import formats

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


def test_single_layers_are_timed_in_every_format():
    table = chapter.time_table(TASK)
    assert len(table) == len(formats())
    assert {f"{h}, x" for h in ("zero", "random", "top", "unbiased")} <= set(table)


def test_the_schedules_are_drawn_as_they_are():
    table = chapter.schedule_table()
    assert not any("x" in cell for cell in table.loc["layer 0 (stem)"])
    for column in table:
        assert sum(cell.count("x") for cell in table[column]) == 16


def test_the_control_is_the_published_one_in_the_study():
    study = task("study", "synthetic").sized(chapter.SIZES)
    check_arms(study, chapter.arms(study))
    assert [(a.name, a.network) for a in chapter.control(study)] == [
        ("ResNet-14, exact", {"blocks": (2, 2, 2)})
    ]
    assert [a.network for a in chapter.control(task("quick", "synthetic"))] == [{"blocks": (1, 1, 1)}]
    assert not chapter.control(task("quick", "synthetic", "convnet"))


def test_the_grid_compares_at_equal_steps_and_has_no_two_arms_alike():
    for preset, count in (("quick", 6), ("study", 15)):
        t = task(preset, "synthetic", lengths=(1.0,))
        arms = chapter.grid(t)
        check_arms(t, arms)
        assert len({a.methods for a in arms}) == len(arms) == count
        assert {a.lengths for a in arms[1:]} == {t.lengths}
