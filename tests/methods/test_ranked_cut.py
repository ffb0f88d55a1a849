"""One cut by ranking: blocks, prices, looks that agree, and what a run does with them."""

import itertools

import pytest
import torch
from torch import nn

from effilib import cost, models, surgery
from effilib.errors import BadInput, NoEffect
from effilib.hooks import Method
from effilib.methods.ranked_cut import RankedCut, block_prices, distance, masks
from effilib.methods.speed_run import FastBiases
from effilib.recipe import Recipe
from effilib.tasks import task
from effilib.training import train
from tests.common import equal, resumed_and_whole

DATA = task("smoke", "synthetic").load()
RECIPE = Recipe(epochs=5, batch_size=16, lr=0.05, precision="fp32")
CUT = RankedCut(multiple=2, price="FLOPs", share=0.4)


def network(**kwargs):
    return models.build("resnet", 4, (1, 8, 8), **{"widths": (8, 8), "blocks": (1, 1), **kwargs})


def test_the_masks_are_the_best_of_all_choices_of_blocks():
    """Against every subset of blocks that costs as much: none that goes is worth more per price."""
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = {name: torch.rand(6, generator=g) for name in "ab"}
        prices = {"a": 1.0, "b": 1.0}
        kept = masks(scores, prices, share=4 / 12, multiple=2)
        gone = sum(float(scores[n][~kept[n]].sum()) for n in "ab")
        assert sum(int((~kept[n]).sum()) for n in "ab") == 4
        blocks = [b for n in "ab" for b in scores[n].sort(descending=True).values.split(2)[1:]]
        best = min(sum(float(b.sum()) for b in pair) for pair in itertools.combinations(blocks, 2))
        assert gone == pytest.approx(best)


def test_a_dear_node_goes_before_a_cheap_one_of_equal_worth():
    scores = {"dear": torch.ones(4), "cheap": torch.ones(4)}
    kept = masks(scores, {"dear": 3.0, "cheap": 1.0}, share=0.5, multiple=2)
    assert {n: int(k.sum()) for n, k in kept.items()} == {"dear": 2, "cheap": 2}
    kept = masks(scores, {"dear": 3.0, "cheap": 1.0}, share=0.4, multiple=2)
    assert {n: int(k.sum()) for n, k in kept.items()} == {"dear": 2, "cheap": 4}
    kept = masks(scores, {"dear": 3.0, "cheap": 1.0}, share=1.0, multiple=2)
    assert {n: int(k.sum()) for n, k in kept.items()} == {"dear": 2, "cheap": 2}  # one block stays


def test_the_distance_is_the_share_that_differs():
    a = {"x": torch.tensor([True, True, False, False]), "y": torch.tensor([True] * 4)}
    b = {"x": torch.tensor([True, False, True, False]), "y": torch.tensor([True] * 4)}
    assert distance(a, b) == distance(b, a) == 2 / 8
    assert distance(a, a) == 0


def test_prices_are_what_a_block_less_saves():
    model, x = network(), torch.zeros(2, 1, 8, 8)
    nodes = surgery.nodes(model)
    before = sum(3 * c.flops for c in cost.layers(model, x).values())
    for node in nodes:
        price = block_prices(nodes, x, multiple=2, price="FLOPs")[node.name]
        smaller = network()
        surgery.select_(surgery.trace(smaller)[node.name], range(6))
        after = sum(3 * c.flops for c in cost.layers(smaller, x).values())
        assert 2 * price == before - after


def test_measured_prices_are_milliseconds_of_a_step():
    nodes = surgery.nodes(models.build("vgg", 4, (3, 16, 16), widths=((16, 64), (64,))))
    found = block_prices(nodes, torch.zeros(8, 3, 16, 16), multiple=16, seconds=0.3)
    assert set(found) == {n.name for n in nodes}
    assert all(0 <= ms < 100 for ms in found.values())
    assert sum(found.values()) > 0


class Gradients(Method):
    """Notes |gamma dL/dgamma| by itself, at every step."""

    def on_fit_start(self, run):
        run.state[self] = {"sum": torch.zeros(8)}

    def on_after_backward(self, run):
        if len(run.model.stages[0][0].bn1.weight) == 8:
            bn = run.model.stages[0][0].bn1
            run.state[self]["sum"] += (bn.weight * bn.weight.grad).detach().abs()
            run.state[self]["scores"] = run.state[run.methods[0]]["scores"]["stages.0.0.conv1"].clone()


def test_scores_are_summed_and_the_cut_keeps_the_best_channels():
    model, seen = network(), {}

    class Look(Gradients):
        def on_fit_end(self, run):
            seen.update(run.state[self])

    history = train(model, DATA, RECIPE, [RankedCut(multiple=2, price="FLOPs", each=1, share=0.5), Look()])
    torch.testing.assert_close(seen["scores"], seen["sum"])
    (cut,) = [e for e in history.events if e.get("pruned")]
    widths = {n.name: n.width for n in surgery.nodes(model)}
    assert sum(widths.values()) < 4 * 8
    assert all(w % 2 == 0 for w in widths.values())
    assert cut["step"] + 1 <= 0.3 * history.steps + 1
    assert {n: tuple(v) for n, v in history.events[-1]["widths"][-1].items()} == {
        n: (w, w) for n, w in widths.items()
    }
    assert history.flops < train(network(), DATA, RECIPE).flops


@pytest.mark.parametrize(("agree", "share"), [(1.1, 0.1), (1e-9, 0.3)])
def test_it_cuts_when_looks_agree_or_at_the_latest(agree, share):
    method = RankedCut(multiple=2, price="FLOPs", agree=agree, first=0.1, every=0.02)
    history = train(network(), DATA, RECIPE, [method])
    (cut,) = [e for e in history.events if e.get("pruned")]
    last = (cut["step"] + 1) / history.steps
    assert last == pytest.approx(share, abs=0.07) or (agree < 1 and last <= 0.35)


def test_noise_alone_never_looks_stable():
    class Noise(Method):
        """In place of the gradients that a ranking reads."""

        def on_after_backward(self, run):
            for m in run.model.modules():
                if isinstance(m, nn.BatchNorm2d):
                    torch.randn(m.weight.shape, generator=run.generator(self), out=m.weight.grad)
            ranked = run.state[run.methods[1]]
            ranked["prices"] = dict.fromkeys(ranked["scores"], 1.0)

    method = RankedCut(multiple=1, price="FLOPs", agree=0.1, first=0.1, every=0.05, latest=0.6)
    model = models.build("vgg", 4, (1, 8, 8), widths=((32,), (32,)))
    recipe = Recipe(epochs=20, batch_size=16, lr=1e-6, precision="fp32")
    history = train(model, DATA, recipe, [Noise(), method])
    (cut,) = [e for e in history.events if e.get("pruned")]
    assert cut["step"] / history.steps > 0.55
    assert float(cut["text"].split()[6]) > 0.3  # half of the channels would differ


def test_a_resumed_run_ends_as_the_whole_one(tmp_path):
    (a, resumed), (b, whole) = resumed_and_whole(network, DATA, RECIPE, [CUT], tmp_path / "run.pt")
    assert models.describe(a) == models.describe(b) != models.describe(network())
    assert equal(a, b)
    assert resumed.events == whole.events


def test_what_cannot_be_cut_is_said():
    with pytest.raises(NoEffect, match="in more than one block of 16"):
        train(network(), DATA, RECIPE, [RankedCut(multiple=16)])
    bare = models.build("convnet", 4, (1, 8, 8), widths=(8, 8), bn=False)
    with pytest.raises(NoEffect, match="no channels with a BatchNorm"):
        train(bare, DATA, RECIPE, [CUT])
    with pytest.raises(NoEffect, match="its scale trained"):
        train(network(), DATA, RECIPE, [FastBiases(), CUT])
    with pytest.raises(NoEffect, match="not one block is within 1%"):
        train(network(), DATA, RECIPE, [RankedCut(multiple=4, price="FLOPs", share=0.01)])
    for wrong in (dict(share=1.0), dict(first=0.5), dict(multiple=0), dict(price="watts"), dict(each=0)):
        with pytest.raises(BadInput):
            RankedCut(**wrong)


def test_a_users_network_is_cut():
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    train(model, DATA, RECIPE, [CUT])
    assert model[0].out_channels + model[3].out_channels < 16
