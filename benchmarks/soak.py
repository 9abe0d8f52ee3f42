"""Does a long run stay as large as it was: resident memory over thousands of rounds of the smallest task.

    python benchmarks/soak.py [--rounds 2000]

One thread. Rounds of 8 hosts and 8 decisions of `mnist1d-mlp` with everything recorded, a selection every 50 rounds.
Medians over windows of rounds, so that one garbage collection does not decide; the file is the run's store.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import psutil
from common import report

from esper.leyline.config import TrainConfig
from esper.nissa.store import RunStore
from esper.simic.recorder import run_columns
from esper.simic.train import PolicyTraining
from esper.tolaria.machine import tune_process
from esper.tolaria.tasks import load_task

WINDOWS = {"50 rounds": ((10, 20), (40, 50)), "all rounds": ((100, 200), (-100, None))}
"""Rounds that are compared: early, and late."""
MOST = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2000)
    args = parser.parse_args()
    tune_process(1)
    config = TrainConfig.model_validate(
        {
            **{"task": "mnist1d-mlp", "rounds": args.rounds, "rows": 8, "group_size": 4, "select_every": 50},
            "training": {"horizon": 8, "updates_per_decision": 1, "batch_size": 8},
        }
    )
    process, started = psutil.Process(), time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "run.sqlite"
        with RunStore(path, run_columns(config, "bench", args.rounds)) as store:
            training = PolicyTraining(config, [load_task(config.task, config.host)], path.parent, store)
            sizes = []
            for line in training.run(lambda: False):
                sizes.append(process.memory_info().rss / 1e6)
                if line.number % 100 == 99:
                    print(
                        f"round {line.number + 1}  {sizes[-1]:.0f} MB  {time.perf_counter() - started:.0f} s",
                        flush=True,
                    )
        store_mb = path.stat().st_size / 1e6
    rows = []
    for what, windows in WINDOWS.items():
        early, late = (statistics.median(sizes[slice(*window)]) for window in windows)
        growth = late / early - 1
        told = {"early": f"{early:.1f} MB", "late": f"{late:.1f} MB", "growth": f"{growth:+.2%}"}
        rows.append(
            {"over": what, **told, "at most": f"{MOST:.0%}", "met": growth <= MOST, "store": f"{store_mb:.0f} MB"}
        )
    report("soak", rows, settings=vars(args))


if __name__ == "__main__":
    main()
