"""The command line: bad input of every kind in one line, and whole runs on a pipe and on a terminal."""

import errno
import fcntl
import json
import os
import pty
import re
import resource
import struct
import subprocess
import sys
import termios

import pytest
import sklearn.datasets
import torch

from esper.leyline.config import RunConfig
from esper.scripts.main import main
from esper.tolaria.tasks import TASKS

COMMAND = [sys.executable, "-m", "esper.scripts.main"]
SHORT = ("--horizon", "6", "--updates-per-decision", "2")
# Random decides something in nearly every decision, whatever is learned.
LIVELY = ("--task", "digits-mlp", "--controller", "random", "--horizon", "12", "--updates-per-decision", "1")
RUN_FILES = [
    *("config.json", "events.jsonl", "history.jsonl"),
    *("model.json", "model.py", "model.safetensors", "result.json"),
]
ARMS = ("grown", "host alone", "everything from the start")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Run in an empty folder, on one thread, on a wide page."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    threads = torch.get_num_threads()
    yield folder
    torch.set_num_threads(threads)


def snapshot(folder):
    """Give every path below a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def in_process(capsys, *arguments):
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def process(*arguments, **more):
    """Run the command as a user does; give its exit code, output and complaints."""
    options = {"env": ENVIRONMENT, "capture_output": True, "text": True, "timeout": 120, "check": False, **more}
    run = subprocess.run([*COMMAND, *map(str, arguments)], **options)
    return run.returncode, run.stdout, run.stderr


def refused(result, *words):
    """Check for exactly one line of complaint, which says all of `words`."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("esper: ")
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in err
    # No crumb of the parser's boxes, and nothing said twice.
    assert not re.search(r"[╭╮╰╯│─]|---|  ", err), err
    assert err.count("esper --help") <= 1


BAD = {
    "unknown task": (["grow", "--task", "cifar"], ["task", "'cifar'", *TASKS]),
    "unknown controller": (
        ["grow", "--controller", "nobody"],
        ["controller", "'nobody'", "never", "random", "periodic", "heuristic"],
    ),
    "unknown host": (["grow", "--host", "huge"], ["--host", "'huge'", "impaired", "ample"]),
    "unknown blueprint": (["grow", "--blueprints", "norm", "lora"], ["blueprints", "'lora'", "lora_small"]),
    "misfit blueprint": (
        ["grow", "--task", "digits-mlp", "--blueprints", "conv_heavy"],
        ["blueprints", "conv_heavy", "mlp_large"],
    ),
    "no blueprint": (["grow", "--blueprints"], ["blueprints", "these fit: ", "conv_heavy"]),
    "unknown option": (["grow", "--frobnicate", "3"], ["--frobnicate", "esper --help"]),
    "misspelt option": (["grow", "--horizont", "3"], ["--horizont", "perhaps you meant --horizon"]),
    "unknown command": (["prune"], ["prune", "grow, tasks, doctor"]),
    "no command": ([], ["grow", "tasks", "doctor"]),
    "extra word": (["grow", "everything"], ["everything"]),
    "option of another command": (["tasks", "--horizon", "3"], ["--horizon"]),
    "negative seed": (["grow", "--seed", "-1"], ["seed", "greater than or equal to 0", "-1"]),
    "seed that is no number": (["grow", "--seed", "x"], ["--seed", "'x'"]),
    "seed that is none": (["grow", "--seed", ""], ["--seed", "''"]),
    "seed without a value": (["grow", "--seed"], ["--seed", "missing"]),
    "huge seed": (["grow", "--seed", str(2**63)], ["seed", str(2**63)]),
    "fractional horizon": (["grow", "--horizon", "1.5"], ["--horizon", "'1.5'"]),
    "no horizon": (["grow", "--horizon", "0"], ["horizon", "greater than or equal to 1", "0"]),
    "no updates": (["grow", "--updates-per-decision", "0"], ["updates_per_decision", "0"]),
    "learning rate nan": (["grow", "--learning-rate", "nan"], ["learning_rate", "finite", "nan"]),
    "learning rate inf": (["grow", "--learning-rate", "inf"], ["learning_rate", "finite", "inf"]),
    "learning rate 0": (["grow", "--learning-rate", "0"], ["learning_rate", "greater than 0"]),
    "learning rate -1": (["grow", "--learning-rate", "-1"], ["learning_rate", "greater than 0", "-1"]),
    "learning rate word": (["grow", "--learning-rate", "fast"], ["--learning-rate", "'fast'"]),
    "warmup": (["grow", "--warmup", "1"], ["warmup", "less than 1"]),
    "unknown method": (["grow", "--method", "adam"], ["--method", "'adam'", "adamw", "sgd"]),
    "gates that nothing passes": (
        ["grow", "--min-gradient-ratio", "5", "--max-gradient-ratio", "2"],
        ["esper: min_gradient_ratio must be below max_gradient_ratio"],
    ),
    "unknown device": (["grow", "--device", "tpu"], ["device", "'tpu'", "cpu", "cuda"]),
    "config without a file": (["grow", "--config"], ["--config", "missing"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(home, capsys, case):
    arguments, words = BAD[case]
    refused(in_process(capsys, *arguments), *words)
    assert snapshot(home) == {}


@pytest.mark.parametrize("width", ["40", "80", "1000"])
@pytest.mark.parametrize("case", ["unknown option", "seed that is no number", "unknown blueprint", "unknown command"])
def test_bad_input_on_pages_of_any_width(capsys, monkeypatch, width, case):
    # The parser folds its boxes to the page.
    monkeypatch.setenv("COLUMNS", width)
    arguments, words = BAD[case]
    refused(in_process(capsys, *arguments), *words)


def test_cuda_without_cuda(home, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(in_process(capsys, "grow", "--device", "cuda", *SHORT), "device", "cuda", "use cpu")
    assert snapshot(home) == {}


@pytest.mark.parametrize("error", [EOFError(), FileNotFoundError(2, "gone", "digits.csv.gz"), ValueError("a\nb")])
def test_damaged_data_file(home, capsys, monkeypatch, error):
    def fail(**_):
        raise error

    monkeypatch.setattr(sklearn.datasets, "load_digits", fail)
    for command in (["grow", *SHORT], ["tasks"]):
        refused(in_process(capsys, *command), "digits.csv.gz", "reinstall scikit-learn")
    assert snapshot(home) == {}
    # Another task does not need it.
    assert in_process(capsys, "grow", "--task", "mnist1d-mlp", "--horizon", "1", "--updates-per-decision", "1")[0] == 0


# Configuration files.

GOOD = json.loads(RunConfig(task="digits-mlp").model_dump_json())
CONFIGS = {
    "cut": (json.dumps(GOOD)[:-20], ["invalid JSON"]),
    "empty": ("", ["invalid JSON"]),
    "words": ("task: digits\n", ["invalid JSON"]),
    "a list": ("[1, 2]", ["[1, 2]"]),
    "unknown key": (json.dumps({**GOOD, "sed": 3}), ["sed: unknown key"]),
    "unknown key inside": (json.dumps({**GOOD, "growth": {"gates": {"x": 1}}}), ["growth.gates.x: unknown key"]),
    "wrong type": (json.dumps({**GOOD, "seed": "three"}), ["seed: ", "integer", "'three'"]),
    "null": (json.dumps({**GOOD, "training": None}), ["training: ", "None"]),
    "out of range": (json.dumps({**GOOD, "training": {"horizon": 0}}), ["training.horizon: ", "0"]),
    "not a number": (json.dumps({**GOOD, "optimizer": {"learning_rate": float("nan")}}), ["learning_rate", "finite"]),
    "unknown blueprint": (json.dumps({**GOOD, "blueprints": ["lora"]}), ["blueprints: unknown blueprint 'lora'"]),
    "unknown host": (json.dumps({**GOOD, "host": "huge"}), ["host: ", "'impaired' or 'ample'", "'huge'"]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_bad_config_file(home, capsys, case):
    text, words = CONFIGS[case]
    (home / "c.json").write_text(text)
    refused(in_process(capsys, "grow", "--config", "c.json", *SHORT), "config: c.json: ", *words)
    assert list(snapshot(home)) == ["c.json"]


def test_config_file_that_cannot_be_read(home, capsys):
    (home / "binary.json").write_bytes(b"\xff\xfe\x00")
    refused(in_process(capsys, "grow", "--config", "missing.json"), "cannot read missing.json: No such file")
    refused(in_process(capsys, "grow", "--config", "."), "cannot read .: Is a directory")
    refused(in_process(capsys, "grow", "--config=binary.json"), "cannot read binary.json: it is not text")
    assert list(snapshot(home)) == ["binary.json"]


def test_a_task_that_is_only_in_the_config_file_is_checked_too(home, capsys):
    (home / "c.json").write_text(json.dumps({**GOOD, "task": "cifar"}))
    refused(in_process(capsys, "grow", "--config", "c.json"), "unknown task 'cifar'")


# Where runs go.


def test_a_folder_that_holds_a_run(home, capsys):
    (home / "run").mkdir()
    (home / "run" / "config.json").write_text(json.dumps(GOOD))
    before = snapshot(home)
    refused(in_process(capsys, "grow", "--out", "run", *SHORT), "run holds a run", "--replace")
    assert snapshot(home) == before


def test_a_folder_that_holds_something_else(home, capsys):
    (home / "thesis").mkdir()
    (home / "thesis" / "chapter.tex").write_text("years of work")
    before = snapshot(home)
    for more in ((), ("--replace",)):
        refused(in_process(capsys, "grow", "--out", "thesis", *SHORT, *more), "thesis holds other files")
    assert snapshot(home) == before


def test_a_path_that_is_no_folder(home, capsys):
    (home / "file").write_text("mine")
    refused(in_process(capsys, "grow", "--out", "file", *SHORT), "file is a file")
    refused(in_process(capsys, "grow", "--out", "file/run", *SHORT), "cannot use file/run: Not a directory")
    assert snapshot(home) == {"file": b"mine"}


# A full disk.


def full_from(monkeypatch, write):
    """Let the disk be full from the given sync on."""
    fsync, count = os.fsync, [0]

    def full(number):
        count[0] += 1
        if count[0] >= write:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(number)

    monkeypatch.setattr(os, "fsync", full)


@pytest.mark.parametrize("write", [1, 2, 3, 4, 5])
def test_full_disk_leaves_whole_files_alone(home, capsys, monkeypatch, write):
    full_from(monkeypatch, write)
    arguments = ("grow", "--task", "digits-mlp", *SHORT, "--out", "run")
    code, _, err = in_process(capsys, *arguments)
    assert code == 2
    assert len(err.splitlines()) == 1
    synced = ["config.json", "model.json", "model.safetensors", "model.py", "result.json"]
    missing = synced[write - 1 :]
    assert err.startswith(f"esper: cannot write {os.path.join('run', missing[0])}: No space left on device")
    assert sorted(snapshot(home / "run")) == ([] if write == 1 else sorted(set(RUN_FILES) - set(missing)))
    if write > 1:
        RunConfig.model_validate_json((home / "run" / "config.json").read_text())
        assert len((home / "run" / "history.jsonl").read_text().splitlines()) == 6


def test_full_disk_in_the_middle_of_the_history(home):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))

    code, out, err = process("grow", "--task", "digits-mlp", *SHORT, "--out", "run", preexec_fn=limit)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert err.startswith("esper: cannot write run/history.jsonl: File too large")
    assert "Traceback" not in out
    assert sorted(snapshot(home / "run")) == ["config.json", "events.jsonl", "history.jsonl"]
    history = [json.loads(line) for line in (home / "run" / "history.jsonl").read_text().splitlines()]
    assert [line["decision"] for line in history] == list(range(len(history)))
    assert 0 < len(history) < 6
    # The same run goes on once there is room.
    code, _, err = process("grow", "--config", "run/config.json", "--out", "run", "--replace")
    assert (code, err) == (0, "")
    assert sorted(snapshot(home / "run")) == RUN_FILES


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
@pytest.mark.parametrize("arguments", [["tasks"], ["grow", "--task", "digits-mlp", *SHORT], ["grow", "--help"]])
def test_output_that_cannot_be_written(home, arguments):
    with open("/dev/full", "w") as full:
        code, _, err = process(*arguments, stdout=full, stderr=subprocess.PIPE, capture_output=False)
    assert code not in (0, None)
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["tasks"], ["grow", "--help"]])
def test_a_reader_that_goes_away(arguments):
    # As `esper grow --help | head -1`.
    with subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as p:
        p.stdout.close()
        err = p.stderr.read().decode()
        p.wait(timeout=120)
    assert "Traceback" not in err


# What a user sees of commands that work.


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


def test_doctor(home, capsys):
    code, out, err = in_process(capsys, "doctor")
    assert (code, err) == (0, "")
    for check in ("versions", "processor", "accelerator", "data", "row layers", "disk"):
        assert f"│ {check} " in out
    assert "FAILED" not in out
    assert torch.__version__ in out
    assert snapshot(home) == {}


def test_doctor_finds_a_damaged_data_file(capsys, monkeypatch):
    def fail(**_):
        raise EOFError

    monkeypatch.setattr(sklearn.datasets, "load_digits", fail)
    code, out, _ = in_process(capsys, "doctor")
    assert code == 2
    assert "FAILED: digits data file" in out
    # The other checks are made all the same.
    assert "takes and syncs" in out


def test_doctor_finds_a_full_disk(capsys, monkeypatch):
    full_from(monkeypatch, 1)
    code, out, _ = in_process(capsys, "doctor")
    assert code == 2
    assert "No space left on device" in out


def no_nan(constant):
    raise AssertionError(f"{constant} in the file")


def lines_of(path):
    return [json.loads(line, parse_constant=no_nan) for line in path.read_text().splitlines()]


def test_a_whole_run_on_a_pipe(home):
    code, out, err = process("grow", *LIVELY, "--out", "run")
    assert (code, err) == (0, "")
    assert sorted(snapshot(home / "run")) == RUN_FILES
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
    events = lines_of(home / "run" / "events.jsonl")
    assert len(told) == len(events) > 0
    for line, event in zip(told, events, strict=True):
        assert line.split()[:2] == [str(event["decision"] + 1), event["slot"]]
        assert ("[" in line) == bool(event["checks"] or event["refused_by"])
        assert event["after"] in line
    assert any("refused" in line for line in told)
    # The three networks.
    table = re.findall(r"│ (\w[\w ]+?) +│ +(\d+\.\d)% │ +([\d.]+) │ +([\d,]+) │ +[\d.]+ │", out)
    result = json.loads((home / "run" / "result.json").read_text(), parse_constant=no_nan)
    assert [row[0] for row in table] == [arm["arm"] for arm in result["arms"]] == list(ARMS)
    for row, arm in zip(table, result["arms"], strict=True):
        assert row[1:] == (f"{arm['test_accuracy'] * 100:.1f}", f"{arm['test_loss']:.3f}", f"{arm['parameters']:,}")
    assert result["status"] == "finished"
    assert lines[-1] == "Saved in run. Load it without Esper: python run/model.py"
    # And so it does.
    model = subprocess.run([sys.executable, "run/model.py"], capture_output=True, text=True, check=True, timeout=120)
    assert model.stdout.endswith(f"{result['arms'][0]['parameters']:,} parameters\n")


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
    assert sorted(snapshot(home / "runs" / "digits-mlp-ample-never-seed7")) == RUN_FILES
    assert "Saved in runs/digits-mlp-ample-never-seed7." in out


def untimed(value):
    """Give a record without its seconds."""
    if isinstance(value, dict):
        return {key: untimed(item) for key, item in value.items() if key != "seconds"}
    return [untimed(item) for item in value] if isinstance(value, list) else value


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
    for name in ("config.json", "model.safetensors", "model.json", "model.py", "events.jsonl"):
        assert first[name] == second[name], name
    assert [untimed(line) for line in lines_of(home / "first" / "history.jsonl")] == [
        untimed(line) for line in lines_of(home / "second" / "history.jsonl")
    ]
    results = [untimed(json.loads(files["result.json"])) for files in (first, second)]
    assert results[0] == results[1]


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
    assert len(lines_of(home / "run" / "history.jsonl")) == 6


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("case", ["unknown task", "misspelt option", "unknown command"])
def test_bad_input_in_a_process_of_its_own(home, case, encoding):
    arguments, words = BAD[case]
    refused(process(*arguments, env={**ENVIRONMENT, "PYTHONIOENCODING": encoding}), *words)
    assert snapshot(home) == {}


def test_a_page_without_arrows(home):
    # Redirected on a system whose encoding has no such sign.
    code, out, err = process("grow", *LIVELY, "--out", "run", env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"})
    assert (code, err) == (0, "")
    assert "GERMINATED" in out
    assert sorted(snapshot(home / "run")) == RUN_FILES


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
    assert sorted(snapshot(home / "run")) == RUN_FILES
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
