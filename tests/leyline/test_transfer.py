"""Parcels: what was packed on the device arrives bit by bit, in one transfer."""

import numpy as np
import pytest
import torch

from esper.leyline.transfer import Parcel, deliver

NAN, INF = float("nan"), float("inf")
BITS = {np.dtype(np.float32): np.int32, np.dtype(np.float64): np.int64}
"""An integer of the same size."""
VALUES = {
    torch.bool: [True, False, True, True],
    torch.int64: [0, -1, 2**53, -(2**53), 2**53 - 1, 7],
    torch.float32: [NAN, INF, -INF, 0.0, -0.0, 1 / 3, 1e-45, 3.4028234e38],
    torch.float64: [NAN, INF, -INF, 0.0, -0.0, 1 / 3, 5e-324, 1.7976931348623157e308],
}
DTYPES = tuple(VALUES)


def assert_same(array: np.ndarray, tensor: torch.Tensor) -> None:
    """Same shape, dtype and bits."""
    expected = tensor.detach().contiguous().numpy()
    assert array.shape == tuple(tensor.shape)
    assert array.dtype == expected.dtype
    kind = BITS.get(array.dtype, array.dtype)
    assert np.array_equal(np.ascontiguousarray(array).reshape(-1).view(kind), expected.reshape(-1).view(kind))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_value_arrives_bit_by_bit(dtype: torch.dtype) -> None:
    sent = torch.tensor(VALUES[dtype], dtype=dtype)
    (cargo,) = deliver(Parcel.pack({"x": sent}))
    assert_same(cargo["x"], sent)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0, 2), (1,), (4,), (2, 3), (2, 1, 3, 2)])
def test_every_shape_arrives(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    sent = (torch.arange(torch.Size(shape).numel()).reshape(shape) - 2).to(dtype)
    (cargo,) = deliver(Parcel.pack({"before": torch.tensor(5), "x": sent, "after": torch.tensor([0.5])}))
    assert_same(cargo["x"], sent)
    assert_same(cargo["before"], torch.tensor(5))
    assert_same(cargo["after"], torch.tensor([0.5]))


def test_tensors_of_all_dtypes_keep_their_names_and_their_order() -> None:
    tensors = {str(dtype): torch.tensor(values, dtype=dtype).reshape(2, -1) for dtype, values in VALUES.items()}
    (cargo,) = deliver(Parcel.pack(tensors))
    assert list(cargo) == list(tensors)
    for name, tensor in tensors.items():
        assert_same(cargo[name], tensor)


def test_how_a_tensor_lies_in_memory_does_not_matter() -> None:
    table = torch.arange(12.0).reshape(3, 4)
    sent = {"turned": table.T, "column": table[:, 1], "wide": table[0].expand(5, -1), "grad": table.requires_grad_()}
    (cargo,) = deliver(Parcel.pack(sent))
    for name, tensor in sent.items():
        assert_same(cargo[name], tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_later_changes_do_not_arrive(dtype: torch.dtype) -> None:
    # A single float64 tensor needs no conversion: it is copied all the same.
    sent = torch.tensor(VALUES[dtype], dtype=dtype)
    before = sent.clone()
    parcel = Parcel.pack({"x": sent})
    sent.fill_(1)
    (cargo,) = deliver(parcel)
    assert_same(cargo["x"], before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_arrived_is_nobody_elses(dtype: torch.dtype) -> None:
    sent = torch.tensor(VALUES[dtype], dtype=dtype)
    before, parcel = sent.clone(), Parcel.pack({"x": sent, "y": sent})
    (first,) = deliver(parcel)
    first["x"][...] = 1
    (second,) = deliver(parcel)
    for tensor in (first["y"], second["x"], second["y"], sent.numpy()):
        assert_same(tensor, before)


def test_several_parcels_travel_in_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    transfers, cpu = [], torch.Tensor.cpu

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        transfers.append(tensor.shape)
        return cpu(tensor)

    first = {"x": torch.tensor(VALUES[torch.float32]), "many": torch.tensor(VALUES[torch.int64]).reshape(2, 3)}
    second = {"x": torch.tensor(True), "nothing": torch.zeros(0, 4)}
    third = {"x": torch.tensor(VALUES[torch.float64], dtype=torch.float64)}
    parcels = [Parcel.pack(tensors) for tensors in (first, second, third)]
    monkeypatch.setattr(torch.Tensor, "cpu", counted)
    arrived = deliver(*parcels)
    assert transfers == [(8 + 6 + 1 + 0 + 8,)]
    for cargo, tensors in zip(arrived, (first, second, third), strict=True):
        assert list(cargo) == list(tensors)
        for name, tensor in tensors.items():
            assert_same(cargo[name], tensor)


def test_packing_reads_nothing_back() -> None:
    # Tensors on the meta device have no values: reading one raises.
    parcel = Parcel.pack({"x": torch.zeros(2, 3, device="meta"), "y": torch.zeros((), dtype=torch.bool, device="meta")})
    assert parcel.packed.shape == (7,)
    assert parcel.packed.dtype == torch.float64
