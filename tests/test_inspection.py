"""What the layers of a network see."""

import pytest
import torch
from torch import nn

from effilib.inspection import followers
from effilib.methods.freezing import freeze_, prefix
from effilib.methods.gradient_pruning import placements


@pytest.mark.parametrize("in_place", [False, True])
def test_a_norm_behind_an_activation_does_not_follow_the_convolution(in_place):
    act = nn.ReLU(inplace=in_place)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), act, nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), act,
        nn.Conv2d(4, 4, 3, stride=2), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    x = torch.rand(2, 1, 8, 8)
    assert followers(model, x) == {"3": "4"}
    assert placements(model, {n: model[int(n)] for n in "036"}, x) == {"0": "dI", "3": "dO", "6": "dI"}
    freeze_(model, x, prefix(model, x, depth=2))
    assert [type(model[i]).__name__ for i in (0, 2, 3, 4)] == ["Conv2d", "_Fixed", "_Folded", "_Passed"]
