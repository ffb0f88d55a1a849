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
from effilib.hooks import Method
from effilib.methods import dynamic_fixed_point as dfp
from effilib.methods.dynamic_fixed_point import (
    DFP,
    INFO,
    DynamicFixedPoint,
    EightBits,
    dequantise,
    fixed_point,
    quantise,
    use_fixed_point_,
)
from effilib.recipe import Recipe
from effilib.training import train
from tests.common import equal, g, resumed_and_whole

DATA = synthetic(images=300)
RECIPE = Recipe(epochs=2, batch_size=32, precision="fp32")
BITS = (16, 14, 10, 8, 6, 2)


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


@pytest.mark.parametrize("bits", BITS)
def test_numbers_are_the_same_with_and_without_the_compiled_kernel(bits, monkeypatch):
    tensors = [
        torch.randn(3, 5, 7, 9, generator=g()),
        torch.randn(2, 4, 4, 4, generator=g(1)).to(memory_format=torch.channels_last),
        torch.randn(6, 8, generator=g(2)).T[1:],
        1e-30 * torch.randn(33, generator=g(3)),
        torch.tensor([1 - 2.0**-20, 0.3]),
        torch.zeros(5),
        torch.tensor([1.0, float("nan"), 2.0]),
        torch.tensor([1.0, float("inf")]),
    ]
    found = [quantise(t, bits) for t in tensors + [t.bfloat16() for t in tensors]]
    monkeypatch.setattr(dfp.integers, "library", lambda: None)
    for t, q in zip(tensors + [t.bfloat16() for t in tensors], found, strict=True):
        slow = quantise(t, bits)
        assert torch.equal(q.scf, slow.scf) or (q.scf.isnan() and slow.scf.isnan())
        assert torch.equal(q.I, slow.I) or q.scf.isnan()
        assert (q.I.dtype, q.scf.dtype, q.I.shape) == (slow.I.dtype, slow.scf.dtype, t.shape)


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


# Products


def test_int32_holds_so_many_products_of_largest_numbers_and_not_one_more():
    for bits in (16, 15, 14, 8):
        most = (2 ** (bits - 1) - 1) ** 2
        assert dfp.safe_chain(bits) * most < 2**31 <= (dfp.safe_chain(bits) + 1) * most


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
        y = approx_conv2d(x, w, padding=1, approximation=fixed_point(bits, exponents=exponents))
        mine = [y.detach(), *torch.autograd.grad(y, (x, w), dy)]
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
        y = approx_conv2d(x, w, approximation=fixed_point(8, exponents=exponents))
        dw = torch.autograd.grad(y.square().sum(), w)[0]
        error[exponents] = ((dw - exact)[:, 0].norm() / exact[:, 0].norm()).item()
    assert error["channel"] < error["tensor"] / 5


def test_relative_errors_of_products_by_format():
    a, b = torch.randn(64, 512, generator=g()), torch.randn(512, 64, generator=g(1))
    exact = a.double() @ b.double()

    def error(product):
        return ((product.double() - exact).norm() / exact.norm()).item()

    qa, qb = quantise(a, 14), quantise(b, 14)
    sixteen = dequantise(qa).double() @ dequantise(qb).double()
    assert error(sixteen) == pytest.approx(4e-4, rel=0.5)
    assert error(a.half() @ b.half()) < error(sixteen) < error(a.bfloat16() @ b.bfloat16())


def test_operands_are_kept_as_integers():
    from effilib.cost import Counter

    x, w = torch.randn(8, 8, 16, 16, generator=g()), torch.randn(8, 8, 3, 3, generator=g(1)).requires_grad_()
    saved = {}
    for bits in (14, 8):
        with Counter([w]) as count:
            approx_conv2d(x, w, approximation=fixed_point(bits))
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
    assert use_fixed_point_(model.train(), 14, x=x) == ["1", "3"]
    assert not torch.equal(model(x), trained)
    assert torch.allclose(model(x), trained, rtol=0.01, atol=1e-3)
    assert torch.equal(model.eval()(x), evaluated)
    with pytest.raises(NoEffect, match="dynamic fixed point"):
        use_fixed_point_(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), 14)


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
    assert history.events[-1]["text"].startswith(f"5 layers in {ARMS[name].bits} bits, products ")


def test_a_step_in_integers_has_as_many_flops_as_in_floats():
    floats = trained()[1].flops
    assert trained([ARMS["14 bits"]])[1].flops == floats
    assert trained([EightBits()], replace(RECIPE, precision="bf16"))[1].flops == floats


def test_fourteen_bits_follow_fp32_closely_and_two_do_not():
    def first(bits):
        model = trained([DynamicFixedPoint(bits=bits)] if bits else [], replace(RECIPE, epochs=1 / 9))[0]
        return torch.cat([p.flatten() for p in model.parameters()])

    exact = first(None)
    errors = {bits: (first(bits) - exact).norm().item() for bits in (14, 10, 6)}
    assert 0 < errors[14] < errors[10] < errors[6]


def test_without_master_weights_and_momentum_there_is_no_momentum_to_round():
    _, history = trained([ARMS["no master"]], replace(RECIPE, epochs=1, momentum=0.0))
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


def test_bad_settings_are_refused_before_anything_runs():
    for settings in (dict(bits=17), dict(rounding="up"), dict(exponents="pixel")):
        with pytest.raises(BadInput, match="choose"):
            DynamicFixedPoint(**settings)


def test_it_is_refused_within_16_bit_autocast():
    with pytest.raises(BadInput, match="precision 'fp32'"):
        trained([DynamicFixedPoint()], replace(RECIPE, precision="bf16"))


def test_a_second_method_that_replaces_the_same_product_is_refused():
    model = network()
    x = torch.zeros(2, 1, 8, 8)
    use_fixed_point_(model, 14, x=x)
    chosen = convolution.layers(model, x)
    zero = convolution.Approximation(dw=lambda *a: None)
    with pytest.raises(BadInput, match="dw"):
        convolution.convert_(chosen, dict.fromkeys(chosen, zero), "other", "freezing")


def test_the_information_is_complete():
    assert all(getattr(INFO, f) for f in ("name", "name_de", "chapter", "paper", "claim", "cost_model"))
    assert DFP._fields == ("I", "scf")


# 8 bits


def test_eight_bit_products_err_by_their_rounding_and_dw_by_that_of_bf16():
    for k, product in (
        (3, Convolution(padding=(1, 1))),
        (3, Convolution()),
        (3, Convolution(padding=(2, 2), dilation=(2, 2))),
        (3, Convolution(padding=(4, 4))),
        (3, Convolution(stride=(2, 2), padding=(1, 1))),
        (1, Convolution(stride=(2, 2))),
    ):
        x = torch.randn(4, 16, 12, 12, generator=g()).bfloat16().requires_grad_()
        w = torch.randn(24, 16, k, k, generator=g(1)).requires_grad_()
        settings = dict(stride=product.stride, padding=product.padding, dilation=product.dilation)
        y = approx_conv2d(x, w, **settings, approximation=dfp.eight_bits(g(2)))
        dy = torch.randn(y.shape, generator=g(3)).bfloat16()
        mine = [y, *torch.autograd.grad(y, (x, w), dy)]
        whole = x.detach().double(), w.detach().double()
        exact = [product.forward(*whole), *product.backward(dy.double(), *whole)]
        error = [((a.double() - e).norm() / e.norm()).item() for a, e in zip(mine, exact, strict=True)]
        assert 5e-3 < error[0] < 0.03
        assert error[1] < 0.03
        assert error[2] < 4e-3
        assert [t.dtype for t in mine] == [torch.bfloat16, torch.bfloat16, torch.float32]


def test_eight_bit_dx_is_unbiased():
    x, w = torch.zeros(1, 4, 6, 6).bfloat16().requires_grad_(), torch.randn(8, 4, 3, 3, generator=g())
    w = dequantise(quantise(w, 8))  # so that only dy is rounded
    dy = torch.randn(1, 8, 6, 6, generator=g(1)).bfloat16()
    approximation, draws = dfp.eight_bits(g(2)), []
    for _ in range(400):
        y = approx_conv2d(x, w, padding=1, approximation=approximation)
        draws.append(torch.autograd.grad(y, x, dy)[0].double())
    exact = Convolution(padding=(1, 1)).backward(dy.double(), x.double(), w.double(), (True, False))[0]
    draws = torch.stack(draws)
    z = (draws.mean(0) - exact) / (draws.std(0) / len(draws) ** 0.5)
    assert z.abs().mean() < 1.2  # of a normal variable 0.8
    assert (draws.std(0) > 0).all()


def test_training_in_eight_bits_learns_leaves_a_plain_model_and_is_not_bf16s():
    half = replace(RECIPE, epochs=6, precision="bf16")
    model, history = trained([EightBits()], half)
    assert history.accuracy > 85
    assert not any(isinstance(m, ApproxConv2d) for m in model.modules())
    assert history.events[-1]["text"] == "5 layers in 8 bits, dW in bf16"
    assert not equal(model, trained([], half)[0])


def test_eight_bits_resume_bit_equal(tmp_path):
    half = replace(RECIPE, precision="bf16")
    (a, _), (b, _) = resumed_and_whole(network, DATA, half, [EightBits()], tmp_path / "run.pt")
    assert equal(a, b)


def test_eight_bits_are_refused_outside_of_bf16():
    with pytest.raises(BadInput, match="precision 'bf16', not 'fp32'"):
        trained([EightBits()])
