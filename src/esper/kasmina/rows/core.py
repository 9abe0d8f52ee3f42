"""What a row layer is: a pure function of activations and of parameters with a leading row dimension.

A row layer owns no tensor. It declares the parameters of one row; a flat table [L, P] holds them for L lanes (a lane
is one row taking part in a pass), and `forward` computes all lanes at once, the number of kernels independent of L.

Shapes: L lanes, B examples, C channels, D features, T length, H W height and width, P parameters of one lane.
Activations are contiguous:

    vector  [L, B, D]        signal  [B, L*C, T]        image  [B, L*C, H, W]        tokens  [L, B, T, D]
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]
Plain = dict[str, Any]
"""Description of a plain `torch.nn` module, understood by `esper.kasmina.plain.build`."""


class Statistics(Enum):
    """Which statistics a batch norm normalises with."""

    RUNNING = 1
    """The running ones, as a deployed network does."""
    UPDATED = 2
    """Those of the batch, and the running ones follow them: training."""
    OWN = 3
    """Those of the batch, and nothing changes: whatever is measured or trained with a seed put in or left out."""


class ParamSpec(NamedTuple):
    """One parameter (or buffer) of one row, initialised uniformly in [low, high]."""

    name: str
    shape: Shape
    low: float
    high: float
    decay: bool

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def uniform(name: str, shape: Shape, bound: float, *, decay: bool = False) -> ParamSpec:
    """Parameter drawn from U(-bound, bound)."""
    return ParamSpec(name, shape, -bound, bound, decay)


def constant(name: str, shape: Shape, value: float, *, decay: bool = False) -> ParamSpec:
    """Parameter that starts at one value."""
    return ParamSpec(name, shape, value, value, decay)


class RowLayer(ABC):
    """A layer for many rows at once.

    Attributes
    ----------
    params
        Parameters of one row, in the order in which they lie in the flat table; names as in the torch module.
    buffers
        Buffers of one row (running statistics); each is its own tensor [L, *shape].
    """

    params: tuple[ParamSpec, ...] = ()
    buffers: tuple[ParamSpec, ...] = ()

    @abstractmethod
    def forward(
        self, x: Tensor, params: Sequence[Tensor], buffers: Sequence[Tensor], *, statistics: Statistics
    ) -> Tensor:
        """Compute all lanes. `params` and `buffers` hold one tensor [L, *shape] for each declared one."""

    @abstractmethod
    def output_shape(self, shape: Shape) -> Shape:
        """Shape of one example of one row behind the layer."""

    def cost(self, shape: Shape) -> int:
        """Multiply-adds for one example of `shape`; elementwise work is not counted."""
        return 0

    @abstractmethod
    def plain(self) -> Plain:
        """Describe the torch module that does the same for one row."""

    @property
    def parameter_count(self) -> int:
        """Learned numbers of one row."""
        return sum(p.size for p in self.params)

    def split(self, flat_LP: Tensor) -> list[Tensor]:
        """Cut a flat table [L, P] into views [L, *shape], one for each parameter.

        One `split` keeps the gradient of the whole table a single concatenation.
        """
        pieces = flat_LP.split([p.size for p in self.params], dim=1)
        return [
            piece.unflatten(1, p.shape) if len(p.shape) != 1 else piece
            for piece, p in zip(pieces, self.params, strict=True)
        ]

    def initial(self, uniform_LP: Tensor) -> Tensor:
        """Initial flat table [L, P] from uniform numbers in (0, 1) of the same shape."""
        low_P, high_P = (
            self._spread([getattr(p, side) for p in self.params]).to(uniform_LP) for side in ("low", "high")
        )
        return torch.lerp(low_P, high_P, uniform_LP)

    def decay_mask(self) -> Tensor:
        """Float [P]: 1 where weight decay applies."""
        return self._spread([float(p.decay) for p in self.params])

    def _spread(self, values: list[float]) -> Tensor:
        """One number for each declared parameter as float32 [P]: each element has its parameter's."""
        spread_P = torch.empty(self.parameter_count)
        for piece, value in zip(spread_P.split([p.size for p in self.params]), values, strict=True):
            piece.fill_(value)
        return spread_P


class RowSequential(RowLayer):
    """Layers one after the other; parameters are named as in `torch.nn.Sequential`."""

    def __init__(self, *layers: RowLayer) -> None:
        self.layers = layers
        self.params = tuple(p._replace(name=f"{i}.{p.name}") for i, m in enumerate(layers) for p in m.params)
        self.buffers = tuple(p._replace(name=f"{i}.{p.name}") for i, m in enumerate(layers) for p in m.buffers)

    def forward(
        self, x: Tensor, params: Sequence[Tensor], buffers: Sequence[Tensor], *, statistics: Statistics
    ) -> Tensor:
        p = b = 0
        for layer in self.layers:
            np, nb = p + len(layer.params), b + len(layer.buffers)
            x = layer.forward(x, params[p:np], buffers[b:nb], statistics=statistics)
            p, b = np, nb
        return x

    def output_shape(self, shape: Shape) -> Shape:
        for layer in self.layers:
            shape = layer.output_shape(shape)
        return shape

    def cost(self, shape: Shape) -> int:
        total = 0
        for layer in self.layers:
            total += layer.cost(shape)
            shape = layer.output_shape(shape)
        return total

    def plain(self) -> Plain:
        return {
            "type": "Sequential",
            "children": {str(i): layer.plain() for i, layer in enumerate(self.layers)},
        }


def to_lanes(x: Tensor, channels: int) -> Tensor:
    """[B, L*C, ...] as [B, L, C, ...]."""
    return x.reshape(x.shape[0], -1, channels, *x.shape[2:])


def leaf(torch_type: str, **args: Any) -> Plain:
    """Plain description of one torch module."""
    return {"type": torch_type, "args": args}
