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
from esper.leyline.starts import JUDGEMENT, SELECTION, start_ids
from esper.leyline.streams import Stream
from esper.nissa.store import RunStore
from esper.simic.checkpoint import learner_files, restore_learner
from esper.simic.collect import collect
from esper.simic.environment import Balance, Payment
from esper.simic.ppo import PPOAgent, UpdateReport
from esper.simic.recorder import RoundRecorder
from esper.simic.rollout import Rollout
from esper.simic.run_folder import BEST_POLICY
from esper.simic.side_by_side import SideBySide, evaluations, populations
from esper.tamiyo.policy.network import FactoredRecurrentActorCritic
from esper.tamiyo.policy.saved import policy_files, read_policy, save_policy
from esper.tolaria.checkpoints import Checkpoint, Checkpoints
from esper.tolaria.tasks import Task

KIND = "train"
"""Kind of the checkpoints of a training."""
EVALUATION_SEED = 0
"""Of the random numbers of selection and judgement: hosts are the same whatever the seed of the training."""


@dataclass(frozen=True)
class Ground:
    """Hosts that a policy plays with, and where an episode of them is stored.

    Attributes
    ----------
    purpose
        What the record calls it.
    seed
        Of the policy's choices.
    """

    purpose: str
    environment: SideBySide
    rollout: Rollout
    seed: int


@dataclass(frozen=True)
class Worth:
    """What a policy was worth on some starts: means over the hosts that could grow, and the standard error over starts.

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
    environment
        What is learned in.
    selection, judgement
        What policies are evaluated in.
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
        self._rounds = _ground("train", self.environment, config.group_size, config)
        self.selection = self._evaluation("selection", SELECTION, config.selection_starts, tasks)
        self.judgement = self._evaluation("test", JUDGEMENT, config.judgement_starts, tasks)
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
            ground = self._rounds
            recorders = self._episodes(ground, self.policy, number, greedy=False, uniform_share=share)
            worth = _worth(ground, self.environment.balance(lambda data: data.reward_validation))
            begun = time.perf_counter()
            report = self.agent.update(ground.rollout)
            if recorders:
                rate = self.agent.optimizer.param_groups[0]["lr"]
                recorders[-1].update(report, time.perf_counter() - begun, rate)
            self._end(ground, recorders, start)
            paid = float(ground.rollout.reward_TR.sum(0)[ground.rollout.learners_N].mean())
            selected = (
                self._select() if (number + 1) % config.select_every == 0 or number + 1 == config.rounds else None
            )
            self._save(number + 1)
            seconds = time.perf_counter() - start
            yield RoundLine(number, paid, worth, report, len(ground.rollout.learners_N), seconds, selected)

    def judge(self, policy: FactoredRecurrentActorCritic, *, greedy: bool) -> Worth:
        """Measure a policy on starts that nothing else ever used, on the test split."""
        start, ground = time.perf_counter(), self.judgement
        recorders = self._episodes(ground, policy, greedy=greedy)
        test = ground.environment.balance(lambda data: data.test)
        self._end(ground, recorders, start, {"test_loss_nats": test.loss_R, "test_accuracy": test.accuracy_R})
        return _worth(ground, test)

    def _evaluation(self, purpose: str, of: range, starts: int, tasks: Sequence[Task]) -> Ground:
        """Give what a policy is evaluated in, the same whatever the seed of the training."""
        config = self.config.model_copy(update={"seed": EVALUATION_SEED})
        start_S = start_ids(of, 0, starts, config.device)
        environment = evaluations(config, tasks, start_S, record=self._store is not None)
        return _ground(purpose, environment, 1 + len(config.contexts.prices), config)

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
        start, ground = time.perf_counter(), self.selection
        recorders = self._episodes(ground, self.policy, greedy=True)
        worth = _worth(ground, ground.environment.balance(lambda data: data.selection))
        self._end(ground, recorders, start)
        if worth.net_nats > self._best:
            self._best = worth.net_nats
            save_policy(self.policy, self._folder / BEST_POLICY)
        return worth

    def _episodes(
        self,
        ground: Ground,
        policy: FactoredRecurrentActorCritic,
        number: int = 0,
        *,
        greedy: bool,
        uniform_share: float = 0.0,
    ) -> list[RoundRecorder]:
        """Make one episode of every row, and record it, each population as a round of its own."""
        environment, store = ground.environment, self._store
        recorders: list[RoundRecorder] = []

        def each(decision: int, payment: Payment) -> None:
            if store is None:
                return
            if not recorders:
                arm = "greedy" if greedy else "policy"
                recorders.extend(
                    RoundRecorder(store, number, part.episode, purpose=ground.purpose, arm=arm, controller="policy")
                    for number, part in enumerate(environment.parts, self._recorded)
                )
            for recorder, step in zip(recorders, payment.steps, strict=bool(payment.steps)):
                recorder.decision(step)

        collect(
            environment,
            policy,
            ground.rollout,
            ground.seed,
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
        self,
        ground: Ground,
        recorders: Sequence[RoundRecorder],
        start: float,
        results: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Record how the episodes ended."""
        ends_R = {"reward": ground.rollout.reward_TR.sum(0), **(results or {})}
        told_R = {name: values_R.double().cpu().numpy() for name, values_R in ends_R.items()} if recorders else {}
        seconds = time.perf_counter() - start
        for recorder, rows in zip(recorders, ground.environment.slices, strict=bool(recorders)):
            recorder.end("finished", {"training_s": seconds, **{n: values_R[rows] for n, values_R in told_R.items()}})


def _ground(purpose: str, environment: SideBySide, group_size: int, config: TrainConfig) -> Ground:
    """Give room for the episodes of an environment; the first row of each of its groups is not learned from."""
    learners_N = (torch.arange(environment.rows) % group_size > 0).nonzero()[:, 0]
    size = environment.horizon, environment.rows, environment.slots
    rollout = Rollout(*size, learners_N=learners_N, device=config.device)
    return Ground(purpose, environment, rollout, config.seed)


def _worth(ground: Ground, balance: Balance) -> Worth:
    """What the policy's hosts are worth."""
    learners_N = ground.rollout.learners_N
    net_N, gain_N = balance.net_R[learners_N], balance.gain_R[learners_N]
    _, start_N, count_S = ground.environment.contexts.start_id_R[learners_N].unique(
        return_inverse=True, return_counts=True
    )
    mean_S = torch.zeros_like(count_S, dtype=net_N.dtype).index_add_(0, start_N, net_N) / count_S
    starts = len(count_S)
    error = mean_S.std() / starts**0.5 if starts > 1 else torch.full_like(mean_S[0], torch.nan)
    added_N = balance.added_R[learners_N].float()
    values = torch.stack((net_N.mean(), error, gain_N.mean(), added_N.mean())).tolist()
    return Worth(*values)


def _generator(seed: int) -> torch.Generator:
    """Give the generator that a new policy is drawn from."""
    zero = torch.zeros(1, dtype=torch.int64)
    return torch.Generator().manual_seed(int(Stream(seed, "policy initialisation").integers(zero, zero, 1)))
