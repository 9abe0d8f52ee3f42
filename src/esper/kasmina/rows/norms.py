"""Normalisation of many rows at once, in float32 where the stream is bfloat16. Shapes as in `core`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from esper.kasmina.rows.core import Plain, RowLayer, Shape, Statistics, constant, leaf, to_lanes

MOMENTUM = 0.1
"""Share of a minibatch's own statistics in the running ones."""


class _RowNorm(RowLayer):
    """A norm with weight and bias for each feature.

    Parameters
    ----------
    features
        Channels, or features of a vector.
    zero
        Weight and bias start at 0, so that a residual branch made of the norm starts at 0.
    """

    def __init__(self, features: int, *, zero: bool = False) -> None:
        self.features = features
        self.params = (
            constant("weight", (features,), 0.0 if zero else 1.0),
            constant("bias", (features,), 0.0),
        )

    def forward(
        self, x: Tensor, params: Sequence[Tensor], buffers: Sequence[Tensor], *, statistics: Statistics
    ) -> Tensor:
        weight, bias = (_wide(p) for p in params)
        return self._normalised(_wide(x), weight, bias, buffers, statistics).to(x.dtype)

    @abstractmethod
    def _normalised(
        self, x: Tensor, weight: Tensor, bias: Tensor, buffers: Sequence[Tensor], statistics: Statistics
    ) -> Tensor:
        """Compute all lanes, in the dtype of the buffers; `weight` and `bias` [L, features]."""

    def output_shape(self, shape: Shape) -> Shape:
        return shape


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype is torch.bfloat16 else x


class RowLayerNorm(_RowNorm):
    """`torch.nn.LayerNorm` over the last axis of vectors [L, B, D] or tokens [L, B, T, D]."""

    def _normalised(
        self, x: Tensor, weight: Tensor, bias: Tensor, buffers: Sequence[Tensor], statistics: Statistics
    ) -> Tensor:
        weight, bias = (p.view(p.shape[0], *[1] * (x.dim() - 2), self.features) for p in (weight, bias))
        return F.layer_norm(x, (self.features,)) * weight + bias

    def plain(self) -> Plain:
        return leaf("LayerNorm", normalized_shape=self.features)


class RowGroupNorm(_RowNorm):
    """`torch.nn.GroupNorm` on vectors, signals or images.

    Parameters
    ----------
    axes
        0 for vectors, 1 for signals, 2 for images.
    """

    def __init__(self, groups: int, features: int, axes: int, *, zero: bool = False) -> None:
        super().__init__(features, zero=zero)
        self.groups, self.axes = groups, axes

    def _normalised(
        self, x: Tensor, weight: Tensor, bias: Tensor, buffers: Sequence[Tensor], statistics: Statistics
    ) -> Tensor:
        if self.axes:
            # The groups of each row follow one another, so the norm of all rows is one group norm.
            # torch.nn.functional's would refuse a single value, which is its own mean.
            return torch.group_norm(x, weight.shape[0] * self.groups, weight.reshape(-1), bias.reshape(-1))
        y = torch.group_norm(x.flatten(0, 1), self.groups).view(x.shape)
        return y * weight.unsqueeze(1) + bias.unsqueeze(1)

    def plain(self) -> Plain:
        return leaf("GroupNorm", num_groups=self.groups, num_channels=self.features)


class RowBatchNorm(_RowNorm):
    """`torch.nn.BatchNorm` on vectors, signals or images; statistics of each row are its own.

    Parameters
    ----------
    axes
        0 for vectors, 1 for signals, 2 for images.
    """

    def __init__(self, features: int, axes: int, *, zero: bool = False) -> None:
        super().__init__(features, zero=zero)
        self.axes = axes
        self.buffers = (
            constant("running_mean", (features,), 0.0),
            constant("running_var", (features,), 1.0),
        )

    def _normalised(
        self, x: Tensor, weight: Tensor, bias: Tensor, buffers: Sequence[Tensor], statistics: Statistics
    ) -> Tensor:
        weight, bias = weight.reshape(-1), bias.reshape(-1)
        own = statistics is Statistics.OWN
        # Views, not copies: in training the running statistics are updated in place.
        mean, var = (None, None) if own else (b.view(-1) for b in buffers)
        of_batch = statistics is not Statistics.RUNNING
        if self.axes:
            return F.batch_norm(x, mean, var, weight, bias, of_batch, MOMENTUM)
        flat = x.transpose(0, 1).flatten(1)
        y = F.batch_norm(flat, mean, var, weight, bias, of_batch, MOMENTUM)
        return to_lanes(y, self.features).transpose(0, 1)

    def plain(self) -> Plain:
        return leaf(f"BatchNorm{max(1, self.axes)}d", num_features=self.features)
