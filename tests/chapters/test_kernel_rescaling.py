"""What chapter 6.3 shows beyond its method: arms, the switch, schedules, patches and tables."""

import pytest
import torch

from effilib import models
from effilib.chapters import kernel_rescaling as chapter
from effilib.chapters.kernel_rescaling import BARE, BOTH, FULL, IMAGES
from effilib.experiment import compare, pilot
from effilib.methods.kernel_rescaling import kernels
from effilib.tasks import task

TASK = task("smoke", "synthetic")
DATA = TASK.load()


pytestmark = pytest.mark.usefixtures("results")


def test_the_kernel_arms_train_one_network_with_5x5_kernels_where_pixels_are_many():
    t = chapter.task(TASK)
    assert kernels(t.build(DATA)) == {"stem": 5, "stages.0.0.conv1": 5, "stages.0.0.conv2": 5}
    assert t.target is None  # nobody tuned it
    arms = chapter.arms(t, DATA)
    assert [(a.name, a.role) for a in arms] == [
        (FULL, "baseline"),
        (IMAGES, "control"),
        (BOTH, "method"),
        (BARE, "control"),
    ]
    assert not arms[1].methods[0].kernels
    assert arms[2].methods[0].amplitude
    assert not arms[3].methods[0].amplitude
    assert len({a.methods[0].schedule for a in arms[1:]}) == 1
    quick = chapter.task(task("quick", "mnist5k"))
    assert len(chapter.arms(quick, quick.load())) == 3
    assert quick.recipe.epochs == chapter.SETTINGS["quick"]["epochs"]
    study = chapter.task(task("study", "synthetic"))
    assert {a.changes["epochs"] / study.recipe.epochs for a in chapter.arms(study, DATA)[1:]} == {
        chapter.SETTINGS["study"]["longer"]
    }


def test_the_pilots_target_lies_a_margin_further_down_and_a_tuned_one_stays():
    t = chapter.task(TASK)
    assert chapter.piloted(t).target == pytest.approx(pilot(t).target - t.margin, abs=0.06)
    assert chapter.piloted(t.but(target=30.0)).target == 30.0


def test_the_tuned_network_may_have_a_schedule_of_its_own():
    full, images = chapter.tuned_arms(task("study", "synthetic"), DATA)
    assert not images.changes  # as long as the baseline
    assert (
        images.methods[0].schedule
        != chapter.arms(chapter.task(task("study", "synthetic")), DATA)[1].methods[0].schedule
    )
    assert not full.methods


def test_a_network_without_large_kernels_has_its_images_resized():
    vgg = chapter.task(task("smoke", "synthetic", "vgg"))
    assert [(a.name, a.role) for a in chapter.arms(vgg, DATA)] == [(FULL, "baseline"), (IMAGES, "method")]
    found = compare(vgg.but(target=20.0), chapter.arms(vgg, DATA), seeds=1)
    assert chapter.headline(found) == IMAGES


def test_every_arm_runs_and_its_phases_are_told_apart():
    t = chapter.task(TASK).but(target=20.0)
    found = compare(t, chapter.arms(t, DATA), seeds=1)
    assert chapter.headline(found) == BOTH
    flops = {a.name: found.histories(a.name)[0].flops for a in found.arms}
    assert flops[FULL] > flops[IMAGES] > flops[BOTH] == flops[BARE]
    table = chapter.phases(found)
    assert list(table.loc[BOTH].index) == [
        "step at 4 x 4",
        "step at 6 x 6",
        "step at full size",
        "switch, with new statistics",
    ]
    assert list(table.loc[FULL].index) == ["step at full size"]
    assert (table["ms each"] > 0).all()
    assert chapter.relative(found).count(";") == 2


def test_the_grid_has_several_schedules_and_is_drawn():
    arms = chapter.grid(TASK, DATA)
    assert [a.name for a in arms] == [FULL, "4, 8 px (70, 30 %)", "4, 6, 8 px (40, 30, 30 %)"]
    assert len(chapter.grid(task("study", "synthetic"), DATA)) == 1 + len(chapter.SCHEDULES)
    found = compare(TASK, arms, seeds=1, quantity="training time", illustration=True)
    figure, caption = chapter.grid_figure(found)
    assert len(figure.axes[0].lines) == 4
    assert "illustration" in caption
    assert chapter.subset(TASK.but(preset="quick")).images == TASK.images // 3


def test_patch_arms_run():
    t = chapter.patch_task(TASK)
    arms = chapter.patch_arms()
    assert t.build(DATA).stem.stride == (4, 4)
    found = compare(t, arms, seeds=1, quantity="training time", illustration=True)
    assert found.histories(arms[2].name)[0].structure["patch"] == 4  # in the end
    flops = [found.histories(a.name)[0].flops for a in arms]
    assert flops[1] < flops[2] < flops[0] * 1.01


def test_the_toy_case_is_the_one_in_the_text():
    table = chapter.toy()
    assert list(table["response"]) == ["9", "25", "9"]
    assert list(table["every weight"]) == ["1.00", "1.00", "0.36"]
    rows = chapter.toy_matrix().astype(float)
    assert rows.sum(axis=1).tolist() == pytest.approx([1.0] * 5)


def test_the_law_and_the_checks():
    table = chapter.law_table(pairs=((5, 7), (7, 11), (3, 2)))
    assert (table["with the factor"].iloc[:2] < 0.05).all()
    assert (table["without"].iloc[:2] > 0.8).all()
    assert table["with the factor"].iloc[2] > 0.1
    found = chapter.check()["largest difference"].astype(float)
    assert (found.iloc[:-1] < 1e-5).all()
    assert found.iloc[-1] > 0.1  # the factor is not what patches need


def test_at_the_switch_the_factor_matters_without_batchnorm_only():
    t = TASK.but(epochs=12)
    table = chapter.switch_table(t, DATA, epochs=12)
    small = table.loc["small kernels, small images"]
    assert (small > 60).all()
    assert (
        table.loc["rescaled, factor", "without BatchNorm"]
        >= table.loc["rescaled, no factor", "without BatchNorm"]
    )
    new = table.loc[
        ["rescaled, no factor, new statistics", "rescaled, factor, new statistics"], "with BatchNorm"
    ]
    assert abs(new.iloc[0] - new.iloc[1]) < 3  # BatchNorm undoes a factor once its statistics are new


def test_a_patch_embedding_keeps_its_accuracy_by_pi_resize():
    table = chapter.patch_table(TASK, DATA, epochs=12)["validation accuracy (%)"]
    assert table["PI-resized to 4 px"] >= table["resized to 4 px"]
    assert len(table) == 5


def test_small_images_are_the_large_ones_resized():
    small = chapter.shrunk(DATA, (4, 6))
    assert small.shape == (1, 4, 6)
    assert small.train.x.dtype == torch.uint8
    mean = DATA.train.x.float().mean((1, 2))
    assert (small.train.x.float().mean((1, 2)) - mean).abs().max() < 8


def test_pictures_and_the_cost_table():
    figure, _ = chapter.kernels_figure(TASK, DATA, shown=3)
    assert len(figure.axes) == 10  # and a colour bar
    t = chapter.task(TASK)
    table = chapter.cost_table(t, DATA)
    assert table[IMAGES].iloc[2] == table[BOTH].iloc[2] == 1
    assert 0.08 < table[BOTH].iloc[0] < 0.15 < 0.2 < table[IMAGES].iloc[0] < 0.3
    assert table.loc["whole schedule", BOTH] == pytest.approx(
        (table[BOTH] * table["share of the steps"]).iloc[:3].sum()
    )
    assert table["kernels"].iloc[0] == "5 to 3"


def test_the_patch_network_is_described():
    t = chapter.patch_task(TASK)
    assert models.describe(t.build(DATA))["patch"] == chapter.PATCH
