"""`esper exam`: how much there is to gain by deciding, and who decides best."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from esper.exam.compare import CONTROLS, POLICY, Score, arms, compare, differences
from esper.exam.headroom import Headroom, measure, price_lines
from esper.exam.saved import load_headroom, save_comparison, save_headroom
from esper.exam.statistics import Difference, paired
from esper.leyline.config import CONFIG, RUN_FOLDER, CompareConfig, HeadroomConfig, PopulationConfig, TrainConfig
from esper.leyline.errors import EsperError
from esper.nissa.store import RunStore
from esper.scripts.configs import first_difference, read_config
from esper.scripts.errors import INTERRUPTED
from esper.scripts.running import Interrupt, open_store
from esper.simic.episode import Episode
from esper.simic.recorder import RoundRecorder
from esper.simic.run_folder import BEST_POLICY, COMPARISON, HEADROOM, RunFolder
from esper.tamiyo.policy.saved import load_policy
from esper.tolaria.machine import check_device, tune_process
from esper.tolaria.tasks import Task, load_task

_SHARED = ("task", "host", "blueprints", "training", "optimizer", "growth", "governor", "contexts")
"""Settings that a policy must have been trained with, to be compared."""


PIPE_WIDTH = 120
"""Signs of a line where the output is no terminal."""


class _Stopped(Exception):
    """Ctrl-C was pressed."""


@contextlib.contextmanager
def _progress(interrupt: Interrupt) -> Iterator[Callable[[str, float], None]]:
    """Show what is being done and how long it will take; stop where ctrl-C asks for it."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()) as progress:
        bar = progress.add_task("", total=1.0)

        def told(what: str, share: float) -> None:
            progress.update(bar, completed=share, description=what)
            if interrupt.asked:
                raise _Stopped

        yield told


def _begin(config: PopulationConfig, widths: Sequence[float]) -> list[Task]:
    check_device(config.device)
    tune_process(1)
    return [load_task(config.task, config.host, config.device, width=width) for width in widths]


def _console() -> Console:
    """Tables of many columns need more than the 80 signs that a pipe is taken to have."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)


def _recorder(
    store: RunStore | None, purpose: str, controller: Callable[[str], str]
) -> Callable[[Episode, str], RoundRecorder | None]:
    """Give what makes a recorder for each population of an arm, in the order in which they are played."""
    number = itertools.count()

    def make(episode: Episode, arm: str) -> RoundRecorder | None:
        if store is None:
            return None
        return RoundRecorder(store, next(number), episode, purpose=purpose, arm=arm, controller=controller(arm))

    return make


def headroom(config: HeadroomConfig, *, out: Path | None, replace: bool) -> int:
    """Run the table of schedules in every context; give the exit code."""
    console = _console()
    tasks = _begin(config, config.contexts.host_widths)
    path = out or RUN_FOLDER / f"headroom-{config.task}-{config.host}-seed{config.seed}"
    folder = RunFolder(path, config, replace=replace)
    interrupt = Interrupt()
    table: Headroom | None = None
    planned = config.starts * len(tasks) * config.training.horizon
    with open_store(folder, config, "exam headroom", planned) as store, interrupt.watching():
        recorder = _recorder(store, "selection", lambda _: "schedule")
        with contextlib.suppress(_Stopped), _progress(interrupt) as told:
            table = measure(
                config,
                tasks,
                recorder=lambda episode: recorder(episode, "schedules"),
                told=lambda share: told("schedules", share),
            )
        if store is not None:
            store.close("interrupted" if table is None else "finished")
    if table is None:
        console.print("Stopped: a table of schedules is of use only when it is whole. Fewer --starts take less time.")
        return INTERRUPTED
    save_headroom(folder.path, table)
    _show_headroom(console, table, config)
    console.print(f"Saved in {path / HEADROOM}.", soft_wrap=True)
    return 0


def _show_headroom(console: Console, table: Headroom, config: HeadroomConfig) -> None:
    prices = config.contexts.prices
    best = _table("Best schedule of each context", "width", "rate", "noise", "price", "gain less rent", "schedule")
    nets = [table.net(price).mean(1) for price in prices]
    for w, width in enumerate(table.widths):
        for c, (rate, noise) in enumerate(table.conditions):
            for price, net in zip(prices, nets, strict=True):
                plan = table.plans[net[w, c].argmax()].text(table.slot_ids)
                best.add_row(*(f"{value:g}" for value in (width, rate, noise, price)), f"{net[w, c].max():+.4f}", plan)
    console.print(best)
    single = _table("Best schedule for all contexts of a price", "price", "gain less rent", "schedule")
    worth = _table(
        f"Gain less rent (nats), {config.starts} starts: chosen on one half of them, scored on the other",
        *("price", "one schedule", "by width", "by context", "context adds", "others best in"),
    )
    for line in price_lines(table, prices):
        single.add_row(f"{line.price:g}", f"{line.best_net:+.4f}", line.best.text(table.slot_ids))
        worth.add_row(
            f"{line.price:g}",
            *(f"{value:+.4f}" for value in (line.single, line.by_width, line.by_context)),
            f"{line.choosing:+.4f} ± {line.choosing_se:.4f}",
            f"{line.different[0]} of {line.different[1]}",
        )
    console.print(single)
    console.print(worth)


def _table(title: str, *columns: str) -> Table:
    """Give a table whose columns of words stand left and whose numbers stand right."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        words = column in ("schedule", "arm", "policy", "against")
        table.add_column(column, justify="left" if words else "right", no_wrap=not words)
    return table


def comparison(folder: Path, policies: Sequence[Path], starts: int, *, out: Path | None, replace: bool) -> int:
    """Compare policies with their controls; give the exit code."""
    console = _console()
    schedules = read_config(folder / CONFIG, HeadroomConfig)
    table = load_headroom(folder)
    for policy in policies:
        _check_same(policy, schedules)
    config = CompareConfig(
        **{name: getattr(schedules, name) for name in (*_SHARED, "seed", "device")},
        headroom=str(folder),
        policies=tuple(map(str, policies)),
        starts=starts,
    )
    tasks = _begin(config, config.contexts.host_widths)
    players = arms(config.contexts.prices, table, [load_policy(path / BEST_POLICY, config.device) for path in policies])
    path = out or RUN_FOLDER / f"compare-{config.task}-{config.host}-seed{config.seed}"
    made = RunFolder(path, config, replace=replace)
    scores: dict[str, Score] = {}
    interrupt = Interrupt()
    planned = len(players) * len(tasks) * config.training.horizon
    with open_store(made, config, "exam compare", planned) as store, interrupt.watching():
        recorder = _recorder(
            store, "test", lambda arm: arm if arm in CONTROLS else POLICY if arm.startswith(POLICY) else "schedule"
        )
        with contextlib.suppress(_Stopped), _progress(interrupt) as told:
            for name, score in compare(config, tasks, players, recorder=recorder, told=told):
                scores[name] = score
                save_comparison(path, scores, differences(scores))
        stopped = len(scores) < len(players)
        if store is not None:
            store.close("interrupted" if stopped else "finished")
    if stopped:
        console.print(f"Stopped. The {len(scores)} arms that had ended are in {path / COMPARISON}.", soft_wrap=True)
        return INTERRUPTED
    _show_scores(console, scores, config)
    _show_differences(console, differences(scores))
    console.print(f"Saved in {path / COMPARISON}.", soft_wrap=True)
    return 0


def _show_scores(console: Console, scores: dict[str, Score], config: CompareConfig) -> None:
    title = f"Test split, {config.starts} starts that nothing else used, all contexts (nats, 95 % interval over starts)"
    table = _table(title, "arm", "gain less rent", "gain", "accuracy", "parameters")
    prices = _table("Gain less rent (nats) at each price", "arm", *(f"{price:g}" for price in config.contexts.prices))
    for name, score in scores.items():
        numbers = f"{score.gain.mean():+.4f}", f"{score.accuracy.mean():.1%}", f"{score.added.mean():,.0f}"
        table.add_row(name, paired(score.by_start()).text(), *numbers)
        prices.add_row(name, *(f"{value:+.4f}" for value in score.net.mean((0, 1, 2))))
    console.print(table)
    console.print(prices)


def _show_differences(console: Console, found: dict[str, dict[str, Difference]]) -> None:
    columns = "policy", "against", "mean", "interquartile mean", "ahead in", "interval over"
    table = _table("Policy less the other arm on the same starts (nats, 95 % intervals)", *columns)
    for name, of in found.items():
        for number, (other, by) in enumerate(of.items()):
            ahead = f"{by.improvement.mean:.0%}"
            told = by.mean.text(), by.middle.text(), ahead, by.mean.over
            table.add_row("" if number else name, other, *told, end_section=number + 1 == len(of))
    console.print(table)


def _check_same(policy: Path, schedules: HeadroomConfig) -> None:
    """Refuse a policy that was trained in another world than that of the schedules."""
    trained = read_config(policy / CONFIG, TrainConfig)
    differing = first_difference(trained, schedules, _SHARED)
    if differing is not None:
        name, theirs, ours = differing
        raise EsperError(
            f"exam: {policy} was trained with {name} {theirs}, the schedules were run with {ours}; "
            "run `esper exam headroom` with the settings of the training"
        )
