"""An empty folder and one thread for each test of the command line."""

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Run in an empty folder, on one thread, on a wide page."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    threads = torch.get_num_threads()
    yield folder
    torch.set_num_threads(threads)
