"""What was decided once is decided again: the episodes of `runs.json`, see `record.py`."""

import json
from collections import Counter

import pytest
import torch

from esper.leyline.config import RunConfig
from esper.leyline.stages import Stage
from replay import record
from replay.record import EPISODES, FILE, MOVED, MOVES, NEW_POLICY, ROWS, SETTINGS, difference, digest, main, play

WHOLE = json.loads(FILE.read_text())
RECORDED = WHOLE["episodes"]
NAMES = [f"{episode['config']['controller']} on {episode['config']['task']}" for episode in RECORDED]
HOW = "if Esper was meant to change what it decides, `make replay` records it anew"


@pytest.mark.parametrize("episode", RECORDED, ids=NAMES)
def test_every_decision_is_the_recorded_one(episode):
    found = difference(episode["lines"], play(RunConfig.model_validate(episode["config"])))
    assert found is None, f"seed {episode['config']['seed']}\n{found}\n{HOW}"


def test_the_hash_is_that_of_the_decisions():
    assert digest([episode["lines"] for episode in RECORDED]) == WHOLE["hash"], "runs.json was changed by hand"


def test_the_recorded_episodes_are_those_of_the_command():
    """Otherwise the command would record something else than what is committed."""
    told = [(config["task"], config["controller"], config["seed"]) for config in (e["config"] for e in RECORDED)]
    assert told == list(EPISODES)
    for episode in RECORDED:
        assert RunConfig.model_validate(episode["config"]).training.horizon == SETTINGS["training"]["horizon"]


def test_they_lead_through_the_whole_life_of_a_seed():
    for kind in ("mnist1d-mlp", "digits"):
        lines = [line for e in RECORDED if e["config"]["task"] == kind for line in e["lines"]]
        seen = Counter(word for line in lines for word in line.split(" -> ")[1].split())
        assert set(seen) == {stage.name for stage in Stage} - {Stage.UNKNOWN.name}
        assert sum("refused by" in line for line in lines) > 20
        assert {line.split(": ")[1].split()[0] for line in lines} >= {"GERMINATE", "ADVANCE", "FOSSILIZE", "CULL"}
    assert all(len(e["lines"]) == ROWS * SETTINGS["training"]["horizon"] for e in RECORDED)


# What the command does.


def test_the_first_difference_is_named():
    lines = RECORDED[0]["lines"]
    other = [*lines[:7], "decision 2 row 1: WAIT -> nowhere", "another", *lines[9:]]
    assert difference(lines, other) == f"recorded: {lines[7]}\n  played: decision 2 row 1: WAIT -> nowhere"
    assert difference(lines, lines[:-1]) == f"{len(lines)} lines recorded, {len(lines) - 1} played"
    assert difference(lines, lines) is None


def short(task, controller, seed):
    settings = {**SETTINGS, "training": {**SETTINGS["training"], "horizon": 6}}
    return RunConfig.model_validate({"task": task, "controller": controller, "seed": seed, **settings})


def record_short(monkeypatch, path):
    """Let the command record one episode of a few decisions at a path; give its configuration."""
    config = short("mnist1d-mlp", NEW_POLICY, 1)
    monkeypatch.setattr(record, "FILE", path)
    monkeypatch.setattr(record, "EPISODES", [("mnist1d-mlp", NEW_POLICY, 1)])
    monkeypatch.setitem(SETTINGS, "training", config.training)
    return config


def test_what_is_recorded_can_be_read_and_is_what_was_played(monkeypatch, tmp_path):
    path = tmp_path / "runs.json"
    config = record_short(monkeypatch, path)
    monkeypatch.setattr(record, "doubtful", lambda config, lines: None)
    assert main() == 0
    whole = json.loads(path.read_text())
    (episode,) = whole["episodes"]
    assert RunConfig.model_validate(episode["config"]) == config
    assert episode["lines"] == play(config)
    assert whole["hash"] == digest([episode["lines"]])


@pytest.mark.parametrize("way", [{"dtype": torch.float64}, {"move": 0}, {"move": MOVES - 1}])
def test_a_run_that_hangs_by_a_rounding_is_not_recorded(monkeypatch, tmp_path, capsys, way):
    path = tmp_path / "runs.json"
    record_short(monkeypatch, path)
    monkeypatch.setattr(record, "play", lambda config, **how: ["as it is", "another" if how == way else "one"])
    assert main() == 2
    assert not path.exists()
    assert capsys.readouterr().out == (
        f"mnist1d-mlp, {NEW_POLICY}, seed 1 hangs by a rounding; take another seed\nrecorded: one\n  played: another\n"
    )


def test_the_weights_of_policy_and_hosts_are_moved_a_little(monkeypatch):
    move, moved = record._move, []

    def watched(weights, seed):
        weights = list(weights)
        before = [weight.detach().clone() for weight in weights]
        move(weights, seed)
        moved.append([((w - b) / b).abs().max().item() for w, b in zip(weights, before, strict=True) if (b != 0).all()])

    monkeypatch.setattr(record, "_move", watched)
    play(short("mnist1d-mlp", NEW_POLICY, 1), move=2)
    of_policy, of_hosts = moved
    assert len(of_policy) > 5
    assert len(of_hosts) == 1
    assert all(0.5 * MOVED < change < 1.1 * MOVED for change in (*of_policy, *of_hosts))
    moved.clear()
    play(short("mnist1d-mlp", NEW_POLICY, 1))
    assert {change for changes in moved for change in changes} == {0.0}
