"""Recording a round: what its end tells, what `lean` leaves out, and that no number of a run depends on it."""

import gc
import weakref

import numpy as np
import pytest
import torch

from esper.kasmina.blueprints.registry import seed_cost
from esper.kasmina.export import export_row
from esper.leyline.actions import Blueprint, Operator
from esper.leyline.stages import Stage
from esper.nissa.store import RunStore
from esper.simic.episode import Episode
from esper.simic.grow import ARMS, GROWN, Arm
from esper.simic.recorder import RoundRecorder, run_columns
from esper.tolaria.evaluation import coalition_losses, evaluate
from helpers.episodes import OPEN_GATES, Script, run_config, task_of
from helpers.growing import act, germinate, to_fossilized
from helpers.recorded import ROUND, Wild, record_walk, save_new_policy, walk_config
from helpers.run_stores import rows, run_of, values

TASK = "mnist1d-mlp"


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_new_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    return record_walk(walk_config(TASK, "random"), 24, tmp_path_factory.mktemp("store") / "run.sqlite")


# The round and its episodes.


def test_the_round(walk):
    (told,) = rows(walk.path, "SELECT * FROM round")
    last = walk.steps[-1]
    assert {name: told[name] for name in ("round", "purpose", "arm", "controller", "grows", "rows")} == {
        **{"round": ROUND, "purpose": "train", "arm": "walk", "controller": "random", "grows": 1, "rows": 24}
    }
    assert (told["horizon_decisions"], told["updates_per_decision"], told["decisions"]) == (40, 1, 40)
    assert told["train_loss_nats"] == pytest.approx(last.train_loss_R.mean())
    assert told["val_loss_nats"] == pytest.approx(last.val_loss_R.mean())
    assert told["val_accuracy"] == pytest.approx(last.val_accuracy_R.mean())
    assert told["started_unix_s"] < told["ended_unix_s"]
    # Nobody learned to decide.
    assert told["kl_nats"] is told["update_s"] is told["minibatches"] is None


def test_the_run_says_how_it_was_asked_for(walk):
    told = run_of(walk.path)
    config = walk.episode.config
    assert told["config"] == config.model_dump_json()
    assert (told["task"], told["controller"], told["level"]) == (TASK, "random", "full")
    assert (told["command"], told["planned_decisions"], told["status"]) == ("test", 40, "finished")
    assert run_columns(config, "test", 1)["run_id"] != told["run_id"]


def test_the_limits_of_the_gates(walk):
    limits = values(walk.path, "SELECT limit_value FROM gate_check ORDER BY position")
    gates = walk.episode.config.growth.gates
    assert limits[0] is None
    assert set(limits) >= {gates.min_training_decisions, gates.min_probation_decisions, gates.max_gradient_ratio}
    first = walk.steps[0].limit_CRS[:, 0, 0]
    errors = values(walk.path, "SELECT standard_errors FROM gate_check ORDER BY position")
    for limit, multiple, told in zip(limits, errors, first, strict=True):
        if multiple is None:
            assert limit == (pytest.approx(told) if np.isfinite(told) else None)
    assert [multiple for multiple in errors if multiple is not None] == [
        gates.incubator_gain_errors,
        gates.contribution_errors,
    ]


def test_the_end_of_every_episode(walk):
    population, host = walk.episode.population, walk.episode.task.host
    slots, last = walk.steps[-1].slots, walk.steps[-1]
    told = rows(walk.path, "SELECT * FROM episode ORDER BY row")
    assert len(told) == 24
    for row, episode in enumerate(told):
        added = cost = committed = 0
        for slot, site in enumerate(host.slot_config.sites):
            if slots["stage"][row, slot] == Stage.FOSSILIZED:
                committed += 1
                added += slots["parameters"][row, slot]
                kind = Blueprint(slots["blueprint"][row, slot]), Operator(slots["operator"][row, slot])
                cost += seed_cost(*kind, site)
        assert (episode["added_parameters"], episode["added_multiply_adds"]) == (added, cost)
        assert episode["committed_seeds"] == committed
        exported = sum(parameter.numel() for parameter in export_row(population, row).parameters())
        assert episode["host_parameters"] + episode["added_parameters"] == exported
        assert episode["rent_nats"] == pytest.approx(0.5 * np.log(exported / episode["host_parameters"]))
        assert episode["val_loss_nats"] == pytest.approx(last.val_loss_R[row], nan_ok=True)
        assert episode["val_accuracy"] == last.val_accuracy_R[row]
        assert (episode["round"], episode["row_id"]) == (ROUND, 10 + row)
        assert (episode["twin_round"], episode["twin_row"]) == (1, row)
        assert (episode["status"], episode["decisions"], episode["training_s"]) == ("finished", 40, 1.5)
        assert (episode["price_nats"], episode["learning_rate"], episode["test_accuracy"]) == (0.5, 0.005, 0.25)
        assert episode["host_multiply_adds"] == host.cost()
        assert episode["reward"] is episode["test_loss_nats"] is None
    assert len({episode["added_parameters"] for episode in told}) > 2
    assert sum(episode["committed_seeds"] for episode in told) > 0


def begin(path, config, rows_, **more):
    store = RunStore(path, run_columns(config, "test", 1), **more)
    episode = Episode(config, task_of(TASK, examples=40), config.controller, torch.arange(rows_))
    return store, episode, RoundRecorder(store, 0, episode, purpose="grow", arm="a", controller=config.controller)


@pytest.mark.parametrize(("controller", "grows"), [("never", 0), ("random", 1)])
def test_an_episode_that_runs_has_no_end(tmp_path, controller, grows):
    path = tmp_path / "run.sqlite"
    store, episode, recorder = begin(path, walk_config(TASK, controller), 2)
    with store:
        store.flush()
        before = rows(path, "SELECT * FROM episode ORDER BY row")
        assert values(path, "SELECT grows FROM round") == [grows]
        recorder.end("interrupted", {"training_s": 0.0})
    assert [row["status"] for row in before] == ["running"] * 2
    assert {row[name] for row in before for name in ("decisions", "added_parameters", "rent_nats", "twin_row")} == {
        None
    }
    # Stopped before the first decision: nothing is known of it but that.
    after = rows(path, "SELECT * FROM episode ORDER BY row")
    assert [(row["status"], row["decisions"], row["val_loss_nats"]) for row in after] == [("interrupted", 0, None)] * 2
    assert episode.decision == 0


def test_the_mean_of_a_round_leaves_out_hosts_that_diverged(tmp_path):
    path = tmp_path / "run.sqlite"
    store, episode, recorder = begin(path, walk_config(TASK, "never"), 3)
    with torch.no_grad():
        episode.population.hosts.theta[1] = float("nan")
    with store:
        episode.advance()
        step = episode.step()
        recorder.decision(step)
        recorder.end("finished", {})
    (told,) = rows(path, "SELECT * FROM round")
    assert told["val_loss_nats"] == pytest.approx(step.val_loss_R[[0, 2]].mean())
    assert values(path, "SELECT val_loss_nats IS NULL FROM episode ORDER BY row") == [0, 1, 0]
    assert values(path, "SELECT val_loss_nats IS NULL FROM decision ORDER BY row") == [0, 1, 0]


def test_where_the_time_went(walk):
    told = rows(walk.path, "SELECT phase, sum(decisions) AS n, sum(wall_s) AS s FROM timing GROUP BY phase")
    phases = {row["phase"]: row for row in told}
    assert set(phases) >= {"observe", "act", "apply", "train", "measure", "write"}
    assert phases["train"]["n"] == phases["measure"]["n"] == 40
    assert all(row["s"] > 0 for row in told)


# What sets of seeds are worth.


def test_coalitions_of_a_run(tmp_path):
    path = tmp_path / "run.sqlite"
    kinds = [(Blueprint.MLP_SMALL, Operator.ADD), (Blueprint.NORM, Operator.GATE)]
    plans = [[germinate(slot, *kind), *to_fossilized(slot)] for slot, kind in zip((0, 2), kinds, strict=True)]
    script = dict(enumerate(plans[0] + plans[1] + [act(0, 0)]))
    growth = OPEN_GATES.model_copy(
        update={
            "gates": OPEN_GATES.gates.model_copy(update={"min_training_decisions": 1, "min_probation_decisions": 1})
        }
    )
    config = run_config(TASK, "periodic", horizon=len(script), updates=2, growth=growth)
    with RunStore(path, run_columns(config, "grow", len(script))) as store:
        arm = Arm(config, task_of(TASK, examples=40), GROWN)
        arm.episode.controller = Script(script)
        for _ in arm.run(lambda: False, store):
            pass
        result = arm.result()
    told = rows(path, "SELECT * FROM contribution ORDER BY coalition")
    # Of slots 0 and 2.
    assert [row["coalition"] for row in told] == [0b000, 0b001, 0b100, 0b101]
    assert {(row["round"], row["row"], row["examples"], row["decision"]) for row in told} == {
        (list(ARMS).index(GROWN), 0, 40, len(script) - 1)
    }
    sets = np.array([[0, 0, 0], [1, 0, 0], [0, 0, 1], [1, 0, 1]], dtype=bool)
    population, split = arm.episode.population, arm.task.data.reward_validation
    losses = coalition_losses(population, split, np.zeros(4, dtype=int), sets)
    assert [row["loss_nats"] for row in told] == losses.tolist()
    assert len(set(losses.tolist())) == 4
    assert losses[3] == evaluate(population, split).loss_R[0]
    (episode,) = rows(path, "SELECT * FROM episode")
    assert episode["committed_seeds"] == 2
    assert (episode["test_accuracy"], episode["test_loss_nats"]) == (result.test_accuracy, result.test_loss)


def test_coalitions_of_several_rows(tmp_path):
    path = tmp_path / "run.sqlite"
    store, _, recorder = begin(path, walk_config(TASK, "never"), 2)
    sets = np.array([[0, 0, 0], [1, 1, 0], [0, 1, 1]], dtype=bool)
    with store:
        recorder.coalitions(np.array([0, 1, 1]), sets, torch.tensor([0.5, float("nan"), 2.0]), 7)
    told = rows(path, "SELECT row, coalition, loss_nats, examples FROM contribution ORDER BY row, coalition")
    assert [tuple(row.values()) for row in told] == [(0, 0, 0.5, 7), (1, 3, None, 7), (1, 6, 2.0, 7)]


# Levels.

TABLES = ("gate_check", "round", "head", "layer", "episode", "transition", "contribution", "decision", "slot")


def test_lean_leaves_out_single_decisions_and_nothing_else(tmp_path, policy):
    stores = {}
    for level in ("lean", "full"):
        config = walk_config("digits-mlp", f"policy:{policy}", level=level, horizon=20)
        path = record_walk(config, 6, tmp_path / level).path
        stores[level] = {name: rows(path, f"SELECT * FROM {name}") for name in TABLES}
        assert run_of(path)["level"] == level
    lean, full = stores["lean"], stores["full"]
    for table in (*lean["round"], *full["round"]):
        del table["started_unix_s"], table["ended_unix_s"]
    assert full["decision"]
    assert full["slot"]
    assert lean["decision"] == lean["slot"] == []
    assert full["transition"]
    for name in ("gate_check", "round", "head", "layer", "episode", "transition", "contribution"):
        assert lean[name] == full[name], name


def same(one, other):
    """Check that two recordings are the same to the bit, parameters, losses and actions."""
    np.testing.assert_equal(one.episode.decision, other.episode.decision)
    for step, like in zip(one.steps, other.steps, strict=True):
        for name in ("action_RH", "refused_by_R", "train_loss_R", "val_loss_R", "val_accuracy_R", "log_prob_RH"):
            np.testing.assert_array_equal(getattr(step, name), getattr(like, name))
        for name, array in step.slots.items():
            np.testing.assert_array_equal(array, like.slots[name])
    banks, others = (list(recorded.episode.population.banks) for recorded in (one, other))
    for bank, like in zip(banks, others, strict=True):
        assert torch.equal(bank.theta, like.theta)


@pytest.mark.parametrize("who", ["random", "policy", "wild"])
def test_no_number_depends_on_the_recording(tmp_path, policy, who):
    made = {}
    for level in ("off", "lean", "full"):
        config = walk_config("digits-mlp", {"policy": f"policy:{policy}", "wild": "never"}.get(who, who), level=level)
        made[level] = record_walk(config, 8, tmp_path / level, controller=Wild(8) if who == "wild" else None)
        assert (tmp_path / level).exists() == (level != "off")
    same(made["off"], made["lean"])
    same(made["off"], made["full"])
    # Something was there to differ.
    assert (made["off"].steps[-1].acted.seed_id >= 0).sum() > 3


def test_an_arm_is_the_same_with_and_without_a_store(tmp_path):
    config = walk_config(TASK, "random", horizon=25)
    told = []
    for path in (None, tmp_path / "run.sqlite"):
        store = RunStore(path, run_columns(config, "grow", 25)) if path else None
        arm = Arm(config, task_of(TASK, examples=40), GROWN)
        lines = [(line.val_loss, line.slots, line.parameters, events) for line, events in arm.run(lambda: False, store)]
        result = arm.result()
        told.append((lines, result.test_loss, arm.episode.population.hosts.theta.detach().clone()))
        if store is not None:
            store.close("finished")
    assert told[0][:2] == told[1][:2]
    assert torch.equal(told[0][2], told[1][2])


# A store that ended before the run did.


def test_a_run_that_goes_on_without_its_store_keeps_nothing_of_it(tmp_path):
    path, lines = tmp_path / "run.sqlite", []
    store, episode, recorder = begin(path, walk_config(TASK, "random"), 2, error="continue", report=lines.append)
    with store:
        path.unlink()
        store.flush()
        assert len(lines) == 1
        held = []
        for _ in range(5):
            episode.advance()
            step = episode.step()
            recorder.decision(step)
            held.append(weakref.ref(step))
        del step
        gc.collect()
        # The last one is needed for the end of the episode; the others would fill the memory of a long run.
        assert [reference() is None for reference in held] == [True] * 4 + [False]
        recorder.end("finished", {})
    assert len(lines) == 1
