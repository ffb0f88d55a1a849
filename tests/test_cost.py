"""What training costs: FLOPs against closed forms, the passes of a convolution against autograd, memory
against a sum by hand.
"""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from effilib import cost, models
from effilib.cost import (
    PASSES,
    Conv,
    Counter,
    conv_passes,
    conv_seconds,
    count_flops,
    latency_table,
    layers,
    step_flops,
)
from effilib.errors import BadInput

CONVS = {
    "3x3": Conv(N=2, C=8, O=12, H=9, W=7),
    "stride 2": Conv(N=3, C=4, O=6, H=8, W=9, stride=2),
    "stride 3, 5x5": Conv(N=1, C=4, O=6, H=17, W=11, k=5, stride=3),
    "1x1": Conv(N=2, C=16, O=4, H=5, W=5, k=1),
    "no padding": Conv(N=2, C=3, O=5, H=6, W=7, padding=0),
    "wide padding": Conv(N=2, C=3, O=5, H=6, W=7, padding=3),
    "groups": Conv(N=2, C=8, O=12, H=9, W=7, groups=4),
    "depthwise, stride 2": Conv(N=2, C=8, O=8, H=9, W=7, groups=8, stride=2),
}
each_conv = pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS.keys())


def by_loops(conv):
    """Multiply-accumulates of a forward pass, one filter position after the other; padding is multiplied as
    well.
    """
    count = 0
    for _ in range(conv.O):
        for _top in range(-conv.pad, conv.H + conv.pad - conv.k + 1, conv.stride):
            count += (
                conv.k**2
                * (conv.C // conv.groups)
                * len(range(-conv.pad, conv.W + conv.pad - conv.k + 1, conv.stride))
            )
    return conv.N * count


@each_conv
def test_flops_of_a_convolution_are_twice_its_multiplications(conv):
    assert conv.flops == 2 * by_loops(conv)


@each_conv
def test_each_pass_is_counted_as_its_closed_form(conv):
    assert {p: count_flops(f) for p, f in conv_passes(conv).items()} == dict.fromkeys(PASSES, conv.flops)


@pytest.mark.parametrize("channels_last", [True, False])
@each_conv
def test_the_passes_compute_what_autograd_does(conv, channels_last):
    passes = conv_passes(conv, channels_last=channels_last)
    g = torch.Generator().manual_seed(0)
    x, w = (
        torch.randn(*s, generator=g)
        for s in ((conv.N, conv.C, conv.H, conv.W), (conv.O, conv.C // conv.groups, conv.k, conv.k))
    )
    dy = torch.randn(conv.N, conv.O, *conv.out_size, generator=g)
    y = F.conv2d(
        x.requires_grad_(), w.requires_grad_(), stride=conv.stride, padding=conv.pad, groups=conv.groups
    )
    y.backward(dy)
    assert torch.allclose(passes["forward"](), y, atol=1e-4)
    dx, none, _ = passes["dX"]()
    assert none is None  # nothing is computed that was not asked for
    assert torch.allclose(dx, x.grad, atol=1e-4)
    none, dw, _ = passes["dW"]()
    assert none is None
    assert torch.allclose(dw, w.grad, atol=1e-3)


def test_the_passes_work_in_other_formats_and_on_the_meta_device():
    conv = CONVS["3x3"]
    y = conv_passes(conv, dtype=torch.bfloat16)["forward"]()
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert count_flops(conv_passes(conv, device="meta")["dW"]) == conv.flops


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_costs_its_pixels_too(groups):
    model = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=groups)
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    one = 2 * 2 * 25 * 4 * (6 // groups) * 9
    assert count_flops(lambda: model(x)) == one
    assert count_flops(lambda: model(x).sum().backward()) == 3 * one


def test_linear_layers_and_other_products_are_counted():
    model, x = nn.Linear(20, 30), torch.randn(7, 20)
    one = 2 * 7 * 20 * 30
    assert count_flops(lambda: model(x)) == one
    assert count_flops(lambda: model(x).sum().backward()) == 2 * one  # the input needs no gradient
    assert count_flops(lambda: model(x.requires_grad_()).sum().backward()) == 3 * one
    assert count_flops(lambda: torch.bmm(torch.ones(5, 2, 3), torch.ones(5, 3, 4))) == 2 * 5 * 2 * 3 * 4
    assert count_flops(lambda: torch.relu(torch.ones(9)) + 1) == 0


def test_integer_products_are_counted():
    a, b = torch.ones(32, 16, dtype=torch.int8), torch.ones(16, 24, dtype=torch.int8)
    assert count_flops(lambda: torch._int_mm(a, b)) == 2 * 32 * 16 * 24
    assert (
        count_flops(lambda: torch.ones(3, 4, dtype=torch.int16) @ torch.ones(4, 5, dtype=torch.int16))
        == 2 * 3 * 4 * 5
    )


def convolutions(model, shape, n):
    """2 x forward FLOPs of every convolution and linear layer, by hand: the spatial sizes come from hooks
    written here.
    """
    found, hooks = [], []

    def note(module, inputs, output):
        found.append(2 * output.numel() * module.weight[0].numel())

    for m in model.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            hooks.append(m.register_forward_hook(note))
    model(torch.zeros(n, *shape))
    for h in hooks:
        h.remove()
    return found


@pytest.mark.parametrize(
    ("name", "shape"), [
        ("resnet", (3, 12, 12)), ("vgg", (1, 8, 8)), ("convnet", (1, 8, 8)),
        ("torchvision.models:resnet18", (3, 32, 32)), ("torchvision.models:shufflenet_v2_x0_5", (3, 32, 32)),
    ]
)  # fmt: skip
def test_a_step_of_a_whole_network_is_three_times_its_forward_pass_less_the_first_dx(name, shape):
    model = models.build(name, 5, shape)
    forward = convolutions(model, shape, 4)
    expected = 3 * sum(forward) - forward[0]
    assert step_flops(model, shape, 4) == expected
    assert step_flops(model.to("meta"), shape, 4) == expected
    assert step_flops(model, shape, 8) == 2 * expected


def test_a_forward_pass_that_looks_at_its_numbers_is_counted_for_zeros_on_the_meta_device():
    class Flow(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)

        def forward(self, x):
            x = self.bn(self.conv(x))
            return x if x.mean() > -1 else self.conv(x)

    net = Flow().to("meta")
    assert step_flops(net, (1, 5, 5)) == 648
    assert net.conv.weight.is_meta


def test_counting_leaves_no_mode_behind():
    with pytest.raises(RuntimeError), Counter():
        torch.ones(2, 3) @ torch.ones(2, 3)
    with Counter() as count:
        torch.ones(2, 2) @ torch.ones(2, 2)
    before = count.flops
    torch.ones(2, 2) @ torch.ones(2, 2)
    assert count.flops == before == 16


# Attention and recurrent layers: kernels of their own on a CPU, each against its products by hand


def attention(n, s, width, *, backward):
    """FLOPs of self-attention on (n, s, width): projections in and out, scores, weighted values."""
    projections, products = 4 * 2 * n * s * width * width, 2 * 2 * n * s * s * width
    if not backward:
        return projections + products
    # dX and dW of each projection; of the two products both factors' gradients, and the scores once more,
    # which were not kept
    return 3 * projections + products + 2 * products + products // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 4])
def test_attention_is_counted_on_a_cpu(heads, dtype):
    n, s, width = 3, 7, 16
    layer = nn.MultiheadAttention(width, heads, batch_first=True)
    x = torch.randn(n, s, width, requires_grad=True)

    def step(**settings):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return count_flops(lambda: layer(x, x, x, **settings)[0].float().sum().backward())

    assert step(need_weights=False) == attention(n, s, width, backward=True)
    kept = attention(n, s, width, backward=True) - 2 * n * s * s * width
    assert step(need_weights=True) == kept  # by plain products, whose scores are kept
    with torch.no_grad():
        layer.eval()
        assert count_flops(lambda: layer(x, x, x)) == attention(n, s, width, backward=False)
        assert count_flops(lambda: layer.train()(x, x, x, need_weights=False)) == attention(
            n, s, width, backward=False
        )


def test_attention_between_different_lengths_is_counted():
    q, k, v = (torch.randn(2, 3, s, d, requires_grad=True) for s, d in ((5, 8), (9, 8), (9, 8)))
    forward = 2 * (2 * 2 * 3 * 5 * 9 * 8)
    assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v)) == forward
    assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()) == 3.5 * forward


def test_a_transformer_layer_costs_in_eval_mode_what_it_costs_in_training():
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    x = torch.randn(3, 7, 16)
    with torch.no_grad():
        by_hand = attention(3, 7, 16, backward=False) + 2 * 2 * 3 * 7 * 16 * 24
        assert count_flops(lambda: layer.train()(x)) == by_hand
        assert count_flops(lambda: layer.eval()(x)) == by_hand


@pytest.mark.parametrize("directions", [1, 2])
def test_an_lstm_costs_what_its_products_do(directions):
    n, s, width, hidden = 3, 5, 8, 6
    layer = nn.LSTM(width, hidden, num_layers=2, bidirectional=directions == 2, batch_first=True)
    x = torch.randn(n, s, width, requires_grad=True)
    forward = sum(2 * n * s * p.numel() for p in layer.parameters() if p.dim() == 2)
    with torch.no_grad():
        assert count_flops(lambda: layer(x)) == forward
    assert count_flops(lambda: layer(x)[0].sum().backward()) == 3 * forward


def test_products_with_vectors_are_counted():
    a, x, y = torch.ones(3, 5), torch.ones(5), torch.ones(3)
    assert count_flops(lambda: a @ x) == count_flops(lambda: torch.addmv(y, a, x)) == 2 * 3 * 5
    assert count_flops(lambda: x @ x) == 2 * 5


# Memory


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_saved_bytes_are_those_of_a_sum_by_hand(device):
    first, second = nn.Linear(10, 20, device=device), nn.Linear(20, 5, device=device)
    x = torch.ones(8, 10, device=device)
    with Counter([*first.parameters(), *second.parameters()]) as count:
        hidden = torch.relu(first(x))
        second(hidden).sum().backward()
    assert count.saved_bytes == 4 * (8 * 10 + 8 * 20)  # the input, and relu's output for two layers once
    with Counter() as count:
        first(x).sum().backward()
    assert count.saved_bytes == 4 * 8 * 10
    with Counter() as count:
        first(x.clone().requires_grad_()).sum().backward()
    assert count.saved_bytes == 4 * (
        8 * 10 + 10 * 20
    )  # for dX the weights, which nobody named as held anyway


def test_nothing_is_saved_without_gradients():
    with Counter() as count, torch.no_grad():
        nn.Linear(3, 3)(torch.ones(2, 3))
    assert count.saved_bytes == 0
    assert count.flops == 2 * 2 * 3 * 3


def test_a_view_is_saved_with_the_whole_storage_it_keeps_alive():
    x = torch.ones(100, requires_grad=True)
    with Counter() as count:
        (x * 1)[:10].square().sum().backward()
    assert count.saved_bytes == 4 * 100


def test_parameters_and_bytes():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert cost.parameters(model) == 3 * 4 * 9 + 4 + 8
    model[0].weight.requires_grad_(False)
    assert cost.parameters(model) == 4 + 8
    assert cost.size_bytes([torch.ones(3), torch.ones(2, dtype=torch.int8), "a word", 7]) == 14


# Layers


def test_layers_are_found_with_the_sizes_they_meet():
    model = models.build("resnet", 4, (1, 9, 9), widths=(8, 12), blocks=([6], [5]), stem=7)
    found = layers(model.train(), torch.zeros(3, 1, 9, 9))
    assert model.training
    common = dict(N=3, H=9, W=9)
    assert found == {
        "stem": Conv(C=1, O=7, padding=1, **common),
        "stages.0.0.conv1": Conv(C=7, O=6, padding=1, **common),
        "stages.0.0.conv2": Conv(C=6, O=8, padding=1, **common),
        "stages.0.0.shortcut.0": Conv(C=7, O=8, k=1, padding=0, **common),
        "stages.1.0.conv1": Conv(C=8, O=5, padding=1, stride=2, **common),
        "stages.1.0.conv2": Conv(C=5, O=12, padding=1, N=3, H=5, W=5),
        "stages.1.0.shortcut.0": Conv(C=8, O=12, k=1, padding=0, stride=2, **common),
    }


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "squeezenet1_1"])
def test_layers_of_torchvisions_networks_add_up_to_their_flops(name):
    model = getattr(torchvision.models, name)(num_classes=4)
    x = torch.zeros(2, 3, 32, 32)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    found = layers(model, x)
    with torch.no_grad():
        linear = sum(2 * 2 * m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
        assert sum(c.flops for c in found.values()) + linear == count_flops(lambda: model.eval()(x))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(("padding", "pad"), [("same", 1), ("valid", 0), (2, 2)])
def test_padding_may_be_given_by_its_name(padding, pad):
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=padding))
    (conv,) = layers(model, torch.zeros(1, 1, 8, 8)).values()
    assert conv.pad == pad
    assert conv.out_size == tuple(model(torch.zeros(1, 1, 8, 8)).shape[2:])


@pytest.mark.parametrize(
    "settings",
    [{"kernel_size": (1, 7)}, {"kernel_size": 3, "dilation": 2}, {"kernel_size": 3, "stride": (1, 2)}],
)
def test_a_convolution_that_cannot_be_described_is_named(settings):
    model = nn.Sequential(nn.ReLU(), nn.Conv2d(1, 2, **settings))
    with pytest.raises(BadInput, match=r"convolution 1 is not square or is dilated"):
        layers(model.train(), torch.zeros(1, 1, 16, 16))
    assert model.training
    assert not model[1]._forward_hooks


def test_the_latency_table_has_every_pass_but_the_first_dx():
    model = models.build("convnet", 4, (1, 8, 8), widths=(4, 6))
    rows = latency_table(model, torch.zeros(2, 1, 8, 8), repeats=2)
    first, second = layers(model, torch.zeros(2, 1, 8, 8))
    assert [(r["layer"], r["pass"]) for r in rows] == [
        (first, "forward"),
        (first, "dW"),
        *((second, p) for p in PASSES),
    ]
    for r in rows:
        assert r["ms"] > 0
        assert r["gflops_per_s"] == pytest.approx(r["flops"] / r["ms"] / 1e6)
    assert rows[2]["flops"] == 2 * 2 * 4 * 4 * 6 * 4 * 9


def test_a_network_without_convolutions_has_an_empty_table():
    assert latency_table(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.zeros(2, 1, 2, 2)) == []


def test_the_latency_table_of_resnet18_can_be_made():
    x = torch.zeros(1, 3, 32, 32)
    rows = latency_table(torchvision.models.resnet18(num_classes=4), x, repeats=1)
    assert len(rows) == 3 * 20 - 1
    assert {r["layer"] for r in rows} == set(layers(torchvision.models.resnet18(), x))


def test_several_formats_are_timed_side_by_side():
    conv = Conv(N=1, C=2, O=2, H=4, W=4)
    times = conv_seconds({"fp32": conv, "bf16": (conv, torch.bfloat16, False)}, repeats=3)
    assert set(times) == {(n, p) for n in ("fp32", "bf16") for p in PASSES}
    assert {len(t) for t in times.values()} == {3}
    assert all(s > 0 for t in times.values() for s in t)
