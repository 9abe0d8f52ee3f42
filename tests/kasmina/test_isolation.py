"""Straight-through incubation: the host's values bit for bit, gradients for both."""

import pytest
import torch
import torch.nn.functional as F

from esper.kasmina.isolation import ste_forward

WILD = [0.0, -0.0, 1.5, 1e30, -1e30, float("inf"), float("-inf"), float("nan")]


def bits(x: torch.Tensor) -> torch.Tensor:
    size = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.detach().contiguous().view(size)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed_dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_value_is_the_hosts_bit_for_bit_whatever_the_seed_holds(dtype, seed_dtype):
    """Every pair of a host value and a seed value; the finite ones round differently in `h + (s - s)`, too."""
    host, seed = torch.cartesian_prod(torch.tensor(WILD), torch.tensor(WILD)).unbind(1)
    host, seed = host.to(dtype), seed.to(seed_dtype)
    result = ste_forward(host, seed)
    assert result.dtype == dtype
    assert torch.equal(bits(result), bits(host))


def test_both_get_the_gradient_of_their_sum():
    generator = torch.Generator().manual_seed(1)
    host, seed, upstream = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    host.requires_grad_()
    seed.requires_grad_()
    ste_forward(host, seed).backward(upstream)
    assert torch.equal(host.grad, upstream)
    assert torch.equal(seed.grad, upstream)


@pytest.mark.parametrize("value", WILD)
def test_a_non_finite_seed_spoils_no_gradient(value):
    host = torch.tensor([1.0, 2.0], requires_grad=True)
    seed = torch.full((2,), value, requires_grad=True)
    (ste_forward(host, seed) ** 2).sum().backward()
    assert host.grad.tolist() == [2.0, 4.0]
    assert seed.grad.tolist() == [2.0, 4.0]


@pytest.mark.parametrize("host_wants", [False, True])
@pytest.mark.parametrize("seed_wants", [False, True])
def test_who_wants_no_gradient_gets_none(host_wants, seed_wants):
    host = torch.ones(2, requires_grad=host_wants)
    seed = torch.ones(2, requires_grad=seed_wants)
    result = ste_forward(host, seed)
    assert result.requires_grad == (host_wants or seed_wants)
    if result.requires_grad:
        result.sum().backward()
    assert (host.grad is not None) == host_wants
    assert (seed.grad is not None) == seed_wants


def parts(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Weights of a layer of the host below the seed, of the seed, and of the head above it."""
    return [torch.randn(5, 5, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def test_the_host_learns_exactly_as_if_alone():
    below, seed, above = parts(torch.Generator().manual_seed(2))
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(3))
    h = F.linear(x, below).relu()
    alone = torch.autograd.grad(F.linear(h, above).square().mean(), (below, above))
    h = F.linear(x, below).relu()
    loss = F.linear(ste_forward(h, F.linear(h.detach(), seed).tanh()), above).square().mean()
    with_seed = torch.autograd.grad(loss, (below, above, seed))
    for mine, theirs in zip(alone, with_seed[:2], strict=True):
        assert torch.equal(bits(mine), bits(theirs))
    assert with_seed[2].abs().sum() > 0


@pytest.mark.parametrize("host_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_the_result_has_the_hosts_dtype(host_dtype, seed_dtype):
    """Under autocast a linear gives bfloat16 and a mean of float32 inputs float32: the two may meet."""
    generator = torch.Generator().manual_seed(4)
    below, seed, above = parts(generator)
    x = torch.randn(7, 5, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        raw = F.linear(x, below)
        assert raw.dtype == torch.bfloat16
        host = raw.to(host_dtype)
        delta = F.linear(host.detach(), seed).to(seed_dtype)
        result = ste_forward(host, delta)
        assert result.dtype == host_dtype
        assert torch.equal(bits(result), bits(host))
        host.retain_grad()
        delta.retain_grad()
        result.float().square().sum().backward()
    assert host.grad.dtype == host_dtype
    assert delta.grad.dtype == seed_dtype
    expected = 2 * host.detach().float()
    assert torch.equal(host.grad, expected.to(host_dtype))
    assert torch.equal(delta.grad, expected.to(host_dtype).to(seed_dtype))
    for weight in (below, seed):
        assert weight.grad.dtype == torch.float32
        assert weight.grad.isfinite().all()
        assert weight.grad.abs().sum() > 0
    assert above.grad is None
