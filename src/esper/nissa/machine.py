"""What a run writes down about where it runs."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sqlite3
import subprocess
from pathlib import Path

import psutil
import torch

from esper import __version__
from esper.nissa.schema import store_files

_SOURCE = Path(__file__).parent


def software() -> dict[str, str | None]:
    """Versions, and the commit of the source, as columns of `run`."""
    return {
        "esper_version": __version__,
        "python_version": platform.python_version(),
        "torch_version": torch.__version__,
        "sqlite_version": sqlite3.sqlite_version,
        "commit_hash": _commit(),
    }


def hardware(device: str) -> dict[str, str | int | None]:
    """Machine and devices, as columns of `run`."""
    on_gpu = torch.device(device).type == "cuda"
    return {
        "machine": socket.gethostname(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processors": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "device": device,
        "accelerator": torch.cuda.get_device_name(device) if on_gpu else None,
        "process_id": os.getpid(),
    }


def _commit() -> str | None:
    """Commit of the checkout that this code runs from; "+" behind it if files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_SOURCE), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        # An installed copy may lie inside somebody else's repository.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


class MachineSampler:
    """Samples of the machine, as columns of `machine`.

    Parameters
    ----------
    store
        File whose disk and size are of interest.
    """

    def __init__(self, store: Path) -> None:
        self._store = store
        self._process = psutil.Process()
        # The first call of each only starts the measurement.
        psutil.cpu_percent()
        self._process.cpu_percent()

    def sample(self) -> dict[str, float | int | None]:
        """One sample, processor use since the one before."""
        on_gpu = torch.cuda.is_initialized()
        return {
            "processor_share": psutil.cpu_percent() / 100,
            "process_processors": self._process.cpu_percent() / 100,
            "memory_bytes": self._process.memory_info().rss,
            "memory_free_bytes": psutil.virtual_memory().available,
            "disk_free_bytes": shutil.disk_usage(self._store.parent).free,
            "store_bytes": sum(file.stat().st_size for file in store_files(self._store) if file.exists()),
            "accelerator_memory_bytes": torch.cuda.memory_reserved() if on_gpu else None,
            "accelerator_free_bytes": torch.cuda.mem_get_info()[0] if on_gpu else None,
        }
