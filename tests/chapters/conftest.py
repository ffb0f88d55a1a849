"""What the chapters' tests share."""

import pytest


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Results and cached runs go to a folder of the test's own."""
    monkeypatch.setenv("EFFILIB_RESULTS", str(tmp_path))
