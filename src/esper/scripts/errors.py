"""One clear line for what a user got wrong."""

from __future__ import annotations

import re

from pydantic import ValidationError

_BOX = re.compile(r"[╭╮╰╯│]")
_VALIDATION = re.compile(r"validation errors? for \w+ (\S+) (.*?) \[type=\w+, input_value=(.*?), input_type")


def validation_line(error: ValueError) -> str:
    """The first complaint of a validation in one line: where, what would be right, what came."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key; remove it or correct its spelling"
    given = "" if first["type"].startswith(("json", "value_error")) else f"; got {first['input']!r}"
    return f"{where + ': ' if where else ''}{_lowered(first['msg'])}{given}"


def parse_line(complaint: str) -> str:
    """What the parser of the command line complains about in one line: its boxes unfolded."""
    text = "\n".join(_BOX.sub("", line).strip() for line in complaint.splitlines() if not line.startswith("╭"))
    sections = [" ".join(part.split()) for part in re.split(r"\n─+\n", text)]
    message = sections[0]
    if found := _VALIDATION.search(message):
        where, reason, given = found.groups()
        came = "" if reason.startswith("Value error, ") else f"; got {given}"
        return f"{where}: {_lowered(reason)}{came}"
    meant = re.search(r"Perhaps you meant: (--[\w.-]+)", " ".join(sections[1:]))
    known = re.search(r"Available subcommands: (.*)", " ".join(sections[1:2]))
    if meant:
        message += f"; perhaps you meant {meant[1]}"
    elif known:
        message += f"; commands: {known[1]}"
    return f"{_lowered(message)}; see esper --help"


def _lowered(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]
