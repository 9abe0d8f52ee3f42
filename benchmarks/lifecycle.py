"""The lifecycle of one decision: gates, apply and tick over the slot tensors.

    python benchmarks/lifecycle.py

Random legal and illegal actions on slots in all stages; the state is kept between repeats, so stages stay mixed.
"""

import argparse

import torch
from common import alternate, report

from esper.kasmina.gates import Gates
from esper.kasmina.lifecycle import Lifecycle
from esper.leyline.actions import Blueprint, Head, SiteKind, head_sizes
from esper.leyline.config import GateConfig
from esper.leyline.sites import Site, SlotConfig, fit_table
from esper.leyline.slots import SlotTensors
from esper.tolaria.machine import tune_process

LIMITS_MS = {256: 2.0, 4096: 8.0}
SLOTS = 3


class Decision:
    """One decision of a population whose measurements always pass."""

    def __init__(self, rows: int) -> None:
        config = SlotConfig.of_chain(tuple(Site(SiteKind.IMAGE, 8, (8, 8), d + 1) for d in range(SLOTS)))
        self.lifecycle = Lifecycle(config, fit_table(config, frozenset(Blueprint)), embargo=5)
        self.gates = Gates(GateConfig(), "cpu")
        self.slots = SlotTensors.empty(rows, SLOTS)
        self.host_loss_R = torch.ones(rows)
        generator = torch.Generator().manual_seed(0)
        sizes = head_sizes(SLOTS)
        self.actions = [
            torch.stack([torch.randint(0, sizes[h], (rows,), generator=generator) for h in Head], 1) for _ in range(64)
        ]
        self.turn = 0
        for _ in range(100):
            self()

    def __call__(self) -> None:
        for name in ("gradient_norm", "gradient_ratio", "incubator_gain", "contribution"):
            getattr(self.slots, name).fill_(1.0)
        self.turn += 1
        report = self.gates.report(self.slots, self.host_loss_R)
        self.lifecycle.apply(self.slots, self.actions[self.turn % 64], report)
        self.lifecycle.tick(self.slots)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=101)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    tune_process(args.threads)
    decisions = {f"{rows}": Decision(rows) for rows in LIMITS_MS}
    taken = alternate(dict(decisions), args.repeats)
    rows = [
        {
            "rows": count,
            "slots": SLOTS,
            "stages present": len(decisions[f"{count}"].slots.stage.unique()),
            "decision (ms)": round(1e3 * taken[f"{count}"], 2),
            "at most (ms)": limit,
            "reached": 1e3 * taken[f"{count}"] <= limit,
        }
        for count, limit in LIMITS_MS.items()
    ]
    report("lifecycle", rows, settings=vars(args))


if __name__ == "__main__":
    main()
