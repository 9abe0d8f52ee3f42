"""Controllers by name."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from esper.leyline.errors import EsperError
from esper.leyline.sites import SlotConfig
from esper.leyline.view import Controller
from esper.tamiyo.controllers.heuristic import HeuristicController
from esper.tamiyo.controllers.never import NeverController
from esper.tamiyo.controllers.periodic import PeriodicController
from esper.tamiyo.controllers.random import RandomController


@dataclass(frozen=True)
class Setting:
    """What is known when a controller is made: see `make_controller`."""

    rows: int
    slot_config: SlotConfig
    fits_SB: torch.Tensor
    horizon: int
    seed: int
    row_ids_R: torch.Tensor
    device: torch.device | str


CONTROLLERS: dict[str, Callable[[Setting], Controller]] = {
    "never": lambda s: NeverController(s.rows, device=s.device),
    "random": lambda s: RandomController(s.seed, s.row_ids_R, slots=s.slot_config.slots),
    "periodic": lambda s: PeriodicController(device=s.device),
    "heuristic": lambda s: HeuristicController(s.rows, s.slot_config.slots, device=s.device),
}


def make_controller(
    name: str,
    *,
    rows: int,
    slot_config: SlotConfig,
    fits_SB: torch.Tensor,
    horizon: int,
    seed: int,
    row_ids: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Controller:
    """Make a controller for one episode.

    Parameters
    ----------
    name
        Key of `CONTROLLERS`.
    rows
        Number of rows.
    slot_config, fits_SB
        Names and kinds of the slots; which blueprints fit.
    horizon
        Decisions of the episode.
    seed
        Seed of the run.
    row_ids
        Int64 [rows], the identities of the rows; 0, 1, ... if left out.
    device
        Where the views live.

    Raises
    ------
    EsperError
        No controller has this name.
    """
    if name not in CONTROLLERS:
        raise EsperError(f"unknown controller {name!r}; known: {', '.join(CONTROLLERS)}")
    ids_R = torch.arange(rows) if row_ids is None else row_ids
    return CONTROLLERS[name](Setting(rows, slot_config, fits_SB, horizon, seed, ids_R.to(device), device))
