"""A place for a store, and a writer that does not let tests wait."""

import pytest

from esper.nissa import store


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.sqlite"


@pytest.fixture
def quick(monkeypatch):
    """Flush often, so that nobody waits long for the next time."""
    monkeypatch.setattr(store, "FLUSH_EVERY", 0.02)
