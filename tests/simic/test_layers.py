"""What is measured of the layers of a policy network: that it is right, and that nothing else notices."""

import copy
import math
from collections import defaultdict
from itertools import count

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from esper.leyline.config import PPOConfig
from esper.leyline.errors import EsperError
from esper.simic.layers import LayerReport
from esper.simic.ppo import MOST_SKIPPED_UPDATES, PPOAgent, UpdateReport
from esper.simic.rollout import Rollout
from helpers.rollouts import Policy, normalised, plain_advantages, random_rollout, small_policy

NAN = float("nan")
FAR = 1e9
ATTENTION_OUTPUT = "encoder.0.self_attn.out_proj"
"""Its parameters are used without calling it."""
OF_THE_CRITIC = {"value_head.0", "value_head.2.linear"}
DECISIONS, ROWS = 6, 8


def agent_of(policy: Policy, **changes: object) -> PPOAgent:
    settings = {"target_kl": FAR, "record_layers": True, "policy_clip_norm": FAR}
    return PPOAgent(policy, PPOConfig.model_validate(settings | changes), 0)


def owners(policy: Policy) -> dict[str, nn.Module]:
    return {name: module for name, module in policy.named_modules() if module._parameters}


def layer_norms(policy: Policy, gradients: dict[str, Tensor]) -> dict[str, float]:
    norms = {}
    for name, module in owners(policy).items():
        own = [gradients[f"{name}.{key}"] for key in module._parameters if module._parameters[key] is not None]
        norms[name] = float(torch.cat([g.flatten() for g in own]).double().norm())
    return norms


def gradients_of_steps(agent: PPOAgent) -> list[dict[str, Tensor]]:
    """Gradients at each step; nothing was clipped."""
    seen: list[dict[str, Tensor]] = []

    def keep(*_: object) -> None:
        seen.append({name: p.grad.clone() for name, p in agent.policy.named_parameters()})

    agent.optimizer.register_step_pre_hook(keep)
    return seen


def hooks(policy: Policy) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in policy.modules())


def same(one: object, other: object) -> bool:
    """Equal, NaN to NaN, to the last digit."""
    return repr(one) == repr(other)


# --- What is measured ---


@pytest.mark.parametrize("layers", [1, 2])
def test_the_layers_are_the_modules_with_parameters_in_their_order(layers: int) -> None:
    policy = small_policy(layers=layers)
    report = agent_of(policy, epochs=1).update(random_rollout(policy))
    assert list(report.layers) == list(owners(policy))
    assert {name.rpartition(".")[0] for name, _ in policy.named_parameters()} == set(report.layers)
    assert ("encoder.1.linear2" in report.layers) == (layers == 2)
    assert all(isinstance(layer, LayerReport) for layer in report.layers.values())


def test_without_the_setting_there_are_none() -> None:
    policy = small_policy()
    assert PPOAgent(policy, PPOConfig(), 0).update(random_rollout(policy)).layers == {}


def test_gradients_are_those_of_autograd_before_clipping() -> None:
    """At the first step the ratio is 1 and nothing is clipped in the loss: it is soon written down."""
    policy = small_policy()
    rollout = random_rollout(policy, lengths=[6, 4, 6, 0, 2, 6, 5, 3])
    twin = copy.deepcopy(policy)
    told = twin.evaluate_actions(rollout.observation(torch.arange(ROWS)), rollout.action_TRH, rollout.mask_TRHC)
    choices = (rollout.mask_TRHC.sum(-1) > 1) & rollout.made_TR[..., None]
    free = rollout.free_TR
    advantage = normalised(plain_advantages(rollout, 1.0, 0.97), free)
    ratio = ((told.log_prob_TRH - rollout.log_prob_TRH) * choices).sum(-1).exp()
    loss = -(ratio * advantage)[free].mean()
    parameters = dict(twin.named_parameters())
    gradients = dict(
        zip(parameters, torch.autograd.grad(loss, parameters.values(), materialize_grads=True), strict=True)
    )
    weights = {"value_weight": 0.0, "entropy_weight": 0.0}
    agent = agent_of(policy, epochs=1, minibatches=1, policy_clip_norm=1e-3, **weights)
    report = agent.update(rollout)
    norms = layer_norms(twin, gradients)
    assert report.gradient_norm == pytest.approx(math.hypot(*norms.values()), rel=1e-4)
    for name, layer in report.layers.items():
        largest = max(float(g.abs().max()) for key, g in gradients.items() if key.rpartition(".")[0] == name)
        assert layer.gradient_norm == pytest.approx(norms[name], rel=1e-3, abs=1e-6), name
        assert layer.gradient_largest == pytest.approx(largest, rel=1e-3, abs=1e-6), name
        assert layer.gradient_nonfinite == 0
        # Measured, and 0: the critic did not count.
        assert (layer.gradient_norm == 0) == (name in OF_THE_CRITIC)


def test_gradients_of_many_minibatches_are_averaged() -> None:
    policy = small_policy()
    rollout = random_rollout(policy)
    agent = agent_of(policy, epochs=2, minibatches=3)
    steps = gradients_of_steps(agent)
    report = agent.update(rollout)
    assert len(steps) == 6
    norms = [layer_norms(policy, step) for step in steps]
    for name, layer in report.layers.items():
        assert layer.gradient_norm == pytest.approx(np.mean([norm[name] for norm in norms]), rel=1e-5)
        largest = max(float(g.abs().max()) for s in steps for key, g in s.items() if key.rpartition(".")[0] == name)
        assert layer.gradient_largest == pytest.approx(largest, rel=1e-6)
        assert layer.gradient_norm > layer.gradient_largest / 6 > 0


def test_activations_are_those_that_other_hooks_see() -> None:
    policy = small_policy()
    rollout = random_rollout(policy)
    agent, outputs = agent_of(policy, epochs=2, minibatches=3), defaultdict(list)
    for name, module in owners(policy).items():

        def keep(_, __, output, name=name) -> None:
            outputs[name].append((output[0] if name.endswith(("memory", "attn")) else output).detach().double().numpy())

        module.register_forward_hook(keep)
    report = agent.update(rollout)
    assert set(report.layers) - set(outputs) == {ATTENTION_OUTPUT}
    assert len(outputs["op_embedding"]) == 12, "twice in each pass"
    for name, seen in outputs.items():
        layer = report.layers[name]
        assert layer.activation_mean == pytest.approx(np.mean([x.mean() for x in seen]), rel=1e-3, abs=1e-6), name
        assert layer.activation_deviation == pytest.approx(np.mean([x.std() for x in seen]), rel=1e-4), name
        assert layer.activation_largest == pytest.approx(max(np.abs(x).max() for x in seen), rel=1e-6), name
        assert layer.activation_nonfinite == 0


def test_activations_of_the_first_layer_by_hand() -> None:
    policy = small_policy()
    rollout = random_rollout(policy)
    weight, bias = (p.detach().clone() for p in policy.slot_input.parameters())
    told = (rollout.slot_TRSF @ weight.T + bias).double().numpy()
    layer = agent_of(policy, epochs=1, minibatches=1).update(rollout).layers["slot_input"]
    assert layer.activation_mean == pytest.approx(told.mean(), abs=1e-5)
    assert layer.activation_deviation == pytest.approx(told.std(), rel=1e-5)
    assert layer.activation_largest == pytest.approx(np.abs(told).max(), rel=1e-5)


def test_what_is_not_called_is_not_measured() -> None:
    policy = small_policy()
    layer = agent_of(policy).update(random_rollout(policy)).layers[ATTENTION_OUTPUT]
    activations = [value for name, value in vars(layer).items() if name.startswith("activation")]
    assert len(activations) == 4
    assert all(math.isnan(value) for value in activations)
    assert layer.gradient_norm > 0


def test_minibatches_behind_the_early_stop_do_not_count() -> None:
    reports = []
    for epochs in (1, 2, 3, 5):
        policy = small_policy()
        agent = agent_of(policy, epochs=epochs, minibatches=1, target_kl=1e-9)
        reports.append(agent.update(random_rollout(policy)))
    assert [report.stopped_early for report in reports] == [False, True, True, True]
    # The step that would go too far was worked out, and is the last.
    assert not same(reports[0].layers, reports[1].layers)
    assert same(reports[1].layers, reports[2].layers)
    assert same(reports[1].layers, reports[3].layers)


def test_every_update_begins_anew() -> None:
    policy = small_policy()
    agent = agent_of(policy, epochs=1, minibatches=1, policy_rate=0.05)
    first = agent.update(random_rollout(policy))
    rollout, fresh = random_rollout(policy, seed=1), agent_of(copy.deepcopy(policy), epochs=1, minibatches=1)
    told, expected = agent.update(rollout).layers, fresh.update(rollout).layers
    assert not same(told, first.layers)
    for name, layer in told.items():
        # The minibatch is the same, the order of its rows is not.
        assert vars(layer) == pytest.approx(vars(expected[name]), rel=1e-4, abs=1e-6, nan_ok=True), name


# --- What is not finite ---


def test_a_weight_that_is_not_finite_shows_where_it_is() -> None:
    policy = small_policy()
    rollout = random_rollout(policy)
    with torch.no_grad():
        policy.value_head[0].weight[2, 3] = NAN
    report = agent_of(policy, epochs=2, minibatches=2).update(rollout)
    assert (report.minibatches, report.skipped_minibatches) == (0, 4)
    layers = report.layers
    # One of its outputs for every decision of every row, in both passes.
    assert layers["value_head.0"].activation_nonfinite == 2 * DECISIONS * ROWS
    for name, layer in layers.items():
        if name == ATTENTION_OUTPUT:
            continue
        wild = name in OF_THE_CRITIC
        assert (layer.activation_nonfinite > 0) == wild, name
        measured = (layer.activation_mean, layer.activation_deviation, layer.activation_largest)
        assert [math.isnan(value) for value in measured] == [wild] * 3, name
    assert layers["value_head.0"].gradient_nonfinite > 0
    assert math.isnan(layers["value_head.0"].gradient_norm)
    assert math.isnan(layers["value_head.0"].gradient_largest)
    assert layers["op_head"].gradient_nonfinite == 0
    assert layers["op_head"].gradient_norm > 0


def wild_gradient(parameter: nn.Parameter, wild: float, entries: int = 1, *, at: int = 0, every: int = 1) -> None:
    """Spoil the gradient in every so many minibatches, the one at `at` the first."""
    calls = count()

    def spoil(gradient: Tensor) -> Tensor:
        if next(calls) % every == at:
            gradient = gradient.clone()
            gradient.view(-1)[:entries] = wild
        return gradient

    parameter.register_hook(spoil)


@pytest.mark.parametrize("wild", [NAN, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_counted_at_its_layer(wild: float) -> None:
    policy = small_policy()
    rollout = random_rollout(policy)
    wild_gradient(policy.memory.weight_hh_l0, wild, entries=5)
    report = agent_of(policy, epochs=2, minibatches=2).update(rollout)
    assert report.skipped_minibatches == 4
    for name, layer in report.layers.items():
        assert layer.gradient_nonfinite == (4 * 5 if name == "memory" else 0), name
        assert math.isfinite(layer.gradient_norm) == (name != "memory"), name
    assert report.layers["memory"].activation_nonfinite == 0


def test_a_gradient_whose_square_is_too_large_still_has_its_largest_value() -> None:
    policy = small_policy()
    rollout = random_rollout(policy)
    wild_gradient(policy.slot_key.weight, 1e30)
    layer = agent_of(policy, epochs=1, minibatches=2).update(rollout).layers["slot_key"]
    assert layer.gradient_largest == pytest.approx(1e30)
    assert math.isnan(layer.gradient_norm)
    assert layer.gradient_nonfinite == 0


def last_words(agent: PPOAgent, rollout: Rollout) -> str:
    for _ in range(MOST_SKIPPED_UPDATES - 1):
        agent.update(rollout)
    with pytest.raises(EsperError) as error:
        agent.update(rollout)
    return str(error.value)


def test_what_is_not_finite_behind_the_early_stop_does_not_count() -> None:
    policy = small_policy()
    agent, rollout = agent_of(policy, epochs=4, minibatches=1, target_kl=1e-9), random_rollout(policy)
    wild_gradient(policy.slot_key.weight, NAN, at=0, every=4)
    wild_gradient(policy.slot_query.weight, NAN, at=3, every=4)
    # The first is skipped, the second taken, the third goes too far.
    report = agent.update(rollout)
    assert (report.minibatches, report.skipped_minibatches, report.stopped_early) == (1, 1, True)
    assert report.layers["slot_key"].gradient_nonfinite == 1
    assert report.layers["slot_query"].gradient_nonfinite == 0
    agent.update(rollout)
    with pytest.raises(EsperError, match=r"\(the gradient of slot_key\)"):
        agent.update(rollout)


@pytest.mark.parametrize("record_layers", [False, True])
def test_the_error_names_the_layers(record_layers: bool) -> None:
    policy = small_policy()
    agent, rollout = agent_of(policy, epochs=1, record_layers=record_layers), random_rollout(policy)
    wild_gradient(policy.slot_query.bias, NAN)
    wild_gradient(policy.encoder[0].linear1.weight, math.inf)
    wild_gradient(policy.encoder[0].linear1.bias, NAN)
    text = last_words(agent, rollout)
    assert "the policy has diverged (the gradient of encoder.0.linear1, slot_query): lower --policy-rate" in text


def test_the_error_names_the_first_of_many_layers() -> None:
    policy = small_policy()
    agent, rollout = agent_of(policy, epochs=1, record_layers=False), random_rollout(policy)
    with torch.no_grad():
        policy.value_head[0].weight[2, 3] = NAN
    text = last_words(agent, rollout)
    # All that the value is computed from, and it itself; not the heads, nor the keys, queries and embeddings.
    assert "(the gradient of slot_input, run_input, encoder.0.self_attn and 10 more)" in text


def test_the_error_says_when_it_is_no_layers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = small_policy()
    agent, rollout = agent_of(policy, epochs=1, record_layers=False), random_rollout(policy)
    monkeypatch.setattr(agent, "_value_loss", lambda value_TR, *_: 0 * value_TR.sum() + math.inf)
    assert "(the loss or the norm, though no layer's gradient)" in last_words(agent, rollout)


# --- Nobody notices ---


def learned(record_layers: bool, dtype: torch.dtype | None) -> tuple[list[UpdateReport], dict[str, Tensor]]:
    """Reports of three updates, and everything that they changed."""
    policy = small_policy()
    agent = agent_of(policy, epochs=2, minibatches=3, record_layers=record_layers, policy_clip_norm=0.5)
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        rollouts = [random_rollout(policy, seed=seed, lengths=[6, 4, 6, 0, 2, 6, 5, 3]) for seed in range(3)]
        reports = [agent.update(rollout) for rollout in rollouts]
    state = dict(policy.state_dict())
    for name, parameter in policy.named_parameters():
        state |= {f"{name}/{key}": value for key, value in agent.optimizer.state[parameter].items()}
    return reports, state


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_update_is_the_same_to_the_bit(dtype: torch.dtype | None) -> None:
    (plain, state), (probed, other) = (learned(record_layers, dtype) for record_layers in (False, True))
    assert state.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in state.items())
    for report, like in zip(plain, probed, strict=True):
        assert (len(report.layers), len(like.layers)) == (0, 19)
        theirs = vars(like) | {"layers": {}}
        assert same(vars(report), theirs)


def test_hooks_are_there_during_the_passes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = small_policy()
    rollout = random_rollout(policy)
    agent, during, whole = agent_of(policy, epochs=1, minibatches=2), [], policy.evaluate_actions

    def evaluate(*args, **how):
        during.append(hooks(policy))
        return whole(*args, **how)

    monkeypatch.setattr(policy, "evaluate_actions", evaluate)
    assert hooks(policy) == 0
    for _ in range(2):
        agent.update(rollout)
        assert hooks(policy) == 0
    assert during == [19] * 4


def test_hooks_are_gone_after_an_error() -> None:
    policy = small_policy()
    rollout = random_rollout(policy)
    agent, passes = agent_of(policy, epochs=1, minibatches=3), []
    broken = random_rollout(policy)
    broken.slot_TRSF *= 100

    def fail(*_: object) -> None:
        passes.append(hooks(policy))
        if len(passes) == 2:
            raise RuntimeError("in the middle of a pass")

    # Before the last layer, so that others have been measured.
    failing = policy.value_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        agent.update(broken)
    assert passes == [20, 20]
    failing.remove()
    assert hooks(policy) == 0
    # What the broken pass has left behind is in nobody's way.
    fresh = agent_of(copy.deepcopy(policy), epochs=1, minibatches=3)
    told, expected = (a.update(rollout).layers["slot_input"] for a in (agent, fresh))
    for name in ("activation_mean", "activation_deviation", "activation_largest"):
        assert getattr(told, name) == pytest.approx(getattr(expected, name), rel=0.05, abs=0.01)
