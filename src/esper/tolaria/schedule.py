"""Learning-rate schedules: that of the hosts, and one for each seed; all end at the run's own last update.

Shapes: N lanes of banks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from esper.leyline.config import OptimizerConfig


def rate_factor(update: int, total: int, config: OptimizerConfig) -> float:
    """Share of the peak learning rate at one update.

    Linear from 0 to 1 over the warm-up, then a cosine that reaches `final_share` at update `total - 1`. A warm-up that
    rounds to the whole of a short run leaves room for the peak and the end.

    Parameters
    ----------
    update
        0 to `total - 1`.
    total
        Updates of the whole run.
    config
        Warm-up and final share.
    """
    warm = max(0, min(round(config.warmup * total), total - 2))
    if update < warm:
        return (update + 1) / (warm + 1)
    progress = (update - warm) / max(1, total - 1 - warm)
    return config.final_share + (1 - config.final_share) * (1 + math.cos(math.pi * progress)) / 2


class Rates:
    """Learning rates of hosts, seeds and gates, each on the curve of its own life (docs/decisions/0011).

    What learns from the first update on follows `rate_factor`. What is born later rises linearly over the share
    `warmup` of the rest of the run and falls linearly to its end, never below the host's share at that update.

    The curve follows updates of the run since the birth, not updates that were made: an update that is skipped costs
    nothing but itself, as it does to a host, and what was rolled back does not begin again at its peak. The birth is
    the first update in which the lane learned, so that nothing of the warm-up is spent before the incubator.

    All operations on lanes are rounded exactly by IEEE 754. A cosine is not: its last bit depends on the place of a
    lane in a vector register, and no lane may notice another.

    Parameters
    ----------
    birth_N
        Int64, update in which each lane first learned.
    peak_N
        Peak learning rate of each lane.
    total, config
        See `rate_factor`.
    """

    def __init__(self, birth_N: Tensor, peak_N: Tensor, total: int, config: OptimizerConfig) -> None:
        self._peak_N, self._total, self._config = peak_N, total, config
        self._from_start_N = birth_N == 0
        life_N = (total - birth_N).to(peak_N.dtype)
        self._before_N = (birth_N - 1).to(peak_N.dtype)
        self._rise_N = peak_N / (life_N * config.warmup + 1)
        self._fall_N = peak_N / (life_N * (1 - config.warmup))

    def at(self, update: int) -> Tensor:
        """Learning rate [N] of each lane at an update, its birth or later."""
        host_N = self._peak_N * rate_factor(update, self._total, self._config)
        rise_N = (update - self._before_N) * self._rise_N
        own_N = torch.minimum(rise_N, (self._total - update) * self._fall_N)
        return torch.where(self._from_start_N, host_N, torch.maximum(own_N, host_N))
