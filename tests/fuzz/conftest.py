"""How many cases were tried."""

from helpers.fuzzing import COUNTS


def pytest_terminal_summary(terminalreporter):
    for name, number in sorted(COUNTS.items()):
        terminalreporter.write_line(f"{number:7,} cases  {name}")
    if COUNTS:
        terminalreporter.write_line(f"{COUNTS.total():7,} cases in all")
