"""The plain network of part 5: equal updates, learning curves, the accuracy on the training images, and its
tuning.
"""

import math

import pytest

from effilib.chapters import plain_network as plain
from effilib.chapters import plain_tuning
from effilib.experiment import Arm, compare
from effilib.tasks import task
from effilib.training import evaluate, train

TASK = task("smoke", "synthetic", "convnet", precision="fp32")


def test_a_run_has_so_many_updates_whatever_the_number_of_images():
    for images, updates in ((16, 5), (64, 5), (128, 7)):
        cell = plain.at_size(TASK, images, updates, evaluations=1)
        history = plain.fit(cell, 0, network=plain.settings(cell, False))
        assert history.steps == updates
        assert cell.images == images
        assert len(history.rows) == 2


def test_only_networks_that_know_batchnorm_are_asked_for_it():
    assert plain.settings(TASK, False) == {"bn": False}
    assert plain.settings(task("smoke", "synthetic"), True) == {}
    assert plain.lr(task("quick", "synthetic")) == task("quick", "synthetic").recipe.lr
    assert plain.lr(TASK, "BatchNorm only") == plain.LR["quick"]["BatchNorm only"]


def test_the_accuracy_on_the_training_images_is_noted_in_eval_mode():
    dataset = TASK.load()
    model = TASK.build(dataset)
    history = train(model, dataset, TASK.recipe, [plain.TrainingAccuracy()])
    assert plain.training_accuracy(history) == pytest.approx(evaluate(model, dataset, "train")[1])
    assert math.isnan(plain.training_accuracy(train(TASK.build(dataset), dataset, TASK.recipe)))


def test_images_needed_are_interpolated_in_the_logarithm():
    assert plain.images_needed((100, 400), (80.0, 90.0), 85.0) == pytest.approx(200)
    assert plain.images_needed((100, 400), (80.0, 90.0), 79.0) == 100
    assert plain.images_needed((100, 400), (80.0, 90.0), 91.0) is None
    assert plain.images_needed((100, 200, 400), (80.0, 75.0, 90.0), 90.0) == pytest.approx(400)


def test_a_table_says_how_many_images_each_arm_needs(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFILIB_RESULTS", str(tmp_path))
    arms = [Arm(name="a", role="baseline"), Arm(name="b", changes={"lr": 0.01})]
    found = {
        n: compare(plain.at_size(TASK, n, 4), arms, seeds=2, quantity="time per step", illustration=True)
        for n in (32, 64)
    }
    curves = {"a": (80.0, 90.0), "b": (85.0, 95.0)}
    for i, c in enumerate(found.values()):
        for name, values in curves.items():
            for h in c.histories(name):
                h.rows[-1]["accuracy"] = values[i]
    table = plain.needed(found, ("a", "b"), (32, 64), 90.0)
    assert table.loc["a", "images"] == "64"
    assert table.loc["b", "images"] == "45"
    assert table.loc["b", "times fewer"] == "1.41x [1.41, 1.41]"
    assert plain.needed(found, ("a", "b"), (32, 64), 93.0).loc["a", "images"] == "more than there are"


def test_the_sweep_goes_through_every_rate_and_never_reads_the_test_split(tmp_path, monkeypatch):
    monkeypatch.setattr(plain_tuning, "recorded_tuning", lambda: tmp_path)
    arms = {"x": Arm(name="x", role="baseline", network={"bn": False})}
    options = dict(lrs=(0.01, 0.1), seeds=(7,), report=lambda row: None)
    rows = plain_tuning.sweep("smoke", "synthetic", 3, 64, arms, **options)
    assert [(r["lr"], r["seed"], r["images"], r["updates"]) for r in rows] == [
        (0.01, 7, 64, 3),
        (0.1, 7, 64, 3),
    ]
    file = tmp_path / "smoke-synthetic-convnet.csv"
    assert file.read_text().splitlines()[0].startswith("preset,dataset,arm,images,updates,lr,seed,accuracy")
    written = file.read_text().replace(f",{rows[0]['accuracy']},", ",12.5,", 1)
    file.write_text(written)
    again = plain_tuning.sweep("smoke", "synthetic", 3, 64, arms, **options)
    assert again[0]["accuracy"] == 12.5  # what is there is not run again
    assert len(again) == 2
    ranked = [dict(arm="x", lr=lr, accuracy=a) for lr, a in ((0.1, 50), (0.1, 60), (0.2, 70), (0.2, 45))]
    assert plain_tuning.best(ranked) == {"x": 0.2}
    assert set(plain_tuning.tuned_arms()) == set(plain.LR["quick"]) == set(plain.LR["study"])
