"""What chapter II.9 trains: the procedure, its controls, and that every preset can run it."""

import pytest

from effilib import models
from effilib.chapters import practical_setting as setting
from effilib.chapters import prune_then_grow as chapter
from effilib.methods.patients import candidates
from effilib.methods.prune_then_grow import FromScratch, decisions
from effilib.tasks import task

TASK = task("smoke", "synthetic").sized(chapter.SIZES)
pytestmark = pytest.mark.usefixtures("results")


def test_arms():
    names = [a.name for a in chapter.arms(TASK)]
    assert names[:2] == [chapter.DENSE, chapter.GROWN]
    assert set(names[2:]) == {chapter.RANDOM, chapter.RESIZED, chapter.ALONE, chapter.SMALL, chapter.SCRATCH}
    assert [a.name for a in chapter.arms(TASK.but(preset="quick"))] == names[:4]
    assert all(chapter.procedure(TASK.but(preset=preset)) for preset in chapter.SETTINGS)


def test_the_start_is_smaller_than_the_dense_network():
    assert models.describe(TASK.build(TASK.load(), **chapter.start(TASK)))["blocks"] == [[8], [8], [8]]
    base = task("study", "cifar10")
    assert chapter.start(base) == {"blocks": ((16,), (32,), (64,))}
    assert chapter.start(base.but(network="vgg", widths={})) == {}


def test_the_procedure_grows_at_every_length_and_its_budget_follows():
    arm, data = chapter.arms(TASK)[1], TASK.load()
    short, whole = (arm.run(TASK, data, 0, length) for length in (0.6, 1.2))
    assert any(kind in ("widen", "deepen") for _, kind, _ in decisions(whole))
    assert whole.events[-1]["budget"] == 2 * short.events[-1]["budget"]
    assert isinstance(chapter.arms(TASK)[-1].fit, FromScratch)


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
    assert chapter.TRIALS["study"] * 6 >= 30
    truths = range(3000, 3100)
    assert not {*truths} & {*range(chapter.FIRST, chapter.FIRST + chapter.TRIALS["study"])}
