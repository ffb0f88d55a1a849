"""What chapter 3.3 shows beyond its method."""

import pytest

from effilib.chapters import dynamic_fixed_point as chapter
from effilib.chapters.products import final_table, formats
from effilib.experiment import compare
from effilib.tasks import task

TASK = task("smoke", "synthetic", precision="fp32", epochs=1)


def test_the_case_by_hand():
    table = chapter.by_hand()
    assert table["I"].tolist() == ["2", "-5", "0", "3"]
    assert table["I 2^-scf"].tolist() == ["1", "-2.5", "0", "1.5"]


def test_only_exact_routes_are_called_exact():
    table = chapter.check_exact(16)
    assert table["wrong results"].iloc[:2].tolist() == ["0.0%", "0.0%"]
    assert all(float(v.rstrip("%")) > 10 for v in table["wrong results"].iloc[2:])


def test_the_overflow_is_caught_and_shown():
    table = chapter.overflow_table()
    assert set(table["one chain"]) == {"caught"}
    assert [int(v) for v in table["longest safe chain"]] == [2, 8, 32]
    for row in table.index:
        true, wrapped, chains = (
            int(table.loc[row, c].replace(",", ""))
            for c in ("true sum of 512", "in int32", "in safe chains, fp32 between")
        )
        assert wrapped != true
        assert chains == pytest.approx(true, rel=1e-6)


def test_errors_grow_as_bits_get_fewer():
    table = chapter.error_table(128)
    errors = [float(table.loc[f"DFP-{b}", "relative error"]) for b in chapter.BITS]
    assert errors == sorted(errors)
    assert float(table.loc["fp32", "relative error"]) < errors[0]


def test_gemms_and_layers_are_timed_in_every_arithmetic():
    table = chapter.gemm_table("smoke")
    integers = {
        f"{name}, {part}" for name in ("int8, 1 product", "int16, 4 products") for part in ("core", "whole")
    }
    assert {"fp32", *integers, *formats()} == set(table)
    table, times = chapter.layer_table("smoke")
    assert len(table) == len(formats()) + 2
    assert all(set(t) == {*formats(), "DFP-8", "DFP-14"} for t in times.values())
    figure, _ = chapter.parts_figure("smoke")
    assert "ms" in figure.axes[0].get_xlabel()


def test_the_arms_train_in_their_own_precision():
    assert [a.changes["precision"] for a in chapter.arms()] == ["fp32", "fp32", "bf16"]


def test_the_grid_shows_accuracy_over_bits(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFILIB_RESULTS", str(tmp_path))
    found = compare(TASK, chapter.grid("smoke"), quantity="time per step", seeds=1, illustration=True)
    losses = [found.histories(a.name)[0].rows[-1]["loss"] for a in found.arms]
    assert len(set(losses)) == len(losses)
    figure, caption = chapter.cliff_figure(found)
    assert figure.axes[0].get_xlabel() == "bits of an integer"
    assert "points at" in caption
    table = final_table(found, chapter.notes)
    assert table.loc["14 bits", "chains shortened"] == 0
    assert table.loc["fp32", "chains shortened"] == ""
    assert {a.methods[0].bits for a in chapter.grid("study") if a.methods} == {16, 14, 10, 8, 6, 5, 4}
