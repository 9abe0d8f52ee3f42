"""The state of all slots of all rows as one structure of arrays.

Shape suffixes: R rows, S slots, B blueprints, O operations.
"""

from dataclasses import dataclass, fields, replace
from enum import IntEnum
from functools import cache
from typing import Self

import numpy as np
import torch

from esper.leyline.actions import Blueprint, Curve, Op, Operator
from esper.leyline.stages import (
    ADVANCABLE_STAGES,
    BLENDED_STAGES,
    CULLABLE_STAGES,
    FOSSILIZABLE_STAGES,
    GERMINABLE_STAGES,
    RETARGETABLE_STAGES,
    STAGE_COUNT,
    Stage,
    stage_table,
)
from esper.leyline.transfer import Parcel, deliver

NOT_MEASURED = float("nan")


class AlphaMode(IntEnum):
    """What the alpha controller of a slot is doing."""

    HOLD = 0
    UP = 1
    DOWN = 2


_INT_EMPTY = {
    "stage": int(Stage.DORMANT),
    "blueprint": int(Blueprint.NOOP),
    "operator": int(Operator.ADD),
    "curve": int(Curve.LINEAR),
    "alpha_mode": int(AlphaMode.HOLD),
    "ramp_done": 0,
    "ramp_total": 0,
    "age": 0,
    "stage_age": 0,
    "cooldown": 0,
    "seed_id": -1,
    "parameters": 0,
}
_FLOAT_EMPTY = {
    "alpha": 0.0,
    "alpha_start": 0.0,
    "alpha_target": 0.0,
    "contribution": NOT_MEASURED,
    "contribution_se": NOT_MEASURED,
    "incubator_gain": NOT_MEASURED,
    "incubator_gain_se": NOT_MEASURED,
    "gradient_norm": NOT_MEASURED,
    "gradient_ratio": NOT_MEASURED,
}
EMPTY_SLOT: dict[str, float] = {**_INT_EMPTY, **_FLOAT_EMPTY}
"""What an empty slot holds in each array of [R, S]."""


@dataclass
class SlotTensors:
    """Structure of arrays [R, S]: int64 for indices and counts, float32 for quantities.

    Attributes
    ----------
    stage, blueprint, operator, curve, alpha_mode
        Values of `Stage`, `Blueprint`, `Operator`, `Curve`, `AlphaMode`.
    ramp_done, ramp_total
        Decisions of the current (or, before blending, the agreed) ramp.
    age, stage_age
        Decisions since germination, and completed in the present stage.
    cooldown
        Decisions left in CULLED, EMBARGOED or RESETTING.
    seed_id
        The k of "the k-th seed of this row", -1 where there is none.
    parameters
        Learned numbers of the seed.
    alpha, alpha_start, alpha_target
        Share of the seed in the forward pass: now, at the ramp's start, at its end.
    contribution, contribution_se
        How much the blended seed lowers the reward-validation loss, and its standard error (nats).
    incubator_gain, incubator_gain_se
        How much the seed in TRAINING would lower it if blended at its target (nats).
    gradient_norm, gradient_ratio
        Mean norm of the seed's gradient in the last decision; its root mean square over the host's.
    seeds_made
        [R], seeds germinated so far.
    """

    stage: torch.Tensor
    blueprint: torch.Tensor
    operator: torch.Tensor
    curve: torch.Tensor
    alpha_mode: torch.Tensor
    ramp_done: torch.Tensor
    ramp_total: torch.Tensor
    age: torch.Tensor
    stage_age: torch.Tensor
    cooldown: torch.Tensor
    seed_id: torch.Tensor
    parameters: torch.Tensor
    alpha: torch.Tensor
    alpha_start: torch.Tensor
    alpha_target: torch.Tensor
    contribution: torch.Tensor
    contribution_se: torch.Tensor
    incubator_gain: torch.Tensor
    incubator_gain_se: torch.Tensor
    gradient_norm: torch.Tensor
    gradient_ratio: torch.Tensor
    seeds_made: torch.Tensor

    @classmethod
    def empty(cls, rows: int, slots: int, device: torch.device | str = "cpu") -> Self:
        """All slots dormant."""
        ints = {k: torch.full((rows, slots), v, dtype=torch.int64, device=device) for k, v in _INT_EMPTY.items()}
        floats = {k: torch.full((rows, slots), v, dtype=torch.float32, device=device) for k, v in _FLOAT_EMPTY.items()}
        return cls(**ints, **floats, seeds_made=torch.zeros(rows, dtype=torch.int64, device=device))

    @property
    def rows(self) -> int:
        """R."""
        return self.stage.shape[0]

    @property
    def slots(self) -> int:
        """S."""
        return self.stage.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the arrays live."""
        return self.stage.device

    def clone(self) -> Self:
        """Deep copy."""
        return type(self)(**{f.name: getattr(self, f.name).clone() for f in fields(self)})

    def of_rows(self, rows: slice) -> Self:
        """Some of the rows, as views."""
        return type(self)(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def fading_RS(self) -> torch.Tensor:
        """Bool: the seed is on its way to alpha 0, after which it is culled."""
        return _fading(self.stage, self.alpha_target)

    def blended_RS(self) -> torch.Tensor:
        """Bool: the seed takes part in the host's forward pass, and is paid for (see `Structure.blended`)."""
        return _in_stages(self.stage, BLENDED_STAGES) & (self.alpha > 0)

    def on_trial_RS(self) -> torch.Tensor:
        """Bool: there is a seed that can still be culled; at the end of an episode it is."""
        return _in_stages(self.stage, CULLABLE_STAGES)

    def structure_parcel(self) -> Parcel:
        """Pack what decides which kernels run: the fields of `Structure`."""
        return Parcel.pack(
            {
                "stage": self.stage,
                "blueprint": self.blueprint,
                "operator": self.operator,
                "seed_id": self.seed_id,
                "visible": self.alpha > 0,
                "fading": self.fading_RS(),
            }
        )

    def structure(self) -> "Structure":
        """Copy what decides which kernels run to the host, in one transfer."""
        (cargo,) = deliver(self.structure_parcel())
        return Structure(**cargo)


@dataclass(frozen=True)
class Structure:
    """Host copy of the part of the slots that decides which kernels run; arrays [R, S]."""

    stage: np.ndarray
    blueprint: np.ndarray
    operator: np.ndarray
    seed_id: np.ndarray
    visible: np.ndarray
    """Alpha is above 0."""
    fading: np.ndarray

    def blended(self) -> np.ndarray:
        """Bool [R, S]: the seed takes part in the host's forward pass.

        A seed at alpha 0 is left out altogether: 0 times a non-finite number would reach the host.
        """
        table: np.ndarray = stage_table(BLENDED_STAGES).numpy()
        mask: np.ndarray = table[self.stage] & self.visible
        return mask

    def without(self, culled_RS: np.ndarray) -> "Structure":
        """The same after a cull of some seeds (bool [R, S]), of which the host has only just heard."""
        if not culled_RS.any():
            return self
        return replace(
            self,
            stage=np.where(culled_RS, int(Stage.CULLED), self.stage),
            blueprint=np.where(culled_RS, _INT_EMPTY["blueprint"], self.blueprint),
            operator=np.where(culled_RS, _INT_EMPTY["operator"], self.operator),
            seed_id=np.where(culled_RS, _INT_EMPTY["seed_id"], self.seed_id),
            visible=self.visible & ~culled_RS,
            fading=self.fading & ~culled_RS,
        )


STAGES_OF_OP: dict[Op, frozenset[Stage]] = {
    Op.GERMINATE: GERMINABLE_STAGES,
    Op.SET_ALPHA_TARGET: RETARGETABLE_STAGES,
    Op.CULL: CULLABLE_STAGES,
    Op.FOSSILIZE: FOSSILIZABLE_STAGES,
    Op.ADVANCE: ADVANCABLE_STAGES,
}
"""Stages in which an operation may name a slot; WAIT names none."""


def legal_ops(slots: SlotTensors, fits_SB: torch.Tensor) -> torch.Tensor:
    """Bool [R, O, S]: which operation is structurally possible on which slot.

    WAIT names no slot and is legal everywhere. Gates are not asked here: they judge a seed, not the structure.
    CULL is listed where an immediate cull is possible; a gradual one also needs `gradual_cull_legal`.
    """
    every_O11 = torch.arange(len(Op), device=slots.device)[:, None, None]
    legal_ORS = _legal(every_O11, slots.stage, slots.alpha_mode, slots.fading_RS(), fits_SB.any(1))
    return legal_ORS.transpose(0, 1)


def legal_choice(slots: SlotTensors, fits_SB: torch.Tensor, op_R: torch.Tensor, slot_R: torch.Tensor) -> torch.Tensor:
    """Bool [R]: `legal_ops` for one operation and slot of each row."""
    at = slot_R[:, None]
    stage, mode, target = (t.gather(1, at)[:, 0] for t in (slots.stage, slots.alpha_mode, slots.alpha_target))
    return _legal(op_R, stage, mode, _fading(stage, target), fits_SB.any(1)[slot_R])


def gradual_cull_legal(slots: SlotTensors) -> torch.Tensor:
    """Bool [R, S]: a cull that fades the seed out (alpha speed above 0) is possible."""
    # It is a new alpha target, and asks for the same.
    op = torch.full((1, 1), int(Op.SET_ALPHA_TARGET), device=slots.device)
    return _legal(op, slots.stage, slots.alpha_mode, slots.fading_RS(), torch.ones_like(slots.stage, dtype=torch.bool))


def _in_stages(stage: torch.Tensor, stages: frozenset[Stage]) -> torch.Tensor:
    """Elementwise: the stage is one of these."""
    return _table_of(stages, stage.device)[stage]


@cache
def _table_of(stages: frozenset[Stage], device: torch.device) -> torch.Tensor:
    """`stage_table`, made once for each device."""
    return stage_table(stages).to(device)


def _fading(stage: torch.Tensor, alpha_target: torch.Tensor) -> torch.Tensor:
    return (stage == int(Stage.BLENDING)) & (alpha_target == 0)


def _legal(
    op: torch.Tensor, stage: torch.Tensor, alpha_mode: torch.Tensor, fading: torch.Tensor, fits: torch.Tensor
) -> torch.Tensor:
    """Elementwise: the stage allows it, alpha rests where that is asked, something fits where something is planted."""
    legal = _stage_of_op(op.device)[op, stage]
    legal = legal & ((op != int(Op.SET_ALPHA_TARGET)) | (alpha_mode == int(AlphaMode.HOLD)))
    return legal & ((op != int(Op.ADVANCE)) | ~fading) & ((op != int(Op.GERMINATE)) | fits)


@cache
def _stage_of_op(device: torch.device) -> torch.Tensor:
    """Bool [O, stages]: `STAGES_OF_OP` as a lookup tensor, WAIT legal everywhere, made once for each device."""
    rows = [stage_table(STAGES_OF_OP[op]) if op in STAGES_OF_OP else torch.ones(STAGE_COUNT) for op in Op]
    return torch.stack([row.bool() for row in rows]).to(device)
