"""Blueprints for vectors, signals and images.

Each builder gives a row layer that computes `delta` of the shape of the site. Its last learned layer starts at 0 and
stands behind nothing that would stop its gradient, so that every seed starts as the identity and learns from the
first update (PRIOR-ART: a zeroed convolution in front of a norm and a ReLU never does).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from esper.kasmina.rows.convolution import RowConv1d, RowConv2d
from esper.kasmina.rows.core import RowLayer, RowSequential
from esper.kasmina.rows.dense import RowLinear
from esper.kasmina.rows.excite import RowExcite
from esper.kasmina.rows.norms import RowGroupNorm, RowLayerNorm
from esper.kasmina.rows.shaping import RowReLU
from esper.leyline.actions import BLUEPRINTS_OF_KIND, Blueprint, Operator, SiteKind
from esper.leyline.sites import Site

LORA_RANKS = {Blueprint.LORA_SMALL: 2, Blueprint.LORA_LARGE: 8}
MLP_FACTORS = {Blueprint.MLP_SMALL: 1, Blueprint.MLP_LARGE: 4}
MIN_HIDDEN = 4
"""Narrow sites still get bottlenecks of this width, or of their own where that is smaller."""


def _quarter(width: int) -> int:
    return min(width, max(MIN_HIDDEN, width // 4))


def _rank(blueprint: Blueprint, width: int) -> int:
    """Rank of a low-rank seed: no product of matrices has more than its width."""
    return min(width, LORA_RANKS[blueprint])


def _vector(blueprint: Blueprint, width: int) -> RowLayer:
    if blueprint is Blueprint.NORM:
        return RowLayerNorm(width, zero=True)
    if blueprint in LORA_RANKS:
        rank = _rank(blueprint, width)
        return RowSequential(RowLinear(width, rank, bias=False), RowLinear(rank, width, bias=False, zero=True))
    if blueprint is Blueprint.BOTTLENECK:
        return _mlp(width, _quarter(width))
    if blueprint in MLP_FACTORS:
        return _mlp(width, MLP_FACTORS[blueprint] * width)
    if blueprint is Blueprint.ATTENTION:
        return RowExcite(width, _quarter(width), 0)
    raise KeyError(blueprint)


def _mlp(width: int, hidden: int) -> RowLayer:
    return RowSequential(RowLinear(width, hidden), RowReLU(), RowLinear(hidden, width, zero=True))


def _convolutional(blueprint: Blueprint, width: int, axes: int) -> RowLayer:
    conv: type[RowConv1d] | type[RowConv2d] = RowConv1d if axes == 1 else RowConv2d
    if blueprint is Blueprint.NORM:
        return RowGroupNorm(1, width, axes, zero=True)
    if blueprint in LORA_RANKS:
        rank = _rank(blueprint, width)
        return RowSequential(conv(width, rank, 1, bias=False), conv(rank, width, 1, bias=False, zero=True))
    if blueprint is Blueprint.BOTTLENECK:
        hidden = _quarter(width)
        down, middle, up = conv(width, hidden, 1), conv(hidden, hidden, 3), conv(hidden, width, 1, zero=True)
        return RowSequential(down, RowReLU(), middle, RowReLU(), up)
    if blueprint is Blueprint.ATTENTION:
        return RowExcite(width, _quarter(width), axes)
    first: dict[Blueprint, RowLayer] = {
        Blueprint.DEPTHWISE: conv(width, width, 3, groups=width),
        Blueprint.POINTWISE: conv(width, width, 1),
        Blueprint.CONV_LIGHT: conv(width, width, 3),
        Blueprint.CONV_HEAVY: conv(width, 2 * width, 3),
    }
    if blueprint is Blueprint.CONV_HEAVY:
        return RowSequential(first[blueprint], RowReLU(), conv(2 * width, width, 3, zero=True))
    return RowSequential(first[blueprint], RowReLU(), conv(width, width, 1, zero=True))


BUILDERS: dict[SiteKind, Callable[[Blueprint, int], RowLayer]] = {
    SiteKind.VECTOR: _vector,
    SiteKind.SIGNAL: lambda blueprint, width: _convolutional(blueprint, width, 1),
    SiteKind.IMAGE: lambda blueprint, width: _convolutional(blueprint, width, 2),
}


@cache
def seed_layer(blueprint: Blueprint, site: Site) -> RowLayer:
    """Row layer of a seed at a site, from activations to delta.

    Raises
    ------
    KeyError
        The blueprint does not fit the site's kind (the fit mask never lets one through).
    """
    if blueprint not in BLUEPRINTS_OF_KIND[site.kind]:
        raise KeyError(f"{blueprint.name} does not fit {site.kind}")
    return BUILDERS[site.kind](blueprint, site.width)


@cache
def gate_layer(site: Site) -> RowLayer:
    """Row layer of the learned gate of operator GATE, before its sigmoid: one number for each example."""
    # At 0 the gate stands at one half and moves as soon as the seed does.
    return RowLinear(site.width, 1, zero=True)


def seed_parameters(blueprint: Blueprint, operator: Operator, site: Site) -> int:
    """Exact count of learned numbers of a seed, its gate included."""
    gate = gate_layer(site).parameter_count if operator is Operator.GATE else 0
    return seed_layer(blueprint, site).parameter_count + gate


def seed_cost(blueprint: Blueprint, operator: Operator, site: Site) -> int:
    """Multiply-adds of a seed for one example, its gate included."""
    gate = gate_layer(site).cost((site.width,)) if operator is Operator.GATE else 0
    return seed_layer(blueprint, site).cost(site.shape) + gate
