"""Fixtures: folders and runs of the tests' own notebooks, and one browser for all tests that look at
pages.
"""

import pytest

from tests.browser import CHROMIUM, Browser


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Results go to a folder of the test's own."""
    monkeypatch.setenv("EFFILIB_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


@pytest.fixture
def alone(results, tmp_path, monkeypatch):
    """Results of the test's own; what else is measured on this machine is not seen."""
    from effilib import clock  # brings torch, which most tests do not need

    monkeypatch.delenv("EFFILIB_SHARED", raising=False)
    monkeypatch.setattr(clock, "NOTES", tmp_path / "measuring")


@pytest.fixture
def folder(results):
    """The results of a series with the preset smoke on its data set."""
    return results / "smoke-mnist5k"


@pytest.fixture
def notebooks(tmp_path):
    """The folder of the test's notebooks."""
    return tmp_path / "notebooks"


@pytest.fixture
def run(notebooks, results):
    """Call the runner on the test's notebooks."""
    from effilib.workbook import runner  # brings torch, which most tests do not need

    return lambda *selectors, **settings: runner.run(
        selectors, **{"preset": "smoke", "notebooks": notebooks, **settings}
    )


@pytest.fixture
def plan(notebooks, results):
    """Plan a run of the test's notebooks."""
    from effilib.workbook import runner

    return lambda *selectors, **settings: runner.plan(
        selectors, **{"preset": "smoke", "notebooks": notebooks, **settings}
    )


@pytest.fixture(scope="session")
def browser():
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine (Debian: apt install chromium)")
    with Browser() as browser:
        yield browser
