"""What tests of rewards share: environments with real hosts, and what their rewards should be made of."""

import math
from functools import cache

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st

from esper.kasmina.export import export_row
from esper.leyline.config import ContextConfig
from esper.leyline.stages import BLENDED_STAGES, GROWTH_ORDER, Stage
from esper.simic.objective import PRESETS
from esper.tolaria.evaluation import evaluate
from helpers.environments import environment, onward
from helpers.episodes import task_of

TASK = "mnist1d-mlp"
EVERY = tuple(PRESETS)
MIXED = ContextConfig(prices=(0.02, 0.3), learning_rates=(0.01,), label_noise=(0.0, 0.3))
GUESS = math.log(10)
HORIZON = 14
seeds = st.integers(0, 2**30)
few = settings(max_examples=3, phases=[Phase.explicit, Phase.reuse, Phase.generate])
presets = pytest.mark.parametrize("preset", EVERY)
eager = onward(0, 1, rows=(1, 4))


@cache
def made(preset="paired", task=TASK, **more):
    """An environment is reset for each episode: one is enough for all of them."""
    return environment(preset, task=task, **{"horizon": HORIZON, "contexts": MIXED, **more})


def close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=tolerance)


def final_net(env):
    """Lead over the twin less rent, from a plain evaluation and the networks that would be exported."""
    population = env.episode.population
    loss_R = evaluate(population, task_of(TASK, examples=40).data.reward_validation).loss_R.double()
    host = env.episode.population.host.body.parameter_count
    sizes = [sum(p.numel() for p in export_row(population, row).parameters()) for row in range(env.rows)]
    cost_R = torch.tensor([math.log(size / host) for size in sizes], dtype=torch.float64)
    return loss_R[env.contexts.twin_R] - loss_R - env.contexts.price_R.double() * cost_R, cost_R


def states(env):
    """Collects what terms are made of, read off the slots after every decision."""
    seen = []

    def note(decision, payment):
        slots = env.episode.population.slots
        blended = torch.isin(slots.stage, torch.tensor([int(s) for s in BLENDED_STAGES])) & (slots.alpha > 0)
        worth = torch.where(blended, slots.contribution.double().nan_to_num(0.0).clamp_min(0), 0.0)
        order = [int(s) for s in GROWTH_ORDER]
        potential = [
            [order.index(s) / (len(order) - 1) if s in order else 0.0 for s in row] for row in slots.stage.tolist()
        ]
        seen.append(
            {
                "worth": worth,
                "committed": slots.stage == int(Stage.FOSSILIZED),
                "stage": slots.stage.clone(),
                "potential": torch.tensor(potential, dtype=torch.float64).sum(1),
                "loss": env.episode.view().val_loss_R.double(),
            }
        )

    return seen, note
