"""`esper exam` as a user meets it."""

import json
import re
import signal
import sqlite3
import subprocess
import time

import pytest

from helpers.command import COMMAND, ENVIRONMENT, in_process, snapshot
from helpers.stored import column

WORLD = (
    *("--task", "mnist1d-mlp", "--blueprints", "norm", "mlp_small", "--horizon", "12", "--updates-per-decision", "1"),
    *("--prices", "0", "0.2", "--learning-rates", "0.01", "--label-noise", "0", "0.4", "--host-widths", "1", "0.5"),
)
TRAIN = ("train", *WORLD, "--rounds", "1", "--rows", "4", "--group-size", "2", "--record", "off")
NUMBER = r"[+-]\d\.\d{4}"


def started(*arguments):
    return subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )


def begun(store):
    """The first population has been recorded, so that ctrl-C is listened for."""
    try:
        return column(store, "SELECT count(*) FROM round") != [0]
    except sqlite3.OperationalError:
        return False


def headroom(capsys, *more, out="table"):
    return in_process(capsys, "exam", "headroom", *WORLD, "--starts", "2", "--out", out, *more)


def compare(capsys, *policies, table="table", out="comparison"):
    told = ("--headroom", table, "--policies", *policies, "--starts", "2", "--out", out)
    return in_process(capsys, "exam", "compare", *told)


def test_from_the_table_to_the_comparison(home, capsys):
    code, out, err = headroom(capsys)
    assert (code, err) == (0, "")
    # Two widths of two conditions at two prices, then a line for each price.
    assert len(re.findall(rf"^│ +[\d.]+ │ +0\.01 │ +[\d.]+ │ +[\d.]+ │ +{NUMBER} │", out, re.M)) == 8
    assert len(re.findall(rf"^│ +[\d.]+ │( +{NUMBER} │){{3}} +{NUMBER} ± 0\.\d{{4}} │ +\d of 4 │", out, re.M)) == 2
    assert sorted(snapshot(home / "table")) == ["config.json", "headroom.json"]
    for seed in (0, 1):
        assert in_process(capsys, *TRAIN, "--seed", str(seed), "--out", f"policy{seed}")[0] == 0

    code, out, err = compare(capsys, "policy0", "policy1")
    assert (code, err) == (0, "")
    arms = json.loads((home / "comparison" / "comparison.json").read_text())["arms"]
    assert len(arms) == 4 + 3 + 4
    for arm in arms:
        words = arm.split()
        assert re.search(rf"│ {words[0]}", out), arm
    assert out.count(f"{'never':<5}") >= 6
    assert re.search(rf"│ heuristic +│ {NUMBER} \[{NUMBER}, {NUMBER}\] │ {NUMBER} │ +\d+\.\d% │ +[\d,]+ │", out)
    store = home / "comparison" / "run.sqlite"
    assert column(store, "SELECT status FROM run") == ["finished"]
    rounds = column(store, "SELECT arm FROM round")
    assert rounds == [arm for arm in arms for _ in range(2)]
    assert column(store, "SELECT count(*) FROM episode WHERE test_loss_nats IS NULL") == [0]
    # Again from its configuration: the same table to the byte.
    again = in_process(capsys, "exam", "headroom", "--config", "table/config.json", "--out", "again")
    assert again[0] == 0
    assert snapshot(home / "again") == snapshot(home / "table")


@pytest.mark.parametrize(
    ("other", "name", "theirs", "ours"),
    [
        (("--horizon", "13"), "horizon", "13", "12"),
        (("--prices", "0", "0.3"), "prices", "(0.0, 0.3)", "(0.0, 0.2)"),
        (("--label-noise", "0"), "label_noise", "(0.0,)", "(0.0, 0.4)"),
        (("--rollback-penalty", "0.3", "--diverged-guesses", "2"), "diverged_guesses", "2.0", "1.0"),
    ],
)
def test_a_policy_of_another_world_is_refused(home, capsys, other, name, theirs, ours):
    assert headroom(capsys)[0] == 0
    assert in_process(capsys, *TRAIN, *other, "--out", "longer")[0] == 0
    code, out, err = compare(capsys, "longer")
    assert (code, out) == (2, "")
    assert err == (
        f"esper: exam: longer was trained with {name} {theirs}, the schedules were run with {ours}; "
        "run `esper exam headroom` with the settings of the training\n"
    )
    assert not (home / "comparison").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("exam",), "expected one of {headroom, compare}"),
        (("exam", "rounds"), "rounds"),
        (("exam", "headroom", "--starts", "1"), "starts: input should be greater than or equal to 2"),
        (("exam", "headroom", "--task", "nothing"), "unknown task 'nothing'"),
        (("exam", "headroom", "--host-widths", "0"), "host_widths"),
        (("exam", "compare"), "--headroom"),
        (("exam", "compare", "--headroom", "none", "--policies", "p"), "cannot read none/config.json"),
    ],
)
def test_bad_input_is_one_line(home, capsys, arguments, complaint):
    code, out, err = in_process(capsys, *arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert complaint in err
    assert snapshot(home) == {}


def test_a_damaged_table_and_a_run_without_a_policy(home, capsys):
    assert headroom(capsys)[0] == 0
    code, _, err = compare(capsys, "nobody")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "cannot read nobody/config.json" in err
    (home / "table" / "headroom.json").write_text("{}")
    code, _, err = compare(capsys, "nobody")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "headroom.json is damaged" in err


def test_help_of_the_group_and_its_commands(capsys):
    assert "headroom" in in_process(capsys, "exam", "--help")[1]
    for command in ("headroom", "compare"):
        code, out, _ = in_process(capsys, "exam", command, "--help")
        assert code == 0
        assert {"--starts", "--out", "--replace"} <= set(re.findall(r"--[\w-]+", out))


def test_ctrl_c_ends_a_comparison_after_its_decision(home, capsys):
    assert headroom(capsys)[0] == 0
    assert in_process(capsys, *TRAIN, "--out", "policy")[0] == 0
    told = ("exam", "compare", "--headroom", "table", "--policies", "policy", "--starts", "400", "--out", "long")
    run = subprocess.Popen(
        [*COMMAND, *told], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    ended = home / "long" / "comparison.json"
    for _ in range(600):
        if ended.exists() or run.poll() is not None:
            break
        try:
            run.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
    assert run.poll() is None, run.communicate()
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert (run.returncode, err) == (130, "")
    arms = json.loads(ended.read_text())["arms"]
    assert re.search(rf"Stopped\. The {len(arms)} arms that had ended are in long/comparison\.json\.", out)
    assert column(home / "long" / "run.sqlite", "SELECT status FROM run") == ["interrupted"]


def test_ctrl_c_ends_a_table(home):
    told = ("exam", "headroom", *WORLD, "--starts", "500", "--record", "lean", "--out", "table")
    run = subprocess.Popen(
        [*COMMAND, *told], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    while not begun(home / "table" / "run.sqlite"):
        assert run.poll() is None, run.communicate()
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert (run.returncode, err) == (130, "")
    assert "Stopped: a table of schedules is of use only when it is whole." in out
    assert column(home / "table" / "run.sqlite", "SELECT status FROM run") == ["interrupted"]
