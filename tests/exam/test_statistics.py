"""Intervals of paired differences."""

import math

import numpy as np
import pytest

from esper.exam.statistics import Interval, paired


def test_it_covers_the_truth_as_often_as_it_says():
    """Of 200 samples of 24, the interval of about 190 holds the mean they were drawn with."""
    generator = np.random.default_rng(1)
    held = [i.low <= 0.3 <= i.high for i in (paired(generator.normal(0.3, 0.2, 24)) for _ in range(200))]
    assert 180 <= sum(held) <= 198


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


def test_equal_differences_have_no_width():
    assert paired(np.zeros(5)) == Interval(0.0, 0.0, 0.0)
    assert not paired(np.zeros(5)).excludes_zero


@pytest.mark.parametrize("bad", [[], [0.1], [0.1, float("nan")], [0.1, float("inf")]])
def test_what_cannot_be_judged_is_refused(bad):
    with pytest.raises(ValueError, match="at least 2 finite differences"):
        paired(np.array(bad))
