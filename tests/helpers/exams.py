"""Small exams: few plans, few contexts, short episodes."""

from __future__ import annotations

from functools import cache

from esper.exam.headroom import Headroom, measure
from esper.leyline.config import HeadroomConfig
from helpers.episodes import OPEN_GATES, task_of

WIDTHS, PRICES, RATES, NOISE = (1.0, 0.5), (0.0, 0.3), (0.01, 0.03), (0.0, 0.4)
WORLD = {
    "task": "mnist1d-mlp",
    "blueprints": ("norm", "mlp_small"),
    "growth": OPEN_GATES.model_dump(),
    "training": {"horizon": 12, "updates_per_decision": 2, "batch_size": 8},
    "contexts": {"prices": PRICES, "learning_rates": RATES, "label_noise": NOISE, "host_widths": WIDTHS},
}
"""What policies and schedules share."""
STARTS = 2


def headroom_config(**more) -> HeadroomConfig:
    return HeadroomConfig.model_validate({**WORLD, "starts": STARTS, **more})


def exam_tasks():
    return [task_of("mnist1d-mlp", examples=40, width=width) for width in WIDTHS]


@cache
def small_headroom() -> Headroom:
    return measure(headroom_config(), exam_tasks())
