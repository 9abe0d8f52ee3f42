"""Saved policies: `policy.safetensors` holds the weights, `policy.json` what they are weights of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from esper.leyline.actions import Head, head_sizes
from esper.leyline.config import PolicyConfig
from esper.leyline.errors import EsperError
from esper.leyline.files import digest, write_atomic
from esper.tamiyo.policy.features import RUN_FEATURES, SLOT_FEATURES
from esper.tamiyo.policy.network import FactoredRecurrentActorCritic

WEIGHTS, DESCRIPTION = "policy.safetensors", "policy.json"
FORMAT = 3
"""Grows when a file of the former kind could no longer be read."""


def policy_files(policy: FactoredRecurrentActorCritic) -> dict[str, bytes]:
    """Give the files of a saved policy; the description last, so that whoever writes them in order has its weights."""
    weights = save({name: tensor.cpu().contiguous() for name, tensor in policy.state_dict().items()})
    description = {**_contract(), "config": policy.config.model_dump(), "weights": digest(weights)}
    sealed = {**description, "seal": _seal(description)}
    return {WEIGHTS: weights, DESCRIPTION: (json.dumps(sealed, indent=1) + "\n").encode()}


def save_policy(policy: FactoredRecurrentActorCritic, folder: Path) -> None:
    """Write a policy into a folder, each file whole.

    Raises
    ------
    EsperError
        A file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EsperError(f"policy: cannot use {folder}: {error.strerror}; name a folder you may write") from error
    for name, data in policy_files(policy).items():
        write_atomic(folder / name, data)


def load_policy(folder: Path, device: torch.device | str = "cpu") -> FactoredRecurrentActorCritic:
    """Read a policy; it acts on hosts with any number of slots.

    Raises
    ------
    EsperError
        A file is missing, damaged, or of a policy that sees or does something else than this version.
    """
    try:
        files = {name: (folder / name).read_bytes() for name in (DESCRIPTION, WEIGHTS)}
    except (OSError, ValueError) as error:
        # Names that no file can have are values that are not allowed.
        reason = getattr(error, "strerror", None) or error
        raise EsperError(f"policy: cannot read {folder}: {reason}; name the folder of a saved policy") from error
    return read_policy(files, folder).to(device)


def read_policy(files: Mapping[str, bytes], folder: Path) -> FactoredRecurrentActorCritic:
    """Make a policy of its files; `folder` is where they came from.

    Raises
    ------
    EsperError
        As `load_policy`.
    """
    damaged = f"policy: {folder / DESCRIPTION} is damaged; restore it or save the policy again"
    try:
        description = json.loads(files[DESCRIPTION])
    except (ValueError, RecursionError) as error:
        raise EsperError(damaged) from error
    for name, value in _contract().items():
        found = description.get(name) if isinstance(description, dict) else None
        if found != value:
            raise EsperError(f"policy: {folder}: its {name} is not that of this version ({_difference(found, value)})")
    if description.get("seal") != _seal(description):
        raise EsperError(damaged)
    weights = files[WEIGHTS]
    if description.get("weights") != digest(weights):
        raise EsperError(f"policy: {folder / WEIGHTS} is damaged or of another policy; save the policy again")
    try:
        policy = FactoredRecurrentActorCritic(PolicyConfig.model_validate(description.get("config")))
        tensors, own = load(weights), policy.state_dict()
        if any(tensor.dtype != own[name].dtype for name, tensor in tensors.items()):
            raise RuntimeError("numbers of another kind")
        policy.load_state_dict(tensors)
    except (ValidationError, SafetensorError, RuntimeError, KeyError) as error:
        raise EsperError(
            f"policy: {folder}: its weights do not fit its configuration; save the policy again"
        ) from error
    if not all(parameter.isfinite().all() for parameter in policy.parameters()):
        raise EsperError(f"policy: {folder}: its weights are not all finite: it had diverged; choose another one")
    return policy


def _contract() -> dict[str, Any]:
    """What a policy must share with this version: every column that it reads and every choice that it makes."""
    return {
        "format": FORMAT,
        "slot features": [f.name for f in SLOT_FEATURES],
        "run features": [f.name for f in RUN_FEATURES],
        "heads": {head.name: size for head, size in head_sizes(1).items() if head is not Head.SLOT},
    }


def _seal(description: Mapping[str, Any]) -> str:
    """Checksum of what a description says, however it is written down."""
    said = {name: value for name, value in description.items() if name != "seal"}
    return digest(json.dumps(said, sort_keys=True).encode())


def _difference(found: object, needed: object) -> str:
    """Say what differs in a few words."""
    if isinstance(found, list) and isinstance(needed, list):
        missing = [repr(n) for n in needed if n not in found] or [repr(f) for f in found if f not in needed]
        return f"differing in {', '.join(missing[:3]) or 'their order'}"
    return f"{found!r} instead of {needed!r}"
