"""What chapter 3.4 trains: sampled products on a wide network, and a narrower one."""

import itertools

import pytest

from effilib.chapters import column_row_sampling as chapter
from effilib.experiment import check_arms
from effilib.methods.sampled_terms import blocks
from effilib.tasks import task


def test_the_study_judges_all_ratios_and_the_others_half():
    study, quick = (task(p, "synthetic").sized(chapter.SIZES) for p in ("study", "quick"))
    check_arms(study, chapter.arms(study))
    assert [m.ratio for a in chapter.arms(study) for m in a.methods] == [0.75, 0.5, 0.3]
    assert [a.role for a in chapter.arms(study)] == ["baseline", *["method"] * 3, *["control"] * 3]
    assert [a.role for a in chapter.arms(quick)] == ["baseline", "method", "control"]


@pytest.mark.parametrize("ratio", chapter.RATIOS)
def test_each_ratio_has_a_narrower_network_of_about_as_many_products(ratio):
    study = task("study", "synthetic").sized(chapter.SIZES)
    wide, narrow = (
        sum(a * b for a, b in itertools.pairwise(itertools.chain(*widths)))
        for widths in (study.widths["widths"], chapter.narrower(study, ratio)[0].network["widths"])
    )
    assert abs(narrow / wide - ratio) < 0.08


def test_the_judged_network_is_wide_and_the_control_has_about_half_of_its_products():
    study = task("study", "synthetic").sized(chapter.SIZES)
    assert [a.network for a in chapter.narrower(study)] == [{"widths": ((16,), (96,), (192, 192))}]
    own = task("study", "synthetic", "convnet").sized(chapter.SIZES)  # a user's network stays
    assert own.network == "convnet"
    assert not chapter.narrower(own)


@pytest.mark.parametrize("preset", chapter.WIDE)
def test_half_is_half_of_the_blocks_of_the_widest_layers(preset):
    widest = max(w for stage in chapter.WIDE[preset] for w in stage)
    method = chapter.SETTINGS[chapter.HALF]
    k, n, _ = blocks(method.ratio, widest, method.minimal, method.block)
    assert 2 * k == n


def test_the_grid_compares_at_equal_steps_and_has_no_two_arms_alike():
    for preset, count in (("quick", 3), ("study", 12)):
        t = task(preset, "synthetic", lengths=(1.0,))
        arms = chapter.grid(t)
        check_arms(t, arms)
        assert len({a.methods for a in arms}) == len(arms) == count
        assert {a.lengths for a in arms[1:]} == {t.lengths}
