"""The masked distribution: one function gives the log-probabilities that are sampled from and learned from.

Any leading shape, choices last. Log-probabilities and entropies are float32 or better whatever the logits are.
Invalid choices are filled with a finite Python scalar, once, in `_log_probs`: no probability, no gradient, no NaN.
"""

from __future__ import annotations

import math
import os
from enum import StrEnum

import torch
from torch import Tensor

from esper.leyline.errors import EsperError, InvalidStateMachineError


class Validation(StrEnum):
    """What is done about an empty mask and non-finite logits (environment variable `ESPER_VALIDATE_MASKS`)."""

    OFF = "off"
    """Nothing is looked at."""
    DEFERRED = "deferred"
    """A flag is set on the device and travels with the decision's one transfer; `raise_flag` raises there."""
    EAGER = "eager"
    """Raise at the call, at the price of a synchronisation: for debugging."""

    @classmethod
    def from_environment(cls) -> Validation:
        """Mode that the environment asks for, DEFERRED if it is silent.

        Raises
        ------
        EsperError
            There is no such mode.
        """
        name = os.environ.get("ESPER_VALIDATE_MASKS", cls.DEFERRED)
        if name not in set(cls):
            raise EsperError(f"ESPER_VALIDATE_MASKS: unknown mode {name!r}; use {', '.join(cls)}")
        return cls(name)


EMPTY_MASK, NOT_FINITE = 1, 2
"""Bits of a flag."""
MASKED_LOGIT = -1e30
"""What stands at invalid choices: its exponential is exactly 0, and its products with gradients stay finite."""
LARGEST_LOGIT = 1e29
"""A logit that is not smaller counts as not finite: it could not be told from a masked one."""
LEAST_LOG_PROB = -87.0
"""Smallest logarithm whose exponential is a normal float32."""


def raise_flag(flag: int) -> None:
    """Raise what a flag that has arrived on the host says; flags of several decisions are joined by `|`.

    Raises
    ------
    InvalidStateMachineError
        Some mask had no valid choice, whatever else was wrong.
    EsperError
        Some valid choice had a logit that is not finite.
    """
    if flag & EMPTY_MASK:
        also = "; some valid choice also has a logit that is not finite" if flag & NOT_FINITE else ""
        raise InvalidStateMachineError(f"masks: a decision has no valid choice; WAIT must always be one{also}")
    if flag & NOT_FINITE:
        raise EsperError(
            "policy: a valid choice has a logit that is not finite; the policy has diverged: "
            "lower --policy-rate or go back to an earlier checkpoint"
        )


class MaskedCategorical:
    """Categorical distributions over the valid choices of each place.

    Parameters
    ----------
    logits
        [..., C], any floating dtype; what stands at invalid choices is ignored.
    mask
        Bool [..., C], broadcastable: the valid choices.
    uniform_share
        Share e of a uniform distribution over the valid choices, `(1-e)*pi + e*uniform`, in [0, 1). Every choice keeps
        at least e/n, and a gradient, where a hard floor of the probability has none.
    validation
        See `Validation`.

    Attributes
    ----------
    log_probs
        [..., C]; a huge negative number at invalid choices.
    probs
        [..., C]; exactly 0 at invalid choices.
    flag
        Int64 scalar on the device, bits as in `raise_flag`; None where nothing is deferred.

    Raises
    ------
    TypeError
        The mask is not boolean.
    InvalidStateMachineError, EsperError
        In EAGER mode, as `raise_flag`.
    """

    def __init__(
        self,
        logits: Tensor,
        mask: Tensor,
        *,
        uniform_share: float = 0.0,
        validation: Validation = Validation.DEFERRED,
    ) -> None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: {mask.dtype} given, bool needed")
        self.mask = mask
        self.valid_count = mask.sum(-1)
        self.flag: Tensor | None = None
        if validation != Validation.OFF:
            empty = (self.valid_count == 0).any()
            wild = (~(logits.abs() < LARGEST_LOGIT) & mask).any()
            flag = empty * EMPTY_MASK + wild * NOT_FINITE
            if validation == Validation.EAGER:
                raise_flag(int(flag))
            else:
                self.flag = flag
        self.log_probs = _log_probs(logits, mask, self.valid_count, uniform_share)
        # Exponentials that underflow take four times as long.
        self.probs = self.log_probs.clamp_min(LEAST_LOG_PROB).exp() * mask

    def log_prob(self, choice: Tensor) -> Tensor:
        """Log-probability [...] of one choice (int64) at each place."""
        return self.log_probs.gather(-1, choice[..., None])[..., 0]

    def entropy(self) -> Tensor:
        """Entropy [...] divided by ln(number of valid choices): in [0, 1], exactly 0 where there is one."""
        entropy = -(self.probs * self.log_probs).sum(-1)
        largest = self.valid_count.clamp_min(2).to(entropy.dtype).log()
        return (entropy / largest).clamp(0.0, 1.0)

    def sample(self, uniform: Tensor) -> Tensor:
        """Draw one choice at each place by inverting the distribution function; no gradient.

        Parameters
        ----------
        uniform
            [...], in [0, 1): random numbers come from named streams and never from torch's generator.
        """
        cumulative = self.probs.detach().cumsum(-1)
        total = cumulative[..., -1:]
        # Strictly below the total, whatever is rounded: past it no choice would be left.
        level = torch.minimum(uniform[..., None] * total, total * (1 - torch.finfo(total.dtype).eps))
        # Under an empty mask, which the flag reports, every choice is as wrong: give one that exists.
        return (cumulative <= level).sum(-1).clamp_max(cumulative.shape[-1] - 1)

    def mode(self) -> Tensor:
        """Give the most likely choice [...], the first on a tie."""
        return self.log_probs.detach().argmax(-1)


def _log_probs(logits: Tensor, mask: Tensor, valid_count: Tensor, uniform_share: float) -> Tensor:
    """Log-probabilities of the masked, mixed distribution: the one place where anything is masked."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    # A short last dimension leaves the softmax kernel of the processor nothing to vectorise: choices go first.
    log_probs = logits.masked_fill(~mask, MASKED_LOGIT).movedim(-1, 0).log_softmax(0).movedim(0, -1)
    if uniform_share:
        # One choice stays exactly certain.
        alone = (valid_count == 1)[..., None]
        log_uniform = -valid_count.clamp_min(1).to(logits.dtype).log()[..., None] + math.log(uniform_share)
        mixed = torch.logaddexp(log_probs + math.log1p(-uniform_share), log_uniform)
        log_probs = torch.where(mask & ~alone, mixed, log_probs)
    return log_probs
