"""Reading a run's store: while it is written, after a crash, on another machine; never changing it."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

from esper.karn.views import create_views, views
from esper.leyline.errors import EsperError
from esper.nissa.schema import APPLICATION_ID, SCHEMA_VERSION, STORE, check_sqlite, create, store_files

_HEADER = 100
"""Bytes of a SQLite file's header."""
_STEPS = 10_000
"""Steps of SQLite between two looks for ctrl-C."""
_MOST_ROWS = 2**31 - 1
"""That SQLite's module can be asked for at once."""
_READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_TABLE_PRAGMAS = {"table_info", "table_list"}


@dataclass(frozen=True)
class Answer:
    """What a query gave.

    Attributes
    ----------
    more
        There would have been more rows than the limit.
    """

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    more: bool


class RunReader:
    """A run's store, open for questions.

    Parameters
    ----------
    run
        Folder of the run, or its store.
    other
        A second run for `run_diff`, reachable as schema `other`.

    Raises
    ------
    EsperError
        There is no run, or its store is damaged, no store of Esper's, or from a newer Esper.
    """

    def __init__(self, run: Path, other: Path | None = None) -> None:
        check_sqlite()
        self.path = _find(run)
        with contextlib.ExitStack() as stack:
            self._db = _open(self.path, stack)
            if other is None:
                # Views of two runs find an empty one.
                name = f"file:esper-{id(self)}?mode=memory&cache=shared"
                create(stack.enter_context(contextlib.closing(sqlite3.connect(name, uri=True))))
            else:
                second = _open(_find(other), stack)
                name = _uri(Path(second.execute("PRAGMA database_list").fetchone()[2]))
            self._db.execute("ATTACH ? AS other", (name,))
            create_views(self._db)
            self._db.set_authorizer(_authorize)
            # The callback lets the interpreter notice ctrl-C in the middle of a long query.
            self._db.set_progress_handler(lambda: 0, _STEPS)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def query(self, sql: str, limit: int) -> Answer:
        """Answer one SELECT with at most `limit` rows.

        Raises
        ------
        EsperError
            The statement is wrong or would change something, or the file is damaged.
        KeyboardInterrupt
            It was interrupted.
        """
        with _in_words(self.path):
            cursor = self._db.execute(sql)
            rows = cursor.fetchmany(min(limit + 1, _MOST_ROWS))
            columns = tuple(description[0] for description in cursor.description or ())
            return Answer(columns, rows[:limit], len(rows) > limit)

    def view(self, name: str, limit: int) -> Answer:
        """Answer a named view's question.

        Raises
        ------
        EsperError
            There is no such view.
        """
        if name not in views():
            raise EsperError(f"view: unknown view {name!r}; known: {', '.join(views())}")
        return self.query(f"SELECT * FROM {name}", limit)


def _find(run: Path) -> Path:
    path = run / STORE if run.is_dir() else run
    if not path.is_file():
        raise EsperError(f"run: no run at {run}; name the folder of a run, or its {STORE}")
    return path


def _uri(path: Path) -> str:
    return f"file:{quote(str(path.resolve()))}?mode=ro"


def _open(path: Path, stack: contextlib.ExitStack) -> sqlite3.Connection:
    """Open a store that nobody else may be able to write beside: a copied file, a folder that is read-only."""
    with _in_words(path):
        _check_header(path)
        try:
            return _connect(path, stack)
        except sqlite3.OperationalError:
            # A write-ahead log that was left behind needs a folder where SQLite may write; a copy has one.
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            for file in store_files(path):
                if file.exists():
                    shutil.copy(file, folder)
            return _connect(folder / path.name, stack)


def _connect(path: Path, stack: contextlib.ExitStack) -> sqlite3.Connection:
    db = stack.enter_context(contextlib.closing(sqlite3.connect(_uri(path), uri=True, isolation_level=None)))
    begun = db.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'run'").fetchone() == (1,)
    if not begun or db.execute("SELECT count(*) FROM run").fetchone() != (1,):
        raise EsperError(f"{path}: the run was not begun; nothing to read")
    return db


def _check_header(path: Path) -> None:
    """Tell other files and newer stores from ours, and a cut one from a whole one."""
    with path.open("rb") as file:
        header = file.read(_HEADER)
    if len(header) < _HEADER or not header.startswith(b"SQLite format 3\0"):
        raise EsperError(f"{path}: not a run store (no SQLite file); name the {STORE} of a run")
    pages, version, application = (int.from_bytes(header[at : at + 4], "big") for at in (28, 60, 68))
    if application != APPLICATION_ID:
        raise EsperError(f"{path}: a SQLite file, but not a run store of Esper's; name the {STORE} of a run")
    if version > SCHEMA_VERSION:
        raise EsperError(
            f"{path}: written by a newer Esper (schema {version}, this one reads {SCHEMA_VERSION}); upgrade Esper"
        )
    page_size = int.from_bytes(header[16:18], "big")
    log = store_files(path)[1]
    if log.exists() and log.stat().st_size:
        # While pages move in from the log, the file may be shorter than it says.
        return
    if path.stat().st_size < pages * (page_size if page_size > 1 else 65536):
        raise EsperError(f"{path}: damaged, its end is missing; take another copy")


def _authorize(action: int, first: str | None, second: str | None, database: str | None, source: str | None) -> int:
    """Let a query read and nothing else."""
    if action in _READING or (action == sqlite3.SQLITE_PRAGMA and first in _TABLE_PRAGMAS):
        return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY


@contextlib.contextmanager
def _in_words(path: Path) -> Iterator[None]:
    """Say in one line what SQLite found wrong."""
    try:
        yield
    except UnicodeEncodeError as error:
        raise EsperError("query: not valid text") from error
    except (sqlite3.Error, sqlite3.Warning, OSError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        if text == "interrupted":
            raise KeyboardInterrupt from error
        if "not authorized" in text or "authorization denied" in text:
            raise EsperError("query: a store is only read; use one SELECT") from error
        if isinstance(error, OSError):
            raise EsperError(f"{path}: cannot be read: {error.strerror or error}") from error
        if isinstance(error, sqlite3.OperationalError | sqlite3.ProgrammingError | sqlite3.Warning):
            raise EsperError(f"query: {text}; tables and views: esper query RUN") from error
        raise EsperError(f"{path}: damaged ({text}); take another copy") from error
