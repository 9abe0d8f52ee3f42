"""Convolutions of many rows as one grouped convolution. Shapes as in `core`.

Activations are contiguous [B, L*C, ...], not channels-last: docs/decisions/0001.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from esper.kasmina.rows.core import Plain, RowLayer, Shape, leaf, uniform
from esper.kasmina.rows.dense import bound_of


class _RowConv(RowLayer):
    """What the one- and the two-dimensional convolution share: odd kernel, stride 1, the extent is kept."""

    axes: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        groups: int = 1,
        bias: bool = True,
        zero: bool = False,
    ) -> None:
        self.in_channels, self.out_channels, self.kernel = in_channels, out_channels, kernel
        self.groups, self.bias = groups, bias
        fan_in = in_channels // groups * kernel**self.axes
        bound = 0.0 if zero else bound_of(fan_in)
        shape = (out_channels, in_channels // groups, *[kernel] * self.axes)
        weight = uniform("weight", shape, bound, decay=True)
        self.params = (weight, uniform("bias", (out_channels,), bound)) if bias else (weight,)

    def forward(self, x: Tensor, params: Sequence[Tensor], buffers: Sequence[Tensor], *, training: bool) -> Tensor:
        weight = params[0]
        if self.kernel == 1 and self.groups == 1:
            return self._pointwise(x, weight.flatten(2), params[1] if self.bias else None)
        bias = params[1].reshape(-1) if self.bias else None
        convolve = F.conv1d if self.axes == 1 else F.conv2d
        lanes = weight.shape[0]
        return convolve(x, weight.flatten(0, 1), bias, padding=self.kernel // 2, groups=self.groups * lanes)

    def _pointwise(self, x: Tensor, weight_LOC: Tensor, bias_LO: Tensor | None) -> Tensor:
        """A kernel of 1 as one batched product: 1.2 to 1.8 times as fast as the grouped convolution on a CPU."""
        lanes = weight_LOC.shape[0]
        flat_LCN = (
            x.view(x.shape[0], lanes, self.in_channels, -1).permute(1, 2, 0, 3).reshape(lanes, self.in_channels, -1)
        )
        y_LON = weight_LOC.bmm(flat_LCN) if bias_LO is None else bias_LO.unsqueeze(2).baddbmm(weight_LOC, flat_LCN)
        y = y_LON.view(lanes, self.out_channels, x.shape[0], -1).permute(2, 0, 1, 3)
        return y.reshape(x.shape[0], lanes * self.out_channels, *x.shape[2:])

    def output_shape(self, shape: Shape) -> Shape:
        return (self.out_channels, *shape[1:])

    def cost(self, shape: Shape) -> int:
        return math.prod(shape[1:]) * self.params[0].size

    def plain(self) -> Plain:
        return leaf(
            f"Conv{self.axes}d",
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            kernel_size=self.kernel,
            padding=self.kernel // 2,
            groups=self.groups,
            bias=self.bias,
        )


class RowConv1d(_RowConv):
    """`torch.nn.Conv1d` (odd kernel, stride 1, same extent) on [B, L*C, T]."""

    axes = 1


class RowConv2d(_RowConv):
    """`torch.nn.Conv2d` (odd kernel, stride 1, same extent) on [B, L*C, H, W]."""

    axes = 2
