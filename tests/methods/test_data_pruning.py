"""Data pruning: unbiased over draws, the right images' losses, fewer steps at the same schedule, resumed."""

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F

from effilib import models
from effilib.data import synthetic
from effilib.errors import BadInput, NoEffect
from effilib.hooks import Method
from effilib.methods.data_pruning import DataPruning, keep_images
from effilib.recipe import Recipe
from effilib.training import train
from tests.common import equal, g, resumed_and_whole

DATA = synthetic(images=300)
RECIPE = Recipe(epochs=4, batch_size=16, lr=0.05, precision="fp32", label_smoothing=0.1)


def network():
    return models.build("convnet", 4, (1, 8, 8), widths=(8, 8))


@dataclass(frozen=True)
class Look(Method):
    """Keep of every step: which images, the learning rate, the schedule's position."""

    steps: list = field(default_factory=list, compare=False)

    def on_step_end(self, run):
        self.steps.append((run.epoch, run.batches.index.clone(), run.lr, run.schedule.position))


def test_weights_make_up_for_what_is_left_out():
    losses, gradients = torch.rand(40, generator=g(0)), torch.randn(40, 3, generator=g(1))
    draws = g(2)
    sums = []
    for _ in range(4000):
        kept, weights = keep_images(losses, 0.3, draws)
        sums.append((weights[kept, None] * gradients[kept]).sum(0))
    sums = torch.stack(sums)
    z = (sums.mean(0) - gradients.sum(0)) / (sums.std(0) / len(sums) ** 0.5)
    assert z.abs().max() < 4
    assert len(kept) < 40
    assert set((losses >= losses.mean()).nonzero().flatten().tolist()) <= set(kept.tolist())


def test_epochs_get_shorter_but_the_schedule_stays():
    look, plain = Look(), Look()
    train(network(), DATA, RECIPE, [DataPruning(full=0.25), look])
    train(network(), DATA, RECIPE, [plain])
    by_epoch = [[s for s in look.steps if s[0] == e] for e in range(4)]
    whole = len(DATA.train) // 16
    counts = [len(steps) for steps in by_epoch]
    assert counts[0] == counts[3] == whole
    assert max(counts[1:3]) < whole
    assert [steps[0][3] for steps in by_epoch] == pytest.approx([0, whole, 2 * whole, 3 * whole])
    assert by_epoch[3][-1][2] == pytest.approx(plain.steps[-1][2])
    assert all(len(set(index.tolist())) == 16 for _, index, *_ in look.steps)


def test_every_images_own_loss_is_kept():
    @dataclass(frozen=True)
    class Check(Method):
        of: Method

        def on_batch(self, run, x, y):
            assert torch.equal(y, run.dataset.train.y[run.batches.index])
            return x, y

        def loss_terms(self, run):
            index = run.batches.index
            ce = F.cross_entropy(
                run.logits, run.dataset.train.y[index], reduction="none", label_smoothing=0.1
            )
            kept = run.state[self.of]["new"][1, index]
            assert torch.allclose(kept, ce, atol=1e-6)

    method = DataPruning()
    train(network(), DATA, RECIPE, [method, Check(method)])


def test_resumed_run_is_the_whole_run(tmp_path):
    (resumed, _), (whole, _) = resumed_and_whole(network, DATA, RECIPE, [DataPruning()], tmp_path / "run.pt")
    assert equal(resumed, whole)


def test_fewer_flops_and_a_net_that_learns():
    pruned = train(network(), DATA, RECIPE, [DataPruning()])
    plain = train(network(), DATA, RECIPE)
    assert pruned.flops < plain.flops
    assert pruned.seen < plain.seen
    assert pruned.accuracy > 50


def test_one_epoch_has_no_effect():
    with pytest.raises(NoEffect, match="one epoch"):
        train(network(), DATA, Recipe(epochs=1, batch_size=16), [DataPruning()])


@pytest.mark.parametrize("how", [dict(ratio=0), dict(ratio=1), dict(full=1), dict(full=-1)])
def test_settings_are_checked(how):
    with pytest.raises(BadInput, match="data pruning"):
        DataPruning(**how)
