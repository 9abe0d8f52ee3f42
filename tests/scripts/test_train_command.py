"""`esper train` as a user meets it."""

import json
import re
import shutil
import signal
import subprocess
import sys

import pytest

from esper.leyline.config import TrainConfig
from esper.scripts.main import main
from esper.scripts.train import main as short_run
from esper.simic.run_folder import RunFolder
from helpers.command import COMMAND, ENVIRONMENT, full_from, in_process, process, snapshot
from helpers.stored import check_whole, column, facts, stored

TINY = (
    *("--task", "mnist1d-mlp", "--rounds", "2", "--rows", "4", "--group-size", "2", "--select-every", "1"),
    *("--horizon", "4", "--updates-per-decision", "1", "--selection-starts", "1", "--judgement-starts", "2"),
)
POLICY = ["policy.json", "policy.safetensors"]
CHECKPOINT = ["learner.json", "learner.safetensors", "manifest.json", *POLICY]
FILES = sorted(
    [
        *("config.json", "run.sqlite", "checkpoints/LATEST"),
        *(f"policy-best/{name}" for name in POLICY),
        *(f"checkpoints/0000000{number}/{name}" for number in (1, 2) for name in CHECKPOINT),
    ]
)


def files_of(folder):
    return sorted(name for name, content in snapshot(folder).items() if content is not None)


def test_help_names_every_setting(capsys):
    code, out, _ = in_process(capsys, "train", "--help")
    assert code == 0
    options = set(re.findall(r"--([\w-]+)", out))

    def leaves(model):
        for name, field in model.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                yield from leaves(field.annotation)
            else:
                yield name.replace("_", "-")

    assert {"out", "replace", "config", *leaves(TrainConfig)} <= options


def test_a_policy_that_diverges_is_told_in_one_line(home, capsys):
    code, _, err = in_process(capsys, "train", *TINY, "--policy-rate", "1e9", "--out", "run")
    assert code == 2
    assert err.startswith("esper: policy: ")
    assert "the policy has diverged" in err
    assert err.endswith("lower --policy-rate or go back to an earlier checkpoint\n")
    assert len(err.splitlines()) == 1
    assert column(home / "run" / "run.sqlite", "SELECT status FROM run") == ["failed"]


def test_a_whole_run_on_a_pipe(home):
    code, out, err = process("train", *TINY, "--out", "run")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    number = r"[+-]?\d+\.\d+"
    for at in (1, 2):
        (line,) = (line for line in lines if line.startswith(f"round {at}/2 "))
        assert re.search(
            rf"return {number}  paired gain {number} nats  grown [\d,]+ parameters  entropy {number}  "
            rf"KL {number} nats  value fit (?:{number}|not measured)  {number} episodes/s  \d+ s left  "
            rf"selection {number} nats$",
            line,
        )
    for kind in ("greedy", "drawing"):
        assert re.search(rf"│ {kind} +│ +{number} ± {number} │ +{number} │ +[\d,]+ │", out)
    assert files_of(home / "run") == FILES
    assert column(home / "run" / "run.sqlite", "SELECT status FROM run") == ["finished"]
    # What it made can grow.
    code, out, err = process(
        "grow", "--task", "mnist1d-mlp", "--controller", "greedy:run/policy-best", "--horizon", "3", "--out", "grown"
    )
    assert (code, err) == (0, "")


def test_it_is_repeated_from_its_configuration(home, capsys):
    assert in_process(capsys, "train", *TINY, "--seed", "3", "--out", "first")[0] == 0
    assert in_process(capsys, "train", "--config", "first/config.json", "--out", "second")[0] == 0
    first, second = snapshot(home / "first"), snapshot(home / "second")
    for name in FILES:
        if name != "run.sqlite":
            assert first[name] == second[name], name


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--rows", "6", "--group-size", "4"], "rows must be a multiple of group_size; got 6 and 4"),
        (["--group-size", "1"], "group_size: input should be greater than or equal to 2"),
        (["--judgement-starts", "0"], "judgement_starts: input should be greater than or equal to 1"),
        (
            ["--selection-starts", "4096", "--horizon", "100"],
            "selection_starts: an evaluation in every context would be",
        ),
        (["--rounds", "0"], "rounds: input should be greater than or equal to 1"),
        (["--task", "nothing"], "unknown task 'nothing'"),
        (["--preset", "paid"], "invalid choice"),
        (["--preset", "shaped", "--gamma", "0.9"], "shaping_gamma is 1 and the learner's gamma 0.9"),
        (["--config", "missing.json"], "cannot read missing.json"),
    ],
)
def test_bad_input_is_one_line(home, capsys, arguments, complaint):
    code, out, err = in_process(capsys, "train", *TINY, *arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert complaint in err
    assert snapshot(home) == {}


def test_ctrl_c_ends_after_the_round(home):
    command = [*COMMAND, "train", *TINY, "--rounds", "200", "--select-every", "1000", "--out", "run"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert run.stdout.readline().startswith("round 1/200 ")
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert (run.returncode, err) == (130, "")
    assert re.search(r"Stopped after round \d+ of 200\. Kept in run: the record and the policy so far\.", out)
    assert column(home / "run" / "run.sqlite", "SELECT status FROM run") == ["interrupted"]
    (made,) = re.findall(r"round (\d+) of 200", out)
    assert "Go on with: esper train --resume run" in out
    assert (home / "run" / "checkpoints" / "LATEST").read_text() == f"{int(made):08}\n"
    # What it has so far can grow.
    code, _, err = process(
        *("grow", "--task", "mnist1d-mlp", "--controller", f"policy:run/checkpoints/{int(made):08}"),
        *("--horizon", "2", "--updates-per-decision", "1", "--out", "grown"),
    )
    assert (code, err) == (0, "")


def test_a_run_that_was_killed_goes_on_to_the_same_end(home, capsys):
    told = (*TINY, "--rounds", "6", "--select-every", "2")
    assert in_process(capsys, "train", *told, "--out", "whole")[0] == 0
    command = [*COMMAND, "train", *told, "--out", "killed"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    while not run.stdout.readline().startswith("round 3/6 "):
        assert run.poll() is None
    run.kill()
    run.communicate()
    code, out, err = in_process(capsys, "train", "--resume", "killed")
    assert (code, err) == (0, "")
    assert re.search(r"^round [45]/6 ", out)
    assert column(home / "killed" / "run.sqlite", "SELECT status FROM run") == ["finished"]
    for name, content in snapshot(home / "whole").items():
        if name != "run.sqlite":
            assert snapshot(home / "killed")[name] == content, name
    # There is nothing left but the judgement, which is the same again.
    assert in_process(capsys, "train", "--resume", "killed")[1].splitlines() == [
        line for line in out.splitlines() if not line.startswith("round ")
    ]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--resume", "run", "--rounds", "7"), "rounds is 2 in run and 7 here; a run goes on only as it was begun"),
        (("--resume=run", "--policy-rate", "0.1"), "policy_rate is 0.001 in run and 0.1 here"),
        (("--resume", "run", "--record", "off"), "record is full in run and off here"),
        (("--resume", "nowhere"), "cannot read nowhere/config.json"),
        (("--resume",), "--resume"),
        (("--resume", "run", "--out", "elsewhere"), "a run goes on in its own folder; leave --out and --replace out"),
        (("--resume", "run", "--replace"), "a run goes on in its own folder; leave --out and --replace out"),
        (("--resume", "empty"), "empty has no checkpoint that can be used"),
        (("--resume", "other"), "its policy is of another size"),
    ],
)
def test_going_on_with_something_else_is_refused(home, capsys, arguments, complaint):
    assert in_process(capsys, "train", *TINY, "--out", "run")[0] == 0
    for name, change in (("empty", {}), ("other", {"policy": {"width": 12}})):
        shutil.copytree("run", name)
        config = json.loads((home / name / "config.json").read_text())
        (home / name / "config.json").write_text(json.dumps(config | change))
    shutil.rmtree("empty/checkpoints")
    before = snapshot(home)
    code, out, err = in_process(capsys, "train", *arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert complaint in err
    assert {n: c for n, c in snapshot(home).items() if "other/run.sqlite" not in n} == {
        n: c for n, c in before.items() if "other/run.sqlite" not in n
    }


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(home, capsys):
    assert in_process(capsys, "train", *TINY, "--out", "run")[0] == 0
    whole = snapshot(home / "run")
    path = home / "run" / "checkpoints" / "00000002" / "learner.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    code, out, err = in_process(capsys, "train", "--resume", "run")
    assert code == 0
    told = r"esper: checkpoint run/checkpoints/00000002 is not used: learner.safetensors has [\d,]+ bytes instead.*\n"
    assert re.fullmatch(told, err)
    assert out.startswith("round 2/2 ")
    assert {n: c for n, c in snapshot(home / "run").items() if n != "run.sqlite"} == {
        n: c for n, c in whole.items() if n != "run.sqlite"
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Give the folder of a finished run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(["train", *TINY, "--out", str(folder)]) == 0
    return folder


# Syncs: the configuration, then for each of three checkpoints its files, the folders and LATEST, with two files of the
# best policy before the second and the third.
@pytest.mark.parametrize("write", [1, 2, 10, 12, 20, 25])
def test_after_a_full_disk_it_goes_on_once_there_is_room(whole, home, capsys, monkeypatch, write):
    with monkeypatch.context() as patch:
        full_from(patch, write)
        code, _, err = in_process(capsys, "train", *TINY, "--out", "run")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert re.search(r"cannot write run/(\S+): No space left on device; free the disk or choose another folder$", err)
    assert not list((home / "run").rglob(".*"))
    if write == 1:
        assert files_of(home / "run") == []
        return
    check_whole(home / "run" / "run.sqlite")
    ((status, reason),) = (
        row.values() for row in stored(home / "run" / "run.sqlite", "SELECT status, status_reason FROM run")
    )
    assert (status, "No space left on device" in reason) == ("failed", True)
    code, _, err = in_process(capsys, "train", "--resume", "run")
    if not (home / "run" / "checkpoints" / "LATEST").exists():
        assert (code, err.count("run has no checkpoint that can be used")) == (2, 1)
        return
    assert (code, err) == (0, "")
    assert files_of(home / "run") == files_of(whole)
    for name in files_of(whole):
        if name != "run.sqlite":
            assert (home / "run" / name).read_bytes() == (whole / name).read_bytes(), name
    one, other = (facts(folder / "run.sqlite") for folder in (home / "run", whole))
    assert {n: rows for n, rows in one.items() if n != "run"} == {n: rows for n, rows in other.items() if n != "run"}


@pytest.mark.slow
def test_the_short_integration_run(home):
    command = [sys.executable, "-m", "esper.scripts.train", "ppo", "--episodes", "2", "--n-envs", "2"]
    run = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert [line.split()[1] for line in run.stdout.splitlines() if line.startswith("round ")] == ["1/2", "2/2"]
    assert snapshot(home) == {}


@pytest.mark.parametrize("option", ["--episodes", "--n-envs"])
@pytest.mark.parametrize("value", ["0", "-1", "-9999999999999999999999", "1" + 30 * "0", "1.5", "two", "nan", ""])
def test_bad_numbers_of_the_short_integration_run_are_one_line(home, capsys, option, value):
    code = short_run(["ppo", f"{option}={value}"])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("esper: ")
    assert option in err
    assert snapshot(home) == {}


def test_a_twin_alone_is_no_training(home, capsys):
    assert short_run(["ppo", "--n-envs", "1"]) == 2
    assert capsys.readouterr().err == "esper: --n-envs: input should be greater than or equal to 2; got 1\n"


def test_the_bounds_of_the_short_integration_run_are_allowed(monkeypatch):
    seen = []
    monkeypatch.setattr("esper.scripts.train.train", lambda config, **_: seen.append(config) or 0)
    for episodes, hosts in ((1, 2), (2**18, 2**13)):
        assert short_run(["ppo", "--episodes", str(episodes), "--n-envs", str(hosts)]) == 0
    assert [(config.rounds, config.rows, config.groups) for config in seen] == [(1, 2, 1), (2**18, 2**13, 1)]


def test_replacing_a_run_takes_its_policies_along(home, capsys):
    assert in_process(capsys, "train", *TINY, "--out", "run")[0] == 0
    (home / "run" / "policy-best" / "mine.txt").write_text("kept")
    never_selected = ("--rounds", "1", "--select-every", "1000")
    # Nobody keeps the folder, so that the next one gets it.
    RunFolder(home / "run", TrainConfig(), replace=True)
    assert files_of(home / "run") == ["config.json", "policy-best/mine.txt"]
    code, _, err = in_process(capsys, "train", *TINY, *never_selected, "--out", "run", "--replace")
    assert (code, err) == (0, "")
