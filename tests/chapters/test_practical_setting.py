"""What chapter II.8 trains: the baseline, and the same again with other seeds."""

from effilib.chapters import practical_setting as chapter
from effilib.experiment import check_arms
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
