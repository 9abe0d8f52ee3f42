"""`esper query` and `esper runs`: what a run recorded, as a table, CSV or JSON."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from esper.karn.reader import Answer, RunReader
from esper.karn.views import views
from esper.leyline.errors import EsperError
from esper.nissa.schema import STORE

Format = Literal["table", "csv", "json"]
_PIPE_WIDTH = 10_000
"""Columns of a page without edges: a line of a table stays one line."""


def query(run: Path, sql: str, view: str, other: Path | None, form: Format, limit: int) -> int:
    """Answer a question about a run; without one, list the questions that have names."""
    if sql and view:
        raise EsperError("query: a SELECT and --view are two questions; ask one")
    if limit < 1:
        raise EsperError(f"limit: at least 1 row; got {limit}")
    with RunReader(run, other) as reader:
        if sql:
            answer = reader.query(sql, limit)
        elif view:
            answer = reader.view(view, limit)
        else:
            answer = Answer(("view", "question"), [(v.name, v.question) for v in views().values()], more=False)
    _WRITERS[form](answer)
    if answer.more:
        print(f"esper: only the first {limit:,} rows; --limit N for more", file=sys.stderr)
    return 0


def runs(folder: Path) -> int:
    """List the runs below a folder, the latest first."""
    if not folder.is_dir():
        raise EsperError(f"folder: no folder {folder}; name one with runs in it")
    stores = sorted(folder.rglob(STORE))
    if not stores:
        raise EsperError(f"folder: no runs in {folder}; esper grow makes one")
    found = sorted(((store, _facts(store)) for store in stores), key=lambda pair: float(pair[1].get("age_s", math.inf)))
    console = _console()
    names = ("run", "status", "task", "controller", "seed", "test accuracy", "parameters", "incidents", "begun")
    table = Table(*names, box=SIMPLE_HEAD)
    for store, facts in found:
        table.add_row(*_line(store, folder, facts))
    console.print(table)
    return 0


def _facts(store: Path) -> dict[str, Any]:
    """The one row of view `now`, or under `unreadable` why there is none."""
    try:
        with RunReader(store) as reader:
            answer = reader.view("now", 1)
    except EsperError as error:
        return {"unreadable": str(error).removeprefix(f"{store}: ")}
    facts = dict(zip(answer.columns, answer.rows[0], strict=True))
    if not all(isinstance(facts[name], kind) for name, kind in _KINDS.items()):
        return {"unreadable": "damaged: what it says of the run makes no sense"}
    return facts


_KINDS = {
    "status": str,
    "task": str,
    "host": str,
    "controller": str,
    "seed": int,
    "age_s": float,
    "open_incidents": int,
}
"""What the list needs of a run, and cannot say without."""


def _line(store: Path, folder: Path, facts: dict[str, Any]) -> list[Text]:
    # As text: names may hold what rich takes for markup.
    name = Text(str(store.parent.relative_to(folder)))
    if "unreadable" in facts:
        return [name, Text(f"unreadable: {facts['unreadable']}", style="red")]
    status = facts["status"]
    if status == "running":
        status = f"running, {facts['progress_share'] or 0:.0%}"
    accuracy, parameters, incidents = (facts[column] for column in ("test_accuracy", "parameters", "open_incidents"))
    others = (
        f"{facts['task']} ({facts['host']})",
        facts["controller"],
        str(facts["seed"]),
        "" if accuracy is None else f"{accuracy:.1%}",
        "" if parameters is None else f"{parameters:,.0f}",
        str(incidents) if incidents else "",
        f"{_span(facts['age_s'])} ago",
    )
    return [name, Text(status, style=_STATUS_STYLE.get(facts["status"], "")), *map(Text, others)]


_STATUS_STYLE = {"running": "cyan", "finished": "green", "interrupted": "yellow", "failed": "red", "lost": "red"}


def _span(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=_PIPE_WIDTH)


def _write_table(answer: Answer) -> None:
    table = Table(box=SIMPLE_HEAD)
    for at, name in enumerate(answer.columns):
        number = all(isinstance(row[at], int | float | None) for row in answer.rows)
        table.add_column(Text(name), justify="right" if number else "left")
    for row in answer.rows:
        table.add_row(*(Text(_cell(value)) for value in row))
    _console().print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "·"
    return f"{value:.6g}" if isinstance(value, float) else str(_readable(value))


def _readable(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else value


def _write_csv(answer: Answer) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(answer.columns)
    writer.writerows([_readable(value) for value in row] for row in answer.rows)


def _write_json(answer: Answer) -> None:
    """One object for each row; what is not a finite number has no place in JSON and becomes null."""
    rows = [{name: _plain(value) for name, value in zip(answer.columns, row, strict=True)} for row in answer.rows]
    print(json.dumps(rows, indent=1))


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else _readable(value)


_WRITERS = {"table": _write_table, "csv": _write_csv, "json": _write_json}
