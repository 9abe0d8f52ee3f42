"""Alpha's way from the start of a ramp to its target, for every curve."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.kasmina.alpha import ramp_alpha, ramp_share
from esper.leyline.actions import ALPHA_SPEEDS, ALPHA_TARGETS, TEMPOS, Curve
from helpers.slot_oracle import curve_height

LENGTHS = sorted({*TEMPOS, *ALPHA_SPEEDS} - {0})
"""Every length of a ramp that an action can ask for."""
unit = st.floats(0, 1, width=32)


def share(curve: Curve, progress: torch.Tensor) -> torch.Tensor:
    return ramp_share(torch.full(progress.shape, int(curve)), progress)


def whole_ramp(curve: Curve, start: float, target: float, total: int, beyond: int = 0) -> torch.Tensor:
    """Alpha before the ramp, after each of its decisions, and `beyond` its end."""
    done = torch.arange(total + 1 + beyond)
    same = torch.full(done.shape, 1.0)
    return ramp_alpha(
        same * start, same * target, torch.full_like(done, int(curve)), done, torch.full_like(done, total)
    )


@pytest.mark.parametrize("curve", Curve)
@pytest.mark.parametrize("count", [1, 3, 16, 67], ids="{}values".format)
def test_a_curve_runs_from_exactly_0_to_exactly_1(curve, count):
    assert share(curve, torch.zeros(count)).tolist() == [0.0] * count
    assert share(curve, torch.ones(count)).tolist() == [1.0] * count


@pytest.mark.parametrize("curve", Curve)
def test_a_curve_never_falls_and_is_point_symmetric(curve):
    progress = torch.linspace(0, 1, 1001)
    height = share(curve, progress)
    assert (height.diff() >= 0).all()
    assert height[0] == 0
    assert height[-1] == 1
    assert (height + height.flip(0) - 1).abs().max() < 1e-5
    assert height[500].item() == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("curve", Curve)
def test_a_curve_has_its_shape(curve):
    heights = share(curve, torch.linspace(0, 1, 101)).tolist()
    assert heights == pytest.approx([curve_height(curve, i, 100) for i in range(101)], abs=1e-6)


def test_the_sharper_a_sigmoid_the_later_it_starts():
    order = [Curve.SIGMOID_SHARP, Curve.SIGMOID_STANDARD, Curve.SIGMOID_GENTLE, Curve.LINEAR]
    heights = [share(curve, torch.tensor([0.25])).item() for curve in order]
    assert heights == sorted(set(heights))


@given(curve=st.sampled_from(Curve), start=unit, target=unit, total=st.integers(1, 64), beyond=st.integers(0, 3))
def test_a_ramp_starts_at_its_start_moves_one_way_and_lands_on_its_target(curve, start, target, total, beyond):
    alpha = whole_ramp(curve, start, target, total, beyond)
    exact = torch.tensor([start, target])
    assert alpha[0] == exact[0]
    assert (alpha[total:] == exact[1]).all()
    steps = alpha.diff() if target >= start else -alpha.diff()
    assert (steps >= 0).all()
    assert alpha.min() >= exact.min()
    assert alpha.max() <= exact.max()


@pytest.mark.parametrize("curve", Curve)
@pytest.mark.parametrize("total", LENGTHS)
@pytest.mark.parametrize("ends", [(a, b) for a in (0.0, *ALPHA_TARGETS) for b in (0.0, *ALPHA_TARGETS) if a != b])
def test_each_decision_of_a_ramp_that_an_action_can_ask_for_moves_alpha(curve, total, ends):
    alpha = whole_ramp(curve, *ends, total)
    steps = alpha.diff() * math.copysign(1, ends[1] - ends[0])
    assert (steps > 0).all()
    assert alpha[-1] == torch.tensor(ends[1])


@pytest.mark.parametrize("curve", Curve)
def test_a_ramp_without_decisions_is_at_its_target(curve):
    assert whole_ramp(curve, 0.5, 0.7, 0).tolist() == torch.tensor([0.7]).tolist()


def test_each_element_follows_its_own_curve_and_ramp():
    generator = torch.Generator().manual_seed(0)
    shape = (5, 3)
    curve = torch.randint(len(Curve), shape, generator=generator)
    total = torch.randint(1, 9, shape, generator=generator)
    done = (torch.rand(shape, generator=generator) * (total + 1)).long()
    start, target = torch.rand(2, *shape, generator=generator)
    together = ramp_alpha(start, target, curve, done, total)
    assert len(set(curve.flatten().tolist())) == len(Curve)
    for r in range(shape[0]):
        for s in range(shape[1]):
            ramp = whole_ramp(Curve(int(curve[r, s])), start[r, s].item(), target[r, s].item(), int(total[r, s]))
            assert together[r, s].item() == pytest.approx(ramp[done[r, s]].item(), abs=1e-6)


@pytest.mark.parametrize("curve", Curve)
def test_alpha_does_not_depend_on_how_many_rows_run(curve):
    """Adding a row changes nobody else's numbers: vectorised and scalar kernels may round differently."""

    def after(done: int, total: int, rows: int) -> torch.Tensor:
        start = torch.zeros(rows, 1)
        counts = [torch.full((rows, 1), n) for n in (int(curve), done, total)]
        return ramp_alpha(start, torch.ones_like(start), *counts)

    different = {
        f"decision {done} of {total} among {rows} rows": set(among.flatten().tolist())
        for total in LENGTHS
        for done in range(total + 1)
        for rows in (7, 16, 67)
        if not torch.equal(among := after(done, total, rows), after(done, total, 1).expand(rows, 1))
    }
    assert different == {}
