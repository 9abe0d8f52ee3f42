"""State as tensors by name: how a part says what its future depends on, and how it takes that back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

Tensors = dict[str, Tensor]
_BETWEEN = "/"


def taken(part: Any, names: Iterable[str]) -> Tensors:
    """Give attributes of a part by name, those whose names begin with an underscore without it."""
    return {name.lstrip("_"): getattr(part, name) for name in names}


def put_back(part: Any, names: Iterable[str], saved: Mapping[str, Tensor]) -> None:
    """Replace attributes of a part by what `taken` gave once.

    Raises
    ------
    ValueError
        Something is missing, or of another shape or dtype; the part is as it was.
    """
    found = {name: fitting(name.lstrip("_"), getattr(part, name), saved) for name in names}
    for name, tensor in found.items():
        setattr(part, name, tensor)


def fitting(name: str, present: Tensor, saved: Mapping[str, Tensor]) -> Tensor:
    """Give a copy of a saved tensor on the device of the present one, which it is to replace.

    Raises
    ------
    ValueError
        It is missing, or of another shape or dtype.
    """
    if name not in saved:
        raise ValueError(f"{name} is missing")
    tensor = saved[name]
    if (tensor.shape, tensor.dtype) != (present.shape, present.dtype):
        found, asked = (f"{t.dtype} {list(t.shape)}" for t in (tensor, present))
        raise ValueError(f"{name} is {found} instead of {asked}")
    return tensor.to(present.device, copy=True)


def under(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """Give the same tensors under longer names."""
    return {prefix + _BETWEEN + name: tensor for name, tensor in tensors.items()}


def below(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """Give those that `under` put there, under their own names."""
    start = prefix + _BETWEEN
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
