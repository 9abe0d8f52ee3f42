"""Every rule of the heuristic, on views made for it."""

import itertools
from dataclasses import replace

import pytest
import torch
from tamiyo_views import CONFIG as HOST_SLOTS
from tamiyo_views import HORIZON, HOST, LIFE, NAN, PARAMETERS_SBO, S, act, make, play, slots_of, view_of

from esper.leyline.actions import ALPHA_TARGETS, TEMPOS, Blueprint, Head, Op, Operator, Style
from esper.leyline.checks import Check
from esper.leyline.slots import SlotTensors
from esper.leyline.stages import Stage
from esper.tamiyo.controllers.heuristic import CONFIG, HeuristicConfig, HeuristicController, first_guess

IMAGE, VECTOR = 0, 2  # Slots of these kinds.
GOOD = {"stage": Stage.PROBATIONARY, "stage_age": 3, "contribution": 0.1, "contribution_se": 0.01}
FULL = {"stage": Stage.FOSSILIZED}
LARGE = {"blueprint": Blueprint.MLP_LARGE, "parameters": 600}


def decide(
    *cells: dict[str, float], decision: int = 20, deny: Check | None = None, price: float = 0.0
) -> tuple[Op, int]:
    """What the heuristic does."""
    action = act(make("heuristic"), view_of(slots_of(*cells), decision, deny=deny, price=price))[0]
    return Op(int(action[Head.OP])), int(action[Head.SLOT])


def germinated(controller: HeuristicController, *cells: dict[str, float], price: float = 0.0, decision: int = 20):
    """What is germinated and in which style; None if nothing is."""
    action = act(controller, view_of(slots_of(*cells), decision, price=price))[0]
    if action[Head.OP] != Op.GERMINATE:
        return None
    return Blueprint(int(action[Head.BLUEPRINT])), Style(int(action[Head.STYLE]))


@pytest.mark.parametrize(
    ("cells", "choice"),
    [
        # Each rule goes before the next.
        (({"stage": Stage.TRAINING, "stage_age": 9}, GOOD), (Op.FOSSILIZE, 1)),
        (({"stage": Stage.GERMINATED}, GOOD | {"contribution": -0.1}), (Op.CULL, 1)),
        (({}, {"stage": Stage.GERMINATED}), (Op.ADVANCE, 1)),
        (({"stage": Stage.BLENDING}, {}), (Op.GERMINATE, 1)),
        ((FULL, FULL, FULL), (Op.WAIT, 0)),
        # Best contribution; most harmful seed; latest stage; first of two equal sites.
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
        ({"contribution": NAN, "contribution_se": NAN}, Op.WAIT),
        ({"contribution": -0.1}, Op.CULL),
        ({"contribution": -0.1, "stage_age": 2}, Op.WAIT),
        # Less clear than two standard errors: decided only when probation has lasted long enough.
        ({"contribution": 0.015}, Op.WAIT),
        ({"contribution": -0.015}, Op.WAIT),
        ({"contribution": 0.015, "stage_age": CONFIG.max_probation + 1}, Op.FOSSILIZE),
        ({"contribution": -0.015, "stage_age": CONFIG.max_probation + 1}, Op.CULL),
        ({"stage": Stage.FOSSILIZED, "contribution": -0.1, "stage_age": 40}, Op.WAIT),
    ],
)
def test_probation_ends_in_a_commit_or_a_cull(change: dict[str, float], op: Op) -> None:
    assert decide(GOOD | change, FULL, FULL) == (op, 0)


@pytest.mark.parametrize(("price", "op"), [(0.0, Op.FOSSILIZE), (0.1, Op.FOSSILIZE), (0.2, Op.WAIT), (0.4, Op.CULL)])
def test_a_seed_is_kept_if_it_contributes_more_than_its_rent(price: float, op: Op) -> None:
    """600 parameters beside 1,000 of the host cost 0.47 times the price: 0.047, 0.094 and 0.188 nats of its 0.1."""
    assert decide(GOOD | LARGE, FULL, FULL, price=price) == (op, 0)


def test_rent_is_what_would_be_saved_without_the_seed() -> None:
    """Beside 5,000 committed parameters the same 600 cost 0.095 times the price."""
    committed = FULL | {"parameters": 2500}
    assert decide(GOOD | LARGE, committed, committed, price=0.4) == (Op.FOSSILIZE, 0)


def test_what_the_gate_refuses_is_not_committed() -> None:
    assert decide(GOOD, FULL, FULL, deny=Check.CONTRIBUTION) == (Op.WAIT, 0)


@pytest.mark.parametrize(
    ("age", "deny", "op"),
    [
        (2, None, Op.WAIT),
        (3, None, Op.ADVANCE),
        (8, Check.INCUBATOR_GAIN, Op.WAIT),
        (9, Check.INCUBATOR_GAIN, Op.CULL),
        (9, Check.GRADIENT_FINITE, Op.CULL),
    ],
)
def test_training_ends_by_its_gate_or_by_its_age(age: int, deny: Check | None, op: Op) -> None:
    assert decide({"stage": Stage.TRAINING, "stage_age": age}, FULL, FULL, deny=deny) == (op, 0)


@pytest.mark.parametrize("decision", [0, 1])
@pytest.mark.parametrize("stage", [Stage.TRAINING, Stage.BLENDING])
def test_growth_begins_at_once_and_seeds_incubate_side_by_side(decision: int, stage: Stage) -> None:
    assert decide(decision=decision)[0] is Op.GERMINATE
    assert decide({"stage": stage, "stage_age": 1}, decision=decision, deny=Check.ALPHA_AT_TARGET) == (Op.GERMINATE, 1)


@pytest.mark.parametrize(("left", "op"), [(LIFE, Op.GERMINATE), (LIFE - 1, Op.WAIT)])
def test_a_germination_needs_time_for_a_whole_life(left: int, op: Op) -> None:
    assert decide(decision=HORIZON - left)[0] is op


@pytest.mark.parametrize(
    ("cell", "left", "op"),
    [
        (GOOD, 1, Op.FOSSILIZE),
        # One decision each: what is not clear is decided while there is time for all slots.
        (GOOD | {"contribution": 0.015}, CONFIG.recovery + S, Op.FOSSILIZE),
        (GOOD | {"contribution": 0.015}, CONFIG.recovery + S + 1, Op.WAIT),
        # What is not committed at the end is lost, and the host is better without it.
        ({"stage": Stage.BLENDING, "alpha_target": 1.0, "alpha_mode": 1}, CONFIG.recovery, Op.CULL),
        (GOOD | {"stage_age": 1}, CONFIG.recovery, Op.CULL),
        (GOOD | {"stage_age": 1}, CONFIG.recovery + 1, Op.WAIT),
        ({"stage": Stage.TRAINING, "stage_age": 1}, 1, Op.WAIT),
    ],
)
def test_everything_is_decided_before_the_horizon(cell: dict[str, float], left: int, op: Op) -> None:
    assert decide(cell, FULL, FULL, decision=HORIZON - left) == (op, 0)


def test_germinates_by_the_recipe() -> None:
    action = act(make("heuristic"), view_of(SlotTensors.empty(1, S)))[0]
    assert TEMPOS[int(action[Head.TEMPO])] == 3
    assert ALPHA_TARGETS[int(action[Head.ALPHA_TARGET])] == 1.0


def test_the_higher_the_price_the_smaller_the_seed_until_none_pays() -> None:
    chosen = [germinated(make("heuristic"), FULL, FULL, price=price) for price in (0.0, 0.1, 0.2, 100.0)]
    assert chosen[0] == (Blueprint.MLP_LARGE, Style.LINEAR_ADD)
    assert chosen[-1] is None
    sizes = [int(PARAMETERS_SBO[VECTOR, int(blueprint), 0]) for blueprint, _ in chosen[:-1]]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 1


def test_less_is_expected_of_a_seed_beside_others_and_late() -> None:
    """At this price a seed pays in an empty host at the start; beside two others, or near the end, it does not."""
    price = 2.0
    assert germinated(make("heuristic"), price=price, decision=0) is not None
    assert germinated(make("heuristic"), FULL, FULL, price=price, decision=0) is None
    assert germinated(make("heuristic"), price=price, decision=HORIZON - LIFE) is None


def test_what_does_not_fit_is_not_germinated() -> None:
    view = view_of(slots_of(FULL, FULL))
    view.fits_SB[:] = False
    view.fits_SB[VECTOR, int(Blueprint.LORA_SMALL)] = True
    action = act(make("heuristic"), view)[0]
    assert action[Head.BLUEPRINT] == Blueprint.LORA_SMALL
    assert action[Head.STYLE] == Style.LINEAR_MULTIPLY


def lost(controller: HeuristicController, kind: dict[str, float], contribution: float = NAN) -> None:
    """A seed of this kind is on trial in the last slot, and then it is gone."""
    slots = slots_of(FULL, FULL, {"stage": Stage.PROBATIONARY, "contribution": contribution} | kind)
    controller.observe(view_of(slots))
    # The engine writes in place, and leaves nothing of the seed.
    slots.stage[0, VECTOR], slots.blueprint[0, VECTOR] = int(Stage.CULLED), int(Blueprint.NOOP)
    slots.contribution[0, VECTOR], slots.operator[0, VECTOR] = NAN, int(Operator.ADD)
    controller.observe(view_of(slots))


def test_what_brought_nothing_gives_way_to_another_blueprint_and_style() -> None:
    controller = HeuristicController(1, S)
    tried = []
    for _ in range(6):
        kind = germinated(controller, FULL, FULL)
        assert kind is not None
        tried.append(kind)
        operator = {Style.LINEAR_MULTIPLY: Operator.MULTIPLY, Style.GATED_GATE: Operator.GATE}.get(
            kind[1], Operator.ADD
        )
        lost(controller, {"blueprint": kind[0], "operator": operator})
    assert len(set(tried)) >= 4
    assert len({style for _, style in tried}) >= 2


def test_what_brought_much_is_chosen_again() -> None:
    controller = HeuristicController(1, S)
    assert germinated(controller, FULL, FULL) == (Blueprint.MLP_LARGE, Style.LINEAR_ADD)
    lost(controller, {"blueprint": Blueprint.LORA_LARGE, "operator": Operator.MULTIPLY}, contribution=1.0)
    assert germinated(controller, FULL, FULL) == (Blueprint.LORA_LARGE, Style.LINEAR_MULTIPLY)


def test_a_run_whose_seeds_bring_nothing_stops_growing() -> None:
    controller, price = HeuristicController(1, S), 0.2
    assert germinated(controller, FULL, FULL, price=price) is not None
    for blueprint in (Blueprint.ATTENTION, Blueprint.NORM, Blueprint.MLP_SMALL, Blueprint.BOTTLENECK):
        for _ in range(3):
            lost(controller, {"blueprint": blueprint})
    assert germinated(controller, FULL, FULL, price=price) is None


def test_a_committed_seed_counts_once_with_what_it_brought_by_then() -> None:
    controller = HeuristicController(1, S)
    kind = {"blueprint": Blueprint.NORM, "operator": Operator.MULTIPLY}
    slots = slots_of(FULL, FULL, GOOD | kind)
    controller.observe(view_of(slots))
    slots.stage[0, VECTOR] = int(Stage.FOSSILIZED)
    for contribution in (0.1, 5.0, -5.0):
        slots.contribution[0, VECTOR] = contribution
        controller.observe(view_of(slots))
    memory = controller.state()
    assert memory["brought_RK"].sum().item() == pytest.approx(0.1)
    at = int(Blueprint.NORM) * len(Operator) + int(Operator.MULTIPLY)
    guess = first_guess(view_of(slots), CONFIG)[VECTOR, at]
    assert memory["expected_RK"][0, at] == memory["expected_RK"].sum() == guess


def test_the_first_guess_is_in_nats_by_relative_cost() -> None:
    """MLP_LARGE in the last slot, a vector: worth, saturated at its cost, less for each slot before it."""
    view = view_of(SlotTensors.empty(1, S))
    guess_SBO = first_guess(view, CONFIG).view(S, len(Blueprint), len(Operator))
    expected = CONFIG.vectors
    cost = torch.tensor(1 + int(PARAMETERS_SBO[VECTOR, Blueprint.MLP_LARGE, 0]) / HOST).log()
    share = expected.deeper**VECTOR * cost / (cost + expected.knee)
    torch.testing.assert_close(
        guess_SBO[VECTOR, Blueprint.MLP_LARGE, Operator.ADD], expected.worth * torch.tensor(10.0).log() * share
    )
    assert guess_SBO[VECTOR, Blueprint.MLP_LARGE, Operator.MULTIPLY] < guess_SBO[VECTOR, Blueprint.MLP_LARGE, 0]
    assert HOST_SLOTS.sites[IMAGE].kind is not HOST_SLOTS.sites[VECTOR].kind


def test_whole_lives_are_lived() -> None:
    harmful = {int(b): -0.1 for b in (Blueprint.CONV_HEAVY, Blueprint.BOTTLENECK)}
    log, slots = play("heuristic", [0, 1, 3], worth=harmful)
    assert (slots.stage[:, 1:] == int(Stage.FOSSILIZED)).all()
    # The harmful seed that was tried first in slot 0 was culled, and never was the same one tried again at once.
    assert (log[:, :, Head.OP] == Op.CULL).any(0).all()
    tried = [action[Head.BLUEPRINT : Head.TEMPO].tolist() for action in log[:, 0] if action[Head.OP] == Op.GERMINATE]
    assert all(one != other for one, other in itertools.pairwise(tried))


def test_constants_are_the_controllers_own() -> None:
    patient = HeuristicController(1, S, config=replace(HeuristicConfig(), max_training=20))
    stuck = view_of(slots_of({"stage": Stage.TRAINING, "stage_age": 9}, FULL, FULL), deny=Check.INCUBATOR_GAIN)
    assert act(patient, stuck)[0, Head.OP] == Op.WAIT
