"""Training a policy: rounds of experience and updates, selection, and a final evaluation on starts never seen.

Shapes: R rows, N learners.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from esper.leyline.config import TrainConfig
from esper.leyline.streams import Stream
from esper.nissa.store import RunStore
from esper.simic.checkpoint import learner_files, restore_learner
from esper.simic.collect import collect
from esper.simic.environment import Balance, Payment
from esper.simic.ppo import PPOAgent, UpdateReport
from esper.simic.recorder import RoundRecorder
from esper.simic.rollout import Rollout
from esper.simic.run_folder import BEST_POLICY
from esper.simic.side_by_side import populations
from esper.tamiyo.policy.network import FactoredRecurrentActorCritic
from esper.tamiyo.policy.saved import policy_files, read_policy, save_policy
from esper.tolaria.checkpoints import Checkpoint, Checkpoints
from esper.tolaria.tasks import Task

KIND = "train"
"""Kind of the checkpoints of a training."""
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
    config, tasks
        The run, and its task, loaded with a host of each width.
    folder
        Where policies are saved.
    store
        Where to record; None: nowhere.
    checkpoint
        Where to go on; None: from the start.

    Attributes
    ----------
    made
        Rounds behind it.

    Raises
    ------
    ValueError
        The checkpoint is not of such a run.
    """

    def __init__(
        self,
        config: TrainConfig,
        tasks: Sequence[Task],
        folder: Path,
        store: RunStore | None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.config, self._folder, self._store = config, folder, store
        self.environment = populations(config, tasks, record=store is not None)
        self.policy = FactoredRecurrentActorCritic(config.policy)
        self.policy.initialise(_generator(config.seed))
        self.policy.to(config.device)
        self.agent = PPOAgent(self.policy, config.ppo, config.seed)
        member_R = torch.arange(config.rows) % config.group_size
        learners_N = (member_R > 0).nonzero()[:, 0]
        size = self.environment.horizon, config.rows, self.environment.slots
        self._rollout = Rollout(*size, learners_N=learners_N, device=config.device)
        self._checkpoints = Checkpoints(folder)
        self.made, self._recorded = 0, 0
        self._best = -math.inf
        if checkpoint is not None:
            self._resume(checkpoint)

    def run(self, stopped: Callable[[], bool]) -> Iterator[RoundLine]:
        """Train round by round until the last, or until `stopped` says so; every round leaves a checkpoint."""
        config = self.config
        if not self.made:
            self._save(0)
        for number in range(self.made, config.rounds):
            if stopped():
                return
            start = time.perf_counter()
            self.agent.set_progress(number / max(1, config.rounds - 1))
            warm = config.price_warmup * config.rounds
            self.environment.set_price_share(min(1.0, number / warm) if warm else 1.0)
            share = self.agent.uniform_share
            recorders = self._episodes("train", number, self.policy, greedy=False, uniform_share=share)
            self.environment.set_price_share(1.0)
            worth = self._worth(self.environment.balance(lambda data: data.reward_validation))
            begun = time.perf_counter()
            report = self.agent.update(self._rollout)
            if recorders:
                rate = self.agent.optimizer.param_groups[0]["lr"]
                recorders[-1].update(report, time.perf_counter() - begun, rate)
            self._end(recorders, start)
            # Now, because a selection uses the same storage.
            paid = float(self._rollout.reward_TR.sum(0)[self._rollout.learners_N].mean())
            selected = (
                self._select() if (number + 1) % config.select_every == 0 or number + 1 == config.rounds else None
            )
            self._save(number + 1)
            seconds = time.perf_counter() - start
            yield RoundLine(number, paid, worth, report, len(self._rollout.learners_N), seconds, selected)

    def judge(self, policy: FactoredRecurrentActorCritic, *, greedy: bool) -> Worth:
        """Measure a policy on starts that nothing else ever used, on the test split."""
        start = time.perf_counter()
        recorders = self._episodes("test", FINAL_STARTS, policy, greedy=greedy)
        test = self.environment.balance(lambda data: data.test)
        self._end(recorders, start, {"test_loss_nats": test.loss_R, "test_accuracy": test.accuracy_R})
        return self._worth(test)

    def _save(self, made: int) -> None:
        """Keep what the rounds to come depend on: all else follows from the run's seed and their numbers."""
        self.made = made
        best = None if self._best == -math.inf else self._best
        facts = {"kind": KIND, "rounds": made, "recorded_rounds": self._recorded, "best_net": best}
        files = policy_files(self.policy) | learner_files(self.agent)
        self._checkpoints.save(Checkpoint(made, facts, files))

    def _resume(self, checkpoint: Checkpoint) -> None:
        facts = checkpoint.facts
        if facts.get("kind") != KIND:
            raise ValueError(f"it is not of a training, but of kind {facts.get('kind')!r}")
        saved = read_policy(checkpoint.files, self._checkpoints.folder)
        if saved.config != self.config.policy:
            raise ValueError("its policy is of another size")
        self.policy.load_state_dict(saved.state_dict())
        restore_learner(self.agent, checkpoint.files)
        self.made, self._recorded = facts["rounds"], facts["recorded_rounds"]
        self._best = -math.inf if facts["best_net"] is None else facts["best_net"]

    def _select(self) -> Worth:
        """Measure the policy on the selection split, greedy, and keep it if it is the best so far."""
        start = time.perf_counter()
        recorders = self._episodes("selection", SELECTION_STARTS, self.policy, greedy=True)
        worth = self._worth(self.environment.balance(lambda data: data.selection))
        self._end(recorders, start)
        if worth.net_nats > self._best:
            self._best = worth.net_nats
            save_policy(self.policy, self._folder / BEST_POLICY)
        return worth

    def _episodes(
        self,
        purpose: str,
        number: int,
        policy: FactoredRecurrentActorCritic,
        *,
        greedy: bool,
        uniform_share: float = 0.0,
    ) -> list[RoundRecorder]:
        """Make one episode of every row into the rollout, and record it, each population as a round of its own."""
        environment, store = self.environment, self._store
        recorders: list[RoundRecorder] = []

        def each(decision: int, payment: Payment) -> None:
            if store is None:
                return
            if not recorders:
                arm = "greedy" if greedy else "policy"
                recorders.extend(
                    RoundRecorder(store, number, part.episode, purpose=purpose, arm=arm, controller="policy")
                    for number, part in enumerate(environment.parts, self._recorded)
                )
            for recorder, step in zip(recorders, payment.steps, strict=bool(payment.steps)):
                recorder.decision(step)

        collect(
            environment,
            policy,
            self._rollout,
            self.config.seed,
            number,
            greedy=greedy,
            uniform_share=uniform_share,
            each=each,
        )
        for recorder, part in zip(recorders, environment.parts, strict=bool(recorders)):
            recorder.decision(part.episode.step())
        self._recorded += len(environment.parts)
        return recorders

    def _end(
        self, recorders: Sequence[RoundRecorder], start: float, results: Mapping[str, Tensor] | None = None
    ) -> None:
        """Record how the episodes ended."""
        ends_R = {"reward": self._rollout.reward_TR.sum(0), **(results or {})}
        told_R = {name: values_R.double().cpu().numpy() for name, values_R in ends_R.items()} if recorders else {}
        seconds = time.perf_counter() - start
        for recorder, rows in zip(recorders, self.environment.slices, strict=bool(recorders)):
            recorder.end("finished", {"training_s": seconds, **{n: values_R[rows] for n, values_R in told_R.items()}})

    def _worth(self, balance: Balance) -> Worth:
        """What the policy's hosts are worth, in one transfer."""
        learners_N = self._rollout.learners_N
        net_N, gain_N = balance.net_R[learners_N], balance.gain_R[learners_N]
        group_N, groups = self.environment.contexts.group_R[learners_N], self.config.groups
        mean_G = torch.zeros(groups, device=net_N.device).index_add_(0, group_N, net_N) / (self.config.group_size - 1)
        error = mean_G.std() / groups**0.5 if groups > 1 else torch.full_like(mean_G[0], torch.nan)
        added_N = balance.added_R[learners_N].float()
        values = torch.stack((net_N.mean(), error, gain_N.mean(), added_N.mean())).tolist()
        return Worth(*values)


def _generator(seed: int) -> torch.Generator:
    """Give the generator that a new policy is drawn from."""
    zero = torch.zeros(1, dtype=torch.int64)
    return torch.Generator().manual_seed(int(Stream(seed, "policy initialisation").integers(zero, zero, 1)))
