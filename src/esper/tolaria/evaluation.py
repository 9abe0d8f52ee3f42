"""Evaluation: loss and accuracy of every row, and what each seed is worth.

Shapes: R rows, S slots, K branches, E examples of a split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from esper.kasmina.plan import Branches
from esper.kasmina.population import Population
from esper.kasmina.rows.core import Statistics
from esper.leyline.slots import NOT_MEASURED
from esper.leyline.stages import INCUBATED_STAGE
from esper.tolaria.batches import shared
from esper.tolaria.datasets import Split
from esper.tolaria.training import example_losses

CHUNK = 128
"""Examples in one pass of an evaluation: the activations of 64 small hosts stay near the cache."""
WHOLE_LATTICE = 5
"""Seeds up to which every set of them is measured."""


@dataclass(frozen=True)
class Evaluation:
    """Loss (nats) and accuracy (fraction) of each row [R] on one split."""

    loss_R: Tensor
    accuracy_R: Tensor


@torch.no_grad()
def evaluate(population: Population, split: Split) -> Evaluation:
    """Evaluate every row on a split, as the network that its export would be."""
    return _mean(_examples(population, split, Statistics.RUNNING))


@torch.no_grad()
def measure(population: Population, split: Split) -> Evaluation:
    """Evaluate every row, and write what each seed is worth into the slots.

    A blended seed's contribution is the loss without it less the loss with it (leave-one-out); the gain of a seed in
    the incubator is the loss without it less the loss if it stood blended at its target. Both sides of a difference
    are computed with the batch statistics of the evaluated examples (docs/decisions/0015). Each comes with the
    standard error of the mean of the paired differences over the examples, at least what rounding leaves of a loss.
    """
    probes, slots = population.probes, population.slots
    measured = None
    for name in ("contribution", "contribution_se", "incubator_gain", "incubator_gain_se"):
        getattr(slots, name).fill_(NOT_MEASURED)
    if probes is not None:
        row_K, site_K = probes.row_K, probes.site_K
        measured = _examples(population, split, Statistics.OWN, probes)
        loss_RE, probe_KE = measured.loss_RE, measured.branch_KE
        incubated_K = slots.stage[row_K, site_K] == int(INCUBATED_STAGE)
        without_less_with = probe_KE - loss_RE[row_K]
        worth_KE = torch.where(incubated_K[:, None], -without_less_with, without_less_with)
        mean_K = worth_KE.mean(1).float()
        rounding_K = torch.finfo(loss_RE.dtype).eps * (1 + loss_RE.mean(1)[row_K])
        error_K = (worth_KE.std(1) / worth_KE.shape[1] ** 0.5).clamp_min(rounding_K).float()
        unmeasured = torch.full_like(mean_K, NOT_MEASURED)
        for name, mask_K in (("contribution", ~incubated_K), ("incubator_gain", incubated_K)):
            getattr(slots, name).index_put_((row_K, site_K), torch.where(mask_K, mean_K, unmeasured))
            getattr(slots, f"{name}_se").index_put_((row_K, site_K), torch.where(mask_K, error_K, unmeasured))
    if measured is None or population.hosts.buffers:
        return evaluate(population, split)
    return _mean(measured)


@torch.no_grad()
def coalition_losses(population: Population, split: Split, row: np.ndarray, enabled: np.ndarray) -> Tensor:
    """Mean loss [K] of rows with chosen sets of their seeds, each distinct set of a row computed once.

    Every set has the batch statistics of the evaluated examples, so that two sets differ by their seeds alone.

    Parameters
    ----------
    row
        Int64 [K].
    enabled
        Bool [K, S]: the seeds that take part; each must be blended or in the incubator.
    """
    base = population.base
    requests = np.column_stack((row, enabled.astype(np.int64)))
    distinct, inverse = np.unique(requests, axis=0, return_inverse=True)
    d_row, d_enabled = distinct[:, 0], distinct[:, 1:].astype(bool)
    is_base = (d_enabled == base[d_row]).all(1)
    branches = population.planner.branches(base, d_row[~is_base], d_enabled[~is_base], train=False)
    measured = _examples(population, split, Statistics.OWN, branches)
    loss_RE, branch_KE = measured.loss_RE, measured.branch_KE
    mean_D = torch.empty(len(distinct), dtype=loss_RE.dtype, device=loss_RE.device)
    at_base = torch.from_numpy(np.flatnonzero(is_base)).to(loss_RE.device)
    mean_D[at_base] = loss_RE.mean(1)[torch.from_numpy(d_row[is_base]).to(loss_RE.device)]
    if branches is not None:
        others = np.flatnonzero(~is_base)[branches.order]
        mean_D[torch.from_numpy(others).to(loss_RE.device)] = branch_KE.mean(1)
    return mean_D[torch.from_numpy(inverse.reshape(-1)).to(loss_RE.device)]


def coalitions_of(base_S: np.ndarray) -> np.ndarray:
    """Sets of a row's seeds worth measuring at the end, bool [K, S].

    Up to `WHOLE_LATTICE` seeds every set; beyond, those of at most two seeds, and those that lack at most one: enough
    for what each adds first and last, and for the interaction of pairs.
    """
    seeds = np.flatnonzero(base_S)
    count = len(seeds)
    members = (
        (np.arange(2**count)[:, None] >> np.arange(count)) & 1 if count <= WHOLE_LATTICE else _small_and_large(count)
    )
    sets = np.zeros((len(members), len(base_S)), dtype=bool)
    sets[:, seeds] = members.astype(bool)
    return sets


def _small_and_large(count: int) -> np.ndarray:
    one = np.eye(count, dtype=np.int64)
    first, second = np.triu_indices(count, 1)
    return np.concatenate((np.zeros((1, count), dtype=np.int64), one, one[first] + one[second], 1 - one, one[:1] | 1))


class _Examples(NamedTuple):
    """Loss and correctness of each example, and its losses in the branches."""

    loss_RE: Tensor
    correct_RE: Tensor
    branch_KE: Tensor


def _mean(examples: _Examples) -> Evaluation:
    return Evaluation(examples.loss_RE.mean(1), examples.correct_RE.mean(1))


def _examples(
    population: Population, split: Split, statistics: Statistics, branches: Branches | None = None
) -> _Examples:
    """Evaluate every row and branch; activations in front of a branch are shared.

    Chunks have (nearly) one size: a short last one would have poor batch statistics.
    """
    split = split.counted
    parts = []
    chunks = -(-len(split.y) // CHUNK)
    for x, y in zip(split.x.tensor_split(chunks), split.y.tensor_split(chunks), strict=True):
        x = shared(x, population.rows, population.lane_axis)
        keep = branches is not None
        logits, streams = population.forward(x, population.main_pass, statistics=statistics, keep=keep)
        loss_RE = example_losses(logits, y.expand(population.rows, -1))
        branch_KE = loss_RE.new_empty(0, len(y))
        if branches is not None:
            branch_logits = population.branch(streams, branches)
            branch_KE = example_losses(branch_logits, y.expand(len(branches.row), -1))
        parts.append(_Examples(loss_RE, (logits.argmax(2) == y).to(loss_RE.dtype), branch_KE))
    return _Examples(*(torch.cat(column, 1) for column in zip(*parts, strict=True)))
