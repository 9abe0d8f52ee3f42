"""Training a policy: what a few short rounds leave behind, and what they are reproducible in."""

import sqlite3
from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from esper.leyline.config import ContextConfig, TrainConfig
from esper.leyline.starts import JUDGEMENT, SELECTION, TRAINING
from esper.nissa.store import RunStore
from esper.nissa.writer import Kept
from esper.simic.recorder import run_columns
from esper.simic.run_folder import BEST_POLICY
from esper.simic.train import PolicyTraining
from esper.tamiyo.policy.network import FactoredRecurrentActorCritic
from esper.tamiyo.policy.saved import load_policy, read_policy
from esper.tolaria.checkpoints import Checkpoints
from esper.tolaria.evaluation import evaluate
from helpers.episodes import OPEN_GATES, task_of

ROUNDS = 3
HOSTS = 24 + 6
"""Of an evaluation on one start: one in every context, and a twin for each condition."""


def configured(**more):
    settings = {
        "task": "mnist1d-mlp",
        "rounds": ROUNDS,
        "rows": 8,
        "group_size": 4,
        "select_every": 2,
        "selection_starts": 1,
        "judgement_starts": 2,
        "growth": OPEN_GATES,
        "training": {"horizon": 9, "updates_per_decision": 1, "batch_size": 8},
    }
    return TrainConfig.model_validate(settings | more)


def train(folder, config, *, store=False, stop_after=ROUNDS, resume=False):
    """Train, or go on; give the lines, the training, and what the best policy is worth if it was trained to the end."""
    checkpoint = Checkpoints(folder).load(print) if resume else None
    kept = Kept(checkpoint.facts["recorded_rounds"]) if checkpoint else None
    run = RunStore(folder / "run.sqlite", run_columns(config, "train", 1), kept=kept) if store else None
    tasks = [task_of(config.task, examples=40, width=width) for width in config.contexts.host_widths]
    training = PolicyTraining(config, tasks, folder, run, checkpoint)
    lines = list(training.run(lambda: training.agent.updates >= stop_after))
    worth = training.judge(load_policy(folder / BEST_POLICY), greedy=True) if (folder / BEST_POLICY).exists() else None
    if run is not None:
        run.close("finished")
    return lines, training, worth


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One recorded run: its folder, its lines, the training, and what the best policy is worth."""
    folder = tmp_path_factory.mktemp("trained")
    return (folder, *train(folder, configured(), store=True))


@pytest.fixture
def ask(trained):
    def answer(sql):
        with closing(sqlite3.connect(f"file:{trained[0] / 'run.sqlite'}?mode=ro", uri=True)) as db:
            return db.execute(sql).fetchall()

    return answer


def facts(line):
    """Everything of a line but its time."""
    return {name: value for name, value in vars(line).items() if name != "seconds"}


def test_every_round_is_told(trained):
    _, lines, training, _ = trained
    assert [line.number for line in lines] == [0, 1, 2]
    # Every second round, and the last.
    assert [line.selected is not None for line in lines] == [False, True, True]
    assert all(line.episodes == 6 for line in lines), "twins are not learned from"
    assert training.agent.updates == ROUNDS


def test_the_same_run_again_and_unrecorded_is_the_same_to_the_bit(trained, tmp_path):
    _, lines, training, worth = trained
    again, other, other_worth = train(tmp_path, configured())
    assert repr([facts(line) for line in again]) == repr([facts(line) for line in lines])
    assert repr(other_worth) == repr(worth)
    theirs = other.policy.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in training.policy.state_dict().items())


def test_another_seed_is_another_run(trained, tmp_path):
    _, lines, _, _ = trained
    others, _, _ = train(tmp_path, configured(seed=1), stop_after=1)
    assert others[0].return_mean != lines[0].return_mean


def kept_policy(folder):
    """The policy of the newest checkpoint."""
    return read_policy(Checkpoints(folder).load(print).files, folder)


def test_what_is_on_the_disk_is_the_policy_of_the_last_round(trained):
    folder, _, training, _ = trained
    last = kept_policy(folder).state_dict()
    assert all(torch.equal(tensor, last[name]) for name, tensor in training.policy.state_dict().items())


def test_a_stopped_run_keeps_its_policy(tmp_path):
    lines, training, worth = train(tmp_path, configured(), stop_after=1)
    assert (len(lines), worth) == (1, None)
    kept = kept_policy(tmp_path).state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in training.policy.state_dict().items())


def contents(folder):
    """Every row of the record but for what clocks and processes say."""
    with closing(sqlite3.connect(folder / "run.sqlite")) as db:
        db.row_factory = sqlite3.Row
        tables = ("round", "head", "layer", "episode", "decision", "slot", "transition", "gate_check")
        rows = {table: [dict(row) for row in db.execute(f"SELECT * FROM {table} ORDER BY 1, 2, 3")] for table in tables}
    clocks = ("_s", "_unix_s")
    return {t: [{k: v for k, v in row.items() if not k.endswith(clocks)} for row in of] for t, of in rows.items()}


def test_only_what_is_learned_from_explores_and_less_and_less(tmp_path, monkeypatch):
    whole, seen = FactoredRecurrentActorCritic.get_action, []

    def watched(policy, observation, masks, hidden, uniform_RH, *, greedy, uniform_share):
        seen.append((greedy, uniform_share))
        return whole(policy, observation, masks, hidden, uniform_RH, greedy=greedy, uniform_share=uniform_share)

    monkeypatch.setattr(FactoredRecurrentActorCritic, "get_action", watched)
    _, training, _ = train(tmp_path, configured(ppo={"uniform_share": 0.1}))
    training.judge(training.policy, greedy=False)
    horizon = training.config.training.horizon
    assert all(len(set(seen[at : at + horizon])) == 1 for at in range(0, len(seen), horizon))
    # Three rounds, two selections among them, the judgement, greedy and sampled.
    expected = [(False, 0.1), (False, 0.05), (True, 0.0), (False, 0.0), (True, 0.0), (True, 0.0), (False, 0.0)]
    assert seen[::horizon] == [(greedy, pytest.approx(share)) for greedy, share in expected]


@pytest.mark.parametrize("made", [1, 2])
@pytest.mark.parametrize("widths", [(1.0,), (1.0, 0.5)])
def test_a_run_that_goes_on_is_one_that_never_stopped(tmp_path, made, widths):
    config = configured(contexts={"host_widths": widths}, select_every=1)
    whole, other = tmp_path / "whole", tmp_path / "other"
    for folder in (whole, other):
        folder.mkdir()
    lines, training, worth = train(whole, config, store=True)
    first, _, _ = train(other, config, store=True, stop_after=made)
    # The judgement of the stopped run stands in its record, where that of the whole one has more training.
    with closing(sqlite3.connect(other / "run.sqlite")) as db, db:
        db.execute("UPDATE run SET status = 'running'")
    rest, again, resumed = train(other, config, store=True, resume=True)
    assert [line.number for line in rest] == list(range(made, ROUNDS))
    assert repr([facts(line) for line in [*first, *rest]]) == repr([facts(line) for line in lines])
    assert repr(resumed) == repr(worth)
    theirs = again.policy.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in training.policy.state_dict().items())
    assert contents(other) == contents(whole)
    with closing(sqlite3.connect(other / "run.sqlite")) as db:
        assert db.execute("SELECT status, status_reason FROM run").fetchall() == [("finished", None)]


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    train(tmp_path, configured(), stop_after=1)
    checkpoint = Checkpoints(tmp_path).load(print)
    tasks = [task_of("mnist1d-mlp", examples=40)]
    for config, wrong, said in (
        (configured(), replace(checkpoint, facts={**checkpoint.facts, "kind": "grow"}), "of kind 'grow'"),
        (configured(policy={"width": 12}), checkpoint, "its policy is of another size"),
        (configured(), replace(checkpoint, files={**checkpoint.files, "learner.safetensors": b""}), "damaged"),
    ):
        with pytest.raises(ValueError, match=said):
            PolicyTraining(config, tasks, tmp_path, None, wrong)


def test_rounds_selections_and_the_judgement_are_recorded(ask):
    rounds = ask("SELECT purpose, arm, kl_nats IS NOT NULL, decisions, rows, ended_unix_s IS NOT NULL FROM round")
    learning, greedy = ("train", "policy", 1, 9, 8, 1), ("selection", "greedy", 0, 9, HOSTS, 1)
    assert rounds == [learning, learning, greedy, learning, greedy, ("test", "greedy", 0, 9, 2 * HOSTS, 1)]
    assert ask("SELECT count(*) FROM decision") == [((3 * 8 + 4 * HOSTS) * 9,)]
    assert ask("SELECT count(*), count(DISTINCT head) FROM head") == [(3 * 8, 8)]


def test_layers_are_recorded_where_it_is_asked_for(trained, ask, tmp_path):
    assert ask("SELECT count(*) FROM layer") == [(0,)]
    lines, training, _ = train(tmp_path, configured(ppo={"record_layers": True}), store=True, stop_after=2)
    # Nothing else has changed.
    for line, plain in zip(lines, trained[1][:2], strict=True):
        theirs = facts(line) | {"update": replace(line.update, layers={})}
        assert repr(theirs) == repr(facts(plain))
    with closing(sqlite3.connect(tmp_path / "run.sqlite")) as db:
        db.row_factory = sqlite3.Row
        rows = [dict(row) for row in db.execute("SELECT * FROM layer ORDER BY round, position")]
    told = [(0, lines[0].update.layers), (1, lines[1].update.layers)]
    expected = [
        {"round": number, "position": position, "layer": name, **vars(layer)}
        for number, layers in told
        for position, (name, layer) in enumerate(layers.items())
    ]
    assert rows == [{key: None if value != value else value for key, value in row.items()} for row in expected]
    assert len(rows) == 2 * len({name.rpartition(".")[0] for name, _ in training.policy.named_parameters()})


def test_the_recorded_reward_is_the_one_that_was_learned_from(trained, ask):
    _, lines, _, _ = trained
    means = ask("""
        SELECT avg(reward) FROM episode JOIN round USING (round)
        WHERE purpose = 'train' AND twin_row IS NOT NULL GROUP BY round ORDER BY round""")
    assert [mean for (mean,) in means] == pytest.approx([line.return_mean for line in lines], abs=1e-6)
    ((worst,),) = ask("SELECT max(abs(reward - reward_gain - reward_rent)) FROM decision")
    assert worst < 1e-12
    # An episode's reward is its lead less its rent, as the store has them: from the first measurement on.
    pairs = ask("""
        SELECT e.reward, t.val_loss_nats - e.val_loss_nats - e.rent_nats FROM episode AS e
        JOIN episode AS t ON t.round = e.twin_round AND t.row = e.twin_row""")
    assert len(pairs) == 3 * 6 + 4 * 24
    for reward, net in pairs:
        assert reward == pytest.approx(net, abs=1e-5)


def test_twins_stand_beside_their_group(ask):
    twins = ask("SELECT row, twin_round, twin_row FROM episode WHERE round = 3 ORDER BY row")
    assert twins == [(row, None if row % 4 == 0 else 3, None if row % 4 == 0 else row // 4 * 4) for row in range(8)]


def test_judgement_alone_touches_the_test_split(ask):
    touched = ask(
        "SELECT purpose, count(test_loss_nats), count(test_accuracy) FROM episode JOIN round USING (round) GROUP BY 1"
    )
    assert sorted(touched) == [("selection", 0, 0), ("test", 2 * HOSTS, 2 * HOSTS), ("train", 0, 0)]


def test_judgement_uses_starts_that_nothing_else_does(ask):
    starts = ask("SELECT purpose, row_id FROM episode JOIN round USING (round)")
    of = {purpose: {start for kind, start in starts if kind == purpose} for purpose in ("train", "selection", "test")}
    assert (of["selection"], of["test"]) == ({SELECTION[0]}, {*JUDGEMENT[:2]})
    assert all(start in TRAINING for start in of["train"])


def evaluated(folder, purpose):
    """What the learners of each evaluation of a purpose were: start, price, rate and noise."""
    with closing(sqlite3.connect(folder / "run.sqlite")) as db:
        rows = db.execute(
            """SELECT round, row_id, price_nats, learning_rate, label_noise_share FROM episode JOIN round USING (round)
            WHERE purpose = ? AND twin_row IS NOT NULL""",
            (purpose,),
        ).fetchall()
    return [sorted(row[1:] for row in rows if row[0] == number) for number in sorted({row[0] for row in rows})]


def test_evaluations_play_every_context_once_on_each_start_and_the_same_whatever_the_seed(trained, tmp_path):
    """Greedy learners that share start and context would be one and the same host."""
    config = ContextConfig()
    train(tmp_path, configured(seed=5), store=True)
    for purpose, starts, times in (("selection", SELECTION[:1], 2), ("test", JUDGEMENT[:2], 1)):
        every = sorted(product(starts, config.prices, config.learning_rates, config.label_noise))
        made = evaluated(trained[0], purpose)
        assert made == evaluated(tmp_path, purpose)
        assert len(made) == times
        for one in made:
            assert len(one) == len(every)
            for host, expected in zip(one, every, strict=True):
                assert host == pytest.approx(expected)


def test_hosts_of_an_evaluation_begin_alike_whatever_the_seed(tmp_path):
    thetas = []
    for seed in (0, 5):
        training = PolicyTraining(configured(seed=seed), [task_of("mnist1d-mlp", examples=40)], tmp_path, None)
        environments = training.selection.environment, training.environment
        for environment in environments:
            environment.reset(0)
        thetas.append([environment.parts[0].episode.population.hosts.theta.detach() for environment in environments])
    (selected, learned), (same, other) = thetas
    assert torch.equal(selected, same)
    assert not torch.equal(learned, other)


def test_a_selection_is_no_larger_than_a_round():
    config = TrainConfig()
    training = PolicyTraining(config, [task_of(config.task, examples=40)], Path(), None)
    assert training.selection.environment.rows <= config.rows
    assert len(training.selection.rollout.learners_N) == 24 * config.selection_starts


def test_worth_is_measured_against_the_twin_on_its_split(tmp_path):
    config = configured(objective={"preset": "loss"}, contexts={"prices": (0.1,), "label_noise": (0.0,)})
    _, training, worth = train(tmp_path, config)
    (part,) = training.judgement.environment.parts
    population, split = part.episode.population, task_of(config.task, examples=40).data.test
    loss_R = evaluate(population, split).loss_R
    # Two starts, three rates, one price: a twin and a learner of each.
    gains = [float(loss_R[row - 1] - loss_R[row]) for row in range(1, 12, 2)]
    assert population.rows == 12
    assert worth.gain_nats == pytest.approx(sum(gains) / len(gains), abs=1e-6)


def test_prices_rise_over_the_first_rounds_and_selection_pays_them_in_full(tmp_path):
    contexts = {"prices": (0.2,), "learning_rates": (0.01,), "label_noise": (0.0,)}
    config = configured(contexts=contexts, price_warmup=0.5, rounds=4, select_every=1)
    train(tmp_path, config, store=True, stop_after=4)
    with closing(sqlite3.connect(tmp_path / "run.sqlite")) as db:
        paid = db.execute("SELECT DISTINCT purpose, round, price_nats FROM episode JOIN round USING (round)").fetchall()
    # Half of four rounds: 0, a half, then all; selection and judgement always all.
    assert [price for purpose, _, price in sorted(paid) if purpose == "train"] == pytest.approx([0, 0.1, 0.2, 0.2])
    assert {price for purpose, _, price in paid if purpose != "train"} == {0.2}


def test_without_a_warmup_prices_are_paid_from_the_start(tmp_path):
    _, training, _ = train(tmp_path, configured(contexts={"prices": (0.2,)}, price_warmup=0.0), stop_after=1)
    assert training.environment.contexts.price_R.tolist() == pytest.approx([0.2] * 8)


def test_hosts_of_two_widths_are_two_rounds_of_the_record_and_one_of_learning(tmp_path):
    config = configured(contexts={"host_widths": (1.0, 0.5)}, select_every=1)
    lines, training, worth = train(tmp_path, config, store=True, stop_after=2)
    assert [line.episodes for line in lines] == [6, 6]
    with closing(sqlite3.connect(tmp_path / "run.sqlite")) as db:
        rounds = db.execute("SELECT round, purpose, rows, kl_nats IS NOT NULL FROM round ORDER BY round").fetchall()
        sizes = dict(db.execute("SELECT round, max(host_parameters) FROM episode GROUP BY round"))
        ((mean,),) = db.execute("SELECT avg(reward) FROM episode WHERE round IN (4, 5) AND twin_row IS NOT NULL")
        ((judged,),) = db.execute("""
            SELECT avg(t.test_loss_nats - e.test_loss_nats - e.rent_nats) FROM episode AS e
            JOIN episode AS t ON t.round = e.twin_round AND t.row = e.twin_row WHERE e.round IN (8, 9)""")
    kinds = ["train", "train", "selection", "selection", "train", "train", "selection", "selection", "test", "test"]
    # The update comes after both.
    rows = {"train": 4, "selection": HOSTS, "test": 2 * HOSTS}
    assert rounds == [(n, kind, rows[kind], int(kind == "train" and n % 2)) for n, kind in enumerate(kinds)]
    wide, narrow = (part.task.host.body.parameter_count for part in training.environment.parts)
    assert wide > narrow
    assert [sizes[n] for n in range(10)] == [wide, narrow] * 5
    assert mean == pytest.approx(lines[1].return_mean, abs=1e-6)
    assert judged == pytest.approx(worth.net_nats, abs=1e-5)
