"""What long commands share: ending when asked to, going on where they were, and the store that they record into."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from esper.leyline.config import CONFIG, PopulationConfig
from esper.leyline.errors import EsperError
from esper.nissa.store import RunStore
from esper.nissa.writer import Kept
from esper.scripts.configs import first_difference, read_config
from esper.simic.recorder import run_columns
from esper.simic.run_folder import RunFolder
from esper.tolaria.checkpoints import Checkpoint, Checkpoints

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


def last_checkpoint(
    config: PopulationConfig, resume: Path | None, out: Path | None, replace: bool
) -> Checkpoint | None:
    """Find where a run was that is to go on; None where a new one is to begin.

    Parameters
    ----------
    config, resume, out, replace
        What the command was told.

    Raises
    ------
    EsperError
        The run was begun with other settings, or left no checkpoint.
    """
    if resume is None:
        return None
    check_resumable(config, resume, out, replace)
    checkpoint = Checkpoints(resume).load(report)
    if checkpoint is None:
        raise EsperError(f"resume: {resume} has no checkpoint that can be used; begin again with --out and --replace")
    return checkpoint


def check_resumable(config: PopulationConfig, resume: Path, out: Path | None, replace: bool) -> None:
    """Refuse to go on in a folder with other settings than its own.

    Raises
    ------
    EsperError
        The run was begun with other settings, or another folder was named as well.
    """
    if out is not None or replace:
        raise EsperError("resume: a run goes on in its own folder; leave --out and --replace out")
    differing = first_difference(read_config(resume / CONFIG, type(config)), config)
    if differing is not None:
        name, before, now = differing
        raise EsperError(
            f"resume: {name} is {before} in {resume} and {now} here; "
            "a run goes on only as it was begun: leave the setting out, or begin a new run"
        )


@contextmanager
def open_store(
    folder: RunFolder,
    config: PopulationConfig,
    command: str,
    planned_decisions: int,
    *,
    kept: Kept | None = None,
) -> Iterator[RunStore | None]:
    """Open the run's store, or go on in it (see `RunStore`); None where nothing is to be recorded."""
    recording = config.recording
    if recording.record == "off":
        yield None
        return
    columns = run_columns(config, command, planned_decisions)
    with RunStore(folder.store, columns, error=recording.record_error, report=report, kept=kept) as store:
        yield store


def report(line: str) -> None:
    """Say something that did not stop the run."""
    print(f"esper: {line}", file=sys.stderr)
