"""Observations against plain Python, column by column, and over real episodes."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_observation import FLAG_OF, INF, NAN, WORTHS, mapped, plain_run, plain_slot, random_views

from esper.leyline.stages import Stage
from esper.leyline.view import Controller, PopulationView, Scores
from esper.simic.contexts import Contexts
from esper.tamiyo.controllers.registry import make_controller
from esper.tamiyo.policy.features import HISTORY, RUN_FEATURES, RUNNING_FEATURES, SLOT_FEATURES, feature_table
from esper.tamiyo.policy.observation import Observation, Observer
from helpers.episodes import TASK_NAMES, record, run_config, task_of
from helpers.growing import QUICK

RUNNING = len(RUNNING_FEATURES)
SLOT_COLUMN = {f.name: column for column, f in enumerate(SLOT_FEATURES)}
RUN_COLUMN = {f.name: column for column, f in enumerate(RUN_FEATURES)}
MANY = {"seed": st.integers(0, 2**40), "rows": st.integers(1, 4), "slots": st.integers(1, 5)}


def observe_all(views: list[PopulationView], device: str = "cpu") -> list[Observation]:
    """Observe the views of one episode."""
    observer = Observer(views[0].slots.rows, views[0].slot_config, device)
    return [observer.observe(view) for view in views]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Tell whether all values are equal, NaN to NaN."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def assert_columns(token_F: torch.Tensor, columns: dict[str, float], order: dict[str, int]) -> None:
    """The token has these columns and no other."""
    assert columns.keys() == order.keys()
    assert token_F.shape == (len(order),)
    for name, x in zip(order, token_F.tolist(), strict=True):
        assert x == pytest.approx(columns[name], rel=1e-6, abs=1e-6, nan_ok=True), name


@settings(max_examples=60)
@given(**MANY, decisions=st.integers(1, 6))
def test_every_column_equals_its_plain_formula(seed: int, rows: int, slots: int, decisions: int) -> None:
    views = random_views(seed, rows, slots, decisions)
    for now, seen in enumerate(observe_all(views)):
        assert seen.slot_RSF.dtype == seen.run_RF.dtype == torch.float32
        assert seen.slot_RSF.shape == (rows, slots, len(SLOT_FEATURES))
        assert seen.run_RF.shape == (rows, len(RUN_FEATURES))
        for r in range(rows):
            assert_columns(seen.run_RF[r], plain_run(views[: now + 1], r), RUN_COLUMN)
            for s in range(slots):
                assert_columns(seen.slot_RSF[r, s], plain_slot(views[now], r, s), SLOT_COLUMN)


@pytest.mark.parametrize("name", [*WORTHS, "gradient_norm", "gradient_ratio"])
def test_not_measured_and_measured_zero_differ_by_the_flag(name: str) -> None:
    values = torch.tensor([NAN, INF, -INF, 0.0, -0.0])
    (view,) = random_views(1, len(values), 2)
    getattr(view.slots, name)[:] = values[:, None]
    slot_RF = observe_all([view])[0].slot_RSF[:, 1]
    # A gradient of 0 is at the lower limit of its logarithm.
    zero = -1.0 if name.startswith("gradient") else 0.0
    column = slot_RF[:, SLOT_COLUMN[name.replace("_se", " error").replace("_", " ")]]
    assert column.tolist() == [0.0, 0.0, 0.0, zero, zero]
    if name in FLAG_OF:
        assert slot_RF[:, SLOT_COLUMN[FLAG_OF[name]]].tolist() == [0.0, 0.0, 0.0, 1.0, 1.0]


def test_unmeasured_losses_are_nan_with_flag_0() -> None:
    values = torch.tensor([NAN, INF, -INF, 0.0])
    (view,) = random_views(2, len(values), 2)
    run_RF = observe_all([replace(view, train_loss_R=values, val_loss_R=values)])[0].run_RF
    for name in ("train loss", "validation loss"):
        assert same(run_RF[:, RUN_COLUMN[name]], torch.tensor([NAN, NAN, NAN, 0.0]))
        assert run_RF[:, RUN_COLUMN[f"{name} measured"]].tolist() == [0.0, 0.0, 0.0, 1.0]


def test_improvements_are_those_of_the_losses_seen() -> None:
    losses = [NAN, 4.0, 3.5, 3.75, INF, 2.0, 1.0, 0.5, 0.25]
    (view,) = random_views(3, 1, 2)
    seen = observe_all([replace(view, classes=7, val_loss_R=torch.tensor([loss])) for loss in losses])
    for back in range(1, HISTORY + 1):
        for now, observation in enumerate(seen):
            gain = losses[now - back] - losses[now] if now >= back else NAN
            gain = gain / math.log(7) if math.isfinite(gain) else NAN
            found = observation.run_RF[0, RUN_COLUMN[f"improvement {back}"]].item()
            assert found == pytest.approx(gain, rel=1e-6, nan_ok=True), (back, now)


def tensors_of(view: PopulationView) -> list[torch.Tensor]:
    """All tensors of a view."""
    tensors = []
    mapped(view, lambda t, _: tensors.append(t) or t)
    return tensors


class Watcher:
    """A controller that does what another does and keeps what it could have seen."""

    def __init__(self, inner: Controller, observer: Observer) -> None:
        self.inner, self.observer, self.seen = inner, observer, []

    @property
    def flag(self) -> torch.Tensor | None:
        return self.inner.flag

    @property
    def scores(self) -> Scores | None:
        return self.inner.scores

    def observe(self, view: PopulationView) -> None:
        self.seen.append(self.observer.observe(view))
        self.inner.observe(view)

    def act(self) -> torch.Tensor:
        return self.inner.act()


@pytest.mark.parametrize("name", TASK_NAMES)
def test_real_episodes_stay_within_the_ranges(name: str) -> None:
    task, rows = task_of(name, examples=48), 48
    config = run_config(name, "random", horizon=30, updates=1, batch=8, growth=QUICK)
    ids, sites = torch.arange(rows), task.host.slot_config
    inner = make_controller("random", rows=rows, slots=sites.slots, seed=config.seed, row_ids_R=ids)
    watcher = Watcher(inner, Observer(rows, sites))
    record(config, task, rows, controller=watcher, contexts=Contexts.alone(config, ids, price=0.1))
    assert len(watcher.seen) == 30
    slot = torch.stack([o.slot_RSF for o in watcher.seen]).flatten(0, 2)
    run = torch.stack([o.run_RF for o in watcher.seen]).flatten(0, 1)
    for tokens, features in ((slot, SLOT_FEATURES), (run[:, RUNNING:], RUN_FEATURES[RUNNING:])):
        assert tokens.isfinite().all()
        for f, column in zip(features, tokens.T, strict=True):
            assert f.low <= column.min() <= column.max() <= f.high, f.name
    # The episodes were worth watching: every stage, and something measured of each kind.
    for column in (f"stage {stage.name}" for stage in Stage if stage is not Stage.UNKNOWN):
        assert slot[:, SLOT_COLUMN[column]].any(), column
    assert all(slot[:, SLOT_COLUMN[flag]].any() for flag in (*FLAG_OF.values(), "gate open", "alpha up", "ramp left"))
    assert all(run[:, RUN_COLUMN[n]].any() for n in ("growth", "cost", "last accepted", "last refused by gate"))


@settings(max_examples=30)
@given(**MANY)
def test_a_row_of_nan_changes_no_other(seed: int, rows: int, slots: int) -> None:
    views, bad = random_views(seed, rows, slots, 5), seed % rows
    at = torch.tensor([bad])
    spoilt = [mapped(v, lambda t, axis: t.index_fill(axis, at, NAN) if t.is_floating_point() else t) for v in views]
    others = [r for r in range(rows) if r != bad]
    for a, b in zip(observe_all(views), observe_all(spoilt), strict=True):
        assert same(a.slot_RSF[others], b.slot_RSF[others])
        assert same(a.run_RF[others], b.run_RF[others])


@settings(max_examples=30)
@given(**MANY)
def test_rows_equal_observers_of_one_row(seed: int, rows: int, slots: int) -> None:
    views = random_views(seed, rows, slots, 5)
    together = observe_all(views)
    for r in range(rows):
        alone = observe_all([mapped(view, lambda t, axis, r=r: t.narrow(axis, r, 1)) for view in views])
        for a, b in zip(together, alone, strict=True):
            assert same(a.slot_RSF[r : r + 1], b.slot_RSF)
            assert same(a.run_RF[r : r + 1], b.run_RF)


def test_nothing_is_written_and_no_observation_changes_later() -> None:
    views = random_views(4, 3, 2, 5)
    given_ = [mapped(view, lambda t, _: t.clone()) for view in views]
    seen = observe_all(given_)
    kept = [(observation.slot_RSF.clone(), observation.run_RF.clone()) for observation in seen]
    for view, before in zip(given_, views, strict=True):
        torch.testing.assert_close(tensors_of(view), tensors_of(before), rtol=0, atol=0, equal_nan=True)
        mapped(view, lambda t, _: t.zero_())
    for observation, (slot_RSF, run_RF) in zip(seen, kept, strict=True):
        assert same(observation.slot_RSF, slot_RSF)
        assert same(observation.run_RF, run_RF)


def test_nothing_is_read_back() -> None:
    # Tensors on the meta device have no values: reading one raises.
    views = [mapped(view, lambda t, _: t.to("meta")) for view in random_views(5, 3, 2, 5)]
    for seen in observe_all(views, "meta"):
        assert seen.slot_RSF.device.type == seen.run_RF.device.type == "meta"
        assert seen.slot_RSF.shape == (3, 2, len(SLOT_FEATURES))
        assert seen.run_RF.shape == (3, len(RUN_FEATURES))


def test_names_are_unique_and_the_running_features_come_first() -> None:
    assert len(SLOT_COLUMN) == len(SLOT_FEATURES)
    assert len(RUN_COLUMN) == len(RUN_FEATURES)
    assert RUN_FEATURES[:RUNNING] == RUNNING_FEATURES


def test_the_page_is_the_table() -> None:
    page = Path(__file__).parents[3] / "docs" / "observation.md"
    assert page.read_text(encoding="utf-8") == feature_table()
