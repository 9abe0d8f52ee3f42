"""The learner beside its policy: everything that the next update needs and the weights do not tell."""

from __future__ import annotations

import json
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from esper.simic.ppo import PPOAgent

MOMENTS, COUNTERS = "learner.safetensors", "learner.json"


def learner_files(agent: PPOAgent) -> dict[str, bytes]:
    """Give the optimizer's moments and the counters of a learner as files."""
    moments, counters = agent.state()
    tensors = {name: tensor.cpu().contiguous() for name, tensor in moments.items()}
    return {MOMENTS: save(tensors), COUNTERS: json.dumps(counters).encode()}


def restore_learner(agent: PPOAgent, files: dict[str, bytes]) -> None:
    """Put a learner where it was, its policy having been loaded already.

    Raises
    ------
    ValueError
        The files are missing, damaged or of another policy; the learner is as it was.
    """
    try:
        counters: dict[str, Any] = json.loads(files[COUNTERS])
        agent.restore(load(files[MOMENTS]), counters)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the learner does not belong to this policy, or is damaged ({error})") from error
