"""Alpha curves: the way from the start of a ramp to its target.

Every curve runs from exactly 0 to exactly 1 and never falls. Shapes: any, elementwise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from esper.leyline.actions import Curve

SIGMOID_STEEPNESS = {Curve.SIGMOID_GENTLE: 6.0, Curve.SIGMOID_STANDARD: 10.0, Curve.SIGMOID_SHARP: 16.0}


def ramp_share(curve: Tensor, progress: Tensor) -> Tensor:
    """Share of the ramp behind us.

    Parameters
    ----------
    curve
        Int64, values of `Curve`.
    progress
        In [0, 1]: decisions done over decisions in all.
    """
    share = torch.where(curve == int(Curve.COSINE), (1 - torch.cos(math.pi * progress)) / 2, progress)
    for kind, steepness in SIGMOID_STEEPNESS.items():
        # Normalised so that the ends are 0 and 1: the logistic alone would miss both.
        low = 1 / (1 + math.exp(steepness / 2))
        sigmoid = torch.sigmoid(steepness * (progress - 0.5))
        share = torch.where(curve == int(kind), (sigmoid - low) / (1 - 2 * low), share)
    return share.clamp(0, 1)


def ramp_alpha(start: Tensor, target: Tensor, curve: Tensor, done: Tensor, total: Tensor) -> Tensor:
    """Alpha after `done` of `total` decisions: monotone, and the target itself at the end."""
    # In float64 and rounded once: float32 sigmoids round differently with the number of rows.
    progress = done.double() / total.clamp(min=1)
    return torch.where(done >= total, target, start + (target - start) * ramp_share(curve, progress).to(start.dtype))
