"""The speed runs' tricks: each against a slow and obvious twin, and that it has an effect."""

import copy
import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effilib import models, networks
from effilib.data import synthetic
from effilib.errors import BadInput, NoEffect
from effilib.evaluation import crop_logits
from effilib.hooks import Method
from effilib.methods.muon import Muon, orthogonalize
from effilib.methods.speed_run import FastBiases, Lookahead, PartialIdentity, identity_, published
from effilib.methods.whitening import Whitening
from effilib.recipe import Recipe
from effilib.training import train
from effilib.workbook import train_command
from tests.common import equal, g, resumed_and_whole

DATA = synthetic(images=300)
RECIPE = Recipe(epochs=2, batch_size=32, lr=0.05, precision="fp64", augmentation="none")


def network(seed=0, **settings):
    settings = dict(widths=(8, 8), stem=8) | settings
    return models.build("speed_run", 4, (1, 8, 8), seed=seed, **settings)


class Follow(Method):
    """Keep the weights after each step."""

    def __init__(self):
        self.steps, self.lrs, self.groups, self.images = [], [], [], []

    def on_step_end(self, run):
        self.steps.append(copy.deepcopy(run.model.state_dict()))
        self.lrs.append([g["lr"] for g in run.optimizer.param_groups])


def followed(*methods, recipe=RECIPE, seed=0, **settings):
    look = Follow()
    history = train(net := network(**settings), DATA, recipe, [*methods, look], seed)
    return net, look, history


# The network


def test_network_pools_before_it_normalizes():
    net = networks.speed_run(10, widths=(16, 32)).eval()
    x = torch.randn(2, 3, 24, 24, generator=g(0))
    y = F.gelu(F.conv2d(x, net.stem.weight, net.stem.bias))
    for i, size in enumerate((11, 5)):
        first, second = net.groups[i][0], net.groups[i][4]
        y = F.max_pool2d(F.conv2d(y, first.weight, padding=1), 2)
        y = F.gelu(y / math.sqrt(1 + 1e-5))  # running statistics are 0 and 1
        y = F.gelu(F.conv2d(y, second.weight, padding=1))
        assert y.shape[2:] == (size, size)
    logits = y.flatten(2).max(2).values @ net.head.weight.T / 9
    assert torch.allclose(net(x), logits, atol=1e-5)


@pytest.mark.parametrize("size", [16, 20, 24, 28, 32])
def test_network_takes_the_sizes_of_progressive_resizing(size):
    assert networks.speed_run(10, widths=(16, 16, 16))(torch.zeros(2, 3, size, size)).shape == (2, 10)


def test_network_is_rebuilt_from_its_settings():
    net = networks.speed_run(4, 1, widths=(8, 12), stem=6, kernel=3, scale=0.5, activation="silu")
    again = networks.speed_run(4, 1, **net.settings())
    assert [p.shape for p in again.parameters()] == [p.shape for p in net.parameters()]
    assert again.settings() == net.settings()


# The recipe


def test_published_recipe_is_the_sum_of_losses_with_a_decay_of_its_own():
    """Their form: the loss is a sum, the rate is divided by 1024 (1 + 1 / (1 - m)), the decay by the rate."""
    x, y = torch.randn(64, 5, generator=g(0)).double(), torch.randint(3, (64,), generator=g(1))
    B, kilostep = 16, 1024 * (1 + 1 / (1 - 0.85))
    lr, wd = 11.5 / kilostep, 0.0153 * B / kilostep
    recipe, ways = published(B), {}
    for way in ("sum", "mean"):
        w = nn.Parameter(torch.ones(3, 5).double())
        how = dict(lr=lr, weight_decay=wd / lr) if way == "sum" else dict(
            lr=recipe.lr, weight_decay=recipe.weight_decay
        )  # fmt: skip
        sgd = torch.optim.SGD([w], momentum=0.85, nesterov=True, **how)
        for step in range(12):
            s = slice(step % 4 * B, step % 4 * B + B)
            sgd.zero_grad()
            F.cross_entropy(x[s] @ w.T, y[s], label_smoothing=0.2, reduction=way).backward()
            sgd.step()
        ways[way] = w.detach()
    assert torch.allclose(ways["sum"], ways["mean"], atol=1e-10)
    assert not torch.allclose(ways["sum"], torch.ones(3, 5).double(), atol=1e-2)


def test_schedule_rises_from_its_start_and_falls_to_its_end():
    recipe, T = published(), 1000
    lrs = [recipe.lr_at(t, T) / recipe.lr for t in range(T)]
    expected = np.interp(np.arange(T), [0, 0.23 * T, T], [0.2, 1, 0.07])
    assert np.abs(np.array(lrs) - expected).max() < 0.005  # a step's worth
    assert Recipe(lr=1, warmup=0.5).lr_at(0, 10) == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    "changes", [dict(lr_end=2), dict(pad=-1), dict(flips="sometimes"), dict(multi_crop=1.5)]
)
def test_recipe_refuses(changes):
    with pytest.raises(BadInput, match=next(iter(changes))):
        Recipe(**changes)


def test_alternating_flips_mirror_each_image_in_every_second_epoch():
    data = replace(DATA, flip=True, pad=0)
    batches = data.shuffled(30, g(5), flips="alternating")
    seen = []
    for batches.epoch in range(4):
        mirrored = torch.zeros(len(batches.first), dtype=torch.bool)
        for x, _ in batches:
            plain = data.normalize(data.train.x[batches.index])
            same, other = ((t - x).abs().amax((1, 2, 3)) < 1e-6 for t in (plain, plain.flip(3)))
            assert (same | other).all()
            mirrored[batches.index] = ~same
        seen.append(mirrored)
    n = len(batches) * 30
    whole = len(data.train) == n
    assert whole
    assert torch.equal(seen[0], ~seen[1])
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert 0.3 < seen[0].float().mean() < 0.7


def test_alternating_flips_go_on_after_an_interruption(tmp_path):
    data = replace(DATA, flip=True)
    recipe = Recipe(epochs=4, batch_size=32, lr=0.05, precision="fp32", flips="alternating")
    (resumed, _), (whole, _) = resumed_and_whole(network, data, recipe, [], tmp_path / "run.pt")
    assert equal(resumed, whole)


def test_crops_may_be_smaller_than_the_data_sets():
    data = replace(DATA, pad=3)
    assert data.shuffled(32, g(0)).padded.shape[1] == 14
    assert data.shuffled(32, g(0), pad=1).padded.shape[1] == 10
    assert data.shuffled(32, g(0), pad=0).padded.shape[1] == 8
    assert data.shuffled(32, g(0), pad=2, augmentation="none").padded.shape[1] == 8


# Evaluation


def test_views_are_averaged_as_published():
    net, x = network().double().eval(), torch.randn(5, 1, 8, 8, generator=g(0)).double()
    net.forward = lambda x, own=net.forward: own(x).double()
    padded = F.pad(x, (1, 1, 1, 1), "reflect")
    both = lambda x: 0.5 * net(x) + 0.5 * net(x.flip(3))  # noqa: E731
    crops = 0.5 * both(padded[:, :, :8, :8]) + 0.5 * both(padded[:, :, 2:, 2:])
    assert torch.allclose(crop_logits(net, x), 0.5 * both(x) + 0.5 * crops)
    one = 0.5 * net(padded[:, :, :8, :8]) + 0.5 * net(padded[:, :, 2:, 2:])
    assert torch.allclose(crop_logits(net, x, flip=False), 0.5 * net(x) + 0.5 * one)
    assert torch.equal(crop_logits(net, x, share=0), net(x))


def test_only_the_least_certain_images_have_views():
    net, x = network().eval(), torch.randn(20, 1, 8, 8, generator=g(0))
    with torch.no_grad():
        p = net(x).softmax(1).sort(1).values
    changed = (crop_logits(net, x, share=0.25) != crop_logits(net, x, share=0)).any(1)
    assert set(changed.nonzero().flatten().tolist()) == set((p[:, -1] - p[:, -2]).argsort()[:5].tolist())


def test_multi_crop_is_on_the_clock_and_reported_without():
    recipe = Recipe(epochs=1, batch_size=32, lr=0.05, multi_crop=1.0)
    with_crops = train(network(), DATA, recipe)
    plain = train(network(), DATA, Recipe(epochs=1, batch_size=32, lr=0.05))
    assert with_crops.single_crop == plain.final
    assert plain.single_crop is None
    assert with_crops.kinds["evaluation"]["count"] == 1
    assert with_crops.seconds > sum(k["seconds"] for n, k in with_crops.kinds.items() if n != "evaluation")
    assert "evaluation" not in plain.kinds


def test_views_are_mirrored_where_training_images_were():
    def views(flip, augmentation):
        net, seen = network(), []
        net.register_forward_hook(lambda m, inputs, output: seen.append(m.training))
        recipe = Recipe(epochs=1, batch_size=32, lr=0.05, multi_crop=1.0, augmentation=augmentation)
        train(net, replace(DATA, flip=flip), recipe)
        return seen.count(False)

    mirrored, plain = views(True, "auto"), views(False, "auto")
    assert views(False, "crop+flip") == mirrored > plain == views(True, "none")


def test_on_whole_data_no_images_are_left_for_a_method_to_look_at():
    class Peek(Method):
        def on_fit_start(self, run):
            assert len(run.decide)

    with pytest.raises(BadInput, match=r"Peek\.on_fit_start looks at images that are not trained on"):
        train(network(), DATA.whole(), RECIPE, [Peek()])


def test_whole_data_are_judged_by_the_test_images_alone():
    whole = DATA.whole()
    assert len(whole.train) == sum(len(s) for s in (DATA.train, DATA.validation, DATA.decide))
    history = train(net := network(), whole, Recipe(epochs=1, batch_size=32, lr=0.05))
    assert history.held_out == len(DATA.test)
    assert history.final == history.test_accuracy
    assert history.images == len(whole.train)
    assert net is not None


# Initial weights


def test_identity_passes_channels_on():
    conv = nn.Conv2d(3, 5, 3, padding=1, bias=False)
    rest, x = conv.weight[3:].clone(), torch.randn(2, 3, 6, 6, generator=g(0))
    identity_(conv, gain=0.5)
    assert torch.equal(conv(x)[:, :3], x)
    assert torch.equal(conv.weight[3:], 0.5 * rest)


def test_partial_identity_takes_what_keeps_its_size():
    net = models.build("resnet", 4, (1, 8, 8), widths=(4, 8), blocks=(1, 1))
    start = {}

    class Look(Method):
        def on_fit_start(self, run):
            start.update(
                {n: m.weight.clone() for n, m in run.model.named_modules() if isinstance(m, nn.Conv2d)}
            )

    train(net, DATA, RECIPE, [PartialIdentity(), Look()])
    eye = {
        n for n, w in start.items() if w[0, 0].abs().sum() == w[0, 0, w.shape[2] // 2, w.shape[3] // 2] == 1
    }
    assert eye == {"stages.0.0.conv1", "stages.0.0.conv2", "stages.1.0.conv2"}  # no stem, no stride, no 1x1


# The optimizer


def test_fast_biases_are_sgd_with_groups():
    recipe = Recipe(epochs=1, batch_size=32, lr=0.01, weight_decay=0.1, precision="fp64", augmentation="none")
    _, look, _ = followed(FastBiases(factor=8.0), recipe=recipe)
    first, second = look.steps[0], look.steps[1]
    _, other, _ = followed(recipe=recipe)
    bias, conv = "groups.0.2.bias", "groups.0.0.weight"
    start = network().double().state_dict()
    # the first step: the gradient of the bias is what plain SGD saw (b = 0, so that nothing decays)
    assert torch.allclose(first[bias] - start[bias], 8 * (other.steps[0][bias] - start[bias]))
    assert torch.allclose(first[conv], other.steps[0][conv])
    assert torch.equal(second["groups.0.2.weight"], start["groups.0.2.weight"])
    assert not torch.equal(other.steps[1]["groups.0.2.weight"], start["groups.0.2.weight"])


def test_scales_that_a_user_froze_stay_frozen():
    net = network()
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    norms[0].weight.requires_grad_(False)
    train(net, DATA, RECIPE, [FastBiases()])
    assert [m.weight.requires_grad for m in norms] == [False] + [True] * (len(norms) - 1)


def test_decay_of_fast_biases_is_per_step_as_before():
    seen = {}

    class Look(Method):
        def on_step_end(self, run):
            for group in run.optimizer.param_groups:
                seen[len(group["params"])] = group["lr"] * group["weight_decay"]

    train(network(), DATA, RECIPE, [FastBiases(), Look()])
    assert len(seen) == 2
    assert len({round(v, 12) for v in seen.values()}) == 1


@pytest.mark.parametrize("order", [1, -1])
def test_fast_biases_learn_fast_beside_a_stem_that_has_a_group_of_its_own(order):
    methods = [Whitening(patches=500, learns=0.5), FastBiases(factor=8.0)][::order]
    seen = {}

    class Look(Method):
        def on_step_end(self, run):
            names = {p: n for n, p in run.model.named_parameters()}
            for group in run.optimizer.param_groups:
                seen.update({names[p]: group.get("lr_factor", 1.0) for p in group["params"]})

    train(network(), DATA, RECIPE, [*methods, Look()])
    assert {n for n, factor in seen.items() if factor == 8} == {
        f"groups.{i}.{j}.bias" for i in (0, 1) for j in (2, 5)
    }
    assert seen["stem.bias"] == seen["groups.0.0.weight"] == 1


def test_a_network_is_left_whole():
    net, *_ = followed(FastBiases(), Whitening(patches=500, learns=0.5), Lookahead())
    assert all(p.requires_grad for p in net.parameters())


def test_lookahead_is_a_running_average():
    method = Lookahead(every=2, decay=0.9)
    _, look, history = followed(method, recipe=Recipe(**{**vars(RECIPE), "epochs": 1}))
    T = history.steps
    # the same by hand: what each step adds is taken from the run itself, from one average to the next
    slow = {n: t.clone() for n, t in network().double().state_dict().items() if t.is_floating_point()}
    _, other, _ = followed(recipe=Recipe(**{**vars(RECIPE), "epochs": 1}))
    decay = 0.9**2 * (2 / T) ** 3
    for n in slow:
        fast = other.steps[1][n]  # until the second step nothing is averaged: both runs are the same
        assert torch.equal(look.steps[0][n], other.steps[0][n])
        assert torch.allclose(look.steps[1][n], decay * slow[n] + (1 - decay) * fast, atol=1e-12)


def test_after_the_last_step_the_average_stays():
    net, look, _ = followed(Lookahead(every=1, decay=0.99))
    averaged = look.steps[-2]  # at the last step itself nothing is averaged any more
    assert torch.equal(net.state_dict()["head.weight"], averaged["head.weight"])
    assert not torch.equal(look.steps[-1]["head.weight"], averaged["head.weight"])


def test_lookahead_that_never_comes_to_an_average_leaves_what_was_learned():
    net, look, history = followed(Lookahead(every=100))
    assert torch.equal(net.state_dict()["head.weight"], look.steps[-1]["head.weight"])
    assert not torch.equal(net.state_dict()["head.weight"], network().double().head.weight)
    assert history.events[-1]["text"] == "0 averages, one every 100 steps"


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (3, 6, 9)])
def test_orthogonal_factor_of_an_svd(shape):
    matrix = torch.randn(shape, generator=g(0), dtype=torch.float64)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    near, exact = orthogonalize(matrix, steps=6), u @ vt
    assert torch.allclose(orthogonalize(3 * matrix, steps=6), near, atol=1e-6)  # its scale means nothing
    cosine = (near * exact).sum((-2, -1)) / near.norm(dim=(-2, -1)) / exact.norm(dim=(-2, -1))
    assert (cosine > 0.97).all()


def test_muon_against_its_formula_by_an_svd():
    """The polynomial acts on singular values alone: p(s) = a s + b s^3 + c s^5, three times."""
    method = Muon(lr=0.1, momentum=0.5, steps=3)
    recipe = Recipe(**{**vars(RECIPE), "warmup": 0.0, "weight_decay": 0.3})
    _, look, _ = followed(method, recipe=recipe)
    name, grads = "groups.1.0.weight", []

    class Grads(Method):
        def on_after_backward(self, run):
            grads.append(run.model.get_parameter(name).grad.clone())

    train(network(), DATA, recipe, [Grads(), method])
    w, buffer = network().double().get_parameter(name).detach().flatten(1), 0
    for step in range(2):
        G = grads[step].flatten(1)
        buffer = 0.5 * buffer + G
        u, s, vt = torch.linalg.svd(G + 0.5 * buffer, full_matrices=False)
        s = s / (s.norm() + 1e-7)
        for _ in range(3):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        w = w * math.sqrt(8) / w.norm() - 0.1 * (1 - step / len(look.steps)) * (u * s) @ vt
        assert torch.allclose(look.steps[step][name].flatten(1), w, atol=1e-8)


def test_muon_leaves_the_rest_to_sgd():
    _, look, _ = followed(Muon(), recipe=RECIPE)
    _, other, _ = followed(recipe=RECIPE)
    assert torch.equal(look.steps[0]["head.weight"], other.steps[0]["head.weight"])
    assert torch.equal(look.steps[0]["stem.weight"], other.steps[0]["stem.weight"])
    assert not torch.equal(look.steps[0]["groups.0.0.weight"], other.steps[0]["groups.0.0.weight"])


def test_muon_without_scaling_back():
    norms = {}
    for renormalize in (True, False):
        net, *_ = followed(Muon(renormalize=renormalize, lr=0.01))
        norms[renormalize] = net.groups[1][0].weight.norm().item()
    assert norms[True] == pytest.approx(math.sqrt(8), rel=0.1)
    assert norms[True] != pytest.approx(norms[False], rel=0.01)


# The stem


def test_bias_of_the_stem_learns_for_its_share_of_the_run():
    _, look, history = followed(Whitening(patches=500, learns=0.5))
    biases = [s["stem.bias"] for s in look.steps]
    half = math.ceil(0.5 * history.steps)
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(biases[: half - 1]))
    assert all(torch.equal(b, biases[-1]) for b in biases[half:])
    lrs = [step[-1] for step in look.lrs[:half]]
    assert lrs[-1] < 0.25 * max(lrs)


@pytest.mark.parametrize(
    "methods",
    [
        [Muon()],
        [Lookahead(every=3)],
        [FastBiases()],
        [PartialIdentity()],
        [Whitening(patches=500, learns=0.3)],
    ],
)
def test_resumed_run_is_the_whole_run(methods, tmp_path):
    recipe = Recipe(epochs=3, batch_size=32, lr=0.05, precision="fp32")
    (resumed, _), (whole, _) = resumed_and_whole(network, DATA, recipe, methods, tmp_path / "run.pt")
    assert equal(resumed, whole)


@pytest.mark.parametrize("method", [Muon(), PartialIdentity(), FastBiases()])
def test_networks_without_such_layers(method):
    with pytest.raises(NoEffect):
        train(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), DATA, RECIPE, [method])


def test_all_together_learn():
    recipe = published(30, epochs=60)
    methods = [Whitening(patches=1000, learns=0.3), PartialIdentity(), FastBiases(), Lookahead()]
    history = train(network(), DATA, recipe, methods)
    assert history.final > 80


def test_the_command_line_runs_our_recipe(tmp_path, capsys):
    few = [
        "epochs=1",
        "batch_size=32",
        "images=320",
        "validation=50",
        "widths={'widths': (8, 8, 8), 'stem': 8}",
    ]
    how = dict(preset="speed_run", dataset="mnist5k", settings=few)
    assert train_command.run(**how, out=str(tmp_path / "out")) == 0
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert "Muon" in json.dumps(record["run"]["methods"])
    assert record["run"]["task"]["network"] == "speed_run"
    assert record["run"]["task"]["recipe"]["flips"] == "alternating"
    said = capsys.readouterr().out
    assert "validation loss" not in said  # of images that are trained on
    assert f"{record['single_crop']:.2f} % without the views" in said
    how["settings"] = [*few, "flips=alternating"]
    with pytest.raises(BadInput, match="flips=alternating: mnist5k is not mirrored"):
        train_command.run(**how, out=str(tmp_path / "other"))
    how["settings"] = few
    with pytest.raises(BadInput, match="--network and --preset speed_run exclude each other"):
        train_command.run(**how, network="vgg")
