"""What chapter II.9 trains: the procedure, its controls, and that every preset can run it."""

from dataclasses import replace

import pytest

from effilib import models
from effilib.chapters import practical_setting as setting
from effilib.chapters import prune_then_grow as chapter
from effilib.methods.patients import HEALTHY, candidates
from effilib.methods.prune_then_grow import decisions
from effilib.tasks import task

TASK = task("smoke", "synthetic").sized(chapter.SIZES)
pytestmark = pytest.mark.usefixtures("results")


def test_arms():
    names = [a.name for a in chapter.arms(TASK)]
    assert names == [chapter.RESIZED, chapter.CUT, chapter.SWITCH, chapter.GROWN, chapter.DENSE]
    assert [a.name for a in chapter.arms(TASK.but(preset="quick"))] == names[:4]
    others = [a.name for a in chapter.arms(TASK.but(network="vgg", widths={}))]
    assert others == [chapter.RESIZED, chapter.GROWN, chapter.DENSE]
    assert all(chapter.procedure(TASK.but(preset=preset)) for preset in chapter.SETTINGS)


def test_the_start_is_smaller_than_the_dense_network():
    assert models.describe(TASK.build(TASK.load(), **chapter.start(TASK)))["blocks"] == [[8], [8], [8]]
    base = task("study", "cifar10")
    assert chapter.start(base) == {"blocks": ((16,), (32,), (64,))}
    assert chapter.start(base.but(network="vgg", widths={})) == {}


def test_the_procedure_grows_at_every_length_and_its_budget_follows():
    arm, data = chapter.arms(TASK)[3], TASK.load()
    short, whole = (arm.run(TASK, data, 0, length) for length in (0.6, 1.2))
    assert any(kind in ("widen", "deepen") for _, kind, _ in decisions(whole))
    assert whole.events[-1]["budget"] == 2 * short.events[-1]["budget"]


def test_what_changes_its_shape_ends_as_the_known_shape_or_costs_as_much():
    data, arms = TASK.load(), {a.name: a for a in chapter.arms(TASK)}
    known = models.describe(TASK.build(data))
    for name, event in ((chapter.CUT, "masks"), (chapter.SWITCH, "parameters")):
        history = arms[name].run(TASK, data, 0, 1.0)
        [changed] = [e for e in history.events if event in e["text"]]
        [switch, *_] = [e["step"] for e in history.events if e["method"] == "KernelRescaling" and e["step"]]
        assert abs(changed["step"] - switch) <= 1
        assert history.flops < 2 * arms[chapter.DENSE].run(TASK, data, 0, 1.0).flops
        if name == chapter.SWITCH:
            assert history.structure == known
        else:
            assert sum(sum(stage) for stage in history.structure["blocks"]) < 2 * 8 * 4


def a_table(patient):
    names = [setting._name(s) for s in candidates(patient.settings).values()]
    return {name: 1.0 + 0.1 * i for i, name in enumerate(names)}


def test_the_contest_is_one_of_equal_lengths_from_one_checkpoint():
    for preset in ("smoke", "quick", "study", "full"):
        t = chapter.contest(task(preset, "synthetic", device="cpu"))
        arms = chapter.contest_arms(t, setting.PATIENTS[5], a_table(setting.PATIENTS[5]), "deepen stage 3")
        assert [a.name for a in arms[:2]] == [chapter.HALVING, chapter.IMPROVED]
        assert len(arms) == (4 if preset in ("smoke", "quick") else 8)
        assert {a.lengths for a in arms} == {t.lengths}
        shared = {(repr(a.fit.network), repr(a.fit.times), a.fit.given, a.fit.newborn) for a in arms}
        assert len(shared) == 1
        if preset == "study":
            fits = {a.name: a.fit for a in arms}
            assert fits[chapter.ORACLE].plan == ("deepen stage 3",)
            assert fits[chapter.UNIFORM].plan == ("widen stage 1", "widen stage 2", "widen stage 3")
            assert fits[chapter.HALVED] == replace(fits[chapter.HALVING], side=fits[chapter.IMPROVED].side)


def test_sick_patients_are_contested_and_the_first_choice_before_others():
    t, everyone = task("study", "cifar10", device="cpu"), list(setting.PATIENTS)
    assert tuple(p.name for p in chapter.contested(t, everyone)) == chapter.FIRST_CHOICE
    assert [p.name for p in chapter.contested(t, everyone[:3])] == ["stage 1 narrow", "stage 2 narrow"]
    assert chapter.contested(t, [HEALTHY]) == []


def test_every_diagnosis_scores_every_candidate_of_every_trial_and_is_cached():
    t, few = task("smoke", "synthetic"), setting.PATIENTS[4:6]
    names = {setting._name(s): s for p in few for s in candidates(p.settings).values()}
    table = {name: 1.0 + 0.1 * i for i, name in enumerate(names)}
    rows = chapter.trials(t, few, table)
    for p in few:
        for name in chapter.diagnoses(t):
            mine = [r for r in rows if (r["patient"], r["diagnosis"]) == (p.name, name)]
            assert [r["candidate"] for r in mine] == list(candidates(p.settings))
    assert chapter.trials(t, few, table) == rows  # with the same seconds
    dearer = {name: 2 * ms for name, ms in table.items()}
    assert chapter.trials(t, few, dearer) != rows


def test_a_study_compares_all_diagnoses_in_thirty_trials_or_more():
    t = task("study", "cifar10", device="cpu")
    assert len(chapter.diagnoses(t)) == 7
    assert [len(chapter.searches(t, patients)) for patients in (1, 4, 7)] == [30, 8, 5]
    assert not {*range(3000, 3100)} & {*chapter.searches(t, 1)}  # truths have other seeds
