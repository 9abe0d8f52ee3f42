"""The value output: its unit follows the targets, and no prediction moves with it."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esper.tamiyo.policy.value import LEAST_DEVIATION, MEMORY, PopArt

NAN, INF = float("nan"), float("inf")
SEEDS = st.integers(0, 2**40)
MEANS = st.sampled_from([0.0, 0.01, -3.0, 100.0])
DEVIATIONS = st.sampled_from([0.01, 0.1, 1.0, 50.0, 1e4])


def output(seed: int = 0, features: int = 8) -> PopArt:
    layer, generator = PopArt(features), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.linear.weight.normal_(generator=generator)
        layer.linear.bias.normal_(generator=generator)
    return layer


def targets(seed: int, mean: float, deviation: float, number: int = 400) -> Tensor:
    return torch.randn(number, generator=torch.Generator().manual_seed(seed)) * deviation + mean


def everything(number: int) -> Tensor:
    return torch.ones(number, dtype=torch.bool)


def taught(layer: PopArt, *batches: Tensor) -> PopArt:
    for batch in batches:
        layer.track(batch, everything(len(batch)))
    return layer


def state(layer: PopArt) -> dict[str, Tensor]:
    return copy.deepcopy(layer.state_dict())


@given(seed=SEEDS, scales=st.lists(st.tuples(MEANS, DEVIATIONS), min_size=1, max_size=6))
def test_no_prediction_moves_while_the_unit_follows(seed: int, scales: list[tuple[float, float]]) -> None:
    layer = taught(output(seed), targets(seed, 1.0, 2.0))
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(seed + 1))
    for number, (mean, deviation) in enumerate(scales):
        before = layer(x)
        taught(layer, targets(seed + number, mean, deviation))
        after = layer(x)
        assert after.dtype == torch.float32
        # Relative to the largest number that is added up on the way.
        size = max(float(before.detach().abs().max()), abs(float(layer.mean)))
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5 * size)
        # What the layer puts out is the prediction in the unit of the targets.
        told = layer.linear(x)[:, 0].double() * layer.deviation + layer.mean
        torch.testing.assert_close(told.float(), after, rtol=1e-5, atol=1e-5 * size)


@given(seed=SEEDS, mean=MEANS, deviation=DEVIATIONS)
def test_the_first_targets_count_fully(seed: int, mean: float, deviation: float) -> None:
    given_targets = targets(seed, mean, deviation)
    layer = taught(output(), given_targets)
    exact = given_targets.double()
    assert float(layer.mean) == pytest.approx(float(exact.mean()), rel=1e-9, abs=1e-12)
    assert float(layer.deviation) == pytest.approx(float(exact.std(correction=0)), rel=1e-4)
    assert float(layer.weight_sum) == pytest.approx(1 - MEMORY)
    assert float(layer.deviation) == pytest.approx(deviation, rel=0.2)


@given(seed=SEEDS, updates=st.integers(1, 12))
def test_moments_are_weighted_means_of_all_updates(seed: int, updates: int) -> None:
    batches = [targets(seed + n, float(n % 3), 0.5 + n, number=20) for n in range(updates)]
    layer = taught(output(), *batches)
    weights = [MEMORY ** (updates - 1 - n) for n in range(updates)]
    for moment, power in ((layer.mean, 1), (layer.square, 2)):
        means = [float((batch.double() ** power).mean()) for batch in batches]
        expected = sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights)
        assert float(moment) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_it_converges_to_new_targets() -> None:
    layer = taught(output(), *(targets(n, 5.0, 3.0) for n in range(5)))
    taught(layer, *(targets(n, -2.0, 0.1, 1000) for n in range(200)))
    assert float(layer.mean) == pytest.approx(-2.0, abs=0.01)
    assert float(layer.deviation) == pytest.approx(0.1, rel=0.03)
    assert float(layer.weight_sum) == pytest.approx(1.0)


@given(seed=SEEDS, share=st.floats(0.1, 1))
def test_what_does_not_count_or_is_not_finite_is_ignored(seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    clean = targets(seed, 2.0, 3.0, 60)
    counts = torch.rand(60, generator=generator) < share
    finite = torch.rand(60, generator=generator) < 0.7
    wild = torch.tensor([NAN, INF, -INF])[torch.randint(3, (60,), generator=generator)]
    hidden = torch.where(counts, torch.where(finite, clean, wild), torch.tensor([NAN, 1e30]).repeat(30))
    one, other = output(), output()
    # In any shape.
    one.track(hidden.reshape(6, 10), counts.reshape(6, 10))
    other.track(clean[counts & finite], everything(int((counts & finite).sum())))
    for name, kept in state(one).items():
        torch.testing.assert_close(kept, state(other)[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("wild", [1.0, NAN, INF])
@pytest.mark.parametrize("seed", range(5))
def test_without_targets_nothing_changes(known: bool, wild: float, seed: int) -> None:
    layer = taught(output(seed), *([targets(seed + n, 3.0, 2.0) for n in range(3)] if known else []))
    before, x = state(layer), torch.randn(10, 8)
    predicted = layer(x)
    layer.track(torch.full((5,), wild), torch.zeros(5, dtype=torch.bool))
    if wild != 1.0:
        taught(layer, torch.full((5,), wild))
    layer.track(torch.zeros(0), everything(0))
    for name, kept in state(layer).items():
        torch.testing.assert_close(kept, before[name], rtol=1e-14, atol=0)
    torch.testing.assert_close(layer(x), predicted, rtol=1e-6, atol=1e-6)


def test_before_any_target_the_unit_is_1() -> None:
    layer, x = output(), torch.randn(4, 8)
    assert (float(layer.deviation), float(layer.mean), float(layer.weight_sum)) == (1.0, 0.0, 0.0)
    assert torch.equal(layer(x), layer.linear(x)[:, 0])


@given(seed=SEEDS, mean=MEANS, deviation=DEVIATIONS)
def test_the_first_targets_give_a_unit_and_leave_the_weights(seed: int, mean: float, deviation: float) -> None:
    """Noise of the size of 1 becomes noise of the size of the targets, however small they are."""
    layer, x = output(seed), torch.randn(50, 8, generator=torch.Generator().manual_seed(seed))
    noise = layer(x).double()
    first = targets(seed, mean, deviation)
    taught(layer, first)
    expected = noise * first.double().std(correction=0) + first.double().mean()
    torch.testing.assert_close(layer(x), expected.float(), rtol=1e-4, atol=1e-5 * (abs(mean) + deviation))


def test_an_output_of_0_predicts_the_mean_of_the_first_targets() -> None:
    layer, x = PopArt(8), torch.randn(4, 8)
    with torch.no_grad():
        layer.linear.weight.zero_(), layer.linear.bias.zero_()
    taught(layer, targets(0, -3.0, 0.01))
    assert layer(x).tolist() == pytest.approx([float(layer.mean)] * 4)
    # Later ones move nothing.
    before = layer(x)
    taught(layer, targets(1, 5.0, 1.0))
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, -1e4])
@pytest.mark.parametrize("known", [False, True])
def test_equal_targets_leave_a_unit_to_divide_by(value: float, known: bool) -> None:
    layer, x = output(), torch.randn(4, 8)
    if known:
        taught(layer, torch.full((9,), value))
    before = layer(x)
    taught(layer, torch.full((9,), value), torch.full((9,), value))
    assert float(layer.deviation) == pytest.approx(LEAST_DEVIATION, rel=1e-6 if abs(value) < 10 else 10)
    expected = before if known else torch.full((4,), value)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-3)


def test_a_state_dict_carries_everything() -> None:
    layer, fresh, x = taught(output(1), targets(0, 3.0, 7.0)), output(2), torch.randn(4, 8)
    fresh.load_state_dict(state(layer))
    assert torch.equal(layer(x), fresh(x))
    for one in (layer, fresh):
        taught(one, targets(1, -1.0, 2.0))
    assert all(torch.equal(kept, state(fresh)[name]) for name, kept in state(layer).items())


def test_the_gradient_is_in_the_unit_of_the_targets() -> None:
    layer = taught(output(), targets(0, 3.0, 50.0))
    layer(torch.zeros(1, 8)).sum().backward()
    assert float(layer.linear.bias.grad) == pytest.approx(float(layer.deviation), rel=1e-6)
    assert not any(buffer.requires_grad for buffer in layer.buffers())
