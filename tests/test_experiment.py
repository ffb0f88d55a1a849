"""Cells: fair order, pairs, lengths, the cache, resuming after a kill. What is said of them: test_results."""

import importlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
import torch

from effilib import clock, experiment, paths
from effilib.errors import BadInput
from effilib.experiment import Arm, cells, find_lengths, key, measure, order
from effilib.history import History
from effilib.hooks import Method
from effilib.recipe import Recipe
from effilib.results import compare
from effilib.tasks import Task
from effilib.training import train

RECIPE = Recipe(epochs=1, batch_size=64, precision="fp32")
TASK = Task(
    preset="quick",
    dataset="synthetic",
    widths={"widths": (8, 8), "blocks": (1, 1)},
    recipe=RECIPE,
    lengths=(0.5, 1.0),
    seeds=2,
)


pytestmark = pytest.mark.usefixtures("alone")


RUNS = []  # (arm, seed) of every run made here


@dataclass(frozen=True)
class Made:
    """A fit that takes no time: what an arm's history is, is written down here."""

    name: str
    seconds: float = 10.0  # of a whole run at length 1
    diverged: bool = False

    def __call__(self, task, seed):
        RUNS.append((self.name, seed))
        length = task.recipe.epochs / RECIPE.epochs
        row = dict(
            step=20,
            epoch=length,
            seconds=self.seconds * length,
            lr=0.0,
            train_loss=1.0,
            loss=1.0,
            accuracy=90.0,
        )
        return History(
            rows=[row], steps=20, seconds=self.seconds * length, raw_seconds=self.seconds * length, flops=1e9,
            diverged=self.diverged,
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


def test_every_length_of_a_block_has_a_seed_of_its_own():
    found = cells(TASK.but(seeds=3, lengths=(0.5, 0.71, 1.0)))
    assert found[:3] == [(0, 0), (1, 100), (2, 200)]
    assert len({seed for _, seed in found}) == len(found) == 9
    assert (
        max(seed for _, seed in cells(TASK.but(seeds=100, lengths=tuple(range(1, 10))))) < 1000
    )  # tuning's begin there


def test_the_arms_of_every_cell_run_in_that_order():
    names = ["base", "fast", "small"]
    measure(TASK, arms(*map(Made, names)))
    seeds = [0, 100, 1, 101]
    at = [0, 1, 1, 2]  # block + length
    assert [(name, s) for i, s in zip(at, seeds, strict=True) for name in order(names, i)] == RUNS


@pytest.mark.parametrize("names", ["AB", "ABC"])
def test_at_every_length_each_arm_is_first_equally_often(names):
    measure(TASK.but(lengths=(0.5, 0.71, 1.0), seeds=12), arms(*map(Made, names)))
    for i in range(3):
        first = [name for k, (name, s) in enumerate(RUNS) if s // 100 == i and k % len(names) == 0]
        assert Counter(first) == dict.fromkeys(names, 12 // len(names))


# Lengths


def test_a_pilot_gives_a_method_the_lengths_that_take_the_baselines_time():
    both = arms(Made("base", 10.0), Made("slow", 40.0), Made("fast", 6.0))
    found = find_lengths(TASK, both)
    assert found == {"base": (0.5, 1.0), "slow": (0.12, 0.25), "fast": (0.83, 1.7)}
    assert {s for _, s in RUNS} == {experiment.PILOT_SEED}
    RUNS.clear()
    assert find_lengths(TASK, both) == found  # the pilot is kept
    assert RUNS == []
    cell = measure(TASK, both, lengths=found)[1]
    assert {n: round(h.seconds, 1) for n, h in cell["arms"].items()} == {
        "base": 10.0,
        "slow": 10.0,
        "fast": 10.2,
    }
    assert cell["lengths"] == {"base": 1.0, "slow": 0.25, "fast": 1.7}


def test_a_run_that_diverged_in_the_pilot_sets_no_lengths():
    for base, fast in ((True, False), (False, True)):
        both = arms(Made("base", 1.0, base), Made("fast", 10.0, fast))
        assert find_lengths(TASK, both)["fast"] == TASK.lengths


def test_there_is_no_pilot_where_lengths_are_given_or_times_mean_nothing():
    near = arms(Made("base", 10.0), Made("near", 10.5))
    assert find_lengths(TASK, near)["near"] == (0.5, 1.0)
    RUNS.clear()
    own = [*arms(BASE), Arm(name="own", fit=Made("own", 40.0), lengths=(0.3, 0.6))]
    assert find_lengths(TASK, own)["own"] == (0.3, 0.6)
    assert find_lengths(replace(TASK, preset="smoke"), arms(BASE, Made("slow", 99.0)))["slow"] == (0.5, 1.0)
    assert find_lengths(replace(TASK, axis="images"), arms(BASE, Made("slow", 99.0)))["slow"] == (0.5, 1.0)
    assert RUNS == []


def test_an_arm_trains_its_share_of_the_epochs_with_what_was_tuned_for_it():
    task = TASK.but(epochs=4, tuned={2.0: {"lr": 0.3}, 4.0: {"lr": 0.1}})
    arm = Arm(name="a")
    assert [(t.recipe.epochs, t.recipe.lr) for t in (arm.task(task, x) for x in (0.5, 1.0))] == [
        (2, 0.3),
        (4, 0.1),
    ]
    assert Arm(name="b", changes={"lr": 0.7}).task(task, 0.5).recipe.lr == 0.7
    assert Arm(name="c", tuned={1.0: {"lr": 0.9}}).task(task, 0.5).recipe.lr == 0.9
    assert Arm(name="d", changes={"epochs": 8}).task(task, 0.5).recipe.epochs == 4


def test_lengths_may_be_shares_of_the_images_at_equal_updates():
    task = TASK.but(images=320, axis="images", lengths=(0.25, 1.0), batch_size=16)
    runs = [measure(task.but(seeds=1), [Arm(name="a", role="baseline")])[i]["arms"]["a"] for i in (0, 1)]
    assert [h.images for h in runs] == [80, 320]
    assert runs[0].steps == runs[1].steps == 20


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
    both = [Arm(name="once", role="baseline"), Arm(name="twice", fit=stages)]
    once, twice = measure(TASK.but(seeds=1), both)[0]["arms"].values()
    assert twice.steps == 2 * once.steps
    assert twice.flops == 2 * once.flops
    assert [r["accuracy"] for r in twice.rows[: len(once.rows)]] == [r["accuracy"] for r in once.rows]
    seconds = [r["seconds"] for r in twice.rows]
    assert seconds == sorted(seconds)


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
    assert {s for _, s in RUNS} == {0, 100, 1, 101, experiment.PILOT_SEED}
    RUNS.clear()
    second = compare(TASK, both, seeds=2)
    assert RUNS == []
    for name in "ab":
        assert [plain(h) for h in first.histories(name)] == [plain(h) for h in second.histories(name)]
    assert [v.record() for v in first.verdicts()] == [v.record() for v in second.verdicts()]
    assert not any("cache" in n for n in first.notes())
    assert any(n.startswith("4 of 4 cells come from the cache, measured 20") for n in second.notes())


def test_adding_seeds_or_lengths_runs_only_the_missing_cells():
    both = arms(BASE, Made("fast"))
    measure(TASK, both)
    RUNS.clear()
    found = measure(TASK.but(seeds=4), both)
    assert sorted({s for _, s in RUNS}) == [2, 3, 102, 103]
    assert [c["seed"] for c in found] == [0, 100, 1, 101, 2, 102, 3, 103]
    RUNS.clear()
    measure(TASK.but(lengths=(0.5, 1.0, 2.0)), both)
    assert sorted({s for _, s in RUNS}) == [200, 201]
    RUNS.clear()
    assert len(measure(TASK.but(seeds=1), both)) == 2
    assert RUNS == []


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
    measure(TASK.but(seeds=1), arms(BASE, Made("fast")))
    RUNS.clear()
    measure(changed[0].but(seeds=1), changed[1])
    assert {s for _, s in RUNS} == {0, 100}
    assert len(RUNS) == 2 * len(changed[1])


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
    measure(task.but(seeds=1), arms(BASE, Made("fast")))
    write(0)
    measure(task.but(seeds=1), arms(BASE, Made("fast")))
    assert len(RUNS) == 4
    write(1)
    measure(task.but(seeds=1), arms(BASE, Made("fast")))
    assert len(RUNS) == 8


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
from effilib.hooks import Method

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
        found.append(measure(task.but(seeds=1), both))
    flops = [f[0]["arms"]["a"].flops for f in found]
    assert flops[0] == flops[1] < flops[2]
    assert "cached" in found[1][0]


def test_a_cached_baseline_never_meets_a_fresh_method():
    """The unit of the cache is the cell of all arms."""
    measure(TASK, arms(BASE, Made("fast")))
    file = next(paths.cache().glob("*/*-seed-1.json"))
    cell = json.loads(file.read_text())
    del cell["arms"]["fast"]
    file.write_text(json.dumps(cell))
    RUNS.clear()
    measure(TASK, arms(BASE, Made("fast")))
    assert sorted(RUNS) == [("base", 1), ("fast", 1)]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"arms": 3}', '{"seed": 0, "arms": {"base": {"rowz": []}, "fast": {}}}']
)
def test_a_damaged_file_of_the_cache_is_measured_again(content):
    measure(TASK, arms(BASE, Made("fast")))
    file = next(paths.cache().glob("*/*-seed-0.json"))
    whole = json.loads(file.read_text())
    file.write_text(content)
    RUNS.clear()
    measure(TASK, arms(BASE, Made("fast")))
    assert len(RUNS) == 2
    assert json.loads(file.read_text())["arms"] == whole["arms"]


def test_what_was_measured_beside_something_else_is_marked_and_not_kept(monkeypatch):
    monkeypatch.setenv("EFFILIB_SHARED", "1")
    assert all(c["shared"] for c in measure(TASK, arms(BASE, Made("fast"))))
    assert list(paths.cache().glob("*/*.json")) == []
    monkeypatch.delenv("EFFILIB_SHARED")
    with clock.Measuring():  # as another process would hold it
        assert all(c["shared"] for c in measure(TASK, arms(BASE, Made("fast"))))
    assert not any(c["shared"] for c in measure(TASK, arms(BASE, Made("fast"))))
    assert len(list(paths.cache().glob("*/*.json"))) == 4


def test_on_cuda_a_stall_of_one_seed_is_taken_off():
    steps = [[1.0] * 10 for _ in range(3)]
    steps[1][4] = 61.0
    arm = Arm(name="a", role="baseline")
    runs = [History(seconds=sum(s), raw_seconds=sum(s), step_times=s, steps=10) for s in steps]
    found = experiment._without_stalls([{"length": 1.0, "arms": {"a": h}} for h in runs], [arm])
    assert [c["arms"]["a"].seconds for c in found] == [10, 10, 10]


SCRIPT = """
import os, signal, sys
from pathlib import Path
from dataclasses import dataclass
sys.path.insert(0, {here!r})
import test_experiment as t
from effilib import Arm, compare
from effilib.hooks import Method

@dataclass(frozen=True)
class Notes(Method):
    def on_fit_start(self, run):
        if len(run.dataset.train) > 300 and run.dataset.validation.y.numel() > 8:  # not the burn-in
            with open({log!r}, "a") as f:
                f.write(f"{{run.seed}}\\n")
    def on_step_end(self, run):
        if run.seed == 1 and run.step == 1 and os.environ.get("KILL"):
            os.kill(os.getpid(), signal.SIGKILL)

t.clock.NOTES = Path({notes!r})
both = [Arm(name="a", role="baseline"), Arm(name="b", methods=(Notes(),))]
found = compare(t.TASK, both)
print(len(found.cells), sum("cached" in c for c in found.cells))
"""


def test_a_killed_comparison_keeps_its_finished_cells(tmp_path):
    """A real process, SIGKILL in the third cell; a second process runs what is missing and finds it by the
    same key.
    """
    log, script = tmp_path / "log", tmp_path / "script.py"
    notes = str(tmp_path / "notes")
    script.write_text(SCRIPT.format(here=os.path.dirname(__file__), log=str(log), notes=notes))
    base = os.path.dirname(os.path.dirname(experiment.__file__))
    environment = {**os.environ, "PYTHONPATH": base}

    def start(**more):
        return subprocess.run(
            [sys.executable, str(script)], env={**environment, **more}, capture_output=True, text=True
        )

    killed = start(KILL="1")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    kept = sorted(p.name.partition("-seed-")[2] for p in paths.cache().glob("*/*"))
    assert kept == ["0.json", "100.json", "2000.json"]
    log.unlink()
    again = start()
    assert again.stdout.splitlines()[-1] == "4 2", again.stdout + again.stderr
    assert set(log.read_text().split()) == {"1", "101"}


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


def test_an_arms_own_lengths_are_as_many_as_the_tasks():
    with pytest.raises(BadInput, match="arm b has 1 lengths, the task has 2"):
        compare(TASK, [*arms(BASE), Arm(name="b", lengths=(1.0,))])


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
