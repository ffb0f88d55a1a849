"""What the chapters' tests share."""

import pytest

from effilib.chapters import prune_then_grow as chapter
from effilib.experiment import Arm, compare
from effilib.tasks import task


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Results and cached runs go to a folder of the test's own."""
    monkeypatch.setenv("EFFILIB_RESULTS", str(tmp_path))


@pytest.fixture(scope="session")
def grown(tmp_path_factory):
    """The arms of chapter II.9 in all of the time, but those without the procedure, one seed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFILIB_RESULTS", str(tmp_path_factory.mktemp("results")))
        t = task("smoke", "synthetic").but(epochs=6, evaluations=5, target=None)
        data, base = t.load(), Arm(name=chapter.DENSE, role="baseline")
        arms = [base, *chapter.judged(t, data), *chapter.modes(t, data), *chapter.controls(t, data)]
        return compare(t, arms, seeds=1, quantity="training time")
