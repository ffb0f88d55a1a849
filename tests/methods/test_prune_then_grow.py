"""Prune, then grow: exact operators, budget, cool-down and grace in training, replay, checkpoints, users'
networks, resized images.
"""

import copy
import itertools
import json
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from effilib import cost, data, models, surgery
from effilib.errors import BadInput
from effilib.evaluation import evaluate
from effilib.hooks import Method
from effilib.methods.decision import GROWTH, MODES
from effilib.methods.group_lasso import shrink_steps
from effilib.methods.growth import going, grow_, price, step_flops, strengths, validate
from effilib.methods.prune_then_grow import PruneThenGrow, decisions
from effilib.methods.prune_train import PruneTrain
from effilib.recipe import Recipe
from effilib.surgery import stages
from effilib.training import train
from tests.common import both, equal, exactly, g, images, resumed_and_whole, shake, step

SHAPE = (1, 8, 8)
DATA = data.synthetic(images=256)
RECIPE = Recipe(epochs=8, batch_size=32, lr=0.1, precision="fp32")
GENTLE = PruneTrain(weigh="norm", rule="readers", keep_scale=True, multiple=2)
HARD = replace(GENTLE, multiple=1)
PER_EPOCH = len(DATA.train) // RECIPE.batch_size


def network(seed=0, **kwargs):
    return models.build("resnet", 4, SHAPE, seed=seed, **{"widths": (4, 6, 8), "blocks": (1, 1, 1), **kwargs})


def vgg(seed=0):
    return models.build("vgg", 4, SHAPE, seed=seed, widths=((4,), (6,)))


def resnet18(seed=0):
    return models.build("torchvision.models:resnet18", 4, (3, 16, 16), seed=seed)


def method(**settings):
    """Grows often, on data that is easy."""
    return PruneThenGrow(
        **{
            "mode": "periodic",
            "period": 2,
            "prune": GENTLE,
            "idle": 0.1,
            "budget": 2.0,
            "full": 101.0,
            "gap": 100.0,
            **settings,
        }
    )


def actions(history, *kinds):
    return [e["action"] for e in history.events if "action" in e and e["action"]["kind"] in (kinds or GROWTH)]


def spent(history):
    last = next(e for e in reversed(history.events) if "budget" in e)
    return last["spent"], last["looked"], last["budget"]


def told(history):
    """What happened, without the time that it took."""
    return [{k: v for k, v in e.items() if k != "seconds"} for e in history.events]


@dataclass(frozen=True)
class Resize(Method):
    """Images of half the side for the first half, or another share, of the schedule."""

    at: float = 0.5

    def phases(self, shape, steps):
        return [(0, (shape[1] // 2, shape[2] // 2), 1.0), (round(self.at * steps), shape[1:], 1.0)]

    def size(self, run):
        return [
            s
            for start, s, _ in self.phases(run.dataset.shape, run.schedule.planned)
            if start <= run.schedule.position
        ][-1]

    def on_batch(self, run, x, y):
        return F.interpolate(x, self.size(run), mode="bilinear", antialias=True), y

    def on_step_end(self, run):
        if (
            run.schedule.position
            < round(self.at * run.schedule.planned)
            <= run.schedule.position + run.schedule.pace
        ):
            run.restructure(lambda model, optimizer: None)


# The pieces


@pytest.mark.parametrize("weight_decay", [0.0, 5e-4, 2e-2])
def test_the_price_is_the_one_under_which_an_idle_group_is_gone_in_time(weight_decay):
    lam = price(150, 1.3, 0.1, 0.9, weight_decay)
    assert shrink_steps(1.3, lam, 0.1, 0.9, weight_decay) == pytest.approx(150)


def test_strength_is_the_strongest_group_of_a_channel():
    model = network()
    node = surgery.trace(model)["stages.1.0.conv1"]
    block = model.stages[1][0]
    rows, columns = (
        block.conv1.weight.flatten(1).norm(dim=1),
        block.conv2.weight.movedim(1, 0).flatten(1).norm(dim=1),
    )
    assert_close(strengths(node), torch.maximum(rows, columns).detach())
    assert_close(strengths(node, "readers"), columns.detach())
    assert strengths(node, "readers", "norm").mean().item() == pytest.approx(1)


def test_a_channel_is_going_if_its_pace_brings_it_to_nothing_in_the_window():
    now, before = torch.tensor([0.5, 0.5, 0.5, 0.5]), torch.tensor([0.8, 0.7, 0.5, 0.0])
    assert going(now, before, 2).tolist() == [True, False, False, False]
    assert going(now, before, 3).tolist() == [True, True, False, False]


def test_validation_reads_the_split_that_decides_at_the_size_of_the_training():
    seen = {}

    class Look(Method):
        def on_fit_end(self, run):
            seen["full"] = validate(run, 10**6, (8, 8))
            seen["evaluate"] = evaluate(run.model, run.dataset, "decide", run.precision)
            seen["small"] = validate(run, 10**6, (4, 4))
            seen["few"] = validate(run, 5, (8, 8))[1]
            seen["training"] = run.model.training

    train(network(), DATA, replace(RECIPE, epochs=1), [Look()])
    assert seen["full"] == pytest.approx(seen["evaluate"])
    assert seen["small"] != seen["full"]
    assert seen["few"] in (0, 20, 40, 60, 80, 100)
    assert seen["training"]


# Surgery


@pytest.mark.parametrize("growth", GROWTH)
@pytest.mark.parametrize(("make", "shape"), [(network, SHAPE), (vgg, SHAPE), (resnet18, (3, 16, 16))])
def test_growth_keeps_the_function_the_optimizer_and_the_count_and_can_be_undone(make, shape, growth):
    model, x = shake(make()), images(shape=shape, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    step(model, optimizer, x, torch.arange(6) % 4)
    layout, before, old = stages.find(model, shape), both(model, x), copy.deepcopy(model)
    widths = {n.name: n.width for n in surgery.trace(model).nodes}
    modules = {name for name, _ in model.named_modules()}
    done = grow_(model, layout, 1, growth, optimizer, multiple=2, x=x, generator=g())
    assert done
    exactly(optimizer, model)
    scale = before.abs().max()
    assert (both(model, x)[0] - before[0]).abs().max() <= 1e-5 * scale
    assert step_flops(model, shape, 2) == recount(model, shape, 2)
    assert step_flops(model, shape, 2) > step_flops(old, shape, 2)
    if growth == "widen":
        for node in surgery.trace(model).nodes:
            surgery.select_(node, range(widths[node.name]), optimizer)
    elif make is vgg:
        surgery.remove_layer_(model, "features.7", optimizer, x=x)
    else:
        (new,) = {n for n, m in model.named_modules() if n.endswith(".1") or n.endswith(".2")} - modules
        surgery.remove_block_(model, new, optimizer, x=x)
    assert equal(model, old)
    exactly(optimizer, model)


def recount(model, shape, n):
    """FLOPs of a training step from the layers' sizes: three products each, but the first one's dX."""
    convs = list(cost.layers(model, torch.zeros(n, *shape)).values())
    heads = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    return 3 * sum(c.flops for c in convs) - convs[0].flops + 6 * n * heads


def test_widths_are_rounded_up_to_a_multiple_and_the_trunk_follows_only_if_told():
    model, x = network(), images(shape=SHAPE, dtype=torch.float32)
    layout = stages.find(model, SHAPE)
    assert grow_(model, layout, 1, "widen", multiple=16, x=x) == ["stages.1.0.conv1 6 -> 16"]
    assert grow_(model, layout, 1, "widen", multiple=16, x=x) == ["stages.1.0.conv1 16 -> 32"]
    done = grow_(model, layout, 2, "widen", factor=1.25, multiple=1, trunk=True, x=x)
    assert done == ["stages.2.0.conv1 8 -> 10", "stages.2.0.conv2 8 -> 10"]
    with pytest.raises(BadInput, match="unknown growth 'wider'"):
        grow_(model, layout, 0, "wider", x=x)


# In training


@dataclass(frozen=True)
class Watch(Method):
    """Looks at the network around the method that stands between two of these, at an epoch's end."""

    seen: list

    def __hash__(self):
        return id(self.seen)

    def on_epoch_end(self, run):
        exactly(run.optimizer, run.model)
        x = images(shape=run.dataset.shape, dtype=torch.float32)
        self.seen.append(
            (
                run.structures,
                both(run.model, x),
                step_flops(run.model, run.dataset.shape, run.batches.batch_size),
            )
        )


@pytest.mark.parametrize("mode", MODES)
def test_every_action_keeps_the_function_the_optimizer_and_the_budget(mode):
    before, after = Watch([]), Watch([])
    chosen = method(mode=mode, tau=1.0, progress=1.0, patience=1, prune=HARD)
    history = train(network(widths=(8, 8, 8)), DATA, replace(RECIPE, epochs=12), [before, chosen, after])
    changed = [(a[1], b[1]) for a, b in zip(before.seen, after.seen, strict=True) if a[0] != b[0]]
    assert changed
    for old, new in changed:
        assert (new[0] - old[0]).abs().max() <= 1e-5 * max(1, old[0].abs().max())
    assert actions(history)
    trained, looked, budget = spent(history)
    assert history.flops == trained
    assert trained + looked <= budget
    epochs = [a["epoch"] for a in actions(history, *GROWTH, "shrink")]
    assert all(b - a >= chosen.cooldown for a, b in itertools.pairwise(epochs))
    assert len(actions(history)) <= chosen.growths


def test_the_history_says_all():
    history = train(network(), DATA, RECIPE, [method()])
    seen = [e for e in history.events if "seen" in e]
    assert [e["epoch"] for e in seen] == list(range(len(seen)))
    for e in seen:
        assert {s["name"] for s in e["seen"]["stages"]} == {"stage 1", "stage 2", "stage 3"}
        assert {"widths", "live", "depth", "lost", "pending", "flops"} <= set(e["seen"]["stages"][0])
        assert {"loss", "accuracy", "train_loss", "train_accuracy", "size"} <= set(e["seen"])
        assert e["action"]["reason"]
        assert e["flops"] > 0
    assert [a["kind"] for a in actions(history, "stop")] == ["stop"] == [seen[-1]["action"]["kind"]]
    grown = next(e for e in seen if e["action"]["kind"] == "widen")
    assert "stage" in grown["action"]["stage"]
    assert grown["done"]
    assert grown["text"].startswith(f"epoch {grown['epoch']}: widen stage")
    assert json.loads(json.dumps(history.events, allow_nan=False)) == json.loads(json.dumps(history.events))
    assert any("lam" in e for e in history.events)


def test_training_accuracy_and_losses_are_means_over_the_epoch():
    losses, right = [], []

    class Look(Method):
        def on_step_end(self, run):
            losses.append(float(run.loss))

        def on_batch(self, run, x, y):
            right.append(y)
            return x, y

    history = train(network(), DATA, replace(RECIPE, epochs=2), [Look(), method()])
    per = len(losses) // 2
    first = next(e for e in history.events if "seen" in e)["seen"]
    assert first["train_loss"] == pytest.approx(sum(losses[:per]) / per, rel=1e-5)
    assert 0 <= first["train_accuracy"] <= 100


def test_the_same_seed_and_plan_give_the_same_weights():
    models_, histories = [], []
    chosen = method(prune=HARD)
    for m in (chosen, None):
        model = network()
        steps = m or replace(chosen, plan=json.loads(json.dumps(decisions(histories[0]))))
        histories.append(train(model, DATA, RECIPE, [steps]))
        models_.append(model)
    assert len(actions(histories[0])) > 0
    assert equal(*models_)
    assert histories[0].flops == histories[1].flops
    assert decisions(histories[1]) == decisions(histories[0])
    other = network()
    without = [s for s in decisions(histories[0]) if s[1] not in GROWTH]
    train(other, DATA, RECIPE, [replace(chosen, plan=without)])
    assert models.describe(other)["blocks"] != models.describe(models_[0])["blocks"]


def test_a_plan_that_cannot_be_followed_is_bad_input():
    with pytest.raises(BadInput, match="the plan goes on after epoch"):
        train(network(), DATA, replace(RECIPE, epochs=3), [method(plan=((7, "widen", "stage 1"),))])
    with pytest.raises(BadInput, match="unknown stage 'stage 9'"):
        train(network(), DATA, replace(RECIPE, epochs=3), [method(plan=((0, "widen", "stage 9"),))])
    with pytest.raises(BadInput, match="unknown kind of action 'widn'"):
        method(plan=((0, "widn", "stage 1"),))
    with pytest.raises(BadInput, match="in the plan, expected"):
        method(plan=((0, "widen"),))


@pytest.mark.parametrize("make", [network, vgg])
def test_a_resumed_run_ends_as_the_whole_one(make, tmp_path):
    chosen = method(prune=HARD, plan=((0, "widen", "stage 2"), (2, "deepen", "stage 2"), (4, "stop", "")))
    (resumed, a), (whole, b) = resumed_and_whole(make, DATA, RECIPE, [chosen], tmp_path / "run.pt")
    assert equal(resumed, whole)
    assert told(a) == told(b)
    assert a.flops == b.flops
    assert [r["loss"] for r in a.rows] == [r["loss"] for r in b.rows]
    assert models.describe(whole) != models.describe(make())


def test_a_resumed_run_decides_as_the_whole_one(tmp_path):
    (resumed, a), (whole, b) = resumed_and_whole(
        network, DATA, RECIPE, [method(prune=HARD)], tmp_path / "run.pt"
    )
    assert equal(resumed, whole)
    assert told(a) == told(b)
    assert actions(a)


def test_newborns_are_spared_for_their_grace_and_then_penalised():
    seen = {}

    class Look(Method):
        def on_step_end(self, run):
            masks = [mask for _, mask in chosen._groups(run) if mask is not None]
            seen.setdefault(run.epoch, []).append(sum(int((mask == 0).sum()) for mask in masks))

    chosen = method(plan=((1, "widen", "stage 3"),), grace=2, search=0.9)
    history = train(network(), DATA, RECIPE, [chosen, Look()])
    spared = [e for e, n in seen.items() if max(n) > 0]
    assert spared == [2, 3]
    assert seen[2][0] == 4  # 8 -> 12 channels, each read by one layer
    assert actions(history)[0]["stage"] == "stage 3"


def test_the_penalty_ends_and_the_learning_rate_falls_with_the_search():
    lrs = {}

    class Look(Method):
        def on_after_backward(self, run):
            lrs[run.step] = run.lr

    recipe = replace(RECIPE, warmup=0.125)
    chosen = method(plan=((3, "stop", ""),), budget=10.0)
    train(network(), DATA, recipe, [chosen, Look()])
    per = len(lrs) // 8
    assert all(lrs[s] == recipe.lr for s in range(per, 4 * per))
    falling = [lrs[s] for s in range(4 * per, 8 * per)]
    assert falling[0] == pytest.approx(recipe.lr)
    assert all(a > b for a, b in itertools.pairwise(falling))
    assert falling[-1] == pytest.approx(recipe.lr / (4 * per))


def test_dead_channels_are_cut_and_the_run_costs_less():
    strong = method(idle=0.02, prune=HARD, growths=0, budget=1.5)
    history = train(network(widths=(8, 8, 8)), DATA, replace(RECIPE, epochs=6), [strong])
    plain = train(network(widths=(8, 8, 8)), DATA, replace(RECIPE, epochs=6))
    lost = [s["lost"] for e in history.events if "seen" in e for s in e["seen"]["stages"]]
    assert max(lost) > 0
    assert history.flops < plain.flops
    assert history.structure != plain.structure


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_run_is_shortened_to_its_budget_which_scales_with_its_length(share):
    for epochs in (4, 8):
        chosen = method(budget=share, growths=0, prune=replace(GENTLE, ratio=0.0))
        history = train(network(), DATA, replace(RECIPE, epochs=epochs), [chosen])
        trained, looked, budget = spent(history)
        assert budget == share * epochs * PER_EPOCH * step_flops(network(), SHAPE, 32)
        assert 0.9 * budget < trained + looked <= budget
        assert history.steps < epochs * PER_EPOCH
        assert history.rows[-1]["step"] == history.steps


def test_no_penalty_waits_for_ever_and_growth_alone_does_not():
    none = replace(GENTLE, ratio=0.0)
    waiting = train(network(), DATA, RECIPE, [method(prune=none)])
    assert actions(waiting) == []
    assert "no penalty" in next(a["reason"] for a in actions(waiting, "wait") if "pressure" in a["reason"])
    alone = train(network(), DATA, RECIPE, [method(prune=none, pressure=False)])
    assert actions(alone)
    assert all(
        s["pending"] == 0 for e in alone.events if "seen" in e for s in e["seen"]["stages"]
    )  # weight decay is no penalty


def test_lambda_can_come_from_prune_trains_ratio():
    history = train(network(), DATA, replace(RECIPE, epochs=2), [method(idle=0)])
    plain = train(network(), DATA, replace(RECIPE, epochs=2), [GENTLE])
    assert next(e["lam"] for e in history.events if "lam" in e) == next(
        e["lam"] for e in plain.events if "lam" in e
    )


# Networks and images


def test_a_plain_network_grows_by_layers():
    chosen = method(order=("deepen", "widen"), budget=4.0, prune=HARD)
    history = train(vgg(), DATA, RECIPE, [chosen])
    assert actions(history)[0]["kind"] == "deepen"
    assert sum(len(s) for s in history.structure["widths"]) > 2
    assert history.flops == spent(history)[0]


@pytest.mark.parametrize("growth", GROWTH)
def test_a_users_network_is_pruned_and_grown(growth):
    small = data.synthetic(images=96, size=16, channels=3)
    model = resnet18()
    before = step_flops(model, (3, 16, 16), 2)
    chosen = method(
        plan=((0, growth, "stage 4"), (1, "stop", "")),
        budget=4.0,
        idle=0.9,
        prune=replace(GENTLE, multiple=16),
    )
    history = train(model, small, replace(RECIPE, epochs=3, batch_size=16, lr=0.01), [chosen])
    assert actions(history)[0]["stage"] == "stage 4"
    assert step_flops(model, (3, 16, 16), 2) > before
    assert history.flops == spent(history)[0]


def test_what_cannot_be_pruned_or_grown_is_refused():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))

        def forward(self, x):
            return self.body(x)

    with pytest.raises(BadInput, match="Fixed has no channels that could be pruned or widened"):
        train(Fixed(), DATA, RECIPE, [method()])

    class Added(nn.Module):
        """A residual path without inner channels."""

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return x + self.conv(x)

    class Trunk(nn.Module):
        """Its only node is a trunk, and its blocks are not in a Sequential."""

        def __init__(self):
            super().__init__()
            self.stem, self.blocks, self.head = (
                nn.Conv2d(1, 4, 3, padding=1),
                nn.ModuleList([Added()]),
                nn.Linear(4, 4),
            )

        def forward(self, x):
            return self.head(self.blocks[0](self.stem(x)).mean((2, 3)))

    with pytest.raises(BadInput, match="no stage of Trunk can become wider or deeper"):
        train(Trunk(), DATA, RECIPE, [method()])


def test_it_composes_with_a_method_that_resizes_images():
    history = train(network(), DATA, RECIPE, [Resize(), method(mode="thesis", cooldown=1)])
    sizes = [tuple(e["seen"]["size"]) for e in history.events if "seen" in e]
    assert sizes[0] == (4, 4)
    assert sizes[-1] == (8, 8)
    trained, looked, budget = spent(history)
    assert history.flops == trained
    assert trained + looked <= budget
    full = train(network(), DATA, RECIPE, [method(plan=())])
    small = train(network(), DATA, RECIPE, [Resize(), method(plan=())])
    assert small.flops < 0.8 * full.flops


def test_flops_are_right_where_the_images_change_within_an_epoch():
    assert round(0.3 * RECIPE.epochs * PER_EPOCH) % PER_EPOCH
    history = train(
        network(),
        DATA,
        RECIPE,
        [Resize(at=0.3), method(plan=(), budget=4.0, prune=replace(GENTLE, ratio=0.0))],
    )
    small = round(0.3 * history.steps)
    half, full = (step_flops(network(), (1, side, side), RECIPE.batch_size) for side in (4, 8))
    assert history.flops == spent(history)[0] == small * half + (history.steps - small) * full


@pytest.mark.parametrize("growth", GROWTH)
@pytest.mark.parametrize(("make", "number"), [(network, 0), (network, 2), (vgg, 1)])
def test_a_growth_is_priced_by_what_a_step_then_costs(make, number, growth):
    model = make()
    layout, chosen, x = stages.find(model, SHAPE), method(), images(shape=SHAPE, dtype=torch.float32)
    more = chosen._added(model, layout, x, number, growth, 2)
    before = step_flops(model, SHAPE, 3)
    grow_(model, layout, number, growth, multiple=2, x=x, generator=g())
    assert 3 * more == step_flops(model, SHAPE, 3) - before > 0


def test_settings_that_cannot_be_are_bad_input():
    for settings, message in [
        (dict(mode="sometimes"), "unknown mode 'sometimes'"),
        (dict(breaker="magic"), "unknown symmetry breaker"),
        (dict(prune=PruneTrain(mode="published")), "proximal mode"),
        (dict(prune=PruneTrain(at=(0.5,))), "proximal mode"),
        (dict(search=1.0), r"search lies in \(0, 1\)"),
        (dict(grace=5), "at most the cool-down"),
        (dict(factor=1.0), "factor is above 1"),
    ]:
        with pytest.raises(BadInput, match=message):
            PruneThenGrow(**settings)
