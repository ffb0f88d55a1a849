"""What chapter 5.2 trains: every structure with both trainings, and the control."""

from effilib.chapters import structure_and_strength as chapter
from effilib.experiment import check_arms
from effilib.tasks import task

TASK = task("smoke", "synthetic", "convnet", precision="fp32")


def test_the_grid_has_every_structure_with_both_trainings_and_the_control():
    grid, arms = chapter.grid(TASK), chapter.arms(TASK)
    check_arms(TASK, grid)
    check_arms(TASK, arms)
    assert len(grid) == 3 * 2 + 2
    assert [a.name for a in arms] == [chapter.BASE, chapter.START, chapter.WHITENED, chapter.STRENGTH]
    assert [a.name for a in grid if a.network["bn"]] == ["BatchNorm only"]


def test_frozen_filters_save_work_and_the_structure_is_on_the_clock():
    t = TASK.sized(chapter.SIZES)
    base, _, _, strength = (arm.run(t, t.load(), 0, 0.5) for arm in chapter.arms(t))
    assert base.images == strength.images == 32
    assert base.steps == strength.steps
    assert base.flops > 1.2 * strength.flops
    assert 0 < strength.kinds["structure"]["seconds"] <= strength.seconds


def test_the_stems_are_those_of_the_tasks_own_network():
    t = chapter.with_stem(TASK)
    assert (t.network, t.preset, t.dataset) == ("resnet", "smoke", "synthetic")
    names = [a.name for a in chapter.stems(t)]
    assert names == ["as built", chapter.WHITE, chapter.AS_WIDE]
    check_arms(t, chapter.stems(t))
    white = chapter.stems(t)[1].run(t, t.load(), 0, 0.5)
    assert white.structure["stem"] == chapter.CHANNELS
    vgg = chapter.with_stem(task("smoke", "synthetic", "vgg"))
    assert [a.name for a in chapter.stems(vgg)] == ["as built", chapter.WHITE, chapter.FROZEN]


def test_a_network_with_batchnorm_of_its_own_gets_the_scope_that_works():
    resnet = task("smoke", "synthetic", "resnet", precision="fp32")
    assert chapter.scope(resnet) == "auto"
    assert chapter.control(resnet).name == "random, strength only"
    assert len(chapter.grid(resnet)) == 3 * 2 + 1
