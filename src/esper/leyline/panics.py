"""Why the governor rolls a host back."""

from enum import IntEnum


class Panic(IntEnum):
    """What the governor found; NONE: nothing. A value never changes its meaning."""

    NONE = 0
    NOT_FINITE = 1
    DIVERGED = 2
    COLLAPSED = 3
    SKIPPED = 4


PANIC_TEXT: dict[Panic, str] = {
    Panic.NOT_FINITE: "the loss or a parameter of the host was not finite",
    Panic.DIVERGED: "the loss of the host was far above its own history",
    Panic.COLLAPSED: "the host had learned something and was back at chance",
    Panic.SKIPPED: "the host skipped more updates than it made, because its gradient was not finite",
}
