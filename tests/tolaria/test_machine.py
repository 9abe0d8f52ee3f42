"""Settings of the process, and devices that are not there."""

import ctypes
import platform

import pytest
import torch

from esper.leyline.errors import EsperError
from esper.tolaria.machine import check_device, tune_process


@pytest.fixture(autouse=True)
def threads():
    """Give back the threads that the other tests run with."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


class Allocator:
    """Stands for the C library: takes every setting, or refuses the one named."""

    def __init__(self, refuses=None):
        self.calls, self.refuses = {}, refuses

    def mallopt(self, parameter, value):
        self.calls[parameter] = value
        return int(parameter != self.refuses)


def use(monkeypatch, library):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_devices_that_are_there(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_device(device)


def test_cpu_is_always_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_device("cpu")


def test_cuda_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EsperError) as caught:
        check_device("cuda")
    assert str(caught.value) == "device: cuda asked for, but this machine has none that torch can use; use cpu"


@pytest.mark.parametrize("name", ["gpu", "CPU", "cuda:0", "mps", "", "meta", "c\npu"])
def test_unknown_device(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(EsperError) as caught:
        check_device(name)
    assert str(caught.value) == f"device: unknown device {name!r}; use cpu or cuda"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads(monkeypatch, count):
    use(monkeypatch, Allocator())
    tune_process(count)
    assert torch.get_num_threads() == count


def test_threads_are_given_back(threads):
    # The tests above asked for others.
    assert torch.get_num_threads() == threads == 1


def test_freed_memory_is_kept(monkeypatch):
    allocator = Allocator()
    use(monkeypatch, allocator)
    assert tune_process(1) is True
    mmap_threshold, trim_threshold = -3, -1  # <malloc.h>
    assert allocator.calls == {mmap_threshold: 32 * 2**20, trim_threshold: 2**31 - 1}


@pytest.mark.parametrize("refuses", [-1, -3])
def test_allocator_that_refuses(monkeypatch, refuses):
    use(monkeypatch, Allocator(refuses))
    assert tune_process(1) is False


def test_a_library_without_mallopt(monkeypatch):
    use(monkeypatch, object())
    assert tune_process(1) is False
    assert torch.get_num_threads() == 1


def test_no_library(monkeypatch):
    def missing(name):
        raise OSError("no such library")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert tune_process(1) is False


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no such settings")
def test_glibc_takes_the_settings():
    assert tune_process(1) is True
