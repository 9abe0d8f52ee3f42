"""Whole histories as fingerprints: every bit of every decision and of the state at the end, by name.

`main` plays them with one thread and twice with two, and prints what it found (`Elsewhere`). Two threads deserve a
process of their own, whose workers sleep while they wait: where another process wants the second core, they otherwise
wait actively, 20 times as long as they compute.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path

import numpy as np
import torch

from esper.leyline.config import GateConfig, GrowthConfig, TrainConfig
from esper.nissa.store import RunStore
from esper.simic.contexts import Contexts
from esper.simic.recorder import run_columns
from esper.simic.train import PolicyTraining
from helpers.episodes import Recording, record, run_config, task_of
from helpers.recorded import save_new_policy

Fingerprints = dict[str, str]

HASTY = GrowthConfig(
    gates=GateConfig(min_training_decisions=1, min_probation_decisions=1, contribution_errors=-10.0), embargo=1
)
"""Seeds get through all stages within a few decisions."""
ROWS, HORIZON = 24, 13
DOOMED = (2, 9, 13, 20)
"""Rows whose learning rate makes them fail, so that the governor rolls them back."""
FEW = ("norm", "attention", "conv_light", "mlp_small")
"""Blueprints: the more seeds share a bank, the more there is to split between threads."""
NOT_STATE = ("layer", "scratch")
"""What a bank computes, and where its optimizer puts what it is about to use: memory that nobody cleared at first."""
WHO = {"vector": ("mnist1d-mlp", "random"), "signal": ("mnist1d", "random"), "image": ("digits", "random")}
WHO["policy"] = ("digits-mlp", "policy")
"""Task and controller of each history."""


def play(name: str, folder: Path) -> Recording:
    """Play the history of this name; `folder` is for what it has to write."""
    task, controller = WHO[name]
    if controller == "policy":
        controller = f"policy:{save_new_policy(folder / 'policy')}"
    config = run_config(task, controller, horizon=HORIZON, updates=1, batch=16, growth=HASTY, blueprints=FEW)
    contexts = Contexts.alone(config, torch.arange(ROWS))
    rate_R = contexts.rate_R.index_fill(0, torch.tensor(DOOMED), 5e3)
    return record(config, task_of(task, examples=40), ROWS, contexts=replace(contexts, rate_R=rate_R))


def history(recording: Recording) -> Fingerprints:
    """Every field of every decision, then every tensor of every bank and what the governor knows."""
    found = {}
    for step in recording.steps:
        found |= fingerprints(f"decision {step.decision}", step)
    population = recording.episode.population
    keyed = {
        "hosts": population.hosts,
        **population.seeds,
        **{("gate", s): b for s, b in population.seed_gates.items()},
    }
    for key, bank in keyed.items():
        found |= fingerprints(f"bank {key}", {n: value for n, value in vars(bank).items() if n not in NOT_STATE})
    return found | fingerprints("governor", recording.episode.governor._loss_RW)


def training(folder: Path, level: str) -> Fingerprints:
    """Train a policy for two rounds, recorded at a level: what was told, and everything that was learned."""
    config = TrainConfig.model_validate(
        {
            "task": "mnist1d-mlp",
            "rounds": 2,
            "rows": ROWS,
            "group_size": 4,
            "select_every": 2,
            "selection_starts": 1,
            "growth": HASTY,
            "training": {"horizon": 6, "updates_per_decision": 1, "batch_size": 16},
            "recording": {"record": level},
        }
    )
    folder.mkdir()
    store = None if level == "off" else RunStore(folder / "run.sqlite", run_columns(config, "train", 1))
    trained = PolicyTraining(config, [task_of(config.task, examples=40)], folder, store)
    lines = [replace(line, seconds=0.0) for line in trained.run(lambda: False)]
    if store is not None:
        store.close("finished")
    moments = [trained.agent.optimizer.state[parameter] for parameter in trained.policy.parameters()]
    found = fingerprints("rounds", dict(enumerate(lines))) | fingerprints("policy", trained.policy.state_dict())
    return found | fingerprints("moments", dict(enumerate(moments)))


def fingerprints(name: str, thing: object) -> Fingerprints:
    """A digest of the bits of each value in records, mappings, lists and arrays, whatever they are called."""
    return {path: _digest(value) for path, value in _leaves(name, thing)}


def difference(one: Fingerprints, other: Fingerprints) -> str | None:
    """Name the first thing that differs, None if nothing does."""
    if list(one) != list(other):
        return f"not the same things: {sorted(set(one) ^ set(other))[:3]}"
    return next((name for name in one if one[name] != other[name]), None)


def _leaves(name: str, thing: object) -> Iterator[tuple[str, object]]:
    if is_dataclass(thing):
        thing = {field.name: getattr(thing, field.name) for field in fields(thing)}
    if isinstance(thing, list | tuple):
        thing = dict(enumerate(thing))
    if isinstance(thing, Mapping):
        for key, value in thing.items():
            yield from _leaves(f"{name}, {key}", value)
    else:
        yield name, thing


def _digest(value: object) -> str:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        content = f"{value.dtype} {value.shape} ".encode() + value.tobytes()
    else:
        content = repr(value).encode()
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def global_state() -> Fingerprints:
    """Where the random generators are that everybody shares."""
    legacy = np.random.get_state()  # noqa: NPY002
    return fingerprints("generators", [torch.get_rng_state(), *legacy, random.getstate()])


@dataclass(frozen=True)
class Elsewhere:
    """What another process found.

    Attributes
    ----------
    alone
        Histories with one thread.
    pairs
        The same with two threads, each twice.
    trainings
        With two threads, by level of the record.
    workers
        Threads that torch added.
    disturbed
        Which global generator was used or changed by all of this, None if none was.
    """

    alone: dict[str, Fingerprints]
    pairs: dict[str, list[Fingerprints]]
    trainings: dict[str, Fingerprints]
    workers: int
    disturbed: str | None


def main(folder: Path) -> None:
    """Play everything and print it."""
    state = global_state()
    torch.set_num_threads(1)
    alone = {name: history(play(name, folder)) for name in WHO}
    before = len(os.listdir("/proc/self/task"))
    torch.set_num_threads(2)
    pairs = {name: [history(play(name, folder)) for _ in range(2)] for name in WHO}
    workers = len(os.listdir("/proc/self/task")) - before
    trainings = {level: training(folder / level, level) for level in ("off", "lean", "full")}
    print(json.dumps(asdict(Elsewhere(alone, pairs, trainings, workers, difference(state, global_state())))))
