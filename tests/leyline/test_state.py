"""State as tensors by name: given, taken back, and refused where it does not fit."""

import pytest
import torch

from esper.leyline.state import below, fitting, put_back, taken, under

NAMES = ("_one_R", "two_RS")


class Part:
    def __init__(self, fill):
        self._one_R = torch.full((3,), fill)
        self.two_RS = torch.full((3, 2), int(fill))


def test_what_was_taken_is_put_back():
    part = Part(1.0)
    saved = taken(part, NAMES)
    assert list(saved) == ["one_R", "two_RS"]
    other = Part(2.0)
    put_back(other, NAMES, saved)
    assert torch.equal(other._one_R, part._one_R)
    assert torch.equal(other.two_RS, part.two_RS)
    # Each has its own memory.
    other._one_R.zero_()
    assert part._one_R.tolist() == [1.0] * 3


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"two_RS": None}, "two_RS is missing"),
        ({"two_RS": torch.zeros(3, 2)}, "two_RS is torch.float32 [3, 2] instead of torch.int64 [3, 2]"),
        (
            {"two_RS": torch.zeros(2, 2, dtype=torch.int64)},
            "two_RS is torch.int64 [2, 2] instead of torch.int64 [3, 2]",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(change, complaint):
    saved = {name: tensor for name, tensor in (taken(Part(1.0), NAMES) | change).items() if tensor is not None}
    part = Part(2.0)
    with pytest.raises(ValueError, match="two_RS") as caught:
        put_back(part, NAMES, saved)
    assert str(caught.value) == complaint
    assert part._one_R.tolist() == [2.0] * 3


def test_a_copy_is_given():
    saved = {"a": torch.ones(2)}
    found = fitting("a", torch.zeros(2), saved)
    found.zero_()
    assert saved["a"].tolist() == [1.0, 1.0]


def test_names_are_put_under_a_part_and_found_below_it():
    tensors = {"a": torch.ones(1), "b/c": torch.zeros(1)}
    every = under("part", tensors) | under("partner", {"a": torch.full((1,), 7.0)})
    assert list(every) == ["part/a", "part/b/c", "partner/a"]
    assert below("part", every) == tensors
    assert below("other", every) == {}
