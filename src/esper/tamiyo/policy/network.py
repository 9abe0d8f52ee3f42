"""The policy network: attention over tokens, a memory over decisions, autoregressive heads, a value.

One set of weights serves any number of slots: the slot head points at slot tokens, and nothing else knows how many
there are. Operation, then slot given operation, then the rest given both. The value knows nothing of the action.

Shape suffixes: T decisions, R rows, S slots, O operations, H heads, F features, C choices of the widest head, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.leyline.actions import HEAD_COUNT, Head, Op, head_sizes
from esper.leyline.config import PolicyConfig
from esper.tamiyo.policy.action_masks import ActionMasks, choice_count
from esper.tamiyo.policy.distribution import MaskedCategorical, Validation
from esper.tamiyo.policy.features import RUN_FEATURES, RUNNING_FEATURES, SLOT_FEATURES
from esper.tamiyo.policy.observation import Observation
from esper.tamiyo.policy.statistics import RunningStatistics
from esper.tamiyo.policy.value import PopArt

Hidden = tuple[Tensor, Tensor]
"""Hidden and cell state of the memory, each [1, R, hidden]."""
REST = tuple(h for h in Head if h not in (Head.OP, Head.SLOT))
"""Heads that follow operation and slot; their sizes do not depend on the host."""
REST_SIZES = tuple(head_sizes(1)[h] for h in REST)


@dataclass(frozen=True)
class Decision:
    """One decision of all rows, and all that learning from it needs.

    Attributes
    ----------
    action_RH
        Int64.
    mask_RHC
        The masks it was drawn under, each head's given the heads before it.
    log_prob_RH, entropy_RH
        Float32, exactly 0 for heads that the operation does not use. The joint log-probability is the sum.
    value_R
        Float32.
    hidden
        Memory after the decision.
    flag
        See `MaskedCategorical`.
    """

    action_RH: Tensor
    mask_RHC: Tensor
    log_prob_RH: Tensor
    entropy_RH: Tensor
    value_R: Tensor
    hidden: Hidden
    flag: Tensor | None


@dataclass(frozen=True)
class Evaluation:
    """What the present weights say of recorded sequences; all [T, R, ...], with gradients.

    Attributes
    ----------
    log_prob_TRH, value_TR
        Of the recorded choices; of the state.
    entropy_TRH
        Of each head, 1 for a uniform choice.
    freedom_TRH
        What a bonus for entropy should pay: the entropy; for the operation minus the KL divergence to what a new policy
        does (`OP_PRIOR`), up to a constant, in the same unit.
    flag
        See `MaskedCategorical`.
    """

    log_prob_TRH: Tensor
    entropy_TRH: Tensor
    freedom_TRH: Tensor
    value_TR: Tensor
    flag: Tensor | None


OP_PRIOR = {Op.ADVANCE: 2.0, Op.FOSSILIZE: 2.0, Op.SET_ALPHA_TARGET: -2.0, Op.CULL: -3.0}
"""Logits of a new policy, others 0: it sees seeds through, or none would live to show its worth."""


class FactoredRecurrentActorCritic(nn.Module):
    """Policy over the eight heads, and value. Its weights mean nothing before `initialise` or a state dict.

    Parameters
    ----------
    config
        Sizes.
    """

    prior_O: Tensor

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        width, hidden = config.width, config.hidden
        self.validation = Validation.from_environment()
        self.statistics = RunningStatistics(len(RUNNING_FEATURES))
        # Torch's layers draw from its global generator, which nobody else here uses or disturbs.
        with torch.random.fork_rng(devices=[]):
            self.slot_input = nn.Linear(len(SLOT_FEATURES), width)
            self.run_input = nn.Linear(len(RUN_FEATURES), width)
            self.encoder = nn.ModuleList(
                nn.TransformerEncoderLayer(
                    width, config.attention_heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True
                )
                for _ in range(config.layers)
            )
            self.memory_norm = nn.LayerNorm(width)
            self.memory = nn.LSTM(width, hidden)
            self.output_norm = nn.LayerNorm(hidden)
            self.op_head = nn.Linear(hidden, len(Op))
            self.op_embedding = nn.Embedding(len(Op), width)
            self.slot_query = nn.Linear(hidden, width)
            self.slot_key = nn.Linear(width, width, bias=False)
            self.rest_input = nn.Linear(hidden + width, width)
            self.rest_head = nn.Linear(width, sum(REST_SIZES))
            self.value_head = nn.Sequential(nn.Linear(hidden, width), nn.ReLU(), PopArt(width))
        prior_O = torch.tensor([OP_PRIOR.get(op, 0.0) for op in Op])
        self.register_buffer("prior_O", prior_O, persistent=False)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw the weights: orthogonal, policy heads small, so that a new policy is uniform but for `OP_PRIOR`.

        The output of the value is 0: whatever the scale of the returns is, a critic that knows nothing says nothing.
        """
        gain = {"op_head": 0.01, "slot_query": 0.1, "rest_head": 0.01, "value_head.2.linear": 0.0}
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.orthogonal_(module.weight, gain.get(name, math.sqrt(2)), generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.MultiheadAttention):
                nn.init.xavier_uniform_(module.in_proj_weight, generator=generator)
                nn.init.zeros_(module.in_proj_bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.1, generator=generator)
        self.op_head.bias.copy_(self.prior_O)
        hidden = self.config.hidden
        for name, parameter in self.memory.named_parameters():
            if name.startswith("weight"):
                for block in parameter.split(hidden):
                    nn.init.orthogonal_(block, generator=generator)
            else:
                nn.init.zeros_(parameter)
        # The forget gate, once: torch adds both bias vectors.
        self.memory.get_parameter("bias_ih_l0")[hidden : 2 * hidden] = 1.0

    @property
    def value_output(self) -> PopArt:
        """The layer that knows the scale of the returns."""
        return cast(PopArt, self.value_head[-1])

    def initial_hidden(self, rows: int) -> Hidden:
        """Give the memory before the first decision of an episode: zeros, without gradient.

        For `get_action` alone. Learning must not start from a state that a rollout stored, because no gradient flows
        through it: `evaluate_actions` takes whole episodes and no hidden state, and makes the same zeros itself.
        """
        zeros = self.op_head.weight.new_zeros(1, rows, self.config.hidden)
        return zeros, zeros.clone()

    @torch.no_grad()
    def get_action(
        self,
        observation: Observation,
        masks: ActionMasks,
        hidden: Hidden,
        uniform_RH: Tensor,
        *,
        greedy: bool = False,
        uniform_share: float = 0.0,
    ) -> Decision:
        """Decide once for all rows.

        Parameters
        ----------
        observation
            Of one decision, without T.
        masks
            Of the same slots.
        hidden
            Memory after the decision before, or `initial_hidden`.
        uniform_RH
            In [0, 1): one number for each head.
        greedy
            Take the most likely choice of each head instead of sampling; the numbers are not used.
        uniform_share
            Share of a uniform choice in every head (see `MaskedCategorical`), for exploring.
        """
        tokens, memory, hidden = self._remember(
            observation.slot_RSF[None], observation.run_RF[None], hidden, masks.op_RO.shape[0]
        )
        tokens, memory = tokens[0], memory[0]
        op_logits = self.op_head(memory)
        op_R = self._draw(op_logits, masks.op_RO, uniform_RH[:, Head.OP], greedy, uniform_share)
        slot_logits = self._slot_logits(memory, tokens, op_R)
        slot_R = self._draw(slot_logits, masks.slot_given(op_R), uniform_RH[:, Head.SLOT], greedy, uniform_share)
        mask_RHC = masks.chosen(op_R, slot_R)
        logits_RHC = self._all_logits(op_logits, slot_logits, memory, tokens, op_R, slot_R)
        choices = self._distribution(logits_RHC, mask_RHC, uniform_share)
        action_RH = choices.mode() if greedy else choices.sample(uniform_RH)
        action_RH[:, Head.OP], action_RH[:, Head.SLOT] = op_R, slot_R
        value_R = self.value_head(memory)
        return Decision(
            action_RH, mask_RHC, choices.log_prob(action_RH), choices.entropy(), value_R, hidden, choices.flag
        )

    def evaluate_actions(
        self, observation: Observation, action_TRH: Tensor, mask_TRHC: Tensor, *, uniform_share: float = 0.0
    ) -> Evaluation:
        """Score recorded actions of whole episodes, from their first decision, under the present weights.

        Parameters
        ----------
        observation
            [T, R, ...] of every decision.
        action_TRH, mask_TRHC
            As `get_action` gave them.
        uniform_share
            With which they were sampled.
        """
        rows = action_TRH.shape[1]
        tokens, memory, _ = self._remember(observation.slot_RSF, observation.run_RF, self.initial_hidden(rows), rows)
        op_TR, slot_TR = action_TRH[..., Head.OP], action_TRH[..., Head.SLOT]
        slot_logits = self._slot_logits(memory, tokens, op_TR)
        logits = self._all_logits(self.op_head(memory), slot_logits, memory, tokens, op_TR, slot_TR)
        choices = self._distribution(logits, mask_TRHC, uniform_share)
        value_TR = self.value_head(memory)
        entropy_TRH = choices.entropy()
        # Only the operation has a prior: the other heads are pulled to uniform choices, which is what they start from.
        op_TRC = choices.probs[..., Head.OP, : len(Op)]
        ways_TR = choices.valid_count[..., Head.OP].clamp_min(2).to(op_TRC.dtype).log()
        freedom_TRH = entropy_TRH.clone()
        freedom_TRH[..., Head.OP] += (op_TRC * self.prior_O).sum(-1) / ways_TR
        return Evaluation(choices.log_prob(action_TRH), entropy_TRH, freedom_TRH, value_TR, choices.flag)

    def _distribution(self, logits: Tensor, mask: Tensor, uniform_share: float) -> MaskedCategorical:
        return MaskedCategorical(logits, mask, uniform_share=uniform_share, validation=self.validation)

    def _draw(self, logits: Tensor, mask: Tensor, uniform: Tensor, greedy: bool, uniform_share: float) -> Tensor:
        """Draw a choice that later heads depend on; it is validated and scored with all heads together."""
        choices = MaskedCategorical(logits, mask, uniform_share=uniform_share, validation=Validation.OFF)
        return choices.mode() if greedy else choices.sample(uniform)

    def _remember(self, slot: Tensor, run: Tensor, hidden: Hidden, rows: int) -> tuple[Tensor, Tensor, Hidden]:
        """Slot tokens [T, R, S, D], memory [T, R, hidden] and the last hidden state."""
        known = len(RUNNING_FEATURES)
        run = torch.cat((self.statistics(run[..., :known]), run[..., known:]), -1)
        tokens = torch.cat((self.run_input(run)[:, :, None], self.slot_input(slot)), 2).flatten(0, 1)
        for layer in self.encoder:
            tokens = layer(tokens)
        tokens = tokens.unflatten(0, (-1, rows))
        memory, hidden = self.memory(self.memory_norm(tokens[:, :, 0]), hidden)
        return tokens[:, :, 1:], self.output_norm(memory), hidden

    def _slot_logits(self, memory: Tensor, tokens: Tensor, op: Tensor) -> Tensor:
        """Logits [..., S]: how well each slot's key answers the query of memory and operation."""
        query: Tensor = self.slot_query(memory) + self.op_embedding(op)
        logits: Tensor = (self.slot_key(tokens) * query[..., None, :]).sum(-1) / math.sqrt(self.config.width)
        return logits

    def _all_logits(
        self, op_logits: Tensor, slot_logits: Tensor, memory: Tensor, tokens: Tensor, op: Tensor, slot: Tensor
    ) -> Tensor:
        """Logits [..., H, C] of all heads given operation and slot, padded; masks hide the padding."""
        at = slot[..., None, None].expand(*slot.shape, 1, tokens.shape[-1])
        chosen = tokens.gather(-2, at).squeeze(-2) + self.op_embedding(op)
        rest = self.rest_head(F.relu(self.rest_input(torch.cat((memory, chosen), -1))))
        width = choice_count(slot_logits.shape[-1])
        places = _rest_places(width, rest.device)
        padded = rest[..., places]
        first = [F.pad(part.to(rest.dtype), (0, width - part.shape[-1])) for part in (op_logits, slot_logits)]
        return torch.cat((torch.stack(first, -2), padded), -2)


@cache
def _rest_places(width: int, device: torch.device) -> Tensor:
    """Int64 [len(REST), width]: where each choice of the heads behind the slot stands in one flat output."""
    places = torch.zeros(HEAD_COUNT - 2, width, dtype=torch.int64)
    start = 0
    for row, size in enumerate(REST_SIZES):
        places[row, :size] = torch.arange(start, start + size)
        start += size
    return places.to(device)
