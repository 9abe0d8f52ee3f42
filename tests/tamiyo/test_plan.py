"""A fixed plan is carried out as soon as the engine lets it, in real episodes, and nothing else is done."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.exam.plans import NOTHING, Family, Plan, Seed, plan_table
from esper.leyline.actions import ALPHA_TARGETS, TEMPOS, Blueprint, Head, Op, Style
from esper.leyline.stages import GROWTH_ORDER, OCCUPIED_STAGES, Stage
from esper.tamiyo.controllers.plan import PlanController
from helpers.episodes import OPEN_GATES, record, run_config, task_of

NORM, SMALL, TASK = Blueprint.NORM, Blueprint.MLP_SMALL, "mnist1d-mlp"
ADD, MULTIPLY, GATE = Style.LINEAR_ADD, Style.LINEAR_MULTIPLY, Style.GATED_GATE
PLANS = [
    NOTHING,
    Plan((Seed(0, NORM, MULTIPLY, begin=5),)),
    Plan((Seed(1, SMALL, ADD, begin=3), Seed(2, NORM, GATE, 8, 0.5, begin=3), Seed(0, NORM, ADD, 5, 0.7, begin=9))),
    Plan((Seed(1, SMALL, ADD), Seed(2, SMALL, ADD))),
    Plan((Seed(1, SMALL, ADD, begin=1, cull=4), Seed(1, NORM, MULTIPLY, begin=9))),
]
WAITED = 3
"""Decisions that something can be late: each other seed of a plan may go first."""


def played(plans=PLANS, horizon=30, **more):
    config = run_config(TASK, horizon=horizon, updates=1, batch=8, **{"growth": OPEN_GATES, **more})
    return record(config, task_of(TASK, examples=40), len(plans), controller=PlanController(plan_table(plans), 3))


@pytest.fixture(scope="module")
def done():
    return played()


def asked(recording, row, op):
    """Decision and action of every such operation of a row."""
    actions = ((step.decision, step.action_RH[row].tolist()) for step in recording.steps)
    return [(decision, action) for decision, action in actions if action[Head.OP] == op]


def begun(recording, row):
    """Seeds as they were germinated, with the decision at which that was."""
    return [
        Seed(
            action[Head.SLOT],
            Blueprint(action[Head.BLUEPRINT]),
            Style(action[Head.STYLE]),
            TEMPOS[action[Head.TEMPO]],
            ALPHA_TARGETS[action[Head.ALPHA_TARGET]],
            decision,
        )
        for decision, action in asked(recording, row, Op.GERMINATE)
    ]


def test_what_is_planned_is_germinated_once_and_when_it_is_due(done):
    assert begun(done, 0) == []
    assert begun(done, 1) == list(PLANS[1].seeds)
    # Two are due at once: the first goes first, the other at the next decision.
    first, second, third = PLANS[2].seeds
    assert begun(done, 2) == [first, Seed(2, NORM, GATE, 8, 0.5, begin=4), third]
    assert second.begin == 3
    assert begun(done, 3) == [Seed(1, SMALL, ADD), Seed(2, SMALL, ADD, begin=1)]


def test_every_seed_is_seen_through_without_a_refusal(done):
    last = done.steps[-1].slots
    for row, plan in enumerate(PLANS[:4]):
        planned = {seed.slot: seed for seed in plan.seeds}
        for slot in range(3):
            stage = Stage.FOSSILIZED if slot in planned else Stage.DORMANT
            assert last["stage"][row, slot] == stage
            if slot in planned:
                assert last["blueprint"][row, slot] == planned[slot].blueprint
                assert last["alpha"][row, slot] == pytest.approx(planned[slot].alpha_target)
    assert all(step.accepted_R.all() for step in done.steps)
    for slot, history in enumerate(list(done.slot_histories())[:12]):
        stages = tuple(stage for stage, _ in history)
        assert stages == (GROWTH_ORDER if last["stage"].flatten()[slot] == Stage.FOSSILIZED else (Stage.DORMANT,))


def test_a_culled_seed_makes_room_and_a_later_one_takes_its_slot(done):
    assert asked(done, 4, Op.CULL) == [(4, [Op.CULL, 1, 0, 0, 0, 0, 0, 0])]
    assert begun(done, 4) == [Seed(1, SMALL, ADD, begin=1), Seed(1, NORM, MULTIPLY, begin=9)]
    assert done.steps[-1].slots["stage"][4].tolist() == [Stage.DORMANT, Stage.FOSSILIZED, Stage.DORMANT]


def test_a_seed_that_is_to_be_culled_is_never_committed():
    recording = played([Plan((Seed(0, NORM, ADD, begin=0, cull=25),))])
    assert asked(recording, 0, Op.FOSSILIZE) == []
    assert recording.steps[24].slots["stage"][0, 0] == Stage.PROBATIONARY
    assert asked(recording, 0, Op.CULL)[0][0] == 25


def test_a_row_does_not_depend_on_its_neighbours(done):
    for row, plan in enumerate(PLANS):
        ours = [step.action_RH[row].tolist() for step in done.steps]
        assert [step.action_RH[0].tolist() for step in played([plan]).steps] == ours


def test_what_never_passes_its_gate_waits_in_front_of_it():
    strict = {"gates": {"min_incubator_gain": 1e9}}
    recording = played([Plan((Seed(0, NORM, ADD), Seed(2, SMALL, ADD)))], growth=strict)
    assert recording.steps[-1].acted.stage.tolist() == [[Stage.TRAINING, Stage.DORMANT, Stage.TRAINING]]
    assert len(asked(recording, 0, Op.GERMINATE)) == 2


@settings(max_examples=5)
@given(seed=st.integers(0, 2**40), first=st.integers(0, 2**20))
def test_the_engine_performs_whatever_is_in_the_family(seed, first):
    """Seeds as drawn, late only by what went first, culled or committed, and nothing is refused."""
    config = run_config(TASK, horizon=36, updates=1, batch=2, growth=OPEN_GATES)
    task = task_of(TASK, examples=2)
    family = Family.of(config, task.host.slot_config)
    plans = family.sampled(24, seed, "plans", first)
    assert [family.misfit(plan) for plan in plans] == [None] * len(plans)
    recording = record(config, task, len(plans), controller=PlanController(plan_table(plans), 3))
    assert all(step.accepted_R.all() for step in recording.steps)
    occupied = {int(stage) for stage in OCCUPIED_STAGES}
    for row, plan in enumerate(plans):
        found = begun(recording, row)
        culls = [(decision, action[Head.SLOT]) for decision, action in asked(recording, row, Op.CULL)]
        expected = []
        for planned in plan.seeds:
            came = [
                s for s in found if (s.slot, s.blueprint, s.style) == (planned.slot, planned.blueprint, planned.style)
            ]
            late = [s for s in came if planned.begin <= s.begin <= planned.begin + WAITED]
            if not late:
                # There was no time left, before the end or before it was to be culled.
                assert planned.begin + WAITED >= (config.training.horizon if planned.cull is None else planned.cull)
                continue
            (born,) = late
            assert (born.tempo, born.alpha_target) == (planned.tempo, planned.alpha_target)
            expected.append(born)
            if planned.cull is None:
                assert int(recording.steps[-1].acted.stage[row, planned.slot]) in occupied
            else:
                ends = [d for d, slot in culls if slot == planned.slot and planned.cull <= d <= planned.cull + WAITED]
                assert len(ends) == 1 or planned.cull + WAITED >= config.training.horizon
        assert sorted(found, key=lambda s: s.begin) == sorted(expected, key=lambda s: s.begin)
        committed = {action[Head.SLOT] for _, action in asked(recording, row, Op.FOSSILIZE)}
        in_time = {s.slot for s in plan.seeds if s.cull is None and s.begin + 4 + s.tempo + 2 + 3 * WAITED < 36}
        stays = {s.slot for s in plan.seeds if s.cull is None}
        assert in_time <= committed <= stays
