"""Diagnoses on networks of which the answer is known, and each against an obvious oracle."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from effilib import data, models, networks
from effilib.errors import BadInput
from effilib.evaluation import evaluate
from effilib.methods.diagnosis import (
    Buds,
    Case,
    CheapestFlop,
    Forks,
    PricedPenalty,
    PruningRate,
    RandomChoice,
    examine,
    ranked,
    search,
)
from effilib.methods.gradient_diagnosis import GradMax, _gradients, leading_values
from effilib.methods.patients import KEEP, candidates, treated
from effilib.recipe import Recipe
from effilib.seeds import stream
from effilib.training import train
from tests.common import equal, shake

SHAPE = (1, 8, 8)
DATA = data.synthetic(images=300)
RECIPE = Recipe(epochs=2, batch_size=20, lr=0.1, schedule="constant", precision="fp32")
SICK = {"widths": (8, 8), "blocks": [[8], [8]]}
ALL = [
    PruningRate(),
    PricedPenalty(),
    Buds(),
    GradMax(images=64),
    Forks(steps=3),
    CheapestFlop(),
    RandomChoice(),
]


def network(seed=0, **settings):
    return models.build("resnet", 4, SHAPE, seed=seed, **(SICK | settings))


def case(model=None, **changes):
    model = model or network()
    times = {n: 1.0 + 0.5 * (n != KEEP) for n in candidates(model.settings(), 4)}
    return Case(
        **{"model": model, "dataset": DATA, "recipe": RECIPE, "times": times, "multiple": 4, **changes}
    )


def best(scores):
    return max(scores, key=scores.get)


@pytest.mark.parametrize("diagnosis", ALL, ids=lambda d: type(d).__name__)
def test_it_ranks_all_candidates_repeats_itself_and_leaves_the_patient_alone(diagnosis):
    model = shake(network())
    before, mine = copy.deepcopy(model), case(model)
    scores, seconds = examine(mine, diagnosis)
    assert list(scores) == list(candidates(model.settings(), 4))
    assert seconds > 0
    assert diagnosis(mine) == scores
    assert equal(model, before)
    assert model.training == before.training


def test_the_search_is_a_training_at_a_held_rate():
    model, again = network(), network()
    found, history = search(
        model, DATA, replace(RECIPE, schedule="linear"), {"keep": 1.0}, seed=3, multiple=4
    )
    train(again, DATA, RECIPE, seed=stream(3, "search").initial_seed())
    assert equal(found.model, again)
    assert history.steps == 2 * (len(DATA.train) // 20)
    assert found.recipe.lr_at(29, 30) == RECIPE.lr


def dead(model, stage, share=0.75):
    """Make channels inside of a stage's blocks useless for good: they are read with very small weights."""
    for block in model.stages[stage]:
        n = round(share * block.inner)
        with torch.no_grad():
            block.conv2.weight[:, :n] *= 1e-3
            block.bn1.weight[:n] = block.bn1.bias[:n] = 0
    return model


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("diagnosis", [PricedPenalty(), PruningRate()], ids=lambda d: type(d).__name__)
def test_a_stage_of_dead_channels_is_never_widened(diagnosis, stage):
    trained = network(widths=(16, 16), blocks=[[16], [16]])
    train(trained, DATA, RECIPE)
    scores = diagnosis(case(dead(trained, stage)))
    other = 1 - stage
    assert scores[f"widen stage {stage + 1}"] < scores[f"widen stage {other + 1}"]
    assert best(scores) != f"widen stage {stage + 1}"
    if diagnosis == PricedPenalty() and stage == 0:
        assert scores["narrow stage 1"] > scores[KEEP]


def test_a_stage_that_costs_more_has_to_be_worth_more():
    widen = []
    for dear in (0, 1):
        times = dict.fromkeys(candidates(network().settings(), 4), 1.0)
        times |= {
            f"{a} stage {s + 1}": 1.0 + (2.0 if s == dear else 0.2)
            for a in ("widen", "deepen")
            for s in (0, 1)
        }
        scores = PricedPenalty()(case(times=times))
        widen.append([scores["widen stage 1"], scores["widen stage 2"]])
    assert widen[0][0] < widen[1][0]
    assert widen[0][1] > widen[1][1]


def test_added_channels_are_those_of_the_treated_network():
    assert case(network(blocks=[[8], [8, 2]])).added(1) == 8 + 2


def test_buds_keep_the_function_and_those_that_cannot_learn_die():
    mine = case(shake(network()))
    model, (x, _) = copy.deepcopy(mine.model), mine.batch
    before = model.eval()(x)
    Buds().sprout_(mine, model)
    assert model.settings()["blocks"] == [[12, 8], [12, 8]]
    assert torch.allclose(model.eval()(x), before, atol=1e-4)
    blind = network()
    with torch.no_grad():  # what the second stage adds is never seen by the classifier
        blind.head.weight.zero_()
        blind.head.weight.requires_grad_(False)
    scores = Buds()(case(blind))
    assert scores["deepen stage 1"] == scores["deepen stage 2"] == 0


def test_forks_are_separate_trainings_bit_for_bit():
    mine = case(times={KEEP: 2.0, "widen stage 2": 3.0, "deepen stage 1": 4.0})
    for name, steps in ((KEEP, 6), ("widen stage 2", 4), ("deepen stage 1", 3)):
        forked, loss = Forks(steps=6).after(mine, name)
        alone = mine.treated(name)
        assert models.describe(alone) == models.describe(
            networks.ResNet(4, 1, **treated(mine.model.settings(), name, 4))
        )
        per_epoch = len(DATA.train) // RECIPE.batch_size
        recipe = replace(RECIPE, epochs=steps / per_epoch, warmup=0.0, schedule="linear")
        order = stream(mine.seed, "diagnosis").initial_seed()
        assert train(alone, DATA, recipe, seed=order).steps == steps
        models.reestimate_(alone, [x for (x, _), _ in zip(mine.batches(), range(4), strict=False)])
        assert equal(alone, forked)
        assert loss == evaluate(alone, DATA, "decide")[0]


@pytest.mark.parametrize(("stride", "o", "i", "k"), [(1, 6, 4, 5), (2, 4, 6, 3), (1, 3, 3, 30)])
def test_leading_values_are_those_of_a_full_decomposition(stride, o, i, k):
    size = 3 + 2 * stride
    M = torch.randn(o, i, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    A = torch.zeros(i, 3, 3, o, 3, 3, dtype=torch.double)
    for a in range(3):
        for b in range(3):
            for c in range(3):
                for d in range(3):
                    A[:, a, b, :, c, d] = M[:, :, a + stride * c, b + stride * d].T
    full = torch.linalg.svdvals(A.reshape(9 * i, 9 * o)).square()
    torch.testing.assert_close(leading_values(M, k, stride=stride), full[:k])


@pytest.mark.parametrize("stage", [0, 1])
def test_gradmax_gains_what_new_weights_gradients_are(stage):
    """Let new channels write by the best directions and read by zeros: the gradient of what reads is told."""
    net = shake(network()).double().eval()
    x, y = torch.rand(16, *SHAPE, dtype=torch.double), torch.arange(16) % 4
    seen, _ = _gradients(net, x, y)
    block, name = net.stages[stage][0], f"stages.{stage}.0"
    told = GradMax()._wider(seen, name, block, 8)
    h, s = seen[f"{name}.conv1"][0], block.conv1.stride[0]
    g = torch.Generator().manual_seed(0)
    norm = block.conv2.weight.detach().square().sum((0, 2, 3)).mean().sqrt()

    def gained(writes):  # (8, n, 3, 3): n new channels' outgoing weights, of the old ones' norm
        V = torch.zeros(writes.shape[1], h.shape[1], 3, 3, dtype=torch.double, requires_grad=True)
        new = nn.functional.conv2d(nn.functional.conv2d(h, V, stride=s, padding=1), writes, padding=1)
        # the padding of the second convolution cuts what lies outside, as it does in M
        return torch.autograd.grad((new * seen[f"{name}.conv2"][1]).sum(), V)[0].square().sum().item()

    random = [
        torch.linalg.qr(torch.randn(72, 8, generator=g, dtype=torch.double))
        .Q.view(8, 3, 3, 8)
        .permute(0, 3, 1, 2)
        for _ in range(5)
    ]
    assert all(gained(norm * w) < told for w in random)


def test_gradmax_finds_the_stage_that_hinders():
    """A stage whose only channel is nearly blind has more to gain than one that is rich."""
    net = network(widths=(8, 8), blocks=[[8], [1]])
    train(net, DATA, RECIPE)
    times = {n: 1.0 + 0.5 * (n != KEEP) for n in candidates(net.settings(), 1)}
    scores = GradMax(images=128)(case(net, multiple=1, times=times))
    assert all(value >= 0 for name, value in scores.items() if name.startswith(("widen", "deepen")))
    dear = GradMax(images=128)(case(net, multiple=1, times=times | {"widen stage 2": 2.0}))
    assert dear["widen stage 2"] == pytest.approx(scores["widen stage 2"] / 2)


def test_the_cheapest_per_flop_is_a_growth_with_the_fewest_flops():
    net = models.build("resnet", 4, (1, 16, 16), widths=(16, 32), blocks=[[16], [16]])
    times = dict.fromkeys(candidates(net.settings(), 4), 1.0)
    scores = CheapestFlop()(case(net, times=times, dataset=data.synthetic(size=16)))
    assert best(scores) == "widen stage 2"
    assert scores[KEEP] == scores["narrow stage 1"] == 0


def test_random_choice_differs_from_seed_to_seed():
    firsts = {best(RandomChoice()(case(seed=seed))) for seed in range(20)}
    assert len(firsts) > 2


def test_what_speaks_for_narrowing_is_mirrored():
    times = {KEEP: 1.0, "narrow stage 1": 0.5, "widen stage 2": 2.0}
    scores = ranked(case(times=times), [0.9, 0.2], [0.0, 0.0], 0.7, [0.9, 0.2])
    assert scores == pytest.approx({KEEP: 0.7, "narrow stage 1": 0.5, "widen stage 2": 0.2})


def test_what_cannot_be_is_refused():
    with pytest.raises(BadInput, match="times"):
        case(times={"widen stage 1": 1.0})
    with pytest.raises(BadInput, match="times"):
        case(times={KEEP: 1.0, "widen stage 9": 1.0})
    with pytest.raises(BadInput, match="stage 1 has no price"):
        PricedPenalty()(case(times={KEEP: 1.0}))
    with pytest.raises(BadInput, match="has to score all candidates"):
        examine(case(), lambda case: {KEEP: 1.0})
