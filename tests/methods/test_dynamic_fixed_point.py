"""Dynamic fixed point: the numbers, exact integer products against int64, overflow that is caught, and
training with them.
"""

from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effilib import convolution, models
from effilib.convolution import ApproxConv2d, Convolution, approx_conv2d
from effilib.data import synthetic
from effilib.errors import BadInput, NoEffect
from effilib.methods import dynamic_fixed_point as dfp
from effilib.methods.dynamic_fixed_point import (
    DFP,
    INFO,
    DynamicFixedPoint,
    chained_mm,
    dequantise,
    fixed_point,
    halves,
    integer_mm,
    quantise,
    use_fixed_point_,
)
from effilib.training import Method, Recipe, train
from tests.common import equal, g, resumed_and_whole

DATA = synthetic(images=300)
RECIPE = Recipe(epochs=2, batch_size=32, precision="fp32")
BITS = (16, 14, 10, 8, 6, 2)
LONG = {"forward": 10**6, "dX": 10**6, "dW": 10**6}


def network(**settings):
    return models.build("resnet", 4, (1, 8, 8), **{"widths": (8, 8), "blocks": (1, 1), **settings})


# Numbers


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [1.0, 1e-20, 3e12])
def test_nearest_rounding_errs_by_half_a_unit_and_uses_all_bits(bits, size):
    for seed in range(10):
        x = size * torch.randn(500, generator=g(seed))
        q = quantise(x, bits)
        assert q.I.dtype == (torch.int8 if bits <= 8 else torch.int16)
        assert ((dequantise(q) - x).abs() <= 0.5 * 2.0 ** -q.scf.double()).all()
        assert 2 ** (bits - 2) <= q.I.abs().max() <= 2 ** (bits - 1) - 1
        E = torch.frexp(x.abs().max()).exponent
        assert q.scf in (bits - 1 - E, bits - 2 - E)  # the latter where the largest would round up
        again = quantise(dequantise(q), bits)
        assert torch.equal(again.I, q.I)
        assert torch.equal(again.scf, q.scf)


def test_the_authors_sixteen_bits_with_a_shift_of_two_are_fourteen():
    x = torch.randn(1000, generator=g())
    E = torch.frexp(x.abs().max()).exponent.item()
    scf = 15 - 2 - E
    q = quantise(x, 14)
    assert q.scf == scf
    assert torch.equal(q.I.float(), (x.double() * 2.0**scf).round().float())


def test_a_power_of_two_moves_only_the_exponent():
    x = torch.randn(100, generator=g())
    q = quantise(x, 10)
    for k in (-100, -3, 1, 60):
        moved = quantise(x * 2.0**k, 10)
        assert torch.equal(moved.I, q.I)
        assert moved.scf == q.scf - k


@pytest.mark.parametrize("bits", BITS)
def test_a_largest_number_that_would_round_up_gets_the_next_exponent(bits):
    x = torch.tensor([1 - 2.0**-20, 0.3])
    q = quantise(x, bits)
    assert q.I[0] == 2 ** (bits - 2)
    assert q.scf == bits - 2
    assert dequantise(q)[0] == 1


def test_zero_tiny_and_unfinite_tensors():
    assert torch.equal(dequantise(quantise(torch.zeros(3))), torch.zeros(3))
    tiny = torch.tensor([1e-44, -1e-45])
    assert dequantise(quantise(tiny)).isfinite().all()
    for bad in (float("nan"), float("inf")):
        assert dequantise(quantise(torch.tensor([1.0, bad]))).isnan().all()  # a run that diverges is seen to
    for bits in (1, 17):
        with pytest.raises(BadInput, match="bits"):
            quantise(torch.ones(2), bits)
    with pytest.raises(BadInput, match="rounding"):
        quantise(torch.ones(2), rounding="up")


def test_powers_of_two_are_exact():
    scf = torch.arange(-120, 127)
    assert torch.equal(torch.ldexp(torch.ones(len(scf)), -scf.float()).double(), 2.0 ** -scf.double())


@pytest.mark.parametrize("bits", [16, 8])
def test_stochastic_rounding_is_unbiased_with_the_variance_of_a_coin(bits):
    x, draws, generator = torch.randn(200, generator=g()), 4000, g(1)
    scf = quantise(x, bits, rounding="stochastic", generator=generator).scf
    drawn = [quantise(x, bits, rounding="stochastic", generator=generator).I for _ in range(draws)]
    I = torch.stack(drawn).double()  # noqa: E741  (the paper's symbol)
    exact = x.double() * 2.0 ** scf.double()
    f = exact - exact.floor()
    inner = (f > 0.01) & (f < 0.99)
    z = (I.mean(0) - exact) / (f * (1 - f) / draws).sqrt()
    assert z[inner].abs().max() < 4.5
    assert (I.var(0)[inner] / (f * (1 - f))[inner] - 1).abs().median() < 0.05
    assert ((I - exact).abs() < 1).all()


def test_an_exponent_a_channel_serves_small_channels_better():
    x = torch.randn(4, 3, 5, 5, generator=g()) * torch.tensor([1.0, 1e-3, 1e-5])[:, None, None]
    whole, each = quantise(x, 8), quantise(x, 8, dim=1)
    assert each.scf.shape == (1, 3, 1, 1)
    for c in range(3):
        own = quantise(x[:, c], 8)
        assert torch.equal(each.I[:, c], own.I)
        assert each.scf[0, c, 0, 0] == own.scf
    assert (whole.I[:, 2] == 0).all()
    assert (dequantise(each)[:, 2] - x[:, 2]).abs().max() < 0.01 * x[:, 2].abs().max()


# Integer products


def integers(shape, bits, seed):
    largest = 32639 if bits == 16 else 2 ** (bits - 1) - 1
    I = torch.randint(-largest, largest + 1, shape, generator=g(seed))  # noqa: E741
    I.view(-1)[:2] = torch.tensor([largest, -largest])
    return I.to(torch.int8 if bits <= 8 else torch.int16)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(5, 7, 3), (64, 300, 16), (1, 1, 1)], ids=str)
def test_products_are_exact_against_int64_where_fp32_is_not(bits, shape):
    M, K, N = shape
    a, b = (
        integers((M, max(K, 2)), bits, 0),
        integers((max(K, 2), N), bits, 1) if K * N > 1 else integers((2, 1), bits, 1),
    )
    expected = a.long() @ b.long()
    assert torch.equal(integer_mm(halves(a), halves(b)).long(), expected)
    assert torch.equal((a.double() @ b.double()).long(), expected)
    if bits >= 14 and K == 300:
        assert not torch.equal((a.float() @ b.float()).long(), expected)
    back = sum(f * p.long() for p, f in halves(a))
    assert torch.equal(back, a.long())


def test_torchs_own_int16_product_wraps_around():
    a, b = torch.full((1, 8), 200, dtype=torch.int16), torch.full((8, 1), 200, dtype=torch.int16)
    assert (a @ b).item() != 8 * 40_000
    assert integer_mm(halves(a), halves(b)).item() == 8 * 40_000


@pytest.mark.parametrize("chain", [1, 7, 31, 100, 10**6])
def test_chains_add_up_to_the_whole(chain):
    a, b = integers((6, 200), 10, 0), integers((200, 4), 10, 1)
    exact = (a.long() @ b.long()).float()
    assert torch.allclose(chained_mm(halves(a), halves(b), chain), exact, rtol=1e-6)


@pytest.mark.parametrize(("bits", "guaranteed"), [(16, 2), (15, 7), (14, 31)])
def test_an_overflow_built_on_purpose_is_caught_and_a_guaranteed_chain_never_overflows(bits, guaranteed):
    largest = 32639 if bits == 16 else 2 ** (bits - 1) - 1
    a, b = torch.full((1, 64), largest, dtype=torch.int16), torch.full((64, 1), largest, dtype=torch.int16)
    exact = 64 * largest**2
    assert exact > 2**31
    with pytest.raises(OverflowError, match="64 products does not fit into int32"):
        chained_mm(halves(a), halves(b), 64)
    with pytest.raises(OverflowError):
        chained_mm(halves(a), halves(-b), 64)
    chain = (2**31 - 1) // largest**2
    assert chain >= guaranteed
    assert chained_mm(halves(a), halves(b), chain).item() == pytest.approx(exact, rel=1e-6)


GEOMETRIES = {
    "3x3": (3, Convolution(padding=(1, 1))),
    "1x1": (1, Convolution()),
    "stride 2": (3, Convolution(stride=(2, 2), padding=(1, 1))),
    "stride 2, 1x1": (1, Convolution(stride=(2, 2))),
    "stride 3, no padding": (3, Convolution(stride=(3, 2))),
    "dilated": (3, Convolution(padding=(2, 2), dilation=(2, 2))),
    "wide padding": (3, Convolution(padding=(4, 3))),
    "5x5": (5, Convolution(stride=(2, 1), padding=(2, 2))),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bits", [14, 8])
@pytest.mark.parametrize(("k", "product"), GEOMETRIES.values(), ids=GEOMETRIES)
def test_all_three_products_are_those_of_the_rounded_operands_in_float64(k, product, bits, layout):
    x = torch.randn(3, 5, 8, 9, generator=g()).contiguous(memory_format=layout)
    w = torch.randn(6, 5, k, k, generator=g(1)).contiguous(memory_format=layout)
    dy = torch.randn(product.forward(x, w).shape, generator=g(2)).contiguous(memory_format=layout)
    qx, qw, qg = (quantise(t, bits) for t in (x, w, dy))
    dx, dw, dg = (dequantise(q).double() for q in (qx, qw, qg))
    expected = [product.forward(dx, dw), *product.backward(dg, dx, dw)]
    mine = [
        dfp.forward(qx, qw, product, 10**6),
        dfp.backward_x(qg, x.shape, qw, product, 10**6),
        dfp.backward_w(qg, qx, w.shape, product, 10**6),
    ]
    for a, e in zip(mine, expected, strict=True):
        assert a.shape == e.shape
        assert torch.equal(a, e.float())  # the integer sum, rounded once


@pytest.mark.parametrize("exponents", ["tensor", "channel"])
def test_the_approximation_computes_with_both_kinds_of_exponents(exponents):
    x = (
        torch.randn(3, 5, 6, 6, generator=g()) * torch.tensor([1.0, 0.1, 0.01, 1, 1])[:, None, None]
    ).requires_grad_()
    w = (
        torch.randn(6, 5, 3, 3, generator=g(1)) * torch.logspace(-2, 0, 6)[:, None, None, None]
    ).requires_grad_()
    dy = torch.randn(3, 6, 6, 6, generator=g(2)) * torch.logspace(-3, 0, 6)[:, None, None]
    exact = F.conv2d(x, w, padding=1)
    theirs = [exact.detach(), *torch.autograd.grad(exact, (x, w), dy)]
    errors = {}
    for bits in (14, 8):
        chains = dict(LONG)
        y = approx_conv2d(
            x, w, padding=1, approximation=fixed_point(bits, lambda c=chains: c, exponents=exponents)
        )
        mine = [y.detach(), *torch.autograd.grad(y, (x, w), dy)]
        assert chains == LONG or bits == 14
        errors[bits] = [((a - e).norm() / e.norm()).item() for a, e in zip(mine, theirs, strict=True)]
    assert all(0 < e < 2e-3 for e in errors[14])
    assert all(1e-4 < e < 0.1 for e in errors[8])
    dim = 1 if exponents == "channel" else None
    q = [dequantise(quantise(t.detach(), 8, dim=d)).double() for t, d in ((x, dim), (dy, dim))]
    by_hand = Convolution(padding=(1, 1)).backward(q[1], q[0], w.detach().double(), (False, True))[1]
    assert torch.allclose(mine[2].double(), by_hand, rtol=1e-5, atol=1e-9)


def test_an_exponent_a_channel_errs_less_where_channels_differ():
    x = torch.randn(4, 6, 6, 6, generator=g()) * torch.logspace(-3, 0, 6)[:, None, None]
    w = torch.randn(6, 6, 3, 3, generator=g(1)).requires_grad_()
    exact = torch.autograd.grad(F.conv2d(x, w).square().sum(), w)[0]
    error = {}
    for exponents in ("tensor", "channel"):
        y = approx_conv2d(x, w, approximation=fixed_point(8, lambda: dict(LONG), exponents=exponents))
        dw = torch.autograd.grad(y.square().sum(), w)[0]
        error[exponents] = ((dw - exact)[:, 0].norm() / exact[:, 0].norm()).item()
    assert error["channel"] < error["tensor"] / 5


def test_relative_errors_of_products_by_format():
    a, b = torch.randn(64, 512, generator=g()), torch.randn(512, 64, generator=g(1))
    exact = a.double() @ b.double()

    def error(product):
        return ((product.double() - exact).norm() / exact.norm()).item()

    qa, qb = quantise(a, 14), quantise(b, 14)
    sixteen = torch.ldexp(chained_mm(halves(qa.I), halves(qb.I), 512), -(qa.scf + qb.scf))
    assert error(sixteen) == pytest.approx(4e-4, rel=0.5)
    assert error(a.half() @ b.half()) < error(sixteen) < error(a.bfloat16() @ b.bfloat16())


def test_a_layers_chain_is_halved_where_it_overflows_and_stays_short():
    x, w = (
        torch.ones(2, 64, 4, 4),
        torch.ones(8, 64, 3, 3),
    )  # 576 products of 32,639 / 2 or so, all of one sign
    chains = {"forward": 576, "dX": 576, "dW": 576}
    y = approx_conv2d(x.requires_grad_(), w.requires_grad_(), approximation=fixed_point(16, lambda: chains))
    assert torch.allclose(y, torch.full_like(y, 576.0))
    assert 0 < chains["forward"] < 576
    before = dict(chains)
    approx_conv2d(x, w, approximation=fixed_point(16, lambda: chains))
    assert chains == before


def test_operands_are_kept_as_integers():
    from effilib.cost import Counter

    x, w = torch.randn(8, 8, 16, 16, generator=g()), torch.randn(8, 8, 3, 3, generator=g(1)).requires_grad_()
    saved = {}
    for bits in (14, 8):
        with Counter([w]) as count:
            approx_conv2d(x, w, approximation=fixed_point(bits, lambda: dict(LONG)))
        saved[bits] = count.saved_bytes
    with Counter([w]) as count:
        approx_conv2d(x, w)
    assert saved[14] < 0.65 * count.saved_bytes
    assert saved[8] < 0.35 * count.saved_bytes


# Layers


def test_stem_classifier_and_grouped_layers_stay_fp32_and_eval_mode_is_exact():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )
    x = torch.randn(2, 1, 8, 8, generator=g())
    trained, evaluated = model(x), model.eval()(x)
    assert use_fixed_point_(model.train(), 14, lambda name: dict(LONG), x=x) == ["1", "3"]
    assert not torch.equal(model(x), trained)
    assert torch.allclose(model(x), trained, rtol=0.01, atol=1e-3)
    assert torch.equal(model.eval()(x), evaluated)
    with pytest.raises(NoEffect, match="dynamic fixed point"):
        use_fixed_point_(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), 14, lambda name: dict(LONG))


# The method


def trained(methods=(), recipe=RECIPE, **options):
    model = network()
    return model, train(model, DATA, recipe, methods, **options)


ARMS = {
    **{f"{b} bits": DynamicFixedPoint(bits=b) for b in (16, 14, 10, 8, 6)},
    "channel": DynamicFixedPoint(bits=8, exponents="channel"),
    "stochastic": DynamicFixedPoint(bits=8, rounding="stochastic"),
    "no master": DynamicFixedPoint(bits=8, master=False),
}


def test_no_arm_is_bit_equal_to_fp32_or_to_another():
    found = {"fp32": trained()[0]} | {n: trained([m])[0] for n, m in ARMS.items()}
    names = list(found)
    assert [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if equal(found[a], found[b])] == []


@pytest.mark.parametrize("name", ["14 bits", "channel"])
def test_training_learns_and_leaves_a_plain_fp32_model_behind(name):
    model, history = trained([ARMS[name]], replace(RECIPE, epochs=6))
    assert history.accuracy > 85
    assert not any(isinstance(m, ApproxConv2d) for m in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert "int32 chains shortened after an overflow: none" in history.events[-1]["text"]


def test_fourteen_bits_follow_fp32_closely_and_two_do_not():
    def first(bits):
        model = trained([DynamicFixedPoint(bits=bits)] if bits else [], replace(RECIPE, epochs=1 / 9))[0]
        return torch.cat([p.flatten() for p in model.parameters()])

    exact = first(None)
    errors = {bits: (first(bits) - exact).norm().item() for bits in (14, 10, 6)}
    assert 0 < errors[14] < errors[10] < errors[6]


def test_overflows_in_training_are_caught_and_noted():
    _, history = trained([DynamicFixedPoint(bits=16)], replace(RECIPE, epochs=1))
    event = history.events[-1]
    assert event["shortened"]
    assert all(k < 2304 for k in event["shortened"].values())
    assert not history.diverged


def test_without_master_weights_all_that_is_kept_is_fixed_point():
    @dataclass(frozen=True)
    class Look(Method):
        seen: list = field(default_factory=list, hash=False, compare=False, repr=False)

        def on_step_end(self, run):
            layers = [m for m in run.model.modules() if isinstance(m, ApproxConv2d)]
            self.seen.append(all(torch.equal(m.weight, dequantise(quantise(m.weight, 8))) for m in layers))

    for name, rounded in (("no master", True), ("8 bits", False)):
        look = Look()
        trained([ARMS[name], look])
        assert set(look.seen) == {rounded}


@pytest.mark.parametrize("name", ["16 bits", "stochastic"])
def test_a_resumed_run_ends_bit_equal(name, tmp_path):
    (a, ha), (b, hb) = resumed_and_whole(network, DATA, RECIPE, [ARMS[name]], tmp_path / "run.pt")
    assert equal(a, b)
    assert ha.events == hb.events


def test_it_is_refused_within_16_bit_autocast():
    with pytest.raises(BadInput, match="precision 'fp32'"):
        trained([DynamicFixedPoint()], replace(RECIPE, precision="bf16"))


def test_a_second_method_that_replaces_the_same_product_is_refused():
    model = network()
    x = torch.zeros(2, 1, 8, 8)
    use_fixed_point_(model, 14, lambda name: dict(LONG), x=x)
    chosen = convolution.layers(model, x)
    zero = convolution.Approximation(dw=lambda *a: None)
    with pytest.raises(BadInput, match="dw"):
        convolution.convert_(chosen, dict.fromkeys(chosen, zero), "other", "freezing")


def test_the_information_is_complete():
    assert all(getattr(INFO, f) for f in ("name", "name_de", "chapter", "paper", "claim", "cost_model"))
    assert DFP._fields == ("I", "scf")
