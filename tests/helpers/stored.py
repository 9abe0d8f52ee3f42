"""The store of a run as anybody reads it: with the SQLite of Python, and without Esper."""

import sqlite3
from contextlib import closing

# What two runs of one configuration do not share: when, for how long and in which process they ran, and what somebody
# committed or changed in the repository in between.
_OF_THE_MOMENT = {"run_id", "process_id", "flushes", "stalls", "commit_hash"}
_TABLES_OF_THE_MOMENT = {"timing", "machine", "incident"}


def stored(path, sql, *values):
    """Give the rows of a query on a store as dicts."""
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
        db.row_factory = sqlite3.Row
        return [dict(row) for row in db.execute(sql, values)]


def column(path, sql, *values):
    """Give the one column of a query on a store."""
    return [value for row in stored(path, sql, *values) for value in row.values()]


def facts(path):
    """Give every table of a store in the order of its key, less what depends on the moment."""
    tables = column(path, "SELECT name FROM sqlite_schema WHERE type = 'table'")
    return {table: _facts_of(path, table) for table in set(tables) - _TABLES_OF_THE_MOMENT}


def _facts_of(path, table):
    every = stored(path, f"SELECT name, pk FROM pragma_table_info('{table}')")
    key = [row["name"] for row in sorted(every, key=lambda row: row["pk"]) if row["pk"]]
    names = [row["name"] for row in every if not row["name"].endswith("_s") and row["name"] not in _OF_THE_MOMENT]
    return stored(path, f"SELECT {', '.join(names)} FROM {table} ORDER BY {', '.join(key)}")


def check_whole(path):
    """Check that a store is sound and that nothing lies beside it that it would need."""
    assert column(path, "PRAGMA integrity_check") == ["ok"]
    assert [file.name for file in path.parent.glob(f"{path.name}-*")] == []
