"""What the heuristic gains at each price, beside growth by the clock.

    python benchmarks/heuristic.py [--starts 4] [--first 0] [--tasks mnist1d-mlp]

Impaired hosts, 40 decisions of 10 updates, in every condition (learning rates 0.002, 0.008, 0.03; 0 and 40 % wrong
labels) at every price, from starts that are reserved for choosing. Net gain over growing nothing by the selection split
(nats), mean over conditions and starts; the difference is paired by start, with its standard error over starts. The
constants of the heuristic were chosen on starts 0 to 3; others say how well.
"""

import argparse

import numpy as np
import torch
from common import report

from esper.exam.grid import Played, play
from esper.leyline.config import ContextConfig, HeadroomConfig, TrainingConfig
from esper.leyline.starts import CHOICE, start_ids
from esper.simic.contexts import conditions, grid
from esper.simic.episode import Episode
from esper.tamiyo.controllers.registry import make_controller
from esper.tolaria.machine import tune_process
from esper.tolaria.tasks import TASKS, load_task

CONTEXTS = ContextConfig(prices=(0.0, 0.05, 0.1, 0.2, 0.4), learning_rates=(0.002, 0.008, 0.03), label_noise=(0.0, 0.4))
CONTROLLERS = ("periodic", "heuristic")


def played(config: HeadroomConfig, controller: str, start_K: torch.Tensor, prices: tuple[float, ...]) -> Played:
    """Let a controller grow from every start, in every condition, at every price."""
    task = load_task(config.task, config.host)

    def make(episode: Episode):
        rows = episode.population.rows
        slots, ids_R = episode.population.slots.slots, torch.arange(rows)
        return make_controller(controller, rows=rows, slots=slots, seed=config.seed, row_ids_R=ids_R)

    return play(config, task, grid(CONTEXTS, start_K, prices, 1), make, lambda data: data.selection)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=4)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=list(TASKS))
    arguments = parser.parse_args()
    tune_process(1)
    start_K = start_ids(CHOICE, arguments.first, arguments.starts)
    prices, cells = CONTEXTS.prices, len(conditions(CONTEXTS))
    rows: list[dict[str, object]] = []
    for task in arguments.tasks:
        training = TrainingConfig(horizon=40, updates_per_decision=10)
        config = HeadroomConfig(task=task, contexts=CONTEXTS, training=training)
        never_KC1 = played(config, "never", start_K, (0.0,)).loss.reshape(len(start_K), cells, 1)
        net_K: dict[str, np.ndarray] = {}
        for controller in CONTROLLERS:
            ended = played(config, controller, start_K, prices)
            loss_KCP, cost_KCP = (v.reshape(len(start_K), cells, len(prices)) for v in (ended.loss, ended.cost))
            net_KCP = never_KC1 - loss_KCP - np.array(prices) * cost_KCP
            net_K[controller] = net_KCP.mean((1, 2))
            ahead_K = net_K[controller] - net_K[CONTROLLERS[0]]
            error = ahead_K.std(ddof=1) / len(ahead_K) ** 0.5
            by_price = {f"at {price:g}": f"{net:+.3f}" for price, net in zip(prices, net_KCP.mean((0, 1)), strict=True)}
            of = {"task": task, "controller": controller, "net": f"{net_KCP.mean():+.4f}"}
            rows.append(of | by_price | {"ahead of periodic": f"{ahead_K.mean():+.4f} ± {error:.4f}"})
            print(rows[-1], flush=True)
    report("heuristic", rows, {"starts": arguments.starts, "first": arguments.first, "decisions": 40, "updates": 10})


if __name__ == "__main__":
    main()
