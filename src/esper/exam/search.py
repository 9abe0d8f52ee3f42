"""Successive halving over plans: many plans on few starts, the best of them on more, for every target at once.

Karnin, Koren and Somekh 2013, "Almost optimal exploration in multi-armed bandits"; Jamieson and Talwalkar 2016. A plan
is kept if it is among the best for any target: overall, for a price, for a context, or for a context at a price.
Prices need no episodes of their own, because a plan does not look at them.

Shapes: K starts, W hosts, C conditions, P prices, N plans, T targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from esper.exam.cells import Episodes
from esper.leyline.errors import EsperError
from esper.leyline.starts import CHOICE

RUNGS, SHARE, FIRST_STARTS = 3, 3, 2
"""Rungs; each keeps one plan in so many and plays it on so many times the starts of the one before; starts of the
first. All rungs cost about the same."""


@dataclass(frozen=True)
class Rung:
    """One step of the search.

    Attributes
    ----------
    number
        From 0.
    plans
        How many are played, growing nothing among them.
    starts
        Numbers of the starts; no two rungs share one.
    """

    number: int
    plans: int
    starts: range


class Player(Protocol):
    """Plays episodes: see `Cells.play`."""

    def play(self, episodes: Episodes) -> tuple[np.ndarray, np.ndarray]:
        """Give loss and cost of every episode."""


@dataclass(frozen=True)
class Found:
    """What the search saw of every plan.

    Attributes
    ----------
    starts_N
        On how many starts it was played.
    gain_WCN, cost_WCN
        Means over its starts: by how much the loss fell below that of growing nothing (nats), and
        ln(1 + added / host parameters).
    finalists
        Numbers of the plans of the last rung, growing nothing first.
    """

    starts_N: np.ndarray
    gain_WCN: np.ndarray
    cost_WCN: np.ndarray
    finalists: np.ndarray

    def net(self, price: float) -> np.ndarray:
        """Gain less the price of its parameters, mean over starts [W, C, N] (nats)."""
        net_WCN: np.ndarray = self.gain_WCN - price * self.cost_WCN
        return net_WCN


def rungs(episodes: int, contexts: int, least: int) -> tuple[Rung, ...]:
    """Divide a budget.

    Parameters
    ----------
    episodes
        The budget.
    contexts
        Hosts times conditions: episodes of one plan from one start.
    least
        Plans that must be played.

    Raises
    ------
    EsperError
        The budget does not suffice for them.
    """
    plans = episodes // (contexts * FIRST_STARTS * RUNGS)
    while plans > 0 and _cost(plans, contexts) > episodes:
        plans -= 1
    if plans < least:
        raise EsperError(
            f"episodes: {episodes:,} are enough to search among {plans:,} plans; growing nothing, the plans that were "
            f"named and every single seed from the start are {least:,} and need {_cost(least, contexts):,}"
        )
    return _divided(plans)


def _divided(plans: int) -> tuple[Rung, ...]:
    made: list[Rung] = []
    for number in range(RUNGS):
        first = made[-1].starts.stop if made else CHOICE.start
        others = -(-(plans - 1) // SHARE**number)
        made.append(Rung(number, 1 + others, range(first, first + FIRST_STARTS * SHARE**number)))
    return tuple(made)


def _cost(plans: int, contexts: int) -> int:
    """Episodes of a search that begins with so many plans."""
    return contexts * sum(rung.plans * len(rung.starts) for rung in _divided(plans))


def search(
    player: Player,
    ladder: Sequence[Rung],
    shape: tuple[int, int],
    prices: Sequence[float],
    *,
    stage: Callable[[str, int], None] | None = None,
) -> Found:
    """Play all rungs.

    Parameters
    ----------
    player
        Plays plans by number, 0 being to grow nothing.
    ladder
        Of `rungs`.
    shape
        Number of hosts and of conditions.
    prices
        Prices of added parameters.
    stage
        Told what begins, and how many episodes it is.
    """
    plans = ladder[0].plans
    starts_N, gain_WCN, cost_WCN = np.zeros(plans, dtype=np.int64), np.zeros((*shape, plans)), np.zeros((*shape, plans))
    kept_N = np.arange(plans)
    for rung in ladder:
        if rung.number:
            kept_N = kept_N[survivors(gain_WCN[..., kept_N], cost_WCN[..., kept_N], prices, rung.plans)]
        if stage is not None:
            what = f"rung {rung.number + 1} of {len(ladder)}: {rung.plans} plans, {len(rung.starts)} starts"
            stage(what, shape[0] * shape[1] * rung.plans * len(rung.starts))
        # Means over all the starts that a plan has seen: the new ones weigh as much as their number.
        seen = int(starts_N[kept_N[0]])
        weight = len(rung.starts) / (seen + len(rung.starts))
        for host in range(shape[0]):
            gain_KCN, cost_KCN = _rung(player, host, rung, shape[1], kept_N)
            for mean_CN, new_KCN in ((gain_WCN[host], gain_KCN), (cost_WCN[host], cost_KCN)):
                mean_CN[:, kept_N] += weight * (new_KCN.mean(0) - mean_CN[:, kept_N])
        starts_N[kept_N] += len(rung.starts)
    return Found(starts_N, gain_WCN, cost_WCN, kept_N)


def _rung(player: Player, host: int, rung: Rung, conditions: int, kept_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gain and cost [K, C, N] of every plan that is left, the first of which grows nothing."""
    shape = (len(rung.starts), conditions, len(kept_N))
    start_R, condition_R, plan_R = (
        index.flatten() for index in np.meshgrid(np.array(rung.starts), np.arange(conditions), kept_N, indexing="ij")
    )
    loss_R, cost_R = player.play(Episodes(host, start_R, condition_R, plan_R))
    loss_KCN = loss_R.reshape(shape)
    return loss_KCN[..., :1] - loss_KCN, cost_R.reshape(shape)


def survivors(gain_WCN: np.ndarray, cost_WCN: np.ndarray, prices: Sequence[float], count: int) -> np.ndarray:
    """Places of the plans that go on, in order: the first, and those that rank best for the target they are best for.

    Of plans with the same best rank those go on that are better overall.
    """
    net_WCNP = gain_WCN[..., None] - np.array(prices) * cost_WCN[..., None]
    by_place_NWCP = np.moveaxis(net_WCNP, 2, 0)
    plans = len(by_place_NWCP)
    targets = (
        by_place_NWCP.mean((1, 2, 3)),
        by_place_NWCP.mean((1, 2)),
        by_place_NWCP.mean(3),
        by_place_NWCP,
    )
    score_NT = np.concatenate([target.reshape(plans, -1) for target in targets], 1)[1:]
    rank_NT = (-score_NT).argsort(0, kind="stable").argsort(0, kind="stable")
    order_N = np.lexsort((rank_NT[:, 0], rank_NT.min(1)))
    return np.concatenate(([0], 1 + np.sort(order_N[: count - 1])))
