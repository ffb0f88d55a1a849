"""What chapter 7.2 shows beyond its method: the paper's table, batch sizes, costs, numerics."""

import pytest
import torch
from torch import nn

from effilib.chapters import standardization_loss as chapter
from effilib.chapters.standardization_loss import BN, GN, NETWORK, NONE, SL
from effilib.tasks import task

TASK = task("smoke", "synthetic", NETWORK, precision="fp32")


pytestmark = pytest.mark.usefixtures("results")


def test_the_papers_network():
    for size, channels in ((28, 1), (32, 3), (9, 1)):
        model = chapter.cnn(10, channels)
        assert model(torch.zeros(2, channels, size, size)).shape == (2, 10)
        assert model[-1].in_features == 8 * 4 * 4
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert [m.num_features for m in norms] == [32, 16, 8]
        assert not any(m.weight.requires_grad for m in norms)


def test_the_papers_table_runs_with_the_papers_settings():
    t, why = chapter.acceptance_task(TASK)
    r = t.recipe
    assert (r.lr, r.momentum, r.weight_decay, r.schedule, r.warmup, r.augmentation) == (
        1e-3,
        0.0,
        4e-5,
        "constant",
        0.0,
        "none",
    )
    assert "synthetic" in why
    found, _ = chapter.acceptance(TASK)
    assert [a.name for a in found.arms] == [NONE, BN, SL]
    assert {h.steps for a in found.arms for h in found.histories(a.name)} == {4}
    assert len({found.histories(a.name)[0].rows[-1]["loss"] for a in found.arms}) == 3
    table = chapter.acceptance_table(found)
    assert list(table["band"]) == ["0 to 45", "82 to 89", "65 to 82"]
    assert list(table["paper %"]) == ["24.6 ± 6.5", "85.6 ± 1.1", "75.2 ± 2.6"]


def test_the_data_of_the_papers_table_is_said(monkeypatch):
    quick, why = chapter.acceptance_task(task("quick", "mnist5k", NETWORK))
    assert (quick.dataset, quick.images, quick.held) == ("mnist5k", None, None)
    assert "1,000 steps on 5,000 embedded digits instead of full MNIST" in why
    assert quick.recipe.epochs * (3500 // 128) == pytest.approx(1000)
    monkeypatch.setattr(chapter.data, "present", lambda name: False)
    assert "not on this machine" in chapter.acceptance_task(task("study", "mnist5k", NETWORK))[1]


def test_batch_sizes_with_every_normalisation():
    found = chapter.batch_sizes(TASK)
    assert list(found) == [32, 8]  # the judged one first
    assert [a.name for a in found[32].arms] == [NONE, SL, BN]
    assert list(chapter.by_kind(found[8])) == [NONE, SL, BN, GN]
    assert found[8].baseline == "no normalisation, batch 8"
    assert [a.role for a in found[8].arms] == ["baseline", "method", "control", "control"]
    assert found[8].illustration
    assert not found[32].illustration
    for batch, c in found.items():
        assert c.task.target >= 75.0  # three times chance, of 4 classes
        assert {h.steps for a in c.arms for h in c.histories(a.name)} == {chapter.UPDATES["smoke"][batch]}
    table = chapter.batch_table(found)
    assert len(table) == 7
    figure, caption = chapter.batch_figure(found)
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in figure.axes)
    assert "Left" in caption
    assert chapter.say_batches(found).startswith("Batch 8, 8 updates (n=1): no normalisation")


def test_a_users_network_without_batchnorm_has_two_arms():
    own = TASK.but(network="convnet", widths={"widths": (8, 8), "bn": False})
    assert not chapter.normalized(own)
    assert chapter.arm(own, NONE, 8, "baseline").methods == ()
    assert chapter.rate(own, SL, 8) == pytest.approx(own.recipe.lr / 2)


def test_rates_between_the_tuned_ones_lie_between_them():
    own = task("study", "cifar10", chapter.NETWORK)
    rates = [chapter.rate(own, GN, b) for b in (2, 4, 8, 32)]
    assert rates == sorted(rates)
    assert rates[1] == pytest.approx(
        0.005 * (0.1 / 0.005) ** 0.25
    )  # 4 is a quarter of the way from 2 to 32, on log scales


def test_costs_are_of_the_same_network():
    table = chapter.cost_table(TASK)
    assert table.loc[("fp32", BN), "of BatchNorm's"] == "1.00x"
    assert set(table.loc["fp32"].index) == {NONE, BN, SL, f"{SL}, naive", GN}


def test_the_numerics_and_the_case_by_hand():
    table = chapter.by_hand()
    assert list(table["D"]) == ["0.0000", "0.5000", "0.8069", "0.3181", "2.0966"]
    assert list(table["D"]) == [v.removeprefix("-") for v in table["fused, of two samples"]]
    result = chapter.check(TASK, TASK.load())["result"]
    assert all(float(v) < 1e-8 for k, v in result.items() if "bf16" not in k and "descent" not in k)
    assert float(result["the same, bf16 input, relative"]) < 1e-2
    mean, var = result["descent on D alone ends at mean, variance"].split(", ")
    assert abs(float(mean)) < 1e-6
    assert float(var) == pytest.approx(1, abs=1e-6)
    figure, caption = chapter.descent_figure()
    assert figure.axes[0].get_xlabel()
    assert "variance 1" in caption
