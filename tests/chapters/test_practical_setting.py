"""What chapter II.8 shows of data, network, baseline and noise."""

import re
import statistics as stats
from dataclasses import replace

import pytest
import torch

from effilib import data, surgery, tuning
from effilib.chapters import practical_setting as chapter
from effilib.experiment import PILOT_SEEDS, compare
from effilib.surgery import stages
from effilib.tasks import task

TASK = task("smoke", "synthetic")
DATA = TASK.load()


pytestmark = pytest.mark.usefixtures("results")


def test_the_splits_are_counted_and_each_has_its_reader():
    table = chapter.splits(DATA)
    assert table["images"].tolist() == [
        len(DATA.train),
        len(DATA.decide),
        len(DATA.validation),
        len(DATA.test),
    ]
    low, _, high = table.loc["train", "of a class"].partition(" to ")
    counts = DATA.train.y.bincount()
    assert (int(low), int(high or low)) == (int(counts.min()), int(counts.max()))
    assert table["read by"].is_unique


def test_the_picture_shows_the_images_of_each_class_and_one_as_it_is_trained():
    small = data.synthetic(images=200, size=10, channels=3, classes=3)
    figure, caption = chapter.samples_figure(small)
    left, right = figure.axes
    assert [t.get_text() for t in left.get_yticklabels()] == [str(n) for n in small.names]
    shown = left.images[0].get_array()
    assert shown.shape == (30, 10 * chapter.COLUMNS, 3)
    first = small.train.x[small.train.y == 1][0]
    assert (shown[10:20, :10] == first.numpy()).all()
    assert right.images[0].get_array().shape == (30, 10 * chapter.DRAWS, 3)
    assert "3 of 3 classes" in caption


def test_an_image_that_is_not_augmented_is_shown_as_it_is():
    moved = data.synthetic(images=200, size=10, channels=3)
    one = moved.train.x[moved.train.y == moved.classes // 2][0]
    draws = chapter._as_trained(moved, 4)
    assert draws.shape == (4, chapter.DRAWS, 10, 10, 3)
    assert not (draws == one).all()
    assert (chapter._as_trained(replace(moved, pad=0), 4) == one).all()


def test_the_network_table_adds_up_to_the_network():
    table = chapter.network_table(TASK, DATA)
    model = TASK.build(DATA)
    layout = stages.find(model, DATA.shape)
    assert table.index.tolist() == stages.names(layout)
    convs = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert table["weights"].sum() == sum(m.weight.numel() for m in convs)
    assert table["layers"].sum() == len(convs)
    for column in ("FLOPs", "time"):
        assert table[column].str.rstrip("%").astype(int).sum() == pytest.approx(100, abs=2)
    widths = [n.width for n in stages.members(surgery.trace(model), layout, 0)]
    assert table.loc["stage 1", "channels of its nodes"] == " + ".join(map(str, widths))


def test_the_step_table_counts_the_whole_training():
    table = chapter.step_table(TASK, DATA)[""]
    history = chapter.again(TASK)[0].run(TASK, DATA, 0)
    assert table["FLOPs of the training"].startswith(f"{history.flops / 1e12:.3f} T")
    assert table["steps"].startswith(f"{history.steps} (")


@pytest.mark.parametrize(
    ("preset", "dataset"), [("quick", "mnist5k"), ("study", "cifar10"), ("study", "fashion_mnist")]
)
def test_the_sweep_is_a_heat_map_with_the_chosen_setting_framed(preset, dataset):
    t = task(preset, dataset)
    figure, caption = chapter.sweep_figure(t)
    panels = [ax for ax in figure.axes if ax.get_xlabel() == "learning rate"]
    assert [ax.get_title("left") for ax in panels if ax.patches] == [f"{t.recipe.epochs:g} epochs"]
    assert "is framed" in caption
    rows = tuning.read(tuning.sweep_file(preset, dataset, "base"))
    settings = {(r["epochs"], r["lr"], r["weight_decay"]) for r in rows}
    assert sum(len(ax.texts) for ax in panels) == len(settings)
    chosen = [
        r["accuracy"]
        for r in rows
        if (r["epochs"], r["lr"], r["weight_decay"]) == (t.recipe.epochs, t.recipe.lr, t.recipe.weight_decay)
    ]
    assert f"{stats.mean(chosen):.1f}\n{min(chosen):.1f}–{max(chosen):.1f}" in [
        text.get_text() for ax in panels for text in ax.texts
    ]


def test_a_task_without_a_sweep_shows_another_ones_and_says_so():
    figure, caption = chapter.sweep_figure(TASK)
    assert "mnist5k" in caption
    assert "none of its own" in caption
    assert not any(ax.patches for ax in figure.axes if ax.get_xlabel() == "learning rate")


def test_a_tuned_target_comes_from_its_recorded_runs():
    t, runs = chapter.targeted(task("quick", "mnist5k"))
    assert t.target == 96.0
    assert [int(r["seed"]) for r in runs] == [1000, 1001, 1002, 1003, 1004]
    assert all(r["held"] >= t.target for r in runs)
    figure, caption = chapter.target_figure(t, runs)
    assert "5 hold the target, 96 %" in caption
    assert len(figure.axes[0].get_yticklabels()) == 5
    assert "4 hold the target" in chapter.target_figure(t, [{**runs[0], "held": 95.9}, *runs[1:]])[1]


def test_another_target_comes_from_a_pilot():
    t, runs = chapter.targeted(TASK)
    assert [r["seed"] for r in runs] == list(PILOT_SEEDS)
    assert t.target == pytest.approx(min(r["held"] for r in runs) - 2 * t.margin, abs=0.06)


def test_the_baseline_against_itself_differs_by_nothing_but_time():
    found = compare(
        chapter.sized(TASK), chapter.again(TASK), seeds=2, quantity="training time", illustration=True
    )
    table = chapter.noise(found)[""]
    assert table["the same seed twice, accuracy"] == "0.00 points apart at most"
    ratio, low, high = (
        float(v) for v in re.findall(r"[0-9.]+(?=x|,|\])", table["the same seed twice, time"])
    )
    assert low <= ratio <= high
    assert float(table["milliseconds of a step"]) > 0
    assert "2 pairs" in chapter.say_noise(found)
    one = replace(found, blocks=found.blocks[:1])
    assert not [row for row in chapter.noise(one).index if "can tell apart" in row]
    assert "1 pair:" in chapter.say_noise(one)
