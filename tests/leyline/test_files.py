"""Files that are whole or absent, on a disk that is full, slow to sync or not writable."""

import contextlib
import errno
import os
import resource
import stat
from pathlib import Path

import pytest

from esper.leyline.errors import EsperError
from esper.leyline.files import write_atomic

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def file_size_limit(size):
    """Let no file grow beyond `size` bytes: a write is cut short there, and the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def is_one_clear_line(caught, path):
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"cannot write {path}: ")
    assert message.endswith("; free the disk or choose another folder")


@pytest.mark.parametrize("data", [b"", b"one line\n", bytes(range(256)) * 4096], ids=["empty", "line", "1 MiB"])
def test_content(tmp_path, data):
    path = tmp_path / "file"
    write_atomic(path, data)
    assert path.read_bytes() == data
    assert names(tmp_path) == ["file"]


def test_replaces_what_was_there(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"a longer first content")
    write_atomic(path, b"second")
    assert path.read_bytes() == b"second"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path, mask):
    path = tmp_path / "file"
    with umask(mask):
        write_atomic(path, b"x")
        write_atomic(path, b"y")
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_synced_before_it_is_renamed(tmp_path, monkeypatch):
    calls = []
    path = tmp_path / "file"
    fsync, replace = os.fsync, os.replace

    def watched_fsync(number):
        # All of the content is with the system before it is asked to keep it.
        calls.append(("fsync", os.fstat(number).st_size))
        fsync(number)

    def watched_replace(source, target):
        calls.append(("replace", Path(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    write_atomic(path, b"12345")
    assert calls == [("fsync", 5), ("replace", path)]


class FullDisk:
    """A file that takes half of what it is given."""

    def __init__(self, file):
        self._file = file

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, data):
        self._file.write(data[: len(data) // 2])
        self._file.flush()
        raise NO_SPACE


def fail_at_open(monkeypatch):
    def full(self, *args, **kwargs):
        raise NO_SPACE

    monkeypatch.setattr(Path, "open", full)


def fail_at_write(monkeypatch):
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: FullDisk(opened(self, *a, **k)))


def fail_at_fsync(monkeypatch):
    def full(number):
        raise NO_SPACE

    monkeypatch.setattr(os, "fsync", full)


def fail_at_rename(monkeypatch):
    def full(source, target):
        raise NO_SPACE

    monkeypatch.setattr(os, "replace", full)


FAILURES = [fail_at_open, fail_at_write, fail_at_fsync, fail_at_rename]


@pytest.mark.parametrize("fail", FAILURES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("before", [None, b"what was there"], ids=["new", "old"])
def test_full_disk_leaves_nothing_and_keeps_the_old(tmp_path, monkeypatch, fail, before):
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)
    with monkeypatch.context() as patch:
        fail(patch)
        with pytest.raises(EsperError) as caught:
            write_atomic(path, b"new content")
    is_one_clear_line(caught, path)
    assert os.strerror(errno.ENOSPC) in str(caught.value)
    assert names(tmp_path) == ([] if before is None else ["file"])
    assert before is None or path.read_bytes() == before
    # Once there is room again, the same write works.
    write_atomic(path, b"new content")
    assert path.read_bytes() == b"new content"


def test_file_size_limit_leaves_nothing_and_keeps_the_old(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with file_size_limit(1000), pytest.raises(EsperError) as caught:
        write_atomic(path, bytes(100_000))
    is_one_clear_line(caught, path)
    assert names(tmp_path) == ["file"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_interrupt_leaves_nothing_and_keeps_the_old(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, b"new content")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_cleaning_up_may_fail_too(tmp_path, monkeypatch):
    path = tmp_path / "file"
    monkeypatch.setattr(Path, "unlink", lambda self: (_ for _ in ()).throw(PermissionError(13, "denied")))
    fail_at_fsync(monkeypatch)
    with pytest.raises(EsperError) as caught:
        write_atomic(path, b"x")
    assert os.strerror(errno.ENOSPC) in str(caught.value)


def test_where_nothing_can_be_written(tmp_path):
    a_file = tmp_path / "a file"
    a_file.write_text("x")
    a_folder = tmp_path / "a folder"
    a_folder.mkdir()
    for path in (tmp_path / "missing" / "file", a_file / "file", a_folder):
        with pytest.raises(EsperError) as caught:
            write_atomic(path, b"x")
        is_one_clear_line(caught, path)
    assert names(tmp_path) == ["a file", "a folder"]
    assert names(a_folder) == []


def test_an_error_without_a_text_of_the_system(tmp_path, monkeypatch):
    def fail(number):
        raise OSError("the disk went away")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(EsperError) as caught:
        write_atomic(tmp_path / "file", b"x")
    is_one_clear_line(caught, tmp_path / "file")
    assert "the disk went away" in str(caught.value)
