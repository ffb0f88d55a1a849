"""Sampled backward passes: how many samples stay, which, with what weight; and training with them."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from effilib import models
from effilib.data import synthetic
from effilib.errors import BadInput, NoEffect
from effilib.hooks import Method
from effilib.methods.backward_sampling import (
    INFO,
    BackwardSampling,
    added_variance,
    fewest,
    most_efficient,
    probabilities,
    systematic,
)
from effilib.recipe import Recipe
from effilib.surgery import select_, trace
from effilib.training import train
from tests.common import equal, g, resumed_and_whole

DATA = synthetic(images=300)
RECIPE = Recipe(epochs=2, batch_size=32, precision="fp32")


def network(**settings):
    return models.build("resnet", 4, (1, 8, 8), **{"widths": (8, 8), "blocks": (1, 1), **settings})


def norms(n=40, s=1.5):
    return (s * torch.randn(n, generator=g(), dtype=torch.float64)).exp()


@pytest.mark.parametrize("k", [1, 7, 20, 39, 40])
def test_probabilities_are_in_proportion_to_the_norms_and_a_tenth_of_their_mean_up_to_one_and_add_up(k):
    g_ = norms()
    u, p = g_ + 0.1 * g_.mean(), probabilities(g_, k)
    assert probabilities(g_.index_fill(0, torch.tensor([0]), 0.0), k).min() > 0.999 * k / (11 * 40)
    assert p.sum().item() == pytest.approx(k)
    assert 0 < p.min() <= p.max() <= 1
    below = p < 1 - 1e-12
    assert below.any() or k == 40
    assert ((p / u)[below] / (p / u)[below][0] - 1).abs().max() < 1e-9 if below.any() else True
    if below.any() and not below.all():
        assert u[~below].min() > u[below].max()
    together = probabilities(g_, torch.tensor([[3], [k]]))
    assert torch.allclose(together[1], p)


def test_as_many_as_planned_are_drawn_each_with_its_probability():
    p, draws, generator = probabilities(norms(), 12), 4000, g(1)
    counts = torch.zeros(40)
    for _ in range(draws):
        index = systematic(p, generator)
        assert len(index) == len(index.unique()) == 12
        counts[index] += 1
    assert (counts[p == 1] == draws).all()
    error = (p * (1 - p) / draws).sqrt()
    assert ((counts / draws - p).abs() <= 4.5 * error + 1e-9).all()
    assert torch.equal(systematic(p, g(7)), systematic(p, g(7)))


def test_the_added_variance_is_that_of_independent_draws_by_enumeration():
    """Per-sample gradients at right angles, so that squares add up."""
    u, p = torch.tensor([1.0, 2.0, 4.0]).double(), torch.tensor([0.3, 0.5, 0.9]).double()
    total = 0.0
    for kept in itertools.product((0.0, 1.0), repeat=3):
        k = torch.tensor(kept).double()
        total += ((k * p + (1 - k) * (1 - p)).prod() * ((k / p - 1) * u).square().sum()).item()
    assert added_variance(u, p).item() == pytest.approx(total / 21)


@pytest.mark.parametrize("tau", [0.01, 0.1, 1.0, 10.0])
def test_no_fewer_samples_would_do(tau):
    u, multiple = norms(), 4
    k = fewest(u, tau, multiple)
    assert k % multiple == 0
    assert added_variance(u, probabilities(u, k)) <= tau
    assert k == multiple or added_variance(u, probabilities(u, k - multiple)) > tau


def test_alike_samples_all_stay_and_unlike_ones_do_not():
    assert fewest(torch.ones(32), 0.1) == 32
    assert fewest(norms(32, s=2.0), 0.1) < 20
    assert fewest(norms(4), 0.1) == 4  # fewer than a multiple


def test_the_most_efficient_number_is_the_best_of_all_and_all_where_nothing_is_gained():
    u = norms(64)

    def seconds(k):  # for the information of a whole batch
        return (1 + added_variance(u, probabilities(u, k)).item()) * (0.4 + 0.6 * k / 64)

    assert most_efficient(u, 0.4, 1) == min(range(1, 65), key=seconds)
    assert seconds(most_efficient(u, 0.4, 8)) <= min(seconds(k) for k in range(8, 65, 8)) + 1e-12
    assert most_efficient(torch.ones(64), 0.4) == 64
    assert most_efficient(u, 0.9, 1) > most_efficient(u, 0.1, 1)  # the less there is to save, the more stay


# In training


def trained(method=None, recipe=RECIPE, model=None, **options):
    model = model or network()
    return model, train(model, DATA, recipe, [method] if method else [], **options)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_learns_with_fewer_products_and_leaves_a_plain_model_behind(precision):
    recipe = replace(RECIPE, epochs=6, precision=precision)
    model, history = trained(BackwardSampling(keep=0.5), recipe)
    plain, exact = trained(recipe=recipe)
    assert type(model) is type(plain)
    assert not hasattr(model, "part")
    assert history.accuracy > 70
    assert 0.6 < history.flops / exact.flops < 0.75  # the forward pass, and half of the rest
    assert history.events[-1]["share"] == {"stages.1.0": 0.5}


def test_the_variance_that_a_border_may_add_decides_how_many_stay():
    shares = []
    for tau in (0.02, 0.2, 2.0):
        end = trained(BackwardSampling(tau=tau, multiple=2))[1].events[-1]
        shares.append(end["share"]["stages.1.0"])
        assert all(v <= tau for v in end["variance"].values())
        assert list(end["share"].values()) == sorted(
            end["share"].values(), reverse=True
        )  # fewer further down
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1]
    free = trained(BackwardSampling(multiple=2))[1].events[-1]  # by itself, at the uppermost border only
    assert list(free["share"]) == ["stages.1.0"]
    assert 0 < free["share"]["stages.1.0"] <= 1


def test_a_small_batch_is_no_crash_and_the_logged_variance_is_the_gradients_own():
    assert not trained(BackwardSampling(tau=0.1), replace(RECIPE, epochs=0.1, batch_size=4))[1].diverged
    seen = torch.tensor([0.0, 1.0, 2.0, 9.0])
    state = {"borders": {}}
    run = SimpleNamespace(
        model=network().train(), device="cpu", logits=seen, generator=lambda *a, **k: g(), state={}
    )
    method = BackwardSampling(keep=0.5, multiple=1)
    run.state[method] = state
    method._install(run).sampler("border", seen)
    expected = added_variance(seen, probabilities(seen, 2)).item()
    assert state["borders"]["border"]["variance"] == pytest.approx(expected)


def test_until_it_begins_training_is_exact_and_then_it_is_not():
    exact, whole = trained()
    begun, half = trained(BackwardSampling(keep=0.5))
    assert not equal(begun, exact)
    model, history = trained(BackwardSampling(keep=0.5, begin=0.9))
    assert "samples kept: stages.1.0 50%" in history.events[-1]["text"]
    assert not equal(model, exact)
    assert equal(trained(BackwardSampling(tau=1e-9))[0], exact)
    middle = trained(BackwardSampling(keep=0.5, begin=0.5))[1].flops  # each half is counted by itself
    assert middle == pytest.approx((whole.flops + half.flops) / 2, rel=0.05)


def test_a_resumed_run_ends_bit_equal(tmp_path):
    methods = [BackwardSampling(tau=0.3, multiple=2)]
    (a, ha), (b, hb) = resumed_and_whole(network, DATA, RECIPE, methods, tmp_path / "run.pt")
    assert equal(a, b)
    assert ha.events == hb.events


class Prune(Method):
    """Take away channels in mid-training."""

    def on_epoch_end(self, run):
        if run.epoch == 0:
            run.restructure(lambda m, optimizer: select_(trace(m)["stages.0.0.conv1"], range(5), optimizer))


def test_it_goes_on_after_surgery_in_mid_training():
    model = network()
    history = train(model, DATA, RECIPE, [Prune(), BackwardSampling(keep=0.5)])
    assert model.settings()["blocks"] == [[5], [8]]
    assert not history.diverged
    assert type(model) is type(network())


def test_a_gradient_that_overflowed_reaches_the_weights():
    class Overflow(Method):
        def loss_terms(self, run):
            return run.logits.sum() * float("inf")

    model = network()
    history = train(model, DATA, replace(RECIPE, epochs=1), [BackwardSampling(keep=0.5), Overflow()])
    assert history.diverged
    assert not all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "wrong",
    [{"tau": 0.0}, {"keep": 0.0}, {"keep": 1.5}, {"begin": 1.0}, {"multiple": 0}, {"fixed": 1.0}],
    ids=str,
)
def test_wrong_settings_are_named(wrong):
    with pytest.raises(BadInput, match=f"{next(iter(wrong))} is {next(iter(wrong.values()))}"):
        BackwardSampling(**wrong)
    with pytest.raises(BadInput, match="keep and tau"):
        BackwardSampling(keep=0.5, tau=0.1)


def test_what_it_cannot_do_is_refused_and_the_model_left_as_it_was():
    model = network()
    with pytest.raises(BadInput, match="compile"):
        BackwardSampling().on_fit_start(SimpleNamespace(model=model, recipe=Recipe(compile=True)))
    assert type(model) is type(network())
    with pytest.raises(NoEffect, match="none of Sequential"):
        train(
            torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4)),
            DATA,
            RECIPE,
            [BackwardSampling()],
        )


def test_the_information_is_complete():
    assert all(getattr(INFO, f) for f in ("name", "name_de", "chapter", "paper", "claim", "cost_model"))
