"""Every rule of the heuristic, on views made for it."""

import pytest
import torch
from tamiyo_views import HORIZON, LIFE, NAN, S, act, make, play, slots_of, view_of

from esper.leyline.actions import ALPHA_TARGETS, TEMPOS, Blueprint, Head, Op, Style
from esper.leyline.checks import Check
from esper.leyline.slots import SlotTensors
from esper.leyline.stages import Stage
from esper.tamiyo.controllers.heuristic import CONFIG, HeuristicConfig, HeuristicController

IMAGE, VECTOR = 0, 2  # Slots of these kinds.
GOOD = {"stage": Stage.PROBATIONARY, "stage_age": 3, "contribution": 0.1}
FULL = {"stage": Stage.FOSSILIZED}


def decide(*cells: dict[str, float], decision: int = 20, deny: Check | None = None) -> tuple[Op, int]:
    """What the heuristic does when a germination is long overdue."""
    action = act(make("heuristic"), view_of(slots_of(*cells), decision, deny=deny))[0]
    return Op(int(action[Head.OP])), int(action[Head.SLOT])


def grows_at(losses: list[float], config: HeuristicConfig = CONFIG) -> int | None:
    """Decision of the first germination on these losses."""
    controller, slots = HeuristicController(1, S, config=config), SlotTensors.empty(1, S)
    for decision, loss in enumerate(losses):
        if act(controller, view_of(slots, decision, [loss]))[0, Head.OP] == Op.GERMINATE:
            return decision
    return None


@pytest.mark.parametrize(
    ("cells", "choice"),
    [
        # Each rule goes before the next.
        (({"stage": Stage.PROBATIONARY, "stage_age": 9}, GOOD), (Op.FOSSILIZE, 1)),
        (({"stage": Stage.GERMINATED}, GOOD | {"contribution": -0.1}), (Op.CULL, 1)),
        (({}, {"stage": Stage.GERMINATED}), (Op.ADVANCE, 1)),
        (({"stage": Stage.BLENDING}, {}), (Op.GERMINATE, 1)),
        ((FULL, FULL, FULL), (Op.WAIT, 0)),
        # Best contribution; most harmful seed; latest stage; first free slot.
        ((GOOD, GOOD | {"contribution": 0.2}), (Op.FOSSILIZE, 1)),
        ((GOOD | {"contribution": -0.1}, GOOD | {"contribution": -0.2}), (Op.CULL, 1)),
        (({"stage": Stage.GERMINATED}, {"stage": Stage.BLENDING, "alpha_target": 1.0}), (Op.ADVANCE, 1)),
        ((FULL, {}, {}), (Op.GERMINATE, 1)),
    ],
)
def test_priority_and_choice_of_the_slot(cells: tuple[dict[str, float], ...], choice: tuple[Op, int]) -> None:
    assert decide(*cells) == choice


@pytest.mark.parametrize(
    ("change", "op"),
    [
        ({}, Op.FOSSILIZE),
        ({"stage_age": 2}, Op.WAIT),
        ({"contribution": NAN}, Op.WAIT),
        ({"contribution": NAN, "stage_age": 8}, Op.WAIT),
        ({"contribution": NAN, "stage_age": 9}, Op.CULL),
        ({"contribution": 0.0}, Op.CULL),
        ({"contribution": -0.1}, Op.CULL),
        ({"contribution": -0.1, "stage_age": 2}, Op.WAIT),
        ({"stage": Stage.FOSSILIZED, "contribution": -0.1, "stage_age": 40}, Op.WAIT),
    ],
)
def test_probation_ends_in_a_commit_or_a_cull(change: dict[str, float], op: Op) -> None:
    assert decide(GOOD | change, FULL, FULL) == (op, 0)


def test_a_positive_contribution_below_the_limit_is_neither_committed_nor_culled() -> None:
    for age in (3, 40):
        view = view_of(slots_of(GOOD | {"stage_age": age}, FULL, FULL), deny=Check.CONTRIBUTION)
        view.gates.limit_CRS.fill_(0.5)
        assert act(make("heuristic"), view)[0, Head.OP] == Op.WAIT


@pytest.mark.parametrize(
    ("age", "deny", "op"),
    [
        (2, None, Op.WAIT),
        (3, None, Op.ADVANCE),
        (9, None, Op.ADVANCE),
        (8, Check.INCUBATOR_GAIN, Op.WAIT),
        (9, Check.INCUBATOR_GAIN, Op.CULL),
        (9, Check.GRADIENT_FINITE, Op.CULL),
    ],
)
def test_training_ends_by_its_gate_or_by_its_age(age: int, deny: Check | None, op: Op) -> None:
    # The two dormant slots stay so: the incubator is taken.
    assert decide({"stage": Stage.TRAINING, "stage_age": age}, deny=deny) == (op, 0)


@pytest.mark.parametrize("stage", [Stage.GERMINATED, Stage.TRAINING])
def test_one_seed_in_the_incubator_at_a_time(stage: Stage) -> None:
    assert decide({"stage": stage}, deny=Check.HOST_LOSS) == (Op.WAIT, 0)


@pytest.mark.parametrize(("left", "op"), [(LIFE, Op.GERMINATE), (LIFE - 1, Op.WAIT)])
def test_a_germination_needs_time_for_a_whole_life(left: int, op: Op) -> None:
    assert decide(decision=HORIZON - left) == (op, 0)


@pytest.mark.parametrize(
    ("cell", "op"),
    [
        ({"stage": Stage.TRAINING, "stage_age": 3}, Op.ADVANCE),
        ({"stage": Stage.BLENDING, "alpha_target": 1.0}, Op.ADVANCE),
        (GOOD, Op.FOSSILIZE),
    ],
)
def test_the_last_decision_still_advances_and_commits(cell: dict[str, float], op: Op) -> None:
    assert decide(cell, decision=HORIZON - 1) == (op, 0)


@pytest.mark.parametrize(
    ("losses", "first"),
    [
        ([1.0] * 10, CONFIG.settle),
        ([1.0, 1.1, 1.2, 1.3], CONFIG.settle),
        ([2.0, 1.8, 1.75, 1.7], CONFIG.settle),
        ([0.8**d for d in range(10)], CONFIG.patience),
        ([0.8, 0.6, 0.34, 0.3, 0.29, 0.28, 0.27], 5),
        ([NAN] * 10, None),
        ([NAN, 1.0, 1.0, 1.0, 1.0], 4),
        ([1.0, 1.0, 1.0, NAN, 1.0, 1.0, 1.0], 4),
        ([0.8**d for d in range(6)] + [float("inf")] * 3, None),
    ],
)
def test_growth_begins_on_a_plateau_or_when_overdue(losses: list[float], first: int | None) -> None:
    assert grows_at(losses) == first


def test_the_host_settles_first() -> None:
    assert grows_at([1.0] * 10, HeuristicConfig(settle=8)) == 8


def test_patience_counts_from_the_last_germination() -> None:
    controller, slots = make("heuristic"), SlotTensors.empty(1, S)
    falling, grown = [0.7**d for d in range(20)], []
    for decision, loss in enumerate(falling):
        if act(controller, view_of(slots, decision, [loss]))[0, Head.OP] == Op.GERMINATE:
            grown.append(decision)
            slots.seeds_made += 1  # As the engine does, in place; the seed itself is of no interest here.
    assert grown == [CONFIG.patience, 2 * CONFIG.patience, 3 * CONFIG.patience]


def test_germinates_by_the_recipe() -> None:
    action = act(make("heuristic"), view_of(SlotTensors.empty(1, S)))[0]
    assert Style(int(action[Head.STYLE])) is Style.LINEAR_ADD
    assert TEMPOS[int(action[Head.TEMPO])] == 3
    assert ALPHA_TARGETS[int(action[Head.ALPHA_TARGET])] == 1.0


def next_blueprint(controller: HeuristicController, slot: int, made: int) -> Blueprint:
    """What would be germinated in this slot after so many seeds."""
    cells = [FULL if s != slot else {} for s in range(S)]
    slots = slots_of(*cells)
    slots.seeds_made[:] = made
    return Blueprint(int(act(controller, view_of(slots))[0, Head.BLUEPRINT]))


def test_blueprints_that_fit_take_turns() -> None:
    def turns(slot: int) -> list[str]:
        at_once = HeuristicController(1, S, config=HeuristicConfig(patience=0))
        return [next_blueprint(at_once, slot, made).name for made in range(10)]

    vector = ["MLP_LARGE", "MLP_SMALL", "BOTTLENECK", "ATTENTION", "LORA_LARGE", "LORA_SMALL", "NORM"]
    assert turns(VECTOR) == vector + vector[:3]
    image = turns(IMAGE)
    assert image[:3] == ["CONV_HEAVY", "CONV_LIGHT", "BOTTLENECK"]
    assert len(set(image[:9])) == 9


def test_a_lost_blueprint_is_passed_over_until_it_is_forgotten() -> None:
    controller = HeuristicController(1, S)
    slots = slots_of(FULL, FULL, {"stage": Stage.TRAINING, "blueprint": Blueprint.MLP_LARGE})
    controller.observe(view_of(slots))
    # The engine writes in place, and leaves nothing of the seed.
    slots.stage[0, VECTOR], slots.blueprint[0, VECTOR] = int(Stage.CULLED), int(Blueprint.NOOP)
    controller.observe(view_of(slots))
    # Turn 0 is MLP_LARGE's own: one decision of decay in each call.
    choices = [next_blueprint(controller, VECTOR, 0).name for _ in range(20)]
    assert choices == ["MLP_SMALL"] * 13 + ["MLP_LARGE"] * 7


def test_penalties_add_up() -> None:
    controller = HeuristicController(1, S)
    for lost in (Blueprint.MLP_SMALL, Blueprint.MLP_SMALL, Blueprint.MLP_LARGE):
        controller.observe(view_of(slots_of(FULL, FULL, {"stage": Stage.TRAINING, "blueprint": lost})))
        controller.observe(view_of(slots_of(FULL, FULL, {"stage": Stage.EMBARGOED})))
    only_mlps = [b not in (Blueprint.MLP_SMALL, Blueprint.MLP_LARGE) for b in Blueprint]
    view = view_of(slots_of(FULL, FULL))
    view.fits_SB[:, only_mlps] = False
    # The turn is MLP_LARGE's and it was lost last, but only once.
    assert act(controller, view)[0, Head.BLUEPRINT] == Blueprint.MLP_LARGE


def test_whole_lives_are_lived() -> None:
    log, slots = play("heuristic", [0, 1, 3], worth={int(Blueprint.CONV_HEAVY): -0.1})
    assert (slots.stage[:2] == int(Stage.FOSSILIZED)).all()
    # The harmful blueprint was tried first in slot 0, culled, and replaced.
    assert log[:, 0, Head.OP].eq(Op.CULL).sum() == 1
    assert (slots.blueprint[:2, IMAGE] != int(Blueprint.CONV_HEAVY)).all()
    # A row without a finite loss never grows.
    assert not log[:, 2].any()
    assert torch.equal(slots.seeds_made, torch.tensor([4, 4, 0]))
