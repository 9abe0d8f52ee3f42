"""Training a population between two decisions.

Shapes: R rows, B examples of a minibatch, K branches, N lanes of a bank or examples of the split, S slots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from esper.kasmina.optim import RowOptimizer
from esper.kasmina.population import Population
from esper.kasmina.rows.core import Statistics
from esper.leyline.config import OptimizerConfig
from esper.leyline.slots import NOT_MEASURED
from esper.tolaria.batches import BatchOrder, gather
from esper.tolaria.datasets import Split
from esper.tolaria.door import IGNORED, counts
from esper.tolaria.schedule import Rates

DRAWN_AHEAD = 64
"""Updates whose examples are drawn at once: their memory must not grow with the length of a decision."""


def example_losses(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy (nats) of each example, 0 where its label does not count: [L, B] from logits [L, B, classes].

    In float32 or better.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    # Few classes in the last dimension leave the softmax kernel of the processor hardly anything to vectorise.
    return F.cross_entropy(logits.transpose(1, 2), target, reduction="none", ignore_index=IGNORED)


def mean_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy (nats) over the examples that count: [L] from logits [L, B, classes]; 0 where none does."""
    return example_losses(logits, target).sum(1) / counts(target).sum(1).clamp(min=1)


class Trainer:
    """Makes the updates of a population.

    Losses are never scaled: weights, gradients and moments are float32 or float64. An autocast to bfloat16 around the
    passes needs no scaler, because bfloat16 has the exponents of float32; float16 would, and is not offered.

    Parameters
    ----------
    population
        Trained in place.
    data
        Training split on the population's device.
    order
        Examples of each row and update.
    config
        Optimizer.
    total_updates
        Updates of the whole run: every learning-rate curve ends there.
    labels_RN
        Labels that each row learns instead of those of the data; None: the data's.
    """

    def __init__(
        self,
        population: Population,
        data: Split,
        order: BatchOrder,
        config: OptimizerConfig,
        total_updates: int,
        labels_RN: Tensor | None = None,
    ) -> None:
        self.population, self.data, self.order, self.config = population, data, order, config
        self._labels_RN = labels_RN
        self.optimizer = RowOptimizer(config)
        self.total_updates = total_updates
        self.update = 0
        self.rate_R = torch.full(
            (population.rows,), config.learning_rate, dtype=population.dtype, device=population.device
        )

    def run(self, updates: int) -> Tensor:
        """Make `updates` updates, record each seed's gradient statistics, give each row's mean loss [R].

        An update whose minibatch holds no label that counts has loss and gradient 0, and is not part of the mean.
        """
        population = self.population
        for bank in population.banks:
            bank.norm_sum.zero_()
        loss_sum_R = torch.zeros(population.rows, dtype=population.dtype, device=population.device)
        learned_R = torch.zeros_like(loss_sum_R)
        rates = self._rates()
        last = self.update + updates
        while self.update < last:
            for index_RB in self.order.indices(self.update, min(DRAWN_AHEAD, last - self.update)):
                y_RB = self.data.y[index_RB] if self._labels_RN is None else self._labels_RN.gather(1, index_RB)
                loss_sum_R += self._step(index_RB, y_RB, rates)
                learned_R += counts(y_RB).any(1)
        self._record_gradients(updates)
        return loss_sum_R / learned_R.clamp(min=1)

    def _rates(self) -> Rates:
        """Learning rates of what learns until the next decision; whatever learns for the first time is born now."""
        banks, active = zip(*self.population.learning(), strict=True)
        for bank, active_N in zip(banks, active, strict=True):
            unborn_N = bank.birth_N < 0
            bank.birth_N.masked_fill_(unborn_N if active_N is None else unborn_N & active_N, self.update)
        birth_N, row_N = (torch.cat([getattr(bank, name) for bank in banks]) for name in ("birth_N", "row_N"))
        return Rates(birth_N, self.rate_R[row_N], self.total_updates, self.config)

    def _step(self, index_RB: Tensor, y_RB: Tensor, rates: Rates) -> Tensor:
        population = self.population
        x = gather(self.data.x, index_RB, population.lane_axis)
        shadows = population.shadows
        logits, streams = population.forward(
            x, population.training_pass, statistics=Statistics.UPDATED, keep=shadows is not None
        )
        loss_R = mean_loss(logits, y_RB)
        # A sum over rows: no row's gradient depends on how many rows there are.
        total = loss_R.sum()
        if shadows is not None:
            shadow_logits = population.branch(streams, shadows)
            total = total + mean_loss(shadow_logits, y_RB[shadows.row_K]).sum()
        banks, active = zip(*population.learning(), strict=True)
        grads = torch.autograd.grad(total, [bank.theta for bank in banks])
        self.optimizer.step(banks, grads, rates.at(self.update).split([len(bank) for bank in banks]), active)
        self.update += 1
        return loss_R.detach()

    def _record_gradients(self, updates: int) -> None:
        """Write mean gradient norms, and root mean squares relative to the host's, of the seeds that learned."""
        population, slots = self.population, self.population.slots
        slots.gradient_norm.fill_(NOT_MEASURED)
        slots.gradient_ratio.fill_(NOT_MEASURED)
        host = population.hosts
        host_R = host.norm_sum / updates / host.layer.parameter_count**0.5
        site_of = {id(bank): site for (site, _), bank in population.seeds.items()}
        for bank, active_N in population.learning():
            if id(bank) not in site_of:
                continue
            norm_N = bank.norm_sum / updates
            if active_N is not None:
                norm_N = norm_N.masked_fill(~active_N, NOT_MEASURED)
            at = (bank.row_N, torch.full_like(bank.row_N, site_of[id(bank)]))
            slots.gradient_norm.index_put_(at, norm_N.float())
            ratio_N = norm_N / bank.layer.parameter_count**0.5 / host_R[bank.row_N]
            slots.gradient_ratio.index_put_(at, ratio_N.float())
