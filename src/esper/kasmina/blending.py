"""How seeds join the stream at one site, for all lanes at once.

Operators, each the identity at alpha 0: ADD `h + a*delta`, MULTIPLY `h + a*(h*tanh(delta))`, GATE `h + a*g(h)*delta`.
One gather and one scatter for each blueprint; a row has at most one seed at a site, so lanes never collide.

Shapes: N lanes of a call, L lanes of the pass, B examples. "Lane form" puts the lane axis by itself: [L, B, D] for
vectors, [B, L, C, ...] for signals and images.
A seed at alpha 0 is in no call, so that a non-finite seed cannot reach its host as 0 * NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esper.kasmina.isolation import ste_forward
from esper.kasmina.plan import Call
from esper.kasmina.rows.core import to_lanes


class _Gather(torch.autograd.Function):
    """The stream itself and several disjoint selections of its lanes.

    All gradients return into one copy: separate selections would each fill and add a tensor of the stream's size.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, axis: int, *lanes: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.axis, ctx.lanes = axis, lanes
        return h.view_as(h), *(h.index_select(axis, lane) for lane in lanes)

    @staticmethod
    def backward(ctx: Any, through: Tensor, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        total = through.clone(memory_format=torch.contiguous_format)
        for lane, grad in zip(ctx.lanes, grads, strict=True):
            if grad is not None:
                total.index_add_(ctx.axis, lane, grad)
        return (total, None, *(None for _ in ctx.lanes))


class _Scatter(torch.autograd.Function):
    """Add disjoint terms to their lanes: one copy of the stream, however many terms."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, axis: int, lanes: tuple[Tensor, ...], *terms: Tensor) -> Tensor:
        ctx.axis, ctx.lanes = axis, lanes
        out = h.clone()
        for lane, term in zip(lanes, terms, strict=True):
            out.index_add_(axis, lane, term)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (grad, None, None, *(grad.index_select(ctx.axis, lane) for lane in ctx.lanes))


@dataclass(frozen=True)
class SiteModules:
    """What a call needs of the banks at its site.

    Attributes
    ----------
    delta
        Output of a call's seeds for their streams, both in the layout of the kind.
    gate
        Gates before their sigmoid [N, B, 1] for pooled streams [N, B, D] of the call's GATE lanes.
    """

    delta: Callable[[Call, Tensor], Tensor]
    gate: Callable[[Call, Tensor], Tensor]


def blend(h: Tensor, calls: tuple[Call, ...], lanes: int, lane_axis: int, modules: SiteModules) -> Tensor:
    """Pass the stream of one site through the seeds of its calls.

    Parameters
    ----------
    h
        Stream, in the layout of its kind.
    calls
        The calls of this site.
    lanes
        Number of lanes in `h`.
    lane_axis
        0 for vectors, 1 for signals and images.
    modules
        The seeds and their gates.
    """
    if not calls:
        return h
    streams = h if lane_axis == 0 else to_lanes(h, h.shape[1] // lanes)
    if len(calls) == 1 and calls[0].lanes is None:
        call = calls[0]
        term = _term(call, streams.detach() if call.silent else streams, lane_axis, modules)
        streams = ste_forward(streams, term) if call.silent else streams + term
    else:
        every = torch.arange(lanes, device=h.device)
        chosen = tuple(every if call.lanes is None else call.lanes for call in calls)
        streams, *parts = _Gather.apply(streams, lane_axis, *chosen)  # type: ignore[no-untyped-call]
        terms = []
        for call, part in zip(calls, parts, strict=True):
            term = _term(call, part.detach() if call.silent else part, lane_axis, modules)
            terms.append(ste_forward(torch.zeros_like(term), term) if call.silent else term)
        streams = _Scatter.apply(streams, lane_axis, chosen, *terms)  # type: ignore[no-untyped-call]
    return streams if lane_axis == 0 else streams.flatten(1, 2)


def _term(call: Call, streams: Tensor, lane_axis: int, modules: SiteModules) -> Tensor:
    """What the seeds of one call add to their streams; both in lane form."""
    flat = streams if lane_axis == 0 else streams.flatten(1, 2)
    delta = modules.delta(call, flat).view(streams.shape)
    plain = call.adds + call.gates
    if plain < call.count:
        rest = call.count - plain
        multiplied = streams.narrow(lane_axis, plain, rest) * delta.narrow(lane_axis, plain, rest).tanh()
        delta = torch.cat((delta.narrow(lane_axis, 0, plain), multiplied), lane_axis) if plain else multiplied
    share_NB = call.alpha.to(delta.dtype)[:, None]
    if call.gates:
        gated = streams.narrow(lane_axis, call.adds, call.gates)
        pooled = gated if lane_axis == 0 else gated.flatten(3).mean(3).transpose(0, 1)
        gate_NB = modules.gate(call, pooled)[..., 0].sigmoid()
        share_NB = share_NB.expand(-1, gate_NB.shape[1])
        parts = share_NB.split([call.adds, call.gates, call.count - plain])
        share_NB = torch.cat((parts[0], parts[1] * gate_NB, parts[2]))
    share = share_NB if lane_axis == 0 else share_NB.T
    return delta * share.reshape(*share.shape, *[1] * (delta.dim() - 2))
