"""Classify, then hedge: what is incubated, when the condition is judged, and what is blended."""

import pytest
import torch
from tamiyo_views import NAN, S, act, slots_of, view_of

from esper.leyline.actions import HEAD_COUNT, Blueprint, Head, Op, Style
from esper.leyline.slots import SlotTensors
from esper.leyline.stages import Stage
from esper.tamiyo.controllers.hedge import Classifier, HedgeController, Menu

LOOKS = 2
LOW, HIGH = 1.0, 2.0
"""Losses of the two conditions."""
YOUNG = {"stage": Stage.TRAINING, "stage_age": 3}


def classifier() -> Classifier:
    """Two conditions, told apart by the mean of the four losses."""
    weight_LC = torch.tensor([[-5.0, 5.0]]).repeat(2 * LOOKS, 1)
    return Classifier(weight_LC, torch.tensor([30.0, -30.0]))


def menu(rows: int = 1) -> Menu:
    """A norm in slot 0 is best in the first condition, an MLP in slot 2 in the second; nothing in slot 1."""
    germination_RSH = torch.zeros(rows, S, HEAD_COUNT, dtype=torch.int64)
    germination_RSH[:, 0, Head.BLUEPRINT], germination_RSH[:, 0, Head.STYLE] = int(Blueprint.NORM), 1
    germination_RSH[:, 2, Head.BLUEPRINT], germination_RSH[:, 2, Head.TEMPO] = int(Blueprint.MLP_LARGE), 2
    part_MS = torch.tensor([[False] * 3, [True, False, False], [False, False, True], [True, False, True]])
    net_MC = torch.tensor([[0.0, 0.0], [0.2, -0.1], [-0.1, 0.2], [0.1, 0.1]])
    return Menu(germination_RSH, part_MS.repeat(rows, 1, 1), net_MC.repeat(rows, 1, 1))


def judged(*losses: float, cells: tuple[dict[str, float], ...]) -> torch.Tensor:
    """Action after `LOOKS` decisions with these losses."""
    controller = HedgeController(menu(), classifier())
    for decision, loss in enumerate((NAN, *losses)):
        action = act(controller, view_of(slots_of(*cells), decision, [loss]))[0]
    return action


def test_the_menu_is_incubated_and_nothing_is_blended_before_the_condition_is_known() -> None:
    controller = HedgeController(menu(), classifier())
    slots = SlotTensors.empty(1, S)
    first = act(controller, view_of(slots, 0, [NAN]))[0]
    assert first[: Head.TEMPO].tolist() == [Op.GERMINATE, 0, Blueprint.NORM, Style.LINEAR_MULTIPLY]
    second = act(controller, view_of(slots_of(YOUNG), 1, [LOW]))[0]
    assert second[[Head.OP, Head.SLOT, Head.BLUEPRINT, Head.TEMPO]].tolist() == [
        Op.GERMINATE,
        2,
        Blueprint.MLP_LARGE,
        2,
    ]
    full = view_of(slots_of(YOUNG, {}, YOUNG), 1, [LOW])
    assert act(HedgeController(menu(), classifier()), full)[0, Head.OP] == Op.WAIT


@pytest.mark.parametrize(
    ("loss", "wanted", "other"),
    [
        (LOW, 0, 2),
        (HIGH, 2, 0),
    ],
)
def test_what_is_best_in_the_condition_is_blended_and_the_rest_culled(loss: float, wanted: int, other: int) -> None:
    both = (YOUNG, {}, YOUNG)
    assert judged(loss, loss, cells=both)[[Head.OP, Head.SLOT]].tolist() == [Op.CULL, other]
    alone = tuple(YOUNG if s == wanted else {} for s in range(S))
    assert judged(loss, loss, cells=alone)[[Head.OP, Head.SLOT]].tolist() == [Op.ADVANCE, wanted]
    # What is not wanted any more is not germinated any more either.
    gone = tuple({"stage": Stage.FOSSILIZED} if s == wanted else {} for s in range(S))
    assert judged(loss, loss, cells=gone)[Head.OP] == Op.WAIT


def test_in_doubt_the_plan_that_is_best_on_average_is_chosen() -> None:
    """Half way between the conditions: both seeds are worth 0.1, and either alone 0.05."""
    middle = (LOW + HIGH) / 2
    controller = HedgeController(menu(), classifier())
    for decision, loss in enumerate((NAN, middle, middle)):
        controller.observe(view_of(slots_of(YOUNG, {}, YOUNG), decision, [loss]))
    assert controller.state()["wanted_RS"].tolist() == [[True, False, True]]


def test_each_row_is_judged_by_its_own_losses() -> None:
    controller = HedgeController(menu(2), classifier())
    for decision, losses in enumerate(([NAN, NAN], [LOW, HIGH], [LOW, HIGH])):
        controller.observe(view_of(SlotTensors.empty(2, S), decision, losses))
    assert controller.state()["wanted_RS"].tolist() == [[True, False, False], [False, False, True]]


def test_a_condition_is_judged_once() -> None:
    controller = HedgeController(menu(), classifier())
    for decision, loss in enumerate((NAN, LOW, LOW, HIGH, HIGH, HIGH)):
        controller.observe(view_of(SlotTensors.empty(1, S), decision, [loss]))
    assert controller.state()["wanted_RS"].tolist() == [[True, False, False]]


def test_a_seed_on_probation_is_committed_as_soon_as_its_gate_passes() -> None:
    good = {"stage": Stage.PROBATIONARY, "stage_age": 3, "contribution": 0.1, "contribution_se": 0.01}
    assert judged(LOW, LOW, cells=(good, {}, YOUNG))[[Head.OP, Head.SLOT]].tolist() == [Op.FOSSILIZE, 0]


def test_losses_that_are_not_finite_do_not_count() -> None:
    probability_RC = classifier().probability(torch.tensor([[NAN, float("inf"), LOW, LOW]]))
    assert probability_RC.isfinite().all()
    torch.testing.assert_close(probability_RC, classifier().probability(torch.tensor([[0.0, 0.0, LOW, LOW]])))
