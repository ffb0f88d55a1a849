"""What chapter 3.2 shows beyond its method: the ladder, the ablation, and the numerics of 16 bits."""

import pandas as pd
import torch

from effilib.chapters import mixed_precision as chapter
from effilib.experiment import compare
from effilib.tasks import task
from effilib.training import can_compile, native_bf16

TASK = task("smoke", "synthetic", precision="fp32", epochs=1)
DATA = TASK.load()


def test_every_rung_of_the_ladder_keeps_what_the_one_before_it_brought():
    arms, left_out = chapter.ladder()
    assert (arms[0].name, arms[0].role) == ("fp32 NCHW", "baseline")
    assert arms[0].changes == {"precision": "fp32", "memory_format": "contiguous"}
    assert {a.changes["memory_format"] for a in arms[1:]} == {"channels_last"}
    assert any(a.changes["precision"] == "bf16" for a in arms) == native_bf16()
    assert any(a.changes.get("compile") for a in arms) == (not can_compile())
    assert len(left_out) == (not native_bf16()) + bool(can_compile())
    quick, why = chapter.ladder(compile=False)
    assert not any(a.changes.get("compile") for a in quick)
    assert why[-1].startswith("The compile rung is left out: ")


def test_updates_are_lost_below_half_a_spacing():
    table = chapter.lost_updates()
    assert [(f, k) for f in table for k in (7, 8, 10, 11, 23) if table.loc[f"2^-{k}", f] == "kept"] == [
        ("fp16", 7), ("fp16", 8), ("fp16", 10), ("bf16", 7), *(("fp32", k) for k in (7, 8, 10, 11, 23))
    ]  # fmt: skip


def test_scaling_is_shown_as_it_is():
    result = chapter.check_scaling(TASK.build(DATA), DATA)["result"]
    assert result.iloc[0] == "bit-equal"
    assert result.iloc[1].startswith("relative difference")
    assert result["a step that overflows at S = 2^40"] == "1 skipped; weights and momentum unchanged"
    assert result["S afterwards"] == "2^39"


def test_gradients_are_gathered_and_their_underflow_is_counted():
    gradients = chapter.gradient_magnitudes(TASK, DATA, epochs=0.5)
    model = TASK.build(DATA)
    assert gradients["weight gradients"].numel() == sum(p.numel() for p in model.parameters())
    assert gradients["activation gradients"].numel() > 0
    known = {"g": torch.tensor([0.0, 2.0**-30, 2.0**-30, 2.0**-10, 1.0])}
    table = chapter.underflow_table(known, scales=(1, 2**10, 2**17))
    assert table.loc["g: become 0"].tolist() == ["50.000%", "0.000%", "0.000%"]
    assert table.loc["g: overflow"].tolist() == ["0.000%", "0.000%", "25.000%"]
    figure, caption = chapter.underflow_figure(gradients)
    assert figure.axes[0].get_xlabel()
    assert "-25" in caption


def test_the_cost_table_compares_formats_with_the_first():
    table = chapter.cost_table(TASK, DATA)
    assert table.iloc[0]["its speed-up, forward + dX + dW"] == "1.00x"
    assert list(table["bytes a number"])[:2] == [4, 4]
    assert table["GFLOP a step"].nunique() == 1


def test_the_ablation_has_the_papers_four_arms_and_says_what_became_of_the_scale(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFILIB_RESULTS", str(tmp_path))
    found = compare(TASK, chapter.ablation(), quantity="time per step", seeds=1, illustration=True)
    assert len(found.arms) == 4
    losses = [found.histories(a.name)[0].rows[-1]["loss"] for a in found.arms]
    assert len(set(losses)) == 4  # four arms that differ
    events = chapter.scaling_events(found)["loss scale"]
    assert events["fp32"] == ""
    assert events["fp16 + master + loss scaling"].startswith("S ended at 65536, 0 steps were skipped")
    figure, caption = chapter.ablation_figure(found)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == [a.name for a in found.arms]
    assert "one seed" in caption
    assert chapter.say_ablation(found).endswith("(n=1).")


def test_the_ladder_and_the_ablation_are_as_long_as_their_preset_allows():
    study = task("study", "synthetic", epochs=15)
    assert chapter.ladder_task(study).recipe.epochs == 8
    assert chapter.ladder_task(study.but(epochs=3)).recipe.epochs == 3
    assert chapter.ladder_task(TASK) is TASK
    assert (chapter.ablation_task(study).recipe.epochs, chapter.ablation_task(study).recipe.precision) == (
        4,
        "fp32",
    )
    assert chapter.ablation_task(study).target is None
    assert chapter.ablation_task(TASK.but(epochs=4)).recipe.epochs == 2


def test_a_step_is_timed_over_widths():
    scan = chapter.width_scan(TASK, DATA)
    assert list(scan.index) == ["8/8/8"]
    assert list(scan)[:2] == ["fp32 NCHW", "fp32 channels_last"]
    assert (scan > 0).all(axis=None)
    twice = pd.DataFrame({"fp32 NCHW": {"8": 2.0, "16": 6.0}, "bf16": {"8": 1.0, "16": 2.0}})
    figure, caption = chapter.width_figure(twice)
    assert "2.00x at 8, 3.00x at 16" in caption
    assert figure.axes[0].lines[1].get_ydata().tolist() == [2.0, 3.0]
