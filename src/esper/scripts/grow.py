"""`esper grow`: grow one network, train its controls, save everything."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path

from rich.console import Console

from esper.karn.reader import RunReader
from esper.leyline.config import CONFIG, RUN_FOLDER, RunConfig
from esper.leyline.errors import EsperError
from esper.scripts.display import Display, result_table
from esper.scripts.errors import INTERRUPTED
from esper.scripts.running import Interrupt, open_store
from esper.simic.grow import ARMS, GROWN, ROW, Arm, ArmResult
from esper.simic.run_folder import RunFolder
from esper.tolaria.machine import check_device, tune_process
from esper.tolaria.tasks import load_task

MOST_INCIDENTS = 10
"""How many are told of at the end; the store has all."""


def grow(config: RunConfig, *, out: Path | None, replace: bool) -> int:
    """Grow one network and compare it with its controls; give the exit code."""
    console = Console()
    check_device(config.device)
    # One small network is no faster on two threads, and several times slower where another process wants the second.
    tune_process(1)
    kind, _, saved = config.controller.partition(":")
    who = f"{kind}-{Path(saved).name}" if saved else kind
    path = out or RUN_FOLDER / f"{config.task}-{config.host}-{who}-seed{config.seed}"
    task = load_task(config.task, config.host, config.device)
    # What is wrong with the configuration shows here, before anything is written.
    arms = [Arm(config, task, GROWN)]
    folder = RunFolder(path, config, replace=replace)
    interrupt = Interrupt()
    results: list[ArmResult] = []
    with (
        open_store(folder, config, "grow", config.training.horizon * len(ARMS)) as store,
        interrupt.watching(),
        Display(console, config, len(ARMS)) as display,
    ):
        for name in ARMS:
            arm = arms.pop() if arms else Arm(config, task, name)
            for line, events in arm.run(lambda: interrupt.asked, store):
                display.show(name, line, events)
            if name == GROWN:
                folder.model(arm.episode.population, ROW)
            if arm.episode.done:
                results.append(arm.result())
            if interrupt.asked:
                break
        finished = len(results) == len(ARMS)
        if store is not None:
            store.close("finished" if finished else "interrupted")
    if results:
        console.print(result_table(results))
    if not finished:
        again = f"esper grow --config {shlex.quote(str(path / CONFIG))} --out {shlex.quote(str(path) + '-again')}"
        console.print(
            f"Stopped after decision {arm.episode.decision} of {config.training.horizon} ({arm.name}). "
            f"Kept in {path}: the record and the model so far. "
            f"A stopped run cannot go on yet; run it again with: {again}",
            soft_wrap=True,
        )
        return INTERRUPTED
    console.print(f"Saved in {path}. Load it without Esper: python {path / 'model.py'}", soft_wrap=True)
    # Nothing was to be recorded, or the run went on without its store: then there is nothing to tell.
    with contextlib.suppress(EsperError):
        _tell_incidents(console, folder.store)
        console.print(f"What happened, and why: esper query {shlex.quote(str(path))} --view events", soft_wrap=True)
    return 0


def _tell_incidents(console: Console, store: Path) -> None:
    """Say what deserves attention, in the words of the store."""
    with RunReader(store) as reader:
        for subject, message in reader.query("SELECT subject, message FROM incidents", MOST_INCIDENTS).rows:
            console.print(f"Incident ({subject}): {message}", soft_wrap=True, highlight=False)
