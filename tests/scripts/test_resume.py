"""`esper grow --resume` as a user meets it: what is refused, what is repaired, and who may not."""

import json
import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers.command import COMMAND, ENDLESS, ENVIRONMENT, RUN_FILES, in_process, listed, process, snapshot
from helpers.forked import NOBODY, Forked
from helpers.stored import column, facts

TINY = ("--task", "digits-mlp", "--controller", "random", "--horizon", "4", "--updates-per-decision", "1")
MODEL = ("model.json", "model.safetensors", "model.py")


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Give the folder of a finished run; for copies."""
    folder = tmp_path_factory.mktemp("ended") / "run"
    code, _, err = process("grow", *TINY, "--out", folder)
    assert (code, err) == (0, "")
    return folder


@pytest.fixture
def run(ended, home):
    """Give a copy of it, in the folder where the test runs."""
    return shutil.copytree(ended, home / "run")


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if path.is_dir())


def test_a_finished_run_tells_its_results_again(run, capsys):
    before = {name: (run / name).read_bytes() for name in (*MODEL, "config.json")}
    code, out, err = in_process(capsys, "grow", "--resume", "run")
    assert (code, err) == (0, "")
    assert "decision" not in out
    assert "everything from the start" in out
    assert "Saved in run." in out
    assert {name: (run / name).read_bytes() for name in before} == before


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--resume", "run", "--seed", "3"), "seed is 0 in run and 3 here; a run goes on only as it was begun"),
        (("--resume=run", "--horizon", "9"), "horizon is 4 in run and 9 here"),
        (("--resume", "run", "--controller", "never"), "controller is random in run and never here"),
        (("--resume", "run", "--record", "off"), "record is full in run and off here"),
        (("--resume", "nowhere"), "cannot read nowhere/config.json"),
        (("--resume",), "--resume"),
        (("--resume", "run", "--out", "elsewhere"), "a run goes on in its own folder; leave --out and --replace out"),
        (("--resume", "run", "--replace"), "a run goes on in its own folder; leave --out and --replace out"),
        (("--resume", "empty"), "empty has no checkpoint that can be used; begin again with --out and --replace"),
    ],
)
def test_going_on_with_something_else_is_refused(run, home, capsys, arguments, complaint):
    shutil.copytree(run, home / "empty")
    shutil.rmtree(home / "empty" / "checkpoints")
    before = snapshot(home)
    code, out, err = in_process(capsys, "grow", *arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert complaint in err
    assert snapshot(home) == before


def test_of_a_training_it_is_no_run(home, capsys):
    tiny = ("--task", "mnist1d-mlp", "--rounds", "1", "--rows", "2", "--group-size", "2", "--horizon", "1")
    assert in_process(capsys, "train", *tiny, "--updates-per-decision", "1", "--out", "run")[0] == 0
    code, out, err = in_process(capsys, "grow", "--resume", "run")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "config: run/config.json: " in err


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(run, ended, capsys):
    *_, newest = checkpoints(run)
    with (run / "checkpoints" / newest / "manifest.json").open("r+b") as file:
        file.seek(20)
        file.write(b"~")
    code, out, err = in_process(capsys, "grow", "--resume", "run")
    assert code == 0
    assert len(err.splitlines()) == 1
    assert err.startswith(f"esper: checkpoint run/checkpoints/{newest} is not used: manifest.json ")
    # The last arm is trained once more.
    assert "everything from the start: decision 4/4" in out
    assert "grown: decision" not in out
    for name in MODEL:
        assert (run / name).read_bytes() == (ended / name).read_bytes()
    assert facts(run / "run.sqlite") == facts(ended / "run.sqlite")


def test_where_every_checkpoint_is_damaged_each_is_named(run, capsys):
    for name in checkpoints(run):
        (run / "checkpoints" / name / "manifest.json").write_text("{}")
    before = snapshot(run)
    code, out, err = in_process(capsys, "grow", "--resume", "run")
    assert (code, out) == (2, "")
    *named, last = err.splitlines()
    assert [name in line for name, line in zip(reversed(checkpoints(run)), named, strict=True)] == [True, True]
    assert last.startswith("esper: resume: run has no checkpoint that can be used; ")
    assert snapshot(run) == before


@contextmanager
def going_on(name):
    """Give a run in the middle of its first arm."""
    command = [*COMMAND, "grow", *ENDLESS, "--out", name]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=ENVIRONMENT, **pipes) as run:
        try:
            while "decision 10/" not in run.stdout.readline():
                assert run.poll() is None
            yield run
        finally:
            run.kill()


def test_a_sealed_checkpoint_of_something_else_is_refused(run, home, capsys):
    """Whole, but of a run of another configuration."""
    with going_on("other") as other:
        other.terminate()
        other.communicate()
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "task": "digits"}))
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(home / "other" / "checkpoints", run / "checkpoints")
    before = snapshot(run)
    code, out, err = in_process(capsys, "grow", "--resume", "run")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "esper: resume: the checkpoint in run cannot be used: " in err
    assert snapshot(run) == before


@pytest.mark.parametrize("more", [("--resume", "run"), (*TINY, "--out", "run", "--replace")])
def test_a_run_that_is_going_on_is_left_alone(home, capsys, more):
    with going_on("run") as going:
        code, out, err = in_process(capsys, "grow", *more)
        assert (code, out) == (2, "")
        assert err == "esper: run is in use by a run that is still going on; stop it, or name another folder\n"
        assert going.poll() is None
        going.terminate()
        _, err = going.communicate(timeout=120)
        assert err == ""
    assert column(home / "run" / "run.sqlite", "SELECT status FROM run") == ["interrupted"]


@pytest.mark.skipif(os.getuid() != 0, reason="only the superuser can become somebody else")
def test_a_folder_of_somebody_else_is_said_in_one_line_and_left_alone(ended):
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        home.chmod(0o755)
        run = shutil.copytree(ended, home / "run")
        before = snapshot(home)
        for more in (("--resume", run), (*TINY, "--out", run, "--replace"), (*TINY, "--out", home / "new")):
            other = Forked("grow", *more, user=NOBODY)
            assert other.wait()
            assert other.code == 2
            (line,) = other.told().splitlines()
            assert line.startswith("esper: ")
            assert "Permission denied" in line or "readonly" in line
            assert snapshot(home) == before
        assert listed(run) == RUN_FILES
