"""What is timed is the work of training: the same steps, on the same images, nothing learned."""

import copy
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from effilib import clock, cost, timing
from effilib.convolution import Approximation
from effilib.cost import Conv
from effilib.errors import BadInput
from effilib.hooks import Method
from effilib.tasks import task
from effilib.timing import Variant

TASK = task("smoke", "synthetic", device="cpu")
DATA = TASK.load()


class Hand:
    """A clock that is moved by hand: what else runs on this machine does not count."""

    seconds = 0.0

    def read(self):
        return self.seconds

    def move(self, seconds):
        self.seconds += seconds


HAND = Hand()


@pytest.fixture
def by_hand(monkeypatch):
    names = ("perf_counter", "process_time", "monotonic")
    monkeypatch.setattr(clock, "time", SimpleNamespace(**dict.fromkeys(names, HAND.read)))
    monkeypatch.setattr(clock, "_threads", dict)  # their clocks go by themselves


class Slow(nn.Module):
    """A network whose passes take so many seconds."""

    def __init__(self, model, forward=0.0, backward=0.0):
        super().__init__()
        self.model, self.seconds, self.backward_seconds = model, forward, backward

    def forward(self, x):
        y = self.model(x)
        HAND.move(self.seconds)
        if y.requires_grad:
            y.register_hook(lambda g: HAND.move(self.backward_seconds))
        return y


def slow(**seconds):
    return lambda model: Slow(model, **seconds)


@dataclass(frozen=True)
class Watch(Method):
    """Notes the weights that it sees, and takes time where a method works."""

    seen: list = field(default_factory=list, hash=False, compare=False)
    seconds: float = 0.0

    def on_fit_start(self, run):
        self.seen.append(copy.deepcopy(run.model.state_dict()))

    def on_step_end(self, run):
        HAND.move(self.seconds)
        self.seen.append(copy.deepcopy(run.model.state_dict()))


def test_a_step_is_all_of_it_and_ratios_are_to_the_first(by_hand):
    variants = [
        Variant("first", convert=slow(forward=0.03)),
        Variant("both", convert=slow(forward=0.03, backward=0.06)),
        Variant("method", convert=slow(backward=0.01), methods=(Watch(seconds=0.005),)),
    ]
    times = timing.step_times(TASK, DATA, variants)
    assert list(times.index) == ["first", "both", "method"]
    assert list(times) == ["ms", "x", "GFLOP", "x by FLOPs"]
    assert times["ms"].tolist() == pytest.approx([30, 90, 15])
    assert times["x"].tolist() == pytest.approx([1, 1 / 3, 2])
    assert times["x by FLOPs"].tolist() == [1, 1, 1]  # all have the same products
    model, (x, _) = TASK.build(DATA), timing.batch(DATA, TASK.recipe.batch_size)
    assert times["GFLOP"].iloc[0] == pytest.approx(cost.step_flops(model, x.shape[1:], len(x)) / 1e9)


def test_flops_follow_network_and_conversion():
    narrow = Variant("narrow", network={"widths": (4, 4, 4)})
    other = Variant("other", convert=lambda model: TASK.build(DATA, widths=(4, 4, 4)))
    times = timing.step_times(TASK, DATA, [Variant("as built"), narrow, other])
    assert times.loc["narrow", "GFLOP"] == times.loc["other", "GFLOP"] < times.loc["as built", "GFLOP"]


def test_nothing_is_learned():
    watch = Watch()
    timing.step_times(TASK, DATA, [Variant("watched", methods=(watch,))])
    first, last = watch.seen[0], watch.seen[-1]
    assert len(watch.seen) >= 5  # counted, warmed up and timed
    weights = dict(TASK.build(DATA).named_parameters())
    assert all(torch.equal(first[n], last[n]) for n in weights)


def test_timing_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    timing.step_times(TASK, DATA, [Variant("dropout", convert=lambda m: nn.Sequential(m, nn.Dropout(0.5)))])
    timing.pass_times(TASK, DATA, [Variant("dropout", convert=lambda m: nn.Sequential(m, nn.Dropout(0.5)))])
    assert torch.equal(torch.get_rng_state(), before)


def test_passes_are_told_apart(by_hand):
    network = Variant("network", convert=slow(forward=0.01, backward=0.02))
    method = Variant("method", convert=slow(forward=0.01, backward=0.02), methods=(Watch(seconds=0.005),))
    times = timing.pass_times(TASK, DATA, [network, method])
    assert list(times) == ["forward ms", "backward ms", "step ms"]
    assert times.loc["network"].tolist() == pytest.approx([10, 20, 30])
    assert times.loc["method"].tolist() == pytest.approx([10, 20, 35])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_variant_has_its_own_format(precision):
    seen = []

    def look(model):
        model.register_forward_hook(lambda m, inputs, y: seen.append((y.dtype, inputs[0].is_contiguous())))

    variant = Variant("v", convert=look, precision=precision, memory_format="contiguous")
    timing.pass_times(TASK, DATA, [variant])
    assert set(seen) == {(timing.DTYPES[precision], True)}


def test_variants_need_names_of_their_own():
    with pytest.raises(BadInput, match="variants need names of their own, got a, a"):
        timing.step_times(TASK, DATA, [Variant("a"), Variant("a", precision="fp32")])


def test_layers_are_timed_by_layer_and_variant(by_hand):
    def half(x, w):
        HAND.move(0.02)
        return torch.arange(2), None

    def no_dx(dy, x, w, product):
        HAND.move(0.01)
        return torch.zeros_like(x)

    convs = {"a": Conv(N=2, C=4, O=4, H=6, W=6), "b": Conv(N=2, C=4, O=8, H=6, W=6, stride=2)}
    found = {"half": Approximation(sample=half), "no dX": Approximation(dx=no_dx)}
    times = timing.layer_times(convs, found, repeats=3)
    assert times.index.names == ["layer", "variant"]
    assert times.index.tolist() == [(layer, how) for layer in "ab" for how in ("exact", "half", "no dX")]
    for layer in "ab":
        assert times.loc[layer].to_numpy() == pytest.approx(np.array([[0, 0], [20, 0], [0, 10]]))


def test_layers_have_times_in_every_format():
    for precision in timing.formats("cpu"):
        times = timing.layer_times(
            {"a": Conv(N=2, C=4, O=4, H=6, W=6, groups=2)}, {}, precision=precision, repeats=3
        )
        assert (times > 0).all(axis=None)


def test_rounds_end_when_the_time_is_spent_but_not_before_the_third(by_hand):
    def rounds(seconds, each):
        return sum(counts and not HAND.move(each) for counts in timing._rounds(9, seconds))

    assert (rounds(5.0, 1.0), rounds(0.5, 1.0), rounds(100.0, 1.0)) == (6, 3, 9)


def test_the_parts_of_a_step_add_up_to_about_a_step():
    parts = timing.breakdown(TASK, DATA)
    assert list(parts) == list(timing.PARTS)
    assert all(ms >= 0 for ms in parts.values())
    assert parts["dX"] > 0 < parts["dW"]


def test_a_batch_is_always_the_same_and_normalised():
    x, y = timing.batch(DATA, 200)
    assert len(x) == len(y) == min(200, len(DATA.train))
    assert abs(x.mean()) < 0.2
    again = timing.batch(DATA, 8)
    assert torch.equal(again[0], x[:8])
    assert torch.equal(again[1], y[:8])


def test_layers_and_formats_are_named():
    assert timing.formats("cpu")[-1] == "fp32"
    layers = timing.layers_of(TASK, DATA)
    assert "stem" not in layers
    assert {(c.N, c.C) for c in layers.values()} == {(TASK.recipe.batch_size, 8)}
    assert timing.say_conv(Conv(N=1, C=3, O=8, H=5, W=5, k=1)) == "3 to 8 channels, 5 x 5, 1 x 1"
