"""A population: many hosts of one shape that grow and train together.

Shapes: R rows, S slots, B examples of a minibatch, L lanes of a pass, K branches, P parameters of one lane.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from esper.kasmina.banks import Bank
from esper.kasmina.blending import SiteModules, blend
from esper.kasmina.blueprints.registry import gate_layer, seed_layer
from esper.kasmina.gates import Gates
from esper.kasmina.hosts import Host
from esper.kasmina.lifecycle import Lifecycle
from esper.kasmina.plan import BankKey, Branches, Call, Pass, Planner
from esper.kasmina.rows.core import Statistics, to_lanes
from esper.leyline.actions import Blueprint, Operator, SiteKind
from esper.leyline.checks import GateReport, Outcome
from esper.leyline.config import GrowthConfig
from esper.leyline.sites import fit_table
from esper.leyline.slots import SlotTensors, Structure
from esper.leyline.stages import INCUBATED_STAGE, OCCUPIED_STAGES, Stage, stage_table
from esper.leyline.streams import Stream
from esper.leyline.transfer import Cargo, Parcel, deliver

Tables = dict[Bank, Tensor]
"""Parameters [N, P] of every bank, as the passes compute with them."""


class Population:
    """Hosts, their seeds and the state of their slots.

    Parameters
    ----------
    host
        The shape that all rows share.
    config
        Rules of growth.
    seed
        Run seed of the random streams.
    init_id_R
        Int64, the initialisation of each row: rows with the same id start equal, and so do their k-th seeds.
    allowed
        Blueprints that may be germinated.
    device, dtype
        Of every parameter.

    Attributes
    ----------
    hosts
        Bank of the hosts; lane r is row r.
    seeds, seed_gates
        Banks of the seeds by (site, blueprint), and of the learned gates by site.
    slots
        State of the slots; changed by `decide` alone, measurements aside.
    lane_axis
        0 where activations are vectors [R, B, D], 1 where they are [B, R*C, ...].
    base
        Host copy, bool [R, S]: the seeds in the forward pass.
    main_pass, training_pass, shadows, probes
        The passes until the next decision: the plain forward, the one that trains, the shadows of the seeds in the
        incubator, and one branch for each seed whose worth is measured.
    """

    def __init__(
        self,
        host: Host,
        config: GrowthConfig,
        seed: int,
        init_id_R: Tensor,
        *,
        allowed: frozenset[Blueprint] = frozenset(Blueprint),
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.host, self.config, self.dtype = host, config, dtype
        self.device = torch.device(device)
        self.rows = len(init_id_R)
        self.init_id_R = init_id_R.to(self.device)
        self._seed_stream = Stream(seed, "seed initialisation")
        self._gate_stream = Stream(seed, "gate initialisation")
        self.hosts = Bank(host.body, self.device, dtype)
        row = np.arange(self.rows)
        self.hosts.hold(row, np.zeros_like(row), Stream(seed, "host initialisation"), self.init_id_R)
        self.seeds: dict[BankKey, Bank] = {}
        self.seed_gates: dict[int, Bank] = {}
        self.fits_SB = fit_table(host.slot_config, allowed).to(self.device)
        self.slots = SlotTensors.empty(self.rows, host.slot_config.slots, self.device)
        self.lifecycle = Lifecycle(host.slot_config, self.fits_SB, config.embargo, self.device)
        self.gates = Gates(config.gates, self.device)
        self._segment_sizes = [segment.parameter_count for segment in host.segments]
        self._segment_buffers = np.cumsum([0] + [len(segment.buffers) for segment in host.segments])
        self.lane_axis = 0 if host.kind is SiteKind.VECTOR else 1
        self.settle()

    @property
    def banks(self) -> Iterator[Bank]:
        """Every bank: the hosts first, then seeds and gates, each live parameter in exactly one."""
        yield self.hosts
        yield from self.seeds.values()
        yield from self.seed_gates.values()

    @torch.no_grad()
    def decide(self, actions: Tensor, gates: GateReport, *cargo: Parcel) -> tuple[Outcome, tuple[Cargo, ...]]:
        """Perform one action per row, let the decision pass, and make the banks fit the slots.

        Returns
        -------
        tuple
            What came of it, and the cargo, which travelled with the one transfer of the decision (see `settle`).
        """
        outcome = self.lifecycle.apply(self.slots, actions, gates)
        self.lifecycle.tick(self.slots)
        return outcome, self.settle(*cargo)

    def gate_report(self, host_loss_R: Tensor) -> GateReport:
        """What each gate says now; see `Gates.report`."""
        return self.gates.report(self.slots, host_loss_R)

    @torch.no_grad()
    def plant(
        self, blueprint_RS: Tensor, *, operator_RS: Tensor | None = None, seed_id_RS: Tensor | None = None
    ) -> None:
        """Fill empty slots with committed seeds, without a trial: what a static network is made of.

        Parameters
        ----------
        blueprint_RS
            Int64, values of `Blueprint`; NOOP leaves a slot empty.
        operator_RS
            Int64, values of `Operator`; by default each seed is added.
        seed_id_RS
            Int64, the k of "the k-th seed of this row", which decides its initial parameters; by default seeds are
            numbered in the order of their slots. Those of seeds that were grown give seeds that begin as they did.
        """
        slots, device = self.slots, self.device
        blueprint_RS = blueprint_RS.to(device)
        planted = blueprint_RS != int(Blueprint.NOOP)
        if operator_RS is None:
            operator_RS = torch.full_like(blueprint_RS, int(Operator.ADD))
        if seed_id_RS is None:
            seed_id_RS = planted.long().cumsum(1) - 1 + slots.seeds_made[:, None]
        operator_RS, seed_id_RS = operator_RS.to(device), seed_id_RS.to(device)
        sites = torch.arange(slots.slots, device=device)
        counts = self.lifecycle.parameter_counts[sites, blueprint_RS, operator_RS]
        slots.stage[planted] = int(Stage.FOSSILIZED)
        for name, values_RS in (
            ("blueprint", blueprint_RS),
            ("operator", operator_RS),
            ("parameters", counts),
            ("seed_id", seed_id_RS),
        ):
            getattr(slots, name)[planted] = values_RS[planted]
        slots.alpha[planted] = slots.alpha_target[planted] = 1.0
        made_R = (seed_id_RS.masked_fill(~planted, -1).amax(1) + 1).maximum(slots.seeds_made)
        slots.seeds_made.copy_(made_R)
        self.settle()

    def settle(self, *cargo: Parcel) -> tuple[Cargo, ...]:
        """Bring banks and passes in line with the slots: the one device-to-host transfer of a decision.

        Parameters
        ----------
        *cargo
            What else is wanted on the host; it travels along.
        """
        structure, *carried = deliver(self.slots.structure_parcel(), *cargo)
        self.structure = Structure(**structure)
        occupied = stage_table(OCCUPIED_STAGES).numpy()[self.structure.stage]
        for site_number, site in enumerate(self.host.slot_config.sites):
            blueprint = np.where(occupied[:, site_number], self.structure.blueprint[:, site_number], -1)
            held = {b for s, b in self.seeds if s == site_number}
            for kind in sorted({int(b) for b in np.unique(blueprint)} - {-1} | held):
                key = (site_number, kind)
                bank = self.seeds.get(key) or Bank(seed_layer(Blueprint(kind), site), self.device, self.dtype)
                self.seeds[key] = bank
                self._hold(bank, blueprint == kind, site_number, self._seed_stream)
                if not len(bank):
                    del self.seeds[key]
            gated = occupied[:, site_number] & (self.structure.operator[:, site_number] == Operator.GATE)
            if gated.any() or site_number in self.seed_gates:
                gate = self.seed_gates.setdefault(site_number, Bank(gate_layer(site), self.device, self.dtype))
                self._hold(gate, gated, site_number, self._gate_stream)
                if not len(gate):
                    del self.seed_gates[site_number]
        self._make_passes()
        return tuple(carried)

    def _hold(self, bank: Bank, rows: np.ndarray, site: int, stream: Stream) -> None:
        row = np.flatnonzero(rows)
        # One stream for all sites: a row's seeds are numbered across its sites.
        bank.hold(row, self.structure.seed_id[row, site], stream, self.init_id_R)

    def _make_passes(self) -> None:
        structure = self.structure
        incubated = structure.stage == int(INCUBATED_STAGE)
        alpha_RS = torch.where(self.slots.stage == int(INCUBATED_STAGE), self.slots.alpha_target, self.slots.alpha)
        planner = Planner(structure, alpha_RS, self.seeds, self.seed_gates)
        self.base = structure.blended()
        straight = self.config.incubator == "straight-through"
        self.main_pass = planner.main(self.base)
        self.training_pass = planner.main(self.base, incubated) if straight else self.main_pass
        row, site = np.nonzero(incubated)
        self.shadows = None if straight else planner.branches(self.base, row, self._flipped(row, site), train=True)
        row, site = np.nonzero(incubated | self.base)
        self.probes = planner.branches(self.base, row, self._flipped(row, site), train=False)
        self.planner = planner
        learns = incubated | self.base & ~structure.fading
        placed = [(place, bank) for (place, _), bank in self.seeds.items()]
        self._learning: list[tuple[Bank, Tensor | None]] = []
        for place, bank in [*placed, *self.seed_gates.items()]:
            mask = learns[bank.row, place]
            if mask.any():
                self._learning.append((bank, None if mask.all() else torch.from_numpy(mask).to(self.device)))

    def _flipped(self, row: np.ndarray, site: np.ndarray) -> np.ndarray:
        """The row's own set of seeds with one slot the other way: in if it was out, out if it was in."""
        enabled: np.ndarray = self.base[row].copy()
        enabled[np.arange(len(row)), site] ^= True
        return enabled

    def finite(self) -> Tensor:
        """Bool [R]: every parameter and running statistic in the forward pass of the row is a finite number."""
        finite_R = self.hosts.finite()
        visible = torch.from_numpy(self.base).to(self.device)
        placed = [(site, bank) for (site, _), bank in self.seeds.items()]
        for site, bank in [*placed, *self.seed_gates.items()]:
            broken_N = ~bank.finite() & visible[bank.row_N, site]
            finite_R = finite_R.index_put((bank.row_N,), finite_R[bank.row_N] & ~broken_N)
        return finite_R

    def learning(self) -> Iterator[tuple[Bank, Tensor | None]]:
        """Banks with a lane that learns now, and its lanes (None: all). A seed that is being faded out is frozen."""
        yield self.hosts, None
        yield from self._learning

    def tables(self, dtype: torch.dtype) -> Tables:
        """Parameters of every bank in another dtype, each table cast once for all passes of an update."""
        return {bank: bank.theta.to(dtype) for bank in self.banks}

    def forward(
        self, x: Tensor, steps: Pass, *, statistics: Statistics, keep: bool = False, tables: Tables | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute the logits of all rows.

        Parameters
        ----------
        x
            Examples in the layout of the kind, [R, B, D] or [B, R*C, ...], and in the dtype of the tables.
        steps
            `main_pass` or `training_pass`.
        statistics
            Which ones batch norms use.
        keep
            Also give the stream in front of each site, for branches.
        tables
            Parameters to compute with (see `tables`); by default the parameters themselves.

        Returns
        -------
        tuple
            Logits [R, B, classes], and the kept streams.
        """
        tables = tables or self.tables(self.dtype)
        weights = tables[self.hosts].split(self._segment_sizes, dim=1)
        modules = self._modules(tables, live=True)
        streams: list[Tensor] = []
        for number, segment in enumerate(self.host.segments):
            buffers = self.hosts.buffers[self._segment_buffers[number] : self._segment_buffers[number + 1]]
            x = segment.forward(x, segment.split(weights[number]), buffers, statistics=statistics)
            if number < len(steps.calls):
                if keep:
                    streams.append(x)
                x = blend(x, steps.calls[number], steps.lanes, self.lane_axis, modules)
        return x, streams

    def branch(self, streams: list[Tensor], branches: Branches, *, tables: Tables | None = None) -> Tensor:
        """Compute branches of the last `forward`: logits [K, B, classes]. Only seeds that learn get gradients.

        `tables` as in that `forward`.

        The parameters of the host are frozen. Its batch norms use the statistics of the branch's own batch: running
        ones were fitted to another network, the one without the seed that is put in or with the one that is left out
        (docs/decisions/0003). They are to be compared with a `forward` that did the same.
        """
        steps = branches.steps
        tables = tables or self.tables(self.dtype)
        weights = tables[self.hosts].detach().split(self._segment_sizes, dim=1)
        modules = self._modules(tables, live=False)
        x: Tensor | None = None
        for number in range(steps.first_site, len(self.host.segments)):
            rows = steps.lane_rows[number]
            if x is not None and rows is not None:
                segment = self.host.segments[number]
                # Not selected by row: own statistics look at none of them.
                buffers = self.hosts.buffers[self._segment_buffers[number] : self._segment_buffers[number + 1]]
                selected = segment.split(weights[number].index_select(0, rows))
                x = segment.forward(x, selected, buffers, statistics=Statistics.OWN)
            if number < len(steps.calls):
                entering = steps.entering[number]
                if entering is not None:
                    joined = self._select(streams[number].detach(), entering)
                    x = joined if x is None else torch.cat((x, joined), self.lane_axis)
                assert x is not None
                lanes = len(steps.lane_rows[number + 1])  # type: ignore[arg-type]
                x = blend(x, steps.calls[number], lanes, self.lane_axis, modules)
        assert x is not None
        return x

    def _select(self, stream: Tensor, rows: Tensor) -> Tensor:
        if self.lane_axis == 0:
            return stream.index_select(0, rows)
        return to_lanes(stream, stream.shape[1] // self.rows).index_select(1, rows).flatten(1, 2)

    def _modules(self, tables: Tables, *, live: bool) -> SiteModules:
        """The seeds as functions; without `live`, only calls that learn see the parameters themselves."""

        def run(bank: Bank, members: Tensor | None, x: Tensor, learns: bool) -> Tensor:
            table = tables[bank] if learns else tables[bank].detach()
            if members is not None:
                table = table.index_select(0, members)
            return bank.layer.forward(x, bank.layer.split(table), (), statistics=Statistics.RUNNING)

        def delta(call: Call, x: Tensor) -> Tensor:
            return run(self.seeds[call.key], call.members, x, live or call.learns)

        def gate(call: Call, pooled: Tensor) -> Tensor:
            return run(self.seed_gates[call.key[0]], call.gate_members, pooled, live or call.learns)

        return SiteModules(delta, gate)
