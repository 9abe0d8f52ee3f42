"""The folder of one run.

config.json          the resolved configuration: `esper grow --config config.json` repeats the run
history.jsonl        one line for each decision
events.jsonl         one line for each thing that happened to a slot, with its reason
model.safetensors    the grown network; model.json describes its modules
model.py             plain PyTorch loader, needs neither Esper nor this folder's other files
result.json          the final table and how the run ended
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save

from esper.kasmina import plain
from esper.kasmina.export import describe
from esper.kasmina.population import Population
from esper.leyline.config import RunConfig
from esper.leyline.errors import EsperError
from esper.leyline.files import LineFile, write_atomic

CONFIG = "config.json"


class RunFolder:
    """Writes a run; every file is whole at any moment.

    Parameters
    ----------
    path
        Folder to create.
    config
        Written at once.
    replace
        Remove an earlier run that lies there.

    Raises
    ------
    EsperError
        The folder holds a run or something else, or cannot be written.
    """

    def __init__(self, path: Path, config: RunConfig, *, replace: bool) -> None:
        self.path = path
        _make_room(path, replace=replace)
        write_atomic(path / CONFIG, (config.model_dump_json(indent=2) + "\n").encode())
        self._history = LineFile(path / "history.jsonl")
        self._events = LineFile(path / "events.jsonl")

    def decision(self, record: dict[str, Any]) -> None:
        """Append to the history."""
        self._history.write(json.dumps(record, allow_nan=False))

    def event(self, record: dict[str, Any]) -> None:
        """Append to the events."""
        self._events.write(json.dumps(record, allow_nan=False))

    def model(self, population: Population, row: int) -> None:
        """Save one row as a plain PyTorch model with its loader."""
        description, state = describe(population, row)
        write_atomic(self.path / "model.json", (json.dumps(description, indent=1) + "\n").encode())
        write_atomic(self.path / "model.safetensors", save({name: t.cpu() for name, t in state.items()}))
        write_atomic(self.path / "model.py", Path(plain.__file__).read_bytes())

    def result(self, record: dict[str, Any]) -> None:
        """Write how the run ended."""
        write_atomic(self.path / "result.json", (json.dumps(record, indent=2, allow_nan=False) + "\n").encode())

    def close(self) -> None:
        """Close the growing files."""
        for file in (self._history, self._events):
            file.__exit__(None, None, None)


def _make_room(path: Path, *, replace: bool) -> None:
    try:
        if path.exists():
            if not path.is_dir():
                raise EsperError(f"out: {path} is a file; name a folder")
            held = any(path.iterdir())
            is_run = (path / CONFIG).exists()
            if held and not is_run:
                raise EsperError(f"out: {path} holds other files; name a new or empty folder")
            if held and not replace:
                raise EsperError(f"out: {path} holds a run; name another folder, or add --replace to overwrite it")
            if held:
                shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EsperError(f"out: cannot use {path}: {error.strerror or error}; name a folder you may write") from error
