"""The slot machine against its plain model: every field after every decision, and the invariants of the machine."""

import random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from esper.leyline.actions import HEAD_COUNT, Head, Op
from esper.leyline.checks import Check
from esper.leyline.stages import VALID_TRANSITIONS
from helpers.growing import GOOD
from helpers.lifecycle_pair import BAD, INF, NAN, NEXT_OP, SIZES, SLOTS, Machine, complete

wild_actions = st.tuples(*[st.integers(-2, SIZES[head] + 1) for head in Head]).map(list)
tame_actions = st.tuples(*[st.integers(0, SIZES[head] - 1) for head in Head]).map(list)
measurements = st.one_of(
    st.just(GOOD),
    st.fixed_dictionaries(
        {
            "gradient_norm": st.sampled_from([NAN, INF, 0.0, 1.0, 1e30]),
            "gradient_ratio": st.sampled_from([NAN, INF, 0.0, 1e-4, 1e-3, 0.5, 999.0, 1000.0]),
            "incubator_gain": st.sampled_from([NAN, INF, -INF, 0.0, 0.1, 0.2]),
            "contribution": st.sampled_from([NAN, INF, -INF, -0.2, -0.1, 0.0]),
        }
    ),
    st.sampled_from(BAD).map(lambda bad: GOOD | bad),
)
losses = st.sampled_from([1.0, 1.0, 2.0, NAN, INF])


class LifecycleMachine(RuleBasedStateMachine):
    """Arbitrary decisions: half of the rows do what the structure allows, the others whatever comes."""

    @initialize(rows=st.integers(1, 3), embargo=st.integers(1, 5))
    def start(self, rows: int, embargo: int) -> None:
        self.machine = Machine(rows, embargo)

    @rule(data=st.data())
    def decide(self, data: Any) -> None:
        machine = self.machine
        actions = []
        for r in range(machine.rows):
            possible = machine.possible(r)
            way = data.draw(st.integers(0, 5))
            if possible and way < 4:
                chosen = data.draw(st.sampled_from(possible))
                actions.append(complete(*chosen, data.draw(st.tuples(*[st.integers(0, 59)] * 6))))
            else:
                actions.append(data.draw(wild_actions if way == 4 else tame_actions))
            for s in range(SLOTS.slots):
                if machine.oracle.slots[r][s]["seed_id"] >= 0:
                    machine.measure(r, s, data.draw(measurements))
        machine.decide(actions, [data.draw(losses) for _ in range(machine.rows)])

    @rule(
        slot=st.integers(0, SLOTS.slots - 1), decisions=st.integers(1, 12), heads=st.tuples(*[st.integers(0, 59)] * 6)
    )
    def grow(self, slot: int, decisions: int, heads: tuple[int, ...]) -> None:
        """Every row takes the next step towards a fossil in one slot; measurements are good, gates may refuse."""
        machine = self.machine
        for _ in range(decisions):
            actions = []
            for r in range(machine.rows):
                machine.measure(r, slot, GOOD)
                op = NEXT_OP.get(machine.oracle.slots[r][slot]["stage"], Op.WAIT)
                actions.append(complete(int(op), slot, False, [h + r for h in heads]))
            machine.decide(actions, [1.0] * machine.rows)

    @rule(decisions=st.integers(1, 8))
    def wait(self, decisions: int) -> None:
        for _ in range(decisions):
            self.machine.decide([[0] * HEAD_COUNT] * self.machine.rows, [1.0] * self.machine.rows)


LifecycleMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestLifecycleMachine = LifecycleMachine.TestCase


@pytest.mark.parametrize("embargo", [1, 5])
def test_a_long_random_life_agrees_with_the_plain_model_and_goes_everywhere(embargo):
    """Many rows for many decisions; each transition and each refusal that exists must have happened."""
    choose = random.Random(embargo)
    machine = Machine(32, embargo)
    for _ in range(160):
        actions = []
        for r in range(machine.rows):
            way, possible = choose.random(), machine.possible(r)
            for s in range(SLOTS.slots):
                machine.measure(r, s, GOOD | (choose.choice(BAD) if choose.random() < 0.4 else {}))
            if way < 0.15:
                actions.append([choose.randrange(-1, SIZES[head] + 1) for head in Head])
            elif way < 0.35:
                actions.append([choose.randrange(SIZES[head]) for head in Head])
            elif way < 0.7 and possible:
                # Mostly growth: a row that culls at every chance never gets far.
                growing = [p for p in possible if p[0] != Op.CULL] or possible
                picked = choose.choice(growing if choose.random() < 0.8 else possible)
                actions.append(complete(*picked, [choose.randrange(60) for _ in range(6)]))
            else:
                actions.append([0] * HEAD_COUNT)
        machine.decide(actions, [choose.choice([1.0, 1.0, 1.0, NAN, INF]) for _ in range(machine.rows)])
    assert machine.transitions == {(a, b) for a, targets in VALID_TRANSITIONS.items() for b in targets}
    assert machine.refusals == set(Check)
