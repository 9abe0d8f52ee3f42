"""Rewards, as an environment with real hosts pays them: what holds of all, paired, shaping."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings

from esper.leyline.actions import Blueprint, Op
from esper.leyline.config import ObjectiveConfig
from esper.leyline.stages import Stage
from esper.simic.objective import PENALTY, PRESETS, TERMS
from helpers.environments import PLAIN, at_random, environment, onward, play, script, waits
from helpers.growing import act, germinate
from helpers.objectives import EVERY, HORIZON, close, eager, few, final_net, made, presets, seeds, states

# What holds of all.


@presets
def test_what_a_preset_pays_for_exists(preset):
    assert ObjectiveConfig(preset=preset).preset == preset
    assert set(PRESETS[preset]) <= set(TERMS)
    payment = play(environment(preset, horizon=1), waits).payments[0]
    # And whatever is paid for, a rollback costs.
    assert tuple(payment.parts) == (*PRESETS[preset], PENALTY)


@presets
@few
@given(seed=seeds)
def test_parts_sum_to_the_reward_and_are_finite(preset, seed):
    env = made(preset)
    played = play(env, at_random(seed), seed % 50)
    for payment in played.payments:
        assert payment.reward_R.shape == (env.rows,)
        assert payment.reward_R.dtype == torch.float32
        assert torch.equal(sum(payment.parts.values()), payment.reward_R)
        for part_R in payment.parts.values():
            assert part_R.shape == (env.rows,)
            assert part_R.isfinite().all()
    assert (played.reward_DR != 0).any()


@pytest.mark.parametrize("preset", [p for p in EVERY if "own" not in PRESETS[p]])
@few
@given(seed=seeds)
def test_twins_and_those_that_wait_get_exactly_nothing(preset, seed):
    env, random = made(preset), at_random(seed)

    def deed(situation):
        action_RH = random(situation)
        action_RH[2] = 0
        return action_RH

    reward_DR = play(env, deed, seed % 50).reward_DR
    # Row 0 and row 3 are twins, whatever is asked of them; row 2 waits.
    assert (reward_DR[:, [0, 2, 3]] == 0).all()


# paired.


@settings(max_examples=8)
@given(seed=seeds)
def test_paired_pays_the_final_lead_less_rent(seed):
    env = made()
    played = play(env, at_random(seed), seed % 50)
    net_R, cost_R = final_net(env)
    close(played.return_R, net_R)
    close(played.part_DR("gain").double().sum(0) - net_R, env.contexts.price_R * cost_R)


def test_paired_is_tested_on_hosts_that_grew():
    env = made()
    played = play(env, eager, 3)
    net_R, cost_R = final_net(env)
    assert (cost_R[[1, 4]] > 0.1).all()
    assert (cost_R[[0, 2, 3, 5]] == 0).all()
    assert (net_R[[1, 4]].abs() > 1e-3).all()
    close(played.return_R, net_R)


def test_a_seed_at_alpha_0_costs_nothing_yet():
    env = made()
    costs = {}

    def note(decision, payment):
        stage = Stage(int(env.episode.population.slots.stage[1, 0]))
        costs.setdefault(stage, []).append(float(payment.parts["rent"][1]))

    play(env, onward(0, rows=(1,)), 0, note)
    assert all(cost == 0 for stage in (Stage.GERMINATED, Stage.TRAINING) for cost in costs[stage])
    assert costs[Stage.BLENDING][0] < 0
    assert costs[Stage.FOSSILIZED]
    assert set(costs[Stage.FOSSILIZED]) == {0.0}


def test_the_price_is_the_rows_own():
    shares = {}
    for price in (0.0, 0.1, 0.4):
        env = environment(horizon=HORIZON, contexts=PLAIN.model_copy(update={"prices": (price,)}))
        shares[price] = play(env, eager).part_DR("rent").double().sum(0)
    assert (shares[0.0] == 0).all()
    close(shares[0.4], 4 * shares[0.1])
    assert (shares[0.1][[1, 4]] < 0).all()


def cycles(slots=(0, 1, 2)):
    """Germinate and cull at once, slot by slot, over and over; embargoed slots come back after 4 decisions."""
    plan = {}
    for decision in range(0, 18, 2):
        slot = slots[decision // 2 % len(slots)]
        plan[decision] = germinate(slot, Blueprint.MLP_SMALL, 0)
        plan[decision + 1] = act(Op.CULL, slot)
    return plan


@pytest.mark.parametrize("preset", [p for p in EVERY if not {"own", "intervention"} & set(PRESETS[p])])
def test_germinating_and_culling_earns_nothing(preset):
    env = made(preset, horizon=18, contexts=PLAIN)
    germinated = []

    def note(decision, payment):
        germinated.append(env.episode.population.slots.seeds_made.clone())

    played = play(env, script(6, {1: cycles(), 2: cycles((2, 0, 1))}), 0, note)
    assert germinated[-1].tolist() == [0, 9, 9, 0, 0, 0]
    if "shaping" in PRESETS[preset]:
        assert (played.reward_DR[:, 1] != 0).any()
        close(played.return_R, torch.zeros(6), 1e-8)
    else:
        assert (played.reward_DR == 0).all()


@pytest.mark.parametrize("preset", ["simplified", "minimal"])
def test_where_interventions_are_charged_a_cycle_costs(preset):
    played = play(made(preset, horizon=18, contexts=PLAIN), script(6, {1: cycles()}))
    close(played.return_R, torch.tensor([0, -18e-3, 0, 0, 0, 0]), 1e-7)


# Shaping.


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("preset", ["shaped", "simplified"])
@few
@given(seed=seeds)
def test_shaping_sums_to_nothing_whatever_is_done(preset, gamma, seed):
    env = made(preset, gamma=gamma, shaping_gamma=gamma, shaping_weight=0.7)
    seen, note = states(env)
    shaping_DR = play(env, at_random(seed), seed % 50, note).part_DR("shaping").double()
    discount_D1 = gamma ** torch.arange(HORIZON, dtype=torch.float64)[:, None]
    close((discount_D1 * shaping_DR).sum(0), torch.zeros(env.rows), 3e-6)
    # In between it is what seeds have come to.
    before_R = torch.zeros(env.rows, dtype=torch.float64)
    for decision in range(HORIZON - 1):
        after_R = seen[decision]["potential"]
        close(shaping_DR[decision], 0.7 * (gamma * after_R - before_R))
        before_R = after_R
    assert any(state["potential"].any() for state in seen)


def test_a_committed_seed_is_worth_the_whole_weight_until_the_end():
    env = environment("shaped", horizon=HORIZON, shaping_weight=0.25)
    shaping_DR = play(env, onward(0, rows=(1,))).part_DR("shaping")
    assert int(env.episode.population.slots.stage[1, 0]) == int(Stage.FOSSILIZED)
    assert float(shaping_DR[:-1, 1].sum()) == pytest.approx(0.25, abs=1e-6)
    assert float(shaping_DR[-1, 1]) == pytest.approx(-0.25, abs=1e-6)


@few
@given(seed=seeds)
def test_shaped_is_paired_and_shaping(seed):
    shaped = play(made("shaped"), at_random(seed), seed % 50)
    paired = play(made("paired"), at_random(seed), seed % 50)
    assert all(torch.equal(a, b) for a, b in zip(shaped.actions, paired.actions, strict=True))
    for name in ("gain", "rent"):
        assert torch.equal(shaped.part_DR(name), paired.part_DR(name))
    close(shaped.return_R - shaped.part_DR("shaping").double().sum(0), paired.return_R, 1e-6)
    close(shaped.return_R, paired.return_R, 1e-6)


@pytest.mark.parametrize("preset", ["shaped", "simplified"])
def test_shaping_for_another_discount_is_refused(preset):
    with pytest.raises(ValueError, match=r"shaping_gamma is 1 and the learner's gamma 0\.9"):
        environment(preset, gamma=0.9).reset(0)
    with pytest.raises(ValueError, match="shaping"):
        environment(preset, gamma=1.0, shaping_gamma=0.5).reset(0)
    environment(preset, gamma=0.5, shaping_gamma=0.5).reset(0)


@pytest.mark.parametrize("preset", [p for p in EVERY if "shaping" not in PRESETS[p]])
def test_without_shaping_any_discount_will_do(preset):
    environment(preset, gamma=0.9).reset(0)


def test_another_discount_is_refused_without_assertions_too():
    code = """
from esper.leyline.config import ContextConfig, ObjectiveConfig
from esper.simic.contexts import draw_contexts
from esper.simic.objective import Objective
assert False, "assertions are on"
try:
    Objective(ObjectiveConfig(preset="shaped"), draw_contexts(ContextConfig(), 0, 0, 1, 2), 0.99)
except ValueError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("refused: objective: shaping_gamma is 1 and the learner's gamma 0.99")
