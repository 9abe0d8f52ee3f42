"""The order of examples: each row's own, whoever else runs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from esper.tolaria.batches import BatchOrder, gather, shared

EXAMPLES, BATCH = 20, 6
IDS = [4, 0, 9, 4]


def order_of(ids: list[int], *, seed: int = 3, examples: int = EXAMPLES, batch: int = BATCH) -> BatchOrder:
    return BatchOrder(seed, torch.tensor(ids), examples, batch)


def walk(index_URB: Tensor, row: int) -> list[int]:
    """Examples in the order in which a row sees them."""
    return index_URB[:, row].flatten().tolist()


def test_one_index_for_each_update_row_and_place():
    index_URB = order_of(IDS).indices(2, 5)
    assert index_URB.shape == (5, 4, BATCH)
    assert index_URB.dtype == torch.int64


def test_rows_with_one_id_see_the_same_and_others_do_not():
    index_URB = order_of(IDS).indices(0, 10)
    walks = [walk(index_URB, row) for row in range(4)]
    assert walks[0] == walks[3]
    assert walks[0] != walks[1] != walks[2] != walks[0]


@pytest.mark.parametrize("ids", [[9], [1, 9], [9, 4, 0, 4, 7, 7, 123]])
def test_a_row_walks_the_same_way_whoever_else_runs(ids: list[int]):
    alone = walk(order_of([9]).indices(0, 30), 0)
    assert walk(order_of(ids).indices(0, 30), ids.index(9)) == alone


@pytest.mark.parametrize(("examples", "batch"), [(20, 6), (20, 5), (7, 7), (5, 12), (1, 3), (13, 1)])
def test_every_epoch_visits_every_example_once(examples: int, batch: int):
    updates = 6 * examples // batch + 1
    index_URB = order_of(IDS, examples=examples, batch=batch).indices(0, updates)
    for row in range(len(IDS)):
        seen = walk(index_URB, row)
        epochs = [seen[start : start + examples] for start in range(0, len(seen) - examples + 1, examples)]
        assert len(epochs) >= 4
        assert all(sorted(epoch) == list(range(examples)) for epoch in epochs)
        if examples > 5:
            assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


@settings(max_examples=60, derandomize=True)
@given(
    examples=st.integers(1, 30),
    batch=st.integers(1, 40),
    pieces=st.lists(st.integers(1, 7), min_size=1, max_size=8),
    again=st.integers(0, 20),
)
def test_pieces_join_without_a_gap(examples: int, batch: int, pieces: list[int], again: int):
    order = order_of(IDS, examples=examples, batch=batch)
    whole = order_of(IDS, examples=examples, batch=batch).indices(0, sum(pieces) + again)
    update = 0
    for updates in pieces:
        assert torch.equal(order.indices(update, updates), whole[update : update + updates])
        update += updates
    # Any piece can be asked for again.
    back = min(again, update - 1)
    assert torch.equal(order.indices(back, 1), whole[back : back + 1])


def test_another_run_has_another_order():
    here, there = (order_of(IDS, seed=seed).indices(0, 4) for seed in (3, 4))
    assert torch.equal(here, order_of(IDS).indices(0, 4))
    assert not torch.equal(here, there)


def test_every_order_is_as_likely():
    """Each example stands at each place about equally often."""
    rows, examples = 4000, 5
    index_URB = order_of(list(range(rows)), examples=examples, batch=examples).indices(3, 1)
    counts = torch.stack([torch.bincount(index_URB[0, :, place], minlength=examples) for place in range(examples)])
    # 800 expected; a standard deviation is 25.
    assert ((counts - rows / examples).abs() < 130).all()


@pytest.mark.parametrize("extent", [(), (7,), (3, 2)], ids=["vector", "signal", "image"])
def test_gathered_examples_lie_as_the_kind_wants(extent: tuple[int, ...]):
    channels, lane_axis = 3, 1 if extent else 0
    x = torch.randn(EXAMPLES, channels, *extent, generator=torch.Generator().manual_seed(1))
    (index_RB,) = order_of(IDS).indices(0, 1)
    batch = gather(x, index_RB, lane_axis)
    everyone = shared(x[:BATCH], len(IDS), lane_axis)
    for row in range(len(IDS)):
        for layout, expected in ((batch, x[index_RB[row]]), (everyone, x[:BATCH])):
            ours = layout.chunk(len(IDS), 1)[row] if lane_axis else layout[row]
            assert torch.equal(ours, expected)
    assert batch.shape == everyone.shape
    assert batch.is_contiguous()
