"""Chapter 6.1: its task, its settings, and the control that is the network which pruning ends with."""

import pytest

from effilib import surgery
from effilib.chapters import prune_train as chapter
from effilib.experiment import Arm
from effilib.tasks import task

TASK = chapter.wide(task("smoke", "synthetic"))
pytestmark = pytest.mark.usefixtures("results")


def test_the_task_is_the_wide_one_and_keeps_what_the_user_asked_for():
    found = chapter.wide(task("quick", "synthetic", seeds=2))
    assert found.widths == {"widths": (32, 64, 128), "blocks": (1, 1, 1)}
    assert (found.seeds, found.recipe.epochs) == (2, chapter.SIZES["quick"]["epochs"])
    assert chapter.wide(task("quick", "synthetic", "vgg")).network == "vgg"


def test_every_presets_settings_make_a_method():
    for preset, settings in chapter.SETTINGS.items():
        assert chapter.method(preset).ratio == settings["ratio"]
        assert chapter.method(preset, 0.3).ratio == 0.3


def test_the_control_is_the_network_that_the_pilot_ended_with():
    pilot = chapter.pilot(TASK)
    assert pilot.structure == chapter.pilot(TASK).structure
    *others, control = chapter.arms(TASK, pilot)
    assert [a.role for a in (*others, control)] == ["baseline", "method", "method", "control"]
    small = TASK.build(TASK.load(), 0, **control.network)
    final = pilot.events[-1]["widths"][-1]
    assert {n.name: n.width for n in surgery.trace(small).nodes} == {n: w for n, (w, _) in final.items()}
    assert sum(w for w, _ in final.values()) < sum(n.width for n in surgery.nodes(TASK.build(TASK.load())))


def test_a_study_cuts_too_when_small_images_become_large(monkeypatch):
    monkeypatch.setitem(chapter.CUT, "study", chapter.CUT["smoke"])
    study = TASK.but(preset="study", epochs=1.0, batch_size=16)
    *_, arm = chapter.arms(study, chapter.pilot(TASK))
    assert arm.name == chapter.HALVED
    events = arm.run(study, study.load(), 0).events
    [switch] = [e["step"] for e in events if e["method"] == "KernelRescaling" and e["step"]]
    [cut] = [e["step"] for e in events if "masks" in e["text"]]
    assert abs(cut - switch) <= 1


def test_a_users_network_is_cut_to_the_same_widths(monkeypatch):
    monkeypatch.setattr("effilib.models.describe", lambda model: {})  # as of a network that is not ours
    pilot = Arm(name="p", methods=(chapter.method("smoke", 0.5),)).run(TASK, TASK.load(), 0)
    small = chapter.smaller(pilot).run(TASK, None, 0)
    assert small.flops < Arm(name="d").run(TASK, TASK.load(), 0).flops


def test_the_grid_needs_no_pilot():
    once = TASK.but(lengths=(1.0,), seeds=1)
    ratios = [a.methods[0].ratio for a in chapter.grid(once)[1:]]
    assert ratios == [0.1, 0.2, 0.4]
    assert all(a.lengths == (1.0,) for a in chapter.grid(once)[1:])
