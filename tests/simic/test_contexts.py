"""What rows train under: draws, their coverage, and wrong labels that are really learned."""

import math
from dataclasses import fields, replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.leyline.config import ContextConfig, OptimizerConfig
from esper.simic.contexts import Contexts, draw_contexts, grid, noisy_labels
from esper.simic.episode import Episode
from esper.tolaria.datasets import Split
from esper.tolaria.door import IGNORED
from helpers.episodes import run_config, task_of

DEFAULT = ContextConfig()
COMBINATIONS = len(DEFAULT.prices) * len(DEFAULT.learning_rates) * len(DEFAULT.label_noise)
TASK = "digits-mlp"


def draw(number=0, groups=5, size=3, seed=0, config=DEFAULT):
    return draw_contexts(config, seed, number, groups, size)


def combinations(contexts, size):
    columns = (contexts.price_R, contexts.rate_R, contexts.noise_R)
    return list(zip(*(column[::size].tolist() for column in columns), strict=True))


@given(
    seed=st.integers(0, 2**40),
    number=st.integers(0, 3000),
    groups=st.integers(1, 60),
    size=st.integers(1, 5),
)
@settings(max_examples=40)
def test_rows_of_a_group_share_everything_and_the_first_is_the_twin(seed, number, groups, size):
    contexts = draw(number, groups, size, seed)
    for field in fields(Contexts):
        assert getattr(contexts, field.name).shape == (groups * size,)
    for row in range(groups * size):
        first = row - row % size
        assert contexts.group_R[row] == row // size
        assert contexts.twin_R[row] == first
        assert bool(contexts.grows_R[row]) == (row != first)
        for name in ("start_id_R", "price_R", "rate_R", "noise_R"):
            assert getattr(contexts, name)[row] == getattr(contexts, name)[first]
    assert contexts.learners_N.tolist() == [row for row in range(groups * size) if row % size]
    assert len(contexts.start_id_R.unique()) == groups
    assert contexts.start_id_R.dtype == contexts.group_R.dtype == contexts.twin_R.dtype == torch.int64


@given(number=st.integers(0, 3000), few=st.integers(1, 30), more=st.integers(1, 30), size=st.integers(1, 4))
@settings(max_examples=40)
def test_more_groups_change_nothing_for_the_earlier_ones(number, few, more, size):
    short, long = draw(number, few, size), draw(number, few + more, size)
    for field in fields(Contexts):
        assert torch.equal(getattr(long, field.name)[: few * size], getattr(short, field.name))


@pytest.mark.parametrize("size", [1, 4])
def test_the_size_of_a_group_changes_nothing_for_the_group(size):
    small, large = draw(size=size), draw(size=size + 1)
    for name in ("start_id_R", "price_R", "rate_R", "noise_R"):
        assert torch.equal(getattr(small, name)[::size], getattr(large, name)[:: size + 1])


def test_the_same_round_is_drawn_alike():
    one, other = draw(number=7, seed=3), draw(number=7, seed=3)
    for field in fields(Contexts):
        assert torch.equal(getattr(one, field.name), getattr(other, field.name))


@pytest.mark.parametrize("number", [0, 1, 17])
def test_every_combination_once(number):
    drawn = combinations(draw(number, COMBINATIONS, 2), 2)
    prices, rates, noises = (
        torch.tensor(v).tolist() for v in (DEFAULT.prices, DEFAULT.learning_rates, DEFAULT.label_noise)
    )
    assert sorted(drawn) == sorted((p, r, n) for p in prices for r in rates for n in noises)


def test_more_groups_than_combinations_are_spread_evenly():
    drawn = combinations(draw(0, 2 * COMBINATIONS + 5, 2), 2)
    counts = [drawn.count(combination) for combination in set(drawn)]
    assert len(counts) == COMBINATIONS
    assert set(counts) == {2, 3}


def test_over_rounds_a_group_meets_every_combination_as_often():
    rounds = 40 * COMBINATIONS
    drawn = [combinations(draw(number, 1, 1), 1)[0] for number in range(rounds)]
    counts = [drawn.count(combination) for combination in set(drawn)]
    assert len(counts) == COMBINATIONS
    # 40 are expected; the deviation of a count is 6.2.
    assert max(abs(count - 40) for count in counts) < 5 * 6.2


@pytest.mark.parametrize("other", [1, 2, 100])
def test_rounds_differ_in_order_and_share_no_start(other):
    one, two = draw(0, COMBINATIONS, 2), draw(other, COMBINATIONS, 2)
    assert combinations(one, 2) != combinations(two, 2)
    assert not set(one.start_id_R.tolist()) & set(two.start_id_R.tolist())


def test_seeds_differ_in_order():
    assert combinations(draw(0, COMBINATIONS, 2, seed=0), 2) != combinations(draw(0, COMBINATIONS, 2, seed=1), 2)


def test_alone_is_what_was_configured():
    config = run_config(TASK, horizon=4, updates=1, optimizer=OptimizerConfig(learning_rate=0.02))
    ids = torch.tensor([7, 3, 7])
    contexts = Contexts.alone(config, ids, 0.3)
    assert contexts.start_id_R.tolist() == [7, 3, 7]
    assert contexts.group_R.tolist() == contexts.twin_R.tolist() == contexts.learners_N.tolist() == [0, 1, 2]
    assert contexts.grows_R.all()
    assert contexts.price_R.tolist() == pytest.approx([0.3] * 3)
    assert contexts.rate_R.tolist() == pytest.approx([0.02] * 3)
    assert contexts.noise_R.tolist() == Contexts.alone(config, ids).price_R.tolist() == [0, 0, 0]


# Grids.


@given(
    starts=st.lists(st.integers(0, 2**31), min_size=1, max_size=4, unique=True),
    prices=st.lists(st.floats(0, 1), min_size=1, max_size=3, unique=True),
    rates=st.lists(st.floats(0.001, 1), min_size=1, max_size=3, unique=True),
    noises=st.lists(st.floats(0, 0.9), min_size=1, max_size=2, unique=True),
    copies=st.integers(1, 3),
    twins=st.booleans(),
)
@settings(max_examples=40)
def test_a_grid_is_every_combination_and_a_twin_serves_all_prices(starts, prices, rates, noises, copies, twins):
    config = ContextConfig(prices=tuple(prices), learning_rates=tuple(rates), label_noise=tuple(noises))
    contexts = grid(config, torch.tensor(starts), config.prices, copies, twins=twins)
    columns = (contexts.start_id_R, contexts.rate_R, contexts.noise_R, contexts.price_R)
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    learners = contexts.learners_N.tolist()
    every = [
        (start, rate, noise, price)
        for start, rate, noise, price in product(starts, rates, noises, prices)
        for _ in range(copies)
    ]
    assert [rows[row] for row in learners] == [pytest.approx(expected) for expected in every]
    assert len(rows) - len(learners) == twins * len(starts) * len(rates) * len(noises)
    for row in range(len(rows)):
        twin = int(contexts.twin_R[row])
        assert contexts.group_R[twin] == contexts.group_R[row]
        assert rows[twin][:3] == rows[row][:3], "start and condition"
        assert contexts.grows_R[twin] != twins
        assert (twin == row) == (not twins or row not in learners)


# Wrong labels.


def noise(contexts, value):
    return replace(contexts, noise_R=torch.full_like(contexts.noise_R, value))


@pytest.mark.parametrize("share", [0.05, 0.2, 0.6, 0.95])
def test_as_many_labels_are_wrong_as_configured(share):
    label_N = task_of(TASK, examples=40).data.train.y
    labels_RN = noisy_labels(label_N, 10, noise(draw(groups=10, size=1), share), 0)
    count = labels_RN.numel()
    wrong = float((labels_RN != label_N).double().mean())
    assert abs(wrong - share) < 5 * math.sqrt(share * (1 - share) / count)
    for row in range(len(labels_RN)):
        own = float((labels_RN[row] != label_N).double().mean())
        assert abs(own - share) < 5 * math.sqrt(share * (1 - share) / len(label_N))


@given(classes=st.integers(2, 12), seed=st.integers(0, 1000), share=st.floats(0.01, 0.99))
@settings(max_examples=30)
def test_a_wrong_label_is_another_class(classes, seed, share):
    label_N = torch.arange(300) % classes
    labels_RN = noisy_labels(label_N, classes, noise(draw(groups=3, size=2), share), seed)
    assert labels_RN.dtype == torch.int64
    assert int(labels_RN.min()) >= 0
    assert int(labels_RN.max()) < classes
    changed = labels_RN != label_N
    # A choice equal to the right one would not count as wrong: shares above tell that there are enough.
    assert changed.any()
    assert (~changed).any()


def test_every_other_class_is_as_likely():
    label_N = torch.full((3000,), 4)
    labels_RN = noisy_labels(label_N, 10, noise(draw(groups=6, size=1), 0.9), 0)
    counts = labels_RN.flatten().bincount(minlength=10).double()
    expected = 0.1 * labels_RN.numel()
    assert ((counts - expected).abs() < 5 * math.sqrt(expected * 0.9)).all()


def test_rows_of_a_group_learn_the_same_labels_and_groups_others():
    label_N = task_of(TASK, examples=40).data.train.y
    labels_RN = noisy_labels(label_N, 10, noise(draw(groups=3, size=3), 0.2), 0)
    for group in range(3):
        rows = labels_RN[3 * group : 3 * group + 3]
        assert (rows == rows[0]).all()
    wrong_GN = labels_RN[::3] != label_N
    assert (wrong_GN[0] != wrong_GN[1]).any()
    assert (wrong_GN[1] != wrong_GN[2]).any()
    again = noisy_labels(label_N, 10, noise(draw(groups=3, size=3), 0.2), 0)
    assert torch.equal(labels_RN, again)
    assert not torch.equal(labels_RN, noisy_labels(label_N, 10, noise(draw(groups=3, size=3), 0.2), 1))


def test_noise_leaves_labels_that_do_not_count():
    label_N = torch.where(torch.arange(200) % 3 == 0, IGNORED, torch.arange(200) % 10)
    labels_RN = noisy_labels(label_N, 10, noise(draw(groups=3, size=1), 0.9), 0)
    ignored_N = label_N == IGNORED
    assert (labels_RN[:, ignored_N] == IGNORED).all()
    assert ((labels_RN[:, ~ignored_N] >= 0) & (labels_RN[:, ~ignored_N] < 10)).all()
    assert 0.8 < (labels_RN != label_N)[:, ~ignored_N].float().mean() < 0.98


def test_without_noise_there_is_nothing_to_hold():
    assert noisy_labels(torch.arange(10), 10, noise(draw(), 0.0), 0) is None


def test_starts_of_late_rounds_are_starts_of_their_own():
    label_N = torch.zeros(64, dtype=torch.int64)
    drawn = {}
    for number in (0, 1, 4095, 4096, 4097, 8192, 100_000):
        labels_RN = noisy_labels(label_N, 10, noise(draw(number, 4, 1), 0.5), 0)
        for row in labels_RN:
            drawn.setdefault(tuple(row.tolist()), []).append(number)
    assert len(drawn) == 4 * 7, [numbers for numbers in drawn.values() if len(numbers) > 1]


# What training does with them.


def trained(contexts, *, task=None, horizon=3):
    config = run_config(TASK, horizon=horizon, updates=4, batch=8)
    rows = torch.arange(len(contexts.start_id_R))
    episode = Episode(config, task or task_of(TASK, examples=40), "never", rows, contexts=contexts)
    while not episode.done:
        episode.advance()
    return episode


def theta(contexts, **how):
    return trained(contexts, **how).population.hosts.theta.detach()


def of_groups(groups, size, **columns):
    """Contexts with hand-written columns, by group."""
    drawn = draw(groups=groups, size=size, config=ContextConfig(label_noise=(0.0,)))
    return replace(drawn, **{name: torch.tensor(v).repeat_interleave(size) for name, v in columns.items()})


def test_noise_is_trained_on_by_the_rows_that_have_it_alone():
    clean = of_groups(3, 2, noise_R=[0.0, 0.0, 0.0])
    mixed = of_groups(3, 2, noise_R=[0.0, 0.4, 0.0])
    without, theirs = theta(clean), theta(mixed)
    assert torch.equal(theirs[[0, 1, 4, 5]], without[[0, 1, 4, 5]])
    assert not torch.equal(theirs[2], without[2])
    # A row and its twin learn the same wrong labels.
    assert torch.equal(theirs[2], theirs[3])


def test_training_with_noise_is_training_on_the_noisy_labels():
    contexts = of_groups(1, 1, noise_R=[0.4])
    task = task_of(TASK, examples=40)
    (label_N,) = noisy_labels(task.data.train.y, 10, contexts, run_config(TASK, horizon=1, updates=1).seed)
    spoiled = replace(task, data=replace(task.data, train=Split(task.data.train.x, label_N)))
    clean = replace(contexts, noise_R=torch.zeros(1))
    assert torch.equal(theta(contexts), theta(clean, task=spoiled))
    assert not torch.equal(theta(contexts), theta(clean))


def test_noise_never_reaches_what_is_rewarded():
    contexts = of_groups(2, 1, noise_R=[0.0, 0.9])
    task = task_of(TASK, examples=40)
    before = task.data.reward_validation.y.clone()
    episode = trained(contexts)
    assert torch.equal(task.data.reward_validation.y, before)
    assert torch.equal(episode.task.data.reward_validation.y, before)


@pytest.mark.parametrize("rate", [0.001, 0.02])
def test_the_rate_of_a_row_is_the_rate_it_trains_with(rate):
    contexts = of_groups(2, 1, rate_R=[0.005, rate])
    ours = theta(contexts)
    config = run_config(TASK, horizon=3, updates=4, batch=8, optimizer=OptimizerConfig(learning_rate=rate))
    episode = Episode(config, task_of(TASK, examples=40), "never", contexts.start_id_R)
    while not episode.done:
        episode.advance()
    theirs = episode.population.hosts.theta.detach()
    assert torch.equal(ours[1], theirs[1])
    assert not torch.equal(ours[0], theirs[0])


def test_groups_of_another_population_come_first():
    """Five groups behind three of another population are the last five of eight."""
    whole, rest = draw(4, 8, 2), draw_contexts(DEFAULT, 0, 4, 5, 2, first=3)
    for name in ("start_id_R", "price_R", "rate_R", "noise_R"):
        assert torch.equal(getattr(whole, name)[6:], getattr(rest, name))
    assert torch.equal(rest.group_R, draw(4, 5, 2).group_R)
    with pytest.raises(ValueError, match=r"round 0 of 4097 groups; at most"):
        draw_contexts(DEFAULT, 0, 0, 4095, 1, first=2)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_price_changes_nothing_else(share):
    whole, part = draw(groups=30), draw_contexts(DEFAULT, 0, 0, 30, 3, price_share=share)
    torch.testing.assert_close(part.price_R, share * whole.price_R)
    for field in fields(Contexts):
        if field.name != "price_R":
            assert torch.equal(getattr(part, field.name), getattr(whole, field.name))
