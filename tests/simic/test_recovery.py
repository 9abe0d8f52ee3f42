"""Growing one network: an update that fails is skipped, and a state that fails is restored and goes on."""

from types import SimpleNamespace

import pytest
import torch

from esper.leyline.config import GovernorConfig
from esper.leyline.panics import PANIC_TEXT, Panic
from esper.leyline.stages import Stage
from esper.nissa.store import RunStore
from esper.simic.episode import Episode
from esper.simic.grow import ROW, Arm
from esper.simic.recorder import run_columns
from helpers.environments import reads_counted
from helpers.episodes import OPEN_GATES, run_config, task_of
from helpers.faults import (
    SKIPS,
    RowState,
    dead_gradient,
    exploding_rate,
    half_precision,
    nan_in_gradient,
    nan_in_weights,
)
from helpers.stored import column, stored

TASK, HORIZON, UPDATES, WHEN = "mnist1d-mlp", 30, 10, 12
QUICK = GovernorConfig(recovery_decisions=5)


def grown(fault=None, when=WHEN, *, name="grown", controller="heuristic", path=None, governor=QUICK, then=None, **more):
    """Run an arm with a fault before one decision, and another three later; give it, its lines and states."""
    settings = {"horizon": HORIZON, "updates": UPDATES, "growth": OPEN_GATES, "governor": governor, **more}
    config = run_config(TASK, controller, **settings)
    arm = Arm(config, task_of(TASK, examples=100), name)
    env, states = SimpleNamespace(episode=arm.episode, rows=1), []
    advance = arm.episode.advance

    def harmed(**how):
        due = {when: fault, when + 3: then}.get(arm.episode.decision)
        if due is not None:
            due(env, ROW)
        step = advance(**how)
        states.append(RowState.of(env, ROW))
        return step

    arm.episode.advance = harmed
    if path is None:
        return arm, [line for line, _ in arm.run(lambda: False)], states
    with RunStore(path, run_columns(config, "grow", HORIZON)) as store:
        lines = [line for line, _ in arm.run(lambda: False, store)]
        arm.result()
    return arm, lines, states


def seeds_begun(arm):
    return int(arm.episode.population.slots.seeds_made[ROW])


@pytest.mark.parametrize("fault", SKIPS.values(), ids=SKIPS)
def test_a_skipped_update_costs_nothing_but_itself(fault):
    calm, harmed = grown()[0], grown(fault)[0]
    assert calm.result().skipped_updates == 0
    result = harmed.result()
    # Ten, and then one in forty of the 180 updates that are left.
    assert result.skipped_updates == (14 if fault is half_precision else 1)
    assert (result.restorations, result.given_up) == (0, None)
    assert seeds_begun(harmed) >= seeds_begun(calm) > 0
    assert result.test_loss == pytest.approx(calm.result().test_loss, rel=0.2)


def test_half_precision_survives_from_the_first_update_on():
    result = grown(half_precision, 0)[0].result()
    assert result.skipped_updates == 10 + 7
    assert (result.restorations, result.given_up) == (0, None)


def test_a_failed_state_is_restored_bit_for_bit_and_goes_on():
    arm, lines, states = grown(nan_in_weights)
    assert [line.failure is not None for line in lines] == [decision == WHEN for decision in range(HORIZON)]
    assert states[WHEN].same_as(states[WHEN - 1])
    assert not states[WHEN + 1].same_as(states[WHEN])
    # Only committed seeds are left, the controller begins others, and the network goes on learning.
    assert {slot.stage for slot in lines[WHEN].slots} <= {"FOSSILIZED", "CULLED", "EMBARGOED", "RESETTING", "DORMANT"}
    before = max(slot.parameters for slot in lines[WHEN - 1].slots)
    assert before > 0
    again = [slot.stage for line in lines[WHEN + 1 :] for slot in line.slots]
    assert "TRAINING" in again
    assert lines[-1].val_loss < lines[WHEN - 1].val_loss
    result = arm.result()
    assert (result.restorations, result.given_up) == (1, None)


def test_the_rate_is_lower_until_it_has_recovered():
    arm, _, _ = grown()
    rate = float(arm.episode.contexts.rate_R[ROW])
    for fault, failed in ((None, False), (nan_in_weights, True)):
        seen = []

        def noting(env, row, fault=fault, seen=seen):
            trainer = env.episode.trainer
            run = trainer.run
            trainer.run = lambda updates: seen.append(float(trainer.rate_R[row])) or run(updates)
            if fault is not None:
                fault(env, row)

        grown(noting)
        lower = QUICK.recovery_rate if failed else 1.0
        steps = QUICK.recovery_decisions
        assert seen == pytest.approx([rate, *[rate * lower] * steps, *[rate] * (HORIZON - WHEN - steps - 1)])


def test_a_learning_rate_that_is_far_too_high_is_given_up_in_its_last_good_state(tmp_path):
    arm, lines, states = grown(exploding_rate, path=tmp_path / "run.sqlite")
    result = arm.result()
    assert result.restorations == QUICK.most_restorations
    assert result.given_up in (PANIC_TEXT[Panic.DIVERGED], PANIC_TEXT[Panic.NOT_FINITE])
    last, good = states[-1], states[WHEN - 1]
    # The parameters, bit for bit; the harvest estimates running statistics anew where a seed on trial is gone.
    assert torch.equal(last.host[0], good.host[0])
    assert last.seeds.keys() == good.seeds.keys()
    assert all(torch.equal(last.seeds[site], good.seeds[site]) for site in last.seeds)
    assert result.test_loss < 2.5
    failures = [line.failure for line in lines if line.failure is not None]
    assert [failure.startswith("given up: ") for failure in failures] == [False] * QUICK.most_restorations + [True]
    # From then on it waits.
    over = max(line.decision for line in lines if line.failure is not None)
    assert {slot.stage for line in lines[over + 8 :] for slot in line.slots} <= {"DORMANT", "FOSSILIZED"}


def test_gradients_that_are_never_finite_again_are_given_up():
    arm, lines, _ = grown(dead_gradient, governor=GovernorConfig(most_skipped_updates=15, most_restorations=2))
    # Two decisions of ten updates each time.
    at = [line.decision for line in lines if line.failure is not None]
    assert at == [WHEN + 1, WHEN + 3, WHEN + 5]
    result = arm.result()
    assert (result.restorations, result.given_up) == (2, PANIC_TEXT[Panic.SKIPPED])
    assert result.skipped_updates == 60


@pytest.mark.parametrize("name", ["host alone", "everything from the start"])
def test_the_controls_go_on_as_well(name):
    arm, lines, states = grown(nan_in_weights, name=name)
    assert states[WHEN].same_as(states[WHEN - 1])
    result = arm.result()
    assert (result.restorations, result.given_up) == (1, None)
    assert lines[-1].val_loss < lines[WHEN - 1].val_loss
    assert {slot.stage for slot in lines[-1].slots} == {"DORMANT" if name == "host alone" else "FOSSILIZED"}


@pytest.mark.parametrize("level", ["lean", "full"])
def test_the_record_tells_of_it(tmp_path, level):
    path, at = tmp_path / "run.sqlite", WHEN + 3
    _, lines, _ = grown(nan_in_gradient, then=nan_in_weights, path=path, recording={"record": level})
    assert [line.decision for line in lines if line.failure is not None] == [at]
    (told,) = stored(path, "SELECT * FROM failure")
    assert (told["decision"], told["reason"], told["restored"]) == (at, PANIC_TEXT[Panic.NOT_FINITE], 1)
    assert told["learning_rate_share"] == pytest.approx(0.3)
    culled = column(path, "SELECT count(*) FROM transition WHERE actor = 'governor' AND after = 'CULLED'")
    assert culled == [told["culled_seeds"]]
    (episode,) = stored(path, "SELECT status, status_reason, skipped_updates, restorations FROM episode")
    # With a parameter that is not finite no update of the decision can be made.
    assert list(episode.values()) == ["finished", None, 1 + UPDATES, 1]
    incidents = stored(path, "SELECT subject, closed_unix_s FROM incident WHERE kind = 'host_failed'")
    assert [incident["subject"] for incident in incidents] == [f"grown, decision {at + 1}"]
    if level == "full":
        skipped = column(path, "SELECT skipped_updates FROM decision ORDER BY decision")
        assert skipped == [{WHEN: 1, at: UPDATES}.get(decision, 0) for decision in range(HORIZON)]


def test_a_restoration_costs_no_transfer(monkeypatch):
    """One a decision; the last has another one, for the harvest."""
    config = run_config(TASK, "heuristic", horizon=HORIZON, updates=1, batch=8, growth=OPEN_GATES)
    episode = Episode(config, task_of(TASK, examples=40), "heuristic", torch.arange(3), recovers=True)
    counts = []
    while not episode.done:
        if episode.decision == WHEN:
            nan_in_weights(SimpleNamespace(episode=episode, rows=3), 1)
        with monkeypatch.context() as patch:
            reads = reads_counted(patch)
            episode.advance(record=True)
            counts.append(reads.count("cpu"))
    assert episode.governor.restored_R.tolist() == [0, 1, 0]
    assert counts == [1] * (HORIZON - 1) + [2]


def test_no_other_row_notices():
    def played(fault):
        config = run_config(TASK, "random", horizon=HORIZON, updates=2, growth=OPEN_GATES)
        episode = Episode(config, task_of(TASK, examples=40), "random", torch.arange(4), recovers=True)
        env = SimpleNamespace(episode=episode, rows=4)
        states = []
        while not episode.done:
            if episode.decision == WHEN and fault is not None:
                fault(env, 1)
            episode.advance()
            states.append([RowState.of(env, row) for row in range(4)])
        return episode, states

    (_, calm), (episode, harmed) = played(None), played(nan_in_weights)
    assert episode.governor.restored_R.tolist() == [0, 1, 0, 0]
    assert harmed[WHEN][1].same_as(calm[WHEN - 1][1])
    for one, other in zip(calm, harmed, strict=True):
        assert all(one[row].same_as(other[row]) for row in (0, 2, 3))
    # It grows again.
    stages = episode.population.slots.stage[1]
    assert episode.population.slots.seeds_made[1] > 0
    assert stages.ne(int(Stage.DORMANT)).any()
