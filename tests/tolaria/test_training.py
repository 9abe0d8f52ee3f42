"""Training beside plain torch: one row is an ordinary network under an ordinary optimizer."""

import copy
import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from esper.kasmina.population import Population
from esper.kasmina.rows.core import Statistics
from esper.leyline.actions import Blueprint, Operator, SiteKind
from esper.leyline.checks import ALL_GATE_CHECKS, Check
from esper.leyline.stages import Stage
from esper.tolaria import training
from esper.tolaria.datasets import Split
from esper.tolaria.door import IGNORED, counts
from esper.tolaria.schedule import Rates, rate_factor
from esper.tolaria.training import Trainer, example_losses, mean_loss
from helpers.population_tools import (
    BLUEPRINTS,
    HOSTS,
    KINDS,
    Wish,
    audit,
    banks_by_key,
    bring,
    decide,
    lanes_of_row,
    make_split,
    mixed_stages,
    network_with,
    populate,
    record,
    same_state,
    train_on,
)

ADD, MULTIPLY, GATE = Operator
UPDATES = 20
ROWS = [0, 1, 2, 3]
kinds = pytest.mark.parametrize("kind", KINDS)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


class Plain:
    """A network trained by torch alone: one clipping for the host, and one for each seed and each gate."""

    def __init__(self, network: nn.Module, trainer: Trainer, frozen: str | None) -> None:
        self.network, self.trainer, self.config = network.train(), trainer, trainer.config
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in network.named_parameters():
            if frozen is not None and name.startswith(frozen):
                parameter.requires_grad_(False)
                continue
            part = "host" if name.startswith("segment") else ".".join(name.split(".")[:2])
            groups.setdefault(part, []).append(parameter)
        self.groups = list(groups.values())
        config = self.config
        # Matrices and kernels decay, biases and norms do not.
        flat = [p for group in self.groups for p in group]
        options = [
            {"params": [p for p in flat if p.dim() > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in flat if p.dim() == 1], "weight_decay": 0.0},
        ]
        if config.method == "adamw":
            betas = (config.momentum, config.beta2)
            self.optimizer = torch.optim.AdamW(options, lr=1.0, betas=betas, eps=config.epsilon)
        else:
            self.optimizer = torch.optim.SGD(options, lr=1.0, momentum=config.momentum)

    def update(self, number: int) -> float:
        (index_RB,) = self.trainer.order.indices(number, 1)
        data = self.trainer.data
        loss = cross_entropy(self.network(data.x[index_RB[0]]), data.y[index_RB[0]])
        self.optimizer.zero_grad()
        loss.backward()
        for group in self.groups:
            nn.utils.clip_grad_norm_(group, self.config.clip_norm)
        for options in self.optimizer.param_groups:
            share = rate_factor(number, self.trainer.total_updates, self.config)
            options["lr"] = self.config.learning_rate * share
        self.optimizer.step()
        return loss.item()


def one_row(kind: SiteKind, norm: str) -> Population:
    """A committed seed, a blended one, one that fades and one in the incubator, which nobody should notice."""
    population = populate(kind, [2], (6, 5, 5, 4), norm=norm, dtype=torch.float64)
    first, second, third = BLUEPRINTS[kind]
    wishes = {
        (0, 0): Wish(first, Stage.FOSSILIZED, GATE),
        (0, 1): Wish(third, Stage.BLENDING, MULTIPLY, target=1),
        (0, 2): Wish(second, Stage.BLENDING, ADD, fading=True),
        (0, 3): Wish(first, Stage.TRAINING, GATE),
    }
    bring(population, wishes)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for bank in population.banks:
            bank.theta += 0.1 * torch.randn(bank.theta.shape, generator=generator, dtype=torch.float64)
    return population


@kinds
@pytest.mark.parametrize("norm", ["none", "batch", "group"])
@pytest.mark.parametrize("method", ["adamw", "sgd"])
def test_a_row_trains_as_a_plain_network(kind: SiteKind, norm: str, method: str):
    population = one_row(kind, norm)
    data = make_split(kind, 30, torch.float64)
    options = {"weight_decay": 0.1, "clip_norm": 0.3, "warmup": 0.2, "final_share": 0.1, "learning_rate": 0.03}
    trainer = train_on(population, [2], data, total=UPDATES, method=method, **options)
    plain = Plain(network_with(population, 0, population.base[0]), trainer, frozen="r0c2.")
    start = {name: p.clone() for name, p in plain.network.named_parameters()}
    for number in range(UPDATES):
        assert trainer.run(1).item() == pytest.approx(plain.update(number), rel=1e-9)
    ours = network_with(population, 0, population.base[0])
    expected = plain.network.state_dict()
    for name, tensor in ours.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            close(tensor, expected[name])
    moved = {name for name, p in ours.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {name for name in start if not name.startswith("r0c2.")}
    assert any("gate" in name for name in moved)
    x = make_split(kind, 9, torch.float64, seed=3).x
    close(ours(x), plain.network.eval()(x))


def masked(data: Split, *, share: float = 0.5) -> Split:
    """The same with a share of labels that do not count; what stands at those examples is far off."""
    ignored_N = torch.rand(len(data.y), generator=torch.Generator().manual_seed(1)) < share
    return Split(data.x, data.y.masked_fill(ignored_N, IGNORED))


@kinds
def test_a_row_trains_as_a_plain_network_on_the_examples_that_count(kind: SiteKind):
    """Torch's own mean leaves out what is ignored; batches of 3 have from none to three that count."""
    population = one_row(kind, "batch")
    data = masked(make_split(kind, 30, torch.float64))
    trainer = train_on(population, [2], data, batch_size=3, total=UPDATES, learning_rate=0.03)
    plain = Plain(network_with(population, 0, population.base[0]), trainer, frozen="r0c2.")
    compared = 0
    for number in range(UPDATES):
        (index_RB,) = trainer.order.indices(number, 1)
        if not counts(data.y[index_RB]).any():
            break
        assert trainer.run(1).item() == pytest.approx(plain.update(number), rel=1e-9)
        compared += counts(data.y[index_RB]).sum() < 3
    assert compared >= 3


@kinds
@pytest.mark.parametrize("incubator", ["shadow", "straight-through"])
def test_a_minibatch_without_a_label_that_counts_has_loss_and_gradient_0(kind: SiteKind, incubator: str):
    population = populate(kind, ROWS, norm="batch", incubator=incubator, dtype=torch.float64)
    bring(population, mixed_stages(kind))
    data = make_split(kind, 32, torch.float64)
    trainer = train_on(population, ROWS, data, batch_size=4)
    labels_RN = data.y.repeat(4, 1)
    labels_RN[1] = IGNORED
    beside = train_on(copy.deepcopy(population), ROWS, data, batch_size=4)
    trainer._labels_RN = labels_RN
    recorder = record(trainer)
    loss_R, beside_R = trainer.run(1), beside.run(1)
    assert loss_R[1] == 0
    assert torch.equal(loss_R[[0, 2, 3]], beside_R[[0, 2, 3]])
    for bank in population.banks:
        of_row = torch.from_numpy(bank.row == 1)
        if id(bank) in {id(b) for b, _ in population.learning()}:
            assert (recorder.of(bank)[of_row] == 0).all()
        assert bank.theta.isfinite().all()


def test_an_update_without_a_label_that_counts_is_not_part_of_the_mean():
    kind = SiteKind.VECTOR
    data = masked(make_split(kind, 32, torch.float64), share=0.7)
    population, again = (populate(kind, [0], dtype=torch.float64) for _ in range(2))
    trainer, single = (train_on(p, [0], data, batch_size=2) for p in (population, again))
    counted = [bool(counts(data.y[index]).any()) for index in trainer.order.indices(0, 16)[:, 0]]
    losses = torch.cat([single.run(1) for _ in range(16)])
    assert 3 < sum(counted) < 13
    assert ((losses > 0) == torch.tensor(counted)).all()
    close(trainer.run(16), (losses.sum() / sum(counted))[None])


def test_the_mean_loss_is_over_the_examples_that_count():
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    target = torch.tensor([[0, 1, 2, 3], [IGNORED, 4, IGNORED, 0], [IGNORED] * 4])
    loss_L = mean_loss(logits, target)
    assert torch.equal(loss_L[0], example_losses(logits, target)[0].mean())
    torch.testing.assert_close(loss_L[1], cross_entropy(logits[1, [1, 3]], target[1, [1, 3]]))
    assert loss_L[2] == 0
    loss_L.sum().backward()
    assert (logits.grad.abs().sum(2) > 0).tolist() == counts(target).tolist()
    assert logits.grad.isfinite().all()


@kinds
def test_how_updates_are_cut_into_decisions_does_not_matter(kind: SiteKind):
    whole, pieces = (populate(kind, ROWS, norm="batch") for _ in range(2))
    trainers = [train_on(p, ROWS, make_split(kind, 32)) for p in (whole, pieces)]
    total_R = 9 * trainers[0].run(9)
    parts_R = torch.stack([k * trainers[1].run(k) for k in (1, 5, 3)]).sum(0)
    torch.testing.assert_close(parts_R, total_R)
    assert trainers[0].update == trainers[1].update == 9
    for row in ROWS:
        same_state(lanes_of_row(whole, row), lanes_of_row(pieces, row))


def test_no_more_examples_are_drawn_ahead_than_a_few_updates_need(monkeypatch):
    """The memory of a decision must not grow with its updates; what is drawn stays the same."""
    whole, pieces = (populate(SiteKind.VECTOR, ROWS) for _ in range(2))
    trainers = [train_on(p, ROWS, make_split(SiteKind.VECTOR, 32)) for p in (whole, pieces)]
    loss_R = trainers[0].run(9)
    monkeypatch.setattr(training, "DRAWN_AHEAD", 4)
    drawn, draw = [], trainers[1].order.indices
    monkeypatch.setattr(trainers[1].order, "indices", lambda at, count: drawn.append(count) or draw(at, count))
    assert torch.equal(trainers[1].run(9), loss_R)
    assert drawn == [4, 4, 1]


@kinds
def test_the_loss_is_that_of_each_rows_own_batches(kind: SiteKind):
    population = populate(kind, ROWS, dtype=torch.float64)
    data = make_split(kind, 32, torch.float64)
    trainer = train_on(population, [5, 6, 7, 8], data)
    index_URB = trainer.order.indices(0, 2)
    expected = torch.zeros(2, 4, dtype=torch.float64)
    for update in range(2):
        for row in ROWS:
            chosen = index_URB[update, row]
            network = network_with(population, row, [False, False])
            expected[update, row] = cross_entropy(network(data.x[chosen]), data.y[chosen])
        expected[update] -= trainer.run(1)
    close(expected, torch.zeros_like(expected))


def test_losses_are_of_each_example_and_never_in_half_precision():
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([[0, 1, 2], [3, 3, 0]])
    losses = example_losses(logits, target)
    picked = logits.log_softmax(2).gather(2, target[..., None])[..., 0]
    torch.testing.assert_close(losses, -picked)
    for half in (torch.float16, torch.bfloat16):
        assert example_losses(logits.to(half), target).dtype == torch.float32
    assert example_losses(logits.double(), target).dtype == torch.float64


def rates_of(trainer: Trainer, updates: int = 2) -> list[dict[object, list[float]]]:
    """Rates of the next updates by bank (see `banks_by_key`), as the optimizer is given them."""
    seen: list[dict[object, list[float]]] = []
    step, keys = trainer.optimizer.step, {id(bank): key for key, bank in banks_by_key(trainer.population).items()}

    def spy(banks, grads, rates, active):
        seen.append({keys[id(bank)]: rate.tolist() for bank, rate in zip(banks, rates, strict=True)})
        return step(banks, grads, rates, active)

    trainer.optimizer.step = spy
    trainer.run(updates)
    trainer.optimizer.step = step
    return seen


def test_rates_follow_the_schedule_of_the_whole_run():
    population = populate(SiteKind.VECTOR, [0], dtype=torch.float64)
    trainer = train_on(population, [0], make_split(SiteKind.VECTOR, 20, torch.float64), total=40, warmup=0.5)
    expected = [{HOSTS: [pytest.approx(0.02 * rate_factor(n, 40, trainer.config))]} for n in (0, 1)]
    assert rates_of(trainer) == expected
    trainer.update = 38
    assert rates_of(trainer)[-1][HOSTS] == pytest.approx([0.02 * 0.01])


@kinds
def test_a_seed_that_is_born_late_learns_at_a_rate_of_its_own(kind: SiteKind):
    """Nearly over for the host, the run has just begun for it; its gate is as old as it is."""
    population = populate(kind, ROWS)
    trainer = train_on(population, ROWS, make_split(kind, 32), total=40, warmup=0.1)
    trainer.run(30)
    bring(population, {(1, 0): Wish(BLUEPRINTS[kind][0], Stage.GERMINATED, GATE)})
    trainer.run(4)
    bring(population, {(1, 0): Wish(BLUEPRINTS[kind][0], Stage.TRAINING, GATE)})
    at = rates_of(trainer, 6)
    seed = (0, BLUEPRINTS[kind][0])
    own = Rates(torch.tensor([34]), torch.tensor([0.02]), 40, trainer.config)
    assert [rates[seed] for rates in at] == [own.at(34 + n).tolist() for n in range(6)]
    assert [rates["gate", 0] for rates in at] == [rates[seed] for rates in at]
    assert min(rates[seed][0] for rates in at) > 2 * max(rates[HOSTS][1] for rates in at)


@kinds
@pytest.mark.parametrize("method", ["adamw", "sgd"])
def test_seeds_that_stand_from_the_start_follow_their_host(kind: SiteKind, method: str):
    """A static network is one network: to the last bit, also where an update is skipped."""
    population = populate(kind, ROWS)
    planted_RS = torch.zeros(4, 2, dtype=torch.int64)
    planted_RS[[0, 2], [1, 0]] = int(BLUEPRINTS[kind][0])
    population.plant(planted_RS)
    trainer = train_on(population, ROWS, make_split(kind, 32), method=method)
    trainer.rate_R[2] = 0.07
    sane = trainer.data.x[:].clone()
    at = rates_of(trainer, 12)
    trainer.data.x.fill_(math.nan)
    at += rates_of(trainer, 1)
    trainer.data.x.copy_(sane)
    at += rates_of(trainer, 27)
    for update, rates in enumerate(at):
        hosts = (trainer.rate_R * rate_factor(update, 40, trainer.config)).tolist()
        assert rates[HOSTS] == hosts
        assert {key: rate for key, rate in rates.items() if key != HOSTS} == {
            (0, BLUEPRINTS[kind][0]): [hosts[2]],
            (1, BLUEPRINTS[kind][0]): [hosts[0]],
        }


def test_a_seed_that_is_born_late_still_learns_what_its_host_cannot():
    """In the last tenth of a run, where the rate of the host is below a fortieth of its peak."""
    x = torch.randn(128, 7, generator=torch.Generator().manual_seed(3))
    # A linear host can only guess.
    data = Split(x, (x[:, 0] * x[:, 1] > 0).long())
    population = populate(SiteKind.VECTOR, ROWS, widths=(8, 8), activation="none")
    trainer = train_on(population, ROWS, data, total=600, batch_size=32)
    trainer.run(540)
    planted_RS = torch.zeros(4, 2, dtype=torch.int64)
    planted_RS[:2, 0] = int(Blueprint.MLP_LARGE)
    population.plant(planted_RS)
    trainer.run(50)
    loss_R = trainer.run(10)
    assert (loss_R[2:] > 0.65).all()
    assert (loss_R[:2] < 0.6).all()


@kinds
def test_every_row_has_a_rate_of_its_own(kind: SiteKind):
    population = populate(kind, ROWS)
    bring(population, mixed_stages(kind))
    trainer = train_on(population, ROWS, make_split(kind, 32))
    trainer.rate_R[1] = 0.0
    before = [lanes_of_row(population, row) for row in ROWS]
    trainer.run(2)
    for row, state in enumerate(before):
        after = lanes_of_row(population, row)
        moved = {key[0] for key, tensor in state.items() if key[1] == "theta" and not torch.equal(after[key], tensor)}
        assert bool(moved) == (row != 1)


# What is recorded of gradients.


@kinds
@pytest.mark.parametrize("incubator", ["shadow", "straight-through"])
def test_gradients_are_recorded_of_the_seeds_that_learned(kind: SiteKind, incubator: str):
    population = populate(kind, ROWS, incubator=incubator, dtype=torch.float64)
    bring(population, mixed_stages(kind))
    decide(population, {})
    trainer = train_on(population, ROWS, make_split(kind, 32, torch.float64), clip_norm=0.01)
    # What an earlier decision left is not what is recorded now.
    trainer.run(3)
    recorder = record(trainer)
    norms: dict[tuple[int, int], list[float]] = {}
    host_norms: list[Tensor] = []
    step = recorder.step

    def spy(banks, grads, rates, active):
        skipped = step(banks, grads, rates, active)
        host_norms.append(recorder.of(population.hosts).norm(dim=1))
        for (site, _), bank in population.seeds.items():
            for lane, row in enumerate(bank.row):
                if not population.slots.fading_RS()[row, site]:
                    norms.setdefault((int(row), site), []).append(recorder.of(bank)[lane].norm().item())
        return skipped

    recorder.step = spy
    trainer.run(4)
    slots = population.slots
    expected_norm, expected_ratio = torch.full((4, 2), math.nan), torch.full((4, 2), math.nan)
    for (row, site), seen in norms.items():
        assert len(seen) == 4
        size = population.seeds[site, int(slots.blueprint[row, site])].layer.parameter_count
        host = sum(n[row].item() for n in host_norms) / 4 / population.hosts.layer.parameter_count**0.5
        expected_norm[row, site] = sum(seen) / 4
        expected_ratio[row, site] = sum(seen) / 4 / size**0.5 / host
    assert expected_norm.isnan().nonzero().tolist() == [[3, 1]]
    torch.testing.assert_close(slots.gradient_norm, expected_norm, rtol=1e-5, atol=0, equal_nan=True)
    torch.testing.assert_close(slots.gradient_ratio, expected_ratio, rtol=1e-5, atol=0, equal_nan=True)


@kinds
def test_who_did_not_learn_has_no_gradient(kind: SiteKind):
    population = populate(kind, ROWS)
    first, second, _ = BLUEPRINTS[kind]
    bring(
        population,
        {
            (0, 0): Wish(first, Stage.GERMINATED),
            (1, 0): Wish(first, Stage.TRAINING),
            (2, 1): Wish(second, Stage.BLENDING),
        },
    )
    slots = population.slots
    slots.gradient_norm.fill_(7.0)
    slots.gradient_ratio.fill_(7.0)
    train_on(population, ROWS, make_split(kind, 32)).run(2)
    learned = torch.tensor([[False, False], [True, False], [False, True], [False, False]])
    assert torch.equal(slots.gradient_norm.isfinite(), learned)
    assert torch.equal(slots.gradient_ratio.isfinite(), learned)
    assert (slots.gradient_norm[learned] > 0).all()


@kinds
def test_a_seed_without_number_shows_in_its_gradient(kind: SiteKind):
    """So that its gate can see it; beside it nobody does."""
    population = populate(kind, ROWS)
    blueprint = BLUEPRINTS[kind][0]
    bring(population, {(row, 0): Wish(blueprint, Stage.TRAINING) for row in (0, 1)})
    with torch.no_grad():
        population.seeds[0, blueprint].theta[1] = math.nan
    trainer = train_on(population, ROWS, make_split(kind, 32))
    trainer.run(2)
    assert population.slots.gradient_norm[:, 0].isfinite().tolist() == [True, False, False, False]
    assert trainer.skipped_R.tolist() == [0] * len(ROWS)
    assert population.finite().all()
    audit(population)


# Updates that are skipped.


def spoiled_at(trainer: Trainer, updates: set[int], spoil: Mapping[tuple[int, int], float]) -> None:
    """Spoil the gradients of some updates (see `RecordingOptimizer`)."""
    recorder = record(trainer)
    step = recorder.step

    def now_and_then(banks, grads, rates, active):
        recorder.spoil = dict(spoil) if trainer.update in updates else {}
        return step(banks, grads, rates, active)

    recorder.step = now_and_then


def grown(kind: SiteKind) -> tuple[Population, Trainer]:
    """A seed in TRAINING in rows 0 and 1, a blended one in row 2; double precision."""
    population = populate(kind, ROWS, dtype=torch.float64, norm="batch")
    first, second, _ = BLUEPRINTS[kind]
    wishes = {(row, 0): Wish(first, Stage.TRAINING) for row in (0, 1)}
    bring(population, {**wishes, (2, 1): Wish(second, Stage.BLENDING)})
    return population, train_on(population, ROWS, make_split(kind, 32, torch.float64))


@kinds
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_skipped_updates_are_counted_and_poison_no_statistic(kind: SiteKind, bad: float):
    population, trainer = grown(kind)
    # The host of row 1 in two updates of five, the seed of row 0 in one.
    spoiled_at(trainer, {1, 3}, {(0, 1): bad})
    loss_R = trainer.run(5)
    slots, hosts = population.slots, population.hosts
    assert trainer.skipped_R.tolist() == [0, 2, 0, 0]
    assert hosts.steps.tolist() == [5, 3, 5, 5]
    assert hosts.norm_sum.isfinite().all()
    # Its loss was as it should be: it counts.
    assert loss_R.isfinite().all()
    seeds = slots.gradient_norm.isfinite()
    assert seeds.nonzero().tolist() == [[0, 0], [1, 0], [2, 1]]
    assert torch.equal(slots.gradient_ratio.isfinite(), seeds)
    assert (slots.gradient_ratio[seeds] > 0).all()


@kinds
def test_gradients_are_means_over_the_updates_that_were_made(kind: SiteKind):
    population, trainer = grown(kind)
    spoiled_at(trainer, {2}, {(0, 1): math.inf, (1, 0): math.nan})
    recorder, norms, host_norms = trainer.optimizer, [], []
    step = recorder.step

    def noted(banks, grads, rates, active):
        norms.append(grads[1].norm(dim=1))
        host_norms.append(grads[0].norm(dim=1))
        return step(banks, grads, rates, active)

    recorder.step = noted
    trainer.run(4)
    made = torch.tensor([True, True, False, True])
    whole, of_host = torch.stack(norms), torch.stack(host_norms)
    expected = [whole[made, 0].mean(), whole[:, 1].mean()]
    torch.testing.assert_close(population.slots.gradient_norm[:2, 0].double(), torch.stack(expected), rtol=1e-6, atol=0)
    seed, host = (bank.layer.parameter_count for bank in trainer.optimizer.banks[:2][::-1])
    ratios = torch.stack([expected[0] / of_host[:, 0].mean(), expected[1] / of_host[made, 1].mean()])
    ratios = ratios * (host / seed) ** 0.5
    torch.testing.assert_close(population.slots.gradient_ratio[:2, 0].double(), ratios, rtol=1e-6, atol=0)


@kinds
def test_a_seed_that_made_no_update_has_no_gradient(kind: SiteKind):
    population, trainer = grown(kind)
    spoiled_at(trainer, set(range(9)), {(1, 0): math.nan})
    trainer.run(4)
    slots = population.slots
    assert slots.gradient_norm[:, 0].isfinite().tolist() == [False, True, False, False]
    report = population.gate_report(torch.zeros(len(ROWS)))
    finite = ALL_GATE_CHECKS.index(Check.GRADIENT_FINITE)
    assert report.passed_CRS[finite, :2, 0].tolist() == [False, True]
    assert trainer.skipped_R.tolist() == [0] * len(ROWS)


@kinds
def test_a_bad_batch_changes_nothing_of_its_row(kind: SiteKind):
    """Parameters, moments and running statistics: as if that update had not been; no other row notices."""
    (calm, ours), (_, struck) = (grown(kind) for _ in range(2))
    whole = training.gather
    for trainer in (ours, struck):
        trainer.run(2)
    before = lanes_of_row(struck.population, 1)

    def spoiled(x, index_RB, lane_axis):
        examples = whole(x, index_RB, lane_axis).clone()
        lanes = examples if lane_axis == 0 else examples.unflatten(1, (len(ROWS), -1)).transpose(0, 1)
        lanes[1, 0] = math.nan
        return examples

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "gather", spoiled)
        loss_R = struck.run(1)
    assert struck.skipped_R.tolist() == [0, 1, 0, 0]
    assert loss_R.isnan().tolist() == [False, True, False, False]
    after = lanes_of_row(struck.population, 1)
    for state in (before, after):
        # What a decision sums up begins anew.
        state.update({key: torch.zeros_like(tensor) for key, tensor in state.items() if key[1] == "norm_sum"})
    same_state(after, before)
    ours.run(1)
    for row in (0, 2, 3):
        same_state(*(lanes_of_row(population, row) for population in (struck.population, calm)))
    # The mean of a decision is that of the other updates.
    assert struck.run(3).isfinite().all()


@kinds
def test_a_population_that_never_grows_has_nothing_recorded(kind: SiteKind):
    population = populate(kind, ROWS)
    trainer = train_on(population, ROWS, make_split(kind, 64), batch_size=16, total=200)
    first_R = trainer.run(5)
    trainer.run(100)
    assert (trainer.run(5) < first_R).all()
    assert population.slots.gradient_norm.isnan().all()


def test_labels_and_examples_are_of_the_same_draw():
    """A constant host cannot tell examples apart, yet learns the share of each class in what it was shown."""
    kind = SiteKind.VECTOR
    data = make_split(kind, 30, torch.float64)
    blind = Split(torch.zeros_like(data.x), data.y)
    population = populate(kind, [0, 1], dtype=torch.float64)
    trainer = train_on(population, [0, 1], blind, batch_size=30, total=600, weight_decay=0.0, learning_rate=0.05)
    trainer.run(600)
    logits, _ = population.forward(blind.x.expand(2, -1, -1), population.main_pass, statistics=Statistics.RUNNING)
    share = torch.bincount(data.y, minlength=3) / len(data.y)
    assert ((logits.softmax(2)[:, 0] - share).abs() < 0.01).all()
