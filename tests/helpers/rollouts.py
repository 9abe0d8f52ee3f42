"""Rounds filled with whatever a policy decides on random observations under random masks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from esper.leyline.actions import HEAD_COUNT, Blueprint, Op
from esper.leyline.config import PolicyConfig
from esper.leyline.slots import SlotTensors
from esper.leyline.stages import Stage
from esper.simic.rollout import Rollout
from esper.tamiyo.policy.action_masks import ActionMasks, compute_batch_masks
from esper.tamiyo.policy.distribution import Validation
from esper.tamiyo.policy.features import RUN_FEATURES, RUNNING_FEATURES, SLOT_FEATURES
from esper.tamiyo.policy.network import Decision, FactoredRecurrentActorCritic
from esper.tamiyo.policy.observation import Observation

Policy = FactoredRecurrentActorCritic
KNOWN = len(RUNNING_FEATURES)
Reward = Callable[[Decision], Tensor]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_policy(seed: int = 0, **config: float) -> Policy:
    """As a run starts with it."""
    policy = Policy(PolicyConfig(**{"width": 16, "hidden": 16, **config}))
    policy.validation = Validation.DEFERRED
    policy.initialise(seeded(seed))
    return policy


@torch.no_grad()
def moved(policy: Policy, seed: int = 0, by: float = 0.1) -> Policy:
    """The same policy, every parameter changed at random."""
    for parameter in policy.parameters():
        parameter += by * torch.randn(parameter.shape, generator=seeded(seed + parameter.numel()))
    return policy


@torch.no_grad()
def valuing(policy: Policy) -> Policy:
    """The same policy with a critic that has begun to learn: through an output of 0 no gradient gets further."""
    weight = policy.value_output.linear.weight
    weight.copy_(torch.randn(weight.shape, generator=seeded(0)))
    return policy


def random_observation(rows: int, slots: int, seed: int) -> Observation:
    """Any numbers; a third of the running features was not measured."""
    generator = seeded(seed)
    slot = torch.randn(rows, slots, len(SLOT_FEATURES), generator=generator)
    run = torch.randn(rows, len(RUN_FEATURES), generator=generator)
    run[:, :KNOWN].masked_fill_(torch.rand(rows, KNOWN, generator=generator) < 0.3, torch.nan)
    return Observation(slot, run)


def random_masks(rows: int, slots: int, seed: int, forced: float = 0.2) -> ActionMasks:
    """Of slots in any state; in a share `forced` of the rows nothing is left but to wait."""
    generator = seeded(seed)
    state = SlotTensors.empty(rows, slots)
    state.stage = torch.tensor([int(s) for s in Stage])[torch.randint(len(Stage), (rows, slots), generator=generator)]
    state.alpha_mode = torch.randint(3, (rows, slots), generator=generator)
    state.alpha_target = torch.randint(2, (rows, slots), generator=generator).float()
    fits_SB = torch.rand(slots, len(Blueprint), generator=generator) < 0.5
    masks = compute_batch_masks(state, ActionMasks.empty(rows, fits_SB))
    masks.op_RO[torch.rand(rows, generator=generator) < forced] = torch.arange(len(Op)) == int(Op.WAIT)
    return masks


def fill(
    rollout: Rollout,
    policy: Policy,
    seed: int = 0,
    *,
    lengths: list[int] | None = None,
    reward: Reward | None = None,
    forced: float = 0.2,
    uniform_share: float = 0.0,
) -> Rollout:
    """Play a round; row r makes `lengths[r]` decisions, by default all. Rewards are random unless told."""
    _, rows, slots, _ = rollout.slot_TRSF.shape
    length_R = torch.full((rows,), rollout.decisions) if lengths is None else torch.tensor(lengths)
    hidden, generator = policy.initial_hidden(rows), seeded(seed)
    rollout.uniform_share = uniform_share
    for t in range(rollout.decisions):
        observation = random_observation(rows, slots, 1000 * seed + t)
        masks = random_masks(rows, slots, 1000 * seed + t, forced)
        uniform_RH = torch.rand(rows, HEAD_COUNT, generator=generator)
        made = policy.get_action(observation, masks, hidden, uniform_RH, uniform_share=uniform_share)
        hidden = made.hidden
        rollout.store(t, observation, made, t < length_R)
        rollout.pay(t, torch.randn(rows, generator=generator) if reward is None else reward(made))
    return rollout


def random_rollout(
    policy: Policy,
    decisions: int = 6,
    rows: int = 8,
    slots: int = 3,
    seed: int = 0,
    *,
    group: list[int] | None = None,
    learners: list[int] | None = None,
    **how: object,
) -> Rollout:
    """A new round, filled."""
    rollout = Rollout(
        decisions,
        rows,
        slots,
        group_R=None if group is None else torch.tensor(group),
        learners_N=None if learners is None else torch.tensor(learners),
    )
    return fill(rollout, policy, seed, **how)  # type: ignore[arg-type]


def plain_advantages(rollout: Rollout, gamma: float, gae_lambda: float, *, critic: bool = True) -> Tensor:
    """GAE of every row by the recursion, float64, 0 where no decision was made; without the critic its value is 0."""
    advantage_TR = torch.zeros(rollout.made_TR.shape, dtype=torch.float64)
    for row in range(rollout.made_TR.shape[1]):
        following = ahead = 0.0
        for t in reversed(range(rollout.decisions)):
            if not rollout.made_TR[t, row]:
                continue
            value = float(rollout.value_TR[t, row]) if critic else 0.0
            ahead = float(rollout.reward_TR[t, row]) + gamma * following - value + gamma * gae_lambda * ahead
            advantage_TR[t, row], following = ahead, value
    return advantage_TR


def normalised(advantage_TR: Tensor, free_TR: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over the decisions that count."""
    kept = advantage_TR[free_TR]
    return (advantage_TR - kept.mean()) / (kept.std(correction=0) + 1e-8)
