"""The data sets: their parts, their seeds, and what a damaged file says."""

import gzip
import importlib.resources
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch

from esper.leyline.errors import EsperError
from esper.tolaria import mnist1d
from esper.tolaria.datasets import DATASETS, load_digits, load_mnist1d, stratified_parts

PARTS = ("train", "reward_validation", "selection", "test")
SIZES = {"digits": (897, 300, 300, 300), "mnist1d": (2800, 600, 600, 1000)}
ROW_SHAPE = {"digits": (1, 8, 8), "mnist1d": (1, 40)}
names = pytest.mark.parametrize("name", sorted(SIZES))


def rows(split):
    return {row.numpy().tobytes() for row in split.x}


def same(a, b):
    return torch.equal(a.x, b.x) and torch.equal(a.y, b.y)


def test_the_data_sets_on_hand():
    assert set(DATASETS) == set(SIZES)


@names
def test_sizes_shapes_and_dtypes(name):
    data = DATASETS[name](0)
    assert data.name == name
    assert data.classes == 10
    for part, size in zip(PARTS, SIZES[name], strict=True):
        split = getattr(data, part)
        assert split.x.shape == (size, *ROW_SHAPE[name])
        assert split.x.dtype == torch.float32
        assert split.y.shape == (size,)
        assert split.y.dtype == torch.int64
        assert set(split.y.tolist()) == set(range(10))


@names
def test_parts_are_disjoint_and_complete(name):
    # No two rows of either set are equal, so a row's content tells where it went.
    data = DATASETS[name](3)
    contents = [rows(getattr(data, part)) for part in PARTS]
    assert [len(content) for content in contents] == list(SIZES[name])
    assert len(set().union(*contents)) == sum(SIZES[name])


@names
def test_rows_keep_their_classes(name):
    data = DATASETS[name](3)
    x = torch.cat([getattr(data, part).x for part in PARTS]).numpy()
    y = torch.cat([getattr(data, part).y for part in PARTS]).tolist()
    if name == "digits":
        known_x, known_y = sklearn.datasets.load_digits(return_X_y=True)
        # Undoes the scaling: the pixels are the integers 0 to 16.
        x = np.rint((x - x.min()) / (x.max() - x.min()) * 16).astype(np.float64)
    else:
        known_x, known_y = mnist1d.generate()
        known_x = known_x.astype(np.float32)
    known = {row.tobytes(): label for row, label in zip(known_x, known_y, strict=True)}
    assert [known[row.tobytes()] for row in x] == y


@names
@pytest.mark.parametrize("seed", [0, 1, 2, 12345])
def test_parts_are_stratified(name, seed):
    data = DATASETS[name](seed)
    divided = PARTS if name == "digits" else PARTS[:3]
    counts = np.stack([np.bincount(getattr(data, part).y.numpy(), minlength=10) for part in divided])
    proportion = np.outer(counts.sum(axis=1), counts.sum(axis=0)) / counts.sum()
    assert np.abs(counts - proportion).max() <= 2


@names
def test_same_seed_same_parts(name):
    first, second = DATASETS[name](7), DATASETS[name](7)
    for part in PARTS:
        assert same(getattr(first, part), getattr(second, part))


@names
def test_another_seed_divides_otherwise(name):
    first, second = DATASETS[name](7), DATASETS[name](8)
    for part in PARTS[:3]:
        assert not torch.equal(getattr(first, part).y, getattr(second, part).y)
    assert rows(first.train) != rows(second.train)


def test_mnist1d_test_part_is_the_published_one_whatever_the_seed():
    first, second = load_mnist1d(7), load_mnist1d(8)
    assert same(first.test, second.test)
    x, y = mnist1d.generate()
    np.testing.assert_array_equal(first.test.x[:, 0].numpy(), x[4000:].astype(np.float32))
    np.testing.assert_array_equal(first.test.y.numpy(), y[4000:])


def test_digits_are_standardized_by_the_train_part_alone():
    data = load_digits(0)
    assert abs(data.train.x.mean().item()) < 1e-5
    assert abs(data.train.x.std(correction=0).item() - 1) < 1e-5
    everything = torch.cat([getattr(data, part).x for part in PARTS])
    assert abs(everything.mean().item()) > 1e-5


@names
def test_parts_do_not_share_memory(name):
    first = DATASETS[name](0)
    first.train.x.zero_()
    first.test.x.zero_()
    second = DATASETS[name](0)
    assert second.train.x.abs().sum() > 0
    assert second.test.x.abs().sum() > 0


@names
def test_to_moves_every_part(name):
    data = DATASETS[name](0)
    moved = data.to("meta", torch.float64)
    assert (moved.name, moved.classes) == (data.name, data.classes)
    for part in PARTS:
        split = getattr(moved, part)
        assert split.x.device.type == split.y.device.type == "meta"
        assert split.x.dtype == torch.float64
        assert split.y.dtype == torch.int64
        assert split.x.shape == getattr(data, part).x.shape
    there = data.to(torch.device("cpu"), torch.float64)
    for part in PARTS:
        assert torch.equal(getattr(there, part).x.float(), getattr(data, part).x)
        assert torch.equal(getattr(there, part).y, getattr(data, part).y)


@names
def test_global_generators_untouched(name):
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    mnist1d.generate.cache_clear()
    DATASETS[name](5)
    numpy_after = np.random.get_state()  # noqa: NPY002
    assert torch.equal(torch_before, torch.get_rng_state())
    np.testing.assert_array_equal(numpy_before[1], numpy_after[1])
    assert numpy_before[2:] == numpy_after[2:]


def test_global_generators_do_not_matter():
    first = load_digits(5)
    state = np.random.get_state()  # noqa: NPY002
    try:
        np.random.seed(99)  # noqa: NPY002
        second = load_digits(5)
    finally:
        np.random.set_state(state)  # noqa: NPY002
    assert same(first.train, second.train)


def test_stratified_parts_refuses_wrong_sizes():
    with pytest.raises(ValueError, match="sum to 9, not to the 10 rows"):
        stratified_parts(np.zeros(10, dtype=np.int64), (4, 5), 0)


def test_negative_seed_is_refused():
    with pytest.raises(ValueError, match="non-negative"):
        load_mnist1d(-1)


# Each takes the good file's path and spoils it.


def truncate(path):
    path.write_bytes(path.read_bytes()[:20_000])


def overwrite_the_middle(path):
    whole = bytearray(path.read_bytes())
    whole[5000:5400] = b"\xff" * 400
    path.write_bytes(bytes(whole))


def replace_by_text(path):
    path.write_text("<html>\n<body>not a data file</body>\n</html>\n")


def make_a_folder(path):
    path.unlink()
    path.mkdir()


def edit(change):
    def spoil(path):
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
        path.write_bytes(gzip.compress("\n".join(change(lines)).encode()))

    return spoil


SPOILERS = {
    "missing": (Path.unlink, "the file is missing"),
    "truncated": (truncate, "cannot be read"),
    "garbled": (overwrite_the_middle, "cannot be read"),
    "not gzip": (replace_by_text, "cannot be read"),
    "folder": (make_a_folder, "cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "no rows": (edit(lambda lines: []), "cannot be read"),
    "words": (edit(lambda lines: ["zero,one", *lines[1:]]), "cannot be read"),
    "not utf-8": (lambda path: path.write_bytes(gzip.compress(b"\xff\xfe")), "cannot be read"),
    "short": (edit(lambda lines: lines[:-1]), "have shape (1796, 64)"),
    "narrow": (edit(lambda lines: [line[2:] for line in lines]), "cannot be read"),
    "no nines": (edit(lambda lines: [re.sub("9$", "0", line) for line in lines]), "0 to 9"),
    "tens": (edit(lambda lines: [lines[0][:-1] + "10", *lines[1:]]), "0 to 9"),
    "nan pixel": (edit(lambda lines: ["nan" + lines[0][1:], *lines[1:]]), "0 to 16"),
    "bright pixel": (edit(lambda lines: ["17" + lines[0][1:], *lines[1:]]), "0 to 16"),
    "another pixel": (edit(lambda lines: ["1" + lines[0][1:], *lines[1:]]), "it holds other digits"),
    "another order": (edit(lambda lines: lines[::-1]), "it holds other digits"),
    "negative pixel": (edit(lambda lines: ["-1" + lines[0][1:], *lines[1:]]), "0 to 16"),
}


@pytest.fixture
def digits_file(tmp_path, monkeypatch):
    """Give a copy of scikit-learn's digits file, from which scikit-learn now reads."""
    folder = Path(sklearn.datasets.__file__).parent
    shutil.copy(folder / "data" / "digits.csv.gz", tmp_path)
    shutil.copy(folder / "descr" / "digits.rst", tmp_path)
    monkeypatch.setattr(importlib.resources, "files", lambda module: tmp_path)
    return tmp_path / "digits.csv.gz"


def test_the_copied_digits_file_is_read(digits_file):
    assert load_digits(0).train.x.shape == (897, 1, 8, 8)


@pytest.mark.parametrize("case", SPOILERS)
def test_spoiled_digits_file(digits_file, case):
    spoil, said = SPOILERS[case]
    spoil(digits_file)
    with pytest.raises(EsperError) as caught:
        load_digits(0)
    message = str(caught.value)
    assert said in message
    assert "digits.csv.gz" in message
    assert "reinstall scikit-learn" in message
    assert "\n" not in message


def test_missing_description_is_named(digits_file):
    (digits_file.parent / "digits.rst").unlink()
    with pytest.raises(EsperError, match=r"digits\.rst: the file is missing"):
        load_digits(0)


@pytest.mark.parametrize("error", [PermissionError(13, "denied"), OSError("disk\nfault"), EOFError()])
def test_reader_errors(monkeypatch, error):
    def fail(**_):
        raise error

    monkeypatch.setattr(sklearn.datasets, "load_digits", fail)
    with pytest.raises(EsperError) as caught:
        load_digits(0)
    assert "\n" not in str(caught.value)
    assert "digits.csv.gz: it cannot be read (" in str(caught.value)
