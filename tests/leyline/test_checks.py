"""Gates, their checks, and the report of all of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.leyline.checks import (
    ALL_GATE_CHECKS,
    CHECK_TEXT,
    GATE_CHECKS,
    GATE_OF_STAGE,
    Check,
    Gate,
    GateReport,
)
from esper.leyline.stages import ADVANCE_TARGET, TERMINAL_STAGES

gates = pytest.mark.parametrize("gate", list(Gate), ids=lambda g: g.name)


def report(passed_CRS):
    return GateReport(torch.zeros(passed_CRS.shape), passed_CRS, torch.zeros(passed_CRS.shape))


def test_gates_stand_in_front_of_every_stage_that_is_entered_by_choice():
    # All an advance or a fossilization can enter, and nothing else: a germination asks no gate.
    assert set(GATE_OF_STAGE) == set(ADVANCE_TARGET.values()) | TERMINAL_STAGES
    by_name = {stage.name: gate.name for stage, gate in GATE_OF_STAGE.items()}
    assert by_name == {"TRAINING": "G1", "BLENDING": "G2", "PROBATIONARY": "G3", "FOSSILIZED": "G5"}


def test_what_each_gate_asks():
    # Section 3.2 of the design; G2 judges learning and gradients, G5 time and contribution.
    assert {gate.name: {check.name for check in checks} for gate, checks in GATE_CHECKS.items()} == {
        "G1": {"HOST_LOSS"},
        "G2": {
            *("TRAINING_DECISIONS", "INCUBATOR_GAIN"),
            *("GRADIENT_FINITE", "GRADIENT_VANISHING", "GRADIENT_EXPLODING"),
        },
        "G3": {"ALPHA_AT_TARGET"},
        "G5": {"PROBATION_DECISIONS", "CONTRIBUTION"},
    }


def test_every_check_has_one_owner():
    # Either it judges the structure of an action, or exactly one gate asks it.
    structural = [check for check in Check if check < Check.HOST_LOSS]
    assert [check.name for check in structural] == ["NONE", "RANGE", "STAGE", "BLUEPRINT", "SPEED"]
    assert sorted([*structural, *ALL_GATE_CHECKS]) == list(Check)


def test_all_gate_checks_are_in_the_order_of_the_gates():
    # `gate_RS` takes a slice: the checks of a gate must follow one another.
    position = 0
    for checks in GATE_CHECKS.values():
        assert ALL_GATE_CHECKS[position : position + len(checks)] == checks
        position += len(checks)
    assert position == len(ALL_GATE_CHECKS)


def test_every_check_has_its_own_text():
    assert set(CHECK_TEXT) == set(Check)
    assert len(set(CHECK_TEXT.values())) == len(Check)
    assert all(text.strip() and "\n" not in text for text in CHECK_TEXT.values())


@gates
@pytest.mark.parametrize("check", ALL_GATE_CHECKS, ids=lambda c: c.name)
def test_one_failed_check_closes_its_own_gate_only(gate, check):
    passed_CRS = torch.ones(len(ALL_GATE_CHECKS), 2, 3, dtype=torch.bool)
    passed_CRS[ALL_GATE_CHECKS.index(check), 1, 2] = False
    closed = ~report(passed_CRS).gate_RS(gate)
    assert closed.nonzero().tolist() == ([[1, 2]] if check in GATE_CHECKS[gate] else [])


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=9, max_size=9))
def test_a_gate_opens_when_all_its_checks_pass(table):
    assert len(ALL_GATE_CHECKS) == 9
    passed_CRS = torch.tensor(table).view(9, 2, 3)
    for gate, checks in GATE_CHECKS.items():
        opened = report(passed_CRS).gate_RS(gate)
        for place in range(6):
            expected = all(table[ALL_GATE_CHECKS.index(check)][place] for check in checks)
            assert bool(opened.flatten()[place]) is expected
