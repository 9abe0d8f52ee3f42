"""Random streams: the published answers of the generator, and that nobody's numbers depend on anybody else."""

import hashlib
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.leyline import streams
from esper.leyline.streams import Stream, philox

words = st.integers(0, 2**32 - 1)
KNOWN = [
    # counter, key, answer: `philox4x32 10` in kat_vectors of Random123, by the authors of the generator.
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def hexadecimal(text):
    return [int(word, 16) for word in text.split()]


def reference(counter, key):
    """Philox4x32-10 with Python's unbounded integers, from the paper."""
    x, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * x[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * x[2], 2**32)
        x = [high1 ^ x[1] ^ k[0], low1, high0 ^ x[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return x


def ids(*numbers):
    return torch.tensor(numbers)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_published_answers(counter, key, answer):
    given_words = philox(tuple(ids(c) for c in hexadecimal(counter)), tuple(hexadecimal(key)))
    assert [w.item() for w in given_words] == hexadecimal(answer)


@given(st.lists(st.tuples(words, words, words, words), min_size=1, max_size=8), st.tuples(words, words))
def test_philox_against_unbounded_integers(counters, key):
    given_words = philox(tuple(torch.tensor(column) for column in zip(*counters, strict=True)), key)
    assert all(w.dtype == torch.int64 for w in given_words)
    assert torch.stack(given_words, 1).tolist() == [reference(counter, key) for counter in counters]


def test_counters_broadcast():
    table = philox((torch.arange(4)[:, None], torch.arange(3)[None, :], ids(7)[:, None], ids(0)[:, None]), (1, 2))
    assert all(w.shape == (4, 3) for w in table)
    assert [w[2, 1].item() for w in table] == reference((2, 1, 7, 0), (1, 2))


@given(words, words, st.integers(1, 9))
def test_a_number_is_one_word_of_one_counter(first, second, count):
    drawn = Stream(5, "weights").integers(ids(first), ids(second), count)[0].tolist()
    # Four numbers to a counter (block, first, second, 0), keyed by a digest of seed and name. Changing any of this
    # changes every recorded run.
    digest = hashlib.blake2b(b"5/weights", digest_size=8).digest()
    key = struct.unpack("<II", digest)
    expected = [word for block in range(3) for word in reference((block, first, second, 0), key)]
    assert drawn == expected[:count]


def test_adding_rows_changes_nobodys_numbers():
    stream = Stream(0, "init")
    few = stream.integers(torch.arange(3), ids(5), 10)
    many = stream.integers(torch.arange(50), ids(5), 10)
    assert torch.equal(many[:3], few)
    # Nor does their order, nor what was drawn before.
    order = torch.tensor([30, 2, 17, 0])
    assert torch.equal(stream.integers(order, ids(5), 10), many[order])


def test_asking_for_more_keeps_what_was_there():
    stream = Stream(0, "init")
    long = stream.integers(ids(1, 2), ids(0), 23)
    for count in (1, 3, 4, 5, 22):
        assert torch.equal(stream.integers(ids(1, 2), ids(0), count), long[:, :count])


@pytest.mark.parametrize("lanes", [0, 1, 3, 70])
@pytest.mark.parametrize("at_once", [1, 4, 30, 200])
def test_numbers_do_not_depend_on_how_many_are_drawn_at_once(monkeypatch, lanes, at_once):
    stream, first = Stream(0, "init"), torch.arange(lanes)
    whole, fractions = stream.integers(first, ids(1), 41), stream.uniform(first, ids(1), 41, torch.float32)
    monkeypatch.setattr(streams, "_AT_ONCE", at_once)
    assert torch.equal(stream.integers(first, ids(1), 41), whole)
    assert torch.equal(stream.uniform(first, ids(1), 41, torch.float32), fractions)


def test_rows_alone_and_together_have_the_same_permutations():
    stream = Stream(3, "order")
    together = stream.permutations(torch.arange(6), ids(2), 40)
    for row in range(6):
        assert torch.equal(stream.permutations(ids(row), ids(2), 40)[0], together[row])


def test_one_number_does_not_depend_on_the_others_coordinates():
    stream = Stream(0, "init")
    pairs = stream.uniform(ids(0, 1, 2), ids(9, 4, 4), 5)
    assert torch.equal(pairs[1], stream.uniform(ids(1), ids(4), 5)[0])


STREAMS = [
    (0, "init", 0, 0),
    (1, "init", 0, 0),
    (2**63 - 1, "init", 0, 0),
    (0, "order", 0, 0),
    (0, "init ", 0, 0),
    (0, "", 0, 0),
    (0, "1/init", 0, 0),
    (10, "init", 0, 0),
    (0, "init", 1, 0),
    (0, "init", 0, 1),
    (0, "init", 1, 1),
    (0, "init", 2**32 - 1, 0),
    (0, "init", 2**32, 0),
    (0, "init", 0, 2**32),
]


def test_seed_name_and_coordinates_all_tell():
    drawn = [Stream(seed, name).integers(ids(a), ids(b), 16)[0].tolist() for seed, name, a, b in STREAMS]
    # 16 words each: no two streams share even one, which chance alone would do once in 170,000 choices.
    assert len({word for numbers in drawn for word in numbers}) == 16 * len(STREAMS)


def test_the_same_stream_twice():
    a, b = (Stream(7, "init").uniform(torch.arange(5), torch.arange(5), 9) for _ in range(2))
    assert torch.equal(a, b)


def test_integers_fill_the_range():
    drawn = Stream(0, "range").integers(torch.arange(100), ids(0), 1000)
    assert drawn.dtype == torch.int64
    assert drawn.shape == (100, 1000)
    assert drawn.min() >= 0
    assert drawn.max() < 2**32
    # Each of the 32 bits is set in half of 100,000 numbers; 5 standard errors are 0.008.
    bits = torch.stack([(drawn >> bit) & 1 for bit in range(32)]).double().mean((1, 2))
    assert (bits - 0.5).abs().max() < 0.008


def test_uniform_mean_and_variance():
    drawn = Stream(1, "uniform").uniform(torch.arange(200), torch.arange(200) % 7, 1000)
    # 200,000 numbers: standard errors of mean and variance are 1/sqrt(12 n) = 6.5e-4 and 1.7e-4; five of each.
    assert drawn.mean().item() == pytest.approx(1 / 2, abs=3.3e-3)
    assert drawn.var().item() == pytest.approx(1 / 12, abs=9e-4)


def test_uniform_numbers_are_evenly_spread():
    drawn = Stream(1, "uniform").uniform(torch.arange(100), ids(0), 1000).flatten()
    counts = torch.histc(drawn, 20, 0.0, 1.0)
    # Chi-square with 19 degrees of freedom exceeds 55 once in 40,000.
    assert ((counts - 5000) ** 2 / 5000).sum() < 55


def test_neighbours_are_uncorrelated():
    drawn = Stream(1, "uniform").uniform(torch.arange(300), ids(3), 300)
    for other in (drawn.roll(1, 0), drawn.roll(1, 1), drawn.roll((1, 1), (0, 1))):
        correlation = torch.corrcoef(torch.stack((drawn.flatten(), other.flatten())))[0, 1]
        # The standard error is 1/300.
        assert abs(correlation.item()) < 5 / 300


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_is_the_integer_as_a_fraction(dtype):
    stream = Stream(4, "fraction")
    drawn = stream.uniform(torch.arange(4), ids(0), 100, dtype)
    assert drawn.dtype == dtype
    expected = (stream.integers(torch.arange(4), ids(0), 100).double() + 0.5) / 2**32
    torch.testing.assert_close(drawn.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("integer", [0, 2**32 - 1])
def test_uniform_reaches_neither_end(monkeypatch, dtype, integer):
    # A logarithm of either end would be infinite.
    monkeypatch.setattr(streams, "philox", lambda *_: (torch.tensor([[integer]]),) * 4)
    drawn = Stream(0, "ends").uniform(ids(0), ids(0), 1, dtype)
    assert 0 < drawn.item() < 1


@given(words, words, st.integers(1, 200))
def test_permutations_are_permutations(first, second, count):
    drawn = Stream(2, "order").permutations(ids(first, 3), ids(second), count)
    assert drawn.shape == (2, count)
    assert drawn.dtype == torch.int64
    assert (drawn.sort(dim=1).values == torch.arange(count)).all()


def test_permutations_of_three_are_equally_likely():
    drawn = Stream(2, "order").permutations(torch.arange(6000), ids(0), 3)
    counts = torch.bincount(drawn[:, 0] * 9 + drawn[:, 1] * 3 + drawn[:, 2])
    counts = counts[counts > 0].double()
    assert len(counts) == 6
    # Chi-square with 5 degrees of freedom exceeds 30 once in 70,000.
    assert ((counts - 1000) ** 2 / 1000).sum() < 30


def test_equal_keys_keep_their_order(monkeypatch):
    monkeypatch.setattr(Stream, "integers", lambda *_: torch.tensor([[5, 1, 5, 1, 5] * 20]))
    drawn = Stream(0, "ties").permutations(ids(0), ids(0), 100)[0]
    keys = torch.tensor([5, 1, 5, 1, 5] * 20)
    expected = sorted(range(100), key=lambda i: (keys[i].item(), i))
    assert drawn.tolist() == expected


def test_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    stream = Stream(0, "init")
    stream.uniform(torch.arange(5), ids(0), 5)
    stream.permutations(torch.arange(5), ids(0), 5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1)
    first = stream.integers(ids(0), ids(0), 8)
    torch.manual_seed(2)
    assert torch.equal(stream.integers(ids(0), ids(0), 8), first)
    torch.random.set_rng_state(before)
