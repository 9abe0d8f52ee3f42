"""Three small problems whose best policy is known, learned by the agent that learns to grow.

    python examples/known_answers.py bandit
    python examples/known_answers.py timing --seed 3
    python examples/known_answers.py memory

They use the real slots, lifecycle, masks, observation, policy and PPO, with every default as it is; only the host is
missing: a rule of a few lines says what a decision is worth. What is learned here can be checked by hand, so a learner
that fails here would fail anywhere. Read `Bandit` first: it shows all that a problem needs.

Shapes: R rows, S slots, H heads, C gate checks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from esper.kasmina.lifecycle import Lifecycle
from esper.leyline.actions import Blueprint, Head, Op, Operator, SiteKind
from esper.leyline.checks import ALL_GATE_CHECKS, GateReport, Outcome
from esper.leyline.config import PolicyConfig, PPOConfig, RunConfig
from esper.leyline.sites import Site, SlotConfig, fit_table
from esper.leyline.slots import SlotTensors
from esper.leyline.streams import Stream
from esper.leyline.view import PopulationView, Scores
from esper.simic.collect import collect
from esper.simic.contexts import Contexts
from esper.simic.environment import Payment, Situation
from esper.simic.ppo import PPOAgent
from esper.simic.rollout import Rollout
from esper.tamiyo.policy.action_masks import ActionMasks, compute_batch_masks
from esper.tamiyo.policy.distribution import raise_flag
from esper.tamiyo.policy.network import FactoredRecurrentActorCritic
from esper.tamiyo.policy.observation import Observer

ROWS = 64
HOST_PARAMETERS = 1_000


class Problem:
    """Slots without a host: what happens to them is real, what it is worth is up to the problem.

    Attributes
    ----------
    optimum
        Mean return of the best policy.
    rounds
        Within which it is learned.
    """

    horizon: int
    slots: int
    optimum: float
    rounds: int
    rows = ROWS
    contexts: Contexts

    def __init__(self, seed: int) -> None:
        self.seed = seed
        sites = tuple(Site(SiteKind.VECTOR, 8, (), depth + 1) for depth in range(self.slots))
        self._config = SlotConfig.of_chain(sites)
        self._fits_SB = fit_table(self._config, frozenset(Blueprint))
        self._lifecycle = Lifecycle(self._config, self._fits_SB, 2)

    def reset(self, number: int) -> Situation:
        """Begin an episode of every row."""
        self._id_R = number * self.rows + torch.arange(self.rows)
        self.contexts = Contexts.alone(RunConfig(), torch.arange(self.rows))
        self.state = SlotTensors.empty(self.rows, self.slots)
        self._masks = ActionMasks.empty(self.rows, self._fits_SB)
        self._observer = Observer(self.rows, self._config, "cpu")
        self.decision = 0
        self._last: Outcome | None = None
        self._action_RH: Tensor | None = None
        self.begin()
        return self.situation()

    def begin(self) -> None:
        """Draw what this problem needs."""

    def chance(self, name: str) -> Tensor:
        """Number in (0, 1) of each row and episode [R]."""
        return Stream(self.seed, name).uniform(self._id_R, torch.zeros_like(self._id_R), 1, torch.float32)[:, 0]

    def loss(self) -> Tensor:
        """Loss [R] that is shown before a decision."""
        return torch.ones(self.rows)

    def worth(self, op_R: Tensor, blueprint_R: Tensor) -> Tensor:
        """Reward [R] of the decision that is being made."""
        raise NotImplementedError

    def _gates(self) -> GateReport:
        shape = (len(ALL_GATE_CHECKS), self.rows, self.slots)
        return GateReport(torch.ones(shape), torch.ones(shape, dtype=torch.bool), torch.zeros(shape[0]))

    def situation(self) -> Situation:
        """What there is to see."""
        loss_R = self.loss()
        view = PopulationView(
            decision=self.decision,
            horizon=self.horizon,
            slots=self.state,
            slot_config=self._config,
            fits_SB=self._fits_SB,
            seed_parameters_SBO=self._fits_SB[:, :, None].expand(-1, -1, len(Operator)).long(),
            gates=self._gates(),
            train_loss_R=loss_R,
            val_loss_R=loss_R,
            val_accuracy_R=torch.full((self.rows,), 0.5),
            host_parameters=HOST_PARAMETERS,
            classes=10,
            price_R=self.contexts.price_R,
            last=self._last,
            last_action_RH=self._action_RH,
        )
        return Situation(self._observer.observe(view), compute_batch_masks(self.state, self._masks))

    def step(self, action_RH: Tensor, scores: Scores | None = None, flag: Tensor | None = None) -> Payment:
        """Perform one decision."""
        if flag is not None:
            raise_flag(int(flag))
        self._action_RH = action_RH
        reward_R = self.worth(action_RH[:, Head.OP], action_RH[:, Head.BLUEPRINT])
        self._last = self._lifecycle.apply(self.state, action_RH, self._gates())
        self._lifecycle.tick(self.state)
        self.decision += 1
        nobody_R = torch.zeros(self.rows, dtype=torch.bool)
        return Payment(reward_R, {"worth": reward_R}, nobody_R, self.decision >= self.horizon)


class Bandit(Problem):
    """One decision: which blueprint to grow, if any, when what it gives and what it costs compete.

    A large MLP gives most and costs most, a small one less of both, a norm little for nearly nothing; the price
    decides, and the highest asks for none.
    """

    horizon, slots, rounds = 1, 1, 150
    gives: ClassVar = {Blueprint.MLP_LARGE: (1.0, 1.0), Blueprint.MLP_SMALL: (0.7, 0.4), Blueprint.NORM: (0.3, 0.1)}
    prices = (0.0, 0.75, 2.0, 4.0)

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        best = [max(0.0, *(gain - price * cost for gain, cost in self.gives.values())) for price in self.prices]
        self.optimum = sum(best) / len(best)

    def begin(self) -> None:
        which_R = torch.arange(self.rows) % len(self.prices)
        self.contexts.price_R.copy_(torch.tensor(self.prices)[which_R])

    def worth(self, op_R: Tensor, blueprint_R: Tensor) -> Tensor:
        table = torch.zeros(len(Blueprint), 2)
        for blueprint, pair in self.gives.items():
            table[blueprint] = torch.tensor(pair)
        gain_R, cost_R = table[blueprint_R].unbind(1)
        return torch.where(op_R == int(Op.GERMINATE), gain_R - self.contexts.price_R * cost_R, 0.0)


class Timing(Problem):
    """A dozen decisions, of which one is the right one: growing earlier or later is worth less."""

    horizon, slots, rounds, optimum = 12, 1, 80, 1.0
    best, width = 6, 4

    def begin(self) -> None:
        self._grown_R = torch.zeros(self.rows, dtype=torch.bool)

    def worth(self, op_R: Tensor, blueprint_R: Tensor) -> Tensor:
        first_R = (op_R == int(Op.GERMINATE)) & ~self._grown_R
        self._grown_R = self._grown_R | first_R
        return first_R * (1 - abs(self.decision - self.best) / self.width)


class Memory(Problem):
    """The first loss says which blueprint will be the right one at the last decision; in between it tells nothing.

    There is a slot for each decision, so that one is free at the last whatever was grown before.
    """

    horizon, slots, rounds, optimum = 8, 8, 100, 1.0
    answers = (Blueprint.NORM, Blueprint.MLP_LARGE)

    def begin(self) -> None:
        self._cue_R = (self.chance("cue") * len(self.answers)).long()

    def loss(self) -> Tensor:
        return torch.where(self._cue_R == 0, 0.5, 2.0) if self.decision == 0 else super().loss()

    def worth(self, op_R: Tensor, blueprint_R: Tensor) -> Tensor:
        right_R = torch.tensor([int(b) for b in self.answers])[self._cue_R]
        answered_R = (op_R == int(Op.GERMINATE)) & (blueprint_R == right_R)
        return answered_R.float() * (self.decision == self.horizon - 1)


PROBLEMS: dict[str, type[Problem]] = {"bandit": Bandit, "timing": Timing, "memory": Memory}


def learn(name: str, seed: int, tell: Callable[[int, float, float], None] | None = None) -> float:
    """Learn a problem with every default; give what the greedy policy gets on a fresh round, as a share of the best.

    Parameters
    ----------
    tell
        Told of the round, and of the mean return of learning as a share of the best, and of the KL divergence.
    """
    problem = PROBLEMS[name](seed)
    config = PPOConfig()
    policy = FactoredRecurrentActorCritic(PolicyConfig())
    policy.initialise(torch.Generator().manual_seed(seed))
    agent = PPOAgent(policy, config, seed)
    rollout = Rollout(problem.horizon, problem.rows, problem.slots)
    for number in range(problem.rounds):
        agent.set_progress(number / (problem.rounds - 1))
        collect(problem, policy, rollout, seed, number, uniform_share=agent.uniform_share)
        report = agent.update(rollout)
        if tell is not None:
            tell(number, float(rollout.reward_TR.sum(0).mean()) / problem.optimum, report.kl_nats)
    collect(problem, policy, rollout, seed, problem.rounds, greedy=True)
    return float(rollout.reward_TR.sum(0).mean()) / problem.optimum


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", choices=PROBLEMS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    def tell(number: int, share: float, kl: float) -> None:
        if (number + 1) % 10 == 0:
            print(f"round {number + 1:4}  return {share:6.1%} of the best  KL {kl:.4f} nats")

    share = learn(arguments.problem, arguments.seed, tell)
    print(f"greedy, on a fresh round: {share:.1%} of the best")


if __name__ == "__main__":
    main()
