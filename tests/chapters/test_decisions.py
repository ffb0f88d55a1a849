"""What chapter II.9 shows of its decisions: by hand, as a log, as a table, as pictures, and a run again from
its plan.
"""

import json
from dataclasses import replace

import pytest

from effilib.chapters import decisions
from effilib.chapters import prune_then_grow as chapter
from effilib.experiment import compare
from effilib.methods.decision import GROWTH
from effilib.methods.prune_then_grow import plan
from effilib.tasks import task

TASK = task("smoke", "synthetic")
DATA = TASK.load()
RUN = chapter.mode_name("windowed")
DECIDE = {"widen", "deepen", "shrink", "stop", "wait"}


pytestmark = pytest.mark.usefixtures("results")


def test_the_toy_case_is_the_one_in_the_text():
    table = decisions.toy()
    assert table["action"].to_dict() == {
        "all stages shrink": "shrink",
        "one stage has lost nothing": "widen stage 2",
        "it was widened, which brought nothing": "deepen stage 2",
        "it was widened, and its newborns died": "deepen stage 2",
        "over-fitting": "stop",
        "the budget is nearly spent": "stop",
        "there is no penalty": "wait",
        "still improving": "wait",
    }
    assert table.loc["all stages shrink", "rates"] == "0.19 / 0.36"
    assert table.loc["one stage has lost nothing", "rates"] == "0.19 / 0.00"


def test_checks_say_what_is_exact():
    table = decisions.check(TASK, DATA)
    for column in ("eval", "training"):
        assert (table.loc[table[column] != "", column].astype(float) < 1e-4).all()
    assert set(table["undone"]) == {"", "bit for bit"}
    assert len(table) == 7


def test_the_log_is_plain_and_says_all(grown):
    log = json.loads(json.dumps(decisions.log(grown), allow_nan=False))
    assert set(log) == {a.name for a in grown.arms} - {chapter.DENSE, chapter.PRUNED, chapter.SCRATCH}
    (run,) = grown.histories(RUN)
    (kept,) = log[RUN]
    assert kept["seed"] == 0
    assert tuple(map(tuple, kept["plan"])) == plan(run)
    assert len(kept["epochs"]) == len(decisions.seen(run))
    first = kept["epochs"][0]
    assert (first["epoch"], first["widths"], first["depth"]) == (
        1,
        "8 + 4 / 4 + 8 / 4 + 8",
        "1 / 1 / 1",
    )  # in the order of the forward pass
    assert {
        "decision",
        "reason",
        "done",
        "live",
        "lost",
        "going",
        "loss",
        "accuracy %",
        "images",
        "budget",
        "seconds",
    } <= set(first)
    assert first["lost"].count("/") == 2


def test_decisions_as_a_table_and_what_was_tried(grown):
    (run,) = grown.histories(RUN)
    table = decisions.table(run)
    assert len(plan(run)) <= len(table) <= len(decisions.seen(run))
    assert set(table["decision"].str.split().str[0]) <= DECIDE
    assert table["budget"].astype(float).is_monotonic_increasing
    assert table["seconds"].is_monotonic_increasing
    assert table["reason"].str.len().min() > 10
    tried = decisions.tried(grown)
    assert float(tried.loc[chapter.ON, "growths a run"]) == 0 < float(tried.loc[RUN, "growths a run"])
    assert (tried["budget spent"].astype(float) <= 1).all()
    ends = [" + ".join(map(str, stage["widths"])) for stage in decisions.account(run)["stages"]]
    assert tried.loc[RUN, "ends with"] == " / ".join(ends)


def test_a_run_is_had_again_from_its_record(grown):
    table = decisions.replay(grown, RUN)
    assert set(table["the same"]) == {"yes"}
    assert int(table.loc["decisions", "run"]) >= 1
    history = replace(grown.histories(RUN)[0])
    history.rows = [*history.rows[:-1], {**history.rows[-1], "loss": history.rows[-1]["loss"] + 1e-12}]
    other = replace(grown, blocks=[{**grown.blocks[0], "arms": {**grown.blocks[0]["arms"], RUN: history}}])
    assert decisions.replay(other, RUN).loc["validation loss at the end", "the same"] == "no"


def test_a_run_on_resized_images_is_had_again_too():
    arms = chapter.arms(TASK, DATA)
    chosen = [arms[0], next(a for a in arms if a.name == chapter.headline(TASK))]
    found = compare(TASK.but(epochs=6), chosen, seeds=1, quantity="training time")
    assert set(decisions.replay(found, chosen[1].name)["the same"]) == {"yes"}


def test_seconds_at_a_step(grown):
    (history,) = grown.histories(chapter.DENSE)
    assert decisions.seconds(history, 0) == history.rows[0]["seconds"]
    assert decisions.seconds(history, history.steps) == history.rows[-1]["seconds"]
    a, b = history.rows[1], history.rows[2]
    assert decisions.seconds(history, (a["step"] + b["step"]) / 2) == pytest.approx(
        (a["seconds"] + b["seconds"]) / 2
    )


def test_pictures(grown):
    assert decisions.pictured(grown) == chapter.mode_name("windowed", True)
    assert decisions.pictured(replace(grown, arms=grown.arms[:3])) == RUN
    (run,) = grown.histories(RUN)
    figure, caption = decisions.run_figure(grown, RUN)
    left, right = figure.axes
    assert (left.get_xlabel(), right.get_xlabel()) == ("epochs", "seconds on the clock")
    marked = [line for line in left.lines if line.get_marker() in ("o", "^")]
    assert len(marked) == len([s for s in plan(run) if s[1] in GROWTH]) > 0
    lines = {line.get_label(): line for line in left.lines if line.get_label().startswith("stage")}
    assert list(lines) == ["stage 1", "stage 2", "stage 3"]
    assert [line.get_ydata()[-1] for line in lines.values()] == [
        sum(s["widths"]) for s in decisions.account(run)["stages"]
    ]
    assert RUN in caption
    figure, _ = decisions.rates_figure(run)
    assert len(figure.axes[0].lines) == 6
