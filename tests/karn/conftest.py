"""Tiny runs, made once, for all questions."""

import pytest

from helpers.recorded import record_walk, walk_config
from helpers.stored_runs import grow, grow_until_ctrl_c, only_begun


@pytest.fixture(scope="session")
def heuristic(tmp_path_factory):
    """A run whose seeds are committed and cost something."""
    code, store = grow(tmp_path_factory.mktemp("heuristic") / "run", "--horizon", "30", "--price", "0.5")
    assert code == 0
    return store


@pytest.fixture(scope="session")
def chance(tmp_path_factory):
    """A run that differs from the other in more than one setting, and culls."""
    options = ("--controller", "random", "--horizon", "24", "--seed", "3")
    code, store = grow(tmp_path_factory.mktemp("chance") / "run", *options)
    assert code == 0
    return store


@pytest.fixture(scope="session")
def lean(tmp_path_factory):
    code, store = grow(tmp_path_factory.mktemp("lean") / "run", "--horizon", "20", "--record", "lean")
    assert code == 0
    return store


@pytest.fixture(scope="session")
def stopped(tmp_path_factory):
    code, store = grow_until_ctrl_c(tmp_path_factory.mktemp("stopped") / "run", "--controller", "random")
    assert code == 130
    return store


@pytest.fixture(scope="session")
def walk(tmp_path_factory):
    """One round of many rows, which is not the first round; the twins that it names were not recorded."""
    store = tmp_path_factory.mktemp("walk") / "run.sqlite"
    record_walk(walk_config("digits-mlp", "random", horizon=30), 24, store)
    return store


@pytest.fixture(scope="session")
def begun(tmp_path_factory):
    """Nothing but the row of `run` exists yet."""
    return only_begun(tmp_path_factory.mktemp("begun") / "run.sqlite")
