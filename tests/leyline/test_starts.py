"""Ranges of starts: apart, and not left by accident."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.leyline import starts
from esper.leyline.starts import EXAM, TRAINING, start_ids

RANGES = {name: value for name, value in vars(starts).items() if isinstance(value, range)}


def test_ranges_are_apart_and_their_numbers_have_32_bits():
    assert {"TRAINING", "SELECTION", "CHOICE", "FITTING", "REPLAY", "SCORE", "JUDGEMENT", "EXAM"} == set(RANGES)
    in_order = sorted(RANGES.values(), key=lambda each: each.start)
    assert in_order[0].start >= 0
    assert in_order[-1].stop <= 2**32
    assert all(one.stop <= other.start for one, other in pairwise(in_order))
    assert all(len(each) >= 2**26 and each.step == 1 for each in in_order)


@given(name=st.sampled_from(sorted(RANGES)), first=st.integers(0, 2**31), count=st.integers(0, 100))
def test_ids_are_in_their_range_or_an_error(name, first, count):
    of = RANGES[name]
    if first + count > len(of):
        with pytest.raises(ValueError, match=r"^starts [\d,]+ to [\d,]+: this range has [\d,]+, counted from 0$"):
            start_ids(of, first, count)
    else:
        assert start_ids(of, first, count).tolist() == list(of[first : first + count])


def test_numbers_below_0_are_an_error():
    for of in (TRAINING, EXAM):
        with pytest.raises(ValueError, match="starts -1 to 1: this range has"):
            start_ids(of, -1, 3)
