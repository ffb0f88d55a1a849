"""Candidates for a convolution's place: shapes and products, what they hold of its filters."""

import copy
import math

import pytest
import torch
from torch import nn

from effilib import cost
from effilib.errors import BadInput
from effilib.methods.layer_candidates import (
    CANDIDATES,
    ORIGINAL,
    Site,
    factors,
    fits,
    parts,
    replacement,
    spectral,
)


def g(seed=0):
    return torch.Generator().manual_seed(seed)


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


def test_a_replacement_stays_out_of_the_kernel_that_writes_past_its_memory():
    site = Site(C=4, O=8, kernel=(1, 1), stride=(2, 2), padding=(0, 0))
    layer = replacement("conv", site).to(memory_format=torch.channels_last)
    x = torch.zeros(32, 4, 8, 8).to(memory_format=torch.channels_last)
    assert layer(x).is_contiguous()  # what it computed in
