"""A prefix that freezes: against a network whose prefix is in eval mode, what it saves, and what is left."""

import copy
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effilib import cost, models
from effilib.data import synthetic
from effilib.errors import BadInput, NoEffect
from effilib.hooks import Method
from effilib.methods.freezing import INFO, PLAIN, FrozenPrefix, freeze_, prefix, thaw_
from effilib.recipe import Recipe
from effilib.training import train
from tests.common import equal, g, images, make, resumed_and_whole, shake, users

DATA = synthetic(images=300)
RECIPE = Recipe(epochs=2, batch_size=32, precision="fp32")


def network(**settings):
    return models.build("resnet", 4, (1, 8, 8), **{"widths": (8, 8), "blocks": (1, 2), **settings})


def plain(model):
    return not any(type(m) in PLAIN for m in model.modules())


# Which layers


def test_a_prefix_is_what_works_on_the_largest_maps_in_the_order_of_the_calls():
    stage = [f"stages.0.0.{n}" for n in ("conv1", "bn1", "conv2", "bn2")]
    assert prefix(network(), torch.zeros(2, 1, 8, 8)) == ["stem", "bn", *stage]
    both = prefix(network(), torch.zeros(2, 1, 8, 8), depth=2)
    assert both[6:9] == ["stages.1.0.conv1", "stages.1.0.bn1", "stages.1.0.conv2"]
    assert len(both) == 6 + 10  # two blocks and a shortcut
    assert prefix(users(), torch.zeros(2, 1, 8, 8))[-1] == "layer1.1.bn2"


class Twice(nn.Module):
    """A layer that is called again behind the others."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.a(self.b(self.a(x)))[:, 0, :4, :4].flatten(1))


def test_a_parameter_of_the_networks_own_does_not_hide_its_layers():
    model, x = network(), torch.zeros(2, 1, 8, 8)
    names = prefix(model, x)
    model.scale, model.stages[0][0].shift = (nn.Parameter(torch.ones(1)) for _ in range(2))
    assert prefix(model, x) == names


def test_a_network_without_such_layers_has_no_effect():
    x = torch.zeros(2, 1, 8, 8)
    for model in (nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), Twice()):
        with pytest.raises(NoEffect, match="no layer comes before"):
            prefix(model, x)
    whole = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(NoEffect, match="no layer would be left"):
        prefix(whole, x)
    with pytest.raises(NoEffect, match="frozen prefix"):
        train(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), DATA, RECIPE, [FrozenPrefix()])


# Frozen


def ours_and_theirs():
    yield from ((make(name, dtype=torch.float32), images(dtype=torch.float32)) for name in ("resnet", "vgg"))
    yield shake(users()), torch.randn(6, 1, 8, 8, generator=g())


def test_the_rest_has_the_gradients_of_a_network_whose_prefix_is_in_eval_mode():
    for model, x in ours_and_theirs():
        model.eval()  # no dropout
        slow, fast = model, copy.deepcopy(model)
        names = prefix(model, x)
        frozen = freeze_(fast, x, names)
        after = [m for n, m in model.named_modules() if n not in names]
        for net in (slow, fast):
            for n, m in net.named_modules():
                if isinstance(m, nn.BatchNorm2d) and n not in names:
                    m.train()
        logits = [net(x) for net in (slow, fast)]
        assert torch.allclose(logits[0], logits[1], rtol=1e-4, atol=1e-4)
        for y in logits:
            F.cross_entropy(y, torch.arange(len(x)) % 4).backward()
        theirs = dict(slow.named_parameters())
        for name, p in fast.named_parameters():
            if name in frozen:
                assert p.grad is None
            else:
                assert torch.allclose(p.grad, theirs[name].grad, rtol=1e-3, atol=1e-4)
        assert {n.rpartition(".")[0] for n in frozen} == set(names)
        assert any(p.grad is not None for m in after for p in m.parameters())


def test_frozen_layers_stay_as_they_are_also_in_training_mode_and_thaw_as_they_were():
    for model, x in ours_and_theirs():
        expected, state = model.eval()(x), copy.deepcopy(model.state_dict())
        kinds = [type(m) for m in model.modules()]
        names = prefix(model, x)
        frozen = freeze_(model, x, names)
        assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-4)
        model.train()(x)
        for name in names:
            for key, t in model.get_submodule(name).state_dict().items():
                assert torch.equal(t, state[f"{name}.{key}"])
        thaw_(model, frozen)
        assert [type(m) for m in model.modules()] == kinds
        assert all(p.requires_grad for p in model.parameters())
        model.load_state_dict(state)
        assert torch.equal(model.eval()(x), expected)


def test_frozen_layers_have_a_forward_pass_and_no_other():
    model, x = network(), torch.randn(4, 1, 8, 8, generator=g())

    def flops():
        return cost.count_flops(lambda: model.train()(x).sum().backward())

    before = flops()
    names = prefix(model, x)
    layers = cost.layers(model, x)
    frozen = freeze_(model, x, names)
    # forward; dX and dW are gone, but the stem never had a dX; and behind the prefix two dX are gone
    products = {n: layers[n].flops for n in layers}
    gone = 2 * sum(products[n] for n in names if n in products) - products["stem"]
    gone += products["stages.1.0.conv1"] + products["stages.1.0.shortcut.0"]
    assert before - flops() == gone
    thaw_(model, frozen)
    assert flops() == before


class Odd(nn.Module):
    """BatchNorms that cannot be folded: one before its convolution, one whose input is read again."""

    def __init__(self):
        super().__init__()
        self.first, self.conv1 = nn.BatchNorm2d(1), nn.Conv2d(1, 4, 3, padding=1)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.down, self.head = nn.Conv2d(4, 4, 3, stride=2), nn.Linear(36, 4)

    def forward(self, x):
        y = self.conv2(F.relu(self.conv1(self.first(x))))
        return self.head(self.down(self.bn2(y) + y).flatten(1))


def test_a_batchnorm_that_cannot_be_folded_keeps_its_statistics():
    model, x = shake(Odd()), torch.randn(4, 1, 8, 8, generator=g())
    expected, mean = model.eval()(x), model.bn2.running_mean.clone()
    freeze_(model, x, prefix(model, x))
    assert [type(m).__name__ for m in (model.first, model.conv2, model.bn2)] == ["_Fixed", "Conv2d", "_Fixed"]
    assert torch.allclose(model.train()(x), expected, atol=1e-5)
    assert torch.equal(model.bn2.running_mean, mean)


def test_what_other_layers_use_too_and_what_was_frozen_before_are_left_alone():
    model, x = network(), torch.zeros(2, 1, 8, 8)
    model.stages[1][0].conv2.weight = model.stages[0][0].conv1.weight
    model.bn.bias.requires_grad_(False)
    frozen = freeze_(model, x, prefix(model, x))
    assert model.stages[0][0].conv1.weight.requires_grad
    assert type(model.stages[0][0].conv1) is nn.Conv2d  # folded it would not follow its weight
    assert "bn.bias" not in frozen
    thaw_(model, frozen)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["bn.bias"]
    assert plain(model)


# The method


@dataclass(frozen=True)
class Watch(Method):
    """Notes after every step the stem's weight and learning rate, and the head's weight."""

    seen: list = field(default_factory=list, hash=False, compare=False, repr=False)

    def on_step_end(self, run):
        stem = run.model.stem.weight
        lr = next(gr["lr"] for gr in run.optimizer.param_groups if any(p is stem for p in gr["params"]))
        self.seen.append((stem.detach().clone(), run.model.head.weight.detach().clone(), lr, run.lr))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_prefix_is_trained_until_its_share_of_the_run_and_not_after(precision):
    watch, model = Watch(), network()
    recipe = replace(RECIPE, epochs=4, precision=precision)
    history = train(model, DATA, recipe, [FrozenPrefix(at=(0.5,)), watch])
    middle = next(i for i in range(history.steps) if (i + 1) / history.steps >= 0.5)
    for i in range(1, history.steps):
        assert torch.equal(watch.seen[i][0], watch.seen[i - 1][0]) == (i > middle)
        assert not torch.equal(watch.seen[i][1], watch.seen[i - 1][1])
    assert plain(model)
    assert all(p.requires_grad for p in model.parameters())
    assert history.accuracy > 60
    assert history.flops < train(network(), DATA, recipe).flops
    assert [e["text"] for e in history.events] == [
        "after 50% of the run, 6 layers are frozen, up to stages.0.0.bn2"
    ]


def test_sizes_of_maps_freeze_one_after_the_other():
    history = train(network(), DATA, RECIPE, [FrozenPrefix(at=(0.3, 0.7))])
    assert [e["text"].partition(",")[2] for e in history.events] == [
        " 6 layers are frozen, up to stages.0.0.bn2",
        " 16 layers are frozen, up to stages.1.1.bn2",
    ]


def test_annealed_layers_have_a_schedule_of_their_own_that_ends_when_they_freeze():
    watch, recipe = Watch(), replace(RECIPE, epochs=3)
    history = train(network(), DATA, recipe, [FrozenPrefix(at=(0.5,), anneal=True), watch])
    for i, (_, _, lr, others) in enumerate(watch.seen):
        assert others == pytest.approx(recipe.lr_at(i, history.steps))
        if i < 0.5 * history.steps:
            assert lr == pytest.approx(recipe.lr_at(i, 0.5 * history.steps))


@pytest.mark.parametrize("at", [(0.3,), (0.8,), (0.3, 0.8)], ids=str)
@pytest.mark.parametrize("anneal", [False, True])
def test_a_resumed_run_ends_bit_equal(at, anneal, tmp_path):
    method = FrozenPrefix(at=at, anneal=anneal)
    (a, ha), (b, hb) = resumed_and_whole(network, DATA, RECIPE, [method], tmp_path / "run.pt")
    assert equal(a, b)
    assert ha.events == hb.events


@pytest.mark.parametrize("at", [(), (0.0,), (1.0,), (0.7, 0.3), (0.5, 0.5)])
def test_shares_that_are_none_are_refused(at):
    with pytest.raises(BadInput, match="shares of a run"):
        FrozenPrefix(at=at)


def test_the_information_is_complete():
    assert all(getattr(INFO, f) for f in ("name", "name_de", "chapter", "paper", "claim", "cost_model"))
