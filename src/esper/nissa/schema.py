"""The schema of a run's store, and how a file is known to be one."""

from __future__ import annotations

import sqlite3
from importlib.resources import files
from pathlib import Path

from esper.leyline.checks import ALL_GATE_CHECKS, CHECK_TEXT, GATE_CHECKS, Check
from esper.leyline.errors import EsperError

STORE = "run.sqlite"
"""Name of the store in a run's folder."""
APPLICATION_ID = 0x45535052
"""Marks a SQLite file as an Esper store ("ESPR")."""
SCHEMA_VERSION = 3
"""Goes up with every change of schema.sql."""
OLDEST_SQLITE = (3, 37, 0)
"""The first with STRICT tables."""

QUANTITIES: dict[Check, str] = {
    Check.HOST_LOSS: "host_loss_nats",
    Check.TRAINING_DECISIONS: "training_decisions",
    Check.GRADIENT_FINITE: "gradient_norm",
    Check.GRADIENT_VANISHING: "gradient_ratio",
    Check.GRADIENT_EXPLODING: "gradient_ratio",
    Check.INCUBATOR_GAIN: "incubator_gain_nats",
    Check.ALPHA_AT_TARGET: "alpha_distance",
    Check.PROBATION_DECISIONS: "probation_decisions",
    Check.CONTRIBUTION: "contribution_nats",
}
"""Column of `transition` that holds what a check measured."""


def create(db: sqlite3.Connection) -> None:
    """Make the tables of an empty file; not within a transaction."""
    db.executescript(f"BEGIN; {files(__package__).joinpath('schema.sql').read_text()} COMMIT;")
    gate_of = {check: gate.name for gate, checks in GATE_CHECKS.items() for check in checks}
    checks = [(at, gate_of[c], c.name, QUANTITIES[c], CHECK_TEXT[c]) for at, c in enumerate(ALL_GATE_CHECKS)]
    columns = "position, gate, check_name, quantity, meaning"
    db.executemany(f"INSERT INTO gate_check ({columns}) VALUES (?, ?, ?, ?, ?)", checks)
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def check_version(db: sqlite3.Connection, path: Path) -> None:
    """Refuse a file that is no store of this version.

    Raises
    ------
    EsperError
        It is not.
    """
    found = [db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
    if found != [APPLICATION_ID, SCHEMA_VERSION]:
        raise EsperError(f"cannot go on in {path}: it is not a store of this version of Esper; begin a new run")


def tables_with(db: sqlite3.Connection, column: str) -> list[str]:
    """Names of the tables that have a column, such as the round or the decision that a row belongs to."""
    sql = "SELECT t.name FROM pragma_table_list AS t JOIN pragma_table_info(t.name) AS c WHERE c.name = ?"
    return [name for (name,) in db.execute(f"{sql} AND t.type = 'table' AND t.schema = 'main'", (column,))]


def store_files(store: Path) -> list[Path]:
    """The store and what SQLite keeps beside it while it is open."""
    return [store, *(store.with_name(store.name + suffix) for suffix in ("-wal", "-shm"))]


def check_sqlite() -> None:
    """Refuse an SQLite that knows no STRICT tables.

    Raises
    ------
    EsperError
        It is too old.
    """
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        oldest = ".".join(map(str, OLDEST_SQLITE))
        raise EsperError(
            f"SQLite {oldest} or newer is needed, this Python has {sqlite3.sqlite_version}; use a newer Python"
        )
