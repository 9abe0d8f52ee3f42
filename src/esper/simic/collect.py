"""One round of experience: a policy decides over an episode of every row.

Shapes: R rows, H heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from esper.leyline.actions import HEAD_COUNT
from esper.leyline.streams import Stream
from esper.leyline.view import Scores
from esper.simic.environment import Environment, Payment
from esper.simic.rollout import Rollout
from esper.tamiyo.policy.network import FactoredRecurrentActorCritic


def collect(
    environment: Environment,
    policy: FactoredRecurrentActorCritic,
    rollout: Rollout,
    seed: int,
    number: int,
    *,
    greedy: bool = False,
    uniform_share: float = 0.0,
    each: Callable[[int, Payment], None] | None = None,
) -> Rollout:
    """Fill a rollout with one episode of every row.

    Parameters
    ----------
    rollout
        Of the environment's size; overwritten.
    seed, number
        Of the run and of the round: with row, decision and head they decide every draw.
    greedy
        Take the most likely choices instead of sampling.
    uniform_share
        Share of a uniform choice in every head: for experience that is learned from, and nothing else.
    each
        Told of every decision and what it brought.
    """
    situation = environment.reset(number)
    rollout.group_R.copy_(environment.contexts.group_R)
    rollout.uniform_share = uniform_share
    device = rollout.value_TR.device
    hidden = policy.initial_hidden(environment.rows)
    stream = Stream(seed, "policy sampling")
    row_R = torch.arange(environment.rows, device=device)
    running_R = torch.ones_like(row_R, dtype=torch.bool)
    for decision in range(environment.horizon):
        moment_R = torch.full_like(row_R, number * environment.horizon + decision)
        uniform_RH = stream.uniform(row_R, moment_R, HEAD_COUNT, torch.float32)
        made = policy.get_action(
            situation.observation, situation.masks, hidden, uniform_RH, greedy=greedy, uniform_share=uniform_share
        )
        hidden = made.hidden
        rollout.store(decision, situation.observation, made, running_R)
        payment = environment.step(made.action_RH, Scores(made.log_prob_RH, made.value_R), made.flag)
        rollout.pay(decision, payment.reward_R)
        running_R = ~payment.over_R
        if each is not None:
            each(decision, payment)
        if not payment.done:
            situation = environment.situation()
    return rollout
