"""Training a policy: rounds of experience and updates, selection, and a final evaluation on starts never seen.

Shapes: R rows, N learners.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from esper.leyline.config import TrainConfig
from esper.leyline.streams import Stream
from esper.nissa.store import RunStore
from esper.simic.collect import collect
from esper.simic.environment import GrowthEnvironment, Payment
from esper.simic.ppo import PPOAgent, UpdateReport
from esper.simic.recorder import RoundRecorder
from esper.simic.rollout import Rollout
from esper.simic.run_folder import BEST_POLICY, LAST_POLICY
from esper.tamiyo.policy.network import FactoredRecurrentActorCritic
from esper.tamiyo.policy.saved import save_policy
from esper.tolaria.datasets import Split
from esper.tolaria.evaluation import Evaluation, evaluate
from esper.tolaria.tasks import Task

SELECTION_STARTS, FINAL_STARTS = 2**18, 2**19
"""Numbers of the rounds whose starts select and judge; training never gets so far."""


@dataclass(frozen=True)
class Worth:
    """What a policy was worth on some starts: means over the hosts that could grow, and the standard error over groups.

    Attributes
    ----------
    net_nats, net_se_nats
        By how much the loss fell below that of the twin, less rent.
    gain_nats, added_parameters
        The same without rent, and how much was grown.
    """

    net_nats: float
    net_se_nats: float
    gain_nats: float
    added_parameters: float


@dataclass(frozen=True)
class RoundLine:
    """One round of training."""

    number: int
    return_mean: float
    worth: Worth
    update: UpdateReport
    episodes: int
    seconds: float
    selected: Worth | None


class PolicyTraining:
    """Trains one policy.

    Parameters
    ----------
    config, task
        The run, and its task, loaded.
    folder
        Where policies are saved.
    store
        Where to record; None: nowhere.
    """

    def __init__(self, config: TrainConfig, task: Task, folder: Path, store: RunStore | None) -> None:
        self.config, self.task, self._folder, self._store = config, task, folder, store
        self.environment = GrowthEnvironment(
            config,
            task,
            config.contexts,
            config.objective,
            groups=config.rows // config.group_size,
            size=config.group_size,
            gamma=config.ppo.gamma,
            record=store is not None,
        )
        self.policy = FactoredRecurrentActorCritic(config.policy)
        self.policy.initialise(_generator(config.seed))
        self.policy.to(config.device)
        self.agent = PPOAgent(self.policy, config.ppo, config.seed)
        member_R = torch.arange(config.rows) % config.group_size
        learners_N = (member_R > 0).nonzero()[:, 0]
        size = self.environment.horizon, config.rows, self.environment.slots
        self._rollout = Rollout(*size, learners_N=learners_N, device=config.device)
        self._rounds = 0
        self._best = -math.inf

    def run(self, stopped: Callable[[], bool]) -> Iterator[RoundLine]:
        """Train round by round until the last, or until `stopped` says so; every round leaves its policy on disk."""
        config = self.config
        for number in range(config.rounds):
            if stopped():
                return
            start = time.perf_counter()
            self.agent.set_progress(number / config.rounds)
            recorder = self._episodes("train", number, self.policy, greedy=False)
            worth = self._worth(self._evaluate(self.task.data.reward_validation))
            begun = time.perf_counter()
            report = self.agent.update(self._rollout)
            if recorder is not None:
                rate = self.agent.optimizer.param_groups[0]["lr"]
                recorder.update(report, time.perf_counter() - begun, rate)
            self._end(recorder, start)
            # Now, because a selection uses the same storage.
            paid = float(self._rollout.reward_TR.sum(0)[self._rollout.learners_N].mean())
            save_policy(self.policy, self._folder / LAST_POLICY)
            selected = (
                self._select() if (number + 1) % config.select_every == 0 or number + 1 == config.rounds else None
            )
            seconds = time.perf_counter() - start
            yield RoundLine(number, paid, worth, report, len(self._rollout.learners_N), seconds, selected)

    def judge(self, policy: FactoredRecurrentActorCritic, *, greedy: bool) -> Worth:
        """Measure a policy on starts that nothing else ever used, on the test split."""
        start = time.perf_counter()
        recorder = self._episodes("test", FINAL_STARTS, policy, greedy=greedy)
        test = self._evaluate(self.task.data.test)
        columns = {"test_loss_nats": test.loss_R, "test_accuracy": test.accuracy_R}
        self._end(recorder, start, {name: values_R.double().cpu().numpy() for name, values_R in columns.items()})
        return self._worth(test)

    def _select(self) -> Worth:
        """Measure the policy on the selection split, greedy, and keep it if it is the best so far."""
        start = time.perf_counter()
        recorder = self._episodes("selection", SELECTION_STARTS, self.policy, greedy=True)
        worth = self._worth(self._evaluate(self.task.data.selection))
        self._end(recorder, start)
        if worth.net_nats > self._best:
            self._best = worth.net_nats
            save_policy(self.policy, self._folder / BEST_POLICY)
        return worth

    def _episodes(
        self, purpose: str, number: int, policy: FactoredRecurrentActorCritic, *, greedy: bool
    ) -> RoundRecorder | None:
        """Make one episode of every row into the rollout, and record it."""
        environment, store = self.environment, self._store
        recorder: RoundRecorder | None = None

        def each(decision: int, payment: Payment) -> None:
            nonlocal recorder
            if store is None:
                return
            if recorder is None:
                arm = "greedy" if greedy else "policy"
                recorder = RoundRecorder(
                    store, self._rounds, environment.episode, purpose=purpose, arm=arm, controller="policy"
                )
            if payment.step is not None:
                recorder.decision(payment.step)

        collect(environment, policy, self._rollout, self.config.seed, number, greedy=greedy, each=each)
        if recorder is not None:
            recorder.decision(environment.episode.step())
        self._rounds += 1
        return recorder

    def _end(self, recorder: RoundRecorder | None, start: float, results: Mapping[str, Any] | None = None) -> None:
        if recorder is not None:
            reward_R = self._rollout.reward_TR.sum(0).double().cpu().numpy()
            seconds = time.perf_counter() - start
            recorder.end("finished", {"reward": reward_R, "training_s": seconds, **(results or {})})

    def _evaluate(self, split: Split) -> Evaluation:
        return evaluate(self.environment.episode.population, split)

    def _worth(self, evaluation: Evaluation) -> Worth:
        """What the policy's hosts are worth by an evaluation, in one transfer."""
        environment = self.environment
        standing = environment.standing(evaluation)
        objective, contexts = environment.objective, environment.contexts
        learners_N = self._rollout.learners_N
        net_N, gain_N = objective.net(standing)[learners_N], objective.lead(standing)[learners_N]
        group_N = contexts.group_R[learners_N]
        groups = self.config.rows // self.config.group_size
        mean_G = torch.zeros(groups, device=net_N.device).index_add_(0, group_N, net_N) / (self.config.group_size - 1)
        error = mean_G.std() / groups**0.5 if groups > 1 else torch.full_like(mean_G[0], torch.nan)
        added_N = standing.added_R[learners_N].float()
        values = torch.stack((net_N.mean(), error, gain_N.mean(), added_N.mean())).tolist()
        return Worth(*values)


def _generator(seed: int) -> torch.Generator:
    """Give the generator that a new policy is drawn from."""
    zero = torch.zeros(1, dtype=torch.int64)
    return torch.Generator().manual_seed(int(Stream(seed, "policy initialisation").integers(zero, zero, 1)))
