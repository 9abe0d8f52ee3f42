"""The eight action heads, their choices, and which operation uses which head.

An action is one row of an int64 tensor [rows, HEAD_COUNT]; column `Head.SLOT` holds the slot, and so on.
"""

from enum import IntEnum, StrEnum


class Op(IntEnum):
    """What one decision does to one row."""

    WAIT = 0
    GERMINATE = 1
    SET_ALPHA_TARGET = 2
    CULL = 3
    FOSSILIZE = 4
    ADVANCE = 5


class Blueprint(IntEnum):
    """What a seed can be. One enumeration for all kinds of site."""

    NOOP = 0
    NORM = 1
    LORA_SMALL = 2
    LORA_LARGE = 3
    BOTTLENECK = 4
    MLP_SMALL = 5
    MLP_LARGE = 6
    DEPTHWISE = 7
    POINTWISE = 8
    CONV_LIGHT = 9
    CONV_HEAVY = 10
    ATTENTION = 11
    FLEX_ATTENTION = 12


class Operator(IntEnum):
    """How a seed joins its host; each is the identity at alpha 0."""

    ADD = 0
    MULTIPLY = 1
    GATE = 2


class Curve(IntEnum):
    """The way of alpha from start to target."""

    LINEAR = 0
    COSINE = 1
    SIGMOID_GENTLE = 2
    SIGMOID_STANDARD = 3
    SIGMOID_SHARP = 4


class Style(IntEnum):
    """Operator and curve of a germination, bundled so that no invalid pair exists."""

    LINEAR_ADD = 0
    LINEAR_MULTIPLY = 1
    SIGMOID_ADD = 2
    GATED_GATE = 3


STYLE_OPERATOR = {
    Style.LINEAR_ADD: Operator.ADD,
    Style.LINEAR_MULTIPLY: Operator.MULTIPLY,
    Style.SIGMOID_ADD: Operator.ADD,
    Style.GATED_GATE: Operator.GATE,
}
STYLE_CURVE = {
    Style.LINEAR_ADD: Curve.LINEAR,
    Style.LINEAR_MULTIPLY: Curve.LINEAR,
    Style.SIGMOID_ADD: Curve.SIGMOID_STANDARD,
    Style.GATED_GATE: Curve.LINEAR,
}

TEMPOS = (3, 5, 8)
"""Decisions of the first ramp."""
ALPHA_TARGETS = (0.5, 0.7, 1.0)
ALPHA_SPEEDS = (0, 3, 5, 8)
"""Decisions of a later ramp; 0 is at once."""


class Head(IntEnum):
    """Column of an action tensor."""

    OP = 0
    SLOT = 1
    BLUEPRINT = 2
    STYLE = 3
    TEMPO = 4
    ALPHA_TARGET = 5
    ALPHA_SPEED = 6
    ALPHA_CURVE = 7


HEAD_COUNT = len(Head)


def head_sizes(slots: int) -> dict[Head, int]:
    """Give the number of choices of each head for a host with `slots` sites."""
    return {
        Head.OP: len(Op),
        Head.SLOT: slots,
        Head.BLUEPRINT: len(Blueprint),
        Head.STYLE: len(Style),
        Head.TEMPO: len(TEMPOS),
        Head.ALPHA_TARGET: len(ALPHA_TARGETS),
        Head.ALPHA_SPEED: len(ALPHA_SPEEDS),
        Head.ALPHA_CURVE: len(Curve),
    }


HEADS_OF_OP: dict[Op, frozenset[Head]] = {
    Op.WAIT: frozenset({Head.OP}),
    Op.GERMINATE: frozenset(
        {Head.OP, Head.SLOT, Head.BLUEPRINT, Head.STYLE, Head.TEMPO, Head.ALPHA_TARGET},
    ),
    # The operator of a seed is fixed for its life: docs/decisions/0002.
    Op.SET_ALPHA_TARGET: frozenset(
        {Head.OP, Head.SLOT, Head.ALPHA_TARGET, Head.ALPHA_SPEED, Head.ALPHA_CURVE},
    ),
    Op.CULL: frozenset({Head.OP, Head.SLOT, Head.ALPHA_SPEED, Head.ALPHA_CURVE}),
    Op.FOSSILIZE: frozenset({Head.OP, Head.SLOT}),
    Op.ADVANCE: frozenset({Head.OP, Head.SLOT}),
}
"""A head that an operation does not use carries no meaning and is ignored."""


class SiteKind(StrEnum):
    """What flows through a site: [B, D], [B, C, L], [B, C, H, W] or [B, T, D]."""

    VECTOR = "vector"
    SIGNAL = "signal"
    IMAGE = "image"
    TOKENS = "tokens"


_CONVOLUTIONAL = frozenset(
    {
        Blueprint.NORM,
        Blueprint.LORA_SMALL,
        Blueprint.LORA_LARGE,
        Blueprint.BOTTLENECK,
        Blueprint.DEPTHWISE,
        Blueprint.POINTWISE,
        Blueprint.CONV_LIGHT,
        Blueprint.CONV_HEAVY,
        Blueprint.ATTENTION,
    },
)
BLUEPRINTS_OF_KIND: dict[SiteKind, frozenset[Blueprint]] = {
    SiteKind.VECTOR: frozenset(
        {
            Blueprint.NORM,
            Blueprint.LORA_SMALL,
            Blueprint.LORA_LARGE,
            Blueprint.BOTTLENECK,
            Blueprint.MLP_SMALL,
            Blueprint.MLP_LARGE,
            Blueprint.ATTENTION,
        },
    ),
    SiteKind.SIGNAL: _CONVOLUTIONAL,
    SiteKind.IMAGE: _CONVOLUTIONAL,
    SiteKind.TOKENS: frozenset(),
}
"""Which blueprints fit a kind of site. NOOP fits none: a row that wants nothing waits."""
