"""The SQLite side of a run's store: tables, flushes, heartbeat. Lives in one thread."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from esper.nissa.incidents import Rule, Watch
from esper.nissa.machine import MachineSampler
from esper.nissa.schema import check_version, create, store_files, tables_with

SAMPLE_EVERY = 5.0
"""Seconds between two samples of the machine."""
BUSY = 30.0
"""Seconds to wait for somebody else's lock on the file."""


@dataclass(frozen=True)
class Rows:
    """Rows to insert: an array or list for each column, or one value for all rows. NaN becomes NULL.

    Attributes
    ----------
    replace
        They take the place of rows with the same key.
    """

    table: str
    columns: Mapping[str, Any]
    replace: bool = False


@dataclass(frozen=True)
class Change:
    """Columns to change in the one row with this key."""

    table: str
    values: Mapping[str, Any]
    key: Mapping[str, int]


Writes = Callable[[], Sequence[Rows | Change]]
"""Makes what is to be written, in the writer's thread."""


@dataclass(frozen=True)
class Kept:
    """What stays of a record when a run goes on in it.

    Attributes
    ----------
    rounds
        Rounds before this one, whole.
    decisions
        Of the round after them, the decisions before this one; None: nothing.
    unix_s
        Of that round, the times and incidents up to then.
    """

    rounds: int
    decisions: int | None = None
    unix_s: float = 0.0


@dataclass(frozen=True)
class Batch:
    """What one flush writes.

    Attributes
    ----------
    writes
        In order.
    spent
        Decisions, wall and processor seconds by round and phase.
    stalls, stall_s
        How often, and how long in all, the run has waited for a full buffer.
    asked
        Number of the last flush that somebody waits for.
    end
        Status and reason, if it is the last.
    """

    writes: Sequence[Writes]
    spent: Mapping[tuple[int, str], tuple[int, float, float]]
    stalls: int
    stall_s: float
    asked: int
    end: tuple[str, str | None] | None


class Writer:
    """Creates the file, or goes on in it, and writes batches.

    Parameters
    ----------
    path
        File to create.
    run
        Columns of `run` that are known at the start.
    rules
        Incidents to watch for.
    kept
        Go on in a file that exists, with so much of it; None: create it.

    Raises
    ------
    sqlite3.Error, OSError
        The file cannot be written; so every method.
    """

    def __init__(self, path: Path, run: Mapping[str, Any], rules: dict[str, Rule], kept: Kept | None = None) -> None:
        # Exclusive: a store is never written over.
        flags = os.O_CREAT | os.O_EXCL if kept is None else 0
        os.close(os.open(path, flags | os.O_RDWR, 0o644))
        self._path, self._identity = path, _identity(path)
        self._watch, self._sampler = Watch(rules), MachineSampler(path)
        self._round = 0
        self._sampled = -SAMPLE_EVERY
        self._own = (0.0, 0.0)
        """Wall and processor time of the flush before."""
        self._stalls, self._stall_s = 0, 0.0
        """Of the processes before this one."""
        self._db = sqlite3.connect(path, timeout=BUSY, isolation_level=None)
        if kept is not None:
            try:
                self._go_on(run, kept)
            except BaseException:
                self._db.close()
                raise
            return
        try:
            create(self._db)
            now = time.time()
            start = {"id": 1, "status": "running", "started_unix_s": now, "heartbeat_unix_s": now}
            self._insert(Rows("run", {**run, **start, "flushes": [0], "stalls": 0, "stall_s": 0.0}))
            # Begun before the log, the file itself says from the first moment on what it is.
            self._log()
        except BaseException:
            # A store without a run is of use to nobody.
            self._db.close()
            for file in store_files(path):
                file.unlink(missing_ok=True)
            raise

    def _go_on(self, run: Mapping[str, Any], kept: Kept) -> None:
        """Take up the record of a run that was ended or killed, without what came after what is kept."""
        check_version(self._db, self._path)
        self._log()
        now = time.time()
        with self._transaction():
            self._cut(kept)
            # Whoever watches from here on has not seen what is open; what still holds opens again.
            self._db.execute("UPDATE incident SET closed_unix_s = ? WHERE closed_unix_s IS NULL", (now,))
            self._stalls, self._stall_s = self._db.execute("SELECT stalls, stall_s FROM run").fetchone()
            status = {"status": "running", "status_reason": None, "ended_unix_s": None, "heartbeat_unix_s": now}
            self._change(Change("run", {"process_id": run["process_id"], **status}, {"id": 1}))

    def _log(self) -> None:
        """Keep a log, which lets others read meanwhile; synced, because a checkpoint relies on what was recorded."""
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")

    def _cut(self, kept: Kept) -> None:
        first = kept.rounds if kept.decisions is None else kept.rounds + 1
        for table in tables_with(self._db, "round"):
            self._db.execute(f"DELETE FROM {table} WHERE round >= ?", (first,))
        self._db.execute("DELETE FROM incident WHERE opened_round >= ?", (first,))
        if kept.decisions is None:
            return
        for table in tables_with(self._db, "decision"):
            begun = f"DELETE FROM {table} WHERE round = ? AND decision >= ?"
            self._db.execute(begun, (kept.rounds, kept.decisions))
        for table, number, time_s in (("timing", "round", "unix_s"), ("incident", "opened_round", "opened_unix_s")):
            self._db.execute(f"DELETE FROM {table} WHERE {number} = ? AND {time_s} > ?", (kept.rounds, kept.unix_s))

    def flush(self, batch: Batch) -> None:
        """Write a batch in one transaction, and what belongs to every flush: heartbeat, times, machine, incidents."""
        if _identity(self._path) != self._identity:
            raise OSError(None, "the file was removed or replaced", str(self._path))
        wall, cpu = time.perf_counter(), time.thread_time()
        with self._transaction():
            for writes in batch.writes:
                for write in writes():
                    if isinstance(write, Rows):
                        self._insert(write)
                    else:
                        self._change(write)
            now = time.time()
            self._times(now, batch)
            if wall - self._sampled >= SAMPLE_EVERY:
                self._sampled = wall
                self._insert(Rows("machine", {"unix_s": [now], **self._sampler.sample()}))
            self._watch.look(self._db, now)
            self._heartbeat(now, batch)
        self._own = (time.perf_counter() - wall, time.thread_time() - cpu)

    def close(self) -> None:
        """Leave one file that needs no others beside it, unless somebody still reads."""
        with contextlib.suppress(sqlite3.OperationalError):
            self._db.execute("PRAGMA busy_timeout = 0")
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._db.execute("PRAGMA journal_mode = DELETE")
        self._db.close()

    def give_up(self, reason: str) -> None:
        """Say in the file, if that still works, that the record ends here."""
        with contextlib.suppress(sqlite3.Error):
            # The log gives its place back: on a full disk that may be all there is.
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            values = {"status": "failed", "status_reason": reason, "ended_unix_s": time.time()}
            self._change(Change("run", values, {"id": 1}))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _times(self, now: float, batch: Batch) -> None:
        if batch.spent:
            self._round = max(number for number, _ in batch.spent)
        keys = [*batch.spent, (self._round, "write")]
        values = [*batch.spent.values(), (0, *self._own)]
        columns = {"round": [k[0] for k in keys], "phase": [k[1] for k in keys]}
        columns |= {name: [v[at] for v in values] for at, name in enumerate(("decisions", "wall_s", "cpu_s"))}
        self._insert(Rows("timing", {"unix_s": now, **columns}))

    def _heartbeat(self, now: float, batch: Batch) -> None:
        end = {}
        if batch.end is not None:
            end = {"status": batch.end[0], "status_reason": batch.end[1], "ended_unix_s": now}
            self._db.execute("UPDATE episode SET status = 'interrupted' WHERE status = 'running'")
        stalls = {"stalls": self._stalls + batch.stalls, "stall_s": self._stall_s + batch.stall_s}
        values = {"heartbeat_unix_s": now, **stalls, **end}
        self._change(Change("run", values, {"id": 1}))
        self._db.execute("UPDATE run SET flushes = flushes + 1")

    def _insert(self, rows: Rows) -> None:
        names = ", ".join(rows.columns)
        marks = ", ".join("?" * len(rows.columns))
        columns = [_column(values) for values in rows.columns.values()]
        lengths = {len(column) for column in columns if isinstance(column, list)}
        if len(lengths) != 1:
            # The shortest would cut off the others, and nobody would know.
            raise ValueError(
                f"{rows.table}: columns of lengths {sorted(lengths)}; all but single values need the same one"
            )
        verb = "REPLACE" if rows.replace else "INSERT"
        self._db.executemany(f"{verb} INTO {rows.table} ({names}) VALUES ({marks})", zip(*columns, strict=False))

    def _change(self, change: Change) -> None:
        values = ", ".join(f"{name} = ?" for name in change.values)
        where = " AND ".join(f"{name} = ?" for name in change.key)
        sql = f"UPDATE {change.table} SET {values} WHERE {where}"
        self._db.execute(sql, (*change.values.values(), *change.key.values()))


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_dev, stat.st_ino


def _column(values: Any) -> Any:
    if isinstance(values, np.ndarray):
        return values.tolist()
    return values if isinstance(values, list) else repeat(values)
