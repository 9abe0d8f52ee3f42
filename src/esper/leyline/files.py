"""Files that are whole or absent."""

import contextlib
import os
from pathlib import Path

from esper.leyline.errors import EsperError


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


def _cannot_write(path: Path, error: OSError) -> EsperError:
    return EsperError(f"cannot write {path}: {error.strerror or error}; free the disk or choose another folder")
