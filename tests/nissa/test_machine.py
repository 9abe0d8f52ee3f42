"""What a run says of its software and its machine, beside git, psutil and the schema."""

import os
import re
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch

import esper
from esper.nissa import machine
from esper.nissa.machine import MachineSampler, hardware, software, store_files
from helpers.run_stores import RUN, empty_database

ROOT = Path(esper.__file__).parents[2]
GIBIBYTE = 2**30


def git(folder, *arguments):
    who = ("-c", "user.name=Nobody", "-c", "user.email=nobody@example.org")
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def columns_of(table):
    with empty_database() as db:
        return {name: (kind, bool(must)) for _, name, kind, must, _, _ in db.execute(f"PRAGMA table_info({table})")}


def fits(values, columns):
    """Check that the schema takes these values."""
    kinds = {"TEXT": str, "INTEGER": int, "REAL": float}
    for name, value in values.items():
        kind, must = columns[name]
        assert isinstance(value, kinds[kind]) if value is not None else not must, name


def test_what_it_says_are_columns_of_the_run():
    said = {**software(), **hardware("cpu")}
    fits(said, columns_of("run"))
    assert set(software()).isdisjoint(hardware("cpu"))
    # With the settings of the run and what the store itself keeps, nothing that must be there is missing.
    kept = {"id", "status", "started_unix_s", "heartbeat_unix_s", "heartbeat_late_s", "flushes", "stalls", "stall_s"}
    settings = {"run_id", "command", "task", "host", "controller", "seed", "config", "level", "planned_decisions"}
    must = {name for name, (_, must) in columns_of("run").items() if must} | {"id"}
    assert must <= set(said) | kept | settings
    assert set(RUN) - settings <= set(said)


def test_software():
    said = software()
    assert said["esper_version"] == esper.__version__
    assert said["torch_version"] == torch.__version__
    assert said["python_version"].startswith("3.")


def test_hardware_without_a_gpu():
    said = hardware("cpu")
    assert (said["device"], said["accelerator"]) == ("cpu", None)
    assert said["process_id"] == os.getpid()
    assert said["threads"] == torch.get_num_threads()
    assert said["processors"] == os.cpu_count()
    assert said["machine"] == os.uname().nodename
    assert said["platform"].split() == [os.uname().sysname, os.uname().release, os.uname().machine]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_the_commit_of_this_checkout():
    changed = git(ROOT, "status", "--porcelain", "--untracked-files=no") != ""
    assert software()["commit_hash"] == git(ROOT, "rev-parse", "HEAD") + ("+" if changed else "")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Let the source lie in a new folder, which becomes a repository as git is asked to make one."""
    (tmp_path / "machine.py").write_text("as it was\n")
    (tmp_path / "other.py").write_text("as it was\n")
    monkeypatch.setattr(machine, "_SOURCE", tmp_path)
    # No repository further up counts.
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return tmp_path


def commit(folder):
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "First")
    return git(folder, "rev-parse", "HEAD")


def test_a_copy_outside_of_git_has_no_commit(repository):
    assert software()["commit_hash"] is None


def test_files_that_were_changed_are_marked(repository):
    head = commit(repository)
    assert re.fullmatch("[0-9a-f]{40}", head)
    assert software()["commit_hash"] == head
    (repository / "new.py").write_text("git was told nothing of it\n")
    assert software()["commit_hash"] == head
    (repository / "other.py").write_text("changed\n")
    assert software()["commit_hash"] == f"{head}+"


def test_an_installed_copy_in_somebody_elses_repository_has_no_commit(repository):
    source = repository / ".venv" / "esper"
    source.mkdir(parents=True)
    (repository / ".gitignore").write_text(".venv\n")
    (source / "machine.py").write_text("installed\n")
    commit(repository)
    machine._SOURCE = source
    assert software()["commit_hash"] is None


def test_a_repository_without_a_commit_has_none(repository):
    git(repository, "init", "--quiet")
    git(repository, "add", ".")
    assert software()["commit_hash"] is None


def test_a_machine_without_git_has_no_commit(repository, monkeypatch):
    commit(repository)
    monkeypatch.setenv("PATH", str(repository / "empty"))
    assert software()["commit_hash"] is None


def test_a_sample_has_the_columns_of_machine(tmp_path):
    store = tmp_path / "run.sqlite"
    store.write_bytes(bytes(1000))
    sampler = MachineSampler(store)
    start = time.process_time()
    while time.process_time() - start < 0.3:
        sum(range(1000))
    said = sampler.sample()
    columns = columns_of("machine")
    fits(said, columns)
    assert set(said) | {"unix_s"} == set(columns)
    assert 0 <= said["processor_share"] <= 1
    # It computed all the time, on one processor unless others took it away.
    assert 0 < said["process_processors"] <= os.cpu_count()
    assert 0.01 * GIBIBYTE < said["memory_bytes"] < psutil.virtual_memory().total
    assert 0 < said["memory_free_bytes"] < psutil.virtual_memory().total
    assert 0 < said["disk_free_bytes"] < 1e18
    if not torch.cuda.is_initialized():
        assert said["accelerator_memory_bytes"] is None
        assert said["accelerator_free_bytes"] is None


def test_the_size_of_a_store_counts_what_lies_beside_it(tmp_path):
    store = tmp_path / "run.sqlite"
    store.write_bytes(bytes(1000))
    sampler = MachineSampler(store)
    assert sampler.sample()["store_bytes"] == 1000
    (tmp_path / "run.sqlite-wal").write_bytes(bytes(200))
    (tmp_path / "run.sqlite-shm").write_bytes(bytes(30))
    (tmp_path / "model.safetensors").write_bytes(bytes(5))
    assert sampler.sample()["store_bytes"] == 1230
    assert [file.name for file in store_files(store)] == ["run.sqlite", "run.sqlite-wal", "run.sqlite-shm"]


def test_the_memory_of_a_process_is_its_own(tmp_path):
    store = tmp_path / "run.sqlite"
    sampler = MachineSampler(store)
    before = sampler.sample()["memory_bytes"]
    held = bytearray(os.urandom(2**26))
    grown = sampler.sample()["memory_bytes"] - before
    assert len(held) == 2**26
    assert 2**25 < grown < 2**28
