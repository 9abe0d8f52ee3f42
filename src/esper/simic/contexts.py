"""How the rows of a population differ: groups that share a start, each with a twin that never grows.

Shapes: G groups, K rows of a group, R = G*K rows; of a grid S starts, C conditions (learning rate and label noise),
P prices, N copies.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from esper.leyline.config import ContextConfig, PopulationConfig
from esper.leyline.starts import MOST_ROUNDS, STARTS_OF_ROUND, TRAINING, start_ids
from esper.leyline.streams import Stream
from esper.tolaria.door import counts


@dataclass(frozen=True)
class Contexts:
    """What each row of a population trains under; all [R].

    Attributes
    ----------
    start_id_R
        Int64: decides initialisation, data order and wrong labels. Rows of a group share it.
    group_R, twin_R
        Int64: number of the group, and the row that is its control: itself for a twin. A group shares start, rate and
        noise.
    grows_R
        Bool: false for a twin, whatever its controller wants.
    price_R, rate_R, noise_R
        Price of added parameters (nats), peak learning rate, share of wrong training labels.
    """

    start_id_R: Tensor
    group_R: Tensor
    twin_R: Tensor
    grows_R: Tensor
    price_R: Tensor
    rate_R: Tensor
    noise_R: Tensor

    @classmethod
    def alone(cls, config: PopulationConfig, row_ids_R: Tensor, price: float = 0.0) -> Contexts:
        """Every row with a start of its own, as configured, without a twin."""
        every_R = torch.arange(len(row_ids_R), device=row_ids_R.device)

        def same(value: float) -> Tensor:
            return torch.full_like(every_R, value, dtype=torch.float32)

        grows_R = torch.ones_like(every_R, dtype=torch.bool)
        rate_R = same(config.optimizer.learning_rate)
        return cls(row_ids_R, every_R, every_R, grows_R, same(price), rate_R, same(0.0))

    @property
    def learners_N(self) -> Tensor:
        """Int64: the rows that grow."""
        return self.grows_R.nonzero()[:, 0]


def draw_contexts(
    config: ContextConfig,
    seed: int,
    number: int,
    groups: int,
    size: int,
    device: torch.device | str = "cpu",
    *,
    first: int = 0,
    price_share: float = 1.0,
) -> Contexts:
    """Contexts of one round of training: one draw for each group, its first row the twin.

    Every combination of price, rate and noise is as likely; over the groups of a round they are spread as evenly as
    their number allows, in a random order.

    Parameters
    ----------
    seed, number
        Of the run, and of the round: together with a group's number they decide its draw, and nothing else does.
    groups, size
        G and K.
    first
        Groups of the round that come before these, in another population.
    price_share
        What prices are multiplied by.

    Raises
    ------
    ValueError
        There are no starts left for such a number, or for so many groups.
    """
    if not (0 <= number < MOST_ROUNDS and first + groups <= STARTS_OF_ROUND):
        asked = f"round {number} of {first + groups} groups"
        raise ValueError(f"{asked}; at most {MOST_ROUNDS:,} rounds of {STARTS_OF_ROUND:,} have starts")
    combinations = torch.cartesian_prod(
        *(torch.tensor(values) for values in (config.prices, config.learning_rates, config.label_noise))
    ).to(device)
    round_1 = torch.tensor([number], device=device)
    order = Stream(seed, "contexts").permutations(round_1, torch.zeros_like(round_1), len(combinations))[0]
    group_R = torch.arange(groups, device=device).repeat_interleave(size)
    price_R, rate_R, noise_R = combinations[order[(first + group_R) % len(combinations)]].unbind(1)
    member_R = torch.arange(size, device=device).repeat(groups)
    start_id_R = start_ids(TRAINING, number * STARTS_OF_ROUND + first, groups, device).repeat_interleave(size)
    return Contexts(start_id_R, group_R, group_R * size, member_R > 0, price_share * price_R, rate_R, noise_R)


def conditions(config: ContextConfig) -> list[tuple[float, float]]:
    """Learning rate and label noise of each condition."""
    return list(product(config.learning_rates, config.label_noise))


def grid(
    config: ContextConfig, start_S: Tensor, prices: tuple[float, ...], copies: int = 1, *, twins: bool = False
) -> Contexts:
    """Contexts of every combination: a row for each start, condition, price and copy, in this order.

    Parameters
    ----------
    twins
        The rows of a start and condition are a group, and before them comes their twin: growing nothing costs nothing,
        so that one serves all prices. Otherwise no row has one, and every row may grow.
    """
    device, cells = start_S.device, conditions(config)
    member_K = torch.tensor(prices, device=device).repeat_interleave(copies)
    if twins:
        member_K = torch.cat((member_K[:1], member_K))
    groups, size = len(start_S) * len(cells), len(member_K)
    every_R = torch.arange(groups * size, device=device)
    group_R = every_R // size if twins else every_R
    rate_R, noise_R = torch.tensor(cells, device=device)[every_R // size % len(cells)].unbind(1)
    return Contexts(
        start_id_R=start_S.repeat_interleave(len(cells) * size),
        group_R=group_R,
        twin_R=group_R * size if twins else every_R,
        grows_R=every_R % size > 0 if twins else torch.ones_like(every_R, dtype=torch.bool),
        price_R=member_K.repeat(groups),
        rate_R=rate_R,
        noise_R=noise_R,
    )


def noisy_labels(label_N: Tensor, classes: int, contexts: Contexts, seed: int) -> Tensor | None:
    """Training labels [R, N] of each row, some of them wrong for good; None where every label is right.

    A label that does not count stays one.
    """
    if not bool((contexts.noise_R > 0).any()):
        return None
    stream, zero_R = Stream(seed, "label noise"), torch.zeros_like(contexts.start_id_R)
    chance_RN = stream.uniform(contexts.start_id_R, zero_R, len(label_N), torch.float32)
    other_RN = stream.uniform(contexts.start_id_R, zero_R + 1, len(label_N), torch.float32)
    wrong_RN = (label_N + 1 + (other_RN * (classes - 1)).long()) % classes
    return torch.where(counts(label_N) & (chance_RN < contexts.noise_R[:, None]), wrong_RN, label_N)
