"""The family of fixed plans."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.exam.plans import MOST_SEEDS, NOTHING, Family, Plan, Seed, candidates, plan_table
from esper.leyline.actions import ALPHA_TARGETS, BLUEPRINTS_OF_KIND, TEMPOS, Blueprint, SiteKind, Style
from esper.leyline.config import HeadroomConfig
from esper.leyline.sites import Site, SlotConfig
from esper.tamiyo.controllers.plan import STAYS

NORM, SMALL, ADD = Blueprint.NORM, Blueprint.MLP_SMALL, Style.LINEAR_ADD
KINDS = (SiteKind.VECTOR, SiteKind.SIGNAL, SiteKind.IMAGE)
SHAPES = {SiteKind.VECTOR: (), SiteKind.SIGNAL: (8,), SiteKind.IMAGE: (8, 8)}


def host_of(kind, slots):
    return SlotConfig.of_chain(tuple(Site(kind, 8, SHAPES[kind], depth + 1) for depth in range(slots)))


def family_of(kind=SiteKind.VECTOR, slots=3, horizon=40, **more):
    config = HeadroomConfig.model_validate({"training": {"horizon": horizon}, **more})
    return Family.of(config, host_of(kind, slots))


@given(
    kind=st.sampled_from(KINDS),
    slots=st.integers(1, 4),
    horizon=st.integers(1, 100),
    seed=st.integers(0, 2**60),
    first=st.integers(0, 2**30),
)
def test_every_plan_that_is_drawn_is_legal(kind, slots, horizon, seed, first):
    family = family_of(kind, slots, horizon)
    for plan in (*family.sampled(20, seed, "plans", first), *family.singles()):
        assert family.misfit(plan) is None
        assert 1 <= len(plan.seeds) <= MOST_SEEDS


def test_all_that_an_action_can_choose_is_drawn():
    """Every blueprint, style, ramp, target, slot, beginning and number of seeds, culls and second seeds of a slot."""
    family = family_of()
    plans = family.sampled(4000, 0, "plans")
    seeds = [seed for plan in plans for seed in plan.seeds]
    assert {len(plan.seeds) for plan in plans} == {1, 2, 3}
    assert {(s.slot, s.blueprint, s.style) for s in seeds} == {
        (slot, b, style) for slot in range(3) for b in BLUEPRINTS_OF_KIND[SiteKind.VECTOR] for style in Style
    }
    assert {(s.tempo, s.alpha_target) for s in seeds} == {(tempo, t) for tempo in TEMPOS for t in ALPHA_TARGETS}
    stays = [s for s in seeds if s.cull is None]
    # Until a seed can no longer be committed; only after a cull one may begin later.
    assert {s.begin for s in stays} >= set(range(40 - family.committing + 1))
    assert 0.4 < sum(s.begin == 0 for s in seeds) / len(seeds) < 0.6
    assert 0.1 < 1 - len(stays) / len(seeds) < 0.2
    assert any(max(Counter(s.slot for s in plan.seeds).values()) > 1 for plan in plans)


def test_what_a_number_draws_depends_on_nothing_else():
    family = family_of()
    plans = family.sampled(30, 5, "plans")
    assert family.sampled(10, 5, "plans", 20) == plans[20:]
    assert family.sampled(30, 6, "plans") != plans
    assert family.sampled(30, 5, "other") != plans


@pytest.mark.parametrize(
    ("seeds", "misfit"),
    [
        ((Seed(3, NORM, ADD),), "there is no slot 3"),
        ((Seed(0, Blueprint.CONV_HEAVY, ADD),), "conv_heavy does not fit r0c0"),
        ((Seed(0, NORM, ADD, begin=40),), "cannot begin in r0c0 at decision 40"),
        ((Seed(0, NORM, ADD, begin=4, cull=4),), "begins at 4 cannot be culled at 4"),
        ((Seed(0, NORM, ADD, tempo=4),), "no ramp takes 4 decisions to 1"),
        ((Seed(0, NORM, ADD), Seed(0, NORM, ADD, begin=30)), "cannot begin in r0c0 at decision 30"),
        ((Seed(0, NORM, ADD, cull=3), Seed(0, NORM, ADD, begin=10)), "cannot begin in r0c0 at decision 10"),
        ((Seed(0, NORM, ADD, begin=1), Seed(1, NORM, ADD)), "in the order in which they begin"),
        ((Seed(0, NORM, ADD),) * 4, "at most 3 seeds"),
    ],
)
def test_what_no_host_can_play_is_told(seeds, misfit):
    assert misfit in family_of().misfit(Plan(seeds))


def test_a_slot_is_empty_again_after_the_embargo():
    """Culled at 3, CULLED until 4, EMBARGOED from 5 to 9, RESETTING at 10, empty at 11: see tamiyo/test_plan.py."""
    assert family_of().misfit(Plan((Seed(0, NORM, ADD, cull=3), Seed(0, NORM, ADD, begin=11)))) is None


def test_candidates_are_single_seeds_and_what_was_named_and_then_drawn_ones():
    family = family_of(blueprints=["norm", "mlp_small"])
    named = (Plan((Seed(0, NORM, ADD, tempo=8),)), Plan((Seed(0, NORM, ADD),)))
    least = candidates(family, named, 0)
    singles = {Plan((Seed(slot, b, style),)) for slot in range(3) for b in (NORM, SMALL) for style in Style}
    assert least[:3] == (NOTHING, *named)
    assert set(least) == singles | {NOTHING, named[0]}
    plans = candidates(family, named, 0, 60)
    assert plans[: len(least)] == least
    assert len(set(plans)) == 60
    assert candidates(family, named, 1, 60) != plans
    assert candidates(family, (), 0, 60)[-20:] != plans[-20:]


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (NOTHING, "nothing"),
        (Plan((Seed(0, NORM, Style.GATED_GATE),)), "norm gated_gate r0c0 at 0"),
        (
            Plan((Seed(2, SMALL, ADD, 5, 0.5, 1, 9), Seed(1, NORM, ADD, begin=3))),
            "mlp_small linear_add r0c2 at 1 over 5 to 0.5 culled at 9, norm linear_add r0c1 at 3",
        ),
    ],
)
def test_a_plan_in_words(plan, text):
    assert plan.text(("r0c0", "r0c1", "r0c2")) == text


def test_the_table_says_every_choice():
    table = plan_table([NOTHING, Plan((Seed(2, SMALL, Style.SIGMOID_ADD, 5, 0.5, 1, 9),))])
    assert table.shape == (2, MOST_SEEDS, 7)
    assert (table[0] == 0).all()
    assert table[1, 0].tolist() == [2, SMALL, Style.SIGMOID_ADD, 1, 0, 1, 9]
    assert plan_table([Plan((Seed(0, NORM, ADD),))])[0, 0, -1] == STAYS
