"""Controllers by name."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from esper.leyline.errors import EsperError
from esper.leyline.view import Controller
from esper.tamiyo.controllers.heuristic import HeuristicController
from esper.tamiyo.controllers.never import NeverController
from esper.tamiyo.controllers.periodic import PeriodicController
from esper.tamiyo.controllers.policy import PolicyController
from esper.tamiyo.controllers.random import RandomController
from esper.tamiyo.policy.saved import load_policy


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
POLICIES = {"policy": False, "greedy": True}
"""Prefix of a saved policy's folder, and whether it takes the most likely choices instead of drawing."""


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
        Key of `CONTROLLERS`, or `policy:FOLDER` or `greedy:FOLDER` for a saved policy.
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
        No controller has this name, or the policy cannot be used.
    """
    row_ids_R = row_ids_R.to(device)
    kind, colon, folder = name.partition(":")
    if colon and kind in POLICIES:
        return PolicyController(load_policy(Path(folder), device), seed, row_ids_R, greedy=POLICIES[kind])
    if name not in CONTROLLERS:
        known = ", ".join((*CONTROLLERS, *(f"{kind}:FOLDER" for kind in POLICIES)))
        raise EsperError(f"controller: unknown controller {name!r}; known: {known}")
    return CONTROLLERS[name](Setting(rows, slots, seed, row_ids_R, device))
