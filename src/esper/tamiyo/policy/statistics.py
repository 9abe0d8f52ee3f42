"""Running mean and deviation of the features whose scale the task decides.

Shape suffixes: N observations, K running features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LEAST_DEVIATION = 1e-3
LARGEST = 5.0
"""Normalised features are clamped to this many deviations."""


class RunningStatistics(nn.Module):
    """Normalises features; frozen but for `update`, which is called between rollouts.

    Parameters
    ----------
    features
        K.
    """

    count: Tensor
    mean: Tensor
    square: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(features, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(features, dtype=torch.float64))
        self.register_buffer("square", torch.zeros(features, dtype=torch.float64))
        self.register_buffer("shift", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Add observations [..., K]; a row with anything infinite is left out, what is NaN was not measured.

        Chan, Golub and LeVeque 1979, the pairwise update of count, mean and sum of squares.
        """
        x = x.reshape(-1, x.shape[-1]).double()
        known = ~x.isnan() & ~x.isinf().any(1, keepdim=True)
        count = known.sum(0).double()
        total = self.count + count
        some, all_ = count.clamp_min(1), total.clamp_min(1)
        x = x.masked_fill(~known, 0.0)
        mean = x.sum(0) / some
        square = ((x - mean).square() * known).sum(0)
        delta = mean - self.mean
        self.square += square + delta.square() * self.count * count / all_
        self.mean += delta * count / all_
        self.count.copy_(total)
        deviation = (self.square / all_).sqrt().clamp_min(LEAST_DEVIATION)
        self.shift.copy_(self.mean)
        self.scale.copy_(torch.where(total > 1, 1 / deviation, 1.0))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., K]; 0 where not measured. Before any update this changes no scale."""
        return ((x - self.shift) * self.scale).nan_to_num(0.0, LARGEST, -LARGEST).clamp(-LARGEST, LARGEST)
