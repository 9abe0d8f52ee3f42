"""What a seed is worth by blueprint and operator, and why multiplication helps a linear host.

    python benchmarks/operators.py [--starts 8] [--horizon 40] [--updates 10]

One seed in r0c0 from decision 0, committed as soon as its gates allow, against the same host alone. The gain is
the loss of the host alone less that of the grown network on the selection split (nats), paired by start: mean and
standard error over starts that no other table uses. "nobody": no start has its seed in the end.
`best net` is the best operator's gain less 0.1 nats for each unit of ln(1 + added / host parameters).

The second table trains plain networks of torch on the task of the first host, from the start: its linear chain with
one function in place of the seed, to see what it is of a multiplicative seed that helps. The third one plays some
blueprints on signals once more, beside a gate that sees zeros instead of its example ("blind"), and on a host whose
kernels are 5 wide instead of 1.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from common import report
from torch import Tensor, nn

from esper.exam.grid import play
from esper.exam.plans import Family, Plan, Seed, plan_table
from esper.kasmina import population
from esper.kasmina.hosts import Host
from esper.leyline.actions import Blueprint, Style
from esper.leyline.config import ContextConfig, OptimizerConfig, PopulationConfig, RecordConfig, TrainingConfig
from esper.leyline.starts import EXAM, start_ids
from esper.simic.contexts import grid
from esper.tamiyo.controllers.plan import PlanController
from esper.tolaria.machine import tune_process
from esper.tolaria.schedule import rate_factor
from esper.tolaria.tasks import Task, load_task

FIRST_START = 2000
PRICE = 0.1
STYLES = {"ADD": Style.LINEAR_ADD, "MULTIPLY": Style.LINEAR_MULTIPLY, "GATE": Style.GATED_GATE}
CASES: dict[str, tuple[str, dict[str, object], float]] = {
    "mnist1d-mlp": ("mnist1d-mlp", {}, 0.0),
    "mnist1d-mlp, 40 % wrong labels": ("mnist1d-mlp", {}, 0.4),
    "mnist1d-mlp with ReLU": ("mnist1d-mlp", {"activation": "relu"}, 0.0),
    "digits-mlp": ("digits-mlp", {}, 0.0),
    "digits-mlp with ReLU": ("digits-mlp", {"activation": "relu"}, 0.0),
    "mnist1d": ("mnist1d", {}, 0.0),
    "digits": ("digits", {}, 0.0),
}
"""Task, changes of its impaired host, share of wrong labels."""
GATED = {"mnist1d": CASES["mnist1d"], "mnist1d, kernels of 5": ("mnist1d", {"kernel": 5}, 0.0)}
OF_GATED = frozenset({Blueprint.NORM, Blueprint.POINTWISE, Blueprint.CONV_LIGHT})
"""Hosts and blueprints of the third table."""


def task_of(name: str, changes: dict[str, object]) -> Task:
    """The task with its impaired host, changed."""
    task = load_task(name, "impaired")
    host = task.config.impaired.model_copy(update=changes)
    return replace(task, host=Host(host, tuple(task.data.train.x.shape[1:]), task.data.classes))


def worth(
    case: str, starts: int, training: TrainingConfig, only: frozenset[Blueprint] = frozenset(Blueprint)
) -> list[dict[str, object]]:
    """Gains of blueprints with every operator on one host."""
    name, changes, noise = (CASES | GATED)[case]
    task = task_of(name, changes)
    contexts = ContextConfig(prices=(0.0,), learning_rates=(OptimizerConfig().learning_rate,), label_noise=(noise,))
    config = PopulationConfig(task=name, training=training, recording=RecordConfig(record="off"))
    blueprints = [b for b in Family.of(config, task.host.slot_config).fitting[0] if b in only]
    plans = [Plan()] + [Plan((Seed(0, b, style),)) for b in blueprints for style in STYLES.values()]
    rows = grid(contexts, start_ids(EXAM, FIRST_START, starts), (0.0,), len(plans))
    table_RKF = plan_table(plans * starts)
    slots = task.host.slot_config.slots
    played = play(config, task, rows, lambda _: PlanController(table_RKF, slots), lambda data: data.selection)
    loss_KN, added_KN = (column.reshape(starts, len(plans)) for column in (played.loss, played.added))
    gain_KN = loss_KN[:, :1] - loss_KN
    lines: list[dict[str, object]] = []
    for at, blueprint in enumerate(blueprints):
        line: dict[str, object] = {"host": case, "blueprint": blueprint.name.lower()}
        nets = []
        for operator, place in zip(STYLES, range(1 + at * len(STYLES), 1 + (at + 1) * len(STYLES)), strict=True):
            added = added_KN[:, place].max()
            line[operator] = told(gain_KN[:, place]) if added else "nobody"
            cost = np.log1p(added_KN[:, place] / task.host.body.parameter_count)
            nets.append((gain_KN[:, place] - PRICE * cost).mean())
        # A gate has parameters of its own; ADD and MULTIPLY have those of the seed.
        parameters = int(added_KN[:, 1 + at * len(STYLES) :][:, :2].max())
        lines.append(line | {"parameters": parameters, "best net": round(float(max(nets)), 3)})
    return lines


@contextmanager
def blind_gates() -> Iterator[None]:
    """Every gate sees zeros: it still learns one number, but cannot tell examples apart."""
    whole = population.SiteModules

    def blind(delta: Callable[..., Tensor], gate: Callable[..., Tensor]) -> population.SiteModules:
        return whole(delta, lambda call, pooled: gate(call, torch.zeros_like(pooled)))

    population.SiteModules = blind
    try:
        yield
    finally:
        population.SiteModules = whole


def gated(starts: int, training: TrainingConfig) -> list[dict[str, object]]:
    """What a gate is good for: on a host that sees one place at a time, and on one that sees five."""
    lines = []
    for case in GATED:
        seeing = worth(case, starts, training, OF_GATED)
        with blind_gates():
            blind = worth(case, starts, training, OF_GATED)
        columns = ("host", "blueprint", "ADD", "GATE")
        lines += [
            {c: line[c] for c in columns} | {"GATE, blind": other["GATE"]}
            for line, other in zip(seeing, blind, strict=True)
        ]
    return lines


def told(values: np.ndarray) -> str:
    """Mean and standard error."""
    return f"{values.mean():+.3f} ± {values.std(ddof=1) / len(values) ** 0.5:.3f}"


class Chain(nn.Module):
    """The linear host of mnist1d-mlp with a function behind its first layer."""

    def __init__(self, task: Task, seed: int, form: Callable[["Chain", Tensor], Tensor]) -> None:
        super().__init__()
        widths = [task.data.train.x.shape[1], *task.config.impaired.widths, task.data.classes]
        self.form, width = form, widths[1]
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.scale = nn.Parameter(torch.zeros(width))
        self.matrix = nn.Parameter(torch.zeros(width, width))
        self.squeeze = nn.Sequential(nn.Linear(width, 6), nn.ReLU(), nn.Linear(6, width))
        self.wide = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        for parameter in (*self.squeeze[2].parameters(), *self.wide[2].parameters()):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers[0](x)
        h = self.form(self, h)
        for layer in self.layers[1:]:
            h = layer(h)
        return h


FORMS: dict[str, Callable[[Chain, Tensor], Tensor]] = {
    "h": lambda net, h: h,
    "h (1 + tanh(c h)), c a number for each channel": lambda net, h: h * (1 + (net.scale * h).tanh()),
    "h (1 + tanh(C h)), C a matrix": lambda net, h: h * (1 + (h @ net.matrix).tanh()),
    "h (1 + tanh(s(h))), s the squeeze": lambda net, h: h * (1 + net.squeeze(h).tanh()),
    "h (1 + tanh(h tanh(s(h)))): attention, MULTIPLY": lambda net, h: h * (1 + (h * net.squeeze(h).tanh()).tanh()),
    "h (1 + tanh(m(h))): mlp_small, MULTIPLY": lambda net, h: h * (1 + net.wide(h).tanh()),
    "h + m(h): mlp_small, ADD": lambda net, h: h + net.wide(h),
    "relu(h)": lambda net, h: h.relu(),
    "|h|": lambda net, h: h.abs(),
    "h h": lambda net, h: h * h,
}


def explained(starts: int, updates: int) -> list[dict[str, object]]:
    """Selection loss of the linear chain with each form, trained from the start."""
    task, config = load_task("mnist1d-mlp", "impaired"), OptimizerConfig()
    train, selection = task.data.train, task.data.selection
    losses: dict[str, list[float]] = {name: [] for name in FORMS}
    for seed in range(starts):
        for name, form in FORMS.items():
            net = Chain(task, seed, form)
            optimizer = torch.optim.AdamW(net.parameters(), lr=1.0, weight_decay=config.weight_decay)
            draws = torch.Generator().manual_seed(seed)
            for update in range(updates):
                optimizer.param_groups[0]["lr"] = config.learning_rate * rate_factor(update, updates, config)
                index = torch.randint(len(train.y), (32,), generator=draws)
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(train.x[index]), train.y[index]).backward()
                nn.utils.clip_grad_norm_(net.parameters(), config.clip_norm)
                optimizer.step()
            with torch.no_grad():
                losses[name].append(nn.functional.cross_entropy(net(selection.x), selection.y).item())
    alone = np.array(losses["h"])
    return [
        {"function behind the first layer": name, "gain": told(alone - np.array(loss)) if name != "h" else "0"}
        for name, loss in losses.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=8, help="starts that every plan plays")
    parser.add_argument("--horizon", type=int, default=40, help="decisions of an episode")
    parser.add_argument("--updates", type=int, default=10, help="of a decision")
    args = parser.parse_args()
    tune_process(1)
    training = TrainingConfig(horizon=args.horizon, updates_per_decision=args.updates)
    report("operators_explained", explained(args.starts, args.horizon * args.updates), settings=vars(args))
    report("operators_gated", gated(args.starts, training), settings=vars(args))
    lines = [line for case in CASES for line in worth(case, args.starts, training)]
    report("operators", lines, settings=vars(args))


if __name__ == "__main__":
    main()
