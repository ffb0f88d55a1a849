"""The wavelet-like auto-encoder: shapes, stages, what is trained when, energy and reconstruction."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from effilib.data import synthetic
from effilib.dataset import Split
from effilib.errors import BadInput
from effilib.hooks import Method
from effilib.methods.wavelet_auto_encoder import WAE, WaveletAutoEncoder, energy_share
from effilib.recipe import Recipe
from effilib.training import train

DATA = synthetic(images=300)
LONGER = Recipe(epochs=30, batch_size=32, lr=0.05, precision="fp32")
RECIPE = Recipe(epochs=6, batch_size=32, lr=0.05, precision="fp32")


def smooth(dataset):
    """The same with pixels that come in equal 2 x 2: half the resolution holds all."""

    def pairs(split):
        return Split(x=split.x[:, ::2, ::2].repeat_interleave(2, 1).repeat_interleave(2, 2), y=split.y)

    return replace(
        dataset, pad=0, **{n: pairs(getattr(dataset, n)) for n in ("train", "decide", "validation", "test")}
    )


def trunk(width):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return WAE(1, 4, trunk(16), trunk(4), (16, 4))


class Watch(Method):
    """Which parts have moved, per stage."""

    def on_fit_start(self, run):
        self.copy(run)
        run.moved = {}

    def copy(self, run):
        run.before = {n: p.detach().clone() for n, p in run.model.named_parameters()}

    def on_batch(self, run, x, y):
        run.now = run.model.stage
        self.copy(run)
        return x, y

    def on_step_end(self, run):
        moved = {
            n.split(".")[0] for n, p in run.model.named_parameters() if not torch.equal(p, run.before[n])
        }
        run.moved.setdefault(run.now, set()).update(moved)

    def on_fit_end(self, run):
        run.log(self, "moved", moved={k: sorted(v) for k, v in run.moved.items()})


@pytest.mark.parametrize("size", [(8, 8), (7, 9)], ids=str)
def test_shapes(size):
    model, x = network(), torch.rand(3, 1, *size)
    assert model(x).shape == (3, 4)
    I_L, I_H = model.images(x)
    assert I_L.shape == I_H.shape == (3, 1, -(-size[0] // 2), -(-size[1] // 2))
    assert model.reconstruct(I_L, I_H, size).shape == x.shape
    reconstruction, energy = model.terms
    assert reconstruction.item() == pytest.approx(
        (model.reconstruct(I_L, I_H, size) - x).square().mean().item(), rel=1e-5
    )
    assert energy.item() == pytest.approx(I_H.square().mean().item(), rel=1e-5)
    assert model.eval()(x).shape == (3, 4)


def test_the_score_is_the_sum_of_both_classifiers():
    model, x = network().eval(), torch.rand(3, 1, 8, 8)
    I_L, I_H = model.norm(model.encoder(x)).chunk(2, 1)
    F_L, F_H = model.low(I_L), model.high(I_H)
    assert torch.allclose(model(x), model.head_low(F_L) + model.head_both(torch.cat([F_L, F_H], 1)))


def test_each_stage_trains_its_part():
    settings = RECIPE.__class__(
        epochs=6, batch_size=32, lr=0.05, precision="fp32", weight_decay=0.0, momentum=0.0
    )
    history = train(
        network(), DATA, settings, [WaveletAutoEncoder(stages=(0.3, 0.3, 0.4)), Watch()], evaluations=1
    )
    moved = next(e["moved"] for e in history.events if "moved" in e)
    assert moved["encoder"] == ["decode_high", "decode_low", "encoder"]
    assert moved["classifier"] == ["head_both", "head_low", "high", "low", "norm"]
    assert moved["joint"] == sorted(moved["encoder"] + moved["classifier"])
    assert [e["stage"] for e in history.events if "stage" in e] == ["classifier", "joint"]


def test_energy_moves_into_the_low_image_and_the_picture_comes_back():
    results, data = {}, smooth(DATA)
    for lam in (0.0, 1.0):
        history = train(network(), data, LONGER, [WaveletAutoEncoder(lam=lam, gamma=1.0)], evaluations=1)
        results[lam] = next(e for e in history.events if "energy_share" in e)
    assert results[1.0]["energy_share"] < 0.5 * results[0.0]["energy_share"]
    assert results[1.0]["energy_share"] < 0.2
    before = energy_share(network(), data.normalize(data.decide.x))[1]
    assert results[1.0]["snr"] > before + 3
    assert history.accuracy > 60


def test_stages_cost_what_they_compute():
    joint, staged = (
        train(network(), DATA, RECIPE, [WaveletAutoEncoder(stages=s)], evaluations=1).flops
        for s in ((0, 0, 1.0), (0.5, 0.5, 0.0))
    )
    assert staged < joint


def test_it_trains_in_double_precision():
    recipe = replace(RECIPE, epochs=0.5, precision="fp64")
    history = train(network(), DATA, recipe, [WaveletAutoEncoder()], evaluations=1)
    assert 0 < history.events[-1]["energy_share"] < 1


def test_bad_settings_and_other_networks_are_errors():
    with pytest.raises(BadInput, match="not a WAE"):
        train(nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten()), DATA, RECIPE, [WaveletAutoEncoder()])
    with pytest.raises(BadInput, match="three shares"):
        train(network(), DATA, RECIPE, [WaveletAutoEncoder(stages=(0.5, 0.2, 0.1))])


def test_the_first_stage_holds_at_the_learning_rate_of_the_classifier():
    settings = RECIPE.__class__(epochs=10, batch_size=32, lr=0.4, warmup=0.2, precision="fp32")
    history = train(network(), DATA, settings, [WaveletAutoEncoder(stages=(0.5, 0.3, 0.2))], evaluations=1)
    assert not history.diverged
    assert history.events[-1]["snr"] > energy_share(network(), DATA.normalize(DATA.decide.x))[1]
