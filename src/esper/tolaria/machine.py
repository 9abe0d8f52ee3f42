"""Settings of the process that the speed of small tensors depends on."""

from __future__ import annotations

import ctypes

import torch

from esper.leyline.errors import EsperError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MMAP_LARGEST = 32 * 2**20
"""The largest threshold that glibc accepts, in bytes."""


def tune_process(threads: int) -> bool:
    """Set torch's threads, and keep freed activations in the process instead of returning them at every step.

    Large activations are otherwise unmapped and faulted in again at each update, worth up to 2x on a CPU.

    Returns
    -------
    bool
        Whether the allocator took the settings (glibc does).
    """
    torch.set_num_threads(threads)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_LARGEST)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def check_device(name: str) -> None:
    """Refuse a device that this machine does not have.

    Raises
    ------
    EsperError
        The name is no device, or the device is not there.
    """
    if name == "cpu":
        return
    if name != "cuda":
        raise EsperError(f"device: unknown device {name!r}; use cpu or cuda")
    if not torch.cuda.is_available():
        raise EsperError("device: cuda asked for, but this machine has none that torch can use; use cpu")
