"""Configurations of earlier runs: read, and compared setting by setting. Loads no torch."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

from esper.leyline.config import PopulationConfig
from esper.leyline.errors import EsperError
from esper.scripts.errors import validation_line

Config = TypeVar("Config", bound=PopulationConfig)


def read_config(path: Path, kind: type[Config]) -> Config:
    """Read the configuration of an earlier run.

    Raises
    ------
    EsperError
        The file is missing, damaged, or holds something else.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise EsperError(f"config: cannot read {path}: {reason}; name the config.json of a run") from error
    try:
        # Strict: a number in quotes, or a truth value where a number belongs, is a mistake of who wrote the file.
        config = kind.model_validate_json(text, strict=True)
        json.loads(text, object_pairs_hook=_once)
    except ValueError as error:
        raise EsperError(f"config: {path}: {validation_line(error)}") from error
    return config


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a setting that stands there twice: the reader of JSON would ignore the first."""
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name}: stands there twice; remove one")
    return dict(pairs)


def first_difference(
    one: PopulationConfig, other: PopulationConfig, of: Collection[str] | None = None
) -> tuple[str, Any, Any] | None:
    """Name of the first setting that differs, with its values; None where there is none.

    Parameters
    ----------
    of
        Fields to compare, groups of settings whole; None: all, and both must have the same.
    """
    fields = None if of is None else set(of)
    mine, theirs = (dict(_settings(config.model_dump(include=fields))) for config in (one, other))
    differing = (name for name in mine if mine[name] != theirs[name])
    name = next(differing, None)
    return None if name is None else (name, mine[name], theirs[name])


def _settings(values: dict[str, Any]) -> list[tuple[str, Any]]:
    """Settings by the name of their option: those of the inner groups have none of the group's."""
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        found += _settings(value) if isinstance(value, dict) else [(name, value)]
    return found
