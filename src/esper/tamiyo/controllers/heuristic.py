"""A careful gardener's rules: the opponent that a learned policy has to beat.

A seed is germinated where it is expected to gain more than its rent. Before anything was tried, that is a guess by its
size; then also what its kind has brought in this run. It is kept if it measurably pays, and culled if it does not.

Shape suffixes: R rows, S slots, B blueprints, O operators, K kinds of seed (blueprint and operator), C gate checks.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from esper.leyline.actions import Blueprint, Head, Op, Operator, SiteKind, Style
from esper.leyline.checks import ALL_GATE_CHECKS, Check
from esper.leyline.slots import NOT_MEASURED, legal_ops
from esper.leyline.stages import OCCUPIED_STAGES, Stage, stage_table
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

STYLES = (Style.LINEAR_ADD, Style.LINEAR_MULTIPLY, Style.GATED_GATE)
"""One style for each operator, in their order: what a seed brought is remembered by its operator."""


@dataclass(frozen=True)
class Guess:
    """What is expected of the seeds at a kind of site before any was tried.

    A seed gains worth * cost / (cost + knee), with its cost ln(1 + own / host parameters): gains saturate with size.
    """

    worth: float
    """Gain of a large seed in the first slot, as a share of the loss of guessing."""
    knee: float
    """Cost of a seed that gains half of that."""
    deeper: float
    """What the same seed gains one slot further on, as a share."""
    multiplied: frozenset[Blueprint]
    """Seeds that are multiplied with the stream; all others are added to it."""
    promise: Mapping[Blueprint, float]
    """Seeds that gain more or less than others of their size, as a share."""


VECTORS = Guess(
    worth=0.09,
    knee=0.02,
    deeper=0.7,
    multiplied=frozenset({Blueprint.NORM, Blueprint.LORA_SMALL, Blueprint.LORA_LARGE, Blueprint.ATTENTION}),
    promise={
        Blueprint.LORA_SMALL: 0.75,
        Blueprint.LORA_LARGE: 0.85,
        Blueprint.BOTTLENECK: 0.65,
        Blueprint.ATTENTION: 1.1,
    },
)
"""Small seeds do nearly as much as large ones, and early slots most. What rescales the stream or maps it linearly is
multiplied with it: added to a linear host it would compute nothing new."""
CONVOLUTIONS = Guess(
    worth=0.13,
    knee=0.7,
    deeper=1.3,
    multiplied=frozenset(),
    promise=dict.fromkeys(
        (Blueprint.NORM, Blueprint.LORA_SMALL, Blueprint.LORA_LARGE, Blueprint.POINTWISE, Blueprint.ATTENTION), 0.25
    ),
)
"""The larger a seed, and the later, the more it does; those that see one place at a time do little."""


@dataclass(frozen=True)
class HeuristicConfig:
    """Every constant of the heuristic. Chosen on starts that are reserved for choosing: docs/decisions/0014."""

    vectors: Guess = VECTORS
    convolutions: Guess = CONVOLUTIONS
    """What to expect of seeds at first."""
    unlike: float = 0.7
    """Share of its gain that is expected of a seed with another operator than that of its kind."""
    further: float = 0.6
    """Share that is expected of a seed for each other one in the host: there is less left to gain."""
    doubt: float = 2.0
    """Seeds that the guess counts as much as, against what all seeds of the run have brought."""
    doubt_of_kind: float = 1.0
    """Seeds that this counts as much as, against what those of the same blueprint and operator have brought."""
    errors: float = 2.0
    """Standard errors by which a contribution must be above its rent to be kept, and below it to be culled, at once.
    What is less clear is judged later: a contribution says more the later it is measured."""
    max_training: int = 8
    """A seed that has not passed G2 after more than this many decisions in TRAINING is culled."""
    max_probation: int = 14
    """Decisions in PROBATIONARY after which it is decided by the contribution alone, whatever its standard error."""
    recovery: int = 2
    """Decisions before the horizon at which a seed that cannot be kept is culled: its host trains on without it."""
    recipe: Recipe = RECIPE
    """How to germinate, apart from blueprint and style."""


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

    _memory = ("_brought_RK", "_expected_RK", "_stage_RS", "_kind_RS", "_contribution_RS")

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
        self._on_trial = stage_table(OCCUPIED_STAGES - {Stage.FOSSILIZED}).to(device)
        self._style_O = torch.tensor([int(style) for style in STYLES], device=device)
        self._every_S = torch.arange(slots, device=device)
        self._guess_SK = torch.empty(0)
        """See `first_guess`; made from the first view."""
        self._brought_RK = torch.zeros(rows, len(Blueprint) * len(Operator), device=device)
        """Nats that the seeds of each kind have brought whose trial is over, and that had been expected of them."""
        self._expected_RK = torch.zeros_like(self._brought_RK)
        self._stage_RS = torch.full((rows, slots), int(Stage.DORMANT), device=device)
        self._kind_RS = torch.zeros(rows, slots, dtype=torch.int64, device=device)
        self._contribution_RS = torch.full((rows, slots), NOT_MEASURED, device=device)

    def observe(self, view: PopulationView) -> None:
        """See whose trial is over, and remember what it brought."""
        slots = view.slots
        self._view = view
        if not self._guess_SK.numel():
            self._guess_SK = first_guess(view, self._config)
        over_RS = self._on_trial[self._stage_RS] & ~self._on_trial[slots.stage]
        # A seed that was lost before it was measured has brought nothing.
        brought_RS = self._contribution_RS.nan_to_num(nan=0.0).clamp(0.0, math.log(view.classes))
        expected_RS = self._guess_SK[self._every_S, self._kind_RS]
        self._brought_RK = self._brought_RK.scatter_add(1, self._kind_RS, torch.where(over_RS, brought_RS, 0.0))
        self._expected_RK = self._expected_RK.scatter_add(1, self._kind_RS, torch.where(over_RS, expected_RS, 0.0))
        # The engine may write to the slots in place.
        self._stage_RS, self._contribution_RS = slots.stage.clone(), slots.contribution.clone()
        self._kind_RS = slots.blueprint * len(Operator) + slots.operator

    def act(self) -> torch.Tensor:
        """Follow the first rule that applies in each row."""
        view, slots = self._view, self._view.slots
        advance_RS, fossilize_RS = passing(view)
        surplus_RS = slots.contribution - self._rent()
        clear_RS = (surplus_RS.abs() > self._config.errors * slots.contribution_se) | self._time_is_up()
        # A comparison with NaN is false: what was not measured is neither kept nor culled by it.
        keep_RS = fossilize_RS & clear_RS & (surplus_RS > 0)
        cull_RS = self._useless(clear_RS & (surplus_RS <= 0)) & ~keep_RS
        gain_RS, kind_RS = self._best_seeds()
        free_RS = legal_ops(slots, view.fits_SB)[:, int(Op.GERMINATE)] & (gain_RS > 0)
        free_RS &= time_to_commit(view, self._config.recipe.tempo)
        op_R, slot_R = first_wish(
            (
                (Op.FOSSILIZE, scored(keep_RS, surplus_RS)),
                # The most harmful first; a seed that was not measured stands at 0.
                (Op.CULL, scored(cull_RS, -surplus_RS.nan_to_num(nan=0.0))),
                (Op.ADVANCE, scored(advance_RS, slots.stage)),
                (Op.GERMINATE, scored(free_RS, gain_RS)),
            )
        )
        kind_R = kind_RS.gather(1, slot_R[:, None])[:, 0]
        action_RH = self._gardener.actions(op_R, slot_R, kind_R // len(Operator))
        style_R = self._style_O[kind_R % len(Operator)]
        action_RH[:, Head.STYLE] = torch.where(op_R == int(Op.GERMINATE), style_R, action_RH[:, Head.STYLE])
        return action_RH

    def _rent(self) -> torch.Tensor:
        """What each seed costs its row [R, S] (nats): what would be saved without it, were all others kept."""
        view, own_RS = self._view, self._view.slots.parameters
        grown_R1 = view.host_parameters + own_RS.sum(1, keepdim=True)
        return view.price_R[:, None] * (grown_R1 / (grown_R1 - own_RS)).log()

    def _time_is_up(self) -> torch.Tensor:
        """Bool [R, S]: probation has lasted long enough to be decided by what is known."""
        view, config = self._view, self._config
        # One decision a row: each seed may have to be decided on.
        late = view.horizon - view.decision <= config.recovery + view.slots.slots
        return (view.slots.stage_age > config.max_probation) | late

    def _useless(self, does_not_pay_RS: torch.Tensor) -> torch.Tensor:
        """Bool [R, S]: a seed that does not pay, learned nothing in its time, or cannot be kept any more."""
        slots, gates, config = self._view.slots, self._view.gates, self._config
        idle_RS = (slots.stage == int(Stage.TRAINING)) & (slots.stage_age > config.max_training)
        old_enough_RS = gates.passed_CRS[ALL_GATE_CHECKS.index(Check.PROBATION_DECISIONS)]
        failed_RS = (slots.stage == int(Stage.PROBATIONARY)) & old_enough_RS & does_not_pay_RS
        blended_RS = (slots.stage == int(Stage.BLENDING)) | (slots.stage == int(Stage.PROBATIONARY))
        lost_RS = blended_RS & (self._view.horizon - self._view.decision <= config.recovery)
        return idle_RS | failed_RS | lost_RS

    def _best_seeds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the expected gain less rent [R, S] (nats) of the best seed for each slot, and its kind [R, S]."""
        view, config = self._view, self._config
        others_R = self._occupied[view.slots.stage].sum(1)
        # A seed has what is left of the run to learn in.
        share_R = config.further**others_R * (1 - view.decision / view.horizon)
        gain_RSK = (share_R[:, None] * self._luck())[:, None] * self._guess_SK
        grown_R = view.host_parameters + view.slots.parameters.sum(1)
        cost_RSK = (view.seed_parameters_SBO.flatten(1) / grown_R[:, None, None]).log1p()
        net_RSK = gain_RSK - view.price_R[:, None, None] * cost_RSK
        fits_SK = view.fits_SB.repeat_interleave(len(Operator), 1)
        net_RS, kind_RS = net_RSK.masked_fill(~fits_SK, -torch.inf).max(2)
        return net_RS, kind_RS

    def _luck(self) -> torch.Tensor:
        """What the seeds of each kind are expected to gain, as a share of the guess [R, K]."""
        config, seed = self._config, self._guess_SK.max()
        doubt, own = config.doubt * seed, config.doubt_of_kind * seed
        all_R1 = (doubt + self._brought_RK.sum(1, keepdim=True)) / (doubt + self._expected_RK.sum(1, keepdim=True))
        return (own * all_R1 + self._brought_RK) / (own + self._expected_RK)


def first_guess(view: PopulationView, config: HeuristicConfig) -> torch.Tensor:
    """What a seed of each kind is expected to gain in each slot [S, K] before anything was tried (nats)."""
    device = view.slots.device
    guesses = [config.vectors if s.kind is SiteKind.VECTOR else config.convolutions for s in view.slot_config.sites]
    worth_S, knee_S, deeper_S = (
        torch.tensor([getattr(guess, name) for guess in guesses], device=device) for name in ("worth", "knee", "deeper")
    )
    like_SBO = torch.tensor([[[_likeness(g, b, o, config) for o in Operator] for b in Blueprint] for g in guesses])
    cost_SBO = (view.seed_parameters_SBO / view.host_parameters).log1p()
    gain_S = worth_S * math.log(view.classes) * deeper_S ** torch.arange(len(guesses), device=device)
    guess_SBO = gain_S[:, None, None] * cost_SBO / (cost_SBO + knee_S[:, None, None]) * like_SBO.to(device)
    return guess_SBO.flatten(1)


def _likeness(guess: Guess, blueprint: Blueprint, operator: Operator, config: HeuristicConfig) -> float:
    """Share of what a seed of its size is expected to gain."""
    own = Operator.MULTIPLY if blueprint in guess.multiplied else Operator.ADD
    return guess.promise.get(blueprint, 1.0) * (1.0 if operator is own else config.unlike)
