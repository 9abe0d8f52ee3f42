"""Every configuration that is accepted can be run: rows stay whole or are rolled back, whatever the numbers are."""

import contextlib
import io
import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from pydantic import ValidationError

from esper.exam.cells import Cells
from esper.exam.headroom import measure, worth
from esper.exam.plans import Family, candidates
from esper.exam.saved import load_headroom, save_headroom
from esper.exam.search import rungs
from esper.leyline.config import HeadroomConfig, RunConfig, TrainConfig
from esper.leyline.errors import EsperError
from esper.leyline.panics import Panic
from esper.scripts.errors import BAD_INPUT
from esper.scripts.main import main
from esper.simic.contexts import Contexts, conditions
from esper.simic.episode import Episode
from esper.simic.train import PolicyTraining
from helpers.config_values import leaves, nested, some_settings
from helpers.episodes import TASK_NAMES, task_of
from helpers.fuzzing import cases, one_line
from helpers.stored import check_whole, column

SIZES = {
    "task": st.sampled_from(TASK_NAMES),
    "host": st.sampled_from(["impaired", "impaired", "ample"]),
    "device": st.just("cpu"),
    "training.horizon": st.integers(1, 6),
    "training.updates_per_decision": st.integers(1, 3),
    "training.batch_size": st.integers(2, 6),
}
"""What decides how long a run takes stays small; all else may be as extreme as its limits allow."""
OF_RUN = {**SIZES, "controller": st.sampled_from(["random", "random", "heuristic", "periodic"])}
OF_TRAINING = {
    **SIZES,
    "task": st.sampled_from(["digits-mlp", "mnist1d-mlp"]),
    "rounds": st.integers(1, 3),
    "rows": st.sampled_from([4, 6]),
    "group_size": st.sampled_from([2, 2, 3]),
    "select_every": st.integers(1, 2),
    "ppo.epochs": st.integers(1, 3),
    "ppo.minibatches": st.integers(1, 3),
    "policy.width": st.sampled_from([4, 8]),
    "policy.layers": st.integers(1, 2),
    "policy.hidden": st.integers(1, 8),
    "contexts.other_tasks": st.just([]),
    "selection_starts": st.integers(1, 2),
    "judgement_starts": st.integers(1, 2),
    "contexts.prices": st.sampled_from([[0.0], [5e-324], [1e9], [0.05, 0.05], [0.0, 0.1, 1e9]]),
    "contexts.learning_rates": st.sampled_from([[1e-12], [0.01], [1e9], [0.01, 1e3]]),
    "contexts.label_noise": st.sampled_from([[0.0], [math.nextafter(1, 0)], [0.0, 0.2]]),
    "contexts.host_widths": st.sampled_from([[1.0], [0.5], [5e-324], [1.0, 1.0], [0.3, 1.1]]),
}
OF_TABLE = {
    **SIZES,
    "task": st.sampled_from(["digits-mlp", "mnist1d-mlp"]),
    "host": st.just("impaired"),
    "training.horizon": st.integers(1, 3),
    "training.updates_per_decision": st.just(1),
    "blueprints": st.sampled_from([["norm"], ["mlp_large"], ["norm", "norm"]]),
    "starts": st.just(2),
    "episodes": st.just(1300),
    "plans_of": st.just([]),
    "contexts.learning_rates": st.sampled_from([[1e-12], [0.01], [1e9], [0.01, 1e3]]),
    "contexts.label_noise": st.sampled_from([[0.0], [math.nextafter(1, 0)]]),
    "contexts.other_tasks": st.just([]),
    "contexts.host_widths": st.sampled_from([[1.0], [5e-324], [0.3, 1.1]]),
}
OPEN = {
    "growth.gates.min_training_decisions": 1,
    "growth.gates.min_incubator_gain": -1e9,
    "growth.gates.min_gradient_ratio": 0.0,
    "growth.gates.min_probation_decisions": 1,
    "growth.gates.min_contribution": -1e9,
}
"""Seeds get into the forward pass within a few decisions."""


@st.composite
def settings_of(draw, kind, sizes):
    """Extreme settings that go together, of a size that can be run."""
    opened = OPEN if draw(st.booleans()) else {}
    return {**opened, **draw(some_settings(kind, without=tuple(sizes))), **{n: draw(s) for n, s in sizes.items()}}


def configured(kind, settings):
    """None where the settings contradict each other."""
    try:
        return kind.model_validate_json(json.dumps(nested(settings)), strict=True)
    except ValidationError:
        return None


@pytest.mark.parametrize(
    ("kind", "sizes"), [(RunConfig, OF_RUN), (TrainConfig, OF_TRAINING), (HeadroomConfig, OF_TABLE)]
)
def test_the_sizes_are_settings(kind, sizes):
    assert set(sizes) <= set(leaves(kind))
    assert set(OPEN) <= set(leaves(kind))


def whole(episode: Episode) -> None:
    """Hosts are finite, whether they are well or were put back; of those that are well the losses are numbers."""
    population, view = episode.population, episode.view()
    for table in (population.hosts.theta, *population.hosts.buffers):
        assert table.isfinite().all()
    well_R = ~episode.governor.retired_R
    assert view.train_loss_R[well_R].isfinite().all()
    assert view.val_loss_R[well_R].isfinite().all()
    assert not view.val_loss_R.isinf().any()
    assert ((population.slots.alpha >= 0) & (population.slots.alpha <= 1)).all()


def refusal(error: Exception) -> str:
    """What the command says of it, in one line: the only kind of error that anything here may end with."""
    shaping = type(error) is ValueError and str(error).startswith("objective: shaping_gamma")
    if not (shaping or isinstance(error, EsperError)):
        raise error
    return one_line(error)


@cases(40, 800, settings=settings_of(RunConfig, OF_RUN))
def test_an_episode(settings):
    config = configured(RunConfig, settings)
    if config is None:
        return
    task, ids = task_of(config.task, config.host, examples=40), torch.arange(3)
    contexts = Contexts.alone(config, ids, config.price)
    said = ""
    try:
        episode = Episode(config, task, config.controller, ids, contexts=contexts)
    except EsperError as error:
        said = refusal(error)
    if said:
        assert said.startswith("blueprints: none of ")
        return
    while not episode.done:
        episode.advance()
        step = episode.step()
        whole(episode)
        fine = step.panic_R == int(Panic.NONE)
        assert not torch.isinf(torch.from_numpy(step.val_loss_R[fine])).any()


def numbers_of(report) -> list[float]:
    return [value for value in asdict(report).values() if isinstance(value, float)]


@cases(10, 300, settings=settings_of(TrainConfig, OF_TRAINING))
def test_a_training(tmp_path_factory, settings):
    config = configured(TrainConfig, settings)
    if config is None:
        return
    tasks = [task_of(config.task, config.host, examples=40, width=w) for w in config.contexts.host_widths]
    said = "nothing"
    try:
        training = PolicyTraining(config, tasks, tmp_path_factory.mktemp("run"), None)
        for line in training.run(lambda: False):
            assert math.isfinite(line.return_mean)
            assert all(math.isfinite(value) for value in (line.worth.net_nats, line.worth.gain_nats))
            assert not any(math.isinf(value) for value in numbers_of(line.update))
            assert all(p.isfinite().all() for p in training.policy.parameters())
            for part in training.environment.parts:
                whole(part.episode)
    except Exception as error:
        said = refusal(error)
    assert said.startswith(("policy: ", "objective: shaping_gamma", "blueprints: ", "nothing")), said


@cases(3, 60, kind=st.sampled_from(["grow", "train"]), data=st.data())
def test_a_whole_command(tmp_path_factory, kind, data):
    """Records and saved networks take whatever comes of it, too."""
    config_kind, sizes = {"grow": (RunConfig, OF_RUN), "train": (TrainConfig, OF_TRAINING)}[kind]
    config = configured(config_kind, data.draw(settings_of(config_kind, sizes)))
    if config is None:
        return
    folder = tmp_path_factory.mktemp("command")
    (folder / "given.json").write_text(config.model_dump_json())
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([kind, "--config", str(folder / "given.json"), "--out", str(folder / "run")])
    assert code in (0, BAD_INPUT)
    assert len(err.getvalue().splitlines()) == (code == BAD_INPUT), err.getvalue()
    store = folder / "run" / "run.sqlite"
    if store.exists():
        check_whole(store)
        assert column(store, "SELECT status FROM run") == ["finished" if code == 0 else "failed"]


@cases(2, 80, settings=settings_of(HeadroomConfig, OF_TABLE))
def test_a_search_for_plans(tmp_path_factory, settings):
    """Its numbers are numbers, whatever became of the hosts, and it can be read again."""
    config = configured(HeadroomConfig, settings)
    if config is None:
        return
    tasks = [task_of(config.task, config.host, examples=40, width=w) for w in config.contexts.host_widths]
    slots = tasks[0].host.slot_config
    family, folder = Family.of(config, slots), tmp_path_factory.mktemp("table")
    cells = len(tasks) * len(conditions(config.contexts))
    plans = candidates(family, (), config.seed)
    ladder = rungs(config.episodes, cells, len(plans))
    plans = candidates(family, (), config.seed, ladder[0].plans)
    table = measure(config, plans, ladder, slots.slot_ids, Cells(folder, config, tasks, plans))
    assert np.isfinite(table.gain_VWKCP).all()
    assert np.isfinite(table.cost_VWKCP).all()
    assert all(math.isfinite(net) for p in range(len(table.prices)) for net in worth(table, p).net)
    save_headroom(folder, table)
    np.testing.assert_array_equal(load_headroom(folder).net_VWKCP, table.net_VWKCP)
