"""Controllers by name."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from esper.leyline.errors import EsperError
from esper.leyline.view import Controller
from esper.tamiyo.controllers.heuristic import HeuristicController
from esper.tamiyo.controllers.never import NeverController
from esper.tamiyo.controllers.periodic import PeriodicController
from esper.tamiyo.controllers.random import RandomController


@dataclass(frozen=True)
class Setting:
    """What is known when a controller is made: see `make_controller`."""

    rows: int
    slots: int
    seed: int
    row_ids_R: torch.Tensor
    device: torch.device | str


CONTROLLERS: dict[str, Callable[[Setting], Controller]] = {
    "never": lambda s: NeverController(s.rows, device=s.device),
    "random": lambda s: RandomController(s.seed, s.row_ids_R, slots=s.slots),
    "periodic": lambda s: PeriodicController(device=s.device),
    "heuristic": lambda s: HeuristicController(s.rows, s.slots, device=s.device),
}


def make_controller(
    name: str,
    *,
    rows: int,
    slots: int,
    seed: int,
    row_ids_R: torch.Tensor,
    device: torch.device | str = "cpu",
) -> Controller:
    """Make a controller for one episode.

    Parameters
    ----------
    name
        Key of `CONTROLLERS`.
    rows
        Number of rows.
    slots
        Slots of each row.
    seed
        Seed of the run.
    row_ids_R
        Int64, the identities of the rows.
    device
        Where the views live.

    Raises
    ------
    EsperError
        No controller has this name.
    """
    if name not in CONTROLLERS:
        raise EsperError(f"controller: unknown controller {name!r}; known: {', '.join(CONTROLLERS)}")
    return CONTROLLERS[name](Setting(rows, slots, seed, row_ids_R.to(device), device))
