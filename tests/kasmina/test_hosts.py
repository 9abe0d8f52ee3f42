"""Hosts: their sites and sizes, what they refuse, and that each row is the plain network it exports."""

from itertools import product

import pytest
import torch
from torch.nn.functional import cross_entropy

from esper.kasmina.export import export_row
from esper.kasmina.hosts import Host
from esper.kasmina.population import Population
from esper.kasmina.rows.convolution import RowConv1d, RowConv2d
from esper.kasmina.rows.core import Statistics
from esper.kasmina.rows.dense import RowLinear
from esper.leyline.actions import SiteKind
from esper.leyline.config import GrowthConfig, HostConfig
from esper.leyline.errors import EsperError

ROWS, BATCH, CLASSES = 3, 6, 5
WIDTHS = (4, 6, 3)
EXAMPLE = {"vector": (7,), "signal": (2, 13), "image": (2, 12, 9)}
# Behind each segment, when segments after the first start by halving (the odd last place is dropped) or do not.
PLAIN_EXTENTS = {"vector": [()] * 3, "signal": [(13,)] * 3, "image": [(12, 9)] * 3}
HALVED_EXTENTS = {"signal": [(13,), (6,), (3,)], "image": [(12, 9), (6, 4), (3, 2)]}
CONFIGS = [("vector", norm, "none") for norm in ("none", "group", "batch", "layer")]
CONFIGS += list(product(("signal", "image"), ("none", "group", "batch"), ("none", "average", "max")))
every_config = pytest.mark.parametrize(("kind", "norm", "pooling"), CONFIGS)
kinds = pytest.mark.parametrize("kind", list(EXAMPLE))


def make(kind, norm="none", pooling="none", **more):
    config = HostConfig(kind=kind, norm=norm, pooling=pooling, **{"widths": WIDTHS, "depth": 2, **more})
    return Host(config, EXAMPLE[kind], CLASSES)


def populate(host, dtype=torch.float64):
    return Population(host, GrowthConfig(), 3, torch.arange(ROWS), dtype=dtype)


def examples(kind, generator, dtype=torch.float64):
    """Different examples [B, ...] for each row."""
    return [torch.randn(BATCH, *EXAMPLE[kind], generator=generator, dtype=dtype) for _ in range(ROWS)]


def join(kind, parts):
    return torch.stack(parts) if kind == "vector" else torch.cat(parts, 1)


@every_config
def test_sites(kind, norm, pooling):
    slots = make(kind, norm, pooling).slot_config
    extents = PLAIN_EXTENTS[kind] if pooling == "none" else HALVED_EXTENTS[kind]
    assert slots.slot_ids == ("r0c0", "r0c1", "r0c2")
    assert [(s.kind, s.width, s.extent, s.depth) for s in slots.sites] == [
        (SiteKind(kind), width, extent, depth) for width, extent, depth in zip(WIDTHS, extents, (1, 2, 3), strict=True)
    ]


@every_config
def test_streams_have_the_shapes_of_the_sites(kind, norm, pooling):
    host = make(kind, norm, pooling)
    population = populate(host)
    x = join(kind, examples(kind, torch.Generator().manual_seed(0)))
    logits, streams = population.forward(x, population.main_pass, statistics=Statistics.RUNNING, keep=True)
    assert logits.shape == (ROWS, BATCH, CLASSES)
    assert host.body.output_shape(EXAMPLE[kind]) == (CLASSES,)
    for stream, site in zip(streams, host.slot_config.sites, strict=True):
        width, *extent = site.shape
        joined = (ROWS, BATCH, width) if kind == "vector" else (BATCH, ROWS * width, *extent)
        assert stream.shape == joined


@every_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_is_the_network_it_exports(kind, norm, pooling, dtype):
    population = populate(make(kind, norm, pooling), dtype)
    parts = examples(kind, torch.Generator().manual_seed(1), dtype)
    logits, _ = population.forward(join(kind, parts), population.main_pass, statistics=Statistics.RUNNING)
    for row, part in enumerate(parts):
        torch.testing.assert_close(logits[row], export_row(population, row)(part))
    # The rows are different networks.
    assert not torch.allclose(export_row(population, 0)(parts[0]), export_row(population, 1)(parts[0]))


@every_config
def test_a_row_trains_like_the_network_it_exports(kind, norm, pooling):
    population = populate(make(kind, norm, pooling))
    twins = [export_row(population, row).train() for row in range(ROWS)]
    theta, rate = population.hosts.theta, 0.05
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        parts = examples(kind, generator)
        labels = torch.randint(CLASSES, (ROWS, BATCH), generator=generator)
        logits, _ = population.forward(join(kind, parts), population.main_pass, statistics=Statistics.UPDATED)
        loss_R = torch.stack([cross_entropy(logits[row], labels[row]) for row in range(ROWS)])
        (gradient,) = torch.autograd.grad(loss_R.sum(), theta)
        with torch.no_grad():
            theta -= rate * gradient
        for row, twin in enumerate(twins):
            twin_loss = cross_entropy(twin(parts[row]), labels[row])
            torch.testing.assert_close(loss_R[row], twin_loss)
            gradients = torch.autograd.grad(twin_loss, list(twin.parameters()))
            with torch.no_grad():
                for parameter, step in zip(twin.parameters(), gradients, strict=True):
                    parameter -= rate * step
    parts = examples(kind, generator)
    logits, _ = population.forward(join(kind, parts), population.main_pass, statistics=Statistics.RUNNING)
    for row, twin in enumerate(twins):
        torch.testing.assert_close(logits[row], twin.eval()(parts[row]))
        exported, trained = export_row(population, row).state_dict(), twin.state_dict()
        assert exported.keys() == trained.keys()
        for name in exported:
            if "num_batches_tracked" not in name:
                torch.testing.assert_close(exported[name], trained[name])


def weighted(host):
    return [
        layer
        for segment in host.segments[:-1]
        for layer in segment.layers
        if isinstance(layer, RowLinear | RowConv1d | RowConv2d)
    ]


@every_config
def test_a_bias_only_without_a_norm(kind, norm, pooling):
    host = make(kind, norm, pooling)
    layers = weighted(host)
    assert len(layers) == 2 * len(WIDTHS)  # depth 2
    assert {layer.bias for layer in layers} == {norm == "none"}
    # The head has no norm.
    assert host.segments[-1].layers[-1].bias


@every_config
def test_sizes_are_those_of_the_export(kind, norm, pooling):
    host = make(kind, norm, pooling)
    network = export_row(populate(host), 0)
    assert host.body.parameter_count == sum(p.numel() for p in network.parameters())
    assert [name for name, _ in network.named_children()] == ["segment0", "segment1", "segment2", "segment3"]


def test_counts_of_a_vector_host_by_hand():
    host = make("vector", "layer", widths=(4, 6), depth=2)
    # 7 to 4, 4 to 4, 4 to 6, 6 to 6, 6 to 5 classes; the norms have a scale and a shift, the head a bias.
    products = 7 * 4 + 4 * 4 + 4 * 6 + 6 * 6 + 6 * 5
    assert host.cost() == products
    assert host.body.parameter_count == products + 2 * (4 + 4 + 6 + 6) + 5


def test_counts_of_an_image_host_by_hand():
    host = make("image", "none", "max", widths=(4, 6), depth=1, kernel=5)
    # 2 to 4 channels with 25 taps on 12x9 places, 4 to 6 on 6x4, then 6 to 5 classes.
    assert host.cost() == 108 * 2 * 4 * 25 + 24 * 4 * 6 * 25 + 30
    assert host.body.parameter_count == (2 * 4 * 25 + 4) + (4 * 6 * 25 + 6) + (30 + 5)


@kinds
def test_one_segment_is_enough(kind):
    host = make(kind, widths=(4,), depth=1)
    assert host.slot_config.slots == 1
    assert len(host.segments) == 2


@kinds
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_without_activation_the_host_is_affine(kind, activation):
    host = make(kind, activation=activation)
    population = populate(host)
    a, b = (join(kind, examples(kind, torch.Generator().manual_seed(seed))) for seed in (3, 4))
    at = {
        name: population.forward(x, population.main_pass, statistics=Statistics.RUNNING)[0]
        for name, x in {"a": a, "b": b, "sum": a + b, "zero": torch.zeros_like(a)}.items()
    }
    bent = (at["sum"] + at["zero"] - at["a"] - at["b"]).abs().max().item()
    assert (bent < 1e-12) is (activation == "none")


REFUSED = {
    "vector on images": ({"kind": "vector"}, (1, 8, 8), "these have 3"),
    "signal on vectors": ({"kind": "signal"}, (8,), "these have 1"),
    "signal on images": ({"kind": "signal"}, (1, 8, 8), "these have 3"),
    "image on signals": ({"kind": "image"}, (1, 40), "these have 2"),
    "layer norm on images": ({"kind": "image", "norm": "layer"}, (1, 8, 8), r"host\.norm"),
    "layer norm on signals": ({"kind": "signal", "norm": "layer"}, (1, 40), r"host\.norm"),
    # 4, halved to 2, to 1, and then no more.
    "signal too short": ({"kind": "signal", "widths": (2,) * 4, "pooling": "max"}, (1, 4), r"host\.pooling"),
    # One axis is enough to be too small.
    "image too flat": ({"kind": "image", "pooling": "average"}, (1, 8, 1), r"host\.pooling"),
    "tokens": ({"kind": "tokens"}, (12,), "no host for tokens"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused(name):
    values, example, reason = REFUSED[name]
    config = HostConfig(**{"widths": (4, 4), **values})
    with pytest.raises(EsperError, match=reason) as refused:
        Host(config, example, CLASSES)
    message = str(refused.value)
    assert message.startswith("host.")
    assert "\n" not in message


def test_the_smallest_extent_that_can_be_halved():
    config = HostConfig(kind="signal", widths=(2, 2, 2), pooling="max")
    host = Host(config, (1, 4), CLASSES)
    assert [site.extent for site in host.slot_config.sites] == [(4,), (2,), (1,)]


def test_rows_of_one_initialisation_start_equal():
    population = Population(make("signal"), GrowthConfig(), 3, torch.tensor([5, 1, 5]))
    theta = population.hosts.theta
    assert torch.equal(theta[0], theta[2])
    assert not torch.equal(theta[0], theta[1])


@kinds
def test_the_global_generator_is_left_alone(kind):
    before = torch.random.get_rng_state()
    population = populate(make(kind, "batch"))
    x = join(kind, examples(kind, torch.Generator().manual_seed(0)))
    population.forward(x, population.main_pass, statistics=Statistics.UPDATED)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_export_leaves_the_global_generator_alone():
    population = populate(make("signal", "batch"))
    before = torch.random.get_rng_state()
    export_row(population, 0)
    assert torch.equal(torch.random.get_rng_state(), before)
