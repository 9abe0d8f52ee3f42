"""Every configuration is understood as it was written, or refused in one line that names the setting."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import strategies as st
from pydantic import BaseModel

from esper.leyline.config import (
    CompareConfig,
    Frozen,
    HeadroomConfig,
    PopulationConfig,
    RunConfig,
    TrainConfig,
)
from esper.leyline.errors import EsperError
from esper.scripts.configs import read_config
from helpers.config_values import allowed, edges, leaves, nested, set_in, some_settings, wrong
from helpers.fuzzing import also, cases, one_line

KINDS: tuple[type[PopulationConfig], ...] = (RunConfig, TrainConfig, HeadroomConfig, CompareConfig)
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
NEEDED = {CompareConfig: {"headroom": "h", "policies": ["p"]}}
"""Settings without a default."""


def groups_of(kind: type[BaseModel]) -> set[type[BaseModel]]:
    """The configuration and every group of settings in it."""
    inner = [f.annotation for f in kind.model_fields.values() if isinstance(f.annotation, type)]
    return {kind}.union(*(groups_of(group) for group in inner if issubclass(group, BaseModel)))


@dataclass
class File:
    """A configuration file that is never written: files are what would take longest."""

    content: bytes

    def read_text(self) -> str:
        return self.content.decode()

    def __str__(self) -> str:
        return "FILE"


def read(kind, text: str | bytes) -> PopulationConfig | str:
    """Give the configuration, or the line that refuses it."""
    content = text if isinstance(text, bytes) else text.encode()
    try:
        config = read_config(File(content), kind)
    except EsperError as error:
        line = one_line(error)
        assert line.startswith(("config: FILE: ", "config: cannot read FILE: "))
        return line.removeprefix("config: FILE: ")
    written = File(config.model_dump_json(indent=2).encode())
    assert read_config(written, kind) == config, "what is written down is what is run"
    return config


def check(kind, settings: dict[str, Any]) -> bool:
    """A configuration with these settings is as they say, or is refused by the name of one of them."""
    tree = nested(settings)
    given = read(kind, json.dumps({**NEEDED.get(kind, {}), **tree}))
    schema = leaves(kind)
    if isinstance(given, str):
        assert any(name.rpartition(".")[2] in given for name in settings), given
        return False
    dumped = json.loads(given.model_dump_json())
    for name, value in settings.items():
        assert allowed(schema[name], value), (name, value)
        assert set_in(dumped, name) == value
    return True


@kinds
def test_no_setting_is_forgotten(kind):
    """Values are made for all of them, a new one included: whatever pydantic knows."""
    groups = groups_of(kind)
    of_groups = [n for group in groups for n, f in group.model_fields.items() if f.annotation not in groups]
    assert sorted(name.rpartition(".")[2] for name in leaves(kind)) == sorted(of_groups)
    for name, schema in leaves(kind).items():
        assert edges(schema), name
        assert len(wrong(schema)) > 20, name


@kinds
def test_each_setting_alone(kind):
    """At all its edges, and everything that it is not."""
    for name, schema in leaves(kind).items():
        good, bad = edges(schema), wrong(schema)
        accepted = [check(kind, {name: value}) for value in good]
        assert any(accepted), name
        for value in bad:
            assert not check(kind, {name: value}), (name, value)
        also("test_each_setting_alone", len(good) + len(bad))


@kinds
def test_no_number_is_beyond_what_single_precision_can_multiply(kind):
    """Hosts and policies compute in float32: what is 0 or infinite there was not what was asked for."""
    for name, schema in leaves(kind).items():
        for number in (schema, schema.get("items", {})):
            if number.get("type") in ("number", "integer") and "enum" not in number and name != "seed":
                assert number.get("maximum", number.get("exclusiveMaximum", float("inf"))) <= 1e9, name
                assert number.get("minimum", number.get("exclusiveMinimum", -float("inf"))) >= -1e9, name


@cases(150, 2500, kind=st.sampled_from(KINDS), data=st.data())
def test_settings_together(kind, data):
    check(kind, data.draw(some_settings(kind, bad=data.draw(st.booleans()))))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@cases(150, 1000, kind=st.sampled_from(KINDS), data=st.data())
def test_other_things_in_its_place(kind, data):
    """Any JSON where a group of settings or a setting belongs, and keys that nobody knows."""
    tree = json.loads(kind.model_validate(NEEDED.get(kind, {})).model_dump_json())
    node = tree
    while data.draw(st.booleans()) and (inner := [n for n, v in node.items() if isinstance(v, dict)]):
        node = node[data.draw(st.sampled_from(inner))]
    name = data.draw(st.sampled_from(sorted(node)) | st.text())
    node[name] = data.draw(ANYTHING)
    given = read(kind, json.dumps(tree, ensure_ascii=data.draw(st.booleans())).encode(errors="replace"))
    if not isinstance(given, str):
        assert says(json.loads(given.model_dump_json()), tree)


SIGNS = [bytes([sign]) for sign in b'[]{},:"0-e.n']


@cases(150, 1500, kind=st.sampled_from(KINDS), data=st.data())
def test_changed_bytes(kind, data):
    """What a mutated file says is what is run: values, types and all."""
    text = bytearray(kind.model_validate(NEEDED.get(kind, {})).model_dump_json(indent=1).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        text[start : start + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3) | st.sampled_from(SIGNS))
    given = read(kind, bytes(text))
    if not isinstance(given, str):
        told = json.loads(text, object_pairs_hook=once)
        assert says(json.loads(given.model_dump_json()), told)


def once(pairs):
    assert len({name for name, _ in pairs}) == len(pairs), "one of the two would be ignored"
    return dict(pairs)


def says(config: Any, told: Any) -> bool:
    """Everything that the file says stands in the configuration, in its type."""
    if isinstance(told, dict):
        return all(name in config and says(config[name], value) for name, value in told.items())
    return config == told and isinstance(config, bool) == isinstance(told, bool)


@kinds
@pytest.mark.parametrize("text", ["[" * 10**5, '{"training":' * 10**4, "9" * 10**5, '{"seed": 1' + "0" * 5000 + "}"])
def test_deep_and_long(kind, text):
    assert isinstance(read(kind, text), str)


def test_a_setting_that_stands_there_twice():
    line = read(RunConfig, '{"training": {"horizon": 3, "batch_size": 4, "horizon": 5}}')
    assert line == "horizon: stands there twice; remove one"


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "a\u2028b"])
def test_an_unknown_name_that_no_line_can_hold(name):
    assert "unknown key" in read(RunConfig, json.dumps({name: 1}))


@pytest.mark.parametrize("value", ["3", True, 3.0])
def test_no_other_type_is_taken_for_a_number(value):
    assert "training.horizon: " in read(RunConfig, json.dumps({"training": {"horizon": value}}))


def test_every_configuration_has_its_kind_here():
    assert set(KINDS) == set(PopulationConfig.__subclasses__())
    assert all(issubclass(group, Frozen) for kind in KINDS for group in groups_of(kind))
