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
HISTORY, EVENTS, RESULT = "history.jsonl", "events.jsonl", "result.json"
MODEL, MODEL_DESCRIPTION, LOADER = "model.safetensors", "model.json", "model.py"


class RunFolder:
    """Writes a run; every file is whole at any moment.

    Parameters
    ----------
    path
        Folder to create.
    config
        Written at once.
    replace
        Remove the files of an earlier run that lies there; files that are not Esper's stay.

    Raises
    ------
    EsperError
        The folder holds a run or something else, or cannot be written.
    """

    def __init__(self, path: Path, config: RunConfig, *, replace: bool) -> None:
        self.path = path
        _make_room(path, replace=replace)
        write_atomic(path / CONFIG, (config.model_dump_json(indent=2) + "\n").encode())
        self._history = LineFile(path / HISTORY)
        self._events = LineFile(path / EVENTS)

    def decision(self, record: dict[str, Any]) -> None:
        """Append to the history."""
        self._history.write(json.dumps(record, allow_nan=False))

    def event(self, record: dict[str, Any]) -> None:
        """Append to the events."""
        self._events.write(json.dumps(record, allow_nan=False))

    def model(self, population: Population, row: int) -> None:
        """Save one row as a plain PyTorch model with its loader."""
        description, state = describe(population, row)
        write_atomic(self.path / MODEL_DESCRIPTION, (json.dumps(description, indent=1) + "\n").encode())
        write_atomic(self.path / MODEL, save({name: t.cpu() for name, t in state.items()}))
        write_atomic(self.path / LOADER, Path(plain.__file__).read_bytes())

    def result(self, record: dict[str, Any]) -> None:
        """Write how the run ended."""
        write_atomic(self.path / RESULT, (json.dumps(record, indent=2, allow_nan=False) + "\n").encode())

    def close(self) -> None:
        """Close the growing files."""
        for file in (self._history, self._events):
            file.__exit__(None, None, None)


def _is_run(path: Path) -> bool:
    try:
        RunConfig.model_validate_json((path / CONFIG).read_bytes())
    except (FileNotFoundError, ValueError):
        return False
    return True


def _make_room(path: Path, *, replace: bool) -> None:
    try:
        if path.exists():
            if not path.is_dir():
                raise EsperError(f"out: {path} is a file; name a folder")
            held = any(path.iterdir())
            if held and not _is_run(path):
                raise EsperError(f"out: {path} holds other files; name a new or empty folder")
            if held and not replace:
                raise EsperError(f"out: {path} holds a run; name another folder, or add --replace to overwrite it")
            # The configuration stays until the new one replaces it: until then it still is a run.
            for name in (HISTORY, EVENTS, RESULT, MODEL, MODEL_DESCRIPTION, LOADER):
                (path / name).unlink(missing_ok=True)
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EsperError(f"out: cannot use {path}: {error.strerror or error}; name a folder you may write") from error
