"""Squeeze and excitation, against the formula written with torch's own layers."""

import pytest
import torch
from row_twins import BATCH, Case, cases, drawn, exact, lanes, rows_apart, same_as_twins
from torch import nn

from esper.kasmina.rows.core import Statistics
from esper.kasmina.rows.excite import RowExcite

EXTENT = {0: (), 1: (7,), 2: (5, 4)}
CASES = [Case(f"{axes} axes", RowExcite(6, 3, axes), (6, *EXTENT[axes]), min(axes, 1)) for axes in EXTENT]


class Twin(nn.Module):
    """x * tanh(W2 relu(W1 mean(x) + b1) + b2)."""

    def __init__(self):
        super().__init__()
        self.squeeze = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 6))

    def forward(self, x):
        squeezed = x.mean(tuple(range(2, x.dim()))) if x.dim() > 2 else x
        return torch.einsum("bc...,bc->bc...", x, self.squeeze(squeezed).tanh())


@exact
@lanes
@cases(*CASES)
def test_equals_its_plain_module(case, lanes, dtype):
    same_as_twins(case, lanes, dtype)


@exact
@cases(*CASES)
def test_is_the_formula(case, dtype):
    same_as_twins(case, 3, dtype, Twin)


@cases(*CASES)
def test_a_sick_lane_stays_alone(case):
    rows_apart(case)


def run(case, theta):
    x = torch.randn(2, BATCH, *case.example) if case.axis == 0 else torch.randn(BATCH, 12, *case.example[1:])
    return x, case.layer.forward(x, case.layer.split(theta), (), statistics=Statistics.UPDATED)


@cases(*CASES)
def test_starts_at_zero_and_can_leave_it(case):
    values = drawn(case.layer, 2)
    theta = torch.cat([value.flatten(1) for value in values.values()], 1).float().requires_grad_()
    _, y = run(case, theta)
    assert (y == 0).all()
    y.sum().backward()
    grads = dict(zip(values, case.layer.split(theta.grad), strict=True))
    # The last layer moves at once; the first must wait for it.
    assert grads["squeeze.2.weight"].abs().sum() > 0
    assert grads["squeeze.2.bias"].abs().min() > 0
    assert (grads["squeeze.0.weight"] == 0).all()


@cases(*CASES)
def test_never_larger_than_its_input(case):
    x, y = run(case, 50 * torch.randn(2, case.layer.parameter_count))
    assert (y.abs() <= x.abs()).all()


@cases(*CASES)
def test_count_and_cost(case):
    # 6 to 3 and back, with biases; the cost does not depend on the extent, as means and products are not counted.
    assert case.layer.parameter_count == (6 * 3 + 3) + (3 * 6 + 6)
    assert case.layer.cost(case.example) == 2 * 6 * 3
    assert case.layer.output_shape(case.example) == case.example


@pytest.mark.parametrize("part", ["squeeze.0", "squeeze.2"])
def test_only_matrices_decay(part):
    layer = CASES[1].layer
    parts = dict(zip((p.name for p in layer.params), layer.split(layer.decay_mask()[None]), strict=True))
    assert parts[f"{part}.weight"].all()
    assert not parts[f"{part}.bias"].any()
