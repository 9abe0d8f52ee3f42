"""The named views: questions about a run, and the SQL that answers them."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class View:
    """A view: its SQL begins with the question that it answers, as a comment."""

    name: str
    question: str
    sql: str


@cache
def views() -> dict[str, View]:
    """Every view by name, in alphabetical order."""
    found = {}
    for file in sorted(files(__package__).joinpath("views").iterdir(), key=lambda f: f.name):
        name, sql = file.name.removesuffix(".sql"), file.read_text()
        found[name] = View(name, sql.partition("\n")[0].removeprefix("--").strip(), sql)
    return found


def create_views(db: sqlite3.Connection) -> None:
    """Make every view for one connection; the file is not touched."""
    for view in views().values():
        db.execute(f"CREATE TEMP VIEW {view.name} AS {view.sql}")
