"""PruneTrain: the penalty and its coefficient, exact zeros, the union rule, cuts that change nothing, paths,
and the method in training.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from effilib import cost, models, seeds, surgery
from effilib.errors import BadInput, NoEffect
from effilib.hooks import Method
from effilib.methods import narrower
from effilib.methods import prune_train as pt
from effilib.methods.group_lasso import (
    coefficient,
    group_lasso,
    group_norms,
    places,
    shrink_,
    shrink_steps,
    weights,
)
from effilib.methods.prune_train import PruneTrain, anything_dead, kept, live, prune_
from effilib.recipe import Recipe
from effilib.tasks import task
from effilib.training import train
from tests.common import equal, resumed_and_whole

TASK = task("smoke", "synthetic")
DATA = TASK.load()
LONG = Recipe(epochs=5, batch_size=16, lr=0.1, precision="fp32")
RECIPE = Recipe(epochs=4, batch_size=32, lr=0.1, precision="fp32")


def network(seed=0, **kwargs):
    return models.build(
        "resnet", 4, (1, 8, 8), seed=seed, **{"widths": (4, 6, 8), "blocks": (1, 2, 1), **kwargs}
    )


def groups(model):
    return weights(model, places(surgery.trace(model).nodes))


def outputs(model, x):
    model = copy.deepcopy(model)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 0.0
    return torch.stack([model.eval()(x), model.train()(x)]).detach()


X = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))


# The penalty


def test_groups_are_rows_and_columns_without_the_input_and_the_output():
    model = network()
    found = places(surgery.trace(model).nodes)
    convs = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert {n for n, axis, _ in found if axis == 0} == set(convs)
    assert {n for n, axis, _ in found if axis == 1} == {*convs, "head"} - {"stem"}
    assert len(found) == len({(n, axis) for n, axis, _ in found})


def test_the_penalty_is_the_sum_of_norms_written_out():
    model = network().double()
    total = 0.0
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            if name != "head":
                total += sum(
                    math.sqrt(m.weight[o].pow(2).sum().item() + 1e-8) for o in range(m.weight.shape[0])
                )
            if name != "stem":
                total += sum(
                    math.sqrt(m.weight[:, i].pow(2).sum().item() + 1e-8) for i in range(m.weight.shape[1])
                )
    assert group_lasso(groups(model)).item() == pytest.approx(total, rel=1e-12)


def test_weighing_by_size_weighs_each_group_by_the_root_of_its_size():
    W = torch.randn(3, 4, 2, 2, dtype=torch.double)
    expected = sum(4.0 * (W[o].norm().square() + 1e-8).sqrt() for o in range(3))
    assert_close(group_lasso([(W, 0, 1)], weigh="size"), expected)
    V = torch.randn(3, 8, dtype=torch.double)
    assert_close(
        group_lasso([(V, 1, 2)], weigh="size"),
        sum(math.sqrt(6) * (V[:, 2 * c : 2 * c + 2].norm() ** 2 + 1e-8).sqrt() for c in range(4)),
    )
    a, b = W.clone(), W.clone()
    shrink_([(a, 0, 1)], 0.1, weigh="size")
    shrink_([(b, 0, 1)], 0.4)
    assert_close(a, b)


def test_weighing_by_norm_shrinks_every_layer_by_the_same_share():
    W = torch.rand(4, 6, dtype=torch.double) + 1
    V = 0.01 * W
    shrink_([(W, 0, 1), (V, 0, 1)], 0.3, weigh="norm")
    assert_close(V, 0.01 * W)
    g = [(W, 0, 1), (W, 1, 2)]
    assert_close(group_lasso(g, weigh="norm"), sum(group_norms(*x).mean() * group_lasso([x]) for x in g))


def test_the_penalty_has_the_gradient_of_finite_differences_also_at_zero():
    W = torch.randn(3, 4, 2, 2, dtype=torch.double)
    W[1] = 0
    W.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda w: group_lasso([(w, 0, 1), (w, 1, 1)], eps=1e-4), W)
    group_lasso([(W, 0, 1), (W, 1, 1)]).backward()
    assert W.grad.isfinite().all()


def test_a_linear_layers_group_is_what_one_channel_owns():
    W = torch.arange(12.0).view(2, 6)
    expected = torch.stack([W[:, 0:3].norm(), W[:, 3:6].norm()])
    assert_close(group_norms(W, 1, 3), expected)


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3])
def test_the_coefficient_makes_the_penalty_this_share_of_the_loss(ratio):
    lam = coefficient(ratio, 2.3, 700.0)
    assert lam * 700 / (2.3 + lam * 700) == pytest.approx(ratio, rel=1e-12)
    assert coefficient(0.4, 1, 1) / coefficient(0.2, 1, 1) == pytest.approx(2.66667, rel=1e-5)


# The proximal step


def test_the_proximal_step_solves_its_own_problem():
    g = torch.Generator().manual_seed(0)
    W = torch.randn(5, 7, generator=g, dtype=torch.double)
    kappa, old = 2.5, W.clone()
    shrink_([(W, 0, 1)], kappa)
    for o in range(
        5
    ):  # argmin_w 1/2 ||w - old||^2 + kappa ||w||: the gradient is 0, or the sub-gradient holds it at 0
        if W[o].any():
            assert_close(W[o] - old[o] + kappa * W[o] / W[o].norm(), torch.zeros(7, dtype=torch.double))
        else:
            assert old[o].norm() <= kappa
    assert (W == 0).all(1).any()
    assert not (W == 0).all(1).all()


def test_columns_of_a_flattened_picture_shrink_together():
    W = torch.randn(4, 6, dtype=torch.double)
    W[:, 3:] *= 0.01
    shrink_([(W, 1, 3)], 0.5)
    assert W[:, :3].abs().min() > 0
    assert not W[:, 3:].any()


@pytest.mark.parametrize("lam", [1e-3, 3e-3])
def test_an_idle_group_is_gone_after_the_predicted_steps(lam):
    W = nn.Parameter(torch.ones(1, 16, dtype=torch.double) / 4 * 1.4)
    optimizer = torch.optim.SGD([W], lr=0.1, momentum=0.9, weight_decay=5e-4)
    predicted = shrink_steps(1.4, lam, 0.1, 0.9, 5e-4)
    steps = 0
    while W.any():
        W.grad = torch.zeros_like(W)
        optimizer.step()
        shrink_([(W.data, 0, 1)], 0.1 * lam / (1 - 0.9))
        steps += 1
    assert steps == pytest.approx(predicted, rel=0.12)


def test_a_layer_that_keeps_its_scale_only_shifts_its_shares():
    g = torch.Generator().manual_seed(0)
    W = torch.randn(4, 6, generator=g, dtype=torch.double)
    W[:, 4:] *= 0.1
    old, plain = W.clone(), W.clone()
    shrink_([(W, 1, 2)], 1.0, keep_scale=True)
    shrink_([(plain, 1, 2)], 1.0)
    assert_close(W.norm(), old.norm())
    assert_close(W / W.norm(), plain / plain.norm())
    assert not W[:, 4:].any()


# Live channels and cuts


def test_the_union_rule_keeps_what_anybody_writes_or_reads():
    model = network()
    node = surgery.trace(model)["stages.1.0.conv2"]
    with torch.no_grad():
        for name in node.producers:
            model.get_submodule(name).weight[[0, 1, 2]] = 0
        for name in node.consumers:
            model.get_submodule(name).weight[:, [1, 2, 3]] = 0
    assert live(node).tolist() == [True, False, False, True, True, True]  # 0 is read, 3 is written
    with torch.no_grad():
        model.get_submodule(node.producers[-1]).weight[1] = -1e-5
    assert live(node).tolist()[:3] == [True, True, False]  # a negative weight is a weight
    assert live(node, 1e-4).tolist()[:3] == [True, False, False]


def test_by_readers_a_channel_lives_that_is_read_and_what_is_cut_changes_nothing():
    model = network()
    node = surgery.trace(model)["stages.1.0.conv2"]
    with torch.no_grad():
        for name in node.consumers:
            model.get_submodule(name).weight[:, [1, 2, 3]] = 0
        for name in node.producers:
            model.get_submodule(name).weight[0] = 0
    assert live(node, rule="readers").tolist() == [True, False, False, False, True, True]
    assert live(node).all()
    before = outputs(model, X)
    assert prune_(model) == []
    assert prune_(model, rule="readers") == ["stages.1.0.conv2 6 -> 3"]
    assert_close(outputs(model, X), before, atol=1e-5, rtol=0)
    assert {axis for _, axis, _ in places([node], "readers")} == {1}


@pytest.mark.parametrize(("alive", "multiple", "expected"), [
    ([1, 0, 1, 0, 1, 0, 0, 0], 1, [0, 2, 4]), ([1, 0, 1, 0, 1, 0, 0, 0], 4, [0, 1, 2, 4]),
    ([0] * 8, 4, [0, 1, 2, 3]),
    ([1] * 5 + [0] * 3, 4, list(range(8))), ([0, 1], 16, [0, 1]), ([0, 0, 1], 1, [2]),
])  # fmt: skip
def test_cuts_leave_whole_multiples_and_every_live_channel(alive, multiple, expected):
    assert kept(torch.tensor(alive).bool(), multiple).tolist() == expected


@pytest.mark.parametrize("multiple", [1, 2])
def test_cutting_dead_channels_changes_nothing(multiple):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(X).sum().backward()
    optimizer.step()
    for node in surgery.trace(model).nodes:
        with torch.no_grad():
            for W, axis, _ in weights(model, places([node])):
                W.index_fill_(axis, torch.tensor([1, 3]), 0)
    flops = cost.step_flops(copy.deepcopy(model).to("meta"), (1, 8, 8))
    before = outputs(model, X)
    assert anything_dead(model, multiple=multiple)
    done = prune_(model, optimizer, multiple=multiple)
    assert not anything_dead(model, multiple=multiple)
    assert models.describe(model) == {"widths": [2, 4, 6], "blocks": [[2], [4, 4], [6]], "stem": 2}
    assert "stem 4 -> 2" in done
    assert_close(outputs(model, X), before, atol=1e-5, rtol=0)
    assert cost.step_flops(copy.deepcopy(model).to("meta"), (1, 8, 8)) < flops
    assert {p for g in optimizer.param_groups for p in g["params"]} == set(model.parameters())
    assert prune_(model, optimizer, multiple=multiple) == []


def test_spared_channels_stay_and_what_is_kept_is_told():
    model = network()
    node = surgery.trace(model)["stages.1.0.conv1"]
    with torch.no_grad():
        for W, axis, _ in weights(model, places([node])):
            W.index_fill_(axis, torch.tensor([0, 2, 3]), 0)
    spare = {node.name: torch.tensor([False, False, True, False, False, False])}
    cuts = {}
    assert anything_dead(model, spare=spare)
    assert prune_(model, spare=spare, cuts=cuts) == ["stages.1.0.conv1 6 -> 4"]
    assert {n: i.tolist() for n, i in cuts.items()} == {"stages.1.0.conv1": [1, 2, 4, 5]}
    everything = {node.name: torch.ones(4, dtype=torch.bool)}
    assert not anything_dead(model, spare=everything)
    with torch.no_grad():
        for W, _, _ in weights(model, places([surgery.trace(model)["stages.1.0.conv1"]])):
            W.zero_()
    assert prune_(model, spare=everything) == []  # a newborn path is no dead one
    assert prune_(model) == ["residual path stages.1.0 removed"]


def test_a_dead_residual_path_is_removed_as_a_whole():
    model = network()
    with torch.no_grad():
        model.stages[1][1].conv1.weight.zero_()
        model.stages[1][1].conv2.weight.zero_()
        model.stages[1][1].bn2.bias.fill_(0.3)
    before = outputs(model, X)
    assert anything_dead(model, multiple=16)
    assert prune_(model, multiple=16) == ["residual path stages.1.1 removed"]
    assert models.describe(model)["blocks"] == [[4], [6, 0], [8]]
    assert_close(outputs(model, X), before, atol=1e-5, rtol=0)


def test_a_path_whose_constant_has_nowhere_to_go_keeps_one_multiple():
    model = models.build("torchvision.models:resnet18", 10, (3, 32, 32))
    with torch.no_grad():
        for block in (model.layer1[0], model.layer1[1]):
            block.conv1.weight.zero_()
            block.conv2.weight.zero_()
        model.layer1[0].bn2.bias.fill_(0.3)
    assert prune_(model, multiple=16) == ["residual path layer1.1 removed", "layer1.0.conv1 64 -> 16"]


class Bottleneck(nn.Module):
    """A residual path of three convolutions, with BatchNorms before them or none."""

    def __init__(self, norms):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3 * norms))
        self.convs = nn.ModuleList(
            nn.Conv2d(4, 4, k, padding=k // 2, bias=i < 2) for i, k in enumerate((1, 3, 1))
        )

    def forward(self, x):
        h = x
        for i, conv in enumerate(self.convs):
            h = conv(F.relu(self.norms[i](h) if self.norms else h))
        return x + h


@pytest.mark.parametrize(("dead", "done"), [(0, "1.convs.0 4 -> 1"), (1, "residual path 1 removed")])
@pytest.mark.parametrize("norms", [True, False])
def test_a_path_goes_only_where_what_its_last_layer_reads_is_dead(norms, dead, done):
    with seeds.seeded(0):
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)]
        model = nn.Sequential(nn.Conv2d(1, 4, 3), Bottleneck(norms), *head)
        for norm in model[1].norms:
            nn.init.normal_(norm.bias)
        for conv in model[1].convs[dead : dead + 2]:
            nn.init.zeros_(conv.weight)
    before = outputs(model, X)
    assert prune_(model, x=X) == [done]
    assert_close(outputs(model, X), before, atol=1e-5, rtol=0)


class Counting(nn.Module):
    """A network that computes with its number of channels."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        return self.head((F.relu(self.conv(x)) / self.conv.out_channels**0.5).mean((2, 3)))


def test_a_cut_that_changes_the_function_is_refused_and_undone():
    model = Counting()
    with torch.no_grad():
        model.conv.weight[5:] = model.head.weight[:, 5:] = 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(BadInput, match="cutting dead channels would change what Counting computes"):
        prune_(model, optimizer, x=X)
    assert model.conv.out_channels == len(model.conv.weight) == 8

    class Kill(Method):
        def on_epoch_end(self, run):
            with torch.no_grad():
                run.model.conv.weight[5:] = run.model.head.weight[:, 5:] = 0

    with pytest.raises(BadInput, match="cutting dead channels would change what Counting computes"):
        train(model, DATA, RECIPE, [Kill(), PruneTrain(multiple=1, ratio=0)])
    assert len(model.conv.weight) == 8


# In training


@pytest.mark.parametrize("mode", ["proximal", "published"])
def test_the_coefficient_is_taken_from_the_first_batch_and_kept(mode):
    seen = []

    class Look(Method):
        def on_after_backward(self, run):
            seen.append((float(run.loss), run.state[method]["lambda"]))

        def on_fit_start(self, run):
            seen.append(group_lasso(groups(run.model)).item())

    method = PruneTrain(ratio=0.2, mode=mode)
    train(network(), DATA, RECIPE, [method, Look()])
    penalty, (loss, lam), *later = seen
    assert lam * penalty / (loss + lam * penalty) == pytest.approx(0.2, rel=1e-5)
    assert {x[1] for x in later} == {lam}


def test_published_mode_follows_the_gradient_of_the_whole_loss():
    gradients = {}

    class Look(Method):
        def on_after_backward(self, run):
            if run.step == 0:
                gradients["seen"] = {n: p.grad.clone() for n, p in run.model.named_parameters()}
                gradients["lambda"] = run.state[method]["lambda"]

    method = PruneTrain(mode="published")
    model = network()
    train(model, DATA, RECIPE, [method, Look()])
    plain = {}

    class Plain(Look):
        def on_after_backward(self, run):
            if run.step == 0:
                plain.update({n: p.grad.clone() for n, p in run.model.named_parameters()})

    train(network(), DATA, RECIPE, [Plain()])
    model = network()
    (gradients["lambda"] * group_lasso(groups(model))).backward()
    for name, p in model.named_parameters():
        extra = 0 if p.grad is None else p.grad
        assert_close(gradients["seen"][name], plain[name] + extra, atol=1e-6, rtol=1e-4)


def test_a_ratio_of_zero_is_the_plain_training_bit_for_bit():
    a, b = network(), network()
    train(a, DATA, RECIPE, [PruneTrain(ratio=0.0)])
    train(b, DATA, RECIPE)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_training_prunes_and_cuts_change_no_accuracy():
    checked = []

    class Check(Method):
        """Around the cut, which comes in the hook between."""

        def on_epoch_end(self, run):
            checked.append((run.structures, outputs(run.model, X)))

    model = network(widths=(8, 8, 8), blocks=(1, 1, 1))
    history = train(
        model, DATA, LONG, [Check(), PruneTrain(scale=100.0, weigh="size", multiple=2), first := Check()]
    )
    assert isinstance(first, Check)
    cuts = [(a, b) for a, b in zip(checked[::2], checked[1::2], strict=True) if a[0] != b[0]]
    assert cuts
    for (_, before), (_, after) in cuts:
        assert_close(
            after[1], before[1], atol=1e-4, rtol=1e-3
        )  # in training mode: a removed path's running statistics go with it
    assert sum(sum(b) for b in history.structure["blocks"]) < 24
    widths = history.events[-1]["widths"]
    assert len(widths) == 5
    assert all(w <= widths[0][n][0] for n, (w, _) in widths[-1].items() if n in widths[0])
    plain = train(network(widths=(8, 8, 8), blocks=(1, 1, 1)), DATA, LONG)
    assert history.flops < plain.flops


def test_schedule_scales_by_the_sum_of_the_learning_rate():
    seen = {}

    class Look(Method):
        def on_fit_end(self, run):
            seen["lambda"] = run.state[method]["lambda"]
            seen["steps"] = pt.lr_steps(run)

    method = PruneTrain(scale="schedule")
    train(network(), DATA, RECIPE, [method, Look()])
    one = dict(seen)
    method = PruneTrain()
    train(network(), DATA, RECIPE, [method, Look()])
    assert one["lambda"] / seen["lambda"] == pytest.approx(pt.PUBLISHED_LR_STEPS / seen["steps"])
    recipe = Recipe(epochs=1, schedule="constant", warmup=0.0, lr=0.5, batch_size=32)
    method = PruneTrain(scale="schedule", until=0.5)
    train(network(), DATA, recipe, [method, Look()])
    half = dict(seen)
    method = PruneTrain(scale="schedule")
    train(network(), DATA, recipe, [method, Look()])
    assert half["lambda"] == pytest.approx(2 * seen["lambda"], rel=0.2)  # the same in half of the steps
    assert seen["steps"] == pytest.approx(0.5 * (len(DATA.train) // 32))


def test_cuts_come_at_shares_of_a_run_of_any_length():
    how = dict(scale="schedule", weigh="norm", keep_scale=True, rule="readers", multiple=2)
    method = PruneTrain(ratio=0.5, until=0.5, at=(0.3, 0.5), **how)
    for epochs in (1.5, 4):
        recipe = Recipe(epochs=epochs, batch_size=16, lr=0.1)
        history = train(network(widths=(8, 8, 8), blocks=(1, 1, 1)), DATA, recipe, [method])
        cuts = [e["step"] + 1 for e in history.events if e.get("pruned")]
        assert cuts
        assert set(cuts) <= {math.ceil(share * history.steps) for share in method.at}
        last = history.events[-1]
        ends = [min(i, epochs) for i in range(1, math.ceil(epochs) + 1)]
        assert last["epochs"] == pytest.approx(
            sorted(
                [
                    *ends,
                    *(c * epochs / history.steps for c in (math.ceil(s * history.steps) for s in method.at)),
                ]
            )
        )
        assert len(last["widths"]) == len(last["epochs"])


def test_the_batch_grows_with_what_was_pruned():
    model = network(widths=(8, 8, 8), blocks=(1, 1, 1))
    history = train(model, DATA, LONG, [PruneTrain(scale=100.0, weigh="size", multiple=2, grow_batch=True)])
    grown = [e for e in history.events if "batch" in e]
    assert grown
    assert grown[0]["batch"] > 16
    assert grown[0]["batch"] % 8 == 0
    assert history.steps < 40


@pytest.mark.parametrize("when", [dict(grow_batch=True), dict(at=(0.15, 0.5))])
def test_a_resumed_run_ends_as_the_whole_one(tmp_path, when):
    def make():
        return network(widths=(8, 8, 8), blocks=(1, 1, 1))

    method = PruneTrain(scale=100.0, weigh="size", multiple=2, **when)
    (a, resumed), (b, whole) = resumed_and_whole(make, DATA, LONG, [method], tmp_path / "run.pt")
    assert models.describe(a) == models.describe(b) != models.describe(make())
    assert equal(a, b)
    assert resumed.events == whole.events


def test_settings_that_cannot_be_are_bad_input():
    with pytest.raises(BadInput, match="unknown mode 'faithful'"):
        PruneTrain(mode="faithful")
    with pytest.raises(BadInput, match="ratio is 1"):
        PruneTrain(ratio=1)
    with pytest.raises(BadInput, match="unknown scale"):
        PruneTrain(scale="much")
    with pytest.raises(BadInput, match="multiple"):
        PruneTrain(multiple=0)
    with pytest.raises(BadInput, match="unknown rule"):
        PruneTrain(rule="writers")
    with pytest.raises(BadInput, match="unknown weighing"):
        PruneTrain(weigh="mass")
    with pytest.raises(BadInput, match="shares of the run"):
        PruneTrain(at=(0.5, 1.0))
    with pytest.raises(BadInput, match="grow_batch needs every"):
        PruneTrain(at=(0.5,), grow_batch=True)


def test_a_network_without_channels_to_cut_is_no_effect():
    model = nn.Sequential(nn.Flatten(), nn.Linear(8 * 8, 4))
    with pytest.raises(NoEffect, match="PruneTrain: Sequential has no channels"):
        train(model, DATA, RECIPE, [PruneTrain()])


def test_a_users_network_is_cut_before_its_first_step():
    node, *_ = surgery.nodes(network())
    whole = narrower.Smaller(widths=())
    small = narrower.Smaller(widths=((node.name, 2),), removed=("stages.1.0",))
    data = TASK.load()
    assert small(TASK, 0).flops < whole(TASK, 0).flops
    assert small(TASK, 0).structure["widths"][0] == 2
    assert whole(TASK, 0).accuracy == train(TASK.build(data, 0), data, TASK.recipe).accuracy


# What a user has frozen


@pytest.mark.parametrize("mode", ["proximal", "published"])
def test_frozen_layers_and_held_statistics_stay_bit_equal(mode):
    model = network()
    model.stages[0].requires_grad_(False)
    for m in model.stages[0].modules():
        m.training = not isinstance(m, nn.BatchNorm2d)
    before = copy.deepcopy(model.stages[0].state_dict())
    train(model, DATA, RECIPE, [PruneTrain(ratio=0.5, scale=1000.0, multiple=1, mode=mode)])
    assert all(torch.equal(t, before[name]) for name, t in model.stages[0].state_dict().items())
    assert not any(p.requires_grad for p in model.stages[0].parameters())
    assert not any(m.training for m in model.stages[0].modules() if isinstance(m, nn.BatchNorm2d))
    assert model.bn.training
    if mode == "proximal":
        assert model.settings()["blocks"][1] != network().settings()["blocks"][1]  # the rest was pruned


def test_a_network_that_is_all_frozen_but_its_head_says_why():
    model = network().requires_grad_(False)
    model.head.requires_grad_()
    with pytest.raises(NoEffect, match=r"no channels that could be cut: stem: .*is frozen"):
        train(model, DATA, RECIPE, [PruneTrain()])
