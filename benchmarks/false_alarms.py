"""False alarms of the governor: healthy episodes under random growth, and how near they come to its limits.

    python benchmarks/false_alarms.py [--episodes 200] [--horizon 60] [--updates 20] [--impaired] [--break-at 20]

Every task and host, in all default contexts (learning rates, label noise), a quarter of the hosts twins that never
grow, the others grown and culled at random. Nothing fails here, so a panic is a false alarm. "Nearest" is the largest
share of the room above its history that a loss took: from 1 on it would have been a divergence. "At chance" is the
longest time that a host which had learned something was back there.

With `--break-at` a parameter of every host becomes NaN before that decision, and the hosts recover as in `esper grow`:
then every failure after the first of a host is a false alarm.
"""

import argparse
import math
import time

import torch
from common import report

from esper.leyline.config import ContextConfig, PopulationConfig, TrainingConfig
from esper.leyline.panics import Panic
from esper.simic.contexts import draw_contexts
from esper.simic.episode import Episode
from esper.tolaria.machine import tune_process
from esper.tolaria.tasks import TASKS, load_task

GROUP = 4
"""Hosts with the same start, the twin included."""


def episodes(task_name: str, host: str, rows: int, training: TrainingConfig, break_at: int | None) -> dict[str, object]:
    """One population of healthy episodes, as a row of the table."""
    config = PopulationConfig(task=task_name, host=host, training=training)
    task, every_R = load_task(task_name, host), torch.arange(rows)
    contexts = draw_contexts(ContextConfig(), 0, 0, rows // GROUP, GROUP)
    episode = Episode(config, task, "random", every_R, contexts=contexts, recovers=break_at is not None)
    governor, guess = episode.governor, math.log(task.data.classes)
    start, nearest, longest, failures = time.perf_counter(), -math.inf, 0, 0
    while not episode.done:
        if episode.decision == break_at:
            episode.population.hosts.theta.detach()[:, 0] = torch.nan
        history_RW = governor._loss_RW.clone()
        episode.advance()
        median_R = history_RW.median(1).values
        deviation_R = (history_RW - median_R[:, None]).abs().median(1).values
        room_R = (config.governor.diverged_deviations * deviation_R).clamp_min(config.governor.diverged_guesses * guess)
        measured = episode._measured
        share_R = (measured.val_loss_R - median_R) / room_R
        in_training_R = (measured.train_loss_R - median_R) / room_R
        both_R = torch.minimum(share_R, in_training_R).maximum(share_R / config.governor.diverged_at_once)
        failures += int((episode._panic_R != int(Panic.NONE)).sum())
        if episode.decision - 1 != break_at:
            nearest = max(nearest, float(both_R.max()))
        longest = max(longest, int(governor._guesses_R.max()))
    return {
        "task": task_name,
        "host": host,
        "episodes": rows,
        "false alarms": failures - (rows if break_at is not None else 0),
        "nearest to divergence": round(nearest, 2),
        "at chance (decisions)": longest,
        "hosts that learned": f"{float(governor._learned_R.float().mean()):.0%}",
        "seeds grown": int(episode.population.slots.seeds_made.sum()),
        "seconds": round(time.perf_counter() - start),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=200, help=f"of each task and host; a multiple of {GROUP}")
    parser.add_argument("--horizon", type=int, default=TrainingConfig().horizon, help="decisions of an episode")
    parser.add_argument("--updates", type=int, default=TrainingConfig().updates_per_decision, help="of a decision")
    parser.add_argument("--impaired", action="store_true", help="impaired hosts alone")
    parser.add_argument("--break-at", type=int, help="decision before which every host breaks")
    args = parser.parse_args()
    tune_process(1)
    training = TrainingConfig(horizon=args.horizon, updates_per_decision=args.updates)
    hosts = ("impaired",) if args.impaired else ("impaired", "ample")
    rows = [episodes(task, host, args.episodes, training, args.break_at) for task in TASKS for host in hosts]
    report("false_alarms", rows, settings=vars(args))


if __name__ == "__main__":
    main()
