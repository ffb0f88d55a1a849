"""Chapter 7.1: its arms, its grid, and what they fit."""

from dataclasses import replace

import pytest

from effilib.chapters import tree_cnn as chapter
from effilib.methods.class_arrival import stages
from effilib.tasks import task

TASK = task("smoke", "synthetic").sized(chapter.SIZES)
DATA = TASK.load()


def test_a_child_holds_half_of_the_classes_and_at_most_ten():
    assert [chapter.cap(n) for n in (3, 4, 10, 100)] == [2, 2, 5, 10]


def test_depths_are_the_last_layer_and_quarters():
    assert chapter.depths(TASK, DATA) == [1, 2, 5, 8]


def test_arms_have_the_same_given_stage_at_every_length():
    arms = chapter.arms(TASK, DATA)
    names = [chapter.FLAT, chapter.FEWER, chapter.TREE, chapter.TRUNK, "flat, last 2 layers"]
    assert [a.name for a in arms] == names
    assert [a.role for a in arms] == ["baseline", "control", "method", "method", "control"]
    assert {a.fit.given for a in arms} == {TASK.recipe}
    runs = [a.run(TASK, DATA, 0, length) for a in arms for length in (0.5, 1.0)]
    assert all(h.held_out == len(DATA.validation) + len(DATA.test) for h in runs)
    assert runs[0].events[0] == runs[-1].events[0]  # the flat networks' first stage
    whole, trunk = runs[1], runs[7]
    assert trunk.flops < whole.flops  # of the second stage


def test_the_control_is_the_flat_network_for_fewer_epochs():
    flat, fewer = chapter.arms(TASK, DATA)[:2]
    assert fewer.lengths == pytest.approx([0.15, 0.3])
    assert fewer.fit == flat.fit


def test_the_grid_has_the_other_depths_and_caps():
    assert [a.name for a in chapter.grid(TASK, DATA)] == [chapter.FLAT, chapter.SCRATCH, "Tree-CNN, C = 2"]
    study = TASK.but(preset="study", lengths=(0.5,))
    names = [a.name for a in chapter.grid(study, DATA)]
    assert names[2:] == [
        "flat, last 1 layer",
        "flat, last 5 layers",
        "flat, last 8 layers",
        "Tree-CNN, C = 3",
        "Tree-CNN, C = 4",
    ]
    assert all(a.lengths == (0.5,) for a in chapter.grid(study, DATA)[1:])


def test_the_groups_by_hand_are_of_the_first_stages_classes():
    cifar = replace(DATA, name="cifar10", names=tuple(map(str, range(10))))
    many = replace(
        cifar, train=replace(cifar.train, y=cifar.train.y.new_tensor(range(len(cifar.train))) % 10)
    )
    groups = chapter.BY_HAND["cifar10"]
    assert sorted(c for g in groups for c in g) == sorted(stages(many)[0])
    study = TASK.but(preset="study")
    assert chapter.grid(study, cifar)[-1].fit.groups == groups
