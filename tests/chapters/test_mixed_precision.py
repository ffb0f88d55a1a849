"""What chapter 3.2 trains: the ladder of number formats, and the four arms in emulated fp16."""

from effilib.chapters import mixed_precision as chapter
from effilib.experiment import check_arms
from effilib.recipe import can_compile, native_bf16
from effilib.tasks import WIDE, task


def test_every_rung_of_the_ladder_keeps_what_the_one_before_it_brought():
    quick, study = task("quick", "synthetic"), task("study", "synthetic")
    arms = chapter.arms(quick)
    check_arms(quick, arms)
    assert arms[0].changes == {"precision": "fp32", "memory_format": "contiguous", "fused": False}
    assert [a.changes["fused"] for a in arms] == [False] * (len(arms) - 1) + [True]
    assert {a.changes["memory_format"] for a in arms[1:]} == {"channels_last"}
    assert any(a.changes["precision"] == "bf16" for a in arms) == native_bf16()
    assert not any(a.changes.get("compile") for a in arms)
    compiled = [a for a in chapter.arms(study) if a.changes.get("compile")]
    assert len(compiled) == (not can_compile())
    assert all(a.changes["precision"] == arms[-1].changes["precision"] for a in compiled)


def test_all_rungs_take_the_same_steps():
    for t, arms in ((task("study", "synthetic"), chapter.arms), (task("quick", "synthetic"), chapter.grid)):
        assert {a.lengths for a in arms(t)[1:]} == {t.lengths}


def test_the_judged_network_is_wide_unless_the_user_named_one():
    assert task("study", "synthetic").sized(chapter.SIZES).widths == WIDE
    assert task("quick", "synthetic").sized(chapter.SIZES).widths == task("quick", "synthetic").widths
    assert task("study", "synthetic", "convnet").sized(chapter.SIZES).widths == {}


def test_the_four_arms_differ_in_what_is_kept_and_scaled():
    first, *emulated = chapter.grid(task("quick", "synthetic", precision="fp32"))
    assert not first.methods
    assert [(m.master, m.scale > 1) for a in emulated for m in a.methods] == [
        (False, False),
        (True, False),
        (True, True),
    ]
