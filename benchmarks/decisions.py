"""Decisions of a policy: masks, observation, masked distribution, network, and what it copies from the device.

    python benchmarks/decisions.py

One thread. Slots in all stages; the copies are counted over the decisions of a recorded episode: every place where a
tensor becomes a Python value.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from common import report

from esper.leyline.actions import HEAD_COUNT
from esper.leyline.config import PolicyConfig, PPOConfig, RunConfig, TrainingConfig
from esper.leyline.stages import Stage
from esper.leyline.view import PopulationView
from esper.simic.episode import Episode
from esper.tamiyo.controllers.policy import PolicyController
from esper.tamiyo.policy.action_masks import ActionMasks, compute_batch_masks
from esper.tamiyo.policy.distribution import MaskedCategorical
from esper.tamiyo.policy.network import FactoredRecurrentActorCritic
from esper.tamiyo.policy.observation import Observer
from esper.tolaria.machine import tune_process
from esper.tolaria.tasks import load_task

READS = ("cpu", "item", "tolist", "__bool__", "__float__", "__int__", "__index__")


def median(run: Callable[[], object], repeats: int) -> float:
    """Median milliseconds."""
    taken = []
    for _ in range(repeats + 10):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return 1e3 * statistics.median(taken[10:])


class Watcher:
    """Keeps the view of the last decision."""

    flag = scores = None

    def __init__(self, inner: PolicyController) -> None:
        self.inner = inner

    def observe(self, view: PopulationView) -> None:
        self.view = view
        self.inner.observe(view)

    def act(self) -> torch.Tensor:
        return self.inner.act()


def new_policy() -> FactoredRecurrentActorCritic:
    policy = FactoredRecurrentActorCritic(PolicyConfig())
    policy.initialise(torch.Generator().manual_seed(0))
    return policy


def episode_of(rows: int, policy: FactoredRecurrentActorCritic) -> Episode:
    training = TrainingConfig(horizon=12, updates_per_decision=1, batch_size=2)
    config = RunConfig(task="digits-mlp", controller="never", training=training)
    task = load_task(config.task, config.host)
    few = replace(task.data.reward_validation, x=task.data.reward_validation.x[:8], y=task.data.reward_validation.y[:8])
    task = replace(task, data=replace(task.data, reward_validation=few))
    episode = Episode(config, task, "never", torch.arange(rows))
    episode.controller = PolicyController(policy, 0, torch.arange(rows))
    return episode


def copies(rows: int, policy: FactoredRecurrentActorCritic) -> float:
    """Copies to the host in one decision of a recorded episode, everything included."""
    episode, count = episode_of(rows, policy), [0]
    episode.advance(record=True)
    originals = {name: getattr(torch.Tensor, name) for name in READS}

    def counted(name: str) -> Callable[..., object]:
        def call(self: torch.Tensor, *args: object) -> object:
            count[0] += 1
            return originals[name](self, *args)

        return call

    before = episode.decision
    try:
        for name in READS:
            setattr(torch.Tensor, name, counted(name))
        # The last decision has a second one, for the harvest.
        while episode.decision < episode.config.training.horizon - 1:
            episode.advance(record=True)
    finally:
        for name, original in originals.items():
            setattr(torch.Tensor, name, original)
    return count[0] / (episode.decision - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=201)
    args = parser.parse_args()
    tune_process(1)
    policy = new_policy()
    rows = []

    def add(what: str, count: int, figure: float, unit: str, limit: float) -> None:
        rows.append(
            {
                "what": what,
                "rows": count,
                "measured": f"{figure:.3g} {unit}",
                "at most": f"{limit} {unit}",
                "reached": figure <= limit,
            }
        )

    views = {}
    for count in (128, 1024):
        episode = episode_of(count, policy)
        watcher = episode.controller = Watcher(PolicyController(policy, 0, torch.arange(count)))
        for _ in range(6):
            episode.advance()
        views[count] = view = watcher.view
        stages = torch.tensor([int(s) for s in Stage if s is not Stage.UNKNOWN])
        view.slots.stage.copy_(stages[torch.arange(view.slots.stage.numel()) % len(stages)].view_as(view.slots.stage))
    limits = {"masks": {128: 0.25, 1024: 0.6}, "observation": {128: 0.5, 1024: 1.5}}
    for count, view in views.items():
        masks = ActionMasks.empty(count, view.fits_SB)
        taken = median(lambda v=view, m=masks: compute_batch_masks(v.slots, m), args.repeats)
        add("masks of all heads", count, taken, "ms", limits["masks"][count])
    for count, view in views.items():
        observer = Observer(count, view.slot_config)
        add(
            "observation",
            count,
            median(lambda v=view, o=observer: o.observe(v), args.repeats),
            "ms",
            limits["observation"][count],
        )
    view = views[128]
    masks = compute_batch_masks(view.slots, ActionMasks.empty(128, view.fits_SB))
    observation = Observer(128, view.slot_config).observe(view)
    hidden, uniform_RH = policy.initial_hidden(128), torch.rand(128, HEAD_COUNT)
    mask_RHC = policy.get_action(observation, masks, hidden, uniform_RH).mask_RHC
    logits_RHC = torch.randn(mask_RHC.shape)

    def distribution() -> None:
        choices = MaskedCategorical(logits_RHC, mask_RHC, uniform_share=PPOConfig().uniform_share)
        choices.log_prob(choices.sample(uniform_RH))
        choices.entropy()

    add("sample, log-probability and entropy of 8 heads", 128, median(distribution, args.repeats), "ms", 0.7)
    taken = median(lambda: policy.get_action(observation, masks, hidden, uniform_RH), args.repeats)
    add(f"get_action, {sum(p.numel() for p in policy.parameters()):,} parameters", 128, taken, "ms", 3.0)
    add("copies to the host in one decision", 128, copies(128, policy), "copies", 1)
    report("decisions", rows, settings=vars(args))


if __name__ == "__main__":
    main()
