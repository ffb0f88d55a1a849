"""Column-row sampling: estimates against the formulas, gradients against masks, layers, and BatchNorm's
statistics.
"""

import copy
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effilib import cost, models
from effilib.convolution import ApproxConv2d, Convolution, MatrixProduct, approx_conv2d, approx_linear
from effilib.data import synthetic
from effilib.errors import BadInput, NoEffect
from effilib.methods import column_row_sampling as crs
from effilib.methods.column_row_sampling import (
    INFO,
    ColumnRowSampling,
    choose_terms,
    how_many,
    inclusion,
    norms,
    reestimate_,
    sample_columns_,
    squared_error,
)
from effilib.training import Method, Recipe, train
from tests.common import equal, g, resumed_and_whole

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
    for scheme in crs.SCHEMES:
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
    assert sample_columns_(model.train(), 0.5, x=x) == ["1", "3", "7"]
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
    with pytest.raises(BadInput, match="place of sampling"):
        sample_columns_(network(), 0.5, where="sideways")


# BatchNorm


def test_reestimated_statistics_are_the_average_over_exact_batches():
    model = network().train()
    sample_columns_(model, 0.5)
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
    "topk": ColumnRowSampling(minimal=4),
    "uniform": ColumnRowSampling(minimal=4, scheme="uniform", scaled=True),
    "norm, replacement": ColumnRowSampling(minimal=4, scheme="norm", replacement=True, scaled=True),
    "norm": ColumnRowSampling(minimal=4, scheme="norm"),
    "bernoulli": ColumnRowSampling(minimal=4, scheme="bernoulli", scaled=True),
    "backward": ColumnRowSampling(minimal=4, where="backward", scheme="bernoulli", scaled=True),
}


def test_no_arm_is_bit_equal_to_the_exact_one_or_to_another():
    found = {"exact": trained()[0]} | {n: trained([m])[0] for n, m in ARMS.items()}
    names = list(found)
    assert [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if equal(found[a], found[b])] == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sampled_training_learns_saves_flops_and_leaves_a_plain_model_behind(precision):
    recipe = replace(RECIPE, epochs=6, precision=precision)
    model, history = trained([ARMS["topk"]], recipe)
    assert history.accuracy > 85
    assert not any(isinstance(m, ApproxConv2d) for m in model.modules())
    assert history.flops < 0.7 * trained(recipe=recipe)[1].flops


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


@pytest.mark.parametrize("name", ["topk", "bernoulli"])
def test_a_resumed_run_ends_bit_equal(name, tmp_path):
    (a, ha), (b, hb) = resumed_and_whole(network, DATA, RECIPE, [ARMS[name]], tmp_path / "run.pt")
    assert equal(a, b)
    assert ha.events == hb.events


def test_products_know_their_inputs():
    assert MatrixProduct().forward(torch.ones(2, 3), torch.ones(4, 3)).tolist() == [[3.0] * 4] * 2
    assert Convolution().forward(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)).item() == 9


def test_the_information_is_complete():
    assert all(getattr(INFO, f) for f in ("name", "name_de", "chapter", "paper", "claim", "cost_model"))
