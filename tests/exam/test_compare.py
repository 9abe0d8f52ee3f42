"""The comparison: who plays what, on which starts, and what the differences are."""

import numpy as np
import pytest
import torch

from esper.exam.compare import (
    BY_CONTEXT,
    BY_PRICE,
    CONTROLS,
    HEDGE,
    HEURISTIC,
    NEVER,
    RANDOM_PLAN,
    REPLAY,
    SINGLE,
    Arm,
    Score,
    _control,
    arms,
    compare,
    differences,
)
from esper.exam.headroom import Way
from esper.exam.plans import NOTHING, Family, Plan, Seed
from esper.exam.replay import Modal
from esper.leyline.actions import Blueprint, Style
from esper.leyline.config import CompareConfig
from esper.leyline.starts import EXAM
from esper.simic.contexts import grid
from esper.tolaria.evaluation import evaluate
from helpers.exams import NOISE, PRICES, RATES, WIDTHS, WORLD, exam_tasks, small_headroom
from helpers.rollouts import small_policy

STARTS = 3
ONE, OTHER = (Plan((Seed(slot, Blueprint.NORM, Style.LINEAR_MULTIPLY),)) for slot in (0, 2))
MODALS = (Modal(ONE, (ONE, OTHER)), Modal(NOTHING, (OTHER, NOTHING)))
SHAPE = (len(WIDTHS), STARTS, len(RATES) * len(NOISE), len(PRICES))


def configured(**more):
    told = {**WORLD, "headroom": "h", "policies": ("p",), "starts": STARTS, **more}
    return CompareConfig.model_validate(told)


@pytest.fixture(scope="module")
def played():
    """Every arm of two untrained policies, and the last episode of each arm and width."""
    episodes = {}

    def keep(episode, arm):
        episodes.setdefault(arm, []).append(episode)

    players = arms(small_headroom(), [small_policy(0), small_policy(1)], MODALS)
    scores = dict(compare(configured(), exam_tasks(), players, recorder=keep))
    return scores, episodes, players


def test_every_arm_plays_every_context(played):
    scores, episodes, players = played
    ways = [f"policy {n}, {way}" for n in (0, 1) for way in ("greedy", "drawing")]
    replays = [f"{REPLAY} {n}{prices}" for n in (0, 1) for prices in ("", ", each price")]
    expected = [*CONTROLS, RANDOM_PLAN, HEDGE, SINGLE, BY_PRICE, BY_CONTEXT, *replays, *ways]
    assert list(scores) == expected == [arm.name for arm in players]
    for name, score in scores.items():
        for values in vars(score).values():
            assert values.shape == SHAPE
            assert np.isfinite(values).all(), name
        assert len(episodes[name]) == len(WIDTHS)


def test_all_start_alike_and_nobody_else_starts_there(played):
    _, episodes, _ = played
    ids = [{*episode.contexts.start_id_R.tolist()} for of in episodes.values() for episode in of]
    assert all(one == {*EXAM[:3]} for one in ids)


def test_what_an_arm_scores_is_its_lead_over_growing_nothing_less_rent(played):
    scores, episodes, _ = played
    width, task = 1, exam_tasks()[1]
    never, policy = (episodes[name][width].population for name in (NEVER, "policy 1, greedy"))
    never_KC1 = evaluate(never, task.data.test).loss_R.double().view(*SHAPE[1:3], 1)
    own_KCP = evaluate(policy, task.data.test).loss_R.double().view(SHAPE[1:])
    slots = policy.slots
    added_KCP = (slots.parameters * (slots.alpha > 0)).sum(1).view(SHAPE[1:])
    rent_KCP = torch.tensor(PRICES) * torch.log1p(added_KCP / task.host.body.parameter_count)
    score = scores["policy 1, greedy"]
    np.testing.assert_allclose(score.gain[width], never_KC1 - own_KCP, atol=1e-6)
    np.testing.assert_allclose(score.net[width], never_KC1 - own_KCP - rent_KCP, atol=1e-6)
    np.testing.assert_array_equal(score.added[width], added_KCP)
    np.testing.assert_allclose(score.by_start(), score.net.mean((0, 2, 3)))
    assert (scores[NEVER].net == 0).all()


def test_who_does_not_see_the_price_pays_it_all_the_same(played):
    scores, episodes, _ = played
    for name in ("random", SINGLE):
        score = scores[name]
        assert episodes[name][0].population.rows == STARTS * 4
        np.testing.assert_array_equal(score.gain[..., 0], score.gain[..., 1])
        assert (score.net[..., 1] < score.net[..., 0])[score.added[..., 0] > 0].all()
    for name in (HEURISTIC, HEDGE, BY_PRICE):
        assert episodes[name][0].population.rows == STARTS * 4 * len(PRICES)
    prices_R = episodes["policy 0, drawing"][0].contexts.price_R
    assert torch.equal(prices_R.view(SHAPE[1:])[0, 0], torch.tensor(PRICES))


def living(episode):
    """Slot and blueprint of the seeds that live in the last decision of each row, before the harvest."""
    grown = episode.step().acted.blueprint.tolist()
    return [{(s, b) for s, b in enumerate(blueprints) if b != Blueprint.NOOP} for blueprints in grown]


def may_live(plan):
    """What a plan may leave: a late one may end before its last seed was germinated."""
    return {(seed.slot, int(seed.blueprint)) for seed in plan.seeds if seed.cull is None}


def sure(plan):
    """What it leaves for certain."""
    return {(s.slot, int(s.blueprint)) for s in plan.seeds if s.cull is None and s.begin < 8}


def test_plans_are_those_that_the_search_chose(played):
    """What grew in each context is the plan that the table says."""
    _, episodes, _ = played
    table = small_headroom()
    for name, way in ((SINGLE, Way.SINGLE), (BY_PRICE, Way.BY_PRICE), (BY_CONTEXT, Way.BY_CONTEXT)):
        prices = 1 if name == SINGLE else len(PRICES)
        for width, episode in enumerate(episodes[name]):
            numbers = np.tile(table.chosen_VWCP[way, width, :, :prices].flatten(), STARTS)
            grown = living(episode)
            assert len(grown) == len(numbers)
            for live, number in zip(grown, numbers, strict=True):
                assert sure(table.plans[number]) <= live <= may_live(table.plans[number])


def test_every_row_of_random_plans_plays_one_of_its_own(played):
    _, episodes, _ = played
    for episode in episodes[RANDOM_PLAN]:
        family = Family.of(episode.config, episode.task.host.slot_config)
        plans = family.sampled(episode.population.rows, episode.config.seed, RANDOM_PLAN)
        assert len(set(plans)) == len(plans) == STARTS * 4
        for live, plan in zip(living(episode), plans, strict=True):
            assert sure(plan) <= live <= may_live(plan)


def test_a_replay_plays_what_the_policy_does_most_often(played):
    _, episodes, _ = played
    for number, modal in enumerate(MODALS):
        for episode in episodes[f"{REPLAY} {number}"]:
            assert living(episode) == [may_live(modal.plan)] * STARTS * 4
        for episode in episodes[f"{REPLAY} {number}, each price"]:
            assert living(episode) == [may_live(plan) for plan in modal.by_price] * STARTS * 4


def test_a_later_comparison_takes_other_starts():
    episodes = []
    players = [Arm(name, _control(name)) for name in (NEVER,)]
    told = configured(starts=2, first_start=2000)
    list(compare(told, exam_tasks(), players, recorder=lambda episode, _: episodes.append(episode)))
    assert {*episodes[0].contexts.start_id_R.tolist()} == {EXAM.start + 2000, EXAM.start + 2001}


def test_the_same_exam_again_is_the_same():
    players = [Arm(name, _control(name)) for name in (NEVER, "random")]
    one, other = (dict(compare(configured(starts=2), exam_tasks(), players))["random"] for _ in range(2))
    assert (one.net == other.net).all()


def test_progress_goes_from_nothing_to_all():
    told = []
    players = [Arm(NEVER, _control(NEVER)), Arm("heuristic", _control("heuristic"), sees_price=True)]
    list(compare(configured(starts=2), exam_tasks(), players, told=lambda name, share: told.append((name, share))))
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    # Two widths of twelve decisions, and the second arm takes two prices as long.
    assert [name for name, _ in told] == [NEVER] * 24 + ["heuristic"] * 24
    assert shares[23] == pytest.approx(1 / 3)


def score_of(*by_start):
    net = np.array(by_start)[None, :, None, None] * np.ones((1, 1, 1, 2))
    return Score(net, net, net, net)


def test_differences_are_paired_by_start():
    """Starts differ by more than arms do; the difference is .1 on every start, so that its interval has no width."""
    scores = {
        NEVER: score_of(0.0, 0.0, 0.0),
        "heuristic": score_of(1.0, 5.0, 9.0),
        "policy 0, greedy": score_of(1.1, 5.1, 9.1),
        "policy 0, drawing": score_of(1.0, 5.0, 8.0),
        "policy 1, greedy": score_of(1.3, 5.3, 9.3),
    }
    found = differences(scores)
    # Only what there are several of is averaged.
    assert list(found) == [*list(scores)[2:], "mean of 2 policies, greedy"]
    one, all_of_them = found["policy 0, greedy"], found["mean of 2 policies, greedy"]
    assert one["heuristic"].mean.low == pytest.approx(0.1)
    assert one["heuristic"].improvement.mean == 1.0
    assert all_of_them["heuristic"].mean.mean == pytest.approx(0.2)
    assert not found["policy 0, drawing"]["heuristic"].mean.excludes_zero
    assert found["policy 1, greedy"][NEVER].mean.mean == pytest.approx(5.3)


def test_the_difference_of_all_policies_is_over_training_seeds_too():
    """The policies differ by 0.2 on every start: starts alone would say that the mean is certain."""
    scores = {
        NEVER: score_of(0.0, 0.0, 0.0),
        "policy 0, greedy": score_of(0.1, 0.1, 0.1),
        "policy 1, greedy": score_of(0.3, 0.3, 0.3),
    }
    found = differences(scores)
    assert found["policy 1, greedy"][NEVER].mean.over == "3 starts"
    both = found["mean of 2 policies, greedy"][NEVER].mean
    assert both.over == "2 training seeds, 3 starts"
    assert both.low < 0.1
    assert both.high > 0.3


def test_a_grid_has_every_combination_once():
    config = configured().contexts
    contexts = grid(config, torch.tensor([7, 9]), PRICES, 3)
    rows = list(
        zip(*(getattr(contexts, f"{n}_R").tolist() for n in ("start_id", "rate", "noise", "price")), strict=True)
    )
    assert len(rows) == 2 * 4 * 2 * 3
    assert len(set(rows)) == 2 * 4 * 2
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert contexts.grows_R.all()
    assert torch.equal(contexts.twin_R, torch.arange(48))
