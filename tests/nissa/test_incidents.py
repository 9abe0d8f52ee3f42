"""Incidents: each kind beside hand-made records, where it opens and closes and where it means nothing."""

import pytest

from helpers.run_stores import DECISION, EPISODE, ROUND, empty_database, insert
from helpers.watched import Told

# The life of an incident.


@pytest.fixture
def told():
    with empty_database() as db:
        yield Told(db)


def test_the_life_of_an_incident(told):
    for kl in (0.01, 0.2, 0.9, 0.4, 0.07):
        told.round(kl_nats=kl)
    # Between the limits it goes on, with the worst that was seen.
    assert told.incidents() == [("policy_violent", "grown", 0.9, 1, None)]
    assert told.messages() == ["the policy moved too far: KL 0.9 nats in an update, above 0.1"]
    told.round(kl_nats=None)
    told.round(kl_nats=0.07, ended=False)
    assert told.incidents()[0][-1] is None
    told.round(kl_nats=0.05)
    assert told.incidents() == [("policy_violent", "grown", 0.9, 1, 7)]
    # What lies between the limits opens nothing.
    told.round(kl_nats=0.1)
    told.round(kl_nats=0.11)
    assert told.incidents()[1:] == [("policy_violent", "grown", 0.11, 9, None)]
    times = told.db.execute("SELECT opened_unix_s, closed_unix_s FROM incident ORDER BY incident").fetchall()
    assert times == [(1001.0, 1007.0), (1009.0, None)]


def test_several_rounds_in_one_look_and_none_twice(told):
    for kl in (0.2, 0.01, 0.3):
        told.round(kl_nats=kl, look=False)
    told.look()
    told.look()
    assert told.incidents() == [("policy_violent", "grown", 0.2, 0, 1), ("policy_violent", "grown", 0.3, 2, None)]


def test_each_subject_has_its_own(told):
    told.round(kl_nats=0.2, arm="one")
    told.round(kl_nats=0.3, arm="other")
    told.round(kl_nats=0.01, arm="one")
    told.round(kl_nats=0.4, arm="other")
    assert told.incidents() == [("policy_violent", "one", 0.2, 0, 2), ("policy_violent", "other", 0.4, 1, None)]


@pytest.mark.parametrize(
    ("kind", "column", "broken", "between", "over"),
    [
        ("policy_frozen", "kl_nats", 9e-7, 2e-6, 1e-5),
        ("policy_violent", "kl_nats", 0.11, 0.06, 0.05),
        ("critic_useless", "explained_variance", -0.01, 0.05, 0.1),
        ("update_skipped", "skipped_minibatches", 1, None, 0),
    ],
)
def test_what_a_round_tells_of_its_update(told, kind, column, broken, between, over):
    told.round()
    told.round(**{column: broken}, ended=False)
    told.round(**{column: between})
    assert told.incidents() == []
    told.round(**{column: broken})
    told.round(**{column: between})
    assert told.incidents() == [(kind, "grown", broken, 3, None)]
    told.round(**{column: over})
    assert told.incidents() == [(kind, "grown", broken, 3, 5)]


def test_a_round_counts_when_it_has_ended(told):
    number = told.round(kl_nats=0.5, ended=False)
    assert told.incidents() == []
    told.db.execute("UPDATE round SET ended_unix_s = 99.0 WHERE round = ?", (number,))
    told.look()
    assert told.incidents() == [("policy_violent", "grown", 0.5, number, None)]


def heads(told, **entropies):
    """Write a round with heads that had a choice in all of nine decisions, or, where negative, in none."""
    number = told.round(look=False)
    for head, entropy in entropies.items():
        choices = 0 if entropy is not None and entropy < 0 else 9
        value = None if entropy is None else abs(entropy)
        insert(told.db, "head", round=number, head=head, used_decisions=9, choice_decisions=choices, entropy=value)
    told.look(number)


def test_head_collapsed(told):
    heads(told, OP=0.5, SLOT=-0.0001, STYLE=None, TEMPO=0.01)
    assert told.incidents() == []
    heads(told, OP=0.009, SLOT=0.5, TEMPO=0.008)
    heads(told, OP=0.04, SLOT=-0.0001, TEMPO=0.05)
    heads(told, OP=0.0, TEMPO=0.5)
    assert told.incidents() == [("head_collapsed", "OP", 0.0, 1, None), ("head_collapsed", "TEMPO", 0.008, 1, 2)]


def rewards(told, *decisions, ended=True):
    number = told.round(ended=ended, look=False)
    for at, parts in enumerate(decisions):
        insert(told.db, "decision", round=number, decision=at, row=0, **DECISION, **parts)
    told.look(number)


PARTS = ("gain", "rent", "shaping", "attribution", "drip", "escrow", "sparse", "penalty")


def test_reward_parts_do_not_add_up(told):
    whole = {f"reward_{part}": 2.0**at for at, part in enumerate(PARTS)}
    rewards(told, {"reward": 255.0, **whole}, {"reward": 0.0}, {"reward_gain": 5.0}, {})
    rewards(told, {"reward": 1.0, "reward_gain": 1.00009})
    rewards(told, {"reward": 1.0, "reward_gain": 1.5}, ended=False)
    assert told.incidents() == []
    # The worst of a round, whichever way it is wrong.
    rewards(told, {"reward": 1.0, "reward_gain": 1.0}, {"reward": -1.0, "reward_rent": -0.5}, {"reward": 0.1})
    ((kind, subject, value, opened, closed),) = told.incidents()
    assert (kind, subject, opened, closed) == ("reward_parts_do_not_add_up", "grown", 3, None)
    assert value == pytest.approx(0.5)
    rewards(told, {})
    rewards(told, {"reward": 1.0, "reward_gain": 1.00005})
    assert told.incidents()[0][-1] is None
    rewards(told, {"reward": 1.0, "reward_gain": 1.0})
    assert told.incidents()[0][-1] == 6


@pytest.mark.parametrize("part", PARTS)
def test_no_part_of_the_reward_is_forgotten(told, part):
    rewards(told, {"reward": 3.0, f"reward_{part}": 3.0})
    assert told.incidents() == []
    rewards(told, {"reward": 0.0, f"reward_{part}": 3.0})
    assert [kind for kind, *_ in told.incidents()] == ["reward_parts_do_not_add_up"]


def pairs(told, rewards, qualities, *, rent=0.0, **columns):
    """Write a round of twins that all lose 5 nats, then one whose hosts are better by `qualities`, rent paid."""
    twins = told.round(arm="twins", grows=0, look=False)
    number = told.round(look=False, **columns)
    for row, (reward, quality) in enumerate(zip(rewards, qualities, strict=True)):
        place = {"row": row, **EPISODE, "decisions": 10}
        insert(told.db, "episode", round=twins, **place, val_loss_nats=5.0)
        loss = None if quality is None else 5.0 - quality - rent
        more = {"reward": reward, "val_loss_nats": loss, "rent_nats": rent, "added_parameters": 0}
        insert(told.db, "episode", round=number, twin_round=twins, twin_row=row, **place, **more)
    told.look(number)
    return number


def test_reward_against_quality(told):
    up = [float(at) for at in range(8)]
    down = up[::-1]
    pairs(told, up, up)
    pairs(told, up, [1.0, -1.0, -1.0, 1.0, 1.0, -1.0, -1.0, 1.0])
    # Seven say nothing, and neither do rewards or qualities that are all the same, or missing.
    pairs(told, up[:7], down[:7])
    pairs(told, [1.0] * 8, down)
    pairs(told, up, [1.0] * 8)
    pairs(told, [None] * 8, down)
    assert told.incidents() == []
    number = pairs(told, up, down, rent=0.5)
    ((kind, subject, value, opened, closed),) = told.incidents()
    assert (kind, subject, opened, closed) == ("reward_against_quality", "grown", number, None)
    assert value == pytest.approx(-1)
    assert pairs(told, up, up) == told.incidents()[0][-1]


def test_a_host_without_a_loss_says_nothing_of_the_reward(told):
    # Eight that agree, and one that diverged and was paid much.
    up = [float(at) for at in range(8)]
    pairs(told, [*up, 1000.0], [*up, None])
    assert told.incidents() == []


def grown(told, gain, *, added=10, rent=0.0, grows=1, ended=True, twin_first=True):
    """Write a round that grew and its twin; the mean paired gain of its two rows is `gain`."""
    twin_at = next(told.number)
    number = next(told.number)
    for row, share in enumerate((0.5, 1.5)):
        place = {"row": row, **EPISODE}
        insert(told.db, "episode", round=twin_at, **place, val_loss_nats=2.0, rent_nats=0.0, added_parameters=0)
        loss = {"val_loss_nats": 2.0 - gain * share, "rent_nats": rent, "added_parameters": added}
        insert(told.db, "episode", round=number, twin_round=twin_at, twin_row=row, **place, **loss)
    insert(told.db, "round", **{"round": number, **ROUND, "grows": grows, "ended_unix_s": 10.0 + number})
    twin = {**ROUND, "arm": "host alone", "grows": 0, "ended_unix_s": 10.5 + number if ended else None}
    if not twin_first:
        told.look(number)
        assert told.incidents() == []
    insert(told.db, "round", **{"round": twin_at, **twin})
    told.look(number)
    return number


@pytest.mark.parametrize("twin_first", [True, False])
def test_growth_not_paying(told, twin_first):
    grown(told, 0.3, rent=0.2)
    grown(told, -0.1, added=0)
    grown(told, -0.1, added=None)
    grown(told, -0.1, grows=0)
    grown(told, -0.1, ended=False)
    assert told.incidents() == []
    number = grown(told, 0.1, rent=0.3, twin_first=twin_first)
    ((kind, subject, value, opened, closed),) = told.incidents()
    assert (kind, subject, opened, closed) == ("growth_not_paying", "grown", number, None)
    assert value == pytest.approx(-0.2)
    assert told.messages() == ["growth does not pay: paired gain less rent is -0.2 nats on average, below 0"]
    assert grown(told, 0.3, rent=0.2) == told.incidents()[0][-1]


def test_rollback(told):
    for statuses in (["finished"] * 3, ["rolled back", "finished", "rolled back"], ["finished"], ["interrupted"]):
        number = told.round(look=False)
        for row, status in enumerate(statuses):
            insert(told.db, "episode", round=number, row=row, **(EPISODE | {"status": status}))
        told.look(number)
    assert told.incidents() == [("rollback", "grown", 2.0, 1, 2)]
    assert told.messages() == ["2 hosts were rolled back in a round"]


def fail(told, number, decision, at, **more):
    failure = {"round": number, "decision": decision, "row": 0, "reason": "why", "culled_seeds": 0, "restored": 1}
    insert(told.db, "failure", **{**failure, "unix_s": at, **more})


def test_each_failure_of_a_network_that_is_grown(told):
    number = told.round(look=False, ended=False)
    fail(told, number, 3, 5.0)
    told.look()
    fail(told, number, 7, 6.0, restored=0)
    told.look()
    told.look()
    assert told.incidents() == [
        ("host_failed", "grown, decision 4", 1.0, 0, None),
        ("host_failed", "grown, decision 8", 2.0, 0, None),
    ]
    assert told.messages() == [f"the host failed and was returned to its last good state (failure {n})" for n in (1, 2)]
    # With its run it is over.
    told.db.execute("UPDATE round SET ended_unix_s = 10.0")
    told.look()
    assert [incident[-1] for incident in told.incidents()] == [0, 0]


def test_failures_in_training_a_policy_are_told_once_a_round(told):
    number = told.round(look=False, purpose="train")
    fail(told, number, 3, 5.0, restored=0)
    told.look()
    assert told.incidents() == []


def test_skipped_updates(told):
    for skipped in (0, 1, 2, 1):
        number = told.round(look=False, updates_per_decision=10)
        for row, of_row in enumerate((skipped, 0)):
            columns = EPISODE | {"decisions": 5, "skipped_updates": of_row}
            insert(told.db, "episode", round=number, row=row, **columns)
        told.look(number)
    # One of 100 is as many as there may be.
    assert told.incidents() == [("host_updates_skipped", "grown", 0.02, 2, 3)]


def pace(told, at, seconds, decisions=4, number=0):
    """Write what a flush tells of the decisions before it, and look."""
    for phase, share in (("act", 0.25), ("train", 0.75)):
        line = {"decisions": decisions, "wall_s": seconds * decisions * share, "cpu_s": 0.0}
        insert(told.db, "timing", unix_s=at, round=number, phase=phase, **line)
    insert(told.db, "timing", unix_s=at, round=number, phase="write", decisions=0, wall_s=99.0, cpu_s=0.0)
    told.watch.look(told.db, at)


def test_slow(told):
    told.only("slow")
    told.round(look=False)
    told.round(look=False, arm="host alone")
    # Nothing to compare with until three were seen, and another round is another pace.
    for at, seconds in enumerate((0.1, 9.0, 0.1, 0.1)):
        pace(told, 100.0 + at, seconds)
    pace(told, 104.0, 50.0, number=1)
    told.db.execute("DELETE FROM timing")
    for at in range(5):
        pace(told, 300.0 + at, 1.0, decisions=1 + at)
    pace(told, 305.0, 3.0)
    assert told.incidents() == []
    pace(told, 306.0, 8.0)
    ((kind, subject, value, opened, closed),) = told.incidents()
    assert (kind, subject, opened, closed) == ("slow", "grown", 0, None)
    assert value == pytest.approx(8 / (8 / 6))
    # Twice the mean (2 s), then as it was.
    pace(told, 307.0, 5.0)
    assert told.incidents()[0][-1] is None
    pace(told, 308.0, 1.0)
    assert told.incidents()[0][-1] == 0
    # What was long ago no longer counts.
    pace(told, 500.0, 40.0)
    assert len(told.incidents()) == 1


def machine(told, at, free):
    insert(told.db, "machine", unix_s=at, memory_bytes=1, memory_free_bytes=1, disk_free_bytes=free, store_bytes=1)
    told.watch.look(told.db, at)


def test_disk_nearly_full(told):
    for at, gigabytes in enumerate((50, 1.0, 0.99, 1.5, 0.25, 2.0), start=1):
        machine(told, float(at), int(gigabytes * 1e9))
    assert told.incidents() == [("disk_nearly_full", "disk", 0.25, None, None)]
    assert told.messages() == ["only 0.25 GB are left on the disk, below 1"]
    assert told.db.execute("SELECT opened_unix_s, closed_unix_s FROM incident").fetchall() == [(3.0, 6.0)]


def test_heartbeat_late(told):
    for at in (100.0, 101.0, 111.0, 121.5, 122.5, 200.0):
        pace(told, at, 0.1)
    beats = [incident for incident in told.incidents() if incident[0] == "heartbeat_late"]
    assert beats == [("heartbeat_late", "process", 10.5, 0, 0), ("heartbeat_late", "process", 77.5, 0, None)]
