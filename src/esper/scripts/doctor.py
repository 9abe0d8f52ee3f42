"""`esper doctor`: whether this machine does what Esper needs."""

from __future__ import annotations

import os
import platform
import sqlite3
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from esper import __version__
from esper.karn.reader import RunReader
from esper.kasmina.export import export_row
from esper.kasmina.hosts import Host
from esper.kasmina.population import Population
from esper.leyline.actions import SiteKind
from esper.leyline.config import GrowthConfig, HostConfig, RunConfig
from esper.leyline.errors import EsperError
from esper.leyline.files import write_atomic
from esper.nissa.schema import STORE
from esper.nissa.store import RunStore
from esper.simic.recorder import run_columns
from esper.tolaria.batches import shared
from esper.tolaria.datasets import DATASETS
from esper.tolaria.machine import tune_process


def _versions() -> str:
    return f"Esper {__version__}, Python {platform.python_version()}, torch {torch.__version__}"


def _processor() -> str:
    threads = os.cpu_count() or 1
    settled = tune_process(threads)
    return f"{threads} threads; allocator {'tuned' if settled else 'not tuned: not glibc, training may be slower'}"


def _accelerator() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none; everything runs on the CPU"


def _data() -> str:
    sizes = {name: len(load(0).train.y) for name, load in DATASETS.items()}
    return ", ".join(f"{name} {size:,} training examples" for name, size in sizes.items())


def _row_layers() -> str:
    """Three rows at once against three plain modules."""
    host = Host(HostConfig(kind=SiteKind.IMAGE, widths=(8, 8), norm="batch"), (1, 8, 8), 10)
    population = Population(host, GrowthConfig(), 0, torch.arange(3), dtype=torch.float64)
    x = DATASETS["digits"](0).test.x[:32].double()
    with torch.no_grad():
        logits, _ = population.forward(shared(x, 3, population.lane_axis), population.main_pass, training=False)
        worst = max(float((export_row(population, row)(x) - logits[row]).abs().max()) for row in range(3))
    if not worst < 1e-9:
        raise EsperError(f"rows differ from plain modules by {worst:.1e}; this torch build computes wrongly")
    return f"equal to plain modules to {worst:.0e}"


def _store() -> str:
    """Write a run store and read it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / STORE
        RunStore(path, run_columns(RunConfig(), "doctor", 0)).close("finished")
        with RunReader(path) as reader:
            ((status,),) = reader.query("SELECT status FROM now", 1).rows
    if status != "finished":
        raise EsperError(f"a run store written as finished reads as {status}; this SQLite computes wrongly")
    return f"written and read with SQLite {sqlite3.sqlite_version}"


def _disk() -> str:
    with tempfile.TemporaryDirectory() as folder:
        write_atomic(Path(folder) / "probe", bytes(2**20))
    return "temporary folder takes and syncs 1 MiB"


CHECKS: dict[str, Callable[[], str]] = {
    "versions": _versions,
    "processor": _processor,
    "accelerator": _accelerator,
    "data": _data,
    "row layers": _row_layers,
    "run store": _store,
    "disk": _disk,
}


def doctor() -> int:
    """Run every check; give 0 if all passed, 2 if not."""
    table = Table("check", "result", "seconds", title="esper doctor")
    failed = False
    for name, check in CHECKS.items():
        start = time.perf_counter()
        try:
            result = check()
        except EsperError as error:
            failed, result = True, f"FAILED: {error}"
        table.add_row(name, result, f"{time.perf_counter() - start:.2f}")
    Console().print(table)
    return 2 if failed else 0
