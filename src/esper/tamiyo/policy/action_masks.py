"""What is structurally possible, as boolean masks of the eight heads for a whole population.

The policy is autoregressive: the mask of the slot depends on the operation, the masks of the other heads on the
operation and the slot. A head that the operation does not use has exactly one choice, 0, so that it adds nothing to
log-probability, entropy or gradient. Only what is impossible is masked: WAIT never is, and gates, which judge a seed
and not the structure, are not asked. Everything is derived from `leyline`: `VALID_TRANSITIONS`, `HEADS_OF_OP`,
`legal_ops`.

Shape suffixes: R rows, S slots, O operations, H heads, B blueprints, C choices (of the widest head).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from esper.leyline.actions import ALPHA_SPEEDS, HEAD_COUNT, HEADS_OF_OP, Head, Op, head_sizes
from esper.leyline.errors import EsperError
from esper.leyline.sites import SlotConfig
from esper.leyline.slots import SlotTensors, gradual_cull_legal, legal_ops


def slot_id_to_index(slot_id: str, config: SlotConfig) -> int:
    """Position of a slot in action order.

    Raises
    ------
    EsperError
        There is no such slot.
    """
    if slot_id not in config.slot_ids:
        raise EsperError(f"slot: unknown slot {slot_id!r}; known: {', '.join(config.slot_ids)}")
    return config.slot_ids.index(slot_id)


def choice_count(slots: int) -> int:
    """C: choices of the widest head for a host with `slots` sites."""
    return max(head_sizes(slots).values())


@dataclass(frozen=True)
class ActionMasks:
    """Masks of one decision, made once for a population and filled anew by `compute_batch_masks`.

    Attributes
    ----------
    op_RO
        Operations that some slot allows.
    slot_ROS
        Slots that an operation may name; for WAIT, which names none, slot 0 alone.
    gradual_RS
        Slots whose seed may be faded out: elsewhere a cull is at once.
    fits_SB
        Blueprints that fit a slot.
    heads_OHC
        What each operation leaves open in every head before slots are looked at.
    """

    op_RO: Tensor
    slot_ROS: Tensor
    gradual_RS: Tensor
    fits_SB: Tensor
    heads_OHC: Tensor

    @classmethod
    def empty(cls, rows: int, fits_SB: Tensor) -> ActionMasks:
        """Allocate the masks of a population of `rows` rows."""
        device, slots = fits_SB.device, len(fits_SB)
        sizes = head_sizes(slots)
        heads_OHC = torch.zeros(len(Op), HEAD_COUNT, choice_count(slots), dtype=torch.bool)
        for op in Op:
            for head in Head:
                heads_OHC[op, head, : sizes[head] if head in HEADS_OF_OP[op] else 1] = True
        op_RO = torch.zeros(rows, len(Op), dtype=torch.bool, device=device)
        slot_ROS = torch.zeros(rows, len(Op), slots, dtype=torch.bool, device=device)
        return cls(op_RO, slot_ROS, torch.zeros_like(slot_ROS[:, 0]), fits_SB, heads_OHC.to(device))

    def slot_given(self, op_R: Tensor) -> Tensor:
        """Bool [R, S]: slots that each row's operation may name."""
        return self.slot_ROS.gather(1, op_R[:, None, None].expand(-1, 1, self.slot_ROS.shape[2]))[:, 0]

    def chosen(self, op_R: Tensor, slot_R: Tensor) -> Tensor:
        """Bool [R, H, C]: the masks of all heads, each given the heads before it."""
        mask_RHC = self.heads_OHC[op_R]
        germinates_R1 = (op_R == int(Op.GERMINATE))[:, None]
        at_once_R1 = ((op_R == int(Op.CULL)) & ~self.gradual_RS.gather(1, slot_R[:, None])[:, 0])[:, None]
        blueprints, speeds = self.fits_SB.shape[1], len(ALPHA_SPEEDS)
        mask_RHC[:, Head.OP, : len(Op)] = self.op_RO
        mask_RHC[:, Head.SLOT, : self.slot_ROS.shape[2]] = self.slot_given(op_R)
        mask_RHC[:, Head.BLUEPRINT, :blueprints] &= self.fits_SB[slot_R] | ~germinates_R1
        speed_RC = mask_RHC[:, Head.ALPHA_SPEED, 1:speeds]
        speed_RC &= ~at_once_R1
        return mask_RHC


def compute_batch_masks(slots: SlotTensors, masks: ActionMasks) -> ActionMasks:
    """Fill the masks of a whole population from its slots, in place, and give them back."""
    legal_ROS = legal_ops(slots, masks.fits_SB)
    masks.slot_ROS.copy_(legal_ROS)
    torch.any(legal_ROS, 2, out=masks.op_RO)
    masks.slot_ROS[:, int(Op.WAIT), 1:] = False
    masks.gradual_RS.copy_(gradual_cull_legal(slots))
    return masks


def compute_action_masks(slots: SlotTensors, row: int, fits_SB: Tensor) -> ActionMasks:
    """Masks of one row: the case R = 1 of `compute_batch_masks`.

    Raises
    ------
    IndexError
        There is no such row.
    """
    if not 0 <= row < slots.rows:
        raise IndexError(f"row {row} given, 0 to {slots.rows - 1} exist")
    return compute_batch_masks(slots.of_rows(slice(row, row + 1)), ActionMasks.empty(1, fits_SB))
