"""One row as a plain `torch.nn` module with no trace of Esper."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esper.kasmina.banks import Bank
from esper.kasmina.hosts import AXES
from esper.kasmina.plain import build
from esper.kasmina.population import Population
from esper.kasmina.rows.core import Plain, RowLayer
from esper.leyline.actions import Blueprint, Operator


def layer_state(layer: RowLayer, theta_P: Tensor, buffers: list[Tensor], prefix: str = "") -> dict[str, Tensor]:
    """State dict of one row of a layer: its parameters [P] and buffers under the names of the torch modules."""
    tensors = [t[0] for t in layer.split(theta_P.detach()[None])] + buffers
    names = [p.name for p in (*layer.params, *layer.buffers)]
    return {prefix + name: tensor.detach().clone().contiguous() for name, tensor in zip(names, tensors, strict=True)}


def describe(population: Population, row: int) -> tuple[Plain, dict[str, Tensor]]:
    """Describe one row: the modules (see `plain.build`) and their state dict.

    Seeds that are not in the forward pass (germinated, in the incubator, at alpha 0) are not part of the network.
    """
    segments = population.host.segments
    names = [f"segment{i}" for i in range(len(segments))]
    hosts = population.hosts
    children: dict[str, Plain] = {}
    state: dict[str, Tensor] = {}
    host_state = layer_state(hosts.layer, hosts.theta[row], [b[row] for b in hosts.buffers])
    for number, (name, segment) in enumerate(zip(names, segments, strict=True)):
        children[name] = segment.plain()
        prefix = f"{number}."
        state |= {f"{name}.{k[len(prefix) :]}": v for k, v in host_state.items() if k.startswith(prefix)}
        if number < population.host.slot_config.slots and population.base[row, number]:
            slot = population.host.slot_config.slot_ids[number]
            children[slot], grown = _seed(population, row, number)
            state |= {f"{slot}.{k}": v for k, v in grown.items()}
    return {"type": "Sequential", "children": children}, state


def _seed(population: Population, row: int, site: int) -> tuple[Plain, dict[str, Tensor]]:
    structure = population.structure
    operator = Operator(structure.operator[row, site])
    bank = population.seeds[site, int(Blueprint(structure.blueprint[row, site]))]
    children = {"seed": bank.layer.plain()}
    state = _lane(bank, row, "seed.")
    if operator is Operator.GATE:
        gate = population.seed_gates[site]
        children["gate"] = gate.layer.plain()
        state |= _lane(gate, row, "gate.")
    args = {
        "operator": operator.name.lower(),
        "alpha": float(population.slots.alpha[row, site]),
        "axes": AXES[population.host.kind],
    }
    return {"type": "Grown", "children": children, "args": args}, state


def _lane(bank: Bank, row: int, prefix: str) -> dict[str, Tensor]:
    lane = int(bank.row.searchsorted(row))
    return layer_state(bank.layer, bank.theta[lane], [b[lane] for b in bank.buffers], prefix)


def plain_module(description: Plain, state: dict[str, Tensor]) -> nn.Module:
    """Build the module of a description and load its state."""
    # Initial weights are drawn and thrown away; nobody's random numbers may notice.
    with torch.random.fork_rng(devices=[]):
        module = build(description)
    dtype = next(iter(state.values())).dtype
    module.to(dtype).load_state_dict(state)
    return module


def export_row(population: Population, row: int) -> nn.Module:
    """Give one row as a plain module on the CPU, in evaluation mode.

    The module takes examples [B, ...] of the task and gives logits [B, classes].
    """
    description, state = describe(population, row)
    return plain_module(description, {k: v.cpu() for k, v in state.items()}).eval()
