"""The folder of one run.

config.json          the resolved configuration: `esper grow --config config.json` repeats the run
run.sqlite           everything that happened (see nissa)
model.safetensors    the grown network; model.json describes its modules
model.py             plain PyTorch loader, needs neither Esper nor this folder's other files
checkpoints/         where it was, to go on from
policy-best/         after `esper train` instead of the network: the policy that did best on the selection split
plans.json           after `esper exam headroom` instead: the plans that were tried,
cells/               what each did, a file for each population,
headroom.json        and what the best of them are worth on fresh starts
comparison.json      after `esper exam compare` instead: what every arm reached, start by start
"""

from __future__ import annotations

import json
import os
import weakref
from pathlib import Path

from safetensors.torch import save

from esper.kasmina import plain
from esper.kasmina.export import describe
from esper.kasmina.population import Population
from esper.leyline.config import CONFIG, CompareConfig, HeadroomConfig, PopulationConfig, RunConfig, TrainConfig
from esper.leyline.errors import EsperError
from esper.leyline.files import hold_folder, is_leftover, remove_leftovers, write_atomic
from esper.nissa.schema import STORE, store_files
from esper.tamiyo.policy.saved import DESCRIPTION, WEIGHTS
from esper.tolaria.checkpoints import FOLDER as CHECKPOINTS
from esper.tolaria.checkpoints import Checkpoints

MODEL, MODEL_DESCRIPTION, LOADER = "model.safetensors", "model.json", "model.py"
BEST_POLICY = "policy-best"
HEADROOM, COMPARISON = "headroom.json", "comparison.json"
PLANS, CELLS = "plans.json", "cells"
_MADE = (
    *(MODEL, MODEL_DESCRIPTION, LOADER, HEADROOM, PLANS, COMPARISON),
    *(f"{BEST_POLICY}/{name}" for name in (WEIGHTS, DESCRIPTION)),
)
"""Files that a run makes beside its configuration and its store."""


class RunFolder:
    """Makes the folder of a run and keeps it to itself; every file that it writes is whole at any moment.

    Parameters
    ----------
    path
        Folder to create.
    config
        Written at once.
    replace
        Remove the files of an earlier run that lies there; files that are not Esper's stay.
    resume
        Go on in the folder of a run as it is.

    Attributes
    ----------
    store
        Where the run's store belongs.

    Raises
    ------
    EsperError
        The folder holds a run or something else, another process works in it, or it cannot be written.
    """

    def __init__(self, path: Path, config: PopulationConfig, *, replace: bool, resume: bool = False) -> None:
        self.path, self.store = path, path / STORE
        held = hold_folder(path) if resume else _make_room(path, replace=replace)
        weakref.finalize(self, os.close, held)
        for folder in (path, path / BEST_POLICY, path / CHECKPOINTS, path / CELLS):
            remove_leftovers(folder)
        if not resume:
            write_atomic(path / CONFIG, (config.model_dump_json(indent=2) + "\n").encode())

    def model(self, population: Population, row: int) -> None:
        """Save one row as a plain PyTorch model with its loader."""
        network, state = describe(population, row)
        weights = save({name: t.cpu() for name, t in state.items()})
        description = {"network": network, "blake2b": plain.seal(network, weights)}
        write_atomic(self.path / MODEL_DESCRIPTION, (json.dumps(description, indent=1) + "\n").encode())
        write_atomic(self.path / MODEL, weights)
        write_atomic(self.path / LOADER, Path(plain.__file__).read_bytes())


def _is_run(path: Path) -> bool:
    try:
        text = (path / CONFIG).read_bytes()
    except OSError:
        return False
    return any(_describes(kind, text) for kind in (RunConfig, TrainConfig, HeadroomConfig, CompareConfig))


def _describes(kind: type[PopulationConfig], text: bytes) -> bool:
    try:
        kind.model_validate_json(text)
    except ValueError:
        return False
    return True


def _make_room(path: Path, *, replace: bool) -> int:
    """Make the folder, or empty that of an earlier run, and hold it; give the descriptor that does."""
    try:
        if path.exists():
            if not path.is_dir():
                raise EsperError(f"out: {path} is a file; name a folder")
            held = not all(map(is_leftover, path.iterdir()))
            if held and not _is_run(path):
                raise EsperError(f"out: {path} holds other files; name a new or empty folder")
            if held and not replace:
                raise EsperError(f"out: {path} holds a run; name another folder, or add --replace to overwrite it")
        path.mkdir(parents=True, exist_ok=True)
        descriptor = hold_folder(path)
        # The configuration stays until the new one replaces it: until then it still is a run.
        for file in (*store_files(path / STORE), *(path / name for name in _MADE), *(path / CELLS).glob("*.json")):
            file.unlink(missing_ok=True)
        Checkpoints(path).remove()
    except OSError as error:
        raise EsperError(f"out: cannot use {path}: {error.strerror or error}; name a folder you may write") from error
    return descriptor
