"""The plain network of chapters 5.1 and 5.2: who gets which learning rate, and how they were found."""

from effilib import tuning
from effilib.chapters import convnet_tuning as convnet
from effilib.chapters import stochastic_pooling, structure_and_strength
from effilib.experiment import Arm
from effilib.tasks import task

TASK = task("smoke", "synthetic", "convnet", precision="fp32")


def test_every_arm_was_tuned():
    names = {a.name for chapter in (stochastic_pooling, structure_and_strength) for a in chapter.tuned(TASK)}
    assert {row["arm"] for row in convnet._rows(TASK)} == names


def test_an_arm_has_the_rate_that_was_best_on_average_and_never_diverged(tmp_path, monkeypatch):
    monkeypatch.setattr(convnet, "recorded_tuning", lambda: tmp_path)
    ends = {0.05: (60, 70, 0), 0.1: (64, 80, 0), 0.2: (99, 99, 1)}  # at either length; diverged
    rows = [
        f'max,{n},"{{""lr"": {lr}}}",1000,{a},1,1,{bad}'
        for lr, (*of, bad) in ends.items()
        for n, a in enumerate(of)
    ]
    (tmp_path / "quick-mnist5k-convnet.csv").write_text("\n".join([",".join(tuning.FIELDS), *rows]) + "\n")
    assert convnet.arm(TASK, "max", "baseline").changes == {"lr": 0.1}
    assert convnet.arm(TASK, "max, BatchNorm", "baseline", bn=True).changes == {
        "lr": convnet.GUESSED[convnet.HIGH]
    }
    assert "swept with" in convnet.tuning_says(TASK)
    assert "not swept yet" in convnet.tuning_says(task("study", "synthetic", "convnet"))


def test_only_networks_that_know_batchnorm_are_asked_for_it_and_only_the_tuned_one_has_rates(monkeypatch):
    monkeypatch.setattr(convnet, "best_rate", lambda rows: 0.07)
    assert convnet.arm(TASK, "max", "baseline").network == {"bn": False}
    assert convnet.arm(TASK, "max", "baseline").changes == {"lr": 0.07}
    assert convnet.arm(task("smoke", "synthetic", "convnet", lr=0.3), "max", "baseline").changes == {}
    resnet = convnet.arm(task("smoke", "synthetic"), "max", "baseline")
    assert (resnet.network, resnet.changes) == ({}, {})


def test_a_sweep_goes_through_the_rates_and_runs_nothing_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "recorded_tuning", lambda: tmp_path)
    lines, arm = [], Arm(name="x", network={"bn": False})
    options = dict(seeds=(7,), workers=1, report=lines.append)
    found = convnet.sweep(TASK.but(lengths=(0.5,), epochs=1), [arm], **options)
    assert found["x"] in convnet.LOW
    assert len(lines) == len(convnet.LOW)
    assert convnet.sweep(TASK.but(lengths=(0.5,), epochs=1), [arm], **options) == found
    assert len(lines) == len(convnet.LOW)
