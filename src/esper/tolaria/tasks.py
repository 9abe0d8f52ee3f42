"""Tasks: a data set with an ample and an impaired host, nothing fetched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from esper.kasmina.hosts import Host
from esper.leyline.actions import SiteKind
from esper.leyline.config import ContextConfig, HostConfig, PopulationConfig, TaskConfig
from esper.leyline.errors import EsperError
from esper.tolaria.datasets import DATASETS, Dataset, Split

_IMAGE, _SIGNAL, _VECTOR = SiteKind.IMAGE, SiteKind.SIGNAL, SiteKind.VECTOR

TASKS: dict[str, TaskConfig] = {
    task.name: task
    for task in (
        TaskConfig(
            name="digits",
            summary="8x8 images of handwritten digits, 2-D convolutions",
            dataset="digits",
            impaired=HostConfig(kind=_IMAGE, widths=(4, 4, 4), kernel=1, norm="batch", pooling="average"),
            ample=HostConfig(kind=_IMAGE, widths=(16, 32, 32), norm="batch", pooling="average"),
        ),
        TaskConfig(
            name="digits-mlp",
            summary="the same images as vectors of 64, an MLP",
            dataset="digits",
            impaired=HostConfig(kind=_VECTOR, widths=(16, 16, 2), norm="batch", activation="none"),
            ample=HostConfig(kind=_VECTOR, widths=(64, 64, 64)),
        ),
        TaskConfig(
            name="mnist1d",
            summary="MNIST-1D: noisy shifted digit strokes of length 40, 1-D convolutions",
            dataset="mnist1d",
            impaired=HostConfig(kind=_SIGNAL, widths=(8, 8, 8), kernel=1, norm="batch", pooling="average"),
            ample=HostConfig(kind=_SIGNAL, widths=(32, 32, 32), kernel=5, norm="batch", pooling="average"),
        ),
        TaskConfig(
            name="mnist1d-mlp",
            summary="the same signals as vectors of 40, an MLP",
            dataset="mnist1d",
            impaired=HostConfig(kind=_VECTOR, widths=(24, 24, 24), activation="none"),
            ample=HostConfig(kind=_VECTOR, widths=(128, 128, 128)),
        ),
    )
}


@dataclass(frozen=True)
class Task:
    """A task ready to run: its host and its data in the shape that the host takes."""

    config: TaskConfig
    host: Host
    data: Dataset


def task_config(name: str) -> TaskConfig:
    """Look a task up.

    Raises
    ------
    EsperError
        There is no such task.
    """
    if name not in TASKS:
        raise EsperError(f"task: unknown task {name!r}; known: {', '.join(TASKS)}")
    return TASKS[name]


def load_task(
    name: str,
    which: Literal["impaired", "ample"],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    width: float = 1.0,
) -> Task:
    """Load the data of a task and shape its host, so many times as wide as the task says."""
    config = task_config(name)
    host_config = config.host_config(which).scaled(width)
    data = shaped(DATASETS[config.dataset](config.split_seed), host_config).to(device, dtype)
    return Task(config, Host(host_config, tuple(data.train.x.shape[1:]), data.classes), data)


def load_hosts(config: PopulationConfig, contexts: ContextConfig) -> list[Task]:
    """Load every task of the contexts, with a host of each width.

    Raises
    ------
    EsperError
        There is no such task, or its hosts have other sites: the same action would mean something else.
    """
    names = (config.task, *contexts.other_tasks)
    tasks = [load_task(name, config.host, config.device, width=w) for name in names for w in contexts.host_widths]
    for task in tasks:
        own, first = ([str(site.kind) for site in one.host.slot_config.sites] for one in (task, tasks[0]))
        if own != first:
            raise EsperError(
                f"other_tasks: the sites of {task.config.name} are {', '.join(own)}, those of {config.task} "
                f"{', '.join(first)}; name tasks with the same"
            )
    return tasks


def shaped(data: Dataset, host: HostConfig) -> Dataset:
    """Flatten the examples where the host takes vectors."""
    if host.kind is not SiteKind.VECTOR:
        return data

    def flat(split: Split) -> Split:
        return Split(split.x.flatten(1), split.y)

    return Dataset(
        data.name, data.classes, flat(data.train), flat(data.reward_validation), flat(data.selection), flat(data.test)
    )
