"""The search: who goes on, what is combined, what it costs; and that it is measured for real."""

import math
from dataclasses import dataclass

import pytest

from effilib import clock, search
from effilib.errors import BadInput
from effilib.experiment import Arm, Contender
from effilib.history import History
from effilib.hooks import Method
from effilib.methods.data_pruning import DataPruning
from effilib.tasks import task

TASK = task("smoke", "synthetic", device="cpu")


@dataclass(frozen=True)
class Named(Method):
    name: str


def contender(name, modifies, order=0):
    return Contender(name, "1", modifies, lambda task: Arm(name="", methods=(Named(name),)), order)


# name -> (what it changes, factor on the time, points): with 10 points an e-fold, faster means
WORLD = {
    "fast": (("a",), 0.5, -1.0),
    "also fast": (("b",), 0.6, -1.0),
    "clashes": (("a",), 0.55, -1.0),
    "bad company": (("c",), 0.8, 0.0),  # by itself good, nothing beside others
    "slow": (("d",), 2.0, 1.0),
    "worse": (("e",), 0.9, -8.0),
    "worst": (("f",), 1.0, -60.0),
}


@pytest.fixture
def world(monkeypatch):
    """Trainings whose time and accuracy are known: `measure` looks them up."""
    asked = []

    def measure(task, arms, *, lengths, title, first_seed):
        cells = []
        for seed in range(task.seeds):
            runs = {}
            for arm in arms:
                length = lengths[arm.name][0]
                names = [m.name for m in arm.methods]
                seconds = 100 * length * math.prod(WORLD[n][1] for n in names)
                accuracy = 50 + 10 * math.log(100 * length) + sum(WORLD[n][2] for n in names) + seed
                if "bad company" in names and len(names) > 1:
                    seconds *= 2
                runs[arm.name] = History(seconds=seconds, raw_seconds=seconds, steps=1, final=accuracy)
            cells.append({"arms": runs})
        asked.append((title, first_seed, [a.name for a in arms]))
        return cells

    monkeypatch.setattr(search, "measure", measure)
    monkeypatch.setattr(search, "why_not", lambda task, arm: "")
    return asked


def test_the_better_half_goes_on_and_what_gains_together_is_combined(world, capsys):
    contenders = [contender(name, modifies, -i) for i, (name, (modifies, *_)) in enumerate(WORLD.items())]
    found = search.search(TASK, contenders, seeds=2)
    assert found.slope == pytest.approx(10)
    assert [c.name for c in found.gainers] == ["fast", "clashes", "also fast", "bad company"]
    assert [c.name for c in found.parts] == ["fast", "also fast"]
    assert found.left_out == {"fast + clashes": "fast and clashes both change a"}
    table = found.table()
    first = table[table["stage"] == "length 0.25"]
    for name, (_, factor, points) in WORLD.items():  # against the sum on paper
        assert first.loc[name, "x"] == pytest.approx(math.exp(-math.log(factor) + points / 10))
        assert first.loc[name, "points"] == pytest.approx(points)
    assert set(first.index[first["verdict"] == "left behind"]) == {"slow", "worse", "worst"}
    tried = table[table["stage"] == "combination"]
    assert dict(tried["verdict"]) == {
        "fast + also fast": "taken in",
        "fast + also fast + bad company": "gains nothing more",
    }
    best = found.best(TASK)
    assert best.name == "fast + also fast"
    assert [m.name for m in best.methods] == ["also fast", "fast"]  # by their order in a step
    assert found.seconds == pytest.approx(table["seconds"].sum())
    assert "training" in capsys.readouterr().out
    seeds = [first_seed for _, first_seed, _ in world]
    assert len(set(seeds)) == len(seeds)
    assert min(seeds) >= 3000  # none that is measured
    assert all("baseline" in arms or title == "combination" for title, _, arms in world)


def test_where_nothing_gains_the_baseline_is_best(world):
    found = search.search(TASK, [contender("slow", ("d",)), contender("worst", ("f",))], seeds=1)
    assert found.parts == found.gainers == []
    assert found.best(TASK).name == "baseline"
    assert search.search(TASK, [], seeds=1).best(TASK).methods == ()


def test_what_diverges_is_left_behind():
    runs = [History(seconds=1.0, steps=1, final=90.0)]
    assert search.gain(runs, [History(seconds=0.1, steps=1, diverged=True)], 5.0) == -math.inf
    assert search.gain(runs, runs, 5.0) == 0


def test_each_part_is_left_out_once():
    parts = [contender(name, WORLD[name][0]) for name in ("fast", "also fast", "slow")]
    rests = {a.name: {m.name for m in a.methods} for a in search.leave_one_out(TASK, parts)}
    assert rests == {
        "without fast": {"also fast", "slow"},
        "without also fast": {"fast", "slow"},
        "without slow": {"fast", "also fast"},
    }
    with pytest.raises(BadInput, match="both change a"):
        search.combined(TASK, [contender("fast", ("a",)), contender("clashes", ("a",))])


def test_a_search_is_measured_and_repeated_from_the_cache(capsys, monkeypatch):
    monkeypatch.setattr(clock.Measuring, "others", lambda self: 0)  # cells are kept of an undisturbed machine
    narrow = Contender("narrow", "", ("the network",), lambda t: Arm(name="", network={"widths": (4, 4, 4)}))
    wide = Contender("wide", "", ("the network",), lambda t: Arm(name="", network={"widths": (8, 16, 8)}))
    found = search.search(TASK, [narrow, wide], seeds=1)
    assert found.seconds > 0
    assert "screening: 4 of 4" in capsys.readouterr().out
    again = search.search(TASK, [narrow, wide], seeds=1)
    assert again.rows == found.rows
    assert "screening: 1" not in capsys.readouterr().out


def test_who_is_too_slow_or_does_not_apply_is_left_out_with_the_reason():
    def refuses(task):
        raise BadInput("not here")

    narrow = Contender("narrow", "", (), lambda t: Arm(name="", network={"widths": (4, 4, 4)}))
    able, why = search.applicable(TASK, [narrow, Contender("odd", "", (), refuses)])
    assert ([c.name for c in able], why) == (["narrow"], {"odd": "not here"})
    able, why = search.applicable(TASK, [narrow], most=1e-9)
    assert able == []
    assert "a step takes" in why["narrow"]


def test_what_is_done_once_is_no_part_of_a_step():
    class Prepared(Method):
        def on_fit_start(self, run):
            clock.pause(0.5)

    assert search.why_not(TASK, Arm(name="prepared", methods=(Prepared(),)), most=0.5 / 8) == ""


def test_who_needs_more_than_the_short_length_has_goes_on_untried():
    pruned = Contender("data pruning", "5.1", ("images",), lambda t: Arm(name="", methods=(DataPruning(),)))
    narrow = Contender("narrow", "", ("the network",), lambda t: Arm(name="", network={"widths": (4, 4, 4)}))
    found = search.search(TASK.but(epochs=3), [pruned, narrow], lengths=(0.25, 0.5), seeds=1)
    assert "one epoch" in found.left_out["data pruning, at length 0.25"]
    assert [r["arm"] for r in found.rows if r["stage"] == "length 0.5"].count("data pruning") == 1
