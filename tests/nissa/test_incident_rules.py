"""Rules of incidents: which make sense, which come along, and any of them beside a plain loop."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from esper.nissa.incidents import Rule, Watch, default_rules, read_rules
from helpers.run_stores import empty_database
from helpers.watched import Told

KINDS = (
    *("policy_frozen", "policy_violent", "head_collapsed", "critic_useless", "update_skipped"),
    *("reward_parts_do_not_add_up", "reward_against_quality", "growth_not_paying", "rollback"),
    *("host_failed", "host_updates_skipped", "slow", "disk_nearly_full", "heartbeat_late"),
)
TEXT = {"text": "{value:g} breaks {limit:g}", "observations": "SELECT 1"}


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"open_below": 1.0},
        {"open_above": 1.0},
        {"close_above": 1.0},
        {"close_below": 1.0},
        {"open_below": 1.0, "close_below": 2.0},
        {"open_below": 1.0, "close_above": 0.5},
        {"open_above": 1.0, "close_below": 1.5},
        {"open_below": 1.0, "close_above": 2.0, "open_above": 5.0},
        {"open_above": 5.0, "close_below": 4.0, "opens_above": 1.0},
    ],
    ids=str,
)
def test_a_wrong_rule_is_refused(limits):
    with pytest.raises(ValidationError):
        Rule.model_validate(TEXT | limits)


def test_a_good_rule():
    rule = Rule.model_validate(TEXT | {"open_below": 1, "close_above": 2, "open_above": 9, "close_below": 8})
    assert [rule.broken(value) for value in (0.9, 1, 5, 9, 9.1)] == [1, None, None, None, 9]
    assert [rule.over(value) for value in (0, 1.9, 2, 8, 8.1)] == [False, False, True, True, False]
    # A limit may close where it opens.
    Rule.model_validate(TEXT | {"open_above": 0, "close_below": 0})


@pytest.mark.parametrize("text", ["[a", "[a]\ntext = 'x'", "a = 1"])
def test_rules_that_cannot_be_read(text):
    with pytest.raises(ValueError, match=r"Expected|valid"):
        read_rules(text)


def test_the_rules_that_come_along():
    rules = default_rules()
    assert tuple(rules) == KINDS
    for rule in rules.values():
        message = rule.text.format(value=1.5, limit=2.5)
        assert "{" not in message
        assert "1" in message or "2" in message
    with empty_database() as db:
        # Nothing was written yet: nothing to tell, and nothing to stumble over.
        Watch(rules).look(db, 1.0)
        assert db.execute("SELECT count(*) FROM incident").fetchone() == (0,)


# Any rule, any series.

numbers = st.integers(-4, 14).map(float)


def apart(limits):
    return limits[0] < limits[-1]


def reference(rule, series):
    """Give (opened at, closed at, worst) of every incident, by a plain loop."""
    every, now = [], None
    for at, value in enumerate(series):
        if value is None:
            continue
        if now is None:
            low, high = value < rule.open_below, value > rule.open_above
            if low or high:
                now = {"opened": at, "closed": None, "worst": value, "low": low}
                every.append(now)
        elif rule.close_above <= value <= rule.close_below:
            now["closed"] = at
            now = None
        else:
            now["worst"] = min(now["worst"], value) if now["low"] else max(now["worst"], value)
    return [(one["opened"], one["closed"], one["worst"]) for one in every]


@given(
    st.lists(numbers, min_size=4, max_size=4).map(sorted).filter(apart),
    st.lists(st.none() | numbers, max_size=30),
    st.data(),
)
def test_any_series_beside_a_plain_loop(limits, series, data):
    names = ("open_below", "close_above", "close_below", "open_above")
    observations = """
    SELECT ended_unix_s AS mark, round, arm AS subject, kl_nats AS value
    FROM round WHERE ended_unix_s > :since ORDER BY mark"""
    rule = Rule(text="{value:g}", observations=observations, **dict(zip(names, limits, strict=True)))
    with empty_database() as db:
        told, watch = Told(db), Watch({"kind": rule})
        for value in series:
            told.round(kl_nats=value, look=False)
            if data.draw(st.booleans()):
                watch.look(db, 0.0)
        watch.look(db, 0.0)
        found = [(opened, closed, value) for _, _, value, opened, closed in told.incidents()]
        assert told.messages() == [f"{worst:g}" for _, _, worst in found]
    assert found == reference(rule, series)
    # They come one after the other, and each for a reason.
    for (_, closed, _), (opened, _, _) in itertools.pairwise(found):
        assert closed is not None
        assert closed < opened
    for opened, closed, _ in found:
        assert rule.broken(series[opened]) is not None
        assert closed is None or rule.over(series[closed])
