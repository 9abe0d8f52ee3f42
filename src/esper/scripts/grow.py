"""`esper grow`: grow one network, train its controls, save everything."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path

from rich.console import Console

from esper.karn.reader import RunReader
from esper.leyline.config import RUN_FOLDER, RunConfig
from esper.leyline.errors import EsperError
from esper.scripts.display import Display, failures_told, result_table
from esper.scripts.errors import INTERRUPTED
from esper.scripts.running import Interrupt, last_checkpoint, open_store
from esper.simic.grow import ARMS
from esper.simic.grow_run import GrowRun
from esper.simic.run_folder import RunFolder
from esper.tolaria.checkpoints import Checkpoint
from esper.tolaria.machine import check_device, tune_process
from esper.tolaria.tasks import Task, load_task

MOST_INCIDENTS = 10
"""How many are told of at the end; the store has all."""


def grow(config: RunConfig, *, out: Path | None, replace: bool, resume: Path | None = None) -> int:
    """Grow one network and compare it with its controls, from the start or from where a run was; give the exit code."""
    console = Console()
    check_device(config.device)
    # One small network is no faster on two threads, and several times slower where another process wants the second.
    tune_process(1)
    kind, _, saved = config.controller.partition(":")
    who = f"{kind}-{Path(saved).name}" if saved else kind
    path = resume or out or RUN_FOLDER / f"{config.task}-{config.host}-{who}-seed{config.seed}"
    checkpoint = last_checkpoint(config, resume, out, replace)
    task = load_task(config.task, config.host, config.device)
    # What is wrong with the configuration shows here, before anything is written.
    run = _run(config, task, path, checkpoint)
    folder = RunFolder(path, config, replace=replace, resume=resume is not None)
    interrupt = Interrupt()
    planned = config.training.horizon * len(ARMS)
    kept = None if checkpoint is None else run.kept
    with (
        open_store(folder, config, "grow", planned, kept=kept) as store,
        interrupt.watching(),
        Display(console, config, planned, run.told) as display,
    ):
        for name, line, events in run.run(lambda: interrupt.asked, folder, store):
            display.show(name, line, events)
        if store is not None:
            store.close("finished" if run.finished else "interrupted")
    if run.results:
        console.print(result_table(run.results))
        for told in failures_told(run.results):
            console.print(told, soft_wrap=True, highlight=False)
    where = shlex.quote(str(path))
    if not run.finished:
        console.print(
            f"Stopped after decision {run.arm.episode.decision} of {config.training.horizon} ({run.arm.name}). "
            f"Kept in {path}: the record and the model so far. Go on with: esper grow --resume {where}",
            soft_wrap=True,
        )
        return INTERRUPTED
    console.print(f"Saved in {path}. Load it without Esper: python {path / 'model.py'}", soft_wrap=True)
    # Nothing was to be recorded, or the run went on without its store: then there is nothing to tell.
    with contextlib.suppress(EsperError):
        _tell_incidents(console, folder.store)
        console.print(f"What happened, and why: esper query {where} --view events", soft_wrap=True)
    return 0


def _run(config: RunConfig, task: Task, path: Path, checkpoint: Checkpoint | None) -> GrowRun:
    try:
        return GrowRun(config, task, checkpoint)
    except (ValueError, KeyError, TypeError) as error:
        if checkpoint is None:
            raise
        raise EsperError(f"resume: the checkpoint in {path} cannot be used: {error}") from error


def _tell_incidents(console: Console, store: Path) -> None:
    """Say what deserves attention, in the words of the store."""
    with RunReader(store) as reader:
        for subject, message in reader.query("SELECT subject, message FROM incidents", MOST_INCIDENTS).rows:
            console.print(f"Incident ({subject}): {message}", soft_wrap=True, highlight=False)
