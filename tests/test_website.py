"""What is read without running anything: recorded results and public names, whole, small, in a browser."""

import base64
import io
import re
from urllib.parse import unquote

import nbformat
import numpy as np
import pytest
from bs4 import BeautifulSoup
from PIL import Image

from effilib import paths
from effilib.workbook import report, series, website
from tests.browser import complaints, keep
from tests.test_examples import MODULES

LIMIT = 8 * 2**20  # bytes of all recorded pages together


def soup(file):
    return BeautifulSoup(file.read_text(encoding="utf-8"), "html.parser")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return website.build(tmp_path_factory.mktemp("pages")).parent


def test_every_public_name_is_on_its_page(site):
    page = soup(site / "api.html")
    ids = [element["id"] for element in page.select("[id]")]
    assert len(set(ids)) == len(ids)
    modules = list(website.modules())
    assert {m.__name__ for m in modules} - {"effilib"} <= set(MODULES)
    assert {f"{m.__name__}.{name}" for m in modules for name in m.__all__} <= set(ids)
    links = [unquote(a["href"]) for a in page.select("a[href^='#']")]
    assert {link[1:] for link in links} <= set(ids)
    entry = page.find(id="effilib.training.train")
    assert "train(model: Module, dataset: Dataset" in entry.select_one(".signature").get_text()
    assert ">>>" in entry.select_one(".highlight").get_text()
    assert " at 0x" not in page.get_text()  # the page is the same every time


def rows(file):
    """Notebook -> what its row says, and where it leads; without what depends on versions of libraries."""
    return {
        row["id"]: (row.get_text(" ", strip=True), [a["href"] for a in row.select("a")])
        for row in soup(file).select("tbody tr")
    }


def test_the_recorded_scoreboard_is_up_to_date(tmp_path):
    there = rows(paths.recorded() / "index.html")
    assert there == rows(report.recorded_index(tmp_path)), "python -m effilib.workbook.series"
    assert list(there) == [c.stem for c in series.CHAPTERS if c.exists]
    for _, links in there.values():
        assert all((paths.recorded() / link).is_file() for link in links)


def test_recorded_pages_are_small():
    pages = list(paths.recorded().rglob("*.html"))
    assert sum(page.stat().st_size for page in pages) < LIMIT


def test_a_kept_report_is_small_and_leads_to_the_scoreboard(tmp_path):
    noisy, buffer = np.random.default_rng(0).integers(0, 255, (600, 2400, 3), dtype=np.uint8), io.BytesIO()
    Image.fromarray(noisy).save(buffer, "PNG")
    new = nbformat.v4
    data = {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": ""}
    cells = [
        new.new_markdown_cell("# One\n\n[cost](03_1_convolution_cost.ipynb), [there](06_2_net2net.ipynb#a)"),
        new.new_code_cell("1", outputs=[new.new_output("display_data", data=data)]),
    ]
    nbformat.write(new.new_notebook(cells=cells), tmp_path / "one.ipynb")
    place = paths.make(tmp_path / "study-cifar10" / "03_2_mixed_precision")
    whole, kept = (
        report.render(tmp_path / "one.ipynb", place / f"{kept}.html", kept=kept) for kept in (False, True)
    )
    assert kept.stat().st_size < whole.stat().st_size / 3
    assert [a["href"] for a in soup(kept)("a")] == [
        "../../index.html",
        "../../index.html#03_1_convolution_cost",
        "../../index.html#06_2_net2net",
    ]
    assert not soup(kept).select(".recorded")
    (picture,) = soup(kept)("img")
    small = base64.b64decode(picture["src"].split(",")[1])
    assert Image.open(io.BytesIO(small)).size == (1200, 300)


@pytest.mark.parametrize("width", [390, 1440])
def test_all_pages_are_readable(browser, site, width):
    text = (site / "api.html").read_text(encoding="utf-8")
    opened = re.sub(r'(<details)( class="\w+" id="(module-)?effilib\.recipe[".])', r"\1 open\2", text)
    assert opened.count("<details open") > 5
    for file in (site / "index.html", site / "api.html", paths.write(site / "opened.html", opened)):
        page = browser.open(file, width)
        keep(page, f"pages-{file.stem}-{width}")
        assert complaints(page, file) == []


def test_what_is_published_lies_below_one_folder(site):
    for page in site.rglob("*.html"):
        for address in re.findall(r'(?:href|src)="([^"#]*)', page.read_text(encoding="utf-8")):
            if address and not re.match(r"\w+:", address):
                assert (page.parent / address).resolve().is_relative_to(site.resolve())
