"""The problems with known answers: the answers, by trying everything, and that they are learned."""

import importlib.util
from pathlib import Path

import pytest
import torch

from esper.leyline.actions import HEAD_COUNT, Blueprint, Head, Op
from helpers.environments import at_random, play, waits

PATH = Path(__file__).parents[2] / "examples" / "known_answers.py"
UNIFORM = (1.0,) * len(Op)


def load():
    spec = importlib.util.spec_from_file_location("known_answers", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


known_answers = load()
NAMES = tuple(known_answers.PROBLEMS)
ROWS = known_answers.ROWS
problems = pytest.mark.parametrize("name", NAMES)


def problem(name, seed=0):
    return known_answers.PROBLEMS[name](seed)


def germinate(blueprint_R, where_R=None):
    """Rows germinate, all or some."""
    action_RH = torch.zeros(ROWS, HEAD_COUNT, dtype=torch.int64)
    action_RH[:, Head.OP], action_RH[:, Head.BLUEPRINT] = int(Op.GERMINATE), torch.as_tensor(blueprint_R)
    return action_RH if where_R is None else action_RH * where_R[:, None]


def fitting(what):
    """Blueprints that the mask of germination leaves open."""
    masks = what.reset(0).masks
    ones = torch.ones(ROWS, dtype=torch.int64)
    mask_RHC = masks.chosen(ones * int(Op.GERMINATE), ones * 0)
    return mask_RHC[0, Head.BLUEPRINT].nonzero()[:, 0].tolist()


def at(decision, action):
    """Everybody waits but at one decision; `action` is made of what was seen at the first."""
    count, seen = -1, []

    def deed(situation):
        nonlocal count
        count += 1
        seen.append(situation)
        return action(seen[0]) if count == decision else waits(situation)

    return deed


@problems
def test_what_masks_allow_is_accepted(name):
    what = problem(name)
    accepted, asked = [], set()

    def note(decision, payment):
        accepted.append(what._last.accepted.all())
        asked.update(what._action_RH[:, Head.OP].tolist())

    for number in range(5):
        play(what, at_random(number, UNIFORM), number, note)
    assert len(accepted) == 5 * what.horizon
    assert all(accepted)
    assert {Op.WAIT, Op.GERMINATE} <= asked


@problems
def test_slots_start_empty_in_every_round(name):
    what = problem(name)
    for number in range(3):
        situation = what.reset(number)
        assert situation.masks.op_RO.nonzero()[:, 1].view(ROWS, -1).tolist() == [[Op.WAIT, Op.GERMINATE]] * ROWS
        play(what, at_random(number), number)


@problems
def test_a_blueprint_that_is_an_answer_can_be_grown(name):
    answers = {"bandit": known_answers.Bandit.gives, "timing": (), "memory": known_answers.Memory.answers}[name]
    assert {int(b) for b in answers} <= set(fitting(problem(name)))
    assert len(fitting(problem(name))) >= 3


@problems
def test_it_is_over_at_the_horizon_and_waiting_is_worth_nothing(name):
    played = play(problem(name), waits)
    assert [p.done for p in played.payments] == [False] * (problem(name).horizon - 1) + [True]
    assert (played.reward_DR == 0).all()


@problems
def test_the_same_seed_and_round_are_the_same_problem(name):
    one, other = (play(problem(name, 3), at_random(1), 2) for _ in range(2))
    assert torch.equal(one.reward_DR, other.reward_DR)
    assert torch.equal(one.run_DRF.nan_to_num(9), other.run_DRF.nan_to_num(9))


@problems
def test_nothing_random_is_worth_more_than_the_best_and_its_mean_is_far_below(name):
    what = problem(name)
    returns = torch.stack([play(what, at_random(n, UNIFORM), n).return_R for n in range(20)])
    best = {"bandit": 1.0, "timing": 1.0, "memory": 1.0}[name]
    assert float(returns.max()) <= best + 1e-6
    assert float(returns.mean()) < 0.5 * what.optimum


# Bandit.


def bandit_returns():
    """Return of every choice [choices, R], the first to wait."""
    what = problem("bandit")
    choices = [waits, *(lambda situation, b=b: germinate(b) for b in fitting(what))]
    return what, torch.stack([play(what, choice).return_R for choice in choices])


def test_the_best_of_the_bandit_is_the_best_of_everything():
    what, returns = bandit_returns()
    best_R = returns.max(0).values
    assert float(best_R.mean()) == pytest.approx(what.optimum, abs=1e-6)
    by_price = {round(p, 3): round(b, 5) for p, b in zip(what.contexts.price_R.tolist(), best_R.tolist(), strict=True)}
    assert by_price == {0.0: 1.0, 0.75: 0.4, 2.0: 0.1, 4.0: 0.0}


def test_every_price_of_the_bandit_asks_for_another_choice():
    what, returns = bandit_returns()
    choices = [None, *fitting(what)]
    best = {}
    for price, row in zip(what.contexts.price_R.tolist(), range(ROWS), strict=True):
        order = returns[:, row].sort(descending=True)
        assert order.values[0] > order.values[1] or price == 4.0
        best[price] = choices[int(order.indices[0])]
    assert list(best.values())[:3] == [Blueprint.MLP_LARGE, Blueprint.MLP_SMALL, Blueprint.NORM]
    # What is not listed gives nothing and costs nothing: as good as waiting.
    listed = [choices.index(int(b)) for b in known_answers.Bandit.gives]
    assert (returns[listed, 3] < 0).all()


def test_without_the_price_the_bandit_falls_short():
    what, returns = bandit_returns()
    assert float(returns.mean(1).max()) < 0.75 * what.optimum


def test_the_price_of_the_bandit_is_seen():
    played = play(problem("bandit"), waits)
    what = problem("bandit")
    what.reset(0)
    price_R = what.contexts.price_R
    order = [torch.equal(c_R[:, None] > c_R, price_R[:, None] > price_R) for c_R in played.run_DRF[0].unbind(1)]
    assert any(order), "some column orders the rows as their prices do"
    assert len(what.contexts.price_R.unique()) == 4


def test_who_knows_plays_the_bandit_perfectly():
    what = problem("bandit")
    what.reset(0)
    right = {0.0: Blueprint.MLP_LARGE, 0.75: Blueprint.MLP_SMALL, 2.0: Blueprint.NORM}
    prices = what.contexts.price_R.tolist()
    where_R = torch.tensor([price in right for price in prices])
    action_RH = germinate([int(right.get(price, 0)) for price in prices], where_R)
    assert float(play(what, lambda situation: action_RH).return_R.mean()) == pytest.approx(what.optimum, abs=1e-6)


# Timing.


def test_the_best_time_is_the_best_of_all_times():
    what = problem("timing")
    returns = [float(play(what, at(d, lambda s: germinate(int(Blueprint.NORM)))).return_R.mean()) for d in range(12)]
    assert max(returns) == what.optimum == 1.0
    assert returns.index(1.0) == known_answers.Timing.best
    assert returns.count(1.0) == 1
    assert returns == pytest.approx([1 - abs(d - 6) / 4 for d in range(12)])


def test_only_the_first_seed_is_paid():
    what = problem("timing")

    def again(situation):
        legal = situation.masks.op_RO[:, int(Op.GERMINATE)]
        culls = waits(situation)
        culls[:, Head.OP] = int(Op.CULL)
        return torch.where(legal[:, None], germinate(int(Blueprint.NORM)), culls)

    def wary(situation):
        action_RH = again(situation)
        possible = situation.masks.op_RO.gather(1, action_RH[:, :1])
        return action_RH * possible

    played = play(what, wary)
    ops = torch.stack(played.actions)[:, 0, Head.OP].tolist()
    assert ops.count(int(Op.GERMINATE)) > 1
    assert (played.return_R == 1 - 6 / 4).all()


# Memory.


def memory_returns():
    """Return [blueprints, R] of answering with each blueprint, whatever the cue."""
    what = problem("memory")
    return what, torch.stack([play(what, at(7, lambda s, b=b: germinate(b))).return_R for b in fitting(what)])


def test_memory_pays_the_right_answer_alone():
    what, returns = memory_returns()
    best_R = returns.max(0).values
    assert float(best_R.mean()) == what.optimum == 1.0
    assert (returns.sum(0) == 1).all()
    right = {fitting(what)[int(i)] for i in returns.argmax(0)}
    assert right == {int(b) for b in known_answers.Memory.answers}


def test_whoever_forgets_answers_half_of_them():
    _, returns = memory_returns()
    assert float(returns.mean(1).max()) < 0.7


@pytest.mark.parametrize("decision", range(7))
def test_an_early_answer_is_worth_nothing(decision):
    what = problem("memory")
    for blueprint in known_answers.Memory.answers:
        assert (play(what, at(decision, lambda s, b=blueprint: germinate(int(b)))).reward_DR == 0).all()


def test_the_cue_is_seen_first_and_gone_at_last():
    what = problem("memory")
    run_DRF = play(what, waits).run_DRF.nan_to_num(9)
    cues = run_DRF[0].unique(dim=0)
    assert len(cues) == 2
    assert len(run_DRF[-1].unique(dim=0)) == 1


def test_who_remembers_answers_perfectly():
    what = problem("memory")
    rule, other = known_answers.Memory.answers

    def answer(first):
        low_R = first.observation.run_RF[:, 0] < 0.4
        return germinate(torch.where(low_R, int(rule), int(other)))

    for number in range(3):
        assert (play(what, at(7, answer), number).return_R == 1).all()


def test_rounds_ask_for_other_answers():
    what = problem("memory")
    cues = []
    for number in range(20):
        what.reset(number)
        cues.append(what._cue_R.clone())
    assert len({tuple(cue.tolist()) for cue in cues}) == 20
    share = float(torch.stack(cues).double().mean())
    # 1,280 cues: a deviation is 0.014.
    assert abs(share - 0.5) < 5 * 0.014


# Learning.


@pytest.mark.slow
@problems
@pytest.mark.parametrize("seed", range(5))
def test_it_is_learned_with_every_default(name, seed):
    assert known_answers.learn(name, seed) >= 0.95
