"""What long commands share: ending when asked to, and the store that they record into."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from esper.leyline.config import PopulationConfig
from esper.nissa.store import RunStore
from esper.simic.recorder import run_columns
from esper.simic.run_folder import RunFolder

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Ctrl-C, and what a system sends before it shuts down or a scheduler before it takes the machine away."""


class Interrupt:
    """The first signal asks the run to end after its decision; the second ends the process at once."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Take the signal."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Listen for the duration."""
        before = {number: signal.signal(number, self) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def open_store(
    folder: RunFolder,
    config: PopulationConfig,
    command: str,
    planned_decisions: int,
    *,
    keep_rounds: int | None = None,
) -> Iterator[RunStore | None]:
    """Open the run's store, or go on in it (see `RunStore`); None where nothing is to be recorded."""
    recording = config.recording
    if recording.record == "off":
        yield None
        return

    def report(line: str) -> None:
        print(f"esper: {line}", file=sys.stderr)

    columns = run_columns(config, command, planned_decisions)
    with RunStore(folder.store, columns, error=recording.record_error, report=report, keep_rounds=keep_rounds) as store:
        yield store
