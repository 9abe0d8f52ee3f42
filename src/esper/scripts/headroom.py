"""`esper exam headroom`: how much fixed plans gain, and how much of it comes from choosing one for each context."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from esper.exam.cells import ROWS, Cells, kept_cells
from esper.exam.headroom import ASKED, LEAST, Headroom, Way, measure, worth
from esper.exam.plans import Family, Plan, candidates
from esper.exam.replay import modal_plans
from esper.exam.saved import load_headroom, load_plans, save_headroom, save_plans
from esper.exam.search import rungs
from esper.leyline.config import RUN_FOLDER, HeadroomConfig
from esper.leyline.errors import EsperError
from esper.nissa.store import RunStore
from esper.nissa.writer import Kept
from esper.scripts.errors import INTERRUPTED
from esper.scripts.exam_common import Stopped, begin, plain_table, watched, wide_console
from esper.scripts.running import Interrupt, check_resumable, open_store
from esper.simic.contexts import conditions
from esper.simic.episode import Episode
from esper.simic.recorder import RoundRecorder
from esper.simic.run_folder import BEST_POLICY, HEADROOM, RunFolder
from esper.tamiyo.policy.saved import load_policy
from esper.tolaria.tasks import Task

_WAYS = {
    Way.SINGLE: "best plan",
    Way.BY_PRICE: "best by price",
    Way.BY_CONTEXT: "best by context",
}


def headroom(config: HeadroomConfig, *, out: Path | None, replace: bool, resume: Path | None = None) -> int:
    """Search, from the start or behind the last whole cell of a search that was stopped; give the exit code."""
    console = wide_console()
    path = resume or out or RUN_FOLDER / f"headroom-{config.task}-{config.host}-seed{config.seed}"
    if resume is not None:
        check_resumable(config, resume, out, replace)
    tasks = begin(config, config.contexts)
    slots = tasks[0].host.slot_config
    contexts = len(tasks) * len(conditions(config.contexts))
    if resume is None:
        family = Family.of(config, slots)
        named = _named(config, tasks, family)
        ladder = rungs(config.episodes, contexts, len(candidates(family, named, config.seed)))
        plans = candidates(family, named, config.seed, ladder[0].plans)
        kept = None
    else:
        plans, ladder = load_plans(resume), rungs(config.episodes, contexts, 1)
        kept = Kept(len(kept_cells(resume)))
        if kept.rounds == 0:
            raise EsperError(f"resume: {resume} has no cell that can be used; begin again with --out and --replace")
    folder = RunFolder(path, config, replace=replace, resume=resume is not None)
    save_plans(path, plans)
    interrupt = Interrupt()
    table: Headroom | None = None
    planned = _scoring(config, len(tasks)) + sum(rung.plans * len(rung.starts) * contexts for rung in ladder)
    decisions = -(-planned // ROWS) * config.training.horizon
    with open_store(folder, config, "exam headroom", decisions, kept=kept) as store, interrupt.watching():
        with contextlib.suppress(Stopped), watched(console, interrupt) as told:
            progress = _Progress(console, told, planned)
            cells = Cells(path, config, tasks, plans, recorder=_recorder(store), told=progress.episodes)
            progress.left -= cells.kept_episodes
            table = measure(config, plans, ladder, slots.slot_ids, cells, stage=progress.stage)
        if store is not None:
            store.close("interrupted" if table is None else "finished")
    if table is None:
        console.print(f"Stopped. Go on with: esper exam headroom --resume {shlex.quote(str(path))}", soft_wrap=True)
        return INTERRUPTED
    save_headroom(path, table)
    _show(console, table)
    console.print(f"Saved in {path / HEADROOM}.", soft_wrap=True)
    return 0


def _named(config: HeadroomConfig, tasks: Sequence[Task], family: Family) -> tuple[Plan, ...]:
    """Give the plans that policies and earlier searches found."""
    named: list[Plan] = []
    for name in config.plans_of:
        folder = Path(name)
        if (folder / BEST_POLICY).exists():
            modal = modal_plans(config, config.contexts, tasks, load_policy(folder / BEST_POLICY, config.device))
            found: Sequence[Plan] = (modal.plan, *modal.by_price)
        else:
            earlier = load_headroom(folder)
            found = [earlier.plans[n] for n in np.unique(earlier.chosen_VWCP)]
        for plan in found:
            misfit = family.misfit(plan)
            if misfit is not None:
                raise EsperError(f"plans_of: a plan of {folder} cannot be played here: {misfit}")
        named += found
    return tuple(named)


def _scoring(config: HeadroomConfig, hosts: int) -> int:
    """Episodes of scoring, if every plan that is chosen is another one."""
    prices, cells = len(config.contexts.prices), len(conditions(config.contexts))
    return hosts * cells * config.starts * (2 + 2 * prices)


def _recorder(store: RunStore | None) -> Callable[[Episode, int], RoundRecorder | None] | None:
    if store is None:
        return None
    return lambda episode, number: RoundRecorder(
        store, number, episode, purpose="selection", arm="plans", controller="plan"
    )


class _Progress:
    """Says what is being done, how fast, and how long it will take.

    Attributes
    ----------
    left
        Episodes that were to be played when this began.
    """

    def __init__(self, console: Console, told: Callable[[str, float], None], episodes: int) -> None:
        self._console, self._told, self.left = console, told, episodes
        self._stage, self._began = "", time.perf_counter()

    def stage(self, what: str, episodes: int) -> None:
        """Take note of what begins."""
        self._stage = what
        self._console.print(f"{time.strftime('%H:%M:%S')}  {what}, {episodes:,} episodes", highlight=False)

    def episodes(self, played: float) -> None:
        """Show how many episodes were played since this began."""
        rate = played / (time.perf_counter() - self._began)
        self._told(f"{self._stage}, {rate:.1f} episodes/s", min(1.0, played / max(1, self.left)))


def _show(console: Console, table: Headroom) -> None:
    best = plain_table("Best plan for each context", "host", "rate", "noise", "price", "net gain", "plan")
    net_VWKCP = table.net_VWKCP
    for w, host in enumerate(table.hosts):
        for c, (rate, noise) in enumerate(table.conditions):
            for p, price in enumerate(table.prices):
                plan = table.plans[table.chosen_VWCP[Way.BY_CONTEXT, w, c, p]].text(table.slot_ids)
                net = net_VWKCP[Way.BY_CONTEXT, w, :, c, p].mean()
                best.add_row(host, *(f"{value:g}" for value in (rate, noise, price)), f"{net:+.4f}", plan)
    by_price = plain_table("Best plan for everything, and for each price", "price", "net gain", "plan")
    single = table.plans[table.chosen_VWCP[Way.SINGLE, 0, 0, 0]].text(table.slot_ids)
    by_price.add_row("every", f"{net_VWKCP[Way.SINGLE].mean():+.4f}", single, end_section=True)
    for p, price in enumerate(table.prices):
        plan = table.plans[table.chosen_VWCP[Way.BY_PRICE, 0, 0, p]].text(table.slot_ids)
        by_price.add_row(f"{price:g}", f"{net_VWKCP[Way.BY_PRICE, ..., p].mean():+.4f}", plan)
    for shown in (best, by_price, _worth_table(table)):
        console.print(shown)
    console.print(_verdict(table), soft_wrap=True)


def _worth_table(table: Headroom) -> Table:
    starts = table.gain_VWKCP.shape[2]
    title = f"Net gain (nats) on {starts} fresh starts, ± standard error over starts"
    shown = plain_table(title, "price", *_WAYS.values(), "context adds to price")
    for p in (None, *range(len(table.prices))):
        found = worth(table, p)
        cells = (f"{net:+.4f} ± {se:.4f}" for net, se in zip(found.net, found.net_se, strict=True))
        shown.add_row(
            "every" if p is None else f"{table.prices[p]:g}", *cells, found.adds.text(), end_section=p is None
        )
    return shown


def _verdict(table: Headroom) -> str:
    """Say whether a comparison in these contexts can show who decides best."""
    found = worth(table)
    what = f"knowing the context adds {found.adds.text()} nats to the best plan for each price"
    asked = f"asked: at least {ASKED:g} nats, lower end above {LEAST:g}"
    seen = f"{len(table.plans):,} plans, {table.episodes:,} episodes"
    return f"{'accepted' if found.accepted else 'not accepted'}: {what} ({asked}; {seen})"
