"""Row layers beside their twins: one plain torch module for each lane, given the same numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from esper.kasmina.export import layer_state
from esper.kasmina.plain import build
from esper.kasmina.rows.core import RowLayer, Statistics
from esper.leyline.streams import Stream

BATCH = 5
# Sums are taken in another order; relative to the largest number compared.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}
exact = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
lanes = pytest.mark.parametrize("lanes", [1, 3])


@dataclass(frozen=True)
class Case:
    """A layer, the shape of one example, and where the lanes lie: 0 in [L, B, ...], 1 in [B, L*C, ...]."""

    name: str
    layer: RowLayer
    example: tuple[int, ...]
    axis: int
    axis_out: int | None = None
    # Number of different tokens, for layers that take tokens.
    tokens: int | None = None
    training: bool = False
    batch: int = BATCH


def cases(*many: Case):
    """Parametrise a test over cases."""
    return pytest.mark.parametrize("case", many, ids=[case.name for case in many])


def join(parts: Sequence[Tensor], axis: int) -> Tensor:
    """Lanes into one tensor."""
    return torch.stack(tuple(parts)) if axis == 0 else torch.cat(tuple(parts), 1)


def take(whole: Tensor, axis: int, lane: int, count: int) -> Tensor:
    """One lane of a joined tensor."""
    return whole[lane] if axis == 0 else whole.chunk(count, 1)[lane]


def close(ours: Tensor, theirs: Tensor) -> None:
    """Equal up to rounding, measured against the largest number."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    scale = max(1.0, theirs.abs().max().item())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=scale * TOLERANCE[ours.dtype])


def plain_of(layer: RowLayer) -> nn.Module:
    """The torch module that the layer describes."""
    return build(layer.plain())


def inputs(case: Case, count: int, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    """Examples [B, ...] of each lane, all different."""
    shape = (case.batch, *case.example)
    if case.tokens is not None:
        return [torch.randint(case.tokens, shape, generator=generator) for _ in range(count)]
    return [torch.randn(shape, generator=generator, dtype=dtype) + lane for lane in range(count)]


def start(case: Case, count: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, list[Tensor]]:
    """Parameters [L, P] and buffers, all different."""
    theta = 0.5 * torch.randn(count, case.layer.parameter_count, generator=generator, dtype=dtype)
    buffers = [b.low + torch.rand(count, *b.shape, generator=generator, dtype=dtype) for b in case.layer.buffers]
    return theta.requires_grad_(), buffers


def same_as_twins(
    case: Case,
    count: int,
    dtype: torch.dtype,
    twin: Callable[[], nn.Module] | None = None,
    call: Callable[[nn.Module, Tensor], Tensor] | None = None,
    passes: int = 1,
) -> None:
    """Compare outputs, gradients of input and parameters, and buffers of all lanes with those of their twins.

    `twin` makes the module (by default what the layer describes), `call` runs it. With several passes the input
    differs in each, gradients add up and buffers move on.
    """
    layer, axis = case.layer, case.axis
    axis_out = axis if case.axis_out is None else case.axis_out
    generator = torch.Generator().manual_seed(17)
    theta, buffers = start(case, count, dtype, generator)
    twins = []
    for lane in range(count):
        module = plain_of(layer) if twin is None else twin()
        module.to(dtype).load_state_dict(layer_state(layer, theta[lane], [b[lane] for b in buffers]))
        assert sum(p.numel() for p in module.parameters()) == layer.parameter_count
        assert {n: tuple(p.shape) for n, p in module.named_parameters()} == {p.name: p.shape for p in layer.params}
        twins.append(module.train(case.training))

    for _ in range(passes):
        parts = inputs(case, count, dtype, generator)
        x = join(parts, axis).contiguous()
        if x.is_floating_point():
            x.requires_grad_()
            parts = [part.clone().requires_grad_() for part in parts]
        y = layer.forward(
            x, layer.split(theta), buffers, statistics=Statistics.UPDATED if case.training else Statistics.RUNNING
        )
        expected = [(call or nn.Module.__call__)(module, part) for module, part in zip(twins, parts, strict=True)]
        upstream = [torch.randn(e.shape, generator=generator, dtype=e.dtype) for e in expected]
        if y.requires_grad:
            (y * join(upstream, axis_out)).sum().backward()
        for lane in range(count):
            part = take(y, axis_out, lane, count)
            close(part, expected[lane])
            assert part.shape == (case.batch, *layer.output_shape(case.example))
            if y.requires_grad:
                (expected[lane] * upstream[lane]).sum().backward()
            if x.is_floating_point():
                close(take(x.grad, axis, lane, count), parts[lane].grad)

    for lane, module in enumerate(twins):
        if layer.params:
            grads = layer_state(layer, theta.grad[lane], [b[lane] for b in buffers])
            for name, parameter in module.named_parameters():
                close(grads[name], parameter.grad)
        state = module.state_dict()
        for spec, buffer in zip(layer.buffers, buffers, strict=True):
            close(buffer[lane], state[spec.name])


def rows_apart(case: Case, dtype: torch.dtype = torch.float32) -> None:
    """A lane full of NaN changes no bit of the others, forward or backward."""
    layer, axis, count, sick = case.layer, case.axis, 3, 1
    axis_out = axis if case.axis_out is None else case.axis_out
    results = []
    for poison in (False, True):
        generator = torch.Generator().manual_seed(23)
        theta, buffers = start(case, count, dtype, generator)
        parts = inputs(case, count, dtype, generator)
        if poison:
            with torch.no_grad():
                theta[sick] = float("nan")
            if parts[sick].is_floating_point():
                parts[sick] = torch.full_like(parts[sick], float("nan"))
        x = join(parts, axis).contiguous()
        if x.is_floating_point():
            x.requires_grad_()
        y = layer.forward(
            x, layer.split(theta), buffers, statistics=Statistics.UPDATED if case.training else Statistics.RUNNING
        )
        if y.requires_grad:
            upstream = torch.randn(y.shape, generator=generator, dtype=dtype)
            # The sick lane's own loss is NaN as well.
            (y * upstream).sum().backward()
        seen = [*(b.detach() for b in buffers), take_all(y.detach(), axis_out, count)]
        if x.is_floating_point():
            seen.append(take_all(x.grad, axis, count))
        if layer.params:
            seen.append(theta.grad)
        results.append(seen)
    for healthy, beside in zip(*results, strict=True):
        assert healthy.isfinite().all()
        for lane in {0, 1, 2} - {sick}:
            assert torch.equal(beside[lane], healthy[lane])


def take_all(whole: Tensor, axis: int, count: int) -> Tensor:
    """All lanes [L, ...]."""
    return torch.stack([take(whole, axis, lane, count) for lane in range(count)])


def drawn(layer: RowLayer, count: int = 40) -> dict[str, Tensor]:
    """Initial values [L, ...] of every parameter, as a bank would draw them."""
    numbers = Stream(0, "start").uniform(torch.arange(count), torch.tensor([0]), layer.parameter_count)
    return dict(zip((p.name for p in layer.params), layer.split(layer.initial(numbers)), strict=True))


def starts_like(layer: RowLayer, twin: Callable[[], nn.Module], *, bounded: bool = True, count: int = 40) -> None:
    """Compare the distribution of initial values with that of freshly made torch modules."""
    ours = drawn(layer, count)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        fresh = [dict(twin().named_parameters()) for _ in range(count)]
    for name, mine in ours.items():
        theirs = torch.stack([parameters[name].detach() for parameters in fresh]).double()
        assert mine.shape == theirs.shape
        if theirs.std() == 0:
            assert (mine == theirs).all()
            continue
        # Thousands of numbers each: a few per cent are many standard errors.
        assert mine.mean().abs().item() < 0.05 * theirs.std().item()
        assert mine.std().item() == pytest.approx(theirs.std().item(), rel=0.03)
        if bounded:
            # Both fill the same interval and neither leaves it.
            assert mine.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.01)
