"""Files as accidents and vandals leave them: a few bytes changed, lost, added, doubled or moved."""

from typing import NamedTuple

from hypothesis import strategies as st

TELLING = (
    *(b"0", b"1", b"-", b".5", b"e9", b'"', b",", b":", b"{", b"}", b"[", b"]"),
    *(b" ", b"\n", b"\0", b"\xff", b"nan"),
)
"""What means something where text or JSON is expected."""


class Accident(NamedTuple):
    """What happens to a file; places modulo its length."""

    kind: str
    at: int
    to: int
    size: int
    bit: int
    news: bytes


ACCIDENTS = st.lists(
    st.builds(
        Accident,
        st.sampled_from(["flip", "cut", "insert", "double", "move", "end"]),
        st.integers(0, 2**32 - 1),
        st.integers(0, 2**32 - 1),
        st.sampled_from([1, 1, 2, 8, 64]),
        st.integers(0, 7),
        st.sampled_from(TELLING) | st.binary(max_size=9),
    ),
    min_size=1,
    max_size=3,
)


def mutated(content: bytes, accidents: list[Accident]) -> bytes:
    """The content after these accidents."""
    data = bytearray(content)
    for accident in accidents:
        at, to = accident.at % max(1, len(data)), accident.to % max(1, len(data))
        piece = data[at : at + accident.size]
        if accident.kind == "flip" and data:
            data[at] ^= 1 << accident.bit
        elif accident.kind == "cut":
            del data[at : at + accident.size]
        elif accident.kind == "insert":
            data[at:at] = accident.news
        elif accident.kind == "double":
            data[at:at] = piece
        elif accident.kind == "move":
            del data[at : at + accident.size]
            data[to:to] = piece
        elif accident.kind == "end":
            del data[at:]
    return bytes(data)
