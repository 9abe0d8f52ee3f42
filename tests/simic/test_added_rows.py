"""Rows and slots that are added, or come in another order: nobody else's random numbers change, results by rounding."""

from collections import defaultdict
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from esper.kasmina.banks import Bank
from esper.kasmina.hosts import Host
from esper.leyline.actions import Blueprint, Operator
from esper.leyline.config import HostConfig, TrainConfig
from esper.leyline.streams import Stream
from esper.simic.collect import collect
from esper.simic.contexts import Contexts
from esper.simic.rollout import Rollout
from esper.simic.side_by_side import populations
from helpers.episodes import OPEN_GATES, Script, record, run_config, task_of
from helpers.growing import WAIT, germinate
from helpers.recorded import save_new_policy
from helpers.rollouts import small_policy

FEW = [0, 1, 2, 3]
OTHERS = {"more": [0, 1, 2, 3, 4, 5, 6], "mixed": [6, 2, 9, 0, 3, 11, 1]}
"""The same rows with more behind them, and among others in another order."""
others = pytest.mark.parametrize("others", OTHERS.values(), ids=OTHERS)
HOST = "host initialisation"
INITIAL = (HOST, "seed initialisation", "gate initialisation")
"""Streams that are drawn from for new lanes instead of for every row."""


@dataclass
class Drawn:
    """What is drawn while a population lives."""

    numbers: dict[str, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    """Numbers by name of their stream, in the order of the calls."""
    born: dict[tuple[str, int, int, str], torch.Tensor] = field(default_factory=dict)
    """Initial parameters by name of the stream, identity of the row, number of the seed, and what it computes."""

    def hosts(self):
        """Hosts by identity of the row."""
        return {key[1]: theta for key, theta in self.born.items() if key[0] == HOST}

    def grown(self):
        """Seeds and gates."""
        return {key: theta for key, theta in self.born.items() if key[0] != HOST}


@pytest.fixture
def watch(monkeypatch):
    """Give what will be drawn from now on."""
    kept = [Drawn()]
    begin, hold = Stream.__init__, Bank.hold

    def named(stream, seed, name):
        begin(stream, seed, name)
        stream.name = name

    def watched(draw):
        def call(stream, *args, **how):
            numbers = draw(stream, *args, **how)
            kept[-1].numbers[stream.name].append(numbers)
            return numbers

        return call

    def held(bank, row, seed_id, stream, init_id_R):
        before = set(zip(bank.row.tolist(), bank.seed_id.tolist(), strict=True))
        changed = hold(bank, row, seed_id, stream, init_id_R)
        for lane, (r, s) in enumerate(zip(row.tolist(), seed_id.tolist(), strict=True)):
            if (r, s) not in before:
                kept[-1].born[stream.name, int(init_id_R[r]), s, str(bank.layer.plain())] = (
                    bank.theta[lane].detach().clone()
                )
        return changed

    monkeypatch.setattr(Stream, "__init__", named)
    for name in ("integers", "uniform"):
        monkeypatch.setattr(Stream, name, watched(getattr(Stream, name)))
    monkeypatch.setattr(Bank, "hold", held)

    def fresh():
        kept.append(Drawn())
        return kept[-1]

    return fresh


def contexts_of(config, ids):
    """Learning rates that tell the rows apart, and labels of which some are wrong."""
    contexts = Contexts.alone(config, torch.tensor(ids))
    rates = [config.optimizer.learning_rate * (1 + i % 3) for i in ids]
    return replace(contexts, rate_R=torch.tensor(rates), noise_R=torch.full((len(ids),), 0.2))


def live(task, ids, controller, *, horizon=8, script=None):
    """Play these rows; the gates are open, so that nothing they do depends on a rounding."""
    config = run_config(task.config.name, controller, horizon=horizon, updates=1, batch=8, growth=OPEN_GATES)
    return record(config, task, ids, contexts=contexts_of(config, ids), controller=script and Script(script, len(ids)))


def same_draws(few, more, places):
    """Assert that the rows drew the same, those of the first at `places` of the second."""
    assert few.numbers.keys() == more.numbers.keys()
    for name in few.numbers.keys() - set(INITIAL):
        for ours, theirs in zip(few.numbers[name], more.numbers[name], strict=True):
            assert torch.equal(ours, theirs[places]), name


@others
@pytest.mark.parametrize(
    ("task", "controller"),
    [("digits", "random"), ("mnist1d", "random"), ("mnist1d-mlp", "random"), ("digits", "policy")],
)
def test_rows_draw_the_same_whoever_else_runs(watch, tmp_path, task, controller, others):
    name = f"policy:{save_new_policy(tmp_path)}" if controller == "policy" else controller
    loaded, places = task_of(task, examples=40), [others.index(row) for row in FEW]
    few = watch()
    ours = live(loaded, FEW, name)
    more = watch()
    theirs = live(loaded, others, name)
    kind = "policy sampling" if controller == "policy" else "controller/random"
    assert {*few.numbers} - set(INITIAL) == {"data order", "label noise", kind}
    same_draws(few, more, places)
    # Hosts, seeds and gates, as they were born.
    assert few.born.keys() == {key for key in more.born if key[1] in FEW}
    assert len(few.born) > 2 * len(FEW)
    assert all(torch.equal(theta, more.born[key]) for key, theta in few.born.items())
    # Results agree to rounding. Not those of the host of digits-mlp, which is linear between its norms: the shifts of
    # the first two have gradients of rounding alone, and AdamW makes steps of them (`test_episode` has it in float64).
    for one, other in zip(ours.steps, theirs.steps, strict=True):
        np.testing.assert_array_equal(one.action_RH, other.action_RH[places])
        np.testing.assert_allclose(one.val_loss_R, other.val_loss_R[places], rtol=2e-5)
        np.testing.assert_allclose(one.train_loss_R, other.train_loss_R[places], rtol=2e-5)
    assert len({*ours.steps[0].train_loss_R.tolist()}) == len(FEW)


def test_a_second_population_changes_nothing_for_the_first(watch):
    """Learners that share a round: the rows of the first population draw what they draw without a second one."""
    drawn, actions = [], []
    for widths in ((1.0,), (1.0, 0.5)):
        settings = {"rows": 8 * len(widths), "group_size": 4, "growth": OPEN_GATES, "contexts": {"host_widths": widths}}
        training = {"horizon": 6, "updates_per_decision": 1, "batch_size": 8}
        config = TrainConfig.model_validate({"task": "digits-mlp", "training": training, **settings})
        together = populations(config, [task_of("digits-mlp", examples=40, width=width) for width in widths])
        drawn.append(watch())
        rollout = collect(together, small_policy(), Rollout(6, together.rows, together.slots), 0, 3)
        actions.append(rollout.action_TRH[:, :8])
    for ours, theirs in zip(*(of.numbers["policy sampling"] for of in drawn), strict=True):
        assert torch.equal(ours, theirs[:8])
    assert torch.equal(*(of.numbers["label noise"][0] for of in drawn))
    assert all(torch.equal(theta, drawn[1].born[key]) for key, theta in drawn[0].born.items())
    assert torch.equal(*actions)


# One slot more.


def chain(kind, sites):
    """A task whose host has so many sites of the same shape."""
    task = task_of({"vector": "digits-mlp", "signal": "mnist1d", "image": "digits"}[kind], examples=40)
    host = Host(HostConfig(kind=kind, widths=(6,) * sites), task.host.example, task.data.classes)
    return replace(task, host=host)


def first_two(second_site):
    """Germinate at the first site, and then at another one, with a gate each."""
    kind = Blueprint.LORA_SMALL
    plan = [germinate(0, kind, Operator.GATE), WAIT, germinate(second_site, kind, Operator.GATE), WAIT]
    return dict(enumerate(plan))


@pytest.mark.parametrize("kind", ["vector", "signal", "image"])
def test_a_slot_more_changes_nobody_elses_numbers(watch, kind):
    """The first segments and the k-th seed of a row begin as without it, whichever sites the seeds stand at.

    The weights of a host are one sequence of numbers. What lies behind the new segment moves along in it: the head,
    which belongs to the host that was changed.
    """
    few = watch()
    ours = live(chain(kind, 2), FEW, "never", script=first_two(1), horizon=4)
    more = watch()
    theirs = live(chain(kind, 3), FEW, "never", script=first_two(2), horizon=4)
    same_draws(few, more, slice(None))
    seeds, again = few.grown(), more.grown()
    # The first, the second, and a gate of each.
    assert len(seeds) == 4 * len(FEW)
    assert seeds.keys() == again.keys()
    assert all(torch.equal(theta, again[key]) for key, theta in seeds.items())
    shared = sum(segment.parameter_count for segment in ours.episode.task.host.segments[:-1])
    for row, theta in few.hosts().items():
        assert torch.equal(theta[:shared], more.hosts()[row][:shared])
    assert all(step.accepted_R.all() for step in (*ours.steps, *theirs.steps))


def test_a_slot_more_changes_no_draw_of_a_controller(watch, tmp_path):
    for controller in ("random", f"policy:{save_new_policy(tmp_path)}"):
        few = watch()
        ours = live(chain("vector", 2), FEW, controller)
        more = watch()
        theirs = live(chain("vector", 3), FEW, controller)
        same_draws(few, more, slice(None))
        # What they do with their numbers is another matter: there is more to choose from.
        assert any((a.action_RH != b.action_RH).any() for a, b in zip(ours.steps, theirs.steps, strict=True))
