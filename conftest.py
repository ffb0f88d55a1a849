"""Tests, and notebooks under nbval, run in the smoke preset unless told otherwise; their results go to a
folder of their own.
"""

import os
import tempfile

import pytest

os.environ.setdefault("EFFILIB_PRESET", "smoke")
if "EFFILIB_RESULTS" not in os.environ:
    _results = tempfile.TemporaryDirectory(prefix="effilib-results-")
    os.environ["EFFILIB_RESULTS"] = _results.name


@pytest.fixture
def shared_data():
    """Folder of real data sets (`EFFILIB_DATA`); tests that need more than the embedded set are skipped
    without it.
    """
    folder = os.environ.get("EFFILIB_DATA")
    if not folder or not os.path.isdir(os.path.join(folder, "FashionMNIST")):
        pytest.skip("real data sets are not on this machine (EFFILIB_DATA)")
    return folder
