"""Exact convolutions of integers: compiled and not, against int64, and without a compiler."""

import functools
import os
import subprocess
import sys

import pytest
import torch

from effilib import paths
from effilib.convolution import Convolution
from effilib.cost import count_flops
from effilib.kernels import compiler, integers
from tests.common import g

COMPILED = integers.library() is not None
ROUTES = [
    pytest.param("compiled", marks=pytest.mark.skipif(not COMPILED, reason="no AVX512-VNNI")),
    "float64",
]
GEOMETRIES = {
    "3x3": (3, Convolution(padding=(1, 1))),
    "1x1": (1, Convolution()),
    "stride 2": (3, Convolution(stride=(2, 2), padding=(1, 1))),
    "stride 2, 1x1": (1, Convolution(stride=(2, 2))),
    "stride 3, no padding": (3, Convolution(stride=(3, 2))),
    "dilated": (3, Convolution(padding=(2, 2), dilation=(2, 2))),
    "stride 2, dilated": (3, Convolution(stride=(2, 2), padding=(2, 1), dilation=(2, 3))),
    "wide padding": (3, Convolution(padding=(4, 3))),
    "5x5": (5, Convolution(stride=(2, 1), padding=(2, 2))),
}
SIZES = {  # N, C, O, H, W
    "odd": (3, 5, 6, 8, 9),
    "one channel": (2, 1, 1, 9, 9),
    "three to one": (2, 3, 1, 8, 8),
    "whole registers": (2, 16, 32, 16, 16),
    "registers and a half": (3, 40, 48, 9, 11),
    "many samples": (37, 2, 17, 8, 8),
}


@pytest.fixture(params=ROUTES)
def route(request, monkeypatch):
    if request.param == "float64":
        monkeypatch.setattr(integers, "library", lambda: None)
    return request.param


def whole(shape, bits, seed, extreme=False):
    largest = 2 ** (bits - 1) - 1
    I = torch.randint(-largest, largest + 1, shape, generator=g(seed))  # noqa: E741
    if extreme:
        I.fill_(largest)
    I.view(-1)[: min(2, I.numel())] = largest
    return I.to(torch.int8 if bits <= 8 else torch.int16)


def three(x, w, product, bits, seed=2, extreme=False):
    """The three products by the kernels, and those by int64."""
    y = product.forward(x.long(), w.long())
    dy = whole(y.shape, bits, seed, extreme)
    mine = [
        integers.forward(x, w, product, bits),
        integers.backward_x(dy, x.shape, w, product, bits),
        integers.backward_w(dy, x, w.shape, product, bits),
    ]
    dx, dw = product.backward(dy.double(), x.double(), w.double())  # exact below 2^53
    return mine, [y.float(), dx.float(), dw.float()]


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("k", "product"), GEOMETRIES.values(), ids=GEOMETRIES)
def test_all_three_products_are_the_integers_rounded_once(k, product, size, route):
    N, C, O, H, W = size  # noqa: E741
    for bits in (16, 14, 8):
        x, w = whole((N, C, H, W), bits, 0), whole((O, C, k, k), bits, 1)
        for layout in (torch.contiguous_format, torch.channels_last):
            mine, exact = three(x.contiguous(memory_format=layout), w, product, bits)
            for a, e in zip(mine, exact, strict=True):
                assert a.shape == e.shape
                assert torch.equal(a, e)


@pytest.mark.parametrize("bits", [16, 15, 14, 8, 2])
def test_sums_of_nothing_but_largest_numbers_do_not_overflow(bits, route):
    """In one int32 they would from 2, 8, 32 and 133,144 products on; dW's are beyond 2^17."""
    x, w = whole((33, 2, 64, 64), bits, 0, True), whole((3, 2, 1, 1), bits, 1, True)
    mine, exact = three(x, w, Convolution(), bits, extreme=True)
    assert exact[2].max() >= 33 * 64 * 64 * (2 ** (bits - 1) - 1) ** 2 * (1 - 1e-6)
    x, w = whole((1, 300, 3, 3), bits, 0, True), -whole((2, 300, 3, 3), bits, 1, True)
    more = three(x, w, Convolution(padding=(1, 1)), bits, extreme=True)
    for a, e in zip([*mine, *more[0]], [*exact, *more[1]], strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("bits", [16, 8])
def test_a_sum_of_more_than_2_to_the_17_products_is_exact_forward_too(bits, route):
    x, w = whole((1, 2**17 + 10, 1, 1), bits, 0, True), whole((1, 2**17 + 10, 1, 1), bits, 1, True)
    y = integers.forward(x, w, Convolution(), bits)
    assert y.item() == torch.tensor((x.long() * w.long()).sum().item()).float().item()


def test_threads_do_not_change_a_bit(route):
    x, w = whole((5, 20, 9, 9), 14, 0), whole((24, 20, 3, 3), 14, 1)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append(three(x, w, Convolution(padding=(1, 1)), 14)[0])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_scale_is_a_power_of_two_of_all_of_it(route):
    x, w = whole((2, 3, 6, 6), 14, 0), whole((4, 3, 3, 3), 14, 1)
    y = integers.forward(x, w, Convolution(), 14)
    assert torch.equal(integers.forward(x, w, Convolution(), 14, 2.0**-40), y * 2.0**-40)
    assert integers.forward(x, w, Convolution(), 14, float("nan")).isnan().all()


def test_integer_convolutions_are_counted_as_the_products_that_they_are(route):
    for k, product in GEOMETRIES.values():
        x, w = whole((2, 5, 9, 8), 8, 0), whole((6, 5, k, k), 8, 1)
        y = product.forward(x.double(), w.double())
        one = 2 * y.numel() * w[0].numel()
        assert count_flops(lambda x=x, w=w, p=product: integers.forward(x, w, p, 8)) == one
        assert count_flops(lambda y=y, x=x, w=w, p=product: integers.backward_x(y, x.shape, w, p, 8)) == one
        assert count_flops(lambda y=y, x=x, w=w, p=product: integers.backward_w(y, x, w.shape, p, 8)) == one
        assert count_flops(lambda x=x, w=w, p=product: integers.convolve_int8(x, w, p, 1.0, 1.0)) == one


@pytest.mark.skipif(not COMPILED, reason="no AVX512-VNNI")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 40_001])
def test_the_guess_of_an_exponent_changes_nothing(n, dtype):
    x = (3 * torch.randn(n, generator=g())).to(dtype)
    for bits in (14, 8):
        for stochastic in (False, True):
            found = [
                integers.quantise(x, bits, stochastic=stochastic, seed=7, guess=e) for e in (-100, 0, 126)
            ]
            assert all(torch.equal(found[0][0], q[0]) and found[0][1] == q[1] for q in found)


def test_int8_sums_beyond_int32_are_exact_too():
    x = torch.full((1, 140_000, 1, 1), 127, dtype=torch.int8)
    y = integers.convolve_int8(x, x, Convolution(), 1.0, 1.0)
    assert y.item() == torch.tensor(140_000.0 * 127**2).bfloat16().item()


def test_int8_products_are_exact(route):
    for k, product in GEOMETRIES.values():
        x, w = whole((2, 5, 9, 8), 8, 0), whole((6, 5, k, k), 8, 1)
        y = integers.convolve_int8(x, w, product, 2.0**-3, 0.5)
        assert torch.equal(y, (product.forward(x.double(), w.double()) / 16).bfloat16())


@pytest.mark.parametrize("fault", ["no compiler", "a compiler that fails", "no folder"])
def test_without_a_compiled_kernel_one_line_says_so_and_the_numbers_are_the_same(
    fault, tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").write_text("no folder")
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'out of luck' >&2\nexit 1\n")
    broken.chmod(0o755)
    compilers = {"no compiler": "missing", "a compiler that fails": "broken"}
    if fault in compilers:
        monkeypatch.setenv("CXX", str(tmp_path / compilers[fault]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" if fault == "no folder" else tmp_path))
    monkeypatch.setattr(compiler, "load", functools.cache(compiler.load.__wrapped__))
    monkeypatch.setattr(integers, "library", functools.cache(integers.library.__wrapped__))
    x, w = whole((1, 3, 4, 4), 14, 0), whole((2, 3, 3, 3), 14, 1)
    for _ in range(2):
        mine, exact = three(x, w, Convolution(), 14)
        assert all(torch.equal(a, e) for a, e in zip(mine, exact, strict=True))
    (line,) = capsys.readouterr().out.splitlines()
    assert "products of 16-bit integers are computed in float64, which is slow: " in line
    assert fault != "a compiler that fails" or not COMPILED or line.endswith("out of luck")
    assert not list(tmp_path.glob("effilib/*"))  # nothing half-made is left


@pytest.mark.skipif(not COMPILED, reason="no AVX512-VNNI")
def test_it_is_compiled_once_for_all_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    name = "int16_convolution", "in float64"
    assert compiler.load.__wrapped__(*name) is not None
    (made,) = tmp_path.glob("effilib/*")
    monkeypatch.setattr(compiler.subprocess, "run", None)
    assert compiler.load.__wrapped__(*name) is not None
    assert list(tmp_path.glob("effilib/*")) == [made]


@pytest.mark.skipif(not COMPILED, reason="no AVX512-VNNI")
@pytest.mark.parametrize("left", [0, 1000])
def test_a_damaged_file_is_compiled_anew(left, tmp_path):
    # in a process of its own: to load half a file would end this one
    load = (
        "from effilib.kernels import compiler; print(compiler.load('gradient_pruning', 'slow') is not None)"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(paths.root())}

    def loaded():
        words = [sys.executable, "-c", load]
        return subprocess.run(words, env=environment, capture_output=True, text=True).stdout

    assert loaded() == "True\n"
    (made,) = tmp_path.glob("effilib/*")
    whole = made.read_bytes()
    made.write_bytes(whole[:left])
    assert loaded() == "True\n"
    assert made.read_bytes() == whole
    assert list(tmp_path.glob("effilib/*")) == [made]


def test_the_compiler_may_have_arguments_and_its_error_is_the_line_said(tmp_path, monkeypatch, capsys):
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\n(echo "In file included from x:"; echo "x:1: error: no $1") >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", f"{broken} wrapped")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiler.load.__wrapped__("gradient_pruning", "slow") is None
    assert capsys.readouterr().out == "no C++ kernel, slow: x:1: error: no wrapped\n"


def test_the_folder_of_kernels_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert paths.kernels() == tmp_path / "effilib"
