"""Backward passes for some of the samples: autograd's where all are left, else sums over those that are."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effilib import cost, models, normalization, seeds
from effilib.backward import Part, partial_backward_, whole_backward_
from effilib.errors import NoEffect
from effilib.normalization import batch_norm_backward
from effilib.recipe import autocast
from tests.common import ALL, equal, g, images, make, users

NETWORKS = [n for n in ALL if n != "flat" and "gone" not in n]


def everything(border, norms):
    return None


def listed(border, norms):
    """All samples, but by the way of those that are drawn."""
    return torch.arange(len(norms)), torch.ones_like(norms)


def network(name):
    return users().double().train() if name == "users" else make(name).train()


def batch(name, dtype=torch.float64):
    return images(8, dtype, (1, 8, 8) if name == "users" else (3, 8, 8)), torch.arange(8) % 4


def gradients(model, x, y, precision="fp64"):
    with seeds.seeded(3), autocast(precision, "cpu"):  # dropout above the part
        loss = F.cross_entropy(model(x).to(torch.promote_types(x.dtype, torch.float32)), y)
    model.zero_grad()
    loss.backward()
    return loss, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("sampler", [everything, listed])
@pytest.mark.parametrize("name", [*NETWORKS, "users"])
def test_with_all_samples_it_is_autograds(name, sampler):
    exact, mine = network(name), network(name)
    part = partial_backward_(mine, sampler)
    assert len(part.borders) > 1
    x, y = batch(name)
    for _ in range(2):
        (loss, expected), (other, found) = gradients(exact, x, y), gradients(mine, x, y)
        assert torch.equal(loss, other)
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(expected, found, strict=True))
    assert equal(exact, mine)  # BatchNorm's running statistics too


def test_in_bf16_and_channels_last_it_is_autograds_to_the_last_bit():
    exact = models.build("resnet", 5, (3, 8, 8), widths=(16, 32), blocks=(1, 1)).to(
        memory_format=torch.channels_last
    )
    mine = copy.deepcopy(exact)
    partial_backward_(mine, everything)
    x, y = batch("resnet", torch.float32)
    x = x.contiguous(memory_format=torch.channels_last)
    for a, b in zip(gradients(exact, x, y, "bf16")[1], gradients(mine, x, y, "bf16")[1], strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert torch.equal(a, b)


class Plain(nn.Module):
    """What has no BatchNorm: pooling, a branch, a layer that is used twice, a grouped layer, biases."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.c, self.act, self.head = nn.Conv2d(4, 6, 1, stride=2), nn.GELU(), nn.Linear(6, 4)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.a(x)), 2)
        x = F.relu(self.b(F.relu(self.b(x))) + x)
        return self.head(self.act(self.c(x)).mean((2, 3)))


def test_gradients_below_a_border_are_those_of_the_weighted_samples_that_stay():
    with seeds.seeded(0):
        exact = Plain().double()
    mine, (x, y) = copy.deepcopy(exact), batch("plain")
    index, weight = torch.tensor([6, 1, 2]), torch.tensor([2.0, 0.5, 3.0], dtype=torch.float64)

    def first(border, norms):
        return (index, weight) if len(norms) == 8 else None

    assert partial_backward_(mine, first).borders == ["a", "b", "act"]
    found = dict(zip(dict(exact.named_parameters()), gradients(mine, x, y)[1], strict=True))
    losses = F.cross_entropy(exact(x), y, reduction="none") / 8
    expected = torch.autograd.grad(
        (losses[index] * weight).sum(), list(exact.parameters())[:6], retain_graph=True
    )
    for name, g_ in zip(list(found)[:6], expected, strict=True):
        assert torch.allclose(found[name], g_), name
    head = torch.autograd.grad(
        losses.sum(), list(exact.head.parameters())
    )  # above the first border all is exact
    assert all(torch.allclose(found[f"head.{n}"], g_) for n, g_ in zip(("weight", "bias"), head, strict=True))


def test_further_down_fewer_samples_are_left_with_the_product_of_their_weights():
    with seeds.seeded(0):
        exact = Plain().double()
    mine, (x, y), seen = copy.deepcopy(exact), batch("plain"), {}
    draws = {
        "act": (torch.tensor([6, 1, 2, 5]), torch.tensor([2.0, 0.5, 3.0, 1.0]).double()),
        "b": (torch.tensor([0, 2]), torch.tensor([5.0, 7.0]).double()),
    }

    def sampler(border, norms):
        seen[border] = norms
        return draws.get(border)

    partial_backward_(mine, sampler)
    found = gradients(mine, x, y)[1]
    losses = F.cross_entropy(exact(x), y, reduction="none") / 8
    expected = torch.autograd.grad(10 * losses[6] + 21 * losses[2], list(exact.a.parameters()))
    assert all(torch.allclose(a, b) for a, b in zip(found[:2], expected, strict=True))
    assert [len(seen[b]) for b in ("act", "b", "a")] == [8, 4, 2]


@pytest.mark.parametrize(("name", "share"), [("convnet", 0.0), ("resnet", 0.25)])
def test_over_many_draws_the_gradient_is_the_exact_one(name, share):
    """Without BatchNorm within its error; with it up to the product of two draws."""
    model, (x, y), draws, generator = network(name), batch(name), 150, g(4)
    exact = torch.cat([p.flatten() for p in gradients(model, x, y)[1]])

    def half(border, norms):
        u = norms + 0.1 * norms.mean()
        p = (0.6 * len(u) * u / u.sum()).clamp(max=1)
        index = (torch.rand(len(p), generator=generator) < p).nonzero().squeeze(1)
        return (index, 1 / p[index]) if len(index) > 1 else None

    partial_backward_(model, half)
    found = torch.stack([torch.cat([p.flatten() for p in gradients(model, x, y)[1]]) for _ in range(draws)])
    off, variance = (found.mean(0) - exact) ** 2, found.var(0)
    below = variance > 0
    assert (off - variance / draws)[below].sum() < (share + 0.02) * variance.sum()
    assert below.sum() > 0.9 * len(exact)


def norm_case(channels, dtype, layout=torch.channels_last, pixels=5):
    x = (
        (torch.randn(6, channels, pixels, 3, generator=g()).double() + 1)
        .to(dtype)
        .contiguous(memory_format=layout)
    )
    index, weight = torch.tensor([4, 0, 3]), torch.tensor([1.5, 2.0, 4.0])
    dy = torch.randn(3, channels, pixels, 3, generator=g(1)).to(dtype).contiguous(memory_format=layout)
    mean, var = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), correction=0)
    precise = torch.promote_types(dtype, torch.float32)
    invstd, gamma = (var + 1e-3).rsqrt(), torch.rand(channels, generator=g(2)) + 0.5
    return dy, x, index, weight.to(precise), mean.to(precise), invstd.to(precise), gamma.to(precise), 1e-3


def test_batch_norm_of_the_whole_batch_is_pytorchs():
    _, x, _, _, mean, invstd, gamma, eps = norm_case(4, torch.float64)
    dy = torch.randn(x.shape, generator=g(1)).double()
    stats = gamma, None, None, mean, invstd
    expected = torch.ops.aten.native_batch_norm_backward(dy, x, *stats, True, eps, [True] * 3)
    found = batch_norm_backward(dy, x, torch.arange(6), torch.ones(6).double(), mean, invstd, gamma, eps)
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))


def test_batch_norms_gradient_has_no_part_along_one_and_along_what_it_normalized():
    dy, x, index, weight, mean, invstd, gamma, _ = norm_case(4, torch.float64)
    invstd = x.var((0, 2, 3), correction=0).rsqrt()
    dx, dgamma, dbeta = batch_norm_backward(dy, x, index, weight, mean, invstd, gamma, 0.0)
    xhat = (x[index] - mean.view(1, -1, 1, 1)) * invstd.view(1, -1, 1, 1)
    zero = torch.zeros(4).double()
    assert torch.allclose(dx.sum((0, 2, 3)), zero)
    assert torch.allclose((dx * xhat).sum((0, 2, 3)), zero)
    assert torch.allclose(dbeta, dy.sum((0, 2, 3)))
    assert torch.allclose(dgamma, (dy * xhat).sum((0, 2, 3)))


@pytest.mark.parametrize("channels", [1, 16, 33, 64])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
def test_the_compiled_batch_norm_is_the_one_in_many_steps(dtype, close, channels, monkeypatch):
    case = norm_case(channels, dtype)
    found = batch_norm_backward(*case)
    monkeypatch.setattr(normalization.compiler, "load", lambda *words: None)
    expected = batch_norm_backward(*case)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.allclose(a.double(), b.double(), rtol=close, atol=close)


@pytest.mark.parametrize("odd", ["weight in fp64", "every second", "int32", "all in bf16"])
def test_the_compiled_batch_norm_reads_whatever_its_operands_are(odd):
    dy, x, index, weight, *others, eps = norm_case(16, torch.bfloat16)
    close = 1e-6
    expected = batch_norm_backward(dy, x, index, weight, *others, eps)
    if odd == "weight in fp64":
        weight = weight.double()
    elif odd == "every second":
        index, weight = index.repeat_interleave(2)[::2], weight.repeat_interleave(2)[::2]
    elif odd == "int32":
        index = index.int()
    else:
        others, close = [t.bfloat16() for t in others], 0.1
    found = batch_norm_backward(dy, x, index, weight, *others, eps)
    assert [t.dtype for t in found] == [torch.bfloat16, torch.float32, torch.float32]
    assert all(torch.allclose(a, b, rtol=close, atol=close) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("network", ["in bf16", "without parameters"])
def test_statistics_that_are_not_fp32_do_no_harm(network, monkeypatch):
    """`Odd`'s BatchNorm in bf16, with the kernel and without it."""
    found, plain = [], network == "without parameters"
    index, weight = torch.arange(8)[::2], torch.full((4,), 2.0)
    for kernel in (True, False):
        with seeds.seeded(0):
            model = Odd().train()
        if plain:
            model.norm = nn.BatchNorm2d(4, affine=False, track_running_stats=False)
        model = (model if plain else model.bfloat16()).to(memory_format=torch.channels_last)
        partial_backward_(model, lambda border, norms: (index, weight))
        x = images(8, torch.float32 if plain else torch.bfloat16).contiguous(
            memory_format=torch.channels_last
        )
        if not kernel:
            monkeypatch.setattr(normalization.compiler, "load", lambda *words: None)
        found.append(gradients(model, x, torch.arange(8) % 4, "bf16" if plain else "fp32")[1])
    assert all(torch.allclose(a, b, rtol=0.03, atol=2e-3) for a, b in zip(*found, strict=True))


def test_its_numbers_do_not_depend_on_the_number_of_threads():
    case, found = norm_case(16, torch.bfloat16, pixels=3000), []
    threads = torch.get_num_threads()
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        found.append(batch_norm_backward(*case))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for others in found[1:] for a, b in zip(found[0], others, strict=True))


def test_in_eval_mode_and_for_gradients_of_the_images_all_is_as_before():
    exact, mine, (x, y) = network("resnet"), network("resnet"), batch("resnet")
    kind = type(mine)
    partial_backward_(mine, lambda border, norms: (torch.tensor([0]), torch.ones(1).double()))
    assert torch.equal(exact.eval()(x), mine.eval()(x))
    exact.train(), mine.train()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    F.cross_entropy(exact(a), y).backward()
    F.cross_entropy(mine(b), y).backward()
    assert torch.equal(a.grad, b.grad)
    twin = copy.deepcopy(mine)
    whole_backward_(mine)
    assert type(mine) is kind
    assert equal(mine, exact)
    assert twin.part.rest.module is twin  # a copy follows its own layers


def test_frozen_parameters_get_no_gradient_and_cost_nothing():
    model, (x, y) = network("convnet"), batch("convnet")
    partial_backward_(model, everything)
    whole = cost.count_flops(lambda: gradients(model, x, y))
    model.features[0].weight.requires_grad_(False)
    assert gradients(model, x, y)[1][0] is None
    assert cost.count_flops(lambda: gradients(model, x, y)) < whole


def test_what_is_kept_for_the_backward_pass_is_counted_and_no_more_than_autograds():
    def saved(model):
        x, y = batch("resnet")
        with cost.Counter(model.parameters()) as count:
            gradients(model, x, y)
        return count.saved_bytes

    model = network("resnet")
    whole = saved(model)
    partial_backward_(model, everything)
    assert 0.5 * whole < saved(model) < 1.1 * whole


@pytest.mark.parametrize("act", [nn.SiLU, nn.ReLU6, nn.Hardswish, nn.LeakyReLU, nn.ReLU])
def test_activations_in_place_change_nothing(act):
    def network(in_place):
        with seeds.seeded(0):
            return nn.Sequential(
                nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), act(inplace=in_place), nn.Conv2d(4, 4, 3),
                act(inplace=in_place), nn.Flatten(), nn.Linear(64, 4),
            ).double()  # fmt: skip

    exact, mine, (x, y) = network(False), network(True), batch("in place")
    partial_backward_(mine, listed)
    for a, b in zip(gradients(exact, x, y)[1], gradients(mine, x, y)[1], strict=True):
        assert torch.allclose(a, b)


class Preactivated(Plain):
    """What an activation overwrites is read by another layer too."""

    def forward(self, x):
        x = self.a(x)
        return self.head(self.c(F.relu(x, inplace=True) + x).mean((2, 3)))


def test_where_others_read_what_an_activation_overwrites_it_is_not_known():
    with seeds.seeded(0):
        exact = Preactivated().double()
    mine, (x, y) = copy.deepcopy(exact), batch("overwritten")
    assert partial_backward_(mine, everything).above == "relu"
    for a, b in zip(gradients(exact, x, y)[1], gradients(mine, x, y)[1], strict=True):
        assert a is b is None or torch.allclose(a, b)


class Odd(nn.Module):
    """Two layers that are known, then one that mixes samples."""

    def __init__(self, first=None):
        super().__init__()
        self.first = first or nn.Conv2d(3, 4, 3, padding=1)
        self.norm, self.second, self.head = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        x = x * x.mean(0, keepdim=True)
        return self.head(self.second(x).mean((2, 3)))


def test_what_is_not_known_stays_above_and_where_nothing_is_known_it_is_named():
    with seeds.seeded(0):
        exact = Odd().double()
    mine, (x, y) = copy.deepcopy(exact), batch("odd")
    part = partial_backward_(mine, everything)
    assert (part.borders, part.above) == (["norm"], "mean")
    for a, b in zip(gradients(exact, x, y)[1], gradients(mine, x, y)[1], strict=True):
        assert torch.allclose(a, b)
    with pytest.raises(NoEffect, match="it ends at first"):
        Part(Odd(nn.Conv2d(3, 4, 3, padding="same")), everything)
    hooked = Odd()
    hooked.norm.register_forward_hook(lambda m, x, y: 2 * y)
    assert Part(hooked, everything).above == "norm"
