"""Errors that a user can act on."""


class EsperError(Exception):
    """What was wrong, where, and what would be right, in one line.

    The command line prints the message without a traceback and exits with code 2.
    """


class InvalidStateMachineError(RuntimeError):
    """A decision found no legal action: the state of a slot is one that the lifecycle cannot reach."""
