"""Small populations recorded into a real store, with the steps that went in."""

from dataclasses import dataclass
from pathlib import Path

import torch

from esper.leyline.actions import HEAD_COUNT
from esper.leyline.config import GrowthConfig, PolicyConfig, RecordConfig, RunConfig
from esper.nissa.store import RunStore
from esper.simic.contexts import Contexts
from esper.simic.episode import Episode
from esper.simic.recorder import RoundRecorder, run_columns
from esper.simic.step import Step
from esper.tamiyo.policy.network import FactoredRecurrentActorCritic
from esper.tamiyo.policy.saved import save_policy
from helpers.episodes import run_config, task_of
from helpers.growing import QUICK

ROUND = 3
"""Number of the recorded round: not the first, so that nobody takes it for 0."""


@dataclass(frozen=True)
class Recorded:
    """An episode, its steps, and the store that it was recorded in (None: nowhere)."""

    episode: Episode
    steps: list[Step]
    path: Path | None


class Wild:
    """A controller that asks for anything, what does not exist included."""

    flag = scores = None

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.generator = torch.Generator().manual_seed(5)

    def observe(self, view) -> None:
        """Look at nothing."""

    def act(self) -> torch.Tensor:
        """Give choices from -2 on, and mostly small ones, which exist."""
        wild = torch.randint(-2, 15, (self.rows, HEAD_COUNT), generator=self.generator)
        tame = torch.randint(0, 3, (self.rows, HEAD_COUNT), generator=self.generator)
        # Most operations are germinations and advances, so that there is something to ask for.
        tame[:, 0] = torch.tensor([1, 5, 3])[tame[:, 0]]
        use_wild = torch.rand((self.rows, HEAD_COUNT), generator=self.generator) < 0.15
        return torch.where(use_wild, wild, tame)


def save_new_policy(folder: Path) -> Path:
    """Save a policy that has learned nothing: it tries everything that is possible."""
    policy = FactoredRecurrentActorCritic(PolicyConfig(width=16, hidden=16))
    policy.initialise(torch.Generator().manual_seed(0))
    save_policy(policy, folder)
    return folder


def walk_config(
    task: str, controller: str, *, level: str = "full", horizon: int = 40, growth: GrowthConfig = QUICK
) -> RunConfig:
    """Give the configuration of cheap decisions, with gates of little patience."""
    recording = RecordConfig.model_validate({"record": level})
    return run_config(
        task, controller, horizon=horizon, updates=1, batch=8, growth=growth, price=0.5, recording=recording
    )


def record_walk(config: RunConfig, rows: int, path: Path | None, *, controller=None) -> Recorded:
    """Run an episode and record it; without a path, or where the configuration says so, nowhere."""
    ids = torch.arange(10, 10 + rows)
    contexts = Contexts.alone(config, ids, config.price)
    episode = Episode(config, task_of(config.task, examples=40), config.controller, ids, contexts=contexts)
    if controller is not None:
        episode.controller = controller
    steps: list[Step] = []
    if path is None or config.recording.record == "off":
        while not episode.done:
            episode.advance()
            steps.append(episode.step())
        return Recorded(episode, steps, None)
    with RunStore(path, run_columns(config, "test", config.training.horizon)) as store:
        recorder = RoundRecorder(
            store, ROUND, episode, purpose="train", arm="walk", controller=config.controller, twin_round=1
        )
        while not episode.done:
            step = episode.advance(record=True)
            if step is not None:
                steps.append(step)
                recorder.decision(step)
        steps.append(episode.step())
        recorder.decision(steps[-1])
        recorder.end("finished", {"training_s": 1.5, "test_accuracy": [0.25] * rows})
    return Recorded(episode, steps, path)
