"""What chapter 10 trains: who takes part, what does not apply, and which methods go together."""

from collections import Counter

import pytest

from effilib import search
from effilib.chapters import comparison as chapter
from effilib.chapters import gradient_pruning
from effilib.errors import BadInput, NoEffect
from effilib.experiment import Arm
from effilib.tasks import task
from effilib.workbook import series

TASK = task("smoke", "synthetic")
BY_NAME = {c.name: c for c in chapter.CONTENDERS}


def test_the_short_presets_have_a_handful_and_the_study_all():
    assert {c.name for c in chapter.contenders(TASK)} == set(chapter.FEW)
    assert set(chapter.PRESCRIBED) <= set(chapter.FEW) <= set(BY_NAME)
    assert chapter.contenders(TASK.but(preset="study")) == list(chapter.CONTENDERS)


def test_every_chapter_sends_its_best_and_changes_things_by_their_names():
    chapters = [c.chapter for c in chapter.CONTENDERS if c.chapter]
    assert chapters == sorted(chapters)  # in the series' order
    assert {c.number for c in series.CHAPTERS if c.module} - {*chapters} == {
        "3.2",
        "11",
    }  # in every arm; its own
    (sampled,) = BY_NAME["sampled backward passes"].make(TASK).methods
    assert sampled == gradient_pruning.SETTINGS[gradient_pruning.SAMPLED]
    things = Counter(thing for c in chapter.CONTENDERS for thing in c.modifies)
    assert {t for t, n in things.items() if n == 1} == {"the number format", "the pooling", "which images"}


def test_arms_what_does_not_apply_and_combinations():
    arms, able, left_out = chapter.arms(TASK)
    assert arms[0] == Arm(name="baseline", role="baseline")
    assert {a.name for a in arms[1:]} == {c.name for c in able} == set(chapter.FEW)
    assert not left_out
    pooled = BY_NAME["stochastic pooling"].arm(TASK)
    assert "has no nn.MaxPool2d layer" in search.why_not(TASK, pooled)
    prescribed = " + ".join(chapter.PRESCRIBED)
    assert [a.name for a in chapter.combinations(TASK, search.Found(), left_out)] == [prescribed]
    found = search.Found(parts=[BY_NAME[n] for n in ("resizing", "whitening stem", "PruneTrain")])
    names = [a.name for a in chapter.combinations(TASK, found, left_out)]
    without = ["without resizing", "without whitening stem", "without PruneTrain"]
    assert names == ["resizing + whitening stem + PruneTrain", *without, prescribed]


def test_methods_of_a_combination_work_in_order_and_change_different_things():
    combination = search.combined(TASK, [BY_NAME[name] for name in chapter.PRESCRIBED])
    names = [type(m).__name__ for m in combination.methods]
    assert names == ["WaveletStem", "KernelRescaling", "PruneTrain"]
    with pytest.raises(BadInput, match="both change the images"):
        search.combined(TASK, [BY_NAME["resizing"], BY_NAME["kernel rescaling"]])
    with pytest.raises(BadInput, match="Tree-CNN is more than one training"):
        search.combined(TASK, [BY_NAME["resizing"], BY_NAME["Tree-CNN"]])


def test_the_best_is_tried_on_another_network_and_data_set_untuned(monkeypatch):
    parts = [BY_NAME["resizing"], BY_NAME["whitening stem"]]
    tried, left_out = chapter.elsewhere(TASK, search.Found(parts=parts))
    there, arms = tried["with network vgg"]
    assert (there.network, there.recipe) == ("vgg", TASK.recipe)
    assert [a.name for a in arms] == ["baseline", "resizing + whitening stem"]
    assert list(left_out) == ["on fashion_mnist"]
    monkeypatch.setattr(chapter, "FASHION", "mnist5k")  # which is always there
    tried, left_out = chapter.elsewhere(TASK.but(preset="study", lr=0.3), search.Found(parts=parts[:1]))
    assert not left_out
    there, _ = tried["on mnist5k"]
    assert (there.dataset, there.network, there.recipe.lr) == ("mnist5k", TASK.network, 0.3)


def test_a_fault_of_ours_is_raised_and_one_of_a_users_network_is_a_reason():
    def fails(task, seed):
        raise ZeroDivisionError("a fault")

    with pytest.raises(ZeroDivisionError):
        search.why_not(TASK, Arm(name="x", fit=fails))
    why = search.why_not(TASK.but(network="mine.py:net"), Arm(name="x", fit=fails))
    assert why == "ZeroDivisionError: a fault"


NOT_DOUBLE = ("fp32", "dynamic fixed point", "structure and strength")  # the last one takes ten times as long


@pytest.mark.parametrize("name", [n for n in BY_NAME if n not in NOT_DOUBLE])
def test_every_method_trains_in_double_precision_or_says_that_it_does_not_apply(name):
    double = TASK.but(precision="fp64", epochs=1)
    try:
        history = BY_NAME[name].make(double).run(double, double.load(), seed=0)
    except (BadInput, NoEffect):
        return
    assert not history.diverged
    assert history.precision == "fp64"
