"""Controllers on the same starts, in every context: the policy against its controls.

Every arm plays the same starts (initialisation, data order, wrong labels), none of which any training, selection or
choice of a plan has seen. What counts is by how much the loss on the test split is below that of growing nothing,
less rent, averaged over all contexts of a start.

Shapes: W hosts (tasks and widths), K starts, C conditions, P prices; R rows of a population.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from esper.exam.grid import Played, play
from esper.exam.headroom import Headroom, Way
from esper.exam.hedge import hedging
from esper.exam.plans import Family, Plan, plan_table
from esper.exam.replay import Modal
from esper.exam.statistics import Difference
from esper.leyline.config import CompareConfig
from esper.leyline.starts import EXAM, start_ids
from esper.leyline.view import Controller
from esper.simic.contexts import conditions, grid
from esper.simic.episode import Episode
from esper.simic.recorder import RoundRecorder
from esper.tamiyo.controllers.plan import PlanController
from esper.tamiyo.controllers.policy import PolicyController
from esper.tamiyo.controllers.registry import make_controller
from esper.tamiyo.policy.network import FactoredRecurrentActorCritic
from esper.tolaria.tasks import Task

NEVER = "never"
SINGLE, BY_PRICE, BY_CONTEXT = "best plan", "best plan for each price", "best plan for each context"
"""Plans that know nothing, what the policy is told, and what it has to find out."""
HEURISTIC = "heuristic"
CONTROLS = (NEVER, "random", "periodic", HEURISTIC)
RANDOM_PLAN, HEDGE, REPLAY = "random plan", "classify, then hedge", "replay of policy"
POLICY, WAYS = "policy", ("greedy", "drawing")


@dataclass(frozen=True)
class Arm:
    """Who decides.

    Attributes
    ----------
    name
        What it is called in tables.
    make
        Gives its controller for a population of one host, whose number is told.
    sees_price
        It does something else at another price; where it does not, it plays each context once for all prices.
    """

    name: str
    make: Callable[[Episode, int], Controller]
    sees_price: bool = False


@dataclass(frozen=True)
class Score:
    """What an arm reached in every context; all [W, K, C, P].

    Attributes
    ----------
    net, gain
        By how much the test loss is below that of growing nothing, with and without rent taken off (nats).
    accuracy, added
        Test accuracy (share), and parameters grown.
    """

    net: np.ndarray
    gain: np.ndarray
    accuracy: np.ndarray
    added: np.ndarray

    def by_start(self, values: np.ndarray | None = None) -> np.ndarray:
        """Mean over the contexts of each start [K]; of `net` unless something else is given."""
        means: np.ndarray = (self.net if values is None else values).mean((0, 2, 3))
        return means


def arms(
    headroom: Headroom, policies: Sequence[FactoredRecurrentActorCritic], replays: Sequence[Modal]
) -> tuple[Arm, ...]:
    """Controls, drawn and chosen plans, a rule made of them, what policies do as a plan, and policies in both ways.

    Parameters
    ----------
    headroom
        Its best plans are played.
    replays
        What each policy does most often: see `modal_plans`.
    """
    return (
        *(Arm(name, _control(name), sees_price=name == HEURISTIC) for name in CONTROLS),
        Arm(RANDOM_PLAN, _random_plan),
        Arm(HEDGE, hedging(headroom), sees_price=True),
        *best_plans(headroom),
        *(arm for number, modal in enumerate(replays) for arm in _replayed(f"{REPLAY} {number}", modal, headroom)),
        *(
            Arm(f"{POLICY} {number}, {way}", _learned(policy, way == "greedy"), sees_price=True)
            for number, policy in enumerate(policies)
            for way in WAYS
        ),
    )


def best_plans(headroom: Headroom) -> tuple[Arm, ...]:
    """The plans that a search chose: one for everything, one for each price, one for each context."""
    single_WCP, by_price_WCP, by_context_WCP = headroom.chosen_VWCP[list(Way)]
    return (
        Arm(SINGLE, _planned(headroom.plans, single_WCP[..., :1])),
        Arm(BY_PRICE, _planned(headroom.plans, by_price_WCP), sees_price=True),
        Arm(BY_CONTEXT, _planned(headroom.plans, by_context_WCP), sees_price=True),
    )


def _replayed(name: str, modal: Modal, headroom: Headroom) -> tuple[Arm, ...]:
    """One plan for all prices, and one for each."""
    shape = headroom.chosen_VWCP.shape[1:]
    plans = (modal.plan, *modal.by_price)
    one_WC1 = np.zeros((*shape[:2], 1), dtype=np.int64)
    each_WCP = np.broadcast_to(1 + np.arange(shape[2]), shape)
    return (
        Arm(name, _planned(plans, one_WC1)),
        Arm(f"{name}, each price", _planned(plans, each_WCP), sees_price=True),
    )


def _control(name: str) -> Callable[[Episode, int], Controller]:
    def make(episode: Episode, host: int) -> Controller:
        population = episode.population
        every_R = torch.arange(population.rows, device=population.device)
        slots, seed = population.slots.slots, episode.config.seed
        return make_controller(
            name, rows=population.rows, slots=slots, seed=seed, row_ids_R=every_R, device=population.device
        )

    return make


def _planned(plans: Sequence[Plan], number_WCP: np.ndarray) -> Callable[[Episode, int], Controller]:
    table_NKF = plan_table(plans)

    def make(episode: Episode, host: int) -> Controller:
        population = episode.population
        number_CP = torch.from_numpy(np.ascontiguousarray(number_WCP[host]))
        number_R = number_CP.flatten().repeat(population.rows // number_CP.numel())
        return PlanController(table_NKF[number_R].to(population.device), population.slots.slots)

    return make


def _random_plan(episode: Episode, host: int) -> Controller:
    """Each row plays a plan of its own, drawn from the family: what architecture search is compared with."""
    population = episode.population
    family = Family.of(episode.config, episode.task.host.slot_config)
    plans = family.sampled(population.rows, episode.config.seed, RANDOM_PLAN)
    return PlanController(plan_table(plans, population.device), population.slots.slots)


def _learned(policy: FactoredRecurrentActorCritic, greedy: bool) -> Callable[[Episode, int], Controller]:
    def make(episode: Episode, host: int) -> Controller:
        every_R = torch.arange(episode.population.rows, device=episode.population.device)
        return PolicyController(policy, episode.config.seed, every_R, greedy=greedy)

    return make


def compare(
    config: CompareConfig,
    tasks: Sequence[Task],
    players: Sequence[Arm],
    *,
    recorder: Callable[[Episode, str], RoundRecorder | None] | None = None,
    told: Callable[[str, float], None] | None = None,
) -> Iterator[tuple[str, Score]]:
    """Let every arm play every context; the first must grow nothing, because all are measured against it.

    Parameters
    ----------
    tasks
        The tasks with a host of each width.
    recorder
        Gives what records a round of an arm; None: nothing does.
    told
        Told, after every decision, the arm that plays and which share of all is done.
    """
    contexts, horizon = config.contexts, config.training.horizon
    start_K = start_ids(EXAM, config.first_start, config.starts, config.device)
    prices_P = np.array(contexts.prices)
    cells = len(conditions(contexts))
    # An arm that sees prices has so many times the rows, and takes about so many times as long.
    sizes = [len(prices_P) if arm.sees_price else 1 for arm in players]
    whole, before, never = sum(sizes) * len(tasks), 0, None
    for arm, size in zip(players, sizes, strict=True):
        prices = contexts.prices if arm.sees_price else (0.0,)
        played: list[Played] = []
        for host, task in enumerate(tasks):

            def each(decision: int, name: str = arm.name, before: int = before, size: int = size) -> None:
                if told is not None:
                    told(name, (before + size * decision / horizon) / whole)

            played.append(
                play(
                    config,
                    task,
                    grid(contexts, start_K, prices, 1),
                    lambda episode, arm=arm, host=host: arm.make(episode, host),  # type: ignore[misc]
                    lambda data: data.test,
                    recorder=recorder and (lambda episode, name=arm.name: recorder(episode, name)),
                    told=each,
                )
            )
            before += size
        loss, accuracy, cost, added = (
            np.stack([getattr(one, name) for one in played]).reshape(len(tasks), config.starts, cells, len(prices))
            for name in ("loss", "accuracy", "cost", "added")
        )
        never = loss[..., :1] if never is None else never
        of_prices = (*loss.shape[:3], len(prices_P))
        gain, accuracy, added = (np.broadcast_to(values, of_prices) for values in (never - loss, accuracy, added))
        yield arm.name, Score(gain - prices_P * cost, gain, accuracy, added)


def differences(scores: Mapping[str, Score]) -> dict[str, dict[str, Difference]]:
    """By how much each policy, and all of them together, are ahead of every other arm on the same starts (nats).

    Policies differ in their training seed, and intervals for all of them are over seeds and starts together.
    """
    others = {name: score.by_start() for name, score in scores.items() if not name.startswith(POLICY)}
    learned = {name: score.by_start() for name, score in scores.items() if name.startswith(POLICY)}
    for way in WAYS:
        of = [net_K for name, net_K in learned.items() if name.endswith(way)]
        if len(of) > 1:
            learned[f"mean of {len(of)} policies, {way}"] = np.stack(of)
    return {
        name: {other: Difference.of(net - other_K) for other, other_K in others.items()}
        for name, net in learned.items()
    }
