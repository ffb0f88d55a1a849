"""Wavelets: transforms against PyWavelets, mirrored and cut bands against mirrored and cut images, surgery,
training.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import pywt
import torch
import torch.nn.functional as F
from torch import nn

from effilib import models
from effilib.data import synthetic
from effilib.dataset import Batches
from effilib.errors import BadInput, NoEffect
from effilib.methods.wavelet import (
    FILTERS,
    INFO,
    analysis,
    butterfly,
    even,
    flip_bands,
    haar,
    inverse_haar,
    matrices,
    synthesis,
    wavelet_pool,
)  # fmt: skip
from effilib.methods.wavelet_bands import precompute
from effilib.methods.wavelet_stem import (
    KINDS,
    FrontEnd,
    WaveletStem,
    haar_matrix,
    keep_sizes_,
    moments,
    sizes,
    space_to_depth,
    wavelet_stem_,
)  # fmt: skip
from effilib.recipe import Recipe
from effilib.training import train

WAVELETS = pytest.mark.parametrize("name", FILTERS)
LONGER = Recipe(epochs=10, batch_size=32, lr=0.05, precision="fp32")
RECIPE = Recipe(epochs=2, batch_size=32, lr=0.05, precision="fp32")


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# The transform


@pytest.mark.parametrize("name", FILTERS)
def test_the_filters_are_pywavelets(name):
    w = pywt.Wavelet(name)
    low, dual = FILTERS[name]
    assert np.allclose(low, w.dec_lo, atol=1e-12)
    assert np.allclose(dual, w.rec_lo, atol=1e-12)
    assert np.allclose([(-1) ** (k + 1) * v for k, v in enumerate(dual)], w.dec_hi, atol=1e-12)


@WAVELETS
@pytest.mark.parametrize("size", [(8, 8), (16, 10), (28, 28), (7, 9), (5, 32)], ids=str)
def test_bands_are_those_of_pywavelets(name, size):
    x = draw(2, 3, *size)
    A, (H, V, D) = pywt.dwt2(x.numpy(), name, mode="periodization")
    expected = np.concatenate([A, H, V, D], 1)
    got = analysis(x, name)
    assert got.shape == (2, 12, -(-size[0] // 2), -(-size[1] // 2))
    assert np.allclose(got.numpy(), expected, atol=1e-10)


@WAVELETS
@pytest.mark.parametrize("size", [(2, 2), (4, 6), (32, 32), (6, 28)], ids=str)
def test_reconstruction_is_perfect_and_pywavelets_inverse(name, size):
    x = draw(2, 3, *size)
    bands = analysis(x, name)
    assert torch.allclose(synthesis(bands, name), x, atol=1e-10)
    if min(size) >= 4:
        A, H, V, D = (b.numpy() for b in bands.chunk(4, 1))
        assert np.allclose(pywt.idwt2((A, (H, V, D)), name, mode="periodization"), x.numpy(), atol=1e-10)


@WAVELETS
def test_energy_is_kept_by_orthonormal_wavelets_and_the_adjoint_is_their_inverse(name):
    x = draw(2, 2, 16, 12).requires_grad_()
    bands = analysis(x, name)
    dy = draw(*bands.shape, seed=1)
    (dx,) = torch.autograd.grad(bands, x, dy)
    orthonormal = name in ("haar", "db2")
    assert torch.allclose(dx, synthesis(dy, name)) == orthonormal
    assert (abs(bands.square().sum() / x.square().sum() - 1).item() < 1e-10) == orthonormal
    T, S = matrices(name, 16)
    assert torch.allclose(S @ T, torch.eye(16, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(S, T.T, atol=1e-10) == orthonormal


def test_haar_by_hand_and_the_names_of_the_bands():
    def bands(*values):
        return haar(torch.tensor(values, dtype=torch.float32).view(1, 1, 2, 2)).flatten().tolist()

    assert bands(1, 1, 1, 1) == [2, 0, 0, 0]
    assert bands(1, -1, -1, 1) == [0, 0, 0, 2]  # checkerboard
    assert bands(1, 1, -1, -1) == [0, 2, 0, 0]  # a horizontal edge
    assert bands(1, -1, 1, -1) == [0, 0, 2, 0]


def test_three_ways_to_compute_haar_agree():
    x = draw(2, 3, 8, 10)
    T_h, T_w = matrices("haar", 8)[0], matrices("haar", 10)[0]
    both = T_h @ x @ T_w.T
    A, V = both[..., :4, :5], both[..., :4, 5:]
    H, D = both[..., 4:, :5], both[..., 4:, 5:]
    assert torch.allclose(haar(x), torch.cat([A, H, V, D], 1))
    assert torch.allclose(haar(x), torch.einsum("bp,nphw->nbhw", haar_matrix(3).double(), space_to_depth(x)))
    s2d = (
        F.pixel_unshuffle(x, 2).unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2)
    )  # PyTorch's, its channels in our order
    assert torch.equal(space_to_depth(x), s2d)
    whole = torch.randint(0, 256, (2, 3, 8, 10), generator=torch.Generator().manual_seed(0))
    assert torch.equal(butterfly(whole.to(torch.int16)).float() / 2, haar(whole.float()))  # exact in integers


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_haar_in_either_layout_and_inverse(layout):
    x = draw(3, 1, 6, 4, dtype=torch.float32).contiguous(memory_format=layout)
    assert torch.allclose(inverse_haar(haar(x)), x, atol=2e-7)
    assert haar(x).shape == (3, 4, 3, 2)
    for c in (1, 3):
        y = draw(2, c, 8, 8, dtype=torch.float32)
        assert torch.equal(haar(y.contiguous(memory_format=layout)), haar(y))


def test_odd_sizes_repeat_the_last_row_and_column():
    x = torch.ones(1, 1, 5, 7)
    A, *details = haar(x).chunk(4, 1)
    assert A.shape == (1, 1, 3, 4)
    assert (A == 2).all()
    assert not torch.cat(details).any()
    assert torch.equal(
        inverse_haar(haar(draw(1, 2, 5, 7)))[..., :5, :7],
        inverse_haar(haar(even(draw(1, 2, 5, 7))))[..., :5, :7],
    )


def test_mirrored_bands_are_those_of_the_mirrored_image():
    x = draw(2, 3, 8, 10)
    assert torch.equal(flip_bands(haar(x)), haar(x.flip(-1)))
    assert not torch.allclose(haar(x).flip(-1), haar(x.flip(-1)))
    with pytest.raises(BadInput, match="db2 cannot be mirrored"):
        flip_bands(analysis(x, "db2"), "db2")


def test_an_unknown_wavelet_is_named():
    with pytest.raises(BadInput, match="unknown wavelet 'db3': choose one of haar, db2"):
        analysis(draw(1, 1, 4, 4), "db3")


# Pooling


def test_haar_pooling_is_twice_average_pooling():
    x = draw(2, 3, 12, 8)
    assert torch.allclose(wavelet_pool(x), 2 * F.avg_pool2d(x, 2))


@WAVELETS
def test_pooling_is_what_two_levels_without_the_finest_details_give(name):
    x = draw(2, 3, 16, 8)
    A, (H, V, D) = pywt.dwt2(pywt.dwt2(x.numpy(), name, mode="periodization")[0], name, mode="periodization")
    literal = pywt.idwt2((A, (H, V, D)), name, mode="periodization")
    assert np.allclose(wavelet_pool(x, name).numpy(), literal, atol=1e-10)
    assert torch.autograd.gradcheck(lambda x: wavelet_pool(x, name), (draw(1, 1, 4, 4).requires_grad_(),))


# Surgery


def shapes(model, shape):
    return [s for _, s in sizes(model, shape)]


def data(size=16, channels=3, images=160):
    return synthetic(images=images, size=size, channels=channels)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [16, 15])
def test_later_maps_keep_their_sizes(kind, channels, size):
    d = data(size, channels)
    model = models.build("resnet", 4, d.shape, widths=(8, 16, 16), blocks=(1, 1, 1))
    before = shapes(model, d.shape)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    done = wavelet_stem_(model, d, optimizer, kind=kind)
    assert done["channels"] == {"bands": 4, "space-to-depth": 4, "low": 1, "strided": 1}[kind] * channels
    assert done["strides taken out"] == ["stages.1.0.conv1", "stages.1.0.shortcut.0"]
    assert isinstance(model.stem, FrontEnd)
    after = shapes(model, d.shape)
    half = -(-size // 2)
    assert after[1:3] == [(half, half)] * 2  # the first stage's
    assert after[4] == before[4]  # the second stage's second convolution, behind which all is as before
    assert after[6:] == before[6:]
    assert models.describe(model)["stem"] == 8
    assert set(optimizer.param_groups[0]["params"]) == set(model.parameters())
    pushed = models.build("resnet", 4, d.shape, widths=(8, 16, 16), blocks=(1, 1, 1))
    assert wavelet_stem_(pushed, d, kind=kind, keep=False)["strides taken out"] == []
    assert shapes(pushed, d.shape)[-1][0] == -(-before[-1][0] // 2)


def test_what_the_stem_reads_has_mean_0_and_variance_1():
    d = data()
    model = models.build("resnet", 4, d.shape, widths=(8, 8), blocks=(1, 1))
    wavelet_stem_(model, d)
    seen = []
    model.stem.conv.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    model(d.normalize(d.train.x))
    assert seen[0].mean((0, 2, 3)).abs().max() < 1e-4
    assert (seen[0].std((0, 2, 3)) - 1).abs().max() < 1e-3
    bands = haar(d.normalize(d.train.x))
    mean, std = (v.view(1, -1, 1, 1) for v in moments(d, "bands"))
    assert torch.allclose(seen[0], (bands - mean) / std, atol=1e-5)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    raw = bands.std((0, 2, 3))
    assert (raw - 1).abs().max() > 0.02  # there was something to standardise
    model = models.build("resnet", 4, d.shape, widths=(8, 8), blocks=(1, 1))
    wavelet_stem_(model, d, standardize=False)
    assert torch.allclose(model.stem.bands(d.normalize(d.train.x)), bands, atol=1e-5)


def test_a_pooling_that_is_taken_out_leaves_widths_legible():
    d = data()
    model = models.build("vgg", 4, d.shape, widths=((8,), (16, 16)))
    before = models.describe(model)
    assert wavelet_stem_(model, d)["strides taken out"] == ["features.3"]
    assert models.describe(model) == before
    assert model(torch.zeros(2, *d.shape)).shape == (2, 4)
    assert shapes(model, d.shape)[-1] == (8, 8)


@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet18", 32), ("resnet18", 33), ("vgg11_bn", 32), ("squeezenet1_1", 64), ("densenet121", 32)],
)
def test_published_networks_of_a_user(name, size):
    d = data(size, images=40)
    model = models.build(f"torchvision.models:{name}", 4, d.shape)
    last = shapes(model, d.shape)[-1]
    done = wavelet_stem_(model, d)
    assert model(torch.zeros(2, *d.shape)).shape == (2, 4)
    assert abs(shapes(model, d.shape)[-1][0] - last[0]) <= (size % 2)
    if name == "resnet18":
        assert (done["kernel"], model.conv1.conv.stride, done["strides taken out"]) == (3, (1, 1), [])
        assert model.conv1.conv.weight.shape == (64, 12, 3, 3)


def test_what_cannot_be_done_is_said():
    d = data(8)
    flat = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 64, 4))
    with pytest.raises(NoEffect, match="no layer of Sequential has a stride of 2"):
        wavelet_stem_(flat, d)
    with pytest.raises(BadInput, match="cannot take maps of half the size"):
        wavelet_stem_(flat, d, keep=False)
    with pytest.raises(NoEffect, match="no convolution"):
        wavelet_stem_(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), d)
    with pytest.raises(BadInput, match="unknown kind of stem"):
        wavelet_stem_(flat, d, kind="haar")
    strided = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)
    )
    with pytest.raises(NoEffect, match="has a stride of 2 already"):
        wavelet_stem_(strided, d, kind="strided")


def test_an_overlapping_pooling_and_a_convolution_without_padding():
    d = data(28, 1, images=40)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 5),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1),
        nn.Conv2d(4, 4, 5),
        nn.Flatten(),
        nn.Linear(256, 4),
    )
    assert model(torch.zeros(1, 1, 28, 28)).shape == (1, 4)
    assert keep_sizes_(model, d.shape, after="0") == ["2"]
    model[2].stride = 2
    wavelet_stem_(model, d)
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 4)  # 24 -> 12 before, 14 -> 12 now
    assert model[0].conv.padding == (1, 1)


# Precomputed


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("flip", [False, True])
def test_precomputed_batches_are_bands_of_cut_and_mirrored_images(channels, flip):
    d = replace(data(8, channels), pad=2, flip=flip)
    bands = precompute(d)
    assert bands.shape == (4 * channels, 4, 4)
    assert bands.train.x.dtype == torch.int16
    g = torch.Generator().manual_seed(0)
    n = len(d.train)
    index, mirrored = torch.randperm(n, generator=g), torch.rand(n, generator=g) < 0.5
    dy, dx = (torch.randint(bands.pad + 1, (n,), generator=g) for _ in range(2))
    mirrored &= flip
    cut = Batches(d, 32, g).cut(index, 2 * dy, 2 * dx, mirrored)
    pixels = cut * torch.tensor(d.std).view(1, -1, 1, 1) + torch.tensor(d.mean).view(1, -1, 1, 1)
    expected = 2 * haar(pixels)  # of pixels in [0, 1]
    ready = bands.shuffled(32, g).cut(index, dy, dx, mirrored)
    ready = ready * torch.tensor(bands.std).view(1, -1, 1, 1) + torch.tensor(bands.mean).view(1, -1, 1, 1)
    assert torch.allclose(ready, expected, atol=1e-5)


def test_precomputed_bands_are_a_data_set():
    d = data(9, 1, images=300)  # odd
    bands = precompute(d)
    assert (bands.pad, bands.shape, bands.classes) == (1, (4, 5, 5), 4)
    few = bands.limit(64)
    assert len(few.train) == len(few.padded) == 64
    x = next(iter(few.shuffled(32, torch.Generator().manual_seed(0))))[0]
    assert x.shape == (32, 4, 5, 5)
    whole = torch.cat([x for x, _ in bands.batches(bands.train)])
    assert whole.mean((0, 2, 3)).abs().max() < 1e-3
    assert (whole.std((0, 2, 3)) - 1).abs().max() < 1e-2
    seen = {tuple(x.shape) for x, _ in bands.shuffled(32, torch.Generator(), augmentation="none")}
    assert seen == {(32, 4, 5, 5)}
    model = models.build("resnet", 4, bands.shape, widths=(8, 8), blocks=(1, 1))
    history = train(model, bands, LONGER, evaluations=1)
    assert history.accuracy > 60


# Training


@pytest.mark.parametrize("kind", KINDS)
def test_training_with_each_stem(kind):
    d = data(8, 1, images=300)
    model = models.build("resnet", 4, d.shape, widths=(8, 8), blocks=(1, 1))
    plain = train(models.build("resnet", 4, d.shape, widths=(8, 8), blocks=(1, 1)), d, LONGER, evaluations=1)
    history = train(model, d, LONGER, [WaveletStem(kind=kind)], evaluations=1)
    assert history.flops < plain.flops
    assert history.accuracy > 60
    assert isinstance(model.stem, FrontEnd)
    assert "strides taken out: stages.1.0.conv1" in history.events[0]["text"]


def test_the_same_seed_gives_the_same_weights_and_other_layers_start_alike():
    d = data(8, 1, images=300)

    def run(seed):
        model = models.build("resnet", 4, d.shape, seed=seed, widths=(8, 8), blocks=(1, 1))
        return train(model, d, RECIPE, [WaveletStem()], seed, evaluations=1).rows[-1]["loss"]

    assert run(0) == run(0) != run(1)


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_it_resumes_bit_for_bit(tmp_path, share):
    d, methods = data(8, 1, images=300), [WaveletStem(share=share)]

    def build():
        return models.build("vgg", 4, d.shape, widths=((8,), (8, 8)))

    class Stop(Exception):
        pass

    def stop(row):
        if row["epoch"] > 1.5:
            raise Stop

    whole = train(build(), d, RECIPE, methods)
    file = tmp_path / "run.pt"
    with pytest.raises(Stop):
        train(build(), d, RECIPE, methods, checkpoint=file, progress=stop)
    again = train(build(), d, RECIPE, methods, checkpoint=file)
    assert [r["loss"] for r in again.rows] == [r["loss"] for r in whole.rows]


def test_after_its_share_the_stem_reads_whole_images_by_the_filters_of_the_low_band():
    d = data(8, 3, images=300)
    model = models.build("resnet", 4, d.shape, widths=(8, 8), blocks=(1, 1))
    history = train(model, d, RECIPE, [WaveletStem(share=0.5)], evaluations=1)
    behind = train(
        models.build("resnet", 4, d.shape, widths=(8, 8), blocks=(1, 1)), d, RECIPE, [WaveletStem()],
        evaluations=1,
    )  # fmt: skip
    plain = train(models.build("resnet", 4, d.shape, widths=(8, 8), blocks=(1, 1)), d, RECIPE, evaluations=1)
    assert behind.flops < history.flops < plain.flops
    half, whole = (
        next(e["step"] for e in history.events if word in e["text"]) for word in ("reads 12", "whole")
    )
    assert (half, whole) == (0, history.steps // 2 - 1)
    assert model.stages[1][0].conv1.stride == (2, 2)
    x = d.normalize(d.test.x[:4])
    mean, std = moments(d, "bands")  # A of a flat patch is twice its pixel
    read = (2 * x - mean[:3].view(-1, 1, 1)) / std[:3].view(-1, 1, 1)
    expected = F.conv2d(read, model.stem.conv.weight[:, :3], padding=1)
    assert torch.allclose(model.stem(x), expected, atol=1e-5)
    flat = torch.ones(1, 3, 8, 8)  # what it read before on half as many pixels
    inside = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    model.stem.whole = False
    low = F.conv2d(model.stem.bands(flat)[:, :3], model.stem.conv.weight[:, :3], padding=1)
    model.stem.whole = True
    assert torch.allclose(model.stem(flat)[inside][..., :2, :2], low[inside], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS[2:])
def test_a_share_needs_a_low_band(kind):
    with pytest.raises(BadInput, match="bands and low"):
        WaveletStem(kind=kind, share=0.5)


def test_a_share_needs_a_first_convolution_without_a_stride():
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    with pytest.raises(BadInput, match="leave share at 1"):
        train(net, data(8, 1), RECIPE, [WaveletStem(share=0.5)])
    assert type(net[0]) is nn.Conv2d


def test_a_space_to_depth_stem_can_be_any_haar_stem():
    d = data(8, 3)
    conv = nn.Conv2d(12, 5, 3, padding=1, bias=False).double()
    x = d.normalize(d.train.x[:4]).double()
    mix = haar_matrix(3).double()  # space-to-depth -> bands
    other = torch.einsum("obij,bp->opij", conv.weight, mix)
    assert torch.allclose(conv(haar(x)), F.conv2d(space_to_depth(x), other, padding=1))
    assert torch.allclose(
        mix @ mix.T, torch.eye(12, dtype=torch.float64)
    )  # orthogonal: nothing is lost, nothing weighs more


def test_info_says_what_it_is():
    assert INFO.chapter == "7.3"
    assert math.isclose(sum(v * v for v in FILTERS["db2"][0]), 1)
