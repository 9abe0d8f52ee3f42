"""Operators beside their plain formulas, one lane at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from esper.kasmina.blending import SiteModules, blend
from esper.kasmina.plan import Call
from esper.leyline.actions import Operator

ADD, MULTIPLY, GATE = Operator
LANES, BATCH, WIDTH = 5, 3, 4
EXTENTS = {0: [()], 1: [(6,), (3, 2)]}
SHAPES = [(axis, extent) for axis, extents in EXTENTS.items() for extent in extents]
shapes = pytest.mark.parametrize(("axis", "extent"), SHAPES, ids=["vector", "signal", "image"])


@dataclass(frozen=True)
class Lane:
    """A lane with a seed: which scale its delta has, which operator, which share."""

    lane: int
    operator: Operator
    alpha: float


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def take(h: Tensor, axis: int, lane: int) -> Tensor:
    """[B, D] or [B, C, ...] of one lane."""
    return h[lane] if axis == 0 else h.unflatten(1, (-1, WIDTH))[:, lane]


def layout(lanes: Sequence[Tensor], axis: int) -> Tensor:
    return torch.stack(tuple(lanes)) if axis == 0 else torch.cat(tuple(lanes), 1)


class Seeds:
    """`delta = w * sin(h)` with a number w for each lane, and a gate that is linear in the pooled stream."""

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.scale_L = (1 + draw(1, LANES)).requires_grad_()
        self.gate_LD = draw(2, LANES, WIDTH).requires_grad_()
        self.asked: list[Call] = []

    def delta_of(self, lane: int, h: Tensor) -> Tensor:
        return self.scale_L[lane] * h.sin()

    def gate_of(self, lane: int, h: Tensor) -> Tensor:
        """[B, 1, ...]"""
        pooled = h if self.axis == 0 else h.flatten(2).mean(2)
        gate = (pooled @ self.gate_LD[lane]).sigmoid()
        return gate.reshape(-1, *[1] * (h.dim() - 1))

    def modules(self) -> SiteModules:
        def delta(call: Call, x: Tensor) -> Tensor:
            self.asked.append(call)
            scale = self.scale_L[self._lanes(call)]
            if self.axis == 0:
                assert x.shape == (call.count, BATCH, WIDTH)
                return scale[:, None, None] * x.sin()
            assert x.shape[:2] == (BATCH, call.count * WIDTH)
            per_channel = scale.repeat_interleave(WIDTH)
            return per_channel.view(1, -1, *[1] * (x.dim() - 2)) * x.sin()

        def gate(call: Call, pooled: Tensor) -> Tensor:
            assert pooled.shape == (call.gates, BATCH, WIDTH)
            lanes = self._lanes(call)[call.adds : call.adds + call.gates]
            return pooled @ self.gate_LD[lanes].unsqueeze(2)

        return SiteModules(delta, gate)

    def _lanes(self, call: Call) -> Tensor:
        return torch.arange(LANES) if call.lanes is None else call.lanes


def call_of(lanes: Sequence[Lane], blueprint: int = 5, *, silent: bool = False) -> Call:
    """A call as the planner makes it: ADD, then GATE, then MULTIPLY."""
    order = {ADD: 0, GATE: 1, MULTIPLY: 2}
    ordered = sorted(lanes, key=lambda lane: (order[lane.operator], lane.lane))
    numbers = [lane.lane for lane in ordered]
    operators = [lane.operator for lane in ordered]
    return Call(
        key=(0, blueprint),
        lanes=None if numbers == list(range(LANES)) else torch.tensor(numbers),
        members=None,
        gate_members=torch.zeros(operators.count(GATE), dtype=torch.int64) if GATE in operators else None,
        alpha=torch.tensor([lane.alpha for lane in ordered]),
        adds=operators.count(ADD),
        gates=operators.count(GATE),
        count=len(ordered),
        learns=True,
        silent=silent,
    )


def formula(seeds: Seeds, lane: Lane, h: Tensor) -> Tensor:
    """What the operator says, in as many words."""
    delta = seeds.delta_of(lane.lane, h)
    alpha = torch.tensor(lane.alpha).double()
    if lane.operator is ADD:
        return h + alpha * delta
    if lane.operator is MULTIPLY:
        return h * (1 + alpha * torch.tanh(delta))
    return h + alpha * seeds.gate_of(lane.lane, h) * delta


def check(axis: int, extent: tuple[int, ...], calls: Sequence[Sequence[Lane]], silent: Sequence[bool] = ()) -> None:
    """Values, and gradients of the stream and of every parameter, equal those of a loop over lanes."""
    silent = list(silent) or [False] * len(calls)
    ours, theirs = Seeds(axis), Seeds(axis)
    parts = [draw(10 + lane, BATCH, WIDTH, *extent) for lane in range(LANES)]
    h = layout(parts, axis).requires_grad_()
    apart = [part.clone().requires_grad_() for part in parts]
    made = [call_of(lanes, 2 + number, silent=s) for number, (lanes, s) in enumerate(zip(calls, silent, strict=True))]
    y = blend(h, tuple(made), LANES, axis, ours.modules())
    expected = list(apart)
    hidden = torch.zeros((), dtype=torch.float64)
    upstream = draw(30, *y.shape)
    for lanes, unheard in zip(calls, silent, strict=True):
        for lane in lanes:
            if unheard:
                # The stream goes by as it is, and the seed alone learns from what comes back.
                seen = apart[lane.lane].detach()
                term = formula(theirs, lane, seen) - seen
                hidden = hidden + (term * take(upstream, axis, lane.lane)).sum()
            else:
                expected[lane.lane] = formula(theirs, lane, apart[lane.lane])
    assert y.shape == h.shape
    torch.testing.assert_close(y, layout(expected, axis), rtol=1e-12, atol=1e-12)
    (y * upstream).sum().backward()
    ((layout(expected, axis) * upstream).sum() + hidden).backward()
    torch.testing.assert_close(h.grad, layout([part.grad for part in apart], axis), rtol=1e-12, atol=1e-12)
    for mine, other in ((ours.scale_L, theirs.scale_L), (ours.gate_LD, theirs.gate_LD)):
        assert (mine.grad is None) == (other.grad is None)
        if other.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-12, atol=1e-12)
    assert len(ours.asked) == len(calls)


@shapes
@pytest.mark.parametrize("operator", list(Operator))
@pytest.mark.parametrize("lanes", [[0, 1, 2, 3, 4], [3], [0, 2]], ids=["all", "one", "some"])
def test_one_operator(axis: int, extent: tuple[int, ...], operator: Operator, lanes: list[int]):
    check(axis, extent, [[Lane(lane, operator, 0.2 * (lane + 1)) for lane in lanes]])


@shapes
def test_all_operators_in_one_call(axis: int, extent: tuple[int, ...]):
    check(axis, extent, [[Lane(0, MULTIPLY, 0.3), Lane(1, GATE, 0.5), Lane(2, ADD, 1.0), Lane(4, MULTIPLY, 1.0)]])
    check(axis, extent, [[Lane(lane, op, 0.6) for lane, op in enumerate([ADD, ADD, GATE, MULTIPLY, MULTIPLY])]])
    check(axis, extent, [[Lane(4, ADD, 0.1), Lane(0, MULTIPLY, 0.9)], [Lane(1, GATE, 0.5), Lane(3, MULTIPLY, 0.4)]])
    check(axis, extent, [[Lane(2, GATE, 0.1), Lane(0, ADD, 0.9)], [Lane(1, ADD, 0.5)], [Lane(4, GATE, 0.25)]])


@shapes
@pytest.mark.parametrize("operator", list(Operator))
def test_a_silent_call_is_not_heard(axis: int, extent: tuple[int, ...], operator: Operator):
    everyone = [Lane(lane, operator, 0.7) for lane in range(LANES)]
    check(axis, extent, [everyone], silent=[True])
    check(axis, extent, [everyone[1:3]], silent=[True])
    check(axis, extent, [everyone[:2], everyone[3:]], silent=[False, True])
    check(axis, extent, [[everyone[0], Lane(4, ADD, 1.0)], [Lane(2, MULTIPLY, 0.5)]], silent=[True, True])


@shapes
def test_no_call_is_the_stream_itself(axis: int, extent: tuple[int, ...]):
    h = layout([draw(lane, BATCH, WIDTH, *extent) for lane in range(LANES)], axis)
    assert blend(h, (), LANES, axis, Seeds(axis).modules()) is h


@shapes
@pytest.mark.parametrize("operator", list(Operator))
def test_operators_are_bounded_and_start_at_the_identity(axis: int, extent: tuple[int, ...], operator: Operator):
    h = layout([draw(lane, BATCH, WIDTH, *extent) for lane in range(LANES)], axis)
    seeds = Seeds(axis)
    at_zero = blend(h, (call_of([Lane(lane, operator, 0.0) for lane in range(LANES)]),), LANES, axis, seeds.modules())
    assert torch.equal(at_zero, h)
    with torch.no_grad():
        seeds.scale_L.fill_(1e6)
    blended = blend(h, (call_of([Lane(lane, operator, 1.0) for lane in range(LANES)]),), LANES, axis, seeds.modules())
    change = (blended - h).abs()
    limit = h.abs() if operator is MULTIPLY else 1e6 * h.sin().abs()
    assert (change <= limit * (1 + 1e-12)).all()


def poisoned(value: float, lane: int) -> Callable[[Seeds], None]:
    def poison(seeds: Seeds) -> None:
        with torch.no_grad():
            seeds.scale_L[lane] = value
            seeds.gate_LD[lane] = value

    return poison


@shapes
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_a_lane_without_number_stays_by_itself(axis: int, extent: tuple[int, ...], value: float):
    """Bit for bit: values, and gradients of streams and seeds."""
    operators = [ADD, GATE, MULTIPLY, GATE, ADD]
    lanes = [Lane(lane, operator, 0.5) for lane, operator in enumerate(operators)]
    for calls in ([lanes], [lanes[:3], lanes[3:]]):
        results = []
        for spoil in (None, poisoned(value, 1)):
            seeds = Seeds(axis)
            if spoil is not None:
                spoil(seeds)
            h = layout([draw(lane, BATCH, WIDTH, *extent) for lane in range(LANES)], axis).requires_grad_()
            made = tuple(call_of(part, 2 + number) for number, part in enumerate(calls))
            y = blend(h, made, LANES, axis, seeds.modules())
            y.sum().backward()
            results.append((y.detach(), h.grad, seeds.scale_L.grad, seeds.gate_LD.grad))
        (y, h_grad, scale, gate), (y2, h_grad2, scale2, gate2) = results
        for lane in (0, 2, 3, 4):
            assert torch.equal(take(y, axis, lane), take(y2, axis, lane))
            assert torch.equal(take(h_grad, axis, lane), take(h_grad2, axis, lane))
            assert torch.equal(scale[lane], scale2[lane])
            assert torch.equal(gate[lane], gate2[lane])
        assert not take(y2, axis, 1).isfinite().all()


@shapes
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_a_silent_lane_without_number_is_not_heard(axis: int, extent: tuple[int, ...], value: float):
    h = layout([draw(lane, BATCH, WIDTH, *extent) for lane in range(LANES)], axis)
    for lanes in (range(LANES), [1, 2]):
        for operator in Operator:
            seeds = Seeds(axis)
            poisoned(value, 1)(seeds)
            stream = h.clone().requires_grad_()
            call = call_of([Lane(lane, operator, 1.0) for lane in lanes], silent=True)
            y = blend(stream, (call,), LANES, axis, seeds.modules())
            assert torch.equal(y, h)
            y.square().sum().backward()
            assert torch.equal(stream.grad, 2 * h)
            assert seeds.scale_L.grad[2] != 0
