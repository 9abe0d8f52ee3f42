"""Episodes: every controller on every task, the same twice, row by row on its own, and what a step says of it."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from esper.kasmina.blueprints.registry import seed_parameters
from esper.leyline.actions import BLUEPRINTS_OF_KIND, Blueprint, Head, Op, Operator
from esper.leyline.checks import ALL_GATE_CHECKS, GATE_CHECKS, GATE_OF_STAGE, Check
from esper.leyline.config import GrowthConfig
from esper.leyline.errors import EsperError
from esper.leyline.slots import EMPTY_SLOT
from esper.leyline.stages import (
    ADVANCE_TARGET,
    BLENDED_STAGES,
    INCUBATED_STAGE,
    OCCUPIED_STAGES,
    VALID_TRANSITIONS,
    Stage,
    stage_table,
)
from esper.simic.episode import STATIC_BLUEPRINT, Episode
from esper.simic.step import Step
from esper.tolaria.evaluation import evaluate
from helpers.episodes import (
    CONTROLLER_NAMES,
    TASK_NAMES,
    came_back,
    grew_up,
    random_walk,
    record,
    run_config,
    task_of,
)
from helpers.growing import QUICK

tasks = pytest.mark.parametrize("task", TASK_NAMES)
OCCUPIED, BLENDED = (stage_table(stages).numpy() for stages in (OCCUPIED_STAGES, BLENDED_STAGES))
ARRAYS = [f.name for f in fields(Step) if f.name not in ("decision", "structure", "acted", "slots", "reward")]


def short_episode(task, controller, rows=2, *, dtype=torch.float32, **more):
    config = run_config(task, controller, horizon=14, updates=2, batch=8, growth=QUICK, **more)
    return record(config, task_of(task, dtype=dtype, examples=40), rows, dtype=dtype)


def arrays(step):
    """Every array of a step by name, those of the slots included."""
    structure = {f"{name} before": array for name, array in vars(step.structure).items()}
    structure |= {f"{name} acted": array for name, array in vars(step.acted).items()}
    return {name: getattr(step, name) for name in ARRAYS} | structure | step.slots


def rows_last(name, array):
    """Bring the rows of an array of a step to the front."""
    return array.swapaxes(0, 1) if name.endswith("_CRS") else array


# Every controller on every task.


@tasks
def test_never_completes_and_grows_nothing(task):
    recording = short_episode(task, "never")
    assert len(recording.steps) == 14
    assert (recording.stages == Stage.DORMANT).all()
    assert all((step.action_RH[:, Head.OP] == Op.WAIT).all() and step.accepted_R.all() for step in recording.steps)
    population = recording.episode.population
    assert population.slots.seeds_made.tolist() == [0, 0]
    assert len(list(population.banks)) == 1


@tasks
def test_random_grows_commits_and_recycles(task):
    recording = random_walk(task)
    histories = list(recording.slot_histories())
    assert any(grew_up(history) for history in histories)
    assert any(came_back(history) for history in histories)


@tasks
@pytest.mark.parametrize("controller", ["periodic", "heuristic"])
def test_periodic_and_heuristic_grow_and_commit(task, controller):
    config = run_config(task, controller, horizon=30, updates=4)
    recording = record(config, task_of(task), 3)
    assert any(grew_up(history) for history in recording.slot_histories())
    # They look at the gates first: nothing that they ask for is refused.
    assert all(step.accepted_R.all() for step in recording.steps)
    assert torch.isfinite(recording.episode.population.hosts.theta).all()


def test_the_other_incubator_completes():
    growth = GrowthConfig(incubator="straight-through")
    config = run_config("mnist1d-mlp", "periodic", horizon=30, updates=4, growth=growth)
    recording = record(config, task_of("mnist1d-mlp"), 2)
    assert any(grew_up(history) for history in recording.slot_histories())


# What holds of every decision of a random walk.


@tasks
def test_stages_change_by_valid_transitions_alone(task):
    stages = random_walk(task).stages
    changes = np.stack((stages[:-1], stages[1:]), -1).reshape(-1, 2)
    seen = {(Stage(a), Stage(b)) for a, b in np.unique(changes, axis=0).tolist() if a != b}
    allowed = {(source, target) for source, targets in VALID_TRANSITIONS.items() for target in targets}
    assert seen <= allowed
    assert {Stage.FOSSILIZED, Stage.DORMANT} <= {target for _, target in seen}


@tasks
def test_waiting_takes_its_exact_time(task):
    recording = random_walk(task)
    waits = {Stage.CULLED: 1, Stage.EMBARGOED: recording.episode.config.growth.embargo, Stage.RESETTING: 1}
    assert waits[Stage.EMBARGOED] == 5
    seen = set()
    for history in recording.slot_histories():
        # The last stage may be cut short by the horizon.
        for stage, decisions in history[:-1]:
            if stage in waits:
                assert decisions == waits[stage]
                seen.add(stage)
    assert seen == set(waits)


@tasks
def test_refused_actions_are_recorded_with_the_check_that_refused_them(task):
    reasons = set()
    for step in random_walk(task).steps:
        np.testing.assert_array_equal(step.accepted_R, step.refused_by_R == Check.NONE)
        for row in np.flatnonzero(~step.accepted_R):
            op, slot = step.action_RH[row, Head.OP], step.action_RH[row, Head.SLOT]
            before = Stage(step.before_R[row])
            assert before == step.structure.stage[row, slot] == step.after_R[row]
            # What is drawn is always possible in structure: only a gate can refuse it.
            assert op in (Op.ADVANCE, Op.FOSSILIZE)
            target = ADVANCE_TARGET[before] if op == Op.ADVANCE else Stage.FOSSILIZED
            asked = GATE_CHECKS[GATE_OF_STAGE[target]]
            failed = [c for c in asked if not step.passed_CRS[ALL_GATE_CHECKS.index(c), row, slot]]
            assert step.refused_by_R[row] == failed[0]
            reasons.add(failed[0])
    assert {Check.INCUBATOR_GAIN, Check.ALPHA_AT_TARGET} <= reasons


@tasks
def test_what_gates_accepted_had_passed_every_check(task):
    accepted = 0
    for step in random_walk(task).steps:
        gated = np.isin(step.action_RH[:, Head.OP], (Op.ADVANCE, Op.FOSSILIZE)) & step.accepted_R
        for row in np.flatnonzero(gated):
            checks = GATE_CHECKS[GATE_OF_STAGE[Stage(step.after_R[row])]]
            slot = step.action_RH[row, Head.SLOT]
            assert all(step.passed_CRS[ALL_GATE_CHECKS.index(c), row, slot] for c in checks)
            accepted += 1
    assert accepted > 100


@tasks
def test_each_seed_is_measured_and_nothing_else_is(task):
    for step in random_walk(task).steps:
        stage, alpha = step.slots["stage"], step.slots["alpha"]
        blended = BLENDED[stage] & (alpha > 0)
        incubated = stage == INCUBATED_STAGE
        for name, there in (("contribution", blended), ("incubator_gain", incubated)):
            np.testing.assert_array_equal(np.isfinite(step.slots[name]), there)
            np.testing.assert_array_equal(np.isfinite(step.slots[f"{name}_se"]), there)
            assert (step.slots[f"{name}_se"][there] >= 0).all()
        # A seed that is being faded out is frozen.
        fading = (stage == Stage.BLENDING) & (step.slots["alpha_target"] == 0)
        np.testing.assert_array_equal(np.isfinite(step.slots["gradient_norm"]), incubated | (blended & ~fading))
        empty = ~OCCUPIED[stage]
        assert (step.slots["parameters"][empty] == 0).all()
        assert (alpha[~BLENDED[stage]] == 0).all()


@tasks
def test_losses_and_accuracies_are_measured_after_each_decision(task):
    recording = random_walk(task)
    for step in recording.steps:
        for array in (step.train_loss_R, step.val_loss_R):
            assert np.isfinite(array).all()
        assert ((step.val_accuracy_R >= 0) & (step.val_accuracy_R <= 1)).all()
    last, episode = recording.steps[-1], recording.episode
    again = evaluate(episode.population, episode.task.data.reward_validation)
    np.testing.assert_allclose(last.val_loss_R, again.loss_R.numpy(), rtol=1e-5)
    np.testing.assert_array_equal(last.val_accuracy_R, again.accuracy_R.numpy())


# The same twice, and each row on its own.


@pytest.mark.parametrize("controller", CONTROLLER_NAMES)
@tasks
def test_the_same_seed_gives_the_same_history(task, controller):
    first, second = (short_episode(task, controller) for _ in range(2))
    for one, other in zip(first.steps, second.steps, strict=True):
        for name, array in arrays(one).items():
            np.testing.assert_array_equal(array, arrays(other)[name], err_msg=name)


@tasks
def test_another_seed_gives_another_history(task):
    first, second = (short_episode(task, "random", seed=seed) for seed in (0, 1))
    assert any(not np.array_equal(a.action_RH, b.action_RH) for a, b in zip(first.steps, second.steps, strict=True))
    assert not np.isclose(first.steps[0].train_loss_R, second.steps[0].train_loss_R).any()


def same_rows(several, rows, single, single_rows):
    """Compare rows of one recording with rows of another: structure exactly, numbers to rounding."""
    for one, other in zip(several.steps, single.steps, strict=True):
        for name, array in arrays(one).items():
            a = rows_last(name, array)[rows]
            b = rows_last(name, arrays(other)[name])[single_rows]
            # The slots keep their measurements in float32.
            rtol = 1e-9 if name in ("train_loss_R", "val_loss_R") else 1e-5
            np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-9, err_msg=f"{name} in decision {one.decision}")


@tasks
@pytest.mark.parametrize("controller", ["random", "heuristic"])
def test_a_row_knows_nothing_of_the_others(task, controller):
    many = short_episode(task, controller, [7, 3, 0, 5], dtype=torch.float64)
    alone = short_episode(task, controller, [3], dtype=torch.float64)
    same_rows(many, [1], alone, [0])
    few = short_episode(task, controller, [5, 7], dtype=torch.float64)
    same_rows(many, [3, 0], few, [0, 1])
    # Something happened that could have differed.
    assert (alone.stages != Stage.DORMANT).any()
    assert not np.array_equal(many.steps[0].train_loss_R[1:], many.steps[0].train_loss_R[:-1])


@tasks
def test_rows_with_one_identity_are_the_same_row(task):
    recording = short_episode(task, "random", [4, 9, 4], dtype=torch.float64)
    same_rows(recording, [0], recording, [2])
    assert not np.allclose(recording.steps[-1].val_loss_R[0], recording.steps[-1].val_loss_R[1])


# The step: one host copy of everything.


def test_a_step_equals_the_slots_and_is_a_copy():
    config = run_config("mnist1d-mlp", "random", horizon=12, updates=1, batch=8)
    episode = Episode(config, task_of("mnist1d-mlp", examples=40), "random", torch.arange(16))
    while not episode.done:
        episode.advance()
        step = episode.step()
        slots = episode.population.slots
        assert set(step.slots) == set(EMPTY_SLOT)
        for name, array in step.slots.items():
            tensor = getattr(slots, name)
            assert array.dtype == tensor.numpy().dtype
            np.testing.assert_array_equal(array, tensor.numpy(), err_msg=name)
    kept = step.slots["stage"].copy()
    slots.stage.fill_(int(Stage.UNKNOWN))
    np.testing.assert_array_equal(step.slots["stage"], kept)
    assert (step.action_RH.dtype, step.accepted_R.dtype, step.passed_CRS.dtype) == (np.int64, np.bool_, np.bool_)


def test_a_step_is_one_transfer(monkeypatch):
    config = run_config("mnist1d-mlp", "random", horizon=3, updates=1)
    episode = Episode(config, task_of("mnist1d-mlp", examples=40), "random", torch.arange(4))
    episode.advance()
    transfers = []

    def counted(name, whole):
        def call(self, *args, **kwargs):
            transfers.append(name)
            return whole(self, *args, **kwargs)

        return call

    for name in ("cpu", "item", "tolist", "to_dense", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
    episode.step()
    assert transfers == ["cpu"]


def test_a_step_tells_the_stages_before_the_action():
    recording = random_walk("digits-mlp")
    before = np.stack([step.structure.stage for step in recording.steps])
    np.testing.assert_array_equal(before[1:], recording.stages[1:-1])
    assert (before[0] == Stage.DORMANT).all()


def test_a_step_before_the_first_decision():
    episode = Episode(run_config("digits-mlp", horizon=2, updates=1), task_of("digits-mlp"), "never", torch.arange(1))
    with pytest.raises(RuntimeError, match="advance"):
        episode.step()


def test_length_of_an_episode():
    config = run_config("digits-mlp", horizon=3, updates=5)
    episode = Episode(config, task_of("digits-mlp", examples=40), "never", torch.arange(1))
    done = []
    while not episode.done:
        episode.advance()
        done.append((episode.step().decision, episode.decision, episode.trainer.update))
    assert done == [(0, 1, 5), (1, 2, 10), (2, 3, 15)]


# The static network, and what is refused.


@tasks
def test_static_plants_every_slot(task):
    config = run_config(task, horizon=3, updates=2)
    planted = Episode(config, task_of(task), "never", torch.arange(2), static=True)
    alone = Episode(config, task_of(task), "never", torch.arange(2))
    population, slots = planted.population, planted.population.slots
    kind = planted.task.host.kind
    assert (slots.stage == int(Stage.FOSSILIZED)).all()
    assert (slots.blueprint == int(STATIC_BLUEPRINT[kind])).all()
    assert (slots.alpha == 1).all()
    assert (slots.alpha_target == 1).all()
    assert population.base.all()
    counts = [
        seed_parameters(STATIC_BLUEPRINT[kind], Operator.ADD, site) for site in planted.task.host.slot_config.sites
    ]
    assert slots.parameters.tolist() == [counts, counts]
    # Every seed starts as the identity: at first it is the host alone.
    split = planted.task.data.selection
    first, second = (evaluate(e.population, split) for e in (planted, alone))
    torch.testing.assert_close(first.loss_R, second.loss_R)
    while not planted.done:
        planted.advance()
        alone.advance()
    assert (slots.stage == int(Stage.FOSSILIZED)).all()
    assert slots.contribution.isfinite().all()
    assert not torch.allclose(evaluate(population, split).loss_R, evaluate(alone.population, split).loss_R)


@tasks
def test_static_is_made_of_the_largest_blueprint(task):
    host = task_of(task).host
    for site in task_of(task, "ample").host.slot_config.sites:
        sizes = {b: seed_parameters(b, Operator.ADD, site) for b in BLUEPRINTS_OF_KIND[site.kind]}
        assert max(sizes, key=sizes.__getitem__) is STATIC_BLUEPRINT[host.kind]


def test_unknown_controller():
    with pytest.raises(EsperError) as caught:
        Episode(run_config("digits-mlp", horizon=1, updates=1), task_of("digits-mlp"), "nobody", torch.arange(1))
    known = ", ".join((*CONTROLLER_NAMES, "policy:FOLDER", "greedy:FOLDER"))
    assert str(caught.value) == f"controller: unknown controller 'nobody'; known: {known}"


def test_blueprints_that_fit_nothing():
    config = run_config("digits-mlp", horizon=1, updates=1, blueprints=("conv_light", "depthwise"))
    with pytest.raises(EsperError, match="none of conv_light, depthwise fits") as caught:
        Episode(config, task_of("digits-mlp"), "random", torch.arange(1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("controller", ["random", "periodic", "heuristic"])
def test_only_allowed_blueprints_are_grown(controller):
    few = ("norm", "attention")
    config = run_config("mnist1d-mlp", controller, horizon=24, updates=1, batch=8, growth=QUICK, blueprints=few)
    recording = record(config, task_of("mnist1d-mlp", examples=40), 4)
    grown = np.concatenate([step.slots["blueprint"][OCCUPIED[step.slots["stage"]]] for step in recording.steps])
    # The heuristic may find one of them enough.
    assert set(grown.tolist()) <= {Blueprint.NORM, Blueprint.ATTENTION}
    assert len(grown)
