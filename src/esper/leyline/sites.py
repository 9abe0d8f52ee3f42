"""Sites of a host and the names of its slots."""

from dataclasses import dataclass

import torch

from esper.leyline.actions import BLUEPRINTS_OF_KIND, Blueprint, SiteKind
from esper.leyline.errors import EsperError


@dataclass(frozen=True)
class Site:
    """A place between two segments of a host where one seed can live.

    Parameters
    ----------
    kind
        What flows through it.
    width
        Features (vector, tokens) or channels (signal, image).
    extent
        Size of the remaining axes of one example: () for vectors, (L,), (H, W) or (T,).
    depth
        Number of segments before it, counted from 1.
    """

    kind: SiteKind
    width: int
    extent: tuple[int, ...]
    depth: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example at this site, features first except for tokens."""
        if self.kind is SiteKind.TOKENS:
            return (*self.extent, self.width)
        return (self.width, *self.extent)


@dataclass(frozen=True)
class SlotConfig:
    """Names and kinds of the slots of one host, in action order."""

    slot_ids: tuple[str, ...]
    sites: tuple[Site, ...]

    @classmethod
    def of_chain(cls, sites: tuple[Site, ...]) -> "SlotConfig":
        """Name the sites of a chain of segments r0c0, r0c1, ... (row-major order is the action order)."""
        return cls(tuple(f"r0c{column}" for column in range(len(sites))), sites)

    @property
    def slots(self) -> int:
        """Number of slots."""
        return len(self.slot_ids)


def fit_table(config: SlotConfig, allowed: frozenset[Blueprint]) -> torch.Tensor:
    """Bool [slots, blueprints]: which of the allowed blueprints fit which slot.

    Raises
    ------
    EsperError
        No allowed blueprint fits any slot.
    """
    fits = [[b in allowed and b in BLUEPRINTS_OF_KIND[site.kind] for b in Blueprint] for site in config.sites]
    fits_SB = torch.tensor(fits, dtype=torch.bool).reshape(config.slots, len(Blueprint))
    if not fits_SB.any():
        kinds = {site.kind for site in config.sites}
        fitting = ", ".join(b.name.lower() for b in Blueprint if any(b in BLUEPRINTS_OF_KIND[k] for k in kinds))
        named = ", ".join(sorted(b.name.lower() for b in allowed)) or "nothing"
        raise EsperError(f"blueprints: none of {named} fits this host's sites; these fit: {fitting}")
    return fits_SB
