"""SIGKILL at random moments: whoever goes on as the messages say ends as an undisturbed run does, to the last bit."""

import random
import signal
import time

import pytest

from esper.tolaria.checkpoints import Checkpoints
from helpers.forked import Forked
from helpers.stored import check_whole, column, facts

MOMENTS = 50
COMMANDS = {
    "grow": ("grow", "--task", "digits-mlp", "--controller", "random", "--horizon", "8", "--updates-per-decision", "1"),
    "train": (
        *("train", "--task", "digits-mlp", "--rounds", "4", "--rows", "4", "--group-size", "2", "--select-every", "2"),
        *("--horizon", "4", "--updates-per-decision", "1", "--selection-starts", "1", "--judgement-starts", "1"),
    ),
}


def begin_or_go_on(command, folder):
    """Do what a user does who finds a folder, or none, and does not know how far the run was."""
    if not (folder / "config.json").exists():
        return Forked(*COMMANDS[command], "--out", folder)
    if not (folder / "checkpoints" / "LATEST").exists():
        # Killed before anything was done.
        return Forked(*COMMANDS[command], "--out", folder, "--replace")
    return Forked(command, "--resume", folder)


def left_by(folder):
    """Give all that a finished run leaves and that does not tell the time."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and "checkpoints" not in p.parts)
    contents = {str(p.relative_to(folder)): p.read_bytes() for p in files if p.name != "run.sqlite"}
    last = Checkpoints(folder).load(print)
    known = {name: value for name, value in last.facts.items() if name not in ("results", "recorded_unix_s")}
    return contents, known, last.files, facts(folder / "run.sqlite")


@pytest.fixture(scope="module", params=COMMANDS)
def undisturbed(request, tmp_path_factory):
    """Give a command, what it leaves, and how long it takes (s)."""
    folder = tmp_path_factory.mktemp(request.param)
    seconds = []
    for number in range(2):
        start = time.monotonic()
        run = Forked(*COMMANDS[request.param], "--out", folder / str(number))
        assert run.wait()
        assert run.code == 0, run.told()
        seconds.append(time.monotonic() - start)
    return request.param, left_by(folder / "1"), seconds[1]


@pytest.mark.slow
def test_killed_at_random_moments(undisturbed, tmp_path):
    command, whole, seconds = undisturbed
    chance = random.Random(0)
    killed = ended = 0
    folder = tmp_path / "0"
    while killed < MOMENTS or not ended:
        run = begin_or_go_on(command, folder)
        if killed < MOMENTS and not run.wait(chance.uniform(0, 0.6 * seconds)):
            run.kill()
        assert run.wait()
        if run.code == -signal.SIGKILL:
            killed += 1
            continue
        assert run.code == 0, run.told()
        check_whole(folder / "run.sqlite")
        assert column(folder / "run.sqlite", "SELECT status FROM run") == ["finished"]
        assert left_by(folder) == whole
        ended += 1
        folder = tmp_path / str(ended)
    # A run is killed more often than once, what is left of it is shorter each time.
    assert ended < MOMENTS
