"""The reader beside a writer, after its end, on copies, and under ctrl-C."""

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from esper.karn import reader as reader_module
from esper.karn.reader import RunReader
from esper.leyline.errors import EsperError
from helpers.command import COMMAND, ENVIRONMENT
from helpers.run_stores import ROUND, add_rounds, insert, names, open_store, until
from helpers.stored import column
from helpers.stored_runs import ask, count, everything, left_in, look_at_everything, only_begun, writing

TESTS = Path(__file__).parents[1]


def test_while_a_run_writes(tmp_path):
    path = tmp_path / "run.sqlite"
    with open_store(path) as store:
        add_rounds(store, 0)
        store.flush()
        with RunReader(tmp_path) as early:
            assert early.query("SELECT count(*) FROM round", 1).rows == [(1,)]
            add_rounds(store, 1, 2)
            store.flush()
            assert early.query("SELECT count(*) FROM round", 1).rows == [(3,)]
            assert count(tmp_path) == 3
            assert early.query("SELECT status FROM run", 1).rows == [("running",)]
        add_rounds(store, 3)
    assert count(tmp_path) == 4
    assert names(tmp_path) == ["run.sqlite"]


def test_a_writer_that_ends_while_somebody_reads(tmp_path):
    store = open_store(tmp_path / "run.sqlite")
    add_rounds(store, 0)
    store.flush()
    with RunReader(tmp_path) as early:
        assert early.query("SELECT count(*) FROM round", 1).rows == [(1,)]
        add_rounds(store, 1)
        store.close("finished")
        assert early.query("SELECT status FROM run", 1).rows == [("finished",)]
    assert count(tmp_path) == 2


def test_always_while_the_file_grows(tmp_path):
    # Large flushes reach the file itself a page at a time.
    with open_store(tmp_path / "run.sqlite") as store:
        for at in range(60):
            add_rounds(store, *range(at * 2000, (at + 1) * 2000))
            if at % 4 == 0:
                assert count(tmp_path) % 2000 == 0
        store.flush()
        assert count(tmp_path) == 120_000


def test_in_the_middle_of_a_checkpoint(tmp_path):
    # SQLite brings the log into the file page by page, the first one first: it tells of pages that still are only in
    # the log.
    path, folder = only_begun(tmp_path / "run.sqlite"), tmp_path / "then"
    folder.mkdir()
    with writing(path) as db:
        size = path.stat().st_size
        db.execute("PRAGMA journal_mode = WAL")
        for number in range(500):
            insert(db, "round", round=number, **ROUND)
        db.execute("PRAGMA wal_checkpoint(PASSIVE)")
        copied(tmp_path, folder, "run.sqlite", "run.sqlite-wal")
    os.truncate(folder / "run.sqlite", size)
    assert path.stat().st_size > size
    assert count(folder) == 500
    # So says SQLite alone, too.
    assert column(folder / "run.sqlite", "SELECT count(*) FROM round") == [500]


KILLED = """
import sys, time
from esper.nissa.incidents import default_rules
from helpers.run_stores import RUN, add_rounds
from esper.nissa.store import RunStore
from pathlib import Path

rules = default_rules()
limits = {"open_above": 1.0, "close_below": 1.0}
rules["heartbeat_late"] = rules["heartbeat_late"].model_copy(update=limits)
store = RunStore(Path(sys.argv[1]), {**RUN, "config": "{}"}, rules=rules)
for number in range(20):
    add_rounds(store, number)
    store.flush()
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """What kill -9 leaves of a run."""
    folder = tmp_path_factory.mktemp("killed")
    environment = {**ENVIRONMENT, "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-c", KILLED, str(folder / "run.sqlite")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as run:
        try:
            assert run.stdout.readline() == "ready\n"
        finally:
            run.kill()
    assert run.returncode == -signal.SIGKILL
    assert "run.sqlite-wal" in names(folder)
    return folder


def copied(run, folder, *files):
    """Copy files of a run as they lie there now."""
    for name in files:
        shutil.copy(run / name, folder)
    return folder


def test_after_kill(killed, tmp_path):
    folder = copied(killed, tmp_path, *names(killed))
    before = left_in(folder)
    assert count(folder) == 20
    until(lambda: ask(folder, "now")[0]["status"] == "lost")
    assert [row["kind"] for row in ask(folder, "incidents") if row["state"] == "open"] == ["heartbeat_late"]
    # Reading repairs nothing in place: what was written stays as it was left.
    after = left_in(folder)
    for name in ("run.sqlite", "run.sqlite-wal"):
        assert after[name] == before[name]


@pytest.mark.parametrize(
    "files", [["run.sqlite", "run.sqlite-wal"], ["run.sqlite", "run.sqlite-wal", "run.sqlite-shm"]]
)
def test_a_killed_run_that_was_copied(killed, tmp_path, files):
    assert everything(copied(killed, tmp_path, *files)) == everything(killed)


def test_a_killed_run_without_its_log(killed, tmp_path):
    # What was not copied is not there; that is all.
    assert look_at_everything(copied(killed, tmp_path, "run.sqlite") / "run.sqlite") != (0, [])


def test_a_finished_run_is_one_file(heuristic, tmp_path):
    shutil.copy(heuristic, tmp_path / "somebody's.sqlite")
    assert everything(tmp_path / "somebody's.sqlite") == everything(heuristic)


@pytest.mark.parametrize("binding", [True, False], ids=["as SQLite says", "permissions"])
def test_where_nobody_may_write(killed, tmp_path, monkeypatch, binding):
    folder, temporary = tmp_path / "run", tmp_path / "temporary"
    folder.mkdir()
    temporary.mkdir()
    copied(killed, folder, "run.sqlite", "run.sqlite-wal")
    expected = everything(killed)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    opened, connect = [], reader_module._connect

    def refused(path, stack):
        opened.append(path)
        if binding and len(opened) == 1:
            raise sqlite3.OperationalError("unable to open database file")
        return connect(path, stack)

    monkeypatch.setattr(reader_module, "_connect", refused)
    before = left_in(folder)
    os.chmod(folder, 0o555)
    try:
        with RunReader(folder) as reader:
            assert reader.query("SELECT count(*) FROM round", 1).rows == [(20,)]
            if binding:
                assert [path.is_relative_to(temporary) for path in opened] == [False, True]
                assert left_in(folder) == before
        assert names(temporary) == []
        opened.clear()
        assert everything(folder) == expected
        assert names(temporary) == []
        # It may be the second of two runs as well.
        opened.clear()
        with RunReader(folder, folder) as reader:
            assert reader.view("run_diff", 99).rows == []
        assert names(temporary) == []
    finally:
        os.chmod(folder, 0o755)


def test_a_copy_of_damage_is_removed(tmp_path, monkeypatch):
    path, temporary = only_begun(tmp_path / "run.sqlite"), tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def never(path, stack):
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(reader_module, "_connect", never)
    with pytest.raises(EsperError):
        RunReader(path)
    assert names(temporary) == []


# Ctrl-C.


def test_a_question_without_end_can_be_interrupted(heuristic):
    sql = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1e12) SELECT count(*) FROM n"
    command = [*COMMAND, "query", str(heuristic), sql]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, env=ENVIRONMENT, start_new_session=True) as run:
        try:
            # It is at it once it holds the file, and the command line is long behind it.
            until(lambda: run.poll() is not None or holds(run.pid, heuristic))
            run.send_signal(signal.SIGINT)
            out, err = run.communicate(timeout=30)
        finally:
            run.kill()
    assert (run.returncode, out) == (130, "")
    assert err == "esper: stopped at once\n"


def holds(pid, path):
    """Tell whether a process has a file open."""
    with contextlib.suppress(OSError):
        return any(os.readlink(link) == str(path) for link in Path(f"/proc/{pid}/fd").iterdir())
    return False
