"""What each gate says of each slot. Shapes: C gate checks, R rows, S slots.

A check whose quantity, or its standard error, was not measured (NaN), or is infinite, fails.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esper.leyline.checks import ALL_GATE_CHECKS, WORTH_CHECKS, Check, GateReport
from esper.leyline.config import GateConfig
from esper.leyline.slots import AlphaMode, SlotTensors

_UPPER = frozenset({Check.HOST_LOSS, Check.GRADIENT_FINITE, Check.GRADIENT_EXPLODING, Check.ALPHA_AT_TARGET})
"""Checks whose limit is an upper one; the others ask for at least, or more than, theirs."""
_INCLUSIVE = frozenset({Check.TRAINING_DECISIONS, Check.PROBATION_DECISIONS, Check.ALPHA_AT_TARGET})
"""Checks that the limit itself passes."""


def gate_limits(config: GateConfig) -> dict[Check, float]:
    """Limit of every check; infinite where finite is all that is asked."""
    return {
        Check.HOST_LOSS: torch.inf,
        Check.TRAINING_DECISIONS: config.min_training_decisions,
        Check.GRADIENT_FINITE: torch.inf,
        Check.GRADIENT_VANISHING: config.min_gradient_ratio,
        Check.GRADIENT_EXPLODING: config.max_gradient_ratio,
        Check.INCUBATOR_GAIN: config.min_incubator_gain,
        Check.ALPHA_AT_TARGET: 0.0,
        Check.PROBATION_DECISIONS: config.min_probation_decisions,
        Check.CONTRIBUTION: config.min_contribution,
    }


def gate_errors(config: GateConfig) -> dict[Check, float]:
    """Multiple of the standard error that is added to the limit of each of `WORTH_CHECKS`."""
    return {Check.INCUBATOR_GAIN: config.incubator_gain_errors, Check.CONTRIBUTION: config.contribution_errors}


class Gates:
    """The gates of one configuration.

    Parameters
    ----------
    config
        Limits.
    device
        Device of the slot tensors.
    """

    def __init__(self, config: GateConfig, device: torch.device | str) -> None:
        limits = gate_limits(config)
        self._limit_C = torch.tensor([float(limits[c]) for c in ALL_GATE_CHECKS], device=device)[:, None, None]
        self._errors = gate_errors(config)
        sign = [-1.0 if c in _UPPER else 1.0 for c in ALL_GATE_CHECKS]
        self._sign_C = torch.tensor(sign, device=device)[:, None, None]
        self._inclusive_C = torch.tensor([c in _INCLUSIVE for c in ALL_GATE_CHECKS], device=device)[:, None, None]

    def report(self, slots: SlotTensors, host_loss_R: Tensor) -> GateReport:
        """Measure every check of every slot.

        Parameters
        ----------
        slots
            Their state now.
        host_loss_R
            Reward-validation loss of each row (nats), NaN before the first measurement.
        """
        moving = slots.alpha_mode != int(AlphaMode.HOLD)
        # A ramp in progress is never at its target, even where two of its points coincide.
        distance = (slots.alpha - slots.alpha_target).abs()
        distance = torch.where(moving, distance.clamp(min=1e-6), distance)
        value = {
            Check.HOST_LOSS: host_loss_R.float()[:, None].expand_as(slots.alpha),
            Check.TRAINING_DECISIONS: slots.stage_age.float(),
            Check.GRADIENT_FINITE: slots.gradient_norm,
            Check.GRADIENT_VANISHING: slots.gradient_ratio,
            Check.GRADIENT_EXPLODING: slots.gradient_ratio,
            Check.INCUBATOR_GAIN: slots.incubator_gain,
            Check.ALPHA_AT_TARGET: distance,
            Check.PROBATION_DECISIONS: slots.stage_age.float(),
            Check.CONTRIBUTION: slots.contribution,
        }
        value_CRS = torch.stack([value[c] for c in ALL_GATE_CHECKS])
        error = {Check.INCUBATOR_GAIN: slots.incubator_gain_se, Check.CONTRIBUTION: slots.contribution_se}
        limit_CRS = self._limit_C.expand_as(value_CRS).clone()
        for check in WORTH_CHECKS:
            error_RS = error[check].masked_fill(~error[check].isfinite(), torch.nan)
            limit_CRS[ALL_GATE_CHECKS.index(check)] += self._errors[check] * error_RS
        signed_CRS, bound_CRS = value_CRS * self._sign_C, limit_CRS * self._sign_C
        passed_CRS = signed_CRS > bound_CRS
        passed_CRS |= (signed_CRS == bound_CRS) & self._inclusive_C
        passed_CRS &= value_CRS.isfinite()
        return GateReport(value_CRS, passed_CRS, limit_CRS)
