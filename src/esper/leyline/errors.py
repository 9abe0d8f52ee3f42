"""Errors that a user can act on."""


class EsperError(Exception):
    """What was wrong, where, and what would be right, in one line.

    The command line prints the message without a traceback and exits with code 2. What it quotes may hold anything;
    signs that would break the line, or that a terminal would obey, are shown as Python writes them.
    """

    def __str__(self) -> str:
        """Give the message as one line."""
        message = super().__str__()
        return "".join(s if s.isprintable() else s.encode("unicode_escape").decode() for s in message)


class InvalidStateMachineError(RuntimeError):
    """A decision found no legal action: the state of a slot is one that the lifecycle cannot reach."""
