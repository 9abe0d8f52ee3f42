"""Results as files."""

import json
import re
from dataclasses import fields

import numpy as np
import pytest

from esper.exam.compare import NEVER, Score, differences
from esper.exam.plans import NOTHING, Family
from esper.exam.saved import load_headroom, load_plans, save_comparison, save_headroom, save_plans
from esper.leyline.errors import EsperError
from esper.simic.run_folder import COMPARISON, HEADROOM, PLANS
from helpers.exams import exam_tasks, headroom_config, small_headroom


def test_a_table_comes_back_as_it_was(tmp_path):
    table = small_headroom()
    save_headroom(tmp_path, table)
    again = load_headroom(tmp_path)
    for field in fields(table):
        if field.name != "found":
            np.testing.assert_array_equal(getattr(again, field.name), getattr(table, field.name))
    assert again.plans == table.plans
    for field in fields(table.found):
        np.testing.assert_array_equal(getattr(again.found, field.name), getattr(table.found, field.name))


def test_plans_come_back_as_they_were(tmp_path):
    plans = Family.of(headroom_config(), exam_tasks()[0].host.slot_config).sampled(300, 0, "plans")
    assert any(seed.cull is not None for plan in plans for seed in plan.seeds)
    save_plans(tmp_path, (NOTHING, *plans))
    assert load_plans(tmp_path) == (NOTHING, *plans)


def spoiled(text):
    told = json.loads(text)
    yield text[:-5]
    yield "[]"
    yield json.dumps(told | {"plans": told["plans"][1:]})
    yield json.dumps(told | {"seal": ""})
    yield json.dumps(told | {"format": 1})
    yield re.sub(r"\d", lambda digit: str((int(digit[0]) + 1) % 10), text, count=1)
    yield re.sub(r'"tempo":3', '"tempo":5', text, count=1)
    yield re.sub(r'"blueprint":"norm"', '"blueprint":"rose"', text, count=1)


def spoiled_table(text):
    told = json.loads(text)
    yield from spoiled(text)
    yield json.dumps(told | {"hosts": ["digits"]})
    yield json.dumps(told | {"searched_cost": told["searched_cost"][0]})
    yield json.dumps(told | {"gain_nats": [[[["much"]]]]})
    # What the version before this one wrote.
    yield '{"seal":"","plans":[{"blueprints":["noop"],"start":0}],"slot_ids":["r0c0"],"widths":[1.0]}'


@pytest.mark.parametrize(
    ("name", "save", "load", "spoil"),
    [
        (HEADROOM, save_headroom, load_headroom, spoiled_table),
        (PLANS, lambda folder, table: save_plans(folder, table.plans), load_plans, spoiled),
    ],
)
def test_what_is_damaged_is_refused_in_one_line(tmp_path, name, save, load, spoil):
    with pytest.raises(EsperError, match=r"cannot read .*; name a folder of `esper exam headroom`"):
        load(tmp_path)
    save(tmp_path, small_headroom())
    for text in spoil((tmp_path / name).read_text()):
        (tmp_path / name).write_text(text)
        with pytest.raises(
            EsperError, match="is damaged, or of an earlier version; run `esper exam headroom` again"
        ) as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)


def test_a_comparison_holds_every_start(tmp_path):
    net = np.arange(12.0).reshape(1, 3, 2, 2)
    scores = {NEVER: Score(*[np.zeros_like(net)] * 4), "policy 0, greedy": Score(net, net + 1, net + 2, net + 3)}
    save_comparison(tmp_path, scores, differences(scores))
    told = json.loads((tmp_path / COMPARISON).read_text())
    arm = told["arms"]["policy 0, greedy"]
    # Starts hold 0..3, 4..7 and 8..11; prices every second number.
    assert arm["net_nats"] == [1.5, 5.5, 9.5]
    assert (arm["gain_nats"], arm["accuracy"]) == ([2.5, 6.5, 10.5], [3.5, 7.5, 11.5])
    assert arm["net_nats_by_price"] == [5.0, 6.0]
    assert told["differences"]["policy 0, greedy"]["never"]["mean"]["mean"] == 5.5
