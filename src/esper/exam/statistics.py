"""What paired starts allow to say: means with intervals, starts being the unit of evidence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

CONFIDENCE = 0.95
_RESAMPLES = 9999


@dataclass(frozen=True)
class Interval:
    """Mean of paired differences, and an interval that covers the true mean with probability `CONFIDENCE`."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """The sign is certain, as far as the interval goes."""
        return self.low > 0 or self.high < 0

    def text(self) -> str:
        """Say it with its sign."""
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def paired(difference_K: np.ndarray) -> Interval:
    """Bootstrap interval of the mean over starts (bias-corrected and accelerated: Efron 1987).

    Raises
    ------
    ValueError
        Fewer than two starts, or a difference that is not finite.
    """
    if len(difference_K) < 2 or not np.isfinite(difference_K).all():
        raise ValueError(f"an interval needs at least 2 finite differences, got {difference_K}")
    mean = float(difference_K.mean())
    if np.ptp(difference_K) == 0:
        return Interval(mean, mean, mean)
    found = bootstrap(
        (difference_K,), np.mean, n_resamples=_RESAMPLES, confidence_level=CONFIDENCE, method="BCa", rng=0
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high))
