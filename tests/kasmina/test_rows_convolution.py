"""Convolutions: each lane is one `torch.nn.Conv1d` or `Conv2d`."""

import math

import pytest
from row_twins import Case, cases, drawn, exact, lanes, rows_apart, same_as_twins, starts_like
from torch import nn

from esper.kasmina.rows.convolution import RowConv1d, RowConv2d
from esper.kasmina.rows.core import RowSequential

ROW, TORCH = {1: RowConv1d, 2: RowConv2d}, {1: nn.Conv1d, 2: nn.Conv2d}
EXTENT = {1: (7,), 2: (5, 4)}
CASES = [
    Case(
        f"{axes}d kernel {kernel} groups {groups}{'' if bias else ' no bias'}",
        ROW[axes](4, 6, kernel, groups=groups, bias=bias),
        (4, *EXTENT[axes]),
        1,
    )
    for axes in (1, 2)
    for kernel in (1, 3, 5)
    for groups in (1, 2)
    for bias in (True, False)
]
CASES += [
    Case("1d depthwise", RowConv1d(4, 4, 3, groups=4), (4, 7), 1),
    Case("2d depthwise", RowConv2d(4, 4, 3, groups=4, bias=False), (4, 5, 4), 1),
    Case("1d kernel wider than the signal", RowConv1d(2, 3, 5), (2, 2), 1),
    Case("2d one channel, one place", RowConv2d(1, 2, 3), (1, 1, 1), 1),
    # An extent that each place sees whole is computed as one product, unless that would be too large.
    Case("1d two places", RowConv1d(4, 6, 3, groups=2), (4, 2), 1),
    Case("2d two by two", RowConv2d(4, 6, 3), (4, 2, 2), 1),
    Case("2d two by two, one example", RowConv2d(4, 6, 3, bias=False), (4, 2, 2), 1, batch=1),
    Case("2d two by one", RowConv2d(4, 6, 3, groups=2), (4, 2, 1), 1),
    Case("2d two by two, depthwise", RowConv2d(4, 4, 3, groups=4), (4, 2, 2), 1),
    Case("2d three by two in a kernel of 5", RowConv2d(4, 6, 5), (4, 3, 2), 1),
    Case("2d two by two, many channels", RowConv2d(12, 16, 3), (12, 2, 2), 1),
    Case("2d two by three, one too long", RowConv2d(4, 6, 3), (4, 2, 3), 1),
    Case(
        "2d two by two, behind a kernel of 1",
        RowSequential(RowConv2d(4, 6, 1), RowConv2d(6, 6, 3, groups=6), RowConv2d(6, 3, 3)),
        (4, 2, 2),
        1,
    ),
    # A kernel of 1 is computed as a product, which moves axes about: those of size 1 are easily lost.
    Case("1d pointwise, one place", RowConv1d(4, 6, 1), (4, 1), 1),
    Case("2d pointwise, one place", RowConv2d(4, 6, 1, bias=False), (4, 1, 1), 1),
    Case("2d pointwise, one example", RowConv2d(4, 6, 1), (4, 5, 4), 1, batch=1),
    Case("2d pointwise, one channel", RowConv2d(1, 1, 1), (1, 5, 4), 1),
    Case("2d zero at the start", RowConv2d(4, 6, 3, zero=True), (4, 5, 4), 1),
]


def torch_conv(layer):
    return TORCH[layer.axes](
        layer.in_channels,
        layer.out_channels,
        layer.kernel,
        padding="same",
        groups=layer.groups,
        bias=layer.bias,
    )


@exact
@lanes
@cases(*CASES)
def test_equals_its_plain_module(case, lanes, dtype):
    same_as_twins(case, lanes, dtype)


@exact
@cases(*(case for case in CASES if not isinstance(case.layer, RowSequential)))
def test_is_torch_convolution(case, dtype):
    same_as_twins(case, 3, dtype, lambda: torch_conv(case.layer))


@cases(*CASES)
def test_a_sick_lane_stays_alone(case):
    rows_apart(case)


@pytest.mark.parametrize(
    ("layer", "count"),
    [
        (RowConv1d(4, 6, 3), 6 * 4 * 3 + 6),
        (RowConv2d(4, 6, 3), 6 * 4 * 9 + 6),
        # Each output sees the two inputs of its group.
        (RowConv2d(4, 6, 3, groups=2), 6 * 2 * 9 + 6),
        (RowConv2d(4, 4, 5, groups=4, bias=False), 4 * 25),
    ],
)
def test_parameter_count(layer, count):
    assert layer.parameter_count == count


@pytest.mark.parametrize(
    ("layer", "shape", "cost"),
    [
        # Seven places, each 6 outputs of 4 inputs and 3 taps; padding counts, a bias does not.
        (RowConv1d(4, 6, 3), (4, 7), 7 * 6 * 4 * 3),
        (RowConv2d(4, 6, 1), (4, 5, 7), 35 * 6 * 4),
        (RowConv2d(4, 6, 3, groups=2), (4, 5, 7), 35 * 6 * 2 * 9),
        (RowConv2d(4, 4, 3, groups=4, bias=False), (4, 5, 7), 35 * 4 * 9),
    ],
)
def test_cost(layer, shape, cost):
    assert layer.cost(shape) == cost


@pytest.mark.parametrize("kernel", [1, 3, 5, 15])
def test_the_extent_is_kept(kernel):
    assert RowConv1d(4, 6, kernel).output_shape((4, 7)) == (6, 7)
    assert RowConv2d(4, 6, kernel).output_shape((4, 5, 8)) == (6, 5, 8)


@pytest.mark.parametrize(
    ("layer", "fan_in"),
    [(RowConv1d(20, 16, 3), 20 * 3), (RowConv2d(20, 16, 3, groups=2), 10 * 9), (RowConv2d(20, 16, 1), 20)],
)
def test_starts_like_torch(layer, fan_in):
    starts_like(layer, lambda: torch_conv(layer), count=200)
    assert all(value.abs().max() <= 1 / math.sqrt(fan_in) for value in drawn(layer).values())


def test_zero_means_zero():
    assert all((value == 0).all() for value in drawn(RowConv1d(4, 6, 3, zero=True)).values())


def test_only_kernels_decay():
    layer = RowConv2d(4, 6, 3)
    weight, bias = layer.split(layer.decay_mask()[None])
    assert weight.all()
    assert not bias.any()
