"""Sweeps: real processes, a CSV that goes on where it was interrupted, and what follows from it."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from effilib import tuning
from effilib.errors import BadInput
from effilib.experiment import Arm
from effilib.hooks import Method
from effilib.tasks import task
from effilib.training import train
from effilib.workbook import series


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Results go to a folder of the test's own, not among the committed ones."""
    monkeypatch.setattr(tuning, "recorded_tuning", lambda: tmp_path / "tuning")
    threads = torch.get_num_threads()
    yield tmp_path / "tuning"
    torch.set_num_threads(threads)


SMALL = task("smoke", "synthetic", epochs=0.5, lengths=(0.5, 1.0))
GRID = [{"lr": 0.1, "weight_decay": 5e-4}, {"lr": 0.1, "weight_decay": 2e-3}]


def test_a_sweep_runs_its_grid_goes_on_where_it_was_interrupted_and_then_runs_nothing(folder):
    said = []
    go = dict(seeds=(1000,), workers=1, report=said.append)
    first = tuning.sweep(SMALL, tuning.BASELINE, GRID, **go)
    assert len(first) == len(said) == 4
    assert said[-1].startswith("4/4  baseline, 0.25 epochs")
    file = folder / "smoke-synthetic.csv"
    lines = file.read_text().splitlines()
    assert lines[0] == ",".join(tuning.FIELDS)
    file.write_text("\n".join(lines[:3]) + "\n")  # two runs were never finished
    said.clear()
    assert tuning.sweep(SMALL, tuning.BASELINE, GRID, **go) == first
    assert len(said) == 2
    said.clear()
    assert tuning.sweep(SMALL, tuning.BASELINE, GRID, **go) == first
    assert said == []


def test_a_row_is_what_training_that_setting_gives_on_validation_images():
    row = tuning._run_one(SMALL, tuning.BASELINE, 0.5, {"lr": 0.05, "weight_decay": 2e-3}, 1001)
    t = SMALL.but(lr=0.05, weight_decay=2e-3, epochs=0.25)
    dataset = t.load()
    last = train(t.build(dataset, 1001), dataset, t.recipe, seed=1001).rows[-1]
    assert set(row) == set(tuning.FIELDS)
    assert (row["epochs"], row["seed"], row["diverged"]) == (0.25, 1001, 0)
    assert row["accuracy"] == pytest.approx(last["accuracy"], abs=1e-4)
    hidden = replace(dataset, test=dataset.validation[:1])
    assert train(t.build(hidden, 1001), hidden, t.recipe, seed=1001).rows[-1]["accuracy"] == last["accuracy"]


@dataclass(frozen=True, kw_only=True)
class Slower(Method):
    """Scales the learning rate by a setting of its own."""

    by: float = 1.0

    def on_fit_start(self, run):
        run.schedule.scale = self.by


def test_the_settings_of_an_arms_method_are_swept_too():
    arm = Arm(name="slower", methods=(Slower(),))
    rows = [tuning._run_one(SMALL, arm, 1.0, {"lr": 0.2, "by": by}, 1000) for by in (1e-9, 1.0)]
    assert rows[0]["train_loss"] > rows[1]["train_loss"]
    assert rows[0]["setting"] == '{"by": 1e-09, "lr": 0.2}'


def test_the_shorter_lengths_try_what_is_next_to_the_longest_ones_best():
    lrs, decays = (0.01, 0.1, 0.2, 0.4), (5e-4, 1e-3, 2e-3)
    said = []
    go = dict(lrs=lrs, decays=decays, seeds=(1000,), workers=2, report=said.append)
    rows = tuning.tune(SMALL, **go)
    top = tuning.best([r for r in rows if r["epochs"] == 0.5])[0]["setting"]
    tried = [r["setting"] for r in rows if r["epochs"] == 0.25]
    i, j = lrs.index(top["lr"]), decays.index(top["weight_decay"])
    assert len([r for r in rows if r["epochs"] == 0.5]) == 12
    near = [(a, b) for a in range(4) for b in range(3) if max(abs(a - i), abs(b - j)) <= 1]
    found = {(lrs.index(s["lr"]), decays.index(s["weight_decay"])) for s in tried}
    assert found >= set(near)
    assert len(tried) == max(6, len(near))


def test_arms_are_tuned_alike_and_read_what_came_out(folder):
    arms = [Arm(name="exact", role="baseline"), Arm(name="slower", methods=(Slower(by=0.5),))]
    go = dict(name="mine", lrs=(0.1, 0.2), decays=(5e-4,), seeds=(1000,), workers=1, report=lambda line: None)
    rows = tuning.tune(SMALL, arms, **go)
    assert sorted((r["arm"], r["epochs"]) for r in rows) == [
        (a, e) for a in ("exact", "slower") for e in (0.25, 0.25, 0.5, 0.5)
    ]
    file = folder / "smoke-synthetic-mine.csv"
    head, *lines = file.read_text().splitlines()
    worse = [line for line in lines if '"lr"": 0.1' in line and line.startswith("exact")]
    file.write_text("\n".join([head, *(w.replace(",0", ",1") if w in worse else w for w in lines)]) + "\n")
    exact, slower = tuning.settled(SMALL, arms, "mine")
    assert exact.task(SMALL).recipe.lr == 0.2
    assert slower.tuned == tuning.tuned([r for r in tuning.read(file) if r["arm"] == "slower"])
    given = replace(SMALL, given=(*SMALL.given, "lr")).but(lr=0.7)
    assert exact.task(given).recipe.lr == 0.7  # what the user gave is not tuned away
    other = replace(SMALL, given=(*SMALL.given, "network"))
    assert tuning.settled(other, arms, "mine") == arms


@pytest.mark.parametrize("name", series.tunable())
def test_every_chapters_sweep_finds_its_arms_again(name, folder):
    sweep = series.tunable()[name]
    mine = sweep.task(task("smoke", "synthetic"))
    arms = sweep.arms(mine)
    file = tuning.sweep_file(mine, name)
    file.parent.mkdir(exist_ok=True)
    epochs = mine.at(max(mine.lengths)).recipe.epochs
    rows = [f'"{a.name}",{epochs},"{{""lr"": 0.07}}",1000,50,1,1,0' for a in arms]
    file.write_text("\n".join([",".join(tuning.FIELDS), *rows]) + "\n")
    assert [a.tuned for a in sweep.arms(mine)] == [{epochs: {"lr": 0.07}}] * len(arms)
    assert {a.task(mine).recipe.lr for a in sweep.arms(mine)} == {0.07}


def test_the_sweep_of_a_users_own_data_lies_in_the_folder_too(folder, tmp_path):
    images, labels = np.zeros((40, 8, 8, 1), np.uint8), np.arange(40) % 4
    arrays = dict(train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    np.savez(tmp_path / "my set.npz", **arrays)
    mine = task("quick", str(tmp_path / "my set.npz"))
    assert tuning.sweep_file(mine).parent == folder
    assert tuning.sweep_file(mine).name.startswith("quick-my_set")
    assert tuning.sweep_file(task("quick", "mnist5k", variant="wide")) == folder / "quick-mnist5k-wide.csv"
    assert tuning.sweep_file(task("quick", "mnist5k", size=14)) == folder / "quick-mnist5k-size=14.csv"
    assert tuning.sweep_file(task("quick", "mnist5k"), "prune_train").name == "quick-mnist5k-prune_train.csv"


def test_what_is_best_is_what_a_task_takes_at_its_lengths():
    rows = [
        dict(epochs=e, setting={"lr": lr, "weight_decay": 1e-3}, accuracy=a)
        for e, lr, a in ((2.0, 0.1, 90), (2.0, 0.4, 92), (4.0, 0.1, 95), (4.0, 0.4, 94))
    ]
    t = task("quick", "mnist5k", epochs=4).but(tuned=tuning.tuned(rows), given=())
    assert [t.at(length).recipe.lr for length in (0.5, 0.6, 1.0)] == [0.4, 0.4, 0.1]
    assert t.but(lr=0.3).at(1.0).recipe.lr == 0.3


def test_a_setting_that_diverges_is_never_the_best():
    ends = ((0.8, math.nan, 0), (0.4, 95, 0), (0.4, 97, 1), (0.1, 94, 0))
    rows = [dict(epochs=2.0, setting={"lr": lr}, accuracy=a, diverged=d) for lr, a, d in ends]
    assert tuning.tuned(rows) == {2.0: {"lr": 0.1}}
    assert tuning.best(rows[:3]) == []


def test_a_wrong_setting_is_refused_before_anything_is_written(folder):
    with pytest.raises(BadInput, match="lr is 0"):
        tuning.sweep(SMALL, tuning.BASELINE, [{"lr": 0.1}, {"lr": 0}], seeds=(1000,), workers=1)
    assert not folder.exists()


def test_several_arms_share_the_processes_and_each_has_its_own_lengths():
    small = Arm(name="small", network={"widths": (2, 2, 2)}, changes={"epochs": 0.3}, lengths=(1.0,))
    said = []
    go = dict(seeds=(1000,), workers=1, report=said.append)
    rows = tuning.sweep(SMALL, [tuning.BASELINE, small], GRID[:1], **go)
    assert [(r["arm"], r["epochs"]) for r in rows] == [("baseline", 0.25), ("baseline", 0.5), ("small", 0.3)]
    assert [r for r in rows if r["arm"] == "baseline"] == tuning.sweep(SMALL, tuning.BASELINE, GRID[:1], **go)
    assert len(said) == 3
