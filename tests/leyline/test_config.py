"""The configuration: what it refuses, that it is frozen, and that its own defaults pass."""

import math

import pytest
from pydantic import ValidationError

from esper.leyline.actions import Blueprint, SiteKind
from esper.leyline.config import (
    ContextConfig,
    GateConfig,
    GovernorConfig,
    GrowthConfig,
    HostConfig,
    OptimizerConfig,
    PolicyConfig,
    RecordConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
    TrainingConfig,
)

HOST = {"kind": "vector", "widths": (8, 8)}
TASK = {"name": "t", "summary": "s", "dataset": "digits", "impaired": HOST, "ample": HOST}
# Each model with the fields that have no default.
MODELS = {
    HostConfig: HOST,
    OptimizerConfig: {},
    GateConfig: {},
    GrowthConfig: {},
    TrainingConfig: {},
    RecordConfig: {},
    RunConfig: {},
    TrainConfig: {},
    GovernorConfig: {},
    PolicyConfig: {},
    ContextConfig: {},
    TaskConfig: TASK,
}
models = pytest.mark.parametrize("model", list(MODELS), ids=lambda m: m.__name__)


def refuses(model, **values):
    with pytest.raises(ValidationError) as refused:
        model(**{**MODELS[model], **values})
    # The field that is wrong is named.
    assert {str(error["loc"][0]) for error in refused.value.errors()} == set(values)


def numbers(kind):
    """Fields of a plain number type, by model: the open-ended ones below must be bounded in every model."""
    return [(model, name) for model in MODELS for name, f in model.model_fields.items() if f.annotation is kind]


@models
def test_every_default_is_valid(model):
    # Defaults are not validated when they are used, so they are dumped and read back.
    default = model(**MODELS[model])
    assert model.model_validate(default.model_dump()) == default
    assert model.model_validate_json(default.model_dump_json()) == default


@models
def test_unknown_key(model):
    refuses(model, no_such_key=1)


def test_unknown_key_deep_inside():
    with pytest.raises(ValidationError, match=r"growth\.gates\.min_contribtuion"):
        RunConfig.model_validate({"growth": {"gates": {"min_contribtuion": 0.1}}})


@models
def test_frozen(model):
    default = model(**MODELS[model])
    for name in type(default).model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(default, name, getattr(default, name))


def test_float_fields_are_found():
    assert {name for _, name in numbers(float)} >= {"learning_rate", "warmup", "momentum", "min_contribution"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "nan", "inf"])
@pytest.mark.parametrize(("model", "name"), numbers(float), ids=lambda p: getattr(p, "__name__", p))
def test_no_float_may_be_infinite_or_undefined(model, name, value):
    refuses(model, **{name: value})


@pytest.mark.parametrize("value", [-1, -(2**70), 1.5, math.nan, math.inf, "three", None])
@pytest.mark.parametrize(("model", "name"), numbers(int), ids=lambda p: getattr(p, "__name__", p))
def test_no_count_may_be_negative_or_broken(model, name, value):
    refuses(model, **{name: value})


@pytest.mark.parametrize(
    ("model", "name", "value"),
    [
        (OptimizerConfig, "learning_rate", 0),
        (OptimizerConfig, "learning_rate", -1e-3),
        (OptimizerConfig, "warmup", -0.01),
        (OptimizerConfig, "warmup", 1),  # a rate that rises until the end never falls
        (OptimizerConfig, "final_share", 1.01),
        (OptimizerConfig, "weight_decay", -1e-9),
        (OptimizerConfig, "momentum", 1),
        (OptimizerConfig, "beta2", 1),
        (OptimizerConfig, "epsilon", 0),
        (OptimizerConfig, "clip_norm", 0),
        (OptimizerConfig, "method", "adam"),
        (GateConfig, "min_training_decisions", 0),
        (GateConfig, "min_gradient_ratio", -1e-9),
        (GateConfig, "max_gradient_ratio", 0),
        (GateConfig, "min_probation_decisions", 0),
        (GrowthConfig, "embargo", 0),
        (GrowthConfig, "incubator", "ste"),
        (TrainingConfig, "horizon", 0),
        (TrainingConfig, "updates_per_decision", 0),
        (TrainingConfig, "batch_size", 0),
        (TrainingConfig, "batch_size", 1),  # a batch norm has nothing to compare it with
        (TrainingConfig, "batch_size", 2**40),  # more than any memory holds
        (TrainingConfig, "horizon", 2**40),
        (OptimizerConfig, "learning_rate", 1e-300),  # 0 in single precision
        (OptimizerConfig, "learning_rate", 1e308),  # infinite in single precision
        (OptimizerConfig, "weight_decay", 1e308),
        (OptimizerConfig, "epsilon", 1e-300),
        (GovernorConfig, "collapsed_guesses", math.inf),
        (GovernorConfig, "collapsed_decisions", 2**70),
        (GrowthConfig, "embargo", 2**63),
        (TrainConfig, "rows", 2**14),  # more groups than a round has starts
        (PolicyConfig, "width", 2**20),
        (ContextConfig, "host_widths", (1e9,)),
        (ContextConfig, "prices", (1e308,)),
        (ContextConfig, "prices", (0.1,) * 1000),
        (RecordConfig, "record", "all"),
        (RecordConfig, "record_error", "ignore"),
        (RunConfig, "seed", -1),
        (RunConfig, "seed", 2**63),  # does not fit an int64 column
        (RunConfig, "host", "large"),
        (RunConfig, "blueprints", ("norm", "transformer")),
        (RunConfig, "blueprints", ("noop",)),
        (RunConfig, "blueprints", ("NORM",)),
        (TaskConfig, "dataset", "imagenet"),
        (TaskConfig, "split_seed", -1),
        (HostConfig, "kind", "graph"),
        (HostConfig, "widths", ()),
        (HostConfig, "widths", (8, 0)),
        (HostConfig, "depth", 0),
        (HostConfig, "kernel", 0),
        (HostConfig, "kernel", -3),
        (HostConfig, "kernel", 17),
        (HostConfig, "norm", "instance"),
        (HostConfig, "pooling", "mean"),
    ],
)
def test_refused(model, name, value):
    refuses(model, **{name: value})


@pytest.mark.parametrize(
    ("model", "name", "value"),
    [
        (OptimizerConfig, "learning_rate", 1e-12),
        (OptimizerConfig, "weight_decay", 1e9),
        (OptimizerConfig, "warmup", 0),
        (OptimizerConfig, "final_share", 0),
        (OptimizerConfig, "final_share", 1),
        (OptimizerConfig, "weight_decay", 0),
        (OptimizerConfig, "momentum", 0),
        (GateConfig, "min_incubator_gain", -1.0),  # a gate may be opened
        (GateConfig, "min_contribution", -1.0),
        (GateConfig, "min_gradient_ratio", 0),
        (GrowthConfig, "embargo", 1),
        (TrainingConfig, "horizon", 1),
        (RunConfig, "seed", 0),
        (RunConfig, "seed", 2**63 - 1),
        (RunConfig, "blueprints", ("norm",)),
        (HostConfig, "widths", (1,)),
        (HostConfig, "kernel", 1),
        (HostConfig, "kernel", 15),
    ],
)
def test_accepted_at_the_edge(model, name, value):
    assert getattr(model(**{**MODELS[model], name: value}), name) == value


@pytest.mark.parametrize("kernel", [2, 4, 14])
def test_even_kernel(kernel):
    with pytest.raises(ValidationError, match="odd kernel"):
        HostConfig(**HOST, kernel=kernel)


def test_a_round_that_no_memory_holds():
    with pytest.raises(ValidationError, match="rows times horizon must not exceed 4,194,304"):
        TrainConfig(rows=2**13, training=TrainingConfig(horizon=1000))


def test_an_episode_may_be_longer_than_one_that_is_learned_from():
    long = TrainingConfig(horizon=100_000)
    assert RunConfig(training=long).training.horizon == 100_000
    with pytest.raises(ValidationError, match="horizon must not exceed 4,096 to train a policy; got 100000"):
        TrainConfig(training=long)


def test_unknown_blueprint_names_it_and_the_known_ones():
    with pytest.raises(ValidationError) as refused:
        RunConfig(blueprints=("lora_medium",))
    message = refused.value.errors()[0]["msg"]
    assert "'lora_medium'" in message
    assert all(b.name.lower() in message for b in Blueprint if b is not Blueprint.NOOP)
    assert "noop" not in message


def test_allowed_blueprints():
    # By default everything that is a blueprint: twelve of the thirteen.
    assert RunConfig().allowed_blueprints() == frozenset(Blueprint) - {Blueprint.NOOP}
    chosen = RunConfig(blueprints=("conv_light", "norm", "norm"))
    assert chosen.allowed_blueprints() == {Blueprint.NORM, Blueprint.CONV_LIGHT}


def test_host_by_name():
    task = TaskConfig(**{**TASK, "ample": {**HOST, "widths": (64,)}})
    assert task.host_config("impaired").widths == (8, 8)
    assert task.host_config("ample").widths == (64,)


def test_equal_values_are_one_configuration():
    a, b = (HostConfig(kind=kind, widths=[4, 5]) for kind in ("image", SiteKind.IMAGE))
    assert a == b
    assert len({a, b}) == 1


@models
def test_every_number_has_a_description(model):
    # The help of the command line is made of these.
    plain = {n: f for n, f in model.model_fields.items() if f.annotation in (int, float)}
    assert [name for name, field in plain.items() if not field.description] == []
