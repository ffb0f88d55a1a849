"""What chapter 5.2 trains: every structure with both trainings, and the control."""

from effilib.chapters import structure_and_strength as chapter
from effilib.experiment import check_arms
from effilib.tasks import task

TASK = task("smoke", "synthetic", "convnet", precision="fp32")


def test_the_grid_has_every_structure_with_both_trainings_and_the_control():
    grid, arms = chapter.grid(TASK), chapter.arms(TASK)
    check_arms(TASK, grid)
    check_arms(TASK, arms)
    assert len(grid) == 3 * 2 + 1
    assert [a.name for a in arms] == [chapter.BASE, chapter.PAPER, chapter.START]
    assert [a.name for a in grid if a.network["bn"]] == ["BatchNorm only"]


def test_frozen_filters_save_work_and_the_structure_is_on_the_clock():
    t = TASK.sized(chapter.SIZES)
    base, paper, *_ = (arm.run(t, t.load(), 0, 0.5) for arm in chapter.arms(t))
    assert base.images == paper.images == 32
    assert base.steps == paper.steps
    assert base.flops > 1.2 * paper.flops
    assert 0 < paper.kinds["structure"]["seconds"] <= paper.seconds


def test_a_network_with_batchnorm_of_its_own_gets_the_scope_that_works():
    resnet = task("smoke", "synthetic", "resnet", precision="fp32")
    assert chapter.scope(resnet) == "auto"
    assert chapter.control(resnet).name == "random, strength only"
    assert len(chapter.grid(resnet)) == 3 * 2
