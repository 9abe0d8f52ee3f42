"""Intervals of paired differences."""

import math
from functools import partial

import numpy as np
import pytest
from scipy.stats import bootstrap

from esper.exam.statistics import (
    Difference,
    interquartile_mean,
    paired,
    probability_of_improvement,
)

TRUTH = 0.3
TIMES = 200


def results(seeds, starts, generator, by_seed=0.02, by_start=0.01, rest=0.01):
    """Differences [M, K] of policies that are, on average over all training seeds and starts, ahead by `TRUTH`."""
    of_seed, of_start = generator.normal(0, by_seed, (seeds, 1)), generator.normal(0, by_start, (1, starts))
    return TRUTH + of_seed + of_start + generator.normal(0, rest, (seeds, starts))


def coverage(interval, draw):
    """How often of `TIMES` the interval of what is drawn holds the truth."""
    generator = np.random.default_rng(1)
    return sum(low <= TRUTH <= high for low, high in (interval(draw(generator)) for _ in range(TIMES))) / TIMES


def ours(difference):
    told = paired(difference)
    return told.low, told.high


def over_starts_alone(difference_MK):
    """The interval that was told before: of the mean of the policies, as if there could be no others."""
    found = bootstrap((difference_MK.mean(0),), np.mean, n_resamples=999, method="BCa", rng=0)
    return found.confidence_interval


@pytest.mark.parametrize(
    "draw",
    [
        pytest.param(partial(results, 5, 24), id="seeds matter most"),
        pytest.param(partial(results, 5, 24, by_seed=0.005), id="starts matter more"),
        pytest.param(partial(results, 10, 8), id="many seeds"),
        pytest.param(partial(results, 1, 24, by_seed=0.0), id="one seed"),
    ],
)
def test_it_covers_the_truth_as_often_as_it_says(draw):
    assert 0.91 <= coverage(ours, draw) <= 0.99


def test_three_seeds_are_few_and_the_interval_knows():
    assert coverage(ours, partial(results, 3, 24)) >= 0.87


def test_starts_alone_say_nothing_about_other_training_seeds():
    assert coverage(over_starts_alone, partial(results, 5, 24)) < 0.5


def test_it_is_as_wide_as_the_formula_for_normal_differences():
    difference = np.random.default_rng(0).normal(0.1, 1.0, 1000)
    told = paired(difference)
    half = 1.96 * difference.std(ddof=1) / math.sqrt(1000)
    assert told.mean == pytest.approx(difference.mean())
    assert told.low == pytest.approx(told.mean - half, abs=0.1 * half)
    assert told.high == pytest.approx(told.mean + half, abs=0.1 * half)


def test_it_is_the_same_every_time_and_says_whether_the_sign_is_certain():
    difference = np.array([0.1, 0.2, 0.15, 0.05, 0.12])
    assert paired(difference) == paired(difference)
    assert paired(difference).excludes_zero
    assert paired(-difference).excludes_zero
    assert not paired(np.array([0.1, -0.1, 0.2, -0.2])).excludes_zero
    assert paired(difference).text().startswith("+0.1240 [+0.")


def test_it_says_what_it_is_over():
    several = results(3, 24, np.random.default_rng(0))
    assert paired(several).over == "3 training seeds, 24 starts"
    assert paired(several[0]).over == "24 starts"
    assert paired(several[:1]) == paired(several[0])


@pytest.mark.parametrize("shape", [(5,), (3, 5)])
def test_equal_differences_have_no_width(shape):
    told = paired(np.zeros(shape))
    assert (told.mean, told.low, told.high) == (0.0, 0.0, 0.0)
    assert not told.excludes_zero


@pytest.mark.parametrize("bad", [[], [0.1], [0.1, float("nan")], [0.1, float("inf")], [[0.1], [0.2]]])
def test_what_cannot_be_judged_is_refused(bad):
    with pytest.raises(ValueError, match="at least 2 finite differences"):
        paired(np.array(bad))


def test_the_interquartile_mean_leaves_out_the_extremes():
    runs = np.array([[-100.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 1000.0]])
    assert interquartile_mean(np.stack((runs, -runs))).tolist() == [3.5, -3.5]


def test_a_probability_of_improvement_counts_ties_by_half():
    difference = np.array([[[0.1, 0.0], [-0.1, 0.2]]])
    assert probability_of_improvement(difference).tolist() == [0.625]


def test_a_difference_is_told_in_three_ways():
    by = Difference.of(np.array([[0.1, 0.2, 0.3, 0.4], [0.2, 0.3, 0.4, -5.0]]))
    assert by.mean.mean == pytest.approx(-0.3875)
    assert by.middle.mean == pytest.approx(0.25)
    assert by.improvement.mean == 0.875
    assert 0 <= by.improvement.low < by.improvement.high == 1
    assert {by.mean.seeds, by.middle.seeds, by.improvement.seeds} == {2}
