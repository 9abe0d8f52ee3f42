"""How much there is to gain, and how much of it needs deciding: the best plans that a search finds.

The best plan for everything, the best for each price (what a policy is told) and the best for each context (what it has
to find out) are chosen on the starts of the search, and scored on others.

Shapes: W hosts, K fresh starts, C conditions, P prices, N plans, V ways of choosing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import product

import numpy as np

from esper.exam.cells import Episodes
from esper.exam.plans import Plan
from esper.exam.search import Found, Player, Rung, search
from esper.exam.statistics import Interval, paired
from esper.leyline.config import HeadroomConfig
from esper.leyline.starts import SCORE
from esper.simic.contexts import conditions

ASKED, LEAST = 0.03, 0.02
"""Contexts are accepted if knowing the context adds so much to the best plan for each price (nats, mean over prices),
and the interval of that lies above the second."""


class Way(IntEnum):
    """What a plan is chosen by."""

    SINGLE = 0
    BY_PRICE = 1
    BY_CONTEXT = 2


@dataclass(frozen=True)
class Headroom:
    """What a search found, and what its best plans did on fresh starts.

    Attributes
    ----------
    plans
        All that were tried; the first grows nothing.
    slot_ids
        Names of the slots.
    hosts, conditions, prices
        Of the contexts: tasks and widths; a condition is a learning rate and a share of wrong labels.
    episodes
        Episodes that the choice took.
    found
        What the search saw.
    chosen_VWCP
        Numbers of the plans that were chosen.
    gain_VWKCP, cost_VWKCP
        By how much the loss on the selection split fell below that of growing nothing (nats), and
        ln(1 + added / host parameters), on fresh starts.
    """

    plans: tuple[Plan, ...]
    slot_ids: tuple[str, ...]
    hosts: tuple[str, ...]
    conditions: tuple[tuple[float, float], ...]
    prices: tuple[float, ...]
    episodes: int
    found: Found
    chosen_VWCP: np.ndarray
    gain_VWKCP: np.ndarray
    cost_VWKCP: np.ndarray

    @property
    def net_VWKCP(self) -> np.ndarray:
        """Gain less the price of the added parameters (nats)."""
        net: np.ndarray = self.gain_VWKCP - np.array(self.prices) * self.cost_VWKCP
        return net


@dataclass(frozen=True)
class Worth:
    """What choosing is worth on fresh starts, at one price or over all; in nats.

    Attributes
    ----------
    net, net_se
        Net gain of each way of choosing, mean over contexts and starts, and its standard error over starts.
    adds
        What knowing the context adds to the best plan for each price.
    """

    net: tuple[float, ...]
    net_se: tuple[float, ...]
    adds: Interval

    @property
    def accepted(self) -> bool:
        """Choosing is worth enough for a comparison of who chooses best."""
        return self.adds.mean >= ASKED and self.adds.low > LEAST


def worth(headroom: Headroom, price: int | None = None) -> Worth:
    """Say what choosing is worth at one of the prices, told by its number, or over all of them."""
    at = slice(None) if price is None else slice(price, price + 1)
    net_VK = headroom.net_VWKCP[..., at].mean((1, 3, 4))
    error_V = net_VK.std(1, ddof=1) / net_VK.shape[1] ** 0.5
    adds = paired(net_VK[Way.BY_CONTEXT] - net_VK[Way.BY_PRICE])
    return Worth(tuple(net_VK.mean(1).tolist()), tuple(error_V.tolist()), adds)


def measure(
    config: HeadroomConfig,
    plans: Sequence[Plan],
    ladder: Sequence[Rung],
    slot_ids: tuple[str, ...],
    player: Player,
    *,
    stage: Callable[[str, int], None] | None = None,
) -> Headroom:
    """Search, choose, and score what was chosen.

    Parameters
    ----------
    plans
        Candidates, as many as the first rung plays; the first grows nothing.
    ladder
        Rungs of the search.
    player
        Plays plans by number.
    stage
        Told what begins, and how many episodes it is.
    """
    contexts = config.contexts
    cells = conditions(contexts)
    shape = (contexts.hosts, len(cells))
    hosts = product((config.task, *contexts.other_tasks), contexts.host_widths)
    found = search(player, ladder, shape, contexts.prices, stage=stage)
    chosen_VWCP = choose(found, contexts.prices)
    gain_VWKCP, cost_VWKCP = score(player, chosen_VWCP, config.starts, stage=stage)
    return Headroom(
        plans=tuple(plans),
        slot_ids=slot_ids,
        hosts=tuple(name if width == 1 else f"{name} x{width:g}" for name, width in hosts),
        conditions=tuple(cells),
        prices=contexts.prices,
        episodes=sum(rung.plans * len(rung.starts) for rung in ladder) * shape[0] * shape[1],
        found=found,
        chosen_VWCP=chosen_VWCP,
        gain_VWKCP=gain_VWKCP,
        cost_VWKCP=cost_VWKCP,
    )


def choose(found: Found, prices: Sequence[float]) -> np.ndarray:
    """Choose among the finalists by all that was seen of them: numbers of plans [V, W, C, P]."""
    net_WCNP = np.stack([found.net(price)[..., found.finalists] for price in prices], 3)
    hosts, cells, _, _ = net_WCNP.shape
    shape = (hosts, cells, len(prices))
    places = (
        np.broadcast_to(net_WCNP.mean((0, 1, 3)).argmax(), shape),
        np.broadcast_to(net_WCNP.mean((0, 1)).argmax(0), shape),
        net_WCNP.argmax(2),
    )
    chosen: np.ndarray = found.finalists[np.stack(places)]
    return chosen


def score(
    player: Player, chosen_VWCP: np.ndarray, starts: int, *, stage: Callable[[str, int], None] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Play each plan that was chosen, where it was chosen, from fresh starts; give gain and cost [V, W, K, C, P]."""
    ways, hosts, cells, prices = chosen_VWCP.shape
    played = [
        [(c, n) for c in range(cells) for n in sorted({0, *chosen_VWCP[:, w, c].flatten().tolist()})]
        for w in range(hosts)
    ]
    if stage is not None:
        stage(f"scoring on {starts} fresh starts", starts * sum(map(len, played)))
    gain, cost = (np.zeros((ways, hosts, starts, cells, prices)) for _ in range(2))
    for w, pairs in enumerate(played):
        start_R = SCORE.start + np.arange(starts).repeat(len(pairs))
        condition_R, plan_R = np.tile(np.array(pairs), (starts, 1)).T
        loss_KQ, cost_KQ = (
            values.reshape(starts, len(pairs)) for values in player.play(Episodes(w, start_R, condition_R, plan_R))
        )
        place = {pair: q for q, pair in enumerate(pairs)}
        for v, c, p in product(range(ways), range(cells), range(prices)):
            q = place[c, int(chosen_VWCP[v, w, c, p])]
            gain[v, w, :, c, p] = loss_KQ[:, place[c, 0]] - loss_KQ[:, q]
            cost[v, w, :, c, p] = cost_KQ[:, q]
    return gain, cost
