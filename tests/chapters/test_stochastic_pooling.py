"""What chapter 5.1 trains: kinds of pooling on fewer and more images, at equal updates."""

import pytest

from effilib.chapters import stochastic_pooling as chapter
from effilib.errors import NoEffect
from effilib.experiment import check_arms
from effilib.methods.training_accuracy import training_accuracy
from effilib.tasks import task

TASK = task("smoke", "synthetic", "convnet", precision="fp32")


def test_the_judged_arms_are_without_batchnorm_and_s3pool_is_left_to_the_longer_presets():
    for preset, kinds in (("quick", 3), ("study", 4)):
        arms = chapter.arms(task(preset, "synthetic", "convnet"))
        check_arms(TASK, arms)
        assert len(arms) == kinds
        assert all(a.network == {"bn": False, "window": 3} for a in arms)
    assert all(a.network == {"bn": True, "window": 3} for a in chapter.grid(TASK))


@pytest.mark.parametrize("preset", chapter.SIZES)
def test_lengths_are_images_at_equal_updates_and_no_batch_is_cut_short(preset):
    t = task(preset, "synthetic", "convnet").sized(chapter.SIZES)
    assert t.axis == "images"
    assert t.recipe.augmentation == "none"
    assert all(length * t.images % t.recipe.batch_size == 0 for length in t.lengths)
    t = t.but(images=320)  # what the data set has
    runs = [t.at(length) for length in (0.25, 0.5, 1.0)]
    assert len({round(r.recipe.epochs * r.images) for r in runs}) == 1


def test_study_has_the_papers_range_of_images():
    t = task("study", "synthetic", "convnet").sized(chapter.SIZES)
    assert [round(length * t.images) for length in t.lengths] == [512, 1024, 2048, 5120, 10_240]


def test_an_arm_notes_its_accuracy_on_the_training_images():
    t = TASK.sized(chapter.SIZES)
    history = chapter.arms(t)[1].run(t, t.load(), 0, 0.5)
    assert history.images == 32
    assert 0 <= training_accuracy(history) <= 100


def test_a_users_own_network_comes_as_it_is():
    own = task("smoke", "synthetic", "resnet", precision="fp32", images=64, epochs=1)
    arms = chapter.arms(own)
    assert (arms[0].network, arms[0].changes) == ({}, {})
    with pytest.raises(NoEffect):  # it has no pooling layer
        arms[1].run(own, own.load(), 0)
