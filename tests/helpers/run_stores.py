"""Run stores made by tests: with the least that a run must say of itself, in a file or in memory."""

import contextlib
import resource
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from esper.nissa.schema import create
from esper.nissa.store import RunStore
from esper.nissa.writer import Rows

RUN: dict[str, Any] = {
    **{name: name for name in ("run_id", "command", "task", "host", "controller", "config", "machine", "platform")},
    **{name: name for name in ("esper_version", "python_version", "torch_version", "sqlite_version")},
    **{"seed": 0, "processors": 1, "threads": 1, "device": "cpu", "process_id": 1, "level": "full"},
    "planned_decisions": 10,
}
"""Columns of `run` that must be known at the start."""
ROUND: dict[str, Any] = {
    **{"purpose": "grow", "arm": "grown", "controller": "random", "grows": 1, "rows": 1},
    **{"horizon_decisions": 10, "updates_per_decision": 1, "started_unix_s": 1.0, "decisions": 0},
}
EPISODE: dict[str, Any] = {
    **{"row_id": 0, "status": "finished", "price_nats": 0.0, "learning_rate": 0.1, "label_noise_share": 0.0},
    **{"host_parameters": 100, "host_multiply_adds": 1000},
}
DECISION: dict[str, Any] = {"legal_ops": 1, "op": "wait", "accepted": 1, "skipped_updates": 0}


def open_store(path: Path, **options: Any) -> RunStore:
    """Open a store for a run that says only what it must."""
    return RunStore(path, RUN, **options)


def rounds(*numbers: int) -> Rows:
    """Rows of `round` with these numbers."""
    return Rows("round", {"round": list(numbers), **ROUND})


def add_rounds(store: RunStore, *numbers: int) -> None:
    """Queue rows of `round`."""
    store.add(len(numbers), lambda: [rounds(*numbers)])


def rows(path: Path, sql: str) -> list[dict[str, Any]]:
    """Give what a question to a store gives, asked over a connection of its own that cannot write."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        db.row_factory = sqlite3.Row
        return [dict(row) for row in db.execute(sql)]


def values(path: Path, sql: str) -> list[Any]:
    """Give the one column of an answer."""
    return [value for row in rows(path, sql) for value in row.values()]


def losses(loss: Any, **more: Any) -> Rows:
    """Rows of `contribution`."""
    return Rows("contribution", {"round": 0, "decision": 0, "row": 0, "loss_nats": loss, "examples": 9} | more)


def run_of(path: Path) -> dict[str, Any]:
    """Give the one row of `run`."""
    (run,) = rows(path, "SELECT * FROM run")
    return run


@contextlib.contextmanager
def empty_database() -> Iterator[sqlite3.Connection]:
    """The tables of a store, in memory."""
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        create(db)
        yield db


def insert(db: sqlite3.Connection, table: str, **columns: Any) -> None:
    """Insert one row."""
    marks = ", ".join("?" * len(columns))
    db.execute(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})", tuple(columns.values()))


def names(folder: Path) -> list[str]:
    """Give the names of what lies in a folder."""
    return sorted(file.name for file in folder.iterdir())


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for something that must come, however slow the machine is."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
