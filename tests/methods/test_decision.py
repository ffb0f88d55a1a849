"""The decision to prune on, widen, deepen or stop: by tables of synthetic traces, and for any trace that
hypothesis can think of.
"""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effilib.errors import BadInput
from effilib.methods.decision import (
    GROWTH,
    MODES,
    Action,
    Epoch,
    Policy,
    Stage,
    Trace,
    decide,
    due,
    flat,
    gained,
    level,
    rates,
    since,
)

FLAT = [2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]  # the validation loss of a run that improves nothing any more


def stage(name, lost=0.0, pending=0.0, **kwargs):
    return Stage(name=name, **{"lost": lost, "pending": pending, "widen": 1.0, "deepen": 1.0, **kwargs})


def trace(stages, losses=FLAT, accuracy=60.0, train_accuracy=62.0, train_loss=None, **kwargs):
    """A run whose stages looked alike in every epoch. accuracy: one, or one an epoch."""
    accuracies = accuracy if isinstance(accuracy, list) else [accuracy] * len(losses)
    epochs = tuple(
        Epoch(
            epoch=i,
            train_loss=train_loss[i] if train_loss else 1.0,
            train_accuracy=train_accuracy,
            loss=v,
            accuracy=a,
            stages=tuple(stages),
        )
        for i, (v, a) in enumerate(zip(losses, accuracies, strict=True))
    )
    return Trace(
        **{
            "epochs": epochs,
            "lam": 1e-3,
            "idle": 2.0,
            "pressed": 5.0,
            "budget": 100.0,
            "images": 10_000,
            **kwargs,
        }
    )


def did(kind, name, epoch):
    return (epoch, Action(kind=kind, stage=name))


QUIET, BUSY = [stage("a"), stage("b")], [stage("a", 0.1), stage("b", 0.2)]
WIDENED = (did("widen", "b", 3),)
BETTER = [40] * 4 + [60] * 4  # accuracies since
TABLE = {
    "all shrinking: keep shrinking": (trace(BUSY), "shrink", ""),
    "predicted to shrink: keep shrinking": (
        trace([stage("a", 0.0, 0.3), stage("b", 0.0, 0.2)]), "shrink", ""),
    "one stage saturated, the others shrink: widen it": (
        trace([stage("a", 0.2), stage("b"), stage("c", 0.1)]), "widen", "b"),
    "between the two rates: left alone": (trace([stage("a", 0.01), stage("b", 0.012)]), "wait", ""),
    "nothing pruned: widen the later stage, where pixels are few": (trace(QUIET), "widen", "b"),
    "nothing pruned: widen where it costs least": (
        trace([stage("a", widen=1.0), stage("b", widen=2.0)]), "widen", "a"),
    "the stage whose channels live rather than the half-dead one": (
        trace([stage("a", widths=(32,), live=(32,)), stage("b", widths=(32,), live=(16,))]), "widen", "a"),
    "no growth tried yet elsewhere: round robin": (
        trace(QUIET, accuracy=[40, 40, 50, 50, 60, 60, 60, 60], actions=WIDENED), "widen", "a"),
    "widening brought nothing: deepen there": (trace(QUIET, actions=WIDENED), "deepen", "b"),
    "widening brought much: widen again": (
        trace([stage("a")], accuracy=BETTER, actions=(did("widen", "a", 3),)), "widen", "a"),
    "newborns were pruned again: deepen there": (
        trace([stage("a"), stage("b", born=16, kept=8)], accuracy=BETTER, actions=WIDENED), "deepen", "b"),
    "most newborns live: widen again": (
        trace([stage("b", born=16, kept=9)], accuracy=BETTER, actions=WIDENED), "widen", "b"),
    "deepening brought nothing either: stop": (
        trace([stage("a")], actions=(did("deepen", "a", 3),), frozen=frozenset({("a", "widen")})),
        "stop", ""),
    "cannot become wider: deepen": (trace([stage("a", widen=math.inf)]), "deepen", "a"),
    "cannot grow at all: stop": (trace([stage("a", widen=math.inf, deepen=math.inf)]), "stop", ""),
    "over-fitting: stop": (trace(QUIET, train_accuracy=75.0), "stop", ""),
    "all training images are right: stop": (trace(QUIET, accuracy=95.0, train_accuracy=99.9), "stop", ""),
    "over-fitting, but still shrinking loss: wait": (
        trace(QUIET, [2.0, 1.5, 1.2, 1.0], train_accuracy=75.0), "wait", ""),
    "budget spent: stop": (trace(QUIET, spent=100.0), "stop", ""),
    "no growth fits the budget: stop": (trace(QUIET, spent=50.0, projected=49.5), "stop", ""),
    "the cheaper growth fits the budget": (
        trace([stage("a", widen=0.4), stage("b", widen=0.6)], spent=50.0, projected=49.5), "widen", "a"),
    "no penalty: wait": (trace(QUIET, lam=0.0, idle=math.inf), "wait", ""),
    "a penalty that had no time to act: wait": (trace(QUIET, pressed=1.9), "wait", ""),
    "still improving: wait": (trace(QUIET, [2.0, 1.8, 1.6, 1.4]), "wait", ""),
    "validation loss flat, training loss falling fast: wait": (
        trace(QUIET, train_loss=[2.0 * 0.9**i for i in range(8)]), "wait", ""),
    "the last action is recent: wait": (trace(BUSY, actions=(did("widen", "a", 6),)), "wait", ""),
    "as many growths as allowed: stop": (
        trace(QUIET, [2.0, *[1.0] * 19], actions=tuple(did("widen", "a", e) for e in (2, 5, 8, 11))),
        "stop", ""),
    "the search's share is over: stop": (trace(QUIET, [2.0, 1.8], over=True), "stop", ""),
    "stopped is stopped: wait": (trace(QUIET, actions=(did("stop", "", 3),), over=True), "wait", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_the_table(name):
    given_trace, kind, where = TABLE[name]
    action = decide(given_trace)
    assert (action.kind, action.stage) == (kind, where), action.reason
    assert action.reason
    assert decide(given_trace) == action


def test_the_reason_has_the_numbers_in_it():
    reason = decide(trace(QUIET)).reason
    assert (
        reason == "2 epochs improved the validation loss by less than 2.0%; b lost 0.0% of its channels in 2 "
        "epochs, 0.0% are going"
    )
    assert (
        "widening it brought +0.0 points, less than 0.5"
        in decide(TABLE["widening brought nothing: deepen there"][0]).reason
    )
    assert (
        "of its 16 new channels 8 were pruned again"
        in decide(TABLE["newborns were pruned again: deepen there"][0]).reason
    )
    assert "with no penalty" in decide(TABLE["no penalty: wait"][0]).reason
    assert "75.0 % on training images, 60.0 % on others" in decide(TABLE["over-fitting: stop"][0]).reason
    assert str(decide(trace(QUIET))).startswith("widen b: ")


def test_what_was_refuted_is_frozen_and_never_tried_again():
    first = decide(TABLE["widening brought nothing: deepen there"][0])
    assert first.freeze == (("b", "widen"),)
    later = trace(QUIET, [2.0, *[1.0] * 12], accuracy=[60] * 9 + [80] * 4, frozen=frozenset(first.freeze),
                  actions=(did("widen", "b", 3), did("deepen", "b", 8)))  # fmt: skip
    assert (decide(later).kind, decide(later).stage) == ("widen", "a")
    only_b = replace(later, epochs=tuple(replace(e, stages=(e.stages[1],)) for e in later.epochs))
    assert (decide(only_b).kind, decide(only_b).stage) == ("deepen", "b")


def test_the_other_order_deepens_first_and_widens_where_that_brought_nothing():
    policy = Policy(order=("deepen", "widen"))
    assert decide(trace(QUIET), policy).kind == "deepen"
    action = decide(trace(QUIET, actions=(did("deepen", "b", 3),)), policy)
    assert (action.kind, action.stage) == ("widen", "b")


# When a decision is due


@pytest.mark.parametrize(("losses", "patience", "tau", "expected"), [
    ([1.0], 1, 0.0, False), ([1.0, 1.0], 1, 0.0, True),
    ([1.0, 0.999], 1, 0.0, False), ([1.0, 0.999], 1, 0.01, True),
    ([2.0, 1.0, 1.5, 1.2], 2, 0.0, True), ([2.0, 1.0, 1.5, 0.9], 2, 0.05, False), ([1.0, 1.0], 2, 0.0, False),
])  # fmt: skip
def test_flat(losses, patience, tau, expected):
    assert flat(losses, patience, tau) is expected


def test_level_compares_means_of_windows():
    assert level([3.0, 1.0, 2.0, 2.0], 2, 0.0)
    assert not level([3.0, 1.0, 1.0, 2.0], 2, 0.0)
    assert level([3.0, 1.0, 1.9, 2.0], 2, 0.03)
    assert not level([1.0, 1.0, 1.0], 2, 0.5)


def test_one_noisy_epoch_is_a_decision_of_the_thesis_and_none_in_windows():
    noisy = trace(
        QUIET, [2.5, 1.73, 1.89], train_loss=[2.0, 1.8, 1.6]
    )  # as measured at a constant learning rate
    assert decide(noisy, Policy(mode="thesis")).kind == "widen"
    assert decide(noisy).kind == "wait"
    assert decide(replace(noisy, epochs=noisy.epochs[:2]), Policy(mode="thesis")).kind == "wait"


def test_periodic_is_due_every_so_many_epochs_whatever_the_loss():
    falling = [2.0 * 0.8**i for i in range(12)]
    policy = Policy(mode="periodic", period=3)
    assert [bool(due(trace(QUIET, falling[: n + 1]), policy)) for n in range(4)] == [False, False, True, True]
    assert not due(trace(QUIET, falling[:5], actions=(did("widen", "a", 2),)), policy)
    assert due(trace(QUIET, falling[:6], actions=(did("widen", "a", 2),)), policy)


def test_the_plateaus_clock_starts_anew_with_an_action_and_with_another_size():
    found = trace(QUIET, [1.0] * 6)
    assert due(found, Policy())
    assert not due(replace(found, actions=(did("shrink", "", 3),)), Policy())
    resized = tuple(replace(e, size=(16, 16) if e.epoch < 4 else (32, 32)) for e in found.epochs)
    assert [e.epoch for e in since(replace(found, epochs=resized))] == [4, 5]
    assert not due(replace(found, epochs=resized), Policy())


def test_accuracies_at_two_sizes_are_not_compared():
    found = trace(QUIET, actions=(did("widen", "b", 3),), accuracy=[60.0] * 4 + [50.0] * 4)
    assert gained(found, Policy()) == -10
    resized = replace(
        found, epochs=tuple(replace(e, size=(16, 16) if e.epoch < 4 else (32, 32)) for e in found.epochs)
    )
    assert gained(resized, Policy()) is None
    assert decide(resized).freeze == ()
    assert gained(trace(QUIET), Policy()) is None


def test_a_rate_adds_up_over_the_window_and_revived_channels_count_nothing():
    found = trace([stage("a", 0.1), stage("b", -0.2)])
    assert rates(found, 2) == pytest.approx({"a": 1 - 0.9**2, "b": 0.0})
    assert rates(found, 1)["a"] == pytest.approx(0.1)


def test_growth_without_pruning_needs_no_pressure():
    blind = Policy(pressure=False)
    assert decide(trace(QUIET, lam=0.0, idle=math.inf), blind).kind == "widen"


def test_settings_that_cannot_be_are_bad_input():
    with pytest.raises(BadInput, match="unknown mode 'window'"):
        Policy(mode="window")
    with pytest.raises(BadInput, match="0 <= low <= high"):
        Policy(low=0.1)
    with pytest.raises(BadInput, match="at least 1 epoch"):
        Policy(patience=0)
    with pytest.raises(BadInput, match="order of growths"):
        Policy(order=("widen",))
    with pytest.raises(BadInput, match="unknown kind of action 'shrnk'"):
        Action(kind="shrnk")


# Whatever the trace

share = st.floats(0, 1)
positive = st.floats(0, 20) | st.just(math.inf)
stages_ = st.lists(
    st.builds(stage, st.just("x"), share, share, widen=positive, deepen=positive,
              born=st.integers(0, 16), kept=st.integers(0, 16)),
    min_size=1, max_size=3,
)  # fmt: skip


@st.composite
def traces(draw):
    names = "abc"
    kept = [replace(s, name=names[i]) for i, s in enumerate(draw(stages_))]
    losses = draw(st.lists(st.floats(0.1, 3), min_size=1, max_size=10))
    epochs = draw(st.lists(st.integers(0, len(losses) - 1), unique=True, max_size=4))
    actions = tuple(
        did(draw(st.sampled_from(("shrink", *GROWTH))), draw(st.sampled_from(names)), e)
        for e in sorted(epochs)
    )
    return trace(
        kept, losses, draw(st.floats(0, 100)), draw(st.floats(0, 100)), actions=actions,
        spent=draw(positive), projected=draw(positive), budget=draw(st.floats(0, 40)),
        lam=draw(st.sampled_from((0.0, 1e-3))), pressed=draw(st.floats(0, 4)),
    )  # fmt: skip


policies = st.builds(
    Policy, mode=st.sampled_from(MODES), pressure=st.booleans(),
    cooldown=st.integers(1, 3), order=st.permutations(GROWTH),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(traces(), policies)
def test_an_action_is_always_affordable_allowed_and_the_same_again(found, policy):
    action = decide(found, policy)
    assert decide(found, policy) == action
    if action.kind in GROWTH:
        (chosen,) = [s for s in found.now.stages if s.name == action.stage]
        assert found.spent + found.projected + getattr(chosen, action.kind) <= found.budget
        assert (action.stage, action.kind) not in found.frozen | set(action.freeze)
        assert len(found.growths) < policy.growths
        assert found.now.epoch - found.last >= policy.cooldown or not found.actions
        assert found.lam > 0 or not policy.pressure
        assert (
            max(rates(found, max(policy.window, 2))[action.stage], chosen.pending) <= policy.low
            or not policy.pressure
        )


@settings(max_examples=300, deadline=None)
@given(traces(), policies)
def test_what_growth_costs_matters_only_where_there_is_growth(found, policy):
    free = tuple(replace(s, widen=0.0, deepen=0.0) for s in found.now.stages)
    action = decide(replace(found, epochs=(*found.epochs[:-1], replace(found.now, stages=free))), policy)
    assert action.kind in GROWTH or "budget" in action.reason or decide(found, policy) == action


@settings(max_examples=60, deadline=None)
@given(stages_, policies, st.lists(st.floats(0.5, 1.5), min_size=40, max_size=40))
def test_on_stages_that_go_on_as_they_are_it_never_goes_to_and_fro(seen, policy, losses):
    """The same rates in every epoch, any losses: no stage is grown and said to shrink by turns, and growth
    ends.
    """
    stages = [replace(s, name="abc"[i]) for i, s in enumerate(seen)]
    actions, frozen, last = (), frozenset(), None
    for epoch in range(len(losses)):
        found = trace(stages, losses[: epoch + 1], actions=actions, frozen=frozen)
        action = decide(found, policy)
        frozen |= set(action.freeze)
        if action.kind != "wait":
            assert last is None or epoch - last >= policy.cooldown
            actions, last = (*actions, (epoch, action)), epoch
    kinds = [a.kind for _, a in actions]
    assert not ("shrink" in kinds and set(kinds) & set(GROWTH))
    assert sum(k in GROWTH for k in kinds) <= policy.growths
    assert kinds.count("stop") <= 1
    assert "stop" not in kinds[:-1]
