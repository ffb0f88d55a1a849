"""Kernel rescaling: the amplitude law, PI-resize, surgery with its optimizer, BatchNorm's statistics, the
schedule, resuming, refusals.
"""

import contextlib
import copy
import itertools
import math
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from effilib import models, seeds
from effilib.data import synthetic
from effilib.errors import BadInput, NoEffect
from effilib.evaluation import evaluate
from effilib.hooks import Method
from effilib.methods.kernel_rescaling import KernelRescaling, shrunk
from effilib.methods.rescaled_kernels import (
    kernels,
    matrix,
    pi_resize,
    recalibrate_,
    rescale_,
    rescale_kernel,
    resize,
    scaled,
)
from effilib.recipe import Recipe
from effilib.training import train

DATA = synthetic(images=200)  # 8 x 8; 4 batches of 32 an epoch
RECIPE = Recipe(epochs=5, batch_size=32, precision="fp32")  # 20 steps
SCHEDULE = ((0.4, 0.5), (0.3, 0.75), (0.3, 1.0))  # 8, 6 and 6 of them


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def network(seed=0, **settings):
    return models.build(
        "resnet",
        4,
        (1, 8, 8),
        seed=seed,
        **{"widths": (4, 6), "blocks": (1, 1), "kernels": (5, 5, 3), **settings},
    )


class Own(nn.Module):
    """A user's network: a 7x7 stem of stride 2 as torchvision's have, a depthwise 5x5 convolution, and
    nothing that describes it.
    """

    def __init__(self, classes=4):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 6, 7, 2, padding=3, bias=False), nn.BatchNorm2d(6)
        self.wide = nn.Conv2d(6, 6, 5, padding="same", groups=6, padding_mode="reflect")
        self.down, self.head = nn.Conv2d(6, 8, 5, 2, padding=2), nn.Linear(8, classes)

    def forward(self, x):
        x = F.relu(self.wide(F.relu(self.bn(self.stem(x)))))
        return self.head(F.relu(self.down(x)).mean((2, 3)))


def own():
    with seeds.seeded(3):
        return Own()


def resnet18():
    return models.build("torchvision.models:resnet18", 4, (3, 32, 32))


def smooth_kernel(n, generator):
    """A kernel without sharp edges, (1, 1, n, n): a raised cosine times a random plane."""
    u = (2 * torch.arange(n, dtype=torch.double) + 1) / n - 1
    window = (1 + torch.cos(math.pi * u)) / 2
    a = torch.randn(3, generator=generator, dtype=torch.double)
    plane = 1 + 0.3 * (a[0] * u[:, None] + a[1] * u)
    return ((0.5 + a[2].abs()) * window[:, None] * window * plane)[None, None]


def smooth_image(n, generator, waves=8, longest=3):
    """Random waves, (1, 1, n, n), at most `longest` of them over a side."""
    u = (torch.arange(n, dtype=torch.double) + 0.5) / n
    f = torch.randint(-longest, longest + 1, (waves, 2), generator=generator).double()
    phase, a = (torch.rand(waves, generator=generator, dtype=torch.double) for _ in range(2))
    angle = 2 * math.pi * (f[:, :1, None] * u[:, None] + f[:, 1:, None] * u + phase[:, None, None])
    return ((0.5 + a)[:, None, None] * torch.cos(angle)).sum(0)[None, None]


def law_error(n, k, amplitude=True, seed=0):
    """How far conv(resize(x), W') is from resize(conv(x, W)), relative."""
    g = gen(seed)
    x, W, inside = smooth_image(12 * n, g), smooth_kernel(n, g), slice(2 * k, -2 * k)  # borders see zeros

    def conv(x, W):
        k = W.shape[-1]
        return F.conv2d(F.pad(x, ((k - 1) // 2, k // 2) * 2), W)

    left = conv(resize(x, (12 * k, 12 * k)), rescale_kernel(W, k, amplitude))[..., inside, inside]
    right = resize(conv(x, W), (12 * k, 12 * k))[..., inside, inside]
    return float((left - right).norm() / right.norm())


# Resizing


@pytest.mark.parametrize(("n", "m"), [(7, 7), (3, 5), (5, 3), (32, 16), (16, 24), (28, 16), (2, 1), (1, 4)])
def test_the_matrix_is_bilinear_interpolation_and_its_rows_are_weighted_means(n, m):
    x = torch.randn(5, n, generator=gen(), dtype=torch.double)
    image = x.view(1, 5, n, 1).repeat(2, 1, 1, 3)
    slow = F.interpolate(image, (m, 3), mode="bilinear", align_corners=False, antialias=True)
    assert_close(x @ matrix(n, m).T, slow[1, :, :, 2])
    assert_close(matrix(n, m).sum(1), torch.ones(m, dtype=torch.double))
    assert n != m or torch.equal(matrix(n, m), torch.eye(n, dtype=torch.double))


@pytest.mark.parametrize("size", [(16, 16), (24, 10), (40, 32), (1, 1), (28, 20)])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_resized_as_by_interpolation(size, channels):
    x = torch.rand(3, channels, 28, 20, generator=gen()).contiguous(memory_format=torch.channels_last)
    y = resize(x, size)
    slow = F.interpolate(
        x.repeat(1, 3 // channels, 1, 1).contiguous(),
        size,
        mode="bilinear",
        align_corners=False,
        antialias=True,
    )
    assert_close(y, slow[:, :channels])
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert y.dtype == x.dtype


# The amplitude law


@pytest.mark.parametrize(("n", "k"), [(5, 7), (7, 9), (7, 11), (11, 15), (5, 3), (5, 5)])
def test_a_smooth_image_and_kernel_resized_alike_answer_alike(n, k):
    errors = [law_error(n, k, seed=seed) for seed in range(5)]
    assert max(errors) < 0.05
    if n != k:
        without = [law_error(n, k, amplitude=False, seed=seed) for seed in range(5)]
        assert all(e == pytest.approx(abs((k / n) ** 2 - 1), abs=0.1) for e in without)


def test_an_even_size_shifts_by_half_a_pixel_and_the_smallest_kernels_lose_the_law():
    assert law_error(3, 2) > 0.1
    assert law_error(3, 2) > 3 * law_error(3, 5)


def test_rescaling_is_linear_and_the_identity_for_the_same_size():
    W, V = (torch.randn(3, 2, 5, 5, generator=gen(s), dtype=torch.double) for s in (1, 2))
    assert torch.equal(rescale_kernel(W, 5), W)
    for k in (3, 7, 8):
        assert_close(rescale_kernel(2 * W - 3 * V, k), 2 * rescale_kernel(W, k) - 3 * rescale_kernel(V, k))


@pytest.mark.parametrize("k", [3, 4, 7, 11])
def test_a_constant_kernels_response_is_kept_only_with_the_factor(k):
    W = torch.full((2, 3, 5, 5), 0.7, dtype=torch.double)
    total = 25 * 0.7
    assert_close(rescale_kernel(W, k).sum((2, 3)), torch.full((2, 3), total, dtype=torch.double))
    assert_close(
        rescale_kernel(W, k, amplitude=False).sum((2, 3)),
        torch.full((2, 3), total * k * k / 25, dtype=torch.double),
    )


def test_shrinking_does_not_alias():
    n = 9
    stripes = torch.tensor([1.0, -1.0]).repeat(5)[:n].expand(1, 1, n, n)  # the highest frequency there is
    every_third = stripes[..., 1::3]
    assert rescale_kernel(stripes, 3, amplitude=False).abs().max() < 0.3 * every_third.abs().max()


@pytest.mark.parametrize(
    "f", [lambda t: rescale_kernel(t, 7), lambda t: pi_resize(t, 3), lambda t: resize(t, (3, 8))]
)
def test_gradients_are_those_of_finite_differences(f):
    t = torch.randn(2, 2, 5, 5, generator=gen(), dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(f, t)


def test_a_gradient_follows_the_adjoint_of_what_the_weights_follow():
    """Why momentum begins anew: g = A^T g' for W' = A W, and A is not orthogonal."""
    W = torch.randn(2, 1, 3, 3, generator=gen(), dtype=torch.double, requires_grad=True)
    large = rescale_kernel(W, 5).detach().requires_grad_()
    x = torch.randn(4, 1, 9, 9, generator=gen(1), dtype=torch.double)
    F.conv2d(x, rescale_kernel(W, 5)).square().sum().backward()
    F.conv2d(x, large).square().sum().backward()
    R = matrix(3, 5)
    assert_close(W.grad, R.T @ large.grad @ R * (3 / 5) ** 2)
    assert (rescale_kernel(W.grad, 5) - large.grad).norm() > 0.3 * large.grad.norm()


# PI-resize


def slow_pi(W, k):
    """Basis patch by basis patch, with the whole matrix B and its pseudo-inverse."""
    n = W.shape[-1]
    basis = torch.eye(n * n, dtype=torch.double).view(n * n, 1, n, n)
    B = (
        F.interpolate(basis.repeat(1, 2, 1, 1), (k, k), mode="bilinear", align_corners=False, antialias=True)[
            :, 0
        ]
        .reshape(n * n, k * k)
        .T
    )
    return (torch.linalg.pinv(B.T) @ W.reshape(-1, n * n).T).T.view(*W.shape[:2], k, k), B


@pytest.mark.parametrize(("n", "k"), [(3, 5), (4, 7), (5, 7), (4, 2), (5, 3), (8, 8), (1, 4)])
def test_pi_resize_is_the_pseudo_inverse_of_resizing(n, k):
    W = torch.randn(3, 2, n, n, generator=gen(), dtype=torch.double)
    slow, B = slow_pi(W, k)
    assert_close(pi_resize(W, k), slow)
    best = torch.linalg.lstsq(
        B.T, W.reshape(-1, n * n).T
    ).solution  # of ||B^T w' - w||, what is lost in the mean over white patches
    assert_close(
        (B.T @ slow.reshape(-1, k * k).T - W.reshape(-1, n * n).T).norm(),
        (B.T @ best - W.reshape(-1, n * n).T).norm(),
    )


@pytest.mark.parametrize(("n", "k"), [(5, 7), (3, 5), (4, 8), (16, 20)])
def test_products_with_enlarged_patches_are_kept(n, k):
    W, x = torch.randn(4, 3, n, n, generator=gen()), torch.randn(6, 3, 5 * n, 5 * n, generator=gen(1))
    cut = x.unfold(2, n, n).unfold(3, n, n).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, n, n)
    large = resize(cut, (k, k)).contiguous()  # every patch by itself
    expected = F.conv2d(cut, W)
    error = (F.conv2d(large, pi_resize(W, k)) - expected).abs().max() / expected.std()
    assert error < 1e-4
    assert (F.conv2d(large, rescale_kernel(W, k)) - expected).abs().max() / expected.std() > 0.1


# Which kernels


def test_which_kernels_can_be_rescaled():
    assert kernels(network()) == {"stem": 5, "stages.0.0.conv1": 5, "stages.0.0.conv2": 5}
    assert kernels(network(), 3).keys() >= {"stages.1.0.conv2"}
    assert "stages.1.0.conv1" not in kernels(network(), 3)  # its stride is 2
    assert kernels(network(patch=2)) == {"stem": 2, "stages.0.0.conv1": 5, "stages.0.0.conv2": 5}
    assert kernels(own()) == {"stem": 7, "wide": 5}
    assert kernels(resnet18()) == {"conv1": 7}
    assert kernels(nn.Sequential(nn.Flatten(), nn.Linear(4, 2))) == {}


def test_what_is_left_alone():
    class Mine(nn.Conv2d):
        pass

    tied = nn.Conv2d(2, 2, 5, padding=2)
    again = nn.Conv2d(2, 2, 5, padding=2)
    again.weight = tied.weight
    layers = [
        nn.Conv2d(1, 2, 3),
        nn.Conv2d(2, 2, (1, 7)),
        nn.Conv2d(2, 2, 6),
        Mine(2, 2, 5),
        nn.Conv2d(2, 2, 1),
        nn.Conv2d(2, 2, 4, 4),
    ]
    model = nn.Sequential(*layers, tied, again, nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 5)))
    assert kernels(model) == {}
    assert kernels(nn.Sequential(*layers, nn.Conv2d(2, 2, 9))) == {"6": 9}


@pytest.mark.parametrize(("k", "factor", "size"), [
    (5, 0.5, 3), (5, 0.75, 3), (5, 6 / 7, 5), (7, 0.5, 3), (7, 0.75, 5), (11, 0.5, 5), (5, 0.1, 3),
    (5, 1.5, 7),
])  # fmt: skip
def test_kernels_stay_odd_and_at_least_3(k, factor, size):
    assert scaled(nn.Conv2d(1, 1, k), k, factor) == size


def test_patches_follow_by_whole_pixels():
    patch = nn.Conv2d(1, 1, 16, 16)
    assert [scaled(patch, 16, f) for f in (0.5, 0.75, 0.01, 1.1)] == [8, 12, 2, 18]


# Surgery


@pytest.mark.parametrize(("conv", "size", "padding"), [
    (nn.Conv2d(2, 3, 5, padding=2), 7, (3, 3)),
    (nn.Conv2d(2, 3, 5), 3, (0, 0)),
    (nn.Conv2d(2, 3, 7, padding=3, dilation=1), 3, (1, 1)),
    (nn.Conv2d(2, 3, 5, padding="same"), 9, "same"),
    (nn.Conv2d(2, 4, 5, padding=2, padding_mode="reflect", groups=2), 3, (1, 1)),
    (nn.Conv2d(2, 3, 5, padding="same", padding_mode="circular"), 7, "same"),
    (nn.Conv2d(2, 3, 7, 2, padding=3), 5, (2, 2)),
    (nn.Conv2d(2, 3, 5, padding=4, dilation=2), 3, (2, 2)),
])  # fmt: skip
def test_padding_follows_the_kernel(conv, size, padding):
    model, x = nn.Sequential(copy.deepcopy(conv)), torch.randn(2, 2, 24, 24, generator=gen())
    before = model(x)
    old = conv.kernel_size[0]
    assert rescale_(model, {"0": size}) == {"0": (old, size)}
    assert model[0].kernel_size == (size, size)
    assert model[0].padding == padding
    if conv.padding != (0, 0):
        assert model(x).shape == before.shape
    fresh = nn.Conv2d(
        2,
        conv.out_channels,
        size,
        conv.stride,
        model[0].padding,
        conv.dilation,
        conv.groups,
        True,
        conv.padding_mode,
    )
    fresh.load_state_dict(model[0].state_dict())
    assert torch.equal(model(x), fresh(x))


def test_a_rescaled_layer_obeys_the_law():
    x = smooth_image(60, gen()).repeat(1, 2, 1, 1)
    model = nn.Sequential(nn.Conv2d(2, 4, 5, padding=2)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.cat([smooth_kernel(5, gen(i)) for i in range(8)]).view(4, 2, 5, 5))
    right = resize(model(x), (84, 84)).detach()
    rescale_(model, 7)
    left = model(resize(x, (84, 84))).detach()
    inside = slice(14, -14)
    assert (left - right)[..., inside, inside].norm() < 0.05 * right[..., inside, inside].norm()


def test_a_patch_embedding_is_pi_resized_and_its_stride_follows():
    model = network(patch=4, kernels=None)
    W = model.stem.weight.detach().clone()
    assert rescale_(model, 0.5) == {"stem": (4, 2)}
    assert (model.stem.kernel_size, model.stem.stride, model.stem.padding) == ((2, 2), (2, 2), (0, 0))
    assert_close(model.stem.weight.detach(), pi_resize(W, 2))
    assert model.stem(torch.zeros(1, 1, 16, 16)).shape[2:] == (8, 8)


def step(model, optimizer, side=8):
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(8, 1, side, side, generator=gen(5))), torch.arange(8) % 4).backward()
    optimizer.step()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_optimizer_holds_the_new_kernels_with_momentum_begun_anew_and_the_others_with_theirs(layout):
    model = network().to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    step(model, optimizer)
    before = {n: optimizer.state[p]["momentum_buffer"].clone() for n, p in model.named_parameters()}
    order = [n for p in optimizer.param_groups[0]["params"] for n, q in model.named_parameters() if p is q]
    done = rescale_(model, 3, optimizer)
    assert set(done) == set(kernels(network()))
    assert [
        n for p in optimizer.param_groups[0]["params"] for n, q in model.named_parameters() if p is q
    ] == order
    assert set(optimizer.state) == set(model.parameters())
    for name, p in model.named_parameters():
        momentum = optimizer.state[p]["momentum_buffer"]
        if name.removesuffix(".weight") in done:
            assert momentum.shape == p.shape
            assert not momentum.any()
        else:
            assert torch.equal(momentum, before[name])
    W = model.stem.weight.detach().clone()
    step(model, optimizer)
    assert not torch.equal(model.stem.weight, W)


def test_adam_begins_anew_with_its_count_of_steps():
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(20):
        step(model, optimizer)
    rescale_(model, 3, optimizer)
    W = model.stem.weight.detach().clone()
    step(model, optimizer)
    assert optimizer.state[model.stem.weight]["step"] == 1
    assert (model.stem.weight - W).abs().max() < 1.01e-3  # a first step is lr at most
    assert optimizer.state[model.head.weight]["step"] == 21


def test_older_graphs_live_on():
    model = network()
    loss = model(torch.randn(2, 1, 8, 8, generator=gen())).sum()
    old = model.stem.weight
    rescale_(model, 7)
    loss.backward()
    assert old.grad is not None
    assert model.stem.weight.grad is None


def test_what_rescale_refuses():
    with pytest.raises(NoEffect, match="every kernel has its size already"):
        rescale_(network(), 5)
    with pytest.raises(NoEffect, match="ResNet: no kernel of at least 5 x 5 with stride 1"):
        rescale_(network(kernels=None), 7)
    with pytest.raises(BadInput, match="stem cannot have size 4: an even kernel"):
        rescale_(network(), 4)
    with pytest.raises(BadInput, match="it must be above 0"):
        rescale_(network(), -0.5)
    with pytest.raises(BadInput, match=r"unknown kernel that can be rescaled 'stages\.1\.0\.conv1'"):
        rescale_(network(), {"stages.1.0.conv1": 5})


def test_torchvisions_stem_is_rescaled_and_reads_smaller_images():
    model = resnet18()
    assert rescale_(model, 0.5) == {"conv1": (7, 3)}
    assert (model.conv1.padding, model.conv1.stride) == ((1, 1), (2, 2))
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 4)
    assert rescale_(model, {"conv1": 7}) == {"conv1": (3, 7)}
    assert model.conv1.padding == (3, 3)


# BatchNorm's statistics


def test_statistics_are_the_means_over_the_batches():
    model = nn.Sequential(
        nn.BatchNorm2d(2, momentum=0.3),
        nn.ReLU(),
        nn.BatchNorm2d(2, affine=False),
        nn.BatchNorm2d(2, track_running_stats=False),
        nn.BatchNorm2d(2),
    )
    xs = [torch.randn(4, 2, 3, 3, generator=gen(s)) * 2 + s for s in range(3)]
    model[0](torch.randn(4, 2, 3, 3) + 9)
    model[4].eval()  # its user holds its statistics
    assert recalibrate_(model, xs) == 2
    assert_close(model[0].running_mean, torch.stack([x.mean((0, 2, 3)) for x in xs]).mean(0))
    assert_close(model[0].running_var, torch.stack([x.var((0, 2, 3)) for x in xs]).mean(0))
    hidden = [F.relu(F.batch_norm(x, None, None, model[0].weight, model[0].bias, training=True)) for x in xs]
    assert_close(model[2].running_mean, torch.stack([h.mean((0, 2, 3)) for h in hidden]).mean(0).detach())
    assert torch.equal(model[4].running_var, torch.ones(2))
    assert [m.training for m in model] == [True] * 4 + [False]
    assert model[0].momentum == 0.3
    with pytest.raises(NoEffect, match="no BatchNorm with running statistics"):
        recalibrate_(nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False)), xs)


def test_statistics_survive_a_model_that_fails():
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Linear(7, 1))
    with pytest.raises(RuntimeError):
        recalibrate_(model.eval(), [torch.randn(2, 2, 3, 3)])
    assert (model[0].momentum, model[0].training) == (0.1, False)


# The schedule


def test_the_schedule_in_steps_pixels_and_kernels():
    m = KernelRescaling(schedule=SCHEDULE, multiple=8)
    assert m.phases((3, 32, 32), 100) == [(0, (16, 16), 0.5), (40, (24, 24), 0.75), (70, (32, 32), 1.0)]
    assert [p[:2] for p in m.phases((1, 28, 28), 10)] == [(0, (16, 16)), (4, (24, 24)), (7, (28, 28))]
    assert [p[1] for p in m.phases((3, 48, 20), 10)] == [(24, 8), (32, 16), (48, 20)]
    assert [p[1] for p in KernelRescaling(schedule=SCHEDULE).phases((3, 3, 2), 10)] == [
        (2, 1),
        (2, 2),
        (3, 2),
    ]
    own_kernels = KernelRescaling(schedule=((0.5, 1.0, 0.5), (0.25, 1.5, 1.2), (0.25, 1, 1)))
    assert own_kernels.phases((3, 32, 32), 8) == [(0, (32, 32), 0.5), (4, (48, 48), 1.2), (6, (32, 32), 1)]
    assert [p[2] for p in KernelRescaling(schedule=SCHEDULE, kernels=False).phases((3, 32, 32), 100)] == [
        1,
        1,
        1,
    ]
    assert KernelRescaling(schedule=[[0.5, 0.5], [0.5, 1]]) == KernelRescaling(
        schedule=((0.5, 0.5), (0.5, 1))
    )  # as it comes from JSON
    assert hash(KernelRescaling(schedule=[[0.5, 0.5], [0.5, 1]]))


@dataclass(frozen=True)
class Look(Method):
    """Notes what every step saw."""

    seen: list = field(default_factory=list, hash=False, compare=False, repr=False)

    def on_batch(self, run, x, y):
        stem = run.model.get_submodule("stem")
        momentum = run.optimizer.state[stem.weight]["momentum_buffer"]
        now = dict(size=tuple(x.shape[2:]), kernel=stem.kernel_size[0], lr=run.lr, dtype=x.dtype)
        now |= dict(momentum=float(momentum.abs().sum()), stride=stem.stride[0])
        self.seen.append({**now, "layout": x.is_contiguous(memory_format=torch.channels_last)})
        return x, y


def seen(method, model=None, recipe=RECIPE, data=DATA, **options):
    look, model = Look(), model or network()
    history = train(model, data, recipe, [method, look], **options)
    return look.seen, history, model


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_follows_the_schedule_and_ends_at_full_size(precision):
    recipe = Recipe(epochs=5, batch_size=32, precision=precision, memory_format="channels_last")
    steps, history, model = seen(KernelRescaling(schedule=SCHEDULE), recipe=recipe)
    assert [s["size"] for s in steps] == [(4, 4)] * 8 + [(6, 6)] * 6 + [(8, 8)] * 6
    assert [s["kernel"] for s in steps] == [3] * 14 + [5] * 6
    assert [i for i, s in enumerate(steps) if s["momentum"] == 0] == [
        0,
        14,
    ]  # the rescaled stem's begins anew
    assert all(s["layout"] and s["dtype"] == torch.float32 for s in steps)
    assert kernels(model) == kernels(network())
    assert models.describe(model) == models.describe(network())
    assert {k for k in history.kinds if k.startswith("step")} == {"step", "step at 4 x 4", "step at 6 x 6"}
    assert history.kinds["reconfigure"]["seconds"] > 0  # on the clock
    assert all(
        history.kinds[k]["count"] >= n for k, n in (("step at 4 x 4", 8), ("step at 6 x 6", 6), ("step", 6))
    )
    assert [e["size"] for e in history.events] == [[4, 4], [6, 6], [8, 8]]
    assert [e["kernels"] for e in history.events] == [
        dict.fromkeys(kernels(network()), 3),
        {},
        kernels(network()),
    ]
    assert [e["norms"] for e in history.events] == [0, 6, 6]


def test_images_only_leaves_kernels_alone_and_costs_more_than_with_them():
    steps, images, _ = seen(KernelRescaling(schedule=SCHEDULE, kernels=False))
    assert {s["kernel"] for s in steps} == {5}
    assert [s["size"] for s in steps][::7] == [(4, 4), (4, 4), (8, 8)]
    assert [i for i, s in enumerate(steps) if s["momentum"] == 0] == [0]
    both = seen(KernelRescaling(schedule=SCHEDULE))[1]
    full = train(network(), DATA, RECIPE)
    assert both.flops < images.flops < full.flops


def test_flops_are_those_of_the_phases():
    m = KernelRescaling(schedule=((0.5, 0.5), (0.5, 1.0)), kernels=False)
    history = seen(m, model=network(kernels=None))[1]
    full = train(network(kernels=None), DATA, RECIPE)
    assert history.flops == pytest.approx(full.flops * (0.5 + 0.5 / 4), rel=0.05)


def test_with_and_without_the_factor_are_different_trainings_and_full_size_throughout_is_the_third():
    trained = [
        seen(m)[2]
        for m in (KernelRescaling(schedule=SCHEDULE), KernelRescaling(schedule=SCHEDULE, amplitude=False))
    ]
    plain = network()
    train(plain, DATA, RECIPE)
    for a, b in itertools.combinations([*trained, plain], 2):
        assert (a.stem.weight - b.stem.weight).abs().max() > 1e-3


def test_evaluation_sees_full_size_images_and_the_model_as_it_stands():
    found = []

    class Evaluate(Method):
        def on_evaluation(self, run):
            found.append(
                (run.step, run.model.stem.kernel_size[0], evaluate(run.model, DATA, "validation", "fp32"))
            )

    look = Evaluate()
    history = train(network(), DATA, RECIPE, [KernelRescaling(schedule=SCHEDULE), look])
    assert [(r["loss"], r["accuracy"]) for r in history.rows] == [f[2] for f in found]
    assert {k for s, k, _ in found if 0 < s < 14} == {3}
    assert {k for s, k, _ in found if s >= 14} == {5}


def test_new_statistics_are_used_after_a_switch_and_cost_other_methods_no_draw():
    many = dict(schedule=((0.9, 0.5), (0.1, 1.0)))
    orders = []

    class Order(Method):
        def on_batch(self, run, x, y):
            orders[-1].append(y.tolist())
            return x, y

    results = {}
    for batches in (0, 2):
        orders.append([])
        model = network()
        train(model, DATA, RECIPE, [KernelRescaling(**many, recalibrate=batches), Order()], evaluations=1)
        results[batches] = model.bn.running_var.clone()
    assert orders[0] == orders[1]
    assert not torch.equal(results[0], results[2])


def test_the_learning_rate_goes_on():
    plain = [s["lr"] for s in seen(KernelRescaling(schedule=SCHEDULE))[0]]
    assert plain == pytest.approx([RECIPE.lr_at(i, 20) for i in range(20)])


def test_small_images_are_the_large_ones_resized():
    small = shrunk(DATA, (4, 6))
    assert (small.shape, small.train.x.dtype) == ((1, 4, 6), torch.uint8)
    mean = DATA.train.x.float().mean((1, 2))
    assert (small.train.x.float().mean((1, 2)) - mean).abs().max() < 8


class Batch(Method):
    """Keep the batches of a run, and the weight decay of their steps."""

    def on_fit_start(self, run):
        run.state[self] = None
        FOUND.clear()

    def on_batch(self, run, x, y):
        decay = {g["weight_decay"] for g in run.optimizer.param_groups}
        FOUND.append((x.clone(), run.batches.index.clone(), decay))
        return x, y


FOUND = []
HALVES = dict(schedule=((0.5, 0.5), (0.5, 1.0)), kernels=False)
COLOURED = synthetic(images=200, size=16)
COLOURED = type(COLOURED)(**{**vars(COLOURED), "pad": 2, "flip": True})


def batches_of(method, recipe=RECIPE):
    model = models.build("resnet", 4, (1, 16, 16), widths=(4, 6), blocks=(1, 1))
    history = train(model, COLOURED, recipe, [method, Batch()], seed=3)
    return list(FOUND), history, model


def lies_in(window, image):
    """Whether a window (C, h, w) is a cut-out of an image, or of its mirror image."""
    (_, h, w), (_, H, W) = window.shape, image.shape
    places = itertools.product(range(H - h + 1), range(W - w + 1), (image, image.flip(2)))
    return any(torch.equal(window, part[:, i : i + h, j : j + w]) for i, j, part in places)


def test_small_batches_are_the_resized_images_at_the_same_places_of_the_same_order():
    """Cut from the table: the slow way resizes each image, pads it and looks where the crop could lie."""
    found, _, _ = batches_of(KernelRescaling(**HALVES))
    plain, _, _ = batches_of(Quiet())
    assert [i.tolist() for _, i, _ in found] == [i.tolist() for _, i, _ in plain]
    small = shrunk(COLOURED, (8, 8))
    assert small.pad == 1
    for x, index, _ in found[:3]:
        assert x.shape[2:] == (8, 8)
        images = F.pad(small.normalize(small.train.x[index]), [1] * 4, mode="reflect")
        assert all(lies_in(w, image) for w, image in zip(x, images, strict=True))
    for (x, *_), (y, *_) in zip(found[10:], plain[10:], strict=True):
        assert torch.equal(x, y)  # of full size nothing is changed


class Quiet(Method):
    """Nothing."""


def test_the_table_is_the_slow_way_to_within_rounding():
    small = shrunk(COLOURED, (8, 8)).normalize(shrunk(COLOURED, (8, 8)).train.x[:20])
    slow = COLOURED.normalize(COLOURED.train.x[:20])
    slow = F.interpolate(slow, (8, 8), mode="bilinear", antialias=True)
    assert (small - slow).abs().max() < 0.51 / 255 / min(COLOURED.std) + 1e-4


def test_without_crops_small_images_are_whole_and_those_of_full_size_are_cropped():
    found, _, _ = batches_of(KernelRescaling(**HALVES, crops=False))
    small = shrunk(COLOURED, (8, 8))
    for x, index, _ in found[:10]:
        whole = small.normalize(small.train.x[index])
        assert all(lies_in(w, image) for w, image in zip(x, whole, strict=True))
    whole = COLOURED.normalize(COLOURED.train.x[found[10][1]])
    assert not all(lies_in(w, image) for w, image in zip(found[10][0], whole, strict=True))


def test_weight_decay_grows_with_the_images():
    recipe = Recipe(epochs=5, batch_size=32, precision="fp32", weight_decay=1e-3)
    how = dict(schedule=SCHEDULE, kernels=False)
    found, _, weak = batches_of(KernelRescaling(**how, decay=0.2), recipe)
    decays = [next(iter(d)) for *_, d in found]
    assert decays == pytest.approx([2e-4] * 8 + [6e-4] * 6 + [1e-3] * 6)
    _, _, plain = batches_of(KernelRescaling(**how), recipe)
    norms = [sum(p.square().sum() for p in m.parameters()).item() for m in (weak, plain)]
    assert norms[0] > norms[1]


def test_the_last_phase_sees_cut_outs_and_evaluation_whole_images():
    found, history, model = batches_of(KernelRescaling(**HALVES, cut=0.75))
    assert {x.shape[2:] for x, *_ in found[10:]} == {(12, 12)}
    whole, places = COLOURED.normalize(COLOURED.train.x), set()
    for x, index, _ in found[10:]:
        for window, image in zip(x, whole[index], strict=True):
            assert lies_in(window, image)
            places |= {
                (i, j)
                for i in range(5)
                for j in range(5)
                if torch.equal(window, image[:, i : i + 12, j : j + 12])
            }
    assert {i for i, _ in places} == {j for _, j in places} == set(range(5))  # all the room there is
    assert {"step at 8 x 8", "step at 12 x 12"} <= history.kinds.keys()
    assert history.kinds["reconfigure"]["seconds"] > 0
    # at the end BatchNorm's statistics are those of whole images
    before = model.bn.running_var.clone()
    _, _, stale = batches_of(KernelRescaling(**HALVES, cut=0.75, recalibrate=0))
    assert not torch.equal(before, stale.bn.running_var)
    assert history.rows[-1]["accuracy"] == evaluate(model, COLOURED, "validation", "fp32")[1]


def test_a_users_network_and_images_that_are_not_square():
    wide = synthetic(images=200, size=16)
    narrow = copy.copy(wide)
    for name in ("train", "decide", "validation", "test"):
        split = getattr(wide, name)
        object.__setattr__(narrow, name, type(split)(x=split.x[:, :, :12].contiguous(), y=split.y))
    steps, _, model = seen(KernelRescaling(schedule=SCHEDULE), model=own(), data=narrow)
    assert [s["size"] for s in steps][::6] == [(8, 6), (8, 6), (12, 9), (16, 12)]
    assert [s["kernel"] for s in steps] == [3] * 8 + [5] * 6 + [7] * 6
    assert kernels(model) == {"stem": 7, "wide": 5}


def test_a_patch_stem_keeps_its_number_of_patches():
    steps, _, model = seen(
        KernelRescaling(schedule=((0.5, 0.5), (0.5, 1.0))), model=network(patch=4, kernels=None)
    )
    assert [(s["size"], s["kernel"], s["stride"]) for s in steps] == [((4, 4), 2, 2)] * 10 + [
        ((8, 8), 4, 4)
    ] * 10
    assert model.stem.stride == (4, 4)


@pytest.mark.parametrize("make", [network, own, lambda: network(patch=4)])
@pytest.mark.parametrize("at", [5, 9, 14, 17])
def test_a_run_that_is_interrupted_goes_on_bit_for_bit(make, at, tmp_path):
    @dataclass(frozen=True)
    class Stop(Method):
        done: list = field(default_factory=list, hash=False, compare=False, repr=False)

        def on_batch(self, run, x, y):
            if run.step == at and not self.done:
                self.done.append(1)
                raise KeyboardInterrupt
            return x, y

    method = KernelRescaling(schedule=SCHEDULE, decay=0.3, crops=False)
    whole = make()
    history = train(whole, DATA, RECIPE, [method, Stop(done=[1])])
    stop, resumed = Stop(), make()
    with pytest.raises(KeyboardInterrupt):
        train(make(), DATA, RECIPE, [method, stop], checkpoint=tmp_path / "run.pt")
    again = train(resumed, DATA, RECIPE, [method, stop], checkpoint=tmp_path / "run.pt")
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in whole.state_dict().items())
    assert again.events == history.events
    assert again.flops == history.flops
    assert [r["accuracy"] for r in again.rows] == [r["accuracy"] for r in history.rows]
    assert set(again.kinds) == set(history.kinds)
    assert models.kernels(resumed) == models.kernels(make())


def test_a_run_is_resumed_among_cut_outs(tmp_path):
    method, file, two = KernelRescaling(**HALVES, cut=0.75), tmp_path / "run.pt", []
    recipe = Recipe(epochs=5, batch_size=32, precision="fp32")

    @dataclass(frozen=True)
    class Stop(Method):
        at: int = 0

        def on_batch(self, run, x, y):
            if run.step == self.at and len(two) == 1:
                raise KeyboardInterrupt
            return x, y

    for _ in range(3):
        two.append(models.build("resnet", 4, (1, 16, 16), seed=1, widths=(4, 6), blocks=(1, 1)))
        with contextlib.suppress(KeyboardInterrupt):
            train(two[-1], COLOURED, recipe, [method, Stop(at=17)], checkpoint=file)
        if len(two) == 2:
            file.unlink()
    states = [net.state_dict() for net in two]
    assert all(torch.equal(v, states[2][k]) for k, v in states[1].items())


def test_a_run_that_diverges_is_left_at_full_size():
    model = network()
    history = train(
        model,
        DATA,
        Recipe(epochs=5, batch_size=32, precision="fp32", lr=1e30),
        [KernelRescaling(schedule=SCHEDULE)],
    )
    assert history.diverged
    assert kernels(model) == kernels(network())
    assert history.step_seconds > 0


# Refusals


def test_schedules_that_cannot_be_are_refused():
    half = (0.5, 0.5)
    for schedule in (
        (),
        (half,),
        (half, (0.4, 1.0)),
        (half, (0.5, 0.9)),
        ((0.5,), (0.5, 1.0)),
        ((1.5, 0.5), (-0.5, 1.0)),
        (1, 2),
    ):
        with pytest.raises(BadInput, match="kernel rescaling: the s"):
            KernelRescaling(schedule=schedule)
    for settings in (dict(multiple=0), dict(recalibrate=-1)):
        with pytest.raises(BadInput, match="multiple is at least 1"):
            KernelRescaling(**settings)
    with pytest.raises(BadInput, match="of 2 steps a phase of the schedule gets none"):
        train(network(), DATA, Recipe(epochs=0.5, batch_size=32), [KernelRescaling(schedule=SCHEDULE)])


def test_a_head_on_a_flattened_map_is_refused_before_a_step_is_trained():
    flat = nn.Sequential(nn.Conv2d(1, 4, 5, padding=2), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4))
    before = copy.deepcopy(flat.state_dict())
    for method in (KernelRescaling(schedule=SCHEDULE), KernelRescaling(schedule=SCHEDULE, kernels=False)):
        with pytest.raises(BadInput, match=r"cannot take images .* A head on a flattened map"):
            train(flat, DATA, RECIPE, [method])
    assert all(torch.equal(v, before[k]) for k, v in flat.state_dict().items())


def test_images_that_would_shrink_to_nothing_are_refused():
    deep = nn.Sequential(
        nn.Conv2d(1, 4, 5, padding=2),
        nn.MaxPool2d(4),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 4),
    )
    with pytest.raises(BadInput, match=r"cannot take images of C, H, W = \(1, 4, 4\)"):
        train(deep, DATA, RECIPE, [KernelRescaling(schedule=SCHEDULE)])


def test_nothing_to_rescale_is_no_effect():
    with pytest.raises(
        NoEffect, match=r"ResNet has no kernel of at least 5 x 5 .* kernels=False resizes the images only"
    ):
        train(network(kernels=None), DATA, RECIPE, [KernelRescaling(schedule=SCHEDULE)])
    with pytest.raises(NoEffect, match="every phase of the schedule has images of full size, 8 x 8"):
        train(network(), DATA, RECIPE, [KernelRescaling(schedule=SCHEDULE, kernels=False, multiple=8)])
