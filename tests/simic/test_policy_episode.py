"""A saved policy in whole episodes: on every task, row by row, with one transfer for each decision."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from esper.kasmina.hosts import Host
from esper.leyline.actions import Op, SiteKind
from esper.leyline.config import HostConfig, PolicyConfig
from esper.leyline.errors import EsperError, InvalidStateMachineError
from esper.simic.episode import Episode
from esper.tamiyo.controllers.policy import PolicyController
from esper.tamiyo.policy.network import FactoredRecurrentActorCritic
from esper.tamiyo.policy.saved import save_policy
from helpers.episodes import TASK_NAMES, record, run_config, task_of

READS = ("cpu", "item", "tolist", "__bool__", "__float__", "__int__", "__index__")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    policy = FactoredRecurrentActorCritic(PolicyConfig(width=16, hidden=16))
    policy.initialise(torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("policy")
    save_policy(policy, folder)
    return folder


def recording(saved, task, rows, kind="policy", horizon=12):
    config = run_config(task, f"{kind}:{saved}", horizon=horizon, updates=1, batch=8)
    return record(config, task_of(task, examples=40), rows)


@pytest.mark.parametrize("task", TASK_NAMES)
def test_it_acts_on_every_task(saved, task):
    steps = recording(saved, task, 16).steps
    ops = np.stack([step.action_RH[:, 0] for step in steps])
    # A new policy sees seeds through; it hardly ever culls one.
    assert {Op.WAIT, Op.GERMINATE, Op.ADVANCE} <= set(ops.flat)
    for step in steps:
        # Masks leave gates as the only thing that can refuse.
        assert not (~step.accepted_R & ~np.isin(step.action_RH[:, 0], (Op.ADVANCE, Op.FOSSILIZE))).any()


def test_a_policy_that_is_certain_does_not_explore(tmp_path):
    """1,500 decisions: with a share of 2 % some thirty would be something else."""
    policy = FactoredRecurrentActorCritic(PolicyConfig(width=16, hidden=16))
    policy.initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer in (policy.op_head, policy.slot_query, policy.rest_head):
            layer.weight *= 1e6
        policy.op_head.weight.zero_()
        policy.op_head.bias[Op.GERMINATE], policy.op_head.bias[Op.ADVANCE] = 500.0, 1000.0
    save_policy(policy, tmp_path)
    sampled, greedy = (recording(tmp_path, "digits-mlp", range(128), kind).steps for kind in ("policy", "greedy"))
    for one, other in zip(sampled, greedy, strict=True):
        assert np.array_equal(one.action_RH, other.action_RH)
    assert {Op.GERMINATE, Op.ADVANCE} <= {op for step in sampled for op in step.action_RH[:, 0].tolist()}


@pytest.mark.parametrize("slots", [1, 6])
def test_it_acts_on_another_number_of_slots(saved, slots):
    task = task_of("digits-mlp", examples=40)
    host = Host(HostConfig(kind=SiteKind.VECTOR, widths=(4,) * slots), task.host.example, 10)
    config = run_config("digits-mlp", f"policy:{saved}", horizon=8, updates=1, batch=8)
    steps = record(config, replace(task, host=host), 32).steps
    named = {int(slot) for step in steps for op, slot in step.action_RH[:, :2] if op != Op.WAIT}
    assert named == set(range(slots))


@pytest.mark.parametrize("kind", ["policy", "greedy"])
def test_a_row_knows_nothing_of_the_others(saved, kind):
    whole, part = (recording(saved, "digits-mlp", rows, kind) for rows in (range(6), [4, 1]))
    for step, of_part in zip(whole.steps, part.steps, strict=True):
        np.testing.assert_array_equal(step.action_RH[[4, 1]], of_part.action_RH)


def test_greedy_draws_nothing(saved):
    first, second = (recording(saved, "digits-mlp", [row], "greedy", horizon=3) for row in (0, 1))
    # Nothing distinguishes rows before anything is measured.
    np.testing.assert_array_equal(first.steps[0].action_RH, second.steps[0].action_RH)


def counting(monkeypatch):
    """Count every place where a tensor becomes a Python value."""
    reads = []

    def counted(name, whole):
        def call(self, *args, **kwargs):
            reads.append(name)
            return whole(self, *args, **kwargs)

        return call

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
    return reads


@pytest.mark.parametrize("kind", ["policy", "greedy"])
def test_one_transfer_for_each_decision_everything_included(saved, monkeypatch, kind):
    config = run_config("digits", f"{kind}:{saved}", horizon=10, updates=2)
    episode = Episode(config, task_of("digits", examples=40), config.controller, torch.arange(8))
    episode.advance(record=True)
    with monkeypatch.context() as patch:
        reads = counting(patch)
        while not episode.done:
            before = len(reads)
            step = episode.advance(record=True)
            # The last decision has a second one, for the harvest.
            assert reads[before:] == ["cpu"] * (1 + episode.done)
            assert step.decision == episode.decision - 2


def test_records_that_travel_along_equal_those_taken_at_once(saved):
    config = run_config("digits-mlp", f"policy:{saved}", horizon=8, updates=2)
    task = task_of("digits-mlp", examples=40)
    one, other = (Episode(config, task, config.controller, torch.arange(4)) for _ in range(2))
    along, at_once = [], []
    while not one.done:
        along.append(one.advance(record=True))
        other.advance()
        at_once.append(other.step())
    assert along[0] is None
    for told, taken in zip([*along[1:], one.step()], at_once, strict=True):
        assert told.decision == taken.decision
        for name in ("action_RH", "refused_by_R", "value_CRS", "val_loss_R", "legal_RO", "log_prob_RH", "value_R"):
            np.testing.assert_array_equal(getattr(told, name), getattr(taken, name))
        np.testing.assert_array_equal(told.structure.stage, taken.structure.stage)
        for name, values in taken.slots.items():
            np.testing.assert_array_equal(told.slots[name], values)


def broken(saved, monkeypatch, what):
    config = run_config("digits-mlp", f"policy:{saved}", horizon=8, updates=2)
    episode = Episode(config, task_of("digits-mlp", examples=40), config.controller, torch.arange(4))
    assert isinstance(episode.controller, PolicyController)
    episode.advance()
    theta = episode.population.hosts.theta.detach().clone()
    what(episode.controller)
    return episode, theta


def test_a_policy_that_diverged_is_found_before_the_next_update(saved, monkeypatch):
    def diverge(controller):
        with torch.no_grad():
            controller._policy.op_head.weight.fill_(float("nan"))

    episode, theta = broken(saved, monkeypatch, diverge)
    with pytest.raises(EsperError, match="the policy has diverged"):
        episode.advance()
    assert torch.equal(episode.population.hosts.theta.detach(), theta)


def test_a_state_without_a_legal_action_is_found(saved, monkeypatch):
    def forbid(controller):
        whole = controller._policy.get_action

        def without(observation, masks, *args, **kwargs):
            return whole(observation, replace(masks, op_RO=torch.zeros_like(masks.op_RO)), *args, **kwargs)

        monkeypatch.setattr(controller._policy, "get_action", without)

    episode, _ = broken(saved, monkeypatch, forbid)
    with pytest.raises(InvalidStateMachineError, match="no valid choice"):
        episode.advance()
