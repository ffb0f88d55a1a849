"""Channel nodes: they are the right ones, and what cannot be handled is named."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.testing import assert_close

from effilib import models, networks, seeds
from effilib.errors import BadInput
from effilib.surgery import select_
from effilib.surgery.channels import LAYERS, nodes, trace
from tests.common import SHAPE, Flat, both, every, images, make, shake


def test_the_nodes_of_a_residual_network_are_its_trunks_and_the_blocks_inner_channels():
    found = {n.name: n for n in nodes(make("resnet"))}
    ends = "0.0.conv1", "1.0.conv1", "1.0.conv2", "1.1.conv1", "2.0.conv1", "2.0.conv2", "2.1.conv1"
    assert list(found) == ["stem", *(f"stages.{end}" for end in ends)]
    trunk = found["stages.1.0.conv2"]
    assert trunk.width == 6
    assert trunk.producers == ["stages.1.0.conv2", "stages.1.0.shortcut.0", "stages.1.1.conv2"]
    assert sorted(trunk.bns) == ["stages.1.0.bn2", "stages.1.0.shortcut.1", "stages.1.1.bn2"]
    assert list(trunk.consumers) == ["stages.1.1.conv1", "stages.2.0.conv1", "stages.2.0.shortcut.0"]
    assert str(trunk).startswith("stages.1.0.conv2: 6 channels; from stages.1.0.conv2, stages.1.0.shortcut.0")
    assert not any("head" in n.producers for n in found.values())


def test_a_linear_layer_behind_a_flatten_has_h_times_w_columns_a_channel():
    conv, hidden = nodes(make("flat"))
    assert (conv.width, conv.bns, conv.consumers) == (4, {"bn": 1, "norm": 6}, {"fc1": 6})
    assert (hidden.producers, hidden.width, hidden.consumers) == (["fc1"], 7, {"fc2": 1})
    assert "fc1 (6 columns a channel)" in str(conv)


@pytest.mark.parametrize("way", ["flatten", "view", "shape"])
def test_every_way_to_flatten_is_seen(way):
    assert [n.name for n in nodes(Flat(way))] == ["conv", "fc1"]


@pytest.mark.parametrize(
    ("network", "count", "largest"),
    [("torchvision.models:resnet18", 12, 512), ("torchvision.models:vgg11_bn", 10, 4096)],
)
def test_torchvisions_networks_are_found_whole(network, count, largest):
    model = models.build(network, 10, (3, 32, 32))
    found = trace(model)
    assert (len(found.nodes), found.refused) == (count, [])
    assert max(n.width for n in found.nodes) == largest
    written = {p for n in found.nodes for p in n.producers}
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert written == set(layers) - {layers[-1]}
    normed = [n for node in found.nodes for n in node.bns]
    assert sorted(normed) == sorted(n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
    read = [c for n in found.nodes for c in n.consumers]
    assert sorted(read) == sorted(set(layers) - {layers[0]})


@every
def test_a_permutation_of_a_nodes_channels_changes_nothing(name):
    """The oracle for nodes: where a layer were missing, or another one had slipped in, the outputs would
    differ.
    """
    model, x = make(name), images()
    before = both(model, x)
    for node in nodes(model):
        g = torch.Generator().manual_seed(3)
        select_(node, torch.randperm(node.width, generator=g))
        assert_close(both(model, x), before, atol=1e-10, rtol=0)


def test_torchvisions_resnet_is_permuted_and_widened_without_a_change():
    model = shake(models.build("torchvision.models:resnet18", 5, (3, 32, 32))).double()
    x = images(4, shape=(3, 32, 32))
    before = both(model, x)
    g = torch.Generator().manual_seed(3)
    for i, node in enumerate(nodes(model)):
        permutation = torch.randperm(node.width, generator=g)
        select_(node, torch.cat([permutation, permutation[:3]]) if i % 2 else permutation)
    assert_close(both(model, x), before, atol=1e-8, rtol=0)


def test_an_optional_cross_check_with_torch_pruning():
    pruning = pytest.importorskip("torch_pruning")
    for model in (
        make("resnet", dtype=torch.float32),
        models.build("torchvision.models:resnet18", 5, (3, 32, 32)),
    ):
        names = {m: n for n, m in model.named_modules()}
        shape = SHAPE if isinstance(model, networks.ResNet) else (3, 32, 32)
        graph = pruning.DependencyGraph().build_dependency(model, torch.randn(1, *shape))
        for node in nodes(model):
            group = graph.get_pruning_group(
                model.get_submodule(node.name), pruning.prune_conv_out_channels, idxs=[0]
            )
            theirs = {
                (names[d.target.module], d.handler.__name__) for d, _ in group if d.target.module in names
            }
            assert {n for n, h in theirs if h in ("prune_conv_out_channels", "prune_out_channels")} >= set(
                node.producers
            )
            layers = {n for n, _ in theirs if isinstance(model.get_submodule(n), LAYERS)}
            assert layers == {*node.producers, *node.bns, *node.consumers}


# What is refused


class Net(nn.Module):
    """A trunk of four channels with one odd thing in its middle, and an inner node that nothing odd
    touches.
    """

    def __init__(self, odd, width=4, out=None):
        super().__init__()
        self.first, self.bn = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.odd = odd
        self.after, self.last, self.head = nn.Conv2d(out or width, 6, 1), nn.Conv2d(6, 6, 1), nn.Linear(6, 5)

    def middle(self, x):
        return self.odd(x)

    def forward(self, x):
        x = self.middle(F.relu(self.bn(self.first(x))))
        return self.head(self.last(F.relu(self.after(x))).mean((2, 3)))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(F.relu(self.conv(x)))


class Tied(Shared):
    def forward(self, x):
        return F.conv2d(self.conv(x), self.conv.weight, padding=1)


class Choosing(Shared):
    def forward(self, x):
        if x.mean() > 0:
            return self.conv(x)
        return x


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 4, 1, 1))

    def forward(self, x):
        return x * self.scale


class Do(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def masked(conv):
    return prune.random_unstructured(conv, "weight", 0.5)


REFUSED = {
    "grouped": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2), "odd is a grouped convolution"),
    "depth-wise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), "odd is a depth-wise convolution"),
    "called twice": (Shared, "odd.conv shares its weights"),
    "tied": (Tied, "odd.conv"),
    "control flow": (Choosing, "odd cannot be followed"),
    "transposed": (lambda: nn.ConvTranspose2d(4, 4, 1), "odd is a ConvTranspose2d"),
    "group norm": (lambda: nn.GroupNorm(2, 4), "odd may mix channels"),
    "softmax": (lambda: nn.Softmax2d(), "odd may mix channels"),
    "scale": (Scale, "odd.scale is used outside of a layer"),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), "odd"),
    "mask": (lambda: masked(nn.Conv2d(4, 4, 1)), "odd has weights that are computed from others"),
    "slice": (lambda: Do(lambda x: x[:, :2]), "getitem in odd"),
    "reshape": (
        lambda: Do(lambda x: x.view(x.size(0), 2, 2, 8, 8).transpose(1, 2).reshape(x.size(0), 4, 8, 8)),
        "view in odd",
    ),
    "cat": (lambda: Do(lambda x: torch.cat([x, x], 1)), "cat in odd"),
    "channel mean": (lambda: Do(lambda x: x - x.mean(1, keepdim=True)), "mean in odd"),
    "channel pad": (lambda: Do(lambda x: F.pad(x, (0, 0, 0, 0, 1, 1))), "pad in odd"),
    "counts channels": (lambda: Do(lambda x: x / x.size(1)), "odd reads the number of channels"),
    "counts channels by shape": (lambda: Do(lambda x: x / x.shape[1]), "odd reads the number of channels"),
    "a constant of its own": (lambda: Do(lambda x: x * torch.arange(4.0).view(1, 4, 1, 1)), "odd"),
    "flat twice": (lambda: Do(lambda x: x.flatten(2)), "flatten in odd"),
    "subclass": (lambda: type("Mine", (nn.Conv2d,), {})(4, 4, 1), "odd is a Mine"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_handled_is_named_and_the_rest_stays_usable(what):
    odd, words = REFUSED[what]
    with seeds.seeded(0):
        model = Net(odd(), out={"slice": 2, "cat": 8, "channel pad": 6}.get(what))
    found = trace(model)
    refused = next(n for n in found.refused if n.name == "first")
    assert words in refused.why
    with pytest.raises(BadInput, match="first cannot be changed") as error:
        found["first"]
    assert "odd" in str(error.value)
    with pytest.raises(BadInput, match="cannot be changed"):
        select_(refused, [0, 1])
    x = images(4, torch.float32)
    assert "_tensor_constant0" not in vars(model)  # tracing leaves nothing behind
    if what not in ("flat twice", "mask"):  # one doesn't run, one can't be copied
        before = both(model, x)
        for name in ("after", "last"):
            select_(found[name], [5, 4, 3, 2, 1, 0, 0])
        assert_close(both(model, x), before, atol=1e-5, rtol=0)


def test_a_network_that_cannot_be_followed_at_all_is_bad_input():
    class Top(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.conv(x) if x.sum() > 0 else x

    with pytest.raises(BadInput, match="forward pass of Top cannot be followed"):
        trace(Top())


def test_a_network_without_channels_to_change_is_bad_input_with_the_reason():
    with pytest.raises(BadInput, match="no channels that could be pruned or widened"):
        nodes(nn.Sequential(nn.Flatten(), nn.Linear(3, 5)))
    with pytest.raises(BadInput, match="0: 1 is a depth-wise"):
        nodes(
            nn.Sequential(
                nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, groups=4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
            )
        )


def test_what_is_channelwise_passes():
    class Squeeze(nn.Module):
        """Squeeze and excitation; a scalar; spatial sizes."""

        def __init__(self):
            super().__init__()
            self.down, self.up, self.gain = nn.Linear(4, 2), nn.Linear(2, 4), nn.Parameter(torch.tensor(1.5))

        def forward(self, x):
            s = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
            x = 0.5 * x * s[:, :, None, None] * self.gain / x.size(2)
            _, _, h, w = x.shape
            return 1 - F.interpolate(x, scale_factor=2) * (h / w)

    model, x = Net(Squeeze()), images(4, torch.float32)
    found = trace(model)
    assert found.refused == []
    assert found["first"].consumers == {"odd.down": 1, "after": 1}
    assert found["first"].producers == ["first", "odd.up"]
    before = both(model, x)
    select_(found["first"], [3, 2, 1, 0, 0])
    select_(found["odd.down"], [1, 0, 1])
    assert_close(both(model, x), before, atol=1e-5, rtol=0)


def test_unknown_names_are_bad_input_with_the_choices():
    found = trace(make("resnet"))
    with pytest.raises(BadInput, match=r"unknown channel node 'stemm'.*did you mean 'stem'"):
        found["stemm"]
    with pytest.raises(BadInput, match=r"unknown residual path .* stages\.0\.0"):
        found.path("stages")


class Flags(nn.Module):
    """What people give their forward besides the images."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3), nn.Linear(8, 5)

    def forward(self, x, features=False, mask=None, *, scale=1.0, size=(2, 3)):
        h = F.relu(self.one(x))
        if mask is not None:
            h = h * mask
        h = self.two(h).mean(size)
        return h if features else self.head(h) * scale


def test_flags_and_masks_of_the_forward_pass_have_their_defaults():
    model, x = Flags(), torch.rand(2, 1, 8, 8)
    found = trace(model)
    assert [n.name for n in found.nodes] == ["one", "two"]
    with torch.no_grad():
        model.two.weight[:, 1:] = 0
    before = model(x)
    select_(found["one"], [0])
    assert_close(model(x), before)


def test_frozen_layers_are_no_nodes():
    model = make("resnet")
    model.stages[0].requires_grad_(False)
    found = trace(model)
    assert [n.name for n in found.nodes] == [
        n.name for n in trace(make("resnet")).nodes if not n.name.startswith(("stem", "stages.0"))
    ]
    with pytest.raises(BadInput, match=r"stages\.0\.0\.conv1 is frozen \(requires_grad=False\)"):
        found["stages.0.0.conv1"]
    model.requires_grad_(False)
    with pytest.raises(BadInput, match=r"no channels that could be pruned or widened: .* is frozen"):
        nodes(model)
