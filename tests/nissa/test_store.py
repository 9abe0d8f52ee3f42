"""The store of a run: what is handed over arrives, once, in order and whole, or the run hears of it, once."""

import contextlib
import itertools
import sqlite3
import threading
import time

import numpy as np

from esper.nissa import store as store_module
from esper.nissa.incidents import default_rules
from esper.nissa.writer import Change, Rows
from helpers.run_stores import (
    DECISION,
    RUN,
    add_rounds,
    insert,
    losses,
    names,
    open_store,
    rounds,
    rows,
    run_of,
    until,
    values,
)

NAN = float("nan")


# What arrives.


def test_rows_arrive_with_the_next_flush(path):
    with open_store(path) as store:
        add_rounds(store, 0, 1)
        store.flush()
        assert values(path, "SELECT round FROM round ORDER BY round") == [0, 1]
        add_rounds(store, 2)
    assert values(path, "SELECT round FROM round ORDER BY round") == [0, 1, 2]


def test_what_is_not_a_number_becomes_null_and_one_value_repeats(path):
    with open_store(path) as store:
        columns = {"coalition": np.arange(3), "decision": [5, 6, 7], "examples": np.array([1, 2, 3])}
        store.add(3, lambda: [losses(np.array([0.5, NAN, np.inf]), **columns)])
        store.add(2, lambda: [losses(NAN, coalition=[8, 9], row=np.array([1, 2]))])
    kept = rows(path, "SELECT * FROM contribution ORDER BY coalition")
    assert [row["loss_nats"] for row in kept] == [0.5, None, np.inf, None, None]
    assert [row["decision"] for row in kept] == [5, 6, 7, 0, 0]
    assert [row["row"] for row in kept] == [0, 0, 0, 1, 2]
    assert [row["examples"] for row in kept] == [1, 2, 3, 9, 9]
    assert {type(row["row"]) for row in kept} == {int}


def test_no_rows_are_nothing(path):
    with open_store(path) as store:
        store.add(0, lambda: [losses(0.5, coalition=[]), losses(np.zeros(0), coalition=np.arange(0))])
        store.add(0, lambda: [])
    assert values(path, "SELECT count(*) FROM contribution") == [0]
    assert run_of(path)["status"] == "finished"


def test_rows_may_replace_and_columns_may_change(path):
    with open_store(path) as store:
        store.add(2, lambda: [rounds(0, 1)])
        store.add(1, lambda: [Change("round", {"decisions": 7, "val_accuracy": 0.5}, {"round": 1})])
        store.add(2, lambda: [losses(0.5, coalition=[1, 2])])
        store.add(1, lambda: [Rows("contribution", {**losses(0.25, coalition=[2]).columns}, replace=True)])
    assert values(path, "SELECT decisions FROM round ORDER BY round") == [0, 7]
    assert values(path, "SELECT val_accuracy FROM round ORDER BY round") == [None, 0.5]
    assert values(path, "SELECT loss_nats FROM contribution ORDER BY coalition") == [0.5, 0.25]


def test_rows_are_made_later_and_elsewhere(path):
    asked, made = threading.current_thread(), []

    def writes():
        made.append(threading.current_thread())
        return [rounds(0)]

    with open_store(path) as store:
        store.add(1, writes)
        store.flush()
        assert len(made) == 1
        assert made[0] is not asked


# How it ends.


def test_the_end_leaves_one_file(path):
    store = open_store(path)
    begun = run_of(path)
    assert (begun["status"], begun["status_reason"], begun["ended_unix_s"]) == ("running", None, None)
    assert begun["heartbeat_late_s"] == default_rules()["heartbeat_late"].open_above
    assert {name: begun[name] for name in RUN} == RUN
    store.close("finished")
    assert names(path.parent) == ["run.sqlite"]
    ended = run_of(path)
    assert (ended["status"], ended["status_reason"]) == ("finished", None)
    assert begun["started_unix_s"] <= ended["ended_unix_s"] == ended["heartbeat_unix_s"]
    assert values(path, "PRAGMA integrity_check") == ["ok"]
    assert values(path, "PRAGMA journal_mode") == ["delete"]


def test_closing_again_does_nothing(path):
    store = open_store(path)
    store.close("interrupted", "asked to")
    before = path.read_bytes()
    store.close("finished")
    add_rounds(store, 0)
    store.flush()
    assert path.read_bytes() == before
    assert (run_of(path)["status"], run_of(path)["status_reason"]) == ("interrupted", "asked to")


# A full buffer.


def test_a_full_buffer_makes_the_run_wait_and_loses_nothing(path):
    writing, go_on = threading.Event(), threading.Event()

    def slowly():
        writing.set()
        assert go_on.wait(60)
        return [rounds(0)]

    with open_store(path, capacity=10) as store:
        store.add(6, slowly)
        # Six and five are too many: the writer takes the six, and then has no time.
        store.add(5, lambda: [rounds(1)])
        assert writing.wait(60)
        store.add(5, lambda: [rounds(2)])
        helper = threading.Thread(target=lambda: (until(lambda: store._stalled), go_on.set()))
        helper.start()
        store.add(1, lambda: [rounds(3)])
        assert go_on.is_set()
        helper.join()
    run = run_of(path)
    assert run["stalls"] == 2
    assert run["stall_s"] > 0
    assert values(path, "SELECT round FROM round ORDER BY rowid") == [0, 1, 2, 3]


def test_more_than_fits_at_once_is_taken_all_the_same(path):
    with open_store(path, capacity=10) as store:
        add_rounds(store, *range(25))
        add_rounds(store, *range(25, 60))
    assert values(path, "SELECT round FROM round ORDER BY round") == list(range(60))


def test_no_stall_without_a_full_buffer(path):
    with open_store(path, capacity=10) as store:
        for number in range(10):
            add_rounds(store, number)
    assert (run_of(path)["stalls"], run_of(path)["stall_s"]) == (0, 0.0)


def test_many_threads_lose_nothing_and_keep_their_order(path, quick):
    ticket, wrong = itertools.count(), []

    def produce(store, thread):
        try:
            for number in range(200):
                at = {"round": thread, "decision": [number], "row": 0}
                # The writer draws the tickets: they tell its order.
                store.add(1, lambda at=at: [Rows("decision", at | DECISION | {"legal_ops": next(ticket)})])
        except BaseException as error:
            wrong.append(error)

    with open_store(path, capacity=7) as store:
        threads = [threading.Thread(target=produce, args=(store, thread)) for thread in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    told = rows(path, "SELECT round, decision, legal_ops FROM decision ORDER BY legal_ops")
    assert [row["legal_ops"] for row in told] == list(range(800))
    for thread in range(4):
        assert [row["decision"] for row in told if row["round"] == thread] == list(range(200))
    assert run_of(path)["stalls"] > 0


# Reading meanwhile.


def test_a_reader_sees_whole_transactions_while_it_is_written(path, quick):
    heads = ("a", "b", "c", "d", "e")

    def writes(number):
        columns = {"round": number, "head": list(heads), "used_decisions": 0, "choice_decisions": 0}
        return [rounds(number), Rows("head", columns)]

    seen = []
    with open_store(path) as store, contextlib.closing(sqlite3.connect(path)) as db:
        for number in range(300):
            store.add(6, lambda number=number: writes(number))
            if number % 10 == 0:
                time.sleep(0.005)
                sql = "SELECT (SELECT count(*) FROM round), (SELECT count(*) FROM head), flushes FROM run"
                seen.append(db.execute(sql).fetchone())
        store.flush()
        seen.append(db.execute(sql).fetchone())
    counts = [count for count, _, _ in seen]
    assert [of_heads for _, of_heads, _ in seen] == [len(heads) * count for count in counts]
    assert counts == sorted(counts)
    assert counts[-1] == 300
    # It was looked at in between, not only at the end.
    assert len(set(counts)) > 5
    # Where there was more to see, there had been a flush.
    for (_, _, before), (_, _, after) in itertools.pairwise({line[0]: line for line in seen}.values()):
        assert after > before


def test_a_reader_that_stays_does_not_stop_the_end(path):
    store = open_store(path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        assert reader.execute("SELECT status FROM run").fetchone() == ("running",)
        store.close("finished")
        # What was read once stays as it was until the reader lets go.
        assert reader.execute("SELECT status FROM run").fetchone() == ("running",)
        reader.execute("COMMIT")
        assert reader.execute("SELECT status FROM run").fetchone() == ("finished",)
    assert run_of(path)["status"] == "finished"


def test_the_heart_beats_while_nothing_happens(path):
    with open_store(path):
        first = run_of(path)
        until(lambda: run_of(path)["flushes"] >= first["flushes"] + 2)
        later = run_of(path)
        assert later["heartbeat_unix_s"] > first["heartbeat_unix_s"]


def test_somebody_elses_lock_is_waited_for(path):
    with open_store(path) as store, contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        insert(db, "timing", unix_s=1.0, round=9, phase="other", decisions=0, wall_s=0.0, cpu_s=0.0)
        add_rounds(store, 0)
        time.sleep(0.3)
        assert db.execute("SELECT count(*) FROM round").fetchone() == (0,)
        db.execute("COMMIT")
        store.flush()
        assert db.execute("SELECT count(*) FROM round").fetchone() == (1,)


# What belongs to every flush.


def test_times_are_summed_up_between_flushes(path):
    with open_store(path) as store:
        store.time(0, 1, {"act": (0.5, 0.25), "train": (2.0, 4.0)})
        store.time(0, 1, {"act": (0.25, 0.25)})
        store.flush()
        store.time(0, 2, {"act": (1.0, 0.5)})
        store.time(1, 1, {"act": (8.0, 8.0)})
        store.flush()
    told = rows(path, "SELECT * FROM timing WHERE phase != 'write' ORDER BY unix_s, round, phase")
    lines = [tuple(row[name] for name in ("round", "phase", "decisions", "wall_s", "cpu_s")) for row in told]
    assert lines[:2] == [(0, "act", 2, 0.75, 0.5), (0, "train", 1, 2.0, 4.0)]
    assert lines[2:] == [(0, "act", 2, 1.0, 0.5), (1, "act", 1, 8.0, 8.0)]
    assert told[0]["unix_s"] == told[1]["unix_s"] < told[2]["unix_s"] == told[3]["unix_s"]


def test_every_flush_tells_what_the_one_before_took(path):
    with open_store(path) as store:
        store.flush()
        store.flush()
    told = rows(path, "SELECT * FROM timing WHERE phase = 'write' ORDER BY unix_s")
    assert len(told) == run_of(path)["flushes"]
    # Nothing was before the first.
    assert (told[0]["wall_s"], told[0]["cpu_s"]) == (0.0, 0.0)
    assert all(row["wall_s"] > 0 and row["cpu_s"] >= 0 and row["decisions"] == 0 for row in told[1:])


def test_the_machine_is_sampled_at_the_start_and_not_at_every_flush(path):
    with open_store(path) as store:
        (sample,) = rows(path, "SELECT * FROM machine")
        assert sample["store_bytes"] > 0
        assert sample["unix_s"] >= run_of(path)["started_unix_s"]
        store.flush()
        store.flush()
        assert len(rows(path, "SELECT * FROM machine")) == 1
    assert store_module.FLUSH_EVERY == 1.0
