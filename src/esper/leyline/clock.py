"""Where the time of a decision goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

Spent = tuple[float, float]
"""Wall time and processor time of the whole process, in seconds."""


class PhaseClock:
    """Adds up the phases of a decision. On a GPU a phase ends when its work is queued, not when it is done."""

    def __init__(self) -> None:
        self._spent: dict[str, Spent] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside as part of a phase."""
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            before = self._spent.get(name, (0.0, 0.0))
            self._spent[name] = (
                before[0] + time.perf_counter() - wall,
                before[1] + time.process_time() - cpu,
            )

    def take(self) -> dict[str, Spent]:
        """Give what was spent since the last time, by phase."""
        spent, self._spent = self._spent, {}
        return spent
