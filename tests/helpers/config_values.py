"""Values for every setting of a configuration, made from its JSON schema: the edges of what is allowed, and beyond."""

import math
import sys
from functools import cache
from typing import Any

from hypothesis import strategies as st
from pydantic import BaseModel

from esper.leyline.actions import Blueprint

INF, NAN = math.inf, math.nan
INTEGERS = (-(2**70), -1, 0, 1, 2, 3, 4, 5, 7, 8, 31, 1000, 2**20, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**70)
NUMBERS = (
    *(0.0, -0.0, 5e-324, 1e-310, 1e-300, 1e-45, 1e-40, 1e-38, 1e-30, 1e-20, 1e-9, 1e-3),
    *(0.5, math.nextafter(1, 0), 1.0, math.nextafter(1, 2), 3.0, 1e3, 1e9, 1e20, 1e38, 3.5e38, 1e300),
    *(sys.float_info.max, -5e-324, -1e-9, -0.5, -1e9, -1e300),
)
OTHERS: tuple[Any, ...] = (
    *(None, True, False, NAN, INF, -INF, 0.5, 3.0, "", "3", "0.5", "nan", "none", "a\nb", "\x1b[2J", "\u2028", "\0"),
    *([], [1], [None], ["x"], [[0.5]], {}, {"a": 1}, "x" * 5000),
)
"""What hardly any setting is."""
STRINGS = ("digits", "cpu", "cuda", "random", "policy:nowhere", "greedy:", *(b.name.lower() for b in Blueprint))

Settings = dict[str, Any]
"""Values by dotted name."""


@cache
def leaves(kind: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """Schema of every setting by its dotted name, groups of settings opened."""
    whole = kind.model_json_schema()
    found: dict[str, dict[str, Any]] = {}

    def visit(node: dict[str, Any], prefix: str) -> None:
        for name, inner in node["properties"].items():
            place = f"{prefix}{name}"
            if "$ref" in inner:
                visit(whole["$defs"][inner["$ref"].rpartition("/")[2]], f"{place}.")
            else:
                found[place] = inner

    visit(whole, "")
    return found


def allowed(schema: dict[str, Any], value: Any) -> bool:
    """Whether a JSON value is what the schema asks for, in type and limits."""
    kind = schema["type"]
    if kind == "array":
        return (
            isinstance(value, list)
            and schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", sys.maxsize)
            and all(allowed(schema["items"], item) for item in value)
        )
    if "enum" in schema or "const" in schema:
        known = schema.get("enum", [schema.get("const")])
        # Equal is enough here: 1.0 and True become the 1 that they name.
        return value in known
    if kind in ("string", "boolean"):
        return type(value) is {"string": str, "boolean": bool}[kind]
    assert kind in ("integer", "number"), f"no values for a {kind} yet"
    if type(value) is not int and not (kind == "number" and type(value) is float):
        return False
    return math.isfinite(value) and (
        schema.get("minimum", -INF) <= value <= schema.get("maximum", INF)
        and schema.get("exclusiveMinimum", -INF) < value < schema.get("exclusiveMaximum", INF)
        and value % schema.get("multipleOf", 1 if kind == "integer" else value or 1) == 0
    )


def edges(schema: dict[str, Any]) -> list[Any]:
    """Allowed values: the limits, their neighbours, and numbers of every size in between."""
    kind = schema["type"]
    if kind == "array":
        items = edges(schema["items"])
        lists = [*([item] for item in items), items[:3], items[:1] * 2, [], [items[0]] * schema.get("maxItems", 3)]
        return [value for value in lists if allowed(schema, value)]
    if "enum" in schema or "const" in schema:
        return [*schema.get("enum", [schema.get("const")])]
    if kind in ("string", "boolean"):
        return list(STRINGS) if kind == "string" else [False, True]
    step = schema.get("multipleOf", 1)
    limits = [schema[n] for n in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum") if n in schema]
    if kind == "integer":
        candidates = [*INTEGERS, *(int(limit) + near for limit in limits for near in (-step, -1, 0, 1, step))]
    else:
        near = [math.nextafter(limit, way) for limit in limits for way in (-INF, INF)]
        candidates = [*NUMBERS, *map(float, limits), *near]
    return sorted({value for value in candidates if allowed(schema, value)})


def wrong(schema: dict[str, Any]) -> list[Any]:
    """Values that are not allowed, of the right type and of others."""
    values = [*INTEGERS, *NUMBERS, *OTHERS]
    if schema["type"] == "array":
        values += [[value] for value in values] + [[edges(schema["items"])[0]] * 5000]
    return [value for value in values if not allowed(schema, value)]


def nested(settings: Settings) -> dict[str, Any]:
    """The same as groups of settings within each other."""
    tree: dict[str, Any] = {}
    for name, value in settings.items():
        *groups, last = name.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    return tree


def set_in(dumped: dict[str, Any], name: str) -> Any:
    """Value of a setting in a configuration that was dumped."""
    for part in name.split("."):
        dumped = dumped[part]
    return dumped


@st.composite
def some_settings(
    draw: st.DrawFn, kind: type[BaseModel], *, bad: bool = False, without: tuple[str, ...] = ()
) -> Settings:
    """Draw values for a few settings, all others at their default; with `bad` also such as are not allowed."""
    schemas = leaves(kind)
    names = draw(st.lists(st.sampled_from(sorted(set(schemas) - set(without))), max_size=8, unique=True))
    every = {name: edges(schemas[name]) + (wrong(schemas[name]) if bad else []) for name in names}
    return {name: values[draw(st.integers(0, len(values) - 1))] for name, values in every.items()}
