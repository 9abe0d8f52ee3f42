"""A population: who is in which pass, what starts equal, what a static network is, and how many kernels run."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from esper.kasmina.hosts import Host
from esper.kasmina.population import Population
from esper.kasmina.rows.core import Statistics
from esper.leyline.actions import BLUEPRINTS_OF_KIND, Blueprint, Head, Op, Operator, SiteKind
from esper.leyline.config import GrowthConfig, HostConfig
from esper.leyline.errors import EsperError
from esper.leyline.stages import Stage
from esper.tolaria.batches import shared
from esper.tolaria.evaluation import evaluate, measure
from helpers.growing import CLASSES, EXAMPLES, act, germinate
from helpers.population_tools import (
    BLUEPRINTS,
    HOSTS,
    KINDS,
    Wish,
    audit,
    bring,
    decide,
    lanes_of_row,
    learning_lanes,
    make_split,
    mixed_stages,
    network_with,
    open_gates,
    populate,
    same_state,
    train_on,
)

ADD, MULTIPLY, GATE = Operator
IDS = [3, 0, 7, 3]
kinds = pytest.mark.parametrize("kind", KINDS)


def logits_of(population: Population, x: Tensor) -> Tensor:
    with torch.no_grad():
        return population.forward(
            shared(x, population.rows, population.lane_axis), population.main_pass, statistics=Statistics.RUNNING
        )[0]


def places(calls: tuple[tuple[Any, ...], ...]) -> set[tuple[int, int]]:
    """(lane, site) of every seed in a pass of all rows."""
    return {
        (lane, call.key[0])
        for of_site in calls
        for call in of_site
        for lane in (range(call.count) if call.lanes is None else call.lanes.tolist())
    }


# Where numbers come from.


@kinds
def test_rows_with_one_id_start_equal(kind: SiteKind):
    population = populate(kind, IDS)
    theta = population.hosts.theta
    assert torch.equal(theta[0], theta[3])
    assert len({tuple(row.tolist()) for row in theta}) == 3


@kinds
def test_a_row_starts_the_same_whoever_else_runs(kind: SiteKind):
    many, one = populate(kind, IDS), populate(kind, [7])
    assert torch.equal(many.hosts.theta[2], one.hosts.theta[0])
    first, second, _ = BLUEPRINTS[kind]
    bring(many, {(2, 1): Wish(first, Stage.TRAINING, GATE), (0, 1): Wish(second, Stage.TRAINING)})
    bring(one, {(0, 1): Wish(first, Stage.TRAINING, GATE)})
    same_state(lanes_of_row(many, 2), lanes_of_row(one, 0))
    assert not torch.equal(many.hosts.theta, populate(kind, IDS, seed=5).hosts.theta)


@kinds
def test_the_kth_seeds_of_rows_with_one_id_start_equal(kind: SiteKind):
    """Wherever the others are, and whenever they came."""
    population = populate(kind, IDS)
    blueprint = BLUEPRINTS[kind][0]
    decide(population, {0: germinate(0, blueprint, ADD)})
    decide(population, {0: germinate(1, blueprint, ADD), 1: germinate(1, blueprint, ADD)})
    decide(population, {3: germinate(1, blueprint, ADD)})
    decide(population, {3: germinate(0, blueprint, ADD)})
    audit(population)
    below, above = (population.seeds[site, blueprint] for site in (0, 1))
    assert (below.row.tolist(), below.seed_id.tolist()) == ([0, 3], [0, 1])
    assert (above.row.tolist(), above.seed_id.tolist()) == ([0, 1, 3], [1, 0, 0])
    sizes = [site.width for site in population.host.slot_config.sites]
    assert sizes[0] != sizes[1]
    # The same draws, scaled to the site: the first number of each seed is the first of its stream.
    bound = [bank.layer.params[0].high for bank in (below, above)]
    draws = {(0, 0): below.theta[0, 0].item() / bound[0], (0, 1): above.theta[0, 0].item() / bound[1]}
    draws |= {(3, 1): below.theta[1, 0].item() / bound[0], (3, 0): above.theta[2, 0].item() / bound[1]}
    assert draws[0, 0] == pytest.approx(draws[3, 0], rel=1e-5)
    assert draws[0, 1] == pytest.approx(draws[3, 1], rel=1e-5)
    assert draws[0, 0] != pytest.approx(draws[0, 1], rel=1e-3)


@kinds
def test_a_slot_used_again_holds_another_seed(kind: SiteKind):
    population = populate(kind, [0], embargo=1)
    blueprint = BLUEPRINTS[kind][0]
    bring(population, {(0, 0): Wish(blueprint, Stage.TRAINING)})
    first = population.seeds[0, blueprint].theta.detach().clone()
    decide(population, {0: act(Op.CULL, 0)})
    assert population.seeds == {}
    while population.slots.stage[0, 0] != int(Stage.DORMANT):
        decide(population, {})
    bring(population, {(0, 0): Wish(blueprint, Stage.TRAINING)})
    assert population.slots.seed_id[0, 0] == 1
    assert not torch.equal(population.seeds[0, blueprint].theta, first)


# Who is in which pass.


@kinds
@pytest.mark.parametrize("incubator", ["shadow", "straight-through"])
def test_who_is_in_which_pass(kind: SiteKind, incubator: str):
    population = populate(kind, [0, 1, 2, 3], incubator=incubator)
    bring(population, mixed_stages(kind))
    bring(population, {(row, site): wish for (row, site), wish in mixed_stages(kind).items() if not wish.fading})
    blended = {(0, 0), (1, 0), (2, 0), (2, 1), (3, 1)}
    incubated = {(0, 1), (1, 1), (3, 0)}
    assert set(map(tuple, np.argwhere(population.base).tolist())) == blended
    assert places(population.main_pass.calls) == blended
    if incubator == "shadow":
        assert population.training_pass is population.main_pass
        shadows = population.shadows
        assert set(zip(shadows.row.tolist(), shadows.site_K.tolist(), strict=True)) == incubated
        learns = [call.learns for calls in shadows.steps.calls for call in calls]
        assert any(learns)
        # Row 3 fades a seed behind the one in the incubator: it is in the shadow and learns nothing there.
        assert not all(learns)
    else:
        assert population.shadows is None
        assert places(population.training_pass.calls) == blended | incubated
        silent = [tuple(c for c in calls if c.silent) for calls in population.training_pass.calls]
        assert places(tuple(silent)) == incubated
    probes = population.probes
    assert set(zip(probes.row.tolist(), probes.site_K.tolist(), strict=True)) == blended | incubated
    assert len(probes.row) == len(blended | incubated)
    assert not any(call.learns for calls in probes.steps.calls for call in calls)


@kinds
def test_a_seed_at_alpha_0_is_in_no_call(kind: SiteKind):
    population = populate(kind, [0, 1])
    blueprint = BLUEPRINTS[kind][0]
    bring(population, {(row, 0): Wish(blueprint, Stage.BLENDING) for row in range(2)})
    bank = population.seeds[0, blueprint]
    with torch.no_grad():
        bank.theta[0] = float("nan")
    x = make_split(kind, 5).x
    assert logits_of(population, x)[0].isnan().all()
    population.slots.alpha[0, 0] = 0.0
    population.settle()
    assert places(population.main_pass.calls) == {(1, 0)}
    assert learning_lanes(population) == {HOSTS: [0, 1], (0, blueprint): [1]}
    assert logits_of(population, x).isfinite().all()


@kinds
def test_the_streams_that_are_kept_stand_in_front_of_the_seeds(kind: SiteKind):
    population = populate(kind, [0, 1], dtype=torch.float64)
    bring(population, {(0, 0): Wish(BLUEPRINTS[kind][0], Stage.BLENDING, MULTIPLY)})
    with torch.no_grad():
        for bank in population.seeds.values():
            bank.theta += 0.5
    split = make_split(kind, 6, torch.float64)
    x = shared(split.x, 2, population.lane_axis)
    with torch.no_grad():
        logits, streams = population.forward(x, population.main_pass, statistics=Statistics.RUNNING, keep=True)
        assert torch.equal(logits, logits_of(population, split.x))
        assert len(streams) == 2
        for row in range(2):
            h = split.x
            for name, part in network_with(population, row, population.base[row]).named_children():
                if name.startswith("segment"):
                    h = part(h)
                    if name != "segment2":
                        stream = streams[int(name[-1])]
                        ours = stream[row] if population.lane_axis == 0 else stream.chunk(2, 1)[row]
                        torch.testing.assert_close(ours, h, rtol=1e-12, atol=1e-12)
                else:
                    h = part(h)


@kinds
def test_a_shadow_gives_gradients_to_its_seed_alone(kind: SiteKind):
    population = populate(kind, [0, 1, 2, 3])
    bring(population, mixed_stages(kind))
    x = shared(make_split(kind, 6).x, 4, population.lane_axis)
    _, streams = population.forward(x, population.training_pass, statistics=Statistics.UPDATED, keep=True)
    logits = population.branch(streams, population.shadows)
    # Row 3 left its incubated seed at the first site, rows 0 and 1 theirs at the second.
    assert population.shadows.row.tolist() == [3, 0, 1]
    tops = [bank.theta for bank in population.banks]
    grads = torch.autograd.grad(logits.square().sum(), tops, allow_unused=True, materialize_grads=True)
    first, second, _ = BLUEPRINTS[kind]
    incubated = {(0, first): 3, (1, second): 0}
    for bank, grad in zip(population.banks, grads, strict=True):
        key = next((key for key, other in population.seeds.items() if other is bank), None)
        rows = set(bank.row[grad.abs().sum(1).numpy() > 0].tolist())
        if key == (1, second):
            assert rows == {0, 1}
        else:
            assert rows == ({incubated[key]} if key in incubated else set())


# Planting.


@kinds
def test_planted_seeds_are_committed_and_change_nothing_yet(kind: SiteKind):
    first, second, _ = BLUEPRINTS[kind]
    population = populate(kind, [0, 1, 2])
    x = make_split(kind, 7).x
    before = logits_of(population, x)
    noop = Blueprint.NOOP
    wanted = torch.tensor([[first, first], [noop, second], [noop, noop]])
    population.plant(wanted)
    audit(population)
    slots = population.slots
    planted = wanted != int(noop)
    assert torch.equal(slots.blueprint, wanted)
    assert (slots.stage[planted] == int(Stage.FOSSILIZED)).all()
    assert (slots.stage[~planted] == int(Stage.DORMANT)).all()
    assert torch.equal(slots.alpha, planted.float())
    assert torch.equal(slots.alpha_target, planted.float())
    assert slots.seed_id.tolist() == [[0, 1], [-1, 0], [-1, -1]]
    assert slots.seeds_made.tolist() == [2, 1, 0]
    assert population.base.tolist() == planted.tolist()
    assert torch.equal(logits_of(population, x), before)
    assert learning_lanes(population) == {
        HOSTS: [0, 1, 2],
        (0, int(first)): [0],
        (1, int(first)): [0],
        (1, int(second)): [1],
    }
    train_on(population, [0, 1, 2], make_split(kind, 16)).run(3)
    assert all(bank.theta.abs().max() > 0 and (bank.steps == 3).all() for bank in population.seeds.values())
    assert not torch.equal(logits_of(population, x), before)


@kinds
def test_planting_goes_on_where_it_left_off(kind: SiteKind):
    first, second, _ = BLUEPRINTS[kind]
    at_once, in_turn = populate(kind, [4, 5]), populate(kind, [4, 5])
    at_once.plant(torch.tensor([[first, second]] * 2))
    in_turn.plant(torch.tensor([[first, 0]] * 2))
    in_turn.plant(torch.tensor([[0, second]] * 2))
    audit(in_turn)
    for row in range(2):
        same_state(lanes_of_row(at_once, row), lanes_of_row(in_turn, row))
    # A seed that germinates afterwards is the next one.
    empty_above = populate(kind, [4])
    empty_above.plant(torch.tensor([[first, 0]]))
    decide(empty_above, {0: germinate(1, second, ADD)})
    assert empty_above.slots.seed_id.tolist() == [[0, 1]]
    same_state(lanes_of_row(empty_above, 0), lanes_of_row(at_once, 0))


@kinds
def test_seeds_that_grew_can_be_planted_as_they_began(kind: SiteKind):
    """With their operators and initial parameters: the control of what growing costs is the same network."""
    grown, planted = populate(kind, ROWS := [3, 0, 7, 2]), populate(kind, ROWS)
    # The third row's seeds are its second and its third: one before them was culled.
    decide(grown, {2: germinate(0, BLUEPRINTS[kind][1], MULTIPLY)})
    decide(grown, {2: act(Op.CULL, 0)})
    while (grown.slots.stage[2, 0] != int(Stage.DORMANT)).item():
        decide(grown, {})
    wishes = {place: wish._replace(stage=Stage.FOSSILIZED, fading=False) for place, wish in mixed_stages(kind).items()}
    bring(grown, wishes)
    slots = grown.slots
    planted.plant(slots.blueprint, operator_RS=slots.operator, seed_id_RS=slots.seed_id)
    audit(planted)
    assert slots.seed_id[2].tolist() == [1, 2]
    for name in ("stage", "blueprint", "operator", "parameters", "seed_id", "alpha", "seeds_made"):
        assert torch.equal(getattr(planted.slots, name), getattr(slots, name)), name
    for row in range(4):
        same_state(lanes_of_row(planted, row), lanes_of_row(grown, row))


@kinds
def test_every_blueprint_can_be_planted(kind: SiteKind):
    fitting = sorted(BLUEPRINTS_OF_KIND[kind])
    population = populate(kind, list(range(len(fitting))))
    population.plant(torch.tensor([[b, fitting[-1 - n]] for n, b in enumerate(fitting)]))
    audit(population)
    data = make_split(kind, 20)
    trainer = train_on(population, list(range(len(fitting))), data, batch_size=20, learning_rate=0.01)
    first = trainer.run(1)
    trainer.run(10)
    assert (trainer.run(1) < first).all()
    evaluation = evaluate(population, data)
    for row in range(len(fitting)):
        network = network_with(population, row, [True, True])
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(network(data.x), data.y)
        assert evaluation.loss_R[row].item() == pytest.approx(loss.item(), abs=1e-5)


def test_a_planted_seed_stays_under_every_action():
    population = populate(SiteKind.VECTOR, [0, 1])
    population.plant(torch.full((2, 2), int(Blueprint.MLP_SMALL)))
    before = {name: t.clone() for name, t in vars(population.slots).items() if name in ("stage", "alpha", "seed_id")}
    for op in Op:
        if op is Op.WAIT:
            continue
        actions = torch.zeros(2, len(Head), dtype=torch.int64)
        actions[:, Head.OP], actions[:, Head.BLUEPRINT] = int(op), int(Blueprint.MLP_SMALL)
        outcome, _ = population.decide(actions, open_gates(population))
        assert not outcome.accepted.any()
    for name, value in before.items():
        assert torch.equal(getattr(population.slots, name), value)


# What is refused.


@pytest.mark.parametrize(
    "actions",
    [torch.zeros(2, 7, dtype=torch.int64), torch.zeros(3, 8, dtype=torch.int64), torch.zeros(2, 8), torch.zeros(8)],
    ids=["heads", "rows", "dtype", "axes"],
)
def test_actions_of_another_shape_are_refused(actions: Tensor):
    population = populate(SiteKind.VECTOR, [0, 1])
    decide(population, {0: germinate(0, Blueprint.NORM, ADD)})
    before = population.slots.clone()
    with pytest.raises(ValueError, match=r"actions must be int64 \[2, 8\]"):
        population.decide(actions, open_gates(population))
    for name, value in vars(before).items():
        assert torch.equal(getattr(population.slots, name), value) or value.isnan().any()
    audit(population)


def test_a_population_that_could_never_grow_is_refused():
    host = Host(HostConfig(kind=SiteKind.VECTOR, widths=(4,)), EXAMPLES[SiteKind.VECTOR], CLASSES)
    with pytest.raises(EsperError, match="none of conv_light fits"):
        Population(host, GrowthConfig(), 0, torch.arange(2), allowed=frozenset({Blueprint.CONV_LIGHT}))


def test_only_allowed_blueprints_germinate():
    host = Host(HostConfig(kind=SiteKind.VECTOR, widths=(4,)), EXAMPLES[SiteKind.VECTOR], CLASSES)
    population = Population(host, GrowthConfig(), 0, torch.arange(2), allowed=frozenset({Blueprint.NORM}))
    wanted = [germinate(0, Blueprint.NORM, ADD), germinate(0, Blueprint.MLP_SMALL, ADD)]
    outcome, _ = population.decide(torch.tensor(wanted), open_gates(population))
    assert outcome.accepted.tolist() == [True, False]
    audit(population)


@kinds
def test_what_does_not_fit_cannot_be_planted(kind: SiteKind):
    misfit = min(set(Blueprint) - BLUEPRINTS_OF_KIND[kind] - {Blueprint.NOOP})
    population = populate(kind, [0])
    with pytest.raises(KeyError, match=misfit.name):
        population.plant(torch.tensor([[misfit, 0]]))


# Kernels.


class Kernels(TorchDispatchMode):
    """Counts what torch dispatches, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.launched[str(func)] += 1
        return func(*args, **(kwargs or {}))


def kernels(work: Callable[[], object]) -> Counter[str]:
    with Kernels() as mode:
        work()
    return mode.launched


def crowd(kind: SiteKind, copies: int, incubator: str) -> Population:
    """Mixed stages, over and over."""
    population = populate(kind, list(range(4 * copies)), incubator=incubator, norm="batch")
    wishes = {
        (row + 4 * copy, site): wish for (row, site), wish in mixed_stages(kind).items() for copy in range(copies)
    }
    bring(population, wishes)
    return population


@kinds
@pytest.mark.parametrize("incubator", ["shadow", "straight-through"])
def test_kernels_do_not_grow_with_rows(kind: SiteKind, incubator: str):
    data, held_out = make_split(kind, 40), make_split(kind, 20, seed=1)
    counts: list[dict[str, Counter[str]]] = []
    for copies in (1, 16):
        population = crowd(kind, copies, incubator)
        trainer = train_on(population, list(range(population.rows)), data)
        work: dict[str, Callable[[], object]] = {
            "update": lambda trainer=trainer: trainer.run(1),
            "measure": lambda population=population: measure(population, held_out),
            "decide": lambda population=population: decide(population, {0: act(Op.CULL, 1)}),
        }
        counts.append({name: kernels(what) for name, what in work.items()})
    few, many = counts
    for name, launched in few.items():
        assert many[name].total() <= 1.05 * launched.total(), (name, many[name] - launched)
    # The backward pass and the optimizer were counted as well: two norms, and one of them again in the shadow.
    norms = 3 if incubator == "shadow" else 2
    backward = "aten.native_batch_norm_backward.default"
    assert few["update"][backward] == few["update"]["aten.native_batch_norm.default"] == norms
    assert few["update"]["aten.addcdiv_.default"] == len(list(crowd(kind, 1, incubator).learning()))
