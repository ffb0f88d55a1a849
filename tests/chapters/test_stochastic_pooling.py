"""What chapter 5.1 shows beyond its method: arms, the grid, its figure and tables, the numerics."""

import pytest

from effilib.chapters import stochastic_pooling as chapter
from effilib.errors import NoEffect
from effilib.experiment import compare
from effilib.tasks import task

TASK = task("smoke", "synthetic", "convnet", precision="fp32")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFILIB_RESULTS", str(tmp_path_factory.mktemp("results")))
        yield chapter.grid(TASK)


def test_the_grid_has_every_kind_and_size_with_and_without_batchnorm(found):
    assert list(found) == ["without BatchNorm", "with BatchNorm"]
    for name, comparisons in found.items():
        assert list(comparisons) == [64, 128]
        for c in comparisons.values():
            losses = {a.name: c.histories(a.name)[0].rows[-1]["loss"] for a in c.arms}
            assert tuple(losses) == chapter.ARMS
            assert len(set(losses.values())) == 4  # four arms that differ
            assert {c.histories(a)[0].steps for a in chapter.ARMS} == {4}  # equal numbers of updates
            assert c.histories("max")[0].structure["bn"] == (name == "with BatchNorm")
            assert c.illustration


def test_figure_and_tables_say_what_was_measured(found):
    figure, caption = chapter.grid_figure(found)
    assert [ax.get_title(loc="left") for ax in figure.axes[:2]] == list(found)
    assert all(ax.get_xlabel() for ax in figure.axes[2:])
    assert "one seed" in caption
    table = chapter.grid_table(found)
    assert len(table) == 2 * 2 * 4
    row = table.loc["with BatchNorm", "64", "S3Pool"]
    assert row["gap"] == pytest.approx(row["training %"] - row["test %"])
    needed = chapter.needed(found)
    assert len(needed) == 8
    assert needed.loc[("without BatchNorm", "max"), "reached"] == "1 of 1"
    assert set(chapter.steps(found).loc["with BatchNorm"].index) == set(chapter.ARMS)
    assert len(chapter.say(found)) == 2


def test_the_verdict_has_three_arms_on_few_images(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFILIB_RESULTS", str(tmp_path))
    t = chapter.verdict_task(TASK)
    arms = chapter.arms(TASK)
    assert [a.role for a in arms] == ["baseline", "method", "control"]
    assert (t.images, t.target) == (64, None)
    c = compare(t, arms, seeds=1, quantity="time per step")
    assert not c.histories("max")[0].structure["bn"]


def test_a_users_own_network_comes_as_it_is():
    own = task("smoke", "synthetic", "torchvision.models:vgg11_bn")
    assert chapter.networks(own) == {"as it is": True}
    assert chapter.arms(own)[0].network == {}
    t = task("smoke", "synthetic", "resnet", precision="fp32", images=64, epochs=1)
    dataset = t.load()
    with pytest.raises(NoEffect):  # said in the first arm that cannot work
        chapter.arms(t)[1].run(t, dataset, 0)


def test_the_case_by_hand_and_the_numerics():
    table = chapter.by_hand()
    assert float(table.loc["4", "share of the draws"]) == pytest.approx(0.4, abs=0.01)
    assert float(table.loc["mean", "share of the draws"]) == pytest.approx(3, abs=0.02)
    assert float(table.loc["eval mode", "share of the draws"]) == 3
    result = chapter.check()["result"]
    assert float(result.iloc[0].split()[0]) < 6
    mass = result.iloc[1].split(", ")
    assert mass[0] == mass[1]
    assert result.iloc[2] == "0, 0"
    assert result.iloc[3].count("(5, 5)") == 2


def test_the_cost_table_is_relative_to_max_pooling():
    table = chapter.cost_table(TASK)
    assert list(table.index) == list(chapter.ARMS)
    assert table.loc["max", "of max pooling's"] == "1.0x"
