"""What chapter 7.1 shows beyond its method: stages, arms and controls, tables and pictures."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from effilib import models
from effilib.chapters import tree_cnn as chapter
from effilib.chapters.tree_cnn import FLAT, TREE, FineTune, Flat, Growing
from effilib.data import Split, synthetic
from effilib.errors import BadInput, NoEffect
from effilib.experiment import compare
from effilib.methods.tree_cnn import TreeCNN, accuracy
from effilib.tasks import task
from effilib.training import train

TASK = chapter.sized(task("smoke", "synthetic"))
DATA = TASK.load()


pytestmark = pytest.mark.usefixtures("results")


def of(classes, name="own", images=6):
    y = torch.arange(classes * images) % classes
    split = Split(x=torch.zeros(len(y), 2, 2, 1, dtype=torch.uint8), y=y)
    return replace(DATA, name=name, names=tuple(f"c{i}" for i in range(classes)), train=split)


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
    found = chapter.stages(of(classes))
    assert [len(s) for s in found] == sizes
    assert [c for s in found for c in s] == list(range(classes))
    assert chapter.stage_table(of(classes))["training images"].sum() == 6 * classes
    assert 2 <= chapter.cap(classes) <= 10


def test_cifar10_comes_in_the_papers_stages():
    found = chapter.stages(of(10, "cifar10"))
    assert sorted(found[0]) == [1, 3, 5, 7, 8, 9]
    assert sorted(c for g in chapter.BY_HAND["cifar10"] for c in g) == sorted(found[0])


def test_too_few_classes_or_images_are_refused():
    with pytest.raises(BadInput, match="own has 2 classes: Tree-CNN needs 3 or more"):
        chapter.stages(of(2))
    with pytest.raises(BadInput, match="class 'c3' has 1 training images"):
        chapter.stages(replace(of(5), train=of(5).train[:8]))
    with pytest.raises(BadInput, match="own: no validation image of the first stage's classes"):
        chapter.stages(replace(of(5), validation=DATA.validation[DATA.validation.y == 3]))


def test_the_published_efforts_come_out_of_the_parameter_counts():
    text = chapter.published()
    numbers = [line.split()[-1] for line in text.splitlines() if "effort" in line or "B:" in line]
    assert numbers == ["0.600", "0.403", "0.854", "0.967", "0.995", "1.000"]
    assert "7.843 M" in text
    assert "7.936 M" in text
    assert "0.222 M" in text


def test_frozen_layers_stay_bit_identical_and_the_rest_is_trained():
    model = TASK.build(DATA)
    names = chapter.reached(model, DATA)
    assert names[:3] == ["stem", "bn", "stages.0.0.conv1"]
    assert names[-1] == "head"
    before = {k: t.clone() for k, t in model.state_dict().items()}
    history = train(
        model, DATA, TASK.recipe, [FineTune(depth=3)], 0
    )  # conv2 and shortcut of the last block, and the head
    for name in ("head", "stages.2.0.conv2", "stages.2.0.shortcut.0"):
        assert not torch.equal(model.get_submodule(name).weight, before[f"{name}.weight"]), name
    frozen = [
        k
        for k in before
        if not k.startswith(("head", "stages.2.0.conv2", "stages.2.0.bn2", "stages.2.0.shortcut"))
    ]
    assert all(torch.equal(model.state_dict()[k], before[k]) for k in frozen)
    assert len(frozen) > 10
    assert all(p.requires_grad for p in model.parameters())
    event = history.events[0]
    assert event["weights"] == 3 * 3 * 8 * 8 + 8 * 8 + 8 * 4 + 4
    assert history.flops < train(TASK.build(DATA), DATA, TASK.recipe, (), 0).flops
    for depth in (0, 10, 99):
        with pytest.raises(NoEffect, match="fine-tuning: the network has 10 layers"):
            chapter.before(model, DATA, depth)


def test_depths_of_ours_and_of_users_networks():
    assert chapter.depths(TASK, DATA) == [1, 2, 5, 8]

    class Own:
        def build(self, dataset):
            return models.build("torchvision.models:resnet18", 4, (3, 32, 32))

    rgb = synthetic(size=32, channels=3)
    found = chapter.depths(Own(), rgb)
    assert found == [1, 5, 10, 16]
    frozen = chapter.before(Own().build(rgb), rgb, 2)
    assert {"conv1", "layer4.1.conv1", "layer4.0"} <= set(frozen)
    assert not {"layer4.1.conv2", "layer4.1.bn2", "fc"} & set(frozen)


def test_an_attention_layer_is_frozen_with_what_it_does_not_call():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 1, 8))
            self.stem, self.attention, self.head = (
                nn.Linear(8, 8),
                nn.MultiheadAttention(8, 2, 0.5, batch_first=True),
                nn.Linear(8, 4),
            )

        def forward(self, x):
            x = self.stem(x.flatten(1, 2)) + self.token  # (N, 1, 8, 8) -> (N, 8, 8)
            return self.head(self.attention(x, x, x)[0].mean(1))

    model = Attention()
    assert set(chapter.before(model, DATA, 1)) == {"", "stem", "attention", "attention.out_proj"}
    before = {k: t.clone() for k, t in model.state_dict().items()}
    train(model, DATA, TASK.recipe, [FineTune(depth=1)], 0)
    assert [k for k, t in model.state_dict().items() if not torch.equal(t, before[k])] == [
        "head.weight",
        "head.bias",
    ]


def test_every_arm_runs_and_the_tables_add_up():
    arms = chapter.arms(TASK, DATA)
    assert [a.name for a in arms] == [FLAT, TREE, "flat, last 5 layers"]
    found = compare(TASK, arms, quantity="training time", seeds=1)
    costs = chapter.costs(found)
    assert costs.loc[FLAT, ["effort", "FLOPs", "seconds"]].tolist() == [1, 1, 1]
    assert 0 < costs.loc["flat, last 5 layers", "effort"] < 1
    assert costs["forward us"].min() > 0
    history = found.histories(TREE)[0]
    mine, whole = (sum(w * n for w, n in chapter.trained(h)) for h in (history, found.histories(FLAT)[0]))
    assert costs.loc[TREE, "effort"] == pytest.approx(mine / whole)
    assert chapter.retrained(found, DATA).index[0] == "root"
    log = chapter.log_table(found, DATA)
    assert sorted(log["class"]) == ["2", "3"]
    accounts = chapter.accounts_table(found, DATA)
    assert accounts["points of accuracy"].sum() == pytest.approx(history.accuracy, abs=1e-3)
    assert chapter.say_costs(found).startswith("Tree-CNN against flat")
    for figure, caption in (
        chapter.trade_figure(found),
        chapter.tree_figure(found, DATA),
        chapter.likelihood_figure(found, DATA),
    ):
        figure.canvas.draw()
        assert caption.endswith(".")
    assert [a.get_title(loc="left") for a in chapter.tree_figure(found, DATA)[0].axes] == [
        "stage 1",
        "stage 2: 2 new",
    ]


def test_the_grid_has_the_other_depths_and_caps():
    names = [a.name for a in chapter.grid(TASK, DATA)]
    assert names == [FLAT, "flat, last 1 layer", "flat, last 2 layers", "flat, last 8 layers"]
    cifar = replace(of(10, "cifar10"), train=DATA.train)
    assert chapter.grid(TASK, cifar)[-1].fit.groups == chapter.BY_HAND["cifar10"]
    study = TASK.but(preset="study")
    assert [a.name for a in chapter.arms(study, DATA)][-1] == chapter.SCRATCH
    assert [a.name for a in chapter.grid(study, DATA)] == [FLAT, "Tree-CNN, C = 3", "Tree-CNN, C = 4"]


def test_arms_of_one_seed_share_their_first_stage():
    a, b = Flat()(TASK, 0), Flat(depth=1)(TASK, 0)
    assert a.events[0] == b.events[0]
    assert Flat()(TASK, 1).events[0]["seconds"] != a.events[0]["seconds"]
    fresh = Flat(scratch=True)(TASK, 0)
    assert fresh.steps == a.steps
    assert fresh.rows[0]["loss"] != a.rows[0]["loss"]


def test_a_tree_in_several_later_stages(monkeypatch):
    monkeypatch.setattr(chapter, "stages", lambda dataset: [(0, 1), (3,), (2,)])
    arm = Growing(tree=TreeCNN(cap=2, evaluations=2))
    tree, begun, history = arm.grown(TASK, DATA, 0)
    assert sorted(tree.T) == [0, 1, 2, 3]
    assert len(chapter.placed(history)) == 2
    assert history.accuracy == pytest.approx(accuracy(tree, DATA, "validation"))
    assert [r["seconds"] for r in history.rows] == sorted(r["seconds"] for r in history.rows)
    whole = arm(TASK, 0)
    assert whole.test_accuracy == pytest.approx(accuracy(tree, DATA, "test"), abs=3)
    assert whole.events[0]["seconds"] == begun.seconds


def test_the_toy_case_shows_every_rule():
    table = chapter.toy()
    assert table["rule"].tolist() == ["add", "merge", "merge refused", "new leaf", "children then"]
    assert table["why"].iloc[-1] == "[[0, 1, 5, 8], [2, 3, 6], [4], [7]]"


def test_the_checks_agree():
    found = chapter.checks(TASK, DATA)["result"]
    assert found.iloc[0] == "0"
    assert float(found.iloc[1]) < 1e-9
    assert len(set(found.iloc[2].split(" of "))) == 1
    assert float(found.iloc[3]) < 1e-3


def test_the_cost_table_and_the_networks():
    table = chapter.cost_table(TASK, DATA)
    assert table.loc["flat"].tolist()[2:] == [1, 1]
    assert table["weights"].iloc[-1] == table["weights"].iloc[1] + table["weights"].iloc[2]
    assert chapter.networks(task("quick", "synthetic")) == (
        ("resnet", {"widths": (16, 32, 64), "blocks": (1, 1, 1)}), ("convnet", {"widths": (16, 32, 64)})
    )  # fmt: skip
    assert chapter.networks(task("quick", "synthetic", "convnet"))[0][0] == "convnet"


def test_a_users_network_is_root_and_branch(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\n"
        "def net(classes):\n"
        "    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]\n"
        "    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, classes))\n"
    )
    own = chapter.sized(task("smoke", "synthetic", f"{file}:net"))
    assert chapter.networks(own) == ((f"{file}:net", {}), (f"{file}:net", {}))
    history = Growing(tree=TreeCNN(cap=2))(own, 0)
    assert history.test_accuracy is not None
    assert Flat(depth=1)(own, 0).rows
