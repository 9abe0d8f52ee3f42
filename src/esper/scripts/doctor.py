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
from rich.markup import escape
from rich.table import Table

from esper import __version__
from esper.karn.reader import RunReader
from esper.leyline.config import RunConfig
from esper.leyline.errors import EsperError
from esper.leyline.files import write_atomic
from esper.nissa.schema import STORE
from esper.nissa.store import RunStore
from esper.scripts import self_test
from esper.scripts.errors import BAD_INPUT
from esper.simic.recorder import run_columns
from esper.tolaria.datasets import DATASETS
from esper.tolaria.machine import tune_process


def _versions() -> str:
    return f"Esper {__version__}, Python {platform.python_version()}, torch {torch.__version__}"


def _processor() -> str:
    # As every command has it, and the self-tests: on more threads small networks are no faster, and slow beside others.
    settled = tune_process(1)
    cores = os.cpu_count() or 1
    return f"{cores} threads; allocator {'tuned' if settled else 'not tuned: not glibc, training may be slower'}"


def _data() -> str:
    sizes = {name: len(load(0).train.y) for name, load in DATASETS.items()}
    return ", ".join(f"{name} {size:,} training examples" for name, size in sizes.items())


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
    "data": _data,
    "row layers": self_test.row_layers,
    "rollback": self_test.rollback,
    "checkpoint": self_test.checkpoint,
    "device": self_test.device,
    "deterministic kernels": self_test.kernels,
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
        # On a broken machine anything can fail, and the other checks are worth seeing all the same.
        except Exception as error:
            failed, result = True, f"FAILED: {_complaint(error)}"
        # What an error says may look like markup.
        table.add_row(name, escape(result), f"{time.perf_counter() - start:.2f}")
    Console().print(table)
    return BAD_INPUT if failed else 0


def _complaint(error: Exception) -> str:
    """What went wrong in one line; of an error that nobody foresaw also its kind."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return first if isinstance(error, EsperError) else f"{type(error).__name__}: {first}".removesuffix(": ")
