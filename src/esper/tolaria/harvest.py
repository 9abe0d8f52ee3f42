"""The harvest: what an episode leaves, every host with its committed seeds and no others.

Running statistics that were fitted with a seed in place are wrong without it (docs/decisions/0018-the-harvest.md).

Shapes: R rows, S slots, B examples of a minibatch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from esper.kasmina.rows.core import Statistics
from esper.kasmina.rows.norms import MOMENTUM
from esper.leyline.transfer import Parcel
from esper.tolaria.batches import gather
from esper.tolaria.training import Trainer

BATCHES = 32
"""Last minibatches of a row from which its running statistics are estimated again."""
MEMORY = round(math.log(1e-6) / math.log(1 - MOMENTUM))
"""Updates after which running statistics hold less than a millionth of what they were."""


@torch.no_grad()
def harvest(trainer: Trainer, lost_R: Tensor) -> Tensor:
    """Cull every seed that is not committed, at the price of one device-to-host transfer.

    Where a seed leaves the forward pass, or left it lately, running statistics are estimated again; the other rows keep
    everything bit for bit.

    Parameters
    ----------
    trainer
        Of the population, after its last update.
    lost_R
        Bool: the row lost a seed from the forward pass within the last `MEMORY` updates, whoever culled it.

    Returns
    -------
    torch.Tensor
        Bool [R, S]: the seeds that were culled.
    """
    population = trainer.population
    slots = population.slots
    lost_R = lost_R | (slots.blended_RS() & slots.on_trial_RS()).any(1)
    culled_RS = population.lifecycle.harvest(slots)
    (news,) = population.settle(Parcel.pack({"lost_R": lost_R}))
    if news["lost_R"].any():
        estimate_statistics(trainer, lost_R)
    return culled_RS


@torch.no_grad()
def estimate_statistics(trainer: Trainer, chosen_R: Tensor) -> None:
    """Replace the running statistics of some rows (bool) by means over their last minibatches.

    Every minibatch counts the same, and is normalised by its own statistics, as in training.
    """
    population, order = trainer.population, trainer.order
    buffers = population.hosts.buffers
    if not buffers:
        return
    before = [table.clone() for table in buffers]
    sums = [torch.zeros_like(table) for table in buffers]
    first = max(0, trainer.update - BATCHES)
    for index_RB in order.indices(first, trainer.update - first):
        for table in buffers:
            table.zero_()
        x = gather(trainer.data.x, index_RB, population.lane_axis)
        population.forward(x, population.main_pass, statistics=Statistics.UPDATED)
        # Of running statistics that were 0, one minibatch leaves `MOMENTUM` of its own.
        for total, table in zip(sums, buffers, strict=True):
            total += table
    share = MOMENTUM * (trainer.update - first)
    for table, old, total in zip(buffers, before, sums, strict=True):
        chosen = chosen_R.view(-1, *[1] * (table.dim() - 1))
        torch.where(chosen, total / share, old, out=table)
