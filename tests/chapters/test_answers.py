"""Chapter II.9's two questions on runs that are made up, what a growth costs, and where the seconds went."""

import pytest

from effilib.chapters import answers
from effilib.chapters import prune_then_grow as chapter
from effilib.experiment import Arm, Comparison
from effilib.tasks import task
from effilib.training import History

TASK = task("smoke", "synthetic").but(margin=1.0, target=None)
RUN, SHORT = chapter.mode_name("windowed"), chapter.headline(TASK)


def history(accuracy, seconds=10.0, flops=100.0):
    """Five evaluations; the accuracy rises evenly to its end."""
    rows = [{"step": i, "seconds": seconds * i / 5, "accuracy": accuracy * i / 5} for i in range(1, 6)]
    return History(rows=rows, seconds=seconds, flops=flops, test_accuracy=accuracy - 1, steps=5)


def made_up(n=5, **arms):
    """A comparison: name -> (role, accuracy, seconds)."""
    spread = [0.1 * (s % 3) for s in range(n)]
    blocks = [
        {
            "seed": s,
            "machine": {"summary": "2-core CPU"},
            "arms": {k: history(a + spread[s], t) for k, (_, a, t) in arms.items()},
        }
        for s in range(n)
    ]
    found = tuple(Arm(name=k, role=role) for k, (role, _, _) in arms.items())
    return Comparison(task=TASK, arms=found, blocks=blocks)


def several(n=5, run=(85.0, 10.0), short=(79.5, 5.0)):
    return made_up(
        n,
        **{
            chapter.DENSE: ("baseline", 80.0, 10.0),
            RUN: ("method", *run),
            chapter.PRUNED: ("control", 82.0, 9.0),
            SHORT: ("method", *short),
        },
    )


def test_an_accuracy_is_reached_where_it_is_kept():
    h = history(80.0)
    assert answers.reached(h, 80.0) == 10
    assert answers.reached(h, 48.0) == 6
    h.rows[3]["accuracy"] = 10.0
    assert answers.reached(h, 48.0) == 10
    assert answers.reached(h, 80.1) is None


def test_the_time_needed_is_a_share_of_the_baselines_whole_time():
    found = several()
    assert answers.shares(found, SHORT) == [0.5] * 5
    table = answers.time_needed(found)
    assert table.loc[SHORT].tolist() == ["method", "5 of 5", "0.50 [0.50, 0.50]", "yes"]
    assert table.loc[chapter.DENSE].tolist() == ["baseline", "5 of 5", "1.00 [1.00, 1.00]", ""]
    missed = answers.time_needed(several(short=(70.0, 5.0)))
    assert missed.loc[SHORT].tolist() == ["method", "0 of 5", "", "no"]
    few = answers.time_needed(several(2))
    assert few.loc[SHORT, f"at most {chapter.FAST:g}"] == ""


def test_at_equal_time_a_method_has_to_beat_every_control():
    table = answers.equal_time(several())
    assert SHORT not in table.index
    assert table.loc[RUN, "above every control"] == "yes"
    assert (
        table.loc[chapter.PRUNED, "above every control"]
        == table.loc[chapter.DENSE, "above every control"]
        == ""
    )
    assert answers.equal_time(several(run=(82.05, 10.0))).loc[RUN, "above every control"] == "no"
    assert (
        answers.equal_time(several(run=(85.0, 12.0))).loc[RUN, "above every control"]
        == "yes, but in 1.20 of the time"
    )
    assert answers.equal_time(several(2)).loc[RUN, "above every control"] == ""
    assert answers.best_control(several())[0] == chapter.PRUNED


def test_both_answers_in_words_and_as_a_picture():
    said = answers.say(several())
    assert len(said) == 3
    assert said[0].startswith(RUN)
    assert "in 0.50 of its time" in said[1]
    assert said[2].startswith(f"The best control in the full time: {chapter.PRUNED}, 82.")
    assert "in 0 of 5 runs" in answers.say(several(short=(70.0, 5.0)))[1]
    figure, caption = answers.figure(several(short=(70.0, 5.0)))
    left, right = figure.axes
    assert [t.get_text() for t in left.get_yticklabels()] == [a.name for a in several().arms]
    assert [t.get_text() for t in right.texts] == ["0 of 5 reached"]
    assert chapter.PRUNED in caption
    assert [a.name for a in answers.few(several()).arms] == [a.name for a in several().arms]


def test_the_cost_table_counts_every_growth_and_every_size():
    table = answers.cost_table(TASK, TASK.load())
    faster, start = table["predicted"].str.rstrip("x").astype(float), "the procedure's start"
    assert faster[start] > faster[chapter.DENSE] == 1
    grown, smaller = (
        [n for n in table.index if n.startswith("start, ")],
        [n for n in table.index if ", images" in n],
    )
    assert (faster[grown] < faster[start]).all()
    assert (faster[[n for n in smaller if n.startswith(start)]] > faster[start]).all()
    assert len(grown) == 6
    assert len(smaller) == 4
    assert len(table) == 12
    assert table.loc[chapter.DENSE, "measured"] == "1.00x"


def test_where_the_seconds_went(grown):
    table = answers.time_spent(grown)
    assert RUN in table.index
    assert chapter.DENSE not in table.index
    parts = table.loc[RUN, ["steps", "looking", "deciding", "surgery", "rest"]].astype(float)
    assert (parts >= 0).all()
    assert parts.sum() == pytest.approx(
        sum(k["seconds"] for k in grown.histories(RUN)[0].kinds.values()), abs=0.03
    )
    assert parts["looking"] > 0
