"""Checkpoints survive whatever happens while they are written, and nothing damaged is ever used."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper.leyline.errors import EsperError
from esper.tolaria import checkpoints as module
from esper.tolaria.checkpoints import FOLDER, KEPT, LATEST, MANIFEST, Checkpoint, Checkpoints

OPERATIONS = {
    "mkdir": (Path, "mkdir"),
    "open": (Path, "open"),
    "fsync": (os, "fsync"),
    "rename": (os, "rename"),
    "replace": (os, "replace"),
    "rmtree": (shutil, "rmtree"),
    "os.open": (os, "open"),
    "unlink": (Path, "unlink"),
}


def made(number, size=100):
    facts = {"rounds": number, "best": 0.1 * number, "name": "Grün"}
    return Checkpoint(number, facts, {"a.bin": bytes([number]) * size, "b.bin": b"", "c.json": b"{}"})


def nobody(line):
    raise AssertionError(line)


class Killed(BaseException):
    """The process is gone: nothing of it runs any more, no cleaning up either."""


class Files:
    """Counts file operations, and does something else at one of them."""

    def __init__(self, monkeypatch, at, act):
        self.count, self.at, self.act = 0, at, act
        self.dead = False
        for owner, name in OPERATIONS.values():
            monkeypatch.setattr(owner, name, self.watched(getattr(owner, name)))

    def watched(self, whole):
        def call(*args, **kwargs):
            if self.dead:
                raise Killed
            self.count += 1
            if self.count == self.at:
                self.act(self, whole, args, kwargs)
            return whole(*args, **kwargs)

        return call


def kill(files, whole, args, kwargs):
    files.dead = True
    raise Killed


def kill_after(files, whole, args, kwargs):
    opened = whole(*args, **kwargs)
    if hasattr(opened, "close"):
        # As the system does for a process that is gone.
        opened.close()
    kill(files, whole, args, kwargs)


def no_space(files, whole, args, kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def complaint(kept):
    """What saving the second one complains of."""
    try:
        kept.save(made(2))
    except EsperError as error:
        return str(error)
    return None


def test_what_was_saved_is_loaded(tmp_path):
    kept = Checkpoints(tmp_path)
    assert kept.load(nobody) is None
    for number in range(5):
        kept.save(made(number))
        assert kept.load(nobody) == made(number)
    names = [f"{number:08}" for number in range(5 - KEPT, 5)]
    assert sorted(os.listdir(tmp_path / FOLDER)) == sorted([*names, LATEST])
    assert (tmp_path / FOLDER / LATEST).read_text() == "00000004\n"


def test_other_versions_are_told_of(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(module._SOFTWARE, "torch", "1.0")
        Checkpoints(tmp_path).save(made(1))
    said = []
    assert Checkpoints(tmp_path).load(said.append) == made(1)
    assert len(said) == 1
    path = tmp_path / FOLDER / "00000001"
    now = torch.__version__
    told = f"checkpoint {path} was made with torch 1.0, this is {now}: what follows may differ from then"
    assert said == [told]


def test_a_number_can_be_written_again(tmp_path):
    kept = Checkpoints(tmp_path)
    kept.save(made(1, size=10))
    kept.save(made(1, size=20))
    assert kept.load(nobody) == made(1, size=20)


@pytest.mark.parametrize("act", [kill, kill_after])
def test_killed_at_any_file_operation_there_is_a_whole_one(tmp_path, act):
    """The one before or the new one, complete; and the next can be saved. Until there is no operation left."""
    ends = []
    for at in range(1, 200):
        run = tmp_path / str(at)
        Checkpoints(run).save(made(1))
        Checkpoints(run).save(made(2))
        with pytest.MonkeyPatch.context() as patch:
            files = Files(patch, at, act)
            try:
                Checkpoints(run).save(made(3))
            except Killed:
                pass
            else:
                break
        found = Checkpoints(run).load(nobody)
        assert found in (made(2), made(3))
        ends.append(found.number)
        Checkpoints(run).save(made(3))
        Checkpoints(run).save(made(4))
        assert Checkpoints(run).load(nobody) == made(4)
        assert not list((run / FOLDER).glob(".*"))
    assert len(ends) == files.count
    # First the old one is found, from some operation on the new one.
    assert ends == sorted(ends)
    assert set(ends) == {2, 3}


def test_a_disk_that_is_full_at_any_operation_leaves_the_last_one(tmp_path):
    refused = 0
    for at in range(1, 200):
        run = tmp_path / str(at)
        Checkpoints(run).save(made(1))
        with pytest.MonkeyPatch.context() as patch:
            files = Files(patch, at, no_space)
            said = complaint(Checkpoints(run))
            refused += said is not None
            assert said is None or said.endswith(": No space left on device; free the disk or choose another folder")
            if files.count < at:
                break
        assert Checkpoints(run).load(nobody) in (made(1), made(2))
    assert refused > 10


def test_a_folder_that_cannot_be_written_is_said_in_one_line(tmp_path):
    (tmp_path / FOLDER).write_text("a file")
    with pytest.raises(EsperError, match=r"checkpoint: cannot write .*; free the disk or choose another folder"):
        Checkpoints(tmp_path).save(made(1))


def two(run):
    Checkpoints(run).save(made(1))
    Checkpoints(run).save(made(2))
    return run / FOLDER / "00000002"


def passed_over(run):
    """What is said of the damaged one; the one before it is used."""
    said = []
    assert Checkpoints(run).load(said.append) == made(1)
    (line,) = said
    assert line.startswith(f"checkpoint {run / FOLDER / '00000002'} is not used: ")
    assert "\n" not in line
    return line


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_changed_bit_is_found(tmp_path_factory, data):
    run = tmp_path_factory.mktemp("run")
    folder = two(run)
    path = folder / data.draw(st.sampled_from([MANIFEST, "a.bin", "c.json"]))
    content = bytearray(path.read_bytes())
    at, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    content[at] ^= 1 << bit
    path.write_bytes(content)
    # A space for a space, or such, in the manifest changes nothing that it says: then it may be used.
    said = []
    found = Checkpoints(run).load(said.append)
    assert found == made(1) or (found == made(2) and path.name == MANIFEST)
    assert len(said) == 2 - found.number


@pytest.mark.parametrize("name", [MANIFEST, "a.bin", "c.json"])
@pytest.mark.parametrize("left", [0.0, 0.5, 0.99])
def test_a_file_that_was_cut_is_named(tmp_path, name, left):
    path = two(tmp_path) / name
    content = path.read_bytes()
    path.write_bytes(content[: int(left * len(content))])
    assert name in passed_over(tmp_path)


@pytest.mark.parametrize("name", [MANIFEST, "a.bin", "b.bin"])
def test_a_file_that_is_gone_is_named(tmp_path, name):
    (two(tmp_path) / name).unlink()
    assert name in passed_over(tmp_path)


def test_files_that_belong_to_nobody_do_not_matter(tmp_path):
    two(tmp_path)
    for name in ("notes", "00000003x", "123", ".00000009.tmp"):
        (tmp_path / FOLDER / name).mkdir()
    assert Checkpoints(tmp_path).load(nobody) == made(2)


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", ".hidden", "a/b", ""])
def test_no_file_outside_its_folder_is_read(tmp_path, name):
    folder = two(tmp_path)
    manifest = module._Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    lying = manifest.model_copy(update={"files": {name: module._File(size_bytes=0, blake2b="")}})
    (folder / MANIFEST).write_text(lying.sealed().model_dump_json())
    assert MANIFEST in passed_over(tmp_path)
