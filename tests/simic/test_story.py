"""The story of a row: a scripted life event by event, and the events of a random walk replayed."""

import json
from collections import Counter
from dataclasses import asdict
from functools import cache

import pytest
import torch

from esper.leyline.actions import ALPHA_TARGETS, HEADS_OF_OP, TEMPOS, Blueprint, Head, Op, Operator, Style
from esper.leyline.checks import ALL_GATE_CHECKS, CHECK_TEXT, GATE_CHECKS, GATE_OF_STAGE, Check
from esper.leyline.stages import ADVANCE_TARGET, VALID_TRANSITIONS, WAITING_STAGES, Stage
from esper.simic.episode import Episode
from esper.simic.story import END, HARVEST, HARVESTED, Event, events_of
from helpers.episodes import OPEN_GATES, TASK_NAMES, Script, random_walk, record, run_config, task_of
from helpers.growing import act, germinate

TASK = "mnist1d-mlp"
HALF, FULL = (ALPHA_TARGETS.index(target) for target in (0.5, 1.0))
tasks = pytest.mark.parametrize("task", TASK_NAMES)


def play(actions, horizon):
    """Play a script with open gates on one row; give the recording and the events of each decision."""
    config = run_config(TASK, horizon=horizon, updates=1, batch=8, growth=OPEN_GATES)
    recording = record(config, task_of(TASK, examples=40), 1, controller=Script(actions))
    slots = recording.episode.task.host.slot_config
    return recording, [events_of(step, 0, slots) for step in recording.steps]


# One life of three slots: slot 0 is committed, slot 1 culled at once, slot 2 faded out.
LIFE = {
    0: germinate(0, Blueprint.MLP_SMALL, Operator.ADD),
    1: act(Op.ADVANCE, 0),
    2: act(Op.ADVANCE, 0),  # too early: one of two decisions in TRAINING
    3: act(Op.ADVANCE, 0),
    4: act(Op.ADVANCE, 0),  # too early: its ramp of three is under way
    5: germinate(1, Blueprint.NORM, Operator.GATE, HALF),
    6: act(Op.ADVANCE, 0),
    7: act(Op.FOSSILIZE, 0),  # too early: one of two decisions in PROBATIONARY
    8: act(Op.FOSSILIZE, 0),
    9: act(Op.CULL, 1),
    10: germinate(2, Blueprint.LORA_SMALL, Operator.MULTIPLY),
    11: act(Op.ADVANCE, 2),
    13: act(Op.ADVANCE, 2),
    16: act(Op.ADVANCE, 2),
    17: act(Op.SET_ALPHA_TARGET, 2, alpha_target=HALF, alpha_speed=0, alpha_curve=1),
    18: act(Op.ADVANCE, 2),
    19: act(Op.CULL, 2, alpha_speed=1, alpha_curve=2),
    24: act(Op.FOSSILIZE, 0),  # a committed seed stays as it is
    27: germinate(2, Blueprint.ATTENTION, Operator.ADD),
}
HORIZON = 29
# (decision, slot, actor, what, before, after, refused by)
STORY = [
    (0, "r0c0", "controller", "germinate", "DORMANT", "GERMINATED", None),
    (1, "r0c0", "controller", "advance", "GERMINATED", "TRAINING", None),
    (2, "r0c0", "controller", "advance", "TRAINING", "TRAINING", "TRAINING_DECISIONS"),
    (3, "r0c0", "controller", "advance", "TRAINING", "BLENDING", None),
    (4, "r0c0", "controller", "advance", "BLENDING", "BLENDING", "ALPHA_AT_TARGET"),
    (5, "r0c1", "controller", "germinate", "DORMANT", "GERMINATED", None),
    (6, "r0c0", "controller", "advance", "BLENDING", "PROBATIONARY", None),
    (7, "r0c0", "controller", "fossilize", "PROBATIONARY", "PROBATIONARY", "PROBATION_DECISIONS"),
    (8, "r0c0", "controller", "fossilize", "PROBATIONARY", "FOSSILIZED", None),
    (9, "r0c1", "controller", "cull", "GERMINATED", "CULLED", None),
    (10, "r0c2", "controller", "germinate", "DORMANT", "GERMINATED", None),
    (10, "r0c1", "clock", "clock", "CULLED", "EMBARGOED", None),
    (11, "r0c2", "controller", "advance", "GERMINATED", "TRAINING", None),
    (12, "r0c1", "clock", "clock", "EMBARGOED", "RESETTING", None),
    (13, "r0c2", "controller", "advance", "TRAINING", "BLENDING", None),
    (13, "r0c1", "clock", "clock", "RESETTING", "DORMANT", None),
    (16, "r0c2", "controller", "advance", "BLENDING", "PROBATIONARY", None),
    (17, "r0c2", "controller", "set_alpha_target", "PROBATIONARY", "BLENDING", None),
    (18, "r0c2", "controller", "advance", "BLENDING", "PROBATIONARY", None),
    (19, "r0c2", "controller", "cull", "PROBATIONARY", "BLENDING", None),
    (21, "r0c2", "clock", "clock", "BLENDING", "CULLED", None),
    (22, "r0c2", "clock", "clock", "CULLED", "EMBARGOED", None),
    (24, "r0c0", "controller", "fossilize", "FOSSILIZED", "FOSSILIZED", "STAGE"),
    (24, "r0c2", "clock", "clock", "EMBARGOED", "RESETTING", None),
    (25, "r0c2", "clock", "clock", "RESETTING", "DORMANT", None),
    (27, "r0c2", "controller", "germinate", "DORMANT", "GERMINATED", None),
    (28, "r0c2", END, HARVEST, "GERMINATED", "CULLED", None),
]


@cache
def life():
    recording, events = play(LIFE, HORIZON)
    return recording, {event.decision: event for of_decision in events for event in of_decision}, events


def brief(event: Event):
    return (event.decision, event.slot, event.actor, event.what, event.before, event.after, event.refused_by)


def test_a_scripted_life():
    _, _, events = life()
    assert [brief(event) for of_decision in events for event in of_decision] == STORY
    for of_decision in events:
        for event in of_decision:
            assert event.accepted == (event.refused_by is None)


def told(decision):
    """Give the event of the controller in one decision."""
    (event,) = (e for e in life()[2][decision] if e.actor == "controller")
    return event


def results(event):
    return {check.name: (check.value, check.limit, check.passed) for check in event.checks}


def test_choices_are_told_as_what_they_stand_for():
    assert told(0).detail == {"blueprint": "mlp_small", "style": "linear_add", "tempo": 3, "alpha_target": 1.0}
    assert told(5).detail == {"blueprint": "norm", "style": "gated_gate", "tempo": 3, "alpha_target": 0.5}
    assert told(10).detail == {"blueprint": "lora_small", "style": "linear_multiply", "tempo": 3, "alpha_target": 1.0}
    assert told(17).detail == {"alpha_target": 0.5, "alpha_speed": 0, "alpha_curve": "cosine"}
    assert told(9).detail == {"alpha_speed": 0, "alpha_curve": "linear"}
    assert told(19).detail == {"alpha_speed": 3, "alpha_curve": "sigmoid_gentle"}
    assert told(1).detail == told(8).detail == {}


def test_a_refused_advance_names_the_check_with_its_value_and_limit():
    event = told(2)
    assert [check.name for check in event.checks] == [c.name for c in GATE_CHECKS[GATE_OF_STAGE[Stage.BLENDING]]]
    assert results(event)["TRAINING_DECISIONS"] == (1, 2, False)
    assert [name for name, (_, _, passed) in results(event).items() if not passed] == ["TRAINING_DECISIONS"]
    # The decisive one first.
    assert event.reason.startswith("decisions in TRAINING 1 (limit 2) refused; ")
    assert results(told(7))["PROBATION_DECISIONS"] == (1, 2, False)
    assert told(7).reason.startswith("decisions in PROBATIONARY 1 (limit 2) refused; ")


def test_a_moving_alpha_is_refused_with_its_distance():
    value, limit, passed = results(told(4))["ALPHA_AT_TARGET"]
    # After one of three steps of a linear ramp, in decision 3, two thirds are left.
    assert (value, limit, passed) == (pytest.approx(2 / 3), 0, False)
    assert told(4).reason == "distance of alpha to its target 0.6667 (limit 0) refused"


def test_an_advance_tells_what_it_passed():
    recording, _, _ = life()
    value, limit, passed = results(told(1))["HOST_LOSS"]
    assert (value, passed) == (pytest.approx(recording.steps[0].val_loss_R[0]), True)
    assert limit is None  # finite is all that is asked
    assert set(results(told(3))) == {c.name for c in GATE_CHECKS[GATE_OF_STAGE[Stage.BLENDING]]}
    assert results(told(3))["TRAINING_DECISIONS"] == (2, 2, True)
    before = recording.steps[2].slots
    gain = results(told(3))["INCUBATOR_GAIN"]
    limit = -100 + OPEN_GATES.gates.incubator_gain_errors * before["incubator_gain_se"][0, 0]
    assert gain == (pytest.approx(before["incubator_gain"][0, 0]), pytest.approx(limit), True)
    assert results(told(3))["GRADIENT_FINITE"][0] == pytest.approx(before["gradient_norm"][0, 0])
    assert results(told(6)) == {"ALPHA_AT_TARGET": (0, 0, True)}


def test_a_fossilization_tells_its_contribution():
    recording, _, _ = life()
    assert list(results(told(8))) == ["PROBATION_DECISIONS", "CONTRIBUTION"]
    assert results(told(8))["PROBATION_DECISIONS"] == (2, 2, True)
    value, limit, passed = results(told(8))["CONTRIBUTION"]
    before = recording.steps[7].slots
    asked = -100 + OPEN_GATES.gates.contribution_errors * before["contribution_se"][0, 0]
    assert (value, limit, passed) == (pytest.approx(before["contribution"][0, 0]), pytest.approx(asked), True)
    assert "contribution (nats) " in told(8).reason
    assert "refused" not in told(8).reason


def test_a_cull_tells_what_the_seed_lacked():
    # It stood before TRAINING.
    assert list(results(told(9))) == ["HOST_LOSS"]
    # It stood before the commitment, in the first decision of its probation.
    assert list(results(told(19))) == ["PROBATION_DECISIONS", "CONTRIBUTION"]
    assert results(told(19))["PROBATION_DECISIONS"] == (1, 2, False)
    assert results(told(19))["CONTRIBUTION"][0] is not None


def test_other_operations_ask_no_gate():
    for decision in (0, 17, 24):
        assert told(decision).checks == ()
    assert told(0).reason == told(17).reason == ""


def test_the_clock_has_no_reason_of_its_own():
    clock = [event for of_decision in life()[2] for event in of_decision if event.actor == "clock"]
    assert len(clock) == 7
    for event in clock:
        assert (event.accepted, event.detail, event.checks, event.reason) == (True, {}, (), "")


def test_nothing_happened():
    for decision in (12, 14, 15, 20, 23, 26, 28):
        assert not [event for event in life()[2][decision] if event.actor == "controller"]
    assert life()[2][14] == life()[2][15] == []


def test_the_end_says_why_it_culled():
    (event,) = life()[2][28]
    assert (event.accepted, event.detail, event.checks, event.reason) == (True, {}, (), HARVESTED)


# What the structure refuses.

IMPOSSIBLE = {
    "stage": (act(Op.FOSSILIZE, 1), "STAGE"),
    "blueprint": (germinate(1, Blueprint.CONV_HEAVY, Operator.ADD), "BLUEPRINT"),
    "noop": (germinate(1, Blueprint.NOOP, Operator.ADD), "BLUEPRINT"),
    "fade": (act(Op.CULL, 0, alpha_speed=2), "SPEED"),
    "slot": (act(Op.ADVANCE, 7), "RANGE"),
    "negative slot": (act(Op.ADVANCE, -1), "RANGE"),
    "style": (act(Op.GERMINATE, 1, blueprint=Blueprint.NORM, style=len(Style)), "RANGE"),
    "tempo": (act(Op.GERMINATE, 1, blueprint=Blueprint.NORM, tempo=-1), "RANGE"),
    "operation": (act(len(Op), 1), "RANGE"),
    "negative operation": (act(-1, 1), "RANGE"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_is_impossible_is_refused_by_name(case):
    action, refused_by = IMPOSSIBLE[case]
    recording, events = play({0: germinate(0, Blueprint.NORM, Operator.ADD), 1: action}, 3)
    (event,) = events[1]
    assert (event.actor, event.accepted, event.refused_by) == ("controller", False, refused_by)
    assert event.checks == ()
    assert event.reason == CHECK_TEXT[Check[refused_by]]
    assert event.before == event.after
    assert recording.steps[1].refused_by_R.tolist() == [Check[refused_by]]
    assert recording.stages[2].tolist() == [[Stage.GERMINATED, Stage.DORMANT, Stage.DORMANT]]
    json.dumps(asdict(event), allow_nan=False)


def test_a_slot_that_does_not_exist_is_named_all_the_same():
    _, events = play({0: act(Op.ADVANCE, 7), 1: act(Op.ADVANCE, -1)}, 2)
    assert [of_decision[0].slot for of_decision in events] == ["slot 7", "slot -1"]


def test_an_unmeasured_check_is_none_and_not_a_number():
    # Nothing is measured before the first decision is over.
    config = run_config(TASK, horizon=2, updates=1, batch=8)
    episode = Episode(config, task_of(TASK, examples=40), "never", torch.arange(1))
    episode.population.slots.stage[0, 0] = int(Stage.GERMINATED)
    episode.population.slots.blueprint[0, 0] = int(Blueprint.NORM)
    episode.population.slots.seed_id[0, 0] = 0
    episode.controller = Script({0: act(Op.ADVANCE, 0)})
    episode.advance()
    (event,) = events_of(episode.step(), 0, episode.task.host.slot_config)
    (check,) = event.checks
    assert (check.name, check.value, check.limit, check.passed) == ("HOST_LOSS", None, None, False)
    assert event.reason == "host loss measured and finite not measured refused"
    json.dumps(asdict(event), allow_nan=False)


# The events of a random walk tell its whole history.


@cache
def told_of_the_walk(task):
    """Give the events of each row and decision of the random walk."""
    recording = random_walk(task)
    slots = recording.episode.task.host.slot_config
    rows = range(recording.stages.shape[1])
    return {row: [events_of(step, row, slots) for step in recording.steps] for row in rows}


@tasks
def test_replaying_the_events_gives_the_stages(task):
    recording = random_walk(task)
    names = recording.episode.task.host.slot_config.slot_ids
    for row, story in told_of_the_walk(task).items():
        now = dict.fromkeys(names, "DORMANT")
        for decision, events in enumerate(story):
            for event in events:
                # Each event begins where the one before it ended: none is missing and none is told twice.
                assert now[event.slot] == event.before
                assert event.accepted or event.after == event.before
                now[event.slot] = event.after
                assert event.decision == decision
            after = recording.steps[decision].slots["stage"][row]
            assert [now[name] for name in names] == [Stage(stage).name for stage in after.tolist()]


@tasks
def test_every_change_is_told_once_and_is_allowed(task):
    stages = random_walk(task).stages
    changes = Counter()
    for story in told_of_the_walk(task).values():
        for event in (event for events in story for event in events):
            before, after = Stage[event.before], Stage[event.after]
            if before is not after:
                assert after in VALID_TRANSITIONS[before]
                changes[event.actor] += 1
            if event.actor == END:
                assert after is Stage.CULLED
            if event.actor == "clock":
                assert before in WAITING_STAGES or (before, after) == (Stage.BLENDING, Stage.CULLED)
    # No slot of the walk changes twice in one decision, so the changed stages count the changes.
    assert sum(changes.values()) - changes[END] == (stages[1:] != stages[:-1]).sum()
    assert changes[END] > 50
    assert min(changes["controller"], changes["clock"]) > 500


@tasks
def test_the_controller_acts_once_in_a_decision_or_waits(task):
    steps = random_walk(task).steps
    for row, story in told_of_the_walk(task).items():
        for step, events in zip(steps, story, strict=True):
            actions = [event for event in events if event.actor == "controller"]
            op = Op(step.action_RH[row, Head.OP])
            assert [event.what for event in actions] == ([] if op is Op.WAIT else [op.name.lower()])
            assert events[: len(actions)] == actions
            for event in actions:
                assert event.accepted == step.accepted_R[row]
                assert set(event.detail) == {h.name.lower() for h in HEADS_OF_OP[op] - {Head.OP, Head.SLOT}}


@tasks
def test_checks_are_those_of_the_gate_asked(task):
    gated, culls = Counter(), 0
    for row, story in told_of_the_walk(task).items():
        for step, events in zip(random_walk(task).steps, story, strict=True):
            for event in events:
                before = Stage[event.before]
                target = Stage.FOSSILIZED if before is Stage.PROBATIONARY else ADVANCE_TARGET.get(before)
                asked = GATE_CHECKS[GATE_OF_STAGE[target]] if event.what in ("advance", "fossilize", "cull") else ()
                assert [check.name for check in event.checks] == [check.name for check in asked]
                slot = step.action_RH[row, Head.SLOT]
                for check in event.checks:
                    at = ALL_GATE_CHECKS.index(Check[check.name])
                    assert check.passed == step.passed_CRS[at, row, slot]
                    value = step.value_CRS[at, row, slot]
                    assert check.value == (pytest.approx(value) if value == value else None)
                failed = [check.name for check in event.checks if not check.passed]
                if event.what == "cull":
                    culls += bool(failed)
                elif event.checks:
                    assert event.refused_by == (failed[0] if failed else None)
                    gated[event.accepted] += 1
                if event.refused_by:
                    assert event.reason.startswith(CHECK_TEXT[Check[event.refused_by]])
    assert min(gated[True], gated[False], culls) > 50


@tasks
def test_every_event_is_plain_json(task):
    for story in list(told_of_the_walk(task).values())[:20]:
        for event in (event for events in story for event in events):
            record = json.loads(json.dumps(asdict(event), allow_nan=False))
            assert set(record) == set(Event.__dataclass_fields__)
            assert record["detail"].get("tempo", 3) in TEMPOS
            assert [check["name"] for check in record["checks"]] == [check.name for check in event.checks]
