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
from pathlib import Path

from rich.console import Console
from rich.table import Table

from esper.leyline.config import RUN_FOLDER, TrainConfig
from esper.leyline.errors import EsperError
from esper.scripts.errors import INTERRUPTED
from esper.scripts.running import Interrupt, open_store
from esper.simic.objective import check_gamma
from esper.simic.run_folder import BEST_POLICY, RunFolder
from esper.simic.train import PolicyTraining, RoundLine, Worth
from esper.tamiyo.policy.saved import load_policy
from esper.tolaria.machine import check_device, tune_process
from esper.tolaria.tasks import load_task

ROUND_KINDS = 2
"""The final evaluation is two rounds: greedy, and drawing."""


def train(config: TrainConfig, *, out: Path | None, replace: bool) -> int:
    """Train a policy; give the exit code."""
    console = Console()
    check_device(config.device)
    tune_process(1)
    path = out or RUN_FOLDER / f"train-{config.task}-{config.host}-seed{config.seed}"
    tasks = [load_task(config.task, config.host, config.device, width=width) for width in config.contexts.host_widths]
    try:
        check_gamma(config.objective, config.ppo.gamma)
    except ValueError as error:
        raise EsperError(str(error)) from error
    folder = RunFolder(path, config, replace=replace)
    interrupt = Interrupt()
    started, made = time.perf_counter(), 0
    rounds = config.rounds + config.rounds // config.select_every + ROUND_KINDS
    with open_store(folder, config, "train", rounds * config.training.horizon) as store, interrupt.watching():
        training = PolicyTraining(config, tasks, path, store)
        for line in training.run(lambda: interrupt.asked):
            made = line.number + 1
            console.print(_progress(line, config.rounds, started), soft_wrap=True, highlight=False)
        if not interrupt.asked:
            best = load_policy(path / BEST_POLICY, config.device)
            worths = {kind: training.judge(best, greedy=kind == "greedy") for kind in ("greedy", "drawing")}
        if store is not None:
            store.close("interrupted" if interrupt.asked else "finished")
    if interrupt.asked:
        again = (
            f"esper train --config {shlex.quote(str(path / 'config.json'))} --out {shlex.quote(str(path) + '-again')}"
        )
        console.print(
            f"Stopped after round {made} of {config.rounds}. Kept in {path}: the record and the policy so far. "
            f"A stopped run cannot go on yet; run it again with: {again}",
            soft_wrap=True,
        )
        return INTERRUPTED
    console.print(_table(worths, config))
    console.print(f"Saved in {path}. Grow with it: esper grow --controller greedy:{path / BEST_POLICY}", soft_wrap=True)
    return 0


def _progress(line: RoundLine, rounds: int, started: float) -> str:
    spent = time.perf_counter() - started
    left = spent / (line.number + 1) * (rounds - line.number - 1)
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
    hosts = config.rows - config.rows // config.group_size
    table = Table(title=f"Test split, {hosts} hosts of {config.rows // config.group_size} starts never seen")
    for column in ("policy", "gain less rent (nats)", "gain (nats)", "grown parameters"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for kind, worth in worths.items():
        error = "" if math.isnan(worth.net_se_nats) else f" ± {worth.net_se_nats:.4f}"
        net = f"{worth.net_nats:+.4f}{error}"
        table.add_row(kind, net, f"{worth.gain_nats:+.4f}", f"{worth.added_parameters:,.0f}")
    return table


def main() -> int:
    """Make the short integration run."""
    parser = argparse.ArgumentParser(prog="python -m esper.scripts.train")
    parser.add_argument("learner", choices=["ppo"])
    parser.add_argument("--episodes", type=int, default=2, help="rounds of one episode of every host")
    parser.add_argument("--n-envs", type=int, default=2, help="hosts that train at once")
    arguments = parser.parse_args()
    config = TrainConfig(
        task="digits-mlp", rounds=arguments.episodes, rows=arguments.n_envs, group_size=arguments.n_envs
    )
    with tempfile.TemporaryDirectory() as folder:
        return train(config, out=Path(folder) / "run", replace=False)


if __name__ == "__main__":
    sys.exit(main())
