"""Random small networks of common layers: `train` either trains them or says one sentence."""

import contextlib
import math
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from effilib.data import load
from effilib.errors import BadInput
from effilib.recipe import Recipe
from effilib.training import train

pytestmark = pytest.mark.slow

DATA = load("synthetic").limit(24)
CLASSES, SHAPE = DATA.classes, DATA.shape


class Called(nn.Module):
    """A layer that is a function, as people write them."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(self, x)


@st.composite
def networks(draw):
    """A list of layers, which mostly fit each other."""
    one_of, c, layers = st.sampled_from, SHAPE[0], []
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(one_of(["conv", "conv", "norm", "act", "pool", "drop", "residual"]))
        if kind == "conv":
            width, k = draw(one_of([1, 3, 4, 16])), draw(one_of([1, 2, 3, 8]))
            own = {"stride": draw(one_of([1, 2])), "padding": draw(one_of([0, 1, "same"]))}
            if own["padding"] == "same":
                own["stride"] = 1
            groups = draw(one_of([1, 1, 1, math.gcd(c, width)]))
            wrong = draw(one_of([0, 0, 0, 0, 0, 0, 0, groups]))
            layers.append(nn.Conv2d(c + wrong, width, k, groups=groups, **own))
            c = width
        elif kind == "norm":
            layers.append(draw(one_of([nn.BatchNorm2d(c), nn.GroupNorm(1, c), nn.InstanceNorm2d(c)])))
        elif kind == "act":
            layers.append(draw(one_of([nn.ReLU(inplace=True), nn.ReLU(), nn.GELU(), nn.Sigmoid()])))
        elif kind == "pool":
            layers.append(draw(one_of([nn.MaxPool2d(2), nn.AvgPool2d(2, 1), nn.AdaptiveAvgPool2d(2)])))
        elif kind == "residual":
            path = nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU())
            layers.append(Called(lambda self, x, path=path: x + path(x)))
            layers[-1].path = path
        else:
            layers.append(draw(one_of([nn.Dropout(), nn.Dropout2d(0.2)])))
    flat = [
        nn.Flatten(),
        Called(lambda self, x: x.view(x.size(0), -1)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    ]
    layers += [draw(one_of(flat)), nn.LazyLinear(CLASSES + draw(one_of([0] * 7 + [1])))]
    ends = [None] * 6 + [
        nn.Softmax(1),
        nn.LogSoftmax(1),
        nn.BatchNorm1d(CLASSES),
        Called(lambda self, x: (x, x) if self.training else x),
        Called(lambda self, x: x.detach()),
        Called(lambda self, x: x.double()),
    ]
    end = draw(one_of(ends))
    return nn.Sequential(*layers, *([end] if end else []))


CHANGES = [lambda net: net] * 6 + [
    lambda net: net.double(),
    lambda net: net.bfloat16(),
    lambda net: net.requires_grad_(False),
    lambda net: net[0].requires_grad_(False) and net,
    lambda net: net[:-1].eval() and net,
]


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    networks(),
    st.sampled_from(CHANGES),
    st.sampled_from([1, 2, 8, 8]),
    st.sampled_from(["auto", "fp32", "fp64"]),
    st.sampled_from(["auto", "auto", "channels_last", "contiguous"]),
)
def test_a_network_trains_or_is_refused_in_one_sentence(net, change, batch_size, precision, memory_format):
    recipe = Recipe(
        epochs=2 * batch_size / len(DATA.train), batch_size=batch_size, lr=0.01,
        precision=precision, memory_format=memory_format,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said = ""
        with contextlib.suppress(Exception):  # while it is lazy, a network cannot be changed
            net.eval()(torch.zeros(2, *SHAPE))
            change(net.train())
        try:
            assert train(net, DATA, recipe, evaluations=1).steps == 2
        except BadInput as error:
            said = str(error)
    assert "\n" not in said
    assert len(said) < 500
