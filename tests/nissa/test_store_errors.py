"""A store that goes wrong: the run hears of it once, in one line, and what was written before stays."""

import sqlite3
import threading

import pytest

from esper.leyline.errors import EsperError
from esper.nissa.store import RunStore
from esper.nissa.writer import Rows
from helpers.run_stores import (
    RUN,
    add_rounds,
    file_size_limit,
    losses,
    names,
    open_store,
    rounds,
    run_of,
    until,
    values,
)


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (RuntimeError("it broke"), "failed", "RuntimeError: it broke"),
        (EsperError("task: none"), "failed", "EsperError: task: none"),
        (KeyboardInterrupt(), "interrupted", "stopped at once"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_error_of_the_run_is_recorded_and_goes_on(path, error, status, reason):
    def run():
        with open_store(path) as store:
            add_rounds(store, 0)
            raise error

    with pytest.raises(type(error)) as caught:
        run()
    assert caught.value is error
    assert (run_of(path)["status"], run_of(path)["status_reason"]) == (status, reason)
    assert values(path, "SELECT count(*) FROM round") == [1]
    assert names(path.parent) == ["run.sqlite"]


@pytest.mark.parametrize("error", [RuntimeError("it broke"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_store_that_fails_too_hides_no_error(path, error):
    def run():
        with open_store(path):
            path.unlink()
            raise error

    with pytest.raises(type(error)) as caught:
        run()
    assert caught.value is error


@pytest.mark.parametrize("error", ["stop", "continue"])
def test_an_existing_file_is_refused_and_left_alone(path, error):
    path.write_bytes(b"somebody's")
    told = []
    with pytest.raises(EsperError, match=f"^cannot write {path}: File exists"):
        open_store(path, error=error, report=told.append)
    assert path.read_bytes() == b"somebody's"
    assert names(path.parent) == ["run.sqlite"]
    assert told == []


def test_a_folder_that_is_missing(tmp_path):
    with pytest.raises(EsperError, match="No such file"):
        open_store(tmp_path / "missing" / "run.sqlite")


def remove(path):
    path.unlink()


def replace(path):
    path.unlink()
    path.write_bytes(b"somebody's")


@pytest.mark.parametrize("change", [remove, replace])
def test_a_file_that_goes_away_is_told_once(path, change):
    store = open_store(path)
    change(path)
    add_rounds(store, 0)
    with pytest.raises(EsperError, match=f"^cannot write {path}: the file was removed or replaced; ") as caught:
        store.flush()
    assert "\n" not in str(caught.value)
    add_rounds(store, 1)
    store.time(0, 1, {"act": (1.0, 1.0)})
    store.flush()
    store.close("finished")
    # Nobody made it anew, and what stands there now is not ours.
    assert path.exists() == (change is replace)
    assert not path.exists() or path.read_bytes() == b"somebody's"


def test_going_on_is_told_once_and_then_nothing_is(path):
    told = []
    with open_store(path, error="continue", report=told.append, capacity=10) as store:
        path.unlink()
        for number in range(50):
            add_rounds(store, number)
            store.flush()
    reason = "the file was removed or replaced; what was recorded before is kept in it"
    assert told == [f"recording ended, the run goes on without: cannot write {path}: {reason}"]


@pytest.mark.parametrize(
    "call",
    [
        # It returns nothing, so that it is called again until the writer has found out.
        lambda store: until(lambda: add_rounds(store, 1)),
        lambda store: store.flush(),
        lambda store: store.close("finished"),
    ],
    ids=["add", "flush", "close"],
)
def test_whatever_is_called_next_tells_of_it(path, quick, call):
    store = open_store(path)
    path.unlink()
    with pytest.raises(EsperError, match="removed"):
        call(store)
    store.close("finished")


def test_a_run_that_waits_for_a_full_buffer_hears_of_it(path):
    writing, go_on = threading.Event(), threading.Event()

    def fails():
        writing.set()
        assert go_on.wait(60)
        raise OSError("the disk went away")

    store = open_store(path, capacity=2)
    store.add(2, fails)
    store.add(2, lambda: [rounds(1, 2)])
    assert writing.wait(60)
    helper = threading.Thread(target=lambda: (until(lambda: store._stalled), go_on.set()))
    helper.start()
    with pytest.raises(EsperError, match="the disk went away"):
        add_rounds(store, 3)
    helper.join()
    store.close("finished")


def fill(path, store, most=200):
    """Flush large rounds until something stops it; give how many were flushed."""
    for number in range(most):
        text = "x" * 40_000
        store.add(1, lambda number=number, text=text: [Rows("round", rounds(number).columns | {"arm": text})])
        store.flush()
    return most


def test_a_full_disk_stops_the_run_and_keeps_what_was_flushed(path):
    store = open_store(path)
    with file_size_limit(500_000):
        with pytest.raises(EsperError) as caught:
            fill(path, store)
        message = str(caught.value)
        assert message.startswith(f"cannot write {path}: ")
        assert message.endswith("; what was recorded before is kept in it")
        assert "\n" not in message
        # It was told; the run may end in peace.
        add_rounds(store, 999)
        store.close("failed", message)
    kept = values(path, "SELECT round FROM round ORDER BY round")
    assert kept == list(range(len(kept)))
    assert len(kept) >= 5
    assert values(path, "PRAGMA integrity_check") == ["ok"]
    assert values(path, "SELECT flushes FROM run") == [len(kept) + 1]
    assert (run_of(path)["status"], run_of(path)["status_reason"][:15]) == ("failed", "recording ended")


def test_a_full_disk_that_does_not_matter(path):
    told = []
    with open_store(path, error="continue", report=told.append) as store, file_size_limit(500_000):
        assert fill(path, store, 40) == 40
    (line,) = told
    assert line.startswith(f"recording ended, the run goes on without: cannot write {path}: ")
    kept = values(path, "SELECT round FROM round ORDER BY round")
    assert kept == list(range(len(kept)))
    assert 5 <= len(kept) < 40


@pytest.mark.parametrize("error", ["stop", "continue"])
def test_a_disk_that_is_full_from_the_start(path, error):
    told = []
    with file_size_limit(10_000), pytest.raises(EsperError, match=f"^cannot write {path}: "):
        open_store(path, error=error, report=told.append)
    # Nothing would be lost by stopping now, and nothing is left behind.
    assert told == []
    assert names(path.parent) == []


class Ours(Exception):
    """An error of whoever makes the rows."""


def test_an_error_in_making_rows_is_told_as_it_is(path):
    mine = Ours("no rows")

    def writes():
        raise mine

    store = open_store(path)
    add_rounds(store, 0)
    store.flush()
    store.add(1, writes)
    with pytest.raises(Ours) as caught:
        store.flush()
    assert caught.value is mine
    store.close("finished")
    assert values(path, "SELECT round FROM round") == [0]
    assert (run_of(path)["status"], run_of(path)["status_reason"]) == ("failed", "recording ended: no rows")


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        (lambda: [rounds(0)], sqlite3.IntegrityError),
        (lambda: [losses(object(), coalition=[1])], sqlite3.InterfaceError),
        (lambda: [losses([0.5, 0.25], coalition=[1, 2, 3])], ValueError),
    ],
    ids=["key", "type", "lengths"],
)
def test_a_mistake_of_ours_is_no_trouble_of_the_disk(path, wrong, kind):
    store = open_store(path)
    add_rounds(store, 0)
    store.flush()
    store.add(1, lambda: [losses(0.5, coalition=[7])])
    store.add(1, wrong)
    with pytest.raises((kind, sqlite3.ProgrammingError)):
        store.flush()
    store.close("finished")
    # The flush that failed left nothing of itself.
    assert values(path, "SELECT count(*) FROM contribution") == [0]
    assert values(path, "SELECT round FROM round") == [0]
    assert run_of(path)["status"] == "failed"


def test_a_run_that_says_too_little(path):
    told = {name: value for name, value in RUN.items() if name != "task"}
    with pytest.raises(sqlite3.IntegrityError, match=r"run\.task"):
        RunStore(path, told)
    # A store without a run is of use to nobody.
    assert names(path.parent) == []
