"""The learner beside its policy: everything that the next update needs and the weights do not tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from esper.leyline.errors import EsperError
from esper.leyline.files import write_atomic
from esper.simic.ppo import PPOAgent

LEARNER = "learner.safetensors"
FORMAT = 1
"""Grows when a file of the former kind could no longer be read."""


def save_learner(agent: PPOAgent, folder: Path, rounds: int) -> None:
    """Write the optimizer's moments and the counters of a learner, after so many rounds, in one whole file."""
    state, counters = agent.state()
    facts = {"format": FORMAT, "rounds": rounds, **counters}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    write_atomic(folder / LEARNER, save(tensors, {"learner": json.dumps(facts)}))


def load_learner(agent: PPOAgent, folder: Path) -> int:
    """Put a learner where it was, its policy having been loaded already; give the rounds that it has made.

    Raises
    ------
    EsperError
        The file is missing, damaged, of another format, or of another policy.
    """
    path = folder / LEARNER
    try:
        with safe_open(path, framework="pt") as file:
            facts: dict[str, Any] = json.loads((file.metadata() or {})["learner"])
            state: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise EsperError(f"checkpoint: cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, KeyError, ValueError) as error:
        raise EsperError(f"checkpoint: {path} is damaged; use an earlier one") from error
    if facts.pop("format", None) != FORMAT:
        raise EsperError(f"checkpoint: {path} is of another format; this version of Esper reads {FORMAT}")
    rounds = int(facts.pop("rounds"))
    try:
        agent.restore(state, facts)
    except (KeyError, ValueError) as error:
        raise EsperError(f"checkpoint: {path} belongs to another policy") from error
    return rounds
