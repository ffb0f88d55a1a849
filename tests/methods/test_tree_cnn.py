"""Tree-CNN: the likelihood, every branch of the rules, routing, what is trained and what is left alone."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effilib import models
from effilib.data import synthetic
from effilib.dataset import Split
from effilib.errors import BadInput, NoEffect
from effilib.methods.fine_tuning import weights
from effilib.methods.tree_cnn import (
    Tree,
    TreeCNN,
    effort,
    fitting,
    head,
    hits,
    rebuild_,
    relabel,
    transferred,
)
from effilib.methods.tree_growth import Growth, grow, likelihood
from effilib.recipe import Recipe

DATA = synthetic(images=400, classes=6)
RECIPE = Recipe(epochs=12, batch_size=32, lr=0.1, precision="fp32")


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def make_root(outputs, seed=0):
    return models.build("convnet", outputs, DATA.shape, seed=seed, widths=(8, 8))


def make_branch(outputs):
    return models.build("convnet", outputs, DATA.shape, seed=1, widths=(4,))


def tree_of(groups):
    return Tree(make_root(len(groups)), groups, [make_branch(len(g)) if len(g) > 1 else None for g in groups])


def children(growth):
    return [[c for c, k in growth.T.items() if k == child] for child in range(len(growth.origin))]


def columns(*values):
    """L from its columns."""
    return torch.tensor(values, dtype=torch.double).T


# Likelihood


def test_the_mean_is_taken_of_logits_and_the_softmax_after_it():
    logits, labels = torch.randn(30, 4, generator=gen(), dtype=torch.double) * 3, torch.arange(30) % 3 + 7
    L, classes = likelihood(logits, labels)
    assert classes == [7, 8, 9]
    for m, c in enumerate(classes):
        rows = [logits[i] for i in range(30) if labels[i] == c]
        mean = sum(rows) / len(rows)
        torch.testing.assert_close(L[:, m], mean.exp() / mean.exp().sum())
        averaged = sum(r.softmax(0) for r in rows) / len(rows)
        assert (averaged - L[:, m]).abs().max() > 0.01  # what it is not
    torch.testing.assert_close(L.sum(0), torch.ones(3, dtype=torch.double))


def test_full_children_are_left_out_of_the_sum_and_get_nothing():
    logits, labels = torch.randn(8, 4, generator=gen()), torch.arange(8) % 2
    L, _ = likelihood(logits, labels, full=[1, 3])
    assert L[[1, 3]].abs().sum() == 0
    torch.testing.assert_close(L.sum(0), torch.ones(2, dtype=torch.double))
    torch.testing.assert_close(L[[0, 2]], likelihood(logits[:, [0, 2]], labels)[0])
    assert likelihood(logits, labels, full=range(4))[0].abs().sum() == 0


def test_large_half_precision_logits_do_not_overflow():
    L, _ = likelihood(
        torch.full((2000, 2), 60000.0, dtype=torch.bfloat16), torch.zeros(2000, dtype=torch.int64)
    )
    assert L.flatten().tolist() == [0.5, 0.5]


# The rules, by hand

THREE = {0: 0, 1: 1, 2: 2}  # three leaves
BRANCHED = {0: 0, 1: 0, 2: 1, 3: 1, 4: 2}  # two branches and a leaf


@pytest.mark.parametrize(
    ("L", "T", "cap", "rules", "expected"),
    [
        ([(0.6, 0.3, 0.1)], THREE, 5, ["add"], [[0, 3], [1], [2]]),
        ([(0.3, 0.6, 0.1)], THREE, 5, ["add"], [[0], [1, 3], [2]]),
        ([(0.45, 0.44, 0.11)], THREE, 5, ["merge"], [[0, 1, 3], [2]]),
        ([(0.11, 0.44, 0.45)], THREE, 5, ["merge"], [[0], [1, 2, 3]]),
        ([(0.45, 0.44, 0.11)], THREE, 2, ["merge refused"], [[0, 3], [1], [2]]),
        ([(0.44, 0.45, 0.11)], {0: 0, 1: 1, 2: 1, 3: 2}, 3, ["merge refused"], [[0, 4], [1, 2], [3]]),
        ([(0.45, 0.44, 0.11)], BRANCHED, 9, ["merge refused"], [[0, 1, 5], [2, 3], [4]]),
        ([(0.44, 0.11, 0.45)], BRANCHED, 9, ["merge refused"], [[0, 1], [2, 3], [4, 5]]),
        ([(0.45, 0.11, 0.44)], BRANCHED, 9, ["merge"], [[0, 1, 4, 5], [2, 3]]),
        ([(0.35, 0.33, 0.32)], THREE, 5, ["new leaf"], [[0], [1], [2], [3]]),
        ([(1.0, 0.0, 0.0)], {0: 0, 1: 0, 2: 1, 3: 2}, 2, ["new leaf"], [[0, 1], [2], [3], [4]]),
        ([(0.6, 0.3, 0.1)], {0: 0, 1: 0, 2: 1, 3: 2}, 2, ["add"], [[0, 1], [2, 4], [3]]),
        ([(0.5, 0.3, 0.2)], THREE, 1, ["new leaf"], [[0], [1], [2], [3]]),
    ],
    ids=[
        "add", "add to another", "merge", "merge into the likelier", "cap of two",
        "cap, to the one with fewer", "the rival was a branch", "was a branch, to the one with fewer",
        "a branch takes in a leaf", "like none", "full", "next with room", "cap of one",
    ],
)  # fmt: skip
def test_one_new_class(L, T, cap, rules, expected):
    found = grow(columns(*L), T, cap=cap)
    assert [e["rule"] for e in found.log] == rules
    assert children(found) == expected


def test_the_surest_class_comes_first_and_what_it_fills_is_full_for_the_next():
    found = grow(columns((0.6, 0.3, 0.1), (0.9, 0.06, 0.04)), THREE, cap=2)
    assert [(e["class"], e["rule"], e["child"]) for e in found.log] == [(4, "add", 0), (3, "add", 1)]
    assert found.log[1]["values"] == [0.3, 0.1, 0.0]


def test_a_merge_renames_the_child_for_later_classes():
    found = grow(columns((0.46, 0.44, 0.05, 0.05), (0.05, 0.42, 0.40, 0.13)), {0: 0, 1: 1, 2: 2, 3: 3}, cap=9)
    assert [e["rule"] for e in found.log] == [
        "merge",
        "merge",
    ]  # child 1 now means child 0, which takes in child 2 too
    assert children(found) == [[0, 1, 2, 4, 5], [3]]
    assert found.origin == [0, 3]
    both = grow(columns((0.46, 0.44, 0.05, 0.05), (0.43, 0.41, 0.1, 0.06)), {0: 0, 1: 1, 2: 2, 3: 3}, cap=9)
    assert (both.log[1]["rule"], both.log[1]["why"]) == ("add", "both rivals were merged before")
    assert children(both) == [[0, 1, 4, 5], [2], [3]]


def test_numbers_close_up_after_a_merge_and_new_leaves_stand_behind():
    found = grow(columns((0.05, 0.05, 0.46, 0.44), (0.26, 0.25, 0.25, 0.24)), {0: 0, 1: 1, 2: 2, 3: 3}, cap=5)
    assert [e["rule"] for e in found.log] == ["merge", "new leaf"]
    assert found.origin == [0, 1, 2, None]
    assert children(found) == [[0], [1], [2, 3, 4], [5]]
    assert found.log[0]["merged"] == [3]
    assert found.log[1]["child"] == 3


def test_thresholds_are_strict_and_rounding_does_not_pass_for_more():
    assert grow(columns((0.4, 0.3, 0.3)), THREE, alpha=0.1).log[0]["rule"] == "new leaf"
    assert grow(columns((0.4, 0.3, 0.3)), THREE, alpha=0.09).log[0]["rule"] == "add"
    assert grow(columns((0.4, 0.35, 0.25)), THREE, beta=0.1).log[0]["rule"] == "new leaf"
    assert grow(columns((0.4, 0.35, 0.25)), THREE, beta=0.09).log[0]["rule"] == "merge"


def test_one_and_two_children():
    assert children(grow([[1.0]], {0: 0}, cap=2)) == [[0, 1]]
    assert children(grow([[1.0, 1.0]], {0: 0}, cap=2)) == [[0, 1], [2]]
    assert (
        grow([[0.52], [0.48]], {0: 0, 1: 1}).log[0]["rule"] == "merge"
    )  # the third child that is not there has likelihood 0
    assert children(grow([[0.52], [0.48]], {0: 0, 1: 1})) == [[0, 1, 2]]
    assert grow([[0.52], [0.48]], {0: 0, 1: 1}, beta=0.5).log[0]["rule"] == "new leaf"


def test_the_arguments_are_left_alone_and_classes_may_have_any_number():
    T, L = dict(THREE), columns((0.6, 0.3, 0.1), (0.45, 0.44, 0.11))
    kept = L.clone()
    found = grow(L, T, [17, 4])
    assert T == THREE
    assert torch.equal(L, kept)
    assert set(found.T) == {0, 1, 2, 4, 17}


@pytest.mark.parametrize(
    ("L", "T", "changes", "message"),
    [
        ([[0.5], [0.5]], THREE, {}, "one row per child"),
        ([[0.5], [float("nan")], [0.5]], THREE, {}, "finite"),
        ([[0.5], [0.5]], {0: 0, 1: 2}, {}, "children are"),
        ([[0.5], [0.3], [0.2]], THREE, {"classes": [2]}, "need 1 new classes"),
        ([[0.5], [0.3], [0.2]], THREE, {"classes": [3, 4]}, "need 1 new classes"),
        ([[0.5], [0.5]], {0: 0, 1: 0, 2: 1}, {"cap": 1}, "the cap is 1"),
        ([[0.5], [0.3], [0.2]], THREE, {"alpha": -0.1}, "must be 0 or more"),
    ],
)
def test_what_does_not_fit_is_refused(L, T, changes, message):
    with pytest.raises(BadInput, match=message):
        grow(L, T, **changes)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    K=st.integers(1, 6),
    M=st.integers(1, 8),
    cap=st.integers(1, 5),
    sharp=st.sampled_from([0.1, 1.0, 5.0]),
)
def test_it_is_always_a_partition_within_the_cap(seed, K, M, cap, sharp):
    g = gen(seed)
    sizes = torch.randint(1, cap + 1, (K,), generator=g).tolist()
    T = dict(enumerate(k for k, size in enumerate(sizes) for _ in range(size)))
    L = (torch.randn(K, M, generator=g) * sharp).softmax(0)
    found = grow(L, T, cap=cap)
    groups = children(found)
    assert sorted(c for group in groups for c in group) == list(range(len(T) + M))
    assert all(1 <= len(group) <= cap for group in groups)
    assert sorted(found.T.values())[-1] == len(found.origin) - 1
    for k, before in enumerate(found.origin):
        if before is not None:
            assert {c for c, old in T.items() if old == before} <= set(groups[k])
    assert [e["class"] for e in found.log] == sorted(
        (e["class"] for e in found.log), key=lambda c: (-float(L[:, c - len(T)].max()), c)
    )


# The tree


def test_the_sorted_batch_tells_what_image_by_image_tells():
    tree = tree_of([[4, 2], [0], [5, 1, 3]]).eval()
    tree.root = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    nn.init.normal_(tree.root[1].weight, generator=gen())  # all children are chosen
    x = torch.randn(64, *DATA.shape, generator=gen())
    with torch.no_grad():
        found = tree(x)
        slow = []
        for image in x.split(1):
            k = int(tree.root(image).argmax())
            branch = tree.branches[k]
            slow.append(tree.groups[k][int(branch(image).argmax()) if branch is not None else 0])
        assert found.tolist() == slow
        assert len(set(tree.decide(x).tolist())) == 3
        assert tree(x[:0]).shape == (0,)
    assert tree.T == {4: 0, 2: 0, 0: 1, 5: 2, 1: 2, 3: 2}


def test_with_a_single_child_its_branch_decides_alone():
    tree = tree_of([[0, 1, 2]]).eval()
    x = torch.randn(9, *DATA.shape, generator=gen())
    assert torch.equal(tree(x), tree.branches[0](x).argmax(1))


def test_images_of_classes_that_it_does_not_know_are_told_wrong():
    tree = tree_of([[0, 2], [3]])
    with torch.no_grad():
        told = tree.eval()(DATA.normalize(DATA.validation.x))
    correct, images = hits(tree.train(), DATA, "validation")
    y = DATA.validation.y
    assert images == torch.bincount(y, minlength=DATA.classes).tolist()
    assert correct == [int(((told == y) & (y == c)).sum()) for c in range(DATA.classes)]
    assert correct[1] == correct[4] == correct[5] == 0 < sum(correct)
    assert not tree.training


def test_relabelled_images_keep_to_their_class():
    found = relabel(DATA, {1: 0, 4: 0, 2: 1})
    assert found.names == ("1+4", "2")
    kept = torch.isin(DATA.train.y, torch.tensor([1, 2, 4]))
    assert torch.equal(found.train.x, DATA.train.x[kept])
    assert torch.equal(found.train.y, (DATA.train.y[kept] == 2).long())


# Surgery


def test_what_changed_is_new_with_transferred_weights_and_the_rest_is_the_same_module():
    tree = tree_of([[0, 1], [2], [3, 4], [5]])
    root, branches = copy.deepcopy(tree.root), list(tree.branches)
    states = [copy.deepcopy(b.state_dict()) if b is not None else None for b in branches]
    growth = Growth(
        T={0: 0, 1: 0, 2: 1, 3: 2, 4: 2, 5: 3, 6: 1, 7: 2, 8: 4}, origin=[0, 1, 2, 3, None], log=[]
    )
    how = rebuild_(tree, growth, make_root, make_branch)
    assert how == {
        "root": "new last layer",
        0: "untouched",
        1: "fresh",
        2: "new last layer",
        3: "leaf",
        4: "leaf",
    }
    assert tree.branches[0] is branches[0]
    assert tree.groups == [[0, 1], [2, 6], [3, 4, 7], [5], [8]]
    for name, t in tree.root.state_dict().items():
        if not name.startswith("head"):
            assert torch.equal(t, root.state_dict()[name]), name
    assert tree.root.head.out_features == 5
    assert tree.branches[2].head.out_features == 3
    assert torch.equal(tree.branches[2].features[0].weight, states[2]["features.0.weight"])


def test_a_root_with_the_same_children_keeps_all_and_with_others_of_the_same_number_does_not():
    tree = tree_of([[0], [1]])
    before = tree.root
    assert (
        rebuild_(tree, Growth(T={0: 0, 1: 1, 2: 1}, origin=[0, 1], log=[]), make_root, make_branch)["root"]
        == "kept"
    )
    assert tree.root is before
    tree = tree_of([[0], [1]])
    how = rebuild_(
        tree,
        Growth(T={0: 0, 1: 0, 2: 1}, origin=[0, None], log=[]),
        lambda n: make_root(n, seed=5),
        make_branch,
    )
    assert how["root"] == "new last layer"
    assert torch.equal(tree.root.head.weight, make_root(2, seed=5).head.weight)
    assert not torch.equal(tree.root.features[0].weight, make_root(2, seed=5).features[0].weight)


def test_no_new_class_is_no_effect():
    tree = tree_of([[0], [1, 2]])
    with pytest.raises(NoEffect, match="no class is new"):
        rebuild_(tree, Growth(T=tree.T, origin=[0, 1], log=[]), make_root, make_branch)


def test_the_last_layer_is_found_in_users_networks():
    def resnet18(outputs):
        return models.build("torchvision.models:resnet18", outputs, (3, 32, 32))

    assert head(resnet18) == ["fc.weight", "fc.bias"]
    old = resnet18(4)
    with torch.no_grad():
        old.bn1.running_mean.fill_(0.25)
    moved = transferred(resnet18, 4, old)  # as many outputs: the last layer is new all the same
    assert torch.equal(moved.layer4[1].conv2.weight, old.layer4[1].conv2.weight)
    assert moved.bn1.running_mean.unique().tolist() == [0.25]


def test_networks_whose_weights_cannot_be_transferred_are_refused():
    def wider(outputs):
        return nn.Sequential(nn.Linear(3, outputs), nn.Linear(outputs, outputs), nn.Linear(outputs, outputs))

    def grown(outputs):
        return nn.Sequential(*[nn.Linear(3, 3) for _ in range(outputs)], nn.Linear(3, outputs))

    with pytest.raises(BadInput, match="every layer depends on the number of outputs"):
        transferred(wider, 4, wider(3))
    with pytest.raises(BadInput, match="no layer depends on the number of outputs"):
        transferred(lambda n: nn.Linear(3, 3), 3, nn.Linear(3, 3))
    with pytest.raises(BadInput, match=r"4\.weight differs from one network to the next"):
        transferred(grown, 5, grown(3))


# Effort


def test_effort_counts_weights_and_samples_as_the_paper_does():
    found = effort([(4.486e6, 50_000), (0.222e6, 20_000), (0.222e6, 30_000)], [(7.843e6, 50_000)])
    assert found == pytest.approx(0.600, abs=5e-4)
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.GroupNorm(1, 5), nn.Flatten(), nn.Linear(5, 2)
    )
    assert weights(net) == 3 * 5 * 9 + 5 + 5 * 2 + 2
    net[0].weight.requires_grad_(False)
    assert weights(net) == 5 + 5 * 2 + 2


# Whole stages

GROUPS = [[0], [1], [2, 3]]


def learned(dataset=DATA, new=(4, 5), **changes):
    method = TreeCNN(images=20, **changes)
    tree, first = method.start(dataset, GROUPS, make_root, make_branch, RECIPE, 0)
    return tree, first, method.learn_(tree, dataset, list(new), make_root, make_branch, RECIPE, 0)


def test_a_stage_places_its_classes_and_ends_where_its_rows_say():
    tree, first, history = learned()
    assert sorted(tree.T) == list(range(6))
    assert 40 < first.accuracy <= 70  # of all images, but only four of six classes have come
    correct, images = (
        [sum(n) for n in zip(*pair, strict=True)]
        for pair in zip(*(hits(tree, DATA, split, "fp32") for split in ("validation", "test")), strict=True)
    )
    assert history.accuracy == pytest.approx(100 * sum(correct) / sum(images))
    assert (history.held_out, history.classes) == (len(DATA.validation) + len(DATA.test), 6)
    assert history.rows[-1]["accuracy"] == pytest.approx(
        100 * sum(hits(tree, DATA, "validation", "fp32")[0]) / len(DATA.validation)
    )
    assert history.accuracy > 40
    assert not tree.training
    seconds = [r["seconds"] for r in history.rows]
    assert seconds == sorted(seconds)
    grown = history.kinds["grow"]["seconds"]
    assert 0 < grown <= seconds[0]
    assert history.seconds == pytest.approx(seconds[-1])
    parts = [e for e in history.events if "part" in e]
    assert parts[0]["part"] == "root"
    assert parts[0]["samples"] == len(DATA.train)
    assert sum(e["seconds"] for e in parts) + grown == pytest.approx(history.seconds)
    assert history.memory["parameters"] == sum(4 * p.numel() for p in tree.parameters())


def test_untouched_branches_are_bit_identical_and_changed_ones_are_not(monkeypatch):
    def placed(L, T, classes, **settings):
        return Growth(T={**T, 4: 0, 5: 3}, origin=[0, 1, 2, None], log=[])

    monkeypatch.setattr("effilib.methods.tree_cnn.grow", placed)
    method = TreeCNN(images=20)
    tree, _ = method.start(DATA, GROUPS, make_root, make_branch, RECIPE, 0)
    kept, root = copy.deepcopy(tree.branches[2].state_dict()), copy.deepcopy(tree.root.state_dict())
    history = method.learn_(tree, DATA, [4, 5], make_root, make_branch, RECIPE, 0)
    assert all(torch.equal(t, kept[name]) for name, t in tree.branches[2].state_dict().items())
    assert not torch.equal(tree.root.features[0].weight, root["features.0.weight"])
    assert [(e["part"], e["how"]) for e in history.events if "part" in e] == [
        ("root", "new last layer"),
        ("0", "fresh"),
    ]


def test_over_a_trunk_only_the_last_layers_are_trained_and_the_trunk_is_shared(monkeypatch):
    def placed(L, T, classes, **settings):
        return Growth(T={**T, 4: 0, 5: 4}, origin=[0, 1, 2, 3, None], log=[])

    monkeypatch.setattr("effilib.methods.tree_cnn.grow", placed)
    method = TreeCNN(images=20, depth=1)
    with pytest.raises(BadInput, match="leaves only"):
        method.start(DATA, [[0], [1], [2, 3]], make_root, make_root, RECIPE, 0)
    tree, _ = method.start(DATA, [[0], [1], [2], [3]], make_root, make_root, RECIPE, 0)
    trunk = {n: v.clone() for n, v in tree.root.state_dict().items() if not n.startswith("head")}
    history = method.learn_(tree, DATA, [4, 5], make_root, make_root, RECIPE, 0)
    assert [branch is not None for branch in tree.branches] == [True, False, False, False, False]
    for net in (tree.root, tree.branches[0]):  # weights and BatchNorm's statistics, to the last bit
        assert all(torch.equal(v, trunk[n]) for n, v in net.state_dict().items() if n in trunk)
    fresh, old = tree.branches[0].head.weight, make_root(2).head.weight
    assert not torch.equal(fresh, old)  # its head was trained
    parts = [e for e in history.events if "part" in e]
    assert [(e["part"], e["how"]) for e in parts] == [("root", "new last layer"), ("0", "fresh")]
    assert [e["weights"] for e in parts] == [(8 + 1) * 5, (8 + 1) * 2]  # the heads'
    assert sum("weights" in e for e in history.events) == 2  # no part counts twice
    assert all(p.requires_grad for p in tree.parameters())


def test_test_images_choose_nothing():
    noise = torch.randint(0, 256, DATA.test.x.shape, generator=gen(), dtype=torch.uint8)
    other = replace(DATA, test=Split(x=noise, y=DATA.test.y.flip(0)))
    (tree, _, history), (same, _, again) = learned(), learned(other)
    assert tree.groups == same.groups
    assert all(
        torch.equal(a, b) for a, b in zip(tree.state_dict().values(), same.state_dict().values(), strict=True)
    )
    assert [r["accuracy"] for r in history.rows] == [r["accuracy"] for r in again.rows]
    assert history.events[0]["L"] == again.events[0]["L"]
    assert history.test_accuracy != again.test_accuracy


def test_training_images_of_the_new_classes_do_choose():
    method = TreeCNN(images=20)
    tree, _ = method.start(DATA, GROUPS, make_root, make_branch, RECIPE, 0)
    L, classes = method.likelihood(tree, DATA, [5, 4])
    assert classes == [4, 5]
    few = (DATA.train.y == 5).nonzero()[:20, 0]
    with torch.no_grad():
        torch.testing.assert_close(
            L[:, 1], tree.eval().root(DATA.normalize(DATA.train.x[few])).double().mean(0).softmax(0)
        )
    with pytest.raises(BadInput, match="no training image of class 5"):
        method.likelihood(tree, replace(DATA, train=DATA.train[DATA.train.y != 5]), [4, 5])


def test_a_branch_with_few_images_has_a_smaller_batch():
    assert fitting(RECIPE, DATA) == RECIPE
    assert fitting(RECIPE, replace(DATA, train=DATA.train[:7])).batch_size == 7
    few = replace(DATA, train=DATA.train[:24], validation=DATA.validation[DATA.validation.y < 2])
    tree, _, history = learned(few)
    assert sorted(tree.T) == list(range(6))
    assert history.rows
