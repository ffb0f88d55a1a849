"""A penalty in milliseconds: what goes, in which proportion, and that nothing is cut or upset by it."""

import copy
from dataclasses import replace

import pytest
import torch

from effilib import data, models
from effilib.errors import BadInput
from effilib.methods.group_lasso import group_norms, shrink_
from effilib.methods.pressure import Pressure, norms, parts, strength, survival
from effilib.recipe import Recipe
from effilib.training import train
from tests.common import equal, resumed_and_whole

SHAPE = (1, 8, 8)
DATA = data.synthetic(images=256)
RECIPE = Recipe(epochs=4, batch_size=16, lr=0.1, warmup=0.0, schedule="constant", precision="fp32")


def network(seed=0, widths=(8, 8), blocks=([16], [16])):
    return models.build("resnet", 4, SHAPE, seed=seed, widths=widths, blocks=blocks)


def left(net, before, stage):
    pairs = [(a, b) for a, b in zip(norms(net), before, strict=True) if a[0] == stage]
    return torch.cat([survival(a[1], b[1]) for a, b in pairs]).mean().item()


def gone(net, before, kind):
    """The share of all norms of a kind that has gone, every one weighed by its layer's mean or width."""
    pairs = [(now[kind], first[kind]) for now, first in zip(norms(net), before, strict=True)]
    lost = sum(((b - a).clamp_min(0) / b.mean()).sum() for a, b in pairs)
    return (lost / sum(len(b) for _, b in pairs)).item()


@pytest.mark.parametrize("goes", [0.1, 0.3])
def test_as_much_goes_as_is_asked_for(goes):
    net = network()
    before = norms(net)
    train(net, DATA, RECIPE, [Pressure(goes=goes)])
    assert gone(net, before, 1) == pytest.approx(goes, abs=1e-3)
    assert gone(net, before, 2) == pytest.approx(goes, abs=1e-3)


@pytest.mark.parametrize("keep_scale", [False, True])
def test_the_strength_is_what_shrinks_by_the_share(keep_scale):
    g = torch.Generator().manual_seed(0)
    weights = [torch.rand(5, n, 3, 3, generator=g) * torch.rand(n, 1, 1, generator=g) for n in (6, 20)]
    prices, first = [1.2, 1.0], [group_norms(W, 1) for W in weights]
    kappa = strength(first, first, prices, 0.4, keep_scale)
    for W, price in zip(weights, prices, strict=True):
        shrink_([(W, 1, 1)], kappa * price, keep_scale=keep_scale)
    lost = [
        p * (f - group_norms(W, 1)).clamp_min(0).sum() for p, f, W in zip(prices, first, weights, strict=True)
    ]
    assert sum(lost) / sum(p * f.sum() for p, f in zip(prices, first, strict=True)) == pytest.approx(
        0.4, abs=1e-4
    )
    now = [group_norms(W, 1) for W in weights]
    assert strength(now, first, prices, 0.3, keep_scale) == 0


def test_what_costs_more_goes_first():
    """Stages swap their prices: the dearer one of the two keeps less than when it is cheap."""
    kept = {}
    for first, second in ((4.0, 1.0), (1.0, 4.0)):
        net = network()
        before = norms(net)
        prices = ((first, 16 * first), (second, 16 * second))
        train(net, DATA, RECIPE, [Pressure(prices=prices)])
        kept[first] = [left(net, before, stage) for stage in (0, 1)]
    assert kept[4.0][0] < kept[1.0][0]
    assert kept[4.0][1] > kept[1.0][1]


@pytest.mark.parametrize("seed", [0, 1])
def test_dead_channels_go_and_used_ones_stay(seed):
    """Half of the channels never see an image: no gradient holds the weights that read them."""
    net, used = network(seed, widths=(8,), blocks=([16],)), torch.arange(16) < 8
    bn = net.stages[0][0].bn1
    for p in (bn.weight, bn.bias):
        with torch.no_grad():
            p[8:] = 0
        p.register_hook(lambda g: g * used)
    before = norms(net)
    train(net, DATA, replace(RECIPE, epochs=8), [Pressure(goes=0.4)])
    left = survival(norms(net)[0][1], before[0][1])
    assert left[8:].mean() < left[:8].mean() - 0.1


def test_a_newborn_block_is_left_alone_inside_and_counts_for_nothing():
    net = network(blocks=([16, 8], [16]))
    torch.nn.init.zeros_(net.stages[0][1].bn2.weight)
    other = copy.deepcopy(net)
    for p in (*net.stages[0][1].parameters(), *other.stages[0][1].parameters()):
        p.requires_grad_(False)
    train(net, DATA, RECIPE, [Pressure()])
    assert torch.equal(net.stages[0][1].conv2.weight, other.stages[0][1].conv2.weight)
    assert not torch.equal(net.stages[0][0].conv2.weight, other.stages[0][0].conv2.weight)


def test_a_resumed_run_ends_bit_equal(tmp_path):
    (a, ha), (b, hb) = resumed_and_whole(network, DATA, RECIPE, [Pressure()], tmp_path / "run.pt")
    assert equal(a, b)
    assert ha.events == hb.events


def test_what_cannot_be_priced_is_refused():
    with pytest.raises(BadInput, match="our ResNets"):
        parts(models.build("convnet", 4, SHAPE))
    with pytest.raises(BadInput, match="2 stages need a price"):
        train(network(), DATA, RECIPE, [Pressure(prices=((1.0, 1.0),))])
    with pytest.raises(BadInput, match="goes"):
        Pressure(goes=1.0)
