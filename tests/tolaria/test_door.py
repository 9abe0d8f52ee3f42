"""The door of data: what is taken, what is refused, and that the one line says which part is wrong and why."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from esper.leyline.errors import EsperError
from esper.tolaria.datasets import Dataset, Split
from esper.tolaria.door import IGNORED, counts

PARTS = ("train", "reward_validation", "selection", "test")
EXAMPLE = (1, 4, 3)
CLASSES = 5
parts = pytest.mark.parametrize("part", PARTS)


def good(examples: int = 6) -> Split:
    return Split(torch.randn(examples, *EXAMPLE), torch.arange(examples) % CLASSES)


def data_with(part: str, split: Split, classes: int = CLASSES) -> Dataset:
    """A data set that is good but for one part."""
    return Dataset("mine", classes, **{name: split if name == part else good() for name in PARTS})


def test_what_is_good_is_taken_as_it_is():
    split = good()
    data = data_with("selection", split)
    assert data.selection.x is split.x
    assert data.selection.y is split.y


@parts
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64]
)
def test_labels_of_any_width_are_taken(part, dtype):
    split = good()
    taken = getattr(data_with(part, Split(split.x, split.y.to(dtype))), part).y
    assert taken.dtype == torch.int64
    assert torch.equal(taken, split.y)


@parts
def test_images_as_bytes_become_floats_from_0_to_1(part):
    x = torch.tensor([0, 51, 255], dtype=torch.uint8).repeat(6, 1)[:, None, :, None].expand(6, 1, 3, 2)
    data = Dataset("mine", CLASSES, **dict.fromkeys(PARTS, Split(x, torch.arange(6) % CLASSES)))
    taken = getattr(data, part).x
    assert taken.dtype == torch.float32
    torch.testing.assert_close(taken[0, 0, :, 0], torch.tensor([0.0, 0.2, 1.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_keep_their_width(dtype):
    split = good()
    assert data_with("train", Split(split.x.to(dtype), split.y)).train.x.dtype == dtype


def labels(*values: int) -> Split:
    return Split(torch.randn(len(values), *EXAMPLE), torch.tensor(values))


def spoiled(*places: tuple[int, float]) -> Split:
    split = good()
    for example, value in places:
        split.x[example, 0, 1, 2] = value
    return split


GOOD = good()
FAULTS = {
    "an array": (Split(np.zeros((6, *EXAMPLE)), GOOD.y), "x is of type ndarray; give a torch.Tensor"),
    "a list of labels": (Split(GOOD.x, [0] * 6), "y is of type list; give a torch.Tensor"),
    "integer inputs": (Split(GOOD.x.long(), GOOD.y), "x is torch.int64; give floats, or images as torch.uint8"),
    "boolean inputs": (Split(GOOD.x > 0, GOOD.y), "x is torch.bool; give floats, or images as torch.uint8"),
    "complex inputs": (Split(GOOD.x + 0j, GOOD.y), "x is torch.complex64; give floats, or images as torch.uint8"),
    "float labels": (Split(GOOD.x, GOOD.y.float()), "y is torch.float32; give integers"),
    "boolean labels": (Split(GOOD.x, GOOD.y > 1), "y is torch.bool; give integers"),
    "flat inputs": (Split(torch.zeros(6), GOOD.y), "x has shape (6,); give (examples, ...)"),
    "no examples": (Split(GOOD.x[:0], GOOD.y[:0]), "x has shape (0, 1, 4, 3) and is empty"),
    "empty examples": (Split(GOOD.x[:, :, :0], GOOD.y), "x has shape (6, 1, 0, 3) and is empty"),
    "nan": (spoiled((4, torch.nan), (2, torch.inf)), "x of example 2 is not finite (2 numbers of 72 are not)"),
    "infinite": (spoiled((5, -torch.inf)), "x of example 5 is not finite (1 numbers of 72 are not)"),
    "too few labels": (Split(GOOD.x, GOOD.y[:5]), "y has shape (5,), not (6,): one label for each example"),
    "one-hot labels": (Split(GOOD.x, torch.eye(6).long()), "y has shape (6, 6), not (6,): one label for each example"),
    "a class too many": (labels(0, 1, 5), "y of example 2 is 5; give classes from 0 to 4, or -100 where"),
    "a negative class": (labels(0, -1, 5), "y of example 1 is -1; give classes from 0 to 4, or -100 where"),
    "a byte for ignored": (Split(GOOD.x, torch.full((6,), 255, dtype=torch.uint8)), "y of example 0 is 255; give"),
    "nothing counts": (labels(IGNORED, IGNORED), "0 of 2 labels count; at least"),
}


@parts
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_said_in_one_line_that_names_the_part(part, fault):
    split, said = FAULTS[fault]
    with pytest.raises(EsperError) as refused:
        data_with(part, split)
    message = str(refused.value)
    assert message.startswith(f"{part} split: {said}")
    assert "\n" not in message


@pytest.mark.parametrize("part", PARTS[1:])
def test_all_parts_have_examples_of_one_shape(part):
    with pytest.raises(EsperError) as refused:
        data_with(part, Split(torch.zeros(6, 1, 3, 4), GOOD.y))
    assert str(refused.value) == f"{part} split: examples have shape (1, 3, 4), those of train (1, 4, 3)"


@pytest.mark.parametrize("classes", [1, 0, -3])
def test_one_class_is_nothing_to_learn(classes):
    with pytest.raises(EsperError, match="two at least"):
        data_with("train", good(), classes)


def test_a_standard_error_needs_two_labels_that_count():
    one = labels(IGNORED, 3, IGNORED)
    with pytest.raises(EsperError, match="reward_validation split: 1 of 3 labels count; at least 2 must"):
        data_with("reward_validation", one)
    for part in ("train", "selection", "test"):
        assert getattr(data_with(part, one), part) is one


def test_every_data_set_passes_the_door():
    data = data_with("train", good())
    with pytest.raises(EsperError, match="test split: "):
        replace(data, test=spoiled((0, torch.nan)))


def test_what_counts():
    assert counts(torch.tensor([[0, IGNORED], [-1, 7]])).tolist() == [[True, False], [True, True]]
    # As torch's losses have it.
    ignored = torch.nn.functional.cross_entropy(torch.zeros(1, 3), torch.tensor([IGNORED]), reduction="sum")
    assert ignored == 0


def test_the_counted_part_is_found_once():
    split = labels(2, IGNORED, 0, IGNORED, 1)
    assert split.counted.y.tolist() == [2, 0, 1]
    assert torch.equal(split.counted.x, split.x[[0, 2, 4]])
    assert split.counted is split.counted
    whole = good()
    assert whole.counted is whole
