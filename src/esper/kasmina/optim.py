"""Row-wise AdamW and SGD: each lane of a bank is an optimizer of its own.

Its own step count, learning rate, clipping and moments; a lane whose gradient is not finite, or that is not active,
keeps everything as it was. Stock optimizers over stacked tensors share all of that between rows (PRIOR-ART).

Shapes: N lanes, P parameters of one lane.
"""

from __future__ import annotations

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

    @torch.no_grad()
    def step(self, bank: Bank, grad: Tensor, rate_N: Tensor, active_N: Tensor | None = None) -> None:
        """Update a bank in place.

        Parameters
        ----------
        bank
            Parameters and state; the norms of the gradient are added to its `norm_sum`.
        grad
            Gradient [N, P]; overwritten.
        rate_N
            Learning rate of each lane.
        active_N
            Bool: lanes that learn now; None for all.
        """
        config = self.config
        norm_N = torch.linalg.vector_norm(grad, dim=1)
        bank.norm_sum += norm_N
        ok_N = norm_N.isfinite()
        if active_N is not None:
            ok_N = ok_N & active_N
        ok = ok_N[:, None]
        grad.mul_((config.clip_norm / (norm_N + CLIP_EPSILON)).clamp(max=1.0)[:, None])
        grad.masked_fill_(~ok, 0.0)
        bank.steps += ok_N
        if config.method == "adamw":
            self._adamw(bank, grad, rate_N, ok_N)
        else:
            self._sgd(bank, grad, rate_N, ok_N)

    def _adamw(self, bank: Bank, grad: Tensor, rate_N: Tensor, ok_N: Tensor) -> None:
        beta1, beta2 = self.config.momentum, self.config.beta2
        scratch, theta = bank.scratch, bank.theta.detach()
        ok = ok_N.to(grad.dtype)[:, None]
        bank.first.lerp_(grad, ok * (1 - beta1))
        bank.second.mul_(1 - ok * (1 - beta2)).addcmul_(grad, grad, value=1 - beta2)
        rate = rate_N[:, None] * ok
        if self.config.weight_decay:
            torch.mul(rate * -self.config.weight_decay, bank.decay_P, out=scratch)
            theta.addcmul_(theta, scratch)
        # theta -= rate/bias1 * first / (sqrt(second)/sqrt(bias2) + eps), the rate folded into the denominator:
        # an idle lane gets an infinite one.
        bias1 = 1 - beta1**bank.steps
        bias2 = 1 - beta2**bank.steps
        size_N = rate_N / bias1
        slope_N = torch.where(ok_N, -1 / (size_N * bias2.sqrt()), 0.0)
        floor_N = torch.where(ok_N, -self.config.epsilon / size_N, -torch.inf)
        torch.sqrt(bank.second, out=scratch).mul_(slope_N[:, None]).add_(floor_N[:, None])
        theta.addcdiv_(bank.first, scratch)

    def _sgd(self, bank: Bank, grad: Tensor, rate_N: Tensor, ok_N: Tensor) -> None:
        theta = bank.theta.detach()
        ok = ok_N.to(grad.dtype)[:, None]
        if self.config.weight_decay:
            torch.mul(ok * self.config.weight_decay, bank.decay_P, out=bank.scratch)
            grad.addcmul_(theta, bank.scratch)
        bank.first.mul_(1 - ok * (1 - self.config.momentum)).add_(grad)
        theta.addcmul_(bank.first, -rate_N[:, None] * ok)
