"""What chapter 7.2 trains."""

from dataclasses import replace

import pytest

from effilib.chapters import standardization_loss as chapter
from effilib.chapters.standardization_loss import BN, GN, NETWORK, NONE, SL
from effilib.experiment import measure
from effilib.tasks import task

pytestmark = pytest.mark.usefixtures("results")

TASK = task("smoke", "synthetic", NETWORK, precision="fp32")


def test_the_papers_table_has_the_papers_settings():
    t = chapter.paper_task(TASK)
    r = t.recipe
    assert (r.lr, r.momentum, r.weight_decay, r.schedule, r.warmup) == (1e-3, 0.0, 4e-5, "constant", 0.0)
    cell = measure(t, chapter.paper_arms(t))[0]["arms"]
    assert {name: h.steps for name, h in cell.items()} == {NONE: 4, BN: 4, SL: 4}
    assert len({h.rows[-1]["loss"] for h in cell.values()}) == 3
    study = chapter.paper_task(task("study", "mnist5k", NETWORK))
    assert study.recipe.epochs * (len(study.load().train) // 128) == pytest.approx(1000)


def test_every_batch_size_has_its_updates_and_every_normalisation():
    assert chapter.UPDATES["smoke"] == {32: 8, 8: 8}
    t = chapter.at_batch(TASK, 8).but(lengths=(1.0,))
    assert [(a.name, a.role) for a in chapter.arms(t, 8)] == [
        (NONE, "baseline"), (SL, "method"), (BN, "control"), (GN, "control")
    ]  # fmt: skip
    assert {h.steps for h in measure(t, chapter.arms(t, 8))[0]["arms"].values()} == {8}


def test_what_the_user_asks_for_is_the_headlines():
    own = task("smoke", "synthetic", NETWORK, batch_size=16, lr=0.02)
    t = chapter.at_batch(own)
    assert (t.recipe.batch_size, t.recipe.epochs) == (16, 16 / (128 // 16))  # as many images as at 32
    assert {a.changes["lr"] for a in chapter.arms(t)} == {0.02}
    assert chapter.at_batch(task("smoke", "synthetic", NETWORK, epochs=3)).recipe.epochs == 3


def test_a_users_network_without_batchnorm_has_two_arms():
    own = TASK.but(network="convnet", widths={"widths": (8, 8), "bn": False})
    assert [a.name for a in chapter.arms(own)] == [NONE, SL]
    assert chapter.rate(own, SL, 8) == pytest.approx(chapter.SHARE * own.recipe.lr / 2)
    assert chapter.rate(own, BN, 8) == pytest.approx(own.recipe.lr / 2)


def test_rates_between_the_tuned_ones_lie_between_them():
    own = task("study", "cifar10", NETWORK)
    rates = [chapter.rate(own, GN, b) for b in (2, 4, 8, 32)]
    assert rates == sorted(rates)
    assert rates[1] == pytest.approx(0.005 * (0.1 / 0.005) ** 0.25)  # on log scales


def test_study_has_the_penalty_in_every_fourth_step_besides():
    own = task("study", "synthetic", NETWORK)
    sparse = next(a for a in chapter.arms(own) if a.name == chapter.SPARSE)
    always = next(a for a in chapter.arms(own) if a.name == SL)
    assert replace(sparse.methods[0], every=1) == always.methods[0]
    assert sparse.changes == always.changes


@pytest.mark.parametrize("network", ["resnet", "vgg", "convnet"])
def test_nothing_diverges_on_our_networks_at_its_rate(network):
    own = task("quick", "mnist5k", NETWORK).on(network).but(images=1600, epochs=2.4, lengths=(1.0,), seeds=1)
    arms = [a for a in chapter.arms(own, own.recipe.batch_size) if a.name in (NONE, SL)]
    cell = measure(own, arms)[0]["arms"]
    assert not any(h.diverged for h in cell.values())
    assert cell[SL].events[-1]["divergence"] < 300


def test_our_networks_are_shown_with_the_papers_network_only():
    assert list(chapter.on_ours(task("study", "cifar10", NETWORK))) == ["resnet", "vgg", "convnet"]
    assert not chapter.on_ours(task("study", "cifar10", "vgg"))
