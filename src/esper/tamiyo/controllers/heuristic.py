"""A careful gardener's rules: the opponent that a learned policy has to beat.

Stabilise, germinate on a plateau, rotate blueprints with decaying penalties, advance by gates, cull the
useless, commit on positive contribution.

Shape suffixes: R rows, S slots, B blueprints, C gate checks, W remembered losses.
"""

from dataclasses import dataclass

import torch

from esper.leyline.actions import Blueprint, Op
from esper.leyline.checks import ALL_GATE_CHECKS, Check
from esper.leyline.slots import NOT_MEASURED, legal_ops
from esper.leyline.stages import OCCUPIED_STAGES, YOUNG_STAGES, Stage, stage_table
from esper.leyline.view import PopulationView
from esper.tamiyo.controllers.base import (
    RECIPE,
    Gardener,
    PlainController,
    Recipe,
    first_wish,
    passing,
    scored,
    time_to_commit,
)


@dataclass(frozen=True)
class HeuristicConfig:
    """Every constant of the heuristic."""

    settle: int = 3
    """Decisions of training before the first germination."""
    window: int = 3
    """Decisions over which an improvement of the reward-validation loss is judged."""
    plateau: float = 0.2
    """A relative improvement over the window below this is a plateau. Generous: growth should begin well
    before the host has converged."""
    patience: int = 6
    """Decisions since the last germination (or the start) after which growth no longer asks for a plateau."""
    max_training: int = 8
    """A seed that has not passed G2 after more than this many decisions in TRAINING is culled."""
    max_probation: int = 8
    """The same without a positive contribution in PROBATIONARY."""
    penalty: float = 1.0
    """Added to the penalty of a blueprint whose seed was culled."""
    decay: float = 0.9
    """What a penalty is multiplied by at each decision."""
    forgotten: float = 0.25
    """A penalty below this counts as none: otherwise even the smallest remainder would decide for ever. With
    the other two defaults one cull is forgotten after 14 decisions."""
    recipe: Recipe = RECIPE
    """How to germinate."""


CONFIG = HeuristicConfig()


class HeuristicController(PlainController):
    """One action for each row: fossilize, else cull, else advance, else germinate, else wait.

    Parameters
    ----------
    rows, slots
        Number of rows, and of slots in each.
    config
        The constants.
    device
        Where the views live.
    """

    _memory = ("_loss_RW", "_penalty_RB", "_seeds_made_R", "_germinated_R", "_stage_RS", "_blueprint_RS")

    _view: PopulationView

    def __init__(
        self,
        rows: int,
        slots: int,
        *,
        config: HeuristicConfig = CONFIG,
        device: torch.device | str = "cpu",
    ) -> None:
        self._config = config
        self._gardener = Gardener(config.recipe, device)
        self._occupied = stage_table(OCCUPIED_STAGES).to(device)
        self._young = stage_table(YOUNG_STAGES).to(device)
        self._loss_RW = torch.full((rows, config.window + 1), NOT_MEASURED, device=device)
        self._penalty_RB = torch.zeros(rows, len(Blueprint), device=device)
        self._seeds_made_R = torch.zeros(rows, dtype=torch.int64, device=device)
        self._germinated_R = torch.zeros(rows, dtype=torch.int64, device=device)
        """Decision of the last germination, 0 before the first."""
        self._stage_RS = torch.full((rows, slots), int(Stage.DORMANT), device=device)
        self._blueprint_RS = torch.full((rows, slots), int(Blueprint.NOOP), device=device)

    def observe(self, view: PopulationView) -> None:
        """Remember the loss, the last germination, and which blueprints were lost."""
        slots, config = view.slots, self._config
        self._view = view
        self._loss_RW = torch.cat((self._loss_RW[:, 1:], view.val_loss_R[:, None].float()), dim=1)
        grew_R = slots.seeds_made > self._seeds_made_R
        self._germinated_R = torch.where(grew_R, view.decision - 1, self._germinated_R)
        # A seed is known to be lost by its stage, whoever culled it; its blueprint is known from before.
        lost_RS = self._occupied[self._stage_RS] & ~self._occupied[slots.stage]
        self._penalty_RB = (self._penalty_RB * config.decay).scatter_add(
            1, self._blueprint_RS, lost_RS.float() * config.penalty
        )
        # The engine may write to the slots in place.
        self._seeds_made_R = slots.seeds_made.clone()
        self._stage_RS, self._blueprint_RS = slots.stage.clone(), slots.blueprint.clone()

    def act(self) -> torch.Tensor:
        """Follow the first rule that applies in each row."""
        view, slots = self._view, self._view.slots
        advance_RS, fossilize_RS = passing(view)
        free_RS = legal_ops(slots, view.fits_SB)[:, int(Op.GERMINATE)] & self._time_to_grow()[:, None]
        useless_RS = self._useless() & ~advance_RS & ~fossilize_RS
        # The most harmful first; a seed that was not measured stands at 0.
        harm_RS = -slots.contribution.nan_to_num(nan=0.0)
        op_R, slot_R = first_wish(
            (
                (Op.FOSSILIZE, scored(fossilize_RS, slots.contribution)),
                (Op.CULL, scored(useless_RS, harm_RS)),
                (Op.ADVANCE, scored(advance_RS, slots.stage)),
                (Op.GERMINATE, scored(free_RS, torch.zeros_like(harm_RS))),
            )
        )
        remembered_RB = torch.where(self._penalty_RB < self._config.forgotten, 0.0, self._penalty_RB)
        blueprint_R = self._gardener.blueprint(view.fits_SB[slot_R], slots.seeds_made, remembered_RB)
        return self._gardener.actions(op_R, slot_R, blueprint_R)

    def _useless(self) -> torch.Tensor:
        """Bool [R, S]: a seed that had its time and showed nothing; never one that contributes."""
        slots, gates, config = self._view.slots, self._view.gates, self._config
        old_enough_RS = gates.passed_CRS[ALL_GATE_CHECKS.index(Check.PROBATION_DECISIONS)]
        too_little_RS = slots.contribution <= gates.limit_CRS[ALL_GATE_CHECKS.index(Check.CONTRIBUTION)]
        idle_RS = (slots.stage == int(Stage.TRAINING)) & (slots.stage_age > config.max_training)
        failed_RS = (old_enough_RS & too_little_RS) | (slots.stage_age > config.max_probation)
        # `~(x > 0)` and not `x <= 0`: a contribution that could not be measured does not protect a seed.
        on_probation_RS = (slots.stage == int(Stage.PROBATIONARY)) & ~(slots.contribution > 0)
        return idle_RS | (on_probation_RS & failed_RS)

    def _time_to_grow(self) -> torch.Tensor:
        """Bool [R]: settled, on a plateau or waiting for long, nothing in the incubator, time left."""
        view, config, stage_RS = self._view, self._config, self._view.slots.stage
        before_R, now_R = self._loss_RW[:, 0], self._loss_RW[:, -1]
        # False while anything is not measured: comparisons with NaN are.
        plateau_R = (before_R - now_R) / before_R.abs() < config.plateau
        overdue_R = view.decision - self._germinated_R >= config.patience
        incubating_RS = self._young[stage_RS]
        in_time = time_to_commit(view, config.recipe.tempo) & (view.decision >= config.settle)
        return (plateau_R | overdue_R) & now_R.isfinite() & ~incubating_RS.any(1) & in_time
