"""Plans: which lanes take part in which call, and where a branch leaves the main pass."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.kasmina.plan import Branches, Call, Pass, Planner
from esper.leyline.actions import Operator
from esper.leyline.slots import Structure
from esper.leyline.stages import Stage

ADD, MULTIPLY, GATE = Operator
ORDER = {ADD: 0, GATE: 1, MULTIPLY: 2}

Seed = tuple[int, Operator]
"""Blueprint and operator."""


@dataclass
class Held:
    """What a plan asks of a bank."""

    rows: list[int] = field(default_factory=list)

    @property
    def row(self) -> np.ndarray:
        return np.array(sorted(self.rows), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)


class World:
    """Seeds by (row, site), each at an alpha of its own."""

    def __init__(self, rows: int, sites: int, seeds: dict[tuple[int, int], Seed]) -> None:
        self.rows, self.sites, self.seeds = rows, sites, seeds
        shape = (rows, sites)
        stage = np.full(shape, int(Stage.DORMANT))
        blueprint, operator = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        alpha = torch.zeros(shape)
        self.banks: dict[tuple[int, int], Held] = {}
        self.gate_banks: dict[int, Held] = {}
        for (row, site), (kind, op) in seeds.items():
            stage[row, site], blueprint[row, site], operator[row, site] = Stage.BLENDING, kind, op
            alpha[row, site] = 0.25 + 0.01 * row + 0.1 * site
            self.banks.setdefault((site, kind), Held()).rows.append(row)
            if op is GATE:
                self.gate_banks.setdefault(site, Held()).rows.append(row)
        self.alpha_RS = alpha
        self.base = stage != int(Stage.DORMANT)
        structure = Structure(stage, blueprint, operator, blueprint - 1, self.base, np.zeros(shape, dtype=bool))
        self.planner = Planner(structure, alpha, self.banks, self.gate_banks)

    def resolve(self, call: Call, lane_rows: list[int]) -> list[tuple[int, int]]:
        """(lane, row) of a call in its order, with everything that it says of them checked."""
        site, kind = call.key
        lanes = list(range(len(lane_rows))) if call.lanes is None else call.lanes.tolist()
        rows = [lane_rows[lane] for lane in lanes]
        bank = self.banks[call.key].row.tolist()
        members = list(range(len(bank))) if call.members is None else call.members.tolist()
        assert [bank[member] for member in members] == rows
        assert call.count == len(lanes) == len(set(lanes))
        operators = [self.seeds[row, site][1] for row in rows]
        assert all(self.seeds[row, site][0] == kind for row in rows)
        assert sorted(operators, key=ORDER.__getitem__) == operators
        assert call.adds == operators.count(ADD)
        assert call.gates == operators.count(GATE)
        gated = [row for row in rows if self.seeds[row, site][1] is GATE]
        if gated:
            gate_bank = self.gate_banks[site].row
            assert gate_bank[call.gate_members.tolist()].tolist() == gated
        else:
            assert call.gate_members is None
        assert torch.equal(call.alpha, self.alpha_RS[rows, site])
        return list(zip(lanes, rows, strict=True))


def lanes_of(world: World, steps: Pass, site: int, lane_rows: list[int]) -> list[int]:
    """Lanes of all calls at a site, each once."""
    lanes = [lane for call in steps.calls[site] for lane, _ in world.resolve(call, lane_rows)]
    assert len(lanes) == len(set(lanes))
    return sorted(lanes)


def flipped(world: World, places: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Row of each branch, and its seeds: the row's own with one slot the other way."""
    row = np.array([r for r, _ in places])
    enabled = world.base[row].copy()
    for number, (_, site) in enumerate(places):
        enabled[number, site] ^= True
    return row, enabled


def four_rows() -> World:
    return World(
        4,
        3,
        {
            (0, 0): (5, MULTIPLY),
            (1, 0): (5, GATE),
            (2, 0): (2, ADD),
            (3, 0): (5, ADD),
            (0, 1): (5, ADD),
            (1, 1): (5, ADD),
            (2, 1): (5, ADD),
            (3, 1): (5, ADD),
            (1, 2): (11, GATE),
            (2, 2): (11, GATE),
        },
    )


def test_the_main_pass_has_a_lane_for_each_row():
    world = four_rows()
    steps = world.planner.main(world.base)
    assert steps.lanes == 4
    assert steps.lane_rows == (None,) * 4
    assert steps.entering == (None,) * 3
    rows = [0, 1, 2, 3]
    assert [lanes_of(world, steps, site, rows) for site in range(3)] == [[0, 1, 2, 3], [0, 1, 2, 3], [1, 2]]
    assert [[call.key for call in calls] for calls in steps.calls] == [[(0, 2), (0, 5)], [(1, 5)], [(2, 11)]]
    assert all(call.learns and not call.silent for calls in steps.calls for call in calls)


def test_lanes_stand_by_operator():
    world = four_rows()
    _, call = world.planner.main(world.base).calls[0]
    assert [lane for lane, _ in world.resolve(call, [0, 1, 2, 3])] == [3, 1, 0]
    assert (call.adds, call.gates, call.count) == (1, 1, 3)


def test_all_lanes_and_a_whole_bank_need_no_indices():
    world = four_rows()
    calls = world.planner.main(world.base).calls
    (all_rows,) = calls[1]
    assert all_rows.lanes is None
    assert all_rows.members is None
    (some_rows,) = calls[2]
    assert some_rows.lanes.tolist() == [1, 2]
    # Every lane of the bank, in its order.
    assert some_rows.members is None
    first, second = calls[0]
    assert first.lanes.tolist() == [2]
    assert first.members is None
    # The whole bank, but in another order.
    assert second.members.tolist() == [2, 1, 0]


def test_all_rows_in_another_order_are_indexed():
    world = World(2, 1, {(0, 0): (5, MULTIPLY), (1, 0): (5, ADD)})
    (call,) = world.planner.main(world.base).calls[0]
    assert call.lanes.tolist() == [1, 0]
    assert call.members.tolist() == [1, 0]


def test_a_seed_that_is_not_enabled_is_in_no_call():
    world = four_rows()
    enabled = world.base.copy()
    enabled[:, 1] = False
    enabled[1, 2] = False
    steps = world.planner.main(enabled)
    assert [lanes_of(world, steps, site, [0, 1, 2, 3]) for site in range(3)] == [[0, 1, 2, 3], [], [2]]
    assert steps.calls[1] == ()
    assert steps.calls[2][0].members.tolist() == [1]


def test_silent_seeds_have_calls_of_their_own():
    world = four_rows()
    base, silent = world.base.copy(), np.zeros_like(world.base)
    base[1, 1] = base[2, 1] = False
    silent[1, 1] = silent[2, 1] = True
    steps = world.planner.main(base, silent)
    assert lanes_of(world, steps, 1, [0, 1, 2, 3]) == [0, 1, 2, 3]
    heard, unheard = steps.calls[1]
    assert (heard.silent, unheard.silent) == (False, True)
    assert heard.lanes.tolist() == [0, 3]
    assert unheard.lanes.tolist() == [1, 2]
    assert heard.learns
    assert unheard.learns


@pytest.mark.parametrize("train", [False, True])
def test_a_branch_leaves_at_the_first_site_that_differs(train: bool):
    world = four_rows()
    places = [(2, 2), (0, 0), (3, 1), (1, 0), (2, 0)]
    row, enabled = flipped(world, places)
    branches = world.planner.branches(world.base, row, enabled, train=train)
    expected = sorted(range(5), key=lambda number: places[number][1])
    assert branches.order.tolist() == expected
    assert branches.row.tolist() == branches.row_K.tolist() == [places[number][0] for number in expected]
    assert branches.site_K.tolist() == [0, 0, 0, 1, 2]
    steps = branches.steps
    assert steps.first_site == 0
    assert [rows.tolist() for rows in steps.entering] == [[0, 1, 2], [3], [2]]
    assert steps.lane_rows[0] is None
    assert [rows.tolist() for rows in steps.lane_rows[1:]] == [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 2]]
    assert steps.lanes == 5
    # Without the seed that it is about, and with every other of its row from there on.
    assert [lanes_of(world, steps, site, rows.tolist()) for site, rows in enumerate(steps.lane_rows[1:])] == [
        [],
        [0, 1, 2],
        [1, 2],
    ]
    # Taken away, a seed does not learn.
    assert not any(call.learns or call.silent for calls in steps.calls for call in calls)


def test_only_the_seed_that_a_shadow_adds_learns():
    world = four_rows()
    base = world.base.copy()
    base[0, 1] = base[2, 2] = base[1, 0] = False
    row = np.array([0, 2, 1])
    enabled = base[row].copy()
    enabled[0, 1] = enabled[1, 2] = enabled[2, 0] = True
    steps = world.planner.branches(base, row, enabled, train=True).steps
    learning = {
        (site, steps.lane_rows[site + 1][lane].item())
        for site, calls in enumerate(steps.calls)
        for call in calls
        if call.learns
        for lane, _ in world.resolve(call, steps.lane_rows[site + 1].tolist())
    }
    assert learning == {(1, 0), (2, 2), (0, 1)}
    frozen = world.planner.branches(base, row, enabled, train=False).steps
    assert not any(call.learns for calls in frozen.calls for call in calls)


def test_branches_that_leave_late_skip_the_sites_before():
    world = four_rows()
    row, enabled = flipped(world, [(1, 2), (2, 2)])
    steps = world.planner.branches(world.base, row, enabled, train=False).steps
    assert steps.first_site == 2
    assert steps.entering[:2] == (None, None)
    assert [rows.tolist() for rows in steps.lane_rows[1:]] == [[], [], [1, 2]]
    assert steps.calls == ((), (), ())


def test_no_branch_is_no_plan():
    world = four_rows()
    none = np.empty(0, dtype=np.int64)
    assert world.planner.branches(world.base, none, np.empty((0, 3), dtype=bool), train=True) is None


def test_a_row_can_have_many_branches():
    world = four_rows()
    every = [[a, b, c] for a in (False, True) for b in (False, True) for c in (False, True)]
    enabled = np.array([e for e in every if e != world.base[1].tolist()])
    row = np.full(len(enabled), 1)
    branches = world.planner.branches(world.base, row, enabled, train=False)
    ordered = enabled[branches.order]
    for site in range(3):
        lane_rows = branches.steps.lane_rows[site + 1].tolist()
        here = [lane for lane in range(len(lane_rows)) if ordered[lane, site]]
        assert lanes_of(world, branches.steps, site, lane_rows) == here


def _calls(steps: Pass) -> list[list[tuple[tuple[int, int], bool, bool]]]:
    return [[(call.key, call.learns, call.silent) for call in calls] for calls in steps.calls]


def test_the_number_of_calls_does_not_depend_on_rows():
    def passes(copies: int) -> tuple[Pass, Pass, Pass]:
        small = four_rows()
        seeds = {(row + 4 * copy, site): s for (row, site), s in small.seeds.items() for copy in range(copies)}
        world = World(4 * copies, 3, seeds)
        places = list(seeds)
        row, enabled = flipped(world, places)
        branches = world.planner.branches(world.base, row, enabled, train=False)
        silent = np.zeros_like(world.base)
        silent[::4, 1] = True
        return world.planner.main(world.base), world.planner.main(world.base & ~silent, silent), branches.steps

    for few, many in zip(passes(1), passes(16), strict=True):
        assert _calls(few) == _calls(many)
        assert sum(c.count for calls in many.calls for c in calls) == 16 * sum(c.count for cs in few.calls for c in cs)


worlds = st.integers(1, 6).flatmap(
    lambda rows: st.dictionaries(
        st.tuples(st.integers(0, rows - 1), st.integers(0, 2)),
        st.tuples(st.sampled_from([2, 5, 11]), st.sampled_from([ADD, MULTIPLY, GATE])),
    ).map(lambda seeds: World(rows, 3, seeds))
)


@settings(max_examples=80, derandomize=True)
@given(world=worlds, off=st.sets(st.tuples(st.integers(0, 5), st.integers(0, 2))), data=st.data())
def test_any_plan(world: World, off: set[tuple[int, int]], data: st.DataObject):
    enabled = world.base.copy()
    for row, site in off:
        if row < world.rows:
            enabled[row, site] = False
    steps = world.planner.main(enabled)
    for site in range(3):
        assert lanes_of(world, steps, site, list(range(world.rows))) == np.flatnonzero(enabled[:, site]).tolist()
    choices = [
        (row, wanted)
        for row in range(world.rows)
        for wanted in ([False] * 3, world.base[row].tolist(), [bool(world.base[row, 0]), False, False])
        if wanted != enabled[row].tolist()
    ]
    picked = data.draw(st.lists(st.sampled_from(choices), max_size=8)) if choices else []
    _check_branches(world, enabled, picked)


def _check_branches(world: World, base: np.ndarray, picked: list[tuple[int, list[bool]]]) -> None:
    row = np.array([r for r, _ in picked], dtype=np.int64)
    wanted = np.array([w for _, w in picked], dtype=bool).reshape(-1, 3)
    branches: Branches | None = world.planner.branches(base, row, wanted, train=True)
    if branches is None:
        assert not picked
        return
    ordered, rows = wanted[branches.order], row[branches.order]
    steps = branches.steps
    leaves = (ordered != base[rows]).argmax(1)
    assert branches.site_K.tolist() == leaves.tolist() == sorted(leaves)
    for site in range(3):
        lane_rows = steps.lane_rows[site + 1].tolist()
        present = np.flatnonzero(leaves <= site)
        assert lane_rows == rows[present].tolist()
        entering = rows[leaves == site].tolist()
        assert (steps.entering[site] is None) == (not entering)
        if entering:
            assert steps.entering[site].tolist() == entering
        assert lanes_of(world, steps, site, lane_rows) == np.flatnonzero(ordered[present, site]).tolist()
        for call in steps.calls[site]:
            for lane, r in world.resolve(call, lane_rows):
                assert call.learns == (ordered[lane, site] and not base[r, site])
