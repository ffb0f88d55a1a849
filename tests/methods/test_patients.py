"""Patients: planted defects, and treatments that come to the same shape on settings and on a network."""

import pytest
import torch

from effilib import data, models
from effilib.errors import BadInput
from effilib.methods.patients import HEALTHY, KEEP, PATIENTS, candidates, step_times, treat_, treated
from effilib.tasks import task
from tests.common import both, exactly, shake, step

SHAPE = (1, 8, 8)
SICK = {"widths": (4, 8), "blocks": [[2], [8, 4]]}


def network(settings=SICK, seed=0):
    return models.build("resnet", 4, SHAPE, seed=seed, **settings)


def test_each_patient_has_one_defect_and_a_cure_among_its_candidates():
    assert len({p.name for p in PATIENTS}) == len(PATIENTS) >= 6
    for p in PATIENTS:
        assert p.cure in candidates(p.settings)
        different = [i for i in range(3) if p.blocks[i] != HEALTHY.blocks[i]]
        assert len(different) == (p is not HEALTHY)
        if different:
            assert p.cure.endswith(f"stage {different[0] + 1}")


@pytest.mark.parametrize(
    ("candidate", "blocks"),
    [
        ("keep", [[2], [8, 4]]),
        ("widen stage 1", [[4], [8, 4]]),
        ("widen stage 2", [[2], [16, 8]]),
        ("deepen stage 1", [[2, 2], [8, 4]]),
        ("deepen stage 2", [[2], [8, 4, 4]]),
        ("narrow stage 2", [[2], [4, 2]]),
    ],
)
def test_a_treatment_is_the_same_on_settings_and_on_a_network(candidate, blocks):
    assert treated(SICK, candidate, multiple=2)["blocks"] == blocks
    net, x = shake(network()), torch.rand(6, *SHAPE)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    step(net, optimizer, x, torch.arange(6) % 4)
    before = both(net, x)
    treat_(net, candidate, x, optimizer, multiple=2)
    assert net.settings()["blocks"] == blocks
    exactly(optimizer, net)
    same = torch.allclose(both(net, x), before, atol=1e-4)
    assert same == (not candidate.startswith("narrow"))
    models.build("resnet", 4, SHAPE, **treated(SICK, candidate, multiple=2)).load_state_dict(net.state_dict())


def test_narrowing_keeps_the_channels_that_are_read_most():
    net = network()
    with torch.no_grad():
        net.stages[1][0].conv2.weight[:, [0, 2, 5, 7]] = 0
    rest = net.stages[1][0].conv1.weight[[1, 3, 4, 6]].clone()
    x = torch.rand(4, *SHAPE)
    treat_(net, "narrow stage 2", x, multiple=2)
    assert torch.equal(net.stages[1][0].conv1.weight, rest)


def test_what_changes_nothing_is_no_candidate():
    found = candidates({"widths": (16, 32), "blocks": [[16], [32]]})
    assert KEEP in found
    assert "narrow stage 1" not in found
    assert "narrow stage 1" in candidates({"widths": (16, 32), "blocks": [[32], [32]]})
    with pytest.raises(BadInput, match="changes none"):
        treated({"widths": (16,), "blocks": [[16]]}, "narrow stage 1")


def test_a_new_block_is_never_wider_inside_than_the_trunk():
    wide = {"widths": (4,), "blocks": [[8]]}
    assert treated(wide, "deepen stage 1")["blocks"] == [[8, 4]]
    treat_(net := network(wide), "deepen stage 1", torch.rand(4, *SHAPE), multiple=2)
    assert net.settings()["blocks"] == [[8, 4]]


@pytest.mark.parametrize("candidate", ["wider stage 1", "widen stage 3", "widen"])
def test_an_unknown_treatment_is_refused(candidate):
    with pytest.raises(BadInput, match="unknown candidate"):
        treated(SICK, candidate)


def test_only_our_resnets_are_treated():
    with pytest.raises(BadInput, match="only our ResNets"):
        treat_(models.build("convnet", 4, SHAPE), "widen stage 1", torch.rand(2, *SHAPE))


def test_a_step_of_a_larger_network_takes_longer_and_nothing_is_learned():
    t = task("smoke", "synthetic", batch_size=64)
    shapes = [{"widths": (8, 8), "blocks": (1, 1)}, {"widths": (64, 128), "blocks": (4, 4)}]
    small, large = step_times(t, data.synthetic(), shapes, repeats=5)
    assert 2 * small < large
