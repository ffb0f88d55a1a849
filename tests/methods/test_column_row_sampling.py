"""Column-row sampling: estimates against the formulas, gradients against masks, layers, and BatchNorm's
statistics.
"""

import copy
import math
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effilib import cost, models, networks, surgery
from effilib.convolution import (
    ApproxConv2d,
    Approximation,
    Convolution,
    MatrixProduct,
    approx_conv2d,
    approx_linear,
)
from effilib.data import synthetic
from effilib.errors import BadInput, NoEffect
from effilib.hooks import Method
from effilib.methods import column_row_sampling as crs
from effilib.methods import sampled_terms as which
from effilib.methods.column_row_sampling import (
    INFO,
    ChannelSampling,
    ColumnRowSampling,
    exact_channels_,
    reestimate_,
    sample_channels_,
    sample_columns_,
)
from effilib.methods.sampled_terms import choose_terms, how_many, inclusion, norms, squared_error
from effilib.recipe import Recipe
from effilib.training import train
from tests.common import equal, g, resumed_and_whole, shake, users

DATA = synthetic(images=300)
RECIPE = Recipe(epochs=2, batch_size=32, precision="fp32")
DRAWS = 4000


def matrices(n=20, mean=0.5):
    a, b = (
        torch.randn(8, n, generator=g(), dtype=torch.float64) + mean,
        torch.randn(n, 6, generator=g(1), dtype=torch.float64) + mean,
    )
    a *= torch.rand(n, generator=g(2), dtype=torch.float64) * 3  # terms of very different size
    return a, b, a.T[:, :, None] * b[:, None, :]  # the terms: (n, 8, 6)


def network(**settings):
    return models.build("resnet", 4, (1, 8, 8), **{"widths": (16, 16), "blocks": (1, 1), **settings})


# Choosing terms


UNBIASED = {
    "uniform, replacement": dict(scheme="uniform", replacement=True),
    "uniform": dict(scheme="uniform"),
    "norm, replacement": dict(scheme="norm", replacement=True),
    "norm": dict(scheme="norm"),
    "norm, mixed": dict(scheme="norm", mix=0.3),
    "bernoulli": dict(scheme="bernoulli"),
    "bernoulli, mixed": dict(scheme="bernoulli", mix=0.1),
}


def estimates(terms, w, k, how, draws=DRAWS, seed=3):
    generator, found = g(seed), []
    for _ in range(draws):
        index, scale = choose_terms(w, k, scaled=True, generator=generator, **how)
        assert len(index) == len(index.unique())
        found.append((terms[index] * scale[:, None, None]).sum(0))
    return torch.stack(found)


@pytest.mark.parametrize("how", UNBIASED.values(), ids=UNBIASED)
def test_scaled_estimates_are_unbiased_and_err_as_the_formula_says(how):
    a, b, terms = matrices()
    w, k, product = norms(a, 1).double() * norms(b, 0).double(), 6, a @ b
    assert torch.allclose(terms.sum(0), product)
    found = estimates(terms, w, k, how)
    errors = (found.mean(0) - product) / (found.std(0) / DRAWS**0.5)
    assert errors.abs().max() < 4.5  # of 48 numbers
    squared = (found - product).square().sum((1, 2))
    kind, p = how["scheme"], w / w.sum() * (1 - how.get("mix", 0)) + how.get("mix", 0) / len(w)
    if kind == "uniform":
        p = torch.full_like(w, 1 / len(w))
    if how.get("replacement"):
        expected = squared_error(terms, k, "replacement", p=p)
    elif kind == "bernoulli":
        expected = squared_error(terms, k, "bernoulli", p=inclusion(p, k).double())
    elif kind == "uniform":
        expected = squared_error(terms, k, "uniform")
    else:
        return  # of a systematic sample there is no closed form
    assert abs(squared.mean() - expected) < 5 * squared.std() / DRAWS**0.5


@pytest.mark.parametrize("w", [torch.ones(10), torch.tensor([5.0, 1, 1, 1, 0])], ids=["equal", "unequal"])
def test_bernoulli_draws_of_about_one_term_are_never_empty_and_unbiased(w):
    draws, generator = 3000, g(4)
    drawn = [choose_terms(w, 1, "bernoulli", scaled=True, generator=generator) for _ in range(draws)]
    assert all(len(index) for index, _ in drawn)
    sums = torch.stack([(w[index] * scale).sum() for index, scale in drawn])
    assert abs(sums.mean() - w.sum()) < 4.5 * sums.std() / draws**0.5 + 1e-4


def test_norm_proportional_draws_have_the_least_error_and_its_closed_form():
    a, b, terms = matrices()
    w, k, product = norms(a, 1).double() * norms(b, 0).double(), 6, a @ b
    least = squared_error(terms, k, "replacement", p=w / w.sum())
    assert least == pytest.approx((w.sum() ** 2 - product.square().sum()).item() / k, rel=1e-5)
    for seed in range(20):
        other = torch.rand(len(w), generator=g(seed), dtype=torch.float64) + 0.05
        assert squared_error(terms, k, "replacement", p=other / other.sum()) > least


def test_topk_is_the_largest_terms_unscaled_and_its_error_is_bounded():
    a, b, terms = matrices()
    w = norms(a, 1).double() * norms(b, 0).double()
    index, scale = choose_terms(w, 7, "topk")
    assert scale is None
    assert set(index.tolist()) == set(w.argsort(descending=True)[:7].tolist())
    rest = [i for i in range(20) if i not in index]
    assert (a @ b - terms[index].sum(0)).norm() <= w[rest].sum() * (1 + 1e-6)
    with pytest.raises(BadInput, match="no probability"):
        choose_terms(w, 7, "topk", scaled=True)
    with pytest.raises(BadInput, match="did you mean 'topk'"):
        choose_terms(w, 7, "topj")


def test_unscaled_choices_have_no_factor_and_as_many_terms_as_asked_for():
    w = torch.rand(30, generator=g()) + 0.1
    for how in ("uniform", "norm"):
        counts = {len(choose_terms(w, 12, how, generator=g(i))[0]) for i in range(200)}
        assert counts == {12}
        assert choose_terms(w, 12, how, generator=g())[1] is None
        assert len(choose_terms(w, 12, how, replacement=True, generator=g())[0]) < 12  # some come twice
    counts = torch.tensor(
        [float(len(choose_terms(w, 12, "bernoulli", generator=g(i))[0])) for i in range(1000)]
    )
    assert abs(counts.mean() - 12) < 4 * counts.std() / 1000**0.5


@pytest.mark.parametrize("k", [1, 3, 5])
def test_inclusion_probabilities_add_up_to_k_and_stop_at_one(k):
    for w in (
        torch.tensor([100.0, 1, 1, 1, 1]),
        torch.rand(5, generator=g()),
        torch.zeros(5),
        torch.tensor([3.0, 2, 1, 0, 0]),
    ):
        p = inclusion(w, k)
        assert (p <= 1).all()
        assert p.sum().item() == pytest.approx(min(k, (w > 0).sum().item() or 5), rel=1e-5)
    p = inclusion(torch.tensor([100.0, 1, 1, 2]), 2)
    assert torch.allclose(p, torch.tensor([1.0, 0.25, 0.25, 0.5]))


def test_a_bernoulli_draw_that_would_be_empty_is_no_bias():
    terms = torch.arange(1.0, 11)[:, None, None].double()  # k = 1 of 10: a third of the draws are empty
    for how in (dict(scheme="bernoulli"), dict(scheme="bernoulli", mix=1.0)):
        found = estimates(terms, torch.ones(10), 1, how).flatten()
        assert abs(found.mean() - 55) < 4 * found.std() / DRAWS**0.5
        expected = squared_error(terms, 1, "bernoulli", p=torch.full((10,), 0.1).double())
        squared = (found - 55).square()
        assert abs(squared.mean() - expected) < 5 * squared.std() / DRAWS**0.5


def test_a_systematic_samples_terms_come_as_often_as_their_probability_says():
    w = torch.tensor([8.0, 4, 2, 1, 1, 0.5, 0.5, 3])
    p, count = inclusion(w, 3), torch.zeros(8)
    for i in range(3000):
        count[choose_terms(w, 3, "norm", generator=g(i))[0]] += 1
    assert ((count / 3000 - p).abs() <= 4 * (p * (1 - p) / 3000).sqrt() + 1e-6).all()


def test_all_zero_terms_are_safe_and_scores_do_not_depend_on_the_inputs_scale():
    for how in UNBIASED.values():
        index, scale = choose_terms(torch.zeros(10), 4, scaled=True, generator=g(), **how)
        assert len(index) >= 1
        assert scale.isfinite().all()
    w = torch.rand(10, generator=g())
    for scheme in which.SCHEMES:
        assert torch.equal(
            choose_terms(w, 4, scheme, generator=g())[0], choose_terms(64 * w, 4, scheme, generator=g())[0]
        )


def test_norms_are_those_of_slices_in_any_format():
    t = torch.randn(3, 5, 4, 4, generator=g())
    for dim in (0, 1):
        expected = torch.stack([s.norm() for s in t.unbind(dim)])
        assert torch.allclose(norms(t, dim), expected)
        assert torch.allclose(norms(t.bfloat16(), dim), expected, rtol=0.02)
    assert norms(300 * t.half(), 1).isfinite().all()


def test_how_many_terms():
    assert [how_many(r, 128, 10) for r in (1, 0.75, 0.5, 0.3, 0.01)] == [128, 96, 64, 38, 10]
    assert how_many(0.5, 3, 10) == 3  # a stem of three channels is exact by itself


# Products


def conv_case(dtype=torch.float64, layout=torch.contiguous_format):
    x = torch.randn(4, 12, 6, 6, generator=g(), dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    w = (
        torch.randn(8, 12, 3, 3, generator=g(1), dtype=dtype)
        .contiguous(memory_format=layout)
        .requires_grad_()
    )
    return x, w


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_forward_sampling_is_a_mask_on_the_channels_in_all_three_products(layout):
    x, w = conv_case(layout=layout)
    y = approx_conv2d(x, w, padding=1, approximation=crs.forward_sampling(0.5, 1, scheme="topk"))
    index = (norms(x.detach(), 1) * norms(w.detach(), 1)).topk(6).indices
    mask = torch.zeros(12, dtype=x.dtype).index_fill_(0, index, 1.0)
    expected = F.conv2d(x * mask[:, None, None], w, padding=1)
    assert torch.allclose(y, expected)
    dy = torch.randn(y.shape, generator=g(2), dtype=y.dtype)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    for mine, theirs in zip((dx, dw), torch.autograd.grad(expected, (x, w), dy), strict=True):
        assert torch.allclose(mine, theirs)
    left_out = (mask == 0).nonzero().flatten()
    assert (dx[:, left_out] == 0).all()
    assert (dw[:, left_out] == 0).all()
    assert not torch.allclose(y, F.conv2d(x, w, padding=1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("scheme", ["topk", "bernoulli"])
def test_blocks_are_chosen_by_their_norms_and_masked_as_a_whole(scheme, layout):
    x, w = conv_case(layout=layout)
    how = dict(scheme=scheme, scaled=scheme != "topk")
    a = crs.forward_sampling(0.5, 1, block=4, generator=g(7), **how)
    squares = [norms(t.detach(), 1).square().view(3, 4).sum(1) for t in (x, w)]
    index, scale = choose_terms((squares[0] * squares[1]).sqrt(), 2, generator=g(7), **how)
    mask = torch.zeros(3, dtype=x.dtype)
    mask[index] = 1.0 if scale is None else scale.to(x.dtype)
    expected = F.conv2d(x * mask.repeat_interleave(4)[:, None, None], w, padding=1)
    y = approx_conv2d(x, w, padding=1, approximation=a)
    assert torch.allclose(y, expected)
    dy = torch.randn(y.shape, generator=g(2), dtype=y.dtype)
    for mine, theirs in zip(*(torch.autograd.grad(z, (x, w), dy) for z in (y, expected)), strict=True):
        assert torch.allclose(mine, theirs)


def test_gradients_through_fixed_blocks_pass_gradcheck():
    x, w = conv_case()
    x, w = x.detach()[:2, :, :3, :3].requires_grad_(), w.detach()[:2].requires_grad_()
    fixed = torch.tensor([[8, 9, 10, 11], [0, 1, 2, 3]]), torch.rand(8, generator=g(), dtype=x.dtype) + 0.5
    assert torch.autograd.gradcheck(lambda x, w: approx_conv2d(x, w, sample=lambda x, w: fixed), (x, w))


def test_blocks_divide_the_channels_and_none_is_all_of_them():
    assert [which.blocks(r, 128, 4, 16) for r in (0.75, 0.5, 0.3)] == [(6, 8, 16), (4, 8, 16), (2, 8, 16)]
    assert which.blocks(0.5, 20, 4, 16) == (3, 5, 4)  # 2.5 of 5
    assert which.blocks(0.01, 64, 1, 16) == (1, 4, 16)
    assert which.blocks(0.75, 36, 1, 12) == (2, 3, 12)  # 2.25 of 3
    for channels in range(1, 70):
        for block in (1, 12, 16):
            k, n, b = which.blocks(0.75, channels, 1, block)
            assert n * b == channels
            assert 0 < k < n or channels == 1
    k, n, _ = which.blocks(0.5, 16, 16, 16)
    assert k == n  # at most `minimal` channels: exact


# Scores in closed form


def test_the_energy_behind_batchnorm_and_relu_is_the_measured_one():
    gamma = torch.tensor([1.0, 0.5, -2.0, 0.1, 0.0, 0.0])
    beta = torch.tensor([0.0, 1.0, -1.0, -0.3, 2.0, -2.0])
    z = beta + gamma * torch.randn(200_000, 6, generator=g())
    measured = z.relu().square().mean(0)
    assert torch.allclose(which.rectified_energy(gamma, beta), measured, rtol=0.02, atol=1e-5)


def test_closed_and_measured_scores_choose_nearly_the_same_channels_of_a_trained_network():
    model = models.build("vgg", 4, (1, 8, 8), widths=((32, 32), (32,)))
    train(model, DATA, replace(RECIPE, epochs=4))
    chosen = crs.conv.layers(model)
    found = which.rectified(model, chosen, DATA.normalize(DATA.train.x[:2]))
    assert [(n, bn is model.features[i]) for (n, bn), i in zip(found.items(), (1, 4), strict=True)] == [
        ("features.3", True), ("features.7", True),
    ]  # fmt: skip
    x = model.train().features[:3](DATA.normalize(DATA.train.x[:200])).detach()
    bn = model.features[1]
    closed, measured = which.rectified_energy(bn.weight, bn.bias).detach(), norms(x, 1).square()
    assert torch.corrcoef(torch.stack([closed, measured]))[0, 1] > 0.9


def test_what_is_no_batchnorm_and_relu_is_measured():
    model, x = network(), DATA.normalize(DATA.train.x[:2])
    found = which.rectified(model, crs.conv.layers(model, x), x)
    assert {n: bn is model.get_submodule(n.replace("conv2", "bn1")) for n, bn in found.items()} == {
        "stages.0.0.conv2": True,
        "stages.1.0.conv2": True,
        "stages.0.0.conv1": False,  # behind the stem's BatchNorm
    }
    plain = models.build("convnet", 4, (1, 8, 8), widths=(8, 8), bn=False)
    assert which.rectified(plain, crs.conv.layers(plain, x), x) == {}
    bn = nn.BatchNorm2d(4)  # of other channels than the layer's, after surgery
    x, w = torch.rand(2, 8, 3, 3, generator=g()), torch.ones(4, 8, 3, 3)
    y, expected = (
        approx_conv2d(x, w, approximation=crs.forward_sampling(0.5, 1, norm=m)) for m in (bn, None)
    )
    assert torch.equal(y, expected)


def test_a_residual_path_that_begins_at_zero_is_not_taken_for_what_came_before():
    model, x = models.build("resnet", 4, (1, 8, 8), widths=(8,), blocks=(2,)), torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        for block in model.stages[0]:
            block.bn2.weight.zero_()
    before = copy.deepcopy(model.state_dict())
    found = which.rectified(model, crs.conv.layers(model, x), x)
    assert {n: m is model.bn for n, m in found.items()} == {
        "stages.0.0.conv1": True, "stages.0.0.conv2": False, "stages.0.1.conv2": False,
    }  # fmt: skip
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("scheme", ["norm", "bernoulli"])
def test_norms_that_overflowed_end_in_a_draw(scheme):
    for w in ([1.0, math.inf, 2.0], [1.0, math.nan, 2.0], [3e38, 3e38, 3e38]):
        index, scale = choose_terms(torch.tensor(w), 2, scheme, scaled=True, generator=g())
        assert 0 < len(index) <= 3
        assert scale.isfinite().all()


def test_all_channels_are_bit_equal_to_the_exact_product():
    x, w = conv_case(torch.float32)
    for ratio, minimal in ((1.0, 1), (0.5, 12)):
        y = approx_conv2d(x, w, approximation=crs.forward_sampling(ratio, minimal, scheme="topk"))
        assert torch.equal(y, F.conv2d(x, w))
        y = approx_conv2d(x, w, approximation=crs.backward_sampling(ratio, minimal, scheme="topk"))
        exact = torch.autograd.grad(F.conv2d(x, w).square().sum(), (x, w))
        got = torch.autograd.grad(y.square().sum(), (x, w))
        assert torch.allclose(got[1], exact[1]) if minimal == 12 else all(map(torch.equal, got, exact))


def test_gradients_through_a_fixed_choice_pass_gradcheck():
    x, w = conv_case()
    x, w = x.detach()[:2, :, :4, :4].requires_grad_(), w.detach()[:3].requires_grad_()
    fixed = choose_terms(norms(x.detach(), 1), 5, "norm", scaled=True, generator=g())
    assert torch.autograd.gradcheck(lambda x, w: approx_conv2d(x, w, sample=lambda x, w: fixed), (x, w))


@pytest.mark.parametrize("linear", [False, True], ids=["conv", "linear"])
@pytest.mark.parametrize(
    "how",
    [UNBIASED["norm, replacement"], UNBIASED["bernoulli"], UNBIASED["uniform"]],
    ids=lambda h: h["scheme"],
)
def test_scaled_sampling_is_unbiased_in_the_forward_pass_and_in_backward_samplings_gradients(how, linear):
    x, w = (t.detach() for t in conv_case())
    x, w = (x[:, :, 0, 0], w[:, :, 0, 0]) if linear else (x[..., :3, :3], w)
    x, w = x.requires_grad_(), w.requires_grad_()
    apply = approx_linear if linear else approx_conv2d
    exact = apply(x, w)
    dy = torch.randn(exact.shape, generator=g(2), dtype=x.dtype)
    exact = [exact.detach(), *torch.autograd.grad(exact, (x, w), dy)]
    generator, draws = g(5), 1500
    for sampling, parts in ((crs.forward_sampling, [0]), (crs.backward_sampling, [1, 2])):
        approximation, found = sampling(0.5, 1, scaled=True, generator=generator, **how), []
        for _ in range(draws):
            y = apply(x, w, approximation=approximation)
            found.append([y.detach(), *torch.autograd.grad(y, (x, w), dy)])
        for i in parts:
            values = torch.stack([f[i] for f in found])
            z = (values.mean(0) - exact[i]) / (values.std(0) / draws**0.5 + 1e-9)
            assert z.abs().max() < 5.2
            assert values.std(0).max() > 0
    if sampling is crs.backward_sampling:
        assert torch.equal(found[0][0], exact[0])


def test_the_error_of_topk_in_a_convolution_is_bounded_by_the_terms_left_out():
    x, w = (t.detach() for t in conv_case())
    score = norms(x, 1) * norms(w, 1)
    y = approx_conv2d(x, w, padding=1, approximation=crs.forward_sampling(0.5, 1, scheme="topk"))
    bound = score.sort().values[:6].sum() * 3  # sqrt(k k)
    error = (y - F.conv2d(x, w, padding=1)).norm()
    assert 0 < error <= bound


def test_sampling_saves_its_share_of_the_flops_in_all_three_products():
    x, w = conv_case()

    def flops(**how):
        return cost.count_flops(lambda: approx_conv2d(x, w, **how).sum().backward())

    assert flops(approximation=crs.forward_sampling(0.5, 1, scheme="topk")) == flops() / 2
    assert flops(approximation=crs.backward_sampling(0.5, 1, scheme="topk")) == flops() * 2 / 3


# Surgery


def test_stem_classifier_grouped_and_narrow_layers_stay_exact():
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 20, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 12), nn.Linear(12, 4),
    )  # fmt: skip
    x = torch.randn(2, 1, 8, 8, generator=g())
    trained, evaluated = model(x), model.eval()(x)
    assert sample_columns_(model.train(), 0.5, x=x, block=1) == ["1", "3", "7"]
    assert not torch.equal(model(x), trained)
    assert torch.equal(model.eval()(x), evaluated)
    assert sample_columns_(copy.deepcopy(model), 0.5, linear=False, owner="another", where="backward") == [
        "1",
        "4",
    ]  # by outputs


def test_settings_that_change_nothing_have_no_effect_and_bad_ones_are_named():
    for ratio in (1.0, 0.99):
        with pytest.raises(NoEffect, match="column-row sampling"):
            sample_columns_(network(widths=(8, 8)), ratio)
    with pytest.raises(NoEffect):
        sample_columns_(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), 0.5)
    for ratio in (0, -1, 1.5):
        with pytest.raises(BadInput, match="ratio"):
            sample_columns_(network(), ratio)
    with pytest.raises(BadInput, match="block is 0"):
        sample_columns_(network(), block=0)
    for where in (sample_columns_, sample_channels_):
        with pytest.raises(BadInput, match="minimal is 0"):
            where(network(), minimal=0)
    with pytest.raises(BadInput, match="minimal is 0"):
        crs.backward_sampling(0.01, minimal=0)
    with pytest.raises(BadInput, match="unknown score of channels 'measure'"):
        sample_columns_(network(), score="measure")
    for until in (0, 1.5):
        with pytest.raises(BadInput, match="until"):
            ColumnRowSampling(until=until)
    with pytest.raises(BadInput, match="place of sampling"):
        sample_columns_(network(), 0.5, where="sideways")


# Channels that nobody reads


def traced(name):
    """A network, images, and the nodes that `sample_channels_` samples of it."""
    if name == "users":
        return shake(users()), torch.randn(6, 1, 8, 8, generator=g())
    settings = {"resnet": {"widths": (8, 16), "blocks": (1, 2)}, "vgg": {"widths": ((8,), (16, 12), (8,))}}
    model = models.build(name, 4, (1, 8, 8), **settings[name])
    return shake(model), torch.randn(6, 1, 8, 8, generator=g())


@pytest.mark.parametrize("name", ["vgg", "resnet", "users"])
def test_channels_that_nobody_reads_change_neither_sums_nor_gradients(name):
    fast, x = traced(name)
    fast.train()
    for m in fast.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    slow, y = copy.deepcopy(fast), torch.arange(len(x)) % 4
    how = dict(minimal=4, block=4)
    names = sample_channels_(fast, 0.5, generator=g(3), **how)
    nodes, generator = surgery.trace(slow), g(3)
    for node in (nodes[n] for n in names):  # all of its readers leave out the same channels
        k, n, b = which.blocks(0.5, node.width, 4, 4)
        index = (b * crs._draw(k, n, generator)[:, None] + torch.arange(b)).flatten()
        sample = Approximation(sample=lambda x, w, index=index: (index, None))
        readers = {c: slow.get_submodule(c) for c in node.consumers}
        crs.conv.convert_(readers, dict.fromkeys(readers, sample), "slow", "test")
    assert names
    logits = [net(x) for net in (fast, slow)]
    assert torch.allclose(*logits, rtol=1e-4, atol=1e-5)
    for z in logits:
        F.cross_entropy(z, y).backward()
    for (key, p), q in zip(fast.named_parameters(), slow.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-5), key


def test_only_chosen_channels_have_new_statistics_and_evaluation_is_exact():
    model, x = traced("vgg")
    expected, before = model.eval()(x), copy.deepcopy(model.state_dict())
    sample_channels_(model, 0.5, minimal=4, block=4, generator=g())
    assert torch.equal(model(x), expected)
    model.train()(x)
    moved = model.features[1].running_mean != before["features.1.running_mean"]
    assert moved.view(2, 4).all(1).sum() == 1
    assert moved.sum() == 4
    seen = torch.zeros(8, dtype=torch.bool)
    for _ in range(20):
        model.zero_grad()
        model(x).square().sum().backward()
        seen |= model.features[0].weight.grad.flatten(1).any(1)
    assert seen.all()
    exact_channels_(model)
    model.load_state_dict(before)
    assert torch.equal(model.eval()(x), expected)


def test_a_copy_under_sampling_follows_its_own_weights():
    model, x = traced("vgg")
    sample_channels_(model, 0.5, minimal=4, block=4, generator=g())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.features[0].weight.zero_()
    for mode in (False, True):
        assert not torch.equal(model.train(mode)(x), twin.train(mode)(x))
    twin(x).sum().backward()
    assert model.features[0].weight.grad is None
    assert [str(n) for n in surgery.trace(twin).nodes] == [str(n) for n in surgery.trace(model).nodes]
    exact_channels_(twin)
    assert type(twin) is networks.VGG


def test_a_fixed_choice_trains_always_the_same_channels():
    model, x = traced("vgg")
    sample_channels_(model, 0.5, fixed=True, minimal=4, block=4, generator=g())
    found = []
    for _ in range(5):
        model.train().zero_grad()
        model(x).square().sum().backward()
        found.append(model.features[0].weight.grad.flatten(1).any(1))
    assert found[0].sum() == 4
    assert all(torch.equal(f, found[0]) for f in found)


def test_half_of_the_channels_are_a_quarter_of_the_products_between_them():
    model, x = models.build("vgg", 4, (1, 8, 8), widths=((32, 32, 32, 32),)), torch.zeros(2, 1, 8, 8)

    def flops():
        return cost.count_flops(lambda: model.train()(x).sum().backward())

    exact, layer = flops(), cost.layers(model, x)["features.3"].flops
    assert sample_channels_(model, 0.5) == ["features.0", "features.3", "features.6"]
    stem = 2 * cost.layers(model, x)["features.0"].flops  # forward and dW
    assert exact - flops() == 3 * layer * (0.75 + 0.75 + 0.5) + stem / 2


def test_networks_without_such_channels_have_no_effect():
    for model in (nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), network(widths=(16, 16))):
        with pytest.raises(NoEffect, match="column-row sampling"):
            sample_channels_(model, 0.5)
    with pytest.raises(BadInput, match="ratio"):
        sample_channels_(network(), 2.0)


# BatchNorm


def test_reestimated_statistics_are_the_average_over_exact_batches():
    model = network().train()
    sample_columns_(model, 0.5, block=4)
    x = DATA.normalize(DATA.train.x[:96]).split(32)
    for part in x:
        model(part)
    weights = copy.deepcopy(dict(model.named_parameters()))
    assert reestimate_(model, x) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert model.training
    assert all(m.momentum == 0.1 and m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    seen, plain = [], network().train()
    plain.load_state_dict(model.state_dict())
    plain.stages[1][0].bn1.register_forward_pre_hook(
        lambda m, i: seen.append(i[0].transpose(0, 1).flatten(1))
    )  # (C, N H W)
    for part in x:
        plain(part)
    bn = model.stages[1][0].bn1
    assert torch.allclose(torch.stack([s.mean(1) for s in seen]).mean(0), bn.running_mean, atol=1e-5)
    assert torch.allclose(torch.stack([s.var(1) for s in seen]).mean(0), bn.running_var, rtol=1e-4)
    assert reestimate_(nn.Linear(2, 2), []) == 0


# The method


def trained(methods=(), recipe=RECIPE, **options):
    model = network()
    return model, train(model, DATA, recipe, methods, **options)


ARMS = {
    "topk": ColumnRowSampling(minimal=4, block=4),
    "uniform": ColumnRowSampling(minimal=4, block=4, scheme="uniform", scaled=True),
    "norm, replacement": ColumnRowSampling(minimal=4, block=4, scheme="norm", replacement=True, scaled=True),
    "norm": ColumnRowSampling(minimal=4, block=4, scheme="norm"),
    "bernoulli": ColumnRowSampling(minimal=4, block=4, scheme="bernoulli", scaled=True),
    "backward": ColumnRowSampling(minimal=4, block=4, where="backward", scheme="bernoulli", scaled=True),
    "channels": ChannelSampling(minimal=4, block=4, until=1.0),
    "channels, drawn anew": ChannelSampling(minimal=4, block=4, until=1.0, fixed=False),
}


def test_no_arm_is_bit_equal_to_the_exact_one_or_to_another():
    found = {"exact": trained()[0]} | {n: trained([m])[0] for n, m in ARMS.items()}
    names = list(found)
    assert [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if equal(found[a], found[b])] == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["topk", "channels"])
def test_sampled_training_learns_saves_flops_and_leaves_a_plain_model_behind(precision, name):
    recipe = replace(RECIPE, epochs=6, precision=precision)
    model, history = trained([ARMS[name]], recipe)
    assert history.accuracy > 80
    assert "forward" not in vars(model)
    assert not any(isinstance(m, ApproxConv2d) for m in model.modules())
    assert history.flops < 0.7 * trained(recipe=recipe)[1].flops


def test_products_are_exact_after_their_share_of_the_run():
    @dataclass(frozen=True)
    class Look(Method):
        seen: list = field(default_factory=list, hash=False, compare=False, repr=False)

        def on_batch(self, run, x, y):
            self.seen.append(any(isinstance(m, ApproxConv2d) for m in run.model.modules()))
            return x, y

    look = Look()
    method = replace(ARMS["topk"], until=0.6)
    model, history = trained([method, look])
    sampled = math.ceil(0.6 * history.steps)
    assert look.seen == [True] * sampled + [False] * (history.steps - sampled)
    assert not any(isinstance(m, ApproxConv2d) for m in model.modules())
    assert [e["text"].partition(" after")[0] for e in history.events] == ["exact products"]
    whole, exact = trained([ARMS["topk"]])[1].flops, trained()[1].flops
    assert whole < history.flops < exact


def test_both_accuracies_are_logged_and_the_last_row_has_the_reestimated_one():
    _, history = trained([ARMS["topk"]])
    event = history.events[-1]
    assert event["reestimated"] == history.rows[-1]["accuracy"]
    assert event["plain"] != event["reestimated"]
    assert f"{event['plain']:.2f} % with the statistics of training" in event["text"]
    for row in history.rows:
        assert torch.isfinite(torch.tensor(row["loss"]))


def test_backward_sampling_needs_no_reestimation():
    @dataclass(frozen=True)
    class Look(Method):
        seen: list = field(default_factory=list, hash=False, compare=False, repr=False)

        def on_evaluation(self, run):
            self.seen.append(run.model.bn.running_mean.clone())

        def on_step_end(self, run):
            self.seen.append(run.model.bn.running_mean.clone())

    for where, moved in (("backward", False), ("forward", True)):
        look = Look()
        trained([replace(ARMS["topk"], where=where), look])
        assert torch.equal(look.seen[-2], look.seen[-1]) != moved


@pytest.mark.parametrize("until", [1.0, 0.3, 0.8], ids=["whole", "exact before", "exact after"])
@pytest.mark.parametrize("name", ["topk", "bernoulli", "channels", "channels, drawn anew"])
def test_a_resumed_run_ends_bit_equal(name, until, tmp_path):
    method = replace(ARMS[name], until=until)
    (a, ha), (b, hb) = resumed_and_whole(network, DATA, RECIPE, [method], tmp_path / "run.pt")
    assert equal(a, b)
    assert ha.events == hb.events


def test_products_know_their_inputs():
    assert MatrixProduct().forward(torch.ones(2, 3), torch.ones(4, 3)).tolist() == [[3.0] * 4] * 2
    assert Convolution().forward(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)).item() == 9


def test_the_information_is_complete():
    assert all(getattr(INFO, f) for f in ("name", "name_de", "chapter", "paper", "claim", "cost_model"))
