"""What chapter 6.3 trains."""

import pytest
import torch

from effilib.chapters import kernel_rescaling as chapter
from effilib.chapters.kernel_rescaling import BARE, BOTH, FULL, IMAGES
from effilib.experiment import measure
from effilib.methods.kernel_rescaling import kernels
from effilib.tasks import task

pytestmark = pytest.mark.usefixtures("results")

TASK = task("smoke", "synthetic")
DATA = TASK.load()


def test_the_judged_arms_train_one_network_with_5x5_kernels_where_pixels_are_many():
    t = chapter.with_large_kernels(TASK)
    assert kernels(t.build(DATA)) == {"stem": 5, "stages.0.0.conv1": 5, "stages.0.0.conv2": 5}
    cell = measure(t.but(lengths=(1.0,)), chapter.arms(t))[0]["arms"]
    flops = {name: h.flops for name, h in cell.items()}
    assert flops[FULL] > flops[IMAGES] > flops[BOTH] == flops[BARE]


def test_a_network_without_large_kernels_has_its_images_resized():
    vgg = chapter.with_large_kernels(task("smoke", "synthetic", "vgg"))
    assert [(a.name, a.role) for a in chapter.arms(vgg)] == [(FULL, "baseline"), (IMAGES, "method")]


def test_patches_that_stay_save_what_patches_that_shrink_do_not():
    t = chapter.with_patches(TASK.but(lengths=(1.0,)))
    flops = [h.flops for h in measure(t, chapter.patch_arms(t))[0]["arms"].values()]
    assert flops[1] < flops[2] < flops[0] * 1.01


def test_small_images_are_the_large_ones_resized():
    small = chapter.shrunk(DATA, (4, 6))
    assert (small.shape, small.train.x.dtype) == ((1, 4, 6), torch.uint8)
    mean = DATA.train.x.float().mean((1, 2))
    assert (small.train.x.float().mean((1, 2)) - mean).abs().max() < 8
