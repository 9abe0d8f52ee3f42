"""A population as plain values and named tensors, and back: what grew where, and every number that its future needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Annotated

import numpy as np
from pydantic import Field
from torch import Tensor

from esper.kasmina.banks import Bank
from esper.kasmina.blueprints.registry import gate_layer, seed_layer
from esper.kasmina.population import Population
from esper.leyline.actions import Blueprint
from esper.leyline.config import Frozen
from esper.leyline.slots import SlotTensors
from esper.leyline.state import Tensors, below, put_back, taken, under

_SLOTS, _HOSTS = "slots", "hosts"
Count = Annotated[int, Field(ge=0)]


class Lanes(Frozen):
    """A bank of seeds, or of their learned gates."""

    site: Count
    blueprint: str | None
    """Name of the seeds' blueprint; None: learned gates."""
    rows: tuple[Count, ...]
    """Ascending."""
    seed_ids: tuple[Count, ...]
    """Of each row: the k of "its k-th seed"."""

    @property
    def name(self) -> str:
        """What the tensors of the bank begin with."""
        return f"gates.{self.site}" if self.blueprint is None else f"seeds.{self.site}.{self.blueprint}"


class Topology(Frozen):
    """What a population consists of."""

    rows: Count
    banks: tuple[Lanes, ...]
    """Beside the hosts, in the order in which they came."""


def topology_of(population: Population) -> Topology:
    """Say what grew where."""
    return Topology(rows=population.rows, banks=tuple(lanes for lanes, _ in _banks(population)))


def state_of(population: Population) -> Tensors:
    """Give slots, parameters, buffers and optimizer state by name."""
    slots = under(_SLOTS, taken(population.slots, _slot_arrays()))
    tensors = slots | under(_HOSTS, population.hosts.state())
    for lanes, bank in _banks(population):
        tensors |= under(lanes.name, bank.state())
    return tensors


def rebuild(population: Population, topology: Topology, saved: Mapping[str, Tensor]) -> None:
    """Make a population of the same hosts and rules what another one was.

    Raises
    ------
    ValueError
        The state is not of such a population.
    """
    if topology.rows != population.rows:
        raise ValueError(f"it has {topology.rows} rows instead of {population.rows}")
    put_back(population.slots, _slot_arrays(), below(_SLOTS, saved))
    hosts, sites = population.hosts, population.host.slot_config.sites
    hosts.restore(hosts.row, hosts.seed_id, below(_HOSTS, saved))
    population.seeds.clear()
    population.seed_gates.clear()
    for lanes in topology.banks:
        if lanes.site >= len(sites):
            raise ValueError(f"it has a site {lanes.site}, the host has {len(sites)}")
        site = sites[lanes.site]
        layer = gate_layer(site) if lanes.blueprint is None else seed_layer(Blueprint[lanes.blueprint], site)
        bank = Bank(layer, population.device, population.dtype)
        bank.restore(np.array(lanes.rows), np.array(lanes.seed_ids), below(lanes.name, saved))
        if lanes.blueprint is None:
            population.seed_gates[lanes.site] = bank
        else:
            population.seeds[lanes.site, int(Blueprint[lanes.blueprint])] = bank
    population.settle()


def _banks(population: Population) -> Iterator[tuple[Lanes, Bank]]:
    """Every bank but that of the hosts."""
    for (site, kind), bank in population.seeds.items():
        yield _lanes(site, Blueprint(kind).name, bank), bank
    for site, bank in population.seed_gates.items():
        yield _lanes(site, None, bank), bank


def _lanes(site: int, blueprint: str | None, bank: Bank) -> Lanes:
    return Lanes(site=site, blueprint=blueprint, rows=tuple(bank.row.tolist()), seed_ids=tuple(bank.seed_id.tolist()))


def _slot_arrays() -> list[str]:
    return [field.name for field in fields(SlotTensors)]
