"""When a seed may leave the incubator (G2), by what growth is worth at the end.

    python benchmarks/leaving_the_incubator.py [--starts 8]

Two controllers grow the same starts under six gates: the incubator gain must be above -2, 0 or +2 of its standard
errors, and what is judged and then blended is the seed as its last update left it, or the mean of its parameters over
the updates of the last decision (its optimizer goes on from the last ones). Final gain: by how much the loss on the
selection split is below that of the same start that never grew, with what it had committed; differences are paired
with the gate "0, last". "Passes that are noise": of the seeds that left the incubator, the share whose gain was within
two standard errors of 0.
"""

import argparse
from itertools import product
from typing import Any

import torch
from common import report

from esper.kasmina.banks import Bank
from esper.leyline.config import RunConfig
from esper.leyline.stages import Stage
from esper.simic.contexts import Contexts
from esper.simic.episode import Episode
from esper.tolaria.evaluation import evaluate
from esper.tolaria.machine import tune_process
from esper.tolaria.tasks import TASKS, Task, load_task

CONTROLLERS = ("periodic", "heuristic")
MULTIPLES = (-2.0, 0.0, 2.0)


class Averaging:
    """Puts the mean over a decision's updates in the place of each incubated seed, until it trains on."""

    def __init__(self, episode: Episode) -> None:
        self._population, self._trainer = episode.population, episode.trainer
        self._run, self._step = episode.trainer.run, episode.trainer._step
        self._last: dict[tuple[tuple[int, int], int, int], torch.Tensor] = {}
        episode.trainer.run = self.run  # type: ignore[method-assign]
        episode.trainer._step = self.step  # type: ignore[method-assign]

    def _incubated(self) -> list[tuple[tuple[int, int], Bank, list[int]]]:
        stage = self._population.structure.stage
        pairs = self._population.seeds.items()
        return [
            (key, bank, [n for n, r in enumerate(bank.row) if stage[r, key[0]] == Stage.TRAINING])
            for key, bank in pairs
        ]

    def run(self, updates: int) -> torch.Tensor:
        """Train on from the last parameters, and leave the mean."""
        with torch.no_grad():
            for key, bank, lanes in self._incubated():
                for n in lanes:
                    last = self._last.get((key, int(bank.row[n]), int(bank.seed_id[n])))
                    if last is not None:
                        bank.theta[n] = last
            self._sum = {key: torch.zeros_like(bank.theta) for key, bank in self._population.seeds.items()}
        loss_R = self._run(updates)
        self._last = {}
        with torch.no_grad():
            for key, bank, lanes in self._incubated():
                for n in lanes:
                    self._last[key, int(bank.row[n]), int(bank.seed_id[n])] = bank.theta[n].clone()
                    bank.theta[n] = self._sum[key][n] / updates
        return loss_R

    def step(self, *batch: Any) -> torch.Tensor:
        """One update, added up."""
        loss_R = self._step(*batch)
        with torch.no_grad():
            for key, bank in self._population.seeds.items():
                self._sum[key] += bank.theta
        return loss_R


def play(task: Task, controller: str, starts: int, multiple: float, mean: bool) -> tuple[torch.Tensor, list[bool]]:
    """Final loss of each start, and of each seed that left the incubator whether its gain was noise."""
    gates = {"incubator_gain_errors": multiple}
    config = RunConfig.model_validate({"task": task.config.name, "growth": {"gates": gates}})
    ids_R = torch.arange(starts)
    episode = Episode(config, task, controller, ids_R, contexts=Contexts.alone(config, ids_R, 0.0))
    if mean:
        Averaging(episode)
    noise: list[bool] = []
    slots = episode.population.slots
    while not episode.done:
        before = slots.clone()
        episode.advance()
        left_RS = (before.stage == int(Stage.TRAINING)) & (slots.stage == int(Stage.BLENDING))
        noise += (before.incubator_gain.abs() <= 2 * before.incubator_gain_se)[left_RS].tolist()
    return evaluate(episode.population, task.data.selection).loss_R, noise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=8)
    args = parser.parse_args()
    tune_process(1)
    rows: list[dict[str, object]] = []
    differences: dict[tuple[bool, float], list[torch.Tensor]] = {}
    for name, controller in product(TASKS, CONTROLLERS):
        task = load_task(name, "impaired")
        alone_R, _ = play(task, "never", args.starts, 0.0, False)
        gates = list(product((False, True), MULTIPLES))
        ended = {(mean, multiple): play(task, controller, args.starts, multiple, mean) for mean, multiple in gates}
        reference_R = ended[False, 0.0][0]
        for gate, (loss_R, noise) in ended.items():
            differences.setdefault(gate, []).append(reference_R - loss_R)
            better_R = reference_R - loss_R
            rows.append(
                {
                    "task": name,
                    "controller": controller,
                    "gain above": f"{gate[1]:+g} errors",
                    "judged": "mean" if gate[0] else "last",
                    "final gain (nats)": round((alone_R - loss_R).mean().item(), 4),
                    "against 0, last": round(better_R.mean().item(), 4),
                    "standard error": round((better_R.std() / args.starts**0.5).item(), 4),
                    "seeds that left": len(noise),
                    "noise": f"{100 * sum(noise) / max(1, len(noise)):.0f} %",
                }
            )
            print(rows[-1], flush=True)
    for (mean, multiple), parts in differences.items():
        # Starts are the units: the mean over tasks and controllers of each.
        by_start = torch.stack(parts).mean(0)
        rows.append(
            {
                "task": "all",
                "controller": "both",
                "gain above": f"{multiple:+g} errors",
                "judged": "mean" if mean else "last",
                "final gain (nats)": "",
                "against 0, last": round(by_start.mean().item(), 4),
                "standard error": round((by_start.std() / args.starts**0.5).item(), 4),
                "seeds that left": "",
                "noise": "",
            }
        )
    report("leaving_the_incubator", rows, settings=vars(args))


if __name__ == "__main__":
    main()
