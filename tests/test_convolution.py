"""The approximable product: exact where nothing is replaced, each part replaceable alone, only what is asked
for computed.
"""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effilib import convolution as c
from effilib import cost, models
from effilib.convolution import (
    ApproxConv2d,
    Approximation,
    ApproxLinear,
    Convolution,
    MatrixProduct,
    approx_conv2d,
    approx_linear,
    convert_,
    layers,
    revert_,
)
from effilib.data import synthetic
from effilib.errors import BadInput, NoEffect
from effilib.methods.column_row_sampling import ColumnRowSampling
from effilib.methods.dynamic_fixed_point import DynamicFixedPoint
from effilib.methods.gradient_approximation import GradientApproximation
from effilib.methods.gradient_pruning import GradientPruning
from effilib.methods.gradient_subsets import GradientSubsets
from effilib.recipe import Recipe
from effilib.training import train
from tests.common import g

GEOMETRIES = {
    "3x3": dict(padding=1),
    "stride 2": dict(stride=2, padding=1),
    "no padding": dict(),
    "dilated": dict(dilation=2, padding=2),
    "groups": dict(groups=2, padding=1),
    "not square": dict(stride=(2, 1), padding=(0, 2)),
}
SCALES = [None, 2.0, torch.tensor([0.5, 3.0], dtype=torch.float64)]
PRODUCTS = {
    "3x3": Convolution(padding=(1, 1)),
    "stride": Convolution(stride=(2, 2)),
    "linear": MatrixProduct(),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def tensors(*, groups=1, k=3, dtype=torch.float64, layout="contiguous", n=3, channels=4, out=6, size=7):
    x = torch.randn(n, channels, size, size, generator=g(), dtype=dtype).contiguous(
        memory_format=LAYOUTS[layout]
    )
    w = torch.randn(out, channels // groups, k, k, generator=g(1), dtype=dtype).contiguous(
        memory_format=LAYOUTS[layout]
    )
    return (
        x.requires_grad_(),
        w.requires_grad_(),
        torch.randn(out, generator=g(2), dtype=dtype).requires_grad_(),
    )


def gradients(y, *inputs):
    dy = torch.randn(y.shape, generator=g(3), dtype=torch.float64).to(y)
    return torch.autograd.grad(y, inputs, dy, retain_graph=True)


# Nothing replaced


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_replacement_it_is_bit_equal_to_pytorch(geometry, layout, dtype):
    x, w, b = tensors(groups=geometry.get("groups", 1), dtype=dtype, layout=layout)
    mine, theirs = approx_conv2d(x, w, b, **geometry), F.conv2d(x, w, b, **geometry)
    assert torch.equal(mine, theirs)
    assert mine.stride() == theirs.stride()
    for a, e in zip(gradients(mine, x, w), gradients(theirs, x, w), strict=True):
        assert torch.equal(a, e)
    ours, its = (gradients(m, b)[0].float() for m in (mine, theirs))
    assert torch.allclose(ours, its, rtol=0.02, atol=0.02 * its.abs().max().item())


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_gradients_pass_gradcheck(geometry):
    x, w, b = tensors(groups=geometry.get("groups", 1), n=2, size=5)
    assert torch.autograd.gradcheck(lambda *t: approx_conv2d(*t, **geometry), (x, w, b))


def test_the_linear_product_is_pytorchs():
    x, w, b = (
        torch.randn(s, generator=g(), dtype=torch.float64).requires_grad_() for s in ((2, 3, 5), (4, 5), (4,))
    )
    assert torch.equal(approx_linear(x, w, b), F.linear(x, w, b))
    assert torch.autograd.gradcheck(approx_linear, (x, w, b))


def test_autocast_is_followed_as_pytorchs_layers_follow_it():
    x, w, b = tensors(dtype=torch.float32, layout="channels_last")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine, theirs = approx_conv2d(x, w, b, padding=1), F.conv2d(x, w, b, padding=1)
        seen = []
        approx_conv2d(x, w, forward=lambda x, w, product: seen.append(x.dtype) or product.forward(x, w))
    assert mine.dtype == torch.bfloat16
    assert torch.equal(mine, theirs)
    got = gradients(mine, x, w)
    assert all(torch.equal(a, e) for a, e in zip(got, gradients(theirs, x, w), strict=True))
    assert got[1].dtype == torch.float32
    assert seen == [
        torch.float32
    ]  # a replaced forward gets the numbers as they are, and no autocast around it


def test_it_refuses_to_be_differentiated_twice():
    x, w, _ = tensors()
    (dx,) = torch.autograd.grad(approx_conv2d(x, w).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


# Only what is asked for


@pytest.mark.parametrize(("wants_x", "wants_w"), [(True, True), (True, False), (False, True)])
def test_only_the_gradients_asked_for_are_computed(wants_x, wants_w):
    x, w, _ = tensors()
    x.requires_grad_(wants_x), w.requires_grad_(wants_w)
    y = approx_conv2d(x, w, padding=1)
    one = cost.count_flops(lambda: F.conv2d(x.detach(), w.detach(), padding=1))
    assert cost.count_flops(lambda: y.sum().backward()) == one * (wants_x + wants_w)


def test_a_part_that_is_replaced_is_not_computed_beside():
    x, w, _ = tensors()
    one = cost.count_flops(lambda: F.conv2d(x.detach(), w.detach(), padding=1))
    y = approx_conv2d(x, w, padding=1, dw=lambda dy, x, w, product: torch.zeros_like(w))
    assert cost.count_flops(lambda: y.sum().backward()) == one
    y = approx_conv2d(x, w, padding=1, dx=lambda *_: torch.zeros_like(x), dw=lambda *_: None)
    assert cost.count_flops(lambda: y.sum().backward()) == 0


# Each part


def test_each_part_is_replaced_alone():
    x, w, b = tensors()
    y = F.conv2d(x, w, b, padding=1)
    exact = [y, *gradients(y, x, w, b)]
    parts = {
        "forward": (lambda x, w, product: 2 * product.forward(x, w), {0}),
        "dx": (lambda dy, x, w, product: 3 * product.backward(dy, x, w, (True, False))[0], {1}),
        "dw": (lambda dy, x, w, product: 3 * product.backward(dy, x, w, (False, True))[1], {2}),
        "output_gradient": (lambda dy: 3 * dy, {1, 2}),
        "operands": (lambda x, w: (2 * x, 3 * w), {0, 1, 2}),
        "sample": (lambda x, w: (torch.tensor([0, 2]), None), {0, 1, 2}),
    }
    for name, (part, changed) in parts.items():
        y = approx_conv2d(x, w, b, padding=1, **{name: part})
        got = [y, *gradients(y, x, w, b)]
        assert {
            i for i, (a, e) in enumerate(zip(got, exact, strict=True)) if not torch.allclose(a, e)
        } == changed, name


def test_a_weight_gradient_of_none_leaves_the_parameter_without_one():
    x, w, _ = tensors()
    y = approx_conv2d(x, w, dw=lambda *_: None)
    y.sum().backward()
    assert w.grad is None
    assert x.grad is not None


def test_operands_may_be_trees_of_tensors():
    x, w, _ = tensors()

    def split(x, w):
        return (x.floor().to(torch.int16), x - x.floor()), w

    def forward(x, w, product):
        return product.forward(x[0].to(w) + x[1], w)

    def dw(dy, x, w, product):
        return product.backward(dy, x[0].to(w) + x[1], w, (False, True))[1]

    y = approx_conv2d(x, w, operands=split, forward=forward, dw=dw, dx=lambda *_: torch.ones_like(x))
    expected = F.conv2d(x, w)
    assert torch.allclose(y, expected)
    assert torch.allclose(gradients(y, w)[0], gradients(expected, w)[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", SCALES, ids=["unscaled", "number", "vector"])
def test_sampled_channels_are_a_mask_on_the_input(layout, scale):
    x, w, _ = tensors(layout=layout)
    index = torch.tensor([3, 1])
    mask = torch.zeros(4, dtype=torch.float64)
    mask[index] = 1.0 if scale is None else torch.as_tensor(scale, dtype=torch.float64)
    y = approx_conv2d(x, w, padding=1, sample=lambda x, w: (index, scale))
    expected = F.conv2d(x * mask[:, None, None], w, padding=1)
    assert torch.allclose(y, expected)
    got = gradients(y, x, w)
    for a, e in zip(got, gradients(expected, x, w), strict=True):
        assert torch.allclose(a, e)
        assert (a[:, [0, 2]] == 0).all()
    assert torch.autograd.gradcheck(
        lambda x, w: approx_conv2d(x, w, sample=lambda x, w: (index, scale)), (x, w)
    )


def test_only_sampled_channels_are_kept_for_the_backward_pass():
    x, w, _ = tensors(channels=4, size=32, dtype=torch.float32)
    with cost.Counter([w]) as count:
        approx_conv2d(x, w, sample=lambda x, w: (torch.tensor([0]), None))
    with cost.Counter([w]) as whole:
        approx_conv2d(x, w)
    assert count.saved_bytes < whole.saved_bytes / 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", SCALES, ids=["unscaled", "number", "vector"])
@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_gradients_from_some_slices_are_those_of_a_masked_dy(product, scale, layout):
    x, w, _ = (t.detach() for t in tensors(layout=layout))
    if isinstance(product, MatrixProduct):
        x, w = x[:, :, 0, 0].contiguous(), w[:, :, 0, 0].contiguous()
    y = product.forward(x, w)
    dy = torch.randn(y.shape, generator=g(5), dtype=y.dtype)
    dy = dy.contiguous(memory_format=LAYOUTS[layout]) if y.dim() == 4 else dy
    index = torch.tensor([2, 0])
    for dim, dx, dw in ((0, c.dx_of_samples, c.dw_of_samples), (1, c.dx_of_outputs, c.dw_of_outputs)):
        mask = torch.zeros(dy.shape[dim], dtype=y.dtype)
        mask[index] = 1.0 if scale is None else torch.as_tensor(scale, dtype=y.dtype)
        expected = product.backward(c.weigh(dy, dim, mask), x, w)
        assert torch.allclose(dx(dy, x, w, product, index, scale), expected[0])
        assert torch.allclose(dw(dy, x, w, product, index, scale), expected[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5, 4, 2), (3, 5, 1, 1), (1, 5, 4, 4), (3, 1, 4, 4)])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_put_undoes_take(dtype, shape, dim, layout):
    t = torch.randn(shape, generator=g()).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    index = torch.randperm(shape[dim], generator=g())[: max(1, shape[dim] - 1)]
    part = c.take(t, dim, index)
    assert torch.equal(part, t.index_select(dim, index))
    whole = c.put(part, dim, index, shape[dim])
    expected = torch.zeros_like(t).index_copy_(dim, index, part)
    assert torch.equal(whole, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 12, 4, 2), (3, 12, 1, 1), (1, 4, 4, 4), (5, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_are_their_channels_one_by_one(dtype, shape, layout):
    t = torch.randn(shape, generator=g()).to(dtype)
    t = t.contiguous(memory_format=LAYOUTS[layout]) if t.dim() == 4 else t
    first = torch.tensor([8, 0, 4][: shape[1] // 4][-2:])  # blocks 0 and 1 of three, or the only one
    index = first[:, None] % shape[1] + torch.arange(4)
    part, one_by_one = c.take(t, 1, index), c.take(t, 1, index.flatten())
    assert torch.equal(part, one_by_one)
    assert part.stride() == one_by_one.stride()
    whole, expected = (c.put(part, 1, i, shape[1]) for i in (index, index.flatten()))
    assert torch.equal(whole, expected)
    assert whole.stride() == expected.stride()


# Layers


class Net(nn.Module):
    """A stem, two convolutions held in the wrong order, a depthwise one, a linear layer and a classifier."""

    def __init__(self, last=None):
        super().__init__()
        self.late, self.stem = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(3, 4, 3)
        self.early, self.depthwise = (
            nn.Conv2d(4, 6, 3, padding="same", bias=False),
            nn.Conv2d(6, 6, 3, groups=6),
        )
        self.hidden, self.head = nn.Linear(6, 8), last or nn.Linear(8, 5)

    def forward(self, x):
        x = self.depthwise(F.relu(self.late(F.relu(self.early(self.stem(x))))))
        return self.head(self.hidden(x.mean((2, 3))))


def images(n=4, size=8):
    return torch.randn(n, 3, size, size, generator=g(7))


def double_forward():
    return Approximation(forward=lambda x, w, product: 2 * product.forward(x, w))


def test_layers_leave_out_stem_and_classifier_in_their_true_order():
    assert list(layers(Net(), images())) == ["early", "late", "depthwise"]
    assert list(layers(Net(), images(), linear=True)) == ["early", "late", "depthwise", "hidden"]
    resnet = models.build("resnet", 10, (3, 8, 8), widths=(4, 8), blocks=(1, 1))
    assert list(layers(resnet)) == [
        n for n, m in resnet.named_modules() if isinstance(m, nn.Conv2d) and n != "stem"
    ]
    assert set(layers(resnet)) == set(layers(resnet, images()))


def test_a_convolution_as_classifier_is_left_exact_and_a_perceptrons_first_layer_is_not():
    fully = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    assert list(layers(fully)) == list(layers(fully, images())) == ["1"]
    perceptron = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 5))
    assert (
        list(layers(perceptron, linear=True)) == list(layers(perceptron, images(), linear=True)) == ["1", "3"]
    )
    assert list(layers(perceptron)) == []


def test_two_stems_side_by_side_are_both_found_by_a_batch():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.inner, self.head = (
                nn.Conv2d(3, 4, 1),
                nn.Conv2d(3, 4, 3, padding=1),
                nn.Conv2d(4, 4, 3),
                nn.Linear(4, 5),
            )

        def forward(self, x):
            return self.head(self.inner(self.a(x) + self.b(x)).mean((2, 3)))

    assert list(layers(Two(), images())) == ["inner"]


def test_looking_for_layers_changes_nothing():
    model = models.build("resnet", 10, (3, 8, 8), widths=(4, 8), blocks=(1, 1))
    model.bn.eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    layers(model, images())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks for m in model.modules())


def test_a_class_of_the_users_own_is_left_alone():
    class Own(nn.Conv2d):
        pass

    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), Own(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.LazyLinear(5)
    )
    model(images())
    assert list(layers(model)) == ["2"]


def test_conversion_keeps_parameters_is_exact_in_eval_mode_and_can_be_undone():
    model = Net()
    parameters, state, x = dict(model.named_parameters()), copy.deepcopy(model.state_dict()), images()
    trained, evaluated = model(x), model.eval()(x)
    chosen = layers(model.train(), x, linear=True)
    assert convert_(chosen, {n: double_forward() for n in chosen}, "me", "doubling") == [
        "early",
        "late",
        "depthwise",
        "hidden",
    ]
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert type(model.early) is ApproxConv2d
    assert type(model.hidden) is ApproxLinear
    assert type(model.stem) is nn.Conv2d
    assert not torch.allclose(model(x), trained)
    assert torch.equal(model.eval()(x), evaluated)
    model.load_state_dict(state)
    assert list(layers(model, x)) == list(layers(Net(), x))  # converted layers are found again
    assert revert_(model, "other") == 0
    assert revert_(model, "me") == 4
    assert type(model.early) is nn.Conv2d
    assert torch.equal(model.train()(x), trained)


def test_nothing_to_convert_has_no_effect():
    with pytest.raises(NoEffect, match="doubling: no layer of this network matched"):
        convert_({}, {}, "me", "doubling")
    model = Net()
    with pytest.raises(NoEffect):
        convert_(layers(model, images()), {"stem": double_forward()}, "me", "doubling")
    with pytest.raises(NoEffect):
        convert_(layers(model), {"depthwise": Approximation()}, "me", "doubling")


def test_two_owners_compose_unless_they_replace_the_same_part():
    model = Net()
    chosen = layers(model, images())
    zero = Approximation(dw=lambda dy, x, w, product: torch.zeros_like(w))
    convert_(chosen, {"early": double_forward()}, "one", "doubling")
    convert_(chosen, {"early": zero, "late": zero}, "two", "freezing")
    model(images()).sum().backward()
    assert (model.early.weight.grad == 0).all()
    with pytest.raises(BadInput, match=r"replace the same part of a layer's product \(dw\)"):
        convert_(chosen, {"depthwise": zero, "late": zero}, "three", "freezing")
    assert type(model.depthwise) is nn.Conv2d  # nothing was done by halves
    revert_(model, "one")
    assert type(model.early) is ApproxConv2d
    revert_(model, "two")
    assert type(model.early) is nn.Conv2d


@pytest.mark.parametrize("settings", [
    dict(padding="same"), dict(padding="same", kernel_size=4), dict(padding="valid"),
    dict(padding=1, padding_mode="reflect"),
    dict(padding=(0, 1), padding_mode="circular"), dict(padding="same", dilation=2),
], ids=str)  # fmt: skip
def test_a_converted_layer_pads_as_the_plain_one(settings):
    layer = nn.Conv2d(**{"in_channels": 3, "out_channels": 4, "kernel_size": 3, **settings})
    x, seen = images(), []
    expected, single = layer(x), layer(x[0])
    convert_(
        {"": layer}, {"": Approximation(output_gradient=lambda dy: seen.append(1) or dy)}, "me", "looking"
    )
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x[0]), single)
    layer(x).sum().backward()
    assert seen


def test_a_converted_model_can_be_copied_and_saved(tmp_path):
    model = Net()
    convert_(layers(model), {"early": double_forward()}, "me", "doubling")
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images()), model(images()))
    torch.save(model.state_dict(), tmp_path / "w.pt")
    Net().load_state_dict(torch.load(tmp_path / "w.pt"))


def test_a_bias_takes_the_format_of_what_replaces_the_product():
    layer, x = nn.Conv2d(2, 3, 3), torch.rand(1, 2, 5, 5)
    half = Approximation(forward=lambda x, w, product: product.forward(x.bfloat16(), w.bfloat16()))
    y = approx_conv2d(x, layer.weight, layer.bias, approximation=half)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), layer(x), atol=0.05)


# Several methods at once


DATA = synthetic(images=300)
METHODS = {
    "sampling": ColumnRowSampling(minimal=4, block=4),
    "pruning": GradientPruning(fifo=0),
    "subsets": GradientSubsets(),
    "approximation": GradientApproximation(how="top", schedule="S3"),
    "fixed point": DynamicFixedPoint(bits=10),
}


def trained(*methods, epochs=1):
    model = models.build("resnet", 4, (1, 8, 8), widths=(16, 16), blocks=(1, 1))
    history = train(
        model, DATA, Recipe(epochs=epochs, batch_size=32, precision="fp32"), [METHODS[m] for m in methods]
    )
    return model, history


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_no_method_is_bit_equal_to_exact_training_and_combined_they_are_like_none_of_them():
    """A convolution that silently computes the exact thing would be measured as "no loss of accuracy"."""
    pairs = [("sampling", m) for m in ("pruning", "approximation", "fixed point")]
    runs = [(), *((m,) for m in METHODS), *pairs, ("pruning", "approximation")]
    found = {r: weights(trained(*r)[0]) for r in runs}
    names = list(found)
    assert [
        (a, b) for i, a in enumerate(names) for b in names[i + 1 :] if torch.equal(found[a], found[b])
    ] == []


def test_combined_methods_learn_and_all_of_them_leave():
    model, history = trained("sampling", "pruning", "approximation", epochs=6)
    assert history.accuracy > 80
    assert not any(isinstance(m, ApproxConv2d) for m in model.modules())
    assert {e["method"] for e in history.events} == {
        "ColumnRowSampling",
        "GradientPruning",
        "GradientApproximation",
    }


@pytest.mark.parametrize(
    "pair", [("subsets", "approximation"), ("fixed point", "pruning"), ("fixed point", "approximation")]
)
def test_methods_that_replace_the_same_part_are_refused(pair):
    with pytest.raises(BadInput, match="cannot be combined"):
        trained(*pair)


RISKY = """
import sys, torch
from torch import nn
from effilib.convolution import guard_

torch.manual_seed(0)
torch.set_num_threads(2)
batch, channels = map(int, sys.argv[1:])
convs = [nn.Conv2d(channels, 8, 1, stride=2, bias=False) for _ in range(2)]
convs[0].to(memory_format=torch.channels_last)
convs[1].load_state_dict(convs[0].state_dict())
guard_(convs[0])
for _ in range(20):
    x = torch.randn(batch, channels, 13, 12)
    dy = torch.randn(batch, 8, 7, 6)
    gradients = []
    for conv, layout in zip(convs, (torch.channels_last, torch.contiguous_format)):
        z = x.contiguous(memory_format=layout).requires_grad_()
        gradients.append(torch.autograd.grad(conv(z), [z, conv.weight], dy))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
"""


@pytest.mark.parametrize(("batch", "channels"), [(15, 8), (31, 12), (16, 8), (13, 3), (15, 16)])
def test_narrow_strided_shortcuts_neither_crash_nor_differ(batch, channels):
    done = subprocess.run(
        [sys.executable, "-c", RISKY, str(batch), str(channels)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_the_guard_is_there_once_and_goes_with_the_layer():
    conv = c.guard_(c.guard_(nn.Conv2d(8, 8, 1, stride=2)))
    assert len(conv._forward_pre_hooks) == 1
    again = pickle.loads(pickle.dumps(copy.deepcopy(conv)))
    seen = []
    again.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].shape))
    assert again(torch.zeros(1, 8, 6, 6)).shape == (1, 8, 3, 3)
    with pytest.raises(RuntimeError, match="channels"):
        conv(torch.zeros(1, 5, 6, 6))
    assert (conv.stride, "_stride" in vars(conv)) == ((2, 2), False)
    assert conv(input=torch.zeros(1, 8, 6, 6)).shape == (1, 8, 3, 3)  # as a user's network may call it
    assert seen == [(1, 8, 6, 6)]  # others see what the layer reads


def test_a_network_of_ours_trains_at_an_odd_batch_size():
    data = synthetic(images=200, channels=3, size=24)
    net = models.build("resnet", data.classes, data.shape, widths=(8, 8, 8), blocks=(1, 1, 1))
    assert len(train(net, data, Recipe(epochs=1, batch_size=15)).rows) > 1


def test_a_frozen_trunk_is_no_stem():
    model = models.build("resnet", 4, (1, 8, 8), widths=(4, 8), blocks=(1, 1))
    x, wanted = torch.rand(2, 1, 8, 8), list(layers(model, torch.rand(2, 1, 8, 8)))
    model.requires_grad_(False)
    model.head.requires_grad_()
    frozen = {n: p.requires_grad for n, p in model.named_parameters()}
    assert list(layers(model, x)) == wanted != []
    assert {n: p.requires_grad for n, p in model.named_parameters()} == frozen


@pytest.mark.parametrize("channels", [4, 6])
def test_a_product_of_few_channels_stays_out_of_the_kernel_that_writes_past_its_memory(channels):
    product, layout = Convolution(stride=(2, 2)), torch.channels_last
    x = torch.randn(32, channels, 8, 8).to(memory_format=layout)
    w = torch.randn(8, channels, 1, 1).as_strided((8, channels, 1, 1), (channels, 1, channels, channels))
    dy = torch.randn(32, 8, 4, 4).to(memory_format=layout)
    for _ in range(20):  # not every one was hit
        dx, dw = product.backward(dy, x, w)
    expected = torch.einsum("nohw,oc->nchw", dy.double(), w[..., 0, 0].double())
    assert torch.allclose(dx[..., ::2, ::2].double(), expected, atol=1e-5)
    read = torch.einsum("nohw,nchw->oc", dy.double(), x[..., ::2, ::2].double())
    assert torch.allclose(dw[..., 0, 0].double(), read, atol=1e-4)
