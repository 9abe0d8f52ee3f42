"""What is kept of a learner: with it the next updates are those of a learner that never stopped."""

import pytest
import torch

from esper.leyline.config import PPOConfig
from esper.leyline.errors import EsperError
from esper.simic.checkpoint import LEARNER, load_learner, save_learner
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
    save_learner(agent, tmp_path, 3)
    learn(agent, range(3, 6))

    kept = load_policy(tmp_path)
    kept.validation = policy.validation
    again = PPOAgent(kept, CONFIG, 3)
    assert load_learner(again, tmp_path) == 3
    assert again.updates == 3
    learn(again, range(3, 6))
    for name, tensor in policy.state_dict().items():
        assert torch.equal(tensor, kept.state_dict()[name]), name

    # And without what was kept it would not.
    bare = PPOAgent(load_policy(tmp_path), CONFIG, 3)
    learn(bare, range(3, 6))
    assert any(not torch.equal(a, b) for a, b in zip(policy.parameters(), bare.policy.parameters(), strict=True))


def test_a_new_learner_can_be_kept_too(tmp_path):
    policy, agent = learner()
    save_learner(agent, tmp_path, 0)
    assert load_learner(agent, tmp_path) == 0
    learn(agent, [0])
    _, other = learner()
    learn(other, [0])
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), other.policy.parameters(), strict=True))


def damaged(data):
    return [data[: len(data) // 2], b"", b"\x00" * 200]


def test_what_cannot_be_read_is_said_in_one_line_and_changes_nothing(tmp_path):
    _, agent = learner()
    with pytest.raises(EsperError, match="cannot read"):
        load_learner(agent, tmp_path)
    learn(agent, [0])
    save_learner(agent, tmp_path, 1)
    whole = (tmp_path / LEARNER).read_bytes()
    for data in damaged(whole):
        (tmp_path / LEARNER).write_bytes(data)
        with pytest.raises(EsperError, match=r"damaged; use an earlier one"):
            load_learner(agent, tmp_path)
    (tmp_path / LEARNER).write_bytes(whole.replace(b'format\\": 1', b'format\\": 7'))
    with pytest.raises(EsperError, match="another format"):
        load_learner(agent, tmp_path)
    (tmp_path / LEARNER).write_bytes(whole)
    wider = small_policy(width=20)
    stranger = PPOAgent(wider, CONFIG, 0)
    with pytest.raises(EsperError, match="belongs to another policy"):
        load_learner(stranger, tmp_path)
    assert stranger.updates == 0
    assert not stranger.optimizer.state
