"""What is kept of a learner: with it the next updates are those of a learner that never stopped."""

import pytest
import torch
from safetensors.torch import load, save

from esper.leyline.config import PPOConfig
from esper.simic.checkpoint import COUNTERS, MOMENTS, learner_files, restore_learner
from esper.simic.ppo import PPOAgent
from esper.simic.rollout import Rollout
from esper.tamiyo.policy.saved import load_policy, save_policy
from helpers.rollouts import fill, small_policy

CONFIG = PPOConfig(epochs=2, minibatches=2)


def learner(seed=0):
    policy = small_policy(seed)
    return policy, PPOAgent(policy, CONFIG, 3)


def learn(agent, numbers):
    for number in numbers:
        agent.set_progress(number / 10)
        agent.update(fill(Rollout(5, 6, 2), agent.policy, number))


def test_a_learner_that_was_kept_goes_on_as_if_it_had_never_stopped(tmp_path):
    policy, agent = learner()
    learn(agent, range(3))
    save_policy(policy, tmp_path)
    files = learner_files(agent)
    learn(agent, range(3, 6))

    kept = load_policy(tmp_path)
    kept.validation = policy.validation
    again = PPOAgent(kept, CONFIG, 3)
    restore_learner(again, files)
    assert again.updates == 3
    learn(again, range(3, 6))
    for name, tensor in policy.state_dict().items():
        assert torch.equal(tensor, kept.state_dict()[name]), name
    assert learner_files(again) == learner_files(agent)

    # And without what was kept it would not.
    bare = PPOAgent(load_policy(tmp_path), CONFIG, 3)
    learn(bare, range(3, 6))
    assert any(not torch.equal(a, b) for a, b in zip(policy.parameters(), bare.policy.parameters(), strict=True))


def test_a_new_learner_can_be_kept_too():
    policy, agent = learner()
    restore_learner(agent, learner_files(agent))
    learn(agent, [0])
    _, other = learner()
    learn(other, [0])
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), other.policy.parameters(), strict=True))


def wrong(files):
    yield {name: data for name, data in files.items() if name != MOMENTS}
    yield {name: data for name, data in files.items() if name != COUNTERS}
    for data in (b"", b"\x00" * 200, files[MOMENTS][:-50]):
        yield files | {MOMENTS: data}
    for data in (b"", b"[]", b"7", b"{}", b'{"updates": 1}', b"\xff"):
        yield files | {COUNTERS: data}
    moments = load(files[MOMENTS])
    first = next(iter(moments))
    yield files | {MOMENTS: save({name: tensor for name, tensor in moments.items() if name != first})}
    yield files | {MOMENTS: save({**moments, "somebody/exp_avg": torch.zeros(3)})}


def test_what_does_not_belong_is_refused_and_changes_nothing():
    _, agent = learner()
    learn(agent, [0])
    files = learner_files(agent)
    _, whole = learner()
    learn(whole, [0, 1])
    for other in wrong(files):
        with pytest.raises(ValueError, match="does not belong to this policy, or is damaged"):
            restore_learner(agent, other)
    wider = PPOAgent(small_policy(width=20), CONFIG, 0)
    with pytest.raises(ValueError, match="does not belong"):
        restore_learner(wider, files)
    assert (wider.updates, dict(wider.optimizer.state)) == (0, {})
    learn(agent, [1])
    assert learner_files(agent) == learner_files(whole)
