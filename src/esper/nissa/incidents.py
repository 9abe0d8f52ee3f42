"""Incidents: limits with hysteresis over what was just written, one open incident for each kind and subject."""

from __future__ import annotations

import sqlite3
import tomllib
from importlib.resources import files
from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator

HEARTBEAT_LATE = "heartbeat_late"
"""The kind whose limit also says when a silent run is no longer believed to run."""


class Rule(BaseModel):
    """One kind of incident; see incidents.toml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str
    observations: str
    open_below: float | None = None
    close_above: float | None = None
    open_above: float | None = None
    close_below: float | None = None

    @model_validator(mode="after")
    def _closes_inside(self) -> Self:
        for opens, closes, inside in (
            (self.open_below, self.close_above, 1),
            (self.open_above, self.close_below, -1),
        ):
            if (opens is None) != (closes is None):
                raise ValueError("a limit needs both sides: where it opens and where it closes")
            if opens is not None and closes is not None and (closes - opens) * inside < 0:
                raise ValueError(f"closes at {closes:g}, outside of where it opens, {opens:g}")
        if self.open_below is None and self.open_above is None:
            raise ValueError("no limit")
        if self.close_above is not None and self.close_below is not None and self.close_above > self.close_below:
            raise ValueError("nothing lies inside both limits")
        return self

    def broken(self, value: float) -> float | None:
        """The limit that a value breaks, None if it breaks none."""
        if self.open_below is not None and value < self.open_below:
            return self.open_below
        if self.open_above is not None and value > self.open_above:
            return self.open_above
        return None

    def over(self, value: float) -> bool:
        """Whether a value is far enough inside all limits."""
        return (self.close_above is None or value >= self.close_above) and (
            self.close_below is None or value <= self.close_below
        )


def read_rules(text: str) -> dict[str, Rule]:
    """Rules by kind, from TOML.

    Raises
    ------
    ValueError
        The text is no TOML, or a rule is wrong.
    """
    return {kind: Rule.model_validate(table) for kind, table in tomllib.loads(text).items()}


def default_rules() -> dict[str, Rule]:
    """The rules that come with Esper."""
    return read_rules(files(__package__).joinpath("incidents.toml").read_text())


class Watch:
    """Opens, follows and closes incidents.

    Parameters
    ----------
    rules
        By kind.
    """

    def __init__(self, rules: dict[str, Rule]) -> None:
        self._rules = rules
        self._seen = dict.fromkeys(rules, 0.0)
        self._open: dict[tuple[str, str], tuple[int, float, float]] = {}
        """Number, worst value and broken limit of what is open."""

    def look(self, db: sqlite3.Connection, now: float) -> None:
        """Judge what was written since the last look."""
        for kind, rule in self._rules.items():
            observations = db.execute(rule.observations, {"since": self._seen[kind], "now": now}).fetchall()
            for mark, number, subject, value in observations:
                self._seen[kind] = max(self._seen[kind], mark)
                if value is not None:
                    self._judge(db, kind, subject, value, number, now)

    def _judge(
        self, db: sqlite3.Connection, kind: str, subject: str, value: float, number: int | None, now: float
    ) -> None:
        rule, key = self._rules[kind], (kind, subject)
        if key in self._open:
            incident, worst, limit = self._open[key]
            if rule.over(value):
                closing = "UPDATE incident SET closed_round = ?, closed_unix_s = ? WHERE incident = ?"
                db.execute(closing, (number, now, incident))
                del self._open[key]
            elif abs(value - limit) > abs(worst - limit) and rule.broken(value) == limit:
                worsening = "UPDATE incident SET value = ?, message = ? WHERE incident = ?"
                db.execute(worsening, (value, rule.text.format(value=value, limit=limit), incident))
                self._open[key] = (incident, value, limit)
        elif (broken := rule.broken(value)) is not None:
            message = rule.text.format(value=value, limit=broken)
            columns = "kind, subject, message, value, opened_round, opened_unix_s"
            cursor = db.execute(
                f"INSERT INTO incident ({columns}) VALUES (?, ?, ?, ?, ?, ?)",
                (kind, subject, message, value, number, now),
            )
            self._open[key] = (int(cursor.lastrowid or 0), value, broken)
