"""The tasks: each builds with each of its hosts, and its data has the shape that the host takes."""

import pytest
import torch

from esper.kasmina.population import Population
from esper.kasmina.rows.core import Statistics
from esper.leyline.actions import Blueprint, SiteKind
from esper.leyline.config import ContextConfig, GrowthConfig, HeadroomConfig, HostConfig
from esper.leyline.errors import EsperError
from esper.leyline.sites import fit_table
from esper.tolaria.batches import shared
from esper.tolaria.datasets import DATASETS
from esper.tolaria.tasks import TASKS, load_hosts, load_task, shaped, task_config
from helpers.episodes import TASK_NAMES

PARTS = ("train", "reward_validation", "selection", "test")
SIZES = {"digits": (897, 300, 300, 300), "mnist1d": (2800, 600, 600, 1000)}
EXAMPLE = {"digits": (1, 8, 8), "digits-mlp": (64,), "mnist1d": (1, 40), "mnist1d-mlp": (40,)}
tasks = pytest.mark.parametrize("name", TASK_NAMES)
hosts = pytest.mark.parametrize("which", ["impaired", "ample"])


def test_the_tasks_on_hand():
    assert set(TASKS) == set(EXAMPLE)
    assert all(config.name == name for name, config in TASKS.items())


@tasks
def test_looked_up_by_name(name):
    config = task_config(name)
    assert config is TASKS[name]
    assert config.summary.strip()
    assert "\n" not in config.summary


def test_hosts_of_several_tasks_are_loaded_by_task_and_width():
    contexts = ContextConfig(other_tasks=("mnist1d-mlp",), host_widths=(1.0, 2.0))
    loaded = load_hosts(HeadroomConfig(task="digits-mlp"), contexts)
    assert [task.config.name for task in loaded] == ["digits-mlp"] * 2 + ["mnist1d-mlp"] * 2
    assert [task.host.config.widths[0] for task in loaded] == [16, 32, 24, 48]
    assert contexts.hosts == len(loaded)


def test_tasks_with_other_sites_are_refused():
    with pytest.raises(
        EsperError, match=r"^other_tasks: the sites of digits-mlp are vector, .*, those of digits image"
    ):
        load_hosts(HeadroomConfig(task="digits"), ContextConfig(other_tasks=("digits-mlp",)))


@pytest.mark.parametrize("look_up", [task_config, lambda name: load_task(name, "impaired")])
@pytest.mark.parametrize("name", ["mnist", "", "Digits", "digits\nmlp"])
def test_unknown_task(look_up, name):
    with pytest.raises(EsperError) as caught:
        look_up(name)
    assert str(caught.value) == f"task: unknown task {name!r}; known: {', '.join(TASK_NAMES)}"
    assert "\n" not in str(caught.value)


@tasks
@hosts
def test_shapes_and_splits(name, which):
    task = load_task(name, which)
    assert task.config is TASKS[name]
    assert task.host.config == TASKS[name].host_config(which)
    assert task.host.example == EXAMPLE[name]
    assert task.data.classes == 10
    for part, size in zip(PARTS, SIZES[TASKS[name].dataset], strict=True):
        split = getattr(task.data, part)
        assert split.x.shape == (size, *EXAMPLE[name])
        assert split.y.shape == (size,)
        assert (split.x.dtype, split.y.dtype) == (torch.float32, torch.int64)
        assert split.x.isfinite().all()


@tasks
@hosts
def test_the_host_takes_the_data(name, which):
    task = load_task(name, which, dtype=torch.float64)
    population = Population(task.host, GrowthConfig(), 0, torch.arange(2), dtype=torch.float64)
    x = task.data.test.x[:5]
    assert x.dtype == torch.float64
    with torch.no_grad():
        x = shared(x, 2, population.lane_axis)
        logits, _ = population.forward(x, population.main_pass, statistics=Statistics.RUNNING)
    assert logits.shape == (2, 5, 10)
    assert logits.isfinite().all()
    # Two rows, two initialisations.
    assert not torch.equal(logits[0], logits[1])


@tasks
@hosts
def test_there_is_a_site_behind_each_segment_and_something_to_grow_there(name, which):
    task = load_task(name, which)
    slots = task.host.slot_config
    widths = task.host.config.widths
    assert slots.slots == len(widths) >= 2
    assert [site.width for site in slots.sites] == list(widths)
    assert {site.kind for site in slots.sites} == {task.host.kind}
    assert fit_table(slots, frozenset(Blueprint)).sum(1).min() >= 2


@tasks
def test_the_impaired_host_is_the_small_one(name):
    impaired, ample = (load_task(name, which).host for which in ("impaired", "ample"))
    assert impaired.kind is ample.kind
    assert impaired.body.parameter_count * 2 < ample.body.parameter_count
    assert impaired.cost() * 2 < ample.cost()


@pytest.mark.parametrize(("flat", "whole"), [("digits-mlp", "digits"), ("mnist1d-mlp", "mnist1d")])
@hosts
def test_vector_tasks_see_the_same_examples_flattened(flat, whole, which):
    vectors, originals = load_task(flat, which).data, load_task(whole, which).data
    assert vectors.name == originals.name
    assert vectors.classes == originals.classes
    for part in PARTS:
        a, b = getattr(vectors, part), getattr(originals, part)
        assert torch.equal(a.x, b.x.reshape(len(b.y), -1))
        assert torch.equal(a.y, b.y)


def test_only_vectors_are_flattened():
    data = DATASETS["digits"](0)
    assert shaped(data, HostConfig(kind=SiteKind.IMAGE, widths=(4,))) is data
    assert shaped(data, HostConfig(kind=SiteKind.VECTOR, widths=(4,))).train.x.dim() == 2


@tasks
def test_loading_twice_gives_equal_data_of_its_own(name):
    first, second = load_task(name, "impaired").data, load_task(name, "impaired").data
    for part in PARTS:
        assert torch.equal(getattr(first, part).x, getattr(second, part).x)
        assert torch.equal(getattr(first, part).y, getattr(second, part).y)
    first.train.x.zero_()
    assert second.train.x.abs().sum() > 0


def test_device_and_dtype():
    data = load_task("digits-mlp", "impaired", "meta", torch.float64).data
    for part in PARTS:
        split = getattr(data, part)
        assert split.x.device.type == split.y.device.type == "meta"
        assert (split.x.dtype, split.y.dtype) == (torch.float64, torch.int64)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("width", [0.1, 0.5, 2.0])
def test_hosts_come_in_other_widths(name: str, width: float) -> None:
    task, scaled = load_task(name, "impaired"), load_task(name, "impaired", width=width)
    wanted = [max(1, round(width * w)) for w in task.host.config.widths]
    assert [site.width for site in scaled.host.slot_config.sites] == wanted
    assert scaled.host.config.model_copy(update={"widths": task.host.config.widths}) == task.host.config
    assert torch.equal(scaled.data.train.x, task.data.train.x)
