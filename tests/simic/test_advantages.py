"""Advantages of whole rounds against the loops of other implementations and of this file."""

import importlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from esper.simic.advantages import generalized_advantages, group_advantages

NAN, INF = float("nan"), float("inf")
SHARES = st.one_of(st.sampled_from([0.0, 0.5, 0.97, 1.0]), st.floats(0, 1))
ROUNDS = {"seed": st.integers(0, 2**40), "decisions": st.integers(1, 20), "rows": st.integers(1, 6)}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def random_round(seed: int, decisions: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values, and decisions that were made: rows end anywhere, some before they begin."""
    generator = torch.Generator().manual_seed(seed)
    length_R = torch.randint(decisions + 1, (rows,), generator=generator)
    length_R[torch.rand(rows, generator=generator) < 0.3] = decisions
    made_TR = torch.arange(decisions)[:, None] < length_R
    reward_TR, value_TR = (torch.randn(decisions, rows, generator=generator) for _ in range(2))
    return reward_TR, value_TR, made_TR


def spoiled(values: Tensor, made: Tensor, seed: int) -> Tensor:
    """Anything at all where no decision was made."""
    wild = torch.tensor([NAN, INF, -INF, 1e30])[
        torch.randint(4, made.shape, generator=torch.Generator().manual_seed(seed))
    ]
    return torch.where(made, values, wild)


@pytest.mark.parametrize("name", ["generalized_advantage_estimate", "vec_generalized_advantage_estimate"])
@settings(max_examples=60)
@given(**ROUNDS, gamma=st.floats(0.1, 1), gae_lambda=SHARES)
def test_they_equal_those_of_torchrl(
    name: str, seed: int, decisions: int, rows: int, gamma: float, gae_lambda: float
) -> None:
    if name.startswith("vec"):
        # It fails where the product of both is next to nothing.
        gae_lambda = max(gae_lambda, 0.1)
    theirs = getattr(importlib.import_module("torchrl.objectives.value.functional"), name)
    reward, value, made = random_round(seed, decisions, rows)
    done = made & ~torch.cat((made[1:], torch.zeros(1, rows, dtype=torch.bool)))
    following = torch.cat((value[1:], torch.full((1, rows), 7.0)))
    shaped = (x.T[..., None].contiguous() for x in (value, following, reward, done, done))
    expected = theirs(gamma, gae_lambda, *shaped)[0][..., 0].T
    told = generalized_advantages(spoiled(reward, made, seed), spoiled(value, made, seed + 1), made, gamma, gae_lambda)
    assert told.dtype == torch.float32
    torch.testing.assert_close(told[made], expected[made], **CLOSE)
    assert not told[~made].any()


@settings(max_examples=60)
@given(**ROUNDS, gamma=st.floats(0.01, 1), gae_lambda=SHARES)
def test_they_equal_those_of_stable_baselines(
    seed: int, decisions: int, rows: int, gamma: float, gae_lambda: float
) -> None:
    buffers, spaces = (importlib.import_module(m) for m in ("stable_baselines3.common.buffers", "gymnasium.spaces"))
    reward, value, made = random_round(seed, decisions, rows)
    box = spaces.Box(0, 1, (1,))
    buffer = buffers.RolloutBuffer(decisions, box, box, "cpu", gae_lambda, gamma, n_envs=rows)
    buffer.rewards, buffer.values = reward.numpy(), value.numpy()
    starts = np.zeros((decisions, rows), dtype=np.float32)
    length_R = made.sum(0)
    for row, length in enumerate(length_R.tolist()):
        starts[length:, row] = 1.0
    buffer.episode_starts = starts
    buffer.compute_returns_and_advantage(torch.full((rows,), 9.0), np.ones(rows))
    told = generalized_advantages(reward, value, made, gamma, gae_lambda)
    torch.testing.assert_close(told[made], torch.from_numpy(buffer.advantages)[made], **CLOSE)


def test_undiscounted_they_are_reward_to_go_less_value() -> None:
    reward, value, made = random_round(3, 30, 8)
    to_go = (reward * made).flip(0).cumsum(0).flip(0)
    told = generalized_advantages(reward, value, made, 1.0, 1.0)
    torch.testing.assert_close(told, (to_go - value) * made, rtol=1e-5, atol=1e-5)


def test_with_lambda_0_they_look_at_one_reward_and_the_next_value() -> None:
    reward, value, made = random_round(4, 30, 8)
    following = torch.cat(((value * made)[1:], torch.zeros(1, 8)))
    told = generalized_advantages(reward, value, made, 0.9, 0.0)
    torch.testing.assert_close(told, (reward + 0.9 * following - value) * made, rtol=1e-5, atol=1e-5)


def test_long_episodes_are_exact() -> None:
    reward, value, made = random_round(5, 1000, 3)
    expected, ahead = np.zeros((1000, 3)), np.zeros(3)
    plain = (reward.double() * made).numpy(), (value.double() * made).numpy()
    for t in reversed(range(1000)):
        following = plain[1][t + 1] if t < 999 else 0.0
        ahead = plain[0][t] + 0.999 * following - plain[1][t] + 0.999 * 0.97 * ahead
        expected[t] = ahead
    told = generalized_advantages(reward, value, made, 0.999, 0.97)
    np.testing.assert_allclose(told.numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wild", [NAN, INF])
def test_a_row_whose_reward_is_not_finite_keeps_that_to_itself(wild: float) -> None:
    reward, value, made = random_round(6, 10, 4)
    made[:] = True
    clean = generalized_advantages(reward, value, made, 0.99, 0.9)
    reward[5, 2] = wild
    told = generalized_advantages(reward, value, made, 0.99, 0.9)
    assert not told[:6, 2].isfinite().any()
    others = [0, 1, 3]
    torch.testing.assert_close(told[:, others], clean[:, others], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_they_are_as_precise_under_autocast(dtype: torch.dtype) -> None:
    reward, value, made = random_round(7, 40, 4)
    expected = generalized_advantages(reward, value, made, 0.99, 0.97)
    with torch.autocast("cpu", dtype):
        told = generalized_advantages(reward, value, made, 0.99, 0.97)
    assert told.dtype == torch.float32
    torch.testing.assert_close(told, expected, rtol=1e-6, atol=1e-6)


# --- Groups ---


def plain_group(return_R: list[float], group_R: list[int], counts_R: list[bool]) -> list[float]:
    told = []
    for row, mine in enumerate(group_R):
        others = [
            value for other, value in enumerate(return_R) if other != row and group_R[other] == mine and counts_R[other]
        ]
        told.append(return_R[row] - sum(others) / len(others) if counts_R[row] and others else 0.0)
    return told


@given(seed=st.integers(0, 2**40), rows=st.integers(1, 20), groups=st.integers(1, 20), share=st.floats(0, 1))
def test_groups_equal_a_plain_loop(seed: int, rows: int, groups: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    group_R = torch.randint(min(groups, rows), (rows,), generator=generator)
    return_R = torch.randn(rows, generator=generator) * 3
    counts_R = torch.rand(rows, generator=generator) < share
    expected = torch.tensor(plain_group(return_R.tolist(), group_R.tolist(), counts_R.tolist()))
    for others in (return_R, spoiled(return_R, counts_R, seed)):
        told = group_advantages(others, group_R, counts_R)
        torch.testing.assert_close(told, expected, rtol=1e-4, atol=1e-5)
        assert not told[~counts_R].any()


def test_a_row_without_company_gets_0() -> None:
    counts_R = torch.tensor([True, True, False, True, True])
    told = group_advantages(torch.tensor([5.0, 3.0, NAN, 1.0, 2.0]), torch.tensor([0, 1, 1, 4, 4]), counts_R)
    assert told.tolist() == [0.0, 0.0, 0.0, -1.0, 1.0]
