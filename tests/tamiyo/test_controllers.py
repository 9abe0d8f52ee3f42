"""What holds for every controller, and the plain ones: never, random, periodic."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tamiyo_views import CONFIG, FITS_SB, HORIZON, LIFE, NAN, S, act, make, play, slots_of, view_of

from esper.leyline.actions import BLUEPRINTS_OF_KIND, HEAD_COUNT, Blueprint, Head, Op, head_sizes
from esper.leyline.checks import Check
from esper.leyline.errors import EsperError
from esper.leyline.slots import AlphaMode, SlotTensors
from esper.leyline.stages import Stage
from esper.tamiyo.controllers.periodic import PeriodicController
from esper.tamiyo.controllers.registry import CONTROLLERS, make_controller


def may(op: Op, slots: SlotTensors, r: int, s: int) -> bool:
    """The rules of legality in plain words, for an engine-free second opinion."""
    stage, held = Stage(int(slots.stage[r, s])), int(slots.alpha_mode[r, s]) == AlphaMode.HOLD
    fading = stage is Stage.BLENDING and float(slots.alpha_target[r, s]) == 0
    return {
        Op.WAIT: True,
        Op.GERMINATE: stage is Stage.DORMANT,
        Op.SET_ALPHA_TARGET: stage in (Stage.BLENDING, Stage.PROBATIONARY) and held,
        Op.CULL: stage in (Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.PROBATIONARY),
        Op.FOSSILIZE: stage is Stage.PROBATIONARY,
        Op.ADVANCE: stage in (Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING) and not fading,
    }[op]


@st.composite
def random_states(draw: st.DrawFn) -> SlotTensors:
    rows = draw(st.integers(1, 6))
    slots = SlotTensors.empty(rows, S)
    for r in range(rows):
        for s in range(S):
            stage = draw(st.sampled_from([x for x in Stage if x is not Stage.UNKNOWN]))
            moving = stage is Stage.BLENDING and draw(st.booleans())
            slots.stage[r, s] = int(stage)
            slots.alpha_mode[r, s] = int(draw(st.sampled_from([AlphaMode.UP, AlphaMode.DOWN]))) if moving else 0
            slots.alpha_target[r, s] = draw(st.sampled_from([0.0, 0.5, 1.0])) if moving else 1.0
            slots.stage_age[r, s] = draw(st.integers(0, 20))
            slots.contribution[r, s] = draw(st.sampled_from([NAN, -0.1, 0.0, 0.1]))
    slots.seeds_made[:] = draw(st.integers(0, 30))
    return slots


@pytest.mark.parametrize("name", list(CONTROLLERS))
@settings(max_examples=60)
@given(slots=random_states(), decision=st.integers(0, HORIZON - 1), seed=st.integers(0, 2**40))
def test_every_action_is_structurally_legal(name: str, slots: SlotTensors, decision: int, seed: int) -> None:
    actions = act(make(name, slots.rows, seed=seed), view_of(slots, decision))
    assert actions.dtype == torch.int64
    assert actions.shape == (slots.rows, HEAD_COUNT)
    for r, action in enumerate(actions.tolist()):
        assert all(0 <= action[head] < size for head, size in head_sizes(S).items())
        op, s = Op(action[Head.OP]), action[Head.SLOT]
        assert may(op, slots, r, s)
        if op is Op.GERMINATE:
            assert Blueprint(action[Head.BLUEPRINT]) in BLUEPRINTS_OF_KIND[CONFIG.sites[s].kind]
        if op is Op.CULL and action[Head.ALPHA_SPEED] != 0:
            assert may(Op.SET_ALPHA_TARGET, slots, r, s)


@pytest.mark.parametrize("name", list(CONTROLLERS))
def test_a_row_does_not_depend_on_its_neighbours(name: str) -> None:
    together, _ = play(name, [0, 1, 2, 3, 4])
    alone = [play(name, [i])[0] for i in range(5)]
    assert torch.equal(together, torch.cat(alone, dim=1))


@pytest.mark.parametrize("name", list(CONTROLLERS))
def test_no_value_is_read_back_and_the_view_is_not_written(name: str) -> None:
    slots = SlotTensors.empty(2, S)
    before = slots.clone()
    act(make(name, 2), view_of(slots))
    torch.testing.assert_close(vars(slots), vars(before), rtol=0, atol=0, equal_nan=True)
    # Tensors on the meta device have no values: reading one raises.
    controller = make_controller(name, rows=2, slots=S, seed=0, row_ids_R=torch.arange(2), device="meta")
    assert act(controller, view_of(SlotTensors.empty(2, S, "meta"))).shape == (2, HEAD_COUNT)


def test_random_is_uniform_over_legal_choices() -> None:
    rows = 20_000
    one = slots_of({"stage": Stage.PROBATIONARY}, {"stage": Stage.TRAINING})
    slots = SlotTensors(**{name: value.repeat(rows, *[1] * (value.ndim - 1)) for name, value in vars(one).items()})
    actions = act(make("random", rows), view_of(slots))

    def shares(column: torch.Tensor, size: int) -> list[float]:
        return (torch.bincount(column, minlength=size) / len(column)).tolist()

    assert shares(actions[:, Head.OP], len(Op)) == pytest.approx([1 / 6] * 6, abs=0.012)
    cull = actions[actions[:, Head.OP] == Op.CULL]
    assert shares(cull[:, Head.SLOT], S) == pytest.approx([0.5, 0.5, 0], abs=0.04)
    fading = cull[cull[:, Head.SLOT] == 0]
    assert shares(fading[:, Head.ALPHA_SPEED], 4) == pytest.approx([0.25] * 4, abs=0.05)
    assert shares(fading[:, Head.ALPHA_CURVE], 5) == pytest.approx([0.2] * 5, abs=0.05)
    grown = actions[actions[:, Head.OP] == Op.GERMINATE]
    fitting = FITS_SB[2].float() / FITS_SB[2].sum()
    assert shares(grown[:, Head.BLUEPRINT], len(Blueprint)) == pytest.approx(fitting.tolist(), abs=0.04)
    assert (actions[actions[:, Head.OP] == Op.WAIT] == 0).all()


def test_random_follows_seed_row_and_decision() -> None:
    def draw(seed: int, first_row: int, decision: int) -> torch.Tensor:
        return act(make("random", 50, torch.arange(50) + first_row, seed), view_of(SlotTensors.empty(50, S), decision))

    assert torch.equal(draw(1, 0, 5), draw(1, 0, 5))
    assert not any(torch.equal(draw(1, 0, 5), other) for other in (draw(2, 0, 5), draw(1, 50, 5), draw(1, 0, 6)))


def test_never_waits_always() -> None:
    assert not play("never", [0, 1])[0].any()


def test_periodic_keeps_its_period_and_rotates_slots_and_blueprints() -> None:
    log, _ = play("periodic", [0])
    grown = [d for d in range(HORIZON) if log[d, 0, Head.OP] == Op.GERMINATE]
    # Every slot is committed after three, so that nothing is free any more.
    assert grown == [6, 12, 18]
    assert [int(log[d, 0, Head.SLOT]) for d in grown] == [0, 1, 2]
    named = [Blueprint(int(log[d, 0, Head.BLUEPRINT])) for d in grown]
    assert named == [Blueprint.CONV_HEAVY, Blueprint.MLP_SMALL, Blueprint.BOTTLENECK]


def test_periodic_takes_the_next_free_slot_around_the_ring() -> None:
    slots = slots_of({}, {}, {"stage": Stage.EMBARGOED})
    slots.seeds_made[:] = 5  # The turn of the last slot, which is not free.
    action = act(make("periodic"), view_of(slots, 30))[0]
    assert (action[Head.OP], action[Head.SLOT]) == (Op.GERMINATE, 0)


@pytest.mark.parametrize(("left", "op"), [(LIFE, Op.GERMINATE), (LIFE - 1, Op.WAIT)])
def test_periodic_germinates_only_what_can_be_committed(left: int, op: Op) -> None:
    controller = PeriodicController(period=1)
    assert act(controller, view_of(SlotTensors.empty(1, S), HORIZON - left))[0, Head.OP] == op


@pytest.mark.parametrize(
    ("cell", "deny", "op"),
    [
        ({"stage": Stage.GERMINATED}, None, Op.ADVANCE),
        ({"stage": Stage.GERMINATED}, Check.HOST_LOSS, Op.WAIT),
        ({"stage": Stage.TRAINING, "stage_age": 3}, None, Op.ADVANCE),
        ({"stage": Stage.TRAINING, "stage_age": 10}, Check.INCUBATOR_GAIN, Op.WAIT),
        ({"stage": Stage.TRAINING, "stage_age": 11}, Check.INCUBATOR_GAIN, Op.CULL),
        ({"stage": Stage.TRAINING, "stage_age": 11}, None, Op.ADVANCE),
        ({"stage": Stage.BLENDING, "alpha_target": 1.0}, None, Op.ADVANCE),
        ({"stage": Stage.BLENDING, "alpha_target": 1.0}, Check.ALPHA_AT_TARGET, Op.WAIT),
        ({"stage": Stage.PROBATIONARY, "stage_age": 3, "contribution": 0.1}, None, Op.FOSSILIZE),
        ({"stage": Stage.PROBATIONARY, "stage_age": 11, "contribution": 0.1}, None, Op.FOSSILIZE),
        ({"stage": Stage.PROBATIONARY, "stage_age": 10, "contribution": -0.1}, None, Op.WAIT),
        ({"stage": Stage.PROBATIONARY, "stage_age": 11, "contribution": NAN}, None, Op.CULL),
        ({"stage": Stage.FOSSILIZED, "stage_age": 40, "contribution": -1.0}, None, Op.WAIT),
    ],
)
def test_periodic_between_its_germinations(cell: dict[str, float], deny: Check | None, op: Op) -> None:
    action = act(make("periodic"), view_of(slots_of({}, cell), 20, deny=deny))[0]
    assert (action[Head.OP], action[Head.SLOT]) == (op, 0 if op is Op.WAIT else 1)


def test_unknown_name_is_one_line_with_the_known_names() -> None:
    known = "never, random, periodic, heuristic, policy:FOLDER, greedy:FOLDER"
    with pytest.raises(EsperError, match=f"^controller: unknown controller 'sometimes'; known: {known}$"):
        make("sometimes")
