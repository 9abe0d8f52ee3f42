"""The masked distribution against other implementations, plain float64 formulas and its promises about gradients."""

import importlib
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from esper.leyline.errors import EsperError, InvalidStateMachineError
from esper.tamiyo.policy.distribution import EMPTY_MASK, NOT_FINITE, MaskedCategorical, Validation, raise_flag

NAN, INF = float("nan"), float("inf")
SHARES = [0.0, 0.05, 0.5]
MASKS = torch.tensor(list(itertools.product([False, True], repeat=6))[1:])
"""All masks of six choices but the empty one."""


def random_case(seed: int, rows: int = 16, width: int = 6, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and masks with at least one valid choice."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, width, generator=generator) * scale
    mask = torch.rand(rows, width, generator=generator) < 0.6
    mask[torch.arange(rows), torch.randint(width, (rows,), generator=generator)] = True
    return logits, mask


def plain_probabilities(logits: torch.Tensor, mask: torch.Tensor, share: float) -> torch.Tensor:
    """`(1 - e) * softmax + e * uniform` over the valid choices, in float64, 0 elsewhere."""
    table = []
    for row, valid in zip(logits.double().tolist(), mask.tolist(), strict=True):
        largest = max(x for x, v in zip(row, valid, strict=True) if v)
        weights = [math.exp(x - largest) if v else 0.0 for x, v in zip(row, valid, strict=True)]
        total, n = sum(weights), sum(valid)
        table.append([(1 - share) * w / total + share / n if v else 0.0 for w, v in zip(weights, valid, strict=True)])
    return torch.tensor(table, dtype=torch.float64)


CASES = {
    "seed": st.integers(0, 2**40),
    "rows": st.integers(1, 8),
    "width": st.integers(1, 12),
    "scale": st.sampled_from([0.0, 0.1, 1.0, 10.0]),
}


OTHERS = [
    ("torchrl.modules", "MaskedCategorical", "mask"),
    ("sb3_contrib.common.maskable.distributions", "MaskableCategorical", "masks"),
]


@pytest.mark.parametrize(("module", "name", "masked"), OTHERS)
@settings(max_examples=60)
@given(**CASES)
def test_it_equals_others(module: str, name: str, masked: str, seed: int, rows: int, width: int, scale: float) -> None:
    logits, mask = random_case(seed, rows, width, scale)
    other = getattr(importlib.import_module(module), name)(logits=logits, **{masked: mask})
    ours = MaskedCategorical(logits, mask)
    for choice in range(width):
        at, valid = torch.full((rows,), choice), mask[:, choice]
        torch.testing.assert_close(ours.log_prob(at)[valid], other.log_prob(at)[valid], rtol=1e-5, atol=1e-5)
    entropy = ours.entropy() * mask.sum(1).clamp_min(2).log()
    torch.testing.assert_close(entropy, other.entropy(), rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.mode(), other.mode)


@settings(max_examples=100)
@given(**CASES, share=st.sampled_from([*SHARES, 0.999]))
def test_it_equals_the_formula(seed: int, rows: int, width: int, scale: float, share: float) -> None:
    logits, mask = random_case(seed, rows, width, scale)
    plain = plain_probabilities(logits, mask, share)
    surprise = -torch.where(plain > 0, plain, 1.0).log()
    entropy = (plain * surprise).sum(1) / mask.sum(1).clamp_min(2).double().log()
    for dtype, exact in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        ours = MaskedCategorical(logits.to(dtype), mask, uniform_share=share)
        told = ours.probs
        assert not told[~mask].any(), "exactly 0"
        assert not ours.log_probs.exp()[~mask].any()
        torch.testing.assert_close(told.double(), plain, rtol=exact, atol=exact)
        torch.testing.assert_close(-ours.log_probs[mask].double(), surprise[mask], rtol=exact, atol=exact)
        torch.testing.assert_close(told.sum(1), torch.ones(rows, dtype=dtype), rtol=exact, atol=exact)
        torch.testing.assert_close(ours.entropy().double(), entropy, rtol=4 * exact, atol=4 * exact)


def test_any_leading_shape_and_a_mask_that_is_broadcast() -> None:
    logits, mask = random_case(1, rows=24)
    shaped = MaskedCategorical(logits.reshape(2, 3, 4, 6), mask[0], uniform_share=0.05)
    flat = MaskedCategorical(logits, mask[:1].expand(24, 6), uniform_share=0.05)
    choice, uniform = torch.full((24,), int(mask[0].int().argmax())), torch.linspace(0, 0.99, 24)
    assert torch.equal(shaped.log_prob(choice.reshape(2, 3, 4)), flat.log_prob(choice).reshape(2, 3, 4))
    assert torch.equal(shaped.entropy(), flat.entropy().reshape(2, 3, 4))
    assert torch.equal(shaped.mode(), flat.mode().reshape(2, 3, 4))
    assert torch.equal(shaped.sample(uniform.reshape(2, 3, 4)), flat.sample(uniform).reshape(2, 3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8])
def test_a_mask_that_is_not_boolean_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"mask: {dtype} given, bool needed"):
        MaskedCategorical(torch.zeros(2, 3), torch.ones(2, 3, dtype=dtype))


# --- Gradients ---


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("upstream", [1.0, 1e6, -1e6])
@pytest.mark.parametrize("quantity", ["log_prob", "entropy"])
def test_the_gradient_reaches_every_valid_choice_and_no_other(share: float, upstream: float, quantity: str) -> None:
    """For every mask and, of log_prob, every valid choice; the formula is that of float64 autograd."""
    generator = torch.Generator().manual_seed(3)
    mask, choice = MASKS.repeat_interleave(6, 0), torch.arange(6).repeat(len(MASKS))
    named = mask.gather(1, choice[:, None])[:, 0]
    mask, choice = mask[named], choice[named]
    logits = torch.randn(mask.shape, generator=generator).requires_grad_()
    precise = logits.detach().double().requires_grad_()
    ours = MaskedCategorical(logits, mask, uniform_share=share)
    pi = precise.masked_fill(~mask, -INF).softmax(1)
    mixed = ((1 - share) * pi + share / mask.sum(1, keepdim=True)).masked_fill(~mask, 1.0).log()
    if quantity == "log_prob":
        told, expected = ours.log_prob(choice), mixed.gather(1, choice[:, None])[:, 0]
    else:
        told, expected = ours.entropy(), -(mixed.exp() * mixed).sum(1) / mask.sum(1).clamp_min(2).log()
    told.sum().mul(upstream).backward()
    expected.sum().mul(upstream).backward()
    assert logits.grad.isfinite().all()
    several = mask & (mask.sum(1, keepdim=True) > 1)
    assert (logits.grad[several] != 0).all()
    assert (logits.grad[~several] == 0).all()
    torch.testing.assert_close(logits.grad.double() / upstream, precise.grad / upstream, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("junk", [NAN, INF, -INF, 1e38, -1e38])
def test_what_stands_at_invalid_choices_does_not_matter(share: float, junk: float) -> None:
    logits, mask = random_case(5, rows=40)
    results = []
    for given_logits in (logits, logits.masked_fill(~mask, junk)):
        leaf = given_logits.clone().requires_grad_()
        ours = MaskedCategorical(leaf, mask, uniform_share=share)
        assert ours.flag == 0, "junk is not told of"
        at = ours.sample(torch.linspace(0, 0.999, 40))
        (ours.log_prob(at) * 1e6 + ours.entropy() * 1e6).sum().backward()
        assert leaf.grad.isfinite().all()
        assert not leaf.grad[~mask].any()
        results.append((ours.log_probs.detach(), at, ours.mode(), ours.entropy().detach(), leaf.grad))
    for plain, junked in zip(*results, strict=True):
        assert torch.equal(plain, junked)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("spread", [20.0, 100.0, 1e3, 1e4])
def test_logits_far_apart_stay_finite(share: float, spread: float) -> None:
    generator = torch.Generator().manual_seed(int(spread))
    logits = ((torch.rand(MASKS.shape, generator=generator) - 0.5) * 2 * spread).requires_grad_()
    ours = MaskedCategorical(logits, MASKS, uniform_share=share)
    log_prob = ours.log_probs[MASKS]
    ((ours.entropy().sum() + log_prob.sum()) * 1e6).backward()
    assert (log_prob.isfinite() & (log_prob <= 0)).all()
    assert logits.grad.isfinite().all()
    assert not logits.grad[~MASKS].any()


@pytest.mark.parametrize("n", range(2, 7))
def test_a_share_of_uniform_keeps_a_collapsed_choice_alive(n: int) -> None:
    """The rare choice stands 40 below the others."""
    logits = torch.tensor([[-40.0, 0.0, 0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    mask = torch.arange(6)[None] < n
    rare = MaskedCategorical(logits, mask, uniform_share=0.05).log_prob(torch.tensor([0]))
    assert rare.exp().item() >= 0.05 / n * (1 - 1e-6)
    (-rare).sum().backward()
    assert (logits.grad[mask] != 0).all()
    assert not logits.grad[~mask].any()
    pi = math.exp(-40) / (n - 1 + math.exp(-40))
    expected = -0.95 * pi * (1 - pi) / (0.95 * pi + 0.05 / n)
    assert logits.grad[0, 0].item() == pytest.approx(expected, rel=1e-4, abs=0)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("logit", [-1e4, -3.0, 0.0, 7.0, 1e4])
def test_one_valid_choice_is_certain(share: float, logit: float) -> None:
    logits = torch.full((6, 6), logit, requires_grad=True)
    ours = MaskedCategorical(logits, torch.eye(6, dtype=torch.bool), uniform_share=share)
    log_prob, entropy = ours.log_prob(torch.arange(6)), ours.entropy()
    assert ((log_prob == 0) & (entropy == 0)).all()
    (log_prob * 1e6 + entropy * 1e6).sum().backward()
    assert (logits.grad == 0).all()
    assert all(torch.equal(ours.sample(torch.full((6,), uniform)), torch.arange(6)) for uniform in (0.0, 0.5, 1.0))


# --- Entropy ---


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("level", [0.0, -1e4, 1e4, -1e20])
def test_entropy_is_one_at_uniform_and_zero_with_one_choice(share: float, level: float) -> None:
    entropy = MaskedCategorical(torch.full(MASKS.shape, level), MASKS, uniform_share=share).entropy()
    alone = MASKS.sum(1) == 1
    assert (entropy[alone] == 0).all()
    assert (entropy <= 1).all()
    torch.testing.assert_close(entropy[~alone], torch.ones(57), rtol=0, atol=1e-6)


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=6, max_size=6), st.sampled_from(SHARES))
def test_entropy_is_between_zero_and_one(logits: list[float], share: float) -> None:
    entropy = MaskedCategorical(torch.tensor(logits), MASKS, uniform_share=share).entropy()
    assert ((entropy >= 0) & (entropy <= 1)).all()


# --- Validation ---

WRONG = {
    "empty": ([0.0, 0.0, 0.0], [False, False, False], EMPTY_MASK, InvalidStateMachineError, "no valid choice"),
    **{f"logit {x}": ([0.0, x, 0.0], [False, True, True], NOT_FINITE, EsperError, "finite") for x in (NAN, INF, -INF)},
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("share", SHARES)
def test_what_is_wrong_is_told_as_the_mode_says(wrong: str, share: float) -> None:
    """One bad row among good ones."""
    bad_logits, bad_mask, bit, error, words = WRONG[wrong]
    logits, mask = torch.zeros(4, 3), torch.ones(4, 3, dtype=torch.bool)
    logits[2], mask[2] = torch.tensor(bad_logits), torch.tensor(bad_mask)
    off = MaskedCategorical(logits, mask, uniform_share=share, validation=Validation.OFF)
    assert off.flag is None
    deferred = MaskedCategorical(logits, mask, uniform_share=share)
    assert (deferred.flag.shape, deferred.flag.dtype) == ((), torch.int64)
    assert deferred.flag == bit
    for ours in (off, deferred):
        ours.entropy(), ours.mode(), ours.log_prob(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(error, match=words):
        raise_flag(int(deferred.flag))
    with pytest.raises(error, match=words):
        MaskedCategorical(logits, mask, uniform_share=share, validation=Validation.EAGER)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])
def test_a_choice_that_exists_is_drawn_whatever_is_wrong(uniform: float, share: float) -> None:
    """An index beyond the end would raise where it is used, before the flag has arrived."""
    for bad_logits, bad_mask, *_ in WRONG.values():
        ours = MaskedCategorical(torch.tensor([bad_logits]), torch.tensor([bad_mask]), uniform_share=share)
        assert 0 <= ours.sample(torch.tensor([uniform])).item() < 3


def test_the_empty_mask_is_told_first_and_nothing_wrong_not_at_all() -> None:
    assert MaskedCategorical(torch.tensor([[0.0], [NAN]]), torch.tensor([[False], [True]])).flag == 3
    with pytest.raises(InvalidStateMachineError):
        raise_flag(EMPTY_MASK | NOT_FINITE)
    assert MaskedCategorical(*random_case(0), validation=Validation.EAGER).flag is None
    raise_flag(int(MaskedCategorical(*random_case(0)).flag))


def test_nothing_is_read_back_but_in_eager_mode() -> None:
    """Tensors on the meta device have no values: reading one raises."""
    logits, mask = torch.zeros(4, 6, device="meta"), torch.ones(4, 6, dtype=torch.bool, device="meta")
    for validation, share in itertools.product((Validation.OFF, Validation.DEFERRED), SHARES):
        ours = MaskedCategorical(logits, mask, uniform_share=share, validation=validation)
        choice = ours.sample(torch.zeros(4, device="meta"))
        assert ours.log_prob(choice).shape == ours.entropy().shape == ours.mode().shape == (4,)
    with pytest.raises(RuntimeError, match="meta"):
        MaskedCategorical(logits, mask, validation=Validation.EAGER)


def test_the_environment_names_the_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ESPER_VALIDATE_MASKS", raising=False)
    assert Validation.from_environment() is Validation.DEFERRED
    for name in ("off", "deferred", "eager"):
        monkeypatch.setenv("ESPER_VALIDATE_MASKS", name)
        assert Validation.from_environment() is Validation(name)


@pytest.mark.parametrize("name", ["", "EAGER", "on"])
def test_an_unknown_mode_is_one_line_with_the_known_ones(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("ESPER_VALIDATE_MASKS", name)
    with pytest.raises(EsperError, match=f"^ESPER_VALIDATE_MASKS: unknown mode '{name}'; use off, deferred, eager$"):
        Validation.from_environment()


# --- Precision ---


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("given_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_results_are_of_float32_or_better(share: float, given_dtype: torch.dtype, autocast: bool) -> None:
    told = torch.promote_types(given_dtype, torch.float32)
    logits, mask = random_case(2)
    leaf, grid = logits.to(given_dtype).requires_grad_(), torch.linspace(0, 0.999, 16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = MaskedCategorical(leaf, mask, uniform_share=share)
        log_prob, entropy = ours.log_prob(ours.mode()), ours.entropy()
        drawn = ours.sample(grid)
    assert {ours.log_probs.dtype, ours.probs.dtype, log_prob.dtype, entropy.dtype} == {told}
    precise = MaskedCategorical(leaf.detach().to(told), mask, uniform_share=share)
    assert torch.equal(ours.log_probs, precise.log_probs), "as precise as if the logits had been widened before"
    assert torch.equal(entropy, precise.entropy())
    assert torch.equal(drawn, precise.sample(grid))
    (log_prob + entropy).sum().backward()
    assert leaf.grad.dtype == given_dtype
    assert not leaf.grad[~mask].any()


# --- Sampling ---

ENDS = [
    *(torch.tensor(x) for x in (0.0, 1e-45, 2**-24, 0.5, 1 - 2**-24, 1.0)),
    torch.tensor(math.nextafter(1, 0), dtype=torch.float64),
]
"""Numbers of a stream; a float64 just below 1 is 1 when it is narrowed."""


@pytest.mark.parametrize("share", SHARES)
def test_the_frequencies_are_the_probabilities(share: float) -> None:
    """Over a fine grid, of which each choice gets its share up to one point at either end."""
    steps = 20_000
    grid = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    for logits, mask in zip(*random_case(8, rows=20, scale=2.0), strict=True):
        repeated = logits.double().expand(steps, 6), mask.expand(steps, 6)
        drawn = MaskedCategorical(*repeated, uniform_share=share).sample(grid)
        counts = torch.bincount(drawn, minlength=6)
        expected = plain_probabilities(logits[None], mask[None], share)[0] * steps
        assert ((counts - expected).abs() <= 1).all()
        assert not counts[~mask].any()
        assert torch.equal(drawn, drawn.sort().values), "the distribution function, inverted"


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 200.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_an_invalid_choice_is_never_drawn(share: float, scale: float, dtype: torch.dtype) -> None:
    """Neither at the ends of the uniform numbers nor where probabilities underflow."""
    logits = torch.randn(20, *MASKS.shape, generator=torch.Generator().manual_seed(1)) * scale
    mask = MASKS.expand(logits.shape)
    ours = MaskedCategorical(logits.to(dtype), mask, uniform_share=share)
    assert mask.gather(-1, ours.mode()[..., None]).all()
    for uniform in ENDS:
        drawn = ours.sample(uniform.expand(mask.shape[:-1]))
        assert drawn.dtype == torch.int64
        assert mask.gather(-1, drawn[..., None]).all()
        assert (ours.probs.gather(-1, drawn[..., None]) > 0).all()


def test_drawing_has_no_gradient_and_leaves_the_generator_of_torch_alone() -> None:
    logits, mask = random_case(6)
    before = torch.get_rng_state()
    results = decide(logits.requires_grad_(), mask, torch.full((16,), 0.3), Validation.DEFERRED, 0.05)
    assert [result.requires_grad for result in results] == [False, True, True, False, False]
    assert torch.equal(torch.get_rng_state(), before)


# --- Compiling, and what is launched ---


def decide(
    logits: torch.Tensor, mask: torch.Tensor, uniform: torch.Tensor, validation: Validation, share: float
) -> tuple[torch.Tensor | None, ...]:
    ours = MaskedCategorical(logits, mask, uniform_share=share, validation=validation)
    choice = ours.sample(uniform)
    return choice, ours.log_prob(choice), ours.entropy(), ours.mode(), ours.flag


@pytest.mark.parametrize("validation", [Validation.OFF, Validation.DEFERRED])
@pytest.mark.parametrize("share", [0.0, 0.05])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_compiles_whole(validation: Validation, share: float, backend: str) -> None:
    torch._dynamo.reset()
    given_case = *random_case(7), torch.linspace(0, 0.999, 16), validation, share
    compiled = torch.compile(decide, fullgraph=True, backend=backend)(*given_case)
    torch.testing.assert_close(compiled, decide(*given_case))


class Recorder(TorchDispatchMode):
    """Operations by name, and whether a tensor goes into them."""

    def __init__(self) -> None:
        super().__init__()
        self.fed: dict[str, bool] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.fed[str(func)] = any(isinstance(arg, torch.Tensor) for arg in args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("validation", [Validation.OFF, Validation.DEFERRED])
def test_no_tensor_is_made_out_of_a_number(validation: Validation, share: float) -> None:
    """Each would be a copy to the device or a fill of its own."""
    given_case = *random_case(9), torch.full((16,), 0.5), validation, share
    with Recorder() as recorder:
        decide(*given_case)
    assert "aten._log_softmax.default" in recorder.fed
    assert all(recorder.fed.values()), "a tensor out of nothing"
    words = ("scalar_tensor", "aten.tensor", "lift_fresh", "_local_scalar_dense", "full", "new_")
    assert not [name for name in recorder.fed if any(word in name for word in words)]
