"""Networks: shapes, descriptions that build the same network again, seeds, and what a user's own network can
get wrong.
"""

import copy
import json
import shutil
from collections import namedtuple
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from effilib import models, networks, seeds
from effilib.data import load
from effilib.errors import BadInput, NotApplicable
from effilib.evaluation import evaluate
from effilib.models import build, describe
from effilib.recipe import Recipe, resolve_layout
from effilib.training import train

SHAPES = [(1, 28, 28), (3, 32, 32), (3, 9, 12)]  # 9: less would shrink to nothing in the speed run's
OWN = '''
import torch
from torch import nn

def head(features, classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, classes))

def without_its_weights(n):
    return torch.load("missing.pt")

def scripted(n):
    return torch.jit.script(head(3, n))

def compiled(n):
    return torch.compile(head(3, n))

def by_position(n):
    return nn.Sequential(nn.Conv2d(3, 4, 3), head(4, n))

def by_classes(in_channels, classes):
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), head(4, classes))

def by_num_classes(in_chans=3, num_classes=1000):
    return nn.Sequential(nn.Conv2d(in_chans, 4, 3), head(4, num_classes))

def by_keywords(**kwargs):
    return nn.Sequential(nn.Conv2d(3, 4, 3), head(4, kwargs["num_classes"]))

def lazy(classes):
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(classes))

class AsClass(nn.Module):
    """Takes grey images too: it makes colours of them."""
    def __init__(self, classes):
        super().__init__()
        self.convolution, self.head = nn.Conv2d(3, 4, 3), head(4, classes)
    def forward(self, x):
        return self.head(self.convolution(x.expand(-1, 3, -1, -1)))

def fixed(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, classes))

def too_many(classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), head(4, classes + 1))

def pair(classes):
    class Pair(nn.Module):
        def forward(self, x):
            return x, x
    return Pair()

def two_inputs(classes):
    class Two(nn.Module):
        def forward(self, x, y):
            return x
    return Two()

def silent(classes):
    class Silent(nn.Module):
        def forward(self, x):
            raise ValueError
    return Silent()

def no_module(classes):
    return "a network"

def nothing():
    return None

_hidden = by_position
not_callable = 3
'''


@pytest.fixture
def own(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    return f"{tmp_path / 'mine.py'}:"


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# --- our own


@pytest.mark.parametrize("network", networks.NETWORKS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("classes", [2, 10])
def test_networks_take_images_to_logits(network, shape, classes):
    model = build(network, classes, shape)
    x = torch.randn(5, *shape)
    logits = model(x)
    assert logits.shape == (5, classes)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.training


@pytest.mark.parametrize(
    ("network", "wanted"),
    [
        ("resnet", {}),
        ("resnet", {"widths": (8, 8), "blocks": (2, 1)}),
        ("resnet", {"widths": (8, 12, 16, 20), "blocks": (1, 1, 1, 1), "stem": 5}),
        ("resnet", {"widths": (8, 16), "blocks": ((3, 4), (5,))}),
        ("resnet", {"widths": [8], "blocks": [[7]], "stem": 8}),
        ("resnet", {"widths": (8, 8), "blocks": (1, 2), "kernels": (7, 5, 3)}),
        ("resnet", {"widths": (8, 8), "blocks": ((3, 0), (5,)), "kernels": (3, ((5, 3), (3, 3)), ((3, 5),))}),
        ("resnet", {"widths": (8, 8), "blocks": (1, 1), "patch": 4}),
        ("vgg", {}),
        ("vgg", {"widths": (4, 8), "bn": False}),
        ("vgg", {"widths": ((4, 5), 6, (7,))}),
        ("convnet", {}),
        ("convnet", {"widths": (4, 6), "bn": False}),
    ],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_description_builds_the_same_network_again(network, wanted, shape):
    model = build(network, 7, shape, seed=1, **wanted)
    description = json.loads(json.dumps(describe(model)))  # as it goes through a record
    again = build(network, 7, shape, seed=2, **description)
    assert describe(again) == description
    again.load_state_dict(model.state_dict())
    x = torch.randn(3, *shape)
    assert_close(again.eval()(x), model.eval()(x), rtol=0, atol=0)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=3)),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 9),
)
def test_a_resnet_of_any_widths_is_described_as_it_is(stages, stem):
    wanted = {"widths": [w for w, _ in stages], "blocks": [b for _, b in stages], "stem": stem}
    model = build("resnet", 3, (1, 16, 16), **wanted)
    assert describe(model) == wanted
    assert model(torch.zeros(2, 1, 16, 16)).shape == (2, 3)


def test_kernel_sizes_are_settings_and_3_everywhere_is_not_mentioned():
    model = build("resnet", 3, (1, 16, 16), widths=(4, 6), blocks=(1, 1), kernels=(7, 5, 3))
    assert {n: k for n, (k, *_) in models.kernels(model).items() if k not in ([1, 1], [3, 3])} == {
        "stem": [7, 7], "stages.0.0.conv1": [5, 5], "stages.0.0.conv2": [5, 5],
    }  # fmt: skip
    assert describe(model)["kernels"] == [7, [[5, 5]], [[3, 3]]]
    assert model.stages[0](model.stem(torch.zeros(1, 1, 16, 16))).shape == (1, 4, 16, 16)
    assert "kernels" not in describe(
        build("resnet", 3, (1, 16, 16), widths=(4, 6), blocks=(1, 1), kernels=(3, 3, 3))
    )
    patches = build("resnet", 3, (1, 16, 16), widths=(4, 6), blocks=(1, 1), patch=4)
    assert patches.stem(torch.zeros(1, 1, 16, 16)).shape == (1, 4, 4, 4)
    with pytest.raises(
        BadInput, match="2 kernel sizes, expected one for the stem and one for each of 2 stages"
    ):
        build("resnet", 3, (1, 16, 16), widths=(4, 6), blocks=(1, 1), kernels=(5, 3))


@pytest.mark.parametrize("padding", [2, "same", (1, 2)])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_a_convolution_takes_another_geometry(padding, mode):
    conv, fresh = (
        nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode),
        nn.Conv2d(2, 3, 5, padding=padding, padding_mode=mode),
    )
    models.set_kernel_(conv, fresh.kernel_size, fresh.stride, fresh.padding)
    conv.weight, conv.bias = fresh.weight, fresh.bias
    x = torch.randn(2, 2, 9, 9)
    assert torch.equal(conv(x), fresh(x))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=4), st.booleans())
def test_a_vgg_of_any_widths_is_described_as_it_is(widths, bn):
    assert describe(build("vgg", 3, (1, 16, 16), widths=widths, bn=bn)) == {"widths": widths, "bn": bn}


def test_a_resnet_halves_the_image_at_each_further_stage():
    model, sizes = build("resnet", 10, (3, 32, 32), widths=(4, 6, 8), blocks=(1, 2, 1)), []
    for stage in model.stages:
        stage.register_forward_hook(lambda m, i, out: sizes.append(tuple(out.shape[1:])))
    model(torch.zeros(1, 3, 32, 32))
    assert sizes == [(4, 32, 32), (6, 16, 16), (8, 8, 8)]


def test_shortcuts_are_convolutions_where_the_shape_changes_and_nothing_elsewhere():
    model = build("resnet", 10, (3, 32, 32), widths=(4, 8), blocks=(2, 2))
    assert [len(block.shortcut) for stage in model.stages for block in stage] == [0, 0, 2, 0]


def test_a_block_is_what_the_paper_says():
    block = networks.Block(4, 4).eval()
    x = torch.randn(2, 4, 6, 6)
    f = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
    assert_close(block(x), torch.relu(x + f))


@pytest.mark.parametrize("network", networks.NETWORKS)
def test_the_first_signal_neither_vanishes_nor_explodes(network):
    logits = build(network, 10, (3, 32, 32))(torch.randn(64, 3, 32, 32))
    assert 0.05 < logits.std() < 20


@pytest.mark.parametrize("network", [*networks.NETWORKS, "own"])
def test_the_same_seed_gives_the_same_weights_and_the_global_generator_is_untouched(network, own):
    network = own + "by_position" if network == "own" else network
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one = weights(build(network, 10, (3, 32, 32), seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert torch.equal(weights(build(network, 10, (3, 32, 32), seed=1)), one)
    assert not torch.equal(weights(build(network, 10, (3, 32, 32), seed=2)), one)


def test_seeded_gives_the_generator_back_also_where_something_fails():
    before = torch.get_rng_state()
    with pytest.raises(BadInput):
        build("resnet", 10, (3, 32, 32), widths=(8, 8), blocks=(1,))
    assert torch.equal(torch.get_rng_state(), before)
    with seeds.seeded(5):
        inside = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    with seeds.seeded(5):
        assert torch.equal(torch.rand(3), inside)


def test_a_network_is_built_as_if_nothing_had_run_through_it():
    model = build("resnet", 10, (3, 32, 32))
    assert int(model.bn.num_batches_tracked) == 0
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("network", "wanted", "sentence"),
    [
        ("resnet", {"widths": (8, 8), "blocks": (1, 1, 1)}, "2 widths but 3 depths"),
        ("resnet", {"depth": 3}, "network resnet cannot be made: .*depth"),
        ("resnet", {"widths": (-8, 8), "blocks": (1, 1)}, "network resnet cannot be made"),
        ("resnet", {"widths": "ab", "blocks": (1, 1)}, "network resnet cannot be made"),
        ("vgg", {"blocks": (1,)}, "network vgg cannot be made: .*blocks"),
        ("vgg", {"widths": [4] * 6}, r"network vgg cannot take images of C, H, W = \(3, 8, 8\)"),
        ("convnet", {"widths": 8}, "network convnet cannot be made"),
    ],
)
def test_settings_that_make_no_network_are_named(network, wanted, sentence):
    with pytest.raises(BadInput, match=sentence):
        build(network, 10, (3, 8, 8), **wanted)


# --- a user's own


@pytest.mark.parametrize(
    "name", ["by_position", "by_classes", "by_num_classes", "by_keywords", "lazy", "AsClass", "fixed"]
)
def test_a_function_or_class_in_a_file_is_a_network(name, own):
    model = build(own + name, 5, (3, 8, 8))
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 5)
    assert describe(model) == {}


@pytest.mark.parametrize("name", ["by_classes", "by_num_classes", "lazy", "AsClass"])
def test_the_number_of_channels_is_passed_where_it_is_asked_for(name, own):
    assert build(own + name, 5, (1, 8, 8))(torch.zeros(2, 1, 8, 8)).shape == (2, 5)


def test_a_network_of_torchvision_is_a_network():
    model = build("torchvision.models:resnet18", 10, (3, 32, 32))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_a_home_folder_is_expanded(own, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models.find("~/mine.py:by_position").__name__ == "by_position"


WRONG = [  # network, shape, what the sentence must say
    (
        "torchvision.models:resnet18",
        (1, 28, 28),
        r"takes 3 input channels, but the images have 1 \(C, H, W = \(1, 28, 28\)\)",
    ),
    ("OWN:by_position", (1, 8, 8), "takes 3 input channels, but the images have 1"),
    ("OWN:by_position", (3, 2, 2), r"cannot take images of C, H, W = \(3, 2, 2\): .*[Kk]ernel size"),
    ("OWN:fixed", (3, 9, 9), r"cannot take images of C, H, W = \(3, 9, 9\)"),
    ("OWN:too_many", (3, 8, 8), r"returned \(2, 6\) for 2 images, expected logits of shape \(2, 5\)"),
    ("OWN:pair", (3, 8, 8), r"returned tuple for 2 images, expected logits of shape \(2, 5\)"),
    ("OWN:two_inputs", (3, 8, 8), "cannot take images of .*missing 1 required positional argument"),
    ("OWN:silent", (3, 8, 8), "cannot take images of .*: ValueError$"),
    ("OWN:no_module", (3, 8, 8), r"returned str, expected a torch\.nn\.Module"),
    ("OWN:nothing", (3, 8, 8), "cannot be made: nothing()"),
    ("OWN:without_its_weights", (3, 8, 8), "cannot be made: .*No such file or directory: 'missing.pt'"),
    ("OWN:scripted", (3, 8, 8), "is compiled or scripted, .*: return the plain one"),
    ("OWN:compiled", (3, 8, 8), "is compiled or scripted, .*: return the plain one"),
    (
        "OWN:by_positoin",
        (3, 8, 8),
        r"unknown network in .*mine\.py 'by_positoin': choose one of .*\(did you mean 'by_position'\?\)",
    ),
    ("OWN:_hidden", (3, 8, 8), "unknown network in"),
    ("OWN:not_callable", (3, 8, 8), "unknown network in"),
    ("OWN:", (3, 8, 8), "unknown network in"),
    ("nowhere.py:net", (3, 8, 8), r"network nowhere\.py:net: cannot import nowhere\.py"),
    ("no_such_module:net", (3, 8, 8), r"cannot import no_such_module \(No module named"),
    ("torchvision.models:resnet19", (3, 8, 8), "unknown network in torchvision.models 'resnet19'"),
    (":net", (3, 8, 8), "network :net: cannot import"),
    (".mine:net", (3, 8, 8), r"cannot import \.mine"),
    (
        "resnet18",
        (3, 8, 8),
        r"unknown network 'resnet18': choose one of resnet, .*an import path .*did you mean 'resnet'",
    ),
    ("", (3, 8, 8), "unknown network ''"),
]


@pytest.mark.parametrize(("network", "shape", "sentence"), WRONG)
def test_what_does_not_fit_is_one_sentence(network, shape, sentence, own):
    with pytest.raises(BadInput, match=sentence) as error:
        build(network.replace("OWN:", own), 5, shape)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "source", ["def net(:\n", "1 / 0\n", "import no_such_module\n", "raise SystemError\n", "\x00"]
)
def test_a_file_that_cannot_be_imported_is_named(source, tmp_path):
    (tmp_path / "bad.py").write_text(source)
    with pytest.raises(BadInput, match=r"network .*bad\.py:net: cannot import .*bad\.py \(.+\)"):
        build(f"{tmp_path / 'bad.py'}:net", 5, (3, 8, 8))


def test_a_mistake_within_a_users_function_shows_where_it_is(tmp_path):
    (tmp_path / "bug.py").write_text("def net(classes):\n    return undefined\n")
    with pytest.raises(NameError, match="undefined"):  # the traceback leads to the line
        build(f"{tmp_path / 'bug.py'}:net", 5, (3, 8, 8))


class Own(nn.Module):
    """A network as people write them; what it does in training and to its logits is given."""

    def __init__(self, classes=4, answer=lambda self, logits: logits, flat=lambda h: h.flatten(1)):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4 * 36, classes)
        self.drop, self.answer, self.flat = nn.Dropout(0.1), answer, flat

    def forward(self, x):
        return self.answer(self, self.head(self.drop(self.flat(self.bn(self.conv(x))))))


PAIR = namedtuple("Outputs", "logits aux")


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (
            lambda self, logits: PAIR(logits, logits) if self.training else logits,
            r"returned Outputs for \d+ images in training, .*: return these alone \(.*aux_logits=False\)",
        ),
        (lambda self, logits: {"logits": logits}, r"returned dict for \d+ images, expected logits of shape"),
        (lambda self, logits: logits if not self.training else logits[:, :1], r"returned \(\d+, 1\) for"),
        (lambda self, logits: logits.detach(), r"its logits are cut off from its parameters"),
        (lambda self, logits: logits.argmax(1), r"returned \(\d+,\) for \d+ images"),
    ],
)
def test_what_a_network_returns_is_checked_in_both_modes(answer, sentence):
    data = load("synthetic")
    for check in (
        lambda: models.fits(Own(answer=answer), "net", 4, (1, 8, 8)),
        lambda: train(Own(answer=answer), data, Recipe(epochs=0.1)),
    ):
        with pytest.raises(BadInput, match=sentence) as error:
            check()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "recipe", "sentence"),
    [
        (lambda net: net.requires_grad_(False), {}, "cannot learn: it has no parameters, or all are frozen"),
        (lambda net: net.double(), {"precision": "fp32"}, r"parameters in torch\.float64, and .*\.float\(\)"),
        (lambda net: net.double(), {"precision": "fp64"}, ""),
        (lambda net: net.append(nn.LogSoftmax(1)), {}, ""),
        (
            lambda net: net,
            {"batch_size": 1},
            r"a BatchNorm on maps of 1 x 1 pixel, and its batch .* is 1 image",
        ),
        (lambda net: net, {"batch_size": 2}, ""),
        (lambda net: net, {"compile": True}, "torch.compile needs a C\\+\\+ compiler"),
    ],
)
def test_a_network_trains_or_one_sentence_says_why_not(change, recipe, sentence, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)  # no compiler
    data = load("synthetic").limit(16)
    net = nn.Sequential(nn.Conv2d(1, 4, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 4))
    with pytest.raises(BadInput, match=sentence) if sentence else nullcontext() as error:
        train(change(net), data, Recipe(**{"epochs": 1, "batch_size": 8, **recipe}))
    assert not sentence or "\n" not in str(error.value)


def test_view_on_feature_maps_trains_in_the_contiguous_layout_and_says_so(tmp_path):
    data, recipe = load("synthetic"), Recipe(epochs=1, batch_size=64, precision="fp32")

    def lenet(**own):
        return Own(flat=lambda h: h.view(h.size(0), -1), **own)

    nets = [lenet(), lenet()]
    nets[1].load_state_dict(nets[0].state_dict())
    with pytest.warns(UserWarning, match=r"calls view\(\) on feature maps: it runs in the contiguous layout"):
        history = train(nets[0], data, recipe)
    assert history.steps == 5
    evaluate(nets[0], data, "test")
    assert resolve_layout(recipe, "cpu", nets[0]) == "contiguous"
    flat = Own()
    flat.load_state_dict(nets[1].state_dict())
    train(flat, data, replace(recipe, memory_format="contiguous"))
    assert_close(weights(nets[0]), weights(flat), atol=1e-4, rtol=1e-4)
    with (
        pytest.warns(UserWarning, match="view"),
        pytest.raises(NotApplicable, match=r"cannot run in channels_last, .* set memory_format=auto"),
    ):
        train(lenet(), data, replace(recipe, memory_format="channels_last"))
    with pytest.raises(NotApplicable, match="cannot run in channels_last"):  # where it is timed, too
        resolve_layout(replace(recipe, memory_format="channels_last"), "cpu", nets[0])
    broken = lenet(answer=lambda self, logits: logits[:, :1])
    with pytest.raises(BadInput, match="expected logits"):
        models.fits(broken, "net", 4, (1, 8, 8))
    assert not broken._forward_pre_hooks  # a refusal leaves all as it was


def test_a_softmax_at_the_end_is_warned_of():
    with pytest.warns(UserWarning, match="ends in a softmax, and the loss applies its own"):
        models.fits(Own(answer=lambda self, logits: logits.softmax(1)), "net", 4, (1, 8, 8))


def test_the_check_leaves_nothing_behind():
    net = Own()
    net.bn.eval()
    before = copy.deepcopy(net.state_dict())
    drawn = torch.get_rng_state()
    models.fits(net, "net", 4, (1, 8, 8))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert [m.training for m in net.modules()] == [m is not net.bn for m in net.modules()]
    assert all(p.grad is None for p in net.parameters())


def test_fits_leaves_the_mode_as_it_was():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 2))
    for mode in (True, False):
        models.fits(model.train(mode), "net", 2, (1, 2, 2))
        assert model.training is mode


def test_pooling_windows_of_three_pixels_overlap_and_are_built_anew():
    net = models.build("convnet", 10, (3, 32, 32), window=3)
    pools = [m for m in net.modules() if isinstance(m, nn.MaxPool2d)]
    assert [(p.kernel_size, p.stride) for p in pools] == [(3, 2)] * len(pools)
    x = torch.rand(1, 8, 6, 6)
    assert pools[0](x).shape == (1, 8, 3, 3)
    assert torch.equal(pools[0](x)[..., 0, 0], x[..., :3, :3].amax((2, 3)))
    again = models.build("convnet", 10, (3, 32, 32), **net.settings())
    assert str(again) == str(net)
    assert "window" not in models.build("convnet", 10, (3, 32, 32)).settings()
