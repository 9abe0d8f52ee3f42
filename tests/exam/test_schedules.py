"""The family of fixed schedules."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.exam.schedules import STARTS, Plan, family
from esper.leyline.actions import BLUEPRINTS_OF_KIND, Blueprint, SiteKind

NOOP, NORM, SMALL = Blueprint.NOOP, Blueprint.NORM, Blueprint.MLP_SMALL
ALL = frozenset(Blueprint)
KINDS = (SiteKind.VECTOR, SiteKind.SIGNAL, SiteKind.IMAGE)


@given(kind=st.sampled_from(KINDS), slots=st.integers(1, 4), horizon=st.integers(1, 100))
def test_every_plan_is_possible_and_there_once(kind, slots, horizon):
    plans = family(kind, slots, horizon, ALL)
    assert plans[0] == Plan((NOOP,) * slots, 0)
    for plan in plans:
        assert len(plan.blueprints) == slots
        assert set(plan.blueprints) <= BLUEPRINTS_OF_KIND[kind] | {NOOP}
        assert 0 <= plan.start < horizon
    if horizon >= 4:
        assert len(set(plans)) == len(plans)


def test_the_family_of_two_blueprints_and_two_slots():
    """Three sets of slots for each blueprint, three starts; the two mixtures; nothing: 2 * 3 * 3 + 2 + 1."""
    plans = family(SiteKind.VECTOR, 2, 40, frozenset({NORM, SMALL}))
    same = {
        Plan(blueprints, int(share * 40))
        for b, share in product((NORM, SMALL), STARTS)
        for blueprints in ((b, NOOP), (NOOP, b), (b, b))
    }
    assert set(plans) == same | {Plan((NOOP, NOOP), 0), Plan((NORM, SMALL), 0), Plan((SMALL, NORM), 0)}
    assert len(plans) == 21


def test_one_slot_has_no_mixtures():
    assert len(family(SiteKind.VECTOR, 1, 40, frozenset({NORM, SMALL}))) == 1 + 2 * len(STARTS)


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (Plan((NOOP, NOOP, NOOP), 0), "nothing"),
        (Plan((NORM, NOOP, NORM), 3), "norm r0c0 r0c2 from decision 3"),
        (Plan((SMALL, NOOP, NORM), 0), "mlp_small r0c0, norm r0c2 from decision 0"),
    ],
)
def test_a_plan_in_words(plan, text):
    assert plan.text(("r0c0", "r0c1", "r0c2")) == text
