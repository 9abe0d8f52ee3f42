"""Files that are whole or absent, their checksums, and folders that one process has to itself."""

import contextlib
import fcntl
import hashlib
import os
import re
from pathlib import Path

from esper.leyline.errors import EsperError

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
"""Names under which files are written."""


def digest(data: bytes) -> str:
    """Checksum of a file, or of what it says."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write to a temporary name beside `path`, sync, and rename.

    Raises
    ------
    EsperError
        The file cannot be written; nothing is left behind, and what was there before stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise _cannot_write(path, error) from error
        raise


def is_leftover(file: Path) -> bool:
    """Whether a file is what `write_atomic` was writing: if nobody is, a process was killed in it."""
    return _TEMPORARY.fullmatch(file.name) is not None and file.is_file()


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed left in a folder; nobody else may be writing there."""
    for file in filter(is_leftover, folder.glob(".*.tmp")):
        file.unlink()


def hold_folder(path: Path) -> int:
    """Keep a folder to this process, until the descriptor that is returned is closed or the process ends.

    Raises
    ------
    EsperError
        Another process holds it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise EsperError(
            f"{path} is in use by a run that is still going on; stop it, or name another folder"
        ) from error
    except OSError:
        # Not every network file system has locks: there nobody is held off.
        pass
    return descriptor


def _cannot_write(path: Path, error: OSError) -> EsperError:
    return EsperError(f"cannot write {path}: {error.strerror or error}; free the disk or choose another folder")
