"""The same seed, the same history to the bit: with one thread and with two, in another process, recorded or not."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from esper.leyline.stages import Stage
from helpers.histories import DOOMED, HORIZON, WHO, Elsewhere, difference, global_state, history, play

names = pytest.mark.parametrize("name", list(WHO))
OTHER_SEEDS = """
import random, sys
from pathlib import Path
import numpy, sklearn.datasets, torch  # Some libraries draw a number while they are imported.
random.seed(5), numpy.random.seed(6), torch.manual_seed(7)
from helpers.histories import main
main(Path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Histories of this process, which has one thread."""
    return cache(lambda name: play(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """The same from another process: other orders of sets, other global seeds, and then two threads."""
    more = {"PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-W", "error", "-c", OTHER_SEEDS, str(tmp_path_factory.mktemp("elsewhere"))]
    run = subprocess.run(command, env=os.environ | more, capture_output=True, text=True, timeout=250, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    return Elsewhere(**json.loads(run.stdout))


@names
def test_histories_have_everything_in_them_that_could_differ(here, name):
    recording = here(name)
    assert set(recording.stages.flat) == {int(stage) for stage in Stage} - {int(Stage.UNKNOWN)}
    failed = np.flatnonzero(np.stack([step.panic_R for step in recording.steps]).any(0))
    assert failed.tolist() == list(DOOMED)
    assert any(step.culled_RS.any() for step in recording.steps)
    assert any((~step.accepted_R).any() for step in recording.steps)
    if name == "policy":
        # It draws: the rows do not do the same in the first decision, where they are all alike.
        assert len(np.unique(recording.steps[0].action_RH, axis=0)) > 5


@names
def test_another_process_and_other_global_seeds(here, elsewhere, name):
    assert difference(history(here(name)), elsewhere.alone[name]) is None


# On the machine that this was written on, one and two threads give other bits for every one of these histories, and of
# the training: what is split between them is split in the sums. So the two threads really work together here.


@names
def test_two_threads_twice(elsewhere, name):
    assert elsewhere.workers == 1
    assert difference(*elsewhere.pairs[name]) is None


@pytest.mark.parametrize("level", ["lean", "full"])
def test_a_training_with_two_threads_twice_once_recorded(elsewhere, level):
    first, second = elsewhere.trainings["off"], elsewhere.trainings[level]
    assert difference(first, second) is None
    assert {name.split(",")[0] for name in first} == {"rounds", "policy", "moments"}


def test_nobody_elses_random_numbers_are_used_or_changed(elsewhere):
    assert elsewhere.disturbed is None


# The fingerprints see what they should.


def test_a_bit_is_seen_wherever_it_is(here):
    recording = here("vector")
    first, last = history(recording), recording.steps[-1]
    loss_R = last.val_loss_R.copy()
    loss_R[0] = np.nextafter(loss_R[0], np.inf)
    steps = [*recording.steps[:-1], replace(last, val_loss_R=loss_R)]
    assert difference(first, history(replace(recording, steps=steps))) == f"decision {HORIZON - 1}, val_loss_R"
    for bank in recording.episode.population.banks:
        for tensor in (bank.theta.detach(), bank.second, bank.decay, *bank.buffers):
            kept = tensor.clone()
            tensor.view(-1)[-1] += 1
            assert difference(first, history(recording)).startswith("bank ")
            tensor.copy_(kept)
    assert difference(first, history(recording)) is None


def test_a_number_that_somebody_draws_is_seen():
    before = global_state()
    kept = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    for draw in (lambda: torch.rand(1), np.random.rand, random.random):
        draw()
        assert difference(before, global_state()) is not None
        torch.set_rng_state(kept[0])
        np.random.set_state(kept[1])  # noqa: NPY002
        random.setstate(kept[2])
    assert difference(before, global_state()) is None
