"""Results of an exam as files: JSON, checked when it is read."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from esper.exam.compare import Score
from esper.exam.headroom import Headroom
from esper.exam.schedules import Plan
from esper.exam.statistics import Difference
from esper.leyline.actions import Blueprint
from esper.leyline.config import Frozen
from esper.leyline.errors import EsperError
from esper.leyline.files import write_atomic
from esper.leyline.sealed import Sealed
from esper.simic.run_folder import COMPARISON, HEADROOM


class _Plan(Frozen):
    blueprints: tuple[str, ...]
    start: int


class _Headroom(Sealed):
    plans: tuple[_Plan, ...]
    slot_ids: tuple[str, ...]
    widths: tuple[float, ...]
    conditions: tuple[tuple[float, float], ...]
    gain_nats: list[list[list[list[float]]]]
    cost: list[list[list[list[float]]]]


def save_headroom(folder: Path, headroom: Headroom) -> None:
    """Write the table of all plans in all contexts."""
    plans = tuple(_Plan(blueprints=tuple(b.name.lower() for b in p.blueprints), start=p.start) for p in headroom.plans)
    table = _Headroom(
        plans=plans,
        slot_ids=headroom.slot_ids,
        widths=headroom.widths,
        conditions=headroom.conditions,
        gain_nats=headroom.gain_WKCN.tolist(),
        cost=headroom.cost_WKCN.tolist(),
    )
    write_atomic(folder / HEADROOM, table.sealed().model_dump_json().encode())


def load_headroom(folder: Path) -> Headroom:
    """Read it again.

    Raises
    ------
    EsperError
        It is missing or damaged.
    """
    path = folder / HEADROOM
    try:
        table = _Headroom.model_validate_json(path.read_bytes())
        plans = tuple(Plan(tuple(Blueprint[name.upper()] for name in p.blueprints), p.start) for p in table.plans)
        gain, cost = np.array(table.gain_nats), np.array(table.cost)
        shape = (len(table.widths), *gain.shape[1:2], len(table.conditions), len(plans))
        if gain.shape != shape or cost.shape != shape or any(len(p.blueprints) != len(table.slot_ids) for p in plans):
            raise ValueError("its tables do not fit its plans")
        if not table.whole:
            raise ValueError("it does not have the checksum that it was written with")
    except OSError as error:
        reason = error.strerror or error
        raise EsperError(f"headroom: cannot read {path}: {reason}; name a folder of `esper exam headroom`") from error
    except (ValueError, KeyError) as error:
        raise EsperError(f"headroom: {path} is damaged; run `esper exam headroom` again") from error
    return Headroom(plans, table.slot_ids, table.widths, table.conditions, gain, cost)


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
