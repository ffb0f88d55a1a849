"""What chapter 4.2 trains: a prefix that freezes, replaced weight gradients, a smaller network."""

from effilib.chapters import gradient_approximation as chapter
from effilib.experiment import check_arms
from effilib.tasks import task


def test_the_judged_arms_are_the_prefix_and_the_papers_beside_the_published_control():
    study, quick = (task(p, "synthetic").sized(chapter.SIZES) for p in ("study", "quick"))
    check_arms(study, chapter.arms(study))
    assert [a.name for a in chapter.arms(study)] == [
        "exact",
        chapter.FROZEN,
        chapter.ZERO,
        "ResNet-14, exact",
    ]
    assert [a.role for a in chapter.arms(quick)] == ["baseline", "method", "control"]
    assert chapter.arms(study)[1].methods == (chapter.SETTINGS[chapter.FROZEN],)


def test_the_control_is_the_published_one_in_the_study():
    study = task("study", "synthetic").sized(chapter.SIZES)
    assert [a.network for a in chapter.control(study)] == [{"blocks": (2, 2, 2)}]
    assert [a.network for a in chapter.control(task("quick", "synthetic"))] == [{"blocks": (1, 1, 1)}]
    assert not chapter.control(task("quick", "synthetic", "convnet"))


def test_the_grid_compares_at_equal_steps_and_has_no_two_arms_alike():
    for preset, count in (("quick", 4), ("study", 19)):
        t = task(preset, "synthetic", lengths=(1.0,))
        arms = chapter.grid(t)
        check_arms(t, arms)
        assert len({a.methods for a in arms}) == len(arms) == count
        assert {a.lengths for a in arms[1:]} == {t.lengths}
