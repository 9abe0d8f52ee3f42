"""Files that are whole or absent."""

import contextlib
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Self

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


class LineFile:
    """A file that grows by whole lines: a line that does not fit on the disk leaves nothing of itself.

    Parameters
    ----------
    path
        Created empty.

    Raises
    ------
    EsperError
        The file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: IO[bytes] = path.open("wb", buffering=0)
        except OSError as error:
            raise _cannot_write(path, error) from error
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()

    def write(self, line: str) -> None:
        """Append one line."""
        data = line.encode() + b"\n"
        try:
            written = 0
            while written < len(data):
                written += self._file.write(data[written:]) or 0
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
                self._file.seek(self._end)
            raise _cannot_write(self.path, error) from error
        self._end += len(data)


def _cannot_write(path: Path, error: OSError) -> EsperError:
    return EsperError(f"cannot write {path}: {error.strerror or error}; free the disk or choose another folder")
