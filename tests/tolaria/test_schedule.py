"""The learning rate of a run."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.leyline.config import OptimizerConfig
from esper.tolaria.schedule import rate_factor

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
