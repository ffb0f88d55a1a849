"""The series of chapters, and what was recorded of them."""

import importlib.util
import json

import pytest

from effilib import methods, paths
from effilib.workbook import series
from effilib.workbook.series import ATTACKS, CHAPTERS, chapter, recorded


def test_chapters_stand_in_the_order_of_the_thesis_with_names_of_their_own():
    stems = [c.stem for c in CHAPTERS]
    assert stems == sorted(stems)
    assert len(set(stems)) == len(stems) == 19
    assert len({c.number for c in CHAPTERS}) == len(CHAPTERS)
    assert stems[0] == "02_overview"
    assert stems[-1] == "10_comparison"
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
        assert all(vars(c.info).values())


def test_notebooks_and_chapters_are_one_to_one():
    there = {p.stem for p in paths.notebooks().glob("*.ipynb")}
    assert {c.stem for c in CHAPTERS if c.exists} == there & {c.stem for c in CHAPTERS}
    assert there <= {c.stem for c in CHAPTERS}


def test_a_users_own_notebook_has_a_chapter_too():
    own = chapter("11_my_idea")
    assert (own.number, own.title, own.info, own.exists) == ("11", "11 my idea", None, False)
    assert chapter("03_2_mixed_precision").title_de == "Halbierung der Bits"


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "recorded", lambda: tmp_path)

    def write(folder, **content):
        place = tmp_path / folder / content.get("notebook", "x")
        place.mkdir(parents=True)
        (place / "record.json").write_text(
            json.dumps({"status": "complete", "date": "2026-01-01", **content})
        )
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


def test_nothing_recorded_is_no_error(results):
    assert recorded() == {}


def test_the_readmes_table_has_a_row_for_every_chapter(results):
    results(
        "study-cifar10",
        notebook="03_2_mixed_precision",
        headline={"text": "2.10x", "verdict": "faster at equal accuracy"},
    )
    results("study-fashion_mnist", notebook="02_overview", headline=None)
    table = series.readme_table().splitlines()
    assert len(table) == 2 + len(CHAPTERS)
    assert len({row.count("|") for row in table}) == 1
    assert [row for row in table if "2.10x: faster at equal accuracy" in row and "Mixed precision" in row]
    readme = "# effilib\n<!-- chapters -->\nold\n<!-- /chapters -->\nend\n"
    once = series.with_table(readme)
    assert once == series.with_table(once)
    assert "old" not in once
    assert once.startswith("# effilib\n<!-- chapters -->\n| chapter")
    assert once.endswith("<!-- /chapters -->\nend\n")


HEAD = {
    "arm": "bf16",
    "against": "fp32",
    "quantity": "time per step",
    "ratio": 1.7,
    "low": 1.5,
    "high": 1.9,
    "n": 5,
}
HEAD |= {"text": "1.70x [1.50, 1.90], n=5 pairs, 2-core CPU", "verdict": "faster at equal accuracy"}


def test_headlines_are_the_newest_of_every_chapter_that_has_one(results):
    results("study-cifar10", notebook="06_1_prune_train", headline=HEAD, dataset="cifar10", date="2026-02-01")
    results(
        "study-fashion_mnist",
        notebook="06_1_prune_train",
        headline=HEAD | {"ratio": 2.0},
        dataset="fashion_mnist",
        date="2026-03-01",
    )
    results("quick-mnist5k", notebook="03_2_mixed_precision", headline=HEAD, dataset="mnist5k")
    results("study-cifar10", notebook="02_overview", headline=None)
    assert [(h["chapter"], h["dataset"], h["ratio"]) for h in series.headlines()] == [
        ("3.2", "mnist5k", 1.7),
        ("6.1", "fashion_mnist", 2.0),
    ]


def test_the_picture_is_drawn_anew_when_results_change_and_only_then(results, tmp_path):
    assert not series.update_picture()  # nothing recorded, nothing drawn
    assert list(tmp_path.iterdir()) == []
    results("study-cifar10", notebook="03_2_mixed_precision", headline=HEAD)
    assert series.update_picture()
    once = series.picture().read_bytes()
    assert once.startswith(b"\x89PNG")
    assert not series.update_picture()
    results("study-fashion_mnist", notebook="06_1_prune_train", headline=HEAD)
    assert series.update_picture()
    assert series.picture().read_bytes() != once
    paths.write(series.picture(), b"damaged")
    assert series.update_picture()
