"""The row-wise optimizer: each lane is a `torch.optim` optimizer of its own."""

import numpy as np
import pytest
import torch

from esper.kasmina.banks import Bank
from esper.kasmina.optim import RowOptimizer
from esper.kasmina.rows.core import RowSequential
from esper.kasmina.rows.dense import RowLinear
from esper.kasmina.rows.norms import RowLayerNorm
from esper.leyline.config import OptimizerConfig
from esper.leyline.streams import Stream

LAYER = RowSequential(RowLinear(5, 4), RowLayerNorm(4), RowLinear(4, 3))
SIZE = LAYER.parameter_count
STATE = ("theta", "first", "second", "steps")
METHODS = ["adamw", "sgd"]
CONFIGS = {
    "adamw": OptimizerConfig(method="adamw", weight_decay=0.2, momentum=0.8, beta2=0.95, epsilon=1e-6, clip_norm=1.5),
    "adamw default": OptimizerConfig(),
    "adamw no decay": OptimizerConfig(weight_decay=0.0),
    "sgd": OptimizerConfig(method="sgd", weight_decay=0.2, momentum=0.8, clip_norm=1.5),
    "sgd without momentum": OptimizerConfig(method="sgd", momentum=0.0, weight_decay=0.0),
}


def bank_of(lanes: int, dtype: torch.dtype = torch.float64) -> Bank:
    bank = Bank(LAYER, "cpu", dtype)
    row = np.arange(lanes)
    bank.hold(row, np.zeros_like(row), Stream(3, "lanes"), torch.arange(lanes))
    return bank


def step(
    optimizer: RowOptimizer, bank: Bank, grad: torch.Tensor, rate: torch.Tensor, active: torch.Tensor | None = None
) -> torch.Tensor:
    """Update one bank; `optimizer.step` takes several."""
    (skipped,) = optimizer.step([bank], [grad], [rate], [active])
    return skipped


def change(bank: Bank, lanes: dict[int, int], rows: int = 10) -> None:
    """Hold the seeds `lanes`: {row: seed id}."""
    row, seed_id = np.array(sorted(lanes)), np.array([lanes[r] for r in sorted(lanes)])
    bank.hold(row, seed_id, Stream(3, "lanes"), torch.arange(rows))


def gradients(steps: int, lanes: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """[steps, lanes, P]: far below and far above the clipping norm, and sometimes all zero."""
    generator = torch.Generator().manual_seed(9)
    scale = 10.0 ** torch.randint(-4, 3, (steps, lanes, 1), generator=generator).double()
    scale[::7, 1:2] = 0.0
    return (torch.randn(steps, lanes, SIZE, generator=generator, dtype=torch.float64) * scale).to(dtype)


def rates(steps: int, lanes: int) -> torch.Tensor:
    """[steps, lanes]: every lane at a rate of its own, which changes."""
    return 0.05 * torch.rand(steps, lanes, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


class Reference:
    """One lane under `torch.optim`, its matrices in a group with weight decay and the rest in one without."""

    def __init__(self, config: OptimizerConfig, theta_P: torch.Tensor) -> None:
        self.config = config
        pieces = LAYER.split(theta_P.detach().clone()[None])
        self.parameters = [torch.nn.Parameter(p[0].clone()) for p in pieces]
        matrices = [p for p in self.parameters if p.dim() > 1]
        others = [p for p in self.parameters if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        if config.method == "adamw":
            betas = (config.momentum, config.beta2)
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=1.0, betas=betas, eps=config.epsilon)
        else:
            self.optimizer = torch.optim.SGD(groups, lr=1.0, momentum=config.momentum)

    def step(self, grad_P: torch.Tensor, rate: float) -> None:
        for parameter, grad in zip(self.parameters, LAYER.split(grad_P[None]), strict=True):
            parameter.grad = grad[0].clone()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    def flat(self, state: str | None = None) -> torch.Tensor:
        """The parameters, or a state of the optimizer, as one vector."""
        if state is None:
            return torch.cat([p.detach().flatten() for p in self.parameters])
        return torch.cat([self.optimizer.state[p][state].flatten() for p in self.parameters])

    def steps(self) -> float:
        return self.optimizer.state[self.parameters[0]]["step"].item()


def close(told: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-12) -> bool:
    return torch.allclose(told.detach(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_lane_is_a_torch_optimizer(name):
    config, lanes, steps = CONFIGS[name], 4, 60
    bank, optimizer = bank_of(lanes), RowOptimizer(CONFIGS[name])
    references = [Reference(config, bank.theta[n]) for n in range(lanes)]
    all_grads, all_rates = gradients(steps, lanes), rates(steps, lanes)
    norms = all_grads.norm(dim=2)
    assert (norms > config.clip_norm).any()
    assert (norms < config.clip_norm).any()
    for grad, rate in zip(all_grads, all_rates, strict=True):
        step(optimizer, bank, grad.clone(), rate)
        for n, reference in enumerate(references):
            reference.step(grad[n], rate[n].item())
            assert close(bank.theta[n], reference.flat())
    for n, reference in enumerate(references):
        if config.method == "adamw":
            assert close(bank.first[n], reference.flat("exp_avg"))
            assert close(bank.second[n], reference.flat("exp_avg_sq"))
            assert bank.steps[n] == reference.steps() == steps
        elif config.momentum:
            assert close(bank.first[n], reference.flat("momentum_buffer"))
    assert close(bank.norm_sum, norms.sum(0))


@pytest.mark.parametrize("name", ["adamw default", "sgd"])
def test_in_single_precision_too(name):
    config, lanes, steps = CONFIGS[name], 3, 40
    bank, optimizer = bank_of(lanes, torch.float32), RowOptimizer(CONFIGS[name])
    references = [Reference(config, bank.theta[n]) for n in range(lanes)]
    for grad, rate in zip(gradients(steps, lanes, torch.float32), rates(steps, lanes).float(), strict=True):
        step(optimizer, bank, grad.clone(), rate)
        for n, reference in enumerate(references):
            reference.step(grad[n], rate[n].item())
    for n, reference in enumerate(references):
        assert close(bank.theta[n], reference.flat(), 1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_weight_decay_reaches_matrices_alone(method):
    """Without a gradient only decay moves a parameter."""
    bank = bank_of(2)
    before = bank.theta.detach().clone()
    optimizer = RowOptimizer(OptimizerConfig(method=method, weight_decay=0.5, momentum=0.0))
    step(optimizer, bank, torch.zeros_like(bank.theta), torch.tensor([0.1, 0.2], dtype=torch.float64))
    for old, new in zip(LAYER.split(before), LAYER.split(bank.theta.detach()), strict=True):
        kept = torch.tensor([0.95, 0.9], dtype=torch.float64).view(2, *[1] * (old.dim() - 1)) if old.dim() > 2 else 1.0
        assert close(new, old * kept)


@pytest.mark.parametrize("method", METHODS)
def test_lanes_that_start_and_pause_at_different_times_count_their_own_steps(method):
    config, lanes, steps = CONFIGS[method], 4, 30
    bank, optimizer = bank_of(lanes), RowOptimizer(config)
    references = [Reference(config, bank.theta[n]) for n in range(lanes)]
    active = torch.ones(steps, lanes, dtype=torch.bool)
    active[:7, 1] = False
    active[:15, 2] = False
    active[20:, 2] = False
    active[1::3, 3] = False
    all_grads, all_rates = gradients(steps, lanes), rates(steps, lanes)
    for grad, rate, on in zip(all_grads, all_rates, active, strict=True):
        before = {name: getattr(bank, name).detach().clone() for name in STATE}
        step(optimizer, bank, grad.clone(), rate, on)
        for n, reference in enumerate(references):
            if on[n]:
                reference.step(grad[n], rate[n].item())
            else:
                for name in STATE:
                    assert torch.equal(getattr(bank, name)[n], before[name][n]), name
            assert close(bank.theta[n], reference.flat())
    assert bank.steps.tolist() == active.sum(0).tolist()


@pytest.mark.parametrize("method", METHODS)
def test_a_mask_of_all_lanes_is_no_mask(method):
    masked, free = bank_of(3), bank_of(3)
    optimizer = RowOptimizer(CONFIGS[method])
    for grad, rate in zip(gradients(5, 3), rates(5, 3), strict=True):
        step(optimizer, masked, grad.clone(), rate, torch.ones(3, dtype=torch.bool))
        step(optimizer, free, grad.clone(), rate)
    for name in STATE:
        assert torch.equal(getattr(masked, name), getattr(free, name))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e200])
@pytest.mark.parametrize("idle", [False, True])
def test_a_non_finite_gradient_leaves_its_lane_alone_and_touches_no_other(method, bad, idle):
    """1e200 is finite and its norm is not."""
    lanes, steps, sick = 4, 12, 2
    struck, healthy = bank_of(lanes), bank_of(lanes)
    optimizer = RowOptimizer(CONFIGS[method])
    active = torch.ones(lanes, dtype=torch.bool)
    active[sick] = not idle
    for update, (grad, rate) in enumerate(zip(gradients(steps, lanes), rates(steps, lanes), strict=True)):
        before = {name: getattr(struck, name)[sick].detach().clone() for name in STATE}
        hit = update in (0, 5, 6)
        spoilt = grad.clone()
        if hit:
            spoilt[sick, 3] = bad
        skipped = step(optimizer, struck, spoilt, rate, active)
        assert skipped.tolist() == [n == sick and hit for n in range(lanes)]
        rest = active.clone()
        rest[sick] &= not hit
        step(optimizer, healthy, grad.clone(), rate, rest)
        for name in STATE:
            told = getattr(struck, name)
            assert torch.equal(told, getattr(healthy, name)), name
            assert told.isfinite().all()
            if hit:
                assert torch.equal(told[sick], before[name]), name
    others = [n for n in range(lanes) if n != sick]
    assert torch.equal(struck.norm_sum[others], healthy.norm_sum[others])
    assert 0 < struck.norm_sum[sick] < healthy.norm_sum[sick], "norms that are not finite are left out"


@pytest.mark.parametrize("method", METHODS)
def test_each_lane_has_its_own_rate(method):
    """The same gradient in every lane, of the same parameters: the way made is proportional to the rate."""
    bank = bank_of(3)
    with torch.no_grad():
        bank.theta.copy_(bank.theta[0].expand(3, SIZE).clone())
    start = bank.theta[0].detach().clone()
    optimizer = RowOptimizer(OptimizerConfig(method=method, weight_decay=0.0))
    grad = gradients(1, 1)[0].expand(3, SIZE).clone()
    step(optimizer, bank, grad, torch.tensor([0.01, 0.02, 0.05], dtype=torch.float64))
    way = bank.theta.detach() - start
    assert way[0].abs().max() > 1e-6
    assert close(way[1], 2 * way[0])
    assert close(way[2], 5 * way[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_rate_of_zero_moves_nothing_and_spoils_nothing(method, dtype):
    """A warm-up starts at 0 and a schedule may end there; units that never fire have gradients of exactly 0."""
    config = OptimizerConfig(method=method)
    bank, optimizer = bank_of(2, dtype), RowOptimizer(config)
    start = bank.theta.detach().clone()
    grad = gradients(1, 2, dtype)[0]
    grad[:, ::3] = 0.0
    step(optimizer, bank, grad.clone(), torch.tensor([0.0, 0.01], dtype=dtype))
    assert torch.equal(bank.theta[0], start[0])
    assert not torch.equal(bank.theta[1], start[1])
    assert bank.steps.tolist() == [1, 1]
    reference = Reference(config, start[0])
    reference.step(grad[0], 0.0)
    for _ in range(3):
        step(optimizer, bank, grad.clone(), torch.tensor([0.01, 0.0], dtype=dtype))
        reference.step(grad[0], 0.01)
    assert close(bank.theta[0], reference.flat(), 1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("rate", [1e-38, 1e-42, 1e-45])
def test_a_rate_whose_reciprocal_is_no_number_moves_nothing_and_spoils_nothing(rate):
    """The end of a schedule may come as near to 0 as it likes."""
    bank = bank_of(1, torch.float32)
    start = bank.theta.detach().clone()
    grad = gradients(1, 1, torch.float32)[0]
    grad[:, ::3] = 0.0
    step(RowOptimizer(OptimizerConfig()), bank, grad, torch.tensor([rate]))
    torch.testing.assert_close(bank.theta.detach(), start, rtol=0, atol=1e-30)


OTHER_LAYER = RowSequential(RowLinear(3, 2), RowLinear(2, 1, bias=False))


@pytest.mark.parametrize("method", METHODS)
def test_several_banks_at_once_are_each_bank_alone(method):
    """Lanes, sizes, rates, masks and non-finite gradients of one bank are none of another's business."""

    def banks() -> list[Bank]:
        small, empty = Bank(OTHER_LAYER, "cpu", torch.float64), bank_of(0)
        small.hold(np.arange(2), np.zeros(2, dtype=np.int64), Stream(3, "others"), torch.arange(2))
        return [bank_of(3), small, empty, bank_of(2)]

    optimizer = RowOptimizer(CONFIGS[method])
    together, alone = banks(), banks()
    generator = torch.Generator().manual_seed(4)
    for update in range(12):
        grads = [torch.randn(b.theta.shape, generator=generator, dtype=torch.float64) for b in together]
        speed = [0.05 * torch.rand(len(b), generator=generator, dtype=torch.float64) for b in together]
        masks = [None, torch.tensor([update % 2 == 0, True]), None, torch.tensor([True, update > 5])]
        if update == 4:
            grads[1][0, 0] = torch.nan
        optimizer.step(together, [g.clone() for g in grads], speed, masks)
        for bank, grad, rate, mask in zip(alone, grads, speed, masks, strict=True):
            step(optimizer, bank, grad.clone(), rate, mask)
        for one, other in zip(together, alone, strict=True):
            assert one.steps.tolist() == other.steps.tolist()
            for name in ("theta", "first", "second"):
                assert close(getattr(one, name), getattr(other, name).detach()), name
    assert [bank.steps.tolist() for bank in together] == [[12] * 3, [5, 12], [], [12, 6]]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_lane_does_not_depend_on_how_many_lanes_run(method, dtype):
    """Adding a row or a seed changes nobody else's numbers, not even in the last bit."""
    lanes, updates = 70, 60
    optimizer = RowOptimizer(OptimizerConfig(method=method))
    together = bank_of(lanes, dtype)
    watched = (0, 33, 69)
    alone = {n: Bank(LAYER, "cpu", dtype) for n in watched}
    for n, bank in alone.items():
        bank.hold(np.array([n]), np.zeros(1, dtype=np.int64), Stream(3, "lanes"), torch.arange(lanes))
    first: dict[int, int] = {}
    all_rates = rates(updates, lanes).to(dtype)
    for number, (grad, rate) in enumerate(zip(gradients(updates, lanes, dtype), all_rates, strict=True)):
        step(optimizer, together, grad.clone(), rate)
        for n, bank in alone.items():
            step(optimizer, bank, grad[n : n + 1].clone(), rate[n : n + 1])
            if not torch.equal(bank.theta[0], together.theta[n]):
                first.setdefault(n, number + 1)
    assert first == {}, "first update at which a lane differs"


@pytest.mark.parametrize("method", METHODS)
def test_survivors_keep_their_moments_and_newcomers_start_without(method):
    """Seeds come, go, and are replaced; each is its own torch optimizer from its first step to its last."""
    config = CONFIGS[method]
    bank, optimizer = bank_of(0), RowOptimizer(config)
    memberships = [{1: 0, 4: 0}, {0: 0, 1: 0, 4: 0, 7: 0}, {1: 0, 4: 1, 7: 0}, {4: 1}, {0: 1, 4: 1, 7: 1}]
    references: dict[tuple[int, int], Reference] = {}
    for part, lanes in enumerate(memberships):
        change(bank, lanes)
        keys = sorted(lanes.items())
        old = references
        references = {key: old.get(key) or Reference(config, bank.theta[n]) for n, key in enumerate(keys)}
        assert set(old) & set(references) or part == 0
        for grad, rate in zip(gradients(10, len(keys)), rates(10, len(keys)), strict=True):
            step(optimizer, bank, grad.clone(), rate)
            for n, key in enumerate(keys):
                references[key].step(grad[n], rate[n].item())
                assert close(bank.theta[n], references[key].flat()), (part, key)
    assert bank.steps.tolist() == [10, 30, 10]


@pytest.mark.parametrize("method", METHODS)
def test_the_parameters_stay_the_same_leaf(method):
    bank = bank_of(2)
    theta = bank.theta
    step(RowOptimizer(CONFIGS[method]), bank, gradients(1, 2)[0], rates(1, 2)[0])
    assert bank.theta is theta
    assert theta.is_leaf
    assert theta.requires_grad
    assert theta.grad is None
