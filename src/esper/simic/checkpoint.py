"""An episode, and a learner beside its policy, as the files and facts of a checkpoint, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from esper.leyline.state import Tensors
from esper.simic.episode import Episode, EpisodeFacts
from esper.simic.ppo import PPOAgent

EPISODE = "episode.safetensors"
MOMENTS, COUNTERS = "learner.safetensors", "learner.json"


def episode_parts(episode: Episode) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Give the facts and the files of an episode of which a decision was made."""
    facts, tensors = episode.state()
    return facts.model_dump(mode="json"), {EPISODE: _packed(tensors)}


def restore_episode(episode: Episode, facts: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Put a new episode of the same configuration where another one was.

    Raises
    ------
    ValueError
        Facts or files are missing, damaged or of something else.
    """
    try:
        episode.restore(EpisodeFacts.model_validate(facts), _unpacked(files, EPISODE))
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is missing or unknown") from error


def learner_files(agent: PPOAgent) -> dict[str, bytes]:
    """Give the optimizer's moments and the counters of a learner as files."""
    moments, counters = agent.state()
    return {MOMENTS: _packed(moments), COUNTERS: json.dumps(counters).encode()}


def restore_learner(agent: PPOAgent, files: Mapping[str, bytes]) -> None:
    """Put a learner where it was, its policy having been loaded already.

    Raises
    ------
    ValueError
        The files are missing, damaged or of another policy; the learner is as it was.
    """
    try:
        counters: dict[str, Any] = json.loads(files[COUNTERS])
        agent.restore(_unpacked(files, MOMENTS), counters)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the learner does not belong to this policy, or is damaged ({error})") from error


def _packed(tensors: Mapping[str, Tensor]) -> bytes:
    # Some of them share memory or are views, which the format does not know.
    alone = {
        name: torch.clone(tensor.detach().cpu(), memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    return save(alone)


def _unpacked(files: Mapping[str, bytes], name: str) -> Tensors:
    try:
        return load(files[name])
    except SafetensorError as error:
        raise ValueError(f"{name} is damaged ({error})") from error
