"""Results as files."""

import json
import re

import numpy as np
import pytest

from esper.exam.compare import NEVER, Score, differences
from esper.exam.saved import load_headroom, save_comparison, save_headroom
from esper.leyline.errors import EsperError
from esper.simic.run_folder import COMPARISON, HEADROOM
from helpers.exams import small_headroom


def test_a_table_comes_back_as_it_was(tmp_path):
    table = small_headroom()
    save_headroom(tmp_path, table)
    again = load_headroom(tmp_path)
    assert (again.plans, again.slot_ids, again.widths, again.conditions) == (
        table.plans,
        table.slot_ids,
        table.widths,
        table.conditions,
    )
    np.testing.assert_array_equal(again.gain_WKCN, table.gain_WKCN)
    np.testing.assert_array_equal(again.cost_WKCN, table.cost_WKCN)


def spoiled(text):
    told = json.loads(text)
    yield text[:-5]
    yield "[]"
    yield json.dumps(told | {"plans": told["plans"][1:]})
    yield json.dumps(told | {"widths": [1.0]})
    yield json.dumps(told | {"slot_ids": ["r0c0"]})
    yield json.dumps(told | {"cost": told["cost"][0]})
    yield json.dumps(told | {"gain_nats": [[[["much"]]]]})
    yield json.dumps(told | {"gain_nats": [told["gain_nats"][0], told["gain_nats"][1][:1]]})
    yield re.sub(r"\d", lambda digit: str((int(digit[0]) + 1) % 10), text, count=1)
    yield json.dumps(told | {"seal": ""})
    yield json.dumps(told | {"plans": [{"blueprints": ["rose"], "start": 0}, *told["plans"][1:]]})


def test_a_damaged_table_is_refused_in_one_line(tmp_path):
    with pytest.raises(EsperError, match=r"cannot read .*; name a folder of `esper exam headroom`"):
        load_headroom(tmp_path)
    save_headroom(tmp_path, small_headroom())
    for text in spoiled((tmp_path / HEADROOM).read_text()):
        (tmp_path / HEADROOM).write_text(text)
        with pytest.raises(EsperError, match="is damaged; run `esper exam headroom` again") as caught:
            load_headroom(tmp_path)
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
