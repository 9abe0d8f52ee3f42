"""Incidents that real runs have: growth that costs too much, a slow controller, a full disk, a silent process."""

import os
import signal
import subprocess
import sys
import time

import pytest

from esper.leyline.actions import Blueprint, Op, Operator
from esper.nissa.incidents import default_rules
from esper.nissa.store import RunStore
from esper.simic.grow import GROWN, TWIN, Arm
from esper.simic.recorder import run_columns
from helpers.episodes import OPEN_GATES, Script, run_config, task_of
from helpers.growing import act, germinate
from helpers.run_stores import RUN, open_store, rows, run_of, until

TASK = "digits-mlp"


def incidents(path, kind):
    return rows(path, f"SELECT * FROM incident WHERE kind = '{kind}' ORDER BY incident")


def with_limits(kind, **limits):
    rules = default_rules()
    return rules | {kind: rules[kind].model_copy(update=limits)}


def record_arm(store, config, name, controller=None):
    """Run and record one arm of a grow run."""
    arm = Arm(config, task_of(TASK, examples=40), name)
    if controller is not None:
        arm.episode.controller = controller
    for _ in arm.run(lambda: False, store):
        pass
    arm.result()
    return arm


LIFE = {
    0: germinate(0, Blueprint.MLP_SMALL, Operator.ADD),
    1: act(Op.ADVANCE, 0),
    4: act(Op.ADVANCE, 0),
    8: act(Op.ADVANCE, 0),
    10: act(Op.FOSSILIZE, 0),
}


@pytest.mark.parametrize(("price", "script", "found"), [(1000.0, LIFE, 1), (0.0, LIFE, None), (1000.0, {}, 0)])
def test_growth_that_does_not_pay(path, price, script, found):
    # Where it costs nothing, whether it pays is for the data to say.
    config = run_config(TASK, "periodic", horizon=11, updates=2, growth=OPEN_GATES, price=price)
    with RunStore(path, run_columns(config, "grow", 20)) as store:
        arm = record_arm(store, config, GROWN, Script(script))
        assert incidents(path, "growth_not_paying") == []
        twin = record_arm(store, config, TWIN)
    assert (arm.parameters > twin.parameters) == bool(script)
    told = incidents(path, "growth_not_paying")
    ends = rows(path, "SELECT val_loss_nats, rent_nats FROM episode ORDER BY round")
    gain = ends[1]["val_loss_nats"] - ends[0]["val_loss_nats"] - ends[0]["rent_nats"]
    assert len(told) == (found if found is not None else int(gain < 0))
    for incident in told:
        assert (incident["subject"], incident["opened_round"], incident["closed_round"]) == (GROWN, 0, None)
        assert incident["value"] == pytest.approx(gain)
        assert incident["message"].startswith("growth does not pay: ")


class Sluggish:
    """A controller that waits, and takes its time over some decisions."""

    def __init__(self, long):
        self.script, self.long = Script({}), long
        self.flag = self.scores = None

    def observe(self, view):
        self.script.observe(view)

    def act(self):
        time.sleep(0.6 if self.script.decision in self.long else 0.02)
        return self.script.act()


def test_a_slow_decision(path, quick):
    config = run_config(TASK, "periodic", horizon=40, updates=1)
    with RunStore(path, run_columns(config, "grow", 40)) as store:
        record_arm(store, config, GROWN, Sluggish({20}))
    told = incidents(path, "slow")
    worst = max(told, key=lambda incident: incident["value"])
    assert (worst["subject"], worst["opened_round"], worst["closed_round"]) == (GROWN, 0, 0)
    assert worst["closed_unix_s"] > worst["opened_unix_s"]
    assert worst["message"] == (
        f"a decision takes {worst['value']:.1f} times as long as in the two minutes before, above 3"
    )
    # It is the one that was: most of the time of the run went into it.
    (slowest,) = rows(path, "SELECT * FROM timing WHERE phase = 'act' ORDER BY wall_s DESC LIMIT 1")
    assert slowest["wall_s"] >= 0.6
    assert worst["opened_unix_s"] <= slowest["unix_s"] <= worst["closed_unix_s"]
    assert sum(row["decisions"] for row in rows(path, "SELECT decisions FROM timing WHERE phase = 'act'")) == 40


def test_a_disk_that_is_nearly_full(path):
    with RunStore(path, RUN, rules=with_limits("disk_nearly_full", open_below=1e9, close_above=2e9)) as store:
        (incident,) = incidents(path, "disk_nearly_full")
        store.flush()
    assert incidents(path, "disk_nearly_full") == [incident]
    (sample,) = rows(path, "SELECT disk_free_bytes FROM machine")
    assert incident["subject"] == "disk"
    assert incident["opened_round"] is incident["closed_unix_s"] is None
    assert incident["value"] == pytest.approx(sample["disk_free_bytes"] / 1e9)
    assert incident["message"] == f"only {incident['value']:.2f} GB are left on the disk, below 1e+09"


def test_a_disk_with_room(path):
    open_store(path, rules=with_limits("disk_nearly_full", open_below=0.0, close_above=0.0)).close("finished")
    assert rows(path, "SELECT * FROM incident") == []


SILENT = """
import sys
from pathlib import Path
from esper.nissa.incidents import default_rules
from helpers.run_stores import open_store
rules = default_rules()
rule = rules["heartbeat_late"].model_copy(update={"open_above": 2.0, "close_below": 2.0})
store = open_store(Path(sys.argv[1]), rules=rules | {"heartbeat_late": rule})
print("ready", flush=True)
sys.stdin.readline()
store.close("finished")
"""


def test_a_process_that_was_silent(path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SILENT, str(path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            before = run_of(path)
            assert before["heartbeat_late_s"] == 2.0
            process.send_signal(signal.SIGSTOP)
            time.sleep(3)
            silent = run_of(path)
            # It says that it runs; that its heart stands still says more.
            assert silent["status"] == "running"
            assert time.time() - silent["heartbeat_unix_s"] > silent["heartbeat_late_s"]
            process.send_signal(signal.SIGCONT)
            until(lambda: run_of(path)["flushes"] > silent["flushes"])
            process.communicate("end\n", timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    told = rows(path, "SELECT * FROM incident")
    assert [(one["kind"], one["subject"]) for one in told] == [("heartbeat_late", "process")]
    assert told[0]["value"] > 2
    assert told[0]["closed_unix_s"] is not None
    assert told[0]["message"].startswith("nothing was heard of the run for ")
    assert run_of(path)["status"] == "finished"
