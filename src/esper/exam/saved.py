"""Results of an exam as files: JSON, checked when it is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import field_validator

from esper.exam.compare import Score
from esper.exam.headroom import Headroom
from esper.exam.plans import Plan, Seed
from esper.exam.search import Found
from esper.exam.statistics import Difference
from esper.leyline.actions import ALPHA_TARGETS, TEMPOS, Blueprint, Style
from esper.leyline.config import Frozen
from esper.leyline.errors import EsperError
from esper.leyline.files import write_atomic
from esper.leyline.sealed import Sealed
from esper.simic.run_folder import COMPARISON, HEADROOM, PLANS

_FORMAT: Literal[3] = 3
"""Grows when a file of the former kind could no longer be read."""
_USELESS = "is damaged, or of an earlier version; run `esper exam headroom` again"


class _Seed(Frozen):
    slot: int
    blueprint: str
    style: str
    tempo: int
    alpha_target: float
    begin: int
    cull: int | None

    @classmethod
    def of(cls, seed: Seed) -> _Seed:
        names = {"blueprint": seed.blueprint.name.lower(), "style": seed.style.name.lower()}
        return cls.model_validate(asdict(seed) | names)

    @field_validator("tempo", "alpha_target")
    @classmethod
    def _is_choice(cls, value: float) -> float:
        if value not in (*TEMPOS, *ALPHA_TARGETS):
            raise ValueError("no action chooses that")
        return value

    def seed(self) -> Seed:
        names = {"blueprint": Blueprint[self.blueprint.upper()], "style": Style[self.style.upper()]}
        return Seed(**(self.model_dump() | names))


class _Plans(Sealed):
    format: Literal[3] = _FORMAT
    plans: tuple[tuple[_Seed, ...], ...]

    @classmethod
    def _of(cls, plans: Sequence[Plan]) -> tuple[tuple[_Seed, ...], ...]:
        return tuple(tuple(map(_Seed.of, plan.seeds)) for plan in plans)

    def found(self) -> tuple[Plan, ...]:
        return tuple(Plan(tuple(seed.seed() for seed in seeds)) for seeds in self.plans)


class _Headroom(_Plans):
    slot_ids: tuple[str, ...]
    hosts: tuple[str, ...]
    conditions: tuple[tuple[float, float], ...]
    prices: tuple[float, ...]
    episodes: int
    searched_starts: list[int]
    searched_gain_nats: list[list[list[float]]]
    searched_cost: list[list[list[float]]]
    finalists: list[int]
    chosen: list[list[list[list[int]]]]
    gain_nats: list[list[list[list[list[float]]]]]
    cost: list[list[list[list[list[float]]]]]


def save_plans(folder: Path, plans: Sequence[Plan]) -> None:
    """Write the plans that a search is to try."""
    write_atomic(folder / PLANS, _Plans(plans=_Plans._of(plans)).sealed().model_dump_json().encode())


def load_plans(folder: Path) -> tuple[Plan, ...]:
    """Read them again.

    Raises
    ------
    EsperError
        The file is missing or damaged.
    """
    return _read(folder / PLANS, _Plans).found()


def save_headroom(folder: Path, headroom: Headroom) -> None:
    """Write what a search found."""
    found = headroom.found
    table = _Headroom(
        plans=_Plans._of(headroom.plans),
        slot_ids=headroom.slot_ids,
        hosts=headroom.hosts,
        conditions=headroom.conditions,
        prices=headroom.prices,
        episodes=headroom.episodes,
        searched_starts=found.starts_N.tolist(),
        searched_gain_nats=found.gain_WCN.tolist(),
        searched_cost=found.cost_WCN.tolist(),
        finalists=found.finalists.tolist(),
        chosen=headroom.chosen_VWCP.tolist(),
        gain_nats=headroom.gain_VWKCP.tolist(),
        cost=headroom.cost_VWKCP.tolist(),
    )
    write_atomic(folder / HEADROOM, table.sealed().model_dump_json().encode())


def load_headroom(folder: Path) -> Headroom:
    """Read it again.

    Raises
    ------
    EsperError
        It is missing or damaged.
    """
    table = _read(folder / HEADROOM, _Headroom)
    return Headroom(
        plans=table.found(),
        slot_ids=table.slot_ids,
        hosts=table.hosts,
        conditions=table.conditions,
        prices=table.prices,
        episodes=table.episodes,
        found=Found(
            starts_N=np.array(table.searched_starts),
            gain_WCN=np.array(table.searched_gain_nats),
            cost_WCN=np.array(table.searched_cost),
            finalists=np.array(table.finalists),
        ),
        chosen_VWCP=np.array(table.chosen),
        gain_VWKCP=np.array(table.gain_nats),
        cost_VWKCP=np.array(table.cost),
    )


_Kind = TypeVar("_Kind", bound=Sealed)


def _read(path: Path, kind: type[_Kind]) -> _Kind:
    try:
        table = kind.model_validate_json(path.read_bytes())
    except OSError as error:
        reason = error.strerror or error
        raise EsperError(f"headroom: cannot read {path}: {reason}; name a folder of `esper exam headroom`") from error
    except ValueError as error:
        raise EsperError(f"headroom: {path} {_USELESS}") from error
    if not table.whole:
        raise EsperError(f"headroom: {path} {_USELESS}")
    return table


def save_comparison(folder: Path, scores: dict[str, Score], differences: dict[str, dict[str, Difference]]) -> None:
    """Write what every arm reached, start by start, and the intervals of the differences."""
    arms: dict[str, Any] = {
        name: {
            "net_nats": score.by_start().tolist(),
            "gain_nats": score.by_start(score.gain).tolist(),
            "accuracy": score.by_start(score.accuracy).tolist(),
            "added_parameters": score.by_start(score.added).tolist(),
            "net_nats_by_price": score.net.mean((0, 1, 2)).tolist(),
        }
        for name, score in scores.items()
    }
    told = {arm: {other: asdict(difference) for other, difference in of.items()} for arm, of in differences.items()}
    write_atomic(folder / COMPARISON, json.dumps({"arms": arms, "differences": told}, indent=1).encode())
