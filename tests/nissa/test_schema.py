"""The schema of a store: what a reader who has nothing but the file can rely on."""

import re
import sqlite3
from importlib.resources import files

import pytest

from esper.leyline.checks import ALL_GATE_CHECKS, CHECK_TEXT, GATE_CHECKS
from esper.nissa.schema import APPLICATION_ID, SCHEMA_VERSION, create
from helpers.run_stores import DECISION, EPISODE, ROUND, RUN, empty_database, insert, open_store, values

SCHEMA = files("esper.nissa").joinpath("schema.sql").read_text()
TABLES = {
    *("run", "gate_check", "round", "head", "layer", "episode", "decision", "failure", "slot", "transition"),
    *("contribution", "incident", "timing", "machine"),
}
SELF_EXPLAINING = {
    # Keys, which the head of the file explains.
    *("round", "decision", "row", "slot", "head", "incident"),
    # Names of things of Esper, and of programs.
    *("stage", "blueprint", "style", "operator", "alpha", "alpha_target", "alpha_curve", "controller", "check_name"),
    *("esper_version", "python_version", "torch_version", "sqlite_version", "process_id"),
    # Counts and yes or no, or with a list of what they can be.
    *(
        "parameters",
        "host_parameters",
        "committed_seeds",
        "culled_seeds",
        "decisions",
        "status",
        "stopped_early",
        "accepted",
        "allowed",
    ),
    *("val_accuracy", "test_accuracy", "policy_loss", "value_loss", "policy_learning_rate"),
    # Explained with the first of their group.
    *("gradient_norm", "gradient_ratio", "alpha_distance"),
    *("activation_mean", "activation_largest", "activation_nonfinite"),
    *("p_slot", "p_blueprint", "p_style", "p_tempo", "p_alpha_target", "p_alpha_speed", "p_alpha_curve"),
}
"""Columns that may stand without a comment; a new one is either commented or put here on purpose."""
UNITS = ("_nats", "_s", "_share", "_bytes", "_decisions", "_unix_s", "_round", "_per_decision")


def columns_of(name):
    with empty_database() as db:
        return {column: (kind, bool(must) or bool(key)) for _, column, kind, must, _, key in describe(db, name)}


def describe(db, name):
    return db.execute(f"PRAGMA table_info({name})").fetchall()


def written():
    """Give (table, what stands before it, its lines) from the text of the schema."""
    pattern = r"(?P<before>(?:--[^\n]*\n|\n)*)CREATE TABLE (?P<name>\w+) \((?P<body>.*?)\n\)"
    for match in re.finditer(pattern, SCHEMA, re.DOTALL):
        yield match["name"], match["before"], match["body"].splitlines()


def test_the_tables_are_those_of_the_design():
    with empty_database() as db:
        assert {name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")} == TABLES
    assert {name for name, _, _ in written()} == TABLES


def test_every_table_is_strict():
    with empty_database() as db:
        listed = {row[1]: row[5] for row in db.execute("PRAGMA table_list") if row[1] in TABLES}
    assert listed == dict.fromkeys(TABLES, 1)


def test_every_table_says_what_it_holds():
    assert {name for name, before, _ in written() if "--" not in before} == set()


def test_every_column_is_explained_or_explains_itself():
    seen, bare = 0, set()
    for _, _, lines in written():
        for line in lines:
            match = re.match(r"    ([a-z]\w*) (INTEGER|REAL|TEXT)\b([^-]*)(--\s*\S.*)?$", line)
            if match is None:
                # A comment for a group, a constraint of the table, or nothing.
                assert re.match(r"    (--|PRIMARY KEY|UNIQUE)|\s*$", line), line
                continue
            seen += 1
            if match[4] is None and not match[1].endswith(UNITS):
                bare.add(match[1])
    assert bare == SELF_EXPLAINING
    assert seen == sum(len(columns_of(name)) for name in TABLES)


def test_a_number_of_seconds_or_nats_is_no_integer():
    for name in TABLES:
        for column, (kind, _) in columns_of(name).items():
            if column.endswith(("_nats", "_s", "_share")):
                assert kind == "REAL", f"{name}.{column}"
            if column.endswith(("_bytes", "_decisions")):
                assert kind == "INTEGER", f"{name}.{column}"


def test_comments_are_in_the_file_itself():
    with empty_database() as db:
        for name, _, lines in written():
            ((kept,),) = db.execute("SELECT sql FROM sqlite_schema WHERE name = ?", (name,)).fetchall()
            comments = [line[line.index("--") :].strip() for line in lines if "--" in line]
            assert comments
            assert [comment for comment in comments if comment not in kept] == []


def test_the_file_is_known_as_a_store(tmp_path):
    path = tmp_path / "run.sqlite"
    open_store(path).close("finished")
    assert values(path, "PRAGMA application_id") == [APPLICATION_ID]
    assert values(path, "PRAGMA user_version") == [SCHEMA_VERSION]
    assert APPLICATION_ID.to_bytes(4, "big") == b"ESPR" == path.read_bytes()[68:72]
    assert SCHEMA_VERSION >= 1


def test_every_check_of_a_gate_says_where_its_value_is():
    gate_of = {check.name: gate.name for gate, checks in GATE_CHECKS.items() for check in checks}
    with empty_database() as db:
        told = db.execute("SELECT * FROM gate_check ORDER BY position").fetchall()
    assert [row[2] for row in told] == [check.name for check in ALL_GATE_CHECKS]
    quantities = columns_of("transition")
    for position, (at, gate, name, quantity, meaning, limit, errors) in enumerate(told):
        assert at == position
        assert gate == gate_of[name]
        assert quantities[quantity] == ("INTEGER" if quantity.endswith("_decisions") else "REAL", False)
        assert meaning == CHECK_TEXT[ALL_GATE_CHECKS[at]]
        # Filled by the run, which knows its limits.
        assert limit is None
        assert errors is None
    # Within a gate only one value can stand in a column, the two limits of one quantity aside.
    named = [(gate, quantity) for _, gate, _, quantity, *_ in told]
    assert {pair for pair in named if named.count(pair) > 1} == {("G2", "gradient_ratio")}


def test_making_the_tables_twice_is_an_error():
    with empty_database() as db, pytest.raises(sqlite3.OperationalError, match="already exists"):
        create(db)


START = {"id": 1, "status": "running", "started_unix_s": 1.0, "heartbeat_unix_s": 1.0, "heartbeat_late_s": 10.0}
COUNTS = {"flushes": 0, "stalls": 0, "stall_s": 0.0}
TIMING = {"unix_s": 1.0, "round": 0, "phase": "act", "decisions": 1, "wall_s": 1.0, "cpu_s": 1.0}
SLOT = {
    **{"round": 0, "decision": 0, "row": 0, "slot": 0, "seed": 0, "stage": "TRAINING", "blueprint": "norm"},
    "alpha": 1.0,
    "parameters": 10,
}
TRANSITION = {
    **{"round": 0, "decision": 0, "row": 0, "step": 0, "slot": 0, "actor": "clock", "op": "clock"},
    **{"before": "CULLED", "after": "EMBARGOED", "allowed": 1},
}
HEAD = {"round": 0, "head": "OP", "used_decisions": 1, "choice_decisions": 1, "entropy": 1.0}
LAYER = {"round": 0, "position": 0, "layer": "op_head", "gradient_nonfinite": 0}
GOOD = {
    "run": {**RUN, **START, **COUNTS},
    "round": {"round": 0, **ROUND, "val_accuracy": 1.0},
    "head": HEAD,
    "layer": LAYER,
    "episode": {"round": 0, "row": 0, **EPISODE, "test_accuracy": 0.57},
    "decision": {"round": 0, "decision": 0, "row": 0, **DECISION, "val_accuracy": 0.0},
    "slot": SLOT,
    "transition": TRANSITION,
    "timing": TIMING,
}


@pytest.mark.parametrize("name", GOOD)
def test_a_good_row_is_taken(name):
    with empty_database() as db:
        insert(db, name, **GOOD[name])
        assert db.execute(f"SELECT count(*) FROM {name}").fetchone() == (1,)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("round", {"val_accuracy": 57}),
        ("round", {"grows": 2}),
        ("round", {"clip_share": 1.1}),
        ("round", {"rows": "many"}),
        ("round", {"rows": 1.5}),
        ("head", {"entropy": 1.6}),
        ("layer", {"gradient_nonfinite": 0.5}),
        ("layer", {"activation_nonfinite": 0.5}),
        ("episode", {"val_accuracy": 57}),
        ("episode", {"test_accuracy": -0.1}),
        ("episode", {"status": "rolled_back"}),
        ("decision", {"val_accuracy": 57}),
        ("decision", {"accepted": 2}),
        ("decision", {"op": None}),
        ("slot", {"alpha": 1.5}),
        ("slot", {"alpha": -0.1}),
        ("transition", {"allowed": 2}),
        ("run", {"id": 2}),
        ("run", {"status": "asleep"}),
        ("run", {"level": "off"}),
        ("timing", {"wall_s": None}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, *value.items())),
)
def test_what_cannot_be_is_refused(name, wrong):
    with empty_database() as db, pytest.raises(sqlite3.IntegrityError):
        insert(db, name, **{**GOOD[name], **wrong})


@pytest.mark.parametrize("name", [name for name in GOOD if name != "run"])
def test_a_row_is_there_once(name):
    with empty_database() as db:
        insert(db, name, **GOOD[name])
        with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
            insert(db, name, **GOOD[name])
