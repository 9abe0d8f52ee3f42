"""What a rollback leaves in the record: who, when, what it cost and why."""

from itertools import pairwise

import pytest

from esper.leyline.panics import PANIC_TEXT, Panic
from esper.nissa.store import RunStore
from esper.simic.recorder import RoundRecorder, run_columns
from esper.simic.story import events_of
from helpers.environments import environment, onward, play
from helpers.faults import half_precision, harmed, nan_in_weights
from helpers.stored import column, stored

HORIZON, WHEN, ROW = 16, 12, 1
"""As in the tests of rollbacks: a committed seed in slot 0, a live one in slot 1."""
WHY = PANIC_TEXT[Panic.NOT_FINITE]


def recorded(path, deed, **more):
    """Play an episode into a store, as training does."""
    env = environment(record=True, horizon=HORIZON, rollback_penalty=0.25, **more)
    recorders, steps = [], []
    with RunStore(path, run_columns(env._config, "test", HORIZON)) as store:

        def each(decision, payment):
            if not recorders:
                how = {"purpose": "train", "arm": "policy", "controller": "policy"}
                recorders.append(RoundRecorder(store, 0, env.episode, **how))
            for step in payment.steps:
                steps.append(step)
                recorders[0].decision(step)

        played = play(env, deed(env), 0, each)
        steps.append(env.episode.step())
        recorders[0].decision(steps[-1])
        recorders[0].end("finished", {"reward": played.return_R.numpy()})
    return env, played, steps


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "run.sqlite"
    return path, *recorded(path, lambda env: harmed(env, onward(0, 1, rows=(1, 2, 4)), nan_in_weights, (ROW,), WHEN))


def test_the_episode_says_so(failed):
    told = stored(failed[0], "SELECT status, status_reason FROM episode ORDER BY row")
    assert [tuple(row.values()) for row in told] == [
        ("rolled back", WHY) if row == ROW else ("finished", None) for row in range(6)
    ]


def test_the_failure_is_told_beside_it(failed):
    (told,) = stored(failed[0], "SELECT * FROM failure")
    assert told.pop("unix_s") > 0
    expected = {"round": 0, "decision": WHEN, "row": ROW, "reason": WHY, "culled_seeds": 1, "restored": 0}
    assert told == {**expected, "learning_rate_share": None}


def test_skipped_updates_are_counted_and_are_no_failure(tmp_path):
    path = tmp_path / "run.sqlite"
    recorded(path, lambda env: harmed(env, onward(0, 1, rows=(1, 2, 4)), half_precision, (ROW,), 3))
    counts = column(path, "SELECT skipped_updates FROM decision WHERE row = ? ORDER BY decision", ROW)
    assert counts == [1 if 3 <= decision < 13 else 0 for decision in range(HORIZON)]
    assert column(path, "SELECT sum(skipped_updates) FROM decision WHERE row != ?", ROW) == [0]
    assert column(path, "SELECT skipped_updates FROM episode ORDER BY row") == [0, 10, 0, 0, 0, 0]
    assert set(column(path, "SELECT status FROM episode")) == {"finished"}
    assert column(path, "SELECT count(*) FROM failure") == [0]
    # Ten of 96.
    (told,) = column(path, "SELECT message FROM incident WHERE kind = 'host_updates_skipped'")
    assert told == "10.4% of the updates of the hosts were skipped, because a gradient was not finite; limit 1%"


def test_each_culled_seed_has_a_transition(failed):
    (told,) = stored(failed[0], "SELECT * FROM transition WHERE actor = 'governor'")
    assert (told["decision"], told["row"], told["slot"], told["seed"]) == (WHEN, ROW, 1, 1)
    assert (told["op"], told["after"], told["allowed"], told["gate"]) == ("rollback", "CULLED", 1, None)
    assert told["reason"] == WHY


def test_the_life_of_every_seed_is_whole(failed):
    """Each transition of a slot begins in the stage in which the one before ended, and none is told twice."""
    told = stored(failed[0], "SELECT * FROM transition WHERE allowed ORDER BY row, slot, decision, step")
    for before, after in pairwise(told):
        if (before["row"], before["slot"]) == (after["row"], after["slot"]):
            assert after["before"] == before["after"]
    ends = column(failed[0], f"SELECT after FROM transition WHERE row = {ROW} AND slot = 1 ORDER BY decision, step")
    assert ends.count("CULLED") == 1
    assert ends[-1] in ("EMBARGOED", "RESETTING", "DORMANT")


def test_the_penalty_is_part_of_the_reward(failed):
    path, _, played, _ = failed
    told = stored(path, f"SELECT reward, reward_penalty FROM decision WHERE row = {ROW} ORDER BY decision")
    assert [row["reward_penalty"] for row in told] == [0] * WHEN + [-0.25] + [0] * (HORIZON - WHEN - 1)
    assert [row["reward"] for row in told] == pytest.approx(played.reward_DR[:, ROW].tolist())
    assert column(path, "SELECT count(*) FROM incident WHERE kind = 'reward_parts_do_not_add_up'") == [0]


def test_what_was_measured_is_told(failed):
    losses = column(failed[0], f"SELECT val_loss_nats FROM decision WHERE row = {ROW} ORDER BY decision")
    assert losses[WHEN] is None
    assert losses[WHEN + 1 :] == [losses[WHEN - 1]] * (HORIZON - WHEN - 1)


def test_it_is_an_incident(failed):
    told = column(failed[0], "SELECT message FROM incident WHERE kind = 'rollback'")
    assert told == ["1 hosts were rolled back in a round"]


def test_the_story_tells_it_in_words(failed):
    _, env, _, steps = failed
    event = events_of(steps[WHEN], ROW, env.task.host.slot_config)[-1]
    assert (event.actor, event.what, event.after, event.reason) == ("governor", "rollback", "CULLED", WHY)


def test_a_seed_that_was_committed_too_late_is_culled(tmp_path):
    """Its commitment is the decision that failed: the last good state did not have it."""
    # Decision 8 commits the seed that was germinated at 0.
    path = tmp_path / "run.sqlite"
    _, _, steps = recorded(
        path, lambda env: harmed(env, onward(0, rows=(1, 2)), nan_in_weights, (ROW,), committing(env))
    )
    query = "SELECT actor, before, after FROM transition WHERE row = ? AND seed = 0 AND allowed ORDER BY decision, step"
    assert [tuple(row.values()) for row in stored(path, query, ROW)][-2:] == [
        ("controller", "PROBATIONARY", "FOSSILIZED"),
        ("governor", "FOSSILIZED", "CULLED"),
    ]
    assert steps[-1].slots["seed_id"][ROW].tolist() == [-1, -1, -1]


def committing(env):
    """The decision in which a seed that is brought on at once is committed."""
    told = []
    again = environment(horizon=HORIZON)
    play(again, onward(0, rows=(1, 2)), 0, lambda d, p: told.append(int(again.episode.population.slots.stage[1, 0])))
    return told.index(7)
