"""What chapter 3.4 trains, and what it shows of sampled products."""

import pytest

from effilib.chapters import column_row_sampling as chapter
from effilib.experiment import check_arms
from effilib.tasks import task
from effilib.timing import formats

TASK = task("smoke", "synthetic", epochs=1).sized(chapter.SIZES)
DATA = TASK.load()


def test_the_case_by_hand_leaves_the_smallest_term_out():
    table = chapter.by_hand()
    assert table.loc["A B", "matrix"] == "[[6, 2], [1, 4]]"
    assert table.loc["the two largest", "matrix"] == "[[6, 2], [1, 1]]"
    assert table.loc["left out", "matrix"] == table.loc["term 3", "matrix"] == "[[0, 0], [0, 3]]"


def test_errors_fall_to_nothing_with_all_terms_and_topk_is_best_without_a_mean():
    curves = chapter.error_curves("smoke")
    assert set(curves) == {"N(1, 1)", "N(0, 1)"}
    for ks, errors in curves.values():
        assert ks[-1] == 100
        for name in ("top-k", "norm, no replacement, unscaled", "uniform, no replacement, unscaled"):
            assert errors[name][-1] < 1e-5
            assert errors[name][0] > 0.01
    zero_mean = curves["N(0, 1)"][1]
    assert all(zero_mean["top-k"][1] <= e[1] for e in zero_mean.values())
    figure, _ = chapter.error_figure(curves)
    assert len(figure.axes) == 2


def test_estimates_agree_with_the_formulas():
    table = chapter.check_estimates(400)
    for name in table.index[:3]:
        assert float(table.loc[name, "mean squared error"]) == pytest.approx(
            float(table.loc[name, "by formula"]), rel=0.2
        )
    assert table.loc["top-k", "of an unbiased one, root mean square"] == "biased"


def test_the_fast_path_is_the_slow_one():
    table = chapter.check_products()
    assert all(float(table.loc[p, "fast against slow"]) < 1e-10 for p in ("y", "dX", "dW"))
    assert all(float(table.loc[p, "against the exact product"]) > 0.1 for p in ("y", "dX", "dW"))
    assert table.loc["y with all channels", "against the exact product"] == "bit-equal"


def test_layers_and_steps_are_timed_in_every_format():
    table = chapter.layer_table(TASK, DATA)
    assert all(f"{p}, x" in table for p in formats())
    table = chapter.step_table(TASK, DATA)
    assert len(table) == 4 * len(formats())
    assert (table.loc[[f"{p}, 100%" for p in formats()], "x"] == 1).all()
    figure, _ = chapter.step_figure(table)
    assert len(figure.axes[0].lines) >= 2 * len(formats())


def test_the_judged_network_is_wide_and_the_control_has_about_half_of_its_products():
    study = task("study", "synthetic").sized(chapter.SIZES)
    arms = chapter.arms(study)
    check_arms(study, arms)
    assert [m.ratio for a in arms for m in a.methods] == [0.5]
    assert [a.network for a in arms if a.role == "control"] == [{"widths": ((16,), (96, 96), (192, 192))}]
    own = task("study", "synthetic", "convnet").sized(chapter.SIZES)  # a user's network stays
    assert own.network == "convnet"
    assert not chapter.narrower(own)


def test_the_grid_compares_at_equal_steps_and_has_no_two_arms_alike():
    for preset, count in (("quick", 4), ("study", 7)):
        t = task(preset, "synthetic", lengths=(1.0,))
        arms = chapter.grid(t)
        check_arms(t, arms)
        assert len({a.methods for a in arms}) == len(arms) == count
        assert {a.lengths for a in arms[1:]} == {t.lengths}
