"""Rewards, as an environment with real hosts pays them: contributions, the end, divergence, accuracy."""

import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.leyline.actions import Blueprint, Op
from esper.leyline.config import ObjectiveConfig
from esper.leyline.stages import Stage
from esper.simic.contexts import draw_contexts
from esper.simic.objective import WORST_GUESSES, Objective, Standing
from esper.tolaria.evaluation import evaluate
from helpers.environments import PLAIN, at_random, environment, legal_actions, onward, play, waits
from helpers.episodes import task_of
from helpers.growing import act
from helpers.objectives import (
    GUESS,
    HORIZON,
    TASK,
    close,
    few,
    made,
    presets,
    seeds,
    states,
)

# Contributions: attribution, escrow, drip.


def lead(state, env):
    return state["loss"][env.contexts.twin_R] - state["loss"]


def standing(lead, credit=1.0):
    """Only for leads that no host has."""
    known = {"utility_R": torch.tensor([0.0, lead]), "credit_R": torch.tensor([0.0, credit]), "left": 1}
    known = {"retired_R": torch.zeros(2, dtype=torch.bool), **known}
    return Standing(**{field.name: known.get(field.name, torch.zeros(2)) for field in fields(Standing)})


@pytest.mark.parametrize("steepness", [0.0, 10.0, 1e6])
@pytest.mark.parametrize("ahead", [-1e6, -1.0, 0.0, 1.0, 1e6])
def test_belief_saturates_and_never_overflows(steepness, ahead):
    contexts = draw_contexts(PLAIN, 0, 0, 1, 2)
    objective = Objective(ObjectiveConfig(preset="attribution", attribution_steepness=steepness), contexts, 1.0)
    objective.begin(standing(0.0, 0.0))
    paid = objective.pay(standing(ahead))["attribution"]
    assert paid.isfinite().all()
    at = steepness * ahead
    expected = 0.5 if at == 0 else float(at > 0) if abs(at) > 100 else 1 / (1 + math.exp(-at))
    assert float(paid[1]) == pytest.approx(expected, abs=1e-6)
    assert float(paid[0]) == 0


@few
@given(seed=seeds)
def test_attribution_is_the_change_of_what_is_believed(seed):
    env = made("attribution")
    seen, note = states(env)
    paid_DR = play(env, at_random(seed), seed % 50, note).part_DR("attribution").double()
    held = [torch.sigmoid(10 * lead(state, env)) * state["worth"].sum(1) for state in seen]
    close(paid_DR.sum(0), held[-1])
    for decision in range(1, HORIZON):
        close(paid_DR[decision], held[decision] - held[decision - 1])


@few
@given(seed=seeds, share=st.sampled_from([0.0, 0.3, 1.0]))
def test_escrow_holds_a_share_until_commitment(seed, share):
    env = made("escrow", escrow_share=share)
    seen, note = states(env)
    paid_DR = play(env, at_random(seed), seed % 50, note).part_DR("escrow").double()
    held = [(s["worth"] * torch.where(s["committed"], 1.0, share)).sum(1) for s in seen]
    close(paid_DR.sum(0), held[-1])
    for decision in range(1, HORIZON):
        close(paid_DR[decision], held[decision] - held[decision - 1])


def grown(preset, end, *, updates=30, **objective):
    """Row 1 grows a seed that is worth something; `end` may replace what it does from a stage on."""
    env = environment(preset, horizon=18, updates=updates, contexts=PLAIN, **objective)
    forward = onward(0, rows=(1,), blueprint=int(Blueprint.MLP_LARGE))

    def deed(situation):
        action_RH = forward(situation)
        stage = Stage(int(env.episode.population.slots.stage[1, 0]))
        age = int(env.episode.population.slots.stage_age[1, 0])
        return end(stage, age, action_RH)

    seen, note = states(env)
    return env, play(env, deed, 1, note), seen


def commit(stage, age, action_RH):
    return action_RH


def cull_on_probation(stage, age, action_RH):
    if stage is Stage.PROBATIONARY:
        action_RH[1] = torch.tensor(act(Op.CULL, 0))
    elif stage in (Stage.CULLED, Stage.EMBARGOED, Stage.RESETTING, Stage.DORMANT) and age > 0:
        pass
    return action_RH


def test_escrow_pays_a_committed_seed_in_full():
    _, played, seen = grown("escrow", commit)
    assert seen[-1]["committed"][1, 0]
    worth = float(seen[-1]["worth"][1].sum())
    assert worth > 1e-3
    assert float(played.part_DR("escrow").double().sum(0)[1]) == pytest.approx(worth, abs=1e-5)


def test_escrow_takes_back_what_a_cull_throws_away():
    _, played, seen = grown("escrow", cull_on_probation)
    paid_D = played.part_DR("escrow")[:, 1].double()
    culls = [d for d in range(18) if seen[d]["stage"][1, 0] == int(Stage.CULLED)]
    assert culls
    earned = float(paid_D[: culls[0]].sum())
    assert earned > 1e-3
    assert float(paid_D[culls[0]]) == pytest.approx(-earned, abs=1e-5)


def test_drip_pays_the_contribution_at_commitment_in_equal_parts():
    _, played, seen = grown("drip", commit)
    paid_D = played.part_DR("drip")[:, 1]
    at = next(d for d in range(18) if seen[d]["committed"][1, 0])
    worth = float(seen[at]["worth"][1, 0])
    assert worth > 1e-3
    assert at < 16
    assert (paid_D[:at] == 0).all()
    assert len(set(paid_D[at:].tolist())) == 1
    assert float(paid_D.double().sum()) == pytest.approx(worth, abs=1e-5)


@few
@given(seed=seeds)
def test_drip_pays_for_every_seed_that_was_committed(seed):
    env = made("drip", horizon=20, updates=6)
    seen, note = states(env)
    both = onward(0, 1, rows=(1, 4), blueprint=int(Blueprint.MLP_LARGE), others=at_random(seed))
    paid_DR = play(env, both, seed % 50, note).part_DR("drip").double()
    none = torch.zeros_like(seen[0]["committed"])
    befores = [none, *(state["committed"] for state in seen[:-1])]
    fresh = [(s["worth"] * (s["committed"] & ~before)).sum(1) for s, before in zip(seen, befores, strict=True)]
    close(paid_DR.sum(0), torch.stack(fresh).sum(0))
    assert seen[-1]["committed"][[1, 4]].sum() >= 2


# At the end, and one's own.


@few
@given(seed=seeds)
def test_sparse_pays_what_paired_pays_at_the_end(seed):
    sparse, paired = (play(made(preset), at_random(seed), seed % 50) for preset in ("sparse", "paired"))
    assert (sparse.reward_DR[:-1] == 0).all()
    assert (sparse.reward_DR[-1] != 0).any() == (paired.return_R.abs() > 1e-6).any()
    close(sparse.return_R, paired.return_R)


@few
@given(seed=seeds)
def test_minimal_is_sparse_less_a_charge_for_each_action(seed):
    charge = 0.013
    minimal = play(made("minimal", intervention_charge=charge), at_random(seed), seed % 50)
    sparse = play(made("sparse"), at_random(seed), seed % 50)
    asked_DR = torch.stack(minimal.actions)[:, :, 0] != int(Op.WAIT)
    # Twins are not asked.
    asked_DR[:, [0, 3]] = False
    assert asked_DR.any()
    close(minimal.return_R, sparse.return_R - charge * asked_DR.sum(0))
    close(minimal.part_DR("intervention"), -charge * asked_DR, 1e-8)


@few
@given(seed=seeds)
def test_simplified_is_minimal_with_shaping(seed):
    simplified, minimal = (play(made(preset), at_random(seed), seed % 50) for preset in ("simplified", "minimal"))
    close(simplified.return_R, minimal.return_R, 1e-6)


def test_loss_pays_a_host_for_what_training_does():
    env = environment("loss", horizon=10, updates=20)
    env.reset(0)
    split = task_of(TASK, examples=40).data.reward_validation
    start_R = evaluate(env.episode.population, split).loss_R.double()
    played = play(env, waits, 0)
    end_R = evaluate(env.episode.population, split).loss_R.double()
    close(played.return_R, start_R - end_R)
    # The sign: whoever learns is paid, not charged.
    assert (played.return_R > 0.1).all()


@few
@given(seed=seeds)
def test_basic_is_own_improvement_less_rent(seed):
    basic, loss, paired = (play(made(p), at_random(seed), seed % 50) for p in ("basic", "loss", "paired"))
    assert torch.equal(basic.part_DR("own"), loss.part_DR("own"))
    assert torch.equal(basic.part_DR("rent"), paired.part_DR("rent"))
    # What a row gains on its twin is its own improvement less that of the twin.
    own_R = loss.return_R
    close(paired.part_DR("gain").double().sum(0), own_R - own_R[made("paired").contexts.twin_R])


# Divergence.


def spoiled(preset, row, value, *, at=6, seed=5, **more):
    env = made(preset, **more)

    def spoil(decision, payment):
        if decision == at:
            with torch.no_grad():
                env.episode.population.hosts.theta[row] = value

    return env, play(env, at_random(seed), 2, spoil), play(env, at_random(seed), 2)


@presets
@pytest.mark.parametrize("row", [1, 0])
def test_a_row_that_diverged_is_bad_but_not_infinitely_so(preset, row):
    _, played, sound = spoiled(preset, row, math.nan)
    group = [0, 1, 2] if row == 0 else [row]
    assert torch.equal(played.reward_DR[:, 3:], sound.reward_DR[:, 3:])
    others = [r for r in range(6) if r not in group]
    assert torch.equal(played.reward_DR[:, others], sound.reward_DR[:, others])
    assert played.reward_DR.isfinite().all()
    assert (played.run_DRF[:, others] == sound.run_DRF[:, others]).logical_or(played.run_DRF[:, others].isnan()).all()
    if preset in ("paired", "loss", "sparse"):
        rent = 0.3 * 3
        assert float(played.reward_DR.abs().max()) <= WORST_GUESSES * GUESS + rent
        assert float(played.return_R.abs().max()) <= WORST_GUESSES * GUESS + rent
    if preset in ("paired", "loss"):
        # Its episode ends there, and so do those of whoever had it for a twin; a twin itself is never charged.
        charge_R = torch.zeros(6, dtype=torch.float64)
        charge_R[1] = ObjectiveConfig().rollback_penalty * row
        close(played.return_R[group], (sound.reward_DR[:7].double().sum(0) - charge_R)[group])


@presets
def test_a_row_with_huge_parameters_is_bad_but_not_infinitely_so(preset):
    env = made(preset, horizon=16, contexts=PLAIN, updates=5)
    committed = []

    def spoil(decision, payment):
        slots = env.episode.population.slots
        committed.append(bool((slots.stage[1] == int(Stage.BLENDING)).any()))
        if sum(committed) == 1 and committed[-1]:
            with torch.no_grad():
                env.episode.population.hosts.theta[1] *= 1e6

    played = play(env, onward(0, 1, rows=(1, 4)), 2, spoil)
    assert any(committed)
    # No utility, and no difference of two utilities, is further from 0; two seeds can be credited.
    assert float(played.reward_DR.abs().max()) <= 2 * WORST_GUESSES * GUESS


# Accuracy.


@pytest.mark.parametrize("preset", ["paired", "loss", "sparse"])
@few
@given(seed=seeds)
def test_utility_may_be_accuracy(preset, seed):
    env = made(preset, utility="accuracy", contexts=PLAIN.model_copy(update={"prices": (0.0,)}), updates=4)
    played = play(env, at_random(seed), seed % 50)
    assert (played.return_R.abs() <= 1).all()
    split = task_of(TASK, examples=40).data.reward_validation
    accuracy_R = evaluate(env.episode.population, split).accuracy_R
    if preset == "loss":
        env.reset(seed % 50)
        accuracy_R = accuracy_R - evaluate(env.episode.population, split).accuracy_R
    else:
        accuracy_R = accuracy_R - accuracy_R[env.contexts.twin_R]
    close(played.return_R, accuracy_R)


def test_training_raises_accuracy():
    env = environment("loss", utility="accuracy", horizon=10, updates=20)
    assert (play(env, waits).return_R > 0.1).all()


def test_random_actions_here_are_legal():
    """What every test above rests on."""
    env = made()
    generator = torch.Generator().manual_seed(0)
    situation = env.reset(0)
    for _ in range(HORIZON - 1):
        env.step(legal_actions(situation.masks, generator))
        last = env.episode.view().last
        # Up to SPEED it is the structure that refuses; gates may.
        assert ((last.refused_by == 0) | (last.refused_by > 4)).all()
        situation = env.situation()
