"""Chapter 10: the front, the selection, who goes with whom, what does not apply, the plan of seeds, the
tables and the advice.
"""

import itertools
import json
import math
import subprocess
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effilib import clock, notebook, paths, provenance
from effilib.chapters import advice, selection, tree_cnn
from effilib.chapters import comparison as chapter
from effilib.chapters import contenders as who
from effilib.chapters import records as recorded
from effilib.chapters.attempts import WholeTree, attempted, refused, tried
from effilib.chapters.comparison import MIXED
from effilib.chapters.contenders import DENSE, FP32, GIVEN, Contender, clash, combined
from effilib.errors import BadInput, NoEffect
from effilib.experiment import PILOT_SEEDS, Arm, Comparison, compare, pilot
from effilib.methods.kernel_rescaling import KernelRescaling
from effilib.methods.tree_cnn import TreeCNN
from effilib.methods.wavelet import WaveletStem
from effilib.statistics import FASTER, INCONCLUSIVE, SLOWER, Verdict
from effilib.tasks import task
from effilib.training import History
from effilib.workbook import series

TASK = task("smoke", "synthetic")
DATA = TASK.load()
FOUND = who.contenders(TASK, DATA)
BY_NAME = {c.name: c for c in FOUND}
ABLE = [c for c in FOUND if c.arm and not c.arm.fit]

pytestmark = pytest.mark.usefixtures("results")


def history(seconds=10.0, accuracy=90.0, reached=True):
    """A run that was not made: its accuracy rises to `accuracy` in four evaluations."""
    shares = (0.1, 0.6, 0.9, 1.0, 1.0) if reached else (0.1, 0.2, 0.3, 0.3, 0.3)
    rows = [
        {
            "step": i,
            "epoch": i,
            "seconds": seconds * i / 4,
            "lr": 0.1,
            "train_loss": 1.0,
            "loss": 1.0,
            "accuracy": accuracy * share,
        }
        for i, share in enumerate(shares)
    ]
    kinds = {"step": {"count": 20, "seconds": seconds, "median": seconds / 20}}
    time = dict(seconds=seconds, raw_seconds=seconds, timed=20, kinds=kinds)
    return History(rows=rows, steps=20, flops=1e9, memory={"saved": 2**20}, test_accuracy=accuracy, **time)


# The front


def brute(points):
    """Indices of the points that no other beats, by asking every other."""
    return {
        i
        for i, (x, y) in enumerate(points)
        if not any(u <= x and v >= y and (u, v) != (x, y) for u, v in points)
    }  # fmt: skip


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12))
def test_the_front_is_what_no_other_arm_beats(points):
    found = chapter.front(points)
    assert set(found) == brute(points)
    assert [points[i][0] for i in found] == sorted(points[i][0] for i in found)
    assert [points[i][1] for i in found] == sorted(points[i][1] for i in found)


def test_toys_are_those_in_the_text():
    table = chapter.toy()
    assert table["on the front"].to_dict() == {"a": "yes", "b": "yes", "c": "", "d": "yes", "e": ""}
    assert table["beaten by"].to_dict() == {"a": "", "b": "", "c": "b", "d": "", "e": "d"}
    table = selection.toy()
    assert list(table[table[""] == "chosen"].index) == ["a + b"]
    assert list(table.index) == ["baseline", "a", "b", "c", "a + b", "a + c", "a + b + c"]


def test_checks_find_the_front_exact_and_the_greedy_choice_only_where_effects_add_up():
    found = chapter.check(50)["result"]
    assert found.iloc[0] == "0"
    assert found.iloc[1] == "0 of 50"
    assert 0 < int(found.iloc[2].split()[0]) < 50


# The selection


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(-5, 5), min_size=1), st.integers(1, 6))
def test_where_effects_add_up_the_greedy_choice_is_the_best_one(effects, rounds):
    def measured(combinations):
        return {c: sum(effects[n] for n in c) for c in combinations}

    chosen, tried = selection.forward(list(effects), measured, rounds=rounds)
    best = min(
        sum(effects[n] for n in c)
        for k in range(rounds + 1)
        for c in itertools.combinations(effects, min(k, len(effects)))
    )
    assert tried[chosen] == best
    assert all(effects[n] < 0 for n in chosen)
    assert tried[()] == 0


@given(
    st.dictionaries(st.sampled_from("abcd"), st.integers(-5, 5), min_size=2),
    st.sets(st.sampled_from(["ab", "bc", "cd", "ad"])),
)
def test_what_clashes_is_never_tried_and_each_round_improves(effects, pairs):
    def clash(a, b):
        return "no" if {a, b} in map(set, pairs) else ""

    calls = []

    def measured(combinations):
        calls.append(len(combinations[0]))
        return {c: sum(effects[n] for n in c) for c in combinations}

    chosen, tried = selection.forward(list(effects), measured, clash, rounds=4)
    assert not any(clash(a, b) for c in tried for a, b in itertools.combinations(c, 2))
    assert calls == list(range(len(calls)))  # one call a round
    path = [tried[chosen[:k]] for k in range(len(chosen) + 1)]
    assert all(b < a for a, b in itertools.pairwise(path))


def test_scores_put_missing_the_target_first_then_accuracy_then_time():
    base = [history(10, 90), history(20, 90)]

    def s(*runs):
        return selection.score(base, runs, 80.0, 1.0)

    half = s(history(5, 90), history(10, 90))
    assert half == selection.Score(0, False, pytest.approx(0.5))
    less = s(history(5, 88), history(10, 88))
    assert less[:2] == (0, True)
    missed = s(history(1, 90), history(1, 90, reached=False))
    assert missed.missed == 1
    assert half < s(history(9, 90), history(18, 90)) < less < missed
    assert s(*base).time == 1


def made_trial(preset="study", **changes):
    """A trial that was not run: four methods, one of them slow, one refused."""
    found = [Contender(name=n, arm=Arm(name=n), holds=(n,)) for n in ("fast", "slow", "useless", "refused")]
    found.append(Contender(name="staged", arm=Arm(name="staged", fit=len)))
    runs = {
        "fast": history(6),
        "slow": history(40),
        "useless": history(10, 50, reached=False),
        "staged": history(8),
    }
    values = dict(
        task=replace(TASK, preset=preset, target=80.0, seeds=5), contenders=tuple(found), baseline=history(), histories=runs,
        slow={"slow": "4.0x"}, factors={n: h.seconds / 10 for n, h in runs.items()}, refused={"refused": "no pooling"}, seconds=100.0,
    )  # fmt: skip
    return selection.Trial(**values | changes)


def made_selection(chosen=("fast",), prescribed=("fast", "useless")):
    known = {
        (): selection.Score(0, False, 1.0),
        ("fast",): selection.Score(0, False, 0.6),
        ("fast", "useless"): selection.Score(1, True, 0.9),
    }
    histories = {c: history(6) for c in known if c}
    return selection.Selection(
        chosen=chosen, prescribed=prescribed, tried=known, histories=histories, refused={}, seconds=50.0
    )


RUNS = []


@dataclass(frozen=True, kw_only=True)
class Learner:
    """A training that is not made: it takes 10 s at the task's length on 100 % of the work, and its accuracy
    grows with the epochs.
    """

    work: float
    limit: float = math.inf

    def __call__(self, task, seed):
        RUNS.append((self.work, task.recipe.epochs))
        share = task.recipe.epochs / TASK.recipe.epochs
        return history(10 * self.work * share, min(self.limit, 79 + 10 * share * self.work**0.5))


def test_what_saves_time_but_loses_accuracy_gets_more_epochs():
    study = replace(TASK, target=75.0, margin=0.5, preset="study")
    arms = {
        n: Arm(name=n, fit=f)
        for n, f in (
            ("quick", Learner(work=0.5)),
            ("vain", Learner(work=0.5, limit=84)),
            ("dear", Learner(work=0.89)),
        )
    }
    base = [history(10, 90)]
    RUNS.clear()
    spent, own = [], {n: [a.fit(study, 0)] for n, a in arms.items()}
    found = selection.fill(study, list(arms.values()), [PILOT_SEEDS[0]], base, own, spent)
    arm, runs = found[
        "quick"
    ]  # 89.5 % takes 1.49 times the epochs, 0.74 of the time: the share of 0.8 has them
    assert sum(spent) == pytest.approx(
        selection.OVERHEAD * (9 + 8 + 7 + 9)
    )  # what gains nothing in 0.9 of the time is not tried in less
    assert list(found) == ["quick"]
    assert who.length(study, arm) == pytest.approx(1.6)
    assert runs[0].seconds == pytest.approx(8)
    assert [round(e / TASK.recipe.epochs, 2) for work, e in RUNS if work == 0.5] == [1, 1, 1.8, 1.8, 1.6, 1.4]
    assert len([e for work, e in RUNS if work == 0.89]) == 1  # it fills its share already
    equal = {"quick": [history(5, 90)]}
    assert selection.fill(study, [arms["quick"]], [PILOT_SEEDS[0]], base, equal, []) == {}


def test_more_epochs_are_for_one_training_whose_length_is_not_what_it_changes():
    able = {n for n, c in BY_NAME.items() if c.stretches}
    assert {"resizing", "wavelet stem", "PruneTrain", "smaller network"} - {
        c.name for c in FOUND if c.arm and c.arm.fit
    } <= able
    assert not able & {"shorter schedule", "prune, then grow", "Tree-CNN", GIVEN}
    assert not Contender(name="gone").stretches


def test_more_epochs_stay_with_the_arm():
    trial = made_trial()
    longer = who.lengthened(trial.task, trial.find("fast").arm, 1.25)
    picked = replace(made_selection(), arms={("fast",): longer})
    found = chapter.plan(BOOK, trial, picked)
    assert next(a for a in found.judged if a.name == "fast") == longer
    assert found.notes["fast"] == "1.25x the epochs"
    trial = replace(
        trial, contenders=tuple(replace(c, arm=longer) if c.name == "fast" else c for c in trial.contenders)
    )
    both = made_selection().arm(trial, ("fast", "useless"))
    assert who.length(trial.task, both) == pytest.approx(1.25)
    assert selection.screen_table(trial).loc["fast", "epochs"] == "1.25x"
    assert selection.table(trial, made_selection()).loc["fast + useless", "epochs"] == "1.25x"


def test_candidates_reach_the_target_alone_are_one_training_and_not_slow():
    assert made_trial().candidates == ["fast"]
    assert made_trial(slow={"fast": "", "slow": ""}).candidates == []


BOOK, ASKED = (SimpleNamespace(parameters={"seeds": n}) for n in (0, 4))


def test_the_plan_gives_slow_arms_one_seed_and_the_rest_what_fits():
    trial, picked = made_trial(), made_selection()
    found = chapter.plan(BOOK, trial, picked)
    assert [a.name for a in found.once] == ["slow"]
    assert [a.name for a in found.judged] == [
        "useless",
        "staged",
        "fast",
        "fast + useless",
    ]  # the chosen one is a single method
    assert found.notes == {"slow": "one seed: 4.0x"}
    assert found.seeds == 5
    assert found.claims == {"fast": chapter.AIM, "fast + useless": chapter.AIM}
    slow_machine = made_trial(
        baseline=history(100), histories={n: history(100) for n in trial.histories}, factors=trial.factors
    )
    fewer = chapter.plan(BOOK, slow_machine, picked)
    assert fewer.seeds < 5
    missed = {**slow_machine.histories, "useless": history(100, 60, reached=False)}
    alone = chapter.plan(BOOK, replace(slow_machine, histories=missed), made_selection(prescribed=("fast",)))
    assert [a.name for a in alone.once] == ["slow", "useless"]  # what missed the target comes first
    assert alone.notes["useless"] == "one seed: missed the target in its pilot, -72.0 points"
    assert float(fewer.table.loc["together", "seconds"]) < chapter.BUDGET["study"] * 1.05
    assert (
        chapter.plan(ASKED, replace(slow_machine, task=replace(trial.task, seeds=4)), picked).seeds == 4
    )  # who asks for seeds gets them
    assert (
        chapter.plan(BOOK, replace(slow_machine, task=replace(trial.task, preset="full")), picked).seeds == 5
    )


def test_in_the_quick_preset_single_methods_have_one_seed():
    found = chapter.plan(BOOK, made_trial("quick", seconds=0.0), made_selection(("fast", "useless")))
    assert [a.name for a in found.judged] == ["fast + useless"]
    assert [a.name for a in found.once] == ["fast", "slow", "useless", "staged"]
    assert found.notes["fast"] == "one seed: preset quick"


# Who goes with whom


def test_every_method_of_the_workbook_takes_part():
    chapters = {c.stem for c in series.CHAPTERS if c.module} - {
        "03_2_mixed_precision"
    }  # that one is in every arm, and fp32 its control
    assert {c.stem for c in FOUND if c.stem} == chapters
    assert len(BY_NAME) == len(FOUND)
    for preset in ("quick", "study", "full"):
        found = who.contenders(replace(TASK, preset=preset), DATA)
        assert [c.name for c in found] == list(BY_NAME)
        assert {c.name for c in found if not c.arm} <= {FP32}
        assert all(c.arm.name == c.name for c in found if c.arm)
    assert set(selection.PRESCRIBED) <= {c.name for c in ABLE}


@pytest.mark.parametrize(
    ("a", "b", "why"),
    [
        ("gradient pruning", "column-row sampling", "both change the convolutions"),
        ("PruneTrain", "standardization loss", "both change the normalisation"),
        ("resizing", "kernel rescaling", "both change the size of the images"),
        ("prune, then grow", "PruneTrain", "both change the convolutions and the normalisation"),
        ("Net2Net, teacher counted", "resizing", "Net2Net, teacher counted is more than one training"),
    ],
)
def test_arms_that_conflict_are_refused_with_the_reason(a, b, why):
    for pair in ((a, b), (b, a)):
        assert clash(*(BY_NAME[n] for n in pair)).startswith(why)
        with pytest.raises(BadInput, match=f"{pair[0]} and {pair[1]} cannot be combined: {why}"):
            combined(TASK, [BY_NAME[n] for n in pair])


def test_what_does_not_apply_clashes_with_all():
    gone = Contender(name="gone", why="no such layer")
    assert (
        clash(gone, BY_NAME["resizing"])
        == clash(BY_NAME["resizing"], gone)
        == "gone does not apply here: no such layer"
    )


def test_a_combination_has_all_methods_in_their_order_and_all_changes():
    arm = combined(TASK, [BY_NAME[n] for n in ("PruneTrain", "resizing", "wavelet stem")])
    assert arm.name == "PruneTrain + resizing + wavelet stem"
    assert [type(m).__name__ for m in arm.methods] == ["WaveletStem", "KernelRescaling", "PruneTrain"]
    assert arm.role == "method"
    assert not arm.changes
    study = replace(TASK, preset="study")
    found = {c.name: c for c in who.contenders(study, DATA)}
    both = combined(study, [found["resizing"], found["shorter schedule"]])
    longer = found["resizing"].arm.changes.get("epochs", TASK.recipe.epochs)
    assert both.changes["epochs"] == pytest.approx(0.8 * longer)
    assert combined(study, [found["smaller network"]]) == found["smaller network"].arm
    for c in (found["Tree-CNN"], found["fp32"]):
        assert c.arm is None or combined(study, [c]) == c.arm
    lr = [Contender(name=n, arm=Arm(name=n, changes={"lr": v})) for n, v in (("a", 0.1), ("b", 0.2))]
    with pytest.raises(BadInput, match=r"a \+ b cannot be combined: they set lr to 0.1 and 0.2"):
        combined(TASK, lr)


PAIRS = [
    p
    for p in itertools.combinations(ABLE, 2)
    if not clash(*p) and "dynamic fixed point" not in (p[0].name, p[1].name)
]


def test_whatever_is_not_refused_really_goes_together():
    there = [c.name for c in ABLE]
    broken = {}
    for a, b in PAIRS:
        h = attempted(combined(TASK, [a, b])).run(TASK, DATA, 0)
        alone = [refused(attempted(c.arm).run(TASK, DATA, 0)) for c in (a, b)] if refused(h) else []
        if refused(h) and not any(alone):
            broken[a.name, b.name] = refused(h)
    assert len(there) > 8
    assert not broken


def test_the_tables_of_contenders():
    table = who.table(FOUND)
    assert list(table.index) == list(BY_NAME)
    assert table.loc["PruneTrain", "chapter"] == "6.1"
    assert table.loc["smaller network", "chapter"] == "control"
    assert "kernels=False" in table.loc["resizing", "as it runs here"]
    assert table.loc["shorter schedule", "as it runs here"] == "epochs 1.6"
    clashes = who.clashes(FOUND)
    assert "PruneTrain" in clashes.loc["resizing", "goes with"].split(", ")
    assert clashes.loc["Tree-CNN", "not with"].startswith("any: Tree-CNN is more than one training")
    assert "both change the convolutions" in clashes.loc["gradient pruning", "not with"]


# What does not apply


def test_an_arm_that_does_not_apply_says_why_and_raises_nothing():
    pooling = attempted(BY_NAME["stochastic pooling"].arm)
    (block,) = compare(TASK, [who.baseline(), pooling], seeds=1, quantity="training time").blocks
    assert "has no nn.MaxPool2d layer" in refused(block["arms"]["stochastic pooling"])
    assert refused(block["arms"][DENSE]) == ""
    again = compare(TASK, [who.baseline(), pooling], seeds=1, quantity="training time").blocks[
        0
    ]  # from the cache
    assert refused(again["arms"]["stochastic pooling"]) == refused(block["arms"]["stochastic pooling"])


def test_our_own_faults_are_raised_but_not_those_of_a_users_network():
    def fails():
        raise RuntimeError("shapes differ\nand more")

    def gives(error):
        raise error

    with pytest.raises(RuntimeError):
        tried(fails, "resnet")
    assert tried(fails, "mine.py:net") == (None, "RuntimeError: shapes differ")
    for error in (BadInput("why"), NoEffect("why")):
        assert tried(lambda error=error: gives(error), "resnet") == (None, "why")
    assert tried(lambda: 3, "resnet") == (3, "")


MINE = """
from torch import nn

def net(classes, channels=1):
    return nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, classes))
"""


def test_a_users_network_that_most_methods_cannot_take(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    mine = pilot(task("smoke", "synthetic", f"{file}:net"))
    trial = selection.screen(mine, who.contenders(mine, mine.load()), {})
    assert {
        "stochastic pooling",
        "resizing",
        "kernel rescaling",
        "wavelet stem",
        "wavelet auto-encoder",
        "gradient pruning",
    } <= set(trial.refused)
    assert all(len(why) > 20 for why in trial.refused.values())
    assert "PruneTrain" in trial.histories
    table = selection.screen_table(trial)
    assert table.loc["resizing", "note"].startswith(
        "does not apply: kernel rescaling: network Sequential cannot take images"
    )
    picked = selection.select(trial)
    assert set(picked.prescribed) == {"PruneTrain"}  # what is left of it
    result = chapter.measured(chapter.plan(BOOK, trial, picked), trial)
    board = chapter.scoreboard(result, trial.contenders)
    assert board.loc["resizing", "note"].startswith("does not apply: ")
    assert set(board.index) >= set(BY_NAME)


# Tree-CNN as a way to all classes


def test_the_whole_tree_is_the_chapters_tree_with_its_first_stage_counted():
    tree = TreeCNN(cap=2, evaluations=2)
    h = WholeTree(tree=tree)(TASK, 0)
    _, begun, later = tree_cnn.Growing(tree=tree).grown(TASK, DATA, 0)
    first = torch.tensor(tree_cnn.stages(DATA)[0])
    share = float(torch.isin(DATA.validation.y, first).float().mean())
    assert 0 < share < 1
    expected = [share * r["accuracy"] for r in begun.rows] + [r["accuracy"] for r in later.rows]
    assert [r["accuracy"] for r in h.rows] == pytest.approx(expected)
    assert h.steps == begun.steps + later.steps
    assert [r["seconds"] for r in h.rows] == sorted(r["seconds"] for r in h.rows)
    assert h.seconds > h.rows[len(begun.rows) - 1]["seconds"] > 0
    assert 0 <= h.test_accuracy <= 100


# Records


def record(**changes):
    head = verdict("m", 0.2, 0.19, 0.21, SLOWER).record()
    machine = {k: clock.machine()[k] for k in ("device", "threads", "torch")}
    values = dict(status="complete", headline=head, verdicts=[head], machine=machine, commit="abc")
    values |= dict(
        preset="study", dataset="cifar10", network="resnet", task={"device": "cpu", "images": 1000}
    )
    return values | changes


def verdict(arm, ratio, low, high, word, n=5, quantity="time to target"):
    return Verdict(
        arm=arm, against=DENSE, quantity=quantity, ratio=ratio, low=low, high=high, n=n, reached=n, accuracy_difference=0.1,
        accuracy_low=-0.2, verdict=word, claim=None, claim_reproduced="", text=f"{ratio:.2f}x",
    )  # fmt: skip


def test_a_record_of_another_machine_or_of_changed_code_is_not_current(tmp_path, monkeypatch):
    other = record(machine={**record()["machine"], "torch": "1.0"})
    assert recorded.stale(other, "") == "another machine (torch 1.0)"
    assert recorded.stale(record(shared_machine=True), "") == "measured while other notebooks ran"
    assert (
        recorded.stale(record(commit="abc+"), "")
        == recorded.stale(record(commit=None), "")
        == "made from files that were not committed"
    )

    def git(*words):
        names = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", tmp_path, *names, *words], check=True, capture_output=True, text=True
        ).stdout.strip()

    (tmp_path / "effilib" / "methods").mkdir(parents=True)
    for name in ("training.py", "methods/net2net.py"):
        (tmp_path / "effilib" / name).write_text('"""Doc."""\nx = 1\n')
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    commit = git("rev-parse", "HEAD")
    monkeypatch.setattr(paths, "root", lambda: tmp_path)

    def why(module):
        recorded.differing.cache_clear()
        recorded.other.cache_clear()
        return recorded.stale(record(commit=commit), module)

    assert why("net2net") == ""
    assert recorded.stale(record(commit="0" * 40), "") == "its commit is not known here"
    (tmp_path / "effilib" / "training.py").write_text('"""Another doc."""\n# and a comment\nx = 1\n')
    assert why("net2net") == ""
    (tmp_path / "effilib" / "methods" / "net2net.py").write_text("x = 2\n")
    assert why("net2net") == "changed since: effilib.methods.net2net"
    assert why("prune_train") == ""
    (tmp_path / "effilib" / "training.py").unlink()
    assert why("prune_train") == "changed since: effilib.training"


def test_a_slow_method_is_known_from_its_chapters_record_on_this_machine():
    assert recorded.slowdown(record(), 1.5) == pytest.approx(5)
    fast = record(headline=verdict("m", 0.8, 0.7, 0.9, SLOWER).record())
    assert (
        recorded.slowdown(fast, 1.5)
        == recorded.slowdown(None, 1.5)
        == recorded.slowdown(record(headline=None), 1.5)
        == 1
    )
    assert recorded.slowdown(record(machine={}), 1.5) == 1


def test_records_of_this_series_come_before_committed_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "recorded", lambda: tmp_path / "recorded")
    for folder, words in (
        (tmp_path / "recorded" / "study-cifar10", "committed"),
        (paths.results() / "smoke-synthetic", "mine"),
    ):
        for stem in (
            ("06_2_net2net", "10_comparison") if words == "mine" else ("06_2_net2net", "06_1_prune_train")
        ):
            (folder / stem).mkdir(parents=True)
            (folder / stem / "record.json").write_text(json.dumps(record(preset=words)))
    book = notebook.start("10_comparison", preset="smoke", dataset="synthetic")
    found = recorded.records(book)
    assert {s: r["preset"] for s, (r, _) in found.items()} == {
        "06_2_net2net": "mine",
        "06_1_prune_train": "committed",
    }
    table = recorded.own_ground(found)
    assert table.loc["6.2", "measured"] == "0.20x"
    assert table.loc["7.1", "current"] == "not run"


# The advice


def made_result(device="cpu", seeds=5, **arms):
    """Runs that were not made: arm -> (seconds, accuracy), five seeds that differ a little."""
    arms = {DENSE: (10.0, 90.0), **{k.replace("_", " "): v for k, v in arms.items()}}
    blocks = []
    for s in range(seeds):
        runs = {n: history(t * (1 + s / 100), a + s / 50) for n, (t, a) in arms.items()}
        blocks.append({"seed": s, "machine": clock.machine(), "attempts": 1, "arms": runs})
    found = tuple(Arm(name=n, role="method" if n != DENSE else "baseline") for n in arms)
    made = replace(TASK, preset="quick", target=80.0, device=device)
    return chapter.Measured(
        judged=Comparison(task=made, arms=found, blocks=blocks),
        once=None,
        notes={},
        refused={"gone": "no pooling"},
    )


def test_advice_follows_from_verdicts():
    fast, faster, wide = (
        verdict("a", 1.5, 1.4, 1.6, FASTER),
        verdict("b", 1.6, 1.2, 2.2, FASTER),
        verdict("c", 3.0, 0.9, 9.0, INCONCLUSIVE),
    )
    assert advice.recommended([faster, wide, fast]) == (
        "a",
        "1.50x, +0.10 points",
    )  # the best lower bound, not the best mean
    assert advice.recommended([]) == ("not measured here", "")
    use, what = advice.recommended([wide, verdict("d", 0.5, 0.4, 0.6, SLOWER)])
    assert (use, what) == (
        "plain training",
        "of 2 none was faster at equal accuracy; the fastest: c, 3.00x, +0.10 points (inconclusive)",
    )
    assert (
        advice.recommended([verdict("e", 9.0, math.nan, math.nan, "", n=1)])[0]
        == "no verdict here: fewer than 5 seeds"
    )
    assert advice.recommended([replace(wide, ratio=None)])[1].endswith("none reached the target")


def test_the_practitioners_table_is_computed_from_runs_and_records():
    result = made_result(quick=(5.0, 90.0), slow=(20.0, 90.0))
    table = advice.table(result, {})
    assert list(table.index) == ["on a CPU", "on a GPU", "with little data", "with a network to be improved"]
    assert table.loc["on a CPU", "use"] == "quick"
    assert table.loc["on a CPU", "measured"].startswith("2.00x [2.00, 2.00], n=5 pairs")
    assert set(table["use"].iloc[1:]) == {"not measured here"}
    assert table.loc["on a GPU", "where"] == "none of 0 records comes from such a device"

    few = [
        verdict("pooling", 1.4, 1.2, 1.6, FASTER).record(),
        verdict("p", 9.0, 8.0, 10.0, FASTER, quantity="time per step").record(),
    ]
    found = {
        "05_1_stochastic_pooling": (record(verdicts=few), ""),
        "06_2_net2net": (record(headline=verdict("student", 2.0, 1.9, 2.1, FASTER).record()), ""),
        "06_1_prune_train": (
            record(task={"device": "cuda:0"}, verdicts=[verdict("pruned", 1.3, 1.2, 1.4, FASTER).record()]),
            "",
        ),
    }
    table = advice.table(result, found)
    assert table.loc["with little data", "use"] == "pooling"
    assert table.loc["with little data", "where"] == "chapters 5.1: 1,000 training images"
    assert table.loc["on a GPU", "use"] == "pruned"
    assert table.loc["on a GPU", "where"] == "chapters 6.1"
    assert table.loc["with a network to be improved", "use"] == "student"
    table = advice.table(made_result(**{"Net2Net, teacher given": (2.0, 90.0), "quick": (5.0, 90.0)}), found)
    assert table.loc["on a CPU", "use"] == "quick"  # a given teacher is no way to train from nothing
    assert table.loc["with a network to be improved", "use"] == GIVEN


def test_mixed_precision_is_judged_against_fp32():
    result = made_result(fp32=(15.0, 90.0))
    mixed = result.mixed()
    assert (mixed.arm, mixed.against, mixed.verdict) == (MIXED, FP32, FASTER)
    assert mixed.ratio == pytest.approx(1.5)
    assert "1.50x" in advice.table(result, {}).loc["on a CPU", "measured"]
    assert made_result(quick=(5.0, 90.0)).mixed() is None


def test_the_scoreboard_is_sorted_and_says_who_is_on_the_front_and_who_does_not_apply():
    result = made_result(
        quick=(5.0, 90.0), slow=(20.0, 90.0), better=(12.0, 95.0), missed=(4.0, 60.0), fp32=(15.0, 90.0)
    )
    result = replace(result, notes={"slow": "one seed: 2.0x"})
    board = chapter.scoreboard(result, FOUND)
    assert list(board.index) == [DENSE, "quick", "better", FP32, "slow", "missed", MIXED, "gone"]
    assert board["front"].to_dict() == {
        DENSE: "", "quick": "yes", "better": "yes", FP32: "", "slow": "", "missed": "yes", MIXED: "–", "gone": "–"
    }  # fmt: skip
    assert board.loc["gone", "note"] == "does not apply: no pooling"
    assert board.loc["slow", "note"] == "one seed: 2.0x"
    given = made_result(**{GIVEN: (2.0, 90.0), "quick": (5.0, 90.0)})
    board_given = chapter.scoreboard(given, FOUND)
    assert board_given.loc[GIVEN, ["front", "note"]].to_list() == ["", "its teacher's time is not counted"]
    assert board_given.loc["quick", "front"] == "yes"
    assert board.loc[MIXED, "measured"].endswith("against fp32")
    assert chapter.say_front(result).count("%") == 3
    figure, caption = chapter.picture(result)
    right = figure.axes[1]
    assert len([t for t in right.texts if t.get_text().isdigit()]) == 6
    assert right.get_xscale() == "log"
    assert "5 seeds" in caption


def test_a_combination_is_held_against_its_parts():
    picked = made_selection(("a", "b"), ("a", "c"))
    result = made_result(a=(8.0, 90.0), **{"a + b": (4.0, 90.0), "a + c": (4.0, 40.0)})
    table = chapter.parts_table(result, picked)
    assert table.loc[("a + b", "a")].item() == "2.00x [2.00, 2.00]"
    assert table.loc[("a + b", "b")].item() == "the part has not these seeds in this preset"
    assert table.loc[("a + c", "a")].item() == "one of them missed the target"
    assert len(chapter.parts_table(result, made_selection(("a",), ()))) == 1


# All of it


def test_the_task_has_a_length_that_was_swept():
    quick = chapter.task(notebook.start("10_comparison", preset="quick"))
    assert (quick.recipe.epochs, quick.images, quick.target) == (2, 2500, None)
    assert set(chapter.swept(quick, 2)) == {"lr", "weight_decay"}
    assert quick.recipe.lr == chapter.swept(quick, 2)["lr"]
    assert chapter.swept(quick, 77) == chapter.swept(quick.but(network="vgg", widths={}), 2) == {}
    assert chapter.task(notebook.start("10_comparison", preset="smoke", dataset="synthetic")) == TASK


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The whole chapter on synthetic images: book, task, trial, selection, plan, results."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFILIB_RESULTS", str(tmp_path_factory.mktemp("results")))
        book = notebook.start("10_comparison", preset="smoke", dataset="synthetic")
        made = pilot(chapter.task(book), margins=chapter.MARGINS)
        trial = selection.screen(
            made, who.contenders(made, book.dataset), {"03_3_dynamic_fixed_point": (record(), "")}
        )
        picked = selection.select(trial)
        plan = chapter.plan(book, trial, picked)
        return book, made, trial, picked, plan, chapter.measured(plan, trial)


def test_the_screening_finds_what_applies_and_spares_what_is_slow(finished):
    _, _, trial, *_ = finished
    assert {"stochastic pooling", "kernel rescaling"} <= set(trial.refused)
    assert trial.slow["dynamic fixed point"] == "5.0x slower in its own chapter"
    assert "dynamic fixed point" not in trial.histories
    assert set(trial.histories) | set(trial.refused) | {"dynamic fixed point"} == set(BY_NAME)
    table = selection.screen_table(trial)
    assert "has no nn.MaxPool2d" in table.loc["stochastic pooling", "note"]
    assert table.loc["dynamic fixed point", "time"] == ""


def test_the_selection_tries_the_prescribed_combination(finished):
    *_, picked, plan, result = finished
    assert set(picked.prescribed) == set(selection.PRESCRIBED)
    assert picked.prescribed in picked.tried
    assert picked.chosen in picked.tried
    assert len(picked.chosen) <= 1  # one round in this preset
    assert set(selection.table(finished[2], picked).index) == {who.join(c) for c in picked.tried}
    assert selection.say(picked)
    whole = who.join(picked.prescribed)
    h = result.judged.histories(whole)[0]
    assert {e["method"] for e in h.events} >= {"WaveletStem", "KernelRescaling", "PruneTrain"}
    arm = next(a for a in plan.judged if a.name == whole)
    assert {WaveletStem, KernelRescaling} < {type(m) for m in arm.methods}
    assert chapter.headline(picked) in [a.name for a in result.judged.arms]


def test_pilot_seeds_are_never_measured(finished):
    *_, result = finished
    assert not {b["seed"] for c in result.comparisons for b in c.blocks} & set(PILOT_SEEDS)


def test_everything_is_shown(finished):
    book, made, trial, picked, plan, result = finished
    assert chapter.protocol(made, {}).loc["budget", ""] == "no limit"
    assert list(plan.table.columns) == ["runs", "seconds"]
    board = chapter.scoreboard(result, trial.contenders)
    assert set(board.index) >= {DENSE, *BY_NAME}
    assert (board.loc[list(trial.refused), "note"].str.startswith("does not apply")).all()
    assert set(board.loc[[n for n in plan.notes if n in result.names], "verdict"]) <= {
        "smoke: not a measurement"
    }
    assert (
        board.loc[[n for n in trial.slow if n not in result.names], "note"] == "slow: left out of a test"
    ).all()
    figure, caption = chapter.picture(result)
    how = dict(
        figure=figure, caption=caption, headline=chapter.headline(picked), notes=[chapter.say_front(result)]
    )
    assert book.record(result.comparisons, **how)["headline"]["arm"] == chapter.headline(picked)
    assert list(advice.table(result, {})["use"])[:3] == [
        "no verdict here: fewer than 5 seeds",
        *["not measured here"] * 2,
    ]


def test_runs_do_not_depend_on_tables_and_pictures():
    modules = provenance.imports({"effilib.chapters.attempts"})
    assert not modules & {
        "effilib.chapters.comparison",
        "effilib.chapters.contenders",
        "effilib.chapters.records",
    }
