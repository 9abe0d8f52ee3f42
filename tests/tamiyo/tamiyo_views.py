"""Hand-made views and a tiny scripted machine for the tests of controllers.

Shapes: R rows, S slots, B blueprints, C gate checks.
"""

import torch

from esper.kasmina.lifecycle import Lifecycle
from esper.leyline.actions import STYLE_OPERATOR, Blueprint, Op, SiteKind, Style
from esper.leyline.checks import ALL_GATE_CHECKS, Check, GateReport
from esper.leyline.sites import Site, SlotConfig, fit_table
from esper.leyline.slots import SlotTensors
from esper.leyline.stages import ADVANCE_TARGET, Stage
from esper.leyline.view import Controller, PopulationView
from esper.tamiyo.controllers.registry import make_controller

S, HORIZON, LIFE = 3, 60, 11  # LIFE: germinate, 3 in TRAINING, a ramp of 3, 3 in PROBATIONARY, commit, as decisions
CONFIG = SlotConfig.of_chain((Site(SiteKind.IMAGE, 4, (8, 8), 1), *[Site(SiteKind.VECTOR, 8, (), d) for d in (2, 3)]))
FITS_SB = fit_table(CONFIG, frozenset(Blueprint))
NAN = float("nan")
HOST = 1000  # Parameters.
PARAMETERS_SBO = Lifecycle(CONFIG, FITS_SB, embargo=5).parameter_counts
LIMITS = {Check.TRAINING_DECISIONS: 3.0, Check.PROBATION_DECISIONS: 3.0}


def make(name: str, rows: int = 1, row_ids: torch.Tensor | None = None, seed: int = 7) -> Controller:
    return make_controller(
        name, rows=rows, slots=S, seed=seed, row_ids_R=torch.arange(rows) if row_ids is None else row_ids
    )


def slots_of(*cells: dict[str, float]) -> SlotTensors:
    """One row, each cell naming what differs from an empty slot; the missing cells are empty."""
    slots = SlotTensors.empty(1, S)
    for index, cell in enumerate(cells):
        for name, value in cell.items():
            getattr(slots, name)[0, index] = value
    return slots


def view_of(
    slots: SlotTensors,
    decision: int = 20,
    loss_R: list[float] | None = None,
    deny: Check | None = None,
    price: float = 0.0,
) -> PopulationView:
    """A view whose ages and contributions decide the gates; every other check passes, but for `deny`."""
    value_CRS = torch.ones(len(ALL_GATE_CHECKS), slots.rows, slots.slots, device=slots.device)
    limit_C = torch.tensor([LIMITS.get(c, 0.0) for c in ALL_GATE_CHECKS], device=slots.device)
    for check in LIMITS:
        value_CRS[ALL_GATE_CHECKS.index(check)] = slots.stage_age.float()
    value_CRS[ALL_GATE_CHECKS.index(Check.CONTRIBUTION)] = slots.contribution
    if deny is not None:
        value_CRS[ALL_GATE_CHECKS.index(deny)] = NAN
    above = torch.tensor([c not in LIMITS for c in ALL_GATE_CHECKS], device=slots.device)[:, None, None]
    passed_CRS = torch.where(above, value_CRS > limit_C[:, None, None], value_CRS >= limit_C[:, None, None])
    loss = torch.tensor(loss_R or [1.0] * slots.rows, device=slots.device)
    gates = GateReport(value_CRS, passed_CRS, limit_C[:, None, None].expand_as(value_CRS).clone())
    fits = FITS_SB.to(slots.device, copy=True)
    price_R = torch.full((slots.rows,), price, device=slots.device)
    parameters = PARAMETERS_SBO.to(slots.device)
    return PopulationView(
        decision, HORIZON, slots, CONFIG, fits, parameters, gates, loss, loss, 1 - loss, HOST, 10, price_R, None, None
    )


def act(controller: Controller, view: PopulationView) -> torch.Tensor:
    controller.observe(view)
    return controller.act()


def step(slots: SlotTensors, actions: torch.Tensor, view: PopulationView, worth: dict[int, float]) -> None:
    """A tiny engine: gates, a ramp of one decision, an embargo of three; `worth` is what a blueprint contributes."""
    slots.stage_age += 1
    advance_to = {int(a): int(b) for a, b in ADVANCE_TARGET.items()}
    for r, (op, s, blueprint, style, *_) in enumerate(actions.tolist()):
        passed = dict(zip(ALL_GATE_CHECKS, view.gates.passed_CRS[:, r, s].tolist(), strict=True))
        stage = int(slots.stage[r, s])
        if op == Op.GERMINATE:
            slots.stage[r, s], slots.blueprint[r, s], slots.stage_age[r, s] = int(Stage.GERMINATED), blueprint, 1
            slots.operator[r, s] = int(STYLE_OPERATOR[Style(style)])
            slots.seeds_made[r] += 1
        elif op == Op.ADVANCE and stage in advance_to and (stage != Stage.TRAINING or passed[Check.TRAINING_DECISIONS]):
            slots.stage[r, s], slots.stage_age[r, s] = advance_to[stage], 1
            slots.alpha_target[r, s] = 1.0
        elif op == Op.CULL:
            slots.stage[r, s], slots.blueprint[r, s], slots.stage_age[r, s] = int(Stage.EMBARGOED), 0, 1
        elif op == Op.FOSSILIZE and passed[Check.PROBATION_DECISIONS] and passed[Check.CONTRIBUTION]:
            slots.stage[r, s] = int(Stage.FOSSILIZED)
    rested = (slots.stage == int(Stage.EMBARGOED)) & (slots.stage_age > 3)
    slots.stage[rested] = int(Stage.DORMANT)
    table = torch.tensor([worth.get(b, 0.1) for b in range(len(Blueprint))])
    measured = (slots.stage == int(Stage.PROBATIONARY)) | (slots.stage == int(Stage.FOSSILIZED))
    slots.contribution = torch.where(measured, table[slots.blueprint], NAN)
    slots.contribution_se = torch.where(measured, 0.01, NAN)


def play(name: str, ids: list[int], worth: dict[int, float] | None = None) -> tuple[torch.Tensor, SlotTensors]:
    """Actions [decisions, R, H] of an episode whose losses differ by row, and the final slots."""
    slots, controller, log = SlotTensors.empty(len(ids), S), make(name, len(ids), torch.tensor(ids)), []
    for decision in range(HORIZON):
        # Row 3 never had a finite loss; the others fall at different speeds.
        loss = [NAN if i == 3 else 2.0 * (0.8 + 0.04 * i) ** decision for i in ids]
        view = view_of(slots, decision, loss)
        log.append(act(controller, view))
        assert torch.equal(controller.act(), log[-1])
        step(slots, log[-1], view, worth or {})
    return torch.stack(log), slots
