"""Layers without parameters: activation, pooling, and the step from channels to vectors. Shapes as in `core`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from esper.kasmina.rows.core import Plain, RowLayer, Shape, Statistics, leaf, to_lanes


class RowReLU(RowLayer):
    """`torch.nn.ReLU`."""

    def forward(
        self, x: Tensor, params: Sequence[Tensor], buffers: Sequence[Tensor], *, statistics: Statistics
    ) -> Tensor:
        return x.relu()

    def output_shape(self, shape: Shape) -> Shape:
        return shape

    def plain(self) -> Plain:
        return leaf("ReLU")


class _AveragePool(torch.autograd.Function):
    """Average over windows of 2 along each axis of the extent, by whole slices.

    Twice to three times as fast on a CPU as torch's, whose backward fills the gradient with zeros and adds to it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.extent = x.shape[2:]
        for axis in range(x.dim() - 1, 1, -1):
            even = x.narrow(axis, 0, x.shape[axis] // 2 * 2).unflatten(axis, (-1, 2))
            x = even.select(axis + 1, 0) + even.select(axis + 1, 1)
        return x.mul_(0.5 ** len(ctx.extent))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad * 0.5 ** len(ctx.extent)
        odd = []
        for axis in range(grad.dim() - 1, 1, -1):
            grad = torch.stack((grad, grad), axis + 1).flatten(axis, axis + 1)
            odd += [0, ctx.extent[axis - 2] % 2]
        return F.pad(grad, odd) if any(odd) else grad


class RowPool(RowLayer):
    """Average or maximum over windows of 2 (signals) or 2x2 (images); an odd last element is dropped."""

    def __init__(self, method: str, axes: int) -> None:
        self.method, self.axes = method, axes

    def forward(
        self, x: Tensor, params: Sequence[Tensor], buffers: Sequence[Tensor], *, statistics: Statistics
    ) -> Tensor:
        if self.method == "average":
            pooled: Tensor = _AveragePool.apply(x)  # type: ignore[no-untyped-call]
            return pooled
        return F.max_pool1d(x, 2) if self.axes == 1 else F.max_pool2d(x, 2)

    def output_shape(self, shape: Shape) -> Shape:
        return (shape[0], *(n // 2 for n in shape[1:]))

    def plain(self) -> Plain:
        return leaf(f"{'Avg' if self.method == 'average' else 'Max'}Pool{self.axes}d", kernel_size=2)


class RowGlobalMean(RowLayer):
    """Mean over the extent: [B, L*C, ...] to vectors [L, B, C]."""

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def forward(
        self, x: Tensor, params: Sequence[Tensor], buffers: Sequence[Tensor], *, statistics: Statistics
    ) -> Tensor:
        return to_lanes(x.flatten(2).mean(2), self.channels).transpose(0, 1)

    def output_shape(self, shape: Shape) -> Shape:
        return (self.channels,)

    def plain(self) -> Plain:
        return leaf("GlobalMean")
