"""The control that every other controller is measured against: the host alone."""

import torch

from esper.leyline.actions import HEAD_COUNT, Op
from esper.leyline.view import PopulationView
from esper.tamiyo.controllers.base import PlainController


class NeverController(PlainController):
    """Always waits.

    Parameters
    ----------
    rows
        Number of rows.
    device
        Where the actions are wanted.
    """

    def __init__(self, rows: int, *, device: torch.device | str = "cpu") -> None:
        self._wait = torch.full((rows, HEAD_COUNT), int(Op.WAIT), device=device)

    def observe(self, view: PopulationView) -> None:
        """Look at nothing."""

    def act(self) -> torch.Tensor:
        """WAIT for every row."""
        return self._wait.clone()
