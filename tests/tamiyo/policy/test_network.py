"""The policy network: one set of weights for any number of slots, and the same numbers acting and learning."""

import inspect

import pytest
import torch
from torch import Tensor

from esper.leyline.actions import HEAD_COUNT, HEADS_OF_OP, Blueprint, Head, Op
from esper.leyline.config import PolicyConfig
from esper.leyline.errors import EsperError, InvalidStateMachineError
from esper.leyline.slots import SlotTensors
from esper.leyline.stages import Stage
from esper.tamiyo.policy.action_masks import ActionMasks, choice_count, compute_batch_masks
from esper.tamiyo.policy.distribution import EMPTY_MASK, NOT_FINITE, Validation
from esper.tamiyo.policy.features import RUN_FEATURES, RUNNING_FEATURES, SLOT_FEATURES
from esper.tamiyo.policy.network import REST, REST_SIZES, Decision, Evaluation
from esper.tamiyo.policy.network import FactoredRecurrentActorCritic as Policy
from esper.tamiyo.policy.observation import Observation

NAN = float("nan")
SLOT_COUNTS = [1, 3, 9, 100]
KNOWN = len(RUNNING_FEATURES)
SMALL = {"width": 16, "hidden": 24}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def new_policy(seed: int = 0, **config: float) -> Policy:
    """As a run starts with it."""
    policy = Policy(PolicyConfig(**config))
    policy.validation = Validation.DEFERRED
    policy.initialise(seeded(seed))
    return policy


@torch.no_grad()
def lively_policy(seed: int = 0, **config: float) -> Policy:
    """As if it had learned: what a new policy hardly shows is plain, and its statistics are no identity."""
    policy = new_policy(seed, **config)
    for parameter in policy.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=seeded(seed + parameter.numel()))
    policy.statistics.update(torch.randn(50, KNOWN, generator=seeded(seed)) * 3 + 1)
    return policy


def random_observation(*shape: int, slots: int, seed: int = 0) -> Observation:
    """Any numbers, and a third of the running features not measured."""
    generator = seeded(seed)
    slot = torch.randn(*shape, slots, len(SLOT_FEATURES), generator=generator)
    run = torch.randn(*shape, len(RUN_FEATURES), generator=generator)
    run[..., :KNOWN].masked_fill_(torch.rand(*shape, KNOWN, generator=generator) < 0.3, NAN)
    return Observation(slot, run)


def uniforms(rows: int, seed: int = 0) -> Tensor:
    return torch.rand(rows, HEAD_COUNT, generator=seeded(seed))


def random_masks(rows: int, slots: int, seed: int = 0) -> ActionMasks:
    """Of slots in any state; some blueprints fit."""
    generator = seeded(seed)
    state = SlotTensors.empty(rows, slots)
    state.stage = torch.tensor([int(s) for s in Stage])[torch.randint(len(Stage), (rows, slots), generator=generator)]
    state.alpha_mode = torch.randint(3, (rows, slots), generator=generator)
    state.alpha_target = torch.randint(2, (rows, slots), generator=generator).float()
    fits_SB = torch.rand(slots, len(Blueprint), generator=generator) < 0.5
    return compute_batch_masks(state, ActionMasks.empty(rows, fits_SB))


def open_masks(rows: int, slots: int) -> ActionMasks:
    """Every operation is legal on every slot, and every blueprint fits."""
    masks = ActionMasks.empty(rows, torch.ones(slots, len(Blueprint), dtype=torch.bool))
    for mask in (masks.op_RO, masks.slot_ROS, masks.gradual_RS):
        mask.fill_(True)
    masks.slot_ROS[:, int(Op.WAIT), 1:] = False
    return masks


def every_pair(slots: int) -> tuple[ActionMasks, Tensor, Tensor]:
    """Rows for every operation but WAIT with every slot."""
    op, slot = torch.cartesian_prod(torch.arange(1, len(Op)), torch.arange(slots)).T
    return open_masks(len(op), slots), op, slot


def allowed_actions(masks: ActionMasks, op: Tensor, slot: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Actions [1, R, H] that name `op` and `slot`, any choice of the other heads, and their masks."""
    mask_RHC = masks.chosen(op, slot)
    action_RH = (torch.rand(mask_RHC.shape, generator=seeded(seed)) * mask_RHC).argmax(-1)
    action_RH[:, Head.OP], action_RH[:, Head.SLOT] = op, slot
    return action_RH[None], mask_RHC[None]


def play(policy: Policy, steps: int, rows: int, slots: int, seed: int, **how: float) -> tuple[Observation, Decision]:
    """Decide `steps` times, memory carried on, masks of their own at each: what was seen and decided, stacked."""
    observation = random_observation(steps, rows, slots=slots, seed=seed)
    hidden, decisions = policy.initial_hidden(rows), []
    for t in range(steps):
        masks, uniform = random_masks(rows, slots, seed + t), uniforms(rows, seed + t)
        seen = Observation(observation.slot_RSF[t], observation.run_RF[t])
        decisions.append(vars(policy.get_action(seen, masks, hidden, uniform, **how)))
        hidden = decisions[-1].pop("hidden")
    stacked = {name: torch.stack([decision[name] for decision in decisions]) for name in decisions[0]}
    return observation, Decision(**stacked, hidden=hidden)


def score(policy: Policy, observation: Observation, played: Decision, **how: float) -> Evaluation:
    return policy.evaluate_actions(observation, played.action_RH, played.mask_RHC, **how)


def gradients(policy: Policy, loss: Tensor) -> dict[str, Tensor]:
    """Gradient by name; a parameter that gets none, or exactly 0, is left out."""
    policy.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None and not (p.grad == 0).all()}


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("make", [new_policy, lively_policy])
def test_one_set_of_weights_serves_any_number_of_slots(make, greedy: bool) -> None:
    policy, steps, rows = make(), 3, 16
    for slots in SLOT_COUNTS:
        _, told = play(policy, steps, rows, slots, seed=slots, greedy=greedy)
        heads = (steps, rows, HEAD_COUNT)
        assert (told.action_RH.shape, told.action_RH.dtype) == (heads, torch.int64)
        assert (told.mask_RHC.shape, told.mask_RHC.dtype) == ((*heads, choice_count(slots)), torch.bool)
        assert told.mask_RHC.gather(-1, told.action_RH[..., None]).all()
        assert told.log_prob_RH.shape == told.entropy_RH.shape == heads
        assert told.value_R.shape == (steps, rows)
        assert all(x.isfinite().all() for x in (told.log_prob_RH, told.entropy_RH, told.value_R))
        assert not told.flag.any()


def permuted(masks: ActionMasks, order: Tensor) -> ActionMasks:
    """The slots in another order; WAIT names none, which is written slot 0 in any."""
    slot_ROS = masks.slot_ROS[:, :, order]
    slot_ROS[:, int(Op.WAIT)] = masks.slot_ROS[:, int(Op.WAIT)]
    return ActionMasks(masks.op_RO, slot_ROS, masks.gradual_RS[:, order], masks.fits_SB[order], masks.heads_OHC)


@pytest.mark.parametrize("slots", [2, 5, 20])
@pytest.mark.parametrize("seed", range(3))
def test_slots_in_another_order_have_the_same_probabilities_in_that_order(slots: int, seed: int) -> None:
    """Every pair of operation and slot, each in a row of its own, at two decisions with different slots masked."""
    policy, generator = lively_policy(seed, **SMALL).double(), seeded(seed)
    order = torch.randperm(slots, generator=generator)
    masks, op, slot = every_pair(slots)
    rows = len(op)
    masks.slot_ROS[:, 1:] = torch.rand(len(Op) - 1, slots, generator=generator) < 0.7
    masks.slot_ROS[torch.arange(rows), op, slot] = True
    masks.gradual_RS[:] = torch.rand(slots, generator=generator) < 0.5
    masks.fits_SB[:, 2:] = torch.rand(slots, len(Blueprint) - 2, generator=generator) < 0.5
    seen = random_observation(2, rows, slots=slots, seed=seed)
    slot_RSF, run_RF = seen.slot_RSF.double(), seen.run_RF.double()
    told, decided = [], []
    there = permuted(masks, order), order.argsort()[slot], slot_RSF[:, :, order]
    for arranged, at, tokens in ((masks, slot, slot_RSF), there):
        action, mask = (x.expand(2, *x.shape[1:]) for x in allowed_actions(arranged, op, at, seed))
        told.append(policy.evaluate_actions(Observation(tokens, run_RF), action, mask))
        hidden = policy.initial_hidden(rows)
        for t in range(2):
            now = Observation(tokens[t], run_RF[t])
            decided.append(policy.get_action(now, arranged, hidden, uniforms(rows), greedy=True))
            hidden = decided[-1].hidden
    exact = {"rtol": 0, "atol": 1e-9}
    torch.testing.assert_close(*((x.log_prob_TRH, x.entropy_TRH) for x in told), **exact)
    torch.testing.assert_close(told[0].value_TR, told[1].value_TR, rtol=1e-6, atol=1e-6)
    for one, other in ((decided[0], decided[2]), (decided[1], decided[3])):
        torch.testing.assert_close(one.hidden, other.hidden, **exact)
        torch.testing.assert_close(one.log_prob_RH, other.log_prob_RH, **exact)
        op_R, slot_R = other.action_RH[:, Head.OP], other.action_RH[:, Head.SLOT]
        other.action_RH[:, Head.SLOT] = torch.where(op_R == int(Op.WAIT), slot_R, order[slot_R])
        assert torch.equal(one.action_RH, other.action_RH)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("slots", SLOT_COUNTS)
@pytest.mark.parametrize("share", [0.0, 0.02])
def test_deciding_and_evaluating_give_the_same_numbers(share: float, slots: int, greedy: bool, training: bool) -> None:
    policy = lively_policy(slots).train(training)
    observation, played = play(policy, 8, 6, slots, seed=20 + slots, greedy=greedy, uniform_share=share)
    assert observation.run_RF.isnan().any()
    told = score(policy, observation, played, uniform_share=share)
    acted = (played.log_prob_RH, played.entropy_RH, played.value_R)
    for decided, evaluated in zip(acted, (told.log_prob_TRH, told.entropy_TRH, told.value_TR), strict=True):
        assert (decided.requires_grad, evaluated.requires_grad) == (False, True)
        torch.testing.assert_close(decided, evaluated.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share", [0.02, 0.3])
def test_every_head_explores_as_much_as_it_is_told_to_and_by_default_not_at_all(share: float) -> None:
    """Of a policy that is certain of everything, the operation and the slot too, on which the others depend."""
    policy, slots, rows = lively_policy(), 4, 20_000
    with torch.no_grad():
        for layer in (policy.op_head, policy.slot_query, policy.rest_head):
            layer.weight *= 1e4
    seen = random_observation(1, 1, slots=slots)
    observation = Observation(seen.slot_RSF[0].expand(rows, -1, -1), seen.run_RF[0].expand(rows, -1))
    acting = observation, open_masks(rows, slots), policy.initial_hidden(rows), uniforms(rows)
    certain = policy.get_action(*acting)
    assert torch.equal(certain.action_RH, policy.get_action(*acting, greedy=True).action_RH)
    explored = policy.get_action(*acting, uniform_share=share)
    for head in (Head.OP, Head.SLOT):
        same_R = torch.ones(rows, dtype=torch.bool)
        if head is Head.SLOT:
            same_R = explored.action_RH[:, Head.OP] == certain.action_RH[:, Head.OP]
        several = int(certain.mask_RHC[0, head].sum())
        other = float((explored.action_RH != certain.action_RH)[same_R, head].double().mean())
        expected = share * (several - 1) / several
        assert abs(other - expected) < 5 * (expected / rows) ** 0.5


@pytest.mark.parametrize("op", Op)
def test_a_head_that_is_not_used_adds_nothing(op: Op) -> None:
    policy, masks, rows = lively_policy(**SMALL), open_masks(10, 3), 10
    slot = torch.zeros(rows, dtype=torch.int64) if op is Op.WAIT else torch.arange(rows) % 3
    action, mask = allowed_actions(masks, torch.full((rows,), int(op)), slot)
    for quantity in ("log_prob_TRH", "entropy_TRH"):
        told = getattr(policy.evaluate_actions(random_observation(1, rows, slots=3), action, mask), quantity)
        for head in Head:
            assert ((told[..., head] != 0) == (head in HEADS_OF_OP[op])).all()
        grads = gradients(policy, told.sum() * 1e6)
        uses_slot, uses_rest = Head.SLOT in HEADS_OF_OP[op], bool(set(REST) & HEADS_OF_OP[op])
        assert "op_head.weight" in grads
        got = {name.removesuffix(".weight") for name in grads}
        slot_parts = {"slot_query", "slot_key", "op_embedding"}
        assert slot_parts <= got if uses_slot else not any(name.split(".")[0] in slot_parts for name in grads)
        assert {"rest_input", "rest_head"} <= got if uses_rest else not any("rest" in name for name in grads)
        if uses_rest:
            for head, part in zip(REST, grads["rest_head.weight"].split(REST_SIZES), strict=True):
                assert bool((part != 0).any()) == (head in HEADS_OF_OP[op])


def test_a_forced_decision_adds_nothing() -> None:
    """One operation is legal, and one slot for it."""
    policy, masks, sequence = lively_policy(**SMALL), open_masks(6, 4), random_observation(1, 6, slots=4)
    observation = Observation(sequence.slot_RSF[0], sequence.run_RF[0])
    masks.op_RO[:] = torch.arange(len(Op)) == int(Op.ADVANCE)
    masks.slot_ROS[:, int(Op.ADVANCE)] = torch.arange(4) == 2
    decision = policy.get_action(observation, masks, policy.initial_hidden(6), uniforms(6))
    told = policy.evaluate_actions(sequence, decision.action_RH[None], decision.mask_RHC[None])
    numbers = (decision.log_prob_RH, decision.entropy_RH, told.log_prob_TRH, told.entropy_TRH)
    assert all((x == 0).all() for x in numbers)
    assert not gradients(policy, (told.log_prob_TRH + told.entropy_TRH).sum() * 1e6)


def test_the_slot_depends_on_the_operation_and_the_rest_on_both() -> None:
    policy, slots = lively_policy(**SMALL), 4
    masks, op, slot = every_pair(slots)
    observation = random_observation(1, len(op), slots=slots)
    observation.slot_RSF[:], observation.run_RF[:] = observation.slot_RSF[:, :1], observation.run_RF[:, :1]
    action, mask = allowed_actions(masks, op, slot)
    action[..., 2:] = 0
    log_prob = policy.evaluate_actions(observation, action, mask).log_prob_TRH[0].detach()
    table = log_prob.reshape(len(Op) - 1, slots, HEAD_COUNT)
    torch.testing.assert_close(table[:, :, Head.SLOT].exp().sum(1), torch.ones(len(Op) - 1))
    assert (table[:, :, Head.SLOT].std(0) > 1e-3).all(), "on the operation"
    germinate, retarget, cull = (table[op - 1] for op in (Op.GERMINATE, Op.SET_ALPHA_TARGET, Op.CULL))
    assert (germinate[:, 2:6].std(0) > 1e-3).all(), "on the slot"
    for told, head in ((germinate, Head.ALPHA_TARGET), (cull, Head.ALPHA_SPEED), (cull, Head.ALPHA_CURVE)):
        assert told[:, head].std() > 1e-3, "on the slot"
        assert ((told - retarget)[:, head].abs() > 1e-3).any(), "on the operation"
    for changed in range(1, len(Op)):
        fresh = lively_policy(**SMALL)
        with torch.no_grad():
            fresh.op_embedding.weight[changed] += torch.randn(SMALL["width"], generator=seeded(changed))
        differs = (fresh.evaluate_actions(observation, action, mask).log_prob_TRH[0] - log_prob).abs() > 1e-4
        used = HEADS_OF_OP[Op(changed)] - {Head.OP}
        assert all(differs[op == changed, head].any() == (head in used) for head in Head)
        assert not differs[op != changed].any()


def test_the_value_depends_on_no_action() -> None:
    policy, steps, slots = lively_policy(**SMALL), 4, 3
    masks, op, slot = every_pair(slots)
    observation = random_observation(steps, len(op), slots=slots)
    action, mask = (x.expand(steps, *x.shape[1:]).clone() for x in allowed_actions(masks, op, slot))
    value = policy.evaluate_actions(observation, action, mask).value_TR
    assert value.std(1).min() > 0
    for turn in range(1, len(op)):
        other, other_mask = action.clone(), mask.clone()
        other[turn % steps :], other_mask[turn % steps :] = action[0].roll(turn, 0), mask[0].roll(turn, 0)
        assert torch.equal(policy.evaluate_actions(observation, other, other_mask).value_TR, value)
    grads = gradients(policy, value.square().sum())
    own = {"memory", "memory_norm", "output_norm", "value_head", "encoder", "slot_input", "run_input"}
    assert {name.split(".")[0] for name in grads} == own, "no head of the actions"


def test_the_first_memory_is_zero_and_learning_goes_back_to_it() -> None:
    """From the last of five decisions; nothing but zeros can be where learning starts."""
    policy = lively_policy(**SMALL)
    for state in policy.initial_hidden(5):
        assert torch.equal(state, torch.zeros(1, 5, SMALL["hidden"]))
        assert not state.requires_grad
    assert "evaluate_actions" in (policy.initial_hidden.__doc__ or "")
    given = ["observation", "action_TRH", "mask_TRHC", "uniform_share"]
    assert list(inspect.signature(policy.evaluate_actions).parameters) == given
    observation, played = play(policy, 5, 8, 3, seed=6)
    memory = {f"memory.{name}" for name, _ in policy.memory.named_parameters()}
    for name in ("log_prob_TRH", "entropy_TRH", "value_TR"):
        seen = Observation(observation.slot_RSF.clone().requires_grad_(), observation.run_RF)
        grads = gradients(policy, getattr(score(policy, seen, played), name)[-1].sum())
        assert memory <= set(grads)
        assert all(grad.isfinite().all() for grad in grads.values())
        assert (seen.slot_RSF.grad.flatten(1) != 0).any(1).all(), "every decision"


@torch.no_grad()
def valuing_policy() -> Policy:
    """New but for the output of its value, which is 0 at first: through it no gradient gets further."""
    policy = new_policy()
    policy.value_output.linear.weight.normal_(generator=seeded(0))
    return policy


@pytest.mark.parametrize("make", [valuing_policy, lively_policy])
def test_every_weight_learns_under_autocast_after_acting(make) -> None:
    """The cache of autocast must not hand weights that were cast without gradient to the update."""
    policy, rows = make(), 96
    # Two decisions: from zeros alone, nothing reaches the weights of the memory's own state.
    observation, masks = random_observation(2, rows, slots=3), open_masks(rows, 3)
    op, slot = torch.arange(rows) % len(Op), torch.arange(rows) // len(Op) % 3
    recorded = allowed_actions(masks, op, torch.where(op == int(Op.WAIT), 0, slot))
    action, mask = (x.expand(2, *x.shape[1:]) for x in recorded)
    first = Observation(observation.slot_RSF[0], observation.run_RF[0])

    def learn() -> tuple[dict[str, Tensor], list[Tensor]]:
        decision = policy.get_action(first, masks, policy.initial_hidden(rows), uniforms(rows))
        told = policy.evaluate_actions(observation, action, mask)
        log_prob, entropy, value = told.log_prob_TRH, told.entropy_TRH, told.value_TR
        loss = (log_prob * uniforms(rows, 9)).sum() + entropy.sum() + value.square().sum()
        acted = [decision.log_prob_RH, decision.entropy_RH, decision.value_R]
        return gradients(policy, loss), [log_prob, entropy, value, *acted]

    plain, plain_numbers = learn()
    with torch.autocast("cpu", torch.bfloat16):
        cast, numbers = learn()
    assert {x.dtype for x in (*numbers, *plain_numbers)} == {torch.float32}
    assert all(x.isfinite().all() for x in numbers)
    torch.testing.assert_close(numbers[:3], plain_numbers[:3], rtol=0.2, atol=0.3)
    assert set(plain) == set(cast) == {name for name, _ in policy.named_parameters()}
    for name in plain:
        assert cast[name].isfinite().all()
        assert torch.cosine_similarity(cast[name].flatten(), plain[name].flatten(), 0) > 0.9
    assert all((part != 0).any() for part in cast["rest_head.weight"].split(REST_SIZES)), "every head"


def test_the_uniform_numbers_alone_decide() -> None:
    policy, observation, masks = new_policy(), random_observation(64, slots=5), open_masks(64, 5)

    def act(uniform: Tensor, greedy: bool = False) -> Tensor:
        return policy.get_action(observation, masks, policy.initial_hidden(64), uniform, greedy=greedy).action_RH

    before, first = torch.get_rng_state(), act(uniforms(64, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(act(uniforms(64, 1)), first)
    assert (act(uniforms(64, 2)) != first).any(0).all(), "every head"
    assert torch.equal(act(uniforms(64, 1), True), act(uniforms(64, 2), True))


def test_the_generator_alone_decides_the_first_weights() -> None:
    states = []
    for torch_seed, seed in ((1, 7), (2, 7), (1, 8)):
        with torch.random.fork_rng():
            torch.manual_seed(torch_seed)
            before = torch.get_rng_state()
            policy = Policy(PolicyConfig())
            policy.initialise(seeded(seed))
            assert torch.equal(torch.get_rng_state(), before)
        states.append(policy.state_dict())
    same, other = ([name for name in states[0] if torch.equal(states[0][name], s[name])] for s in states[1:])
    assert same == list(states[0])
    output = "value_head.2.linear.weight"
    assert not any(state[output].any() for state in states)
    drawn = [name for name, p in policy.named_parameters() if p.ndim > 1 and name != output]
    assert not set(drawn) & set(other), "every matrix is drawn"
    policy.initialise(seeded(3))
    forget = torch.arange(4 * policy.config.hidden) // policy.config.hidden == 1
    assert torch.equal(policy.memory.bias_ih_l0 + policy.memory.bias_hh_l0, forget.float()), "1, once"


@pytest.mark.parametrize("slots", SLOT_COUNTS)
def test_a_new_policy_is_small_and_nearly_its_prior(slots: int) -> None:
    policy = new_policy(slots)
    assert sum(p.numel() for p in policy.parameters()) < 500_000
    _, told = play(policy, 4, 32, slots, seed=slots)
    several = told.mask_RHC.sum(-1) > 1
    assert several[..., Head.OP].any()
    # Uniform behind operation and slot; of the slot not: tokens of random numbers lie far apart, and so do their keys.
    assert (told.entropy_RH[several & (torch.arange(HEAD_COUNT) > Head.SLOT)] > 0.95).all()
    # The operation follows its prior among what is legal: WAIT and GERMINATE 1, SET_ALPHA_TARGET e^-2, CULL e^-3,
    # FOSSILIZE and ADVANCE e^2.
    weight_O = torch.tensor([1.0, 1.0, 0.1353, 0.0498, 7.3891, 7.3891])
    op, legal = told.action_RH[..., Head.OP], told.mask_RHC[..., Head.OP, : len(Op)]
    prior = weight_O[op] / (weight_O * legal).sum(-1)
    torch.testing.assert_close(told.log_prob_RH[..., Head.OP].exp(), prior, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("scale", [1e-3, 0.05, 1.0, 100.0])
def test_a_new_policy_expects_nothing_and_then_the_mean(scale: float) -> None:
    """Whatever the unit of the returns is, the critic begins without noise."""
    policy = new_policy()
    observation, told = play(policy, 4, 32, 3, seed=1)
    assert (told.value_R == 0).all()
    target = scale * (2 + torch.randn(4, 32, generator=seeded(0)))
    policy.value_output.track(target, torch.ones(4, 32, dtype=torch.bool))
    value = score(policy, observation, told).value_TR
    torch.testing.assert_close(value, target.mean().expand(4, 32), rtol=1e-4, atol=0)
    # It can learn all the same.
    assert "value_head.2.linear.weight" in gradients(policy, (value - target).square().sum())


@pytest.mark.parametrize("wrong", ["token", "mask"])
def test_what_is_wrong_is_told_as_the_mode_says(wrong: str) -> None:
    """In one row; the others decide as they would without it."""
    policy, rows, slots = lively_policy(**SMALL), 6, 3
    bit, error = {"token": (NOT_FINITE, EsperError), "mask": (EMPTY_MASK, InvalidStateMachineError)}[wrong]
    sequence, masks = random_observation(1, rows, slots=slots), open_masks(rows, slots)
    observation = Observation(sequence.slot_RSF[0], sequence.run_RF[0])
    acting = observation, masks, policy.initial_hidden(rows), uniforms(rows)
    good = policy.get_action(*acting)
    observation.slot_RSF[2, 1, 4] = NAN if wrong == "token" else 0.0
    masks.op_RO[2] = wrong != "mask"
    told = policy.get_action(*acting)
    assert good.flag == 0
    others = torch.arange(rows) != 2
    assert torch.equal(told.action_RH[others], good.action_RH[others])
    learning = sequence, told.action_RH[None], told.mask_RHC[None]
    for call in (lambda: policy.get_action(*acting), lambda: policy.evaluate_actions(*learning)):
        policy.validation = Validation.DEFERRED
        assert call().flag == bit
        policy.validation = Validation.OFF
        assert call().flag is None
        policy.validation = Validation.EAGER
        with pytest.raises(error):
            call()


def test_statistics_change_by_update_alone() -> None:
    policy = lively_policy(**SMALL)
    before = {name: value.clone() for name, value in policy.statistics.state_dict().items()}
    observation, played = play(policy, 3, 6, 3, seed=1)
    told = score(policy, observation, played)
    after = policy.statistics.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    policy.statistics.update(observation.run_RF[..., :KNOWN] * 10)
    changed = score(policy, observation, played)
    assert (changed.value_TR != told.value_TR).any(1).all()
