"""The store of one run: a bounded buffer in front of one writing thread. Nothing is dropped.

What is to be written is handed over as functions that make rows: the run pays for queueing them, the writer's thread
for everything else.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from esper.leyline.clock import Spent
from esper.leyline.errors import EsperError
from esper.nissa.incidents import HEARTBEAT_LATE, Rule, default_rules
from esper.nissa.schema import check_sqlite
from esper.nissa.writer import Batch, Kept, Writer, Writes

CAPACITY = 200_000
"""Rows that may wait; where more would, the run waits instead."""
FLUSH_EVERY = 1.0
"""Seconds between two flushes."""
Status = Literal["finished", "interrupted", "failed"]


class RunStore:
    """The store of one run.

    Parameters
    ----------
    path
        File to create.
    kept
        Go on in a file that exists, with so much of it; None: create it.
    run
        Columns of `run` that are known at the start.
    error
        What to do if the store cannot be written any more: "stop" raises at the next call, once; "continue" tells
        `report` once, and records nothing more.
    report
        Where to say so.
    rules
        Incidents to watch for.
    capacity
        Rows that may wait.

    Raises
    ------
    EsperError
        The file cannot be created, or, later and from any method, written; once.
    """

    def __init__(
        self,
        path: Path,
        run: Mapping[str, Any],
        *,
        error: Literal["stop", "continue"] = "stop",
        report: Callable[[str], None] = print,
        rules: dict[str, Rule] | None = None,
        kept: Kept | None = None,
        capacity: int = CAPACITY,
    ) -> None:
        check_sqlite()
        self.path = path
        self._rules, self._kept = default_rules() if rules is None else rules, kept
        self._run = {**run, "heartbeat_late_s": self._rules[HEARTBEAT_LATE].open_above}
        self._goes_on, self._report = error == "continue", report
        self._capacity = capacity
        self._condition = threading.Condition()
        self._waiting: list[Writes] = []
        self._waiting_rows = 0
        self._stalled = False
        self._spent: dict[tuple[int, str], tuple[int, float, float]] = {}
        self._stalls, self._stall_s = 0, 0.0
        self._asked = self._flushed = 0
        self._end: tuple[str, str | None] | None = None
        self._failure: BaseException | None = None
        self._over = False
        self._thread = threading.Thread(target=self._write, name="run store", daemon=True)
        self._thread.start()
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None:
            self.close("finished")
            return
        # What went wrong first is what the user should hear of.
        with contextlib.suppress(EsperError):
            if isinstance(error, KeyboardInterrupt):
                self.close("interrupted", "stopped at once")
            else:
                self.close("failed", f"{type(error).__name__}: {error}")

    def add(self, rows: int, writes: Writes) -> bool:
        """Queue something to write; wait while the buffer is full.

        Parameters
        ----------
        rows
            About how many rows it will be.

        Returns
        -------
        bool
            Whether it will be written: not if the run goes on without its store.
        """
        with self._condition:
            if self._full(rows):
                start = time.perf_counter()
                self._stalled = True
                self._condition.notify_all()
                self._condition.wait_for(lambda: not self._full(rows))
                self._stalls += 1
                self._stall_s += time.perf_counter() - start
            self._raise()
            if not self._over:
                self._waiting.append(writes)
                self._waiting_rows += rows
            return not self._over

    def time(self, number: int, decisions: int, spent: Mapping[str, Spent]) -> None:
        """Add what the phases of a round took; it is written with the next flush."""
        with self._condition:
            if self._over:
                return
            for phase, (wall, cpu) in spent.items():
                before = self._spent.get((number, phase), (0, 0.0, 0.0))
                self._spent[number, phase] = (before[0] + decisions, before[1] + wall, before[2] + cpu)

    def flush(self) -> None:
        """Wait until everything queued so far is in the file."""
        with self._condition:
            self._asked += 1
            mine = self._asked
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._flushed >= mine or self._over)
            self._raise()

    def close(self, status: Status, reason: str | None = None) -> None:
        """Write what waits and how the run ended. Closing again does nothing."""
        with self._condition:
            self._end = self._end or (status, reason)
            self._condition.notify_all()
        self._thread.join()
        self._raise()

    def _full(self, rows: int) -> bool:
        return bool(self._waiting) and self._waiting_rows + rows > self._capacity and not self._over

    def _raise(self) -> None:
        """Tell of the writer's failure, once."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    # From here on everything runs in the writer's thread.

    def _write(self) -> None:
        failure: BaseException | None = None
        try:
            self._keep_writing()
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.InterfaceError) as error:
            # Not a trouble of the disk but a mistake of ours: whoever calls next gets to see it as it is.
            failure = error
        except (sqlite3.Error, OSError) as error:
            failure = self._in_words(error)
        except BaseException as error:
            failure = error
        # Before the first flush nothing would be lost by stopping.
        if failure is not None and self._goes_on and self._flushed:
            self._report(f"recording ended, the run goes on without: {failure}")
            failure = None
        with self._condition:
            self._failure, self._over = failure, True
            self._waiting.clear()
            self._condition.notify_all()

    def _keep_writing(self) -> None:
        writer = Writer(self.path, self._run, self._rules, self._kept)
        try:
            due = time.monotonic()
            while True:
                batch = self._take(due - time.monotonic())
                due = time.monotonic() + FLUSH_EVERY
                writer.flush(batch)
                with self._condition:
                    self._flushed = batch.asked
                    self._condition.notify_all()
                if batch.end is not None:
                    return
        except BaseException as error:
            writer.give_up(f"recording ended: {error}")
            raise
        finally:
            writer.close()

    def _take(self, seconds: float) -> Batch:
        """Take what waits: when it is time, when somebody asks, or when the buffer is full."""
        with self._condition:
            self._condition.wait_for(
                lambda: self._end is not None or self._asked > self._flushed or self._stalled,
                timeout=max(seconds, 0.0),
            )
            batch = Batch(self._waiting, self._spent, self._stalls, self._stall_s, self._asked, self._end)
            self._waiting, self._spent, self._waiting_rows, self._stalled = [], {}, 0, False
            self._condition.notify_all()
            return batch

    def _in_words(self, error: Exception) -> EsperError:
        reason = getattr(error, "strerror", None) or str(error)
        if not self._flushed:
            return EsperError(f"cannot write {self.path}: {reason}; free the disk or choose another folder")
        return EsperError(f"cannot write {self.path}: {reason}; what was recorded before is kept in it")
