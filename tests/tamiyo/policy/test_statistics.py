"""Running statistics of features against numpy's of all data at once."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.tamiyo.policy.statistics import LARGEST, LEAST_DEVIATION, RunningStatistics

NAN, INF = float("nan"), float("inf")
K = 4
MEANS, DEVIATIONS = torch.tensor([0.0, -3.0, 1e4, 0.5]), torch.tensor([1.0, 10.0, 0.1, 1e-2])
SEEDS = st.integers(0, 2**40)


def data_of(seed: int, rows: int, unknown: float = 0.2, infinite: float = 0.1) -> torch.Tensor:
    """Float64 [rows, K] with some entries NaN and some infinite."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, K, generator=generator, dtype=torch.float64) * DEVIATIONS + MEANS
    x[torch.rand(rows, K, generator=generator) < unknown] = NAN
    x[torch.rand(rows, K, generator=generator) < infinite / K] = INF
    return torch.where(torch.rand(rows, K, generator=generator) < 0.5, x, -x) if infinite else x


def updated(*batches: torch.Tensor) -> RunningStatistics:
    """Statistics of several updates."""
    statistics = RunningStatistics(K)
    for batch in batches:
        statistics.update(batch)
    return statistics


def cut(x: torch.Tensor, places: list[int]) -> list[torch.Tensor]:
    """Cut rows at sorted places; some pieces may be empty."""
    edges = [0, *sorted(min(p, len(x)) for p in places), len(x)]
    return [x[a:b] for a, b in itertools.pairwise(edges)]


def assert_statistics_of(statistics: RunningStatistics, x: torch.Tensor) -> None:
    """Mean and population deviation are numpy's over the known entries of rows without an inf."""
    kept = x[~x.isinf().any(1)].numpy()
    for k in range(K):
        column = kept[~np.isnan(kept[:, k]), k]
        assert statistics.count[k] == len(column)
        mean, deviation = (column.mean(), column.std()) if len(column) else (0.0, 0.0)
        assert float(statistics.mean[k]) == pytest.approx(mean, rel=1e-10, abs=1e-10)
        found = (statistics.square[k] / statistics.count[k].clamp_min(1)).sqrt()
        assert float(found) == pytest.approx(deviation, rel=1e-6, abs=1e-7)
        scale = 1 / max(deviation, LEAST_DEVIATION) if len(column) > 1 else 1.0
        assert float(statistics.shift[k]) == pytest.approx(mean, rel=1e-6, abs=1e-10)
        assert float(statistics.scale[k]) == pytest.approx(scale, rel=1e-5)


@given(seed=SEEDS, rows=st.integers(0, 60), places=st.lists(st.integers(0, 60), max_size=6))
def test_several_updates_equal_numpy_over_all_data(seed: int, rows: int, places: list[int]) -> None:
    x = data_of(seed, rows)
    assert_statistics_of(updated(*cut(x, places)), x)


@given(seed=SEEDS, places=st.lists(st.integers(0, 40), max_size=5), others=st.lists(st.integers(0, 40), max_size=5))
def test_order_and_cutting_of_batches_do_not_matter(seed: int, places: list[int], others: list[int]) -> None:
    x = data_of(seed, 40)
    shuffled = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))]
    one, other = updated(*cut(x, places)), updated(*cut(shuffled, others))
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=1e-6, atol=1e-9)


def test_leading_axes_do_not_matter() -> None:
    x = data_of(3, 24)
    flat, folded = updated(x), updated(x.reshape(2, 3, 4, K))
    torch.testing.assert_close(flat.state_dict(), folded.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(updated(*x).state_dict(), flat.state_dict(), rtol=1e-6, atol=1e-9)


def test_a_large_mean_costs_no_digits_of_the_deviation() -> None:
    x = data_of(5, 2000, 0.0, 0.0) + 1e6
    statistics = updated(*x.split(10))
    deviation = (statistics.square / statistics.count).sqrt()
    torch.testing.assert_close(deviation, x.std(0, correction=0), rtol=1e-6, atol=0)


def test_nan_leaves_out_an_entry_and_inf_a_row() -> None:
    x = torch.tensor([[1.0, 2, 3, 4], [3, NAN, 5, 8], [INF, 100, 100, 100], [100, NAN, -INF, 100]])
    statistics = updated(x)
    assert statistics.count.tolist() == [2, 1, 2, 2]
    assert statistics.mean.tolist() == [2, 2, 4, 6]
    assert statistics.scale.tolist() == [1, 1, 1, 0.5]


@pytest.mark.parametrize("x", [torch.full((3, K), NAN), torch.full((3, K), INF), torch.zeros(0, K)])
def test_nothing_known_changes_nothing(x: torch.Tensor) -> None:
    fresh = RunningStatistics(K)
    torch.testing.assert_close(updated(x).state_dict(), fresh.state_dict(), rtol=0, atol=0)
    some = data_of(1, 20)
    torch.testing.assert_close(updated(some, x).state_dict(), updated(some).state_dict(), rtol=0, atol=0)


def test_before_any_update_it_only_clamps() -> None:
    x = torch.tensor([[0.0, -0.25, 4.999, 5.0], [5.1, -7.0, 1e30, -1e30], [NAN, INF, -INF, 1e-30]])
    expected = torch.tensor([[0.0, -0.25, 4.999, 5.0], [5.0, -5.0, 5.0, -5.0], [0.0, 5.0, -5.0, 1e-30]])
    assert torch.equal(RunningStatistics(K)(x), expected)


@given(seed=SEEDS, rows=st.integers(2, 40))
def test_forward_normalises_and_clamps(seed: int, rows: int) -> None:
    statistics, x = updated(data_of(seed, 50)), data_of(seed + 1, rows).float()
    y = statistics(x)
    assert y.dtype == torch.float32
    assert y.shape == x.shape
    deviation = (statistics.square / statistics.count).sqrt().clamp_min(LEAST_DEVIATION)
    expected = ((x.double() - statistics.mean) / deviation).clamp(-LARGEST, LARGEST)
    # Of a feature around 1e4, float32 keeps three digits behind the point.
    torch.testing.assert_close(y.double(), expected.masked_fill(x.isnan(), 0.0), rtol=1e-5, atol=2e-2)
    torch.testing.assert_close(y[:, [0, 1, 3]].double(), expected[:, [0, 1, 3]].nan_to_num(0.0), rtol=1e-5, atol=1e-5)
    assert y.abs().max() <= LARGEST == 5.0
    assert (y[x.isnan()] == 0).all()


@pytest.mark.parametrize("value", [0.0, 1.0, -1e-3, 0.1, 1e6])
@pytest.mark.parametrize("size", [1, 1000])
def test_a_constant_feature_does_not_blow_up(value: float, size: int) -> None:
    statistics = updated(*[torch.full((size, K), value)] * 3)
    assert torch.isfinite(statistics.scale).all()
    assert (statistics.scale <= 1 / LEAST_DEVIATION * (1 + 1e-6)).all()
    x = torch.full((2, K), value)
    assert torch.equal(statistics(x), torch.zeros(2, K))
    assert (statistics(x + 1) == LARGEST).all()


def test_one_observation_sets_no_scale() -> None:
    statistics = updated(torch.tensor([1.0, 2.0, NAN, 4.0]))
    assert statistics.scale.tolist() == [1.0] * K
    assert statistics.shift.tolist() == [1.0, 2.0, 0.0, 4.0]


def test_forward_never_changes_the_buffers() -> None:
    statistics = updated(data_of(1, 20))
    before = {name: value.clone() for name, value in statistics.state_dict().items()}
    x = data_of(2, 200).float()
    kept = x.clone()
    for _ in range(3):
        statistics.train()(x)
        statistics.eval()(x)
    torch.testing.assert_close(statistics.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(x, kept, rtol=0, atol=0, equal_nan=True)


def test_update_does_not_write_what_it_is_given() -> None:
    x = data_of(2, 50)
    before = x.clone()
    updated(x, x.float().requires_grad_())
    torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)


def test_state_dict_round_trip() -> None:
    statistics, more, x = updated(data_of(1, 20)), data_of(2, 20), data_of(3, 20).float()
    other = RunningStatistics(K)
    other.load_state_dict(statistics.state_dict())
    assert torch.equal(other(x), statistics(x))
    statistics.update(more)
    assert not torch.equal(other(x), statistics(x))
    other.update(more)
    torch.testing.assert_close(other.state_dict(), statistics.state_dict(), rtol=0, atol=0)
    assert torch.equal(other(x), statistics(x))


def test_nothing_is_learned_and_nothing_read_back() -> None:
    statistics = updated(data_of(1, 20))
    assert not list(statistics.parameters())
    assert not any(value.requires_grad for value in statistics.state_dict().values())
    # Tensors on the meta device have no values: reading one raises.
    statistics = RunningStatistics(K).to("meta")
    statistics.update(torch.zeros(3, K, device="meta"))
    assert statistics(torch.zeros(2, 3, K, device="meta")).shape == (2, 3, K)
