"""Gradient approximation: the replaced dW against a sparse dy, the three schedules, and zeros against
skipping.
"""

from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effilib import cost, models
from effilib.convolution import ApproxConv2d, Convolution, approx_conv2d
from effilib.data import synthetic
from effilib.errors import BadInput, NoEffect
from effilib.hooks import Method
from effilib.methods.gradient_approximation import (
    INFO,
    REPLACEMENTS,
    GradientApproximation,
    approximate_gradients_,
    dw_at,
    locations,
    replacement,
    scheduled,
)
from effilib.recipe import Recipe
from effilib.training import train
from tests.common import equal, g, resumed_and_whole

DATA = synthetic(images=300)
RECIPE = Recipe(epochs=2, batch_size=32, precision="fp32")


def network(**settings):
    return models.build("resnet", 4, (1, 8, 8), **{"widths": (8, 8), "blocks": (1, 2), **settings})


GEOMETRIES = [
    (1, Convolution()), (3, Convolution(padding=(1, 1))), (3, Convolution()),
    (3, Convolution(stride=(2, 2), padding=(1, 1))), (5, Convolution(stride=(2, 1), padding=(2, 0))),
    (3, Convolution(dilation=(2, 2), padding=(2, 2))),
]  # fmt: skip


def case(k=3, product=GEOMETRIES[1][1], n=3, size=7, dtype=torch.float64):
    x = torch.randn(n, 4, size, size, generator=g(), dtype=dtype)
    w = torch.randn(5, 4, k, k, generator=g(1), dtype=dtype)
    return x, w, torch.randn(product.forward(x, w).shape, generator=g(2), dtype=dtype)


def sparse(dy, index, v):
    return torch.zeros_like(dy).flatten(2).scatter_(2, index[..., None], v[..., None].to(dy)).view_as(dy)


# One location


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("k", "product"), GEOMETRIES, ids=str)
def test_the_gather_is_the_exact_product_of_a_dy_with_one_location_per_sample_and_channel(k, product, layout):
    x, w, dy = case(k, product)
    x, w = x.contiguous(memory_format=layout), w.contiguous(memory_format=layout)
    for how in ("top", "unbiased"):
        index, v = locations(dy, how, g(3))
        dy1 = sparse(dy, index, v)
        assert (dy1 != 0).sum() == dy.shape[0] * dy.shape[1]
        mine = dw_at(index, v, x, w, product)
        assert torch.allclose(mine, product.backward(dy1, x, w, (False, True))[1], rtol=1e-5, atol=1e-5)
        assert mine.shape == w.shape


def test_the_top_location_has_the_largest_magnitude_and_the_signed_sum():
    dy = torch.tensor([[[[1.0, -5], [2, 1]], [[0, 3], [-1, 0]]]])
    index, v = locations(dy, "top")
    assert index.tolist() == [[1, 1]]
    assert v.tolist() == [[-1, 2]]
    _, _, dy = case()
    index, v = locations(dy)
    assert torch.allclose(sparse(dy, index, v).sum((2, 3)), dy.sum((2, 3)), atol=1e-5)


def test_at_scale_1_it_is_exact_for_maps_of_one_pixel_and_for_a_constant_input():
    exact = Convolution()
    x, w, dy = case(product=exact, size=3)
    assert dy.shape[2:] == (1, 1)
    assert torch.allclose(
        replacement("top", scale=1.0)(dy, x, w, exact), exact.backward(dy, x, w)[1], rtol=1e-5
    )
    x, w, dy = case(product=exact, size=6)
    x = x[:, :, :1, :1].expand_as(x).contiguous()
    assert torch.allclose(
        replacement("top", scale=1.0)(dy, x, w, exact), exact.backward(dy, x, w)[1], rtol=1e-4, atol=1e-5
    )


def test_top_is_biased_and_the_unbiased_variant_is_not():
    x, w, dy = case(n=2, size=4)
    product, draws, generator = GEOMETRIES[1][1], 3000, g(4)
    exact = product.backward(dy, x, w, (False, True))[1]
    dw = replacement("unbiased", generator=generator)
    found = torch.stack([dw(dy, x, w, product) for _ in range(draws)])
    z = (found.mean(0) - exact) / (found.std(0) / draws**0.5)
    assert z.abs().max() < 4.8
    assert (replacement("top", scale=1.0)(dy, x, w, product) - exact).abs().max() > 0.5
    index, v = locations(dy, "unbiased", g())
    assert torch.allclose(v.abs(), dy.flatten(2).abs().sum(2).float())
    assert torch.equal(v.sign(), dy.flatten(2).gather(2, index[..., None])[..., 0].sign().float())


def test_maps_that_are_all_zero_are_safe():
    x, w, dy = case()
    for how in ("top", "unbiased"):
        assert (replacement(how, generator=g())(torch.zeros_like(dy), x, w, GEOMETRIES[1][1]) == 0).all()


def test_the_published_scale_is_one_over_the_batch_on_top_of_the_mean_loss():
    x, w, dy = case()
    product = GEOMETRIES[1][1]
    assert torch.allclose(
        replacement("top")(dy, x, w, product) * 3, replacement("top", scale=1.0)(dy, x, w, product), rtol=1e-5
    )
    assert torch.equal(
        2 * replacement("top")(dy, x, w, product), replacement("top")(dy, 2 * x, w, product)
    )  # linear in x


@pytest.mark.parametrize("how", ["top", "random"])
def test_of_a_share_of_the_batch_the_scale_is_that_of_the_whole(how):
    """Two processes with 2 and 1 of 3 samples, whose gradients are averaged: one process's."""
    (x, w, dy), product = case(), GEOMETRIES[1][1]
    whole = replacement(how, generator=g())(dy, x, w, product)
    shares = [
        replacement(how, generator=g(), size=lambda: 3)(2 * dy[part], x[part], w, product)
        for part in (slice(0, 2), slice(2, 3))
    ]  # `Ranks.weigh` makes dy of a share twice that of the batch
    assert torch.allclose(sum(shares) / 2, whole, rtol=1e-5)


def test_random_gradients_have_the_published_deviation_and_are_fresh_each_time():
    x, w, dy = torch.zeros(8, 64, 3, 3), torch.zeros(64, 64, 3, 3), torch.zeros(8, 64, 1, 1)
    dw = replacement("random", generator=g())
    a, b = dw(dy, x, w, Convolution()), dw(dy + 1, x + 1, w, Convolution())
    assert a.std().item() == pytest.approx(1 / 8, rel=0.02)
    assert abs(a.mean().item()) < 4 / 8 / a.numel() ** 0.5
    assert not torch.equal(a, b)
    assert torch.equal(a, replacement("random", generator=g())(dy, x, w, Convolution()))


@pytest.mark.parametrize("how", REPLACEMENTS)
def test_forward_and_dx_stay_bit_equal_to_the_exact_ones(how):
    x, w, dy = case(dtype=torch.float32)
    x.requires_grad_(), w.requires_grad_()
    y, exact = approx_conv2d(x, w, padding=1, dw=replacement(how, generator=g())), F.conv2d(x, w, padding=1)
    y.backward(dy)
    assert torch.equal(y, exact)
    theirs = torch.autograd.grad(exact, (x, w), dy)
    assert torch.equal(x.grad, theirs[0])
    if how == "skip":
        assert w.grad is None
    else:
        assert w.grad.shape == w.shape
        assert (w.grad == 0).all() == (how == "zero")
        assert not torch.allclose(w.grad, theirs[1])


def test_a_replaced_product_is_not_computed():
    x, w, dy = case()
    x.requires_grad_(), w.requires_grad_()

    def flops(**parts):
        return cost.count_flops(lambda: approx_conv2d(x, w, padding=1, **parts).backward(dy))

    assert flops(dw=replacement("zero")) == flops() * 2 / 3
    with pytest.raises(BadInput, match="unknown gradient 'none'"):
        replacement("none")


# Schedules


def test_each_schedule_is_a_quarter_of_all_pairs_and_never_the_stem():
    for schedule in ("S1", "S2", "S3"):
        pairs = [
            (layer, step) for layer in range(17) for step in range(8) if scheduled(schedule, layer, step)
        ]
        assert len(pairs) == 16 * 8 / 4
        assert all(layer for layer, _ in pairs)
    assert [i for i in range(19) if scheduled("S1", i, 5)] == [1, 5, 9, 13, 17]  # ResNet-20: five layers
    assert [i for i in range(16) if scheduled("S1", i, 0)] == [1, 5, 9, 13]  # VGG-19: four
    assert [i for i in range(9) if scheduled("S2", i, 2)] == [1, 3, 5, 7]
    assert not any(scheduled("S2", i, 3) or scheduled("S3", i, 3) for i in range(9))
    assert [i for i in range(9) if scheduled("S3", i, 4)] == list(range(1, 9))


def test_convolutions_are_counted_as_in_resnet_20():
    model = models.build("resnet", 4, (1, 8, 8), widths=(4, 4, 4), blocks=(3, 3, 3))
    names = approximate_gradients_(model, "zero", "S1", lambda: 0, x=torch.zeros(2, 1, 8, 8))
    assert names == [
        "stages.0.0.conv1",
        "stages.0.2.conv1",
        "stages.1.1.conv1",
        "stages.2.0.conv1",
        "stages.2.2.conv1",
    ]
    other = models.build("resnet", 4, (1, 8, 8), widths=(4, 8, 8), blocks=(3, 3, 3))
    assert (
        approximate_gradients_(other, "zero", "S1", lambda: 0, x=torch.zeros(2, 1, 8, 8)) == names
    )  # 1x1 shortcuts do not count


def test_what_matches_nothing_has_no_effect():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(64, 4)
    )
    x = torch.zeros(2, 1, 8, 8)
    with pytest.raises(NoEffect, match="gradient approximation"):
        approximate_gradients_(model, "top", "always", lambda: 0, x=x)
    assert approximate_gradients_(model, "zero", "always", lambda: 0, x=x) == ["2"]
    with pytest.raises(BadInput, match="unknown schedule"):
        approximate_gradients_(network(), "zero", "S4", lambda: 0)


# The method


def trained(methods=(), recipe=RECIPE, **options):
    model = network()
    return model, train(model, DATA, recipe, methods, **options)


def test_no_arm_is_bit_equal_to_the_exact_one_or_to_another():
    found = {"exact": trained()[0]}
    for how in REPLACEMENTS:
        for schedule in ("S1", "S2", "S3"):
            found[how, schedule] = trained([GradientApproximation(how=how, schedule=schedule)])[0]
    names = list(found)
    assert [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if equal(found[a], found[b])] == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("how", REPLACEMENTS)
def test_training_learns_and_leaves_a_plain_model_behind(how, precision):
    model, history = trained(
        [GradientApproximation(how=how, schedule="S2")], replace(RECIPE, epochs=6, precision=precision)
    )
    assert history.accuracy > 60
    assert not any(isinstance(m, ApproxConv2d) for m in model.modules())
    assert history.events[-1]["text"].startswith(f"dW replaced ({how}, S2) in ")


@dataclass(frozen=True)
class Watch(Method):
    """Notes the first scheduled layer's weight and momentum after every step."""

    seen: list = field(default_factory=list, hash=False, compare=False, repr=False)

    def on_step_end(self, run):
        w = run.model.stages[0][0].conv1.weight
        self.seen.append((w.detach().clone(), run.optimizer.state[w]["momentum_buffer"].clone()))


def test_zeros_let_momentum_and_weight_decay_go_on_and_skipping_stops_them():
    zero, skip = Watch(), Watch()
    recipe = replace(RECIPE, weight_decay=1e-2)
    start = network().stages[0][0].conv1.weight
    trained([GradientApproximation(how="zero", schedule="S1"), zero], recipe)
    trained([GradientApproximation(how="skip", schedule="S1"), skip], recipe)
    assert all(
        torch.equal(w, start) and (m == 0).all() for w, m in skip.seen
    )  # S1 and no gradient: a frozen layer
    last = zero.seen[-1][0]
    assert not torch.equal(last, start)
    assert torch.allclose(last / start, (last / start).mean(), rtol=1e-4)  # it only shrank
    assert (last / start).mean() < 1
    zero, skip = Watch(), Watch()
    trained([GradientApproximation(how="zero", schedule="S3"), zero])
    trained([GradientApproximation(how="skip", schedule="S3"), skip])
    for i in (4, 8):
        assert torch.equal(skip.seen[i][0], skip.seen[i - 1][0])
        assert torch.equal(skip.seen[i][1], skip.seen[i - 1][1])
        assert not torch.equal(zero.seen[i][0], zero.seen[i - 1][0])
        assert not torch.equal(skip.seen[i + 1][0], skip.seen[i][0])


@pytest.mark.parametrize("how", ["unbiased", "skip", "random"])
def test_a_resumed_run_ends_bit_equal(how, tmp_path):
    method = GradientApproximation(how=how, schedule="S2")
    (a, _), (b, _) = resumed_and_whole(network, DATA, RECIPE, [method], tmp_path / "run.pt")
    assert equal(a, b)


def test_the_information_is_complete():
    assert all(getattr(INFO, f) for f in ("name", "name_de", "chapter", "paper", "claim", "cost_model"))
