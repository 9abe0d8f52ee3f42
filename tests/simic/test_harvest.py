"""What an episode leaves is the host with its committed seeds: reward, record, export and tables agree on it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.kasmina.export import export_row
from esper.kasmina.rows.core import Statistics
from esper.leyline.actions import TEMPOS, Blueprint, Op, Operator
from esper.leyline.panics import Panic
from esper.leyline.stages import OCCUPIED_STAGES, Stage
from esper.simic import episode as episode_module
from esper.simic.columns import transition_columns
from esper.simic.episode import Episode
from esper.simic.story import END, HARVEST, HARVESTED, events_of, transitions_of
from esper.tamiyo.controllers.base import time_to_commit
from esper.tolaria import harvest as harvest_module
from esper.tolaria.batches import shared
from esper.tolaria.evaluation import evaluate
from esper.tolaria.training import example_losses
from helpers.environments import ONWARD, PLAIN, at_random, environment, play, reads_counted, script
from helpers.episodes import OPEN_GATES, TASK_NAMES, record, run_config, task_of
from helpers.faults import RowState, false_alarm
from helpers.growing import WAIT, act, germinate

COMMITS, TRIES = 1, 2
"""Two rows of one start that do the same, up to the last decision."""
LIFE = {
    0: germinate(0, Blueprint.NORM, Operator.ADD),
    1: act(Op.ADVANCE, 0),
    3: act(Op.ADVANCE, 0),
    6: act(Op.ADVANCE, 0),
    8: act(Op.FOSSILIZE, 0),
}
HORIZON = 9
TRIAL = {decision: action for decision, action in LIFE.items() if decision < HORIZON - 1}
STAGES = {0: Stage.GERMINATED, 1: Stage.TRAINING, 3: Stage.BLENDING, 6: Stage.PROBATIONARY}
"""What a seed is after each decision of its life, up to the next one named."""
tasks = pytest.mark.parametrize("task", TASK_NAMES)
# On this one a seed moves the running statistics of what is behind it.
NORMED = "digits-mlp"


def lives(*lengths):
    """Actions by row and decision: the first row is a twin, each other one lives so many decisions of `LIFE`."""
    return {row: {d: a for d, a in LIFE.items() if d < length} for row, length in enumerate(lengths, 1)}


def both(task="mnist1d-mlp", **more):
    env = environment(task=task, groups=1, horizon=HORIZON, updates=6, **more)
    return env, play(env, script(3, {COMMITS: LIFE, TRIES: TRIAL}))


class Plan:
    """A controller that does for each row what a table says."""

    flag = scores = None

    def __init__(self, plans, rows):
        self.plans, self.rows = plans, rows

    def observe(self, view):
        self.decision = view.decision

    def act(self):
        plans = [self.plans.get(row, {}) for row in range(self.rows)]
        return torch.tensor([list(plan.get(self.decision, WAIT)) for plan in plans])


def ended(task, plans, *, rows=3, updates=6, dtype=torch.float64, start=0):
    """An episode that is over, its rows all of one start."""
    config = run_config(task, horizon=HORIZON, updates=updates, batch=16, growth=OPEN_GATES)
    loaded = task_of(task, dtype=dtype, examples=200)
    ids_R = torch.full((rows,), start)
    episode = Episode(config, loaded, "never", ids_R, dtype=dtype)
    episode.controller = Plan(plans, rows)
    while not episode.done:
        episode.advance()
    return episode


def loss_of(network, split):
    with torch.no_grad():
        return example_losses(network(split.x)[None], split.y[None]).mean()


# Committing is worth something.


@tasks
def test_a_seed_that_is_not_committed_is_neither_measured_nor_paid_for(task):
    env, played = both(task)
    reward_DR = played.reward_DR
    assert torch.equal(reward_DR[:-1, COMMITS], reward_DR[:-1, TRIES])
    assert reward_DR[-1, COMMITS] != reward_DR[-1, TRIES]
    balance = env.balance(lambda data: data.reward_validation)
    assert balance.loss_R[COMMITS] != balance.loss_R[TRIES]
    assert balance.added_R[COMMITS] > 0
    assert balance.added_R[TRIES] == 0
    # All rent that was paid on the way comes back.
    assert float(played.part_DR("rent")[:, TRIES].double().sum()) == pytest.approx(0, abs=1e-7)
    assert played.part_DR("rent")[-1, TRIES] > 0
    assert torch.equal(balance.loss_R, env.episode.view().val_loss_R)
    torch.testing.assert_close(played.return_R.float(), balance.net_R, rtol=0, atol=1e-5)


@tasks
def test_the_exported_network_is_the_one_that_was_measured(task):
    episode = ended(task, {0: LIFE, 1: TRIAL})
    view, split = episode.view(), episode.task.data.reward_validation
    host = episode.task.host.body.parameter_count
    networks = [export_row(episode.population, row) for row in range(3)]
    sizes = [sum(p.numel() for p in network.parameters()) - host for network in networks]
    assert sizes[0] == episode.population.slots.parameters[0].sum() > 0
    assert sizes[1:] == [0, 0]
    for row, network in enumerate(networks):
        torch.testing.assert_close(loss_of(network, split), view.val_loss_R[row], rtol=0, atol=1e-6)
    assert len({round(loss, 9) for loss in view.val_loss_R.tolist()}) == 3
    # A committed seed's contribution is measured, and nobody else's.
    assert view.slots.contribution.isfinite().nonzero().tolist() == [[0, 0]]


@pytest.mark.parametrize("length", range(1, HORIZON))
def test_whatever_a_seed_was_on_trial_it_is_gone(length):
    episode = ended("mnist1d-mlp", {0: {d: LIFE[d] for d in LIFE if d >= HORIZON - length} | {}, 1: {}}, rows=2)
    assert (episode.population.slots.seed_id < 0).all()


@pytest.mark.parametrize("decisions", [1, 2, 4, 7])
def test_a_seed_is_culled_from_every_stage(decisions):
    stage = [s for d, s in STAGES.items() if d < decisions][-1]
    late = {d + HORIZON - decisions: a for d, a in LIFE.items() if d < decisions}
    episode = ended("mnist1d-mlp", {0: late}, rows=1)
    step = episode.step()
    (event,) = [e for e in events_of(step, 0, episode.task.host.slot_config) if e.actor == END]
    assert (event.before, event.after, event.slot) == (stage.name, Stage.CULLED.name, "r0c0")
    assert not episode.population.seeds
    assert not episode.population.base.any()


@settings(max_examples=10)
@given(seed=st.integers(0, 2**30))
def test_whatever_is_done_the_return_is_gain_less_price_of_the_harvest(seed):
    env = environment(groups=2, horizon=14, contexts=PLAIN.model_copy(update={"prices": (0.3,)}))
    played = play(env, at_random(seed, ONWARD), seed % 50)
    slots, population = env.episode.population.slots, env.episode.population
    occupied_RS = slots.seed_id >= 0
    assert torch.equal(occupied_RS, slots.stage == int(Stage.FOSSILIZED))
    host, split = population.host.body.parameter_count, task_of("mnist1d-mlp", examples=40).data.reward_validation
    networks = [export_row(population, row) for row in range(env.rows)]
    loss_R = torch.stack([loss_of(network, split) for network in networks]).double()
    cost_R = torch.tensor([math.log(sum(p.numel() for p in n.parameters()) / host) for n in networks]).double()
    net_R = loss_R[env.contexts.twin_R] - loss_R - env.contexts.price_R.double() * cost_R
    torch.testing.assert_close(played.return_R, net_R, rtol=0, atol=2e-5)
    assert torch.equal(cost_R > 0, occupied_RS.any(1))


# Who lost nothing keeps everything.


@tasks
def test_rows_without_a_seed_on_trial_do_not_notice(task, monkeypatch):
    env, played = both(task)
    states = [RowState.of(env, row) for row in range(3)]
    loss_R, slots = env.episode.view().val_loss_R, env.episode.population.slots
    monkeypatch.setattr(
        episode_module, "harvest", lambda trainer, lost_R: torch.zeros_like(slots.stage, dtype=torch.bool)
    )
    other, without = both(task)
    for row in (0, COMMITS):
        assert states[row].same_as(RowState.of(other, row))
        assert loss_R[row] == other.episode.view().val_loss_R[row]
        assert torch.equal(played.reward_DR[:, row], without.reward_DR[:, row])
        for name in ("contribution", "contribution_se"):
            ours, theirs = (getattr(s, name)[row] for s in (slots, other.episode.population.slots))
            assert torch.equal(ours.nan_to_num(9.0), theirs.nan_to_num(9.0))
    assert loss_R[TRIES] != other.episode.view().val_loss_R[TRIES]


def estimated_in_full(episode):
    """Loss of each row with the statistics of the whole training split at once."""
    population, x = episode.population, episode.task.data.train.x
    with torch.no_grad():
        for table in population.hosts.buffers:
            table.zero_()
        population.forward(
            shared(x, population.rows, population.lane_axis), population.main_pass, statistics=Statistics.UPDATED
        )
    for table in population.hosts.buffers:
        table.mul_(10)
    return evaluate(population, episode.task.data.reward_validation).loss_R


@pytest.mark.parametrize("task", ["digits", "digits-mlp", "mnist1d"])
def test_running_statistics_are_those_of_the_host_without_its_seed_whoever_culled_it(task, monkeypatch):
    blueprint = Blueprint.MLP_LARGE if task == "digits-mlp" else Blueprint.CONV_HEAVY
    trial = {**TRIAL, 0: germinate(0, blueprint, Operator.ADD)}
    plans = {0: trial, 1: {**trial, HORIZON - 1: act(Op.CULL, 0)}, 2: {**trial, HORIZON - 2: act(Op.CULL, 0)}}
    episode = ended(task, plans, updates=20, start=6)
    ours_R, true_R = episode.view().val_loss_R, estimated_in_full(episode)
    assert float((ours_R - true_R).abs().max()) < 0.1
    assert not episode.population.base.any()
    # So they are not without it.
    monkeypatch.setattr(harvest_module, "estimate_statistics", lambda trainer, chosen_R: None)
    stale_R = ended(task, plans, updates=20, start=6).view().val_loss_R
    assert float((stale_R - true_R).abs()[0]) > max(0.05, 3 * float((ours_R - true_R).abs()[0]))


def test_before_the_last_decision_nothing_is_culled():
    env = environment(groups=1, horizon=HORIZON)
    seen = []
    play(env, script(3, {TRIES: TRIAL}), 0, lambda d, p: seen.append(int(env.episode.population.slots.stage[TRIES, 0])))
    stages = {int(stage) for stage in OCCUPIED_STAGES}
    assert set(seen[:-1]) <= stages
    assert seen[-1] == int(Stage.CULLED)


# Failures.


def spoil(trainer, chosen_R):
    """Statistics under which the chosen rows are useless."""
    for table in trainer.population.hosts.buffers:
        table[chosen_R] = 1e-6


def test_a_host_that_is_nothing_without_its_seed_has_not_failed(monkeypatch):
    """It is paid what it is worth: a rollback would pay it for the state that still had the seed."""
    monkeypatch.setattr(harvest_module, "estimate_statistics", spoil)
    env, played = both(NORMED, record=True)
    step = env.episode.step()
    assert step.val_loss_R[TRIES] > 20
    assert (step.panic_R == int(Panic.NONE)).all()
    assert not played.payments[-1].over_R.any()
    assert played.return_R[TRIES] < -3


@pytest.mark.parametrize("when", [5, 7, HORIZON - 1])
def test_a_row_that_was_rolled_back_has_the_statistics_of_what_it_returned_to(when):
    """What was kept of it was fitted with a seed in place that does not come back."""

    def fails(situation):
        action_RH = deed(situation)
        if env.episode.decision == when:
            false_alarm(env, TRIES)
        return action_RH

    env, deed = environment(task=NORMED, groups=1, horizon=HORIZON, updates=6), script(3, {TRIES: TRIAL})
    kept = {}

    def note(decision, payment):
        if decision < HORIZON - 1:
            kept[decision] = [table[TRIES].clone() for table in env.episode.population.hosts.buffers]

    play(env, fails, 0, note)
    assert env.episode.governor.retired_R.tolist() == [False, False, True]
    estimated = [table[TRIES].clone() for table in env.episode.population.hosts.buffers]
    behind = [not torch.equal(ours, theirs) for ours, theirs in zip(estimated, kept[when - 1], strict=True)]
    assert any(behind)
    env.episode.step()
    assert torch.equal(env.balance(lambda data: data.reward_validation).loss_R, env.episode.view().val_loss_R)


def test_a_row_that_was_rolled_back_without_a_loss_keeps_its_statistics():
    def fails(situation):
        action_RH = deed(situation)
        if env.episode.decision == 2:
            false_alarm(env, TRIES)
        return action_RH

    env, deed = environment(task=NORMED, groups=1, horizon=HORIZON, updates=6), script(3, {TRIES: TRIAL})
    states = []
    play(env, fails, 0, lambda decision, payment: states.append(RowState.of(env, TRIES)))
    assert env.episode.governor.retired_R[TRIES]
    assert states[-1].same_as(states[1])


# The record.


def test_the_end_of_the_episode_says_what_it_culled():
    episode = ended("mnist1d-mlp", {0: LIFE, 1: TRIAL, 2: {HORIZON - 1: germinate(2, Blueprint.NORM, Operator.ADD)}})
    step = episode.step()
    assert step.harvested_RS.nonzero()[0].tolist() == [1, 2]
    told = transitions_of(step)
    columns = transition_columns(told, episode.population.lifecycle.parameter_counts.numpy())
    rows = [
        (columns["row"][at], columns["slot"][at], columns["actor"][at], columns["op"][at], columns["before"][at])
        for at in range(len(told.row))
    ]
    assert rows == [
        (0, 0, "controller", "fossilize", "PROBATIONARY"),
        (1, 0, END, HARVEST, "PROBATIONARY"),
        (2, 2, "controller", "germinate", "DORMANT"),
        (2, 2, END, HARVEST, "GERMINATED"),
    ]
    of_end = columns["actor"] == END
    assert set(columns["reason"][of_end]) == {HARVESTED}
    assert set(columns["after"][of_end]) == {"CULLED"}
    assert columns["parameters"][of_end].tolist() == [48, 48]
    assert columns["step"].tolist() == [0, 1, 0, 1]
    assert all(columns["allowed"] == 1)


@pytest.mark.parametrize("updates", [1, 3])
def test_two_transfers_in_the_last_decision_and_one_before(monkeypatch, updates):
    env = environment(task=NORMED, groups=1, horizon=HORIZON, updates=updates)
    deed, counts = script(3, {COMMITS: LIFE, TRIES: TRIAL}), []
    situation = env.reset(0)
    for _ in range(HORIZON):
        action_RH = deed(situation)
        with monkeypatch.context() as patch:
            reads = reads_counted(patch)
            env.step(action_RH, None, torch.zeros((), dtype=torch.int64))
            counts.append(sum(name not in ("numpy", "__int__") for name in reads))
        situation = env.situation()
    assert counts == [1] * (HORIZON - 1) + [2]


def test_a_row_is_harvested_alike_whoever_is_beside_it():
    alone = ended(NORMED, {0: TRIAL}, rows=1)
    among = ended(NORMED, {0: LIFE, 1: TRIAL, 2: {}, 3: TRIAL}, rows=4)
    for row in (1, 3):
        for ours, theirs in zip(alone.population.hosts.buffers, among.population.hosts.buffers, strict=True):
            torch.testing.assert_close(ours[0], theirs[row])
        torch.testing.assert_close(alone.view().val_loss_R[0], among.view().val_loss_R[row])
    assert not np.array_equal(among.view().val_loss_R[1], among.view().val_loss_R[2])


# In time.


class Late(Plan):
    """Begins a life some decisions late, and notes whether there was time for it."""

    def __init__(self, late):
        super().__init__({0: {decision + late: action for decision, action in LIFE.items()}}, 1)
        self.late = late

    def observe(self, view):
        super().observe(view)
        if view.decision == self.late:
            self.in_time = bool(time_to_commit(view, TEMPOS[0]))


@pytest.mark.parametrize("late", [0, 3, 4])
def test_there_is_time_to_commit_up_to_the_last_decision_from_which_it_can_be_done(late):
    config = run_config("mnist1d-mlp", horizon=HORIZON + 3, updates=1, batch=8, growth=OPEN_GATES)
    episode = Episode(config, task_of("mnist1d-mlp", examples=20), "never", torch.arange(1))
    episode.controller = Late(late)
    while not episode.done:
        episode.advance()
    assert episode.controller.in_time == (late <= 3)
    assert (int(episode.population.slots.stage[0, 0]) == int(Stage.FOSSILIZED)) == (late <= 3)


@pytest.mark.parametrize("controller", ["periodic", "heuristic"])
@pytest.mark.parametrize("horizon", [11, 16, 23, 30])
def test_nothing_is_germinated_too_late_to_be_committed(controller, horizon):
    config = run_config("mnist1d-mlp", controller, horizon=horizon, updates=1, batch=8, growth=OPEN_GATES)
    recording = record(config, task_of("mnist1d-mlp", examples=20), 4)
    assert not recording.steps[-1].harvested_RS.any()
    if controller == "periodic" and horizon > 11:
        assert (recording.steps[-1].slots["stage"] == int(Stage.FOSSILIZED)).any()
