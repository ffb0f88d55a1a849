"""Max pooling by the kernel, against PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effilib.kernels import compiler
from effilib.normalization import Layers, fused
from effilib.pooling import max_pool, pools
from tests.common import g

LAST = torch.channels_last


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    monkeypatch.setattr(compiler, "SMALLEST", 0)


def both(x, pool):
    x = x.clone().requires_grad_()
    y = pool(x)
    dy = torch.randn(y.shape, generator=g(1)).to(y.dtype)
    y.backward(dy)
    return y.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(2, 1, 2, 2), (3, 5, 7, 9), (2, 16, 8, 6), (4, 40, 5, 4)])
def test_it_is_pytorchs_bit_for_bit(size, dtype):
    x = torch.randn(size, generator=g(0)).to(dtype).contiguous(memory_format=LAST)
    x = x.mul(2).round()  # with ties: the first of them is the largest
    for a, b in zip(both(x, max_pool), both(x, lambda t: F.max_pool2d(t, 2)), strict=True):
        assert torch.equal(a, b)


def test_a_nan_wins():
    x = torch.arange(16.0).view(1, 1, 4, 4).contiguous(memory_format=LAST)
    x[0, 0, 0, 0] = torch.nan
    for a, b in zip(both(x, max_pool), both(x, lambda t: F.max_pool2d(t, 2)), strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))


def test_threads_do_not_change_a_bit():
    x, found, before = (
        torch.randn(64, 32, 16, 16, generator=g(0)).contiguous(memory_format=LAST),
        [],
        torch.get_num_threads(),
    )
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(both(x, max_pool))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_its_gradient_can_be_differentiated_once_more():
    found, x = [], torch.randn(2, 3, 5, 4, generator=g(0)).contiguous(memory_format=LAST)
    for pool in (max_pool, lambda t: F.max_pool2d(t, 2)):
        t = x.clone().requires_grad_()
        [dx] = torch.autograd.grad(pool(t).pow(3).sum(), t, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), t)[0])
    assert torch.allclose(*found)


def test_what_it_does_not_know_is_left_to_the_layer():
    x = torch.randn(2, 4, 6, 6, generator=g(0)).contiguous(memory_format=LAST)
    assert pools(nn.MaxPool2d(2), x)
    assert pools(nn.MaxPool2d((2, 2), stride=(2, 2)), x)
    others = (
        nn.MaxPool2d(3, 2), nn.MaxPool2d(2, 1), nn.MaxPool2d(2, padding=1), nn.MaxPool2d(2, dilation=2),
        nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d(2, return_indices=True), nn.AvgPool2d(2),
    )  # fmt: skip
    assert not any(pools(layer, x) for layer in others)
    assert not any(pools(nn.MaxPool2d(2), t) for t in (x.double(), x.contiguous(), x[0]))


def test_layers_pool_by_it_unless_somebody_watches():
    x, seen = torch.randn(2, 4, 6, 6, generator=g(0)).contiguous(memory_format=LAST).requires_grad_(), []
    layers = Layers(nn.MaxPool2d(2))
    assert "_MaxPool" in layers(x).grad_fn.name()
    with fused(False):
        assert "_MaxPool" not in layers(x).grad_fn.name()
    layers[0].register_forward_hook(lambda m, inputs, y: seen.append(y))
    assert "_MaxPool" not in layers(x).grad_fn.name()
    assert len(seen) == 1
