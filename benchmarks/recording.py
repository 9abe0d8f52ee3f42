"""The run store: what recording costs a round, how large it gets, and how fast its views answer.

    python benchmarks/recording.py

One thread, `digits-mlp`, an untrained policy, level full. "Run" is what the thread that trains does for the record
(packing, unpacking, queueing), "writer" the processor time of the other thread; their sum is what recording costs where
nothing runs side by side. "Against off" compares whole rounds with and without, which take turns: it includes
everything, this machine's noise too. Size and views are those of 240,000 decisions with 3 slots: a real round of
16 x 150 written 100 times, with every column of a learning run filled; of the untrained policy, which grows and culls
all the time, and of the heuristic, which soon has all slots full.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import report

from esper.karn.reader import RunReader
from esper.karn.views import views
from esper.leyline.config import PolicyConfig, RunConfig
from esper.nissa.store import RunStore
from esper.nissa.writer import Rows
from esper.simic import columns, episode, recorder
from esper.simic.episode import Episode
from esper.simic.recorder import RoundRecorder, run_columns
from esper.tamiyo.policy.network import FactoredRecurrentActorCritic
from esper.tamiyo.policy.saved import save_policy
from esper.tolaria.machine import tune_process
from esper.tolaria.tasks import load_task

REPEATS = 3
SHAPES = ((16, 150), (256, 40))
ROUNDS = 100


class Spent:
    """Adds up the time of functions of the run's thread that serve the record alone."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function):
        def timed(*arguments, **more):
            start = time.perf_counter()
            result = function(*arguments, **more)
            self.seconds += time.perf_counter() - start
            return result

        return timed


def config_of(controller: str, horizon: int) -> RunConfig:
    return RunConfig(task="digits-mlp", controller=controller, training={"horizon": horizon})


def run_round(config: RunConfig, rows: int, path: Path | None) -> tuple[float, float, float, list]:
    """Wall time of a round, the run's and the writer's share of it for the record, and the steps."""
    task = load_task(config.task, config.host, config.device)
    made = Episode(config, task, config.controller, torch.arange(rows))
    spent, steps = Spent(), []
    if path is None:
        start = time.perf_counter()
        while not made.done:
            made.advance()
        return time.perf_counter() - start, 0.0, 0.0, steps
    made._parcel = spent.wrap(made._parcel)
    unpack, episode._step = episode._step, spent.wrap(episode._step)
    with RunStore(path, run_columns(config, "bench", config.training.horizon)) as store:
        start = time.perf_counter()
        told = RoundRecorder(store, 0, made, purpose="train", arm="policy", controller="policy")
        tell = spent.wrap(told.decision)
        while not made.done:
            step = made.advance(record=True)
            if step is not None:
                steps.append(step)
                tell(step)
        steps.append(made.step())
        tell(steps[-1])
        spent.wrap(told.end)("finished", {"training_s": time.perf_counter() - start})
        wall = time.perf_counter() - start
    episode._step = unpack
    with RunReader(path) as reader:
        ((writer,),) = reader.query("SELECT sum(cpu_s) FROM timing WHERE phase = 'write'", 1).rows
    return wall, spent.seconds / wall, writer / wall, steps


def cost(folder: Path, controller: str) -> list[dict[str, object]]:
    """Cost of recording a round."""
    lines = []
    for rows, horizon in SHAPES:
        config = config_of(controller, horizon)
        taken: dict[str, list[float]] = {"off": [], "full": [], "run": [], "writer": []}
        run_round(config_of(controller, 3), rows, None)
        for number in range(REPEATS):
            taken["off"].append(run_round(config, rows, None)[0])
            wall, run, writer, _ = run_round(config, rows, folder / f"{rows}-{number}.sqlite")
            for name, value in (("full", wall), ("run", run), ("writer", writer)):
                taken[name].append(value)
        median = {name: statistics.median(values) for name, values in taken.items()}
        total = median["run"] + median["writer"]
        ratios = [full / off for full, off in zip(taken["full"], taken["off"], strict=True)]
        shares = f"{total:.2%} (run {median['run']:.2%}, writer {median['writer']:.2%})"
        more = f"round {median['full']:.1f} s; against off {min(ratios):.3f} to {max(ratios):.3f}"
        lines.append(line(f"{rows} rows x {horizon} decisions", shares, "1 %", total <= 0.01, more))
    return lines


def large_store(path: Path, config: RunConfig, steps: list) -> None:
    """Write a store of 240,000 decisions."""
    task = load_task(config.task, config.host, config.device)
    rows = len(steps[0].value_R)
    generator = np.random.default_rng(0)
    plain = columns.decision_columns

    def paid(step):
        made = plain(step)
        gain, rent = generator.normal(size=(2, len(made["row"])))
        return made | {"reward": gain + rent, "reward_gain": gain, "reward_rent": rent}

    recorder.decision_columns = paid
    made = Episode(config, task, config.controller, torch.arange(rows))
    with RunStore(path, run_columns(config, "bench", ROUNDS * len(steps))) as store:
        for number in range(ROUNDS):
            twin = number if number else None
            told = RoundRecorder(
                store, number, made, purpose="train", arm="policy", controller="policy", twin_round=twin
            )
            for step in steps:
                told.decision(step)
            heads = [f"head {at}" for at in range(8)]
            head = {"round": number, "head": heads, "used_decisions": 10, "choice_decisions": 9, "entropy": 0.5}
            store.add(8, lambda head=head: [Rows("head", head)])
            told.coalitions(np.repeat(np.arange(rows), 8), np.tile(SUBSETS, (rows, 1)), torch.rand(8 * rows), 300)
            told.end("finished", {"training_s": 1.0, "reward": 0.1})
    recorder.decision_columns = plain


SUBSETS = (np.arange(8)[:, None] >> np.arange(3)) & 1


def view_times(path: Path) -> dict[str, float]:
    """Median seconds of each view, warm, with the row limit of the command."""
    times: dict[str, float] = {}
    with RunReader(path) as reader:
        for name in views():
            taken = []
            for _ in range(6):
                start = time.perf_counter()
                reader.view(name, 1000)
                taken.append(time.perf_counter() - start)
            times[name] = statistics.median(taken[1:])
    return times


def large(folder: Path, controller: str) -> list[dict[str, object]]:
    """Size of a large store, and its slowest view."""
    name = controller.partition(":")[0]
    rows, horizon = SHAPES[0]
    config = config_of(controller, horizon)
    *_, steps = run_round(config, rows, folder / f"steps-{name}.sqlite")
    path = folder / f"large-{name}.sqlite"
    large_store(path, config, steps)
    size = path.stat().st_size / 1e6
    with RunReader(path) as reader:
        tables = ("decision", "slot", "transition")
        counts = [reader.query(f"SELECT count(*) FROM {table}", 1).rows[0][0] for table in tables]
    about = ", ".join(f"{count:,} {table}s" for table, count in zip(tables, counts, strict=True))
    times = view_times(path)
    slowest = sorted(times, key=lambda view: -times[view])[:5]
    most = times[slowest[0]]
    about_views = ", ".join(f"{view} {times[view]:.3f}" for view in slowest)
    return [
        line(f"size, {name}", f"{size:.0f} MB", "100 MB", size <= 100, about),
        line(f"slowest view, {name}", f"{most:.3f} s", "0.3 s", most <= 0.3, about_views),
    ]


def line(what: str, measured: str, most: str, met: bool, more: str) -> dict[str, object]:
    return {"what": what, "measured": measured, "at most": most, "met": met, "more": more}


def main() -> None:
    tune_process(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy = FactoredRecurrentActorCritic(PolicyConfig())
        policy.initialise(torch.Generator().manual_seed(0))
        save_policy(policy, folder / "policy")
        controller = f"policy:{folder / 'policy'}"
        lines = [*cost(folder, controller), *large(folder, controller), *large(folder, "heuristic")]
    report("recording", lines, {"repeats": REPEATS, "rounds of the large store": ROUNDS})


if __name__ == "__main__":
    main()
