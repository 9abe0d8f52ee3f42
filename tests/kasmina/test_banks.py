"""Banks: who is a lane, what a survivor keeps, and what a newcomer starts with."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.kasmina.banks import Bank
from esper.kasmina.rows.core import RowLayer, RowSequential
from esper.kasmina.rows.dense import RowLinear
from esper.kasmina.rows.norms import RowBatchNorm
from esper.leyline.streams import Stream

LAYER = RowSequential(RowLinear(3, 4), RowBatchNorm(4, 0), RowLinear(4, 2, zero=True))
STREAM = Stream(5, "lanes")
INIT_ID_R = torch.tensor([10, 11, 12, 10, 14, 15])
STATE = ("theta", "first", "second", "steps", "norm_sum")

Lane = tuple[int, int]
"""(row, seed id)."""


def hold(bank: Bank, *lanes: Lane, init_id_R: torch.Tensor = INIT_ID_R, stream: Stream = STREAM) -> bool:
    row, seed_id = (np.array([lane[i] for lane in lanes], dtype=np.int64) for i in (0, 1))
    return bank.hold(row, seed_id, stream, init_id_R)


def bank_of(*lanes: Lane, layer: RowLayer = LAYER, dtype: torch.dtype = torch.float64, **kwargs) -> Bank:
    bank = Bank(layer, "cpu", dtype)
    hold(bank, *lanes, **kwargs)
    return bank


def everything(bank: Bank) -> list[torch.Tensor]:
    return [getattr(bank, name).detach() for name in STATE] + bank.buffers


def scribble(bank: Bank, seed: int) -> None:
    """Give every lane numbers of its own, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in everything(bank):
            tensor.copy_(1000 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64))


def test_an_empty_bank_has_no_lanes():
    bank = Bank(LAYER, "cpu", torch.float32)
    assert len(bank) == 0
    assert bank.theta.shape == (0, LAYER.parameter_count)
    assert not hold(bank)


def test_holding_the_same_lanes_changes_nothing():
    bank = bank_of((0, 0), (2, 1))
    scribble(bank, 0)
    before = everything(bank)
    theta = bank.theta
    assert not hold(bank, (0, 0), (2, 1))
    assert bank.theta is theta
    for old, new in zip(before, everything(bank), strict=True):
        assert new is old or new.data_ptr() == old.data_ptr()


def test_a_change_is_told_and_the_lanes_are_named():
    bank = Bank(LAYER, "cpu", torch.float64)
    assert hold(bank, (1, 0), (4, 2))
    assert bank.row.tolist() == bank.row_N.tolist() == [1, 4]
    assert bank.seed_id.tolist() == [0, 2]
    assert len(bank) == 2
    assert hold(bank, (1, 0))
    assert hold(bank, (1, 1)), "another seed in the same row is another lane"
    assert hold(bank)
    assert len(bank) == 0


memberships = st.lists(st.dictionaries(st.integers(0, 5), st.integers(0, 2)), min_size=2, max_size=8)


@given(memberships)
def test_survivors_keep_everything_and_newcomers_start_afresh(steps):
    """Against a dictionary of lanes, forgotten when they leave; every bank change is followed by some training."""
    bank, model = Bank(LAYER, "cpu", torch.float64), {}
    for number, chosen in enumerate(steps):
        lanes = sorted(chosen.items())
        changed = hold(bank, *lanes)
        assert changed == (lanes != list(model))
        fresh = {lane: [t[0].clone() for t in everything(bank_of(lane))] for lane in lanes}
        model = {lane: model.get(lane, fresh[lane]) for lane in lanes}
        tensors = everything(bank)
        assert all(len(t) == len(lanes) for t in tensors)
        for i, lane in enumerate(lanes):
            for told, expected in zip(tensors, model[lane], strict=True):
                assert torch.equal(told[i], expected)
        assert bank.theta.is_leaf
        assert bank.theta.requires_grad or not lanes
        assert bank.scratch.shape == bank.theta.shape
        scribble(bank, number)
        model = {lane: [t[i].clone() for t in everything(bank)] for i, lane in enumerate(lanes)}


def test_a_newcomer_has_no_history():
    bank = bank_of((3, 1))
    scribble(bank, 1)
    hold(bank, (2, 0), (3, 1), (5, 0))
    for lane in (0, 2):
        for name in ("first", "second", "steps", "norm_sum"):
            assert not getattr(bank, name)[lane].any(), name
        mean, variance = (b[lane] for b in bank.buffers)
        assert (mean == 0).all()
        assert (variance == 1).all()
    assert bank.first[1].all()


def test_who_leaves_and_comes_back_is_as_at_the_start():
    bank = bank_of((1, 0), (2, 0))
    start = bank.theta.detach().clone()
    scribble(bank, 2)
    hold(bank, (2, 0))
    hold(bank, (1, 0), (2, 0))
    assert torch.equal(bank.theta[0], start[0])
    assert not torch.equal(bank.theta[1], start[1])
    assert bank.steps[0] == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 6, 50])
def test_initial_values_depend_on_nobody_else(dtype, count):
    """Bit for bit, whatever the number of lanes: vectorised kernels must not round differently."""
    ids = torch.arange(100, 160)
    bank = bank_of(*[(row, 7) for row in range(count)], dtype=dtype, init_id_R=ids)
    for row in range(count):
        alone = bank_of((row, 7), dtype=dtype, init_id_R=ids)
        assert torch.equal(bank.theta[row], alone.theta[0])


def test_initial_values_follow_the_initialisation_and_the_seed_id_and_not_the_row():
    bank = bank_of((0, 1), (1, 1), (3, 1), (4, 2))
    elsewhere = bank_of((2, 2), init_id_R=torch.tensor([0, 0, 14]))
    assert torch.equal(bank.theta[0], bank.theta[2]), "rows 0 and 3 have the same initialisation id"
    assert torch.equal(bank.theta[3], elsewhere.theta[0]), "another row of that id"
    different = [
        bank.theta[0],
        bank.theta[1],
        bank.theta[3],
        bank_of((0, 2)).theta[0],
        bank_of((0, 1), stream=Stream(6, "lanes")).theta[0],
        bank_of((0, 1), stream=Stream(5, "others")).theta[0],
    ]
    for i, one in enumerate(different):
        for other in different[:i]:
            assert not torch.equal(one, other)


def test_initial_values_fill_the_declared_ranges():
    layer = RowSequential(RowLinear(40, 30), RowBatchNorm(30, 0), RowLinear(30, 2, zero=True))
    bank = bank_of((0, 0), (1, 0), layer=layer)
    for spec, values in zip(layer.params, layer.split(bank.theta.detach()), strict=True):
        assert values.shape == (2, *spec.shape)
        assert (values >= spec.low).all()
        assert (values <= spec.high).all()
        if spec.low == spec.high:
            assert (values == spec.low).all()
        elif spec.size > 100:
            assert values.min() < 0.98 * spec.low
            assert values.max() > 0.98 * spec.high
            assert abs(values.mean()) < 0.1 * spec.high


def test_the_dtype_changes_only_the_rounding():
    wide, narrow = (bank_of((0, 0), (1, 0), dtype=dtype) for dtype in (torch.float64, torch.float32))
    assert narrow.theta.dtype == torch.float32
    assert (wide.theta - narrow.theta).abs().max() < 1e-7


def test_weight_decay_applies_to_matrices_alone():
    (bank,) = [bank_of((0, 0))]
    decayed = {spec.name for spec, d in zip(LAYER.params, LAYER.split(bank.decay_P[None]), strict=True) if d.all()}
    untouched = {
        spec.name for spec, d in zip(LAYER.params, LAYER.split(bank.decay_P[None]), strict=True) if not d.any()
    }
    assert decayed == {"0.weight", "2.weight"}
    assert decayed | untouched == {spec.name for spec in LAYER.params}
