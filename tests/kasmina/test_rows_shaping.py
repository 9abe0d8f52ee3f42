"""Activation, pooling, and the step from channels to vectors."""

import pytest
import torch
from row_twins import Case, cases, exact, lanes, rows_apart, same_as_twins
from torch import nn

from esper.kasmina.rows.core import Statistics
from esper.kasmina.rows.shaping import RowGlobalMean, RowPool, RowReLU

RELU = [
    Case("relu of vectors", RowReLU(), (6,), 0),
    Case("relu of tokens", RowReLU(), (3, 6), 0),
    Case("relu of signals", RowReLU(), (4, 7), 1),
    Case("relu of images", RowReLU(), (4, 5, 4), 1),
]
TORCH_POOL = {
    ("average", 1): nn.AvgPool1d,
    ("average", 2): nn.AvgPool2d,
    ("max", 1): nn.MaxPool1d,
    ("max", 2): nn.MaxPool2d,
}
POOL = [
    Case(f"{method} pool over {extent}", RowPool(method, len(extent)), (4, *extent), 1)
    for method in ("average", "max")
    for extent in ((8,), (7,), (6, 4), (5, 3), (2, 2))
]
MEAN = [
    Case("mean of signals", RowGlobalMean(4), (4, 7), 1, axis_out=0),
    Case("mean of images", RowGlobalMean(4), (4, 5, 3), 1, axis_out=0),
]


@exact
@lanes
@cases(*RELU, *POOL, *MEAN)
def test_equals_its_plain_module(case, lanes, dtype):
    same_as_twins(case, lanes, dtype)


@exact
@cases(*RELU)
def test_is_torch_relu(case, dtype):
    same_as_twins(case, 3, dtype, nn.ReLU)


@exact
@cases(*POOL)
def test_is_torch_pooling(case, dtype):
    same_as_twins(case, 3, dtype, lambda: TORCH_POOL[case.layer.method, case.layer.axes](2))


@exact
@cases(*MEAN)
def test_is_the_mean_over_the_extent(case, dtype):
    axes = tuple(range(2, 1 + len(case.example)))
    same_as_twins(case, 3, dtype, nn.Identity, lambda _, x: x.mean(axes))


@cases(*RELU, *POOL, *MEAN)
def test_a_sick_lane_stays_alone(case):
    rows_apart(case)


@pytest.mark.parametrize("method", ["average", "max"])
def test_pooling_by_hand(method):
    x = torch.tensor([1.0, 4.0, 2.0, 2.0, 9.0]).view(1, 1, 5)
    y = RowPool(method, 1).forward(x, (), (), statistics=Statistics.RUNNING)
    # The odd last element is dropped.
    assert y.flatten().tolist() == ([2.5, 2.0] if method == "average" else [4.0, 2.0])


@pytest.mark.parametrize(
    ("layer", "shape", "output"),
    [
        (RowReLU(), (4, 5, 3), (4, 5, 3)),
        (RowPool("max", 1), (4, 9), (4, 4)),
        (RowPool("average", 2), (4, 9, 2), (4, 4, 1)),
        (RowGlobalMean(4), (4, 9), (4,)),
        (RowGlobalMean(4), (4, 9, 2), (4,)),
    ],
)
def test_output_shape(layer, shape, output):
    assert layer.output_shape(shape) == output


@pytest.mark.parametrize("layer", [RowReLU(), RowPool("max", 1), RowGlobalMean(4)])
def test_nothing_to_learn_and_nothing_to_multiply(layer):
    assert layer.parameter_count == 0
    assert layer.cost((4, 8)) == 0
    assert layer.split(torch.empty(3, 0)) == []
