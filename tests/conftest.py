"""A browser for all tests that look at pages."""

import pytest

from tests.browser import CHROMIUM, Browser


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine (Debian: apt install chromium)")
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser
