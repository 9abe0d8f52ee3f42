"""What each gate says: every check at its limit, and that nothing unmeasured passes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.kasmina.gates import Gates
from esper.leyline.checks import ALL_GATE_CHECKS, GATE_CHECKS, GATE_OF_STAGE, Check, Gate, GateReport
from esper.leyline.config import GateConfig
from esper.leyline.slots import AlphaMode, SlotTensors
from esper.leyline.stages import Stage
from helpers.slot_oracle import empty_slot, failed_checks

NAN, INF = float("nan"), float("inf")
LIMITS = GateConfig(
    min_training_decisions=4,
    min_incubator_gain=0.25,
    min_gradient_ratio=0.01,
    max_gradient_ratio=30.0,
    min_probation_decisions=6,
    min_contribution=-0.5,
    incubator_gain_errors=-1.0,
    contribution_errors=2.0,
)
FIELD = {
    Check.TRAINING_DECISIONS: "stage_age",
    Check.INCUBATOR_GAIN: "incubator_gain",
    Check.GRADIENT_FINITE: "gradient_norm",
    Check.GRADIENT_VANISHING: "gradient_ratio",
    Check.GRADIENT_EXPLODING: "gradient_ratio",
    Check.PROBATION_DECISIONS: "stage_age",
    Check.CONTRIBUTION: "contribution",
}
"""Where the measured value of a check stands; the other checks have their own tests."""


def below(limit: float) -> float:
    return float(np.nextafter(np.float32(limit), np.float32(-INF)))


def above(limit: float) -> float:
    return float(np.nextafter(np.float32(limit), np.float32(INF)))


def single(value: float, field: str | None = None, host_loss: float = 1.0, limits: GateConfig = LIMITS) -> GateReport:
    """Report on one slot that holds `value` in `field` and is otherwise empty."""
    slots = SlotTensors.empty(1, 1)
    slots.incubator_gain_se.zero_()
    slots.contribution_se.zero_()
    if field is not None:
        getattr(slots, field)[0, 0] = value
    return Gates(limits, "cpu").report(slots, torch.tensor([host_loss]))


def says(report: GateReport, check: Check) -> tuple[float, bool, float]:
    """Value, passed and limit of one check of the first slot."""
    at = ALL_GATE_CHECKS.index(check)
    return report.value_CRS[at, 0, 0].item(), bool(report.passed_CRS[at, 0, 0]), report.limit_CRS[at, 0, 0].item()


@pytest.mark.parametrize(
    ("check", "value", "passes"),
    [
        (Check.TRAINING_DECISIONS, 0, False),
        (Check.TRAINING_DECISIONS, 3, False),
        (Check.TRAINING_DECISIONS, 4, True),
        (Check.TRAINING_DECISIONS, 5, True),
        (Check.PROBATION_DECISIONS, 5, False),
        (Check.PROBATION_DECISIONS, 6, True),
        (Check.PROBATION_DECISIONS, 7, True),
        (Check.GRADIENT_FINITE, 0.0, True),
        (Check.GRADIENT_FINITE, 3e38, True),
        (Check.GRADIENT_FINITE, INF, False),
        (Check.GRADIENT_FINITE, NAN, False),
        (Check.GRADIENT_VANISHING, 0.0, False),
        (Check.GRADIENT_VANISHING, below(0.01), False),
        (Check.GRADIENT_VANISHING, 0.01, False),
        (Check.GRADIENT_VANISHING, above(0.01), True),
        (Check.GRADIENT_VANISHING, NAN, False),
        (Check.GRADIENT_EXPLODING, 0.0, True),
        (Check.GRADIENT_EXPLODING, below(30.0), True),
        (Check.GRADIENT_EXPLODING, 30.0, False),
        (Check.GRADIENT_EXPLODING, above(30.0), False),
        (Check.GRADIENT_EXPLODING, INF, False),
        (Check.GRADIENT_EXPLODING, NAN, False),
        (Check.INCUBATOR_GAIN, -INF, False),
        (Check.INCUBATOR_GAIN, below(0.25), False),
        (Check.INCUBATOR_GAIN, 0.25, False),
        (Check.INCUBATOR_GAIN, above(0.25), True),
        (Check.INCUBATOR_GAIN, NAN, False),
        (Check.CONTRIBUTION, below(-0.5), False),
        (Check.CONTRIBUTION, -0.5, False),
        (Check.CONTRIBUTION, above(-0.5), True),
        (Check.CONTRIBUTION, NAN, False),
    ],
)
def test_a_check_passes_on_the_right_side_of_its_limit(check, value, passes):
    measured, passed, _ = says(single(value, FIELD[check]), check)
    assert measured == pytest.approx(value, nan_ok=True)
    assert passed == passes


@pytest.mark.parametrize(
    ("host_loss", "passes"),
    [(0.0, True), (2.3, True), (3e38, True), (INF, False), (-INF, False), (NAN, False)],
)
def test_the_host_loss_must_be_measured_and_finite(host_loss, passes):
    report = single(0.0, host_loss=host_loss)
    measured, passed, _ = says(report, Check.HOST_LOSS)
    assert measured == pytest.approx(host_loss, nan_ok=True)
    assert passed == passes
    assert report.gate_RS(Gate.G1).item() == passes


def test_the_limits_are_the_configured_ones_and_move_the_checks():
    report = single(5, "stage_age")
    expected = {
        Check.TRAINING_DECISIONS: 4.0,
        Check.GRADIENT_VANISHING: 0.01,
        Check.GRADIENT_EXPLODING: 30.0,
        Check.INCUBATOR_GAIN: 0.25,
        Check.PROBATION_DECISIONS: 6.0,
        Check.CONTRIBUTION: -0.5,
    }
    for check, limit in expected.items():
        assert says(report, check)[2] == pytest.approx(limit)
    for limit, passes in ((5, True), (6, False)):
        moved = single(5, "stage_age", limits=GateConfig(min_training_decisions=limit))
        assert says(moved, Check.TRAINING_DECISIONS)[1:] == (passes, limit)


def test_an_empty_slot_has_measured_nothing_and_passes_no_quality_gate():
    report = single(0.0, host_loss=NAN)
    for check in (Check.GRADIENT_FINITE, Check.GRADIENT_VANISHING, Check.GRADIENT_EXPLODING, Check.CONTRIBUTION):
        assert math.isnan(says(report, check)[0])
    for gate in (Gate.G1, Gate.G2, Gate.G5):
        assert not report.gate_RS(gate).any()


def alpha_report(mode: AlphaMode, alpha: float, target: float) -> GateReport:
    slots = SlotTensors.empty(1, 1)
    slots.stage[:] = int(Stage.BLENDING)
    slots.alpha_mode[:] = int(mode)
    slots.alpha[:], slots.alpha_target[:] = alpha, target
    return Gates(LIMITS, "cpu").report(slots, torch.tensor([1.0]))


@pytest.mark.parametrize("target", [0.0, 0.5, 0.7, 1.0])
def test_alpha_at_rest_on_its_target_passes(target):
    report = alpha_report(AlphaMode.HOLD, target, target)
    assert says(report, Check.ALPHA_AT_TARGET) == (0.0, True, 0.0)
    assert report.gate_RS(Gate.G3).item()


@pytest.mark.parametrize("mode", [AlphaMode.UP, AlphaMode.DOWN])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7])
def test_moving_alpha_fails_even_where_it_crosses_its_target(mode, alpha):
    report = alpha_report(mode, alpha, 0.7)
    value, passed, _ = says(report, Check.ALPHA_AT_TARGET)
    assert not passed
    assert value == pytest.approx(abs(0.7 - alpha), abs=1e-5)
    assert value > 0
    assert not report.gate_RS(Gate.G3).item()


@pytest.mark.parametrize(("alpha", "target"), [(0.0, 0.7), (0.3, 0.5), (0.7, 0.0), (NAN, 0.5), (0.5, NAN)])
def test_alpha_at_rest_away_from_its_target_fails(alpha, target):
    """For instance in the incubator, where alpha is 0 and its target agreed: the report must not say 0 distance."""
    report = alpha_report(AlphaMode.HOLD, alpha, target)
    value, passed, _ = says(report, Check.ALPHA_AT_TARGET)
    assert not passed
    assert value == pytest.approx(abs(target - alpha), nan_ok=True)


def hand_made(failing: set[Check]) -> GateReport:
    passed = torch.tensor([check not in failing for check in ALL_GATE_CHECKS])[:, None, None].expand(-1, 2, 3).clone()
    return GateReport(passed.float(), passed, torch.zeros(passed.shape))


@pytest.mark.parametrize("check", ALL_GATE_CHECKS)
def test_a_gate_is_closed_by_each_of_its_own_checks_and_by_no_other(check):
    report = hand_made({check})
    for gate in Gate:
        expected = torch.full((2, 3), check not in GATE_CHECKS[gate])
        assert torch.equal(report.gate_RS(gate), expected)


def test_a_gate_is_open_where_all_its_checks_pass_slot_by_slot():
    report = hand_made(set())
    closed = ALL_GATE_CHECKS.index(Check.INCUBATOR_GAIN)
    report.passed_CRS[closed, 1, 2] = False
    for gate in Gate:
        expected = torch.ones(2, 3, dtype=torch.bool)
        if gate is Gate.G2:
            expected[1, 2] = False
        assert torch.equal(report.gate_RS(gate), expected)


@pytest.mark.parametrize(
    ("check", "limit", "multiple"), [(Check.INCUBATOR_GAIN, 0.25, -1.0), (Check.CONTRIBUTION, -0.5, 2.0)]
)
def test_a_worth_is_compared_with_its_limit_and_its_standard_errors(check, limit, multiple):
    field = FIELD[check]
    slots = SlotTensors.empty(2, 3)
    error = torch.tensor([0.0, 0.25, 0.5])
    bound = limit + multiple * error
    setattr(slots, f"{field}_se", error.repeat(2, 1))
    setattr(slots, field, torch.stack([bound, torch.nextafter(bound, torch.tensor(INF))]))
    report = Gates(LIMITS, "cpu").report(slots, torch.ones(2))
    at = ALL_GATE_CHECKS.index(check)
    assert report.passed_CRS[at].tolist() == [[False] * 3, [True] * 3]
    assert torch.equal(report.limit_CRS[at], bound.repeat(2, 1))
    for unmeasured in (NAN, INF):
        getattr(slots, f"{field}_se").fill_(unmeasured)
        assert not Gates(LIMITS, "cpu").report(slots, torch.ones(2)).passed_CRS[at].any()


@pytest.mark.parametrize("unknown", [0, 4, 6, None, "G2"])
def test_an_unknown_gate_raises(unknown):
    with pytest.raises(KeyError):
        hand_made(set()).gate_RS(unknown)


def test_every_gate_and_check_is_reported_once():
    assert sorted(GATE_OF_STAGE.values()) == sorted(Gate)
    assert len(set(ALL_GATE_CHECKS)) == len(ALL_GATE_CHECKS)
    report = Gates(LIMITS, "cpu").report(SlotTensors.empty(4, 3), torch.ones(4))
    assert report.value_CRS.shape == report.passed_CRS.shape == report.limit_CRS.shape == (len(ALL_GATE_CHECKS), 4, 3)
    assert report.value_CRS.dtype == torch.float32
    assert report.passed_CRS.dtype == torch.bool


quantity = st.sampled_from([NAN, INF, -INF, 0.0, -0.5, 0.01, 0.25, 1.0, 30.0, 1e6])
error = st.sampled_from([NAN, INF, 0.0, 0.125, 1.0])
cell = st.fixed_dictionaries(
    {
        "stage_age": st.integers(0, 8),
        "alpha_mode": st.sampled_from(AlphaMode),
        "incubator_gain": quantity,
        "gradient_norm": st.sampled_from([NAN, INF, 0.0, 1.0, 1e30]),
        "gradient_ratio": st.sampled_from([NAN, INF, 0.0, 0.005, 0.5, 29.0, 31.0]),
        "contribution": quantity,
        "incubator_gain_se": error,
        "contribution_se": error,
    }
)


@given(
    cells=st.lists(cell, min_size=6, max_size=6),
    losses=st.lists(st.sampled_from([NAN, INF, 0.0, 2.3]), min_size=3, max_size=3),
)
def test_every_slot_is_judged_by_its_own_measurements(cells, losses):
    """Three rows of two slots against the plain model of the gates, alpha standing at its target."""
    slots = SlotTensors.empty(3, 2)
    for i, values in enumerate(cells):
        for name, value in values.items():
            getattr(slots, name)[i // 2, i % 2] = value
    report = Gates(LIMITS, "cpu").report(slots, torch.tensor(losses))
    for i, values in enumerate(cells):
        slot = empty_slot() | values
        for stage, gate in GATE_OF_STAGE.items():
            failed = failed_checks(slot, stage, LIMITS, losses[i // 2])
            told = [c for c in GATE_CHECKS[gate] if not report.passed_CRS[ALL_GATE_CHECKS.index(c), i // 2, i % 2]]
            assert told == failed
            assert report.gate_RS(gate)[i // 2, i % 2].item() == (not failed)
