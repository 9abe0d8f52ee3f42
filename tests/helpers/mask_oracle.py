"""A plain, slow model of the action masks: sets of choices, one slot at a time.

Written from `VALID_TRANSITIONS` and the rules of the operations, not from the tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from esper.leyline.actions import ALPHA_SPEEDS, HEADS_OF_OP, Head, Op, head_sizes
from esper.leyline.slots import AlphaMode, SlotTensors
from esper.leyline.stages import VALID_TRANSITIONS, Stage

Slot = dict[str, float]


def plain_rows(slots: SlotTensors) -> list[list[Slot]]:
    """What the masks may look at, as one dictionary for each slot of each row."""
    names = ("stage", "alpha_mode", "alpha_target")
    columns = {name: getattr(slots, name).tolist() for name in names}
    return [[{name: columns[name][r][s] for name in names} for s in range(slots.slots)] for r in range(slots.rows)]


def is_fading(slot: Slot) -> bool:
    """The seed is on its way out."""
    return slot["stage"] == Stage.BLENDING and slot["alpha_target"] == 0


def retargetable(slot: Slot) -> bool:
    """Alpha rests and may be sent somewhere else, 0 among it."""
    return slot["stage"] in (Stage.BLENDING, Stage.PROBATIONARY) and slot["alpha_mode"] == AlphaMode.HOLD


def allowed(op: Op, slot: Slot, fitting: set[int]) -> bool:
    """The operation may name the slot."""
    exits = VALID_TRANSITIONS[Stage(slot["stage"])]
    if op is Op.WAIT:
        return True
    if op is Op.GERMINATE:
        return Stage.GERMINATED in exits and len(fitting) > 0
    if op is Op.SET_ALPHA_TARGET:
        return retargetable(slot)
    if op is Op.CULL:
        return Stage.CULLED in exits
    if op is Op.FOSSILIZE:
        return Stage.FOSSILIZED in exits
    # What can be committed no longer advances: its way back to BLENDING is a new alpha target.
    onwards = exits & {Stage.TRAINING, Stage.BLENDING, Stage.PROBATIONARY}
    return len(onwards) > 0 and Stage.FOSSILIZED not in exits and not is_fading(slot)


@dataclass
class RowMasks:
    """Masks of one row as sets of choices."""

    slots: list[Slot]
    fitting: list[set[int]]

    def slots_of(self, op: Op) -> set[int]:
        """Slots that the operation may name; WAIT names none, which is written 0."""
        if op is Op.WAIT:
            return {0}
        return {s for s, slot in enumerate(self.slots) if allowed(op, slot, self.fitting[s])}

    def ops(self) -> set[Op]:
        """Operations that some slot allows."""
        return {op for op in Op if self.slots_of(op)}

    def gradual(self) -> set[int]:
        """Slots whose seed may be faded out."""
        return {s for s, slot in enumerate(self.slots) if retargetable(slot)}

    def chosen(self, op: Op, slot: int) -> dict[Head, set[int]]:
        """Choices of every head, the operation and then the slot being given."""
        choices: dict[Head, set[int]] = {}
        for head, size in head_sizes(len(self.slots)).items():
            choices[head] = set(range(size)) if head in HEADS_OF_OP[op] else {0}
        choices[Head.OP] = set(self.ops())
        choices[Head.SLOT] = self.slots_of(op)
        if op is Op.GERMINATE:
            choices[Head.BLUEPRINT] = set(self.fitting[slot])
        if op is Op.CULL and slot not in self.gradual():
            choices[Head.ALPHA_SPEED] = {ALPHA_SPEEDS.index(0)}
        return choices
