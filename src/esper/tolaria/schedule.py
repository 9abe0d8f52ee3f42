"""The learning-rate schedule: it ends at the run's own last update, whatever grew on the way."""

from __future__ import annotations

import math

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
