"""A value output whose unit follows what it learns: PopArt (van Hasselt et al. 2016).

Returns of one task are a hundredth of a nat, of another several nats: the last layer learns targets of unit scale, and
its weights are changed with the scale so that no prediction moves when the scale does.

Shapes: N predictions, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MEMORY = 0.9
"""Weight of what was known before in the running moments, for each update."""
LEAST_DEVIATION = 1e-4
"""In the unit of the targets: what differs by less is noise, and no unit to measure errors in."""


class PopArt(nn.Module):
    """Linear layer to one number, in the unit of the targets.

    Parameters
    ----------
    features
        F.
    """

    weight_sum: Tensor
    mean: Tensor
    square: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, 1)
        for name in ("weight_sum", "mean", "square"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    @property
    def deviation(self) -> Tensor:
        """Standard deviation of the targets, 1 before any was seen."""
        known = self.weight_sum > 0
        variance = (self.square - self.mean.square()).clamp_min(LEAST_DEVIATION**2)
        return torch.where(known, variance.sqrt(), 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Predict [N] in float32 from [N, F]."""
        output: Tensor = self.linear(x)[..., 0].float()
        return output * self.deviation.float() + self.mean.float()

    @torch.no_grad()
    def track(self, target_N: Tensor, counts_N: Tensor) -> None:
        """Take in targets where `counts_N` (bool) holds; what is predicted stays as it is.

        The very first targets are an exception: nothing was known before, so that there is nothing to preserve, and
        the output is read in their unit from then on. An output of 0 becomes their mean.
        """
        counts_N = counts_N & target_N.isfinite()
        target_N = target_N.double().masked_fill(~counts_N, 0.0)
        number = counts_N.sum()
        some = (number > 0).double() * (1 - MEMORY)
        before_mean, before_deviation, known = self.mean.clone(), self.deviation, self.weight_sum > 0
        weight = self.weight_sum * (1 - some) + some
        for moment, sample in ((self.mean, target_N), (self.square, target_N.square())):
            # Debiased: the first targets count fully.
            total = moment * self.weight_sum * (1 - some) + some * sample.sum() / number.clamp_min(1)
            moment.copy_(total / weight.clamp_min(1e-12))
        self.weight_sum.copy_(weight)
        scale = torch.where(known, before_deviation / self.deviation, 1.0)
        self.linear.weight.mul_(scale)
        self.linear.bias.mul_(scale).add_(torch.where(known, (before_mean - self.mean) / self.deviation, 0.0))
