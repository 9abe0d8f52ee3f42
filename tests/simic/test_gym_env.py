"""Growth as a problem of gymnasium: its contracts, and that nothing is lost or added between it and the tensors."""

import doctest
import importlib
import sys

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import DictInfoToList, RecordEpisodeStatistics
from hypothesis import given, settings
from hypothesis import strategies as st
from sb3_contrib import MaskablePPO

from esper.leyline.actions import HEADS_OF_OP, Head, Op, head_sizes
from esper.leyline.checks import ALL_GATE_CHECKS, Check
from esper.leyline.config import ContextConfig, ObjectiveConfig
from esper.leyline.errors import EsperError
from esper.leyline.slots import gradual_cull_legal, legal_ops
from esper.leyline.starts import TRAINING
from esper.simic import gym_env
from esper.simic.environment import GrowthEnvironment
from esper.simic.gym_env import LIMIT, GrowthEnv, GrowthVectorEnv
from esper.simic.objective import PENALTY, PRESETS
from esper.tamiyo.policy.features import RUN_FEATURES
from helpers.episodes import OPEN_GATES, TASK_NAMES, run_config, task_of

HORIZON = 10


def growth(groups=2, size=3, *, task="digits-mlp", horizon=HORIZON, objective=None, **more):
    config = run_config(task, horizon=horizon, updates=1, batch=8, growth=OPEN_GATES, **more)
    data, objective = task_of(task, examples=40), objective or ObjectiveConfig()
    return GrowthEnvironment(config, data, ContextConfig(), objective, groups=groups, size=size)


def vector(*args, **more):
    return GrowthVectorEnv(growth(*args, **more))


def single(**more):
    return GrowthEnv(growth(1, 2, **more))


def pick(mask, generator, weights=1.0):
    """One of the choices of each row of a mask."""
    weights = mask * np.asarray(weights)
    return np.array([generator.choice(len(row), p=row / row.sum()) for row in weights])


def legal_actions(info, generator):
    """Draw from the masks, as a policy does whose later heads know the earlier ones."""
    rows, _, slots = info["action_mask_slot"].shape
    cuts = np.cumsum(list(head_sizes(slots).values()))[:-1]
    actions = np.stack([pick(m, generator) for m in np.split(info["action_mask_flat"], cuts, 1)], 1)
    # Few seeds would be committed if every other decision were a cull.
    weights = [{Op.CULL: 0.1, Op.SET_ALPHA_TARGET: 0.1}.get(op, 1.0) for op in Op]
    actions[:, Head.OP] = op = pick(info["action_mask_op"], generator, weights)
    each = np.arange(rows)
    actions[:, Head.SLOT] = slot = pick(info["action_mask_slot"][each, op], generator)
    # A seed fades out where its alpha may move; elsewhere a cull is at once.
    faded = info["action_mask_slot"][each, Op.SET_ALPHA_TARGET, slot]
    actions[(op == Op.CULL) & ~faded, Head.ALPHA_SPEED] = 0
    return actions


def play(env, actions, **reset):
    """Everything that a sequence of actions brings, step by step."""
    observation, info = env.reset(**reset)
    return [(observation, None, False, False, info), *(env.step(action) for action in actions)]


def random_actions(env, count, seed=0):
    env.action_space.seed(seed)
    return [env.action_space.sample() for _ in range(count)]


def assert_same(first, second):
    assert data_equivalence(first, second, exact=True)


@pytest.mark.parametrize("task", TASK_NAMES)
def test_spaces_hold_every_observation(task):
    env = vector(task=task, horizon=8)
    slots = env.environment.slots
    assert env.single_action_space.nvec.tolist() == list(head_sizes(slots).values())
    steps = play(env, random_actions(env, 8), seed=3)
    for observation, _, _, _, info in steps:
        assert observation in env.observation_space
        assert {v.dtype for v in observation.values()} == {np.dtype(np.float32)}
        assert info["action_mask_op"].shape == (6, len(Op))
        assert info["action_mask_slot"].shape == (6, len(Op), slots)
        assert info["action_mask_flat"].shape == (6, sum(head_sizes(slots).values()))
        assert {info[name].dtype for name in info if "mask" in name} == {np.dtype(bool)}
        assert (info["accepted"] == (info["refused_by"] == Check.NONE)).all()
        assert info["accepted"].dtype == info["twin"].dtype == bool
        assert info["twin"].tolist() == [True, False, False] * 2
        assert info["parts_gain"].shape == info["parts_rent"].shape == info["episode_number"].shape == (6,)
        assert info.keys() == steps[0][4].keys()
    for _, reward, terminated, truncated, _ in steps[1:]:
        assert reward.shape == terminated.shape == truncated.shape == (6,)
        assert (reward.dtype, terminated.dtype, truncated.dtype) == (np.float32, bool, bool)


@pytest.mark.parametrize("preset", ["paired", "simplified"])
def test_it_is_the_tensor_interface(preset):
    objective = ObjectiveConfig(preset=preset)
    env, direct = vector(objective=objective), growth(objective=objective)
    actions = random_actions(env, HORIZON)
    situation, parts = direct.reset(7), {name: torch.zeros(6) for name in (*PRESETS[preset], PENALTY)}
    reward = None
    for step, found in enumerate(play(env, actions, options={"episode": 7})):
        observation, paid, terminated, _, info = found
        if step:
            payment = direct.step(torch.tensor(actions[step - 1]))
            situation, parts, reward = direct.situation(), payment.parts, payment.reward_R
            np.testing.assert_array_equal(paid, reward.numpy())
            np.testing.assert_array_equal(terminated, payment.done)
        seen = {"slots": situation.observation.slot_RSF, "run": situation.observation.run_RF}
        for name, values in seen.items():
            # Ordinary values are within the bounds: only what was not measured is written differently.
            np.testing.assert_array_equal(observation[name], values.nan_to_num(0.0).numpy())
        np.testing.assert_array_equal(info["action_mask_op"], situation.masks.op_RO.numpy())
        np.testing.assert_array_equal(info["action_mask_slot"], situation.masks.slot_ROS.numpy())
        assert {n.removeprefix("parts_") for n in info if n.startswith("parts_")} == set(parts)
        for name, part in parts.items():
            np.testing.assert_array_equal(info[f"parts_{name}"], part.numpy())


def test_what_is_not_finite_stays_within_bounds():
    env = vector()
    env.reset()
    episode = env.environment.episode
    val_loss_R = torch.tensor([float("inf"), float("nan"), 1e30, -1e30, 1.0, 2.0])
    episode._seen = episode._seen._replace(val_loss_R=val_loss_R, train_loss_R=torch.full((6,), 1e38))
    observation, _, _ = env._report(env.environment.situation(), None)
    assert observation in env.observation_space
    assert observation["run"][:, 1].tolist()[:4] == [0.0, 0.0, LIMIT, -LIMIT]
    assert (observation["run"][:, 0] == LIMIT).all()


@pytest.mark.parametrize("make", [vector, single])
def test_a_seed_decides_everything(make):
    env, other = make(), make()
    actions = random_actions(env, HORIZON)
    first = play(env, actions, seed=5)
    assert_same(first, play(other, actions, seed=5))
    assert_same(first, play(env, actions, seed=5))
    # It is that of a run: as if the environment had been made with it.
    assert_same(first, play(make(seed=5), actions))
    assert_same(first, play(env, actions, seed=5, options={"episode": 0}))
    different = play(env, actions, seed=6)
    assert not any(np.array_equal(a[0]["run"], b[0]["run"]) for a, b in zip(first[1:], different[1:], strict=True))


def test_episodes_are_numbered():
    env = vector()
    numbers = [
        env.reset(**how)[1]["episode_number"] for how in ({}, {}, {"seed": 2}, {}, {"options": {"episode": 9}}, {})
    ]
    assert [n.tolist() for n in numbers] == [[n] * 6 for n in (0, 1, 0, 1, 9, 10)]
    assert env.reset(seed=3, options={"episode": 7})[1]["episode_number"][0] == 7
    with pytest.raises(EsperError, match="unknown option 'speed'; known: episode"):
        env.reset(options={"speed": 1})
    for bad in (-1, 2**18, 2**43, 1.5, "1"):
        with pytest.raises(ValueError, match=r"^reset: episode must be an integer from 0 to 262143, got .*$"):
            env.reset(options={"episode": bad})
    for bad in (-1, 2**63, 2**64, 1.5, "1"):
        with pytest.raises(ValueError, match=r"^reset: seed must be an integer from 0 to 9223372036854775807, got .*$"):
            env.reset(seed=bad)
    assert env.reset()[1]["episode_number"][0] == 8, "what was refused changed nothing"


def test_after_the_last_episode_of_a_seed_there_is_none():
    env = vector(horizon=1)
    env.reset(seed=1, options={"episode": 2**18 - 1})
    assert env.step(np.zeros((6, 8), dtype=int))[2].all()
    for further in (lambda: env.step(np.zeros((6, 8), dtype=int)), env.reset):
        with pytest.raises(ValueError, match="got 262144; another seed has others"):
            further()
    assert env.reset(seed=2)[1]["episode_number"][0] == 0


KEYS = st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**18 - 1))


@given(keys=st.lists(KEYS | st.sampled_from([(0, 0), (2**63 - 1, 2**18 - 1)]), min_size=2, max_size=2, unique=True))
@settings(max_examples=10)
def test_no_two_seeds_or_episodes_share_a_start_and_none_is_reserved(keys):
    """A start is its number and the seed of its streams: what a host draws first."""
    env, drawn = vector(), []
    for seed, episode in keys:
        env.reset(seed=seed, options={"episode": episode})
        start_id_R = env.environment.contexts.start_id_R
        assert all(number in TRAINING for number in start_id_R.tolist())
        drawn.append(env.environment.episode.population.hosts.theta.detach()[::3])
    # Two groups of each.
    assert len({tuple(theta.tolist()) for theta in torch.cat(drawn)}) == 4


def test_the_step_after_the_last_begins_the_next_episode():
    env, fresh = vector(), vector()
    assert env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    actions = random_actions(env, HORIZON + 2)
    steps = play(env, actions, options={"episode": 3})
    assert [step[2] is False or bool(step[2].any()) for step in steps[1:]] == [False] * 9 + [True] + [False] * 2
    assert steps[HORIZON][2].all()
    assert not any(np.any(step[3]) for step in steps)
    observation, reward, _, _, info = steps[HORIZON + 1]
    assert not reward.any()
    assert (info["accepted"].all(), info["refused_by"].any(), info["parts_gain"].any()) == (True, False, False)
    assert_same((observation, info), fresh.reset(options={"episode": 4}))
    assert_same(steps[HORIZON + 2], fresh.step(actions[-1]))
    # `final_obs` belongs to the other mode: the last observation of an episode is that of its last step.
    assert not {"final_obs", "final_info"} & set(info)
    np.testing.assert_array_equal(steps[HORIZON][0]["run"][:, 11], 1.0)
    assert RUN_FEATURES[11].name == "progress"


def test_the_grown_population_is_there_until_the_next_episode_begins():
    env = vector()
    steps = play(env, random_actions(env, HORIZON), seed=0)
    assert steps[-1][2].all()
    assert env.environment.episode.done


def test_wrappers_of_vectors_take_it():
    env = DictInfoToList(RecordEpisodeStatistics(vector()))
    actions = random_actions(env, HORIZON)
    steps = play(env, actions, seed=0)
    total = np.sum([step[1] for step in steps[1:]], 0)
    assert [i["episode"]["l"] for i in steps[-1][4]] == [HORIZON] * 6
    np.testing.assert_allclose([i["episode"]["r"] for i in steps[-1][4]], total, atol=1e-6)


def brute_force(population, row):
    """Choices of every head that some legal pair of operation and slot leaves open, where it uses the head."""
    slots, fits = population.slots, population.fits_SB
    legal, gradual, sizes = legal_ops(slots, fits)[row], gradual_cull_legal(slots)[row], head_sizes(slots.slots)
    found = {head: set() for head in Head}
    for op in Op:
        for slot in range(slots.slots if op is not Op.WAIT else 1):
            if not legal[op, slot]:
                continue
            found[Head.OP].add(int(op))
            for head in HEADS_OF_OP[op] - {Head.OP}:
                choices = set(range(sizes[head])) if head is not Head.SLOT else {slot}
                if op is Op.GERMINATE and head is Head.BLUEPRINT:
                    choices = set(fits[slot].nonzero()[:, 0].tolist())
                if op is Op.CULL and head is Head.ALPHA_SPEED and not gradual[slot]:
                    choices = {0}
                found[head] |= choices
    return [choice in (found[head] or {0}) for head in Head for choice in range(sizes[head])]


@pytest.mark.parametrize("task", ["digits-mlp", "mnist1d"])
def test_masks(task):
    """The flat mask is what brute force finds, and what the masks allow only a gate refuses."""
    env, generator = vector(2, 8, task=task, horizon=30), np.random.default_rng(0)
    _, info = env.reset(seed=1)
    refused, performed, seen = set(), set(), set()
    for _ in range(30):
        population = env.environment.episode.population
        for row in range(env.num_envs):
            assert info["action_mask_flat"][row].tolist() == brute_force(population, row)
        seen |= {row.tobytes() for row in info["action_mask_flat"]}
        actions = legal_actions(info, generator)
        *_, info = env.step(actions)
        refused |= set(info["refused_by"].tolist())
        performed |= set(actions[info["accepted"] & ~info["twin"], Head.OP].tolist())
        assert info["accepted"][info["twin"]].all()
    assert refused - {Check.NONE} <= {int(check) for check in ALL_GATE_CHECKS}
    assert (performed, len(seen) > 5, len(refused) > 1) == (set(Op), True, True)


def test_what_is_impossible_is_refused_and_changes_nothing():
    env, idle = vector(), vector()
    env.reset(seed=1), idle.reset(seed=1)
    actions = np.zeros((6, len(Head)), dtype=np.int64)
    actions[:, Head.OP] = [Op.CULL, Op.CULL, Op.FOSSILIZE, Op.GERMINATE, Op.ADVANCE, Op.GERMINATE]
    _, reward, _, _, info = env.step(actions)
    # Rows 0 and 3 are twins; blueprint 0 is none at all.
    assert info["refused_by"].tolist() == [0, Check.STAGE, Check.STAGE, 0, Check.STAGE, Check.BLUEPRINT]
    np.testing.assert_array_equal(reward, idle.step(np.zeros_like(actions))[1])


@pytest.mark.parametrize(
    "actions",
    [
        *(np.zeros((5, 8), dtype=int), np.zeros((6, 8)), np.full((6, 8), -1), np.full((6, 8), 99)),
        *(np.zeros(8, dtype=int), [*[[0] * 8] * 5, [0] * 7], [[2**70] * 8] * 6, "wait", None),
    ],
)
def test_what_is_no_action_is_an_error(actions):
    env = vector()
    env.reset()
    with pytest.raises(InvalidAction, match=r"actions must be integers \[6, 8\]"):
        env.step(actions)


def test_rewards_tell_what_growth_was_worth():
    env, generator = vector(3, 4, horizon=30), np.random.default_rng(0)
    _, info = env.reset(seed=1)
    total = np.zeros(12)
    for _ in range(30):
        _, reward, _, _, info = env.step(legal_actions(info, generator))
        np.testing.assert_array_equal(reward, info["parts_gain"] + info["parts_rent"])
        assert (reward[info["twin"]] == 0.0).all()
        total += reward
    objective = env.environment.objective
    np.testing.assert_allclose(total, objective.net(objective._before).numpy(), atol=1e-5)
    assert (total[~info["twin"]] != 0).mean() > 0.5


def test_one_host_is_the_second_row_of_a_pair():
    env, pair = single(), vector(1, 2)
    actions = random_actions(env, HORIZON)
    both = play(pair, [np.stack((action, action)) for action in actions], seed=4)
    for one, two in zip(play(env, actions, seed=4), both, strict=True):
        assert_same(one[0], {name: values[1] for name, values in two[0].items()})
        assert one[1:4] == (None if two[1] is None else two[1][1], np.all(two[2]), False)
        assert one[4].keys() == two[4].keys() - {"twin"}
        for name, value in one[4].items():
            np.testing.assert_array_equal(value, two[4][name][1])
    np.testing.assert_array_equal(env.action_masks(), both[-1][4]["action_mask_flat"][1])


def test_an_episode_has_a_beginning_and_an_end():
    env = single(horizon=1)
    for call in (env.action_masks, lambda: env.step(env.action_space.sample())):
        with pytest.raises(ResetNeeded):
            call()
    env.reset()
    assert env.step(env.action_space.sample())[2] is True
    with pytest.raises(ResetNeeded, match="the episode is over"):
        env.step(env.action_space.sample())
    with pytest.raises(ResetNeeded):
        vector().step(np.zeros((6, 8), dtype=int))
    env.close(), env.close()
    with pytest.raises(EsperError, match="one group of 2, got 6 rows"):
        GrowthEnv(growth())


def test_gymnasium_finds_no_fault():
    env = single()
    # With a specification it also checks closing and determinism; none is registered.
    env.spec = EnvSpec("Growth-v0", entry_point=single, nondeterministic=False)
    check_env(env)


def test_vectors_of_gymnasium_take_it():
    env = SyncVectorEnv([single, single])
    _, info = env.reset(seed=1)
    assert info["episode_number"].tolist() == [0, 0]
    for _ in range(HORIZON + 1):
        observation, *_, info = env.step(env.action_space.sample())
        assert observation in env.observation_space
    assert info["episode_number"].tolist() == [1, 1]
    theta, other = (one._pair.environment.episode.population.hosts.theta.detach() for one in env.envs)
    assert not torch.equal(theta, other)
    assert {value.dtype.kind for name, value in info.items()} <= set("bfi")


def learn(steps, rollout):
    env = single()
    model = MaskablePPO("MultiInputPolicy", env, n_steps=rollout, n_epochs=1, seed=0, device="cpu")
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    model.learn(steps)
    after = model.policy.state_dict()
    assert model.num_timesteps >= steps
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(np.isfinite(episode["r"]) and episode["l"] == HORIZON for episode in model.ep_info_buffer)
    observation, _ = env.reset(seed=1)
    action, _ = model.predict(observation, action_masks=env.action_masks())
    starts = np.cumsum([0, *env.action_space.nvec[:-1]])
    assert env.action_masks()[starts + action].all()


def test_maskable_ppo_takes_it():
    learn(128, 64)


@pytest.mark.slow
def test_maskable_ppo_learns_on_it():
    learn(2_000, 200)


def test_documented_examples_run():
    result = doctest.testmod(gym_env)
    assert (result.failed, result.attempted > 6) == (0, True)


def test_without_gymnasium_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    monkeypatch.delitem(sys.modules, "esper.simic.gym_env")
    with pytest.raises(EsperError, match=r"^gymnasium is needed .*; run: pip install 'esper-grow\[gym\]'$"):
        importlib.import_module("esper.simic.gym_env")
    assert gymnasium is not None


def spoiled(env, row):
    env.episode.population.hosts.theta.detach()[row] = np.nan


def test_a_row_that_is_rolled_back_waits_for_the_others():
    env, calm = vector(), vector()
    actions = random_actions(env, HORIZON)
    for each in (env, calm):
        each.reset(seed=1)
    for number, action in enumerate(actions):
        if number == 4:
            spoiled(env.environment, 1)
        observation, reward, terminated, truncated, info = env.step(action)
        seen, paid, *_ = calm.step(action)
        assert observation in env.observation_space
        assert info["over"].tolist() == [row == 1 and number >= 4 for row in range(6)]
        assert terminated.tolist() == [number == HORIZON - 1] * 6
        assert not truncated.any()
        np.testing.assert_array_equal(np.delete(reward, 1), np.delete(paid, 1))
        np.testing.assert_array_equal(np.delete(observation["run"], 1, 0), np.delete(seen["run"], 1, 0))
        assert reward[1] == (paid[1] if number < 4 else np.float32(-0.3) if number == 4 else 0)
    # The next episode is one of all of them.
    assert not env.step(actions[0])[4]["over"].any()


@pytest.mark.parametrize("row", [0, 1])
def test_one_host_that_is_rolled_back_is_at_its_end(row):
    env = single()
    env.reset()
    env.step(np.zeros(8, dtype=int))
    spoiled(env._pair.environment, row)
    _, reward, terminated, truncated, info = env.step(np.zeros(8, dtype=int))
    assert (terminated, truncated, info["over"]) == (True, False, True)
    assert reward == pytest.approx(-0.3 * row)
    with pytest.raises(ResetNeeded, match="the episode is over"):
        env.step(np.zeros(8, dtype=int))
    assert env.reset()[1]["over"] is False
