"""Properties of many cases: few in the ordinary suite, very many under `make fuzz`."""

import functools
import os
from collections import Counter

from hypothesis import HealthCheck, Phase, given, settings

LONG = os.environ.get("ESPER_FUZZ") == "1"
"""`make fuzz`: as many cases as a property is worth, others each time."""
COUNTS: Counter[str] = Counter()
"""Cases that were tried, by test."""


def cases(few: int, many: int, **strategies):
    """Try a property on `few` cases, always the same ones; on `many` under `make fuzz`."""

    def decorate(test):
        @functools.wraps(test)
        def counted(*args, **kwargs):
            COUNTS[test.__name__] += 1
            test(*args, **kwargs)

        # Shrinking what trains takes minutes, and the suite only has to say that something is wrong.
        phases = [Phase.explicit, Phase.reuse, Phase.generate, *([Phase.shrink] if LONG else [])]
        chosen = settings(
            max_examples=many if LONG else few,
            derandomize=not LONG,
            phases=phases,
            suppress_health_check=list(HealthCheck),
            deadline=None,
        )
        return chosen(given(**strategies)(counted))

    return decorate


def also(test: str, number: int) -> None:
    """Count cases that a test tried without `cases`."""
    COUNTS[test] += number


def one_line(error: BaseException) -> str:
    """Give what a user reads of an error: one line that a terminal shows as it is."""
    said = str(error)
    assert said.isprintable(), repr(said)
    assert len(said) < 10_000, len(said)
    return said
