"""What chapter 6.4 shows of layer replacement: arms, tables and pictures."""

import json

import pytest

from effilib import notebook
from effilib.chapters import layer_replacement as chapter
from effilib.experiment import compare
from effilib.tasks import task

TASK = task("smoke", "synthetic")
DATA = TASK.load()


pytestmark = pytest.mark.usefixtures("results")


@pytest.fixture
def seen():
    return chapter.look(TASK, DATA)


def test_the_task_is_the_wide_one_within_two_points():
    book = notebook.start("06_4_layer_replacement", preset="quick", dataset="synthetic")
    found = chapter.wide(book)
    assert found.widths == {"widths": (32, 64, 128), "blocks": (1, 1, 1)}
    assert (found.margin, found.target, found.recipe.epochs) == (2.0, None, chapter.SIZES["quick"]["epochs"])
    book = notebook.start("06_4_layer_replacement", preset="study", dataset="synthetic", network="convnet")
    assert chapter.wide(book).widths == {}


def test_arms_and_grid():
    arms = chapter.arms(TASK)
    assert [(a.name, a.role) for a in arms] == [
        (chapter.DENSE, "baseline"),
        (chapter.REPLACED, "method"),
        (chapter.NARROWED, "control"),
    ]
    assert arms[1].fit.budget == 0.6
    assert [a.fit.budget for a in chapter.grid(TASK)[1:]] == [0.75, 0.5, 0.35]
    assert "only planned" in chapter.trained_budgets(TASK).iloc[0, 0]


def test_the_toy_case_takes_the_least_damage_that_fits():
    table = chapter.toy()
    assert table[table["chosen"] == "<-"].index.tolist() == ["(1, 0)"]
    fitting = table[table["fits"] == "yes"]
    assert table[table["chosen"] == "<-"]["damage"].item() == fitting["damage"].min()


def test_tables_and_pictures_of_the_survey(seen):
    table = chapter.latency_table(seen)
    assert table.columns[0] == "conv"
    assert (table["conv"] > 0).all()
    assert set(chapter.damage_table(seen).columns) == set(table.columns) - {"conv"}
    assert chapter.left_table(seen).loc["stem"].item() == "the stem"
    figure, caption = chapter.latency_figure(seen)
    assert "log scale" in figure.axes[0].get_xlabel()
    assert "slower" in caption
    plans = chapter.plans(seen, (0.6, 0.5))
    assert chapter.plans_table(plans).index.tolist() == ["0.6", "0.5"]
    assert "budget" in chapter.plans_figure(plans)[0].axes[0].get_xlabel()
    assert "0.5: foreseen" in chapter.say_plans(plans)


def test_the_checks_hold(seen):
    found = chapter.check(seen)["result"]
    assert found.iloc[0] == "0"
    assert float(found.iloc[1]) < 1e-5
    for what, error in found.iloc[2:7].items():
        assert float(error) == pytest.approx(float(what.split("tail ")[1].rstrip(")")), rel=0.05)
    assert found.iloc[7:].tolist() == ["yes", "yes"]
    assert "→" in chapter.trained_table(TASK, DATA, seen).iloc[0, 0]


def test_what_happened_is_told():
    found = compare(TASK, chapter.arms(TASK), quantity="time per step", seeds=1)
    table = chapter.what_happened(found)
    assert table.loc[chapter.DENSE, "step"] == "1.00"
    assert float(table.loc[chapter.REPLACED, "search s"]) > 0
    assert float(table.loc[chapter.NARROWED, "FLOPs"]) < 1
    plans = chapter.chosen(found)
    assert plans.index.tolist() == [f"seed 0, {chapter.REPLACED}"]
    assert "search takes" in chapter.pays_after(found)
    event = found.histories(chapter.REPLACED)[0].events[0]
    assert json.loads(json.dumps(event["plan"])) == event["plan"]
