"""Layer replacement: candidates' shapes and products, damage against oracles, the knapsack, the guard, and
plans that replay.
"""

import copy
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effilib import cost, models, paths
from effilib.errors import BadInput, NoEffect
from effilib.methods import layer_replacement as lr
from effilib.methods.layer_replacement import (
    CANDIDATES,
    ORIGINAL,
    LayerReplacement,
    Replacement,
    Setting,
    Site,
    factors,
    fisher_potential,
    fits,
    guard,
    knapsack,
    parts,
    pick,
    potentials,
    replace_,
    replacement,
    say,
    sites,
    spectral,
    survey,
    swap_,
)
from effilib.tasks import task

TASK = task("smoke", "synthetic", widths={"widths": (16, 16), "blocks": (1, 1)})
DATA = TASK.load()
QUICK = Setting(repeats=3, seconds=1.0)


def g(seed=0):
    return torch.Generator().manual_seed(seed)


def network():
    return models.build("resnet", 4, (1, 8, 8), seed=1, widths=(16, 16), blocks=(1, 1))


def batch(n=8, size=8, channels=1):
    return torch.randn(n, channels, size, size, generator=g(2)), torch.arange(n) % 4


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFILIB_RESULTS", str(tmp_path))


SITES = {
    "square": Site(C=16, O=16, kernel=(3, 3), stride=(1, 1), padding=(1, 1), N=2, H=9, W=7),
    "strided, wider, bias": Site(
        C=16, O=32, kernel=(3, 3), stride=(2, 2), padding=(1, 1), bias=True, N=2, H=9, W=9
    ),
    "5 x 3, narrower": Site(C=24, O=16, kernel=(5, 3), stride=(2, 1), padding=(2, 1), N=2, H=8, W=8),
}


def conv_of(site, seed=0):
    conv = nn.Conv2d(site.C, site.O, site.kernel, site.stride, site.padding, bias=site.bias)
    with torch.no_grad():
        for p in conv.parameters():
            p.copy_(torch.randn(p.shape, generator=g(seed)) / math.sqrt(site.C * 9))
    return conv


# Candidates


@pytest.mark.parametrize("site", SITES.values(), ids=SITES)
@pytest.mark.parametrize("candidate", CANDIDATES)
def test_a_candidate_keeps_the_shape_and_does_the_products_that_it_says(candidate, site):
    x = torch.randn(site.N, site.C, site.H, site.W, generator=g())
    module, conv = replacement(candidate, site, g()), conv_of(site)
    assert module(x).shape == conv(x).shape
    assert (module.in_channels, module.out_channels) == (site.C, site.O)
    assert cost.count_flops(lambda: module(x)) == site.flops(candidate)
    assert cost.count_flops(lambda: conv(x)) == site.flops()
    assert fits(candidate, site)
    biases = [m.bias is not None for m in module if isinstance(m, nn.Conv2d)]
    assert biases == [False] * (len(biases) - 1) + [site.bias]


def test_products_by_hand():
    site = Site(C=64, O=64, kernel=(3, 3), stride=(1, 1), padding=(1, 1), N=1, H=1, W=1)
    ratio = {c: site.flops() / site.flops(c) for c in CANDIDATES}
    C2 = 64 * 64
    assert ratio["dwsep"] == 9 * C2 / (9 * 64 + C2)
    assert ratio["group/4"] == 9 / (9 / 4 + 1)
    assert ratio["bneck/4"] == 9 / (1 / 4 + 9 / 16 + 1 / 4)
    assert ratio["lowrank/4"] == 9 / (9 / 4 + 1 / 4)
    assert ratio["spatial/2"] == 3


def test_batchnorm_and_relu_stand_between_the_parts_that_are_not_a_factorisation():
    site = SITES["square"]
    kinds = {c: [type(m).__name__ for m in replacement(c, site, g())] for c in CANDIDATES}
    assert kinds["dwsep"] == ["Conv2d", "BatchNorm2d", "ReLU", "Conv2d"]
    assert kinds["bneck/2"] == ["Conv2d", "BatchNorm2d", "ReLU"] * 2 + ["Conv2d"]
    assert kinds["lowrank/2"] == kinds["spatial/2"] == ["Conv2d", "Conv2d"]
    assert [type(m).__name__ for m in replacement("dwsep", site, g(), norm=False)] == [
        "Conv2d",
        "ReLU",
        "Conv2d",
    ]


def test_candidates_that_do_not_fit_or_are_unknown():
    assert not fits("group/5", SITES["square"])
    assert not fits("group/1", SITES["square"])  # more products than the original
    with pytest.raises(BadInput, match="unknown candidate 'dwsepp'"):
        parts("dwsepp", SITES["square"])
    with pytest.raises(BadInput, match="group/5 does not fit 16 -> 16"):
        parts("group/5", SITES["square"])


def test_weights_come_from_the_generator_alone():
    site = SITES["square"]
    before = torch.get_rng_state()
    a, b, c = (replacement("bneck/2", site, g(s)).state_dict() for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["0.weight"], c["0.weight"])


def test_outputs_have_about_the_spread_of_the_originals():
    """He: each part keeps the variance, whatever the candidate, so that potentials can be compared."""
    site = Site(C=64, O=64, kernel=(3, 3), stride=(1, 1), padding=(1, 1))
    x = torch.randn(16, 64, 12, 12, generator=g())
    for c in (ORIGINAL, *CANDIDATES):
        assert 0.5 < float(replacement(c, site, g())(x).detach()[..., 2:-2, 2:-2].std()) / 2**0.5 < 1.5, c


# Damage


@pytest.mark.parametrize("site", SITES.values(), ids=SITES)
@pytest.mark.parametrize(
    "candidate", ["lowrank/2", "lowrank/4", "spatial/2", "group/4", "group/8", "dwsep", "bneck/2"]
)
def test_a_factorisation_errs_by_its_spectral_tail_on_white_noise(candidate, site):
    """Without borders the relative error on white noise is that of the filters, ||W - W'|| / ||W||: read them
    off by an impulse.
    """
    conv = conv_of(site)
    module = replacement(candidate, site, conv=conv)
    kh, kw = site.kernel
    impulse = torch.zeros(site.C, site.C, 2 * kh - 1, 2 * kw - 1)
    impulse[torch.arange(site.C), torch.arange(site.C), kh - 1, kw - 1] = 1
    bare = [copy.deepcopy(m) for m in [*module, conv]]
    for m in bare:
        m.stride, m.padding, m.bias = (1, 1), (0, 0), None
    W = bare[-1](impulse)
    rebuilt = nn.Sequential(*bare[:-1])(impulse)
    error = float((W - rebuilt).detach().norm() / W.detach().norm())
    assert error == pytest.approx(spectral(conv.weight, candidate), rel=1e-4)
    assert 0.05 < error < 1


@pytest.mark.parametrize("candidate", ["lowrank/1", "spatial/1", "group/1", "bneck/1"])
def test_at_full_rank_a_factorisation_is_the_convolution(candidate):
    site = Site(C=8, O=6, kernel=(3, 3), stride=(2, 2), padding=(1, 1), bias=True)
    site = (
        site
        if candidate != "spatial/1"
        else Site(C=2, O=6, kernel=(3, 3), stride=(2, 2), padding=(1, 1), bias=True)
    )
    conv, x = conv_of(site), torch.randn(3, site.C, 9, 9, generator=g())
    torch.testing.assert_close(replacement(candidate, site, conv=conv)(x), conv(x), rtol=1e-4, atol=1e-5)
    assert spectral(conv.weight, candidate) < 1e-3


def test_a_filter_bank_of_low_rank_loses_nothing():
    W = torch.einsum(
        "or,rcij->ocij", torch.randn(16, 4, generator=g()), torch.randn(4, 8, 3, 3, generator=g(1))
    )
    assert spectral(W, "lowrank/4") < 1e-3 < spectral(W, "lowrank/8")
    separable = torch.einsum(
        "oc,cij->ocij", torch.randn(16, 8, generator=g()), torch.randn(8, 3, 3, generator=g(1))
    )
    assert spectral(separable, "dwsep") < 1e-3 < spectral(separable, "spatial/2")
    assert spectral(W, ORIGINAL) == 0
    assert len(factors(W, "bneck/2")) == 3


def test_the_fisher_potential_is_that_of_a_slow_loop():
    A, dA = torch.randn(3, 4, 5, 5, generator=g()), torch.randn(3, 4, 5, 5, generator=g(1))
    slow = sum(0.5 * sum(float((A[n, k] * dA[n, k]).sum()) ** 2 for n in range(3)) / 3 for k in range(4))
    assert fisher_potential(A, dA) == pytest.approx(slow, rel=1e-5)
    assert fisher_potential(A, torch.zeros_like(A)) == 0


def test_potentials_are_taken_at_the_layers_of_the_network():
    model, (x, y) = network().train(), batch()
    outputs = {}
    model.stages[0][0].conv2.register_forward_hook(lambda m, i, out: outputs.update(a=out))
    F.cross_entropy(model(x), y).backward(inputs=list(model.parameters()), retain_graph=True)
    loss = F.cross_entropy(model(x), y)
    expected = fisher_potential(outputs["a"], torch.autograd.grad(loss, outputs["a"])[0])
    found = potentials(
        copy.deepcopy(network()).train(),
        ["stages.0.0.conv2", "stem"],
        x,
        y,
        lambda: torch.autocast("cpu", enabled=False),
    )
    assert found["stages.0.0.conv2"] == pytest.approx(expected, rel=1e-4)
    assert found["stem"] > 0


# The knapsack


def total(values, picks):
    return sum(v[c] for v, c in zip(values, picks, strict=True))


layers = st.lists(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 9)), min_size=1, max_size=4), min_size=1, max_size=4
)


@settings(max_examples=200, deadline=None)
@given(layers, st.integers(1, 120))
def test_the_knapsack_is_the_best_of_all(rows, limit):
    seconds, damages = [[t for t, _ in r] for r in rows], [[d for _, d in r] for r in rows]
    options = [p for p in itertools.product(*(range(len(r)) for r in rows)) if total(seconds, p) <= limit]
    if not options:
        with pytest.raises(BadInput, match="no choice of layers fits"):
            knapsack(seconds, damages, limit, 1 / limit)
        return
    picks = knapsack(seconds, damages, limit, 1 / limit)  # bins of 1: nothing is rounded
    assert tuple(picks) in options
    assert total(damages, picks) == min(total(damages, p) for p in options)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.floats(0.01, 1), min_size=1, max_size=4), min_size=1, max_size=4), st.floats(0.5, 3)
)
def test_costs_are_rounded_up_so_that_the_limit_holds(seconds, limit):
    damages = [list(range(len(s))) for s in seconds]
    try:
        picks = knapsack(seconds, damages, limit)
    except BadInput:
        assert sum(map(min, seconds)) > limit * (1 - 0.005 * len(seconds)) - 1e-9
        return
    assert total(seconds, picks) <= limit * (1 + 1e-6)


def test_of_equal_damages_the_earlier_candidate_is_taken():
    assert knapsack([[5, 3, 1]], [[1.0, 0.0, 0.0]], 4) == [1]


# The network


def test_the_stem_and_what_cannot_be_replaced_are_named():
    model, (x, _) = network(), batch()
    found, left = sites(model, x)
    assert list(found) == ["stages.0.0.conv1", "stages.0.0.conv2", "stages.1.0.conv1", "stages.1.0.conv2"]
    assert found["stages.1.0.conv1"] == Site(
        C=16, O=16, kernel=(3, 3), stride=(2, 2), padding=(1, 1), N=8, H=8, W=8
    )
    assert left == {"stem": "the stem", "stages.1.0.shortcut.0": "1 x 1"}


class Odd(nn.Module):
    """Convolutions of all kinds that are left alone."""

    def __init__(self):
        super().__init__()
        self.stem, self.twice, self.never = (nn.Conv2d(c, 8, 3, padding=1) for c in (1, 8, 8))
        self.dilated, self.grouped = (
            nn.Conv2d(8, 8, 3, padding=2, dilation=2),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
        )
        self.up, self.wrapped = (
            nn.ConvTranspose2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
        )
        self.path, self.other, self.tiny = (
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 1, 3),
        )

    def forward(self, x):
        x = self.twice(self.twice(self.stem(x)))
        x = self.wrapped(self.up(self.grouped(self.dilated(x))))
        x = torch.relu(self.path(x)) + self.other(x)
        return self.tiny(x).flatten(1)[:, :4]


def test_every_reason_to_leave_a_layer_alone():
    found, left = sites(Odd(), torch.zeros(2, 1, 8, 8))
    assert set(found) == {"path", "other"}
    assert left["stem"] == "the stem"
    assert left["tiny"] == "no candidate does fewer products"
    assert left["twice"] == "it is used more than once"
    assert left["never"] == "it is not called in the forward pass"
    assert left["dilated"] == "it is dilated"
    assert left["grouped"] == "it is grouped already"
    assert left["up"] == "it is a ConvTranspose2d"
    assert left["wrapped"] == "its padding is circular"


def test_a_strided_convolution_on_a_shortcut_is_left_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b = (nn.Conv2d(c, 16, 3, s, 1) for c, s in ((1, 1), (16, 2), (16, 1)))
            self.strided = nn.Conv2d(16, 16, 3, 2, 1)
            self.head = nn.Linear(16, 4)

        def forward(self, x):
            x = torch.relu(self.stem(x))
            return self.head((self.b(torch.relu(self.a(x))) + self.strided(x)).mean((2, 3)))

    found, left = sites(Net(), torch.zeros(2, 1, 8, 8))
    assert list(found) == ["a", "b"]
    assert left["strided"] == "on a shortcut"


@pytest.mark.parametrize(
    ("name", "n"), [("torchvision.models:resnet18", 16), ("torchvision.models:vgg11_bn", 7)]
)
def test_torchvisions_networks_are_replaced_and_still_train(name, n):
    model = models.build(name, 4, (3, 32, 32)).train()
    x, y = batch(2, 32, 3)
    found, left = sites(model, x)
    assert len(found) == n
    assert {left[k] for k in left} <= {"the stem", "1 x 1"}
    plan = {"layers": {k: CANDIDATES[i % len(CANDIDATES)] for i, k in enumerate(found)}, "norm": True}
    before = cost.count_flops(lambda: model(x))
    assert replace_(model, plan) == list(found)
    assert cost.count_flops(lambda: model(x)) < before / 1.2
    F.cross_entropy(model(x), y).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_plan_replays_to_the_same_weights():
    plan = {"layers": {"stages.0.0.conv1": "dwsep", "stages.1.0.conv1": "lowrank/4"}, "norm": True}
    a, b, c = network(), network(), network()
    replace_(a, plan, 3)
    replace_(b, json.loads(json.dumps(plan)), 3)
    replace_(c, plan, 4)
    assert isinstance(a.stages[0][0].conv1, Replacement)
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(
        torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )
    assert not torch.equal(a.stages[0][0].conv1[0].weight, c.stages[0][0].conv1[0].weight)
    assert models.describe(a)["blocks"] == [[16], [16]]


def test_a_trained_layers_factorisation_takes_its_weights():
    model, (x, _) = network().eval(), batch()
    exact, plan = model(x), {"layers": {"stages.0.0.conv1": "lowrank/1"}, "norm": True}
    drawn, taken = copy.deepcopy(model), copy.deepcopy(model)
    replace_(drawn, plan)
    replace_(taken, plan, trained=True)
    assert (taken(x) - exact).abs().max() < 1e-4 < (drawn(x) - exact).abs().max()


def test_plans_that_do_not_fit_are_refused():
    with pytest.raises(NoEffect, match="replaces no layer"):
        replace_(network(), {"layers": {}, "norm": True})
    for name in ("stages.9", "head"):
        with pytest.raises(BadInput, match=f"the plan replaces {name}, which is no plain convolution"):
            replace_(network(), {"layers": {name: "dwsep"}, "norm": True})


# Survey, choice, guard


def test_the_survey_tells_all_and_leaves_the_network_as_it_was():
    model, (x, y) = network(), batch()
    before = copy.deepcopy(model.state_dict())
    found = survey(model, x, y, QUICK)
    assert json.loads(json.dumps(found)) == found
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(isinstance(m, Replacement) for m in model.modules())
    assert list(found["layers"]) == list(sites(model, x)[0])
    for choices in found["layers"].values():
        assert list(choices) == [ORIGINAL, *CANDIDATES]
        assert choices[ORIGINAL]["damage"] == 0
        assert all(v["seconds"] > 0 and 0 <= v["damage"] <= 1 for v in choices.values())
    assert any(v["damage"] > 0 for choices in found["layers"].values() for v in choices.values())
    assert found["step"] > 0


def test_the_spectral_survey_scores_the_weights():
    model, (x, y) = network(), batch()
    found = survey(model, x, y, QUICK, score="spectral", candidates=("lowrank/4",))
    for name, choices in found["layers"].items():
        assert choices["lowrank/4"]["damage"] == spectral(model.get_submodule(name).weight, "lowrank/4")
    with pytest.raises(BadInput, match="unknown damage score 'fischer'"):
        survey(model, x, y, QUICK, score="fischer")


def test_latencies_are_kept_by_shape_and_charged_again():
    model, (x, y) = network(), batch()
    first = survey(model, x, y, QUICK)
    kept = sorted((paths.cache() / "latency").glob("*.json"))
    assert len(kept) == 3  # the four layers have three shapes
    again = survey(model, x, y, QUICK)
    assert first["cached"] == 0 < again["cached"]
    assert [{c: v["seconds"] for c, v in s.items()} for s in first["layers"].values()] == [
        {c: v["seconds"] for c, v in s.items()} for s in again["layers"].values()
    ]
    survey(model, *batch(4), QUICK)
    assert len(list((paths.cache() / "latency").glob("*.json"))) == 6


def test_a_network_without_such_layers_is_refused_with_the_reasons():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4))
    with pytest.raises(NoEffect, match=r"Sequential has no layer that can be replaced \(0: the stem\)"):
        survey(model, *batch(), QUICK)


def made_up(times=(4.0, 2.0, 1.0), damages=(0.0, 1.0, 3.0), layers=2, rest=2.0):
    choices = {
        c: {"seconds": t, "damage": d, "flops": 1}
        for c, t, d in zip((ORIGINAL, "group/4", "dwsep"), times, damages, strict=True)
    }
    table = {str(i): choices for i in range(layers)}
    return {"layers": table, "step": layers * times[0] + rest, "norm": True, "score": "fisher", "cached": 0}


def test_the_budget_is_one_of_the_whole_step():
    plan = pick(made_up(), 0.6)  # of 10: 2 stay, so that 4 are left for two layers
    assert plan["layers"] == {"0": "group/4", "1": "group/4"}
    assert plan["foreseen"] == pytest.approx(0.6)
    assert plan["note"] == ""
    assert pick(made_up(), 0.85)["layers"] in ({"0": "group/4"}, {"1": "group/4"})


def test_a_budget_out_of_reach_takes_the_fastest_and_says_so():
    plan = pick(made_up(), 0.2)
    assert plan["layers"] == {"0": "dwsep", "1": "dwsep"}
    assert (
        plan["note"]
        == "a budget of 0.2 cannot be reached: with the fastest layers 0.40 of the step is left; they were "
        "taken"
    )
    for budget in (0, 1, 1.5, -1):
        with pytest.raises(BadInput, match="a share of the step's time"):
            pick(made_up(), budget)


def test_a_candidate_that_is_slower_is_never_taken():
    assert pick(made_up(times=(4.0, 5.0, 6.0)), 0.5)["layers"] == {}


def test_the_guard_takes_back_what_does_not_pay():
    model = models.build("vgg", 4, (1, 24, 24), seed=0, widths=((64, 64, 64),))
    x, y = batch(16, 24)
    names = list(sites(model, x)[0])
    setting = Setting(repeats=5)
    before = copy.deepcopy(model.state_dict())
    plan = {
        "layers": {names[0]: "bneck/4", names[1]: "group/1"},
        "norm": True,
        "foreseen": 0.5,
        "note": "",
    }  # group/1 costs more
    found = guard(model, plan, x, y, setting)
    assert found["layers"] == {names[0]: "bneck/4"}
    assert found["reverted"] == {names[1]: "group/1"}
    assert 0.2 < found["measured"] < 0.95
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    nothing = guard(model, {**plan, "layers": {names[1]: "group/1"}}, x, y, setting)
    assert (nothing["layers"], nothing["measured"]) == ({}, 1.0)
    assert "nothing replaced" in say(nothing)
    assert guard(model, {**plan, "layers": {}}, x, y, setting)["measured"] == 1.0
    assert guard(model, plan, x, y, setting, least=0.99)["layers"] == {}


def test_swapping_gives_back_what_stood_there():
    model = network()
    old, new = model.stages[0][0].conv1, nn.Identity()
    assert swap_(model, "stages.0.0.conv1", new) is old
    assert swap_(model, "stages.0.0.conv1", old) is new
    assert model.stages[0][0].conv1 is old


# Training


def test_the_arm_searches_on_the_clock_and_its_plan_replays(monkeypatch):
    plan = {
        "layers": {"stages.0.0.conv1": "dwsep"},
        "reverted": {},
        "norm": True,
        "foreseen": 0.6,
        "measured": 0.6,
        "note": "",
    }
    monkeypatch.setattr(
        lr, "guard", lambda *args, **kwargs: plan
    )  # so small a network is too noisy to decide on
    found = LayerReplacement(repeats=3)(TASK, 0)
    assert found.kinds["search"]["count"] == 1
    assert found.rows[0]["seconds"] >= found.kinds["search"]["seconds"] > 0
    assert found.seconds > found.kinds["search"]["seconds"] + 0.5 * found.kinds["step"]["seconds"]
    event = next(e for e in found.events if "plan" in e)
    assert event["plan"] == plan
    assert found.structure["replaced"] == plan["layers"]
    again = LayerReplacement(plan=json.dumps(plan))(TASK, 0)
    assert "search" not in again.kinds
    assert [r["loss"] for r in again.rows] == [r["loss"] for r in found.rows]
    assert again.flops == found.flops
