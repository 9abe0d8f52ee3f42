"""The slot tensors: emptiness, copies, the host copy, and what is legal."""

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.leyline.actions import Blueprint, Op, Operator
from esper.leyline.slots import (
    EMPTY_SLOT,
    STAGES_OF_OP,
    AlphaMode,
    SlotTensors,
    gradual_cull_legal,
    legal_choice,
    legal_ops,
)
from esper.leyline.stages import Stage

MEASUREMENTS = {
    *("contribution", "contribution_se", "incubator_gain", "incubator_gain_se", "gradient_norm", "gradient_ratio"),
}
names = pytest.mark.parametrize("name", [f.name for f in fields(SlotTensors)])

STATES = {
    "stage": list(Stage),
    "alpha_mode": list(AlphaMode),
    "alpha": [0.0, 1e-6, 0.35, 1.0],
    "alpha_target": [0.0, 0.5, 1.0],
    "blueprint": list(Blueprint),
    "operator": list(Operator),
    "seed_id": [-1, 0, 1, 40],
}


def slot_of(code):
    """The slot with a number: a digit for each of `STATES`. One draw a slot keeps the examples cheap."""
    slot = {}
    for name, choices in STATES.items():
        code, digit = divmod(code, len(choices))
        slot[name] = choices[digit]
    return slot


slot_dicts = st.integers(0, math.prod(map(len, STATES.values())) - 1).map(slot_of)


@st.composite
def populations(draw):
    """Up to three rows of 1 to 20 slots in any state, as plain dictionaries."""
    slots = draw(st.integers(1, 20))
    row = st.lists(slot_dicts, min_size=slots, max_size=slots)
    return draw(st.lists(row, min_size=1, max_size=3))


def fit_tables(slots):
    """Which blueprints fit each of so many slots: none, or some."""
    sets = st.integers(0, 2 ** len(Blueprint) - 1).map(lambda code: {b for b in Blueprint if code >> b & 1})
    return st.lists(st.just(set()) | sets, min_size=slots, max_size=slots)


def tensors(rows):
    state = SlotTensors.empty(len(rows), len(rows[0]))
    for r, row in enumerate(rows):
        for s, slot in enumerate(row):
            for name, value in slot.items():
                getattr(state, name)[r, s] = value
    return state


def legal_for(slot, something_fits):
    """What the design allows on one slot, in words."""
    stage, resting = slot["stage"].name, slot["alpha_mode"] is AlphaMode.HOLD
    fading_out = stage == "BLENDING" and slot["alpha_target"] == 0
    return {
        "WAIT": True,
        "GERMINATE": stage == "DORMANT" and something_fits,
        "SET_ALPHA_TARGET": stage in ("BLENDING", "PROBATIONARY") and resting,
        "CULL": stage in ("GERMINATED", "TRAINING", "BLENDING", "PROBATIONARY"),
        "FOSSILIZE": stage == "PROBATIONARY",
        "ADVANCE": stage in ("GERMINATED", "TRAINING", "BLENDING") and not fading_out,
    }


@given(populations(), st.data())
def test_legal_ops_against_one_slot_at_a_time(rows, data):
    slots = len(rows[0])
    fits = data.draw(fit_tables(slots))
    fits_SB = torch.tensor([[b in fitting for b in Blueprint] for fitting in fits])
    legal_ROS = legal_ops(tensors(rows), fits_SB)
    assert legal_ROS.shape == (len(rows), len(Op), slots)
    for r, row in enumerate(rows):
        for s, slot in enumerate(row):
            given_legal = {op.name: bool(legal_ROS[r, op, s]) for op in Op}
            assert given_legal == legal_for(slot, bool(fits[s])), slot


@given(populations(), st.data())
def test_legal_choice_is_one_place_of_legal_ops(rows, data):
    slots = len(rows[0])
    fits = data.draw(fit_tables(slots))
    fits_SB = torch.tensor([[b in fitting for b in Blueprint] for fitting in fits])
    # Every row once for every operation and place.
    chosen = [(row, op, place) for row in rows for op in Op for place in range(slots)]
    state, times = tensors(rows), len(Op) * slots
    repeated = {f.name: getattr(state, f.name).repeat_interleave(times, 0) for f in fields(SlotTensors)}
    ops, places = (torch.tensor([int(c[column]) for c in chosen]) for column in (1, 2))
    legal_R = legal_choice(SlotTensors(**repeated), fits_SB, ops, places)
    assert legal_R.tolist() == [legal_for(row[place], bool(fits[place]))[op.name] for row, op, place in chosen]


def test_stages_of_op():
    # The stages in which each operation may name a slot, apart from alpha and blueprints; WAIT names none.
    assert {op.name: {stage.name for stage in stages} for op, stages in STAGES_OF_OP.items()} == {
        "GERMINATE": {"DORMANT"},
        "SET_ALPHA_TARGET": {"BLENDING", "PROBATIONARY"},
        "CULL": {"GERMINATED", "TRAINING", "BLENDING", "PROBATIONARY"},
        "FOSSILIZE": {"PROBATIONARY"},
        "ADVANCE": {"GERMINATED", "TRAINING", "BLENDING"},
    }


@given(populations())
def test_gradual_cull_needs_a_blended_seed_at_rest(rows):
    legal_RS = gradual_cull_legal(tensors(rows))
    expected = [[legal_for(slot, False)["SET_ALPHA_TARGET"] for slot in row] for row in rows]
    assert legal_RS.tolist() == expected


@given(populations())
def test_a_gradual_cull_is_a_cull(rows):
    state = tensors(rows)
    cull_RS = legal_ops(state, torch.zeros(state.slots, len(Blueprint), dtype=torch.bool))[:, Op.CULL]
    assert not (gradual_cull_legal(state) & ~cull_RS).any()


def test_a_retired_stage_allows_only_waiting():
    state = SlotTensors.empty(1, 1)
    state.stage[:] = 5
    legal = legal_ops(state, torch.ones(1, len(Blueprint), dtype=torch.bool))[0, :, 0]
    assert legal.tolist() == [op is Op.WAIT for op in Op]


@given(populations())
def test_structure_round_trip(rows):
    structure = tensors(rows).structure()
    for r, row in enumerate(rows):
        for s, slot in enumerate(row):
            for name in ("stage", "blueprint", "operator", "seed_id"):
                assert getattr(structure, name)[r, s] == slot[name]
            assert structure.visible[r, s] == (slot["alpha"] > 0)
            assert structure.fading[r, s] == (slot["stage"].name == "BLENDING" and slot["alpha_target"] == 0)
            in_forward = slot["stage"].name in ("BLENDING", "PROBATIONARY", "FOSSILIZED") and slot["alpha"] > 0
            assert structure.blended()[r, s] == in_forward
    assert structure.visible.dtype == structure.fading.dtype == structure.blended().dtype == np.bool_

    back = SlotTensors.empty(len(rows), len(rows[0]))
    for name in ("stage", "blueprint", "operator", "seed_id"):
        setattr(back, name, torch.from_numpy(getattr(structure, name)))
    back.alpha = torch.from_numpy(structure.visible).float()
    back.alpha_target = torch.from_numpy(~structure.fading).float()
    again = back.structure()
    for field in fields(structure):
        assert np.array_equal(getattr(again, field.name), getattr(structure, field.name)), field.name


def test_structure_is_a_copy():
    state = SlotTensors.empty(2, 2)
    structure = state.structure()
    state.stage[:] = int(Stage.TRAINING)
    state.seed_id[:] = 4
    assert (structure.stage == int(Stage.DORMANT)).all()
    assert (structure.seed_id == -1).all()


def test_an_unmeasured_alpha_is_not_visible():
    # A seed whose alpha went wrong must not reach its host.
    state = SlotTensors.empty(1, 1)
    state.stage[:] = int(Stage.BLENDING)
    state.alpha[:] = float("nan")
    assert not state.structure().blended().any()


@names
def test_empty(name):
    state = SlotTensors.empty(3, 4)
    array = getattr(state, name)
    if name == "seeds_made":
        assert array.tolist() == [0, 0, 0]
        return
    assert array.shape == (3, 4)
    quantity = name in MEASUREMENTS | {"alpha", "alpha_start", "alpha_target"}
    assert array.dtype == (torch.float32 if quantity else torch.int64)
    # What was not measured is NaN, never 0.
    assert bool(array.isnan().all()) is (name in MEASUREMENTS)
    expected = {"stage": Stage.DORMANT, "seed_id": -1}.get(name, 0)
    assert name in MEASUREMENTS or (array == expected).all()


def test_empty_slot_names_every_array():
    assert set(EMPTY_SLOT) == {f.name for f in fields(SlotTensors)} - {"seeds_made"}


def test_rows_and_slots():
    state = SlotTensors.empty(3, 4)
    assert (state.rows, state.slots, state.device.type) == (3, 4, "cpu")


@names
def test_clone_is_deep(name):
    state = SlotTensors.empty(2, 3)
    copy = state.clone()
    assert torch.equal(getattr(copy, name), getattr(state, name)) or name in MEASUREMENTS
    assert getattr(copy, name).dtype == getattr(state, name).dtype
    getattr(copy, name).fill_(7)
    assert not (getattr(state, name) == 7).any()
    getattr(state, name).fill_(9)
    assert (getattr(copy, name) == 7).all()


def test_arrays_do_not_share_memory():
    state = SlotTensors.empty(2, 2)
    assert len({getattr(state, f.name).data_ptr() for f in fields(SlotTensors)}) == len(fields(SlotTensors))


@pytest.mark.parametrize("stage", list(Stage), ids=lambda s: s.name)
@pytest.mark.parametrize("target", [0.0, 0.5])
def test_fading(stage, target):
    state = SlotTensors.empty(1, 1)
    state.stage[:] = int(stage)
    state.alpha_target[:] = target
    assert state.fading_RS().item() is (stage is Stage.BLENDING and target == 0)
