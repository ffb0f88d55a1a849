"""Whitening stem: filters against the covariance of their own answers, frozen, plain again, resumed."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from effilib import models
from effilib.data import synthetic
from effilib.errors import BadInput, NoEffect
from effilib.hooks import Method
from effilib.inspection import cut_patches
from effilib.methods.whitening import Whitening, unshift_, whiten_stem_, whitening_filters
from effilib.recipe import Recipe
from effilib.training import train
from tests.common import equal, g, resumed_and_whole

DATA = synthetic(images=300)
RECIPE = Recipe(epochs=2, batch_size=32, lr=0.05, precision="fp32")
METHOD = Whitening(patches=2000)


def network(name="resnet", seed=0):
    settings = dict(widths=(8, 8), blocks=(1, 1)) if name == "resnet" else dict(widths=(8, 8))
    return models.build(name, 4, (1, 8, 8), seed=seed, **settings)


def test_answers_are_uncorrelated_and_of_unit_variance():
    mix = torch.randn(6, 6, generator=g(1), dtype=torch.float64)
    patches = torch.randn(5000, 6, generator=g(0), dtype=torch.float64) @ mix
    w = whitening_filters(patches, 12, eps=1e-12)
    answers = (patches - patches.mean(0)) @ w[::2].T
    assert torch.allclose(answers.T @ answers / len(answers), torch.eye(6, dtype=torch.float64), atol=1e-8)
    assert torch.equal(w[1::2], -w[::2])


def test_eps_bounds_what_noise_becomes():
    patches = torch.randn(4000, 2, generator=g(0), dtype=torch.float64) * torch.tensor([1.0, 1e-4])
    variance = (patches @ whitening_filters(patches, 4, eps=1e-2)[2:].T).var(0)
    assert (variance < 1e-5).all()
    assert (whitening_filters(patches, 4, eps=1e-2).norm(dim=1) <= 10.01).all()


@pytest.mark.parametrize("filters", [1, 3, 4, 9])
def test_any_number_of_filters(filters):
    patches = torch.randn(3000, 2, generator=g(0))
    w = whitening_filters(patches, filters, generator=g(1))
    assert w.shape == (filters, 2)
    assert w.isfinite().all()
    many = whitening_filters(patches, 4000, generator=g(1))[4:]
    assert (patches @ many.T).var().item() == pytest.approx(1, rel=0.1)


def test_flat_images_are_no_error():
    assert whitening_filters(torch.ones(100, 4), 8).isfinite().all()


def test_stem_is_frozen_and_its_norm_adds_a_bias():
    net, x = network(), torch.randn(64, 1, 8, 8, generator=g(0))
    assert whiten_stem_(net, x, g(1)) == ("stem", "bn")
    y = net.train().bn(net.stem(x))
    assert torch.equal(y, net.stem(x))
    assert net.bn.running_mean.abs().sum() == 0
    patches = cut_patches(x, net.stem, 10**6, g(2))
    # 0.5: eight filters of nine directions, from patches with zeros of the padding
    assert (patches @ net.stem.weight.detach().flatten(1).T).var(0).sub(1).abs().max() < 0.5
    net(x).sum().backward()
    assert net.stem.weight.grad is None
    assert net.bn.weight.grad is None
    assert net.bn.bias.grad is not None


def test_plain_again_it_computes_the_same():
    net, x = network(), torch.randn(64, 1, 8, 8, generator=g(0))
    whiten_stem_(net, x, g(1))
    net.bn.bias.data.normal_(generator=g(2))
    before = net.eval()(x)
    assert unshift_(net) == 1
    assert type(net.bn) is nn.BatchNorm2d
    assert torch.allclose(net(x), before, atol=1e-4)


@dataclass(frozen=True)
class Look(Method):
    """Keep what the filters were at the start."""

    seen: list = field(default_factory=list, compare=False)

    def on_fit_start(self, run):
        self.seen.append({name: t.clone() for name, t in run.model.state_dict().items()})


def test_training_changes_all_but_the_filters():
    net, look = network(), Look()
    train(net, DATA, RECIPE, [METHOD, look])
    assert all(p.requires_grad for p in net.parameters())
    assert type(net.bn) is nn.BatchNorm2d
    assert torch.equal(net.stem.weight, look.seen[0]["stem.weight"])
    assert not torch.equal(net.bn.bias, look.seen[0]["bn.bias"])
    assert not torch.equal(net.stem.weight, network().stem.weight)


def test_the_control_is_frozen_as_initialised_in_front_of_its_norm():
    net, look = network(), Look()
    train(net, DATA, RECIPE, [Whitening(structure="random"), look])
    assert torch.equal(net.stem.weight, network().stem.weight)
    assert not torch.equal(net.bn.weight, network().bn.weight)


def test_resumed_run_is_the_whole_run(tmp_path):
    (resumed, _), (whole, _) = resumed_and_whole(network, DATA, RECIPE, [METHOD], tmp_path / "run.pt")
    assert equal(resumed, whole)


def test_a_network_without_convolutions():
    with pytest.raises(NoEffect, match="no convolution"):
        train(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), DATA, RECIPE, [METHOD])


def test_settings_are_checked():
    with pytest.raises(BadInput, match="eps is 0, it must be above 0"):
        Whitening(eps=0)
    grey = torch.randn(100, 1, generator=g(0)).expand(-1, 3)
    with pytest.raises(BadInput, match="eps is 0"):
        whitening_filters(grey, 6, eps=0)
    assert whitening_filters(grey, 6).norm(dim=1).max() < 50


@pytest.mark.parametrize("structure", ["whitening", "random"])
def test_filters_that_the_user_froze_are_refused_and_a_frozen_norm_stays(structure):
    net, method = network(), Whitening(patches=2000, structure=structure)
    net.stem.weight.requires_grad_(False)
    with pytest.raises(BadInput, match="the filters of stem are frozen already"):
        train(net, DATA, RECIPE, [method])
    assert torch.equal(net.stem.weight, network().stem.weight)
    net.requires_grad_(True).bn.requires_grad_(False)
    train(net, DATA, RECIPE, [method])
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == ["bn.weight", "bn.bias"]
