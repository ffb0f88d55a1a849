"""What chapter II.8 trains: the baseline, the same again with other seeds, and patients for the same time."""

import pytest
import torch

from effilib import tuning
from effilib.chapters import practical_setting as chapter
from effilib.experiment import check_arms
from effilib.methods.patients import PATIENTS, candidates
from effilib.regret import runs
from effilib.tasks import task


def test_the_same_again_differs_by_its_seeds_only():
    t = task("smoke", "synthetic", precision="fp32", epochs=1)
    arms, dataset = chapter.arms(t), t.load()
    check_arms(t, arms)
    assert arms[1].lengths == t.lengths  # no pilot: they take as long
    mine, again = (arm.run(t, dataset, 0) for arm in arms)
    assert (mine.steps, mine.flops) == (again.steps, again.flops)
    assert mine.rows[-1]["loss"] != again.rows[-1]["loss"]
    assert again.rows[-1]["loss"] == arms[0].run(t, dataset, chapter.OTHER).rows[-1]["loss"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "recorded_tuning", lambda: tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def table(task, ms=lambda width: 1.0 + width / 64):
    """Made-up step times: of the channels inside of all blocks."""
    names = {chapter._name(s): s for p in PATIENTS for s in candidates(p.settings).values()}
    return {name: ms(sum(sum(stage) for stage in s["blocks"])) for name, s in names.items()}


def test_every_candidate_gets_the_same_time():
    t = task("study", "cifar10", device="cpu")
    times, arms = table(t), chapter.truth_arms(t, table(t))
    assert len({a.name for a in arms}) == len(arms) == sum(len(candidates(p.settings)) for p in PATIENTS)
    whole = {round(a.changes["epochs"] * times[chapter._name(a.network)], 6) for a in arms}
    healthy = next(a for a in arms if a.name == "healthy: keep")
    assert len(whole) == 1
    assert healthy.changes["epochs"] == chapter.WARD["study"]["epochs"]
    assert {a.lengths for a in arms if not a.name.endswith("keep")} == {(1.0,)}
    assert {a.lengths for a in arms if a.name.endswith("keep")} == {chapter.LENGTHS}


def test_the_table_is_measured_once_and_the_truths_run_what_is_missing(folder, monkeypatch):
    monkeypatch.setitem(chapter.WARD, "smoke", dict(images=64, epochs=0.5, batch_size=32))
    t = task("smoke", "synthetic")
    monkeypatch.setattr(chapter, "patients", lambda task: PATIENTS[3:4])
    assert chapter.recorded(t) == []
    said = []
    go = dict(seeds=(7,), workers=1, report=said.append)
    rows = chapter.truths(t, **go)
    names = {f"{PATIENTS[3].name}: {c}" for c in candidates(PATIENTS[3].settings)}
    assert {r["arm"] for r in rows} == names
    assert len(rows) == len(said) == len(names) + 1  # as it is, at two lengths
    before = chapter.times_file(t).read_text()
    assert chapter.truths(t, **go) == rows == sorted(chapter.recorded(t), key=tuning._key)
    assert len(said) == len(rows)
    assert chapter.times_file(t).read_text() == before
    assert set(runs(rows)["patient"]) == {PATIENTS[3].name}


def test_every_candidate_of_every_patient_has_all_seeds(folder, monkeypatch):
    monkeypatch.setitem(chapter.WARD, "smoke", dict(images=64, epochs=0.25, batch_size=32))
    monkeypatch.setattr(chapter, "patients", lambda task: PATIENTS[3:4])
    t = task("smoke", "synthetic")
    found = runs(chapter.truths(t, workers=1, report=lambda line: None))
    assert (found.groupby(["candidate", "length"])["seed"].apply(set) == set(chapter.FEW)).all()
    assert len(chapter.SEEDS["study"]) == 5


def test_truths_of_another_table_are_not_taken(folder, monkeypatch):
    monkeypatch.setitem(chapter.WARD, "smoke", dict(images=64, epochs=0.5, batch_size=32))
    monkeypatch.setattr(chapter, "patients", lambda task: PATIENTS[:1])
    t = task("smoke", "synthetic")
    chapter.truths(t, seeds=(7,), workers=1, report=lambda line: None)
    kept = len(chapter.recorded(t))
    file = chapter.times_file(t)
    lines = file.read_text().splitlines()
    name = lines[2].rpartition('",')[0]
    file.write_text("\n".join([*lines[:2], f'{name}",99999.0,1', *lines[3:]]) + "\n")
    assert 0 < len(chapter.recorded(t)) < kept


def test_patients_are_our_resnet_whatever_the_task_trains():
    assert chapter.ward(task("smoke", "synthetic", "convnet")).network == "resnet"
    assert len(chapter.patients(task("quick", "mnist5k"))) == 2
    assert len(chapter.patients(task("study", "mnist5k"))) >= 6
