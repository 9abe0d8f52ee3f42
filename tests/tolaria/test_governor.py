"""What the governor takes for a failure, and what it does not."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from esper.leyline.config import GovernorConfig
from esper.leyline.panics import PANIC_TEXT, Panic
from esper.tolaria.governor import Governor

CONFIG = GovernorConfig()


def judged(losses, accuracy=0.5, classes=10, config=CONFIG, train=None, norm=1.0):
    """Verdicts on one row, its loss in training that on reward-validation: panics, and whether it was worth keeping."""
    governor = Governor(config, classes, 1, "cpu")
    accuracies = accuracy if isinstance(accuracy, list) else [accuracy] * len(losses)
    verdicts = [
        governor.judge(
            *(torch.tensor([float(value)]) for value in (loss if train is None else train, loss, share, norm))
        )
        for loss, share in zip(losses, accuracies, strict=True)
    ]
    return [Panic(int(v.panic_R)) for v in verdicts], [bool(v.good_R) for v in verdicts]


def falling(decisions=20, classes=10, to=0.3):
    """From guessing down."""
    start = math.log(classes)
    return [to + (start - to) * 0.8**d for d in range(decisions)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["train", "val", "norm"])
def test_what_is_not_finite_is_a_failure_at_once(which, bad):
    given_ = {"losses": [bad]} if which == "val" else {"losses": [2.0], which: bad}
    assert judged(**given_) == ([Panic.NOT_FINITE], [False])


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_the_limit_is_relative_to_guessing(classes):
    guess, history = math.log(classes), falling(classes=classes, to=0.1 * math.log(classes))
    last = sorted(history[-5:])[2]
    below, above = (judged([*history, last + share * guess], classes=classes)[0][-1] for share in (0.98, 1.02))
    assert (below, above) == (Panic.NONE, Panic.DIVERGED)


def test_a_host_that_never_learned_may_not_get_far_above_guessing_either():
    assert judged([1.98 * math.log(10)])[0] == [Panic.NONE]
    assert judged([2.02 * math.log(10)])[0] == [Panic.DIVERGED]


def test_a_noisy_history_gives_more_room():
    noisy = [1.0, 3.0, 0.5, 3.5, 2.0]
    # The median is 2, the median deviation 1: six of them are more than one guess.
    assert judged([*noisy, 2 + 5.9])[0][-1] == Panic.NONE
    assert judged([*noisy, 2 + 6.1])[0][-1] == Panic.DIVERGED


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_a_loss_that_is_high_in_evaluation_alone_may_be_ten_times_as_far_above(classes):
    guess, history = math.log(classes), falling(classes=classes, to=0.1 * math.log(classes))
    last = sorted(history[-5:])[2]
    for share, panic in ((1.02, Panic.NONE), (9.8, Panic.NONE), (10.2, Panic.DIVERGED)):
        panics, good = judged([*history, last + share * guess], classes=classes, train=0.1 * guess)
        assert (panics[-1], good[-1]) == (panic, False)
    # In training alone it has no bounds: the updates may have been the first of a worse host that they repaired.
    assert judged([*history, last], classes=classes, train=99 * guess)[0][-1] == Panic.NONE


def test_one_outlier_does_not_move_the_limit():
    calm = falling()
    assert judged([*calm, 2.0, 5.0])[0][-2:] == [Panic.NONE, Panic.DIVERGED]


def test_what_lasts_becomes_history():
    """A host that is worse off, as after a cull, is left alone once it has settled there."""
    panics, good = judged([*falling(), *[2.2] * 8])
    assert set(panics) == {Panic.NONE}
    assert good[20:23] == [False] * 3
    assert good[-1]


def test_collapse_needs_some_decisions_in_a_row():
    guess, learned = math.log(10), falling()
    panics, good = judged([*learned, guess, guess, guess], accuracy=[0.8] * 20 + [0.1] * 3)
    assert panics[20:] == [Panic.NONE, Panic.NONE, Panic.COLLAPSED]
    assert good[20:] == [False] * 3
    again = judged([*learned, guess, guess, 0.5, guess, guess], accuracy=[0.8] * 20 + [0.1] * 5)[0]
    assert set(again) == {Panic.NONE}


def test_a_high_loss_with_many_right_answers_is_no_collapse():
    guess = math.log(10)
    assert set(judged([*falling(), *[guess] * 9], accuracy=0.4)[0]) == {Panic.NONE}


def test_who_never_learned_cannot_collapse():
    guess = math.log(10)
    assert set(judged([guess] * 30, accuracy=0.1)[0]) == {Panic.NONE}


def test_a_row_fails_once():
    panics, good = judged([math.nan, 2.0, 900.0, math.nan])
    assert panics == [Panic.NOT_FINITE, Panic.NONE, Panic.NONE, Panic.NONE]
    assert not any(good)


@settings(max_examples=60)
@given(
    st.integers(2, 200),
    st.floats(0.0, 0.95),
    st.lists(st.floats(-0.15, 0.15), min_size=10, max_size=60),
    st.floats(0.5, 1.0),
)
def test_healthy_noise_is_no_failure(classes, floor, noise, pace):
    """Losses relative to guessing that fall to a floor, with noise of up to 0.15 guesses."""
    guess = math.log(classes)
    losses = [guess * (floor + (1 - floor) * pace**d + e) for d, e in enumerate(noise)]
    panics, _ = judged(losses, accuracy=1.0, classes=classes)
    assert set(panics) == {Panic.NONE}


@settings(max_examples=60)
@given(st.lists(st.floats(0, 50, width=32), min_size=1, max_size=20), st.integers(0, 2), st.integers(2, 50))
def test_rows_are_judged_alone(losses, at, classes):
    """A row among others hears the same as by itself."""
    governor = Governor(CONFIG, classes, 3, "cpu")
    alone, good = judged(losses, accuracy=0.0, classes=classes)
    for decision, loss in enumerate(losses):
        loss_R = torch.tensor([math.nan, 0.1 * decision, 1e9])
        loss_R[at] = loss
        verdict = governor.judge(loss_R, loss_R, torch.zeros(3), torch.ones(3))
        assert int(verdict.panic_R[at]) == alone[decision]
        assert bool(verdict.good_R[at]) == good[decision]


def test_every_panic_has_words():
    assert set(PANIC_TEXT) == set(Panic) - {Panic.NONE}


@pytest.mark.parametrize("wrong", [{"governor_window": 4}, {"learned_guesses": 0.97}, {"collapsed_decisions": 0}])
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValidationError):
        GovernorConfig(**wrong)
