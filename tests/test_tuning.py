"""The sweep of a baseline: real processes, a CSV that goes on where it was interrupted, and what follows from
it.
"""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch

from effilib import tuning
from effilib.data import synthetic
from effilib.errors import BadInput
from effilib.tasks import task
from effilib.training import train


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Results go to a folder of the test's own, not among the committed ones."""
    monkeypatch.setattr(tuning, "recorded_tuning", lambda: tmp_path / "tuning")
    threads = torch.get_num_threads()
    yield tmp_path / "tuning"
    torch.set_num_threads(threads)


GRID = dict(lrs=(0.1,), decays=(5e-4, 2e-3), epochs=(0.5,), workers=1)


def test_a_sweep_runs_its_grid_goes_on_where_it_was_interrupted_and_then_runs_nothing(folder):
    said = []
    first = tuning.sweep("smoke", "synthetic", seeds=(1000,), report=said.append, **GRID)
    assert len(first) == len(said) == 2
    assert said[-1].startswith("2/2  0.5 epochs, lr 0.1, weight decay 0.0")
    file = folder / "smoke-synthetic.csv"
    lines = file.read_text().splitlines()
    assert lines[0] == ",".join(tuning.FIELDS)
    file.write_text("\n".join(lines[:2]) + "\n")  # the second run was never finished
    said.clear()
    again = tuning.sweep("smoke", "synthetic", seeds=(1000,), report=said.append, **GRID)
    assert len(said) == 1
    assert again == first
    said.clear()
    assert tuning.sweep("smoke", "synthetic", seeds=(1000,), report=said.append, **GRID) == first
    assert said == []


def test_a_row_is_what_training_that_setting_gives():
    row = tuning.run_one("smoke", "synthetic", "base", 1001, dict(epochs=0.5, lr=0.05, weight_decay=2e-3))
    t = task("smoke", "synthetic", epochs=0.5, lr=0.05, weight_decay=2e-3)
    dataset = t.load()
    last = train(t.build(dataset, 1001), dataset, t.recipe, seed=1001).rows[-1]
    assert set(row) == set(tuning.FIELDS)
    assert (row["epochs"], row["lr"], row["weight_decay"], row["seed"], row["diverged"]) == (
        0.5,
        0.05,
        2e-3,
        1001,
        0,
    )
    assert row["accuracy"] == pytest.approx(last["accuracy"], abs=1e-4)
    assert row["loss"] == pytest.approx(last["loss"], abs=1e-4)


def test_tuning_never_reads_the_test_split(monkeypatch):
    """An unreadable test split: its labels would stop any evaluation."""
    broken = synthetic()
    broken = replace(broken, test=replace(broken.test, y=broken.test.y[:1]))
    monkeypatch.setattr("effilib.data.synthetic", lambda: broken)
    t = task("smoke", "synthetic")
    model = t.build(broken)
    with pytest.raises((ValueError, RuntimeError)):
        train(model, broken, t.recipe)
    assert tuning.run_one("smoke", "synthetic", "base", 0, dict(epochs=0.5))["accuracy"] > 0
    tuning.find_target(
        "smoke", "synthetic", seeds=(1000,), report=lambda text: None, epochs=0.5, lr=0.1, weight_decay=5e-4
    )


def test_a_diverging_setting_is_a_row_like_others():
    row = tuning.run_one("smoke", "synthetic", "base", 0, dict(epochs=6, lr=1e30, weight_decay=5e-4))
    assert row["diverged"] == 1


def test_the_sweep_of_a_users_own_data_lies_in_the_folder_too(folder, tmp_path):
    images, labels = np.zeros((40, 8, 8, 1), np.uint8), np.arange(40) % 4
    np.savez(
        tmp_path / "my set.npz",
        train_images=images,
        train_labels=labels,
        test_images=images,
        test_labels=labels,
    )
    assert tuning.sweep_file("quick", str(tmp_path / "my set.npz"), "base") == folder / "quick-my_set.csv"
    assert tuning.sweep_file("quick", "mnist5k", "wide") == folder / "quick-mnist5k-wide.csv"


def test_what_cannot_be_tuned_is_bad_input_before_a_process_starts():
    with pytest.raises(BadInput, match="mnst5k"):
        tuning.run_one("quick", "mnst5k", "base", 0, {})
    with pytest.raises(BadInput, match="variant"):
        tuning.run_one("smoke", "synthetic", "bass", 0, {})


def rows(*values):
    return [dict(epochs=e, lr=lr, weight_decay=wd, accuracy=a) for e, lr, wd, a in values]


def test_the_best_setting_of_each_number_of_epochs_has_the_highest_mean():
    short, long = (
        [(2, 0.1, 0.1, 70), (2, 0.1, 0.2, 71)],
        [(4, 0.1, 0.0, 90), (4, 0.1, 0.0, 92), (4, 0.2, 0.0, 95), (4, 0.2, 0.0, 80)],
    )
    found = tuning.best(rows(*long, *short))
    assert found == [
        dict(epochs=2, lr=0.1, weight_decay=0.2, accuracy=71, low=71, n=1),
        dict(epochs=4, lr=0.1, weight_decay=0.0, accuracy=91, low=90, n=2),
    ]
    assert tuning.best([]) == []


def test_the_target_is_what_all_seeds_hold_rounded_down_and_is_written_down(folder):
    said = []
    target = tuning.find_target(
        "smoke",
        "synthetic",
        seeds=(1000, 1001),
        step=0.5,
        report=said.append,
        epochs=3,
        lr=0.1,
        weight_decay=5e-4,
    )
    with (folder / "smoke-synthetic.target.csv").open(newline="") as f:
        written = list(csv.DictReader(f))
    held = [float(r["held"]) for r in written]
    assert target <= min(held) < target + 0.5
    assert target % 0.5 == 0
    assert [r["seed"] for r in written] == ["1000", "1001"]
    assert {float(r["target"]) for r in written} == {target}
    assert len(said) == 2
