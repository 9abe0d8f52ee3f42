"""Checkpoints: a folder each, whole or absent; what is damaged is found by its checksum, and the one before it is used.

    checkpoints/00000012/manifest.json    facts, and size and checksum of every file
                         ...              the files
    checkpoints/LATEST                    the name of the newest

A checkpoint is written under a temporary name, synced and renamed, and only then named in LATEST: whenever the process
is killed, the newest whole checkpoint is one of the last two.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError

from esper import __version__
from esper.leyline.config import Frozen
from esper.leyline.errors import EsperError
from esper.leyline.files import digest, write_atomic
from esper.leyline.sealed import Sealed

FOLDER, MANIFEST, LATEST = "checkpoints", "manifest.json", "LATEST"
KEPT = 2
"""Checkpoints that stay: the newest, and one to fall back on."""
_DIGITS = 8
_SOFTWARE = {"Esper": __version__, "torch": str(torch.__version__)}


class _File(Frozen):
    size_bytes: Annotated[int, Field(ge=0)]
    blake2b: str


class _Manifest(Sealed):
    format: Literal[1] = 1
    number: Annotated[int, Field(ge=0)]
    facts: dict[str, Any]
    files: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], _File]
    software: dict[str, str]
    """Versions that it was made with."""


@dataclass(frozen=True)
class Checkpoint:
    """What was saved.

    Attributes
    ----------
    number
        Grows with every checkpoint of a run.
    facts
        Plain values.
    files
        Contents by name.
    """

    number: int
    facts: dict[str, Any]
    files: dict[str, bytes]


class Checkpoints:
    """The checkpoints of one run.

    Parameters
    ----------
    run
        Folder of the run.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / FOLDER

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint; one with its number, from before a crash, is replaced. Older ones but `KEPT` go.

        Raises
        ------
        EsperError
            It cannot be written; those that were there before stay.
        """
        name = f"{checkpoint.number:0{_DIGITS}}"
        path, temporary = self.folder / name, self.folder / f".{name}.tmp"
        described = {n: _File(size_bytes=len(data), blake2b=digest(data)) for n, data in checkpoint.files.items()}
        manifest = _Manifest(
            number=checkpoint.number, facts=checkpoint.facts, files=described, software=_SOFTWARE
        ).sealed()
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            for file, data in {**checkpoint.files, MANIFEST: manifest.model_dump_json(indent=1).encode()}.items():
                _write(temporary / file, data)
            _sync(temporary)
            if path.exists():
                shutil.rmtree(path)
            os.rename(temporary, path)
            _sync(self.folder)
        except OSError as error:
            with contextlib.suppress(OSError):
                shutil.rmtree(temporary)
            reason = error.strerror or error
            raise EsperError(
                f"checkpoint: cannot write {path}: {reason}; free the disk or choose another folder"
            ) from error
        write_atomic(self.folder / LATEST, (name + "\n").encode())
        for old in [*self._names()[:-KEPT], *self._begun()]:
            shutil.rmtree(self.folder / old, ignore_errors=True)

    def load(self, report: Callable[[str], None]) -> Checkpoint | None:
        """Read the newest whole checkpoint, None where there is none.

        `report` is told of each that is passed over, and of other versions of what computes.
        """
        for name in reversed(self._names()):
            try:
                return _read(self.folder / name, report)
            except (OSError, ValueError) as error:
                report(f"checkpoint {self.folder / name} is not used: {error}")
        return None

    def remove(self) -> None:
        """Remove every checkpoint; files that are not Esper's stay."""
        with contextlib.suppress(FileNotFoundError):
            (self.folder / LATEST).unlink()
        for name in [*self._names(), *self._begun()]:
            shutil.rmtree(self.folder / name)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _begun(self) -> list[str]:
        """Names of checkpoints that were never finished."""
        return [path.name for path in self.folder.glob(".*.tmp") if path.is_dir()]

    def _names(self) -> list[str]:
        """Names of the checkpoints, the oldest first."""
        try:
            return sorted(p.name for p in self.folder.iterdir() if p.name.isdecimal() and len(p.name) == _DIGITS)
        except OSError:
            return []


def _read(path: Path, report: Callable[[str], None]) -> Checkpoint:
    """Read a checkpoint, every byte checked.

    Raises
    ------
    OSError, ValueError
        It is damaged, in words.
    """
    try:
        manifest = _Manifest.model_validate_json((path / MANIFEST).read_bytes())
    except ValidationError as error:
        raise ValueError(f"{MANIFEST} is damaged or of another version") from error
    except OSError as error:
        raise ValueError(f"{MANIFEST}: {error.strerror or error}") from error
    if not manifest.whole:
        raise ValueError(f"{MANIFEST} does not have the checksum that it was written with")
    contents = {}
    for name, told in manifest.files.items():
        try:
            data = (path / name).read_bytes()
        except OSError as error:
            raise ValueError(f"{name}: {error.strerror or error}") from error
        if len(data) != told.size_bytes:
            raise ValueError(f"{name} has {len(data):,} bytes instead of {told.size_bytes:,}")
        if digest(data) != told.blake2b:
            raise ValueError(f"{name} does not have the checksum that it was written with")
        contents[name] = data
    for name, now in _SOFTWARE.items():
        before = manifest.software.get(name)
        if before != now:
            report(f"checkpoint {path} was made with {name} {before}, this is {now}: what follows may differ from then")
    return Checkpoint(manifest.number, manifest.facts, contents)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make the names in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
