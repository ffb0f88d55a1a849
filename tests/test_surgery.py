"""Surgery: functions are kept, optimizers follow, what does not fit is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from effilib import models, networks
from effilib.errors import BadInput
from effilib.hooks import Method
from effilib.recipe import Recipe
from effilib.surgery import (
    append_block_,
    insert_layer_,
    remove_block_,
    remove_layer_,
    remove_path_,
    select_,
)
from effilib.surgery.channels import nodes, trace
from effilib.tasks import task
from effilib.training import train
from tests.common import ALL, both, every, exactly, images, make, shake, step


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ([], "at least one"),
        ([4], "channels 0 to 3"),
        ([-1], "runs from -1"),
        ([0.5], "whole number"),
        ([[0]], "list of"),
    ],
)
def test_a_wrong_index_is_bad_input(index, words):
    with pytest.raises(BadInput, match=words):
        select_(nodes(make("convnet"))[0], index)


def test_a_node_of_an_earlier_structure_is_not_used():
    model = make("vgg")
    node = trace(model)["features.4"]
    insert_layer_(model, "features.2", x=images())
    with pytest.raises(BadInput, match="trace it again"):
        select_(node, [0])


# Functions are kept


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@every
def test_widening_keeps_the_function_in_eval_and_in_training(name, dtype, atol):
    model, x = make(name, dtype=dtype), images(dtype=dtype)
    before = both(model, x)
    g = torch.Generator().manual_seed(2)
    for node in nodes(model):
        n = node.width
        select_(node, torch.cat([torch.arange(n), torch.randint(n, (n + 1,), generator=g)]))
        assert node.width == 2 * n + 1
    assert_close(both(model, x), before, atol=atol, rtol=0)
    assert [n.width for n in nodes(model)] == [2 * n.width + 1 for n in nodes(make(name))]


@every
def test_uneven_shares_keep_it_too(name):
    model, x = make(name), images()
    before = both(model, x)
    for node in nodes(model):
        n = node.width
        select_(node, [*range(n), 0, 0], share=[0.5, *[1.0] * (n - 1), 0.2, 0.3])
    assert_close(both(model, x), before, atol=1e-10, rtol=0)
    with pytest.raises(BadInput, match="2 shares for 1 channels"):
        select_(nodes(model)[0], [0], share=[1, 1])


@every
def test_what_no_consumer_reads_is_pruned_without_a_change(name):
    model, x = make(name), images()
    chosen = {}
    for node in nodes(model):
        chosen[node.name] = kept = torch.arange(node.width)[torch.arange(node.width) % 3 != 1]
        dead = torch.arange(node.width) % 3 == 1
        with torch.no_grad():
            for c, per in node.consumers.items():
                model.get_submodule(c).weight[:, dead.repeat_interleave(per)] = 0
    before = both(model, x)
    for node in nodes(model):
        select_(node, chosen[node.name])
        assert node.width == len(kept) or node.width == len(chosen[node.name])
    assert_close(both(model, x), before, atol=1e-10, rtol=0)


def test_zero_producers_alone_are_not_enough_because_of_batchnorms_shift():
    model, x = make("resnet"), images()
    node = trace(model)["stages.1.0.conv1"]
    with torch.no_grad():
        model.get_submodule(node.name).weight[2] = 0
    before = both(model, x)
    select_(node, [0, 1, 3, 4, 5])
    assert (both(model, x) - before).abs().max() > 1e-3


@every
def test_growth_undone_restores_every_bit(name):
    model = make(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = images(), torch.arange(6) % 5
    step(model, optimizer, x, y)
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    for share in (
        [0.0],
        None,
    ):  # newborns that carry nothing; an even split, undone with the counts as shares
        for node in nodes(model):
            n = node.width
            select_(node, [*range(n), n - 1], optimizer, share=share and [*[1.0] * n, *share])
            select_(node, range(n), optimizer, share=None if share else [*[1.0] * (n - 1), 2.0])
    after = [model.state_dict(), optimizer.state_dict()]
    assert all(torch.equal(after[0][k], v) for k, v in before[0].items())
    for i, state in before[1]["state"].items():
        assert torch.equal(after[1]["state"][i]["momentum_buffer"], state["momentum_buffer"])


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_random_plans_keep_the_function_and_the_optimizer(data):
    name = data.draw(st.sampled_from(ALL))
    model, x = make(name), images(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    step(model, optimizer, x, torch.arange(3))
    for _ in range(data.draw(st.integers(1, 4))):
        node = data.draw(st.sampled_from(nodes(model)))
        kept = data.draw(st.lists(st.integers(0, node.width - 1), min_size=1, max_size=10))
        dead = torch.tensor([i not in kept for i in range(node.width)])
        with torch.no_grad():
            for c, per in node.consumers.items():
                model.get_submodule(c).weight[:, dead.repeat_interleave(per)] = 0
        before = both(model, x)
        select_(node, kept, optimizer)
        assert node.width == len(kept)
        assert_close(both(model, x), before, atol=1e-10, rtol=0)
        exactly(optimizer, model)
        assert [n.width for n in nodes(model) if n.name == node.name] == [len(kept)]
    if isinstance(model, networks.ResNet | networks.VGG):
        again = type(model)(5, 3, **models.describe(model))
        again.load_state_dict(model.state_dict())
    step(model, optimizer, x, torch.arange(3))


# Optimizers and averages


def test_transplanted_momentum_is_the_widened_networks_own_gradient():
    model, x, y = make("resnet"), images(), torch.arange(6) % 5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    step(model, optimizer, x, y)  # the first momentum is the gradient
    for node in nodes(model):
        select_(node, [*range(node.width), 0, 0, 1], optimizer)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    for p in model.parameters():
        assert_close(optimizer.state[p]["momentum_buffer"], p.grad, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad]
)
def test_second_moments_follow_the_gradients_square(kind):
    model, x, y = make("flat").eval(), images(), torch.arange(6) % 5
    optimizer = kind(model.parameters(), lr=0.0, weight_decay=0)
    step(model, optimizer, x, y)
    for node in nodes(model):
        select_(node, [*range(node.width), 0, 0, 1], optimizer)
    exactly(optimizer, model)
    fresh = kind(model.parameters(), lr=0.0, weight_decay=0)
    step(model, fresh, x, y)
    for p in model.parameters():
        for k, v in fresh.state[p].items():
            assert_close(optimizer.state[p][k], v, atol=1e-12, rtol=1e-9)


def test_a_state_whose_scale_is_not_known_is_bad_input():
    model = make("convnet")
    optimizer = torch.optim.Rprop(model.parameters())
    step(model, optimizer, images(), torch.arange(6) % 5)
    with pytest.raises(BadInput, match="Rprop keeps 'prev'"):
        select_(nodes(model)[0], [0, 1], optimizer)


def test_groups_keep_their_order_and_settings_and_gradients_are_dropped():
    model = make("resnet")
    named = dict(model.named_parameters())
    optimizer = torch.optim.SGD(
        [{"params": [p for n, p in named.items() if "conv" in n], "weight_decay": 0.1, "mine": 1},
         {"params": [p for n, p in named.items() if "conv" not in n], "lr": 0.5}], lr=0.1, momentum=0.9,
    )  # fmt: skip
    before = [[n for p in g["params"] for n, q in named.items() if q is p] for g in optimizer.param_groups]
    F.cross_entropy(model(images()), torch.arange(6) % 5).backward()
    model.bn.weight.requires_grad_(False)
    select_(trace(model)["stem"], [1, 0, 3], optimizer)
    after = {p: n for n, p in model.named_parameters()}
    assert [[after[p] for p in g["params"]] for g in optimizer.param_groups] == before
    assert (optimizer.param_groups[0]["weight_decay"], optimizer.param_groups[0]["mine"]) == (0.1, 1)
    assert optimizer.param_groups[1]["lr"] == 0.5
    assert model.stem.weight.grad is None
    assert not model.bn.weight.requires_grad
    assert model.head.weight.grad is not None  # not touched


def test_old_graphs_still_go_backward_and_memory_format_stays():
    model = make("vgg", dtype=torch.float32).to(memory_format=torch.channels_last)
    loss = model(images(dtype=torch.float32)).sum()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer, images(dtype=torch.float32), torch.arange(6) % 5)
    weight = model.features[4].weight
    select_(trace(model)["features.4"], [0, 2, 4], optimizer)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        loss.backward()  # only because the optimizer stepped
    new = model.features[4].weight
    assert new.shape[0] == 3
    assert weight.shape[0] == 6  # the old Parameter is as it was
    assert new.is_contiguous(memory_format=torch.channels_last)
    assert optimizer.state[new]["momentum_buffer"].stride() == new.stride()


def test_a_sliced_network_follows_the_masked_one_for_twenty_steps():
    dense, x, y = make("resnet"), images(12), torch.arange(12) % 5
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    for _ in range(3):
        step(dense, optimizer, x, y)
    masks, kept = [], {}
    for node in nodes(dense):
        keep = torch.arange(node.width) % 3 != 1
        kept[node.name] = keep.nonzero().flatten()
        masks += [(dense.get_submodule(n).weight, 0, keep) for n in node.producers]
        masks += [
            (dense.get_submodule(n).weight, 1, keep.repeat_interleave(per))
            for n, per in node.consumers.items()
        ]

    @torch.no_grad()
    def mask():
        for w, axis, keep in masks:
            m = keep.view([-1 if a == axis else 1 for a in range(w.dim())])
            w.mul_(m)
            optimizer.state[w]["momentum_buffer"].mul_(m)

    mask()
    sliced = copy.deepcopy(dense)
    other = torch.optim.SGD(sliced.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    forgetful = copy.deepcopy(sliced)
    for node in nodes(sliced):
        select_(node, kept[node.name], other)
    for node in nodes(forgetful):
        select_(node, kept[node.name])
    third = torch.optim.SGD(forgetful.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    for _ in range(20):
        step(dense, optimizer, x, y)
        mask()
        step(sliced, other, x, y)
        step(forgetful, third, x, y)
    a, b, c = both(dense, x), both(sliced, x), both(forgetful, x)
    assert_close(b, a, atol=1e-6, rtol=0)
    assert (c - a).abs().max() > 1e-2  # momentum that was dropped shows


# Blocks and layers


@pytest.mark.parametrize("name", ["resnet", "resnet, a path gone"])
def test_a_new_block_changes_nothing_and_can_be_taken_out_again(name):
    model, x = make(name), images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer, x, torch.arange(6) % 5)
    before, state, description = both(model, x), copy.deepcopy(model.state_dict()), models.describe(model)
    new = append_block_(model, "stages.0.0", optimizer, x=x, generator=torch.Generator().manual_seed(0))
    assert new == "stages.0.1"
    assert torch.equal(both(model, x), before)
    assert len(models.describe(model)["blocks"][0]) == len(description["blocks"][0]) + 1
    exactly(optimizer, model)
    model.train()
    optimizer.zero_grad()
    F.cross_entropy(model(x), torch.arange(6) % 5).backward()
    block = model.get_submodule(new)
    assert block.bn2.weight.grad.abs().max() > 0
    assert block.conv1.weight.grad.abs().max() == block.conv2.weight.grad.abs().max() == 0
    remove_block_(model, new, optimizer, x=x)
    exactly(optimizer, model)
    assert models.describe(model) == description
    assert all(
        torch.equal(model.state_dict()[k], v)
        for k, v in state.items()
        if "running" not in k and "tracked" not in k
    )


def test_a_users_block_is_repeated():
    model = shake(models.build("torchvision.models:resnet18", 5, (3, 32, 32)))
    x = images(2, torch.float32, (3, 32, 32))
    before = both(model, x)
    assert append_block_(model, "layer2.1", x=x) == "layer2.2"
    assert torch.equal(both(model, x), before)
    assert "layer2.2.conv2" in trace(model)["layer2.0.conv2"].producers
    with pytest.raises(BadInput, match=r"layer2\.0 has layers on its shortcut"):
        append_block_(model, "layer2.0", x=x)
    remove_block_(model, "layer2.2", x=x)
    assert torch.equal(both(model, x), before)


@pytest.mark.parametrize("name", ["stages.0.0", "stages.1.0", "stages.1.1"])
def test_a_dead_residual_path_is_removed_exactly(name):
    model, x = make("resnet"), images()
    block = model.get_submodule(name)
    with torch.no_grad():
        block.conv2.weight.zero_()
        block.bn2.running_mean.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer, x, torch.arange(6) % 5)
    with torch.no_grad():
        block.conv2.weight.zero_()
        block.bn2.running_mean.zero_()
    before = both(model, x)
    momentum = optimizer.state[block.bn2.bias]["momentum_buffer"].clone()
    remove_path_(trace(model).path(name), optimizer)
    assert_close(both(model, x), before, atol=1e-10, rtol=0)
    exactly(optimizer, model)
    assert torch.equal(optimizer.state[block.bn2.bias]["momentum_buffer"], momentum)
    description = models.describe(model)
    assert [b for stage in description["blocks"] for b in stage].count(0) == 1
    again = networks.ResNet(5, 3, **description).double()
    again.load_state_dict(model.state_dict())
    assert_close(both(again, x), before, atol=1e-10, rtol=0)
    for node in nodes(model):  # the constant belongs to its trunk
        select_(node, [*range(node.width), 0], optimizer)
    assert_close(both(model, x), before, atol=1e-10, rtol=0)
    step(model, optimizer, x, torch.arange(6) % 5)


def test_a_path_whose_sum_is_in_place_hands_its_constant_to_the_shortcut_or_stays():
    model = shake(models.build("torchvision.models:resnet18", 5, (3, 32, 32))).double()
    x = images(2, torch.float64, (3, 32, 32))
    with torch.no_grad():
        for name in ("layer2.0", "layer2.1"):
            model.get_submodule(name).conv2.weight.zero_()
            model.get_submodule(name).bn2.running_mean.zero_()
    before = both(model, x)
    remove_path_(trace(model).path("layer2.0"))
    assert_close(both(model, x), before, atol=1e-10, rtol=0)
    with pytest.raises(BadInput, match=r"layer2\.1 adds a constant"):
        remove_path_(trace(model).path("layer2.1"))
    nn.init.zeros_(model.layer2[1].bn2.bias)
    before = both(model, x)
    remove_path_(trace(model).path("layer2.1"))
    assert_close(both(model, x), before, atol=1e-10, rtol=0)
    assert trace(model).refused == []
    select_(trace(model)["layer2.0.downsample.0"], [*range(128), 0])
    assert_close(both(model, x), before, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", ["vgg", "convnet"])
def test_an_identity_layer_changes_nothing_and_can_be_taken_out_again(name):
    model, x = make(name), images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer, x, torch.arange(6) % 5)
    before, state = both(model, x)[0], copy.deepcopy(model.state_dict())
    after = next(n for n, m in model.named_modules() if isinstance(m, nn.ReLU))
    new = insert_layer_(model, after, optimizer, x=x)
    assert_close(both(model, x)[0], before, atol=1e-10, rtol=0)
    exactly(optimizer, model)
    assert len(nodes(model)) == len(nodes(make(name))) + 1
    again = networks.VGG(5, 3, **models.describe(model))
    again.load_state_dict(model.state_dict())
    step(model, optimizer, x, torch.arange(6) % 5)
    remove_layer_(model, new, optimizer, x=None)
    exactly(optimizer, model)
    assert list(model.state_dict()) == list(state)


def test_with_the_batchs_moments_an_identity_layer_is_exact_in_training_too():
    model, x = make("vgg"), images()
    before, other = both(model, x), both(model, 3 * x + 1)
    insert_layer_(model, "features.2", x=x)
    assert_close(both(model, x), before, atol=1e-10, rtol=0)
    assert_close(both(model, 3 * x + 1)[0], other[0], atol=1e-10, rtol=0)
    assert (both(model, 3 * x + 1)[1] - other[1]).abs().max() > 1e-3


def test_layers_that_cannot_come_or_go_are_bad_input():
    model = make("vgg")
    with pytest.raises(BadInput, match=r"features\.0 is a Conv2d"):
        insert_layer_(model, "features.0", x=images())
    with pytest.raises(BadInput, match="unknown layer"):
        insert_layer_(model, "features.99", x=images())
    with pytest.raises(BadInput, match="keeps channels and size"):
        remove_layer_(model, "features.4", x=None)
    with pytest.raises(BadInput, match="does not lie in a Sequential"):
        remove_layer_(model, "head", x=None)
    with pytest.raises(BadInput, match="changes the shape"):
        remove_block_(make("resnet"), "stages.1.0", x=None)


# In mid-training


X = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Operate(Method):
    """Prunes, widens, deepens and removes a path at the end of the first epoch."""

    def on_epoch_end(self, run):
        if run.epoch == 0:
            run.restructure(self.change)

    @staticmethod
    def change(model, optimizer):
        found = trace(model)
        select_(found["stages.0.0.conv1"], [0, 2, 3], optimizer)
        select_(found["stem"], [*range(8), 1, 1], optimizer)
        append_block_(model, "stages.2.0", optimizer, x=X, generator=torch.Generator().manual_seed(0))
        remove_path_(trace(model).path("stages.1.0"), optimizer)

    def __repr__(self):
        return "Operate()"


def test_surgery_in_mid_training_and_a_checkpoint_that_goes_on(tmp_path):
    t = task("smoke", "synthetic")
    dataset = t.load()
    recipe = Recipe(epochs=3, batch_size=32)
    whole = t.build(dataset)
    history = train(whole, dataset, recipe, [Operate()])
    assert models.describe(whole) == {"widths": [10, 8, 8], "blocks": [[3], [0], [8, 8]], "stem": 10}
    assert history.structure == models.describe(whole)

    class Killed(Exception):
        pass

    def kill(row):
        if row["epoch"] > 2:
            raise Killed

    resumed, file = t.build(dataset), tmp_path / "run.pt"
    with pytest.raises(Killed):
        train(resumed, dataset, recipe, [Operate()], checkpoint=file, progress=kill)
    resumed = t.build(dataset)
    again = train(resumed, dataset, recipe, [Operate()], checkpoint=file)
    assert models.describe(resumed) == models.describe(whole)
    assert all(torch.equal(resumed.state_dict()[k], v) for k, v in whole.state_dict().items())
    assert [r["accuracy"] for r in again.rows] == [r["accuracy"] for r in history.rows]
