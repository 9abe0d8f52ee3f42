"""A fixed plan is carried out as soon as the engine lets it, in real episodes, and nothing else is done."""

import pytest
import torch

from esper.leyline.actions import Blueprint, Head, Op
from esper.leyline.stages import GROWTH_ORDER, Stage
from esper.tamiyo.controllers.schedule import ScheduleController
from helpers.episodes import OPEN_GATES, record, run_config, task_of

NOOP, NORM, SMALL = Blueprint.NOOP, Blueprint.NORM, Blueprint.MLP_SMALL
PLANS = [(NOOP, NOOP, NOOP), (NORM, NOOP, NOOP), (NORM, SMALL, NORM), (NOOP, SMALL, SMALL)]
STARTS = [[0, 0, 0], [5, 0, 0], [9, 3, 3], [0, 0, 0]]


def played(plans=PLANS, starts=STARTS, horizon=30, **more):
    config = run_config("mnist1d-mlp", horizon=horizon, updates=1, batch=8, **{"growth": OPEN_GATES, **more})
    blueprint_RS = torch.tensor([[int(b) for b in plan] for plan in plans])
    controller = ScheduleController(blueprint_RS, torch.tensor(starts))
    return record(config, task_of("mnist1d-mlp", examples=40), len(plans), controller=controller)


@pytest.fixture(scope="module")
def done():
    return played()


def germinations(recording, row):
    """Decision, slot and blueprint of every germination of a row."""
    actions = [(step.decision, step.action_RH[row].tolist()) for step in recording.steps]
    return [
        (decision, action[Head.SLOT], Blueprint(action[Head.BLUEPRINT]))
        for decision, action in actions
        if action[Head.OP] == Op.GERMINATE
    ]


def test_what_is_planned_is_sown_once_and_when_it_is_due(done):
    assert germinations(done, 0) == []
    assert germinations(done, 1) == [(5, 0, NORM)]
    # Two are due at once: the first slot goes first, the other at the next decision.
    assert germinations(done, 2) == [(3, 1, SMALL), (4, 2, NORM), (9, 0, NORM)]
    assert germinations(done, 3) == [(0, 1, SMALL), (1, 2, SMALL)]


def test_every_seed_is_seen_through_without_a_refusal(done):
    planned = torch.tensor([[b is not NOOP for b in plan] for plan in PLANS]).numpy()
    last = done.steps[-1].slots
    assert (last["stage"][planned] == Stage.FOSSILIZED).all()
    assert (last["stage"][~planned] == Stage.DORMANT).all()
    assert (last["blueprint"] == [[int(b) for b in plan] for plan in PLANS]).all()
    assert all(step.accepted_R.all() for step in done.steps)
    ops = {int(op) for step in done.steps for op in step.action_RH[:, Head.OP]}
    assert ops == {Op.WAIT, Op.GERMINATE, Op.ADVANCE, Op.FOSSILIZE}
    for slot, history in enumerate(done.slot_histories()):
        stages = tuple(stage for stage, _ in history)
        assert stages == (GROWTH_ORDER if planned.flatten()[slot] else (Stage.DORMANT,))


def test_a_row_does_not_depend_on_its_neighbours(done):
    for row, (plan, start) in enumerate(zip(PLANS, STARTS, strict=True)):
        alone = played([plan], [start])
        ours = [step.action_RH[row].tolist() for step in done.steps]
        assert [step.action_RH[0].tolist() for step in alone.steps] == ours


def test_what_never_passes_its_gate_waits_in_front_of_it():
    strict = {"gates": {"min_incubator_gain": 1e9}}
    recording = played([(NORM, NOOP, SMALL)], [[0, 0, 0]], growth=strict)
    assert recording.steps[-1].slots["stage"].tolist() == [[Stage.TRAINING, Stage.DORMANT, Stage.TRAINING]]
    assert [step.action_RH[0, Head.OP] for step in recording.steps].count(Op.GERMINATE) == 2
