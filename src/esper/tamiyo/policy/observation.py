"""What a policy sees of a population: a token for each slot and one for the run, by whole-tensor functions.

Columns are those of `features`. Shape suffixes: R rows, S slots, F features, C gate checks, K running features,
W remembered losses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from esper.leyline.actions import ALPHA_SPEEDS, Blueprint, Head, Op, Operator, SiteKind
from esper.leyline.checks import ALL_GATE_CHECKS, GATE_CHECKS, GATE_OF_STAGE, Check
from esper.leyline.sites import SlotConfig
from esper.leyline.slots import NOT_MEASURED, AlphaMode
from esper.leyline.stages import ADVANCE_TARGET, FOSSILIZABLE_STAGES, OCCUPIED_STAGES, STAGE_COUNT, Stage, stage_table
from esper.leyline.view import PopulationView
from esper.tamiyo.policy.features import HISTORY, OBSERVED_STAGES

_SMALL_CHANGE = 0.02
"""Nats, from which on prices are told apart by their ratio."""
_SMALL, _LARGE, _DECADES = 1e-6, 1e6, 6.0
"""Limits of a gradient statistic, and their logarithm to the base 10."""


@dataclass(frozen=True)
class Observation:
    """What one decision, or a sequence of them, is based on.

    Attributes
    ----------
    slot_RSF
        Float32 [..., S, F] tokens of the slots.
    run_RF
        Float32 [..., F] token of the run; its first columns are raw and NaN where not measured, because the statistics
        that normalise them belong to the policy.
    """

    slot_RSF: Tensor
    run_RF: Tensor


class Observer:
    """Makes the observations of one episode.

    Parameters
    ----------
    rows
        Number of rows.
    config
        Slots of the hosts.
    device
        Where the views live.
    history_RW
        Losses that are remembered, for an episode that goes on; by default none.

    Attributes
    ----------
    history_RW
        Losses that are remembered, the last one last.
    """

    def __init__(
        self,
        rows: int,
        config: SlotConfig,
        device: torch.device | str = "cpu",
        history_RW: Tensor | None = None,
    ) -> None:
        self.rows, self.slots = rows, config.slots
        self.history_RW = unmeasured_history(rows, device) if history_RW is None else history_RW
        tables = {
            "stage": _one_hot_rows(STAGE_COUNT, [int(s) for s in OBSERVED_STAGES]),
            "blueprint": torch.eye(len(Blueprint)),
            "operator": torch.eye(len(Operator)),
            "op": torch.eye(len(Op)),
            "site": _site_features(config).expand(rows, -1, -1),
            "unasked": ~_asked(),
            "gated": stage_table(frozenset(ADVANCE_TARGET) | FOSSILIZABLE_STAGES),
            "occupied": stage_table(OCCUPIED_STAGES).float(),
            "committed": stage_table(frozenset({Stage.FOSSILIZED})).float(),
            "constants": torch.zeros(rows, 3),
        }
        self._table = {name: table.to(device) for name, table in tables.items()}

    def observe(self, view: PopulationView) -> Observation:
        """Look at a population; called once for each decision, in order."""
        growth_RS = (view.slots.parameters / view.host_parameters).float()
        return Observation(self._slot_tokens(view, growth_RS), self._run_token(view, growth_RS))

    def _slot_tokens(self, view: PopulationView, growth_RS: Tensor) -> Tensor:
        slots, table = view.slots, self._table
        mode_RS = slots.alpha_mode
        moving_RS = mode_RS != int(AlphaMode.HOLD)
        left_RS = (slots.ramp_total - slots.ramp_done) * moving_RS / max(ALPHA_SPEEDS)
        alpha_NRS = torch.stack(
            (
                slots.alpha,
                slots.alpha_target,
                left_RS,
                (mode_RS == int(AlphaMode.UP)).float(),
                (mode_RS == int(AlphaMode.DOWN)).float(),
            )
        )
        time_NRS = torch.stack((slots.age, slots.stage_age, slots.cooldown)).float().log1p()
        time_NRS /= math.log1p(view.horizon)
        worth_NRS, worth_known = _measured(
            slots.contribution, slots.contribution_se, slots.incubator_gain, slots.incubator_gain_se
        )
        worth_NRS = worth_NRS.sign() * worth_NRS.abs().log1p()
        gradient_NRS, gradient_known = _measured(slots.gradient_norm, slots.gradient_ratio)
        gradient_NRS = gradient_NRS.clamp(_SMALL, _LARGE).log10() / _DECADES * gradient_known
        open_RS = (view.gates.passed_CRS | table["unasked"][:, slots.stage]).all(0) & table["gated"][slots.stage]
        scalars_NRS = torch.cat(
            (
                alpha_NRS,
                time_NRS,
                worth_NRS,
                gradient_NRS,
                worth_known[0::2].float(),
                gradient_known[:1].float(),
                growth_RS.log1p()[None],
                open_RS.float()[None],
            )
        )
        return torch.cat(
            (
                table["stage"][slots.stage],
                table["blueprint"][slots.blueprint],
                table["operator"][slots.operator],
                scalars_NRS.permute(1, 2, 0),
                table["site"],
            ),
            2,
        )

    def _run_token(self, view: PopulationView, growth_RS: Tensor) -> Tensor:
        table, slots = self._table, view.slots
        chance = math.log(view.classes)
        self.history_RW = torch.cat((self.history_RW[:, 1:], view.val_loss_R.float()[:, None]), 1)
        loss_RW = self.history_RW
        running_RK = torch.cat(
            (view.train_loss_R.float()[:, None], loss_RW[:, -1:], loss_RW[:, :-1].flip(1) - loss_RW[:, -1:]), 1
        ).div_(chance)
        known_RK = running_RK.isfinite()
        running_RK.masked_fill_(~known_RK, NOT_MEASURED)
        growth_R = growth_RS.sum(1).log1p()
        left = math.log1p(view.horizon - view.decision) / math.log1p(view.horizon)
        constants = table["constants"]
        constants[:, 0], constants[:, 1], constants[:, 2] = (
            chance / 5,
            math.log10(view.host_parameters) / 8,
            math.log2(self.slots) / 8,
        )
        columns = torch.stack(
            (
                view.val_accuracy_R.float().nan_to_num(0.0),
                torch.full_like(growth_R, view.decision / view.horizon),
                torch.full_like(growth_R, left),
                table["occupied"][slots.stage].mean(1),
                table["committed"][slots.stage].mean(1),
                growth_R,
                _money(view.price_R),
                _money(view.price_R * growth_R),
            ),
            1,
        )
        return torch.cat((running_RK, known_RK.float(), columns, self._last(view), constants), 1)

    def _last(self, view: PopulationView) -> Tensor:
        """Last operation and what came of it, [R, operations + 3]."""
        if view.last is None or view.last_action_RH is None:
            return torch.zeros(self.rows, len(Op) + 3, device=self.history_RW.device)
        refused_R = view.last.refused_by
        outcome = torch.stack(
            (
                view.last.accepted,
                (refused_R > int(Check.NONE)) & (refused_R < min(map(int, ALL_GATE_CHECKS))),
                refused_R >= min(map(int, ALL_GATE_CHECKS)),
            ),
            1,
        )
        op_R = view.last_action_RH[:, Head.OP]
        # An operation that does not exist was refused, and is none of the known ones.
        known_R = (op_R >= 0) & (op_R < len(Op))
        op_RO = self._table["op"][op_R.clamp(0, len(Op) - 1)] * known_R[:, None]
        return torch.cat((op_RO, outcome.float()), 1)


def unmeasured_history(rows: int, device: torch.device | str) -> Tensor:
    """Give what an observer remembers before the first decision: float32 [R, W], nothing measured."""
    return torch.full((rows, HISTORY + 1), NOT_MEASURED, device=device)


def _money(nats_R: Tensor) -> Tensor:
    """Spread out what is small: whether a price is 0.05 or 0.1 matters as much as whether it is 0.5 or 1."""
    return (nats_R / _SMALL_CHANGE).log1p()


def _measured(*quantities: Tensor) -> tuple[Tensor, Tensor]:
    """Quantities [N, R, S] with 0 where they are not finite, and where they are (bool)."""
    values = torch.stack(quantities)
    known = values.isfinite()
    return values.masked_fill(~known, 0.0), known


def _one_hot_rows(size: int, values: list[int]) -> Tensor:
    """Float [size, len(values)]: row v is one-hot at the place of v among the values, zero if it is none of them."""
    table = torch.zeros(size, len(values))
    table[values, range(len(values))] = 1.0
    return table


def _site_features(config: SlotConfig) -> Tensor:
    """Float [S, F]: what does not change about each site."""
    kinds = list(SiteKind)
    rows = []
    for site in config.sites:
        kind = [float(site.kind is k) for k in kinds]
        places = math.prod(site.extent)
        rows.append([*kind, math.log2(site.width) / 10, math.log2(places) / 10, site.depth / config.slots])
    return torch.tensor(rows)


def _asked() -> Tensor:
    """Bool [C, stages]: checks of the gate in front of the next stage."""
    following = {**ADVANCE_TARGET, **dict.fromkeys(FOSSILIZABLE_STAGES, Stage.FOSSILIZED)}
    table = torch.zeros(len(ALL_GATE_CHECKS), STAGE_COUNT, dtype=torch.bool)
    for stage, target in following.items():
        for check in GATE_CHECKS[GATE_OF_STAGE[target]]:
            table[ALL_GATE_CHECKS.index(check), int(stage)] = True
    return table
