"""Learning from a round: proximal policy optimization over whole episodes, one transfer for each update.

Whether to take a step is decided on the device: one that would follow a KL divergence beyond the limit, or a gradient
that is not finite, is worked out and not taken (`found_inf` of torch's fused Adam, which GradScaler uses likewise).

Shapes: T decisions, R rows, H heads, E epochs, K measures, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from esper.leyline.actions import HEAD_COUNT, HEADS_OF_OP, Head, Op
from esper.leyline.config import PPOConfig
from esper.leyline.errors import EsperError
from esper.leyline.streams import Stream
from esper.leyline.transfer import Cargo, Parcel, deliver
from esper.simic.advantages import generalized_advantages, group_advantages
from esper.simic.layers import LayerProbe, LayerReport, layers_of_parameters
from esper.simic.rollout import Rollout
from esper.tamiyo.policy.distribution import raise_flag
from esper.tamiyo.policy.network import FactoredRecurrentActorCritic
from esper.tamiyo.policy.value import LEAST_DEVIATION

LARGEST_LOG_RATIO = 20.0
"""Beyond it an exponential would say nothing but overflow."""
ADAM_EPSILON = 1e-5
MOST_SKIPPED_UPDATES = 3
"""Updates in a row with a minibatch that was not finite, after which the run ends."""
ROUNDING = 1e-5
"""Share of a return that the rounding of its sum may make up."""
MOST_NAMES = 3
"""Layers that its last words name."""


@dataclass(frozen=True)
class HeadReport:
    """One head in one update; shares of decisions that were learned from."""

    used_decisions: int
    choice_decisions: int
    entropy: float
    kl_nats: float


@dataclass(frozen=True)
class UpdateReport:
    """What an update did; NaN where nothing was measured.

    Attributes
    ----------
    epochs, minibatches
        Passes begun before the early stop, and steps taken.
    skipped_minibatches
        Not finite, not taken.
    stopped_early
        The KL divergence ended the update.
    kl_nats, clip_share, policy_loss, value_loss, entropy, gradient_norm
        Means over the minibatches of the last pass. The divergence is measured before each step.
    explained_variance
        Of the returns by the values of the rollout, so of the critic before this update; NaN where the returns differ
        by no more than noise.
    heads
        By head.
    layers
        By layer, in the network's order; empty unless `record_layers`.
    """

    epochs: int
    minibatches: int
    skipped_minibatches: int
    stopped_early: bool
    kl_nats: float
    clip_share: float
    policy_loss: float
    value_loss: float
    entropy: float
    gradient_norm: float
    explained_variance: float
    heads: dict[str, HeadReport]
    layers: dict[str, LayerReport]


_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What Adam knows of a parameter."""
_MEANS = ("kl_nats", "clip_share", "policy_loss", "value_loss", "entropy", "gradient_norm")
_COUNTS = ("judged", "taken", "skipped", "stopped", "decisions")
_USED_OH = torch.tensor([[head in HEADS_OF_OP[op] for head in Head] for op in Op])


class PPOAgent:
    """Improves a policy.

    Parameters
    ----------
    policy
        Changed in place.
    config
        How to learn.
    seed
        Of the run: decides how hosts are dealt into minibatches.

    Attributes
    ----------
    uniform_share
        Share of a uniform choice with which the next round is to be collected.
    """

    def __init__(self, policy: FactoredRecurrentActorCritic, config: PPOConfig, seed: int) -> None:
        self.policy, self.config = policy, config
        self._parameters = list(policy.parameters())
        self.optimizer = torch.optim.Adam(self._parameters, lr=config.policy_rate, eps=ADAM_EPSILON, fused=True)
        device = self._parameters[0].device
        self._leave_out = torch.zeros((), device=device)
        self.optimizer.found_inf = self._leave_out  # type: ignore[attr-defined]
        self._stream = Stream(seed, "minibatches")
        self._totals = {
            "counts_EK": torch.zeros(config.epochs, len(_COUNTS), dtype=torch.float64, device=device),
            "means_EK": torch.zeros(config.epochs, len(_MEANS), dtype=torch.float64, device=device),
            # Entropy, divergence and number of choices of each head, summed over decisions.
            "heads_E3H": torch.zeros(config.epochs, 3, HEAD_COUNT, dtype=torch.float64, device=device),
            # Minibatches in which the gradient of a parameter was not finite.
            "wild_P": torch.zeros(len(self._parameters), dtype=torch.int64, device=device),
        }
        self._layers_P = layers_of_parameters(policy)
        self._probe = LayerProbe(policy) if config.record_layers else None
        self._used_OH = _USED_OH.to(device)
        self._stopped = torch.zeros((), dtype=torch.bool, device=device)
        self._entropy_weight = config.entropy_weight
        self.uniform_share = config.uniform_share
        self.updates = 0
        self._skipped_in_a_row = 0

    def set_progress(self, share: float) -> None:
        """Set learning rate, entropy weight and exploration for a round between 0, the first, and 1, the last."""
        config = self.config
        self._entropy_weight = config.entropy_weight * (1 + share * (config.entropy_final_share - 1))
        self.uniform_share = config.uniform_share * (1 - share)
        for group in self.optimizer.param_groups:
            group["lr"] = config.policy_rate * (1 + share * (config.policy_final_share - 1))

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Give what the next update depends on beside the policy and `set_progress`: the moments, and the counters."""
        moments = {
            f"{name}/{moment}": value
            for name, parameter in self.policy.named_parameters()
            for moment, value in self.optimizer.state[parameter].items()
        }
        return moments, {"updates": self.updates, "skipped_in_a_row": self._skipped_in_a_row}

    def restore(self, moments: Mapping[str, Tensor], counters: Mapping[str, int]) -> None:
        """Take back what `state` gave.

        Raises
        ------
        KeyError, ValueError
            They are those of another policy.
        """
        restored: dict[Tensor, dict[str, Tensor]] = {}
        parameters = dict(self.policy.named_parameters())
        # A learner that has made no step yet has none.
        if moments and set(moments) != {f"{name}/{moment}" for name in parameters for moment in _MOMENTS}:
            raise ValueError("moments of other parameters")
        for key, value in moments.items():
            name, _, moment = key.rpartition("/")
            if value.dim() and value.shape != parameters[name].shape:
                raise ValueError(f"{key}: shape {list(value.shape)}, {list(parameters[name].shape)} needed")
            restored.setdefault(parameters[name], {})[moment] = value.to(parameters[name].device, copy=True)
        self.updates, self._skipped_in_a_row = counters["updates"], counters["skipped_in_a_row"]
        self.optimizer.state.clear()
        self.optimizer.state.update(restored)

    def update(self, rollout: Rollout) -> UpdateReport:
        """Learn from a round.

        Raises
        ------
        EsperError
            Minibatches of several updates in a row were not finite, or a logit was not (see `MaskedCategorical`).
        InvalidStateMachineError
            A mask was empty.
        """
        config = self.config
        advantage_TR, target_TR, explained = self._targets(rollout)
        for total in self._totals.values():
            total.zero_()
        self._stopped.zero_()
        flag = torch.zeros((), dtype=torch.int64, device=self._stopped.device)
        learners_N = rollout.learners_N
        number = torch.full((1,), self.updates, device=learners_N.device)
        with nullcontext() if self._probe is None else self._probe.watching():
            for epoch in range(config.epochs):
                order_N = self._stream.permutations(number, torch.full_like(number, epoch), len(learners_N))[0]
                for rows in learners_N[order_N].chunk(min(config.minibatches, len(learners_N))):
                    seen = self._step(rollout, rows, advantage_TR[:, rows], target_TR[:, rows], epoch)
                    flag = flag if seen is None else flag | seen
        self.updates += 1
        self._observe(rollout)
        learned_TR = rollout.made_TR & rollout.learns_R
        used_H = (self._used_OH[rollout.action_TRH[..., Head.OP]] & learned_TR[..., None]).sum((0, 1))
        of_layers = {} if self._probe is None else self._probe.totals
        parcel = Parcel.pack({**self._totals, **of_layers, "explained": explained, "flag": flag, "used_H": used_H})
        (cargo,) = deliver(parcel)
        raise_flag(int(cargo["flag"]))
        report = _report(cargo, {} if self._probe is None else self._probe.report(cargo))
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if report.skipped_minibatches else 0
        if self._skipped_in_a_row >= MOST_SKIPPED_UPDATES:
            raise EsperError(
                f"policy: minibatches of {MOST_SKIPPED_UPDATES} updates in a row were not finite; "
                f"the policy has diverged ({self._culprits(cargo)}): "
                "lower --policy-rate or go back to an earlier checkpoint"
            )
        return report

    def _culprits(self, cargo: Cargo) -> str:
        """Say in which layers the gradient was not finite in this update."""
        wild = [layer for layer, count in zip(self._layers_P, cargo["wild_P"], strict=True) if count]
        if not wild:
            return "the loss or the norm, though no layer's gradient"
        names = list(dict.fromkeys(wild))
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        return f"the gradient of {', '.join(names[:MOST_NAMES])}{more}"

    @torch.no_grad()
    def _observe(self, rollout: Rollout) -> None:
        """Let the statistics of the observation see the round; only now, or the ratios would not begin at 1."""
        statistics = self.policy.statistics
        seen = rollout.run_TRF[..., : len(statistics.mean)]
        statistics.update(seen.masked_fill(~rollout.made_TR[..., None], torch.nan))

    @torch.no_grad()
    def _targets(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised advantages and value targets [T, R], and how much of the returns the critic explained."""
        config, made_TR = self.config, rollout.made_TR
        reward_TR, value_TR = (kept.masked_fill(~made_TR, 0.0) for kept in (rollout.reward_TR, rollout.value_TR))
        plain_TR = generalized_advantages(reward_TR, value_TR, made_TR, config.gamma, config.gae_lambda)
        return_TR = generalized_advantages(reward_TR, torch.zeros_like(reward_TR), made_TR, config.gamma, 1.0)
        target_TR = plain_TR + value_TR
        learned_TR = made_TR & rollout.learns_R
        advantage_TR = plain_TR
        if config.advantage == "group":
            counts_R = rollout.learns_R & made_TR[0]
            advantage_TR = group_advantages(return_TR[0], rollout.group_R, counts_R).expand_as(plain_TR)
        free_TR = rollout.free_TR
        deviation = _variance(advantage_TR, free_TR).sqrt()
        advantage_TR = (advantage_TR - _mean(advantage_TR, free_TR)) / (deviation + 1e-8)
        self.policy.value_output.track(target_TR, learned_TR)
        missed, total = _variance(return_TR - value_TR, learned_TR), _variance(return_TR, learned_TR)
        noise = LEAST_DEVIATION**2 + ROUNDING**2 * _mean(return_TR.square(), learned_TR)
        return advantage_TR, target_TR, torch.where(total > noise, 1 - missed / total, torch.nan)

    def _step(
        self, rollout: Rollout, rows: Tensor, advantage_TR: Tensor, target_TR: Tensor, epoch: int
    ) -> Tensor | None:
        """Judge one minibatch, and take a step unless that goes too far or is not finite; give the policy's flag."""
        config = self.config
        mask_TRHC, made_TR = rollout.mask_TRHC[:, rows], rollout.made_TR[:, rows]
        judged = self.policy.evaluate_actions(
            rollout.observation(rows), rollout.action_TRH[:, rows], mask_TRHC, uniform_share=rollout.uniform_share
        )
        choice_TRH = (mask_TRHC.sum(-1) > 1) & made_TR[..., None]
        free_TR = choice_TRH.any(-1)
        log_ratio_TRH = (judged.log_prob_TRH - rollout.log_prob_TRH[:, rows]).masked_fill(~choice_TRH, 0.0)
        policy_loss, clipped_TR = self._surrogate(log_ratio_TRH, advantage_TR, choice_TRH, free_TR)
        value_loss = self._value_loss(judged.value_TR, target_TR, made_TR)
        entropy = _mean(judged.entropy_TRH, choice_TRH)
        freedom = _mean(judged.freedom_TRH, choice_TRH)
        loss = policy_loss + config.value_weight * value_loss - self._entropy_weight * freedom
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norms_P = torch.stack(torch._foreach_norm(gradients))
        if self._probe is not None:
            self._probe.add(gradients, norms_P, ~self._stopped)
        norm = torch.linalg.vector_norm(norms_P)
        clip_grads_with_norm_(self._parameters, config.policy_clip_norm, norm)
        with torch.no_grad():
            kl_TRH = _divergence(log_ratio_TRH)
            joint_TR = _divergence(log_ratio_TRH.sum(-1))
            kl = _mean(joint_TR, free_TR)
            running, finite = ~self._stopped, loss.isfinite() & norm.isfinite()
            self._stopped |= kl > config.target_kl
            taken = ~self._stopped & finite
            self._leave_out.copy_(~taken)
            counted = running & finite
            counts = (counted, taken, running & ~finite, running & self._stopped, counted * free_TR.sum())
            self._totals["counts_EK"][epoch] += torch.stack([count.double() for count in counts])
            means = (kl, _mean(clipped_TR, free_TR), policy_loss, value_loss, entropy, norm)
            self._totals["means_EK"][epoch] += torch.stack(means).masked_fill(~counted, 0.0)
            sums = (judged.entropy_TRH * choice_TRH, kl_TRH * free_TR[..., None], choice_TRH.float())
            heads_3H = torch.stack([part.sum((0, 1)) for part in sums])
            self._totals["heads_E3H"][epoch] += heads_3H.masked_fill(~counted, 0.0)
            self._totals["wild_P"] += ~norms_P.isfinite() & running
        self.optimizer.step()
        return judged.flag

    def _surrogate(
        self, log_ratio_TRH: Tensor, advantage_TR: Tensor, choice_TRH: Tensor, free_TR: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Clipped surrogate loss, and which decisions were clipped (float [T, R]).

        A forced decision, with one legal choice in every head, is none: it carries no loss.
        """
        clip = self.config.clip
        if self.config.ratio == "joint":
            log_ratio, advantage, counts = log_ratio_TRH.sum(-1), advantage_TR, free_TR
        else:
            log_ratio, advantage, counts = log_ratio_TRH, advantage_TR[..., None], choice_TRH
        ratio = log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
        gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
        # Heads add up within a decision, decisions are averaged.
        loss = -(gain * counts).sum() / free_TR.sum().clamp_min(1)
        clipped = ((ratio - 1).abs() > clip) & counts
        return loss, (clipped if clipped.dim() == 2 else clipped.any(-1)).float()

    def _value_loss(self, value_TR: Tensor, target_TR: Tensor, made_TR: Tensor) -> Tensor:
        """Half the mean squared error, in standard deviations of the targets."""
        error_TR = (value_TR - target_TR) / self.policy.value_output.deviation.float()
        return 0.5 * _mean(error_TR.square(), made_TR)


def _divergence(log_ratio: Tensor) -> Tensor:
    """KL(old || new) from samples of the old: (r - 1) - ln r (Schulman 2020, "Approximating KL divergence")."""
    log_ratio = log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    return log_ratio.expm1() - log_ratio


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    """Mean where `counts` holds; 0 where nothing does."""
    return values.masked_fill(~counts, 0.0).sum() / counts.sum().clamp_min(1)


def _variance(values: Tensor, counts: Tensor) -> Tensor:
    return _mean((values - _mean(values, counts)).square(), counts)


def _report(cargo: Cargo, layers: dict[str, LayerReport]) -> UpdateReport:
    """Read what arrived: counts over the whole update, means of the last pass that judged anything."""
    counts_EK, nan = cargo["counts_EK"], float("nan")
    judged_E = counts_EK[:, _COUNTS.index("judged")]
    total = dict(zip(_COUNTS, counts_EK.sum(0).tolist(), strict=True))
    judging = (judged_E > 0).nonzero()[0]
    passes, last = len(judging), int(judging[-1]) if len(judging) else 0
    means = (cargo["means_EK"][last] / judged_E[last]).tolist() if passes else [nan] * len(_MEANS)
    entropy_H, kl_H, choice_H = cargo["heads_E3H"][last]
    decisions = counts_EK[last, _COUNTS.index("decisions")]
    heads = {
        head.name.lower(): HeadReport(
            used_decisions=int(cargo["used_H"][head]),
            choice_decisions=int(choice_H[head]),
            entropy=float(entropy_H[head] / choice_H[head]) if choice_H[head] else nan,
            kl_nats=float(kl_H[head] / decisions) if decisions else nan,
        )
        for head in Head
    }
    return UpdateReport(
        epochs=passes,
        minibatches=int(total["taken"]),
        skipped_minibatches=int(total["skipped"]),
        stopped_early=bool(total["stopped"]),
        explained_variance=float(cargo["explained"]),
        heads=heads,
        layers=layers,
        **dict(zip(_MEANS, means, strict=True)),
    )
