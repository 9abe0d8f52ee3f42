"""Hosts: chains of segments with a site after each but the last. Vectors, signals and images.

A host is made of row layers; it owns no tensors (see `esper.kasmina.rows.core`).
"""

from __future__ import annotations

from esper.kasmina.rows.convolution import RowConv1d, RowConv2d
from esper.kasmina.rows.core import RowLayer, RowSequential, Shape
from esper.kasmina.rows.dense import RowLinear
from esper.kasmina.rows.norms import RowBatchNorm, RowGroupNorm, RowLayerNorm
from esper.kasmina.rows.shaping import RowGlobalMean, RowPool, RowReLU
from esper.leyline.actions import SiteKind
from esper.leyline.config import HostConfig
from esper.leyline.errors import EsperError
from esper.leyline.sites import Site, SlotConfig

AXES = {SiteKind.VECTOR: 0, SiteKind.SIGNAL: 1, SiteKind.IMAGE: 2}
"""Axes of one example behind its features."""


class Host:
    """Segments, sites and the shape of one example.

    Parameters
    ----------
    config
        What to build.
    example
        Shape of one example of the data, channels first.
    classes
        Number of logits.

    Attributes
    ----------
    body
        All segments as one row layer; segment i is `body.layers[i]`.
    slot_config
        Sites and slot names.

    Raises
    ------
    EsperError
        The host cannot be built on such examples.
    """

    def __init__(self, config: HostConfig, example: Shape, classes: int) -> None:
        if config.kind not in AXES:
            raise EsperError(f"host.kind: no host for {config.kind} yet; use vector, signal or image")
        axes = AXES[config.kind]
        if len(example) != axes + 1:
            raise EsperError(
                f"host.kind: {config.kind} needs examples of {axes + 1} dimensions, these have {len(example)}"
            )
        if axes == 0 and config.pooling != "none":
            raise EsperError("host.pooling: vectors have no extent to pool; use none")
        self.config, self.example, self.kind = config, example, config.kind
        shape: Shape = example
        segments: list[RowLayer] = []
        sites: list[Site] = []
        for number, width in enumerate(config.widths):
            layers: list[RowLayer] = []
            if axes and number and config.pooling != "none":
                if min(shape[1:]) < 2:
                    raise EsperError(
                        f"host.pooling: segment {number + 1} has an extent of {shape[1:]}, too small to halve"
                    )
                layers.append(RowPool(config.pooling, axes))
            inner = RowSequential(*layers).output_shape(shape)
            for _ in range(config.depth):
                layers += _layer(config, inner[0], width)
                inner = (width, *inner[1:])
            segments.append(RowSequential(*layers))
            shape = segments[-1].output_shape(shape)
            sites.append(Site(config.kind, shape[0], shape[1:], number + 1))
        head: list[RowLayer] = [RowGlobalMean(shape[0])] if axes else []
        segments.append(RowSequential(*head, RowLinear(shape[0], classes)))
        self.body = RowSequential(*segments)
        self.slot_config = SlotConfig.of_chain(tuple(sites))

    @property
    def segments(self) -> tuple[RowLayer, ...]:
        """Segments in order; the last one is the head."""
        return self.body.layers

    def cost(self) -> int:
        """Multiply-adds for one example."""
        return self.body.cost(self.example)


def _layer(config: HostConfig, inputs: int, width: int) -> list[RowLayer]:
    """One layer: weights, norm, activation. In front of a norm with a shift a bias would do nothing."""
    bias = config.norm == "none"
    axes = AXES[config.kind]
    layers: list[RowLayer] = []
    if axes == 0:
        layers.append(RowLinear(inputs, width, bias=bias))
    else:
        conv = RowConv1d if axes == 1 else RowConv2d
        layers.append(conv(inputs, width, config.kernel, bias=bias))
    if config.norm == "batch":
        layers.append(RowBatchNorm(width, axes))
    elif config.norm == "group":
        layers.append(RowGroupNorm(1, width, axes))
    elif config.norm == "layer":
        if axes:
            raise EsperError("host.norm: layer normalises vectors only; use group or batch")
        layers.append(RowLayerNorm(width))
    return [*layers, RowReLU()] if config.activation == "relu" else layers
