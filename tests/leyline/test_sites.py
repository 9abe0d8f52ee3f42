"""Sites, slot names, and which blueprint fits which slot."""

from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.leyline.actions import BLUEPRINTS_OF_KIND, Blueprint, SiteKind
from esper.leyline.errors import EsperError
from esper.leyline.sites import Site, SlotConfig, fit_table

EXTENTS = {SiteKind.VECTOR: (), SiteKind.SIGNAL: (40,), SiteKind.IMAGE: (8, 6), SiteKind.TOKENS: (12,)}


def site(kind, depth=1):
    return Site(kind, 16, EXTENTS[kind], depth)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (SiteKind.VECTOR, (16,)),
        (SiteKind.SIGNAL, (16, 40)),
        (SiteKind.IMAGE, (16, 8, 6)),
        (SiteKind.TOKENS, (12, 16)),  # features last: tokens are [T, D]
    ],
)
def test_shape_of_one_example(kind, shape):
    assert site(kind).shape == shape


def test_a_site_can_be_a_key_and_not_be_changed():
    # Seed layers are cached by site.
    assert len({site(SiteKind.IMAGE), site(SiteKind.IMAGE), site(SiteKind.IMAGE, depth=2)}) == 2
    with pytest.raises(FrozenInstanceError):
        site(SiteKind.IMAGE).width = 3


@pytest.mark.parametrize("count", [1, 3, 12])
def test_slot_names_of_a_chain(count):
    config = SlotConfig.of_chain(tuple(site(SiteKind.VECTOR, depth) for depth in range(1, count + 1)))
    assert config.slots == count
    assert config.slot_ids == tuple(f"r0c{column}" for column in range(count))
    assert [s.depth for s in config.sites] == list(range(1, count + 1))


kinds_lists = st.lists(st.sampled_from([SiteKind.VECTOR, SiteKind.SIGNAL, SiteKind.IMAGE]), min_size=1, max_size=20)


@given(kinds_lists, st.frozensets(st.sampled_from(Blueprint)))
def test_fit_table(kinds, allowed):
    config = SlotConfig.of_chain(tuple(site(kind) for kind in kinds))
    expected = [{b for b in BLUEPRINTS_OF_KIND[kind] if b in allowed} for kind in kinds]
    if not any(expected):
        with pytest.raises(EsperError):
            fit_table(config, allowed)
        return
    table = fit_table(config, allowed)
    assert table.dtype == torch.bool
    assert table.shape == (len(kinds), 13)
    assert [{Blueprint(b) for b in range(13) if table[s, b]} for s in range(len(kinds))] == expected


def test_one_fitting_slot_is_enough():
    config = SlotConfig.of_chain((site(SiteKind.VECTOR), site(SiteKind.IMAGE)))
    table = fit_table(config, frozenset({Blueprint.CONV_LIGHT}))
    assert table.nonzero().tolist() == [[1, int(Blueprint.CONV_LIGHT)]]


def test_refusal_names_what_was_asked_and_what_would_fit():
    config = SlotConfig.of_chain((site(SiteKind.VECTOR),))
    with pytest.raises(EsperError) as refused:
        fit_table(config, frozenset({Blueprint.DEPTHWISE, Blueprint.CONV_HEAVY}))
    message = str(refused.value)
    asked, fitting = message.split(";")
    assert "\n" not in message
    assert "conv_heavy, depthwise" in asked
    for blueprint in Blueprint:
        assert (blueprint.name.lower() in fitting) is (blueprint in BLUEPRINTS_OF_KIND[SiteKind.VECTOR])


def test_refusal_of_nothing():
    with pytest.raises(EsperError, match="none of nothing fits"):
        fit_table(SlotConfig.of_chain((site(SiteKind.IMAGE),)), frozenset())
