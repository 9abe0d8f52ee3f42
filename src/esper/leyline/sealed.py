"""Values that are kept in a file together with their checksum."""

from __future__ import annotations

from typing import Self

from esper.leyline.config import Frozen
from esper.leyline.files import digest


class Sealed(Frozen):
    """Knows whether anything of it was changed since it was sealed."""

    seal: str = ""
    """Checksum of all the rest."""

    def sealed(self) -> Self:
        """Give the same with its seal."""
        return self.model_copy(update={"seal": self._checksum()})

    @property
    def whole(self) -> bool:
        """The seal is that of the values."""
        return self.seal == self._checksum()

    def _checksum(self) -> str:
        return digest(self.model_dump_json(exclude={"seal"}).encode())
