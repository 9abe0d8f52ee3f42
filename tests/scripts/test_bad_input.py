"""Bad input of every kind: one clear line, exit code 2, nothing half-written."""

import json
import os
import re
import resource
import subprocess

import pytest
import sklearn.datasets
import torch

from esper.leyline.config import RunConfig
from esper.scripts import grow
from esper.scripts.main import main
from esper.tolaria.tasks import TASKS
from helpers.command import (
    COMMAND,
    ENVIRONMENT,
    LIVELY,
    RUN_FILES,
    SHORT,
    full_from,
    in_process,
    listed,
    process,
    snapshot,
)
from helpers.stored import check_whole, column, facts, stored


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
    "unknown command": (["prune"], ["prune", "grow, train, exam, runs, query, tasks, doctor"]),
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
    "learning rate 0": (["grow", "--learning-rate", "0"], ["learning_rate", "greater than or equal to 0.000000000001"]),
    "learning rate -1": (["grow", "--learning-rate", "-1"], ["learning_rate", "greater than or equal to 0.0", "-1"]),
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


def test_more_than_the_memory_holds(home):
    """A round of 4 million decisions where the process may have 3 GB."""

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30))

    arguments = ("--task", "digits-mlp", "--rows", "8192", "--horizon", "512", "--out", "run")
    code, out, err = process("train", *arguments, preexec_fn=limit)
    assert (code, out) == (2, "")
    assert err == "esper: not enough memory; take fewer hosts, a smaller batch, shorter episodes or a smaller network\n"
    assert column(home / "run" / "run.sqlite", "SELECT status FROM run") == ["failed"]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 9.00 GiB.")])
def test_memory_of_other_kinds(home, capsys, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(grow, "grow", fail)
    refused(in_process(capsys, "grow"), "not enough memory")


def test_other_errors_are_not_taken_for_it(home, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(grow, "grow", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["grow"])


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


MODEL = ("model.json", "model.safetensors", "model.py")


# Syncs: that of the configuration, four for each checkpoint, three more where there is an episode in it, one for each
# file of the model. The run makes four checkpoints.
@pytest.mark.parametrize("write", [1, 2, 5, 6, 7, 8, 9, 10, 13, 20])
def test_full_disk_leaves_whole_files_alone(home, capsys, monkeypatch, write):
    arguments = ("grow", "--task", "digits-mlp", *SHORT)
    with monkeypatch.context() as patch:
        full_from(patch, write)
        code, _, err = in_process(capsys, *arguments, "--out", "run")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert re.search(r"cannot write run/(\S+): No space left on device; free the disk or choose another folder$", err)
    assert not list((home / "run").rglob(".*"))
    if write == 1:
        assert listed(home / "run") == []
        return
    RunConfig.model_validate_json((home / "run" / "config.json").read_text())
    store = home / "run" / "run.sqlite"
    check_whole(store)
    # The store goes its own ways to the disk: all decisions are in it, and why there are no more.
    decisions = column(store, "SELECT decision FROM decision WHERE round = 0")
    assert decisions == (list(range(6)) if write > 5 else [])
    ((status, reason),) = (row.values() for row in stored(store, "SELECT status, status_reason FROM run"))
    assert (status, "No space left on device" in reason) == ("failed", True)
    # Once there is room, the run goes on from its last good state, if it came so far.
    code, _, err = in_process(capsys, "grow", "--resume", "run")
    if write == 2:
        refused((code, "", err), "run has no checkpoint", "begin again")
        return
    assert (code, err) == (0, "")
    assert in_process(capsys, *arguments, "--out", "whole")[0] == 0
    for name in MODEL:
        assert (home / "run" / name).read_bytes() == (home / "whole" / name).read_bytes()
    assert facts(store) == facts(home / "whole" / "run.sqlite")


def on_a_small_disk(size, *arguments):
    """Run the command where no file may grow beyond `size` bytes."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return process("grow", *arguments, "--out", "run", preexec_fn=limit)


# Bytes, and the file that is the first not to fit.
@pytest.mark.parametrize(("size", "first"), [(400, "config.json"), (4000, "run.sqlite"), (60_000, "run.sqlite")])
def test_full_disk_before_the_first_decision(home, capsys, size, first):
    code, out, err = on_a_small_disk(size, "--task", "digits-mlp", *SHORT)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith(f"esper: cannot write run/{first}: ")
    assert sorted(set(snapshot(home / "run")) - {first}) == ([] if first == "config.json" else ["config.json"])
    # The same run goes on once there is room.
    code, _, err = in_process(capsys, "grow", "--task", "digits-mlp", *SHORT, "--out", "run", "--replace")
    assert (code, err) == (0, "")
    assert listed(home / "run") == RUN_FILES


def test_full_disk_in_the_middle_of_the_record(home, capsys):
    # Room for the record of the grown network, but not for that of all three.
    code, out, err = on_a_small_disk(150 * 1024, *LIVELY[:-3], "100", *LIVELY[-2:])
    assert code == 2
    assert len(err.splitlines()) == 1
    assert err.startswith("esper: cannot write run/run.sqlite: ")
    assert err.endswith("; what was recorded before is kept in it\n")
    assert "Traceback" not in out
    assert listed(home / "run") == RUN_FILES
    store = home / "run" / "run.sqlite"
    check_whole(store)
    ((status, reason),) = (row.values() for row in stored(store, "SELECT status, status_reason FROM run"))
    assert (status, reason) == ("failed", "recording ended: disk I/O error")
    kept = column(store, "SELECT 100 * round + decision FROM decision ORDER BY round, decision")
    assert kept == list(range(len(kept)))
    assert 0 < len(kept) < 300
    # The same run goes on once there is room.
    again = ("grow", "--config", "run/config.json", "--horizon", "2", "--out", "run", "--replace")
    code, _, err = in_process(capsys, *again)
    assert (code, err) == (0, "")
    assert listed(home / "run") == RUN_FILES
    assert column(store, "SELECT status FROM run") == ["finished"]


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


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("case", ["unknown task", "misspelt option", "unknown command"])
def test_bad_input_in_a_process_of_its_own(home, case, encoding):
    arguments, words = BAD[case]
    refused(process(*arguments, env={**ENVIRONMENT, "PYTHONIOENCODING": encoding}), *words)
    assert snapshot(home) == {}
