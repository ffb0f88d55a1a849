"""What chapter 7.3 trains."""

import pytest

from effilib.chapters import wavelet as chapter
from effilib.chapters.wavelet import (
    BANDS,
    FULL,
    JOINT,
    LOW,
    PHASE,
    PUSHED,
    RAW,
    READY,
    S2D,
    STAGED,
    STRIDED,
    WIDE,
)
from effilib.data import synthetic
from effilib.experiment import measure
from effilib.tasks import task

pytestmark = pytest.mark.usefixtures("results")

TASK = task("smoke", "synthetic", precision="fp32", images=128)
DATA = TASK.load()


def test_every_arm_runs_and_is_another_training():
    t = TASK.sized(chapter.EVERY)
    arms, left_out = chapter.every_arm(t, DATA)
    assert not left_out
    assert [a.name for a in arms] == [
        FULL,
        BANDS,
        S2D,
        RAW,
        STRIDED,
        LOW,
        PUSHED,
        PHASE,
        WIDE,
        READY,
        JOINT,
        STAGED,
    ]
    runs = measure(t, arms)[0]["arms"]
    assert len({h.steps for h in runs.values()}) == 1
    assert len({h.rows[-1]["loss"] for h in runs.values()}) == len(arms)
    assert all(runs[n].flops < runs[FULL].flops for n in (BANDS, LOW, PUSHED))
    assert runs[BANDS].flops < runs[PHASE].flops < runs[FULL].flops
    assert runs[WIDE].structure["widths"] == [16, 8, 8]


def test_only_the_width_tells_the_wider_stem_from_the_other():
    bands, wide = chapter.arms(TASK, DATA, (BANDS, WIDE))[1:]
    assert bands.methods == wide.methods


def test_study_judges_what_the_network_can_take():
    def names(preset, network=""):
        t = task(preset, "synthetic", network)
        return [a.name for a in chapter.arms(t, synthetic(images=64, channels=3, size=32))]

    assert names("study") == [FULL, BANDS, PHASE, WIDE, S2D]
    assert names("study", "torchvision.models:resnet18") == names("quick") == [FULL, BANDS, S2D]


def test_a_users_network_gets_the_arms_that_it_can_take():
    own = task("smoke", "synthetic", "torchvision.models:resnet18")
    found, left_out = chapter.every_arm(own, synthetic(images=64, channels=3, size=32))
    assert [a.name for a in found] == [FULL, BANDS, S2D, RAW, LOW, PUSHED]
    assert any("has a stride of 2 already" in s for s in left_out)


def test_a_network_without_a_stride_to_take_out_works_at_half_its_sizes():
    own = TASK.but(network="convnet", widths={"widths": (8,)})
    found, left_out = chapter.every_arm(own, DATA)
    assert [a.name for a in found] == [FULL, BANDS, S2D, RAW, STRIDED, LOW]
    assert "no layer of VGG has a stride of 2" in left_out[0]
    assert not found[1].methods[0].keep
