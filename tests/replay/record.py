"""Runs whose decisions are committed, so that a change of what Esper does shows, wanted or not.

`runs.json` holds a few short episodes: how each is configured, and for every decision of every row what was asked for,
what came of it and where the slots stood afterwards; and one hash over all of that. `test_replay.py` plays them again.

    make replay    record them anew: only after a change that is meant to decide otherwise; look at the difference

Nothing else writes the file. Only what is discrete is in it, because losses differ from processor to processor in their
last digits. So that decisions do not, `make replay` also plays each episode in double precision, and several times
with every weight of hosts and policy moved by up to a hundred-thousandth, some hundred times what a processor rounds:
where any of that decides otherwise in a single place, nothing is written, and the episode needs another seed.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from esper.leyline.actions import HEADS_OF_OP, Head, Op
from esper.leyline.checks import Check
from esper.leyline.config import PolicyConfig, RunConfig
from esper.leyline.panics import Panic
from esper.leyline.stages import Stage
from esper.simic.episode import Episode
from esper.simic.step import Step
from esper.tamiyo.policy.network import FactoredRecurrentActorCritic
from esper.tamiyo.policy.saved import save_policy
from esper.tolaria.datasets import Split
from esper.tolaria.tasks import Task, load_task

FILE = Path(__file__).with_name("runs.json")
ROWS, EXAMPLES = 3, 150
"""Rows of an episode; examples that its losses are measured on."""
NEW_POLICY = "new policy"
"""Controller that is a policy as a training begins with it, which draws."""
SETTINGS = {
    "training": {"horizon": 25, "updates_per_decision": 4, "batch_size": 16},
    "growth": {"embargo": 2, "gates": {"min_training_decisions": 2, "min_probation_decisions": 2}},
    "optimizer": {"learning_rate": 0.01},
}
EPISODES = (
    ("mnist1d-mlp", "random", 3),
    ("digits", "random", 3),
    ("mnist1d-mlp", "heuristic", 2),
    ("digits", "heuristic", 22),
    ("digits", "periodic", 14),
    ("mnist1d-mlp", NEW_POLICY, 3),
    ("digits", NEW_POLICY, 2),
)
"""Task, controller and seed of each."""
MOVED, MOVES = 1e-5, 10
"""By how much weights are moved to see whether a decision hangs by a rounding, and how often that is tried."""


def play(config: RunConfig, *, dtype: torch.dtype = torch.float32, move: int | None = None) -> list[str]:
    """Play an episode; give a line for each row and decision.

    Parameters
    ----------
    dtype
        Of the parameters of hosts and seeds.
    move
        Seed of what weights are moved by before the first decision; None: they are not.
    """
    task = _task(config.task, config.host, dtype)
    with tempfile.TemporaryDirectory() as folder:
        controller = config.controller
        if controller == NEW_POLICY:
            policy = FactoredRecurrentActorCritic(PolicyConfig(width=16, hidden=16))
            policy.initialise(torch.Generator().manual_seed(config.seed))
            _move(policy.parameters(), move)
            save_policy(policy, Path(folder))
            controller = f"policy:{folder}"
        episode = Episode(config, task, controller, torch.arange(ROWS), dtype=dtype)
    _move([episode.population.hosts.theta], move)
    lines: list[str] = []
    while not episode.done:
        episode.advance()
        lines += _told(episode.step())
    return lines


@cache
def _task(name: str, host: Literal["impaired", "ample"], dtype: torch.dtype) -> Task:
    """Load a task, with a few examples to measure on."""
    task = load_task(name, host, dtype=dtype)
    split = task.data.reward_validation
    few = Split(split.x[:EXAMPLES], split.y[:EXAMPLES])
    return replace(task, data=replace(task.data, reward_validation=few))


@torch.no_grad()
def _move(weights: Iterable[Tensor], seed: int | None) -> None:
    if seed is None:
        return
    generator = torch.Generator().manual_seed(seed)
    for weight in weights:
        weight *= 1 + MOVED * (2 * torch.rand(weight.shape, generator=generator, dtype=weight.dtype) - 1)


def _told(step: Step) -> Iterator[str]:
    """What a row asked for, whether it got it, and where its slots are."""
    for row, action in enumerate(step.action_RH.tolist()):
        op, refused = Op(action[Head.OP]), Check(step.refused_by_R[row])
        choices = {head.name.lower(): action[head] for head in sorted(HEADS_OF_OP[op] - {Head.OP})}
        asked = " ".join([op.name, *(f"{name} {choice}" for name, choice in choices.items())])
        came = "" if step.accepted_R[row] else f" refused by {refused.name}"
        panic = Panic(step.panic_R[row])
        failed = "" if panic is Panic.NONE else f" rolled back: {panic.name}"
        stages = " ".join(Stage(stage).name for stage in step.slots["stage"][row])
        yield f"decision {step.decision} row {row}: {asked}{came} -> {stages}{failed}"


def digest(episodes: list[list[str]]) -> str:
    """One hash over the lines of all episodes."""
    return hashlib.blake2b(json.dumps(episodes).encode(), digest_size=16).hexdigest()


def difference(recorded: list[str], played: list[str]) -> str | None:
    """The first line that is not as it was, None if all are."""
    for line, now in zip(recorded, played, strict=False):
        if line != now:
            return f"recorded: {line}\n  played: {now}"
    return None if len(recorded) == len(played) else f"{len(recorded)} lines recorded, {len(played)} played"


def doubtful(config: RunConfig, lines: list[str]) -> str | None:
    """Where a rounding would decide otherwise, None if nowhere."""
    ways = [{"dtype": torch.float64}, *({"move": seed} for seed in range(MOVES))]
    return next((found for how in ways if (found := difference(lines, play(config, **how)))), None)


def main() -> int:
    """Record every episode; give 2, and write nothing, if one hangs by a rounding."""
    torch.set_num_threads(1)
    recorded: list[tuple[RunConfig, list[str]]] = []
    for task, controller, seed in EPISODES:
        config = RunConfig.model_validate({"task": task, "controller": controller, "seed": seed, **SETTINGS})
        recorded.append((config, play(config)))
        if found := doubtful(*recorded[-1]):
            print(f"{task}, {controller}, seed {seed} hangs by a rounding; take another seed\n{found}")
            return 2
        print(f"{task}, {controller}, seed {seed}: {len(recorded[-1][1])} decisions")
    FILE.write_text(_page(recorded))
    return 0


def _page(recorded: list[tuple[RunConfig, list[str]]]) -> str:
    """JSON with a line for each configuration and each decision, so that a difference can be read."""
    episodes = []
    for config, lines in recorded:
        told = ",\n  ".join(json.dumps(line) for line in lines)
        episodes.append(f'{{"config": {config.model_dump_json()},\n "lines": [\n  {told}]}}')
    whole = digest([lines for _, lines in recorded])
    return f'{{"hash": "{whole}",\n"episodes": [\n' + ",\n".join(episodes) + "]}\n"


if __name__ == "__main__":
    sys.exit(main())
