"""A grow run that is stopped, or dies, anywhere ends as one that never was: results, model and record."""

import json
from dataclasses import replace

import pytest
import torch

from esper.kasmina import plain
from esper.leyline.actions import Blueprint, Op, Operator
from esper.nissa.store import RunStore
from esper.simic import grow_run
from esper.simic.grow import ARMS
from esper.simic.grow_run import GrowRun
from esper.simic.recorder import run_columns
from esper.simic.run_folder import RunFolder
from esper.tolaria.checkpoints import Checkpoint, Checkpoints
from helpers.episodes import OPEN_GATES, Script, run_config, task_of
from helpers.growing import QUICK, act, germinate
from helpers.stored import column, facts, stored

HORIZON = 10
MODEL = ("model.json", "model.safetensors", "model.py")


class Killed(BaseException):
    """Nothing behind it is done any more; how a whole process is killed is shown with the commands."""


def config_of(controller="random"):
    return run_config("digits-mlp", controller, horizon=HORIZON, updates=2, growth=QUICK)


def made(run):
    """Count the decisions of all arms."""
    arm = run.arm if not run.finished and run.arm.name == list(ARMS)[len(run.results)] else None
    return len(run.results) * HORIZON + (arm.episode.decision if arm else 0)


def make(folder, *, config=None, record=True, resume=False, stop=None, kill=None):
    """Run, or go on, until `stop` decisions were made or `kill` told of; give the run and what was told."""
    config = config or config_of()
    checkpoint = Checkpoints(folder).load(print) if resume else None
    run = GrowRun(config, task_of("digits-mlp", examples=60), checkpoint)
    place = RunFolder(folder, config, replace=False, resume=resume)
    kept = run.kept if checkpoint else None
    store = RunStore(place.store, run_columns(config, "grow", 3 * HORIZON), kept=kept) if record else None
    told = []
    try:
        for name, line, _ in run.run(lambda: stop is not None and made(run) >= stop, place, store):
            told.append((name, line.decision))
            if len(told) == kill:
                raise Killed
    except Killed:
        if store is not None:
            store.close("failed")
        return run, told
    if store is not None:
        store.close("finished" if run.finished else "interrupted")
    return run, told


def results_of(run):
    return [replace(result, seconds=0.0) for result in run.results]


def model_of(folder):
    return [(folder / name).read_bytes() for name in MODEL]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, *make(folder)


# One life, with or without its last action.
LIFE = {
    0: germinate(0, Blueprint.MLP_SMALL, Operator.ADD),
    1: act(Op.ADVANCE, 0),
    3: act(Op.ADVANCE, 0),
    6: act(Op.ADVANCE, 0),
    9: act(Op.FOSSILIZE, 0),
}


def grown(folder, life):
    """Grow with open gates by a script; give the result, the record's line of it and the network that was saved."""
    config = run_config("digits-mlp", horizon=HORIZON, updates=8, growth=OPEN_GATES)
    task = task_of("digits-mlp", examples=60)
    run = GrowRun(config, task)
    run.arm.episode.controller = Script(life)
    place = RunFolder(folder, config, replace=False)
    store = RunStore(place.store, run_columns(config, "grow", 3 * HORIZON))
    list(run.run(lambda: bool(run.results), place, store))
    store.close("interrupted")
    (line,) = stored(place.store, "SELECT * FROM episode WHERE round = 0")
    return run.results[0], line, plain.load(folder / "model.safetensors", folder / "model.json"), task


def test_the_saved_network_is_the_one_in_the_table_with_what_is_committed_and_nothing_else(tmp_path):
    ended = {}
    for name, life in {"committed": LIFE, "on trial": {d: a for d, a in LIFE.items() if d < HORIZON - 1}}.items():
        result, line, network, task = grown(tmp_path / name, life)
        with torch.no_grad():
            logits = network(task.data.test.x)
        loss = float(torch.nn.functional.cross_entropy(logits.double(), task.data.test.y))
        size = sum(p.numel() for p in network.parameters())
        assert result.test_loss == pytest.approx(loss, abs=1e-6)
        assert line["test_loss_nats"] == result.test_loss
        assert result.parameters == size == line["host_parameters"] + line["added_parameters"]
        assert line["committed_seeds"] == (line["added_parameters"] > 0) == (name == "committed")
        ended[name] = result
    assert ended["committed"].parameters > ended["on trial"].parameters == task.host.body.parameter_count
    assert abs(ended["committed"].test_loss - ended["on trial"].test_loss) > 1e-3
    harvested = "SELECT op FROM transition WHERE round = 0 AND actor = 'end of episode'"
    assert column(tmp_path / "on trial" / "run.sqlite", harvested) == ["harvest"]
    assert column(tmp_path / "committed" / "run.sqlite", harvested) == []


def every_line():
    return [(name, decision) for name in ARMS for decision in range(HORIZON)]


def test_undisturbed(whole):
    folder, run, told = whole
    assert told == every_line()
    assert [result.arm for result in run.results] == list(ARMS)
    assert run.finished
    assert column(folder / "run.sqlite", "SELECT count(*) FROM transition")[0] >= 5


@pytest.mark.parametrize("stop", [0, 1, HORIZON - 1, HORIZON, HORIZON + 1, 2 * HORIZON + 3, 3 * HORIZON - 1])
def test_stopped_and_gone_on_with(whole, tmp_path, stop):
    folder = tmp_path / "run"
    stopped, told = make(folder, stop=stop)
    assert not stopped.finished
    store = folder / "run.sqlite"
    assert column(store, "SELECT status FROM run") == ["interrupted"]
    run, more = make(folder, resume=True)
    # Within an arm the last decision before the stop is told of once more: its record travels with the next one.
    assert [*told[: len(told) - bool(stop % HORIZON)], *more] == every_line()
    check_same(folder, run, whole)


@pytest.mark.parametrize("saving", [0.0, 1e9], ids=["often", "seldom"])
@pytest.mark.parametrize("kill", [1, 4, HORIZON, HORIZON + 2, 3 * HORIZON])
def test_killed_and_gone_on_with(whole, tmp_path, monkeypatch, kill, saving):
    monkeypatch.setattr(grow_run, "SAVE_EVERY_S", saving)
    folder = tmp_path / "run"
    make(folder, kill=kill)
    monkeypatch.setattr(grow_run, "SAVE_EVERY_S", 1e9)
    run, _ = make(folder, resume=True)
    check_same(folder, run, whole)


def check_same(folder, run, whole):
    reference, ran, _ = whole
    assert results_of(run) == results_of(ran)
    assert model_of(folder) == model_of(reference)
    assert facts(folder / "run.sqlite") == facts(reference / "run.sqlite")
    # What was done twice is counted once.
    timed = "SELECT round, phase, sum(decisions) FROM timing WHERE phase <> 'write' GROUP BY round, phase"
    assert column(folder / "run.sqlite", timed) == column(reference / "run.sqlite", timed)


def test_stopped_at_every_decision(whole, tmp_path):
    folder = tmp_path / "run"
    make(folder, stop=1)
    for stop in range(2, 3 * HORIZON + 1):
        run, told = make(folder, resume=True, stop=stop)
        assert len(told) <= 2
    check_same(folder, run, whole)


def test_a_finished_run_is_told_again_and_nothing_is_trained(whole, tmp_path):
    folder = tmp_path / "run"
    ran, _ = make(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith("model")}
    run, told = make(folder, resume=True)
    assert told == []
    assert run.results == ran.results
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name in before} == before
    check_same(folder, run, whole)


def test_without_a_record(whole, tmp_path):
    folder = tmp_path / "run"
    make(folder, record=False, stop=8)
    run, _ = make(folder, record=False, resume=True)
    assert results_of(run) == results_of(whole[1])
    assert model_of(folder) == model_of(whole[0])
    assert not (folder / "run.sqlite").exists()


def test_checkpoints_change_no_number(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(grow_run, "SAVE_EVERY_S", 0.0)
    folder = tmp_path / "run"
    run, told = make(folder)
    assert told == every_line()
    check_same(folder, run, whole)


def test_the_manifest_says_what_grew_where(tmp_path):
    folder = tmp_path / "run"
    run, _ = make(folder, stop=5)
    newest = folder / "checkpoints" / (folder / "checkpoints" / "LATEST").read_text().strip()
    manifest = json.loads((newest / "manifest.json").read_text())
    episode = manifest["facts"]["episode"]
    assert (episode["decision"], episode["update"]) == (5, 10)
    slots = run.arm.episode.population.slots
    told = {
        (bank["site"], bank["blueprint"], row, seed)
        for bank in episode["topology"]["banks"]
        for row, seed in zip(bank["rows"], bank["seed_ids"], strict=True)
        if bank["blueprint"] is not None
    }
    assert {(site, row, seed) for site, _, row, seed in told} == {
        (site, row, int(slots.seed_id[row, site])) for row, site in (slots.seed_id >= 0).nonzero().tolist()
    }
    assert told


@pytest.mark.parametrize(
    ("fact", "complaint"),
    [({"kind": "train"}, "of kind 'train'"), ({"results": [{"arm": "x"}]}, "missing")],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, fact, complaint):
    folder = tmp_path / "run"
    make(folder, stop=2)
    saved = Checkpoints(folder).load(print)
    with pytest.raises((ValueError, TypeError), match=complaint):
        GrowRun(config_of(), task_of("digits-mlp", examples=60), Checkpoint(9, saved.facts | fact, saved.files))
