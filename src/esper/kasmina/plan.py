"""Plans: which kernels a pass launches, worked out once for each decision on the host.

A *lane* is one row taking part in a pass with a certain set of its seeds. The main pass has one lane for each row. A
*branch* leaves the main pass in front of the first site at which its set of seeds differs, reusing the activations
before it: the shadow of a seed in the incubator (the row's seeds and that one), and each coalition that a
contribution needs (the row's seeds less one). Branches that left join the later ones, so that a segment runs once.

Shapes: R rows, S sites, K lanes of a pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from esper.kasmina.banks import Bank
from esper.leyline.actions import Operator
from esper.leyline.slots import Structure

BankKey = tuple[int, int]
"""(site, blueprint) of a bank of seeds."""

_OPERATOR_RANK = np.zeros(len(Operator), dtype=np.int64)
_OPERATOR_RANK[[Operator.ADD, Operator.GATE, Operator.MULTIPLY]] = [0, 1, 2]


@dataclass(frozen=True)
class Call:
    """One blueprint at one site, for some lanes: those with ADD, then GATE, then MULTIPLY.

    Attributes
    ----------
    lanes
        Positions in the pass, None for all lanes in order.
    members
        Positions in the bank, None for the whole bank in order.
    gate_members
        Positions of the GATE lanes in the site's bank of gates.
    alpha
        Share of each lane's seed.
    adds, gates
        Number of lanes with ADD and with GATE; the others MULTIPLY.
    learns
        The pass trains these seeds.
    silent
        Straight-through: the lane's values do not see the seed.
    """

    key: BankKey
    lanes: Tensor | None
    members: Tensor | None
    gate_members: Tensor | None
    alpha: Tensor
    adds: int
    gates: int
    count: int
    learns: bool
    silent: bool


@dataclass(frozen=True)
class Pass:
    """One pass over the sites.

    Attributes
    ----------
    lane_rows
        For each segment the row of each lane; None where the lanes are all rows in order.
    entering
        For each site the rows whose activations join there from the main pass; None for the main pass itself.
    calls
        For each site its calls.
    lanes
        Lanes at the end.
    """

    lane_rows: tuple[Tensor | None, ...]
    entering: tuple[Tensor | None, ...]
    calls: tuple[tuple[Call, ...], ...]
    lanes: int

    @property
    def first_site(self) -> int:
        """First site that a branch enters."""
        return next(s for s, rows in enumerate(self.entering) if rows is not None)


@dataclass(frozen=True)
class Branches:
    """Branches of a population, ordered by the site at which they leave.

    Attributes
    ----------
    row
        Row of each branch [K].
    row_K, site_K
        The row, and the site at which it leaves, on the device.
    order
        Where each branch stood in the request [K].
    steps
        The pass that computes them.
    """

    row: np.ndarray
    row_K: Tensor
    site_K: Tensor
    order: np.ndarray
    steps: Pass


class Planner:
    """Makes the passes of one population between two decisions.

    Parameters
    ----------
    structure
        Host copy of the slots.
    alpha_RS
        Share of each seed: its alpha, or its target while it is in the incubator.
    banks, gate_banks
        Where the seeds and their gates live.
    """

    def __init__(
        self,
        structure: Structure,
        alpha_RS: Tensor,
        banks: Mapping[BankKey, Bank],
        gate_banks: Mapping[int, Bank],
    ) -> None:
        self.structure, self.alpha_RS = structure, alpha_RS
        self.device = alpha_RS.device
        rows, sites = structure.stage.shape
        self.rows, self.sites = rows, sites
        self.sizes = {key: len(bank) for key, bank in banks.items()}
        self.position = np.full((rows, sites), -1, dtype=np.int64)
        for (site, _), bank in banks.items():
            self.position[bank.row, site] = np.arange(len(bank))
        self.gate_position = np.full((rows, sites), -1, dtype=np.int64)
        for site, bank in gate_banks.items():
            self.gate_position[bank.row, site] = np.arange(len(bank))

    def main(self, enabled: np.ndarray, silent: np.ndarray | None = None) -> Pass:
        """All rows with the enabled seeds (bool [R, S]); `silent` ones learn straight through."""
        rows = np.arange(self.rows)
        on = enabled if silent is None else enabled | silent
        hidden = np.zeros_like(enabled) if silent is None else silent
        calls = tuple(
            self._calls(s, rows, on[:, s], learns=np.ones(self.rows, dtype=bool), silent=hidden[:, s])
            for s in range(self.sites)
        )
        return Pass((None,) * (self.sites + 1), (None,) * self.sites, calls, self.rows)

    def branches(self, base: np.ndarray, row: np.ndarray, enabled: np.ndarray, *, train: bool) -> Branches | None:
        """Plan branches; None where there is none.

        Parameters
        ----------
        base
            Seeds of the main pass, bool [R, S].
        row
            Row of each branch [K].
        enabled
            Its seeds, bool [K, S]; each differs from its row's base.
        train
            A seed that is enabled and not in the base learns; everything else is frozen.
        """
        if not len(row):
            return None
        differs = enabled != base[row]
        site = differs.argmax(1)
        order = np.argsort(site, kind="stable")
        row, site, enabled, differs = row[order], site[order], enabled[order], differs[order]
        lane_rows: list[Tensor | None] = [None] * (self.sites + 1)
        entering: list[Tensor | None] = [None] * self.sites
        calls: list[tuple[Call, ...]] = []
        for s in range(self.sites):
            here = site == s
            present = int((site <= s).sum())
            if here.any():
                entering[s] = self._tensor(row[here])
            lane_rows[s + 1] = self._tensor(row[:present])
            on, own = enabled[:present, s], differs[:present, s] & enabled[:present, s]
            calls.append(self._calls(s, row[:present], on, learns=own & train, silent=np.zeros(present, dtype=bool)))
        steps = Pass(tuple(lane_rows), tuple(entering), tuple(calls), len(row))
        return Branches(row, self._tensor(row), self._tensor(site), order, steps)

    def _calls(
        self, site: int, lane_row: np.ndarray, on: np.ndarray, *, learns: np.ndarray, silent: np.ndarray
    ) -> tuple[Call, ...]:
        """Group the lanes that have a seed at a site by blueprint and by what the pass does to them."""
        lanes = np.flatnonzero(on)
        if not len(lanes):
            return ()
        rows = lane_row[lanes]
        blueprint = self.structure.blueprint[rows, site]
        rank = _OPERATOR_RANK[self.structure.operator[rows, site]]
        group = blueprint * 4 + learns[lanes] * 2 + silent[lanes]
        order = np.lexsort((lanes, rank, group))
        lanes, rows, rank, group = lanes[order], rows[order], rank[order], group[order]
        starts = np.flatnonzero(np.diff(group, prepend=-1))
        calls = []
        for start, end in zip(starts, [*starts[1:], len(group)], strict=True):
            part = slice(start, end)
            calls.append(self._call(site, int(group[start]), lanes[part], rows[part], rank[part], len(lane_row)))
        return tuple(calls)

    def _call(self, site: int, group: int, lanes: np.ndarray, rows: np.ndarray, rank: np.ndarray, width: int) -> Call:
        key = (site, group // 4)
        members = self.position[rows, site]
        gated = rows[rank == 1]
        return Call(
            key=key,
            lanes=self._indices(lanes, width),
            members=self._indices(members, self.sizes[key]),
            gate_members=self._tensor(self.gate_position[gated, site]) if len(gated) else None,
            alpha=self.alpha_RS[self._tensor(rows), site],
            adds=int((rank == 0).sum()),
            gates=len(gated),
            count=len(lanes),
            learns=bool(group & 2),
            silent=bool(group & 1),
        )

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)

    def _indices(self, values: np.ndarray, size: int) -> Tensor | None:
        """Give indices into `size` places, None where they are all places in order."""
        if len(values) == size and np.array_equal(values, np.arange(size)):
            return None
        return self._tensor(values)
