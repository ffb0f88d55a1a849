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


def test_the_search_is_on_the_clock_of_the_replaced_arm_alone():
    cell = measure(TASK.but(lengths=(1.0,)), chapter.arms(TASK))[0]["arms"]
    assert "search" in cell[chapter.REPLACED].kinds
    assert cell[chapter.REPLACED].seconds > cell[chapter.REPLACED].kinds["search"]["seconds"] > 0
    assert "search" not in cell[chapter.NARROWED].kinds
    assert cell[chapter.NARROWED].flops < cell[chapter.DENSE].flops


def test_the_grid_has_the_other_budgets():
    assert [a.fit.budget for a in chapter.grid(TASK)[1:]] == [0.75, 0.5, 0.35]
