"""An episode that is put away at any decision and taken up again is, to the last bit, one that never stopped."""

from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from esper.leyline.actions import SiteKind
from esper.leyline.config import GovernorConfig
from esper.simic.checkpoint import EPISODE, episode_parts, restore_episode
from esper.simic.episode import Episode
from helpers.episodes import CONTROLLER_NAMES, TASK_NAMES, run_config, task_of
from helpers.faults import FAULTS, dead_gradient, exploding_rate
from helpers.growing import QUICK
from helpers.recorded import save_new_policy

ROWS, HORIZON = 5, 14
tasks = pytest.mark.parametrize("task", TASK_NAMES)


@pytest.fixture(scope="module")
def controllers(tmp_path_factory):
    """Give the name of each controller, saved policies included."""
    folder = save_new_policy(tmp_path_factory.mktemp("policy"))
    return dict(zip(CONTROLLER_NAMES, CONTROLLER_NAMES, strict=True)) | {
        kind: f"{kind}:{folder}" for kind in ("policy", "greedy")
    }


def made(task, controller, precision="float32", **more):
    # Gradients that stay away are noticed in the first decision without an update.
    governor = GovernorConfig(most_skipped_updates=2, recovery_decisions=3)
    config = run_config(task, controller, horizon=HORIZON, updates=2, growth=QUICK, governor=governor)
    training = config.training.model_copy(update={"precision": precision})
    config = config.model_copy(update={"training": training})
    return Episode(config, task_of(task, examples=48), controller, torch.arange(ROWS), **more)


def again(episode, **more):
    """Put an episode away, and take it up in a new one."""
    facts, files = episode_parts(episode)
    other = made(episode.task.config.name, episode.config.controller, **more)
    restore_episode(other, facts, files)
    return other


def same(one, other):
    """Compare arrays or plain values, NaN being NaN."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    return one == other


def check_same_step(one, other):
    assert (one is None) == (other is None)
    for field in fields(one) if one else ():
        parts = [getattr(step, field.name) for step in (one, other)]
        assert same(*(vars(part) if field.name in ("structure", "acted") else part for part in parts)), field.name


def check_same_state(one, other):
    (facts, tensors), (its_facts, its_tensors) = one.state(), other.state()
    assert facts == its_facts
    assert tensors.keys() == its_tensors.keys()
    for name, tensor in tensors.items():
        assert same(tensor.detach().numpy(), its_tensors[name].detach().numpy()), name


@tasks
@pytest.mark.parametrize("controller", [*CONTROLLER_NAMES, "policy", "greedy"])
def test_it_goes_on_as_if_it_had_never_stopped(task, controller, controllers):
    whole = made(task, controllers[controller])
    parts = {}
    while not whole.done:
        step = whole.advance(record=True)
        for part in parts.values():
            check_same_step(part.advance(record=True), step)
        if whole.decision in (1, 6, 11, HORIZON):
            parts[whole.decision] = again(whole)
    assert len(parts) == 4
    if controller in ("random", "periodic"):
        assert whole.population.slots.seeds_made.sum() > 0
    for part in parts.values():
        check_same_step(part.step(), whole.step())
        check_same_state(part, whole)


@tasks
def test_in_mixed_precision_too(task):
    whole, exact = made(task, "random", "bfloat16"), made(task, "random")
    part = None
    while not whole.done:
        step = whole.advance(record=True)
        exact.advance()
        if part is not None:
            check_same_step(part.advance(record=True), step)
        if whole.decision == 6:
            part = again(whole, precision="bfloat16")
    check_same_state(part, whole)
    assert whole.population.slots.seeds_made.sum() > 0
    assert not torch.equal(whole.population.hosts.theta, exact.population.hosts.theta)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("later", [1, 2])
@pytest.mark.parametrize("recovers", [False, True])
def test_with_a_row_that_was_just_rolled_back(fault, later, recovers):
    """Its seeds are culled, and the host has not heard of it, where it is put away at once."""
    whole = made("digits-mlp", "random", recovers=recovers)
    while whole.decision < 8:
        whole.advance()
    row = int(whole.population.slots.seed_id.ge(0).sum(1).argmax())
    fault(SimpleNamespace(episode=whole, rows=ROWS), row)
    for _ in range(later):
        whole.advance()
    failed_R = whole.governor.restored_R if recovers else whole.governor.retired_R
    if not failed_R[row]:
        # A rate that is too high is seen in the losses after it.
        whole.advance()
        failed_R = whole.governor.restored_R if recovers else whole.governor.retired_R
    assert failed_R[row]
    part = again(whole, recovers=recovers)
    assert recovers == (part.trainer.rate_R[row] < part.contexts.rate_R[row])
    # The fault goes on, in both.
    if fault is exploding_rate:
        part.contexts.rate_R.copy_(whole.contexts.rate_R)
        part.trainer.rate_R.copy_(whole.trainer.rate_R)
    if fault is dead_gradient:
        fault(SimpleNamespace(episode=part, rows=ROWS), row)
    while not whole.done:
        check_same_step(part.advance(record=True), whole.advance(record=True))
    check_same_step(part.step(), whole.step())
    check_same_state(part, whole)


@tasks
def test_a_static_network(task):
    whole = made(task, "never", static=True)
    for _ in range(3):
        whole.advance()
    part = again(whole, static=True)
    while not whole.done:
        check_same_step(part.advance(record=True), whole.advance(record=True))
    check_same_state(part, whole)


def test_it_may_be_put_away_again_and_again():
    whole = part = made("mnist1d-mlp", "random")
    for _ in range(HORIZON):
        whole.advance()
        if whole is not part:
            part.advance()
        part = again(again(part))
        check_same_state(part, whole)


def test_without_a_decision_there_is_nothing_to_put_away():
    with pytest.raises(RuntimeError, match="no decision was made yet"):
        made("digits-mlp", "never").state()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda facts, files: facts.pop("decision"), "decision"),
        (lambda facts, files: facts.update(decision=0), "decision"),
        (lambda facts, files: facts.update(seed=7), "random numbers are those of .*7"),
        (lambda facts, files: facts.update(start_ids=[0, 1, 2, 3, 9]), "random numbers are those of"),
        (lambda facts, files: facts["topology"].update(rows=4), "4 rows instead of 5"),
        (lambda facts, files: facts["topology"]["banks"][0].update(site=9), "site 9"),
        (lambda facts, files: facts["topology"]["banks"][0].update(blueprint="NONE"), "NONE"),
        (lambda facts, files: facts["topology"]["banks"][0].update(rows=[0] * 99), "instead of"),
        (lambda facts, files: files.pop(EPISODE), EPISODE),
        (lambda facts, files: files.update({EPISODE: files[EPISODE][:-1]}), EPISODE),
        (lambda facts, files: files.update({EPISODE: b""}), EPISODE),
    ],
)
def test_what_is_of_something_else_is_refused(change, complaint):
    whole = made("digits-mlp", "random")
    while not whole.population.seeds:
        whole.advance()
    facts, files = episode_parts(whole)
    change(facts, files)
    with pytest.raises(ValueError, match=complaint):
        restore_episode(made("digits-mlp", "random"), facts, files)


def test_hosts_of_another_shape_are_refused():
    whole = made("digits-mlp", "never")
    whole.advance()
    facts, files = episode_parts(whole)
    other = made("mnist1d-mlp", "never")
    assert whole.task.host.kind is other.task.host.kind is SiteKind.VECTOR
    with pytest.raises(ValueError, match=r"theta is torch.float32 \[5, 1410\] instead of"):
        restore_episode(other, facts, files)


def test_a_policy_that_was_trained_on_meanwhile_is_refused(tmp_path):
    name = f"policy:{save_new_policy(tmp_path)}"
    whole = made("digits-mlp", name)
    whole.advance()
    facts, files = episode_parts(whole)
    other = made("digits-mlp", name)
    next(other.controller._policy.parameters()).data.view(-1)[0] += 1
    with pytest.raises(ValueError, match="the policy in its folder is no longer the one that it began with"):
        restore_episode(other, facts, files)
