"""`esper exam` as a user meets it."""

import json
import re
import signal
import subprocess
import time

import pytest

from helpers.command import COMMAND, ENVIRONMENT, in_process, snapshot
from helpers.stored import column

WORLD = (
    *("--task", "mnist1d-mlp", "--blueprints", "norm", "--horizon", "12", "--updates-per-decision", "1"),
    *("--prices", "0", "0.2", "--learning-rates", "0.01", "--label-noise", "0", "0.4", "--host-widths", "1", "0.5"),
)
TRAIN = ("train", *WORLD, "--rounds", "1", "--rows", "4", "--group-size", "2", "--record", "off")
SMALL = ("--starts", "2", "--episodes", "500")
"""Nothing, twelve single seeds and three drawn plans, in four contexts."""
NUMBER = r"[+-]\d\.\d{4}"


def started(*arguments):
    return subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )


def headroom(capsys, *more, out="table"):
    return in_process(capsys, "exam", "headroom", *WORLD, *SMALL, "--out", out, *more)


def compare(capsys, *policies, table="table", out="comparison"):
    told = ("--headroom", table, "--policies", *policies, "--starts", "2", "--out", out)
    return in_process(capsys, "exam", "compare", *told)


def test_from_the_table_to_the_comparison(home, capsys):
    code, out, err = headroom(capsys)
    assert (code, err) == (0, "")
    # Two widths of two conditions at two prices; everything and two prices, twice.
    assert (
        len(
            re.findall(
                rf"^│ mnist1d-mlp(?: x0\.5)? +│ +0\.01 │ +[\d.]+ │ +[\d.]+ │ +{NUMBER} │ (norm|nothing)", out, re.M
            )
        )
        == 8
    )
    assert len(re.findall(rf"^│ +(every|[\d.]+) │ +{NUMBER} │ (norm|nothing)", out, re.M)) == 3
    error = rf"{NUMBER} ± 0\.\d{{4}}"
    assert (
        len(re.findall(rf"^│ +(every|[\d.]+) │( +{error} │){{3}} +{NUMBER} \[{NUMBER}, {NUMBER}\] │", out, re.M)) == 3
    )
    assert re.search(
        r"^not accepted: .* \(asked: at least 0\.03 nats, lower end above 0\.02; 1\d plans, 4\d\d episodes\)$",
        out,
        re.M,
    )
    assert re.findall(r"rung \d of 3: (\d+) plans, (\d+) starts", out)[:1] == [("16", "2")]
    assert sorted(snapshot(home / "table"))[-3:] == ["config.json", "headroom.json", "plans.json"]
    for seed in (0, 1):
        assert in_process(capsys, *TRAIN, "--seed", str(seed), "--out", f"policy{seed}")[0] == 0

    code, out, err = compare(capsys, "policy0", "policy1")
    assert (code, err) == (0, "")
    arms = json.loads((home / "comparison" / "comparison.json").read_text())["arms"]
    assert len(arms) == 4 + 2 + 3 + 4 + 4
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
    # Without a policy the others are compared, and reach the same.
    code, out, err = in_process(capsys, "exam", "compare", "--headroom", "table", "--starts", "2", "--out", "alone")
    assert (code, err) == (0, "")
    assert "Policy less" not in out
    alone = json.loads((home / "alone" / "comparison.json").read_text())
    assert alone == {"arms": {arm: told for arm, told in arms.items() if "policy" not in arm}, "differences": {}}
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
        f"esper: exam: longer was trained with {name} {theirs}, the plans were played with {ours}; "
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
        (("exam", "headroom", "--episodes", "50"), "episodes: 50 are enough to search among 0 plans"),
        (("exam", "headroom", "--plans-of", "nowhere"), "cannot read nowhere/headroom.json"),
        (("exam", "headroom", "--resume", "nowhere"), "cannot read nowhere/config.json"),
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


@pytest.mark.parametrize(("stop", "ends"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_search_that_was_stopped_goes_on_to_the_same_table(home, capsys, stop, ends):
    """With ctrl-C, and killed."""
    told = ("exam", "headroom", *WORLD, *SMALL, "--record", "lean", "--out")
    run = started(*told, "table")
    while not (home / "table" / "cells" / "00000.json").exists():
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)
    run.send_signal(stop)
    out, err = run.communicate(timeout=60)
    assert (run.returncode, err) == (ends, "")
    assert not (home / "table" / "headroom.json").exists()
    if stop == signal.SIGINT:
        assert "Stopped. Go on with: esper exam headroom --resume table" in out
        assert column(home / "table" / "run.sqlite", "SELECT status FROM run") == ["interrupted"]
    code, _, err = in_process(capsys, "exam", "headroom", "--resume", "table")
    assert (code, err) == (0, "")
    assert in_process(capsys, *told, "whole")[0] == 0
    table, whole = (snapshot(home / folder) for folder in ("table", "whole"))
    assert {name: table[name] for name in table if "sqlite" not in name} == {
        name: whole[name] for name in whole if "sqlite" not in name
    }
    store = home / "table" / "run.sqlite"
    assert column(store, "SELECT status FROM run") == ["finished"]
    cells = [name for name in whole if name.endswith(".json") and "cells" in name]
    assert column(store, "SELECT round FROM round") == list(range(len(cells)))


def test_a_search_goes_on_only_as_it_was_begun(home, capsys):
    assert headroom(capsys)[0] == 0
    for more, complaint in (
        (("--starts", "3"), "starts is 2 in table and 3 here"),
        (("--out", "other"), "leave --out and --replace out"),
    ):
        code, out, err = in_process(capsys, "exam", "headroom", "--resume", "table", *more)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert complaint in err
    for cell in (home / "table" / "cells").iterdir():
        cell.unlink()
    code, _, err = in_process(capsys, "exam", "headroom", "--resume", "table")
    assert (code, err) == (
        2,
        "esper: resume: table has no cell that can be used; begin again with --out and --replace\n",
    )


def test_what_policies_and_earlier_searches_found_is_tried_as_well(home, capsys):
    assert headroom(capsys)[0] == 0
    assert in_process(capsys, *TRAIN, "--out", "policy")[0] == 0
    more = ("--plans-of", "table", "policy", "--episodes", "700")
    assert headroom(capsys, *more, out="again")[0] == 0
    first, again = (json.loads((home / folder / "headroom.json").read_text()) for folder in ("table", "again"))
    chosen = {number for way in first["chosen"] for w in way for c in w for number in c}
    assert all(first["plans"][number] in again["plans"][: len(chosen) + 4] for number in chosen)
    code, out, err = headroom(capsys, *more, "--horizon", "13", "--blueprints", "lora_small", out="other")
    assert (code, out) == (2, "")
    assert re.search(r"plans_of: a plan of table cannot be played here: norm does not fit r0c\d\n", err)


def test_a_context_can_be_a_task(home, capsys):
    """Of two tasks each has hosts, plans and scores of its own, for policies as for plans."""
    tasks = ("--host-widths", "1", "--other-tasks", "digits-mlp")
    code, out, err = headroom(capsys, *tasks)
    assert (code, err) == (0, "")
    assert len(re.findall(rf"^│ (mnist1d-mlp|digits-mlp) +│ +0\.01 │ +[\d.]+ │ +[\d.]+ │ +{NUMBER} │", out, re.M)) == 8
    assert in_process(capsys, *TRAIN, *tasks, "--out", "policy")[0] == 0
    assert compare(capsys, "policy")[0] == 0
    parameters = column(home / "comparison" / "run.sqlite", "SELECT DISTINCT host_parameters FROM episode")
    assert len(parameters) == 2
    code, out, err = headroom(capsys, "--other-tasks", "digits", out="other")
    assert (code, out) == (2, "")
    assert err == (
        "esper: other_tasks: the sites of digits are image, image, image, those of mnist1d-mlp vector, vector, vector; "
        "name tasks with the same\n"
    )
