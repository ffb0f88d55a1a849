"""What chapter II.9 shows beyond its method: arms at one budget, runs as pictures, decisions as a table, the two questions."""

import pytest

from effilib import models, notebook
from effilib.chapters import prune_then_grow as chapter
from effilib.decision import GROWTH, MODES
from effilib.experiment import Arm, compare
from effilib.methods.prune_then_grow import plan
from effilib.tasks import task

TASK = task("smoke", "synthetic").but(epochs=6, target=None)
DATA = TASK.load()
RUN = chapter.mode_name("windowed")


pytestmark = pytest.mark.usefixtures("results")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All arms that do not resize images, one seed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFILIB_RESULTS", str(tmp_path_factory.mktemp("results")))
        return compare(TASK, chapter.arms(TASK, DATA, resized=False), seeds=1, quantity="training time")


def test_tasks_of_the_presets():
    assert chapter.task(notebook.start("09_prune_then_grow", preset="quick", dataset="synthetic")).images <= 1200
    found = chapter.task(notebook.start("09_prune_then_grow", preset="smoke", dataset="synthetic"))
    assert found.recipe.epochs == chapter.SIZES["smoke"]["epochs"]
    for preset in chapter.SETTINGS:
        assert chapter.procedure(TASK.but(preset=preset), DATA).spend


def test_the_start_is_smaller_than_the_baseline():
    small = TASK.build(DATA, **chapter.start(TASK))
    assert models.describe(small)["blocks"] == [[4], [4], [4]]
    assert chapter.start(TASK.but(preset="study", widths={"widths": (16, 32, 64), "blocks": (1, 1, 2)})) == {"blocks": (1, 1, 1)}
    assert chapter.start(TASK.but(network="vgg", widths={})) == {}


def test_every_arm_runs_within_the_baselines_budget(finished):
    names = [a.name for a in finished.arms]
    assert names[:3] == [chapter.DENSE, RUN, chapter.PRUNED]
    assert {chapter.GROWN, chapter.RANDOM, chapter.SCRATCH, chapter.ON, *(chapter.mode_name(m) for m in MODES)} <= set(names)
    budget = chapter.baseline_flops(TASK, DATA)
    for name in names:
        (history,) = finished.histories(name)
        assert history.flops <= (1.3 if name == chapter.PRUNED else 1.03) * budget, name
        if name != chapter.PRUNED:
            assert history.flops > 0.85 * budget, name
    assert [a.name for a in chapter.arms(TASK.but(preset="quick"), DATA)] == names[:3]


def test_controls_rest_on_the_run_of_the_same_seed(finished):
    (run,), (on,), (scratch,) = (finished.histories(n) for n in (RUN, chapter.ON, chapter.SCRATCH))
    grown = [s for s in plan(run) if s[1] in GROWTH]
    assert grown
    assert plan(on) == tuple(s for s in plan(run) if s[1] not in GROWTH)
    first = grown[0][0]
    same = [(a["seen"]["loss"], b["seen"]["loss"]) for a, b in zip(chapter.seen(run), chapter.seen(on), strict=False)][: first + 1]
    assert all(a == b for a, b in same)
    assert scratch.structure == run.structure != on.structure


def test_renewed_weights_are_those_of_a_fresh_network():
    model = models.build("resnet", 4, (1, 8, 8), seed=3, blocks=([4, 0], 1, 1))
    again = chapter.renewed(models.build("resnet", 4, (1, 8, 8), seed=0, blocks=([4, 0], 1, 1)), 3)
    assert all((a == b).all() for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_decisions_as_a_table_and_what_was_tried(finished):
    (run,) = finished.histories(RUN)
    table = chapter.decisions(run)
    assert len(plan(run)) <= len(table)
    assert set(table["decision"].str.split().str[0]) <= {"widen", "deepen", "shrink", "stop", "wait"}
    assert table["FLOPs"].astype(float).is_monotonic_increasing
    assert table["seconds"].is_monotonic_increasing
    assert table["reason"].str.len().min() > 10
    tried = chapter.tried(finished)
    assert set(tried.index) == {a.name for a in finished.arms} - {chapter.DENSE, chapter.PRUNED, chapter.SCRATCH}
    assert float(tried.loc[chapter.ON, "growths a run"]) == 0 < float(tried.loc[RUN, "growths a run"])
    assert (tried["budget spent"].astype(float) <= 1).all()


def test_the_two_questions_are_answered_apart(finished):
    table, sentence = chapter.equal_time(finished)
    assert sentence.startswith("The best control is ")
    assert float(table.loc[chapter.DENSE, "FLOPs"]) == 1
    assert set(table["above every control"]) == {""}  # one seed
    needed = chapter.time_needed(finished)
    assert needed.loc[chapter.DENSE, "reached"] == "1 of 1"
    assert float(needed.loc[chapter.DENSE, "share of the baseline's time"]) <= 1


def test_pictures(finished):
    figure, caption = chapter.run_figure(finished, RUN)
    left, right = figure.axes
    assert left.get_xlabel() == "epochs of SEARCH"
    assert right.get_xlabel() == "seconds on the clock"
    assert len([line for line in left.lines if line.get_marker() in ("o", "^")]) >= 1
    assert "One seed" in caption
    figure, _ = chapter.rates_figure(finished.histories(RUN)[0])
    assert len(figure.axes[0].lines) == 6


def test_the_toy_case_is_the_one_in_the_text():
    actions = chapter.toy()["action"].to_dict()
    assert actions == {
        "all stages shrink": "shrink",
        "one stage has lost nothing": "widen stage 2",
        "it was widened, which brought nothing": "deepen stage 2",
        "it was widened, and its newborns died": "deepen stage 2",
        "over-fitting": "stop",
        "the budget is nearly spent": "stop",
        "there is no penalty": "wait",
        "still improving": "wait",
    }


def test_checks_say_what_is_exact():
    table = chapter.check(TASK, DATA)
    for column in ("eval", "training"):
        assert (table.loc[table[column] != "", column].astype(float) < 1e-4).all()
    assert set(table["undone"]) == {"", "bit for bit"}
    assert len(table) == 7


def test_cost_table_counts_every_growth():
    table = chapter.cost_table(TASK, DATA)
    assert float(table.loc[chapter.DENSE, "of the baseline"]) == 1
    start = float(table.loc["the procedure's start", "of the baseline"])
    assert start < 1
    assert (table.iloc[2:]["of the baseline"].astype(float) > start).all()
    assert len(table) == 8


def test_seconds_at_a_step():
    (history,) = [Arm(name="d").run(TASK, DATA, 0)]
    assert chapter.seconds(history, 0) == history.rows[0]["seconds"]
    assert chapter.seconds(history, history.steps) == history.rows[-1]["seconds"]


def test_arms_that_resize_cost_the_same():
    pytest.importorskip("effilib.methods.kernel_rescaling")
    arms = {a.name: a for a in chapter.arms(TASK, DATA)}
    budget = chapter.baseline_flops(TASK, DATA)
    for name, share in [
        (chapter.mode_name("thesis", True), 1),
        (chapter.SMALL, 1),
        (f"{chapter.SMALL}, {chapter.FAST:g} of the FLOPs", 0.55),
    ]:
        history = arms[name].run(TASK, DATA, 0)
        assert 0.85 * share * budget < history.flops < 1.1 * share * budget
