"""Every view on real runs: it never fails, its units are what its names say, its values are those of the tables."""

import json
import math
from collections import Counter, defaultdict
from importlib.resources import files
from itertools import combinations

import pytest

from esper.karn.reader import RunReader
from esper.karn.views import views
from helpers.stored import column, stored
from helpers.stored_runs import ask, changed

NAMES = {
    *("now", "learning", "update_health", "heads", "op_given_legal", "seed", "blueprint", "reward_parts"),
    *("reward_alignment", "interaction", "incidents", "speed", "run_diff", "frontier", "data_health", "events"),
    "layers",
}
OF_A_POLICY = ("update_health", "heads", "layers", "reward_parts", "reward_alignment")
STORES = ("heuristic", "lean", "chance", "stopped", "walk", "begun", "unended")
GROWN = ("heuristic", "chance")
BITS = {"wait": 1, "germinate": 2, "set_alpha_target": 4, "cull": 8, "fossilize": 16, "advance": 32}


@pytest.fixture(scope="session")
def unended(stopped, tmp_path_factory):
    """As a killed run leaves it."""
    return changed(
        stopped,
        tmp_path_factory.mktemp("unended"),
        "UPDATE run SET status = 'running', ended_unix_s = NULL",
        "UPDATE round SET ended_unix_s = NULL",
        "UPDATE episode SET status = 'running', decisions = NULL, added_parameters = NULL, added_multiply_adds = NULL, "
        "committed_seeds = NULL, rent_nats = NULL, val_loss_nats = NULL, val_accuracy = NULL, training_s = NULL",
    )


@pytest.fixture
def store(request):
    return request.getfixturevalue(request.param)


def on(*names):
    return pytest.mark.parametrize("store", names, indirect=True)


def mean(values):
    values = [value for value in values if value is not None]
    return pytest.approx(sum(values) / len(values)) if values else None


def test_every_view_asks_a_question():
    assert set(views()) == NAMES
    folder = files("esper.karn").joinpath("views")
    assert {file.name for file in folder.iterdir()} == {f"{name}.sql" for name in NAMES}
    for name, view in views().items():
        first = folder.joinpath(f"{name}.sql").read_text().splitlines()[0]
        assert first.startswith("-- ")
        assert first.endswith("?")
        assert first == f"-- {view.question}"


@on(*STORES)
@pytest.mark.parametrize("name", sorted(NAMES))
def test_no_view_fails_and_names_tell_units(store, name, chance):
    with RunReader(store, chance if name == "run_diff" else None) as reader:
        answer = reader.view(name, 10**6)
    assert len(set(answer.columns)) == len(answer.columns) > 1
    for row in answer.rows:
        for what, value in zip(answer.columns, row, strict=True):
            if isinstance(value, float):
                assert math.isfinite(value), what
            if value is not None and what.endswith(("_share", "accuracy")):
                assert 0 <= value <= 1, what
            if value is not None and what.endswith("_s"):
                assert value >= 0, what
    if name in OF_A_POLICY:
        assert answer.rows == []
    if name == "data_health":
        shares = [row for row in answer.rows if row[answer.columns.index("unit")] == "share"]
        assert all(row[1] is None or 0 <= row[1] <= 1 for row in shares)


@pytest.mark.parametrize("name", sorted(NAMES - set(OF_A_POLICY) - {"run_diff", "incidents"}))
def test_every_view_of_growth_says_something(heuristic, name):
    assert ask(heuristic, name)


def test_layers_of_a_run_from_before_they_were_recorded(heuristic, tmp_path):
    old = changed(heuristic, tmp_path, "DROP TABLE layer", "PRAGMA user_version = 1")
    assert ask(old, "layers") == []
    assert ask(old, "now")


def test_now_of_a_run_that_is_over(heuristic):
    (now,) = ask(heuristic, "now")
    grown = stored(heuristic, "SELECT * FROM episode WHERE round = 0")[0]
    assert (now["status"], now["task"], now["controller"], now["seed"]) == ("finished", "digits-mlp", "heuristic", 0)
    assert now["decisions"] == now["planned_decisions"] == 90 == len(column(heuristic, "SELECT 1 FROM decision"))
    assert (now["progress_share"], now["left_s"], now["round"], now["decision"]) == (1.0, None, 2, 30)
    assert (now["test_accuracy"], now["test_loss_nats"]) == (grown["test_accuracy"], grown["test_loss_nats"])
    assert now["parameters"] == grown["host_parameters"] + grown["added_parameters"]
    (run,) = stored(heuristic, "SELECT * FROM run")
    assert now["elapsed_s"] == pytest.approx(run["heartbeat_unix_s"] - run["started_unix_s"])
    assert now["decisions_per_s"] == pytest.approx(90 / now["elapsed_s"])
    assert now["age_s"] == pytest.approx(now["heartbeat_age_s"] + now["elapsed_s"])


def test_now_of_runs_that_are_not(begun, stopped, unended, tmp_path):
    (now,) = ask(stopped, "now")
    (planned,) = column(stopped, "SELECT planned_decisions FROM run")
    assert (now["status"], now["decisions"], now["progress_share"]) == ("interrupted", 6, pytest.approx(6 / planned))
    assert (now["left_s"], now["test_accuracy"]) == (None, None)
    # One that says that it runs is believed for as long as it is heard of.
    soon = "UPDATE run SET heartbeat_late_s = 1e9"
    (now,) = ask(changed(unended, tmp_path / "young", soon), "now")
    assert now["status"] == "running"
    assert now["left_s"] == pytest.approx((planned - 6) / now["decisions_per_s"])
    late = "UPDATE run SET heartbeat_unix_s = heartbeat_unix_s - 1e6, started_unix_s = started_unix_s - 1e6"
    (now,) = ask(changed(unended, tmp_path / "old", late), "now")
    assert now["status"] == "lost"
    assert now["heartbeat_age_s"] > 1e6
    (now,) = ask(begun, "now")
    assert (now["status"], now["round"], now["decisions"], now["progress_share"]) == ("lost", None, None, None)


def late_ones(store):
    return [incident for incident in ask(store, "incidents") if incident["kind"] == "heartbeat_late"]


def test_a_silent_run_is_an_incident(unended, stopped, tmp_path):
    late = "UPDATE run SET heartbeat_unix_s = heartbeat_unix_s - 1e6, started_unix_s = started_unix_s - 1e6"
    (incident,) = late_ones(changed(unended, tmp_path / "old", late))
    assert (incident["kind"], incident["subject"], incident["state"]) == ("heartbeat_late", "process", "open")
    assert incident["value"] == pytest.approx(1e6, rel=1e-2)
    assert late_ones(changed(unended, tmp_path / "young", "UPDATE run SET heartbeat_late_s = 1e9")) == []
    # What was ended may be silent.
    assert late_ones(changed(stopped, tmp_path / "ended", late)) == []


def test_open_incidents_come_first(heuristic, tmp_path):
    (begin,) = column(heuristic, "SELECT started_unix_s FROM run")
    copy = changed(
        heuristic,
        tmp_path,
        f"INSERT INTO incident VALUES (7, 'slow', 'grown', 'was slow', 4.0, 0, {begin + 1}, 2, {begin + 4})",
        f"INSERT INTO incident VALUES (8, 'rollback', 'grown', 'rolled back', 2.0, 1, {begin + 2}, NULL, NULL)",
    )
    # A busy machine may have been slow besides.
    told = ask(copy, "incidents")
    first, second = (row for row in told if row["message"] in ("rolled back", "was slow"))
    assert [row["state"] for row in told] == sorted(row["state"] for row in told)
    assert (first["kind"], first["state"], first["opened_round"], first["closed_round"]) == (
        "rollback",
        "open",
        1,
        None,
    )
    assert (second["kind"], second["state"], second["opened_round"], second["closed_round"]) == ("slow", "over", 0, 2)
    assert (second["opened_after_s"], second["lasted_s"]) == (pytest.approx(1), pytest.approx(3))
    assert ask(copy, "now")[0]["open_incidents"] == ask(heuristic, "now")[0]["open_incidents"] + 1


@on(*GROWN, "walk")
def test_op_given_legal(store):
    decisions, asked = stored(store, "SELECT * FROM decision"), ask(store, "op_given_legal")
    for round in {d["round"] for d in decisions}:
        mine = [d for d in decisions if d["round"] == round]
        rows = {row["op"]: row for row in asked if row["round"] == round}
        assert set(rows) == {op for op, bit in BITS.items() if any(d["legal_ops"] & bit for d in mine)}
        assert sum(row["chosen_decisions"] for row in rows.values()) == len(mine)
        for op, row in rows.items():
            legal = [d for d in mine if d["legal_ops"] & BITS[op]]
            chosen = [d for d in legal if d["op"] == op]
            assert (row["legal_decisions"], row["chosen_decisions"]) == (len(legal), len(chosen))
            assert row["chosen_share"] == pytest.approx(len(chosen) / len(legal))
            assert row["accepted_share"] == mean([d["accepted"] for d in chosen])
            assert row["p_chosen"] == mean([d["p_op"] for d in chosen])


def test_p_chosen_is_a_mean_over_what_was_scored(heuristic, tmp_path):
    copy = changed(
        heuristic,
        tmp_path,
        "UPDATE decision SET p_op = (decision + 1) / 40.0 WHERE round = 0 AND decision % 3 = 0",
    )
    for row in ask(copy, "op_given_legal"):
        sql = "SELECT p_op FROM decision WHERE round = ? AND op = ?"
        assert row["p_chosen"] == mean(column(copy, sql, row["round"], row["op"]))


def seeds_of(store):
    """Give the transitions of every seed by (round, row, seed), in order."""
    found = defaultdict(list)
    for t in stored(store, "SELECT * FROM transition WHERE seed IS NOT NULL ORDER BY round, row, decision, step"):
        found[t["round"], t["row"], t["seed"]].append(t)
    return found


@on(*GROWN, "walk")
def test_seed(store):
    told, seeds = seeds_of(store), ask(store, "seed")
    assert len(seeds) == len(column(store, "SELECT 1 FROM transition WHERE op = 'germinate' AND allowed"))
    assert {(s["round"], s["row"], s["seed"]) for s in seeds} == set(told)
    rounds = {r["round"]: r for r in stored(store, "SELECT * FROM round")}
    kept = {(s["round"], s["row"], s["seed"], s["decision"]): s for s in stored(store, "SELECT * FROM slot")}
    for s in seeds:
        life = told[s["round"], s["row"], s["seed"]]
        done = [t for t in life if t["allowed"]]
        ends = {t["after"]: t for t in done}
        at_end = done[-1]["actor"] == "end of episode"
        fates = {"FOSSILIZED": "committed", "CULLED": "not committed" if at_end else "culled"}
        assert s["fate"] == fates.get(done[-1]["after"], "alive")
        assert s["culled_by"] == (done[-1]["actor"] if "CULLED" in ends else None)
        assert s["germinated_decision"] == life[0]["decision"]
        blended = [t for t in done if (t["before"], t["after"]) == ("TRAINING", "BLENDING")]
        assert [s["blended_decision"]] == ([t["decision"] for t in blended] or [None])
        assert [s["incubator_gain_nats"]] == ([t["incubator_gain_nats"] for t in blended] or [None])
        for what, after in (("committed_decision", "FOSSILIZED"), ("culled_decision", "CULLED")):
            assert s[what] == (ends[after]["decision"] if after in ends else None)
        last = ends.get("FOSSILIZED") or ends.get("CULLED")
        assert s["judged_nats"] == (last["contribution_nats"] if last else None)
        steps = [s[f"{what}_decision"] for what in ("germinated", "blended", "committed", "culled")]
        steps = [step for step in steps if step is not None]
        assert steps == sorted(steps)
        assert {t["blueprint"] for t in life} == {s["blueprint"]}
        assert (s["slot"], s["operator"]) == (life[0]["slot"], life[0]["operator"])
        assert (s["parameters"], s["refusals"]) == (life[0]["parameters"], len(life) - len(done))
        at = s["culled_decision"] if "CULLED" in ends else rounds[s["round"]]["decisions"]
        seen = kept.get((s["round"], s["row"], s["seed"], at - 1), {"contribution_nats": None})
        assert s["contribution_nats"] == seen["contribution_nats"]
        assert s["arm"] == rounds[s["round"]]["arm"]
    fates = Counter(s["fate"] for s in seeds)
    assert fates["committed"] == sum(column(store, "SELECT committed_seeds FROM episode JOIN round USING (round) "
                                                   "WHERE arm != 'everything from the start'"))  # fmt: skip


def test_runs_here_hold_every_fate(heuristic, walk):
    assert {s["fate"] for store in (heuristic, walk) for s in ask(store, "seed")} == {
        "committed",
        "culled",
        "not committed",
    }
    committed = [s for s in ask(heuristic, "seed") if s["fate"] == "committed"]
    assert committed
    assert all(s["contribution_nats"] is not None and s["judged_nats"] is not None for s in committed)


@on(*GROWN, "walk")
def test_blueprint(store):
    groups = defaultdict(list)
    for s in ask(store, "seed"):
        groups[s["arm"], s["blueprint"]].append(s)
    rows = {(row["arm"], row["blueprint"]): row for row in ask(store, "blueprint")}
    assert set(rows) == set(groups)
    for key, seeds in groups.items():
        row, fates = rows[key], Counter(s["fate"] for s in seeds)
        assert row["germinated"] == len(seeds)
        assert row["blended"] == sum(s["blended_decision"] is not None for s in seeds)
        assert [row["committed"], row["culled"], row["not_committed"]] == [
            fates[fate] for fate in ("committed", "culled", "not committed")
        ]
        assert row["committed_share"] == pytest.approx(fates["committed"] / len(seeds))
        assert row["incubator_gain_nats"] == mean([s["incubator_gain_nats"] for s in seeds])
        judged = [s["judged_nats"] for s in seeds if s["fate"] == "committed"]
        assert row["committed_contribution_nats"] == mean(judged)
        assert row["parameters"] == mean([s["parameters"] for s in seeds])


def test_what_was_refused_is_no_seed_of_a_blueprint(walk, tmp_path):
    # Somebody asks again and again for a slot that is taken: the seed that sits there is told with the refusal.
    (seed,) = stored(walk, "SELECT * FROM transition WHERE op = 'germinate' ORDER BY parameters DESC LIMIT 1")
    refused = {**seed, "allowed": 0, "refused_by": "STAGE", "before": "TRAINING", "after": "TRAINING"}
    lines = [{**refused, "decision": 900 + at, "step": 0} for at in range(20)]
    values = [", ".join("NULL" if v is None else repr(v) for v in line.values()) for line in lines]
    copy = changed(walk, tmp_path, *(f"INSERT INTO transition ({', '.join(seed)}) VALUES ({v})" for v in values))
    assert ask(copy, "blueprint") == ask(walk, "blueprint")


@on(*GROWN)
def test_interaction(store):
    losses = {
        (c["round"], c["decision"], c["row"], c["coalition"]): c["loss_nats"]
        for c in stored(store, "SELECT * FROM contribution")
    }
    expected = {}
    for round, decision, row in {key[:3] for key in losses}:
        mine = {key[3]: loss for key, loss in losses.items() if key[:3] == (round, decision, row)}
        alone = [slot for slot in range(8) if 2**slot in mine]
        for a, b in combinations(alone, 2):
            gains = mine[0] - mine[2**a], mine[0] - mine[2**b], mine[0] - mine[2**a + 2**b]
            expected[round, decision, row, a, b] = (*gains, gains[2] - gains[0] - gains[1])
    told = {}
    for row in ask(store, "interaction"):
        *_, alone_a, alone_b, together, interaction = values = list(row.values())
        told[values[0], *values[2:6]] = (alone_a, alone_b, together, interaction)
    assert told == {key: pytest.approx(value, abs=1e-12) for key, value in expected.items()}
    assert len(told) >= 3


@on(*GROWN, "walk", "stopped")
def test_events(store):
    events = ask(store, "events")
    transitions = stored(store, "SELECT * FROM transition ORDER BY round, decision, row, step")
    checks = {(c["gate"], c["check_name"]): c for c in stored(store, "SELECT * FROM gate_check")}
    deciding = {"G1": "HOST_LOSS", "G2": "INCUBATOR_GAIN", "G3": "ALPHA_AT_TARGET", "G5": "CONTRIBUTION"}
    for event, t in zip(events, transitions, strict=True):
        for name in set(event) & set(t):
            assert event[name] == t[name], name
        if t["reason"] is not None:
            assert event["why"] == t["reason"]
        elif t["gate"] is not None:
            check = checks[t["gate"], t["refused_by"] or deciding[t["gate"]]]
            seen = t[check["quantity"]]
            limit = check["limit_value"] if check["standard_errors"] is None else t["limit_nats"]
            words = f"{check['meaning']} {'not measured' if seen is None else f'{seen:.4g}'}"
            assert event["why"] == words + ("" if limit is None else f" (limit {limit:.4g})")
        else:
            assert event["why"] is None
            assert (t["allowed"], t["op"]) in {(1, "germinate"), (1, "set_alpha_target"), (1, "cull")}


@on(*GROWN)
def test_learning(store):
    episodes = {e["round"]: e for e in stored(store, "SELECT * FROM episode JOIN round USING (round)")}
    arms = {row["arm"]: row for row in ask(store, "learning")}
    assert list(arms) == ["grown", "host alone", "everything from the start"]
    for at, row in enumerate(arms.values()):
        own = stored(store, "SELECT * FROM episode WHERE round = ?", at)[0]
        for name in ("rent_nats", "val_loss_nats", "val_accuracy", "test_loss_nats", "test_accuracy"):
            assert row[name] == own[name]
        assert row["parameters"] == own["host_parameters"] + row["added_parameters"]
        rent = own["price_nats"] * math.log1p(own["added_parameters"] / own["host_parameters"])
        assert own["rent_nats"] == pytest.approx(rent)
        assert row["wall_s"] == pytest.approx(episodes[at]["ended_unix_s"] - episodes[at]["started_unix_s"])
        if at == 1:
            assert (row["gain_nats"], row["net_nats"]) == (None, None)
            continue
        (twin,) = column(store, "SELECT val_loss_nats FROM episode WHERE round = 1")
        assert row["gain_nats"] == pytest.approx(twin - own["val_loss_nats"])
        assert row["net_nats"] == pytest.approx(row["gain_nats"] - rent)


@on(*GROWN, "lean")
def test_speed(store):
    speed = ask(store, "speed")
    assert sum(row["wall_s"] for row in speed) == pytest.approx(sum(column(store, "SELECT wall_s FROM timing")))
    for arm in ("grown", "host alone", "everything from the start"):
        mine = {row["phase"]: row for row in speed if row["arm"] == arm}
        own = {phase: row for phase, row in mine.items() if phase != "write"}
        assert sum(row["share"] for row in own.values()) == pytest.approx(1)
        timing = "SELECT phase, sum(t.decisions) AS n, sum(wall_s) AS s FROM timing AS t JOIN round USING (round)"
        told = {row["phase"]: row for row in stored(store, f"{timing} WHERE arm = ? GROUP BY phase", arm)}
        assert set(told) == set(mine)
        horizon = column(store, "SELECT horizon_decisions FROM round LIMIT 1")[0]
        for phase, row in own.items():
            assert row["decisions"] == told[phase]["n"] == (1 if phase == "harvest" else horizon)
            assert row["decision_s"] == pytest.approx(told[phase]["s"] / row["decisions"])


def flat(value, name=""):
    """Give every setting by its name in dots."""
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in flat(part, f"{name}.{key}").items()}
    if isinstance(value, list):
        return {k: v for at, part in enumerate(value) for k, v in flat(part, f"{name}[{at}]").items()}
    return {name.removeprefix("."): value}


def test_run_diff(heuristic, chance):
    diff = {row["what"]: (row["this"], row["other"]) for row in ask(heuristic, "run_diff", chance)}
    assert diff["setting seed"] == (0, 3)
    assert diff["setting training.horizon"] == (30, 24)
    assert diff["setting controller"] == ("heuristic", "random")
    this, other = (flat(json.loads(column(store, "SELECT config FROM run")[0])) for store in (heuristic, chance))
    settings = {f"setting {name}": (this[name], other[name]) for name in this if this[name] != other[name]}
    assert {what: values for what, values in diff.items() if what.startswith("setting ")} == settings
    assert all(a != b for a, b in diff.values())
    for at, store in enumerate((heuristic, chance)):
        (accuracy,) = column(store, "SELECT test_accuracy FROM episode WHERE round = 0")
        assert diff["grown: test accuracy"][at] == accuracy
    back = {row["what"]: (row["other"], row["this"]) for row in ask(chance, "run_diff", heuristic)}
    assert back == diff


def test_run_diff_without_a_difference(heuristic, tmp_path):
    assert ask(heuristic, "run_diff") == []
    assert ask(heuristic, "run_diff", heuristic) == []
    copy = changed(heuristic, tmp_path, "UPDATE run SET accelerator = 'big', threads = threads + 1")
    diff = {row["what"]: (row["this"], row["other"]) for row in ask(heuristic, "run_diff", copy)}
    (threads,) = column(heuristic, "SELECT threads FROM run")
    assert diff == {"accelerator": (None, "big"), "threads": (threads, threads + 1)}
