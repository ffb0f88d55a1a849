"""What chapter 6.4 trains of layer replacement."""

import pytest

from effilib.chapters import layer_replacement as chapter
from effilib.experiment import measure
from effilib.tasks import task

pytestmark = pytest.mark.usefixtures("results")

TASK = task("smoke", "synthetic")


def test_the_task_is_the_wide_one():
    assert chapter.wide(task("quick", "synthetic")).widths == {"widths": (32, 64, 128), "blocks": (1, 1, 1)}
    assert chapter.wide(task("study", "synthetic", "convnet")).widths == {}


def test_the_search_is_on_the_clock_of_the_chosen_arm_alone():
    cell = measure(TASK.but(lengths=(1.0,)), chapter.arms(TASK))[0]["arms"]
    assert "search" in cell[chapter.CHOSEN].kinds
    assert cell[chapter.CHOSEN].seconds > cell[chapter.CHOSEN].kinds["search"]["seconds"] > 0
    assert "search" not in cell[chapter.NARROWED].kinds
    assert cell[chapter.NARROWED].flops < cell[chapter.DENSE].flops


def test_the_grid_has_other_budgets_and_the_search_in_parts():
    fits = {a.name: a.fit for a in chapter.grid(TASK)[1:]}
    assert [f.budget for name, f in fits.items() if name.startswith("budget")] == [0.75, 0.5, 0.35]
    assert fits["cuts alone"].candidates == ()
    assert fits["other structures alone"].block == 0


def test_uniform_narrowing_is_about_as_wide_as_a_network_within_the_budget():
    """The control of the preset study: 16/48/96 of 32/64/128 channels."""
    task_ = chapter.wide(task("quick", "synthetic")).but(images=64, epochs=1, validation=50)
    narrower = next(a.fit for a in chapter.arms(task_) if a.name == chapter.NARROWED)
    assert narrower(task_, 0).structure["widths"] == [16, 48, 96]
