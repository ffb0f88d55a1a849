"""What chapter 7.3 shows beyond its methods: arms, tables, figures, numerics."""

import pytest

from effilib.chapters import wavelet as chapter
from effilib.chapters.wavelet import (
    BANDS,
    FULL,
    JOINT,
    LONGER,
    LOW,
    PUSHED,
    RAW,
    READY,
    S2D,
    STAGED,
    STRIDED,
    WIDE,
)
from effilib.data import synthetic
from effilib.experiment import compare
from effilib.tasks import task

TASK = task("smoke", "synthetic", precision="fp32", images=128)
DATA = TASK.load()


pytestmark = pytest.mark.usefixtures("results")


def test_every_arm_runs_at_equal_epochs():
    found, left_out = chapter.everything(TASK, DATA)
    assert not left_out
    names = [a.name for a in found.arms]
    assert names == [FULL, BANDS, LONGER, S2D, RAW, STRIDED, LOW, PUSHED, WIDE, READY, JOINT, STAGED]
    assert [a.role for a in found.arms[1:6]] == ["method", "method", "control", "method", "control"]
    runs = {n: found.histories(n)[0] for n in names}
    longer = runs.pop(LONGER)
    assert len({h.steps for h in runs.values()}) == 1
    assert longer.steps == round(chapter.AIM * runs[BANDS].steps)
    runs[LONGER] = longer
    assert runs[WIDE].structure["widths"] == [16, 8, 8]
    assert len({h.rows[-1]["loss"] for h in runs.values()}) == len(names)  # arms that differ
    assert all(runs[n].flops < runs[FULL].flops for n in (BANDS, LOW, PUSHED))
    table = chapter.everything_table(found)
    assert list(table.index) == names
    assert table.loc[JOINT, "energy share of I_H"].endswith("%")
    auto = chapter.wae_table(found)
    assert auto.loc[STAGED, "stages"].startswith("classifier at step")
    assert auto.loc[JOINT, "stages"] == "joint from the start"
    figure, caption = chapter.everything_figure(found)
    assert len(figure.axes[0].lines) == 2 * len(names)
    assert "illustration" in caption
    assert chapter.say_everything(found).count(";") == len(names) - 2


def test_the_verdict_has_three_arms():
    arms = chapter.arms(TASK, DATA)
    assert [(a.name, a.role) for a in arms] == [(FULL, "baseline"), (BANDS, "method"), (S2D, "control")]
    c = compare(TASK, arms, seeds=1, quantity="time per step")
    assert c.predicted(BANDS) > 1


def test_a_users_network_gets_the_arms_that_it_can_take():
    own = task("smoke", "synthetic", "torchvision.models:resnet18")
    found, left_out = chapter.all_arms(own, synthetic(images=64, channels=3, size=32))
    assert [a.name for a in found] == [FULL, BANDS, LONGER, S2D, RAW, LOW, PUSHED]
    assert any("has a stride of 2 already" in s for s in left_out)
    assert any("built for our networks" in s for s in left_out)


def test_a_network_without_a_stride_to_take_out_works_at_half_its_sizes():
    own = TASK.but(network="convnet", widths={"widths": (8,)})
    found, left_out = chapter.all_arms(own, DATA)
    assert [a.name for a in found] == [FULL, BANDS, LONGER, S2D, RAW, STRIDED, LOW]
    assert "no layer of VGG has a stride of 2" in left_out[0]
    assert not found[1].methods[0].keep


def test_costs_are_of_every_network():
    table = chapter.cost_table(TASK, DATA)
    assert table.loc[FULL, "predicted"] == "1.00x"
    assert float(table.loc[PUSHED, "predicted"][:-1]) > float(table.loc[BANDS, "predicted"][:-1]) > 1
    assert JOINT in table.index
    assert len(chapter.transform_table(TASK, DATA)) == 7


def test_the_numerics_and_the_case_by_hand():
    assert chapter.by_hand().loc["checkerboard"].tolist() == [0, 0, 0, 2]
    assert chapter.by_hand().loc["bright row above"].tolist() == [1, 1, 0, 0]
    result = chapter.check(TASK, DATA)["result"]
    small = [float(v) for k, v in result.items() if "energy" not in k or k.startswith(("haar", "db2"))]
    assert len(small) == 10
    assert max(map(abs, small)) < 1e-4
    assert abs(float(result["bior4.4: energy of the bands less the image's, relative"])) > 1e-6
    assert float(chapter.energy(DATA).loc["haar", "A"][:-1]) > 25


def test_bands_are_shown_as_they_are():
    figure, caption = chapter.bands_figure(DATA)
    assert [ax.get_title(loc="left") for ax in figure.axes][:2] == ["image", "band A"]
    assert "horizontal edges" in caption
