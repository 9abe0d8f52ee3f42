"""Straight-through incubation: a seed that learns without being seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    """`host + (seed - seed.detach())` without the arithmetic, which would turn an infinite seed into NaN."""

    @staticmethod
    def forward(ctx: Any, host_features: Tensor, seed_features: Tensor) -> Tensor:
        return host_features.view_as(host_features)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad


def ste_forward(host_features: Tensor, seed_features: Tensor) -> Tensor:
    """Give the host's features, bit for bit, with the gradient of `host_features + seed_features`.

    Parameters
    ----------
    host_features, seed_features
        The same shape. Under autocast they may differ in dtype; the result has the host's.

    Returns
    -------
    Tensor
        Equal to `host_features` whatever the seed holds, non-finite values included.
    """
    if seed_features.dtype != host_features.dtype:
        seed_features = seed_features.to(host_features.dtype)
    result: Tensor = _StraightThrough.apply(host_features, seed_features)  # type: ignore[no-untyped-call]
    return result
