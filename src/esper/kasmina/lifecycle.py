"""The lifecycle of all slots: `apply` performs one action per row, `tick` lets a decision pass, `harvest` ends it all.

Whole-tensor functions of `SlotTensors`, changed in place. Shapes: R rows, S slots, O operations, C gate checks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from esper.kasmina.alpha import ramp_alpha
from esper.kasmina.blueprints.registry import seed_parameters
from esper.leyline.actions import (
    ALPHA_SPEEDS,
    ALPHA_TARGETS,
    BLUEPRINTS_OF_KIND,
    HEADS_OF_OP,
    STYLE_CURVE,
    STYLE_OPERATOR,
    TEMPOS,
    Blueprint,
    Head,
    Op,
    Operator,
    Style,
    head_sizes,
)
from esper.leyline.checks import ALL_GATE_CHECKS, GATE_CHECKS, GATE_OF_STAGE, Check, GateReport, Outcome
from esper.leyline.sites import SlotConfig
from esper.leyline.slots import EMPTY_SLOT, AlphaMode, SlotTensors, legal_choice
from esper.leyline.stages import STAGE_COUNT, WAITING_STAGES, Stage, next_stage_table, stage_table
from esper.leyline.view import check_actions

_CLEARED = tuple(name for name in EMPTY_SLOT if name not in ("stage", "cooldown"))


@dataclass
class Lifecycle:
    """The rules of the lifecycle for the slots of one kind of host.

    Parameters
    ----------
    slot_config
        The slots.
    fits_SB
        Bool: which blueprints may be germinated in which slot.
    embargo
        Decisions in EMBARGOED.
    device
        Device of the slot tensors.
    """

    slot_config: SlotConfig
    fits_SB: Tensor
    embargo: int
    device: torch.device | str = "cpu"
    _tables: dict[str, Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        sizes = head_sizes(self.slot_config.slots)
        durations = dict.fromkeys(WAITING_STAGES, 1) | {Stage.EMBARGOED: self.embargo}
        counts = [
            [
                [seed_parameters(b, op, site) if b in BLUEPRINTS_OF_KIND[site.kind] else 0 for op in Operator]
                for b in Blueprint
            ]
            for site in self.slot_config.sites
        ]
        gate_of_stage = torch.zeros(STAGE_COUNT, len(ALL_GATE_CHECKS), dtype=torch.bool)
        for stage, gate in GATE_OF_STAGE.items():
            gate_of_stage[int(stage)] = torch.tensor([c in GATE_CHECKS[gate] for c in ALL_GATE_CHECKS])
        uses = torch.tensor([[head in HEADS_OF_OP[op] for head in Head] for op in Op])
        tables = {
            "sizes": torch.tensor([sizes[h] for h in Head]),
            "uses": uses,
            "duration": torch.tensor([durations.get(Stage(s), 0) if s != 5 else 0 for s in range(STAGE_COUNT)]),
            "next": next_stage_table(),
            "waiting": stage_table(frozenset(WAITING_STAGES)),
            "counts": torch.tensor(counts),
            "checks_of_stage": gate_of_stage,
            "check_ids": torch.tensor([int(c) for c in ALL_GATE_CHECKS]),
            "operator": torch.tensor([int(STYLE_OPERATOR[s]) for s in Style]),
            "curve": torch.tensor([int(STYLE_CURVE[s]) for s in Style]),
            "tempo": torch.tensor(TEMPOS),
            "target": torch.tensor(ALPHA_TARGETS),
            "speed": torch.tensor(ALPHA_SPEEDS),
            "slot_index": torch.arange(self.slot_config.slots),
            "fits": self.fits_SB,
        }
        self._tables = {name: table.to(self.device) for name, table in tables.items()}

    @property
    def parameter_counts(self) -> Tensor:
        """Int64 [S, blueprints, operators]: learned numbers of a seed."""
        return self._tables["counts"]

    def apply(self, slots: SlotTensors, actions: Tensor, gates: GateReport) -> Outcome:
        """Perform one action for each row; a refused action changes nothing.

        Parameters
        ----------
        slots
            Changed in place.
        actions
            Int64 [R, HEAD_COUNT]; heads that the operation does not use are ignored.
        gates
            Report on the same slots.

        Raises
        ------
        ValueError
            The actions have the wrong shape or dtype.
        """
        check_actions(actions, slots.rows)
        table = self._tables
        wild = (actions < 0) | (actions >= table["sizes"])
        out_of_range = wild[:, Head.OP] | (wild & table["uses"][actions[:, Head.OP].clamp(0, len(Op) - 1)]).any(1)
        action = torch.where(wild, 0, actions)
        op, slot = action[:, Head.OP], action[:, Head.SLOT]
        at = slot[:, None]
        before = slots.stage.gather(1, at)[:, 0]
        refused = self._refusals(slots, action, gates, before)
        refused = torch.where(out_of_range, int(Check.RANGE), refused)
        accepted = refused == int(Check.NONE)

        chosen_RS = (table["slot_index"] == at) & accepted[:, None]
        by_op = {o: chosen_RS & (op == int(o))[:, None] for o in Op}
        speed_R1 = table["speed"][action[:, Head.ALPHA_SPEED]][:, None]
        curve_R1 = action[:, Head.ALPHA_CURVE][:, None]
        self._germinate(slots, by_op[Op.GERMINATE], action)
        self._advance(slots, by_op[Op.ADVANCE])
        target_R1 = table["target"][action[:, Head.ALPHA_TARGET]][:, None]
        gradual = by_op[Op.CULL] & (speed_R1 > 0)
        self._retarget(
            slots,
            by_op[Op.SET_ALPHA_TARGET] | gradual,
            torch.where(gradual, 0.0, target_R1),
            speed_R1,
            curve_R1,
        )
        self._cull(slots, by_op[Op.CULL] & ~gradual, cooldown=2)
        _set(slots, "stage", by_op[Op.FOSSILIZE], int(Stage.FOSSILIZED))
        _set(slots, "stage_age", by_op[Op.FOSSILIZE], 0)
        return Outcome(accepted, refused, before, slots.stage.gather(1, at)[:, 0])

    def tick(self, slots: SlotTensors) -> None:
        """Let one decision pass: ramps move, ages grow, faded seeds are culled, waiting slots wait."""
        table = self._tables
        moving = slots.alpha_mode != int(AlphaMode.HOLD)
        slots.ramp_done += moving
        alpha = ramp_alpha(slots.alpha_start, slots.alpha_target, slots.curve, slots.ramp_done, slots.ramp_total)
        torch.where(moving, alpha, slots.alpha, out=slots.alpha)
        landed = moving & (slots.ramp_done >= slots.ramp_total)
        _set(slots, "alpha_mode", landed, int(AlphaMode.HOLD))
        occupied = slots.seed_id >= 0
        slots.age += occupied
        slots.stage_age += 1

        waiting = table["waiting"][slots.stage]
        slots.cooldown -= waiting.long()
        leaving = waiting & (slots.cooldown == 0)
        following = table["next"][slots.stage]
        torch.where(leaving, following, slots.stage, out=slots.stage)
        torch.where(leaving, table["duration"][following], slots.cooldown, out=slots.cooldown)
        _set(slots, "stage_age", leaving, 0)
        faded = slots.fading_RS() & (slots.alpha_mode == int(AlphaMode.HOLD))
        self.cull(slots, faded)

    def harvest(self, slots: SlotTensors) -> Tensor:
        """End the episode: cull every seed that is not committed. Gives which, bool [R, S]."""
        culled_RS = slots.on_trial_RS()
        self.cull(slots, culled_RS)
        return culled_RS

    def cull(self, slots: SlotTensors, mask: Tensor) -> None:
        """Cull seeds (bool [R, S]) in a decision whose time has passed already, committed ones included."""
        self._cull(slots, mask, cooldown=1)

    def _refusals(self, slots: SlotTensors, action: Tensor, gates: GateReport, before: Tensor) -> Tensor:
        """Int64 [R]: the first check that refuses the action, NONE if none does. Structure is asked before gates."""
        table = self._tables
        op, slot = action[:, Head.OP], action[:, Head.SLOT]
        rows = torch.arange(slots.rows, device=slots.device)
        # As if everything fitted: what does not is refused by its own name.
        anything = torch.ones_like(table["fits"])
        legal = legal_choice(slots, anything, op, slot)
        fits = table["fits"][slot, action[:, Head.BLUEPRINT]]
        misfit = (op == int(Op.GERMINATE)) & ~fits
        gradual = (op == int(Op.CULL)) & (table["speed"][action[:, Head.ALPHA_SPEED]] > 0)
        retarget = torch.full_like(op, int(Op.SET_ALPHA_TARGET))
        no_fade = gradual & ~legal_choice(slots, anything, retarget, slot)
        entered = torch.where(op == int(Op.FOSSILIZE), int(Stage.FOSSILIZED), table["next"][before])
        gated = (op == int(Op.ADVANCE)) | (op == int(Op.FOSSILIZE))
        asked_RC = table["checks_of_stage"][entered] & gated[:, None]
        failed_RC = asked_RC & ~gates.passed_CRS[:, rows, slot].T
        first_failed = table["check_ids"][failed_RC.int().argmax(1)]
        refused = torch.where(failed_RC.any(1), first_failed, int(Check.NONE))
        refused = torch.where(no_fade, int(Check.SPEED), refused)
        refused = torch.where(misfit, int(Check.BLUEPRINT), refused)
        return torch.where(legal, refused, int(Check.STAGE))

    def _germinate(self, slots: SlotTensors, mask: Tensor, action: Tensor) -> None:
        table = self._tables
        blueprint, style = action[:, Head.BLUEPRINT][:, None], action[:, Head.STYLE]
        operator = table["operator"][style][:, None]
        _set(slots, "stage", mask, int(Stage.GERMINATED))
        _set(slots, "blueprint", mask, blueprint)
        _set(slots, "operator", mask, operator)
        _set(slots, "curve", mask, table["curve"][style][:, None])
        _set(slots, "ramp_total", mask, table["tempo"][action[:, Head.TEMPO]][:, None])
        _set(slots, "alpha_target", mask, table["target"][action[:, Head.ALPHA_TARGET]][:, None])
        _set(slots, "age", mask, 0)
        _set(slots, "stage_age", mask, 0)
        _set(slots, "seed_id", mask, slots.seeds_made[:, None])
        _set(slots, "parameters", mask, table["counts"][table["slot_index"], blueprint, operator])
        slots.seeds_made += mask.any(1)

    def _advance(self, slots: SlotTensors, mask: Tensor) -> None:
        torch.where(mask, self._tables["next"][slots.stage], slots.stage, out=slots.stage)
        _set(slots, "stage_age", mask, 0)
        # The first ramp: alpha stands at 0, its length and target were agreed at germination.
        _set(slots, "alpha_mode", mask & (slots.stage == int(Stage.BLENDING)), int(AlphaMode.UP))

    def _retarget(self, slots: SlotTensors, mask: Tensor, target: Tensor, speed: Tensor, curve: Tensor) -> None:
        at_once = mask & (speed == 0)
        torch.where(mask, slots.alpha, slots.alpha_start, out=slots.alpha_start)
        _set(slots, "alpha_target", mask, target)
        _set(slots, "alpha", at_once, target)
        mode = torch.where(slots.alpha_target > slots.alpha, int(AlphaMode.UP), int(AlphaMode.DOWN))
        mode = torch.where(slots.alpha_target == slots.alpha, int(AlphaMode.HOLD), mode)
        _set(slots, "alpha_mode", mask, mode)
        _set(slots, "curve", mask, curve)
        _set(slots, "ramp_total", mask, speed)
        _set(slots, "ramp_done", mask, 0)
        _set(slots, "stage", mask, int(Stage.BLENDING))
        _set(slots, "stage_age", mask, 0)

    def _cull(self, slots: SlotTensors, mask: Tensor, cooldown: int) -> None:
        """Empty slots. `cooldown` counts the ticks to EMBARGOED, this decision's own included if it is to come."""
        for name in _CLEARED:
            _set(slots, name, mask, EMPTY_SLOT[name])
        _set(slots, "stage", mask, int(Stage.CULLED))
        _set(slots, "cooldown", mask, cooldown)


def _set(slots: SlotTensors, name: str, mask: Tensor, value: Tensor | float) -> None:
    """Write `value` where `mask` holds, in place."""
    current: Tensor = getattr(slots, name)
    if isinstance(value, Tensor):
        torch.where(mask, value.to(current.dtype), current, out=current)
    else:
        current.masked_fill_(mask, value)
