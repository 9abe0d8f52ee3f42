"""Ctrl-C or SIGTERM: the first ends a run after its decision and keeps what was done, the second ends it at once."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

from esper.leyline.config import RunConfig
from esper.scripts.errors import INTERRUPTED
from esper.scripts.main import main
from esper.scripts.running import SIGNALS, Interrupt
from helpers.command import ENDLESS, RUN_FILES
from helpers.stored import check_whole, column, stored

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def start(*command, cwd):
    """Start a process whose group the terminal of the tests does not reach."""
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(run, words):
    """Read until a line that holds `words`; give everything read."""
    read = ""
    for line in run.stdout:
        read += line
        if words in line:
            return read
    raise AssertionError(f"{words!r} never came: {read}{run.stderr.read()}")


def made(store, number=0):
    """Give the numbers of the decisions that a store holds of a round."""
    return column(store, "SELECT decision FROM decision WHERE round = ? ORDER BY decision", number)


def ends(store):
    """Give the arms of a store with how they ended and after how many decisions."""
    rows = stored(store, "SELECT arm, status, episode.decisions FROM round JOIN episode USING (round) ORDER BY round")
    return [tuple(row.values()) for row in rows]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Interrupt a run after its first decisions; give its folder, exit code, output and complaints."""
    home = tmp_path_factory.mktemp("home")
    run = start("-m", "esper.scripts.main", "grow", *ENDLESS, "--out", "a run", cwd=home)
    try:
        out = wait_for(run, "grown: decision 10/4096")
        run.send_signal(signal.SIGINT)
        rest, err = run.communicate(timeout=120)
    finally:
        run.kill()
    return home / "a run", run.returncode, out + rest, err


def test_exit_code(stopped):
    _, code, out, err = stopped
    assert (code, err) == (INTERRUPTED, "")
    assert INTERRUPTED == 130
    assert "Traceback" not in out


def test_the_folder_holds_what_was_done(stopped):
    folder, *_ = stopped
    assert sorted(path.name for path in folder.iterdir()) == RUN_FILES
    store = folder / "run.sqlite"
    check_whole(store)
    decisions = len(made(store))
    assert 10 <= decisions < 4096
    assert made(store) == list(range(decisions))
    assert stored(store, "SELECT status, status_reason FROM run") == [{"status": "interrupted", "status_reason": None}]
    assert ends(store) == [("grown", "interrupted", decisions)]
    # No arm was finished, so none was tested.
    assert column(store, "SELECT test_accuracy FROM episode") == [None]
    events = column(store, "SELECT decision FROM transition")
    assert all(decision < decisions for decision in events)
    assert events
    config = RunConfig.model_validate_json((folder / "config.json").read_text())
    assert (config.controller, config.training.horizon) == ("random", 4096)


def test_the_model_of_the_last_decision_loads(stopped):
    folder, *_ = stopped
    model = subprocess.run(
        [sys.executable, "-I", str(folder / "model.py")], capture_output=True, text=True, check=True, timeout=120
    )
    store = folder / "run.sqlite"
    (host,) = column(store, "SELECT host_parameters FROM episode")
    # Those of the seeds in the forward pass after the last decision, from where it is told seed by seed.
    last = "decision = (SELECT max(decision) FROM decision)"
    blended = "stage IN ('BLENDING', 'PROBATIONARY', 'FOSSILIZED') AND alpha > 0"
    (added,) = column(store, f"SELECT coalesce(sum(parameters), 0) FROM slot WHERE {last} AND {blended}")
    assert column(store, "SELECT added_parameters FROM episode") == [added]
    assert model.stdout.endswith(f"{host + added:,} parameters\n")


def test_what_the_message_says_to_type_goes_on_from_there(stopped, tmp_path):
    folder, _, out, _ = stopped
    shutil.copytree(folder, tmp_path / folder.name)
    store = tmp_path / folder.name / "run.sqlite"
    message = out.splitlines()[-1]
    (decisions,) = column(store, "SELECT decisions FROM episode")
    kept = f"Stopped after decision {decisions} of 4096 (grown). Kept in a run: the record and the model so far. "
    assert message.startswith(kept)
    before = stored(store, "SELECT * FROM decision ORDER BY decision")
    command = shlex.split(re.search(r"Go on with: (.*)$", message)[1])
    assert command[0] == "esper"
    run = start("-m", "esper.scripts.main", *command[1:], cwd=tmp_path)
    try:
        told = wait_for(run, f"grown: decision {(decisions // 10 + 2) * 10}/4096")
        run.send_signal(signal.SIGTERM)
        rest, err = run.communicate(timeout=120)
    finally:
        run.kill()
    assert (run.returncode, err) == (INTERRUPTED, "")
    assert "decision 10/4096" not in told
    check_whole(store)
    after = stored(store, "SELECT * FROM decision ORDER BY decision")
    assert [row["decision"] for row in after] == list(range(len(after)))
    assert len(after) > decisions
    # What was recorded before stays, the last decision too, which is recorded once more.
    assert after[: len(before)] == before
    assert ends(store) == [("grown", "interrupted", len(after))]
    assert f"Stopped after decision {len(after)} of 4096 (grown). " in rest


# Says when it is in the middle of a decision, and when it was asked to stop. Its own arguments: the decision, the
# controller, and what comes after that.
DRIVER = """
import sys
from esper.scripts import grow, main
from esper.simic.episode import Episode

decision, controller, then = sys.argv[1:4]
advance, interrupts = Episode.advance, []

class Watched(grow.Interrupt):
    def __init__(self):
        super().__init__()
        interrupts.append(self)

def watched(self, **how):
    if (str(self.decision), type(self.controller).__name__) == (decision, controller):
        print("deciding", flush=True)
        while not interrupts[0].asked:
            pass
        print("asked", flush=True)
        while then == "never ends":
            pass
    return advance(self, **how)

grow.Interrupt, Episode.advance = Watched, watched
sys.exit(main.main(sys.argv[4:]))
"""
SHORT = ("--task", "digits-mlp", "--controller", "random", "--horizon", "4", "--updates-per-decision", "1")


def interrupted_in(home, decision, controller, then="ends", how=signal.SIGINT):
    """Start a run that is interrupted in a decision of the first arm under a controller."""
    run = start("-c", DRIVER, str(decision), controller, then, "grow", *SHORT, "--out", "run", cwd=home)
    wait_for(run, "deciding")
    run.send_signal(how)
    wait_for(run, "asked")
    return run


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_the_second_ends_at_once(tmp_path, first, second):
    run = interrupted_in(tmp_path, 2, "RandomController", "never ends", first)
    try:
        # It is still in the decision in which the first one came.
        assert run.poll() is None
        run.send_signal(second)
        out, err = run.communicate(timeout=120)
    finally:
        run.kill()
    assert run.returncode == INTERRUPTED
    assert err == "esper: stopped at once\n"
    assert "Traceback" not in out
    # What was written is whole: the decisions before, but for the last one, which is told with the next.
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoints", "config.json", "run.sqlite"]
    store = tmp_path / "run" / "run.sqlite"
    check_whole(store)
    assert made(store) == [0]
    ended = {"status": "interrupted", "status_reason": "stopped at once"}
    assert stored(store, "SELECT status, status_reason FROM run") == [ended]


@pytest.mark.parametrize("how", SIGNALS)
@pytest.mark.parametrize("at", [0, 3])
def test_the_decision_in_which_it_came_is_finished(tmp_path, at, how):
    run = interrupted_in(tmp_path, at, "RandomController", how=how)
    out, err = run.communicate(timeout=120)
    assert (run.returncode, err) == (INTERRUPTED, "")
    store = tmp_path / "run" / "run.sqlite"
    check_whole(store)
    assert made(store) == list(range(at + 1))
    assert column(store, "SELECT status FROM run") == ["interrupted"]
    # Whatever it is called: it is over, after so many decisions.
    ((_, status, decisions),) = ends(store)
    assert (status != "running", decisions) == (True, at + 1)
    assert f"Stopped after decision {at + 1} of 4 (grown)." in out
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_while_a_control_trains_the_grown_network_is_kept_whole(tmp_path):
    run = interrupted_in(tmp_path, 1, "NeverController")
    out, err = run.communicate(timeout=120)
    assert (run.returncode, err) == (INTERRUPTED, "")
    assert "Stopped after decision 2 of 4 (host alone)." in out
    store = tmp_path / "run" / "run.sqlite"
    check_whole(store)
    assert column(store, "SELECT status FROM run") == ["interrupted"]
    assert ends(store) == [("grown", "finished", 4), ("host alone", "interrupted", 2)]
    assert column(store, "SELECT round FROM episode WHERE test_accuracy IS NOT NULL") == [0]
    assert made(store) == [0, 1, 2, 3]
    assert made(store, 1) == [0, 1]
    # The one network that was finished is shown.
    assert "Test split" in out
    assert re.search(r"grown +│ +\d+\.\d%", out)


@pytest.mark.parametrize("number", SIGNALS)
def test_only_while_it_watches(number):
    before = [signal.getsignal(n) for n in SIGNALS]
    interrupt = Interrupt()
    with interrupt.watching():
        signal.raise_signal(number)
        assert interrupt.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert [signal.getsignal(n) for n in SIGNALS] == before
    # An error inside gives the old handlers back as well.
    with pytest.raises(RuntimeError, match="inside"), Interrupt().watching():
        raise RuntimeError("inside")
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_outside_a_run_ctrl_c_ends_at_once(monkeypatch, capsys):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr("esper.tolaria.tasks.DATASETS", {"digits": lambda seed: interrupted()})
    assert main(["tasks"]) == INTERRUPTED
    assert capsys.readouterr().err == "esper: stopped at once\n"
