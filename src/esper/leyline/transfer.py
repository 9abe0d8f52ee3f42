"""Carrying tensors from the device to the host together: one transfer for all that a decision has to say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Cargo = dict[str, np.ndarray]
"""What arrived, by name, in the dtypes it had."""


@dataclass(frozen=True)
class Parcel:
    """Tensors packed into one on the device; later changes to them do not reach it.

    Attributes
    ----------
    packed
        Float64 [N]: it holds every value of the dtypes in use exactly (integers up to 2**53).
    contents
        Shape and dtype of each tensor, in order.
    """

    packed: Tensor
    contents: dict[str, tuple[torch.Size, torch.dtype]]

    @classmethod
    def pack(cls, tensors: Mapping[str, Tensor]) -> Parcel:
        """Pack tensors of one device."""
        packed = torch.cat([t.detach().reshape(-1).double() for t in tensors.values()])
        return cls(packed, {name: (t.shape, t.dtype) for name, t in tensors.items()})

    def unpack(self, arrived: Tensor) -> Cargo:
        """Cut up what arrived on the host."""
        pieces = arrived.split([shape.numel() for shape, _ in self.contents.values()])
        return {
            name: piece.to(dtype).numpy().reshape(shape)
            for (name, (shape, dtype)), piece in zip(self.contents.items(), pieces, strict=True)
        }


def deliver(*parcels: Parcel) -> tuple[Cargo, ...]:
    """Bring parcels to the host, in one transfer."""
    arrived = torch.cat([parcel.packed for parcel in parcels]).cpu()
    pieces = arrived.split([len(parcel.packed) for parcel in parcels])
    return tuple(parcel.unpack(piece) for parcel, piece in zip(parcels, pieces, strict=True))
