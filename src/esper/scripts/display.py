"""Live progress of a grow run: a panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from esper.leyline.config import RunConfig
from esper.leyline.stages import Stage
from esper.simic.grow import ArmResult, DecisionLine
from esper.simic.story import Event

PLAIN_EVERY = 10
"""Without a terminal, one line for so many decisions."""
_COLOURS = {
    Stage.TRAINING.name: "cyan",
    Stage.BLENDING.name: "magenta",
    Stage.PROBATIONARY.name: "yellow",
    Stage.FOSSILIZED.name: "green",
}


class Display:
    """Shows decisions as they happen.

    Parameters
    ----------
    console
        Where to.
    config
        The run.
    planned, told
        Decisions of all arms, and those of them that an earlier process told of.
    """

    def __init__(self, console: Console, config: RunConfig, planned: int, told: int = 0) -> None:
        self.console, self.config = console, config
        self._live = Live(console=console, refresh_per_second=8, transient=True) if console.is_terminal else None
        self._total, self._before = planned, told
        self._done = told
        self._start = time.perf_counter()

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, tb)

    def show(self, arm: str, line: DecisionLine, events: list[Event]) -> None:
        """Show one decision."""
        self._done += 1
        for event in events:
            self.console.print(event_text(event), highlight=False, soft_wrap=not self.console.is_terminal)
        if line.failure is not None:
            text = Text(f"{line.decision + 1:>4}  host  ").append(line.failure, style="red")
            self.console.print(text, highlight=False, soft_wrap=not self.console.is_terminal)
        if self._live is not None:
            self._live.update(self._panel(arm, line))
        elif (line.decision + 1) % PLAIN_EVERY == 0 or line.decision + 1 == self.config.training.horizon:
            words = f"{arm}: {self._place(line)}  {_numbers(line)}  {self._pace()}"
            self.console.print(words, highlight=False, soft_wrap=True)

    def _place(self, line: DecisionLine) -> str:
        return f"decision {line.decision + 1}/{self.config.training.horizon}"

    def _pace(self) -> str:
        rate = (self._done - self._before) / (time.perf_counter() - self._start)
        left = (self._total - self._done) / rate
        return f"{rate:.1f} decisions/s  {left:.0f} s left"

    def _panel(self, arm: str, line: DecisionLine) -> Group:
        table = Table(box=None, pad_edge=False)
        for column in ("slot", "stage", "seed", "alpha", "parameters", "worth (nats)"):
            table.add_column(column, style="dim" if column == "slot" else None)
        for slot in line.slots:
            worth = slot.contribution if slot.contribution is not None else slot.incubator_gain
            error = slot.contribution_se if slot.contribution is not None else slot.incubator_gain_se
            seed = "" if slot.blueprint is None else f"{slot.blueprint} ({slot.operator})"
            table.add_row(
                slot.slot,
                Text(slot.stage, style=_COLOURS.get(slot.stage, "")),
                seed,
                f"{slot.alpha:.2f}",
                f"{slot.parameters:,}" if slot.blueprint else "",
                "" if worth is None else f"{worth:+.3f} ± {_number(error, '.3f')}",
            )
        config = self.config
        title = f"{config.task} ({config.host}), {config.controller}, seed {config.seed}: {arm}"
        progress = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=self._total, completed=self._done, width=20)
        progress.add_row(bar, f"{self._place(line)}  {self._pace()}")
        return Group(Text(title, style="bold"), progress, Text(_numbers(line)), table)


def _numbers(line: DecisionLine) -> str:
    return (
        f"loss {_number(line.train_loss, '.3f')} train, {_number(line.val_loss, '.3f')} validation (nats)  "
        f"accuracy {_number(line.val_accuracy, '.1%')}  {line.parameters:,} parameters"
    )


def event_text(event: Event) -> Text:
    """One event in one line: when, where, what, and why."""
    text = Text(f"{event.decision + 1:>4}  {event.slot}  ")
    detail = " ".join(str(v) for v in event.detail.values())
    change = event.after if event.before == event.after else f"{event.before} → {event.after}"
    if event.actor == "clock":
        text.append(f"{change}", style="dim")
    elif event.accepted:
        text.append(f"{event.what} {detail}".rstrip(), style="bold")
        text.append(f"  {change}")
    else:
        text.append(f"{event.what} refused", style="red")
        text.append(f" in {event.before}")
    if event.reason:
        text.append(f"  [{event.reason}]", style="dim")
    return text


def result_table(results: list[ArmResult]) -> Table:
    """The arms on the test split."""
    table = Table(title="Test split")
    table.add_column("network", no_wrap=True)
    for column in ("accuracy", "loss (nats)", "parameters", "seconds"):
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(
            result.arm,
            f"{result.test_accuracy:.1%}",
            _number(result.test_loss, ".3f"),
            f"{result.parameters:,}",
            f"{result.seconds:.1f}",
        )
    return table


def failures_told(results: list[ArmResult]) -> list[str]:
    """Say of which arms updates were skipped, or the host had to be restored; nothing of the others."""
    told = []
    for result in results:
        if result.skipped_updates:
            skipped = _counted(result.skipped_updates, "update")
            told.append(f"{result.arm}: {skipped} skipped, because a gradient was not finite.")
        if result.restorations:
            times = _counted(result.restorations, "time")
            told.append(f"{result.arm}: the host was restored to its last good state {times}.")
        if result.given_up is not None:
            told.append(f"{result.arm}: given up in its last good state: {result.given_up}.")
    return told


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def _number(value: float | None, form: str) -> str:
    return "not measured" if value is None else format(value, form)
