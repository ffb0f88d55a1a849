"""What chapter 5.2 shows beyond its method: arms, the grid, its figures and tables, the numerics."""

import pytest

from effilib.chapters import structure_and_strength as chapter
from effilib.experiment import compare
from effilib.tasks import task

TASK = task("smoke", "synthetic", "convnet", precision="fp32")
DATA = TASK.load()
NAMES = [f"{s}, {t}" for s in ("random", "dictionary", "kmeans") for t in ("all weights", "strength only")]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFILIB_RESULTS", str(tmp_path_factory.mktemp("results")))
        yield chapter.grid(TASK)


def test_the_grid_has_every_structure_and_both_trainings_and_the_control(found):
    assert list(found) == [6, 12]
    for c in found.values():
        losses = {a.name: c.histories(a.name)[0].rows[-1]["loss"] for a in c.arms}
        assert list(losses) == [*NAMES, "BatchNorm only"]
        assert (
            len(set(losses.values())) > 4
        )  # arms that differ; a few steps at this rate may leave one without logits
        assert {c.histories(n)[0].structure["bn"] for n in NAMES} == {False}
        assert c.histories("BatchNorm only")[0].structure["bn"]


def test_figures_and_tables_say_what_was_measured(found):
    figure, caption = chapter.grid_figure(found)
    assert figure.axes[0].get_xlabel()
    assert "one seed" in caption
    table = chapter.grid_table(found, TASK, DATA)
    assert (table["structure, s"] > 0).tolist() == [
        "random" not in n and "BatchNorm" not in n for n in table.index
    ]
    counts = table["trainable parameters"]
    assert (
        counts["random, all weights"]
        == counts["dictionary, all weights"]
        > 10 * counts["random, strength only"]
    )
    figure, caption = chapter.time_figure(found)
    assert len(figure.axes[0].get_yticklabels()) == 7
    assert chapter.say(found).startswith("6 samples per class (n=1): random, all weights:")


def test_the_verdict_has_three_arms_on_few_samples(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFILIB_RESULTS", str(tmp_path))
    arms = chapter.arms(TASK)
    assert [a.role for a in arms] == ["baseline", "method", "control"]
    t = chapter.verdict_task(TASK)
    assert t.images == 12 * DATA.classes
    c = compare(t, arms, seeds=1, quantity="time per step")
    assert c.predicted("dictionary, strength only") > 1.2


def test_a_network_with_batchnorm_of_its_own_gets_the_scope_that_works():
    resnet = task("smoke", "synthetic", "resnet", precision="fp32")
    assert chapter.scope(resnet) == "auto"
    assert [a.name for a in chapter.arms(resnet)] == [
        "random, all weights",
        "dictionary, strength only",
        "random, strength only",
    ]
    assert list(chapter.trained_parameters(resnet, DATA)) == NAMES


def test_the_cost_table_counts_what_frozen_filters_save():
    table = chapter.cost_table(TASK, DATA)
    assert table.loc["random, all weights", "predicted"] == "1.00x"
    assert float(table.loc["random, strength only", "predicted"][:-1]) > 1.3


def test_the_numerics_and_the_case_by_hand():
    table, dead = chapter.check()
    assert all(float(v) < 1e-5 for column in ("t = 1 against the plain net", "merged") for v in table[column])
    assert float(table.loc["per filter", "FLOPs of a step"][:-1]) < 0.8
    assert table.loc["per kernel", "FLOPs of a step"] == "1.00x"
    assert chapter.gradient_of_strength(True) < 1e-4 * chapter.gradient_of_strength(False)
    assert "without BatchNorm" in dead
    hand = chapter.by_hand()
    assert list(hand["its norm"]) == ["1.4142", "1.4142"]
    assert hand.loc["a", "whitened"] == "-0.83 -0.83 0.83 0.83"
    assert hand.loc["a", "filter"] == "-0.71 -0.71 0.71 0.71"


def test_filters_are_shown_as_they_are():
    found = chapter.structures(TASK, DATA)
    assert {w.shape for w in found.values()} == {(32, 3, 3)}
    figure, caption = chapter.structures_figure(found)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["random", "dictionary", "kmeans"]
    assert "training images" in caption
