"""The report as a person sees it: a real browser, offline, as wide as a phone and as a desktop."""

import shutil

import pytest

from effilib import paths
from effilib.workbook import report, runner
from tests.browser import complaints, keep

pytestmark = pytest.mark.slow

WIDTHS = (390, 1440)
RUN = ("02", "07_3")  # measurements without a verdict; a method


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of a real run, of the smoke preset: its index and three reports."""
    results = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFILIB_RESULTS", str(results))
        assert runner.run(RUN, preset="smoke", jobs=2, name="site") == 0
    return results / "site"


@pytest.fixture(scope="module")
def scoreboard(tmp_path_factory):
    """The index over all recorded results: real verdicts and intervals."""
    folder = tmp_path_factory.mktemp("recorded")
    for file in paths.recorded().glob("*-*/*/record.json"):
        shutil.copytree(file.parent, folder / file.parent.name, dirs_exist_ok=True)
    return report.index(folder)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_real_run_is_readable(browser, site, width):
    reports = sorted(site.glob("*/report.html"))
    assert len(reports) == len(RUN)
    formulas = 0
    for file in (site / "index.html", *reports):
        page = browser.open(file, width)
        keep(page, f"{file.parent.name}-{width}")
        assert complaints(page, file) == []
        formulas += len(page["formulas"])
        assert any(
            link.endswith("index.html" if file in reports else "report.html") for link in page["links"]
        )
    assert formulas > 10


@pytest.mark.parametrize("width", WIDTHS)
def test_the_scoreboard_is_readable(browser, scoreboard, width):
    page = browser.open(scoreboard, width)
    keep(page, f"recorded-{width}")
    assert complaints(page, scoreboard) == []


@pytest.mark.parametrize(
    ("html", "complaint"),
    [
        ('<img src="https://example.org/x.png" alt="x">', "request failed"),
        ('<img src="https://example.org/x.png" alt="x">', "asked for https://example.org"),
        ('<img src="data:image/png;base64,AAAA" alt="x">', "picture not shown: x"),
        ("<script>undefined_()</script>", "exception"),
        ("<script>console.error(1)</script>", "console"),
        (
            '<meta http-equiv="Content-Security-Policy" content="script-src \'none\'"><script>1</script>',
            "error",
        ),
        ('<p style="width: 3000px">wide</p>', "pixels too wide"),
        ('<p style="font-size: 8px">small</p>', "too small: 8px: small"),
        (
            '<math alttext="x" style="display: inline-block; width: 0; overflow: hidden"><mi>x</mi></math>',
            "formula not visible: x",
        ),
        ('<a href="missing.html">link</a>', "leads nowhere"),
        ('<a href="#missing">link</a>', "leads to no place"),
        ('<a href="javascript:1">link</a>', "odd address"),
        ("", "the screenshot is blank"),
    ],
)
def test_what_is_wrong_is_seen(browser, tmp_path, html, complaint):
    file = paths.write(tmp_path / "page.html", f"<!doctype html><html><body>{html}</body></html>")
    assert any(complaint in c for c in complaints(browser.open(file), file))
