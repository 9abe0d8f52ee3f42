"""The folder of a run: what is in it, that its model loads without Esper, and what it refuses to touch."""

import contextlib
import errno
import json
import os
import subprocess
import sys
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

from esper.kasmina.export import export_row
from esper.leyline.config import GateConfig, GrowthConfig, RunConfig
from esper.leyline.errors import EsperError
from esper.leyline.stages import OCCUPIED_STAGES, Stage
from esper.nissa.store import RunStore
from esper.simic.grow import ROW, Arm
from esper.simic.recorder import run_columns
from esper.simic.run_folder import RunFolder
from esper.tolaria.checkpoints import Checkpoint, Checkpoints
from helpers.command import RUN_FILES
from helpers.episodes import OPEN_GATES, TASK_NAMES, run_config, task_of
from helpers.stored import check_whole, column, stored

EMPTY = {stage.name for stage in set(Stage) - OCCUPIED_STAGES}
"""Stages of a slot without a seed, of which the table of seeds says nothing."""
tasks = pytest.mark.parametrize("task", TASK_NAMES)


def small(task="digits-mlp", **more):
    return run_config(task, "heuristic", horizon=18, updates=2, growth=OPEN_GATES, **more)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Give a function from a task to a saved run: its folder and its arm."""

    @cache
    def save(task):
        config = small(task)
        arm = Arm(config, task_of(task), "grown")
        path = tmp_path_factory.mktemp("run") / "nested" / task
        folder = RunFolder(path, config, replace=False)
        with RunStore(folder.store, run_columns(config, "grow", config.training.horizon)) as store:
            for _ in arm.run(lambda: False, store):
                pass
            folder.model(arm.episode.population, ROW)
            arm.result()
        return path, arm

    return save


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def strict(text):
    """Read JSON that must not contain what JSON does not know."""

    def refuse(constant):
        raise AssertionError(f"{constant} in the file")

    return json.loads(text, parse_constant=refuse)


@tasks
def test_every_file_is_there_and_none_besides(saved, task):
    path, _ = saved(task)
    # Checkpoints are made by whoever runs the arms.
    assert names(path) == [name for name in RUN_FILES if name != "checkpoints"]
    check_whole(path / "run.sqlite")


@tasks
def test_the_record_holds_the_whole_run(saved, task):
    path, arm = saved(task)
    store = path / "run.sqlite"
    assert column(store, "SELECT decision FROM decision ORDER BY decision") == list(range(18))
    events = stored(store, "SELECT * FROM transition ORDER BY decision, step")
    assert {event["op"] for event in events} >= {"germinate", "advance", "fossilize"}
    seeds = stored(store, "SELECT * FROM slot ORDER BY decision, slot")
    assert {seed["slot"] for seed in seeds} <= set(range(arm.task.host.slot_config.slots))
    # The last stage that an event told of is the last one of the record.
    told = {event["slot"]: event["after"] for event in events}
    last = {seed["slot"]: seed["stage"] for seed in seeds if seed["decision"] == 17}
    assert {slot: stage for slot, stage in told.items() if slot in last} == last
    assert {told[slot] for slot in set(told) - set(last)} <= EMPTY
    for name in ("config.json", "model.json"):
        strict((path / name).read_text())


@tasks
def test_the_configuration_comes_back(saved, task):
    path, arm = saved(task)
    assert RunConfig.model_validate_json((path / "config.json").read_text()) == arm.config
    (config,) = column(path / "run.sqlite", "SELECT config FROM run")
    assert RunConfig.model_validate(strict(config)) == arm.config


def test_a_configuration_without_defaults_comes_back(tmp_path):
    config = RunConfig(
        task="mnist1d",
        host="ample",
        controller="random",
        seed=2**63 - 1,
        blueprints=("norm",),
        growth=GrowthConfig(gates=GateConfig(min_contribution=-1e-300), embargo=1, incubator="straight-through"),
        device="cuda",
    )
    RunFolder(tmp_path / "run", config, replace=False)
    assert RunConfig.model_validate_json((tmp_path / "run" / "config.json").read_text()) == config


# The saved model, in a process that cannot import Esper.

LOADER = """
import json, sys
sys.modules["esper"] = None
sys.path.insert(0, ".")
import torch
torch.set_num_threads(1)
from model import load
network = load("model.safetensors", "model.json")
x, y, logits = torch.load(sys.argv[1])
with torch.no_grad():
    found = network(x)
print(json.dumps({
    "accuracy": (found.argmax(1) == y).float().mean().item(),
    "loss": torch.nn.functional.cross_entropy(found, y).item(),
    "parameters": sum(p.numel() for p in network.parameters()),
    "exact": torch.equal(found, logits),
    "training": network.training,
    "modules": sorted({type(m).__module__ for m in network.modules()}),
    "esper": [name for name in sys.modules if name.startswith("esper") and name != "esper"],
}))
"""


@tasks
def test_the_model_loads_without_esper_and_scores_the_same(saved, task, tmp_path):
    path, arm = saved(task)
    test = arm.task.data.test
    with torch.no_grad():
        logits = export_row(arm.episode.population, ROW)(test.x)
    torch.save((test.x, test.y, logits), tmp_path / "test.pt")
    run = subprocess.run(
        [sys.executable, "-I", "-c", LOADER, str(tmp_path / "test.pt")],
        cwd=path,
        env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    found = json.loads(run.stdout)
    (result,) = stored(path / "run.sqlite", "SELECT * FROM episode")
    assert found["accuracy"] == result["test_accuracy"]
    assert found["loss"] == pytest.approx(result["test_loss_nats"], rel=1e-5)
    assert found["parameters"] == result["host_parameters"] + result["added_parameters"]
    assert found["exact"]
    assert found["esper"] == []
    assert found["training"] is False
    assert all(name == "model" or name.startswith("torch.nn") for name in found["modules"])
    # Something grew, and it is in the file.
    assert found["parameters"] > arm.task.host.body.parameter_count
    assert "Grown" in (path / "model.json").read_text()


def test_the_saved_model_prints_itself(saved):
    path, arm = saved("digits-mlp")
    run = subprocess.run(
        # From another folder: the loader looks beside itself.
        [sys.executable, "-I", str(path / "model.py")],
        cwd=path.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.endswith(f"{arm.parameters:,} parameters\n")
    assert "(r0c0): Grown(" in run.stdout


def test_the_weights_are_plain_safetensors(saved):
    path, arm = saved("digits")
    state = export_row(arm.episode.population, ROW).state_dict()
    # How many batches a norm has seen matters to no network that is only used.
    state = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    stored = load_file(path / "model.safetensors")
    assert set(stored) == set(state)
    assert all(torch.equal(stored[name], state[name]) for name in state)


# What it may use and what it leaves alone.


def make(path, *, replace=False, **more):
    """Make the folder of a run that has a store, and nothing in it."""
    config = small(**more)
    folder = RunFolder(path, config, replace=replace)
    RunStore(folder.store, run_columns(config, "grow", 1)).close("finished")


def snapshot(folder):
    """Give every path below a folder with its content."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


@pytest.mark.parametrize("replace", [False, True])
def test_new_and_empty_folders_are_fine(tmp_path, replace):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        make(path, replace=replace)
        assert names(path) == ["config.json", "run.sqlite"]
    # The tables are there, and empty, before anything happens.
    for table in ("round", "episode", "decision", "slot", "transition"):
        assert stored(path / "run.sqlite", f"SELECT * FROM {table}") == []


def refusal(path, replace):
    with pytest.raises(EsperError) as caught:
        make(path, replace=replace)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_an_existing_run_is_refused_and_untouched(tmp_path):
    make(tmp_path / "run")
    (tmp_path / "run" / "model.py").write_text("of the earlier run\n")
    before = snapshot(tmp_path)
    message = refusal(tmp_path / "run", False)
    assert message == f"out: {tmp_path / 'run'} holds a run; name another folder, or add --replace to overwrite it"
    assert snapshot(tmp_path) == before


def test_an_existing_run_is_replaced_when_asked(tmp_path):
    path = tmp_path / "run"
    make(path)
    # Those beside the store are what a killed run leaves.
    for name in ("run.sqlite-wal", "run.sqlite-shm", "model.py", "model.json", "model.safetensors"):
        (path / name).write_text("of the earlier run\n")
    RunFolder(path, small(seed=5), replace=True)
    assert names(path) == ["config.json"]
    make(path, replace=True, seed=5)
    assert names(path) == ["config.json", "run.sqlite"]
    assert column(path / "run.sqlite", "SELECT seed FROM run") == [5]
    assert RunConfig.model_validate_json((path / "config.json").read_text()).seed == 5


@pytest.mark.parametrize("replace", [False, True])
def test_a_folder_with_other_files_is_refused_and_untouched(tmp_path, replace):
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "figures").mkdir()
    before = snapshot(tmp_path)
    assert refusal(tmp_path, replace) == f"out: {tmp_path} holds other files; name a new or empty folder"
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("content", ['{"model_type": "bert"}', ""])
def test_the_config_of_another_program_does_not_make_a_run(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    (tmp_path / "weights.bin").write_bytes(b"years of work")
    before = snapshot(tmp_path)
    refusal(tmp_path, True)
    assert snapshot(tmp_path) == before


def test_files_added_to_a_run_are_not_thrown_away(tmp_path):
    make(tmp_path)
    (tmp_path / "notes.md").write_text("what I thought of it")
    # Whether it refuses or works around them is its own choice.
    with contextlib.suppress(EsperError):
        make(tmp_path, replace=True)
    assert (tmp_path / "notes.md").exists()
    assert (tmp_path / "notes.md").read_text() == "what I thought of it"


def test_a_run_whose_model_was_imported_is_still_a_run(tmp_path):
    make(tmp_path)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "model.cpython-311.pyc").write_bytes(b"compiled")
    earlier = column(tmp_path / "run.sqlite", "SELECT run_id FROM run")
    make(tmp_path, replace=True)
    assert column(tmp_path / "run.sqlite", "SELECT run_id FROM run") != earlier


@pytest.mark.parametrize("replace", [False, True])
def test_a_file_is_refused_and_untouched(tmp_path, replace):
    path = tmp_path / "file"
    path.write_text("mine")
    assert refusal(path, replace) == f"out: {path} is a file; name a folder"
    message = refusal(path / "below", replace)
    assert message == f"out: cannot use {path / 'below'}: Not a directory; name a folder you may write"
    assert path.read_text() == "mine"


def test_a_folder_that_may_not_be_made(tmp_path, monkeypatch):
    def denied(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    path = tmp_path / "run"
    monkeypatch.setattr(type(path), "mkdir", denied)
    assert refusal(path, False) == f"out: cannot use {path}: Permission denied; name a folder you may write"


def test_what_was_recorded_can_be_read_while_the_run_goes_on(tmp_path):
    config = small()
    arm = Arm(config, task_of("digits-mlp"), "grown")
    folder = RunFolder(tmp_path / "run", config, replace=False)
    with RunStore(folder.store, run_columns(config, "grow", 18)) as store:
        for line, _ in arm.run(lambda: arm.episode.decision >= 3, store):
            store.flush()
            assert column(folder.store, "SELECT decision FROM decision") == list(range(line.decision + 1))
            assert column(folder.store, "SELECT decisions FROM round") == [line.decision + 1]
            assert column(folder.store, "SELECT status FROM run") == ["running"]
    # And nothing can be recorded once it is closed, though nothing breaks.
    store.add(1, lambda: pytest.fail("the store is closed"))
    store.flush()
    assert column(folder.store, "SELECT decision FROM decision") == [0, 1, 2]
    assert names(folder.path) == ["config.json", "run.sqlite"]


@pytest.mark.parametrize("how", [{"replace": False, "resume": True}, {"replace": True}], ids=["resume", "replace"])
def test_what_a_killed_process_was_writing_is_removed(tmp_path, how):
    path = tmp_path / "run"
    RunFolder(path, small(), replace=False)
    begun = [path / ".config.json.17.tmp", path / "policy-best" / ".policy.json.17.tmp"]
    begun += [path / "checkpoints" / ".LATEST.17.tmp", path / "checkpoints" / ".00000003.tmp" / "manifest.json"]
    mine = [path / "mine.tmp", path / ".mine.tmp", path / "policy-best" / "notes.17.tmp"]
    for file in (*begun, *mine):
        file.parent.mkdir(exist_ok=True)
        file.write_text("begun")
    RunFolder(path, small(), **how)
    Checkpoints(path).save(Checkpoint(4, {}, {}))
    assert not [file for file in begun if file.exists()]
    assert all(file.exists() for file in mine)
    assert not (path / "checkpoints" / ".00000003.tmp").exists()


def test_a_run_that_was_killed_in_its_first_file_can_be_begun_again(tmp_path):
    (tmp_path / ".config.json.17.tmp").write_text("begun")
    RunFolder(tmp_path, small(), replace=False)
    assert names(tmp_path) == ["config.json"]
