"""Populations side by side: the same as each by itself, and one environment to a learner."""

import pytest
import torch

from esper.leyline.config import ContextConfig, TrainConfig
from esper.simic.collect import collect
from esper.simic.environment import GrowthEnvironment
from esper.simic.rollout import Rollout
from esper.simic.side_by_side import SideBySide, populations
from esper.tamiyo.policy.network import FactoredRecurrentActorCritic
from helpers.environments import at_random, environment, play
from helpers.episodes import OPEN_GATES, task_of

WIDTHS = (1.0, 0.5, 0.25)
HORIZON, SIZE = 8, 3


def configured(groups=6, **more):
    return TrainConfig.model_validate(
        {
            **{"task": "mnist1d-mlp", "rows": groups * SIZE, "group_size": SIZE, "growth": OPEN_GATES},
            "training": {"horizon": HORIZON, "updates_per_decision": 1, "batch_size": 8},
            "contexts": {"host_widths": WIDTHS},
            **more,
        }
    )


def tasks_of(widths=WIDTHS):
    return [task_of("mnist1d-mlp", examples=40, width=width) for width in widths]


def parts_alone(config):
    """The populations again, each with nobody beside it."""
    groups = config.groups // len(WIDTHS)
    return [
        GrowthEnvironment(
            config, task, config.contexts, config.objective, groups=groups, size=SIZE, first_group=number * groups
        )
        for number, task in enumerate(tasks_of())
    ]


def test_every_population_is_what_it_is_alone():
    config = configured()
    together = populations(config, tasks_of())
    assert [part.task.host.config.widths for part in together.parts] == [(24,) * 3, (12,) * 3, (6,) * 3]
    played = play(together, at_random(3), 5)
    assert (played.reward_DR != 0).any(0).sum() > 6
    net_R = together.balance(lambda data: data.reward_validation).net_R
    for rows, alone in zip(together.slices, parts_alone(config), strict=True):
        script = iter([action_RH[rows] for action_RH in played.actions])
        again = play(alone, lambda situation, script=script: next(script), 5)
        assert torch.equal(again.reward_DR, played.reward_DR[:, rows])
        assert torch.equal(again.slot_DRSF, played.slot_DRSF[:, rows])
        assert torch.equal(again.run_DRF.nan_to_num(9), played.run_DRF[:, rows].nan_to_num(9))
        assert torch.equal(alone.balance(lambda data: data.reward_validation).net_R, net_R[rows])
        assert torch.equal(again.return_R.float(), played.return_R[rows].float())
        # What is paid is the end's balance, whichever population it is paid in.
        torch.testing.assert_close(played.return_R[rows].float(), net_R[rows], atol=1e-4, rtol=0)


def test_groups_starts_and_twins_are_apart():
    config = configured(12, contexts={"host_widths": WIDTHS, "prices": (0.0, 0.1), "learning_rates": (0.01, 0.02)})
    together = populations(config, tasks_of())
    together.reset(2)
    contexts = together.contexts
    assert contexts.group_R.tolist() == [row // SIZE for row in range(36)]
    assert contexts.twin_R.tolist() == [row // SIZE * SIZE for row in range(36)]
    assert len(contexts.start_id_R.unique()) == 12
    # Eight combinations over twelve groups, whichever population they are in: none more than twice.
    first = slice(None, None, SIZE)
    told = zip(*(getattr(contexts, f"{name}_R")[first].tolist() for name in ("price", "rate", "noise")), strict=True)
    counts = torch.tensor([list(told_of).count(one) for told_of in [list(told)] for one in told_of])
    assert counts.max() == 2


def test_prices_can_be_held_back():
    together = populations(configured(contexts={"host_widths": WIDTHS, "prices": (0.2,)}), tasks_of())
    for share in (0.0, 0.25, 1.0):
        together.set_price_share(share)
        together.reset(0)
        torch.testing.assert_close(together.contexts.price_R, torch.full((18,), 0.2 * share))


def test_a_policy_fills_one_rollout_from_all_of_them_and_each_gives_its_records():
    config = configured()
    together = populations(config, tasks_of(), record=True)
    policy = FactoredRecurrentActorCritic(config.policy)
    policy.initialise(torch.Generator().manual_seed(0))
    rollout = Rollout(HORIZON, together.rows, together.slots)
    seen = []
    collect(together, policy, rollout, 0, 1, each=lambda decision, payment: seen.append(payment.steps))
    assert [len(steps) for steps in seen] == [0, *[len(WIDTHS)] * (HORIZON - 1)]
    for decision, steps in enumerate(seen[1:]):
        assert [step.decision for step in steps] == [decision] * len(WIDTHS)
        asked_RH = torch.cat([torch.from_numpy(step.action_RH) for step in steps])
        assert torch.equal(asked_RH, rollout.action_TRH[decision] * together.contexts.grows_R[:, None])
    assert torch.equal(rollout.group_R, together.contexts.group_R)


@pytest.mark.parametrize("other", [{"horizon": 9}, {"task": "mnist1d"}])
def test_what_a_policy_does_must_mean_the_same_everywhere(other):
    with pytest.raises(ValueError, match="same horizon and the same kinds of sites"):
        SideBySide([environment(), environment(**other)])


@pytest.mark.parametrize("shape", [(17, 8), (19, 8), (1, 8), (8,), (18,)])
def test_actions_of_another_shape_are_no_actions(shape):
    """Nor is one row too many left out, or a row too few a matter of the last population alone."""
    together = populations(configured(), tasks_of())
    together.reset(0)
    with pytest.raises(ValueError, match=r"actions must be int64 \[18, 8\], got "):
        together.step(torch.zeros(shape, dtype=torch.int64))
    assert [part.episode.decision for part in together.parts] == [0, 0, 0]


def test_hosts_share_the_groups_evenly():
    with pytest.raises(ValueError, match=r"each of 3 hosts \(.*\) needs as many groups; 12 rows are 4 groups of 3"):
        configured(4)
    with pytest.raises(ValueError, match=r"each of 6 hosts .* needs as many groups; 27 rows are 9 groups of 3"):
        configured(9, contexts={"host_widths": WIDTHS, "other_tasks": ("digits-mlp",)})
    assert ContextConfig().host_widths == (1.0,)


def test_a_row_of_one_population_breaks_off_alone():
    env = populations(configured(), tasks_of())
    row = env.slices[1].start + 1

    def spoil(decision, payment):
        if decision == 3:
            env.parts[1].episode.population.hosts.theta.detach()[1] = torch.nan

    played = play(env, at_random(3), 5, spoil)
    over_DR = torch.stack([payment.over_R for payment in played.payments])
    assert over_DR.nonzero().tolist() == [[decision, row] for decision in range(4, HORIZON)]
    assert (played.part_DR("penalty") != 0).nonzero().tolist() == [[4, row]]
