"""The critic: how much of the returns its values explain, round by round.

    python benchmarks/critic.py

One thread. The first rounds of a training of 100 rounds at default settings, 64 rows, episodes of 30 decisions of 20
updates; the explained variance of a round is that of the values with which its episodes were played.
"""

import argparse
import tempfile
from pathlib import Path

from common import report

from esper.leyline.config import TrainConfig
from esper.simic.train import PolicyTraining
from esper.tolaria.machine import tune_process
from esper.tolaria.tasks import load_task

TASKS = ("digits-mlp", "mnist1d-mlp")
SETTINGS = {"rounds": 100, "rows": 64, "training": {"horizon": 30}}
FIRST, LAST = -0.5, 0.2
"""Least explained variance of the first round, and of the last that is played."""


def line(task: str, seed: int, rounds: int) -> dict[str, object]:
    """Play the first rounds of a training."""
    config = TrainConfig.model_validate({**SETTINGS, "task": task, "seed": seed})
    hosts = [load_task(task, config.host, config.device)]
    with tempfile.TemporaryDirectory() as folder:
        training = PolicyTraining(config, hosts, Path(folder), None)
        updates = [made.update for made in training.run(lambda: training.made >= rounds)]
    explained = [update.explained_variance for update in updates]
    return {
        "task": task,
        "seed": seed,
        **{f"round {number}": f"{value:+.2f}" for number, value in enumerate(explained, 1)},
        "gradient norm": " ".join(f"{update.gradient_norm:.1f}" for update in updates),
        "met": explained[0] >= FIRST and explained[-1] > LAST,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    args = parser.parse_args()
    tune_process(1)
    lines = [line(task, seed, args.rounds) for task in args.tasks for seed in range(args.seeds)]
    report("critic", lines, {**SETTINGS, "seeds": args.seeds, "at least in round 1": FIRST, "above in the last": LAST})


if __name__ == "__main__":
    main()
