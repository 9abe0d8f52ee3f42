"""The one door through which data enters: what is wrong with it is said in one line, before anything is computed.

Shapes: N examples of a part, R rows, B examples of a minibatch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from esper.leyline.errors import EsperError

IGNORED = -100
"""Label of an example that does not count (padding, an unknown class); torch's own `ignore_index`."""
LARGEST_PIXEL = 255
"""Of images as bytes."""
FEWEST = {"reward_validation": 2}
"""Labels that must count in a part: standard errors of what is measured compare two at least. Elsewhere 1."""


def counts(label: Tensor) -> Tensor:
    """Give whether each label counts, a bool tensor of the same shape: the one place that knows."""
    return label != IGNORED


def entered(parts: Mapping[str, tuple[Tensor, Tensor]], classes: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Check the parts of a data set, and give them as they are computed with.

    Parameters
    ----------
    parts
        By name, inputs [N, ...] and labels [N]. Inputs are finite floats, or uint8 from 0 to 255, which become float32
        from 0 to 1. Labels are integers of any width, from 0 to classes - 1 or `IGNORED`; they become int64.
    classes
        Number of classes, two at least.

    Raises
    ------
    EsperError
        A part is not like that, is empty, has too few labels that count, or its examples have another shape than those
        of the first part.
    """
    if classes < 2:
        raise EsperError(f"data: {classes} classes; there must be two at least")
    first = next(iter(parts))
    checked = {}
    for name, (x, y) in parts.items():
        fault = _inputs_fault(x) or _labels_fault(x, y, classes, FEWEST.get(name, 1))
        if fault is None and x.shape[1:] != parts[first][0].shape[1:]:
            fault = f"examples have shape {tuple(x.shape[1:])}, those of {first} {tuple(parts[first][0].shape[1:])}"
        if fault is not None:
            raise EsperError(f"{name} split: {fault}")
        checked[name] = (x.float() / LARGEST_PIXEL if x.dtype is torch.uint8 else x, y.to(torch.int64))
    return checked


def _inputs_fault(x: Tensor) -> str | None:
    """Say what is wrong with the inputs of a part, or None."""
    if not isinstance(x, Tensor):
        return f"x is of type {type(x).__name__}; give a torch.Tensor"
    if not (x.is_floating_point() or x.dtype is torch.uint8):
        return f"x is {x.dtype}; give floats, or images as torch.uint8"
    if x.dim() < 2:
        return f"x has shape {tuple(x.shape)}; give (examples, ...)"
    if not x.numel():
        return f"x has shape {tuple(x.shape)} and is empty"
    if x.is_floating_point() and not (finite := x.isfinite()).all():
        example = int((~finite).flatten(1).any(1).nonzero()[0])
        return f"x of example {example} is not finite ({int((~finite).sum()):,} numbers of {x.numel():,} are not)"
    return None


def _labels_fault(x: Tensor, y: Tensor, classes: int, fewest: int) -> str | None:
    """Say what is wrong with the labels of a part, or None."""
    if not isinstance(y, Tensor):
        return f"y is of type {type(y).__name__}; give a torch.Tensor"
    if y.is_floating_point() or y.is_complex() or y.dtype is torch.bool:
        return f"y is {y.dtype}; give integers"
    if y.shape != x.shape[:1]:
        return f"y has shape {tuple(y.shape)}, not {tuple(x.shape[:1])}: one label for each example"
    if y.device != x.device:
        return f"x is on {x.device} and y on {y.device}"
    label_N = y.to(torch.int64)
    counted_N = counts(label_N)
    wrong_N = counted_N & ((label_N < 0) | (label_N >= classes))
    if wrong_N.any():
        example = int(wrong_N.nonzero()[0])
        return (
            f"y of example {example} is {int(label_N[example])}; "
            f"give classes from 0 to {classes - 1}, or {IGNORED} where it does not count"
        )
    if int(counted_N.sum()) < fewest:
        return f"{int(counted_N.sum())} of {math.prod(y.shape):,} labels count; at least {fewest} must"
    return None
