"""Random views of every kind, and observations of them in plain Python, a column by its name.

Shapes: R rows, S slots.
"""

import math
import random
from collections.abc import Callable
from dataclasses import replace

import torch

from esper.leyline.actions import Blueprint, Head, Op, Operator, SiteKind
from esper.leyline.checks import ALL_GATE_CHECKS, Check, GateReport, Outcome
from esper.leyline.sites import Site, SlotConfig
from esper.leyline.slots import AlphaMode, SlotTensors
from esper.leyline.stages import OCCUPIED_STAGES, Stage
from esper.leyline.view import PopulationView
from esper.tamiyo.policy.features import HISTORY

NAN, INF = float("nan"), float("inf")
WORTHS = ("contribution", "contribution_se", "incubator_gain", "incubator_gain_se")
FLAG_OF = {
    "contribution": "contribution measured",
    "incubator_gain": "incubator gain measured",
    "gradient_norm": "gradient measured",
}
ASKED = {
    Stage.GERMINATED: {Check.HOST_LOSS},
    Stage.TRAINING: {
        Check.TRAINING_DECISIONS,
        Check.INCUBATOR_GAIN,
        Check.GRADIENT_FINITE,
        Check.GRADIENT_VANISHING,
        Check.GRADIENT_EXPLODING,
    },
    Stage.BLENDING: {Check.ALPHA_AT_TARGET},
    Stage.PROBATIONARY: {Check.PROBATION_DECISIONS, Check.CONTRIBUTION},
}
"""What the gate in front of the next stage asks."""
STRUCTURE = {Check.RANGE, Check.STAGE, Check.BLUEPRINT, Check.SPEED}


def random_config(dice: random.Random, slots: int) -> SlotConfig:
    """Sites of any kind, in any order of depth."""
    axes = {SiteKind.VECTOR: 0, SiteKind.SIGNAL: 1, SiteKind.IMAGE: 2, SiteKind.TOKENS: 1}
    sites = []
    for _ in range(slots):
        kind = dice.choice(list(SiteKind))
        extent = tuple(dice.randint(1, 64) for _ in range(axes[kind]))
        sites.append(Site(kind, dice.randint(1, 512), extent, dice.randint(1, slots)))
    return SlotConfig.of_chain(tuple(sites))


def random_slots(dice: random.Random, rows: int, slots: int) -> SlotTensors:
    """Anything in any slot, whether or not a machine could get there."""
    tensors = SlotTensors.empty(rows, slots)

    def fill(name: str, draw: Callable[[], float]) -> None:
        tensor = getattr(tensors, name)
        tensor.copy_(torch.tensor([[draw() for _ in range(slots)] for _ in range(rows)]))

    for name, choices in {
        "stage": Stage,
        "blueprint": Blueprint,
        "operator": Operator,
        "alpha_mode": AlphaMode,
    }.items():
        fill(name, lambda choices=choices: int(dice.choice(list(choices))))
    fill("ramp_total", lambda: dice.choice((0, 3, 5, 8)))
    fill("ramp_done", lambda: dice.randint(0, 8))
    tensors.ramp_done.clamp_(max=tensors.ramp_total)
    for name in ("age", "stage_age", "cooldown"):
        fill(name, lambda: dice.choice((0, dice.randint(1, 200))))
    fill("parameters", lambda: dice.choice((0, dice.randint(1, 100_000))))
    for name in ("alpha", "alpha_target"):
        fill(name, lambda: dice.choice((0.0, dice.random(), 1.0)))
    for name in WORTHS:
        fill(
            name, lambda: dice.choice((NAN, INF, -INF, 0.0, -0.0, 1e-9, 1e6, -3e38, dice.gauss(0, 1), dice.gauss(0, 9)))
        )
    for name in ("gradient_norm", "gradient_ratio"):
        fill(name, lambda: dice.choice((NAN, INF, 0.0, 1e-30, 1e30, 10 ** dice.uniform(-8, 8))))
    return tensors


def random_views(seed: int, rows: int, slots: int, decisions: int = 1) -> list[PopulationView]:
    """Views of one episode, from its first decision on."""
    dice = random.Random(seed)
    config, checks = random_config(dice, slots), len(ALL_GATE_CHECKS)
    generator = torch.Generator().manual_seed(seed)
    horizon = dice.randint(max(decisions, 2), 150)
    host_parameters, classes = dice.randint(10, 1_000_000), dice.randint(2, 100)
    views = []
    for decision in range(decisions):
        passed_CRS = torch.rand(checks, rows, slots, generator=generator) < dice.choice((0.2, 0.8, 1.0))
        losses = [[dice.choice((NAN, INF, 0.0, *[dice.expovariate(0.5)] * 6)) for _ in range(rows)] for _ in range(2)]
        refused_R = torch.tensor([int(dice.choice(list(Check))) for _ in range(rows)])
        stage_R = torch.ones(rows, dtype=torch.int64)
        action_RH = torch.randint(3, (rows, len(Head)), generator=generator)
        action_RH[:, Head.OP] = torch.tensor([int(dice.choice(list(Op))) for _ in range(rows)])
        views.append(
            PopulationView(
                decision=decision,
                horizon=horizon,
                slots=random_slots(dice, rows, slots),
                slot_config=config,
                fits_SB=torch.ones(slots, len(Blueprint), dtype=torch.bool),
                seed_parameters_SBO=torch.ones(slots, len(Blueprint), len(Operator), dtype=torch.int64),
                gates=GateReport(torch.zeros(checks, rows, slots), passed_CRS, torch.zeros(checks, rows, slots)),
                train_loss_R=torch.tensor(losses[0]),
                val_loss_R=torch.tensor(losses[1]),
                val_accuracy_R=torch.tensor([dice.choice((NAN, 0.0, dice.random(), 1.0)) for _ in range(rows)]),
                host_parameters=host_parameters,
                classes=classes,
                price_R=torch.tensor([dice.choice((0.0, dice.random())) for _ in range(rows)]),
                last=Outcome(refused_R == 0, refused_R, stage_R, stage_R) if decision else None,
                last_action_RH=action_RH if decision else None,
            )
        )
    return views


def mapped(view: PopulationView, f: Callable[[torch.Tensor, int], torch.Tensor]) -> PopulationView:
    """Change each tensor by a function of it and its axis of rows."""
    gates, last = view.gates, view.last
    return replace(
        view,
        slots=SlotTensors(**{name: f(tensor, 0) for name, tensor in vars(view.slots).items()}),
        gates=GateReport(f(gates.value_CRS, 1), f(gates.passed_CRS, 1), f(gates.limit_CRS, 1)),
        **{n: f(getattr(view, n), 0) for n in ("train_loss_R", "val_loss_R", "val_accuracy_R", "price_R")},
        last=None if last is None else Outcome(**{name: f(tensor, 0) for name, tensor in vars(last).items()}),
        last_action_RH=None if view.last_action_RH is None else f(view.last_action_RH, 0),
    )


def one_hot(group: str, values: type, value: int) -> dict[str, float]:
    return {f"{group} {v.name}": float(v == value) for v in values}


def symlog(x: float) -> float:
    return math.copysign(math.log(1 + abs(x)), x) if math.isfinite(x) else 0.0


def log10(x: float) -> float:
    return math.log10(min(max(x, 1e-6), 1e6)) / 6 if math.isfinite(x) else 0.0


def plain_slot(view: PopulationView, r: int, s: int) -> dict[str, float]:
    """Every column of the token of one slot by name."""
    cell = {name: tensor[r, s].item() for name, tensor in vars(view.slots).items() if tensor.ndim == 2}
    site, stage = view.slot_config.sites[s], Stage(cell["stage"])
    passed = {check for c, check in enumerate(ALL_GATE_CHECKS) if view.gates.passed_CRS[c, r, s]}
    moving = cell["alpha_mode"] != AlphaMode.HOLD
    time = {name: math.log(1 + cell[name]) / math.log(1 + view.horizon) for name in ("age", "stage_age", "cooldown")}
    columns = one_hot("stage", Stage, stage) | one_hot("blueprint", Blueprint, cell["blueprint"])
    columns |= one_hot("operator", Operator, cell["operator"])
    columns |= {
        "alpha": cell["alpha"],
        "alpha target": cell["alpha_target"],
        "ramp left": (cell["ramp_total"] - cell["ramp_done"]) / 8 if moving else 0.0,
        "alpha up": float(cell["alpha_mode"] == AlphaMode.UP),
        "alpha down": float(cell["alpha_mode"] == AlphaMode.DOWN),
        "age": time["age"],
        "stage age": time["stage_age"],
        "cooldown": time["cooldown"],
        **{name.replace("_se", " error").replace("_", " "): symlog(cell[name]) for name in WORTHS},
        "gradient norm": log10(cell["gradient_norm"]),
        "gradient ratio": log10(cell["gradient_ratio"]),
        **{flag: float(math.isfinite(cell[name])) for name, flag in FLAG_OF.items()},
        "parameters": math.log(1 + cell["parameters"] / view.host_parameters),
        "gate open": float(stage in ASKED and passed >= ASKED[stage]),
        "site width": math.log2(site.width) / 10,
        "site extent": sum(math.log2(size) for size in site.extent) / 10,
        "site depth": site.depth / len(view.slot_config.sites),
    }
    del columns["stage UNKNOWN"]
    return columns | {f"site {kind.name}": float(site.kind is kind) for kind in SiteKind}


def plain_run(views: list[PopulationView], r: int) -> dict[str, float]:
    """Every column of the token of one row by name, after these views; NaN where the statistics find nothing."""
    view, guess = views[-1], math.log(views[-1].classes)
    losses = [v.val_loss_R[r].item() for v in views]
    raw = {"train loss": view.train_loss_R[r].item() / guess, "validation loss": losses[-1] / guess}
    for back in range(1, HISTORY + 1):
        raw[f"improvement {back}"] = (losses[-1 - back] - losses[-1]) / guess if back < len(losses) else NAN
    stages = [Stage(stage) for stage in view.slots.stage[r].tolist()]
    growth = math.log(1 + sum(view.slots.parameters[r].tolist()) / view.host_parameters)
    price, accuracy = view.price_R[r].item(), view.val_accuracy_R[r].item()
    refused = Check(view.last.refused_by[r].item()) if view.last else None
    op = view.last_action_RH[r, Head.OP].item() if view.last else -1
    return {
        **{name: x if math.isfinite(x) else NAN for name, x in raw.items()},
        **{f"{name} measured": float(math.isfinite(x)) for name, x in raw.items()},
        "accuracy": 0.0 if math.isnan(accuracy) else accuracy,
        "progress": view.decision / view.horizon,
        "decisions left": math.log(1 + view.horizon - view.decision) / math.log(1 + view.horizon),
        "occupied": sum(stage in OCCUPIED_STAGES for stage in stages) / len(stages),
        "committed": sum(stage is Stage.FOSSILIZED for stage in stages) / len(stages),
        "growth": growth,
        "price": math.log(1 + price / 0.02),
        "cost": math.log(1 + price * growth / 0.02),
        **one_hot("last op", Op, op),
        "last accepted": float(refused is Check.NONE),
        "last refused by structure": float(refused in STRUCTURE),
        "last refused by gate": float(refused in ALL_GATE_CHECKS),
        "classes": guess / 5,
        "host parameters": math.log10(view.host_parameters) / 8,
        "slots": math.log2(len(stages)) / 8,
    }
