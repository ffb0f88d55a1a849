"""What chapter 6.3 trains."""

import pytest

from effilib.chapters import kernel_rescaling as chapter
from effilib.chapters.kernel_rescaling import BARE, BOTH, FULL, IMAGES, WEAK
from effilib.experiment import measure
from effilib.methods.rescaled_kernels import kernels
from effilib.tasks import task

pytestmark = pytest.mark.usefixtures("results")

TASK = task("smoke", "synthetic")
DATA = TASK.load()


def test_the_judged_arms_save_alike_and_differ_in_regularisation():
    t = TASK.but(lengths=(1.0,))
    cell = measure(t, chapter.arms(t))[0]["arms"]
    assert cell[FULL].flops > cell[IMAGES].flops == cell[WEAK].flops
    assert cell[IMAGES].rows[-1]["loss"] != cell[WEAK].rows[-1]["loss"]


def test_a_study_judges_cut_outs_too():
    *_, arm = chapter.arms(TASK.but(preset="study"))
    assert (arm.name, arm.methods[0].cut, arm.methods[0].crops) == (chapter.PARTS, 0.875, False)


def test_with_5x5_kernels_where_pixels_are_many_the_kernels_share_is_shown_apart():
    t = chapter.with_large_kernels(TASK).but(lengths=(1.0,))
    assert kernels(t.build(DATA)) == {"stem": 5, "stages.0.0.conv1": 5, "stages.0.0.conv2": 5}
    flops = {name: h.flops for name, h in measure(t, chapter.kernel_arms(t))[0]["arms"].items()}
    assert flops[FULL] > flops[IMAGES] > flops[BOTH] == flops[BARE]


def test_a_network_without_large_kernels_has_only_images_to_resize():
    vgg = chapter.with_large_kernels(task("smoke", "synthetic", "vgg"))
    assert chapter.kernel_arms(vgg) == []
    assert [a.name for a in chapter.arms(vgg)] == [FULL, IMAGES, WEAK]


def test_every_option_of_the_grid_changes_one_thing():
    plain = chapter.method(TASK, DATA, kernels=False)
    found = {a.name: a.methods[0] for a in chapter.grid(TASK)[1:]}
    for name, how in chapter.OPTIONS.items():
        changed = {k for k, v in vars(found[name]).items() if v != getattr(plain, k)}
        assert changed == set(how)
        assert len(changed) == 1


def test_patches_that_stay_save_what_patches_that_shrink_do_not():
    t = chapter.with_patches(TASK.but(lengths=(1.0,)))
    flops = [h.flops for h in measure(t, chapter.patch_arms(t))[0]["arms"].values()]
    assert flops[1] < flops[2] < flops[0] * 1.01
