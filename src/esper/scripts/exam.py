"""`esper exam compare`: who decides best."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from esper.exam.compare import CONTROLS, POLICY, Score, arms, compare, differences
from esper.exam.replay import modal_plans
from esper.exam.saved import load_headroom, save_comparison
from esper.exam.statistics import Difference, paired
from esper.leyline.config import CONFIG, RUN_FOLDER, CompareConfig, HeadroomConfig, TrainConfig
from esper.leyline.errors import EsperError
from esper.nissa.store import RunStore
from esper.scripts.configs import first_difference, read_config
from esper.scripts.errors import INTERRUPTED
from esper.scripts.exam_common import Stopped, begin, plain_table, watched, wide_console
from esper.scripts.running import Interrupt, open_store
from esper.simic.episode import Episode
from esper.simic.recorder import RoundRecorder
from esper.simic.run_folder import BEST_POLICY, COMPARISON, RunFolder
from esper.tamiyo.policy.saved import load_policy

_SHARED = ("task", "host", "blueprints", "training", "optimizer", "growth", "governor", "contexts")
"""Settings that a policy must have been trained with, to be compared."""


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


def comparison(
    folder: Path, policies: Sequence[Path], starts: int, first_start: int, *, out: Path | None, replace: bool
) -> int:
    """Compare policies with their controls; give the exit code."""
    console = wide_console()
    searched = read_config(folder / CONFIG, HeadroomConfig)
    table = load_headroom(folder)
    for policy in policies:
        _check_same(policy, searched)
    config = CompareConfig(
        **{name: getattr(searched, name) for name in (*_SHARED, "seed", "device")},
        headroom=str(folder),
        policies=tuple(map(str, policies)),
        starts=starts,
        first_start=first_start,
    )
    tasks = begin(config, config.contexts)
    learned = [load_policy(path / BEST_POLICY, config.device) for path in policies]
    replays = [modal_plans(config, config.contexts, tasks, policy) for policy in learned]
    players = arms(table, learned, replays)
    path = out or RUN_FOLDER / f"compare-{config.task}-{config.host}-seed{config.seed}"
    made = RunFolder(path, config, replace=replace)
    scores: dict[str, Score] = {}
    interrupt = Interrupt()
    planned = len(players) * len(tasks) * config.training.horizon
    with open_store(made, config, "exam compare", planned) as store, interrupt.watching():
        recorder = _recorder(
            store, "test", lambda arm: arm if arm in CONTROLS else POLICY if arm.startswith(POLICY) else "plan"
        )
        with contextlib.suppress(Stopped), watched(console, interrupt) as told:
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
    if learned:
        _show_differences(console, differences(scores))
    console.print(f"Saved in {path / COMPARISON}.", soft_wrap=True)
    return 0


def _show_scores(console: Console, scores: dict[str, Score], config: CompareConfig) -> None:
    title = f"Test split, {config.starts} starts that nothing else used, all contexts (nats, 95 % interval over starts)"
    table = plain_table(title, "arm", "gain less rent", "gain", "accuracy", "parameters")
    prices = plain_table(
        "Gain less rent (nats) at each price", "arm", *(f"{price:g}" for price in config.contexts.prices)
    )
    for name, score in scores.items():
        numbers = f"{score.gain.mean():+.4f}", f"{score.accuracy.mean():.1%}", f"{score.added.mean():,.0f}"
        table.add_row(name, paired(score.by_start()).text(), *numbers)
        prices.add_row(name, *(f"{value:+.4f}" for value in score.net.mean((0, 1, 2))))
    console.print(table)
    console.print(prices)


def _show_differences(console: Console, found: dict[str, dict[str, Difference]]) -> None:
    columns = "policy", "against", "mean", "interquartile mean", "ahead in", "interval over"
    table = plain_table("Policy less the other arm on the same starts (nats, 95 % intervals)", *columns)
    for name, of in found.items():
        for number, (other, by) in enumerate(of.items()):
            ahead = f"{by.improvement.mean:.0%}"
            told = by.mean.text(), by.middle.text(), ahead, by.mean.over
            table.add_row("" if number else name, other, *told, end_section=number + 1 == len(of))
    console.print(table)


def _check_same(policy: Path, searched: HeadroomConfig) -> None:
    """Refuse a policy that was trained in another world than that of the plans."""
    trained = read_config(policy / CONFIG, TrainConfig)
    differing = first_difference(trained, searched, _SHARED)
    if differing is not None:
        name, theirs, ours = differing
        raise EsperError(
            f"exam: {policy} was trained with {name} {theirs}, the plans were played with {ours}; "
            "run `esper exam headroom` with the settings of the training"
        )
