"""Views on records that a test damaged or wrote by hand: health, what learning leaves behind, the frontier."""

import random
import statistics

import pytest

from helpers.run_stores import DECISION, EPISODE, ROUND, insert
from helpers.stored_runs import ask, changed, only_begun, writing

# Whether the record is complete.


def health(store):
    return {row["what"]: row["healthy"] for row in ask(store, "data_health")}


@pytest.mark.parametrize("name", ["heuristic", "lean", "chance", "stopped", "walk"])
def test_a_good_record_is_healthy(request, name):
    store = request.getfixturevalue(name)
    assert set(health(store).values()) <= {1, None}


def test_where_there_is_nothing_nothing_is_ill(begun, tmp_path):
    assert 0 not in health(begun).values()
    # The very first look: no time has passed.
    young = changed(begun, tmp_path, "UPDATE run SET heartbeat_unix_s = started_unix_s")
    assert 0 not in health(young).values()


LAST_SLOTS = "round = 2 AND decision = (SELECT max(decision) FROM slot WHERE round = 2)"
DAMAGE = {
    "decisions recorded": "DELETE FROM decision WHERE round = 0 AND decision = 3",
    "decisions without a validation loss": "UPDATE decision SET val_loss_nats = NULL WHERE round = 1 AND decision = 3",
    "transitions of the last round that do not follow on the one before": (
        "DELETE FROM transition WHERE after = 'TRAINING' AND allowed AND seed = 0"
    ),
    "blended seeds without a contribution, last decision": (
        f"UPDATE slot SET contribution_nats = NULL WHERE slot = 1 AND {LAST_SLOTS}"
    ),
    "rounds without an end": "UPDATE round SET ended_unix_s = NULL WHERE round = 1",
    "waits for a full buffer": "UPDATE run SET stalls = 3",
    "time waited for a full buffer": "UPDATE run SET stall_s = heartbeat_unix_s - started_unix_s",
    "longest silence": "UPDATE timing SET unix_s = unix_s + 1000 WHERE unix_s = (SELECT max(unix_s) FROM timing)",
}


@pytest.mark.parametrize("what", sorted(DAMAGE))
def test_each_damage_shows(heuristic, tmp_path, what):
    healthy, ill = health(heuristic), health(changed(heuristic, tmp_path, DAMAGE[what]))
    assert (healthy[what], ill[what]) == (1, 0)
    assert {name for name in ill if ill[name] != healthy[name]} == {what}


# What went wrong.


def test_failures_are_events_after_the_transitions_of_their_decision(heuristic, tmp_path):
    before = ask(heuristic, "events")
    calm = dict.fromkeys(("updates skipped, their gradient not finite", "failures of hosts"), 0)
    assert {row["what"]: row["value"] for row in ask(heuristic, "data_health") if row["what"] in calm} == calm
    decision = before[0]["decision"]
    columns = "round, decision, row, reason, culled_seeds, restored, learning_rate_share, unix_s"
    store = changed(
        heuristic,
        tmp_path,
        f"INSERT INTO failure ({columns}) VALUES (0, {decision}, 0, 'it broke', 2, 1, 0.09, 5.0)",
        f"INSERT INTO failure ({columns}) VALUES (0, 99, 0, 'it broke again', 0, 0, NULL, 6.0)",
        "UPDATE decision SET skipped_updates = 4 WHERE round = 1 AND decision = 2",
    )
    after = ask(store, "events")
    told = [event for event in after if event["slot"] is None]
    assert [event for event in after if event["slot"] is not None] == before
    assert [(event["decision"], event["actor"], event["op"], event["why"]) for event in told] == [
        (decision, "governor", "rollback", "it broke; it goes on with 0.09 of its learning rate"),
        (99, "governor", "rollback", "it broke again; it is over"),
    ]
    at = after.index(told[0])
    assert [event["decision"] == decision for event in after[at - 1 : at + 2 : 2]] == [True, False]
    values = {row["what"]: row["value"] for row in ask(store, "data_health")}
    assert (values["updates skipped, their gradient not finite"], values["failures of hosts"]) == (4, 2)


# What learning leaves behind.

UPDATE = {
    **{"update_s": 0.5, "epochs": 4, "minibatches": 16, "skipped_minibatches": 0, "stopped_early": 0},
    **{"kl_nats": 0.01, "clip_share": 0.1, "policy_loss": -0.02, "value_loss": 0.3, "entropy": 0.8},
    **{"explained_variance": 0.4, "gradient_norm": 1.5, "policy_learning_rate": 3e-4},
}


@pytest.fixture
def record(tmp_path):
    """An empty record, and its connection."""
    path = only_begun(tmp_path / "run.sqlite")
    with writing(path) as db:
        yield path, db


def add_round(db, number, **columns):
    insert(
        db, "round", **{"round": number, **ROUND, "arm": "policy", "purpose": "train", "ended_unix_s": 9.0, **columns}
    )


def add_episodes(db, number, *episodes, **columns):
    for row, episode in enumerate(episodes):
        insert(db, "episode", **{"round": number, "row": row, **EPISODE, **columns, **episode})


def add_decisions(db, number, *rewards):
    for at, parts in enumerate(rewards):
        insert(db, "decision", **{"round": number, "decision": at, "row": 0, **DECISION, **parts})


def test_update_health(record):
    path, db = record
    for number, kl in enumerate((0.01, 0.5, 0.4, 1e-9)):
        add_round(db, number, **{**UPDATE, "kl_nats": kl})
    add_round(db, 4)
    about = {"message": "m", "value": 1.0, "opened_unix_s": 1.0}
    insert(db, "incident", kind="policy_violent", subject="policy", opened_round=1, closed_round=3, **about)
    insert(db, "incident", kind="critic_useless", subject="policy", opened_round=2, **about)
    insert(db, "incident", kind="policy_frozen", subject="another arm", opened_round=0, **about)
    insert(db, "incident", kind="slow", subject="policy", opened_round=0, **about)
    rows = ask(path, "update_health")
    # The last round was followed by no update.
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    for row, kl in zip(rows, (0.01, 0.5, 0.4, 1e-9), strict=True):
        assert {name: row[name] for name in UPDATE} == {**UPDATE, "kl_nats": kl}
        assert row["arm"] == "policy"
    told = [set((row["incidents"] or "").split(", ")) for row in rows]
    assert told == [{""}, {"policy_violent"}, {"policy_violent", "critic_useless"}, {"critic_useless"}]


def test_heads(record):
    path, db = record
    add_round(db, 0, **UPDATE, grows=1)
    add_round(db, 1, **UPDATE)
    numbers = {"entropy": 0.5, "kl_nats": 0.01, "gradient_norm": 0.2}
    insert(db, "head", round=1, head="op", used_decisions=40, choice_decisions=30, **numbers)
    insert(db, "head", round=0, head="slot", used_decisions=20, choice_decisions=20, **numbers)
    insert(db, "head", round=0, head="alpha_curve", used_decisions=0, choice_decisions=0)
    rows = ask(path, "heads")
    assert [(row["round"], row["head"], row["choice_share"]) for row in rows] == [
        (0, "alpha_curve", None),
        (0, "slot", 1.0),
        (1, "op", 0.75),
    ]
    assert [(row["entropy"], row["kl_nats"], row["gradient_norm"]) for row in rows] == [
        (None, None, None),
        (0.5, 0.01, 0.2),
        (0.5, 0.01, 0.2),
    ]


def test_layers(record):
    path, db = record
    for number in range(3):
        add_round(db, number, **UPDATE)
    wild = {"gradient_largest": 0.5, "gradient_nonfinite": 7, "activation_mean": -0.1, "activation_nonfinite": 3}
    deep = {"activation_deviation": 1.5, "activation_largest": 4.0, **wild}
    insert(db, "layer", round=1, position=1, layer="a_head", gradient_norm=4.0, **deep)
    insert(db, "layer", round=1, position=0, layer="slot_input", gradient_norm=3.0, gradient_nonfinite=0)
    insert(db, "layer", round=1, position=2, layer="broken", gradient_nonfinite=2)
    insert(db, "layer", round=0, position=0, layer="slot_input", gradient_norm=0.0, gradient_nonfinite=0)
    rows = ask(path, "layers")
    # In the network's order, not in that of the alphabet; a round without measurements is not there.
    assert [(row["round"], row["layer"]) for row in rows] == [
        *((0, "slot_input"), (1, "slot_input"), (1, "a_head"), (1, "broken"))
    ]
    assert [row["gradient_norm"] for row in rows] == [0.0, 3.0, 4.0, None]
    assert [row["gradient_share"] for row in rows] == [None, pytest.approx(0.36), pytest.approx(0.64), None]
    assert [row["gradient_nonfinite"] for row in rows] == [0, 0, 7, 2]
    assert {name: rows[2][name] for name in deep} == deep
    assert {name: rows[1][name] for name in deep} == dict.fromkeys(deep) | {"gradient_nonfinite": 0}
    assert all(row["arm"] == "policy" for row in rows)


def test_reward_parts(record):
    path, db = record
    parts = ("gain", "rent", "shaping", "attribution", "drip", "escrow", "sparse", "penalty")
    for number in range(3):
        add_round(db, number)
    # Exact in binary, so that they add up exactly.
    whole = [{f"reward_{part}": (at + number) / 8 for number, part in enumerate(parts)} for at in range(4)]
    add_decisions(db, 0, *({"reward": sum(line.values()), **line} for line in whole))
    add_decisions(
        db, 1, {"reward": 1.0, "reward_gain": 1.5, "reward_rent": -0.5}, {"reward": 0.5, "reward_gain": 0.75}, {}
    )
    add_decisions(db, 2, {}, {})
    first, second = ask(path, "reward_parts")
    assert (first["decisions"], first["residual"]) == (4, 0.0)
    for number, part in enumerate(parts):
        assert first[part] == (1.5 + number) / 8
    assert first["reward"] == sum(first[part] for part in parts)
    assert (second["decisions"], second["reward"], second["residual"]) == (2, 0.75, 0.25)
    assert (second["gain"], second["rent"], second["shaping"]) == (1.125, -0.5, None)


def aligned(record, rewards, nets):
    """Ask for the alignment of rewards with nets, which are losses below those of the twins, less rent."""
    path, db = record
    add_round(db, 0, arm="twins", purpose="control")
    add_round(db, 1)
    add_episodes(db, 0, *({"val_loss_nats": 2.0 + row} for row in range(len(nets))))
    pairs = enumerate(zip(rewards, nets, strict=True))
    own = ({"twin_row": row, "reward": x, "val_loss_nats": 2.0 + row - y - 0.25} for row, (x, y) in pairs)
    add_episodes(db, 1, *own, twin_round=0, rent_nats=0.25)
    (line,) = ask(path, "reward_alignment")
    assert (line["round"], line["episodes"]) == (1, len(nets))
    assert line["reward"] == pytest.approx(statistics.mean(rewards))
    assert line["net_nats"] == pytest.approx(statistics.mean(nets))
    gaps = [abs(x - y) for x, y in zip(rewards, nets, strict=True)]
    assert line["largest_difference"] == pytest.approx(max(gaps), abs=1e-12)
    return line["correlation_squared"]


NETS = (0.1, -0.2, 0.35, 0.02, 0.0)


def test_reward_that_pays_for_what_we_want(record):
    assert aligned(record, NETS, NETS) == pytest.approx(1)


def test_reward_that_pays_for_harm(record):
    assert aligned(record, [-net for net in NETS], NETS) == pytest.approx(-1)


@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_reward_that_pays_for_something_else(record, offset):
    generator = random.Random(0)
    rewards = [generator.gauss(offset, 0.1) for _ in NETS]
    r = statistics.correlation(rewards, NETS)
    assert aligned(record, rewards, NETS) == pytest.approx(r * abs(r), rel=1e-6)


@pytest.mark.parametrize("reward", [0.0, 0.25, 0.1, 0.7, 1 / 3, -1.1])
def test_reward_that_never_changes(record, reward):
    assert aligned(record, [reward] * 5, NETS) is None


def test_learning_over_rows(record):
    path, db = record
    add_round(db, 0, arm="twins", purpose="control")
    add_round(db, 1, started_unix_s=2.0, entropy=0.5)
    add_round(db, 2, ended_unix_s=None)
    add_episodes(db, 0, *({"val_loss_nats": loss} for loss in (1.0, 2.0, 4.0)))
    own = {"twin_round": 0, "added_parameters": 50, "committed_seeds": 1}
    lines = [
        {"twin_row": 2, "val_loss_nats": 3.0, "rent_nats": 0.5, "reward": 0.5, "test_accuracy": 0.5},
        {"twin_row": 0, "val_loss_nats": 0.5, "rent_nats": 0.0, "reward": 1.0, "test_accuracy": 0.75},
    ]
    add_episodes(db, 1, *lines, **own)
    add_episodes(db, 2, *lines, **own)
    rows = {row["round"]: row for row in ask(path, "learning")}
    assert list(rows) == [0, 1]
    assert rows[0]["gain_nats"] is None
    row = rows[1]
    assert (row["episodes"], row["gain_nats"], row["rent_nats"], row["net_nats"]) == (2, 0.75, 0.25, 0.5)
    assert (row["reward"], row["test_accuracy"], row["val_loss_nats"]) == (0.75, 0.625, 1.75)
    assert (row["parameters"], row["committed_seeds"], row["entropy"], row["wall_s"]) == (150, 1, 0.5, 7.0)


def test_frontier(record):
    path, db = record
    generator = random.Random(1)
    for number in range(40):
        add_round(db, number, arm=f"arm {number % 10}")
        many = ({"added_parameters": generator.randrange(0, 60, 20)} for _ in range(2))
        tested = {"test_accuracy": generator.randrange(4, 8) / 8} if number % 10 < 7 else {}
        more = {"val_accuracy": 0.5, "added_multiply_adds": 10, "training_s": 2.0, "price_nats": number % 20 // 10 / 2}
        add_episodes(db, number, *many, **tested, **more)
    add_episodes(db, 40, {"test_accuracy": 1.0, "added_parameters": 0}, status="interrupted")
    points = ask(path, "frontier")
    assert len({(p["arm"], p["price_nats"]) for p in points}) == len(points) == 20
    assert {p["episodes"] for p in points} == {4}
    assert [p["parameters"] for p in points] == sorted(p["parameters"] for p in points)
    for p in points:
        assert p["split"] == ("test" if int(p["arm"].split()[1]) < 7 else "validation")
        assert (p["multiply_adds"], p["training_s"]) == (1010, 2.0)
        better = [
            q
            for q in points
            if q["split"] == p["split"]
            and q["accuracy"] >= p["accuracy"]
            and q["parameters"] <= p["parameters"]
            and (q["accuracy"], q["parameters"]) != (p["accuracy"], p["parameters"])
        ]
        assert p["on_frontier"] == (not better)
    assert {p["on_frontier"] for p in points} == {0, 1}


def test_frontier_means(record):
    path, db = record
    add_round(db, 0)
    lines = [{"val_accuracy": 0.5, "test_accuracy": 0.25}, {"val_accuracy": 0.25, "test_accuracy": None}]
    add_episodes(db, 0, *lines, added_parameters=10)
    # A mean over some of them would not be comparable: all or none.
    (point,) = ask(path, "frontier")
    assert (point["split"], point["accuracy"], point["parameters"]) == ("validation", 0.375, 110)
