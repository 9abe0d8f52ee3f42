"""What the commands of `esper exam` share: tasks, tables and progress."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from esper.leyline.config import ContextConfig, PopulationConfig
from esper.scripts.running import Interrupt
from esper.tolaria.machine import check_device, tune_process
from esper.tolaria.tasks import Task, load_hosts

PIPE_WIDTH = 120
"""Characters of a line where the output is no terminal."""


class Stopped(Exception):
    """Ctrl-C was pressed."""


@contextlib.contextmanager
def watched(console: Console, interrupt: Interrupt) -> Iterator[Callable[[str, float], None]]:
    """Show what is being done and how long it will take; stop where ctrl-C asks for it."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(
        *columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console
    ) as progress:
        bar = progress.add_task("", total=1.0)

        def told(what: str, share: float) -> None:
            progress.update(bar, completed=share, description=what)
            if interrupt.asked:
                raise Stopped

        yield told


def begin(config: PopulationConfig, contexts: ContextConfig) -> list[Task]:
    """Prepare the machine, and load every task with its hosts."""
    check_device(config.device)
    tune_process(1)
    return load_hosts(config, contexts)


def wide_console() -> Console:
    """Tables of many columns need more than the 80 characters that a pipe is taken to have."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)


def plain_table(title: str, *columns: str) -> Table:
    """Give a table whose columns of words stand left and whose numbers stand right."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        words = column in ("host", "plan", "arm", "policy", "against", "chosen by")
        table.add_column(column, justify="left" if words else "right", no_wrap=not words)
    return table
