"""What chapter 3.3 trains: 14 bits beside fp32, 8 bits beside bf16, and the grid over bits."""

from effilib.chapters import dynamic_fixed_point as chapter
from effilib.experiment import check_arms
from effilib.tasks import task


def test_integers_are_trained_in_the_precision_around_them():
    study, quick = task("study", "synthetic"), task("quick", "synthetic")
    check_arms(study, chapter.arms(study))
    found = {a.name: (a.role, a.changes["precision"]) for a in chapter.arms(study)}
    assert found == {
        "fp32": ("baseline", "fp32"),
        chapter.FIXED: ("method", "fp32"),
        chapter.HALF: ("control", "bf16"),
        chapter.EIGHT: ("method", "bf16"),
    }
    assert [a.name for a in chapter.arms(quick)] == ["fp32", chapter.FIXED, chapter.HALF]


def test_the_grid_compares_at_equal_steps_and_has_no_two_arms_alike():
    for preset, count in (("smoke", 4), ("quick", 4), ("study", 13)):
        t = task(preset, "synthetic", lengths=(1.0,))
        arms = chapter.grid(t)
        check_arms(t, arms)
        assert len({a.methods for a in arms}) == len(arms) == count
        assert {a.lengths for a in arms[1:]} == {t.lengths}
    assert {a.methods[0].bits for a in arms if a.methods} == {16, 14, 12, 10, 8, 6, 5, 4}
