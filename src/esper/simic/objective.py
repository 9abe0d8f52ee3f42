"""What growth is paid for: terms that presets put together, paid after each decision.

Most terms are the change of a state function over a decision, so that an episode's sum tells its end and nothing on
the way can be farmed: no cycle of germinating and culling earns anything.

Shapes: R rows, S slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from esper.leyline.config import ObjectiveConfig
from esper.leyline.slots import SlotTensors
from esper.leyline.stages import GROWTH_ORDER, STAGE_COUNT, Stage
from esper.simic.contexts import Contexts

WORST_GUESSES = 3.0
"""A loss counts as at most so many times that of guessing: a host that diverged is bad, not infinitely so."""


@dataclass(frozen=True)
class Standing:
    """Where every row stands after a decision.

    Attributes
    ----------
    utility_R
        Minus the reward-validation loss (nats), or the accuracy; finite.
    added_R, cost_R
        Parameters of the seeds in the forward pass, at the end the committed ones, and ln(1 + added / host parameters).
    potential_R
        How far the seeds have come, 1 for each that is committed.
    credit_R, committed_R
        Contributions (nats, where positive) of the blended seeds, and of the committed ones among them.
    fresh_R
        Contributions of the seeds that were committed in this decision.
    acted_R
        1 where something was asked for, 0 for WAIT.
    retired_R
        Bool: the governor rolled the row back, now or earlier.
    left
        Decisions left in the episode.
    """

    utility_R: Tensor
    added_R: Tensor
    cost_R: Tensor
    potential_R: Tensor
    credit_R: Tensor
    committed_R: Tensor
    fresh_R: Tensor
    acted_R: Tensor
    retired_R: Tensor
    left: int


PENALTY = "penalty"
"""Part of every reward: what a rollback costs."""
Term = Callable[["Objective", Standing, Standing], Tensor]


def check_gamma(config: ObjectiveConfig, gamma: float) -> None:
    """Refuse a potential that is shaped for another discount than that of the learner.

    Raises
    ------
    ValueError
        They differ, and the preset shapes.
    """
    if "shaping" in PRESETS[config.preset] and config.shaping_gamma != gamma:
        raise ValueError(
            f"objective: shaping_gamma is {config.shaping_gamma:g} and the learner's gamma {gamma:g}; "
            "they must be equal, or shaping changes which policy is best (Ng, Harada and Russell 1999)"
        )


class Objective:
    """Pays a population over one episode.

    Parameters
    ----------
    config
        Preset and weights.
    contexts
        Twins and prices.
    gamma
        Discount of whoever learns from it.

    Attributes
    ----------
    parts
        Names of the parts of a reward.
    over_R
        Bool: nothing more is paid to the row, because it was rolled back, or its twin was.

    Raises
    ------
    ValueError
        A potential is shaped for another discount than that of the learner: it would change what is best.
    """

    def __init__(self, config: ObjectiveConfig, contexts: Contexts, gamma: float) -> None:
        self.config, self.contexts = config, contexts
        check_gamma(config, gamma)
        self.terms = PRESETS[config.preset]
        self.parts = (*self.terms, PENALTY)
        self.over_R = torch.zeros_like(contexts.grows_R)
        self._drip_R = torch.zeros_like(contexts.price_R)
        """What is paid at each decision that is left, for seeds committed earlier."""

    def begin(self, standing: Standing) -> None:
        """Take the state before the first decision."""
        self._before = standing

    def pay(self, after: Standing) -> dict[str, Tensor]:
        """Give the parts of each row's reward [R] for the decision that led to this state; they sum to it.

        The episode of a row that was rolled back ends in the state before the decision: it is paid what such an end
        brings (for changes of a state function nothing), less the penalty. The others of its group are paid the same
        without a penalty if it was their twin: there is nothing left to compare them with.
        """
        before, retired_R = self._before, after.retired_R
        over_R = retired_R | retired_R[self.contexts.twin_R]
        ends_R = over_R & ~self.over_R
        end = replace(before, fresh_R=torch.zeros_like(before.fresh_R), acted_R=after.acted_R, left=0)
        parts = {}
        for name in self.terms:
            paid_R = torch.where(ends_R, TERMS[name](self, before, end), TERMS[name](self, before, after))
            parts[name] = paid_R.masked_fill(self.over_R, 0.0)
        parts[PENALTY] = -self.config.rollback_penalty * (ends_R & retired_R & self.contexts.grows_R)
        self._before, self.over_R = after, over_R
        return parts

    def lead(self, standing: Standing) -> Tensor:
        """By how much each row is ahead of its twin."""
        return standing.utility_R - standing.utility_R[self.contexts.twin_R]

    def net(self, standing: Standing) -> Tensor:
        """Lead less rent: what growth has been worth so far."""
        return self.lead(standing) - self.contexts.price_R * standing.cost_R


def _gain(objective: Objective, before: Standing, after: Standing) -> Tensor:
    """Change of the lead over the twin."""
    return objective.lead(after) - objective.lead(before)


def _rent(objective: Objective, before: Standing, after: Standing) -> Tensor:
    """Change of the cost, times its price."""
    return -objective.contexts.price_R * (after.cost_R - before.cost_R)


def _own(objective: Objective, before: Standing, after: Standing) -> Tensor:
    """Change of the row's own utility, with whatever training alone does for it."""
    return after.utility_R - before.utility_R


def _shaping(objective: Objective, before: Standing, after: Standing) -> Tensor:
    """Potential-based shaping: the potential of the end is 0, so that its sum does not depend on the way."""
    config = objective.config
    ahead_R = after.potential_R if after.left else torch.zeros_like(after.potential_R)
    return config.shaping_weight * (config.shaping_gamma * ahead_R - before.potential_R)


def _attribution(objective: Objective, before: Standing, after: Standing) -> Tensor:
    """Change of the contributions of blended seeds, believed the more the further the row leads."""
    steepness = objective.config.attribution_steepness
    # torch.sigmoid saturates and never overflows.
    believed = [torch.sigmoid(steepness * objective.lead(s)) * s.credit_R for s in (before, after)]
    return believed[1] - believed[0]


def _escrow(objective: Objective, before: Standing, after: Standing) -> Tensor:
    """Change of what stands to a row's credit: a share of a contribution, all of it once committed; lost by a cull."""
    share = objective.config.escrow_share
    held = [share * s.credit_R + (1 - share) * s.committed_R for s in (before, after)]
    return held[1] - held[0]


def _drip(objective: Objective, before: Standing, after: Standing) -> Tensor:
    """Contribution at the commitment of a seed, in equal parts from then to the end."""
    objective._drip_R = objective._drip_R + after.fresh_R / (after.left + 1)
    return objective._drip_R.clone()


def _sparse(objective: Objective, before: Standing, after: Standing) -> Tensor:
    """All of it at the end."""
    return torch.zeros_like(after.utility_R) if after.left else objective.net(after)


def _intervention(objective: Objective, before: Standing, after: Standing) -> Tensor:
    """A small charge for everything that is asked for."""
    return -objective.config.intervention_charge * after.acted_R


TERMS: dict[str, Term] = {
    "gain": _gain,
    "rent": _rent,
    "own": _own,
    "shaping": _shaping,
    "attribution": _attribution,
    "escrow": _escrow,
    "drip": _drip,
    "sparse": _sparse,
    "intervention": _intervention,
}
PRESETS: dict[str, tuple[str, ...]] = {
    "paired": ("gain", "rent"),
    "shaped": ("gain", "rent", "shaping"),
    "simplified": ("sparse", "shaping", "intervention"),
    "basic": ("own", "rent"),
    "drip": ("drip", "rent"),
    "escrow": ("escrow", "rent"),
    "attribution": ("attribution", "rent"),
    "sparse": ("sparse",),
    "minimal": ("sparse", "intervention"),
    "loss": ("own",),
}
"""What each preset pays for."""


_ORDER = {stage: at / (len(GROWTH_ORDER) - 1) for at, stage in enumerate(GROWTH_ORDER)}
_POTENTIAL = torch.tensor([_ORDER.get(Stage(s), 0.0) if s in set(Stage) else 0.0 for s in range(STAGE_COUNT)])


class Appraiser:
    """Turns the state of a population into standings.

    Parameters
    ----------
    config
        Utility.
    host_parameters
        Of one host without seeds.
    guess_nats
        Loss of guessing.
    device
        Of the slots.
    """

    def __init__(
        self, config: ObjectiveConfig, host_parameters: int, guess_nats: float, device: torch.device | str
    ) -> None:
        self._by_accuracy = config.utility == "accuracy"
        self._host_parameters, self._worst = host_parameters, WORST_GUESSES * guess_nats
        self._potential = _POTENTIAL.to(device)

    def standing(
        self,
        slots: SlotTensors,
        loss_R: Tensor,
        accuracy_R: Tensor,
        fresh_RS: Tensor,
        acted_R: Tensor,
        retired_R: Tensor,
        left: int,
    ) -> Standing:
        """State after a decision.

        Parameters
        ----------
        loss_R, accuracy_R
            On reward-validation.
        fresh_RS
            Bool: seeds that were committed in this decision.
        acted_R
            Bool: something was asked for.
        retired_R
            Bool: the row was rolled back, now or earlier.
        left
            Decisions left.
        """
        loss_R = loss_R.float().nan_to_num(self._worst, self._worst, -self._worst).clamp_max(self._worst)
        blended_RS = slots.blended_RS()
        added_R = (slots.parameters * blended_RS).sum(1)
        worth_RS = slots.contribution.nan_to_num(0.0, 0.0, 0.0).clamp(0.0, self._worst) * blended_RS
        committed_RS = slots.stage == int(Stage.FOSSILIZED)
        return Standing(
            utility_R=accuracy_R.float().nan_to_num(0.0) if self._by_accuracy else -loss_R,
            added_R=added_R,
            cost_R=torch.log1p(added_R / self._host_parameters),
            potential_R=self._potential[slots.stage].sum(1),
            credit_R=worth_RS.sum(1),
            committed_R=(worth_RS * committed_RS).sum(1),
            fresh_R=(worth_RS * fresh_RS).sum(1),
            acted_R=acted_R.float(),
            retired_R=retired_R,
            left=left,
        )
