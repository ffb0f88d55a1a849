"""Mixed precision: the emulated layers against a slow oracle, the loss scaler bit by bit, and what master
weights are for.
"""

import copy
import math
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effilib import models, seeds
from effilib.data import synthetic
from effilib.errors import BadInput, NoEffect
from effilib.hooks import Method
from effilib.methods.mixed_precision import (
    INFO,
    HalfBatchNorm2d,
    HalfConv2d,
    HalfLinear,
    LossScaler,
    MixedPrecision,
    Round,
    emulate_fp16_,
    round_to,
)
from effilib.recipe import Recipe
from effilib.training import train
from tests.common import equal, g, resumed_and_whole

DATA = synthetic(images=300)
RECIPE = Recipe(epochs=2, batch_size=32, precision="fp32")


def network(seed=0):
    return models.build("resnet", 4, (1, 8, 8), seed=seed, widths=(8, 8), blocks=(1, 1))


# Rounding


def test_rounding_is_to_the_nearest_number_of_fp16():
    x = torch.tensor(
        [
            1 + 2.0**-11,
            1 + 3 * 2.0**-11,
            1 + 2.0**-10,
            65504.0,
            65519.9,
            65520.0,
            -1e6,
            2.0**-24,
            2.0**-25,
            1.1 * 2.0**-25,
        ]
    )
    expected = [
        1,
        1 + 2.0**-9,
        1 + 2.0**-10,
        65504,
        65504,
        math.inf,
        -math.inf,
        2.0**-24,
        0,
        2.0**-24,
    ]  # ties go to even
    assert round_to(x).tolist() == expected
    assert round_to(x).dtype == torch.float32
    assert torch.isnan(round_to(torch.tensor(math.nan)))
    many = torch.randn(10_000, generator=g())
    assert ((round_to(many) - many).abs() <= 2.0**-11 * many.abs()).all()
    assert torch.equal(round_to(round_to(many)), round_to(many))
    assert round_to(many.double()).dtype == torch.float64
    assert round_to(torch.tensor([1 + 2.0**-8, 1e38]), torch.bfloat16)[0] == 1


def test_round_rounds_forward_and_its_gradient_backward():
    x = torch.randn(50, generator=g()).requires_grad_()
    dy = torch.randn(50, generator=g(1)) * 1e-6
    y = Round.apply(x)
    y.backward(dy)
    assert torch.equal(y, round_to(x.detach()))
    assert torch.equal(x.grad, round_to(dy))
    assert not torch.equal(x.grad, dy)


def test_the_gradient_passes_straight_through_where_fp16_holds_it():
    """As gradcheck does, by differences: of steps so large that rounding them is exact."""
    x = (torch.randint(-8, 8, (6,), generator=g()) / 4).requires_grad_()
    Round.apply(x).square().sum().backward()
    step = 0.25
    difference = [
        (round_to(x + step * e).square().sum() - round_to(x - step * e).square().sum()) / (2 * step)
        for e in torch.eye(6)
    ]
    assert torch.equal(x.grad, torch.stack(difference).detach())


# The layers


def oracle(x, w, b, dy, product):
    """y, dx, dw, db of an emulated layer: operands rounded, products and sums in float64, results rounded."""
    x, w = round_to(x).double().requires_grad_(), round_to(w).double().requires_grad_()
    b = None if b is None else b.double().requires_grad_()
    y = product(x, w, b)
    y.backward(round_to(dy).double())
    return [
        round_to(t.float()) if i != 3 else t.float()
        for i, t in enumerate([y, x.grad, w.grad, *([b.grad] if b is not None else [])])
    ]


def by_layer(layer, x, dy):
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    return [
        t.detach()
        for t in [y, x.grad, layer.weight.grad, *([layer.bias.grad] if layer.bias is not None else [])]
    ]


def ulps(a, b):
    """Units in the last place of fp16 between a and b, next to each other in fp16 being 1."""
    return (
        ((a - b).abs() / torch.maximum(b.abs(), torch.tensor(2.0**-14)).log2().floor().sub(10).exp2())
        .max()
        .item()
    )


SHAPES = {
    "3x3": dict(in_channels=4, out_channels=6, kernel_size=3, padding=1, bias=False),
    "stride, bias": dict(in_channels=4, out_channels=6, kernel_size=3, stride=2, bias=True),
    "groups": dict(in_channels=4, out_channels=6, kernel_size=3, groups=2, padding=1),
    "1x1": dict(in_channels=4, out_channels=6, kernel_size=1),
    "dilated, circular": dict(
        in_channels=4, out_channels=6, kernel_size=3, dilation=2, padding=2, padding_mode="circular"
    ),
}


@pytest.mark.parametrize("settings", SHAPES.values(), ids=SHAPES.keys())
def test_the_emulated_convolution_is_that_of_the_slow_oracle(settings):
    with seeds.seeded(1):
        layer = HalfConv2d(**settings)
        full = nn.Conv2d(**settings)
    full.load_state_dict(layer.state_dict())
    x = torch.randn(3, 4, 8, 8, generator=g())
    dy = torch.randn(full(x).shape, generator=g(1)) * 1e-3

    def product(x, w, b):
        return full.double()._conv_forward(x, w, b)

    mine, exact = (
        by_layer(layer, x, dy),
        oracle(x, layer.weight.detach(), None if layer.bias is None else layer.bias.detach(), dy, product),
    )
    full.float().zero_grad()
    plain = by_layer(full, x, dy)
    for i, (a, b, c) in enumerate(zip(mine, exact, plain, strict=True)):
        if i < 3:  # fp32 sums may fall on the other side of a tie
            assert ulps(a, b) <= 1
            assert (a == b).float().mean() > 0.99
            assert torch.equal(a, round_to(a))
        else:
            assert torch.allclose(a, b, rtol=1e-5)
        assert not torch.equal(a, c)  # an emulation that is bit-equal to fp32 rounds nothing


def test_the_emulated_linear_layer_is_that_of_the_slow_oracle():
    with seeds.seeded(1):
        layer = HalfLinear(20, 5)
    x, dy = torch.randn(7, 20, generator=g()), torch.randn(7, 5, generator=g(1)) * 1e-3
    mine, exact = by_layer(layer, x, dy), oracle(x, layer.weight.detach(), layer.bias.detach(), dy, F.linear)
    for a, b in zip(mine[:3], exact[:3], strict=True):
        assert ulps(a, b) <= 1
        assert torch.equal(a, round_to(a))
    assert torch.allclose(mine[3], exact[3], rtol=1e-5)


def test_the_emulated_batchnorm_keeps_its_statistics_in_fp32():
    half, full = HalfBatchNorm2d(4), nn.BatchNorm2d(4)
    x = round_to(torch.randn(8, 4, 5, 5, generator=g()) * 3 + 1)
    assert torch.equal(half(x), round_to(full(x)))
    assert equal(half, full)
    assert half.running_mean.dtype == torch.float32
    assert not torch.equal(half.running_mean, round_to(half.running_mean))


@pytest.mark.parametrize(("size", "lost"), [(2.0**-26, True), (2.0**-24, False)])
def test_gradients_below_half_of_the_smallest_number_are_lost(size, lost):
    layer = HalfLinear(3, 3, bias=False)
    x = torch.ones(1, 3, requires_grad=True)
    layer(x).backward(torch.full((1, 3), size))
    assert (layer.weight.grad == 0).all() == lost


# Surgery


def test_emulation_keeps_parameters_names_and_objects_and_can_be_undone():
    model = nn.Sequential(network(), nn.Flatten(), nn.Linear(4, 4))
    kinds, state = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())
    parameters = dict(model.named_parameters())
    layers = sum(isinstance(m, nn.Conv2d | nn.Linear | nn.BatchNorm2d) for m in model.modules())
    assert emulate_fp16_(model) == layers
    assert {type(m) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.BatchNorm2d)} == {
        HalfConv2d,
        HalfLinear,
        HalfBatchNorm2d,
    }
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[n] is p for n, p in parameters.items())
    model[0].load_state_dict(network().state_dict())  # checkpoints fit both ways
    assert emulate_fp16_(model, on=False) == layers
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_second_time_or_a_model_without_such_layers_has_no_effect():
    model = network()
    with pytest.raises(NoEffect):
        emulate_fp16_(model, on=False)
    emulate_fp16_(model)
    with pytest.raises(NoEffect, match="no convolution or linear layer of ResNet matched"):
        emulate_fp16_(model)
    with pytest.raises(NoEffect, match="of Flatten matched"):
        emulate_fp16_(nn.Flatten())
    with pytest.raises(NoEffect):
        train(nn.Sequential(nn.Flatten(), OwnLinear(64, 4)), DATA, RECIPE, [MixedPrecision()])


class OwnLinear(nn.Module):
    """A layer that emulation does not know."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))

    def forward(self, x):
        return x @ self.weight.T


# The loss scale


def gradients(model, scale=1.0):
    model.zero_grad()
    x, y = DATA.normalize(DATA.train.x[:32]), DATA.train.y[:32]
    (scale * F.cross_entropy(model.eval()(x), y)).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("exponent", [-8, 1, 10, 15, 40])
def test_scaling_by_a_power_of_two_is_exact(exponent):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain = [grad.clone() for grad in gradients(model)]
    scaler = LossScaler(2.0**exponent)
    gradients(model, scaler.scale(1.0))
    scaler.unscale_(optimizer)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), plain, strict=True))
    assert scaler.finite


def test_scaling_by_another_number_is_not_exact():
    model = network()
    plain = [grad.clone() for grad in gradients(model)]
    assert not all(torch.equal(a / 30_000, b) for a, b in zip(gradients(model, 30_000.0), plain, strict=True))


def scaled_step(scaler, model, optimizer, factor=1.0):
    gradients(model, factor * scaler.scale(1.0))
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


def test_an_overflowing_step_is_skipped_bit_for_bit_and_halves_the_scale():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    scaler = LossScaler(2.0**10)
    scaled_step(scaler, model, optimizer)  # momentum is there
    weights, momenta = copy.deepcopy(list(model.parameters())), copy.deepcopy(optimizer.state_dict()["state"])
    scaled_step(scaler, model, optimizer, 1e38)
    assert not scaler.finite
    assert scaler.S == 2.0**9
    assert scaler.skipped == 1
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    state = optimizer.state_dict()["state"]
    assert all(torch.equal(s["momentum_buffer"], momenta[i]["momentum_buffer"]) for i, s in state.items())
    scaled_step(scaler, model, optimizer)
    assert not torch.equal(model.head.weight, weights[-2])
    assert scaler.S == 2.0**9


def test_a_nan_in_one_gradient_is_enough_and_a_large_finite_one_is_none():
    w = nn.Parameter(torch.ones(4))
    v = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([{"params": [w]}, {"params": [v]}], lr=1e-30)
    for values, finite in (
        ([1.0, 1, 1, 1], True),
        ([1e30, -1e38, 0, 1], True),
        ([1, math.nan, 1, 1], False),
        ([1, 1, -math.inf, 1], False),
    ):
        w.grad, v.grad = torch.tensor(values), torch.ones(2)
        scaler = LossScaler(1.0)
        scaler.unscale_(optimizer)
        assert scaler.finite == finite, values


def test_parameters_without_a_gradient_are_left_alone():
    w, v = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    w.grad = torch.full((2,), 8.0)
    optimizer, scaler = torch.optim.SGD([w, v], lr=1.0), LossScaler(8.0)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert w.tolist() == [0, 0]
    assert v.tolist() == [1, 1]


def scales(scaler, pattern):
    seen = []
    for finite in pattern:
        scaler.finite = finite
        scaler.update()
        seen.append(scaler.S)
    return seen


def test_the_scale_grows_after_that_many_clean_steps_in_a_row():
    assert scales(LossScaler(8.0, interval=3), [True] * 7) == [8, 8, 16, 16, 16, 32, 32]
    assert scales(LossScaler(8.0, interval=3), [True, True, False, True, True, True, False]) == [
        8,
        8,
        4,
        4,
        4,
        8,
        4,
    ]


def test_a_constant_scale_stays_and_takes_every_step():
    scaler = LossScaler(8.0, growth=1.0, backoff=1.0, interval=2, skip=False)
    assert set(scales(scaler, [True, True, False, True])) == {8.0}
    assert scaler.skipped == 0
    w = nn.Parameter(torch.ones(1))
    w.grad = torch.tensor([math.inf])
    optimizer = torch.optim.SGD([w], lr=1.0)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert w.item() == -math.inf


@pytest.mark.parametrize("wrong", [{"interval": 0}, {"interval": 1.5}, {"scale": 0.0}], ids=str)
def test_wrong_settings_are_named(wrong):
    (name, value), *_ = wrong.items()
    for make in (LossScaler, MixedPrecision):
        with pytest.raises(BadInput, match=f"mixed precision: {name} is {value}"):
            make(**wrong)


def test_the_scalers_state_is_plain_and_goes_on_from_there():
    scaler = LossScaler(8.0, interval=3)
    scales(scaler, [True, False, True, True])
    other = LossScaler(1.0, interval=3)
    other.load_state_dict(scaler.state_dict())
    assert other.state_dict() == scaler.state_dict() == {"S": 4.0, "clean": 2, "skipped": 1}
    assert scales(scaler, [True, True]) == scales(other, [True, True]) == [8, 8]


# The method


def trained(methods=(), recipe=RECIPE, **options):
    model = network()
    return model, train(model, DATA, recipe, methods, **options)


ARMS = {
    "no care": MixedPrecision(master=False, scale=1.0, dynamic=False),
    "master": MixedPrecision(scale=1.0, dynamic=False),
    "master + scaling": MixedPrecision(),
    "constant scale": MixedPrecision(scale=128.0, dynamic=False),
}


def test_no_arm_is_bit_equal_to_fp32_or_to_another():
    """The names of the layers come first: a method that changes nothing must not pass for one that costs
    nothing.
    """
    found = {"fp32": trained()[0]} | {name: trained([m])[0] for name, m in ARMS.items()}
    names = list(found)
    assert [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if equal(found[a], found[b])] == []


def test_emulated_training_learns_and_leaves_a_plain_model_behind():
    recipe = replace(RECIPE, epochs=6)
    model, history = trained([MixedPrecision()], recipe)
    assert history.accuracy > 85
    assert not any(type(m) in (HalfConv2d, HalfLinear, HalfBatchNorm2d) for m in model.modules())
    assert history.events[-1]["text"].startswith("S ended at 65536")
    assert history.events[-1]["skipped"] == 0
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_without_master_weights_all_that_is_kept_is_fp16():
    @dataclass(frozen=True)
    class Look(Method):
        seen: list = field(default_factory=list, hash=False, compare=False)

        def on_step_end(self, run):
            momenta = [s["momentum_buffer"] for s in run.optimizer.state.values()]
            self.seen.append(all(torch.equal(t, round_to(t)) for t in [*run.model.parameters(), *momenta]))

    for method, rounded in ((ARMS["no care"], True), (ARMS["master"], False)):
        look = Look()
        trained([method, look])
        assert set(look.seen) == {rounded}


@dataclass(frozen=True)
class Nudge(Method):
    """Replaces every gradient by one that moves a weight of 1 by 2^-12 a step."""

    def on_fit_start(self, run):
        with torch.no_grad():
            for p in run.model.parameters():
                p.fill_(1.0)

    def on_after_backward(self, run):
        for p in run.model.parameters():
            p.grad.fill_(-(2.0**-12))


def test_updates_below_2_to_the_minus_11_are_lost_without_master_weights_and_kept_with_them():
    recipe = replace(
        RECIPE, lr=1.0, schedule="constant", warmup=0.0, momentum=0.0, weight_decay=0.0, epochs=1
    )
    steps = len(DATA.train) // 32
    kept, _ = trained([MixedPrecision(), Nudge()], recipe)
    lost, _ = trained([MixedPrecision(master=False), Nudge()], recipe)
    assert all((p == 1 + steps * 2.0**-12).all() for p in kept.parameters())
    assert all((p == 1).all() for p in lost.parameters())


def test_overflowing_steps_of_a_training_are_skipped_and_the_scale_falls_until_they_fit():
    _, history = trained([MixedPrecision(scale=2.0**30)])
    event = history.events[-1]
    assert not history.diverged
    assert event["skipped"] > 3
    assert event["scale"] == 2.0 ** (30 - event["skipped"])


def test_the_scale_grows_in_training():
    _, history = trained([MixedPrecision(scale=8.0, interval=5)])
    assert history.events[-1]["scale"] == 8.0 * 2 ** (history.steps // 5)


def test_a_method_that_looks_at_gradients_sees_them_unscaled():
    @dataclass(frozen=True)
    class Norm(Method):
        seen: list = field(default_factory=list, hash=False, compare=False)

        def on_after_backward(self, run):
            self.seen.append(float(torch.stack([p.grad.norm() for p in run.model.parameters()]).norm()))

    scaled, plain = Norm(), Norm()
    trained([MixedPrecision(scale=2.0**14), scaled])
    trained([plain])
    assert scaled.seen[0] == pytest.approx(plain.seen[0], rel=0.01)


@pytest.mark.parametrize(
    "method", [MixedPrecision(scale=2.0**30, interval=6), ARMS["no care"]], ids=["dynamic", "no care"]
)
def test_a_resumed_run_has_its_scale_and_ends_bit_equal(method, tmp_path):
    (a, ha), (b, hb) = resumed_and_whole(network, DATA, RECIPE, [method], tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)["scaler"]
    assert (saved["S"] < 2.0**30) == (saved["skipped"] > 0) or method is ARMS["no care"]
    assert equal(a, b)
    assert ha.events == hb.events


def test_emulation_within_16_bit_autocast_is_refused():
    with pytest.raises(ValueError, match="precision 'fp32'"):
        trained([MixedPrecision()], replace(RECIPE, precision="bf16"))


def test_the_information_is_complete():
    assert all(getattr(INFO, f) for f in ("name", "name_de", "chapter", "paper", "claim", "cost_model"))
