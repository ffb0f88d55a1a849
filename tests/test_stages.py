"""Stages found in our networks and in users', what can grow in them, and layouts that follow surgery."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effilib import cost, models, networks, surgery
from effilib.errors import BadInput
from effilib.methods import net2net, widening
from effilib.methods.prune_train import prune_
from effilib.surgery import stages


def resnet(**kwargs):
    return models.build("resnet", 4, (1, 8, 8), **{"widths": (4, 6, 8), "blocks": (1, 2, 1), **kwargs})


def vgg(**kwargs):
    return models.build("vgg", 4, (1, 8, 8), **{"widths": ((4,), (6, 5)), **kwargs})


def resnet18():
    return models.build("torchvision.models:resnet18", 4, (3, 16, 16))


def mobile():
    return models.build("torchvision.models:mobilenet_v2", 4, (3, 32, 32))


X = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def names(nodes):
    return [n.name for n in nodes]


def test_a_residual_stage_is_a_trunk_with_what_lies_on_its_paths():
    model = resnet()
    layout, found = stages.find(model, (1, 8, 8)), surgery.trace(model)
    assert stages.names(layout) == ["stage 1", "stage 2", "stage 3"]
    assert layout["holders"] == ["stages.0", "stages.1", "stages.2"]
    assert layout["pixels"] == [64, 16, 4]
    assert names(stages.members(found, layout, 1)) == [
        "stages.1.0.conv1",
        "stages.1.0.conv2",
        "stages.1.1.conv1",
    ]
    assert names(stages.widenable(found, layout, 1)) == ["stages.1.0.conv1", "stages.1.1.conv1"]
    assert names(stages.widenable(found, layout, 1, trunk=True)) == names(stages.members(found, layout, 1))
    assert [stages.depth(found, layout, i) for i in range(3)] == [1, 2, 1]
    assert [stages.deepenable(model, layout, i) for i in range(3)] == [
        "stages.0.0",
        "stages.1.1",
        "stages.2.0",
    ]


def test_plain_layers_go_by_the_size_of_their_maps():
    model = vgg()
    layout, found = stages.find(model, (1, 8, 8)), surgery.trace(model)
    assert layout["pixels"] == [64, 16]
    assert [stages.depth(found, layout, i) for i in range(2)] == [1, 2]
    assert names(stages.widenable(found, layout, 1)) == ["features.4", "features.7"]
    assert [stages.deepenable(model, layout, i) for i in range(2)] == ["features.2", "features.9"]


def test_stages_of_a_users_network_with_maps_of_one_pixel_stay_apart():
    model = resnet18()
    layout, found = stages.find(model, (3, 16, 16)), surgery.trace(model)
    assert layout["holders"] == ["layer1", "layer2", "layer3", "layer4"]
    assert layout["pixels"] == [16, 4, 1, 1]
    assert stages.stage_of(found["conv1"], layout) == 0
    assert stages.deepenable(model, layout, 3) == "layer4.1"


class Mixed(nn.Module):
    """Grouped and transposed convolutions, a layer on a rectangle, one that is called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, stride=(1, 2)), nn.Conv2d(8, 8, 3, groups=4, padding=1)
        self.up, self.head = nn.ConvTranspose2d(8, 6, 2, stride=2), nn.Linear(6, 4)

    def forward(self, x):
        x = self.second(F.relu(self.second(F.relu(self.first(x)))))
        return self.head(self.up(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("make", "shape"), [(resnet, (1, 8, 8)), (vgg, (1, 8, 8)), (Mixed, (3, 12, 12)), (mobile, (3, 32, 32))]
)
def test_the_products_counted_are_those_of_a_training_step_by_pytorchs_counter(make, shape):
    model = make()
    found = stages.flops(model, shape)
    first = next(iter(found.values())) / 3  # the first layer's dX is never computed
    assert sum(found.values()) - first == cost.step_flops(model.to("meta"), shape, 2) / 2


@pytest.mark.parametrize(("make", "shape"), [(vgg, (1, 8, 8)), (resnet, (1, 8, 8))])
def test_a_layout_follows_layers_that_are_renumbered(make, shape):
    model = make()
    layout = stages.find(model, shape)
    before = {m: n for n, m in model.named_modules()}
    net2net.deepen_(model, stages.deepenable(model, layout, 0), x=X)
    later = stages.follow(layout, before, model, 0)
    assert later["of"] == stages.find(model, shape)["of"]
    assert stages.depth(surgery.trace(model), later, 0) == 2
    assert layout["of"] != later["of"]


def test_a_stage_whose_paths_are_gone_keeps_its_place_and_can_still_become_deeper():
    model = resnet()
    layout = stages.find(model, (1, 8, 8))
    before = {m: n for n, m in model.named_modules()}
    surgery.remove_path_(surgery.trace(model).path("stages.2.0"))
    later, found = stages.follow(layout, before, model), surgery.trace(model)
    (trunk,) = stages.members(found, later, 2)
    assert trunk.name == "stages.2.0.shortcut.0"  # its first producer is a constant, no layer of the layout
    assert stages.depth(found, later, 2) == 0
    assert stages.widenable(found, later, 2) == []
    net2net.deepen_(model, stages.deepenable(model, later, 2), x=X)
    assert [b.inner for b in model.stages[2]] == [0, 8]


def test_the_table_of_channels_follows_cuts_growth_and_renumbered_layers():
    model = vgg()
    table = stages.table(surgery.trace(model))
    assert table["features.4"] == {"born": [stages.ALWAYS] * 6, "alive": [True] * 6, "strength": [0.0] * 6}
    table["features.4"]["strength"] = [float(i) for i in range(6)]
    before, owners = {m: n for n, m in model.named_modules()}, stages.owners(surgery.trace(model))
    index = torch.tensor([1, 4, 5])
    surgery.select_(surgery.trace(model)["features.4"], index)
    widening.widen_(surgery.trace(model)["features.4"], 5, breaker="pair")
    net2net.deepen_(model, "features.2", x=X)
    later, new = stages.carry(table, owners, before, surgery.trace(model), {"features.4": index}, 7)
    assert set(later) == {"features.0", "features.3", "features.7", "features.10"}
    assert later["features.3"]["born"] == [7] * 4  # the new layer
    assert later["features.7"] == {
        "born": [*[stages.ALWAYS] * 3, 7, 7],
        "alive": [True] * 5,
        "strength": [1.0, 4.0, 5.0, 0.0, 0.0],
    }
    assert later["features.10"] == table["features.7"]
    assert new == 6


def test_where_nothing_can_follow_is_bad_input():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 4))
    layout = stages.find(model, (1, 8, 8))
    with pytest.raises(BadInput, match="stage 1: no ReLU in a Sequential follows"):
        stages.deepenable(model, layout, 0)

    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.blocks, self.head = (
                nn.Conv2d(1, 4, 3),
                nn.ModuleList([networks.Block(4, 4)]),
                nn.Linear(4, 4),
            )

        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean((2, 3)))

    layout = stages.find(Listed(), (1, 8, 8))
    assert layout["holders"] == ["blocks"]
    with pytest.raises(BadInput, match="stage 1: its blocks do not lie in a Sequential"):
        stages.deepenable(Listed(), layout, 0)


def test_finding_stages_leaves_the_network_as_it_was():
    model = resnet().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    stages.find(model, (1, 8, 8))
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_the_table_follows_a_cut_of_a_trunk_whose_first_path_was_removed():
    model = resnet(blocks=(1, 1, 1))
    found = surgery.trace(model)
    table, owners, before = (
        stages.table(found),
        stages.owners(found),
        {m: name for name, m in model.named_modules()},
    )
    inner, trunk = found["stages.1.0.conv1"], found["stages.1.0.conv2"]
    with torch.no_grad():
        for node, dead in ((inner, slice(None)), (trunk, slice(3, None))):
            for name in node.consumers:
                node.layer(name).weight[:, dead] = 0
    table["stages.1.0.conv2"]["born"] = list(range(6))
    cuts = {}
    done = prune_(model, rule="readers", cuts=cuts)
    assert done == ["residual path stages.1.0 removed", f"{next(iter(cuts))} 6 -> 3"]
    later, new = stages.carry(table, owners, before, surgery.trace(model), cuts, 7)
    assert {n.name: len(later[n.name]["born"]) for n in surgery.trace(model).nodes} == {
        n.name: n.width for n in surgery.trace(model).nodes
    }
    assert new == 0
    assert later[next(iter(cuts))]["born"] == [0, 1, 2]
