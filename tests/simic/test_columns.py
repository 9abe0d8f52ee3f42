"""What a store holds of every decision, seed and transition beside a slow loop over rows."""

import math

import numpy as np
import pytest
import torch

from esper.kasmina.blueprints.registry import seed_parameters
from esper.leyline.actions import (
    ALPHA_SPEEDS,
    ALPHA_TARGETS,
    HEADS_OF_OP,
    TEMPOS,
    Blueprint,
    Curve,
    Head,
    Op,
    Operator,
    Style,
)
from esper.leyline.checks import ALL_GATE_CHECKS, CHECK_TEXT, GATE_CHECKS, GATE_OF_STAGE, Check
from esper.leyline.config import GateConfig, GrowthConfig
from esper.leyline.slots import EMPTY_SLOT, SlotTensors, legal_ops
from esper.leyline.stages import ADVANCE_TARGET, CULLABLE_STAGES, OCCUPIED_STAGES, Stage
from esper.nissa.schema import QUANTITIES
from esper.simic.columns import decision_columns
from esper.simic.story import END, HARVEST, HARVESTED, events_of
from helpers.episodes import Script, record, run_config, task_of
from helpers.growing import act
from helpers.recorded import ROUND, Wild, record_walk, save_new_policy, walk_config
from helpers.run_stores import rows as ask

STRICT = GrowthConfig(gates=GateConfig(min_incubator_gain=100))
WALKS = ("random mlp", "random signal", "wild", "policy")


@pytest.fixture(scope="module")
def walks(tmp_path_factory):
    """Every walk, recorded once."""
    policy = save_new_policy(tmp_path_factory.mktemp("policy"))
    every = {
        "random mlp": (walk_config("mnist1d-mlp", "random"), 24, None),
        "random signal": (walk_config("mnist1d", "random", horizon=30), 8, None),
        "wild": (walk_config("digits-mlp", "never", growth=STRICT), 24, Wild(24)),
        "policy": (walk_config("digits-mlp", f"policy:{policy}"), 12, None),
    }
    made = {}

    def walk(name):
        if name not in made:
            config, rows, controller = every[name]
            path = tmp_path_factory.mktemp("store") / "run.sqlite"
            made[name] = record_walk(config, rows, path, controller=controller)
        return made[name]

    return walk


each = pytest.mark.parametrize("name", WALKS)


def number(value):
    """A number as SQLite gives it: NULL where it is none."""
    value = float(value)
    return None if math.isnan(value) else value


def place(step, row):
    return {"round": ROUND, "decision": step.decision, "row": row}


def pick(choices, index):
    return choices[index] if 0 <= index < len(choices) else None


def compare(recorded, table, key, told):
    """Check that a table holds exactly these rows, those columns of them that were told."""
    kept = ask(recorded.path, f"SELECT * FROM {table} ORDER BY {key}")
    assert len(kept) == len(told)
    assert told
    for have, want in zip(kept, told, strict=True):
        assert {name: have[name] for name in want} == want


# Decisions.


def lower(names):
    return [name.name.lower() for name in names]


def slots_before(recorded, at):
    """The slots as they were when a decision was made."""
    episode = recorded.episode
    slots = SlotTensors.empty(episode.population.rows, episode.population.slots.slots)
    if at:
        for name in EMPTY_SLOT:
            getattr(slots, name).copy_(torch.from_numpy(recorded.steps[at - 1].slots[name]))
    return slots


def decision_row(step, row, legal):
    action = step.action_RH[row].tolist()
    op = action[Head.OP]
    used = HEADS_OF_OP[Op(op)] if 0 <= op < len(Op) else {Head.OP}
    meaning = {
        "slot": (Head.SLOT, action[Head.SLOT]),
        "style": (Head.STYLE, pick(lower(Style), action[Head.STYLE])),
        "tempo_decisions": (Head.TEMPO, pick(TEMPOS, action[Head.TEMPO])),
        "alpha_target": (Head.ALPHA_TARGET, pick(ALPHA_TARGETS, action[Head.ALPHA_TARGET])),
        "alpha_speed_decisions": (Head.ALPHA_SPEED, pick(ALPHA_SPEEDS, action[Head.ALPHA_SPEED])),
        "alpha_curve": (Head.ALPHA_CURVE, pick(lower(Curve), action[Head.ALPHA_CURVE])),
    }
    told = place(step, row)
    told |= {name: value if head in used else None for name, (head, value) in meaning.items()}
    # Nothing has no name: test_a_seed_of_nothing.
    if action[Head.BLUEPRINT] != Blueprint.NOOP or Head.BLUEPRINT not in used:
        named = pick(lower(Blueprint), action[Head.BLUEPRINT])
        told["blueprint"] = named if Head.BLUEPRINT in used else None
    for head in Head:
        probability = math.exp(step.log_prob_RH[row, head]) if head in used else math.nan
        told[f"p_{head.name.lower()}"] = pytest.approx(number(probability))
    refused = Check(step.refused_by_R[row])
    return told | {
        "legal_ops": sum(2**op for op in Op if legal[row, op].any()),
        "op": Op(op).name.lower() if 0 <= op < len(Op) else f"operation {op}",
        "accepted": int(refused is Check.NONE),
        "refused_by": None if refused is Check.NONE else refused.name,
        "value": number(step.value_R[row]),
        "train_loss_nats": number(step.train_loss_R[row]),
        "val_loss_nats": number(step.val_loss_R[row]),
        "val_accuracy": number(step.val_accuracy_R[row]),
        "skipped_updates": int(step.skipped_R[row]),
        "reward": None,
    }


@each
def test_decisions(walks, name):
    recorded = walks(name)
    fits_SB, told = recorded.episode.population.fits_SB, []
    for at, step in enumerate(recorded.steps):
        legal = legal_ops(slots_before(recorded, at), fits_SB)
        told += [decision_row(step, row, legal) for row in range(len(legal))]
    compare(recorded, "decision", "decision, row", told)


PROBABILITIES = [f"p_{head.name.lower()}" for head in Head]


def test_the_product_of_the_probabilities_is_that_of_the_action(walks):
    recorded = walks("policy")
    kept = ask(recorded.path, f"SELECT value, {', '.join(PROBABILITIES)} FROM decision ORDER BY decision, row")
    joint = np.concatenate([step.log_prob_RH.astype(float).sum(1) for step in recorded.steps])
    for row, log_probability in zip(kept, joint, strict=True):
        given = [row[column] for column in PROBABILITIES if row[column] is not None]
        assert math.prod(given) == pytest.approx(math.exp(log_probability), rel=1e-5)
        assert all(0 < probability <= 1 for probability in given)
        assert row["value"] is not None
    # It chose: not everything was certain.
    assert min(row["p_op"] for row in kept) < 0.5


@pytest.mark.parametrize("name", ["random mlp", "wild"])
def test_who_has_no_probabilities_has_none(walks, name):
    kept = ask(walks(name).path, f"SELECT value, {', '.join(PROBABILITIES)} FROM decision")
    assert {value for row in kept for value in row.values()} == {None}


def test_what_does_not_exist_is_refused_and_told(walks):
    kept = ask(walks("wild").path, "SELECT * FROM decision WHERE refused_by = 'RANGE'")
    assert {row["accepted"] for row in kept} == {0}
    assert {"operation -2", "operation -1", "operation 6", "operation 14", "germinate", "advance"} <= {
        row["op"] for row in kept
    }
    slots = walks("wild").episode.population.slots.slots
    assert {row["slot"] for row in kept if row["slot"] is not None} >= {-2, -1, slots, 14}


def test_a_seed_of_nothing():
    script = Script({0: act(Op.GERMINATE, 0, blueprint=Blueprint.NOOP)})
    (step,) = record(
        run_config("digits-mlp", horizon=1, updates=1), task_of("digits-mlp", examples=40), 1, controller=script
    ).steps
    (event,) = events_of(step, 0, task_of("digits-mlp", examples=40).host.slot_config)
    assert (event.refused_by, event.detail["blueprint"]) == ("BLUEPRINT", "noop")
    # NULL would say that the head did not apply.
    assert decision_columns(step)["blueprint"].tolist() == ["noop"]


# Seeds.


def slot_row(step, row, slot):
    of = {name: values[row, slot].item() for name, values in step.slots.items()}
    told = place(step, row) | {"slot": slot, "seed": of["seed_id"], "stage": Stage(of["stage"]).name}
    told |= {"blueprint": Blueprint(of["blueprint"]).name.lower(), "parameters": of["parameters"]}
    told |= {name: number(of[name]) for name in ("alpha", "gradient_ratio")}
    for name in ("contribution", "contribution_se", "incubator_gain", "incubator_gain_se"):
        told[f"{name}_nats"] = number(of[name])
    return told | {"contribution_age_decisions": None if math.isnan(of["contribution"]) else 0}


@each
def test_seeds(walks, name):
    recorded = walks(name)
    told = [
        slot_row(step, row, slot)
        for step in recorded.steps
        for (row, slot), stage in np.ndenumerate(step.slots["stage"])
        if Stage(stage) in OCCUPIED_STAGES
    ]
    compare(recorded, "slot", "decision, row, slot", told)


# Transitions.

CLOCK = {
    Stage.CULLED: (Stage.EMBARGOED, "its seed is gone"),
    Stage.EMBARGOED: (Stage.RESETTING, "its rest is over"),
    Stage.RESETTING: (Stage.DORMANT, "it is free again"),
    Stage.BLENDING: (Stage.CULLED, "it faded out"),
}
GATE_IN_FRONT_OF = {stage: GATE_OF_STAGE[after] for stage, after in ADVANCE_TARGET.items()} | {
    Stage.PROBATIONARY: GATE_OF_STAGE[Stage.FOSSILIZED]
}


def seed_of(step, row, slot, sites):
    """The seed of a slot before the decision or, if there was none, after the action."""
    nothing = dict.fromkeys(("seed", "blueprint", "operator", "parameters"))
    if not 0 <= slot < len(sites):
        return nothing
    before = {name: getattr(step.structure, name)[row, slot] for name in ("seed_id", "blueprint", "operator")}
    seed = before if before["seed_id"] >= 0 else {name: getattr(step.acted, name)[row, slot] for name in before}
    if seed["seed_id"] < 0:
        return nothing
    blueprint, operator = Blueprint(seed["blueprint"]), Operator(seed["operator"])
    return {
        **{"seed": int(seed["seed_id"]), "blueprint": blueprint.name.lower(), "operator": operator.name.lower()},
        "parameters": seed_parameters(blueprint, operator, sites[slot]),
    }


def action_row(step, row, slot, op, before, after):
    refused = Check(step.refused_by_R[row])
    by_gate = refused in ALL_GATE_CHECKS
    gate = None
    if op in (Op.ADVANCE, Op.FOSSILIZE, Op.CULL) and (by_gate or refused is Check.NONE):
        gate = GATE_IN_FRONT_OF[before]
    seen, failed = dict.fromkeys(QUANTITIES.values()), []
    for check in GATE_CHECKS[gate] if gate else ():
        at = ALL_GATE_CHECKS.index(check)
        seen[QUANTITIES[check]] = number(step.value_CRS[at, row, slot])
        failed += [] if step.passed_CRS[at, row, slot] else [check.name]
    return seen | {
        "actor": "controller",
        "op": Op(op).name.lower() if 0 <= op < len(Op) else f"operation {op}",
        "before": before.name,
        "after": after.name,
        "allowed": int(refused is Check.NONE),
        "gate": gate.name if gate else None,
        "refused_by": None if refused is Check.NONE else refused.name,
        "failed_checks": ",".join(failed) or None,
        "reason": None if by_gate or refused is Check.NONE else CHECK_TEXT[refused],
    }


def unasked_row(actor, op, before, after, reason):
    nothing = dict.fromkeys((*QUANTITIES.values(), "gate", "refused_by", "failed_checks"))
    return nothing | {
        **{"actor": actor, "op": op, "before": before.name, "after": after.name},
        **{"allowed": 1, "reason": reason},
    }


def transition_rows(step, row, sites):
    now = [Stage(stage) for stage in step.structure.stage[row]]
    op, slot = step.action_RH[row, :2].tolist()
    if op != Op.WAIT:
        before, after = Stage(step.before_R[row]), Stage(step.after_R[row])
        at = place(step, row) | {"step": 0, "slot": slot}
        yield at | seed_of(step, row, slot, sites) | action_row(step, row, slot, op, before, after)
        if 0 <= slot < len(now):
            assert now[slot] is before
            now[slot] = after
    count = 0
    for slot, stage in enumerate(now):
        while stage is not Stage(step.acted.stage[row, slot]):
            count += 1
            after, reason = CLOCK[stage]
            at = place(step, row) | {"step": count, "slot": slot}
            yield at | seed_of(step, row, slot, sites) | unasked_row("clock", "clock", stage, after, reason)
            stage = after
    for slot in np.flatnonzero(step.harvested_RS[row]).tolist():
        count += 1
        stage = Stage(step.acted.stage[row, slot])
        assert stage in CULLABLE_STAGES
        at = place(step, row) | {"step": count, "slot": slot}
        yield at | seed_of(step, row, slot, sites) | unasked_row(END, HARVEST, stage, Stage.CULLED, HARVESTED)


@each
def test_transitions(walks, name):
    recorded = walks(name)
    rows, sites = range(recorded.episode.population.rows), recorded.episode.task.host.slot_config.sites
    told = [line for step in recorded.steps for row in rows for line in transition_rows(step, row, sites)]
    compare(recorded, "transition", "decision, row, step", told)


@pytest.mark.parametrize("name", ["random mlp", "wild"])
def test_the_walks_have_everything_in_them(walks, name):
    kept = ask(walks(name).path, "SELECT * FROM transition")
    assert {row["reason"] for row in kept if row["actor"] == "clock"} >= {text for _, text in list(CLOCK.values())[:3]}
    refused = {row["refused_by"] for row in kept}
    if name == "random mlp":
        assert {row["gate"] for row in kept} == {None, "G1", "G2", "G3", "G5"}
        assert {row["op"] for row in kept} == {op.name.lower() for op in Op if op is not Op.WAIT} | {"clock", HARVEST}
        assert "it faded out" in {row["reason"] for row in kept}
        assert refused >= {"INCUBATOR_GAIN", "ALPHA_AT_TARGET"}
        assert {row["operator"] for row in kept} >= {"add", "multiply", "gate"}
    else:
        assert {"RANGE", "STAGE", "BLUEPRINT"} <= refused
        # More than one check may fail, of what is refused and of what is culled.
        assert {row["op"] for row in kept if "," in (row["failed_checks"] or "")} == {"advance", "cull"}


@each
def test_transitions_are_the_events_of_the_story(walks, name):
    recorded = walks(name)
    config = recorded.episode.task.host.slot_config
    kept = iter(ask(recorded.path, "SELECT * FROM transition ORDER BY decision, row, step"))
    for step in recorded.steps:
        for row in range(recorded.episode.population.rows):
            for event in events_of(step, row, config):
                line = next(kept)
                assert (line["decision"], line["row"]) == (event.decision, row)
                named = config.slot_ids[line["slot"]] if 0 <= line["slot"] < config.slots else f"slot {line['slot']}"
                assert (event.slot, event.actor, event.what) == (named, line["actor"], line["op"])
                assert (event.before, event.after, event.refused_by) == tuple(
                    line[column] for column in ("before", "after", "refused_by")
                )
                assert event.accepted == bool(line["allowed"])
                values = {QUANTITIES[Check[check.name]]: check.value for check in event.checks}
                assert {name: line[name] for name in values} == values
                failed = [check.name for check in event.checks if not check.passed]
                assert line["failed_checks"] == (",".join(failed) or None)
    assert next(kept, None) is None


def test_decisions_in_which_nothing_happens(tmp_path):
    config = walk_config("digits-mlp", "never", horizon=3)
    path = record_walk(config, 2, tmp_path / "run.sqlite").path
    assert [len(ask(path, f"SELECT * FROM {name}")) for name in ("decision", "slot", "transition")] == [6, 0, 0]
