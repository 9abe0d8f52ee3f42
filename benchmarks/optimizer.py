"""Row-wise AdamW with clipping and non-finite guard against one fused torch optimizer for each row.

    python benchmarks/optimizer.py [--rows 64]

The torch side clips each row's gradient with `clip_grad_norm_` and skips a row whose norm is not finite, which is
what the row-wise optimizer does; a second line leaves clipping and guard out on the torch side.
"""

import argparse

import torch
from common import alternate, report
from population import HOSTS, make_population

from esper.kasmina.export import export_row
from esper.kasmina.optim import RowOptimizer
from esper.leyline.config import OptimizerConfig
from esper.tolaria.machine import tune_process

AT_LEAST = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=51)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    tune_process(args.threads)
    config = OptimizerConfig()
    rows = []
    for name, (host, example, _) in HOSTS.items():
        population = make_population(host, example, args.rows, filled=False)
        bank = population.hosts
        source = torch.randn_like(bank.theta)
        rate = torch.full((args.rows,), 1e-3)
        optimizer = RowOptimizer(config)
        modules = [export_row(population, r) for r in range(args.rows)]
        for module in modules:
            for parameter in module.parameters():
                parameter.grad = torch.randn_like(parameter)
        singles = [torch.optim.AdamW(m.parameters(), lr=1e-3, fused=True) for m in modules]
        parameters = [list(m.parameters()) for m in modules]

        def row_wise(optimizer=optimizer, bank=bank, source=source, rate=rate) -> None:
            optimizer.step([bank], [source.clone()], [rate], [None])

        def guarded(singles=singles, parameters=parameters) -> None:
            for single, own in zip(singles, parameters, strict=True):
                if torch.nn.utils.clip_grad_norm_(own, config.clip_norm).isfinite():
                    single.step()

        def bare(singles=singles) -> None:
            for single in singles:
                single.step()

        taken = alternate({"row-wise": row_wise, "guarded": guarded, "bare": bare}, args.repeats)
        for side, label in (("guarded", "clipping and guard on both sides"), ("bare", "torch without either")):
            ratio = taken[side] / taken["row-wise"]
            rows.append(
                {
                    "host": name,
                    "parameters of a row": bank.theta.shape[1],
                    "compared": label,
                    "torch (ms)": round(1e3 * taken[side], 2),
                    "row-wise (ms)": round(1e3 * taken["row-wise"], 2),
                    "times": round(ratio, 1),
                    "at least": AT_LEAST,
                    "reached": ratio >= AT_LEAST,
                }
            )
    report("optimizer", rows, settings=vars(args))


if __name__ == "__main__":
    main()
