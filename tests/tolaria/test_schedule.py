"""The learning rate of a run, and those of seeds that are born while it goes on."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.leyline.config import OptimizerConfig
from esper.tolaria.schedule import Rates, rate_factor

configs = st.builds(
    OptimizerConfig, warmup=st.floats(0, 0.95, exclude_max=True), final_share=st.sampled_from([0.0, 0.01, 0.3, 1.0])
)


def factors(total: int, config: OptimizerConfig) -> list[float]:
    return [rate_factor(update, total, config) for update in range(total)]


def warm_updates(total: int, config: OptimizerConfig) -> int:
    return round(config.warmup * total)


@settings(max_examples=150, derandomize=True)
@given(total=st.integers(60, 900), config=configs)
def test_a_run_of_any_length_warms_up_and_ends_at_its_final_share(total: int, config: OptimizerConfig):
    shares = factors(total, config)
    warm = warm_updates(total, config)
    assert all(0 <= share <= 1 for share in shares)
    assert all(share > 0 for share in shares[:-1])
    # In equal steps, from the first.
    steps = [later - earlier for earlier, later in itertools.pairwise([0.0, *shares[: warm + 1]])]
    assert all(step == pytest.approx(1 / (warm + 1)) for step in steps)
    assert shares[warm] == pytest.approx(1, abs=1e-12)
    falling = shares[warm:]
    assert all(later <= earlier for earlier, later in itertools.pairwise(falling))
    assert shares[-1] == pytest.approx(config.final_share, abs=1e-12)


def test_halfway_down_the_cosine():
    config = OptimizerConfig(warmup=0.0, final_share=0.2)
    assert factors(5, config) == pytest.approx([0.2 + 0.8 * (1 + math.cos(math.pi * t / 4)) / 2 for t in range(5)])
    assert rate_factor(2, 5, config) == pytest.approx(0.6)


def test_a_warm_up_by_hand():
    config = OptimizerConfig(warmup=0.3, final_share=0.0)
    assert factors(10, config)[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert factors(10, config)[-1] == pytest.approx(0.0, abs=1e-15)


def test_without_a_fall_the_rate_stays():
    assert factors(20, OptimizerConfig(warmup=0.0, final_share=1.0)) == [1.0] * 20


@pytest.mark.parametrize("total", [2, 3, 4, 7, 10, 20])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.4, 0.5, 0.8, 0.99])
def test_a_short_run_ends_at_its_final_share(total: int, warmup: float):
    """Whatever the warm-up leaves: `final_share` is promised for the run's own last update."""
    config = OptimizerConfig(warmup=warmup, final_share=0.01)
    assert factors(total, config)[-1] == pytest.approx(0.01)


PEAK = 0.02
births = st.integers(1, 58)


def curves(born: list[int], total: int, config: OptimizerConfig, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Shares [total, lanes] of the peak, 0 before the birth."""
    birth_N = torch.tensor(born)
    rates = Rates(birth_N, torch.full((len(born),), PEAK, dtype=dtype), total, config)
    return torch.stack([torch.where(birth_N <= update, rates.at(update), 0.0) for update in range(total)]) / PEAK


@settings(max_examples=100, derandomize=True)
@given(birth=births, total=st.integers(60, 900), config=configs)
def test_a_late_seed_warms_up_and_decays_over_its_own_life(birth: int, total: int, config: OptimizerConfig):
    share = curves([birth], total, config)[birth:, 0]
    floor = torch.tensor(factors(total, config), dtype=torch.float64)[birth:]
    age, life = torch.arange(len(share), dtype=torch.float64), total - birth
    rise, fall = (age + 1) / (config.warmup * life + 1), (life - age) / ((1 - config.warmup) * life)
    torch.testing.assert_close(share, torch.minimum(rise, fall).clamp_max(1).maximum(floor), rtol=1e-9, atol=1e-9)
    # One update of the warm-up or of the decay from the peak, and there is no more of it than the peak.
    step = max(1 / (config.warmup * life + 1), 1 / ((1 - config.warmup) * life))
    assert 1 - step - 1e-9 <= share.max() <= 1 + 1e-9


def test_a_seed_born_late_by_hand():
    config = OptimizerConfig(warmup=0.2, final_share=0.0)
    host = factors(20, config)
    # Ten updates left: the peak is reached in the third, and eight steps lead down from there.
    own = [1 / 3, 2 / 3, 1, *(k / 8 for k in range(7, 0, -1))]
    assert curves([10], 20, config)[10:, 0].tolist() == pytest.approx(list(map(max, own, host[10:])))
    assert host[10] > 1 / 3, "the host is still faster when the seed is born"
    assert host[15] < 0.3, "and much slower later on"


def test_a_seed_born_in_the_last_update_still_learns():
    share = curves([19], 20, OptimizerConfig(warmup=0.05, final_share=0.0))[19, 0]
    assert share == pytest.approx(1 / 1.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_learns_from_the_first_update_on_follows_the_host_bit_for_bit(dtype: torch.dtype):
    config = OptimizerConfig(warmup=0.1, final_share=0.02)
    peak_N = torch.tensor([0.005, 0.03], dtype=dtype)
    rates = Rates(torch.zeros(2, dtype=torch.int64), peak_N, 77, config)
    for update in range(77):
        assert torch.equal(rates.at(update), peak_N * rate_factor(update, 77, config))


@settings(max_examples=50, derandomize=True)
@given(born=st.lists(births, min_size=1, max_size=40), config=configs)
def test_no_lane_notices_another(born: list[int], config: OptimizerConfig):
    """To the last bit, wherever it stands among how many."""
    together = curves(born, 60, config, torch.float32)
    for lane, birth in enumerate(born):
        assert torch.equal(together[:, lane], curves([birth], 60, config, torch.float32)[:, 0])
