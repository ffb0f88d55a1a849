"""Standardization loss: the equation against tables and torch.distributions, the fused gradient against
autograd, surgery, training.
"""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal, kl_divergence

from effilib import models
from effilib.data import synthetic
from effilib.errors import BadInput, NoEffect
from effilib.methods import standardization_loss as sl
from effilib.methods.other_norms import OtherNorm
from effilib.methods.standardization_loss import (
    INFO,
    StandardizationLoss,
    Standardized,
    Watch,
    cnn,
    collect_,
    divergence,
    divergence_of,
    naive_divergence,
    plain_,
    standardize_,
)
from effilib.recipe import Recipe
from effilib.training import train

DATA = synthetic(images=300)
RECIPE = Recipe(epochs=2, batch_size=32, lr=0.05, precision="fp32")
LAYOUTS = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)
SHAPES = [(2, 1, 1, 1), (5, 3, 1, 1), (1, 2, 3, 1), (4, 8, 5, 3), (3, 17, 4, 4)]


def g(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0, mean=1.0, std=2.0, dtype=torch.float64):
    return (std * torch.randn(*shape, generator=g(seed), dtype=torch.float64) + mean).to(dtype)


def network(seed=0, bn=True):
    return models.build("convnet", 4, (1, 8, 8), seed=seed, widths=(8, 8), bn=bn)


# The equation


@pytest.mark.parametrize(
    ("mean", "var", "D"), [(0, 1, 0), (1, 1, 0.5), (0, 4, 0.8069), (0, 0.25, 0.3181), (2, 0.5, 2.0966)]
)
def test_the_table_of_values(mean, var, D):
    assert divergence_of(torch.tensor([float(mean)]), torch.tensor([float(var)])).item() == pytest.approx(
        D, abs=5e-5
    )
    x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64) * var**0.5 + mean
    assert divergence(x, 0.0).item() == pytest.approx(D, abs=5e-5)
    assert divergence(x.repeat(1, 7), 0.0).item() == pytest.approx(
        7 * D, abs=5e-4
    )  # a sum over channels, not a mean


@pytest.mark.parametrize("shape", [(8, 3), (6, 3, 4), *SHAPES[1:]])
def test_it_is_the_kl_divergence_from_the_standard_normal(shape):
    x = draw(*shape)
    dims = [d for d in range(x.dim()) if d != 1]
    var, mean = torch.var_mean(x, dims, unbiased=False)
    expected = kl_divergence(Normal(mean, var.sqrt()), Normal(0.0, 1.0)).sum()
    assert divergence(x, 0.0).item() == pytest.approx(expected.item(), rel=1e-9)
    assert naive_divergence(x, 0.0).item() == pytest.approx(expected.item(), rel=1e-9)


@settings(max_examples=50, deadline=None)
@given(*[st.floats(-3, 3)] * 2, *[st.floats(0.01, 9)] * 2, st.floats(0, 1))
def test_it_is_never_negative_and_convex_in_mean_and_variance(m1, m2, v1, v2, share):
    m, v = torch.tensor([[m1], [m2]], dtype=torch.float64), torch.tensor([[v1], [v2]], dtype=torch.float64)
    ends = [divergence_of(m[i], v[i]).item() for i in (0, 1)]
    between = divergence_of(share * m[0] + (1 - share) * m[1], share * v[0] + (1 - share) * v[1]).item()
    assert min(ends) >= -1e-12
    assert between <= share * ends[0] + (1 - share) * ends[1] + 1e-9


def test_images_and_pixels_may_be_permuted():
    x = draw(6, 3, 4, 5)
    order = torch.randperm(6 * 20, generator=g())
    mixed = x.transpose(0, 1).flatten(1)[:, order].view(3, 6, 4, 5).transpose(0, 1)
    assert divergence(mixed).item() == pytest.approx(divergence(x).item(), rel=1e-12)


# The fused form


@LAYOUTS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient_are_those_of_autograd(shape, layout):
    x = draw(*shape).contiguous(memory_format=layout).requires_grad_()
    fused, naive = divergence(x), naive_divergence(x)
    assert fused.item() == pytest.approx(naive.item(), rel=1e-9)
    ours, theirs = (torch.autograd.grad(3 * d, x)[0] for d in (fused, naive))
    assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-12)
    if shape[1] > 1 and x[0, 0].numel() > 1:
        assert ours.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("shape", [(4, 2), (3, 2, 2, 3), (4, 2, 3)])
def test_gradcheck(shape):
    x = draw(*shape, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: divergence(x, 1e-3), (x,))


def test_a_bias_counts_as_part_of_the_pre_activation():
    x, bias = draw(5, 3, 2, 2).requires_grad_(), draw(3, seed=2).requires_grad_()
    parts = [
        torch.autograd.grad(d, (x, bias))
        for d in (divergence(x, bias=bias), naive_divergence(x + bias.view(1, -1, 1, 1)))
    ]
    assert all(torch.allclose(ours, theirs) for ours, theirs in zip(*parts, strict=True))
    assert torch.autograd.gradcheck(lambda x, b: divergence(x, 1e-3, bias=b), (x, bias))


def test_a_relu_in_place_behind_it_changes_nothing():
    grads = []
    for inplace in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=inplace),
            nn.Conv2d(4, 2, 3),
            nn.ReLU(inplace=inplace),
        )
        sources = [*standardize_(model).values(), Watch(model[3])]
        out = model(torch.rand(4, 1, 8, 8, generator=g()))
        (out.sum() + collect_(sources)).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_the_two_identities_of_the_gradient():
    x = draw(8, 4, 3, 3).requires_grad_()
    (dx,) = torch.autograd.grad(divergence(x, 0.0), x)
    var, mean = torch.var_mean(x.detach(), (0, 2, 3), unbiased=False)
    assert torch.allclose(dx.sum((0, 2, 3)), mean)
    assert torch.allclose((dx * (x.detach() - mean.view(1, -1, 1, 1))).sum((0, 2, 3)), var - 1)


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_added_up_in_32(dtype, layout):
    # a large mean, as many values as bf16 sums could not count to, and a variance that they would lose
    x = draw(64, 4, 16, 16, mean=3.0, std=0.5).to(dtype).contiguous(memory_format=layout).requires_grad_()
    D, exact = divergence(x), naive_divergence(x.double())
    assert D.dtype == torch.float32
    assert D.item() == pytest.approx(exact.item(), rel=1e-4)
    (ours,), (theirs,) = torch.autograd.grad(1e4 * D, x), torch.autograd.grad(1e4 * exact, x)
    assert ours.dtype == dtype
    assert (ours - theirs).float().norm() < 4e-3 * theirs.float().norm()


def test_a_dead_channel_has_a_finite_loss_and_no_gradient():
    x = torch.zeros(4, 2, 3, 3, requires_grad=True)
    D = divergence(x)
    (dx,) = torch.autograd.grad(D, x)
    assert D.item() == pytest.approx(2 * 0.5 * (11.513 - 1), abs=1e-3)
    assert not dx.any()


def test_one_value_a_channel_is_refused():
    for shape in ((1, 3), (1, 3, 1, 1), (3,)):
        with pytest.raises(BadInput, match="no variance"):
            divergence(torch.zeros(shape))


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_descent_on_it_alone_standardizes(eps):
    x = draw(100, 3, mean=3.0, std=4.0)
    for _ in range(200):
        x.requires_grad_()
        (dx,) = torch.autograd.grad(divergence(x, eps), x)
        x = x.detach() - 50 * dx
    var, mean = torch.var_mean(x, 0, unbiased=False)
    assert mean.abs().max() < 1e-8
    assert (var - 1).abs().max() < 2 * eps + 1e-8


# Surgery


def test_batchnorms_become_biases_and_the_optimizer_follows():
    model = network()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for i, m in enumerate(norms):
        nn.init.constant_(m.bias, i + 1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    made = standardize_(model, optimizer)
    assert len(made) == len(norms) == 2
    assert [m.bias[0].item() for m in made.values()] == [1.0, 2.0]
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    held = optimizer.param_groups[0]["params"]
    assert set(held) == set(model.parameters())
    assert len(held) == len(set(held))
    assert {n: sum(p.numel() for p in m.parameters()) for n, m in made.items()} == dict.fromkeys(made, 8)


def test_the_output_is_that_of_the_layers_without_normalisation():
    model = network()
    standardize_(model)
    x = torch.rand(4, 1, 8, 8, generator=g())
    bare = copy.deepcopy(model)
    for parent in list(bare.modules()):
        for child, m in list(parent.named_children()):
            if isinstance(m, Standardized):
                setattr(parent, child, nn.Identity())
    assert torch.equal(model.eval()(x), bare.eval()(x))  # biases are 0


def test_plain_leaves_outputs_and_parameters_as_they_are():
    model = network()
    layers = standardize_(model)
    for m in layers.values():
        nn.init.normal_(m.bias)
    x = torch.rand(4, 1, 8, 8, generator=g())
    before, parameters = model.eval()(x), set(model.parameters())
    assert plain_(model) == 2
    assert torch.equal(model.eval()(x), before)
    assert torch.equal(model.train()(x), before)
    assert set(model.parameters()) == parameters
    with pytest.raises(NoEffect):
        plain_(model)


def test_terms_are_noted_in_training_only_and_collected_once():
    model = network()
    layers = list(standardize_(model).values())
    x = torch.rand(4, 1, 8, 8, generator=g())
    model.eval()(x)
    with torch.no_grad():
        model.train()(x)
    assert collect_(layers) is None
    seen = []
    hooks = [m.register_forward_hook(lambda m, i, o: seen.append(o.clone())) for m in layers]
    model(x)
    assert collect_(layers).item() == pytest.approx(sum(naive_divergence(o).item() for o in seen), rel=1e-5)
    assert collect_(layers) is None
    for h in hooks:
        h.remove()


def test_a_shared_layer_stays_shared_and_counts_twice():
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), norm, nn.Conv2d(3, 3, 1), norm)
    layers = standardize_(model)
    assert model[1] is model[3]
    model(torch.rand(4, 3, 2, 2, generator=g()))
    assert len(model[1].terms) == 2
    assert set(layers) == {"1", "3"}


def test_norms_without_parameters_and_of_other_kinds():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False), nn.ReLU(), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (layer,) = standardize_(model, optimizer).values()
    assert set(optimizer.param_groups[0]["params"]) == set(model.parameters())
    model(torch.rand(5, 4, generator=g())).sum().backward()
    assert len(layer.terms) == 1
    with pytest.raises(NoEffect, match="no BatchNorm"):
        standardize_(nn.Sequential(nn.Linear(4, 4)))


def test_hooks_see_what_a_batchnorm_would():
    model = network(bn=False)
    layers = sl.pre_activations(model)
    assert list(layers) == ["features.0", "features.3"]  # not the classifier
    watches = [Watch(m) for m in layers.values()]
    x = torch.rand(4, 1, 8, 8, generator=g())
    first = naive_divergence(model.features[0](x)).item()
    collect_(watches)
    model(x)
    assert watches[0].terms[0].item() == pytest.approx(
        first, rel=1e-5
    )  # before the ReLU, which works in place
    with pytest.raises(NoEffect):
        sl.pre_activations(nn.Sequential(nn.Linear(3, 2)))


# Training


@pytest.mark.parametrize("bn", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_with_it_lowers_the_divergence_and_leaves_a_plain_model(bn, precision):
    recipe = Recipe(epochs=3, batch_size=32, lr=0.05, precision=precision)
    ends = {}
    for lam in (1e-9, 1.0):
        model = network(bn=bn)
        history = train(model, DATA, recipe, [StandardizationLoss(lam=lam)], evaluations=1)
        ends[lam] = next(e["divergence"] for e in history.events if "divergence" in e)
        kinds = {type(m) for m in model.modules()}
        assert not kinds & {nn.BatchNorm2d, Standardized}
        assert not any(m._forward_hooks for m in model.modules())
        assert "_standardization" not in model.__dict__
        assert next(e["layers"] for e in history.events if "layers" in e) == 2
    assert ends[1.0] < 0.5 * ends[1e-9]


def test_the_step_is_that_of_the_loss_by_hand():
    recipe = Recipe(
        epochs=0.1, batch_size=32, lr=0.1, precision="fp32", momentum=0.0, weight_decay=0.0, warmup=0.0
    )
    model, by_hand = network(bn=False), network(bn=False)
    seen = []

    class Keep(StandardizationLoss):
        def on_batch(self, run, x, y):
            seen.append((x, y))
            return x, y

    assert train(model, DATA, recipe, [Keep(lam=0.5)], evaluations=1).steps == 1
    outputs = []
    for layer in (by_hand.features[0], by_hand.features[3]):
        layer.register_forward_hook(lambda m, i, o: outputs.append(o.clone()))
    ((x, y),) = seen
    loss = nn.functional.cross_entropy(by_hand(x), y)
    (loss + 0.5 * sum(naive_divergence(o, sl.BOUND) for o in outputs)).backward()
    for p, q in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.allclose(p, q - 0.1 * q.grad, atol=1e-5)


def test_it_resumes_bit_for_bit(tmp_path):
    def run(epochs, file):
        model = network()
        return train(
            model,
            DATA,
            Recipe(epochs=epochs, batch_size=32, lr=0.05, precision="fp32"),
            [StandardizationLoss()],
            checkpoint=file,
        )

    class Stop(Exception):
        pass

    def stop(row):
        if row["epoch"] > 1.5:
            raise Stop

    whole = run(2, None)
    file = tmp_path / "run.pt"
    with pytest.raises(Stop):
        train(network(), DATA, RECIPE, [StandardizationLoss()], checkpoint=file, progress=stop)
    assert file.exists()
    again = run(2, file)
    assert [r["loss"] for r in again.rows] == [r["loss"] for r in whole.rows]


def test_a_users_network_and_residual_ones():
    for name, count in (("torchvision.models:resnet18", 20), ("resnet", None)):
        model = models.build(
            name,
            4,
            (3, 16, 16) if count else (1, 8, 8),
            **({} if count else {"widths": (8, 8), "blocks": (1, 1)}),
        )
        norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        assert len(standardize_(model)) == norms == (count or 6)
        assert models.describe(model) == models.describe(copy.deepcopy(model))


def test_nothing_to_watch_and_bad_settings_are_errors():
    with pytest.raises(BadInput, match="lambda"):
        train(network(), DATA, RECIPE, [StandardizationLoss(lam=0.0)])
    with pytest.raises(BadInput, match="unknown normalisation"):
        train(network(), DATA, RECIPE, [OtherNorm(kind="layer")])
    with pytest.raises(BadInput, match="groups is 0, it must be a whole number above 0"):
        OtherNorm(kind="group", groups=0)
    with pytest.raises(NoEffect):
        train(network(bn=False), DATA, RECIPE, [OtherNorm(kind="group")])


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("kind", ["none", "group"])
def test_the_controls_replace_every_batchnorm_in_its_own_format(kind, precision):
    model = network()
    recipe = replace(RECIPE, precision=precision)
    history = train(model, DATA, recipe, [OtherNorm(kind=kind)], evaluations=1)
    assert len({p.dtype for p in model.parameters()}) == 1
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    groups = [m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)]
    assert groups == ([8, 8] if kind == "group" else [])
    assert not history.diverged


def test_info_says_what_it_is():
    assert INFO.chapter == "7.2"
    assert "1903.00925" in INFO.paper


# The paper's network


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3), (9, 1)])
def test_the_papers_network(size, channels):
    model = cnn(10, channels)
    assert model(torch.zeros(2, channels, size, size)).shape == (2, 10)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [m.num_features for m in norms] == [32, 16, 8]
    assert not any(m.weight.requires_grad for m in norms)


def residual():
    return models.build("resnet", 4, (1, 8, 8), widths=(8, 8), blocks=(2, 2))


def test_residual_paths_begin_at_zero_and_their_gains_end_in_the_convolutions():
    net, x = residual().train(), torch.randn(16, 1, 8, 8, generator=g(0))
    ends = sl.path_ends(net, x[:2])
    assert ends == {f"stages.{i}.{j}.bn2": f"stages.{i}.{j}.conv2" for i in (0, 1) for j in (0, 1)}
    sl.standardize_(net, gains=ends)
    stem = torch.relu(net.bn(net.stem(x)))
    assert torch.equal(net.stages[0](stem), stem)
    for name in ends:
        net.get_submodule(name).gain.data.normal_(generator=g(1))
        net.get_submodule(name).bias.data.normal_(generator=g(2))
    before = net.eval()(x)
    sl.plain_(net, ends=ends)
    assert not any("gain" in name for name, _ in net.named_parameters())
    assert torch.allclose(net(x), before, atol=1e-4)


def test_a_resnet_trains_where_it_diverged_without_gains():
    recipe = Recipe(epochs=4, batch_size=32, lr=0.4, precision="fp32")
    ends = {
        gains: train(residual(), DATA, recipe, [StandardizationLoss(lam=0.01, gains=gains)])
        for gains in (True, False)
    }
    assert not ends[True].diverged
    assert ends[True].accuracy > 60
    assert ends[False].diverged or ends[False].accuracy < ends[True].accuracy


def test_a_rarer_penalty_counts_as_many_times():
    recipe = Recipe(
        epochs=0.9, batch_size=32, lr=1e-9, precision="fp32", momentum=0.0, weight_decay=0.0, warmup=0.0
    )
    terms = []

    class Note(StandardizationLoss):
        def loss_terms(self, run):
            terms.append(super().loss_terms(run))
            return terms[-1]

    train(network(bn=True), DATA, recipe, [Note(every=3)], evaluations=1)
    often, terms = terms, []
    train(network(bn=True), DATA, recipe, [Note(every=1)], evaluations=1)
    assert [t is not None for t in often[:4]] == [True, False, False, True]
    assert often[0].item() == pytest.approx(3 * terms[0].item(), rel=1e-5)


def test_a_dying_channel_has_a_bounded_gradient():
    x = 1e-3 * torch.randn(64, 3, 4, 4, generator=g(0))
    x.requires_grad_()
    sl.divergence(x, sl.BOUND).backward()
    norm = x.grad.flatten(2).transpose(0, 1).flatten(1).norm(dim=1) * (64 * 16) ** 0.5
    assert (norm < 1 / (2 * sl.BOUND**0.5) + 0.1).all()
