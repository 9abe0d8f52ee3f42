"""One clear line for what a user got wrong, and the exit codes."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable

from pydantic import ValidationError

from esper.leyline.errors import EsperError

BAD_INPUT = 2
"""Exit code where the user can put it right."""
INTERRUPTED = 130
"""Exit code of what ctrl-C ended, as shells have it."""
READER_GONE = 141
"""Exit code where the output's reader ended first, as `head` does; shells report SIGPIPE so."""
MOST_QUOTED = 100
"""Signs of what was given that a complaint repeats."""
_BOX = re.compile(r"[╭╮╰╯│]")
_RULE = re.compile(r"[─-]+")
_OWN_RULE = "Value error, "
_VALIDATION = re.compile(
    rf"validation errors? for \w+ (?:(?!{_OWN_RULE})(\S+) )?(.*?) \[type=\w+, input_value=(.*?), input_type"
)


def exit_code(command: Callable[[], int]) -> int:
    """Run a command and give its exit code: its own, 2 and one line for bad input, 130 for ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A page whose encoding lacks a sign shows a question mark.
            stream.reconfigure(errors="replace")
    try:
        code = command()
        sys.stdout.flush()
        return code
    except EsperError as error:
        print(f"esper: {error}", file=sys.stderr)
        return BAD_INPUT
    except BrokenPipeError:
        _drop_output()
        return READER_GONE
    except OSError as error:
        _drop_output()
        print(f"esper: cannot write the output: {error.strerror or error}", file=sys.stderr)
        return BAD_INPUT
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        print(
            "esper: not enough memory; take fewer hosts, a smaller batch, shorter episodes or a smaller network",
            file=sys.stderr,
        )
        return BAD_INPUT
    except KeyboardInterrupt:
        print("esper: stopped at once", file=sys.stderr)
        return INTERRUPTED


def _drop_output() -> None:
    """Send what is still buffered nowhere: the interpreter would fail on it once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _out_of_memory(error: Exception) -> bool:
    """Whether that is what happened: torch says so in words of its own for each device."""
    said = str(error)
    return isinstance(error, MemoryError) or "can't allocate memory" in said or "out of memory" in said


def validation_line(error: ValueError) -> str:
    """The first complaint of a validation in one line: where, what would be right, what came."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
    if first["type"] == "extra_forbidden":
        return f"{_quoted(where)}: unknown key; remove it or correct its spelling"
    given = "" if first["type"].startswith(("json", "value_error")) else f"; got {_quoted(repr(first['input']))}"
    return f"{where + ': ' if where else ''}{_lowered(first['msg'])}{given}"


def parse_line(complaint: str) -> str:
    """What the parser of the command line complains about in one line: its boxes unfolded."""
    message, *sections = _sections(complaint)
    if found := _VALIDATION.search(message):
        where, reason, given = found.groups()
        came = "" if reason.startswith(_OWN_RULE) else f"; got {given}"
        return f"{where + ': ' if where else ''}{_lowered(reason)}{came}"
    message = message.rstrip(".")
    meant = re.search(r"Perhaps you meant: (--[\w.-]+)", " ".join(sections))
    known = re.search(r"Available subcommands: (.*)", " ".join(sections[:1]))
    if meant:
        message += f"; perhaps you meant {meant[1]}"
    elif known:
        message += f"; commands: {known[1]}"
    return f"{_lowered(message)}; see esper --help"


def _sections(complaint: str) -> list[str]:
    """Parts of a box between its rules, each in one line, without the title."""
    lines = [_BOX.sub("", line).strip() for line in complaint.strip().splitlines()]
    # Where the encoding has no boxes, the title stands on a rule.
    titled = complaint.lstrip().startswith("╭") or (len(lines) > 1 and _RULE.fullmatch(lines[1]))
    sections = [""]
    for line in lines[1:] if titled else lines:
        if _RULE.fullmatch(line):
            sections.append("")
        else:
            sections[-1] = f"{sections[-1]} {line}".strip()
    return [section for section in sections if section]


def _quoted(text: str) -> str:
    """Shorten what was given to its beginning."""
    return text if len(text) <= MOST_QUOTED else f"{text[:MOST_QUOTED]}..."


def _lowered(message: str) -> str:
    message = message.removeprefix(_OWN_RULE)
    return message[:1].lower() + message[1:]
