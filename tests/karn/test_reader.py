"""The reader: opens what is a run, says in one line what is not or no longer, and changes nothing."""

import contextlib
import random
import shutil
import sqlite3

import pytest

from esper.karn.reader import RunReader
from esper.karn.views import views
from esper.leyline.errors import EsperError
from helpers.run_stores import insert, names
from helpers.stored import column
from helpers.stored_runs import changed, count, everything, left_in, look_at_everything, mutated, only_begun


def refusal(run, *words):
    """Give the one line that says why a run cannot be opened."""
    with pytest.raises(EsperError) as caught:
        RunReader(run)
    line = str(caught.value)
    assert "\n" not in line
    for word in (str(run), *words):
        assert word in line
    return line


# Opening.


def test_a_folder_or_its_store(heuristic):
    assert count(heuristic) == count(heuristic.parent) == 3


def test_a_name_with_signs_of_a_uri(heuristic, tmp_path):
    folder = tmp_path / "50% of a run?mode=rwc#1 ü&x"
    folder.mkdir()
    shutil.copy(heuristic, folder)
    with RunReader(folder, folder) as reader:
        assert reader.query("SELECT count(*) FROM round", 1).rows == [(3,)]
        assert reader.view("run_diff", 99).rows == []
    assert names(folder) == ["run.sqlite"]


def test_there_is_no_run(tmp_path):
    for run in (tmp_path, tmp_path / "nowhere", tmp_path / "nowhere" / "run.sqlite"):
        refusal(run, "no run at")
    (tmp_path / "run.sqlite").mkdir()
    refusal(tmp_path, "no run at")


@pytest.mark.parametrize(
    "content", [b"", b"SQLite format 3\0", b"some text\n", b"round,decision\n" * 1000, bytes(5000)]
)
def test_other_files(tmp_path, content):
    path = tmp_path / "run.sqlite"
    path.write_bytes(content)
    refusal(path, "not a run store")
    assert path.read_bytes() == content


def test_other_databases(tmp_path):
    path = tmp_path / "run.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE run (id INTEGER)")
        db.commit()
    refusal(path, "not a run store of Esper's")
    assert names(tmp_path) == ["run.sqlite"]


def test_a_newer_store(heuristic, tmp_path):
    path = changed(heuristic, tmp_path, "PRAGMA user_version = 99")
    refusal(path, "newer Esper", "99", "upgrade")


def test_a_run_that_was_not_begun(heuristic, tmp_path):
    refusal(changed(heuristic, tmp_path, "DELETE FROM run"), "not begun")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.99])
def test_a_store_without_its_end(heuristic, tmp_path, share):
    path = tmp_path / "run.sqlite"
    path.write_bytes(heuristic.read_bytes()[: int(heuristic.stat().st_size * share)])
    refusal(path, "damaged")


def test_the_other_run_is_checked_too(heuristic, tmp_path):
    (tmp_path / "run.sqlite").write_text("text " * 100)
    with pytest.raises(EsperError, match="not a run store"):
        RunReader(heuristic, tmp_path)
    with pytest.raises(EsperError, match="no run at"):
        RunReader(heuristic, tmp_path / "nowhere")


# Damage: an answer or one line, nothing else.


def test_overwritten_pages(chance, tmp_path):
    content, generator = chance.read_bytes(), random.Random(0)
    path = tmp_path / "run.sqlite"
    seen = []
    for first in range(2, len(content) // 4096, 4):
        page = slice(first * 4096, (first + 3) * 4096)
        data = bytearray(content)
        data[page] = generator.randbytes(len(data[page]))
        path.write_bytes(data)
        seen.append(look_at_everything(path))
    assert any("damaged" in line for _, complaints in seen for line in complaints)
    assert any(answers for answers, _ in seen)


def test_changed_bytes(tmp_path, chance):
    small = tmp_path / "small.sqlite"
    with contextlib.closing(sqlite3.connect(chance)) as db:
        db.execute("VACUUM INTO ?", (str(small),))
    content, path, seen = small.read_bytes(), tmp_path / "run.sqlite", []
    for number in range(600):
        path.write_bytes(mutated(content, random.Random(number)))
        try:
            seen.append(look_at_everything(path))
        except Exception as error:
            error.add_note(f"mutation {number}")
            raise
    assert any(answers == len(views()) for answers, _ in seen)
    assert any("damaged" in line for _, complaints in seen for line in complaints)


# Read only.


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO incident VALUES (1, 'k', 's', 'm', 1.0, NULL, 1.0, NULL, NULL)",
        "WITH x AS (SELECT 1) INSERT INTO head SELECT 9, 'op', 1, 1, 1, 1, 1 FROM x",
        "UPDATE run SET status = 'failed'",
        "UPDATE run SET status = 'failed' RETURNING status",
        "DELETE FROM decision",
        "REPLACE INTO head (round, head, used_decisions, choice_decisions) VALUES (0, 'op', 1, 1)",
        "DROP TABLE decision",
        "DROP VIEW now",
        "CREATE TABLE t (x)",
        "CREATE TEMP TABLE t (x)",
        "CREATE INDEX i ON decision (op)",
        "CREATE TRIGGER t AFTER INSERT ON run BEGIN SELECT 1; END",
        "ALTER TABLE run ADD COLUMN x",
        "ATTACH 'new.sqlite' AS new",
        "DETACH other",
        "PRAGMA writable_schema = 1",
        "PRAGMA journal_mode = DELETE",
        "PRAGMA user_version = 7",
        "PRAGMA query_only = 0",
        "PRAGMA wal_checkpoint(TRUNCATE)",
        "VACUUM",
        "VACUUM INTO 'new.sqlite'",
        "REINDEX",
        "ANALYZE",
        "BEGIN IMMEDIATE",
        "SAVEPOINT s",
        "SELECT load_extension('x')",
        "SELECT 1; SELECT 2",
        "SELECT 1; DELETE FROM decision",
        "SELECT ?",
        "SELECT missing",
        "SELEC 1",
    ],
)
def test_nothing_but_reading(heuristic, chance, tmp_path, monkeypatch, sql):
    shutil.copy(heuristic, tmp_path / "run.sqlite")
    monkeypatch.chdir(tmp_path)
    before = left_in(tmp_path)
    with RunReader(tmp_path, chance) as reader:
        with pytest.raises(EsperError) as caught:
            reader.query(sql, 10)
        line = str(caught.value)
        assert line.startswith("query: ")
        assert "\n" not in line
        # It still answers.
        assert reader.query("SELECT count(*) FROM round", 1).rows == [(3,)]
    assert left_in(tmp_path) == before
    if sql.split()[0] in ("INSERT", "UPDATE", "DELETE", "DROP", "CREATE", "ATTACH", "PRAGMA"):
        assert "only read" in line


def test_reading_leaves_no_trace(heuristic):
    before = left_in(heuristic.parent)
    folder = heuristic.parent.stat().st_mtime_ns
    everything(heuristic)
    assert left_in(heuristic.parent) == before
    assert heuristic.parent.stat().st_mtime_ns == folder


def test_the_limit(heuristic):
    with RunReader(heuristic) as reader:
        for limit, rows, more in ((1, 1, True), (2, 2, True), (3, 3, False), (4, 3, False), (10**12, 3, False)):
            answer = reader.query("SELECT round, arm FROM round ORDER BY round", limit)
            assert (answer.columns, len(answer.rows), answer.more) == (("round", "arm"), rows, more)
        assert reader.view("seed", 1).more
        with pytest.raises(EsperError, match=r"unknown view .nwo.; known: .*now"):
            reader.view("nwo", 1)


def test_a_query_names_what_is_wrong(heuristic, tmp_path):
    path = changed(heuristic, tmp_path, "UPDATE run SET config = 'no json'")
    with RunReader(path, path) as reader:
        with pytest.raises(EsperError, match="malformed JSON"):
            reader.view("run_diff", 9)
        with pytest.raises(EsperError, match="no such column: missing; tables and views: esper query RUN"):
            reader.query("SELECT missing FROM round", 9)
        with pytest.raises(EsperError, match="no such table: rounds"):
            reader.query("SELECT * FROM rounds", 9)
    assert column(path, "SELECT config FROM run") == ["no json"]


def test_an_empty_store_of_ours(tmp_path):
    # As it is for a moment while it is made.
    path = tmp_path / "run.sqlite"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute(f"PRAGMA application_id = {0x45535052}")
    with contextlib.suppress(EsperError):
        RunReader(path).__exit__(None, None, None)
    only_begun(tmp_path / "second.sqlite")
    with contextlib.closing(sqlite3.connect(tmp_path / "second.sqlite", isolation_level=None)) as db:
        insert(db, "head", round=0, head="op", used_decisions=1, choice_decisions=1)
    assert count(tmp_path / "second.sqlite", "head") == 1
