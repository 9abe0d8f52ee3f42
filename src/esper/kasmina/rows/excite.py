"""Squeeze and excitation: channels scaled by what the whole example says. Shapes as in `core`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from esper.kasmina.rows.core import Plain, RowLayer, RowSequential, Shape, Statistics, to_lanes
from esper.kasmina.rows.dense import RowLinear
from esper.kasmina.rows.shaping import RowReLU


class RowExcite(RowLayer):
    """`x * tanh(linear(relu(linear(mean of x))))`, bounded by x and 0 at the start (Hu et al. 2018, with tanh).

    Parameters
    ----------
    axes
        0 for vectors, 1 for signals, 2 for images.
    """

    def __init__(self, features: int, hidden: int, axes: int) -> None:
        self.features, self.axes = features, axes
        self.squeeze = RowSequential(RowLinear(features, hidden), RowReLU(), RowLinear(hidden, features, zero=True))
        self.params = tuple(p._replace(name=f"squeeze.{p.name}") for p in self.squeeze.params)

    def forward(
        self, x: Tensor, params: Sequence[Tensor], buffers: Sequence[Tensor], *, statistics: Statistics
    ) -> Tensor:
        if self.axes == 0:
            return x * self.squeeze.forward(x, params, buffers, statistics=statistics).tanh()
        pooled_LBC = to_lanes(x.flatten(2).mean(2), self.features).transpose(0, 1)
        scale_LBC = self.squeeze.forward(pooled_LBC, params, buffers, statistics=statistics).tanh()
        return x * scale_LBC.transpose(0, 1).reshape(*x.shape[:2], *[1] * self.axes)

    def output_shape(self, shape: Shape) -> Shape:
        return shape

    def cost(self, shape: Shape) -> int:
        return self.squeeze.cost((self.features,))

    def plain(self) -> Plain:
        return {"type": "Excite", "children": {"squeeze": self.squeeze.plain()}, "args": {"axes": self.axes}}
