"""Net2Net: functions are kept, symmetry breaks, GradMax finds the largest gradient, and growth in a run."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from effilib import models, surgery
from effilib.errors import BadInput, NoEffect
from effilib.evaluation import evaluate
from effilib.hooks import Method
from effilib.methods import gradmax, net2net
from effilib.methods.gradmax import gradmax_, gradmax_directions
from effilib.methods.narrower import thin_
from effilib.methods.net2net import Grown, Net2Net, deepen_
from effilib.methods.widening import BREAKERS, replication, uneven_shares, widen_
from effilib.recipe import Recipe
from effilib.tasks import task
from effilib.training import train

DATA = task("smoke", "synthetic").load()
RECIPE = Recipe(epochs=2, batch_size=32, precision="fp32")
X = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.double)
Y = torch.arange(8) % 4


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def make(name="resnet", seed=0, dtype=torch.double):
    settings = {
        "resnet": {"widths": (4, 6), "blocks": (1, 2)},
        "vgg": {"widths": ((4,), (6, 5))},
        "convnet": {"widths": (4, 6), "bn": False},
    }[name]
    model = models.build(name, 4, (1, 8, 8), seed=seed, **settings)
    g = gen(seed)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            with torch.no_grad():
                m.weight.copy_(0.5 + torch.rand(m.weight.shape, generator=g))
                m.bias.copy_(0.3 * torch.randn(m.bias.shape, generator=g))
                m.running_mean.copy_(0.3 * torch.randn(m.weight.shape, generator=g))
                m.running_var.copy_(0.5 + torch.rand(m.weight.shape, generator=g))
    return model.to(dtype)


def outputs(model, x=X):
    model = copy.deepcopy(model)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 0.0
    return torch.stack([model.eval()(x), model.train()(x)]).detach()


def step(model, optimizer):
    optimizer.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()


# The maps


def test_replication_keeps_the_old_channels_and_draws_the_rest_evenly():
    g = replication(4, 4004, gen())
    assert g[:4].tolist() == [0, 1, 2, 3]
    counts = torch.bincount(g, minlength=4)
    assert (counts - 1001).abs().max() < 5 * math.sqrt(1000 * 3 / 16)
    assert replication(3, 3, gen()).tolist() == [0, 1, 2]


def test_uneven_shares_add_up_and_differ():
    index = replication(5, 17, gen())
    share = uneven_shares(index, gen(1))
    total = torch.zeros(5, dtype=torch.double).index_add_(0, index, share)
    assert_close(total, torch.ones(5, dtype=torch.double))
    assert len(share.unique()) > 12
    assert share.min() > 0


# Wider


@pytest.mark.parametrize(("dtype", "atol"), [(torch.double, 1e-10), (torch.float, 1e-5)])
@pytest.mark.parametrize("breaker", ["none", "uneven", "pair"])
@pytest.mark.parametrize("name", ["resnet", "vgg", "convnet"])
def test_wider_keeps_the_function_in_eval_and_in_training(name, breaker, dtype, atol):
    model = make(name, dtype=dtype)
    x = X.to(dtype)
    before = outputs(model, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for node in surgery.nodes(model):
        n = node.width
        index = widen_(node, 2 * n + 1, optimizer, breaker=breaker, generator=gen(n))
        assert (node.width, len(index)) == (2 * n + 1, 2 * n + 1)
        assert index[:n].tolist() == list(range(n))
    assert_close(outputs(model, x), before, atol=atol, rtol=0)
    assert {p for g in optimizer.param_groups for p in g["params"]} == set(model.parameters())


@pytest.mark.parametrize("noise", [0.01, 0.05])
def test_noise_changes_the_function_a_little_and_only_through_the_new_copies(noise):
    model = make()
    before = outputs(model)
    old = model.stages[0][0].conv1.weight.clone()
    for node in surgery.nodes(model):
        widen_(node, 2 * node.width, noise=noise, generator=gen(2))
    change = (outputs(model) - before).abs().max()
    assert 1e-4 < change < 20 * noise
    assert torch.equal(model.stages[0][0].conv1.weight[:4, :4] * 2, old * (2 / _counts(model, old)))


def _counts(model, old):
    """How often each of the trunk's channels is there now, (1, 4, 1, 1): what the consumer's columns were
    divided by.
    """
    new = model.stages[0][0].conv1.weight[:4, :4]
    return (old / new).mean((0, 2, 3)).round().view(1, 4, 1, 1)


def test_random_padding_does_not_keep_the_function():
    model = make()
    before = outputs(model)
    for node in surgery.nodes(model):
        widen_(node, 2 * node.width, breaker="random", generator=gen(2))
    assert (outputs(model) - before).abs().max() > 0.1


@pytest.mark.parametrize("breaker", BREAKERS)
def test_whether_copies_become_different_in_training(breaker):
    model = make()
    node = surgery.trace(model)["stages.0.0.conv1"]
    index = widen_(node, 8, breaker=breaker, generator=gen(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        step(model, optimizer)
    W = model.stages[0][0].conv1.weight.detach()
    if breaker in ("pair", "random"):
        assert (W[4] - W[6]).norm() > 1e-4
    else:
        apart = max(float((W[j] - W[index[j]]).norm()) for j in range(4, 8))
        assert (apart > 1e-4) == (breaker != "none")


@pytest.mark.parametrize("breaker", ["pair", "random"])
def test_channels_that_are_no_copies_begin_without_momentum(breaker):
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer)
    old = optimizer.state[model.stages[0][0].conv2.weight]["momentum_buffer"].clone()
    widen_(surgery.trace(model)["stages.0.0.conv1"], 7, optimizer, breaker=breaker, generator=gen())
    block = model.stages[0][0]
    for W, axis in ((block.conv1.weight, 0), (block.bn1.weight, 0), (block.conv2.weight, 1)):
        m = optimizer.state[W]["momentum_buffer"].movedim(axis, 0)
        assert m[:4].abs().max() > 0
        assert not m[4:].any()
    assert torch.equal(optimizer.state[block.conv2.weight]["momentum_buffer"][:, :4], old)


def test_newborns_that_are_pruned_leave_the_old_network_bit_for_bit():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer)
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    for node in surgery.nodes(model):
        n = node.width
        widen_(node, n + 4, optimizer, breaker="pair", generator=gen())
        surgery.select_(node, range(n), optimizer)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before[0].items())
    for i, s in before[1]["state"].items():
        assert torch.equal(optimizer.state_dict()["state"][i]["momentum_buffer"], s["momentum_buffer"])


def test_wider_refuses_what_is_not_wider():
    node = surgery.nodes(make())[0]
    with pytest.raises(BadInput, match="stem has 4 channels, it cannot be widened to 3"):
        widen_(node, 3)
    with pytest.raises(BadInput, match="unknown symmetry breaker 'nois'"):
        widen_(node, 5, breaker="nois")
    assert widen_(node, 4).tolist() == [0, 1, 2, 3]


# Deeper


@pytest.mark.parametrize(("name", "where", "new"), [
    ("resnet", "stages.1.1", "stages.1.2"), ("resnet", "stages.0.0", "stages.0.1"),
    ("vgg", "features.2", "features.3"), ("convnet", "features.1", "features.2"),
])  # fmt: skip
def test_deeper_keeps_the_function(name, where, new):
    model = make(name)
    before, state = outputs(model), {k: v.clone() for k, v in model.named_buffers()}
    assert deepen_(model, where, x=X, generator=gen()) == new
    assert_close(
        outputs(model), before, atol=1e-10, rtol=0
    )  # in training too: the batch is the one it was measured on
    if name == "resnet":
        assert all(
            torch.equal(dict(model.named_buffers())[k], v) for k, v in state.items()
        )  # measuring moved no statistic
    shifted = 3 * X + 1
    assert_close(outputs(model, shifted)[0], outputs(make(name), shifted)[0], atol=1e-10, rtol=0)
    if name == "vgg":
        assert (outputs(model, shifted)[1] - outputs(make(name), shifted)[1]).abs().max() > 1e-3


# GradMax


def test_its_directions_are_those_of_the_largest_gradient():
    """Two convolutions without border effects and without activation: dL/dV is measured by autograd and
    compared with other directions.
    """
    g = gen(4)
    x, dy = (
        torch.randn(3, 4, 9, 9, generator=g, dtype=torch.double),
        torch.randn(3, 5, 5, 5, generator=g, dtype=torch.double),
    )
    M = nn.grad.conv2d_weight(x, (5, 4, 5, 5), dy)
    found = gradmax_directions(M, 3, 3, 3)

    def gradient(omega):
        V = torch.zeros(1, 4, 3, 3, dtype=torch.double, requires_grad=True)
        out = F.conv2d(F.conv2d(x, V), omega[:, None])
        return torch.autograd.grad((out * dy).sum(), V)[0].norm()

    best = gradient(found[0])
    assert_close(torch.linalg.vector_norm(found.flatten(1), dim=1), torch.ones(3, dtype=torch.double))
    assert_close(found.flatten(1) @ found.flatten(1).T, torch.eye(3, dtype=torch.double))
    for _ in range(200):
        omega = torch.randn(5, 3, 3, generator=g, dtype=torch.double)
        assert gradient(omega / omega.norm()) <= best * (1 + 1e-9)
    assert gradient(found[1]) <= best


@pytest.mark.parametrize(("o", "i"), [(3, 8), (8, 3), (5, 5)])
@pytest.mark.parametrize("large", [0, 1024])
def test_its_directions_are_the_full_decompositions(o, i, large, monkeypatch):
    """Singular vectors up to their sign; approximated, they catch as much of the gradient."""
    monkeypatch.setattr(gradmax, "LARGE", large)
    g = gen(6)
    low = torch.randn(o, 6, generator=g, dtype=torch.double) @ torch.randn(6, i * 25, generator=g).double()
    M = (low + 0.05 * torch.randn(o, i * 25, generator=g)).view(o, i, 5, 5)
    A = M.unfold(2, 3, 1).unfold(3, 3, 1).permute(1, 4, 5, 0, 2, 3).reshape(i * 9, o * 9)
    expected, found = torch.linalg.svd(A).Vh[:4], gradmax_directions(M, 4, 3, 3).flatten(1)
    assert_close(found @ found.T, torch.eye(4, dtype=torch.double), atol=1e-6, rtol=0)
    assert (A @ found.T).norm() > (1 - 1e-3) * (A @ expected.T).norm()
    if large:
        assert_close((found * expected).sum(1).abs(), torch.ones(4, dtype=torch.double))


def test_more_channels_than_directions_use_them_again():
    found = gradmax_directions(torch.randn(1, 1, 3, 3, generator=gen()), k=5, k1=3, k2=1)
    assert_close(found, found[:1].expand(5, 1, 1, 1))


def test_a_stride_is_minded():
    g = gen(5)
    x, dy = (
        torch.randn(2, 3, 9, 9, generator=g, dtype=torch.double),
        torch.randn(2, 4, 2, 2, generator=g, dtype=torch.double),
    )
    M = nn.grad.conv2d_weight(x, (4, 3, 7, 7), dy, stride=2)
    omega = gradmax_directions(M, 1, 3, 3, stride=2)[0]
    V = torch.zeros(1, 3, 3, 3, dtype=torch.double, requires_grad=True)
    out = F.conv2d(F.conv2d(x, V, stride=2), omega[:, None])
    gradient = torch.autograd.grad((out * dy).sum(), V)[0].norm()
    windows = M.unfold(2, 3, 2).unfold(3, 3, 2).permute(1, 4, 5, 0, 2, 3).reshape(27, 36)
    assert_close(gradient, torch.linalg.matrix_norm(windows, 2))


@pytest.mark.parametrize(
    ("name", "where"), [("resnet", "stages.1.0.conv1"), ("resnet", "stages.1.1.conv1"), ("vgg", "features.4")]
)
def test_gradmax_keeps_the_function_and_its_channels_are_not_dead(name, where):
    model = make(name)
    before = outputs(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    step(model, optimizer)
    before = outputs(model)
    node = surgery.trace(model)[where]
    n = node.width
    gradmax_(node, n + 4, X, Y, optimizer)
    assert_close(outputs(model), before, atol=1e-10, rtol=0)
    producer = model.get_submodule(where)
    assert not producer.weight[n:].any()
    model.zero_grad()
    F.cross_entropy(model.train()(X), Y).backward()
    grown, old = producer.weight.grad[n:], producer.weight.grad[:n]
    assert (
        grown.flatten(1).norm(dim=1).min() > 1e-2 * old.flatten(1).norm(dim=1).mean()
    )  # not dead behind ReLU
    assert grown.abs().max() < 100 * old.abs().max()  # nor blown up by BatchNorm
    for _ in range(3):
        step(model, optimizer)
    assert outputs(model).isfinite().all()
    assert producer.weight[n:].any()


def test_gradmax_has_more_gradient_than_random_directions():
    norms = {}
    for how in ("gradmax", "random"):
        model = make()
        node = surgery.trace(model)["stages.1.1.conv1"]
        gradmax_(node, 10, X, Y)
        second = model.stages[1][1].conv2
        if how == "random":
            with torch.no_grad():
                new = second.weight[:, 6:8]
                draw = torch.randn(new.shape, generator=gen(7), dtype=torch.double)
                new.copy_(draw * new.norm() / draw.norm())
                second.weight[:, 8:10] = -new
        model.zero_grad()
        F.cross_entropy(model.train()(X), Y).backward()
        norms[how] = model.stages[1][1].conv1.weight.grad[6:].norm()
    assert norms["gradmax"] > 1.2 * norms["random"]


def test_what_gradmax_cannot_handle_is_named():
    with pytest.raises(BadInput, match="GradMax: stem is no node between two convolutions"):
        gradmax_(surgery.trace(make())["stem"], 8, X, Y)
    with pytest.raises(BadInput, match=r"between features\.0 and features\.4 the size changes"):
        gradmax_(surgery.trace(make("vgg"))["features.0"], 8, X, Y)
    bare = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).double()
    with pytest.raises(BadInput, match="would stay dead behind ReLU"):
        gradmax_(surgery.trace(bare)["0"], 8, X, Y)


# In a run


def test_a_thin_teacher_becomes_the_larger_network_again():
    full, model = make(), make()
    before = thin_(model, 0.5)
    assert models.describe(model) == {"widths": [2, 3], "blocks": [[2], [3, 3]], "stem": 2}
    assert before[0] == ("stem", 4)
    net2net.grow_(model, None, X, Y, wider=before, generator=gen())
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in full.state_dict().items()
    }


@pytest.mark.parametrize("breaker", [*BREAKERS, "gradmax"])
def test_a_student_begins_where_its_teacher_ended(breaker):
    at_start = []

    class Look(Method):
        def on_epoch_start(self, run):
            at_start.append(evaluate(run.model, run.dataset, "validation", run.precision))

    model = make(dtype=torch.float)
    teacher = train(model, DATA, RECIPE)
    growth = Net2Net(wider=2.0, deeper=("stages.0.0",), breaker=breaker, noise=0.0, lr_factor=0.1)
    student = train(model, DATA, RECIPE, [growth, Look()])
    assert models.describe(model) == {"widths": [8, 12], "blocks": [[8, 8], [12, 12]], "stem": 8}
    if breaker != "random":
        assert at_start[0][0] == pytest.approx(teacher.rows[-1]["loss"], rel=0.05)
        assert at_start[0][1] == pytest.approx(teacher.rows[-1]["accuracy"], abs=1)
    assert student.kinds["reconfigure"]["count"] == 1  # growth is on the clock
    assert student.events[0]["text"].startswith("1,")
    both = teacher + student
    assert both.seconds == pytest.approx(teacher.seconds + student.seconds)


def test_growth_in_mid_run_and_the_learning_rate_after_it():
    model = make(dtype=torch.float)
    history = train(model, DATA, RECIPE, [Net2Net(at=0.5, wider=(("stem", 8),), lr_factor=0.1)])
    plain = train(make(dtype=torch.float), DATA, RECIPE)
    assert models.describe(model)["widths"] == [8, 6]
    for a, b in zip(history.rows, plain.rows, strict=True):
        assert a["lr"] == pytest.approx(
            b["lr"] * (0.1 if a["step"] > 4 else 1.0), abs=b["lr"] if a["step"] == 4 else 1e-9
        )
    assert [e["step"] for e in history.events] == [3]  # at the end of the fourth of eight steps
    assert history.flops > plain.flops


def test_the_learning_rate_is_held_until_after_the_growth_and_then_falls_to_0():
    lrs = []

    class Look(Method):
        def on_step_end(self, run):
            lrs.append(run.lr)

    recipe = replace(RECIPE, epochs=4, warmup=0.0)
    train(make(dtype=torch.float), DATA, recipe, [Net2Net(at=0.25, wider=2.0, hold=0.5), Look()])
    n = len(lrs)
    assert lrs[: n // 2] == [recipe.lr] * (n // 2)
    assert_close(lrs[n // 2 :], [recipe.lr * (n - i) / (n / 2) for i in range(n // 2, n)])


def test_newborn_channels_learn_at_a_rate_of_their_own():
    """One step of SGD without momentum: what is new moves twice as far, what is old as far as without."""
    moved = {}

    def run(factor):
        class Look(Method):
            def on_batch(self, run, x, y):
                run.state[self] = [p.detach().clone() for p in run.model.parameters()]
                return x, y

            def on_step_end(self, run):
                if run.step == 0:
                    now = run.model.parameters()
                    moved[factor] = [a.detach() - b for a, b in zip(now, run.state[self], strict=True)]

        recipe = replace(RECIPE, momentum=0.0, weight_decay=0.0)
        train(make(dtype=torch.float), DATA, recipe, [Net2Net(wider=(("stem", 8),), newborn=factor), Look()])

    run(1.0)
    run(2.0)
    shapes = [p.shape for p in make().parameters()]
    for a, b, was in zip(moved[1.0], moved[2.0], shapes, strict=True):
        inside = tuple(slice(0, n) for n in was)
        assert_close(b[inside], a[inside])
        for x, y in zip(net2net.fresh(a, was), net2net.fresh(b, was), strict=True):
            assert_close(y, 2 * x, rtol=1e-4, atol=1e-7)


def test_growing_nothing_is_no_effect():
    with pytest.raises(NoEffect, match="no node was to become wider"):
        train(make(dtype=torch.float), DATA, RECIPE, [Net2Net()])
    with pytest.raises(NoEffect, match="before the growth"):
        train(make(dtype=torch.float), DATA, RECIPE, [Net2Net(at=0.99, wider=2.0)])
    with pytest.raises(BadInput, match=r"in \[0, 1\)"):
        Net2Net(at=1.0)


def test_torchvisions_networks_grow():
    x = torch.randn(4, 3, 32, 32, generator=gen())
    for name, where in (
        ("torchvision.models:resnet18", "layer2.1"),
        ("torchvision.models:vgg11_bn", "features.2"),
    ):
        model = models.build(name, 4, (3, 32, 32))
        before = thin_(model, 0.25)
        model.eval()
        with torch.no_grad():
            y = model(x)
            net2net.grow_(
                model,
                None,
                x,
                torch.arange(4),
                wider=before,
                deeper=(where,),
                breaker="gradmax",
                generator=gen(),
            )
            assert_close(model(x), y, atol=1e-5, rtol=1e-4)


# Teacher and student

SMOKE = task("smoke", "synthetic")


def test_a_given_teacher_is_small_and_its_student_full_size():
    given = Grown(breaker="none", factor=0.5)
    student = given(SMOKE, 0)
    model, before, teacher = given.teacher(SMOKE, SMOKE.load(), 0)
    assert models.describe(model)["widths"] == [4, 4, 4]
    assert dict(before)["stem"] == 8
    assert student.structure == models.describe(SMOKE.build(SMOKE.load()))
    assert student.steps == SMOKE.recipe.epochs * 4 / 2
    assert max(r["lr"] for r in student.rows) < SMOKE.recipe.lr / 2
    assert student.events[0]["accuracy"] == teacher.accuracy


def test_students_of_a_given_teacher_share_it_at_any_length():
    arm = Grown(breaker="none", factor=0.5, given=SMOKE.recipe)
    whole, half = arm.teacher(SMOKE, SMOKE.load(), 0)[2], arm.teacher(SMOKE.at(0.5), SMOKE.load(), 0)[2]
    assert half is whole
    assert arm.teacher(SMOKE, SMOKE.load(), 1)[2] is not whole
    assert arm(SMOKE.at(0.5), 0).steps == arm(SMOKE, 0).steps / 2
    own = Grown(breaker="none", factor=0.5)
    assert own.teacher(SMOKE.at(0.5), SMOKE.load(), 0)[2].steps == whole.steps / 2
