"""Stochastic pooling and S3Pool: geometry and routing against PyTorch's own kernels, chances by statistics
over many draws.
"""

import copy
import itertools
import math
import pickle
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import nn

from effilib import checkpoint, models, seeds
from effilib.data import synthetic
from effilib.errors import BadInput, NoEffect
from effilib.evaluation import evaluate
from effilib.hooks import Method
from effilib.methods import pooling_windows, s3_pooling
from effilib.methods import stochastic_pooling as sp
from effilib.methods.s3_pooling import S3Pool2d
from effilib.methods.stochastic_pooling import (
    INFO,
    AveragePool2d,
    StochasticPool2d,
    StochasticPooling,
    replace_pools_,
)
from effilib.methods.training_accuracy import TrainingAccuracy, training_accuracy
from effilib.recipe import Recipe
from effilib.training import train
from tests.common import equal, g, resumed_and_whole

DATA = synthetic(images=300)
RECIPE = Recipe(epochs=2, batch_size=32, lr=0.05, precision="fp32")
LAYOUTS = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)
GEOMETRIES = [
    (k, s, p, d, c, size)
    for k, s, p, d, c, size in itertools.product(
        (2, 3, (3, 2)), (None, 1, 2, 3), (0, 1), (1, 2), (False, True), ((7, 5), (8, 12))
    )
    if p == 0 or s != 1
]


def image(*shape, seed=0, layout=torch.contiguous_format, dtype=torch.float32):
    x = torch.rand(*shape, generator=g(seed)).to(dtype)
    return x.contiguous(memory_format=layout).detach().requires_grad_()


def network(seed=0, bn=True):
    return models.build("convnet", 4, (1, 8, 8), seed=seed, widths=(8, 8), bn=bn)


# Geometry


@LAYOUTS
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_shapes_elements_and_gradients_are_those_of_max_pools_windows(geometry, layout):
    *settings_, size = geometry
    x = image(2, 3, *size, layout=layout)
    try:
        largest = F.max_pool2d(x, *settings_)
    except RuntimeError:
        with pytest.raises(BadInput, match="do not fit"):
            StochasticPool2d(*settings_)(x)
        return
    layer = StochasticPool2d(*settings_, generator=g())
    y = layer(x)
    assert y.shape == largest.shape
    assert y.is_contiguous(memory_format=layout)
    flat = x.detach().flatten(2)
    assert (y <= largest).all()
    y.sum().backward()
    assert x.grad.sum().item() == pytest.approx(y.numel())  # no gradient is lost, none goes into the padding
    assert torch.allclose(
        (x.grad * x).sum((2, 3)), y.sum((2, 3)), rtol=1e-5
    )  # each lies at the element that was drawn
    drawn = (flat[..., None, :] == y.detach().flatten(2)[..., None]).long().argmax(-1)  # all elements differ
    places = windows(settings_, size, tuple(y.shape[2:]))
    assert all(
        drawn[n, c, j].item() in places[j] for n in range(2) for c in range(3) for j in range(drawn.shape[2])
    )


def windows(settings_, size, out):
    """Slow oracle: the flat pixels of every window."""
    k, s, p, d, _ = settings_
    (kh, kw), s = (k if isinstance(k, tuple) else (k, k)), s or k
    sh, sw = s if isinstance(s, tuple) else (s, s)
    found = []
    for i, j in itertools.product(range(out[0]), range(out[1])):
        rows = [i * sh - p + d * a for a in range(kh)]
        columns = [j * sw - p + d * b for b in range(kw)]
        found.append(
            {r * size[1] + c for r in rows for c in columns if 0 <= r < size[0] and 0 <= c < size[1]}
        )
    return found


@pytest.mark.parametrize("geometry", GEOMETRIES[::3], ids=str)
def test_eval_mode_is_the_sum_of_squares_over_the_sum(geometry):
    *settings_, size = geometry
    x = torch.relu(torch.randn(2, 3, *size, generator=g()))
    layer = StochasticPool2d(*settings_).eval()
    try:
        y = layer(x)
    except BadInput:
        return
    flat = x.flatten(2)
    slow = []
    for window in windows(settings_, size, tuple(y.shape[2:])):
        a = flat[..., sorted(window)].double()
        total = a.sum(-1)
        slow.append(torch.where(total > 0, (a * a).sum(-1) / total.where(total > 0, 1), 0.0))
    assert torch.allclose(y.flatten(2).double(), torch.stack(slow, -1), atol=1e-6)


def test_a_window_that_does_not_fit_and_too_much_padding_are_refused():
    with pytest.raises(BadInput, match=r"windows of \(5, 5\) do not fit into images of \(4, 4\)"):
        StochasticPool2d(5)(torch.rand(1, 1, 4, 4))
    with pytest.raises(BadInput, match="more than half"):
        StochasticPool2d(2, padding=2)


def test_images_without_a_batch_and_empty_batches():
    x = torch.rand(3, 6, 6)
    for layer in (StochasticPool2d(2), S3Pool2d(2)):
        for mode in (True, False):
            assert layer.train(mode)(x).shape == (3, 3, 3)
            assert layer(torch.rand(0, 3, 6, 6)).shape == (0, 3, 3, 3)


def test_a_view_of_a_larger_tensor_is_pooled_as_a_copy_would_be():
    whole = torch.rand(2, 6, 9, 8)
    view = whole[:, ::2, 1:, :]
    assert torch.equal(
        StochasticPool2d(2, generator=g())(view), StochasticPool2d(2, generator=g())(view.clone())
    )


@pytest.mark.parametrize("channels", [1, 5, 64, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "geometry",
    [(3, 2), (2,), (3, 2, 1), (2, 2, 0, 1, True), (3, 1), ((3, 2), 2, 1, 2, True)],
    ids=str,
)
def test_the_kernel_draws_and_scatters_as_pytorchs_operations_do(geometry, dtype, channels, monkeypatch):
    x = torch.rand(3, channels, 9, 12, generator=g(0)).sub(0.3).relu()
    x = x.to(dtype, memory_format=torch.channels_last)
    found = []
    for there in (True, False):
        if not there:
            monkeypatch.setattr(sp.compiler, "load", lambda *how: None)
        elif sp.compiler.load("stochastic_pooling", "") is None:
            pytest.skip("no compiler")
        leaf = x.clone().requires_grad_()
        pool = sp.StochasticPool2d(*geometry[:4], ceil_mode=geometry[4:] == (True,), generator=g(1))
        y = pool(leaf)
        y.backward(torch.randn(y.shape, generator=g(2)).to(dtype))
        found.append((y, leaf.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6 if dtype == torch.float32 else 0.02)
    assert found[0][1].abs().sum() > 0


def test_chunks_make_no_difference(monkeypatch):
    monkeypatch.setattr(sp.compiler, "load", lambda *how: None)
    x = image(5, 3, 8, 8)
    whole = StochasticPool2d(3, 2, 1, generator=g())(x)
    whole.square().sum().backward()
    dx, x.grad = x.grad, None
    monkeypatch.setattr(pooling_windows, "CHUNK", 1)
    parts = StochasticPool2d(3, 2, 1, generator=g())(x)
    parts.square().sum().backward()
    assert torch.equal(parts, whole)
    assert torch.equal(x.grad, dx)
    assert torch.equal(
        StochasticPool2d(3, 2, 1).eval()(x),
        torch.cat([StochasticPool2d(3, 2, 1).eval()(v) for v in x.split(1)]),
    )


# Chances


@LAYOUTS
def test_the_places_are_drawn_with_their_probabilities(layout):
    n = 200_000
    a = torch.tensor([0.0, 1.0, 2.0, 3.0, 0.5, 0.0, 4.0, 1.5, 8.0])
    x = a.view(1, 1, 3, 3).expand(n, 2, 3, 3).contiguous(memory_format=layout)
    y = StochasticPool2d(3, generator=g())(x).flatten()
    values = a[a > 0]
    counts = [(y == v).sum().item() for v in values]
    assert sum(counts) == 2 * n  # nothing else, and never a zero
    assert chisquare(counts, [2 * n * v / a.sum().item() for v in values.tolist()]).pvalue > 1e-3


def test_windows_channels_and_calls_are_drawn_independently():
    x = torch.ones(1000, 4, 4, 4) + torch.arange(2.0).repeat(2)  # each window holds 1, 2, 1, 2
    layer = StochasticPool2d(2, generator=g())
    a, b = layer(x), layer(x)
    assert not torch.equal(a, b)
    draws = torch.cat([a.permute(1, 2, 3, 0).reshape(16, -1), b.permute(1, 2, 3, 0).reshape(16, -1)])
    correlation = torch.corrcoef(draws).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / 1000**0.5


def test_the_mean_over_draws_is_what_eval_mode_computes():
    n, x = 4000, torch.relu(torch.randn(2, 3, 7, 7, generator=g()))
    layer = StochasticPool2d(3, 2, 1, generator=g(1))
    draws = layer(x.repeat(n, 1, 1, 1)).view(n, 2, 3, 4, 4)
    flat = F.pad(x, (1, 1, 1, 1)).double().unfold(2, 3, 2).unfold(3, 3, 2).flatten(4)
    p = flat / flat.sum(-1, keepdim=True).clamp_min(1e-30)
    std = (
        ((p * flat**2).sum(-1) - (p * flat).sum(-1) ** 2).clamp_min(0).sqrt()
    )  # the exact one: 4,000 draws may miss a rare element
    error = (draws.double().mean(0) - layer.eval()(x)).abs()
    assert (error <= 5 * std / n**0.5 + 1e-6).all()
    assert std.max() > 0.1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1e4, width=32), min_size=4, max_size=4), st.integers(0, 100))
def test_draws_lie_in_the_window_and_eval_mode_between_mean_and_maximum(a, seed):
    x = torch.tensor(a).view(1, 1, 2, 2)
    drawn = StochasticPool2d(2, generator=g(seed))(x).item()
    assert drawn in x.flatten().tolist()
    assert drawn > 0 or x.sum() < 1e-30
    weighted = StochasticPool2d(2).eval()(x).item()
    assert x.mean() * (1 - 1e-5) <= weighted + 1e-30
    assert weighted <= x.max() * (1 + 1e-5)


def test_a_constant_window_gives_its_value_in_both_modes():
    x = torch.full((2, 3, 6, 6), 0.3)
    assert (StochasticPool2d(3, 2)(x) == x[0, 0, 0, 0]).all()
    assert torch.allclose(StochasticPool2d(3, 2).eval()(x), torch.tensor(0.3))


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("geometry", [(2,), (3, 2, 1)], ids=str)
def test_regions_of_zeros_give_zeros_and_no_gradient(dtype, geometry, layout):
    x = torch.rand(2, 3, 9, 9, generator=g()).to(dtype).contiguous(memory_format=layout)
    x[:, 0] = 0
    x[:, 1, :5] = 0
    x.requires_grad_()
    y = StochasticPool2d(*geometry)(x)
    assert (y[:, 0] == 0).all()
    y.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad[x == 0] == 0).all()
    assert x.grad.sum() == (y > 0).sum()
    x.grad = None
    weighted = StochasticPool2d(*geometry).eval()(x)
    assert (weighted[:, 0] == 0).all()
    weighted.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert (y.dtype, weighted.dtype, x.grad.dtype) == (dtype,) * 3


def test_the_gradient_goes_to_the_drawn_place_and_is_that_of_upstream():
    x = image(2, 3, 8, 8)
    dy = torch.randn(2, 3, 4, 4, generator=g(1))
    y = StochasticPool2d(2, generator=g())(x)
    y.backward(dy)
    routed = x.grad.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)  # (N, C, H', W', 4)
    elements = x.detach().unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
    assert torch.equal(routed.sum(-1), dy)
    assert ((routed != 0).sum(-1) == 1).all()
    assert torch.equal(elements[routed != 0].view_as(y), y.detach())


def test_overlapping_windows_add_up_their_gradients():
    x = torch.zeros(1, 1, 5, 5)
    x[0, 0, 2, 2] = 1.0  # in all four windows, and the only place that can be drawn
    x.requires_grad_()
    StochasticPool2d(3, 2)(x).backward(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))
    assert x.grad[0, 0, 2, 2] == 10
    assert x.grad.sum() == 10


def test_with_the_draws_fixed_the_gradient_is_exact():
    x = (torch.rand(1, 2, 5, 5, generator=g()).double() + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: StochasticPool2d(2, 2, 1).eval()(x), x)
    assert torch.autograd.gradcheck(lambda x: AveragePool2d(2, 2, ceil_mode=True)(x), x)
    assert torch.autograd.gradcheck(lambda x: S3Pool2d(3, 2, 1, grid=4, generator=g())(x), x)
    assert torch.autograd.gradcheck(lambda x: S3Pool2d(2).eval()(x), x)


def test_not_finite_numbers_are_not_hidden():
    for bad in (math.nan, math.inf):
        for place in range(4):
            x = torch.ones(1, 1, 2, 2)
            x.view(-1)[place] = bad
            assert not torch.isfinite(StochasticPool2d(2)(x)).any()
            assert not torch.isfinite(StochasticPool2d(2).eval()(x)).any()


@pytest.mark.parametrize("training", [True, False])
def test_negative_input_is_refused_with_the_layers_name(training):
    x = torch.rand(1, 2, 4, 4)
    x[0, 1, 3, 3] = -0.25
    with pytest.raises(
        BadInput, match=r"stochastic pooling features\.3: .* >= 0, the least is -0\.25; pool after the ReLU"
    ):
        StochasticPool2d(2, layer="features.3").train(training)(x)
    StochasticPool2d(2).train(training)(x.clamp_min(0) * -0.0)  # minus zero is zero


def test_the_generator_decides_and_the_global_one_is_left_alone():
    x = torch.rand(2, 3, 8, 8)
    before = torch.get_rng_state()
    for layer in (StochasticPool2d, S3Pool2d):
        assert torch.equal(layer(2, generator=g(1))(x), layer(2, generator=g(1))(x))
        assert not torch.equal(layer(2, generator=g(1))(x), layer(2, generator=g(2))(x))
    assert torch.equal(torch.get_rng_state(), before)
    with seeds.seeded(5):
        a = StochasticPool2d(2)(x)
    with seeds.seeded(5):
        assert torch.equal(StochasticPool2d(2)(x), a)
    for layer in (StochasticPool2d(2), S3Pool2d(2), AveragePool2d(2)):
        layer.eval()
        assert torch.equal(layer(x), layer(x))


def test_uniform_numbers_are_uniform_and_never_0_or_1():
    bits = sp.uniform((1001, 999), "cpu", g())
    u = bits.double().add(32768.5) / 65536
    assert bits.shape == (1001, 999)
    assert 0 < u.min() < u.max() < 1
    assert chisquare(torch.histc(u, 64, 0, 1).tolist()).pvalue > 1e-3
    assert abs(u.mean() - 0.5) < 5 / (12 * u.numel()) ** 0.5


def test_sixteen_bits_do_not_round_the_sums():
    """In bf16, 1 + 256 ones would be 256: sums must be wider than the numbers that are pooled."""
    x = torch.ones(2000, 1, 17, 17, dtype=torch.bfloat16)
    x[..., :16, :] = 0
    x[..., 16, 0] = 200.0
    x.requires_grad_()
    y = StochasticPool2d(17, generator=g())(x)
    y.sum().backward()
    assert torch.equal((x.grad * x).sum((2, 3)), y[..., 0, 0])  # nor is the number of a place rounded, of 289
    y = y.detach().float()
    share = (y == 200).float().mean().item()
    assert share == pytest.approx(200 / 216, abs=5 * (200 / 216 * 16 / 216 / 2000) ** 0.5)


# S3Pool


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (5, 2), (28, 28)], ids=str)
@pytest.mark.parametrize(
    "settings_", [(2,), (2, 2, 0, 1, True), (3, 2, 1), (3, 2, 1, 1, True), (3, 3), (2, 2, 1)], ids=str
)
def test_s3pool_has_max_pools_shape_in_both_modes(settings_, size):
    x = torch.rand(2, 3, *size)
    try:
        shape = F.max_pool2d(x, *settings_).shape
    except RuntimeError:
        return
    stride = settings_[1] if len(settings_) > 1 else settings_[0]
    for grid in (None, stride, 2 * stride, 4 * stride):
        layer = S3Pool2d(*settings_, grid=grid)
        assert layer(x).shape == shape
        assert layer.eval()(x).shape == shape


def test_s3pool_keeps_rows_and_columns_of_the_map_of_maxima():
    x = image(2, 3, 8, 8)
    y = S3Pool2d(2, grid=4, generator=g())(x)
    whole = F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-math.inf), 2, 1)
    draws = g()
    rows, columns = (s3_pooling.pick(8, 4, 2, draws) for _ in range(2))
    assert torch.equal(y, whole[:, :, rows][:, :, :, columns])
    y.square().sum().backward()
    dx, x.grad = x.grad, None
    whole[:, :, rows][:, :, :, columns].square().sum().backward()
    assert torch.allclose(x.grad, dx)


def test_s3pools_eval_mode_averages_the_map_of_maxima_and_is_the_mean_of_the_weakest_distortion():
    x = torch.rand(2, 3, 8, 8, generator=g())
    whole = F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-math.inf), 2, 1)
    layer = S3Pool2d(2, generator=g(1))
    assert torch.allclose(layer.eval()(x), F.avg_pool2d(whole, 2))
    draws = torch.stack([layer.train()(x) for _ in range(3000)])
    assert ((draws.mean(0) - layer.eval()(x)).abs() <= 5 * draws.std(0) / 3000**0.5 + 1e-6).all()


def test_s3pools_choice_is_sorted_without_replacement_and_uniform():
    picks = [s3_pooling.pick(10, 4, 2, g(s)) for s in range(3000)]
    for p in picks[:50]:
        assert len(p) == 5
        assert (p.diff() > 0).all()
        assert [((p >= o) & (p < o + 4)).sum().item() for o in (0, 4, 8)] == [2, 2, 1]
    counts = torch.bincount(torch.cat(picks), minlength=10).tolist()
    assert chisquare(counts).pvalue > 1e-3


def test_s3pool_of_constant_blocks_is_exact_and_takes_negative_input():
    blocks = torch.randn(1, 2, 4, 4, generator=g())
    x = blocks.repeat_interleave(2, 2).repeat_interleave(2, 3)
    y = S3Pool2d(1, 2, generator=g())(x)
    assert torch.equal(y, blocks)
    assert torch.allclose(S3Pool2d(1, 2).eval()(x), blocks)


@pytest.mark.parametrize(
    ("words", "message"), [({"grid": 3}, "grid 3"), ({"grid": 1}, "grid 1"), ({"dilation": 2}, "dilation 2")]
)
def test_s3pool_refuses_what_has_no_meaning(words, message):
    with pytest.raises(BadInput, match=message):
        S3Pool2d(2, **words)


def test_maximum_is_pytorchs_and_its_gradient_too():
    a, b = image(50, seed=1), image(50, seed=2)
    s3_pooling.Maximum.apply(a, b).square().sum().backward()
    grads, a.grad, b.grad = (a.grad, b.grad), None, None
    torch.maximum(a, b).square().sum().backward()
    assert torch.equal(a.grad, grads[0])
    assert torch.equal(b.grad, grads[1])


# Surgery and the method


def kinds(model):
    return [type(m) for m in model.modules() if isinstance(m, nn.MaxPool2d)]


@pytest.mark.parametrize(
    ("kind", "layer"), [("stochastic", StochasticPool2d), ("s3", S3Pool2d), ("average", AveragePool2d)]
)
@pytest.mark.parametrize("bn", [True, False])
def test_training_replaces_every_max_pool_and_differs_from_it(kind, layer, bn):
    plain, model = network(bn=bn), network(bn=bn)
    settings_ = models.describe(model)
    train(plain, DATA, RECIPE)
    history = train(model, DATA, RECIPE, [StochasticPooling(kind=kind)])
    assert kinds(model) == [layer]
    assert models.describe(model) == settings_  # it can still be saved and read back
    assert not torch.equal(plain.head.weight, model.head.weight)
    assert history.events[-1]["text"] == f"1 pooling layers are now {kind}"
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_stochastic_pooling_learns():
    model = network()
    assert (
        train(
            model, DATA, Recipe(epochs=20, batch_size=32, lr=0.2, precision="fp32"), [StochasticPooling()]
        ).accuracy
        > 85
    )


def test_torchvisions_networks_are_taken_as_they_are():
    import torchvision

    with seeds.seeded(0):
        model = torchvision.models.vgg11_bn(num_classes=4)
        resnet = torchvision.models.resnet18(num_classes=4)
        inception = torchvision.models.googlenet(num_classes=4, init_weights=False, aux_logits=False)
    makers = {
        "stochastic": lambda p, n: StochasticPool2d(
            p.kernel_size, p.stride, p.padding, ceil_mode=p.ceil_mode, layer=n
        )
    }
    assert replace_pools_(model, makers["stochastic"]) == 5
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 4)
    assert replace_pools_(resnet, makers["stochastic"]) == 1  # 3 x 3 at stride 2, padded
    resnet(torch.randn(2, 3, 32, 32)).sum().backward()
    assert replace_pools_(inception, makers["stochastic"]) == 13  # ceil_mode and stride 1
    inception.eval()(torch.randn(1, 3, 64, 64))


def test_the_method_works_on_vgg11_bn_in_training():
    big = synthetic(images=64, size=32, channels=3)
    model = models.build("torchvision.models:vgg11_bn", 4, (3, 32, 32))
    history = train(
        model, big, Recipe(epochs=1, batch_size=16, lr=0.01), [StochasticPooling()], evaluations=1
    )
    assert history.events[-1]["text"] == "5 pooling layers are now stochastic"
    assert not history.diverged


def test_a_shared_layer_stays_shared_and_names_are_kept():
    pool = nn.MaxPool2d(2)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), pool, nn.Sequential(nn.ReLU(), pool), pool)
    names = []
    assert replace_pools_(model, lambda p, n: names.append(n) or StochasticPool2d(p.kernel_size)) == 1
    assert model[2] is model[3][1] is model[4]
    assert isinstance(model[4], StochasticPool2d)
    assert names == ["2"]


def test_networks_without_max_pooling_have_no_effect():
    with pytest.raises(NoEffect, match=r"ResNet has no nn\.MaxPool2d layer"):
        train(
            models.build("resnet", 4, (1, 8, 8), widths=(8,), blocks=(1,)),
            DATA,
            RECIPE,
            [StochasticPooling()],
        )
    with pytest.raises(BadInput, match="pooling 0 returns indices"):
        replace_pools_(nn.Sequential(nn.MaxPool2d(2, return_indices=True)), lambda p, n: p)
    with pytest.raises(
        BadInput, match=r"unknown kind of pooling 'stochstic': .* \(did you mean 'stochastic'\?\)"
    ):
        train(network(), DATA, RECIPE, [StochasticPooling(kind="stochstic")])


def test_pooling_before_the_relu_is_named_in_training():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 4))
    with pytest.raises(BadInput, match="stochastic pooling 1: probabilities need activations >= 0"):
        train(model, DATA, RECIPE, [StochasticPooling()])


def test_a_second_training_goes_on_with_its_own_generator():
    model = network()
    train(model, DATA, RECIPE, [StochasticPooling()])
    history = train(model, DATA, RECIPE, [StochasticPooling(kind="s3")], seed=1)
    assert kinds(model) == [S3Pool2d]
    assert history.events[-1]["text"] == "1 pooling layers are now s3"


def test_layers_can_be_copied_and_pickled():
    model = network()
    train(model, DATA, RECIPE, [StochasticPooling()])
    x = DATA.normalize(DATA.test.x[:4])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.eval()(x), model.eval()(x))


@pytest.mark.parametrize("kind", sp.KINDS)
def test_the_same_seed_gives_the_same_weights_and_a_resumed_run_too(kind, tmp_path):
    (resumed, _), (whole, _) = resumed_and_whole(
        network, DATA, RECIPE, [StochasticPooling(kind=kind)], tmp_path / "run.pt"
    )
    assert equal(resumed, whole)
    checkpoint.save_model(tmp_path / "model.pt", whole, "convnet", DATA)
    with pytest.raises(BadInput, match="answers otherwise than the one that was saved: a method had put"):
        checkpoint.load_model(tmp_path / "model.pt")


def test_the_draws_do_not_shift_the_order_of_the_data():
    @dataclass(frozen=True)
    class Look(Method):
        seen: list = field(default_factory=list, hash=False, compare=False)

        def on_batch(self, run, x, y):
            self.seen.append(y)
            return x, y

    plain, stochastic = Look(), Look()
    train(network(), DATA, RECIPE, [plain])
    train(network(), DATA, RECIPE, [stochastic, StochasticPooling()])
    assert all(torch.equal(a, b) for a, b in zip(plain.seen, stochastic.seen, strict=True))


@pytest.mark.parametrize(
    "layer", [StochasticPool2d(2), S3Pool2d(2, grid=4), AveragePool2d(2)], ids=lambda m: type(m).__name__
)
def test_autocast_and_channels_last_go_through(layer):
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), layer).to(
        memory_format=torch.channels_last
    )
    x = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    for training in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            y = model.train(training)(x)
        assert y.dtype == torch.bfloat16
        assert y.is_contiguous(memory_format=torch.channels_last)
        y.sum().backward()
        assert model[0].weight.grad.isfinite().all()


def test_the_information_is_complete():
    assert all(getattr(INFO, f) for f in ("name", "name_de", "chapter", "paper", "claim", "cost_model"))


# What a regulariser is judged by


def test_the_accuracy_on_the_training_images_is_noted_in_eval_mode_and_off_the_clock():
    model = network()
    history = train(model, DATA, RECIPE, [StochasticPooling(), TrainingAccuracy()])
    assert training_accuracy(history) == pytest.approx(evaluate(model, DATA, "train")[1])
    assert model.training
    assert math.isnan(training_accuracy(train(network(), DATA, replace(RECIPE, epochs=1))))
