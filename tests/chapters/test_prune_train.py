"""What chapter 6.1 shows beyond its method: its arms and controls, and what its tables and pictures say."""

import math

import pytest

from effilib import notebook, surgery
from effilib.chapters import prune_train as chapter
from effilib.experiment import Arm, compare
from effilib.methods.prune_train import PruneTrain
from effilib.tasks import task

TASK = task("smoke", "synthetic")
DATA = TASK.load()


pytestmark = pytest.mark.usefixtures("results")


def pruning(**settings):
    return PruneTrain(**{"scale": 400.0, "weigh": "size", "multiple": 2, **settings})


def test_the_task_is_the_wide_one_with_a_margin_of_a_point():
    book = notebook.start("06_1_prune_train", preset="quick", dataset="synthetic")
    found = chapter.wide(book)
    assert found.widths == {"widths": (32, 64, 128), "blocks": (1, 1, 1)}
    assert (found.margin, found.target, found.recipe.epochs) == (1.0, None, chapter.SIZES["quick"]["epochs"])


def test_every_presets_settings_make_a_method():
    assert chapter.method("full") == PruneTrain(ratio=0.2, scale="schedule", every=5)
    for preset in chapter.SETTINGS:
        assert chapter.method(preset, 0.3).ratio == 0.3


def test_the_smaller_network_is_the_one_that_pruning_ended_with():
    model = TASK.build(DATA)
    history = Arm(name="p", methods=(pruning(),), changes={"epochs": 6}).run(TASK, DATA, 0)
    control = chapter.smaller(history)
    small = TASK.build(DATA, 0, **control.network)
    final = history.events[-1]["widths"][-1]
    assert {n.name: n.width for n in surgery.trace(small).nodes} == {n: w for n, (w, _) in final.items()}
    assert sum(w for w, _ in final.values()) < sum(n.width for n in surgery.trace(model).nodes)


def test_a_users_network_is_cut_to_the_same_widths(monkeypatch):
    monkeypatch.setattr("effilib.models.describe", lambda model: {})  # as for a network that is not ours
    history = Arm(name="p", methods=(pruning(),), changes={"epochs": 6}).run(TASK, DATA, 0)
    control = chapter.smaller(history)
    assert control.fit
    small = control.run(TASK, DATA, 0)
    assert small.flops < Arm(name="d").run(TASK, DATA, 0).flops


def test_arms_and_grid():
    pilot = Arm(name="p", methods=(pruning(),)).run(TASK, DATA, 0)
    found = chapter.arms(TASK, pilot)
    assert [a.role for a in found] == ["baseline", "method", "control", "control"]
    assert found[-1].changes == {"epochs": 1.6}
    assert [a.methods[0].ratio for a in chapter.grid(TASK)[1:]] == [0.1, 0.2, 0.3]
    quick = TASK.but(preset="quick", images=100)
    assert len(chapter.arms(quick, pilot)) == 3
    assert chapter.subset(quick).images == 50
    assert chapter.subset(TASK) is TASK


def test_the_toy_case_and_the_checks():
    toy = chapter.toy()
    assert toy["norm"].tolist() == pytest.approx([5, 1])
    assert toy["after"].tolist() == ["[1.8, 2.4]", "[0.0, 0.0]"]
    found = chapter.check(TASK, DATA)["result"]
    assert float(found.iloc[0]) < 1e-5
    assert found.iloc[1] == "0.200000"
    assert float(found.iloc[2]) < 1e-5 < 1e-3 < float(found.iloc[3])
    assert int(found.iloc[4]) == pytest.approx(int(found.iloc[5]), rel=0.02)


def test_the_cost_table_has_fewer_flops_in_every_row():
    table = chapter.cost_table(TASK, DATA)
    assert table["GFLOP a step"].astype(float).is_monotonic_decreasing
    assert table.iloc[0]["predicted"] == table.iloc[0]["measured"] == "1.00x"


def test_nodes_are_listed_with_the_reason_where_they_cannot_be_cut():
    table = chapter.nodes(TASK, DATA)
    assert table.loc["stem", "producers"] == "stem, stages.0.0.conv2"
    assert set(table["can be cut"]) == {"yes"}


def test_what_happened_and_the_pictures():
    arms = [Arm(name="dense", role="baseline"), Arm(name="PruneTrain, r = 0.2", methods=(pruning(),))]
    found = compare(TASK.but(epochs=6), arms, quantity="training time", seeds=1)
    row = chapter.what_happened(found).loc["PruneTrain, r = 0.2"]
    assert float(row["FLOPs"]) < 1
    assert int(row["first cut after epoch"]) >= 1
    assert row["seconds for cuts, a run"] != "0.00"
    figure, caption = chapter.widths_figure(found, DATA)
    assert figure.axes[0].get_xlabel() == "epoch"
    assert "stem" in [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert "channel node" in caption
    figure, _ = chapter.time_figure(found)
    assert "relative to dense" in figure.axes[0].get_ylabel()
    assert chapter.say_grid(found).startswith("PruneTrain, r = 0.2: ")
    assert math.isfinite(found.predicted("PruneTrain, r = 0.2"))
