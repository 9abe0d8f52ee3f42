"""Row-wise AdamW and SGD: each lane of a bank is an optimizer of its own.

Its own step count, learning rate, clipping and moments; a lane whose gradient is not finite, or that is not active,
keeps everything as it was. Stock optimizers over stacked tensors share all of that between rows (PRIOR-ART).

What is one number for each lane is worked out for the lanes of all banks at once; what has the size of the
parameters takes a fixed number of kernels for each bank.

Shapes: N lanes of all banks, P parameters of one lane.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from esper.kasmina.banks import Bank
from esper.leyline.config import OptimizerConfig

CLIP_EPSILON = 1e-6
"""As in `torch.nn.utils.clip_grad_norm_`."""


class RowOptimizer:
    """AdamW (Loshchilov and Hutter 2019) or SGD with momentum, formulas as in `torch.optim`.

    Parameters
    ----------
    config
        Method and constants.
    """

    def __init__(self, config: OptimizerConfig) -> None:
        self.config = config
        self._betas = torch.tensor([config.momentum, config.beta2], dtype=torch.float64)

    @torch.no_grad()
    def step(
        self, banks: Sequence[Bank], grads: Sequence[Tensor], rates: Sequence[Tensor], active: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """Update banks in place; give, for each bank, the lanes whose gradient was not finite [n], active or not.

        They skip the update: nothing of theirs changes, and their norm is not added to `norm_sum`.

        Parameters
        ----------
        banks
            Parameters and state; the norms of the gradients are added to `norm_sum`.
        grads
            Gradient of each bank [n, P]; overwritten.
        rates
            Learning rate of each lane [n].
        active
            Bool [n]: lanes that learn now; None for all.
        """
        config = self.config
        sizes = [len(bank) for bank in banks]
        norms = [torch.linalg.vector_norm(grad, dim=1) for grad in grads]
        norm_N, rate_N = torch.cat(norms), torch.cat(tuple(rates))
        decay_N2 = torch.cat([bank.decay for bank in banks])
        finite_N = norm_N.isfinite()
        ok_N = finite_N.clone()
        if any(mask is not None for mask in active):
            pairs = zip(active, norms, strict=True)
            ok_N &= torch.cat([torch.ones_like(n, dtype=torch.bool) if m is None else m for m, n in pairs])
        share_N = (config.clip_norm / (norm_N + CLIP_EPSILON)).clamp(max=1.0)
        decay_N2 *= torch.where(ok_N[:, None], self._betas.to(decay_N2.device), 1.0)
        rate_N = rate_N * ok_N
        columns = {"share": share_N, "idle": ~ok_N, "moves": ok_N.to(norm_N.dtype), "rate": rate_N}
        if config.method == "adamw":
            columns |= self._denominator(decay_N2, rate_N)
        split = {name: column[:, None].split(sizes) for name, column in columns.items()}
        counted = norm_N.masked_fill(~finite_N, 0.0).split(sizes)
        lanes = zip(banks, grads, decay_N2.split(sizes), ok_N.split(sizes), counted, strict=True)
        for at, (bank, grad, decay, moved, norm) in enumerate(lanes):
            bank.norm_sum += norm
            bank.decay.copy_(decay)
            bank.steps += moved
            of_bank = {name: pieces[at] for name, pieces in split.items()}
            grad.mul_(of_bank["share"]).masked_fill_(of_bank["idle"], 0.0)
            if config.method == "adamw":
                self._adamw(bank, grad, of_bank)
            else:
                self._sgd(bank, grad, of_bank)
        return list((~finite_N).split(sizes))

    def _denominator(self, decay_N2: Tensor, rate_N: Tensor) -> dict[str, Tensor]:
        """Coefficients of `(sqrt(second)/sqrt(bias2) + eps) / -(rate/bias1)`, infinite where the rate is almost 0."""
        bias1_N, bias2_N = (1 - decay_N2).to(rate_N.dtype).unbind(1)
        size_N = rate_N / bias1_N
        slope_N = -1 / (size_N * bias2_N.sqrt())
        moving_N = slope_N.isfinite()
        slope_N = slope_N.masked_fill(~moving_N, 0.0)
        floor_N = torch.where(moving_N, -self.config.epsilon / size_N, -torch.inf)
        return {"slope": slope_N, "floor": floor_N}

    def _adamw(self, bank: Bank, grad: Tensor, lane: dict[str, Tensor]) -> None:
        beta1, beta2 = self.config.momentum, self.config.beta2
        scratch, theta, moves = bank.scratch, bank.theta.detach(), lane["moves"]
        bank.first.lerp_(grad, moves * (1 - beta1))
        bank.second.mul_(1 - moves * (1 - beta2)).addcmul_(grad, grad, value=1 - beta2)
        if self.config.weight_decay:
            torch.mul(lane["rate"], bank.decay_P, out=scratch)
            theta.addcmul_(theta, scratch, value=-self.config.weight_decay)
        torch.sqrt(bank.second, out=scratch).mul_(lane["slope"]).add_(lane["floor"])
        theta.addcdiv_(bank.first, scratch)

    def _sgd(self, bank: Bank, grad: Tensor, lane: dict[str, Tensor]) -> None:
        theta, moves = bank.theta.detach(), lane["moves"]
        if self.config.weight_decay:
            torch.mul(moves, bank.decay_P, out=bank.scratch)
            grad.addcmul_(theta, bank.scratch, value=self.config.weight_decay)
        bank.first.mul_(1 - moves * (1 - self.config.momentum)).add_(grad)
        theta.addcmul_(bank.first, lane["rate"], value=-1.0)
