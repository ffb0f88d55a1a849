"""The series of chapters, and what was recorded of them."""

import importlib.util
import json

import pandas as pd
import pytest

from effilib import methods, paths
from effilib.workbook import series
from effilib.workbook.series import ATTACKS, CHAPTERS, chapter, recorded


def test_chapters_stand_in_the_order_of_the_thesis_with_names_of_their_own():
    stems = [c.stem for c in CHAPTERS]
    assert stems == sorted(stems)
    assert len(set(stems)) == len(stems) == 20
    assert len({c.number for c in CHAPTERS}) == len(CHAPTERS)
    assert stems[0] == "02_overview"
    assert stems[-1] == "11_speed_run"
    assert all(c.title and c.title_de for c in CHAPTERS)


def test_every_method_says_which_factor_of_time_it_attacks():
    assert {c.attacks for c in CHAPTERS if c.module} <= set(ATTACKS)
    assert all(bool(c.module) == bool(c.attacks) for c in CHAPTERS)


@pytest.mark.parametrize("c", CHAPTERS, ids=lambda c: c.number)
def test_a_chapters_information_is_its_modules_or_none(c):
    written = bool(c.module) and importlib.util.find_spec(f"effilib.methods.{c.module}") is not None
    assert isinstance(c.info, methods.Info) == written
    if written:
        assert c.info.chapter == c.number
        assert [k for k, v in vars(c.info).items() if not v] == []


def test_notebooks_and_chapters_are_one_to_one():
    there = {p.stem for p in paths.notebooks().glob("*.ipynb")}
    assert {c.stem for c in CHAPTERS if c.exists} == there & {c.stem for c in CHAPTERS}
    assert there <= {c.stem for c in CHAPTERS}


def test_a_users_own_notebook_has_a_chapter_too():
    own = chapter("12_my_idea")
    assert (own.number, own.title, own.info, own.exists) == ("12", "12 my idea", None, False)
    assert chapter("03_2_mixed_precision").title_de == "Halbierung der Bits"


HEAD = {
    "arm": "bf16",
    "against": "fp32",
    "ratio": 1.7,
    "low": 1.5,
    "high": 1.9,
    "n": 5,
    "lengths": 3,
    "p": 0.001,
}
HEAD |= {"kind": "gap", "range": [70.0, 75.0], "cost": "seconds", "verdict": "faster"}
HEAD |= {"text": "1.70x [1.50, 1.90] at 70-75 %, n=5x3, 2-core CPU"}
OLD = {
    "arm": "bf16",
    "against": "fp32",
    "quantity": "time per step",
    "ratio": 1.7,
    "low": 1.5,
    "high": 1.9,
    "n": 5,
}
OLD |= {"text": "1.70x [1.50, 1.90], n=5 pairs, 2-core CPU", "verdict": "faster at equal accuracy"}


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "recorded", lambda: tmp_path)

    def write(folder, **content):
        place = tmp_path / folder / content.get("notebook", "x")
        place.mkdir(parents=True)
        preset, dataset = folder.split("-") if "-" in folder else ("", "")
        known = {
            "schema": 2,
            "status": "complete",
            "date": "2026-01-01",
            "preset": preset,
            "dataset": dataset,
        }
        (place / "record.json").write_text(json.dumps(known | content))
        return place

    return write


def test_recorded_finds_whole_records_newest_last(results, tmp_path):
    new = results("study-cifar10", notebook="02_overview", date="2026-03-01")
    old = results("study-fashion_mnist", notebook="02_overview", date="2026-02-01")
    results("quick-mnist5k", notebook="03_1_convolution_cost", status="running")
    results("tuning", notebook="10_comparison")
    (tmp_path / "study-x" / "y").mkdir(parents=True)
    (tmp_path / "study-x" / "y" / "record.json").write_text('{"status": "comp')
    found = recorded()
    assert list(found) == ["02_overview"]
    assert [r["folder"] for r in found["02_overview"]] == [old, new]


def test_the_new_protocol_comes_before_the_old_and_study_before_quick(results):
    name = {"notebook": "06_1_prune_train", "headline": HEAD}
    quick = results("quick-mnist5k", **name, date="2026-05-01")
    study = results("study-mnist5k", **name, date="2026-02-01")
    old = results("study-cifar10", notebook=name["notebook"], headline=OLD, schema=1, date="2026-06-01")
    assert [r["folder"] for r in recorded()["06_1_prune_train"]] == [old, quick, study]


def test_nothing_recorded_is_no_error(results):
    assert recorded() == {}
    assert series.headlines() == []
    assert len(series.runs()) == 0


def test_the_readmes_table_has_a_row_for_every_chapter(results):
    results("study-cifar10", notebook="03_2_mixed_precision", headline=HEAD)
    results("study-cifar10", notebook="06_1_prune_train", headline=OLD, schema=1)
    results("study-fashion_mnist", notebook="02_overview", headline=None)
    table = series.readme_table().splitlines()
    assert table[-1].startswith("*older protocol*: ")
    table = table[:-2]
    assert len(table) == 2 + len(CHAPTERS)
    assert len({row.count("|") for row in table}) == 1
    by_number = {row.split(" | ")[0].strip("| "): row.split(" | ")[-1] for row in table}
    assert by_number["3.2"] == "1.70x [1.50, 1.90] at 70-75 %, n=5x3, 2-core CPU: faster |"
    assert by_number["6.1"] == "older protocol |"
    assert by_number["2"].strip(" |") == ""
    readme = "# effilib\n<!-- chapters -->\nold\n<!-- /chapters -->\nend\n"
    once = series.with_table(readme)
    assert once == series.with_table(once)
    assert "old\n" not in once
    assert once.startswith("# effilib\n<!-- chapters -->\n| chapter")
    assert once.endswith("<!-- /chapters -->\nend\n")


def test_the_readmes_answer_is_the_record_of_chapter_10_and_of_no_older_protocol(results):
    results("study-cifar10", notebook="10_comparison", headline=OLD, schema=1)
    assert series.answer().endswith("is not measured yet under the present protocol.*")
    best = HEAD | {"arm": "resizing + whitening stem", "aim": 1.8, "aim_verdict": "not decided"}
    others = [("resizing", 1.4, "faster"), ("PruneTrain", 0.7, "slower"), ("whitening stem", 1.5, "faster")]
    verdicts = [best, *(HEAD | dict(zip(("arm", "ratio", "verdict"), row, strict=True)) for row in others)]
    results(
        "study-fashion_mnist", notebook="10_comparison", headline=best, verdicts=verdicts,
        machine={"summary": "2-core CPU"},
    )  # fmt: skip
    assert series.answer().split("  \n") == [
        "**On my 2-core CPU: resizing + whitening stem, faster.**",
        "1.70x [1.50, 1.90] at 70-75 %, n=5x3, 2-core CPU, on fashion_mnist (aim 1.8x: not decided).",
        "Faster by themselves: whitening stem 1.50x, resizing 1.40x.",
    ]


def test_headlines_are_one_of_every_chapter_that_has_one(results):
    results("study-cifar10", notebook="06_1_prune_train", headline=HEAD, date="2026-02-01")
    newer = HEAD | {"ratio": 2.0}
    results("study-fashion_mnist", notebook="06_1_prune_train", headline=newer, date="2026-03-01")
    results("quick-mnist5k", notebook="03_2_mixed_precision", headline=HEAD)
    results("study-cifar10", notebook="02_overview", headline=None)
    assert [(h["chapter"], h["dataset"], h["ratio"]) for h in series.headlines()] == [
        ("3.2", "mnist5k", 1.7),
        ("6.1", "fashion_mnist", 2.0),
    ]


def test_holms_correction_is_over_what_was_measured_by_this_protocol(results):
    ps = {"03_2": 0.01, "03_3": 0.03, "03_4": 0.04, "04_1": None}
    stems = [c.stem for c in CHAPTERS]
    for begin, p in ps.items():
        (stem,) = [s for s in stems if s.startswith(begin)]
        results("study-cifar10", notebook=stem, headline=HEAD | {"p": p})
    for begin in ("05_1", "05_2", "06_1"):  # would make the correction stricter
        (stem,) = [s for s in stems if s.startswith(begin)]
        results("study-cifar10", notebook=stem, headline=OLD, schema=1)
    withheld = HEAD | {"verdict": "stalls: 9 % of the time of fp32 were taken off"}
    results("study-cifar10", notebook="06_2_net2net", headline=withheld)
    rows = series.headlines()
    assert [row["survives"] for row in rows] == [True, False, False, None, None, None, None, None]
    assert [row["older"] for row in rows] == [False] * 4 + [True] * 3 + [False]
    old = rows[4]
    assert (old["verdict"], old["text"], old["p"]) == ("older protocol", "1.70x [1.50, 1.90]", None)


def test_no_difference_and_undecided_are_tests_that_never_survive():
    words = "faster: at least 2.00x", "no difference", "undecided", "depends on the budget: ...", "smoke: ..."
    rows = [dict(verdict=word, p=0.001) for word in words]
    series.mark_survivors(rows)
    assert [row["survives"] for row in rows] == [True, False, False, True, None]


def test_all_runs_stand_in_one_table_with_their_environment(results, tmp_path):
    machine = {"summary": "2-core CPU", "device": "AMD EPYC", "threads": 2, "torch": "2.14.1"}
    history = "comparison,arm,role,seed,length,step,seconds,accuracy,flops,images\n"
    for folder, notebook, schema in (
        ("study-cifar10", "03_2_mixed_precision", 2),
        ("study-cifar10", "06_2_net2net", 1),
    ):
        place = results(
            folder, notebook=notebook, schema=schema, machine=machine, network="resnet", commit="abc"
        )
        (place / "history.csv").write_text(f"{history}runs,bf16,method,0,0.5,10,1.5,70.25,1e9,640\n")
    results("study-cifar10", notebook="02_overview", headline=None)  # nothing was trained
    assert series.update_runs() == tmp_path / "all.csv"
    (row,) = pd.read_csv(tmp_path / "all.csv").to_dict("records")
    assert row == {
        "notebook": "03_2_mixed_precision", "preset": "study", "dataset": "cifar10", "network": "resnet",
        "machine": "AMD EPYC", "threads": 2, "torch": "2.14.1", "commit": "abc", "date": "2026-01-01",
        "comparison": "runs", "arm": "bf16", "role": "method", "seed": 0, "length": 0.5, "step": 10,
        "seconds": 1.5, "accuracy": 70.25, "flops": 1e9, "images": 640,
    }  # fmt: skip


def test_the_picture_is_drawn_anew_when_results_change_and_only_then(results, tmp_path):
    assert not series.update_picture()  # nothing recorded, nothing drawn
    assert list(tmp_path.iterdir()) == []
    results("study-cifar10", notebook="03_2_mixed_precision", headline=HEAD)
    assert series.update_picture()
    once = series.picture().read_bytes()
    assert once.startswith(b"\x89PNG")
    assert not series.update_picture()
    results("study-fashion_mnist", notebook="06_1_prune_train", headline=OLD, schema=1)
    assert series.update_picture()
    assert series.picture().read_bytes() != once
    paths.write(series.picture(), b"damaged")
    assert series.update_picture()
