"""`esper tasks`: what there is to learn."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from esper.tolaria.tasks import TASKS, load_task


def tasks() -> int:
    """List the tasks with their hosts."""
    table = Table("task", "host", "parameters", "slots", "multiply-adds", "about", title="Tasks")
    for config in TASKS.values():
        for which in ("impaired", "ample"):
            host = load_task(config.name, which).host
            numbers = (f"{host.body.parameter_count:,}", str(host.slot_config.slots), f"{host.cost():,}")
            table.add_row(config.name, which, *numbers, config.summary)
    Console().print(table)
    return 0
