"""What paired results allow to say: statistics with intervals over training seeds and starts together.

Every policy (one for each training seed) plays the same starts, so both are resampled, and a resample of either is the
same for all of the other: the crossed two-way bootstrap (Owen 2007, "The pigeonhole bootstrap"). Where nothing was
trained, or once, starts alone are resampled, and the interval says so.

Shapes: M training seeds, K starts, N resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import norm, t, trim_mean

CONFIDENCE = 0.95
_RESAMPLES = 9999
_TRIMMED = 0.25
"""Share that the interquartile mean leaves out at either end."""


@dataclass(frozen=True)
class Interval:
    """A statistic, and an interval that covers the true one with probability `CONFIDENCE`.

    Attributes
    ----------
    mean
        The statistic: a mean, unless something else was asked for.
    low, high
        Ends of the interval.
    seeds, starts
        How many of each it was resampled over; with one training seed nothing is known of others.
    """

    mean: float
    low: float
    high: float
    seeds: int
    starts: int

    @property
    def excludes_zero(self) -> bool:
        """The sign is certain, as far as the interval goes."""
        return self.low > 0 or self.high < 0

    @property
    def over(self) -> str:
        """Say what it is an interval over."""
        return f"{self.starts} starts" if self.seeds == 1 else f"{self.seeds} training seeds, {self.starts} starts"

    def text(self) -> str:
        """Say it with its sign."""
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def mean(values_NMK: np.ndarray) -> np.ndarray:
    """Mean over seeds and starts [N]."""
    means_N: np.ndarray = values_NMK.mean((1, 2))
    return means_N


def interquartile_mean(values_NMK: np.ndarray) -> np.ndarray:
    """Mean [N] of the middle half of all runs: less at the mercy of outliers (Agarwal et al. 2021)."""
    middle_N: np.ndarray = trim_mean(values_NMK.reshape(len(values_NMK), -1), _TRIMMED, axis=1)
    return middle_N


def probability_of_improvement(difference_NMK: np.ndarray) -> np.ndarray:
    """Share [N] of seeds and starts that are ahead, a tie counting as one half (Agarwal et al. 2021).

    Runs on the same start are compared, as pairs are what the starts are for.
    """
    ahead_N: np.ndarray = ((difference_NMK > 0) + 0.5 * (difference_NMK == 0)).mean((1, 2))
    return ahead_N


@dataclass(frozen=True)
class Difference:
    """By how much one arm is ahead of another on the same starts.

    Attributes
    ----------
    mean, middle
        Mean and interquartile mean of the paired differences (nats).
    improvement
        Probability of improvement.
    """

    mean: Interval
    middle: Interval
    improvement: Interval

    @classmethod
    def of(cls, difference: np.ndarray) -> Difference:
        """Judge paired differences: [K] over starts, or [M, K] over training seeds and starts."""
        share = paired(difference, probability_of_improvement)
        share = replace(share, low=max(share.low, 0.0), high=min(share.high, 1.0))
        return cls(paired(difference), paired(difference, interquartile_mean), share)


def paired(difference: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray] = mean) -> Interval:
    """Interval of a statistic of paired differences, by the crossed bootstrap.

    Percentiles of few units are too narrow, by sqrt((n - 1) / n) and by the normal quantile where Student's is due
    (Hesterberg 2015), and training seeds are few: deviations are widened by both, with the degrees of freedom that
    Satterthwaite (1946) gives for the variance of the mean.

    Parameters
    ----------
    difference
        [K] over starts, or [M, K] over training seeds and starts.
    statistic
        From resamples [N, M, K] to its values [N].

    Raises
    ------
    ValueError
        Fewer than two starts, or a difference that is not finite.
    """
    difference_MK = np.atleast_2d(difference)
    seeds, starts = difference_MK.shape
    if starts < 2 or not np.isfinite(difference_MK).all():
        raise ValueError(f"an interval needs at least 2 finite differences, got {difference}")
    # Philox with a fixed key: the same differences give the same interval.
    generator = np.random.Generator(np.random.Philox(0))
    seed_NM1 = generator.integers(seeds, size=(_RESAMPLES, seeds, 1))
    start_N1K = generator.integers(starts, size=(_RESAMPLES, 1, starts))
    resampled_N = statistic(difference_MK[seed_NM1, start_N1K])
    tail = (1 - CONFIDENCE) / 2
    freedom = _degrees_of_freedom(difference_MK)
    widened = t.ppf(1 - tail, freedom) / norm.ppf(1 - tail) * ((freedom + 1) / freedom) ** 0.5
    told = float(statistic(difference_MK[None])[0])
    low, high = told + widened * (np.quantile(resampled_N, (tail, 1 - tail)) - told)
    return Interval(told, float(low), float(high), seeds, starts)


def _degrees_of_freedom(difference_MK: np.ndarray) -> float:
    """Of the variance of the mean, (MS of seeds + MS of starts - MS of the rest) / MK: from M - 1 to M + K."""
    seeds, starts = difference_MK.shape
    if seeds == 1:
        return float(starts - 1)
    of_seed_M1, of_start_1K = difference_MK.mean(1, keepdims=True), difference_MK.mean(0, keepdims=True)
    whole = difference_MK.mean()
    rest_MK = difference_MK - of_seed_M1 - of_start_1K + whole
    sums = np.array([starts * ((of_seed_M1 - whole) ** 2).sum(), seeds * ((of_start_1K - whole) ** 2).sum()])
    freedom = np.array([seeds - 1, starts - 1])
    square, rest = sums / freedom, (rest_MK**2).sum() / freedom.prod()
    spread = max(square.sum() - rest, rest)
    if spread == 0:
        return float(starts - 1)
    return float(spread**2 / ((square**2 / freedom).sum() + rest**2 / freedom.prod()))
