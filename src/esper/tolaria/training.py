"""Training a population between two decisions.

Shapes: R rows, B examples of a minibatch, K branches, N lanes of a bank or examples of the split, S slots.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from esper.kasmina.banks import Bank
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

    Mixed precision: each update casts every table of parameters to bfloat16 once, and computes its passes in it;
    norms, losses, gradients, moments, running statistics and the parameters themselves stay as they are, and so does
    whatever is measured. Losses are never scaled: bfloat16 has the exponents of float32.

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
    precision
        Dtype of the passes; None: that of the parameters.

    Attributes
    ----------
    skipped_R
        Int64: updates of the last `run` that the host of each row skipped, because its gradient was not finite.
    """

    def __init__(
        self,
        population: Population,
        data: Split,
        order: BatchOrder,
        config: OptimizerConfig,
        total_updates: int,
        labels_RN: Tensor | None = None,
        precision: torch.dtype | None = None,
    ) -> None:
        self.population, self.data, self.order, self.config = population, data, order, config
        self._labels_RN = labels_RN
        self._precision = precision or population.dtype
        self.optimizer = RowOptimizer(config)
        self.total_updates = total_updates
        self.update = 0
        self.skipped_R = torch.zeros(population.rows, dtype=torch.int64, device=population.device)
        self.rate_R = torch.full(
            (population.rows,), config.learning_rate, dtype=population.dtype, device=population.device
        )

    def run(self, updates: int) -> Tensor:
        """Make `updates` updates, record each seed's gradient statistics, give each row's mean loss [R].

        An update whose minibatch holds no label that counts has loss and gradient 0, and is not part of the mean; nor
        is one whose loss is not finite. The mean is NaN where no loss was finite.
        """
        population = self.population
        steps = {bank: bank.steps.clone() for bank in population.banks}
        for bank in population.banks:
            bank.norm_sum.zero_()
        loss_sum_R = torch.zeros(population.rows, dtype=population.dtype, device=population.device)
        finite_R, learned_R = (torch.zeros_like(self.skipped_R) for _ in range(2))
        rates = self._rates()
        last = self.update + updates
        while self.update < last:
            for index_RB in self.order.indices(self.update, min(DRAWN_AHEAD, last - self.update)):
                y_RB = self.data.y[index_RB] if self._labels_RN is None else self._labels_RN.gather(1, index_RB)
                loss_R = self._step(index_RB, y_RB, rates)
                now_R = loss_R.isfinite()
                loss_sum_R += loss_R.masked_fill(~now_R, 0.0)
                finite_R += now_R
                learned_R += now_R & counts(y_RB).any(1)
        made = {bank: bank.steps - before for bank, before in steps.items()}
        self.skipped_R = updates - made[population.hosts]
        self._record_gradients(made)
        return (loss_sum_R / learned_R.clamp(min=1)).masked_fill(finite_R == 0, NOT_MEASURED)

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
        x = gather(self.data.x, index_RB, population.lane_axis).to(self._precision)
        shadows, tables = population.shadows, population.tables(self._precision)
        statistics = [(bank, [table.clone() for table in bank.buffers]) for bank in population.banks if bank.buffers]
        logits, streams = population.forward(
            x, population.training_pass, statistics=Statistics.UPDATED, keep=shadows is not None, tables=tables
        )
        loss_R = mean_loss(logits, y_RB)
        # A sum over rows: no row's gradient depends on how many rows there are.
        total = loss_R.sum()
        if shadows is not None:
            shadow_logits = population.branch(streams, shadows, tables=tables)
            total = total + mean_loss(shadow_logits, y_RB[shadows.row_K]).sum()
        banks, active = zip(*population.learning(), strict=True)
        grads = torch.autograd.grad(total, [bank.theta for bank in banks])
        of_banks = rates.at(self.update).split([len(bank) for bank in banks])
        skipped = self.optimizer.step(banks, grads, of_banks, active)
        skipped_by = dict(zip(banks, skipped, strict=True))
        for bank, before in statistics:
            # A seed that is frozen has no gradient, and yet runs in the pass of its host.
            of_host_N = skipped[0][bank.row_N]
            bank.undo_statistics(before, of_host_N | skipped_by.get(bank, of_host_N))
        self.update += 1
        return loss_R.detach()

    def _record_gradients(self, made: Mapping[Bank, Tensor]) -> None:
        """Write mean gradient norms, and root mean squares relative to the host's, of the seeds that learned.

        Parameters
        ----------
        made
            Updates that each lane made [N]; the others were skipped. Where it made none, nothing was measured.
        """
        population, slots = self.population, self.population.slots
        slots.gradient_norm.fill_(NOT_MEASURED)
        slots.gradient_ratio.fill_(NOT_MEASURED)
        host = population.hosts
        host_R = host.norm_sum / made[host] / host.layer.parameter_count**0.5
        site_of = {id(bank): site for (site, _), bank in population.seeds.items()}
        for bank, active_N in population.learning():
            if id(bank) not in site_of:
                continue
            norm_N = bank.norm_sum / made[bank]
            if active_N is not None:
                norm_N = norm_N.masked_fill(~active_N, NOT_MEASURED)
            at = (bank.row_N, torch.full_like(bank.row_N, site_of[id(bank)]))
            slots.gradient_norm.index_put_(at, norm_N.float())
            ratio_N = norm_N / bank.layer.parameter_count**0.5 / host_R[bank.row_N]
            slots.gradient_ratio.index_put_(at, ratio_N.float())
