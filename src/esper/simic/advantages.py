"""Advantages of whole rounds at once.

An episode begins at decision 0 and ends once, so the recursion of GAE (Schulman et al. 2016) is a product with one
triangular matrix: no loop over decisions or rows.

Shapes: T decisions, R rows.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def generalized_advantages(
    reward_TR: Tensor, value_TR: Tensor, made_TR: Tensor, gamma: float, gae_lambda: float
) -> Tensor:
    """Advantages [T, R], float32, by GAE; the value after the last decision of a row is 0, for its episode is over.

    Parameters
    ----------
    reward_TR, value_TR
        Reward after, and value before each decision.
    made_TR
        Bool: the decision was made; false from where a row ended early. Nothing there counts.
    gamma, gae_lambda
        Discount, and how far the advantage looks beyond the next value.
    """
    value_TR = value_TR.masked_fill(~made_TR, 0.0)
    following_TR = torch.cat((value_TR[1:], torch.zeros_like(value_TR[:1])))
    delta_TR = (reward_TR + gamma * following_TR - value_TR).masked_fill(~made_TR, 0.0)
    # Precision is wanted here whatever surrounds the call.
    with torch.autocast(delta_TR.device.type, enabled=False):
        return _decay(len(delta_TR), gamma * gae_lambda, delta_TR.device) @ delta_TR.float()


def group_advantages(return_R: Tensor, group_R: Tensor, counts_R: Tensor) -> Tensor:
    """Return [R] of each row less the mean of the others of its group: what the same start was worth without it.

    Parameters
    ----------
    return_R
        Sum of rewards.
    group_R
        Int64 in [0, R): rows that share context, initialisation and data.
    counts_R
        Bool: the row takes part; a row that does not gets 0, as does one without company.
    """
    counted_R = counts_R.to(return_R.dtype)
    kept_R = return_R.masked_fill(~counts_R, 0.0)
    sums = torch.zeros_like(return_R).index_add_(0, group_R, kept_R)[group_R]
    others = torch.zeros_like(return_R).index_add_(0, group_R, counted_R)[group_R] - counted_R
    mean_R = (sums - kept_R) / others.clamp_min(1)
    return torch.where(counts_R & (others > 0), return_R - mean_R, 0.0)


@cache
def _decay(decisions: int, factor: float, device: torch.device) -> Tensor:
    """Float32 [T, T]: factor^(s - t) at s >= t, 0 before."""
    steps = torch.arange(decisions, device=device)
    ahead = steps[None, :] - steps[:, None]
    powers = torch.tensor(factor, dtype=torch.float64, device=device) ** ahead.clamp_min(0)
    return torch.where(ahead >= 0, powers, 0.0).float()
