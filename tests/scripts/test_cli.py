"""Commands that work: help, lists, and whole runs on a pipe and on a terminal."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from esper.leyline.config import RunConfig
from esper.simic.grow import Arm
from esper.tolaria.tasks import TASKS
from helpers.command import (
    ARMS,
    COMMAND,
    ENVIRONMENT,
    LIVELY,
    RUN_FILES,
    SHORT,
    in_process,
    listed,
    process,
    snapshot,
)
from helpers.stored import check_whole, column, facts, stored


@pytest.mark.parametrize("arguments", [["--help"], ["grow", "--help"], ["tasks", "-h"]])
def test_help(home, capsys, arguments):
    code, out, err = in_process(capsys, *arguments)
    assert (code, err) == (0, "")
    assert out.startswith("usage: esper")
    assert snapshot(home) == {}


def test_help_of_grow_names_every_setting(capsys):
    _, out, _ = in_process(capsys, "grow", "--help")
    options = set(re.findall(r"--([\w-]+)", out))

    def leaves(model):
        for name, field in model.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                yield from leaves(field.annotation)
            else:
                yield name.replace("_", "-")

    assert {"out", "replace", "config", *leaves(RunConfig)} <= options


def test_tasks(capsys):
    code, out, err = in_process(capsys, "tasks")
    assert (code, err) == (0, "")
    for name, config in TASKS.items():
        # Both hosts of every task.
        assert len(re.findall(rf"│ {re.escape(name)} +│ (?:impaired|ample) +│ [\d,]+ +│ \d+ +│ [\d,]+ ", out)) == 2
        assert config.summary in out


def test_a_whole_run_on_a_pipe(home):
    code, out, err = process("grow", *LIVELY, "--out", "run")
    assert (code, err) == (0, "")
    assert listed(home / "run") == RUN_FILES
    assert "\x1b" not in out
    lines = out.splitlines()
    # Progress in plain lines: every tenth decision and the last of each arm.
    for arm in ARMS:
        progress = [line for line in lines if line.startswith(f"{arm}: decision ")]
        assert [re.search(r"decision (\d+)/12", line)[1] for line in progress] == ["10", "12"]
        number = r"\d+\.\d+"
        for line in progress:
            assert re.search(
                rf"loss {number} train, {number} validation \(nats\)  accuracy {number}%  [\d,]+ parameters  "
                rf"{number} decisions/s  \d+ s left$",
                line,
            )
    # One line for each event, in order, with its reason where a gate was asked.
    told = [line for line in lines if re.match(r" +\d+  r0c\d  ", line)]
    store = home / "run" / "run.sqlite"
    events = stored(store, "SELECT * FROM transition ORDER BY round, decision, row, step")
    assert len(told) == len(events) > 0
    assert {event["round"] for event in events} == {0}
    for line, event in zip(told, events, strict=True):
        assert line.split()[:2] == [str(event["decision"] + 1), f"r0c{event['slot']}"]
        explained = event["gate"] or event["refused_by"] or event["actor"] == "end of episode"
        assert ("[" in line) == bool(explained)
        assert ("refused in" in line) == (not event["allowed"])
        assert event["after"] in line
    assert any("refused" in line for line in told)
    # The three networks.
    table = re.findall(r"│ (\w[\w ]+?) +│ +(\d+\.\d)% │ +([\d.]+) │ +([\d,]+) │ +[\d.]+ │", out)
    arms = stored(store, "SELECT * FROM round JOIN episode USING (round) ORDER BY round")
    assert [row[0] for row in table] == [arm["arm"] for arm in arms] == list(ARMS)
    for row, arm in zip(table, arms, strict=True):
        parameters = arm["host_parameters"] + arm["added_parameters"]
        assert row[1:] == (f"{arm['test_accuracy'] * 100:.1f}", f"{arm['test_loss_nats']:.3f}", f"{parameters:,}")
        assert arm["status"] == "finished"
    assert column(store, "SELECT status FROM run") == ["finished"]
    check_whole(store)
    assert lines[-2:] == [
        "Saved in run. Load it without Esper: python run/model.py",
        "What happened, and why: esper query run --view events",
    ]
    # And so it does.
    model = subprocess.run([sys.executable, "run/model.py"], capture_output=True, text=True, check=True, timeout=120)
    assert model.stdout.endswith(f"{arms[0]['host_parameters'] + arms[0]['added_parameters']:,} parameters\n")


def test_one_line_of_progress_is_one_line(capsys, monkeypatch):
    # A pipe has no width, so nothing may be folded to one: `grep decisions/s` must find whole lines.
    monkeypatch.delenv("COLUMNS")
    code, out, _ = in_process(capsys, "grow", *LIVELY, "--out", "run")
    assert code == 0
    progress = [line for line in out.splitlines() if "decisions/s" in line]
    assert len(progress) == 6
    assert all(re.match(r"(grown|host alone|everything from the start): decision \d+/12 ", line) for line in progress)
    # Nor a reason.
    assert all(line.count("[") == line.count("]") for line in out.splitlines())


def test_the_default_folder_names_the_run(home, capsys):
    arguments = ("--task", "digits-mlp", "--host", "ample", "--controller", "never", "--seed", "7", "--horizon", "1")
    code, out, _ = in_process(capsys, "grow", *arguments, "--updates-per-decision", "1")
    assert code == 0
    assert listed(home / "runs" / "digits-mlp-ample-never-seed7") == RUN_FILES
    assert "Saved in runs/digits-mlp-ample-never-seed7." in out


@pytest.mark.parametrize(
    "arguments",
    [
        LIVELY,
        ("--task", "digits", "--controller", "periodic", "--horizon", "16", "--updates-per-decision", "2"),
        ("--task", "mnist1d", "--seed", "3", *SHORT, "--batch-size", "7"),
        ("--task", "mnist1d-mlp", "--learning-rate", "0.02", "--embargo", "2", "--blueprints", "norm", *LIVELY[2:]),
    ],
    ids=["digits-mlp", "digits", "mnist1d", "mnist1d-mlp"],
)
def test_the_config_of_a_run_repeats_it_bit_for_bit(home, capsys, arguments):
    assert in_process(capsys, "grow", *arguments, "--out", "first")[0] == 0
    assert in_process(capsys, "grow", "--config", "first/config.json", "--out", "second")[0] == 0
    first, second = snapshot(home / "first"), snapshot(home / "second")
    assert listed(home / "first") == listed(home / "second") == RUN_FILES
    # A checkpoint says when it was made.
    for name in set(RUN_FILES) - {"run.sqlite", "checkpoints"}:
        assert first[name] == second[name], name
    first, second = (facts(home / name / "run.sqlite") for name in ("first", "second"))
    for table in first:
        assert first[table] == second[table], table
    for table in ("run", "round", "episode", "decision", "gate_check"):
        assert first[table], table


def test_a_config_of_its_own_process_repeats_it_too(home, capsys):
    assert in_process(capsys, "grow", *LIVELY, "--out", "first")[0] == 0
    code, _, err = process("grow", "--config", "first/config.json", "--out", "second")
    assert (code, err) == (0, "")
    assert snapshot(home / "first")["model.safetensors"] == snapshot(home / "second")["model.safetensors"]


def test_options_go_before_the_config_file(home, capsys):
    (home / "c.json").write_text(json.dumps({"task": "digits-mlp", "seed": 5, "training": {"horizon": 2}}))
    more = ("--seed", "6", "--updates-per-decision", "1", "--out", "run")
    for arguments in (("--config", "c.json", *more), (*more, "--config=c.json", "--replace")):
        assert in_process(capsys, "grow", *arguments)[0] == 0
        config = RunConfig.model_validate_json((home / "run" / "config.json").read_text())
        assert (config.task, config.seed) == ("digits-mlp", 6)
        assert (config.training.horizon, config.training.updates_per_decision) == (2, 1)


def test_another_seed_is_another_run(home, capsys):
    for seed in ("0", "1"):
        arguments = ("--task", "digits-mlp", "--controller", "never", *SHORT, "--seed", seed, "--out", seed)
        assert in_process(capsys, "grow", *arguments)[0] == 0
    assert snapshot(home / "0")["model.safetensors"] != snapshot(home / "1")["model.safetensors"]


def test_replace_overwrites_an_earlier_run(home, capsys):
    for seed in ("0", "1"):
        arguments = ("--task", "digits-mlp", *SHORT, "--seed", seed, "--out", "run", "--replace")
        assert in_process(capsys, "grow", *arguments)[0] == 0
    assert json.loads((home / "run" / "config.json").read_text())["seed"] == 1
    store = home / "run" / "run.sqlite"
    assert column(store, "SELECT seed FROM run") == [1]
    assert column(store, "SELECT decision FROM decision WHERE round = 0") == list(range(6))


def test_a_page_without_arrows(home):
    # Redirected on a system whose encoding has no such sign.
    code, out, err = process("grow", *LIVELY, "--out", "run", env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"})
    assert (code, err) == (0, "")
    assert "GERMINATED" in out
    assert listed(home / "run") == RUN_FILES


# On a terminal.


def on_a_terminal(*arguments, columns):
    """Run the command on a pseudo-terminal; give its exit code and everything it wrote there."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {k: v for k, v in ENVIRONMENT.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "CI")}
    environment["TERM"] = "xterm-256color"
    written = b""
    with subprocess.Popen([*COMMAND, *arguments], stdin=child, stdout=child, stderr=child, env=environment) as run:
        os.close(child)
        # Reading fails when the last writer has closed the terminal.
        try:
            while data := os.read(parent, 65536):
                written += data
        except OSError:
            pass
        finally:
            os.close(parent)
        return run.wait(timeout=120), written.decode()


def test_a_whole_run_on_a_terminal(home):
    # Long enough for the panel to be drawn several times.
    arguments = (*LIVELY[:-1], "50", "--out", "run")
    code, written = on_a_terminal("grow", *arguments, columns=100)
    assert code == 0
    assert listed(home / "run") == RUN_FILES
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written).replace("\r", "\n")
    # The panel: which run, the slots with stage and alpha, how fast it goes and how long it will take.
    for arm in ARMS:
        assert f"digits-mlp (impaired), random, seed 0: {arm}" in plain
    assert re.search(r"^slot +stage +seed +alpha +parameters +worth \(nats\)", plain, re.M)
    assert re.search(r"^r0c\d +[A-Z]+ +\w+ \(\w+\) +\d\.\d\d +[\d,]+", plain, re.M)
    assert re.search(r"^r0c\d +FOSSILIZED +mlp_large \(add\) +1\.00 +[\d,]+ +[+-]\d\.\d+ ± \d", plain, re.M)
    assert re.search(r"decision +\d+/12", plain)
    assert re.search(r"\d+\.\d\s+decisions/s", plain)
    assert re.search(r"\d+\s+s\s+left", plain)
    # Events stay above it, and the table comes last.
    assert re.search(r"^ +\d+  r0c\d  germinate \w+ \w+ \d [\d.]+  DORMANT → GERMINATED", plain, re.M)
    assert plain.rindex("Test split") > plain.rindex("germinate")
    # The cursor is shown again.
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")


def test_a_run_goes_on_without_its_store_to_the_end(home, capsys, monkeypatch):
    result = Arm.result

    def lose_the_store(arm):
        (home / "run" / "run.sqlite").unlink(missing_ok=True)
        return result(arm)

    monkeypatch.setattr(Arm, "result", lose_the_store)
    code, out, err = in_process(capsys, "grow", *LIVELY, "--record-error", "continue", "--out", "run")
    assert (code, len(err.splitlines())) == (0, 1)
    assert err.startswith("esper: recording ended, the run goes on without: cannot write run/run.sqlite: ")
    # There is nothing to ask any more.
    assert out.splitlines()[-1] == "Saved in run. Load it without Esper: python run/model.py"
