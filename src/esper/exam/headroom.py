"""How much there is to gain, and how much of it needs deciding: fixed schedules in every context.

A schedule is chosen on some starts and scored on the others, each start once, so that a table of many schedules does
not flatter itself by picking what was lucky.

Shapes: W widths, K starts, C conditions, N plans.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from esper.exam.grid import CHOICE_STARTS, conditions, grid, play
from esper.exam.schedules import Plan, family, slots_of
from esper.leyline.config import HeadroomConfig
from esper.simic.episode import Episode
from esper.simic.recorder import RoundRecorder
from esper.tamiyo.controllers.schedule import ScheduleController
from esper.tolaria.tasks import Task

FOLDS = 2
"""Parts of the starts: what is chosen on all but one is scored on that one."""


@dataclass(frozen=True)
class Headroom:
    """What every plan did in every context.

    Attributes
    ----------
    plans
        The first grows nothing.
    slot_ids
        Names of the slots.
    widths, conditions
        Of the contexts; a condition is a learning rate and a share of wrong labels.
    gain_WKCN, cost_WKCN
        By how much the loss on the selection split fell below that of growing nothing (nats), and
        ln(1 + added / host parameters).
    """

    plans: tuple[Plan, ...]
    slot_ids: tuple[str, ...]
    widths: tuple[float, ...]
    conditions: tuple[tuple[float, float], ...]
    gain_WKCN: np.ndarray
    cost_WKCN: np.ndarray

    def net(self, price: float) -> np.ndarray:
        """Gain less rent [W, K, C, N] (nats)."""
        net_WKCN: np.ndarray = self.gain_WKCN - price * self.cost_WKCN
        return net_WKCN


@dataclass(frozen=True)
class PriceLine:
    """What choosing is worth at one price; means over all contexts, in nats, and standard errors over starts.

    Attributes
    ----------
    best, best_net
        The single best plan by all starts, and what it gains there.
    single, by_width, by_context
        Net gain of the best plan for all contexts, of the best for each width, and of the best for each context, each
        chosen on other starts than it is scored on.
    choosing, choosing_se
        What knowing the context adds to the single best plan.
    different
        Contexts in which another plan than the single best one is best, of all contexts.
    """

    price: float
    best: Plan
    best_net: float
    single: float
    by_width: float
    by_context: float
    choosing: float
    choosing_se: float
    different: tuple[int, int]


def measure(
    config: HeadroomConfig,
    tasks: list[Task],
    *,
    recorder: Callable[[Episode], RoundRecorder | None] | None = None,
    told: Callable[[float], None] | None = None,
) -> Headroom:
    """Run every plan in every context: all plans and conditions of one start and width are one population.

    Parameters
    ----------
    tasks
        The task with a host of each width.
    recorder
        Makes what records each population; None: nothing does.
    told
        Told after every decision which share of all is done.
    """
    first, horizon = tasks[0].host.slot_config, config.training.horizon
    plans = family(*slots_of(first), horizon, config.allowed_blueprints())
    cells = conditions(config.contexts)
    blueprint_NS = torch.tensor([[int(b) for b in plan.blueprints] for plan in plans], device=config.device)
    start_NS = torch.tensor([plan.start for plan in plans], device=config.device)[:, None].expand_as(blueprint_NS)
    repeated = [table.repeat(len(cells), 1) for table in (blueprint_NS, start_NS)]
    runs = list(product(tasks, range(config.starts)))
    ended = []
    for number, (task, start) in enumerate(runs):
        start_K = torch.tensor([CHOICE_STARTS + start], device=config.device)

        def each(decision: int, done: int = number) -> None:
            if told is not None:
                told((done + decision / horizon) / len(runs))

        ended.append(
            play(
                config,
                task,
                grid(config.contexts, start_K, (0.0,), len(plans)),
                lambda _: ScheduleController(*repeated),
                lambda data: data.selection,
                recorder=recorder,
                told=each,
            )
        )
    shape = (len(tasks), config.starts, len(cells), len(plans))
    loss_WKCN, cost_WKCN = (np.stack([getattr(one, name) for one in ended]).reshape(shape) for name in ("loss", "cost"))
    widths = config.contexts.host_widths
    return Headroom(plans, first.slot_ids, widths, tuple(cells), loss_WKCN[..., :1] - loss_WKCN, cost_WKCN)


def price_lines(headroom: Headroom, prices: tuple[float, ...]) -> Iterator[PriceLine]:
    """What choosing is worth at each price."""
    for price in prices:
        net_WKCN = headroom.net(price)
        widths, starts, cells, _ = net_WKCN.shape
        fold_K = np.arange(starts) % FOLDS
        scored = {name: np.empty((widths, starts, cells)) for name in ("single", "by_width", "by_context")}
        for fold in range(FOLDS):
            mean_WCN, held_WKCN = net_WKCN[:, fold_K != fold].mean(1), net_WKCN[:, fold_K == fold]
            chosen = {
                "single": np.broadcast_to(mean_WCN.mean((0, 1)).argmax(), (widths, cells)),
                "by_width": np.broadcast_to(mean_WCN.mean(1).argmax(1)[:, None], (widths, cells)),
                "by_context": mean_WCN.argmax(2),
            }
            for name, plan_WC in chosen.items():
                scored[name][:, fold_K == fold] = np.take_along_axis(held_WKCN, plan_WC[:, None, :, None], 3)[..., 0]
        by_start_K = (scored["by_context"] - scored["single"]).mean((0, 2))
        mean_N = net_WKCN.mean((0, 1, 2))
        best_WC, best = net_WKCN.mean(1).argmax(2), int(mean_N.argmax())
        yield PriceLine(
            price=price,
            best=headroom.plans[best],
            best_net=float(mean_N[best]),
            **{name: float(values.mean()) for name, values in scored.items()},
            choosing=float(by_start_K.mean()),
            choosing_se=float(by_start_K.std(ddof=1) / starts**0.5),
            different=(int((best_WC != best).sum()), best_WC.size),
        )
