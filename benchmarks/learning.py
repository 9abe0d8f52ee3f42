"""Learning to grow: where the time of a round goes, advantages, the policy update.

    python benchmarks/learning.py

One thread. A round of 128 rows of the impaired MLP at default settings, cut to 40 decisions, an untrained policy;
"outside" is everything but training updates and evaluation: observing, masking, deciding, gates, rewards, recording.
"""

import statistics
import time

import torch
from common import alternate, report

from esper.leyline.actions import HEAD_COUNT
from esper.leyline.config import ContextConfig, ObjectiveConfig, PolicyConfig, PPOConfig, RunConfig
from esper.leyline.slots import SlotTensors
from esper.simic.advantages import generalized_advantages
from esper.simic.collect import collect
from esper.simic.environment import GrowthEnvironment
from esper.simic.ppo import PPOAgent
from esper.simic.rollout import Rollout
from esper.tamiyo.policy.action_masks import ActionMasks, compute_batch_masks
from esper.tamiyo.policy.network import FactoredRecurrentActorCritic
from esper.tamiyo.policy.observation import Observation
from esper.tolaria.machine import tune_process
from esper.tolaria.tasks import load_task

ROWS, HORIZON, ROUNDS = 128, 40, 3


def line(what: str, measured: str, most: str, met: bool, more: str = "") -> dict[str, object]:
    return {"what": what, "measured": measured, "at most": most, "met": met, "more": more}


def new_policy() -> FactoredRecurrentActorCritic:
    policy = FactoredRecurrentActorCritic(PolicyConfig())
    policy.initialise(torch.Generator().manual_seed(0))
    return policy


def round_shares() -> list[dict[str, object]]:
    """Where the time of a round goes."""
    config = RunConfig(task="digits-mlp", training={"horizon": HORIZON})
    task = load_task(config.task, config.host, config.device)
    size = {"groups": ROWS // 8, "size": 8}
    environment = GrowthEnvironment(config, task, ContextConfig(), ObjectiveConfig(), **size, record=True)
    policy, rollout = new_policy(), Rollout(HORIZON, ROWS, environment.slots)
    outside, evaluation = [], []
    for number in range(ROUNDS + 1):
        start = time.perf_counter()
        collect(environment, policy, rollout, 0, number)
        whole = time.perf_counter() - start
        spent = {phase: wall for phase, (wall, _) in environment.episode.clock.take().items()}
        if number:
            outside.append(1 - (spent["train"] + spent["measure"]) / whole)
            evaluation.append(spent["measure"] / spent["train"])
    share, ratio = statistics.median(outside), statistics.median(evaluation)
    return [
        line(f"outside training and evaluation, {ROWS} rows", f"{share:.1%}", "10 %", share <= 0.1),
        line("evaluation with contributions against training", f"{ratio:.2f}", "0.4", ratio <= 0.4),
    ]


def random_rollout(rows: int, decisions: int) -> Rollout:
    """Fill a rollout by an untrained policy on random tokens."""
    policy, slots = new_policy(), 3
    generator = torch.Generator().manual_seed(0)
    rollout = Rollout(decisions, rows, slots)
    masks = ActionMasks.empty(rows, torch.ones(slots, 13, dtype=torch.bool))
    hidden = policy.initial_hidden(rows)
    for decision in range(decisions):
        state = SlotTensors.empty(rows, slots)
        state.stage = torch.randint(1, 4, (rows, slots), generator=generator)
        shapes = rollout.slot_TRSF.shape[1:], rollout.run_TRF.shape[1:]
        seen = Observation(*(torch.randn(shape, generator=generator) for shape in shapes))
        uniform_RH = torch.rand(rows, HEAD_COUNT, generator=generator)
        made = policy.get_action(seen, compute_batch_masks(state, masks), hidden, uniform_RH)
        hidden = made.hidden
        rollout.store(decision, seen, made, torch.ones(rows, dtype=torch.bool))
        rollout.pay(decision, torch.randn(rows, generator=generator))
    return rollout


def learner_times() -> list[dict[str, object]]:
    """Advantages of 128 x 150, and an update of 16 x 150."""
    reward, value = torch.randn(150, 128), torch.randn(150, 128)
    made = torch.ones(150, 128, dtype=torch.bool)
    gae = alternate({"gae": lambda: generalized_advantages(reward, value, made, 1.0, 0.97)}, 50)["gae"]
    rollout, agent = random_rollout(16, 150), PPOAgent(new_policy(), PPOConfig(target_kl=100.0), 0)
    update = alternate({"update": lambda: agent.update(rollout)}, 5)["update"]
    size = sum(p.numel() for p in agent.policy.parameters())
    return [
        line("GAE, 128 rows x 150 decisions", f"{gae * 1e3:.2f} ms", "2 ms", gae <= 2e-3),
        line("update, 16 rows x 150, 4 epochs", f"{update:.2f} s", "0.6 s", update <= 0.6, f"{size:,} parameters"),
    ]


def main() -> None:
    tune_process(1)
    lines = [*learner_times(), *round_shares()]
    report("learning", lines, {"rows": ROWS, "decisions": HORIZON, "rounds": ROUNDS})


if __name__ == "__main__":
    main()
