"""Classes in stages: their order, the flat network again and fine-tuned, the tree, and what is counted."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from effilib import models
from effilib.data import synthetic
from effilib.dataset import Split
from effilib.errors import BadInput, NoEffect
from effilib.evaluation import class_hits
from effilib.methods import class_arrival as arrival
from effilib.methods import fine_tuning as tuning
from effilib.methods.class_arrival import Flat, Growing
from effilib.methods.fine_tuning import FineTune
from effilib.methods.tree_cnn import TreeCNN, hits
from effilib.tasks import task
from effilib.training import train

TASK = task("smoke", "synthetic")
DATA = TASK.load()
GIVEN = TASK.recipe


def of(classes, name="own", images=6):
    y = torch.arange(classes * images) % classes
    split = Split(x=torch.zeros(len(y), 2, 2, 1, dtype=torch.uint8), y=y)
    return replace(DATA, name=name, names=tuple(f"c{i}" for i in range(classes)), train=split)


# Stages and networks


@pytest.mark.parametrize(
    ("classes", "sizes"),
    [
        (4, [2, 2]),
        (5, [3, 2]),
        (7, [4, 3]),
        (10, [6, 4]),
        (20, [12, 8]),
        (25, [3] * 5 + [2] * 5),
        (100, [10] * 10),
    ],
)
def test_stages_of_any_number_of_classes(classes, sizes):
    found = arrival.stages(of(classes))
    assert [len(s) for s in found] == sizes
    assert [c for s in found for c in s] == list(range(classes))


def test_cifar10_comes_in_the_papers_stages():
    assert sorted(arrival.stages(of(10, "cifar10"))[0]) == [1, 3, 5, 7, 8, 9]


def test_too_few_classes_or_images_are_refused():
    with pytest.raises(BadInput, match="own has 2 classes: Tree-CNN needs 3 or more"):
        arrival.stages(of(2))
    with pytest.raises(BadInput, match="class 'c3' has 1 training images"):
        arrival.stages(replace(of(5), train=of(5).train[:8]))
    with pytest.raises(BadInput, match="own: no validation image of the first stage's classes"):
        arrival.stages(replace(of(5), validation=DATA.validation[DATA.validation.y == 3]))


def test_root_and_branch_are_smaller_than_the_flat_network():
    large = task("quick", "synthetic")
    flat, root, branch = (make(4) for make in arrival.makers(large, large.load()))
    assert root.settings() == flat.settings() | {"blocks": [[16], [32], [64]]}
    assert branch.settings()["widths"] == [[16], [32], [64]]


# Fine-tuning


def test_frozen_layers_stay_bit_identical_and_the_rest_is_trained():
    model = TASK.build(DATA)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    history = train(
        model, DATA, TASK.recipe, [FineTune(depth=3)]
    )  # the last block's conv2, shortcut, the head
    for name in ("head", "stages.2.0.conv2", "stages.2.0.shortcut.0"):
        assert not torch.equal(model.get_submodule(name).weight, before[f"{name}.weight"]), name
    trained = ("head", "stages.2.0.conv2", "stages.2.0.bn2", "stages.2.0.shortcut")
    frozen = [k for k in before if not k.startswith(trained)]
    assert all(torch.equal(model.state_dict()[k], before[k]) for k in frozen)
    assert len(frozen) > 10
    assert all(p.requires_grad for p in model.parameters())
    assert history.events[0]["weights"] == 3 * 3 * 8 * 8 + 8 * 8 + 8 * 4 + 4
    assert history.flops < train(TASK.build(DATA), DATA, TASK.recipe).flops
    for depth in (0, 10, 99):
        with pytest.raises(NoEffect, match="fine-tuning: the network has 10 layers"):
            tuning._before(model, DATA, depth)


def test_layers_of_users_networks():
    assert tuning.layers(TASK.build(DATA), DATA) == 10
    rgb, net = synthetic(size=32, channels=3), models.build("torchvision.models:resnet18", 4, (3, 32, 32))
    assert tuning.layers(net, rgb) == 21
    frozen = tuning._before(net, rgb, 2)
    assert {"conv1", "layer4.1.conv1", "layer4.0"} <= set(frozen)
    assert not {"layer4.1.conv2", "layer4.1.bn2", "fc"} & set(frozen)


def test_an_attention_layer_is_frozen_with_what_it_does_not_call():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 1, 8))
            self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
            self.attention = nn.MultiheadAttention(8, 2, 0.5, batch_first=True)

        def forward(self, x):
            x = self.stem(x.flatten(1, 2)) + self.token  # (N, 1, 8, 8) -> (N, 8, 8)
            return self.head(self.attention(x, x, x)[0].mean(1))

    model = Attention()
    assert set(tuning._before(model, DATA, 1)) == {"", "stem", "attention", "attention.out_proj"}
    before = {k: t.clone() for k, t in model.state_dict().items()}
    train(model, DATA, TASK.recipe, [FineTune(depth=1)])
    changed = [k for k, t in model.state_dict().items() if not torch.equal(t, before[k])]
    assert changed == ["head.weight", "head.bias"]


# Whole trainings

ALL = len(DATA.validation) + len(DATA.test)


def test_arms_of_a_cell_share_their_first_stage_whatever_their_length():
    a, b = Flat(given=GIVEN)(TASK, 0), Flat(given=GIVEN, depth=1)(TASK.at(0.5), 0)
    assert a.events[0] == b.events[0]
    assert b.steps == a.steps / 2
    other = Flat(given=GIVEN)(TASK, 1)
    assert other.events[0]["seconds"] != a.events[0]["seconds"]
    fresh = Flat(given=GIVEN, scratch=True)(TASK, 0)
    assert fresh.steps == a.steps
    assert fresh.rows[0]["loss"] != a.rows[0]["loss"]


@pytest.mark.parametrize("make", [Flat, Growing])
def test_a_first_stage_that_is_not_given_is_on_the_clock(make):
    given, whole = make(given=GIVEN)(TASK, 0), make()(TASK, 0)
    assert whole.events[0]["seconds"] > 0
    assert whole.steps > given.steps
    assert whole.seen > given.seen
    assert whole.seconds > whole.events[0]["seconds"]
    assert whole.rows[0]["accuracy"] <= 60  # two of four classes have come


@pytest.mark.parametrize(
    "arm", [Flat(), Flat(depth=1), Growing(tree=TreeCNN(cap=2)), Growing(tree=TreeCNN(cap=2, depth=2))]
)
def test_no_network_counts_twice_where_stages_meet(arm, monkeypatch):
    monkeypatch.setattr(arrival, "stages", lambda dataset: [(0, 1), (3,), (2,)])
    history = arm(TASK, 0)
    steps, seconds = ([row[k] for row in history.rows] for k in ("step", "seconds"))
    assert steps == sorted(set(steps))
    assert steps[-1] == history.steps
    assert seconds == sorted(set(seconds))
    assert seconds[-1] == pytest.approx(history.seconds)
    assert history.seconds == pytest.approx(sum(k["seconds"] for k in history.kinds.values()))
    assert history.flops > 0


def test_a_tree_over_a_trunk_begins_as_the_flat_network_does_and_its_second_stage_costs_less():
    depths = (0, 2)
    trees = [Growing(tree=TreeCNN(cap=2, depth=d), given=GIVEN)(TASK, 0) for d in depths]
    flat = Flat(given=GIVEN)(TASK, 0)
    assert trees[1].events[0]["text"] == flat.events[0]["text"]  # the same network, the same classes
    assert trees[1].flops < flat.flops


def test_accuracies_are_of_all_images_and_of_classes_to_come_none_is_right(monkeypatch):
    monkeypatch.setattr(arrival, "stages", lambda dataset: [(0, 1), (3,), (2,)])
    seen = {}

    def kept(history, begun, model, dataset, task, values=None):
        seen["model"], seen["data"] = model, dataset
        return history

    monkeypatch.setattr(arrival, "_ended", kept)
    for arm, count in ((Flat(), class_hits), (Growing(tree=TreeCNN(cap=2)), hits)):
        history = arm(TASK, 0)
        found = [count(seen["model"], seen["data"], s, history.precision) for s in ("validation", "test")]
        correct, images = (sum(sum(f[i]) for f in found) for i in (0, 1))
        assert (history.held_out, history.classes) == (images, 4) == (ALL, 4)
        assert history.accuracy == pytest.approx(100 * correct / images)
        assert history.rows[-1]["accuracy"] == pytest.approx(100 * sum(found[0][0]) / len(DATA.validation))
        first = [row["accuracy"] for row in history.rows if row["step"] <= history.steps / 3]
        assert max(first) <= 100 * float((DATA.validation.y < 2).double().mean()) + 1e-9


def test_accuracies_of_some_classes_become_those_of_all():
    half = train(TASK.build(DATA), DATA, TASK.recipe)
    found = arrival.of_all(half, DATA, [0, 1])
    share = float((torch.cat([DATA.validation.y, DATA.test.y]) < 2).double().mean())
    assert found.final == pytest.approx(share * half.final)
    assert arrival.of_all(half, DATA, [0, 1, 2, 3]).rows == half.rows


def test_a_trees_accuracy_is_taken_apart():
    history = Growing(tree=TreeCNN(cap=2), given=GIVEN)(TASK, 0)
    last = history.events[-1]
    product = sum(c["share"] * c["root"] * c["branch"] for c in last["children"])
    assert 100 * product == pytest.approx(history.rows[-1]["accuracy"], abs=1e-3)
    assert sum(c["share"] for c in last["children"]) == pytest.approx(1)
    assert last["us"] > 0 < last["flops"]


def test_a_users_network_is_root_and_branch(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\n"
        "def net(classes):\n"
        "    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]\n"
        "    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, classes))\n"
    )
    own = task("smoke", "synthetic", f"{file}:net")
    assert Growing(tree=TreeCNN(cap=2))(own, 0).held_out == ALL
    assert Flat(depth=1)(own, 0).held_out == ALL
