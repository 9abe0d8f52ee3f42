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


UPDATES = 20


def judge(governor, loss_R, *, train_R=None, accuracy=0.5, finite=True, skipped=0):
    """Let a governor judge one decision of rows whose loss in training is that on reward-validation."""
    return governor.judge(
        loss_R if train_R is None else train_R,
        loss_R,
        torch.full_like(loss_R, accuracy),
        finite_R=torch.full_like(loss_R, finite, dtype=torch.bool),
        skipped_R=torch.full_like(loss_R, skipped, dtype=torch.int64),
        updates=UPDATES,
    )


def listed(value, losses):
    return value if isinstance(value, list) else [value] * len(losses)


def judged(
    losses, accuracy=0.5, classes=10, config=CONFIG, train=None, finite=True, skipped=0, governor=None, recovers=False
):
    """Verdicts on one row: panics, and whether it was worth keeping."""
    governor = governor or Governor(config, classes, 1, "cpu", recovers=recovers)
    told = zip(losses, *(listed(value, losses) for value in (accuracy, finite, skipped)), strict=True)
    verdicts = [
        judge(
            governor,
            torch.tensor([float(loss)]),
            train_R=None if train is None else torch.tensor([float(train)]),
            accuracy=share,
            finite=whole,
            skipped=count,
        )
        for loss, share, whole, count in told
    ]
    return [Panic(int(v.panic_R)) for v in verdicts], [bool(v.good_R) for v in verdicts]


def falling(decisions=20, classes=10, to=0.3):
    """From guessing down."""
    start = math.log(classes)
    return [to + (start - to) * 0.8**d for d in range(decisions)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_a_failure_at_once(bad):
    assert judged([bad]) == ([Panic.NOT_FINITE], [False])


def test_a_parameter_that_is_not_finite_is_a_failure_at_once_whatever_the_loss_is():
    assert judged([2.0], finite=False) == ([Panic.NOT_FINITE], [False])


# Updates that are skipped.


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_training_loss_that_is_not_finite_is_no_failure(bad):
    assert judged([2.0], train=bad) == ([Panic.NONE], [True])
    # But it is no witness for the defence of a loss that is far too high.
    assert judged([*falling(), 2.9], train=bad)[0][-1] == Panic.DIVERGED


def test_a_few_skipped_updates_are_no_failure():
    panics, good = judged([2.0] * 30, skipped=[9, 1, 0, 10, 3] * 6)
    assert set(panics) == {Panic.NONE}
    assert all(good)


def test_the_pattern_of_half_precision_survives():
    """Every update of the first two decisions while the scale comes down, then one in 2,000."""
    skipped = [UPDATES, UPDATES, 4, *[0] * 96, 1, *[0] * 99, 1]
    panics, good = judged([2.0] * len(skipped), skipped=skipped)
    assert set(panics) == {Panic.NONE}
    # While more is skipped than made, the state before that is kept.
    assert good[:5] == [False] * 4 + [True]
    assert all(good[5:])


@pytest.mark.parametrize("recovers", [False, True])
def test_who_skips_every_update_has_failed(recovers):
    panics = judged([2.0] * 4, skipped=UPDATES, recovers=recovers)[0]
    # 20, 40, 60, 80 updates of at most 64.
    assert panics == [Panic.NONE] * 3 + [Panic.SKIPPED]


def test_who_skips_most_updates_fails_in_the_end_and_who_makes_most_does_not():
    assert Panic.SKIPPED in judged([2.0] * 40, skipped=11)[0]
    assert set(judged([2.0] * 1000, skipped=10)[0]) == {Panic.NONE}


# Losses.


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


# Growing one network: a row that fails goes on.


def recovering(config=CONFIG, classes=10):
    return Governor(config, classes, 1, "cpu", recovers=True)


def share(governor):
    return pytest.approx(float(governor.rate_share_R))


def test_it_goes_on_with_a_lower_rate_until_it_has_recovered():
    governor = recovering()
    judged([*falling(), math.nan], governor=governor)
    assert (share(governor), int(governor.restored_R), bool(governor.retired_R)) == (0.3, 1, False)
    judged([0.4] * (CONFIG.recovery_decisions - 1), governor=governor)
    assert share(governor) == 0.3
    judged([0.4], governor=governor)
    assert share(governor) == 1


def test_failures_in_a_row_lower_the_rate_further_and_it_comes_back_step_by_step():
    governor = recovering()
    judged([*falling(), math.nan, 0.4, math.nan], governor=governor)
    assert share(governor) == 0.09
    for expected in (0.3, 1, 1):
        judged([0.4] * CONFIG.recovery_decisions, governor=governor)
        assert share(governor) == expected
    assert int(governor.restored_R) == 2


def test_its_history_begins_anew():
    """Without its seeds it may be far worse than it was; that alone is neither a divergence nor a collapse."""
    guess, governor = math.log(10), recovering()
    panics, good = judged([*falling(), math.nan, *[1.9 * guess] * 4], accuracy=0.1, governor=governor)
    assert panics[-5:] == [Panic.NOT_FINITE, *[Panic.NONE] * 4]
    assert not any(good[-5:])
    assert judged([2.1 * guess], train=9 * guess, governor=recovering())[0] == [Panic.DIVERGED]


def test_the_older_state_is_kept_until_the_history_is_its_own():
    governor = recovering()
    good = judged([*falling(), math.nan, *[2.0] * CONFIG.governor_window], governor=governor)[1]
    assert good[19:] == [True, False, *[False] * (CONFIG.governor_window - 1), True]


def test_a_divergence_and_skipped_updates_are_restored_as_well():
    governor = recovering()
    assert judged([*falling(), 9.0, 9.0], governor=governor)[0][-2:] == [Panic.DIVERGED, Panic.DIVERGED]
    assert int(governor.restored_R) == 2
    governor = recovering()
    panics = judged([2.0] * 8, skipped=UPDATES, governor=governor)[0]
    assert panics == ([Panic.NONE] * 3 + [Panic.SKIPPED]) * 2
    assert int(governor.skipped_R) == 8 * UPDATES


def test_it_is_given_up_after_too_many_restorations():
    governor = recovering()
    panics = judged([math.nan] * 9, governor=governor)[0]
    most = CONFIG.most_restorations
    assert panics == [Panic.NOT_FINITE] * (most + 1) + [Panic.NONE] * (8 - most)
    assert int(governor.failure_R) == Panic.NOT_FINITE
    assert int(governor.restored_R) == most


def test_failures_that_are_far_apart_never_end_it():
    governor = recovering()
    losses = [*[2.0] * CONFIG.recovery_decisions, math.nan] * 50
    judged(losses, governor=governor)
    assert int(governor.restored_R) == 50
    assert not governor.retired_R


def test_without_restorations_the_first_failure_is_the_end():
    governor = recovering(GovernorConfig(most_restorations=0))
    judged([math.nan], governor=governor)
    assert bool(governor.retired_R)
    assert int(governor.restored_R) == 0


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
@given(
    st.lists(st.floats(0, 50, width=32), min_size=1, max_size=20), st.integers(0, 2), st.integers(2, 50), st.booleans()
)
def test_rows_are_judged_alone(losses, at, classes, recovers):
    """A row among others hears the same as by itself."""
    governor = Governor(CONFIG, classes, 3, "cpu", recovers=recovers)
    alone, good = judged(losses, accuracy=0.0, classes=classes, recovers=recovers)
    for decision, loss in enumerate(losses):
        loss_R = torch.tensor([math.nan, 0.1 * decision, 1e9])
        loss_R[at] = loss
        verdict = judge(governor, loss_R, accuracy=0.0)
        assert int(verdict.panic_R[at]) == alone[decision]
        assert bool(verdict.good_R[at]) == good[decision]


def test_every_panic_has_words():
    assert set(PANIC_TEXT) == set(Panic) - {Panic.NONE}


@pytest.mark.parametrize("wrong", [{"governor_window": 4}, {"learned_guesses": 0.97}, {"collapsed_decisions": 0}])
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValidationError):
        GovernorConfig(**wrong)
