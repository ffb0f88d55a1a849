"""What chapter 3.4 shows beyond its method."""

import pytest

from effilib.chapters import column_row_sampling as chapter
from effilib.chapters.products import formats, wide
from effilib.experiment import compare
from effilib.tasks import task

TASK = wide(task("smoke", "synthetic", epochs=1)).but(epochs=1)
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
    assert all(f"{p}, speed-up" in table for p in formats())
    table, times = chapter.step_table(TASK, DATA)
    assert len(table) == 4 * len(formats())
    figure, caption = chapter.step_figure(times)
    assert figure.axes[0].get_xlabel()
    assert ("both:" in caption) == (len(formats()) > 1)


def test_the_arms_have_the_ratios_and_a_control_with_about_half_of_the_products(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFILIB_RESULTS", str(tmp_path))
    study = chapter.arms(wide(task("study", "mnist5k")))
    assert [m.ratio for a in study for m in a.methods] == [0.75, 0.5, 0.3]
    assert study[-1].role == "control"
    assert chapter.narrower(wide(task("study", "mnist5k")))["widths"] == ((16,), (96, 96), (192, 192))
    assert chapter.arms(TASK.but(network="convnet", widths={}))[
        -1
    ].changes  # of a user's network: fewer epochs
    runs = compare(TASK, chapter.arms(TASK), quantity="time per step", seeds=1)
    table = chapter.statistics_table(runs)
    assert list(table.index) == ["top-k, 50% of the channels"]
    names = [a.name for a in chapter.grid(wide(task("study", "mnist5k")))]
    assert len(names) == len(set(names)) == 5
