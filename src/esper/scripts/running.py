"""What long commands share: ctrl-C, and the store that they record into."""

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


class Interrupt:
    """The first ctrl-C asks the run to end after its decision; the second ends the process at once."""

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
        before = signal.signal(signal.SIGINT, self)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


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
