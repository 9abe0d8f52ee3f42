"""What a policy does most often, read off the record of its actions."""

import torch

from esper.exam.grid import play
from esper.exam.plans import NOTHING, Family, Plan, Seed, plan_table
from esper.exam.replay import STARTS, Diary, modal_plans, most_frequent
from esper.leyline.actions import Blueprint, Style
from esper.leyline.config import HeadroomConfig
from esper.leyline.starts import REPLAY
from esper.simic.contexts import grid
from esper.tamiyo.controllers.plan import PlanController
from helpers.exams import PRICES, WORLD, exam_tasks, headroom_config
from helpers.rollouts import small_policy

NORM, SMALL, ADD, MULTIPLY = Blueprint.NORM, Blueprint.MLP_SMALL, Style.LINEAR_ADD, Style.LINEAR_MULTIPLY


def test_the_record_of_plans_gives_the_plans_back():
    """Up to the decisions that a seed waited because another went first."""
    config = HeadroomConfig.model_validate(
        WORLD | {"training": {"horizon": 30, "updates_per_decision": 1, "batch_size": 2}}
    )
    task = exam_tasks()[0]
    family = Family.of(config, task.host.slot_config)
    plans = (NOTHING, *family.singles(), *family.sampled(40, 0, "plans"))
    rows = grid(config.contexts, torch.tensor([REPLAY.start]), (0.0,), len(plans))
    diary = Diary(len(rows.start_id_R))
    table = plan_table(plans).repeat(len(rows.start_id_R) // len(plans), 1, 1)
    play(config, task, rows, lambda _: PlanController(table, 3), lambda data: data.selection, recorder=lambda _: diary)
    exact = 0
    for plan, found in zip(plans, diary.plans(), strict=False):
        exact += plan == found
        named = {(s.slot, s.blueprint, s.style, s.tempo, s.alpha_target): s for s in plan.seeds}
        for seed in found.seeds:
            planned = named[seed.slot, seed.blueprint, seed.style, seed.tempo, seed.alpha_target]
            assert planned.begin <= seed.begin <= planned.begin + 3
            assert (seed.cull is None) == (planned.cull is None) or planned.cull > 26
        assert family.misfit(found) is None
    assert exact > len(plans) / 2
    assert diary.plans()[: 1 + len(family.singles())] == list(plans[: 1 + len(family.singles())])


def test_of_too_many_seeds_those_that_were_committed_are_kept():
    diary = Diary(1)
    seeds = [Seed(0, NORM, ADD, begin=0, cull=2), Seed(1, NORM, ADD, begin=1), Seed(2, SMALL, ADD, begin=2)]
    seeds.append(Seed(0, SMALL, MULTIPLY, begin=11))
    diary.seeds = [seeds]
    diary.committed = torch.tensor([[True, False, True]]).numpy()
    assert diary.plans() == [Plan((seeds[0], *seeds[2:]))]


def test_the_plan_in_the_middle_of_the_largest_group():
    two = [Plan((Seed(0, NORM, ADD, begin=at), Seed(1, SMALL, ADD, begin=at + 1))) for at in (0, 2, 3)]
    # The same seeds, begun in the other order.
    two.append(Plan((Seed(1, SMALL, ADD, begin=3), Seed(0, NORM, ADD, begin=4))))
    longer = [Plan((Seed(0, NORM, ADD, 8, begin=2), Seed(1, SMALL, ADD, begin=2)))]
    others = [NOTHING, NOTHING, Plan((Seed(0, NORM, MULTIPLY),)), NOTHING]
    assert most_frequent([*others, *two, *longer]) == two[1]
    assert most_frequent([*others, *two[:2]]) == NOTHING


def test_a_policy_is_watched_in_every_context_and_price():
    config, tasks = headroom_config(), exam_tasks()
    modal = modal_plans(config, config.contexts, tasks, small_policy(0))
    family = Family.of(config, tasks[0].host.slot_config)
    assert len(modal.by_price) == len(PRICES)
    assert all(family.misfit(plan) is None for plan in (modal.plan, *modal.by_price))
    assert modal == modal_plans(config, config.contexts, tasks, small_policy(0))
    assert STARTS >= 2
