"""Parts of Esper tried out on this machine, on data made on the spot: what `esper doctor` cannot tell by looking.

Each test gives one line, and raises where this machine does something else than it must.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from esper.kasmina.export import export_row
from esper.kasmina.hosts import Host
from esper.kasmina.rows.core import Statistics
from esper.leyline.actions import SiteKind
from esper.leyline.config import HostConfig, OptimizerConfig, RunConfig, TaskConfig, TrainingConfig
from esper.leyline.errors import EsperError
from esper.leyline.streams import Stream
from esper.simic.checkpoint import EPISODE, episode_parts, restore_episode
from esper.simic.episode import Episode
from esper.tolaria.batches import shared
from esper.tolaria.checkpoints import Checkpoint, Checkpoints
from esper.tolaria.datasets import Dataset, Split
from esper.tolaria.tasks import Task

ROWS = 8
EXAMPLES, CLASSES = 128, 4
SHAPES = {SiteKind.VECTOR: (24,), SiteKind.IMAGE: (2, 8, 8)}
"""Of one example."""
BROKEN = 3
"""The row that fails."""
SEED = 0
UPDATES = {1: 3, 2: 1}
"""That are repeated, by number of threads: where two have to wait for others at each kernel, one can take a second."""
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-2}
"""How far results may be off, relative to the largest. In single precision some devices convolve in TF32."""


def row_layers() -> str:
    """Three grown rows at once against three plain modules."""
    episode = _episode(SiteKind.IMAGE, rows=3, static=True, dtype=torch.float64)
    episode.trainer.run(2)
    population, x = episode.population, episode.task.data.test.x
    with torch.no_grad():
        logits, _ = population.forward(
            shared(x, 3, population.lane_axis), population.main_pass, statistics=Statistics.RUNNING
        )
        plain = torch.stack([export_row(population, row)(x) for row in range(3)])
    worst = float((logits - plain).abs().max())
    # Written so that NaN fails, here and below.
    if not worst < 1e-9:
        raise EsperError(f"rows differ from plain modules by {worst:.1e}; this torch build computes wrongly")
    return f"equal to plain modules to {worst:.0e}"


def rollback() -> str:
    """Break one row of two equal populations: it must be caught at once, come back, and leave the others alone."""
    broken, healthy = (_episode(SiteKind.VECTOR, static=True) for _ in range(2))
    for episode in (broken, healthy):
        for _ in range(3):
            episode.advance()
    good = _row(broken, BROKEN)
    broken.population.hosts.theta.detach()[BROKEN, 0] = torch.nan
    for episode in (broken, healthy):
        episode.advance()
    caught = broken.governor.retired_R.nonzero()[:, 0].tolist()
    if caught != [BROKEN]:
        raise EsperError(f"row {BROKEN} failed, and the governor caught {caught or 'none'}")
    if not _same(_row(broken, BROKEN), good):
        raise EsperError("a row that failed did not come back as it was")
    if not all(_same(_row(broken, row), _row(healthy, row)) for row in range(ROWS) if row != BROKEN):
        raise EsperError("a row that failed changed another one")
    return f"1 of {ROWS} rows broken, caught and back to the bit; the others did not notice"


def checkpoint() -> str:
    """Keep an episode after two decisions and after three, damage the newer checkpoint, and go on from the older."""
    whole, again = (_episode(SiteKind.VECTOR, static=True) for _ in range(2))
    kept = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder))
        for _ in range(3):
            whole.advance()
            kept.append(Checkpoint(whole.decision, *episode_parts(whole)))
            checkpoints.save(kept[-1])
        if checkpoints.load(_unexpected) != kept[-1]:
            raise EsperError("a checkpoint does not read as it was written")
        damaged = max(checkpoints.folder.glob(f"*/{EPISODE}"))
        content = bytearray(damaged.read_bytes())
        content[-100] ^= 1
        damaged.write_bytes(content)
        complaints: list[str] = []
        saved = checkpoints.load(complaints.append)
    if saved != kept[-2] or len(complaints) != 1:
        raise EsperError("a damaged checkpoint was not found, or the one before it not used")
    restore_episode(again, saved.facts, saved.files)
    again.advance()
    if not all(_same(_row(again, row), _row(whole, row)) for row in range(ROWS)):
        raise EsperError("an episode that goes on does something else than one that never stopped")
    return "written, read and gone on from to the bit; a changed bit is found, and the one before used"


def device() -> str:
    """A matrix product and two updates on each device, in both precisions, against NumPy and the CPU in double."""
    zero = torch.zeros(1, dtype=torch.int64)
    a, b = (Stream(SEED, name).uniform(zero, zero, 64 * 64).view(64, 64) - 0.5 for name in "ab")
    product, updated = torch.from_numpy(a.numpy() @ b.numpy()), _updated("cpu", torch.float64)
    told = []
    for where, name in _devices().items():
        for dtype, limit in LIMITS.items():
            errors = {
                "matrix product": _error(a.to(where, dtype) @ b.to(where, dtype), product),
                "update": _error(_updated(where, dtype), updated),
            }
            for what, error in errors.items():
                if not error < limit:
                    raise EsperError(f"{name}: {what} wrong by {error:.1e}; do not compute on this device")
        told.append(name)
    alone = "; no other device" if len(told) == 1 else ""
    return f"products and updates are right on {', '.join(told)}{alone}"


def kernels() -> str:
    """The same updates twice: on the CPU, where Esper promises the same bits, and on whatever else there is."""
    for threads in UPDATES:
        if not _repeats("cpu", threads):
            raise EsperError(
                f"the same updates give other bits on the cpu with {threads} threads; no run can be repeated"
            )
    told = ["cpu yes, with 1 thread and with 2"]
    # Of an accelerator nothing is promised: it is told, so that nobody trusts it unseen.
    told += [f"{name} {'yes' if _repeats(where, 1) else 'no'}" for where, name in _devices().items() if where != "cpu"]
    return f"updates repeated bit for bit: {'; '.join(told)}"


def _repeats(where: str, threads: int) -> bool:
    """Whether a few updates give the same bits twice, on vectors and on images, with a seed at every site."""
    return all(_same(*(_trained(kind, where, threads) for _ in range(2))) for kind in SHAPES)


def _trained(kind: SiteKind, where: str, threads: int) -> list[Tensor]:
    """Everything that a few updates changed, which alone run on so many threads."""
    episode = _episode(kind, where, static=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        loss_R = episode.trainer.run(UPDATES[threads])
    finally:
        torch.set_num_threads(before)
    banks = episode.population.banks
    return [loss_R, *(t for bank in banks for t in (bank.theta.detach(), bank.first, bank.second, *bank.buffers))]


def _updated(where: str, dtype: torch.dtype) -> Tensor:
    """How far two updates move the weights of hosts, by a method that makes no more of a rounding than it is."""
    episode = _episode(SiteKind.IMAGE, where, dtype=dtype, optimizer=OptimizerConfig(method="sgd"))
    theta = episode.population.hosts.theta.detach()
    before = theta.clone()
    episode.trainer.run(2)
    return theta - before


def _episode(
    kind: SiteKind,
    where: str = "cpu",
    *,
    rows: int = ROWS,
    static: bool = False,
    dtype: torch.dtype = torch.float32,
    optimizer: OptimizerConfig | None = None,
) -> Episode:
    training = TrainingConfig(horizon=8, updates_per_decision=2, batch_size=32)
    config = RunConfig(training=training, optimizer=optimizer or OptimizerConfig(), device=where)
    task = _task(kind, where, dtype)
    return Episode(config, task, "never", torch.arange(rows), static=static, dtype=dtype)


def _task(kind: SiteKind, where: str, dtype: torch.dtype) -> Task:
    """Noise, and as its class the part of an example with the largest sum: enough to learn something from."""
    number = torch.arange(EXAMPLES)
    x = Stream(SEED, "self-test").uniform(number, torch.zeros_like(number), math.prod(SHAPES[kind])) - 0.5
    split = Split(x.view(EXAMPLES, *SHAPES[kind]), x.view(EXAMPLES, CLASSES, -1).sum(2).argmax(1))
    data = Dataset("self-test", CLASSES, split, split, split, split).to(where, dtype)
    host = HostConfig(kind=kind, widths=(8, 8), norm="batch", pooling="average" if kind is SiteKind.IMAGE else "none")
    config = TaskConfig(name=data.name, summary=data.name, dataset="digits", impaired=host, ample=host)
    return Task(config, Host(host, SHAPES[kind], CLASSES), data)


def _devices() -> dict[str, str]:
    """Devices that Esper can use here, and what they are called."""
    found = {"cpu": "cpu"}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_device_name()
    return found


def _row(episode: Episode, row: int) -> list[Tensor]:
    """Copy parameters and running statistics of a row, those of its seeds included."""
    banks = episode.population.banks
    lanes = [(bank, torch.from_numpy(bank.row == row)) for bank in banks]
    return [tensor[lane].clone() for bank, lane in lanes for tensor in (bank.theta.detach(), *bank.buffers)]


def _same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def _error(found: Tensor, right: Tensor) -> float:
    """The largest difference, in units of the largest number."""
    return float((found.cpu().double() - right).abs().max() / right.abs().max())


def _unexpected(complaint: str) -> None:
    raise EsperError(complaint)
