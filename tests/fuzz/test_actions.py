"""Actions past the masks: what is refused is as if the row had waited, and what is no action is refused as a whole."""

import copy

import numpy as np
import pytest
import torch
from gymnasium.error import InvalidAction
from hypothesis import strategies as st
from torch import Tensor

from esper.kasmina.population import Population
from esper.leyline.actions import HEAD_COUNT, Op, SiteKind, head_sizes
from esper.leyline.checks import ALL_GATE_CHECKS, Check, GateReport
from esper.leyline.slots import EMPTY_SLOT, legal_ops
from esper.leyline.stages import Stage
from esper.simic.environment import GrowthEnvironment
from esper.simic.gym_env import GrowthEnv, GrowthVectorEnv
from helpers.environments import environment
from helpers.fuzzing import cases, one_line
from helpers.lifecycle_pair import NEXT_OP
from helpers.population_tools import BLUEPRINTS, LANE_STATE, banks_by_key, populate

ROWS = 3
HOSTS = [(SiteKind.VECTOR, (5, 4)), (SiteKind.SIGNAL, (4,)), (SiteKind.IMAGE, (3, 3))]
NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 14) | st.integers(0, 5)
FULL_RANGE = st.lists(NUMBERS, min_size=HEAD_COUNT, max_size=HEAD_COUNT)


WILD, EXISTING, LEGAL, ONWARD = range(4)
ROW = st.tuples(FULL_RANGE, st.sampled_from([WILD, EXISTING, LEGAL, *[ONWARD] * 4]))
PASSED = st.lists(st.integers(0, 9).map(bool), min_size=len(ALL_GATE_CHECKS), max_size=len(ALL_GATE_CHECKS))
ASKED = st.tuples(st.lists(ROW, min_size=ROWS, max_size=ROWS), st.integers(1, 3), PASSED)
"""Numbers of every row and how they are to be read, how often they are asked in a row, and which gates pass."""
DECISIONS = st.lists(ASKED, min_size=1, max_size=10)


def action_of(population: Population, row: int, numbers: list[int], way: int) -> list[int]:
    """An action of a row: as wild as its numbers, or folded into what exists, is legal, or makes seeds grow."""
    if way == WILD:
        return numbers
    sizes = head_sizes(population.slots.slots)
    action = [n % size for n, size in zip(numbers, sizes.values(), strict=True)]
    fitting = BLUEPRINTS[population.host.kind]
    blueprint = int(fitting[numbers[2] % len(fitting)])
    if way == LEGAL:
        legal = legal_ops(population.slots, population.fits_SB)[row].nonzero().tolist()
        action[:3] = [*legal[numbers[0] % len(legal)], blueprint]
    elif way == ONWARD:
        slot = numbers[1] % 2 % population.slots.slots
        op = NEXT_OP.get(Stage(int(population.slots.stage[row, slot])), Op.WAIT)
        action[:5] = [int(op), slot, blueprint, action[3], 0]
    return action


State = dict[object, tuple[str, tuple[int, ...], bytes]]


def bits(values: Tensor | np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    array = values.detach().numpy() if isinstance(values, Tensor) else values
    return str(array.dtype), array.shape, array.tobytes()


def state_of(population: Population) -> State:
    """Everything that a decision may change, bit for bit."""
    state: State = {name: bits(getattr(population.slots, name)) for name in (*EMPTY_SLOT, "seeds_made")}
    for key, bank in banks_by_key(population).items():
        state |= {(key, name): bits(getattr(bank, name)) for name in (*LANE_STATE, "row", "seed_id")}
        state |= {(key, number): bits(buffer) for number, buffer in enumerate(bank.buffers)}
    return state


def gates_of(population: Population, passed: list[bool]) -> GateReport:
    """Gates as they are told, but for what is not so: alpha at its target."""
    report = population.gate_report(torch.ones(ROWS))
    passed_CRS = torch.tensor(passed)[:, None, None].expand_as(report.passed_CRS).clone()
    at_target = ALL_GATE_CHECKS.index(Check.ALPHA_AT_TARGET)
    passed_CRS[at_target] = report.passed_CRS[at_target]
    return GateReport(report.value_CRS, passed_CRS, report.limit_CRS)


@cases(25, 600, host=st.sampled_from(HOSTS), asked=DECISIONS)
def test_who_is_refused_has_waited(host, asked):
    """The same decisions with WAIT in place of what was refused lead to the same population, bit for bit."""
    kind, widths = host
    population = populate(kind, list(range(ROWS)), widths, norm="batch")
    for rows, _, passed in (one for one in asked for _ in range(one[1])):
        patient = copy.deepcopy(population)
        actions = [action_of(population, row, *one) for row, one in enumerate(rows)]
        action_RH, gates = torch.tensor(actions), gates_of(population, passed)
        outcome, _ = population.decide(action_RH, gates)
        assert action_RH.tolist() == actions
        patiently, _ = patient.decide(action_RH * outcome.accepted[:, None], gates)
        assert patiently.accepted.all()
        assert state_of(population) == state_of(patient)
        assert {Check(check) for check in outcome.refused_by.tolist()} <= set(Check)
        assert torch.equal(outcome.accepted, outcome.refused_by == int(Check.NONE))
        for row, action in enumerate(actions):
            exists = 0 <= action[0] < len(Op)
            assert exists or outcome.refused_by[row] == int(Check.RANGE)


SHAPES = st.lists(st.integers(0, 9), max_size=3).filter(lambda shape: shape != [ROWS, HEAD_COUNT])
DTYPES = st.sampled_from(
    [torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.float32, torch.float64, torch.complex64]
)


@cases(60, 500, shape=SHAPES, dtype=DTYPES)
def test_what_is_no_action(shape, dtype):
    population = populate(SiteKind.VECTOR, list(range(ROWS)), (5,))
    before, gates = state_of(population), population.gate_report(torch.ones(ROWS))
    for size in (shape, [ROWS, HEAD_COUNT]):
        given = torch.zeros(size, dtype=dtype)
        if size != shape and dtype == torch.int64:
            continue
        with pytest.raises(ValueError, match=r"^actions must be int64 \[3, 8\], got ") as caught:
            population.decide(given, gates)
        one_line(caught.value)
        assert state_of(population) == before


@pytest.fixture(scope="module")
def played():
    """Two environments that begin the same episodes."""
    return environment(groups=1, size=3, horizon=6), environment(groups=1, size=3, horizon=6)


@cases(12, 250, asked=DECISIONS, number=st.integers(0, 3))
def test_an_environment_where_somebody_is_refused(played, asked, number):
    """Hosts, seeds and payments of an episode are those of one in which the refused rows waited."""
    env, patient = played
    env.reset(number)
    patient.reset(number)
    for rows, _, _ in [one for one in asked for _ in range(one[1])][: env.horizon]:
        population = env.episode.population
        action_RH = torch.tensor([action_of(population, row, *one) for row, one in enumerate(rows)])
        payment = env.step(action_RH)
        accepted_R = env.episode.view().last.accepted
        assert accepted_R[~env.contexts.grows_R].all(), "a twin waits, whatever is asked of it"
        again = patient.step(action_RH * accepted_R[:, None])
        assert torch.equal(payment.reward_R, again.reward_R)
        assert payment.reward_R.isfinite().all()
        assert state_of(population) == state_of(patient.episode.population)


@pytest.fixture(scope="module")
def gym():
    vector, single = GrowthVectorEnv(environment(groups=1, size=2)), GrowthEnv(environment(groups=1, size=2))
    vector.reset()
    single.reset()
    return vector, single


ARRAYS = st.one_of(
    FULL_RANGE.map(lambda row: np.array(row, dtype=np.int64)),
    st.lists(FULL_RANGE, min_size=1, max_size=3).map(lambda rows: np.array(rows, dtype=np.int64)),
    st.lists(st.lists(st.integers(0, 2**64 - 1), min_size=8, max_size=8), min_size=2, max_size=2).map(
        lambda rows: np.array(rows, dtype=np.uint64)
    ),
)


def check_no_action(env: GrowthVectorEnv | GrowthEnv, inner: GrowthEnvironment, given: object) -> None:
    """An error says so before anything is done."""
    before, decision = state_of(inner.episode.population), inner.episode.decision
    with pytest.raises(InvalidAction, match="actions must be integers"):
        env.step(given)
    assert inner.episode.decision == decision
    assert state_of(inner.episode.population) == before


@cases(80, 800, given=ARRAYS)
def test_a_learner_of_gymnasium_that_sends_any_numbers(gym, given):
    for env, inner in ((gym[0], gym[0].environment), (gym[1], gym[1]._pair.environment)):
        if not env.action_space.contains(given):
            check_no_action(env, inner, given)


@pytest.mark.parametrize("rows", [(), (2,)], ids=["single", "vector"])
@pytest.mark.parametrize("dtype", [object, float, bool, "datetime64[s]", complex, "U3", np.float16])
def test_a_learner_of_gymnasium_that_sends_what_is_no_number(gym, rows, dtype):
    """In the shape of actions, whose zeros would be waiting."""
    env = gym[0] if rows else gym[1]
    inner = gym[0].environment if rows else gym[1]._pair.environment
    check_no_action(env, inner, np.zeros((*rows, HEAD_COUNT), dtype=dtype))


@pytest.mark.parametrize("given", [None, "wait", [], [[0] * 8, [0] * 7], {}, 3, [[2**70] * 8] * 2, [None] * 8, np.nan])
def test_a_learner_of_gymnasium_that_sends_no_array(gym, given):
    check_no_action(gym[0], gym[0].environment, given)
    check_no_action(gym[1], gym[1]._pair.environment, given)
