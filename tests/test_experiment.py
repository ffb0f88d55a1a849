"""Comparisons: fair order, pairs, the cache, resuming after a kill, and what is said of the results."""

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace

import pandas as pd
import pytest
import torch

from effilib import experiment, paths
from effilib.errors import BadInput
from effilib.experiment import Arm, compare, key, measure, order, pilot
from effilib.statistics import FASTER, INCONCLUSIVE, LESS_ACCURATE, MISSED, SHARED, SLOWER, SMOKE, held
from effilib.tasks import Task
from effilib.training import History, Method, Recipe, train

RECIPE = Recipe(epochs=1, batch_size=64, precision="fp32")
TASK = Task(
    preset="quick",
    dataset="synthetic",
    widths={"widths": (8, 8), "blocks": (1, 1)},
    recipe=RECIPE,
    target=60.0,
    margin=1.0,
)


@pytest.fixture(autouse=True)
def _own_results(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFILIB_RESULTS", str(tmp_path / "results"))
    monkeypatch.delenv("EFFILIB_SHARED", raising=False)


RUNS = []  # (arm, seed) of every run made here


@dataclass(frozen=True)
class Made:
    """A fit that takes no time: what an arm's history is, is written down here."""

    name: str
    seconds: float = 10.0
    accuracy: float = 90.0
    step: float = 0.01
    flops: float = 1e9
    missed: tuple = ()  # seeds
    capped: int = 0

    def __call__(self, task, seed):
        RUNS.append((self.name, seed))
        top = 20.0 if seed in self.missed else self.accuracy
        noise = 1 + 0.01 * (seed % 3)
        rows = [
            {
                "step": s,
                "epoch": s / 10,
                "seconds": self.seconds * noise * s / 20,
                "lr": 0.1,
                "train_loss": 1.0,
                "loss": 1.0,
                "accuracy": a,
            }
            for s, a in ((0, 10.0), (10, top), (20, top + 0.1 * (seed % 2)))
        ]
        kinds = {"step": {"count": 20, "seconds": self.seconds, "median": self.step * noise}}
        return History(
            rows=rows, steps=20, seconds=self.seconds, raw_seconds=self.seconds + 1, timed=20, capped=self.capped, kinds=kinds,
            memory={"parameters": 2**20, "saved": 2**20, "peak": 2**30}, test_accuracy=self.accuracy - 1, flops=self.flops,
        )  # fmt: skip


def arms(*fits, roles=("baseline", "method", "control")):
    return [Arm(name=f.name, role=r, fit=f) for f, r in zip(fits, roles, strict=False)]


BASE = Made("base")


@pytest.fixture(autouse=True)
def _nothing_run():
    RUNS.clear()


def test_arms_are_measured_in_one_process(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        BadInput, match=r"arms are measured in one process; over several only train\(\) works"
    ):
        compare(TASK, arms(BASE, Made("other")))
    assert RUNS == []


# Order


def test_two_arms_alternate_a_b_b_a():
    assert [order(["A", "B"], i) for i in range(2)] == [["A", "B"], ["B", "A"]]
    assert Counter(order(["A", "B"], i)[0] for i in range(40)) == {"A": 20, "B": 20}
    assert all(abs(2 * sum(order(["A", "B"], i)[0] == "A" for i in range(n)) - n) <= 2 for n in range(1, 40))


@pytest.mark.parametrize("n", [3, 4, 5])
def test_more_arms_are_rotated_and_reversed_so_that_each_is_first_and_last_equally_often(n):
    names = list("ABCDE"[:n])
    blocks = [order(names, i) for i in range(2 * n)]
    assert all(sorted(b) == names for b in blocks)
    for place in range(n):
        assert Counter(b[place] for b in blocks) == dict.fromkeys(names, 2)
    assert blocks[1] == blocks[0][::-1]


def test_the_arms_of_every_seed_run_in_that_order():
    compare(TASK, arms(BASE, Made("fast"), Made("small")), seeds=4)
    expected = [(name, s) for s in range(4) for name in order(["base", "fast", "small"], s)]
    assert expected == RUNS


# Pairs


@dataclass(frozen=True)
class Watch(Method):
    """Writes down initial weights and the order of the data."""

    seen: list = field(default_factory=list, hash=False, compare=False, repr=False)

    def on_batch(self, run, x, y):
        if run.step == 0:
            self.seen.append(
                {"weights": {k: v.clone() for k, v in run.model.state_dict().items()}, "data": []}
            )
        self.seen[-1]["data"].append((x.sum().item(), y.tolist()))
        return x, y


@dataclass(frozen=True)
class Draws(Method):
    def on_batch(self, run, x, y):
        torch.rand(100, generator=run.generator(self))
        torch.rand(100)
        return x, y


def test_pairs_share_initial_weights_where_shapes_agree_and_the_order_of_the_data():
    a, b, c = Watch(), Watch(), Watch()
    dataset = TASK.load()
    seen = {}
    for seed in (0, 1):
        Arm(name="a", methods=(a,)).run(TASK, dataset, seed)
        Arm(name="b", methods=(Draws(), b), changes={"lr": 0.01, "memory_format": "contiguous"}).run(
            TASK, dataset, seed
        )
        Arm(name="c", methods=(c,), network={"widths": (8, 12)}).run(TASK, dataset, seed)
        seen[seed] = [w.seen[-1] for w in (a, b, c)]
        assert seen[seed][0]["data"] == seen[seed][1]["data"] == seen[seed][2]["data"]
        weights = [s["weights"] for s in seen[seed]]
        assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
        assert torch.equal(weights[0]["stem.weight"], weights[2]["stem.weight"])
        assert weights[2]["head.weight"].shape == (4, 12)
    assert seen[0][0]["data"] != seen[1][0]["data"]
    assert not torch.equal(seen[0][0]["weights"]["stem.weight"], seen[1][0]["weights"]["stem.weight"])


def test_an_arm_is_what_train_does_with_its_changes():
    history = Arm(name="a", changes={"epochs": 2, "lr": 0.05}, network={"widths": (4, 4)}).run(
        TASK, dataset := TASK.load(), 7
    )
    task = TASK.but(epochs=2, lr=0.05)
    same = train(task.build(dataset, 7, widths=(4, 4)), dataset, task.recipe, seed=7)
    assert [r["loss"] for r in history.rows] == [r["loss"] for r in same.rows]
    assert history.structure["widths"] == [4, 4]


def test_an_unknown_change_of_an_arm_is_bad_input():
    with pytest.raises(BadInput, match="unknown setting of a task 'epoch'"):
        compare(TASK, [Arm(name="a", role="baseline"), Arm(name="b", changes={"epoch": 2})], seeds=1)


def stages(task, seed):
    """Two trainings of one network, one after the other."""
    dataset = task.load()
    model = task.build(dataset, seed)
    first = train(model, dataset, task.recipe, seed=seed)
    return first + train(model, dataset, replace(task.recipe, lr=0.01), seed=seed)


def test_stages_make_one_history_on_one_clock():
    found = compare(
        TASK,
        [Arm(name="once", role="baseline"), Arm(name="twice", fit=stages)],
        seeds=1,
        quantity="time per step",
    )
    once, twice = (found.histories(n)[0] for n in ("once", "twice"))
    assert twice.steps == 2 * once.steps
    assert twice.flops == 2 * once.flops
    assert [r["accuracy"] for r in twice.rows[: len(once.rows)]] == [r["accuracy"] for r in once.rows]
    seconds = [r["seconds"] for r in twice.rows]
    assert seconds == sorted(seconds)
    assert found.predicted("twice") == pytest.approx(1)
    assert found.predicted("twice", per_step=False) == pytest.approx(0.5)


# The cache


def plain(history):
    return json.loads(
        json.dumps({**history.__dict__, "rows": [{k: str(v) for k, v in r.items()} for r in history.rows]})
    )


@dataclass(frozen=True)
class Counts(Method):
    def on_fit_end(self, run):
        RUNS.append(("counted", run.seed))


def test_a_second_call_runs_nothing_and_finds_the_same():
    both = [Arm(name="a", role="baseline"), Arm(name="b", methods=(Counts(),))]
    first = compare(TASK, both, seeds=2)
    assert set(RUNS) == {("counted", 0), ("counted", 1)}
    RUNS.clear()
    second = compare(TASK, both, seeds=2)
    assert RUNS == []
    for name in "ab":
        assert [plain(h) for h in first.histories(name)] == [plain(h) for h in second.histories(name)]
    assert [v.record() for v in first.verdicts()] == [v.record() for v in second.verdicts()]
    assert not any("cache" in n for n in first.notes())
    assert any(n.startswith("2 of 2 seeds come from the cache, measured 20") for n in second.notes())


def test_adding_seeds_runs_only_the_missing_ones():
    compare(TASK, arms(BASE, Made("fast")), seeds=2)
    RUNS.clear()
    found = compare(TASK, arms(BASE, Made("fast")), seeds=5)
    assert sorted({s for _, s in RUNS}) == [2, 3, 4]
    assert [b["seed"] for b in found.blocks] == [0, 1, 2, 3, 4]
    RUNS.clear()
    assert len(compare(TASK, arms(BASE, Made("fast")), seeds=1).blocks) == 1
    assert RUNS == []


def test_target_margin_and_number_of_seeds_are_judged_later_and_run_nothing():
    compare(TASK, arms(BASE, Made("fast")), seeds=2)
    RUNS.clear()
    found = compare(replace(TASK, target=50.0, margin=3.0, seeds=2), arms(BASE, Made("fast")), claim=2.0)
    assert RUNS == []
    assert found.task.margin == 3.0


@pytest.mark.parametrize(
    "changed",
    [
        (TASK.but(lr=0.05), arms(BASE, Made("fast"))),
        (TASK.but(images=300), arms(BASE, Made("fast"))),
        (TASK.but(widths={"widths": (8, 4), "blocks": (1, 1)}), arms(BASE, Made("fast"))),
        (TASK.but(network="vgg", widths={}), arms(BASE, Made("fast"))),
        (TASK.but(precision="bf16"), arms(BASE, Made("fast"))),
        (TASK, arms(BASE, Made("fast", seconds=9.0))),
        (TASK, arms(BASE, Made("quick"))),
        (TASK, arms(BASE, Made("fast"), Made("small"))),
        (TASK, [*arms(BASE), Arm(name="fast", fit=Made("fast"), changes={"lr": 0.01})]),
        (TASK, [*arms(BASE), Arm(name="fast", fit=Made("fast"), methods=(Draws(),))]),
    ],
)
def test_a_changed_setting_runs_anew(changed):
    compare(TASK, arms(BASE, Made("fast")), seeds=1)
    RUNS.clear()
    compare(*changed, seeds=1)
    assert {s for _, s in RUNS} == {0}
    assert len(RUNS) == len(changed[1])


def test_changed_data_under_the_same_path_runs_anew(tmp_path):
    import numpy as np

    def write(seed):
        rng = np.random.default_rng(seed)
        images, labels = rng.integers(0, 255, (200, 8, 8, 1), dtype=np.uint8), np.arange(200) % 4
        np.savez(
            tmp_path / "mine.npz",
            train_images=images,
            train_labels=labels,
            test_images=images[:40],
            test_labels=labels[:40],
        )

    task = replace(TASK, dataset=str(tmp_path / "mine.npz"))
    write(0)
    compare(task, arms(BASE, Made("fast")), seeds=1)
    write(0)
    compare(task, arms(BASE, Made("fast")), seeds=1)
    assert len(RUNS) == 2
    write(1)
    compare(task, arms(BASE, Made("fast")), seeds=1)
    assert len(RUNS) == 4


def test_more_threads_are_other_conditions():
    dataset, before = TASK.load(), torch.get_num_threads()
    one = key(TASK, dataset, arms(BASE))
    assert key(TASK, dataset, arms(Made("base"))) == one
    torch.set_num_threads(before + 1)
    try:
        assert key(TASK, dataset, arms(BASE)) != one
    finally:
        torch.set_num_threads(before)


METHOD = '''
from dataclasses import dataclass
from effilib.training import Method

@dataclass(frozen=True)
class Mine(Method):
    """{words}"""

    def on_after_backward(self, run):
        run.model.head.weight.grad *= {factor}  # {words}
'''


def test_a_changed_source_of_a_method_runs_anew_and_a_comment_does_not(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    dataset, keys = TASK.load(), []
    for factor, words in ((1.0, "a"), (1.0, "other words"), (0.5, "a"), (1.0, "a")):
        (tmp_path / "method_of_mine.py").write_text(METHOD.format(factor=factor, words=words))
        sys.modules.pop("method_of_mine", None)
        importlib.invalidate_caches()
        module = importlib.import_module("method_of_mine")
        keys.append(
            key(TASK, dataset, [Arm(name="a", role="baseline"), Arm(name="b", methods=(module.Mine(),))])
        )
    assert keys[0] == keys[1] == keys[3] != keys[2]


NETWORK = """
from torch import nn
def net(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, {width}), nn.ReLU(), nn.Linear({width}, classes))
"""


@pytest.mark.parametrize("where", ["task", "arm"])
def test_a_changed_source_of_a_users_network_runs_anew(where, tmp_path):
    file = tmp_path / "mine.py"
    task = replace(TASK, network=f"{file}:net", widths={}) if where == "task" else TASK
    changes = {} if where == "task" else {"network": f"{file}:net", "widths": {}}
    both = [Arm(name="a", role="baseline", changes=changes), Arm(name="b", changes={**changes, "lr": 0.01})]
    found = []
    for width in (8, 8, 12):
        file.write_text(NETWORK.format(width=width))
        found.append(compare(task, both, seeds=1, quantity="time per step"))
    flops = [f.histories("a")[0].flops for f in found]
    assert flops[0] == flops[1] < flops[2]
    assert "cached" in found[1].blocks[0]


def test_a_cached_baseline_never_meets_a_fresh_method():
    """The unit of the cache is the block of all arms."""
    compare(TASK, arms(BASE, Made("fast")), seeds=2)
    file = next(paths.cache().glob("*/seed-1.json"))
    block = json.loads(file.read_text())
    del block["arms"]["fast"]
    file.write_text(json.dumps(block))
    RUNS.clear()
    compare(TASK, arms(BASE, Made("fast")), seeds=2)
    assert sorted(RUNS) == [("base", 1), ("fast", 1)]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"arms": 3}', '{"seed": 0, "arms": {"base": {"rowz": []}, "fast": {}}}']
)
def test_a_damaged_file_of_the_cache_is_measured_again(content):
    compare(TASK, arms(BASE, Made("fast")), seeds=1)
    file = next(paths.cache().glob("*/seed-0.json"))
    whole = json.loads(file.read_text())
    file.write_text(content)
    RUNS.clear()
    compare(TASK, arms(BASE, Made("fast")), seeds=1)
    assert len(RUNS) == 2
    assert json.loads(file.read_text())["arms"] == whole["arms"]


def test_a_shared_machine_gives_no_verdict_and_its_times_are_not_cached(monkeypatch):
    monkeypatch.setenv("EFFILIB_SHARED", "1")
    found = compare(TASK, arms(BASE, Made("fast", seconds=5.0)), seeds=5)
    assert found.verdict("fast").verdict == SHARED
    assert list(paths.cache().glob("*/*.json")) == []
    monkeypatch.delenv("EFFILIB_SHARED")
    RUNS.clear()
    assert compare(TASK, arms(BASE, Made("fast", seconds=5.0)), seeds=5).verdict("fast").verdict == FASTER
    assert len(RUNS) == 10


SCRIPT = """
import os, signal, sys
from dataclasses import dataclass
sys.path.insert(0, {here!r})
import test_experiment as t
from effilib.experiment import Arm, compare
from effilib.training import Method

@dataclass(frozen=True)
class Notes(Method):
    def on_fit_start(self, run):
        if len(run.dataset.train) > 300 and run.dataset.validation.y.numel() > 8:  # not the burn-in
            with open({log!r}, "a") as f:
                f.write(f"{{run.seed}}\\n")
    def on_step_end(self, run):
        if run.seed == 2 and run.step == 3 and os.environ.get("KILL"):
            os.kill(os.getpid(), signal.SIGKILL)

both = [Arm(name="a", role="baseline"), Arm(name="b", methods=(Notes(),))]
found = compare(t.TASK, both, seeds=4)
print(len(found.blocks), sum("cached" in b for b in found.blocks))
"""


def test_a_killed_comparison_keeps_its_finished_seeds(tmp_path):
    """A real process, SIGKILL in the third seed; a second process runs what is missing and finds it by the
    same key.
    """
    log, script = tmp_path / "log", tmp_path / "script.py"
    script.write_text(SCRIPT.format(here=os.path.dirname(__file__), log=str(log)))
    base = os.path.dirname(os.path.dirname(experiment.__file__))
    environment = {**os.environ, "PYTHONPATH": base}

    def start(**more):
        return subprocess.run(
            [sys.executable, str(script)], env={**environment, **more}, capture_output=True, text=True
        )

    killed = start(KILL="1")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(p.name for p in paths.cache().glob("*/*")) == ["seed-0.json", "seed-1.json"]
    log.unlink()
    again = start()
    assert again.stdout.splitlines()[-1] == "4 2", again.stdout + again.stderr
    assert set(log.read_text().split()) == {"2", "3"}


# Stalls


@dataclass(frozen=True)
class Stalls(Method):
    """Really sleeps in some steps of the first run of a seed."""

    seen: list = field(default_factory=list, hash=False, compare=False, repr=False)

    def on_step_end(self, run):
        if run.step == 0:
            self.seen.append(run.seed)
        if run.step % 4 == 1 and self.seen.count(run.seed) == 1:
            time.sleep(0.15)


def test_a_seed_with_too_many_stalled_steps_is_run_again():
    task = TASK.but(epochs=4)
    assert len(task.load().train) // 64 == 5  # steps an epoch: enough for a median
    stalls = Stalls()
    found = measure(task, [Arm(name="a", role="baseline"), Arm(name="b", methods=(stalls,))], [5])
    assert stalls.seen.count(5) >= 2
    assert found[0]["attempts"] == stalls.seen.count(5)
    comparison = experiment.Comparison(
        task=task, arms=(Arm(name="a", role="baseline"), Arm(name="b")), blocks=found
    )
    assert "Seeds run again because over 5% of their steps stalled: [5]." in comparison.notes()


def test_a_seed_that_stalls_every_time_is_kept_after_three_attempts_and_said():
    found = compare(TASK, arms(BASE, Made("fast", capped=2)), seeds=2)
    assert Counter(RUNS) == {("base", 0): 3, ("fast", 0): 3, ("base", 1): 3, ("fast", 1): 3}
    assert found.notes()[0] == "4 of 80 steps stalled and were capped; raw 44.0 s, counted 40.0 s."
    assert "Seeds run again because over 5% of their steps stalled: [0, 1]." in found.notes()


def test_one_capped_step_in_twenty_is_borne():
    compare(TASK, arms(BASE, Made("fast", capped=1)), seeds=1)
    assert len(RUNS) == 2


# Bad input


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "the first arm, and no other, has the role 'baseline'"),
        ([Arm(name="a")], "the first arm, and no other"),
        ([Arm(name="a", role="baseline"), Arm(name="b", role="baseline")], "the first arm, and no other"),
        ([Arm(name="a"), Arm(name="b", role="baseline")], "the first arm, and no other"),
        (
            [Arm(name="a", role="baseline"), Arm(name="b", role="controll")],
            "the others are 'method' or 'control'",
        ),
        ([Arm(name="a", role="baseline"), Arm(name="a")], "arms need names of their own, got a, a"),
    ],
)
def test_arms_that_cannot_be_compared_are_bad_input(given, words):
    with pytest.raises(BadInput, match=words):
        compare(TASK, given)
    assert not paths.cache().exists()


def test_an_unknown_quantity_is_bad_input():
    with pytest.raises(
        BadInput,
        match="unknown quantity 'time to step': choose one of time to target, time per step, training time",
    ):
        compare(TASK, arms(BASE), quantity="time to step")


@pytest.mark.parametrize("seeds", [-1, 1.5, "3"])
def test_a_number_of_seeds_that_cannot_be_is_bad_input(seeds):
    with pytest.raises(BadInput, match=f"seeds is {seeds!r}"):
        compare(TASK, arms(BASE), seeds=seeds)


def test_a_batch_larger_than_the_split_is_bad_input_before_anything_is_cached():
    with pytest.raises(BadInput, match="batch size 5000 does not fit synthetic"):
        compare(TASK, [Arm(name="a", role="baseline", changes={"batch_size": 5000})], seeds=1)
    assert list(paths.cache().glob("*/*.json")) == []


def test_results_that_cannot_be_written_are_bad_input_before_anything_runs(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EFFILIB_RESULTS", str(tmp_path / "file" / "results"))
    with pytest.raises(BadInput, match="cannot write results into"):
        compare(TASK, arms(BASE))
    assert RUNS == []


# The pilot


def test_a_target_that_is_there_needs_no_pilot():
    assert pilot(TASK) is TASK
    assert not paths.cache().exists()


def test_the_pilot_finds_the_target_with_seeds_that_are_never_measured():
    task = replace(TASK, target=None, margin=1.0).but(epochs=3)
    found = pilot(task)
    dataset = task.load()
    runs = [train(task.build(dataset, s), dataset, task.recipe, seed=s) for s in experiment.PILOT_SEEDS]
    assert found.target == round(min(held(h.rows) for h in runs) - 2 * 1.0, 1)
    assert pilot(task, margins=3).target == pytest.approx(found.target - 1.0)
    assert min(experiment.PILOT_SEEDS) > 999
    names = {p.name for p in paths.cache().glob("*/*")}
    assert names == {f"seed-{s}.json" for s in experiment.PILOT_SEEDS}


def test_the_pilot_is_run_before_the_arms_and_only_where_time_to_target_is_judged():
    task = replace(TASK, target=None)
    found = compare(task, arms(BASE, Made("fast")), seeds=1, quantity="time per step")
    assert found.task.target is None
    assert not any("2000" in p.name for p in paths.cache().glob("*/*"))
    found = compare(task, arms(BASE, Made("fast")), seeds=1)
    assert found.task.target is not None
    assert set(RUNS) == {("base", 0), ("fast", 0)}  # the arms' own functions never saw the pilot's seeds


# What is said of it


def verdict(*fits, seeds=5, task=TASK, **options):
    return compare(task, arms(*fits), seeds=seeds, **options).verdict(fits[1].name)


def test_verdicts_follow_from_the_histories():
    fast = verdict(BASE, Made("fast", seconds=5.0), claim=1.5)
    assert fast.verdict == FASTER
    assert fast.ratio == pytest.approx(2.0)
    assert fast.n == fast.reached == 5
    assert fast.claim_reproduced == "yes"
    assert fast.against == "base"
    assert verdict(BASE, Made("fast", seconds=5.0), claim=3.0).claim_reproduced == "no"
    assert verdict(BASE, Made("slow", seconds=20.0)).verdict == SLOWER
    worse = verdict(BASE, Made("worse", seconds=5.0, accuracy=85.0))
    assert worse.verdict == LESS_ACCURATE
    assert worse.accuracy_difference == pytest.approx(-5.0)
    missed = verdict(BASE, Made("missed", seconds=5.0, missed=(3,)))
    assert (missed.verdict, missed.ratio, missed.text) == (MISSED, None, "4 of 5 reached the target")
    assert verdict(Made("base", missed=(0,)), Made("fast", seconds=5.0)).verdict == INCONCLUSIVE
    assert verdict(BASE, Made("fast", seconds=5.0), seeds=3).verdict == INCONCLUSIVE


def test_time_per_step_is_judged_by_the_median_step():
    found = verdict(BASE, Made("fast", seconds=50.0, step=0.004), quantity="time per step")
    assert found.ratio == pytest.approx(2.5)
    assert found.quantity == "time per step"
    assert found.verdict == FASTER


def test_training_time_is_judged_by_the_whole_run_and_needs_no_target():
    task = replace(TASK, target=None)
    found = compare(
        task, arms(Made("base", seconds=10.0), Made("fast", seconds=5.0)), seeds=5, quantity="training time"
    )
    assert found.task.target is None
    assert found.verdict("fast").ratio == pytest.approx(stats_ratio(found))
    assert found.verdict("fast").quantity == "training time"


def stats_ratio(found):
    base, fast = ([h.seconds for h in found.histories(n)] for n in ("base", "fast"))
    return math.exp(sum(math.log(b / f) for b, f in zip(base, fast, strict=True)) / len(base))


def test_verdicts_are_withheld_from_smoke_runs_and_illustrations():
    fast = Made("fast", seconds=5.0)
    assert verdict(BASE, fast, task=replace(TASK, preset="smoke")).verdict == SMOKE
    assert verdict(BASE, fast, illustration=True).verdict == "illustration, no verdict"


def test_claims_may_differ_by_arm():
    found = compare(
        TASK, arms(BASE, Made("fast", seconds=5.0), Made("small", seconds=5.0)), seeds=5, claim={"fast": 3.0}
    )
    assert [v.claim_reproduced for v in found.verdicts()] == ["no", "not tested"]
    assert [v.arm for v in found.verdicts()] == ["fast", "small"]


def test_flops_predict_a_ratio_of_the_run_or_of_a_step():
    found = compare(TASK, arms(BASE, Made("fast", flops=5e8), Made("none", flops=0.0)), seeds=2)
    assert found.predicted("fast") == pytest.approx(2.0)
    assert math.isnan(found.predicted("none"))


def test_the_table_says_everything_that_is_judged():
    fast = Made("fast", seconds=5.0, accuracy=91.0, flops=5e8, step=0.005)
    found = compare(TASK, arms(BASE, fast, Made("missed", missed=(0, 1))), seeds=5, claim=1.5)
    table = found.table()
    assert list(table.index) == ["base", "fast", "missed"]
    fast = table.loc["fast"]
    assert fast["role"] == "method"
    assert fast["n"] == 5
    assert fast["step ms"] == pytest.approx(5.05)
    assert fast["step speed-up"] == "2.00x [2.00, 2.00]"
    assert fast["reached"] == "5 of 5"
    assert fast["accuracy %"].startswith("91.04 ± ")
    assert fast["test %"] == pytest.approx(90.0)
    assert fast["TFLOP"] == pytest.approx(5e-4)
    assert fast["memory MB"] == pytest.approx(2)  # what is counted, not the allocator's peak
    assert fast["predicted"] == "2.00x"
    assert fast["measured"].startswith("2.0")
    assert fast["verdict"] == FASTER
    assert fast["claim reproduced"] == "yes"
    assert table.loc[
        "base", ["step speed-up", "predicted", "measured", "verdict", "claim reproduced"]
    ].tolist() == ["1", "1", "1", "", ""]
    assert table.loc["missed", "reached"] == "3 of 5"
    assert table.loc["missed", "verdict"] == MISSED
    assert "s to 60 %" in table.columns


def test_the_table_of_one_seed_pretends_no_interval():
    table = compare(TASK, arms(BASE, Made("fast")), seeds=1).table()
    assert "[" not in table.loc["fast", "step speed-up"]
    assert "±" not in table.loc["fast", "accuracy %"]


def test_the_table_without_a_target_has_none():
    table = compare(
        replace(TASK, target=None), arms(BASE, Made("fast")), seeds=2, quantity="time per step"
    ).table()
    assert not any(c.startswith("s to") for c in table.columns)
    assert "reached" not in table.columns


def test_the_history_has_a_row_for_every_evaluation():
    history = compare(TASK, arms(BASE, Made("fast")), seeds=3).history()
    assert list(history.columns) == [
        "arm",
        "seed",
        "step",
        "epoch",
        "seconds",
        "lr",
        "train_loss",
        "loss",
        "accuracy",
    ]
    assert len(history) == 2 * 3 * 3
    assert isinstance(history, pd.DataFrame)
    assert set(zip(history.arm, history.seed, strict=True)) == {
        (a, s) for a in ("base", "fast") for s in range(3)
    }
    assert history[(history.arm == "fast") & (history.seed == 1)].accuracy.tolist() == [10, 90, 90.1]


def test_the_notes_name_what_diverged():
    @dataclass(frozen=True)
    class Diverging(Made):
        def __call__(self, task, seed):
            return replace(super().__call__(task, seed), diverged=True)

    assert "Diverged: fast." in compare(TASK, arms(BASE, Diverging("fast")), seeds=1).notes()


def test_a_whole_small_comparison_of_real_trainings():
    task = TASK.but(epochs=2)
    found = compare(
        task,
        [Arm(name="base", role="baseline"), Arm(name="short", role="control", changes={"epochs": 1})],
        seeds=2,
    )
    assert found.predicted("short") == pytest.approx(2.0)
    assert found.predicted("short", per_step=True) == pytest.approx(1.0)
    assert found.machine["threads"] == torch.get_num_threads()
    assert all(h.test_accuracy is not None for h in found.histories("short"))
    assert found.table().loc["short", "role"] == "control"
