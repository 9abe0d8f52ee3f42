"""`esper train`: train a policy over populations of hosts, and judge it on starts never seen.

    python -m esper.scripts.train ppo --episodes 2 --n-envs 2

is the short integration run: so many rounds of so many hosts, into a temporary folder.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from esper.leyline.config import RUN_FOLDER, ContextConfig, TrainConfig
from esper.leyline.errors import EsperError
from esper.nissa.store import RunStore
from esper.nissa.writer import Kept
from esper.scripts.errors import INTERRUPTED, exit_code, validation_line
from esper.scripts.running import Interrupt, last_checkpoint, open_store
from esper.simic.objective import check_gamma
from esper.simic.run_folder import BEST_POLICY, RunFolder
from esper.simic.train import PolicyTraining, RoundLine, Worth
from esper.tamiyo.policy.saved import load_policy
from esper.tolaria.checkpoints import Checkpoint
from esper.tolaria.machine import check_device, tune_process
from esper.tolaria.tasks import Task, load_hosts

ROUND_KINDS = 2
"""The final evaluation is two rounds: greedy, and drawing."""


def train(config: TrainConfig, *, out: Path | None, replace: bool, resume: Path | None = None) -> int:
    """Train a policy, from the start or from where a run stopped; give the exit code."""
    console = Console()
    check_device(config.device)
    tune_process(1)
    path = resume or out or RUN_FOLDER / f"train-{config.task}-{config.host}-seed{config.seed}"
    checkpoint = last_checkpoint(config, resume, out, replace)
    tasks = load_hosts(config, config.contexts)
    try:
        check_gamma(config.objective, config.ppo.gamma)
    except ValueError as error:
        raise EsperError(str(error)) from error
    folder = RunFolder(path, config, replace=replace, resume=resume is not None)
    interrupt = Interrupt()
    rounds = config.rounds + config.rounds // config.select_every + ROUND_KINDS
    planned = rounds * len(tasks) * config.training.horizon
    kept = None if checkpoint is None else Kept(int(checkpoint.facts.get("recorded_rounds", 0)))
    with open_store(folder, config, "train", planned, kept=kept) as store, interrupt.watching():
        training = _training(config, tasks, path, store, checkpoint)
        started, before = time.perf_counter(), training.made
        for line in training.run(lambda: interrupt.asked):
            console.print(_progress(line, config.rounds, before, started), soft_wrap=True, highlight=False)
        if not interrupt.asked:
            best = load_policy(path / BEST_POLICY, config.device)
            worths = {kind: training.judge(best, greedy=kind == "greedy") for kind in ("greedy", "drawing")}
        if store is not None:
            store.close("interrupted" if interrupt.asked else "finished")
    if interrupt.asked:
        told = (
            f"Stopped after round {training.made} of {config.rounds}. Kept in {path}: the record and the policy so far."
        )
        console.print(f"{told} Go on with: esper train --resume {shlex.quote(str(path))}", soft_wrap=True)
        return INTERRUPTED
    console.print(_table(worths, config))
    console.print(f"Saved in {path}. Grow with it: esper grow --controller greedy:{path / BEST_POLICY}", soft_wrap=True)
    return 0


def _training(
    config: TrainConfig, tasks: list[Task], path: Path, store: RunStore | None, checkpoint: Checkpoint | None
) -> PolicyTraining:
    try:
        return PolicyTraining(config, tasks, path, store, checkpoint)
    except (ValueError, KeyError) as error:
        raise EsperError(f"resume: the checkpoint in {path} cannot be used: {error}") from error


def _progress(line: RoundLine, rounds: int, before: int, started: float) -> str:
    spent = time.perf_counter() - started
    left = spent / (line.number + 1 - before) * (rounds - line.number - 1)
    update, worth = line.update, line.worth
    parts = (
        f"round {line.number + 1}/{rounds}",
        f"return {line.return_mean:+.4f}",
        f"paired gain {worth.gain_nats:+.4f} nats",
        f"grown {worth.added_parameters:,.0f} parameters",
        f"entropy {_number(update.entropy, '.2f')}",
        f"KL {_number(update.kl_nats, '.4f')} nats",
        f"value fit {_number(update.explained_variance, '+.2f')}",
        f"{line.episodes / line.seconds:.1f} episodes/s",
        f"{left:.0f} s left",
        *([] if line.selected is None else [f"selection {line.selected.net_nats:+.4f} nats"]),
    )
    return "  ".join(parts)


def _number(value: float, form: str) -> str:
    return "not measured" if math.isnan(value) else format(value, form)


def _table(worths: dict[str, Worth], config: TrainConfig) -> Table:
    contexts, starts = config.contexts.combinations, config.judgement_starts
    table = Table(title=f"Test split, {contexts} contexts on each of {starts} starts never seen")
    for column in ("policy", "gain less rent (nats)", "gain (nats)", "grown parameters"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for kind, worth in worths.items():
        error = "" if math.isnan(worth.net_se_nats) else f" ± {worth.net_se_nats:.4f}"
        net = f"{worth.net_nats:+.4f}{error}"
        table.add_row(kind, net, f"{worth.gain_nats:+.4f}", f"{worth.added_parameters:,.0f}")
    return table


OPTIONS = {"rounds": "--episodes", "rows": "--n-envs"}
"""Options of the short integration run, by the setting that they give."""


class _Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments."""
        raise EsperError(f"{message}; see {self.prog} --help")


def _integration_run(arguments: Sequence[str] | None) -> int:
    parser = _Parser(prog="python -m esper.scripts.train", description="Make the short integration run.")
    parser.add_argument("learner", choices=["ppo"])
    parser.add_argument("--episodes", type=int, default=2, help="rounds of one episode of every host")
    parser.add_argument("--n-envs", type=int, default=2, help="hosts that train at once, the twin included")
    given = parser.parse_args(arguments)
    try:
        config = TrainConfig(
            task="digits-mlp",
            rounds=given.episodes,
            rows=given.n_envs,
            group_size=given.n_envs,
            contexts=ContextConfig(prices=(0.05,), learning_rates=(0.005,), label_noise=(0.0,)),
            selection_starts=1,
            judgement_starts=1,
        )
    except ValidationError as error:
        setting, _, reason = validation_line(error).partition(": ")
        raise EsperError(f"{OPTIONS[setting]}: {reason}") from error
    with tempfile.TemporaryDirectory() as folder:
        return train(config, out=Path(folder) / "run", replace=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the short integration run; give its exit code."""
    return exit_code(lambda: _integration_run(arguments))


if __name__ == "__main__":
    sys.exit(main())
