"""Norms: each lane is one torch norm with its own statistics."""

import pytest
import torch
from row_twins import Case, cases, close, drawn, exact, lanes, rows_apart, same_as_twins
from torch import nn

from esper.kasmina.rows.core import Statistics
from esper.kasmina.rows.norms import RowBatchNorm, RowGroupNorm, RowLayerNorm

LAYER_NORM = [
    Case("layer norm of vectors", RowLayerNorm(6), (6,), 0),
    Case("layer norm of tokens", RowLayerNorm(6), (3, 6), 0),
]
EXTENT = {0: (), 1: (7,), 2: (5, 4)}
KIND = {0: "vectors", 1: "signals", 2: "images"}
GROUP_NORM = [
    Case(
        f"group norm of {KIND[axes]} in {groups}",
        RowGroupNorm(groups, 12, axes),
        (12, *EXTENT[axes]),
        min(axes, 1),
    )
    for axes in (0, 1, 2)
    for groups in (1, 3)
]
BATCH_NORM = [
    Case(
        f"batch norm of {KIND[axes]} {'training' if training else 'evaluating'}",
        RowBatchNorm(4, axes),
        (4, *EXTENT[axes]),
        min(axes, 1),
        training=training,
    )
    for axes in (0, 1, 2)
    for training in (True, False)
]
ALL = [*LAYER_NORM, *GROUP_NORM, *BATCH_NORM]
TORCH_BATCH_NORM = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d}


@exact
@lanes
@cases(*ALL)
def test_equals_its_plain_module(case, lanes, dtype):
    # Several passes: running statistics and gradients add up.
    same_as_twins(case, lanes, dtype, passes=4)


@exact
@cases(*LAYER_NORM)
def test_is_torch_layer_norm(case, dtype):
    same_as_twins(case, 3, dtype, lambda: nn.LayerNorm(6))


@exact
@cases(*GROUP_NORM)
def test_is_torch_group_norm(case, dtype):
    same_as_twins(case, 3, dtype, lambda: nn.GroupNorm(case.layer.groups, 12))


@exact
@cases(*BATCH_NORM)
def test_is_torch_batch_norm(case, dtype):
    same_as_twins(case, 3, dtype, lambda: TORCH_BATCH_NORM[case.layer.axes](4), passes=4)


@cases(*ALL)
def test_a_sick_lane_stays_alone(case):
    rows_apart(case)


@pytest.mark.parametrize("axes", [0, 1, 2])
def test_running_statistics_by_hand(axes):
    layer = RowBatchNorm(2, axes)
    buffers = [torch.full((1, *b.shape), b.low) for b in layer.buffers]
    values = torch.tensor([[1.0, 10.0], [3.0, 10.0]])  # two examples of two features
    x = values[None] if axes == 0 else values.view(2, 2, *[1] * axes)
    layer.forward(x, layer.split(torch.ones(1, 4)), buffers, statistics=Statistics.UPDATED)
    mean, var = buffers
    # A tenth of the way from 0 to the means 2 and 10, and from 1 to the unbiased variances 2 and 0.
    close(mean, torch.tensor([[0.2, 1.0]]))
    close(var, torch.tensor([[1.1, 0.9]]))


@pytest.mark.parametrize("axes", [0, 1, 2])
def test_evaluation_uses_the_statistics_and_leaves_them(axes):
    layer = RowBatchNorm(2, axes)
    buffers = [torch.tensor([[1.0, 0.0], [0.0, 5.0]]), torch.tensor([[4.0, 1.0], [1.0, 9.0]])]
    before = [b.clone() for b in buffers]
    x = torch.ones(2, 3, 2) if axes == 0 else torch.ones(3, 4, *EXTENT[axes])
    y = layer.forward(x, layer.split(torch.tensor([[1.0, 1.0, 0.0, 0.0]] * 2)), buffers, statistics=Statistics.RUNNING)
    per_lane = y[:, 0] if axes == 0 else y[0].flatten(1)[:, 0].view(2, 2)
    # (1 - mean) / root of the variance, feature by feature.
    torch.testing.assert_close(per_lane, torch.tensor([[0.0, 1.0], [1.0, -4 / 3]]), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(buffers, before, strict=True))


@pytest.mark.parametrize("axes", [0, 1, 2])
def test_own_statistics_are_those_of_training_and_change_nothing(axes):
    layer = RowBatchNorm(2, axes)
    theta = torch.tensor([[1.0, 2.0, 0.5, 0.0]] * 2)
    buffers = [torch.full((2, *b.shape), b.low) for b in layer.buffers]
    before = [b.clone() for b in buffers]
    x = torch.randn(2, 6, 2) if axes == 0 else torch.randn(6, 4, *EXTENT[axes])
    own = layer.forward(x, layer.split(theta), buffers, statistics=Statistics.OWN)
    assert all(torch.equal(a, b) for a, b in zip(buffers, before, strict=True))
    assert torch.equal(own, layer.forward(x, layer.split(theta), buffers, statistics=Statistics.UPDATED))
    assert not any(torch.equal(a, b) for a, b in zip(buffers, before, strict=True))


@lanes
@pytest.mark.parametrize("axes", [0, 1, 2])
def test_group_norm_of_a_single_value_is_its_bias(axes, lanes):
    layer = RowGroupNorm(1, 1, axes)
    x = 3 + torch.arange(1.0 * lanes).view(lanes, 1, 1) if axes == 0 else torch.randn(1, lanes, *[1] * axes)
    theta = torch.stack((torch.full((lanes,), 2.0), torch.arange(lanes) + 0.5), 1)
    y = layer.forward(x, layer.split(theta), (), statistics=Statistics.UPDATED)
    assert y.shape == x.shape
    assert y.flatten().tolist() == pytest.approx(theta[:, 1].tolist(), abs=1e-2)


def test_one_example_has_no_batch_statistics():
    layer = RowBatchNorm(4, 0)
    buffers = [torch.full((3, *b.shape), b.low) for b in layer.buffers]
    with pytest.raises(ValueError, match="more than 1 value"):
        layer.forward(torch.randn(3, 1, 4), layer.split(torch.ones(3, 8)), buffers, statistics=Statistics.UPDATED)


@pytest.mark.parametrize("layer", [RowLayerNorm(6), RowGroupNorm(2, 6, 1), RowBatchNorm(6, 2)])
def test_weight_and_bias_for_each_feature(layer):
    assert layer.parameter_count == 12
    assert layer.output_shape((6, 5, 4)) == (6, 5, 4)
    # Elementwise work is not counted, and a norm never decays.
    assert layer.cost((6, 5, 4)) == 0
    assert not layer.decay_mask().any()


@pytest.mark.parametrize(
    ("kind", "args"),
    [(RowLayerNorm, (6,)), (RowGroupNorm, (2, 6, 1)), (RowBatchNorm, (6, 2))],
)
def test_start(kind, args):
    plain, zero = drawn(kind(*args)), drawn(kind(*args, zero=True))
    assert (plain["weight"] == 1).all()
    assert (plain["bias"] == 0).all()
    assert all((value == 0).all() for value in zero.values())


def test_statistics_start_as_in_torch():
    ours = {b.name: (b.low, b.high) for b in RowBatchNorm(6, 2).buffers}
    torch_buffers = dict(nn.BatchNorm2d(6).named_buffers())
    torch_buffers.pop("num_batches_tracked")
    assert ours == {name: (value[0].item(), value[0].item()) for name, value in torch_buffers.items()}
