"""Small episodes recorded decision by decision, shared by the tests of whole runs."""

from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby

import numpy as np
import torch

from esper.leyline.config import GateConfig, GrowthConfig, RunConfig, TrainingConfig
from esper.leyline.stages import GROWTH_ORDER, WAITING_STAGES, Stage
from esper.simic.episode import Episode
from esper.simic.step import Step
from esper.tolaria.datasets import Split
from esper.tolaria.tasks import TASKS, Task, load_task
from helpers.growing import QUICK, WAIT, Action

TASK_NAMES = tuple(TASKS)
CONTROLLER_NAMES = ("never", "random", "periodic", "heuristic")
OPEN_GATES = GrowthConfig(
    gates=GateConfig(
        min_training_decisions=2,
        min_incubator_gain=-100,
        min_gradient_ratio=0,
        min_probation_decisions=2,
        min_contribution=-100,
    ),
    embargo=2,
)
"""Only the counts of decisions can refuse: what a script wants to do does not depend on what was learned."""
WAITS = {Stage.CULLED: 1, Stage.EMBARGOED: QUICK.embargo, Stage.RESETTING: 1}


@cache
def task_of(
    name: str, host: str = "impaired", dtype: torch.dtype = torch.float32, examples: int = 10_000, width: float = 1.0
) -> Task:
    """Load a task, with at most `examples` of reward-validation: evaluation is what takes long."""
    task = load_task(name, host, dtype=dtype, width=width)
    split = task.data.reward_validation
    few = Split(split.x[:examples], split.y[:examples])
    return replace(task, data=replace(task.data, reward_validation=few))


def run_config(
    task: str, controller: str = "never", *, horizon: int, updates: int, batch: int = 32, **more
) -> RunConfig:
    """Give the configuration of a short run."""
    training = TrainingConfig(horizon=horizon, updates_per_decision=updates, batch_size=batch)
    return RunConfig(task=task, controller=controller, training=training, **more)


@dataclass(frozen=True)
class Recording:
    """An episode that is over, and its steps."""

    episode: Episode
    steps: list[Step]

    @property
    def stages(self) -> np.ndarray:
        """Int64 [decisions + 1, rows, slots]: stages before the first decision and after each, before the harvest."""
        *steps, last = self.steps
        after = [step.slots["stage"] for step in steps]
        return np.stack([self.steps[0].structure.stage, *after, last.acted.stage])

    def slot_histories(self):
        """Give the runs [(stage, decisions), ...] of each slot."""
        stages = self.stages
        for row in range(stages.shape[1]):
            for slot in range(stages.shape[2]):
                yield [(Stage(stage), len(list(run))) for stage, run in groupby(stages[:, row, slot].tolist())]


def record(config: RunConfig, task: Task, rows, *, controller=None, **more) -> Recording:
    """Run an episode; `controller` replaces the configured one by an object."""
    rows = torch.arange(rows) if isinstance(rows, int) else torch.tensor(rows)
    episode = Episode(config, task, config.controller, rows, **more)
    if controller is not None:
        episode.controller = controller
    steps = []
    while not episode.done:
        episode.advance()
        steps.append(episode.step())
    return Recording(episode, steps)


@cache
def random_walk(task: str) -> Recording:
    """Record a population under the random controller: many rows, cheap decisions.

    Chance has little patience: each gate asks for its gain, but for no more than one decision.
    """
    config = run_config(task, "random", horizon=40, updates=1, batch=8, growth=QUICK)
    return record(config, task_of(task, examples=48), 128)


def grew_up(history) -> bool:
    """Tell whether a slot went from DORMANT to FOSSILIZED, stage by stage."""
    stages = [stage for stage, _ in history]
    return any(tuple(stages[at : at + len(GROWTH_ORDER)]) == GROWTH_ORDER for at in range(len(stages)))


def came_back(history) -> bool:
    """Tell whether a slot lost a seed and was DORMANT again after the whole wait."""
    whole = [(stage, WAITS[stage]) for stage in WAITING_STAGES]
    size = len(whole)
    return any(
        history[at : at + size] == whole and history[at + size][0] is Stage.DORMANT for at in range(len(history) - size)
    )


class Script:
    """A controller whose rows all do what a table says, and wait where it has nothing."""

    flag = scores = None

    def __init__(self, actions: dict[int, Action], rows: int = 1) -> None:
        self.actions, self.rows = actions, rows

    def observe(self, view) -> None:
        """Take the time."""
        self.decision = view.decision

    def act(self) -> torch.Tensor:
        """Give the action of this decision."""
        return torch.tensor([self.actions.get(self.decision, WAIT)] * self.rows)
