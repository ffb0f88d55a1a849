"""Pages are read back as a browser would: parsed, and where there is a Chromium, rendered."""

import base64
import html as markup
import io
import re
import subprocess
import sys
from urllib.parse import urlparse

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from effilib import paths, statistics
from effilib.errors import BadInput
from effilib.workbook import records, report
from effilib.workbook.formulas import hide_formulas, mathml
from tests.browser import complaints, keep

PICTURE = "data:image/png;base64,"
NASTY = '<script>alert(1)</script> & <b>"bold"</b> \''

PROSE = r"""# 3.2 Mixed precision

It costs \$5, in code `$HOME` and `a_b_c`; see [cost](03_1_convolution_cost.ipynb) and [arXiv](https://arxiv.org/abs/1710.03740).

Inline $w_t * x_t$ and \(\lVert w \rVert_2\), a table:

| norm | value |
|---|---|
| $|x|_2$ | $2^{-11}$ |

$$
\begin{aligned}
a_1 &= b_1 * c_1 \\
a_2 &= \hat{b}_2
\end{aligned}
$$

```python
price = "$5" + "$6"
```

![remote](https://example.org/picture.png) <script src="https://example.org/x.js"></script>
"""

REMOTE = """<style>@import "https://example.org/a.css"; p {background: url(https://example.org/b.png)}</style>
<script>alert(1)</script><iframe src="https://example.org"></iframe><a href="javascript:alert(1)">link</a>
<img src="https://example.org/c.png" onerror="alert(1)"><b style="background: url(https://example.org/d.png)">kept</b>"""


# Sample data


def verdict(word="faster", ratio=1.34, **changes):
    low, high = (None, None) if ratio is None else (ratio * 0.96, ratio * 1.04)
    row = {"arm": "method", "against": "baseline", "ratio": ratio, "low": low, "high": high, "kind": "gap"}
    row |= {"n": 5, "lengths": 3, "range": None if ratio is None else [78.2, 86.1], "cost": "seconds"}
    row |= {"points": -0.1, "points_low": -0.4, "points_high": 0.2, "p": None if ratio is None else 0.001}
    row |= {
        "verdict": word,
        "aim": 1.2,
        "aim_verdict": "met",
        "text": "the text",
        "notes": ["about 7 cells would decide"],
    }
    return row | changes


OLD = {"ratio": 1.5, "low": 1.4, "high": 1.6, "n": 5, "quantity": "time to target", "claim_reproduced": "yes"}
OLD |= {
    "verdict": "faster but less accurate",
    "accuracy_difference": -4.9,
    "text": "1.50x [1.40, 1.60], n=5 pairs",
}


@pytest.fixture(autouse=True)
def nothing_recorded(tmp_path_factory, monkeypatch):
    """What is recorded stands beside new results: here only what a test puts there."""
    place = tmp_path_factory.mktemp("recorded")
    monkeypatch.setattr(paths, "recorded", lambda: place)
    return place


def record(name, headline, **changes):
    chapter = records.from_name(name)["chapter"]
    text = {
        "notebook": name,
        "chapter": chapter,
        "title": f"Title of {name}",
        "title_de": "Überschrift",
        "paper": "A. Author 2019",
    }
    text |= {
        "claim": "Training takes half the time.",
        "preset": "quick",
        "dataset": "mnist5k",
        "network": "resnet",
        "caption": "What it shows.",
    }
    rest = {
        "machine": {"summary": "2-core CPU"},
        "commit": "abc1234",
        "date": "2026-11-24T04:00:00+00:00",
        "duration_s": 43.1,
    }
    rest |= {
        "headline": headline,
        "verdicts": [headline] if headline else [],
        "notes": [],
        "shared_machine": False,
    }
    return {"schema": 2, "status": "complete", **text, **rest, **changes}


def put(folder, name, content=None, run=None, figure=True, page=True):
    """One notebook's folder, as the runner leaves it. Text is written as it is, so that it can be damaged."""
    place = folder / name
    place.mkdir(parents=True)
    for file, value in (("record.json", content), ("run.json", run)):
        if value is not None:
            paths.write(place / file, value)
    if figure:
        Image.new("RGBA", (1000, 600), (0, 90, 200, 128)).save(place / "figure.png")
    if page:
        paths.write(place / "report.html", "<p>report</p>")
    return place


def soup(path):
    return BeautifulSoup(path.read_text(), "html.parser")


def assert_self_contained(path):
    """Nothing on the page runs, and nothing is loaded from elsewhere: only links that a person clicks lead
    away.
    """
    page = soup(path)
    assert not page(["script", "iframe", "object", "embed", "link", "base"])
    for element in page.find_all(True):
        assert not [name for name in element.attrs if name.startswith("on")]
        for name in ("src", "srcset", "href", "xlink:href", "poster", "data", "background"):
            if name in element.attrs and element.name != "a":
                assert element[name].startswith(("data:", "#")), element
    styles = [style.string for style in page("style")] + [
        element["style"] for element in page.select("[style]")
    ]
    assert not [css for css in styles if "@import" in css or re.search(r"url\((?!['\"]?(data:|#))", css)]
    assert (
        "default-src 'none'" in page.find("meta", attrs={"http-equiv": "Content-Security-Policy"})["content"]
    )


# Formulas


@pytest.mark.parametrize(
    ("latex", "parts"),
    [
        (r"\frac{1}{k}", ["<mfrac>"]),
        (r"\text{time to target}", ["<mtext>time\xa0to\xa0target</mtext>"]),
        (r"\lVert x \rVert", ["‖</mo>", 'lspace="0"']),
        (r"\bigl\lVert x \bigr\rVert", ["‖</mo>"]),
        (r"\mathbb{E}[X]", ["<mi>\U0001d53c</mi>"]),
        (r"\mathbb 1_{x>0}", ["\U0001d7d9", "&gt;"]),
        (r"a \odot b", ["⊙"]),
        (r"\hat{y}", ["<mover", "^"]),
        (r"\operatorname{softmax}(z)", ["<mtext>softmax</mtext>"]),
        (r"\operatorname*{arg\,max}_x f", ["arg\u2009max"]),
        (r"x \sim \mathcal{N}(0, 1)", ["\u223c"]),
        (r"\overline{xy}", ['class="overline"']),
        (r"\log x", ['<mi class="function">log</mi>']),
        (r"a < b \label{eq:1}", ["&lt;"]),
        (r"\begin{aligned} a &= b \\ c &= d \end{aligned}", ["<mtable", 'columnalign="right"']),
        (r"\begin{align} a &= b \\ c &= d \end{align}", ["<mtable"]),
        (r"\begin{gathered} a = b \\ c = d \end{gathered}", ["<mtable"]),
        (r"\begin{cases} a & x > 0 \\ 0 & \text{else} \end{cases}", ["<mtable", "{"]),
    ],
)
def test_formula_becomes_mathml(latex, parts):
    html = mathml(latex)
    assert html.startswith("<math")
    for part in parts:
        assert part in html
    assert "\\" not in re.sub('alttext="[^"]*"', "", html)


def test_display_puts_limits_below():
    html = mathml(r"\sum_{i=1}^n x_i + \max_w f", display=True)
    assert 'display="block"' in html
    assert "<munderover>" in html
    assert "<munder>" in html


@pytest.mark.parametrize(
    "latex",
    [r"\unknownmacro{x}", r"\frac{a", r"x_", r"\left( x", "", r"\text{<img src=x>}", r"a & b", r"a \\ b"],
)
def test_formula_not_understood_is_shown_as_code(latex):
    assert mathml(latex) == f'<code class="latex">{markup.escape(latex)}</code>'


# One report


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """A notebook that was really executed: a figure, a wide table, a warning, markup in an output and an
    error.
    """
    cells = [
        new_markdown_cell(PROSE),
        new_code_cell('preset = ""', metadata={"tags": ["parameters"]}),
        new_code_cell("%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"),
        new_code_cell(
            "import pandas\npandas.DataFrame([range(40)], columns=[f'quantity {i}' for i in range(40)])"
        ),
        new_code_cell("import warnings\nwarnings.warn('a warning')\nprint('plain \\x1b[31mred\\x1b[0m <b>')"),
        new_code_cell(
            "from IPython.display import HTML, Javascript, Math\n"
            "display(Math(r'\\frac{a}{b}'), Javascript('alert(1)'))"
        ),
        new_code_cell(f"HTML({REMOTE!r})"),
        new_code_cell("secret = 1", metadata={"tags": ["remove-input"]}),
        new_code_cell("1 / 0"),
    ]
    notebook = new_notebook(
        cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    )
    NotebookClient(notebook, allow_errors=True).execute()
    path = tmp_path_factory.mktemp("executed") / "notebook.ipynb"
    nbformat.write(notebook, path)
    return path


@pytest.fixture
def rendered(executed, tmp_path_factory):
    page = tmp_path_factory.mktemp("quick-mnist5k") / "03_2_mixed_precision" / "report.html"
    page.parent.mkdir()
    content = record(
        "03_2_mixed_precision",
        verdict(),
        verdicts=[verdict(), verdict("slower", 0.7)],
        notes=["No compiler was found."],
    )
    assert report.render(executed, page, record=content) == page
    return page


def test_report_is_self_contained(rendered):
    assert_self_contained(rendered)
    page = soup(rendered)
    assert page.find("figure").img["src"].startswith(PICTURE)
    assert "kept" in page.get_text()
    assert "picture https://example.org/c.png" in page.get_text()  # named, not silently dropped
    assert page.find("a", string="arXiv")["href"] == "https://arxiv.org/abs/1710.03740"
    assert page.find("a", string="cost")["href"] == "../03_1_convolution_cost/report.html"
    assert page.nav.a["href"] == "../index.html"


def test_report_formulas_and_code(rendered):
    page = soup(rendered)
    assert len(page("math")) == 6  # two inline, two in the table, one display, one output
    code = [element.get_text() for element in page("code")]
    assert "$HOME" in code
    assert "a_b_c" in code
    assert 'price = "$5" + "$6"' in page.get_text()
    assert "It costs $5" in page.get_text()
    assert not re.search("[\ue000\ue001]", rendered.read_text())


def test_report_header(rendered):
    page = soup(rendered)
    assert page.h1.get_text(" ", strip=True) == "3.2 Title of 03_2_mixed_precision Überschrift"
    assert len(page("h1")) == 1
    header = page.header.get_text(" ", strip=True)
    for part in ("mnist5k", "quick", "2-core CPU", "2026-11-24 04:00 UTC", "No compiler was found."):
        assert part in header
    for part in ("faster", "1.34x [1.29, 1.39]", "at 78–86 % accuracy", "n = 5 × 3", "slower", "0.70x"):
        assert part in header
    for part in (
        "aim 1.2x: met",
        "−0.10 points [−0.40, +0.20] at equal time",
        "method against baseline",
        "about 7 cells would decide",
    ):
        assert part in header
    assert len(page.select(".verdicts svg")) == 2


def test_report_outputs(rendered):
    page = soup(rendered)
    assert "\x1b" not in rendered.read_text()
    assert "plain red <b>" in page.get_text()
    assert page.select_one("div.scroll > table.dataframe")
    assert "a warning" in page.select_one(".stderr").get_text()
    assert page.select_one(".error strong").get_text() == "ZeroDivisionError"
    assert "secret" not in page.get_text()
    assert page.select_one("details.small")["open"] == ""
    assert not page.select_one(".banner")


def test_failure_stands_on_top(executed, tmp_path):
    page = soup(report.render(executed, tmp_path / "report.html", failure=f"cell 9 raised {NASTY}"))
    assert NASTY in page.select_one("header .banner").get_text()
    assert page.select_one(".banner a")["href"] == "#failing-cell"
    assert page.select_one("#failing-cell strong").get_text() == "ZeroDivisionError"
    assert "Mixed precision" in page.h1.get_text()  # from the notebook, as there is no record


def test_a_failed_runs_report_beside_a_complete_one_leads_back(executed, tmp_path):
    page = soup(
        report.render(
            executed, paths.make(tmp_path / "failed" / "03_2_x") / "report.html", failure="kernel died"
        )
    )
    assert page.nav.a["href"] == "../../index.html"
    assert page.find("a", string="cost")["href"] == "../../03_1_convolution_cost/report.html"


def test_code_and_money_are_no_formulas():
    formulas = []
    for text in (
        "`$x$`",
        "``a ` $x$``",
        "```\n$x$\n```",
        "~~~sh\necho $A $B\n~~~",
        r"\$5 and \$6",
        "$5 and $6",
        "from $5 to `$x`",
        "a $ b $ c",
    ):
        assert hide_formulas(text, formulas) == text
    assert not formulas
    assert (
        hide_formulas("a ` b\n\n$x$ and $y$ ` c", formulas) == "a ` b\n\n\ue0000\ue001 and \ue0001\ue001 ` c"
    )


def test_formula_source_stays_in_indented_code(tmp_path):
    nbformat.write(
        new_notebook(
            cells=[new_markdown_cell("text\n\n    print('$a<b$')\n\n$a_b$ and [$c$](x.html '$d$')")]
        ),
        tmp_path / "n.ipynb",
    )
    page = soup(report.render(tmp_path / "n.ipynb", tmp_path / "report.html"))
    assert "print('$a<b$')" in page.pre.get_text()
    assert [math["alttext"] for math in page("math")] == ["a_b", "c"]
    assert page.main.a["title"] == "$d$"


def test_failure_without_a_readable_notebook(tmp_path):
    damaged = paths.write(tmp_path / "notebook.ipynb", '{"cells": [')
    for notebook in (damaged, tmp_path / "missing.ipynb"):
        page = soup(report.render(notebook, tmp_path / "report.html", failure="kernel died"))
        assert "kernel died" in page.select_one(".banner").get_text()
        with pytest.raises(BadInput, match=f"cannot read the notebook .*{notebook.name}"):
            report.render(notebook, tmp_path / "report.html")


def test_report_escapes_the_record_and_errors(tmp_path):
    error = new_output("error", ename="Error", evalue=NASTY, traceback=[NASTY])
    nbformat.write(new_notebook(cells=[new_code_cell("x", outputs=[error])]), tmp_path / "notebook.ipynb")
    content = record(
        "03_2_x",
        verdict(NASTY, arm=NASTY, text=NASTY),
        title=NASTY,
        dataset=NASTY,
        notes=[NASTY],
        machine={"summary": NASTY},
    )
    page = report.render(tmp_path / "notebook.ipynb", tmp_path / "report.html", record=content)
    assert_self_contained(page)
    assert NASTY in soup(page).h1.get_text()
    assert NASTY in soup(page).select_one(".error").get_text()


def test_report_with_a_record_of_wrong_types(executed, tmp_path):
    page = soup(report.render(executed, tmp_path / "report.html", record=record("03_2_x", "no dict")))
    assert "record.json does not hold what was expected" in page.select_one(".notice").get_text()


# Scoreboard


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "quick-mnist5k"
    done = {
        "status": "complete",
        "reason": "",
        "seconds": 43,
        "key": "k",
        "date": "2026-11-24T04:00:00+00:00",
    }
    put(folder, "10_comparison", record("10_comparison", verdict("slower", 0.7), chapter="10"), run=done)
    put(
        folder,
        "02_overview",
        record("02_overview", None, chapter="2", claim="", paper="", caption="Where the time goes."),
        run=done,
    )
    put(
        folder,
        "03_2_mixed_precision",
        record("03_2_mixed_precision", verdict()),
        run=done,
    )
    put(
        folder,
        "05_1_stochastic_pooling",
        record("05_1_stochastic_pooling", verdict("diverged", None, text="2 of 15 runs diverged")),
    )
    failed = done | {"status": "failed", "reason": f"cell 9: {NASTY}"}
    put(folder, "06_1_prune_train", record("06_1_prune_train", verdict()), run=failed, figure=False)
    put(folder, "06_2_net2net", '{"schema": 2, "status": "comp', run=done, page=False)
    put(
        folder,
        "07_1_tree_cnn",
        record("07_1_tree_cnn", verdict() | {"ratio": "fast"}),
        figure=False,
        page=False,
    )
    put(
        folder,
        "07_2_standardization_loss",
        record("07_2_standardization_loss", verdict()) | {"schema": 99},
        figure=False,
        page=False,
    )
    put(folder, "07_3_wavelet", run=done, figure=False, page=False)
    return folder


def test_rows(folder):
    rows = records.scoreboard_rows(folder, ["03_2_mixed_precision", "03_10_made_up"])
    by_name = {row["notebook"]: row for row in rows}
    assert list(by_name)[:3] == ["02_overview", "03_2_mixed_precision", "03_10_made_up"]
    assert list(by_name)[-1] == "10_comparison"
    assert len({tuple(row) for row in rows}) == 1  # the same keys in the same order
    good = by_name["03_2_mixed_precision"]
    assert (good["status"], good["ratio"], good["n"], good["report"]) == (
        "complete",
        1.34,
        5,
        "03_2_mixed_precision/report.html",
    )
    assert by_name["02_overview"]["verdict"] == ""
    assert (by_name["03_10_made_up"]["status"], by_name["03_10_made_up"]["chapter"]) == ("not run", "3.10")
    assert by_name["06_1_prune_train"]["status"] == "failed"
    assert by_name["06_1_prune_train"]["ratio"] is None  # an older record does not hide the failure
    for name, reason in {
        "06_2_net2net": "record.json is damaged or only half-written",
        "07_1_tree_cnn": "could not convert",
        "07_2_standardization_loss": "schema 99",
        "07_3_wavelet": "record.json is missing",
    }.items():
        assert by_name[name]["status"] == "unreadable"
        assert reason in by_name[name]["reason"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        "3",
        '"text"',
        "{}",
        '{"schema": 2, "status": "complete", "machine": 3}',
        '{"schema": 1, "status": "complete", "headline": 3}',
        '{"schema": 2, "status": "complete", "headline": {"range": 3}}',
        "\x00\xff",
        "NaN",
    ],
)
def test_no_record_breaks_the_index(tmp_path, content):
    put(tmp_path, "03_2_x", content.encode("latin-1"))
    put(tmp_path, "04_1_y", record("04_1_y", verdict()))
    rows = records.scoreboard_rows(tmp_path)
    assert [row["status"] for row in rows] == ["unreadable", "complete"]
    assert rows[0]["reason"]
    assert "1 failed" in soup(report.index(tmp_path)).get_text()


def test_index(folder):
    path = report.index(folder)
    assert path == folder / "index.html"
    assert_self_contained(path)
    page = soup(path)
    rows = {row.select_one(".chapter").get_text(): row for row in page.select("tbody tr")}
    assert list(rows) == [
        "2",
        "3.2",
        "5.1",
        "6.1",
        "6.2",
        "7.1",
        "7.2",
        "7.3",
        "10",
    ]  # by chapter, not by success
    text = {chapter: row.get_text(" ", strip=True) for chapter, row in rows.items()}
    parts = (
        "faster ★",
        "1.34x [1.29, 1.39]",
        "at 78–86 % accuracy",
        "n = 5 × 3",
        "−0.10 points",
        "aim 1.2x: met",
    )
    for part in (*parts, "A. Author 2019"):
        assert part in text["3.2"]
    assert rows["3.2"].svg
    assert "— Where the time goes." in text["2"]
    assert "2 of 15 runs diverged" in text["5.1"]
    assert not rows["5.1"].svg
    assert NASTY in rows["6.1"].get_text()
    assert "1.34x" not in text["6.1"]
    assert "half-written" in text["6.2"]
    header = page.header.get_text(" ", strip=True)
    for part in (
        "mnist5k",
        "quick",
        "2-core CPU",
        "2026-11-24 04:00 UTC",
        "4 complete",
        "5 failed",
        "1.38x [1.31, 1.45]",
        "★ marks what is still significant when all 2 tests",
        "commit abc1234",
    ):
        assert part in header
    assert "not a measurement" not in header


def test_index_links_resolve_and_pictures_are_small_and_inline(folder):
    page = soup(report.index(folder))
    links = [link["href"] for link in page("a")]
    assert links
    for link in links:
        assert not urlparse(link).scheme
        assert (folder / link).is_file()
    pictures = [picture["src"] for picture in page("img")]
    assert len(pictures) == 4  # of the complete ones
    for picture in pictures:
        assert picture.startswith(PICTURE)
    assert len(folder.joinpath("index.html").read_text()) < 100_000


def test_thumbnail(tmp_path):
    Image.new("RGBA", (1000, 600), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    small = Image.open(
        io.BytesIO(base64.b64decode(report._thumbnail(tmp_path / "clear.png").removeprefix(PICTURE)))
    )
    assert small.size == (320, 192)
    assert small.convert("RGB").getpixel((5, 5)) == (255, 255, 255)  # transparent is white, not black
    assert report._thumbnail(tmp_path / "missing.png") == ""
    assert report._thumbnail(paths.write(tmp_path / "broken.png", b"\x89PNG\r\n\x1a\n broken")) == ""


def test_index_escapes_everything(tmp_path):
    headline = verdict(NASTY, arm=NASTY, against=NASTY, cost=NASTY, text=NASTY, aim_verdict=NASTY, kind=NASTY)
    texts = dict.fromkeys(
        ("title", "title_de", "paper", "claim", "preset", "dataset", "caption", "date", "chapter"), NASTY
    )
    put(tmp_path, "03_2_x", record("03_2_x", headline, **texts, machine={"summary": NASTY}))
    path = report.index(tmp_path)
    assert_self_contained(path)
    assert "<script" not in path.read_text()
    assert "<b>" not in path.read_text()


@pytest.mark.parametrize(
    ("changes", "note"),
    [({"preset": "smoke"}, "not a measurement"), ({"shared_machine": True}, "Shared machine"), ({}, "")],
)
def test_index_says_what_its_numbers_are_worth(tmp_path, changes, note):
    put(tmp_path, "03_2_x", record("03_2_x", verdict(), **changes))
    assert note in " ".join(element.get_text() for element in soup(report.index(tmp_path)).select(".notice"))


def test_empty_folder_has_an_index(tmp_path):
    assert "No notebook has been run" in soup(report.index(tmp_path)).get_text()


def test_extreme_ratios_stay_on_the_axis(tmp_path):
    for number, ratio in enumerate((1e-9, 0.5, 1, 3, 1e9)):
        put(
            tmp_path,
            f"03_{number}_x",
            record(f"03_{number}_x", verdict(ratio=ratio)),
            figure=False,
            page=False,
        )
    page = soup(report.index(tmp_path))
    assert len(page("svg")) == 5
    assert all(0 <= float(dot["cx"]) <= 200 for dot in page("circle"))


def test_an_older_protocol_is_named_and_in_no_correction(tmp_path):
    put(tmp_path, "03_2_x", record("03_2_x", OLD, schema=1))
    put(tmp_path, "03_3_y", record("03_3_y", OLD | {"ratio": None, "text": "0 of 5 reached"}, schema=1))
    put(tmp_path, "04_1_z", record("04_1_z", verdict(p=0.04)))
    rows = {row["notebook"]: row for row in records.scoreboard_rows(tmp_path)}
    assert rows["04_1_z"]["survives"] is True  # it is the only test
    assert [rows[name]["survives"] for name in ("03_2_x", "03_3_y")] == [None, None]
    page = soup(report.index(tmp_path))
    old, older, new = (row.get_text(" ", strip=True) for row in page.select("tbody tr"))
    assert "older protocol" in old
    assert "1.50x [1.40, 1.60], n=5 pairs" in old
    assert "less accurate" not in old
    assert "older protocol" in older
    assert "0 of 5" not in older
    assert "faster ★" in new
    assert len(page("svg")) == 1
    nbformat.write(new_notebook(), tmp_path / "n.ipynb")
    content = record("03_2_x", OLD, schema=1)
    header = soup(report.render(tmp_path / "n.ipynb", tmp_path / "03_2_x" / "report.html", content)).header
    assert "older protocol" in header.get_text()
    assert "less accurate" not in header.get_text()


def test_holms_correction(tmp_path):
    for name, p, word in (("04_1", 0.01, "faster"), ("04_2", 0.03, "slower"), ("04_3", 0.04, "undecided")):
        put(tmp_path, name, record(name, verdict(word, p=p)))
    put(tmp_path, "04_4", record("04_4", verdict("shared machine: no verdict", p=1e-9)))
    put(tmp_path, "04_5", record("04_5", verdict("out of reach: at most 0.41x", kind="at most", p=None)))
    rows = records.scoreboard_rows(tmp_path)
    assert [row["survives"] for row in rows] == [True, False, False, None, None]
    page = soup(report.index(tmp_path))
    assert [("★" in row.get_text()) for row in page.select("tbody tr")] == [True, False, False, False, False]
    assert "all 3 tests of this page" in page.header.get_text()


def test_of_one_test_nothing_is_corrected(tmp_path):
    put(tmp_path, "04_1", record("04_1", verdict("faster", p=0.01)))
    said = soup(report.index(tmp_path)).header.get_text()
    assert "this page has one test" in said
    assert "all 1" not in said


def test_what_limits_accuracies_stands_on_the_scoreboard_once(tmp_path):
    for name in ("04_1", "04_2"):
        put(tmp_path, name, record(name, verdict(), beware=["The largest class has 95 % of the images."]))
    said = soup(report.index(tmp_path)).header.get_text()
    assert said.count("The largest class has 95 % of the images.") == 1


def test_a_run_has_the_recorded_figure_beside_its_own(tmp_path, nothing_recorded):
    runs = tmp_path / "results" / "quick-mnist5k"
    for name in ("03_2_x", "03_3_y", "04_1_z"):
        put(runs, name, record(name, verdict(ratio=1.1)))
    said = {"text": "1.38x [1.31, 1.45] at 78-86 %, n=5x3, 2-core CPU", "verdict": "faster"}
    then = dict(preset="study", dataset="cifar10", date="2026-12-01T00:00:00+00:00")
    place = put(nothing_recorded / "study-cifar10", "03_2_x", record("03_2_x", verdict(**said), **then))
    put(nothing_recorded / "study-cifar10", "03_3_y", record("03_3_y", OLD, schema=1, **then))
    page = soup(report.index(runs))
    new, old, without = page.select("tbody tr")
    recorded = new.select_one("td[data-label=Recorded]")
    assert recorded.img["src"].startswith(PICTURE)
    assert "study, cifar10: 1.38x [1.31, 1.45] at 78-86 %, n=5x3, 2-core CPU: faster" in recorded.get_text()
    assert (runs / recorded.a["href"]).resolve() == (place / "report.html").resolve()
    assert "older protocol" in old.select_one("td[data-label=Recorded]").get_text()
    assert not old.select("td[data-label=Recorded] img")
    assert without.select_one("td[data-label=Recorded]").get_text() == "—"

    nbformat.write(new_notebook(), tmp_path / "n.ipynb")
    content = record("03_2_x", verdict(ratio=1.1))
    page = soup(report.render(tmp_path / "n.ipynb", runs / "03_2_x" / "report.html", content))
    assert "1.38x [1.31, 1.45]" in page.select_one(".recorded").get_text()
    assert page.select_one(".recorded img")["src"].startswith(PICTURE)
    # The recorded results themselves are not beside themselves.
    page = soup(report.index(nothing_recorded / "study-cifar10"))
    assert not page.select("td[data-label=Recorded]")


@pytest.mark.parametrize(
    ("ratio", "kind", "text"),
    [
        (0.41, "at most", "at most 0.41x"),
        (1.7, "at least", "at least 1.70x"),
        (None, "saturated", "the text"),
    ],
)
def test_a_bound_is_called_one(tmp_path, ratio, kind, text):
    bound = verdict("out of reach", ratio, kind=kind, low=None, high=None, range=None, p=None)
    put(tmp_path, "03_2_x", record("03_2_x", bound))
    assert text in soup(report.index(tmp_path)).tbody.get_text(" ", strip=True)


def test_verdicts_differ_without_colour():
    symbols_and_words = [(symbol, word) for word, (_, symbol) in report.BADGES.items()]
    assert len(set(symbols_and_words)) == len(report.BADGES)
    css = report._source("style.css")
    assert all(f".{tone}" in css for tone, _ in report.BADGES.values())


def test_every_verdict_has_a_badge():
    words = (
        "FASTER", "SLOWER", "NO_DIFFERENCE", "UNDECIDED", "DEPENDS", "OUT_OF_REACH", "DIVERGED", "SATURATED",
        "SMOKE", "SHARED",
    )  # fmt: skip
    for word in words:
        row = {"verdict": f"{getattr(statistics, word)}: and more", "status": "complete"}
        assert report._badge(row)["symbol"] != "·", word


def test_imports_without_a_grammar_leave_no_trace():
    code = "import sys; from effilib.workbook import report\n"
    code += "with report.light_imports():\n    import nbconvert\n"
    code += "print('rfc3987_syntax' in sys.modules, 'jsonschema' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=paths.root(), capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "True"]


# A real browser


@pytest.mark.parametrize("width", [390, 1024, 1280])
def test_whatever_a_notebook_or_a_record_holds_is_readable(browser, rendered, folder, width):
    for file in (rendered, report.index(folder)):
        page = browser.open(file, width)
        keep(page, f"all-{file.stem}-{width}")
        assert [
            c for c in complaints(page, file) if not c.startswith("leads nowhere")
        ] == []  # to what was not run here
        assert page["formulas"] or file.stem == "index"


def test_records_of_several_commits_are_said_to_be(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "recorded", lambda: tmp_path)
    for name, commit in (("03_2_x", "abc1234"), ("03_3_y", "abc1234"), ("04_1_z", "def5678")):
        put(tmp_path / "study-cifar10", name, record(name, verdict(), commit=commit))
    said = soup(report.recorded_index()).header.get_text()
    assert "The rows were measured with different code, commits abc1234, def5678." in said
    again = record("04_1_z", verdict(), commit="abc1234")
    paths.write(tmp_path / "study-cifar10" / "04_1_z" / "record.json", again)
    assert "different code" not in soup(report.recorded_index()).header.get_text()
