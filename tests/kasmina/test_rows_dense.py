"""Linear, embedding and attention: each lane is one torch module."""

import math

import pytest
import torch
from row_twins import Case, cases, drawn, exact, lanes, rows_apart, same_as_twins, starts_like
from torch import nn

from esper.kasmina.rows.core import Statistics
from esper.kasmina.rows.dense import RowAttention, RowEmbedding, RowLinear

LINEAR = [
    Case("vectors", RowLinear(6, 4), (6,), 0),
    Case("vectors, no bias", RowLinear(6, 4, bias=False), (6,), 0),
    Case("tokens", RowLinear(6, 4), (3, 6), 0),
    Case("tokens, no bias", RowLinear(6, 4, bias=False), (3, 6), 0),
    Case("zero at the start", RowLinear(6, 4, zero=True), (6,), 0),
    Case("one feature to one", RowLinear(1, 1), (1,), 0),
]
EMBEDDING = Case("embedding", RowEmbedding(7, 5), (6,), 0, tokens=7)
ATTENTION = [
    Case("one head", RowAttention(8, 1), (5, 8), 0),
    Case("four heads", RowAttention(8, 4), (5, 8), 0),
    Case("causal", RowAttention(8, 2, causal=True), (5, 8), 0),
    Case("one token", RowAttention(8, 2, causal=True), (1, 8), 0),
]


@exact
@lanes
@cases(*LINEAR, EMBEDDING, *ATTENTION)
def test_equals_its_plain_module(case, lanes, dtype):
    same_as_twins(case, lanes, dtype)


@exact
@cases(*LINEAR)
def test_linear_is_torch_linear(case, dtype):
    layer = case.layer
    same_as_twins(case, 3, dtype, lambda: nn.Linear(layer.in_features, layer.out_features, bias=layer.bias))


@exact
def test_embedding_is_torch_embedding(dtype):
    same_as_twins(EMBEDDING, 3, dtype, lambda: nn.Embedding(7, 5))


def attend(module, x):
    tokens = x.shape[1]
    # True forbids: a later token, for those that look back only.
    mask = torch.ones(tokens, tokens, dtype=torch.bool).triu(1) if module.causal else None
    return module(x, x, x, attn_mask=mask)[0]


@exact
@cases(*ATTENTION)
def test_attention_is_torch_multihead_attention(case, dtype):
    def make():
        module = nn.MultiheadAttention(case.layer.width, case.layer.heads, batch_first=True)
        module.causal = case.layer.causal
        return module

    same_as_twins(case, 3, dtype, make, attend)


def test_causal_attention_does_not_look_ahead():
    layer = RowAttention(8, 2, causal=True)
    theta = torch.randn(2, layer.parameter_count)
    x = torch.randn(2, 3, 5, 8)
    y = layer.forward(x, layer.split(theta), (), statistics=Statistics.RUNNING)
    changed = x.clone()
    changed[:, :, 3:] += 1
    z = layer.forward(changed, layer.split(theta), (), statistics=Statistics.RUNNING)
    torch.testing.assert_close(z[:, :, :3], y[:, :, :3])
    assert not torch.allclose(z[:, :, 3:], y[:, :, 3:])


@cases(*LINEAR, EMBEDDING, *ATTENTION)
def test_a_sick_lane_stays_alone(case):
    rows_apart(case)


def test_each_lane_looks_up_its_own_tokens():
    layer = RowEmbedding(3, 1)
    table = torch.arange(6.0).view(2, 3)
    tokens = torch.tensor([[[0, 2]], [[0, 2]]])
    found = layer.forward(tokens, layer.split(table), (), statistics=Statistics.RUNNING)
    assert found.flatten().tolist() == [0, 2, 3, 5]


@pytest.mark.parametrize("token", [-1, 3])
def test_a_token_out_of_range_reads_no_other_lane(token):
    # Token 3 of the first lane is where the second lane's table begins.
    layer = RowEmbedding(3, 1)
    with pytest.raises(RuntimeError, match="out of bounds"):
        layer.forward(
            torch.tensor([[[token]], [[0]]]), layer.split(torch.zeros(2, 3)), (), statistics=Statistics.RUNNING
        )


def test_attention_needs_whole_heads():
    with pytest.raises(ValueError, match="8 is not a multiple of 3"):
        RowAttention(8, 3)


@pytest.mark.parametrize(
    ("layer", "count"),
    [
        (RowLinear(6, 4), 6 * 4 + 4),
        (RowLinear(6, 4, bias=False), 6 * 4),
        (RowEmbedding(7, 5), 7 * 5),
        # Three projections of 8 to 8 with a bias each, and one back.
        (RowAttention(8, 2), 4 * (8 * 8 + 8)),
    ],
)
def test_parameter_count(layer, count):
    assert layer.parameter_count == count


@pytest.mark.parametrize(
    ("layer", "shape", "cost"),
    [
        (RowLinear(6, 4), (6,), 24),
        # Three tokens, each 6 to 4.
        (RowLinear(6, 4), (3, 6), 72),
        # A look-up multiplies nothing.
        (RowEmbedding(7, 5), (6,), 0),
        # 5 tokens of width 8: four projections 5*8*8 = 320 each, scores 5*5*8 = 200, and as much to mix the values.
        (RowAttention(8, 2), (5, 8), 4 * 320 + 2 * 200),
    ],
)
def test_cost(layer, shape, cost):
    assert layer.cost(shape) == cost


@pytest.mark.parametrize(
    ("layer", "shape", "output"),
    [
        (RowLinear(6, 4), (6,), (4,)),
        (RowLinear(6, 4), (3, 6), (3, 4)),
        (RowEmbedding(7, 5), (6,), (6, 5)),
        (RowAttention(8, 2), (5, 8), (5, 8)),
    ],
)
def test_output_shape(layer, shape, output):
    assert layer.output_shape(shape) == output


def test_linear_starts_like_torch():
    starts_like(RowLinear(50, 60), lambda: nn.Linear(50, 60))
    # The bound is one over the root of the inputs.
    assert all(value.abs().max() <= 1 / math.sqrt(50) for value in drawn(RowLinear(50, 60)).values())


def test_attention_starts_like_torch():
    starts_like(RowAttention(32, 4), lambda: nn.MultiheadAttention(32, 4))


def test_embedding_starts_with_the_variance_of_torch():
    # Torch draws a normal distribution; a uniform one of variance 1 ends at the root of 3.
    starts_like(RowEmbedding(50, 20), lambda: nn.Embedding(50, 20), bounded=False)
    assert drawn(RowEmbedding(50, 20))["weight"].abs().max() <= math.sqrt(3)


def test_zero_means_zero():
    assert all((value == 0).all() for value in drawn(RowLinear(6, 4, zero=True)).values())


@pytest.mark.parametrize(
    ("layer", "decaying"),
    [
        (RowLinear(6, 4), 24),
        (RowLinear(6, 4, zero=True), 24),
        (RowEmbedding(7, 5), 0),
        (RowAttention(8, 2), 4 * 64),
    ],
)
def test_only_matrices_decay(layer, decaying):
    mask = layer.decay_mask()
    assert mask.shape == (layer.parameter_count,)
    assert mask.sum() == decaying
    parts = layer.split(mask[None])
    assert all(part.all() or not part.any() for part in parts)
    # Biases and look-up tables keep their size.
    kept = {p.name for p, part in zip(layer.params, parts, strict=True) if not part.any()}
    assert all("bias" in name for name in kept) or isinstance(layer, RowEmbedding)
