"""Gradient pruning: unbiased, with the closed form's share of zeros, in the right place; and the structured
subsets beside it.
"""

import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effilib import cost, models
from effilib.convolution import ApproxConv2d, approx_conv2d, layers
from effilib.data import synthetic
from effilib.errors import BadInput, NoEffect
from effilib.methods import gradient_pruning as gp
from effilib.methods.gradient_pruning import (
    INFO,
    GradientPruning,
    Pruner,
    lognormal_threshold,
    lognormal_zeros,
    normal_quantile,
    placements,
    prune,
    prune_gradients_,
    prune_in_one_pass,
    threshold,
    zero_fraction,
)
from effilib.methods.gradient_subsets import SUBSETS, GradientSubsets, random_subset, subset_gradients_
from effilib.recipe import Recipe
from effilib.training import train
from tests.common import equal, g, resumed_and_whole

DATA = synthetic(images=300)
RECIPE = Recipe(epochs=2, batch_size=32, precision="fp32")


def network(**settings):
    return models.build("resnet", 4, (1, 8, 8), **{"widths": (8, 8), "blocks": (1, 1), **settings})


# The pure functions


@pytest.mark.parametrize(("p", "z"), [(0.7, 1.036), (0.8, 1.282), (0.9, 1.645), (0.99, 2.576)])
def test_the_threshold_has_the_target_share_of_normal_gradients_below_it(p, z):
    assert normal_quantile((1 + p) / 2) == pytest.approx(z, abs=1e-3)
    x = 0.01 * torch.randn(400_000, generator=g())
    assert (x.abs() < threshold(x, p)).float().mean().item() == pytest.approx(p, abs=0.003)
    assert threshold(x, p).item() == pytest.approx(z * 0.01, rel=0.01)


@pytest.mark.parametrize(("p", "zeros"), [(0.7, 0.380), (0.8, 0.451), (0.9, 0.540), (0.99, 0.691)])
def test_the_share_of_zeros_is_the_closed_form_and_not_the_target(p, zeros):
    x = torch.randn(400_000, generator=g())
    assert zero_fraction(p) == pytest.approx(zeros, abs=1e-3)
    assert (prune(x, threshold(x, p), g(1)) == 0).float().mean().item() == pytest.approx(zeros, abs=0.003)
    assert zero_fraction(0) == 0


def test_pruning_is_unbiased_with_its_variance_and_leaves_large_elements_alone():
    x, draws, generator = torch.randn(400, generator=g(), dtype=torch.float64), 3000, g(1)
    tau = threshold(x, 0.9).double()
    found = torch.stack([prune(x, tau, generator) for _ in range(draws)])
    small = x.abs() < tau
    assert torch.equal(found[:, ~small], x[~small].expand(draws, -1))
    values = found[:, small]
    assert ((values == 0) | (values == tau) | (values == -tau)).all()
    assert (values * x[small] >= 0).all()
    variance = x[small].abs() * (tau - x[small].abs())
    assert ((values.mean(0) - x[small]).abs() / (variance / draws).sqrt()).max() < 4.5
    assert (values.var(0) / variance - 1).abs().median() < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_outcome_keeps_layout_and_format_and_follows_the_generator(dtype):
    x = torch.randn(3, 8, 5, 5, generator=g()).to(dtype).contiguous(memory_format=torch.channels_last)
    tau = threshold(x, 0.9)
    y = prune(x, tau, g(1))
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, prune(x, tau, g(1)))
    assert not torch.equal(y, prune(x, tau, g(2)))


def test_the_threshold_grows_with_the_gradients_scale():
    x = torch.randn(1000, generator=g())
    for c in (2.0**-10, 2.0**12):
        assert torch.equal(threshold(c * x, 0.9), c * threshold(x, 0.9))
        assert torch.equal(prune(c * x, threshold(c * x, 0.9), g(1)), c * prune(x, threshold(x, 0.9), g(1)))
        assert lognormal_threshold(c * x, 0.6).item() == pytest.approx(
            c * lognormal_threshold(x, 0.6).item(), rel=1e-3
        )


def test_overflowed_and_zero_gradients_are_left_as_they_are():
    x = torch.tensor([1.0, math.inf, -2.0])
    assert torch.equal(prune(x, threshold(x, 0.9), g()), x)
    assert torch.isnan(
        prune(torch.tensor([1.0, math.nan]), threshold(torch.tensor([1.0, math.nan]), 0.9), g())
    ).any()
    zero = torch.zeros(5)
    assert torch.equal(prune(zero, threshold(zero, 0.9), g()), zero)
    assert lognormal_threshold(zero, 0.9) == 0
    assert torch.equal(prune(x[:1], threshold(x[:1], 0.0), g()), x[:1])  # p = 0 is the identity


@pytest.mark.parametrize("s", [0.0, 0.1, 0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("zeros", [0.3, 0.6, 0.9])
def test_the_lognormal_threshold_hits_the_share_of_zeros_where_the_normal_one_misses_it(s, zeros):
    x = (s * torch.randn(200_000, generator=g())).exp() * torch.randn(200_000, generator=g(1)).sign()
    tau = lognormal_threshold(x, zeros)
    assert (prune(x, tau, g(2)) == 0).float().mean().item() == pytest.approx(zeros, abs=0.015)
    u = (math.log(tau) - x.abs().log().mean().item()) / max(x.abs().log().std().item(), 1e-6)
    assert lognormal_zeros(u, max(s, 1e-6)) == pytest.approx(zeros, abs=0.01)
    if s == 2:
        normal = (prune(x, threshold(x, 0.9), g(2)) == 0).float().mean().item()
        assert normal == pytest.approx(0.79, abs=0.015)  # 0.54 for normal gradients


# The compiled kernel

FORMATS = [torch.float32, torch.bfloat16]


@pytest.fixture(params=["compiled", "step by step"])
def way(request, monkeypatch):
    """Both ways in which `prune` computes; the second is that without a compiler."""
    if request.param == "compiled":
        if gp.compiler.load("gradient_pruning", "") is None:
            pytest.skip("no compiler")
    else:
        monkeypatch.setattr(gp.compiler, "load", lambda *words: None)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", FORMATS)
def test_either_way_pruning_is_unbiased_with_its_variance(dtype):
    x, draws, generator = torch.randn(333, generator=g()).to(dtype), 3000, g(1)
    tau = threshold(x, 0.9).to(dtype)
    found = torch.stack([prune(x, tau, generator) for _ in range(draws)]).double()
    exact, tau = x.double(), tau.double()
    variance = (exact.abs() * (tau - exact.abs())).clamp(min=0)
    assert ((found.mean(0) - exact).abs() <= 4.5 * (variance / draws).sqrt() + 1e-4 * tau).all()
    small = exact.abs() < tau
    assert (found.var(0)[small] / variance[small] - 1).abs().median() < 0.05
    pairs = (found - exact)[:, small]  # neighbours are drawn by themselves
    assert (pairs[:, 1:] * pairs[:, :-1]).mean().abs() < 0.01 * variance[small].mean()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", FORMATS)
def test_either_way_an_element_keeps_its_bits_or_becomes_tau_or_zero(dtype):
    x = torch.randn(1000, generator=g()).to(dtype)
    tau = threshold(x, 0.9).to(dtype)
    y = prune(x, tau, g(1))
    assert y.dtype == dtype
    large = x.abs() >= tau
    assert torch.equal(y[large], x[large])
    assert {v.item() for v in y[~large].abs().unique()} == {0.0, tau.item()}
    assert torch.equal(y.signbit(), x.signbit())


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", FORMATS)
def test_either_way_nan_and_infinity_stay_and_a_threshold_of_nothing_prunes_nothing(dtype):
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.5, 3.0] * 7).to(dtype)
    for tau in (0.0, math.inf, math.nan):
        assert torch.equal(prune(x, torch.tensor(tau), g()).nan_to_num(9.0), x.nan_to_num(9.0))
    pruned = prune(x, torch.tensor(1.0), g())
    assert torch.equal(pruned.isnan(), x.isnan())
    assert torch.equal(pruned.isinf(), x.isinf())
    assert (pruned[3::6] == 0).all()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("shape", [(1,), (15,), (17,), (2, 3, 5, 7), (3, 16, 33, 9)])
def test_either_way_all_layouts_keep_each_element_in_its_place(shape, dtype):
    whole = torch.randn(shape, generator=g()).to(dtype)
    laid = [
        whole,
        whole.transpose(0, -1),
        torch.stack((whole, whole))[::2][0],
        torch.stack((whole, whole), -1)[..., 0],
    ]
    if len(shape) == 4:
        laid.append(whole.contiguous(memory_format=torch.channels_last))
    for x in laid:
        tau = threshold(x, 0.9).to(dtype)
        y = prune(x, tau, g(1))
        assert y.shape == x.shape
        large = x.abs() >= tau
        assert torch.equal(y[large], x[large])
        assert torch.equal(y.signbit(), x.signbit())


@pytest.mark.parametrize("dtype", FORMATS)
def test_what_the_kernel_sums_on_the_way_is_right_and_no_affair_of_the_threads(dtype):
    x = torch.randn(300_001, generator=g()).to(dtype)
    tau, threads, found = threshold(x, 0.9), torch.get_num_threads(), []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        found.append(prune_in_one_pass(x, tau.item(), g(1)))
    torch.set_num_threads(threads)
    (y, sums), *others = found
    assert all(torch.equal(y, z) and sums == more for z, more in others)
    assert sums["mean"] == pytest.approx(x.abs().double().mean().item(), rel=1e-6)
    assert sums["zeros"] == pytest.approx((y == 0).double().mean().item())
    assert sums["cosine"] == pytest.approx(
        torch.cosine_similarity(x.double(), y.double(), 0).item(), rel=1e-5
    )
    assert not torch.equal(y, prune_in_one_pass(x, tau.item(), g(2))[0])


def test_without_a_compiler_it_is_said_once_and_pruning_goes_on(tmp_path):
    """In a process of its own, since a kernel is loaded once."""
    code = (
        "import torch\n"
        "from effilib.methods.gradient_pruning import Pruner\n"
        "pruner, g = Pruner(0.9, every=1), torch.Generator().manual_seed(0)\n"
        "state = pruner.new_state()\n"
        "for _ in range(3):\n"
        "    pruner(torch.randn(10_000, generator=g), state, g)\n"
        "print(round(state['zeros'] / 3, 2))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert found[0].startswith("no C++ kernel, gradients are pruned step by step")
    assert found[1:] == ["0.54"]
    assert not list(tmp_path.rglob("*.so"))


# The FIFO


def test_the_fifo_prunes_nothing_until_it_is_full_and_then_with_the_mean_of_earlier_thresholds():
    pruner, x = Pruner(0.9, fifo=3, every=1), torch.randn(2000, generator=g())
    state, generator = pruner.new_state(), g(1)
    for c in (1.0, 2.0, 3.0):
        assert torch.equal(pruner(c * x, state, generator), c * x)
    assert state["counted"] == 0
    assert state["taus"] == pytest.approx([c * threshold(x, 0.9).item() for c in (1, 2, 3)])
    expected = prune(8 * x, torch.tensor(2 * threshold(x, 0.9).item()), g(7))
    assert torch.allclose(pruner(8 * x, state, g(7)), expected)
    assert len(state["taus"]) == 3
    assert state["error"] == pytest.approx(abs(2 / 8 - 1), rel=1e-4)
    own = Pruner(0.9, fifo=0)
    assert torch.equal(own(x, own.new_state(), g(2)), prune(x, threshold(x, 0.9), g(2)))


@pytest.mark.parametrize("fifo", [0, 2])
def test_a_gradient_that_overflows_is_passed_on_and_leaves_no_trace_in_the_record(fifo):
    pruner, x, generator = Pruner(0.9, fifo=fifo, every=1), torch.randn(2000, generator=g()), g(1)
    state = pruner.new_state()
    for _ in range(3):
        pruner(x, state, generator)
    before = {**state, "taus": list(state["taus"])}
    bad = x.index_fill(0, torch.tensor([7]), math.inf)
    assert pruner(bad, state, generator)[7] == math.inf
    assert state == before | {"calls": 4}
    assert (pruner(x, state, generator) == 0).any()  # the next batch is pruned again
    assert all(math.isfinite(state[k]) for k in ("zeros", "error", "cosine"))


# Placement


class Mixed(nn.Module):
    def __init__(self, bn):
        super().__init__()
        self.stem, self.a, self.b = (
            nn.Conv2d(1, 6, 3, padding=1),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.Conv2d(6, 6, 3, padding=1),
        )
        self.bn, self.head = nn.BatchNorm2d(6) if bn else nn.Identity(), nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.bn(self.a(x)))
        return self.head(F.relu(self.b(x)).mean((2, 3)))


def test_it_is_the_output_gradient_before_a_batchnorm_and_the_input_gradient_otherwise():
    x = torch.randn(4, 1, 8, 8, generator=g())
    for bn, expected in ((True, {"a": "dO", "b": "dI"}), (False, {"a": "dI", "b": "dI"})):
        model = Mixed(bn).train()
        assert placements(model, layers(model, x), x) == expected
        assert model.training
    resnet = network()
    assert set(placements(resnet, layers(resnet, x), x).values()) == {"dO"}
    plain = models.build("convnet", 4, (1, 8, 8), widths=(4, 4, 4), bn=False)
    assert set(placements(plain, layers(plain, x), x).values()) == {"dI"}


def test_pruning_an_output_gradient_changes_both_products_and_no_forward_pass():
    x = torch.randn(4, 8, 6, 6, generator=g()).requires_grad_()
    w = torch.randn(8, 8, 3, 3, generator=g(1)).requires_grad_()
    dy, seen = torch.randn(4, 8, 4, 4, generator=g(2)), []

    def pruned(dy):
        seen.append(prune(dy, threshold(dy, 0.9), g(3)))
        return seen[-1]

    y, exact = approx_conv2d(x, w, output_gradient=pruned), F.conv2d(x, w)
    assert torch.equal(y, exact)
    mine, theirs = torch.autograd.grad(y, (x, w), dy), torch.autograd.grad(exact, (x, w), seen[0])
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_input_gradients_are_pruned_before_the_relu_in_front_masks_them():
    model, x = Mixed(False), torch.randn(16, 1, 8, 8, generator=g())
    states, seen = {}, {}
    place = prune_gradients_(model, Pruner(0.9, fifo=0, every=1), x, lambda: states, g(1))
    assert place == {"a": "dI", "b": "dI"}
    hook = model.b.register_full_backward_hook(lambda m, dx, dy: seen.update(b=dx[0]))
    model(x).square().sum().backward()
    hook.remove()
    assert set(states) == {"a", "b"}
    zeros = (seen["b"] == 0).float().mean().item()
    assert zeros == pytest.approx(states["b"]["zeros"])
    assert 0.2 < zeros < 0.95
    small = seen["b"].abs()[seen["b"] != 0].min()
    assert (seen["b"].abs() == small).float().mean() > 0.1  # many are +-tau


# Structured subsets


@pytest.mark.parametrize(
    ("dx", "dw"), [("outputs", "outputs"), ("outputs", "samples"), (None, "samples"), ("samples", "samples")]
)
def test_subsets_are_unbiased_share_their_draw_and_save_their_share(dx, dw):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(32, 4)).double()
    x, images = (
        torch.randn(6, 4, 4, 4, generator=g(), dtype=torch.float64).requires_grad_(),
        torch.randn(2, 1, 6, 6).double(),
    )
    layer = model[1]
    assert subset_gradients_(model, 0.5, g(1), dx=dx, dw=dw, x=images) == ["1"]

    def gradients(m):
        y = m(x)
        dy = torch.randn(y.shape, generator=g(2), dtype=y.dtype)
        return torch.autograd.grad(y, (x, m.weight), dy)

    exact = gradients(layer.eval())
    found = [gradients(layer.train()) for _ in range(1500)]
    for i, of in enumerate((dx, dw)):
        values = torch.stack([f[i] for f in found])
        if of is None:
            assert torch.equal(values[0], exact[i])
            continue
        assert ((values.mean(0) - exact[i]) / (values.std(0) / 1500**0.5 + 1e-12)).abs().max() < 4.8
        assert values.std(0).min() > 0
    if dx == dw == "outputs":  # the rows of dW that are 0 are those that dX did without
        kept = found[0][1].flatten(1).abs().sum(1) > 0
        by_hand = torch.autograd.grad(
            layer.eval()(x)[:, kept], x, 2 * torch.randn(6, 8, 2, 2, generator=g(2), dtype=x.dtype)[:, kept]
        )[0]
        assert kept.sum() == 4
        assert torch.allclose(found[0][0], by_hand)

    def flops():
        return cost.count_flops(lambda: layer(x).sum().backward())

    layer.eval()
    one = flops() / 3
    layer.train()
    assert flops() == one * (1 + (0.5 if dx else 1) + 0.5)


def test_a_random_subset_is_that_large_and_never_empty():
    for n, keep, k in ((10, 0.5, 5), (10, 0.01, 1), (1, 0.5, 1), (7, 1.0, 7)):
        index, scale = random_subset(n, keep, g())
        assert len(index.unique()) == k
        assert scale == n / k


def test_what_changes_nothing_has_no_effect_and_what_is_wrong_is_named():
    x = torch.randn(2, 1, 8, 8, generator=g())
    with pytest.raises(NoEffect, match="gradient subsets"):
        subset_gradients_(network(), 1.0, g(), x=x)
    with pytest.raises(NoEffect):
        subset_gradients_(network(), 0.5, g(), dx=None, dw=None, x=x)
    with pytest.raises(NoEffect):
        prune_gradients_(
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 4)), Pruner(0.9), x, dict, g()
        )
    with pytest.raises(BadInput, match="unknown subset 'rows'"):
        subset_gradients_(network(), 0.5, g(), dx="rows", x=x)
    for p in (-0.1, 1.0):
        with pytest.raises(BadInput, match="p is"):
            GradientPruning(p=p)
    for make in (GradientPruning, lambda **how: Pruner(0.9, **how)):
        with pytest.raises(BadInput, match="every is 0"):
            make(every=0)
        with pytest.raises(BadInput, match="law of gradients"):
            make(law="gauss")
    with pytest.raises(NoEffect, match="p = 0"):
        train(network(), DATA, RECIPE, [GradientPruning(p=0.0)])


# The methods


def trained(methods=(), recipe=RECIPE, model=None, **options):
    model = model or network()
    return model, train(model, DATA, recipe, methods, **options)


ARMS = {
    "0.7": GradientPruning(p=0.7),
    "0.9": GradientPruning(),
    "0.9, own tau": GradientPruning(fifo=0),
    "lognormal": GradientPruning(law="lognormal", p=0.6),
    "outputs": GradientSubsets(),
    "outputs and samples": GradientSubsets(dw="samples"),
    "samples for dW": GradientSubsets(dx=None, dw="samples"),
}


def test_no_arm_is_bit_equal_to_the_exact_one_or_to_another():
    found = {"exact": trained()[0]} | {n: trained([m])[0] for n, m in ARMS.items()}
    names = list(found)
    assert [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if equal(found[a], found[b])] == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pruned_training_learns_logs_its_density_and_leaves_a_plain_model_behind(precision):
    model, history = trained([GradientPruning(every=1)], replace(RECIPE, epochs=6, precision=precision))
    assert history.accuracy > 85
    assert not any(isinstance(m, ApproxConv2d) for m in model.modules())
    where, density = history.events[0], history.events[-1]
    assert set(where["placement"].values()) == {"dO"}
    assert set(density["density"]) == set(where["placement"])
    assert all(0.1 < d < 0.6 for d in density["density"].values())  # far from 1 - p
    assert all(0 < c < 1 for c in density["cosine"].values())
    assert all(0 < e < 2 for e in density["error"].values())
    assert "density of the pruned gradients: stages.0.0.conv1 0." in density["text"]


def test_a_network_without_batchnorm_is_pruned_at_its_inputs_and_learns():
    model = models.build("convnet", 4, (1, 8, 8), widths=(8, 8, 8), bn=False)
    _, history = trained([GradientPruning(p=0.8)], replace(RECIPE, epochs=6, lr=0.05), model)
    assert set(history.events[0]["placement"].values()) == {"dI"}
    assert history.accuracy > 60


@pytest.mark.parametrize("name", ["outputs", "outputs and samples"])
def test_subsets_learn_and_save_flops(name):
    recipe = replace(RECIPE, epochs=6)
    model, history = trained([ARMS[name]], recipe)
    assert history.accuracy > 70
    assert history.flops < 0.75 * trained(recipe=recipe)[1].flops
    assert not any(isinstance(m, ApproxConv2d) for m in model.modules())


@pytest.mark.parametrize("name", ["0.9", "outputs and samples"])
def test_a_resumed_run_ends_bit_equal(name, tmp_path):
    (a, ha), (b, hb) = resumed_and_whole(network, DATA, RECIPE, [ARMS[name]], tmp_path / "run.pt")
    assert equal(a, b)
    assert ha.events == hb.events


def test_the_information_is_complete():
    assert all(getattr(INFO, f) for f in ("name", "name_de", "chapter", "paper", "claim", "cost_model"))
    assert SUBSETS.keys() == {"outputs", "samples"}
