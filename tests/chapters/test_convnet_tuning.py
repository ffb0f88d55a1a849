"""The plain network of chapters 5.1 and 5.2: who gets which learning rate, and how they were found."""

from effilib import tuning
from effilib.chapters import convnet_tuning as convnet
from effilib.chapters import stochastic_pooling, structure_and_strength
from effilib.experiment import Arm
from effilib.tasks import task

TASK = task("smoke", "synthetic", "convnet", precision="fp32")


def test_every_arm_was_tuned():
    names = [a.name for chapter in (stochastic_pooling, structure_and_strength) for a in chapter.tuned(TASK)]
    for preset, rates in convnet.LR.items():
        assert set(rates) == set(names), preset


def test_only_networks_that_know_batchnorm_are_asked_for_it_and_only_the_tuned_one_has_rates(monkeypatch):
    monkeypatch.setattr(convnet, "LR", {"quick": {"max": 0.07}})
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
