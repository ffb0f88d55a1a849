"""What chapter 3.3 trains, and what it shows of integer products."""

import pytest

from effilib.chapters import dynamic_fixed_point as chapter
from effilib.experiment import check_arms
from effilib.tasks import task
from effilib.timing import formats


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


def test_layers_are_timed_in_every_arithmetic():
    table = chapter.layer_table("smoke")
    assert {how for _, how in table.index} == {*formats(), "DFP-8", "DFP-14"}
    assert (table.xs("fp32", level=1)["x over fp32"] == 1).all()


def test_all_arms_take_the_same_steps_in_their_own_precision():
    t = task("quick", "synthetic")
    assert [a.changes["precision"] for a in chapter.arms(t)] == ["fp32", "fp32", "bf16"]
    for arms in (chapter.arms(t), chapter.grid(t)):
        check_arms(t, arms)
        assert {a.lengths for a in arms[1:]} == {t.lengths}
    study = chapter.grid(task("study", "synthetic"))
    assert {a.methods[0].bits for a in study if a.methods} == {16, 14, 10, 8, 6, 5, 4}
