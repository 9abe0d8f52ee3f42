"""The arms of a grow run: the same conditions for all, and what their lines and results say."""

import json
import math
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

from esper.kasmina.export import export_row
from esper.leyline.actions import Blueprint, Operator
from esper.leyline.config import GovernorConfig, OptimizerConfig
from esper.leyline.panics import PANIC_TEXT, Panic
from esper.leyline.stages import OCCUPIED_STAGES, Stage
from esper.nissa.store import RunStore
from esper.simic.grow import ARMS, ROW, Arm, SlotLine
from esper.simic.recorder import run_columns
from helpers.episodes import OPEN_GATES, TASK_NAMES, Script, run_config, task_of
from helpers.growing import act, germinate
from helpers.stored import column, stored

TASK = "mnist1d-mlp"
SLOTS = 3
tasks = pytest.mark.parametrize("task", TASK_NAMES)
arm_names = pytest.mark.parametrize("name", list(ARMS))


def make(name="grown", controller="heuristic", *, task=TASK, horizon=5, updates=2, script=None, **more):
    config = run_config(task, controller, horizon=horizon, updates=updates, growth=OPEN_GATES, **more)
    arm = Arm(config, task_of(task, examples=100), name)
    if script is not None:
        arm.episode.controller = Script(script)
    return arm


def go(arm, stopped=lambda: False):
    """Run an arm; give its lines and its events."""
    pairs = list(arm.run(stopped))
    return [line for line, _ in pairs], [event for _, events in pairs for event in events]


def numbers(line):
    """Everything a line says but its time."""
    return {name: value for name, value in asdict(line).items() if name != "seconds"}


def test_the_arms():
    assert list(ARMS) == ["grown", "host alone", "everything from the start"]


@arm_names
def test_lines_come_one_for_each_decision(name):
    arm = make(name)
    lines, _ = go(arm)
    assert [line.decision for line in lines] == [0, 1, 2, 3, 4]
    assert [line.updates for line in lines] == [2, 4, 6, 8, 10]
    seconds = [line.seconds for line in lines]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
    assert arm.result().seconds == seconds[-1]
    for line in lines:
        assert all(math.isfinite(value) for value in (line.train_loss, line.val_loss))
        assert 0 <= line.val_accuracy <= 1
        assert [slot.slot for slot in line.slots] == ["r0c0", "r0c1", "r0c2"]
        json.dumps(asdict(line), allow_nan=False)


@tasks
def test_the_arms_start_equal_and_see_the_same_data(task):
    arms = {name: make(name, task=task) for name in ARMS}
    thetas = [arm.episode.population.hosts.theta for arm in arms.values()]
    assert torch.equal(thetas[0], thetas[1])
    assert torch.equal(thetas[0], thetas[2])
    orders = [arm.episode.trainer.order.indices(0, 10) for arm in arms.values()]
    assert torch.equal(orders[0], orders[1])
    assert torch.equal(orders[0], orders[2])
    assert {arm.episode.trainer.total_updates for arm in arms.values()} == {10}
    # While nothing is blended, the grown network is the host alone; the third one starts as the same function.
    first = {name: next(arm.run(lambda: False))[0] for name, arm in arms.items()}
    assert numbers(first["grown"]) == numbers(first["host alone"])
    assert first["everything from the start"].train_loss != first["host alone"].train_loss


def test_a_run_that_never_grows_is_its_own_control():
    grown, alone = (go(make(name, "never"))[0] for name in ("grown", "host alone"))
    assert [numbers(line) for line in grown] == [numbers(line) for line in alone]


@tasks
def test_the_host_alone_grows_nothing(task):
    arm = make("host alone", "random", task=task, horizon=8)
    lines, events = go(arm)
    assert events == []
    assert {line.parameters for line in lines} == {arm.task.host.body.parameter_count}
    assert {slot.stage for line in lines for slot in line.slots} == {"DORMANT"}


@tasks
def test_everything_from_the_start(task):
    arm = make("everything from the start", "random", task=task, horizon=4)
    lines, events = go(arm)
    assert events == []
    assert {slot.stage for line in lines for slot in line.slots} == {"FOSSILIZED"}
    assert {slot.alpha for line in lines for slot in line.slots} == {1.0}
    modules = export_row(arm.episode.population, ROW)
    assert {line.parameters for line in lines} == {sum(p.numel() for p in modules.parameters())}
    assert arm.parameters > arm.task.host.body.parameter_count


SCRIPT = {
    0: germinate(1, Blueprint.MLP_SMALL, Operator.GATE),
    1: act(2 + 3, 1),  # ADVANCE
    3: act(5, 1),
    4: germinate(0, Blueprint.NORM, Operator.ADD),
    5: act(5, 0),
}


def test_the_lines_tell_what_the_slots_hold():
    lines, events = go(make(script=SCRIPT, horizon=9))
    told = ["germinate", "advance", "advance", "germinate", "advance", "harvest", "harvest"]
    assert [event.what for event in events] == told
    assert {slot.stage for slot in lines[-1].slots} == {"CULLED", "DORMANT"}
    lines = lines[:-1]
    one = [line.slots[1] for line in lines]
    assert [slot.stage for slot in one] == ["GERMINATED"] + ["TRAINING"] * 2 + ["BLENDING"] * 5
    assert {(slot.blueprint, slot.operator) for slot in one} == {("mlp_small", "gate")}
    assert [slot.alpha for slot in one] == pytest.approx([0, 0, 0, 1 / 3, 2 / 3, 1, 1, 1])
    assert len({slot.parameters for slot in one}) == 1
    two = [line.slots[2] for line in lines]
    assert set(two) == {SlotLine("r0c2", "DORMANT", None, None, 0.0, 0, None, None, None, None, None)}


def test_what_is_not_measured_is_none():
    lines, _ = go(make(script=SCRIPT, horizon=8))
    for line in lines:
        for slot in line.slots:
            occupied = Stage[slot.stage] in OCCUPIED_STAGES
            assert (slot.blueprint is not None) == (slot.operator is not None) == occupied
            assert (slot.contribution is not None) == (slot.contribution_se is not None) == (slot.stage == "BLENDING")
            assert (slot.incubator_gain is not None) == (slot.incubator_gain_se is not None)
            assert (slot.incubator_gain is not None) == (slot.stage == "TRAINING")
            assert (slot.gradient_ratio is not None) == (slot.stage in ("TRAINING", "BLENDING"))


def test_parameters_are_those_of_the_network_in_use():
    arm = make(script=SCRIPT, horizon=8)
    host = arm.task.host.body.parameter_count
    counts, advance = [], arm.episode.advance

    def counted(**how):
        step = advance(**how)
        modules = export_row(arm.episode.population, ROW)
        counts.append(sum(p.numel() for p in modules.parameters()))
        return step

    arm.episode.advance = counted
    for line, _ in arm.run(lambda: False):
        assert line.parameters == counts[line.decision]
        blended = line.decision >= 3
        assert line.parameters == host + (line.slots[1].parameters if blended else 0)


@tasks
def test_the_result_is_that_of_the_exported_network_on_test(task):
    arm = make("everything from the start", task=task, horizon=2)
    go(arm)
    result = arm.result()
    test = arm.task.data.test
    with torch.no_grad():
        logits = export_row(arm.episode.population, ROW)(test.x)
    assert result.test_accuracy == pytest.approx((logits.argmax(1) == test.y).float().mean().item(), abs=1e-6)
    assert result.test_loss == pytest.approx(F.cross_entropy(logits, test.y).item(), rel=1e-5)
    assert (result.arm, result.decisions) == ("everything from the start", 2)
    assert result.parameters == arm.parameters


def test_the_test_split_is_not_touched_before_the_result():
    arm = make(horizon=3)
    spoiled = arm.task.data.test
    # A network that saw the test split would say so in every number behind it.
    x = spoiled.x.clone()
    try:
        spoiled.x.fill_(float("nan"))
        lines, _ = go(arm)
    finally:
        spoiled.x.copy_(x)
    clean, _ = go(make(horizon=3))
    assert [numbers(line) for line in lines] == [numbers(line) for line in clean]


@pytest.mark.parametrize("decisions", [0, 1, 3])
def test_a_run_that_is_stopped(decisions):
    arm = make(horizon=5)
    lines, _ = go(arm, lambda: arm.episode.decision >= decisions)
    assert len(lines) == decisions
    result = arm.result()
    assert result.decisions == decisions
    assert 0 <= result.test_accuracy <= 1
    assert result.test_loss is not None


def diverging():
    # An absurd rate, unclipped: the loss is soon not finite, and JSON knows no such number.
    optimizer = OptimizerConfig(method="sgd", learning_rate=1e9, clip_norm=1e9, warmup=0.0)
    return make("host alone", horizon=5, optimizer=optimizer, governor=GovernorConfig(most_restorations=2))


def test_a_run_that_diverges_is_told_without_a_number():
    arm = diverging()
    lines, _ = go(arm)
    # It is back where it began, whose loss is measured at the end alone.
    assert lines[-2].val_loss is None
    assert lines[-1].val_loss == pytest.approx(math.log(10), rel=0.2)
    assert all(value is None or math.isfinite(value) for line in lines for value in (line.train_loss, line.val_loss))
    result = arm.result()
    assert result.test_loss == pytest.approx(math.log(10), rel=0.2)
    assert (result.restorations, result.given_up) == (2, PANIC_TEXT[Panic.DIVERGED])
    told = [line.failure and line.failure.partition(": ")[0] for line in lines]
    shares = [f"restored, its learning rate multiplied by {share:g}" for share in (0.3, 0.09)]
    assert told == [*shares, "given up", None, None]
    for line in lines:
        json.dumps(asdict(line), allow_nan=False)


def test_the_same_run_twice():
    first, second = (go(make(controller="random", horizon=10, seed=3)) for _ in range(2))
    assert [numbers(line) for line in first[0]] == [numbers(line) for line in second[0]]
    assert first[1] == second[1]


# What the store keeps is what the lines and events tell.


def go_recorded(folder, arm):
    """Run an arm to its result into a store; give the store with the lines, the events and the result."""
    path = folder / "run.sqlite"
    with RunStore(path, run_columns(arm.config, "grow", 1)) as store:
        pairs = list(arm.run(lambda: False, store))
        result = arm.result()
    return path, [line for line, _ in pairs], [event for _, events in pairs for event in events], result


@arm_names
def test_the_store_keeps_what_the_lines_tell(tmp_path, name):
    path, lines, events, result = go_recorded(tmp_path, make(name, script=SCRIPT, horizon=8))
    (number,) = column(path, "SELECT round FROM round")
    assert number == list(ARMS).index(name)
    decisions = stored(path, "SELECT * FROM decision ORDER BY decision")
    assert [row["decision"] for row in decisions] == [line.decision for line in lines] == list(range(8))
    for row, line in zip(decisions, lines, strict=True):
        measured = (row["train_loss_nats"], row["val_loss_nats"], row["val_accuracy"])
        assert measured == (line.train_loss, line.val_loss, line.val_accuracy)
    seeds = stored(path, "SELECT * FROM slot ORDER BY decision, slot")
    told = [(line.decision, slot) for line in lines for slot in line.slots if Stage[slot.stage] in OCCUPIED_STAGES]
    assert len(seeds) == len(told)
    for row, (decision, slot) in zip(seeds, told, strict=True):
        assert (row["decision"], f"r0c{row['slot']}", row["alpha"]) == (decision, slot.slot, slot.alpha)
        for column_name, value in asdict(slot).items():
            unit = "_nats" if column_name.startswith(("contribution", "incubator")) else ""
            # The operator of a seed is fixed for its life: it stands in its transitions.
            if column_name not in ("slot", "operator"):
                assert row[column_name + unit] == value, column_name
    transitions = stored(path, "SELECT * FROM transition ORDER BY decision, step")
    assert len(transitions) == len(events)
    for row, event in zip(transitions, events, strict=True):
        assert (row["decision"], f"r0c{row['slot']}", row["actor"]) == (event.decision, event.slot, event.actor)
        assert (row["op"], row["before"], row["after"]) == (event.what, event.before, event.after)
        assert (bool(row["allowed"]), row["refused_by"]) == (event.accepted, event.refused_by)
        failed = ",".join(check.name for check in event.checks if not check.passed)
        assert (row["failed_checks"] or "") == failed
    (episode,) = stored(path, "SELECT * FROM episode")
    assert (episode["status"], episode["decisions"]) == ("finished", result.decisions)
    assert (episode["test_accuracy"], episode["test_loss_nats"]) == (result.test_accuracy, result.test_loss)
    assert episode["host_parameters"] + episode["added_parameters"] == result.parameters == lines[-1].parameters
    assert episode["training_s"] == result.seconds
    assert (episode["twin_round"], episode["twin_row"]) == ((None, None) if name == "host alone" else (1, 0))


def test_a_number_that_is_none_is_null_in_the_store(tmp_path):
    path, lines, _, result = go_recorded(tmp_path, diverging())
    (told,) = stored(path, "SELECT status, status_reason, restorations FROM episode")
    assert list(told.values()) == ["given up", result.given_up, result.restorations]
    assert column(path, "SELECT val_loss_nats FROM decision")[-2] is None
    assert column(path, "SELECT test_loss_nats FROM episode") == [result.test_loss]
    assert column(path, "SELECT val_loss_nats FROM decision") == [line.val_loss for line in lines]
    assert column(path, "SELECT train_loss_nats FROM decision") == [line.train_loss for line in lines]


def test_recording_changes_no_number(tmp_path):
    def fresh():
        return make(controller="random", horizon=10, seed=3)

    alone, (_, lines, events, _) = go(fresh()), go_recorded(tmp_path, fresh())
    assert [numbers(line) for line in lines] == [numbers(line) for line in alone[0]]
    assert events == alone[1]
