"""Cells: what they play, and that a search goes on where it was."""

import json

import numpy as np
import pytest
import torch

from esper.exam import cells as module
from esper.exam.cells import Cells, Episodes, kept_cells
from esper.exam.grid import play
from esper.exam.plans import NOTHING, Plan, Seed, plan_table
from esper.leyline.actions import Blueprint, Style
from esper.leyline.config import ContextConfig
from esper.leyline.errors import EsperError
from esper.leyline.starts import CHOICE
from esper.simic.contexts import conditions, grid
from esper.simic.run_folder import CELLS
from esper.tamiyo.controllers.plan import PlanController
from helpers.exams import NOISE, RATES, exam_tasks, headroom_config

PLANS = (
    NOTHING,
    Plan((Seed(0, Blueprint.NORM, Style.LINEAR_MULTIPLY),)),
    Plan((Seed(1, Blueprint.MLP_SMALL, Style.LINEAR_ADD, begin=2), Seed(2, Blueprint.NORM, Style.GATED_GATE, begin=3))),
)


def some_episodes(host=1):
    """Two starts, two of four conditions, three plans."""
    start, condition, plan = np.meshgrid(CHOICE.start + np.arange(2), [1, 2], np.arange(3), indexing="ij")
    return Episodes(host, start.flatten(), condition.flatten(), plan.flatten())


def cells_in(folder, **more):
    return Cells(folder, headroom_config(), exam_tasks(), PLANS, **more)


@pytest.fixture
def small_cells(monkeypatch):
    monkeypatch.setattr(module, "ROWS", 5)


def test_an_episode_is_what_the_plan_does_alone(tmp_path):
    loss_R, cost_R = cells_in(tmp_path).play(some_episodes())
    config, (_, task) = headroom_config(), exam_tasks()
    assert conditions(config.contexts)[2] == (RATES[1], NOISE[0])
    alone = grid(
        ContextConfig(learning_rates=RATES[1:], label_noise=NOISE[:1]), torch.tensor([CHOICE.start + 1]), (0.0,), 1
    )
    controller = PlanController(plan_table(PLANS[2:]), 3)
    ended = play(config, task, alone, lambda _: controller, lambda data: data.selection)
    # The last start, its second condition, the last plan.
    assert loss_R[-1] == pytest.approx(ended.loss[0], abs=1e-4)
    assert cost_R[-1] == pytest.approx(np.log1p(ended.added[0] / task.host.body.parameter_count))
    assert (cost_R[::3] == 0).all()
    assert (np.delete(cost_R, np.s_[::3]) > 0).all()


@pytest.mark.usefixtures("small_cells")
def test_a_killed_search_goes_on_to_the_same_numbers_bit_for_bit(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        folder.mkdir()
    at_once = cells_in(whole).play(some_episodes())
    decisions = []

    def stop(played):
        decisions.append(played)
        if len(decisions) == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cells_in(stopped, told=stop).play(some_episodes())
    # Twelve decisions of the first cell of three; the second was being played.
    assert len(kept_cells(stopped)) == 1
    told = []
    again = cells_in(stopped, told=told.append)
    assert again.kept_episodes == 5
    for one, other in zip(at_once, again.play(some_episodes()), strict=True):
        np.testing.assert_array_equal(one, other)
    assert told == sorted(told)
    assert told[-1] == 7
    files = [{file.name: file.read_bytes() for file in (folder / CELLS).iterdir()} for folder in (whole, stopped)]
    assert files[0] == files[1]
    assert sorted(files[0]) == ["00000.json", "00001.json", "00002.json"]
    # Everything is there: nothing is played.
    for one, other in zip(at_once, cells_in(stopped, told=pytest.fail).play(some_episodes()), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.usefixtures("small_cells")
def test_a_damaged_cell_and_those_behind_it_are_played_again(tmp_path):
    at_once = cells_in(tmp_path).play(some_episodes())
    second = tmp_path / CELLS / "00001.json"
    told = json.loads(second.read_text())
    for text in (json.dumps(told | {"cost": [0.0] * 5}), "", json.dumps(told | {"seal": ""})):
        second.write_text(text)
        assert len(kept_cells(tmp_path)) == 1
        for one, other in zip(at_once, cells_in(tmp_path).play(some_episodes()), strict=True):
            np.testing.assert_array_equal(one, other)
        assert len(kept_cells(tmp_path)) == 3


def test_a_cell_of_another_search_is_refused(tmp_path):
    cells_in(tmp_path).play(some_episodes())
    with pytest.raises(EsperError, match=r"00000\.json is of another search; begin again with --out and --replace"):
        cells_in(tmp_path).play(some_episodes(host=0))
    others = Cells(tmp_path, headroom_config(), exam_tasks(), (NOTHING, PLANS[1], PLANS[1]))
    with pytest.raises(EsperError, match="another search"):
        others.play(some_episodes())
