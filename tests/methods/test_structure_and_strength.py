"""Structure and strength: patches and filters against slow oracles, gradients of the strength, exact merging,
no dW, no test image.
"""

import copy
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from effilib import cost, models, seeds
from effilib.data import synthetic
from effilib.dataset import Split
from effilib.errors import BadInput, NoEffect
from effilib.hooks import Method
from effilib.inspection import cut_patches
from effilib.methods import structure_and_strength as ss
from effilib.methods.structure_and_strength import (
    INFO,
    StrengthConv2d,
    StructureAndStrength,
    learn_filters,
    learn_structure_,
    merge_,
    strengthen_,
    whiten,
)
from effilib.own_loop import attach
from effilib.recipe import Recipe
from effilib.training import train
from tests.common import equal, g, resumed_and_whole

DATA = synthetic(images=300)
RECIPE = Recipe(epochs=2, batch_size=32, lr=0.05, precision="fp32")
FEW = dict(patches=300, images=100)


def network(seed=0, bn=False):
    return models.build("convnet", 4, (1, 8, 8), seed=seed, widths=(8, 8), bn=bn)


def stack(*layers, seed=0):
    with seeds.seeded(seed):
        return nn.Sequential(*(layer() for layer in layers))


def plain(bn=False, seed=0, bias=True, **conv):
    norm = [lambda: nn.BatchNorm2d(6)] if bn else []
    return stack(
        lambda: nn.Conv2d(4, 6, 3, **{"padding": 1, "bias": bias, **conv}),
        *norm,
        nn.ReLU,
        lambda: nn.Conv2d(6, 4, 3, bias=bias),
        seed=seed,
    )


def randomized(model, seed=3):
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, StrengthConv2d) and m.scope != "norm":
                m.t.uniform_(-2, 2, generator=g(seed))
    return model


X = torch.randn(5, 4, 8, 8, generator=g(9))


# Structure

CONVS = {
    "3x3": dict(kernel_size=3),
    "padded, stride 2": dict(kernel_size=3, padding=1, stride=2),
    "1x1": dict(kernel_size=1),
    "groups": dict(kernel_size=3, groups=2, padding=1),
    "depthwise": dict(kernel_size=3, groups=4),
    "dilated, reflected": dict(kernel_size=(3, 2), dilation=2, padding=1, padding_mode="reflect"),
    "same": dict(kernel_size=3, padding="same"),
}


@pytest.mark.parametrize("settings", CONVS.values(), ids=CONVS.keys())
def test_patches_are_what_the_convolution_multiplies(settings):
    """A filter applied to all patches gives all pixels of the convolution's output."""
    conv = nn.Conv2d(4, 8, bias=False, **settings)
    y = conv(X).detach()
    patches = cut_patches(X, conv, 10**6, g())  # all there are
    assert len(patches) == y[:, 0].numel() * conv.groups
    o = 8 // conv.groups
    products = patches.view(-1, conv.groups, patches.shape[1])  # (places, groups, d)
    mine = torch.cat(
        [products[:, i] @ conv.weight[i * o : (i + 1) * o].detach().flatten(1).T for i in range(conv.groups)],
        1,
    )
    assert torch.allclose(mine.sort(0).values, y.permute(0, 2, 3, 1).reshape(-1, 8).sort(0).values, atol=1e-5)


def test_few_of_many_patches_are_drawn_by_the_generator():
    conv = nn.Conv2d(4, 8, 3, groups=2)
    a, b, c = (cut_patches(X, conv, 20, g(s)) for s in (0, 0, 1))
    assert a.shape == (20, 18)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_whitened_patches_have_mean_0_and_about_unit_contrast():
    w = whiten(torch.randn(50, 27, generator=g()) * 7 + 100)
    assert w.mean(1).abs().max() < 1e-4
    assert torch.allclose(w.std(1, correction=0), torch.ones(50), atol=0.05)
    assert (whiten(torch.full((2, 9), 5.0)) == 0).all()


@pytest.mark.parametrize("structure", ["dictionary", "kmeans"])
def test_filters_have_hes_norm_and_the_generator_decides(structure):
    patches = torch.randn(400, 18, generator=g())
    a, b, c = (learn_filters(patches, 10, structure, g(s)) for s in (0, 0, 1))
    assert torch.allclose(a.norm(dim=1), torch.full((10,), 2**0.5))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    he = torch.empty(1000, 32, 3, 3)
    nn.init.kaiming_normal_(he, nonlinearity="relu", generator=g())
    assert he.flatten(1).norm(dim=1).mean() == pytest.approx(2**0.5, rel=0.02)


@pytest.mark.parametrize("structure", ["dictionary", "kmeans"])
def test_hidden_directions_are_found(structure):
    """Patches that are each one of five directions, and noise: every direction is a filter."""
    atoms = F.normalize(whiten(torch.randn(5, 12, generator=g())), dim=1)
    patches = 3 * atoms[torch.randint(5, (2000,), generator=g(1))] + 0.05 * torch.randn(
        2000, 12, generator=g(2)
    )
    found = F.normalize(learn_filters(patches, 10, structure, g(3)), dim=1)
    assert ((found @ atoms.T).abs().amax(0) > 0.97).all()


def test_the_dictionary_represents_patches_better_than_random_filters():
    patches = whiten(
        torch.randn(1500, 6, generator=g()) @ torch.randn(6, 25, generator=g(1))
    )  # they lie in 6 of 25 dimensions

    def left(filters):
        q = torch.linalg.qr(filters.T).Q
        return (patches - patches @ q @ q.T).square().mean() / patches.square().mean()

    random = torch.randn(8, 25, generator=g(2))
    for structure in ("dictionary", "kmeans"):
        assert left(learn_filters(patches, 8, structure, g())) < 0.3 * left(random)


@pytest.mark.parametrize("structure", ["dictionary", "kmeans"])
@pytest.mark.parametrize("count", [1, 3])
def test_too_few_patches_are_filled_up_with_random_directions(structure, count):
    filters = learn_filters(torch.randn(count, 9, generator=g()), 6, structure, g())
    assert torch.allclose(filters.norm(dim=1), torch.full((6,), 2**0.5))
    assert torch.isfinite(
        learn_filters(torch.ones(50, 9), 6, structure, g())
    ).all()  # flat patches tell nothing


def test_learning_uses_pytorchs_threads_and_warns_of_nothing(recwarn):
    from threadpoolctl import threadpool_info

    seen = []

    class Learner:
        def fit(self, patches):
            seen.extend(pool["num_threads"] for pool in threadpool_info())
            return self

    ss._fit(Learner(), torch.zeros(2, 2))
    assert max(seen) <= torch.get_num_threads()
    learn_filters(torch.randn(300, 9, generator=g()), 20, "dictionary", g())
    assert not recwarn.list


def images(dataset=DATA, n=100):
    return dataset.normalize(dataset.train.x[:n])


@pytest.mark.parametrize("bn", [False, True])
def test_each_layers_filters_come_from_its_own_input_with_the_layers_before_it_set(bn):
    model = network(bn=bn)
    before = copy.deepcopy(model.state_dict())
    seen = learn_structure_(model, images(), "kmeans", g(), patches=200)
    assert list(seen.values()) == [200, 200]
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    slow, draws = network(bn=bn), g()
    slow.train() if bn else slow.eval()
    x = images()
    for layer, mine in zip([m for m in slow.modules() if isinstance(m, nn.Conv2d)], convs, strict=True):
        inputs = []
        hook = layer.register_forward_pre_hook(lambda m, i, inputs=inputs: inputs.append(i[0].detach()))
        slow(x)  # a whole forward pass for each layer
        hook.remove()
        patches = cut_patches(inputs[0], layer, 200, draws)
        filters = learn_filters(patches, layer.out_channels, "kmeans", draws)
        layer.weight.data = (ss.he_gain(filters, patches) * filters).view_as(layer.weight)
        assert torch.allclose(layer.weight, mine.weight, atol=1e-5)
    other = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert all(
        k.endswith("weight") and before[k].dim() == 4 for k in other
    )  # no statistic, bias or classifier
    assert len(other) == 2
    assert model.training


def test_no_other_split_ever_enters_the_structure():
    """Another test set, another validation set, other images beyond the first: the same filters, bit for
    bit.
    """
    method = StructureAndStrength(structure="kmeans", train="all", **FEW)
    zero = Split(x=torch.zeros_like(DATA.test.x), y=DATA.test.y)
    short = replace(
        DATA,
        train=DATA.train[:64],
        decide=zero[: len(DATA.decide)],
        validation=zero[: len(DATA.validation)],
        test=zero,
    )

    def first(dataset):
        found = []

        @dataclass(frozen=True)
        class Look(Method):
            def on_epoch_start(self, run):
                found.append(
                    [m.weight.detach().clone() for m in run.model.modules() if isinstance(m, nn.Conv2d)]
                )

        train(network(), dataset, replace(RECIPE, epochs=1), [method, Look()], evaluations=1)
        return found[0]

    same = replace(DATA, decide=short.decide, validation=short.validation, test=zero)
    assert all(torch.equal(a, b) for a, b in zip(first(DATA), first(same), strict=True))
    assert not torch.equal(first(DATA)[0], first(short)[0])


def test_activations_keep_the_variance_that_hes_filters_would_give_them():
    patches = (
        torch.randn(2000, 3, generator=g()) @ torch.randn(3, 18, generator=g(1)) + 2
    )  # they lie in few directions
    random = torch.randn(5000, 18, generator=g(2))
    random *= 2**0.5 / random.norm(dim=1, keepdim=True)
    expected = (patches @ random.T).square().mean().item()
    w = learn_filters(patches, 8, "kmeans", g())
    assert ((ss.he_gain(w, patches) * w) @ patches.T).square().mean() == pytest.approx(expected, rel=0.1)
    assert ss.he_gain(random, patches) == pytest.approx(1, abs=0.05)
    assert ss.he_gain(w, torch.zeros(5, 18)) == 1
    deep = models.build("convnet", 4, (1, 8, 8), widths=(16, 16, 16), bn=False)
    learn_structure_(deep, images(), "kmeans", g(), patches=300)
    other = models.build("convnet", 4, (1, 8, 8), widths=(16, 16, 16), bn=False)
    mine, hes = (m(images()).square().mean() for m in (deep, other))
    assert 0.1 < mine / hes < 10


def test_networks_with_groups_shortcuts_and_dropout_are_learned_whole():
    import torchvision

    with seeds.seeded(0):
        model = torchvision.models.mobilenet_v3_small(num_classes=4)
    convs = sum(type(m) is nn.Conv2d for m in model.modules())
    assert (
        len(learn_structure_(model, torch.randn(8, 3, 32, 32, generator=g()), "kmeans", g(), patches=60))
        == convs
    )
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert len(strengthen_(model, torch.randn(2, 3, 32, 32), "auto")) == convs


# Strength

SCOPES = ("filter", "kernel", "input")
STRENGTH = {
    "plain": {},
    "stride": dict(stride=2),
    "groups": dict(groups=2),
    "no bias": dict(bias=False),
    "reflect": dict(padding_mode="reflect"),
}
each_scope = pytest.mark.parametrize("scope", SCOPES)


@each_scope
@pytest.mark.parametrize("settings", STRENGTH.values(), ids=STRENGTH.keys())
def test_strength_1_keeps_the_function_and_merging_is_exact(scope, settings):
    model = plain(**settings)
    before = model(X)
    assert set(strengthen_(model, X[:2], scope).values()) == {scope}
    assert torch.allclose(model(X), before, atol=1e-6)
    strong = randomized(model)(X)
    assert not torch.allclose(strong, before, atol=1e-2)
    assert merge_(model) == 2
    assert [type(m) for m in model if isinstance(m, nn.Conv2d)] == [nn.Conv2d] * 2
    assert torch.allclose(model(X), strong, atol=1e-5)
    fresh = plain(**settings)
    fresh.load_state_dict(model.state_dict())  # a plain network's checkpoint
    assert list(dict(fresh.named_parameters())) == list(dict(model.named_parameters()))


@each_scope
def test_the_gradient_of_the_strength_is_that_of_the_scaled_weight(scope):
    """dL/dt = sum (W dL/dW'), over the elements of W' = t W that each t scales."""
    model = plain(groups=2)
    strengthen_(model, X[:2], scope)
    randomized(model)
    slow = merged_copy(model)
    weights = torch.randn(model(X).shape, generator=g(4))
    (model(X) * weights).sum().backward()
    (slow(X) * weights).sum().backward()
    for mine, other in zip(model, slow, strict=True):
        if isinstance(mine, StrengthConv2d):
            product = mine.weight * other.weight.grad
            if scope == "input":
                o, c = product.shape[:2]
                expected = product.sum((2, 3)).view(mine.groups, o // mine.groups, c).sum(1).flatten()
            else:
                expected = product.sum((1, 2, 3)) if scope == "filter" else product.sum((2, 3))
            assert torch.allclose(mine.t.grad, expected, rtol=1e-4, atol=1e-3)
            assert torch.allclose(mine.bias.grad, other.bias.grad, atol=1e-4)


def merged_copy(model):
    other = copy.deepcopy(model)
    merge_(other)
    return other


@each_scope
def test_gradcheck(scope):
    model = plain(groups=2).double()
    strengthen_(model, X[:2].double(), scope)
    assert torch.autograd.gradcheck(
        lambda x, *_: model(x),
        (X[:1, :, :4, :4].double().requires_grad_(), *model.parameters()),
        fast_mode=True,
    )


class Masks(TorchDispatchMode):
    """Which of (dX, dW, db) every backward pass of a convolution was asked for."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.seen.append(list(args[10]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("scope", "dw"), [("filter", False), ("input", False), ("kernel", True)])
def test_dw_is_never_computed_where_the_strength_lies_outside_of_the_weight(scope, dw):
    model = plain()
    strengthen_(model, X[:2], scope)
    with Masks() as masks:
        model(X).sum().backward()
    assert masks.seen
    assert {m[1] for m in masks.seen} == {dw}


def test_the_filter_scope_saves_just_dws_products():
    model = plain()
    forward = cost.count_flops(lambda: model(X))
    step = cost.step_flops(model, (4, 8, 8), 5)
    first = cost.count_flops(lambda: model[0](X))
    assert step == 2 * forward + (forward - first)  # the first layer's dX is never needed
    strengthen_(model, X[:2], "filter")
    with FlopCounterMode(display=False) as count:
        model(X)
    assert count.get_total_flops() == forward
    assert cost.step_flops(model, (4, 8, 8), 5) == step - forward


@each_scope
def test_the_number_of_trainable_parameters(scope):
    model = plain(groups=2)
    strengthen_(model, X[:2], scope)
    t = {"filter": 6 + 4, "kernel": 6 * 2 + 4 * 6, "input": 4 + 6}[scope]
    assert cost.parameters(model) == t + 6 + 4
    assert {n for n, _ in model.named_parameters()} == {f"{i}.{p}" for i in (0, 2) for p in ("t", "bias")}


# In front of a normalisation


def test_a_strength_per_filter_in_front_of_batchnorm_is_refused_by_name():
    model = plain(bn=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        BadInput,
        match=r"strength per filter of 0 has no gradient: 1 behind it .* 'kernel' or 'input', or 'auto'",
    ):
        strengthen_(model, X[:2], "filter")
    assert [type(m) for m in model if isinstance(m, nn.Conv2d)] == [nn.Conv2d] * 2  # nothing was half done
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for norm in (lambda: nn.InstanceNorm2d(6), lambda: nn.BatchNorm2d(6, affine=False)):
        with pytest.raises(BadInput, match="has no gradient"):
            strengthen_(stack(lambda: nn.Conv2d(4, 6, 3), norm), X[:2], "filter")


def strength_gradients(model, scope):
    strengthen_(model, X[:2], scope)
    (model(X) * torch.randn(model(X).shape, generator=g(4))).mean().backward()
    return model


def test_it_is_dead_there_and_alive_elsewhere():
    model = plain(bn=True)
    strengthen_(model, X[:2], "auto")
    model[0].scope, model[0].t = "filter", nn.Parameter(torch.ones(6))
    (model(X) * torch.randn(model(X).shape, generator=g(4))).mean().backward()
    dead, alive = model[0].t.grad.abs().max(), model[3].t.grad.abs().max()
    assert dead < 1e-4 * alive
    for scope in ("kernel", "input"):
        t = strength_gradients(plain(bn=True), scope)[0].t
        assert t.grad.abs().max() > 1e-2 * alive
        assert (
            abs((t * t.grad).sum()) < 1e-4 * t.grad.abs().sum()
        )  # the size of a whole filter changes nothing


def test_auto_takes_the_normalisations_own_weight_and_only_it_is_trained():
    model = plain(bn=True, bias=False)
    before = model(X)
    assert strengthen_(model, X[:2], "auto") == {"0": "norm", "3": "filter"}
    assert {n for n, _ in model.named_parameters()} == {"1.weight", "1.bias", "3.t"}
    assert torch.equal(model(X), before)
    model(X).sum().backward()
    assert model[1].weight.grad.abs().sum() > 0
    assert merge_(model) == 2
    assert torch.equal(model(X), before)


def test_a_single_input_channel_is_moved_too_or_refused_where_it_cannot_be():
    def single(**norm):
        return stack(
            lambda: nn.Conv2d(1, 6, 3),
            lambda: nn.BatchNorm2d(6, **norm),
            lambda: nn.Conv2d(6, 6, 3, groups=6),
            lambda: nn.BatchNorm2d(6),
        )

    for scope in ("kernel", "input", "auto"):
        assert strengthen_(single(), X[:2, :1], scope) == {"0": "norm", "2": "norm"}
    with pytest.raises(BadInput, match="no strength of 0 has a gradient: it has one input channel, and 1"):
        strengthen_(single(affine=False), X[:2, :1], "kernel")
    without = stack(lambda: nn.Conv2d(4, 6, 3), lambda: nn.BatchNorm2d(6, affine=False))
    assert strengthen_(without, X[:2], "auto") == {"0": "input"}


def test_a_relu_or_a_sum_between_convolution_and_normalisation_is_no_obstacle():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(x + self.a(x))

    with seeds.seeded(0):
        model = Residual()
    assert strengthen_(model, X[:2], "filter") == {"a": "filter"}
    (model(X) * torch.randn(5, 4, 8, 8, generator=g(4))).mean().backward()
    assert model.a.t.grad.abs().max() > 1e-4


def test_torchvisions_networks_are_read_right():
    import torchvision

    with seeds.seeded(0):
        resnet, vgg = torchvision.models.resnet18(num_classes=4), torchvision.models.vgg11(num_classes=4)
    scopes = strengthen_(resnet, torch.randn(2, 3, 32, 32), "auto")
    assert set(scopes.values()) == {"norm"}
    assert len(scopes) == 20
    assert set(strengthen_(vgg, torch.randn(2, 3, 32, 32), "filter").values()) == {"filter"}
    x = torch.randn(2, 3, 32, 32)
    y = randomized(vgg).eval()(x)
    merge_(vgg)
    assert torch.allclose(vgg(x), y, rtol=1e-3, atol=1e-4 * y.abs().max().item())


def test_a_model_without_convolutions_and_a_second_time_have_no_effect():
    for function in (
        lambda m: strengthen_(m, X, "filter"),
        lambda m: learn_structure_(m, X, "kmeans", g()),
        merge_,
    ):
        with pytest.raises(NoEffect, match="Sequential has no"):
            function(nn.Sequential(nn.Flatten(), nn.Linear(256, 4)))
    model = plain()
    strengthen_(model, X[:2])
    with pytest.raises(NoEffect):
        strengthen_(model, X[:2])
    merge_(model)
    with pytest.raises(NoEffect):
        merge_(model)
    with pytest.raises(
        BadInput, match=r"unknown scope of strength 'filters': .* \(did you mean 'filter'\?\)"
    ):
        strengthen_(plain(), X, "filters")


# The method

METHODS = {
    "kmeans, strength": (StructureAndStrength(structure="kmeans", **FEW), False),
    "dictionary, all": (StructureAndStrength(train="all", **FEW), False),
    "random, strength per kernel": (StructureAndStrength(structure="random", scope="kernel"), False),
    "random, strength per input": (StructureAndStrength(structure="random", scope="input"), True),
    "BatchNorm only": (StructureAndStrength(structure="random", scope="auto"), True),
}


@dataclass(frozen=True)
class Watch(Method):
    """Keeps the filters before the first step, and what the optimizer holds in training."""

    seen: dict = field(default_factory=dict, hash=False, compare=False, repr=False)

    def on_epoch_start(self, run):
        if run.epoch == 0:
            self.seen["filters"] = [
                m.weight.detach().clone() for m in run.model.modules() if isinstance(m, nn.Conv2d)
            ]
        held = [p for group in run.optimizer.param_groups for p in group["params"]]
        self.seen["held"] = set(held) == set(run.model.parameters())
        groups = run.optimizer.param_groups
        self.seen["groups"] = [
            {"weight_decay": g["weight_decay"], "lr": g["lr"], "n": len(g["params"])} for g in groups
        ]

    def on_epoch_end(self, run):
        self.seen["after"] = [
            m.weight.detach().clone() for m in run.model.modules() if isinstance(m, nn.Conv2d)
        ]
        self.seen["strengths"] = [
            m.t.detach().clone()
            for m in run.model.modules()
            if isinstance(m, StrengthConv2d) and m.scope != "norm"
        ]


@pytest.mark.parametrize("name", METHODS)
def test_frozen_filters_stay_what_is_trained_moves_and_a_plain_network_is_left(name):
    method, bn = METHODS[name]
    watch, model = Watch(), network(bn=bn)
    keys = list(model.state_dict())
    history = train(model, DATA, RECIPE, [method, watch])
    frozen = all(torch.equal(a, b) for a, b in zip(watch.seen["filters"], watch.seen["after"], strict=True))
    assert frozen == (method.train == "strength")
    assert watch.seen["held"]
    assert all((t != 1).any() for t in watch.seen["strengths"])
    assert all(type(m) is not StrengthConv2d for m in model.modules())
    assert set(model.state_dict()) == set(keys)
    assert all(p.requires_grad for p in model.parameters())
    assert ("structure" in history.kinds) == (method.structure != "random")
    assert (
        history.rows[0]["seconds"] >= history.kinds.get("structure", {"seconds": 0})["seconds"]
    )  # it is on the clock
    assert not history.diverged


def test_weight_decay_spares_the_strength_and_its_rate_has_a_factor():
    watch = Watch()
    train(network(), DATA, RECIPE, [StructureAndStrength(structure="random", lr_factor=3.0), watch])
    others, strengths = watch.seen["groups"]
    assert (others["weight_decay"], strengths["weight_decay"]) == (RECIPE.weight_decay, 0)
    assert strengths["lr"] == pytest.approx(3 * others["lr"])
    assert strengths["n"] == 2


def test_the_groups_of_a_users_optimizer_stay():
    model = network()
    groups = [{"params": list(m.parameters())} for m in (model.features, model.head)]
    groups[0] |= dict(lr=0.1, weight_decay=0.5)
    optimizer = torch.optim.SGD(groups, lr=0.01)
    loader = [(images(n=8), DATA.train.y[:8])]

    def held():
        return [(g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]

    run = attach(model, optimizer, [StructureAndStrength(structure="random")], steps=1, loader=loader)
    assert held() == [(0.1, 0.5, 2), (0.01, 0, 2), (0.1, 0, 2)]  # two biases, the head, two strengths
    for x, y in run.read():
        F.cross_entropy(run.model(x), y).backward()
        run.update()
    assert held() == [(0.1, 0.5, 4), (0.01, 0, 2)]


@pytest.mark.parametrize("how", [dict(train="all"), dict(scope="filter")])
def test_filters_that_the_user_froze_are_left_alone(how):
    model = network()
    model.features[0].weight.requires_grad_(False)
    before = model.features[0].weight.clone()
    history = train(model, DATA, RECIPE, [StructureAndStrength(structure="kmeans", **FEW, **how)])
    assert torch.equal(model.features[0].weight, before)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["features.0.weight"]
    assert history.events[0]["text"] == "kmeans of 300 patches for 1 layers"
    with pytest.raises(NoEffect, match=r"VGG has no nn\.Conv2d that is not frozen"):
        strengthen_(network().requires_grad_(False), images())


@pytest.mark.parametrize("how", [dict(images=0), dict(patches=0), dict(lr_factor=0), dict(scope="all")])
def test_settings_are_checked(how):
    with pytest.raises(BadInput, match=next(iter(how))):
        StructureAndStrength(**how)


def test_frozen_filters_take_fewer_flops_and_parameters():
    runs = {n: train(network(bn=bn), DATA, RECIPE, [m]) for n, (m, bn) in METHODS.items()}
    whole = train(network(), DATA, RECIPE)
    assert runs["kmeans, strength"].flops < 0.75 * whole.flops
    assert runs["dictionary, all"].flops == whole.flops
    assert runs["kmeans, strength"].memory["parameters"] < 0.2 * whole.memory["parameters"]
    assert runs["kmeans, strength"].events[-1]["trainable"] == 8 + 8 + 8 + 8 + 4 * 8 + 4


def test_it_learns():
    recipe = replace(RECIPE, epochs=30, lr=0.4)
    assert (
        train(
            network(bn=True), DATA, recipe, [StructureAndStrength(structure="kmeans", scope="auto", **FEW)]
        ).accuracy
        > 60
    )


def test_random_filters_with_all_weights_are_no_method():
    with pytest.raises(NoEffect, match="ordinary training"):
        train(network(), DATA, RECIPE, [StructureAndStrength(structure="random", train="all")])
    with pytest.raises(BadInput, match="unknown structure of filters 'kmean'"):
        train(network(), DATA, RECIPE, [StructureAndStrength(structure="kmean")])
    with pytest.raises(BadInput, match=r"strength per filter of features\.0 has no gradient: features\.1"):
        train(network(bn=True), DATA, RECIPE, [StructureAndStrength(structure="random")])


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_ends_bit_equal(name, tmp_path):
    method, bn = METHODS[name]
    (resumed, a), (whole, b) = resumed_and_whole(
        lambda: network(bn=bn), DATA, RECIPE, [method], tmp_path / "run.pt"
    )
    assert equal(resumed, whole)
    assert [e["text"] for e in a.events] == [e["text"] for e in b.events]


@each_scope
def test_autocast_and_channels_last_go_through(scope):
    model = plain().to(memory_format=torch.channels_last)
    strengthen_(model, X[:2], scope)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(X.contiguous(memory_format=torch.channels_last))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_the_information_is_complete():
    assert all(getattr(INFO, f) for f in ("name", "name_de", "chapter", "paper", "claim", "cost_model"))
