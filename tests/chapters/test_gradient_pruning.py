"""What chapter 4.1 trains: pruned gradients, backward passes on some samples, a smaller exact network."""

from effilib.chapters import gradient_pruning as chapter
from effilib.experiment import check_arms
from effilib.tasks import task


def test_the_judged_arms_are_the_papers_the_sampled_one_and_a_smaller_network():
    for preset in ("quick", "study"):
        t = task(preset, "synthetic")
        arms = chapter.arms(t)
        check_arms(t, arms)
        assert [a.role for a in arms] == ["baseline", "method", "method", "control"]
        assert [a.name for a in arms] == ["exact", chapter.PRUNED, chapter.SAMPLED, chapter.SMALLER]


def test_the_control_is_a_block_or_some_channels_smaller():
    def network(t):
        return [a.network for a in chapter.smaller(t)]

    assert network(task("quick", "synthetic")) == [{"blocks": (1, 1, 1)}]
    assert network(task("smoke", "synthetic")) == [{"widths": (6, 6, 6)}]
    assert network(task("quick", "synthetic", "convnet")) == []  # nothing is put in place of a user's network


def test_the_grid_compares_at_equal_steps_and_has_no_two_arms_alike():
    for preset, count in (("smoke", 3), ("quick", 2), ("study", 15)):
        t = task(preset, "synthetic", lengths=(1.0,))
        arms = chapter.grid(t)
        check_arms(t, arms)
        assert len({a.methods for a in arms}) == len(arms) == count
        assert {a.lengths for a in arms[1:]} == {t.lengths}
