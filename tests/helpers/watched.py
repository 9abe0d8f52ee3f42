"""A record that a test writes by hand, and what the watch says of it."""

import itertools
import sqlite3
from dataclasses import dataclass

from esper.nissa.incidents import Watch, default_rules
from helpers.run_stores import ROUND, insert


@dataclass
class Told:
    """Looks at a record that a test writes round by round."""

    db: sqlite3.Connection

    def __post_init__(self):
        self.watch = Watch(default_rules())
        self.number = itertools.count()

    def only(self, kind):
        """Watch for one kind alone."""
        self.watch = Watch({kind: default_rules()[kind]})

    def round(self, *, ended=True, look=True, **columns):
        """Write a round; give its number."""
        number = next(self.number)
        insert(
            self.db, "round", **{"round": number, **ROUND, "ended_unix_s": 10.0 + number if ended else None, **columns}
        )
        if look:
            self.look(number)
        return number

    def look(self, number=0):
        """Look, at a time that tells the round."""
        self.watch.look(self.db, 1000.0 + number)

    def incidents(self):
        """Give every incident as (kind, subject, value, opened in round, closed in round)."""
        columns = "kind, subject, value, opened_round, closed_round"
        return self.db.execute(f"SELECT {columns} FROM incident ORDER BY incident").fetchall()

    def messages(self):
        """Give the message of every incident."""
        return [message for (message,) in self.db.execute("SELECT message FROM incident ORDER BY incident")]
