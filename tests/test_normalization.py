"""BatchNorm, sum and ReLU in one: against float64, against PyTorch, and where the kernel stands back."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effilib import models, seeds
from effilib.kernels import compiler
from effilib.normalization import ACTIVATIONS, Layers, fits, fused, norm_relu
from effilib.recipe import autocast
from tests.common import g

LAST = torch.channels_last
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 3e-3}  # of rounding, relative


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    monkeypatch.setattr(compiler, "SMALLEST", 0)


def case(channels=16, dtype=torch.float32, size=(6, 5, 7), add=True):
    n, H, W = size
    x, r, dy = (
        torch.randn(n, channels, H, W, generator=g(i)).to(dtype).contiguous(memory_format=LAST)
        for i in range(3)
    )
    with seeds.seeded(0):
        bn = nn.BatchNorm2d(channels, momentum=0.3)
        nn.init.uniform_(bn.weight, 0.5, 2)
        nn.init.normal_(bn.bias)
    return bn, 3 * x + 5, r if add else None, dy


def passes(bn, x, add, dy, call=norm_relu):
    """Outputs, gradients of all that goes in, running statistics."""
    bn, x = copy.deepcopy(bn), x.clone().requires_grad_()
    add = None if add is None else add.clone().requires_grad_()
    y = call(bn, x, add)
    y.backward(dy)
    found = [y.detach(), x.grad, bn.weight.grad, bn.bias.grad, bn.running_mean, bn.running_var]
    return found + ([] if add is None else [add.grad]), y.grad_fn.name()


def oracle(bn, x, add, dy):
    """All in float64 by PyTorch's operations, on the same numbers; the ReLU's place is as x says."""
    add = None if add is None else add.double()
    return passes(copy.deepcopy(bn).double(), x.double(), add, dy.double())[0]


def off(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 5, 16, 24, 64])
@pytest.mark.parametrize("size", [(6, 5, 7), (2, 1, 1), (3, 9, 8)])
def test_it_is_batch_norm_sum_and_relu_rounded_once(channels, dtype, add, size):
    given = case(channels, dtype, size, add)
    found, name = passes(*given)
    assert "_Normalized" in name
    assert [t.dtype for t in found[:2]] == [dtype] * 2
    if size == (2, 1, 1):  # two values: sigma of a few is all of the gradient's scale
        found, expected = [found[i] for i in (0, 3, 4, 5)], [oracle(*given)[i] for i in (0, 3, 4, 5)]
    else:
        expected = oracle(*given)
    for a, b in zip(found, expected, strict=True):
        assert off(a, b) < CLOSE[dtype] or (a - b).abs().max() < CLOSE[dtype]


@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU, nn.SiLU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_put_an_activation_into_the_batch_norm_before_it(act, dtype):
    bn, x, _, dy = case(24, dtype, (6, 8, 8), add=False)
    nn.init.uniform_(bn.weight, 2, 6)  # far into both tails
    found, name = passes(bn, x, None, dy, lambda bn, x, _: Layers(bn, act())(x))
    assert "_Normalized" in name
    exact = passes(bn.double(), x.double(), None, dy.double(), lambda bn, x, _: nn.Sequential(bn, act())(x))
    for a, b in zip(found, exact[0], strict=True):
        assert off(a, b) < CLOSE[dtype]


def test_a_mean_far_from_0_does_not_eat_the_variance():
    bn, x, _, _ = case(size=(64, 8, 8))
    y = norm_relu(bn, x / 100 + 300)
    expected = F.relu(copy.deepcopy(bn).double()((x / 100 + 300).double()))
    assert off(y, expected) < 1e-3


def test_a_nan_stays_one_and_infinity_becomes_one():
    for bad in (torch.nan, torch.inf):
        bn, x, _, dy = case()
        x[1, 2, 3, 4] = bad
        found, _ = passes(bn, x, None, dy)
        for t in found[:2]:
            assert t[:, 2].isnan().all()
            assert not t[:, 3].isnan().any()


def test_threads_do_not_change_a_bit():
    given, found, before = case(32, torch.bfloat16, (40, 16, 16)), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(passes(*given)[0])
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_a_momentum_of_none_averages_all_batches():
    bn, x, add, _ = case()
    bn.momentum, twin = None, copy.deepcopy(bn)
    twin.momentum = None
    for k in (1, 2, 4):
        norm_relu(bn, k * x, add)
        twin(k * x)
    assert bn.num_batches_tracked == 3
    assert torch.allclose(bn.running_mean, twin.running_mean, atol=1e-5)
    assert torch.allclose(bn.running_var, twin.running_var, rtol=1e-5)


def watched(bn, x, add):
    bn.register_forward_hook(lambda m, inputs, y: None)


def evaluating(bn, x, add):
    bn.eval()


def half(bn, x, add):
    bn.bfloat16()


def strided(bn, x, add):
    bn.weight = nn.Parameter(torch.rand(32)[::2])


class Own(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize("change", [watched, evaluating, half, strided])
def test_it_stands_back_where_the_layers_own_call_counts(change):
    bn, x, add, _ = case()
    assert fits(bn, x, add)
    change(bn, x, add)
    assert not fits(bn, x, add)


def test_it_stands_back_from_what_it_does_not_know():
    bn, x, add, _ = case()
    with fused(False):
        assert not fits(bn, x, add)
    other = Own(16), nn.Identity(), nn.BatchNorm2d(16, affine=False), nn.BatchNorm2d(8)
    assert not any(fits(m, x, add) for m in other)
    assert not fits(bn, x.double(), add)
    assert not fits(bn, x.contiguous(), add)
    assert not fits(bn, x, add.bfloat16())
    assert not fits(bn, x, add[:, :, :1])
    assert torch.equal(norm_relu(nn.Identity(), x, add), F.relu(x + add))
    untracked = nn.BatchNorm2d(16, track_running_stats=False)
    assert fits(untracked, x, add)
    [y] = torch.func.vmap(lambda t: norm_relu(untracked, t))(x[None])
    assert torch.allclose(y, norm_relu(untracked, x), atol=1e-5)


def test_settings_of_the_layer_count_as_in_pytorch():
    bn, x, add, dy = case()
    bn.eps, bn.track_running_stats = 1, False  # the buffers are there, and stay
    found, name = passes(bn, x, add, dy)
    assert "_Normalized" in name
    for a, b in zip(found, oracle(bn, x, add, dy), strict=True):
        assert off(a, b) < CLOSE[torch.float32] or torch.equal(a.double(), b)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm_relu(bn, x[:1, :, :1, :1].contiguous(memory_format=LAST))


def test_a_small_layer_is_left_to_pytorch(monkeypatch):
    bn, x, add, _ = case()
    monkeypatch.setattr(compiler, "SMALLEST", x.numel() + 1)
    assert not fits(bn, x, add)


def add_relu(bn, x):
    return norm_relu(bn, x, x.detach() + 1)


@pytest.mark.parametrize(
    "call", [add_relu, *(lambda bn, x, a=a: Layers(bn, a())(x) for a in ACTIVATIONS[1:])]
)
def test_a_gradient_can_be_differentiated_once_more(call):
    bn, x, _, dy = case()
    found = []
    for wanted in (True, False):
        own, t = copy.deepcopy(bn), x.clone().requires_grad_()
        with fused(wanted):
            [dx] = torch.autograd.grad(call(own, t), t, dy, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), [t, own.weight]))
    assert all(off(a, b) < 1e-4 for a, b in zip(*found, strict=True))


def test_what_moves_a_bias_within_the_backward_pass_changes_nothing():
    bn, x, _, dy = case(add=False)
    expected = passes(bn, x, None, dy)[0][1]
    t = x.clone().requires_grad_()
    y = norm_relu(bn, t)
    with torch.no_grad():
        bn.bias += 7
    y.backward(dy)
    assert torch.equal(t.grad, expected)


@pytest.mark.parametrize("network", ["resnet", "vgg", "convnet", "speed_run"])
def test_a_networks_gradients_are_as_without_it(network):
    net = models.build(network, 4, (3, 16, 16), seed=0).to(memory_format=LAST).train()
    x, y = torch.randn(32, 3, 16, 16, generator=g(0)).contiguous(memory_format=LAST), torch.arange(32) % 4
    found, names = [], []
    for wanted in (True, False):
        twin = copy.deepcopy(net)
        with fused(wanted):
            loss = F.cross_entropy(twin(x), y)
        loss.backward()
        found.append([p.grad for p in twin.parameters()] + list(twin.buffers()))
        names.append(graph(loss.grad_fn))
    assert max(off(a, b) for a, b in zip(*found, strict=True)) < 2e-3
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    shortcuts = [getattr(m, "shortcut", ()) for m in net.modules()]
    kept = sum(len(layers) > 0 for layers in shortcuts)  # their BatchNorm has no ReLU
    assert [sum("_Normalized" in n for n in ns) for ns in names] == [norms - kept, 0]


def graph(node):
    found, left = {}, [node]
    while left:
        n = left.pop()
        if n is not None and n not in found:
            found[n] = n.name()
            left += [m for m, _ in n.next_functions]
    return list(found.values())


def test_layers_call_what_is_watched_and_what_is_another_activation():
    seen, layers = [], Layers(nn.BatchNorm2d(16), nn.ReLU(), nn.BatchNorm2d(16), nn.GELU("tanh")).train()
    _, x, _, _ = case()
    plain = nn.Sequential(*copy.deepcopy(layers))
    assert off(layers(x), plain(x)) < 1e-5
    layers[1].register_forward_hook(lambda m, inputs, y: seen.append(m))
    layers(x)
    assert seen == [layers[1]]


def test_in_bf16_a_training_with_it_ends_where_one_without_it_ends():
    """Several steps on one batch: losses part by rounding only."""
    x, y = torch.randn(64, 3, 8, 8, generator=g(0)).contiguous(memory_format=LAST), torch.arange(64) % 4
    losses = []
    for wanted in (True, False):
        net = models.build("resnet", 4, (3, 8, 8), seed=0, widths=(16, 32), blocks=(1, 1)).train()
        net = net.to(memory_format=LAST)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        for _ in range(30):
            with autocast("bf16", "cpu"), fused(wanted):
                loss = F.cross_entropy(net(x).float(), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert losses[1] < 1
