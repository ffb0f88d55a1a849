"""The procedure and its rivals: one checkpoint, nothing left off the clock, runs that can be had again."""

import copy
import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch

from effilib.errors import BadInput
from effilib.hooks import Method
from effilib.methods.diagnosis import Case, RandomChoice, examine
from effilib.methods.improvement import (
    AllTried,
    Continued,
    Diagnosed,
    Halving,
    Improvement,
    Oracle,
    Treatment,
    planned,
    step_time,
)
from effilib.methods.patients import KEEP, treat_, treated
from effilib.seeds import stream
from effilib.tasks import task
from effilib.training import train
from tests.common import equal, work

TASK = task("smoke", "synthetic").but(batch_size=20, epochs=2.0, precision="fp32", images=120)
NETWORK = {"widths": (8, 8), "blocks": [[8], [4]]}
TIMES = {KEEP: 1.0, "widen stage 1": 2.0, "widen stage 2": 1.0, "narrow stage 1": 0.5}
HOW = dict(network=NETWORK, times=TIMES, given=0.5, multiple=4)
STEPS = 12  # of the last training of the network as it is


@dataclass(frozen=True)
class Says:
    """A diagnosis whose mind is made up, after so many seconds of work."""

    scores: tuple
    seconds: float = 0.0

    def __call__(self, case):
        work(self.seconds)
        return {name: dict(self.scores).get(name, -1.0) for name in case.times}


WIDER = Says((("widen stage 2", 1.0),))


@pytest.mark.parametrize(
    ("scores", "plan"),
    [
        ({KEEP: 1.0, "widen stage 1": 0.5}, (KEEP,)),
        ({KEEP: 0.0, "widen stage 2": 1.0, "deepen stage 2": 0.5}, ("widen stage 2",)),
        ({KEEP: 0.0, "widen stage 2": 1.0, "narrow stage 1": -0.1}, ("widen stage 2",)),
        ({KEEP: 0.0, "widen stage 2": 1.0, "narrow stage 1": 0.1}, ("narrow stage 1", "widen stage 2")),
        ({KEEP: 0.0, "widen stage 2": 0.1, "narrow stage 1": 1.0}, ("narrow stage 1", "widen stage 2")),
        ({KEEP: 0.0, "widen stage 1": 0.2, "narrow stage 1": 1.0}, ("narrow stage 1",)),
        (
            {KEEP: 0.0, "widen stage 2": 0.1, "deepen stage 2": 0.2, "narrow stage 1": 1.0},
            ("narrow stage 1", "deepen stage 2"),
        ),
        ({KEEP: 1.0, "widen stage 2": 0.5, "narrow stage 1": 0.9}, (KEEP,)),
    ],
)
def test_what_a_diagnosis_asks_for(scores, plan):
    assert planned(scores) == plan
    assert planned(scores, pays=False) == (max(scores, key=scores.get),)


def test_treatments_add_up():
    assert step_time(TIMES, (KEEP,)) == 1.0
    assert step_time(TIMES, ("narrow stage 1", "widen stage 2")) == 0.5
    assert step_time(TIMES, ("widen stage 1", "widen stage 2")) == 2.0
    with pytest.raises(BadInput, match="no step time for deepen stage 1"):
        Improvement(**HOW, plan=("deepen stage 1",))
    with pytest.raises(BadInput, match="needs a plan"):
        Improvement(**HOW)(TASK, 0)


def test_a_stage_is_cut_and_another_grows_in_one_restructure_and_newborns_learn_faster():
    plan, dataset = ("narrow stage 1", "widen stage 2"), TASK.load()
    nets = [TASK.build(dataset, 0, **{**NETWORK, "blocks": [[8], [8]]}) for _ in range(2)]
    first = replace(TASK.recipe, epochs=1 / (len(dataset.train) // 20), warmup=0.0, weight_decay=0.0)
    for net, newborn in zip(nets, (1.0, 3.0), strict=True):
        method = Treatment(plan=plan, multiple=4, newborn=newborn)
        history = train(net, dataset, first, [method], seed=3)
        assert [e["text"].partition(": ")[2] for e in history.events] == ["narrow stage 1; widen stage 2"]
        assert history.kinds["reconfigure"]["count"] == 1
        assert net.settings()["blocks"] == [[4], [16]]
    before = TASK.build(dataset, 0, **{**NETWORK, "blocks": [[8], [8]]})
    plain, fast = (net.stages[1][0].conv2.weight for net in nets)
    assert torch.equal(plain[:, :8], fast[:, :8])  # the old ones
    assert not torch.equal(plain[:, :8], before.stages[1][0].conv2.weight)
    assert not torch.equal(plain[:, 8:], fast[:, 8:])


def test_all_begin_with_the_same_checkpoint_whose_training_is_not_on_the_clock():
    fits = [Improvement(**HOW, plan=(KEEP,)), Halving(**HOW), AllTried(**HOW), Diagnosed(**HOW)]
    cases = [fit.case(TASK.at(length), seed=1) for fit in fits for length in (0.5, 1.0)]
    assert all(equal(case.model, cases[0].model) for case in cases)
    assert len({id(case.model) for case in cases}) == len(cases)  # nobody trains the others' network
    expected = TASK.build(cases[0].dataset, 1, **NETWORK)
    held = replace(TASK.recipe, epochs=HOW["given"], schedule="constant")
    train(expected, cases[0].dataset, held, seed=stream(1, "checkpoint").initial_seed())
    assert equal(cases[0].model, expected)
    history = fits[0](TASK, 1)
    assert history.steps == STEPS
    assert history.events[0]["plan"] == [KEEP]
    before = copy.deepcopy(cases[0].model)
    fits[0].improve(cases[-1])
    assert equal(fits[0].case(TASK, seed=1).model, before)
    assert not equal(fits[0].case(TASK, seed=2).model, before)
    assert not equal(replace(fits[0], given=1.0).case(TASK, seed=1).model, before)


def test_the_last_training_takes_the_same_time_whatever_the_plan():
    steps = {plan: Improvement(**HOW, plan=plan)(TASK, 0).steps for plan in [(KEEP,), ("widen stage 1",)]}
    assert steps == {(KEEP,): STEPS, ("widen stage 1",): STEPS // 2}


def test_diagnosis_and_search_are_on_the_clock():
    slow = Diagnosed(**HOW, diagnosis=replace(WIDER, seconds=0.4), side=1.0)
    history = slow(TASK, 0)
    assert history.events[0]["plan"] == ["widen stage 2"]
    assert history.kinds["search"]["seconds"] >= 0.4
    assert history.seconds >= 0.4
    assert history.steps == STEPS
    assert math.isclose(sum(k["seconds"] for k in history.kinds.values()), history.seconds, rel_tol=1e-6)
    searched = replace(slow, diagnosis=WIDER, search=0.5)(TASK, 0)
    assert searched.steps == STEPS + STEPS // 2
    assert searched.flops > history.flops
    sizes = []

    @dataclass(frozen=True)
    class Looks(Says):
        def __call__(self, case):
            sizes.append(case.dataset.shape[1:])
            return super().__call__(case)

    replace(slow, diagnosis=Looks(WIDER.scores), side=0.5)(TASK, 0)
    assert sizes == [(4, 4)]


def test_setting_up_a_training_counts_but_for_the_first_warm_up():
    trained = []

    class Trains(Says):
        def __call__(self, case):
            trained.extend(case.train(case.treated(), 0.5) for _ in range(2))
            return super().__call__(case)

    history = Diagnosed(**HOW, diagnosis=Trains(WIDER.scores))(TASK, 0)
    assert history.steps == STEPS + STEPS // 2
    assert history.kinds["step"]["count"] >= history.steps
    assert len(history.rows) == 1  # not of the few images that a diagnosis reports on
    assert history.kinds["search"]["seconds"] > trained[1].warm_up > 0
    case = Improvement(**HOW, plan=(KEEP,)).case(TASK, 0)
    _, seconds = examine(case, Trains(WIDER.scores))
    counted = sum(h.raw_seconds for h in trained[2:])
    assert seconds > counted + trained[3].warm_up
    assert case.warm_up == trained[2].warm_up


def test_checkpoint_search_diagnosis_and_last_part_have_other_orders_and_forks_the_same():
    case, seen = Improvement(**HOW, plan=(KEEP,)).case(TASK, 0), []

    class Look(Method):
        def on_fit_start(self, run):
            seen.append([])

        def on_batch(self, run, x, y):
            seen[-1].append(x.clone())
            return x, y

    nets = [copy.deepcopy(case.model) for _ in range(5)]
    train(nets[0], case.dataset, case.recipe, [Look()], stream(0, "checkpoint").initial_seed())
    for net, order in zip(nets[1:4], ("search", "diagnosis", "diagnosis"), strict=True):
        case.train(net, 0.5, [Look()], order=order)
    Improvement(**HOW, plan=(KEEP,)).train(case, nets[4], (KEEP,), methods=(Look(),))
    assert all(map(torch.equal, seen[2], seen.pop(3)))
    assert not any(torch.equal(a[0], b[0]) for a, b in itertools.combinations(seen, 2))


def test_rounds_go_on_with_momentum_and_the_rate_of_what_is_new():
    dataset, kept, seen = TASK.load(), [], []
    recipe = replace(TASK.recipe, epochs=1 / (len(dataset.train) // 20), warmup=0.0, schedule="constant")

    class Look(Method):
        def on_fit_start(self, run):
            named = run.model.named_parameters()
            momenta = {n: run.optimizer.state.get(p, {}).get("momentum_buffer") for n, p in named}
            seen.append({n: m if m is None else m.clone() for n, m in momenta.items()})

    for newborn in (1.0, 3.0):
        net = TASK.build(dataset, 0, **NETWORK)
        going = Continued(shapes={n: p.shape for n, p in net.named_parameters()}, newborn=newborn)
        treat = Treatment(plan=("widen stage 2",), multiple=4)
        train(net, dataset, recipe, [treat, going], seed=3)
        left = {n: m.clone() for n, m in going.momentum.items()}
        train(net, dataset, recipe, [going, Look()], seed=4)
        assert all(torch.equal(seen[-1][n], left[n]) for n in left)
        kept.append(net.stages[1][0].conv2.weight)
    plain, fast = kept
    assert torch.equal(plain[:, :4], fast[:, :4])  # the old channels
    assert not torch.equal(plain[:, 4:], fast[:, 4:])


def test_halving_can_look_at_small_images_in_its_rounds(monkeypatch):
    sizes, original = [], Case.train
    monkeypatch.setattr(
        Case, "train", lambda case, *a, **k: sizes.append(case.dataset.shape[1:]) or original(case, *a, **k)
    )
    whole, small = (Halving(**HOW, side=side)(TASK, 0) for side in (1.0, 0.5))
    assert set(sizes[: len(sizes) // 2]) == {(8, 8)}
    assert set(sizes[len(sizes) // 2 :]) == {(4, 4)}
    assert small.flops < whole.flops


def test_losers_cost_time():
    every, kept = AllTried(**HOW)(TASK, 0), Improvement(**HOW, plan=(KEEP,))(TASK, 0)
    assert every.steps == STEPS * sum(1 / t for t in TIMES.values())
    assert every.kinds["step"]["count"] >= every.steps
    assert every.flops > 3 * kept.flops
    accuracies = every.events[0]["accuracies"]
    assert accuracies[KEEP] == kept.accuracy  # the same training
    assert every.accuracy == accuracies[every.events[0]["plan"][0]]
    halved = Halving(**HOW)(TASK, 0)
    assert halved.kinds["validate"]["count"] == 2
    assert [len(scores) for scores in halved.events[0]["rounds"]] == [4, 2]
    first, second = halved.events[0]["rounds"]
    share = dict.fromkeys(first, 0.25) | dict.fromkeys(second, 0.5) | {halved.events[0]["plan"][0]: 1.0}
    assert abs(halved.steps - STEPS * sum(s / TIMES[n] for n, s in share.items())) <= 4  # whole steps


@pytest.mark.parametrize("right", list(TIMES))
@pytest.mark.parametrize("cls", [Halving, AllTried])
def test_the_best_on_deciding_images_is_kept(cls, right, monkeypatch):
    goal = treated({**NETWORK, "blocks": [[8], [4]]}, right, 4)["blocks"]

    def judged(case, model, *_):
        return (0.5, 50.0) if model.settings()["blocks"] == goal else (0.9, 90.0)  # by the loss, as forks

    monkeypatch.setattr(Case, "judged", judged)
    net, history = cls(**HOW).improve(cls(**HOW).case(TASK, 0))
    assert history.events[0]["plan"] == [right]
    assert net.settings()["blocks"] == goal
    assert history.structure["blocks"] == goal


@pytest.mark.parametrize(
    "fit",
    [Halving(**HOW), AllTried(**HOW), Diagnosed(**HOW, diagnosis=RandomChoice(), search=0.5, newborn=2.0)],
    ids=lambda fit: type(fit).__name__,
)
def test_a_run_goes_the_same_way_again_from_its_plan(fit):
    net, history = fit.improve(fit.case(TASK, 5))
    again = replace(fit, plan=history.events[0]["plan"])
    same, repeated = again.improve(again.case(TASK, 5))
    assert equal(net, same)
    assert repeated.accuracy == history.accuracy
    other = replace(fit, plan=next((c,) for c in TIMES if [c] != history.events[0]["plan"]))
    assert not equal(net, other.improve(other.case(TASK, 5))[0])


def test_a_refusal_leaves_the_network_alone():
    case = Improvement(**HOW, plan=(KEEP,)).case(TASK, 0)
    wrong = Improvement(**HOW, plan=("widen stage 2", "narrow stage 1"))
    narrow = replace(case, model=copy.deepcopy(case.model))
    treat_(narrow.model, "narrow stage 1", case.batch[0], multiple=4)
    before = copy.deepcopy(narrow.model)
    with pytest.raises(BadInput, match="changes none"):
        wrong.improve(narrow)
    assert equal(narrow.model, before)


def test_an_oracle_begins_with_new_weights_and_pays_for_all_of_its_training():
    history = Oracle(**HOW, plan=("widen stage 1",))(TASK, 0)
    assert history.steps == round((2.0 + 0.5) * 6 / 2)
    assert history.structure["blocks"] == [[16], [4]]
    assert history.kinds["step"]["count"] >= history.steps
