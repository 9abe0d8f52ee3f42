"""What all row layers share: the flat table, its views, and layers in sequence."""

import time

import pytest
import torch
from row_twins import Case, cases, exact, lanes, rows_apart, same_as_twins
from torch import nn

from esper.kasmina.rows.convolution import RowConv1d, RowConv2d
from esper.kasmina.rows.core import ParamSpec, RowSequential, Statistics, constant, to_lanes, uniform
from esper.kasmina.rows.dense import RowAttention, RowEmbedding, RowLinear
from esper.kasmina.rows.excite import RowExcite
from esper.kasmina.rows.norms import RowBatchNorm, RowGroupNorm, RowLayerNorm
from esper.kasmina.rows.shaping import RowGlobalMean, RowPool, RowReLU

# Layers with buffers first, last and in between, layers without parameters, and a sequence inside a sequence.
CNN = RowSequential(
    RowSequential(RowConv2d(2, 4, 3, bias=False), RowBatchNorm(4, 2), RowReLU()),
    RowSequential(),
    RowSequential(RowPool("max", 2), RowConv2d(4, 6, 3, bias=False), RowBatchNorm(6, 2), RowReLU()),
    RowExcite(6, 2, 2),
    RowGlobalMean(6),
    RowLinear(6, 3),
)
MLP = RowSequential(RowBatchNorm(5, 0), RowLinear(5, 4), RowReLU(), RowLinear(4, 3), RowLayerNorm(3))
POINTWISE = RowSequential(RowConv2d(2, 4, 1), RowReLU(), RowConv2d(4, 6, 1), RowExcite(6, 2, 2), RowConv2d(6, 3, 3))
TEXT = RowSequential(RowEmbedding(7, 8), RowAttention(8, 2, causal=True), RowLayerNorm(8), RowLinear(8, 7))
SEQUENCES = [
    Case("cnn training", CNN, (2, 6, 6), 1, axis_out=0, training=True),
    Case("cnn evaluating", CNN, (2, 6, 6), 1, axis_out=0),
    Case("mlp training", MLP, (5,), 0, training=True),
    Case("mlp evaluating", MLP, (5,), 0),
    Case("text", TEXT, (4,), 0, tokens=7),
    Case("cnn on one example", CNN, (2, 6, 6), 1, axis_out=0, batch=1),
    Case("mlp on one example", MLP, (5,), 0, batch=1),
    Case("text of one token", TEXT, (1,), 0, tokens=7, batch=1),
    Case("pointwise", POINTWISE, (2, 4, 3), 1),
    Case("pointwise on one place", POINTWISE, (2, 1, 1), 1),
]
LAYERS = {
    "linear": RowLinear(6, 4),
    "conv": RowConv1d(4, 6, 3),
    "attention": RowAttention(8, 2),
    "embedding": RowEmbedding(7, 5),
    "norm": RowGroupNorm(1, 6, 1),
    "excite": RowExcite(6, 3, 1),
    "sequence": CNN,
    "relu": RowReLU(),
    "pool": RowPool("max", 1),
    "mean": RowGlobalMean(4),
    "empty sequence": RowSequential(),
}
every_layer = pytest.mark.parametrize("name", list(LAYERS))
learning_layers = pytest.mark.parametrize("name", [n for n, layer in LAYERS.items() if layer.params])


@exact
@lanes
@cases(*SEQUENCES)
def test_sequence_equals_its_plain_module(case, lanes, dtype):
    same_as_twins(case, lanes, dtype, passes=3)


@exact
@pytest.mark.parametrize("training", [True, False])
def test_sequence_is_torch_sequential(training, dtype):
    def make():
        return nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.LayerNorm(3))

    same_as_twins(Case("mlp", MLP, (5,), 0, training=training), 3, dtype, make, passes=3)


@cases(*SEQUENCES)
def test_a_sick_lane_stays_alone(case):
    rows_apart(case)


def test_names_and_order_of_a_sequence():
    assert [p.name for p in CNN.params] == [
        *("0.0.weight", "0.1.weight", "0.1.bias"),
        *("2.1.weight", "2.2.weight", "2.2.bias"),
        *("3.squeeze.0.weight", "3.squeeze.0.bias", "3.squeeze.2.weight", "3.squeeze.2.bias"),
        *("5.weight", "5.bias"),
    ]
    assert [b.name for b in CNN.buffers] == [
        *("0.1.running_mean", "0.1.running_var", "2.2.running_mean", "2.2.running_var"),
    ]


def test_shapes_and_cost_of_a_sequence():
    # 6x6: 36 places of 4*2*9; halved to 9 places of 6*4*9; excitation 6*2 twice; the head 6*3.
    assert CNN.cost((2, 6, 6)) == 36 * 72 + 9 * 216 + 24 + 18
    assert CNN.output_shape((2, 6, 6)) == (3,)
    # The first step alone keeps the extent, the third halves it.
    assert CNN.layers[0].output_shape((2, 6, 6)) == (4, 6, 6)
    assert CNN.layers[2].output_shape((4, 6, 6)) == (6, 3, 3)
    # 2*4*9 + 8, 4*6*9 + 12, 6*2 + 2 and 2*6 + 6, 6*3 + 3.
    assert CNN.parameter_count == 80 + 228 + 32 + 21


def test_an_empty_sequence_is_the_identity():
    x = torch.randn(2, 3, 4)
    assert torch.equal(RowSequential().forward(x, (), (), statistics=Statistics.UPDATED), x)
    assert RowSequential().output_shape((4,)) == (4,)


@every_layer
def test_split_gives_views_of_the_table(name):
    layer = LAYERS[name]
    table = torch.arange(3.0 * layer.parameter_count).view(3, -1)
    parts = layer.split(table)
    assert [tuple(part.shape) for part in parts] == [(3, *p.shape) for p in layer.params]
    if parts:
        assert torch.equal(torch.cat([part.flatten(1) for part in parts], 1), table)
    for part in parts:
        part.zero_()
    assert not table.any()


def test_split_refuses_a_table_of_another_width():
    with pytest.raises(RuntimeError):
        RowLinear(6, 4).split(torch.zeros(3, 29))


@every_layer
def test_start_and_decay_cover_the_table(name):
    # Also where there is nothing to learn: then both are empty.
    layer = LAYERS[name]
    assert layer.initial(torch.full((3, layer.parameter_count), 0.5)).shape == (3, layer.parameter_count)
    mask = layer.decay_mask()
    assert mask.shape == (layer.parameter_count,)
    assert ((mask == 0) | (mask == 1)).all()


@learning_layers
def test_initial_values_span_their_interval(name):
    layer = LAYERS[name]
    low, high = (layer.initial(torch.full((1, layer.parameter_count), end)) for end in (0.0, 1.0))
    for spec, bottom, top in zip(layer.params, layer.split(low), layer.split(high), strict=True):
        torch.testing.assert_close(bottom, torch.full_like(bottom, spec.low))
        torch.testing.assert_close(top, torch.full_like(top, spec.high))
    # The table takes the dtype of the numbers that it is made of.
    assert layer.initial(torch.rand(2, layer.parameter_count, dtype=torch.float64)).dtype == torch.float64


def test_initial_values_are_lerped_number_by_number():
    layer = RowLinear(2, 1)
    # The bound is 1/root 2; a quarter of the way from -b to b is -b/2.
    given_numbers = torch.tensor([[0.25, 0.5, 0.75], [0.5, 0.25, 0.5]])
    half = 0.5**0.5 / 2
    expected = torch.tensor([[-half, 0.0, half], [0.0, -half, 0.0]])
    torch.testing.assert_close(layer.initial(given_numbers), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_layer
def test_start_and_decay_are_those_of_each_number_by_itself(name, dtype):
    """Bit for bit what a Python list with one entry for each parameter gives."""
    layer = LAYERS[name]
    drawn = torch.rand(3, layer.parameter_count, generator=torch.Generator().manual_seed(0), dtype=dtype)
    low, high, decays = (
        torch.tensor([float(getattr(p, side)) for p in layer.params for _ in range(p.size)])
        for side in ("low", "high", "decay")
    )
    assert torch.equal(layer.initial(drawn), torch.lerp(low.to(dtype), high.to(dtype), drawn))
    assert torch.equal(layer.decay_mask(), decays)


def test_a_large_layer_starts_at_once():
    layer = RowSequential(RowLinear(1000, 2000), RowLinear(2000, 1000))
    drawn = torch.full((1, layer.parameter_count), 0.5)
    started = time.process_time()
    layer.initial(drawn)
    layer.decay_mask()
    # 4 million parameters: 0.03 s of the CPU, where lists with an entry for each took 3 s.
    assert time.process_time() - started < 0.5


def test_parameter_specs():
    assert uniform("w", (2, 3), 0.5, decay=True) == ParamSpec("w", (2, 3), -0.5, 0.5, True)
    assert constant("b", (4,), 1.0) == ParamSpec("b", (4,), 1.0, 1.0, False)
    assert uniform("w", (2, 3), 0.5).size == 6


def test_decay_of_a_sequence_is_that_of_its_layers():
    parts = [layer.decay_mask() for layer in MLP.layers if layer.params]
    assert torch.equal(MLP.decay_mask(), torch.cat(parts))
    # The two matrices, 5*4 and 4*3.
    assert MLP.decay_mask().sum() == 32


@pytest.mark.parametrize("extent", [(), (7,), (5, 4)])
def test_to_lanes_undoes_a_join(extent):
    parts = [torch.randn(2, 4, *extent) for _ in range(3)]
    apart = to_lanes(torch.cat(parts, 1), 4)
    assert all(torch.equal(apart[:, lane], part) for lane, part in enumerate(parts))
