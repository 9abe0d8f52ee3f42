"""Gates and their checks by name: what is asked before a transition, and what can refuse an action."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from esper.leyline.stages import Stage

if TYPE_CHECKING:
    import torch


class Gate(IntEnum):
    """Gate in front of a stage."""

    G1 = 1
    G2 = 2
    G3 = 3
    G5 = 5


GATE_OF_STAGE = {
    Stage.TRAINING: Gate.G1,
    Stage.BLENDING: Gate.G2,
    Stage.PROBATIONARY: Gate.G3,
    Stage.FOSSILIZED: Gate.G5,
}
"""The gate that an advance or a fossilization into a stage must pass."""


class Check(IntEnum):
    """What refused an action. NONE: nothing did. Up to SPEED the structure, from HOST_LOSS on a gate."""

    NONE = 0
    RANGE = 1
    STAGE = 2
    BLUEPRINT = 3
    SPEED = 4
    HOST_LOSS = 5
    TRAINING_DECISIONS = 6
    INCUBATOR_GAIN = 7
    GRADIENT_FINITE = 8
    GRADIENT_VANISHING = 9
    GRADIENT_EXPLODING = 10
    ALPHA_AT_TARGET = 11
    PROBATION_DECISIONS = 12
    CONTRIBUTION = 13


GATE_CHECKS: dict[Gate, tuple[Check, ...]] = {
    Gate.G1: (Check.HOST_LOSS,),
    Gate.G2: (
        Check.TRAINING_DECISIONS,
        Check.GRADIENT_FINITE,
        Check.GRADIENT_VANISHING,
        Check.GRADIENT_EXPLODING,
        Check.INCUBATOR_GAIN,
    ),
    Gate.G3: (Check.ALPHA_AT_TARGET,),
    Gate.G5: (Check.PROBATION_DECISIONS, Check.CONTRIBUTION),
}
WORTH_CHECKS = (Check.INCUBATOR_GAIN, Check.CONTRIBUTION)
"""Checks of a measured worth (nats), which comes with a standard error."""
ALL_GATE_CHECKS: tuple[Check, ...] = tuple(c for checks in GATE_CHECKS.values() for c in checks)

CHECK_TEXT: dict[Check, str] = {
    Check.NONE: "accepted",
    Check.RANGE: "the action names a choice that does not exist",
    Check.STAGE: "the slot's stage or its moving alpha does not allow it",
    Check.BLUEPRINT: "the blueprint does not fit the slot",
    Check.SPEED: "only a blended seed with resting alpha can be faded out",
    Check.HOST_LOSS: "host loss measured and finite",
    Check.TRAINING_DECISIONS: "decisions in TRAINING",
    Check.INCUBATOR_GAIN: "incubator gain (nats)",
    Check.GRADIENT_FINITE: "gradient norm finite",
    Check.GRADIENT_VANISHING: "gradient ratio above the vanishing limit",
    Check.GRADIENT_EXPLODING: "gradient ratio below the exploding limit",
    Check.ALPHA_AT_TARGET: "distance of alpha to its target",
    Check.PROBATION_DECISIONS: "decisions in PROBATIONARY",
    Check.CONTRIBUTION: "contribution (nats)",
}


@dataclass(frozen=True)
class GateReport:
    """What every gate says of every slot. C is the number of gate checks, in the order of `ALL_GATE_CHECKS`.

    Attributes
    ----------
    value_CRS
        Measured values (float32, NaN where not measured).
    passed_CRS
        Bool; an unmeasured value never passes.
    limit_CRS
        What the values were compared with: the limit, plus the asked multiple of the value's standard error where it
        has one (float32).
    """

    value_CRS: torch.Tensor
    passed_CRS: torch.Tensor
    limit_CRS: torch.Tensor

    def gate_RS(self, gate: Gate) -> torch.Tensor:
        """Bool [R, S]: every check of the gate passed."""
        first = ALL_GATE_CHECKS.index(GATE_CHECKS[gate][0])
        return self.passed_CRS[first : first + len(GATE_CHECKS[gate])].all(0)


@dataclass(frozen=True)
class Outcome:
    """What one decision did; tensors of shape [R].

    Attributes
    ----------
    accepted
        Bool.
    refused_by
        Value of `Check`, NONE where accepted.
    before, after
        Stage of the named slot before and after the action.
    """

    accepted: torch.Tensor
    refused_by: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
