"""The masks of the eight heads against a plain model and against the engine."""

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from esper.kasmina.lifecycle import Lifecycle
from esper.leyline.actions import HEAD_COUNT, HEADS_OF_OP, Blueprint, Head, Op
from esper.leyline.checks import ALL_GATE_CHECKS, GateReport
from esper.leyline.errors import EsperError
from esper.leyline.slots import AlphaMode, SlotTensors
from esper.leyline.stages import Stage
from esper.tamiyo.policy.action_masks import (
    ActionMasks,
    choice_count,
    compute_action_masks,
    compute_batch_masks,
    slot_id_to_index,
)
from helpers.lifecycle_pair import FITS_SB, SIZES, SLOTS, make_lifecycle
from helpers.mask_oracle import RowMasks, plain_rows

STAGES = torch.tensor([int(stage) for stage in Stage])
TARGETS = torch.tensor([0.0, 0.5, 0.7, 1.0])


def random_slots(rows: int, slots: int, seed: int) -> SlotTensors:
    """Any stage with any mode and target, whether the engine could reach it or not."""
    generator = torch.Generator().manual_seed(seed)

    def pick(values: torch.Tensor) -> torch.Tensor:
        return values[torch.randint(len(values), (rows, slots), generator=generator)]

    state = SlotTensors.empty(rows, slots)
    state.stage, state.alpha_mode, state.alpha_target = pick(STAGES), pick(torch.arange(3)), pick(TARGETS)
    return state


def random_fits(slots: int, share: float, seed: int) -> torch.Tensor:
    return torch.rand(slots, len(Blueprint), generator=torch.Generator().manual_seed(seed + 1)) < share


def choices(mask_C: torch.Tensor) -> set[int]:
    return set(mask_C.nonzero()[:, 0].tolist())


def plain_masks(slots: SlotTensors, fits_SB: torch.Tensor) -> list[RowMasks]:
    fitting = [choices(fits_B) for fits_B in fits_SB]
    return [RowMasks(row, fitting) for row in plain_rows(slots)]


def masks_of(slots: SlotTensors, fits_SB: torch.Tensor) -> ActionMasks:
    return compute_batch_masks(slots, ActionMasks.empty(slots.rows, fits_SB))


RANDOM_STATE = {
    "rows": st.integers(1, 5),
    "slots": st.integers(1, 6) | st.integers(1, 100),
    "share": st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    "seed": st.integers(0, 2**40),
}


@settings(max_examples=150)
@example(rows=3, slots=100, share=0.05, seed=0)
@example(rows=2, slots=1, share=0.0, seed=0)
@given(**RANDOM_STATE)
def test_what_is_open_equals_the_plain_model(rows: int, slots: int, share: float, seed: int) -> None:
    state, fits_SB = random_slots(rows, slots, seed), random_fits(slots, share, seed)
    masks = masks_of(state, fits_SB)
    for r, plain in enumerate(plain_masks(state, fits_SB)):
        assert choices(masks.op_RO[r]) == plain.ops()
        assert choices(masks.gradual_RS[r]) == plain.gradual()
        for op in Op:
            assert choices(masks.slot_ROS[r, op]) == plain.slots_of(op)
            given_RS = masks.slot_given(torch.full((rows,), int(op)))
            assert choices(given_RS[r]) == plain.slots_of(op)


@settings(max_examples=100)
@example(rows=2, slots=100, share=0.3, seed=0)
@given(**RANDOM_STATE)
def test_the_heads_of_every_legal_operation_and_slot_equal_the_plain_model(
    rows: int, slots: int, share: float, seed: int
) -> None:
    """Rows name different operations and slots in one call."""
    state, fits_SB = random_slots(rows, slots, seed), random_fits(slots, share, seed)
    masks, plain = masks_of(state, fits_SB), plain_masks(state, fits_SB)
    legal = [[(op, s) for op in sorted(row.ops()) for s in sorted(row.slots_of(op))] for row in plain]
    for turn in range(min(60, max(len(pairs) for pairs in legal))):
        pairs = [row[(turn * 7 + r) % len(row)] for r, row in enumerate(legal)]
        op_R, slot_R = torch.tensor(pairs).T
        mask_RHC = masks.chosen(op_R, slot_R)
        assert mask_RHC.dtype == torch.bool
        assert mask_RHC.shape == (rows, HEAD_COUNT, choice_count(slots))
        for r, (op, slot) in enumerate(pairs):
            told = {head: choices(mask_RHC[r, head]) for head in Head}
            assert told == plain[r].chosen(op, slot)
            assert all(told.values()), "a head without a choice"
            assert all(told[head] == {0} for head in Head if head not in HEADS_OF_OP[op])


@given(**RANDOM_STATE)
def test_wait_is_always_open(rows: int, slots: int, share: float, seed: int) -> None:
    masks = masks_of(random_slots(rows, slots, seed), random_fits(slots, share, seed))
    assert masks.op_RO[:, Op.WAIT].all()
    nothing = torch.zeros(rows, dtype=torch.int64)
    mask_RHC = masks.chosen(nothing, nothing)
    assert (mask_RHC[:, 1:].sum(-1) == 1).all()
    assert mask_RHC[:, 1:, 0].all()


# --- Against the engine ---

NOTHING_FITS_SLOT_1 = FITS_SB.clone()
NOTHING_FITS_SLOT_1[1] = False
FITS = {"mixed": FITS_SB, "nothing fits slot 1": NOTHING_FITS_SLOT_1, "nothing fits": torch.zeros_like(FITS_SB)}


def every_action() -> torch.Tensor:
    """Int64 [A, H]: every operation with every choice of the heads that it uses, the others 0."""
    return torch.tensor(
        [
            (int(op), *rest)
            for op in Op
            for rest in itertools.product(
                *(range(SIZES[head]) if head in HEADS_OF_OP[op] else (0,) for head in list(Head)[1:])
            )
        ]
    )


ACTIONS = every_action()


def gates(rows: int, passed: bool) -> GateReport:
    shape = (len(ALL_GATE_CHECKS), rows, SLOTS.slots)
    return GateReport(torch.zeros(shape), torch.full(shape, passed), torch.zeros(shape))


def reachable(lifecycle: Lifecycle, fits_SB: torch.Tensor, seed: int) -> SlotTensors:
    """States seen on the way of random actions, one of each kind, as rows."""
    rows, decisions, generator = 24, 36, torch.Generator().manual_seed(seed)
    slots = SlotTensors.empty(rows, SLOTS.slots)
    seen: dict[tuple[float, ...], SlotTensors] = {}
    for _ in range(decisions):
        for r in range(rows):
            kind = torch.stack((slots.stage[r], slots.alpha_mode[r], slots.fading_RS()[r])).flatten()
            seen.setdefault(tuple(kind.tolist()), slots.of_rows(slice(r, r + 1)).clone())
        actions = torch.stack([torch.randint(SIZES[head], (rows,), generator=generator) for head in Head], 1)
        # Seeds that fit, so that there is something to see; fossils are an end and come seldom.
        fitting_RB = fits_SB[actions[:, Head.SLOT]].float() + 1e-9
        actions[:, Head.BLUEPRINT] = fitting_RB.multinomial(1, generator=generator)[:, 0]
        seldom = (actions[:, Head.OP] == int(Op.FOSSILIZE)) & (torch.rand(rows, generator=generator) < 0.7)
        actions[:, Head.OP].masked_fill_(seldom, int(Op.ADVANCE))
        lifecycle.apply(slots, actions, gates(rows, True))
        lifecycle.tick(slots)
    states = list(seen.values())
    return SlotTensors(**{name: torch.cat([vars(state)[name] for state in states]) for name in vars(slots)})


def repeated(slots: SlotTensors, row: int, times: int) -> SlotTensors:
    """One row many times over."""
    repeated = {name: value[row].expand(times, *value.shape[1:]).clone() for name, value in vars(slots).items()}
    return SlotTensors(**repeated)


def open_actions(slots: SlotTensors, fits_SB: torch.Tensor) -> torch.Tensor:
    """Bool [A]: the masks of all heads hold at the choices of `ACTIONS`."""
    mask_AHC = masks_of(slots, fits_SB).chosen(ACTIONS[:, Head.OP], ACTIONS[:, Head.SLOT])
    return mask_AHC.gather(2, ACTIONS[:, :, None])[:, :, 0].all(1)


@pytest.mark.parametrize("fits", FITS)
@pytest.mark.parametrize("seed", range(2))
def test_a_mask_is_true_exactly_where_the_engine_accepts(fits: str, seed: int) -> None:
    """Every operation with every choice of its heads, on every kind of state that random lives come by."""
    fits_SB = FITS[fits]
    lifecycle = make_lifecycle(2, fits_SB)
    states = reachable(lifecycle, fits_SB, seed)
    gated_A = (ACTIONS[:, Head.OP] == int(Op.ADVANCE)) | (ACTIONS[:, Head.OP] == int(Op.FOSSILIZE))
    gate_checks = torch.tensor([int(check) for check in ALL_GATE_CHECKS])
    for row in range(states.rows):
        slots = repeated(states, row, len(ACTIONS))
        open_A = open_actions(slots, fits_SB)
        accepted_A = lifecycle.apply(slots.clone(), ACTIONS, gates(len(ACTIONS), True)).accepted
        assert torch.equal(accepted_A, open_A)
        closed = lifecycle.apply(slots, ACTIONS, gates(len(ACTIONS), False))
        assert torch.equal(closed.accepted, open_A & ~gated_A)
        assert torch.isin(closed.refused_by[open_A & gated_A], gate_checks).all()
        assert not torch.isin(closed.refused_by[~open_A], gate_checks).any(), "structure is asked before gates"
        assert accepted_A[ACTIONS[:, Head.OP] == int(Op.WAIT)].all()


def test_the_states_compared_with_the_engine_are_of_every_kind() -> None:
    states = reachable(make_lifecycle(2), FITS_SB, 0)
    assert states.rows > 100
    assert set(states.stage.flatten().tolist()) == {int(stage) for stage in Stage if stage is not Stage.UNKNOWN}
    assert set(states.alpha_mode.flatten().tolist()) == {int(mode) for mode in AlphaMode}
    assert states.fading_RS().any()
    opened = torch.stack([open_actions(repeated(states, row, len(ACTIONS)), FITS_SB) for row in range(states.rows)])
    # Only the waiting is open everywhere, and only what never fits is open nowhere.
    fits = (ACTIONS[:, Head.OP] != int(Op.GERMINATE)) | FITS_SB[ACTIONS[:, Head.SLOT], ACTIONS[:, Head.BLUEPRINT]]
    assert torch.equal(opened.any(0), fits)
    assert torch.equal(opened.all(0), ACTIONS[:, Head.OP] == int(Op.WAIT))


@pytest.mark.parametrize("seed", range(2))
def test_what_stands_in_an_unused_head_does_not_move_the_engine(seed: int) -> None:
    """So that one choice, 0, is enough there."""
    lifecycle = make_lifecycle(2)
    states = reachable(lifecycle, FITS_SB, seed)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.stack([torch.randint(SIZES[head], (len(ACTIONS),), generator=generator) for head in Head], 1)
    used = torch.tensor([[head in HEADS_OF_OP[op] for head in Head] for op in Op])[ACTIONS[:, Head.OP]]
    for row in range(0, states.rows, 10):
        slots, noisy = (repeated(states, row, len(ACTIONS)) for _ in range(2))
        told = lifecycle.apply(slots, ACTIONS, gates(len(ACTIONS), True))
        other = lifecycle.apply(noisy, torch.where(used, ACTIONS, noise), gates(len(ACTIONS), True))
        assert torch.equal(told.accepted, other.accepted)
        torch.testing.assert_close(vars(slots), vars(noisy), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("slot", range(SLOTS.slots))
def test_a_dormant_row_may_germinate_what_fits_and_nothing_else(slot: int) -> None:
    """The masks of one case, written out."""
    masks = masks_of(SlotTensors.empty(1, SLOTS.slots), FITS_SB)
    assert choices(masks.op_RO[0]) == {Op.WAIT, Op.GERMINATE}
    mask_HC = masks.chosen(torch.tensor([int(Op.GERMINATE)]), torch.tensor([slot]))[0]
    assert choices(mask_HC[Head.SLOT]) == {0, 1, 2}
    assert torch.equal(mask_HC[Head.BLUEPRINT, : len(Blueprint)], FITS_SB[slot])
    assert [len(choices(mask_HC[head])) for head in list(Head)[3:]] == [4, 3, 3, 1, 1]


# --- One row, names, memory ---


@given(**RANDOM_STATE)
def test_one_row_equals_its_row_of_the_batch(rows: int, slots: int, share: float, seed: int) -> None:
    state, fits_SB = random_slots(rows, slots, seed), random_fits(slots, share, seed)
    batch = masks_of(state, fits_SB)
    generator = torch.Generator().manual_seed(seed)
    op_R, slot_R = (torch.randint(size, (rows,), generator=generator) for size in (len(Op), slots))
    chosen_RHC = batch.chosen(op_R, slot_R)
    for row in range(rows):
        alone, one = compute_action_masks(state, row, fits_SB), slice(row, row + 1)
        for name in ("op_RO", "slot_ROS", "gradual_RS"):
            assert torch.equal(getattr(alone, name), getattr(batch, name)[one])
        assert torch.equal(alone.chosen(op_R[one], slot_R[one]), chosen_RHC[one])


def test_a_slot_is_found_by_its_name() -> None:
    assert [slot_id_to_index(name, SLOTS) for name in SLOTS.slot_ids] == [0, 1, 2]


@pytest.mark.parametrize("name", ["r0c3", "R0C0", "", "0"])
def test_an_unknown_slot_is_one_line_with_the_known_ones(name: str) -> None:
    with pytest.raises(EsperError, match=f"^slot: unknown slot '{name}'; known: r0c0, r0c1, r0c2$"):
        slot_id_to_index(name, SLOTS)


def test_masks_are_filled_anew_in_the_same_memory() -> None:
    fits_SB = random_fits(7, 0.3, 0)
    masks = ActionMasks.empty(4, fits_SB)
    tensors = {name: value for name, value in vars(masks).items() if isinstance(value, torch.Tensor)}
    pointers = {name: value.data_ptr() for name, value in tensors.items()}
    templates = masks.heads_OHC.clone()
    for seed in range(20):
        slots = random_slots(4, 7, seed)
        before = slots.clone()
        assert compute_batch_masks(slots, masks) is masks
        masks.chosen(torch.tensor([1, 2, 3, 4]), torch.tensor([6, 2, 0, 5])).fill_(True)
        masks.slot_given(torch.tensor([1, 2, 3, 4])).fill_(True)
        fresh = masks_of(slots, fits_SB)
        for name in tensors:
            assert torch.equal(getattr(masks, name), getattr(fresh, name)), name
            assert getattr(masks, name).data_ptr() == pointers[name]
        torch.testing.assert_close(vars(slots), vars(before), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(masks.heads_OHC, templates)
    assert torch.equal(fits_SB, random_fits(7, 0.3, 0))


def test_no_value_is_read_back() -> None:
    """Tensors on the meta device have no values: reading one raises."""
    slots, fits_SB = SlotTensors.empty(3, 5, "meta"), torch.ones(5, len(Blueprint), dtype=torch.bool, device="meta")
    masks = compute_batch_masks(slots, ActionMasks.empty(3, fits_SB))
    index = torch.zeros(3, dtype=torch.int64, device="meta")
    assert masks.chosen(index, index).shape == (3, HEAD_COUNT, choice_count(5))
    assert masks.slot_given(index).shape == (3, 5)
    assert compute_action_masks(slots, 2, fits_SB).op_RO.device.type == "meta"
