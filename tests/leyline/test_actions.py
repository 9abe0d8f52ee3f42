"""The action heads, what each operation uses of them, and which blueprint fits where."""

import pytest

from esper.leyline.actions import (
    ALPHA_SPEEDS,
    ALPHA_TARGETS,
    BLUEPRINTS_OF_KIND,
    HEAD_COUNT,
    HEADS_OF_OP,
    STYLE_CURVE,
    STYLE_OPERATOR,
    TEMPOS,
    Blueprint,
    Curve,
    Head,
    Op,
    Operator,
    SiteKind,
    Style,
    head_sizes,
)


@pytest.mark.parametrize("slots", [1, 2, 7, 20])
def test_head_sizes(slots):
    # Six operations, the slots, 13 blueprints, 4 styles, ramps of 3, 5 and 8, targets .5, .7 and 1, speeds 0, 3, 5
    # and 8, five curves; in the order of the columns.
    sizes = head_sizes(slots)
    assert [sizes[head] for head in Head] == [6, slots, 13, 4, 3, 3, 4, 5]


def test_heads_are_the_columns():
    assert [head.name for head in Head] == [
        *("OP", "SLOT", "BLUEPRINT", "STYLE", "TEMPO", "ALPHA_TARGET", "ALPHA_SPEED", "ALPHA_CURVE"),
    ]
    assert [int(head) for head in Head] == list(range(HEAD_COUNT))


# The table of the design, by head: who uses it.
USERS = {
    Head.OP: set(Op),
    Head.SLOT: set(Op) - {Op.WAIT},
    Head.BLUEPRINT: {Op.GERMINATE},
    Head.STYLE: {Op.GERMINATE},
    Head.TEMPO: {Op.GERMINATE},
    Head.ALPHA_TARGET: {Op.GERMINATE, Op.SET_ALPHA_TARGET},
    Head.ALPHA_SPEED: {Op.SET_ALPHA_TARGET, Op.CULL},
    Head.ALPHA_CURVE: {Op.SET_ALPHA_TARGET, Op.CULL},
}


def test_heads_of_op_covers_every_operation():
    assert set(HEADS_OF_OP) == set(Op)


@pytest.mark.parametrize("head", list(Head), ids=lambda h: h.name)
def test_users_of_a_head(head):
    assert {op for op, heads in HEADS_OF_OP.items() if head in heads} == USERS[head]


@pytest.mark.parametrize("enumeration", [Op, Blueprint, Operator, Curve, Style, Head])
def test_values_are_indices(enumeration):
    # A choice is a column of logits and a place in a table.
    assert [int(member) for member in enumeration] == list(range(len(enumeration)))


def test_wait_is_the_zero_action():
    # A row of zeros does nothing.
    assert int(Op.WAIT) == 0


def test_thirteen_blueprints():
    assert [b.name for b in Blueprint] == [
        *("NOOP", "NORM", "LORA_SMALL", "LORA_LARGE", "BOTTLENECK", "MLP_SMALL", "MLP_LARGE"),
        *("DEPTHWISE", "POINTWISE", "CONV_LIGHT", "CONV_HEAVY", "ATTENTION", "FLEX_ATTENTION"),
    ]


def test_styles_bundle_operator_and_curve():
    assert {style.name: (STYLE_OPERATOR[style].name, STYLE_CURVE[style].name) for style in Style} == {
        "LINEAR_ADD": ("ADD", "LINEAR"),
        "LINEAR_MULTIPLY": ("MULTIPLY", "LINEAR"),
        "SIGMOID_ADD": ("ADD", "SIGMOID_STANDARD"),
        "GATED_GATE": ("GATE", "LINEAR"),
    }


def test_every_operator_can_be_germinated():
    assert set(STYLE_OPERATOR.values()) == set(Operator)


def test_choices_of_the_ramps():
    assert TEMPOS == (3, 5, 8)
    assert ALPHA_SPEEDS == (0, 3, 5, 8)
    # 0 is no target: a seed that shall go is culled.
    assert ALPHA_TARGETS == (0.5, 0.7, 1.0)


def test_blueprints_of_vectors():
    # No convolution: a vector has nothing to slide over.
    assert {b.name for b in BLUEPRINTS_OF_KIND[SiteKind.VECTOR]} == {
        *("NORM", "LORA_SMALL", "LORA_LARGE", "BOTTLENECK", "MLP_SMALL", "MLP_LARGE", "ATTENTION"),
    }


@pytest.mark.parametrize("kind", [SiteKind.SIGNAL, SiteKind.IMAGE])
def test_blueprints_of_convolutional_sites(kind):
    # No MLP: its place is taken by the convolutions.
    assert {b.name for b in BLUEPRINTS_OF_KIND[kind]} == {
        *("NORM", "LORA_SMALL", "LORA_LARGE", "BOTTLENECK", "ATTENTION"),
        *("DEPTHWISE", "POINTWISE", "CONV_LIGHT", "CONV_HEAVY"),
    }


def test_noop_fits_no_kind():
    assert set(BLUEPRINTS_OF_KIND) == set(SiteKind)
    assert all(Blueprint.NOOP not in fitting for fitting in BLUEPRINTS_OF_KIND.values())
